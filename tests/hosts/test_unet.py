"""The U-Net: any size and rank comes back whole, by the formula; skips count; parameters counted by hand."""

import pytest
import torch
from torch import nn

from saccade.hosts.block import AttentionMixer, Block, num_parameters
from saccade.hosts.pyramid import Stage
from saccade.hosts.resize import as_map, as_tokens
from saccade.hosts.unet import UNet

STAGES = [Stage(8, 1, 2, stride=2), Stage(12, 2, 3), Stage(16, 1, 4, stride=3)]


def block(dims, stage, index):
    return Block(dims, AttentionMixer(nn.functional.scaled_dot_product_attention, dims=dims), mlp_ratio=2)


@pytest.mark.parametrize("size", [(37,), (13, 22), (1, 2), (3, 9, 7)])
def test_any_size_and_rank(size):
    model = UNet(size, STAGES, block, in_channels=2, out_channels=5, condition=6)
    x, c = torch.randn(2, 2, *size), torch.randn(2, 6)
    y = model(x, condition=c)
    assert y.shape == (2, 5, *size)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    unreached = [name for name, p in model.named_parameters() if not p.grad.any()]
    if min(size) > 2:
        assert not unreached
    with torch.no_grad():
        assert torch.equal(model.eval()(x, condition=c), model(x, condition=c))


@torch.no_grad()
def test_the_flow_is_the_formula():
    model = UNet((13, 22), STAGES, block).double()
    x = torch.randn(1, 3, 13, 22, dtype=torch.float64)
    one, two, y = model.encoder.features(x)
    for rise, skip in zip(model.rises, (two, one), strict=True):
        wide = rise.expand(y, skip.shape[2:])
        tokens = rise.merge(as_tokens(torch.cat([skip, wide], 1)))
        for each in rise.blocks:
            tokens = each(tokens)
        y = as_map(tokens, skip.shape[2:])
    assert torch.equal(model(x), model.leave(y, (13, 22)))


class Leave(nn.Module):
    def __init__(self, dim, channels, stride):
        super().__init__()
        self.given = dim, channels, stride

    def forward(self, x, size):
        return x.new_zeros(len(x), self.given[1], *size)


def test_strides_by_axis_and_an_own_way_out():
    stages = [Stage(8, 1, 2, stride=(1, 2, 4)), Stage(12, 1, 3, stride=(2, 1, 2))]
    x = torch.randn(1, 3, 3, 9, 7)
    assert UNet((3, 9, 7), stages, block)(x).shape == x.shape
    model = UNet((3, 9, 7), stages, block, leave=Leave, out_channels=5)
    assert model.leave.given == (8, 5, (1, 2, 4))
    assert model(x).shape == (1, 5, 3, 9, 7)


def test_parameters_counted_by_hand():
    stages = [Stage(4, 1, 2, stride=2), Stage(6, 1, 1)]
    one = 2 * 2 * 4 + (4 * 12 + 12) + (4 * 4 + 4) + (4 * 8 + 8) + (8 * 4 + 4)
    two = 2 * 2 * 6 + (6 * 18 + 18) + (6 * 6 + 6) + (6 * 12 + 12) + (12 * 6 + 6)
    enter = (3 * 4 * 4 + 4 + 2 * 4) + (2 * 4 + 4 * 4 * 6 + 6)
    up = (2 * 6 + 6 * 4 * 4 + 4) + (8 * 4 + 4)
    leave = 2 * 4 + 4 * 4 * 3 + 3
    assert num_parameters(lambda: UNet((8, 8), stages, block)) == 2 * one + two + enter + up + leave
    moves = 2 * (5 * 8 + 8) + (5 * 12 + 12)
    assert num_parameters(lambda: UNet((8, 8), stages, block, condition=5)) == (
        2 * one + two + enter + up + leave + moves
    )


def test_a_condition_moves_every_stage_and_is_asked_for():
    model = UNet((13, 22), STAGES, block, condition=6)
    x, c = torch.randn(2, 3, 13, 22), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(model(x, condition=c), model(x, condition=-c))  # no effect at first
        for each in model.modules():
            if hasattr(each, "modulation"):
                nn.init.normal_(each.modulation.weight)
        assert not torch.allclose(model(x, condition=c), model(x, condition=-c))
    with pytest.raises(TypeError, match="condition"):
        model(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UNet((9, 9), [], block), "stages: got none"),
        (lambda: UNet((9, 9), STAGES, block, out_channels=0), "out_channels: got 0"),
        (lambda: UNet((9, 9), STAGES, block, condition=0), "condition: got 0"),
        (lambda: UNet((9, 9), STAGES, block)(torch.ones(1, 3, 9, 8)), r"x: got shape \(1, 3, 9, 8\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mechanism_both_ways():
    from saccade import mechanism

    def davit(dims, stage, index):
        return mechanism("davit")(dims, window=3)

    model = UNet((21, 18), [Stage(8, 1, 2, stride=2), Stage(16, 1, 4)], davit, condition=4)
    assert model(torch.randn(1, 3, 21, 18), condition=torch.randn(1, 4)).shape == (1, 3, 21, 18)
