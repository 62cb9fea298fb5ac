"""Token orders that make a pattern's tiles dense.

A block of consecutive tokens of a row-major grid is a thin strip: its neighbours' windows cover many tiles, each a
little. Sorted tile by tile, so that a block is a compact patch, the same pattern covers few tiles, almost wholly. The
same holds for residues: a dilated or strided pattern never leaves its residue class, so the classes are laid one after
the other. Coordinates travel with the tokens, so the boxes need not know.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.where.pattern import Box, Frame


def sort_axes(unions: Sequence[list[Box]], frame: Frame, block: int) -> list[Tensor] | None:
    """Sort keys, most significant first, for tokens at `frame.keys`; None when the given order is best.

    An axis may sort the tokens only when every box of every union constrains it: an order that helps one box of a union
    would scatter the tiles of another. block: tokens a tile holds, which a grid splits over its axes.
    """
    shared = set.intersection(*(set(box) for union in unions for box in union))
    named = [key for key in shared if isinstance(key, tuple)]
    grids = {(key[1], key[2], key[5]) for key in named if key[0] == "grid" and key[4] == "step"}
    if len(grids) == 1:
        ((grid, dilation, _),) = grids
        if len(grid) == 1 and dilation == (1,):
            return None
        steps = [_coordinate(frame, grid, axis) // dilation[axis] for axis in range(len(grid))]
        classes = [_coordinate(frame, grid, axis) % dilation[axis] for axis in range(len(grid)) if dilation[axis] > 1]
        lengths = tuple(-(-length // d) for length, d in zip(grid, dilation, strict=True))
        tile = tile_shape(block, lengths)
        tiles = [c // t for c, t in zip(steps, tile, strict=True)]
        within = [c % t for c, t in zip(steps, tile, strict=True)]
        return classes + tiles + within
    moduli = [key[1] for key in named if key[0] == "residue" and key[1] > 1]
    return [frame.keys % moduli[0], frame.keys] if len(moduli) == 1 else None


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
    """Split `block` tokens over the axes of a grid as evenly as divisors and lengths allow, the last axis longest.

    >>> tile_shape(128, (128, 128))
    (8, 16)
    """
    divisors = [d for d in range(1, block + 1) if block % d == 0]
    shapes = [s for s in itertools.product(divisors, repeat=len(lengths)) if torch.Size(s).numel() == block]

    def badness(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        overhang = sum(max(0, t - length) for t, length in zip(shape, lengths, strict=True))
        return overhang, sum(shape), shape

    return min(shapes, key=badness)
