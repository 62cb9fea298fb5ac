"""LightNet: keys that weigh by a softmax over all that was read so far, one a channel, in one scan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, work
from saccade.errors import positive
from saccade.scan import UNTRACKED, State, linear_attention


@dataclass(frozen=True)
class LightNetState:
    """What a decoder keeps: z (B, Hkv, 1, D), the log of the mass in each channel, and the memory."""

    mass: Tensor
    memory: State


class LightNet(Mixer):
    """Linear attention by additive recurrence: the decay is what makes the keys' weights add up to 1.

        z_t = log sum_{j <= t} exp(k_j),   S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T
        o_t = S_t^T q_t = sum_{j <= t} (q_t . p_tj) v_j,   p_tj = exp(k_j - z_t)    (each channel of p_t adds up to 1)
        y_t = W_o (RMSNorm(o_t) * silu(W_2 W_1 x_t)),      q_t = silu(W_q x_t)
        not causal: z = log sum_j exp(k_j) over all tokens, o_i = (sum_j exp(k_j - z) v_j^T)^T q_i

    x, y (B, N, C); q, o (B, H, N, D), k, z (B, Hkv, N, D), v (B, Hkv, N, D); RMSNorm, of all heads, has a weight. Not
    causal, nothing depends on the order of tokens, so that one pass serves tokens of any number of axes. Paper: arXiv
    2405.21022; the layer follows flash-linear-attention's, whose z_0 is -inf: the first key has weight 1. The
    authors' later code (xmixers) starts at z_0 = 0, one unit of mass that holds nothing, and gates by a sigmoid before
    the norm. Deviations: the positions that both the paper and the authors' code add, once to the input of the model
    (TPE, a decayed sum an axis) and to q and k (LRPE), are left to the host, and so is flash-linear-attention's
    optional short convolution. Query heads may share keys and values.
    causal: True. gate_rank: rows of W_1 (128). chunk: tokens a matrix product takes at once (64), of no effect on the
    result. Costs D^2 a token and head, and chunk 2 D for the products; a state of D^2 + D numbers a key head to decode.
    Errors: ValueError when a layer that is not causal is asked to decode.

    >>> LightNet(Dims(num_heads=2, head_dim=4), gate_rank=3)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="lightnet",
        name="LightNet (additive recurrence)",
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        paper="2405.21022",
        year=2024,
        family="linear",
        uses=("linear_attention",),
    )
    causal = True

    def __init__(self, dims: Dims, *, causal: bool = True, gate_rank: int = 128, chunk: int = 64) -> None:
        super().__init__(dims)
        c, kv = dims.dim, dims.num_kv_heads * dims.head_dim
        self.causal, self.chunk = causal, positive("chunk", chunk)
        self.query, self.key, self.value = (nn.Linear(c, width, bias=False) for width in (c, kv, kv))
        self.squeeze = nn.Linear(c, positive("gate_rank", gate_rank), bias=False)
        self.gate = nn.Linear(gate_rank, c, bias=False)
        self.norm = nn.RMSNorm(c, eps=1e-5)
        self.out = nn.Linear(c, c, bias=False)

    def read(self, x: Tensor, state: LightNetState | None = None) -> tuple[Tensor, LightNetState]:
        """o (B, H, N, D) and what is known after the last token."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.dims.head_dim)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        q = F.silu(q)
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        if not self.causal:
            z = k.logsumexp(2, keepdim=True)
            o, memory = self._attend(q, (k - z).exp(), v, causal=False)
            return o, LightNetState(z, memory)
        before = torch.full_like(k[:, :, :1], -torch.inf) if state is None else state.mass
        z = torch.cat([before, k], 2).logcumsumexp(2)
        decay = z[:, :, :-1] - z[:, :, 1:]
        held = UNTRACKED if state is None else state.memory
        o, memory = self._attend(q, (k - z[:, :, 1:]).exp(), v, log_decay=decay, state=held, chunk=self.chunk)
        return o, LightNetState(z[:, :, -1:], memory)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, State]:
        found = linear_attention(q.to(k.dtype), k, v.to(k.dtype), return_state=True, **options)
        return cast(tuple[Tensor, State], found)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        normed = self.norm(o.to(x.dtype).transpose(1, 2).flatten(2))
        return self.out(normed * F.silu(self.gate(self.squeeze(x))))

    def compute(self, x: Tensor) -> Tensor:
        return self.mix(x, self.read(x)[0])

    def step(self, x: Tensor, *, state: LightNetState | None = None) -> tuple[Tensor, LightNetState]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal layer decodes token by token")
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []

        def heads(name: str, count: int) -> Tensor:
            y = (x @ w[f"{name}.weight"].T).view(*x.shape[:2], count, d.head_dim)
            return y.repeat_interleave(d.num_heads // count, 2)  # (B, N, H, D)

        q, k, v = heads("query", d.num_heads), heads("key", d.num_kv_heads), heads("value", d.num_kv_heads)
        q = q / (1 + torch.exp(-q))
        for t in range(x.shape[1]):
            seen = slice(t + 1) if self.causal else slice(None)
            weights = (k[:, seen] - k[:, seen].detach().amax(1, keepdim=True)).exp()
            weights = weights / weights.sum(1, keepdim=True)
            o = torch.einsum("bhc,bjhc,bjhe->bhe", q[:, t], weights, v[:, seen]).flatten(1)
            o = o / ((o * o).mean(-1, keepdim=True) + 1e-5) ** 0.5 * w["norm.weight"]
            gate = x[:, t] @ w["squeeze.weight"].T @ w["gate.weight"].T
            rows.append((o * gate / (1 + torch.exp(-gate))) @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 37, {"chunk": 8, "gate_rank": 3}),
            Case(Dims(4, 3, num_kv_heads=2), 23, {"chunk": 5, "gate_rank": 2}, batch=1),
            Case(Dims(1, 4), 13, {"gate_rank": 7}),
        ]

    @claim("The recurrence is a softmax over the keys read so far, channel by channel, even where keys are far apart.")
    def running_softmax(cls) -> Finding:
        layer, x = cls._sample(), torch.randn(1, 300, 16, dtype=torch.float64)
        figures, holds = [], True
        for size in (1.0, 100.0):
            layer.key.weight.copy_(size * torch.randn(16, 16))
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
            weights = torch.stack([F.pad(k[:, :, : t + 1].softmax(2), (0, 0, 0, 299 - t)) for t in range(300)], 2)
            exact = torch.einsum("bhtc,bhtjc,bhje->bhte", F.silu(q), weights, v)
            apart = float((layer.read(x)[0] - exact).abs().max() / exact.abs().max())
            holds = holds and apart < x.shape[1] * float(k.abs().max().clamp_min(1)) * torch.finfo(x.dtype).eps
            figures.append(f"{apart:.1e} with keys up to {float(k.abs().max()):.0f}")
        return Finding(holds, f"largest difference of the largest output: {' and '.join(figures)}")

    @claim("Equal keys give the mean of the values so far: the decay is (t - 1) / t and nears 1.")
    def running_mean(cls) -> Finding:
        layer, x = cls._sample(), torch.randn(1, 400, 16, dtype=torch.float64)
        layer.key.weight.zero_()
        q, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.query, layer.value))
        mean = v.cumsum(2) / torch.arange(1, 401).view(-1, 1)
        exact = F.silu(q).sum(-1, keepdim=True) * mean
        apart = float((layer.read(x)[0] - exact).abs().max() / exact.abs().max())
        masses = [layer.read(x[:, :n])[1].mass for n in (399, 400)]
        left = float((masses[0] - masses[1]).exp().mean())
        holds = apart < 400 * torch.finfo(x.dtype).eps and abs(left - 399 / 400) < 400 * torch.finfo(x.dtype).eps
        return Finding(
            holds, f"largest difference {apart:.1e}; after 400 tokens {left:.4f} is left of the memory a token"
        )

    @claim("Not causal, one pass of matrix products is the softmax over all keys, for tokens in any order.")
    def order_free(cls) -> Finding:
        layer, x = cls._sample(causal=False), torch.randn(1, 210, 16, dtype=torch.float64)
        order, costs, exact = torch.randperm(210), [], layer.oracle(x)
        apart = float(
            torch.stack([layer(x) - exact, layer(x[:, order]) - exact[:, order]]).abs().max() / exact.abs().max()
        )
        costs = [work(partial(layer.read, x[:, :n])).all for n in (105, 210)]
        holds = apart < 210 * torch.finfo(x.dtype).eps and costs[1] == 2 * costs[0]
        figure = f"largest difference {apart:.1e}, permuted or not; {costs[1] / costs[0]:g} times the work at twice N"
        return Finding(holds, figure)

    @claim("The state that a decoder keeps does not grow.")
    def constant_state(cls) -> Finding:
        layer, x, sizes = cls._sample(), torch.randn(1, 600, 16, dtype=torch.float64), []
        for n in (1, 600):
            state = layer.read(x[:, :n])[1]
            sizes.append(state.mass.numel() + state.memory.memory.numel())
        return Finding(sizes[0] == sizes[1] == 2 * (64 + 8), f"{sizes[0]} numbers after 1 token, {sizes[1]} after 600")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> LightNet:
        return cls(Dims(2, 8), gate_rank=4, **params).double().requires_grad_(False)
