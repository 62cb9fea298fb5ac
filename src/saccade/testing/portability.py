"""Does it survive being compiled, pickled, and loaded from a checkpoint?"""

from __future__ import annotations

import io
import logging
import pickle
import warnings

import torch

from saccade.testing.ambient import seeded
from saccade.testing.budget import same_bits
from saccade.testing.registry import named
from saccade.testing.rounding import cast
from saccade.testing.subject import Subject


def _is_smallest(subject: Subject) -> bool:
    return subject.case == min(subject.cls.cases(), key=lambda case: case.batch * case.length * case.dims.dim)


@named(applies=_is_smallest)
def compiles(subject: Subject) -> None:
    """Under torch.compile the output is the same (one case; graph breaks are allowed, errors are not)."""
    torch.compiler.reset()
    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)  # the compiler's own remarks about graph breaks
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # and about what it finds deprecated
            compiled = torch.compile(subject.build(), backend="eager")
            subject.agrees(compiled(*subject.inputs()), "output under torch.compile")
    finally:
        log.setLevel(level)
        torch.compiler.reset()


@named()
def pickle_round_trip(subject: Subject) -> None:
    """A pickled module, and a new one that loads its state_dict, give the same bits."""
    module, inputs = subject.module, subject.inputs()
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    with seeded(subject.seed + 7):  # a new module must not owe anything to the random numbers of the first
        fresh = cast(subject.cls(subject.case.dims, **subject.case.params), torch.float64)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    with torch.no_grad():
        expected = module(*inputs)
        again = pickle.loads(pickle.dumps(module))(*inputs)
        loaded = fresh.eval()(*inputs)
    assert same_bits(again, expected), "the unpickled module gives another output"
    assert same_bits(loaded, expected), "a new module with this state_dict gives another output; register what it lacks"
