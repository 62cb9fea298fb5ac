"""A plan as these kernels are given it: its lists of tiles by row and by column, and its boxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.where import Plan


class TileTables(NamedTuple):
    """A plan of tiles alone, see `Plan`; `group_stride` is 0 where all batch entries share their lists."""

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    group_of: Tensor
    group_stride: int
    union_of: Tensor
    coord: Tensor
    lo: Tensor
    hi: Tensor
    num_queries: int
    num_keys: int
    num_rows: int

    @classmethod
    def of(cls, plan: Plan) -> TileTables:
        group_of, boxes = plan.group_of, plan.boxes
        stride = group_of.shape[1] if group_of.shape[0] > 1 else 0
        lists = plan.indptr, plan.indices, plan.num_full, group_of, stride, plan.union_of
        return cls(*lists, boxes.coord, boxes.lo, boxes.hi, plan.num_queries, plan.num_keys, plan.num_row_tiles)


class Turned(NamedTuple):
    """Tile lists per key tile, `num_lists` a group, full tiles first; places: where its group's row lists hold each."""

    indptr: Tensor
    indices: Tensor
    places: Tensor
    num_full: Tensor
    num_lists: int

    @classmethod
    def of(cls, plan: Plan) -> Turned:
        lists, full = plan.rows(), plan.is_full()
        cols = plan.indices[: len(lists)].long()
        num_rows, num_cols = plan.num_row_tiles, plan.num_col_tiles
        group, row = lists // num_rows, lists % num_rows
        turned = group * num_cols + cols
        at = torch.argsort((turned * 2 + ~full) * num_rows + row)
        indptr = torch.zeros(plan.num_groups * num_cols + 1, dtype=torch.int64, device=plan.device)
        indptr[1:] = torch.bincount(turned, minlength=len(indptr) - 1).cumsum(0)
        num_full = torch.bincount(turned[full], minlength=len(indptr) - 1).int()
        places = at - plan.indptr[group[at] * num_rows]
        return cls(indptr, row[at].int(), places.int(), num_full, num_cols)
