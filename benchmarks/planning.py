"""What a plan costs: seconds, and the peak of memory beside what is there before, for long and for large."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from common import Others, save, show

from saccade.bench.memory import peak_bytes
from saccade.where import Causal, Neighborhood, Pattern, PerHead, Sinks, Strided, Window

GRID = (64, 128, 128)
# (name, pattern, tokens, heads, block)
CASES: list[tuple[str, Pattern, int, int, tuple[int, int]]] = [
    ("Causal() & Window(1024)", Causal() & Window(1024), 1_048_576, 1, (128, 128)),
    ("Causal() & (Window(1024) | Sinks(4))", Causal() & (Window(1024) | Sinks(4)), 1_048_576, 1, (128, 128)),
    ("Causal()", Causal(), 131_072, 1, (128, 128)),
    ("Causal() & Strided(512)", Causal() & Strided(512), 131_072, 1, (128, 128)),
    ("8 heads, 2 patterns", PerHead([Window(256), Window(1024)] * 4), 262_144, 8, (128, 128)),
    ("Neighborhood((64, 128, 128), 7)", Neighborhood(GRID, 7), 1_048_576, 1, (128, 128)),
    ("Neighborhood((64, 128, 128), (5, 13, 13))", Neighborhood(GRID, (5, 13, 13)), 1_048_576, 1, (128, 128)),
]


def measure(pattern: Pattern, tokens: int, heads: int, block: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Median seconds over `repeats`, peak and kept MiB, tiles listed."""
    plan = pattern.plan(tokens, heads=heads, block=block)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        pattern.plan(tokens, heads=heads, block=block)
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes(lambda: pattern.plan(tokens, heads=heads, block=block))
    pairs = plan.num_groups * plan.num_row_tiles * plan.num_col_tiles
    return {
        "seconds": round(float(np.median(seconds)), 3),
        "slowest": round(max(seconds), 3),
        "peak MiB": round(peak / 2**20, 1),
        "plan MiB": round(plan.nbytes / 2**20, 1),
        "tiles": plan.num_tiles,
        "share of all tiles": f"{plan.num_tiles / pairs:.2e}",
        "full tiles": f"{float(plan.num_full.sum()) / plan.num_tiles:.1%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    rows = []
    for name, pattern, tokens, heads, block in CASES:
        about = {"pattern": name, "tokens": tokens, "heads": heads, "block": f"{block[0]} x {block[1]}"}
        with Others() as others:
            own = measure(pattern, tokens, heads, block, given.repeats)
        rows.append(about | own | {"other cores busy": others.cores})
    show("planning", rows)
    save("planning", rows)


if __name__ == "__main__":
    main()
