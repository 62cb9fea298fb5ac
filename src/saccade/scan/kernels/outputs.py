"""What tokens read: from the state before their chunk, and from the tokens of the chunk. All chunks at once.

o_i  = scale (q_i decayed)^T S  + scale sum_(j <= i) (q_i . k_j decayed) v_j
dv_j = (k_j decayed)^T dS       + scale sum_(i >= j) (q_i . k_j decayed) do_i       (REVERSE)
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.tiles import (
    between,
    chunk_of,
    halves,
    met,
    place,
    prefix,
    read,
    read_row,
    read_state,
    suffix,
    summed,
    towards_middle,
    write,
)


@triton.jit
def scan_outputs(
    q, k, y, g, states, sums, o, mass, cuts, scale, fan, share,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    MASS: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One chunk of one query head and BV channels of o (dv) a program; y: values, or gradients of outputs.

    State head of query head h: h // fan, key head of state head s: s // share. REVERSE: the part of a key that belongs
    to query head h; what comes from the state goes to the first of the heads that share it.
    """
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    slot = tl.program_id(0) // TILES_V
    column = tl.program_id(0) % TILES_V * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    state_head = head // fan
    key_head = state_head // share
    state_heads = tl.num_programs(1) // fan
    batch, start, end = chunk_of(cuts, slot, C)
    rows = tl.arange(0, C)
    tokens = start + rows
    inside = tokens < end
    limit = tl.where(head % fan == 0, D, 0) if REVERSE else D

    acc = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)  # the diagonal of the scores
    read_mass = tl.zeros([C], tl.float32)
    for block in range(0, D, BD):
        row = block + tl.arange(0, BD)
        qs = read(q, batch, head, start, rows, inside, row, D).to(KIND)
        ks = read(k, batch, key_head, start, rows, inside, row, D).to(KIND)
        if GATE == 2:
            gates = read(g, batch, state_head, start, rows, inside, row, D).to(tl.float32)
            high, low = halves(gates, KIND, PRECISION)
            own += tl.sum(qs.to(tl.float32) * ks.to(tl.float32), 1)
            for level in range(LEVELS):
                late = ((rows & (1 << level)) != 0)[:, None]
                left = tl.exp(summed(towards_middle(rows, 1 << level), high, low, KIND, PRECISION))
                met_at = (tl.where(late, qs, ks).to(tl.float32) * left).to(KIND)
                found = tl.dot(met_at, tl.trans(met_at), input_precision=PRECISION)
                scores += tl.where(met(rows, 1 << level), found, 0.0)
            after = rows[None, :] > rows[:, None]
            left = tl.exp(summed(after if REVERSE else ~after, high, low, KIND, PRECISION))
            reads = ((ks if REVERSE else qs).to(tl.float32) * left).to(KIND)
        else:
            if REVERSE:
                scores = tl.dot(ks, tl.trans(qs), scores, input_precision=PRECISION)
                reads = ks
            else:
                scores = tl.dot(qs, tl.trans(ks), scores, input_precision=PRECISION)
                reads = qs
        state = read_state(states, slot, state_head, state_heads, row, column, limit, D, DV)
        acc = tl.dot(reads, state, acc, input_precision=PRECISION)
        if MASS:
            at = sums + (slot.to(tl.int64) * state_heads + state_head) * D
            found_sums = tl.load(at + row, mask=row < D, other=0.0)
            read_mass += tl.sum(reads.to(tl.float32) * found_sums[None, :], 1)

    if GATE == 1:
        gate = read_row(g, batch, state_head, start, rows, inside)
        if REVERSE:
            follows = (rows + 1 < C) & (tokens + 1 < end)
            acc *= suffix(read_row(g, batch, state_head, start + 1, rows, follows))[:, None]
        else:
            left = prefix(gate)
            acc *= left[:, None]
            read_mass *= left
        scores *= between(gate, rows, REVERSE)
    else:
        i = rows[:, None]
        j = rows[None, :]
        scores = tl.where(i <= j if REVERSE else i >= j, scores, 0.0)
        if GATE == 2:
            scores += tl.where(i == j, own[:, None], 0.0)
    ys = read(y, batch, head if REVERSE else key_head, start, rows, inside, column, DV).to(KIND)
    if REVERSE:
        scores *= scale
    acc = tl.dot(scores.to(KIND), ys, acc, input_precision=PRECISION)
    if not REVERSE:
        acc *= scale
    write(o, batch, head, start, rows, inside, column, acc, DV)
    if MASS:
        once = tokens < tl.where(tl.program_id(0) % TILES_V == 0, end, 0)
        tl.store(place(mass, batch, head, start) + rows, (read_mass + tl.sum(scores, 1)) * scale, mask=once)
