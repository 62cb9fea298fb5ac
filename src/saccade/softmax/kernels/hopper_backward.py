"""The backward kernel for Hopper: dk and dv in registers, dq added up in memory, five products a pair of tiles.

    p = 2^(z - lse),   dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i) softcap'(z_ij),
    dk_j = scale sum_i ds_ij q_i,   dq_i = scale sum_j ds_ij k_j,   delta_i = do_i . o_i - dlse_i

after FlashAttention-3 (arXiv:2407.08608). A work item is a key tile of one key head, its lists those of the transposed
plan, one for each query head; a producer warp feeds rings with 64 rows of Q and dO a step. Two consumers of 64 keys
each form p and ds transposed, so that both are operands from registers, and hand each other ds through shared memory:
of dq one takes the first half of the channels, the other the second, a step late, so that neither waits for the other.
The copy engine adds dq up in float32, in the order of the accumulator's registers. These sums come in no fixed order:
the last bits of dq differ from run to run. Cost: 10 D operations a pair of a listed tile; 4 D bytes a query row and
listed key tile added up in the second-level cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.softmax.kernels.hopper import PANEL, PLAIN, after, barriers, copy, get, put, save
from saccade.softmax.kernels.hopper_walk import (
    RESIDENT,
    ROWS,
    Walk,
    apart,
    copyable,
    described,
    in_order,
    numbers,
    padded,
    processors,
)
from saccade.softmax.kernels.hopper_walk import supports as supports_forward
from saccade.softmax.lists import turned
from saccade.where import Plan

LINE = 256  # float32 numbers that one row of a copy holds
LINES = gl.constexpr(gl.NVMMASharedLayout(0, 32, rank=2))
STATISTICS = gl.NVMMASharedLayout(0, 32, rank=4)


@builtin
def _add_to(box, coord, source, _semantic=None):
    """Start to add shared memory to a tensor's block."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, box.handle, coord, source.handle)


@gluon.constexpr_function
def _as_held(width):
    """64 x width numbers of an accumulator in shared memory as its threads hold them: four of one thread, four of the
    next, and on to the next four of the first, so that no two threads meet in a bank."""
    bases = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
    return gl.SharedLinearLayout(bases + [[0, 2**i] for i in range(3, width.bit_length() - 1)])


@gluon.jit
def _produce(args, BQ: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, QS: gl.constexpr, OS: gl.constexpr):
    """The copying warp: K and V of an item, then Q, dO and their statistics step after step."""
    boxes, q_ring, o_ring, k_ring, v_ring, orders, work, lists, counter, indices, num_work, ratio = args
    q_box, k_box, v_box, do_box, stats_box = boxes
    q_data, stats, infos, q_full, q_empty = q_ring
    o_data, o_full, o_empty = o_ring
    k_data, k_full, k_empty = k_ring
    v_data, v_full, v_empty = v_ring
    told, told_full, told_empty = orders
    PIECES: gl.constexpr = BQ // 64
    HALVES: gl.constexpr = gl.NVMMASharedLayout(D, 16, rank=2)
    qs, qp, os, op, ts, tp = 0, 1, 0, 1, 0, 1
    turn = 0
    at = gl.program_id(0)
    while at < num_work:
        then = gl.atomic_add(counter, 1) + gl.num_programs(0)
        item = work + at * 4
        b, kv, col, steps = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
        mbarrier.wait(told_empty.index(ts), tp)
        put(told, ts * 4, steps)
        put(told, ts * 4 + 1, b)
        put(told, ts * 4 + 2, kv)
        put(told, ts * 4 + 3, col)
        mbarrier.arrive(told_full.index(ts), count=1)
        ts, tp = after(ts, tp, 2)
        mbarrier.wait(k_empty.index(0), turn & 1 ^ 1)
        mbarrier.expect(k_full.index(0), 128 * D * 2)
        for g in gl.static_range(2):
            halves = k_data.index(g)._reinterpret(k_box.dtype, [2, 64, D // 2], HALVES)
            for c in gl.static_range(2):
                place = [b, kv, col + g * 64, c * (D // 2)]
                tma.async_copy_global_to_shared(k_box, place, k_full.index(0), halves.index(c))
        has_v = 0
        for r in range(ratio):
            entry = lists + (at * ratio + r) * 4
            start, count, full, union = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)
            h = kv * ratio + r
            for i in range(count * PIECES - 1, -1, -1):
                row = gl.load(indices + start + i // PIECES) * BQ + i % PIECES * 64
                bar = q_full.index(qs)
                mbarrier.wait(q_empty.index(qs), qp)
                put(infos, qs * 4, row)
                put(infos, qs * 4 + 1, h)
                put(infos, qs * 4 + 2, gl.where(i // PIECES < full, -1, union))
                mbarrier.expect(bar, 64 * D * 2 + 512)
                copy(q_box, (b, h, row), bar, q_data.index(qs), D, 64, 0, 64)
                pair = stats.index(qs * 2)._reinterpret(gl.float32, [2, 64], LINES)
                tma.async_copy_global_to_shared(stats_box, [b, h, 0, row], bar, pair)
                qs, qp = after(qs, qp, QS)
                if has_v == 0:  # wanted after the first scores only, and free later than k
                    mbarrier.wait(v_empty.index(0), turn & 1 ^ 1)
                    mbarrier.expect(v_full.index(0), 128 * DV * 2)
                    for g in gl.static_range(2):
                        copy(v_box, (b, kv, col + g * 64), v_full.index(0), v_data.index(g), DV, 64, 0, 64)
                has_v = 1
                mbarrier.wait(o_empty.index(os), op)
                mbarrier.expect(o_full.index(os), 64 * DV * 2)
                copy(do_box, (b, h, row), o_full.index(os), o_data.index(os), DV, 64, 0, 64)
                os, op = after(os, op, OS)
        if has_v == 0:
            mbarrier.wait(v_empty.index(0), turn & 1 ^ 1)
            mbarrier.arrive(v_full.index(0), count=1)
        turn += 1
        at = then
    mbarrier.wait(told_empty.index(ts), tp)
    put(told, ts * 4, -1)
    mbarrier.arrive(told_full.index(ts), count=1)


@gluon.jit
def _masked(p, keys, first, rows, coord, stride, lo, hi, rows_padded, T: gl.constexpr, A: gl.constexpr):
    """p (64 keys, 64 rows) where some box allows the pair, else 0. first: the keys' first coordinates."""
    some = gl.full(p.shape, 0, gl.int1, p.type.layout)
    for t in gl.static_range(T):
        every = gl.full(p.shape, 1, gl.int1, p.type.layout)
        for a in gl.static_range(A):
            c = first if a == 0 else gl.load(coord + a * stride + keys)
            low = gl.load(lo + (t * A + a) * rows_padded + rows)
            high = gl.load(hi + (t * A + a) * rows_padded + rows)
            every = every & (low[None, :] <= c[:, None]) & (c[:, None] < high[None, :])
        some = some | every
    return gl.where(some, p, 0.0)


@gluon.jit
def _hand_over(box, stage, dq, place, D: gl.constexpr):
    """Start to add dq (64, D / 2) to what lies at `place`."""
    tma.store_wait(0)
    gl.thread_barrier()
    stage._reinterpret(gl.float32, [64, D // 2], _as_held(D // 2)).store(dq)
    fence_async_shared()
    _add_to(box, [place, 0], stage)


@gluon.jit
def _queries_part(ds, slot, k_data, none, GROUP: gl.constexpr, D: gl.constexpr):
    """ds k for 64 rows and half of the channels, in flight."""
    HALVES: gl.constexpr = gl.NVMMASharedLayout(D, 16, rank=2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    dq = gl.zeros([64, D // 2], gl.float32, layout)
    for g in gl.static_range(2):
        k = k_data.index(g + none)._reinterpret(ds.dtype, [2, 64, D // 2], HALVES).index(GROUP)
        dq = warpgroup_mma(ds.index(slot * 2 + g).permute((1, 0)), k, dq, use_acc=g == 1, is_async=True)
    return dq


@gluon.jit
def _consume(
    args, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, QS: gl.constexpr, OS: gl.constexpr,
    T: gl.constexpr, A: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """One multiplying warpgroup: its 64 keys of item after item."""
    boxes, q_ring, o_ring, k_ring, v_ring, ds_ring, sums, orders, tables, scale, cap, factor, heads, trash = args
    dk_box, dv_box, dq_box = boxes
    q_data, stats, infos, q_full, q_empty = q_ring
    o_data, o_full, o_empty = o_ring
    k_data, k_full, k_empty = k_ring
    v_data, v_full, v_empty = v_ring
    ds_data, ds_full = ds_ring
    told, told_full, told_empty = orders
    coord, stride, lo, hi, rows_padded = tables
    dtype: gl.constexpr = q_data.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    pk_layout: gl.constexpr = gl.DotOperandLayout(0, k_layout, 2)
    pv_layout: gl.constexpr = gl.DotOperandLayout(0, v_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    LINES_EACH: gl.constexpr = D // 8  # of 64 rows and half of the channels
    stage = sums.index(GROUP)
    nought = gl.zeros([64, 64], gl.float32, s_layout)
    qs, qp, os, op, ts, tp, turn = 0, 0, 0, 0, 0, 0, 0
    ds, dsp, late, latep = 0, 0, 3, 1  # where ds goes, and where the last one went
    mbarrier.wait(told_full.index(ts), tp)
    steps = get(told, ts * 4)
    while steps >= 0:
        b, kv, col = get(told, ts * 4 + 1), get(told, ts * 4 + 2), get(told, ts * 4 + 3) + GROUP * 64
        mbarrier.arrive(told_empty.index(ts), count=1)
        ts, tp = after(ts, tp, 2)
        dk = gl.zeros([64, D], gl.float32, k_layout)
        dv = gl.zeros([64, DV], gl.float32, v_layout)
        keys = col + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        first = gl.load(coord + keys)
        place = trash  # the first step has no dq of a step before
        mbarrier.wait(k_full.index(0), turn & 1)
        mbarrier.wait(q_full.index(qs), qp, pred=steps > 0)
        q = q_data.index(qs).permute((1, 0))
        s = warpgroup_mma(k_data.index(GROUP), q, nought, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(0), turn & 1)
        s = warpgroup_mma_wait(0, (s,))
        for i in range(steps):
            # Zero, which the compiler does not know: else it keeps the addresses of k and v in registers it lacks.
            none = qs >> 20
            k = k_data.index(GROUP + none)
            v = v_data.index(GROUP + none)._reinterpret(dtype, [64, DV], PANEL)
            row, h, union = get(infos, qs * 4), get(infos, qs * 4 + 1), get(infos, qs * 4 + 2)
            mbarrier.wait(o_full.index(os), op)
            do = o_data.index(os)
            dp = warpgroup_mma(v, do.permute((1, 0)), nought, use_acc=False, is_async=True)
            lse = stats.index(qs * 2).load(row_layout)
            if CAPPED:
                tanh = 1 - 2 / (gl.exp2(s * scale) + 1)
                p = gl.exp2(tanh * cap - lse[None, :])
            else:
                p = gl.exp2(s * scale - lse[None, :])
            if union >= 0:
                rows = row + gl.arange(0, 64, row_layout)
                base = union * (T * A * rows_padded)
                p = _masked(p, keys, first, rows, coord, stride, lo + base, hi + base, rows_padded, T, A)
            pv = gl.convert_layout(p.to(dtype), pv_layout)
            if CAPPED:
                p = p * (1 - tanh * tanh)
            dv = warpgroup_mma(pv, do, dv, is_async=True)
            delta = stats.index(qs * 2 + 1).load(row_layout)
            dp = warpgroup_mma_wait(1, (dp,))
            x = (p * (dp - delta[None, :])).to(dtype)
            ds_data.index(ds * 2 + GROUP).store(x)
            fence_async_shared()
            xk = gl.convert_layout(x, pk_layout)
            dv, pv, xk = warpgroup_mma_wait(0, (dv, pv, xk))
            mbarrier.arrive(ds_full.index(ds), count=1)
            mbarrier.wait(ds_full.index(late), latep)
            mbarrier.arrive(o_empty.index(os), count=1)
            os, op = after(os, op, OS)
            dq = _queries_part(ds_data, late, k_data, none, GROUP, D)
            late, latep = ds, dsp
            ds, dsp = after(ds, dsp, 4)  # of four places, the one two steps ahead is read by nobody
            dk = warpgroup_mma(xk, q_data.index(qs), dk, is_async=True)
            used = qs
            qs, qp = after(qs, qp, QS)
            mbarrier.wait(q_full.index(qs), qp, pred=i + 1 < steps)
            q = q_data.index(qs).permute((1, 0))
            s = warpgroup_mma(k, q, nought, use_acc=False, is_async=True)  # of nothing, after the last step
            dq = warpgroup_mma_wait(2, (dq,))
            _hand_over(dq_box, stage, dq, place, D)
            place = (((b * heads + h) * rows_padded + row) // 64 * 2 + GROUP) * LINES_EACH
            dk, xk, s = warpgroup_mma_wait(0, (dk, xk, s))
            mbarrier.arrive(q_empty.index(used), count=1)
        out = v_data.index(GROUP)._reinterpret(dtype, [64, DV], PANEL)
        out.store(dv.to(dtype))
        save(dv_box, (b, kv, col), out, DV)
        tma.store_wait(0)
        gl.thread_barrier()
        out = v_data.index(GROUP)._reinterpret(dtype, [64, D], PANEL)
        out.store((dk * factor).to(dtype))
        save(dk_box, (b, kv, col), out, D)
        mbarrier.wait(ds_full.index(late), latep)
        dq = _queries_part(ds_data, late, k_data, qs >> 20, GROUP, D)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(k_empty.index(0), count=1)
        _hand_over(dq_box, stage, dq, place, D)  # waits for dk to be read, too
        mbarrier.arrive(v_empty.index(0), count=1)
        turn += 1
        mbarrier.wait(told_full.index(ts), tp)
        steps = get(told, ts * 4)
    tma.store_wait(0)


@gluon.jit
def attend_hopper_backward(
    q_box, k_box, v_box, do_box, stats_box, dk_box, dv_box, dq_box, work, lists, counter, indices, lo, hi, coord,
    num_work, scale, cap, factor, heads, ratio, rows_padded, stride, trash,
    BQ: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, QS: gl.constexpr, OS: gl.constexpr,
    T: gl.constexpr, A: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Tiles of BQ rows and 128 keys; QS, OS: slots of the rings. trash: lines of the sums that mean nothing."""
    dtype: gl.constexpr = q_box.dtype
    WIDE: gl.constexpr = D if D > DV else DV  # dk leaves through the place of v
    q_data = gl.allocate_shared_memory(dtype, [QS, 64, D], PANEL)
    o_data = gl.allocate_shared_memory(dtype, [OS, 64, DV], PANEL)
    k_data = gl.allocate_shared_memory(dtype, [2, 64, D], gl.NVMMASharedLayout(D, 16, rank=2))
    v_data = gl.allocate_shared_memory(dtype, [2, 64, WIDE], PANEL)
    ds_data = gl.allocate_shared_memory(dtype, [8, 64, 64], PANEL)
    sums = gl.allocate_shared_memory(gl.float32, [2, D // 8, 256], LINES)
    stats = gl.allocate_shared_memory(gl.float32, [QS * 2, 64], PLAIN)
    infos = gl.allocate_shared_memory(gl.int32, [QS * 4, 1], PLAIN)
    q_ring = (q_data, stats, infos, barriers(QS, 1), barriers(QS, 2))
    o_ring = (o_data, barriers(OS, 1), barriers(OS, 2))
    k_ring = (k_data, barriers(1, 1), barriers(1, 2))
    v_ring = (v_data, barriers(1, 1), barriers(1, 2))
    ds_ring = (ds_data, barriers(4, 2))
    orders = (gl.allocate_shared_memory(gl.int32, [8, 1], PLAIN), barriers(2, 1), barriers(2, 2))
    boxes = (q_box, k_box, v_box, do_box, stats_box)
    given = (boxes, q_ring, o_ring, k_ring, v_ring, orders, work, lists, counter, indices, num_work, ratio)
    tables = (coord, stride, lo, hi, rows_padded)
    results = (dk_box, dv_box, dq_box)
    taken = (results, q_ring, o_ring, k_ring, v_ring, ds_ring, sums, orders, tables, scale, cap, factor, heads, trash)
    gl.warp_specialize(
        [
            (_consume, (taken, 0, D, DV, QS, OS, T, A, CAPPED)),
            (_consume, (taken, 1, D, DV, QS, OS, T, A, CAPPED)),
            (_produce, (given, BQ, D, DV, QS, OS)),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def row_statistics(
    o, do, lse, dlse, stats, N, rows_padded, H, o_b, o_h, o_n, do_b, do_h, do_n,
    DV: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """stats (B, H, 2, rows): lse in units of log2, inf for rows that see nothing or are none; do . o - dlse."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    c = tl.arange(0, PAD)
    there = rows < N
    mask = there[:, None] & (c < DV)[None, :]
    r = rows.to(tl.int64)[:, None]
    x = tl.load(o + b * o_b + h * o_h + r * o_n + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(do + b * do_b + h * do_h + r * do_n + c[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(x * y, 1)
    at = head * N + rows
    z = tl.load(lse + at, mask=there, other=-float("inf"))
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=there, other=0.0)
    out = stats + head * 2 * rows_padded + rows
    tl.store(out, tl.where(z == -float("inf"), float("inf"), z * 1.4426950408889634))
    tl.store(out + rows_padded, delta)


@triton.jit
def sums_in_rows(sums, dq, N, rows_padded, H, factor, dq_b, dq_h, dq_n, D: tl.constexpr, PAD: tl.constexpr):
    """dq (B, H, N, D) from sums that lie as accumulators hold them."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, 64)
    c = tl.arange(0, PAD)
    half = c % (PAD // 2)
    r_at = r % 8 * 16 + r // 8 % 2 * 2 + r // 16 * 128
    c_at = half % 2 + half // 2 % 4 * 4 + half // 8 * 512 + c // (PAD // 2) * (32 * PAD)
    tile = (head * rows_padded + tl.program_id(0) * 64) * PAD
    x = tl.load(sums + tile + r_at[:, None] + c_at[None, :])
    rows = tl.program_id(0) * 64 + r
    out = dq + head // H * dq_b + head % H * dq_h + rows.to(tl.int64)[:, None] * dq_n + c[None, :]
    tl.store(out, x * factor, mask=(rows < N)[:, None] & (c < D)[None, :])


def key_items(plan: Plan, batch: int, kv_heads: int, read: int) -> tuple[Tensor, Tensor]:
    """Work of the backward kernel, in order: int32 (items, 4), batch entry, key head, first key, steps; int32 (items,
    query heads a key head, 4), first entry of the transposed list, entries, full ones, union of boxes. Kept with the
    plan."""

    def items() -> tuple[Tensor, Tensor]:
        by_key, (bq, bk), heads = turned(plan), plan.block, plan.num_heads
        cols, ratio = by_key.num_row_tiles, heads // kv_heads
        b, h, c = torch.meshgrid(*(torch.arange(x, device=plan.device) for x in (batch, kv_heads, cols)), indexing="ij")
        group = plan.group_of.expand(batch, heads).unflatten(1, (kv_heads, ratio))[:, :, None]
        at = group * cols + c[..., None]
        start = by_key.indptr[at]
        count = by_key.indptr[at + 1] - start
        union = plan.union_of[group].expand_as(start)
        lists = torch.stack([start, count, by_key.num_full[at], union], -1).flatten(0, 2)
        work = torch.stack([b, h, c * bk, count.sum(-1) * (bq // ROWS)], -1).flatten(0, 2)
        order = in_order(work[:, 3], work[:, 0] * kv_heads + work[:, 1], batch * kv_heads, read, apart(by_key))
        return work[order].int().contiguous(), lists[order].int().contiguous()

    return plan.derive(("hopper backward", batch, kv_heads, read > RESIDENT), items)


def supports(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[str]:
    """Why the backward kernel cannot run a problem, in words; empty when it can. See the forward kernel's."""
    found = supports_forward(q, k, v, plan)
    if max(q.shape[3], v.shape[3]) > 128 or q.shape[3] % 8:
        found.append(
            f"its gradients take up to 128 channels, a multiple of 8, not {q.shape[3]} and {v.shape[3]}: dk and dv lie "
            "in registers"
        )
    if plan.block[1] != 128:
        found.append(f"its gradients take tiles of 128 keys, the plan's are {plan.block[1]}")
    return found


class KeyWalk(NamedTuple):
    """What the backward kernel is given of the transposed plan: see `key_items`; the query tiles of each key tile."""

    work: Tensor
    lists: Tensor
    indices: Tensor

    @classmethod
    def of(cls, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> KeyWalk:
        """Of a plan, for tensors of these shapes."""
        (batch, heads, n, d), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
        return cls(*key_items(plan, batch, kv_heads, 2 * batch * heads * n * (d + dv)), turned(plan).indices)


def backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: Walk,
    by_key: KeyWalk,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), in the layouts of q, k and v.

    What `forward` was given and gave, and the gradients of o and, if there is one, of lse (B, H, N) float32 contiguous.
    The host waits for nothing.
    """
    (batch, heads, n, d), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
    do = do if copyable(do) else do.contiguous()
    pad_d, pad_dv = padded(d), padded(dv)
    rows = walk.lo.shape[3]
    stats = q.new_empty(batch, heads, 2, rows, dtype=torch.float32)
    row_statistics[(rows // ROWS, batch * heads)](
        o, do, lse, dlse, stats, n, rows, heads, *o.stride()[:3], *do.stride()[:3], DV=dv, PAD=pad_dv
    )
    trash = batch * heads * rows * pad_d // LINE
    sums = q.new_zeros(trash + ROWS * pad_d // LINE, LINE, dtype=torch.float32)
    sums_box = TensorDescriptor(sums, list(sums.shape), [LINE, 1], [pad_d // 8, LINE], LINES.value)
    dq, dk, dv_ = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    attend_hopper_backward[(min(processors(q.device), len(by_key.work)),)](
        described(q, ROWS), described(k, ROWS, channels=pad_d // 2), described(v, ROWS), described(do, ROWS),
        TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [1, 1, 2, ROWS], STATISTICS),
        described(dk, ROWS), described(dv_, ROWS), sums_box, *by_key[:2], counter, by_key.indices, walk.lo, walk.hi,
        walk.coord, len(by_key.work), *numbers(scale, softcap), scale, heads, heads // kv_heads, rows,
        walk.coord.shape[1], trash,
        BQ=walk.block[0], D=pad_d, DV=pad_dv, QS=2, OS=2, T=walk.lo.shape[1], A=walk.lo.shape[2],
        CAPPED=softcap is not None, num_warps=4,
    )  # fmt: skip
    sums_in_rows[(rows // ROWS, batch * heads)](sums, dq, n, rows, heads, scale, *dq.stride()[:3], D=d, PAD=pad_d)
    return dq, dk, dv_
