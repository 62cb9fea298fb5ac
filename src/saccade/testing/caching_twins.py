"""Broken twins that keep in a decoder what they should not, or lose what they should; see `twins`, which lists them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.cache import Evict, KeyNorm, Session, Stored, View
from saccade.contract import Dims
from saccade.testing.healthy import Sliding, Thrifty
from saccade.testing.twins import twin


@twin("kept_keys", "a later step depends on them")
class KeepsMore(Sliding):
    """Reads a key that it says is dropped."""

    def kept(self, num_tokens: int) -> Tensor:
        return super().kept(num_tokens) & (torch.arange(num_tokens) >= num_tokens - self.size + 2)


@twin("kept_keys", "the state holds")
class HoldsAll(Sliding):
    """Masks what it says is dropped, and holds it all the same."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        return super().step(q, k, v)[0], (k, v)


@twin("kept_keys", "are kept again")
class KeepsAgain(Sliding):
    """Says that keys it had dropped have come back."""

    def kept(self, num_tokens: int) -> Tensor:
        return super().kept(num_tokens) | (num_tokens > 3 * self.size)


@twin("kept_keys", "got torch.bool of shape (4, 1)")
class KeptByQueryHead(Sliding):
    """Counts query heads instead of key heads."""

    def kept(self, num_tokens: int) -> Tensor:
        return super().kept(num_tokens).repeat_interleave(self.dims.group, 0)


class Remembering(Evict):
    """Puts dropped values back into the newest one that is held."""

    def after(self, step: Stored) -> None:
        super().after(step)
        store = step.stored
        row = torch.arange(len(store.table))
        last = store.lengths.long() - 1
        store.pool.v[store.table[row, last // self.page].long(), 0, last % self.page] += 1e-6


@twin("held_tokens", "off attention to what is held")
class RemembersDropped(Thrifty):
    """Its steps depend on more than what it holds."""

    def __init__(self, dims: Dims, **params: Any) -> None:
        super().__init__(dims, **params)
        self.policy = Remembering(KeyNorm(), self.budget, recent=self.recent, every=1)


@twin("held_tokens", "memory of tokens that are not held")
class ReadsFreed(Thrifty):
    """Reads a slot behind the end of every row."""

    def read(self, session: Session, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().read(session, q, k, v)
        if q.shape[2] > 1:
            return out
        store = session.store(0)
        behind = store.pool.v.flatten(0, 2)[store._places(store.lengths.long().view(len(q), -1, 1), None)]
        return out + 0 * behind.sum()


@twin("held_bytes", "budget")
class OneMore(Thrifty):
    """Keeps a token more than its budget."""

    def limit(self, prompt: int) -> int | None:
        return (super().limit(prompt) or 0) - 1


class Hoarding(Evict):
    """Has a copy of all that came."""

    def piece(self, view: View) -> Tensor | None:
        self.copy = view.k.clone()
        return super().piece(view)

    def settle(self, session: Session) -> None:
        session.shared["copy"] = self.copy


@twin("held_bytes", "bytes are held")
class HoardsKeys(Thrifty):
    """Drops keys, and keeps a copy of them."""

    def __init__(self, dims: Dims, **params: Any) -> None:
        super().__init__(dims, **params)
        self.policy = Hoarding(KeyNorm(), self.budget, recent=self.recent)


@twin("prompt_in_pieces", "off dense attention")
class ForgetsPieces(Thrifty):
    """Starts again with every piece."""

    def read(self, session: Session, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > 1:
            session.forget(0)
        return super().read(session, q, k, v)


@twin("places_change", "off what they would have given")
class StaysInPlace(Thrifty):
    """Leaves half of a sequence where it was."""

    def session(self) -> Session:
        return Half(self.policy)


class Half(Session):
    """Moves the lengths of rows, and not their tables."""

    def reorder(self, rows: Any, index: int) -> None:
        table = self.store(index).table
        super().reorder(rows, index)
        self.store(index).table = table


class Parity(Evict):
    """Reads the newest page alone at every other step, by a count of the host's, and says that all steps are alike."""

    def select(self, step: Stored) -> Tensor | None:
        newest = (step.stored.lengths.long() - 1) // step.stored.page
        return newest.view(len(step.q), -1, 1) if step.num_seen % 2 else None

    def steady(self, session: Session) -> bool:
        return True


@twin("recorded_steps", "replays")
class CountsOnTheHost(Thrifty):
    """Decides by what a replay does not know."""

    def __init__(self, dims: Dims, **params: Any) -> None:
        super().__init__(dims, **params)
        self.policy = Parity(KeyNorm(), self.budget, recent=self.recent)
