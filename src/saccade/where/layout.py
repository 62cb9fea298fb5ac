"""Token orders that make a pattern's tiles dense.

A block of consecutive tokens of a row-major grid is a thin strip: its neighbours' windows cover many tiles, each a little. Sorted tile by
tile, so that a block is a compact patch, the same pattern covers few tiles, almost wholly. The same holds for residues: a dilated or strided
pattern never leaves its residue class, so the classes are laid one after the other. Coordinates travel with the tokens, so the boxes need
not know.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from saccade.where.pattern import Box, Frame


def sort_axes(unions: Sequence[list[Box]], frame: Frame, block: int) -> list[Tensor] | None:
    """Sort keys, most significant first, for tokens at `frame.keys`; None when the given order is best.

    An axis may sort the tokens only when every box of every union constrains it: an order that helps one box of a union would scatter the
    tiles of another. block: tokens a tile holds, which a grid splits over its axes.
    """
    shared = set.intersection(*(set(box) for union in unions for box in union))
    grids: dict[Hashable, set[int]] = {}
    for key in shared:
        if isinstance(key, tuple) and key[0] == "grid" and key[4] == "step":
            grids.setdefault((key[1], key[2], key[5]), set()).add(key[3])
    spans = unions[0][0]
    if len(grids) == 1:
        (grid, dilation, tag), _ = next(iter(grids.items()))  # type: ignore[misc]
        if len(grid) == 1 and dilation == (1,):
            return None
        steps = [_coordinate(frame, grid, axis) // dilation[axis] for axis in range(len(grid))]
        classes = [_coordinate(frame, grid, axis) % dilation[axis] for axis in range(len(grid)) if dilation[axis] > 1]
        lengths = tuple(-(-length // d) for length, d in zip(grid, dilation, strict=True))
        tile = tile_shape(block, lengths)
        return classes + [c // t for c, t in zip(steps, tile, strict=True)] + [c % t for c, t in zip(steps, tile, strict=True)]
    residues = [key for key in shared if isinstance(key, tuple) and key[0] == "residue" and key[1] > 1]
    if len(residues) == 1 and spans is not None:
        return [frame.keys % residues[0][1], frame.keys]  # type: ignore[operator, index]
    return None


def order(axes: list[Tensor] | None) -> Tensor | None:
    """The permutation (tokens in their new order) that sorts by `axes`, or None."""
    if axes is None:
        return None
    code = torch.zeros_like(axes[0], dtype=torch.int64)
    for axis in axes:
        code = code * (int(axis.max()) + 1) + axis
    return torch.argsort(code, stable=True)


def _coordinate(frame: Frame, grid: tuple[int, ...], axis: int) -> Tensor:
    return frame.keys // torch.Size(grid[axis + 1 :]).numel() % grid[axis]


@functools.cache
def tile_shape(block: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Split `block` tokens over the axes of a grid as evenly as its divisors and the lengths allow, the last axis the longest.

    >>> tile_shape(128, (128, 128))
    (8, 16)
    """
    divisors = [d for d in range(1, block + 1) if block % d == 0]
    shapes = [s for s in itertools.product(divisors, repeat=len(lengths)) if torch.Size(s).numel() == block]

    def badness(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        overhang = sum(max(0, t - length) for t, length in zip(shape, lengths, strict=True))
        return overhang, sum(shape), shape

    return min(shapes, key=badness)
