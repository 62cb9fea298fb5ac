"""Token orders that make a pattern's tiles dense.

A block of consecutive tokens of a row-major grid is a thin strip: its neighbours' windows cover many tiles, each a
little. Sorted tile by tile, so that a block is a compact patch, the same pattern covers few tiles, almost wholly. The
same holds for residues: a dilated or strided pattern never leaves its residue class, so the classes are laid one after
the other. Coordinates travel with the tokens, so the boxes need not know.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.where.pattern import Box


@dataclass(frozen=True)
class Cells:
    """Tokens of a row-major grid, one class of residues modulo `dilation` after the other, each cut into cells.

    A sequence is a grid of one axis.
    """

    grid: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the longest class along each axis."""
        return tuple(-(-length // d) for length, d in zip(self.grid, self.dilation, strict=True))

    def cell(self, block: int) -> tuple[int, ...]:
        """Lengths of the cells for tiles of `block` tokens."""
        return tile_shape(block, self.lengths)

    def whole(self, block: int) -> bool:
        """Every tile of `block` consecutive tokens is one cell."""
        even = all(length % d == 0 for length, d in zip(self.grid, self.dilation, strict=True))
        return even and all(length % size == 0 for length, size in zip(self.lengths, self.cell(block), strict=True))

    def axes(self, block: int) -> list[tuple[int, int, int, int]]:
        """Of each axis: its length, its dilation, the length of its cells, and how many the longest class has."""
        sizes = self.cell(block)
        cells = [-(-length // size) for length, size in zip(self.lengths, sizes, strict=True)]
        return list(zip(self.grid, self.dilation, sizes, cells, strict=True))

    def count(self, block: int) -> int:
        """Numbers that `codes` are below; as many as tokens, or more where classes or cells differ in length."""
        return math.prod(d * size * cells for _, d, size, cells in self.axes(block))

    def codes(self, position: Tensor, block: int) -> Tensor:
        """Distinct numbers that ascend in this order."""
        axes, coordinates = self.axes(block), []
        for length, *_ in reversed(axes[1:]):
            coordinates.append(position % length)
            position = position // length
        coordinates = [position, *reversed(coordinates)]
        code = torch.zeros_like(position)
        for c, (_, d, _, _) in zip(coordinates, axes, strict=True):
            code = code if d == 1 else torch.add(c % d, code, alpha=d)
        steps = [c if d == 1 else c // d for c, (_, d, _, _) in zip(coordinates, axes, strict=True)]
        for step, (_, _, size, cells) in zip(steps, axes, strict=True):
            code = torch.add(step // size, code, alpha=cells)
        for step, (_, _, size, _) in zip(steps, axes, strict=True):
            code = torch.add(step % size, code, alpha=size)
        return code


def best_order(unions: Sequence[list[Box]], num_keys: int) -> Cells | None:
    """The order for tokens of these unions of boxes; None when the given one is best.

    An axis may sort the tokens only when every box of every union constrains it: an order that helps one box of a union
    would scatter the tiles of another.
    """
    shared = set.intersection(*(set(box) for union in unions for box in union))
    named = [key for key in shared if isinstance(key, tuple)]
    grids = {(key[1], key[2], key[5]) for key in named if key[0] == "grid" and key[4] == "step"}
    if len(grids) == 1:
        ((grid, dilation, _),) = grids
        return None if len(grid) == 1 and dilation == (1,) else Cells(grid, dilation)
    moduli = [key[1] for key in named if key[0] == "residue" and key[1] > 1]
    return Cells((num_keys,), (moduli[0],)) if len(moduli) == 1 else None


def permutation(order: Cells, position: Tensor, block: int) -> Tensor:
    """The tokens at `position` (L,), int64, in their order, for tiles of `block`: int64 (L,)."""
    count, place = order.count(block), order.codes(position, block)
    token = torch.arange(len(place), device=place.device)
    if count > len(place):  # some numbers belong to no token: a token comes after those below its own
        taken = torch.zeros(count, dtype=torch.int32, device=place.device).scatter_(0, place, 1)
        place = taken.cumsum(0)[place] - 1
    return torch.empty_like(token).scatter_(0, place, token)


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
