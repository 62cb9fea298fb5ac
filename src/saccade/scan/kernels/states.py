"""The states between chunks: one kernel that walks over them, forward or backward, and one that joins its stretches.

    S <- Diag(decay of the chunk) S + sum_t w_t x_t y_t^T,      sums <- decay sums + sum_t w_t x_t m_t

Forward x, y are keys and values, w_t what is left of token t at the chunk's end, m_t = 1; backward the walk goes from
the last chunk to the first, x, y are scaled queries and the gradients of outputs, w_t what is left of the chunk's start
at token t, m the gradients of the masses, and S becomes the gradient of the state.

S is kept transposed, so that of the two factors of a product the one that lies across its tokens comes from memory as
it is, and weights multiply the other: Triton 3.4 to 3.7 with its ptxas may form a transposed factor wrongly in a loop
if it was computed in registers. tests/scan/test_kernels.py would show it on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.tiles import prefix, read, read_row, stretch_of, suffix


@triton.jit
def scan_states(
    x, y, m, g, before, before_sums, after, after_sums, left, states, sums, cuts, scale, share, segments,
    D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, FAN: tl.constexpr,
    GATE: tl.constexpr, MASS: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One stretch of a sequence, one of `segments`, and a block (BD, BV) of its state a program.

    STORE: write what the state is before each chunk, and after the last one; otherwise only what the stretch adds
    (`after`) and keeps (`left`). before, before_sums: float32 (S * segments, heads, D, DV) and (..., D), or None.
    x head of state head s: s // share, or the FAN heads s FAN, ... together; x and y have one dtype, that of products.
    scale: of x. GATE: dims of a gate, 0 to 2.
    """
    TILES_V: tl.constexpr = (DV + BV - 1) // BV
    TILES: tl.constexpr = (D + BD - 1) // BD * TILES_V
    tile = tl.program_id(0) % TILES
    entry = tl.program_id(0) // TILES
    seq = entry // segments
    segment = entry % segments
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = tile // TILES_V * BD + tl.arange(0, BD)
    column = tile % TILES_V * BV + tl.arange(0, BV)
    limit = tl.where(tile % TILES_V == 0, D, 0)  # sums are the same in every tile of columns; one writes them
    batch, begin, end, chunks, first = stretch_of(cuts, seq, C)
    each = tl.cdiv(chunks, segments)
    rows = tl.arange(0, C)

    within = row[None, :] * DV + column[:, None]
    exists = (row < D)[None, :] & (column < DV)[:, None]
    state = tl.zeros([BV, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    kept = tl.full([BD], 1.0, tl.float32)
    if before is not None:
        state += tl.load(before + (entry * heads + head).to(tl.int64) * (D * DV) + within, mask=exists, other=0.0)
        if MASS:
            total += tl.load(before_sums + (entry * heads + head) * D + row, mask=row < D, other=0.0)
    for step in range(segment * each, tl.minimum(segment * each + each, chunks)):
        chunk = chunks - 1 - step if REVERSE else step
        if STORE:
            slot = ((first + chunk).to(tl.int64) * heads + head) * D
            tl.store(states + slot * DV + within, state.to(states.dtype.element_ty), mask=exists)
            if MASS:
                tl.store(sums + slot + row, total, mask=row < limit)
        start = begin + chunk * C
        tokens = start + rows
        inside = tokens < end
        # The gate of the token after each: sums over what follows a token leave its own gate out.
        follows = inside if REVERSE else (rows + 1 < C) & (tokens + 1 < end)
        ahead = start if REVERSE else start + 1
        if GATE == 1:
            gate = read_row(g, batch, head, ahead, rows, follows)
            weight = prefix(gate)[:, None] if REVERSE else suffix(gate)[:, None]
            lost = tl.exp(tl.sum(read_row(g, batch, head, start, rows, inside), 0))
            state *= lost
            total *= lost
            kept *= lost
        elif GATE == 2:
            gate = read(g, batch, head, ahead, rows, follows, row, D).to(tl.float32)
            weight = prefix(gate) if REVERSE else suffix(gate)
            lost = tl.exp(tl.sum(read(g, batch, head, start, rows, inside, row, D).to(tl.float32), 0))
            state *= lost[None, :]
            total *= lost
            kept *= lost
        for each_head in range(FAN):
            source = head * FAN + each_head
            ys = read(y, batch, source // share, start, rows, inside, column, DV)
            xs = read(x, batch, source // share, start, rows, inside, row, D)
            if GATE > 0:
                xs = xs.to(tl.float32) * weight
            if REVERSE:
                xs = xs.to(tl.float32) * scale
            state = tl.dot(tl.trans(ys), xs.to(ys.dtype), state, input_precision=PRECISION)
            if MASS:
                if m is not None:
                    xs = xs.to(tl.float32) * read_row(m, batch, source, start, rows, inside)[:, None]
                total += tl.sum(xs.to(tl.float32), 0)

    into = entry if not STORE else seq
    if not STORE or segment == segments - 1:
        slot = (into * heads + head).to(tl.int64) * D
        tl.store(after + slot * DV + within, state, mask=exists)
        if MASS:
            tl.store(after_sums + slot + row, total, mask=row < limit)
        if not STORE:
            tl.store(left + slot + row, kept, mask=row < limit)


@triton.jit
def join_segments(parts, left, before, segments, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """In place, from what each stretch adds (S * segments, heads, D, COLUMNS) to the state before it."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < D * COLUMNS
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    seq = tl.program_id(2)
    state = tl.zeros([BLOCK], tl.float32)
    if before is not None:
        state += tl.load(before + (seq * heads + head).to(tl.int64) * (D * COLUMNS) + entry, mask=inside, other=0.0)
    for segment in range(segments):
        slot = ((seq * segments + segment) * heads + head).to(tl.int64) * D
        added = tl.load(parts + slot * COLUMNS + entry, mask=inside, other=0.0)
        kept = tl.load(left + slot + entry // COLUMNS, mask=inside, other=0.0)
        tl.store(parts + slot * COLUMNS + entry, state, mask=inside)
        state = state * kept + added
