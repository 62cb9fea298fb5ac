"""The named patterns, each stated twice: `allows` is the definition, `boxes` the intervals that plans are made of.

Positions are absolute: of N queries and M keys, query row r stands at position i = M - N + r. A size counts the query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import check_cu_seqlens, positive
from saccade.where.layout import Cells
from saccade.where.pattern import Box, Frame, Pattern, Span, all_tiles, intersect, sent, strip_tiles


def _position(frame: Frame, lo: Tensor, hi: Tensor) -> list[Box]:
    return [{("position", frame.tag): Span(frame.keys, lo, hi)}]


def _residue(frame: Frame, modulus: int) -> Box:
    rest = frame.queries % modulus
    return {("residue", modulus, frame.tag): Span(frame.keys % modulus, rest, rest + 1)}


def _touched(size: int, count: int) -> int:
    """Stretches of `size` tokens, at most, that `count` consecutive tokens fall into."""
    return (count - 2) // size + 2


def _class_tiles(
    modulus: int, n: int, m: int, block: tuple[int, int], order: Cells | None, width: int | None = None
) -> int:
    """Tiles, at most, of queries that see their own class of residues, or `width` consecutive keys of it."""
    if order != Cells((m,), (modulus,)) or n < modulus:
        return all_tiles(n, m, block)
    (bq, bk), num_rows = block, -(-n // block[0])
    whole = min(-(-m // bk), _touched(bk, _touched(n // modulus, bq) * -(-m // modulus)))
    if width is None:
        return num_rows * whole
    across = min(num_rows, modulus)  # tiles with queries of several classes
    return min(num_rows * whole, num_rows * (_touched(bk, width) + 2) + across * whole)


@dataclass(frozen=True)
class Full(Pattern):
    """Every key: {(i, j)}."""

    @property
    def aligned(self) -> bool:
        return False

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)

    def boxes(self, frame: Frame) -> list[Box]:
        return [{}]


@dataclass(frozen=True)
class Causal(Pattern):
    """The query and what came before it: j <= i."""

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return j <= i

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, torch.zeros_like(frame.queries), frame.queries + 1)

    def looks_back(self, n: int, m: int) -> bool:
        return True

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        if order:
            return all_tiles(n, m, block)
        rows, (bq, bk) = -(-n // block[0]), block
        return min(all_tiles(n, m, block), rows + (rows * (m - n) + bq * rows * (rows + 1) // 2) // bk)


@dataclass(frozen=True)
class Band(Pattern):
    """A band around the diagonal: i - left <= j <= i + right.

    left, right: tokens beside the query on either side, >= 0; with the query itself the band is left + 1 + right wide.
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        positive("left", self.left, least=0)
        positive("right", self.right, least=0)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (j >= i - self.left) & (j <= i + self.right)

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, frame.queries - self.left, frame.queries + self.right + 1)

    def looks_back(self, n: int, m: int) -> bool:
        return self.right == 0

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return strip_tiles(self.left + self.right + block[0], n, m, block, order)


@dataclass(frozen=True)
class Window(Pattern):
    """The trailing window: i - size < j <= i, `size` keys that count the query itself.

    >>> Window(2).dense(3).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
    """

    size: int

    def __post_init__(self) -> None:
        positive("size", self.size)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (j > i - self.size) & (j <= i)

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, frame.queries - (self.size - 1), frame.queries + 1)

    def looks_back(self, n: int, m: int) -> bool:
        return True

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return strip_tiles(self.size + block[0] - 1, n, m, block, order)


@dataclass(frozen=True)
class Prefix(Pattern):
    """The first n keys, whatever the query: j < n. `Causal() | Prefix(n)` is the prefix language model."""

    n: int

    def __post_init__(self) -> None:
        positive("n", self.n)

    @property
    def aligned(self) -> bool:
        return False

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (j < self.n).expand(torch.broadcast_shapes(i.shape, j.shape))

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, torch.zeros_like(frame.queries), torch.full_like(frame.queries, self.n))

    def looks_back(self, n: int, m: int) -> bool:
        return self.n <= m - n + 1

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return all_tiles(n, m if order else min(m, self.n), block)


@dataclass(frozen=True)
class Sinks(Prefix):
    """Attention sinks: the first n keys stay visible to every query: j < n (the set of `Prefix`, by its other name).

    `(Window(w) | Sinks(n)) & Causal()` is the streaming pattern.
    """


@dataclass(frozen=True)
class Blocks(Pattern):
    """Aligned blocks of `size` tokens that see themselves: i // size == j // size."""

    size: int

    def __post_init__(self) -> None:
        positive("size", self.size)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return i // self.size == j // self.size

    def boxes(self, frame: Frame) -> list[Box]:
        start = frame.queries - frame.queries % self.size
        return _position(frame, start, start + self.size)

    def looks_back(self, n: int, m: int) -> bool:
        return self.size == 1 or (n == 1 and m % self.size == 0)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return strip_tiles(self.size * _touched(self.size, block[0]), n, m, block, order)


@dataclass(frozen=True)
class Documents(Pattern):
    """Packed documents that see themselves: tokens between the same two entries of cu_seqlens.

    cu_seqlens: cumulative lengths, 0 first, M last, strictly increasing; a tensor or a sequence of integers.

    >>> Documents([0, 1, 3]).dense(3).int().tolist()
    [[[1, 0, 0], [0, 1, 1], [0, 1, 1]]]
    """

    cu_seqlens: tuple[int, ...]

    def __init__(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        if not isinstance(cu_seqlens, Tensor):
            cu_seqlens = torch.tensor([positive("cu_seqlens", int(c), least=0) for c in cu_seqlens])
        total = int(cu_seqlens[-1]) if cu_seqlens.numel() else 0
        object.__setattr__(self, "cu_seqlens", tuple(check_cu_seqlens(cu_seqlens, total, 1).tolist()))

    # A batch has thousands of them, and patterns are compared and hashed often.
    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.cu_seqlens)

    @functools.cached_property
    def _ends(self) -> Tensor:
        return torch.tensor(self.cu_seqlens)

    def document(self, position: Tensor, num_keys: int) -> Tensor:
        """The number of the document that holds each position."""
        end = self.cu_seqlens[-1]
        if num_keys != end:
            raise ValueError(f"cu_seqlens: ends at {end}, but there are {num_keys} keys; it must end at their number")
        return torch.searchsorted(self.starts(position)[1:], position.contiguous(), right=True)

    def starts(self, like: Tensor) -> Tensor:
        """cu_seqlens as a tensor of the dtype and device of `like`."""
        return sent(self._ends.to(like.dtype), like.device)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return self.document(i, num_keys) == self.document(j, num_keys)

    def boxes(self, frame: Frame) -> list[Box]:
        document, starts = self.document(frame.queries, frame.num_keys), self.starts(frame.queries)
        return _position(frame, starts[document], starts[document + 1])

    def looks_back(self, n: int, m: int) -> bool:
        return n < len(self.cu_seqlens) and self.cu_seqlens[-n] == m - n + 1

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        if order:
            return all_tiles(n, m, block)
        (bq, bk), ends = block, self._ends
        rows = (ends - (m - n)).clamp(min=0)
        num_rows = torch.where(rows[1:] > rows[:-1], (rows[1:] + bq - 1) // bq - rows[:-1] // bq, 0)
        num_cols = (ends[1:] + bk - 1) // bk - ends[:-1] // bk
        return min(all_tiles(n, m, block), int((num_rows * num_cols).sum()))


@dataclass(frozen=True)
class Packed(Pattern):
    """`pattern` inside each of several packed sequences, positions starting anew in each; equals a loop over them.

    >>> from saccade.where import Sinks
    >>> Packed(Sinks(1), Documents([0, 1, 3])).dense(3).int().tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 1, 0]]]
    """

    pattern: Pattern
    documents: Documents

    def at_head(self, head: int, num_heads: int) -> Pattern:
        return Packed(self.pattern.at_head(head, num_heads), self.documents)

    def _local(self, position: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        document = self.documents.document(position, num_keys)
        return document, position - self.documents.starts(position)[document]

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        (doc_i, i), (doc_j, j) = self._local(i, num_keys), self._local(j, num_keys)
        return (doc_i == doc_j) & self.pattern.allows(i, j, num_keys)

    def boxes(self, frame: Frame) -> list[Box]:
        (_, i), (_, j) = self._local(frame.queries, frame.num_keys), self._local(frame.keys, frame.num_keys)
        local = Frame(i, j, frame.num_keys, tag=(frame.tag, self.documents))
        (own,) = self.documents.boxes(frame)
        return [intersect(own, box) for box in self.pattern.boxes(local)]

    def looks_back(self, n: int, m: int) -> bool:
        return self.documents.looks_back(n, m)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return self.documents.most_tiles(n, m, block, order)


@dataclass(frozen=True)
class Dilated(Pattern):
    """A trailing window with gaps: keys i, i - d, ..., i - (size - 1) d.

    size: number of keys, counting the query. dilation: d >= 1.
    """

    size: int
    dilation: int

    def __post_init__(self) -> None:
        positive("size", self.size)
        positive("dilation", self.dilation)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        gap = i - j
        return (gap >= 0) & (gap < self.size * self.dilation) & (gap % self.dilation == 0)

    def boxes(self, frame: Frame) -> list[Box]:
        (reach,) = _position(frame, frame.queries - (self.size - 1) * self.dilation, frame.queries + 1)
        return [intersect(reach, _residue(frame, self.dilation))]

    def looks_back(self, n: int, m: int) -> bool:
        return True

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        if order:
            return _class_tiles(self.dilation, n, m, block, order, self.size + block[0] - 1)
        return strip_tiles((self.size - 1) * self.dilation + block[0], n, m, block, order)


@dataclass(frozen=True)
class Strided(Pattern):
    """Every stride-th key, before and behind: (i - j) % stride == 0."""

    stride: int

    def __post_init__(self) -> None:
        positive("stride", self.stride)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (i - j) % self.stride == 0

    def boxes(self, frame: Frame) -> list[Box]:
        return [_residue(frame, self.stride)]

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        return _class_tiles(self.stride, n, m, block, order)


@dataclass(frozen=True)
class Columns(Pattern):
    """Every stride-th block of keys, whatever the query: (j // size) % stride == offset.

    These are vertical stripes of width `size`.

    size: tokens a block. stride: blocks from one stripe to the next. offset: the first stripe's block, in [0, stride).
    """

    size: int
    stride: int
    offset: int = 0

    def __post_init__(self) -> None:
        positive("size", self.size)
        positive("stride", self.stride)
        if positive("offset", self.offset, least=0) >= self.stride:
            raise ValueError(f"offset: got {self.offset} for stride {self.stride}; pass 0 <= offset < stride")

    @property
    def aligned(self) -> bool:
        return False

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return ((j // self.size) % self.stride == self.offset).expand(torch.broadcast_shapes(i.shape, j.shape))

    def boxes(self, frame: Frame) -> list[Box]:
        stripe = (frame.keys // self.size) % self.stride
        lo = torch.full_like(frame.queries, self.offset)
        return [{("stripe", self.size, self.stride, frame.tag): Span(stripe, lo, lo + 1)}]


@dataclass(frozen=True)
class BlockBand(Pattern):
    """A band of whole blocks: -right <= i // size - j // size < left.

    size: tokens a block. left: blocks back, counting the query's own. right: blocks ahead (default 0).
    """

    size: int
    left: int
    right: int = 0

    def __post_init__(self) -> None:
        positive("size", self.size)
        positive("left", self.left)
        positive("right", self.right, least=0)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        gap = i // self.size - j // self.size
        return (gap < self.left) & (gap >= -self.right)

    def boxes(self, frame: Frame) -> list[Box]:
        start = frame.queries - frame.queries % self.size
        return _position(frame, start - (self.left - 1) * self.size, start + (self.right + 1) * self.size)

    def looks_back(self, n: int, m: int) -> bool:
        return self.right == 0 and Blocks(self.size).looks_back(n, m)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        num_blocks = _touched(self.size, block[0]) + self.left - 1 + self.right
        return strip_tiles(self.size * num_blocks, n, m, block, order)


@dataclass(frozen=True)
class Summaries(Pattern):
    """Keys that sum up stretches of a sequence, visible once their stretch has ended: j stride + size - 1 <= t.

    Key j stands for tokens [j stride, j stride + size); the queries are the last N tokens, and t counts in tokens.

    num_tokens: T, length of the summed-up sequence. size, stride: tokens a stretch has, and from one start to the next.
    `count` is the number of whole stretches, which M should be.

    >>> Summaries(6, 2, 2).dense(6, 3).int().tolist()[0]
    [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    num_tokens: int
    size: int
    stride: int

    def __post_init__(self) -> None:
        positive("size", self.size)
        positive("stride", self.stride)
        positive("num_tokens", self.num_tokens)

    @property
    def aligned(self) -> bool:
        return False

    @property
    def count(self) -> int:
        return max(0, (self.num_tokens - self.size) // self.stride + 1)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return j * self.stride + self.size - 1 <= i + self.num_tokens - num_keys

    def boxes(self, frame: Frame) -> list[Box]:
        begun = frame.queries + (self.num_tokens - frame.num_keys + 1 - self.size)
        ended = begun.div(self.stride, rounding_mode="floor") + 1
        return [{("summary", self, frame.tag): Span(frame.keys, torch.zeros_like(ended), ended.int())}]


@dataclass(frozen=True)
class Neighborhood(Pattern):
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
        if not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
            raise ValueError(f"grid: got {grid!r}; pass one to three lengths, (T, Y, X), (Y, X) or (X,)")
        lengths = tuple(positive("grid", length) for length in grid)

        def per_axis(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
            values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(lengths)
            if len(values) != len(lengths):
                axes = len(lengths)
                raise ValueError(f"{name}: got {value!r} for a grid of {axes} axes; pass one value, or one an axis")
            return tuple(positive(name, item) for item in values)

        object.__setattr__(self, "grid", lengths)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            object.__setattr__(self, name, per_axis(name, value))
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

    def _axes(self, position: Tensor, num_keys: int) -> list[Tensor]:
        total = math.prod(self.grid)
        if num_keys != total:
            raise ValueError(f"grid: {self.grid} has {total} tokens, but there are {num_keys} keys; they must be equal")
        coordinates = []
        for length in reversed(self.grid[1:]):
            coordinates.append(position % length)
            position = position // length
        return [position, *reversed(coordinates)]

    def _interval(self, axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the window of coordinates c on `axis`, counted inside their residue class."""
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

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        inside = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)
        for axis, (a, b) in enumerate(zip(self._axes(i, num_keys), self._axes(j, num_keys), strict=True)):
            d = self.dilation[axis]
            start, end = self._interval(axis, a)
            inside &= (a % d == b % d) & (b // d >= start) & (b // d < end)
        return inside

    def boxes(self, frame: Frame) -> list[Box]:
        box: Box = {}
        keys = self._axes(frame.keys, frame.num_keys)
        queries = keys if frame.queries is frame.keys else self._axes(frame.queries, frame.num_keys)
        for axis, (a, b) in enumerate(zip(queries, keys, strict=True)):
            d = self.dilation[axis]
            box[self.axis_key(axis, "step", frame.tag)] = Span(b // d if d > 1 else b, *self._interval(axis, a))
            if d > 1:
                rest = a % d
                box[self.axis_key(axis, "class", frame.tag)] = Span(rest if a is b else b % d, rest, rest + 1)
        return [box]

    def axis_key(self, axis: int, part: str, tag: Hashable) -> Hashable:
        """The name of a grid coordinate: shared by all patterns on this grid with this dilation."""
        return ("grid", self.grid, self.dilation, axis, part, tag)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Cells | None) -> int:
        def reach(axis: int, size: int) -> int:
            """Coordinates that `size` consecutive ones of an axis see, at most."""
            w, s = self.kernel[axis], self.stride[axis]
            return w + size - 1 if self.causal[axis] else w + (_touched(s, size) - 1) * s

        cells = Cells(self.grid, self.dilation)
        if order is None and self.dilation[0] == 1:
            inner = math.prod(self.grid[1:])
            return strip_tiles(reach(0, _touched(inner, block[0])) * inner, n, m, block, order)
        if order != cells or n != m or not all(cells.whole(size) for size in block):
            return all_tiles(n, m, block)
        sides = zip(cells.cell(block[0]), cells.cell(block[1]), cells.lengths, strict=True)
        met = (min(length // u, _touched(u, reach(axis, t))) for axis, (t, u, length) in enumerate(sides))
        return -(-n // block[0]) * math.prod(met)
