"""What the kernels share: tensors with their strides, where chunks lie, and what decays do inside one.

A chunk is C tokens. In float32, what is left of one token at another is the exponential of a plain sum of g over the
tokens in between, never of a difference of sums: that would be NaN for g = -inf, inexact for any large g, and might
overflow. Narrower dtypes bear differences where `prepare` says so.

A decay a channel is no factor of the scores, so a chunk is halved: pairs of tokens in the two halves of a block meet at
the last token of the first half, its middle. Level h = 1, 2, 4, ... takes the pairs (i, j) whose numbers differ first
in the bit h, so that every pair i > j is one of exactly one level. At each a token is late (its bit is set: it reads)
or early (it is read), and

    x_t = q_t exp(sum of g over (middle, t]) if late,   k_t exp(sum of g over (t, middle]) if early,
    decayed q_i . k_j = x_i . x_j

The sums of all tokens and channels are one product of a matrix of ones and zeros with g.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

SAFE = tl.constexpr(60.0)  # of decay, as an exponent: what one factor of a pair may grow by


class Heads(NamedTuple):
    """x (B, heads, N, C), whose last stride is 1, or (B, heads, N), its other strides, and how many heads share one."""

    x: Tensor
    stride_b: int
    stride_h: int
    stride_n: int
    share: int

    @classmethod
    def of(cls, x: Tensor, heads: int) -> Heads:
        """For programs of so many heads."""
        batch, head, token = x.stride()[:3]
        return cls(x, batch, head, token, heads // x.shape[1])


class States(NamedTuple):
    """x (sequences, heads, K, V) or its transpose, contiguous, and the strides of K and V."""

    x: Tensor
    stride_k: int
    stride_v: int

    @classmethod
    def of(cls, x: Tensor) -> States:
        return cls(x, *x.stride()[2:])


class Cuts(NamedTuple):
    """Sequences and their chunks, which are numbered through: `count` sequences, of `length` tokens each or packed.

    cu (S + 1,), first (S,): where the tokens and the chunks of a packed sequence begin; seq_of: the sequence of a
    chunk, S for those past the last.
    """

    length: int
    count: int
    cu: Tensor | None = None
    first: Tensor | None = None
    seq_of: Tensor | None = None


class Bounds(NamedTuple):
    """What is left at the middle of a chunk of its start, and at its end of its middle: decay (chunks, heads, 2, D).

    harmful (heads, chunks parts): where that is too little, in some of the channels, for one product to serve all
    pairs; its stride is a multiple of 16, so that its kernels are compiled for no other. share: heads that share one.
    """

    decay: Tensor
    harmful: Tensor
    stride_h: int
    heads: int
    channels: int
    parts: int
    share: int


@triton.jit
def stretch_of(cuts, seq, C: tl.constexpr):
    """(batch entry, first token, end, number of chunks, first chunk) of a sequence."""
    if cuts.cu is None:
        begin = seq * 0
        end = begin + cuts.length
        chunks = tl.cdiv(end, C)
        return seq, begin, end, chunks, seq * chunks
    else:
        begin = tl.load(cuts.cu + seq)
        end = tl.load(cuts.cu + seq + 1)
        return seq * 0, begin, end, tl.cdiv(end - begin, C), tl.load(cuts.first + seq)


@triton.jit
def chunk_of(cuts, slot, C: tl.constexpr):
    """(batch entry, first token, end of the sequence) of a chunk; one past the last has its end before its start."""
    if cuts.cu is None:
        chunks = tl.cdiv(cuts.length, C)
        return slot // chunks, slot % chunks * C, cuts.length
    else:
        seq = tl.load(cuts.seq_of + slot)
        known = tl.minimum(seq, cuts.count - 1)
        start = tl.load(cuts.cu + known) + (slot - tl.load(cuts.first + known)) * C
        return slot * 0, start, tl.where(seq < cuts.count, tl.load(cuts.cu + known + 1), 0)


@triton.jit
def any_harmful(bounds, first, last, head):
    """0 or 1: of chunks from `first` on and before `last`."""
    found = tl.zeros([128], tl.int32)
    at = bounds.harmful + (head // bounds.share).to(tl.int64) * bounds.stride_h
    for block in range(first * bounds.parts, last * bounds.parts, 128):
        part = block + tl.arange(0, 128)
        found = tl.maximum(found, tl.load(at + part, mask=part < last * bounds.parts, other=0))
    return tl.max(found, 0)


@triton.jit
def any_steep(sums, batch, head, begin, end, first, last, C: tl.constexpr):
    """0 or 1: of a sequence's chunks from `first` on and before `last`, by the sums of g in each; see SAFE."""
    least = tl.zeros([128], tl.float32)
    at = place(sums, batch, head, begin)
    for block in range(first, last, 128):
        chunk = block + tl.arange(0, 128)
        middle = tl.minimum(chunk * C + C // 2, end - begin) - 1
        final = tl.minimum(chunk * C + C, end - begin) - 1
        early = tl.load(at + middle * sums.stride_n, mask=chunk < last, other=0.0)
        whole = tl.load(at + final * sums.stride_n, mask=chunk < last, other=0.0)
        least = tl.minimum(least, tl.minimum(early, whole - early))
    return (tl.min(least, 0) <= -SAFE).to(tl.int32)


@triton.jit
def place(x, batch, head, start):
    """Where x[batch, head, start] lies. Within a chunk, offsets fit 32 bits."""
    head = (head // x.share).to(tl.int64)
    return x.x + (batch.to(tl.int64) * x.stride_b + head * x.stride_h + start.to(tl.int64) * x.stride_n)


@triton.jit
def read(x, batch, head, start, rows, inside, channel, LIMIT: tl.constexpr):
    """Rows x[batch, head, start + rows, channel], zeros where there is nothing."""
    at = place(x, batch, head, start) + (rows[:, None] * x.stride_n + channel[None, :])
    return tl.load(at, mask=inside[:, None] & (channel < LIMIT)[None, :], other=0.0)


@triton.jit
def write(x, batch, head, start, rows, inside, channel, values, LIMIT: tl.constexpr):
    at = place(x, batch, head, start) + (rows[:, None] * x.stride_n + channel[None, :])
    tl.store(at, values.to(x.x.dtype.element_ty), mask=inside[:, None] & (channel < LIMIT)[None, :])


@triton.jit
def read_across(x, batch, head, start, rows, inside, channel, LIMIT: tl.constexpr):
    """The same across, a column a token."""
    at = place(x, batch, head, start) + (rows[None, :] * x.stride_n + channel[:, None])
    return tl.load(at, mask=inside[None, :] & (channel < LIMIT)[:, None], other=0.0)


@triton.jit
def write_across(x, batch, head, start, rows, inside, channel, values, LIMIT: tl.constexpr):
    at = place(x, batch, head, start) + (rows[None, :] * x.stride_n + channel[:, None])
    tl.store(at, values.to(x.x.dtype.element_ty), mask=inside[None, :] & (channel < LIMIT)[:, None])


@triton.jit
def read_row(x, batch, head, start, rows, inside):
    """One number a token, float32."""
    return tl.load(place(x, batch, head, start) + rows * x.stride_n, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prefix(g):
    """What is left of a chunk's start at each of its tokens."""
    return tl.exp(tl.cumsum(g, 0))


@triton.jit
def suffix(later):
    """What is left of each token at the chunk's end; later: the g of the token after each."""
    return tl.exp(tl.cumsum(later, 0, reverse=True))


@triton.jit
def between(g, rows, UPPER: tl.constexpr):
    """(C, C): what is left of token j at token i > j, 1 on the diagonal; UPPER: of i at j > i. Zeros elsewhere."""
    if UPPER:
        after = rows[None, :] > rows[:, None]
        return tl.where(rows[None, :] >= rows[:, None], tl.exp(tl.cumsum(tl.where(after, g[None, :], 0.0), 1)), 0.0)
    else:
        after = rows[:, None] > rows[None, :]
        return tl.where(rows[:, None] >= rows[None, :], tl.exp(tl.cumsum(tl.where(after, g[:, None], 0.0), 0)), 0.0)


@triton.jit
def between_sums(sums, rows, UPPER: tl.constexpr):
    """The same from the sums of g, in dtypes that bear their differences."""
    if UPPER:
        way = sums[None, :] - sums[:, None]
        return tl.where(rows[None, :] >= rows[:, None], tl.exp(tl.minimum(way, 0.0)), 0.0)
    else:
        way = sums[:, None] - sums[None, :]
        return tl.where(rows[:, None] >= rows[None, :], tl.exp(tl.minimum(way, 0.0)), 0.0)


@triton.jit
def apart(rows, h):
    """(C, C): pairs that meet at the level h, in either order."""
    differ = rows[:, None] ^ rows[None, :]
    return (differ >= h) & (differ < 2 * h)


@triton.jit
def finite(g):
    """g without infinities, which 0 * g would make NaN."""
    return tl.where(g < -1e4, -1e4, g)


@triton.jit
def summed(chosen, g, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of finite g over chosen tokens: (C, C), (C, channels) -> (C, channels)."""
    chosen = chosen.to(tl.float32).to(KIND)
    if PRECISION == "ieee":
        return tl.dot(chosen, g, input_precision=PRECISION)
    else:  # as the sum of two numbers that a product takes exactly, or nearly
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(KIND)
        return tl.dot(chosen, high.to(KIND), tl.dot(chosen, low, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def summed_across(g, chosen, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """The same across: (channels, C), (C, C) -> (channels, C)."""
    chosen = chosen.to(tl.float32).to(KIND)
    if PRECISION == "ieee":
        return tl.dot(g, chosen, input_precision=PRECISION)
    else:
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(KIND)
        return tl.dot(high.to(KIND), chosen, tl.dot(low, chosen, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def towards_middle(at, other, h):
    """Whether token `other` lies between token `at` and the middle of its block of 2 h, the later end included."""
    middle = (at | (2 * h - 1)) - h
    return (other > tl.minimum(at, middle)) & (other <= tl.maximum(at, middle))
