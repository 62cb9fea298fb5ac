"""Physical pages of keys and values: taken, shared, copied when one of several owners writes, and given back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.cache.frames import Frames
from saccade.cache.steps import Held, Ring, drop_token, put_token
from saccade.errors import positive
from saccade.softmax import Pages, score_tokens
from saccade.softmax.page_rows import Found, alike, recorded

Reading = Iterator[tuple[Pages, Tensor | None]]


class PagePool:
    """Pages of `page` tokens of one key head, with a list of those that are free and a count of owners for each.

    k (P, 1, page, D), v (P, 1, page, Dv): what `Pages` takes. positions (P, page) int32: where in its sequence each
    token stood. columns (P, page, C) float32: numbers that a policy keeps with a token. The list of free pages lies on
    the device and its length on the host, so that taking and releasing pages waits for nothing; only once pages have
    had several owners (`hold`) does releasing them ask the device whose they are.

    dim: D. value_dim: Dv (default D). page: tokens a page (16). columns: C (0). The pool starts empty; its size is that
    of the largest need, and at most 1 / 32 more. Errors: ValueError or TypeError that names the argument.

    >>> pool = PagePool(8)
    >>> ids = pool.take(3)
    >>> pool.release(ids[:2])
    >>> pool.num_pages, pool.in_use, pool.taken, pool.returned
    (3, 1, 3, 2)
    """

    whole = True  # k and v are tensors, and `reading` has one part

    def __init__(
        self,
        dim: int,
        value_dim: int | None = None,
        *,
        page: int = 16,
        columns: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.page = positive("page", page)
        self.dims = {"k": positive("dim", dim), "v": positive("value_dim", value_dim or dim)}
        self.dtype = dtype
        beside = {
            "positions": torch.zeros(0, page, dtype=torch.int32, device=device),
            "columns": torch.zeros(0, page, positive("columns", columns, least=0), device=device),
            "owners": torch.zeros(0, dtype=torch.int32, device=device),
        }
        pages = {name: torch.zeros(0, 1, page, n, dtype=dtype, device=device) for name, n in self.dims.items()}
        self.frames = Frames(self._laid(pages) | beside)
        self.shared = False  # pages may have several owners
        self.stores = 1  # that have pages here
        self.taken = self.returned = 0

    def _laid(self, pages: dict[str, Tensor]) -> dict[str, Tensor]:
        """What lies under the number of a page: here k and v themselves, (0, 1, page, D)."""
        return pages

    @property
    def k(self) -> Tensor:
        return self.frames["k"]

    @property
    def v(self) -> Tensor:
        return self.frames["v"]

    @property
    def positions(self) -> Tensor:
        return self.frames["positions"]

    @property
    def columns(self) -> Tensor:
        return self.frames["columns"]

    @property
    def owners(self) -> Tensor:
        return self.frames["owners"]

    @property
    def num_pages(self) -> int:
        """Pages that there is memory for."""
        return len(self.frames)

    @property
    def in_use(self) -> int:
        """Pages that have an owner."""
        return self.frames.in_use

    @property
    def nbytes(self) -> int:
        """Bytes of all that is allocated on the device."""
        return self.frames.nbytes

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of the pages that have an owner."""
        return self.frames.nbytes_in_use

    @property
    def on_host(self) -> bool:
        """Whether all pages lie in one memory, which the host reads itself."""
        return self.whole and self.positions.device.type == "cpu"

    @property
    def guarded(self) -> bool:
        """Whether pages must be `opened` before they are written to."""
        return self.shared

    # -- whose pages are -------------------------------------------------------------------------------------------

    def take(self, count: int) -> Tensor:
        """`count` pages, int64 (count,), with one owner each; what they hold is undefined."""
        ids = self.frames.take(count)
        self.taken += count
        self.owners.index_fill_(0, ids, 1)
        return ids

    def hold(self, ids: Tensor) -> None:
        """One owner more for each page, twice for one that is named twice."""
        self.owners.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        self.shared = True

    def release(self, ids: Tensor) -> None:
        """One owner less; pages without one are free."""
        if self.shared:
            self.owners.index_add_(0, ids, -torch.ones_like(ids, dtype=torch.int32))
            ids = ids.unique()
            ids = ids[self.owners[ids] == 0]
            self.shared = bool((self.owners > 1).any())
        else:
            self.owners.index_fill_(0, ids, 0)
        self._forget(ids)
        self.frames.release(ids)
        self.returned += len(ids)

    def own(self, ids: Tensor) -> Tensor:
        """Pages with what these hold and one owner each: they themselves, and copies of those that have several."""
        if not self.shared:
            return ids
        several = self.owners[ids] > 1
        old = ids[several]
        new = self.take(len(old))
        self._copy(new, old)
        ids = ids.masked_scatter(several, new)
        if len(old):
            self.release(old)
        return ids

    def opened(self, ids: Tensor) -> Tensor:
        """Pages with what these hold, to be written to: of one owner each, in full precision."""
        return self.own(ids)

    def shrink(self, ids: Tensor) -> None:
        """Keep the memory of these pages alone, which are 0, 1, ... from now on, in this order."""
        self.frames.shrink(ids)

    def _forget(self, ids: Tensor) -> None:
        """What these pages hold is of no use any more."""

    def _copy(self, new: Tensor, old: Tensor) -> None:
        for x in (self.k, self.v, self.positions, self.columns):
            x[new] = x[old]

    # -- writing ---------------------------------------------------------------------------------------------------

    @property
    def _held(self) -> Held:
        return self.k, self.v, self.positions, self.columns

    def put(self, k: Tensor, v: Tensor, rows: tuple[Tensor, Tensor, Tensor], length: int | None, found: Found) -> None:
        """One token a row, which is counted: see `put_token`. length: of all rows, None where they differ. found: of
        these tables, see `Pages`.
        """
        if not self.on_host or recorded():
            put_token(k, v, self._held, rows)
            return
        table, lengths, ends = rows
        if length is None:
            slot, own = lengths.numpy().astype(np.int64), np.arange(len(table))
            at = torch.from_numpy(table.numpy()[own, slot // self.page] * self.page + slot % self.page)
        else:
            at = found.layout(table.numpy(), length // self.page + 1, self.page).newest + length % self.page
        for x, new in ((self.k, k), (self.v, v)):
            width = x.shape[3]
            new = new if new.dtype == x.dtype else new.to(x.dtype)
            x.view(-1, width).index_copy_(0, at, new.reshape(-1, width))
        end = alike(ends)
        if end is None:
            self.positions.view(-1).index_copy_(0, at, ends.int().repeat_interleave(k.shape[1]))
        else:
            self.positions.view(-1).index_fill_(0, at, end)
        if self.columns.shape[2]:
            self.columns.flatten(0, 1).index_fill_(0, at, 0.0)
        lengths += 1
        ends += 1

    def drop(self, rows: tuple[Tensor, Tensor, Tensor], which: Tensor, slots: Tensor | Ring) -> None:
        """One token of some rows: see `drop_token`."""
        drop_token(self._held, rows, which, slots)

    # -- reading ---------------------------------------------------------------------------------------------------

    def reading(self, table: Tensor, lengths: Tensor, chosen: Tensor | None, found: Found) -> Reading:
        """Pages for `attend_pages`, and which are chosen: in parts, whose partial results merge.

        table (R, max_pages), lengths (R,), chosen (R, 1, K) or None for all: as in `attend_pages`. found: what the host
        has found of these tables, as in `Pages`. What a part names may be gone when the next is asked for.
        """
        yield Pages.trusted(self.k, self.v, table, lengths, found), chosen

    def prefetch(self, table: Tensor, lengths: Tensor, chosen: Tensor) -> None:
        """What `reading` may soon be asked for; nothing to do where pages are always at hand."""

    def scores(self, q: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
        """Of the newest query, q (G, H, 1, d), and leading channels of every key of its row: see `score_tokens`."""
        return score_tokens(q, self.k[..., : q.shape[3]], (table, lengths), width, scale)

    def reading_tokens(self, places: Tensor, lengths: Tensor) -> Pages:
        """Single tokens as pages of one: int32 places (R, K) among all tokens of the pool, lengths (R,) of them."""
        k, v = (x.flatten(0, 2)[:, None, None] for x in (self.k, self.v))
        return Pages(k, v, places, lengths)


@dataclass(frozen=True)
class Storage:
    """How the pages of a policy are kept (`Policy.storage`): as they come, on the device."""

    def pool(self, dim: int, value_dim: int, **options: Any) -> PagePool:
        """An empty pool; options: those of `PagePool`."""
        return PagePool(dim, value_dim, **options)
