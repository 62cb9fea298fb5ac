"""Single tokens in pages, of rows of one key head each, are scored; whole pages by their bounds.

Kernels do it where there are some, else PyTorch; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.softmax.paged import WIDEST, has_kernels


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
