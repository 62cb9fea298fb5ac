"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
from torch import Tensor

from saccade.errors import known
from saccade.softmax.problem import Problem

ORDER = ("sdpa", "tiles", "reference", "flex")  # in which `auto` asks; flex runs when it is named


class Backend(Protocol):
    """One module a backend: a name, whether gradients pass, why it cannot run a problem, and the run itself."""

    name: str
    differentiable: bool

    def reasons(self, problem: Problem) -> list[str]:
        """Why this backend cannot run a problem; empty when it can."""

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """(o (B, H, N, Dv), lse (B, H, N) or None)."""


def backend(name: str) -> Backend:
    """The backend of that name, imported when it is first asked for."""
    return importlib.import_module(f"saccade.softmax.{known('backend', name, ORDER)}")  # type: ignore[return-value]


def reasons(name: str, problem: Problem) -> list[str]:
    """Why a backend cannot run a problem, gradients included; empty when it can."""
    chosen = backend(name)
    found = chosen.reasons(problem)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (problem.q, problem.k, problem.v))
    return (
        [*found, "it has no gradients, and q, k or v asks for them"] if wanted and not chosen.differentiable else found
    )


def choose(name: str, problem: Problem) -> Backend:
    """The backend that runs a problem: the one named, which must be able to, or with `auto` the first that is."""
    if name != "auto":
        known("backend", name, ("auto", *ORDER))
        if found := reasons(name, problem):
            raise ValueError(
                f"backend: {name} cannot run this: {'; '.join(found)}. Pass backend='auto', or see explain()"
            )
        return backend(name)
    return next(backend(each) for each in ORDER if not reasons(each, problem))
