"""L2ViT: linear attention with relu over the whole map and a convolution that concentrates it, between windows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import known, positive
from saccade.hosts.block import MLP, AttentionMixer, Residual, TokenNorm, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.mix import DepthwiseConv, Windowed
from saccade.scan import Clamp, linear_attention


class MapNorm(nn.LayerNorm):
    """Layer normalisation of the channels of a map (B, C, Y, X)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ReluAttention(nn.Module):
    """o_i = t_h relu(q_i) sum_j relu(k_j) v_j^T / max(relu(q_i) . sum_j relu(k_j), floor); q, k, v (B, H, N, D)."""

    def __init__(self, dims: Dims, floor: float) -> None:
        super().__init__()
        self.dims, self.floor = dims, floor
        self.temperature = nn.Parameter(torch.full((dims.num_heads,), dims.head_dim**-0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = linear_attention(q, k, v, feature_map="relu", normalizer=Clamp(self.floor), causal=False)
        return self.temperature[:, None, None] * cast(Tensor, o)


def convolution(dims: Dims, kernel: int) -> DepthwiseConv:
    """A depthwise convolution of `kernel` x `kernel` taps, tokens (B, N, C) of the grid of dims."""
    return DepthwiseConv(dims.dim, (kernel, kernel), grid=dims.grid)


class L2ViT(Mixer):
    """The blocks of L2ViT: linear attention over the whole map, or softmax attention in windows.

        linear:  x <- x + DW3x3(x),  x <- x + LGA(LN x),  x <- x + LCM(LN x),  x <- x + MLP(LN x)
        window:  x <- x + DW3x3(x),  x <- x + WMSA(LN x),  x <- x + DW3x3'(x),  x <- x + MLP(LN x)
        LGA: o_i = t_h relu(q_i) sum_j relu(k_j) v_j^T / max(relu(q_i) . sum_j relu(k_j), floor)
        LCM(x) = DW7x7'(BN(gelu(DW7x7(x))))

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); t_h: a learned number a head, D^(-1/2) at first; WMSA:
    attention of H heads within windows that do not overlap, without biases of position; LGA and WMSA end in a
    projection. Rows of LGA sum to t_h where the sum of products is above the floor, to less below it.
    Paper: arXiv 2501.16182; t_h, the floor and the layers follow the authors' code (l2vit.py), where blocks
    of a stage are windows and linear in turn.
    Deviations: none. A map that windows do not divide is filled below and to the right with zeros after the norm, which
    take part as keys and values that are biases alone. Heads may share keys, which the paper's do not.
    attention: "linear" (default) or "window". window: tokens a side of a window (7; 12 at 384 pixels). floor: 100.0.
    mlp_ratio: hidden width of the MLP over C (4).
    Costs 2 N D^2 multiplications a head for LGA, 2 N window^2 D for WMSA, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or floor <= 0.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = L2ViT(Dims(2, 4, grid=(5, 7)))
    >>> layer(torch.randn(1, 35, 8)).shape, num_parameters(L2ViT.model)
    (torch.Size([1, 35, 8]), 28596781)
    """

    spec = Spec(
        id="l2vit",
        name="L2ViT (linear attention with local concentration)",
        title="The Linear Attention Resurrection in Vision Transformer",
        paper="2501.16182",
        year=2025,
        family="linear",
        uses=("linear_attention", "attend", "Windowed", "DepthwiseConv"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, attention: str = "linear", window: int = 7, floor: float = 100.0, mlp_ratio: int = 4
    ) -> None:
        super().__init__(dims)
        self.linear = known("attention", attention, ("linear", "window")) == "linear"
        self.window, self.floor = positive("window", window), floor
        if not floor > 0:
            raise ValueError(f"floor: got {floor}; pass a denominator > 0")
        norm = functools.partial(nn.LayerNorm, dims.dim)
        self.place = Residual(convolution(dims, 3))
        if self.linear:
            self.attend = Residual(AttentionMixer(ReluAttention(dims, floor)), norm())
            concentrate = [convolution(dims, 7), nn.GELU(), TokenNorm(dims.dim), convolution(dims, 7)]
            self.local = Residual(nn.Sequential(*concentrate), norm())
        else:
            self.attend = Residual(Windowed(AttentionMixer(attend, dims=dims), dims.grid or (), window), norm())
            self.local = Residual(convolution(dims, 3))
        self.mlp = Residual(MLP(dims.dim, positive("mlp_ratio", mlp_ratio)), norm())

    def compute(self, x: Tensor) -> Tensor:
        return self.mlp(self.local(self.attend(self.place(x))))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width), side = Weights(self), self.dims, self.dims.grid or (), self.window

        def gelu(t: Tensor) -> Tensor:
            return t / 2 * (1 + torch.erf(t / 2**0.5))

        def around(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def heads(t: Tensor, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
            parts, group = w.linear(t, name).split(d.head_dim, -1), d.num_heads // d.num_kv_heads
            keys = [d.num_heads + h // group for h in range(d.num_heads)]
            return [(parts[h], parts[key], parts[key + d.num_kv_heads]) for h, key in enumerate(keys)]

        x = x + around(x, "place.inner")
        y, mixed = w.norm(x, "attend.norm"), []
        if self.linear:
            for h, (q, k, v) in enumerate(heads(y, "attend.inner.qkv")):
                weights = q.clamp(min=0) @ k.clamp(min=0).mT
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.floor)
                mixed.append(w["attend.inner.attention.temperature"][h] * weights @ v)
            x = x + w.linear(torch.cat(mixed, -1), "attend.inner.out")
            y, bn = around(w.norm(x, "local.norm"), "local.inner.0"), "local.inner.2"
            y = (gelu(y) - w[f"{bn}.running_mean"]) / (w[f"{bn}.running_var"] + 1e-5) ** 0.5
            x = x + around(y * w[f"{bn}.weight"] + w[f"{bn}.bias"], "local.inner.3")
        else:
            high, wide = (-(-n // side) * side for n in (height, width))
            image = nn.functional.pad(y.reshape(len(x), height, width, -1), (0, 0, 0, wide - width, 0, high - height))
            found = torch.zeros_like(image)
            for top in range(0, high, side):
                for left in range(0, wide, side):
                    here, mixed = (slice(None), slice(top, top + side), slice(left, left + side)), []
                    for q, k, v in heads(image[here].flatten(1, 2), "attend.inner.inner.qkv"):
                        weights = torch.exp(q @ k.mT / d.head_dim**0.5)
                        mixed.append(weights @ v / weights.sum(-1, keepdim=True))
                    found[here] = w.linear(torch.cat(mixed, -1), "attend.inner.inner.out").unflatten(1, (side, side))
            x = x + found[:, :height, :width].flatten(1, 2)
            x = x + around(x, "local.inner")
        return x + w.mlp(w.norm(x, "mlp.norm"), "mlp.inner")

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "tiny" (28.6 million parameters), "small" (50.2) or "base" (88.6).

        Blocks are windows and linear in turn. params: of every block, in place of the paper's; an attention is then
        that of all. host: of the `Pyramid`.
        """
        known("name", name, ("tiny", "small", "base"))
        dim, heads = (128, 4) if name == "base" else (96, 3)
        depths = (2, 2, 6 if name == "tiny" else 18, 2)
        stages = [Stage(dim << s, depth, heads << s, stride=2 if s else 4) for s, depth in enumerate(depths)]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return Reduce(dim_in, dim_out, stride, before=nn.LayerNorm(dim_in))
            half = dim_out // 2
            first = [Reduce(dim_in, half, 2, kernel=3), nn.BatchNorm2d(half), nn.ReLU()]
            last = [Reduce(half, dim_out, 2, kernel=3), nn.BatchNorm2d(dim_out), MapNorm(dim_out)]
            return nn.Sequential(*first, *last)

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **{"attention": "linear" if index % 2 else "window", **(params or {})})

        model = Pyramid(**{"size": (224, 224), "stages": stages, "block": block, "enter": enter, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(3, 5)), 15, {"floor": 10.0, "mlp_ratio": 2}),
            Case(Dims(4, 3, num_kv_heads=2, grid=(5, 7)), 35, {"attention": "window", "window": 3}, batch=1),
            Case(Dims(1, 5, grid=(3, 4)), 12),
        ]

    @claim("L2ViT-T, S and B have 29, 50 and 89 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"tiny": 29, "small": 50, "base": 89})

    @claim("The memory gives what all pairs give; rows sum to t where products sum to 100 or more, to less below.")
    def floor_of_rows(cls) -> Finding:
        q, k = torch.randn(2, 1, 2, 35, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        attention, eps = ReluAttention(Dims(2, 8), 100.0).double().requires_grad_(False), torch.finfo(q.dtype).eps
        weights = attention(q, k, torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1))
        products = q.relu() @ k.relu().mT
        mass, t = products.sum(-1, keepdim=True), attention.temperature[:, None, None]
        apart = float((weights / t - products / mass.clamp(min=100)).abs().max())
        sums = weights.sum(-1, keepdim=True) / t
        above, below = sums[mass >= 100], sums[mass < 100]
        whole = len(above) > 0 and float((above - 1).abs().max()) < 35 * eps
        figure = f"{len(above)} rows sum to t, {len(below)} to {float(below.min()):.2f} t or more but less than t"
        return Finding(apart < eps and whole and float(below.max()) < 1, f"{figure}; largest difference {apart:.1e}")

    @claim("Local concentration adds a 13 x 13 neighbourhood, and nothing where its second kernel is 0.")
    def concentrates(cls) -> Finding:
        local = cls(Dims(1, 2, grid=(21, 21))).double().eval().requires_grad_(False).local
        x = torch.randn(1, 441, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(local(x.requires_grad_())[0, 220, 0], x)
        seen = slope.ne(0).any(-1).view(21, 21)
        rows, columns = int(seen.any(1).sum()), int(seen.any(0).sum())
        for parameter in local.inner[3].parameters():
            parameter.zero_()
        same = bool((local(x) == x).all())
        return Finding((rows, columns, same) == (13, 13, True), f"sees {rows} x {columns}; nothing added at 0: {same}")

    @claim("Reading takes work that is linear in the tokens.")
    def linear_work(cls) -> Finding:
        layer, inputs = ReluAttention(Dims(2, 8), 100.0), (torch.ones(3, 1, 2, length, 8) for length in (384, 768))
        costs = [work(functools.partial(layer, *given)).all for given in inputs]
        share = costs[1] / (4 * 2 * 768**2 * 8)
        figure = f"{costs[1] / costs[0]:.2f} times the work at twice N, {share:.3f} of dense at 768"
        return Finding(costs[1] == 2 * costs[0] and share < 1, figure)
