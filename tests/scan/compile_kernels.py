"""Compile the kernels of the scans for compute capability 9.0, without a GPU: python compile_kernels.py DTYPE.

Prints a line a kernel; see `saccade.testing.offline`.
"""

import sys
from contextlib import redirect_stdout
from io import StringIO

import torch
import triton

from saccade.scan.kernels import abreast, launch, selective_ops, step_ops
from saccade.scan.kernels.abreast import compiling
from saccade.scan.kernels.delta_launch import DeltaLaunch
from saccade.scan.kernels.launch import Launch, Sizes, Tile
from saccade.testing.offline import compile_only

TOKENS, D, DV = 96, 16, 32  # of several chunks and tiles, the smallest that make every product


def main(dtype: torch.dtype) -> None:
    compile_only(lambda name, _: print(name, flush=True))
    Sizes.of = classmethod(lambda cls, *problem: cls(32, Tile(16, 4, 2)))
    Launch.stretches = 2
    launch.ANCHORED = 64
    first_calls(dtype)
    steps(dtype)
    selective(dtype)
    delta(dtype)
    for gate, strong in ((0, False), (1, False), (1, True), (2, False)):
        for mass in (False, True):
            q, k = (torch.zeros(1, 1 if strong else 2, TOKENS, D, dtype=dtype) for _ in range(2))
            v = torch.zeros(1, 2, TOKENS, DV, dtype=dtype)
            g = [None, torch.zeros(1, 2, TOKENS), torch.zeros(1, 2, TOKENS, D)][gate]
            cu = torch.tensor([0, 40, TOKENS], dtype=torch.int32) if mass else None
            memory = torch.zeros(1 + mass, 2, D, DV)
            sums = torch.zeros(1 + mass, 2, D) if mass else None
            problem = Launch(q, k, v, g, cu, 0.5, mass, g if strong else None)
            o, found, after, after_sums, starts, start_sums = problem.forward(memory, sums, dtype)
            given = (found, after, after_sums) if mass else (None, after, None)
            problem.backward(o, *given, memory, sums, starts, start_sums)


def first_calls(dtype: torch.dtype) -> None:
    """A call whose kernels were compiled side by side compiles none when it launches them."""
    found: list[str] = []

    def note(src, **compiled) -> None:
        found.append(src.name)

    q, k = (torch.zeros(1, 2, TOKENS, D, dtype=dtype) for _ in range(2))
    v, memory = torch.zeros(1, 2, TOKENS, DV, dtype=dtype), torch.zeros(1, 2, D, DV)
    gates, beta = torch.zeros(1, 2, TOKENS), torch.zeros(1, 2, TOKENS)
    linear = Launch(q, k, v, gates, None, 0.5, False)
    delta = DeltaLaunch(q, k, v, gates, None, 0.5, beta)
    triton.knobs.compilation.listener = note
    for trial in (lambda: linear.trial(memory, None, dtype, True), lambda: delta.trial(memory, True)):
        with compiling():
            trial()
        abreast.settle()
        assert found
        found.clear()
        with redirect_stdout(StringIO()):
            trial()
        print(f"compiled late: {found}", flush=True)
    triton.knobs.compilation.listener = None


def steps(dtype: torch.dtype) -> None:
    """One token: without a state before and with one; gates of either kind; shared memories; wide ones in parts."""
    for gate in range(3):
        for known in (False, True):
            for d, mass in ((D, known), (300, not known)):
                q = torch.zeros(2, 6, 1, d, dtype=dtype)
                k, v = torch.zeros(2, 2, 1, d, dtype=dtype), torch.zeros(2, 2, 1, DV, dtype=dtype)
                g = [None, torch.zeros(2, 2, 1), torch.zeros(2, 2, 1, d)][gate]
                turned = torch.zeros(2, 2, DV + mass, d).mT
                memory = (turned if mass else turned.contiguous()) if known else None
                old = torch.zeros(2, 2, d if gate == 2 else 1, 1) if known and gate else None
                if gate == 0:  # more queries a memory than a program takes at a time
                    q = q.repeat(1, 7, 1, 1)
                for ratio in range(1 + 2 * mass):
                    step_ops.linear_step(q, k, v, g, memory, old, 0.5, mass, mass and not ratio, gate > 0, ratio, 1.0)
            if d > 256:
                q, k, g = (x if x is None or x.ndim == 3 else x[..., :256] for x in (q, k, g))
            beta = torch.zeros(2, 6, 1)
            before, product = (torch.zeros(2, 6, 256, n) if known else None for n in (DV, 256))
            for track in (False, True):
                step_ops.delta_step(q, k, v, beta, g, before, product if track else None, 0.5, track)
    for known in (False, True):
        x, single = torch.zeros(2, 1, 24, dtype=dtype), torch.zeros(24) if known else None
        rates, shared = torch.zeros(24, 5), torch.zeros(2, 1, 3, 5, dtype=dtype)
        before = torch.zeros(2, 24, 5) if known else None
        z = x if known else None
        step_ops.selective_step(x, x, rates, shared, shared, single, known, single, z, before, before, known)


def selective(dtype: torch.dtype) -> None:
    """Alone, and with all or some of what a block has besides."""
    x, delta = torch.zeros(1, TOKENS, D, dtype=dtype), torch.zeros(1, TOKENS, D)
    a, b, before, single = torch.zeros(D, 4), torch.zeros(1, TOKENS, 2, 4), torch.zeros(1, D, 4), torch.zeros(D)

    def halved(self: selective_ops.Shape, device: object, gated: bool = False) -> selective_ops.Way:
        return selective_ops.Way(self.fitted(selective_ops.WALK), 2, once=not gated)

    selective_ops.Shape.way = selective_ops.Shape.way_back = halved
    for more in ((None, None, None, False), (single, single, x, True), (single, None, x, False)):
        given = x, delta, a, b, b, before, *more
        y, after, starts = selective_ops.selective(*given)
        selective_ops.selective_backward(y, after, *given, starts)


def delta(dtype: torch.dtype) -> None:
    for gate in (None, torch.zeros(1, 2, TOKENS)):
        q = torch.zeros(1, 4, TOKENS, D, dtype=dtype)
        k, v = torch.zeros(1, 2, TOKENS, D, dtype=dtype), torch.zeros(1, 2, TOKENS, DV, dtype=dtype)
        cu = None if gate is None else torch.tensor([0, 40, TOKENS], dtype=torch.int32)
        memory = torch.zeros(1 if cu is None else 2, 2, D, DV)
        for DeltaLaunch.stretches in (1, 2):
            DeltaLaunch(q, k, v, gate, cu, 0.5, torch.zeros(1, 2, TOKENS)).trial(memory, True)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
