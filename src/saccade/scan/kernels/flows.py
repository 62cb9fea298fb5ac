"""The gradient of a gate: all that flows from before token t to t and later.

    dg_t = sum_(i >= t) (q_i dq_i - k_i dk_i) + what flows past the end,    and past a token: the sum of S times dS

Over a long sequence the difference would lose its digits. So the walks say what flows past every EVERY chunks, where
they have the state S and its gradient dS, and the sum is taken up to there alone.
"""

from __future__ import annotations

import triton.language as tl

from saccade.scan.kernels.abreast import alike
from saccade.scan.kernels.prepare import past_middle
from saccade.scan.kernels.tiles import any_harmful, place, read, read_row, stretch_of, write


@alike("length", "share")
def head_flows(
    q, k, dq, dk, strength, dq_all, dk_all, dstrength, flow, length, share,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q . dq - k . dk of each token and head, (B, H, N), and gradients added up over `share` heads that share a key.

    dq, dk (B, H, N, V): of each head. strength (B, H, N), or None: a factor that dk is still without, whose gradient
    is k . dk. dq_all, dk_all (B, Hkv, N, V), or None: where they need not be added up. ROWS tokens of a key head a
    program, and of its heads one after another, so that sums are in order.
    """
    blocks = tl.cdiv(length, ROWS)
    start = tl.program_id(0) % blocks * ROWS
    batch = tl.program_id(0) // blocks
    first = tl.program_id(1) * share
    rows = tl.arange(0, ROWS)
    inside = start + rows < length
    column = tl.arange(0, BV)
    keys = read(k, batch, first, start, rows, inside, column, V).to(tl.float32)
    if dq_all is not None:
        queries = read(q, batch, first, start, rows, inside, column, V).to(tl.float32)
    all_taken = tl.zeros([ROWS, BV], tl.float32)
    all_given = tl.zeros([ROWS, BV], tl.float32)
    next_taken = read(dq, batch, first, start, rows, inside, column, V)
    next_given = read(dk, batch, first, start, rows, inside, column, V)
    for head in range(first, first + share):
        taken = next_taken.to(tl.float32)
        given = next_given.to(tl.float32)
        # Stores would hold back loads that follow them.
        more = start + rows < tl.where(head + 1 < first + share, length, 0)
        next_taken = read(dq, batch, head + 1, start, rows, more, column, V)
        next_given = read(dk, batch, head + 1, start, rows, more, column, V)
        if dq_all is None:
            queries = read(q, batch, head, start, rows, inside, column, V).to(tl.float32)
        all_taken += taken
        passed = tl.sum(keys * given, 1)
        if strength is not None:
            tl.store(place(dstrength, batch, head, start) + rows, passed, mask=inside)
            strengths = read_row(strength, batch, head, start, rows, inside)
            passed *= strengths
            given *= strengths[:, None]
        all_given += given
        tl.store(place(flow, batch, head, start) + rows, tl.sum(queries * taken, 1) - passed, mask=inside)
    if dq_all is not None:
        write(dq_all, batch, first, start, rows, inside, column, all_taken, V)
    if dk_all is not None:
        write(dk_all, batch, first, start, rows, inside, column, all_given, V)


@alike("spans", "ends")
def token_flows(
    flow, past, dg, cuts, spans, ends,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """A gate a token: dg (B, H, N) from q . dq - k . dk, likewise.

    EVERY chunks of one sequence and head a program. past (.., H, V): see `scan_walk`.
    """
    seq = tl.program_id(0) // spans
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    low = tl.program_id(0) % spans * EVERY
    high = tl.minimum(low + EVERY, chunks)
    slot = tl.where(high == chunks, ends + seq, (first_chunk + high) // EVERY + seq).to(tl.int64) * heads + head
    column = tl.arange(0, BV)
    carry = tl.sum(tl.load(past + slot * V + column, mask=column < tl.where(low < high, V, 0), other=0.0), 0)
    rows = tl.arange(0, C)
    for step in range(high - low):
        start = begin + (high - 1 - step) * C
        inside = start + rows < end
        passed = read_row(flow, batch, head, start, rows, inside)
        tl.store(place(dg, batch, head, start) + rows, carry + tl.cumsum(passed, 0, reverse=True), mask=inside)
        carry += tl.sum(passed, 0)


@alike("spans", "ends")
def channel_flows(
    q, k, reads, keys, dreads, dkeys, g, bounds, past, dq, dk, dg, cuts, spans, ends,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, EVERY: tl.constexpr, MADE: tl.constexpr,
):  # fmt: skip
    """A gate a token and channel: from prepared tokens and their gradients to dq, dk and dg, all (B, H, N, V).

    EVERY chunks of one sequence and head and BV channels a program, and one warp, so that sums over tokens cross none.
    MADE: `prepare_tokens` has run; otherwise, and in harmful chunks, tokens are q and k themselves.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    entry = tl.program_id(0) // TILES
    column = tl.program_id(0) % TILES * BV + tl.arange(0, BV)
    seq = entry // spans
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    low = entry % spans * EVERY
    high = tl.minimum(low + EVERY, chunks)
    slot = tl.where(high == chunks, ends + seq, (first_chunk + high) // EVERY + seq).to(tl.int64) * heads + head
    carry = tl.load(past + slot * V + column, mask=column < tl.where(low < high, V, 0), other=0.0)
    rows = tl.arange(0, C)
    for step in range(high - low):
        chunk = high - 1 - step
        start = begin + chunk * C
        inside = start + rows < end
        taken = read(dreads, batch, head, start, rows, inside, column, V).to(tl.float32)
        given = read(dkeys, batch, head, start, rows, inside, column, V).to(tl.float32)
        harmful = 1
        if MADE:
            harmful = any_harmful(bounds, first_chunk + chunk, first_chunk + chunk + 1, head)
        if harmful == 0:
            passed = taken * read(reads, batch, head, start, rows, inside, column, V).to(tl.float32)
            passed -= given * read(keys, batch, head, start, rows, inside, column, V).to(tl.float32)
            gates = read(g, batch, head, start, rows, inside, column, V).to(tl.float32)
            away, _, _ = past_middle(gates, C)
            taken *= tl.exp(away)
            given *= tl.exp(-away)
        else:
            passed = taken * read(q, batch, head, start, rows, inside, column, V).to(tl.float32)
            passed -= given * read(k, batch, head, start, rows, inside, column, V).to(tl.float32)
        write(dg, batch, head, start, rows, inside, column, carry[None, :] + tl.cumsum(passed, 0, reverse=True), V)
        carry += tl.sum(passed, 0)
        write(dq, batch, head, start, rows, inside, column, taken, V)
        write(dk, batch, head, start, rows, inside, column, given, V)
