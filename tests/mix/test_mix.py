"""Every primitive of the room against loops over coordinates, in value and every gradient; wrong twins are caught."""

from __future__ import annotations

import doctest
import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from saccade import mix
from saccade.mix import conv, gate, pool, rotary, tokens
from saccade.testing.budget import assert_close

GRIDS = [(7,), (5, 3), (3, 2, 5)]


def coordinates(grid):
    return list(itertools.product(*map(range, grid)))


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(function, tensors, dtype, cotangent):
    """Output, then the gradient of every tensor, of `function` in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]


def verify(fast, plain, tensors, terms):
    """Value and gradients of `fast` against `plain` in float64, float32 and bfloat16."""
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in tensors]
        (cotangent,) = draw(plain(*given).shape, seed=1)
        cotangent = cotangent.to(dtype)
        exact = run(plain, given, torch.float64, cotangent)
        actual, eager = run(fast, given, dtype, cotangent), run(plain, given, dtype, cotangent)
        scale = float(max(x.abs().max() for x in exact))
        for name, a, t, e in zip(names, actual, exact, eager, strict=True):
            assert a.dtype == dtype
            assert_close(a, t, e, name=f"{name} in {dtype}", terms=terms, scale=scale)


def catches(twin, plain, tensors, terms):
    with pytest.raises(AssertionError, match=r"output in torch\.float64"):
        verify(twin, plain, tensors, terms)


def plain_conv(grid, kernel, dilation):
    index = {p: i for i, p in enumerate(coordinates(grid))}
    before = [dilation * (taps - 1) // 2 for taps in kernel]

    def convolve(x, weight, bias):
        rows = []
        for p in coordinates(grid):
            total = bias.expand(x.shape[0], -1)
            for tap in coordinates(kernel):
                source = tuple(i + dilation * t - b for i, t, b in zip(p, tap, before, strict=True))
                if source in index:
                    total = total + weight[(slice(None), 0, *tap)] * x[:, index[source]]
            rows.append(total)
        return torch.stack(rows, 1)

    return convolve


def plain_pool(grid, size):
    def average(x):
        cells = []
        for cell in coordinates(size):
            ranges = [
                range(math.floor(s * n / k), math.ceil((s + 1) * n / k))
                for s, n, k in zip(cell, grid, size, strict=True)
            ]
            box = set(itertools.product(*ranges))
            inside = [i for i, p in enumerate(coordinates(grid)) if p in box]
            cells.append(sum(x[:, i] for i in inside) / len(inside))
        return torch.stack(cells, 1)

    return average


def plain_profile(grid, axis):
    def average(x):
        rows = []
        for s in range(grid[axis]):
            inside = [i for i, p in enumerate(coordinates(grid)) if p[axis] == s]
            rows.append(sum(x[:, i] for i in inside) / len(inside))
        return torch.stack(rows, 1)

    return average


def plain_gates(grid):
    def multiply(x, *gates):
        rows = []
        for i, p in enumerate(coordinates(grid)):
            row = x[:, i]
            for axis, g in enumerate(gates):
                row = row * g[:, p[axis]]
            rows.append(row)
        return torch.stack(rows, 1)

    return multiply


@pytest.mark.parametrize("grid", GRIDS)
def test_map_is_row_major_and_inverts(grid):
    (x,) = draw((2, math.prod(grid), 3))
    image = mix.to_map(x, grid)
    assert image.shape == (2, 3, *grid)
    for i, p in enumerate(coordinates(grid)):
        assert torch.equal(image[(slice(None), slice(None), *p)], x[:, i])
    back = mix.to_tokens(image)
    assert torch.equal(back, x)
    assert image.data_ptr() == x.data_ptr() == back.data_ptr()


CONVOLUTIONS = [
    ((11,), (3,), 2),
    ((7,), (2,), 2),
    ((5, 7), (3, 5), 1),
    ((7, 5), (3, 3), 3),
    ((3, 4, 5), (3, 1, 3), 1),
]


def conv_tensors(grid, kernel, channels=3):
    return draw((2, math.prod(grid), channels), (channels, 1, *kernel), (channels,))


@pytest.mark.parametrize(("grid", "kernel", "dilation"), CONVOLUTIONS)
def test_convolution(grid, kernel, dilation):
    def fast(x, weight, bias):
        return mix.depthwise_conv(x, grid, weight, bias, dilation=dilation)

    terms = math.prod(kernel) * math.prod(grid)
    verify(fast, plain_conv(grid, kernel, dilation), conv_tensors(grid, kernel), terms)


def test_convolution_twins_are_caught():
    grid, kernel = (5, 7), (3, 5)
    plain, tensors = plain_conv(grid, kernel, 1), conv_tensors(grid, kernel)
    catches(lambda x, w, b: mix.depthwise_conv(x, grid, w.flip(-1), b), plain, tensors, 15)
    catches(lambda x, w, b: mix.depthwise_conv(x, grid, w, b, dilation=2), plain, tensors, 15)
    catches(lambda x, w, b: mix.depthwise_conv(x.roll(1, 1), grid, w, b), plain, tensors, 15)


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_function(bias):
    module = mix.DepthwiseConv(4, (3, 3), dilation=2, bias=bias)
    parameters = dict(module.named_parameters())
    assert set(parameters) == ({"weight", "bias"} if bias else {"weight"})
    assert all(float(p.detach().abs().max()) <= 1 / 3 and float(p.detach().std()) > 0 for p in parameters.values())
    for grid in ((5, 3), (4, 7)):

        def fast(x, *given, grid=grid):
            return torch.func.functional_call(module, dict(zip(parameters, given, strict=True)), (x, grid))

        def plain(x, weight, *given, grid=grid):
            return plain_conv(grid, (3, 3), 2)(x, weight, *given or [torch.zeros_like(x[0, 0])])

        tensors = [*draw((2, math.prod(grid), 4)), *(p.detach() for p in parameters.values())]
        verify(fast, plain, tensors, terms=9 * math.prod(grid))


def test_a_module_may_know_its_grid():
    module = mix.DepthwiseConv(3, (3, 3), grid=(5, 7))
    (x,) = draw((2, 35, 3))
    assert torch.equal(module(x), module(x, (5, 7)))
    assert not torch.equal(module(x), module(x, (7, 5)))


def test_strided_tokens_are_read_right():
    grid, kernel = (5, 7), (3, 3)
    x, weight, bias = conv_tensors(grid, kernel)
    view = x.repeat_interleave(2, -1)[..., ::2]
    assert not view.is_contiguous()
    assert torch.equal(mix.depthwise_conv(view, grid, weight, bias), mix.depthwise_conv(x, grid, weight, bias))


POOLS = [((11,), (3,)), ((7,), (7,)), ((3,), (5,)), ((5, 7), (2, 3)), ((6, 4), (3, 2)), ((3, 4, 5), (2, 2, 2))]


@pytest.mark.parametrize(("grid", "size"), POOLS)
def test_pool(grid, size):
    tokens = math.prod(grid)
    verify(lambda x: mix.pool_tokens(x, grid, size), plain_pool(grid, size), draw((2, tokens, 3)), terms=tokens)


@pytest.mark.parametrize("grid", GRIDS)
def test_profiles(grid):
    x, terms = draw((2, math.prod(grid), 3)), math.prod(grid)
    for axis in range(-len(grid), len(grid)):
        verify(lambda x, axis=axis: mix.pool_axis(x, grid, axis), plain_profile(grid, axis), x, terms)


def test_pool_twins_are_caught():
    x, plain = draw((2, 35, 3)), plain_pool((5, 7), (2, 3))

    def swapped(x):
        return mix.pool_tokens(x, (5, 7), (3, 2)).unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2)

    catches(swapped, plain, x, 35)
    catches(lambda x: mix.pool_tokens(x, (7, 5), (2, 3)), plain, x, 35)
    square = draw((2, 25, 3))
    catches(lambda x: mix.pool_axis(x, (5, 5), 0), plain_profile((5, 5), 1), square, 25)


@pytest.mark.parametrize("grid", GRIDS)
def test_gates(grid):
    tensors = draw((2, math.prod(grid), 3), *((2, size, 3) for size in grid))
    verify(lambda x, *gates: mix.gate_axes(x, grid, gates), plain_gates(grid), tensors, terms=math.prod(grid))


def test_one_gate_for_all_channels_and_batches():
    grid = (5, 3)
    x, rows, columns = draw((2, 15, 4), (1, 5, 1), (2, 3, 1))
    verify(lambda x, *gates: mix.gate_axes(x, grid, gates), plain_gates(grid), [x, rows, columns], terms=15 * 8)


def test_gate_twin_is_caught():
    tensors = draw((2, 25, 3), (2, 5, 3), (2, 5, 3))
    catches(lambda x, g, h: mix.gate_axes(x, (5, 5), (h, g)), plain_gates((5, 5)), tensors, 25)


PAIRS = {"halves": lambda i, pairs: (i, i + pairs), "pairs": lambda i, pairs: (2 * i, 2 * i + 1)}
TURNS = {"halves": mix.turn_halves, "pairs": mix.turn_pairs}


def plain_turn(kind, angles):
    """Every pair by the rotation matrix of every place."""

    def turn(x):
        pairs, channels = angles.shape[1], list(x.unbind(-1))
        for i in range(pairs):
            a, b = PAIRS[kind](i, pairs)
            cos, sin = ([f(float(angle)) for angle in angles[:, i]] for f in (math.cos, math.sin))
            matrix = torch.tensor([[cos, [-s for s in sin]], [sin, cos]], dtype=torch.float64).to(x)
            one, two = x[..., a], x[..., b]
            channels[a], channels[b] = (row[0] * one + row[1] * two for row in matrix)
        return torch.stack(channels, -1)

    return turn


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize(("channels", "pairs"), [(8, 4), (9, 4), (7, 2), (3, 0), (2, 1)])
def test_rotations(kind, channels, pairs):
    angles = torch.arange(11)[:, None] * mix.rotary_rates(pairs, 50.0)
    verify(lambda x: TURNS[kind](x, angles), plain_turn(kind, angles), draw((2, 3, 11, channels)), terms=11)


def test_rotation_twins_are_caught():
    angles = torch.arange(11)[:, None] * mix.rotary_rates(3)
    for kind, other in (("halves", "pairs"), ("pairs", "halves")):
        plain, x = plain_turn(kind, angles), draw((2, 11, 6))
        catches(lambda x, other=other: TURNS[other](x, angles), plain, x, 11)
        catches(lambda x, kind=kind: TURNS[kind](x, -angles), plain, x, 11)
        catches(lambda x, kind=kind: TURNS[kind](x, angles.flip(1)), plain, x, 11)


def test_products_of_turned_vectors_see_differences_alone():
    q, k = (x.double() for x in draw((6,), (6,)))
    rates = mix.rotary_rates(3)
    for turn in TURNS.values():
        near, far = (turn(q[None], at * rates[None]) @ turn(k[None], (at + 5) * rates[None]).T for at in (0, 10**6))
        other = turn(q[None], rates[None]) @ turn(k[None], rates[None]).T
        # An angle of a million radians is rounded to within eps of itself.
        allowed = 2 * (10**6 + 6) * torch.finfo(q.dtype).eps * float(q.norm() * k.norm())
        assert abs(float(near - far)) < allowed < abs(float(near - other))


def test_rates_fall_from_one():
    assert mix.rotary_rates(4, 16.0).tolist() == [1.0, 0.5, 0.25, 0.125]
    assert mix.rotary_rates(0).shape == (0,)


@pytest.mark.parametrize("grid", GRIDS)
def test_angles_of_a_grid(grid):
    rates = [torch.linspace(1, 2, axis + 1, dtype=torch.float64) for axis in range(len(grid))]
    angles = mix.grid_angles(grid, rates)
    for row, p in zip(angles, coordinates(grid), strict=True):
        assert row.tolist() == [at * float(rate) for at, of_axis in zip(p, rates, strict=True) for rate in of_axis]


X, GATE = torch.zeros(1, 6, 2), torch.zeros(1, 3, 2)
BAD: list[tuple[Any, str]] = [
    (lambda: mix.to_map(X, (2, 2)), "x: got N = 6"),
    (lambda: mix.to_map(X[0], (6,)), r"x: got \(6, 2\)"),
    (lambda: mix.to_map([1.0], (1,)), "x: got list"),  # type: ignore[arg-type]
    (lambda: mix.to_map(X, (1, 1, 2, 3)), r"grid: got \(1, 1, 2, 3\)"),
    (lambda: mix.to_map(X, (0, 6)), "grid: got 0"),
    (lambda: mix.to_tokens(X[0]), r"x: got shape \(6, 2\)"),
    (lambda: mix.depthwise_conv(X, (2, 3), torch.zeros(2, 1, 3)), r"weight: got shape \(2, 1, 3\)"),
    (lambda: mix.depthwise_conv(X, (6,), torch.zeros(3, 1, 3)), "weight: .* for 2 channels"),
    (lambda: mix.depthwise_conv(X, (6,), torch.zeros(2, 1, 2)), r"weight: got kernel \(2,\) with dilation 1"),
    (lambda: mix.depthwise_conv(X, (6,), torch.zeros(2, 1, 3), dilation=0), "dilation: got 0"),
    (lambda: mix.DepthwiseConv(2, (3, 0)), "kernel: got 0"),
    (lambda: mix.DepthwiseConv(2, (3, 3))(X), "grid: got None"),
    (lambda: mix.DepthwiseConv(0, (3,)), "dim: got 0"),
    (lambda: mix.rotary_rates(-1), "pairs: got -1"),
    (lambda: mix.grid_angles((2, 3), [torch.ones(1)]), r"rates: got 1 for the grid \(2, 3\)"),
    (lambda: mix.turn_halves(X, torch.zeros(6, 2)), "angles: got 2 for 2 channels; pass 1 or fewer"),
    (lambda: mix.turn_pairs(X, torch.zeros(6, 2)), "angles: got 2 for 2 channels; pass 1 or fewer"),
    (lambda: mix.pool_tokens(X, (2, 3), (2,)), r"size: got \(2,\)"),
    (lambda: mix.pool_tokens(X, (2, 3), (2, 0)), "size: got 0"),
    (lambda: mix.pool_axis(X, (2, 3), 2), "axis: got 2"),
    (lambda: mix.gate_axes(X, (2, 3), [torch.zeros(1, 2, 2)]), "gates: got 1"),
    (lambda: mix.gate_axes(X, (2, 3), [GATE, GATE]), r"gates: got shape \(1, 3, 2\) for axis 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("module", [tokens, conv, pool, gate, rotary], ids=lambda module: module.__name__)
def test_examples(module):
    result = doctest.testmod(module, extraglobs={name: getattr(mix, name) for name in mix.__all__} | {"torch": torch})
    assert result.attempted > result.failed == 0


def test_the_room_is_light():
    heavy = {"triton", "transformers", "plotly", "matplotlib"}
    code = f"import sys, saccade.mix; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
