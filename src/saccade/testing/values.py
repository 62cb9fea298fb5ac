"""Is the number right? Values against the oracle, in every dtype, and against dense attention at a full budget."""

from __future__ import annotations

import torch

from saccade.contract import Attention
from saccade.testing.ambient import seeded
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention
from saccade.testing.registry import named
from saccade.testing.subject import Subject, cast, widen


@named()
def value(subject: Subject) -> None:
    """The fast path gives the oracle's numbers in float64."""
    with torch.no_grad():
        subject.agrees(subject.module(*subject.inputs()))


@named()
def dtype_float32(subject: Subject) -> None:
    """In float32 the fast path errs at most twice as much as the oracle's own eager float32 run."""
    _dtype(subject, torch.float32)


@named()
def dtype_bfloat16(subject: Subject) -> None:
    """In bfloat16 the fast path errs at most twice as much as the oracle's own eager bfloat16 run."""
    _dtype(subject, torch.bfloat16)


def _dtype(subject: Subject, dtype: torch.dtype) -> None:
    # A decision taken near a tie may flip in either run, and one flip outweighs all rounding: pool several draws, so
    # that the eager run meets its share of flips, and ask the median, which flips leave alone, for the rounding itself.
    draws = range(6) if subject.cls.spec.discrete else range(2)
    actual, truth, eager = [], [], []
    for draw in draws:
        one = subject.variant(seed=subject.seed + draw)
        module, inputs = one.build(dtype), one.inputs(dtype)
        with torch.no_grad():
            result = module(*inputs)
            eager.append(module.oracle(*inputs))
            truth.append(cast(module, torch.float64).oracle(*(x.double() for x in inputs)))
        assert result.dtype == dtype, f"output: got dtype {result.dtype} for {dtype} inputs"
        assert result.shape == truth[-1].shape, (
            f"output: got shape {tuple(result.shape)}, the oracle gives {tuple(truth[-1].shape)}"
        )
        actual.append(result)
    fast, exact, plain = torch.stack(actual), torch.stack(truth), torch.stack(eager)
    assert_close(fast, exact, plain, name="output")
    if subject.cls.spec.discrete:
        error, allowed = ((x.double() - exact).abs().median() for x in (fast, plain))
        band = torch.finfo(dtype).eps * exact.abs().median()
        assert error <= 2 * allowed + band, f"output: median error {error:.3e} (allowed {2 * allowed + band:.3e})"


def _has_full_budget(subject: Subject) -> bool:
    cls, case = subject.cls, subject.case
    return issubclass(cls, Attention) and cls.full_budget(case.dims, case.length) is not None


@named(applies=_has_full_budget)
def full_budget(subject: Subject) -> None:
    """With the whole budget the mechanism is dense attention."""
    params = subject.cls.full_budget(subject.case.dims, subject.case.length)
    with seeded(subject.seed):
        module = cast(subject.cls(subject.case.dims, **(params or {})), torch.float64).eval()
    inputs, single = subject.inputs(), subject.inputs(torch.float32)
    truth = dense_attention(*inputs, causal=module.causal)
    eager = widen(truth, dense_attention(*single, causal=module.causal))
    with torch.no_grad():
        assert_close(module(*inputs), truth, eager, name="output at full budget", terms=subject.case.length)
