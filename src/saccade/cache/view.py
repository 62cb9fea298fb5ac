"""What a policy decides from: a layer's tokens in order, the queries that just came, and the attention between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saccade.cache.rotation import Rotation
from saccade.cache.rows import flat, of_rows, sent
from saccade.cache.store import ABSENT, Store, Tokens

BLOCK = 128  # queries whose weights are held at once


def usual(q: Tensor, scale: float | None) -> Tensor:
    """q (..., D) for attention that knows the usual scale alone: q / sqrt(D) is then what q times `scale` is.

    >>> usual(torch.ones(4), 1.0).tolist(), usual(torch.ones(4), None).tolist()
    ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    """
    plain = q.shape[-1] ** -0.5
    return q if scale in (None, plain) else q * (scale / plain)


def widened(x: Tensor, width: int) -> Tensor:
    """Lists of slots, pages or labels x (..., K), with -1 behind, for none, up to (..., width).

    >>> widened(torch.tensor([[3, 5]]), 4).tolist()
    [[3, 5, -1, -1]]
    """
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)


def attention_at(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Causal attention of the queries at positions at (n,), rows of sum 1: (B, Hkv, H / Hkv, n, N), at least float32.

    q (B, H, N, D), k (B, Hkv, N, D), of the same tokens. Costs n N D a query head.

    >>> attention_at(torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.tensor([8, 2])).shape
    torch.Size([1, 2, 2, 2, 9])
    """
    rows = q[:, :, at].unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhgnd,bhmd->bhgnm", rows, k) / q.shape[3] ** 0.5
    later = torch.arange(k.shape[2], device=k.device) > at[:, None]
    return scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(later, -torch.inf).softmax(-1)


@dataclass  # not frozen, which costs more to make, and one is made at every step
class Place:
    """Where in a session a view is taken: layer `index` of `num_layers`, sequences `rows`, None for all; scale of the
    scores, None for D**-0.5; what the layers share; steps since the last piece, None where the sequences differ in
    that; the store of the next layer, None where there is none or it has read nothing; how the host turns q and k.
    """

    index: int = 0
    num_layers: int = 1
    rows: Sequence[int] | None = None
    scale: float | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    steps: int | None = 0
    later: Store | None = None
    rotation: Rotation | None = None


class View:
    """Tokens of G sequences in one layer, padded to the longest row, in the order of their positions.

    q (G, H, N, D): the queries that just came, those of the last N tokens seen. k (G, Hkv, M, D), v (G, Hkv, M, Dv).
    positions (G, Hkv, M) int64; there (G, Hkv, M) bool: False is padding, which counts for nothing. columns (G, Hkv, M,
    C): the policy's own numbers, which it changes in place. counts (G, Hkv), seen (G,): tokens held and seen, on the
    host. scale: of the scores. rows: which sequences of the batch these are, or None for all. index: the layer, of
    `num_layers`. shared: the session's, with `token_ids` (B, most seen) where they are known, -1 behind an end. steps:
    since the last piece. rotation: by which q and k were turned, None where the host turns none or it is not known.
    """

    def __init__(self, store: Store, place: Place, q: Tensor, k: Tensor, v: Tensor, columns: int = 0) -> None:
        self._begin(store, place, q)
        self.k, self.v = k, v
        (batch, kv_heads, n), device = k.shape[:3], k.device
        self.positions = torch.arange(n, device=device).expand(batch, kv_heads, n)
        self.there = torch.ones(batch, kv_heads, n, dtype=torch.bool, device=device)
        self.columns = torch.zeros(batch, kv_heads, n, columns, device=device)
        self.counts, self.seen = torch.full((batch, kv_heads), n), torch.full((batch,), n)

    def _begin(self, store: Store, place: Place, q: Tensor) -> None:
        self._store, self.q, self.rows, self.index = store, q, place.rows, place.index
        self.num_layers, self.shared, self._steps = place.num_layers, place.shared, place.steps
        self.later, self.rotation = place.later, place.rotation
        self.scale = q.shape[3] ** -0.5 if place.scale is None else place.scale

    @property
    def stored(self) -> Store:
        """The store. Errors: ValueError while the tokens are the first of a prompt, which are not stored yet."""
        raise ValueError(
            "view: its tokens are not stored yet; `piece` says which of them will be, `note` keeps numbers"
        )

    @property
    def steps(self) -> int:
        """Steps since the last piece. Errors: ValueError for sequences that differ in that."""
        if self._steps is None:
            raise ValueError(
                "steps: the sequences of this batch are not equally many steps behind their pieces; say `periodic = "
                "True` in the policy, and they are decoded apart"
            )
        return self._steps

    def note(self, name: str, value: Tensor, fill: float = 0) -> None:
        """Keep value (G, ...) with these sequences; see `Store.note`."""
        self._store.note(name, value, self.rows, fill)

    def notes(self, name: str) -> Tensor:
        """What was noted of these sequences, (G, ...)."""
        return self.mine(self._store.notes[name])

    def mine(self, x: Tensor) -> Tensor:
        """What x (B, ...) of all sequences says of these, (G, ...); waits for no device."""
        return of_rows(x, self.rows)

    def by_seen(self, count: Callable[[int], Any]) -> Tensor:
        """count(tokens seen), a number or a list of them, of each sequence: (G, ...), on the host."""
        return torch.tensor([count(seen) for seen in self.seen.tolist()])

    def pass_on(self, name: str, value: Tensor, fill: float = 0) -> None:
        """Let the next layer find value (G, ...) of these sequences in its notes, where there is one."""
        if self.later is not None:
            self.later.note(name, value, self.rows, fill)

    @property
    def num_seen(self) -> int:
        """Tokens that the longest of the sequences has had."""
        return int(self.seen.max())

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.q.shape[1] // self.there.shape[1]

    @cached_property
    def ends(self) -> Tensor:
        """seen (G,) on the device."""
        return sent(self.seen, self.q)

    @cached_property
    def at(self) -> Tensor:
        """Positions (G, N) of the queries, on the device."""
        n = self.q.shape[2]
        return self.ends[:, None] - n + torch.arange(n, device=self.q.device)

    @cached_property
    def ids(self) -> Tensor | None:
        """Ids of the tokens (G, Hkv, M) int64, -1 for padding; None where they are not known."""
        told = self.shared.get("token_ids")
        if told is None:
            return None
        told = self.mine(told)
        at = self.positions.clamp(max=told.shape[1] - 1)
        return told[:, None].expand(*at.shape[:2], -1).gather(2, at).masked_fill(~self.there, -1)

    def grouped(self, x: Tensor) -> Tensor:
        """The query heads of each key head on an axis of their own: (G, H, ...) -> (G, Hkv, H / Hkv, ...)."""
        return x.unflatten(1, (-1, self.group))

    def pooled(self, x: Tensor) -> Tensor:
        """Mean over the query heads of each key head: (G, H, ...) -> (G, Hkv, ...)."""
        return self.grouped(x).mean(2)

    def weights(self, last: int | None = None, where: Tensor | None = None) -> Tensor:
        """Attention of the last `last` queries (default: all N): (G, H, last, M), rows sum to 1.

        where: bool (G, H, M), or one broadcast to it, the only tokens that are met (default: all that are there).
        """
        return torch.cat(list(self.blocks(last, where)), 2)

    def received(self, last: int | None = None) -> Tensor:
        """Attention that each token gets, summed over the last `last` queries (default: all N): (G, H, M).

        Made a block of queries at a time: O(M) memory.
        """
        total: Tensor | None = None
        for block in self.blocks(last):
            total = block.sum(2) if total is None else total + block.sum(2)
        if total is None:
            raise ValueError(f"last: got {last}; pass a positive number of queries")
        return total

    @torch.no_grad()
    def blocks(self, last: int | None = None, where: Tensor | None = None) -> Iterator[Tensor]:
        """`weights`, a block of queries after another: (G, H, some, M)."""
        q = self.q if last is None else self.q[:, :, -last:]
        dtype = torch.promote_types(q.dtype, torch.float32)
        k = self.k.to(dtype).masked_fill(~self.there[..., None], 0)
        at = self.at[:, self.q.shape[2] - q.shape[2] :]
        for part, own in zip(q.split(BLOCK, 2), at.split(BLOCK, 1), strict=True):
            rows = self.grouped(part.to(dtype))
            scores = torch.einsum("bhgnd,bhmd->bhgnm", rows, k) * self.scale
            seen = self.there[:, :, None] & (self.positions[:, :, None] <= own[:, None, :, None])
            scores = scores.masked_fill(~seen[:, :, None], -torch.inf).flatten(1, 2)
            if where is not None:
                scores = scores.masked_fill(~where[:, :, None], -torch.inf)
            yield scores.softmax(-1).nan_to_num(0)


class Stored(View):
    """A view of a store. What it shows is read when it is asked for; after the store has changed, make another.

    chosen: what a step reads, once its policy has said so. later: the store of the next layer, None in the last one.
    """

    chosen: Tensor | Tokens | None = None

    def __init__(self, store: Store, place: Place, q: Tensor) -> None:
        self._begin(store, place, q)

    @property
    def stored(self) -> Store:
        return self._store

    @cached_property
    def counts(self) -> Tensor:  # type: ignore[override]
        return self.mine(self.stored.counts)

    @cached_property
    def seen(self) -> Tensor:  # type: ignore[override]
        return self.mine(self.stored.seen)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.stored.ordered(self.rows)

    @cached_property
    def _places(self) -> Tensor:
        return self.stored._places(self.slots, self.rows)

    def _read(self, x: Tensor) -> Tensor:
        return flat(x)[self._places]

    @property
    def slots(self) -> Tensor:
        """Where the tokens lie in their rows, (G, Hkv, M)."""
        return self._order[0]

    @cached_property
    def there(self) -> Tensor:  # type: ignore[override]
        return self._order[1]

    def only(self, marked: Tensor | None = None) -> Tensor:
        """Slots (G, Hkv, M) of the tokens that are marked, bool (G, Hkv, M), or of all; -1 elsewhere."""
        return self.slots.masked_fill(~(self.there if marked is None else self.there & marked), -1)

    @cached_property
    def ends(self) -> Tensor:
        return self.mine(self.stored.ends)

    @cached_property
    def lengths(self) -> Tensor:
        """counts (G, Hkv) on the device."""
        return self.mine(self.stored.lengths.view(self.stored.counts.shape))

    @cached_property
    def positions(self) -> Tensor:  # type: ignore[override]
        at = self._order[2]
        if at is None:
            at = self._read(self.stored.pool.positions).masked_fill(~self.there, ABSENT)
        return at.long()

    @cached_property
    def k(self) -> Tensor:  # type: ignore[override]
        return self._read(self.stored.pool.k)

    @cached_property
    def v(self) -> Tensor:  # type: ignore[override]
        return self._read(self.stored.pool.v)

    @cached_property
    def columns(self) -> Tensor:  # type: ignore[override]
        return self._read(self.stored.pool.columns)

    @property
    def horizon(self) -> int:
        """Tokens that the longest sequence will have seen once the pages are used up that were reserved; without such,
        those that it has seen. What a step's shapes go by, so that those of the next steps are the same.
        """
        return max(self.num_seen, self.stored.until)

    @torch.no_grad()
    def scores(self, leading: int | None = None) -> Tensor:
        """Of the newest query and each token, before the softmax: (G, H, M), at least float32, -inf for no token.

        leading: by so many channels alone.
        """
        found = self.stored.scores(self.q[:, :, -1:, :leading], self.scale, self.rows)
        return found if self.stored.sorted else found.gather(2, self.slots.repeat_interleave(self.group, 1))

    def put_columns(self) -> None:
        """Write the columns back."""
        self.stored.put_columns(self.columns, *self._order[:2], self.rows)
