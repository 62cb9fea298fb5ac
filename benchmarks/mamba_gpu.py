"""The scans of Mamba and Mamba-2 on a GPU, beside the package mamba-ssm.

python benchmarks/mamba_gpu.py [--only TEXT] [--seconds S] [--forward]

The selective scan of 2,048 channels with 16 states, alone and with all that a block of Mamba fuses into it (the direct
term D, the gate z, softplus and bias of the steps), beside the CUDA extension; and the state space of Mamba-2 2.7B, 80
heads of 64 values with 128 states that share one B and one C, beside the Triton kernels. bfloat16, decays in float32,
32,768 tokens in all. Both take turns in one run, the second-level cache flushed before each. Each is given the layout
that it wants, for which nothing is counted; what ours does besides to take the arguments that theirs takes is.
`floor` is the time that the bytes take which no algorithm can spare, every input read and every result written once, at
the rate of a copy measured beside: with gradients also their own. `error` and `mamba error` are root mean square
differences from float64 over that of the exact result, for the first 256 tokens of a sequence.

mamba-ssm is taken where it can be imported. `pip install mamba-ssm --no-build-isolation` leaves the CUDA extension out
unless MAMBA_KEEP_CUDA_BUILD=TRUE is set; the Triton kernels need none. A folder on PYTHONPATH does as well: einops, and
of the repository `mamba_ssm/ops`, `mamba_ssm/utils`, an empty `mamba_ssm/__init__.py` (its own imports models), and
`selective_scan_cuda`, built from `csrc/selective_scan` by `torch.utils.cpp_extension.load`. A part that is missing or
refuses is left out, and said so. Its Triton kernels are tuned when they are called first, which takes minutes on a
fresh machine. The shortest sequences of every kind come first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attend_gpu import graphed
from scan_gpu import beside, sweep
from torch import Tensor
from torch.nn.functional import softplus

from saccade.bench.timing import clock_for, rounds
from saccade.scan import linear_attention, selective_scan

Inputs = list[Tensor]
Scan = Callable[..., Tensor]
TOKENS = 32768  # in all
LENGTHS = (2048, 4096, 8192, 32768)
STEPS = -3.0  # of softplus: about 1/20, as a trained model has them


@functools.cache
def source() -> torch.Generator:
    """Of all numbers that are drawn. A capture that fails leaves PyTorch's own unable to draw outside of a capture."""
    return torch.Generator("cuda")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=source())


def step(function: Scan, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """Forward, or forward and backward; the result is like the third input."""
    if not backward:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = normal(*leaves[2].shape)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`graphed`, on the stream that was current before: a capture that fails leaves its own in that place."""
    stream = torch.cuda.current_stream()
    try:
        return graphed(call)
    finally:
        torch.cuda.set_stream(stream)


@dataclass(frozen=True)
class Selective:
    """h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t, y_t = C_t . h_t. Inputs: delta, A, x, B, C."""

    tokens: int
    channels: int = 2048
    states: int = 16

    @property
    def batch(self) -> int:
        return TOKENS // self.tokens

    @property
    def name(self) -> str:
        return f"selective scan, B {self.batch}, {self.channels} channels, {self.states} states"

    def inputs(self) -> Inputs:
        """Tokens before channels."""
        rows = self.batch, self.tokens
        delta = softplus(normal(*rows, self.channels) + STEPS)
        rates = -torch.arange(1.0, self.states + 1, device="cuda").repeat(self.channels, 1)
        return [delta, rates, normal(*rows, self.channels), normal(*rows, self.states), normal(*rows, self.states)]

    def floor(self, backward: bool) -> int:
        forward = 2 * (3 * self.channels + 2 * self.states)  # x, delta, y; B, C
        results = 2 * (2 * self.channels + 2 * self.states)  # gradients of x, delta, B, C
        return TOKENS * (2 * forward + results if backward else forward)

    def ours(self, backend: str = "triton") -> Scan:
        return lambda delta, a, x, b, c: selective_scan(x, delta, a, b, c, backend=backend)

    def theirs(self) -> Scan:
        """Channels before tokens."""
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return lambda delta, a, x, b, c: selective_scan_fn(x, delta, a, b, c)

    def turned(self, inputs: Inputs) -> Inputs:
        """Between our layout and theirs."""
        return [x.mT.contiguous() if x.ndim == 3 else x for x in inputs]

    def start(self, inputs: Inputs) -> Inputs:
        """The first 256 tokens of one sequence, in our layout."""
        return [x[:1, :256] if x.ndim == 3 else x for x in inputs]


class Block(Selective):
    """All that a block fuses: delta becomes softplus(delta + bias), y becomes (y + D x) silu(z). Then D, z, bias."""

    @property
    def name(self) -> str:
        return super().name.replace("scan", "scan of a block")

    def inputs(self) -> Inputs:
        _, *rest = super().inputs()
        rows = self.batch, self.tokens, self.channels
        one = torch.ones(self.channels, device="cuda")
        return [normal(*rows), *rest, one, normal(*rows), STEPS * one]

    def floor(self, backward: bool) -> int:
        return super().floor(backward) + TOKENS * 2 * self.channels * (3 if backward else 1)  # z; once more, and dz

    def ours(self, backend: str = "triton") -> Scan:
        def call(
            delta: Tensor, a: Tensor, x: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, bias: Tensor
        ) -> Tensor:
            more: dict[str, Any] = {"D": d, "z": z, "delta_bias": bias, "delta_softplus": True}
            y: Tensor = selective_scan(x, delta, a, b, c, **more, backend=backend)
            return y

        return call

    def theirs(self) -> Scan:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return lambda delta, a, x, b, c, d, z, bias: selective_scan_fn(x, delta, a, b, c, d, z, bias, True)


@dataclass(frozen=True)
class StateSpace:
    """S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T, y_t = S_t^T C_t, a head. Inputs: C, B, x, dt, A."""

    tokens: int
    heads: int = 80
    values: int = 64
    states: int = 128

    @property
    def batch(self) -> int:
        return TOKENS // self.tokens

    @property
    def name(self) -> str:
        return f"state space of Mamba-2, B {self.batch}, H {self.heads}, {self.values} values, {self.states} states"

    def inputs(self) -> Inputs:
        """As theirs has them: tokens before heads."""
        rows = self.batch, self.tokens
        steps = softplus(normal(*rows, self.heads, dtype=torch.float32) + STEPS)
        rates = -torch.linspace(1.0, 16.0, self.heads, device="cuda")
        reads, writes = (normal(*rows, 1, self.states) for _ in range(2))
        return [reads, writes, normal(*rows, self.heads, self.values), steps, rates]

    def floor(self, backward: bool) -> int:
        forward = 2 * (2 * self.heads * self.values + 2 * self.states) + 4 * self.heads  # x, y; B, C; dt
        results = 2 * (self.heads * self.values + 2 * self.states) + 4 * self.heads  # gradients of x, B, C, dt
        return TOKENS * (2 * forward + results if backward else forward)

    def ours(self, backend: str = "triton") -> Scan:
        """Linear attention: queries C, keys B, values x, their strength dt, a decay a token and head, all as views."""

        def call(c: Tensor, b: Tensor, x: Tensor, steps: Tensor, rates: Tensor) -> Tensor:
            q, k, v, strength, decay = (z.transpose(1, 2) for z in (c, b, x, steps, steps * rates))
            o = linear_attention(q, k, v, strength=strength, log_decay=decay, backend=backend)
            assert isinstance(o, Tensor)
            return o.transpose(1, 2)

        return call

    def theirs(self) -> Scan:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return lambda c, b, x, steps, rates: mamba_chunk_scan_combined(x, steps, rates, b, c, 256)

    def turned(self, inputs: Inputs) -> Inputs:
        return inputs

    def start(self, inputs: Inputs) -> Inputs:
        return [x[:1, :256] if x.ndim > 1 else x for x in inputs]


Case = Selective | StateSpace
CASES: list[Case] = [kind(tokens) for tokens in LENGTHS for kind in (Selective, Block, StateSpace)]


def error(case: Case, inputs: Inputs, found: Tensor) -> float:
    """Of a result in our layout, see above."""
    plain = "chunked" if isinstance(case, Selective) else "reference"
    exact = case.ours(plain)(*(x.double() for x in case.start(inputs)))
    return float((found[:1, :256] - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def peer(case: Case, inputs: Inputs, backward: bool) -> tuple[Callable[[], Any], float] | None:
    """Theirs, and its error."""
    try:
        function, given = case.theirs(), case.turned(inputs)
        with torch.no_grad():
            (found,) = case.turned([function(*given)])
        return captured(step(function, given, backward)), error(case, inputs, found)
    except Exception as refusal:  # a peer that is missing or cannot do this work is left out, and said so
        print(f"mamba-ssm cannot: {type(refusal).__name__}: {str(refusal)[:200]}")
        return None


def measure(case: Case, backward: bool, seconds: float, rate: float) -> dict[str, Any]:
    """Milliseconds of both, how much faster, and over the floor."""
    source().manual_seed(0)
    inputs = case.inputs()
    with torch.no_grad():
        own = error(case, inputs, case.ours()(*inputs))
    mine = captured(step(case.ours(), inputs, backward))
    theirs = peer(case, inputs, backward)
    clock = clock_for("cuda")
    if theirs is None:
        taken = sorted(clock([mine] * 9))[4]
        row: dict[str, Any] = {"triton ms": round(taken * 1e3, 4)}
    else:
        (found,) = rounds([theirs[0]], mine, seconds=seconds, clock=clock)
        taken = found.baseline_seconds
        row = {"triton ms": round(taken * 1e3, 4), "mamba error": float(f"{theirs[1]:.2e}")} | beside("mamba", found)
    floor = case.floor(backward) / rate
    return row | {
        "floor ms": round(floor * 1e3, 4),
        "over floor": round(taken / floor, 2),
        "error": float(f"{own:.2e}"),
    }


def main() -> None:
    sweep(__doc__, "mamba_gpu", CASES, measure, "Scans of Mamba", "mamba ms", "over mamba", "error", "mamba error")


if __name__ == "__main__":
    main()
