"""Is it the same on a GPU? Where there is one: the fast path there against the oracle, which stays on the CPU."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.testing.budget import assert_close
from saccade.testing.gradients import check_gradients, cotangent, differentiate
from saccade.testing.registry import named
from saccade.testing.subject import Subject
from saccade.testing.values import pooled

DEVICE = "cuda"
PACKAGE = Path(__file__).parents[1]


def unrounded() -> AbstractContextManager[None]:
    """Convolutions in float32 keep all their bits, not ten."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _has_gpu(subject: Subject) -> bool:
    return torch.cuda.is_available()


@named(applies=_has_gpu)
def gpu_float32(subject: Subject) -> None:
    """On a GPU in float32 the fast path errs at most twice as much as the oracle's own float32 run on the CPU."""
    _value(subject, torch.float32)


@named(applies=_has_gpu)
def gpu_bfloat16(subject: Subject) -> None:
    """On a GPU in bfloat16 the fast path errs at most twice as much as the oracle's own bfloat16 run on the CPU."""
    _value(subject, torch.bfloat16)


def _value(subject: Subject, dtype: torch.dtype) -> None:
    # As many draws as on the CPU, for the same reason: a decision near a tie may flip in either run.
    draws = 6 if subject.cls.spec.discrete else 1

    def there(one: Subject) -> Tensor:
        with unrounded():
            result = one.build(dtype).to(DEVICE)(*(x.to(DEVICE) for x in one.inputs(dtype)))
        assert result.device.type == DEVICE, f"output: on {result.device} for inputs on {DEVICE}"
        return result.cpu()

    actual, truth, eager = pooled(subject, draws, dtype, there)
    assert_close(actual, truth, eager, name="output", terms=subject.case.length)


def _is_smooth(subject: Subject) -> bool:
    return torch.cuda.is_available() and not subject.cls.spec.discrete


@named(applies=_is_smooth)
def gpu_gradients(subject: Subject) -> None:
    """On a GPU in float32, gradients of every input and parameter are those of autograd through the oracle."""
    weight = cotangent(subject, subject.truth.shape)
    eager = subject.eager(
        lambda module, inputs: differentiate(module.oracle, inputs, subject.names, module, weight), torch.float32
    )
    there = subject.build(torch.float32).to(DEVICE)
    inputs = [x.to(DEVICE) for x in subject.inputs(torch.float32)]
    with unrounded():
        found = differentiate(there, inputs, subject.names, there, weight.to(DEVICE))
    check_gradients({name: x.cpu() for name, x in found.items()}, eager, terms=subject.case.length)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, where the host waits for the GPU: the innermost lines of this package, or else of the caller, "file:line
    code", a wait each."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, warnings.__file__)]
        at = next((frame for frame in reversed(stack) if PACKAGE in Path(frame.filename).parents), stack[-1])
        found.append(f"{Path(at.filename).name}:{at.lineno} {at.line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # the context puts the former one back
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


def waits_of(subject: Subject) -> list[str]:
    """What `waits` finds in a forward pass without gradients, once the module has met the shapes with other numbers."""
    module = subject.build(torch.float32).to(DEVICE)
    known, other = (one.inputs(torch.float32) for one in (subject, subject.variant(seed=subject.seed + 1)))
    before, there = ([x.to(DEVICE) for x in inputs] for inputs in (known, other))
    with torch.no_grad():
        for _ in range(2):  # the second meets what the first has kept
            module(*before)
        with waits() as found:
            module(*there)
    return found


def _runs_ahead(subject: Subject) -> bool:
    return torch.cuda.is_available() and not subject.cls.spec.waits


@named(applies=_runs_ahead)
def gpu_waits(subject: Subject) -> None:
    """On a GPU, once it has met the shapes, a forward pass without gradients waits for nothing that the GPU computes.

    So the host runs ahead, and a pass can be recorded. Where what is computed depends on numbers that the host must
    read (tokens routed by `nonzero`, clusters until nothing moves) the declaration says so (`Spec.waits`).
    """
    found = waits_of(subject)
    lines = ", ".join(dict.fromkeys(found))
    assert not found, f"the host waits for the GPU {len(found)} times: {lines}"


def _is_first_said_to_wait(subject: Subject) -> bool:
    cls = subject.cls
    return torch.cuda.is_available() and bool(cls.spec.waits) and subject.case == cls.cases()[0]


@named(applies=_is_first_said_to_wait)
def gpu_said_to_wait(subject: Subject) -> None:
    """On a GPU, what is said to wait (`Spec.waits`) does, in one case at least: a reason that is gone is taken back."""
    cases = [subject.variant(**vars(case)) for case in subject.cls.cases()]
    assert any(map(waits_of, cases)), f"said to wait ({subject.cls.spec.waits}), and does not; leave that out"
