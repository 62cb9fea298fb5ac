"""A sequence cut into chunks: what a decay does inside one, and how heads and tokens are laid out for matrix products.

Tensors here are (B, Hkv, C, R or 1, c, ...): C chunks of c tokens, R query heads a key head. A decay knows, within its
chunk, what is left of key j at query i (`scores`), of the chunk's start at token i (`from_start`), of token j at the
chunk's end (`to_end`), and of the start at the end (`total`). Each is an exponential of plain sums of g, never of a
difference of sums: that would be NaN for g = -inf, inexact for any large g, and its exponential could overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Chunks that are computed side by side; more would only hold more temporaries at once.
ABREAST = 64


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
    """One g a token and channel: (B, Hkv, C, R or 1, c, F)."""

    def __init__(self, g: Tensor) -> None:
        self.g = g
        self.start = g.cumsum(-2).exp()
        self.end = _after(g).exp()
        self.total = self.start[..., -1:, :].mT

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        size = q.shape[-2]
        width = 1 << (size - 1).bit_length()
        q, k, g = (F.pad(x, (0, 0, 0, width - size)) for x in (q, k, self.g))
        # Diagonal blocks of one token, then of 2, 4, ...: a block's lower left quarter decays by way of its middle.
        blocks = (q * k).sum(-1)
        blocks = blocks.expand(*q.shape[:3], max(q.shape[3], g.shape[3]), width)[..., None, None]
        half = 1
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
        return x * self.end


Decay = NoDecay | ScalarDecay | VectorDecay


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


@dataclass(frozen=True)
class Stretch:
    """Some whole chunks of a sequence: tokens `start` to `stop`, `chunk` each, heads grouped by key head."""

    start: int
    stop: int
    chunk: int
    num_kv_heads: int

    @staticmethod
    def cover(length: int, chunk: int, num_kv_heads: int) -> list[Stretch]:
        """Stretches of at most `ABREAST` chunks that cover the sequence; the last may be one shorter chunk."""
        whole, step = length - length % chunk, chunk * ABREAST
        found = [Stretch(a, min(a + step, whole), chunk, num_kv_heads) for a in range(0, whole, step)]
        return found if whole == length else [*found, Stretch(whole, length, length - whole, num_kv_heads)]

    def cut(self, x: Tensor) -> Tensor:
        """(B, heads, N, ...) -> (B, Hkv, C, heads // Hkv, c, ...)."""
        x = x[:, :, self.start : self.stop].unflatten(1, (self.num_kv_heads, -1))
        return x.unflatten(3, (-1, self.chunk)).transpose(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """(B, Hkv, C, R, c, ...) -> (B, Hkv R, C c, ...)."""
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def decay(self, g: Tensor | None) -> Decay:
        """The decay of these chunks; g is None, (1, heads, 1), (B, heads, N) or (B, heads, N, F)."""
        if g is None:
            return NoDecay()
        if g.ndim == 4:
            return VectorDecay(self.cut(g))
        if g.shape[2] == 1:
            # A constant is the same in every chunk.
            return ScalarDecay(g.expand(-1, -1, self.chunk).unflatten(1, (self.num_kv_heads, -1))[:, :, None])
        return ScalarDecay(self.cut(g))
