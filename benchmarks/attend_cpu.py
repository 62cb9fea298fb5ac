"""Sparse attention on the CPU against PyTorch's own: the tiles backend beside scaled_dot_product_attention.

Both run in turns, forward and backward apart; the speed-up is the median of the pairs' ratios with a 95 % interval.
B = 1, H = 8, D = 64, float32. The baseline is causal where the pattern is, else it sees every key.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import Others, save, show
from torch.nn.functional import scaled_dot_product_attention

from saccade import attend
from saccade.bench.timing import CpuClock, ratio, rounds
from saccade.where import Blocks, Causal, Dilated, Neighborhood, Pattern, Sinks, Window

HEADS, DIM = 8, 64
# (name, pattern, tokens, bar of forward, bar of backward)
CASES: list[tuple[str, Pattern, int, float | None, float | None]] = [
    ("Causal() & Window(512)", Causal() & Window(512), 8192, 4.0, 3.0),
    ("Causal() & Window(512)", Causal() & Window(512), 4096, None, None),
    ("Causal() & Window(512)", Causal() & Window(512), 2048, None, None),
    ("Causal() & (Window(256) | Sinks(4))", Causal() & (Window(256) | Sinks(4)), 8192, None, None),
    ("Causal() & Blocks(512)", Causal() & Blocks(512), 8192, None, None),
    ("Dilated(64, 8)", Dilated(64, 8), 8192, None, None),
    ("Neighborhood((64, 128), 13)", Neighborhood((64, 128), 13), 8192, None, None),
    ("Causal()", Causal(), 4096, None, None),
]


def measure(pattern: Pattern, tokens: int, seconds: float) -> dict[str, Any]:
    """Speed-up of forward and of backward, seconds of each, and the share of pairs that the pattern leaves."""
    q, k, v, grad = (torch.randn(1, HEADS, tokens, DIM) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = pattern.plan(tokens, heads=HEADS, block=(64, 64))

    def sparse() -> torch.Tensor:
        return attend(q, k, v, pattern, backend="tiles")

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=plan.causal)

    def backward(o: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True)

    def forward(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(function)

    found: dict[str, Any] = {"baseline": "causal" if plan.causal else "full", "density": round(plan.density, 4)}
    pairs = {"forward": (forward(sparse), forward(dense)), "backward": (backward(sparse()), backward(dense()))}
    for name, (ours, theirs) in pairs.items():
        ours()
        theirs()
        (samples,) = rounds([ours], theirs, seconds=seconds, clock=CpuClock())
        speed = ratio(samples)
        found |= {
            name: round(speed.median, 2),
            f"{name} low": None if speed.low is None else round(speed.low, 2),
            f"{name} high": None if speed.high is None else round(speed.high, 2),
            f"{name} ms": round(samples.seconds * 1e3, 1),
            f"{name} baseline ms": round(samples.baseline_seconds * 1e3, 1),
            f"{name} pairs": speed.pairs,
        }
    return found


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the console shows it."""
    shown = {"pattern": row["pattern"], "tokens": row["tokens"], "density": row["density"], "baseline": row["baseline"]}
    for name in ("forward", "backward"):
        interval = "" if row[f"{name} low"] is None else f" [{row[f'{name} low']}, {row[f'{name} high']}]"
        times = f"{row[f'{name} ms']} / {row[f'{name} baseline ms']}"
        shown |= {f"{name} ms": times, f"{name} speed-up": f"{row[name]}x{interval}"}
    bars = [row["forward bar"], row["backward bar"]]
    met = row["forward"] >= bars[0] and row["backward"] >= bars[1] if bars[0] else None
    verdict = "" if met is None else f"{bars[0]}x, {bars[1]}x: {'met' if met else 'missed'}"
    return shown | {"bars": verdict, "other cores": row["other cores busy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each forward and each backward")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = []
    for name, pattern, tokens, forward, backward in CASES:
        if given.only in name:
            with Others() as others:
                own = measure(pattern, tokens, given.seconds)
            bars = {"forward bar": forward, "backward bar": backward}
            rows.append({"pattern": name, "tokens": tokens, **own, **bars, "other cores busy": others.cores})
    if not rows:
        parser.error(f"--only: no case is called {given.only!r}")
    show("tiles against scaled_dot_product_attention", [brief(row) for row in rows])
    save("attend_cpu", rows, batch=1, heads=HEADS, head_dim=DIM, dtype="float32")


if __name__ == "__main__":
    main()
