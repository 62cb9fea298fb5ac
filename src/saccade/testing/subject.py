"""A mechanism at one case, with what the checks share: the module, its inputs, the oracle's answer and the budget.

Values are drawn in float32 and cast up, so that the float64 oracle and the float32 eager run see the very same numbers.
What the oracle loses in float32, scaled by eps64 / eps32, is what a float64 fast path is allowed to lose (`rounding`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Mechanism
from saccade.testing.ambient import seeded
from saccade.testing.budget import assert_close
from saccade.testing.rounding import EPS_RATIO, Eager, Evaluate, cast


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic of `module` off its special initial value, in place; return it.

    A spread-out parameter moves by half its own standard deviation. A constant one (norm weights of one, zero biases,
    layer scales of 1e-6) moves by 0.3, or by fan_in ** -0.5 when it is a matrix: nothing stays zero, nothing explodes.

    >>> bool((randomise(nn.LayerNorm(4)).bias != 0).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    for parameter in module.parameters():
        spread = float((parameter - parameter.mean()).abs().square().mean().sqrt())
        still = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        size = spread / 2 if spread > 1e-3 else still
        parameter.add_(noise(parameter) * size)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return module


def outputs(module: Mechanism, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the oracle gives, by name."""
    return {"output": module.oracle(*inputs)}


class Subject:
    """`cls` at `case`: the float64 `module`, evaluating, with randomised parameters, and the oracle's `truth`."""

    def __init__(self, cls: type[Mechanism], case: Case, seed: int = 0) -> None:
        self.cls, self.case, self.seed = cls, case, seed

    def variant(self, *, seed: int | None = None, **changes: object) -> Subject:
        """The same mechanism at a changed case, or with other numbers."""
        return Subject(self.cls, replace(self.case, **changes), self.seed if seed is None else seed)  # type: ignore[arg-type]

    @functools.cached_property
    def master(self) -> Mechanism:
        """The module in float32; the others are casts of it."""
        with seeded(self.seed):
            module = self.cls(self.case.dims, **self.case.params)
        if not isinstance(module, Mechanism):
            raise TypeError(f"{self.cls.__name__}: built a {type(module).__name__}; subclass Attention or Mixer")
        return randomise(cast(module, torch.float32), self.seed).eval()  # type: ignore[return-value]

    def build(self, dtype: torch.dtype = torch.float64) -> Mechanism:
        """A fresh copy in `dtype`."""
        return cast(self.master, dtype)

    @functools.cached_property
    def module(self) -> Mechanism:
        return self.build()

    @functools.cached_property
    def drawn(self) -> tuple[Tensor, ...]:
        return self.cls.inputs(self.case, torch.Generator().manual_seed(self.seed + 1), torch.float32)

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The inputs in `dtype`, float32 numbers rounded or widened; every call gives new tensors."""
        return tuple(x.to(dtype, copy=True) for x in self.drawn)

    @property
    def names(self) -> tuple[str, ...]:
        """What the inputs are called."""
        return ("q", "k", "v") if issubclass(self.cls, Attention) else ("x",)

    def eager(self, evaluate: Evaluate, dtype: torch.dtype = torch.float64) -> Eager:
        """Equations that `evaluate` reads off a module, in `dtype`, on these numbers."""
        return Eager(evaluate, self.master, self.drawn, dtype)

    def output(self, dtype: torch.dtype = torch.float64) -> Eager:
        """The oracle's `output`."""
        return self.eager(outputs, dtype)

    @functools.cached_property
    def _output(self) -> Eager:
        return self.output()

    @property
    def truth(self) -> Tensor:
        return self._output.truth["output"]

    def agrees(self, actual: Tensor, name: str = "output") -> None:
        """Raise unless the float64 `actual` equals the oracle within the budget."""
        assert actual.dtype == torch.float64, f"{name}: got dtype {actual.dtype} for float64 inputs"
        assert actual.shape == self.truth.shape, (
            f"{name}: got shape {tuple(actual.shape)}, the oracle gives {tuple(self.truth.shape)}"
        )
        assert_close(actual, self.truth, self._output.beside("output"), name=name, terms=self.case.length)


def widen(truth: Tensor, single: Tensor) -> Tensor:
    """The float64 result whose error is that of the float32 `single`, scaled by eps64 / eps32."""
    return truth + (single.double() - truth) * EPS_RATIO
