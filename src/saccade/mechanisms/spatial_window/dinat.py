"""DiNAT: neighbourhood attention alternates with dilated neighbourhood attention, on every d-th position an axis."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim
from saccade.errors import known, positive
from saccade.hosts.block import AttentionMixer, Block, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.mix import to_map, to_tokens
from saccade.softmax import RelativeTable
from saccade.where import Neighborhood


class Around(nn.Module):
    """Attention to the dilated neighbourhood of each position, q, k, v (B, H, N, D)."""

    def __init__(self, dims: Dims, kernel: int, dilation: int) -> None:
        super().__init__()
        grid = dims.grid or ()
        self.dims, self.pattern = dims, Neighborhood(grid, kernel, dilation=dilation)
        self.bias = RelativeTable(dims.num_heads, (kernel, kernel), grid=grid, step=dilation)
        nn.init.trunc_normal_(self.bias.table, std=0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern, bias=self.bias)


class Filled(nn.Module):
    """A module on the map filled with zeros below and to the right, from `grid` to `whole`; tokens (B, N, C)."""

    def __init__(self, inner: nn.Module, grid: tuple[int, ...], whole: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.grid, self.whole = inner, grid, whole

    def forward(self, x: Tensor) -> Tensor:
        if self.grid == self.whole:
            return self.inner(x)
        (height, width), (high, wide) = self.grid, self.whole
        x = to_tokens(nn.functional.pad(to_map(x, self.grid), (0, wide - width, 0, high - height)))
        return to_tokens(to_map(self.inner(x), self.whole)[:, :, :height, :width])


class Dinat(Mixer):
    """The DiNAT block: x <- x + a DiNA(LN x), x <- x + b MLP(LN x).

        DiNA(x)_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(D) + B((i - j) / d)) v_j,   then a projection with bias
        N(i) = the kernel x kernel positions nearest to i among those with its residues modulo d, all inside the map

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, k, v: projections for each of H heads; B: a learned
    table per head over the (2 kernel - 1)^2 differences in steps of d; a, b: learned factors per channel, where there
    are any. Near a border the window is pushed inside its class of residues, so that every query has kernel^2 keys.
    Paper: arXiv 2209.15001, section 3.2 (equations 2 to 4); models section 3.4. What the block and the ways between
    stages consist of follows the authors' code (nat.py, dinat.py).
    Deviations: none. A map smaller than kernel d on an axis is filled up to that with zeros, below and to the right,
    after the norm, as in the authors' code; the filling takes part as keys and values that are biases alone. Heads may
    share keys, which the paper's do not.
    kernel: positions a side of a neighbourhood (default 7). dilation: d (1, which is neighbourhood attention).
    mlp_ratio: hidden width of the MLP over C (3; 2 in the larger models). layer_scale: initial value of a, b (None: 1;
    1e-5 in the largest).
    Costs 2 N kernel^2 C multiplications in the products, whatever the dilation, beside the layers.
    Errors: ValueError when dims.grid has not two axes.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = Dinat(Dims(2, 4, grid=(9, 12)), kernel=3, dilation=3)
    >>> layer(torch.randn(1, 108, 8)).shape, num_parameters(Dinat.model)
    (torch.Size([1, 108, 8]), 27901582)
    """

    spec = Spec(
        id="dinat",
        name="DiNAT (Dilated Neighborhood Attention)",
        title="Dilated Neighborhood Attention Transformer",
        paper="2209.15001",
        year=2022,
        family="spatial_window",
        uses=("attend", "Neighborhood", "RelativeTable"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, kernel: int = 7, dilation: int = 1, mlp_ratio: int = 3, layer_scale: float | None = None
    ) -> None:
        super().__init__(dims)
        self.kernel, self.dilation = positive("kernel", kernel), positive("dilation", dilation)
        grid = dims.grid or ()
        whole = tuple(max(n, kernel * dilation) for n in grid)
        around = Around(Dims(dims.num_heads, dims.head_dim, dims.num_kv_heads, whole), kernel, dilation)
        mixer = Filled(AttentionMixer(around), grid, whole)
        self.block = Block(dims, mixer, mlp_ratio=mlp_ratio, layer_scale=layer_scale)

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self, "block."), self.dims, self.dims.grid or ()
        step, side, group = self.dilation, self.kernel, self.dims.num_heads // self.dims.num_kv_heads
        high, wide = (max(n, side * step) for n in (height, width))
        (table,) = (weight for name, weight in w.items() if name.endswith("table"))

        def nearest(at: int, length: int) -> list[int]:
            same = list(range(at % step, length, step))
            first = min(max(same.index(at) - side // 2, 0), len(same) - side)
            return same[first : first + side]

        image = x.new_zeros(len(x), high, wide, d.dim)
        image[:, :height, :width] = w.norm(x, "norm_mixer").unflatten(1, (height, width))
        heads = w.linear(image, "mixer.inner.qkv").unflatten(-1, (-1, d.head_dim))
        q, k, v = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 3)
        k, v = (t.repeat_interleave(group, 3) for t in (k, v))
        found = []
        for row, column in itertools.product(range(height), range(width)):
            rows, columns = nearest(row, high), nearest(column, wide)
            apart = [[(at - o) // step + side - 1 for o in seen] for at, seen in ((row, rows), (column, columns))]
            keys, values = (t[:, rows][:, :, columns].flatten(1, 2) for t in (k, v))  # (B, kernel^2, H, D)
            bias = table[:, apart[0]][:, :, apart[1]].flatten(1).T
            scores = torch.einsum("bhd,bmhd->bmh", q[:, row, column], keys) / d.head_dim**0.5 + bias
            found.append(torch.einsum("bmh,bmhd->bhd", scores.softmax(1), values).flatten(1))
        x = x + w.get("block.scale_mixer", 1) * w.linear(torch.stack(found, 1), "mixer.inner.out")
        return x + w.get("block.scale_mlp", 1) * w.mlp(w.norm(x, "norm_mlp"), "mlp")

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "mini" (20.0 million parameters), "tiny" (27.9), "small" (50.7), "base" (89.8) or
        "large" (200.9).

        Blocks alternate between dilation 1 and n // kernel, for n the shorter side of the stage's map, at least 1.
        params: of every block, in place of the paper's; a dilation is then that of all. host: of the `Pyramid`.
        """
        known("name", name, ("mini", "tiny", "small", "base", "large"))
        dim = {"small": 96, "base": 128, "large": 192}.get(name, 64)
        larger: dict[str, Any] = {"mlp_ratio": 2} if dim > 64 else {}
        if name == "base":
            larger["layer_scale"] = 1e-5
        depths = (3, 4, 6 if name == "mini" else 18, 5)
        stages = [Stage(dim << s, depth, (dim << s) // 32, stride=2 if s else 4) for s, depth in enumerate(depths)]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            half = functools.partial(Reduce, stride=2, kernel=3)
            if stage:
                return half(dim_in, dim_out, bias=False, after=nn.LayerNorm(dim_out))
            return nn.Sequential(half(dim_in, dim_out // 2), half(dim_out // 2, dim_out, after=nn.LayerNorm(dim_out)))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            given = {**larger, **(params or {})}
            widest = max(1, min(dims.grid or ()) // given.get("kernel", 7))
            return cls(dims, **{"dilation": widest if index % 2 else 1, **given})

        model = Pyramid(**{"size": (224, 224), "stages": stages, "block": block, "enter": enter, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(6, 7)), 42, {"kernel": 3, "dilation": 2, "mlp_ratio": 2, "layer_scale": 0.5}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(5, 7)), 35, {"kernel": 2, "dilation": 3, "mlp_ratio": 1}, batch=1),
            Case(Dims(1, 5, grid=(5, 6)), 30, {"kernel": 5}),
        ]

    @claim("The models have 20, 28, 51, 90 and 200 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"mini": 20, "tiny": 28, "small": 51, "base": 90, "large": 200})

    @claim("Dilation d is neighbourhood attention on each of the d^2 grids of every d-th position, by itself.")
    def interleaved(cls) -> Finding:
        dilated = cls(Dims(2, 4, grid=(11, 16)), kernel=3, dilation=3).double().block.mixer
        x, worst = torch.randn(1, 11, 16, 8, dtype=torch.float64), 0.0
        with torch.no_grad():
            y = dilated(x.flatten(1, 2)).view_as(x)
            for row, column in itertools.product(range(3), range(3)):
                one, out = x[:, row::3, column::3], y[:, row::3, column::3]
                plain = cls(Dims(2, 4, grid=tuple(one.shape[1:3])), kernel=3).double().block.mixer
                for mine, weight in zip(plain.parameters(), dilated.parameters(), strict=True):
                    mine.copy_(weight)
                worst = max(worst, float((plain(one.flatten(1, 2)).view_as(one) - out).abs().max()))
        allowed = 64 * torch.finfo(torch.float64).eps * float(y.abs().max())
        return Finding(worst <= allowed, f"largest difference {worst:.1e} of {float(y.abs().max()):.1f} on 9 grids")

    @claim("Three layers of dilations 1, k, k^2 reach k^3 positions an axis, of dilation 1 they reach 3 (k - 1) + 1.")
    def reach(cls) -> Finding:
        seen = {}
        for dilations in ((1, 3, 9), (1, 9, 1), (1, 1, 1)):
            met = torch.eye(27 * 27, dtype=torch.float64)[13 * 27 + 13]
            for dilation in dilations:
                pattern = Around(Dims(1, 1, grid=(27, 27)), 3, dilation).pattern
                met = (met @ pattern.dense(729)[0].double()).clamp(max=1)
            seen[dilations] = int(met.view(27, 27).any(0).sum())
        figure = "; ".join(f"dilations {dilations}: {count}" for dilations, count in seen.items())
        return Finding(list(seen.values()) == [27, 15, 7], f"positions an axis with kernel 3: {figure}")

    @claim("The products of attention are 2 N k^2 C multiplications, whatever the dilation.")
    def same_cost(cls) -> Finding:
        pairs = []
        for dilation in (1, 2, 4):
            around = Around(Dims(1, 8, grid=(28, 30)), 7, dilation)
            pairs.append(int(around.pattern.plan(840, 840, 1, block=(64, 64)).num_attended) / 840)
        return Finding(pairs == [49] * 3, f"{pairs[0]:g}, {pairs[1]:g} and {pairs[2]:g} keys a query at d = 1, 2, 4")
