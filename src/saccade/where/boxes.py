"""Box tables, all that a kernel knows of a pattern: per query row the bounds of its boxes, per key its coordinates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.where.pattern import Box, Span

LEAST, MOST = -(2**31), 2**31 - 1


@dataclass(frozen=True, eq=False)
class Boxes:
    """S unions of at most T boxes over A axes, in the plan's token order.

    coord: (A, M) int32, the coordinates of each key. lo, hi: (S, T, A, N) int32; query i is allowed key j by union s
    when, for some box t, lo[s, t, a, i] <= coord[a, j] < hi[s, t, a, i] on every axis a. An axis that a box leaves free
    spans all integers; a box that a union lacks is empty. A = 0 allows every pair.
    """

    coord: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, unions: Sequence[list[Box]], n: int, m: int, device: torch.device) -> Boxes:
        """The tables of several unions over the same tokens; a union of no boxes allows nothing."""
        axes: dict[Hashable, Tensor] = {}
        for union in unions:
            for box in union:
                axes.update({key: span.coord for key, span in box.items()})
        if not axes and all(unions):
            none = torch.zeros(len(unions), 1, 0, n, dtype=torch.int32, device=device)
            return cls(torch.zeros(0, m, dtype=torch.int32, device=device), none, none)
        if not axes:  # a union of no boxes must miss the keys on some axis
            axes[()] = torch.zeros(m, dtype=torch.int32, device=device)
        num_boxes = max(1, *(len(union) for union in unions))

        def everywhere(lo: int, hi: int) -> Span:
            return Span(*(torch.full((1,), end, dtype=torch.int32, device=device).expand(n) for end in (0, lo, hi)))

        if not all(key in box for union in unions for box in union for key in axes):
            free = dict.fromkeys(axes, everywhere(LEAST, MOST))
            unions = [[free | box for box in union] for union in unions]
        if not all(len(union) == num_boxes for union in unions):
            never = dict.fromkeys(axes, everywhere(0, 0))
            unions = [union + [never] * (num_boxes - len(union)) for union in unions]
        spans = [box[key] for union in unions for box in union for key in axes]
        lo, hi = (torch.stack([getattr(span, end).int() for span in spans]) for end in ("lo", "hi"))
        shape = len(unions), num_boxes, len(axes), n
        return cls(torch.stack(list(axes.values())).int(), lo.view(shape), hi.view(shape))

    @property
    def num_queries(self) -> int:
        return self.lo.shape[3]

    @property
    def num_keys(self) -> int:
        return self.coord.shape[1]

    def allowed(self, union: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Mask of P tiles: union (P,), rows (P, bq), cols (P, bk) -> bool (P, bq, bk).

        Rows and columns beyond the end are False.
        """
        inside = (rows < self.num_queries)[:, :, None] & (cols < self.num_keys)[:, None, :]
        rows, cols = rows.clamp(max=self.num_queries - 1), cols.clamp(max=self.num_keys - 1)
        if not self.coord.shape[0]:
            return inside
        some = torch.zeros_like(inside)
        single = self.lo.shape[0] == 1
        for t in range(self.lo.shape[1]):
            every = inside
            for a in range(self.coord.shape[0]):
                lo = self.lo[0, t, a][rows] if single else self.lo[:, t, a][union[:, None], rows]
                hi = self.hi[0, t, a][rows] if single else self.hi[:, t, a][union[:, None], rows]
                c = self.coord[a][cols][:, None, :]
                every = every & (c >= lo[:, :, None]) & (c < hi[:, :, None])
            some = some | every
        return some
