"""A sequence cut into chunks: what a decay does inside one, and how heads and tokens are laid out for matrix products.

Tensors here are (B, Hkv, C, R or 1, c, ...): C chunks of c tokens, R query heads a key head. A decay knows, within its
chunk, what is left of key j at query i (`scores`), of the chunk's start at token i (`from_start`), of token j at the
chunk's end (`to_end`), and of the start at the end (`total`). Each is an exponential of plain sums of g, or a product
of such, never the exponential of a difference of large sums: that would be NaN for g = -inf, inexact, and could
overflow.
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
# On a CPU also no more than hold so many numbers of queries: temporaries that fit a cache cost less than calls.
CACHED = 2**19
# A decay, multiplied by LIFT, and its inverse are taken as factors where neither is larger than LIFT. So it may fall to
# 1 / LIFT**2, which is 80 nats, and the factors stay far from what overflows. A power of two rounds nothing.
LIFT = 2.0**58
# Tokens of the blocks that are tried in one product where a whole chunk decays by more than LIFT**2.
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

    As long as the decays P of the tokens after the chunk's first, multiplied up, are at least 1 / `LIFT`**2, what is
    left of key j at query i is split there, P_i (1 / P_j), which is one product of matrices; rounding errors before j
    are in both, and cancel. Further rows are split at the middle of ever smaller blocks. Which way a row goes is its
    own past's affair, so that no later gate changes a bit of it.
    """

    def __init__(self, g: Tensor) -> None:
        self.g = g
        # The rows that one product gives; None: all.
        self.near: Tensor | None = None
        self.factors = _may_look_at(g)
        if self.factors:
            self.since = since = Lifted.apply(g)
            self.start = since * (g[..., :1, :].exp() / LIFT)
            low, high = since.detach().aminmax(dim=-1, keepdim=True)
            near = (low >= 1 / LIFT) & (high <= LIFT)
            # Under vmap the choice is for the whole batch.
            if not bool(torch.func.debug_unwrap(near).all()):
                self.near, since = near, since.clamp(1 / LIFT, LIFT)
            self.back = since.reciprocal()
        else:
            self.start = g.cumsum(-2).exp()
        self.total = self.start[..., -1:, :].mT

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if not self.factors:
            return self._halved(q, k)
        near = grouped(q * self.since, (k * self.back).mT).tril()
        return near if self.near is None else torch.where(self.near, near, self._halved(q, k))

    def _halved(self, q: Tensor, k: Tensor) -> Tensor:
        size = q.shape[-2]
        width = 1 << (size - 1).bit_length()
        q, k, g = (F.pad(x, (0, 0, 0, width - size)) if width > size else x for x in (q, k, self.g))
        # Diagonal blocks of few tokens, then of 2, 4, ... times as many: a block's lower left quarter decays by way of
        # its middle.
        half = FEW if self.factors and width > FEW else 1
        few, own, gates = (x.unflatten(-2, (-1, half)) for x in (q, k, g))
        if half > 1:
            within = VectorDecay(gates)
            blocks, start, end = within.scores(few, own), within.start, within.end
        else:
            blocks, start, end = (few * own).sum(-1, keepdim=True), gates.exp(), torch.ones_like(gates)
        blocks = blocks.expand(*torch.broadcast_shapes(q.shape[:-2], g.shape[:-2]), *blocks.shape[-3:])
        while half < width:
            (before, after), (early, late) = (x.unflatten(-3, (-1, 2)).unbind(-3) for x in (start, end))
            left, right = k.unflatten(-2, (-1, 2, half)), q.unflatten(-2, (-1, 2, half))
            corner = (right.select(-3, 1) * after) @ (left.select(-3, 0) * early).mT
            first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
            top = torch.cat([first, torch.zeros_like(first)], -1)
            blocks = torch.cat([top, torch.cat([corner, second], -1)], -2)
            half *= 2
            if half < width:
                start = torch.cat([before, before[..., -1:, :] * after], -2)
                end = torch.cat([early * after[..., -1:, :], late], -2)
        return blocks.squeeze(-3)[..., :size, :size]

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.start

    def to_end(self, x: Tensor) -> Tensor:
        return x * self.end

    @property
    def end(self) -> Tensor:
        """What is left of each token at the last."""
        if self.factors and self.near is None:
            return self.back * self.since[..., -1:, :]
        after = F.pad(self.g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2).exp()
        if self.near is None:
            return after
        return torch.where(self.near[..., -1:, :], self.back * self.since[..., -1:, :], after)


class Lifted(torch.autograd.Function):
    """`LIFT` exp(g_1 + ... + g_i) at token i of a chunk, (..., c, F), multiplied up: no large sum makes it inexact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor) -> Tensor:
        return F.pad(g[..., 1:, :].exp(), (0, 0, 1, 0), value=LIFT).cumprod(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (decay,) = ctx.saved_tensors
        own = gradient * decay
        later = own[..., 1:, :].flip(-2).cumsum(-2).flip(-2)
        return F.pad(later, (0, 0, 1, 0))


Decay = NoDecay | ScalarDecay | VectorDecay


def _may_look_at(x: Tensor) -> bool:
    """Whether a choice may hang on the values of x: not where that would wait for a device or break a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


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
        first = cast(Tensor, tensors[0])
        length, abreast = first.shape[2], ABREAST
        if first.device.type == "cpu":
            abreast = max(1, min(ABREAST, CACHED * length // max(1, first.numel() * chunk)))
        whole, step = length - length % chunk, chunk * abreast
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
