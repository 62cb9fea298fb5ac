"""Every static mechanism on a GPU beside the fastest dense attention of the same shape.

python benchmarks/static_gpu.py [--only TEXT] [--seconds S]

B = 1, H = 16, D = 128, N = 16,384 tokens (a grid of 128 x 128, or 16 x 32 x 32), bfloat16, the paper's parameters,
forward. Mechanisms of the families static_sparse and spatial_window that follow a plan, in eager PyTorch, all of a call
counted. `effective` is how many times faster than dense attention it is; `of the bound` is the time over tile density x
dense time: 1 would be a call that does nothing but multiply the tiles that its plan lists, at the dense rate. Dense is
causal where the mechanism is. What binds a call is told by the rest: `calls` of `attend` and their backends,
`multiplied`, the share of the pairs that these calls multiply, `host ms` until a call returns, with the device idle,
and `plan ms`, of a plan made afresh and waited for, which calls after the first have at hand.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import save, show
from torch import Tensor

from saccade import attend
from saccade.bench.timing import clock_for, rounds
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Attention, Dims
from saccade.softmax import explain
from saccade.softmax.backends import Backend, choose
from saccade.softmax.problem import Problem
from saccade.where import Causal, Full

FAMILIES = ("static_sparse", "spatial_window")
TOKENS, HEADS, WIDTH = 16384, 16, 128
GRIDS = {0: None, 1: (TOKENS,), 2: (128, 128), 3: (16, 32, 32)}
DENSE = ("sdpa", "fa4", "hopper", "triton")


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, seconds: float) -> tuple[str, float]:
    """The fastest backend for every key, or for every earlier one, and its seconds."""
    where = Causal() if causal else Full()
    able = [name for name in DENSE if not explain(q, k, v, where)[name]]
    calls = [lambda name=name: attend(q, k, v, where, backend=name) for name in able]
    for call in calls:
        call()
    found = rounds(calls, calls[0], seconds=seconds, clock=clock_for("cuda"))
    return min(zip(able, (one.seconds for one in found), strict=True), key=lambda pair: pair[1])


def observed(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """The calls of `attend` that a call makes: the backend of each, and the pairs that it multiplies."""
    found: list[tuple[str, float]] = []

    def noted(name: str, problem: Problem) -> Backend:
        chosen = choose(name, problem)
        found.append((chosen.name, multiplied(chosen, problem)))
        return chosen

    with mock.patch.object(sys.modules[attend.__module__], "choose", noted):
        call()
    return found


def multiplied(chosen: Backend, problem: Problem) -> float:
    """Pairs that a backend multiplies, of all heads."""
    batch, heads, n, _ = problem.q.shape
    if chosen.name == "sdpa":
        return batch * heads * n * problem.k.shape[2] / (2 if problem.is_causal else 1)
    planned = getattr(chosen, "planned", None)
    plan = problem.plan(getattr(chosen, "BLOCK", (64, 64))) if planned is None else planned(problem)
    return batch * heads * plan.num_computed


def least_ms(call: Callable[[], Any], *, wait: bool, times: int = 5) -> float:
    """Milliseconds of the fastest of a few calls: until the device is done, if `wait`, else until the host goes on."""
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if wait:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(min(seconds) * 1e3, 4)


def measure(cls: type[Attention], against: dict[bool, tuple[str, float]], seconds: float) -> dict[str, Any] | None:
    """One row; None where it follows no plan at these sizes, or where nothing is left out."""
    grid = GRIDS[cls.spec.ranks[0]]
    torch.manual_seed(0)
    module = cls(Dims(HEADS, WIDTH, grid=grid)).to("cuda", torch.bfloat16).eval()
    q, k, v = (torch.randn(1, HEADS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    plan = module.plan(q, k)
    if plan is None or plan.density == 1:
        return None
    causal = plan.causal
    name, whole = against[causal]
    where = Causal() if causal else Full()
    for call in (calls := [lambda: module(q, k, v), lambda: attend(q, k, v, where, backend=name)]):
        call()
    (found,) = rounds(calls[:1], calls[1], seconds=seconds, clock=clock_for("cuda"))
    admissible = TOKENS * (TOKENS + 1) / 2 if causal else TOKENS**2
    tiles = plan.num_computed / admissible
    calls_made = observed(lambda: module(q, k, v))
    counts = Counter(name for name, _ in calls_made)
    return {
        "pattern": cls.spec.id,
        "tokens": TOKENS,
        "density": round(plan.density, 4),
        "tile density": round(tiles, 4),
        "ms": round(found.seconds * 1e3, 4),
        "dense": f"{name}, {'causal' if causal else 'full'}",
        "dense ms": round(found.baseline_seconds * 1e3, 4),
        "effective": round(found.baseline_seconds / found.seconds, 2),
        "of the bound": round(found.seconds / (tiles * min(whole, found.baseline_seconds)), 2),
        "calls": ", ".join(f"{count} {name}" for name, count in counts.items()),
        "multiplied": round(sum(pairs for _, pairs in calls_made) / (HEADS * admissible), 4),
        "host ms": least_ms(lambda: module(q, k, v), wait=False),
        "plan ms": least_ms(lambda: module.plan(q, k), wait=True),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mechanisms whose id contains this")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each mechanism")
    options = parser.parse_args()
    q, k, v = (torch.randn(1, HEADS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    against = {causal: dense(q, k, v, causal, options.seconds) for causal in (False, True)}
    rows = []
    for spec in mechanisms():
        cls = mechanism(spec.id)
        if spec.family not in FAMILIES or not issubclass(cls, Attention) or options.only not in spec.id:
            continue
        try:
            row = measure(cls, against, options.seconds)
        except Exception as error:  # one that declines these sizes is told, and the rest are measured
            print(f"{spec.id}: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
            continue
        if row is None:
            print(f"{spec.id}: follows no plan that leaves pairs out", flush=True)
            continue
        rows.append(row)
        print({name: row[name] for name in ("pattern", "effective", "of the bound", "calls")}, flush=True)
        save("static_gpu", [row], device="cuda", heads=HEADS, head_dim=WIDTH, dtype="bfloat16")
    rows.sort(key=lambda row: row["of the bound"])
    show("Static mechanisms", rows)


if __name__ == "__main__":
    main()
