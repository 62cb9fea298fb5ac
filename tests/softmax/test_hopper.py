"""The Hopper kernels give the oracle's numbers and gradients; their work tables spell out the plan."""

from __future__ import annotations

import pytest
import torch

from saccade import attend
from saccade.softmax.kernels import hopper, hopper_backward, hopper_walk
from saccade.testing.budget import assert_close
from saccade.where import Causal, Columns, Full, Neighborhood, PerHead, Plan, Sinks, Window, plan_chosen
from saccade.where.grid import Grid

B, H, KV = 2, 4, 2
FEW = 4  # terms of the band: two units in the last place beside twice the eager error
LARGE = 2**40  # bytes that no cache keeps


def routed(block, n=700):
    chosen = torch.rand(B * H, -(-n // block[0]), -(-n // block[1])) < 0.25
    chosen[1] = False  # a head of one batch entry that sees nothing
    return plan_chosen(Causal(), chosen, torch.arange(B * H).view(B, H), n, n, block)


def static(pattern, n, m=None, block=(128, 128)):
    return lambda: pattern.plan(n, m, H, block)


PLANS = {
    "full": static(Full(), 512),
    "full, odd": static(Full(), 389, 517),
    "causal": static(Causal(), 640),
    "causal, last queries": static(Causal(), 67, 301),
    "window and sinks": static(Causal() & (Window(165) | Sinks(3)), 701),
    "nothing for some": static(Window(3) & Columns(1, 7, 2), 300),
    "heads": static(PerHead([Causal(), Window(40) & Causal(), Full(), Causal()]), 257, 301),
    "grid": static(Neighborhood((24, 20), 7), 480),
    "cells": static(Neighborhood((24, 40), 7), 960, None, (64, 64)),
    "causal cells": static(Neighborhood((32, 16), (9, 5), (2, 1), causal=(False, True)), 512, None, (64, 64)),
    "cells in three axes": static(Neighborhood((8, 12, 8), 5), 768, None, (64, 64)),
    "routed": lambda: routed((128, 128)),
    "routed, low tiles": lambda: routed((64, 128)),
    "routed, small tiles": lambda: routed((64, 64)),
    "narrow tiles": static(Causal() & Window(300), 700, None, (128, 64)),
}


USUAL = (128, 128, torch.bfloat16, None)
OTHERS = (
    (128, 128, torch.bfloat16, 5.0),
    (64, 64, torch.float16, 5.0),
    (96, 72, torch.bfloat16, None),
    (256, 256, torch.bfloat16, None),
)
RUNS = [(name, *USUAL) for name in PLANS]
RUNS += [(name, *other) for name in ("causal, last queries", "grid", "routed") for other in OTHERS]
RUNS += [(name, *OTHERS[1]) for name in ("routed, low tiles", "routed, small tiles", "narrow tiles", "cells")]
RUNS += [(name, *OTHERS[2]) for name in ("cells", "cells in three axes")]


def steps_of(plan: Plan, keys: int) -> dict[tuple[int, int, int], list[tuple[int, bool]]]:
    """What the forward kernel walks, by (batch entry, head, first row): (first key, masked)."""
    found = {}
    bk = plan.block[1]
    pieces, parts = max(1, bk // keys), max(1, keys // bk)
    for b, h, row, start, count, steps, unmasked, _ in hopper_walk.work_items(plan, B, keys, LARGE).tolist():
        walk = []
        for step in range(steps):
            for entry in range(step * parts, min((step + 1) * parts, count)):
                tile = int(plan.indices[start + entry // pieces])
                walk.append((tile * bk + entry % pieces * min(keys, bk), step >= unmasked))
        found[b, h, row] = walk
    return found


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("name", PLANS)
def test_work_items_spell_out_the_lists(name, keys):
    plan = PLANS[name]()
    (bq, bk), rows = plan.block, plan.num_row_tiles
    found = steps_of(plan, keys)
    assert len(found) == B * H * rows
    for (b, h, row), walk in found.items():
        entry = int(plan.group_of.expand(B, H)[b, h]) * rows + row // bq
        tiles = plan.indices[plan.indptr[entry] : plan.indptr[entry + 1]].tolist()
        assert [key for key, _ in walk] == [t * bk + o for t in tiles for o in range(0, bk, min(keys, bk))]
        full = set(tiles[: int(plan.num_full[entry])])
        assert all(masked or key // bk in full for key, masked in walk)


@pytest.mark.parametrize("name", ["causal", "heads", "routed", "routed, low tiles"])
def test_key_items_spell_out_the_transposed_lists(name):
    plan = PLANS[name]()
    by_key = plan.transpose()
    work, lists = hopper_backward.key_items(plan, B, KV, LARGE)
    seen = set()
    for (b, kv, col, steps), entries in zip(work.tolist(), lists.tolist(), strict=True):
        total = 0
        for r, (start, count, full, union) in enumerate(entries):
            group = int(plan.group_of.expand(B, H)[b, kv * (H // KV) + r])
            entry = group * by_key.num_row_tiles + col // plan.block[1]
            assert (start, start + count) == (int(by_key.indptr[entry]), int(by_key.indptr[entry + 1]))
            assert (full, union) == (int(by_key.num_full[entry]), int(plan.union_of[group]))
            total += count * plan.block[0] // 64
        assert steps == total
        seen.add((b, kv, col))
    assert len(seen) == len(work) == B * KV * by_key.num_row_tiles


def test_long_lists_come_first():
    plan = static(Causal(), 2048)()
    for read in (0, LARGE):
        steps = hopper_walk.work_items(plan, 1, 128, read)[:, 5]
        half = len(steps) // 2
        assert steps[:half].sum() > 2 * steps[half:].sum()
    by_head, by_length = (hopper_walk.work_items(plan, 1, 128, read)[:, 1] for read in (LARGE, 0))
    assert (by_head[1:] == by_head[:-1]).sum() > (by_length[1:] == by_length[:-1]).sum()


def test_nothing_is_allowed_beyond_the_ends():
    for name in ("full, odd", "grid"):
        plan = PLANS[name]()
        boxes = hopper_walk.Boxed.of(plan)
        n, m = plan.num_queries, plan.num_keys
        c, lo, hi = boxes.coord[0], boxes.lo[0, 0, 0], boxes.hi[0, 0, 0]
        inside = (lo[:, None] <= c) & (c < hi[:, None])
        assert inside[:n, :m].any()
        assert not inside[n:].any()
        assert not inside[:, m:].any()
        assert len(c) >= boxes.far + 128
        assert boxes.far >= m


def plain(inputs, mask, scale, softcap, cotangents):
    """[o, lse, dq, dk, dv] from the equations, in the dtype of the inputs."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    ratio = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(ratio, 1).transpose(2, 3) * scale
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    s = s.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(s, -1)
    none = lse == -torch.inf
    o = torch.exp(s - lse.masked_fill(none, 0.0)[..., None]) @ v.repeat_interleave(ratio, 1)
    loss = (o * cotangents[0].to(o)).sum() + (lse.masked_fill(none, 0.0) * cotangents[1].to(lse)).sum()
    gradients = torch.autograd.grad(loss, (q, k, v))
    return [o.detach(), lse.detach(), *(x.nan_to_num(0.0) for x in gradients)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "d", "dv", "dtype", "softcap"), RUNS)
def test_values_and_gradients(name, d, dv, dtype, softcap):
    plan = PLANS[name]().to("cuda")
    n, m = plan.num_queries, plan.num_keys
    shapes = ((H, n, d), (KV, m, d), (KV, m, dv))
    inputs = [torch.randn(B, *shape, device="cuda").to(dtype) for shape in shapes]
    assert hopper_walk.supports(*inputs, plan) == []
    cotangents = torch.randn(B, H, n, dv, device="cuda").to(dtype), torch.randn(B, H, n, device="cuda")
    mask = plan.dense()
    if hopper_walk.grid_of(plan) is None:
        mask = mask if plan.q_order is None else mask[..., plan.q_order, :]
        mask = mask if plan.k_order is None else mask[..., plan.k_order]
    scale = d**-0.5
    exact = plain([x.double() for x in inputs], mask, scale, softcap, cotangents)
    eager = plain(inputs, mask, scale, softcap, cotangents)
    eager[1] = plain([x.float() for x in inputs], mask, scale, softcap, cotangents)[1]
    walk = hopper_walk.Walk.of(plan, *inputs)
    o, lse = hopper.forward(*inputs, walk, scale, softcap)
    found = [o, lse]
    if not hopper_backward.supports(*inputs, plan):
        by_key = hopper_backward.KeyWalk.of(plan, *inputs)
        found += hopper_backward.backward(*cotangents, o, lse, *inputs, walk, by_key, scale, softcap)
    assert len(found) == (5 if d <= 128 and plan.block[1] == 128 else 2)
    for what, mine, truth, beside in zip(("o", "lse", "dq", "dk", "dv"), found, exact, eager, strict=False):
        assert_close(mine, truth, beside.nan_to_num(0.0) if what != "lse" else beside, name=what, terms=FEW)


def test_cells_are_of_both_sides():
    assert hopper_walk.grid_of(PLANS["cells"]()) == Grid((1, 24, 40), (1, 8, 8))
    assert hopper_walk.grid_of(PLANS["cells in three axes"]()) == Grid((8, 12, 8), (4, 4, 4))
    grid = Neighborhood((24, 40), 7)
    for plan in (grid.plan(960, block=(128, 64)), grid.plan(320, 960, block=(64, 64)), PLANS["routed, small tiles"]()):
        assert hopper_walk.grid_of(plan) is None


@pytest.mark.gpu
def test_cells_of_any_layout():
    plan = PLANS["cells"]().to("cuda")
    whole = torch.randn(B, 960, H + 2 * KV, 64, device="cuda").bfloat16().transpose(1, 2)
    q, k, v = whole.split((H, KV, KV), 1)
    walk = hopper_walk.Walk.of(plan, q, k, v)
    o, lse = hopper.forward(q, k, v, walk, 0.125, None)
    again, lse_again = hopper.forward(*(x.contiguous() for x in (q, k, v)), walk, 0.125, None)
    assert torch.equal(o, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.gpu
def test_any_layout_and_no_lse_gradient():
    plan = Causal().plan(300, 300, H, (128, 128), "cuda")
    whole = torch.randn(B, 300, H + 2 * KV, 64, device="cuda").bfloat16().transpose(1, 2)
    q, k, v = whole.split((H, KV, KV), 1)
    do = torch.randn(B, 300, H, 64, device="cuda").bfloat16().transpose(1, 2)
    walk = hopper_walk.Walk.of(plan, q, k, v)
    o, lse = hopper.forward(q, k, v, walk, 0.125, None)
    again, lse_again = hopper.forward(*(x.contiguous() for x in (q, k, v)), walk, 0.125, None)
    assert torch.equal(o, again)
    assert torch.equal(lse, lse_again)
    by_key = hopper_backward.KeyWalk.of(plan, q, k, v)
    mine = hopper_backward.backward(do, None, o, lse, q, k, v, walk, by_key, 0.125, None)
    zero = torch.zeros_like(lse)
    other = hopper_backward.backward(
        do.contiguous(), zero, again, lse, *(x.contiguous() for x in (q, k, v)), walk, by_key, 0.125, None
    )
    assert torch.equal(mine[1], other[1])
    assert torch.equal(mine[2], other[2])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("pattern", [Causal() & Window(200), Neighborhood((24, 40), 7)], ids=["window", "grid"])
def test_one_graph(pattern, backend):
    """Bitwise what runs outside of a graph; gradients are added in no fixed order, and nearly the same."""
    inputs = [torch.randn(1, 4, 960, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def call(q, k, v):
        return attend(q * 2, k, v, pattern, backend=backend, softcap=7.0) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(*inputs).equal(call(*inputs))
    leaves = [x.requires_grad_() for x in inputs]
    found, exact = (torch.autograd.grad(f(*leaves).float().sin().sum(), leaves) for f in (compiled, call))
    for mine, true in zip(found, exact, strict=True):
        assert_close(mine, true.double(), true, terms=FEW)


@pytest.mark.gpu
def test_what_cannot_run_says_so():
    plan = Causal().plan(300, 300, H, (128, 32), "cuda")
    q, k, v = (torch.randn(B, heads, 300, 60, device="cuda") for heads in (H, KV, KV))
    found = " ".join(hopper_walk.supports(q, k, v, plan))
    for part in ("bfloat16 and float16", "multiple of 8", "64 or 128 tokens"):
        assert part in found
    half = torch.randn(B, H, 300, 60, device="cuda").half()
    assert "multiples of 16 bytes" in " ".join(hopper_walk.supports(half, half, half, plan))
