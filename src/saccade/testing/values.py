"""Is the number right? Values against the oracle, in every dtype, and against dense attention at a full budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saccade.contract import Attention
from saccade.testing.ambient import seeded
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention
from saccade.testing.registry import named
from saccade.testing.rounding import cast
from saccade.testing.subject import Subject


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


def pooled(
    subject: Subject, draws: int, dtype: torch.dtype, fast: Callable[[Subject], Tensor]
) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    """What `fast` gives in `dtype` for several draws of the numbers, beside the truth and eager runs of all of them."""
    subjects = [subject.variant(seed=subject.seed + draw) for draw in range(draws)]
    eager = [one.output(dtype) for one in subjects]
    with torch.no_grad():
        found = [fast(one) for one in subjects]
    for one, beside in zip(found, eager, strict=True):
        truth = beside.truth["output"]
        assert one.dtype == dtype, f"output: got dtype {one.dtype} for {dtype} inputs"
        assert one.shape == truth.shape, f"output: got shape {tuple(one.shape)}, the oracle gives {tuple(truth.shape)}"
    runs = zip(*(one.beside("output") for one in eager), strict=True)
    return torch.stack(found), torch.stack([one.truth["output"] for one in eager]), map(torch.stack, runs)


def _dtype(subject: Subject, dtype: torch.dtype) -> None:
    # A decision taken near a tie may flip in either run, and one flip outweighs all rounding: pool several draws, so
    # that the eager run meets its share of flips, and ask the median, which flips leave alone, for the rounding itself.
    draws = 6 if subject.cls.spec.discrete else 2
    found, exact, eager = pooled(subject, draws, dtype, lambda one: one.build(dtype)(*one.inputs(dtype)))
    first = next(eager)
    assert_close(found, exact, itertools.chain([first], eager), name="output")
    if subject.cls.spec.discrete:
        error, allowed = ((x.double() - exact).abs().median() for x in (found, first))
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
    dense = subject.eager(lambda _, inputs: {"output": dense_attention(*inputs, causal=module.causal)})
    with torch.no_grad():
        found = module(*subject.inputs())
    truth = dense.truth["output"]
    assert_close(found, truth, dense.beside("output"), name="output at full budget", terms=subject.case.length)
