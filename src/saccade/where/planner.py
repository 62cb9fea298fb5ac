"""Planning: from boxes to tile lists by interval arithmetic, coarse to fine.

A tile pair is empty when on some axis the keys' coordinates miss every bound of its queries, full when on all axes they
lie within every bound, partial otherwise. Bounds of whole groups of tiles answer the same question for all their pairs
at once, so the search starts from few coarse pairs and opens only those that are not empty: its cost follows the tiles
that are listed, not the pairs that there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.where.boxes import LEAST, MOST, Boxes
from saccade.where.layout import order, sort_axes
from saccade.where.pattern import Box, Frame, Pattern, Span
from saccade.where.plan import Plan

FANOUT = 8  # tiles a coarser tile holds on either side
COARSEST = 4096  # pairs that the search may start from


@dataclass(frozen=True)
class Bounds:
    """Extremes over each tile: of the coordinates (A, nK), of the box bounds (T, A, nQ)."""

    c_min: Tensor
    c_max: Tensor
    lo_min: Tensor
    lo_max: Tensor
    hi_min: Tensor
    hi_max: Tensor

    def coarser(self) -> Bounds:
        """The same over groups of FANOUT tiles."""
        return Bounds(
            _reduce(self.c_min, FANOUT, "amin"),
            _reduce(self.c_max, FANOUT, "amax"),
            _reduce(self.lo_min, FANOUT, "amin"),
            _reduce(self.lo_max, FANOUT, "amax"),
            _reduce(self.hi_min, FANOUT, "amin"),
            _reduce(self.hi_max, FANOUT, "amax"),
        )

    def classify(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """(not empty, full) for tile pairs rows (P,), cols (P,)."""
        some = torch.zeros_like(rows, dtype=torch.bool)
        full = torch.zeros_like(rows, dtype=torch.bool)
        c_min, c_max = self.c_min[:, cols], self.c_max[:, cols]
        for t in range(self.lo_min.shape[0]):
            meets = torch.ones_like(some)
            within = torch.ones_like(some)
            for a in range(c_min.shape[0]):
                meets &= (c_max[a] >= self.lo_min[t, a][rows]) & (c_min[a] < self.hi_max[t, a][rows])
                within &= (c_min[a] >= self.lo_max[t, a][rows]) & (c_max[a] < self.hi_min[t, a][rows])
            some |= meets
            full |= within & meets
        return some, full


def _reduce(values: Tensor, size: int, how: str) -> Tensor:
    """Extremes over runs of `size` along the last dimension; the last run may be short."""
    short = -values.shape[-1] % size
    if short:
        values = torch.nn.functional.pad(values, (0, short), value=MOST if how == "amin" else LEAST)
    return getattr(values.unflatten(-1, (-1, size)), how)(-1)


def tile_bounds(boxes: Boxes, union: int, block: tuple[int, int]) -> Bounds:
    """Bounds of the tiles of one union of boxes."""
    lo, hi, (bq, bk) = boxes.lo[union], boxes.hi[union], block
    return Bounds(
        _reduce(boxes.coord, bk, "amin"),
        _reduce(boxes.coord, bk, "amax"),
        _reduce(lo, bq, "amin"),
        _reduce(lo, bq, "amax"),
        _reduce(hi, bq, "amin"),
        _reduce(hi, bq, "amax"),
    )


def search(bounds: Bounds, num_rows: int, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs that are not empty: (rows, cols, full), int64, int64, bool, in no particular order."""
    levels = [(bounds, num_rows, num_cols)]
    while levels[-1][1] * levels[-1][2] > COARSEST:
        finer, r, c = levels[-1]
        levels.append((finer.coarser(), -(-r // FANOUT), -(-c // FANOUT)))
    device = bounds.c_min.device
    _, r, c = levels[-1]
    rows = torch.arange(r, device=device).repeat_interleave(c)
    cols = torch.arange(c, device=device).repeat(r)
    full = torch.zeros_like(rows, dtype=torch.bool)
    inner = torch.arange(FANOUT, device=device)
    for depth, (level, r, c) in enumerate(reversed(levels)):
        if depth:
            rows = (rows[:, None, None] * FANOUT + inner[:, None]).expand(-1, -1, FANOUT).flatten()
            cols = (cols[:, None, None] * FANOUT + inner[None, :]).expand(-1, FANOUT, -1).flatten()
            full = full[:, None].expand(-1, FANOUT * FANOUT).flatten()
            exists = (rows < r) & (cols < c)
            rows, cols, full = rows[exists], cols[exists], full[exists]
        some, within = level.classify(rows, cols)
        keep = some | full
        rows, cols, full = rows[keep], cols[keep], (full | within)[keep]
    return rows, cols, full


def _frame(pattern_keys: int, n: int, device: torch.device) -> tuple[Frame, Frame]:
    keys = torch.arange(pattern_keys, dtype=torch.int32, device=device)
    queries = torch.arange(pattern_keys - n, pattern_keys, dtype=torch.int32, device=device)
    return Frame(queries, keys, pattern_keys), Frame(queries, queries, pattern_keys)


def tables(
    pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device, *, sort: bool
) -> tuple[Boxes, Tensor, Plan]:
    """Box tables of a pattern, the union that each head follows (heads,), and a plan that lists nothing yet."""
    distinct: dict[Pattern, int] = {}
    follows = [distinct.setdefault(pattern.at_head(h, heads), len(distinct)) for h in range(heads)]
    frame, query_frame = _frame(m, n, device)
    unions = [p.boxes(frame) for p in distinct]
    causal = all(_is_causal(union, frame) for union in unions)
    q_order = k_order = None
    if sort:
        k_order = order(sort_axes(unions, frame, block[1]))
        q_order = order(sort_axes(unions, query_frame, block[0])) if k_order is not None else None
    if k_order is not None:
        unions = [
            [{key: Span(s.coord[k_order], s.lo[q_order], s.hi[q_order]) for key, s in box.items()} for box in union]
            for union in unions
        ]
    boxes = Boxes.of(unions, n, m, device)
    group_of = torch.tensor([follows], dtype=torch.int64, device=device)
    return boxes, group_of[0], Plan.empty(boxes, group_of, block, q_order=q_order, k_order=k_order, causal=causal)


def _is_causal(union: list[Box], frame: Frame) -> bool:
    def within(box: Box) -> bool:
        span = box.get(("position", frame.tag))
        return span is not None and bool((span.hi <= frame.queries + 1).all())

    return all(within(box) for box in union)


def plan_pattern(pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device) -> Plan:
    """The plan of a static pattern: every tile that is not empty."""
    boxes, _, plan = tables(pattern, n, m, heads, block, device, sort=True)
    num_rows, num_cols = plan.num_row_tiles, plan.num_col_tiles
    rows, cols, full = [], [], []
    for union in range(boxes.lo.shape[0]):
        r, c, f = search(tile_bounds(boxes, union, block), num_rows, num_cols)
        rows.append(r + union * num_rows)
        cols.append(c)
        full.append(f)
    union_of = torch.arange(len(rows), device=device)
    return plan.listing(torch.cat(rows), torch.cat(cols), torch.cat(full), union_of=union_of)


def tile_pairs(pattern: Pattern, n: int, m: int, block: tuple[int, int], device: torch.device) -> Tensor:
    """Which tiles a pattern touches, in the tokens' own order: bool (rows, cols).

    For routers, which score every one of them anyway.
    """
    boxes, _, plan = tables(pattern, n, m, 1, block, device, sort=False)
    touched = torch.zeros(plan.num_row_tiles, plan.num_col_tiles, dtype=torch.bool, device=device)
    rows, cols, _ = search(tile_bounds(boxes, 0, block), *touched.shape)
    touched[rows, cols] = True
    return touched


def plan_chosen(
    pattern: Pattern,
    chosen: Tensor,
    group_of: Tensor,
    n: int,
    m: int,
    block: tuple[int, int],
    *,
    tokens: Tensor | None = None,
    token_log_weights: Tensor | None = None,
) -> Plan:
    """The plan of a routed pattern: of the tiles that `pattern` admits, those that the data chose.

    pattern: the same for every head. chosen: key tiles of each query tile, as numbers (G, rows, K) int, -1 for none, in
    any order, repeats ignored, or as marks (G, rows, cols) bool. group_of: (B, H) or (1, H) int, the list group of each
    batch entry and query head. tokens: single keys of each query tile, (G, rows, K') int, -1 for none, where a repeat
    counts again, or marks (G, rows, M) bool. token_log_weights: like tokens, added to the scores (sampled: log 1/p).
    """
    device = chosen.device
    boxes, _, plan = tables(pattern, n, m, 1, block, device, sort=False)
    plan = replace(plan, group_of=group_of)
    num_groups, num_rows, _ = chosen.shape
    if num_rows != plan.num_row_tiles:
        raise ValueError(
            f"chosen: got {num_rows} query tiles; {n} queries in tiles of {block[0]} make {plan.num_row_tiles}"
        )
    marked = chosen.dtype == torch.bool
    group, row, slot = torch.nonzero(chosen if marked else chosen >= 0, as_tuple=True)
    col = slot if marked else chosen[group, row, slot].long()
    code = torch.unique((group * num_rows + row) * plan.num_col_tiles + col)
    row, col = code // plan.num_col_tiles, code % plan.num_col_tiles
    some, full = tile_bounds(boxes, 0, block).classify(row % num_rows, col)
    union_of = torch.zeros(num_groups, dtype=torch.int64, device=device)
    plan = plan.listing(row[some], col[some], full[some], union_of=union_of)
    return plan if tokens is None else plan.with_tokens(tokens, token_log_weights)
