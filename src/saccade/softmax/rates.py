"""What a call costs on each backend: rates measured once per kind of GPU, over the work that the call is there.

    time = max(host, sum over kinds of  pairs(kind) 2 (D + Dv) f / (rate(kind) share))

kinds of work, in (query, key) pairs: "full", "causal", "window" where a backend has code of its own for them; else
"tiles", pairs of full tiles, and "cut", pairs of tiles that the boxes cut, or "cells" where such tiles are cells of a
grid and a backend has code for that; and "rows", what begins and ends each query tile, counted as if it were one more
key tile of 128. f: 1 forward, 7/2 with the backward. share: the part of the GPU
that the call occupies. A table is kept for a compute capability, never for a device's name."""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from saccade.softmax.problem import Problem, reach
from saccade.where import Plan

ROWS = 128  # keys whose pairs the work of a row is counted in
BACKWARD = 2.5  # products that a backward has for each one of a forward
MEASURED = Path(__file__).with_name("measured")


class Priced(Protocol):
    """What the estimate reads of a backend: its name; the kinds of work it has code of its own for (`built_in`, default
    none); the tiles it plans for (`BLOCK`), or the plan that it makes of a problem, with cells (`planned`); whether it
    splits the keys of few queries over the GPU (`splits_keys`,
    default no)."""

    name: str


@dataclass(frozen=True)
class Work:
    """pairs: (query, key) pairs of one head by kind. comparisons: of coordinates, for each pair of a cut tile."""

    pairs: dict[str, float]
    comparisons: int = 0

    @classmethod
    def of(cls, problem: Problem, backend: Priced) -> Work:
        """The work of a problem as a backend does it. Where a pattern is no band, from its plan in the backend's tiles,
        which is remembered; of a plan that is given, every tile counts as full, so that the host need not wait."""
        n, m = problem.q.shape[2], problem.k.shape[2]
        where, (bq, bk) = problem.where, getattr(backend, "BLOCK", (64, 64))
        rows = {"rows": -(-n // bq) * float(bq * ROWS)}
        if isinstance(where, Plan):
            listed = 0 if where.token_indices is None else len(where.token_indices)
            pairs = (where.most_tiles * where.block[1] + listed) * where.block[0]
            return cls(rows | {"tiles": pairs / where.num_groups})
        sides = reach(where)
        if sides is None:
            planned = getattr(backend, "planned", None)
            plan = problem.plan((bq, bk)) if planned is None else planned(problem)
            if plan.token_indices is not None:  # of which those that the boxes cut are most
                singles = float(len(plan.token_indices) * plan.block[0]) / plan.num_groups
                rows = {"rows": plan.num_row_tiles * float(plan.block[0] * ROWS)}
                return cls(rows | {"tiles" if plan.token_grid is None else "cells": singles}, 1)
            full, cut = _pairs(plan)
            in_cells = planned is not None and plan.grid is not None and len(plan.grid.cell) > 1
            comparisons = 1 if in_cells else plan.boxes.lo.shape[1] * plan.boxes.coord.shape[0]
            rows = {"rows": plan.num_row_tiles * float(plan.block[0] * ROWS)}
            return cls(rows | {"tiles": full, "cells" if in_cells else "cut": cut}, comparisons)
        padded, width = -(-n // bq) * bq, _width(sides, n, m)
        ends = sum(side < math.inf for side in sides)
        kind = "full" if not ends else "causal" if sides == (math.inf, 0) else "window"
        if kind in getattr(backend, "built_in", ()):
            return cls(rows | {kind: padded * width})
        edge = ends * max(bq, bk)
        return cls(rows | {"tiles": padded * max(0.0, width - edge / 2), "cut": float(padded * edge)}, 1)


def _width(sides: tuple[float, float], n: int, m: int) -> float:
    """Keys that a query of a band sees, on average: itself, those behind it and those ahead."""
    left, right = (int(min(side, m)) for side in sides)
    return 1 + (_sum_of_min(m - n, m, left) + _sum_of_min(0, n, right)) / n


def _sum_of_min(start: int, stop: int, most: int) -> float:
    """sum of min(x, most) over start <= x < stop."""
    turn = min(max(most, start), stop)
    return (start + turn - 1) * (turn - start) / 2 + most * (stop - turn)


def _pairs(plan: Plan) -> tuple[float, float]:
    """Pairs of a head in full and in cut tiles, on average; kept with the plan, and the host waits for them once."""

    def pairs() -> tuple[float, float]:
        full = plan.num_full.view(plan.num_groups, -1).sum(1)
        tiles = plan.indptr.diff().view(plan.num_groups, -1).sum(1)
        of_head = torch.stack([full, tiles - full])[:, plan.group_of].double().mean((1, 2))
        whole, cut = (of_head * math.prod(plan.block)).tolist()
        return whole, cut

    return plan.derive("pairs", pairs)


@dataclass(frozen=True)
class Row:
    """One backend at one dtype and head dim, forward alone or with gradients.

    host: seconds until a call returns to the host. tables: seconds more for a plan that the backend meets for the first
    time. rates: FLOP/s by kind; "cut" for one comparison of coordinates a pair, "cut more" for two, "cells" for any
    number; "rows" may lack.
    """

    backend: str
    dtype: str
    head_dim: int
    gradients: bool
    host: float
    tables: float
    rates: dict[str, float]

    def seconds(self, work: Work) -> float | None:
        """Device time of some work, for one FLOP a pair; None when a rate was not measured."""
        total = 0.0
        for kind, pairs in work.pairs.items():
            if not pairs or (kind == "rows" and kind not in self.rates):
                continue
            if kind not in self.rates:
                return None
            total += pairs / self.rates[kind]
            if kind == "cut" and work.comparisons > 1 and "cut more" in self.rates:
                further = 1 / self.rates["cut more"] - 1 / self.rates["cut"]
                total += pairs * (work.comparisons - 1) * max(0.0, further)
        return total


@dataclass(frozen=True)
class Table:
    """Rows of one compute capability. about: when and with what they were measured."""

    rows: tuple[Row, ...]
    about: str

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read a table that `measure` wrote."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(Row(**row) for row in data["rows"]), str(data["about"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is no table of measured rates ({error!r}); delete it, or run saccade.softmax.measure()"
            ) from error

    def save(self, path: Path) -> None:
        """Write what `load` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [vars(row) for row in self.rows]
        path.write_text(json.dumps({"about": self.about, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    def has(self, backend: str) -> bool:
        """Whether a backend was measured at all."""
        return any(row.backend == backend for row in self.rows)

    def row(self, backend: str, problem: Problem) -> Row | None:
        """The row nearest in head dim; half precisions share one."""
        dtype = "bfloat16" if problem.q.dtype == torch.float16 else str(problem.q.dtype).removeprefix("torch.")
        mine = (backend, dtype, problem.wants_gradients)
        rows = [row for row in self.rows if (row.backend, row.dtype, row.gradients) == mine]
        return min(rows, key=lambda row: abs(math.log(row.head_dim / problem.q.shape[3])), default=None)

    def estimate(self, backend: Priced, problem: Problem) -> float | None:
        """Seconds of a call, gradients included where they are asked for; None when the table does not know."""
        row = self.row(backend.name, problem)
        device = None if row is None else row.seconds(Work.of(problem, backend))
        if row is None or device is None:
            return None
        batch, heads, n, d = problem.q.shape
        share = 1.0
        if not getattr(backend, "splits_keys", False):
            programs = batch * heads * -(-n // getattr(backend, "BLOCK", (64, 64))[0])
            share = min(1.0, programs / _processors(problem.q.device))
        flops = 2 * (d + problem.v.shape[3]) * (1 + BACKWARD * problem.wants_gradients) * batch * heads
        host = row.host
        if isinstance(problem.where, Plan) and not problem.where.derived:
            host += row.tables
        return max(host, device * flops / share)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def table_for(device: torch.device) -> Table | None:
    """The table of a device's compute capability: the user's own, else the package's, else None."""
    return table_of(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


@functools.cache
def table_of(major: int, minor: int) -> Table | None:
    """The table of a compute capability, read once."""
    for path in (user_path(major, minor), MEASURED / f"sm_{major}{minor}.json"):
        if path.is_file():
            return Table.load(path)
    return None


def user_path(major: int, minor: int) -> Path:
    """Where `measure` writes: saccade/sm_90.json in XDG_CACHE_HOME, or in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "saccade" / f"sm_{major}{minor}.json"
