"""Entmax attention over a plan: kernels, and the function that launches them.

    o_i = sum_j p_ij v_j,   p_ij = max(0, z_ij - tau_i)^P,   z = (alpha - 1) scale q k,   P = 1 / (alpha - 1),
    tau_i such that sum_j p_ij = 1

(arXiv 1905.05702). tau of some keys is a lower bound of tau of all, and the P-norm of max(0, z - t) is convex in t, so
that a step of Newton's method from a lower bound gives a better one. Three passes follow from that:

1. `bracket` forms every score once and keeps of each row, in registers, the largest few of every residue class of
   columns. Their tau is a lower bound, and mostly within rounding of the row's own. On the way a bound of what was seen
   so far marks which tiles hold a score above it; the others are never looked at again.
2. `values` sums over the marked tiles at t. Beside sum p v it forms sum u v, u = p^(2 - alpha) = max(0, z - t)^(P - 1):
   by it o is corrected to first order for what t still lacks. Rows whose slots may have overflowed first improve t by
   passes without values; rows that prove too far off after all are done again. Tiles with a p > 0 are marked anew.
3. `queries` and `columns` go over these: ds_ij = u_ij (dp_ij - delta_i), dp = do v, delta_i = do_i . (sum u v / sum u).

No program adds to what another one writes: equal inputs give equal bits. Cost: 2 D operations a pair of a listed tile,
2 (D + 2 Dv) of a marked one, backward 2 (4 D + 3 Dv) of one in use; memory of ten bytes a tile and head, and o twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.softmax.kernels.arguments import Heads
from saccade.where import Plan


class Tables(NamedTuple):
    """A plan, see `Plan`; `group_stride` is 0 where all batch entries share their lists."""

    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    group_of: Tensor
    group_stride: int
    union_of: Tensor
    coord: Tensor
    lo: Tensor
    hi: Tensor
    num_queries: int
    num_keys: int
    num_rows: int

    @classmethod
    def of(cls, plan: Plan) -> Tables:
        group_of, boxes = plan.group_of, plan.boxes
        stride = group_of.shape[1] if group_of.shape[0] > 1 else 0
        lists = plan.indptr, plan.indices, plan.num_full, group_of, stride, plan.union_of
        return cls(*lists, boxes.coord, boxes.lo, boxes.hi, plan.num_queries, plan.num_keys, plan.num_row_tiles)


class Turned(NamedTuple):
    """Tile lists per key tile, `num_lists` a group, full tiles first; places: where its group's row lists hold each."""

    indptr: Tensor
    indices: Tensor
    places: Tensor
    num_full: Tensor
    num_lists: int

    @classmethod
    def of(cls, plan: Plan) -> Turned:
        lists, full = plan.rows(), plan.is_full()
        cols = plan.indices[: len(lists)].long()
        num_rows, num_cols = plan.num_row_tiles, plan.num_col_tiles
        group, row = lists // num_rows, lists % num_rows
        turned = group * num_cols + cols
        at = torch.argsort((turned * 2 + ~full) * num_rows + row)
        indptr = torch.zeros(plan.num_groups * num_cols + 1, dtype=torch.int64, device=plan.device)
        indptr[1:] = torch.bincount(turned, minlength=len(indptr) - 1).cumsum(0)
        num_full = torch.bincount(turned[full], minlength=len(indptr) - 1).int()
        places = at - plan.indptr[group[at] * num_rows]
        return cls(indptr, row[at].int(), places.int(), num_full, num_cols)


class LiveRows(NamedTuple):
    """Of each head and part of a row tile, the tiles of BN keys in use, and which steps of its list they are."""

    tiles: Tensor
    steps: Tensor
    num_full: Tensor
    num_all: Tensor


class LiveColumns(NamedTuple):
    """Of each head and tile of BN keys, the parts of SQ rows that use it."""

    parts: Tensor
    num_full: Tensor
    num_all: Tensor


@triton.jit
def along(x, DIM: tl.constexpr):
    """x (L,) as a column (L, 1) for DIM = 0, as a row (1, L) for DIM = 1."""
    return x[:, None] if DIM == 0 else x[None, :]


@triton.jit
def bounds(tables, union, place, COUNT: tl.constexpr):
    """On each of COUNT axes of boxes, where the interval of queries (R,) starts and how long it is, as tuples.

    The length is unsigned, so that `lo <= c < hi` is one comparison, `c - lo < hi - lo`.
    """
    los = ()
    sizes = ()
    exists = place < tables.num_queries
    for at in tl.static_range(COUNT):
        lo = tl.load(tables.lo + union + at * tables.num_queries + place, mask=exists, other=0)
        hi = tl.load(tables.hi + union + at * tables.num_queries + place, mask=exists, other=0)
        los = los + (lo,)
        sizes = sizes + (tl.where(hi > lo, hi - lo, 0).to(tl.uint32, bitcast=True),)
    return los, sizes


@triton.jit
def within(lo, size, c, DIM: tl.constexpr):
    """Which pairs lie between the bounds of one axis: bool, queries along DIM."""
    return (along(c, 1 - DIM) - along(lo, DIM)).to(tl.uint32, bitcast=True) < along(size, DIM)


@triton.jit
def masked(s, los, sizes, first, tables, BN: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DIM: tl.constexpr):
    """s, queries along DIM, with -inf for the pairs that no box admits; the keys are `first` and those that follow."""
    keys = first + tl.arange(0, BN)
    if AXES == 0:
        return tl.where(along(keys < tables.num_keys, 1 - DIM), s, float("-inf"))
    else:
        at = ()
        for axis in tl.static_range(AXES):  # a key that does not exist is beyond every bound
            c = tl.load(tables.coord + axis * tables.num_keys + keys, mask=keys < tables.num_keys, other=2147483647)
            at = at + (c,)
        for box in tl.static_range(BOXES):
            every = within(los[box * AXES], sizes[box * AXES], at[0], DIM)
            for axis in tl.static_range(1, AXES):
                every &= within(los[box * AXES + axis], sizes[box * AXES + axis], at[axis], DIM)
            if box == 0:
                some = every
            else:
                some |= every
        return tl.where(some, s, float("-inf"))


@triton.jit
def powers(d, POWER: tl.constexpr):
    """d^POWER and d^(POWER - 1) for d >= 0, both zero where d is."""
    if POWER == 2.0:
        return d * d, d
    elif POWER == 1.0:
        return d, tl.where(d == 0.0, 0.0, 1.0)
    else:
        none = d == 0.0
        u = tl.where(none, 0.0, tl.exp2((POWER - 1.0) * tl.log2(tl.where(none, 1.0, d))))
        return u * d, u


@triton.jit
def excess(s, scale, t, DIM: tl.constexpr):
    """max(0, scale s - t) for t of the rows along DIM; NaN stays."""
    return tl.maximum(s * scale - along(t, DIM), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def newton(p_sum, u_sum, POWER: tl.constexpr):
    """How far below the root of (sum p)^(1 / POWER) = 1 a row's t is, by the tangent; 0 where no score is above t."""
    none = p_sum == 0.0
    p_sum = tl.where(none, 1.0, p_sum)
    if POWER == 2.0:
        norm = tl.sqrt(p_sum)
    elif POWER == 1.0:
        norm = p_sum
    else:
        norm = tl.exp2(tl.log2(p_sum) / POWER)
    return (norm - 1.0) * p_sum / (norm * tl.where(none, 1.0, u_sum))


@triton.jit
def insert(slots, s, SQ: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr):
    """Slots after a tile of scores (SQ, BN), and the scores that lead it.

    Slots: of each column the DEPTH largest, in order. FOLD: columns j and j + BN / 2 share them for the larger of their
    scores; the smaller one, which is rarely above tau too, has one slot of its own.
    """
    if FOLD:
        a, b = s.reshape([SQ, 2, BN // 2]).permute([0, 2, 1]).split()
        s = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    x = s
    found = ()
    for at in tl.static_range(DEPTH):
        found = found + (tl.maximum(slots[at], x, propagate_nan=tl.PropagateNan.ALL),)
        x = tl.minimum(slots[at], x)
    if FOLD:
        found = found + (tl.maximum(slots[DEPTH], tl.minimum(a, b)),)
    return found, s


@triton.jit
def raised(t, slots, scale, ROUNDS: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr):
    """A better lower bound of tau: from the keys in COUNT slots alone, by ROUNDS steps. -inf where there are none."""
    top = tl.max(slots[0], 1) * scale
    none = top == float("-inf")
    t = tl.where(none, 0.0, tl.maximum(t, top - 1.0))
    for _ in range(ROUNDS):
        p_sum = tl.zeros_like(t)
        u_sum = tl.zeros_like(t)
        for at in tl.static_range(COUNT):
            p, u = powers(excess(slots[at], scale, t, 0), POWER)
            p_sum += tl.sum(p, 1)
            u_sum += tl.sum(u, 1)
        t += newton(p_sum, u_sum, POWER)
    return tl.where(none, float("-inf"), t)


@triton.jit
def read(
    x,
    box,
    batch,
    head,
    first,
    num_tokens,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """SIZE tokens from `first` on, of one head of x (B, H, L, WIDTH), as (SIZE, PADDED); zeros beyond its ends.

    box: a descriptor of x for the tensor memory accelerator, or None. INSIDE: all of them exist.
    """
    if box is not None:
        return box.load([batch, head, first, 0]).reshape([SIZE, PADDED])
    else:
        token = tl.arange(0, SIZE)
        channel = tl.arange(0, PADDED)
        # A head may hold more than 2**31 elements.
        at = x.x + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h + first.to(tl.int64) * x.stride_n
        at = at + token[:, None] * x.stride_n + channel[None, :]
        if INSIDE and WIDTH == PADDED:
            return tl.load(at)
        else:
            return tl.load(at, mask=(first + token < num_tokens)[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
def write(x, to, values, batch, head, first, num_tokens, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Values (SIZE, PADDED) as the tokens from `first` on of one head of `to`, which is laid out as x is."""
    token = tl.arange(0, SIZE)
    channel = tl.arange(0, PADDED)
    at = to + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h + first.to(tl.int64) * x.stride_n
    at = at + token[:, None] * x.stride_n + channel[None, :]
    inside = (first + token < num_tokens)[:, None] & (channel < WIDTH)[None, :]
    tl.store(at, values.to(x.x.dtype.element_ty), mask=inside)


@triton.jit
def products(
    qs, k, k_box, batch, kv_head, first, los, sizes, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """q k of the rows with BN keys, -inf for pairs that are not admitted, and the keys as they were read."""
    ks = read(k, k_box, batch, kv_head, first, tables.num_keys, BN, D, PAD_D, FULL)
    s = tl.dot(qs, ks.T, input_precision=PRECISION)
    if not FULL:
        s = masked(s, los, sizes, first, tables, BN, BOXES, AXES, 0)
    return s, ks


@triton.jit
def sweep(
    slots, t, qs, k, k_box, batch, kv_head, listed, begin, end, last, marks, los, sizes, scale, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    SUBS: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The slots after steps begin .. end - 1 of a list, from its `last` step backwards; tiles above t are marked."""
    STEPS: tl.constexpr = BK // BN
    for at in tl.range(begin, end):
        step = last - at
        first = tl.load(listed + step // STEPS) * BK + step % STEPS * BN
        s, _ = products(
            qs, k, k_box, batch, kv_head, first, los, sizes, tables,
            D, PAD_D, BN, BOXES, AXES, PRECISION, FULL,
        )  # fmt: skip
        slots, s = insert(slots, s, SQ, BN, DEPTH, FOLD)
        above = tl.where(tl.max(s, 1) * scale <= t, 0, 1)
        tl.store(marks + step * SUBS, tl.max(above, 0).to(tl.int8))
    return slots


@triton.jit
def bracket(
    q, k, k_box, tau, sure, marks, tables, base, scale, ratio,
    D: tl.constexpr, PAD_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DEPTH: tl.constexpr, FOLD: tl.constexpr,
    SPARE: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A lower bound of tau (B, H, places), whether it is good enough (B, H, parts of SQ rows), and the marked tiles.

    SPARE: how many slots of a row may be full to the last for that. scale: of q k to z.
    """
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    WIDTH: tl.constexpr = BN // 2 if FOLD else BN
    COUNT: tl.constexpr = DEPTH + 1 if FOLD else DEPTH
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # long lists are mostly the last: they start first
    row_tile = part // SUBS
    head = tl.program_id(1)
    kv_head = head // ratio
    batch = tl.program_id(2)
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    entry = group * tables.num_rows + row_tile
    head_of_all = batch * tl.num_programs(1) + head
    place = part * SQ + tl.arange(0, SQ)
    exists = place < tables.num_queries
    qs = read(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    los, sizes = bounds(tables, union, place, BOXES * AXES)

    start = tl.load(tables.indptr + entry)
    count = (tl.load(tables.indptr + entry + 1) - start).to(tl.int32) * STEPS
    full = tl.load(tables.num_full + entry) * STEPS
    marks += (tl.load(base + head_of_all) + start - tl.load(tables.indptr + group * tables.num_rows)) * (STEPS * SUBS)
    marks += part % SUBS
    listed = tables.indices + start
    slots = ()
    for _ in tl.static_range(COUNT):
        slots = slots + (tl.full([SQ, WIDTH], float("-inf"), tl.float32),)
    t = tl.full([SQ], float("-inf"), tl.float32)
    # Partial tiles first: they hold the nearest keys. Each leg is as long as all before it, and raises the bound.
    done = 0
    while done < count - full:
        upto = tl.minimum(tl.maximum(2 * done, 2), count - full)
        slots = sweep(
            slots, t, qs, k, k_box, batch, kv_head, listed, done, upto, count - 1, marks, los, sizes, scale, tables,
            D, PAD_D, BK, BN, SQ, SUBS, BOXES, AXES, DEPTH, FOLD, PRECISION, False,
        )  # fmt: skip
        t = tl.where(exists, raised(t, slots, scale, 1, COUNT, POWER), float("inf"))
        done = upto
    while done < count:
        upto = tl.minimum(tl.maximum(2 * done, 2), count)
        slots = sweep(
            slots, t, qs, k, k_box, batch, kv_head, listed, done, upto, count - 1, marks, los, sizes, scale, tables,
            D, PAD_D, BK, BN, SQ, SUBS, BOXES, AXES, DEPTH, FOLD, PRECISION, True,
        )  # fmt: skip
        t = tl.where(exists, raised(t, slots, scale, 1, COUNT, POWER), float("inf"))
        done = upto
    t = raised(t, slots, scale, 6, COUNT, POWER)
    t = tl.where(exists & (t != float("-inf")), t, float("inf"))  # a row that sees nothing: nothing is above it
    at_part = head_of_all * tl.num_programs(0) + part
    tl.store(tau + head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place, t)
    spilled = tl.zeros([SQ], tl.int32)
    for at in tl.static_range(DEPTH - 1, COUNT):
        spilled += tl.sum((slots[at] * scale > t[:, None]).to(tl.int32), 1)
    tl.store(sure + at_part, (tl.max(spilled, 0) <= SPARE).to(tl.int32))


@triton.jit
def power_sums(
    p_sum, u_sum, t, qs, k, k_box, batch, kv_head, listed, begin, end, los, sizes, scale, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    POWER: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Sums of p and u of the rows at t after the tiles begin .. end - 1 of a list."""
    for at in tl.range(begin, end):
        first = tl.load(listed + at) * BN
        s, _ = products(
            qs, k, k_box, batch, kv_head, first, los, sizes, tables,
            D, PAD_D, BN, BOXES, AXES, PRECISION, FULL,
        )  # fmt: skip
        p, u = powers(excess(s, scale, t, 0), POWER)
        p_sum += tl.sum(p, 1)
        u_sum += tl.sum(u, 1)
    return p_sum, u_sum


@triton.jit
def absorb(
    acc, u_acc, p_sum, u_sum, t, qs, k, k_box, v, v_box, batch, kv_head, listed, steps, begin, end, marks,
    los, sizes, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, SUBS: tl.constexpr,
    BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    MARK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Sums of p v, u v, p and u of the rows at t after the tiles begin .. end - 1 of a list. MARK: mark those used."""
    for at in tl.range(begin, end):
        first = tl.load(listed + at) * BN
        s, _ = products(
            qs, k, k_box, batch, kv_head, first, los, sizes, tables,
            D, PAD_D, BN, BOXES, AXES, PRECISION, FULL,
        )  # fmt: skip
        p, u = powers(excess(s, scale, t, 0), POWER)
        of_u = tl.sum(u, 1)
        p_sum += tl.sum(p, 1)
        u_sum += of_u
        vs = read(v, v_box, batch, kv_head, first, tables.num_keys, BN, DV, PAD_DV, FULL)
        acc = tl.dot(p.to(vs.dtype), vs, acc, input_precision=PRECISION)
        u_acc = tl.dot(u.to(vs.dtype), vs, u_acc, input_precision=PRECISION)
        if MARK:
            used = tl.where(tl.max(of_u, 0) == 0.0, 0, 1)
            tl.store(marks + tl.load(steps + at).to(tl.int64) * SUBS, used.to(tl.int8))
    return acc, u_acc, p_sum, u_sum


@triton.jit
def values(
    q, k, k_box, v, v_box, o, mean, tau, sure, marks, tables, live, base, scale, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr, CLOSE: tl.constexpr, LEAP: tl.constexpr,
):  # fmt: skip
    """o (B, H, N, Dv), tau, and where gradients are wanted mean = sum u v / sum u, like o, and marks of tiles in use.

    t is good enough for the correction where u_sum times its error is below CLOSE, and for one more step where it is
    below LEAP.
    """
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    row_tile = part // SUBS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // ratio
    head_of_all = batch * tl.num_programs(1) + head
    at_part = head_of_all * tl.num_programs(0) + part
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    place = part * SQ + tl.arange(0, SQ)
    qs = read(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    los, sizes = bounds(tables, union, place, BOXES * AXES)
    tau += head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place
    t = tl.load(tau)

    begin, of_list = row_list(tables, base, group, row_tile, head_of_all, part % SUBS, STEPS, SUBS)
    full = tl.load(live.num_full + at_part)
    count = tl.load(live.num_all + at_part)
    listed = live.tiles + begin
    marks += of_list * SUBS + part % SUBS

    settled = tl.load(sure + at_part) != 0
    trials = 0
    while trials < 2:
        rounds = 0
        while not settled:
            p_sum = tl.zeros([SQ], tl.float32)
            u_sum = tl.zeros([SQ], tl.float32)
            p_sum, u_sum = power_sums(
                p_sum, u_sum, t, qs, k, k_box, batch, kv_head, listed, 0, full, los, sizes, scale, tables,
                D, PAD_D, BN, BOXES, AXES, POWER, PRECISION, True,
            )  # fmt: skip
            p_sum, u_sum = power_sums(
                p_sum, u_sum, t, qs, k, k_box, batch, kv_head, listed, full, count, los, sizes, scale, tables,
                D, PAD_D, BN, BOXES, AXES, POWER, PRECISION, False,
            )  # fmt: skip
            step = newton(p_sum, u_sum, POWER)
            t += step
            rounds += 1
            settled = (tl.max(tl.abs(step) * u_sum, 0) < LEAP) | (rounds == 50)

        acc = tl.zeros([SQ, PAD_DV], tl.float32)
        u_acc = tl.zeros([SQ, PAD_DV], tl.float32)
        p_sum = tl.zeros([SQ], tl.float32)
        u_sum = tl.zeros([SQ], tl.float32)
        MARK: tl.constexpr = mean is not None
        acc, u_acc, p_sum, u_sum = absorb(
            acc, u_acc, p_sum, u_sum, t, qs, k, k_box, v, v_box, batch, kv_head, listed, live.steps + begin, 0, full,
            marks, los, sizes, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SUBS, BOXES, AXES, POWER, PRECISION, MARK, True,
        )  # fmt: skip
        acc, u_acc, p_sum, u_sum = absorb(
            acc, u_acc, p_sum, u_sum, t, qs, k, k_box, v, v_box, batch, kv_head, listed, live.steps + begin, full,
            count, marks, los, sizes, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SUBS, BOXES, AXES, POWER, PRECISION, MARK, False,
        )  # fmt: skip
        step = newton(p_sum, u_sum, POWER)
        t += step
        blind = p_sum == 0.0
        total = tl.where(blind, 1.0, p_sum - POWER * step * u_sum)
        acc = (acc - (POWER * step)[:, None] * u_acc) / total[:, None]
        write(o, o.x, acc, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV)
        if mean is not None:
            u_acc = u_acc / tl.where(blind, 1.0, u_sum)[:, None]
            write(o, mean, u_acc, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV)
        error = tl.max(tl.abs(step) * u_sum, 0)
        settled = error <= LEAP
        trials += tl.where(error > CLOSE, 1, 2)
    tl.store(tau, t)


@triton.jit
def row_list(tables, base, group, row_tile, head_of_all, sub, STEPS: tl.constexpr, SUBS: tl.constexpr):
    """Where the list of live tiles of a part of a row tile begins, and where the steps of its head's lists do."""
    zero = tl.load(tables.indptr + group * tables.num_rows)
    start = tl.load(tables.indptr + group * tables.num_rows + row_tile)
    length = tl.load(tables.indptr + group * tables.num_rows + row_tile + 1) - start
    before = tl.load(base + head_of_all)
    return (before + start - zero) * (STEPS * SUBS) + sub * length * STEPS, before * STEPS


@triton.jit
def collect_rows(
    marks, tables, live, base,
    BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The lists of marked tiles of every part of SQ rows, full ones first."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    part = tl.program_id(0)
    row_tile = part // SUBS
    head = tl.program_id(1)
    head_of_all = tl.program_id(2) * tl.num_programs(1) + head
    group = tl.load(tables.group_of + tl.program_id(2) * tables.group_stride + head)
    entry = group * tables.num_rows + row_tile
    begin, of_list = row_list(tables, base, group, row_tile, head_of_all, part % SUBS, STEPS, SUBS)
    start = tl.load(tables.indptr + entry)
    count = (tl.load(tables.indptr + entry + 1) - start).to(tl.int32) * STEPS
    full = tl.load(tables.num_full + entry) * STEPS
    first_step = ((start - tl.load(tables.indptr + group * tables.num_rows)) * STEPS).to(tl.int32)
    filled = 0
    num_full = 0
    for at in tl.range(0, count, CHUNK):
        step = at + tl.arange(0, CHUNK)
        inside = step < count
        mark = tl.load(marks + (of_list + first_step + step) * SUBS + part % SUBS, mask=inside, other=0) != 0
        tile = tl.load(tables.indices + start + step // STEPS, mask=inside, other=0) * STEPS + step % STEPS
        place = filled + tl.cumsum(mark.to(tl.int32), 0) - 1
        tl.store(live.tiles + begin + place, tile, mask=mark)
        tl.store(live.steps + begin + place, first_step + step, mask=mark)
        filled += tl.sum(mark.to(tl.int32), 0)
        num_full += tl.sum((mark & (step < full)).to(tl.int32), 0)
    at_part = head_of_all * tl.num_programs(0) + part
    tl.store(live.num_full + at_part, num_full)
    tl.store(live.num_all + at_part, filled)


@triton.jit
def collect_columns(
    marks, tables, turned, live, base, BQ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The lists of parts of SQ rows that mark each tile of BN keys, full ones first."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    step = tl.program_id(0) % STEPS
    head = tl.program_id(1)
    head_of_all = tl.program_id(2) * tl.num_programs(1) + head
    group = tl.load(tables.group_of + tl.program_id(2) * tables.group_stride + head)
    entry = group * turned.num_lists + tl.program_id(0) // STEPS
    before = tl.load(base + head_of_all)
    begin = column_list(turned, before, group, entry, step, STEPS, SUBS)
    start = tl.load(turned.indptr + entry)
    count = (tl.load(turned.indptr + entry + 1) - start).to(tl.int32) * SUBS
    full = tl.load(turned.num_full + entry) * SUBS
    filled = 0
    num_full = 0
    for at in tl.range(0, count, CHUNK):
        slot = at + tl.arange(0, CHUNK)
        inside = slot < count
        listed = tl.load(turned.places + start + slot // SUBS, mask=inside, other=0).to(tl.int64)
        mark = tl.load(marks + ((before + listed) * STEPS + step) * SUBS + slot % SUBS, mask=inside, other=0) != 0
        part = tl.load(turned.indices + start + slot // SUBS, mask=inside, other=0) * SUBS + slot % SUBS
        tl.store(live.parts + begin + filled + tl.cumsum(mark.to(tl.int32), 0) - 1, part, mask=mark)
        filled += tl.sum(mark.to(tl.int32), 0)
        num_full += tl.sum((mark & (slot < full)).to(tl.int32), 0)
    at_column = head_of_all * tl.num_programs(0) + tl.program_id(0)
    tl.store(live.num_full + at_column, num_full)
    tl.store(live.num_all + at_column, filled)


@triton.jit
def column_list(turned, before, group, entry, step, STEPS: tl.constexpr, SUBS: tl.constexpr):
    """Where the list of live parts of a tile of keys begins."""
    start = tl.load(turned.indptr + entry)
    length = tl.load(turned.indptr + entry + 1) - start
    return (before + start - tl.load(turned.indptr + group * turned.num_lists)) * (STEPS * SUBS) + step * length * SUBS


@triton.jit
def of_queries(
    dq, t, deltas, qs, dos, k, k_box, v, v_box, batch, kv_head, listed, begin, end, los, sizes, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr,
    AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """dq of SQ rows after the tiles begin .. end - 1 of a list."""
    for at in tl.range(begin, end):
        first = tl.load(listed + at) * BN
        vs = read(v, v_box, batch, kv_head, first, tables.num_keys, BN, DV, PAD_DV, FULL)
        dp = tl.dot(dos, vs.T, input_precision=PRECISION)
        s, ks = products(
            qs, k, k_box, batch, kv_head, first, los, sizes, tables,
            D, PAD_D, BN, BOXES, AXES, PRECISION, FULL,
        )  # fmt: skip
        _, u = powers(excess(s, scale, t, 0), POWER)
        ds = u * (dp - deltas[:, None])
        dq = tl.dot(ds.to(ks.dtype), ks, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries(
    q, k, k_box, v, v_box, do, mean, dq, tau, delta, tables, live, base, scale, factor, ratio,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta (B, H, places) for the columns. factor: of q k to scores."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    head_of_all = batch * tl.num_programs(1) + head
    group = tl.load(tables.group_of + batch * tables.group_stride + head)
    union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
    place = part * SQ + tl.arange(0, SQ)
    qs = read(q, None, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D, False)
    dos = read(do, None, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV, False)
    means = read(mean, None, batch, head, part * SQ, tables.num_queries, SQ, DV, PAD_DV, False)
    los, sizes = bounds(tables, union, place, BOXES * AXES)
    at_place = head_of_all.to(tl.int64) * (tl.num_programs(0) * SQ) + place
    deltas = tl.sum(dos.to(tl.float32) * means.to(tl.float32), 1)
    tl.store(delta + at_place, deltas)
    t = tl.load(tau + at_place)

    begin, _ = row_list(tables, base, group, part // SUBS, head_of_all, part % SUBS, STEPS, SUBS)
    full = tl.load(live.num_full + head_of_all * tl.num_programs(0) + part)
    count = tl.load(live.num_all + head_of_all * tl.num_programs(0) + part)
    found = tl.zeros([SQ, PAD_D], tl.float32)
    found = of_queries(
        found, t, deltas, qs, dos, k, k_box, v, v_box, batch, head // ratio, live.tiles + begin, 0, full,
        los, sizes, scale, tables,
        D, DV, PAD_D, PAD_DV, BN, BOXES, AXES, POWER, PRECISION, True,
    )  # fmt: skip
    found = of_queries(
        found, t, deltas, qs, dos, k, k_box, v, v_box, batch, head // ratio, live.tiles + begin, full, count,
        los, sizes, scale, tables,
        D, DV, PAD_D, PAD_DV, BN, BOXES, AXES, POWER, PRECISION, False,
    )  # fmt: skip
    write(dq, dq.x, found * factor, batch, head, part * SQ, tables.num_queries, SQ, D, PAD_D)


@triton.jit
def of_columns(
    dk, dv, ks, vs, q, q_box, do, do_box, batch, head, tau, delta, listed, begin, end, first_key, union, scale, tables,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BN: tl.constexpr, SQ: tl.constexpr,
    BOXES: tl.constexpr,
    AXES: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys after the parts begin .. end - 1 of a list of one head's rows."""
    for at in tl.range(begin, end):
        first = tl.load(listed + at) * SQ
        places = first + tl.arange(0, SQ)
        qs = read(q, q_box, batch, head, first, tables.num_queries, SQ, D, PAD_D, False)
        dos = read(do, do_box, batch, head, first, tables.num_queries, SQ, DV, PAD_DV, False)
        t = tl.load(tau + places)
        deltas = tl.load(delta + places)
        s = tl.dot(ks, qs.T, input_precision=PRECISION)
        dp = tl.dot(vs, dos.T, input_precision=PRECISION)
        if not FULL:
            los, sizes = bounds(tables, union, places, BOXES * AXES)
            s = masked(s, los, sizes, first_key, tables, BN, BOXES, AXES, 1)
        p, u = powers(excess(s, scale, t, 1), POWER)
        dv = tl.dot(p.to(dos.dtype), dos, dv, input_precision=PRECISION)
        ds = u * (dp - deltas[None, :])
        dk = tl.dot(ds.to(qs.dtype), qs, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def columns(
    q, q_box, k, v, do, do_box, dk, dv, tau, delta, tables, turned, live, base, scale, factor, ratio, num_places,
    D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SQ: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, POWER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, all query heads of the key head one after another. factor: of q k to scores."""
    STEPS: tl.constexpr = BK // BN
    SUBS: tl.constexpr = BQ // SQ
    column = tl.program_id(0)  # the first keys have mostly the longest lists
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    ks = read(k, None, batch, kv_head, column * BN, tables.num_keys, BN, D, PAD_D, False)
    vs = read(v, None, batch, kv_head, column * BN, tables.num_keys, BN, DV, PAD_DV, False)
    found_dk = tl.zeros([BN, PAD_D], tl.float32)
    found_dv = tl.zeros([BN, PAD_DV], tl.float32)
    for member in tl.range(0, ratio):
        head = kv_head * ratio + member
        head_of_all = batch * (tl.num_programs(1) * ratio) + head
        group = tl.load(tables.group_of + batch * tables.group_stride + head)
        union = tl.load(tables.union_of + group) * (BOXES * AXES) * tables.num_queries
        entry = group * turned.num_lists + column // STEPS
        begin = column_list(turned, tl.load(base + head_of_all), group, entry, column % STEPS, STEPS, SUBS)
        full = tl.load(live.num_full + head_of_all * tl.num_programs(0) + column)
        count = tl.load(live.num_all + head_of_all * tl.num_programs(0) + column)
        of_head = head_of_all.to(tl.int64) * num_places
        found_dk, found_dv = of_columns(
            found_dk, found_dv, ks, vs, q, q_box, do, do_box, batch, head, tau + of_head, delta + of_head,
            live.parts + begin, 0, full,
            column * BN, union, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SQ, BOXES, AXES, POWER, PRECISION, True,
        )  # fmt: skip
        found_dk, found_dv = of_columns(
            found_dk, found_dv, ks, vs, q, q_box, do, do_box, batch, head, tau + of_head, delta + of_head,
            live.parts + begin, full, count,
            column * BN, union, scale, tables,
            D, DV, PAD_D, PAD_DV, BN, SQ, BOXES, AXES, POWER, PRECISION, False,
        )  # fmt: skip
    write(dk, dk.x, found_dk * factor, batch, kv_head, column * BN, tables.num_keys, BN, D, PAD_D)
    write(dv, dv.x, found_dv, batch, kv_head, column * BN, tables.num_keys, BN, DV, PAD_DV)


class Sizes(NamedTuple):
    """SQ rows a program, a part of a row tile; BN keys a step; warps and registers a thread of `bracket` (None: as many
    as it asks for), and warps of the others; registers of `values`, and the steps whose loads it has in flight."""

    part: int
    keys: int
    bracket_warps: int
    bracket_registers: int | None
    warps: int
    registers: int | None
    stages: int

    @classmethod
    def of(cls, block: tuple[int, int], width: int, dtype: torch.dtype) -> Sizes:
        """For a plan's tiles and the wider of a key and a value."""
        if dtype == torch.float32:
            return cls(min(block[0], 32), min(block[1], 32), 4, None, 8 if width > 64 else 4, None, 2)
        part, keys = min(block[0], 64), min(block[1], 32 if width > 128 else 64)
        warps = max(1, part // 16)
        three = 168 if warps == 4 else None  # registers with which three programs share a multiprocessor
        if width > 128:
            return cls(part, keys, warps, three, 8, None, 2)
        return cls(part, keys, warps, three, warps, *((three, 3) if width <= 64 else (None, 2)))


class Care(NamedTuple):
    """How exact tau is to be: the share of a row's slots that may overflow, see `bracket`, and limits, see `values`."""

    spare: float
    close: float
    leap: float


NARROW, SINGLE = Care(0.375, 0.03, 0.1), Care(0.0, 3e-5, 1e-3)


@dataclass(frozen=True)
class Launch:
    """One problem. base: (B * H,) int64, how many entries the lists of earlier heads have; total: those of all."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Tables
    turned: Turned
    base: Tensor
    total: int
    block: tuple[int, int]
    scale: float
    alpha: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float) -> Launch:
        """What the plan gives is kept with it."""
        key = "entmax", len(q)
        if key not in plan.derived:
            lengths = plan.indptr[:: plan.num_row_tiles].diff()[plan.group_of.expand(len(q), -1).flatten()]
            plan.derived[key] = Tables.of(plan), Turned.of(plan), lengths.cumsum(0) - lengths, int(lengths.sum())
        kept = cast(tuple[Tables, Turned, Tensor, int], plan.derived[key])
        return cls(q, k, v, *kept, plan.block, scale, alpha)

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.block, max(padded(self.q.shape[3]), padded(self.v.shape[3])), self.q.dtype)

    @property
    def row_programs(self) -> tuple[int, int, int]:
        """One for each part of SQ rows of a head."""
        return self.tables.num_rows * (self.block[0] // self.sizes.part), self.q.shape[1], len(self.q)

    @property
    def num_columns(self) -> int:
        """Tiles of BN keys."""
        return self.turned.num_lists * (self.block[1] // self.sizes.keys)

    @property
    def tiles(self) -> dict[str, int]:
        return {"BQ": self.block[0], "BK": self.block[1], "BN": self.sizes.keys, "SQ": self.sizes.part}

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel that forms scores is compiled for."""
        d = self.q.shape[3]
        return self.tiles | {
            "D": d,
            "PAD_D": padded(d),
            "BOXES": self.tables.lo.shape[1],
            "AXES": self.tables.coord.shape[0],
            "POWER": 1 / (self.alpha - 1),
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
        }

    @property
    def of_values(self) -> dict[str, int]:
        """What those that read values are, too."""
        return {"DV": self.v.shape[3], "PAD_DV": padded(self.v.shape[3])}

    def forward(self, gradients: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """o (B, H, N, Dv), and what `backward` takes where gradients are wanted: tau, mean, marks of tiles in use."""
        q, size = self.q, self.sizes
        (batch, heads, n, _), grid = q.shape, self.row_programs
        care = SINGLE if q.dtype == torch.float32 else NARROW
        o = q.new_empty(batch, heads, n, self.v.shape[3])
        mean = torch.empty_like(o) if gradients else None
        tau = q.new_empty(batch, heads, grid[0] * size.part, dtype=torch.float32)
        sure = q.new_empty(batch, heads, grid[0], dtype=torch.int32)
        marks, used = self.no_marks(), self.no_marks()
        k_box, v_box = described(size.keys, self.k, self.v)
        scale, ratio = self.scale * (self.alpha - 1), heads // self.k.shape[1]
        fold = size.keys == 64
        bracket[grid](
            Heads.of(q), Heads.of(self.k), k_box, tau, sure, marks, self.tables, self.base, scale, ratio,
            DEPTH=3 if fold else 4, FOLD=fold, SPARE=int(care.spare * (size.keys // 2 if fold else size.keys)),
            **self.constants, num_warps=size.bracket_warps, num_stages=3, maxnreg=size.bracket_registers,
        )  # fmt: skip
        values[grid](
            Heads.of(q), Heads.of(self.k), k_box, Heads.of(self.v), v_box, Heads.of(o), mean, tau, sure, used,
            self.tables, self.live_rows(marks), self.base, scale, ratio, CLOSE=care.close, LEAP=care.leap,
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=size.stages, maxnreg=size.registers,
        )  # fmt: skip
        return o, tau, mean, used

    def backward(self, do: Tensor, tau: Tensor, mean: Tensor, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        q, k, v, size = self.q, self.k, self.v, self.sizes
        heads, kv_heads = q.shape[1], k.shape[1]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = torch.empty_like(tau)
        scale, ratio = self.scale * (self.alpha - 1), heads // kv_heads
        k_box, v_box = described(size.keys, k, v)
        queries[self.row_programs](
            Heads.of(q), Heads.of(k), k_box, Heads.of(v), v_box, Heads.of(do), Heads.of(mean), Heads.of(dq), tau, delta,
            self.tables, self.live_rows(marks), self.base, scale, self.scale, ratio,
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=2,
        )  # fmt: skip
        q_box, do_box = described(size.part, q, do)
        columns[(self.num_columns, kv_heads, len(q))](
            Heads.of(q), q_box, Heads.of(k), Heads.of(v), Heads.of(do), do_box, Heads.of(dk), Heads.of(dv), tau, delta,
            self.tables, self.turned, self.live_columns(marks), self.base, scale, self.scale, ratio, tau.shape[2],
            **self.constants, **self.of_values, num_warps=size.warps, num_stages=2,
        )  # fmt: skip
        return dq, dk, dv

    def no_marks(self) -> Tensor:
        """int8, for each head, entry of its lists, step of BN keys and part of SQ rows."""
        steps = self.total * (self.block[1] // self.sizes.keys) * (self.block[0] // self.sizes.part)
        return torch.zeros(steps, dtype=torch.int8, device=self.q.device)

    def live_rows(self, marks: Tensor) -> LiveRows:
        """The row lists that the marks leave."""
        tiles, steps = torch.empty(2, len(marks), dtype=torch.int32, device=marks.device)
        live = LiveRows(tiles, steps, *self.counts(self.row_programs[0]))
        collect_rows[self.row_programs](marks, self.tables, live, self.base, CHUNK=256, **self.tiles)
        return live

    def live_columns(self, marks: Tensor) -> LiveColumns:
        """The same, by tile of keys."""
        live = LiveColumns(torch.empty_like(marks, dtype=torch.int32), *self.counts(self.num_columns))
        grid = self.num_columns, self.q.shape[1], len(self.q)
        collect_columns[grid](marks, self.tables, self.turned, live, self.base, CHUNK=256, **self.tiles)
        return live

    def counts(self, lists: int) -> Tensor:
        """Room for two numbers a list."""
        return torch.empty(2, len(self.q), self.q.shape[1], lists, dtype=torch.int32, device=self.q.device)


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def described(size: int, *tensors: Tensor) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors for `size` tokens of one head at a time; None where the layout of one does not let it be."""

    def fits(x: Tensor) -> bool:
        return x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])

    if all(fits(x) for x in tensors):
        return tuple(TensorDescriptor.from_tensor(x, [1, 1, size, padded(x.shape[3])]) for x in tensors)
    return (None,) * len(tensors)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float
    ) -> Tensor:
        o, *rest = Launch.of(q, k, v, plan, scale, alpha).forward(any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(q, k, v, *rest)
        ctx.plan, ctx.scale, ctx.alpha = plan, scale, alpha
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *rest = ctx.saved_tensors
        do = do if do.stride(3) == 1 else do.contiguous()
        return *Launch.of(q, k, v, ctx.plan, ctx.scale, ctx.alpha).backward(do, *rest), None, None, None


SIDES = (16, 32, 64, 128, 256)


def reasons(q: Tensor, v: Tensor, plan: Plan | None, alpha: float) -> list[str]:
    """Why these kernels cannot run a problem, beside what any of this package cannot; empty when they can."""
    found = []
    if alpha > 2:
        found.append(f"for alpha above 2 its slopes are not bounded, got {alpha}")
    if max(q.shape[3], v.shape[3]) > 256:
        found.append(f"more than 256 channels do not fit its tiles, got {q.shape[3]} and {v.shape[3]}")
    if plan is not None:
        if plan.bits is not None:
            found.append("its entmax has no bit masks")
        if plan.token_indices is not None:
            found.append("its entmax has no lists of single keys")
        if any(side not in SIDES for side in plan.block):
            found.append(f"the plan's tiles {plan.block} are none of {', '.join(map(str, SIDES))} tokens on a side")
    return found


def attend_entmax(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float) -> Tensor:
    """Entmax attention over the pairs of a plan, differentiable in q, k and v.

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), in q's dtype: float32 or narrower. scale:
    factor of the scores. alpha: in (1, 2]. A row that sees nothing gives zeros. The caller has asked `reasons`.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if scale <= 0:  # the kernels take maxima before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if plan.k_order is not None:
        k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    if plan.q_order is None:
        o: Tensor = _Entmax.apply(q, k, v, plan, scale, alpha)
        return o
    o = _Entmax.apply(q[:, :, plan.q_order], k, v, plan, scale, alpha)
    return o[:, :, torch.argsort(plan.q_order)]
