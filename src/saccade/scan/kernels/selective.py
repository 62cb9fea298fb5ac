"""The selective scan and its gradients: decay, state and reading in one kernel, so that no state leaves the registers.

    h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t,     y_t = C_t . h_t

A program takes a few channels and goes from tile to tile of a few tokens; within a tile the states of all tokens are
one associative scan of pairs (decay, addition). Its gradient is the scan in reverse, g_t = dy_t C_t + decay_(t+1)
g_(t+1), beside the states, which are found again from those at the start of each tile:

    dx_t = delta_t (g_t . B_t),   ddelta_t = x_t (g_t . B_t) + (g_t A) . (h_t - delta_t x_t B_t),
    dB_t = sum_c delta_t x_t g_t,   dC_t = sum_c dy_t h_t,   dA = sum_t delta_t g_t (h_t - delta_t x_t B_t)
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.abreast import Launched


@triton.jit
def combine(decay, addition, next_decay, next_addition):
    """Two steps as one, the first of them first."""
    return decay * next_decay, addition * next_decay + next_addition


@triton.jit
def program(length, groups, channels, T: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr):
    """(batch entry, group, channels, states, which of them exist, tokens a stretch) of this one."""
    stretches = tl.num_programs(2)
    blocks = tl.cdiv(channels, BC)
    group = tl.program_id(1) // blocks
    within = tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    known = within < channels
    state = tl.arange(0, PAD)
    each = tl.cdiv(tl.cdiv(length, T), stretches) * T
    return tl.program_id(0), group, group * channels + within, known, state, known[:, None] & (state < S)[None, :], each


@triton.jit
def tokens_of(x, batch, length, rows, inside, channel, known, width):
    """(T, BC) of x (batch, N, width), float32."""
    at = (batch.to(tl.int64) * length + rows)[:, None] * width + channel[None, :]
    return tl.load(x + at, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)


@triton.jit
def shared_of(x, batch, length, rows, inside, group, groups, state, S: tl.constexpr):
    """(T, PAD) of x (batch, N, G, S), float32."""
    at = ((batch.to(tl.int64) * length + rows) * groups + group)[:, None] * S + state[None, :]
    return tl.load(x + at, mask=inside[:, None] & (state < S)[None, :], other=0.0).to(tl.float32)


@Launched
def selective_walk(
    x, delta, a, b, c, first, last, kept, y, marks, length, groups, channels,
    T: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One batch entry, BC channels of one group and one stretch of the tokens a program.

    x, delta, y (batch, N, G channels), a (G channels, S), b, c (batch, N, G, S); first (batch, stretches, G channels,
    S): the state before each stretch, or None; last likewise: after each. y: None, and c with it, where only states are
    wanted; kept like last, what is left of a stretch's start at its end; marks (batch, tiles of T, G channels, S): the
    state before each tile. All but x float32.
    """
    batch, group, channel, known, state, exists, each = program(length, groups, channels, T, BC, S, PAD)
    width = groups * channels
    stretch = tl.program_id(2)
    at_state = channel[:, None] * S + state[None, :]
    rates = tl.load(a + at_state, mask=exists, other=0.0)
    slot = (batch.to(tl.int64) * tl.num_programs(2) + stretch) * (width * S)
    h = tl.zeros([BC, PAD], tl.float32)
    if first is not None:
        h += tl.load(first + slot + at_state, mask=exists, other=0.0)
    passed = tl.zeros([BC], tl.float32)
    low = stretch * each
    high = tl.minimum(low + each, length)
    inner = tl.arange(0, T)
    for start in range(low, high, T):
        rows = start + inner
        inside = rows < high
        if marks is not None:
            tile = batch.to(tl.int64) * tl.cdiv(length, T) + start // T
            tl.store(marks + tile * (width * S) + at_state, h, mask=exists)
        steps = tokens_of(delta, batch, length, rows, inside, channel, known, width)
        pushed = steps * tokens_of(x, batch, length, rows, inside, channel, known, width)
        writes = shared_of(b, batch, length, rows, inside, group, groups, state, S)
        decays = tl.exp(steps[:, :, None] * rates[None, :, :])
        left, added = tl.associative_scan((decays, pushed[:, :, None] * writes[:, None, :]), 0, combine)
        states = left * h[None, :, :] + added
        if y is not None:
            reads = shared_of(c, batch, length, rows, inside, group, groups, state, S)
            at = (batch.to(tl.int64) * length + rows)[:, None] * width + channel[None, :]
            tl.store(y + at, tl.sum(states * reads[:, None, :], 2), mask=inside[:, None] & known[None, :])
        h = tl.sum(tl.where((inner == T - 1)[:, None, None], states, 0.0), 0)
        passed += tl.sum(steps, 0)
    if last is not None:
        tl.store(last + slot + at_state, h, mask=exists)
    if kept is not None:
        tl.store(kept + slot + at_state, tl.exp(passed[:, None] * rates), mask=exists)


@Launched
def selective_pull(
    x, delta, a, b, c, dy, marks, first, last, kept, dx, ddelta, da, db, dc, length, groups, channels,
    T: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The gradients, from the last tile of a stretch to its first; stretches and states in the order of this walk.

    first: the gradient of the state after each stretch, from what is later, or None; last: of that before it. marks,
    and with it all but delta, a, c, dy: None where only states are wanted. dx, ddelta (batch, N, G channels), da
    (batch, stretches, G channels, S), db, dc (blocks, batch, N, G, S): the part of each block of channels. float32.
    """
    batch, group, channel, known, state, exists, each = program(length, groups, channels, T, BC, S, PAD)
    width = groups * channels
    stretch = tl.program_id(2)
    at_state = channel[:, None] * S + state[None, :]
    rates = tl.load(a + at_state, mask=exists, other=0.0)
    slot = (batch.to(tl.int64) * tl.num_programs(2) + stretch) * (width * S)
    later = tl.zeros([BC, PAD], tl.float32)
    if first is not None:
        later += tl.load(first + slot + at_state, mask=exists, other=0.0)
    passed = tl.zeros([BC], tl.float32)
    found = tl.zeros([BC, PAD], tl.float32)
    low = (tl.num_programs(2) - 1 - stretch) * each
    high = tl.minimum(low + each, length)
    inner = tl.arange(0, T)
    tiles = tl.cdiv(high - low, T)
    for step in range(tiles):
        start = low + (tiles - 1 - step) * T
        rows = start + inner
        inside = rows < high
        steps = tokens_of(delta, batch, length, rows, inside, channel, known, width)
        reads = shared_of(c, batch, length, rows, inside, group, groups, state, S)
        dys = tokens_of(dy, batch, length, rows, inside, channel, known, width)
        # Of the next token; what comes from beyond the tile is in `later` already.
        follows = inside & (rows + 1 < high) & (inner + 1 < T)
        next_steps = tokens_of(delta, batch, length, rows + 1, follows, channel, known, width)
        decays = tl.exp(steps[:, :, None] * rates[None, :, :])
        given = dys[:, :, None] * reads[:, None, :]
        given += tl.where((inner == T - 1)[:, None, None], later[None, :, :], 0.0)
        _, pulls = tl.associative_scan((tl.exp(next_steps[:, :, None] * rates[None, :, :]), given), 0, combine, True)
        if marks is not None:
            tile = batch.to(tl.int64) * tl.cdiv(length, T) + start // T
            h = tl.load(marks + tile * (width * S) + at_state, mask=exists, other=0.0)
            xs = tokens_of(x, batch, length, rows, inside, channel, known, width)
            writes = shared_of(b, batch, length, rows, inside, group, groups, state, S)
            additions = (steps * xs)[:, :, None] * writes[:, None, :]
            left, added = tl.associative_scan((decays, additions), 0, combine)
            states = left * h[None, :, :] + added
            before = pulls * (states - additions)
            read = tl.sum(pulls * writes[:, None, :], 2)
            at = (batch.to(tl.int64) * length + rows)[:, None] * width + channel[None, :]
            mask = inside[:, None] & known[None, :]
            tl.store(dx + at, steps * read, mask=mask)
            tl.store(ddelta + at, xs * read + tl.sum(before * rates[None, :, :], 2), mask=mask)
            found += tl.sum(before * steps[:, :, None], 0)
            block = tl.program_id(1) % tl.cdiv(channels, BC)
            row = (block.to(tl.int64) * tl.num_programs(0) + batch) * length + rows
            at = (row * groups + group)[:, None] * S + state[None, :]
            mask = inside[:, None] & (state < S)[None, :]
            tl.store(db + at, tl.sum(pulls * (steps * xs)[:, :, None], 1), mask=mask)
            tl.store(dc + at, tl.sum(states * dys[:, :, None], 1), mask=mask)
        later = tl.sum(tl.where((inner == 0)[:, None, None], decays * pulls, 0.0), 0)
        passed += tl.sum(steps, 0)
    if da is not None:
        tl.store(da + slot + at_state, found, mask=exists)
    if last is not None:
        tl.store(last + slot + at_state, later, mask=exists)
    if kept is not None:
        tl.store(kept + slot + at_state, tl.exp(passed[:, None] * rates), mask=exists)
