"""What kernels are given, by name: tensors with their strides, a plan's tables, a bias. None leaves a part out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from saccade.where import Plan
from saccade.where.grid import Grid


class Heads(NamedTuple):
    """x (B, H, L, C), whose last stride is 1, and its other strides."""

    x: Tensor
    stride_b: int
    stride_h: int
    stride_n: int

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        return cls(x, *x.stride()[:3])


class Rows(NamedTuple):
    """A number a query and head, x (B, H, N) contiguous."""

    x: Tensor
    stride_b: int
    stride_h: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x, *x.stride()[:2])


class Tables(NamedTuple):
    """A plan, see `Plan`; `group_stride` is 0 where all batch entries share their lists.

    along_y, along_x: how many key tiles lie along the last two axes of its grid, if it has one; how many tokens, if the
    lists are those of cells that begin anywhere on it.
    """

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    group_of: Tensor
    group_stride: int
    union_of: Tensor
    coord: Tensor
    lo: Tensor
    hi: Tensor
    q_order: Tensor | None
    k_order: Tensor | None
    token_indptr: Tensor | None
    token_indices: Tensor | None
    token_num_full: Tensor | None
    token_log_weights: Tensor | None
    num_queries: int
    num_keys: int
    num_rows: int
    along_y: int
    along_x: int

    @classmethod
    def of(cls, plan: Plan, in_cells: bool = False) -> Tables:
        """in_cells: the lists of single keys of the plan, cell by cell, in place of those of tiles, which are empty."""
        group_of, boxes = plan.group_of, plan.boxes
        grid = (plan.token_grid if in_cells else plan.grid) or Grid((), ())
        steps = (1,) * len(grid.cell) if in_cells else grid.cell
        along = [1, 1, *(length // step for length, step in zip(grid.lengths, steps, strict=True))]
        lists = plan.cells if in_cells else (plan.indptr, plan.indices, plan.num_full)
        tokens = (plan.token_indptr, plan.token_indices, plan.token_num_full, plan.token_log_weights)
        return cls(
            *lists,
            group_of,
            group_of.shape[1] if group_of.shape[0] > 1 else 0,
            plan.union_of,
            boxes.coord,
            boxes.lo,
            boxes.hi,
            plan.q_order,
            plan.k_order,
            *((None,) * 4 if in_cells else tokens),
            plan.num_queries,
            plan.num_keys,
            plan.num_row_tiles,
            *along[-2:],
        )


class ByKey(NamedTuple):
    """A transposed plan: for each key tile, `num_lists` a group, the query tiles; the keys in its order."""

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    coord: Tensor
    k_order: Tensor | None
    num_lists: int

    @classmethod
    def of(cls, plan: Plan) -> ByKey:
        lists = plan.indptr, plan.indices, plan.num_full
        return cls(*lists, plan.boxes.coord, plan.k_order, plan.num_row_tiles)


class Table(NamedTuple):
    """A relative table, flat (H, size) float32; coordinates (A, N), (A, M) and extents (A,) of its axes."""

    entries: Tensor  # a tuple of the compiler's has `values` of its own
    size: int
    q_at: Tensor
    k_at: Tensor
    extents: Tensor


class Slopes(NamedTuple):
    """Slopes (H,) of a bias that falls with the distance of positions q_at (N,), k_at (M,)."""

    slopes: Tensor
    q_at: Tensor
    k_at: Tensor


class Scores(NamedTuple):
    """scale: of q k, times log2 e. cap: softcap times log2 e, or None. sink: (H,) or None. table, slopes: a bias."""

    scale: float
    cap: float | None
    sink: Tensor | None
    table: Table | None
    slopes: Slopes | None
