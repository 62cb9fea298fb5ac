"""What the kernels for Hopper are given of a plan and of tensors, worked out with torch; the host waits for nothing.

The order of work, boxes with room to read past their ends, tensors as the copy engine sees them, and what fits at all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.where import Plan
from saccade.where.grid import Grid

LOG2E = math.log2(math.e)
MOST = 2**31 - 1
ROWS = 64  # query rows of a warpgroup
CHANNELS = 64  # of 16 bits, that a swizzled row of shared memory holds
RESIDENT = 2**25  # bytes of keys and values that the second-level cache keeps while all heads run at once


class Sizes(NamedTuple):
    """groups: consumers a program; keys: of a step; slots of the rings; programs a multiprocessor."""

    groups: int
    keys: int
    q_slots: int
    k_slots: int
    v_slots: int
    programs: int

    @classmethod
    def of(cls, block: tuple[int, int], width: int) -> Sizes:
        """What is fastest for tiles of `block` tokens and at most `width` channels, padded."""
        if block[0] == 2 * ROWS:
            return cls(2, 128, 2, 3, 2, 1) if width <= 128 else cls(2, 64, 1, 2, 2, 1)
        return cls(1, 64, 1, 3, 2, 2)


class Boxed(NamedTuple):
    """A plan's boxes with room to read past the last row and key, where nothing is allowed.

    lo, hi: (S, T, A, rows) int32, rows a multiple of the query tile. coord: (A, keys) int32. far: a key past all tiles.
    """

    lo: Tensor
    hi: Tensor
    coord: Tensor
    far: int

    @classmethod
    def of(cls, plan: Plan) -> Boxed:
        """The boxes of a plan, kept with it."""
        return plan.derive("boxed", lambda: cls._of(plan))

    @classmethod
    def _of(cls, plan: Plan) -> Boxed:
        lo, hi, coord = plan.boxes.lo, plan.boxes.hi, plan.boxes.coord
        if not len(coord):  # no axis: one that every key is on
            lo = lo.new_full((*lo.shape[:2], 1, lo.shape[3]), -MOST)
            hi = torch.full_like(lo, MOST)
            coord = coord.new_zeros(1, plan.num_keys)
        far = -(-plan.num_keys // 128) * 128
        short = -plan.num_queries % 128
        lo, hi = (torch.nn.functional.pad(x, (0, short)) for x in (lo, hi))
        coord = torch.nn.functional.pad(coord, (0, far + 128 - plan.num_keys), value=MOST)  # below no bound
        return cls(lo, hi, coord, far)


def in_order(steps: Tensor, head: Tensor, heads: int, read: int, apart: Tensor | None) -> Tensor:
    """The order in which programs draw work items: long ones first, those of a head together as far as that goes.

    steps, head: (items,) int. read: bytes that all heads read; more than the cache keeps is better read head by head,
    and altogether so where the tiles of lists lie `apart`, as then a list shares few with the one before it.
    """
    most = steps.amax().clamp(min=1)
    classes: Any = 4 if read > RESIDENT else 64
    if apart is not None and read > RESIDENT:
        classes = torch.where(apart, 1, classes)
    shorter = classes - 1 - steps * classes // (most + 1)
    return torch.argsort((shorter * heads + head) * (most + 1) + most - steps, stable=True)


def apart(plan: Plan) -> Tensor | None:
    """Whether the tiles of its lists are fewer than half of those from the first to the last; None without any."""
    if not len(plan.indices):
        return None
    start, end = plan.indptr[:-1], plan.indptr[1:]
    first, last = (plan.indices[at.clamp(0, len(plan.indices) - 1).long()] for at in (start, end - 1))
    return 2 * (end - start).sum() < (((last - first).abs() + 1) * (end > start)).sum()


def work_items(plan: Plan, batch: int, keys: int, read: int) -> Tensor:
    """int32 (items, 8), in the order of work: batch entry, head, first row, first entry of the list, entries, steps of
    `keys` keys, those of them that need no mask, union of boxes. Kept with the plan."""

    def items() -> Tensor:
        (bq, bk), heads, rows = plan.block, plan.num_heads, plan.num_row_tiles
        b, h, r = torch.meshgrid(*(torch.arange(x, device=plan.device) for x in (batch, heads, rows)), indexing="ij")
        group = plan.group_of.expand(batch, heads)[:, :, None]
        at = group * rows + r
        start = plan.indptr[at]
        pieces, parts = max(1, bk // keys), max(1, keys // bk)
        count = (plan.indptr[at + 1] - start) * pieces
        steps = (-(-count // parts)).clamp(min=1)  # an empty list is one step of nothing
        unmasked = torch.minimum(plan.num_full[at] * pieces // parts, steps - 1)  # the first step always masks
        union = plan.union_of[group].expand_as(b)
        work = torch.stack([b, h, r * bq, start, count, steps, unmasked, union], -1).flatten(0, 2)
        order = in_order(work[:, 5], work[:, 0] * heads + work[:, 1], batch * heads, read, apart(plan))
        return work[order].int().contiguous()

    return plan.derive(("hopper forward", batch, keys, read > RESIDENT), items)


def described(x: Tensor, *tokens: int, channels: int = CHANNELS) -> TensorDescriptor:
    """x (B, H, L, C) or (B * H, T, Y, X, C) as the copy engine reads it: `tokens` along the last axes but the last, of
    one head, and `channels` channels at a time."""
    layout = gl.NVMMASharedLayout(channels * x.element_size(), 8 * x.element_size(), rank=x.ndim)
    strides = [stride if size > 1 else CHANNELS for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    block = [1] * (x.ndim - 1 - len(tokens)) + [*tokens, channels]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def grid_of(plan: Plan) -> Grid | None:
    """The grid (T, Y, X) of which all tiles of a plan are cells of 64 tokens, those of queries too, or None.

    Then q, k, v and o are in the order of the grid, not the plan's.
    """
    grid = plan.grid
    if grid is None or len(grid.cell) < 2 or plan.block != (ROWS, ROWS):
        return None
    if plan.num_queries != plan.num_keys or plan.boxes.lo.shape[1] != 1:
        return None
    fill = (1,) * (3 - len(grid.cell))
    return Grid(fill + grid.lengths, fill + grid.cell)


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """x (B, H, N, C) as (B * H, T, Y, X, C), copied where batch and heads do not lie in one row."""
    return (x if in_a_row(x) else x.contiguous()).flatten(0, 1).unflatten(1, grid.lengths)


def in_a_row(x: Tensor) -> bool:
    """Whether batch entries and heads of x (B, H, N, C) are one axis in memory."""
    return len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def padded(channels: int) -> int:
    """The next power of two, at least a row of shared memory."""
    return max(CHANNELS, 1 << (channels - 1).bit_length())


def numbers(scale: float, softcap: float | None) -> tuple[float, float]:
    """What the kernels multiply scores with, and the cap in units of log2; with a cap tanh(y) wants 2 log2(e) y."""
    return (scale * LOG2E, 0.0) if softcap is None else (2 * LOG2E * scale / softcap, softcap * LOG2E)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[str]:
    """Why the forward kernel cannot run a problem, in words; empty when it can. k and v in the plan's token order."""
    found = []
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        found.append("it is compiled for GPUs of compute capability 9")
        return found
    if q.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"it multiplies bfloat16 and float16, not {q.dtype}")
    if max(q.shape[3], v.shape[3]) > 256 or v.shape[3] % 8:
        found.append(f"it takes up to 256 channels, those of v a multiple of 8, not {q.shape[3]} and {v.shape[3]}")
    if not all(copyable(x) for x in (q, k, v)):
        found.append("its copies need a last stride of 1, the others multiples of 16 bytes, and 16-byte addresses")
    if any(size not in (ROWS, 2 * ROWS) for size in plan.block):
        found.append(f"its tiles are 64 or 128 tokens on a side, the plan's {plan.block}")
    elif plan.block[0] == ROWS and max(q.shape[3], v.shape[3]) > 128:
        found.append("with more than 128 channels it takes tiles of 128 rows only")
    if plan.bits is not None or plan.token_indices is not None:
        found.append("it has no bit masks and no lists of single keys")
    if plan.boxes.lo.shape[1] * max(1, plan.boxes.coord.shape[0]) > 4:
        found.append("its registers hold the bounds of four intervals a row")
    return found


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can read x."""
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    aligned = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


class Walk(NamedTuple):
    """What the forward kernel is given of a plan.

    work: see `work_items`. indices: the plan's tiles. lo, hi, coord, far: see `Boxed`. block: rows and keys of a tile.
    axes: of the boxes. grid: see `grid_of`.
    """

    work: Tensor
    indices: Tensor
    lo: Tensor
    hi: Tensor
    coord: Tensor
    far: int
    block: tuple[int, int]
    axes: int
    grid: Grid | None

    @classmethod
    def of(cls, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Walk:
        """Of a plan, for tensors of these shapes."""
        (batch, kv_heads, m, d), dv = k.shape, v.shape[3]
        keys = Sizes.of(plan.block, max(padded(d), padded(dv))).keys
        work = work_items(plan, batch, keys, 2 * batch * kv_heads * m * (d + dv))
        return cls(work, plan.indices, *Boxed.of(plan), plan.block, len(plan.boxes.coord), grid_of(plan))
