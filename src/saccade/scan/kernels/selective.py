"""The selective scan and its gradients: decay, state and reading in one kernel, so that no state leaves the registers.

    h_t = exp(d_t A) h_(t-1) + d_t x_t B_t,     y_t = (C_t . h_t + D x_t) silu(z_t),     d_t = softplus(delta_t + bias)

What of bias, softplus, D and z is not given is not compiled either, and then d_t = delta_t, y_t = C_t . h_t.

A program is one warp, which goes from token to token; the states of L channels of a group are a tile [PAD, L]. With L =
32 a lane has all states of its channel, and a sum over them needs no other lane. The walk back takes K blocks of 8
channels, [PAD, K, L]: four lanes share a channel, of each block, and sums over channels, which gradients of B and C
are, need 3 exchanges of a quarter of the states, blocks having been added before. It is the walk in reverse, g_t =
p_t C_t + decay_(t+1) g_(t+1), where p_t = dy_t silu(z_t), beside the states, which are found again from those before
every T tokens:

    dx_t = d_t (g_t . B_t) + D p_t,   dd_t = x_t (g_t . B_t) + A . e_t,   e_t = decay_t g_t h_(t-1),
    dB_t = sum_c d_t x_t g_t,   dC_t = sum_c p_t h_t,   dA = sum_t d_t e_t,   dD = sum_t p_t x_t,
    ddelta_t = dd_t sigmoid(delta_t + bias),   dbias = sum_t ddelta_t,   dz_t = dy_t (C_t . h_t + D x_t) silu'(z_t)

Decays are powers of two, 2^(d A log2 e). One such power a state, channel and token is what the arithmetic unit for them
does most slowly, and bounds the walk; where few warps share a scheduler, loads that are waited for bound it.
"""

# mypy: disable-error-code="var-annotated"
# ruff: noqa: RUF005 - a kernel is written in the compiler's Python

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from saccade.scan.kernels import interpreted
from saccade.scan.kernels.abreast import Launched

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(4)  # rounds from a fetch to its use
SECTOR = tl.constexpr(32)  # bytes that come from memory together
FETCHES = tl.constexpr(torch.version.hip is None and not interpreted())

# States lie channel by channel, aligned as is not said: if the compiler knew more it would lay tiles over the lanes as
# suits the one load of A, and exchange what is read of every token through shared memory.
counted = partial(
    Launched,
    do_not_specialize=["length", "each", "begin", "stretches", "begun"],
    do_not_specialize_on_alignment=["a", "bias", "direct", "marks", "first", "last", "kept", "da", "dbias", "ddirect"],
)


@triton.jit
def place(slot, slots, WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr):
    """(batch entry, block of so many channels of a group, its group, entries before this slot of the entry's)."""
    blocks = tl.cdiv(WIDTH // G, CHANNELS)
    batch = tl.program_id(0) // (blocks * G)
    group = tl.program_id(0) // blocks % G
    block = tl.program_id(0) % blocks
    return batch, block, group, (batch.to(tl.int64) * slots + slot) * (WIDTH * S)


@triton.jit
def both(some, inside):
    """Of many and of one; not by "and", by which the interpreter makes numbers of them."""
    return tl.where(inside, some, False)


@triton.jit
def exist(within, WIDTH: tl.constexpr, G: tl.constexpr, CHANNELS: tl.constexpr):
    """Which channels of a block there are in the group."""
    if (WIDTH // G) % CHANNELS == 0:
        return within >= 0
    else:
        return within < WIDTH // G


@triton.jit
def loaded(x, at, mask):
    """float32; zeros where the mask says so, or x is None."""
    found = tl.zeros(at.shape, tl.float32)
    if x is not None:
        found += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def keep(x, at, values, mask):
    """The reverse of `loaded`."""
    if x is not None:
        tl.store(x + at, values, mask=mask)


@triton.jit
def single(x):
    """x as float32; of bfloat16 by its bits, half the instructions that the compiler takes for a pair of numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + t) with t = e^-|x|, the latter as t P(t), off by 1.7e-7 of it at most.

    Where t is small the logarithm of a GPU has no digits.
    """
    t = tl.exp(-tl.abs(x))
    series = t * 0.0052326927 - 0.0295052325
    series = series * t + 0.0782259417
    series = series * t - 0.136632449
    series = series * t + 0.191060064
    series = series * t - 0.248429821
    series = series * t + 0.333190968
    series = series * t - 0.499994931
    series = series * t + 1.0
    return tl.maximum(x, 0.0) + t * series


@triton.jit
def silu(x):
    """x sigmoid(x) and its slope."""
    sigmoid = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def step_of(delta, bias, offset, inside, SOFTPLUS: tl.constexpr):
    """d, `offset` the bias where there is one; zero where it is not inside, which changes no state."""
    if bias is not None:
        delta += offset
    if SOFTPLUS:
        delta = softplus(delta)
    if SOFTPLUS or bias is not None:
        delta = tl.where(inside, delta, 0.0)
    return delta


@triton.jit
def fetch(x, rows, columns, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Bring these rows of x, so many columns, COLUMNS at most, a power of two, into the second-level cache.

    The assembler sends a load for the next round off where a register becomes free, too late for what is in memory.
    """
    if FETCHES and x is not None:
        EACH: tl.constexpr = SECTOR // (x.dtype.element_ty.primitive_bitwidth // 8)
        sectors = tl.minimum(tl.arange(0, max(1, COLUMNS // EACH)) * EACH, columns - 1)
        at = x + (rows.to(tl.int64)[:, None] * STRIDE + sectors[None, :])
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def token_of(x, delta, z, dy, b, c, u, known, states, ROW: tl.constexpr, VECTOR: tl.constexpr):
    """(delta, x, z, dy, B, C), u tokens from there, x for a z or dy that is None, B for a C; zeros but where known."""
    step = single(tl.load(delta + u * ROW, mask=known, other=0.0))
    value = single(tl.load(x + u * ROW, mask=known, other=0.0))
    write = single(tl.load(b + u * VECTOR, mask=states, other=0.0))
    gate, pull, read = value, value, write
    if z is not None:
        gate = single(tl.load(z + u * ROW, mask=known, other=0.0))
    if dy is not None:
        pull = single(tl.load(dy + u * ROW, mask=known, other=0.0))
    if c is not None:
        read = single(tl.load(c + u * VECTOR, mask=states, other=0.0))
    return step, value, gate, pull, write, read


@counted
def selective_walk(
    x, delta, z, dy, a, b, c, bias, direct, first, last, kept, y, steps, pulls, marks, length, each, begin,
    stretches, begun, BACK: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One batch entry, L channels of one of G groups and one stretch, from number `begin` on, of `each` tokens.

    x, delta, z, y (batch, N, WIDTH), b, c (batch, N, G, S), bias, direct (WIDTH,), in any dtype; states, float32: a (S,
    WIDTH), first (batch, begun, S, WIDTH): before so many stretches, with nothing before the others; last (batch,
    stretches, S, WIDTH): after each; kept likewise, what is left of a stretch's start at its end where that is not in
    last already. y, and c, z, direct with it: None where only states are wanted.

    For gradients: marks (batch, rounds, S, WIDTH): the states before each T tokens; steps, float32 like x: d, or None
    where that is delta; and where there is a gate, dy of its results: then y is dz, and pulls, float32, dy silu(z).

    BACK: from the last token to the first, g_t = decay_t (g_(t+1) + p_t C_t), with d for delta, p for x, C for b;
    stretches and states in the order of this walk.

    A round takes T tokens, while what the next one needs is loaded. EVEN: T divides the length; nothing needs a mask.
    """
    stretch = begin + tl.program_id(1)
    batch, block, group, slot = place(stretch, stretches, WIDTH, G, S, L)
    within = block * L + tl.arange(0, L)
    channel, exists = group * (WIDTH // G) + within, exist(within, WIDTH, G, L)
    some = tl.arange(0, PAD) < S
    entries, known = (tl.arange(0, PAD) * WIDTH)[:, None] + channel[None, :], some[:, None] & exists[None, :]
    low = stretch * each
    if BACK:
        low = (stretches - 1 - stretch) * each
    count = tl.minimum(each, length - low)
    token = batch * tl.cast(length, tl.int64) + low
    ROW: tl.constexpr = -WIDTH if BACK else WIDTH
    VECTOR: tl.constexpr = -G * S if BACK else G * S
    if BACK:
        token += count - 1
    at, vector = token * WIDTH + channel, token * (G * S) + group * S + tl.arange(0, PAD)
    columns = tl.minimum(WIDTH // G - block * L, L)
    here, shared = token * WIDTH + group * (WIDTH // G) + block * L, token * (G * S) + group * S
    x_far, delta_far, b_far = x + here, delta + here, b + shared
    z_far, dy_far, c_far = z, dy, c
    x += at
    delta += at
    b += vector
    if z is not None:
        z_far += here
        z += at
    if dy is not None:
        dy_far += here
        dy += at
        pulls += at
    if steps is not None:
        steps += at
    if y is not None:
        c_far += shared
        c += vector
        y += at
    rates = loaded(a, entries, known) * LOG2E
    given = (batch.to(tl.int64) * begun + tl.minimum(stretch, begun - 1)) * (WIDTH * S)
    h = tl.where(stretch < begun, loaded(first, given + entries, known), 0.0)
    offset, straight = loaded(bias, channel, exists), loaded(direct, channel, exists)
    passed, taken = tl.zeros([L], tl.float32), ()
    for u in tl.static_range(T):
        inside = u < count
        taken = taken + (token_of(x, delta, z, dy, b, c, u, both(exists, inside), both(some, inside), ROW, VECTOR),)
    for start in range(0, count, T):
        on = T
        if EVEN:  # behind the last round it is loaded again
            on = tl.where(start + T < count, T, 0)
        x += on * ROW
        delta += on * ROW
        b += on * VECTOR
        if z is not None:
            z += on * ROW
        if dy is not None:
            dy += on * ROW
        if y is not None:
            c += on * VECTOR
        rows = tl.minimum(start + FAR * T + tl.arange(0, T), count - 1)
        fetch(x_far, rows, columns, ROW, L)
        fetch(delta_far, rows, columns, ROW, L)
        fetch(z_far, rows, columns, ROW, L)
        fetch(dy_far, rows, columns, ROW, L)
        fetch(b_far, rows, S, VECTOR, PAD)
        fetch(c_far, rows, S, VECTOR, PAD)
        ahead, results = (), ()  # stored behind the last of the loads, which would wait for them
        in_all = tl.zeros([L], tl.float32)
        for u in tl.static_range(T):
            more = EVEN or start + T + u < count
            ahead = ahead + (token_of(x, delta, z, dy, b, c, u, both(exists, more), both(some, more), ROW, VECTOR),)
        if marks is not None:
            tile = (batch.to(tl.int64) * tl.cdiv(length, T) + (low + start) // T) * (WIDTH * S)
            keep(marks, tile + entries, h, known)
        for u in tl.static_range(T):
            step, value, gate, pull, write, read = taken[u]
            step = step_of(step, bias, offset, EVEN or start + u < count, SOFTPLUS)
            found, pulled = step, step
            decay = tl.exp2(step[None, :] * rates)
            if BACK:
                h = decay * (h + value[None, :] * write[:, None])
            else:
                h = decay * h + (step * value)[None, :] * write[:, None]
            in_all += step
            if y is not None:
                found = tl.sum(h * read[:, None], 0)
                if direct is not None:
                    found += straight * value
                if z is not None:
                    gate, slope = silu(gate)
                    if dy is None:
                        found *= gate
                    else:
                        found *= pull * slope
                        pulled = pull * gate
            results = results + ((step, found, pulled),)
        passed += in_all
        for u in tl.static_range(T):
            step, found, pulled = results[u]
            mask = both(exists, EVEN or start + u < count)
            if steps is not None:
                tl.store(steps + u * WIDTH, step, mask=mask)
            if dy is not None:
                tl.store(pulls + u * WIDTH, pulled, mask=mask)
            if y is not None:
                tl.store(y + u * WIDTH, found, mask=mask)
        if dy is not None:
            pulls += T * WIDTH
        if steps is not None:
            steps += T * WIDTH
        if y is not None:
            y += T * WIDTH
        taken = ahead
    keep(last, slot + entries, h, known)
    keep(kept, slot + entries, tl.where(stretch < begun, 0.0, tl.exp2(passed[None, :] * rates)), known)


# Pointers that a loop hands on, round by round, take the compiler no time. For any other it goes over all that a load
# or store is connected with, and for each of these over the same again, to choose how it lies over the lanes.


@triton.jit
def spread(pointers, T: tl.constexpr, STRIDE: tl.constexpr):
    """For each of them, those of T tokens from there on."""
    found = ()
    for i in tl.static_range(len(pointers)):
        tokens = ()
        for u in tl.static_range(T):
            tokens = tokens + (pointers[i] + u * STRIDE,)
        found = found + (tokens,)
    return found


@triton.jit
def shift(pointers, by):
    """All of them, by so many entries."""
    found = ()
    for i in tl.static_range(len(pointers)):
        found = found + (pointers[i] + by,)
    return found


@counted
def selective_pull(
    x, delta, steps, a, b, c, bias, direct, pulls, marks, first, last, dx, ddelta, da, db, dc, dbias, ddirect,
    length, each, T: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradients, from the last tile of a stretch to its first; stretches and states in the order of this walk.

    steps, pulls: d and p, which the walk left. first: the gradient of the state after each stretch, from what is later;
    last: of that before it.
    dx, ddelta (batch, N, WIDTH), in any dtype; float32: da (batch, stretches, S, WIDTH), dbias, ddirect (batch,
    stretches, WIDTH), db, dc (blocks, batch, N, G, S): the part of each K L channels. EVEN: T divides the length.
    """
    batch, block, group, slot = place(tl.program_id(1), tl.num_programs(1), WIDTH, G, S, K * L)
    within = block * (K * L) + tl.arange(0, K)[:, None] * L + tl.arange(0, L)[None, :]
    channel, exists = group * (WIDTH // G) + within, exist(within, WIDTH, G, K * L)
    some = tl.arange(0, PAD) < S
    entries = (tl.arange(0, PAD) * WIDTH)[:, None, None] + channel[None, :, :]
    known = some[:, None, None] & exists[None, :, :]
    low = (tl.num_programs(1) - 1 - tl.program_id(1)) * each
    high = tl.minimum(low + each, length)
    rounds = tl.cdiv(tl.maximum(high - low, 0), T)
    start = low + (rounds - 1) * T
    token, origin = batch * tl.cast(length, tl.int64) + start, batch * tl.cast(length, tl.int64) + low
    mark = batch.to(tl.int64) * tl.cdiv(length, T)
    columns = tl.minimum(WIDTH // G - block * (K * L), K * L)
    here, shared = origin * WIDTH + group * (WIDTH // G) + block * (K * L), origin * (G * S) + group * S
    x_far, delta_far, steps_far, pulls_far = x + here, delta + here, steps + here, pulls + here
    b_far, c_far = b + shared, c + shared
    marks_far = marks + ((mark + low // T) * (WIDTH * S) + group * (WIDTH // G) + block * (K * L))
    at, vector = token * WIDTH + channel, token * (G * S) + group * S + tl.arange(0, PAD)
    batches = tl.num_programs(0) // (G * tl.cdiv(WIDTH // G, K * L))
    part = vector + block * (batches * tl.cast(length, tl.int64) * (G * S))
    rows = x + at, delta + at, steps + at, pulls + at, dx + at, ddelta + at
    vectors = b + vector, c + vector, db + part, dc + part
    marks_at = marks + ((mark + start // T) * (WIDTH * S) + entries)
    x_at, delta_at, steps_at, pulls_at, dx_at, ddelta_at = spread(rows, T, WIDTH)
    b_at, c_at, db_at, dc_at = spread(vectors, T, G * S)
    rates, later = loaded(a, entries, known) * LOG2E, loaded(first, slot + entries, known)
    offset, straight = loaded(bias, channel, exists), loaded(direct, channel, exists)
    found = tl.zeros([PAD, K, L], tl.float32)
    to_bias, to_direct = tl.zeros([K, L], tl.float32), tl.zeros([K, L], tl.float32)
    for _ in range(rounds):
        # As they come: what is made of a load waits for it, and all loads are sent off before that.
        states, decays, results, to_reads = (tl.load(marks_at, mask=known, other=0.0),), (), (), ()
        ds, ps, xs, deltas, writes, reads = (), (), (), (), (), ()
        for u in tl.static_range(T):
            inside = EVEN or start + u < high
            ds = ds + (tl.load(steps_at[u], mask=both(exists, inside), other=0.0),)
            ps = ps + (tl.load(pulls_at[u], mask=both(exists, inside), other=0.0),)
            reads = reads + (single(tl.load(c_at[u], mask=both(some, inside), other=0.0)),)
            xs = xs + (tl.load(x_at[u], mask=both(exists, inside), other=0.0),)
            writes = writes + (single(tl.load(b_at[u], mask=both(some, inside), other=0.0)),)
            if SOFTPLUS:
                deltas = deltas + (tl.load(delta_at[u], mask=both(exists, inside), other=0.0),)
        before = tl.maximum(start - T, low)
        tokens = before - low + tl.arange(0, T)
        if not EVEN:
            tokens = tl.minimum(tokens, high - low - 1)
        fetch(x_far, tokens, columns, WIDTH, K * L)
        fetch(steps_far, tokens, columns, WIDTH, K * L)
        fetch(pulls_far, tokens, columns, WIDTH, K * L)
        if SOFTPLUS:
            fetch(delta_far, tokens, columns, WIDTH, K * L)
        fetch(b_far, tokens, S, G * S, PAD)
        fetch(c_far, tokens, S, G * S, PAD)
        fetch(marks_far, (before - low) // T * S + tl.minimum(tl.arange(0, PAD), S - 1), columns, WIDTH, K * L)
        for u in tl.static_range(T):
            step, value = single(ds[u]), single(xs[u])
            decays = decays + (tl.exp2(step[None, :, :] * rates),)
            push = (step * value)[None, :, :] * writes[u][:, None, None]
            states = states + (decays[u] * states[u] + push,)
            to_reads = to_reads + (tl.sum(tl.sum(states[u + 1] * single(ps[u])[None, :, :], 1), 1),)
        for u in tl.static_range(T - 1, -1, -1):
            inside = EVEN or start + u < high
            step, value, p = single(ds[u]), single(xs[u]), single(ps[u])
            pull = later + p[None, :, :] * reads[u][:, None, None]
            later = decays[u] * pull
            pushed = tl.sum(pull * writes[u][:, None, None], 0)
            past = later * states[u]
            found += past * step[None, :, :]
            to_x, to_step = step * pushed, value * pushed + tl.sum(past * rates, 0) * LN2
            if direct is not None:
                to_x += straight * p
                to_direct += value * p
            if SOFTPLUS:  # sigmoid(v) = e^(v - softplus(v))
                to_step *= tl.exp2((single(deltas[u]) + offset - step) * LOG2E)
            if bias is not None:
                to_bias += tl.where(inside, to_step, 0.0)
            to_write = tl.sum(pull * (step * value)[None, :, :], 1)
            results = results + ((to_x, to_step, tl.sum(to_write, 1), to_reads[u]),)
        for u in tl.static_range(T - 1, -1, -1):  # behind the last of the exchanges, which would wait for them
            to_x, to_step, to_write, to_read = results[T - 1 - u]
            inside = EVEN or start + u < high
            mask = both(exists, inside)
            tl.store(dx_at[u], to_x, mask=mask)
            tl.store(ddelta_at[u], to_step, mask=mask)
            mask = both(some, inside)
            tl.store(db_at[u], to_write, mask=mask)
            tl.store(dc_at[u], to_read, mask=mask)
        rows, vectors = shift(rows, -T * WIDTH), shift(vectors, -T * G * S)
        marks_at -= S * WIDTH
        x_at, delta_at, steps_at, pulls_at, dx_at, ddelta_at = spread(rows, T, WIDTH)
        b_at, c_at, db_at, dc_at = spread(vectors, T, G * S)
        start -= T
    keep(da, slot + entries, found, known)
    keep(last, slot + entries, later, known)
    keep(dbias, slot // S + channel, to_bias, exists)
    keep(ddirect, slot // S + channel, to_direct, exists)
