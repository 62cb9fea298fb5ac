"""laLTE and laNSA: linear attention, and between its layers one that keeps the tokens a small network picks, or NSA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, rotated, sample
from saccade.errors import known, positive
from saccade.hosts.delta import GatedDeltaNet
from saccade.hosts.stack import PreNorm, Stack, SwiGLU, interleave
from saccade.mix import turn_at
from saccade.softmax import Pages, attend_lifetimes, attend_pages
from saccade.softmax.lifetimes import alive
from saccade.where import Causal, Sinks, Window


@dataclass(frozen=True)
class LTEState:
    """What a decoder keeps: keys, values (B, Hkv, tokens, D) and scores (B, Hkv, tokens, 1), `near` in the window and
    `far` in the buffer, of which the first `count` (B, Hkv) slots are taken; what the scorer reads; tokens read.
    """

    near: tuple[Tensor, ...]
    far: tuple[Tensor, ...]
    count: Tensor
    recent: Tensor
    length: int


class Scorer(nn.Module):
    """Three convolutions over time and a logit, apart for each key head: x (B, Hkv, N, 2 D) -> (B, Hkv, N)."""

    def __init__(self, heads: int, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        widths, pad = [heads * channels >> i for i in range(4)], (kernel - 1) * dilation // 2
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, dilation=dilation, padding=pad, groups=heads) for a, b in pairwise(widths)
        )
        self.logit = nn.Conv1d(widths[3], heads, 1, groups=heads, bias=False)
        self.bias = nn.Parameter(torch.full((heads,), 0.5))  # at first most tokens stay
        for conv in (*self.convs, self.logit):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 3).flatten(1, 2)
        for conv in self.convs:
            x = F.silu(conv(x))
        return (self.logit(x) + self.bias[:, None]).sigmoid() - 0.5


class LalteLansa(Mixer):
    """Attention with learnable token eviction (LTE), the sparse layer of laLTE; `model` stacks it on gated DeltaNet.

        r_j = sigmoid(CNN([k; v])_j) - 1/2,   k before its rotary angles;   j is selected when r_j > 0 or j < sinks
        o_i = softmax over the j <= i that are selected, or i - j <= window
        dr_j = dv_j . v_j   backwards, as if values were scaled by r;   loss += mean_jh lambda_h relu(r_jh)

    x, y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D), r (B, Hkv, N), projections without bias. The CNN has three
    convolutions over time, 2 D -> D -> D / 2 -> D / 4 channels with silu, zeros beyond both ends, and a logit; r_j
    reads 3 (kernel - 1) dilation / 2 tokens ahead, which have come before j leaves the window. To decode, a token that
    leaves with r > 0 enters a buffer, when that is full in the place of its least r if that is less; sinks have r = inf
    there. `adapt` moves lambda: every 32 calls x 1.5 where the selected tokens of a sequence (a moving average) reach
    `buffer`, / 2 where they are at most 0.95 of it; below 1e-9 lambda is 0, from 0 it wakes at 1e-9, it ends at 1.
    Paper: arXiv 2510.20787; details follow the authors' code (idiap/hybrid-linear-sparse-attention). Deviations: no
    dropout in the CNN; but for `step` the buffer has no cap, in evaluation too; see `model` for the stack.
    window: keys beside the query's own (768). sinks: 4. buffer: tokens a key head holds beyond the window (512).
    kernel: 3, odd. dilation: 2. theta: 10000.0. Costs N (window + selected) pairs, sorted into tiles; to decode, window
    + 1 + buffer pairs a token, and as many keys and values. Errors: ValueError for a head_dim that 4 does not divide,
    an even kernel, theta <= 0, a window shorter than what r reads ahead, more sinks than the buffer holds.

    >>> LalteLansa(Dims(2, 8), window=8)(torch.randn(1, 50, 16)).shape
    torch.Size([1, 50, 16])
    """

    spec = Spec(
        id="lalte_lansa",
        name="laLTE / laNSA",
        title="Alleviating Forgetfulness of Linear Attention by Hybrid Sparse Attention and Contextualized Learnable "
        "Token Eviction",
        paper="2510.20787",
        year=2025,
        family="kv_cache",
        uses=("attend_lifetimes", "Pages", "attend_pages", "turn_at", "delta_rule"),
        discrete=True,
    )
    causal = True
    lam: Tensor
    selected: Tensor
    calls: Tensor

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 768,
        sinks: int = 4,
        buffer: int = 512,
        kernel: int = 3,
        dilation: int = 2,
        theta: float = 10000.0,
    ) -> None:
        super().__init__(dims)
        if dims.head_dim % 4:
            raise ValueError(f"dims: got head_dim {dims.head_dim}; the network halves its channels thrice, pass 4 n")
        if positive("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel: got {kernel}; pass an odd one, centred on its token")
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        self.window, self.sinks, self.buffer = positive("window", window), positive("sinks", sinks, least=0), buffer
        self.dilation, self.theta = positive("dilation", dilation), theta
        self.reach = 3 * (kernel - 1) * dilation // 2
        if window < self.reach:
            raise ValueError(f"window: got {window}; a score reads {self.reach} tokens ahead, pass at least as many")
        if sinks > positive("buffer", buffer):
            raise ValueError(f"sinks: got {sinks} for a buffer of {buffer}, which holds them; pass no more")
        kv = dims.num_kv_heads * dims.head_dim
        self.qkv = nn.Linear(dims.dim, dims.dim + 2 * kv, bias=False)
        self.out = nn.Linear(dims.dim, dims.dim, bias=False)
        self.scorer = Scorer(dims.num_kv_heads, 2 * dims.head_dim, kernel, dilation)
        for name in ("lam", "selected"):
            self.register_buffer(name, torch.zeros(dims.num_kv_heads))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def scored(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D), not yet turned, and r (B, Hkv, N)."""
        q, k, v = self.heads(x)
        return q, k, v, self.scorer(torch.cat([k, v], -1))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dims.split(self.qkv(x))

    def turned(self, x: Tensor, start: int = 0) -> Tensor:
        """x (B, H, N, D) at positions from `start` on."""
        return turn_at(x, start, self.theta)

    def chosen(self, r: Tensor) -> Tensor:
        """Which tokens are selected: bool (B, Hkv, N)."""
        return (r > 0) | (torch.arange(r.shape[2], device=r.device) < self.sinks)

    def last(self, chosen: Tensor) -> Tensor:
        """The last query that sees each key: like chosen (B, Hkv, N)."""
        n = chosen.shape[2]
        window = (torch.arange(n, device=chosen.device) + self.window).clamp(max=n - 1)
        return torch.where(chosen, n - 1, window)

    def compute(self, x: Tensor) -> Tensor:
        q, k, v, r = self.scored(x)
        v = v + (r - r.detach())[..., None] * v.detach()  # the same values, whose gradient r shares
        o, _ = attend_lifetimes(self.turned(q), self.turned(k), v, self.last(self.chosen(r)))
        return self.out(o.transpose(1, 2).flatten(2))

    def penalty(self, x: Tensor) -> Tensor:
        """The loss that keeps tokens few, mean lambda relu(r)."""
        return (self.lam.to(x.dtype)[:, None] * self.scored(x)[3].relu()).mean()

    @torch.no_grad()
    def adapt(self, x: Tensor, every: int = 32) -> None:
        """Count the selected tokens of x (B, N, C), and move lambda every so many calls; once a training step."""
        count = self.chosen(self.scored(x)[3]).sum(-1).to(self.lam.dtype).mean(0)
        self.selected.lerp_(count, 2 / (1 + every // 2))
        self.calls += 1
        many, few = self.selected >= self.buffer, self.selected <= 0.95 * self.buffer
        moved = self.lam * torch.where(many, 1.5, torch.where(few, 0.5, 1.0)).to(self.lam.dtype)
        moved = moved.clamp(max=1.0) * (moved >= 1e-9)
        moved = torch.where((moved == 0) & ~few, 1e-9, moved)
        self.lam.copy_(torch.where(self.calls % every == 0, moved, self.lam))

    def begin(self, x: Tensor) -> LTEState:
        shape, d = (len(x), self.dims.num_kv_heads), self.dims.head_dim
        near = x.new_zeros(*shape, 0, d), x.new_zeros(*shape, 0, d), x.new_zeros(*shape, 0, 1)
        far = *x.new_zeros(2, *shape, self.buffer, d), x.new_full((*shape, self.buffer, 1), -torch.inf)
        count = torch.zeros(shape, dtype=torch.int64, device=x.device)
        return LTEState(near, far, count, x.new_zeros(*shape, 0, 2 * d), 0)

    def step(self, x: Tensor, *, state: LTEState | None = None) -> tuple[Tensor, LTEState]:
        state = self.begin(x) if state is None else state
        (q, k, v), slots = self.heads(x), len(x) * self.dims.num_kv_heads
        t, far, count = state.length, state.far, state.count
        recent = torch.cat([state.recent, torch.cat([k, v], -1)], 2)[:, :, -2 * self.reach - 1 :]
        new = self.turned(k, t), v, torch.zeros_like(k[..., :1])
        near = tuple(torch.cat(pair, 2) for pair in zip(state.near, new, strict=True))
        if t >= self.reach:  # all that the score of this token reads has been seen
            r = self.scorer(recent)[:, :, -1 - self.reach]
            near[2][:, :, -1 - self.reach, 0] = torch.inf if t - self.reach < self.sinks else r
        if near[0].shape[2] > self.window + 1:
            gone, near = tuple(y[:, :, :1] for y in near), tuple(y[:, :, 1:] for y in near)
            room, score = (count < self.buffer)[..., None, None], gone[2]
            slot = torch.where(room, count[..., None, None], far[2].argmin(2, keepdim=True))
            enters = (score > 0) & (room | (score > far[2].gather(2, slot)))
            both = [(old, new, slot.expand_as(new)) for old, new in zip(far, gone, strict=True)]
            far = tuple(old.scatter(2, at, torch.where(enters, new, old.gather(2, at))) for old, new, at in both)
            count = count + (enters & room)[..., 0, 0]
        # Key heads hold unlike numbers of tokens, each in a page of its own: the window, the taken slots behind it.
        keys, values = (torch.cat([near[i], far[i]], 2).flatten(0, 1)[:, None] for i in range(2))
        table = torch.arange(slots, dtype=torch.int32, device=x.device)[:, None]
        pages = Pages(keys, values, table, (count.flatten() + near[0].shape[2]).int())
        o = attend_pages(self.turned(q, t).reshape(slots, -1, 1, q.shape[3]), pages).view(len(x), 1, -1)
        return self.out(o), LTEState(near, far, count, recent, t + 1)

    def oracle(self, x: Tensor) -> Tensor:
        w, dims, (batch, n, _) = dict(self.named_parameters()), self.dims, x.shape
        d, kv, heads = dims.head_dim, dims.num_kv_heads, dims.num_heads
        parts = (x @ w["qkv.weight"].T).view(batch, n, -1, d).transpose(1, 2)
        outs = []
        for h in range(heads):
            g = h * kv // heads
            k, v = parts[:, heads + g], parts[:, heads + kv + g]
            y = torch.cat([k, v], -1)
            for layer in range(3):
                weight, bias = (w[f"scorer.convs.{layer}.{name}"].chunk(kv)[g] for name in ("weight", "bias"))
                blank = y[:, :1].expand(-1, self.reach // 3, -1) * 0
                padded = torch.cat([blank, y, blank], 1)
                at = range(0, 2 * self.reach // 3 + 1, self.dilation)
                y = sum(padded[:, a : a + n] @ weight[:, :, i].T for i, a in enumerate(at)) + bias
                y = y / (1 + torch.exp(-y))
            z = y @ w["scorer.logit.weight"][g, :, 0] + w["scorer.bias"][g]
            r = 1 / (1 + torch.exp(-z)) - 0.5
            i, j = torch.arange(n)[:, None], torch.arange(n)
            seen = (j <= i) & ((i - j <= self.window) | (r > 0)[:, None] | (j < self.sinks))
            q, k = (rotated(y, torch.arange(n), self.theta) for y in (parts[:, h], k))
            scores = q @ k.mT / d**0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(weights @ (v * (1 + r - r.detach())[..., None]))
        return torch.cat(outs, -1) @ w["out.weight"].T

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 4, 2), 37, {"window": 7, "sinks": 2, "buffer": 40}),
            Case(Dims(2, 8), 29, {"window": 3, "dilation": 1, "sinks": 0, "theta": 50.0}, batch=1),
            Case(Dims(2, 4, 1), 31, {"window": 6, "kernel": 5, "dilation": 1, "buffer": 31}),
        ]

    @classmethod
    def model(cls, name: str = "0.4b", *, params: Mapping[str, Any] | None = None, **host: Any) -> Stack:
        """The paper's laLTE of 24 layers, "0.4b" or "1.4b": gated DeltaNet at even ones, LTE at odd ones.

        360 and 1277 million parameters with 32000 tokens, whose embedding gives the scores as well (the authors' larger
        one has a head of its own); no published count but the names. For laNSA pass `sparse`, a factory of the odd
        layers, (dims, layer) -> NSA; `params` are those of LTE. `dims` are those of the odd layers.
        """
        known("name", name, ("0.4b", "1.4b"))
        dims = host.pop("dims", Dims(16, 64) if name == "0.4b" else Dims(32, 64, 8))
        wide = Dims(8, dims.dim // 8)
        sparse = host.pop("sparse", lambda dims, layer: cls(dims, **(params or {})))
        block = partial(PreNorm, mlp=lambda dim: SwiGLU(dim, -(-8 * dim // 3 // 256) * 256))
        layers = interleave(24, (1, lambda dims, layer: GatedDeltaNet(wide)), (1, sparse))
        return Stack(dims, **{"layers": layers, "vocab_size": 32000, "block": block, **host})

    @claim("All r <= 0 is a window of w + 1 and the sinks, all r > 0 is causal full attention.")
    def ends_of_the_range(cls) -> Finding:
        layer, x = cls._sample()
        q, k, v, _ = layer.scored(x)
        off = []
        for bias, where in ((-99.0, Causal() & (Window(13) | Sinks(4))), (99.0, Causal())):
            layer.scorer.bias.fill_(bias)
            dense = attend(layer.turned(q), layer.turned(k), v, where)
            dense = layer.out(dense.transpose(1, 2).flatten(2))
            off.append(apart(layer(x), dense))
        figure = f"largest differences {off[0]:.1e} and {off[1]:.1e}"
        return Finding(max(off) < x.shape[1] * torch.finfo(x.dtype).eps, figure)

    @claim("Decoding holds w + 1 + buffer keys, is the parallel form while there is room, and then keeps the best.")
    def decodes(cls) -> Finding:
        for buffer in (300, 9):
            layer, x = cls._sample(buffer=buffer)
            rows, state = cls._decoded(layer, x)
            allowed = x.shape[1] * torch.finfo(x.dtype).eps
            if buffer == 300:
                whole = apart(rows, layer(x))
        r = layer.scored(x)[3][:, :, :-13]  # of those that have left the window
        r[:, :, :4] = torch.inf
        kept = state.far[2][..., 0].sort(descending=True).values
        off = float((kept[kept < 1] - r.topk(9).values[kept < 1]).abs().max())
        most = state.near[0].shape[2] + int(state.count.max())
        figure = f"differs by {whole:.1e} with room for all; else {most} of 120 tokens kept, scores off by {off:.1e}"
        return Finding(whole < allowed and off < allowed and most == 13 + 9, figure)

    @claim("Little is computed beside what the mask admits, though selected tokens lie scattered among the others.")
    def saves(cls) -> Finding:
        layer = cls(Dims(1, 8), window=64)
        chosen = layer.chosen(torch.rand(1, 1, 4096, generator=torch.Generator().manual_seed(0)) - 0.95)
        few, whole = (alive(layer.last(chosen[..., :n]))[1] for n in (200, chosen.shape[2]))
        exact = few.plan(200, block=(16, 16)).dense().equal(few.dense(200))
        plan = whole.plan(4096, block=(64, 64))
        shares = [2 * pairs / 4096**2 for pairs in (plan.num_computed, plan.num_attended)]
        return Finding(
            exact and shares[0] < 0.2, f"{shares[0]:.1%} of the causal pairs for the {shares[1]:.1%} admitted"
        )

    @claim("Lambda rises while more tokens are selected than the buffer holds, and falls while fewer are.")
    def budget(cls) -> Finding:
        layer, x = cls._sample(buffer=60)
        track = []
        for bias in (99.0, -99.0):
            layer.scorer.bias.fill_(bias)
            for _ in range(32 * 12):
                layer.adapt(x[:1, :80])
            track.append(float(layer.lam.max()))
        figure = f"{track[0]:.1e} after 12 moves with all selected, then {track[1]:g}"
        return Finding(track[0] > 1e-9 and track[1] == 0, figure)

    @claim("The hybrid decodes token by token what it reads at once.")
    def hybrid(cls) -> Finding:
        model, x = sample(lambda: cls.model(params={"window": 8}, dims=Dims(4, 8), vocab_size=50), 1, 40, 50)
        tokens = x.argmax(-1)
        off = apart(cls._decoded(model, tokens)[0], model(tokens))
        return Finding(off < 24 * 40 * torch.finfo(x.dtype).eps, f"largest difference {off:.1e}")

    @staticmethod
    @torch.no_grad()
    def _decoded(model: Any, x: Tensor) -> tuple[Tensor, Any]:
        """What `step` gives token by token, and the last state."""
        rows, state = [], None
        for token in x.split(1, 1):
            row, state = model.step(token, state=state)
            rows.append(row)
        return torch.cat(rows, 1), state

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[LalteLansa, Tensor]:
        layer, x = sample(lambda: cls(Dims(4, 8, 2), window=12, **params), 2, 120, 32)
        layer.scorer.bias.zero_()
        return layer, x
