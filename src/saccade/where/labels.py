"""A pattern whose coordinate is data: integers that the user gives, one a token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.where.layout import ByLabel, Order
from saccade.where.pattern import Box, Frame, Pattern, Span, all_tiles, check_ends, extremes, interval_tiles, sent

BEYOND = 2**31 - 1  # no label is as large


@dataclass(frozen=True, repr=False)
class Labels(Pattern):
    """Tokens carry integers, and a query sees the labels near its own: l_i - left <= l_j <= l_i + right.

    Labels may be scales, frames, segments, levels, speakers, distances. Equal ones see each other by default;
    `Labels(l, left=None)` sees its own and all smaller ones, `Labels(l, left=None, right=-1)` smaller ones alone. A
    token labelled -1 neither sees nor is seen: a union of several `Labels` is a hierarchy whose levels hold some tokens
    each. Where labels do not ascend, plans sort the tokens by them when that leaves fewer tiles.

    labels: of the M keys, a tensor or a sequence of integers >= -1. left, right: as in `Band`; None for all there are.
    queries: labels of the queries, when these are other tokens, or labelled otherwise than the keys (default: the keys'
    own); the queries are its last N. Labels are kept on the host, and sent to where a plan is made.

    >>> Labels([0, 0, 1, -1, 1]).dense(5)[0].int().tolist()
    [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]
    >>> Labels([0, 1, 2], queries=[0, 0, 1, 1, 2, 2], left=None, right=-1).dense(6, 3)[0].int().tolist()
    [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """

    # Bytes of int32: a million of them are compared and hashed in no time.
    keys: bytes
    queries: bytes | None
    left: int | None
    right: int | None

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        left: int | None = 0,
        right: int | None = 0,
        *,
        queries: Tensor | Sequence[int] | None = None,
    ) -> None:
        check_ends(left, right)
        object.__setattr__(self, "keys", _packed("labels", labels))
        object.__setattr__(self, "queries", None if queries is None else _packed("queries", queries))
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    def __repr__(self) -> str:
        of_queries = "" if self.queries is None else f", queries=<{len(self.queries) // 4}>"
        return f"Labels(<{len(self.keys) // 4}>, {self.left}, {self.right}{of_queries})"

    @property
    def aligned(self) -> bool:
        return self.queries is None

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """Labels of the queries and of the keys, int32."""
        keys = torch.frombuffer(bytearray(self.keys), dtype=torch.int32)
        return keys if self.queries is None else torch.frombuffer(bytearray(self.queries), dtype=torch.int32), keys

    def _of_queries(self, positions: Tensor, num_keys: int) -> Tensor:
        """The labels of queries at positions among `num_keys`."""
        queries, keys = self._tables
        if num_keys != len(keys):
            raise ValueError(f"labels: got {len(keys)} of them for {num_keys} keys; pass one a key")
        first = num_keys - len(queries)
        if positions.device.type == "cpu" and positions.numel() and int(positions.min()) < first:
            raise ValueError(f"queries: got {len(queries)} labels for more queries than that; pass one a query")
        return sent(queries, positions.device)[(positions - first).long()]

    def bounds(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest label that queries of these labels see, and the smallest after the largest."""
        label = label.long()
        lo = torch.zeros_like(label) if self.left is None else (label - self.left).clamp(0, BEYOND)
        hi = torch.full_like(label, BEYOND) if self.right is None else (label + self.right + 1).clamp(0, BEYOND)
        return torch.where(label < 0, BEYOND, lo).int(), torch.where(label < 0, 0, hi).int()

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        label, other = self._of_queries(i, num_keys), self._tables[1].to(j.device)[j.long()]
        some = (label >= 0) & (other >= 0)
        if self.left is not None:
            some = some & (other.long() >= label.long() - self.left)
        return some if self.right is None else some & (other.long() <= label.long() + self.right)

    def boxes(self, frame: Frame) -> list[Box]:
        lo, hi = self.bounds(self._of_queries(frame.queries, frame.num_keys))
        coord = sent(self._tables[1], frame.keys.device)[frame.keys.long()]
        return [{("label", self.keys, frame.tag): Span(coord, lo, hi)}]

    @property
    def _order(self) -> ByLabel:
        return ByLabel(self.keys, self.queries or self.keys)

    def orders(self, num_keys: int) -> tuple[Order, ...]:
        return () if all(bool((side.diff() >= 0).all()) for side in self._tables) else (self._order,)

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        queries, keys = self._tables
        queries = queries[-n:]
        if order is not None and order == self._order:
            queries, keys = queries.sort().values, keys.sort().values
        elif order is not None or bool((keys.diff() < 0).any()):
            return all_tiles(n, m, block)
        lo, hi = self.bounds(queries)
        first, end = extremes(lo, block[0], "amin"), extremes(hi, block[0], "amax")
        return interval_tiles(torch.searchsorted(keys, first), torch.searchsorted(keys, end), m, block[1])


def _packed(name: str, labels: Any) -> bytes:
    if not isinstance(labels, Tensor):
        labels = torch.tensor(list(labels))
    if labels.ndim != 1 or not labels.numel() or labels.is_floating_point() or labels.dtype == torch.bool:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"{name}: got {got}; pass one integer a token, a tensor or a sequence of them")
    least, most = int(labels.min()), int(labels.max())
    if least < -1 or most >= BEYOND:
        raise ValueError(f"{name}: got {least if least < -1 else most}; pass integers >= -1, where -1 is no label")
    return labels.to("cpu", torch.int32).numpy().tobytes()
