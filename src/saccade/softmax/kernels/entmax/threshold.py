"""Finding tau: a lower bound from the largest scores of every row, and Newton's steps from there.

With d_j = max(0, z_j - t), p_j = d_j^P and u_j = d_j^(P - 1), the tangent at t of the P-norm of d meets 1 at

    t + (norm - 1) sum p / (norm sum u),    norm = (sum p)^(1 / P)

The norm is convex and falls in t: from t <= tau on this is no worse than t, and not above tau. Over some of the keys
the same steps lead to these keys' tau, which is not above tau either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.entmax.tiles import products, read_span, weights
from saccade.softmax.kernels.scores import bounds, steps_of


@triton.jit
def newton(p_sum, u_sum, POWER: tl.constexpr):
    """How far below the root of (sum p)^(1 / POWER) = 1 a row's t is, by the tangent; 0 where no score is above t."""
    none = p_sum == 0.0
    p_sum = tl.where(none, 1.0, p_sum)
    if POWER == 2.0:
        norm = tl.sqrt(p_sum)
    elif POWER == 1.0:
        norm = p_sum
    else:
        norm = tl.exp2(tl.log2(p_sum) / POWER)
    return (norm - 1.0) * p_sum / (norm * tl.where(none, 1.0, u_sum))


@triton.jit
def insert(slots, s, SQ: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr):
    """Slots after a tile of scores (SQ, BN), and the scores that lead it.

    Slots: of each column the DEPTH largest, in order. FOLD: columns j and j + BN / 2 share them for the larger of their
    scores; the smaller one, which is rarely above tau too, has one slot of its own.
    """
    if FOLD:
        a, b = s.reshape([SQ, 2, BN // 2]).permute([0, 2, 1]).split()
        s = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    x = s
    found = ()
    for at in tl.static_range(DEPTH):
        found = found + (tl.maximum(slots[at], x, propagate_nan=tl.PropagateNan.ALL),)
        x = tl.minimum(slots[at], x)
    if FOLD:
        found = found + (tl.maximum(slots[DEPTH], tl.minimum(a, b)),)
    return found, s


@triton.jit
def raised(t, slots, scale, ROUNDS: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr):
    """A better lower bound of tau: from the keys in COUNT slots alone, by ROUNDS steps. -inf where there are none."""
    top = tl.max(slots[0], 1) * scale
    none = top == float("-inf")
    t = tl.where(none, 0.0, tl.maximum(t, top - 1.0))
    for _ in range(ROUNDS):
        p_sum = tl.zeros_like(t)
        u_sum = tl.zeros_like(t)
        for at in tl.static_range(COUNT):
            p, u = weights(slots[at], scale, t, POWER, 0)
            p_sum += tl.sum(p, 1)
            u_sum += tl.sum(u, 1)
        t += newton(p_sum, u_sum, POWER)
    return tl.where(none, float("-inf"), t)


@triton.jit
def sweep(
    slots, t, qs, k, k_box, batch, kv_head, listed, begin, end, last, marks, starts, lengths, scale, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    SUBS: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The slots after steps begin .. end - 1 of a list, from its `last` step backwards; tiles above t are marked."""
    STEPS: tl.constexpr = BK // BN
    for at in tl.range(begin, end):
        step = last - at
        first = tl.load(listed + step // STEPS) * BK + step % STEPS * BN
        s, _ = products(
            qs, k, k_box, batch, kv_head, first, starts, lengths, tables,
            D, PAD_D, BN, BOXES, AXES, PRECISION, FULL,
        )  # fmt: skip
        slots, s = insert(slots, s, SQ, BN, DEPTH, FOLD)
        above = tl.where(tl.max(s, 1) * scale <= t, 0, 1)
        tl.store(marks + step * SUBS, tl.max(above, 0).to(tl.int8))
    return slots


@triton.jit
def bracket(
    q, k, k_box, tau, sure, marks, tables, base, scale, ratio,
    D: tl.constexpr, PAD_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr,
    SPARE: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A lower bound of tau (B, H, places), whether it is good enough (B, H, parts of SQ rows), and the marked tiles.

    SPARE: how many slots of a row may be full to the last for that. scale: of q k to z.
    """
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    WIDTH: tl.constexpr = BN // 2 if FOLD else BN
    COUNT: tl.constexpr = DEPTH + 1 if FOLD else DEPTH
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # long lists are mostly the last: they start first
    row_tile = part // SUBS
    head = tl.program_id(1)
    kv_head = head // ratio
    batch = tl.program_id(2)
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    entry = group * tables.num_rows + row_tile
    head_of_all = batch * tl.num_programs(1) + head
    place = part * SQ + tl.arange(0, SQ)
    exists = place < tables.num_queries
    qs = read_span(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    starts, lengths = bounds(tables, union, place, BOXES * AXES, False)

    start, _, count, full = steps_of(tables, entry, BK, BN)
    marks += (tl.load(base + head_of_all) + start - tl.load(tables.indptr + group * tables.num_rows)) * (STEPS * SUBS)
    marks += part % SUBS
    listed = tables.indices + start
    slots = ()
    for _ in tl.static_range(COUNT):
        slots = slots + (tl.full([SQ, WIDTH], float("-inf"), tl.float32),)
    t = tl.full([SQ], float("-inf"), tl.float32)
    # Partial tiles first: they hold the nearest keys. Each leg is as long as all before it, and raises the bound.
    done = 0
    for FULL in tl.static_range(2):
        end = count if FULL else count - full
        while done < end:
            upto = tl.minimum(tl.maximum(2 * done, 2), end)
            slots = sweep(
                slots, t, qs, k, k_box, batch, kv_head, listed, done, upto, count - 1, marks,
                starts, lengths, scale, tables,
                D, PAD_D, BK, BN, SQ, SUBS, BOXES, AXES, DEPTH, FOLD, PRECISION, FULL,
            )  # fmt: skip
            t = tl.where(exists, raised(t, slots, scale, 1, COUNT, POWER), float("inf"))
            done = upto
    t = raised(t, slots, scale, 6, COUNT, POWER)
    t = tl.where(exists & (t != float("-inf")), t, float("inf"))  # a row that sees nothing: nothing is above it
    at_part = head_of_all * tl.num_programs(0) + part
    tl.store(tau + head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place, t)
    spilled = tl.zeros([SQ], tl.int32)
    for at in tl.static_range(DEPTH - 1, COUNT):
        spilled += tl.sum((slots[at] * scale > t[:, None]).to(tl.int32), 1)
    tl.store(sure + at_part, (tl.max(spilled, 0) <= SPARE).to(tl.int32))


@triton.jit
def power_sums(
    t, qs, k, k_box, batch, kv_head, listed, full, count, starts, lengths, scale, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of p and u of the rows at t over a list of `count` tiles, the first `full` of them full."""
    p_sum = tl.zeros([SQ], tl.float32)
    u_sum = tl.zeros([SQ], tl.float32)
    for PARTIAL in tl.static_range(2):
        for at in tl.range(full if PARTIAL else 0, count if PARTIAL else full):
            s, _ = products(
                qs, k, k_box, batch, kv_head, tl.load(listed + at) * BN, starts, lengths, tables,
                D, PAD_D, BN, BOXES, AXES, PRECISION, not PARTIAL,
            )  # fmt: skip
            p, u = weights(s, scale, t, POWER, 0)
            p_sum += tl.sum(p, 1)
            u_sum += tl.sum(u, 1)
    return p_sum, u_sum


@triton.jit
def improved(
    t, settled, qs, k, k_box, batch, kv_head, listed, full, count, starts, lengths, scale, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    POWER: tl.constexpr, PRECISION: tl.constexpr, LEAP: tl.constexpr,
):  # fmt: skip
    """t, unless it is settled, after at most 50 steps over a list: until u_sum times its error is below LEAP."""
    rounds = 0
    while not settled:
        p_sum, u_sum = power_sums(
            t, qs, k, k_box, batch, kv_head, listed, full, count, starts, lengths, scale, tables,
            D, PAD_D, BN, SQ, BOXES, AXES, POWER, PRECISION,
        )  # fmt: skip
        step = newton(p_sum, u_sum, POWER)
        t += step
        rounds += 1
        settled = (tl.max(tl.abs(step) * u_sum, 0) < LEAP) | (rounds == 50)
    return t
