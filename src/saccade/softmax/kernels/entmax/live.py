"""The tiles that marks leave of a plan's lists, as lists: by part of a row tile, and by tile of keys.

Marks are int8, for each head, entry of its lists, one of STEPS steps of BN keys and one of SUBS parts of SQ rows. A
live list has room for all that may be marked. base: (B * H,), how many entries the lists of earlier heads have.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.softmax.kernels.scores import steps_of


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
def row_list(tables, base, group, row_tile, head_of_all, sub, STEPS: tl.constexpr, SUBS: tl.constexpr):
    """Where the list of live tiles of a part of a row tile begins, and where the steps of its head's lists do."""
    zero = tl.load(tables.indptr + group * tables.num_rows)
    start = tl.load(tables.indptr + group * tables.num_rows + row_tile)
    length = tl.load(tables.indptr + group * tables.num_rows + row_tile + 1) - start
    before = tl.load(base + head_of_all)
    return (before + start - zero) * (STEPS * SUBS) + sub * length * STEPS, before * STEPS


@triton.jit
def column_list(turned, before, group, entry, step, STEPS: tl.constexpr, SUBS: tl.constexpr):
    """Where the list of live parts of a tile of keys begins."""
    start = tl.load(turned.indptr + entry)
    length = tl.load(turned.indptr + entry + 1) - start
    return (before + start - tl.load(turned.indptr + group * turned.num_lists)) * (STEPS * SUBS) + step * length * SUBS


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
    start, _, count, full = steps_of(tables, entry, BK, BN)
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
    start, _, count, full = steps_of(turned, entry, BQ, SQ)
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
