"""DaViT: attention within windows of positions, then attention among the channels of groups, over the whole map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed
from saccade.errors import known, positive
from saccade.hosts.block import MLP, AttentionMixer, Residual, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage, pool_then_norm
from saccade.hosts.resize import Reduce
from saccade.mix import DepthwiseConv, Windowed


class Position(DepthwiseConv):
    """The 3 x 3 convolution that tells positions apart, on the grid of dims."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims.dim, (3, 3))
        self.grid = dims.grid or ()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.grid)


def attend_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels of a head as tokens: k, v and q (B, H, N, D) act as queries, keys and values of N channels."""
    return attend(k.mT, v.mT, q.mT, scale=q.shape[3] ** -0.5).mT


class Davit(Mixer):
    """The dual attention block: one spatial block, then one channel block.

        x <- x + DW(x),  x <- x + A(LN x),  x <- x + DW(x),  x <- x + MLP(LN x)      with A = A_s, then with A = A_c
        A_s: in each window of k x k positions and each head   softmax(Q K^T / sqrt(D)) V
        A_c: in each group of D channels, over all positions   (softmax(K^T V / sqrt(D)) Q^T)^T

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); Q, K, V (N, D): projections, for each of H heads or
    groups; DW: 3 x 3 depthwise convolution with bias; every layer has weights of its own. A projection with bias
    follows each A. A map that windows do not divide is filled below and to the right with zeros, after the norm; the
    filling takes part as keys and values that are biases alone.
    Paper: arXiv 2204.03645, sections 3.1 to 3.3; DW, the filling and which of Q, K, V stands where in A_c follow the
    authors' code (davit.py). The paper writes softmax(Q^T K / sqrt(D)) V^T for A_c: the same but for names.
    Deviations: none.
    window: k (default 7). mlp_ratio: hidden width of the MLPs over C (4).
    Costs 2 N k^2 C + 2 N C D multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or heads share keys, for a group mixes its own.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = Davit(Dims(2, 4, grid=(5, 9)), window=3)
    >>> layer(torch.randn(1, 45, 8)).shape, num_parameters(Davit.model)
    (torch.Size([1, 45, 8]), 28360168)
    """

    spec = Spec(
        id="davit",
        name="DaViT",
        title="DaViT: Dual Attention Vision Transformers",
        paper="2204.03645",
        year=2022,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "Windowed"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, window: int = 7, mlp_ratio: int = 4) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        within = Windowed(AttentionMixer(attend, dims=dims), dims.grid or (), positive("window", window))
        self.spatial, self.channel = (
            nn.Sequential(
                Residual(Position(dims)),
                Residual(attention, nn.LayerNorm(dims.dim)),
                Residual(Position(dims)),
                Residual(MLP(dims.dim, mlp_ratio), nn.LayerNorm(dims.dim)),
            )
            for attention in (within, AttentionMixer(attend_channels, dims=dims))
        )
        self.window = window

    def compute(self, x: Tensor) -> Tensor:
        return self.channel(self.spatial(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, k, (height, width) = Weights(self), self.dims, self.window, self.dims.grid or ()

        def placed(t: Tensor, name: str) -> Tensor:
            return t + w.conv(t.unflatten(1, (height, width)), f"{name}.inner").flatten(1, 2)

        def within(t: Tensor, name: str) -> Tensor:
            out = torch.empty_like(t)
            for top, left in itertools.product(range(0, height, k), range(0, width, k)):
                places = itertools.product(range(top, top + k), range(left, left + k))
                at = [y * width + x for y, x in places if y < height and x < width]
                tokens = torch.cat([t[:, at], t.new_zeros(len(t), k * k - len(at), d.dim)], 1)
                query, key, value = w.linear(tokens, f"{name}.qkv").split(d.dim, -1)
                out[:, at] = w.linear(weighed(query, key, value, d.head_dim), f"{name}.out")[:, : len(at)]
            return out

        def across(t: Tensor, name: str) -> Tensor:
            mixed = []
            parts = (part.split(d.head_dim, -1) for part in w.linear(t, f"{name}.qkv").split(d.dim, -1))
            for q, k, v in zip(*parts, strict=True):
                weights = (torch.einsum("bpi,bpj->bij", k, v) / d.head_dim**0.5).softmax(-1)
                mixed.append(torch.einsum("bij,bpj->bpi", weights, q))
            return w.linear(torch.cat(mixed, -1), f"{name}.out")

        for block, attention, name in (("spatial", within, "1.inner.inner"), ("channel", across, "1.inner")):
            x = placed(x, f"{block}.0")
            x = x + attention(w.norm(x, f"{block}.1.norm"), f"{block}.{name}")
            x = placed(x, f"{block}.2")
            x = x + w.mlp(w.norm(x, f"{block}.3.norm"), f"{block}.3.inner")
        return x

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "tiny" (28.4 million parameters), "small" (49.7 million) or "base" (88.0 million).

        params: of every block, in place of the defaults. host: of the `Pyramid`, in place of the paper's.
        """
        known("name", name, ("tiny", "small", "base"))
        dim, depths = 128 if name == "base" else 96, (1, 1, 3 if name == "tiny" else 9, 1)
        stages = [Stage(dim << s, depth, (dim << s) // 32, stride=2 if s else 4) for s, depth in enumerate(depths)]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return Reduce(dim_in, dim_out, stride, before=nn.LayerNorm(dim_in))
            return Reduce(dim_in, dim_out, stride, kernel=7, after=nn.LayerNorm(dim_out))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **(params or {}))

        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": enter, "head": pool_then_norm}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"window": 3, "mlp_ratio": 2}),
            Case(Dims(3, 4, grid=(4, 6)), 24, {"window": 2}, batch=1),
            Case(Dims(1, 5, grid=(3, 4)), 12, {"window": 5, "mlp_ratio": 1}),
        ]

    @claim("The tiny model has 28.3 million parameters, the small one 49.7, the base one 87.9, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"tiny": 28.3, "small": 49.7, "base": 87.9})

    @claim("One layer of channel attention sees the whole map; one of window attention its window.")
    def global_in_one_layer(cls) -> Finding:
        module, seen = cls(Dims(2, 4, grid=(14, 21))).double(), []
        for block in (module.spatial, module.channel):
            x = torch.randn(1, 294, 8, dtype=torch.float64)
            seen.append(int(reached(block[1], x, (0, 0, 0)).sum()))
        return Finding(
            seen == [49, 294], f"of 294 positions the first sees {seen[0]} in windows, {seen[1]} by channels"
        )

    @claim("Channel attention, apart from the convolutions, goes along with any permutation of positions.")
    def equivariant(cls) -> Finding:
        channels = cls(Dims(4, 8, grid=(13, 17))).double().channel[1]
        x, order = torch.randn(1, 221, 32, dtype=torch.float64), torch.randperm(221)
        with torch.no_grad():
            y = channels(x)
            error = float((channels(x[:, order]) - y[:, order]).abs().max())
        allowed = 221 * torch.finfo(torch.float64).eps * float(y.abs().max())  # sums of 221 terms in another order
        return Finding(error <= allowed, f"largest difference {error:.1e} of {float(y.abs().max()):.1f}")

    @claim("The products of channel attention are 2 P C D multiplications on P positions: linear, whatever the window.")
    def linear(cls) -> Finding:
        work = []
        for grid in ((12, 20), (24, 20)):
            x, counted = torch.randn(1, 4, grid[0] * grid[1], 8), _count(attend_channels)
            work.append(counted(x, x, x) / (2 * x.shape[2] * 32 * 8))
        return Finding(work == [2.0, 2.0], f"{work[0]:g} and {work[1]:g} P C D at 240 and 480 positions")


def _count(function: Any) -> Any:
    """The multiplications, times two, of the matrix products in a call of `function`."""
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the counter does not know by itself
    rules = {fused: lambda q, k, v, *_, **__: 2 * q[:3].numel() * k[2] * (q[3] + v[3])}

    def counted(*inputs: Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=rules) as counter:
            function(*inputs)
        return counter.get_total_flops()

    return counted
