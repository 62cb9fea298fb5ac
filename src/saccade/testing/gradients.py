"""Are the gradients right, of every input and of every parameter?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saccade.testing.budget import assert_close
from saccade.testing.registry import named
from saccade.testing.subject import Subject, widen


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
    found = torch.autograd.grad(output, list(tensors.values()), cotangent, allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(tensors.items(), found, strict=True)}


@named()
def gradients(subject: Subject) -> None:
    """Gradients of every input and parameter are those of autograd through the oracle; what it ignores stays zero."""
    module, single = subject.build(), subject.build(torch.float32)
    shape = subject.truth.shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(subject.seed + 2))
    truth = differentiate(module.oracle, subject.inputs(), subject.names, module, weight.double())
    eager = differentiate(single.oracle, subject.inputs(torch.float32), subject.names, single, weight)
    fast = differentiate(module, subject.inputs(), subject.names, module, weight.double())
    scale = max(float(g.abs().max()) for g in truth.values())
    assert scale > 0, "the oracle has no gradient at all, so nothing could be compared"
    for name, exact in truth.items():
        what = f"gradient of {name}" + (" (cut off: zero everywhere)" if not fast[name].any() and exact.any() else "")
        assert_close(fast[name], exact, widen(exact, eager[name]), name=what, terms=subject.case.length, scale=scale)
