"""The super-resolution model: its formula, any size and scale, parameters counted by hand."""

import pytest
import torch
from torch import nn

from saccade import mechanism
from saccade.hosts.block import Residual, num_parameters
from saccade.hosts.upscale import Upscaler


def block(dims, stage, index):
    return Residual(nn.Linear(dims.dim, dims.dim))


@pytest.mark.parametrize(
    ("size", "window", "scale", "grid"),
    [((5, 9), 4, 2, (8, 12)), ((7, 6), 3, 3, (9, 6)), ((1, 2), 5, 4, (5, 5)), ((4, 4), 4, 1, (4, 4))],
)
def test_any_size_and_scale(size, window, scale, grid):
    model = Upscaler(size, window, 8, 2, 2, block, scale=scale, in_channels=2, features=4)
    y = model(torch.randn(2, 2, *size))
    assert model.dims.grid == grid
    assert y.shape == (2, 2, scale * size[0], scale * size[1])
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_the_flow_is_the_formula():
    model = Upscaler((5, 9), 4, 8, 2, 2, block, scale=2).double()
    x = torch.rand(1, 3, 5, 9, dtype=torch.float64)
    mean = model.mean.double()
    whole = nn.functional.pad(x, (0, 3, 0, 3), mode="reflect")
    entered = model.enter(whole - mean)
    tokens = nn.functional.layer_norm(entered.flatten(2).mT, (8,))
    for group in model.groups:
        tokens = group(tokens)
    mixed = entered + model.after(nn.functional.layer_norm(tokens, (8,)).mT.unflatten(2, (8, 12)))
    first, _, second, _, last = model.leave
    wide = second(nn.functional.leaky_relu(first(mixed), 0.01))
    y = last(wide.view(1, 64, 2, 2, 8, 12).permute(0, 1, 4, 2, 5, 3).reshape(1, 64, 16, 24)) + mean
    torch.testing.assert_close(model(x), y[:, :, :10, :18])


def test_parameters_counted_by_hand():
    def conv(dim_in, dim_out):
        return dim_in * dim_out * 9 + dim_out

    groups = 3 * (8 * 8 + 8) + 2 * 2 * 8
    leave = conv(8, 5) + 2 * conv(5, 20) + conv(5, 3)
    found = num_parameters(lambda: Upscaler((5, 9), 4, 8, 3, 2, block, features=5))
    assert found == conv(3, 8) + conv(8, 8) + groups + leave


def test_blocks_are_told_where_they_are_and_get_the_options():
    told = []

    class Scaled(nn.Module):
        def forward(self, x, *, by=1.0):
            return x * by

    def note(dims, stage, index):
        told.append((dims.num_heads, dims.dim, dims.grid, stage, index))
        return Scaled()

    model = Upscaler((5, 9), 4, 8, 2, 2, note, scale=1)
    assert told == [(2, 8, (8, 12), 0, 0), (2, 8, (8, 12), 0, 1)]
    x = torch.randn(1, 3, 5, 9)
    assert not torch.equal(model(x), model(x, by=0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Upscaler((5,), 4, 8, 1, 2, block), r"size: got \(5,\); pass \(Y, X\)"),
        (lambda: Upscaler((5, 9), 4, 8, 1, 3, block), "heads: got 3 for dim 8"),
        (lambda: Upscaler((5, 9), 0, 8, 1, 2, block), "window: got 0"),
        (lambda: Upscaler((5, 9), 4, 8, 1, 2, block, scale=0), "scale: got 0"),
        (lambda: Upscaler((5, 9), 4, 8, 1, 2, block)(torch.ones(1, 3, 9, 5)), r"x: got shape \(1, 3, 9, 5\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@torch.no_grad()
@pytest.mark.parametrize("id", ["drct", "hat"])
def test_mechanisms_in_it(id):
    host = {"size": (5, 9), "dim": 8, "depth": 2, "heads": 2, "features": 4, "scale": 2}
    y = mechanism(id).model(**host, params={"window": 4})(torch.rand(1, 3, 5, 9))
    assert y.shape == (1, 3, 10, 18)
    assert y.isfinite().all()
