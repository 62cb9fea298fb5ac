"""Causal attention to keys that live for some time each: a decoder that drops tokens, for all tokens at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.softmax.attend import attend
from saccade.where import Box, Frame, Pattern, Span
from saccade.where.layout import Order

FOREVER = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class Alive(Pattern):
    """Key j lives for the queries born_j <= i <= last_j, both (M,) integers on their device, in rows of `length`."""

    born: Tensor
    last: Tensor
    length: int

    def __repr__(self) -> str:
        return f"Alive(<{len(self.born)}>, <{len(self.last)}>, {self.length})"

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (self.born[j] <= i) & (i <= self.last[j])

    def boxes(self, frame: Frame) -> list[Box]:
        at = frame.queries
        born = Span(self.born.int(), torch.zeros_like(at), at + 1)
        return [{("born", self): born, ("last", self): Span(self.last.int(), at, torch.full_like(at, FOREVER))}]

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        a_row = (self.length // block[0] + 2) * (self.length // block[1] + 2)
        return min(super().most_tiles(n, m, block, order), n // self.length * a_row)


def alive(last: Tensor) -> tuple[Tensor, Alive]:
    """The order of the keys of each head (B, Hkv, N), and who sees whom with all heads one after another in one row."""
    n = last.shape[2]
    # Sorted so, few tiles hold the keys that live to the end, and a band the others.
    order = (last < n - 1).int().argsort(dim=-1, stable=True)
    start = torch.arange(0, last.numel(), n, device=last.device).view(*last.shape[:2], 1)
    return order, Alive((order + start).flatten(), (last.gather(-1, order) + start).flatten(), n)


def attend_lifetimes(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention in which query i sees the keys j <= i <= last_j of its key head.

        o_i = sum_j p_ij v_j,   p_i = softmax(q_i . k_j / sqrt(D)) over the j with j <= i <= last_j

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv), last (B, Hkv, N) integers, last_j from j to N - 1 -> (o (B, H,
    N, Dv), lse (B, H, N)), differentiable in q, k and v. Keys that live to the end come first, in tiles of their own;
    all sequences and key heads lie in one row, so that one plan and one call do it. Costs the pairs that see each
    other, a copy of k and v, and a sort. Errors: ValueError for a `last` of another shape.

    >>> q, (k, v) = torch.randn(1, 4, 9, 8), torch.randn(2, 1, 2, 9, 8)
    >>> attend_lifetimes(q, k, v, torch.arange(9).expand(1, 2, 9))[0].equal(v.repeat_interleave(2, 1))
    True
    """
    if last.shape != k.shape[:3]:
        raise ValueError(f"last: got shape {tuple(last.shape)}; pass one number a key, {tuple(k.shape[:3])}")
    order, pattern = alive(last)
    k, v = (x.take_along_dim(order[..., None], 2).reshape(1, 1, -1, x.shape[3]) for x in (k, v))
    row = q.unflatten(1, (last.shape[1], -1)).permute(2, 0, 1, 3, 4).reshape(1, -1, last.numel(), q.shape[3])
    o, lse = attend(row, k, v, pattern, return_lse=True)
    heads = [x[0].unflatten(1, last.shape).transpose(0, 1).transpose(1, 2).flatten(1, 2) for x in (o, lse)]
    return heads[0], heads[1]
