"""The algebra of patterns: which keys may each query see?

Every static pattern is a union of boxes. Give each key a few integer coordinates c_a(j) (its position, its row and
column on a grid, its residue, its document); a box admits the pairs

    (i, j)  with  lo_a(i) <= c_a(j) < hi_a(i)   on every axis a,

and a pattern is the union of a few boxes. `&` intersects boxes, `|` appends them. `dense` evaluates the definition and
is the truth that everything else is compared with; `plan` derives tile lists from the boxes by interval arithmetic and
never forms an N x M array.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saccade.errors import positive
from saccade.where.layout import classes_of, straddling

if TYPE_CHECKING:
    from saccade.where.layout import Order
    from saccade.where.plan import Plan


class Span(NamedTuple):
    """One axis of a box: keys carry `coord` (M,), query i admits lo[i] <= coord < hi[i]; all int32."""

    coord: Tensor
    lo: Tensor
    hi: Tensor


# The key names the coordinate: equal keys mean equal coordinates, so that spans can be intersected.
Box = dict[Hashable, Span]


class Frame(NamedTuple):
    """Where queries and keys stand: positions (N,) and (M,), int32, among `num_keys`; `tag` tells frames apart."""

    queries: Tensor
    keys: Tensor
    num_keys: int
    tag: Hashable = ()


class Pattern:
    """A set of (query, key) pairs. Subclasses are frozen dataclasses: equal patterns are interchangeable, and hashable.

    `aligned`: queries and keys are the same tokens, compared by position, so there are at least as many keys as
    queries. Where it is False, the keys may be other things, and fewer: landmarks, summaries, another sequence.
    """

    @property
    def aligned(self) -> bool:
        return True

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        """The definition: may the query at position i see the key at j? int64 tensors that broadcast -> bool."""
        raise NotImplementedError

    def boxes(self, frame: Frame) -> list[Box]:
        """The same set as a union of boxes over a frame."""
        raise NotImplementedError

    def at_head(self, head: int, num_heads: int) -> Pattern:
        """The pattern that query head `head` of `num_heads` follows."""
        return self

    def looks_back(self, n: int, m: int) -> bool:
        """The boxes bound every key's position by its query's: none of the last n of m tokens looks ahead."""
        return False

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        """A number of tiles that the boxes cannot exceed, for tokens laid out in `order` (None: in their own).

        Tells before anything is counted how long the lists may become; every tile, unless a pattern knows better.
        """
        return all_tiles(n, m, block)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        """Orders of tokens in which this pattern's tiles may be fewer; a plan takes one where `most_tiles` says so."""
        return ()

    def __and__(self, other: Pattern) -> Pattern:
        return And.of(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Or.of(self, other)

    def dense(self, n: int, m: int | None = None, heads: int = 1) -> Tensor:
        """The pattern as bool (heads, n, m), by evaluating its definition; True = may attend.

        n: queries, the last n of m positions. m: keys (default n). heads: query heads.

        >>> from saccade.where import Window
        >>> Window(2).dense(3).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
        """
        n, m, heads = self.check_sizes(n, m, heads)
        i = torch.arange(m - n, m)[:, None]
        j = torch.arange(m)[None, :]
        rows = [self.at_head(h, heads).allows(i, j, m).expand(n, m) for h in range(heads)]
        return torch.stack(rows)

    def plan(
        self,
        n: int,
        m: int | None = None,
        heads: int = 1,
        block: tuple[int, int] = (128, 64),
        device: torch.device | str | None = None,
    ) -> Plan:
        """Tile lists and box tables for this pattern; see `Plan`.

        n: queries, the last n of m. m: keys (default n). heads: query heads. block: tokens a tile has on the query and
        the key side. device: where the tables are made (default: CPU); the host does not wait for a GPU to make them.
        Cost: time and memory proportional to n + m and the listed tiles.

        >>> from saccade.where import Window
        >>> Window(128).plan(1024, block=(128, 128)).num_tiles
        15
        """
        from saccade.where.planner import plan_pattern

        n, m, heads = self.check_sizes(n, m, heads)
        return plan_pattern(self, n, m, heads, check_block(block), torch.device(device or "cpu"))

    def gathered(
        self,
        n: int,
        m: int | None = None,
        heads: int = 1,
        block: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
        by: str = "cells",
    ) -> Plan:
        """The plan that lists keys from where windows begin, instead of tiles that begin at multiples of their size.

        For windows on grids, whose ends seldom meet the ends of tiles. Queries are laid out in patches, keys stay in
        their order. Each query tile lists the smallest box of the grid that holds its windows, what all its queries see
        first; `Plan.by_key` lists the queries of each key tile likewise.

        n, m, heads, device: as in `plan`. block: tokens a tile of queries has, and a cell or tile of keys. by: "cells"
        cuts the box into boxes of block[1] keys, for kernels that read such at once; "keys" lists it key by key, which
        dilations need. The pattern must be one box a head on one grid (a Neighborhood, also with & of other patterns)
        or sequence. Cost: time and memory proportional to n + m and the listed keys; on a GPU, unlike in `plan`, the
        host waits for the sizes of the lists, so keep the plan.

        >>> from saccade.where import Neighborhood
        >>> pattern = Neighborhood((64, 64), 13)
        >>> pattern.plan(4096, block=(64, 64)).num_tiles * 64
        30976
        >>> [len(pattern.gathered(4096, by=by).token_indices) for by in ("cells", "keys")]
        [26624, 21904]
        """
        from saccade.where.gathered import plan_gathered

        n, m, heads = self.check_sizes(n, m, heads)
        return plan_gathered(self, n, m, heads, check_block(block), torch.device(device or "cpu"), by=by)

    def check_sizes(self, n: int, m: int | None, heads: int) -> tuple[int, int, int]:
        """Validated (n, m, heads), with m defaulting to n."""
        n = positive("n", n)
        m = n if m is None else positive("m", m)
        if m < n and self.aligned:
            raise ValueError(f"m: got {m} keys for n = {n} queries, which are the last n of m positions; pass m >= n")
        return n, m, positive("heads", heads)


def check_block(block: Sequence[int]) -> tuple[int, int]:
    """Validated (query, key) tile sizes in tokens."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"block: got {block!r}; pass two integers (query tokens, key tokens)")
    return positive("block", block[0]), positive("block", block[1])


def check_ends(left: Any, right: Any, *, own: int = 1) -> None:
    """Refuse ends that are neither integers nor None (open), or leave nothing: left + own + right must be positive."""
    for name, value in (("left", left), ("right", right)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            kind = type(value).__name__
            raise TypeError(f"{name}: got {value!r} ({kind}); pass an integer, or None for no bound")
    if left is not None and right is not None and left + own + right < 1:
        raise ValueError(f"right: got {right} for left {left}, which no key meets; pass at least {1 - own - left}")


def all_tiles(n: int, m: int, block: tuple[int, int]) -> int:
    """Tiles of n queries and m keys."""
    return -(-n // block[0]) * -(-m // block[1])


def touched(size: int, count: int) -> int:
    """Stretches of `size` tokens, at most, that `count` consecutive tokens fall into."""
    return (count - 2) // size + 2


def strip_tiles(reach: Callable[[int], int], n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
    """Tiles, at most, when `count` consecutive queries see `reach(count)` consecutive keys or fewer.

    Laid out by residues, a tile's queries are spread, and so are their keys, over every class.
    """
    (bq, bk), num_rows, num_cols = block, -(-n // block[0]), -(-m // block[1])
    d = 1 if order is None else classes_of(order, m)
    if d == 1:
        return all_tiles(n, m, block) if order is not None else num_rows * min(num_cols, touched(bk, reach(bq)))
    each = d * touched(bk, -(-reach((bq - 1) * d + 1) // d)) + straddling(d, m, m, bk)
    across = straddling(d, n, m, bq)  # their bounds, and those of such key tiles, span the sequence
    return (num_rows - across) * min(num_cols, each) + across * num_cols


def extremes(values: Tensor, size: int, how: str) -> Tensor:
    """Extremes over runs of `size` along the last dimension; the last run may be short."""
    short = -values.shape[-1] % size
    if short:
        values = torch.nn.functional.pad(values, (0, short), value=2**31 - 1 if how == "amin" else -(2**31))
    return getattr(values.unflatten(-1, (-1, size)), how)(-1)


def tile_ends(n: int, m: int, size: int) -> tuple[Tensor, Tensor]:
    """Positions of the first and of the last query of each tile of `size`, of the last n of m tokens."""
    first = torch.arange(m - n, m, size)
    return first, (first + size - 1).clamp(max=m - 1)


def interval_tiles(first: Tensor, end: Tensor, m: int, size: int) -> int:
    """Tiles of `size` keys, at most, when the queries of row tile r see none but [first[r], end[r]) of m keys."""
    last = (end.clamp(0, m) - 1).div(size, rounding_mode="floor")
    return int((last - first.clamp(0, m) // size + 1).clamp(min=0).sum())


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A table of the host on `device`; the host does not wait for it to arrive."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def intersect(one: Box, two: Box) -> Box:
    """The box of the pairs in both."""
    merged = dict(one)
    for key, span in two.items():
        if key in one:
            lo, hi = torch.maximum(one[key].lo, span.lo), torch.minimum(one[key].hi, span.hi)
            span = Span(span.coord, lo, hi)
        merged[key] = span
    return merged


@dataclass(frozen=True)
class And(Pattern):
    """Pairs that every part admits."""

    parts: tuple[Pattern, ...]

    @classmethod
    def of(cls, *parts: Pattern) -> Pattern:
        """The flattened conjunction, each part once."""
        return _flattened(cls, "&", parts)

    @property
    def aligned(self) -> bool:
        return any(part.aligned for part in self.parts)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        first, *rest = (part.allows(i, j, num_keys) for part in self.parts)
        for mask in rest:
            first = first & mask
        return first

    def boxes(self, frame: Frame) -> list[Box]:
        union: list[Box] = [{}]
        for part in self.parts:
            union = [intersect(one, two) for one in union for two in part.boxes(frame)]
        return union

    def at_head(self, head: int, num_heads: int) -> Pattern:
        return And.of(*(part.at_head(head, num_heads) for part in self.parts))

    def looks_back(self, n: int, m: int) -> bool:
        return any(part.looks_back(n, m) for part in self.parts)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return min(part.most_tiles(n, m, block, order) for part in self.parts)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return tuple(dict.fromkeys(order for part in self.parts for order in part.orders(num_keys)))


@dataclass(frozen=True)
class Or(Pattern):
    """Pairs that some part admits."""

    parts: tuple[Pattern, ...]

    @classmethod
    def of(cls, *parts: Pattern) -> Pattern:
        """The flattened union, each part once."""
        return _flattened(cls, "|", parts)

    @property
    def aligned(self) -> bool:
        return any(part.aligned for part in self.parts)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        first, *rest = (part.allows(i, j, num_keys) for part in self.parts)
        for mask in rest:
            first = first | mask
        return first

    def boxes(self, frame: Frame) -> list[Box]:
        union = [box for part in self.parts for box in part.boxes(frame)]
        return [{}] if any(not box for box in union) else union

    def at_head(self, head: int, num_heads: int) -> Pattern:
        return Or.of(*(part.at_head(head, num_heads) for part in self.parts))

    def looks_back(self, n: int, m: int) -> bool:
        return all(part.looks_back(n, m) for part in self.parts)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return min(all_tiles(n, m, block), sum(part.most_tiles(n, m, block, order) for part in self.parts))

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return tuple(dict.fromkeys(order for part in self.parts for order in part.orders(num_keys)))


def _flattened(kind: type[And] | type[Or], sign: str, parts: Sequence[Pattern]) -> Pattern:
    flat: dict[Pattern, None] = {}
    for part in parts:
        if not isinstance(part, Pattern):
            raise TypeError(f"{sign}: got {part!r} ({type(part).__name__}); combine patterns with patterns")
        flat.update(dict.fromkeys(part.parts if isinstance(part, kind) else (part,)))
    return kind(tuple(flat)) if len(flat) > 1 else next(iter(flat))


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head h follows `patterns[h]`.

    patterns: one pattern a query head; `heads` of `dense` and `plan` must equal their number.

    >>> from saccade.where import Causal, Window
    >>> PerHead([Causal(), Causal() & Window(1)]).dense(2, heads=2).int().tolist()
    [[[1, 0], [1, 1]], [[1, 0], [0, 1]]]
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        patterns = tuple(patterns)
        if not patterns or not all(isinstance(p, Pattern) for p in patterns):
            raise TypeError(f"patterns: got {patterns!r}; pass a non-empty list of patterns, one a query head")
        object.__setattr__(self, "patterns", patterns)

    @property
    def aligned(self) -> bool:
        return any(pattern.aligned for pattern in self.patterns)

    def at_head(self, head: int, num_heads: int) -> Pattern:
        if num_heads != len(self.patterns):
            given = len(self.patterns)
            raise ValueError(f"heads: got {num_heads} for a PerHead of {given} patterns; they must be equal")
        return self.patterns[head].at_head(head, num_heads)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        raise TypeError("PerHead has no single definition; ask at_head(h, heads) first")
