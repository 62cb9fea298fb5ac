"""RAT: a gated recurrence inside chunks, softmax attention across them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend, merge
from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, rotated, sample
from saccade.errors import positive
from saccade.mix import turn_at
from saccade.scan import affine, associative_scan
from saccade.where import Labels


@dataclass(frozen=True)
class RatState:
    """What a decoder keeps: keys, turned, and values at the ends of the chunks so far, (B, H, chunks, D); the key and
    value of the open chunk, not turned, (B, H, 1, D); how many tokens have been read.
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    length: int


class RAT(Mixer):
    """Keys and values that a gate averages inside a chunk; a query sees the ends of earlier chunks, and its own token.

        g_t = sigmoid(W_g x_t + b),   v~_t = g_t * v~_{t-1} + (1 - g_t) * v_t,   k~_t likewise,   both 0 before a chunk
        o_t = sum_s softmax_s(q_t . R^T R k~_s / sqrt(D)) v~_s over s = t and the last tokens of earlier chunks
        y_t = W_o (sigmoid(W_z x_t) * o_t)

    x, y (B, N, C); g, v (B, N, C), one gate a channel; q, k (B, N, groups D): head h has the queries and keys of group
    h % groups, but gates, so keys k~, and values of its own. R turns the halves of a head by the index of the chunk (of
    the query, of s) times theta^(-2 i / D), after the recurrence. Paper: arXiv 2507.04416; groups, R and the start of b
    at log u, u uniform in [1, chunk - 1], follow the authors' code. Deviations: any number of tokens, where the code
    refuses an open chunk at the end; RMSNorm and residual belong to the host, and so does alternating with layers of
    local attention.
    chunk: tokens of a chunk (16). groups: heads of q and k (2). theta: 10000.0.
    Costs N D (N / (2 chunk)) pairs a head beside the projections; 2 D numbers a head and chunk to decode.
    Errors: ValueError for an odd head_dim, groups that do not divide the heads, heads that share values, theta <= 0.

    >>> RAT(Dims(num_heads=2, head_dim=4), chunk=4)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="rat",
        name="RAT",
        title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
        paper="2507.04416",
        year=2025,
        family="recurrent",
        uses=("associative_scan", "affine", "attend", "merge", "Labels", "turn_at"),
    )
    causal = True

    def __init__(self, dims: Dims, *, chunk: int = 16, groups: int = 2, theta: float = 10000.0) -> None:
        super().__init__(dims)
        if dims.head_dim % 2:
            raise ValueError(
                f"dims: got head_dim {dims.head_dim}; pass an even one, of which positions turn the halves"
            )
        if dims.num_heads % positive("groups", groups):
            raise ValueError(f"groups: got {groups} for {dims.num_heads} heads; pass a divisor")
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(
                f"dims: got {dims.num_kv_heads} key heads; gates differ by head, so share keys by `groups`"
            )
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        c, shared = dims.dim, groups * dims.head_dim
        self.chunk, self.groups, self.theta = positive("chunk", chunk), groups, theta
        self.widths = (c, c, c, shared, shared)
        self.project = nn.Linear(c, sum(self.widths), bias=False)
        self.bias = nn.Parameter(torch.empty(c).uniform_(1, max(1, chunk - 1)).log())
        self.out = nn.Linear(c, c, bias=False)

    def tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        """The gate of the output (B, N, C); q, k, v and g (B, H, N, D)."""
        z, v, g, q, k = self.project(x).split(self.widths, -1)
        q, k = (y.unflatten(2, (self.groups, -1)).repeat(1, 1, self.dims.num_heads // self.groups, 1) for y in (q, k))
        v, g = (y.unflatten(2, (self.dims.num_heads, -1)) for y in (v, (g + self.bias).sigmoid()))
        return z, *(y.transpose(1, 2) for y in (q, k, v, g))

    def within(self, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """k~ and v~ (B, H, N, D)."""
        n = k.shape[2]
        parts = (F.pad(y, (0, 0, 0, -n % self.chunk)).unflatten(2, (-1, self.chunk)) for y in (k, v, g))
        k, v, g = parts
        both = torch.cat([k, v], -1)
        gates = torch.cat([g, g], -1)
        _, h = associative_scan(affine, (gates, (1 - gates) * both), dim=3)
        k, v = h.flatten(2, 3)[:, :, :n].chunk(2, -1)
        return k, v

    def mix(self, z: Tensor, o: Tensor) -> Tensor:
        return self.out(z.sigmoid() * o.transpose(1, 2).flatten(2))

    def compute(self, x: Tensor) -> Tensor:
        z, q, k, v, g = self.tokens(x)
        k, v = self.within(k, v, g)
        at = torch.arange(x.shape[1]) // self.chunk  # on the host, where labels are read
        there = torch.arange(x.shape[1], device=x.device) // self.chunk
        q, k = turn_at(q, there, self.theta), turn_at(k, there, self.theta)
        wide = torch.promote_types(x.dtype, torch.float32)
        own = (q.to(wide) * k.to(wide)).sum(-1) * self.dims.head_dim**-0.5
        parts = [(v, own)]
        if x.shape[1] > self.chunk:
            ends = slice(self.chunk - 1, None, self.chunk)
            earlier = Labels(at[ends], left=None, right=-1, queries=at)
            parts.append(attend(q, k[:, :, ends], v[:, :, ends], earlier, return_lse=True))
        return self.mix(z, merge(parts)[0])

    def step(self, x: Tensor, *, state: RatState | None = None) -> tuple[Tensor, RatState]:
        z, q, k, v, g = self.tokens(x)
        k, v = (1 - g) * k, (1 - g) * v
        none = k[:, :, :0]
        keys, values, length = (none, none, 0) if state is None else (state.keys, state.values, state.length)
        if state is not None and length % self.chunk:
            k, v = k + g * state.key, v + g * state.value
        at = length // self.chunk
        seen, held = torch.cat([keys, turn_at(k, at, self.theta)], 2), torch.cat([values, v], 2)
        o = attend(turn_at(q, at, self.theta), seen, held)
        if (length + 1) % self.chunk == 0:
            keys, values = seen, held
        return self.mix(z, o), RatState(keys, values, k, v, length + 1)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        c, size = d.dim, d.head_dim
        places: list[tuple[Tensor, Tensor]] = []
        key, value = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            row = x[:, t] @ w["project.weight"].T
            z, v, g, shared = row[:, :c], row[:, c : 2 * c], row[:, 2 * c : 3 * c], row[:, 3 * c :]
            g = 1 / (1 + torch.exp(-g - w["bias"]))
            width = self.groups * size
            q, k = (torch.cat([y] * (c // width), 1) for y in (shared[:, :width], shared[:, width:]))
            start = t % self.chunk == 0
            key = (0 if start else g * key) + (1 - g) * k
            value = (0 if start else g * value) + (1 - g) * v
            at, parts = torch.tensor(t // self.chunk), (y.view(len(x), -1, size) for y in (q, key, value))
            q, k, v = parts
            q, own = rotated(q, at, self.theta), (rotated(k, at, self.theta), v)
            seen = [*places, own]
            scores = torch.stack([(q * k).sum(-1) for k, _ in seen], -1) / size**0.5
            weights = scores.softmax(-1)
            o = torch.stack([weights[..., i, None] * v for i, (_, v) in enumerate(seen)]).sum(0)
            rows.append((o.flatten(1) / (1 + torch.exp(-z))) @ w["out.weight"].T)
            if (t + 1) % self.chunk == 0:
                places.append(own)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4), 37, {"chunk": 5, "groups": 1, "theta": 30.0}),
            Case(Dims(4, 2), 23, {"chunk": 3}, batch=1),
            Case(Dims(3, 2), 11, {"chunk": 1, "groups": 3}, batch=1),
            Case(Dims(2, 6), 19),
        ]

    @claim("With chunks of one token it is attention to keys and values multiplied by 1 - g.")
    def is_attention(cls) -> Finding:
        from saccade.where import Causal

        layer, x = cls._sample(chunk=1)
        z, q, k, v, g = layer.tokens(x)
        at = torch.arange(x.shape[1])
        q, k = (turn_at(y, at, layer.theta) for y in (q, (1 - g) * k))
        o = attend(q, k, (1 - g) * v, Causal())
        return cls._near(layer(x), layer.mix(z, o), x.shape[1])

    @claim("With one chunk it is a gated linear recurrence, in which q and k have no effect.")
    def is_recurrence(cls) -> Finding:
        layer, x = cls._sample(chunk=100)
        z, _, _, v, g = layer.tokens(x)
        h, rows = torch.zeros_like(v[:, :, 0]), []
        for t in range(x.shape[1]):
            h = g[:, :, t] * h + (1 - g[:, :, t]) * v[:, :, t]
            rows.append(h)
        found = layer(x)
        layer.project.weight[-32:] = torch.randn(32, 32)
        same = bool((layer(x) == found).all())
        near = cls._near(found, layer.mix(z, torch.stack(rows, 2)), x.shape[1])
        return Finding(near.holds and same, f"{near.figure}; {'none' if same else 'some'} from other q and k")

    @claim("The cache and the scores fall by the length of a chunk.")
    def smaller(cls) -> Finding:
        held, pairs = [], []
        for chunk in (1, 16):
            layer, x = cls._sample(chunk=chunk)
            state = None
            for token in x[:, :96].split(1, 1):
                _, state = layer.step(token, state=state)
            assert state is not None
            held.append(state.keys.numel() + state.values.numel())
            ends = torch.arange(1024) // chunk
            earlier = Labels(ends[chunk - 1 :: chunk], left=None, right=-1, queries=ends)
            pairs.append(int(earlier.dense(1024, 1024 // chunk).sum()))
        holds = held[0] == 16 * held[1] and pairs == [1024 * 1023 // 2, 16 * 64 * 63 // 2]
        figure = (
            f"{held[0]} numbers and {held[1]}, {pairs[0] / pairs[1]:.2f} times fewer pairs, with chunks of 1 and 16"
        )
        return Finding(holds, figure)

    @staticmethod
    def _near(found: Tensor, exact: Tensor, terms: int) -> Finding:
        off = apart(found, exact)
        return Finding(off < terms * torch.finfo(found.dtype).eps, f"largest difference {off:.1e} of the output")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[RAT, Tensor]:
        return sample(lambda: cls(Dims(4, 8), **params), 1, 100, 32)
