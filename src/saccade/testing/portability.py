"""Does it survive being compiled, pickled, and loaded from a checkpoint?"""

from __future__ import annotations

import io
import pickle
import warnings

import torch

from saccade.testing.ambient import seeded
from saccade.testing.registry import named
from saccade.testing.structure import same_bits
from saccade.testing.subject import Subject, cast


def _is_smallest(subject: Subject) -> bool:
    return str(subject.case) == min((str(case) for case in subject.cls.cases()), key=len)


@named(applies=_is_smallest)
def compiles(subject: Subject) -> None:
    """Under torch.compile the output is the same (one case; graph breaks are allowed, errors are not)."""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the compiler's own remarks about graph breaks and deprecations
            subject.agrees(
                torch.compile(subject.build(), backend="eager")(*subject.inputs()), "output under torch.compile"
            )
    finally:
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
        assert same_bits(pickle.loads(pickle.dumps(module))(*inputs), expected), (
            "the unpickled module gives another output"
        )
        assert same_bits(fresh.eval()(*inputs), expected), (
            "a new module with this state_dict gives another output; register what it lacks"
        )
