"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from saccade.errors import known
from saccade.softmax.problem import Problem, reach
from saccade.softmax.rates import Table, table_for
from saccade.where import Causal, Full

ORDER = ("sdpa", "fa4", "triton", "hopper", "flex", "tiles", "reference")
HOST = ("sdpa", "tiles", "reference")  # those that `auto` considers without CUDA


class Backend(Protocol):
    """One module a backend: a name, whether gradients pass, why it cannot run a problem, and the run itself.

    What `Table.estimate` reads besides is optional.
    """

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
    if problem.wants_gradients and not chosen.differentiable:
        return [*found, "it has no gradients, and q, k or v asks for them"]
    return found


@dataclass(frozen=True)
class Choice:
    """What `auto` takes, and what it knew. seconds: the estimates of those that can run and were measured."""

    name: str
    seconds: dict[str, float]
    refused: dict[str, list[str]]
    table: Table | None

    @classmethod
    def of(cls, problem: Problem, among: Sequence[str] = ()) -> Choice:
        """Of the backends that can run a problem the one with the lowest estimate; where none was measured, the first
        of the order. Backends that stand behind one that was measured, and were not, are not asked. among: which are
        considered (default: all that run on the device)."""
        table = table_for(problem.q.device)
        seconds: dict[str, float] = {}
        refused: dict[str, list[str]] = {}
        able: list[str] = []
        for name in among or (ORDER if problem.q.device.type == "cuda" else HOST):
            if able and (table is None or (seconds and not table.has(name))):
                continue
            if found := reasons(name, problem):
                refused[name] = found
                continue
            able.append(name)
            if table is not None and (estimate := table.estimate(backend(name), problem)) is not None:
                seconds[name] = estimate
        return cls(min(seconds, key=seconds.__getitem__) if seconds else able[0], seconds, refused, table)

    def explained(self, problem: Problem) -> str:
        """The choice in words, with figures where there are any."""
        rest = "the first of the order that can"
        if self.seconds:
            first, *others = (
                f"{name} {_words(self.seconds[name])}" for name in sorted(self.seconds, key=self.seconds.__getitem__)
            )
            lines = ["; ".join([f"{first}, the lowest estimate", *others])]
        elif self.table is not None:
            lines = [f"{self.name}, {rest}; of those that can, none was measured"]
        else:
            lines = [f"{self.name}, {rest}; no rates were measured for {_kind(problem.q.device)}"]
        if self.seconds and (dense := _dense(problem)) is not None:
            whole = Choice.of(dense)
            if whole.seconds:
                ratio = whole.seconds[whole.name] / self.seconds[self.name]
                lines.append(
                    f"attention to {dense.where!r}: {whole.name} {_words(whole.seconds[whole.name])}, {ratio:.3g}x"
                )
        lines += [f"not {name}: {'; '.join(found)}" for name, found in self.refused.items()]
        return "\n".join([*lines, f"rates: {self.table.about}"] if self.table is not None else lines)


def _words(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _kind(device: torch.device) -> str:
    if device.type != "cuda":
        return f"a {device.type}"
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def _dense(problem: Problem) -> Problem | None:
    """The same call over every key, or over every earlier one where none ahead is seen; None where it is that
    already."""
    sides = reach(problem.where)
    if sides is not None and sides[0] == math.inf:
        return None
    ahead = not (sides[1] == 0 if sides is not None else problem.plan((128, 128)).causal)
    return replace(problem, where=Full() if ahead else Causal())


def choose(name: str, problem: Problem) -> Backend:
    """The backend that runs a problem: the one named, which must be able to, or with `auto` the one of `Choice`."""
    if name == "auto":
        return backend(Choice.of(problem).name)
    known("backend", name, ("auto", *ORDER))
    if found := reasons(name, problem):
        raise ValueError(f"backend: {name} cannot run this: {'; '.join(found)}. Pass backend='auto', or see explain()")
    return backend(name)
