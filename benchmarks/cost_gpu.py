"""Rates for the cost model of `saccade.softmax.cost`, and how well it forecasts patterns that it was not fitted to.

    python benchmarks/cost_gpu.py measure     # on a GPU; --only ordered for a part
    python benchmarks/cost_gpu.py fit         # anywhere

`measure` times forward attention, in CUDA graphs, so on the device alone. `fit` reads those times, finds the rates of
each kind of list from the cases meant for it, writes src/saccade/softmax/measured/cost_<capability>.json, and sets
forecast beside time for all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, show, stamp

from saccade.softmax import attend
from saccade.softmax.cost import (
    CELLS,
    DENSE,
    MEASURED,
    TILES,
    Rates,
    comparisons,
    dense,
    forecast,
    kind,
    steps,
)
from saccade.where import Band, Blocks, Causal, Dilated, Full, Neighborhood, Pattern, Plan, Sinks, Strided, Window

NAME = "cost_gpu"
HEAD_DIMS = (64, 128)
FIT: dict[str, list[tuple[Pattern, int, int]]] = {  # (pattern, tokens, heads) by kind of list
    "dense": [
        *((Full(), n, h) for n, h in ((2048, 8), (4096, 16), (16384, 4), (32768, 4))),
        *((Causal(), n, h) for n, h in ((2048, 16), (8192, 8), (16384, 16), (32768, 4))),
    ],
    "plain": [
        (Full(), 4096, 16),
        (Causal(), 8192, 16),
        (Causal() & Window(512), 16384, 16),
        (Causal() & Window(2048), 16384, 16),
        (Causal() & Window(1024), 4096, 8),
        (Causal() & (Window(256) | Sinks(4)), 16384, 16),
        (Band(300, 300), 65536, 4),
        (Blocks(256), 32768, 8),
    ],
    "ordered": [
        (Neighborhood((128, 128), 33), 16384, 16),
        (Neighborhood((128, 128), 13), 16384, 16),
        (Neighborhood((64, 64), 21), 4096, 16),
        (Neighborhood((16, 32, 32), (5, 9, 9)), 16384, 16),
        (Neighborhood((128, 128), 11, 1, 2), 16384, 16),
        (Causal() & Strided(16), 32768, 8),
        (Causal() & Strided(64), 65536, 8),
        (Neighborhood((90, 90), 13), 8100, 16),
        (Neighborhood((100, 100), 17), 10000, 16),
        (Neighborhood((140, 140), 29), 19600, 8),
        (Neighborhood((128, 128), 7, 1, 4), 16384, 16),
        (Dilated(128, 4), 16384, 16),
        (Neighborhood((256, 256), 7), 65536, 4),
    ],
    "cells": [
        (Neighborhood((128, 128), 33), 16384, 16),
        (Neighborhood((128, 128), 13), 16384, 16),
        (Neighborhood((64, 64), 21), 4096, 16),
        (Neighborhood((16, 32, 32), (5, 9, 9)), 16384, 16),
        (Neighborhood((128, 128), 49), 16384, 8),
        (Neighborhood((256, 256), 7), 65536, 4),
    ],
}
GRIDS = [
    (Neighborhood((96, 160), 25), 15360, 12),
    (Neighborhood((128, 128), 16, 4), 16384, 16),
    (Neighborhood((256, 128), (9, 41)), 32768, 8),
    (Neighborhood((120, 120), 9, 1, 3), 14400, 16),
    (Neighborhood((24, 32, 40), (3, 11, 11)), 30720, 8),
    (Neighborhood((16, 48, 48), (4, 8, 8), (2, 4, 4)), 36864, 8),
    (Neighborhood((32, 32, 32), 9, 1, 1, (True, False, False)), 32768, 8),
]
HELD_OUT = {
    "dense": [(Full(), 8192, 16), (Causal(), 24576, 8)],
    "plain": [
        (Causal() & Window(768), 32768, 8),
        (Causal() & (Window(384) | Sinks(64)), 8192, 16),
        (Band(100, 200), 16384, 12),
        (Causal(), 24576, 8),
        (Causal() & Blocks(1000), 20000, 16),
    ],
    "ordered": [*GRIDS, (Dilated(512, 8), 32768, 8)],
    "cells": [
        (Neighborhood((100, 100), 17), 10000, 16),
        *(case for case in GRIDS if max(case[0].dilation) == 1),
    ],
}
BLOCKS = {
    "dense": (DENSE,),
    "plain": TILES,
    "ordered": TILES,
    "cells": CELLS,
}


@dataclass(frozen=True)
class Case:
    """One call; `sort` is a key of FIT."""

    sort: str
    pattern: Pattern
    tokens: int
    heads: int
    block: tuple[int, int]
    head_dim: int
    held_out: bool

    @property
    def name(self) -> str:
        listed = "dense" if self.sort == "dense" else f"{self.sort} {self.block[0]} x {self.block[1]}"
        return f"{self.pattern}, {self.tokens} tokens, {self.heads} heads, D = {self.head_dim}, {listed}"

    def plan(self, device: str) -> Plan:
        make = self.pattern.gathered if self.sort == "cells" else self.pattern.plan
        return make(self.tokens, heads=self.heads, block=self.block, device=device)


def cases() -> Iterator[Case]:
    for d, held_out, sort in itertools.product(HEAD_DIMS, (False, True), FIT):
        for block in BLOCKS[sort]:
            for pattern, tokens, heads in (HELD_OUT if held_out else FIT)[sort]:
                yield Case(sort, pattern, tokens, heads, block, d, held_out)


def seconds(case: Case) -> float:
    """Median time of a call on the device."""
    q, k, v = torch.randn(3, 1, case.heads, case.tokens, case.head_dim, device="cuda", dtype=torch.bfloat16)
    where, backend = (case.pattern, "sdpa") if case.sort == "dense" else (case.plan("cuda"), "triton")

    def call() -> torch.Tensor:
        return attend(q, k, v, where, backend=backend)

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    calls = max(2, min(20, int(10 / max(start.elapsed_time(end), 0.1))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(9):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls / 1e3)
    return statistics.median(times)


def measure(only: str, out: Path) -> None:
    """Time every case whose name holds `only`, and add what was found to the results."""
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    found["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    import triton

    about = stamp("cuda") | {"triton": triton.__version__}
    for case in (case for case in cases() if only in case.name):
        row = {"case": case.name, "held out": case.held_out, "seconds": seconds(case)} | about
        found["rows"] = [old for old in found["rows"] if old["case"] != case.name] + [row]
        print(f"{row['seconds'] * 1e3:9.3f} ms  {case.name}", flush=True)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


class Counted:
    """What a case's forecast is made of, worked out once."""

    def __init__(self, case: Case, row: dict[str, Any], multiprocessors: int) -> None:
        self.case, self.row, self.multiprocessors = case, row, multiprocessors
        self.kind, self.features = "dense", []
        if case.sort != "dense":
            plan = case.plan("cpu")
            self.kind = kind(plan, tokens=case.sort == "cells")
            full, partial = steps(plan)[self.kind]
            order = [part.flip(1)[plan.group_of.flatten()].flatten().double() for part in (full, partial)]
            self.features = [torch.ones_like(order[0]), *order, order[1] * comparisons(plan)]

    def forecast(self, rates: Rates) -> float:
        case = self.case
        if case.sort == "dense":
            n = case.tokens
            return dense(n, n, isinstance(case.pattern, Causal), _Just(rates, self.multiprocessors), case.heads, 0)
        programs = sum(x * rate for x, rate in zip(self.features, rates[1:5], strict=True))
        return forecast(programs, self.multiprocessors, rates)


@dataclass(frozen=True)
class _Just:
    """A chip of one set of rates."""

    rates: Rates
    multiprocessors: int

    def at(self, head_dim: int, kind: str) -> Rates:
        return self.rates


START = Rates(launch=5e-6, row=2e-6, full=5e-7, partial=5e-7, axis=1e-7, latency=2.0)  # of tiles of 64 x 64


def fitted(counted: list[Counted]) -> Rates:
    """Rates whose forecasts are nearest, in ratios, to the times of these cases."""
    import numpy as np
    from scipy.optimize import least_squares

    rows, cols = (side / 64 for side in counted[0].case.block)
    start = (START.launch, START.row * rows, *(rate * rows * cols for rate in START[2:5]))

    def rates(x: Any) -> Rates:
        grown = [a * float(np.exp(b)) for a, b in zip(start, x[:5], strict=True)]
        return Rates(*grown, 1 + (START.latency - 1) * float(np.exp(x[5])))

    def residuals(x: Any) -> Any:
        apart = [np.log(each.forecast(rates(x)) / each.row["seconds"]) for each in counted]
        return np.array([*apart, *(0.003 * x)])  # what the cases leave open stays near its start

    return rates(least_squares(residuals, np.zeros(6), diff_step=1e-3).x)


def fit(out: Path) -> None:
    """Rates from the cases meant for it; forecasts for all."""
    found = json.loads(out.read_text())
    rows = {row["case"]: row for row in found["rows"]}
    for case in cases():
        if case.name in rows:
            rows[case.name]["held out"] = case.held_out
    of = [Counted(case, rows[case.name], found["multiprocessors"]) for case in cases() if case.name in rows]
    tables: dict[str, dict[str, Any]] = {}
    for d, name in sorted({(each.case.head_dim, each.kind) for each in of}):
        own = [each for each in of if (each.case.head_dim, each.kind) == (d, name)]
        rates = fitted([each for each in own if not each.case.held_out])
        tables.setdefault(str(d), {})[name] = {key: float(f"{rate:.4g}") for key, rate in rates._asdict().items()}
        for each in own:
            each.row["forecast"] = float(f"{each.forecast(rates):.4g}")
            each.row["error"] = round(each.row["forecast"] / each.row["seconds"] - 1, 3)
    out.write_text(json.dumps(found, indent=1) + "\n")
    about = {key: of[0].row[key] for key in ("date", "torch", "triton")}
    whole = {"device": of[0].row["machine"], **about, "multiprocessors": found["multiprocessors"]}
    path = MEASURED / f"cost_{found['capability']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole | {"rates by head dim": tables}, indent=1) + "\n")
    for held_out in (False, True):
        kept = [
            {
                "case": each.row["case"],
                "ms": f"{each.row['seconds'] * 1e3:.3f}",
                "forecast": f"{each.row['forecast'] * 1e3:.3f}",
                "error": f"{each.row['error']:+.1%}",
            }
            for each in of
            if each.case.held_out == held_out
        ]
        show("held out" if held_out else "fitted to", kept)
        worst = max(abs(each.row["error"]) for each in of if each.case.held_out == held_out)
        print(f"largest error {worst:.1%}")
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("--only", default="", help="a part of a case's name")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.only, given.out)
    else:
        fit(given.out)


if __name__ == "__main__":
    main()
