"""Windows against loops over coordinates; any cut can be joined; regions are what a window keeps apart."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import mix
from saccade.mix import cut_windows, join_windows, window_regions, windows


@st.composite
def cuts(draw):
    rank = draw(st.integers(1, 3))

    def each(least, most):
        return st.lists(st.integers(least, most), min_size=rank, max_size=rank).map(tuple)

    return draw(each(1, 7)), draw(each(1, 4)), {"shift": draw(each(0, 5)), "dilated": draw(st.booleans())}


def sources(grid, size, shift, dilated):
    """For every window the coordinates on the grid of its tokens, in order: the definition, in loops."""
    count = [-(-n // w) for n, w in zip(grid, size, strict=True)]
    found = []
    for window in itertools.product(*map(range, count)):
        tokens = []
        for inside in itertools.product(*map(range, size)):
            at = []
            for a, i, w, n, s in zip(window, inside, size, count, shift, strict=True):
                at.append(((i * n + a if dilated else a * w + i) + s) % (n * w))
            tokens.append(tuple(at))
        found.append(tokens)
    return found


@given(cuts())
def test_a_cut_is_its_definition_and_joins_again(cut):
    grid, size, how = cut
    x = torch.arange(1.0, 2 * math.prod(grid) * 2 + 1).view(2, math.prod(grid), 2)
    image = x.unflatten(1, grid)
    y = cut_windows(x, grid, size, **how)
    for a, tokens in enumerate(sources(grid, size, **how)):
        for i, at in enumerate(tokens):
            inside = all(c < n for c, n in zip(at, grid, strict=True))
            expected = image[(slice(None), *at)] if inside else torch.zeros(2, 2)
            assert torch.equal(y[:, a, i], expected)
    assert y.shape[1:3] == (a + 1, i + 1)
    assert torch.equal(join_windows(y, grid, size, **how), x)


@given(cuts())
def test_regions_are_the_sides_of_the_border(cut):
    grid, size, how = cut
    labels = window_regions(grid, size, **how)
    for a, tokens in enumerate(sources(grid, size, **how)):
        for i, at in enumerate(tokens):
            if any(c >= n for c, n in zip(at, grid, strict=True)):
                assert labels[a, i] == -1
                continue
            whole = [-(-n // w) * w for n, w in zip(grid, size, strict=True)]
            came = [c < s % n for c, s, n in zip(at, how["shift"], whole, strict=True)]
            assert labels[a, i] == sum(2**axis for axis, yes in enumerate(came) if yes)


def test_the_mask_of_a_shifted_window():
    """On 4 x 4 with windows of 2, shifted by 1: one window is whole, two are halves, one is four single corners."""
    labels = window_regions((4, 4), 2, shift=1)
    together = labels[:, :, None] == labels[:, None, :]
    assert together.sum((1, 2)).tolist() == [16, 8, 8, 4]


def test_dilated_windows_are_contiguous_ones_of_permuted_tokens():
    x = torch.randn(1, 6 * 8, 3)
    order = torch.arange(48).view(3, 2, 4, 2).permute(1, 0, 3, 2).flatten()  # rows and columns by residue
    assert torch.equal(cut_windows(x, (6, 8), (3, 4), dilated=True), cut_windows(x[:, order], (6, 8), (3, 4)))


@pytest.mark.parametrize("dilated", [False, True])
def test_gradients_pass_through(dilated):
    x = torch.randn(2, 15, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        y = cut_windows(x, (3, 5), 2, shift=1, dilated=dilated)
        return y, join_windows(y.square(), (3, 5), 2, shift=1, dilated=dilated)

    assert torch.autograd.gradcheck(there_and_back, x)


def test_a_module_in_windows():
    inner = torch.nn.Linear(3, 3)
    x = torch.randn(2, 35, 3)
    module = mix.Windowed(inner, (5, 7), 4, shift=(1, 2), dilated=True)
    torch.testing.assert_close(module(x), inner(x))
    seen = []
    mix.Windowed(lambda x, to: seen.append((x.shape, to)) or x, (5, 7), 4)(x, to="inner")
    assert seen == [((8, 16, 3), "inner")]
    with pytest.raises(ValueError, match="size: got 0"):
        mix.Windowed(inner, (5, 7), 0)


def test_biases_keep_regions_apart():
    """Shifted windows that are cut at the border, against attention that is masked whole."""
    grid, size, shift = (5, 7), 3, 1
    regions = window_regions(grid, size, shift=shift)
    table = torch.nn.Parameter(torch.randn(2, 9, 9, dtype=torch.float64))

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, i, j):
            return self.table[:, i[:, None], j]

    bias = mix.RegionBias(Table(), regions)
    q, k, v = torch.randn(3, 4 * len(regions), 2, 9, 5, dtype=torch.float64)
    from saccade import attend

    found = bias.unfold(attend(*map(bias.fold, (q, k, v)), bias=bias))
    scores = q @ k.mT / 5**0.5 + table
    apart = regions[:, :, None] != regions[:, None, :]
    weights = scores.masked_fill(apart.repeat(4, 1, 1)[:, None], -torch.inf).softmax(-1)
    real = (regions >= 0).repeat(4, 1)[:, None, :, None]
    torch.testing.assert_close(found * real, (weights @ v) * real)
    assert torch.equal(mix.RegionBias.of(Table(), grid, size, shift=shift).regions, regions)
    assert mix.RegionBias.of(Table(), (6, 3), size, dilated=True).regions.tolist() == [[0] * 9]
    found.square().sum().backward()
    assert table.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"regions: got torch.float32 of shape \(3,\)"):
        mix.RegionBias(Table(), torch.zeros(3))


def test_regions_alone_need_no_bias():
    regions = window_regions((5, 7), 3, shift=1)
    own, at = torch.nn.Parameter(torch.randn(1, 9, 9)), torch.arange(9)
    zeros, alone = (mix.RegionBias(b, regions, heads=3)(at, at) for b in (lambda i, j: torch.zeros(3, 9, 9), None))
    assert torch.equal(alone, zeros)
    assert alone.shape == (3 * len(regions), 9, 9)
    shared = mix.RegionBias(lambda i, j: own[:, i[:, None], j], regions, heads=3)(at, at)
    assert torch.equal(shared, own + alone)
    assert mix.RegionBias.of(None, (5, 7), 3, shift=1)(at, at).shape == (len(regions), 9, 9)
    with pytest.raises(ValueError, match="heads: got 0"):
        mix.RegionBias(None, regions, heads=0)


def test_strided_tokens_are_read_right():
    x = torch.randn(1, 15, 3)
    view = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(cut_windows(view, (3, 5), 2), cut_windows(x, (3, 5), 2))


X = torch.zeros(1, 6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cut_windows(X, (2, 2), 2), ValueError, "x: got N = 6"),
        (lambda: cut_windows(X, (2, 3), (2,)), ValueError, r"size: got \(2,\) for 2 axes"),
        (lambda: cut_windows(X, (2, 3), 0), ValueError, "size: got 0"),
        (lambda: cut_windows(X, (2, 3), 2.0), TypeError, "size: got 2.0"),
        (lambda: cut_windows(X, (2, 3), 2, shift=-1), ValueError, "shift: got -1"),
        (lambda: cut_windows(X, (2, 3), 2, shift=(1, 1, 1)), ValueError, r"shift: got \(1, 1, 1\)"),
        (lambda: join_windows(X, (2, 3), 2), ValueError, r"x: got shape \(1, 6, 2\); .* are \(B, 2, 4, C\)"),
        (lambda: join_windows(X[None], (2, 3), 2), ValueError, r"x: got shape \(1, 1, 6, 2\)"),
        (lambda: window_regions((2, 3), 2, shift="a"), TypeError, "shift: got 'a'"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_examples():
    result = doctest.testmod(windows, extraglobs={name: getattr(mix, name) for name in mix.__all__} | {"torch": torch})
    assert result.attempted > result.failed == 0
