"""Are the gradients right, of every input and of every parameter?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saccade.contract import Mechanism
from saccade.testing.budget import assert_close
from saccade.testing.registry import named
from saccade.testing.rounding import Eager
from saccade.testing.subject import Subject


def differentiate(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    module: nn.Module,
    cotangent: Tensor,
) -> dict[str, Tensor]:
    """Gradients of sum(function(*inputs) * cotangent) by input and parameter name; zeros where nothing flows."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in zip(names, inputs, strict=True)}
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        output = function(*leaves.values())
    tensors = {**leaves, **weights}
    if not output.requires_grad:
        return {name: torch.zeros_like(x) for name, x in tensors.items()}
    found = torch.autograd.grad(output, list(tensors.values()), cotangent.to(output), allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(tensors.items(), found, strict=True)}


def gradients_agree(
    subject: Subject,
    fast: Callable[..., Tensor],
    plain: Callable[[Mechanism], Callable[..., Tensor]],
    *,
    shape: torch.Size,
    terms: int,
    what: str = "gradient",
) -> None:
    """Raise unless `fast` has the gradients of `plain(module)` in float64, by the budget of its float32 runs.

    fast: a function of the inputs that reads the parameters of `subject.module`. plain: module -> function of the
    inputs. shape: of the output. terms: see `compare`.
    """
    weight = cotangent(subject, shape)
    eager = subject.eager(lambda module, inputs: differentiate(plain(module), inputs, subject.names, module, weight))
    found = differentiate(fast, subject.inputs(), subject.names, subject.module, weight)
    check_gradients(found, eager, terms=terms, what=what)


def cotangent(subject: Subject, shape: torch.Size) -> Tensor:
    """What the gradients of an output are asked for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(subject.seed + 2))


def check_gradients(found: dict[str, Tensor], eager: Eager, *, terms: int, what: str = "gradient") -> None:
    """Raise unless the gradients `found` are those of the equations, by their budget."""
    truth = eager.truth
    scale = max(float(g.abs().max()) for g in truth.values())
    assert scale > 0, "the oracle has no gradient at all, so nothing could be compared"
    for name, exact in truth.items():
        cut = " (cut off: zero everywhere)" if exact.any() and not found[name].any() else ""
        assert_close(found[name], exact, eager.beside(name), name=f"{what} of {name}{cut}", terms=terms, scale=scale)


@named()
def gradients(subject: Subject) -> None:
    """Gradients of every input and parameter are those of autograd through the oracle; what it ignores stays zero."""
    shape, terms = subject.truth.shape, subject.case.length
    gradients_agree(subject, subject.module, lambda module: module.oracle, shape=shape, terms=terms)
