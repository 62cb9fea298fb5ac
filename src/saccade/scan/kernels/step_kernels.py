"""One token: the state of a recurrence read once, changed, read by the queries, and written once.

A program takes a band of columns of one memory, all its rows, so that what queries and keys find in it is a sum within
the program. Sums are of float32 products, in one order whatever the problem: equal inputs give equal bits. Where
nothing came before, nothing is read.

On masks: interpreters of Triton 3.9 want the two sides of `&` to have shapes, so a condition of one number is put into
the bound of a range instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.tiles import place


@triton.jit
def channels(x, batch, head, channel, LIMIT: tl.constexpr):
    """x[batch, head, 0, channel], float32, zeros where there is nothing."""
    return tl.load(place(x, batch, head, batch * 0) + channel, mask=channel < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def left_of(g, batch, head, row, GATE: tl.constexpr, K: tl.constexpr):
    """What a gate leaves of each row of a memory: (rows,), 1 without one."""
    if GATE == 0:
        return (row * 0 + 1).to(tl.float32)
    elif GATE == 1:
        return tl.exp(tl.load(place(g, batch, head, batch * 0) + row * 0).to(tl.float32))
    else:
        return tl.exp(channels(g, batch, head, row, K))


@triton.jit
def block(x, batch, head, row, column):
    """Where x[batch, head, row, column] lies."""
    return place(x, batch, head, batch * 0) + (row[:, None] * x.stride_n + column[None, :])


@triton.jit
def found_by(
    q, batch, head, row, kept, key, value, K: tl.constexpr, BV: tl.constexpr, FAN: tl.constexpr, FANS: tl.constexpr
):  # fmt: skip
    """What the FAN queries of a memory find in these rows of what was kept of it and what is added: (FANS, columns).

    The token's own part is (q . k) v: a normalizer then finds that number in its mass too, and it cancels.
    """
    queries = tl.arange(0, FANS)
    found = tl.zeros([FANS, BV], tl.float32)
    for f in range(FAN):
        query = channels(q, batch, head * FAN + f, row, K)
        one = tl.sum(query[:, None] * kept, 0) + tl.sum(query * key, 0) * value
        found += tl.where((queries == f)[:, None], one[None, :], 0.0)
    return found


@triton.jit
def answer(o, batch, head, column, found, W: tl.constexpr, FAN: tl.constexpr, FANS: tl.constexpr):
    """Write what they found."""
    queries = tl.arange(0, FANS)
    at = place(o, batch, head * FAN, batch * 0) + (queries[:, None] * o.stride_h + column[None, :])
    tl.store(at, found.to(o.x.dtype.element_ty), mask=(queries < FAN)[:, None] & (column < W)[None, :])


@triton.jit
def linear_step(
    q, k, v, g, before, after, o, old, grown, scale,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    FAN: tl.constexpr, FANS: tl.constexpr,
):  # fmt: skip
    """S' = exp(g) S + k v^T, o = scale q^T S', and the sum of the gates so far.

    q (B, H, 1, K), k alike, v (B, Hkv, 1, V), g (B, heads, 1) or (B, heads, 1, K), before and after (B, heads, K, W),
    o (B, H, 1, W), as `Heads`. W is V, or V + 1 for values with one channel more, which is 1. old, grown (B, heads, K
    or 1): the sum of g before, None for 0, and with this one; None where it is not wanted.
    """
    tile = tl.program_id(0) % ((W + BV - 1) // BV)
    batch = tl.program_id(0) // ((W + BV - 1) // BV)
    head = tl.program_id(1)
    column = tile * BV + tl.arange(0, BV)
    value = channels(v, batch, head, column, V)
    if W > V:
        value = tl.where(column == V, 1.0, value)
    found = tl.zeros([FANS, BV], tl.float32)
    for first in range(0, K, BK):
        row = first + tl.arange(0, BK)
        inside = (row < K)[:, None] & (column < W)[None, :]
        key = channels(k, batch, head, row, K)
        kept = tl.zeros([BK, BV], tl.float32)
        if before is not None:
            kept += tl.load(block(before, batch, head, row, column), mask=inside, other=0.0)
            kept *= left_of(g, batch, head, row, GATE, K)[:, None]
        tl.store(block(after, batch, head, row, column), kept + key[:, None] * value[None, :], mask=inside)
        found += found_by(q, batch, head, row, kept, key, value, K, BV, FAN, FANS)
    answer(o, batch, head, column, found * scale, W, FAN, FANS)
    if grown is not None:
        PART: tl.constexpr = K if GATE == 2 else 1
        entry = (batch * tl.num_programs(1) + head).to(tl.int64) * PART
        for first in range(0, PART, BK):
            row = first + tl.arange(0, BK)
            once = row < tl.where(tile == 0, PART, 0)  # the same for every band
            if GATE == 2:
                total = channels(g, batch, head, row, K)
            else:
                total = tl.load(place(g, batch, head, batch * 0) + row * 0).to(tl.float32)
            if old is not None:
                total += tl.load(old + entry + row, mask=once, other=0.0)
            tl.store(grown + entry + row, total, mask=once)


@triton.jit
def delta_band(
    q, k, beta, g, before, after, value, batch, head, column, o, scale,
    K: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
    FANS: tl.constexpr, EYE: tl.constexpr,
):  # fmt: skip
    """Columns of a memory, or of a product (EYE), which is the identity before the first token; o None: unread."""
    row = tl.arange(0, BK)
    inside = (row < K)[:, None] & (column < W)[None, :]
    key = channels(k, batch, head, row, K)
    left = left_of(g, batch, head, row, GATE, K)
    if before is not None:
        state = left[:, None] * tl.load(block(before, batch, head, row, column), mask=inside, other=0.0)
    elif EYE:
        state = tl.where(row[:, None] == column[None, :], left[:, None], 0.0)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    share = tl.load(place(beta, batch, head, batch * 0)).to(tl.float32)
    written = share * (value - tl.sum(key[:, None] * state, 0))
    tl.store(block(after, batch, head, row, column), state + key[:, None] * written[None, :], mask=inside)
    if o is not None:
        found = found_by(q, batch, head, row, state, key, written, K, BV, FAN, FANS)
        answer(o, batch, head, column, found * scale, W, FAN, FANS)


@triton.jit
def delta_step(
    q, k, v, beta, g, before, after, o, old, product, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
    FANS: tl.constexpr,
):  # fmt: skip
    """S' = E S + beta k v^T with E = (I - beta k k^T) Diag(exp(g)), o = scale q^T S', and E times the product before.

    q, k, v, g, o as in `linear_step`, beta (B, heads, 1), before and after (B, heads, K, V), old and product (B, heads,
    K, K) or None, as `Heads`. Bands of the memory come first, then those of the product.
    """
    MEMORY: tl.constexpr = (V + BV - 1) // BV
    BANDS: tl.constexpr = MEMORY if product is None else MEMORY + (K + BV - 1) // BV
    band = tl.program_id(0) % BANDS
    batch = tl.program_id(0) // BANDS
    head = tl.program_id(1)
    if band < MEMORY:
        column = band * BV + tl.arange(0, BV)
        value = channels(v, batch, head, column, V)
        delta_band(
            q, k, beta, g, before, after, value, batch, head, column, o, scale, K, V, BK, BV, GATE, FAN, FANS, False,
        )  # fmt: skip
    elif product is not None:
        column = (band - MEMORY) * BV + tl.arange(0, BV)
        nothing = tl.zeros([BV], tl.float32)
        delta_band(
            q, k, beta, g, old, product, nothing, batch, head, column, None, scale, K, K, BK, BV, GATE, FAN, FANS, True,
        )  # fmt: skip


@triton.jit
def log1p(x):
    """For x in [0, 1], as 2 atanh(x / (2 + x)): the logarithm of a GPU has no digits where x is small."""
    s = x / (2.0 + x)
    square = s * s
    series = square * 0.0 + 1.0 / 15
    for term in tl.static_range(6, -1, -1):
        series = series * square + 1.0 / (2 * term + 1)
    return 2.0 * s * series


@triton.jit
def selective_step(
    x, delta, bias, a, b, c, direct, z, before, after, y, old, grown, width, channels_a_group, stride_x, stride_delta,
    stride_z, stride_b, stride_c,
    S: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """h' = exp(d A) h + d x B, y = (C h' + D x) silu(z) of BC channels, d = delta + bias or softplus of it; and the sum
    of d A so far.

    x, delta, z, y (B, channels), bias, direct (channels,), a (channels, S), b, c (B, G, S), before, after, old, grown
    (B, channels, S), channels and S contiguous; bias, direct, z, before, old, grown None where there is none.
    """
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    there = channel < width
    token = tl.load(x + batch * stride_x + channel, mask=there, other=0.0).to(tl.float32)
    step = tl.load(delta + batch * stride_delta + channel, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = tl.maximum(step, 0.0) + log1p(tl.exp(-tl.abs(step)))
    state = tl.arange(0, BS)
    inside = there[:, None] & (state < S)[None, :]
    at = channel[:, None] * S + state[None, :]
    shared = (channel // channels_a_group)[:, None] * S + state[None, :]
    way = step[:, None] * tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    write = tl.load(b + batch * stride_b + shared, mask=inside, other=0.0).to(tl.float32)
    h = (step * token)[:, None] * write
    whole = batch * width * S + at
    if before is not None:
        h += tl.exp(way) * tl.load(before + whole, mask=inside, other=0.0)
    tl.store(after + whole, h, mask=inside)
    if grown is not None:
        if old is not None:
            way += tl.load(old + whole, mask=inside, other=0.0)
        tl.store(grown + whole, way, mask=inside)
    found = tl.sum(h * tl.load(c + batch * stride_c + shared, mask=inside, other=0.0).to(tl.float32), 1)
    if direct is not None:
        found += tl.load(direct + channel, mask=there, other=0.0).to(tl.float32) * token
    if z is not None:
        gate = tl.load(z + batch * stride_z + channel, mask=there, other=0.0).to(tl.float32)
        found *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + batch * width + channel, found.to(y.dtype.element_ty), mask=there)
