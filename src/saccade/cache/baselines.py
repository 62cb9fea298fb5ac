"""What papers compare with, each a scorer and a budget. budget: a part (0, 1] of the prompt, or tokens."""

from __future__ import annotations

from saccade.cache.budgets import AcrossHeads, Pyramid
from saccade.cache.policy import Evict
from saccade.cache.scorers import Expected, KeyDifference, KeyNorm, LastQuery, Observed, Received, Recency

Share = float | int


def streaming_llm(budget: Share = 0.25, *, sinks: int = 4) -> Evict:
    """Sinks and the most recent tokens (arXiv 2309.17453); also while decoding."""
    return Evict(Recency(), budget, sinks=sinks, every=1)


def h2o(budget: Share = 0.25, *, recent: int = 32) -> Evict:
    """Heavy hitters by accumulated attention, and recent tokens (arXiv 2306.14048); also while decoding.

    Deviation: the paper gives half of the budget to recent tokens; here that is a number of them, `recent`.
    """
    return Evict(Received(), budget, recent=recent, every=1)


def snapkv(budget: Share = 0.25, *, window: int = 32, pool: int = 5) -> Evict:
    """What the last `window` queries of the prompt attend to (arXiv 2404.14469); what is decoded stays."""
    return Evict(Observed(window, pool), budget, recent=window)


def tova(budget: Share = 0.25) -> Evict:
    """What the newest query attends to (arXiv 2401.06104); also while decoding."""
    return Evict(LastQuery(), budget, every=1)


def pyramidkv(budget: Share = 0.25, *, window: int = 32, pool: int = 5, steepness: int = 20) -> Evict:
    """SnapKV with more tokens in the first layers (arXiv 2406.02069)."""
    return Evict(Observed(window, pool), Pyramid(budget, steepness), recent=window)


def adakv(budget: Share = 0.25, *, window: int = 32, pool: int = 5, floor: float = 0.2) -> Evict:
    """SnapKV with a budget that the key heads of a layer share (arXiv 2407.11550)."""
    return Evict(Observed(window, pool), AcrossHeads(budget, floor), recent=window)


def knorm(budget: Share = 0.25, *, recent: int = 0) -> Evict:
    """Keys of the smallest norms (arXiv 2406.11430). recent: tokens that stay besides, a question at the end say."""
    return Evict(KeyNorm(), budget, recent=recent)


def expected_attention(budget: Share = 0.25, *, sinks: int = 4, recent: int = 0) -> Evict:
    """What the queries of the next 512 positions would attend to, taken as Gaussian (arXiv 2510.00636). recent: see
    `knorm`.
    """
    return Evict(Expected(sinks), budget, sinks=sinks, recent=recent)


def keydiff(budget: Share = 0.25, *, recent: int = 0) -> Evict:
    """Keys unlike the others (arXiv 2504.15364). recent: see `knorm`."""
    return Evict(KeyDifference(), budget, recent=recent)
