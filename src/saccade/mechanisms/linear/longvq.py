"""LongVQ: attention to a codebook that stands for all keys, and to a window with biases, on what a recurrence keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from saccade import attend, merge
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, sample, work
from saccade.errors import positive
from saccade.scan import UNTRACKED, State, linear_attention, selective_scan
from saccade.softmax.bias import RelativeTable
from saccade.where import Causal, Window

EPS = 1e-6  # beside the mean square of what is normalised


class Tokens(NamedTuple):
    """q (B, H, N, D); keys, quantised, and v (B, Hkv, N, D); codes (B, Hkv, N, S), one of them 1 and the others 0."""

    q: Tensor
    keys: Tensor
    v: Tensor
    codes: Tensor


@dataclass(frozen=True)
class LongVQState:
    """What a decoder keeps: the averages; keys, values and codes of the window; for the tokens before it how many had
    each code (B, Hkv, 1, S), and the memory of their values, None until there are any.
    """

    average: State
    recent: tuple[Tensor, Tensor, Tensor]
    counts: Tensor
    memory: State | None


class LongVQ(Mixer):
    """A layer that attends to quantised keys, so that keys of one code are one key with a count and a sum of values.

        u_t = sum_s eta_s h_ts,   h_ts = alpha_s x_t + (1 - alpha_s delta_s) h_{t-1,s}        in each channel
        q, k, v = W u, q and k over their root mean square,   z_j = argmin_s |k_j - C_s|,   k^_j = C_{z_j}
        o_t = [sum_s e^{q_t . C_s / sqrt(D)} U_ts + sum_j e^{q_t . k^_j / sqrt(D) + b_{t-j}} v_j]
              / [sum_s e^{q_t . C_s / sqrt(D)} n_ts + sum_j e^{q_t . k^_j / sqrt(D) + b_{t-j}}]
        y_t = g_t * W_o o_t + (1 - g_t) * u_t,   g_t = sigmoid(W_g u_t + w)

    x, u, y (B, N, C); q, o (B, H, N, D), k, v (B, Hkv, N, D); C (Hkv, S, D) a learned codebook; U_ts and n_ts the sum
    of the values and the number of the tokens j <= t - window with z_j = s; the other sums go over t - window < j <= t;
    b (H, window) is learned, for a code does not tell near from far. alpha, delta: sigmoid of weights (C, states).
    Gradients pass from k^ to k as if they were equal inside the window (straight through), and to C beyond it.
    Paper: arXiv 2404.11163; no code was found, and what it computes was read in reviews, not in the paper itself:
    quantised keys, the nearest code by distance, the straight-through gradient, the biases of a window, a gated mixture
    of attention with a recurrence. Choices of ours: Mega's average as the recurrence, where it is applied and how g
    mixes, the exponential of scaled products as the weight, the sizes, gradients to C, and the norm of q and k, as of
    Transformer-VQ (2309.16354): keys as long as they like leave the codebook behind, and gradients that pass straight
    through grow without end.
    codes: S (512). window: 128. states: averages a channel (16). chunk: tokens a matrix product takes at once (64), of
    no effect on the result.
    Costs 2 N (S + window) D a head, beside N C states and the projections; S D + window (2 D + S) numbers a key head
    and C states to decode. Errors: ValueError or TypeError for parameters that are no positive integers.

    >>> LongVQ(Dims(num_heads=2, head_dim=4), codes=5, window=3)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="longvq",
        name="LongVQ",
        title="LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory",
        paper="2404.11163",
        year=2024,
        family="linear",
        uses=("selective_scan", "linear_attention", "attend", "merge", "Window", "RelativeTable"),
        discrete=True,
    )
    causal = True

    def __init__(self, dims: Dims, *, codes: int = 512, window: int = 128, states: int = 16, chunk: int = 64) -> None:
        super().__init__(dims)
        c, d = dims.dim, dims.head_dim
        self.window, self.chunk = positive("window", window), positive("chunk", chunk)
        self.alpha, self.delta, self.eta = (nn.Parameter(torch.randn(c, positive("states", states))) for _ in range(3))
        self.qkv = nn.Linear(c, c + 2 * dims.num_kv_heads * d, bias=False)
        self.codebook = nn.Parameter(torch.randn(dims.num_kv_heads, positive("codes", codes), d))
        self.bias = RelativeTable(dims.num_heads, (window,))
        self.gate, self.out = nn.Linear(c, c), nn.Linear(c, c, bias=False)

    def average(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """u (B, N, C) and the averages after the last token."""
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, delta = self.alpha.to(wide).sigmoid(), self.delta.to(wide).sigmoid()
        write = alpha.expand(*x.shape[:2], -1, -1)
        read = self.eta.to(wide).expand_as(write)
        rate = torch.log1p(-alpha * delta)
        found = selective_scan(x, torch.ones_like(x), rate, write, read, state=state or UNTRACKED, return_state=True)
        return cast(tuple[Tensor, State], found)

    def tokens(self, u: Tensor) -> Tokens:
        q, k, v = self.dims.split(self.qkv(u))
        q, k = (nn.functional.rms_norm(z, z.shape[-1:], eps=EPS) for z in (q, k))
        wide = torch.promote_types(k.dtype, torch.float32)
        apart = torch.cdist(k.detach().to(wide), self.codebook.detach().to(wide)[None])
        codes = nn.functional.one_hot(apart.argmin(-1), self.codebook.shape[1]).to(k.dtype)
        return Tokens(q, k + (codes @ self.codebook - k).detach(), v, codes)

    def near(self, q: Tensor, keys: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the window gives, (o, lse); the queries are the last tokens."""
        return attend(q, keys, v, Causal() & Window(self.window), bias=self.bias, return_lse=True)

    def far(
        self, q: Tensor, v: Tensor, codes: Tensor, counts: Tensor, memory: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """(o, lse) of queries over the tokens that have left the window at each, and the memory of these.

        q (B, H, n, D); v, codes of the n tokens that leave; counts (B, Hkv, n, S) of all that have left.
        """
        d, wide = self.dims, torch.promote_types(q.dtype, torch.float32)
        group = q.to(wide).unflatten(1, (d.num_kv_heads, -1))
        scores = group @ self.codebook.to(wide)[:, None].mT * d.head_dim**-0.5 + counts.to(wide).log()[:, :, None]
        lse = scores.logsumexp(-1, keepdim=True)
        # A code's share of the weights, divided among the tokens that have it.
        shares = (scores - lse).exp() / counts.to(wide).clamp_min(1)[:, :, None]
        read = linear_attention(
            shares.flatten(1, 2), codes.to(wide), v.to(wide), state=memory, return_state=True, chunk=self.chunk
        )
        o, memory = cast(tuple[Tensor, State], read)
        return o.to(q.dtype), lse.flatten(1, 2).squeeze(-1), memory

    def attention(self, u: Tensor) -> Tensor:
        """o (B, H, N, D)."""
        q, keys, v, codes = self.tokens(u)
        o, lse = self.near(q, keys, v)
        left = u.shape[1] - self.window
        if left <= 0:
            return o
        counts = codes[:, :, :left].cumsum(2, dtype=torch.promote_types(codes.dtype, torch.float32))
        beyond, more, _ = self.far(q[:, :, self.window :], v[:, :, :left], codes[:, :, :left], counts)
        late = merge([(o[:, :, self.window :], lse[:, :, self.window :]), (beyond, more.to(lse.dtype))])[0]
        return torch.cat([o[:, :, : self.window], late], 2)

    def mix(self, u: Tensor, o: Tensor) -> Tensor:
        g = self.gate(u).sigmoid()
        return g * self.out(o.transpose(1, 2).flatten(2)) + (1 - g) * u

    def compute(self, x: Tensor) -> Tensor:
        u = self.average(x)[0]
        return self.mix(u, self.attention(u))

    def step(self, x: Tensor, *, state: LongVQState | None = None) -> tuple[Tensor, LongVQState]:
        u, average = self.average(x, None if state is None else state.average)
        q, *new = self.tokens(u)
        if state is not None:
            new = [torch.cat(pair, 2) for pair in zip(state.recent, new, strict=True)]
        recent = [t[:, :, -self.window :] for t in new]
        counts = torch.zeros_like(new[2][:, :, :1]) if state is None else state.counts
        memory = None if state is None else state.memory
        o, lse = self.near(q, recent[0], recent[1])
        if new[0].shape[2] > self.window:
            counts = counts + new[2][:, :, :1]
            beyond, more, memory = self.far(q, new[1][:, :, :1], new[2][:, :, :1], counts, memory)
            o = merge([(o, lse), (beyond, more.to(lse.dtype))])[0]
        return self.mix(u, o), LongVQState(average, (recent[0], recent[1], recent[2]), counts, memory)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        alpha, delta = 1 / (1 + torch.exp(-w["alpha"])), 1 / (1 + torch.exp(-w["delta"]))
        h, averages = torch.zeros((), dtype=x.dtype), []
        for token in x.unbind(1):
            h = alpha * token[..., None] + (1 - alpha * delta) * h
            averages.append((w["eta"] * h).sum(-1))
        u = torch.stack(averages, 1)
        heads = (u @ w["qkv.weight"].T).split(d.head_dim, -1)
        for i in range(d.num_heads):
            g = i // (d.num_heads // d.num_kv_heads)
            q, k, v = heads[i], heads[d.num_heads + g], heads[d.num_heads + d.num_kv_heads + g]
            q, k = (z / ((z * z).mean(-1, keepdim=True) + 1e-6) ** 0.5 for z in (q, k))
            book = w["codebook"][g]
            apart = ((k.detach()[:, :, None] - book.detach()) ** 2).sum(-1)
            quantised = book[apart.argmin(-1)]
            through = k + (quantised - k).detach()
            each = []
            for t in range(x.shape[1]):
                edge = max(0, t + 1 - self.window)
                seen = torch.cat([quantised[:, :edge], through[:, edge : t + 1]], 1)
                ago = torch.arange(t - edge, -1, -1)
                extra = torch.cat([torch.zeros(edge, dtype=x.dtype), w["bias.table"][i, ago + self.window - 1]])
                scores = (seen * q[:, t, None]).sum(-1) / d.head_dim**0.5 + extra
                each.append((scores.softmax(-1)[..., None] * v[:, : t + 1]).sum(1))
            rows.append(torch.stack(each, 1))
        gate = 1 / (1 + torch.exp(-u @ w["gate.weight"].T - w["gate.bias"]))
        return gate * (torch.cat(rows, -1) @ w["out.weight"].T) + (1 - gate) * u

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 37, {"codes": 7, "window": 6, "states": 3, "chunk": 8}),
            Case(Dims(4, 3, num_kv_heads=2), 23, {"codes": 5, "window": 1, "states": 1, "chunk": 5}, batch=1),
            Case(Dims(1, 4), 11, {"codes": 3}, batch=1),
        ]

    @claim("Codes and window together give attention to all quantised keys, with the biases and without.")
    def factorised(cls) -> Finding:
        layer, u = cls._sample(codes=20, window=9)
        figures, holds = [], True
        for size in (0.0, 1.0):
            layer.bias.table.copy_(size * torch.randn_like(layer.bias.table))
            q, keys, v, _ = layer.tokens(u)
            ago = torch.arange(300)[:, None] - torch.arange(300)
            band = torch.where(ago < 9, layer.bias.table[:, ago.clamp(0, 8) + 8], 0.0)
            scores = (q @ keys.mT / 8**0.5 + band).masked_fill(ago < 0, -torch.inf)
            apart = float((layer.attention(u) - scores.softmax(-1) @ v).abs().max() / v.abs().max())
            holds = holds and apart < 300 * torch.finfo(u.dtype).eps
            figures.append(f"{apart:.1e} {'with' if size else 'without'} biases")
        return Finding(holds, f"largest difference of the largest value: {' and '.join(figures)}")

    @claim("A codebook that holds every key gives exact attention.")
    def exact_codebook(cls) -> Finding:
        layer, u = cls._sample(codes=300, window=4)
        k = layer.qkv(u).unflatten(2, (6, 8)).transpose(1, 2)[0, 2:4]
        k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt()
        rough = layer.attention(u)
        layer.codebook.copy_(k)
        q, _, v, _ = layer.tokens(u)
        exact = attend(q, k[None], v, Causal())
        apart, before = (float((o - exact).abs().max() / v.abs().max()) for o in (layer.attention(u), rough))
        holds = apart < 300 * torch.finfo(u.dtype).eps < before
        return Finding(holds, f"largest difference {apart:.1e} of the largest value, {before:.1e} with random codes")

    @claim("The work is linear in the tokens, and less than that of all pairs.")
    def linear_work(cls) -> Finding:
        layer = cls(Dims(2, 16), codes=32, window=16).requires_grad_(False)
        inputs = (torch.randn(1, n, 32) for n in (1024, 2048))
        costs = [work(partial(layer.attention, x)).all - 2 * x.shape[1] * 32 * 96 for x in inputs]
        share = costs[1] / (2 * 2 * 2048**2 * 2 * 16)
        figure = f"{costs[1] / costs[0]:.2f} times the work at twice N, {share:.2f} of all pairs at 2048"
        return Finding(costs[1] / costs[0] < 2.1 and share < 0.5, figure)

    @claim("The state that a decoder keeps does not grow once the window is full.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(codes=5, window=4)
        sizes, state = [], None
        for token in x[:, :30].split(1, 1):
            _, state = layer.step(token, state=state)
            memory = 0 if state.memory is None else state.memory.memory.numel()
            sizes.append(memory + state.average.memory.numel() + sum(t.numel() for t in (*state.recent, state.counts)))
        return Finding(len(set(sizes[4:])) == 1, f"{sizes[4]} numbers after 5 tokens, {sizes[-1]} after 30")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[LongVQ, Tensor]:
        return sample(lambda: cls(Dims(2, 8), **params), 1, 300, 16)
