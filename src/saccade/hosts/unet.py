"""A pyramid down and up again: what enters is an image, what leaves is one of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Dims
from saccade.errors import positive
from saccade.hosts.block import Conditioned
from saccade.hosts.pyramid import BlockFactory, EnterFactory, Pyramid, Stage
from saccade.hosts.resize import Expand, Stride, as_map, as_tokens

LeaveFactory = Callable[[int, int, Any], nn.Module]


class Rise(nn.Module):
    """The way up to one stage: blocks(W [skip; Expand(LN(x))] + w), a map (B, dim_below, *coarser) and the skip."""

    def __init__(self, dims: Dims, below: int, stride: Stride, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grid = dims.grid or ()
        self.expand = Expand(below, dims.dim, stride, rank=len(self.grid), norm=nn.LayerNorm(below))
        self.merge = nn.Linear(2 * dims.dim, dims.dim)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, skip: Tensor, **options: Any) -> Tensor:
        tokens = self.merge(as_tokens(torch.cat([skip, self.expand(x, self.grid)], 1)))
        for block in self.blocks:
            tokens = block(tokens, **options)
        return as_map(tokens, self.grid)


class UNet(nn.Module):
    """An encoder of stages, and a decoder of the same stages with skips between them.

        x_0 = image,   x_s = stage_s(enter_s(x_{s - 1}))   for s = 1 .. S         (see `Pyramid`)
        y_S = x_S,     y_s = stage'_s(W [x_s; Expand_s(LN(y_{s + 1}))])   for s = S - 1 .. 1
        image' = leave(y_1)

    image (B, in_channels, *size) -> (B, out_channels, *size), any size of one to three axes; grids are those of the
    pyramid, and what `Expand` writes beyond them is cut off. The last stage is the bottom and has no twin.

    size, stages, block, enter, in_channels: as those of `Pyramid`; block serves both ways, with the same stage and
    index. leave: (dim_1, out_channels, stride_1) -> a module (map, size) -> (B, out_channels, *size) (default: `Expand`
    with LN before). out_channels: of the result (default in_channels): colours for diffusion, classes for segmentation.
    condition: E, the width of a vector c (B, E) that moves the input of every block (`Conditioned`), handed in with the
    call as `condition=c` (default None: no vector, though blocks may take one of their own: keywords of a call go to
    every block). Errors: ValueError when an image has another size; TypeError when there is no c though it was asked
    for.

    >>> stages = [Stage(8, 1, 2, stride=2), Stage(16, 1, 2)]
    >>> model = UNet((13, 10), stages, lambda dims, stage, index: nn.Linear(dims.dim, dims.dim), condition=6)
    >>> model(torch.ones(2, 3, 13, 10), condition=torch.ones(2, 6)).shape
    torch.Size([2, 3, 13, 10])
    """

    def __init__(
        self,
        size: Sequence[int],
        stages: Sequence[Stage],
        block: BlockFactory,
        *,
        enter: EnterFactory | None = None,
        leave: LeaveFactory | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        condition: int | None = None,
    ) -> None:
        super().__init__()

        def make(dims: Dims, stage: int, index: int) -> nn.Module:
            made = block(dims, stage, index)
            return made if condition is None else Conditioned(made, dims.dim, condition)

        self.encoder = Pyramid(size, stages, make, enter=enter, head=None, in_channels=in_channels)
        rises, below = [], stages[-1]
        for index in reversed(range(len(stages) - 1)):
            stage, dims = stages[index], self.encoder.dims[index]
            blocks = [make(dims, index, depth) for depth in range(stage.depth)]
            rises.append(Rise(dims, below.dim, below.stride, blocks))
            below = stage
        self.rises = nn.ModuleList(rises)
        channels = positive("out_channels", in_channels if out_channels is None else out_channels)
        self.leave = (leave or self.patches)(below.dim, channels, below.stride)

    def patches(self, dim_in: int, dim_out: int, stride: Stride) -> Expand:
        """The default way out."""
        return Expand(dim_in, dim_out, stride, rank=len(self.encoder.size), norm=nn.LayerNorm(dim_in))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        *skips, x = self.encoder.features(x, **options)
        for rise, skip in zip(self.rises, reversed(skips), strict=True):
            x = rise(x, skip, **options)
        return self.leave(x, self.encoder.size)
