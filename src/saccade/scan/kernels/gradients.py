"""The gradients of queries, keys and gates, chunk by chunk, once the states and their gradients are known.

With dp_ij = scale (do_i . v_j + dmass_i) for i >= j, S the state before the chunk and dS the gradient of that after it,

    dq_i = scale decay(start, i) (S do_i + sums dmass_i)    + sum_(j <= i) dp_ij decay(j, i) k_j
    dk_j = decay(j, end) (dS v_j + dsums)                   + sum_(i >= j) dp_ij decay(j, i) q_i

The gradient of g_t is all that flows from before token t to t and later: from state to state, from the state to
queries i >= t, from keys j < t to the state, and from keys j < t to queries i >= t. None is a difference of sums, but
for the last under a gate a channel, and that over one chunk: over a long sequence it would lose digits.

Triton 3.4 to 3.7 is known to go wrong, without a word, where gates and products share a loop of a backward kernel and a
factor computed in registers is transposed. Here the loop over channels of values has products alone, its transposed
factors come from memory as they are, and the loop over levels transposes nothing, which is what both dp and its
transpose are formed for. tests/scan/test_kernels.py compares every gradient, on a GPU too.
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
def scan_gradients(
    q, k, v, g, do, dmass, states, sums, dstates, dsums, dq, dk, dg, cuts, scale, fan, share,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    MASS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One chunk of one query head and BD channels a program; dk and dg are the parts that belong to this head.

    A scalar gate gets a part from each block of channels: dg is (B, H, N, blocks), or (B, H, N, D).
    """
    TILES: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    row = tile * BD + tl.arange(0, BD)
    head = tl.program_id(1)
    state_head = head // fan
    key_head = state_head // share
    state_heads = tl.num_programs(1) // fan
    batch, start, end = chunk_of(cuts, slot, C)
    rows = tl.arange(0, C)
    tokens = start + rows
    inside = tokens < end
    limit = tl.where(head % fan == 0, D, 0)

    dp = tl.zeros([C, C], tl.float32)
    dp_t = tl.zeros([C, C], tl.float32)
    dq_far = tl.zeros([C, BD], tl.float32)
    dk_far = tl.zeros([C, BD], tl.float32)
    through = tl.zeros([BD], tl.float32)
    for block in range(0, DV, BV):
        column = block + tl.arange(0, BV)
        dos = read(do, batch, head, start, rows, inside, column, DV).to(KIND)
        vs = read(v, batch, key_head, start, rows, inside, column, DV).to(KIND)
        state = read_state(states, slot, state_head, state_heads, row, column, D, D, DV)
        dstate = read_state(dstates, slot, state_head, state_heads, row, column, limit, D, DV)
        dp = tl.dot(dos, tl.trans(vs), dp, input_precision=PRECISION)
        dp_t = tl.dot(vs, tl.trans(dos), dp_t, input_precision=PRECISION)
        dq_far = tl.dot(dos, tl.trans(state), dq_far, input_precision=PRECISION)
        dk_far = tl.dot(vs, tl.trans(dstate), dk_far, input_precision=PRECISION)
        if GATE > 0:
            through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    if MASS:
        dmasses = read_row(dmass, batch, head, start, rows, inside)
        at = (slot.to(tl.int64) * state_heads + state_head) * D + row
        found = tl.load(sums + at, mask=row < D, other=0.0)
        dfound = tl.load(dsums + at, mask=row < limit, other=0.0)
        dp += dmasses[:, None]
        dp_t += dmasses[None, :]
        dq_far += dmasses[:, None] * found[None, :]
        dk_far += dfound[None, :]
        if GATE > 0:
            through += found * dfound
    dq_far *= scale
    qs = read(q, batch, head, start, rows, inside, row, D).to(KIND)
    ks = read(k, batch, key_head, start, rows, inside, row, D).to(KIND)
    i = rows[:, None]
    j = rows[None, :]

    if GATE == 2:
        dq_near = tl.zeros([C, BD], tl.float32)
        dk_near = tl.zeros([C, BD], tl.float32)
        own = tl.sum(tl.where(i == j, dp, 0.0), 1)[:, None] * scale
        # Symmetric, so that one product with x_t is dq of the late tokens and dk of the early.
        dp = tl.where(i > j, dp, dp_t) * scale
        gates = read(g, batch, state_head, start, rows, inside, row, D).to(tl.float32)
        high, low = halves(gates, KIND, PRECISION)
        for level in range(LEVELS):
            late = ((rows & (1 << level)) != 0)[:, None]
            left = tl.exp(summed(towards_middle(rows, 1 << level), high, low, KIND, PRECISION))
            met_at = (tl.where(late, qs, ks).to(tl.float32) * left).to(KIND)
            pairs = tl.where(met(rows, 1 << level), dp, 0.0).to(KIND)
            found_near = tl.dot(pairs, met_at, input_precision=PRECISION) * left
            dq_near += tl.where(late, found_near, 0.0)
            dk_near += tl.where(late, 0.0, found_near)
        dq_far *= tl.exp(summed(i >= j, high, low, KIND, PRECISION))
        dk_far *= tl.exp(summed(i < j, high, low, KIND, PRECISION))
        through *= tl.exp(tl.sum(gates, 0))
    else:
        if GATE == 1:
            gate = read_row(g, batch, state_head, start, rows, inside)
            follows = (rows + 1 < C) & (tokens + 1 < end)
            dq_far *= prefix(gate)[:, None]
            dk_far *= suffix(read_row(g, batch, state_head, start + 1, rows, follows))[:, None]
            through *= tl.exp(tl.sum(gate, 0))
            dp *= between(gate, rows, False)
            dp_t *= between(gate, rows, True)
        else:
            dp = tl.where(i >= j, dp, 0.0)
            dp_t = tl.where(i <= j, dp_t, 0.0)
        dq_near = tl.dot((dp * scale).to(KIND), ks, input_precision=PRECISION)
        dk_near = tl.dot((dp_t * scale).to(KIND), qs, input_precision=PRECISION)
        own = 0.0
    wide_q = qs.to(tl.float32)
    wide_k = ks.to(tl.float32)
    if GATE == 1:
        out = tl.sum(wide_q * dq_far, 1)
        held = tl.sum(wide_k * dk_far, 1)
        pairs = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * tl.where(i > j, dp, 0.0) * scale
        crossing = tl.sum(tl.where(i >= j, tl.cumsum(pairs, 1) - pairs, 0.0), 0)
        flow = tl.sum(through, 0) + tl.cumsum(out, 0, reverse=True) + tl.cumsum(held, 0) - held + crossing
        tl.store(place(dg, batch, head, start) + (rows * dg.stride_n + tile), flow, mask=inside)
    elif GATE == 2:
        out = wide_q * dq_far
        held = wide_k * (dk_far + dk_near) - wide_q * dq_near
        flow = through[None, :] + tl.cumsum(out, 0, reverse=True) + tl.cumsum(held, 0) - held
        write(dg, batch, head, start, rows, inside, row, flow, D)
    write(dq, batch, head, start, rows, inside, row, dq_far + dq_near + own * wide_k, D)
    write(dk, batch, head, start, rows, inside, row, dk_far + dk_near + own * wide_q, D)
