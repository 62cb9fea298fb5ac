"""Functions as operators of PyTorch: opaque to compilers, traceable by their shapes, differentiable by formula.

`torch.library.custom_op` does the same, but loads the compiler of PyTorch at the first call (`torch._dynamo`, some 800
modules, seconds), and checks at every call that no result shares memory with an argument; tests do that here, with
`torch.library.opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Operator:
    """`run` as the operator `name`, called as `run` is.

    name: with its namespace. run: annotated as `torch.library.infer_schema` wants it; changes none of its arguments.
    `overload` is the operator itself.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self.__doc__ = name, run.__doc__
        schema = torch.library.infer_schema(run, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default")(run)
        space, own = name.split("::")
        self.overload = getattr(getattr(torch.ops, space), own).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def register_fake(self, results: Function) -> Function:
        """What is computed, by the same arguments: empty tensors of its shapes and dtypes."""
        torch.library.register_fake(self.name)(results)
        return results

    def register_autograd(self, gradients: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        """(ctx, gradients of the results) -> those of the arguments; (ctx, inputs, output) keeps what that needs."""
        torch.library.register_autograd(self.name, gradients, setup_context=setup_context)

    def refuse_gradients(self) -> None:
        """What this computes are gradients already, which have none of their own."""

        def refuse(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(f"{self.name} has no gradients: differentiate once, or take backend='reference'")

        self.register_autograd(refuse)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """`Operator`, as a decorator.

    >>> @operator("saccade_examples::twice")
    ... def twice(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> twice(torch.ones(2))
    tensor([2., 2.])
    """

    def register(run: Callable[..., Any]) -> Operator:
        return Operator(name, run)

    return register
