"""What a step does to the pages of rows of one key head each: a token is written and counted, one is dropped, chosen
ones are found.

A kernel does each in one launch where there are some, else PyTorch; nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.softmax.page_rows import recorded
from saccade.softmax.paged import has_kernels

Held = tuple[Any, Any, Tensor, Tensor]
"""Pages: k (P, 1, page, D), v (P, 1, page, Dv), positions (P, page) int32, columns (P, page, C); of pages in two
memories, k and v are what takes an assignment to [page, 0, offset].
"""


@dataclass(frozen=True, eq=False)
class Ring:
    """Slots that are taken in turns, one a step: first + (ends - begun) mod size, of each sequence and all its rows.

    begun: (G,) int64, tokens seen when the first of them is taken.
    """

    first: int
    size: int
    begun: Tensor

    def at(self, ends: Tensor) -> Tensor:
        """The slot that is next after `ends` (G,) tokens: (G,).

        >>> Ring(2, 3, torch.tensor([7])).at(torch.tensor([11])).tolist()
        [3]
        """
        return (ends - self.begun).remainder_(self.size).add_(self.first)


def put_token(k: Tensor, v: Tensor, into: Held, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write one token a row, its position, and zeros into its columns, and count it: k (B, Hkv, 1, D), v (B, Hkv, 1,
    Dv).

    rows: table (B Hkv, pages) int32, which must have a page for it; lengths (B Hkv,) int32, its slot, and ends (B,)
    int64, its position, both of which grow by 1 in place.

    >>> pages, positions, none = torch.zeros(3, 1, 4, 2), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 4, 0)
    >>> lengths, ends = torch.tensor([5], dtype=torch.int32), torch.tensor([7])
    >>> rows = torch.tensor([[2, 0]], dtype=torch.int32), lengths, ends
    >>> put_token(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), (pages, pages, positions, none), rows)
    >>> positions[0].tolist(), pages[0, 0, :, 0].tolist(), lengths.tolist(), ends.tolist()
    ([0, 7, 0, 0], [0.0, 1.0, 0.0, 0.0], [6], [8])
    """
    (into_k, into_v, positions, columns), (table, lengths, ends) = into, rows
    if _run_there(into):
        from saccade.cache.kernels.steps import launch_put

        launch_put(k, v, into, rows)
        return
    page = positions.shape[1]
    at = table.gather(1, (lengths // page).long()[:, None])[:, 0].long(), (lengths % page).long()
    for x, new in ((into_k, k), (into_v, v)):
        x[at[0], 0, at[1]] = new.flatten(0, 2).to(x.dtype)
    positions[at] = ends.repeat_interleave(k.shape[1]).int()
    if columns.shape[2]:
        columns.flatten(0, 1).index_fill_(0, at[0] * page + at[1], 0.0)
    lengths += 1
    ends += 1


def drop_token(into: Held, rows: tuple[Tensor, Tensor, Tensor], which: Tensor, slots: Tensor | Ring) -> None:
    """Let the last token of rows `which` (n,) int64 take the places `slots` (n,), and the rows be a token shorter.

    rows: table, lengths, which change in place, and ends (B,). slots: int64, or `Ring` of all B sequences.

    >>> x, lengths = torch.arange(6.0).view(3, 1, 2, 1), torch.tensor([3], dtype=torch.int32)
    >>> places, none = torch.arange(6, dtype=torch.int32).view(3, 2), torch.zeros(3, 2, 0)
    >>> rows = torch.tensor([[2, 0]], dtype=torch.int32), lengths, torch.tensor([8])
    >>> drop_token((x, x.clone(), places, none), rows, torch.tensor([0]), torch.tensor([1]))
    >>> x.flatten().tolist(), lengths.tolist()
    ([0.0, 1.0, 2.0, 3.0, 4.0, 0.0], [2])
    """
    if _run_there(into):
        from saccade.cache.kernels.steps import launch_drop

        launch_drop(into, rows, which.contiguous(), slots)
        return
    (k, v, positions, _), (table, lengths, ends) = into, rows
    if isinstance(slots, Ring):
        slots = slots.at(ends)[which // (len(table) // len(ends))]
    page, last = positions.shape[1], lengths[which] - 1
    to, source = ((table[which, x // page].long(), x % page) for x in (slots, last))
    for x in (k, v):
        x[to[0], 0, to[1]] = x[source[0], 0, source[1]]
    for x in into[2:]:
        if x.numel():
            x[to] = x[source]
    lengths[which] = last


def find_tokens(table: Tensor, slots: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chosen tokens as pages of one: (places (G L, K), lengths (G L,), listed (G L, 1, K)), int32.

    table (G Hkv, pages) int32; slots int (G, L, K), L / Hkv lists for each key head, -1 for none. places: where among
    all tokens of the pages each lies, that of slot 0 where there is none. lengths: K. listed: which of the K are there,
    -1 for the others; None for all, where the host sees that.

    >>> places, lengths, listed = find_tokens(torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([[[6, -1]]]), 4)
    >>> places.tolist(), lengths.tolist(), listed.tolist()
    ([[6, 12]], [2], [[[0, -1]]])
    """
    if has_kernels(table.device):
        from saccade.cache.kernels.steps import launch_find

        return launch_find(table, slots, page)
    batch, lists, count = slots.shape
    each, at = batch * lists // len(table), slots.reshape(batch * lists, count)
    own = table if each == 1 else table.repeat_interleave(each, 0)
    whole = count > 0 and at.is_cpu and not recorded() and int(at.min()) >= 0
    first = at if whole else at.clamp(min=0)
    places = own.gather(1, (first // page).long()).mul_(page).add_(first % page)
    lengths = torch.full((batch * lists,), count, dtype=torch.int32, device=table.device)
    if whole:
        return places, lengths, None
    place = torch.arange(count, dtype=torch.int32, device=table.device)
    return places, lengths, torch.where(at >= 0, place, -1)[:, None]


def tokens_read(ends: Tensor, budget: float | int, unit: int = 1) -> Tensor:
    """How many units of `unit` tokens a budget reads of `ends` (G,) tokens, at least 1: (G,) int64.

    budget: a number of tokens, in whole units, or a part of those seen, rounded up.

    >>> tokens_read(torch.tensor([100, 30]), 0.3, 4).tolist(), tokens_read(torch.tensor([100, 30]), 22, 4).tolist()
    ([8, 3], [5, 5])
    """
    if isinstance(budget, int):
        return torch.full_like(ends, max(1, budget // unit))
    # In float64, as Python has it: a part of a length must not become a token more by rounding.
    return (ends.double() * budget / unit).ceil().long().clamp(min=1)


def best_found(values: Tensor, indices: Tensor, ends: Tensor, budget: float | int, unit: int = 1) -> Tensor:
    """Of candidates in falling order, those that are read: their indices, int64 (G, ..., K), and -1 behind them.

    values (G, ..., K): -inf where there is no candidate; indices int64 (G, ..., K). ends, budget, unit: as in
    `tokens_read`; K is no more than a number of tokens holds, so that only a part is counted.

    >>> values, indices = torch.tensor([[3.0, 1.0, -torch.inf]] * 2), torch.tensor([[5, 2, 0]] * 2)
    >>> [best_found(values, indices, torch.tensor([5, 9]), budget).tolist() for budget in (0.2, 3)]
    [[[5, -1, -1], [5, 2, -1]], [[5, 2, -1], [5, 2, -1]]]
    """
    if has_kernels(values.device):
        from saccade.cache.kernels.steps import launch_best

        return launch_best(values, indices, ends, budget, unit)
    kept = values > -torch.inf
    if not isinstance(budget, int):
        count = tokens_read(ends, budget, unit).view(-1, *[1] * (values.ndim - 1))
        kept &= torch.arange(values.shape[-1], device=values.device) < count
    return indices.masked_fill(~kept, -1)


def raise_newest(scores: Tensor, lengths: Tensor, page: int) -> None:
    """The newest page of each row is the best, in place: scores (G, Hkv, pages), lengths (G, Hkv).

    >>> scores = torch.zeros(1, 1, 3)
    >>> raise_newest(scores, torch.tensor([[5]]), 4)
    >>> scores.tolist()
    [[[0.0, inf, 0.0]]]
    """
    if has_kernels(scores.device):
        from saccade.cache.kernels.steps import launch_raise

        launch_raise(scores, lengths, page)
        return
    scores.scatter_(2, ((lengths.long() - 1) // page)[..., None], torch.inf)


def _run_there(into: Held) -> bool:
    """Whether kernels write these pages: those in one memory."""
    return isinstance(into[0], Tensor) and has_kernels(into[2].device)
