"""Pools whose pages lie in two kinds of memory: some as they came, where kernels read them, the others elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.cache.frames import Frames
from saccade.cache.pool import PagePool
from saccade.softmax import Pages, score_tokens


class Column:
    """k or v of a pool whose pages do not lie in one tensor: (P, 1, page, D), read and written as if they did.

    Indices are those that a store uses: pages, (pages, 0, offsets), or, of `flatten(0, 2)`, tokens.
    """

    ndim = 4

    def __init__(self, pool: LayeredPool, name: str) -> None:
        self.pool, self.name = pool, name
        self.shape = torch.Size((pool.num_pages, 1, pool.page, pool.dims[name]))
        self.dtype, self.device = pool.dtype, pool.positions.device

    def new_zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=self.dtype, device=self.device)

    def flatten(self, first: int, last: int) -> Run:
        return Run(self)

    def __getitem__(self, at: Any) -> Tensor:
        if isinstance(at, tuple):
            return self.pool.read(self.name, at[0].long(), at[2].long())
        return self.pool.read(self.name, at[:, None], self._all())[:, None]

    def __setitem__(self, at: Any, values: Any) -> None:
        if isinstance(at, tuple):
            self.pool.write(self.name, at[0].long(), at[2].long(), values)
        else:
            self.pool.write(self.name, at[:, None], self._all(), values[:, 0])

    def _all(self) -> Tensor:
        return torch.arange(self.pool.page, device=self.device)


class Run:
    """A `Column` as a run of tokens: int or bool indices among all tokens of the pool."""

    def __init__(self, column: Column) -> None:
        self.column = column

    def __getitem__(self, at: Tensor) -> Tensor:
        return self.column.pool.read(self.column.name, *self._split(at))

    def __setitem__(self, at: Tensor, values: Any) -> None:
        self.column.pool.write(self.column.name, *self._split(at), values)

    def _split(self, at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.nonzero()[:, 0] if at.dtype == torch.bool else at
        return at // self.column.pool.page, at % self.column.pool.page


class LayeredPool(PagePool):
    """A `PagePool` with two kinds of memory under the numbers of its pages.

    hot: frames of k and v as they came, on the device. cold: frames of a kind that a subclass lays out. hot_at (P,)
    int64: the hot frame of a page, 0 for none; frame 0 is nobody's, so that what is read there by a page that is cold
    counts for nothing. Positions, columns and owners lie under the number of a page, whatever memory it is in.
    """

    hot: Frames
    cold: Frames
    whole = False

    def _laid(self, pages: dict[str, Tensor]) -> dict[str, Tensor]:
        self.hot = Frames(pages)
        self.hot.take(1)
        return {"hot_at": torch.zeros(0, dtype=torch.int64, device=pages["k"].device)}

    @property
    def k(self) -> Any:
        return Column(self, "k")

    @property
    def v(self) -> Any:
        return Column(self, "v")

    @property
    def hot_at(self) -> Tensor:
        return self.frames["hot_at"]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._on_device())

    @property
    def nbytes_in_use(self) -> int:
        return sum(x.nbytes_in_use for x in self._on_device())

    def _on_device(self) -> tuple[Frames, ...]:
        return self.frames, self.hot, self.cold

    def read(self, name: str, page: Tensor, offset: Tensor) -> Tensor:
        """Tokens of k or v: page and offset int64, of shapes that go together."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    def write(self, name: str, page: Tensor, offset: Tensor, values: Any) -> None:
        """Tokens of k or v in pages that were `opened`, or just taken."""
        raise NotImplementedError(f"{type(self).__name__}.write")

    def scores(self, q: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float) -> Tensor:
        at = torch.arange(width, device=table.device)
        keys = self.read("k", table[:, at // self.page].long(), at % self.page)[:, None, :, : q.shape[3]]
        own = torch.arange(len(table), dtype=torch.int32, device=table.device)[:, None]
        return score_tokens(q, keys, (own, lengths), width, scale)  # a page a row

    def reading_tokens(self, places: Tensor, lengths: Tensor) -> Pages:
        page, offset = places // self.page, places % self.page
        k, v = (self.read(name, page, offset).flatten(0, 1)[:, None, None] for name in ("k", "v"))
        table = torch.arange(places.numel(), dtype=torch.int32, device=places.device).view(places.shape)
        return Pages(k, v, table, lengths)
