"""Scans over a grid against walks from token to token; what the orders are; wrong twins are caught."""

from __future__ import annotations

import doctest
import importlib
import itertools

import pytest
import torch

from saccade.scan import GridScan, raster_orders, snake_orders
from saccade.testing.budget import assert_close

module = importlib.import_module("saccade.scan.grid_scan")
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 5), (4, 4), (4, 7), (6, 3)]


def walk(x, orders, read, step, bias, log_rate, direct):
    """The definition, one token after the other."""
    rank, size = step.shape[2], log_rate.shape[2]
    total = torch.zeros_like(x)
    for k, order in enumerate(orders.tolist()):
        h = x.new_zeros(len(x), x.shape[2], size)
        for token in order:
            u = x[:, token]
            low, write, look = (u @ read[k].T).split([rank, size, size], 1)
            delta = (1 + (low @ step[k].T + bias[k]).exp()).log()
            h = (delta[..., None] * -log_rate[k].exp()).exp() * h + (delta * u)[..., None] * write[:, None]
            seen = torch.zeros_like(total)
            seen[:, token] = (h * look[:, None]).sum(-1) + direct[k] * u
            total = total + seen
    return total


def draw(grid, *, dim=6, state=2, rank=3, paths=4):
    generator = torch.Generator().manual_seed(0)
    scan = GridScan(dim, state=state, rank=rank, paths=paths).double()
    with torch.no_grad():
        for parameter in scan.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    return scan, torch.randn(2, grid[0] * grid[1], dim, generator=generator).double()


def run(function, tensors, cotangent):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def verify(grid, orders, **sizes):
    """Values and every gradient, in float64, float32 and bfloat16."""
    scan, x = draw(grid, paths=len(orders), **sizes)
    names, weights = zip(*scan.named_parameters(), strict=True)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def fast(x, *given):
        return torch.func.functional_call(scan, dict(zip(names, given, strict=True)), (x, orders))

    def plain(x, *given):
        return walk(x, orders, **dict(zip(names, given, strict=True)))

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        narrow = [t.to(dtype) for t in (x, *weights)]
        exact = run(plain, [t.double() for t in narrow], cotangent)
        actual, eager = (run(function, narrow, cotangent) for function in (fast, plain))
        scale = max(float(t.abs().max()) for t in exact)
        for name, a, t, e in zip(("y", "x", *names), actual, exact, eager, strict=True):
            assert a.dtype == dtype
            assert_close(a, t, e, name=f"{name} in {dtype}", terms=x[..., 0].numel() * len(orders), scale=scale)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize("orders", [raster_orders, snake_orders])
def test_scan(grid, orders):
    verify(grid, orders(grid))


@pytest.mark.parametrize("sizes", [{"state": 1, "rank": 1}, {"dim": 1, "state": 4, "rank": 2}])
def test_sizes_and_any_orders(sizes):
    verify(
        (2, 3), torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3)]), **sizes
    )


def test_a_module_may_know_its_orders():
    orders, x = snake_orders((3, 5)), torch.randn(2, 15, 4)
    scan = GridScan(4, orders=orders)
    assert "orders" not in scan.state_dict()
    assert torch.equal(scan(x), scan(x, orders))
    assert not torch.equal(scan(x), scan(x, raster_orders((3, 5))))
    assert scan.double().bfloat16().orders.dtype == torch.int64


@pytest.mark.parametrize("twin", [lambda o: o.flip(0), lambda o: o.flip(1), lambda o: o[[0, 0, 2, 3]]])
def test_twins_are_caught(monkeypatch, twin):
    forward = GridScan.forward
    monkeypatch.setattr(GridScan, "forward", lambda self, x, orders: forward(self, x, twin(orders)))
    with pytest.raises(AssertionError, match=r"y in torch\.float64"):
        verify((3, 5), raster_orders((3, 5)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("orders", [raster_orders, snake_orders])
def test_orders_name_every_token_once(grid, orders):
    assert orders(grid).sort(1).values.equal(torch.arange(grid[0] * grid[1]).expand(4, -1))


@pytest.mark.parametrize("grid", GRIDS)
def test_snakes_go_from_neighbour_to_neighbour(grid):
    for order in snake_orders(grid).tolist():
        for a, b in itertools.pairwise(divmod(at, grid[1]) for at in order):
            assert abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1


def test_snakes_of_an_even_square_start_where_the_paper_says():
    corners = {"top left": 0, "bottom left": 12, "bottom right": 15}
    assert snake_orders((4, 4))[:, 0].tolist() == [corners[c] for c in ("top left", "bottom left")] + [
        corners[c] for c in ("bottom left", "bottom right")
    ]


def test_orders_run_by_rows_and_by_columns():
    rows, columns, up, left = raster_orders((3, 4)).tolist()
    places = list(itertools.product(range(3), range(4)))
    assert [places[at] for at in rows] == places == [places[at] for at in up][::-1]
    assert [places[at] for at in columns] == sorted(places, key=lambda p: p[::-1])
    assert columns == left[::-1]


def test_initial_steps_lie_between_a_thousandth_and_a_tenth():
    scan = GridScan(64, state=3)
    steps = torch.nn.functional.softplus(scan.bias.detach())
    assert 0.0009 < float(steps.min()) < float(steps.max()) < 0.11
    assert scan.log_rate.detach().exp()[0, 0].tolist() == pytest.approx([1, 2, 3])
    assert scan.step.shape == (4, 64, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: raster_orders((2, 3, 4)), r"grid: got \(2, 3, 4\); pass \(Y, X\)"),
        (lambda: snake_orders((2, 0)), "grid: got 0; pass an integer >= 1"),
        (lambda: GridScan(0), "dim: got 0"),
        (lambda: GridScan(4, rank=0), "rank: got 0"),
        (lambda: GridScan(4)(torch.ones(1, 6, 4)), "orders: got None"),
        (
            lambda: GridScan(4)(torch.ones(2, 6), raster_orders((2, 3))),
            r"x: got shape \(2, 6\); pass tokens \(B, N, 4\)",
        ),
        (lambda: GridScan(4)(torch.ones(1, 6, 4), raster_orders((2, 4))), r"orders: got .*; pass int64 \(4, 6\)"),
        (lambda: GridScan(4)(torch.ones(1, 6, 4), torch.zeros(4, 6).long()), "orders: a row does not name each"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
