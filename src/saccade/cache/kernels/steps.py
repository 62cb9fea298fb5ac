"""Kernels of a step: a token is written and counted, one is dropped, chosen ones are found, each in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from saccade.cache.steps import Held, Ring

WIDE = 8192  # channels of all heads of a token from which on a program has eight warps


@triton.jit
def put(
    k, v, into_k, into_v, positions, columns, table, lengths, ends, k_batch, k_head, v_batch, v_head, k_page, k_token,
    v_page, v_token, table_row,
    HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    PAD_HEADS: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """A sequence's next token: k (B, HEADS, 1, D), v (B, HEADS, 1, DV) behind the `lengths` of its rows, at `ends`."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.arange(0, PAD_HEADS)
    row, here = sequence * HEADS + head, head < HEADS
    at = tl.load(lengths + row, mask=here, other=0)
    end = tl.load(ends + sequence)
    page = tl.load(table + row * table_row + at // PAGE, mask=here, other=0).to(tl.int64)
    c, cv, cc, head = tl.arange(0, PAD_D), tl.arange(0, PAD_DV), tl.arange(0, PAD_C), head.to(tl.int64)
    mask = here[:, None] & (c < D)[None, :]
    new = tl.load(k + sequence * k_batch + (head * k_head)[:, None] + c[None, :], mask=mask)
    to = into_k + (page * k_page + at % PAGE * k_token)[:, None] + c[None, :]
    tl.store(to, new.to(into_k.dtype.element_ty), mask=mask)
    mask = here[:, None] & (cv < DV)[None, :]
    new = tl.load(v + sequence * v_batch + (head * v_head)[:, None] + cv[None, :], mask=mask)
    to = into_v + (page * v_page + at % PAGE * v_token)[:, None] + cv[None, :]
    tl.store(to, new.to(into_v.dtype.element_ty), mask=mask)
    tl.store(positions + page * PAGE + at % PAGE, tl.zeros_like(at) + end.to(tl.int32), mask=here)
    if C > 0:
        to = columns + ((page * PAGE + at % PAGE) * C)[:, None] + cc[None, :]
        tl.store(to, tl.zeros([PAD_HEADS, PAD_C], tl.float32), mask=here[:, None] & (cc < C)[None, :])
    tl.debug_barrier()  # every thread has read both counts
    tl.store(lengths + row, at + 1, mask=here)
    tl.store(ends + sequence, end + 1)


@triton.jit
def drop(
    k, v, positions, columns, table, lengths, ends, rows, slots, first, size, k_page, k_token, v_page, v_token,
    table_row,
    HEADS: tl.constexpr, TURNS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """The last token of rows[i] takes the place of the one in slots[i], and the row is one token shorter; TURNS: of the
    one in first + (ends - slots) mod size of its sequence.
    """
    row = tl.load(rows + tl.program_id(0))
    if TURNS:
        gone = (tl.load(ends + row // HEADS) - tl.load(slots + row // HEADS)) % size
        slot = (first + gone + tl.where(gone < 0, size, 0)).to(tl.int32)
    else:
        slot = tl.load(slots + tl.program_id(0)).to(tl.int32)
    last = tl.load(lengths + row) - 1
    line = table + row.to(tl.int64) * table_row
    to, source = tl.load(line + slot // PAGE).to(tl.int64), tl.load(line + last // PAGE).to(tl.int64)
    slot, at = slot % PAGE, last % PAGE
    c, cv, cc = tl.arange(0, PAD_D), tl.arange(0, PAD_DV), tl.arange(0, PAD_C)
    moved = tl.load(k + source * k_page + at * k_token + c, mask=c < D)
    tl.store(k + to * k_page + slot * k_token + c, moved, mask=c < D)
    moved = tl.load(v + source * v_page + at * v_token + cv, mask=cv < DV)
    tl.store(v + to * v_page + slot * v_token + cv, moved, mask=cv < DV)
    tl.store(positions + to * PAGE + slot, tl.load(positions + source * PAGE + at))
    if C > 0:
        numbers = tl.load(columns + (source * PAGE + at) * C + cc, mask=cc < C)
        tl.store(columns + (to * PAGE + slot) * C + cc, numbers, mask=cc < C)
    tl.store(lengths + row, last)


@triton.jit
def find(
    table, slots, places, listed, lengths, count, slots_batch, slots_list, slots_one, table_row,
    LISTS: tl.constexpr, PER_ROW: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """places (B LISTS, count): where slots (B, LISTS, count) lie, PER_ROW lists a row; listed: which are there."""
    own, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    line = slots + own // LISTS * slots_batch + own % LISTS * slots_list
    slot = tl.load(line + at.to(tl.int64) * slots_one, mask=at < count, other=-1).to(tl.int32)
    first = tl.maximum(slot, 0)
    page = tl.load(table + own // PER_ROW * table_row + first // PAGE, mask=at < count, other=0)
    tl.store(places + own * count + at, page * PAGE + first % PAGE, mask=at < count)
    tl.store(listed + own * count + at, tl.where(slot >= 0, at, -1), mask=at < count)
    if tl.program_id(1) == 0:
        tl.store(lengths + own, count)


@triton.jit
def best(values, indices, ends, out, rows, count, BUDGET: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr):
    """out (B rows, count): the indices of values above -inf, of the first ceil(BUDGET ends / UNIT) where UNIT > 0."""
    own, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    value = tl.load(values + own * count + at, mask=at < count, other=float("-inf"))
    kept = value > float("-inf")
    if UNIT > 0:
        share = tl.full([], BUDGET, tl.float64) * tl.load(ends + own // rows).to(tl.float64)
        most = tl.ceil(share / tl.full([], UNIT, tl.float64)).to(tl.int64)
        kept &= at < tl.maximum(most, 1)
    index = tl.load(indices + own * count + at, mask=at < count, other=-1)
    tl.store(out + own * count + at, tl.where(kept, index, -1), mask=at < count)


@triton.jit
def newest(scores, lengths, rows, pages, PAGE: tl.constexpr, BN: tl.constexpr):
    """scores (rows, pages) of the newest pages are infinite."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    at = (tl.load(lengths + row, mask=row < rows, other=1).to(tl.int64) - 1) // PAGE
    tl.store(scores + row.to(tl.int64) * pages + at, tl.full([BN], float("inf"), tl.float32), mask=row < rows)


def launch_put(k: Tensor, v: Tensor, into: Held, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """See `put_token`."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (into_k, into_v, positions, columns), (table, lengths, ends) = into, rows
    heads, d, dv, c = k.shape[1], k.shape[3], v.shape[3], columns.shape[2]
    pads = [triton.next_power_of_2(max(1, x)) for x in (heads, d, dv, c)]
    with torch.cuda.device_of(k):
        put[(len(k),)](
            k, v, into_k, into_v, positions, columns, table, lengths, ends, *k.stride()[:2], *v.stride()[:2],
            into_k.stride(0), into_k.stride(2), into_v.stride(0), into_v.stride(2), table.stride(0), heads,
            into_k.shape[2], d, dv, c, *pads, num_warps=4 if pads[0] * max(pads[1:]) < WIDE else 8,
        )  # fmt: skip


def launch_drop(into: Held, rows: tuple[Tensor, Tensor, Tensor], which: Tensor, slots: Tensor | Ring) -> None:
    """See `drop_token`; which: contiguous."""
    (k, v, positions, columns), (table, lengths, ends) = into, rows
    first, size, told = (0, 1, slots) if isinstance(slots, Tensor) else (slots.first, slots.size, slots.begun)
    d, dv, c = k.shape[3], v.shape[3], columns.shape[2]
    if len(which):
        with torch.cuda.device_of(k):
            drop[(len(which),)](
                k, v, positions, columns, table, lengths, ends, which, told.contiguous(), first, size, k.stride(0),
                k.stride(2), v.stride(0), v.stride(2), table.stride(0), len(table) // len(ends),
                told is not slots, k.shape[2], d, dv, c, triton.next_power_of_2(d), triton.next_power_of_2(dv),
                triton.next_power_of_2(max(1, c)), num_warps=1,
            )  # fmt: skip


def launch_find(table: Tensor, slots: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `find_tokens`."""
    batch, lists, count = slots.shape
    places, listed, lengths = (
        torch.empty(size, dtype=torch.int32, device=table.device)
        for size in ((batch * lists, count), (batch * lists, 1, count), (batch * lists,))
    )
    with torch.cuda.device_of(table):
        find[(batch * lists, max(1, -(-count // 256)))](
            table, slots, places, listed, lengths, count, *slots.stride(), table.stride(0), lists,
            batch * lists // len(table), page, 256, num_warps=4,
        )  # fmt: skip
    return places, lengths, listed


def launch_best(values: Tensor, indices: Tensor, ends: Tensor, budget: float | int, unit: int) -> Tensor:
    """See `best_found`."""
    values, indices, count = values.contiguous(), indices.contiguous(), values.shape[-1]
    out = torch.empty_like(indices)
    rows = out.numel() // max(1, count)
    counted = (1.0, 0) if isinstance(budget, int) else (budget, unit)
    if out.numel():
        with torch.cuda.device_of(values):
            best[(rows, -(-count // 256))](
                values, indices, ends.contiguous(), out, rows // len(ends), count, *counted, 256, num_warps=4
            )
    return out


def launch_raise(scores: Tensor, lengths: Tensor, page: int) -> None:
    """See `raise_newest`; scores: contiguous."""
    rows, lengths = lengths.numel(), lengths.contiguous()
    with torch.cuda.device_of(scores):
        newest[(-(-rows // 128),)](scores, lengths, rows, scores.shape[2], page, 128, num_warps=4)
