"""Planning on a GPU, in Triton: the lists of `planner`, to the bit, while the host waits for nothing.

A program is a list. It compares the bounds of its query tile with those of whole chunks of key tiles, opens the chunks
that are met, and compares tile by tile; transposed lists are the same with the sides exchanged. This runs twice: to
count, and, once a running sum has said where each list starts, to write. How many tiles there will be is known on the
device alone, so the host sets aside what a pattern says that it cannot exceed (`Pattern.most_tiles`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.where.boxes import LEAST, MOST, Boxes
from saccade.where.layout import Cells
from saccade.where.plan import Plan

ROOM = 2**27  # tiles that are set aside unseen, 4 bytes each; where there may be more, the host reads their number
CHUNK = 128  # tiles that are looked at together
SPAN = 128  # chunks that are looked at together
READ = 4096  # tokens that are read together
TOKENS = 1024  # tokens that are put into order together


class Ends(NamedTuple):
    """Extremes over each tile, and over each chunk of tiles (`far_`).

    keys (2, A, nK): least and greatest coordinate. queries (2, 2, S T A, nQ): least and greatest of lo, then of hi.
    """

    keys: Tensor
    far_keys: Tensor
    queries: Tensor
    far_queries: Tensor

    @classmethod
    def of(cls, boxes: Boxes, block: tuple[int, int]) -> Ends:
        (bq, bk), (num_axes, num_keys), num_queries = block, boxes.coord.shape, boxes.num_queries
        num_lines = boxes.lo.shape[:3].numel()
        key_tiles, query_tiles = triton.cdiv(num_keys, bk), triton.cdiv(num_queries, bq)
        key_chunks, query_chunks = triton.cdiv(key_tiles, CHUNK), triton.cdiv(query_tiles, CHUNK)
        sizes = (
            (2, num_axes, key_tiles),
            (2, num_axes, key_chunks),
            (2, 2, num_lines, query_tiles),
            (2, 2, num_lines, query_chunks),
        )
        ends = cls(*(torch.empty(size, dtype=torch.int32, device=boxes.coord.device) for size in sizes))
        programs = num_axes * key_chunks + 2 * num_lines * query_chunks
        if programs:
            widths = [triton.next_power_of_2(size) for size in (bk, bq)]
            steps = [max(1, min(CHUNK, READ // width)) for width in widths]
            with torch.cuda.device_of(boxes.coord):
                _extremes[(programs,)](
                    boxes.coord, boxes.lo, boxes.hi, *ends, num_keys, num_queries, bk, bq, key_tiles, query_tiles,
                    key_chunks, query_chunks, num_axes, num_lines,
                    CHUNK=CHUNK, KEY_TILES=steps[0], KEY_WIDTH=widths[0], QUERY_TILES=steps[1], QUERY_WIDTH=widths[1],
                    LEAST=LEAST, MOST=MOST,
                )  # fmt: skip
        return ends


def plan_boxes(plan: Plan, most: int) -> Plan:
    """The plan of every tile that the boxes touch, one group a union; `most` is a number that these cannot exceed."""
    ends = Ends.of(plan.boxes, plan.block)
    plan = replace(plan, union_of=torch.arange(len(plan.boxes.lo), device=plan.group_of.device))
    plan = _listed(plan, ends, None, most)
    plan.derived[Ends] = ends
    return plan


def plan_marked(plan: Plan, marks: Tensor, most: int) -> Plan:
    """The plan of the marked tiles, bool (G, rows, cols), at most `most` a row, that the boxes touch; of one union."""
    plan = replace(plan, union_of=torch.zeros(len(marks), dtype=torch.int64, device=marks.device))
    return _listed(
        plan, Ends.of(plan.boxes, plan.block), marks.contiguous().view(torch.int8), most * marks.shape[:2].numel()
    )


def turned(plan: Plan) -> Plan | None:
    """The tiles of a plan, transposed, or None where to sort them costs less.

    Lists that hold all that the boxes touch are made anew; others are marked in a table of all pairs, a byte each, and
    listed from there, which costs more than to sort them when not one pair in sixteen can be listed.
    """
    ends = plan.derived.get(Ends)
    if isinstance(ends, Ends):
        return _listed(replace(plan, transposed=True), ends, None, len(plan.indices))
    num_rows, num_cols = plan.num_row_tiles, plan.num_col_tiles
    if 16 * len(plan.indices) < plan.num_groups * num_rows * num_cols:
        return None
    marks = torch.zeros(plan.num_groups, num_cols, num_rows, dtype=torch.int8, device=plan.device)
    with torch.cuda.device_of(marks):
        _mark_turned[(plan.num_groups * num_rows,)](
            marks, plan.indptr, plan.num_full, plan.indices, num_rows, num_cols, CHUNK=CHUNK, num_warps=1
        )
    return _listed(replace(plan, transposed=not plan.transposed), None, marks, len(plan.indices))


def _listed(plan: Plan, ends: Ends | None, marks: Tensor | None, most: int) -> Plan:
    """The plan with the tiles that boxes and marks leave, at most `most`."""
    num_rows, num_cols, device = plan.num_row_tiles, plan.num_col_tiles, plan.group_of.device
    lists = plan.num_groups * num_rows
    indptr = torch.zeros(lists + 1, dtype=torch.int64, device=device)
    num_full = torch.empty(lists, dtype=torch.int32, device=device)
    num_unions, num_boxes, num_axes, _ = plan.boxes.lo.shape
    whole = plan.num_keys // plan.block[1] if ends is not None else MOST
    sizes = num_rows, num_cols, triton.cdiv(num_cols, CHUNK), whole, num_unions, num_boxes, num_axes

    def run(indices: Tensor | None, room: int) -> None:
        with torch.cuda.device_of(indptr):
            _list[(lists,)](
                indptr, num_full, indices, marks, *(ends or [None] * 4), *sizes, room,
                BOXES=ends is not None, MARKS=marks is not None, TURNED=plan.transposed, CHUNK=CHUNK, SPAN=SPAN,
                num_warps=1,
            )  # fmt: skip

    run(None, 0)
    indptr.cumsum_(0)
    room = most if most <= ROOM else int(indptr[-1])
    if room < lists * num_cols:
        # No list is cut short in silence, not even by a pattern whose most_tiles is wrong.
        torch._assert_async(indptr[-1] <= room, f"most_tiles: there are more tiles to list than the {room} foretold")
    indices = torch.empty(room, dtype=torch.int32, device=device)
    run(indices, room)
    return replace(plan, indptr=indptr, indices=indices, num_full=num_full)


def permutation(order: Cells, first: int, num_tokens: int, block: int, device: torch.device) -> Tensor:
    """`layout.permutation` of the tokens at first, first + 1, ..."""
    padding = 3 - len(order.grid)
    axes = [(1, 1, 1, 1, 0)] * padding + order.axes(block)
    count = order.count(block)
    found = torch.empty(num_tokens, dtype=torch.int64, device=device)
    sizes = first, num_tokens, *(number for axis in axes for number in axis)
    grid = (triton.cdiv(num_tokens, TOKENS),)
    with torch.cuda.device_of(found):
        if count == num_tokens:
            _order[grid](found, None, *sizes, MARK=False, TOKENS=TOKENS)
            return found
        taken = torch.zeros(count, dtype=torch.int32, device=device)
        _order[grid](found, taken, *sizes, MARK=True, TOKENS=TOKENS)
        taken = taken.cumsum(0, dtype=torch.int32)
        _order[grid](found, taken, *sizes, MARK=False, TOKENS=TOKENS)
    return found


@triton.jit
def _chunk(
    values, near, far, plane, far_plane, chunk, num_tokens, size, num_tiles,
    CHUNK: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Extremes over each tile of a chunk, TILES at a time, and over all: the least, one plane further the greatest."""
    least = tl.full((TILES,), MOST, tl.int32)
    most = tl.full((TILES,), LEAST, tl.int32)
    within = tl.arange(0, WIDTH)[None, :]
    for start in range(0, CHUNK, TILES):
        tile = chunk * CHUNK + start + tl.arange(0, TILES)
        token = tile[:, None] * size + within
        inside = (within < size) & (token < num_tokens)
        low = tl.min(tl.load(values + token, mask=inside, other=MOST), 1)
        high = tl.max(tl.load(values + token, mask=inside, other=LEAST), 1)
        tl.store(near + tile, low, mask=tile < num_tiles)
        tl.store(near + plane + tile, high, mask=tile < num_tiles)
        least = tl.minimum(least, low)
        most = tl.maximum(most, high)
    tl.store(far + chunk, tl.min(least, 0))
    tl.store(far + far_plane + chunk, tl.max(most, 0))


@triton.jit(
    do_not_specialize=[
        "num_keys", "num_queries", "bk", "bq", "key_tiles", "query_tiles", "key_chunks", "query_chunks", "num_axes",
        "num_lines",
    ]
)  # fmt: skip
def _extremes(
    coord, lo, hi, keys, far_keys, queries, far_queries, num_keys, num_queries, bk, bq, key_tiles, query_tiles,
    key_chunks, query_chunks, num_axes, num_lines,
    CHUNK: tl.constexpr, KEY_TILES: tl.constexpr, KEY_WIDTH: tl.constexpr, QUERY_TILES: tl.constexpr,
    QUERY_WIDTH: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """`Ends`, one chunk of one axis or box bound a program: those of the keys, then of lo, then of hi."""
    at = tl.program_id(0).to(tl.int64)
    key_programs = num_axes * key_chunks
    if at < key_programs:
        line = at // key_chunks
        axes = line * 0 + num_axes  # of 64 bits
        _chunk(
            coord + line * num_keys, keys + line * key_tiles, far_keys + line * key_chunks, axes * key_tiles,
            axes * key_chunks, at % key_chunks, num_keys, bk, key_tiles, CHUNK, KEY_TILES, KEY_WIDTH, LEAST, MOST,
        )  # fmt: skip
    else:
        line = (at - key_programs) // query_chunks
        chunk = (at - key_programs) % query_chunks
        plane = (line * 0 + num_lines) * query_tiles
        far_plane = (line * 0 + num_lines) * query_chunks
        near = queries + line * query_tiles
        far = far_queries + line * query_chunks
        if line < num_lines:
            _chunk(
                lo + line * num_queries, near, far, plane, far_plane, chunk, num_queries, bq, query_tiles,
                CHUNK, QUERY_TILES, QUERY_WIDTH, LEAST, MOST,
            )  # fmt: skip
        else:
            _chunk(
                hi + (line - num_lines) * num_queries, near + plane, far + far_plane, plane, far_plane, chunk,
                num_queries, bq, query_tiles, CHUNK, QUERY_TILES, QUERY_WIDTH, LEAST, MOST,
            )  # fmt: skip


@triton.jit
def _classify(
    keys, queries, own, others, inside, num_keys, num_queries, first_box, num_lines, num_boxes, num_axes,
    TURNED: tl.constexpr,
):  # fmt: skip
    """(not empty, full) of the pairs of one query tile, `own`, and key tiles, `others`; the sides exchanged if TURNED.

    keys, queries: as in `Ends`, of tiles or chunks, `num_keys` and `num_queries` a line.
    """
    some = inside & (others < 0)
    full = some
    plane = (first_box * 0 + num_lines) * num_queries  # of 64 bits
    for box in range(num_boxes):
        meets = inside
        within = inside
        for axis in range(num_axes):
            key = keys + axis * num_keys
            query = queries + ((first_box + box) * num_axes + axis) * num_queries
            if TURNED:
                c_min = tl.load(key + own)
                c_max = tl.load(key + own + num_axes * num_keys)
                lo_min = tl.load(query + others, mask=inside, other=0)
                lo_max = tl.load(query + others + plane, mask=inside, other=0)
                hi_min = tl.load(query + others + 2 * plane, mask=inside, other=0)
                hi_max = tl.load(query + others + 3 * plane, mask=inside, other=0)
            else:
                c_min = tl.load(key + others, mask=inside, other=0)
                c_max = tl.load(key + others + num_axes * num_keys, mask=inside, other=0)
                lo_min = tl.load(query + own)
                lo_max = tl.load(query + own + plane)
                hi_min = tl.load(query + own + 2 * plane)
                hi_max = tl.load(query + own + 3 * plane)
            meets = meets & (c_max >= lo_min) & (c_min < hi_max)
            within = within & (c_min >= lo_max) & (c_max < hi_min)
        some = some | meets
        full = full | (meets & within)
    return some, full


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_cols", "num_chunks", "num_whole", "num_unions", "num_boxes", "num_axes", "room"
    ]
)  # fmt: skip
def _list(
    indptr, num_full, indices, marks, keys, far_keys, queries, far_queries,
    num_rows, num_cols, num_chunks, num_whole, num_unions, num_boxes, num_axes, room,
    BOXES: tl.constexpr, MARKS: tl.constexpr, TURNED: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One list: its numbers of tiles and of full tiles, or where there are `indices` the tiles, full ones first.

    A tile is listed when BOXES admit it and MARKS, if there are any, are not 0; without BOXES a mark of 2 makes it
    full. Key tiles from num_whole on jut out over the last key and are never full.
    """
    at = tl.program_id(0).to(tl.int64)
    row = at % num_rows
    first_box = tl.minimum(at // num_rows, num_unions - 1) * num_boxes
    num_lines = num_unions * num_boxes * num_axes
    full_place = at * 0
    rest_place = at * 0
    if indices is not None:
        full_place = tl.load(indptr + at)
        rest_place = full_place + tl.load(num_full + at)
    for start in range(0, num_chunks, SPAN):
        chunks = start + tl.arange(0, SPAN)
        near = chunks < num_chunks
        if BOXES:
            if TURNED:
                near, _ = _classify(
                    keys, far_queries, row, chunks, near, num_rows, num_chunks,
                    first_box, num_lines, num_boxes, num_axes, TURNED,
                )  # fmt: skip
            else:
                near, _ = _classify(
                    far_keys, queries, row, chunks, near, num_chunks, num_rows,
                    first_box, num_lines, num_boxes, num_axes, TURNED,
                )  # fmt: skip
        chunk = tl.min(tl.where(near, chunks, num_chunks), 0)
        while chunk < num_chunks:
            cols = chunk * CHUNK + tl.arange(0, CHUNK)
            some = cols < num_cols
            full = some
            if MARKS:
                mark = tl.load(marks + at * num_cols + cols, mask=some, other=0)
                some = mark > 0
                full = mark > 1
            if BOXES:
                if TURNED:
                    some, full = _classify(
                        keys, queries, row, cols, some, num_rows, num_cols,
                        first_box, num_lines, num_boxes, num_axes, TURNED,
                    )  # fmt: skip
                    full = full & (row < num_whole)
                else:
                    some, full = _classify(
                        keys, queries, row, cols, some, num_cols, num_rows,
                        first_box, num_lines, num_boxes, num_axes, TURNED,
                    )  # fmt: skip
                    full = full & (cols < num_whole)
            rest = some & (full == 0)
            if indices is not None:
                # Compared with 0, a mask is bool in every version of the interpreter.
                place = full_place + tl.cumsum(full.to(tl.int32), 0) - 1
                tl.store(indices + place, cols, mask=(full & (place < room)) != 0)
                place = rest_place + tl.cumsum(rest.to(tl.int32), 0) - 1
                tl.store(indices + place, cols, mask=(rest & (place < room)) != 0)
            full_place += tl.sum(full.to(tl.int32), 0)
            rest_place += tl.sum(rest.to(tl.int32), 0)
            near = near & (chunks > chunk)
            chunk = tl.min(tl.where(near, chunks, num_chunks), 0)
    if indices is None:
        tl.store(num_full + at, full_place.to(tl.int32))
        tl.store(indptr + at + 1, full_place + rest_place)


@triton.jit(do_not_specialize=["num_rows", "num_cols"])
def _mark_turned(marks, indptr, num_full, indices, num_rows, num_cols, CHUNK: tl.constexpr):
    """Marks (G, cols, rows), 1 for the partial and 2 for the full tiles of one list."""
    at = tl.program_id(0).to(tl.int64)
    row = at % num_rows
    group = at // num_rows
    start = tl.load(indptr + at)
    end = tl.load(indptr + at + 1)
    full_end = start + tl.load(num_full + at)
    while start < end:
        place = start + tl.arange(0, CHUNK)
        col = tl.load(indices + place, mask=place < end, other=0)
        mark = tl.where(place < full_end, 2, 1).to(tl.int8)
        tl.store(marks + (group * num_cols + col) * num_rows + row, mark, mask=place < end)
        start += CHUNK


@triton.jit(
    do_not_specialize=[
        "first", "num_tokens", "length0", "d0", "size0", "cells0", "shift0", "length1", "d1", "size1", "cells1",
        "shift1", "length2", "d2", "size2", "cells2", "shift2",
    ]
)  # fmt: skip
def _order(
    order, taken, first, num_tokens,
    length0, d0, size0, cells0, shift0, length1, d1, size1, cells1, shift1, length2, d2, size2, cells2, shift2,
    MARK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Each token's number in an order of `Cells` on three axes: to MARK it as taken, or to put the token there.

    Of each axis: its length, dilation, the length of its cells, how many of them the longest class has, and its shift.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    position = first + token
    c2 = position % length2
    rest = position // length2
    c1 = rest % length1
    c0 = rest // length1
    number = ((c0 % d0) * d1 + c1 % d1).to(tl.int64) * d2 + c2 % d2
    c0 = c0 // d0 + shift0
    c1 = c1 // d1 + shift1
    c2 = c2 // d2 + shift2
    number = ((number * cells0 + c0 // size0) * cells1 + c1 // size1) * cells2 + c2 // size2
    number = ((number * size0 + c0 % size0) * size1 + c1 % size1) * size2 + c2 % size2
    if MARK:
        tl.store(taken + number, 1, mask=inside)
    elif taken is not None:
        tl.store(order + tl.load(taken + number, mask=inside, other=1) - 1, token.to(tl.int64), mask=inside)
    else:
        tl.store(order + number, token.to(tl.int64), mask=inside)
