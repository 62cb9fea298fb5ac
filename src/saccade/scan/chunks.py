"""A sequence cut into chunks: what a decay does inside one, and how heads and tokens are laid out for matrix products.

Tensors here are (B, Hkv, C, R or 1, c, ...): C chunks of c tokens, R query heads a key head. A decay knows, within its
chunk, what is left of key j at query i (`scores`), of the chunk's start at token i (`from_start`), of token j at the
chunk's end (`to_end`), and of the start at the end (`total`). Each is an exponential of plain sums of g, never of a
difference of large sums: that would be NaN for g = -inf, inexact, and its exponential could overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Chunks that are computed side by side; more would only hold more temporaries at once.
ABREAST = 64
# The largest sum of decays whose exponential is taken with either sign. Far from what overflows; what bounds it is that
# the rounding of a sum becomes an error of a weight near 1.
SAFE = 16.0
# Tokens of the blocks that are tried in one product where a whole chunk decays by more than that.
FEW = 8


class NoDecay:
    """g = 0."""

    total: Tensor | None = None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return grouped(q, k.mT).tril()

    def from_start(self, x: Tensor) -> Tensor:
        return x

    def to_end(self, x: Tensor) -> Tensor:
        return x


class ScalarDecay:
    """One g a token: (B or 1, Hkv, C or 1, R or 1, c)."""

    def __init__(self, g: Tensor) -> None:
        size = g.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
        # Entry (i, j) sums g over j < m <= i.
        between = g[..., None].expand(*g.shape, size).masked_fill(~later, 0.0).cumsum(-2)
        self.between = between.exp().tril()
        self.start = g.cumsum(-1).exp()[..., None]
        self.total = self.start[..., -1:, :]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return grouped(q, k.mT).tril() * self.between

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.start

    def to_end(self, x: Tensor) -> Tensor:
        return x * self.between[..., -1, :, None]


class VectorDecay:
    """One g a token and channel: (..., R or 1, c, F).

    As long as the sums G of g over the tokens after the chunk's first are at most `SAFE`, what is left of key j at
    query i is split there, exp(G_i) exp(-G_j), which is one product of matrices. Further rows are split at the middle
    of ever smaller blocks. Which way a row goes is its own past's affair, so that no later gate changes a bit of it.
    """

    def __init__(self, g: Tensor) -> None:
        self.g = g
        sums = F.pad(g[..., 1:, :], (0, 0, 1, 0)).cumsum(-2)
        self.since = sums.exp()
        self.start = self.since * g[..., :1, :].exp()
        self.total = self.start[..., -1:, :].mT
        # The rows that one product gives; None: all.
        self.near: Tensor | None = None
        self.factors = _may_look_at(g)
        if self.factors:
            plain = sums.detach()
            # Under vmap the choice is for the whole batch.
            least, most = torch.func.debug_unwrap(plain).aminmax()
            if not bool((least >= -SAFE) & (most <= SAFE)):
                self.near = (plain.abs() <= SAFE).all(-1, keepdim=True)
                sums = sums.clamp(-SAFE, SAFE)
            self.back = (-sums).exp()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if not self.factors:
            return self._halved(q, k)
        near = grouped(q * self.since, (k * self.back).mT).tril()
        return near if self.near is None else torch.where(self.near, near, self._halved(q, k))

    def _halved(self, q: Tensor, k: Tensor) -> Tensor:
        size = q.shape[-2]
        width = 1 << (size - 1).bit_length()
        q, k, g = (F.pad(x, (0, 0, 0, width - size)) for x in (q, k, self.g))
        # Diagonal blocks of few tokens, then of 2, 4, ... times as many: a block's lower left quarter decays by way of
        # its middle.
        half = FEW if self.factors and width > FEW else 1
        if half > 1:
            few, own, gates = (x.unflatten(-2, (-1, half)) for x in (q, k, g))
            blocks = VectorDecay(gates).scores(few, own)
        else:
            blocks = (q * k).sum(-1)[..., None, None]
        blocks = blocks.expand(*torch.broadcast_shapes(q.shape[:-2], g.shape[:-2]), *blocks.shape[-3:])
        while half < width:
            halves = (-2, (width // (2 * half), 2, half))
            left, right = g.unflatten(*halves).unbind(-3)
            late = q.unflatten(*halves)[..., 1, :, :] * right.cumsum(-2).exp()
            early = k.unflatten(*halves)[..., 0, :, :] * _after(left).exp()
            corner = late @ early.mT
            first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
            top = torch.cat([first, torch.zeros_like(first)], -1)
            blocks = torch.cat([top, torch.cat([corner, second], -1)], -2)
            half *= 2
        return blocks.squeeze(-3)[..., :size, :size]

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.start

    def to_end(self, x: Tensor) -> Tensor:
        if not self.factors:
            return x * _after(self.g).exp()
        near = self.back * self.since[..., -1:, :]
        if self.near is None:
            return x * near
        return x * torch.where(self.near[..., -1:, :], near, _after(self.g).exp())


Decay = NoDecay | ScalarDecay | VectorDecay


def _may_look_at(x: Tensor) -> bool:
    """Whether a choice may hang on the values of x: not where that would wait for a device or break a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _after(g: Tensor) -> Tensor:
    """Sums of g over the tokens after each, (..., c, F)."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def grouped(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for x (..., R, n, m) and y (..., R or 1, m, p); where y has one head for R of x, it is not repeated."""
    if y.shape[-3] == 1:
        return (x.flatten(-3, -2) @ y.squeeze(-3)).unflatten(-2, x.shape[-3:-1])
    return x @ y


def weigh(scores: Tensor, v: Tensor) -> Tensor:
    """scores @ v for lower triangular scores, in which a NaN or infinity in v reaches no earlier row."""
    # 0 * NaN is NaN, so such values are kept out of the product and spread by a running sum.
    spoilt = (v.detach() * 0).cumsum(-2)
    return grouped(scores, v.nan_to_num(0.0, 0.0, 0.0)) + spoilt


def each_chunk(total: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The decay of `count` chunks one by one, each (B, Hkv, R or 1, F or 1, 1); None for none."""
    return [None] * count if total is None else total.expand(-1, -1, count, *total.shape[3:]).unbind(2)


@dataclass(frozen=True)
class Stretch:
    """Some whole chunks of a sequence, `chunk` tokens each, heads grouped by key head."""

    chunk: int
    num_kv_heads: int

    @staticmethod
    def cover(
        tensors: Sequence[Tensor | None], chunk: int, num_kv_heads: int
    ) -> Iterator[tuple[Stretch, *tuple[Any, ...]]]:
        """Stretches of at most `ABREAST` chunks that cover the sequence, each with its part of every tensor.

        tensors: (B, heads, N, ...), the first one of N tokens; None and what has one token for all are passed on whole.
        The last stretch may be one shorter chunk.
        """
        length = cast(Tensor, tensors[0]).shape[2]
        whole, step = length - length % chunk, chunk * ABREAST
        sizes = [min(step, whole - a) for a in range(0, whole, step)] + [length - whole] * (whole < length)
        # One split for all: the gradient of a slice is a tensor of N tokens, zero but for its own.
        parts = [[x] * len(sizes) if x is None or x.shape[2] != length else x.split(sizes, 2) for x in tensors]
        for size, *own in zip(sizes, *parts, strict=True):
            yield Stretch(min(size, chunk), num_kv_heads), *own

    def cut(self, x: Tensor) -> Tensor:
        """(B, heads, n, ...) -> (B, Hkv, C, heads // Hkv, c, ...)."""
        return x.unflatten(1, (self.num_kv_heads, -1)).unflatten(3, (-1, self.chunk)).transpose(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """(B, Hkv, C, R, c, ...) -> (B, Hkv R, C c, ...)."""
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def decay(self, g: Tensor | None) -> Decay:
        """The decay of these chunks; g is None, (1, heads, 1), (B, heads, n) or (B, heads, n, F)."""
        if g is None:
            return NoDecay()
        if g.ndim == 4:
            return VectorDecay(self.cut(g))
        if g.shape[2] == 1:
            # A constant is the same in every chunk.
            return ScalarDecay(g.expand(-1, -1, self.chunk).unflatten(1, (self.num_kv_heads, -1))[:, :, None])
        return ScalarDecay(self.cut(g))
