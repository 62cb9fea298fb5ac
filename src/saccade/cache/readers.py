"""Policies that keep all and read few."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.cache.budgets import budgeted
from saccade.cache.policy import Policy
from saccade.cache.steps import best_found, raise_newest, tokens_read
from saccade.cache.store import Store
from saccade.cache.view import Stored
from saccade.errors import positive
from saccade.softmax import score_bounds, widen_bounds

if TYPE_CHECKING:
    from saccade.cache.session import Session


class Reader(Policy):
    """Keeps all; a step reads `budget` tokens, a part (0, 1] of those seen or a number of them."""

    def __init__(self, budget: float | int, page: int = 16) -> None:
        self.budget, self.page = budgeted("budget", budget), positive("page", page)

    def reads(self, step: Stored, unit: int = 1) -> Tensor:
        """How many units of `unit` tokens a step reads of each sequence, at least 1: (G,) on the device."""
        return tokens_read(step.ends, self.budget, unit)

    def best(self, step: Stored, scores: Tensor, unit: int = 1) -> Tensor:
        """The `reads` largest scores (G, ..., M) of each row, int64 (G, ..., K); -1 where fewer are above -inf."""
        share = self.budget
        most = share // unit if isinstance(share, int) else math.ceil(step.horizon * share / unit)
        found = scores.topk(min(scores.shape[-1], max(1, most)), -1)
        return best_found(*found, step.ends, share, unit)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.budget}, page={self.page})"


class Quest(Reader):
    """Read the pages whose keys may score highest: Quest (arXiv 2406.10774, algorithm 1).

        bound(page) = sum_d max(q_d low_d, q_d high_d),   low, high: minimum and maximum of the page's keys by channel

    The pages of the largest bounds, and the newest always. One list for the query heads of a key head, by the largest
    of their bounds (the paper has one query head a key head). budget: tokens, in whole pages, or a part of those seen,
    rounded up. page: 16. Costs: 2 D numbers a page and the chosen pages; the bounds take 2 / page of the keys' memory.

    >>> from saccade.cache import Session
    >>> session, x = Session(Quest(32)), torch.randn(1, 2, 100, 8)
    >>> o = [session.attend(0, *[x[:, :, a:b]] * 3) for a, b in ((0, 99), (99, 100))]
    >>> session.stores[0].notes["bounds"].shape
    torch.Size([1, 2, 7, 16])
    """

    def settle(self, session: Session) -> None:
        for store in map(session.store, range(session.num_layers)):
            slots, there = store.order()
            keys = store.read(store.pool.k, slots)
            short = -keys.shape[2] % self.page
            low, high = (
                torch.nn.functional.pad(
                    keys.masked_fill(~there[..., None], fill), (0, 0, 0, short), value=fill
                ).unflatten(2, (-1, self.page))
                for fill in (torch.inf, -torch.inf)
            )
            store.note("bounds", torch.cat([low.amin(3), high.amax(3)], -1), fill=torch.nan)

    def select(self, step: Stored) -> Tensor:
        store = step.stored
        self._widen(store, step)
        scores = score_bounds(step.q, step.notes("bounds"))
        raise_newest(scores, step.lengths, self.page)
        return self.best(step, scores, self.page)

    def _widen(self, store: Store, step: Stored) -> None:
        """Let the bounds of the newest page hold the newest key."""
        bounds, which = store.notes["bounds"], store._rows(step.rows)
        pages = -(-store.width() // self.page)
        if pages > bounds.shape[2]:
            low, high = bounds.chunk(2, -1)
            more = (0, 0, 0, pages - bounds.shape[2])
            pad = torch.nn.functional.pad
            bounds = torch.cat([pad(low, more, value=torch.inf), pad(high, more, value=-torch.inf)], -1)
            store.note("bounds", bounds, fill=torch.nan)
        rows = bounds.view(-1, *bounds.shape[2:])
        widen_bounds(store.pool.k, self.page, rows, (store.table, store.lengths), which)

    def steady(self, session: Session) -> bool:
        return True
