"""The selective scan and its gradients: decay, state and reading in one kernel, so that no state leaves the registers.

    h_t = exp(d_t A) h_(t-1) + d_t x_t B_t,     y_t = (C_t . h_t + D x_t) silu(z_t),     d_t = softplus(delta_t + bias)

What of bias, softplus, D and z is not given is not compiled either, and then d_t = delta_t, y_t = C_t . h_t.

A program is one warp, which goes from token to token; the states of L channels of a group are a tile [PAD, L]. With L =
32 a lane has all states of its channel, and a sum over them needs no other lane. The walk back takes K blocks of 8
channels: four lanes share a channel, and sums over channels, which gradients of B and C are, need 3 exchanges of a
quarter of the states, blocks having been added before. It is the walk in reverse, g_t = p_t C_t + decay_(t+1) g_(t+1),
where p_t = dy_t silu(z_t), beside the states, which are found again from those before every T tokens:

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
def place(slot, slots, WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """(batch entry, block, its group, channel of all and of the group, entries before this slot of the entry's)."""
    blocks = tl.cdiv(WIDTH // G, K * L)
    batch = tl.program_id(0) // (blocks * G)
    group = tl.program_id(0) // blocks % G
    block = tl.program_id(0) % blocks
    within = block * (K * L) + tl.arange(0, L)
    own = (batch.to(tl.int64) * slots + slot) * (WIDTH * S)
    return batch, block, group, group * (WIDTH // G) + within, within, own


@triton.jit
def both(some, inside):
    """Of many and of one; not by "and", by which the interpreter makes numbers of them."""
    return tl.where(inside, some, False)


@triton.jit
def exist(within, k: tl.constexpr, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """Which channels of block k exist."""
    if (WIDTH // G) % (K * L) == 0:
        return within >= 0
    else:
        return within + k * L < WIDTH // G


@triton.jit
def known(within, k: tl.constexpr, inside, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """Which of them exist and are inside."""
    return both(exist(within, k, WIDTH, G, K, L), inside)


@triton.jit
def blocks(x, at, K: tl.constexpr, L: tl.constexpr):
    """Pointers at K blocks of x from `at` on; none where x is None."""
    found = ()
    if x is not None:
        for k in tl.static_range(K):
            found = found + (x + at + k * L,)
    return found


@triton.jit
def tiles_of(x, channel, WIDTH: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """The same, of states (S, WIDTH)."""
    return blocks(x, (tl.arange(0, PAD) * WIDTH)[:, None] + channel[None, :], K, L)


# Pointers that a loop hands on, round by round, take the compiler no time. For any other it goes over all that a load
# or store is connected with, and for each of these over the same again, to choose how it lies over the lanes.


@triton.jit
def spread(pointers, T: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """For each of `pointers`, tuples of one or none, the `blocks` of T tokens from there on."""
    found = ()
    for i in tl.static_range(len(pointers)):
        tokens = ()
        if len(pointers[i]) > 0:
            for u in tl.static_range(T):
                tokens = tokens + (blocks(pointers[i][0], u * STRIDE, K, L),)
        found = found + (tokens,)
    return found


@triton.jit
def shift(pointers, by):
    """All of them, by so many entries."""
    found = ()
    for i in tl.static_range(len(pointers)):
        moved = ()
        if len(pointers[i]) > 0:
            moved = moved + (pointers[i][0] + by,)
        found = found + (moved,)
    return found


@triton.jit
def states_of(
    x, k: tl.constexpr, within,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Block k of states, x their `tiles_of`, or zeros where there are none."""
    found = tl.zeros([PAD, L], tl.float32)
    if len(x) > 0:
        mask = (tl.arange(0, PAD) < S)[:, None] & exist(within, k, WIDTH, G, K, L)[None, :]
        found += tl.load(x[k], mask=mask, other=0.0)
    return found


@triton.jit
def keep_states(
    x, k: tl.constexpr, tile, within, inside,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The reverse of `states_of`, if inside."""
    if len(x) > 0:
        mask = (tl.arange(0, PAD) < S)[:, None] & known(within, k, inside, WIDTH, G, K, L)[None, :]
        tl.store(x[k], tile, mask=mask)


@triton.jit
def single(x):
    """x as float32; of bfloat16 by its bits, half the instructions that the compiler takes for a pair of numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def channels_of(x, inside, within, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """The `blocks` x of a token, float32; zeros where it is not inside."""
    found = ()
    for k in tl.static_range(K):
        found = found + (single(tl.load(x[k], mask=known(within, k, inside, WIDTH, G, K, L), other=0.0)),)
    return found


@triton.jit
def shared_of(x, inside, S: tl.constexpr, PAD: tl.constexpr):
    """What all channels share of a token, float32, x pointing at its states; zeros where it is not inside."""
    return single(tl.load(x, mask=both(tl.arange(0, PAD) < S, inside), other=0.0))


@triton.jit
def channel_of(x, k: tl.constexpr, within, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """Block k of `blocks` x, float32, or zeros where there are none."""
    found = tl.zeros([L], tl.float32)
    if len(x) > 0:
        found += tl.load(x[k], mask=exist(within, k, WIDTH, G, K, L), other=0.0).to(tl.float32)
    return found


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
def token_of(
    x, delta, z, dy, b, c, u, inside, within, ROW: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(delta, x, z, dy, B, C), u tokens from there, x for a z or dy that is None, B for a C; zeros if not inside."""
    step = channels_of(blocks(delta, u * ROW, 1, L), inside, within, WIDTH, G, 1, L)[0]
    value = channels_of(blocks(x, u * ROW, 1, L), inside, within, WIDTH, G, 1, L)[0]
    write = shared_of(b + u * VECTOR, inside, S, PAD)
    gate, pull, read = value, value, write
    if z is not None:
        gate = channels_of(blocks(z, u * ROW, 1, L), inside, within, WIDTH, G, 1, L)[0]
    if dy is not None:
        pull = channels_of(blocks(dy, u * ROW, 1, L), inside, within, WIDTH, G, 1, L)[0]
    if c is not None:
        read = shared_of(c + u * VECTOR, inside, S, PAD)
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
    batch, block, group, channel, within, slot = place(stretch, stretches, WIDTH, G, S, 1, L)
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
    rates = states_of(tiles_of(a, channel, WIDTH, PAD, 1, L), 0, within, WIDTH, G, S, PAD, 1, L) * LOG2E
    given = (batch.to(tl.int64) * begun + tl.minimum(stretch, begun - 1)) * (WIDTH * S)
    h = states_of(tiles_of(first, given + channel, WIDTH, PAD, 1, L), 0, within, WIDTH, G, S, PAD, 1, L)
    h = tl.where(stretch < begun, h, 0.0)
    offset = channel_of(blocks(bias, channel, 1, L), 0, within, WIDTH, G, 1, L)
    straight = channel_of(blocks(direct, channel, 1, L), 0, within, WIDTH, G, 1, L)
    passed, taken = tl.zeros([L], tl.float32), ()
    for u in tl.static_range(T):
        taken = taken + (token_of(x, delta, z, dy, b, c, u, u < count, within, ROW, VECTOR, WIDTH, G, S, PAD, L),)
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
            ahead = ahead + (token_of(x, delta, z, dy, b, c, u, more, within, ROW, VECTOR, WIDTH, G, S, PAD, L),)
        if marks is not None:
            tile = (batch.to(tl.int64) * tl.cdiv(length, T) + (low + start) // T) * (WIDTH * S)
            marks_at = tiles_of(marks, tile + channel, WIDTH, PAD, 1, L)
            keep_states(marks_at, 0, h, within, True, WIDTH, G, S, PAD, 1, L)
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
            mask = known(within, 0, EVEN or start + u < count, WIDTH, G, 1, L)
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
    keep_states(tiles_of(last, slot + channel, WIDTH, PAD, 1, L), 0, h, within, True, WIDTH, G, S, PAD, 1, L)
    left = tl.where(stretch < begun, 0.0, tl.exp2(passed[None, :] * rates))
    keep_states(tiles_of(kept, slot + channel, WIDTH, PAD, 1, L), 0, left, within, True, WIDTH, G, S, PAD, 1, L)


@triton.jit
def keep_channel(
    x, k: tl.constexpr, values, within, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr
):
    """The reverse of `channel_of`."""
    if len(x) > 0:
        tl.store(x[k], values, mask=exist(within, k, WIDTH, G, K, L))


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
    batch, block, group, channel, within, slot = place(tl.program_id(1), tl.num_programs(1), WIDTH, G, S, K, L)
    low = (tl.num_programs(1) - 1 - tl.program_id(1)) * each
    high = tl.minimum(low + each, length)
    tiles = tl.cdiv(tl.maximum(high - low, 0), T)
    start = low + (tiles - 1) * T
    token = batch * tl.cast(length, tl.int64) + start
    at, vector = token * WIDTH + channel, token * (G * S) + group * S + tl.arange(0, PAD)
    batches = tl.num_programs(0) // (G * tl.cdiv(WIDTH // G, K * L))
    part = vector + block * (batches * tl.cast(length, tl.int64) * (G * S))
    tile = (batch.to(tl.int64) * tl.cdiv(length, T) + start // T) * (WIDTH * S) + channel
    a_at, first_at = tiles_of(a, channel, WIDTH, PAD, K, L), tiles_of(first, slot + channel, WIDTH, PAD, K, L)
    da_at, last_at = tiles_of(da, slot + channel, WIDTH, PAD, K, L), tiles_of(last, slot + channel, WIDTH, PAD, K, L)
    origin = batch * tl.cast(length, tl.int64) + low
    columns = tl.minimum(WIDTH // G - block * (K * L), K * L)
    here, shared = origin * WIDTH + group * (WIDTH // G) + block * (K * L), origin * (G * S) + group * S
    x_far, delta_far, steps_far, pulls_far = x + here, delta + here, steps + here, pulls + here
    b_far, c_far = b + shared, c + shared
    first_mark = (batch.to(tl.int64) * tl.cdiv(length, T) + low // T) * (WIDTH * S)
    marks_far = marks + (first_mark + group * (WIDTH // G) + block * (K * L))
    own = slot // S + channel
    bias_at, direct_at = blocks(bias, channel, K, L), blocks(direct, channel, K, L)
    dbias_at, ddirect_at = blocks(dbias, own, K, L), blocks(ddirect, own, K, L)
    rows = blocks(x, at, 1, L), blocks(delta, at, 1, L), blocks(steps, at, 1, L), blocks(pulls, at, 1, L)
    rows = rows + (blocks(dx, at, 1, L), blocks(ddelta, at, 1, L))
    vectors = blocks(b, vector, 1, L), blocks(c, vector, 1, L), blocks(db, part, 1, L), blocks(dc, part, 1, L)
    kept_states = (tiles_of(marks, tile, WIDTH, PAD, 1, L),)
    x_at, delta_at, steps_at, pulls_at, dx_at, ddelta_at = spread(rows, T, WIDTH, K, L)
    b_at, c_at, db_at, dc_at = spread(vectors, T, G * S, 1, L)
    marks_at = spread(kept_states, 1, 0, K, L)
    rates, later, found, biases, directs, to_bias, to_direct = (), (), (), (), (), (), ()
    for k in tl.static_range(K):
        rates = rates + (states_of(a_at, k, within, WIDTH, G, S, PAD, K, L) * LOG2E,)
        later = later + (states_of(first_at, k, within, WIDTH, G, S, PAD, K, L),)
        found = found + (tl.zeros([PAD, L], tl.float32),)
        biases = biases + (channel_of(bias_at, k, within, WIDTH, G, K, L),)
        directs = directs + (channel_of(direct_at, k, within, WIDTH, G, K, L),)
        to_bias = to_bias + (tl.zeros([L], tl.float32),)
        to_direct = to_direct + (tl.zeros([L], tl.float32),)
    for _ in range(tiles):
        ds, ps, reads, xs, deltas, writes, decays, states = (), (), (), (), (), (), (), ()
        for u in tl.static_range(T):
            inside = EVEN or start + u < high
            ds = ds + (channels_of(steps_at[u], inside, within, WIDTH, G, K, L),)
            ps = ps + (channels_of(pulls_at[u], inside, within, WIDTH, G, K, L),)
            reads = reads + (shared_of(c_at[u][0], inside, S, PAD),)
            xs = xs + (channels_of(x_at[u], inside, within, WIDTH, G, K, L),)
            writes = writes + (shared_of(b_at[u][0], inside, S, PAD),)
            if SOFTPLUS:
                deltas = deltas + (channels_of(delta_at[u], inside, within, WIDTH, G, K, L),)
        for k in tl.static_range(K):
            states = states + (states_of(marks_at[0][0], k, within, WIDTH, G, S, PAD, K, L),)
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
            for k in tl.static_range(K):
                decays = decays + (tl.exp2(ds[u][k][None, :] * rates[k]),)
                push = (ds[u][k] * xs[u][k])[None, :] * writes[u][:, None]
                states = states + (decays[u * K + k] * states[u * K + k] + push,)
        for back in tl.static_range(1, T + 1):
            inside = EVEN or start + (T - back) < high
            earlier, totals, bias_sums, direct_sums = (), (), (), ()
            for k in tl.static_range(K):
                step, p, moved = ds[T - back][k], ps[T - back][k], xs[T - back][k]
                pull = later[k] + p[None, :] * reads[T - back][:, None]
                past = decays[(T - back) * K + k] * pull
                earlier = earlier + (past,)
                pushed = tl.sum(pull * writes[T - back][:, None], 0)
                past *= states[(T - back) * K + k]
                totals = totals + (found[k] + past * step[None, :],)
                mask = known(within, k, inside, WIDTH, G, K, L)
                to_x, to_step = step * pushed, moved * pushed + tl.sum(past * rates[k], 0) * LN2
                if direct is not None:
                    to_x += directs[k] * p
                    direct_sums = direct_sums + (to_direct[k] + moved * p,)
                if SOFTPLUS:  # sigmoid(v) = e^(v - softplus(v))
                    to_step *= tl.exp2((deltas[T - back][k] + biases[k] - step) * LOG2E)
                if bias is not None:
                    bias_sums = bias_sums + (to_bias[k] + tl.where(inside, to_step, 0.0),)
                tl.store(dx_at[T - back][k], to_x, mask=mask)
                tl.store(ddelta_at[T - back][k], to_step, mask=mask)
                pull *= (step * moved)[None, :]
                read = states[(T + 1 - back) * K + k] * p[None, :]
                if k == 0:
                    to_write, to_read = pull, read
                else:
                    to_write += pull
                    to_read += read
            later, found = earlier, totals
            if bias is not None:
                to_bias = bias_sums
            if direct is not None:
                to_direct = direct_sums
            mask = both(tl.arange(0, PAD) < S, inside)
            tl.store(db_at[T - back][0], tl.sum(to_write, 1), mask=mask)
            tl.store(dc_at[T - back][0], tl.sum(to_read, 1), mask=mask)
        rows, vectors = shift(rows, -T * WIDTH), shift(vectors, -T * G * S)
        kept_states = shift(kept_states, -S * WIDTH)
        x_at, delta_at, steps_at, pulls_at, dx_at, ddelta_at = spread(rows, T, WIDTH, K, L)
        b_at, c_at, db_at, dc_at = spread(vectors, T, G * S, 1, L)
        marks_at = spread(kept_states, 1, 0, K, L)
        start -= T
    for k in tl.static_range(K):
        keep_states(da_at, k, found[k], within, True, WIDTH, G, S, PAD, K, L)
        keep_states(last_at, k, later[k], within, True, WIDTH, G, S, PAD, K, L)
        keep_channel(dbias_at, k, to_bias[k], within, WIDTH, G, K, L)
        keep_channel(ddirect_at, k, to_direct[k], within, WIDTH, G, K, L)
