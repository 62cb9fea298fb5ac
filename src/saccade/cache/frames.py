"""Pieces of memory of one size, taken and given back."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

LITTLE = 4  # frames that are moved as one run, on average, where they are moved by runs
SPARE = 32  # what must grow grows by at least 1 / SPARE of its size, so that growing costs O(1) a piece


class Frames:
    """Tensors with one first axis, whose entries are taken and given back together, and which grow together.

    The number of free frames lies on the host, so that taking and releasing wait for nothing; the list of them lies on
    the device of the tensors, or on the host, for those that the host counts (`on_host`).

    tensors: name -> (0, ...). pinned: host memory that a GPU copies from and to by itself.

    >>> frames = Frames({"x": torch.zeros(0, 4)})
    >>> ids = frames.take(3)
    >>> frames.release(ids[:2])
    >>> len(frames), frames.in_use, frames["x"].shape
    (3, 1, torch.Size([3, 4]))
    """

    def __init__(self, tensors: dict[str, Tensor], *, on_host: bool = False, pinned: bool = False) -> None:
        self.tensors, self.pinned = dict(tensors), pinned
        device = torch.device("cpu") if on_host else next(iter(tensors.values())).device
        self.free = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_free = 0
        self.moves = 0  # how often the tensors have become others

    def __len__(self) -> int:
        """Frames that there is memory for."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def in_use(self) -> int:
        return len(self) - self.num_free

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.tensors.values(), self.free))

    @property
    def nbytes_in_use(self) -> int:
        return self.nbytes * self.in_use // max(1, len(self))

    def take(self, count: int) -> Tensor:
        """`count` frames, int64 (count,); what they hold is undefined. New ones are taken in their order, so that what
        is taken one after another may be read as one.
        """
        if count > self.num_free:
            self.grow(max(count - self.num_free, len(self) // SPARE))
        self.num_free -= count
        return self.free[self.num_free : self.num_free + count].flip(0)

    def release(self, ids: Tensor) -> None:
        """Frames in use that are free from now on, each named once."""
        self.free[self.num_free : self.num_free + len(ids)] = ids
        self.num_free += len(ids)

    def grow(self, count: int) -> None:
        """Memory for `count` frames more. One tensor after another, so that the old and the new of only one lie there
        at once; where there is no memory for one, all are as long as before.
        """
        first = len(self)
        self.moves += 1
        try:
            for name in self.tensors:
                self.tensors[name] = self._longer(self.tensors[name], count)
        except (RuntimeError, MemoryError):
            self.tensors = {name: x[:first] for name, x in self.tensors.items()}
            raise
        self.free = torch.cat([self.free, self.free.new_zeros(count)])
        self.release(torch.arange(first + count - 1, first - 1, -1, device=self.free.device))

    def shrink(self, ids: Tensor) -> None:
        """Keep the memory of these frames alone, which are 0, 1, ... from now on, in this order."""
        self.moves += 1
        for name in self.tensors:
            self.tensors[name] = self.tensors[name][ids]
        self.free, self.num_free = self.free.new_zeros(len(ids)), 0

    def spread(self, ids: Tensor, at: Tensor, free: Tensor) -> None:
        """Frames `ids`, all that are in use, lie at `at` from now on, among those that are `free`, the last of which is
        taken first. As in `grow`, one tensor after another, and all as before where there is no memory for one.
        """
        before, runs = len(self), _runs(ids, at)
        self.moves += 1
        done = []
        try:
            for name, x in self.tensors.items():
                self.tensors[name] = _moved(x, runs, len(ids) + len(free))
                done.append(name)
        except (RuntimeError, MemoryError):
            for name in done:
                self.tensors[name] = _moved(self.tensors[name], [(new, old) for old, new in runs], before)
            raise
        self.free, self.num_free = torch.cat([free, free.new_zeros(len(ids))]), len(free)

    def _longer(self, x: Tensor, count: int) -> Tensor:
        if not self.pinned:
            return torch.cat([x, x.new_zeros(count, *x.shape[1:])])
        longer = torch.zeros(len(x) + count, *x.shape[1:], dtype=x.dtype, pin_memory=True)
        longer[: len(x)] = x
        return longer


Where = slice | Tensor


def _runs(ids: Tensor, at: Tensor) -> list[tuple[Where, Where]]:
    """Frames `ids` and where they go, `at`, a part after another: what lies one after another in both, or, where that
    is little, a few frames, so that there is no third copy of all.

    >>> _runs(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 20]), torch.tensor([9, 10, 11, 12, 13, 14, 15, 16, 17]))
    [(slice(0, 8, None), slice(9, 17, None)), (slice(20, 21, None), slice(17, 18, None))]
    """
    here, there = ids.numpy(), at.numpy()
    apart = (here[1:] != here[:-1] + 1) | (there[1:] != there[:-1] + 1)
    cuts = [0, *(apart.nonzero()[0] + 1).tolist(), len(here)]
    if (len(cuts) - 1) * LITTLE > len(here):
        return list(zip(ids.split(SPARE), at.split(SPARE), strict=True))
    return [
        (slice(int(here[a]), int(here[a]) + b - a), slice(int(there[a]), int(there[a]) + b - a))
        for a, b in itertools.pairwise(cuts)
    ]


def _moved(x: Tensor, runs: list[tuple[Where, Where]], size: int) -> Tensor:
    """x (size, ...) where what lay at the first of each pair lies at the second."""
    found = x.new_zeros(size, *x.shape[1:])
    for old, new in runs:
        found[new] = x[old]
    return found
