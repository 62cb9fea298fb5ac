"""Attention whose heads follow different rules that no one call can hold: a call a group of heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saccade.softmax.attend import attend
from saccade.softmax.problem import Bias
from saccade.where import Pattern

Run = tuple[int, int]


def attend_heads(
    q: Tensor, k: Tensor, v: Tensor, groups: Iterable[tuple[Sequence[int], Pattern | None, Bias | None]]
) -> Tensor:
    """Attention of each group of query heads over its own pattern, with its own bias.

        o_h = attend(q_h, k_g, v_g, where, bias)   for the h of a group, g = h // (H // Hkv);   0 for those of none

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv). groups: (heads, where, bias): numbers of
    query heads, ascending, in one group at most; a pattern, `PerHead` of as many or the same for all, or None for every
    key; a bias of as many heads, or None. Heads that follow each other are read where they lie, so that a layout of few
    runs costs one copy of o, and one group of all heads none. Where patterns alone differ, one call with `PerHead` is
    as good or better, unless the plans of some groups want another order of the tokens.

    >>> from saccade.where import Full, Window
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8)
    >>> attend_heads(q, k, v, [([0, 1], Window(2), None), ([3], None, None)])[:, 2].abs().sum()
    tensor(0.)
    """
    num_heads, ratio = q.shape[1], q.shape[1] // k.shape[1]
    pieces: list[tuple[int, Tensor]] = []
    for heads, where, bias in groups:
        if len(heads) == num_heads:
            return attend(q, k, v, where, bias=bias)
        own = runs(heads)
        if all(end % ratio == 0 for run in own for end in run):
            keys = [(first // ratio, end // ratio) for first, end in own]
        else:
            keys = [(h // ratio, h // ratio + 1) for h in heads]
        o = attend(taken(q, own), taken(k, keys), taken(v, keys), where, bias=bias)
        parts = o.split([end - first for first, end in own], 1)
        pieces += [(first, part) for (first, _), part in zip(own, parts, strict=True)]
    seen = {h for first, part in pieces for h in range(first, first + part.shape[1])}
    blind = runs([h for h in range(num_heads) if h not in seen])
    pieces += [(a, q.new_zeros(len(q), b - a, q.shape[2], v.shape[3])) for a, b in blind]
    return torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])], 1)


def runs(heads: Sequence[int]) -> list[Run]:
    """Ascending numbers as intervals.

    >>> runs([0, 1, 4, 6, 7])
    [(0, 2), (4, 5), (6, 8)]
    """
    if not heads:
        return []
    breaks = [(a, b) for a, b in pairwise(heads) if b != a + 1]
    return list(zip([heads[0], *(b for _, b in breaks)], [*(a + 1 for a, _ in breaks), heads[-1] + 1], strict=True))


def taken(x: Tensor, heads: Sequence[Run]) -> Tensor:
    """These heads of x (B, H, ...), in place where they are one run."""
    parts = [x[:, first:end] for first, end in heads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
