"""One token on a GPU: what a decoder's step of each kind of state costs, beside the device's copy rate.

python benchmarks/step_gpu.py [--only TEXT] [--seconds S]

q, k, v in bfloat16, states and gates in float32. `ms` is a call within a replayed CUDA graph of calls that go round
several states, more bytes than the second-level cache holds; `host us` is a call as Python makes it, when nothing waits
for the device. `GB` are the bytes of the state that are read and written. States are untracked, as a decoder's are; a
row that says otherwise has the transition too, which may be as large as the memory. `share of copy` is their rate over
that at which the device copies 1 GiB, read and written, measured beside; `over a copy` the time over that of a copy of
as many bytes in such a graph, for of a small state much of the time is the launch. flash-linear-attention (`pip install
flash-linear-attention`) is given its own layout of the same values and left out where it is not installed or refuses;
it keeps no transition. All take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import save, show
from decode_gpu import captured
from scan_gpu import copy_rate
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from saccade.bench.timing import Samples, clock_for, ratio, rounds
from saccade.scan import UNTRACKED, Matrix, State, delta_rule, linear_attention, selective_scan

Step = Callable[[State], tuple[Tensor, State]]
CALLS = 200  # of which the host's time is the mean
CACHE = 100 << 20  # bytes, more than any second-level cache so far


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@dataclass(frozen=True)
class Heads:
    """A memory a head; `groups` heads of keys, gates "none", "constant", "scalar" or "vector"."""

    batch: int = 64
    heads: int = 16
    groups: int = 16
    dim: int = 128
    gate: str = "none"
    normalizer: str | None = None
    tracked: bool = False

    @property
    def name(self) -> str:
        shared = "" if self.groups == self.heads else f" over {self.groups}"
        norm = f", {self.normalizer} normalizer" if self.normalizer else ""
        kind = f"tracked {self.kind}" if self.tracked else self.kind
        return f"{kind}, {self.gate} gate{norm}, B {self.batch}, H {self.heads}{shared}, D {self.dim}"

    kind = "linear"

    def tokens(self) -> list[Tensor]:
        q = draw(self.batch, self.heads, 1, self.dim, dtype=torch.bfloat16)
        return [q, *(draw(self.batch, self.groups, 1, self.dim, dtype=torch.bfloat16) for _ in range(2))]

    def gates(self) -> Tensor | None:
        """Decays as a trained model has them, most of them slow."""
        shape = {
            "none": None,
            "constant": (self.groups,),
            "scalar": (self.batch, self.groups, 1),
            "vector": (self.batch, self.groups, 1, self.dim),
        }[self.gate]
        return None if shape is None else logsigmoid(draw(*shape)) / 16

    def state(self) -> State:
        """As a step returns it: with a normalizer, the columns of its memory one after another."""
        width = self.dim + (self.normalizer is not None)
        memory = draw(self.batch, self.groups, width, self.dim).mT
        memory = memory if self.normalizer else memory.contiguous()
        return State(memory, self.transition() if self.tracked else UNTRACKED)

    def transition(self) -> Tensor | Matrix | None:
        if self.gate == "none":
            return None
        return -draw(self.batch, self.groups, self.dim if self.gate == "vector" else 1, 1).abs()

    def step(self) -> Step:
        (q, k, v), g = self.tokens(), self.gates()
        return lambda state: linear_attention(  # type: ignore[return-value]
            q, k, v, log_decay=g, normalizer=self.normalizer, state=state, return_state=True
        )

    def moved(self) -> int:
        return 2 * self.state().nbytes

    def theirs(self) -> Step | None:
        """The same of flash-linear-attention, where it has the like."""
        if self.normalizer is not None or self.gate == "constant":
            return None
        from fla.ops.gla import fused_recurrent_gla
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        q, k, v = (x.transpose(1, 2).contiguous() for x in self.tokens())
        g = self.gates()
        g = None if g is None else g.transpose(1, 2).contiguous()
        call = fused_recurrent_gla if self.gate == "vector" else fused_recurrent_simple_gla
        return lambda state: call(q, k, v, g, scale=1.0, initial_state=state.memory, output_final_state=True)


@dataclass(frozen=True)
class Delta(Heads):
    """Likewise under the delta rule; a tracked transition is a matrix as large as the memory."""

    kind = "delta"

    def transition(self) -> Tensor | Matrix | None:
        return Matrix(torch.eye(self.dim, device="cuda").repeat(self.batch, self.groups, 1, 1))

    def step(self) -> Step:
        (q, k, v), g, beta = self.tokens(), self.gates(), draw(self.batch, self.groups, 1).sigmoid()
        k = normalize(k, dim=-1)
        return lambda state: delta_rule(  # type: ignore[return-value]
            q, k, v, beta, log_decay=g, state=state, return_state=True
        )

    def theirs(self) -> Step | None:
        if self.gate != "scalar":
            return None
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        q, k, v = (x.transpose(1, 2).contiguous() for x in self.tokens())
        gates = self.gates()
        g = None if gates is None else gates.transpose(1, 2).contiguous()
        k, beta = normalize(k, dim=-1), draw(self.batch, 1, self.groups).sigmoid()
        return lambda state: fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=1.0, initial_state=state.memory, output_final_state=True
        )


@dataclass(frozen=True)
class Selective:
    """A small state a channel; a tracked transition, a decay an entry, is as large as the memory."""

    batch: int = 64
    channels: int = 4096
    states: int = 64
    groups: int = 1
    tracked: bool = False

    @property
    def name(self) -> str:
        kind = "tracked selective" if self.tracked else "selective"
        return f"{kind}, B {self.batch}, {self.channels} channels, {self.states} states, G {self.groups}"

    def state(self) -> State:
        shape = (self.batch, self.channels, self.states, 1)
        return State(draw(*shape), -draw(*shape).abs() if self.tracked else UNTRACKED)

    def step(self) -> Step:
        x, delta, z = (draw(self.batch, 1, self.channels, dtype=torch.bfloat16) for _ in range(3))
        b, c = (draw(self.batch, 1, self.groups, self.states, dtype=torch.bfloat16) for _ in range(2))
        rates, direct, bias = -draw(self.channels, self.states).exp(), draw(self.channels), draw(self.channels)
        return lambda state: selective_scan(
            x, delta, rates, b, c, D=direct, z=z, delta_bias=bias, delta_softplus=True, state=state, return_state=True
        )

    def moved(self) -> int:
        return 2 * self.state().nbytes

    def theirs(self) -> Step | None:
        return None


CASES: list[Heads | Selective] = [
    *(Heads(gate=gate) for gate in ("none", "constant", "scalar", "vector")),
    Heads(gate="scalar", normalizer="sum"),
    Heads(gate="scalar", heads=32, groups=8, batch=128),
    Heads(gate="scalar", dim=64, batch=256),
    Heads(gate="vector", dim=256, heads=8, groups=8, batch=32),
    Heads(gate="scalar", batch=1),
    Heads(gate="scalar", tracked=True),
    *(Delta(gate=gate) for gate in ("none", "scalar", "vector")),
    Delta(gate="scalar", dim=64, batch=256),
    Delta(gate="scalar", dim=256, heads=8, groups=8, batch=32),
    Delta(gate="scalar", batch=1),
    Delta(gate="scalar", tracked=True),
    Selective(),
    Selective(tracked=True),
    Selective(states=16),
    Selective(states=16, batch=256),
    Selective(states=128, groups=8),
    Selective(batch=1, states=16),
]


def tensors(state: State) -> list[Tensor]:
    """What a step reads and writes of it."""
    transition = state.transition.value if isinstance(state.transition, Matrix) else state.transition
    return [state.memory, transition] if isinstance(transition, Tensor) else [state.memory]


def host(step: Step, state: State) -> float:
    """Seconds that Python is busy with a call."""
    for _ in range(3):
        step(state)
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(CALLS):
            step(state)
        best = min(best, (time.perf_counter() - start) / CALLS)
        torch.cuda.synchronize()
    return best


@torch.no_grad()
def measure(case: Heads | Selective, seconds: float, rate: float) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    moved, step = case.moved(), case.step()
    states = [case.state() for _ in range(max(4, min(64, -(-2 * CACHE // moved))))]

    def each(step: Step) -> list[Callable[[], object]]:
        results: list[Any] = [None] * len(states)  # kept, so that no two calls of a graph write the same memory

        def call(at: int) -> None:
            results[at] = step(states[at])

        return [partial(call, at) for at in range(len(states))]

    def copy(at: int) -> None:
        for source, target in copies[at]:
            target.copy_(source)

    copies = [[(x, torch.empty_like(x)) for x in tensors(state)] for state in states]
    calls = {"ours": captured(each(step)), "copy": captured([partial(copy, at) for at in range(len(states))])}
    if importlib.util.find_spec("fla") is not None:
        try:
            theirs = case.theirs()
            if theirs is not None:
                calls["fla"] = captured(each(theirs))
        except Exception as refusal:  # a peer that cannot do this work is left out, and said so
            print(f"fla cannot: {type(refusal).__name__}: {str(refusal)[:200]}")
    ours = calls.pop("ours")
    timed = rounds(list(calls.values()), ours, seconds=seconds, clock=clock_for("cuda"))
    found = dict(zip(calls, timed, strict=True))
    mine = found["copy"].baseline_seconds / len(states)
    row: dict[str, Any] = {"ms": round(mine * 1e3, 4), "GB": round(moved / 1e9, 4), "GB/s": round(moved / mine / 1e9)}
    row["share of copy"] = round(moved / mine / rate, 3)
    row["over a copy"] = round(mine / (found["copy"].seconds / len(states)), 3)
    less = replace(case, batch=1)  # so that the device keeps up with the host
    row["host us"] = round(host(less.step(), less.state()) * 1e6, 1)
    if "fla" in found:
        faster = ratio(Samples(found["fla"].baseline, found["fla"].function))  # theirs over ours
        row |= {"fla ms": round(found["fla"].seconds / len(states) * 1e3, 4), "over fla": round(faster.median, 3)}
        row |= {
            f"over fla {end}": value and round(value, 3) for end, value in (("low", faster.low), ("high", faster.high))
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    options = parser.parse_args()
    rate, rows = copy_rate(), []
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    for case in CASES:
        if options.only not in case.name:
            continue
        rows.append({"pattern": case.name, "tokens": 1, **measure(case, options.seconds, rate)})
        print(rows[-1], flush=True)
        save("step_gpu", rows[-1:], device="cuda", dtype="bfloat16", copy_bytes_per_second=round(rate))
    shown = ("pattern", "ms", "GB", "GB/s", "share of copy", "over a copy", "host us", "fla ms", "over fla")
    show("One token of a decoder", [{name: row.get(name) for name in shown} for row in rows])


if __name__ == "__main__":
    main()
