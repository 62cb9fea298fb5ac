"""How many tiles there may be is known before they are counted; room to spare behind the lists changes nothing."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, leaves, neighborhoods, problems

from saccade.where import (
    Band,
    BlockBand,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Documents,
    GridBlocks,
    Labels,
    Neighborhood,
    Packed,
    PerHead,
    Plan,
    Prefix,
    Sinks,
    Strided,
    Window,
    plan_chosen,
    planner,
)
from saccade.where import plan as plan_module
from saccade.where.draw import tile_map
from saccade.where.layout import Cells, permutation
from saccade.where.pattern import Frame

CPU = torch.device("cpu")


@settings(max_examples=300)
@given(problems(), blocks)
def test_no_plan_exceeds_most_tiles(problem, block):
    pattern, n, m, heads = problem
    _, most, _ = planner.tables(pattern, n, m, heads, block, CPU, sort=True)
    assert pattern.plan(n, m, heads, block=block).num_tiles <= most
    _, most, plan = planner.tables(pattern, n, m, 1, block, CPU, sort=False) if heads == 1 else (None, None, None)
    if plan is not None:
        assert planner.tile_pairs(pattern, n, m, block, CPU).sum() <= most


@settings(max_examples=300)
@given(problems(), blocks, st.data())
def test_every_order_is_a_plan_and_exceeds_no_bound(problem, block, data):
    """Whatever a pattern suggests, taken though another order may leave fewer tiles."""
    pattern, n, m, heads = problem
    heads_of = [pattern.at_head(h, heads) for h in range(heads)]
    found = {order: None for one in heads_of for order in one.orders(m)}
    order = data.draw(st.sampled_from([None, *found]))
    most = sum(one.most_tiles(n, m, block, order) for one in dict.fromkeys(heads_of))
    with mock.patch.object(planner, "best_order", return_value=(order, most)):
        plan = pattern.plan(n, m, heads, block=block).verify()
    assert plan.dense().equal(pattern.dense(n, m, heads))
    assert plan.num_tiles <= most


@pytest.mark.parametrize(
    ("pattern", "n"),
    [
        (Causal(), 4096),
        (Window(300), 4096),
        (Band(100, 300), 4096),
        (Prefix(77), 4096),
        (Blocks(256), 4096),
        (Band(None, -300), 4096),
        (BlockBand(256, 8, -7), 4096),
        (Columns(8, 16, 3), 4096),
        (Labels(torch.arange(4096) // 100), 4096),
        (Labels(torch.arange(4096) % 40), 4096),
        (GridBlocks((64, 64), 7, offset=3), 4096),
        (GridBlocks((64, 64), 8, dilation=8), 4096),
        (GridBlocks((64, 64), 8, 3, 3), 4096),
        (Causal() & (Window(64) | Strided(8)), 8192),
        (BlockBand(256, 2, 1), 4096),
        (Documents([0, 100, 3000, 4096]), 4096),
        (Packed(Causal(), Documents([0, 100, 3000, 4096])), 4096),
        (Dilated(64, 8), 8192),
        (Strided(8), 8192),
        (Causal() & (Window(300) | Sinks(4)), 4096),
        (Causal() & Window(300), 4096),
        (PerHead([Window(100), Window(300)]), 4096),
        (Neighborhood((4096,), 65), 4096),
        (Neighborhood((64, 64), 9), 4096),
        (Neighborhood((64, 64), 9, stride=3, causal=True), 4096),
        (Neighborhood((64, 64), 5, dilation=2), 4096),
        (Neighborhood((64, 64), 9) | Neighborhood((64, 64), 3), 4096),
    ],
    ids=str,
)
def test_most_tiles_sets_little_aside(pattern, n):
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else 1
    _, most, _ = planner.tables(pattern, n, n, heads, (64, 32), CPU, sort=True)
    assert most <= 3 * pattern.plan(n, heads=heads, block=(64, 32)).num_tiles


@settings(max_examples=300)
@given(st.data())
def test_looking_back_is_what_the_boxes_say(data):
    m = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(1, m))
    pattern = data.draw(leaves(m))
    frame = Frame(torch.arange(m - n, m, dtype=torch.int32), torch.arange(m, dtype=torch.int32), m)
    spans = [box.get(("position", ())) for box in pattern.boxes(frame)]
    confined = all(span is not None and bool((span.hi <= frame.queries + 1).all()) for span in spans)
    assert pattern.looks_back(n, m) == confined


@given(neighborhoods(), blocks, st.integers(1, 9))
def test_orders_sort_by_class_then_cell_then_place(grid, block, modulus):
    pattern, total = grid
    found = [p for p in getattr(pattern, "parts", (pattern,)) if hasattr(p, "dilation") and hasattr(p, "grid")]
    position = torch.arange(total // 3, total)
    cells = Cells(found[0].grid, found[0].dilation)
    shape = cells.cell(block[0])

    def key(token):
        at, rest = [], token
        for length in reversed(cells.grid):
            at.append(rest % length)
            rest //= length
        at = at[::-1]
        steps = [c // d for c, d in zip(at, cells.dilation, strict=True)]
        classes = [c % d for c, d in zip(at, cells.dilation, strict=True)]
        return classes, [s // t for s, t in zip(steps, shape, strict=True)], steps

    order = permutation(cells, position, block[0])
    assert position[order].tolist() == sorted(position.tolist(), key=key)
    order = permutation(Cells((total,), (modulus,)), position, block[0])
    assert position[order].tolist() == sorted(position.tolist(), key=lambda token: (token % modulus, token))


def roomy(plan: Plan, spare: int) -> Plan:
    """The plan with entries behind its lists that mean nothing."""
    noise = torch.randint(-(2**31), 2**31 - 1, (spare,), dtype=torch.int32)
    tokens, weights = plan.token_indices, plan.token_log_weights
    return replace(
        plan,
        indices=torch.cat([plan.indices, noise]),
        token_indices=None if tokens is None else torch.cat([tokens, noise]),
        token_log_weights=None if weights is None else torch.cat([weights, noise.to(weights.dtype)]),
    )


@given(problems(), blocks, st.integers(1, 9))
def test_room_to_spare_changes_nothing(problem, block, spare):
    pattern, n, m, heads = problem
    plan = pattern.plan(n, m, heads, block=block)
    wide = roomy(plan, spare).verify()
    assert wide.num_tiles == plan.num_tiles
    assert wide.rows().equal(plan.rows())
    assert wide.is_full().equal(plan.is_full())
    assert wide.num_attended == plan.num_attended
    assert wide.dense().equal(plan.dense())
    assert tile_map(wide).equal(tile_map(plan))
    for found, expected in ((wide.to("cpu"), plan), (wide.transpose().verify().to("cpu"), plan.transpose())):
        assert all(found.tensors()[name].equal(table) for name, table in expected.tensors().items())


def chosen(seed: int) -> Plan:
    """A few tiles, and single keys with weights beside them."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(-1, 5, (4, 3, 2), generator=generator)
    tokens = torch.randint(-1, 40, (4, 3, 5), generator=generator)
    weights = torch.randn(tokens.shape, generator=generator)
    group_of = torch.arange(4).view(2, 2)
    return plan_chosen(Causal(), tiles, group_of, 24, 40, (8, 8), tokens=tokens, token_log_weights=weights)


@given(st.integers(0, 99), st.integers(1, 9))
def test_room_behind_single_keys_changes_nothing(seed, spare):
    plan = chosen(seed)
    wide = roomy(plan, spare).verify()
    assert wide.num_tokens == plan.num_tokens == len(plan.token_indices)
    assert wide.num_attended == plan.num_attended
    assert wide.num_computed == plan.num_computed
    assert wide.dense().equal(plan.dense())
    assert tile_map(wide).equal(tile_map(plan))
    for found, expected in ((wide.to("cpu"), plan), (wide.transpose().verify().to("cpu"), plan.transpose())):
        assert all(found.tensors()[name].equal(table) for name, table in expected.tensors().items())


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_what_is_listed_comes_first(marks):
    listed = torch.tensor(marks)
    found = plan_module._in_front(listed)
    assert found[: int(listed.sum())].equal(listed.nonzero()[:, 0])
    assert found.sort().values.equal(torch.arange(len(marks)))


def test_a_plan_made_without_counting_is_the_same_with_room(monkeypatch):
    """As on a GPU, where the host does not know how many single keys there are."""
    plan = chosen(0)
    tokens, weights = torch.randint(-1, 40, (4, 3, 5)), torch.randn(4, 3, 5)
    counted = plan.with_tokens(tokens, weights)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: plan_module._in_front(x)[:, None])
    roomy = plan.with_tokens(tokens, weights).verify()
    assert len(roomy.token_indices) == tokens.numel()
    monkeypatch.undo()
    assert all(roomy.to("cpu").tensors()[name].equal(table) for name, table in counted.tensors().items())


def test_lists_of_single_keys_that_end_behind_their_room_are_ill_formed():
    plan = chosen(0)
    with pytest.raises(ValueError, match="token_indptr: must rise from 0 to"):
        replace(plan, token_indices=plan.token_indices[:-1]).verify()


def test_room_to_spare_keeps_bits():
    mask = torch.rand(2, 30, 40) < 0.4
    plan = roomy(Plan.from_mask(mask, (4, 8)), 5).verify()
    assert plan.dense().equal(mask)
    assert plan.transpose().verify().dense().equal(mask.transpose(1, 2))


def test_lists_that_end_behind_their_room_are_ill_formed():
    plan = Window(9).plan(50, block=(8, 8))
    with pytest.raises(ValueError, match="indptr: must run from 0 to"):
        replace(plan, indices=plan.indices[:-1]).verify()
