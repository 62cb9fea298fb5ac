"""Planning: from boxes to tile lists by interval arithmetic, coarse to fine.

A tile pair is empty when on some axis the keys' coordinates miss every bound of its queries, full when on all axes they
lie within every bound, partial otherwise. Bounds of whole groups of tiles answer the same question for all their pairs
at once, so the search starts from few coarse pairs and opens only those that are not empty: its cost follows the tiles
that are listed, not the pairs that there are.

On a GPU kernels do the same, list by list, and the host waits for nothing (`planner_cuda`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from saccade.where.boxes import Boxes
from saccade.where.grid import grid_of
from saccade.where.layout import Cells, Order, best_order, permutation
from saccade.where.pattern import Frame, Pattern, extremes, sent
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
            extremes(self.c_min, FANOUT, "amin"),
            extremes(self.c_max, FANOUT, "amax"),
            extremes(self.lo_min, FANOUT, "amin"),
            extremes(self.lo_max, FANOUT, "amax"),
            extremes(self.hi_min, FANOUT, "amin"),
            extremes(self.hi_max, FANOUT, "amax"),
        )

    def classify(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """(not empty, full) for tile pairs rows (P,), cols (P,), or two shapes that broadcast; of one union."""
        some = torch.zeros(torch.broadcast_shapes(rows.shape, cols.shape), dtype=torch.bool, device=rows.device)
        full = torch.zeros_like(some)
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


def tile_bounds(boxes: Boxes, union: int, block: tuple[int, int]) -> Bounds:
    """Bounds of the tiles of one union of boxes."""
    lo, hi, (bq, bk) = boxes.lo[union], boxes.hi[union], block
    return Bounds(
        extremes(boxes.coord, bk, "amin"),
        extremes(boxes.coord, bk, "amax"),
        extremes(lo, bq, "amin"),
        extremes(lo, bq, "amax"),
        extremes(hi, bq, "amin"),
        extremes(hi, bq, "amax"),
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


def _runs(follows: Sequence[int], size: int) -> bool:
    """Whether heads follow the same union in runs of `size`."""
    return all(len(set(follows[at : at + size])) == 1 for at in range(0, len(follows), size))


def tables(
    pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device, *, sort: bool
) -> tuple[Boxes, int, Plan]:
    """Box tables of a pattern, a number of tiles that it cannot exceed, and a plan that lists nothing yet."""
    distinct: dict[Pattern, int] = {}
    follows = [distinct.setdefault(pattern.at_head(h, heads), len(distinct)) for h in range(heads)]
    keys = torch.arange(m, dtype=torch.int32, device=device)
    frame = Frame(keys if n == m else torch.arange(m - n, m, dtype=torch.int32, device=device), keys, m)
    unions = [p.boxes(frame) for p in distinct]
    boxes = Boxes.of(unions, n, m, device)
    order, most = best_order(list(distinct), unions, n, m, block) if sort else (None, 0)
    if not sort:
        most = sum(p.most_tiles(n, m, block, None) for p in distinct)
    q_order, k_order = (None, None) if order is None else orders(order, n, m, block, device)
    if k_order is not None:
        boxes = replace(boxes, coord=boxes.coord[:, k_order])
    if q_order is not None:
        boxes = replace(boxes, lo=boxes.lo[..., q_order], hi=boxes.hi[..., q_order])
    causal = all(p.looks_back(n, m) for p in distinct)
    group_of = torch.zeros(1, heads, dtype=torch.int64, device=device)
    if len(distinct) > 1:
        group_of = sent(torch.tensor([follows]), device)
    grid = grid_of(unions, order, m, block[1])
    alike = max(a for a in range(1, heads + 1) if heads % a == 0 and _runs(follows, a))
    plan = Plan.empty(
        boxes, group_of, block, q_order=q_order, k_order=k_order, causal=causal, grid=grid, alike=alike
    )  # fmt: skip
    return boxes, most, plan


def orders(
    order: Order, n: int, m: int, block: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The last n of m tokens, and all of them, in an order: int64 (n,), (m,); None where they stay as they are."""
    if not isinstance(order, Cells):
        q_order, k_order = (order.permutation(*side) for side in (("queries", n), ("keys", m)))
        return sent(q_order, device), sent(k_order, device)
    k_order = ordered(order, 0, m, block[1], device)
    if order.keys_only:
        return None, k_order
    same = n == m and order.cell(block[0]) == order.cell(block[1])
    return k_order if same else ordered(order, m - n, n, block[0], device), k_order


def ordered(order: Cells, first: int, num_tokens: int, block: int, device: torch.device) -> Tensor:
    """`num_tokens` tokens from `first` on, in their order, for tiles of `block`: int64 (num_tokens,)."""
    if (on_device := kernels(device.type)) is not None:
        return on_device.permutation(order, first, num_tokens, block, device)
    return permutation(order, torch.arange(first, first + num_tokens, device=device), block)


@functools.cache
def kernels(device_type: str) -> ModuleType | None:
    """The kernels that plan on a device, None where it has none."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from saccade.where import planner_cuda

    return planner_cuda


def plan_pattern(pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device) -> Plan:
    """The plan of a static pattern: every tile that is not empty."""
    boxes, most, plan = tables(pattern, n, m, heads, block, device, sort=True)
    if (on_device := kernels(device.type)) is not None:
        return on_device.plan_boxes(plan, most)
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
    bounds = tile_bounds(boxes, 0, block)
    if device.type != "cpu":  # comparing every pair costs less there than waiting for what a search has found
        rows, cols = (torch.arange(size, device=device) for size in (plan.num_row_tiles, plan.num_col_tiles))
        return bounds.classify(rows[:, None], cols)[0]
    touched = torch.zeros(plan.num_row_tiles, plan.num_col_tiles, dtype=torch.bool, device=device)
    rows, cols, _ = search(bounds, *touched.shape)
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
    most: int | None = None,
    alike: int = 1,
) -> Plan:
    """The plan of a routed pattern: of the tiles that `pattern` admits, those that the data chose.

    pattern: the same for every head. chosen: key tiles of each query tile, as numbers (G, rows, K) int, -1 for none, in
    any order, repeats ignored, or as marks (G, rows, cols) bool. group_of: (B, H) or (1, H) int, the list group of each
    batch entry and query head. tokens: single keys of each query tile, (G, rows, K') int, -1 for none, where a repeat
    counts again, or marks (G, rows, M) bool. token_log_weights: like tokens, added to the scores (sampled: log 1/p).
    most: marked tiles that a row has at most (default: all may be marked); a GPU sets aside room for as many. alike:
    heads follow the same lists in runs of so many (default 1).
    """
    device = chosen.device
    boxes, _, plan = tables(pattern, n, m, 1, block, device, sort=False)
    plan = replace(plan, group_of=group_of, alike=alike)
    num_groups, num_rows, _ = chosen.shape
    if num_rows != plan.num_row_tiles:
        raise ValueError(
            f"chosen: got {num_rows} query tiles; {n} queries in tiles of {block[0]} make {plan.num_row_tiles}"
        )
    bounds = tile_bounds(boxes, 0, block)
    union_of = torch.zeros(num_groups, dtype=torch.int64, device=device)
    if chosen.dtype != torch.bool:
        plan = _numbered(plan, bounds, chosen, union_of)
    elif (on_device := kernels(device.type)) is not None:
        plan = on_device.plan_marked(plan, chosen, min(most or chosen.shape[2], chosen.shape[2]))
    else:
        group, row, col = torch.nonzero(chosen, as_tuple=True)
        some, full = bounds.classify(row, col)
        plan = plan.listing((group * num_rows + row)[some], col[some], full[some], union_of=union_of)
    return plan if tokens is None else plan.with_tokens(tokens, token_log_weights)


def _numbered(plan: Plan, bounds: Bounds, chosen: Tensor, union_of: Tensor) -> Plan:
    """The tiles chosen by number, (G, rows, K), of what the bounds admit."""
    cols = chosen.flatten(0, 1).sort(1).values.long()
    rows = torch.arange(len(cols), device=cols.device)[:, None] % plan.num_row_tiles
    some, full = bounds.classify(rows, cols.clamp(min=0))
    listed = some & (cols >= 0)
    listed[:, 1:] &= cols[:, 1:] != cols[:, :-1]
    full &= listed & ~plan._ragged(cols)
    num_full = full.sum(1)
    indptr = torch.nn.functional.pad(listed.sum(1).cumsum(0), (1, 0))
    place = torch.where(full, full.cumsum(1), num_full[:, None] + (listed & ~full).cumsum(1)) - 1
    place = torch.where(listed, indptr[:-1, None] + place, cols.numel())  # one place more takes what is not listed
    indices = torch.zeros(cols.numel() + 1, dtype=torch.int32, device=cols.device)
    indices = indices.scatter_(0, place.flatten(), cols.int().flatten())[:-1]
    if indices.device.type == "cpu":
        indices = indices[: int(indptr[-1])]
    return replace(plan, indptr=indptr, indices=indices, num_full=num_full.int(), union_of=union_of)
