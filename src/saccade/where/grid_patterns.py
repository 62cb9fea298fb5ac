"""Patterns on row-major grids: per axis an interval of keys that follows from the query's own coordinate."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.errors import positive
from saccade.where.layout import Cells, Order
from saccade.where.pattern import Box, Frame, Pattern, Span, all_tiles, strip_tiles, touched


def _checked(grid: Any) -> tuple[int, ...]:
    if not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: got {grid!r}; pass one to three lengths, (T, Y, X), (Y, X) or (X,)")
    return tuple(positive("grid", length) for length in grid)


def _per_axis(name: str, value: int | Sequence[int], axes: int, *, least: int | None = 1) -> tuple[int, ...]:
    """One integer an axis, from one for all or one each; least: None allows any."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name}: got {value!r} for a grid of {axes} axes; pass one value, or one an axis")
    if least is not None:
        return tuple(positive(name, item, least=least) for item in values)
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name}: got {item!r} ({type(item).__name__}); pass an integer")
    return values


class OnGrid(Pattern):
    """What patterns on a grid share. Inside each class of coordinates modulo `dilation`, steps c // d are counted."""

    grid: tuple[int, ...]
    dilation: tuple[int, ...]

    def interval(self, axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
        """The first step that queries at coordinates c of `axis` see inside their class, and the first after it."""
        raise NotImplementedError(f"{type(self).__name__}.interval")

    def reach(self, axis: int, count: int) -> int:
        """Steps of an axis that `count` consecutive ones see, at most."""
        raise NotImplementedError(f"{type(self).__name__}.reach")

    def _axes(self, position: Tensor, num_keys: int) -> list[Tensor]:
        total = math.prod(self.grid)
        if num_keys != total:
            raise ValueError(f"grid: {self.grid} has {total} tokens, but there are {num_keys} keys; they must be equal")
        coordinates = []
        for length in reversed(self.grid[1:]):
            coordinates.append(position % length)
            position = position // length
        return [position, *reversed(coordinates)]

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        inside = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)
        for axis, (a, b) in enumerate(zip(self._axes(i, num_keys), self._axes(j, num_keys), strict=True)):
            d = self.dilation[axis]
            start, end = self.interval(axis, a)
            inside &= (a % d == b % d) & (b // d >= start) & (b // d < end)
        return inside

    def boxes(self, frame: Frame) -> list[Box]:
        box: Box = {}
        keys = self._axes(frame.keys, frame.num_keys)
        queries = keys if frame.queries is frame.keys else self._axes(frame.queries, frame.num_keys)
        for axis, (a, b) in enumerate(zip(queries, keys, strict=True)):
            d = self.dilation[axis]
            box[self.axis_key(axis, "step", frame.tag)] = Span(b // d if d > 1 else b, *self.interval(axis, a))
            if d > 1:
                rest = a % d
                box[self.axis_key(axis, "class", frame.tag)] = Span(rest if a is b else b % d, rest, rest + 1)
        return [box]

    def axis_key(self, axis: int, part: str, tag: Hashable) -> Hashable:
        """The name of a grid coordinate: shared by all patterns on this grid with this dilation."""
        return ("grid", self.grid, self.dilation, axis, part, tag)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        one = len(self.grid) == 1 and self.dilation == (1,)
        return () if one else (Cells(self.grid, self.dilation),)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        cells = Cells(self.grid, self.dilation)
        if order is None and self.dilation[0] == 1:
            inner = math.prod(self.grid[1:])
            return strip_tiles(lambda count: self.reach(0, touched(inner, count)) * inner, n, m, block, order)
        if order != cells or n != m or not all(cells.whole(size) for size in block):
            return all_tiles(n, m, block)
        sides = zip(cells.cell(block[0]), cells.cell(block[1]), cells.lengths, strict=True)
        met = (min(length // u, touched(u, self.reach(axis, t))) for axis, (t, u, length) in enumerate(sides))
        return -(-n // block[0]) * math.prod(met)


@dataclass(frozen=True)
class Neighborhood(OnGrid):
    """Neighbourhood attention on a grid of 1-3 axes: the `kernel` nearest positions on each axis, clamped inside.

    On an axis of length L, window w, not causal: start = clamp(leader - w // 2, 0, L - w), keys start .. start + w - 1,
    always w of them; an even window has w // 2 to the left and w // 2 - 1 to the right. Causal: keys
    max(0, leader - w + 1) .. i. With stride s the queries of a group i // s share the window of their leader,
    min(s (i // s) + s // 2, L - 1) (causal: s (i // s) + s - 1). With dilation d the rule holds inside each residue
    class i mod d, with that class's own length.

    grid: (T, Y, X), (Y, X) or (X,), row-major, N = M = the product. kernel, stride, dilation, causal: one value or one
    an axis. Needs kernel * dilation <= length and stride <= kernel on every axis.
    Papers: arXiv 2204.07143 (clamping), 2209.15001 (dilation), 2504.16922 (stride, causal axes).
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def __init__(
        self,
        grid: Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        lengths = _checked(grid)
        object.__setattr__(self, "grid", lengths)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            object.__setattr__(self, name, _per_axis(name, value, len(lengths)))
        flags = tuple(causal) if isinstance(causal, (tuple, list)) else (causal,) * len(lengths)
        if len(flags) != len(lengths) or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"causal: got {causal!r}; pass one bool, or one an axis of the grid {lengths}")
        object.__setattr__(self, "causal", flags)
        for length, w, s, d in zip(self.grid, self.kernel, self.stride, self.dilation, strict=True):
            if w * d > length:
                raise ValueError(
                    f"kernel: got {w} with dilation {d} on an axis of {length}; kernel * dilation must fit, "
                    f"pass at most {length // d}"
                )
            if s > w:
                raise ValueError(
                    f"stride: got {s} with kernel {w}; a stride beyond the kernel would leave queries outside their "
                    f"window, pass at most {w}"
                )

    def interval(self, axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
        w, s, d = self.kernel[axis], self.stride[axis], self.dilation[axis]
        length: int | Tensor = self.grid[axis]
        if d > 1:
            length, c = (self.grid[axis] + d - 1 - c % d) // d, c // d
        group = c if s == 1 else c // s * s
        if self.causal[axis]:
            return ((group + s - 1).clamp(max=length - 1) - w + 1).clamp(min=0), c + 1
        leader = c if s == 1 else (group + s // 2).clamp(max=length - 1)
        start = (leader - w // 2).clamp(min=0).clamp(max=length - w)
        return start, start + w

    def reach(self, axis: int, count: int) -> int:
        w, s = self.kernel[axis], self.stride[axis]
        return w + count - 1 if self.causal[axis] else w + (touched(s, count) - 1) * s


@dataclass(frozen=True)
class GridBlocks(OnGrid):
    """Blocks of a grid of 1-3 axes that see themselves and what is beside them, all cut at the border.

    On each axis, from the start b of the query's block: b - left <= c < b + size + right; blocks start at offset + k
    size, and the first one is cut. Alone, this is a partition into windows; with offset = size // 2 the shifted one,
    without what wraps round; with left and right, blocks in a halo; with size 1, a band on every axis. A negative left
    or right leaves out keys on that side, as in `Band`. With dilation d the rule holds inside each class of coordinates
    modulo d, in steps of d: size L / d with dilation d is the tokens at stride d all over an axis of length L.

    grid: (T, Y, X), (Y, X) or (X,), row-major, N = M = the product. size: tokens a block. left, right: tokens beside it
    (0). offset: in [0, size) (0). dilation: (1). One value or one an axis, each.
    Papers: arXiv 2103.14030 (windows, shifted), 2103.12731 (halos), 2204.01697 (tokens at a stride).

    >>> GridBlocks((6,), 3, offset=1).dense(6)[0].int().tolist()[:2]
    [[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    >>> GridBlocks((6,), 2, left=1, right=1).dense(6)[0].int().tolist()[2]
    [0, 1, 1, 1, 1, 0]
    >>> GridBlocks((6,), 3, dilation=2).dense(6)[0].int().tolist()[2]
    [1, 0, 1, 0, 1, 0]
    """

    grid: tuple[int, ...]
    size: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    offset: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        grid: Sequence[int],
        size: int | Sequence[int],
        left: int | Sequence[int] = 0,
        right: int | Sequence[int] = 0,
        offset: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        lengths = _checked(grid)
        object.__setattr__(self, "grid", lengths)
        given = (("size", size, 1), ("left", left, None), ("right", right, None), ("offset", offset, 0))
        for name, value, least in (*given, ("dilation", dilation, 1)):
            object.__setattr__(self, name, _per_axis(name, value, len(lengths), least=least))
        for b, before, after, at in zip(self.size, self.left, self.right, self.offset, strict=True):
            if at >= b:
                raise ValueError(f"offset: got {at} for size {b}; pass 0 <= offset < size")
            if b + before + after < 1:
                raise ValueError(f"right: got {after} for size {b} and left {before}, which no key meets; pass more")

    @property
    def _shift(self) -> tuple[int, ...]:
        """Tokens that the first block lacks."""
        return tuple(-at % b for at, b in zip(self.offset, self.size, strict=True))

    def interval(self, axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
        b, shift, d = self.size[axis], self._shift[axis], self.dilation[axis]
        step = c if d == 1 else c // d
        start = step if b == 1 else (step + shift) // b * b - shift
        return start - self.left[axis], start + b + self.right[axis]

    def reach(self, axis: int, count: int) -> int:
        return touched(self.size[axis], count) * self.size[axis] + self.left[axis] + self.right[axis]

    @property
    def _apart(self) -> bool:
        """A partition: equal numbers of the block say it all."""
        return not any(self.left) and not any(self.right)

    @property
    def _windows(self) -> Cells:
        """One block after the other."""
        return Cells(self.grid, self.dilation, self.size, self._shift)

    def _number(self, position: Tensor, num_keys: int) -> Tensor:
        """The block of each position, in the order of `_windows`."""
        number, axes = torch.zeros_like(position), self._windows.axes(1)
        coordinates = self._axes(position, num_keys)
        for c, (_, d, *_) in zip(coordinates, axes, strict=True):
            number = number * d + c % d
        for c, (_, d, b, cells, shift) in zip(coordinates, axes, strict=True):
            number = number * cells + (c // d + shift) // b
        return number

    def boxes(self, frame: Frame) -> list[Box]:
        if not self._apart:
            return super().boxes(frame)
        keys, own = (self._number(at, frame.num_keys) for at in (frame.keys, frame.queries))
        return [{("window", self._windows, frame.tag): Span(keys, own, own + 1)}]

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return (self._windows,) if self._apart else super().orders(num_keys)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if not self._apart or (order is None and set(self.dilation) == {1}):
            return super().most_tiles(n, m, block, order)
        if order != self._windows or n != m:
            return all_tiles(n, m, block)
        ends = torch.nn.functional.pad(self._block_lengths().cumsum(0), (1, 0))
        spans = [(ends[1:] + size - 1) // size - ends[:-1] // size for size in block]
        return min(all_tiles(n, m, block), int((spans[0] * spans[1]).sum()))

    def _block_lengths(self) -> Tensor:
        """Tokens of every block, in the order of `_windows`; those that have any."""
        sizes, num_axes = torch.ones((), dtype=torch.int64), len(self.grid)
        for axis, (length, d, b, cells, shift) in enumerate(self._windows.axes(1)):
            c = torch.arange(length)
            own = torch.zeros(d * cells, dtype=torch.int64)
            own.index_add_(0, c % d * cells + (c // d + shift) // b, torch.ones_like(c))
            shape = [1] * (2 * num_axes)
            shape[axis], shape[num_axes + axis] = d, cells
            sizes = sizes * own.view(shape)
        return sizes.flatten()[sizes.flatten() > 0]
