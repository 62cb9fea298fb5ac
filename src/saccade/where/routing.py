"""Routing: where the data decide.

An estimator scores (query tile, key tile) pairs cheaply, a selector keeps some, a pattern bounds both.

    scores = estimator(q, k)            (B, H or Hkv, rows, cols), one value a tile pair
    chosen = selector(scores, must)     per query tile a few key tiles, the mandatory ones among them
    plan   = the tiles chosen, of what the pattern admits

A router is these three; what it returns is a `Plan` like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saccade.errors import positive
from saccade.where.pattern import Pattern, check_block
from saccade.where.patterns import Full
from saccade.where.plan import Plan
from saccade.where.planner import plan_chosen, tile_pairs

Estimator = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


class Selector(Protocol):
    """scores (..., C), -inf where nothing may be chosen; must: bool, broadcasts over scores -> marks, bool (..., C).

    A selector that marks no more than some number of tiles a row may say so, in an attribute `most`.
    """

    def __call__(self, scores: Tensor, must: Tensor) -> Tensor: ...


def pool(x: Tensor, size: int) -> Tensor:
    """Means over consecutive blocks of tokens, the last of which may be short.

    (B, H, N, D) -> (B, H, ceil(N / size), D).
    """
    short = -x.shape[2] % size
    sums = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3)
    count = torch.full((sums.shape[2], 1), size, dtype=x.dtype, device=x.device)
    count[-1] -= short
    return sums / count


def pooled_scores(q: Tensor, k: Tensor, block: tuple[int, int]) -> Tensor:
    """Dot products of mean queries and mean keys: (B, H, rows, cols). Cost: N M D / (bq bk)."""
    pooled = pool(q, block[0]).unflatten(1, (k.shape[1], -1))
    return (pooled @ pool(k, block[1])[:, :, None].transpose(-1, -2)).flatten(1, 2)


@dataclass(frozen=True)
class TopK:
    """The k best key tiles of each query tile; mandatory ones come first and count."""

    k: int

    def __post_init__(self) -> None:
        positive("k", self.k)

    @property
    def most(self) -> int:
        return self.k

    def __call__(self, scores: Tensor, must: Tensor) -> Tensor:
        best = scores.masked_fill(must & (scores > -torch.inf), torch.inf).topk(min(self.k, scores.shape[-1]))
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)


@dataclass(frozen=True)
class CumulativeMass:
    """The fewest key tiles whose softmax weights add up to `mass`, and the mandatory ones."""

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass: got {self.mass}; pass a share in (0, 1]")

    def __call__(self, scores: Tensor, must: Tensor) -> Tensor:
        weights, at = scores.softmax(-1).nan_to_num(0).sort(-1, descending=True)
        before = weights.cumsum(-1) - weights
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, at, before < self.mass)
        return (keep | must) & (scores > -torch.inf)


@dataclass(frozen=True)
class Threshold:
    """The key tiles whose softmax weight is at least `least`, and the mandatory ones."""

    least: float

    def __call__(self, scores: Tensor, must: Tensor) -> Tensor:
        keep = scores.softmax(-1).nan_to_num(0) >= self.least
        return (keep | must) & (scores > -torch.inf)


@dataclass(frozen=True)
class Router:
    """Estimator, selector and the pattern that bounds them.

    block: (query tokens, key tokens) of a tile. pattern: what may be attended at all (default Full). must: tiles that
    this pattern touches are always kept (default none). candidates: tiles that this pattern touches may be chosen
    (default: what `pattern` touches).

    >>> from saccade.where import Causal, Blocks
    >>> router = Router(pooled_scores, TopK(2), block=(16, 16), pattern=Causal(), must=Blocks(16) & Causal())
    >>> q, k = torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 64, 8)
    >>> router.route(q, k).verify().num_tiles
    14
    """

    estimator: Estimator
    selector: Selector
    block: tuple[int, int] = (64, 64)
    pattern: Pattern = field(default_factory=Full)
    must: Pattern | None = None
    candidates: Pattern | None = None

    def route(self, q: Tensor, k: Tensor) -> Plan:
        """The plan for q (B, H, N, D), k (B, Hkv, M, D); scores of Hkv heads are shared by the query heads of each."""
        (batch, heads, n, _), m, block = q.shape, k.shape[2], check_block(self.block)
        allowed = tile_pairs(self.pattern, n, m, block, q.device)
        must, some = torch.zeros_like(allowed), allowed
        if self.must is not None:
            must = tile_pairs(self.must, n, m, block, q.device) & allowed
        if self.candidates is not None:
            some = (tile_pairs(self.candidates, n, m, block, q.device) & allowed) | must
        scores = self.estimator(q.detach(), k.detach(), block).masked_fill(~some, -torch.inf)
        chosen = self.selector(scores, must)
        lists = torch.arange(batch * chosen.shape[1], device=q.device).view(batch, -1)
        alike = heads // chosen.shape[1]
        group_of = lists.repeat_interleave(alike, 1)
        most = getattr(self.selector, "most", None)
        return plan_chosen(self.pattern, chosen.flatten(0, 1), group_of, n, m, block, most=most, alike=alike)
