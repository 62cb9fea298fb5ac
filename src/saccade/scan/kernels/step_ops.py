"""The steps as operators of PyTorch, opaque to compilers and traceable by their shapes; sizes and grids.

    saccade::linear_step(q, k, v, g, before, old, scale, mass, wide, track) -> (o, after, grown)
    saccade::delta_step(q, k, v, beta, g, before, old, scale, track) -> (o, after, product)
    saccade::selective_step(x, delta, a, b, c, bias, softplus, direct, z, before, old, track) -> (y, after, grown)

The third result is empty without `track`; `step_kernels` has the shapes. wide: o in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saccade.scan.kernels.delta_launch import delta_heads
from saccade.scan.kernels.launch import padded, state_heads
from saccade.scan.kernels.step_kernels import delta_step as delta_kernel
from saccade.scan.kernels.step_kernels import linear_step as linear_kernel
from saccade.scan.kernels.step_kernels import selective_step as selective_kernel
from saccade.scan.kernels.tiles import Heads

ENTRIES = 4096  # of a state that a program holds; twice as many for whole lines
PER_WARP = 1024  # of them
LINE = 32  # columns in a line of the cache


class Band(NamedTuple):
    """Rows at a time, columns and warps of a program."""

    rows: int
    columns: int
    warps: int

    @classmethod
    def of(cls, rows: int, columns: int, most: int = 1 << 30) -> Band:
        """For a memory of that size; all rows at a time up to `most`."""
        high = min(padded(rows), most)
        wide = min(padded(columns), max(ENTRIES // high, min(LINE, max(1, 2 * ENTRIES // high))))
        # Where rows do not begin on 16 bytes, each entry needs an address of its own.
        warps = high * wide // (PER_WARP if columns % 4 == 0 else PER_WARP // 2)
        return cls(high, wide, max(1, min(8, warps)))


def gate_of(g: Tensor | None) -> int:
    return 0 if g is None else g.ndim - 2


def heads(x: Tensor | None, count: int) -> Heads | None:
    """For programs of `count` memories each sequence; a tensor with more heads tells them apart itself."""
    return None if x is None else Heads.of(x, max(count, x.shape[1]))


@torch.library.custom_op("saccade::linear_step", mutates_args=())
def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, after, grown = _linear_results(q, k, v, g, before, old, scale, mass, wide, track)
    (batch, kept, features, width), dv = after.shape, v.shape[3]
    band, fan = Band.of(features, width, 256), q.shape[1] // kept
    linear_kernel[(triton.cdiv(width, band.columns) * batch, kept)](
        *(heads(x, kept) for x in (q, k, v, g, before, after, o)), old, grown if track else None, scale,
        K=features, V=dv, W=width, BK=band.rows, BV=band.columns, GATE=gate_of(g), FAN=fan,
        FANS=triton.next_power_of_2(fan), num_warps=band.warps,
    )  # fmt: skip
    return o, after, grown


@linear_step.register_fake
def _linear_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    (batch, count, _, features), width, kept = q.shape, v.shape[3] + mass, state_heads(k, g)
    o = q.new_empty(batch, count, 1, width, dtype=torch.float32 if wide else v.dtype)
    after = q.new_empty(batch, kept, features, width, dtype=torch.float32)
    total = (batch, kept, features if gate_of(g) == 2 else 1, 1) if track else (0,)
    return o, after, q.new_empty(total, dtype=torch.float32)


@torch.library.custom_op("saccade::delta_step", mutates_args=())
def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, after, product = _delta_results(q, k, v, beta, g, before, old, scale, track)
    batch, kept, dim, width = after.shape
    band, fan = Band.of(dim, width), q.shape[1] // kept
    bands = triton.cdiv(width, band.columns) + (triton.cdiv(dim, band.columns) if track else 0)
    delta_kernel[(bands * batch, kept)](
        *(heads(x, kept) for x in (q, k, v, beta, g, before, after, o, old)), heads(product, kept) if track else None,
        scale, K=dim, V=width, BK=band.rows, BV=band.columns, GATE=gate_of(g), FAN=fan,
        FANS=triton.next_power_of_2(fan), num_warps=band.warps,
    )  # fmt: skip
    return o, after, product


@delta_step.register_fake
def _delta_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    (batch, count, _, dim), width, kept = q.shape, v.shape[3], delta_heads(k, beta, g)
    after = q.new_empty(batch, kept, dim, width, dtype=torch.float32)
    product = q.new_empty((batch, kept, dim, dim) if track else (0,), dtype=torch.float32)
    return q.new_empty(batch, count, 1, width), after, product


@torch.library.custom_op("saccade::selective_step", mutates_args=())
def selective_step(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    direct: Tensor | None,
    z: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, after, grown = _selective_results(x, delta, a, b, c, bias, softplus, direct, z, before, old, track)
    batch, width, states = after.shape
    wide = triton.next_power_of_2(states)
    block = min(triton.next_power_of_2(width), max(1, ENTRIES // wide))
    selective_kernel[(triton.cdiv(width, block), batch)](
        x, delta, bias, a, b, c, direct, z, before, after, y, old, grown if track else None, width,
        width // b.shape[2], x.stride(0), delta.stride(0), 0 if z is None else z.stride(0), b.stride(0), c.stride(0),
        S=states, BC=block, BS=wide, SOFTPLUS=softplus, num_warps=max(1, min(8, block * wide // PER_WARP)),
    )  # fmt: skip
    return y, after, grown


@selective_step.register_fake
def _selective_results(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    direct: Tensor | None,
    z: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    batch, _, width = x.shape
    after = x.new_empty(batch, width, a.shape[1], dtype=torch.float32)
    grown = x.new_empty((batch, width, a.shape[1]) if track else (0,), dtype=torch.float32)
    return x.new_empty(batch, 1, width), after, grown
