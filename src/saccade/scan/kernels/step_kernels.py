"""One token: the state of a recurrence read once, changed, read by the queries, and written once.

A program takes a band of columns of one memory, all its rows, so that what queries and keys find in it is a sum within
the program. It asks for all that it reads before it uses or writes any of it: a load after a store or after a sum
across threads would wait for memory once more, with nothing of the state on its way. Sums are of float32 products, in
one order whatever the problem: equal inputs give equal bits. Where nothing came before, nothing is read.

On masks: interpreters of Triton 3.9 want the two sides of `&` to have shapes, so a condition of one number is put into
the bound of a range instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.selective import loaded, softplus
from saccade.scan.kernels.tiles import place

TOGETHER = tl.constexpr(8)  # queries of one memory that registers have room for


@triton.jit
def channels(x, batch, head, channel, LIMIT: tl.constexpr):
    """x[batch, head, 0, channel], float32, zeros where there is nothing."""
    return tl.load(place(x, batch, head, batch * 0) + channel, mask=channel < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def asked(q, batch, asker, row, K: tl.constexpr, FAN: tl.constexpr):
    """These rows of FAN queries, from head `asker` on: a tuple of (rows,), float32, zeros where there is nothing."""
    queries = ()
    for f in tl.static_range(FAN):
        queries += (channels(q, batch, asker + f, row, K),)
    return queries


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
def entries(x, batch, head, row, column, TURNED: tl.constexpr):
    """Where x[batch, head, row, column] lies, of a memory whose columns (TURNED), or else rows, have stride 1."""
    if TURNED:
        return place(x, batch, head, batch * 0) + (row + column * x.stride_n)
    else:
        return place(x, batch, head, batch * 0) + (row * x.stride_n + column)


@triton.jit
def found_by(queries, kept, FAN: tl.constexpr):
    """What queries find in these rows of what was kept: a tuple of (columns,)."""
    found = ()
    for f in tl.static_range(FAN):
        found += (tl.sum(queries[f][:, None] * kept, 0),)
    return found


@triton.jit
def own_of(queries, key, FAN: tl.constexpr):
    """q . k of each query, a tuple of numbers.

    A token reads its own value by (q . k) v: a normalizer then finds that number in its mass too, and it cancels.
    """
    own = ()
    for f in tl.static_range(FAN):
        own += (tl.sum(queries[f] * key, 0),)
    return own


@triton.jit
def with_own(found, own, value, FAN: tl.constexpr):
    """What queries find with the token's own part."""
    whole = ()
    for f in tl.static_range(FAN):
        whole += (found[f] + own[f] * value,)
    return whole


@triton.jit
def mass_of(queries, sums, own, FAN: tl.constexpr):
    """Likewise in the sums of keys: a tuple of numbers."""
    mass = ()
    for f in tl.static_range(FAN):
        mass += (tl.sum(queries[f] * sums, 0) + own[f],)
    return mass


@triton.jit
def both(one, other, COUNT: tl.constexpr):
    """Two tuples, added up."""
    total = ()
    for i in tl.static_range(COUNT):
        total += (one[i] + other[i],)
    return total


@triton.jit
def answer(o, batch, head, column, found, stop):
    """Write what the query of a head found, up to a column."""
    at = place(o, batch, head, batch * 0) + column
    tl.store(at, found.to(o.x.dtype.element_ty), mask=column < stop)


@triton.jit
def linear_rows(
    q, k, g, before, after, value, batch, head, asker, tile, column, first,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    FAN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first` on of a band of columns: what queries find in them, and their mass, or q . k without.

    after: None where it is written already.
    """
    row = first + tl.arange(0, ROWS)
    STOP: tl.constexpr = min(K, first + ROWS)  # so that a block of which all is there begins and ends evenly
    inside = (row < STOP)[:, None] & (column < V)[None, :]
    kept = tl.zeros([ROWS, value.shape[0]], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    if before is not None:
        kept += tl.load(entries(before, batch, head, row[:, None], column[None, :], TURNED), mask=inside, other=0.0)
        if MASS:
            sums += tl.load(entries(before, batch, head, row, V, TURNED), mask=row < STOP, other=0.0)
    key = channels(k, batch, head, row, STOP)
    queries = asked(q, batch, asker, row, STOP, FAN)
    left = left_of(g, batch, head, row, GATE, STOP)
    if before is not None:
        kept *= left[:, None]
        sums *= left
    found = found_by(queries, kept, FAN)
    own = own_of(queries, key, FAN)
    found = with_own(found, own, value, FAN)
    if MASS:
        own = mass_of(queries, sums, own, FAN)
    if after is not None:
        # What lies between the lines is written too: memory that is written in parts of 32 bytes is read first.
        END: tl.constexpr = min(PAD, first + ROWS)
        inside = (row < END)[:, None] & (column < V)[None, :]
        at = entries(after, batch, head, row[:, None], column[None, :], MASS)
        tl.store(at, kept + key[:, None] * value[None, :], mask=inside)
        if MASS:
            once = row < tl.where(tile == 0, END, 0)  # the same for every band
            tl.store(entries(after, batch, head, row, V, MASS), sums + key, mask=once)
    return found, own


@triton.jit
def divided(found, mass, least, RATIO: tl.constexpr):
    """found over mass + least, or over 1 where that is 0 (RATIO 1), or over |mass|, `least` at least (2)."""
    if RATIO == 1:
        size = mass + least
        size = tl.where(size == 0, 1.0, size)
    else:
        size = tl.abs(mass)
        size = tl.where(size < least, least, size)
    return tl.div_rn(found, tl.zeros_like(found) + size)


@triton.jit
def linear_queries(
    q, k, v, g, before, after, o, scale, least, batch, head, asker, tile,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr, RATIO: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """FAN queries, from head `asker` on, of a band of columns; after: None where it is written already."""
    column = tile * BV + tl.arange(0, BV)
    value = channels(v, batch, head, column, V)
    WHOLE: tl.constexpr = K // BK
    for part in tl.static_range(WHOLE + (REST > 0)):
        more, own = linear_rows(
            q, k, g, before, after, value, batch, head, asker, tile, column, part * BK,
            K, V, MASS, PAD, BK if part < WHOLE else REST, GATE, FAN, TURNED,
        )  # fmt: skip
        if part == 0:
            found, mass = more, own
        else:
            found, mass = both(found, more, FAN), both(mass, own, FAN)
    for f in tl.static_range(FAN):
        read = found[f] * scale
        if RATIO:
            read = divided(read, mass[f] * scale, least, RATIO)
        answer(o, batch, asker + f, column, read, V)
        if MASS:
            if RATIO == 0:
                last = V + tl.arange(0, 16)  # of which one is there, for one band
                answer(o, batch, asker + f, last, tl.zeros([16], tl.float32) + mass[f] * scale, V + (tile == 0))


@triton.jit
def linear_step(
    q, k, v, g, before, after, o, old, grown, scale, least,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr, RATIO: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """S' = exp(g) S + k v^T, o = scale q^T S', and the sum of the gates so far.

    q (B, H, 1, K), k alike, v (B, Hkv, 1, V), g (B, heads, 1) or (B, heads, 1, K), before and after (B, heads, K, V),
    o (B, H, 1, V), as `Heads`. MASS: values have one channel more, which is 1, so the memories have a column more, the
    sums of keys, and o the mass, unless it is divided by it (RATIO: `divided`). The memory before has columns of stride
    1 (TURNED) or rows; the one after, columns with a MASS, with room for PAD rows, which is written too. Rows are taken
    BK at a time, and the last of them REST at once. old, grown (B, heads, K or 1): the sum of g before, None for 0, and
    with this one; None where it is not wanted.
    """
    tile = tl.program_id(0) % ((V + BV - 1) // BV)
    batch = tl.program_id(0) // ((V + BV - 1) // BV)
    head = tl.program_id(1)
    linear_queries(
        q, k, v, g, before, after, o, scale, least, batch, head, head * FAN, tile,
        K, V, MASS, PAD, BK, REST, BV, GATE, min(FAN, TOGETHER), RATIO, TURNED,
    )  # fmt: skip
    LEFT: tl.constexpr = FAN - FAN // TOGETHER * TOGETHER
    if FAN > TOGETHER:  # the others find the old memory in a cache
        for group in range(1, FAN // TOGETHER):
            linear_queries(
                q, k, v, g, before, None, o, scale, least, batch, head, head * FAN + group * TOGETHER, tile,
                K, V, MASS, PAD, BK, REST, BV, GATE, TOGETHER, RATIO, TURNED,
            )  # fmt: skip
        if LEFT:
            linear_queries(
                q, k, v, g, before, None, o, scale, least, batch, head, head * FAN + FAN - LEFT, tile,
                K, V, MASS, PAD, BK, REST, BV, GATE, LEFT, RATIO, TURNED,
            )  # fmt: skip
    if grown is not None:
        PART: tl.constexpr = K if GATE == 2 else 1
        entry = (batch * tl.num_programs(1) + head).to(tl.int64) * PART
        for first in range(0, PART, BK):
            row = first + tl.arange(0, BK)
            once = row < tl.where(tile == 0, PART, 0)
            if GATE == 2:
                total = channels(g, batch, head, row, K)
            else:
                total = tl.load(place(g, batch, head, batch * 0) + row * 0).to(tl.float32)
            if old is not None:
                total += tl.load(old + entry + row, mask=once, other=0.0)
            tl.store(grown + entry + row, total, mask=once)


@triton.jit
def delta_answers(
    o, queries, state, key, written, batch, asker, column, scale, W: tl.constexpr, FAN: tl.constexpr
):  # fmt: skip
    """What FAN queries, from head `asker` on, find."""
    found = with_own(found_by(queries, state, FAN), own_of(queries, key, FAN), written, FAN)
    for f in tl.static_range(FAN):
        answer(o, batch, asker + f, column, found[f] * scale, W)


@triton.jit
def delta_band(
    q, k, beta, g, before, after, value, batch, head, column, o, scale,
    K: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
    EYE: tl.constexpr,
):  # fmt: skip
    """Columns of a memory, or of a product (EYE), which is the identity before the first token; o None: unread."""
    row = tl.arange(0, BK)
    inside = (row < K)[:, None] & (column < W)[None, :]
    if before is not None:
        state = tl.load(entries(before, batch, head, row[:, None], column[None, :], False), mask=inside, other=0.0)
    elif EYE:
        state = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    key = channels(k, batch, head, row, K)
    share = tl.load(place(beta, batch, head, batch * 0)).to(tl.float32)
    if o is not None:
        queries = asked(q, batch, head * FAN, row, K, min(FAN, TOGETHER))
    state *= left_of(g, batch, head, row, GATE, K)[:, None]
    written = share * (value - tl.sum(key[:, None] * state, 0))
    if o is not None:
        delta_answers(o, queries, state, key, written, batch, head * FAN, column, scale, W, min(FAN, TOGETHER))
    at = entries(after, batch, head, row[:, None], column[None, :], False)
    tl.store(at, state + key[:, None] * written[None, :], mask=inside)
    if o is not None:
        LEFT: tl.constexpr = FAN - FAN // TOGETHER * TOGETHER
        if FAN > TOGETHER:
            for group in range(1, FAN // TOGETHER):
                asker = head * FAN + group * TOGETHER
                queries = asked(q, batch, asker, row, K, TOGETHER)
                delta_answers(o, queries, state, key, written, batch, asker, column, scale, W, TOGETHER)
            if LEFT:
                asker = head * FAN + FAN - LEFT
                queries = asked(q, batch, asker, row, K, LEFT)
                delta_answers(o, queries, state, key, written, batch, asker, column, scale, W, LEFT)


@triton.jit
def delta_step(
    q, k, v, beta, g, before, after, o, old, product, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
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
            q, k, beta, g, before, after, value, batch, head, column, o, scale, K, V, BK, BV, GATE, FAN, False,
        )  # fmt: skip
    elif product is not None:
        column = (band - MEMORY) * BV + tl.arange(0, BV)
        nothing = tl.zeros([BV], tl.float32)
        delta_band(
            q, k, beta, g, old, product, nothing, batch, head, column, None, scale, K, K, BK, BV, GATE, FAN, True,
        )  # fmt: skip


@triton.jit
def selective_step(
    x, delta, bias, a, b, c, direct, z, before, after, y, old, grown, width, channels_a_group, stride_x, stride_delta,
    stride_z, stride_b, stride_c,
    S: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, SOFTPLUS: tl.constexpr, ALIKE: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """h' = exp(d A) h + d x B, y = (C h' + D x) silu(z) of BC channels, d = delta + bias or softplus of it; and the sum
    of d A so far.

    x, delta, z, y (B, channels), bias, direct (channels,), a (channels, S), b, c (B, G, S), before, after, old, grown
    (B, channels, S), channels and S contiguous; bias, direct, z, before, old, grown None where there is none. ALIKE:
    the BC channels are of one group. RUN: sequences of a program, which divide B.
    """
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    there = channel < width
    state = tl.arange(0, BS)
    inside = there[:, None] & (state < S)[None, :]
    at = channel[:, None] * S + state[None, :]
    if ALIKE:
        shared, held = tl.program_id(0) * BC // channels_a_group * S + state, state < S
    else:
        shared, held = (channel // channels_a_group)[:, None] * S + state[None, :], inside
    first = tl.program_id(1).to(tl.int64) * RUN
    states, sums, writes, reads, sizes, tokens, gates = (), (), (), (), (), (), ()
    for r in tl.static_range(RUN):
        batch = first + r
        states += (loaded(before, batch * width * S + at, inside),)
        sums += (loaded(old if grown is not None else None, batch * width * S + at, inside),)
    rate = loaded(a, at, inside)
    for r in tl.static_range(RUN):
        batch = first + r
        writes += (loaded(b, batch * stride_b + shared, held),)
        reads += (loaded(c, batch * stride_c + shared, held),)
        sizes += (loaded(delta, batch * stride_delta + channel, there),)
        tokens += (loaded(x, batch * stride_x + channel, there),)
        gates += (loaded(z, batch * stride_z + channel, there),)
    offset, straight = loaded(bias, channel, there), loaded(direct, channel, there)
    for r in tl.static_range(RUN):
        batch, step, write, read = first + r, sizes[r] + offset, writes[r], reads[r]
        if ALIKE:
            write, read = write[None, :], read[None, :]
        if SOFTPLUS:
            step = softplus(step)
        way, h = step[:, None] * rate, states[r]
        if before is not None:
            h *= tl.exp(way)
        h += (step * tokens[r])[:, None] * write
        found = tl.sum(h * read, 1) + straight * tokens[r]
        if z is not None:
            found *= gates[r] / (1.0 + tl.exp(-gates[r]))
        tl.store(after + batch * width * S + at, h, mask=inside)
        if grown is not None:
            tl.store(grown + batch * width * S + at, sums[r] + way, mask=inside)
        tl.store(y + batch * width + channel, found.to(y.dtype.element_ty), mask=there)
