"""D-Former: in volumes, attention in units of neighbours, then in units of the same size spread over the whole map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import known, positive
from saccade.hosts.block import Block, init_linear, num_parameters
from saccade.hosts.pyramid import Stage
from saccade.hosts.resize import Expand, Reduce, Stride
from saccade.hosts.unet import UNet
from saccade.hosts.windows import WindowAttention
from saccade.mix import DepthwiseConv, cut_windows, to_map, to_tokens


class Merge(nn.Module):
    """The way into a stage: W LN(the 8 positions of a cube, zeros beyond the border); a map to half the grid."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(8 * dim_in), nn.Linear(8 * dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cubes = cut_windows(to_tokens(x), x.shape[2:], 2).flatten(2)
        return to_map(self.reduce(self.norm(cubes)), [-(-n // 2) for n in x.shape[2:]])


class Leave(nn.Module):
    """The way out: W LN(Expand(LN(x))), from a map to the classes of every voxel."""

    def __init__(self, dim: int, num_classes: int, stride: Stride) -> None:
        super().__init__()
        self.expand = Expand(dim, dim, stride, rank=3, norm=nn.LayerNorm(dim))
        self.norm, self.classes = nn.LayerNorm(dim), nn.Linear(dim, num_classes, bias=False)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.classes(self.norm(self.expand(x, size).movedim(1, -1))).movedim(-1, 1)


class Dformer(Mixer):
    """The dilated transformer: a block of local scope, then one of global scope.

        x <- x + DW(x)  where a stage begins
        x <- x + A(LN x),  x <- x + MLP(LN x)      with A in units of neighbours, then in units far apart
        A: softmax(Q K^T / sqrt(D)) V in each unit and head
        a unit: t x y x x neighbours (local), or as many positions, ceil(T / t), ceil(Y / y), ceil(X / x) apart (global)

    x (B, N, C): tokens of a row-major grid (T, Y, X) -> (B, N, C); Q, K, V (t y x, D): projections with bias for each
    of H heads; DW: 3 x 3 x 3 depthwise convolution with bias; no other positions. A map with Y < y is one unit.
    Paper: arXiv 2201.00462; the convolution's place, the lone unit and all sizes follow the authors' code (model.py).
    Deviations: a map that units do not divide is filled below and to the right with positions that nobody sees; the
    authors' code fills the global units up to multiples of 8, 4, 2 and 1 by stage, and sees fillings along T alone.
    Heads may share keys. In the model, skips come from the end of an encoder stage, where the authors' code takes them
    from its beginning, a norm stands before each expansion instead of after, and the expansion has a bias.
    unit: positions a side of a unit, (t, y, x) (default (2, 8, 8)). position: begin with DW (True). mlp_ratio: hidden
    width of the MLPs over C (4).
    Costs 4 N t y x C multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not three axes, or unit not three numbers.

    >>> layer = Dformer(Dims(2, 4, grid=(3, 5, 6)), unit=(2, 3, 3))
    >>> stages = [Stage(8, 1, 2, stride=(2, 4, 4)), Stage(16, 1, 4)]
    >>> model = Dformer.model(size=(5, 9, 11), stages=stages, out_channels=3, params={"unit": (2, 3, 3)})
    >>> layer(torch.randn(1, 90, 8)).shape, model(torch.randn(1, 1, 5, 9, 11)).shape
    (torch.Size([1, 90, 8]), torch.Size([1, 3, 5, 9, 11]))
    """

    spec = Spec(
        id="dformer",
        name="D-Former",
        title="D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation",
        paper="2201.00462",
        year=2022,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "RegionBias", "Windowed", "cut_windows"),
        grid=3,
    )

    def __init__(
        self, dims: Dims, *, unit: Sequence[int] = (2, 8, 8), position: bool = True, mlp_ratio: int = 4
    ) -> None:
        super().__init__(dims)
        grid = dims.grid or ()
        if isinstance(unit, int) or len(unit) != 3:
            raise ValueError(f"unit: got {unit!r}; pass three numbers, (t, y, x)")
        sizes = tuple(positive("unit", size) for size in unit)
        self.unit = grid if grid[1] < sizes[1] else sizes
        self.position = DepthwiseConv(dims.dim, (3, 3, 3)) if position else None
        self.local, self.spread = (
            Block(dims, WindowAttention(dims, self.unit, dilated=dilated, table=None), mlp_ratio=mlp_ratio)
            for dilated in (False, True)
        )

    def compute(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = x + self.position(x, self.dims.grid or ())
        return self.spread(self.local(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, grid = Weights(self), self.dims, self.dims.grid or ()

        def attended(t: Tensor, name: str) -> Tensor:
            out, units = torch.empty_like(t), dict[tuple[int, ...], list[int]]()
            shared = d.num_kv_heads * d.head_dim
            for i, place in enumerate(itertools.product(*map(range, grid))):
                apart = [-(-n // size) for n, size in zip(grid, self.unit, strict=True)]
                by = apart if name == "spread" else self.unit
                key = tuple(c % s if name == "spread" else c // s for c, s in zip(place, by, strict=True))
                units.setdefault(key, []).append(i)
            for at in units.values():
                q, k, v = w.linear(t[:, at], f"{name}.mixer.inner.qkv").split([d.dim, shared, shared], -1)
                out[:, at] = w.linear(weighed(q, k, v, d.head_dim), f"{name}.mixer.inner.out")
            return out

        if "position.weight" in w:
            x = x + w.conv(x.unflatten(1, grid), "position").flatten(1, 3)
        for name in ("local", "spread"):
            x = x + attended(w.norm(x, f"{name}.norm_mixer"), name)
            x = x + w.mlp(w.norm(x, f"{name}.norm_mlp"), f"{name}.mlp")
        return x

    @classmethod
    def model(cls, name: str = "base", *, params: Mapping[str, Any] | None = None, **host: Any) -> UNet:
        """The paper's segmenter of 14 classes: "base" (44.7 million parameters).

        params: of every pair of blocks, in place of the defaults. host: of the `UNet`, in place of the paper's: size of
        the volume (default (64, 128, 128)), stages, whose depth counts pairs, in_channels (1), out_channels (14).
        """
        known("name", name, ("base",))
        stages = [Stage(96 << s, pairs, 3 << s, stride=2 if s else (2, 4, 4)) for s, pairs in enumerate((1, 1, 3, 1))]

        def enter(dim_in: int, dim_out: int, stride: Stride, stage: int) -> nn.Module:
            if stage:
                return Merge(dim_in, dim_out)
            return Reduce(dim_in, dim_out, stride, rank=3, after=nn.LayerNorm(dim_out))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **{"position": index == 0, **(params or {})})

        paper = {"size": (64, 128, 128), "stages": stages, "block": block, "enter": enter, "leave": Leave}
        model = UNet(**{**paper, "in_channels": 1, "out_channels": 14, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(3, 5, 4)), 60, {"unit": (2, 3, 2), "mlp_ratio": 2}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 2, 3)), 24, {"unit": (2, 2, 1), "position": False}, batch=1),
            Case(Dims(1, 5, grid=(2, 3, 5)), 30, {"unit": (1, 4, 2), "mlp_ratio": 1}, batch=1),
        ]

    @claim("The model has as many parameters as the authors' code with one of its three outputs, 44.65 million.")
    def published_size(cls) -> Finding:
        size = num_parameters(cls.model) / 1e6
        return Finding(abs(size / 44.65 - 1) < 0.02, f"{size:.2f} million")

    @claim("Global scope is local scope of permuted positions.")
    def permuted(cls) -> Finding:
        module = cls(Dims(2, 4, grid=(4, 6, 10)), unit=(2, 3, 5)).double()
        order = torch.arange(240).view(2, 2, 3, 2, 5, 2).permute(1, 0, 3, 2, 5, 4).flatten()  # by residue, axis by axis
        module.local.load_state_dict(module.spread.state_dict())
        x = torch.randn(1, 240, 8, dtype=torch.float64)
        with torch.no_grad():
            same = torch.equal(module.spread.mixer(x)[:, order], module.local.mixer(x[:, order]))
        return Finding(same, f"the same bit for bit on 4 x 6 x 10 with units of 2 x 3 x 5: {same}")

    @claim("A pair reaches every position exactly when t^2 >= T, y^2 >= Y and x^2 >= X, where units divide the map.")
    def reach(cls) -> Finding:
        seen, grid = {}, (4, 9, 9)
        for unit in ((2, 3, 3), (1, 3, 3), (2, 1, 9), (4, 9, 3)):
            module = cls(Dims(2, 4, grid=grid), unit=unit, position=False).double()
            x = torch.randn(1, 324, 8, dtype=torch.float64)
            seen[unit] = int(reached(module, x, (0, 0, 0)).sum())
        whole = {unit: all(s * s >= n for s, n in zip(unit, grid, strict=True)) for unit in seen}
        holds = all((count == 324) == whole[unit] for unit, count in seen.items())
        figure = "; ".join(f"{'x'.join(map(str, unit))}: {count}" for unit, count in seen.items())
        return Finding(holds, f"of 324 positions, by unit: {figure}")

    @claim("A unit that spans the volume costs what a local one does: 4 N t y x C operations, linear in N.")
    def linear(cls) -> Finding:
        found = []
        for grid in ((4, 6, 6), (4, 12, 6), (8, 12, 6)):
            module, n = cls(Dims(2, 4, grid=grid), unit=(2, 3, 3)), torch.Size(grid).numel()
            for block in (module.local, module.spread):
                products = work(functools.partial(block.mixer, torch.randn(1, n, 8))).fused
                found.append(products / (n * 18 * 8))
        figure = f"{found[0]:g} N t y x C locally, {found[1]:g} globally; {found[5]:g} at 4 N"
        return Finding(found == [4.0] * 6, figure)
