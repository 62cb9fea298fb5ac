"""Kernels for single tokens in pages: one is written or dropped a row, all are scored, some are found; and for the
bounds of whole pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def put(
    k, v, into_k, into_v, positions, table, lengths, ends, k_batch, k_head, v_batch, v_head, k_page, k_token, v_page,
    v_token, table_row,
    HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
):  # fmt: skip
    """A row's next token: k (B, HEADS, 1, D) and v (B, HEADS, 1, DV) behind its `lengths`, at position `ends`."""
    row = tl.program_id(0)
    sequence, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    at = tl.load(lengths + row)
    page = tl.load(table + row.to(tl.int64) * table_row + at // PAGE).to(tl.int64)
    c, cv = tl.arange(0, PAD_D), tl.arange(0, PAD_DV)
    new = tl.load(k + sequence * k_batch + head * k_head + c, mask=c < D)
    tl.store(into_k + page * k_page + at % PAGE * k_token + c, new.to(into_k.dtype.element_ty), mask=c < D)
    new = tl.load(v + sequence * v_batch + head * v_head + cv, mask=cv < DV)
    tl.store(into_v + page * v_page + at % PAGE * v_token + cv, new.to(into_v.dtype.element_ty), mask=cv < DV)
    tl.store(positions + page * PAGE + at % PAGE, tl.load(ends + sequence).to(tl.int32))


@triton.jit
def drop(
    k, v, positions, columns, table, lengths, rows, slots, k_page, k_token, v_page, v_token, table_row,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    PAD_C: tl.constexpr,
):  # fmt: skip
    """The last token of rows[i] takes the place of the one in slots[i], and the row is one token shorter."""
    row = tl.load(rows + tl.program_id(0))
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
def bound(
    q, bounds, out, pages, q_batch, q_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B HEADS, pages): the largest sum_d max(q_d low_d, q_d high_d) in a group; -inf unless low <= high in
    every channel. bounds (B HEADS, pages, 2 D): low, then high.
    """
    row, page, c = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, PAD_D)
    sequence, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    at = bounds + (row.to(tl.int64) * pages + page)[:, None] * (2 * D) + c[None, :]
    here = (page < pages)[:, None] & (c < D)[None, :]
    low = tl.load(at, mask=here, other=0.0).to(tl.float32)
    high = tl.load(at + D, mask=here, other=0.0).to(tl.float32)
    best = tl.full([BN], float("-inf"), tl.float32)
    for g in range(GROUP):
        one = tl.load(q + sequence * q_batch + (head * GROUP + g) * q_head + c, mask=c < D, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(one[None, :] * low, one[None, :] * high), 1))
    exists = tl.sum((low <= high).to(tl.int32), 1) == PAD_D
    tl.store(out + row.to(tl.int64) * pages + page, tl.where(exists, best, float("-inf")), mask=page < pages)


@triton.jit
def widen(
    k, bounds, table, lengths, rows, pages, k_page, k_token, table_row,
    PAGE: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr,
):  # fmt: skip
    """The bounds of the newest page of rows[i] hold the newest key."""
    row = tl.load(rows + tl.program_id(0))
    last = tl.load(lengths + row) - 1
    page = tl.load(table + row.to(tl.int64) * table_row + last // PAGE).to(tl.int64)
    c = tl.arange(0, PAD_D)
    key = tl.load(k + page * k_page + last % PAGE * k_token + c, mask=c < D)
    at = bounds + (row.to(tl.int64) * pages + last // PAGE) * (2 * D) + c
    tl.store(at, tl.minimum(tl.load(at, mask=c < D), key), mask=c < D)
    tl.store(at + D, tl.maximum(tl.load(at + D, mask=c < D), key), mask=c < D)


@triton.jit
def score(
    q, k, table, lengths, out, scale, width, q_batch, q_head, k_page, k_token, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, HEADS GROUP, width): scale q . k of BN tokens of a row and its group's queries; -inf for no token."""
    row = tl.program_id(0)
    sequence, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    slot, g, c = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, ROWS), tl.arange(0, PAD_D)
    there = slot < tl.load(lengths + row)
    page = tl.load(table + row.to(tl.int64) * table_row + slot // PAGE, mask=there, other=0).to(tl.int64)
    ks = tl.load(
        k + (page * k_page + slot % PAGE * k_token)[:, None] + c[None, :],
        mask=there[:, None] & (c < D)[None, :],
        other=0.0,
    )
    qs = tl.load(
        q + sequence * q_batch + (head * GROUP + g)[None, :] * q_head + c[:, None],
        mask=(g < GROUP)[None, :] & (c < D)[:, None],
        other=0.0,
    )
    z = tl.dot(ks, qs.to(ks.dtype), input_precision=PRECISION) * scale
    z = tl.where(there[:, None], z, float("-inf"))
    to = out + ((sequence * HEADS + head) * GROUP + g)[None, :] * width + slot[:, None]
    tl.store(to, z, mask=(slot < width)[:, None] & (g < GROUP)[None, :])


@triton.jit
def place(table, slots, out, count, table_row, PER_ROW: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """out (lists, count): where slots (lists, count) of rows lie among all tokens, PER_ROW lists a row; 0 below 0."""
    own, at = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    slot = tl.load(slots + own.to(tl.int64) * count + at, mask=at < count, other=-1).to(tl.int32)
    row = (own // PER_ROW).to(tl.int64)
    page = tl.load(table + row * table_row + slot // PAGE, mask=slot >= 0, other=0)
    tl.store(out + own.to(tl.int64) * count + at, tl.where(slot >= 0, page * PAGE + slot % PAGE, 0), mask=at < count)


def launch_put(k: Tensor, v: Tensor, into: tuple[Tensor, Tensor, Tensor], rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """into: k (P, 1, page, D), v (P, 1, page, Dv), positions (P, page); rows: table, lengths, ends."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (into_k, into_v, positions), (table, lengths, ends) = into, rows
    heads, d, dv = k.shape[1], k.shape[3], v.shape[3]
    with torch.cuda.device_of(k):
        put[(len(table),)](
            k, v, into_k, into_v, positions, table, lengths, ends, *k.stride()[:2], *v.stride()[:2],
            into_k.stride(0), into_k.stride(2), into_v.stride(0), into_v.stride(2), table.stride(0),
            heads, into_k.shape[2], d, dv, triton.next_power_of_2(d), triton.next_power_of_2(dv), num_warps=1,
        )  # fmt: skip


def launch_drop(
    into: tuple[Tensor, Tensor, Tensor, Tensor], rows: tuple[Tensor, Tensor], which: Tensor, slots: Tensor
) -> None:
    """into: k, v, positions, columns (P, page, C); rows: table, lengths; which, slots: (n,) int64, contiguous."""
    (k, v, positions, columns), (table, lengths) = into, rows
    d, dv, c = k.shape[3], v.shape[3], columns.shape[2]
    if len(which):
        with torch.cuda.device_of(k):
            drop[(len(which),)](
                k, v, positions, columns, table, lengths, which, slots, k.stride(0), k.stride(2), v.stride(0),
                v.stride(2), table.stride(0), k.shape[2], d, dv, c, triton.next_power_of_2(d),
                triton.next_power_of_2(dv), triton.next_power_of_2(max(1, c)), num_warps=1,
            )  # fmt: skip


def launch_bound(q: Tensor, bounds: Tensor) -> Tensor:
    """(B, Hkv, pages) float32 of q (B, H, 1, D) and bounds (B, Hkv, pages, 2 D)."""
    q, bounds = q if q.stride(-1) == 1 else q.contiguous(), bounds.contiguous()
    (batch, kv_heads, pages), d, block = bounds.shape[:3], q.shape[3], 16
    out = q.new_empty(batch, kv_heads, pages, dtype=torch.float32)
    with torch.cuda.device_of(q):
        bound[(batch * kv_heads, -(-pages // block))](
            q, bounds, out, pages, *q.stride()[:2], kv_heads, q.shape[1] // kv_heads, d, triton.next_power_of_2(d),
            block, num_warps=2,
        )  # fmt: skip
    return out


def launch_widen(k: Tensor, bounds: Tensor, rows: tuple[Tensor, Tensor], which: Tensor) -> None:
    """bounds (R, pages, 2 D), contiguous, changed in place; rows: table, lengths; which (n,) int64."""
    (table, lengths), d = rows, k.shape[3]
    with torch.cuda.device_of(k):
        widen[(len(which),)](
            k, bounds, table, lengths, which, bounds.shape[1], k.stride(0), k.stride(2), table.stride(0), k.shape[2],
            d, triton.next_power_of_2(d), num_warps=1,
        )  # fmt: skip


def launch_score(q: Tensor, k: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
    """(B, H, width) float32 of q (B, H, 1, D) and k (P, 1, page, D)."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, _, d = q.shape
    kv_heads = len(table) // batch
    group, block = heads // kv_heads, 128
    out = q.new_empty(batch, heads, width, dtype=torch.float32)
    with torch.cuda.device_of(q):
        score[(len(table), -(-width // block))](
            q, k, table, lengths, out, scale, width, *q.stride()[:2], k.stride(0), k.stride(2), table.stride(0),
            kv_heads, group, k.shape[2], d, max(16, triton.next_power_of_2(d)),
            max(16, triton.next_power_of_2(group)), block, "ieee" if k.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out


def launch_place(table: Tensor, slots: Tensor, page: int) -> Tensor:
    """int32 (lists, count) of slots (lists, count), contiguous; the lists of a row lie side by side."""
    lists, count = slots.shape
    out = torch.empty(lists, count, dtype=torch.int32, device=slots.device)
    if out.numel():
        with torch.cuda.device_of(slots):
            place[(lists, -(-count // 256))](
                table, slots, out, count, table.stride(0), lists // len(table), page, 256, num_warps=4
            )
    return out
