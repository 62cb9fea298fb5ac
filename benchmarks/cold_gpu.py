"""First calls of scans on a GPU: each in a process of its own, with no compiled kernel at hand.

    python benchmarks/cold_gpu.py [--only TEXT]

A row: seconds of the first call, forward alone and forward with backward (bfloat16, B = 2, H = 16, 2,048 tokens,
D = 128), from before it to after what it launched; `forward of both`: its forward pass. `again`: the same call once
more, which waits for what it needs of all that the first one has left to be compiled behind it. `left`: what is then
still compiled, and nobody has waited for. PyTorch, this package, CUDA and what PyTorch loads at a first gradient are
there before; Triton's cache is an empty folder, so that every kernel, and Triton's own C, is compiled. `a kernel that
adds`: the same of one Triton kernel of a line, the least that Triton takes. The machine's cores count, for kernels are
compiled side by side. The bar is 2 s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import triton
from common import save, show
from rich.progress import track
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize
from triton import language as tl

from saccade.scan import delta_rule, linear_attention, selective_scan
from saccade.scan.kernels import abreast

BATCH, HEADS, TOKENS, DIM = 2, 16, 2048, 128


@triton.jit
def add(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) + 1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def gate(*shape: int) -> Tensor:
    return logsigmoid(torch.randn(*shape, device="cuda")) / 16


def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    return linear_attention(q, k, v, log_decay=g)


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    return delta_rule(q, k, v, beta, log_decay=g)


def added(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    add[(1,)](x, y, len(x))
    return y


def case(name: str) -> tuple[Any, list[Tensor]]:
    """(function, arguments)."""
    rows = BATCH, HEADS, TOKENS
    q, k, v = drawn(*rows, DIM), normalize(drawn(*rows, DIM), dim=-1), drawn(*rows, DIM)
    beta = torch.rand(*rows, device="cuda")
    x, rates, shared = drawn(BATCH, TOKENS, 2048), -torch.rand(2048, 16, device="cuda"), drawn(BATCH, TOKENS, 16)
    return {
        "a kernel that adds": (added, [q.flatten()[:256]]),
        "linear, no gate": (linear, [q, k, v]),
        "linear, scalar gate": (linear, [q, k, v, gate(*rows)]),
        "linear, vector gate": (linear, [q, k, v, gate(*rows, DIM)]),
        "delta, no gate": (delta, [q, k, v, beta]),
        "delta, scalar gate": (delta, [q, k, v, beta, gate(*rows)]),
        "selective": (selective_scan, [x, x.abs(), rates, shared, shared.clone()]),
    }[name]


CASES = (
    "a kernel that adds",
    "linear, no gate",
    "linear, scalar gate",
    "linear, vector gate",
    "delta, no gate",
    "delta, scalar gate",
    "selective",
)


def first(name: str, backward: bool) -> list[float]:
    """Seconds, in this process: a first call, its forward pass, the second call, and until nothing is compiled."""
    call, given = case(name)
    given = [x.detach().requires_grad_(backward) for x in given]
    some = torch.ones(2, 2, device="cuda", requires_grad=True)
    torch.autograd.grad(some @ some, some, torch.ones_like(some))  # what PyTorch loads at a first product and gradient
    torch.cuda.synchronize()
    found = []
    for _ in range(2):
        start = time.perf_counter()
        o = call(*given)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        if backward:
            torch.autograd.grad(o, given, torch.ones_like(o))
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    start = time.perf_counter()
    abreast.settle()
    forward, whole, _, again = found
    return [whole, forward, again, time.perf_counter() - start]


def alone(name: str, backward: bool) -> list[float]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TRITON_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--one", name, *(["--backward"] if backward else [])]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [round(float(x), 2) for x in found.stdout.split()[-4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--one", choices=CASES, help="measure here, and print the seconds")
    parser.add_argument("--backward", action="store_true", help="with gradients, of --one")
    given = parser.parse_args()
    if given.one:
        print(*first(given.one, given.backward))
        return
    rows = []
    for name in track([name for name in CASES if given.only in name], "first calls"):
        row: dict[str, Any] = {"pattern": name, "tokens": TOKENS}
        row["forward s"], _, row["again s"], row["left s"] = alone(name, False)
        if name != CASES[0]:
            row["both s"], row["forward of both s"], row["both again s"], row["both left s"] = alone(name, True)
        rows.append(row)
        save("cold_gpu", [row], device="cuda", cores=os.cpu_count(), batch=BATCH, heads=HEADS, dim=DIM)
    show("first calls", rows)


if __name__ == "__main__":
    main()
