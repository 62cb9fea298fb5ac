"""Which pages a decoding query reads, from a few numbers a page that are kept as keys and values are written.

A page is a physical one: its numbers lie in tensors with one row a page of the whole store, and one more for what is to
be lost. What a page held under an earlier owner is forgotten when its first token is written. Nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.errors import known, positive


class Choice:
    """budget: tokens, in whole pages; the newest page is always one of them.

    numbers: tensors (pages + 1, ...) that begin as `blank`, for every page anew.
    """

    def __init__(self, budget: int) -> None:
        self.budget = positive("budget", budget)
        self.numbers: tuple[Tensor, ...] = ()
        self.blanks: tuple[Tensor, ...] = ()

    def blank(self, k: Tensor) -> tuple[Tensor, ...]:
        """The numbers of a page without tokens; k (n, Hkv, D)."""
        raise NotImplementedError(f"{type(self).__name__}.blank")

    def add(self, pages: Tensor, k: Tensor, v: Tensor) -> None:
        """Let the numbers of pages (n,) know of tokens k (n, Hkv, D), v (n, Hkv, Dv)."""
        raise NotImplementedError(f"{type(self).__name__}.add")

    def scores(self, q: Tensor, table: Tensor) -> Tensor:
        """(B, Hkv or 1, P) of the pages in table (B, P), int64, for q (B, H, D)."""
        raise NotImplementedError(f"{type(self).__name__}.scores")

    def wrote(self, num_pages: int, pages: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Tokens went to offsets (n,) of pages (n,), of num_pages there are."""
        if not self.numbers or len(self.numbers[0]) != num_pages + 1:
            self.blanks = self.blank(k)
            self.numbers = tuple(x.expand(num_pages + 1, *x.shape).clone() for x in self.blanks)
        begun = pages.masked_fill(offsets != 0, num_pages)
        for numbers, blank in zip(self.numbers, self.blanks, strict=True):
            numbers[begun] = blank
        self.add(pages, k, v)

    def choose(self, q: Tensor, table: Tensor, lengths: Tensor, page: int) -> Tensor:
        """Logical pages int32 (B, Hkv or 1, K), -1 for none; q (B, H, D), table (B, P), lengths (B,)."""
        count = max(1, min(self.budget // page, table.shape[1]))
        place = torch.arange(table.shape[1], device=table.device)
        newest = (lengths[:, None].long() - 1) // page
        there = place <= newest
        scores = self.scores(q, table.masked_fill(~there, 0).long())
        scores = scores.masked_fill((place == newest)[:, None], torch.inf).masked_fill(~there[:, None], -torch.inf)
        found = scores.topk(count, -1)
        return found.indices.masked_fill(found.values == -torch.inf, -1).int()


class Quest(Choice):
    """The pages whose keys may score highest (arXiv 2406.10774, algorithm 1).

        bound(page) = sum_d max(q_d low_d, q_d high_d),   low, high: minimum and maximum of the page's keys by channel

    One list for the query heads of a key head, by the largest of their bounds.
    """

    def blank(self, k: Tensor) -> tuple[Tensor, ...]:
        low = k.new_full(k.shape[1:], torch.inf)
        return low, -low

    def add(self, pages: Tensor, k: Tensor, v: Tensor) -> None:
        low, high = self.numbers
        at = pages[:, None, None].expand_as(k)
        low.scatter_reduce_(0, at, k, "amin")
        high.scatter_reduce_(0, at, k, "amax")

    def scores(self, q: Tensor, table: Tensor) -> Tensor:
        low, high = (x[table].transpose(1, 2)[:, :, None] for x in self.numbers)  # (B, Hkv, 1, P, D)
        q = q.unflatten(1, (low.shape[1], -1))[:, :, :, None]
        return torch.maximum(q * low, q * high).float().sum(-1).amax(2)


class PagedEviction(Choice):
    """The pages of the most important tokens (arXiv 2509.04377), for all heads.

        s(page) = mean over its tokens and key heads of ||v|| / ||k||

    A full page's mean never changes, so that keeping the `budget` largest at every step is evicting the least whenever
    a new page is one too many: what is left out once is never read again. Deviation: of a prompt, too, whole pages are
    left out, where the paper drops tokens before they are put into pages.
    """

    def blank(self, k: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros((), device=k.device)
        return total, total

    def add(self, pages: Tensor, k: Tensor, v: Tensor) -> None:
        total, count = self.numbers
        worth = (v.float().norm(dim=-1) / k.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)).mean(-1)
        total.index_add_(0, pages, worth)
        count.index_add_(0, pages, torch.ones_like(worth))

    def scores(self, q: Tensor, table: Tensor) -> Tensor:
        total, count = self.numbers
        return (total / count.clamp(min=1))[table][:, None]


CHOICES: dict[str, Callable[[int], Choice]] = {"quest": Quest, "paged_eviction": PagedEviction}


def choice(options: Mapping[str, Any]) -> Choice | None:
    """What `additional_config["saccade"]` asks for; None reads every page.

    Errors: ValueError for other names, and for a selection without a budget.
    """
    if unknown := sorted({*options} - {"select", "budget"}):
        raise ValueError(f"additional_config: saccade has no option {unknown[0]!r}; it has select and budget")
    select, budget = options.get("select"), options.get("budget")
    if select is None:
        if budget is not None:
            raise ValueError(f"budget: got {budget} without select; pass one of {', '.join(CHOICES)}")
        return None
    if budget is None:
        raise ValueError(f"budget: {select!r} needs one, tokens that a decoding query reads; pass a number > 0")
    return CHOICES[known("select", select, CHOICES)](budget)
