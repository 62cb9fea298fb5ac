"""Biases of the scores as functions of positions, so that no N x M tensor is ever asked for.

A bias is called with query positions (n,) and key positions (m,), int64, and answers (H or 1, n, m). Queries are the
last N of M positions. Modules may have parameters; they receive gradients through `attend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saccade.errors import positive


def axes_of(position: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Coordinates of row-major positions on a grid, one tensor an axis."""
    found = []
    for size in reversed(grid):
        found.append(position % size)
        position = position // size
    return found[::-1]


class RelativeTable(nn.Module):
    """A learned bias per head and difference of position (arXiv 1803.02155; on grids as in Swin, arXiv 2103.14030,
    section 3.2).

        b_h(i, j) = table[h, c_0(i) - c_0(j) + e_0 - 1, c_1(i) - c_1(j) + e_1 - 1, ...]

    num_heads: H. extents: e_a, the differences |d| < e_a that have an entry of their own, one number an axis; larger
    ones share the outermost. grid: (T, Y, X), (Y, X) or (X,) of the tokens (default None: a sequence, one axis). step:
    coordinates c are counted in steps of so many tokens, rounded down, as a dilated window does (1). The table starts
    at zero.

    >>> RelativeTable(2, (3, 3), grid=(4, 5)).table.shape
    torch.Size([2, 5, 5])
    """

    def __init__(
        self, num_heads: int, extents: Sequence[int], grid: Sequence[int] | None = None, *, step: int = 1
    ) -> None:
        super().__init__()
        self.step = positive("step", step)
        self.extents = tuple(positive("extents", size) for size in extents)
        self.grid = None if grid is None else tuple(positive("grid", size) for size in grid)
        if len(self.extents) != (1 if self.grid is None else len(self.grid)):
            raise ValueError(f"extents: got {self.extents} for the grid {self.grid}; pass one number an axis")
        self.table = nn.Parameter(torch.zeros(positive("num_heads", num_heads), *(2 * e - 1 for e in self.extents)))

    def coordinates(self, position: Tensor) -> list[Tensor]:
        """c of row-major positions, one tensor an axis."""
        axes = [position] if self.grid is None else axes_of(position, self.grid)
        return axes if self.step == 1 else [c // self.step for c in axes]

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        queries, keys = self.coordinates(q_pos), self.coordinates(k_pos)
        at = torch.zeros(len(q_pos), len(k_pos), dtype=torch.int64, device=q_pos.device)
        for a, b, extent in zip(queries, keys, self.extents, strict=True):
            apart = (a[:, None] - b[None, :]).clamp(1 - extent, extent - 1)
            at = at * (2 * extent - 1) + apart + extent - 1
        return self.table.flatten(1)[:, at]

    def extra_repr(self) -> str:
        return f"num_heads={len(self.table)}, extents={self.extents}, grid={self.grid}, step={self.step}"


class Alibi(nn.Module):
    """b_h(i, j) = -slope_h |i - j|, slope_h = 2^(-8 h / H) for h = 1 .. H (arXiv 2108.12409, section 3).

    num_heads: H. For an H that is no power of two the paper's code interleaves two series; here the one formula serves
    every H."""

    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        heads = torch.arange(1, positive("num_heads", num_heads) + 1)
        self.register_buffer("slopes", 2.0 ** (-8 * heads / num_heads), persistent=False)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        apart = (q_pos[:, None] - k_pos[None, :]).abs()
        return -self.slopes[:, None, None] * apart


class FromCoordinates(nn.Module):
    """b(i, j) = function(x_i - x_j): a bias that a function of coordinates gives, a small network for instance (arXiv
    2111.09883, 3.3).

    function: differences (n, m, A) -> (n, m, H) or (n, m, 1). coordinates: (M, A) float, of the keys; queries are the
    last of them."""

    coordinates: Tensor

    def __init__(self, function: Callable[[Tensor], Tensor], coordinates: Tensor) -> None:
        super().__init__()
        if coordinates.ndim != 2 or not coordinates.is_floating_point():
            got = f"{coordinates.dtype} of shape {tuple(coordinates.shape)}"
            raise ValueError(f"coordinates: got {got}; pass floating-point (tokens, axes)")
        self.function = function
        self.register_buffer("coordinates", coordinates)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        apart = self.coordinates[q_pos][:, None] - self.coordinates[k_pos][None, :]
        return self.function(apart).movedim(-1, 0)
