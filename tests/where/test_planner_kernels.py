"""The kernels that plan on a GPU list what the CPU lists, to the bit; where there is no GPU, they are interpreted."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import axis, blocks, problems

from saccade.where import Causal, Neighborhood, Plan, Sinks, Strided, Window, plan_chosen, planner, planner_cuda
from saccade.where.layout import Cells, permutation

# The interpreter's way with scalars is one that NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = settings(max_examples=25, phases=[phase for phase in Phase if phase is not Phase.explain])  # which takes minutes


def planned(pattern, n, m, heads, block):
    _, most, plan = planner.tables(pattern, n, m, heads, block, DEVICE, sort=True)
    return planner_cuda.plan_boxes(plan, most)


def small_steps():
    """So few tiles looked at together that small plans take several steps."""
    return mock.patch.multiple(planner_cuda, CHUNK=4, SPAN=2)


def same(found: Plan, expected: Plan) -> None:
    found = found.to("cpu")
    assert (found.causal, found.transposed, found.block) == (expected.causal, expected.transposed, expected.block)
    assert found.tensors().keys() == expected.tensors().keys()
    for name, table in expected.tensors().items():
        assert found.tensors()[name].equal(table), name
        assert found.tensors()[name].dtype == table.dtype, name


@FEW
@given(problems(), blocks)
def test_lists_are_those_of_the_cpu(problem, block):
    pattern, n, m, heads = problem
    expected = pattern.plan(n, m, heads, block=block)
    with small_steps():
        plan = planned(pattern, n, m, heads, block)
        same(plan, expected)
        same(planner_cuda.turned(plan), expected.transpose())
    same(
        replace(plan).transpose(), expected.transpose()
    )  # not known to hold all that the boxes touch: marked, or sorted


@FEW
@given(st.lists(axis(), min_size=1, max_size=3), st.integers(1, 60), st.floats(0, 0.9), st.booleans())
def test_orders_are_those_of_the_cpu(axes, block, skipped, windows):
    order = Cells(tuple(length for length, *_ in axes), tuple(d for *_, d, _ in axes))
    if windows:
        order = replace(order, sides=tuple(w for _, w, *_ in axes), shift=tuple(w - s for _, w, s, *_ in axes))
    total = math.prod(order.grid)
    first = int(skipped * total)
    expected = permutation(order, torch.arange(first, total), block)
    assert planner_cuda.permutation(order, first, total - first, block, DEVICE).cpu().equal(expected)


@FEW
@given(st.integers(1, 33), st.integers(0, 9), blocks, st.integers(0, 2**32 - 1))
def test_marked_tiles_are_those_of_the_cpu(n, more, block, seed):
    m, random = n + more, torch.Generator().manual_seed(seed)
    pattern = Causal() & Window(max(1, n // 2)) | Sinks(2) & Causal()
    marks = torch.rand(3, -(-n // block[0]), -(-m // block[1]), generator=random) < 0.5
    group_of = torch.tensor([[0, 1], [2, 1]])
    expected = plan_chosen(pattern, marks, group_of, n, m, block)
    _, _, plan = planner.tables(pattern, n, m, 1, block, DEVICE, sort=False)
    plan = replace(plan, group_of=group_of.to(DEVICE))
    with small_steps():
        found = planner_cuda.plan_marked(plan, marks.to(DEVICE), int(marks.sum(2).max()))
        same(found, expected)
        same(planner_cuda.turned(found), expected.transpose())


@pytest.mark.parametrize(
    ("pattern", "n", "block"),
    [
        (Window(20) | Sinks(3), 700, (64, 2)),
        (Neighborhood((20, 24), 5), 480, (8, 4)),
        (Strided(3) & Causal(), 500, (32, 2)),
    ],
)
def test_more_tiles_than_are_looked_at_together(pattern, n, block):
    expected = pattern.plan(n, block=block)
    assert expected.num_col_tiles > planner_cuda.CHUNK - 10
    same(planned(pattern, n, n, 1, block), expected)


def test_room_is_exact_where_the_number_of_tiles_is_read():
    with mock.patch.object(planner_cuda, "ROOM", 0):
        plan = planned(Window(9), 50, 50, 1, (8, 8))
    assert len(plan.indices) == plan.num_tiles
    assert len(planned(Window(9), 50, 50, 1, (8, 8)).indices) > plan.num_tiles


LIAR = """
import torch
from saccade.where import Window, planner, planner_cuda

class Liar(Window):
    def most_tiles(self, n, m, block, order):
        return 3

_, most, plan = planner.tables(Liar(9), 50, 50, 1, (8, 8), torch.device({device!r}), sort=True)
plan = planner_cuda.plan_boxes(plan, most)
print("listed", plan.num_tiles)
"""


def test_lists_that_outgrow_their_room_are_no_silent_matter():
    """In a process of its own: on a GPU the failed assertion leaves no device to go on with."""
    run = [sys.executable, "-c", LIAR.format(device=DEVICE.type)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "listed" not in done.stdout
    assert "most_tiles: there are more tiles to list than the 3 foretold" in done.stderr
