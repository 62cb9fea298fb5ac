"""Two errors that are often confused, kept apart.

Numerical error: does the fast path compute its own definition? Judged against the mechanism's float64 equations, with
the budget that those equations' own errors in the fast path's dtype set (`saccade.testing.budget`). It is a gate:
nothing that fails is timed. Where the equations themselves lose all digits in that dtype, nothing can be judged.
Approximation error: how far is the definition from dense softmax attention? No gate, the price of the speed-up.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.bench.dense import relative_error
from saccade.bench.guard import Failed, guard, is_memory
from saccade.bench.records import Status
from saccade.contract import Mechanism
from saccade.testing.ambient import seeded
from saccade.testing.budget import compare
from saccade.testing.rounding import Eager, cast
from saccade.testing.subject import randomise

LOST = 0.1  # relative error at which a result says nothing any more


@dataclass(frozen=True)
class Gate:
    """The verdict on a fast path: relative L2 errors of it and of the eager oracle in its dtype, on `tokens` tokens."""

    tokens: int
    error: float
    eager_error: float
    ok: bool
    message: str = ""

    @property
    def decides(self) -> bool:
        """False where the equations themselves lose all digits in this dtype: nothing can be told right or wrong."""
        return self.eager_error < LOST


def gate(
    module: Mechanism, inputs: tuple[Tensor, ...], dtype: torch.dtype, *, seconds: float = math.inf, **options: Any
) -> Gate:
    """Judge `module`'s fast path in `dtype` on `inputs` (rounded to `dtype` first), on their device.

    The module is copied and its parameters are moved off their special initial values, lest a layer scale of zero hide
    an error. The error may be 2 x that of the oracle's eager runs plus a rounding band. Where decisions are discrete,
    one that flips near a tie outweighs all rounding: there the fast path is judged in float64, and in `dtype` by its
    median error. seconds: eager runs after the first begin only so long. options: passed on to the module's forward.
    """
    tokens, device = inputs[0].shape[-2], inputs[0].device
    with seeded(0):
        moved = cast(module, torch.float32).cpu()
        randomise(moved)
    module = cast(moved, dtype).eval()
    rounded = tuple(x.cpu().to(dtype) for x in inputs)
    equations, end = Eager(_oracle, module, rounded, dtype), time.perf_counter() + seconds
    with torch.no_grad():
        fast = _fast(module, rounded, device, options)
    truth = equations.truth["output"]
    if fast.shape != truth.shape:
        message = f"output has shape {tuple(fast.shape)}, its equations give {tuple(truth.shape)}"
        return Gate(tokens, float("inf"), 0.0, False, message)
    eager = next(equations.beside("output"))
    error, eager_error = relative_error(fast, truth), relative_error(eager, truth)
    if not eager_error < LOST:
        message = f"its equations, run in {dtype}, are themselves off by {eager_error:.0%}: measured, not judged"
        return Gate(tokens, error, eager_error, False, message)
    if not module.spec.discrete:
        # In half precision sums run in float32: what remains is the rounding of the result.
        verdict = compare(fast, truth, _until(end, equations), terms=tokens if dtype.itemsize >= 4 else 1)
        return Gate(tokens, error, eager_error, verdict.ok, "" if verdict.ok else str(verdict))
    with torch.no_grad():
        fast64 = _fast(cast(module, torch.float64), tuple(x.double() for x in rounded), device, options)
    verdict = compare(fast64, truth, _until(end, Eager(_oracle, module, rounded, torch.float64)), terms=tokens)
    if not verdict.ok:
        return Gate(tokens, error, eager_error, False, f"in float64: {verdict}")
    median, allowed = (float((x.double() - truth).abs().median()) for x in (fast, eager))
    allowed = 2 * allowed + torch.finfo(dtype).eps * float(truth.abs().median())
    message = "" if median <= allowed else f"median error {median:.3e} (allowed {allowed:.3e})"
    return Gate(tokens, error, eager_error, median <= allowed, message)


def _fast(module: Mechanism, inputs: tuple[Tensor, ...], device: torch.device, options: dict[str, Any]) -> Tensor:
    """The fast path's answer, computed on `device`; the equations stay on the CPU."""
    with guard():
        return copy.deepcopy(module).to(device)(*(x.to(device) for x in inputs), **options).cpu()


def _until(end: float, equations: Eager) -> Iterator[Tensor]:
    """Eager runs for as long as there is time, at least one."""
    for run in equations.beside("output"):
        yield run
        if time.perf_counter() > end:
            return


def _oracle(module: Mechanism, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The equations' answer; without one there is nothing to judge by, which is the mechanism's fault."""
    try:
        return {"output": module.oracle(*inputs)}
    except Exception as error:
        status = Status.OOM if is_memory(error) else Status.WRONG
        text = " ".join(str(error).split())[:200]
        raise Failed(status, f"its oracle raised {type(error).__name__}: {text}") from error
