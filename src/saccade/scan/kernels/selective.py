"""The selective scan and its gradients: decay, state and reading in one kernel, so that no state leaves the registers.

    h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t,     y_t = C_t . h_t

A program is one warp. It takes K blocks of L channels of a group and goes from token to token; the states of a block
are a tile [PAD, L]. With L = 32 a lane has all states of its channel, and a sum over them needs no other lane; with
L = 8 four lanes share a channel, and sums over channels, which gradients of B and C are, need 3 exchanges of a quarter
of the states, K blocks having been added before. The gradient is the walk in reverse, g_t = dy_t C_t + decay_(t+1)
g_(t+1), beside the states, which are found again from those before every T tokens:

    dx_t = delta_t (g_t . B_t),   ddelta_t = x_t (g_t . B_t) + A . e_t,   e_t = decay_t g_t h_(t-1),
    dB_t = sum_c delta_t x_t g_t,   dC_t = sum_c dy_t h_t,   dA = sum_t delta_t e_t

Decays are powers of two, 2^(delta A log2 e).
"""

# mypy: disable-error-code="var-annotated"
# ruff: noqa: RUF005 - a kernel is written in the compiler's Python

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from saccade.scan.kernels.abreast import Launched

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# States lie channel by channel, aligned as is not said: if the compiler knew more it would lay tiles over the lanes as
# suits the one load of A, and exchange what is read of every token through shared memory.
counted = partial(
    Launched,
    do_not_specialize=["length", "each"],
    do_not_specialize_on_alignment=["a", "marks", "first", "last", "kept", "da"],
)


@triton.jit
def place(WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """(batch entry, block, its group, channel of all and of the group, entries before this program's states)."""
    blocks = tl.cdiv(WIDTH // G, K * L)
    batch = tl.program_id(0) // (blocks * G)
    group = tl.program_id(0) // blocks % G
    block = tl.program_id(0) % blocks
    within = block * (K * L) + tl.arange(0, L)
    slot = (batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (WIDTH * S)
    return batch, block, group, group * (WIDTH // G) + within, within, slot


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
def states_of(
    x, at, k: tl.constexpr, channel, within,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Block k of states (S, WIDTH) from `at` on, or zeros where x is None."""
    found = tl.zeros([PAD, L], tl.float32)
    if x is not None:
        state = tl.arange(0, PAD)
        mask = (state < S)[:, None] & exist(within, k, WIDTH, G, K, L)[None, :]
        found += tl.load(x + at + state[:, None] * WIDTH + (channel + k * L)[None, :], mask=mask, other=0.0)
    return found


@triton.jit
def keep_states(
    x, at, k: tl.constexpr, tile, channel, within,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The reverse of `states_of`."""
    if x is not None:
        state = tl.arange(0, PAD)
        mask = (state < S)[:, None] & exist(within, k, WIDTH, G, K, L)[None, :]
        tl.store(x + at + state[:, None] * WIDTH + (channel + k * L)[None, :], tile, mask=mask)


@triton.jit
def single(x):
    """x as float32; of bfloat16 by its bits, half the instructions that the compiler takes for a pair of numbers."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def channels_of(
    x, u: tl.constexpr, inside, within, WIDTH: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr
):
    """K blocks of token u, float32, x pointing at the first of these; zeros where it is not inside."""
    found = ()
    for k in tl.static_range(K):
        mask = known(within, k, inside, WIDTH, G, K, L)
        found = found + (single(tl.load(x + (u * WIDTH + k * L), mask=mask, other=0.0)),)
    return found


@triton.jit
def shared_of(x, u: tl.constexpr, inside, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr):
    """Token u of x (N, G, S), float32, x pointing at its states; zeros where it is not inside."""
    return single(tl.load(x + u * (G * S), mask=both(tl.arange(0, PAD) < S, inside), other=0.0))


@triton.jit
def token_of(
    x, delta, b, c, u: tl.constexpr, inside, within,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(delta, x, B, C) of token u, B for a C that is None; zeros where it is not inside, which change no state."""
    steps, xs = channels_of(delta, u, inside, within, WIDTH, G, K, L), channels_of(x, u, inside, within, WIDTH, G, K, L)
    writes = shared_of(b, u, inside, G, S, PAD)
    reads = writes
    if c is not None:
        reads = shared_of(c, u, inside, G, S, PAD)
    return steps, xs, writes, reads


@counted
def selective_walk(
    x, delta, a, b, c, first, last, kept, y, marks, length, each, T: tl.constexpr, AHEAD: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One batch entry, K L channels of one of G groups and one stretch of the tokens, `each` but for the last.

    x, delta, y (batch, N, WIDTH), b, c (batch, N, G, S), in any dtype; states float32: a (S, WIDTH), first (batch,
    stretches, S, WIDTH): before each stretch, or None; last likewise: after each. y: None, and c with it, where only
    states are wanted; kept like last, what is left of a stretch's start at its end; marks (batch, tiles of T, S,
    WIDTH): before each tile. T tokens are unrolled; what a token needs is loaded AHEAD tokens before.
    """
    batch, _, group, channel, within, slot = place(WIDTH, G, S, K, L)
    low = tl.program_id(1) * each
    high = tl.minimum(low + each, length)
    token = batch * tl.cast(length, tl.int64) + low
    state = group * S + tl.arange(0, PAD)
    x += token * WIDTH + channel
    delta += token * WIDTH + channel
    b += token * (G * S) + state
    if y is not None:
        y += token * WIDTH + channel
        c += token * (G * S) + state
    rates, h, passed = (), (), ()
    for k in tl.static_range(K):
        rates = rates + (states_of(a, 0, k, channel, within, WIDTH, G, S, PAD, K, L) * LOG2E,)
        h = h + (states_of(first, slot, k, channel, within, WIDTH, G, S, PAD, K, L),)
        passed = passed + (tl.zeros([L], tl.float32),)
    ahead = ()
    for u in tl.static_range(AHEAD):
        ahead = ahead + (token_of(x, delta, b, c, u, low + u < high, within, WIDTH, G, S, PAD, K, L),)
    for start in range(low, high, T):
        if marks is not None:
            tile = (batch.to(tl.int64) * tl.cdiv(length, T) + start // T) * (WIDTH * S)
            for k in tl.static_range(K):
                keep_states(marks, tile, k, h[k], channel, within, WIDTH, G, S, PAD, K, L)
        for u in tl.static_range(T):
            inside = start + u + AHEAD < high
            ahead = ahead + (token_of(x, delta, b, c, u + AHEAD, inside, within, WIDTH, G, S, PAD, K, L),)
            steps, xs, writes, reads = ahead[0]
            ahead = ahead[1:]
            states, sums = (), ()
            for k in tl.static_range(K):
                tile = tl.exp2(steps[k][None, :] * rates[k]) * h[k] + (steps[k] * xs[k])[None, :] * writes[:, None]
                states = states + (tile,)
                sums = sums + (passed[k] + steps[k],)
                if y is not None:
                    mask = known(within, k, start + u < high, WIDTH, G, K, L)
                    tl.store(y + (u * WIDTH + k * L), tl.sum(tile * reads[:, None], 0), mask=mask)
            h, passed = states, sums
        x += T * WIDTH
        delta += T * WIDTH
        b += T * G * S
        if y is not None:
            y += T * WIDTH
            c += T * G * S
    for k in tl.static_range(K):
        keep_states(last, slot, k, h[k], channel, within, WIDTH, G, S, PAD, K, L)
        left = tl.exp2(passed[k][None, :] * rates[k])
        keep_states(kept, slot, k, left, channel, within, WIDTH, G, S, PAD, K, L)


@counted
def selective_pull(
    x, delta, a, b, c, dy, marks, first, last, kept, dx, ddelta, da, db, dc, length, each, T: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradients, from the last tile of a stretch to its first; stretches and states in the order of this walk.

    first: the gradient of the state after each stretch, from what is later, or None; last: of that before it. marks,
    and with it all but delta, a, c, dy: None where only states are wanted. dx, ddelta (batch, N, WIDTH), in any dtype;
    float32: da (batch, stretches, S, WIDTH), db, dc (blocks, batch, N, G, S): the part of each K L channels.
    """
    batch, block, group, channel, within, slot = place(WIDTH, G, S, K, L)
    low = (tl.num_programs(1) - 1 - tl.program_id(1)) * each
    high = tl.minimum(low + each, length)
    tiles = tl.cdiv(tl.maximum(high - low, 0), T)
    start = low + (tiles - 1) * T
    token = batch * tl.cast(length, tl.int64) + start
    shared = token * (G * S) + group * S + tl.arange(0, PAD)
    delta += token * WIDTH + channel
    dy += token * WIDTH + channel
    c += shared
    if marks is not None:
        x += token * WIDTH + channel
        dx += token * WIDTH + channel
        ddelta += token * WIDTH + channel
        b += shared
        batches = tl.num_programs(0) // (G * tl.cdiv(WIDTH // G, K * L))
        part = block * (batches * tl.cast(length, tl.int64) * (G * S))
        db += part + shared
        dc += part + shared
    rates, later, passed, found = (), (), (), ()
    for k in tl.static_range(K):
        rates = rates + (states_of(a, 0, k, channel, within, WIDTH, G, S, PAD, K, L) * LOG2E,)
        later = later + (states_of(first, slot, k, channel, within, WIDTH, G, S, PAD, K, L),)
        passed = passed + (tl.zeros([L], tl.float32),)
        found = found + (tl.zeros([PAD, L], tl.float32),)
    for _ in range(tiles):
        steps, dys, reads, xs, writes, decays, states = (), (), (), (), (), (), ()
        for u in tl.static_range(T):
            inside = start + u < high
            steps = steps + (channels_of(delta, u, inside, within, WIDTH, G, K, L),)
            dys = dys + (channels_of(dy, u, inside, within, WIDTH, G, K, L),)
            reads = reads + (shared_of(c, u, inside, G, S, PAD),)
            if marks is not None:
                xs = xs + (channels_of(x, u, inside, within, WIDTH, G, K, L),)
                writes = writes + (shared_of(b, u, inside, G, S, PAD),)
        if marks is not None:
            tile = (batch.to(tl.int64) * tl.cdiv(length, T) + start // T) * (WIDTH * S)
            for k in tl.static_range(K):
                states = states + (states_of(marks, tile, k, channel, within, WIDTH, G, S, PAD, K, L),)
        for u in tl.static_range(T):
            for k in tl.static_range(K):
                decays = decays + (tl.exp2(steps[u][k][None, :] * rates[k]),)
                if marks is not None:
                    push = (steps[u][k] * xs[u][k])[None, :] * writes[u][:, None]
                    states = states + (decays[u * K + k] * states[u * K + k] + push,)
        for back in tl.static_range(1, T + 1):
            inside = start + (T - back) < high
            earlier, sums, totals = (), (), ()
            for k in tl.static_range(K):
                step = steps[T - back][k]
                pull = later[k] + dys[T - back][k][None, :] * reads[T - back][:, None]
                past = decays[(T - back) * K + k] * pull
                earlier = earlier + (past,)
                sums = sums + (passed[k] + step,)
                if marks is not None:
                    moved = xs[T - back][k]
                    pushed = tl.sum(pull * writes[T - back][:, None], 0)
                    past *= states[(T - back) * K + k]
                    totals = totals + (found[k] + past * step[None, :],)
                    mask = known(within, k, inside, WIDTH, G, K, L)
                    at = (T - back) * WIDTH + k * L
                    tl.store(dx + at, step * pushed, mask=mask)
                    tl.store(ddelta + at, moved * pushed + tl.sum(past * rates[k], 0) * LN2, mask=mask)
                    pull *= (step * moved)[None, :]
                    read = states[(T + 1 - back) * K + k] * dys[T - back][k][None, :]
                    if k == 0:
                        to_write, to_read = pull, read
                    else:
                        to_write += pull
                        to_read += read
            later, passed = earlier, sums
            if marks is not None:
                found = totals
                mask = both(tl.arange(0, PAD) < S, inside)
                tl.store(db + (T - back) * (G * S), tl.sum(to_write, 1), mask=mask)
                tl.store(dc + (T - back) * (G * S), tl.sum(to_read, 1), mask=mask)
        start -= T
        delta -= T * WIDTH
        dy -= T * WIDTH
        c -= T * G * S
        if marks is not None:
            x -= T * WIDTH
            dx -= T * WIDTH
            ddelta -= T * WIDTH
            b -= T * G * S
            db -= T * G * S
            dc -= T * G * S
    for k in tl.static_range(K):
        keep_states(da, slot, k, found[k], channel, within, WIDTH, G, S, PAD, K, L)
        keep_states(last, slot, k, later[k], channel, within, WIDTH, G, S, PAD, K, L)
        left = tl.exp2(passed[k][None, :] * rates[k])
        keep_states(kept, slot, k, left, channel, within, WIDTH, G, S, PAD, K, L)
