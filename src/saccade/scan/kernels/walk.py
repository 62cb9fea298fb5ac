"""One kernel for the recurrence and for its gradients: a walk from chunk to chunk with the state in registers.

    o_i = scale sum_j (a_i . b_j decayed) y_j        over j <= i, or over j >= i backwards

    o:  a, b, y = q, k, v       dq: do, v, k       backwards, dk: v, do, q       dv: k, q, do

A decay a channel of keys weighs what o and dv sum over (GATE 2), and the channels of dq and dk themselves (GATE 3). A
chunk reads the state that earlier ones left, then its own pairs, and adds its own products to the state: every token
is read once, and no state is written but where a gradient or another stretch of the sequence begins.

Triton 3.4 to 3.7 is known to go wrong, without a word, where a factor computed in registers is transposed inside the
loop of a gated kernel. Here b comes from memory transposed, and nothing else ever is. tests/scan/test_kernels.py
compares every gradient, on a GPU too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.abreast import alike
from saccade.scan.kernels.tiles import (
    any_harmful,
    any_steep,
    apart,
    between,
    between_sums,
    finite,
    place,
    prefix,
    read,
    read_across,
    read_row,
    stretch_of,
    suffix,
    summed,
    summed_across,
    towards_middle,
    write,
)


@triton.jit
def met(
    a, b, state, total, below, a_more, b_more, MASS: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a (C, BK) reads of a state (C, BV), its scores with b (C, C), and what it reads of the column (C,)."""
    acc = tl.dot(a, state.to(KIND), input_precision=PRECISION)
    scores = tl.dot(a, b, input_precision=PRECISION)
    found = tl.zeros([a.shape[0]], tl.float32)
    if MASS:
        found = tl.sum(a.to(tl.float32) * total[None, :], 1)
    if ROW:
        acc += a_more[:, None] * below[None, :]
        scores += a_more[:, None] * b_more[None, :]
    return acc, scores, found


@triton.jit
def add_pairs(acc, scores, y, BK: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """acc (C, BV) plus what scores (C, C) read of y (C, BV).

    Of a product that another one continues each four warps compute the whole. So programs of wide states, which have
    eight, keep the two apart: as a difference, since of a sum the compiler makes one product that continues the other.
    """
    if BK > 128:
        return acc - tl.dot((-scores).to(KIND), y, input_precision=PRECISION)
    else:
        return tl.dot(scores.to(KIND), y, acc, input_precision=PRECISION)


@triton.jit
def at_once(
    a, b, y, state, total, below, left, bounds, slot, head, column, a_more, b_more, scale, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, READ: tl.constexpr,
    MASS: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk under a decay a channel that is in its tokens already.

    a (C, BK), b (BK, C), y (C, BV), state (BK, BV), its column `total` (BK,) and row `below` (BV,); left (BK,): what is
    kept of the state before the first chunk. Returns what a reads (C, BV), the scores (C, C), what a reads of the
    column (C,), and state, total, below and left after the chunk.
    """
    rows = tl.arange(0, C)
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    found = tl.zeros([C], tl.float32)
    enter, leave = around_middle(bounds, slot, head, tl.arange(0, BK) if GATE == 2 else column, REVERSE)
    state *= enter[:, None] if GATE == 2 else enter[None, :]
    if MASS:
        total *= enter
    if ROW:
        below *= enter
    if READ:
        acc, scores, found = met(a, b, state, total, below, a_more, b_more, MASS, ROW, KIND, PRECISION)
        order = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
        scores = tl.where(order, scores, 0.0)
        acc = add_pairs(acc, scores, y, BK, KIND, PRECISION)
    if MASS:
        total += tl.sum(b.to(tl.float32) * b_more[None, :], 1) * (scale if REVERSE else 1.0)
        total *= leave
    if ROW:
        below = (below + tl.sum(y.to(tl.float32) * b_more[:, None], 0)) * leave
    if GATE == 2:
        left *= enter * leave
    state = tl.dot(b, y, state, input_precision=PRECISION)
    state *= leave[:, None] if GATE == 2 else leave[None, :]
    return acc, scores, found, state, total, below, left


@triton.jit
def by_tokens(
    a, b, y, wide, state, total, below, left, due, g, strength, batch, head, start, end, a_more, b_more, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, READ: tl.constexpr, MASS: tl.constexpr,
    ROW: tl.constexpr, SPLIT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk under a decay a token: as `at_once`, from g, or its sums G unless SPLIT is "none". wide: y in float32.

    strength: factors of y, backwards of what is read; None for 1.

    What is left of a token at the middle m of the chunk goes into the state, and pairs share one product with it:

        y_j' = exp(G_m - G_j) y_j,     o_i = exp(G_i - G_m) (a_i . exp(G_m) state + sum over pairs of (a_i . b_j) y_j')

    backwards with exp(G_j - G_m) and exp(G_m - G_i). One factor grows, by what half a chunk decays by. Unless SPLIT is
    "made" that may be too much, and each pair has an exponential of its own; where nothing is read there are no pairs,
    and the end of the chunk, backwards its start, takes the place of the middle. due: what the state, after the middle
    of a chunk, is still to be multiplied by, which is done in the next one.
    """
    STEEP: tl.constexpr = SPLIT != "made"
    MIDDLE: tl.constexpr = READ and not STEEP
    rows = tl.arange(0, C)
    inside = start + rows < end
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    found = tl.zeros([C], tl.float32)
    gates = read_row(g, batch, head, start, rows, inside)
    if SPLIT == "none":
        whole = tl.sum(gates, 0)
        follows = (rows + 1 < C) & (start + rows + 1 < end)
        from_start = prefix(gates)
        to_end = suffix(read_row(g, batch, head, start + 1, rows, follows))
    else:
        whole = tl.load(place(g, batch, head, tl.minimum(start + C, end) - 1))
        from_start = tl.exp(gates)
        to_end = tl.exp(whole - gates)
    lost = tl.exp(whole)
    rest = from_start if REVERSE else to_end
    if MIDDLE:
        middle = tl.load(place(g, batch, head, tl.minimum(start + C // 2, end) - 1))
        rest = tl.exp(gates - middle if REVERSE else middle - gates)
        enter = tl.exp(whole - middle if REVERSE else middle)
        leave = tl.exp(middle if REVERSE else whole - middle)
    if strength is not None:
        strengths = read_row(strength, batch, head, start, rows, inside)
        if not REVERSE:
            rest *= strengths
    wide *= rest[:, None]
    late = wide.to(KIND)
    if MIDDLE:
        state = state * due * enter  # one after the other: their product may be less than there is
        total = total * due * enter
        below = below * due * enter
        due = leave
    if READ:
        acc, scores, found = met(a, b, state, total, below, a_more, b_more, MASS, ROW, KIND, PRECISION)
        if STEEP:
            reads = to_end if REVERSE else from_start
        else:
            reads = tl.exp(middle - gates if REVERSE else gates - middle)
        if strength is not None and REVERSE:
            reads *= strengths
        if STEEP:
            scores *= between(gates, rows, REVERSE) if SPLIT == "none" else between_sums(gates, rows, REVERSE)
            if strength is not None:
                scores *= strengths[:, None] if REVERSE else strengths[None, :]
            acc = add_pairs(acc * reads[:, None], scores, y, BK, KIND, PRECISION)
        else:
            order = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            scores = tl.where(order, scores, 0.0)
            acc = add_pairs(acc, scores, late, BK, KIND, PRECISION) * reads[:, None]
            if MASS:  # of pairs that are not, both factors may grow, to more than there is
                scores = tl.where(order, scores * reads[:, None] * rest[None, :], 0.0)
        found *= reads
    if not MIDDLE:
        state *= lost
        total *= lost
        below *= lost
    left *= lost
    if MASS:
        total += tl.sum(b.to(tl.float32) * (b_more * rest)[None, :], 1) * (scale if REVERSE else 1.0)
    if ROW:
        below += tl.sum(wide * b_more[:, None], 0)
    state = tl.dot(b, late, state, input_precision=PRECISION)
    return acc, scores, found, state, total, below, left, due


@triton.jit
def around_middle(bounds, slot, head, channel, REVERSE: tl.constexpr):
    """What a chunk leaves of a state from its start to its middle and from there to its end; backwards turned round."""
    at = bounds.decay + (slot.to(tl.int64) * bounds.heads + head // bounds.share) * (2 * bounds.channels) + channel
    early = tl.load(at, mask=channel < bounds.channels, other=1.0)
    late = tl.load(at + bounds.channels, mask=channel < bounds.channels, other=1.0)
    if REVERSE:
        return late, early
    else:
        return early, late


@triton.jit
def by_levels(
    a, b, y, state, total, below, left, g, batch, head, start, inside, column, a_more, b_more, scale, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    READ: tl.constexpr, MASS: tl.constexpr, ROW: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk under a decay a channel, however strong: as `at_once`, from g in place of bounds."""
    rows = tl.arange(0, C)
    row = tl.arange(0, BK)
    i = rows[:, None]
    j = rows[None, :]
    order = i <= j if REVERSE else i >= j
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    found = tl.zeros([C], tl.float32)
    if GATE == 2:
        across = finite(read_across(g, batch, head, start, rows, inside, row, K).to(tl.float32))
        if READ:
            gates = finite(read(g, batch, head, start, rows, inside, row, K).to(tl.float32))
            wide = a.to(tl.float32)
            for level in range(LEVELS):
                h = 1 << level
                away = tl.exp(summed(towards_middle(i, j, h), gates, KIND, PRECISION))
                back = tl.exp(summed_across(across, towards_middle(j, i, h), KIND, PRECISION))
                met = tl.dot((wide * away).to(KIND), (b.to(tl.float32) * back).to(KIND), input_precision=PRECISION)
                scores += tl.where(order & apart(rows, h), met, 0.0)
            scores += tl.where(i == j, tl.dot(a, b, input_precision=PRECISION), 0.0)
            reads = (wide * tl.exp(summed(i < j if REVERSE else i >= j, gates, KIND, PRECISION))).to(KIND)
            acc = tl.dot(reads, state.to(KIND), input_precision=PRECISION)
            if MASS:
                found = tl.sum(reads.to(tl.float32) * total[None, :], 1)
            acc = tl.dot(scores.to(KIND), y, acc, input_precision=PRECISION)
        keys = b.to(tl.float32) * tl.exp(summed_across(across, i <= j if REVERSE else i > j, KIND, PRECISION))
        lost = tl.exp(tl.sum(across, 1))
        left *= lost
        if MASS:
            total = total * lost + tl.sum(keys * b_more[None, :], 1) * (scale if REVERSE else 1.0)
        state = tl.dot(keys.to(KIND), y, state * lost[:, None], input_precision=PRECISION)
    else:
        gates = finite(read(g, batch, head, start, rows, inside, column, V).to(tl.float32))
        wide = y.to(tl.float32)
        scores = tl.dot(a, b, input_precision=PRECISION)
        acc = tl.dot(a, state.to(KIND), input_precision=PRECISION)
        if ROW:
            acc += a_more[:, None] * below[None, :]
            scores += a_more[:, None] * b_more[None, :]
        acc *= tl.exp(summed(i < j if REVERSE else i >= j, gates, KIND, PRECISION))
        for level in range(LEVELS):
            h = 1 << level
            away = tl.exp(summed(towards_middle(i, j, h), gates, KIND, PRECISION))
            some = tl.where(order & apart(rows, h), scores, 0.0).to(KIND)
            acc += tl.dot(some, (wide * away).to(KIND), input_precision=PRECISION) * away
        acc += tl.sum(tl.where(i == j, scores, 0.0), 1)[:, None] * wide
        values = wide * tl.exp(summed(i >= j if REVERSE else i < j, gates, KIND, PRECISION))
        lost = tl.exp(tl.sum(gates, 0))
        if ROW:
            below = below * lost + tl.sum(values * b_more[:, None], 0)
        state = tl.dot(b, values.to(KIND), state * lost[None, :], input_precision=PRECISION)
    return acc, scores, found, state, total, below, left


@triton.jit
def through_chunk(
    a, b, y, raw_a, raw_b, raw_y, g, bounds, strength, a_row, b_row, o, mass, state, total, below, left, due, batch,
    head, start, end, slot, tile, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, READ: tl.constexpr, MASS: tl.constexpr, ROW: tl.constexpr,
    UNIT: tl.constexpr, SPLIT: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chunk number `slot`, from token `start` on, of `scan_walk`: o and mass are written, the rest is returned.

    A function of its own because Triton's frontend goes through the body of a loop twice, through that of a loop within
    one four times, and through a function once.
    """
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    rows = tl.arange(0, C)
    tokens = start + rows
    inside = tokens < end
    bs = read_across(b, batch, head, start, rows, inside, row, K).to(KIND)
    ys = read(y, batch, head, start, rows, inside, column, V).to(KIND)
    a_more = inside.to(tl.float32)
    b_more = a_more
    if a_row is not None:
        a_more = read_row(a_row, batch, head, start, rows, inside)
    if b_row is not None:
        b_more = read_row(b_row, batch, head, start, rows, inside)
    if READ:
        a_s = read(a, batch, head, start, rows, inside, row, K).to(KIND)
    else:
        a_s = tl.zeros([C, BK], KIND)
    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    found = tl.zeros([C], tl.float32)
    wide = ys.to(tl.float32)
    if REVERSE and not UNIT:
        wide *= scale
    written = ys if UNIT or not REVERSE else wide.to(KIND)

    if GATE == 0:
        if READ:
            acc, scores, found = met(a_s, bs, state, total, below, a_more, b_more, MASS, ROW, KIND, PRECISION)
            order = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            scores = tl.where(order, scores, 0.0)
            acc = add_pairs(acc, scores, written, BK, KIND, PRECISION)
        if MASS:
            total += tl.sum(bs.to(tl.float32) * b_more[None, :], 1) * (scale if REVERSE else 1.0)
        if ROW:
            below += tl.sum(wide * b_more[:, None], 0)
        state = tl.dot(bs, written, state, input_precision=PRECISION)

    if GATE == 1:
        acc, scores, found, state, total, below, left, due = by_tokens(
            a_s, bs, written, wide, state, total, below, left, due, g, strength, batch, head, start, end, a_more,
            b_more, scale, C, BK, BV, REVERSE, READ, MASS, ROW, SPLIT, KIND, PRECISION,
        )  # fmt: skip

    if GATE >= 2:
        if SPLIT == "made":
            acc, scores, found, state, total, below, left = at_once(
                a_s, bs, written, state, total, below, left, bounds, slot, head, column, a_more, b_more, scale, C, BK,
                BV, GATE, REVERSE, READ, MASS, ROW, KIND, PRECISION,
            )  # fmt: skip
        elif SPLIT == "none":
            acc, scores, found, state, total, below, left = by_levels(
                a_s, bs, written, state, total, below, left, g, batch, head, start, inside, column, a_more, b_more,
                scale, K, V, C, BK, BV, GATE, REVERSE, READ, MASS, ROW, LEVELS, KIND, PRECISION,
            )  # fmt: skip
        elif any_harmful(bounds, slot, slot + 1, head) == 0:
            acc, scores, found, state, total, below, left = at_once(
                a_s, bs, written, state, total, below, left, bounds, slot, head, column, a_more, b_more, scale, C, BK,
                BV, GATE, REVERSE, READ, MASS, ROW, KIND, PRECISION,
            )  # fmt: skip
        else:
            if GATE == 2:
                bs = read_across(raw_b, batch, head, start, rows, inside, row, K).to(KIND)
                if READ:
                    a_s = read(raw_a, batch, head, start, rows, inside, row, K).to(KIND)
            else:
                wide = read(raw_y, batch, head, start, rows, inside, column, V).to(tl.float32)
                written = (wide * (scale if REVERSE else 1.0)).to(KIND)
            acc, scores, found, state, total, below, left = by_levels(
                a_s, bs, written, state, total, below, left, g, batch, head, start, inside, column, a_more, b_more,
                scale, K, V, C, BK, BV, GATE, REVERSE, READ, MASS, ROW, LEVELS, KIND, PRECISION,
            )  # fmt: skip

    if READ:
        if not REVERSE and not UNIT:
            acc *= scale
        # The mask of ys would be carried along from its load, which is ahead. Under a decay a channel that
        # costs less than another.
        here = inside if GATE >= 2 else rows < end - start
        write(o, batch, head, start, rows, here, column, acc, V)
        if MASS:
            read_mass = (found + tl.sum(scores, 1)) * scale
            first_tile = tokens < tl.where(tile == 0, end, 0)
            tl.store(place(mass, batch, head, start) + rows, read_mass, mask=first_tile)
    return state, total, below, left, due


@alike("stretches", "ends")
def scan_walk(
    a, b, y, raw_a, raw_b, raw_y, g, bounds, strength, a_row, b_row, first, first_row, last, last_row, kept, o, mass,
    anchors, anchor_rows, past, cuts, scale, stretches, ends,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, READ: tl.constexpr, MASS: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr,
    EVERY: tl.constexpr, SPLIT: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of `stretches` of a sequence and BV channels of y a program, for one head.

    a (B, H, N, K), b alike, y and o (B, H, N, V), g (B, H, N) or (B, H, N, K or V), as `Heads`; first, last
    (sequences or stretches, H, K, V) as `States`: before the first chunk of the walk and after the last.
    READ: write o; otherwise only what the stretch adds (`last`) and keeps (`kept`).
    MASS: the state has a column for y = 1, or b_row (B, H, N): first_row, last_row (.., H, K); mass (B, H, N) is what a
    reads of it. ROW: a and b have one more channel, a_row and b_row, 1 where None; the state a row (.., H, V).
    strength (B, H, N), or None for 1: under GATE 1 factors of y, backwards of o.
    anchors (.., H, K, V), or None: a walk forward leaves its state in number (first chunk + chunk) // EVERY + sequence
    every EVERY chunks; one backwards, whose state is the gradient of that, finds those after the last chunk from number
    `ends` on, and leaves sums over K of state times gradient in `past` (.., H, V). UNIT: scale is 1.
    SPLIT: "made": `prepare` has put the decays between token and middle of the chunk into a and b, or into y, and left
    `bounds`; stretches with a chunk that bears no such factors are left to "mixed", which takes the pairs of such
    chunks by levels (see `tiles`) from raw_a, raw_b or raw_y; "none": all.
    Likewise for GATE 1, where g is the sums of g unless SPLIT is "none", and "mixed" as `by_tokens` says. They are two
    kernels because those compile and run side by side, and because no branch in a loop lets its loads be ahead.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    entry = tl.program_id(0) // TILES
    seq = entry // stretches
    stretch = entry % stretches
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    each = tl.cdiv(tl.cdiv(chunks, stretches), EVERY) * EVERY
    low = (stretches - 1 - stretch if REVERSE else stretch) * each
    high = tl.minimum(low + each, chunks)
    if not READ:  # what the last one adds is of no interest
        high = tl.where(stretch == stretches - 1, low, high)
    closes = stretch == stretches - 1
    limit = K
    width = V
    if SPLIT != "none" and (GATE >= 2 or (GATE == 1 and READ)):
        if GATE == 1:
            strong = any_steep(g, batch, head, begin, end, low, high, C)
        else:
            strong = any_harmful(bounds, first_chunk + low, first_chunk + high, head)
        mine = strong == (SPLIT == "mixed")
        high = tl.where(mine, high, low)
        if GATE >= 2 or SPLIT == "mixed":
            limit = tl.where(mine, K, 0)
            width = tl.where(mine, V, 0)
        else:  # what runs nearly always keeps masks that are known when it is compiled
            closes = closes & mine
    exists = (row < limit)[:, None] & (column < width)[None, :]
    exists_column = column < width
    once = row < tl.where(tile == 0, limit, 0)  # what is the same in every tile of columns is written by one

    state = tl.zeros([BK, BV], tl.float32)
    total = tl.zeros([BK], tl.float32)  # the column
    below = tl.zeros([BV], tl.float32)  # the row
    left = tl.full([BK], 1.0, tl.float32)
    at = (entry * heads + head).to(tl.int64)
    if first is not None:
        where_state = row[:, None] * first.stride_k + column[None, :] * first.stride_v
        state += tl.load(first.x + at * (K * V) + where_state, mask=exists, other=0.0)
        if MASS:
            total += tl.load(first_row + at * K + row, mask=row < K, other=0.0)
        if ROW:
            below += tl.load(first_row + at * V + column, mask=exists_column, other=0.0)

    due = 1.0
    GROUP: tl.constexpr = 1 << 30 if anchors is None else EVERY
    groups = tl.cdiv(high - low, GROUP)
    for group in range(groups):
        lowest = low + (groups - 1 - group if REVERSE else group) * GROUP
        highest = tl.minimum(lowest + GROUP, high)
        if anchors is not None:
            bound = highest if REVERSE else lowest
            slot = tl.where(bound == chunks, ends + seq, (first_chunk + bound) // EVERY + seq)
            slot = slot.to(tl.int64) * heads + head
            anchor = anchors + slot * (K * V) + (row[:, None] * V + column[None, :])
            if REVERSE:
                flows = tl.sum(state * tl.load(anchor, mask=exists, other=0.0), 0)
                if ROW:
                    flows += below * tl.load(anchor_rows + slot * V + column, mask=exists_column, other=0.0)
                tl.store(past + slot * V + column, flows, mask=exists_column)
            else:
                tl.store(anchor, state, mask=exists)
                if ROW:
                    tl.store(anchor_rows + slot * V + column, below, mask=exists_column)
        for step in range(highest - lowest):
            chunk = highest - 1 - step if REVERSE else lowest + step
            state, total, below, left, due = through_chunk(
                a, b, y, raw_a, raw_b, raw_y, g, bounds, strength, a_row, b_row, o, mass, state, total, below, left,
                due, batch, head, begin + chunk * C, end, first_chunk + chunk, tile, scale, K, V, C, BK, BV, GATE,
                REVERSE, READ, MASS, ROW, UNIT, SPLIT, LEVELS, KIND, PRECISION,
            )  # fmt: skip
        if GATE == 1 and SPLIT == "made" and READ:
            state *= due
            total *= due
            below *= due
            due = 1.0

    if last is not None:
        if (not READ) or closes:  # the first is known when this is compiled, the second not
            at = ((seq if READ else entry) * heads + head).to(tl.int64)
            where_state = row[:, None] * last.stride_k + column[None, :] * last.stride_v
            tl.store(last.x + at * (K * V) + where_state, state, mask=exists)
            if MASS:
                tl.store(last_row + at * K + row, total, mask=once)
            if ROW:
                tl.store(last_row + at * V + column, below, mask=exists_column)
            if not READ:
                tl.store(kept + at * K + row, left, mask=once)
