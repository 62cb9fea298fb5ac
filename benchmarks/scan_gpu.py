"""Linear attention and the delta rule on a GPU, beside flash-linear-attention's kernels and dense causal attention.

python benchmarks/scan_gpu.py [--only TEXT] [--seconds S] [--forward]

bfloat16, gates in float32, D = Dv unless said, without a gate, with one a token, and with one a token and channel. All
take turns in one run, the second-level cache flushed before each; flash-linear-attention (`pip install
flash-linear-attention`) is given its own layout of the same values, for which nothing is counted, and is left out where
it is not installed or refuses. `floor` is the time that the bytes take which no algorithm can spare, every input read
and every result written once, at the rate of a copy measured beside: with gradients also their own. `TB/s moved` counts
what our passes read and write, prepared tokens and states at anchors too. `error` is the root mean square difference
from float64 token by token over that of the exact result, for the first 256 tokens of one head.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from attend_gpu import graphed
from common import save, show
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

from saccade.bench.timing import Samples, clock_for, ratio, rounds
from saccade.scan import delta_rule, linear_attention
from saccade.scan.kernels.delta_launch import DeltaLaunch
from saccade.scan.kernels.launch import ANCHORED, Launch

Call = Callable[[], Any]
Attend = Callable[..., Tensor]
GATES = {"none": 0, "scalar": 1, "vector": 2}
SHAPES = [  # batch, heads, tokens, D
    (16, 16, 2048, 128),
    (8, 16, 4096, 128),
    (4, 16, 8192, 128),
    (1, 16, 32768, 128),
    (8, 16, 4096, 64),
    (4, 16, 4096, 256),
]


@dataclass(frozen=True)
class Case:
    """Linear attention of one shape under one gate."""

    batch: int
    heads: int
    tokens: int
    dim: int
    gate: str

    title: ClassVar[str] = "gate"

    @property
    def name(self) -> str:
        return f"{self.gate} {self.title}, B {self.batch}, H {self.heads}, D {self.dim}"

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.tokens

    def inputs(self) -> list[Tensor]:
        """q, k, v, and g where there is a gate: decays as a trained model has them, most of them slow."""
        shape = (self.batch, self.heads, self.tokens)
        found = [torch.randn(*shape, self.dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        if self.gate != "none":
            wide = (self.dim,) if self.gate == "vector" else ()
            found.append(logsigmoid(torch.randn(*shape, *wide, device="cuda")) / 16)
        return found

    def floor(self, backward: bool) -> int:
        """Bytes that every algorithm moves."""
        gate = 4 * {"none": 0, "scalar": 1, "vector": self.dim}[self.gate]
        forward = 2 * 4 * self.dim + gate
        # do is read beside the inputs; dq, dk, dv and dg are written.
        return self.rows * (forward + (forward + gate + 2 * 3 * self.dim if backward else 0))

    def moved(self, backward: bool, inputs: list[Tensor]) -> int:
        """Bytes that our passes move, each pass taken to read its inputs once."""
        launch = Launch(*inputs[:3], inputs[3] if inputs[3:] else None, None, 1.0, False)
        ahead, back = launch.stretches > 1, launch.stretches_back > 1  # walked over twice where there are several
        stream, gate = 2 * self.dim, 4 * GATES[self.gate] // 2 * self.dim
        prepare = 4 * stream + gate if self.gate == "vector" else 0
        found = prepare + 2 * stream * ahead + 4 * stream
        if backward:
            found += prepare + 2 * stream * (back + (back and not ahead)) + 3 * 4 * stream
            if self.gate != "none":
                found += 2 * 4 * self.dim**2 // ANCHORED + (
                    4 * stream if self.gate == "scalar" else 6 * stream + 2 * gate
                )
        return self.rows * found

    def call(self, backend: str) -> Attend:
        """Ours."""
        return lambda q, k, v, g=None: linear_attention(q, k, v, log_decay=g, backend=backend)

    def theirs(self) -> Attend:
        """flash-linear-attention's, in its own layout."""
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla

        function = chunk_gla if self.gate == "vector" else chunk_simple_gla
        return lambda q, k, v, g=None: function(q, k, v, g, scale=1.0)[0]


class Delta(Case):
    """The delta rule: keys of unit length, beta in (0, 1)."""

    title = "gate, delta rule"

    def inputs(self) -> list[Tensor]:
        q, k, *rest = super().inputs()
        beta = torch.rand(self.batch, self.heads, self.tokens, device="cuda")
        return [q, normalize(k.float(), dim=-1).bfloat16(), rest[0], beta, *rest[1:]]

    def floor(self, backward: bool) -> int:
        return super().floor(backward) + 4 * self.rows * (3 if backward else 1)

    def moved(self, backward: bool, inputs: list[Tensor]) -> int:
        launch = DeltaLaunch(*inputs[:3], inputs[4] if inputs[4:] else None, None, 1.0, inputs[3])
        chunk, cut = launch.sizes.chunk, launch.stretches > 1
        stream, system, state = 2 * self.dim, 2 * chunk, 2 * self.dim**2 // chunk
        found = 6 * stream + 4 * system  # what is prepared of all chunks, written and read, and the walk
        found += cut * (2 * stream + system)  # stretches are walked twice
        if backward:  # the walk once more, for what is written and the states, the walk back, the gradients
            found += 15 * stream + 3 * system + 4 * state + cut * (3 * stream + 2 * system)
        return self.rows * found

    def call(self, backend: str) -> Attend:
        return lambda q, k, v, beta, g=None: delta_rule(q, k, v, beta, log_decay=g, backend=backend)

    def theirs(self) -> Attend:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
            if g is None:
                return chunk_delta_rule(q, k, v, beta.bfloat16(), scale=1.0)[0]
            return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]

        return call


CASES: list[Case] = [Case(*shape, gate) for shape in SHAPES for gate in GATES]
CASES += [Delta(*shape, gate) for shape in SHAPES for gate in ("none", "scalar")]


def peers(case: Case) -> dict[str, Attend]:
    """Dense causal attention, and flash-linear-attention."""
    found: dict[str, Attend] = {"dense": lambda q, k, v, *_: scaled_dot_product_attention(q, k, v, is_causal=True)}
    if importlib.util.find_spec("fla") is None:
        print("flash-linear-attention is not installed")
        return found
    return found | {"fla": case.theirs()}


def step(function: Attend, inputs: list[Tensor], backward: bool) -> Call:
    """Forward, or forward and backward."""
    if not backward:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(leaves[2])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)


def error(case: Case, inputs: list[Tensor]) -> float:
    """Of our forward pass, see above."""
    few = [x[:1, :1, :256] for x in inputs]
    found, exact = case.call("triton")(*few).double(), case.call("reference")(*(x.double() for x in few))
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = clock_for("cuda")([lambda: target.copy_(source)] * 9)
    return 2 * source.numel() / sorted(taken)[4]


def measure(case: Case, backward: bool, seconds: float, rate: float) -> dict[str, Any]:
    """Milliseconds of all, how much faster than each peer, and over the floor."""
    torch.manual_seed(0)
    inputs = case.inputs()
    calls: dict[str, Call] = {"triton": graphed(step(case.call("triton"), inputs, backward))}
    for name, function in peers(case).items():
        given = [x.transpose(1, 2).contiguous() for x in inputs] if name == "fla" else inputs
        try:
            calls[name] = graphed(step(function, given, backward))
        except Exception as refusal:  # a peer that cannot do this work is left out, and said so
            print(f"{name} cannot: {type(refusal).__name__}: {str(refusal)[:200]}")
    names = [name for name in calls if name != "triton"]
    found = rounds([calls[name] for name in names], calls["triton"], seconds=seconds, clock=clock_for("cuda"))
    samples = dict(zip(names, found, strict=True))
    mine, floor = found[0].baseline_seconds, case.floor(backward) / rate
    row: dict[str, Any] = {"triton ms": round(mine * 1e3, 4), "floor ms": round(floor * 1e3, 4)}
    row |= {"over floor": round(mine / floor, 2), "TB/s moved": round(case.moved(backward, inputs) / mine / 1e12, 2)}
    for name, one in samples.items():
        row |= beside(name, one)
    return row | {"error": float(f"{error(case, inputs):.2e}")}


def beside(name: str, samples: Samples) -> dict[str, Any]:
    """Milliseconds of a peer, and how many times faster ours, the baseline, was."""
    faster = ratio(Samples(samples.baseline, samples.function))  # theirs over ours
    row = {f"{name} ms": round(samples.seconds * 1e3, 4), f"over {name}": round(faster.median, 3)}
    return row | {
        f"over {name} {end}": value and round(value, 3) for end, value in (("low", faster.low), ("high", faster.high))
    }


def sweep(
    about: str | None, results: str, cases: list[Any], measured: Callable[..., dict[str, Any]], title: str, *shown: str
) -> None:
    """The command: `measured(case, backward, seconds, rate)` of the cases that are asked for, saved row by row."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and direction")
    parser.add_argument("--forward", action="store_true", help="leave the backward pass out")
    options = parser.parse_args()
    rate, rows = copy_rate(), []
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    for case in cases:
        if options.only not in case.name:
            continue
        for backward in (False,) if options.forward else (False, True):
            row = measured(case, backward, options.seconds, rate)
            name = f"{case.name}, forward{' + backward' if backward else ''}"
            rows.append({"pattern": name, "tokens": case.tokens, **row})
            print({k: v for k, v in rows[-1].items() if not k.endswith(("low", "high"))}, flush=True)
            save(results, rows[-1:], device="cuda", dtype="bfloat16", copy_bytes_per_second=round(rate))
            torch.cuda.empty_cache()
    names = ("pattern", "tokens", "triton ms", "floor ms", "over floor", *shown)
    show(f"{title}: milliseconds, and how many times faster", [{n: row.get(n) for n in names} for row in rows])


def main() -> None:
    sweep(__doc__, "scan_gpu", CASES, measure, "Scans", "TB/s moved", "fla ms", "over fla", "over dense")


if __name__ == "__main__":
    main()
