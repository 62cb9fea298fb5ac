"""Launching the kernels: sizes, how exact tau is to be, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.softmax.kernels.arguments import Heads
from saccade.softmax.kernels.entmax.backward import columns, queries
from saccade.softmax.kernels.entmax.forward import values
from saccade.softmax.kernels.entmax.live import LiveColumns, LiveRows, collect_columns, collect_rows
from saccade.softmax.kernels.entmax.tables import TileTables, Turned
from saccade.softmax.kernels.entmax.threshold import bracket
from saccade.softmax.kernels.launch import described, padded
from saccade.where import Plan


class Sizes(NamedTuple):
    """SQ rows a program, a part of a row tile; BN keys a step; warps and registers a thread of `bracket` (None: as many
    as it asks for), and warps of the others; registers of `values`, and the steps whose loads it has in flight."""

    part: int
    keys: int
    bracket_warps: int
    bracket_registers: int | None
    warps: int
    registers: int | None
    stages: int

    @classmethod
    def of(cls, block: tuple[int, int], width: int, dtype: torch.dtype) -> Sizes:
        """For a plan's tiles and the wider of a key and a value."""
        if dtype == torch.float32:
            return cls(min(block[0], 32), min(block[1], 32), 4, None, 8 if width > 64 else 4, None, 2)
        part, keys = min(block[0], 64), min(block[1], 32 if width > 128 else 64)
        warps = max(1, part // 16)
        three = 168 if warps == 4 else None  # registers with which three programs share a multiprocessor
        if width > 128:
            return cls(part, keys, warps, three, 8, None, 2)
        return cls(part, keys, warps, three, warps, *((three, 3) if width <= 64 else (None, 2)))


class Care(NamedTuple):
    """How exact tau is to be: the share of a row's slots that may overflow, see `bracket`, and limits, see `values`."""

    spare: float
    close: float
    leap: float


NARROW, SINGLE = Care(0.375, 0.03, 0.1), Care(0.0, 3e-5, 1e-3)


@dataclass(frozen=True)
class Launch:
    """One problem. base: (B * H,) int64, how many entries the lists of earlier heads have; total: those of all."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: TileTables
    turned: Turned
    base: Tensor
    total: int
    block: tuple[int, int]
    scale: float
    alpha: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float) -> Launch:
        """What the plan gives is kept with it."""

        def kept() -> tuple[TileTables, Turned, Tensor, int]:
            lengths = plan.indptr[:: plan.num_row_tiles].diff()[plan.group_of.expand(len(q), -1).flatten()]
            return TileTables.of(plan), Turned.of(plan), lengths.cumsum(0) - lengths, int(lengths.sum())

        return cls(q, k, v, *plan.derive(("entmax", len(q)), kept), plan.block, scale, alpha)

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.block, max(padded(self.q.shape[3]), padded(self.v.shape[3])), self.q.dtype)

    @property
    def row_programs(self) -> tuple[int, int, int]:
        """One for each part of SQ rows of a head."""
        return self.tables.num_rows * (self.block[0] // self.sizes.part), self.q.shape[1], len(self.q)

    @property
    def num_columns(self) -> int:
        """Tiles of BN keys."""
        return self.turned.num_lists * (self.block[1] // self.sizes.keys)

    @property
    def tiles(self) -> dict[str, int]:
        return {"BQ": self.block[0], "BK": self.block[1], "BN": self.sizes.keys, "SQ": self.sizes.part}

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel that forms scores is compiled for."""
        d = self.q.shape[3]
        return self.tiles | {
            "D": d,
            "PAD_D": padded(d),
            "BOXES": self.tables.lo.shape[1],
            "AXES": self.tables.coord.shape[0],
            "POWER": 1 / (self.alpha - 1),
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
        }

    @property
    def of_values(self) -> dict[str, int]:
        """What those that read values are, too."""
        return {"DV": self.v.shape[3], "PAD_DV": padded(self.v.shape[3])}

    def forward(self, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """o (B, H, N, Dv), and what `backward` takes where gradients are wanted: tau, mean, marks of tiles in use."""
        q, size = self.q, self.sizes
        (batch, heads, n, _), grid = q.shape, self.row_programs
        care = SINGLE if q.dtype == torch.float32 else NARROW
        o = q.new_empty(batch, heads, n, self.v.shape[3])
        # Rounded to half precision it would leave an error in every pair of a row, and dq sums them up.
        mean = torch.empty_like(o, dtype=torch.float32) if gradients else None
        tau = q.new_empty(batch, heads, grid[0] * size.part, dtype=torch.float32)
        sure = q.new_empty(batch, heads, grid[0], dtype=torch.int32)
        marks, used = self.no_marks(), self.no_marks()
        k_box, v_box = described((1, 1, size.keys), self.k, self.v) or (None, None)
        scale, ratio = self.scale * (self.alpha - 1), heads // self.k.shape[1]
        fold = size.keys == 64
        bracket[grid](
            Heads.of(q), Heads.of(self.k), k_box, tau, sure, marks, self.tables, self.base, scale, ratio,
            DEPTH=3 if fold else 4, FOLD=fold, SPARE=int(care.spare * (size.keys // 2 if fold else size.keys)),
            **self.constants, num_warps=size.bracket_warps, num_stages=3, maxnreg=size.bracket_registers,
        )  # fmt: skip
        values[grid](
            Heads.of(q), Heads.of(self.k), k_box, Heads.of(self.v), v_box, Heads.of(o), mean, tau, sure, used,
            self.tables, self.live_rows(marks), self.base, scale, ratio, CLOSE=care.close, LEAP=care.leap,
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=size.stages, maxnreg=size.registers,
        )  # fmt: skip
        return o, tau, mean, used

    def backward(self, do: Tensor, tau: Tensor, mean: Tensor, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        q, k, v, size = self.q, self.k, self.v, self.sizes
        heads, kv_heads = q.shape[1], k.shape[1]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = torch.empty_like(tau)
        scale, ratio = self.scale * (self.alpha - 1), heads // kv_heads
        k_box, v_box = described((1, 1, size.keys), k, v) or (None, None)
        queries[self.row_programs](
            Heads.of(q), Heads.of(k), k_box, Heads.of(v), v_box, Heads.of(do), Heads.of(mean), Heads.of(dq), tau, delta,
            self.tables, self.live_rows(marks), self.base, scale, self.scale, ratio,
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=2,
        )  # fmt: skip
        q_box, do_box = described((1, 1, size.part), q, do) or (None, None)
        columns[(self.num_columns, kv_heads, len(q))](
            Heads.of(q), q_box, Heads.of(k), Heads.of(v), Heads.of(do), do_box, Heads.of(dk), Heads.of(dv), tau, delta,
            self.tables, self.turned, self.live_columns(marks), self.base, scale, self.scale, ratio, tau.shape[2],
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=2,
        )  # fmt: skip
        return dq, dk, dv

    def no_marks(self) -> Tensor:
        """int8, for each head, entry of its lists, step of BN keys and part of SQ rows."""
        steps = self.total * (self.block[1] // self.sizes.keys) * (self.block[0] // self.sizes.part)
        return torch.zeros(steps, dtype=torch.int8, device=self.q.device)

    def live_rows(self, marks: Tensor) -> LiveRows:
        """The row lists that the marks leave."""
        tiles, steps = torch.empty(2, len(marks), dtype=torch.int32, device=marks.device)
        live = LiveRows(tiles, steps, *self.counts(self.row_programs[0]))
        collect_rows[self.row_programs](marks, self.tables, live, self.base, CHUNK=256, **self.tiles)
        return live

    def live_columns(self, marks: Tensor) -> LiveColumns:
        """The same, by tile of keys."""
        live = LiveColumns(torch.empty_like(marks, dtype=torch.int32), *self.counts(self.num_columns))
        grid = self.num_columns, self.q.shape[1], len(self.q)
        collect_columns[grid](marks, self.tables, self.turned, live, self.base, CHUNK=256, **self.tiles)
        return live

    def counts(self, lists: int) -> Tensor:
        """Room for two numbers a list."""
        return torch.empty(2, len(self.q), self.q.shape[1], lists, dtype=torch.int32, device=self.q.device)
