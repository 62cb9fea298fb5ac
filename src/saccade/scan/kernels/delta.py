"""The delta rule in chunks: the values that are really written, the walk that finds them, and its adjoint.

Within a chunk, with s what is left of its start at each token, e of each token at its end, and d_ij of j at i,

    u = T (v - s k S),    T = (I + A)^-1 diag(beta),    A_ij = beta_i (k_i . k_j) d_ij for i > j, else 0
    o_i = scale s_i q_i S + sum_(j <= i) P_ij u_j,    P_ij = scale (q_i . k_j) d_ij
    S <- (what is left) S + sum_j e_j k_j u_j^T

T and P depend on no state, so all chunks' are found at once, and the walk has no pairs of tokens to weigh. Given do and
the gradient dS of the state after a chunk, u and the state before it:

    y   = T^T du,   du_j = e_j k_j dS + sum_(i >= j) P_ij do_i       (walking backwards)
    dS <- (what is left) dS + scale sum_i s_i q_i do_i^T - sum_i s_i k_i y_i^T
    dv  = y,        beta_i dbeta_i = y_i . (v_i - s_i k_i S - sum_(j < i) (k_i . k_j) d_ij u_j)
    dq_i = scale (s_i S do_i + sum_(j <= i) d_ij (do_i . u_j) k_j)
    dk_j = e_j dS u_j + scale sum_(i >= j) d_ij (do_i . u_j) q_i - s_j S y_j
           - sum_(i < j) d_ji (y_j . u_i) k_i - sum_(i > j) d_ij (y_i . u_j) k_i
    dg_t = sum_(i >= t) (q_i . dq_i - v_i . dv_i) + <S, dS> at the chunk's end

The last because a decay can be moved from the state into what is read and what is written: with G the sums of g,
exp(-G_t) S_t follows the recurrence without decay of values exp(-G_t) v_t.

The inverse comes from those of diagonal blocks of h tokens, h = 1, 2, 4, ...: of two neighbours and the block below
between them, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. Every factor is the inverse of a part of I + A.
The product (I - A)(I + A^2)(I + A^4)... is shorter, but equal keys make its powers of A as large as binomials of C,
which cancel in the end, and no digits would be left. Near the edge of stability, beta |k|^2 = 2 with keys that are
nearly equal, T itself grows with the chunk, and float32 loses two digits beside the recurrence.

A chunk maps the state before it to the one after it, S -> M S + Z, and so does a stretch of chunks. Where sequences and
memories are too few for the GPU, stretches of a sequence are walked side by side: once from nothing, to Z, beside the
identity without values, to M; then, joined by S_(i+1) = M_i S_i + Z_i, from the states before them. Backwards
dS_i = M_i^T dS_(i+1) + what do adds, by the same M. Up to beta |k|^2 = 2, however long keys are, every factor
I - beta k k^T of M is a contraction, and this costs no digits. Beyond, M grows as states do from chunk to chunk: it may
leave the range of float32 where the states, because values are small or zero, would not.

Walks hold their state turned round, channels of values first: what a product gives is then laid out as the first factor
of the next, and passes from one to the other in registers. Only what was loaded is ever transposed.

With D = Dv channels of e bytes, a token of a head moves 6 e D + 4 e C bytes forward: from q and k to P and T, then from
all of them and v to o. The gradients move 15 e D + 3 e C, and four times a state, e D^2, for every chunk: a walk to u
and states, one back to y and theirs, and the rest, all chunks at once. Kept from forward to backward are 2 e C bytes a
token, and 8 with a gate; and three states in float32 a stretch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.abreast import Launched, alike
from saccade.scan.kernels.tiles import (
    between,
    chunk_of,
    place,
    prefix,
    read,
    read_row,
    stretch_of,
    suffix,
    write,
    write_across,
)

LEAST = tl.constexpr(2.0**-80)
MOST = tl.constexpr(2.0**15)  # half of what float16 holds


@triton.jit
def pairs(g, batch, head, start, rows, inside, GATE: tl.constexpr, SUMS: tl.constexpr, UPPER: tl.constexpr):
    """(C, C): what is left of j at i >= j, zeros elsewhere; UPPER: of i at j >= i.

    SUMS: g holds sums from the start of each chunk (`prepare_sums`).
    """
    ordered = rows[:, None] <= rows[None, :] if UPPER else rows[:, None] >= rows[None, :]
    if GATE == 0:
        return tl.where(ordered, 1.0, 0.0)
    elif SUMS:
        sums = read_row(g, batch, head, start, rows, inside)
        way = sums[None, :] - sums[:, None] if UPPER else sums[:, None] - sums[None, :]
        return tl.where(ordered, tl.exp(tl.minimum(way, 0.0)), 0.0)
    else:
        return between(read_row(g, batch, head, start, rows, inside), rows, UPPER)


@triton.jit
def present(start, end, rows, WHOLE: tl.constexpr):
    """Which tokens are inside the sequence; WHOLE: no sequence ends within a chunk."""
    if WHOLE:
        return rows == rows
    else:
        return start + rows < end


@triton.jit
def read_share(beta, batch, head, start, rows, inside):
    """beta of each token; in place of 0 something next to it, as its gradient is found times beta."""
    share = read_row(beta, batch, head, start, rows, inside)
    return tl.where(share == 0, LEAST, share)


@triton.jit
def edge(edges, END: tl.constexpr, batch, head, start, rows, inside, C: tl.constexpr, GATE: tl.constexpr):
    """What is left of a chunk's start at each token; END: of each token at the chunk's end."""
    if GATE:
        return read_row(edges[END], batch, head, start, rows, inside)
    else:
        return tl.full([C], 1.0, tl.float32)


@triton.jit
def through(edges, batch, head, start, end, C: tl.constexpr, GATE: tl.constexpr):
    """What is left of a chunk's start at its end. Walks load it a chunk ahead, which Triton does for no scalar."""
    if GATE:
        return tl.load(place(edges[0], batch, head, tl.maximum(tl.minimum(start + C, end) - 1, 0)))
    else:
        return 1.0


@triton.jit
def between_halves(system, rows, level):
    """Of every block of 2 h tokens, h = 2^level, what its second half takes of its first; zeros elsewhere."""
    half = rows >> level
    follows = tl.where(half % 2 == 0, half + 1, -1)
    return tl.where(half[:, None] == follows[None, :], system, 0.0)


@triton.jit
def inverted(system, rows, LEVELS: tl.constexpr, EXACTLY: tl.constexpr):
    """(I + system)^-1 of a system that is zero but below the diagonal. EXACTLY: see `delta_prepare`."""
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0) - between_halves(system, rows, 0)
    for level in range(1, LEVELS):
        below = between_halves(system, rows, level)
        if EXACTLY == "half":
            near = inverse.to(tl.float16)
            below = tl.dot(near, below.to(tl.float16))
            inverse -= tl.dot(below.to(tl.float16), near)
        else:
            below = tl.dot(inverse, below, input_precision=EXACTLY)
            inverse -= tl.dot(below, inverse, input_precision=EXACTLY)
    return inverse


@Launched
def delta_prepare(
    q, k, beta, g, t, scores, edges, cuts, scale,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, SUMS: tl.constexpr, LEVELS: tl.constexpr,
    FAN: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, EXACTLY: tl.constexpr,
):  # fmt: skip
    """What one chunk of a state head has that depends on no state.

    Written: T, as t (B, heads, N, C); P, as scores (B, heads FAN, N, C); with a gate, as edges, s and e (B, heads, N).
    EXACTLY: the precision of the products of inverses, or "half", of factors in float16, as many digits as tf32 has and
    half its time; what may have left the range of float16 is taken once more, in tf32.
    """
    head = tl.program_id(1)
    batch, start, end = chunk_of(cuts, tl.program_id(0), C)
    rows = tl.arange(0, C)
    inside = start + rows < end
    decay = pairs(g, batch, head, start, rows, inside, GATE, SUMS, False)
    for each in range(FAN):
        met = tl.zeros([C, C], tl.float32)
        for block in range(0, K, BK):
            channel = block + tl.arange(0, BK)
            queries = read(q, batch, head * FAN + each, start, rows, inside, channel, K).to(KIND)
            keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
            met = tl.dot(queries, tl.trans(keys), met, input_precision=PRECISION)
        write(scores, batch, head * FAN + each, start, rows, inside, rows, met * decay * scale, C)
    products = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BK):
        channel = block + tl.arange(0, BK)
        keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
        products = tl.dot(keys, tl.trans(keys), products, input_precision=PRECISION)
    ordered = rows[:, None] > rows[None, :]
    system = tl.where(ordered, read_share(beta, batch, head, start, rows, inside)[:, None] * products * decay, 0.0)
    inverse = inverted(system, rows, LEVELS, EXACTLY)
    if EXACTLY == "half":
        beyond = tl.where(tl.abs(inverse) < MOST, 0, 1)
        if tl.max(tl.max(beyond, 1), 0) > 0:
            inverse = inverted(system, rows, LEVELS, "tf32")
    inverse *= read_share(beta, batch, head, start, rows, inside)[None, :]
    write(t, batch, head, start, rows, inside, rows, inverse, C)
    if GATE:
        gate = read_row(g, batch, head, start, rows, inside)
        if SUMS:
            whole = tl.load(place(g, batch, head, tl.minimum(start + C, end) - 1), mask=start < end, other=0.0)
            left = tl.exp(gate)
            kept = tl.exp(tl.minimum(whole - gate, 0.0))
        else:
            follows = (rows + 1 < C) & (start + rows + 1 < end)
            left = prefix(gate)
            kept = suffix(read_row(g, batch, head, start + 1, rows, follows))
        tl.store(place(edges[0], batch, head, start) + rows, left, mask=inside)
        tl.store(place(edges[1], batch, head, start) + rows, kept, mask=inside)


@triton.jit
def walker(
    cuts, stretches, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, APART: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """What a program of a walk has: a stretch of a sequence, and BV of W columns of a state, which it holds as rows.

    Returns what `stretch_of` does, of the stretch; channels of keys, and columns; where the state before lies among
    (sequences stretches, heads, K, W), and the one after among (sequences, heads, K, W); where entries lie in it, and
    in its transpose; which exist, and which of those after are written: of the last stretch. APART: those of all, among
    as many as before; the last is not walked for the V columns of values, as nothing comes after it.
    """
    TILES: tl.constexpr = (W + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    part = tl.program_id(0) // TILES
    seq = part // stretches
    stretch = part % stretches
    final = stretch == stretches - 1
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tl.arange(0, BK)
    column = tile * BV + tl.arange(0, BV)
    at = (part * heads + head).to(tl.int64) * (K * W)
    to = at if APART else (seq * heads + head).to(tl.int64) * (K * W)
    exists = (column < W)[:, None] & (row < K)[None, :]
    leaves = exists if APART else tl.where(final, exists, False)  # by "and" the interpreter makes numbers of them
    entry = column[:, None] + row[None, :] * W
    turned = column[:, None] * K + row[None, :]
    batch, begin, end, chunks, first_chunk = stretch_of(cuts, seq, C)
    each = tl.cdiv(chunks, stretches)
    low = (stretches - 1 - stretch if BACK else stretch) * each
    count = tl.minimum(each, chunks - low)  # below 0 where fewer stretches hold all chunks
    if APART:
        count = tl.where(final & (tile * BV + BV <= V), 0, count)
    found = batch, begin + low * C, end, count, first_chunk + low
    return found, row, column, at, to, entry, turned, exists, leaves


@alike("stretches")
def delta_walk(
    q, k, v, t, scores, edges, first, last, o, u, states, cuts, scale, stretches,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, FAN: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One of `stretches` of a sequence, state head and BV columns a program; FAN query heads are read in turn.

    first (sequences stretches, heads, K, V): the states before. Written where there is room: last (sequences, heads, K,
    V), the states after; o (B, heads FAN, N, V); u (B, heads, N, V); states (chunks, heads, V, K), before every chunk.
    Without first: last (sequences stretches, heads, K, W), W = V + K, what every stretch adds, and its map of the state
    before. UNIT: scale is 1.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    APART: tl.constexpr = first is None
    stretch, row, column, at, to, entry, turned, exists, leaves = walker(
        cuts, stretches, K, V, W, C, BK, BV, APART, False
    )
    batch, begin, end, chunks, first_chunk = stretch
    rows = tl.arange(0, C)
    if APART:
        state = tl.where(column[:, None] - V == row[None, :], 1.0, 0.0)
    else:
        state = tl.load(first + at + entry, mask=exists, other=0.0)
    lost = through(edges, batch, head, begin, end, C, GATE)
    for chunk in range(chunks):
        start = begin + chunk * C
        ahead = through(edges, batch, head, start + C, end, C, GATE)
        inside = present(start, end, rows, WHOLE)
        known = state.to(KIND)
        if states is not None:
            slot = (first_chunk + chunk).to(tl.int64) * heads + head
            tl.store(states + slot * (K * V) + turned, known, mask=exists)
        keys = read(k, batch, head, start, rows, inside, row, K).to(KIND)
        solve = read(t, batch, head, start, rows, inside, rows, C).to(KIND)
        values = read(v, batch, head, start, rows, inside, column, V).to(KIND)
        left = edge(edges, 0, batch, head, start, rows, inside, C, GATE)
        written = tl.dot(tl.trans(values), tl.trans(solve), input_precision=PRECISION)
        found = tl.dot(known, tl.trans(keys), input_precision=PRECISION) * -left[None, :]
        written = tl.dot(found.to(KIND), tl.trans(solve), written, input_precision=PRECISION)
        if u is not None:
            write_across(u, batch, head, start, rows, inside, column, written, V)
        if o is not None:
            for each in tl.static_range(FAN):
                one = head * FAN + each
                queries = read(q, batch, one, start, rows, inside, row, K).to(KIND)
                weights = read(scores, batch, one, start, rows, inside, rows, C).to(KIND)
                acc = tl.dot(known, tl.trans(queries), input_precision=PRECISION)
                if GATE:
                    acc *= left[None, :]
                if not UNIT:
                    acc *= scale
                acc = tl.dot(written.to(KIND), tl.trans(weights), acc, input_precision=PRECISION)
                write_across(o, batch, one, start, rows, inside, column, acc, V)
        written *= edge(edges, 1, batch, head, start, rows, inside, C, GATE)[None, :]
        state = tl.dot(written.to(KIND), keys, state * lost, input_precision=PRECISION)
        lost = ahead
    if last is not None:
        tl.store(last + to + entry, state, mask=leaves)


@alike("stretches")
def delta_walk_back(
    q, k, do, t, scores, edges, dlast, y, dstates, dfirst, cuts, scale, stretches,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    FAN: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same backwards, from dlast (sequences stretches, heads, K, V) to dfirst (sequences, heads, K, V).

    Stretches count from the last. Writes y (B, heads, N, V) and dstates (chunks, heads, V, K), the gradient of the
    state after each chunk. Without dlast: dfirst (sequences stretches, heads, K, V) alone, what every stretch adds.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    APART: tl.constexpr = dlast is None
    stretch, row, column, at, to, entry, turned, exists, leaves = walker(
        cuts, stretches, K, V, V, C, BK, BV, APART, True
    )
    batch, begin, end, chunks, first_chunk = stretch
    rows = tl.arange(0, C)
    if APART:
        grad = tl.zeros([BV, BK], tl.float32)
    else:
        grad = tl.load(dlast + at + entry, mask=exists, other=0.0)
    lost = through(edges, batch, head, begin + (chunks - 1) * C, end, C, GATE)
    for step in range(chunks):
        chunk = chunks - 1 - step
        start = begin + chunk * C
        ahead = through(edges, batch, head, start - C, end, C, GATE)
        inside = present(start, end, rows, WHOLE)
        kept = edge(edges, 1, batch, head, start, rows, inside, C, GATE)  # first: nothing else is waited for as long
        known = grad.to(KIND)
        if dstates is not None:
            slot = (first_chunk + chunk).to(tl.int64) * heads + head
            tl.store(dstates + slot * (K * V) + turned, known, mask=exists)
        keys = read(k, batch, head, start, rows, inside, row, K).to(KIND)
        solve = read(t, batch, head, start, rows, inside, rows, C).to(KIND)
        passed = tl.dot(known, tl.trans(keys), input_precision=PRECISION)
        passed *= kept[None, :]
        grad *= lost
        lost = ahead
        left = edge(edges, 0, batch, head, start, rows, inside, C, GATE)
        for each in tl.static_range(FAN):
            one = head * FAN + each
            queries = read(q, batch, one, start, rows, inside, row, K).to(KIND)
            weights = read(scores, batch, one, start, rows, inside, rows, C).to(KIND)
            given = tl.trans(read(do, batch, one, start, rows, inside, column, V).to(KIND))
            passed = tl.dot(given, weights, passed, input_precision=PRECISION)
            if GATE or not UNIT:
                given = (given.to(tl.float32) * (left if UNIT else left * scale)[None, :]).to(KIND)
            grad = tl.dot(given, queries, grad, input_precision=PRECISION)
        passed = tl.dot(passed.to(KIND), solve, input_precision=PRECISION)
        if y is not None:
            write_across(y, batch, head, start, rows, inside, column, passed, V)
        grad = tl.dot((passed * -left[None, :]).to(KIND), keys, grad, input_precision=PRECISION)
    tl.store(dfirst + to + entry, grad, mask=leaves)


@alike("stretches")
def delta_join(
    parts, added, first, starts, stretches,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before all stretches of a sequence, for one memory and BV columns a program: S_(i+1) = M_i S_i + Z_i.

    parts (sequences stretches, heads, K, V + K): M, in the last K columns; added (sequences stretches, heads, K, W): Z,
    in the first V; first (sequences, heads, K, V): S_0; starts (sequences stretches, heads, K, V): all S, written.
    BACK: the same of gradients, with M transposed; added and starts then count from the last stretch, parts from the
    first. A product takes BLOCK channels of a state at a time, from where it has been written.
    """
    row = tl.arange(0, BK)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    exists = (column < V)[:, None] & (row < K)[None, :]
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    seq = tl.program_id(2)
    at = (seq * heads + head).to(tl.int64) * (K * V)
    state = tl.load(first + at + column[:, None] + row[None, :] * V, mask=exists, other=0.0)
    slot = (seq * stretches * heads + head).to(tl.int64)
    tl.store(starts + slot * (K * V) + column[:, None] + row[None, :] * V, state, mask=exists)
    for stretch in range(1, stretches):
        tl.debug_barrier()  # threads read what others have written
        which = seq * stretches + (stretches - stretch if BACK else stretch - 1)
        through = parts + (which * heads + head).to(tl.int64) * (K * (V + K)) + V
        state = tl.load(added + slot * (K * W) + column[:, None] + row[None, :] * W, mask=exists, other=0.0)
        for block in range(0, K, BLOCK):
            channel = block + tl.arange(0, BLOCK)
            known = (column < V)[:, None] & (channel < K)[None, :]
            before = tl.load(starts + slot * (K * V) + column[:, None] + channel[None, :] * V, mask=known, other=0.0)
            if BACK:
                entry = channel[:, None] * (V + K) + row[None, :]
            else:
                entry = row[None, :] * (V + K) + channel[:, None]
            factor = tl.load(through + entry, mask=(channel < K)[:, None] & (row < K)[None, :], other=0.0)
            state = tl.dot(before, factor, state, input_precision=PRECISION)
        slot += heads
        tl.store(starts + slot * (K * V) + column[:, None] + row[None, :] * V, state, mask=exists)


@Launched
def delta_gradients(
    q, k, v, beta, g, do, u, y, edges, states, dstates, dq, dk, dbeta, dg, cuts, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    SUMS: tl.constexpr, FAN: tl.constexpr, WHOLE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients in one chunk of a state head, from what the walks have left; BK and BV channels at a time."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    batch, start, end = chunk_of(cuts, slot, C)
    rows = tl.arange(0, C)
    inside = present(start, end, rows, WHOLE)
    at = (slot.to(tl.int64) * tl.num_programs(1) + head) * (K * V)
    left = edge(edges, 0, batch, head, start, rows, inside, C, GATE)
    kept = edge(edges, 1, batch, head, start, rows, inside, C, GATE)
    lost = through(edges, batch, head, start, end, C, GATE)

    met = tl.zeros([C, C], tl.float32)  # y_i . u_j
    dshare = tl.zeros([C], tl.float32)  # times beta
    for block in tl.range(0, V, BV, num_stages=2):  # or values, which no product takes, are waited for
        column = block + tl.arange(0, BV)
        us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
        ys = read(y, batch, head, start, rows, inside, column, V).to(KIND)
        met = tl.dot(ys, tl.trans(us), met, input_precision=PRECISION)
        values = read(v, batch, head, start, rows, inside, column, V).to(tl.float32)
        dshare += tl.sum(values * ys.to(tl.float32), 1)
    passed = -dshare
    decay = pairs(g, batch, head, start, rows, inside, GATE, SUMS, False)
    mixed = tl.where(rows[:, None] > rows[None, :], decay * met, 0.0).to(KIND)  # its transpose is of u_i and y_j

    carry = 0.0
    for block in range(0, K, BK):
        channel = block + tl.arange(0, BK)
        keys = read(k, batch, head, start, rows, inside, channel, K).to(KIND)
        erased = tl.zeros([C, BK], tl.float32)  # S y
        added = tl.zeros([C, BK], tl.float32)  # dS u
        for other in range(0, V, BV):
            column = other + tl.arange(0, BV)
            exists = (column < V)[:, None] & (channel < tl.where(start < end, K, 0))[None, :]
            entry = column[:, None] * K + channel[None, :]
            state = tl.load(states + at + entry, mask=exists, other=0.0)
            grad = tl.load(dstates + at + entry, mask=exists, other=0.0)
            us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
            ys = read(y, batch, head, start, rows, inside, column, V).to(KIND)
            erased = tl.dot(ys, state, erased, input_precision=PRECISION)
            added = tl.dot(us, grad, added, input_precision=PRECISION)
            if GATE:
                carry += lost * tl.sum(tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1), 0)
        if GATE:
            erased *= left[:, None]
            added *= kept[:, None]
            carry += tl.sum(tl.sum(added * keys.to(tl.float32), 1), 0)
        erased = tl.dot(mixed, keys, erased, input_precision=PRECISION)  # with what the chunk itself has written
        dshare -= tl.sum(erased * keys.to(tl.float32), 1)
        dkeys = added - tl.dot(tl.trans(mixed), keys, erased, input_precision=PRECISION)
        for each in range(FAN):
            one = head * FAN + each
            queries = read(q, batch, one, start, rows, inside, channel, K).to(KIND)
            reads = tl.zeros([C, BK], tl.float32)
            scores = tl.zeros([C, C], tl.float32)  # do_i . u_j
            for other in range(0, V, BV):
                column = other + tl.arange(0, BV)
                exists = (column < V)[:, None] & (channel < tl.where(start < end, K, 0))[None, :]
                entry = column[:, None] * K + channel[None, :]
                state = tl.load(states + at + entry, mask=exists, other=0.0)
                us = read(u, batch, head, start, rows, inside, column, V).to(KIND)
                given = read(do, batch, one, start, rows, inside, column, V).to(KIND)
                reads = tl.dot(given, state, reads, input_precision=PRECISION)
                scores = tl.dot(given, tl.trans(us), scores, input_precision=PRECISION)
            decay = pairs(g, batch, head, start, rows, inside, GATE, SUMS, False)
            weights = (scores * decay * scale).to(KIND)
            dqueries = reads * (left * scale)[:, None]
            dqueries = tl.dot(weights, keys, dqueries, input_precision=PRECISION)
            write(dq, batch, one, start, rows, inside, channel, dqueries, K)
            passed += tl.sum(queries.to(tl.float32) * dqueries, 1)
            dkeys = tl.dot(tl.trans(weights), queries, dkeys, input_precision=PRECISION)
        write(dk, batch, head, start, rows, inside, channel, dkeys, K)
    dshare /= read_share(beta, batch, head, start, rows, inside)
    tl.store(place(dbeta, batch, head, start) + rows, dshare, mask=inside)
    if GATE:
        tl.store(place(dg, batch, head, start) + rows, carry + tl.cumsum(passed, 0, reverse=True), mask=inside)
