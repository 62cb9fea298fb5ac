"""A policy at work on one batch of sequences: the stores of its layers, pieces and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache.policy import Policy
from saccade.cache.pool import PagePool
from saccade.cache.rotation import Rotation
from saccade.cache.rows import of_rows, sent
from saccade.cache.store import Store
from saccade.cache.view import Place, Stored, View

MOST = 64  # steps whose ids wait to be joined to those before them, which costs a copy of all


class Session:
    """The stores of `num_layers` layers that share a policy, for one batch.

    `attend(index, q, k, v)` takes the next tokens of layer `index`, layers in order: the first call, and each of
    several tokens, is a piece; one token after it is a step. Costs: a piece its dense attention, and what the policy
    makes of it; a step what it reads. Steps of uniform budgets wait for no device.

    policy: see `Policy`. num_layers: that share it (1). pools: where the pages of several sessions lie, one pool for
    each kind of page; it is filled as they read (default: a pool a layer, of this session alone). rotations: how the
    host turns q and k of a layer by their positions, by its index (default: of none is it known). shared: tensors of
    the policy that are of no one layer, the batch their first axis; steps: how many there were since the last piece,
    None where the sequences differ in that. Errors: ValueError for a batch of another size than before.

    >>> session, (q, k) = Session(Policy()), torch.randn(2, 1, 4, 9, 8)
    >>> torch.cat([session.attend(0, q[:, :, a:b], k[:, :, a:b], k[:, :, a:b]) for a, b in ((0, 8), (8, 9))], 2).shape
    torch.Size([1, 4, 9, 8])
    """

    def __init__(
        self,
        policy: Policy,
        num_layers: int = 1,
        pools: dict[Any, PagePool] | None = None,
        *,
        rotations: Mapping[int, Rotation] | None = None,
    ) -> None:
        self.policy, self.num_layers, self.pools, self.rotations = policy, num_layers, pools, rotations or {}
        self.stores: list[Store | None] = [None] * num_layers
        self._shared: dict[str, Tensor] = {}
        self._told: list[Tensor] = []  # ids of steps, behind those that are shared
        self.steps: int | None = 0
        self._piece = self._idle = False

    @property
    def shared(self) -> dict[str, Tensor]:
        if self._told:
            self._join_told()
        return self._shared

    @shared.setter
    def shared(self, shared: dict[str, Tensor]) -> None:
        self._shared, self._told = shared, []

    def _join_told(self) -> None:
        self._shared["token_ids"] = torch.cat([self._shared["token_ids"], *self._told], 1)
        self._told = []

    def store(self, index: int) -> Store:
        """Of a layer that has been read."""
        store = self.stores[index]
        if store is None:
            raise ValueError(f"index: layer {index} has read nothing yet")
        return store

    def view(self, index: int) -> Stored:
        """All that a layer holds, without queries."""
        store = self.store(index)
        none = store.pool.k.new_zeros(store.batch, store.kv_heads, 0, store.pool.k.shape[3])
        return Stored(store, self._place(index, None, None), none)

    def _place(self, index: int, scale: float | None, rows: Sequence[int] | None) -> Place:
        later = self.stores[index + 1] if index + 1 < self.num_layers else None
        return Place(index, self.num_layers, rows, scale, self.shared, self.steps, later, self.rotations.get(index))

    def tell(self, ids: Tensor, rows: Sequence[int] | None = None, batch: int | None = None) -> None:
        """Ids (G, N) of the tokens that layer 0 reads next; policies find those of theirs in `View.ids`."""
        store, batch = self.stores[0], len(ids) if batch is None else batch
        told = self._shared.get("token_ids")
        whole = None if store is None or store.until or rows is not None else store.end
        if told is not None and told.shape[1] + len(self._told) == whole:  # none is padded
            self._told.append(ids.clone())  # whose they are may write over them
            if ids.shape[1] > 1 or len(self._told) == MOST:
                self._join_told()
            return
        told = self.shared.get("token_ids")
        told = ids.new_full((batch, 0), -1) if told is None else told
        if store is not None and rows is None and ids.shape[1] == 1 and store.reserved and told.shape[1] >= store.until:
            told.scatter_(1, store.ends[:, None], ids)
            return
        row = torch.arange(batch, device=ids.device) if rows is None else sent(torch.tensor(list(rows)), ids)
        first, width = row.new_zeros(len(row)), ids.shape[1]
        if store is not None:
            seen = of_rows(store.seen, rows)
            first, width = store.ends[row], max(int(seen.max()) + width, store.until)
        if told.shape[1] < width:
            told = torch.nn.functional.pad(told, (0, width - told.shape[1]), value=-1)
        at = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self.shared["token_ids"] = told.index_put_((row[:, None], at), ids)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        stores = {id(s.pool): s.nbytes for s in self.stores if s is not None}
        return sum(stores.values()) + sum(x.nbytes for x in self.shared.values())

    @property
    def nbytes_in_use(self) -> int:
        """Bytes allocated but for free pages."""
        pools = {id(s.pool): s.pool for s in self.stores if s is not None}
        return self.nbytes - sum(pool.nbytes - pool.nbytes_in_use for pool in pools.values())

    def forget(self, index: int) -> None:
        """A layer has read nothing."""
        self.stores[index] = None
        self.shared = {}

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """o (B, H, N, Dv) of the next N tokens of a layer, q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv)."""
        self.open(index)
        o = self.read(index, q, k, v, scale=scale)
        self.close(index)
        return o

    def open(self, index: int) -> None:
        """Before a layer reads."""
        if index == 0:
            self._piece, self._idle = False, self.policy.idle
            self.policy.begin(self)

    def read(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        rows: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """`attend` for the sequences `rows` of a batch of `batch`, between `open` and `close`."""
        scale = q.shape[3] ** -0.5 if scale is None else scale  # whatever a policy makes of q
        store = self.stores[index]
        if store is None:
            _, *stored = self.policy.project(index, *(x[:, :, :0] for x in (q, k, v)))  # may be of another width
            store = self.stores[index] = Store(len(k) if batch is None else batch, k.shape[1], self._pool(*stored))
        if len(k) != (store.batch if rows is None else len(rows)):
            raise ValueError(f"k: got a batch of {len(k)}; this session holds {store.batch} sequences")
        if q.shape[2] == 1 and (store.begun if rows is None else all(store.seen[list(rows)].tolist())):
            return self._step(store, index, q, k, v, scale, rows)
        seen = of_rows(store.seen, rows)
        self._piece = True
        if int(seen.max()):
            return self._more(store, index, q, k, v, scale, rows)
        return self._first(store, index, q, k, v, scale, rows)

    def close(self, index: int) -> None:
        """After a layer has read."""
        if index < self.num_layers - 1:
            return
        if self._piece:
            self.steps = 0
            self.policy.settle(self)
        elif self.steps is not None:
            self.steps += 1

    def reorder(self, rows: Sequence[int], index: int) -> None:
        """A layer's sequence i goes on from what sequence rows[i] was."""
        self.store(index).reorder(rows)
        if index == 0:
            self.shared = {name: of_rows(x, rows) for name, x in self.shared.items()}

    def held(self, index: int = 0) -> Tensor:
        """bool (B, Hkv, seen): the tokens that a layer holds."""
        return self.store(index).held()

    def select(self, rows: Sequence[int]) -> None:
        """In every layer sequence i goes on from what sequence rows[i] was; what is not named gives its pages back."""
        for index in reversed(range(self.num_layers)):
            self.reorder(rows, index)

    @property
    def steady(self) -> bool:
        """Whether steps from now on tell a device the same again and again: see `Policy.steady`."""
        stores = [store for store in self.stores if store is not None and int(store.seen.min())]
        return len(stores) == self.num_layers and self.policy.steady(self)

    @property
    def moves(self) -> int:
        """A number that grows with all that the host changes, and with memory that moves."""
        return sum(store.moves + store.pool.frames.moves for store in self.stores if store is not None)

    def reserve(self, count: int) -> None:
        """Pages for `count` more tokens a row, in every layer: see `Store.reserve`."""
        for index in range(self.num_layers):
            self.store(index).reserve(count)

    def count(self, more: Sequence[Tensor]) -> None:
        """What the host knows of a step that a device did by itself; more: (B, Hkv) tokens held, a layer."""
        for index, each in enumerate(more):
            self.store(index).count(each)
        if self.steps is not None:
            self.steps += 1

    def fork(self) -> Session:
        """Another session that has read the same, sharing the pages until one of them writes."""
        other = Session(self.policy, self.num_layers, self.pools, rotations=self.rotations)
        other.stores = [None if store is None else store.fork() for store in self.stores]
        other.shared, other.steps = {name: x.clone() for name, x in self.shared.items()}, self.steps
        return other

    def join(self, other: Session) -> None:
        """The sequences of another session of the same policy and pools come behind these; the other is left empty.

        Errors: ValueError with the reason (`unlike`).
        """
        if reason := self.unlike(other):
            raise ValueError(reason)
        for index in range(self.num_layers):
            self.store(index).join(other.store(index))
        if self.shared and other.shared:
            ids = [session.shared["token_ids"] for session in (self, other)]
            width = max(x.shape[1] for x in ids)
            wide = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=-1) for x in ids]
            self.shared["token_ids"] = torch.cat(wide)
        self.steps = self.steps if self.steps == other.steps else None
        other.stores = [None] * other.num_layers

    def unlike(self, other: Session) -> str | None:
        """Why another session cannot join, or None."""
        if other.policy is not self.policy or self.pools is None or other.pools is not self.pools:
            return "other: got a session of another policy or with other pools; join those that share both"
        if names := sorted({*self.shared, *other.shared} - {"token_ids"}):
            return f"shared: nothing says how {', '.join(names)} of two sessions become one; keep it in notes"
        pairs = ((self.store(index), other.store(index)) for index in range(self.num_layers))
        return next(filter(None, (mine.unlike(theirs) for mine, theirs in pairs)), None)

    def free(self) -> None:
        """Give all pages back; a session that may be read into from the start."""
        for index, store in enumerate(self.stores):
            if store is not None:
                store.free()
                self.forget(index)
        self.steps = 0

    def _pool(self, k: Tensor, v: Tensor) -> PagePool:
        policy = self.policy
        kind = (policy.storage, k.shape[3], v.shape[3], policy.page, policy.columns, k.dtype, k.device)
        if self.pools is not None and kind in self.pools:
            pool = self.pools[kind]
        else:
            storage, dim, value_dim, page, columns, dtype, device = kind
            pool = storage.pool(dim, value_dim, page=page, columns=columns, dtype=dtype, device=device)
            if self.pools is not None:
                self.pools[kind] = pool
        if self.pools is not None:
            pool.stores += 1  # beside one that is there for those to come, so that none shrinks it
        return pool

    def _first(
        self, store: Store, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, rows: Sequence[int] | None
    ) -> Tensor:
        """A piece before which there was nothing: what is dropped is never stored."""
        o = self.policy.attend(index, q, k, v, scale)
        q, k, v = self.policy.project(index, q, k, v)
        view = View(store, self._place(index, scale, rows), q, k, v, self.policy.columns)
        keep = self.policy.piece(view)
        counts = None if keep is None else self.policy.counts(view)
        store.append(k, v, rows, keep=keep, counts=counts, columns=view.columns)
        store.aim(rows)
        return o

    def _more(
        self, store: Store, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, rows: Sequence[int] | None
    ) -> Tensor:
        q, k, v = self.policy.project(index, q, k, v)
        store.append(k, v, rows)
        o = store.attend(q, scale=scale, rows=rows)
        view = Stored(store, self._place(index, scale, rows), q)
        keep = self.policy.piece(view)
        counts = None if keep is None else self.policy.counts(view)
        if self.policy.columns:
            view.put_columns()
        if keep is not None:
            store.keep(keep, rows, counts=counts)
        store.aim(rows)
        return self.policy.restore(index, o)

    def _step(
        self, store: Store, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, rows: Sequence[int] | None
    ) -> Tensor:
        q, k, v = self.policy.project(index, q, k, v)
        store.append(k, v, rows)
        if self._idle:
            return self.policy.restore(index, store.attend(q, scale=scale, rows=rows))
        step = Stored(store, self._place(index, scale, rows), q)
        step.chosen = self.policy.select(step)
        o = store.attend(q, step.chosen, scale=scale, rows=rows)
        self.policy.after(step)
        return self.policy.restore(index, o)
