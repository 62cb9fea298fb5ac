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

    cells_along_y, cells_along_x: how many key tiles lie along the last two axes of its grid, if it has one.
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
    cells_along_y: int
    cells_along_x: int

    @classmethod
    def of(cls, plan: Plan) -> Tables:
        group_of, boxes = plan.group_of, plan.boxes
        grid = plan.grid or Grid((), ())
        along = [1, 1, *(length // size for length, size in zip(grid.lengths, grid.cell, strict=True))]
        return cls(
            plan.indptr,
            plan.indices,
            plan.num_full,
            group_of,
            group_of.shape[1] if group_of.shape[0] > 1 else 0,
            plan.union_of,
            boxes.coord,
            boxes.lo,
            boxes.hi,
            plan.q_order,
            plan.k_order,
            plan.token_indptr,
            plan.token_indices,
            plan.token_num_full,
            plan.token_log_weights,
            plan.num_queries,
            plan.num_keys,
            plan.num_row_tiles,
            *along[-2:],
        )


class Lists(NamedTuple):
    """Tile lists alone, `num_lists` a group: those of a transposed plan."""

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    num_lists: int

    @classmethod
    def of(cls, plan: Plan) -> Lists:
        return cls(plan.indptr, plan.indices, plan.num_full, plan.num_row_tiles)


class Table(NamedTuple):
    """A relative table, flat (H, size) float32; coordinates (A, N), (A, M) and extents (A,) of its axes."""

    values: Tensor
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
