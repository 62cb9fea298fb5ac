"""What every kernel of this room does to a tile: read it, see which pairs its boxes allow, turn products into logits.

Logits are in base 2 (natural logits times log2 e), so that an exponential is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bounds(tables, union, rows, COUNT: tl.constexpr, LINE: tl.constexpr):
    """On each of COUNT axes of boxes, where the interval of query rows (R,) starts and how long it is, as tuples.

    The length is unsigned, so that `lo <= c < hi` is one comparison, `c - lo < hi - lo`. LINE: keys are told by their
    places alone, so that no interval may reach beyond the last.
    """
    starts = ()
    lengths = ()
    inside = rows < tables.num_queries
    for at in tl.static_range(COUNT):
        lo = tl.load(tables.lo + union + at * tables.num_queries + rows, mask=inside, other=0)
        hi = tl.load(tables.hi + union + at * tables.num_queries + rows, mask=inside, other=0)
        starts = starts + (lo,)
        if LINE:
            hi = tl.minimum(hi, tables.num_keys)
        lengths = lengths + (tl.where(hi > lo, hi - lo, 0).to(tl.uint32, bitcast=True),)
    return starts, lengths


@triton.jit
def coordinates(coord, keys, num_keys, AXES: tl.constexpr):
    """The coordinates of keys (C,), a tuple of AXES tensors (C,); a key that does not exist is beyond every bound."""
    found = ()
    for axis in tl.static_range(AXES):
        found = found + (tl.load(coord + axis * num_keys + keys, mask=keys < num_keys, other=2147483647),)
    return found


@triton.jit
def along(x, DIM: tl.constexpr):
    """x (L,) as a column (L, 1) for DIM = 0, as a row (1, L) for DIM = 1."""
    if DIM == 0:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def seen(starts, lengths, at, keys, num_keys, BOXES: tl.constexpr, AXES: tl.constexpr, DIM: tl.constexpr):
    """Which pairs lie in some box: bool, queries along dimension DIM, keys along the other.

    Queries that do not exist have empty bounds or, where there are no axes, results that nobody reads.
    """
    if AXES == 0:
        return along(keys < num_keys, 1 - DIM)
    else:
        some = inside(starts, lengths, at, 0, AXES, DIM)
        for box in tl.static_range(1, BOXES):
            some |= inside(starts, lengths, at, box, AXES, DIM)
        return some


@triton.jit
def inside(starts, lengths, at, box: tl.constexpr, AXES: tl.constexpr, DIM: tl.constexpr):
    """Which pairs lie in one box."""
    every = _within(starts[box * AXES], lengths[box * AXES], at[0], DIM)
    for axis in tl.static_range(1, AXES):
        every &= _within(starts[box * AXES + axis], lengths[box * AXES + axis], at[axis], DIM)
    return every


@triton.jit
def _within(start, length, c, DIM: tl.constexpr):
    return (along(c, 1 - DIM) - along(start, DIM)).to(tl.uint32, bitcast=True) < along(length, DIM)


@triton.jit
def cell_of(first, tables, PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, ANYWHERE: tl.constexpr):
    """Where on the grid the cell begins whose first key stands at place `first` of the plan: (t, y, x)."""
    if ANYWHERE:
        row = first // tables.along_x
        return row // tables.along_y, row % tables.along_y, first % tables.along_x
    elif PT * PY == 1:
        return 0, 0, first
    else:
        tile = first // (PT * PY * PX)
        row = tile // tables.along_x
        return row // tables.along_y * PT, row % tables.along_y * PY, tile % tables.along_x * PX


@triton.jit
def seen_in_cell(
    starts, lengths, cell, SIZE: tl.constexpr, PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Which keys of a cell that begins at `cell` (t, y, x) lie in some box of SIZE queries: bool (SIZE, PT, PY, PX).

    The axes of the boxes are those of the grid, so that an axis is compared once a query and coordinate, not once a
    pair, and no coordinate is read.
    """
    ct = (cell[0] + tl.arange(0, PT))[None, :, None, None]
    cy = (cell[1] + tl.arange(0, PY))[None, None, :, None]
    cx = (cell[2] + tl.arange(0, PX))[None, None, None, :]
    some = in_cell(starts, lengths, ct, cy, cx, 0, SIZE, AXES)
    for box in tl.static_range(1, BOXES):
        some = some | in_cell(starts, lengths, ct, cy, cx, box, SIZE, AXES)
    return some


@triton.jit
def in_cell(starts, lengths, ct, cy, cx, box: tl.constexpr, SIZE: tl.constexpr, AXES: tl.constexpr):
    """Which keys of a cell lie in one box."""
    last: tl.constexpr = box * AXES + AXES - 1
    every = _reaches(starts[last], lengths[last], cx, SIZE)
    if AXES > 1:
        every = every & _reaches(starts[last - 1], lengths[last - 1], cy, SIZE)
    if AXES > 2:
        every = every & _reaches(starts[last - 2], lengths[last - 2], ct, SIZE)
    return every


@triton.jit
def masked(
    s, blank, starts, lengths, cell, keys, tables, SIZE: tl.constexpr, COUNT: tl.constexpr,
    PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """s (SIZE, COUNT), queries by keys, with `blank` for the pairs that no box admits; cell: where the keys are one."""
    if cell is not None:
        allowed = seen_in_cell(starts, lengths, cell, SIZE, PT, PY, PX, BOXES, AXES)
        return tl.where(allowed, s.reshape([SIZE, PT, PY, PX]), blank).reshape([SIZE, COUNT])
    else:
        at = coordinates(tables.coord, keys, tables.num_keys, AXES)
        return tl.where(seen(starts, lengths, at, keys, tables.num_keys, BOXES, AXES, 0), s, blank)


@triton.jit
def _reaches(start, length, c, SIZE: tl.constexpr):
    start = start.reshape([SIZE, 1, 1, 1])
    return (c - start).to(tl.uint32, bitcast=True) < length.reshape([SIZE, 1, 1, 1])


@triton.jit
def read(
    heads, described, batch, head, num_heads, first, cell, tokens, num_tokens,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Rows of heads (B, H, L, WIDTH), of one head, as (SIZE, PADDED); zeros beyond its ends.

    described: the same tensor for the tensor memory accelerator, which then reads `first` and the rows that follow, or
    on a grid, (B * num_heads, T, Y, X, WIDTH), the cell that begins at `cell` (t, y, x). Or None: the rows are `tokens`
    (SIZE,). INSIDE: all of them exist.
    """
    if described is not None and cell is not None:
        return described.load([batch * num_heads + head, cell[0], cell[1], cell[2], 0]).reshape([SIZE, PADDED])
    elif described is not None:
        return described.load([batch, head, first, 0]).reshape([SIZE, PADDED])
    else:
        channel = tl.arange(0, PADDED)
        # A head may hold more than 2**31 elements.
        at = heads.x + batch.to(tl.int64) * heads.stride_b + head.to(tl.int64) * heads.stride_h
        at = at + tokens.to(tl.int64)[:, None] * heads.stride_n + channel[None, :]
        if INSIDE and WIDTH == PADDED:
            return tl.load(at)
        else:
            return tl.load(at, mask=(tokens < num_tokens)[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
def steps_of(lists, entry, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Where a list starts, the tiles that it has, the steps of SIZE places through it, and those through full tiles.

    Tiles of fewer than SIZE places go several to a step; none of them counts as full.
    """
    start = tl.load(lists.indptr + entry)
    count = (tl.load(lists.indptr + entry + 1) - start).to(tl.int32)
    if TILE < SIZE:
        return start, count, tl.cdiv(count, SIZE // TILE), count * 0
    else:
        return start, count, count * (TILE // SIZE), tl.load(lists.num_full + entry) * (TILE // SIZE)


@triton.jit
def tile_of(listed, count, step, order, num_tokens, TILE: tl.constexpr, SIZE: tl.constexpr, INSIDE: tl.constexpr):
    """Step `step` through a list of `count` tiles: the first of its SIZE places, all of them, and the tokens there.

    order: the token at each place, or None where it is the place itself. INSIDE: all of them exist. A place beyond the
    list is one that does not exist.
    """
    r = tl.arange(0, SIZE)
    if TILE < SIZE:
        slot = step * (SIZE // TILE) + r // TILE
        first = 0
        places = tl.load(listed + slot, mask=slot < count, other=num_tokens) * TILE + r % TILE
        places = tl.minimum(places, num_tokens)
    else:
        first = tl.load(listed + step // (TILE // SIZE)) * TILE + step % (TILE // SIZE) * SIZE
        places = first + r
    if order is None:
        return first, places, places
    elif INSIDE:
        return first, places, tl.load(order + places)
    else:
        return first, places, tl.load(order + places, mask=places < num_tokens, other=num_tokens)


@triton.jit
def cell_at(listed, step, tables, PT: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr):
    """Step `step` through a list of cells that begin anywhere on the grid: the first key, and all of them."""
    first = tl.load(listed + step)
    r = tl.arange(0, PT * PY * PX)
    row = r // (PY * PX) * tables.along_y + r // PX % PY
    return first, first + row * tables.along_x + r % PX


@triton.jit
def tokens_of(start, count, step, tables, SIZE: tl.constexpr):
    """Step `step` through a list of single keys: SIZE of them, the tokens that they are, and where they are listed.

    Places beyond the list hold a key that does not exist.
    """
    slot = step * SIZE + tl.arange(0, SIZE)
    keys = tl.load(tables.token_indices + start + slot, mask=slot < count, other=tables.num_keys)
    if tables.k_order is None:
        found = keys
    else:
        found = tl.load(tables.k_order + keys, mask=keys < tables.num_keys, other=tables.num_keys)
    return keys, found, start + tl.minimum(slot, count - 1)


@triton.jit
def tanh(x):
    return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))


@triton.jit
def slope(s, scores):
    """The derivative of a logit by scale times the product: 1 but for a cap."""
    if scores.cap is None:
        return 1.0
    else:
        capped = tanh(s * scores.scale / scores.cap)
        return 1 - capped * capped


@triton.jit
def table_index(table, rows, keys, tables, AXES: tl.constexpr, DIM: tl.constexpr):
    """Where in a relative table the entries of pairs stand; see `softmax.bias.RelativeTable`."""
    index = along(rows, DIM) * 0 + along(keys, 1 - DIM) * 0
    for axis in tl.static_range(AXES):
        extent = tl.load(table.extents + axis)
        a = tl.load(table.q_at + axis * tables.num_queries + rows, mask=rows < tables.num_queries, other=0)
        b = tl.load(table.k_at + axis * tables.num_keys + keys, mask=keys < tables.num_keys, other=0)
        apart = along(a, DIM) - along(b, 1 - DIM)
        apart = tl.minimum(tl.maximum(apart, 1 - extent), extent - 1)
        index = index * (2 * extent - 1) + apart + extent - 1
    return index


@triton.jit
def logits(s, heads, rows, keys, slots, scores, tables, BIAS_AXES: tl.constexpr, DIM: tl.constexpr):
    """Products s, queries along DIM, to logits in base 2: cap tanh(scale s / cap) + bias; `heads`: of each row.

    slots: where single keys are listed, whose log weights are added; None for tiles.
    """
    z = s * scores.scale
    if scores.cap is not None:
        z = scores.cap * tanh(z / scores.cap)
    if scores.table is not None:
        index = table_index(scores.table, rows, keys, tables, BIAS_AXES, DIM)
        z += LOG2E * tl.load(scores.table.entries + along(heads * scores.table.size, DIM) + index)
    if scores.slopes is not None:
        a = tl.load(scores.slopes.q_at + rows, mask=rows < tables.num_queries, other=0)
        b = tl.load(scores.slopes.k_at + keys, mask=keys < tables.num_keys, other=0)
        apart = tl.abs(along(a, DIM) - along(b, 1 - DIM)).to(tl.float32)
        z -= LOG2E * along(tl.load(scores.slopes.slopes + heads), DIM) * apart
    if slots is not None and tables.token_log_weights is not None:
        z += LOG2E * along(tl.load(tables.token_log_weights + slots).to(tl.float32), 1 - DIM)
    return z
