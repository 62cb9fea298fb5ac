"""Ragged rows: where their entries lie, what the host sends of them, and how they are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every entry of a ragged array, one row after another; counts: (R,), on the host."""
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    starts = counts.cumsum(0) - counts
    return row, torch.arange(len(row)) - starts[row]


def sent(x: Tensor, like: Tensor) -> Tensor:
    """A copy of the host's on the device of another; the host goes on (what is not pinned is copied before it does)."""
    return x.to(like.device, non_blocking=True, copy=True)


def of_rows(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """What x (B, ...) of all sequences says of some, None for all: (G, ...); waits for no device.

    >>> of_rows(torch.tensor([4, 5, 6]), (2, 0)).tolist()
    [6, 4]
    """
    return x if rows is None else x[sent(torch.tensor(list(rows)), x)]


def flat(x: Tensor) -> Tensor:
    """k or v (P, 1, page, D), or anything (P, page, ...), as a run of tokens: a view of the same memory."""
    return x.flatten(0, 2 if x.ndim == 4 else 1)


class Counted:
    """A tensor of a store that grows by 1 a step, in place where it is a device's; steps of a `Lane` are counted
    together, once somebody asks.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name  # a descriptor comes before what lies under its name

    def __get__(self, store: Any, owner: type | None = None) -> Tensor:
        if store.ahead:
            store.catch_up()
        found: Tensor = vars(store)[self.name]
        return found

    def __set__(self, store: Any, value: Tensor) -> None:
        if store.ahead:
            store.catch_up()
        vars(store)[self.name] = value
