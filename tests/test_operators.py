"""Operators of PyTorch by `saccade.operators`."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from saccade.operators import operator


@operator("saccade_tests::scaled")
def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


@scaled.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@operator("saccade_tests::scaled_backward")
def scaled_backward(do: Tensor, by: float) -> Tensor:
    return do * by


def keep(ctx, inputs, output):
    ctx.by = inputs[1]


scaled.register_autograd(lambda ctx, do: (scaled_backward(do, ctx.by), None), setup_context=keep)
scaled_backward.refuse_gradients()
scaled_backward.register_fake(lambda do, by: torch.empty_like(do))


def test_an_operator_is_one_of_pytorch():
    x = torch.randn(3, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(scaled.overload, (x, 2.0), test_utils=checks)
    scaled(x, 3.0).sum().backward()
    assert x.grad.equal(torch.full((3,), 3.0))


def test_a_result_that_is_an_argument_is_noticed():
    @operator("saccade_tests::same")
    def same(x: Tensor) -> Tensor:
        return x

    with pytest.raises(Exception, match=r"alias|input"):
        torch.library.opcheck(same.overload, (torch.randn(2),), test_utils=("test_schema",))


def test_gradients_of_gradients_are_refused():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(scaled(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="scaled_backward has no gradients"):
        dx.sum().backward()


def test_a_first_call_loads_no_compiler():
    """In a process of its own: what `custom_op` would load is seen, and this loads none of it."""
    script = (
        "import sys, torch\nfrom saccade.operators import operator\n"
        "def twice(x: torch.Tensor) -> torch.Tensor:\n    return 2 * x\n"
        "for make in (operator('saccade_tests::a'), torch.library.custom_op('saccade_tests::b', mutates_args=())):\n"
        "    make(twice)(torch.ones(2, requires_grad=True))\n"
        "    print('torch._dynamo' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
