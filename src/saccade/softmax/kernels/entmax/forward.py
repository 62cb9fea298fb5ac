"""The values: o at the tau that was found, corrected to first order for what it still lacks.

A step e of Newton's method from t changes p by - P e u, up to squares of e, so that

    o = (sum p v - P e sum u v) / (sum p - P e sum u)

What gradients need of a row comes with it: mean = sum u v / sum u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.entmax.live import row_list
from saccade.softmax.kernels.entmax.threshold import improved, newton
from saccade.softmax.kernels.entmax.tiles import products, read_span, weights, write_span
from saccade.softmax.kernels.scores import bounds


@triton.jit
def value_sums(
    t, qs, k, k_box, v, v_box, batch, kv_head, listed, steps, full, count, marks, starts, lengths, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    SUBS: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    MARK: tl.constexpr,
):  # fmt: skip
    """Sums of p v, u v, p and u of the rows at t over a list of `count` tiles, the first `full` of them full.

    MARK: mark those used.
    """
    acc = tl.zeros([SQ, PAD_DV], tl.float32)
    u_acc = tl.zeros([SQ, PAD_DV], tl.float32)
    p_sum = tl.zeros([SQ], tl.float32)
    u_sum = tl.zeros([SQ], tl.float32)
    for PARTIAL in tl.static_range(2):
        for at in tl.range(full if PARTIAL else 0, count if PARTIAL else full):
            first = tl.load(listed + at) * BN
            s, _ = products(
                qs, k, k_box, batch, kv_head, first, starts, lengths, tables,
                D, PAD_D, BN, BOXES, AXES, PRECISION, not PARTIAL,
            )  # fmt: skip
            p, u = weights(s, scale, t, POWER, 0)
            of_u = tl.sum(u, 1)
            p_sum += tl.sum(p, 1)
            u_sum += of_u
            vs = read_span(v, v_box, batch, kv_head, first, tables.num_keys, BN, DV, PAD_DV, not PARTIAL)
            acc = tl.dot(p.to(vs.dtype), vs, acc, input_precision=PRECISION)
            u_acc = tl.dot(u.to(vs.dtype), vs, u_acc, input_precision=PRECISION)
            if MARK:
                used = tl.where(tl.max(of_u, 0) == 0.0, 0, 1)
                tl.store(marks + tl.load(steps + at).to(tl.int64) * SUBS, used.to(tl.int8))
    return acc, u_acc, p_sum, u_sum


@triton.jit
def values(
    q, k, k_box, v, v_box, o, mean, tau, sure, marks, tables, live, base, scale, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr, CLOSE: tl.constexpr, LEAP: tl.constexpr,
):  # fmt: skip
    """o (B, H, N, Dv), tau, and where gradients are wanted mean = sum u v / sum u, like o, and marks of tiles in use.

    t is good enough for the correction where u_sum times its error is below CLOSE, and for one more step where it is
    below LEAP.
    """
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    row_tile = part // SUBS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // ratio
    head_of_all = batch * tl.num_programs(1) + head
    at_part = head_of_all * tl.num_programs(0) + part
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    place = part * SQ + tl.arange(0, SQ)
    qs = read_span(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    starts, lengths = bounds(tables, union, place, BOXES * AXES, False)
    tau += head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place
    t = tl.load(tau)

    begin, of_list = row_list(tables, base, group, row_tile, head_of_all, part % SUBS, STEPS, SUBS)
    full = tl.load(live.num_full + at_part)
    count = tl.load(live.num_all + at_part)
    listed = live.tiles + begin
    marks += of_list * SUBS + part % SUBS

    settled = tl.load(sure + at_part) != 0
    trials = 0
    while trials < 2:
        t = improved(
            t, settled, qs, k, k_box, batch, kv_head, listed, full, count, starts, lengths, scale, tables,
            D, PAD_D, BN, SQ, BOXES, AXES, POWER, PRECISION, LEAP,
        )  # fmt: skip
        acc, u_acc, p_sum, u_sum = value_sums(
            t, qs, k, k_box, v, v_box, batch, kv_head, listed, live.steps + begin, full, count, marks,
            starts, lengths, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SQ, SUBS, BOXES, AXES, POWER, PRECISION, mean is not None,
        )  # fmt: skip
        step = newton(p_sum, u_sum, POWER)
        t += step
        blind = p_sum == 0.0
        total = tl.where(blind, 1.0, p_sum - POWER * step * u_sum)
        acc = (acc - (POWER * step)[:, None] * u_acc) / total[:, None]
        write_span(o, o.x, acc, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV)
        if mean is not None:
            u_acc = u_acc / tl.where(blind, 1.0, u_sum)[:, None]
            write_span(o, mean, u_acc, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV)
        error = tl.max(tl.abs(step) * u_sum, 0)
        settled = error <= LEAP
        trials += tl.where(error > CLOSE, 1, 2)
    tl.store(tau, t)
