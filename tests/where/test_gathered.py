"""Gathered plans are the patterns, to the bit, and list no more than the windows of a patch span."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from strategies import axis, blocks, documents, grid_blocks, small

from saccade.where import Band, Blocks, Causal, Columns, Dilated, Full, Neighborhood, PerHead, Sinks, Strided, Window
from saccade.where.gathered import Lattice, NotGathered, cell_shapes, cross_section, in_tiles, patch
from saccade.where.grid import Grid


@st.composite
def boxes(draw):
    """(pattern, n, m, heads) of patterns that are one box a head."""

    def other(total):
        columns = st.builds(lambda size, stride, at: Columns(size, stride, at % stride), small, small, small)
        within = st.builds(Band, st.integers(0, 5), st.integers(0, 5))
        plain = [Full(), Causal()]
        return st.one_of(st.sampled_from(plain), st.builds(Blocks, small), columns, within, documents(total))

    if draw(st.booleans()):
        grid, kernel, stride, dilation, causal = zip(*draw(st.lists(axis(), min_size=1, max_size=3)), strict=True)
        total = math.prod(grid)
        pattern = Neighborhood(grid, kernel, stride, dilation, causal) & draw(other(total))
        kernel = [draw(st.integers(1, w)) for w in kernel]
        patterns = [pattern, Neighborhood(grid, kernel, 1, dilation)]
        halo = draw(grid_blocks(grid, dilation))
        patterns = [halo, pattern] if any(halo.left) or any(halo.right) else patterns
    else:
        total = draw(st.integers(1, 60))
        placed = st.one_of(st.builds(Window, small), st.builds(Dilated, small, small), st.just(Causal()))
        first = draw(st.one_of(placed, st.builds(Strided, small)))
        second = first if isinstance(first, Strided) else draw(placed)
        patterns = [first & draw(other(total)), second & draw(other(total))]
    n = draw(st.sampled_from([total, max(1, total // 2)]))
    if draw(st.booleans()):
        return patterns[0], n, total, draw(st.integers(1, 2))
    return PerHead([patterns[draw(st.integers(0, 1))] for _ in range(3)]), n, total, 3


def gathered(pattern, n, m, heads, block, by):
    """The plan, or nothing to test where no cells fit, which the error must say."""
    try:
        return pattern.gathered(n, m, heads, block, by=by)
    except NotGathered as error:
        assert by == "cells"
        assert "pass by='keys'" in str(error)  # noqa: PT017
        reject()


BY = st.sampled_from(["keys", "cells"])
SIDES = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(boxes(), st.one_of(blocks, st.tuples(SIDES, SIDES)), BY)
def test_it_is_the_pattern(problem, block, by):
    pattern, n, m, heads = problem
    dense = pattern.dense(n, m, heads)
    plan = gathered(pattern, n, m, heads, block, by).verify()
    assert plan.num_tiles == 0
    assert plan.dense().equal(dense)
    assert plan.num_attended == dense.sum().item() / heads
    assert plan.transpose().verify().dense().equal(dense.transpose(1, 2))
    turned = plan.transpose().transpose().verify()
    assert turned.dense().equal(dense)
    assert turned.token_num_full.equal(plan.token_num_full)
    assert in_tiles(plan).verify().dense().equal(dense)


def lists(indptr, indices, num_full):
    """(head, rest) of every list."""
    ends = indptr.tolist()
    for start, stop, full in zip(ends[:-1], ends[1:], num_full.tolist(), strict=True):
        yield indices[start : start + full].long(), indices[start + full : stop].long()


@given(boxes(), st.one_of(blocks, st.tuples(SIDES, SIDES)), BY)
def test_heads_of_lists_are_seen_by_all_and_no_key_is_listed_twice(problem, block, by):
    pattern, n, m, heads = problem
    plan = gathered(pattern, n, m, heads, block, by)
    mask = pattern.dense(n, m, heads)[
        torch.tensor([plan.group_of[0].tolist().index(g) for g in range(plan.num_groups)])
    ]
    order = torch.arange(n) if plan.q_order is None else plan.q_order
    rows = itertools.product(range(plan.num_groups), order.split(block[0]))
    for (group, own), (head, rest) in zip(
        rows, lists(plan.token_indptr, plan.token_indices, plan.token_num_full), strict=True
    ):
        seen = mask[group, own]
        listed = torch.cat([head, rest])
        assert seen[:, head].all()
        assert len(listed.unique()) == len(listed)
        assert not seen.any(0).index_fill(0, listed, False).any()
    found = plan.by_key
    rows = itertools.product(range(plan.num_groups), found.order.split(block[1]))
    for (group, own), (head, rest) in zip(rows, lists(found.indptr, found.indices, found.num_full), strict=True):
        seen = mask[group][:, own]
        listed = order[torch.cat([head, rest])]
        assert seen[order[head]].all()
        assert len(listed.unique()) == len(listed)
        assert not seen.any(1).index_fill(0, listed, False).any()


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        (Neighborhood((16, 24), 5), 16),
        (Neighborhood((16, 24), (7, 4), (2, 4)), 16),
        (Neighborhood((8, 16), 3, causal=(True, False)), 32),
        (Neighborhood((4, 8, 16), (3, 4, 5), (1, 2, 1)), 64),
        (Neighborhood((16, 32), 3, dilation=(2, 4)), 16),
    ],
    ids=str,
)
def test_where_patches_fit_the_lists_are_exactly_what_is_seen(pattern, size):
    """Of keys by queries and of queries by keys; the heads are exactly what all see."""
    n = math.prod(pattern.grid)
    plan, mask = pattern.gathered(n, block=(size, size), by="keys"), pattern.dense(n)[0]
    seen = mask[plan.q_order].view(-1, size, n)
    assert plan.token_indptr.diff().tolist() == seen.any(1).sum(1).tolist()
    assert plan.token_num_full.tolist() == seen.all(1).sum(1).tolist()
    seen = mask.T[plan.by_key.order].view(-1, size, n)
    assert plan.by_key.indptr.diff().tolist() == seen.any(1).sum(1).tolist()
    assert plan.by_key.num_full.tolist() == seen.all(1).sum(1).tolist()


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        (Neighborhood((16, 32), (3, 9)), 16),
        (Neighborhood((16, 32), (9, 3)), 16),
        (Neighborhood((16, 32), 8, (8, 1)), 16),
        (Neighborhood((4, 16, 16), (1, 5, 5)), 64),
        (Neighborhood((16, 16), (3, 7), dilation=(4, 1)), 16),
    ],
    ids=str,
)
def test_the_patch_lists_fewest_keys(pattern, size, monkeypatch):
    n, lattice = math.prod(pattern.grid), Lattice(pattern.grid, pattern.dilation, True)
    chosen = cross_section([pattern], lattice, size)
    listed = {}
    powers = [[2**e for e in range(5) if 2**e <= length] for length in lattice.steps[:-1]]
    for cross in itertools.product(*powers):
        if math.prod(cross) <= size and size // math.prod(cross) <= lattice.steps[-1]:
            monkeypatch.setattr("saccade.where.gathered.cross_section", lambda *_, cross=cross: cross)
            listed[cross] = len(pattern.gathered(n, block=(size, size), by="keys").token_indices)
    assert len(set(listed.values())) > 1
    assert listed[chosen] == min(listed.values())


def test_it_lists_fewer_keys_than_tiles_hold():
    pattern = Neighborhood((64, 64), 13)
    plan = pattern.gathered(4096, by="keys")
    tiles = pattern.plan(4096, block=(64, 64))
    assert int(plan.token_indptr.diff().max()) == 20 * 20
    assert len(plan.token_indices) * 1.3 < tiles.num_tiles * 64
    cells = pattern.gathered(4096)
    assert len(plan.token_indices) < len(cells.token_indices) < tiles.num_tiles * 64


@pytest.mark.parametrize("by", ["keys", "cells"])
def test_other_constraints_shorten_the_lists(by):
    """What a box says beside the grid drops keys that no query of the tile sees."""
    pattern = Neighborhood((16, 16), 9)
    free = pattern.gathered(256, block=(16, 16), by=by)
    causal = (pattern & Causal()).gathered(256, block=(16, 16), by=by)
    assert len(causal.token_indices) * 1.2 < len(free.token_indices)
    assert len(causal.by_key.indices) * 1.2 < len(free.by_key.indices)


@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        (Window(3) | Sinks(1), 1),
        (Full(), 1),
        (Columns(2, 3, 1), 1),
        (PerHead([Neighborhood((4, 4), 3), Neighborhood((4, 4), 2, dilation=2)]), 2),
    ],
    ids=str,
)
def test_a_pattern_that_is_no_box_on_one_grid_is_refused(pattern, heads):
    with pytest.raises(NotGathered, match=r"pattern: got .*list tiles, with plan\(\)"):
        pattern.gathered(16, heads=heads)


@pytest.mark.parametrize(
    ("table", "broken", "message"),
    [
        ("token_num_full", lambda p: p.token_num_full[:-1], "token_num_full: has shape"),
        ("token_num_full", lambda p: p.token_indptr.diff().int() + 1, "exceeds the length"),
        ("token_num_full", lambda p: p.token_indptr.diff().int(), "hide from a query"),
        ("token_indices", lambda p: None, "token_num_full: given without tokens"),
        ("token_grid", lambda p: p.token_grid._replace(cell=(1, 4)), "token_grid: needs whole cells of 8"),
        (
            "token_grid",
            lambda p: p.token_grid._replace(cell=p.token_grid.cell[::-1]),
            "token_grid: some list is not made of its cells",
        ),
        ("token_indices", lambda p: p.token_indices.flip(0), "token_grid: some list is not made of its cells"),
        ("token_num_full", lambda p: p.token_num_full * 0 + 1, "token_grid: needs whole cells of 8"),
        (
            "by_key",
            lambda p: replace(p.by_key, grid=Grid((8, 8), p.by_key.grid.cell[::-1])),
            "by_key.grid: some list is not made of",
        ),
        ("by_key", lambda p: replace(p.by_key, order=p.by_key.order * 0), "by_key.order"),
        ("by_key", lambda p: replace(p.by_key, indptr=p.by_key.indptr + 1), "by_key.indptr"),
        ("by_key", lambda p: replace(p.by_key, indices=p.by_key.indices + 999), "by_key.indices"),
        ("by_key", lambda p: replace(p.by_key, num_full=p.by_key.num_full + 99), "by_key.num_full: exceeds"),
    ],
)
def test_verify_names_the_ill_formed_table(table, broken, message):
    plan = Neighborhood((8, 8), 3).gathered(64, block=(8, 8)).verify()
    with pytest.raises(ValueError, match=message):
        replace(plan, **{table: broken(plan)}).verify()


@pytest.mark.parametrize(
    ("pattern", "size", "fewest"),
    [
        (Neighborhood((32, 32), 7), 16, 3 * 3),  # 4 x 4 queries see 10 x 10 keys
        (Neighborhood((32, 32), 5), 16, 2 * 2),  # 8 x 8
        (Neighborhood((8, 16, 16), (3, 5, 5)), 64, 2 * 4 * 8 * 8 // 64),  # 2 x 4 x 8 queries see 4 x 8 x 12
        (Neighborhood((16, 16), 4, 4), 16, 1),  # a stride as wide as the window: nothing but the patch
    ],
    ids=str,
)
def test_cells_begin_where_windows_do(pattern, size, fewest):
    """Fewer than tiles, and no list longer than the box of its patch needs."""
    n = math.prod(pattern.grid)
    plan = pattern.gathered(n, block=(size, size)).verify()
    assert int(plan.token_indptr.diff().max()) // size <= fewest
    assert plan.token_grid.lengths == pattern.grid
    assert math.prod(plan.token_grid.cell) == math.prod(patch(pattern, plan)) == size
    assert len(plan.token_indices) <= pattern.plan(n, block=(size, size)).num_tiles * size


def test_where_no_cells_fit():
    with pytest.raises(NotGathered, match=r"by: got 'cells' for dilation \(2, 2\), .*pass by='keys'"):
        Neighborhood((8, 8), 3, dilation=2).gathered(64)
    with pytest.raises(NotGathered, match=r"no box of 64 tokens fits a grid of \(5, 7\); pass by='keys'"):
        cell_shapes(64, (5, 7))
    with pytest.raises(NotGathered, match=r"on a grid of \(7, 7\) no cells of 4 tokens cover the windows without"):
        Neighborhood((7, 7), 7).gathered(49, block=(7, 4))
    with pytest.raises(ValueError, match="by: got 'rows'; choose one of cells, keys"):
        Neighborhood((7, 7), 7).gathered(49, by="rows")


def test_it_moves_and_measures_itself():
    plan = Neighborhood((8, 8), 3).gathered(64, block=(8, 8))
    moved = plan.to("meta")
    assert {name: table.device.type for name, table in moved.tensors().items()} == dict.fromkeys(plan.tensors(), "meta")
    assert plan.nbytes - replace(plan, by_key=None).nbytes == sum(
        t.numel() * t.element_size() for t in plan.by_key.tensors().values()
    )


def test_tokens_put_on_top_are_no_longer_told_apart():
    plan = Neighborhood((8, 8), 3).gathered(64, block=(8, 8))
    other = plan.with_tokens(torch.zeros(1, 8, 1, dtype=torch.int64)).verify()
    assert other.token_num_full is None
    assert other.token_grid is None
    assert other.by_key is None
    with pytest.raises(ValueError, match="has no by_key"):
        in_tiles(other)
