"""Token orders that make a pattern's tiles dense.

A block of consecutive tokens of a row-major grid is a thin strip: its neighbours' windows cover many tiles, each a
little. Sorted tile by tile, so that a block is a compact patch, the same pattern covers few tiles, almost wholly. The
same holds for residues: a dilated or strided pattern never leaves its residue class, so the classes are laid one after
the other; so are the windows of a partition, the stripes of keys that every query sees, tokens of one label.
Coordinates travel with the tokens, so the boxes need not know.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saccade.where.pattern import Box, Pattern


@dataclass(frozen=True)
class Cells:
    """Tokens of a row-major grid, one class of residues modulo `dilation` after the other, each cut into cells.

    A sequence is a grid of one axis. sides: lengths of the cells (default: such that a tile is one). shift: tokens that
    the first cell lacks, per axis (default none). keys_only: the queries stay as they are.
    """

    grid: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...] = ()
    shift: tuple[int, ...] = ()
    keys_only: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the longest class along each axis."""
        return tuple(-(-length // d) for length, d in zip(self.grid, self.dilation, strict=True))

    def cell(self, block: int) -> tuple[int, ...]:
        """Lengths of the cells for tiles of `block` tokens."""
        return self.sides or tile_shape(block, self.lengths)

    def whole(self, block: int) -> bool:
        """Every tile of `block` consecutive tokens is one cell."""
        even = all(length % d == 0 for length, d in zip(self.grid, self.dilation, strict=True))
        even = even and not any(self.shift) and math.prod(self.cell(block)) == block
        return even and all(length % size == 0 for length, size in zip(self.lengths, self.cell(block), strict=True))

    def axes(self, block: int) -> list[tuple[int, int, int, int, int]]:
        """Of each axis: its length, dilation, length of its cells, how many the longest class has, and its shift."""
        sizes, shifts = self.cell(block), self.shift or (0,) * len(self.grid)
        cells = [-(-(n + shift) // size) for n, size, shift in zip(self.lengths, sizes, shifts, strict=True)]
        return list(zip(self.grid, self.dilation, sizes, cells, shifts, strict=True))

    def count(self, block: int) -> int:
        """Numbers that `codes` are below; as many as tokens, or more where classes or cells differ in length."""
        return math.prod(d * size * cells for _, d, size, cells, _ in self.axes(block))

    def codes(self, position: Tensor, block: int) -> Tensor:
        """Distinct numbers that ascend in this order."""
        axes, coordinates = self.axes(block), []
        for length, *_ in reversed(axes[1:]):
            coordinates.append(position % length)
            position = position // length
        coordinates = [position, *reversed(coordinates)]
        code = torch.zeros_like(position)
        for c, (_, d, *_) in zip(coordinates, axes, strict=True):
            code = code if d == 1 else torch.add(c % d, code, alpha=d)
        steps = [(c if d == 1 else c // d) + shift for c, (_, d, _, _, shift) in zip(coordinates, axes, strict=True)]
        for step, (_, _, size, cells, _) in zip(steps, axes, strict=True):
            code = torch.add(step // size, code, alpha=cells)
        for step, (_, _, size, *_) in zip(steps, axes, strict=True):
            code = torch.add(step % size, code, alpha=size)
        return code


@dataclass(frozen=True)
class ByLabel:
    """Tokens in the order of their labels, those of one label as they stand; both tables are int32 (`Labels`).

    keys: of the keys. queries: of the queries, which are the last of them.
    """

    keys: bytes
    queries: bytes

    def permutation(self, side: str, count: int) -> Tensor:
        """The last `count` tokens of a side, numbered from 0, in their order: int64 (count,), on the CPU."""
        labels = torch.frombuffer(bytearray(getattr(self, side)), dtype=torch.int32)
        return torch.argsort(labels[-count:], stable=True)


Order = Cells | ByLabel


def classes_of(order: Order | None, num_keys: int) -> int:
    """How many classes of residues an order lays one after the other, for a sequence; 1 if it is none of these."""
    is_classes = isinstance(order, Cells) and order == Cells((num_keys,), order.dilation)
    return order.dilation[0] if is_classes else 1  # type: ignore[union-attr]


def straddling(d: int, count: int, num_keys: int, size: int) -> int:
    """Tiles of `size` that hold tokens of several classes modulo d, laid out one after the other: the last `count`."""
    first = num_keys - count
    before = torch.tensor([(num_keys - c + d - 1) // d - (first - c + d - 1) // d for c in range(min(d, num_keys))])
    ends = before.cumsum(0)[:-1]
    return len(torch.unique(ends[(ends % size > 0) & (ends < count)] // size))


def best_order(
    patterns: Sequence[Pattern], unions: Sequence[list[Box]], n: int, m: int, block: tuple[int, int]
) -> tuple[Order | None, int]:
    """The order of tokens for these patterns, whose boxes are `unions`, None for the given one; and `most_tiles` in it.

    An axis that every box of every union constrains sorts the tokens. Another order that a pattern suggests helps some
    boxes and scatters the tiles of others: it is taken when there is room for fewer tiles in it, a quarter fewer than
    in the given order, which costs no copy.
    """

    def most(order: Order | None) -> int:
        return sum(pattern.most_tiles(n, m, block, order) for pattern in patterns)

    best: Order | None = _shared(unions, m)
    least = most(best)
    bound = least if best is not None else 3 * least / 4
    for order in dict.fromkeys(order for pattern in patterns for order in pattern.orders(m)):
        if (tiles := most(order)) < bound:
            best, least, bound = order, tiles, tiles
    return best, least


def _shared(unions: Sequence[list[Box]], num_keys: int) -> Cells | None:
    """The order of an axis that every box of every union constrains."""
    names = [set(box) for union in unions for box in union]
    named = [key for key in set.intersection(*names) if isinstance(key, tuple)] if names else []
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
