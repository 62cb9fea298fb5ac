"""Gathered plans: every query tile lists the single keys that it sees, for patterns that are one box on a grid.

Tiles of keys stand where they stand: the windows of a patch of queries rarely end where tiles end, and in two or three
dimensions what juts out costs more than what is seen. But the windows of a patch are a box of the grid, whose keys can
be counted off one by one: along an axis, t queries in step with the stride see w + t - 1 keys or fewer. Keys that
every query of the tile sees come first and need no mask; of the others the boxes decide, per query and key.

By "cells", the box is cut into small boxes of equal shape that begin where it begins, not at multiples of their size:
what reads boxes of memory at once, as the tensor memory accelerator does, reads such lists as fast as tiles, and they
are hardly longer than the box. By "keys", the lists hold the box and no more, and keys have to be read one by one.

The queries are laid out in patches (`serpentine`), the keys stay where they are and are read by their numbers. For dk
and dv the same is done from the other side: `by_key` lists the queries that see a patch of keys, which are a box too,
because the ends of a window never step back.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import known
from saccade.where.boxes import Boxes
from saccade.where.grid import Grid
from saccade.where.pattern import Box, Frame, Pattern
from saccade.where.plan import Plan
from saccade.where.planner import tables, tile_bounds
from saccade.where.query_lists import QueryLists

CHUNK = {"cpu": 2**18}  # listed entries that are worked out at a time: what a processor's cache holds
LARGE = 2**24  # elsewhere
BEYOND = 2**31 - 1

# Tiles and tokens -> is the token seen by some, and surely by all, of the tile.
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NotGathered(ValueError):
    """A pattern has no plan of this kind; `Pattern.plan` lists its tiles."""


@dataclass(frozen=True)
class Lattice:
    """A row-major grid of `lengths` whose axes fall into `dilation` residue classes; a sequence has one axis."""

    lengths: tuple[int, ...]
    dilation: tuple[int, ...]
    is_grid: bool

    @classmethod
    def of(cls, boxes: Sequence[Box], num_keys: int) -> Lattice | None:
        """The lattice that all boxes constrain, or None."""
        names = set.intersection(*(set(box) for box in boxes))
        named = [name for name in names if isinstance(name, tuple)]
        grids = {(name[1], name[2]) for name in named if name[0] == "grid" and name[4:] == ("step", ())}
        if len(grids) == 1:
            return cls(*grids.pop(), True)
        moduli = [name[1] for name in named if name[0] == "residue" and name[2] == ()]
        if moduli or ("position", ()) in names:
            return cls((num_keys,), (max(moduli, default=1),), False)
        return None

    @property
    def num_axes(self) -> int:
        return len(self.lengths)

    @property
    def strides(self) -> tuple[int, ...]:
        """Tokens from one coordinate to the next, per axis."""
        return tuple(math.prod(self.lengths[axis + 1 :]) for axis in range(self.num_axes))

    @property
    def steps(self) -> tuple[int, ...]:
        """Length of the longest class, per axis."""
        return tuple(-(-length // d) for length, d in zip(self.lengths, self.dilation, strict=True))

    def coordinates(self, positions: Tensor) -> list[Tensor]:
        """Of tokens at `positions`, per axis."""
        return [positions // s % length for s, length in zip(self.strides, self.lengths, strict=True)]

    def knows(self, name: object) -> bool:
        """Whether an axis of a box is one of this lattice."""
        if self.is_grid:
            return isinstance(name, tuple) and name[:3] == ("grid", self.lengths, self.dilation) and name[5] == ()
        return name in (("position", ()), ("residue", *self.dilation, ()))

    def intervals(self, pattern: Pattern, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Steps lo <= x < hi, inside its own class, that a query at each coordinate of `axis` sees; int64 (length,)."""
        length, d = self.lengths[axis], self.dilation[axis]
        c = torch.arange(length, device=device)
        at = (c * self.strides[axis]).int()
        (box,) = pattern.boxes(Frame(at, at[:1], math.prod(self.lengths)))
        size = (length - c % d + d - 1) // d
        if self.is_grid:
            span = box[("grid", self.lengths, self.dilation, axis, "step", ())]
            lo, hi = span.lo.long(), span.hi.long()
        elif ("position", ()) in box:
            span = box[("position", ())]
            lo, hi = ((end.long() - c % d + d - 1).div(d, rounding_mode="floor") for end in (span.lo, span.hi))
        else:
            lo, hi = torch.zeros_like(c), size
        lo, hi = (torch.minimum(end.clamp(min=0), size) for end in (lo, hi))  # a window beyond the grid is empty
        return lo, hi

    def readers(self, lo: Tensor, hi: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Steps of the queries that see a key at each coordinate; the inverse of `intervals`, whose ends never fall."""
        first, end = torch.empty_like(lo), torch.empty_like(hi)
        for rest in range(self.dilation[axis]):
            own = slice(rest, None, self.dilation[axis])
            key = torch.arange(len(lo[own]), device=lo.device)
            first[own] = torch.searchsorted(hi[own].contiguous(), key, right=True)
            end[own] = torch.searchsorted(lo[own].contiguous(), key, right=True)
        return first, end


def plan_gathered(
    pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device, *, by: str = "cells"
) -> Plan:
    """The plan of a static pattern as lists of single keys; see `Pattern.gathered`."""
    known("by", by, ("cells", "keys"))
    distinct = list(dict.fromkeys(pattern.at_head(h, heads) for h in range(heads)))
    lattice, others = _lattice(distinct, m)
    if by == "cells" and set(lattice.dilation) != {1}:
        raise NotGathered(f"by: got 'cells' for dilation {lattice.dilation}, whose keys are no boxes; pass by='keys'")
    boxes, _, plan = tables(pattern, n, m, heads, block, device, sort=False)
    queries, keys = torch.arange(m - n, m, device=device), torch.arange(m, device=device)
    q_order = serpentine(lattice, queries, cross_section(distinct, lattice, block[0], _cell_size(by, block[1])))
    if q_order is not None:
        boxes = Boxes(boxes.coord, boxes.lo[..., q_order], boxes.hi[..., q_order])
        queries = queries[q_order]
    seen = [[lattice.intervals(p, axis, device) for axis in range(lattice.num_axes)] for p in distinct]
    judges = [tile_bounds(boxes, union, (block[0], 1)).classify for union in range(len(distinct))]
    of_keys = _lists(lattice, queries, block[0], seen, judges, exact=not others, cell=_cell_size(by, block[1]))
    k_order = serpentine(lattice, keys, cross_section(distinct, lattice, block[1], _cell_size(by, block[0])))
    if k_order is None:
        k_order = keys
    turned = Boxes(boxes.coord[:, k_order], boxes.lo, boxes.hi)
    place = torch.full((m,), -1, device=device).index_copy_(0, queries, torch.arange(n, device=device))
    readers = [[lattice.readers(*ends, axis) for axis, ends in enumerate(each)] for each in seen]
    judges_of_queries = [_from_the_keys(turned, union, block[1], place) for union in range(len(distinct))]
    # A cell of positions that are not all queries is none: then they are listed one by one.
    cell = _cell_size(by, block[0]) if n == m else 1
    exact = n == m and not others
    of_queries = _lists(lattice, k_order, block[1], readers, judges_of_queries, exact=exact, cell=cell)
    rows = len(distinct) * plan.num_row_tiles
    return replace(
        plan,
        boxes=boxes,
        q_order=q_order,
        grid=None,
        union_of=torch.arange(len(distinct), device=device),
        indptr=torch.zeros(rows + 1, dtype=torch.int64, device=device),
        num_full=torch.zeros(rows, dtype=torch.int32, device=device),
        token_indptr=of_keys.indptr,
        token_indices=of_keys.indices,
        token_num_full=of_keys.num_full,
        token_grid=of_keys.grid,
        by_key=QueryLists(
            k_order,
            block[1],
            of_queries.indptr,
            place[of_queries.indices.long()].int(),
            of_queries.num_full,
            of_queries.grid,
        ),
    )


def _cell_size(by: str, size: int) -> int:
    return size if by == "cells" else 1


def in_tiles(plan: Plan) -> Plan:
    """The pairs of a gathered plan in tiles, both sides in patches: for kernels of dk and dv that read tiles only.

    plan: from `Pattern.gathered`. Its queries keep their order, the keys get that of `plan.by_key`.
    """
    found = plan.by_key
    if found is None:
        raise ValueError("plan: has no by_key; pass a plan of Pattern.gathered")
    lists = torch.arange(len(found.indptr) - 1, device=plan.device)
    lists = torch.repeat_interleave(lists, found.indptr.diff(), output_size=len(found.indices))
    code = torch.unique(lists * plan.num_row_tiles + found.indices // plan.block[0])
    lists, row = code // plan.num_row_tiles, code % plan.num_row_tiles
    group, col = lists // found.num_tiles, lists % found.num_tiles
    boxes = Boxes(plan.boxes.coord[:, found.order], plan.boxes.lo, plan.boxes.hi)
    block = plan.block[0], found.size
    some, full = torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row, dtype=torch.bool)
    for union in range(boxes.lo.shape[0]):
        at = plan.union_of[group] == union
        some[at], full[at] = tile_bounds(boxes, union, block).classify(row[at], col[at])
    bare = Plan.empty(boxes, plan.group_of, block, q_order=plan.q_order, k_order=found.order, causal=plan.causal)
    rows = group * plan.num_row_tiles + row
    return bare.listing(rows[some], col[some], full[some], union_of=plan.union_of)


def lattice_of(patterns: Sequence[Pattern], num_keys: int) -> Lattice | None:
    """The lattice of the patterns of all heads; None where there is none, or where some head is not one box."""
    unions = _unions(patterns, num_keys)
    return Lattice.of([union[0] for union in unions], num_keys) if all(len(u) == 1 for u in unions) else None


def patch(pattern: Pattern, plan: Plan) -> tuple[int, ...]:
    """Lengths of the patch that a query tile of a gathered plan of `pattern` is, along the axes of its grid."""
    patterns = list(dict.fromkeys(pattern.at_head(h, plan.num_heads) for h in range(plan.num_heads)))
    lattice, _ = _lattice(patterns, plan.num_keys)
    size = plan.block[0]
    cross = cross_section(patterns, lattice, size, 1 if plan.token_grid is None else plan.block[1])
    return (*cross, -(-size // math.prod(cross)))


def _unions(patterns: Sequence[Pattern], num_keys: int) -> list[list[Box]]:
    """The boxes of one query, for their names."""
    at = torch.zeros(1, dtype=torch.int32)
    return [pattern.boxes(Frame(at, at, num_keys)) for pattern in patterns]


def _lattice(patterns: Sequence[Pattern], num_keys: int) -> tuple[Lattice, bool]:
    """The lattice of the patterns of all heads, and whether some box has axes besides."""
    lattice = lattice_of(patterns, num_keys)
    if lattice is None:
        raise NotGathered(
            f"pattern: got {patterns[0] if len(patterns) == 1 else tuple(patterns)}, whose heads are not each one box "
            "on one grid or sequence, such as Neighborhood(...) or Causal() & Window(...); list tiles, with plan()"
        )
    return lattice, any(not lattice.knows(name) for (box,) in _unions(patterns, num_keys) for name in box)


def serpentine(lattice: Lattice, positions: Tensor, cross: tuple[int, ...]) -> Tensor | None:
    """The order of tokens at `positions` in which every run of them is a compact patch; None for the given one.

    Each residue class is cut into prisms of `cross` tokens along all axes but the last; one follows the other to and
    fro, and inside one the last axis does, so that a run that leaves one prism enters the next at the same end.
    """
    if lattice.num_axes == 1 and lattice.dilation == (1,):
        return None
    coordinates = lattice.coordinates(positions)
    steps = [c // d for c, d in zip(coordinates, lattice.dilation, strict=True)]
    code = torch.zeros_like(positions)
    for c, d in zip(coordinates, lattice.dilation, strict=True):
        code = code * d + c % d
    prism = torch.zeros_like(positions)
    for step, size, t in zip(steps, lattice.steps, (*cross, 1), strict=True):
        count = -(-size // t)
        prism = prism * count + torch.where(prism % 2 == 1, count - 1 - step // t, step // t)
        code = code * count + torch.where(prism // count % 2 == 1, count - 1 - step // t, step // t)
    for step, t in zip(steps, cross, strict=False):
        code = code * t + step % t
    return torch.argsort(code)


def cross_section(patterns: Sequence[Pattern], lattice: Lattice, size: int, cell: int = 1) -> tuple[int, ...]:
    """The patch of `size` tokens that lists fewest keys in cells of `cell`, as its lengths along all axes but the last.

    Counted exactly for prisms that share no patch: windows, strides, clamping and causal axes are those of `intervals`.

    >>> from saccade.where import Neighborhood
    >>> pattern = Neighborhood((32, 64, 64), (1, 13, 13))
    >>> cross_section([pattern], Lattice(pattern.grid, pattern.dilation, True), 64)
    (1, 8)
    """
    steps, cpu = lattice.steps, torch.device("cpu")
    if lattice.num_axes == 1:
        return ()
    seen = [
        [tuple(end[:: lattice.dilation[a]] for end in lattice.intervals(p, a, cpu)) for a in range(lattice.num_axes)]
        for p in patterns
    ]

    def extent(ends: tuple[Tensor, ...], start: Tensor, stop: Tensor, c: int) -> Tensor:
        lo, hi = ends
        return ((hi[stop - 1] - lo[start]) / c).ceil() * c

    @functools.cache
    def strips(pattern: int, axis: int, t: int, c: int) -> float:
        ends = seen[pattern][axis]
        start = torch.arange(0, len(ends[0]), t)
        stop = (start + t).clamp(max=len(ends[0]))
        return float((extent(ends, start, stop, c) * (stop - start) / t).sum())

    @functools.cache
    def runs(pattern: int, section: int, c: int) -> float:
        ends = seen[pattern][-1]
        start = torch.arange(0, section * len(ends[0]), size)
        stop = (start + size).clamp(max=section * len(ends[0]))
        return float(extent(ends, start // section, (stop - 1) // section + 1, c).sum())

    def cost(cross: tuple[int, ...], shape: tuple[int, ...]) -> float:
        return sum(
            math.prod(strips(p, axis, t, shape[axis]) for axis, t in enumerate(cross))
            * runs(p, math.prod(cross), shape[-1])
            for p in range(len(seen))
        )

    divisors = [t for t in range(1, size + 1) if size % t == 0]
    choices = [sorted({t for t in (*divisors, length) if t <= min(length, size)}) for length in steps[:-1]]
    fitting = [cross for cross in itertools.product(*choices) if math.prod(cross) <= size]
    shapes = cell_shapes(cell, steps)
    return min(fitting, key=lambda cross: (min(cost(cross, shape) for shape in shapes), cross))


@functools.cache
def cell_shapes(size: int, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The boxes of `size` tokens that fit a grid, the squarest first; an error where there is none."""
    divisors = [[t for t in range(1, min(size, length) + 1) if size % t == 0] for length in lengths]
    shapes = [shape for shape in itertools.product(*divisors) if math.prod(shape) == size]
    if not shapes:
        raise NotGathered(f"by: got 'cells', but no box of {size} tokens fits a grid of {lengths}; pass by='keys'")
    return sorted(shapes, key=lambda shape: (sum(shape), shape))


def _from_the_keys(boxes: Boxes, union: int, size: int, place: Tensor) -> Judge:
    """Judges queries at positions of the lattice against key tiles; a position that is no query is not seen."""
    bounds = tile_bounds(boxes, union, (1, size))

    def judge(tiles: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = place[positions]
        some, full = bounds.classify(rows.clamp(min=0), tiles)
        return some & (rows >= 0), full & (rows >= 0)

    return judge


class Lists(NamedTuple):
    """CSR lists of tokens, those that need no mask first; grid: of the cells that they come in, or None."""

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    grid: Grid | None


def _lists(
    lattice: Lattice,
    positions: Tensor,
    size: int,
    intervals: list[list[tuple[Tensor, Tensor]]],
    judges: Sequence[Judge],
    *,
    exact: bool,
    cell: int,
) -> Lists:
    """Lists of the tokens in the boxes of each tile of `size` tokens at `positions`, in cells of `cell` tokens.

    intervals: per union and axis, the steps that a token at each coordinate sees. exact: the boxes hold nothing else,
    so only the heads of the lists have to be told apart. Reads the sizes of the lists on the host, once a union.
    """
    num_tiles = -(-len(positions) // size)
    coordinates = lattice.coordinates(positions)
    tile = torch.arange(len(positions), device=positions.device) // size
    segment, tiles, classes = _segments(lattice, coordinates, tile, num_tiles)
    unions = []
    for axes in intervals:
        ends = [(lo[c], hi[c]) for (lo, hi), c in zip(axes, coordinates, strict=True)]
        sees = torch.stack([lo < hi for lo, hi in ends]).all(0)
        lows, highs = [], []
        for lo, hi in ends:
            lows.append(torch.full_like(tiles, BEYOND).scatter_reduce_(0, segment, lo.where(sees, BEYOND), "amin"))
            highs.append(torch.zeros_like(tiles).scatter_reduce_(0, segment, hi.where(sees, 0), "amax"))
        unions.append((torch.stack(lows), torch.stack(highs)))
    shape = (1,) * lattice.num_axes if cell == 1 else _best_cell(lattice, unions, cell)
    within = _within(lattice, shape, positions.device)
    counts, fulls, parts = [], [], []
    for (lo, hi), judge in zip(unions, judges, strict=True):
        count, full = torch.zeros_like(tiles), torch.zeros_like(tiles)
        for at, first in _enumerate(lattice, lo, hi, classes, shape):
            tokens = first[:, None] + within
            some, every = judge(tiles[at].repeat_interleave(cell), tokens.flatten())
            every = every.view(-1, cell).all(1)
            if not exact:
                kept = some.view(-1, cell).any(1)
                at, tokens, every = at[kept], tokens[kept], every[kept]
            own, heads = torch.zeros_like(tiles), torch.zeros_like(tiles)
            own.index_add_(0, at, torch.ones_like(at))
            heads.index_add_(0, at, every.long())
            parts.append(_heads_first(at, tokens, every, own, heads).flatten())
            count += own * cell
            full += heads * cell
        counts.append(tiles.new_zeros(num_tiles).index_add_(0, tiles, count))
        fulls.append(tiles.new_zeros(num_tiles).index_add_(0, tiles, full))
    indptr = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    none = torch.zeros(0, dtype=torch.int32, device=positions.device)
    grid = None if cell == 1 else Grid(lattice.lengths, shape)
    return Lists(indptr, torch.cat([none, *parts]), torch.cat(fulls).int(), grid)


def _best_cell(lattice: Lattice, unions: list[tuple[Tensor, Tensor]], size: int) -> tuple[int, ...]:
    """The shape of which fewest cells of `size` tokens cover the boxes [lo, hi) (A, segments) and stay on the grid."""
    shapes = cell_shapes(size, lattice.lengths)
    device = unions[0][0].device
    lengths = torch.tensor(lattice.lengths, device=device)
    spans = torch.cat([(hi - lo).clamp(min=0) for lo, hi in unions], 1)  # (A, segments)
    sides = torch.tensor(shapes, device=device)[:, :, None]
    counts = (spans + sides - 1) // sides  # (shapes, A, segments)
    fits = (counts * sides <= lengths[:, None]).all(2).all(1)
    totals = torch.where(fits, counts.prod(1).sum(1), BEYOND * BEYOND).tolist()
    best = min(range(len(shapes)), key=totals.__getitem__)
    if totals[best] == BEYOND * BEYOND:
        raise NotGathered(
            f"by: got 'cells', but on a grid of {lattice.lengths} no cells of {size} tokens cover the windows without "
            "leaving it; pass by='keys', or list tiles, with plan()"
        )
    return shapes[best]


def _within(lattice: Lattice, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the tokens of a cell stand behind its first, row-major."""
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    for side, stride in zip(shape, lattice.strides, strict=True):
        offsets = (offsets[:, None] + torch.arange(side, device=device) * stride).flatten()
    return offsets


def _segments(
    lattice: Lattice, coordinates: list[Tensor], tile: Tensor, num_tiles: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Runs of tokens of one tile and one residue class: the run of each token, the tile and the classes of each run."""
    if set(lattice.dilation) == {1}:
        tiles = torch.arange(num_tiles, device=tile.device)
        return tile, tiles, [torch.zeros_like(tiles)] * lattice.num_axes
    code = tile
    for c, d in zip(coordinates, lattice.dilation, strict=True):
        code = code * d + c % d
    found, segment = torch.unique_consecutive(code, return_inverse=True)
    classes = []
    for d in reversed(lattice.dilation):
        classes.append(found % d)
        found = found // d
    return segment, found, classes[::-1]


def _enumerate(
    lattice: Lattice, lo: Tensor, hi: Tensor, classes: list[Tensor], shape: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of the boxes [lo, hi) of all segments, in ascending order, some segments at a time: (segment, first
    token). A cell that would leave the grid begins sooner, and so do those before it.
    """
    sides = torch.tensor(shape, device=lo.device)[:, None]
    lengths = ((hi - lo).clamp(min=0) + sides - 1) // sides
    if max(shape) > 1:
        lo = torch.minimum(lo, torch.tensor(lattice.lengths, device=lo.device)[:, None] - lengths * sides)
    totals = lengths.prod(0)
    most = CHUNK.get(totals.device.type, LARGE) // math.prod(shape)
    on_host = totals.tolist()
    start = 0
    while start < len(on_host):
        stop, size = start + 1, on_host[start]
        while stop < len(on_host) and size + on_host[stop] <= most:
            size += on_host[stop]
            stop += 1
        own = totals[start:stop]
        at = torch.arange(start, stop, device=own.device).repeat_interleave(own, output_size=size)
        local = torch.arange(size, device=own.device) - (own.cumsum(0) - own)[at - start]
        first = torch.zeros_like(local)
        axes = zip(lengths, lo, classes, lattice.dilation, lattice.strides, shape, strict=True)
        for length, begin, rest, d, stride, side in reversed(list(axes)):
            e = length.index_select(0, at)
            step = begin.index_select(0, at) + local % e * side
            first += (step if d == 1 else step * d + rest.index_select(0, at)) * stride
            local = local // e
        yield at, first
        start = stop


def _heads_first(at: Tensor, tokens: Tensor, full: Tensor, own: Tensor, heads: Tensor) -> Tensor:
    """Cells (K, size) of the segments `at`, int32, full ones moved to the head of their segment; orders are kept."""
    begin, heads_before = own.cumsum(0) - own, heads.cumsum(0) - heads
    before = full.cumsum(0) - full.long() - heads_before[at]
    index = torch.arange(len(at), device=at.device)
    place = torch.where(full, begin[at] + before, index + heads[at] - before)
    return torch.empty_like(tokens, dtype=torch.int32).index_copy_(0, place, tokens.int())
