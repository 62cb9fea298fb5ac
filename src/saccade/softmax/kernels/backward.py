"""The backward kernels: dq by query tile over its lists, dk and dv by key tile over the transposed lists.

With p_ij = 2^(z_ij - lse_i), dp_ij = do_i . v_j and delta_i = do_i . o_i - dlse_i,

    ds_ij = p_ij (dp_ij - delta_i),    dv_j = sum_i p_ij do_i,
    dq_i = scale sum_j ds_ij k_j,      dk_j = scale sum_i ds_ij q_i

No program adds to what another one writes, so that equal inputs give equal bits. But single keys, which several query
tiles may list, and the entries of a relative table have their gradients added up atomically, in float32. Cost: the
pairs of the listed tiles are formed twice, 2 (4 D + 3 Dv) operations a pair in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.scores import (
    LOG2E,
    bounds,
    cell_at,
    cell_of,
    coordinates,
    logits,
    masked,
    read,
    seen,
    slope,
    steps_of,
    table_index,
    tile_of,
    tokens_of,
)


@triton.jit
def summarize_rows(o, do, lse, dlse, summary, tables, DV: tl.constexpr, PAD_DV: tl.constexpr, BM: tl.constexpr):
    """What gradients need of a row, in the plan's order: summary (B, H, rows, 2) float32 = (lse in base 2, delta).

    A row that sees nothing, or does not exist, has an infinite lse: whatever its scores, it weighs nothing.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    exists = rows < tables.num_queries
    if tables.q_order is None:
        tokens = rows
    else:
        tokens = tl.load(tables.q_order + rows, mask=exists, other=tables.num_queries)
    a = read(o, None, batch, head, 0, 0, None, tokens, tables.num_queries, BM, DV, PAD_DV, False).to(tl.float32)
    b = read(do, None, batch, head, 0, 0, None, tokens, tables.num_queries, BM, DV, PAD_DV, False).to(tl.float32)
    delta = tl.sum(a * b, 1)
    if dlse is not None:
        delta -= tl.load(dlse.x + batch * dlse.stride_b + head * dlse.stride_h + tokens, mask=exists, other=0.0)
    found = tl.load(lse.x + batch * lse.stride_b + head * lse.stride_h + tokens, mask=exists, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * LOG2E)
    at = summary.x + batch * summary.stride_b + head * summary.stride_h + rows * 2
    tl.store(at, found)
    tl.store(at + 1, delta)


@triton.jit
def summaries(summary, batch, head, rows):
    """(lse in base 2, delta) of rows, read together."""
    at = batch.to(tl.int64) * summary.stride_b + head.to(tl.int64) * summary.stride_h
    both = tl.load((summary.x + at).to(tl.pointer_type(tl.int64)) + rows)
    lse = both.to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def of_queries(
    dq, qs, dos, k, v, k_box, v_box, dk, dv, batch, kv_head, num_kv_heads, heads, rows, first, keys, found, slots, lse,
    delta, starts, lengths, scores, dtable, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    BIAS_AXES: tl.constexpr, ANYWHERE: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """dq of BM rows after BN more keys. SCATTER: these keys' dk and dv are added to those of others."""
    if PX > 0:
        cell = cell_of(first, tables, PT, PY, PX, ANYWHERE)
    else:
        cell = None
    place = cell if PT * PY > 1 or ANYWHERE else None
    ks = read(k, k_box, batch, kv_head, num_kv_heads, first, place, found, tables.num_keys, BN, D, PAD_D, FULL)
    vs = read(v, v_box, batch, kv_head, num_kv_heads, first, place, found, tables.num_keys, BN, DV, PAD_DV, FULL)
    s = tl.dot(qs, ks.T, input_precision=PRECISION)
    dp = tl.dot(dos, vs.T, input_precision=PRECISION)
    p = tl.exp2(logits(s, heads, rows, keys, slots, scores, tables, BIAS_AXES, 0) - lse[:, None])
    if not FULL:
        p = masked(p, 0.0, starts, lengths, cell, keys, tables, BM, BN, PT, PY, PX, BOXES, AXES)
    dz = p * (dp - delta[:, None])
    ds = dz * slope(s, scores)
    dq = tl.dot(ds.to(ks.dtype), ks, dq, input_precision=PRECISION)
    if dtable is not None:
        index = table_index(scores.table, rows, keys, tables, BIAS_AXES, 0)
        exists = (rows < tables.num_queries)[:, None] & (keys < tables.num_keys)[None, :]
        tl.atomic_add(dtable + (heads * scores.table.size)[:, None] + index, dz, mask=exists, sem="relaxed")
    if SCATTER:
        exists = found < tables.num_keys
        channel = tl.arange(0, PAD_D)
        to = dk.x + batch.to(tl.int64) * dk.stride_b + kv_head.to(tl.int64) * dk.stride_h
        to = to + found.to(tl.int64)[:, None] * dk.stride_n + channel[None, :]
        part = tl.dot(ds.T.to(qs.dtype), qs, input_precision=PRECISION) * (scores.scale / LOG2E)
        tl.atomic_add(to, part, mask=exists[:, None] & (channel < D)[None, :], sem="relaxed")
        channel = tl.arange(0, PAD_DV)
        to = dv.x + batch.to(tl.int64) * dv.stride_b + kv_head.to(tl.int64) * dv.stride_h
        to = to + found.to(tl.int64)[:, None] * dv.stride_n + channel[None, :]
        part = tl.dot(p.T.to(dos.dtype), dos, input_precision=PRECISION)
        tl.atomic_add(to, part, mask=exists[:, None] & (channel < DV)[None, :], sem="relaxed")
    return dq


@triton.jit
def attend_backward_queries(
    q, k, v, k_box, v_box, do, dq, dk, dv, summary, scores, dtable, tables, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, BIAS_AXES: tl.constexpr,
    PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, ANYWHERE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, laid out as in `attend_forward`; dk, dv: float32, for single keys; dtable: (H, size) float32 or None."""
    PARTS: tl.constexpr = max(1, BQ * PACK // BM)
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    row_tile = part // PARTS
    packs = ratio // PACK
    kv_head = tl.program_id(1) // packs
    num_kv_heads = tl.num_programs(1) // packs
    first_head = kv_head * ratio + tl.program_id(1) % packs * PACK
    batch = tl.program_id(2)
    group = tl.load(tables.group_of + batch * tables.group_stride + first_head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    entry = group * tables.num_rows + row_tile

    r = part % PARTS * BM + tl.arange(0, BM)
    rows = row_tile * BQ + r % BQ
    heads = first_head + tl.minimum(r // BQ, PACK - 1)
    exists = (rows < tables.num_queries) & (r < BQ * PACK)
    if tables.q_order is None:
        tokens = rows.to(tl.int64)
    else:
        tokens = tl.load(tables.q_order + rows, mask=exists, other=0)
    channel = tl.arange(0, PAD_D)
    at = q.x + batch.to(tl.int64) * q.stride_b + heads.to(tl.int64) * q.stride_h + tokens * q.stride_n
    qs = tl.load(at[:, None] + channel[None, :], mask=exists[:, None] & (channel < D)[None, :], other=0.0)
    o_channel = tl.arange(0, PAD_DV)
    at = do.x + batch.to(tl.int64) * do.stride_b + heads.to(tl.int64) * do.stride_h + tokens * do.stride_n
    dos = tl.load(at[:, None] + o_channel[None, :], mask=exists[:, None] & (o_channel < DV)[None, :], other=0.0)
    lse, delta = summaries(summary, batch, heads, rows)
    lse = tl.where(exists, lse, float("inf"))  # rows that only fill up the program weigh nothing

    starts, lengths = bounds(tables, union, rows, BOXES * AXES, PT * PY == 1 and not ANYWHERE)
    found_dq = tl.zeros([BM, PAD_D], tl.float32)
    start, count, steps, full = steps_of(tables, entry, BK, BN)
    listed = tables.indices + start
    for partial in tl.static_range(2):  # full tiles first, which need no mask
        for step in tl.range(full if partial else 0, steps if partial else full):
            if ANYWHERE:
                first, keys = cell_at(listed, step, tables, PT, PY, PX)
                found = keys
            else:
                first, keys, found = tile_of(
                    listed, count, step, tables.k_order, tables.num_keys, BK, BN, partial == 0
                )  # fmt: skip
            found_dq = of_queries(
                found_dq, qs, dos, k, v, k_box, v_box, None, None, batch, kv_head, num_kv_heads, heads, rows, first,
                keys, found, None, lse, delta, starts, lengths, scores, dtable, tables, D, DV, PAD_D, PAD_DV, BM, BN,
                PT, PY, PX, BOXES, AXES, BIAS_AXES, ANYWHERE, PRECISION, partial == 0, False,
            )  # fmt: skip
    if tables.token_indptr is not None:
        start = tl.load(tables.token_indptr + entry)
        count = (tl.load(tables.token_indptr + entry + 1) - start).to(tl.int32)
        for step in tl.range(0, tl.cdiv(count, BN)):
            keys, found, slots = tokens_of(start, count, step, tables, BN)
            found_dq = of_queries(
                found_dq, qs, dos, k, v, None, None, dk, dv, batch, kv_head, num_kv_heads, heads, rows, 0, keys, found,
                slots, lse, delta, starts, lengths, scores, dtable, tables, D, DV, PAD_D, PAD_DV, BM, BN, 0, 0, 0,
                BOXES, AXES, BIAS_AXES, False, PRECISION, False, True,
            )  # fmt: skip
    at = dq.x + batch.to(tl.int64) * dq.stride_b + heads.to(tl.int64) * dq.stride_h + tokens * dq.stride_n
    found_dq *= scores.scale / LOG2E
    inside = exists[:, None] & (channel < D)[None, :]
    tl.store(at[:, None] + channel[None, :], found_dq.to(dq.x.dtype.element_ty), mask=inside)


@triton.jit
def of_keys(
    found_dk, found_dv, ks, vs, q, do, q_box, do_box, batch, head, first, rows, keys, summary, at, union, scores,
    tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BM: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, BIAS_AXES: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys after BM more queries of a head."""
    qs = read(q, q_box, batch, head, 0, first, None, rows, tables.num_queries, BM, D, PAD_D, False)
    dos = read(do, do_box, batch, head, 0, first, None, rows, tables.num_queries, BM, DV, PAD_DV, False)
    lse, delta = summaries(summary, batch, head, rows)
    s = tl.dot(ks, qs.T, input_precision=PRECISION)
    dp = tl.dot(vs, dos.T, input_precision=PRECISION)
    p = tl.exp2(logits(s, head + rows * 0, rows, keys, None, scores, tables, BIAS_AXES, 1) - lse[None, :])
    if not FULL:
        starts, lengths = bounds(tables, union, rows, BOXES * AXES, False)
        p = tl.where(seen(starts, lengths, at, keys, tables.num_keys, BOXES, AXES, 1), p, 0.0)
    ds = p * (dp - delta[None, :]) * slope(s, scores)
    found_dv = tl.dot(p.to(dos.dtype), dos, found_dv, input_precision=PRECISION)
    found_dk = tl.dot(ds.to(qs.dtype), qs, found_dk, input_precision=PRECISION)
    return found_dk, found_dv


@triton.jit
def attend_backward_keys(
    q, k, v, q_box, do_box, do, dk, dv, summary, scores, tables, turned, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, BIAS_AXES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv: Heads; turned: ByKey. q, do: in the plan's order; q_box, do_box: descriptors or None.

    BN of the BK keys of a tile a program, BM of the BQ queries a step, all query heads of the key head one after
    another. ADD: on top of what dk and dv hold.
    """
    PARTS: tl.constexpr = max(1, BK // BN)
    part = tl.program_id(0)  # the first keys have mostly the longest lists
    col_tile = part // PARTS
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    first_key = col_tile * BK + part % PARTS * BN
    keys = first_key + tl.arange(0, BN)
    exists = (keys < tables.num_keys) & (tl.arange(0, BN) < BK)
    if turned.k_order is None:
        tokens = keys
    else:
        tokens = tl.load(turned.k_order + keys, mask=exists, other=tables.num_keys)
    ks = read(k, None, batch, kv_head, 0, 0, None, tokens, tables.num_keys, BN, D, PAD_D, False)
    vs = read(v, None, batch, kv_head, 0, 0, None, tokens, tables.num_keys, BN, DV, PAD_DV, False)
    at = coordinates(turned.coord, keys, tables.num_keys, AXES)
    found_dk = tl.zeros([BN, PAD_D], tl.float32)
    found_dv = tl.zeros([BN, PAD_DV], tl.float32)
    for member in tl.range(0, ratio):
        head = kv_head * ratio + member
        group = tl.load(tables.group_of + batch * tables.group_stride + head)
        union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
        entry = group * turned.num_lists + col_tile
        start, count, steps, full = steps_of(turned, entry, BQ, BM)
        listed = turned.indices + start
        for partial in tl.static_range(2):
            for step in tl.range(full if partial else 0, steps if partial else full):
                first, rows, _ = tile_of(listed, count, step, None, tables.num_queries, BQ, BM, False)
                found_dk, found_dv = of_keys(
                    found_dk, found_dv, ks, vs, q, do, q_box, do_box, batch, head, first, rows, keys, summary, at,
                    union, scores, tables, D, DV, PAD_D, PAD_DV, BM, BOXES, AXES, BIAS_AXES, PRECISION, partial == 0,
                )  # fmt: skip
    found_dk *= scores.scale / LOG2E
    channel = tl.arange(0, PAD_D)
    to = dk.x + batch.to(tl.int64) * dk.stride_b + kv_head.to(tl.int64) * dk.stride_h
    to = to + tokens.to(tl.int64)[:, None] * dk.stride_n + channel[None, :]
    inside = exists[:, None] & (channel < D)[None, :]
    if ADD:
        found_dk += tl.load(to, mask=inside, other=0.0)
    tl.store(to, found_dk.to(dk.x.dtype.element_ty), mask=inside)
    channel = tl.arange(0, PAD_DV)
    to = dv.x + batch.to(tl.int64) * dv.stride_b + kv_head.to(tl.int64) * dv.stride_h
    to = to + tokens.to(tl.int64)[:, None] * dv.stride_n + channel[None, :]
    inside = exists[:, None] & (channel < DV)[None, :]
    if ADD:
        found_dv += tl.load(to, mask=inside, other=0.0)
    tl.store(to, found_dv.to(dv.x.dtype.element_ty), mask=inside)
