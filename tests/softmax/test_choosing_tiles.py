"""Which lists and tiles kernels are given, and that the numbers do not depend on it."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mix import RegionBias
from saccade.softmax import RelativeTable, attend, attend_heads, explain, merge, rates, tiles, triton
from saccade.softmax.heads import runs
from saccade.softmax.problem import Problem
from saccade.testing.budget import assert_close
from saccade.where import Blocks, Causal, Columns, GridBlocks, Neighborhood, PerHead, Window

GRID = (12, 20)


def inputs(heads: int, n: int, dim: int = 16, kv_heads: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads or heads, kv_heads or heads)
    return [torch.randn(2, h, n, dim, generator=generator) for h in sizes]


def standing_in(heads: int, n: int) -> list[torch.Tensor]:
    """q, k, v of a size that is only planned for."""
    return [torch.zeros(()).expand(1, heads, n, 8)] * 3


def table(step: int = 1, grid: tuple[int, ...] = GRID) -> RelativeTable:
    found = RelativeTable(2, (3,) * len(grid), grid=grid, step=step)
    torch.nn.init.normal_(found.table, generator=torch.Generator().manual_seed(1))
    return found


def outcomes(run, leaves):
    """o and the gradients of the leaves, of a weighted sum."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = run(*leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [o.detach(), *torch.autograd.grad((o * weights.to(o)).sum(), leaves)]


def agree(run, truth, leaves):
    """Within the budget of the truth, run eagerly in float32."""
    found, eager = outcomes(run, leaves), outcomes(truth, leaves)
    exact = outcomes(truth, [x.double() for x in leaves])
    for one, right, plain in zip(found, exact, eager, strict=True):
        assert_close(one, right, plain, terms=leaves[0].shape[2] * 16, scale=float(right.abs().max()))


def weighed(q, k, v, table, pattern, step):
    """The equation: coordinates in steps, differences looked up one by one."""
    at = torch.arange(q.shape[2])
    axes = [(c // step)[:, None] - (c // step)[None] for c in (at // GRID[1], at % GRID[1])]
    down, across = (apart.clamp(-2, 2) + 2 for apart in axes)
    scores = q @ k.mT / q.shape[3] ** 0.5 + table[:, down, across]
    return scores.masked_fill(~pattern.dense(q.shape[2])[0], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("backend", ["triton", "tiles"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_table_of_steps_over_single_keys(backend, dilation):
    pattern, bias = Neighborhood(GRID, 3, dilation=dilation), table(dilation)
    q, k, v = inputs(2, 240)
    assert Problem.of(q, k, v, pattern, bias=bias).plan_of_keys((64, 64), "keys") is not None

    def run(q, k, v, values):
        bias._parameters["table"] = values  # a leaf that the test differentiates
        return attend(q, k, v, pattern, bias=bias, backend=backend)

    agree(run, lambda *leaves: weighed(*leaves, pattern, dilation), [q, k, v, bias.table])


def test_a_table_of_tokens_is_no_table_of_steps():
    """A broken twin: the dilation forgotten, the values differ."""
    pattern, leaves = Neighborhood(GRID, 3, dilation=2), [*inputs(2, 240), table().table.detach()]
    with pytest.raises(AssertionError):
        agree(lambda *x: weighed(*x, pattern, 1), lambda *x: weighed(*x, pattern, 2), leaves)


@pytest.mark.parametrize(
    ("pattern", "in_cells"),
    [(Neighborhood((48, 48), 5), True), (GridBlocks((24, 24), 8, 3, 3), False), (GridBlocks(GRID, 4, 1, 1), False)],
)
def test_small_windows_are_read_in_cells_that_fit_the_grid(pattern, in_cells):
    n = math.prod(pattern.grid)
    q, k, v = inputs(2, n)
    with torch.no_grad():
        assert (triton.planned(Problem.of(q, k, v, pattern)).token_grid is not None) == in_cells
        found = attend(q, k, v, pattern, backend="triton")
    hidden = ~pattern.dense(n)[0]

    def truth(q, k, v):
        return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    exact = truth(q.double(), k.double(), v.double())
    assert_close(found, exact, truth(q, k, v), terms=n, scale=float(v.abs().max()))


def test_what_is_listed_at_the_size_of_images():
    image = Neighborhood((128, 128), 7)
    q, k, v = standing_in(2, 128 * 128)
    plain, biased = Problem.of(q, k, v, image), Problem.of(q, k, v, image, bias=table(grid=(128, 128)))
    assert triton.planned(plain).token_grid is not None
    assert triton.planned(biased).token_indices is not None
    assert triton.planned(biased).token_grid is None
    work = rates.Work.of(plain, triton)
    assert set(work.pairs) == {"rows", "cells"}
    assert work.pairs["cells"] < 0.5 * image.plan(128**2).num_tiles * 128 * 64
    assert Problem.of(q, k, v, Window(9)).plan_of_keys((64, 64), "cells") is None  # a sequence
    assert Problem.of(q, k, v, Neighborhood((128, 128), 63)).plan_of_keys((64, 64), "cells") is None  # whole tiles
    assert Problem.of(q, k, v, Neighborhood((128, 128), 7, dilation=2)).plan_of_keys((64, 64), "cells") is None


@pytest.mark.parametrize(
    ("pattern", "block"),
    [
        (Causal() & (Window(1024) | Columns(64, 8, 3)), (128, 64)),
        (Causal() & (Window(1024) | Columns(128, 8, 3)), (128, 128)),
        (Causal(), (128, 128)),
        (Window(32), (128, 128)),  # two narrow tiles are one step: a short list is no shorter
    ],
)
def test_narrow_stripes_are_met_by_narrow_tiles(pattern, block):
    q, k, v = standing_in(2, 8192)
    assert triton.planned(Problem.of(q, k, v, pattern)).block == block


def test_biased_windows_are_met_by_small_tiles():
    q, k, v = standing_in(2, 8192)
    bias = RelativeTable(2, (50,))
    assert triton.planned(Problem.of(q, k, v, Blocks(50), bias=bias)).block == (64, 64)
    assert triton.planned(Problem.of(q, k, v, Blocks(50))).block == (128, 128)


def test_windows_that_keep_nothing_apart_are_a_table_that_kernels_know():
    own = RelativeTable(2, (4, 4), grid=(4, 4))
    torch.nn.init.normal_(own.table, generator=torch.Generator().manual_seed(1))
    whole, shifted = (RegionBias.of(own, (8, 12), 4, shift=shift) for shift in (0, 2))
    x = inputs(2, 16)[0][:1].expand(6, -1, -1, -1)
    assert explain(whole.fold(x), whole.fold(x), whole.fold(x), bias=whole)["triton"] == []
    assert "RegionBias" in explain(shifted.fold(x), shifted.fold(x), shifted.fold(x), bias=shifted)["triton"][0]
    leaves = inputs(2, 16)
    at = torch.arange(16)
    apart = [c[:, None] - c[None] + 3 for c in (at // 4, at % 4)]

    def truth(q, k, v):
        return (q @ k.mT / q.shape[3] ** 0.5 + own.table[:, apart[0], apart[1]].detach().to(q)).softmax(-1) @ v

    for backend in ("triton", "tiles"):
        agree(lambda *x, name=backend: attend(*x, bias=whole, backend=name), truth, leaves)


LAYOUTS = [
    ([([0, 1, 2, 3], Window(5))], 2),
    ([([0, 1], Window(5)), ([2, 3], None)], 2),
    ([([1, 2], PerHead([Window(5), Blocks(7)])), ([0], None)], 4),
    ([([3], None), ([0, 2], Window(3))], 2),
]


@pytest.mark.parametrize(("layout", "kv_heads"), LAYOUTS)
def test_groups_of_heads(layout, kv_heads):
    leaves = inputs(4, 37, kv_heads=kv_heads)

    def truth(q, k, v):
        out = []
        for h in range(4):
            g, o = h // (4 // kv_heads), torch.zeros_like(q[:, h])
            for heads, where in layout:
                if h in heads:
                    seen = torch.ones(len(heads), 37, 37, dtype=torch.bool)
                    seen = seen if where is None else where.dense(37, heads=len(heads))
                    scores = (q[:, h] @ k[:, g].mT / q.shape[3] ** 0.5).masked_fill(~seen[heads.index(h)], -torch.inf)
                    o = scores.softmax(-1) @ v[:, g]
            out.append(o)
        return torch.stack(out, 1)

    groups = [(heads, where, None) for heads, where in layout]
    agree(lambda q, k, v: attend_heads(q, k, v, groups), truth, leaves)
    wrong = [(heads, Window(4), None) for heads, _ in layout]
    with pytest.raises(AssertionError):
        agree(lambda q, k, v: attend_heads(q, k, v, wrong), truth, leaves)


def test_runs():
    assert runs([]) == []
    assert runs([2]) == [(2, 3)]
    assert runs([0, 1, 3]) == [(0, 2), (3, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_merge_widens_once_and_keeps_the_type(dtype):
    parts = [(x.to(dtype), torch.randn(2, 5)) for x in torch.randn(3, 2, 5, 4, dtype=torch.float64)]
    o, lse = merge(parts)
    shares = torch.stack([lse for _, lse in parts]).double().softmax(0)[..., None]
    exact = sum(share * part.double() for share, (part, _) in zip(shares, parts, strict=True))
    eager = sum((share.float() * part.float() for share, (part, _) in zip(shares, parts, strict=True))).to(dtype)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(o, exact, eager, terms=3, scale=float(exact.abs().max()))


def test_the_tiles_backend_lists_keys_too():
    """On a processor as well: fewer pairs, and the same numbers as from a plan in tiles."""
    q, k, v = inputs(2, 240)
    pattern = Neighborhood(GRID, 3)
    found, other = (
        attend(q, k, v, pattern, backend="tiles"),
        attend(q, k, v, pattern.plan(240, heads=2), backend="tiles"),
    )
    exact = attend(q.double(), k.double(), v.double(), pattern, backend="reference")
    assert_close(found, exact, other, terms=240, scale=float(v.abs().max()))
    assert tiles.BLOCK == (64, 64)
