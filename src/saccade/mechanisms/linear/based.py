"""Based: linear attention by a Taylor polynomial, between windows of softmax attention and short gated convolutions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, rotated
from saccade.errors import known, positive
from saccade.hosts.short_conv import short_conv, short_taps
from saccade.mix import turn_at
from saccade.scan import State, Sum, linear_attention
from saccade.scan.features import taylor2
from saccade.where import Window

LAYERS = ("linear", "window", "conv")


@dataclass(frozen=True)
class BasedState:
    """What a decoder keeps.

    The memory of a linear layer; or of a window its last keys and values (B, 2 Hkv, window - 1, D), and how many tokens
    there have been; or the last inputs of a convolution (B, kernel - 1, 2 C).
    """

    memory: State | None = None
    recent: Tensor | None = None
    count: int = 0


class Based(Mixer):
    """One of the three layers of Based, which share out recall and neighbourhood among them.

        "linear": o_i = sum_{j <= i} phi(q_i) . phi(k_j) v_j / sum_{j <= i} phi(q_i) . phi(k_j)
                  phi(q) . phi(k) = 1 + t + t^2 / 2,   t = q . k / sqrt(d)
        "window": o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over i - window < j <= i, q and k turned by position
        "conv":   y = W_o (silu(conv(W_1 x)) * W_2 x)

    x, y (B, N, C); q, k (B, H, N, d), phi of 1 + d + d^2 features, v (B, H, N, D) and W_o for the first; q, k, v
    (B, H, N, D) and W_o for the second; W_1, W_2 (2 C, C) with biases and a causal depthwise convolution for the third.
    In the authors' models of 27 and 36 layers every fifth or sixth is linear, the one after it a window, and the others
    are convolutions. Paper: arXiv 2402.18668; layers and defaults follow the authors' code. Deviations: `window` counts
    the query's own key, which the code adds to its 64; keys and values may be shared by query heads in the linear layer
    too; the 1e-12 that the code adds to a sum of terms >= 1 / 2 is left out; its fused convolution has a bias, the
    plain one has none, and so it is here.
    layer: "linear" (default), "window" or "conv". feature_dim: d (16: 273 features). window: keys of the window (64).
    kernel: taps of the convolution (3).
    Costs beside the projections, a token and head: d^2 (2 D + 64) multiply-adds and a state of (1 + d + d^2) (D + 1)
    numbers; or 2 window D, and window - 1 keys and values; or 2 D kernel, and 2 D (kernel - 1) numbers.
    Errors: ValueError for an odd head_dim in the window layer, where channels turn in pairs.

    >>> Based(Dims(num_heads=2, head_dim=4), layer="linear")(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="based",
        name="Based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        paper="2402.18668",
        year=2024,
        family="linear",
        uses=("linear_attention", "Sum", "attend", "Window", "turn_at"),
    )
    causal = True

    def __init__(
        self, dims: Dims, *, layer: str = "linear", feature_dim: int = 16, window: int = 64, kernel: int = 3
    ) -> None:
        super().__init__(dims)
        self.layer = known("layer", layer, LAYERS)
        self.feature_dim, self.window = positive("feature_dim", feature_dim), positive("window", window)
        self.kernel = positive("kernel", kernel)
        if layer == "window" and dims.head_dim % 2:
            raise ValueError(f"dims.head_dim: got {dims.head_dim}; channels turn in pairs, so pass an even number")
        c = dims.dim
        if layer == "conv":
            self.project, self.out = nn.Linear(c, 4 * c), nn.Linear(2 * c, c)
            self.conv = short_taps(2 * c, kernel)
        else:
            width = feature_dim if layer == "linear" else dims.head_dim
            heads = dims.num_heads + dims.num_kv_heads
            self.project = nn.Linear(c, heads * width + dims.num_kv_heads * dims.head_dim, bias=False)
            self.out = nn.Linear(c, c, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the linear and the window layer."""
        d, y = self.dims, self.project(x)
        values = d.num_kv_heads * d.head_dim
        width = (y.shape[2] - values) // (d.num_heads + d.num_kv_heads)
        q, k, v = y.split([d.num_heads * width, d.num_kv_heads * width, values], 2)
        return tuple(z.unflatten(2, (-1, n)).transpose(1, 2) for z, n in ((q, width), (k, width), (v, d.head_dim)))

    def linear(self, x: Tensor, state: BasedState) -> tuple[Tensor, BasedState]:
        o, memory = linear_attention(
            *self.heads(x), feature_map=taylor2, normalizer=Sum(), state=state.memory, return_state=True
        )
        return self.out(o.transpose(1, 2).flatten(2)), BasedState(memory)

    def windowed(self, x: Tensor, state: BasedState) -> tuple[Tensor, BasedState]:
        q, k, v = self.heads(x)
        q, k = turn_at(q, state.count), turn_at(k, state.count)
        pair = torch.cat([k, v], 1)
        pair = pair if state.recent is None else torch.cat([state.recent, pair], 2)
        k, v = pair.chunk(2, 1)
        o = attend(q, k, v, Window(self.window))
        recent = pair[:, :, max(0, pair.shape[2] - self.window + 1) :].clone()  # or the whole would stay in memory
        return self.out(o.transpose(1, 2).flatten(2)), BasedState(recent=recent, count=state.count + x.shape[1])

    def convolve(self, x: Tensor, state: BasedState) -> tuple[Tensor, BasedState]:
        y, gate = self.project(x).chunk(2, 2)
        mixed, recent = short_conv(y, self.conv, state.recent)
        return self.out(F.silu(mixed) * gate), BasedState(recent=recent)

    def step(self, x: Tensor, *, state: BasedState | None = None) -> tuple[Tensor, BasedState]:
        mix = {"linear": self.linear, "window": self.windowed, "conv": self.convolve}[self.layer]
        return mix(x, state or BasedState())

    def compute(self, x: Tensor) -> Tensor:
        return self.step(x)[0]

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        if self.layer == "conv":
            y = x @ w["project.weight"].T + w["project.bias"]
            y, gate = y[..., : 2 * d.dim], y[..., 2 * d.dim :]
            for t in range(x.shape[1]):
                taps = [(j, t - self.kernel + 1 + j) for j in range(self.kernel) if t - self.kernel + 1 + j >= 0]
                mixed = sum((w["conv"][:, 0, j] * y[:, i] for j, i in taps), torch.zeros(()).to(x))
                rows.append(mixed / (1 + torch.exp(-mixed)) * gate[:, t])
            return torch.stack(rows, 1) @ w["out.weight"].T + w["out.bias"]

        y = x @ w["project.weight"].T
        width = self.feature_dim if self.layer == "linear" else d.head_dim
        edges = [0, d.num_heads * width, (d.num_heads + d.num_kv_heads) * width, y.shape[2]]
        q, k, v = (y[..., a:b] for a, b in itertools.pairwise(edges))

        for i in range(x.shape[1]):
            heads = []
            for h in range(d.num_heads):
                g = h // d.group
                query, key = q[:, i, h * width :][:, :width], k[:, : i + 1, g * width :][:, :, :width]
                value = v[:, : i + 1, g * d.head_dim :][:, :, : d.head_dim]
                if self.layer == "window":
                    query = rotated(query[:, None], torch.tensor([i]), 10000.0)[:, 0]
                    key = rotated(key, torch.arange(i + 1), 10000.0)
                t = (query[:, None] * key).sum(-1) / width**0.5
                if self.layer == "linear":
                    weights = 1 + t + t**2 / 2
                else:
                    t, value = t[:, -self.window :], value[:, -self.window :]
                    weights = t.softmax(-1)
                heads.append((weights[..., None] * value).sum(1) / weights.sum(-1, keepdim=True))
            rows.append(torch.cat(heads, -1))
        return torch.stack(rows, 1) @ w["out.weight"].T

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 37, {"feature_dim": 3}),
            Case(Dims(4, 4, num_kv_heads=2), 23, {"layer": "window", "window": 7}, batch=1),
            Case(Dims(4, 3, num_kv_heads=2), 19, {"feature_dim": 4}, batch=1),
            Case(Dims(2, 3), 17, {"layer": "conv", "kernel": 4}, batch=1),
        ]

    @claim(
        "phi(q) . phi(k) is the Taylor polynomial 1 + t + t^2 / 2 of exp(t), always at least 1 / 2, of 273 features."
    )
    def taylor(cls) -> Finding:
        q, k = 2 * torch.randn(2, 1, 1, 200, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = q @ k.mT / 4
        found, wanted = taylor2(q) @ taylor2(k).mT, 1 + t + t**2 / 2
        scale = float((taylor2(q).abs() @ taylor2(k).abs().mT).max())
        apart, near = float((found - wanted).abs().max()), t.abs() < 1
        off = float((found[near] / t[near].exp() - 1).abs().max())
        count = taylor2(q).shape[3]
        eps = count * torch.finfo(q.dtype).eps * scale
        figure = (
            f"{count} features, largest difference {apart:.1e}, least {float(found.min()):.3f} for t from "
            f"{float(t.min()):.0f} to {float(t.max()):.0f}, within {off:.0%} of exp(t) for |t| < 1"
        )
        return Finding(apart < eps and float(found.min()) > 0.5 - eps and count == 273 and off < math.e / 2 - 1, figure)

    @claim("Recall rises with the size of the state.")
    @torch.no_grad()
    def recall(cls) -> Finding:
        random, n = torch.Generator().manual_seed(0), 64
        codes = torch.randn(n, 32, generator=random)
        values = torch.randn(n, 32, generator=random)
        # Pairs first, then the keys alone as questions.
        x = torch.cat([torch.cat([codes, values], 1), torch.cat([codes, torch.zeros_like(values)], 1)])[None]
        found = []
        for d in (4, 8, 16, 24):
            layer = cls(Dims(1, 64), feature_dim=d)
            onto = torch.randn(d, 32, generator=random)
            onto = 8 * onto / (codes @ onto.T).norm(dim=1).mean() * d**0.25  # about t = 64 of a key with itself
            layer.out.weight.copy_(torch.eye(64))
            layer.project.weight.zero_()
            layer.project.weight[: 2 * d, :32] = onto.repeat(2, 1)
            layer.project.weight[2 * d + 32 :, 32:] = torch.eye(32)
            y, state = layer.step(x)
            read = y[0, n:, 32:] @ values.T
            right = float((read.argmax(1) == torch.arange(n)).float().mean())
            found.append((state.memory.memory.numel(), right))
        figure = f"of {n} pairs " + ", ".join(f"{right:.0%} with {numbers} numbers" for numbers, right in found)
        rates = [right for _, right in found]
        return Finding(rates == sorted(rates) and rates[-1] > 2 * rates[0], figure)

    @claim("In all three layers work is linear in the tokens, and what a decoder keeps does not grow.")
    def linear_work(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        figures, holds = [], True
        for layer in LAYERS:
            module, work = cls(Dims(2, 16), layer=layer).requires_grad_(False), []
            for n in (1024, 2048):
                with FlopCounterMode(display=False) as counter:
                    _, state = module.step(torch.randn(1, n, 32))
                work.append(counter.get_total_flops())
            _, early = module.step(torch.randn(1, 100, 32))
            kept = [(s.recent if s.memory is None else s.memory.memory).numel() for s in (early, state)]
            holds = holds and work[1] <= 2 * work[0] and kept[0] == kept[1]
            figures.append(f"{layer} {work[1] / work[0]:.2f} times at twice N, {kept[0]} and {kept[1]} numbers kept")
        return Finding(holds, "; ".join(figures))
