"""Tokens (B, N, C) of a row-major grid, and the channels-first map (B, C, *grid) that torch's convolutions read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.errors import positive


def check_tokens(x: Tensor, grid: Sequence[int]) -> tuple[int, ...]:
    """Return `grid` as a tuple of one to three sizes whose product is the number of tokens of x (B, N, C)."""
    grid = tuple(positive("grid", size) for size in grid)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: got {grid}; pass (X,), (Y, X) or (T, Y, X)")
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}; pass tokens (B, N, C)")
    if x.shape[-2] != torch.Size(grid).numel():
        raise ValueError(
            f"x: got N = {x.shape[-2]}, but the grid {grid} has {torch.Size(grid).numel()} tokens; pass the grid of x"
        )
    return grid


def to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens as a map.

        map[b, c, t, y, x] = tokens[b, (t * Y + y) * X + x, c]

    x (B, N, C), N = the product of grid -> (B, C, *grid), a view with channels last in memory. Costs nothing.
    Errors: ValueError when the grid has not N tokens, or not one to three axes.

    >>> to_map(torch.arange(12.0).view(1, 6, 2), (2, 3))[0, 0].tolist()
    [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    """
    grid = check_tokens(x, grid)
    return x.unflatten(1, grid).movedim(-1, 1)


def to_tokens(x: Tensor) -> Tensor:
    """A map as tokens: the inverse of `to_map`.

    x (B, C, *grid) -> (B, N, C), a view when channels are last in memory, as `to_map` and convolutions leave them.
    Errors: ValueError for fewer than three axes.

    >>> x = torch.randn(2, 6, 5)
    >>> bool((to_tokens(to_map(x, (2, 3))) == x).all())
    True
    """
    if x.ndim < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}; pass a map (B, C, *grid)")
    return x.movedim(1, -1).flatten(1, -2)
