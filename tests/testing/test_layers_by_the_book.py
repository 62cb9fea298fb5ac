"""What oracles and claims share of layers: weights by name, attention head after head, work, and what is reached."""

import pytest
import torch
from torch import nn

from saccade.contract import Weights, reached, weighed, work
from saccade.testing import assert_close, compare


def layers():
    torch.manual_seed(0)
    found = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "bare": nn.Linear(6, 5, bias=False),
            "point": nn.Conv2d(6, 5, 1),
            "norm": nn.LayerNorm(6, eps=1e-3),
            "mlp": nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)),
            "depthwise": nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6),
            "full": nn.Conv2d(6, 4, 3, padding=1, bias=False),
            "deep": nn.Conv3d(6, 6, 3, padding=1, groups=6),
            "line": nn.Conv1d(6, 6, 5, padding=2, groups=6),
        }
    ).double()
    nn.init.normal_(found["norm"].weight)
    nn.init.normal_(found["norm"].bias)
    return found.requires_grad_(False)


def tokens(*grid):
    return torch.randn(2, *grid, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def on_maps(layer):
    return lambda x: layer(x.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_layers_are_those_of_torch(prefix):
    found, x = layers(), tokens(4, 3)
    w = Weights(nn.ModuleDict({"inner": found}) if prefix else found, prefix)
    assert w[f"{prefix}linear.bias"] is found["linear"].bias
    wanted = {
        "linear": (w.linear, found["linear"], x),
        "bare": (w.linear, found["bare"], x),
        "point": (w.linear, on_maps(found["point"]), x),
        "mlp": (w.mlp, found["mlp"], x),
        "norm": (lambda x, name: w.norm(x, name, 1e-3), found["norm"], x),
        "depthwise": (w.conv, on_maps(found["depthwise"]), x),
        "full": (w.conv, on_maps(found["full"]), x),
        "deep": (w.conv, on_maps(found["deep"]), tokens(2, 3, 4)),
        "line": (w.conv, on_maps(found["line"]), tokens(7)),
    }
    for name, (by_the_book, layer, given) in wanted.items():
        exact = layer(given)
        assert_close(by_the_book(given, name), exact, exact, terms=6 * 27)


def test_buffers_are_among_the_weights():
    assert Weights(nn.BatchNorm1d(3))["running_var"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "broken",
    [
        lambda w, x: w.norm(x, "norm"),  # another eps
        lambda w, x: w.norm(x.flip(-1), "norm", 1e-3),
    ],
)
def test_other_norms_are_noticed(broken):
    found, x = layers(), tokens(4, 3)
    exact = found["norm"](x)
    assert not compare(broken(Weights(found), x), exact, exact, terms=6).ok


def test_a_kernel_read_the_other_way_round_is_noticed():
    found, x = layers(), tokens(4, 3)
    exact = on_maps(found["depthwise"])(x)
    found["depthwise"].weight.data = found["depthwise"].weight.data.flip(2)
    assert not compare(Weights(found).conv(x, "depthwise"), exact, exact, terms=15).ok


@pytest.mark.parametrize("rows", [1, 4])
def test_heads_are_weighed_as_torch_weighs_them(rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, heads * 3, dtype=torch.float64, generator=generator) for n, heads in ((5, 4), (7, 2), (7, 2))
    )
    bias = torch.randn(rows, 5, 7, dtype=torch.float64, generator=generator)
    bias[:, 2, 3:] = -torch.inf

    def exact(turn):
        apart = [x.unflatten(2, (-1, 3)).transpose(1, 2) for x in (q, k, v)]
        apart[1:] = [turn(x) for x in apart[1:]]
        o = nn.functional.scaled_dot_product_attention(*apart, bias.expand(4, -1, -1), scale=0.3)
        return o.transpose(1, 2).flatten(2)

    found, truth = weighed(q, k, v, 3, bias, 0.3), exact(lambda x: x.repeat_interleave(2, 1))
    assert_close(found, truth, truth, terms=7)
    other = exact(lambda x: x.repeat(1, 2, 1, 1))  # key heads in turn
    assert not compare(found, other, other, terms=7).ok
    assert torch.equal(weighed(q, k, v, 3), weighed(q, k, v, 3, torch.zeros(1, 5, 7), 3**-0.5))


def test_what_is_reached_is_what_a_mask_lets_through():
    x, mixing = torch.randn(2, 4, 3), torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with torch.no_grad():
        assert reached(lambda x: (mixing @ x)[1, 0], x).tolist() == [[False] * 4, [True, False, False, True]]
        assert reached(lambda x: mixing @ x, x, (0, 1)).tolist() == [[False, True, False, False], [False] * 4]
    assert not x.requires_grad


def test_work_counts_products_and_fused_attention_with_and_without_a_bias():
    q, k, v, w = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4), torch.randn(4, 3)
    pairs, layer = 2 * 2 * 5 * 7 * (4 + 4), 2 * 2 * 5 * 4 * 3
    for bias in (None, torch.zeros(1, 2, 5, 7)):
        found = work(lambda bias=bias: nn.functional.scaled_dot_product_attention(q, k, v, bias) @ w)
        assert found == (pairs + layer, pairs, 0)
    assert work(lambda: q @ k.mT @ v) == (pairs, 0, pairs)
    assert work(lambda: q + 1) == (0, 0, 0)
