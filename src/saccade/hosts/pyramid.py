"""The hierarchical vision model that most spatial mechanisms are published in: stages of blocks on coarser and coarser
grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Dims
from saccade.errors import per_axis, positive
from saccade.hosts.block import TokenNorm
from saccade.hosts.resize import Reduce, Stride, as_map, as_tokens, coarser

BlockFactory = Callable[[Dims, int, int], nn.Module]
EnterFactory = Callable[[int, int, Any, int], nn.Module]
HeadFactory = Callable[[Dims, int], nn.Module]


@dataclass(frozen=True)
class Stage:
    """One stage: `depth` blocks of `dim` channels in `heads` heads, on a grid `stride` times coarser than the last.

    stride: one number, or one an axis; it is told to `enter` as it stands here.
    """

    dim: int
    depth: int
    heads: int
    stride: Stride = 2

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("depth", 0), ("heads", 1)):
            positive(name, getattr(self, name), least=least)
        per_axis("stride", self.stride, 1 if isinstance(self.stride, int) else len(self.stride))
        if self.dim % self.heads:
            raise ValueError(f"heads: got {self.heads} for dim {self.dim}; pass a divisor of dim")


class Mean(nn.Module):
    """The mean of tokens: (B, N, C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def norm_then_pool(dims: Dims, num_classes: int) -> nn.Module:
    """Linear(mean(LN(x))): tokens (B, N, C) -> (B, num_classes)."""
    return nn.Sequential(nn.LayerNorm(dims.dim), Mean(), nn.Linear(dims.dim, num_classes))


def pool_then_norm(dims: Dims, num_classes: int) -> nn.Module:
    """Linear(LN(mean(x))): tokens (B, N, C) -> (B, num_classes)."""
    return nn.Sequential(Mean(), nn.LayerNorm(dims.dim), nn.Linear(dims.dim, num_classes))


def widen_then_pool(width: int) -> HeadFactory:
    """Linear(mean(silu(BN(W x)))) through `width` channels: a head that takes tokens (B, N, C) to (B, num_classes)."""

    def head(dims: Dims, num_classes: int) -> nn.Module:
        wide = [nn.Linear(dims.dim, width), TokenNorm(width), nn.SiLU()]
        return nn.Sequential(*wide, Mean(), nn.Linear(width, num_classes))

    return head


def conv_enter(dim_in: int, dim_out: int, stride: Any, stage: int) -> nn.Module:
    """3 x 3 convolutions with batch norms: four of them, gelu between, to a quarter of an image's sides, then one to
    half the sides before each further stage. A map (B, dim_in, Y, X) -> (B, dim_out, *coarser grid).

    stride: 4 before the first stage, 2 before others. Errors: ValueError for another.
    """
    if stride != (2 if stage else 4):
        raise ValueError(f"stride: got {stride} for stage {stage}; pass 4 for the first stage and 2 for the others")
    half, layers = dim_out // 2, list[nn.Module]()
    stem = ((dim_in, half, 2), (half, half, 1), (half, half, 1), (half, dim_out, 2))
    for into, out, step in ((dim_in, dim_out, 2),) if stage else stem:
        layers += [Reduce(into, out, step, kernel=3), nn.BatchNorm2d(out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Level(nn.Module):
    """A map (B, C', *finer grid) through `enter`, then its tokens through `blocks`: a map (B, C, *dims.grid)."""

    def __init__(self, dims: Dims, enter: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.dims, self.enter, self.blocks = dims, enter, nn.ModuleList(blocks)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.enter(x)
        want = (self.dims.dim, *(self.dims.grid or ()))
        if tuple(x.shape[1:]) != want:
            got = f"{type(self.enter).__name__} gave a map of shape {tuple(x.shape)}"
            raise ValueError(f"enter: {got}, the stage needs (B, {', '.join(map(str, want))})")
        if not self.blocks:
            return x
        x = as_tokens(x)
        for block in self.blocks:
            x = block(x, **options)
        return as_map(x, want[1:])


class Pyramid(nn.Module):
    """A pyramid of stages, and a classifier on the last.

        x_0 = image,   x_s = block_{s, depth - 1}( ... block_{s, 0}(enter_s(x_{s - 1})))   for s = 1, 2, ...
        logits = head(x_last)

    image (B, in_channels, *size) -> (B, num_classes). x_s: a map (B, dim_s, *grid_s), whose row-major tokens (B, N, C)
    the blocks mix; grid_s = ceil(grid_{s - 1} / stride_s) on each axis, whatever the size. The first stage enters from
    the image: its `enter` is what papers call the stem.

    size: of the image, (X,), (Y, X) or (T, Y, X). stages: `Stage(dim, depth, heads, stride)`, the first with the stride
    of the stem. block: (dims, stage, index) -> a whole block, residuals included, (B, N, C) -> (B, N, C); stage and
    index count from 0, dims carries the grid. enter: (dim_in, dim_out, stride, stage) -> a module from map to map
    (default: `Reduce` by patches, LN after those of the image and before the others). head: (dims, num_classes) -> a
    module on the tokens of the last stage (default `norm_then_pool`; None: the model gives these tokens).
    in_channels: 3. num_classes: 1000. Keywords of a call go to every block. Attribute dims: the `Dims` of each stage.
    For another size, build it again with that and load the weights; where parameters do not hang on the grid, they fit.
    Errors: ValueError when an image has another size, or an `enter` gives another grid than the stage needs.

    >>> stages = [Stage(8, 1, 2, stride=4), Stage(16, 2, 4)]
    >>> model = Pyramid((45, 32), stages, lambda dims, stage, index: nn.Linear(dims.dim, dims.dim), num_classes=10)
    >>> x = torch.ones(1, 3, 45, 32)
    >>> model(x).shape, [tuple(y.shape) for y in model.features(x)]
    (torch.Size([1, 10]), [(1, 8, 12, 8), (1, 16, 6, 4)])
    """

    def __init__(
        self,
        size: Sequence[int],
        stages: Sequence[Stage],
        block: BlockFactory,
        *,
        enter: EnterFactory | None = None,
        head: HeadFactory | None = norm_then_pool,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        grid = self.size = check_size(size)
        if not stages:
            raise ValueError("stages: got none; pass at least one Stage")
        self.in_channels = channels = positive("in_channels", in_channels)
        levels, self.dims = [], list[Dims]()
        for index, stage in enumerate(stages):
            grid = coarser(grid, stage.stride)
            dims = Dims(stage.heads, stage.dim // stage.heads, grid=grid)
            into = (enter or self.patches)(channels, stage.dim, stage.stride, index)
            self.dims.append(dims)
            levels.append(Level(dims, into, [block(dims, index, depth) for depth in range(stage.depth)]))
            channels = stage.dim
        self.levels = nn.ModuleList(levels)
        self.head = nn.Identity() if head is None else head(dims, positive("num_classes", num_classes))

    def patches(self, dim_in: int, dim_out: int, stride: Stride, stage: int) -> Reduce:
        """The default way into a stage."""
        before, after = (nn.LayerNorm(dim_in), None) if stage else (None, nn.LayerNorm(dim_out))
        return Reduce(dim_in, dim_out, stride, rank=len(self.size), before=before, after=after)

    def features(self, x: Tensor, **options: Any) -> list[Tensor]:
        """The map that each stage leaves, (B, dim_s, *grid_s)."""
        check_image(x, self.in_channels, self.size)
        found = []
        for level in self.levels:
            x = level(x, **options)
            found.append(x)
        return found

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.head(as_tokens(self.features(x, **options)[-1]))


def check_size(size: Sequence[int]) -> tuple[int, ...]:
    """Return `size` as a tuple of one to three numbers."""
    size = tuple(positive("size", n) for n in size)
    if not 1 <= len(size) <= 3:
        raise ValueError(f"size: got {size}; pass (X,), (Y, X) or (T, Y, X)")
    return size


def check_image(x: Tensor, channels: int, size: Sequence[int]) -> None:
    """Raise unless x is (B, channels, *size)."""
    want = (channels, *size)
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) != want:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"x: got {got}; this model was built for (B, {', '.join(map(str, want))}): "
            "build it for this size, and load_state_dict takes the weights along"
        )
