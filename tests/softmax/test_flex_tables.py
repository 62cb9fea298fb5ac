"""What FlexAttention is handed says the same as the plan: lists of tiles, and a mask function for the partial ones."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from saccade.softmax import flex
from saccade.softmax.flex import block_mask
from saccade.softmax.problem import Problem
from saccade.where import (
    Band,
    Blocks,
    Causal,
    Documents,
    Full,
    Neighborhood,
    PerHead,
    Sinks,
    Strided,
    Window,
    plan_chosen,
)


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


class Counting:
    """Runs FlexAttention uncompiled, and counts what would have been compiled."""

    def __init__(self, monkeypatch):
        torch.compiler.reset()
        self.counter = CompileCounter()
        compiled = torch.compile(flex.flex_attention, backend=self.counter, fullgraph=True)
        monkeypatch.setattr(flex, "_compiled", lambda: compiled)

    def __call__(self, where, n=256, head_dim=16, **options):
        q, k, v = torch.randn(3, 1, 2, n, head_dim)
        flex.run(Problem.of(q, k, v, where, **options))
        return self.counter.frame_count


ONE_BOX = [Causal(), Causal() & Window(65), Window(17), Band(3, 4), Blocks(32), Documents([0, 100, 256])]


def test_no_pattern_is_compiled(monkeypatch):
    """One graph for all patterns of one box over one axis, one more with a softcap, whatever its value."""
    run = Counting(monkeypatch)
    assert {run(where) for where in ONE_BOX} == {1}
    assert {run(where, softcap=cap) for where, cap in zip(ONE_BOX, (2.0, 3.0, 4.0, 5.0, 6.0, 7.5), strict=True)} == {2}
    assert {run(where) for where in ONE_BOX} == {2}


def test_a_softcap_that_is_a_constant_is_caught(monkeypatch):
    """The broken twin: the compiler is handed a number."""
    capped = flex._capped
    monkeypatch.setattr(flex, "_capped", lambda softcap: capped(float(softcap)))
    with pytest.raises(AssertionError):
        test_no_pattern_is_compiled(monkeypatch)


def many_variants(run):
    return [run(where, head_dim=d) for d in (16, 24, 32, 40, 48) for where in (Causal(), Strided(2) & Causal())]


def test_shapes_never_use_up_the_room_for_variants(monkeypatch):
    """Sizes, dtypes, numbers of boxes are compiled for, and the compiler's limit of eight is not met."""
    assert max(many_variants(Counting(monkeypatch))) > 8


def test_the_usual_room_is_too_small(monkeypatch):
    """The broken twin: the compiler's own limit."""
    monkeypatch.setattr(flex, "_room_for_variants", contextlib.nullcontext)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        many_variants(Counting(monkeypatch))
