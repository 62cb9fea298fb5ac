"""Means of tokens over boxes of their grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from saccade.errors import positive
from saccade.mix.tokens import check_tokens, to_map, to_tokens

ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.adaptive_avg_pool1d,
    2: nn.functional.adaptive_avg_pool2d,
    3: nn.functional.adaptive_avg_pool3d,
}


def pool_tokens(x: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Adaptive mean pooling: a grid of any size to a grid of `size`.

        y[b, cell, c] = mean of x[b, token, c] over the tokens with, on each axis of L tokens and S cells,
        floor(s L / S) <= coordinate < ceil((s + 1) L / S)

    x (B, N, C) of a row-major grid of one to three axes -> (B, S, C), S the product of size, row-major. Cells overlap
    where L is no multiple of S, and repeat where S > L. Costs N C where they do not.
    Errors: ValueError when the grid has not N tokens, or size has another rank than grid.

    >>> pool_tokens(torch.arange(5.0).view(1, 5, 1), (5,), (2,)).flatten().tolist()
    [1.0, 3.0]
    """
    grid = check_tokens(x, grid)
    size = tuple(positive("size", cells) for cells in size)
    if len(size) != len(grid):
        raise ValueError(f"size: got {size} for the grid {grid}; pass one number of cells an axis")
    return to_tokens(ADAPTIVE[len(grid)](to_map(x, grid), size))


def pool_axis(x: Tensor, grid: Sequence[int], axis: int) -> Tensor:
    """The mean profile along one axis: all the others are averaged away.

        y[b, s, c] = mean of x[b, token, c] over the tokens whose coordinate on `axis` is s

    x (B, N, C), grid of one to three axes -> (B, grid[axis], C). Costs N C.
    Errors: ValueError when the grid has not N tokens, or no such axis.

    >>> pool_axis(torch.arange(6.0).view(1, 6, 1), (2, 3), 0).flatten().tolist()
    [1.0, 4.0]
    """
    grid = check_tokens(x, grid)
    if not -len(grid) <= axis < len(grid):
        raise ValueError(f"axis: got {axis} for the grid {grid}; pass one from {-len(grid)} to {len(grid) - 1}")
    others = [1 + i for i in range(len(grid)) if i != axis % len(grid)]
    return x.unflatten(1, grid).mean(others) if others else x
