"""What a plan costs: seconds, and the peak of memory beside what is there before, for long and for large.

With --device cuda the time of a plan, and of its transposed lists, until the device has them, and until the host has
asked for them and may go on; PyTorch raises an error where it would have to wait in between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Others, save, show

from saccade.bench.memory import peak_bytes
from saccade.where import (
    Band,
    Blocks,
    Causal,
    Dilated,
    Documents,
    Full,
    Neighborhood,
    Pattern,
    PerHead,
    Plan,
    Prefix,
    Sinks,
    Strided,
    Window,
)

GRID = (64, 128, 128)
RAGGED = (63, 127, 131)
PLANE = (1024, 1024)
MILLION = 1_048_576
# (name, pattern, tokens, heads, block)
Case = tuple[str, Pattern, int, int, tuple[int, int]]
CASES: list[Case] = [
    ("Causal() & Window(1024)", Causal() & Window(1024), MILLION, 1, (128, 128)),
    ("Causal() & (Window(1024) | Sinks(4))", Causal() & (Window(1024) | Sinks(4)), MILLION, 1, (128, 128)),
    ("Causal()", Causal(), 131_072, 1, (128, 128)),
    ("Causal() & Strided(512)", Causal() & Strided(512), 131_072, 1, (128, 128)),
    ("8 heads, 2 patterns", PerHead([Window(256), Window(1024)] * 4), 262_144, 8, (128, 128)),
    ("Neighborhood((64, 128, 128), 7)", Neighborhood(GRID, 7), MILLION, 1, (128, 128)),
    ("Neighborhood((64, 128, 128), (5, 13, 13))", Neighborhood(GRID, (5, 13, 13)), MILLION, 1, (128, 128)),
]


def documents(num_tokens: int, count: int) -> Documents:
    """`count` documents of lengths drawn evenly."""
    cuts = torch.randperm(num_tokens - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    return Documents([0, *cuts.sort().values.tolist(), num_tokens])


def on_device() -> list[Case]:
    """Every kind of pattern at a million tokens, or at as many as list fewer than four million tiles."""
    heads = [Causal() & Window(1024), Window(4096), Dilated(128, 8), Causal() & (Window(512) | Sinks(64))]
    near = Neighborhood(PLANE, 33)
    patterns: list[tuple[str, Pattern, int, int]] = [
        ("Full()", Full(), 131_072, 1),
        ("Causal()", Causal(), 131_072, 1),
        ("Causal()", Causal(), 262_144 - 64, 1),
        ("Window(1024)", Window(1024), MILLION, 1),
        ("Causal() & Window(1024)", Causal() & Window(1024), MILLION, 1),
        ("Causal() & (Window(1024) | Sinks(4))", Causal() & (Window(1024) | Sinks(4)), MILLION, 1),
        ("Band(2048, 2048)", Band(2048, 2048), MILLION, 1),
        ("Sinks(64)", Sinks(64), MILLION, 1),
        ("Prefix(16384) | Window(4096)", Prefix(16_384) | Window(4096), MILLION, 1),
        ("Blocks(4096)", Blocks(4096), MILLION, 1),
        ("256 documents", documents(MILLION, 256), MILLION, 1),
        ("256 documents & Causal()", documents(MILLION, 256) & Causal(), MILLION, 1),
        ("4096 documents & Causal()", documents(MILLION, 4096) & Causal(), MILLION, 1),
        ("Dilated(512, 16)", Dilated(512, 16), MILLION, 1),
        ("Strided(512)", Strided(512), MILLION, 1),
        ("Causal() & Strided(512)", Causal() & Strided(512), MILLION, 1),
        ("Causal() & Window(65536) & Strided(64)", Causal() & Window(65_536) & Strided(64), MILLION, 1),
        ("Neighborhood((1048576,), 1025)", Neighborhood((MILLION,), 1025), MILLION, 1),
        ("Neighborhood((1048576,), 255, 16, 4)", Neighborhood((MILLION,), 255, 16, 4), MILLION, 1),
        ("Neighborhood((1024, 1024), 33)", near, MILLION, 1),
        ("Neighborhood((1024, 1024), 33, 8)", Neighborhood(PLANE, 33, 8), MILLION, 1),
        ("Neighborhood((1024, 1024), 17, 4, 3)", Neighborhood(PLANE, 17, 4, 3), MILLION, 1),
        ("Neighborhood((1024, 1024), 33, causal)", Neighborhood(PLANE, 33, causal=True), MILLION, 1),
        ("Neighborhood((64, 128, 128), 7)", Neighborhood(GRID, 7), MILLION, 1),
        ("Neighborhood((64, 128, 128), (5, 13, 13))", Neighborhood(GRID, (5, 13, 13)), MILLION, 1),
        (
            "Neighborhood((64, 128, 128), 8, (2, 4, 4), (1, 2, 2), (causal, no, no))",
            Neighborhood(GRID, 8, (2, 4, 4), (1, 2, 2), (True, False, False)),
            MILLION,
            1,
        ),
        ("Neighborhood((63, 127, 131), 7)", Neighborhood(RAGGED, 7), 63 * 127 * 131, 1),
        ("2-D & 2-D", near & Neighborhood(PLANE, (65, 17)), MILLION, 1),
        ("2-D | 2-D", near | Neighborhood(PLANE, (3, 129)), MILLION, 1),
        ("2-D | Sinks(256)", near | Sinks(256), MILLION, 1),
        ("8 heads, 4 patterns", PerHead(heads * 2), MILLION, 8),
    ]
    return [(*case, (128, 64)) for case in patterns]


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


def timed(work: Callable[[], Plan], repeats: int) -> tuple[float, float, float]:
    """Medians in ms: until the host may go on, on the device, and until both are done."""
    host, device, both = [], [], []
    work()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error")
        begin.record()
        work()
        end.record()
        torch.cuda.set_sync_debug_mode("default")
        asked = time.perf_counter()
        torch.cuda.synchronize()
        both.append(1e3 * (time.perf_counter() - start))
        host.append(1e3 * (asked - start))
        device.append(begin.elapsed_time(end))
    return statistics.median(host), statistics.median(device), statistics.median(both)


def measure_on_device(
    pattern: Pattern, tokens: int, heads: int, block: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Median ms of a plan and of its transposed lists, tiles listed."""
    plan = pattern.plan(tokens, heads=heads, block=block, device="cuda")
    host, device, both = timed(lambda: pattern.plan(tokens, heads=heads, block=block, device="cuda"), repeats)
    turned_host, _, turned = timed(plan.transpose, repeats)
    return {
        "ms": round(both, 3),
        "host ms": round(host, 3),
        "device ms": round(device, 3),
        "transposed ms": round(turned, 3),
        "transposed host ms": round(turned_host, 3),
        "tiles": plan.num_tiles,
        "room": len(plan.indices),
        "plan MiB": round(plan.nbytes / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    cases, measured = (CASES, measure) if given.device == "cpu" else (on_device(), measure_on_device)
    rows = []
    for name, pattern, tokens, heads, block in cases:
        about = {"pattern": name, "tokens": tokens, "heads": heads, "block": f"{block[0]} x {block[1]}"}
        with Others() as others:
            own = measured(pattern, tokens, heads, block, given.repeats)
        rows.append(about | own | {"other cores busy": others.cores})
    show("planning", rows)
    save("planning" if given.device == "cpu" else "planning_gpu", rows, device=given.device)


if __name__ == "__main__":
    main()
