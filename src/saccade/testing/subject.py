"""A mechanism at one case, with what the checks share: the module, its inputs, the oracle's answer and the budget.

Values are drawn in float32 and cast up, so that the float64 oracle and the float32 eager run see the very same numbers.
What the oracle loses in float32, scaled by eps64 / eps32, is what a float64 fast path is allowed to lose.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Mechanism
from saccade.testing.ambient import seeded
from saccade.testing.budget import assert_close

EPS_RATIO = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def cast(module: Mechanism, dtype: torch.dtype) -> Mechanism:
    """A copy with every floating parameter and buffer in `dtype`; complex ones keep being complex, integers stay."""
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(wide)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return copy.deepcopy(module)._apply(convert)


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

    @functools.cached_property
    def truth(self) -> Tensor:
        with torch.no_grad():
            return self.module.oracle(*self.inputs())

    @functools.cached_property
    def eager(self) -> Tensor:
        """`truth` moved by as much as the oracle's own float32 run is off, scaled to float64."""
        with torch.no_grad():
            single = self.build(torch.float32).oracle(*self.inputs(torch.float32))
        return widen(self.truth, single)

    def agrees(self, actual: Tensor, name: str = "output") -> None:
        """Raise unless the float64 `actual` equals the oracle within the budget."""
        assert actual.dtype == torch.float64, f"{name}: got dtype {actual.dtype} for float64 inputs"
        assert actual.shape == self.truth.shape, (
            f"{name}: got shape {tuple(actual.shape)}, the oracle gives {tuple(self.truth.shape)}"
        )
        assert_close(actual, self.truth, self.eager, name=name, terms=self.case.length)


def widen(truth: Tensor, single: Tensor) -> Tensor:
    """The float64 result whose error is that of the float32 `single`, scaled by eps64 / eps32."""
    return truth + (single.double() - truth) * EPS_RATIO
