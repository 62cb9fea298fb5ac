"""What plain code loses to rounding: several runs of the same equations that differ by rounding alone.

How far one run is off is one draw from what rounding may do, and by chance it is small. A neighbouring problem, every
number of which is moved by a last bit, is as hard, and rounds otherwise at every step. Each run is judged by the
float64 answer to its own problem: what it lost is rounding, not the change of the problem.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from saccade.contract import Mechanism

# A right result is itself such a draw: with n others it is the furthest off of all by chance once in n + 1, and by more
# than twice as much far less often than that.
RUNS = 8
EPS_RATIO = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

Evaluate = Callable[[Mechanism, Sequence[Tensor]], dict[str, Tensor]]


def cast(module: Mechanism, dtype: torch.dtype) -> Mechanism:
    """A copy with every floating parameter and buffer in `dtype`; complex ones keep being complex, integers stay."""
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(wide)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return copy.deepcopy(module)._apply(convert)


def nudge(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every number moved up or down by about eps of itself, or left alone; zeros stay.

    >>> x = torch.ones(100)
    >>> sorted(set(((nudge(x, torch.Generator()) - 1) / torch.finfo(x.dtype).eps).tolist()))
    [-1.0, 0.0, 1.0]
    """
    steps = torch.randint(-1, 2, x.shape, generator=generator)
    return x * (1 + steps.to(x.real.dtype if x.is_complex() else x.dtype) * torch.finfo(x.dtype).eps)


class Eager:
    """Equations run in `dtype`, and how far they are off in RUNS problems: the given one, and neighbours of it.

    evaluate: (module, inputs) -> tensors by name, in the dtype of both. module, inputs: on the CPU, rounded to `dtype`.
    For a fast path in float64 the equations run in float32 and their errors are scaled by eps64 / eps32. A run is made
    when it is asked for, and kept.
    """

    def __init__(self, evaluate: Evaluate, module: Mechanism, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.evaluate, self.module, self.inputs = evaluate, module, inputs
        self.dtype = torch.float32 if dtype == torch.float64 else dtype
        self.scale = EPS_RATIO if dtype == torch.float64 else 1.0
        self.errors: list[dict[str, Tensor]] = []

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """What the equations give for the given problem in float64."""
        return self._exact(*self._problem(0))

    def beside(self, name: str) -> Iterator[Tensor]:
        """The truth of a name, moved by the error of one run after another."""
        for run in range(RUNS):
            if run == len(self.errors):
                self.errors.append(self._error(run))
            yield self.truth[name] + self.errors[run][name] * self.scale

    def _problem(self, run: int) -> tuple[Mechanism, list[Tensor]]:
        """The module and the inputs in `dtype`."""
        module, inputs = cast(self.module, self.dtype), [x.to(self.dtype, copy=True) for x in self.inputs]
        if run:
            generator = torch.Generator().manual_seed(run)
            inputs = [nudge(x, generator) for x in inputs]
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(nudge(parameter, generator))
        return module, inputs

    def _exact(self, module: Mechanism, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.evaluate(cast(module, torch.float64), [x.double() for x in inputs])

    def _error(self, run: int) -> dict[str, Tensor]:
        module, inputs = self._problem(run)
        exact = self._exact(module, inputs) if run else self.truth
        with torch.no_grad():
            found = self.evaluate(module, inputs)
        return {name: x.double() - exact[name] for name, x in found.items()}
