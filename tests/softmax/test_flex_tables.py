"""What FlexAttention is handed says the same as the plan: lists of tiles, and a mask function for the partial ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.softmax.flex import block_mask
from saccade.where import Causal, Full, Neighborhood, PerHead, Sinks, Strided, Window, plan_chosen


def spelled_out(plan, batch, *, turned=False):
    """bool (batch, H, N, M) in the plan's token order, from the tables alone."""
    mask = block_mask(plan)
    heads, n, m = plan.num_heads, plan.num_queries, plan.num_keys
    bq, bk = plan.block
    assert mask.seq_lengths == (n, m)
    assert (bq, bk) == mask.BLOCK_SIZE
    partial = (mask.q_num_blocks, mask.q_indices) if turned else (mask.kv_num_blocks, mask.kv_indices)
    full = (mask.full_q_num_blocks, mask.full_q_indices) if turned else (mask.full_kv_num_blocks, mask.full_kv_indices)
    nq, nk = -(-n // bq), -(-m // bk)
    rows, cols = (nk, nq) if turned else (nq, nk)
    b, h, i, j = torch.meshgrid(*(torch.arange(size) for size in (batch, heads, n, m)), indexing="ij")
    allowed = mask.mask_mod(b, h, i, j).expand(b.shape)
    seen = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for (counts, tiles), exact in ((full, True), (partial, False)):
        assert counts.dtype == tiles.dtype == torch.int32
        counts, tiles = (x.expand(batch, heads, *x.shape[2:]) for x in (counts, tiles))
        assert counts.shape[2] == tiles.shape[2] == rows
        for at in torch.cartesian_prod(*(torch.arange(size) for size in (batch, heads, rows))).tolist():
            listed = tiles[tuple(at)][: counts[tuple(at)]].tolist()
            assert len(set(listed)) == len(listed)
            assert all(0 <= tile < cols for tile in listed)
            for tile in listed:
                row, col = (tile, at[2]) if turned else (at[2], tile)
                part = (at[0], at[1], slice(row * bq, (row + 1) * bq), slice(col * bk, (col + 1) * bk))
                assert not seen[part].any(), "a tile is listed twice"
                seen[part] = True if exact else allowed[part]
    return seen


def check(plan, batch=1):
    dense = plan.dense()
    if plan.q_order is not None:
        dense = dense[..., plan.q_order, :]
    if plan.k_order is not None:
        dense = dense[..., plan.k_order]
    dense = dense.expand(batch, *dense.shape[-3:])
    for turned in (False, True):
        assert spelled_out(plan, batch, turned=turned).equal(dense), f"the tables differ, turned={turned}"


@settings(max_examples=40)
@given(strategies.problems(), strategies.blocks, st.integers(1, 2))
def test_patterns(problem, block, batch):
    pattern, n, m, heads = problem
    check(pattern.plan(n, m, heads, block), batch)


@pytest.mark.parametrize(
    ("pattern", "n", "m"),
    [
        (Full(), 257, 257),
        (Causal() & (Window(100) | Sinks(3)), 257, 301),
        (PerHead([Causal(), Window(130) & Causal(), Strided(3)]), 260, 300),
        (Strided(2) & Causal(), 300, 300),
        (Neighborhood((15, 20), 5), 300, 300),
    ],
)
def test_tiles_of_128(pattern, n, m):
    check(pattern.plan(n, m, 3, (128, 128)))


def chosen(batch, heads=2, n=21, m=26, block=(4, 3)):
    """Random tiles, another list for every (batch, head) or shared by some."""
    groups = batch * heads if batch > 1 else 3
    tiles = torch.randint(-1, -(-m // block[1]), (groups, -(-n // block[0]), 3))
    group_of = torch.randint(0, groups, (batch, heads))
    return plan_chosen(Causal() & Window(15), tiles, group_of, n, m, block).verify()


@pytest.mark.parametrize("batch", [1, 3])
def test_lists_of_their_own_for_every_batch(batch):
    plan = chosen(batch)
    check(plan, 3)
    assert (plan.dense().ndim == 4) == (batch > 1)


def test_the_tables_are_made_once():
    plan = Causal().plan(9, 9, 2, (2, 2))
    assert block_mask(plan) is block_mask(plan)


@pytest.mark.parametrize("what", ["tile", "full", "group"])
def test_broken_tables_are_caught(what):
    plan = chosen(3)
    rows, cols, full = plan.rows(), plan.indices.long(), plan.is_full()
    if what == "tile":
        broken = plan.listing(rows[1:], cols[1:], full[1:], union_of=plan.union_of)
    elif what == "full":
        broken = plan.listing(rows, cols, torch.ones_like(full), union_of=plan.union_of)
    else:
        broken = replace(plan, group_of=plan.group_of.roll(1, 0))
    plan.derived["flex"] = block_mask(broken)
    with pytest.raises(AssertionError, match="the tables differ"):
        check(plan, 3)
