"""Single tokens in pages, of rows of one key head each: written, dropped, scored, found; bounds of whole pages.

Kernels do it where there are some, else PyTorch; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.softmax.paged import WIDEST, has_kernels


def put_token(k: Tensor, v: Tensor, into: tuple[Any, Any, Tensor], rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write one token a row, and its position: k (B, Hkv, 1, D), v (B, Hkv, 1, Dv).

    into: the pages, k (P, 1, page, D), v (P, 1, page, Dv), positions (P, page) int32; of pages in two memories, what
    takes an assignment to [page, 0, offset]. rows: table (B Hkv, pages) int32, lengths (B Hkv,) int32, the place in its
    row, for which the table must have a page; ends (B,), the position. Nothing waits for the device.

    >>> pages, rows = torch.zeros(3, 1, 4, 2), torch.tensor([[2, 0]], dtype=torch.int32)
    >>> at = rows, torch.tensor([5], dtype=torch.int32), torch.tensor([7])
    >>> positions = torch.zeros(3, 4, dtype=torch.int32)
    >>> put_token(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), (pages, pages, positions), at)
    >>> positions[0].tolist(), pages[0, 0, :, 0].tolist()
    ([0, 7, 0, 0], [0.0, 1.0, 0.0, 0.0])
    """
    into_k, into_v, positions = into
    if _plain(into_k, into_v) and has_kernels(into_k.device):
        from saccade.softmax.kernels.page_tokens import launch_put

        launch_put(k, v, into, rows)
        return
    table, lengths, ends = rows
    page = positions.shape[1]
    at = table.gather(1, (lengths // page).long()[:, None])[:, 0].long(), (lengths % page).long()
    for x, new in ((into_k, k), (into_v, v)):
        x[at[0], 0, at[1]] = new.flatten(0, 2).to(x.dtype)
    positions[at] = ends.repeat_interleave(k.shape[1]).int()


def drop_token(
    into: tuple[Any, Any, Tensor, Tensor], rows: tuple[Tensor, Tensor], which: Tensor, slots: Tensor
) -> None:
    """Let the last token of rows `which` (n,) int64 take the places `slots` (n,), and the rows be a token shorter.

    into: the pages, k, v, positions (P, page), columns (P, page, C); rows: table, lengths, which change in place.

    >>> x, lengths = torch.arange(6.0).view(3, 1, 2, 1), torch.tensor([3], dtype=torch.int32)
    >>> places, none = torch.arange(6, dtype=torch.int32).view(3, 2), torch.zeros(3, 2, 0)
    >>> table, row = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([0])
    >>> drop_token((x, x.clone(), places, none), (table, lengths), row, torch.tensor([1]))
    >>> x.flatten().tolist(), lengths.tolist()
    ([0.0, 1.0, 2.0, 3.0, 4.0, 0.0], [2])
    """
    k, v, positions, _ = into
    table, lengths = rows
    which, slots = which.contiguous(), slots.contiguous()
    if _plain(k, v) and has_kernels(positions.device):
        from saccade.softmax.kernels.page_tokens import launch_drop

        launch_drop(into, rows, which, slots)
        return
    page, last = positions.shape[1], lengths[which].long() - 1
    to, source = ((table[which, x // page].long(), x % page) for x in (slots, last))
    for x in (k, v):
        x[to[0], 0, to[1]] = x[source[0], 0, source[1]]
    for x in into[2:]:
        x[to] = x[source]
    lengths.index_add_(0, which, torch.full_like(last, -1, dtype=lengths.dtype))


def score_bounds(q: Tensor, bounds: Tensor) -> Tensor:
    """(B, Hkv, pages): what a page's keys may score at most, for any query of a key head; -inf for pages without keys.

        max over the group of sum_d max(q_d low_d, q_d high_d)

    q (B, H, 1, D). bounds (B, Hkv, pages, 2 D): the least and the largest of each channel, inf and -inf without keys.

    >>> bounds = torch.tensor([[[[-1.0, 0.0, 1.0, 2.0], [torch.inf, torch.inf, -torch.inf, -torch.inf]]]])
    >>> score_bounds(torch.tensor([[[[1.0, 1.0]], [[-3.0, 0.0]]]]), bounds).tolist()
    [[[3.0, -inf]]]
    """
    if has_kernels(q.device) and bounds.dtype != torch.float64:
        from saccade.softmax.kernels.page_tokens import launch_bound

        return launch_bound(q, bounds)
    low, high = bounds[:, :, None].chunk(2, -1)  # (B, Hkv, 1, pages, D)
    exists = (low <= high).all(-1)
    low, high = (x.masked_fill(~exists[..., None], 0) for x in (low, high))
    of_heads = q[:, :, 0].unflatten(1, (bounds.shape[1], -1))[:, :, :, None]
    found = torch.maximum(of_heads * low, of_heads * high).sum(-1).amax(2)
    return found.masked_fill(~exists[:, :, 0], -torch.inf)


def widen_bounds(k: Any, page: int, bounds: Tensor, rows: tuple[Tensor, Tensor], which: Tensor) -> None:
    """Let the bounds (R, pages, 2 D) of the newest page of rows `which` hold its newest key, in place.

    k: the pages of keys, of `page` tokens; rows: table, lengths.

    >>> k, bounds = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), torch.tensor([[[3.0, 3.0]]])
    >>> rows = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    >>> widen_bounds(k, 2, bounds, rows, torch.tensor([0]))
    >>> bounds.tolist()
    [[[3.0, 5.0]]]
    """
    (table, lengths), which = rows, which.contiguous()
    if _plain(k) and has_kernels(bounds.device) and bounds.dtype == k.dtype:
        from saccade.softmax.kernels.page_tokens import launch_widen

        launch_widen(k, bounds, rows, which)
        return
    last = lengths[which].long() - 1
    key = k[table[which, last // page].long(), 0, last % page]
    low, high = bounds[which, last // page].chunk(2, -1)
    bounds[which, last // page] = torch.cat([torch.fmin(low, key), torch.fmax(high, key)], -1)


def _plain(*pages: Any) -> bool:
    """Whether pages lie in one memory, channel by channel."""
    return all(isinstance(x, Tensor) and x.stride(-1) == 1 for x in pages)


def score_tokens(q: Tensor, k: Tensor, rows: tuple[Tensor, Tensor], width: int, scale: float) -> Tensor:
    """Of the newest query and every token of its row, (B, H, width) in at least float32, -inf where there is none.

        s_hj = scale q_h . k_j

    q (B, H, 1, D). k (P, 1, page, D): pages, or their leading channels alone. rows: table (B Hkv, pages), lengths (B
    Hkv,). width: slots of a row, no more than the table has pages for. Cost: the keys once, and nothing of their size.

    >>> k, table = torch.eye(4).view(2, 1, 2, 4), torch.tensor([[1, 0]], dtype=torch.int32)
    >>> q, lengths = torch.arange(4.0).view(1, 1, 1, 4), torch.tensor([3], dtype=torch.int32)
    >>> score_tokens(q, k, (table, lengths), 4, 1.0).tolist()
    [[[2.0, 3.0, 0.0, -inf]]]
    """
    table, lengths = rows
    if k.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[3] <= WIDEST and has_kernels(k.device):
        from saccade.softmax.kernels.page_tokens import launch_score

        return launch_score(q, k, table, lengths, width, scale)
    batch, page = len(q), k.shape[2]
    slot = torch.arange(width, device=k.device)
    keys = k[:, 0][table[:, slot // page].long(), slot % page].unflatten(0, (batch, -1))  # (B, Hkv, width, D)
    dtype = torch.promote_types(q.dtype, torch.float32)
    of_heads = q[:, :, 0].to(dtype).unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bhgd,bhmd->bhgm", of_heads, keys.to(dtype)) * scale
    there = slot < lengths.view(batch, -1, 1, 1)
    return scores.masked_fill(~there, -torch.inf).flatten(1, 2)


def place_tokens(table: Tensor, slots: Tensor, page: int) -> Tensor:
    """Where slots (L, K) lie among all tokens of the pages, int32 (L, K); those below 0 are token 0.

    table (R, pages) int32: L / R lists of a row lie side by side.

    >>> place_tokens(torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([[0, 5, -1], [4, 1, 2]]), 4).tolist()
    [[12, 5, 0], [4, 13, 14]]
    """
    if has_kernels(table.device):
        from saccade.softmax.kernels.page_tokens import launch_place

        return launch_place(table, slots.contiguous(), page)
    at = slots.clamp(min=0)
    pages = table.repeat_interleave(len(slots) // len(table), 0).gather(1, (at // page).long())
    return torch.where(slots < 0, 0, pages * page + (at % page).int()).int()
