"""Is it the same on a GPU? Where there is one: the fast path there against the oracle, which stays on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from saccade.testing.budget import assert_close
from saccade.testing.gradients import differentiate
from saccade.testing.registry import named
from saccade.testing.subject import Subject, cast

DEVICE = "cuda"


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
    actual, truth, eager = [], [], []
    for draw in range(6 if subject.cls.spec.discrete else 1):
        one = subject.variant(seed=subject.seed + draw)
        module, inputs = one.build(dtype), one.inputs(dtype)
        with torch.no_grad(), unrounded():
            result = one.build(dtype).to(DEVICE)(*(x.to(DEVICE) for x in inputs))
            eager.append(module.oracle(*inputs))
            truth.append(cast(module, torch.float64).oracle(*(x.double() for x in inputs)))
        assert result.device.type == DEVICE, f"output: on {result.device} for inputs on {DEVICE}"
        assert result.dtype == dtype, f"output: got dtype {result.dtype} for {dtype} inputs"
        actual.append(result.cpu())
    assert_close(torch.stack(actual), torch.stack(truth), torch.stack(eager), name="output", terms=subject.case.length)


def _is_smooth(subject: Subject) -> bool:
    return torch.cuda.is_available() and not subject.cls.spec.discrete


@named(applies=_is_smooth)
def gpu_gradients(subject: Subject) -> None:
    """On a GPU in float32, gradients of every input and parameter are those of autograd through the oracle."""
    single, exact = subject.build(torch.float32), subject.module
    weight = torch.randn(subject.truth.shape, generator=torch.Generator().manual_seed(subject.seed + 2))
    truth = differentiate(exact.oracle, subject.inputs(), subject.names, exact, weight.double())
    eager = differentiate(single.oracle, subject.inputs(torch.float32), subject.names, single, weight)
    there = subject.build(torch.float32).to(DEVICE)
    inputs = [x.to(DEVICE) for x in subject.inputs(torch.float32)]
    with unrounded():
        found = differentiate(there, inputs, subject.names, there, weight.to(DEVICE))
    scale = max(float(g.abs().max()) for g in truth.values())
    for name, wanted in truth.items():
        mine = found[name].cpu()
        assert_close(mine, wanted, eager[name], name=f"gradient of {name}", terms=subject.case.length, scale=scale)
