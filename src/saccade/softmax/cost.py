"""What attention over a plan will cost on a GPU, worked out from the plan before anything runs.

A kernel takes one program a query tile and head, whose work is that of the steps that its list names:

    w = row + full F + partial P + axis A P,    seconds of a multiprocessor

F and P full and partial tiles, cells, or chunks of single keys; A the comparisons that a partial one needs, boxes times
axes. Programs start in order on whichever multiprocessor has least to do, so

    seconds = launch + max over multiprocessors of the sum of their w + (latency - 1) w of the last programs

where latency is how much longer a program takes whose multiprocessor waits for it alone. The rates are those of one
kind of GPU, fitted to micro-benchmarks (`benchmarks/cost_gpu.py`) and kept in `measured/`: a file a compute capability,
with a table a head dim and a kind of list. What comes out is time on the device, forward, in two-byte numbers.
"""

from __future__ import annotations

import functools
import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.errors import known, positive
from saccade.where import Plan

MEASURED = Path(__file__).parent / "measured"
CHUNK = 64  # single keys a step
TILES = ((128, 128), (64, 64))  # tiles, and cells of `Pattern.gathered`, that rates were measured for
CELLS = ((64, 64),)
DENSE = (128, 128)  # tiles that dense attention is counted in
WITHIN = 0.15  # of the time, on patterns that the rates were not fitted to
SIMULATED = 2**15  # programs that are dealt out one by one


class Rates(NamedTuple):
    """Seconds of one multiprocessor: see the head of this file; launch in seconds, latency a ratio >= 1."""

    launch: float
    row: float
    full: float
    partial: float
    axis: float
    latency: float


@dataclass(frozen=True)
class Chip:
    """A kind of GPU: multiprocessors, and rates by head dim and kind of list (`kind`)."""

    device: str
    multiprocessors: int
    rates: dict[int, dict[str, Rates]]

    @classmethod
    def of(cls, capability: str) -> Chip:
        """The measured one of a compute capability, such as "sm_90"."""
        choices = sorted(path.stem.removeprefix("cost_") for path in MEASURED.glob("cost_*.json"))
        return _read(MEASURED / f"cost_{known('capability', capability, choices)}.json")

    def at(self, head_dim: int, kind: str) -> Rates:
        """Rates at any head dim, on the line through the nearest two that were measured."""
        measured = {d: kinds[kind] for d, kinds in self.rates.items() if kind in kinds}
        if not measured:
            choices = ", ".join(sorted({kind for kinds in self.rates.values() for kind in kinds} - {"dense"}))
            raise ValueError(f"plan: no rates for {kind} on {self.device}; plan for one of {choices}")
        if len(measured) == 1:
            return next(iter(measured.values()))
        low, high = sorted(sorted(measured, key=lambda d: abs(d - head_dim))[:2])
        share = (head_dim - low) / (high - low)
        between = (max(0.0, a + share * (b - a)) for a, b in zip(measured[low], measured[high], strict=True))
        return Rates(*between)


@functools.cache
def _read(path: Path) -> Chip:
    found: dict[str, Any] = json.loads(path.read_text())
    rates = {
        int(d): {kind: Rates(**own) for kind, own in kinds.items()} for d, kinds in found["rates by head dim"].items()
    }
    return Chip(found["device"], found["multiprocessors"], rates)


@dataclass(frozen=True)
class Cost:
    """A forecast. seconds, dense_seconds: of the plan, and of dense (or plainly causal) attention beside it.

    attended, computed, admissible: pairs a head that some query sees, that are multiplied, that dense attention has.
    """

    seconds: float
    dense_seconds: float
    attended: float
    computed: float
    admissible: int

    @property
    def speedup(self) -> float:
        """How many times faster than dense attention."""
        return self.dense_seconds / self.seconds

    @property
    def bound(self) -> float:
        """The same if only products counted, and only those that are attended: 1 / density."""
        return self.admissible / self.attended if self.attended else float("inf")

    @property
    def efficiency(self) -> float:
        """Share of the computed pairs that is attended."""
        return self.attended / self.computed if self.computed else 1.0


def cost(plan: Plan, *, batch: int = 1, head_dim: int = 128, capability: str = "sm_90") -> Cost:
    """Forecast of `attend(..., where=plan, backend="triton")`, forward, beside dense attention on the same tensors.

    batch: sequences (default 1); heads are those of the plan. head_dim: D = Dv (default 128). capability: which kind of
    GPU (default "sm_90"); it need not be here. Of 66 calls that the rates were not fitted to 65 came out within 15 % of
    the time, the last within 16 % (`benchmarks/results/cost_gpu.json`). Errors: ValueError for what no rates were
    measured for.

    >>> from saccade.where import Causal, Window
    >>> found = cost((Causal() & Window(1024)).plan(16384, heads=16, block=(128, 128)))
    >>> found.bound > found.speedup > 1
    True
    """
    chip = Chip.of(capability)
    batch, head_dim = positive("batch", batch), positive("head_dim", head_dim)
    work, rates = _work(plan, chip, head_dim)
    group_of = plan.group_of.expand(batch, -1).flatten()
    programs = work.flip(1)[group_of].flatten()
    n, m = plan.num_queries, plan.num_keys
    admissible = n * m - n * (n - 1) // 2 if plan.causal else n * m
    return Cost(
        forecast(programs, chip.multiprocessors, rates),
        dense(n, m, plan.causal, chip, batch * plan.num_heads, head_dim),
        plan.num_attended,
        float(_computed(plan)[plan.group_of].double().mean()),
        admissible,
    )


def kind(plan: Plan, *, tokens: bool = False) -> str:
    """Which rates the tiles, or the single keys, of a plan go by."""
    bq, bk = plan.block
    if tokens:
        return f"keys for tiles of {bq}" if plan.token_grid is None else f"cells of {bk} for tiles of {bq}"
    layout = "plain" if plan.k_order is None else "ordered" if plan.grid is None else "grid"
    return f"{layout} tiles of {bq} x {bk}"


def steps(plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Full and partial steps of each list (G, rows), by their kind; kinds that the plan has none of are left out."""
    found, shape = {}, (plan.num_groups, plan.num_row_tiles)
    if plan.num_tiles:
        full = plan.num_full.long()
        found[kind(plan)] = full.view(shape), (plan.indptr.diff() - full).view(shape)
    if plan.token_indptr is not None:
        count, size = plan.token_indptr.diff(), _step(plan)
        head = torch.zeros_like(count) if plan.token_num_full is None else plan.token_num_full.long() // size
        found[kind(plan, tokens=True)] = head.view(shape), (-(-count // size) - head).view(shape)
    return found


def _step(plan: Plan) -> int:
    """Single keys a step."""
    return CHUNK if plan.token_grid is None else plan.block[1]


def comparisons(plan: Plan) -> int:
    """Comparisons of a coordinate with bounds that a partial step makes: boxes a union times axes."""
    return plan.boxes.lo.shape[1] * plan.boxes.coord.shape[0]


def _work(plan: Plan, chip: Chip, head_dim: int) -> tuple[Tensor, Rates]:
    """w of each list (G, rows) float64, and the rates of the kind that most of it belongs to."""
    parts = {}
    for name, (full, partial) in steps(plan).items():
        rates = chip.at(head_dim, name)
        parts[name] = full * rates.full + partial * (rates.partial + comparisons(plan) * rates.axis), rates
    if not parts:
        rates = chip.at(head_dim, kind(plan))
        parts[kind(plan)] = torch.zeros(plan.num_groups, plan.num_row_tiles), rates
    rates = max(parts.values(), key=lambda part: float(part[0].sum()))[1]
    return torch.stack([part.double() for part, _ in parts.values()]).sum(0).cpu() + rates.row, rates


def _computed(plan: Plan) -> Tensor:
    """Pairs that each group multiplies, (G,)."""
    bq, bk = plan.block
    total = torch.zeros(plan.num_groups, dtype=torch.int64, device=plan.device)
    for name, counts in steps(plan).items():
        total += sum(part.sum(1) for part in counts) * bq * (_step(plan) if name == kind(plan, tokens=True) else bk)
    return total


def dense(n: int, m: int, causal: bool, chip: Chip, heads: int, head_dim: int) -> float:
    """Seconds of dense or plainly causal attention of n queries, the last of m positions, over all `heads`."""
    rates, (bq, bk) = chip.at(head_dim, "dense"), DENSE
    end = torch.arange(1, -(-n // bq) + 1, dtype=torch.float64) * bq + (m - n)
    tiles = torch.full_like(end, -(-m // bk))
    if causal:
        tiles = torch.minimum((end / bk).ceil(), tiles)
    cut = int(causal)  # one tile of each row, on the diagonal
    work = rates.row + (tiles - cut) * rates.full + cut * rates.partial
    return forecast(work.flip(0).repeat(heads), chip.multiprocessors, rates)


def forecast(programs: Tensor, multiprocessors: int, rates: Rates) -> float:
    """Seconds that programs of the given work (P,) take, dealt out in this order."""
    busiest, last = deal(programs, multiprocessors)
    return rates.launch + busiest + (rates.latency - 1) * last


def deal(programs: Tensor, multiprocessors: int) -> tuple[float, float]:
    """(work of the busiest multiprocessor, mean work of the last programs, one a multiprocessor)."""
    last = float(programs[-multiprocessors:].mean())
    if len(programs) > SIMULATED:  # the ends of so many even out: half a program is left over
        return float(programs.sum()) / multiprocessors + last / 2, last
    loads = [0.0] * multiprocessors
    for work in programs.tolist():
        heapq.heapreplace(loads, loads[0] + work)
    return max(loads), last
