"""Is one token at a time, or many sequences in one row, the same as the whole?"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.contract import Mechanism
from saccade.testing.budget import assert_close
from saccade.testing.gradients import differentiate
from saccade.testing.registry import named
from saccade.testing.structure import same_bits
from saccade.testing.subject import Subject, widen


def _steps(subject: Subject) -> bool:
    return subject.cls.can_step()


def _packs(subject: Subject) -> bool:
    return subject.cls.can_varlen()


def decode(subject: Subject, first: int, last: int, state: Any) -> tuple[list[Tensor], Any]:
    """The outputs of tokens `first` .. `last` - 1, one `step` each, and the state after them."""
    inputs, rows = subject.inputs(), []
    with torch.no_grad():
        for t in range(first, last):
            row, state = subject.module.step(*(x[..., t : t + 1, :] for x in inputs), state=state)
            rows.append(row)
    return rows, state


@named(applies=_steps)
def step_equals_whole(subject: Subject) -> None:
    """Decoding token by token from nothing gives every row of the whole."""
    rows, _ = decode(subject, 0, subject.case.length, None)
    subject.agrees(torch.cat(rows, -2), "output of step")


@named(applies=_steps)
def state_round_trip(subject: Subject) -> None:
    """A state that was pickled and read back goes on exactly as the one that stayed."""
    length = subject.case.length
    for kept in sorted({1, length // 2, length - 1} & set(range(1, length))):
        _, state = decode(subject, 0, kept, None)
        stored = pickle.dumps(state)
        stayed, _ = decode(subject, kept, length, state)
        back, _ = decode(subject, kept, length, pickle.loads(stored))
        assert same_bits(torch.cat(stayed, -2), torch.cat(back, -2)), (
            f"a state stored after {kept} tokens does not carry on as the live one"
        )


@named(applies=_packs)
def varlen_equals_loop(subject: Subject) -> None:
    """Sequences packed into one row by cu_seqlens give what each gives alone, values and gradients."""
    length = subject.case.length
    lengths = [length, 1, length // 2 + 1, length // 3 + 1]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = subject.variant(batch=1, length=int(ends[-1]))
    inputs, coarse, cu_seqlens = packed.inputs(), packed.inputs(torch.float32), ends.int()
    module, single = packed.module, packed.build(torch.float32)

    def loop(alone: Mechanism) -> Callable[..., Tensor]:
        spans = list(itertools.pairwise(ends))
        return lambda *x: torch.cat([alone.oracle(*(y[..., a:b, :] for y in x)) for a, b in spans], -2)

    with torch.no_grad():
        truth, eager, actual = loop(module)(*inputs), loop(single)(*coarse), module(*inputs, cu_seqlens=cu_seqlens)
    assert_close(actual, truth, widen(truth, eager), name="packed output", terms=length)

    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(subject.seed + 2))
    exact = differentiate(loop(module), inputs, packed.names, module, weight.double())
    rough = differentiate(loop(single), coarse, packed.names, single, weight)
    fast = differentiate(lambda *x: module(*x, cu_seqlens=cu_seqlens), inputs, packed.names, module, weight.double())
    scale = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in exact.items():
        budget = widen(gradient, rough[name])
        assert_close(fast[name], gradient, budget, name=f"packed gradient of {name}", terms=length, scale=scale)
