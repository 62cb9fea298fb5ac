"""Attention over pages in PyTorch: what lies one after another is read where it lies, the rest is copied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from saccade.softmax.problem import Problem

if TYPE_CHECKING:
    from saccade.softmax.paged import Chosen, Pages

SHORT, LONG = 1024, 8192  # tokens of a row on a CPU: fewer are one product, and no product has more
FEW = 8  # queries of a row from which on the kernel is faster than products of keys with each
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Chunk:
    """Some slots of the first `rows` rows, `tokens` of each.

    They lie one after another, from page `start` for the first row and `step` pages on for each further one; or they
    are to be copied, pages (rows, K), of heads (rows,), None for the only one. seen (rows, n or 1, tokens): by which
    query; None for all.
    """

    rows: int
    tokens: int
    start: int = 0
    step: int = 0
    pages: Tensor | None = None
    heads: Tensor | None = None
    seen: Tensor | None = None


class Layout:
    """Where slots of rows lie, as the host has found it: all that asks for no more than tables and numbers of pages.

    at (R, K): physical pages, in NumPy; used (R, K): those that are read, None for all. order: the rows, those with
    more slots first; None as they are. ends (R,): slots of each, in that order. runs: of slots `first` to `last` of the
    first `rows` rows, page `start` and `step` of a `Chunk`, None where they do not lie one after another. pages: all,
    int64. newest (R,): where, among all tokens, the last page of each row begins.
    """

    def __init__(self, at: Any, used: Any, page: int) -> None:
        self.order: Any = None
        if used is None:
            self.ends, width = np.full(len(at), at.shape[1]), at.shape[1]
            self.pages = torch.from_numpy(at.astype(np.int64))
        else:
            ends = used.shape[1] - used[:, ::-1].argmax(1) if used.shape[1] else np.zeros(len(used), np.int64)
            self.ends = ends * used.any(1)
            width = int(self.ends.max(initial=0))
            at, used = at[:, :width], used[:, :width]
            if width and self.ends.min() < width:
                self.order = (-self.ends).argsort(kind="stable")
                at, used, self.ends = (x[self.order] for x in (at, used, self.ends))
            self.pages = torch.from_numpy((at * used).astype(np.int64))
        self.newest = self.pages[:, -1] * page if width else self.pages.sum(1)
        self.width = width
        follow = (at[:, 1:] == at[:, :-1] + 1).all(0)
        self.runs: list[tuple[int, int, int, tuple[int, int] | None]] = []
        for first, last in _bounds(width, page):
            rows = len(at) if self.order is None else int((self.ends > first).sum())
            starts = at[:rows, first]
            steps = starts[1:] - starts[:-1]
            apart = int(steps[0]) if rows > 1 else 0
            together = follow[first : last - 1].all() and apart >= 0 and bool((steps == apart).all())
            self.runs.append((first, last, rows, (int(starts[0]), apart) if together else None))


class Found:
    """What the host has found of the tables of some pages, on a CPU: as long as they say the same, it looks once."""

    def __init__(self) -> None:
        self._of: Any = None
        self._layout: Layout | None = None

    def layout(self, table: Any, ends: Any, page: int) -> Layout:
        """Of tables (R, K) of which each row reads the first `ends`: a number for all, or (R,); both in NumPy."""
        of = table.tobytes(), table.shape, page, ends if isinstance(ends, int) else ends.tobytes()
        if self._layout is None or self._of != of:
            alike = isinstance(ends, int)
            used = None if alike else np.arange(table.shape[1]) < ends[:, None]
            self._of, self._layout = of, Layout(table[:, :ends] if alike else table, used, page)
        return self._layout


class Lane:
    """Rows of equally many tokens, each in one piece and as far from the next, as steps of one token find them until a
    row needs another page: on a CPU, without gradients. What the pages say is looked up once, where `attend_rows` looks
    at every step.

    k (P, 1, page, D), v (P, 1, page, Dv): the pages. length: tokens of each row, which `put` counts. place: rows, pages
    of each, where the first row starts, and how many pages lie from one to the next. room: tokens that a row has pages
    for. stretches: at the bounds of `Layout`, the first slot, keys (R, tokens, D) and values (R, tokens, Dv), where
    they lie.
    """

    def __init__(self, k: Tensor, v: Tensor, length: int, place: tuple[int, int, int, int]) -> None:
        rows, pages, self.start, self.step = place
        page = k.shape[2]
        self.rows, self.length, self.room = rows, length, pages * page
        self.stretches: list[tuple[int, Tensor, Tensor]] = []
        for first, last in _bounds(pages, page):
            chunk = Chunk(rows, (last - first) * page, self.start + first, self.step)
            self.stretches.append((first * page, _in_place(k, chunk), _in_place(v, chunk)))

    @classmethod
    def of(cls, k: Tensor, v: Tensor, table: Any, length: int) -> Lane | None:
        """Of tables (R, pages) in NumPy; None for rows that lie otherwise."""
        (rows, pages), start = table.shape, int(table[0, 0])
        step = int(table[1, 0]) - start if rows > 1 else 0
        if step < 0 or not (table == np.arange(start, start + pages) + np.arange(rows)[:, None] * step).all():
            return None
        return cls(k, v, length, (rows, pages, start, step))

    def ahead(self, x: Tensor) -> Tensor:
        """Of x (P, page, ...), what belongs to tokens to come: (R, room - length, ...), a view."""
        page, token, *rest = x.stride()
        at = x.storage_offset() + self.start * page + self.length * token
        return x.as_strided((self.rows, self.room - self.length, *x.shape[2:]), (self.step * page, token, *rest), at)

    def put(self, k: Tensor, v: Tensor) -> None:
        """Write one token a row, and count it: k (R, 1, D), v (R, 1, Dv)."""
        first, keys, values = self.stretches[-1]
        at = self.length - first
        keys.narrow(1, at, 1).copy_(k)
        values.narrow(1, at, 1).copy_(v)
        self.length += 1

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """o (R, queries, Dv) of q (R, queries, D): the bits of `attend_rows`, for there is no row that sees nothing. A
        query whose scores are all -inf for what is in the keys gives NaN here, and zeros there.
        """
        columns = (q * scale).mT
        *whole, (first, keys, values) = self.stretches
        keys, values = keys.narrow(1, 0, self.length - first), values.narrow(1, 0, self.length - first)
        if keys.dtype != q.dtype:
            whole = [(start, k.to(q.dtype), v.to(q.dtype)) for start, k, v in whole]
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        scores = torch.bmm(keys, columns)
        if not whole:
            return torch.bmm(scores.mT.softmax(2), values)
        weights = torch.cat([*(torch.bmm(k, columns) for _, k, _ in whole), scores], 1).mT.softmax(2)
        o = weights.new_zeros(0)
        for start, _, v in (*whole, (first, keys, values)):
            part = weights.narrow(2, start, v.shape[1])
            o = o.baddbmm_(part, v) if start else torch.bmm(part, v)
        return o


def alike(lengths: Tensor) -> int | None:
    """The length of all rows, on a CPU; None where they differ.

    >>> alike(torch.tensor([3, 3])), alike(torch.tensor([3, 4]))
    (3, None)
    """
    told = lengths.tolist()
    return told[0] if told.count(told[0]) == len(told) else None


class Rows:
    """Keys and values of every key head of every sequence, a row each, and the slots that it reads.

    On a CPU what tables and lists say is NumPy's and the host looks for what lies together (`Layout`); elsewhere, and
    while it is recorded, it is PyTorch's, the host knows none of it, and all is one chunk, copied. slots (R or 1, K):
    logical pages; at (R, K): physical ones, anything where there is none; left (R, K): tokens from the first of a page
    to the last of its row, at most 0 for none. behind: tokens behind the last one that the first query does not see.
    length: of all rows, where it is one, and every query sees all of it. heads: of each row, where they are several.
    """

    def __init__(self, problem: Problem, pages: Pages, chosen: Chosen | None, *, causal: bool) -> None:
        self.k, self.v, self.page, self.kv_heads = pages.k, pages.v, pages.page, pages.k.shape[1]
        self.host = pages.k.device.type == "cpu" and not recorded()
        table, lengths, self.heads = pages.table, pages.lengths, None
        if self.kv_heads > 1:
            self.heads = self._range(self.kv_heads * table.shape[0]) % self.kv_heads
            table, lengths = (x.repeat_interleave(self.kv_heads, 0) for x in (table, lengths))
        self.count = table.shape[0]
        self.behind = problem.q.shape[2] - 1 if causal else 0
        # What is kept for gradients must not change when tokens are added.
        self.in_place = self.host and self.kv_heads == 1 and not problem.wants_gradients
        self.in_place &= all(x.stride(0) == self.page * x.stride(2) for x in (self.k, self.v))
        self.length: int | None = None
        self.at: Any
        self.left: Any
        if chosen is None and self.host:
            self._all(table, lengths, pages.found)
            return
        if chosen is None:
            self.at = table
            self.left = lengths[:, None] - self._range(table.shape[1]) * self.page
        else:
            given = table, lengths, listed(pages, chosen).flatten(0, 1)
            known: Any = [x.numpy() for x in given] if self.host else given
            own, ends, slots = known
            self.at = own[self._range(self.count)[:, None], slots * (slots >= 0)]
            self.left = (ends[:, None] - slots * self.page) * (slots >= 0)
        if self.host:
            self._sorted(Layout(self.at, self.left > 0, self.page))

    def _range(self, *of: int) -> Any:
        return np.arange(*of) if self.host else torch.arange(*of, device=self.k.device)

    def _all(self, table: Tensor, lengths: Tensor, found: Found) -> None:
        """Every page of every row."""
        length = None if self.behind else alike(lengths)
        if length is not None:
            self.length, self.layout = length, found.layout(table.numpy(), -(-length // self.page), self.page)
            return
        self.left = lengths.numpy()[:, None] - self._range(table.shape[1]) * self.page
        self._sorted(found.layout(table.numpy(), -(-lengths.numpy() // self.page), self.page))

    def _sorted(self, layout: Layout) -> None:
        """Rows with more slots first, without slots that no row uses behind the last that is used."""
        self.layout, self.left = layout, self.left[:, : layout.width]
        if layout.order is not None:
            self.left = self.left[layout.order]
            self.heads = None if self.heads is None else self.heads[layout.order]

    @property
    def order(self) -> Any:
        """The rows, long ones first; None as they are."""
        return self.layout.order if self.host else None

    def chunks(self) -> Iterator[Chunk]:
        """All slots, at the same bounds wherever they lie: so that no last bit depends on that."""
        if not self.host:
            yield self._copied(self.count, self.at * (self.left > 0), self.left, self.page * self.at.shape[1])
            return
        for first, last, rows, place in self.layout.runs:
            tokens, left = self._seen(first, last, rows)
            if self.in_place and place is not None and left is None:
                yield Chunk(rows, tokens, *place)
            else:
                yield self._copied(rows, self.layout.pages[:rows, first:last], left, tokens)

    def _seen(self, first: int, last: int, rows: int) -> tuple[int, Any]:
        """Tokens of a chunk, and `left` where not all of them are seen by every query of every row."""
        tokens = self.page * (last - first)
        if self.length is not None:
            return min(tokens, self.length - self.page * first), None
        left = self.left[:rows, first:last]
        full = left - self.behind >= self.page
        if full.all():
            return tokens, None
        end = left[:, -1]
        if not self.behind and full[:, :-1].all() and bool((end == end[0]).all()) and end[0] > 0:
            return tokens - self.page + min(self.page, int(end[0])), None
        return tokens, left

    def _copied(self, rows: int, pages: Tensor, left: Any, tokens: int) -> Chunk:
        heads, seen = None if self.heads is None else self.heads[:rows], None
        if left is not None:
            back = self._range(self.behind, -1, -1)
            seen = self._range(self.page) < (left[:, None] - back[:, None])[..., None]
            seen = seen.reshape(rows, len(back), tokens)
        if not self.host:
            return Chunk(rows, tokens, pages=pages.long(), heads=heads, seen=seen)
        heads, seen = (None if x is None else torch.from_numpy(x) for x in (heads, seen))
        return Chunk(rows, tokens, pages=pages, heads=heads, seen=seen)

    def read(self, x: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """Keys or values of a chunk, (rows, tokens, C); zeros where no query sees them."""
        if chunk.pages is None:
            found = _in_place(x, chunk)
            return found if found.dtype == dtype else found.to(dtype)
        if chunk.heads is not None and x.stride(0) != self.kv_heads * x.stride(1):
            found = x[chunk.pages, chunk.heads[:, None]]
        else:
            at = chunk.pages if chunk.heads is None else chunk.pages * self.kv_heads + chunk.heads[:, None]
            found = x.flatten(0, 1).index_select(0, at.flatten())
        found = found.view(chunk.rows, -1, x.shape[3])[:, : chunk.tokens].to(dtype)
        # What weighs nothing must still be finite.
        return found if chunk.seen is None else found.masked_fill(~chunk.seen[:, -1, :, None], 0)


def _in_place(x: Tensor, chunk: Chunk) -> Tensor:
    """Keys or values x (P, 1, page, C) of a chunk that lies together: (rows, tokens, C), a view."""
    page, _, token, channel = x.stride()
    size, stride = (chunk.rows, chunk.tokens, x.shape[3]), (chunk.step * page, token, channel)
    return x.as_strided(size, stride, x.storage_offset() + chunk.start * page)


def attend_rows(problem: Problem, pages: Pages, chosen: Chosen | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse) in float32 at least, without sinks; the same bits wherever the pages lie. lse is anything where the
    problem needs none.

    The B sequences of q share the S of pages; causal: their queries are the last tokens there, else they see them all.
    """
    q = problem.q
    (batch, heads, n, dim), kv_heads, own = q.shape, pages.k.shape[1], pages.table.shape[0]
    rows = Rows(problem, pages, chosen, causal=causal)
    # Rows of one key head: the sequences of a prefix, the heads of its group, their queries.
    each = q if q.dtype == torch.float32 else q.to(torch.promote_types(q.dtype, torch.float32))
    if batch > own and kv_heads > 1:
        each = each.view(own, batch // own, kv_heads, heads // kv_heads, n, dim).transpose(1, 2)
    each = each.reshape(own * kv_heads, -1, dim)
    each = each if each.stride(2) == 1 else each.contiguous()  # the kernel takes channels to lie side by side
    if rows.order is None:
        o, lse = _attend(problem, rows, each)
    else:
        order, back = (torch.from_numpy(x) for x in (rows.order, rows.order.argsort()))
        o, lse = (x.index_select(0, back) for x in _attend(problem, rows, each.index_select(0, order)))
    if batch > own and kv_heads > 1:
        o, lse = (x.unflatten(0, (own, kv_heads)).unflatten(2, (batch // own, -1)).transpose(1, 2) for x in (o, lse))
    o = o.reshape(batch, heads, n, -1)
    return o, lse.reshape(batch, heads, n).contiguous() if problem.needs_lse else lse


def _attend(problem: Problem, rows: Rows, q: Tensor) -> tuple[Tensor, Tensor]:
    """(o (R, queries, Dv), lse (R, queries)) of q (R, queries, D)."""
    if rows.host and problem.q.shape[2] == 1 and q.shape[1] < FEW and not problem.wants_gradients:
        return _few(problem, rows, q)
    found = None
    for chunk in rows.chunks():
        k, v = (rows.read(x, chunk, q.dtype) for x in (rows.k, rows.v))
        whole = chunk.rows == q.shape[0]
        part = _part(problem, q if whole else q[: chunk.rows], k, v, chunk.seen)
        found = _both(found or _nothing(rows, q), part) if found or not whole else part
    return found or _nothing(rows, q)


def _few(problem: Problem, rows: Rows, q: Tensor) -> tuple[Tensor, Tensor]:
    """`_attend` where a row has few queries, all of one token: two products a chunk and one softmax over all of them.

    Keys times queries takes the keys as they come, where queries times keys would first lay them out anew.
    """
    chunks, count = list(rows.chunks()), q.shape[0]
    if not chunks:
        return _nothing(rows, q)
    columns, scores = (q * problem.scale).mT, q.new_empty(*q.shape[:2], sum(chunk.tokens for chunk in chunks))
    ends = 0
    for chunk in chunks:
        part = scores.narrow(2, ends, chunk.tokens)
        ends += chunk.tokens
        if chunk.rows < count:
            part[chunk.rows :] = -torch.inf
            part = part[: chunk.rows]
        each = columns if chunk.rows == count else columns[: chunk.rows]
        part.copy_(torch.bmm(rows.read(rows.k, chunk, q.dtype), each).mT)
        if problem.softcap is not None:
            part.div_(problem.softcap).tanh_().mul_(problem.softcap)
        if chunk.seen is not None:
            part.masked_fill_(~chunk.seen, -torch.inf)
    if chunks[0].rows == count:
        weights = scores.softmax(2)
        o = _weighed(rows, q, chunks, weights)
        if math.isfinite(o.sum().item()):
            return o, scores.amax(2) - weights.amax(2).log() if problem.needs_lse else scores[:, :, 0]
    # A row may have seen nothing.
    top = scores.amax(2, keepdim=True).clamp_(min=torch.finfo(q.dtype).min)  # -inf has no difference from itself
    weights = scores.sub_(top).exp_()
    total = weights.sum(2, keepdim=True)
    o = _weighed(rows, q, chunks, weights)
    o.div_(total.clamp(min=1))  # where anything is seen, the total is 1 at least
    return o, total.log_().add_(top)[:, :, 0]


def _weighed(rows: Rows, q: Tensor, chunks: list[Chunk], weights: Tensor) -> Tensor:
    """Sums of the values of chunks, each with its columns of weights (R, queries, tokens)."""
    first, o = 0, None
    for chunk in chunks:
        each = weights.narrow(2, first, chunk.tokens)
        first += chunk.tokens
        v = rows.read(rows.v, chunk, q.dtype)
        if chunk.rows < q.shape[0]:
            o = q.new_zeros(*q.shape[:2], v.shape[2]) if o is None else o
            o[: chunk.rows].baddbmm_(each[: chunk.rows], v)
        else:
            o = torch.bmm(each, v) if o is None else o.baddbmm_(each, v)
    assert o is not None
    return o


def _nothing(rows: Rows, q: Tensor) -> tuple[Tensor, Tensor]:
    """What queries find that see no key."""
    return q.new_zeros(*q.shape[:2], rows.v.shape[3]), q.new_full(q.shape[:2], -torch.inf)


def _both(whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What `merge` makes of two partial results, the second of the first rows alone, in fewer calls."""
    (o, lse), (more, its), rows = whole, part, len(part[0])
    if rows < len(o):
        first = _both((o[:rows], lse[:rows]), part)
        return torch.cat([first[0], o[rows:]]), torch.cat([first[1], lse[rows:]])
    least = torch.finfo(lse.dtype).min  # two rows that saw nothing have no difference
    share = (its.clamp(min=least) - lse.clamp(min=least)).sigmoid()
    return o.lerp(more, share[:, :, None]), torch.logaddexp(lse, its)


def _part(problem: Problem, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o, lse) of q (r, queries, D), k (r, tokens, D), v (r, tokens, Dv); seen (r, n or 1, tokens), None for all."""
    on_cpu = q.device.type == "cpu"
    if on_cpu and seen is None and problem.softcap is None and not problem.wants_gradients and k.shape == v.shape:
        o, lse = FLASH(q[None], k[None], v[None], scale=problem.scale)
        if bool(lse.all()):  # 0 is also what it says where all scores are -inf
            return o[0], lse[0]
    n = problem.q.shape[2]
    scores = q @ k.mT * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.unflatten(1, (-1, n))
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if n == 1 or seen is None or (on_cpu and bool(v.isfinite().all())):
        o = (weights.flatten(1, 2) @ v).unflatten(1, (-1, n))
    else:  # a value that is not finite reaches only the rows that see it
        seen = seen.expand(-1, n, -1)
        each = [weights[:, :, i] @ v.masked_fill(~seen[:, i, :, None], 0) for i in range(n)]
        o = torch.stack(each, 2)
    o = o / total.masked_fill(total == 0, 1)
    return o.flatten(1, 2), (top + total.log()).flatten(1)


def recorded() -> bool:
    """Whether what PyTorch is told is written down to be told again, so that what the host reads would be out of date:
    by a dispatch mode that says `records`.
    """
    return any(getattr(mode, "records", False) for mode in _get_current_dispatch_mode_stack())


def _bounds(width: int, page: int) -> Iterator[tuple[int, int]]:
    """Where `width` slots are cut: the largest power of two that fits, again and again until little is left.

    >>> list(_bounds(130, 16)), list(_bounds(62, 16)), list(_bounds(190, 16))
    ([(0, 128), (128, 130)], [(0, 62)], [(0, 128), (128, 190)])
    """
    first, most = 0, max(1, LONG // page)
    while first < width:
        left = width - first
        size = left if left * page <= SHORT else min(most, 1 << left.bit_length() - 1)
        yield first, first + size
        first += size


def listed(pages: Pages, chosen: Chosen) -> Tensor:
    """Logical pages, int64 (B, Hkv, K), -1 for none."""
    batch, kv_heads = len(pages.table), pages.k.shape[1]
    if isinstance(chosen, Tensor):
        return chosen.long().expand(batch, kv_heads, -1)
    indptr, indices = chosen
    counts = indptr.diff()
    exists = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    found = torch.full(exists.shape, -1, dtype=torch.int64, device=counts.device)
    found[exists] = indices.long()
    return found.view(batch, kv_heads, -1)
