"""The delta rule in chunks: the values that are really written, the walk that finds them, and its adjoint.

Within a chunk, with s what is left of its start at each token, e of each token at its end, and d_ij of j at i,

    u = T diag(beta) (v - s k S),    T = (I + A)^-1,    A_ij = beta_i (k_i . k_j) d_ij for i > j, else 0
    o_i = scale (s_i q_i S + sum_(j <= i) (q_i . k_j) d_ij u_j),    S <- (what is left) S + sum_j e_j k_j u_j^T

T depends on no state, so all chunks' are found at once; the walk then takes three products a chunk one after another.
Given do and the gradient dS of the state after a chunk, u and the state before it:

    x   = T^T du,   du_j = e_j k_j dS + scale sum_(i >= j) (q_i . k_j) d_ij do_i       (walking backwards)
    dS <- (what is left) dS + scale sum_i s_i q_i do_i^T - sum_i beta_i s_i k_i x_i^T
    dv_i = beta_i x_i,      dbeta_i = x_i . (v_i - s_i k_i S - sum_(j < i) (k_i . k_j) d_ij u_j)
    dq_i = scale (s_i S do_i + sum_(j <= i) d_ij (do_i . u_j) k_j)
    dk_j = e_j dS u_j + scale sum_(i >= j) d_ij (do_i . u_j) q_i - beta_j s_j S x_j
           - sum_(i < j) beta_j d_ji (x_j . u_i) k_i - sum_(i > j) beta_i d_ij (x_i . u_j) k_i
    dg_t = sum_(i >= t) (q_i . dq_i - v_i . dv_i) + <S, dS> at the chunk's end

The last because a decay can be moved from the state into what is read and what is written: with G the sums of g,
exp(-G_t) S_t follows the recurrence without decay of values exp(-G_t) v_t.

T comes from the inverses of diagonal blocks of h tokens, h = 1, 2, 4, ...: of two neighbours and the block below
between them, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. Every factor is the inverse of a part of I + A.
The product (I - A)(I + A^2)(I + A^4)... is shorter, but equal keys make its powers of A as large as binomials of C,
which cancel in the end, and no digits would be left. Near the edge of stability, beta |k|^2 = 2 with keys that are
nearly equal, T itself grows with the chunk, and float32 loses two digits beside the recurrence. What is taken
transposed is read so from memory (see `walk`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.tiles import (
    apart,
    between,
    chunk_of,
    place,
    prefix,
    read,
    read_across,
    read_row,
    stretch_of,
    suffix,
    write,
)


@triton.jit
def decays(
    g, batch, head, start, end, rows, inside, C: tl.constexpr, GATE: tl.constexpr, SUMS: tl.constexpr,
    UPPER: tl.constexpr,
):  # fmt: skip
    """Of the start at each token, of each token at the end, of j at i >= j (UPPER: i at j >= i), of start at the end.

    SUMS: g holds sums from the start of each chunk (`prepare_sums`).
    """
    pairs = rows[:, None] <= rows[None, :] if UPPER else rows[:, None] >= rows[None, :]
    if GATE == 0:
        ones = tl.full([C], 1.0, tl.float32)
        return ones, ones, tl.where(pairs, 1.0, 0.0), 1.0
    elif SUMS:
        sums = read_row(g, batch, head, start, rows, inside)
        whole = tl.load(place(g, batch, head, tl.minimum(start + C, end) - 1), mask=start < end, other=0.0)
        way = sums[None, :] - sums[:, None] if UPPER else sums[:, None] - sums[None, :]
        decay = tl.where(pairs, tl.exp(tl.minimum(way, 0.0)), 0.0)
        return tl.exp(sums), tl.exp(tl.minimum(whole - sums, 0.0)), decay, tl.exp(whole)
    else:
        gate = read_row(g, batch, head, start, rows, inside)
        follows = (rows + 1 < C) & (start + rows + 1 < end)
        to_end = suffix(read_row(g, batch, head, start + 1, rows, follows))
        return prefix(gate), to_end, between(gate, rows, UPPER), tl.exp(tl.sum(gate, 0))


@triton.jit
def delta_prepare(
    k, beta, g, t, cuts,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SUMS: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, EXACTLY: tl.constexpr,
):  # fmt: skip
    """T, as t (B, heads, N, C), of one chunk of a state head. EXACTLY: the precision of the products of inverses."""
    head = tl.program_id(1)
    batch, start, end = chunk_of(cuts, tl.program_id(0), C)
    rows = tl.arange(0, C)
    inside = start + rows < end
    products = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BK):
        channel = block + tl.arange(0, BK)
        keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
        across = read_across(k, batch, head, start, rows, inside, channel, K).to(KIND)
        products = tl.dot(keys, across, products, input_precision=PRECISION)
    share = read_row(beta, batch, head, start, rows, inside)
    _, _, decay, _ = decays(g, batch, head, start, end, rows, inside, C, GATE, SUMS, False)
    i = rows[:, None]
    j = rows[None, :]
    system = tl.where(i > j, share[:, None] * products * decay, 0.0)
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where(apart(rows, 1), system, 0.0)
    for level in tl.static_range(1, LEVELS):
        below = tl.where(apart(rows, 1 << level), system, 0.0)
        below = tl.dot(inverse, below, input_precision=EXACTLY)
        inverse -= tl.dot(below, inverse, input_precision=EXACTLY)
    write(t, batch, head, start, rows, inside, rows, inverse, C)


@triton.jit
def delta_walk(
    q, k, v, beta, g, t, first, last, o, u, states, cuts, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    SUMS: tl.constexpr, FAN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, state head and BV channels of values a program; its FAN query heads are read one after another.

    first (sequences, heads, K, V): the state before. Written where there is room: last, the state after; o (B, heads
    FAN, N, V); u (B, heads, N, V); states (chunks + sequences, heads, K, V), before every chunk and after the last.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    seq = tl.program_id(0) // TILES
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    rows = tl.arange(0, C)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    exists = (row < K)[:, None] & (column < V)[None, :]
    entry = row[:, None] * V + column[None, :]
    at = (seq * heads + head).to(tl.int64) * (K * V)
    state = tl.load(first + at + entry, mask=exists, other=0.0)
    for chunk in range(chunks):
        start = begin + chunk * C
        inside = start + rows < end
        if states is not None:
            slot = (first_chunk + chunk + seq).to(tl.int64) * heads + head
            tl.store(states + slot * (K * V) + entry, state.to(KIND), mask=exists)
        keys = read(k, batch, head, start, rows, inside, row, K).to(KIND)
        across = read_across(k, batch, head, start, rows, inside, row, K).to(KIND)
        solve = read(t, batch, head, start, rows, inside, rows, C).to(KIND)
        values = read(v, batch, head, start, rows, inside, column, V).to(tl.float32)
        share = read_row(beta, batch, head, start, rows, inside)
        from_start, to_end, decay, lost = decays(g, batch, head, start, end, rows, inside, C, GATE, SUMS, False)
        known = state.to(KIND)
        found = tl.dot(keys, known, input_precision=PRECISION)
        missing = share[:, None] * (values - from_start[:, None] * found)
        written = tl.dot(solve, missing.to(KIND), input_precision=PRECISION)
        if u is not None:
            write(u, batch, head, start, rows, inside, column, written, V)
        if o is not None:
            for each in tl.static_range(FAN):
                queries = read(q, batch, head * FAN + each, start, rows, inside, row, K).to(KIND)
                acc = tl.dot(queries, known, input_precision=PRECISION) * from_start[:, None]
                scores = tl.dot(queries, across, input_precision=PRECISION) * decay
                acc = tl.dot(scores.to(KIND), written.to(KIND), acc, input_precision=PRECISION)
                write(o, batch, head * FAN + each, start, rows, inside, column, acc * scale, V)
        left = (written * to_end[:, None]).to(KIND)
        state = tl.dot(across, left, state * lost, input_precision=PRECISION)
    if states is not None:
        slot = (first_chunk + chunks + seq).to(tl.int64) * heads + head
        tl.store(states + slot * (K * V) + entry, state.to(KIND), mask=exists)
    if last is not None:
        tl.store(last + at + entry, state, mask=exists)


@triton.jit
def delta_walk_back(
    q, k, do, beta, g, t, dlast, states, x, dstates, past, dfirst, cuts, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    SUMS: tl.constexpr, FAN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same backwards, from dlast to dfirst, both (sequences, heads, K, V).

    Writes x (B, heads, N, V), dstates (chunks, heads, K, V), the gradient of the state after each chunk, and with a
    gate past (chunks, heads, tiles): the sum of that times the state.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    seq = tl.program_id(0) // TILES
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    rows = tl.arange(0, C)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    exists = (row < K)[:, None] & (column < V)[None, :]
    entry = row[:, None] * V + column[None, :]
    at = (seq * heads + head).to(tl.int64) * (K * V)
    grad = tl.load(dlast + at + entry, mask=exists, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        start = begin + chunk * C
        inside = start + rows < end
        slot = (first_chunk + chunk).to(tl.int64) * heads + head
        if GATE:
            after = states + ((first_chunk + chunk + 1 + seq).to(tl.int64) * heads + head) * (K * V)
            flows = grad * tl.load(after + entry, mask=exists, other=0.0).to(tl.float32)
            tl.store(past + slot * TILES + tile, tl.sum(tl.sum(flows, 1), 0))
        tl.store(dstates + slot * (K * V) + entry, grad.to(KIND), mask=exists)
        keys = read(k, batch, head, start, rows, inside, row, K).to(KIND)
        across = read_across(k, batch, head, start, rows, inside, row, K).to(KIND)
        solve = read_across(t, batch, head, start, rows, inside, rows, C).to(KIND)
        share = read_row(beta, batch, head, start, rows, inside)
        from_start, to_end, decay, lost = decays(g, batch, head, start, end, rows, inside, C, GATE, SUMS, True)
        written = tl.dot(keys, grad.to(KIND), input_precision=PRECISION) * to_end[:, None]
        grad *= lost
        for each in tl.static_range(FAN):
            queries = read_across(q, batch, head * FAN + each, start, rows, inside, row, K).to(KIND)
            given = read(do, batch, head * FAN + each, start, rows, inside, column, V).to(tl.float32) * scale
            scores = tl.dot(keys, queries, input_precision=PRECISION) * decay
            written = tl.dot(scores.to(KIND), given.to(KIND), written, input_precision=PRECISION)
            given *= from_start[:, None]
            grad = tl.dot(queries, given.to(KIND), grad, input_precision=PRECISION)
        solved = tl.dot(solve, written.to(KIND), input_precision=PRECISION)
        write(x, batch, head, start, rows, inside, column, solved, V)
        erased = -(share * from_start)[:, None] * solved
        grad = tl.dot(across, erased.to(KIND), grad, input_precision=PRECISION)
    tl.store(dfirst + at + entry, grad, mask=exists)


@triton.jit
def delta_gradients(
    q, k, v, beta, g, do, u, x, states, dstates, past, dq, dk, dv, dbeta, dg, cuts, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    SUMS: tl.constexpr, FAN: tl.constexpr, TILES: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients in one chunk of a state head, from what the walks have left; BK and BV channels at a time."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, start, end = chunk_of(cuts, slot, C)
    rows = tl.arange(0, C)
    inside = start + rows < end
    i = rows[:, None]
    j = rows[None, :]
    seq = slot * 0
    if cuts.cu is None:
        seq += batch
    else:
        seq += tl.load(cuts.seq_of + slot)
    state_at = ((slot + seq).to(tl.int64) * heads + head) * (K * V)
    grad_at = (slot.to(tl.int64) * heads + head) * (K * V)
    share = read_row(beta, batch, head, start, rows, inside)
    from_start, to_end, decay, _ = decays(g, batch, head, start, end, rows, inside, C, GATE, SUMS, False)
    _, _, later, _ = decays(g, batch, head, start, end, rows, inside, C, GATE, SUMS, True)

    met = tl.zeros([C, C], tl.float32)  # x_i . u_j
    turned = tl.zeros([C, C], tl.float32)  # u_i . x_j
    dshare = tl.zeros([C], tl.float32)
    for block in range(0, V, BV):
        column = block + tl.arange(0, BV)
        us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
        us_across = read_across(u, batch, head, start, rows, inside, column, V).to(KIND)
        xs = read(x, batch, head, start, rows, inside, column, V).to(KIND)
        xs_across = read_across(x, batch, head, start, rows, inside, column, V).to(KIND)
        met = tl.dot(xs, us_across, met, input_precision=PRECISION)
        turned = tl.dot(us, xs_across, turned, input_precision=PRECISION)
        values = read(v, batch, head, start, rows, inside, column, V).to(tl.float32)
        dshare += tl.sum(values * xs.to(tl.float32), 1)
        write(dv, batch, head, start, rows, inside, column, xs.to(tl.float32) * share[:, None], V)
    passed = -share * dshare
    products = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BK):
        channel = block + tl.arange(0, BK)
        keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
        across = read_across(k, batch, head, start, rows, inside, channel, K).to(KIND)
        products = tl.dot(keys, across, products, input_precision=PRECISION)
    dshare -= tl.sum(tl.where(i > j, products * decay * met, 0.0), 1)
    mixed = tl.where(i > j, share[:, None] * decay * met, tl.where(i < j, share[None, :] * later * turned, 0.0))

    for block in range(0, K, BK):
        channel = block + tl.arange(0, BK)
        keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
        erased = tl.zeros([C, BK], tl.float32)  # S x
        added = tl.zeros([C, BK], tl.float32)  # dS u
        for other in range(0, V, BV):
            column = other + tl.arange(0, BV)
            exists = (column < V)[:, None] & (channel < tl.where(start < end, K, 0))[None, :]
            entry = channel[None, :] * V + column[:, None]
            state = tl.load(states + state_at + entry, mask=exists, other=0.0)
            grad = tl.load(dstates + grad_at + entry, mask=exists, other=0.0)
            us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
            xs = read(x, batch, head, start, rows, inside, column, V).to(KIND)
            erased = tl.dot(xs, state, erased, input_precision=PRECISION)
            added = tl.dot(us, grad, added, input_precision=PRECISION)
        dshare -= from_start * tl.sum(erased * keys.to(tl.float32), 1)
        dkeys = added * to_end[:, None] - erased * (share * from_start)[:, None]
        dkeys -= tl.dot(mixed.to(KIND), keys, input_precision=PRECISION)
        for each in range(FAN):
            one = head * FAN + each
            reads = tl.zeros([C, BK], tl.float32)
            scores = tl.zeros([C, C], tl.float32)  # do_i . u_j
            scores_turned = tl.zeros([C, C], tl.float32)
            for other in range(0, V, BV):
                column = other + tl.arange(0, BV)
                exists = (column < V)[:, None] & (channel < tl.where(start < end, K, 0))[None, :]
                entry = channel[None, :] * V + column[:, None]
                state = tl.load(states + state_at + entry, mask=exists, other=0.0)
                us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
                us_across = read_across(u, batch, head, start, rows, inside, column, V).to(KIND)
                given = read(do, batch, one, start, rows, inside, column, V).to(KIND)
                given_across = read_across(do, batch, one, start, rows, inside, column, V).to(KIND)
                reads = tl.dot(given, state, reads, input_precision=PRECISION)
                scores = tl.dot(given, us_across, scores, input_precision=PRECISION)
                scores_turned = tl.dot(us, given_across, scores_turned, input_precision=PRECISION)
            scores *= decay * scale
            scores_turned *= later * scale
            queries = read(q, batch, one, start, rows, inside, channel, K).to(KIND)
            dqueries = reads * (from_start * scale)[:, None]
            dqueries = tl.dot(scores.to(KIND), keys, dqueries, input_precision=PRECISION)
            write(dq, batch, one, start, rows, inside, channel, dqueries, K)
            passed += tl.sum(queries.to(tl.float32) * dqueries, 1)
            dkeys = tl.dot(scores_turned.to(KIND), queries, dkeys, input_precision=PRECISION)
        write(dk, batch, head, start, rows, inside, channel, dkeys, K)
    tl.store(place(dbeta, batch, head, start) + rows, dshare, mask=inside)
    if GATE:
        carry = 0.0
        for tile in range(TILES):
            at = (slot.to(tl.int64) * heads + head) * TILES + tile
            carry += tl.load(past + at, mask=start < end, other=0.0)
        tl.store(place(dg, batch, head, start) + rows, carry + tl.cumsum(passed, 0, reverse=True), mask=inside)
