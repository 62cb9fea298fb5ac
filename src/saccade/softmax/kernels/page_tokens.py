"""Kernels for single tokens in pages, all of which are scored, and for the bounds of whole pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
