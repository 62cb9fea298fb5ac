"""The scan primitives on the CPU beside the floor of their arithmetic and beside causal attention.

All three run in turns, forward alone and forward with backward. `over floor` is our time over the floor's, `over
attend` that over `saccade.attend(q, k, v, Causal())` of the same width, each the median of paired ratios with a 95 %
interval. The bars: at most 3 and at most 1. B = 1, H = 8, float32, T tokens, chunks of 64, which is every default.
Where other programs hold a core, fewer threads are taken (`saccade.bench.timing.quiet_threads`) and named in the row.

The floor is the same multiply-adds as plain calls on tensors of the same sizes, differentiated by autograd as ours are:
linear_attention, delta_rule, fast_weights: their matrix products, batched over chunks, without gate, mask and
    recurrence; the triangular system of the delta rule counts as the product with its inverse.
selective_scan: one fused multiply-add over (T, channels, S) and the readout; no exponential, no building of its terms.
associative_scan: two combinations of the whole sequence, which is what a scan of linear work does.
long_conv: the FFTs of x, kernel and output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Others, save, show
from torch import Tensor
from torch.nn import functional as F

from saccade import attend
from saccade.bench.timing import CpuClock, quiet_threads, ratio, rounds
from saccade.scan import associative_scan, delta_rule, fast_weights, linear_attention, long_conv, selective_scan
from saccade.scan.associative_scan import affine
from saccade.scan.fast_weights import LinearMemory, MLPMemory
from saccade.where import Causal

HEADS, CHUNK, STATES = 8, 64, 16
FLOOR_BAR, ATTEND_BAR = 3.0, 1.0
# What is timed: a function, and the tensors that it is differentiated in.
Timed = tuple[Callable[..., Any], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """`build` gives ours and the floor for a number of tokens and of channels a head."""

    name: str
    build: Callable[[int, int], tuple[Timed, Timed]]
    dims: tuple[int, ...] = (64, 128)


def rows(*shape: int) -> Tensor:
    """Normal numbers of unit norm in the last dim, as projections under a norm give them."""
    return F.normalize(torch.randn(*shape), dim=-1)


def gate(*shape: int, tau: float = 16.0) -> Tensor:
    """Decays as a trained model has them, most of them slow; with tau = 1 a chunk forgets nearly all."""
    return F.logsigmoid(torch.randn(*shape)) / tau


def chunked(tokens: int, dim: int, count: int) -> list[Tensor]:
    return [torch.randn(HEADS * tokens // CHUNK, CHUNK, dim) for _ in range(count)]


def linear(kind: str, normalizer: str | None = None, tau: float = 16.0) -> Callable[[int, int], tuple[Timed, Timed]]:
    def build(tokens: int, dim: int) -> tuple[Timed, Timed]:
        shape = {"constant": (HEADS,), "scalar": (1, HEADS, tokens), "vector": (1, HEADS, tokens, dim)}.get(kind)
        q, k = (rows(1, HEADS, tokens, dim).abs() for _ in range(2))
        given = [q, k, torch.randn(1, HEADS, tokens, dim), *([gate(*shape, tau=tau)] if shape else [])]

        def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Any:
            return linear_attention(q, k, v, log_decay=g, normalizer=normalizer)

        def floor(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return (q @ k.mT) @ v, q @ (k.mT @ v)

        return (ours, given), (floor, chunked(tokens, dim, 3))

    return build


def delta(gated: bool) -> Callable[[int, int], tuple[Timed, Timed]]:
    def build(tokens: int, dim: int) -> tuple[Timed, Timed]:
        q, k = (rows(1, HEADS, tokens, dim) for _ in range(2))
        beta = torch.rand(1, HEADS, tokens)
        given = [q, k, torch.randn(1, HEADS, tokens, dim), beta, *([gate(1, HEADS, tokens)] if gated else [])]

        def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Any:
            return delta_rule(q, k, v, beta, log_decay=g)

        def floor(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            inverse, start = k @ k.mT, k.mT @ v
            own = inverse @ v + (inverse @ k) @ start
            return (q @ k.mT) @ own, q @ start

        return (ours, given), (floor, chunked(tokens, dim, 3))

    return build


def selective(tokens: int, dim: int) -> tuple[Timed, Timed]:
    channels = HEADS * dim
    x, delta = torch.randn(1, tokens, channels), F.softplus(torch.randn(1, tokens, channels) - 4)
    A = -torch.arange(1.0, STATES + 1).expand(channels, -1)
    given = [x, delta, A.clone(), *(torch.randn(1, tokens, STATES) for _ in range(2))]

    def floor(a: Tensor, b: Tensor, h: Tensor, read: Tensor) -> Tensor:
        return torch.addcmul(b, a, h) @ read

    wide = [torch.randn(1, tokens, channels, STATES) for _ in range(3)]
    return (selective_scan, given), (floor, [*wide, torch.randn(1, tokens, STATES, 1)])


def associative(tokens: int, dim: int) -> tuple[Timed, Timed]:
    given = [gate(1, tokens, HEADS * dim).exp(), torch.randn(1, tokens, HEADS * dim)]

    def ours(a: Tensor, b: Tensor) -> Any:
        return associative_scan(affine, (a, b), dim=1)[1]

    def floor(a: Tensor, b: Tensor) -> Tensor:
        return affine(affine((a, b), (a, b)), (a, b))[1]

    return (ours, given), (floor, [x.clone() for x in given])


def convolution(tokens: int, dim: int) -> tuple[Timed, Timed]:
    given = [torch.randn(1, HEADS * dim, tokens), torch.randn(HEADS * dim, tokens)]

    def floor(x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.rfft(kernel, 2 * tokens)
        return torch.fft.irfft(torch.fft.rfft(x, 2 * tokens), 2 * tokens), spectrum

    return (long_conv, given), (floor, [x.clone() for x in given])


def learned(memory: type) -> Callable[[int, int], tuple[Timed, Timed]]:
    def build(tokens: int, dim: int) -> tuple[Timed, Timed]:
        own = memory(dim)
        q, k = (rows(1, HEADS, tokens, dim) for _ in range(2))
        given = [q, k, torch.randn(1, HEADS, tokens, dim), *own.init(1, HEADS)]

        def ours(q: Tensor, k: Tensor, v: Tensor, *params: Tensor) -> Any:
            return fast_weights(own, params, k, v, q=q, eta=0.01, chunk=CHUNK)

        shapes, chunks = own.shapes, HEADS * tokens // CHUNK

        def floor(q: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
            inputs, y = [], x
            for w in weights:
                inputs.append(y)
                y = y @ w
            errors = []
            for i, w in reversed(list(enumerate(weights))):
                errors.append(y)
                y = y @ w.mT if i else y
            after = x.new_zeros(())
            for w, a, e in zip(weights, inputs, reversed(errors), strict=True):
                after = after + (a.mT @ e).sum()
                q = q @ w + (q @ a.mT) @ e
            return q.sum() + after

        weights = [torch.randn(chunks, a, b) * a**-0.5 for a, b in shapes]
        return (ours, given), (floor, [*chunked(tokens, dim, 2), *weights])

    return build


CASES = [
    *(Case(f"linear_attention, {kind}", linear(kind)) for kind in ("no gate", "constant", "scalar", "vector")),
    *(Case(f"linear_attention, {kind}, sum", linear(kind, "sum")) for kind in ("no gate", "scalar", "vector")),
    Case("linear_attention, steep vector", linear("vector", tau=1.0)),
    Case("delta_rule, no gate", delta(False)),
    Case("delta_rule, scalar", delta(True)),
    Case("selective_scan", selective, (64,)),
    Case("associative_scan, affine", associative, (64,)),
    Case("long_conv", convolution, (64,)),
    Case("fast_weights, LinearMemory", learned(LinearMemory), (64,)),
    Case("fast_weights, MLPMemory", learned(MLPMemory), (64,)),
]


def passes(timed: Timed) -> dict[str, Callable[[], object]]:
    """Forward, and forward with backward."""
    function, given = timed
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(o) for o in outputs]

    def train() -> object:
        o = function(*leaves)
        return torch.autograd.grad(o, leaves, gradients[0] if len(gradients) == 1 else gradients)

    return {"forward": torch.no_grad()(lambda: function(*given)), "training": train}


def measure(case: Case, tokens: int, dim: int, seconds: float) -> dict[str, Any]:
    """Our time over the floor's and over attention's, forward and with backward, and the seconds of each."""
    ours, floor = (passes(timed) for timed in case.build(tokens, dim))
    dense = passes((lambda q, k, v: attend(q, k, v, Causal()), list(torch.randn(3, 1, HEADS, tokens, dim))))
    found: dict[str, Any] = {}
    for name in ("forward", "training"):
        for call in (ours[name], floor[name], dense[name]):
            call()
        beside = rounds([floor[name], dense[name]], ours[name], seconds=seconds, clock=CpuClock())
        for other, samples in zip(("floor", "attend"), beside, strict=True):
            over = ratio(samples)
            found |= {
                f"{name} over {other}": round(over.median, 2),
                f"{name} over {other} low": None if over.low is None else round(over.low, 2),
                f"{name} over {other} high": None if over.high is None else round(over.high, 2),
                f"{name} {other} ms": round(samples.seconds * 1e3, 2),
            }
        found |= {f"{name} ms": round(beside[0].baseline_seconds * 1e3, 2), f"{name} pairs": len(beside[0].function)}
    return found


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the console shows it."""
    shown = {"primitive": row["pattern"], "tokens": row["tokens"], "threads": row["threads"]}
    met = True
    for name in ("forward", "training"):
        shown[f"{name} ms"] = row[f"{name} ms"]
        for other, bar in (("floor", FLOOR_BAR), ("attend", ATTEND_BAR)):
            over, low, high = (row[f"{name} over {other}{end}"] for end in ("", " low", " high"))
            shown[f"{name} / {other}"] = f"{over}" if low is None else f"{over} [{low}, {high}]"
            met = met and over <= bar
    return shown | {"bars": "met" if met else "missed", "other cores": row["other cores busy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each forward and each training pass")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=quiet_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    found = []
    for case in CASES:
        for dim in case.dims if given.only in case.name else ():
            for tokens in given.tokens:
                with Others() as others:
                    own = measure(case, tokens, dim, given.seconds)
                row = {
                    "pattern": f"{case.name}, D {dim}",
                    "tokens": tokens,
                    "threads": given.threads,
                    **own,
                    "other cores busy": others.cores,
                }
                found.append(row)
                print(" | ".join(str(x) for x in brief(row).values()), flush=True)
    if not found:
        parser.error(f"--only: no case is called {given.only!r}")
    show("the scan primitives over their floors and over causal attention", [brief(row) for row in found])
    save("scan_cpu", found, batch=1, heads=HEADS, chunk=CHUNK, dtype="float32")


if __name__ == "__main__":
    main()
