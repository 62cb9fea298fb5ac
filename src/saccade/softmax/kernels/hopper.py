"""The forward kernel for Hopper: one warp copies, two warpgroups multiply, and neither waits for memory.

    o_i = sum_j 2^(z_ij - m_i) v_j / l_i,    lse_i = (m_i + log2 l_i) / log2 e,    z = log2 e softcap(scale q . k)

after FlashAttention-3 (arXiv:2407.08608). A producer warp feeds rings of shared memory with Q, K and V tiles through
the copy engine; consumers of 64 query rows each issue the next scores beside the product with V, and while one of them
takes exponentials the other multiplies. Programs stay on their multiprocessor and draw work items, a query tile of one
head each, from a counter, long lists first. An item's list is walked from its end: partial tiles, masked by boxes, then
full ones. Where tiles are cells of a grid, the copy engine reads and writes them where they lie, and a box becomes two
or three addends a pair, one an axis, each formed once a row and coordinate. One compiled kernel serves every plan with
as many boxes and axes. Cost: 2 (D + Dv) operations a pair of a listed tile; keys and values are read once a query tile,
from the second-level cache where heads follow one another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.softmax.kernels.hopper_walk import (
    ROWS,
    Sizes,
    Walk,
    described,
    in_a_row,
    numbers,
    on_grid,
    padded,
    processors,
)

SHARED_REGISTERS = 128  # a thread, before the producer gives up its own, where two programs share a multiprocessor
PANEL = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
NOTES = gl.constexpr(4)  # integers that go with the keys of a step


@gluon.jit
def put(table, at, value):
    """Write one integer to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    table.index(at).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get(table, at):
    """Read one integer from shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(table.index(at).load(layout), 0)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(found.index(i), count=arrivals)
    return found


@gluon.jit
def after(slot, phase, SLOTS: gl.constexpr):
    """The place that follows in a ring, and the phase that its barriers are in."""
    return gl.where(slot + 1 == SLOTS, 0, slot + 1), gl.where(slot + 1 == SLOTS, phase ^ 1, phase)


@gluon.jit
def corner(row, along, CELL: gl.constexpr):
    """Where on the grid the cell begins whose first place is `row`: (t, y, x). along: cells along the last two axes."""
    tile = row // (CELL[0] * CELL[1] * CELL[2])
    line = tile // along[1]
    return line // along[0] * CELL[0], line % along[0] * CELL[1], tile % along[1] * CELL[2]


@gluon.jit
def spot_of(b, h, row, heads, along, CELL: gl.constexpr):
    """Where 64 rows lie, as `copy` and `save` take it."""
    if CELL is None:
        return b, h, row
    else:
        t, y, x = corner(row, along, CELL)
        return b * heads + h, t, y, x


@gluon.jit
def token_of(first, rows, along, CELL: gl.constexpr):
    """The tokens at places `rows`, which are 64 from `first` on."""
    if CELL is None:
        return rows
    else:
        t, y, x = corner(first, along, CELL)
        r = rows - first
        line = (t + r // (CELL[1] * CELL[2])) * (along[0] * CELL[1]) + y + r // CELL[2] % CELL[1]
        return line * (along[1] * CELL[2]) + x + r % CELL[2]


@gluon.jit
def copy(box, at, bar, target, D: gl.constexpr, SIZE: gl.constexpr, FIRST: gl.constexpr, WHOLE: gl.constexpr):
    """Start to copy SIZE tokens of D channels into tokens FIRST and on of the WHOLE that `target` has room for.

    at: batch entry, head, first token; or head of all and where a cell begins.
    """
    panels = target._reinterpret(box.dtype, [D // 64, WHOLE, 64], PANEL)
    for c in gl.static_range(D // 64):
        here = panels.index(c).slice(FIRST, SIZE)
        if len(at) == 3:
            tma.async_copy_global_to_shared(box, [at[0], at[1], at[2], c * 64], bar, here)
        else:
            tma.async_copy_global_to_shared(box, [at[0], at[1], at[2], at[3], c * 64], bar, here)


@gluon.jit
def save(box, at, source, D: gl.constexpr):
    """Start to copy 64 tokens of D channels from shared memory; rows beyond the tensor's end are dropped."""
    fence_async_shared()
    panels = source._reinterpret(box.dtype, [D // 64, 64, 64], PANEL)
    for c in gl.static_range(D // 64):
        if len(at) == 3:
            tma.async_copy_shared_to_global(box, [at[0], at[1], at[2], c * 64], panels.index(c))
        else:
            tma.async_copy_shared_to_global(box, [at[0], at[1], at[2], at[3], c * 64], panels.index(c))


@gluon.jit
def _first_key(indices, start, entry, count, far, BN: gl.constexpr, BK: gl.constexpr):
    """First key of an entry of a list, a key past the last one where the list has ended."""
    PIECES: gl.constexpr = BK // BN if BK > BN else 1
    there = entry < count
    tile = gl.load(indices + start + entry // PIECES, mask=there, other=0)
    return gl.where(there, tile * BK + entry % PIECES * BN, far)


@gluon.jit
def _first_keys(indices, start, step, count, far, BN: gl.constexpr, BK: gl.constexpr):
    """First keys of the halves of a step, which are one tile or two."""
    if BN > BK:
        one = _first_key(indices, start, step * 2, count, far, BN, BK)
        return one, _first_key(indices, start, step * 2 + 1, count, far, BN, BK)
    else:
        one = _first_key(indices, start, step, count, far, BN, BK)
        return one, one


@gluon.jit
def _fetch(
    box, ring, keys, slot, phase, b, h, firsts, across,
    BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, CELL: gl.constexpr,
):  # fmt: skip
    """Copy a step's tiles into the next slot, as soon as it is free, and write down their first keys, or their cell."""
    data, full, empty = ring
    SIZE: gl.constexpr = BN if BN < BK else BK
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), phase)
    if CELL is not None:
        heads, along = across
        t, y, x = corner(firsts[0], along, CELL)
        if keys is not None:
            put(keys, slot * NOTES, t)
            put(keys, slot * NOTES + 1, y)
            put(keys, slot * NOTES + 2, x)
        mbarrier.expect(bar, BN * D * 2)
        copy(box, (b * heads + h, t, y, x), bar, data.index(slot), D, SIZE, 0, BN)
    else:
        if keys is not None:
            for i in gl.static_range(BN // SIZE):
                put(keys, slot * NOTES + i, firsts[i])
        mbarrier.expect(bar, BN * D * 2)
        for i in gl.static_range(BN // SIZE):
            copy(box, (b, h, firsts[i]), bar, data.index(slot), D, SIZE, i * SIZE, BN)
    return after(slot, phase, SLOTS)


@gluon.jit
def _produce(
    args, GROUPS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr, CELL: gl.constexpr,
):  # fmt: skip
    """The copying warp: K of a step, and V of the one before, item after item."""
    q_box, k_box, v_box, q_ring, k_ring, v_ring, keys, orders, lists, heads, ratio, far, along = args
    work, counter, indices, num_work = lists
    across = (heads // ratio, along)
    q_data, q_full, q_empty = q_ring
    told, told_full, told_empty = orders
    qs, qp, ks, kp, vs, vp, ts, tp = 0, 1, 0, 1, 0, 1, 0, 1
    at = gl.program_id(0)
    while at < num_work:
        then = gl.atomic_add(counter, 1) + gl.num_programs(0)
        item = work + at * 8
        b, h, row, start = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
        count, steps, unmasked, union = gl.load(item + 4), gl.load(item + 5), gl.load(item + 6), gl.load(item + 7)
        kv = h // ratio
        here = _first_keys(indices, start, steps - 1, count, far, BN, BK)
        mbarrier.wait(told_empty.index(ts), tp)
        put(told, ts * 8, steps)
        put(told, ts * 8 + 1, b)
        put(told, ts * 8 + 2, h)
        put(told, ts * 8 + 3, row)
        put(told, ts * 8 + 4, unmasked)
        put(told, ts * 8 + 5, union)
        mbarrier.arrive(told_full.index(ts), count=1)
        ts, tp = after(ts, tp, 2)
        ks, kp = _fetch(k_box, k_ring, keys, ks, kp, b, kv, here, across, BN, BK, D, KS, CELL)
        mbarrier.wait(q_empty.index(qs), qp)
        mbarrier.expect(q_full.index(qs), GROUPS * 64 * D * 2)
        for g in gl.static_range(GROUPS):
            spot = spot_of(b, h, row + g * 64, heads, along, CELL)
            copy(q_box, spot, q_full.index(qs), q_data.index(qs * GROUPS + g), D, 64, 0, 64)
        qs, qp = after(qs, qp, QS)
        for i in range(steps - 2, -1, -1):
            there = _first_keys(indices, start, i, count, far, BN, BK)
            ks, kp = _fetch(k_box, k_ring, keys, ks, kp, b, kv, there, across, BN, BK, D, KS, CELL)
            vs, vp = _fetch(v_box, v_ring, None, vs, vp, b, kv, here, across, BN, BK, DV, VS, CELL)
            here = there
        vs, vp = _fetch(v_box, v_ring, None, vs, vp, b, kv, here, across, BN, BK, DV, VS, CELL)
        at = then
    mbarrier.wait(told_empty.index(ts), tp)
    put(told, ts * 8, 0)
    mbarrier.arrive(told_full.index(ts), count=1)


@gluon.jit
def _columns(
    keys, slot, coord, layout: gl.constexpr, A: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, CELL: gl.constexpr
):  # fmt: skip
    """The keys of a step and, if there are axes, their first coordinates; of a cell, where it begins, three."""
    if CELL is not None:
        return get(keys, slot * NOTES), get(keys, slot * NOTES + 1), get(keys, slot * NOTES + 2)
    else:
        col = gl.arange(0, BN, layout)
        if BN > BK:
            key = gl.where(col < BK, get(keys, slot * NOTES), get(keys, slot * NOTES + 1)) + col % BK
        else:
            key = get(keys, slot * NOTES) + col
        key = gl.max_contiguous(gl.multiple_of(key, [2]), [2])
        if A == 0:
            return key, key
        else:
            return key, gl.load(coord + key)


@gluon.jit
def _bounds(table, rows, stride, T: gl.constexpr, A: gl.constexpr):
    """One side of every box and axis, for the rows."""
    found = ()
    for i in gl.static_range(T * A):
        found = found + (gl.load(table + i * stride + rows),)  # type: ignore[assignment]
    return found


@gluon.jit
def _masked(
    s, scale, here, boxes, T: gl.constexpr, A: gl.constexpr, BN: gl.constexpr, CELL: gl.constexpr
):  # fmt: skip
    """Scores, -inf where no box allows them, and what still has to scale them."""
    coord, stride, lo, hi = boxes
    if A == 0:  # nothing is forbidden but what lies beyond the last key
        return gl.where((here[0] < stride)[None, :], s, -float("inf")), scale
    elif CELL is None:
        return _masked_in_boxes(s, here[0], here[1], coord, stride, lo, hi, T, A), scale
    else:
        return _masked_in_cell(s, scale, here, lo, hi, A, BN, CELL), 1.0


@gluon.jit
def _masked_in_boxes(s, key, first, coord, stride, lo, hi, T: gl.constexpr, A: gl.constexpr):
    some = gl.full(s.shape, 0, gl.int1, s.type.layout)
    for t in gl.static_range(T):
        every = gl.full(s.shape, 1, gl.int1, s.type.layout)
        for a in gl.static_range(A):
            c = first if a == 0 else gl.load(coord + a * stride + key)
            every = every & (lo[t * A + a][:, None] <= c[None, :]) & (c[None, :] < hi[t * A + a][:, None])
        some = some | every
    return gl.where(some, s, -float("inf"))


@gluon.constexpr_function
def _cell_layout(keys, cell):
    """Of scores (row, t, y, x), each where a product leaves those of (row, key)."""

    def bit(row, key):
        return [row, key // (cell[1] * cell[2]), key // cell[2] % cell[1], key % cell[2]]

    wide = [bit(0, 8 << i) for i in range((keys // 8).bit_length() - 1)]
    lanes = [bit(0, 2), bit(0, 4), bit(1, 0), bit(2, 0), bit(4, 0)]
    return gl.DistributedLinearLayout([bit(0, 1), bit(8, 0), *wide], lanes, [bit(16, 0), bit(32, 0)], [], [64, *cell])


@gluon.constexpr_function
def _axis_layout(keys, cell, axis):
    """Of (row, coordinate on one axis of a cell), a part of `_cell_layout`."""
    whole = _cell_layout(keys, cell)
    for other in (2, 1, 0):
        if other != axis:
            whole = gl.SliceLayout(other + 1, whole)
    return whole


@gluon.jit
def _sides(lo, hi, rows, stride, T: gl.constexpr, A: gl.constexpr, BN: gl.constexpr, CELL: gl.constexpr):
    """The bounds that a mask needs of the rows: of every box and axis or, of cells, of every axis, a column each."""
    if CELL is None:
        layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
        at = rows + gl.arange(0, 64, layout)
        return _bounds(lo, at, stride, T, A), _bounds(hi, at, stride, T, A)
    else:
        starts = ()
        ends = ()
        for a in gl.static_range(A):
            at = rows + gl.arange(0, 64, gl.SliceLayout(1, _axis_layout(BN, CELL, 3 - A + a)))
            starts = starts + (gl.load(lo + a * stride + at)[:, None],)
            ends = ends + (gl.load(hi + a * stride + at)[:, None],)
        return starts, ends


@gluon.jit
def _addend(lo, hi, first, axis: gl.constexpr, BN: gl.constexpr, CELL: gl.constexpr):
    """0 where a row sees a coordinate of the cell on an axis, else -inf: (64, t, y, x), the other axes of length 1."""
    layout: gl.constexpr = _axis_layout(BN, CELL, axis)
    c = (first + gl.arange(0, CELL[axis], gl.SliceLayout(0, layout)))[None, :]
    found = gl.where((lo <= c) & (c < hi), 0.0, -float("inf"))
    if axis == 0:
        return found[:, :, None][:, :, :, None]
    elif axis == 1:
        return found[:, None, :][:, :, :, None]
    else:
        return found[:, None, :][:, :, None, :]


@gluon.jit
def _masked_in_cell(s, scale, cell, lo, hi, A: gl.constexpr, BN: gl.constexpr, CELL: gl.constexpr):
    """scale s, -inf where a key of the cell that begins at `cell` (t, y, x) lies beyond a bound of the row."""
    z = gl.convert_layout(s.reshape([64, CELL[0], CELL[1], CELL[2]]), _cell_layout(BN, CELL), assert_trivial=True)
    z = z * scale + _addend(lo[A - 1], hi[A - 1], cell[2], 2, BN, CELL)
    for a in gl.static_range(A - 1):
        z = z + _addend(lo[a], hi[a], cell[3 - A + a], 3 - A + a, BN, CELL)
    return gl.convert_layout(z.reshape([64, BN]), s.type.layout, assert_trivial=True)


@gluon.jit
def _softmax(s, m, l, scale, MASKED: gl.constexpr):
    """(p, maximum, sum, factor of the old o), in units of log2."""
    top = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(top == -float("inf"), 0.0, top) if MASKED else top
    p = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(m - shift)
    return p, top, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(
    rings, boxes, scores, q, ks, kp, vs, vp, p, m, l, o,
    BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
    T: gl.constexpr, A: gl.constexpr, CAPPED: gl.constexpr, CELL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """o takes p, the step before; the scores of this step become the next p."""
    k_ring, v_ring, keys = rings
    k_data, k_full, k_empty = k_ring
    v_data, v_full, v_empty = v_ring
    scale, cap = scores
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    mbarrier.wait(k_full.index(ks), kp)
    if MASKED:  # loaded here, so that the product hides how long it takes
        here = _columns(keys, ks, boxes[0], gl.SliceLayout(0, layout), A, BN, BK, CELL)
    k = k_data.index(ks).permute((1, 0))
    s = warpgroup_mma(q, k, gl.zeros([64, BN], gl.float32, layout), use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(vs), vp)
    o = warpgroup_mma(p, v_data.index(vs), o, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    mbarrier.arrive(k_empty.index(ks), count=1)
    ks, kp = after(ks, kp, KS)
    if CAPPED:
        s = cap - 2 * cap / (gl.exp2(s * scale) + 1)
        scale = 1.0
    if MASKED:
        s, scale = _masked(s, scale, here, boxes, T, A, BN, CELL)
    x, m, l, shrink = _softmax(s, m, l, scale, MASKED)
    following = gl.convert_layout(x.to(q.dtype), p.type.layout)
    o, p, following = warpgroup_mma_wait(0, (o, p, following))
    mbarrier.arrive(v_empty.index(vs), count=1)
    vs, vp = after(vs, vp, VS)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return ks, kp, vs, vp, following, m, l, o


@gluon.jit
def _consume(
    args, GROUP: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr, T: gl.constexpr, A: gl.constexpr,
    CAPPED: gl.constexpr, CELL: gl.constexpr,
):  # fmt: skip
    """One multiplying warpgroup: its 64 rows of item after item."""
    o_box, q_ring, rings, orders, coord, lo_table, hi_table, lse, scale, cap, heads, N, rows_padded, stride, along = (
        args
    )
    q_data, q_full, q_empty = q_ring
    k_ring, v_ring, keys = rings
    k_data, k_full, k_empty = k_ring
    v_data, v_full, v_empty = v_ring
    told, told_full, told_empty = orders
    dtype: gl.constexpr = q_data.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    qs, qp, ks, kp, vs, vp, ts, tp = 0, 0, 0, 0, 0, 0, 0, 0
    turn = 0
    mbarrier.wait(told_full.index(ts), tp)
    steps = get(told, ts * 8)
    while steps > 0:
        b, h, row = get(told, ts * 8 + 1), get(told, ts * 8 + 2), get(told, ts * 8 + 3) + GROUP * 64
        unmasked, union = get(told, ts * 8 + 4), get(told, ts * 8 + 5)
        mbarrier.arrive(told_empty.index(ts), count=1)
        ts, tp = after(ts, tp, 2)
        union = union * (T * A * rows_padded)
        lo, hi = _sides(lo_table + union, hi_table + union, row, rows_padded, T, A, BN, CELL)
        boxes = (coord, stride, lo, hi)
        slot = q_data.index(qs * GROUPS + GROUP)
        q = slot._reinterpret(dtype, [64, D], PANEL)

        mbarrier.wait(k_full.index(ks), kp)
        here = _columns(keys, ks, coord, gl.SliceLayout(0, s_layout), A, BN, BK, CELL)
        mbarrier.wait(q_full.index(qs), qp)
        k = k_data.index(ks).permute((1, 0))
        s = warpgroup_mma(q, k, gl.zeros([64, BN], gl.float32, s_layout), use_acc=False, is_async=True)
        if QS == 2:  # by now the o that lay in place of the last q is written
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(1 - qs), count=1, pred=turn > 0)
        s = warpgroup_mma_wait(0, (s,))
        mbarrier.arrive(k_empty.index(ks), count=1)
        ks, kp = after(ks, kp, KS)
        factor = scale
        if CAPPED:
            s = cap - 2 * cap / (gl.exp2(s * scale) + 1)
            factor = 1.0
        s, factor = _masked(s, factor, here, boxes, T, A, BN, CELL)
        m = gl.full([64], -float("inf"), gl.float32, row_layout)
        l = gl.full([64], 0.0, gl.float32, row_layout)
        x, m, l, _shrink = _softmax(s, m, l, factor, True)
        p = gl.convert_layout(x.to(dtype), p_layout)
        o = gl.zeros([64, DV], gl.float32, o_layout)

        for _i in range(steps - 1 - unmasked):
            ks, kp, vs, vp, p, m, l, o = _step(
                rings, boxes, (scale, cap), q, ks, kp, vs, vp, p, m, l, o,
                BN, BK, D, DV, KS, VS, T, A, CAPPED, CELL, True,
            )  # fmt: skip
        for _i in range(unmasked):
            ks, kp, vs, vp, p, m, l, o = _step(
                rings, boxes, (scale, cap), q, ks, kp, vs, vp, p, m, l, o,
                BN, BK, D, DV, KS, VS, T, A, CAPPED, CELL, False,
            )  # fmt: skip

        mbarrier.wait(v_full.index(vs), vp)
        o = warpgroup_mma(p, v_data.index(vs), o, is_async=True)
        nothing = l == 0.0
        found = gl.where(nothing, -float("inf"), (m + gl.log2(l)) * 0.6931471805599453)
        rows = row + gl.arange(0, 64, row_layout)
        gl.store(lse + (b * heads + h) * N + token_of(row, rows, along, CELL), found, mask=rows < N)
        inverse = gl.where(nothing, 0.0, 1.0 / l)
        o, p = warpgroup_mma_wait(0, (o, p))
        mbarrier.arrive(v_empty.index(vs), count=1)
        vs, vp = after(vs, vp, VS)
        o = o * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
        out = slot._reinterpret(dtype, [64, DV], PANEL)
        out.store(o.to(dtype))
        save(o_box, spot_of(b, h, row, heads, along, CELL), out, DV)
        if QS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(qs), count=1)
        qs, qp = after(qs, qp, QS)
        turn += 1
        mbarrier.wait(told_full.index(ts), tp)
        steps = get(told, ts * 8)
    tma.store_wait(0)


@gluon.jit
def attend_hopper(
    q_box, k_box, v_box, o_box, work, counter, indices, lo, hi, coord, lse, num_work, scale, cap, heads, ratio, N,
    rows_padded, stride, far, along,
    GROUPS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr, T: gl.constexpr, A: gl.constexpr, CAPPED: gl.constexpr,
    CELL: gl.constexpr,
):  # fmt: skip
    """GROUPS consumers of 64 rows, BN keys a step, tiles of BK keys; QS, KS, VS: slots of the rings.

    CELL: lengths (t, y, x) of the cells that tiles of keys and queries are, or None; along: cells along y and x.
    """
    dtype: gl.constexpr = q_box.dtype
    CHANNELS_Q: gl.constexpr = D if D > DV else DV  # o takes the place of q
    q_data = gl.allocate_shared_memory(dtype, [QS * GROUPS, 64, CHANNELS_Q], PANEL)
    q_ring = (q_data, barriers(QS, 1), barriers(QS, GROUPS))
    k_data = gl.allocate_shared_memory(dtype, [KS, BN, D], PANEL)
    k_ring = (k_data, barriers(KS, 1), barriers(KS, GROUPS))
    keys = gl.allocate_shared_memory(gl.int32, [KS * NOTES, 1], PLAIN)
    v_data = gl.allocate_shared_memory(dtype, [VS, BN, DV], PANEL)
    v_ring = (v_data, barriers(VS, 1), barriers(VS, GROUPS))
    orders = (gl.allocate_shared_memory(gl.int32, [16, 1], PLAIN), barriers(2, 1), barriers(2, GROUPS))
    given = (
        q_box,
        k_box,
        v_box,
        q_ring,
        k_ring,
        v_ring,
        keys,
        orders,
        (work, counter, indices, num_work),
        heads,
        ratio,
        far,
        along,
    )
    rings = (k_ring, v_ring, keys)
    taken = (o_box, q_ring, rings, orders, coord, lo, hi, lse, scale, cap, heads, N, rows_padded, stride, along)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (taken, 0, GROUPS, BN, BK, D, DV, QS, KS, VS, T, A, CAPPED, CELL)),
                (_consume, (taken, 1, GROUPS, BN, BK, D, DV, QS, KS, VS, T, A, CAPPED, CELL)),
                (_produce, (given, GROUPS, BN, BK, D, DV, QS, KS, VS, CELL)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (taken, 0, GROUPS, BN, BK, D, DV, QS, KS, VS, T, A, CAPPED, CELL)),
                (_produce, (given, GROUPS, BN, BK, D, DV, QS, KS, VS, CELL)),
            ],
            [1],
            [24],
        )


def forward(q: Tensor, k: Tensor, v: Tensor, walk: Walk, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(o (B, H, N, Dv) in q's dtype and, where Dv = D, its layout; lse (B, H, N) float32).

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), as `supports` admits them, in the plan's token order, or in
    that of the grid where there is one; scale > 0. A row that sees nothing gives zeros and -inf. The host waits for
    nothing.
    """
    (batch, heads, n, d), (kv_heads, m), dv = q.shape, k.shape[1:3], v.shape[3]
    size, grid = Sizes.of(walk.block, max(padded(d), padded(dv))), walk.grid
    o = torch.empty_like(q) if dv == d else q.new_empty(batch, heads, n, dv)
    out = o
    if grid is None:
        tokens, along = min(size.keys, walk.block[1]), (1, 1)
        copies = [described(x, count) for x, count in ((q, ROWS), (k, tokens), (v, tokens), (out, ROWS))]
    else:
        if not in_a_row(o):
            out = torch.empty_like(o, memory_format=torch.contiguous_format)
        along = grid.lengths[1] // grid.cell[1], grid.lengths[2] // grid.cell[2]
        copies = [described(on_grid(x, grid), *grid.cell) for x in (q, k, v, out)]
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    programs = min(processors(q.device) * size.programs, len(walk.work))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    attend_hopper[(programs,)](
        *copies, walk.work, counter, walk.indices, walk.lo, walk.hi, walk.coord, lse, len(walk.work),
        *numbers(scale, softcap), heads, heads // kv_heads, n, walk.lo.shape[3],
        walk.coord.shape[1] if walk.axes else m, walk.far, along,
        GROUPS=size.groups, BN=size.keys, BK=walk.block[1], D=padded(d), DV=padded(dv),
        QS=size.q_slots, KS=size.k_slots, VS=size.v_slots, T=walk.lo.shape[1], A=walk.axes,
        CAPPED=softcap is not None, CELL=None if grid is None else grid.cell,
        num_warps=4, maxnreg=None if size.groups == 2 else SHARED_REGISTERS,
    )  # fmt: skip
    return o if out is o else o.copy_(out), lse
