"""The pyramid: its data flow by hand, any size and rank, every parameter reached, parameters counted by hand."""

import pytest
import torch
from torch import nn

from saccade.contract import Dims
from saccade.hosts.block import AttentionMixer, Block, num_parameters
from saccade.hosts.pyramid import Pyramid, Stage, conv_enter, pool_then_norm, widen_then_pool
from saccade.hosts.resize import Expand, Reduce, as_map, as_tokens, coarser

STAGES = [Stage(8, 1, 2, stride=4), Stage(12, 2, 3), Stage(16, 0, 4)]


def block(dims, stage, index):
    return Block(dims, AttentionMixer(nn.functional.scaled_dot_product_attention, dims=dims), mlp_ratio=2)


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((45, 37), [(12, 10), (6, 5), (3, 3)]),
        ((1, 3), [(1, 1)] * 3),
        ((53,), [(14,), (7,), (4,)]),
        ((5, 17, 9), [(2, 5, 3), (1, 3, 2), (1, 2, 1)]),
    ],
)
def test_any_size_and_rank(size, grids):
    model = Pyramid(size, STAGES, block, in_channels=2, num_classes=5)
    x = torch.randn(2, 2, *size)
    assert [tuple(y.shape) for y in model.features(x)] == [(2, s.dim, *g) for s, g in zip(STAGES, grids, strict=True)]
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_the_flow_is_the_formula():
    model = Pyramid((9, 14), STAGES, block, num_classes=5).double().eval()
    x = torch.randn(1, 3, 9, 14, dtype=torch.float64)
    y, grid = x, (9, 14)
    for stage, level in zip(STAGES, model.levels, strict=True):
        y, grid = as_tokens(level.enter(y)), coarser(grid, stage.stride)
        for each in level.blocks:
            y = each(y)
        y = as_map(y, grid)
    assert torch.equal(model(x), model.head(as_tokens(y)))
    assert torch.equal(model(x), model(x))


def test_parameters_counted_by_hand():
    stages = [Stage(4, 1, 2, stride=4), Stage(6, 1, 1)]
    one = 2 * 2 * 4 + (4 * 12 + 12) + (4 * 4 + 4) + (4 * 8 + 8) + (8 * 4 + 4)  # norms, qkv, out, mlp
    two = 2 * 2 * 6 + (6 * 18 + 18) + (6 * 6 + 6) + (6 * 12 + 12) + (12 * 6 + 6)
    enter = (3 * 16 * 4 + 4 + 2 * 4) + (2 * 4 + 4 * 4 * 6 + 6)
    head = 2 * 6 + 6 * 10 + 10
    assert num_parameters(lambda: Pyramid((8, 8), stages, block, num_classes=10)) == one + two + enter + head


def test_blocks_are_told_where_they_are_and_get_the_options():
    told = []

    class Scaled(nn.Module):
        def forward(self, x, *, by=1.0):
            return x * by

    def note(dims, stage, index):
        told.append((dims.num_heads, dims.dim, dims.grid, stage, index))
        return Scaled()

    model = Pyramid((9, 14), STAGES, note, head=None)
    assert told == [(2, 8, (3, 4), 0, 0), (3, 12, (2, 2), 1, 0), (3, 12, (2, 2), 1, 1)]
    x = torch.randn(1, 3, 9, 14)
    assert model(x, by=0.0).shape == (1, 1, 16)
    first = model.features(x)[0]
    assert torch.equal(model.features(x, by=2.0)[0], 2 * first)


def test_weights_go_to_another_size():
    small, large = (Pyramid(size, STAGES, block, num_classes=5) for size in ((9, 14), (33, 20)))
    large.load_state_dict(small.state_dict())
    assert large(torch.randn(1, 3, 33, 20)).shape == (1, 5)


def test_an_own_way_into_a_stage_and_out():
    def enter(dim_in, dim_out, stride, stage):
        return Reduce(dim_in, dim_out, stride, kernel=7 if stage == 0 else 3, before=None, after=nn.LayerNorm(dim_out))

    model = Pyramid((30, 17), STAGES, block, enter=enter, head=pool_then_norm, num_classes=3)
    assert model(torch.randn(1, 3, 30, 17)).shape == (1, 3)
    assert isinstance(model.head[1], nn.LayerNorm)


@pytest.mark.parametrize("kernel", [2, 3, 4, 7])
@pytest.mark.parametrize("length", range(1, 12))
def test_a_reduction_reads_from_where_it_says(kernel, length):
    stride, left = 2, 0 if kernel == 2 else (kernel - 1) // 2
    reduce = Reduce(1, 1, stride, kernel=kernel, rank=1).double()
    x = torch.randn(1, 1, length, dtype=torch.float64)
    y = reduce(x)
    assert y.shape[2] == -(-length // stride)
    weight, bias = reduce.conv.weight.flatten(), reduce.conv.bias
    for p in range(y.shape[2]):
        taps = [(t, stride * p + t - left) for t in range(kernel)]
        value = bias + sum(weight[t] * x[0, 0, at] for t, at in taps if 0 <= at < length)
        torch.testing.assert_close(y[0, 0, p], value[0])


def test_an_expansion_covers_what_was_reduced():
    expand = Expand(2, 3, 3, rank=1, norm=nn.LayerNorm(2)).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    y = expand(x, (10,))
    assert y.shape == (1, 3, 10)
    weight, bias, normed = expand.conv.weight, expand.conv.bias, expand.norm(x.mT).mT
    for at in range(10):
        torch.testing.assert_close(y[0, :, at], bias + normed[0, :, at // 3] @ weight[:, :, at % 3])


@torch.no_grad()
def test_convolutions_enter_and_a_wide_head_leaves():
    model = Pyramid((45, 37), STAGES[:2], block, enter=conv_enter, head=widen_then_pool(20), num_classes=5).eval()
    x = torch.randn(2, 3, 45, 37)
    assert [tuple(y.shape) for y in model.features(x)] == [(2, 8, 12, 10), (2, 12, 6, 5)]
    assert [sum(isinstance(m, nn.BatchNorm2d) for m in level.enter.modules()) for level in model.levels] == [4, 1]
    tokens, (wide, norm, _, _, last) = as_tokens(list(model.features(x))[-1]), model.head
    hidden = wide(tokens) / (1 + norm.eps) ** 0.5  # nothing has been counted yet
    torch.testing.assert_close(model(x), last((hidden * hidden.sigmoid()).mean(1)))


def test_strides_by_axis():
    stages = [Stage(8, 1, 2, stride=(2, 4, 4)), Stage(12, 1, 3, stride=(1, 2, 3))]
    model = Pyramid((5, 17, 9), stages, block, num_classes=5)
    x = torch.randn(1, 3, 5, 17, 9)
    assert [tuple(y.shape[2:]) for y in model.features(x)] == [(3, 5, 3), (3, 3, 1)]
    assert model(x).shape == (1, 5)


@torch.no_grad()
def test_a_reduction_and_its_expansion_by_axis():
    """Each axis by itself: the outer product of two reductions is the reduction of the outer product."""
    reduce = Reduce(1, 1, (2, 3), kernel=(3, 3), bias=False).double()
    rows, columns = torch.randn(2, 3, dtype=torch.float64)
    reduce.conv.weight.copy_(rows[:, None] * columns)
    x, y = (torch.randn(n, dtype=torch.float64) for n in (7, 8))
    one = [sum(rows[t] * x[2 * p + t - 1] for t in range(3) if 0 <= 2 * p + t - 1 < 7) for p in range(4)]
    other = [sum(columns[t] * y[3 * p + t] for t in range(3) if 3 * p + t < 8) for p in range(3)]
    found = reduce((x[:, None] * y)[None, None])[0, 0]
    torch.testing.assert_close(found, torch.stack(one)[:, None] * torch.stack(other))
    expand = Expand(1, 1, (2, 3)).double()
    wide = expand(found[None, None], (7, 8))[0, 0]
    for at, to in ((0, 0), (6, 7), (3, 5)):
        value = expand.conv.bias + found[at // 2, to // 3] * expand.conv.weight[0, 0, at % 2, to % 3]
        torch.testing.assert_close(wide[at, to], value[0])


def wrong(dim_in, dim_out, stride, stage):
    return nn.Conv2d(dim_in, dim_out, 3, stride)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pyramid((9, 9), [], block), "stages: got none"),
        (lambda: Pyramid((9, 9, 9, 9), STAGES, block), r"size: got \(9, 9, 9, 9\)"),
        (lambda: Pyramid((9, 0), STAGES, block), "size: got 0"),
        (lambda: conv_enter(3, 8, 2, 0), "stride: got 2 for stage 0; pass 4"),
        (lambda: Stage(8, 1, 3), "heads: got 3 for dim 8"),
        (lambda: Stage(8, -1, 2), "depth: got -1"),
        (lambda: Stage(8, 1, 2, stride=(2, 0)), "stride: got 0"),
        (lambda: Pyramid((9, 9), [Stage(8, 1, 2, stride=(2, 2, 2))], block), r"stride: got \(2, 2, 2\) for 2 axes"),
        (lambda: Reduce(3, 8, 4, kernel=3), "kernel: got 3 for stride 4"),
        (lambda: Reduce(3, 8, (2, 4), kernel=(2, 3)), r"kernel: got \(2, 3\) for stride \(2, 4\)"),
        (lambda: Pyramid((9, 9), STAGES, block)(torch.ones(1, 3, 9, 8)), r"x: got shape \(1, 3, 9, 8\); .*3, 9, 9"),
        (
            lambda: Pyramid((9, 9), STAGES, block, enter=wrong)(torch.ones(1, 3, 9, 9)),
            r"enter: Conv2d gave a map of shape \(1, 8, 2, 2\), the stage needs \(B, 8, 3, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mechanism_in_the_pyramid():
    from saccade import mechanism

    def nat(dims: Dims, stage, index):
        return Block(dims, AttentionMixer(mechanism("nat")(dims, kernel=3)))

    model = Pyramid((29, 23), [Stage(8, 1, 2, stride=4), Stage(16, 1, 2)], nat, num_classes=4)
    assert model(torch.randn(1, 3, 29, 23)).shape == (1, 4)
