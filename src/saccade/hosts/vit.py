"""The isotropic vision model: patches of an image, positions, blocks on one grid. With `AdaptiveBlock` it is a DiT."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Dims
from saccade.errors import positive
from saccade.hosts.pyramid import BlockFactory, HeadFactory, check_image, check_size, norm_then_pool
from saccade.hosts.resize import Expand, Reduce, as_map, as_tokens, coarser


class LearnedPositions(nn.Module):
    """x + P: a learned vector for every token, (N, C)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(torch.Size(dims.grid or ()).numel(), dims.dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class WavePositions(nn.Module):
    """x + P, fixed: sines and cosines of every coordinate, an equal share of the channels an axis, zeros in the rest.

        P[p, a, :] = [sin(p_a w_i), cos(p_a w_i)],   w_i = 10000^(-i / F),   i < F = C // (2 axes)

    Axes stand in the order of the grid.
    """

    table: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        grid = dims.grid or ()
        half = dims.dim // (2 * len(grid))
        rates = 10000 ** (-torch.arange(half, dtype=torch.float64) / max(1, half))
        places = torch.tensor(list(itertools.product(*map(range, grid))), dtype=torch.float64)  # (N, axes)
        angles = places[:, :, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
        table = nn.functional.pad(waves, (0, dims.dim - waves.shape[1])).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class First(nn.Module):
    """The first token: (B, N, C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def norm_then_first(dims: Dims, num_classes: int) -> nn.Module:
    """Linear(LN(x)[0]): tokens (B, N, C) -> (B, num_classes), read off the class token."""
    return nn.Sequential(nn.LayerNorm(dims.dim), First(), nn.Linear(dims.dim, num_classes))


def classify(dims: Dims, num_classes: int) -> nn.Module:
    """`norm_then_pool` of tokens on a grid; `norm_then_first` where there is none, since a class token is in front."""
    return (norm_then_first if dims.grid is None else norm_then_pool)(dims, num_classes)


class ToImage(nn.Module):
    """Tokens as an image: every token writes its patch, y = Expand(LN(x)); (B, N, C) -> (B, channels, *size)."""

    def __init__(self, dims: Dims, channels: int, patch: int, size: Sequence[int]) -> None:
        super().__init__()
        self.grid, self.size = dims.grid or (), tuple(size)
        self.expand = Expand(dims.dim, channels, patch, rank=len(self.size), norm=nn.LayerNorm(dims.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(as_map(x, self.grid), self.size)


class ViT(nn.Module):
    """Blocks on the patches of an image.

        x = positions(Conv(image)),  with a class token t: x = [t; x]
        x <- block_i(x)  for i = 0, 1, ...;   y = head(x)

    image (B, in_channels, *size) -> what the head makes of tokens (B, N, C), (B, num_classes) by default. The grid of
    the tokens, row-major, is ceil(size / patch) on each axis.

    size: of the image, (X,), (Y, X) or (T, Y, X). patch: pixels a side of a patch. dim, depth, heads: C, blocks, H.
    block: (dims, stage, index) -> a whole block, (B, N, C) -> (B, N, C), as for a `Pyramid`, with stage 0. positions:
    dims -> a module on tokens (default `LearnedPositions`; `WavePositions`; None: none). class_token: put a learned
    token in front (False); dims then has no grid, since N tokens are a grid no more. head: (dims, num_classes) -> a
    module on the tokens (default `classify`; `ToImage` gives images; None: the model gives the tokens). in_channels: 3.
    num_classes: 1000. Keywords of a call go to every block. Errors: ValueError when an image has another size, or dim
    is no multiple of heads.

    >>> model = ViT((45, 32), 8, 16, 2, 4, lambda dims, stage, index: nn.Linear(16, 16), num_classes=10)
    >>> model(torch.ones(1, 3, 45, 32)).shape, model.tokens(torch.ones(1, 3, 45, 32)).shape
    (torch.Size([1, 10]), torch.Size([1, 24, 16]))
    """

    def __init__(
        self,
        size: Sequence[int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        block: BlockFactory,
        *,
        positions: Callable[[Dims], nn.Module] | None = LearnedPositions,
        class_token: bool = False,
        head: HeadFactory | None = classify,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.size, self.in_channels = check_size(size), positive("in_channels", in_channels)
        if positive("dim", dim) % positive("heads", heads):
            raise ValueError(f"heads: got {heads} for dim {dim}; pass a divisor of dim")
        on_grid = Dims(heads, dim // heads, grid=coarser(self.size, positive("patch", patch)))
        dims = self.dims = Dims(heads, dim // heads) if class_token else on_grid
        self.patches = Reduce(in_channels, dim, patch, rank=len(self.size))
        self.positions = nn.Identity() if positions is None else positions(on_grid)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if class_token else None
        self.blocks = nn.ModuleList(block(dims, 0, index) for index in range(positive("depth", depth, least=0)))
        self.head = nn.Identity() if head is None else head(dims, positive("num_classes", num_classes))

    def tokens(self, x: Tensor, **options: Any) -> Tensor:
        """The tokens that the last block leaves, (B, N, C), the class token first."""
        check_image(x, self.in_channels, self.size)
        x = self.positions(as_tokens(self.patches(x)))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, **options)
        return x

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.head(self.tokens(x, **options))
