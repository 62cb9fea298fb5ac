"""Hybrid linear attention: six token mixers with a fixed state, and full attention in a layer out of so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, rotated, sample
from saccade.errors import known, positive
from saccade.hosts.delta import DeltaNet, GatedDeltaNet
from saccade.mix import turn_at
from saccade.scan import UNTRACKED, State, affine, associative_scan, delta_rule, linear_attention
from saccade.scan.decays import gate_bounded, gate_logsigmoid, retention
from saccade.where import Causal

DELTA = {"deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet}
MIXERS = ("hgrn", "retnet", "gla", "hgrn2", *DELTA)


@dataclass(frozen=True)
class Kept:
    """What a decoder keeps: `memory` of a linear layer, (B, C) for hgrn; keys and values (B, Hkv, tokens, D) of a full
    one; tokens read so far. A delta layer keeps a state of its own.
    """

    memory: State | Tensor | None
    keys: Tensor | None
    values: Tensor | None
    length: int


def full_layers(num_layers: int, ratio: int | None) -> list[bool]:
    """Which of the layers attend: round(num_layers / (ratio + 1)) of them, evenly spaced; None: none.

    >>> [i for i, full in enumerate(full_layers(24, 6)) if full]
    [7, 15, 23]
    """
    count = 0 if ratio is None else round(num_layers / (ratio + 1))
    return [(i + 1) * count // num_layers > i * count // num_layers for i in range(num_layers)]


class HybridLinearAnalysis(Mixer):
    """The token mixer of layer `layer` of a hybrid stack: one of six recurrences, or causal softmax attention.

        hgrn:            h_t = f_t * h_{t-1} + (1 - f_t) * silu(v_t),   o_t = h_t                     h (B, C)
        retnet:          S_t = g_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(D),   R_t q_t, R_t k_t for q_t, k_t
        gla:             S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(D),   a_t^16 = sigmoid(U x_t)
        hgrn2:           S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T silu(q_t)
        deltanet:        S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(D)
        gated_deltanet:  S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   log a_t = -exp(A) softplus(W x_t + c)
        full:            o_t = sum_{j <= t} softmax_j(R_t q_t . R_j k_j / sqrt(D)) v_j
        y_t = W_o (RMSNorm(o_t) * silu(W_g x_t)),   of a full layer   y_t = W_o o_t

    x, y (B, N, C); q (B, H, N, D), k, f, a (B, Hkv, N, D), v (B, Hkv, N, D); g_h = 1 - 2^(-5-h);
    f_t = l + (1 - l) sigmoid(W x_t), l = layer / num_layers, so that upper layers forget less; b_t = sigmoid(W x_t),
    one a key head. In both delta layers q, k, v pass a causal depthwise convolution and silu, and q and k have length
    1. R_t turns the halves of a head by t theta^(-2 i / D). RMSNorm is per head with a weight, of all channels for
    hgrn. U: two matrices, `gate_rank` rows between, and a bias. round(num_layers / (ratio + 1)) layers are full, evenly
    spaced and the last among them.
    Paper: arXiv 2507.06457, of which the abstract was read; hgrn, hgrn2 and gated_deltanet follow the layers of
    flash-linear-attention, in which its 72 models were built, the others arXiv 2307.08621, 2312.06635 and 2406.06484.
    Deviations: one shell of projections, norm and gate for all, D for keys and values alike, so that nothing but the
    recurrence differs; l stays where the learned bounds begin; the place of full layers is a choice of ours.
    mixer: one of the six names ("gated_deltanet"). layer: counted from 0 (0). num_layers: 24. ratio: linear layers to a
    full one (3; the paper has 24, 12, 6, 3; None: linear layers alone). conv: taps (4). gate_rank: 16. theta:
    10000.0. chunk: tokens a matrix product takes at once (64), of no effect on the result.
    Costs D^2 + chunk D a token and head for linear layers, N D for full ones; a state of D^2 numbers a key head (C in
    all for hgrn), or of 2 D a token and key head.
    Errors: ValueError for another mixer, a layer that there is not, an odd D, theta <= 0.

    >>> kinds = [HybridLinearAnalysis(Dims(2, 4), layer=i, num_layers=8).full for i in range(8)]
    >>> kinds.count(True), kinds[3], kinds[7]
    (2, True, True)
    """

    spec = Spec(
        id="hybrid_linear_analysis",
        name="Systematic analysis of hybrid linear attention",
        title="A Systematic Analysis of Hybrid Linear Attention",
        paper="2507.06457",
        year=2025,
        family="recurrent",
        uses=("linear_attention", "delta_rule", "associative_scan", "affine", "attend", "Causal", "turn_at"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        mixer: str = "gated_deltanet",
        layer: int = 0,
        num_layers: int = 24,
        ratio: int | None = 3,
        conv: int = 4,
        gate_rank: int = 16,
        theta: float = 10000.0,
        chunk: int = 64,
    ) -> None:
        super().__init__(dims)
        if positive("layer", layer, least=0) >= positive("num_layers", num_layers):
            raise ValueError(f"layer: got {layer} of num_layers {num_layers}; layers count from 0")
        if ratio is not None:
            positive("ratio", ratio, least=0)
        if dims.head_dim % 2:
            raise ValueError(
                f"dims: got head_dim {dims.head_dim}; pass an even one, of which positions turn the halves"
            )
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        known("mixer", mixer, MIXERS)
        self.full = full_layers(num_layers, ratio)[layer]
        self.kind = "full" if self.full else mixer
        self.least, self.theta, self.chunk = layer / num_layers, theta, positive("chunk", chunk)
        positive("conv", conv), positive("gate_rank", gate_rank)
        made = DELTA.get(self.kind)
        self.delta = None if made is None else made(dims, taps=conv, chunk=chunk)
        if self.delta is not None:
            return
        c, kv = dims.dim, dims.num_kv_heads * dims.head_dim
        # In the HGRNs the gate takes the place of the key; a vector state has no query, and keys of its own a channel.
        vector = self.kind == "hgrn"
        self.widths = (0, c, c) if vector else (c, kv, kv)
        self.project, self.out = nn.Linear(c, sum(self.widths), bias=False), nn.Linear(c, c, bias=False)
        if not self.full:
            self.gate, self.norm = nn.Linear(c, c, bias=False), nn.RMSNorm(c if vector else dims.head_dim, eps=1e-5)
        if self.kind == "gla":
            self.forget = nn.Sequential(nn.Linear(c, gate_rank, bias=False), nn.Linear(gate_rank, kv))

    def read(self, x: Tensor, state: Kept | None = None) -> tuple[Tensor, Kept]:
        """o (B, N, C) before norm and gate, and what is kept after the last token."""
        d, kind, start = self.dims, self.kind, 0 if state is None else state.length
        length, memory = start + x.shape[1], None if state is None else state.memory
        y = self.project(x)
        if kind == "hgrn":
            return self.vector(y, cast(Tensor | None, memory), length)
        q, k, v = d.split(y)
        if kind in ("full", "retnet"):
            q, k = turn_at(q, start, self.theta), turn_at(k, start, self.theta)
        if kind == "full":
            if state is not None:
                k, v = torch.cat([cast(Tensor, state.keys), k], 2), torch.cat([cast(Tensor, state.values), v], 2)
            return attend(q, k, v, Causal()).transpose(1, 2).flatten(2), Kept(None, k, v, length)
        options: Any = {"state": UNTRACKED if memory is None else memory, "return_state": True, "chunk": self.chunk}
        if kind == "hgrn2":
            decay = gate_bounded(k, self.least)
            o, after = linear_attention(F.silu(q), -torch.expm1(decay).to(v.dtype), v, log_decay=decay, **options)
        else:
            if kind == "gla":
                decay = gate_logsigmoid(self.forget(x)).unflatten(2, (-1, d.head_dim)).transpose(1, 2)
            else:
                # Logarithms in double precision: those of `retention` are rounded to float32.
                heads_at = torch.arange(d.num_heads, dtype=torch.float64, device=x.device)
                decay = torch.log1p(-(2.0 ** (-5 - heads_at)))
            o, after = linear_attention(q, k, v, log_decay=decay, scale=d.head_dim**-0.5, **options)
        return o.transpose(1, 2).flatten(2), Kept(cast(State, after), None, None, length)

    def vector(self, y: Tensor, memory: Tensor | None, length: int) -> tuple[Tensor, Kept]:
        f, v = y.chunk(2, -1)
        decay = gate_bounded(f, self.least)
        first = None if memory is None else (torch.ones_like(decay[:, :1]), memory[:, None])
        _, h = associative_scan(affine, (decay.exp(), -torch.expm1(decay) * F.silu(v)), dim=1, initial=first)
        return h.to(y.dtype), Kept(h[:, -1], None, None, length)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        if self.full:
            return self.out(o)
        normed = self.norm(o.unflatten(2, (-1, self.norm.weight.shape[0]))).flatten(2)
        return self.out(normed * F.silu(self.gate(x)))

    def compute(self, x: Tensor) -> Tensor:
        return self.step(x)[0]

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        if self.delta is not None:
            return self.delta.step(x, state=state)
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        dims, kind, rows = self.dims, self.kind, []
        w = {name.removeprefix("delta."): weight for name, weight in self.named_parameters()}
        batch, c, d, heads = len(x), dims.dim, dims.head_dim, dims.num_heads
        owner = torch.arange(heads) // (heads // dims.num_kv_heads)
        wide = torch.promote_types(x.dtype, torch.float32)

        def sigmoid(t: Tensor) -> Tensor:
            return 1 / (1 + torch.exp(-t))

        projected = x @ w["project.weight"].T
        if "delta" in kind:
            kernel = w["taps"][:, 0]
            taps = kernel.shape[1]
            mixed = []
            for t in range(x.shape[1]):
                near = [projected[:, t - a] * kernel[:, taps - 1 - a] for a in range(min(taps, t + 1))]
                mixed.append(torch.stack(near).sum(0))
            projected = torch.stack(mixed, 1)
            projected = projected * sigmoid(projected)
        memory, past = torch.zeros(()).to(x), []
        for t, row in enumerate(projected.unbind(1)):
            token = x[:, t]
            if kind == "hgrn":
                f = self.least + (1 - self.least) * sigmoid(row[:, :c])
                memory = f * memory + (1 - f) * row[:, c:] * sigmoid(row[:, c:])
                o = memory[:, None]
            else:
                parts = row.view(batch, -1, d)
                q, k, v = parts[:, :heads], parts[:, heads : heads + dims.num_kv_heads], parts[:, -dims.num_kv_heads :]
                k, v = k[:, owner], v[:, owner]
                if kind in ("full", "retnet"):
                    q, k = (rotated(y, torch.tensor(t), self.theta) for y in (q, k))
                left, size = torch.ones(()).to(x), d**-0.5
                if kind == "full":
                    past.append((k, v))
                    scores = torch.stack([(q * key).sum(-1) for key, _ in past], -1) / d**0.5
                    weights = scores.softmax(-1)
                    o = torch.stack([weights[..., i, None] * value for i, (_, value) in enumerate(past)]).sum(0)
                    rows.append(o.flatten(1) @ w["out.weight"].T)
                    continue
                if kind == "retnet":
                    left = (1 - 2.0 ** (-5 - torch.arange(heads, dtype=wide))).to(x)[:, None, None]
                if kind == "gla":
                    logit = token @ w["forget.0.weight"].T @ w["forget.1.weight"].T + w["forget.1.bias"]
                    left = (sigmoid(logit) ** (1 / 16)).view(batch, -1, d)[:, owner, :, None]
                if kind == "hgrn2":
                    f = self.least + (1 - self.least) * sigmoid(k)
                    left, k, q, size = f[..., None], 1 - f, q * sigmoid(q), 1.0
                if "delta" in kind:
                    q, k = (y / y.square().sum(-1, keepdim=True) ** 0.5 for y in (q, k))
                    if kind == "gated_deltanet":
                        step = torch.log1p(torch.exp(token @ w["shut.weight"].T + w["step_bias"]))
                        left = torch.exp(-torch.exp(w["log_rate"]) * step)[:, owner, None, None]
                    beta = sigmoid(token @ w["write.weight"].T)[:, owner, None]
                    found = (k[..., None] * (left * memory)).sum(-2)
                    memory = left * memory + k[..., None] * (beta * (v - found))[..., None, :]
                else:
                    memory = left * memory + k[..., None] * v[..., None, :]
                o = (q[..., None] * memory).sum(-2) * size
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5) ** 0.5 * w["norm.weight"]
            gate = token @ w["gate.weight"].T
            rows.append((o.flatten(1) * gate * sigmoid(gate)) @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        linear = {"layer": 1, "num_layers": 5, "ratio": None, "theta": 30.0, "chunk": 4, "gate_rank": 2, "conv": 3}
        shapes = [(Dims(2, 4), 13), (Dims(2, 2, num_kv_heads=1), 11)]
        cases = [Case(*shapes[i % 2], {**linear, "mixer": mixer}, batch=1) for i, mixer in enumerate(MIXERS)]
        full = {"layer": 4, "num_layers": 5, "ratio": 4, "theta": 30.0}
        return [*cases, Case(Dims(4, 2, num_kv_heads=2), 17, full), Case(Dims(1, 4), 7, batch=1)]

    @claim("The cache that grows with the context falls with the ratio: 1/4, 1/7, 1/13 of full attention's, or none.")
    def cache(cls) -> Finding:
        dims, tokens, grows = Dims(4, 8, num_kv_heads=2), 9, {}
        for ratio in (0, 3, 6, 12, None):
            sizes = []
            for length in (1, tokens):
                size = 0
                for layer in range(91):
                    module, _ = cls._sample(dims, mixer="gla", layer=layer, num_layers=91, ratio=ratio, chunk=16)
                    kept = module.read(torch.zeros(1, length, dims.dim, dtype=torch.float64))[1]
                    size += sum(t.numel() for t in (kept.keys, kept.values) if t is not None)
                    size += kept.memory.memory.numel() if isinstance(kept.memory, State) else 0
                sizes.append(size)
            grows[ratio] = (sizes[1] - sizes[0]) / (tokens - 1)
        whole = grows[0]
        wanted = {0: 91, 3: 23, 6: 13, 12: 7, None: 0}
        holds = all(grows[ratio] == 32 * count for ratio, count in wanted.items())
        figure = ", ".join(f"{g / whole:.3f} at {r}:1" for r, g in grows.items() if r)
        return Finding(holds, f"of 91 layers' growth: {figure}, {grows[None]:g} numbers a token without full layers")

    @claim("Recall of more pairs than a head has channels needs full attention: every state loses some of them.")
    def recall(cls) -> Finding:
        few, many = cls._recalled(8), cls._recalled(64)
        holds = few.pop("full") == many.pop("full") == 1 and all(many[m] < min(few[m], 1) for m in many)
        words = ", ".join(f"{m} {few[m]:.2f} and {many[m]:.2f}" for m in few)
        return Finding(holds, f"of 8 and of 64 pairs in 16 channels full attention finds all, {words}")

    @claim("Keys written a second time: the delta rule returns the new value, decayed states a mixture of the two.")
    def rewritten(cls) -> Finding:
        found = cls._recalled(8, times=2)
        holds = found["deltanet"] > max(found["retnet"], found["gla"])
        words = ", ".join(f"{m} {found[m]:.2f}" for m in ("deltanet", "retnet", "gla"))
        return Finding(holds, f"of 8 keys written twice, the share whose later value is found: {words}")

    @claim(
        "A decayed state without decay is the delta rule on keys that are orthogonal: they part only where keys meet."
    )
    def orthogonal_keys(cls) -> Finding:
        generator = torch.Generator().manual_seed(0)
        k = torch.eye(8, dtype=torch.float64)[None, None]
        q, v = torch.randn(2, 1, 1, 8, 8, generator=generator, dtype=torch.float64)
        ones = torch.ones(1, 1, 8, dtype=torch.float64)
        apart = [
            float((cast(Tensor, delta_rule(q, key, v, ones)) - cast(Tensor, linear_attention(q, key, v))).abs().max())
            for key in (k, F.normalize(k + 0.3, dim=-1))
        ]
        allowed = 8 * torch.finfo(v.dtype).eps * float(v.abs().max())
        holds = apart[0] <= allowed and apart[1] > allowed**0.5
        return Finding(holds, f"outputs {apart[0]:.1e} away for orthogonal keys, {apart[1]:.2f} for keys at an angle")

    @staticmethod
    def _recalled(pairs: int, times: int = 1) -> dict[str, float]:
        """Share of random unit keys, in 16 channels, that read a value nearer to the last one written than to others.

        Every key is written `times` times, with a new value each; 32 samples.
        """
        generator = torch.Generator().manual_seed(pairs)
        k = F.normalize(torch.randn(32, 1, pairs, 16, generator=generator, dtype=torch.float64), dim=-1)
        v = torch.randn(32, 1, times * pairs, 16, generator=generator, dtype=torch.float64)
        v, written = F.normalize(v, dim=-1), k.repeat(1, 1, times, 1)
        blank, none = torch.zeros_like(written), torch.zeros_like(k)
        keys, values, asked = (torch.cat(t, 2) for t in ([written, none], [v, none], [blank, k]))
        write = keys.square().sum(-1).round()
        # Gates that are nearly open, about 0.999 a token.
        gate = gate_logsigmoid(torch.full_like(keys, 4.0))
        reads: dict[str, Any] = {
            "full": attend(k * 1e3, written, v),
            "retnet": linear_attention(asked, keys, values, log_decay=retention(1)),
            "gla": linear_attention(asked, keys, values, log_decay=gate),
            "deltanet": delta_rule(asked, keys, values, write),
        }
        last = torch.arange(pairs) + (times - 1) * pairs
        return {
            name: float(((o[:, :, -pairs:] @ v.mT).argmax(-1) == last).double().mean()) for name, o in reads.items()
        }

    @classmethod
    @torch.no_grad()
    def _sample(cls, dims: Dims, **params: Any) -> tuple[HybridLinearAnalysis, Tensor]:
        return sample(lambda: cls(dims, **params), 1, 20, dims.dim)
