"""The decode kernels: few queries a sequence against the pages that lists name, shared out evenly over the device.

    o_i = sum_j 2^(z_ij - m_i) v_j / l_i,    lse_i = (m_i + log2 l_i) / log2 e

over the listed keys j. The lists of all sequences and key heads, one after another, are one line of units (a page, or
the tokens of it that make a step). Each program walks an equal part of the line, finds out by a search in running sums
whose lists it meets, and leaves a partial (o, lse) for each; a second kernel merges the partials of a list. Nothing is
planned on the host, so that one captured graph serves any lengths and lists. LeanAttention, arXiv 2405.10480.

Pages may be codes (`paged.CodedFrames`): a step then has two tiles of keys and of values, one in full precision and one
that is restored from codes in registers; nothing is read for the one whose memory the page does not lie in.

Cost: each listed key and value is read once, in the bytes that it lies in; a partial is 4 (Dv + 1) bytes a row, one a
program and list.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.softmax import paged
from saccade.softmax.kernels.arguments import Heads
from saccade.softmax.kernels.scores import LOG2E, along, tanh
from saccade.softmax.paged import Chosen, Pages
from saccade.softmax.problem import Problem

SHARED = 227 * 1024  # bytes of shared memory that programs of a multiprocessor divide
OVERHEAD = 2 * 1024  # of it, what a program needs beside its keys, values and queries


class Codes(NamedTuple):
    """Codes as the kernels are given them: see `softmax.paged.Codes`, whose tensors these are.

    BITS: a code. GROUP: channels of a token that share zero and step; 0 where all tokens of a frame share those of a
    channel, of PER pages that the tables may name.
    """

    x: Tensor
    zero: Tensor
    step: Tensor
    BITS: tl.constexpr
    GROUP: tl.constexpr
    PER: tl.constexpr

    @classmethod
    def of(cls, codes: paged.Codes, per: int) -> Codes:
        given = (codes.bits, codes.group, per)
        return cls(codes.codes.view(torch.int32), codes.zero, codes.step, *(tl.constexpr(x) for x in given))


class Memory(NamedTuple):
    """Keys or values of all pages: those in full precision, x as in `Heads`, and the codes of the others, if any."""

    x: Tensor
    stride_b: int
    stride_h: int
    stride_n: int
    codes: Codes | None


class Places(NamedTuple):
    """Where pages lie that may be codes: see `softmax.paged.CodedFrames`."""

    hot_at: Tensor
    cold_at: Tensor
    PER: tl.constexpr


class Lists(NamedTuple):
    """Lists of logical pages, in families of `each` equally long ones.

    indices None: every page, a family a sequence. indptr None: `slots` a list at strides, -1 for none, one family. Else
    one after another, a family a sequence and key head.
    """

    indptr: Tensor | None
    indices: Tensor | None
    slots: int
    stride_b: int
    stride_h: int
    families: int
    each: int

    @classmethod
    def of(cls, chosen: Chosen | None, batch: int, kv_heads: int, parts: int) -> Lists:
        if chosen is None:
            return cls(None, None, 0, 0, 0, batch, kv_heads * parts)
        if isinstance(chosen, Tensor):
            chosen = chosen.expand(batch, kv_heads, -1)
            if chosen.stride(2) != 1:
                chosen = chosen.contiguous()
            strides = chosen.stride()
            return cls(None, chosen, chosen.shape[2], strides[0], strides[1], 1, batch * kv_heads * parts)
        indptr, indices = chosen
        return cls(indptr.contiguous(), indices.contiguous(), 0, 0, 0, batch * kv_heads, parts)


@triton.jit
def sizes(lengths, families, count, UNIT: tl.constexpr):
    """Units of sequences (F,) that are read whole; 0 beyond `count`."""
    return (tl.load(lengths + families, mask=families < count, other=0).to(tl.int32) + UNIT - 1) // UNIT


@triton.jit
def line(lists, lengths, UNIT: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Units of all lists."""
    total = 0
    if lists.indices is None:
        for start in range(0, lists.families, BLOCK):
            total += tl.sum(sizes(lengths, start + tl.arange(0, BLOCK), lists.families, UNIT), 0)
    elif lists.indptr is None:
        total += lists.slots * PER_PAGE
    else:
        total += tl.load(lists.indptr + lists.families).to(tl.int32) * PER_PAGE
    return total * lists.each


@triton.jit
def extent(lists, lengths, own, UNIT: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where in the line list `own` starts, and its size."""
    family = own // lists.each
    start = 0
    if lists.indices is None:
        for at in range(0, lists.families, BLOCK):
            families = at + tl.arange(0, BLOCK)
            start += tl.sum(tl.where(families < family, sizes(lengths, families, lists.families, UNIT), 0), 0)
        size = (tl.load(lengths + family).to(tl.int32) + UNIT - 1) // UNIT
    elif lists.indptr is None:
        size = lists.slots * PER_PAGE
    else:
        start += tl.load(lists.indptr + family).to(tl.int32) * PER_PAGE
        size = tl.load(lists.indptr + family + 1).to(tl.int32) * PER_PAGE - start
    return start * lists.each + own % lists.each * size, size


@triton.jit
def holder(lists, lengths, at, UNIT: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The list that holds unit `at` of the line, where in the line it starts, and its size."""
    family = 0
    start = 0
    if lists.indices is None:
        seen = 0
        for first in range(0, lists.families, BLOCK):
            families = first + tl.arange(0, BLOCK)
            own = sizes(lengths, families, lists.families, UNIT)
            passed = ((seen + tl.cumsum(own, 0)) * lists.each <= at) & (families < lists.families)
            family += tl.sum(passed.to(tl.int32), 0)
            start += tl.sum(tl.where(passed, own, 0), 0)
            seen += tl.sum(own, 0)
        size = (tl.load(lengths + family).to(tl.int32) + UNIT - 1) // UNIT
    elif lists.indptr is None:
        size = lists.slots * PER_PAGE
    else:
        for first in range(0, lists.families, BLOCK):
            families = first + tl.arange(0, BLOCK)
            ends = tl.load(lists.indptr + families + 1, mask=families < lists.families, other=0).to(tl.int32) * PER_PAGE
            family += tl.sum(((ends * lists.each <= at) & (families < lists.families)).to(tl.int32), 0)
        start += tl.load(lists.indptr + family).to(tl.int32) * PER_PAGE
        size = tl.load(lists.indptr + family + 1).to(tl.int32) * PER_PAGE - start
    member = (at - start * lists.each) // size
    return family * lists.each + member, start * lists.each + member * size, size


@triton.jit
def begin(program, programs, total):
    """The first unit of a program: the first total % programs of them have one unit more."""
    return program * (total // programs) + tl.minimum(program, total % programs)


@triton.jit
def walker(unit, programs, total):
    """The program that walks a unit."""
    share = total // programs
    longer = total % programs
    return tl.where(unit < longer * (share + 1), unit // (share + 1), longer + (unit - longer * (share + 1)) // share)


@triton.jit
def listed(lists, start, slot, last, PAGE: tl.constexpr, BN: tl.constexpr):
    """The logical pages of tokens slot .. slot + BN - 1 of a list, -1 for none: (BN,), or a number where one page holds
    them all.
    """
    if PAGE % BN == 0:
        slots = slot
    else:
        slots = slot + tl.arange(0, BN)
    if lists.indices is None:
        return tl.where(slots < last, slots // PAGE, -1)
    else:
        return tl.load(start + slots // PAGE, mask=slots < last, other=-1).to(tl.int32)


@triton.jit
def located(table, logical, length, PAGE: tl.constexpr):
    """(position of its first token, physical page) of logical pages; the position is 2**30 where there is none."""
    origin = tl.where(logical >= 0, logical * PAGE, 1 << 30)
    return origin, tl.load(table + logical, mask=origin < length, other=0).to(tl.int32)


@triton.jit
def placed(places, physical, origin, length):
    """Where physical pages lie: i > 0, page i of those in full precision; -i < 0, page i of codes; 0, none is there."""
    if places is None:
        return physical
    else:
        there = origin < length
        cold = tl.load(places.cold_at + physical // places.PER, mask=there, other=0).to(tl.int32)
        hot = tl.load(places.hot_at + physical // places.PER, mask=there, other=0).to(tl.int32)
        within = physical % places.PER
        own = tl.where(cold > 0, -(cold * places.PER + within), hot * places.PER + within)
        return tl.where(there, own, 0)


@triton.jit
def fetch(
    heads, head, physical, slot, there,
    PAGE: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Tokens slot .. slot + BN - 1 of a list, of one head, along dimension DIM, channels along the other; zeros where
    `there` is False. STRIDE: from one token of a page to the next.
    """
    channel = tl.arange(0, PADDED)
    if PAGE % BN == 0:  # one page: an address, and steps that do not change
        start = physical.to(tl.int64) * heads.stride_b + head.to(tl.int64) * heads.stride_h + slot % PAGE * STRIDE
        at = heads.x + start + (along(tl.arange(0, BN) * STRIDE, DIM) + along(channel, 1 - DIM))
    else:
        row = physical.to(tl.int64) * heads.stride_b + (slot + tl.arange(0, BN)) % PAGE * STRIDE
        at = heads.x + head.to(tl.int64) * heads.stride_h + along(row, DIM) + along(channel, 1 - DIM)
    if WIDTH == PADDED:
        return tl.load(at, mask=along(there, DIM), other=0.0)
    else:
        return tl.load(at, mask=along(there, DIM) & along(channel < WIDTH, 1 - DIM), other=0.0)


@triton.jit
def fraction(words, one, at: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^BITS of the code that begins at bit `at`: below the exponent of 1, with no conversion, for that is
    slow.
    """
    TO: tl.constexpr = 23 - BITS  # the first bits of a float's mantissa
    if at < TO:
        moved = words << (TO - at)
    else:
        moved = words >> (at - TO)
    return (moved & (2**BITS - 1) * 2**TO | one).to(tl.float32, bitcast=True)


@triton.jit
def fractions(words, one, first: tl.constexpr, every: tl.constexpr, BITS: tl.constexpr):
    """`fraction` of the codes first, first + every, ... of words (...): (..., 2, ..., 2), in order."""
    if every * BITS == 32:
        return fraction(words, one, first * BITS, BITS)
    else:
        return tl.join(
            fractions(words, one, first, 2 * every, BITS),
            fractions(words, one, first + every, 2 * every, BITS),
        )


@triton.jit
def restore(
    codes, page, slot, there, one, dtype: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """As `fetch`, from codes: zero + step code, in float32, then in dtype."""
    PACK: tl.constexpr = 32 // codes.BITS
    GROUP: tl.constexpr = PADDED if codes.GROUP == 0 else min(codes.GROUP, PADDED)
    GROUPS: tl.constexpr = PADDED // GROUP
    row = page.to(tl.int64) * PAGE + (slot + tl.arange(0, BN)) % PAGE
    group = tl.arange(0, GROUPS)
    word = group[:, None] * (GROUP // PACK) + tl.arange(0, GROUP // PACK)[None, :]
    words = tl.load(
        codes.x + row[:, None, None] * (WIDTH // PACK) + word[None, :, :],
        mask=there[:, None, None] & (word < WIDTH // PACK)[None, :, :],
        other=0,
    )
    number = tl.reshape(fractions(words, one, 0, 1, codes.BITS), [BN, GROUPS, GROUP])
    if codes.GROUP > 0:
        COUNT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        beside = row[:, None] * COUNT + group[None, :]
        here = there[:, None] & (group < COUNT)[None, :]
        zero = tl.load(codes.zero + beside, mask=here, other=0.0).to(tl.float32)[:, :, None]
        step = tl.load(codes.step + beside, mask=here, other=0.0).to(tl.float32)[:, :, None]
    else:
        channel = tl.arange(0, PADDED)[None, None, :]
        if PAGE % BN == 0:
            beside = (page // codes.PER).to(tl.int64) * WIDTH + channel
            here = channel < tl.where(page > 0, WIDTH, 0)
        else:
            beside = (page // codes.PER).to(tl.int64)[:, None, None] * WIDTH + channel
            here = there[:, None, None] & (channel < WIDTH)
        zero = tl.load(codes.zero + beside, mask=here, other=0.0).to(tl.float32)
        step = tl.load(codes.step + beside, mask=here, other=0.0).to(tl.float32)
    step = step * 2**codes.BITS
    x = tl.reshape((zero - step + step * number).to(dtype), [BN, PADDED])
    return x if DIM == 0 else tl.trans(x)


@triton.jit
def read(
    x, head, place, slot, there, one,
    PAGE: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Tiles whose sum is what `fetch` would give, of pages that lie where `placed` says: one; or two where pages may be
    codes, of which that in full precision, or that of codes, is zeros.
    """
    if x.codes is None:
        return (fetch(x, head, place, slot, there, PAGE, BN, STRIDE, WIDTH, PADDED, DIM),)
    else:
        each = tl.zeros([BN], tl.int32) + place  # an interpreter takes masks of whole tiles alone
        hot = fetch(x, head, place, slot, there & (each > 0), PAGE, BN, STRIDE, WIDTH, PADDED, DIM)
        dtype = x.x.dtype.element_ty
        return hot, restore(x.codes, -place, slot, there & (each < 0), one, dtype, PAGE, BN, WIDTH, PADDED, DIM)


@triton.jit
def multiply(tiles, other, acc, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the sum of the tiles times other, which is on the SIDE 1, the right one, or 0."""
    for i in tl.static_range(len(tiles)):
        if SIDE == 1:
            acc = tl.dot(tiles[i], other.to(tiles[i].dtype), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(other.to(tiles[i].dtype), tiles[i], acc, input_precision=PRECISION)
    return acc


@triton.jit
def attend_split(
    q, k, v, places, table, table_stride, lengths, lists, part_o, part_lse, scale, cap, shared, all_rows, kept, parts,
    NQ: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, PAGE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr,
    CAUSAL: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q: Heads; k, v: Memory of (P, Hkv, page, D); part_o (programs + lists, kept, DV), part_lse (programs + lists,
    kept), in base 2. all_rows = GROUP shared NQ: what reads a key head, heads first, then the `shared` sequences of a
    prefix, then their queries; ROWS of them a list, `parts` lists; BN tokens a step.
    """
    PER_PAGE: tl.constexpr = PAGE // UNIT
    if OVERLAP:
        gdc_launch_dependents()
    total = line(lists, lengths, UNIT, PER_PAGE, BLOCK)
    programs = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)
    program = tl.program_id(0)
    at = begin(tl.minimum(program, programs), programs, total)
    stop = begin(tl.minimum(program + 1, programs), programs, total)
    while at < stop:
        own, start, size = holder(lists, lengths, at, UNIT, PER_PAGE, BLOCK)
        head = own // parts % KV_HEADS
        batch = own // (parts * KV_HEADS)
        first = (at - start) * UNIT
        last = (tl.minimum(stop, start + size) - start) * UNIT
        if lists.indices is None:
            names = lengths  # not read
        elif lists.indptr is None:
            names = lists.indices + batch.to(tl.int64) * lists.stride_b + head.to(tl.int64) * lists.stride_h
        else:
            names = lists.indices + tl.load(lists.indptr + batch * KV_HEADS + head)
        row_table = table + batch.to(tl.int64) * table_stride
        length = tl.load(lengths + batch).to(tl.int32)
        # Lists and tables are read some steps before they are needed: nothing in the loop waits for them.
        logical = listed(lists, names, first, last, PAGE, BN)
        logical_1 = listed(lists, names, first + BN, last, PAGE, BN)
        logical_2 = listed(lists, names, first + 2 * BN, last, PAGE, BN)
        origin, physical = located(row_table, logical, length, PAGE)
        origin_1, physical_1 = located(row_table, logical_1, length, PAGE)
        origin_2, physical_2 = located(row_table, logical_2, length, PAGE)
        place = placed(places, physical, origin, length)
        place_1 = placed(places, physical_1, origin_1, length)
        logical = listed(lists, names, first + 3 * BN, last, PAGE, BN)
        nought = tl.minimum(length, 0)  # loops that only hand a value on are not pipelined; this sum looks like work
        one = 0x3F800000 + nought  # the bits of 1; what the compiler does not know it keeps at hand

        r = own % parts * ROWS + tl.arange(0, ROWS)
        exists = r < all_rows
        channel = tl.arange(0, PAD_D)
        sequence = (batch * shared + r // NQ % shared).to(tl.int64)
        heads = (head * GROUP + r // (NQ * shared)).to(tl.int64)
        from_q = q.x + sequence * q.stride_b + heads * q.stride_h + r % NQ * q.stride_n
        qs = tl.load(
            along(from_q, 1 - AXIS) + along(channel, AXIS),
            mask=along(exists, 1 - AXIS) & along(channel < D, AXIS),
            other=0.0,
        )
        if CAUSAL:
            limit = length - NQ + 1 + r % NQ
        else:
            limit = tl.zeros([ROWS], tl.int32) + length
        if AXIS == 0:
            acc = tl.zeros([PAD_DV, ROWS], tl.float32)
        else:
            acc = tl.zeros([ROWS, PAD_DV], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        for slot in tl.range(first, last, BN):
            if PAGE % BN == 0:
                position = origin + slot % PAGE + tl.arange(0, BN)
                # Keys behind the end are masked as scores; values are not: 0 times NaN is not 0.
                some = tl.zeros([BN], tl.int32) + (origin + slot % PAGE) < length
            else:
                position = origin + (slot + tl.arange(0, BN)) % PAGE
                some = position < length
            ks = read(k, head, place, slot, some, one, PAGE, BN, K_STRIDE, D, PAD_D, AXIS)
            vs = read(v, head, place, slot, position < length, one, PAGE, BN, V_STRIDE, DV, PAD_DV, 1 - AXIS)
            if AXIS == 0:
                z = tl.zeros([BN, ROWS], tl.float32)
            else:
                z = tl.zeros([ROWS, BN], tl.float32)
            z = multiply(ks, qs, z, 1 - AXIS, PRECISION) * scale
            if cap is not None:
                z = cap * tanh(z / cap)
            z = tl.where(along(position, AXIS) < along(limit, 1 - AXIS), z, float("-inf"))
            new = tl.maximum(top, tl.max(z, AXIS))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(z - along(base, 1 - AXIS))
            shrink = tl.exp2(top - base)
            mass = mass * shrink + tl.sum(p, AXIS)
            acc = acc * along(shrink, 1 - AXIS)
            acc = multiply(vs, p, acc, 1 - AXIS, PRECISION)
            top = new
            origin = origin_1 + nought
            place = place_1 + nought
            origin_1 = origin_2 + nought
            place_1 = placed(places, physical_2, origin_2, length) + nought
            origin_2, physical_2 = located(row_table, logical, length, PAGE)
            logical = listed(lists, names, slot + 4 * BN, last, PAGE, BN)
        blind = mass == 0
        acc = acc / along(tl.where(blind, 1.0, mass), 1 - AXIS)
        lse = tl.where(blind, float("-inf"), top + tl.log2(tl.where(blind, 1.0, mass)))
        to = (program + own).to(tl.int64) * kept + tl.arange(0, ROWS)
        values = tl.arange(0, PAD_DV)
        tl.store(
            part_o + along(to * DV, 1 - AXIS) + along(values, AXIS),
            acc,
            mask=along(exists, 1 - AXIS) & along(values < DV, AXIS),
        )
        tl.store(part_lse + to, lse, mask=exists)
        at = start + last // UNIT


@triton.jit
def join(acc, top, mass, lse, o):
    """(acc, top, mass) after partials o (P, Dv), lse (P,) in base 2."""
    new = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(top - base)
    share = tl.exp2(lse - base)
    return acc * shrink + tl.sum(share[:, None] * o, 0), new, mass * shrink + tl.sum(share, 0)


@triton.jit
def merge_splits(
    part_o, part_lse, lengths, lists, sink, beside_o, beside_lse, o, lse, num_programs, shared, kept, parts,
    NQ: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, PAD_DV: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: the partials of the programs that walked its list, `sink` and the pair `beside`, merged. o: Heads; lse,
    beside_lse (B, H, NQ) and beside_o (B, H, NQ, DV) contiguous; BP partials a step.
    """
    PER_PAGE: tl.constexpr = PAGE // UNIT
    row = tl.program_id(0)
    head = row // NQ % (KV_HEADS * GROUP)
    sequence = row // (NQ * KV_HEADS * GROUP)
    r = (head % GROUP * shared + sequence % shared) * NQ + row % NQ
    own = (sequence // shared * KV_HEADS + head // GROUP) * parts + r // ROWS
    total = line(lists, lengths, UNIT, PER_PAGE, BLOCK)
    programs = tl.maximum(tl.minimum(num_programs, total), 1)
    start, size = extent(lists, lengths, own, UNIT, PER_PAGE, BLOCK)
    first = walker(start, programs, total) if size > 0 else 0
    end = walker(start + size - 1, programs, total) + 1 if size > 0 else 0
    values = tl.arange(0, PAD_DV)
    here = values < DV
    top = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    acc = tl.zeros([PAD_DV], tl.float32)
    if sink is not None:
        top = tl.maximum(top, tl.load(sink + head).to(tl.float32) * LOG2E)
        mass = tl.where(top == float("-inf"), 0.0, 1.0)
    if OVERLAP:
        gdc_wait()
    if beside_lse is not None:
        at = row.to(tl.int64) + tl.zeros([1], tl.int64)
        beside = tl.load(beside_o + at[:, None] * DV + values[None, :], mask=here[None, :], other=0.0)
        acc, top, mass = join(acc, top, mass, tl.load(beside_lse + at) * LOG2E, beside)
    for p in range(first, end, BP):
        each = p + tl.arange(0, BP)
        place = (each + own).to(tl.int64) * kept + r % ROWS
        each_lse = tl.load(part_lse + place, mask=each < end, other=float("-inf"))
        from_o = part_o + place[:, None] * DV + values[None, :]
        each_o = tl.load(from_o, mask=(each < end)[:, None] & here[None, :], other=0.0)
        acc, top, mass = join(acc, top, mass, each_lse, each_o)
    blind = mass == 0
    safe = tl.where(blind, 1.0, mass)
    to = o.x + sequence.to(tl.int64) * o.stride_b + head.to(tl.int64) * o.stride_h + row % NQ * o.stride_n
    tl.store(to + values, (acc / safe).to(o.x.dtype.element_ty), mask=here)
    tl.store(lse + row + tl.zeros([1], tl.int32), tl.where(blind, float("-inf"), (top + tl.log2(safe)) / LOG2E))


class Cut(NamedTuple):
    """How the work is cut: rows of queries and tokens a step, the axis of a product that tokens lie along (0, its long
    side, where the rows are few), warps and stages a program, programs a multiprocessor.
    """

    rows: int
    tokens: int
    axis: int
    warps: int
    stages: int
    per_sm: int


def attend(problem: Problem, pages: Pages, chosen: Chosen | None, prefix: Pages | None = None) -> tuple[Tensor, Tensor]:
    """(o (B, H, N, Dv), lse (B, H, N) float32) of the problem's queries, the last of their sequences in `pages`."""
    sink = None if problem.sink is None else problem.sink.contiguous()
    with torch.cuda.device_of(problem.q):
        beside = None if prefix is None else partial(problem, prefix, None, causal=False)
        return partial(problem, pages, chosen, causal=True, sink=sink, beside=beside, dtype=problem.q.dtype)


def partial(
    problem: Problem,
    pages: Pages,
    chosen: Chosen | None,
    *,
    causal: bool,
    sink: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(o, lse) over the chosen pages, a sink and what another call gave. The B sequences of q share the S of `pages`;
    causal: their queries are the last tokens there, else they see them all.
    """
    q = problem.q if problem.q.stride(3) == 1 else problem.q.contiguous()
    batch, num_heads, nq, d = q.shape
    _, kv_heads, page, dv = pages.v.shape
    group, shared = num_heads // kv_heads, batch // len(pages.table)
    all_rows = group * shared * nq
    table, lengths = pages.table.contiguous(), pages.lengths.contiguous()
    pad_d, pad_dv = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
    cut = cut_of(all_rows, pad_d, pad_dv, q.element_size(), 0 if pages.coded is None else pages.coded.k.bits)
    unit = math.gcd(page, cut.tokens)
    parts, kept = -(-all_rows // cut.rows), min(cut.rows, all_rows)
    lists = Lists.of(chosen, len(pages.table), kv_heads, parts)
    block = max(16, min(1024, triton.next_power_of_2(lists.families)))
    programs = cut.per_sm * multiprocessors(q.device)
    slots = programs + lists.families * lists.each
    part_o = q.new_empty(slots, kept, dv, dtype=torch.float32)
    part_lse = q.new_empty(slots, kept, dtype=torch.float32)
    o = q.new_empty(batch, num_heads, nq, dv, dtype=dtype)
    lse = q.new_empty(batch, num_heads, nq, dtype=torch.float32)
    log2e = LOG2E.value
    cap = None if problem.softcap is None else problem.softcap * log2e
    overlap = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (9, 0)
    attend_split[(programs,)](
        Heads.of(q), *memory(pages), table, table.stride(0), lengths, lists,
        part_o, part_lse, problem.scale * log2e, cap, shared, all_rows, kept, parts,
        nq, kv_heads, group, d, dv, pad_d, pad_dv, pages.k.stride(2), pages.v.stride(2), page, unit, cut.rows,
        cut.tokens, block, cut.axis, causal, overlap, "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    steps = min(32, triton.next_power_of_2(programs // (slots - programs) + 2))
    merge_splits[(lse.numel(),)](
        part_o, part_lse, lengths, lists, sink, *(beside or (None, None)), Heads.of(o), lse, programs,
        shared, kept, parts,
        nq, kv_heads, group, dv, pad_dv, page, unit, cut.rows, block, steps, overlap,
        num_warps=1, launch_pdl=overlap,
    )  # fmt: skip
    return o, lse


def memory(pages: Pages) -> tuple[Memory, Memory, Places | None]:
    """Keys, values, and where pages lie if some are codes."""
    k, v, coded = Heads.of(pages.k), Heads.of(pages.v), pages.coded
    if coded is None:
        return Memory(*k, None), Memory(*v, None), None
    per = coded.tokens // pages.page
    places = Places(coded.hot_at, coded.cold_at, tl.constexpr(per))
    return Memory(*k, Codes.of(coded.k, per)), Memory(*v, Codes.of(coded.v, per)), places


def cut_of(rows: int, pad_d: int, pad_dv: int, bytes_each: int, bits: int = 0) -> Cut:
    """The cut for `rows` rows a key head, and pages some of which are codes of `bits`. What counts is bytes on their
    way, and a program of one warp waits for nobody; where its registers do not hold the rows, several share them.
    """
    if rows <= 16:
        kept, tokens, axis, warps, stages, most = 8 if rows <= 8 else 16, 16, int(rows > 8), 1, 4, 12
    elif rows <= 64:
        kept, tokens, axis, warps, stages, most = 64, 64, 1, 4, 3, 2
    else:
        kept, tokens, axis, warps, stages, most = 128, 64, 1, 8, 3, 1
    if bits:  # two tiles in the place of one, the one of which is hardly used; and one that is restored
        tokens, stages = max(16, tokens // 2), 3
    while True:
        buffers = stages - 1 if warps == 1 else stages  # products of several read theirs as others are filled
        own = (tokens * (pad_d + pad_dv) * buffers + kept * pad_d) * bytes_each + OVERHEAD
        if bits:  # codes, zeros and steps; and tiles that are restored, on their way to a product
            own += tokens * (pad_d + pad_dv) * (buffers * (bits + 4) // 8 + bytes_each * (1 if warps == 1 else 2))
        if own <= SHARED or tokens == 16:
            return Cut(kept, tokens, axis, warps, stages, max(1, min(most, SHARED // own)))
        tokens //= 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; three for the interpreter, which is enough to split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
