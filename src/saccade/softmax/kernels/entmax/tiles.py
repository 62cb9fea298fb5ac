"""What these kernels do to a tile: read it, form its scores, turn them into weights."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.softmax.kernels.scores import along, coordinates, seen


@triton.jit
def read_span(
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
def write_span(
    x, to, values, batch, head, first, num_tokens, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Values (SIZE, PADDED) as the tokens from `first` on of one head of `to`, which is laid out as x is."""
    token = tl.arange(0, SIZE)
    channel = tl.arange(0, PADDED)
    at = to + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h + first.to(tl.int64) * x.stride_n
    at = at + token[:, None] * x.stride_n + channel[None, :]
    inside = (first + token < num_tokens)[:, None] & (channel < WIDTH)[None, :]
    tl.store(at, values.to(to.dtype.element_ty), mask=inside)


@triton.jit
def admitted(
    s, starts, lengths, first, tables, BN: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr, DIM: tl.constexpr
):
    """s, queries along DIM, with -inf for the pairs that no box admits; the keys are `first` and those that follow."""
    keys = first + tl.arange(0, BN)
    at = coordinates(tables.coord, keys, tables.num_keys, AXES)
    return tl.where(seen(starts, lengths, at, keys, tables.num_keys, BOXES, AXES, DIM), s, float("-inf"))


@triton.jit
def products(
    qs, k, k_box, batch, kv_head, first, starts, lengths, tables,
    D: tl.constexpr, PAD_D: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, AXES: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """q k of the rows with BN keys, -inf for pairs that are not admitted, and the keys as they were read."""
    ks = read_span(k, k_box, batch, kv_head, first, tables.num_keys, BN, D, PAD_D, FULL)
    s = tl.dot(qs, ks.T, input_precision=PRECISION)
    if not FULL:
        s = admitted(s, starts, lengths, first, tables, BN, BOXES, AXES, 0)
    return s, ks


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
def weights(s, scale, t, POWER: tl.constexpr, DIM: tl.constexpr):
    """p and u of products s for t of the rows along DIM: powers of max(0, scale s - t); NaN stays."""
    return powers(tl.maximum(s * scale - along(t, DIM), 0.0, propagate_nan=tl.PropagateNan.ALL), POWER)
