"""The forward kernel: one program a query tile and head, over the key tiles and the single keys that its lists name.

    o_i = sum_j 2^(z_ij - m_i) v_j / l_i,    lse_i = (m_i + log2 l_i) / log2 e

with z the logits in base 2, m their running maximum, l the running sum. Full tiles come first and are not masked, then
partial ones, masked by boxes, then gathered keys. Cost: 2 (D + Dv) operations a pair of a listed tile; keys and values
are read once a query tile, q and o once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.scores import (
    LOG2E,
    bounds,
    cell_at,
    cell_of,
    logits,
    masked,
    read,
    steps_of,
    tile_of,
    tokens_of,
)


@triton.jit
def absorb(
    acc, top, total, qs, k, v, k_box, v_box, batch, kv_head, num_kv_heads, heads, rows, first, keys, found, slots,
    starts, lengths, scores, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    BIAS_AXES: tl.constexpr, ANYWHERE: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The state (acc, top, total) of BM rows after BN more keys; FULL: every row sees every one of them."""
    if PX > 0:
        cell = cell_of(first, tables, PT, PY, PX, ANYWHERE)
    else:
        cell = None
    place = cell if PT * PY > 1 or ANYWHERE else None
    ks = read(k, k_box, batch, kv_head, num_kv_heads, first, place, found, tables.num_keys, BN, D, PAD_D, FULL)
    s = tl.dot(qs, ks.T, input_precision=PRECISION)
    # Scores that are scaled and nothing else are scaled inside the exponential: one operation less a pair.
    weighted: tl.constexpr = slots is not None and tables.token_log_weights is not None
    plain: tl.constexpr = scores.cap is None and scores.table is None and scores.slopes is None and not weighted
    if plain:
        scale = scores.scale
    else:
        s = logits(s, heads, rows, keys, slots, scores, tables, BIAS_AXES, 0)
        scale = 1.0
    if not FULL:
        s = masked(s, float("-inf"), starts, lengths, cell, keys, tables, BM, BN, PT, PY, PX, BOXES, AXES)
    new = tl.maximum(top, tl.max(s, 1) * scale)
    base = new if FULL else tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    vs = read(v, v_box, batch, kv_head, num_kv_heads, first, place, found, tables.num_keys, BN, DV, PAD_DV, FULL)
    acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit
def attend_forward(
    q, k, v, k_box, v_box, o, lse, scores, tables, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, BIAS_AXES: tl.constexpr,
    PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, ANYWHERE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v, o: Heads; k_box, v_box: descriptors of k and v, or None; lse: Rows; ratio: query heads a key head.

    BM rows a program: the BQ queries of a tile, or a part of them, of PACK heads that share a list. BN keys a step: a
    part of the BK of a tile, or several tiles. PT, PY, PX: the cell of the plan's grid that they are, zeros if it has
    none; k_box and v_box lie on that grid, unless it is a line. ANYWHERE: the lists are of such cells, by first keys.
    """
    PARTS: tl.constexpr = max(1, BQ * PACK // BM)
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # long lists are mostly the last: they start first
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

    starts, lengths = bounds(tables, union, rows, BOXES * AXES, PT * PY == 1 and not ANYWHERE)
    acc = tl.zeros([BM, PAD_DV], tl.float32)
    if scores.sink is None:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    else:  # one more logit, without a value: the state that the lists start from
        top = tl.load(scores.sink + heads).to(tl.float32) * LOG2E
        total = tl.full([BM], 1.0, tl.float32)

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
            acc, top, total = absorb(
                acc, top, total, qs, k, v, k_box, v_box, batch, kv_head, num_kv_heads, heads, rows, first, keys, found,
                None, starts, lengths, scores, tables, D, DV, PAD_D, PAD_DV, BM, BN, PT, PY, PX, BOXES, AXES, BIAS_AXES,
                ANYWHERE, PRECISION, partial == 0,
            )  # fmt: skip
    if tables.token_indptr is not None:
        start = tl.load(tables.token_indptr + entry)
        count = (tl.load(tables.token_indptr + entry + 1) - start).to(tl.int32)
        full = 0
        if tables.token_num_full is not None:
            full = tl.load(tables.token_num_full + entry) // BN
        for partial in tl.static_range(2):
            for step in tl.range(full if partial else 0, tl.cdiv(count, BN) if partial else full):
                keys, found, slots = tokens_of(start, count, step, tables, BN)
                acc, top, total = absorb(
                    acc, top, total, qs, k, v, None, None, batch, kv_head, num_kv_heads, heads, rows, 0, keys, found,
                    slots, starts, lengths, scores, tables, D, DV, PAD_D, PAD_DV, BM, BN, 0, 0, 0, BOXES, AXES,
                    BIAS_AXES, False, PRECISION, partial == 0,
                )  # fmt: skip

    blind = total == 0.0
    o_channel = tl.arange(0, PAD_DV)
    at = o.x + batch.to(tl.int64) * o.stride_b + heads.to(tl.int64) * o.stride_h + tokens * o.stride_n
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    inside = exists[:, None] & (o_channel < DV)[None, :]
    tl.store(at[:, None] + o_channel[None, :], acc.to(o.x.dtype.element_ty), mask=inside)
    at = lse.x + batch.to(tl.int64) * lse.stride_b + heads.to(tl.int64) * lse.stride_h + tokens
    tl.store(at, tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E), mask=exists)
