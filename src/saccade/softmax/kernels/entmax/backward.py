"""The gradients: dq by part of a row tile, dk and dv by tile of keys, over the tiles in use.

With u = p^(2 - alpha), dp_ij = do_i . v_j, delta_i = do_i . (sum_j u_ij v_j / sum_j u_ij),

    ds_ij = u_ij (dp_ij - delta_i),    dv_j = sum_i p_ij do_i,
    dq_i = scale sum_j ds_ij k_j,      dk_j = scale sum_i ds_ij q_i

The forward pass leaves the mean of v at the tau before its last step. Unlike o it is not corrected for that step, and
what delta_i is off stands in every pair of the row, so that dq_i adds it up. But the sum of ds over a row is zero; what
is found instead says how far delta_i is off,

    shift_i = sum_j ds_ij / sum_j u_ij,    delta_i + shift_i,    dq_i - scale shift_i sum_j u_ij k_j
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.entmax.live import column_list, row_list
from saccade.softmax.kernels.entmax.tiles import admitted, products, read_span, weights, write_span
from saccade.softmax.kernels.scores import bounds


@triton.jit
def of_queries(
    t, deltas, qs, dos, k, k_box, v, v_box, batch, kv_head, listed, full, count, starts, lengths, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of SQ rows over a list of `count` tiles, the first `full` of them full, and the shift of their deltas."""
    dq = tl.zeros([SQ, PAD_D], tl.float32)
    uk = tl.zeros([SQ, PAD_D], tl.float32)
    ds_sum = tl.zeros([SQ], tl.float32)
    u_sum = tl.zeros([SQ], tl.float32)
    for PARTIAL in tl.static_range(2):
        for at in tl.range(full if PARTIAL else 0, count if PARTIAL else full):
            first = tl.load(listed + at) * BN
            vs = read_span(v, v_box, batch, kv_head, first, tables.num_keys, BN, DV, PAD_DV, not PARTIAL)
            dp = tl.dot(dos, vs.T, input_precision=PRECISION)
            s, ks = products(
                qs, k, k_box, batch, kv_head, first, starts, lengths, tables,
                D, PAD_D, BN, BOXES, AXES, PRECISION, not PARTIAL,
            )  # fmt: skip
            _, u = weights(s, scale, t, POWER, 0)
            ds = u * (dp - deltas[:, None])
            dq = tl.dot(ds.to(ks.dtype), ks, dq, input_precision=PRECISION)
            uk = tl.dot(u.to(ks.dtype), ks, uk, input_precision=PRECISION)
            ds_sum += tl.sum(ds, 1)
            u_sum += tl.sum(u, 1)
    shift = ds_sum / tl.where(u_sum == 0.0, 1.0, u_sum)
    return dq - shift[:, None] * uk, shift


@triton.jit
def queries(
    q, k, k_box, v, v_box, do, mean, dq, tau, delta, tables, live, base, scale, factor, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta (B, H, places) for the columns. factor: of q k to scores."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_of_all = batch * tl.num_programs(1) + head
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    place = part * SQ + tl.arange(0, SQ)
    qs = read_span(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    dos = read_span(do, None, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV, False)
    means = read_span(mean, None, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV, False)
    starts, lengths = bounds(tables, union, place, BOXES * AXES, False)
    at_place = head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place
    deltas = tl.sum(dos.to(tl.float32) * means.to(tl.float32), 1)
    t = tl.load(tau + at_place)

    begin, _ = row_list(tables, base, group, part // SUBS, head_of_all, part % SUBS, STEPS, SUBS)
    full = tl.load(live.num_full + head_of_all * tl.num_programs(0) + part)
    count = tl.load(live.num_all + head_of_all * tl.num_programs(0) + part)
    found, shift = of_queries(
        t, deltas, qs, dos, k, k_box, v, v_box, batch, head // ratio, live.tiles + begin, full, count,
        starts, lengths, scale, tables,
        D, DV, PAD_D, PAD_DV, BN, SQ, BOXES, AXES, POWER, PRECISION,
    )  # fmt: skip
    tl.store(delta + at_place, deltas + shift)
    write_span(dq, dq.x, found * factor, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D)


@triton.jit
def of_columns(
    dk, dv, ks, vs, q, q_box, do, do_box, batch, head, tau, delta, listed, full, count, first_key, union, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys after `count` more parts of one head's rows, the first `full` of them full."""
    for PARTIAL in tl.static_range(2):
        for at in tl.range(full if PARTIAL else 0, count if PARTIAL else full):
            first = tl.load(listed + at) * SQ
            places = first + tl.arange(0, SQ)
            qs = read_span(q, q_box, batch, head, first, tables.num_queries, SQ, D, PAD_D, False)
            dos = read_span(do, do_box, batch, head, first, tables.num_queries, SQ, DV, PAD_DV, False)
            t = tl.load(tau + places)
            deltas = tl.load(delta + places)
            s = tl.dot(ks, qs.T, input_precision=PRECISION)
            dp = tl.dot(vs, dos.T, input_precision=PRECISION)
            if PARTIAL:
                starts, lengths = bounds(tables, union, places, BOXES * AXES, False)
                s = admitted(s, starts, lengths, first_key, tables, BN, BOXES, AXES, 1)
            p, u = weights(s, scale, t, POWER, 1)
            dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision=PRECISION)
            ds = u * (dp - deltas[None, :])
            dk = tl.dot(ds.to(qs.dtype), qs, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def columns(
    q, q_box, k, v, do, do_box, dk, dv, tau, delta, tables, turned, live, base, scale, factor, ratio, num_places,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, all query heads of the key head one after another. factor: of q k to scores."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    column = tl.program_id(0)  # the first keys have mostly the longest lists
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    ks = read_span(k, None, batch, kv_head, column * BN, tables.num_keys, BN, D, PAD_D, False)
    vs = read_span(v, None, batch, kv_head, column * BN, tables.num_keys, BN, DV, PAD_DV, False)
    found_dk = tl.zeros([BN, PAD_D], tl.float32)
    found_dv = tl.zeros([BN, PAD_DV], tl.float32)
    for member in tl.range(0, ratio):
        head = kv_head * ratio + member
        head_of_all = batch * (tl.num_programs(1) * ratio) + head
        group = tl.load(tables.group_of + batch * tables.group_stride + head)
        union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
        entry = group * turned.num_lists + column // STEPS
        begin = column_list(turned, tl.load(base + head_of_all), group, entry, column % STEPS, STEPS, SUBS)
        full = tl.load(live.num_full + head_of_all * tl.num_programs(0) + column)
        count = tl.load(live.num_all + head_of_all * tl.num_programs(0) + column)
        of_head = head_of_all.to(tl.int64) * num_places
        found_dk, found_dv = of_columns(
            found_dk, found_dv, ks, vs, q, q_box, do, do_box, batch, head, tau + of_head, delta + of_head,
            live.parts + begin, full, count, column * BN, union, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SQ, BOXES, AXES, POWER, PRECISION,
        )  # fmt: skip
    write_span(dk, dk.x, found_dk * factor, batch, kv_head, column * BN, tables.num_keys, BN, D, PAD_D)
    write_span(dv, dv.x, found_dv, batch, kv_head, column * BN, tables.num_keys, BN, DV, PAD_DV)
