"""Launching the kernels: which sizes they take for which problem, grids, buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.softmax.kernels.arguments import ByKey, Heads, Rows, Scores, Tables
from saccade.softmax.kernels.backward import attend_backward_keys, attend_backward_queries, summarize_rows
from saccade.softmax.kernels.forward import attend_forward
from saccade.where.grid import Grid

SUMMARIZED = 64  # rows that are summarised at a time


class Sizes(NamedTuple):
    """Rows and columns of scores that a program forms at a step, its warps, and the steps whose loads are in flight."""

    rows: int
    cols: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """One problem, as every kernel takes it.

    pack: query heads that share their lists and so a program's rows. grid: what key tiles are cells of; anywhere: the
    lists are of cells that begin anywhere on it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores
    tables: Tables
    block: tuple[int, int]
    pack: int
    grid: Grid | None = None
    anywhere: bool = False

    @property
    def boxes(self) -> tuple[int, int]:
        """(boxes a union, axes)."""
        return self.tables.lo.shape[1], self.tables.coord.shape[0]

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        (d, dv), (boxes, axes) = (self.q.shape[3], self.v.shape[3]), self.boxes
        table = self.scores.table
        return {
            "D": d,
            "DV": dv,
            "PAD_D": padded(d),
            "PAD_DV": padded(dv),
            "BQ": self.block[0],
            "BK": self.block[1],
            "BOXES": boxes,
            "AXES": axes,
            "ANYWHERE": self.anywhere,
            "BIAS_AXES": 0 if table is None else len(table.extents),
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
        }

    def programs(self, rows: int) -> tuple[int, int, int]:
        """The grid of a kernel with `rows` rows of query tiles a program."""
        batch, heads = self.q.shape[:2]
        return self.tables.num_rows * max(1, self.block[0] * self.pack // rows), heads // self.pack, batch

    def keys(self, size: int) -> tuple[tuple[Any, ...], Tables, dict[str, int]]:
        """What a kernel that takes `size` keys a step is given of them: (k, v, their descriptors), the plan, the cell.

        On a grid of two or three axes the tensor memory accelerator reads cells where they lie. Elsewhere keys that the
        plan reorders are copied: gathered in the kernel they would come too late.
        """
        cell: tuple[int, ...] = (0, 0, 0)
        if self.grid is not None and len(self.grid.cell) == 1 and size <= self.block[1] and not self.anywhere:
            cell = (1, 1, size)
        elif self.grid is not None and size == math.prod(self.grid.cell):
            fill = (1,) * (3 - len(self.grid.cell))
            boxes = described((1, *fill, *self.grid.cell), *on_grid((*fill, *self.grid.lengths), self.k, self.v))
            if boxes or self.anywhere:
                cell = (*fill, *self.grid.cell)
                k, v, tables = self.k, self.v, self.tables._replace(k_order=None)
                boxes = boxes or (None, None)
                return (Heads.of(k), Heads.of(v), *boxes), tables, dict(zip(("PT", "PY", "PX"), cell, strict=True))
        k, v = (ordered(x, self.tables.k_order) for x in (self.k, self.v))
        boxes = (size <= self.block[1] and described((1, 1, size), k, v)) or (None, None)
        tables = self.tables._replace(k_order=None)
        return (Heads.of(k), Heads.of(v), *boxes), tables, dict(zip(("PT", "PY", "PX"), cell, strict=True))

    def whole(self, size: Sizes) -> Sizes:
        """Sizes that take a cell at a step, where that begins anywhere."""
        return size._replace(cols=self.block[1]) if self.anywhere else size

    def forward(self) -> tuple[Tensor, Tensor]:
        """(o (B, H, N, Dv) in q's dtype, lse (B, H, N) float32)."""
        (batch, heads, n, _), dv = self.q.shape, self.v.shape[3]
        o = torch.empty_like(self.q) if dv == self.q.shape[3] else self.q.new_empty(batch, heads, n, dv)
        lse = self.q.new_empty(batch, heads, n, dtype=torch.float32)
        size = self.whole(forward_sizes(self.block, self.pack, max(padded(self.q.shape[3]), padded(dv)), self.q.dtype))
        keys, tables, cell = self.keys(size.cols)
        attend_forward[self.programs(size.rows)](
            Heads.of(self.q), *keys, Heads.of(o), Rows.of(lse), self.scores, tables, heads // self.k.shape[1],
            BM=size.rows, BN=size.cols, PACK=self.pack, **cell, **self.constants,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
        return o, lse

    def backward(
        self, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, turned: ByKey
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """(dq, dk, dv, gradient of the relative table or None, summary of the rows)."""
        (batch, heads, n, d), kv_heads, dv = self.q.shape, self.k.shape[1], self.v.shape[3]
        dos = Heads.of(do)
        summary = lse.new_empty(batch, heads, summary_rows(n, self.block[0]), 2)
        summarize_rows[(summary.shape[2] // SUMMARIZED, heads, batch)](
            Heads.of(o), dos, Rows.of(lse), None if dlse is None else Rows.of(dlse), Rows.of(summary), self.tables,
            DV=dv, PAD_DV=padded(dv), BM=SUMMARIZED,
        )  # fmt: skip
        dq = torch.empty_like(self.q)
        scattered = self.tables.token_indptr is not None
        if scattered:
            dk, dv_ = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (self.k, self.v))
        else:
            dk, dv_ = torch.empty_like(self.k), torch.empty_like(self.v)
        table = self.scores.table
        dtable = None if table is None else torch.zeros_like(table.entries, dtype=torch.float32)
        width = max(padded(d), padded(dv))
        size = self.whole(backward_sizes(self.block, self.pack, width, self.q.dtype))
        keys, tables, cell = self.keys(size.cols)
        attend_backward_queries[self.programs(size.rows)](
            Heads.of(self.q), *keys, dos, Heads.of(dq), Heads.of(dk), Heads.of(dv_), Rows.of(summary),
            self.scores, dtable, tables, heads // kv_heads,
            BM=size.rows, BN=size.cols, PACK=self.pack, **cell, **self.constants,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
        size = turned_sizes(self.block, width, self.q.dtype)
        q, do = ordered(self.q, self.tables.q_order), ordered(do, self.tables.q_order)
        boxes = (size.cols <= self.block[0] and described((1, 1, size.cols), q, do)) or (None, None)
        constants = {name: value for name, value in self.constants.items() if name != "ANYWHERE"}
        attend_backward_keys[(turned.num_lists * max(1, self.block[1] // size.rows), kv_heads, batch)](
            Heads.of(q), Heads.of(self.k), Heads.of(self.v), *boxes, Heads.of(do), Heads.of(dk),
            Heads.of(dv_), Rows.of(summary), self.scores, self.tables, turned,
            heads // kv_heads, BM=size.cols, BN=size.rows, ADD=scattered, **constants,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
        return dq, dk.to(self.k.dtype), dv_.to(self.v.dtype), dtable, summary


def described(cell: tuple[int, ...], *tensors: Tensor) -> tuple[TensorDescriptor, ...]:
    """Descriptors of tensors (..., C) that read `cell` of their leading axes at a time; none unless all have one."""
    if not tensors or not all(_fits(x) for x in tensors):
        return ()
    return tuple(TensorDescriptor.from_tensor(x, [*cell, padded(x.shape[-1])]) for x in tensors)


def _fits(x: Tensor) -> bool:
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return aligned and x.stride(-1) == 1 and x.element_size() == 2


def on_grid(lengths: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, H, N, C) as (B * H, T, Y, X, C), without a copy; none if batch and heads do not lie in one row."""
    if not all(x.stride(0) == x.shape[1] * x.stride(1) or len(x) == 1 for x in tensors):
        return []
    return [x.flatten(0, 1).unflatten(1, lengths) for x in tensors]


def ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """x (B, H, N, C) in the plan's order of tokens."""
    return x if order is None else x.index_select(2, order)


def summary_rows(n: int, tile: int) -> int:
    """Rows of the summary of n queries, in whole tiles, and at least one that stands for no query."""
    whole = max(tile, SUMMARIZED)
    return (n // whole + 1) * whole


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


LEAST = 16  # rows and columns of a product


def forward_sizes(block: tuple[int, int], pack: int, width: int, dtype: torch.dtype) -> Sizes:
    """Sizes of the forward kernel for tiles of `block` tokens and `width` channels.

    From 64 rows on a warpgroup's products read shared memory; with fewer one warp takes all rows, so that it shares the
    keys with no other.
    """
    rows, cols = max(LEAST, block[0] * pack), max(LEAST, block[1])
    if dtype == torch.float32:
        return _single(rows, cols, width)
    if rows < 64:
        return Sizes(rows, min(cols, 1024 // rows), 1, 2 if rows == 32 else 3)
    wide = width > 128
    return Sizes(min(rows, 64 if wide else 128), min(cols, 32 if wide else 64), 4, 2)


def backward_sizes(block: tuple[int, int], pack: int, width: int, dtype: torch.dtype) -> Sizes:
    """Sizes of the kernel that forms dq."""
    rows, cols = max(LEAST, block[0] * pack), max(LEAST, block[1])
    if dtype == torch.float32:
        return _single(rows, cols, width)
    if rows < 64:
        return Sizes(rows, min(cols, 32), 4 if rows == 32 else 2, 3)
    return Sizes(64, min(cols, 32 if width > 128 else 64), 4, 2)


def turned_sizes(block: tuple[int, int], width: int, dtype: torch.dtype) -> Sizes:
    """Sizes of the kernel that forms dk and dv: rows of keys, columns of queries."""
    cols, rows = (max(LEAST, size) for size in block)
    if dtype == torch.float32:
        return _single(rows, cols, width)
    if rows < 64:
        return Sizes(rows, min(cols, 32), 4 if rows == 32 else 2, 3)
    return Sizes(64, min(cols, 32 if width > 128 else 64), 8 if width > 128 else 4, 2)


def _single(rows: int, cols: int, width: int) -> Sizes:
    """In float32, whose products no matrix unit forms, tiles are as small as registers are few."""
    return Sizes(min(rows, 32 if width <= 64 else 16), min(cols, 32 if width <= 128 else 16), 8, 1)
