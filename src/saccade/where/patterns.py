"""The named patterns, each stated twice: `allows` is the definition, `boxes` the intervals that plans are made of.

Positions are absolute: of N queries and M keys, query row r stands at position i = M - N + r. A size counts the query.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import check_cu_seqlens, positive
from saccade.where.layout import Cells, Order, classes_of, straddling
from saccade.where.pattern import (
    Box,
    Frame,
    Pattern,
    Span,
    all_tiles,
    check_ends,
    intersect,
    interval_tiles,
    sent,
    strip_tiles,
    tile_ends,
    touched,
)


def _position(frame: Frame, lo: Tensor, hi: Tensor) -> list[Box]:
    return [{("position", frame.tag): Span(frame.keys, lo, hi)}]


def _residue(frame: Frame, modulus: int) -> Box:
    rest = frame.queries % modulus
    return {("residue", modulus, frame.tag): Span(frame.keys % modulus, rest, rest + 1)}


def _class_tiles(
    modulus: int, n: int, m: int, block: tuple[int, int], order: Order | None, size: int | None = None
) -> int:
    """Tiles, at most, of queries that see their own class of residues, or `size` consecutive keys of it."""
    if modulus == 1 or classes_of(order, m) != modulus or n < modulus:
        return all_tiles(n, m, block)
    (bq, bk), num_rows, num_cols = block, -(-n // block[0]), -(-m // block[1])
    length, across = -(-m // modulus), straddling(modulus, n, m, bq)
    several = min(num_cols, touched(bk, touched(n // modulus, bq) * length))
    own = min(num_cols, touched(bk, length))
    if size is not None:
        own = min(own, touched(bk, bq + size - 1) + min(2, straddling(modulus, m, m, bk)))
    return (num_rows - across) * own + across * several


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if order is not None:
            return all_tiles(n, m, block)
        rows, (bq, bk) = -(-n // block[0]), block
        return min(all_tiles(n, m, block), rows + (rows * (m - n) + bq * rows * (rows + 1) // 2) // bk)


@dataclass(frozen=True)
class Band(Pattern):
    """A band along the diagonal: i - left <= j <= i + right.

    left, right: tokens beside the query on either side; None for all there are. A negative one leaves out the query
    and tokens next to it: `Band(7, -4)` is the keys 4 to 7 back, `Band(None, -4)` all keys at least 4 back.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        check_ends(self.left, self.right)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        some = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)
        if self.left is not None:
            some = some & (j >= i - self.left)
        return some if self.right is None else some & (j <= i + self.right)

    def interval(self, q: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """The first key that queries at q see, and the first after the last."""
        start = torch.zeros_like(q) if self.left is None else q - self.left
        return start, torch.full_like(q, num_keys) if self.right is None else q + self.right + 1

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, *self.interval(frame.queries, frame.num_keys))

    def looks_back(self, n: int, m: int) -> bool:
        return n == 1 if self.right is None else self.right <= 0

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if order is None:
            first, last = tile_ends(n, m, block[0])
            return interval_tiles(self.interval(first, m)[0], self.interval(last, m)[1], m, block[1])
        if self.left is None or self.right is None:
            return all_tiles(n, m, block)
        width = self.left + self.right
        return strip_tiles(lambda count: count + width, n, m, block, order)


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return strip_tiles(lambda count: count + self.size - 1, n, m, block, order)


@dataclass(frozen=True)
class Prefix(Pattern):
    """The first n keys, whatever the query: j < n; none at all for n = 0.

    `Causal() | Prefix(n)` is the prefix language model.
    """

    n: int

    def __post_init__(self) -> None:
        positive("n", self.n, least=0)

    @property
    def aligned(self) -> bool:
        return False

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (j < self.n).expand(torch.broadcast_shapes(i.shape, j.shape))

    def boxes(self, frame: Frame) -> list[Box]:
        start = torch.zeros_like(frame.queries)
        return _position(frame, start, torch.full_like(frame.queries, self.n)) if self.n else []

    def looks_back(self, n: int, m: int) -> bool:
        return self.n <= m - n + 1

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        touched_keys = min(m, self.n) if order is None else min(m, self.n * block[1])
        return all_tiles(n, touched_keys, block)


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return strip_tiles(lambda count: self.size * touched(self.size, count), n, m, block, order)


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if order is not None:
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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if order is not None:
            return _class_tiles(self.dilation, n, m, block, order, self.size)
        return strip_tiles(lambda count: count + (self.size - 1) * self.dilation, n, m, block, order)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return Strided(self.dilation).orders(num_keys)


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return _class_tiles(self.stride, n, m, block, order)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return (Cells((num_keys,), (self.stride,)),) if self.stride > 1 else ()


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

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        rows, cols, bk = -(-n // block[0]), -(-m // block[1]), block[1]
        if order in self.orders(m):
            return rows * min(cols, touched(bk, -(-m // (self.size * self.stride)) * self.size))
        if order is not None:
            return rows * cols
        first, last = (end // self.size for end in tile_ends(m, m, bk))
        between = (first % self.stride <= self.offset) & (last % self.stride >= self.offset)
        return rows * int((between | (first // self.stride < last // self.stride)).sum())

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        num_stripes = -(-num_keys // (self.size * self.stride))
        grid = num_stripes, self.stride, self.size
        return (Cells(grid, (1, self.stride, 1), sides=(num_stripes, 1, self.size), keys_only=True),)


@dataclass(frozen=True)
class BlockBand(Pattern):
    """A band of whole blocks: -right <= i // size - j // size < left.

    size: tokens a block. left: blocks back, counting the query's own. right: blocks ahead (default 0). None for all
    there are. Where left <= 0 or right < 0 the query's own block is left out, and those next to it:
    `BlockBand(size, g + 1, -g)` is the block g back, `BlockBand(size, None, -g)` all blocks at least g back.
    """

    size: int
    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        positive("size", self.size)
        check_ends(self.left, self.right, own=0)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        gap = i // self.size - j // self.size
        some = torch.ones_like(gap, dtype=torch.bool)
        if self.left is not None:
            some = some & (gap < self.left)
        return some if self.right is None else some & (gap >= -self.right)

    def interval(self, q: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """The first key that queries at q see, and the first after the last."""
        block = q // self.size
        start = torch.zeros_like(q) if self.left is None else (block - (self.left - 1)) * self.size
        return start, torch.full_like(q, num_keys) if self.right is None else (block + self.right + 1) * self.size

    def boxes(self, frame: Frame) -> list[Box]:
        return _position(frame, *self.interval(frame.queries, frame.num_keys))

    def looks_back(self, n: int, m: int) -> bool:
        if self.right is None:
            return n == 1
        return self.right < 0 or (self.right == 0 and Blocks(self.size).looks_back(n, m))

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        if order is None:
            first, last = tile_ends(n, m, block[0])
            return interval_tiles(self.interval(first, m)[0], self.interval(last, m)[1], m, block[1])
        if self.left is None or self.right is None:
            return all_tiles(n, m, block)
        more = self.left - 1 + self.right
        return strip_tiles(lambda count: self.size * (touched(self.size, count) + more), n, m, block, order)


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
