"""Attention in windows against dense attention that is masked to them, in float64: values and gradients."""

import itertools

import pytest
import torch
from torch import nn

from saccade.contract import Dims
from saccade.hosts import windows
from saccade.hosts.block import num_parameters
from saccade.hosts.windows import InWindows, WindowAttention
from saccade.testing.budget import compare
from saccade.testing.subject import randomise


def placed(grid, window, shift, dilated):
    """Of every token on every axis: what it must share with its neighbours, and its place in the window."""
    shared, inside = [], []
    for at, n, size, by in zip(
        torch.tensor(list(itertools.product(*map(range, grid)))).T, grid, window, shift, strict=True
    ):
        count = -(-n // size)
        rolled = (at - by) % (count * size)
        shared += [rolled % count if dilated else rolled // size, at < by]
        inside.append(rolled // count if dilated else rolled % size)
    return shared, inside


def by_definition(layer, x, dims, window, shift, dilated):
    """All pairs of tokens, those hidden that share no window, or have the border between them."""
    w = dict(layer.named_parameters())
    shared, inside = placed(dims.grid, window, shift, dilated)
    hidden = torch.stack([key[:, None] != key for key in shared]).any(0)
    rows = x @ w["inner.qkv.weight"].T + w.get("inner.qkv.bias", 0)
    heads, found = rows.split(dims.head_dim, -1), []
    for h in range(dims.num_heads):
        g = dims.num_heads + h // dims.group
        scores = heads[h] @ heads[g].mT / dims.head_dim**0.5
        table = w.get("inner.attention.bias.bias.table")
        if table is not None:
            apart = [(at[:, None] - at).clamp(1 - size, size - 1) for at, size in zip(inside, window, strict=True)]
            scores = scores + table[(h, *(a + size - 1 for a, size in zip(apart, window, strict=True)))]
        found.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ heads[g + dims.num_kv_heads])
    return torch.cat(found, -1) @ w["inner.out.weight"].T + w.get("inner.out.bias", 0)


CASES = [
    (Dims(2, 3, grid=(5, 7)), (3, 3), (1, 1), {}),
    (Dims(2, 3, grid=(5, 7)), (4, 2), (0, 1), {"dilated": True}),
    (Dims(4, 2, num_kv_heads=2, grid=(6, 9)), (3, 3), (0, 0), {}),
    (Dims(4, 2, num_kv_heads=2, grid=(6, 9)), (3, 3), (0, 0), {"table": None}),
    (Dims(4, 2, num_kv_heads=2, grid=(6, 9)), (2, 3), (0, 0), {"table": None, "dilated": True, "bias": False}),
    (Dims(2, 3, grid=(5, 7)), (3, 4), (2, 0), {"table": None}),
    (Dims(1, 5, grid=(3, 5)), (7, 7), (3, 3), {}),
    (Dims(2, 2, grid=(13,)), (5,), (2,), {"bias": False}),
    (Dims(2, 2, grid=(3, 4, 5)), (2, 2, 3), (1, 1, 1), {}),
]


@pytest.mark.parametrize(("dims", "window", "shift", "options"), CASES, ids=str)
def test_it_is_masked_attention(dims, window, shift, options):
    layer = randomise(WindowAttention(dims, window, shift=shift, **options).double())
    x = torch.randn(2, torch.Size(dims.grid).numel(), dims.dim, dtype=torch.float64, requires_grad=True)
    truth = by_definition(layer, x, dims, window, shift, options.get("dilated", False))
    found = layer(x)
    weights, terms = torch.randn_like(found), x.shape[1] * dims.dim
    assert compare(found.detach(), truth.detach(), truth.detach(), terms=terms).ok
    wanted = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found, wanted, weights), torch.autograd.grad(truth, wanted, weights), strict=True
    ):
        assert compare(one, other, other, terms=terms * x.shape[1]).ok


def test_one_number_serves_every_axis():
    dims, x = Dims(2, 3, grid=(5, 7)), torch.randn(1, 35, 6)
    one, other = WindowAttention(dims, 3, shift=1), WindowAttention(dims, (3, 3), shift=(1, 1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_whole_windows_without_a_table_are_plain_attention(monkeypatch):
    """No bias is formed, and the fused kernel runs on windows as the batch."""
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, **options):
        calls.append((tuple(q.shape), attn_mask))
        return fused(q, k, v, attn_mask, **options)

    def refused(*_, **__):
        raise AssertionError("a bias was formed")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(windows.RegionBias, "forward", refused)
    layer = WindowAttention(Dims(2, 4, grid=(6, 9)), 3, table=None)
    assert layer(torch.randn(2, 54, 8)).shape == (2, 54, 8)
    assert calls == [((2 * 6, 2, 9, 4), None)]
    assert layer.inner.attention.bias is None
    assert not list(layer.buffers())
    with pytest.raises(AssertionError, match="a bias was formed"):
        WindowAttention(Dims(2, 4, grid=(6, 9)), 3, table=None, shift=1)(torch.randn(2, 54, 8))


def test_any_bias_may_stand_in_for_the_table():
    def none(heads, window):
        assert (heads, window) == (2, (3, 3))
        return Zeros()

    dims, q = Dims(2, 4, grid=(6, 9)), torch.randn(12, 2, 9, 4)
    one, other = InWindows(dims, 3, table=none), InWindows(dims, 3, table=None)
    torch.testing.assert_close(one(q, q, q), other(q, q, q))


class Zeros(nn.Module):
    def forward(self, q_pos, k_pos):
        return torch.zeros(1, len(q_pos), len(k_pos))


def test_parameters_counted_by_hand():
    dims = Dims(2, 4, grid=(70, 70))
    projections = 8 * 24 + 24 + 8 * 8 + 8
    assert num_parameters(lambda: WindowAttention(dims, 7)) == projections + 2 * 13 * 13
    assert num_parameters(lambda: WindowAttention(dims, (7, 5), shift=2)) == projections + 2 * 13 * 9
    assert num_parameters(lambda: WindowAttention(dims, 7, table=None, bias=False)) == projections - 32


def test_the_table_starts_small():
    table = WindowAttention(Dims(2, 4, grid=(7, 7)), 7).inner.attention.bias.bias.table
    assert 0.01 < float(table.detach().std()) < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WindowAttention(Dims(2, 4), 3), "dims.grid: got None"),
        (lambda: WindowAttention(Dims(2, 4, grid=(5, 7)), (3, 3, 3)), r"size: got \(3, 3, 3\) for 2 axes"),
        (lambda: WindowAttention(Dims(2, 4, grid=(5, 7)), 3, shift=-1), "shift: got -1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
