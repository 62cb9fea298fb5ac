"""Plans are the patterns, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, problems

from saccade.where import (
    Band,
    BlockBand,
    Boxes,
    Causal,
    Columns,
    GridBlocks,
    Labels,
    Neighborhood,
    PerHead,
    Plan,
    Sinks,
    Strided,
    Window,
    plan_chosen,
)
from saccade.where.draw import tile_map


@given(problems(), blocks)
def test_plan_is_the_pattern(problem, block):
    pattern, n, m, heads = problem
    plan = pattern.plan(n, m, heads, block=block).verify()
    assert plan.dense().equal(pattern.dense(n, m, heads))


@given(problems(), blocks)
def test_transposing_twice_is_the_identity(problem, block):
    pattern, n, m, heads = problem
    plan = pattern.plan(n, m, heads, block=block)
    once = plan.transpose().verify()
    assert once.dense().equal(pattern.dense(n, m, heads).transpose(1, 2))
    twice = once.transpose().tensors()
    assert all(twice[name].equal(table) for name, table in plan.tensors().items())


@given(problems(), blocks)
def test_density_counts_what_dense_shows(problem, block):
    pattern, n, m, heads = problem
    plan = pattern.plan(n, m, heads, block=block)
    dense = pattern.dense(n, m, heads)
    assert plan.num_attended == dense.sum().item() / heads
    ahead = dense.triu(1 + m - n).any()
    assert not (plan.causal and ahead)
    tiles = -(-n // block[0]) * block[0] * -(-m // block[1]) * block[1]
    assert plan.num_attended <= plan.num_computed <= tiles
    assert plan.num_computed == plan.transpose().num_computed


@given(problems(), blocks, st.randoms(use_true_random=False))
def test_a_wrong_list_is_caught(problem, block, random):
    """The broken twin: drop a listed tile, or call a partial one full, and the comparison with the definition fails."""
    pattern, n, m, heads = problem
    plan = pattern.plan(n, m, heads, block=block)
    if plan.num_tiles == 0:
        return
    at = random.randrange(plan.num_tiles)
    rows, full = plan.rows(), plan.is_full()
    keep = torch.arange(plan.num_tiles) != at
    fewer = plan.listing(rows[keep], plan.indices.long()[keep], full[keep], union_of=plan.union_of)
    seen = [mask.any() for *_, mask in plan.masks(1)]
    tile_counts = full[at] or bool(seen[int((~full[:at]).sum())])
    if tile_counts:
        assert not fewer.dense().equal(pattern.dense(n, m, heads))
    flipped = full.clone()
    flipped[at] = True
    called = plan.listing(rows, plan.indices.long(), flipped, union_of=plan.union_of)
    if called.num_full.sum() > plan.num_full.sum():
        with pytest.raises(ValueError, match="num_full"):
            called.verify()


@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 9), blocks, st.integers(0, 2**32 - 1))
def test_from_mask_keeps_any_mask(heads, n, more, block, seed):
    mask = torch.rand(heads, n, n + more, generator=torch.Generator().manual_seed(seed)) < 0.4
    plan = Plan.from_mask(mask, block).verify()
    assert plan.dense().equal(mask)
    assert plan.transpose().verify().dense().equal(mask.transpose(1, 2))
    assert all(plan.transpose().transpose().tensors()[k].equal(v) for k, v in plan.tensors().items())


@given(st.integers(1, 33), st.integers(0, 9), blocks, st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_chosen_tiles_and_tokens(n, more, block, with_tokens, seed):
    """A routed plan holds what was chosen, of what the pattern admits, and single keys on top."""
    m, random = n + more, torch.Generator().manual_seed(seed)
    pattern = Causal() & Window(max(1, n // 2)) | Sinks(2) & Causal()
    num_rows, num_cols = -(-n // block[0]), -(-m // block[1])
    chosen = torch.randint(-1, num_cols, (3, num_rows, 4), generator=random)
    tokens = torch.randint(-1, m, (3, num_rows, 3), generator=random) if with_tokens else None
    group_of = torch.tensor([[0, 1], [2, 1]])
    plan = plan_chosen(pattern, chosen, group_of, n, m, block, tokens=tokens).verify()
    marks = torch.zeros(3, num_rows, num_cols + 1, dtype=torch.bool)  # the last column takes the -1s
    marks = marks.scatter_(2, chosen % (num_cols + 1), True)[..., :-1]
    assert plan_chosen(pattern, marks, group_of, n, m, block, tokens=tokens).dense().equal(plan.dense())
    expected = torch.zeros(3, n, m, dtype=torch.bool)
    for g in range(3):
        for i in range(n):
            for tile in chosen[g, i // block[0]].tolist():
                if tile >= 0:
                    expected[g, i, tile * block[1] : (tile + 1) * block[1]] = True
            for key in tokens[g, i // block[0]].tolist() if tokens is not None else ():
                if key >= 0:
                    expected[g, i, key] = True
    expected &= pattern.dense(n, m)
    assert plan.dense().equal(expected[group_of])
    assert plan.transpose().dense().equal(expected[group_of].transpose(2, 3))
    turned = plan.transpose().transpose().tensors()
    if with_tokens:  # order within a list of single keys is free
        assert turned.keys() == plan.tensors().keys()
    else:
        assert all(turned[k].equal(v) for k, v in plan.tensors().items())


def test_grids_are_permuted_tile_by_tile():
    """On a grid the plan's order makes tiles compact: fewer are listed than in row-major order."""
    pattern = Neighborhood((24, 128), 9)
    plan = pattern.plan(24 * 128, block=(64, 64))
    assert plan.q_order is not None
    row_major = Plan.from_mask(pattern.dense(24 * 128), (64, 64))
    assert plan.num_tiles * 1.5 < row_major.num_tiles


def test_residues_are_permuted_class_by_class():
    plan = (Strided(8) & Causal()).plan(1024, block=(64, 64))
    assert plan.num_tiles == 8 * 3  # two row tiles a residue: one below the diagonal's, two diagonal
    assert plan.is_full().sum() == 8


def test_windows_are_laid_out_one_after_the_other():
    """49 tokens a window: few tiles of 64, where cells of 8 x 8 would meet nine."""
    grid, n = (56, 56), 56 * 56
    for offset in (0, 3):
        plan = GridBlocks(grid, 7, offset=offset).plan(n, block=(64, 64)).verify()
        assert plan.num_computed < 3.5 * 64 * n
    every = GridBlocks(grid, 7, dilation=8).plan(n, block=(64, 64)).verify()
    assert every.num_computed < 3.5 * 64 * n
    assert GridBlocks((64, 64), 8).plan(4096, block=(128, 64)).num_computed == 128 * 4096


def test_stripes_are_laid_out_one_after_the_other():
    stripes = PerHead([Columns(8, 16, 15), Columns(8, 16, 14)]) & BlockBand(128, None, -1)
    plan = stripes.plan(4096, heads=2, block=(64, 64)).verify()
    assert (plan.q_order, plan.k_order is None) == (None, False)
    assert plan.num_tiles < 2 * 64 * (4096 / 16 / 64 + 1)
    assert Columns(64, 16, 3).plan(4096, block=(64, 64)).k_order is None  # tiles already
    band = (Columns(64, 8, 3) | BlockBand(64, 4)) & Causal()
    assert band.plan(4096, block=(64, 64)).k_order is None  # it would scatter the band


def test_labels_that_do_not_ascend_are_sorted():
    """Diagonals of a grid, as they stand and as a sequence of diagonals: block-causal."""
    steps = (torch.arange(32)[:, None] + torch.arange(32)).flatten()
    plan, ordered = (Labels(l, left=None).plan(1024, block=(64, 64)) for l in (steps, steps.sort().values))
    assert plan.verify().k_order.equal(steps.argsort(stable=True))
    assert ordered.k_order is None
    assert plan.num_tiles == ordered.num_tiles < 0.65 * 16**2
    again = torch.arange(1024) % 16
    assert Labels(again).plan(1024, block=(64, 64)).num_tiles == 16
    assert (Labels(again) & Window(64)).plan(1024, block=(64, 64)).num_tiles < 32
    queries = Labels(torch.arange(8), queries=again // 2).plan(1024, 8, block=(64, 1))
    assert queries.num_tiles == 16 * 1


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        (Causal() & (Window(64) | Strided(8)), 0.30),
        (Strided(8) & Causal() | Sinks(4), 0.10),
        (PerHead([Strided(8), Window(8)]), 0.20),
    ],
    ids=repr,
)
def test_a_union_keeps_the_order_that_leaves_fewer_tiles(pattern, share):
    n, heads = 8192, len(pattern.patterns) if isinstance(pattern, PerHead) else 1
    plan = pattern.plan(n, heads=heads, block=(64, 64)).verify()
    assert plan.k_order is not None
    assert plan.num_tiles / heads < share * 128**2


def test_a_union_whose_parts_an_order_would_scatter_stays_as_it_is():
    assert (Causal() & (Window(64) | Strided(64))).plan(4096, block=(64, 64)).k_order is None
    assert (Causal() & (Window(64) | Sinks(4))).plan(4096, block=(64, 64)).k_order is None


def test_a_grid_keeps_its_order_beside_a_few_keys():
    near = Neighborhood((32, 256), 7)
    plans = [pattern.plan(8192, block=(64, 64)) for pattern in (near, near | Sinks(4))]
    assert all(plan.k_order is not None for plan in plans)
    assert plans[1].num_tiles <= plans[0].num_tiles + 128 * 4


def test_nothing_at_all():
    """A pattern of no boxes, alone, on one head, in a union and under &."""
    none = Sinks(0)
    assert none.plan(9, block=(4, 4)).verify().num_tiles == 0
    mixed = PerHead([none, Window(3)]).plan(9, heads=2, block=(4, 4)).verify()
    assert mixed.dense().equal(PerHead([none, Window(3)]).dense(9, heads=2))
    assert (none | Window(3)).plan(9, block=(4, 4)).dense().equal(Window(3).dense(9))
    assert (none & Window(3)).plan(9, block=(4, 4)).num_tiles == 0
    both = PerHead([none, Sinks(2) | Strided(2) | Band(None, None)]).plan(9, heads=2, block=(2, 2)).verify()
    assert both.dense()[1].all()
    assert not both.dense()[0].any()


def test_computed_pairs_are_those_of_whole_tiles_and_listed_keys():
    pattern = Neighborhood((16, 16), 5)
    plan, listed = pattern.plan(256, block=(64, 16)), pattern.gathered(256, block=(64, 16))
    assert plan.num_computed == plan.num_tiles * 64 * 16
    assert listed.num_computed == len(listed.token_indices) * 64
    heads = PerHead([Window(8), Causal()]).plan(64, heads=2, block=(16, 16))
    assert heads.num_computed == (7 + 10) / 2 * 256


def test_heads_that_follow_the_same_pattern_share_lists():
    plan = PerHead([Window(8), Causal(), Window(8), Window(8)]).plan(100, heads=4, block=(16, 16))
    assert plan.num_groups == 2
    assert plan.group_of.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("table", "broken", "message"),
    [
        ("indptr", lambda p: p.indptr + 1, "indptr"),
        ("indices", lambda p: p.indices + 99, "indices"),
        ("indices", lambda p: p.indices.flip(0), "indices"),
        ("num_full", lambda p: p.num_full + 9, "num_full"),
        ("group_of", lambda p: p.group_of + 1, "group_of"),
        ("union_of", lambda p: p.union_of + 1, "union_of"),
        ("q_order", lambda p: torch.zeros(p.num_queries, dtype=torch.int64), "q_order"),
        ("k_order", lambda p: torch.ones(p.num_keys, dtype=torch.int64), "k_order"),
        ("token_indices", lambda p: torch.tensor([500], dtype=torch.int32), "token_indptr"),
        ("token_log_weights", lambda p: torch.zeros(1), "token_log_weights"),
        ("bits", lambda p: torch.zeros(1, 4, 4, dtype=torch.bool), "bits"),
    ],
)
def test_verify_names_the_ill_formed_table(table, broken, message):
    plan = (Window(9) | Sinks(2)).plan(50, block=(8, 8)).verify()
    with pytest.raises(ValueError, match=message):
        replace(plan, **{table: broken(plan)}).verify()


def test_drawing_shows_full_and_partial_tiles(tmp_path):
    plan = (Window(20) & Causal()).plan(64, block=(8, 8))
    cells = tile_map(plan)
    assert cells.shape == (8, 8)
    assert (cells == 1).sum() == plan.is_full().sum()
    assert (cells == 0.5).sum() == (~plan.is_full()).sum()
    assert tile_map(plan.transpose()).equal(cells.T)
    assert plan.draw(tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="head: got 3"):
        plan.draw(tmp_path / "plan.png", head=3)


def test_the_box_tables_of_a_free_plan_are_empty():
    assert Boxes.of([[{}]], 3, 5, torch.device("cpu")).coord.shape == (0, 5)
