"""What a decoder holds of one layer: for each sequence and key head a run of tokens of its own length, in pages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.cache.frames import SPARE
from saccade.cache.pool import PagePool, Reading
from saccade.cache.rows import Counted, flat, of_rows, ragged, sent
from saccade.cache.steps import Ring, find_tokens
from saccade.errors import positive
from saccade.softmax import Pages, merge
from saccade.softmax.page_rows import FEW, Found, Lane, alike, recorded
from saccade.softmax.paged import read_pages

ABSENT = torch.iinfo(torch.int32).max  # the position of no token: behind all others


@dataclass(frozen=True, eq=False)
class Tokens:
    """Single tokens to be read: slots int (B, Hkv or H, K) of a `Store`, -1 for none, each at most once a row."""

    slots: Tensor


class Store:
    """Keys and values of one layer, ragged over sequences and key heads.

    A row is one key head of one sequence, B Hkv of them, sequence after sequence; to `Pages` it is a sequence with a
    single key head, so that rows may be of different lengths and `attend_pages` reads each for what it is. `seen` (B,)
    counts the tokens that a sequence has had, `counts` (B, Hkv) those that a row still holds. Both are known on the
    host (`ends` is seen on the device); an eviction that says how many tokens it leaves waits for no device.

    batch, kv_heads: B, Hkv. pool: where the pages lie. Slots are places in a row, 0 .. counts - 1. Until a token is
    dropped from the middle (`drop`) they are in the order of positions; `order` gives that order always.

    notes: tensors of a policy by name, the batch their first axis, which move with the sequences (`reorder`); shorter
    ones of some sequences are padded (`note`; `fills` has with what). targets (B, Hkv), aimed (B,): tokens held and
    seen after the last piece (`aim`), on the host.

    `reserve` takes the pages of later tokens ahead. From then on a step needs the host for nothing but to count, and
    all that it touches lies where it lay, so that it can be recorded: `owned` (B Hkv,) are the pages of each row,
    `until` the tokens that the longest sequence will have seen then. What moves tokens, all but single ones, gives such
    pages back first (`trim`). moves: how often the host has changed anything.

    >>> store = Store(2, 3, PagePool(8))
    >>> store.append(*torch.randn(2, 2, 3, 50, 8))
    >>> keep = torch.zeros(2, 3, 50, dtype=torch.bool)
    >>> keep[:, 0], keep[:, 1:, ::5] = True, True
    >>> store.keep(keep)
    >>> store.counts.tolist(), store.pool.in_use, store.seen.tolist()
    ([[50, 10, 10], [50, 10, 10]], 12, [50, 50])
    >>> store.attend(torch.randn(2, 6, 1, 8)).shape
    torch.Size([2, 6, 1, 8])
    """

    lengths, counts, seen, ends = Counted(), Counted(), Counted(), Counted()

    def __init__(self, batch: int, kv_heads: int, pool: PagePool) -> None:
        self.ahead = 0  # steps that these do not count yet
        self.batch, self.kv_heads, self.pool = positive("batch", batch), positive("kv_heads", kv_heads), pool
        device = pool.k.device
        self.table = torch.zeros(batch * kv_heads, 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, kv_heads, dtype=torch.int64)
        self.seen = torch.zeros(batch, dtype=torch.int64)
        self.ends = torch.zeros(batch, dtype=torch.int64, device=device)
        self.sorted = True
        self.notes: dict[str, Tensor] = {}
        self.fills: dict[str, Any] = {}
        self.targets, self.aimed = self.counts, self.seen
        self.owned: Tensor | None = None
        self.until = self.moves = 0
        self.found = Found()
        self._lane: Lane | None = None
        self._stamp = self._end = 0  # `moves` when the lane was right, and tokens that each sequence had seen then
        self._sent: dict[tuple[int, ...], Tensor] = {}
        self._every = torch.zeros(0, dtype=torch.int64, device=device)

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def page(self) -> int:
        return self.pool.page

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the pool, the tables, the policy's notes."""
        own = (self.table, self.lengths, self.ends, *self.notes.values())
        return self.pool.nbytes + sum(x.nbytes for x in own)

    @property
    def pages(self) -> Pages:
        """All rows, as B Hkv sequences of one key head."""
        return Pages(self.pool.k, self.pool.v, self.table, self.lengths, self.found)

    def note(self, name: str, value: Tensor, rows: Sequence[int] | None = None, fill: Any = 0) -> None:
        """Put value (G, ...) among the notes of the sequences `rows`, padded with `fill` to the largest sizes."""
        self.fills[name] = fill
        if rows is None:
            noted = self.notes.get(name)
            if self.owned is not None and noted is not None and noted.shape == value.shape:
                noted.copy_(value)  # a recorded step finds it where it was
            else:
                self.notes[name] = value
            return
        old = self.notes.get(name, value.new_empty(self.batch, *[0] * (value.ndim - 1)))
        sizes = [max(pair) for pair in zip(old.shape[1:], value.shape[1:], strict=True)]
        new = value.new_full((self.batch, *sizes), fill)
        new[tuple(slice(size) for size in old.shape)] = old
        place = new.new_full((len(rows), *sizes), fill)
        place[tuple(slice(size) for size in value.shape)] = value
        self.notes[name] = new.index_copy_(0, sent(torch.tensor(list(rows)), new), place)

    def aim(self, rows: Sequence[int] | None = None) -> None:
        """What rows hold now is what a piece has left them."""
        at = torch.arange(self.batch) if rows is None else torch.tensor(list(rows))
        self.targets = self.targets.index_copy(0, at, self.counts[at])
        self.aimed = self.aimed.index_copy(0, at, self.seen[at])

    def order(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Slots (G, Hkv, M) int64 in the order of their positions, and which are there; M: see `width`."""
        return self.ordered(rows)[:2]

    def ordered(self, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`order`, and the positions (G, Hkv, M) int32 where it goes by them, `ABSENT` for no token; else None."""
        counts = of_rows(self.counts, rows)
        slot = torch.arange(self.width(rows), device=self.table.device)
        there = slot < self._lengths(rows).view(*counts.shape, 1)
        slots = slot.expand(there.shape)
        if self.sorted:
            return slots, there, None
        at, slots = self.read(self.pool.positions, slots, rows).masked_fill(~there, ABSENT).sort(dim=-1, stable=True)
        return slots, there, at

    def width(self, rows: Sequence[int] | None = None) -> int:
        """Tokens of the longest of some rows; where pages are reserved, those that there are pages for."""
        if self.owned is not None:
            return self.table.shape[1] * self.page
        counts = of_rows(self.counts, rows)
        return int(counts.max()) if counts.numel() else 0

    def read(self, x: Tensor, slots: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """What x (P, page, ...), or (P, 1, page, ...), holds in slots (G, Hkv, M); anything where there is none."""
        return flat(x)[self._places(slots, rows)]

    def held(self) -> Tensor:
        """bool (B, Hkv, most seen): which tokens each row holds."""
        slots, there = self.order()
        at = self.read(self.pool.positions, slots).masked_fill(~there, int(self.seen.max()))
        marks = torch.zeros(*self.counts.shape, int(self.seen.max()) + 1, dtype=torch.bool, device=at.device)
        return marks.scatter(2, at.long(), True)[..., :-1]

    def growth(self, count: int = 1, *, drops: bool = False) -> int:
        """Pages that `count` more tokens a row take from the pool at most; drops: tokens may be dropped after that.

        Where pages have several owners, those are counted that are copied when a row writes; that asks the device.
        """
        before = self.counts.flatten()
        fresh = int((-(-(before + count) // self.page) + (-before // self.page)).sum())
        if not self.pool.shared:
            return fresh
        written = self._used() if drops else self._last_pages((before % self.page != 0).nonzero()[:, 0])
        return fresh + int((self.pool.owners[written] > 1).sum())

    def _last_pages(self, rows: Tensor) -> Tensor:
        """The page with the newest token of some rows, host indices: int64."""
        return self.table[sent(rows, self.table), sent(self.counts.flatten()[rows] // self.page, self.table)].long()

    # -- reading ---------------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        chosen: Tensor | Tokens | None = None,
        *,
        scale: float | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """o (G, H, N, Dv) of the last N tokens' queries, q (G, H, N, D), as `attend_pages` has it.

        chosen: all (default); pages int (G, Hkv or H, K), -1 for none; or `Tokens`, for N = 1. Each query head reads
        the list of its key head once for all of a group, or a list of its own. Single tokens are read as pages of one.
        """
        (batch, heads, n, dim), kv_heads, pool = q.shape, self.kv_heads, self.pool
        lane = self.lane if n == 1 and chosen is None and rows is None and heads // kv_heads < FEW else None
        if lane is not None:
            each = q if q.dtype == torch.float32 else q.to(torch.promote_types(q.dtype, torch.float32))
            o = lane.attend(each.reshape(batch * kv_heads, -1, dim), dim**-0.5 if scale is None else scale)
            return (o if o.dtype == q.dtype else o.to(q.dtype)).view(batch, heads, 1, -1)
        lists, listed = kv_heads, None
        if isinstance(chosen, Tokens):
            lists = chosen.slots.shape[1]
            *places, listed = find_tokens(self._table(rows), chosen.slots, self.page)
            reading: Reading = iter([(pool.reading_tokens(*places), listed)])
        else:
            if chosen is not None:
                lists = chosen.shape[1]
                listed = chosen.reshape(batch * lists, 1, -1).int()
            reading = pool.reading(*self._lists(lists, rows), listed, self.found)
        of_rows = q.reshape(batch * lists, heads // lists, n, -1)
        parts = [read_pages(of_rows, *part, scale, needs_lse=not pool.whole) for part in reading]
        o = parts[0][0] if len(parts) == 1 else merge(parts)[0]
        return (o if o.dtype == q.dtype else o.to(q.dtype)).view(batch, heads, n, -1)

    def scores(self, q: Tensor, scale: float, rows: Sequence[int] | None = None) -> Tensor:
        """(G, H, M): scale q . k of the newest query, q (G, H, 1, d), and the leading d channels of every key, slot by
        slot, in at least float32, -inf where there is no token; M: see `width`.
        """
        return self.pool.scores(q, self._table(rows), self._lengths(rows), self.width(rows), scale)

    def prefetch(self, pages: Tensor, rows: Sequence[int] | None = None) -> None:
        """Pages int (G, Hkv or H, K), -1 for none, that a step will soon read; a guess, which costs time alone if
        wrong.
        """
        if self.table.shape[1]:
            self.pool.prefetch(*self._lists(pages.shape[1], rows), pages.flatten(0, 1)[:, None])

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(
        self,
        k: Tensor,
        v: Tensor,
        rows: Sequence[int] | None = None,
        *,
        keep: Tensor | None = None,
        counts: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Tokens that follow those seen: k (G, Hkv, n, D), v (G, Hkv, n, Dv) of the sequences `rows` (default: all).

        keep: bool (G, Hkv, n), which of them to store (default: all); counts: how many those are, (G, Hkv) on the host,
        for which the device is asked when it is not given. columns: (G, Hkv, n, C), zeros by default.
        """
        batch, _, n, _ = k.shape
        if n == 1 and rows is None and keep is None and columns is None:
            self._step(k, v)
            return
        self.moves, self._lane = self.moves + 1, None
        which = self._rows(rows)
        if keep is not None:
            counts = (keep.sum(-1) if counts is None else counts).cpu()
            order = (~keep).int().argsort(dim=-1, stable=True).flatten(0, 1)
            source = order[:, : int(counts.max())]
        else:
            counts = torch.full((batch, self.kv_heads), n)
            source = torch.arange(n, device=k.device).expand(batch * self.kv_heads, -1)
        before = of_rows(self.counts, rows)
        self._make_room(before.flatten(), counts.flatten(), which, rows)
        if keep is None or int(counts.min()) == int(counts.max()):
            row = torch.arange(len(which), device=k.device)[:, None]
            col = torch.arange(source.shape[1], device=k.device)
        else:
            row, col = (sent(x, self.lengths) for x in ragged(counts.flatten()))
        at = self.lengths[which][row].long() + col
        place = self.table[which[row], at // self.page].long(), at % self.page
        source = source[row, col]
        pool = self.pool
        pool.k[place[0], 0, place[1]] = k.flatten(0, 1)[row, source].to(pool.k.dtype)
        pool.v[place[0], 0, place[1]] = v.flatten(0, 1)[row, source].to(pool.v.dtype)
        first = of_rows(self.ends, rows).repeat_interleave(self.kv_heads)[row]
        pool.positions[place] = (first + source).int()
        if pool.columns.shape[2]:
            if columns is None:
                flat(pool.columns).index_fill_(0, (place[0] * self.page + place[1]).flatten(), 0.0)
            else:
                pool.columns[place] = columns.flatten(0, 1)[row, source].to(pool.columns)
        fresh = n if keep is None else sent(counts.flatten().int(), self.lengths)
        if rows is None:
            self.lengths += fresh
            self.ends += n
            self.count(counts, n)
        else:
            self.lengths = self.lengths.index_copy(0, which, self.lengths[which] + fresh)
            self.counts = self.counts.index_add(0, torch.tensor(rows), counts)
            self.seen = self.seen.index_add(0, torch.tensor(rows), torch.full((batch,), n))
            self.ends = sent(self.seen, self.ends)

    def _step(self, k: Tensor, v: Tensor) -> None:
        """`append` of one token to every row."""
        lane, pool, rows = self.lane, self.pool, self.batch * self.kv_heads
        self.moves += 1
        if lane is None or lane.length == lane.room:
            lane = self._lane = None  # or memory that is about to move would stay
            counts = self.counts.flatten()
            count, alone = alike(counts), self.owned is None and not pool.shared
            if alone and count is not None:
                if count % self.page == 0:
                    self._another_page(count // self.page)
            elif not (self.reserved if self.owned is not None else alone and (counts.numpy() % self.page).all()):
                self._make_room(counts, torch.ones_like(counts), self._rows(None), None)
            lane = self._enter(count) if alone and count is not None else None
            if lane is None:
                pool.put(k, v, (self.table, self.lengths, self.ends), count, self.found)
                self.count(1)
                return
        lane.put(k.reshape(rows, 1, -1), v.reshape(rows, 1, -1))
        self.ahead += 1
        self._end += 1
        self._stamp = self.moves + pool.frames.moves

    def _enter(self, count: int) -> Lane | None:
        """Let steps go by a lane where they can: rows of `count` tokens, with a page for the next."""
        pool, end = self.pool, alike(self.seen)
        # Of a pool with others' pages, views would hold memory that these have moved.
        if end is None or not pool.on_host or pool.stores > 1 or torch.is_grad_enabled() or recorded():
            return None
        table = self.table.numpy()[:, : count // self.page + 1]
        self._lane, self._end = Lane.of(pool.k, pool.v, table, count), end
        if self._lane is not None:
            # Of the tokens to come, so that steps need not write it.
            lane = self._lane
            lane.ahead(pool.positions).copy_(torch.arange(end, end + lane.room - count, dtype=torch.int32))
            if pool.columns.shape[2]:
                lane.ahead(pool.columns).zero_()
        return self._lane

    @property
    def lane(self) -> Lane | None:
        """By which steps go, as long as nothing else has changed what is held; None for none."""
        lane = self._lane
        if lane is None or self._stamp != self.moves + self.pool.frames.moves or torch.is_grad_enabled():
            return None
        return lane

    def catch_up(self) -> None:
        """Count the steps that went by a lane."""
        steps, self.ahead = self.ahead, 0
        self.lengths += steps
        self.ends += steps
        self.count(steps, steps)

    @property
    def end(self) -> int | None:
        """Tokens that every sequence has seen; None where they differ in that."""
        return alike(self.seen) if self.lane is None else self._end

    @property
    def begun(self) -> bool:
        """Whether every sequence has had tokens."""
        return self.ahead > 0 or all(self.seen.tolist())

    @property
    def reserved(self) -> bool:
        """Whether there are pages for one more token of every row, as `reserve` took them."""
        return max(self.seen.tolist()) < self.until

    def count(self, counts: Tensor | int, n: int = 1) -> None:
        """What the host knows of `n` more tokens of each sequence, `counts` more of which are held."""
        self.counts, self.seen = self.counts + counts, self.seen + n

    def keep(self, keep: Tensor, rows: Sequence[int] | None = None, *, counts: Tensor | None = None) -> None:
        """Drop all tokens but those that `keep` (G, Hkv, M) names, in the order of `order`, and free their pages.

        counts: how many each row keeps, (G, Hkv) on the host, for which the device is asked when it is not given.
        Memory follows: a pool of which a fifth has become free gives that back.
        """
        self.trim()
        slots, there = self.order(rows)
        keep = keep[..., : slots.shape[2]] & there
        counts = (keep.sum(-1) if counts is None else counts).cpu()
        before = of_rows(self.counts, rows)
        if bool((counts == before).all()):
            return
        which = self._rows(rows)
        source = slots.gather(2, (~keep).int().argsort(dim=-1, stable=True)[..., : int(counts.max())])
        row, col = (sent(x, self.lengths) for x in ragged(counts.flatten()))
        pool, taken = self.pool, self._places(source, rows).flatten(0, 1)[row, col]
        moved = [x[taken] for x in self._columns()]
        old_pages, new_pages = (-(-x.flatten() // self.page) for x in (before, counts))
        self._open(which, *ragged(new_pages))
        place = self.table[which[row], col // self.page].long() * self.page + col % self.page
        for x, values in zip(self._columns(), moved, strict=True):
            x[place] = values
        last_row, last_col = ragged(old_pages - new_pages)
        last_col = last_col + new_pages[last_row]
        pool.release(self.table[which[sent(last_row, which)], sent(last_col, which)].long())
        self._recount(counts, rows)
        self.sorted = self.sorted or rows is None
        self.tighten()

    def drop(self, slots: Tensor | Ring, rows: Sequence[int] | None = None, which: Tensor | None = None) -> None:
        """Drop one token a row: slots int (G, Hkv), or `Ring` of the G sequences. The row's last token takes its place;
        a page that empties is free.

        which: bool (G, Hkv) on the host, the rows that drop one (default: all).
        """
        counts = of_rows(self.counts, rows)
        less = np.ones(counts.shape, bool) if which is None else which.numpy()
        at = torch.from_numpy(less.reshape(-1).nonzero()[0])
        mine, pool = self._known(at), self.pool
        if isinstance(slots, Ring) and (rows is not None or pool.guarded):
            slots = slots.at(of_rows(self.ends, rows))[:, None].expand(counts.shape)
        if isinstance(slots, Tensor):
            slots = slots.flatten() if which is None else slots.flatten()[mine]
        if rows is not None:
            mine = self._rows(rows)[mine]
        if pool.guarded and isinstance(slots, Tensor):
            last = self.lengths[mine].long() - 1
            self._open_places(mine, slots // self.page)
            self._open_places(mine, last // self.page)  # the next token may come there
        pool.drop((self.table, self.lengths, self.ends), mine, slots)
        left = counts.numpy() - less
        emptied = (left[less] % self.page == 0).nonzero()[0]
        if len(emptied) and self.owned is None:
            page = sent(torch.from_numpy(left[less][emptied] // self.page), mine)
            pool.release(self.table[mine[sent(torch.from_numpy(emptied), mine)], page].long())
        counts = torch.from_numpy(left)
        self.counts = counts if rows is None else self.counts.index_copy(0, torch.tensor(rows), counts)
        self.moves += 1
        self.sorted = False

    def drop_page(self, pages: Tensor, rows: Sequence[int] | None = None, which: Tensor | None = None) -> None:
        """Drop one whole page a row: pages int (G, Hkv), full ones, none the newest. Nothing else moves.

        which: bool (G, Hkv) on the host, the rows that drop one (default: all).
        """
        self.trim()
        mine, page = self._rows(rows), pages.reshape(-1, 1).long()
        counts = of_rows(self.counts, rows)
        less = torch.ones_like(counts) if which is None else which.long()
        if which is not None:
            at = sent(which.flatten().nonzero()[:, 0], mine)
            mine, page = mine[at], page[at]
        self.pool.release(self.table[mine].gather(1, page)[:, 0].long())
        column = torch.arange(self.table.shape[1] - 1, device=page.device)
        kept = self.table[mine].gather(1, column + (column >= page))
        self.table[mine, :-1] = kept
        self._recount(counts - self.page * less, rows)

    def put_columns(self, columns: Tensor, slots: Tensor, there: Tensor, rows: Sequence[int] | None = None) -> None:
        """Write columns (G, Hkv, M, C) of tokens in the order of `order`."""
        counts = of_rows(self.counts, rows)
        which = self._rows(rows)
        if self.pool.shared:
            row, col = (sent(x, self.lengths) for x in ragged(-(-counts.flatten() // self.page)))
            self._own_places(which[row], col)
        if self.owned is None and int(counts.min()) == slots.shape[2]:
            place, values = self._places(slots, rows).flatten(), columns.flatten(0, 2)
        else:
            row, col = (sent(x, self.lengths) for x in ragged(counts.flatten()))
            place = self._places(slots, rows).flatten(0, 1)[row, col]
            values = columns.flatten(0, 1)[row, col]
        flat(self.pool.columns)[place] = values.to(self.pool.columns)

    # -- sequences -------------------------------------------------------------------------------------------------

    def reorder(self, rows: Sequence[int]) -> None:
        """Sequence i goes on from what sequence rows[i] was; pages are shared until one of them writes."""
        self.trim()
        rows = list(rows)
        old = self._used()
        which = self._rows(rows)
        self.table, self.lengths = self.table[which], self.lengths[which]
        index = torch.tensor(rows)
        self.batch, self.counts, self.seen = len(rows), self.counts[index], self.seen[index]
        self.targets, self.aimed = self.targets[index], self.aimed[index]
        self.ends = sent(self.seen, self.ends)
        self.notes = {name: x[sent(index, x)] for name, x in self.notes.items()}
        self.pool.hold(self._used())
        self.pool.release(old)

    def join(self, other: Store) -> None:
        """The sequences of another store of the same pool come behind these, with their pages; the other is left empty.

        Notes are padded with what `note` was told. Errors: ValueError with the reason (`unlike`).
        """
        if reason := self.unlike(other):
            raise ValueError(reason)
        self.trim()
        other.trim()
        self.notes = {name: self._both(name, other) for name in {**self.notes, **other.notes}}
        width = -(-int(torch.cat([self.counts, other.counts]).max()) // self.page)

        def wide(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]))  # narrower ones lose what no row names

        self.table = torch.cat([wide(self.table), wide(other.table)])
        self.lengths, self.ends = torch.cat([self.lengths, other.lengths]), torch.cat([self.ends, other.ends])
        self.counts, self.seen = torch.cat([self.counts, other.counts]), torch.cat([self.seen, other.seen])
        self.targets, self.aimed = torch.cat([self.targets, other.targets]), torch.cat([self.aimed, other.aimed])
        self.batch, self.sorted = self.batch + other.batch, self.sorted and other.sorted
        self.fills |= other.fills
        other._recount(torch.zeros_like(other.counts), None)
        self.pool.stores -= 1

    def unlike(self, other: Store) -> str | None:
        """Why another store cannot join, or None."""
        if other.pool is not self.pool or other.kv_heads != self.kv_heads:
            return "other: its pages lie in another pool, or are of other heads; join stores of one session"
        for name in {**self.notes, **other.notes}:
            shapes = [tuple(store.notes[name].shape[1:]) for store in (self, other) if name in store.notes]
            if len(shapes) < 2 or len(shapes[0]) != len(shapes[1]):
                return f"notes: {name!r} is not kept alike for all sequences; note it in every piece"
            if shapes[0] != shapes[1] and name not in {**self.fills, **other.fills}:
                return (
                    f"notes: {name!r} is of {shapes[0]} and {shapes[1]}, and nothing says what pads it; put it there "
                    "by `note`, with a `fill`"
                )
        return None

    def _both(self, name: str, other: Store) -> Tensor:
        """A note of this store's sequences and of those of another."""
        first, last = self.notes[name], other.notes[name]
        fill = {**self.fills, **other.fills}.get(name)
        sizes = [max(pair) for pair in zip(first.shape[1:], last.shape[1:], strict=True)]
        both = first.new_full((len(first) + len(last), *sizes), 0 if fill is None else fill)
        for rows, x in ((slice(len(first)), first), (slice(len(first), None), last)):
            both[(rows, *map(slice, x.shape[1:]))] = x
        return both

    def fork(self) -> Store:
        """Another store with the same tokens, sharing their pages until one of the two writes."""
        self.trim()
        table, lengths, ends = self.table.clone(), self.lengths.clone(), self.ends.clone()
        other = copy.copy(self)
        other.table, other.lengths, other.ends = table, lengths, ends
        other.notes = {name: x.clone() for name, x in self.notes.items()}
        other.fills, other.found = dict(self.fills), Found()
        self.pool.stores += 1
        self.pool.hold(other._used())
        return other

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, as if they had never come.

        Errors: ValueError once a token was dropped, for what it made room for cannot be brought back.
        """
        if not bool((self.counts == self.seen[:, None]).all()):
            raise ValueError(
                f"crop: got {count} tokens to take back, but earlier ones were dropped to make room for them; "
                "decode without taking tokens back (no assisted decoding)"
            )
        self.trim()
        # Tokens of which none was dropped lie in order: the last pages go, and nothing moves.
        left = self.counts - count
        old_pages, new_pages = (-(-x.flatten() // self.page) for x in (self.counts, left))
        row, col = ragged(old_pages - new_pages)
        self.pool.release(self.table[sent(row, self.table), sent(col + new_pages[row], self.table)].long())
        self._recount(left, None)
        partial = (left.flatten() % self.page != 0).nonzero()[:, 0]
        self._open(self._rows(None), partial, left.flatten()[partial] // self.page)
        self.seen = self.seen - count
        self.ends = self.ends - count
        self.tighten()

    def free(self) -> None:
        """Give all pages back."""
        self.trim()
        self.pool.release(self._used())
        self._recount(torch.zeros_like(self.counts), None)
        self.pool.stores -= 1

    def tighten(self) -> None:
        """Give the memory of free pages back, where they are a fifth or more and no other store has pages here."""
        pool = self.pool
        if pool.shared or pool.stores > 1 or 5 * pool.in_use > 4 * pool.num_pages:
            return
        row, col = (sent(x, self.lengths) for x in ragged(-(-self.counts.flatten() // self.page)))
        pool.shrink(self.table[row, col].long())
        widest = -(-int(self.counts.max()) // self.page)
        self.table = torch.zeros_like(self.table[:, :widest])  # what it said behind a row's end is there no more
        self.table[row, col] = torch.arange(len(row), dtype=torch.int32, device=row.device)

    # -- ahead -----------------------------------------------------------------------------------------------------

    def reserve(self, count: int) -> None:
        """Pages for `count` more tokens a row."""
        self.trim()
        counts = self.counts.flatten()
        self._make_room(counts, torch.full_like(counts, positive("count", count)), self._rows(None), None)
        self.owned, self.until = -(-(counts + count) // self.page), int(self.seen.max()) + count
        self.moves += 1

    def trim(self) -> None:
        """Give back what is reserved and not yet used."""
        self.moves, self._lane = self.moves + 1, None
        if self.owned is None:
            return
        used = -(-self.counts.flatten() // self.page)
        row, col = ragged(self.owned - used)
        col = col + used[row]
        self.owned, self.until = None, 0
        self.pool.release(self.table[sent(row, self.table), sent(col, self.table)].long())

    # -- within ----------------------------------------------------------------------------------------------------

    def _columns(self) -> list[Tensor]:
        """All that is held of the tokens, one after another."""
        pool = self.pool
        return [flat(x) for x in (pool.k, pool.v, pool.positions, pool.columns)]

    def _rows(self, rows: Sequence[int] | None) -> Tensor:
        """Rows of some sequences, int64 (G Hkv,)."""
        if rows is None:
            if len(self._every) != self.batch * self.kv_heads:
                self._every = torch.arange(self.batch * self.kv_heads, device=self.table.device)
            return self._every
        first = torch.tensor(list(rows), dtype=torch.int64)[:, None] * self.kv_heads
        return sent((first + torch.arange(self.kv_heads)).flatten(), self.table)

    def _table(self, rows: Sequence[int] | None) -> Tensor:
        return self.table if rows is None else self.table[self._rows(rows)]

    def _lengths(self, rows: Sequence[int] | None) -> Tensor:
        return self.lengths if rows is None else self.lengths[self._rows(rows)]

    def _lists(self, lists: int, rows: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Tables and lengths of `lists` lists a sequence, those of the same key head one after another."""
        found, each = (self._table(rows), self._lengths(rows)), lists // self.kv_heads
        return found if each == 1 else (found[0].repeat_interleave(each, 0), found[1].repeat_interleave(each, 0))

    def _places(self, slots: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Where slots (G, Hkv, M) lie among all tokens of the pool."""
        table = self._table(rows)
        page = (slots.flatten(0, 1) // self.page).clamp(max=max(0, table.shape[1] - 1))
        return (table.gather(1, page).long() * self.page + slots.flatten(0, 1) % self.page).view(slots.shape)

    def _used(self) -> Tensor:
        """Every page that a row names, int64, once a row."""
        row, col = (sent(x, self.lengths) for x in ragged(-(-self.counts.flatten() // self.page)))
        return self.table[row, col].long()

    def _known(self, index: Tensor) -> Tensor:
        """Indices of the host on the device; those that come again and again are sent once."""
        key = tuple(index.tolist())
        if key not in self._sent:
            if len(self._sent) > 8:
                self._sent.clear()
            self._sent[key] = sent(index, self.table)
        return self._sent[key]

    def _recount(self, counts: Tensor, rows: Sequence[int] | None) -> None:
        lengths = sent(counts.flatten().int(), self.lengths)
        if rows is None:
            self.counts, self.lengths = counts, lengths
        else:
            self.counts = self.counts.index_copy(0, torch.tensor(list(rows)), counts)
            self.lengths = self.lengths.index_copy(0, self._rows(rows), lengths)

    def _open(self, which: Tensor, row: Tensor, col: Tensor) -> None:
        """Make pages `col` of rows which[row], host indices, ready to be written to."""
        if self.pool.guarded:
            self._open_places(which[sent(row, which)], sent(col, which))

    def _open_places(self, row: Tensor, col: Tensor) -> None:
        self.table[row, col] = self.pool.opened(self.table[row, col].long()).int()

    def _own_places(self, row: Tensor, col: Tensor) -> None:
        """Make pages those of one owner each; what they hold stays as it is."""
        self.table[row, col] = self.pool.own(self.table[row, col].long()).int()

    def _make_room(self, before: Tensor, more: Tensor, which: Tensor, rows: Sequence[int] | None) -> None:
        """Pages for `more` tokens a row, on the host, behind `before`."""
        if self.owned is not None:
            if rows is None and bool((-(-(before + more) // self.page) <= self.owned).all()):
                return
            self.trim()
        if self.pool.shared:  # what is partial is open
            partial = ((before % self.page != 0) & (more > 0)).nonzero()[:, 0]
            self._own_places(which[sent(partial, which)], sent(before[partial] // self.page, which))
        old, new = (-(-x // self.page) for x in (before, before + more))
        fresh = int((new - old).sum())
        if not fresh:
            return
        if int(new.max()) > self.table.shape[1]:
            self.table = torch.nn.functional.pad(self.table, (0, int(new.max()) - self.table.shape[1]))
        row, col = ragged(new - old)
        col = col + old[row]
        ids = self.pool.take(fresh).int()
        self.table[which[sent(row, which)], sent(col, which)] = ids

    def _another_page(self, count: int) -> None:
        """A page for every row, each of which has `count` pages."""
        self._spread(count)
        if count == self.table.shape[1]:
            self.table = torch.nn.functional.pad(self.table, (0, 1))
        self.table[:, count] = self.pool.take(self.table.shape[0]).int()

    def _spread(self, count: int) -> None:
        """Where the memory of all pages is about to move, let it move so that each row, of `count` pages, lies in one
        piece, with room behind it for the next ones: a CPU reads that where it lies. Only where nobody else has pages.
        """
        pool, rows = self.pool, self.table.shape[0]
        alone = pool.stores == 1 and pool.in_use == rows * count
        if not count or not pool.on_host or not alone or pool.frames.num_free >= rows:
            return
        width = count + max(1, pool.num_pages // SPARE // rows)
        at = torch.arange(rows * width).view(rows, width)
        here, there = self.table[:, :count], at[:, :count]
        pool.frames.spread(here.flatten().long(), there.flatten(), at[:, count:].t().flatten().flip(0))
        here.copy_(there)
