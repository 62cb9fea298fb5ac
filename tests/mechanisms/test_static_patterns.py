"""Patterns that static and spatial mechanisms define for themselves: their boxes are their definition."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.spatial_window.inf_dit import BlockBefore
from saccade.mechanisms.static_sparse.radial_attention import Ring, rings
from saccade.mechanisms.static_sparse.sinklora import ShiftedGroups

RINGS = [
    (Ring(frames, size, band, first), frames * size)
    for frames, size in ((9, 4), (17, 3), (5, 16), (33, 2))
    for band in (2, 4, 8, 16)
    for first in (0, 1, 3)
]
GROUPS = [(ShiftedGroups(size), n) for n in (1, 7, 16, 26) for size in (1, 3, 4, 7, 33)]
BEFORE = [
    (BlockBefore(grid, size, back), math.prod(grid))
    for grid in ((7, 8), (16, 16))
    for size in (3, 4, 20)
    for back in ((0, 0), (1, 1), (0, 1), (1, 0))
]


@pytest.mark.parametrize(("pattern", "n"), RINGS + GROUPS + BEFORE, ids=str)
def test_plans_hold_what_the_definition_admits(pattern, n):
    for block in ((4, 4), (16, 16)):
        plan = pattern.plan(n, block=block)
        plan.verify()
        assert plan.dense().equal(pattern.dense(n))


def test_a_kernel_of_hopper_holds_their_bounds():
    for pattern, n in RINGS + GROUPS + BEFORE:
        boxes = pattern.plan(n, block=(16, 16)).boxes
        assert boxes.lo.shape[1] * boxes.coord.shape[0] <= 4


@pytest.mark.parametrize("first", [0, 1])
def test_rings_are_disjoint_and_all_there_is_beyond_the_next_frame(first):
    frames, size = 11, 6
    found = torch.stack([ring.dense(frames * size)[0] for ring in rings(frames, size, first)]).sum(0)
    at = torch.arange(frames * size)
    apart, aside = (at // size - (at // size)[:, None]).abs(), (at % size - (at % size)[:, None]).abs()
    band = 2 ** apart.clamp(min=1).double().log2().floor().long()
    seen = torch.where(band <= size, aside + 1 <= size // band, aside == 0)
    seen = seen | ((aside == 0) & (apart % -(-band // size) == 0))
    seen &= (band <= size) | (apart % -(-band // size) == 0)
    seen &= (apart > 1) & (at // size >= first)
    assert found.equal(seen.long())


def test_blocks_before_foretell_their_tiles():
    for pattern, n in BEFORE:
        for order in (None, *pattern.orders(n)):
            plan = pattern.plan(n, block=(16, 16))
            if (plan.k_order is None) == (order is None):
                assert plan.num_tiles <= pattern.most_tiles(n, n, (16, 16), order)
