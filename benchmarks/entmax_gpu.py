"""Entmax attention on a GPU: these kernels beside AdaSplash's (`pip install adasplash`), where that is installed.

alpha = 1.5, causal, B = 1, H = 16, bf16, forward alone and forward with backward, in turns; the speed-up is the median
of the pairs' ratios with a 95 % interval. Queries are normal numbers times `logits`: the larger, the sparser. `in use`:
the share of the listed 64 x 64 tiles in which some weight is not zero. PyTorch's causal softmax attention is the
yardstick of what exact zeros cost.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from common import save, show
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.bench.timing import CudaClock, ratio, rounds
from saccade.softmax.kernels.entmax import Launch, attend_entmax
from saccade.where import Causal

HEADS, BLOCK = 16, (128, 128)
CASES = [(tokens, dim, logits) for dim in (64, 128) for tokens in (4096, 16384) for logits in (1.0, 4.0, 16.0)]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def adasplash() -> Attend | None:
    """AdaSplash for causal entmax 1.5, or None where it is not installed."""
    if importlib.util.find_spec("adasplash") is None:
        return None
    from adasplash import adasplash_v2

    return adasplash_v2


def calls(attend: Attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Callable[[], object], ...]:
    """(forward, forward and backward)."""
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return torch.no_grad()(lambda: attend(*leaves)), step


def measure(tokens: int, dim: int, logits: float, seconds: float) -> dict[str, Any]:
    """Milliseconds and speed-ups of each way, and the share of tiles in use."""
    q, k, v, grad = (torch.randn(1, HEADS, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q *= logits
    plan = Causal().plan(tokens, heads=HEADS, block=BLOCK, device=q.device)
    scale = dim**-0.5
    marks = Launch.of(q, k, v, plan, scale, 1.5).forward(True)[-1]
    found: dict[str, Any] = {"in use": round(float(marks.float().mean()), 3)}
    ours = calls(lambda q, k, v: attend_entmax(q, k, v, plan, scale, 1.5), q, k, v, grad)
    softmax = calls(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v, grad)
    theirs = adasplash()
    others = {"softmax": softmax} | ({} if theirs is None else {"adasplash": calls(theirs, q, k, v, grad)})
    for at, name in enumerate(("forward", "both")):
        for run in (ours, *others.values()):
            run[at]()  # compiled, and tuned where it is
        samples = rounds([run[at] for run in others.values()], ours[at], seconds=seconds, clock=CudaClock("cuda"))
        found[f"{name} ms"] = round(samples[0].baseline_seconds * 1e3, 2)
        for other, sample in zip(others, samples, strict=True):
            slower = ratio(sample)  # ours / theirs
            found[f"{name} {other} ms"] = round(sample.seconds * 1e3, 2)
            if other == "adasplash":
                found[f"{name} speed-up"] = round(1 / slower.median, 2)
                found[f"{name} low"] = None if slower.high is None else round(1 / slower.high, 2)
                found[f"{name} high"] = None if slower.low is None else round(1 / slower.low, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384])
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for tokens, dim, logits in CASES:
        if tokens in given.tokens:
            name = f"Causal(), D {dim}, logits x {logits:g}"
            rows.append({"pattern": name, "tokens": tokens, **measure(tokens, dim, logits, given.seconds)})
    show("entmax 1.5", rows)
    save("entmax_gpu", rows, device="cuda", batch=1, heads=HEADS, dtype="bfloat16", alpha=1.5)


if __name__ == "__main__":
    main()
