"""One token: the state of a recurrence read once, changed, read by the queries, and written once.

A program takes a band of columns of one memory, all its rows, so that what queries and keys find in it is a sum within
the program. It asks for all that it reads before it uses or writes any of it: a load after a store or after a sum
across threads would wait for memory once more, with nothing of the state on its way. Sums are of float32 products, in
one order whatever the problem: equal inputs give equal bits. Where nothing came before, nothing is read. All queries
of a memory are summed up at once, for warps wait for each other at every sum. Programs of a step are launched while
the last ones of the kernel before it run (EARLY), and wait for its end before they read anything.

On masks: interpreters of Triton 3.9 want the two sides of `&` to have shapes, so a condition of one number is put into
the bound of a range instead.
"""

# mypy: disable-error-code="var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.scan.kernels.selective import loaded, softplus
from saccade.scan.kernels.tiles import place

TOGETHER = tl.constexpr(8)  # queries of one memory that registers have room for


@triton.constexpr_function
def together(fan):
    """Queries of a group, a power of two."""
    return min(TOGETHER.value, triton.next_power_of_2(fan))


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """Where a kernel may be launched before the one before it has ended (EARLY), wait for that, and let the next be."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def channels(x, batch, head, channel, LIMIT: tl.constexpr):
    """x[batch, head, 0, channel], float32, zeros where there is nothing."""
    return tl.load(place(x, batch, head, batch * 0) + channel, mask=channel < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def asked(q, batch, head, group, row, K: tl.constexpr, FAN: tl.constexpr):
    """These rows of a group of queries of a memory: (queries, rows), float32, zeros where there is nothing."""
    query = group * TOGETHER + tl.arange(0, together(FAN))
    there = (query < FAN)[:, None] & (row < K)[None, :]
    at = place(q, batch, (head * FAN + query)[:, None], batch * 0) + row[None, :]
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


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
def found_by(queries, kept, key, value):
    """What queries (queries, rows) find in kept (1, rows, columns) + key value^T, and q . key.

    A token reads its own value by (q . key) v: a normalizer then finds that number in its mass too, and it cancels.
    """
    own = tl.sum(queries * key[None, :], 1)
    return tl.sum(queries[:, :, None] * kept, 1) + own[:, None] * value[None, :], own


@triton.jit
def answer(o, batch, head, group, column, found, stop, FAN: tl.constexpr):
    """Write what the queries of a group found, up to a column."""
    query = group * TOGETHER + tl.arange(0, together(FAN))
    at = place(o, batch, (head * FAN + query)[:, None], batch * 0) + column[None, :]
    tl.store(at, found.to(o.x.dtype.element_ty), mask=(query < FAN)[:, None] & (column < stop)[None, :])


@triton.jit
def linear_rows(
    q, k, g, before, after, value, batch, head, group, tile, column, first,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    FAN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """ROWS rows from `first` on of a band of columns: what queries find in them, and their mass, or q . k without.

    after: None where it is written already.
    """
    row = first + tl.arange(0, ROWS)
    rows, columns = row[None, :, None], column[None, None, :]
    STOP: tl.constexpr = min(K, first + ROWS)  # so that a block of which all is there begins and ends evenly
    kept = tl.zeros([1, ROWS, value.shape[0]], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    if before is not None:
        at = entries(before, batch, head, rows, columns, TURNED)
        kept += tl.load(at, mask=(rows < STOP) & (columns < V), other=0.0)
        if MASS:
            sums += tl.load(entries(before, batch, head, row, V, TURNED), mask=row < STOP, other=0.0)
    key = channels(k, batch, head, row, STOP)
    queries = asked(q, batch, head, group, row, STOP, FAN)
    left = left_of(g, batch, head, row, GATE, STOP)
    if before is not None:
        kept *= left[None, :, None]
        sums *= left
    found, own = found_by(queries, kept, key, value)
    if MASS:
        own += tl.sum(queries * sums[None, :], 1)
    if after is not None:
        # What lies between the lines is written too: memory that is written in parts of 32 bytes is read first.
        END: tl.constexpr = min(PAD, first + ROWS)
        at = entries(after, batch, head, rows, columns, MASS)
        tl.store(at, kept + key[None, :, None] * value[None, None, :], mask=(rows < END) & (columns < V))
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
    q, k, v, g, before, after, o, scale, least, batch, head, group, tile,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr, RATIO: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A group of queries of a band of columns; after: None where it is written already."""
    column = tile * BV + tl.arange(0, BV)
    value = channels(v, batch, head, column, V)
    WHOLE: tl.constexpr = K // BK
    for part in tl.static_range(WHOLE + (REST > 0)):
        more, own = linear_rows(
            q, k, g, before, after, value, batch, head, group, tile, column, part * BK,
            K, V, MASS, PAD, BK if part < WHOLE else REST, GATE, FAN, TURNED,
        )  # fmt: skip
        if part == 0:
            found, mass = more, own
        else:
            found, mass = found + more, mass + own
    found, mass = found * scale, mass * scale
    if RATIO:
        found = divided(found, mass[:, None], least, RATIO)
    answer(o, batch, head, group, column, found, V, FAN)
    if MASS:
        if RATIO == 0:
            last = V + tl.arange(0, 16)  # of which one is there, for one band
            answer(o, batch, head, group, last, mass[:, None] + last[None, :] * 0.0, V + (tile == 0), FAN)


@triton.jit
def linear_step(
    q, k, v, g, before, after, o, old, grown, scale, least,
    K: tl.constexpr, V: tl.constexpr, MASS: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr, RATIO: tl.constexpr, TURNED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """S' = exp(g) S + k v^T, o = scale q^T S', and the sum of the gates so far.

    q (B, H, 1, K), k alike, v (B, Hkv, 1, V), g (B, heads, 1) or (B, heads, 1, K), before and after (B, heads, K, V),
    o (B, H, 1, V), as `Heads`. MASS: values have one channel more, which is 1, so the memories have a column more, the
    sums of keys, and o the mass, unless it is divided by it (RATIO: `divided`). The memory before has columns of stride
    1 (TURNED) or rows; the one after, columns with a MASS, with room for PAD rows, which is written too. Rows are taken
    BK at a time, and the last of them REST at once. old, grown (B, heads, K or 1): the sum of g before, None for 0, and
    with this one; None where it is not wanted.
    """
    take_turn(EARLY)
    tile = tl.program_id(0) % ((V + BV - 1) // BV)
    batch = tl.program_id(0) // ((V + BV - 1) // BV)
    head = tl.program_id(1)
    linear_queries(
        q, k, v, g, before, after, o, scale, least, batch, head, 0, tile,
        K, V, MASS, PAD, BK, REST, BV, GATE, FAN, RATIO, TURNED,
    )  # fmt: skip
    if FAN > TOGETHER:  # the others find the old memory in a cache
        for group in range(1, (FAN + TOGETHER - 1) // TOGETHER):
            linear_queries(
                q, k, v, g, before, None, o, scale, least, batch, head, group, tile,
                K, V, MASS, PAD, BK, REST, BV, GATE, FAN, RATIO, TURNED,
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
def delta_band(
    q, k, beta, g, before, after, value, batch, head, column, o, scale,
    K: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
    EYE: tl.constexpr,
):  # fmt: skip
    """Columns of a memory, or of a product (EYE), which is the identity before the first token; o None: unread."""
    row = tl.arange(0, BK)
    rows, columns = row[None, :, None], column[None, None, :]
    inside = (rows < K) & (columns < W)
    if before is not None:
        state = tl.load(entries(before, batch, head, rows, columns, False), mask=inside, other=0.0)
    elif EYE:
        state = tl.where(rows == columns, 1.0, 0.0)
    else:
        state = tl.zeros([1, BK, BV], tl.float32)
    key = channels(k, batch, head, row, K)
    share = tl.load(place(beta, batch, head, batch * 0)).to(tl.float32)
    if o is not None:
        queries = asked(q, batch, head, 0, row, K, FAN)
    state *= left_of(g, batch, head, row, GATE, K)[None, :, None]
    lost = tl.sum(tl.sum(key[None, :, None] * state, 1), 0)
    written = share * (value - lost)
    if o is not None:
        found, _ = found_by(queries, state, key, written)
        answer(o, batch, head, 0, column, found * scale, W, FAN)
    at = entries(after, batch, head, rows, columns, False)
    tl.store(at, state + key[None, :, None] * written[None, None, :], mask=inside)
    if o is not None:
        if FAN > TOGETHER:
            for group in range(1, (FAN + TOGETHER - 1) // TOGETHER):
                others, _ = found_by(asked(q, batch, head, group, row, K, FAN), state, key, written)
                answer(o, batch, head, group, column, others * scale, W, FAN)


@triton.jit
def delta_step(
    q, k, v, beta, g, before, after, o, old, product, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FAN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """S' = E S + beta k v^T with E = (I - beta k k^T) Diag(exp(g)), o = scale q^T S', and E times the product before.

    q, k, v, g, o as in `linear_step`, beta (B, heads, 1), before and after (B, heads, K, V), old and product (B, heads,
    K, K) or None, as `Heads`. Bands of the memory come first, then those of the product.
    """
    take_turn(EARLY)
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
    RUN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h' = exp(d A) h + d x B, y = (C h' + D x) silu(z) of BC channels, d = delta + bias or softplus of it; and the sum
    of d A so far.

    x, delta, z, y (B, channels), bias, direct (channels,), a (channels, S), b, c (B, G, S), before, after, old, grown
    (B, channels, S), channels and S contiguous; bias, direct, z, before, old, grown None where there is none. ALIKE:
    the BC channels are of one group. RUN: sequences of a program, which divide B.
    """
    take_turn(EARLY)
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
