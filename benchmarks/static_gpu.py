"""Every static mechanism on a GPU beside the fastest dense attention of the same shape.

python benchmarks/static_gpu.py [--only TEXT] [--seconds S]

B = 1, H = 16, D = 128, N = 16,384 tokens (a grid of 128 x 128, or 16 x 32 x 32), bfloat16, the paper's parameters,
forward. Mechanisms of the families static_sparse and spatial_window that follow a plan, in eager PyTorch, all of a call
counted. `effective` is how many times faster than dense attention it is; `of the bound` is the time over tile density x
dense time: 1 would be a call that does nothing but multiply the tiles that its plan lists, at the dense rate. Dense is
causal where the mechanism is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import save, show
from torch import Tensor

from saccade import attend
from saccade.bench.timing import clock_for, rounds
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Attention, Dims
from saccade.softmax import explain, which
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
    pattern = getattr(module, "pattern", None)
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
        "backend": None if pattern is None or callable(pattern) else which(q, k, v, pattern),
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
        print({name: row[name] for name in ("pattern", "effective", "of the bound", "backend")}, flush=True)
        save("static_gpu", [row], device="cuda", heads=HEADS, head_dim=WIDTH, dtype="bfloat16")
    rows.sort(key=lambda row: row["of the bound"])
    show("Static mechanisms", rows)


if __name__ == "__main__":
    main()
