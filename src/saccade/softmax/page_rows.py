"""Attention over pages in PyTorch: what lies one after another is read where it lies, the rest is copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from saccade.softmax.merge import merge
from saccade.softmax.problem import Problem

if TYPE_CHECKING:
    from saccade.softmax.paged import Chosen, Pages

SHORT, LONG = 1024, 8192  # tokens of a row on a CPU: fewer are one product, and no product has more
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Chunk:
    """Some slots of the first `rows` rows, `tokens` of each.

    They lie one after another, from page `start` for the first row and `step` pages on for each further one; or they
    are to be copied, pages (rows, K), of heads (rows,). seen (rows, n or 1, tokens): by which query; None for all.
    """

    rows: int
    tokens: int
    start: int = 0
    step: int = 0
    pages: Tensor | None = None
    heads: Tensor | None = None
    seen: Tensor | None = None


class Rows:
    """Keys and values of every key head of every sequence, a row each, and the slots that it reads.

    On a CPU what tables and lists say is NumPy's and the host looks for what lies together; elsewhere, and while it is
    recorded, it is PyTorch's, the host knows none of it, and all is one chunk, copied. slots (R or 1, K): logical
    pages; at (R, K): physical ones, anything where there is none; left (R, K): tokens from the first of a page to the
    last of its row, at most 0 for none. back (n or 1,): tokens behind the last one that each query sees. order: the
    rows, long ones first; None as they are.
    """

    def __init__(self, problem: Problem, pages: Pages, chosen: Chosen | None, *, causal: bool) -> None:
        self.k, self.v, self.page, self.kv_heads = pages.k, pages.v, pages.page, pages.k.shape[1]
        self.host = pages.k.device.type == "cpu" and not _recorded()
        arange = np.arange if self.host else lambda *of: torch.arange(*of, device=pages.k.device)

        def known(x: Tensor) -> Any:
            return x.numpy() if self.host else x

        table, lengths = pages.table, pages.lengths
        if self.kv_heads > 1:
            table, lengths = (x.repeat_interleave(self.kv_heads, 0) for x in (table, lengths))
        self.count, self.heads = len(table), arange(len(table)) % self.kv_heads
        self.token = arange(self.page)
        self.back = arange(problem.q.shape[2] - 1, -1, -1) if causal else arange(1)
        # What is kept for gradients must not change when tokens are added.
        self.in_place = self.host and self.kv_heads == 1 and not problem.wants_gradients
        self.in_place &= all(x.stride(0) == self.page * x.stride(2) for x in (self.k, self.v))
        self.order: Any = None
        if chosen is None:
            slots, self.at = arange(table.shape[1])[None], known(table)
            self.left = known(lengths)[:, None] - slots * self.page
        else:
            slots = known(listed(pages, chosen).flatten(0, 1))
            self.at = known(table)[arange(self.count)[:, None], slots * (slots >= 0)]
            self.left = (known(lengths)[:, None] - slots * self.page) * (slots >= 0)
        if self.host:
            self._sort()

    def _sort(self) -> None:
        """Rows with more slots first, without slots that no row uses behind the last that is used."""
        used = self.left > 0
        ends = used.shape[1] - used[:, ::-1].argmax(1) if used.shape[1] else np.zeros(self.count, np.int64)
        ends = ends * used.any(1)
        width = int(ends.max(initial=0))
        self.at, self.left, self.ends = self.at[:, :width], self.left[:, :width], ends
        if width and ends.min() < width:
            self.order = (-ends).argsort(kind="stable")
            self.at, self.left, self.ends, self.heads = (x[self.order] for x in (self.at, self.left, ends, self.heads))

    def chunks(self) -> Iterator[Chunk]:
        """All slots, at the same bounds wherever they lie: so that no last bit depends on that."""
        width = self.at.shape[1]
        if not self.host:
            yield self._copied(self.count, self.at, self.left, self.page * width, masked=True)
            return
        if not width:
            return
        full = (self.left - self.back[0] >= self.page).all(0)
        follow = (self.at[:, 1:] == self.at[:, :-1] + 1).all(0)
        for first, last in _bounds(width, self.page):
            rows = self.count if self.order is None else int((self.ends > first).sum())
            at, left = self.at[:rows, first:last], self.left[:rows, first:last]
            tokens, masked = self.page * (last - first), False
            if not full[first:last].all():
                end = left[:, -1]
                alike = not self.back[0] and full[first : last - 1].all() and bool((end == end[0]).all()) and end[0] > 0
                masked, tokens = not alike, tokens - self.page + min(self.page, int(end[0])) if alike else tokens
            starts = at[:, 0]
            steps = starts[1:] - starts[:-1]
            apart = int(steps[0]) if rows > 1 else 0
            together = follow[first : last - 1].all() and apart >= 0 and bool((steps == apart).all())
            if self.in_place and together and not masked:
                yield Chunk(rows, tokens, int(starts[0]), apart)
            else:
                yield self._copied(rows, at, left, tokens, masked=masked)

    def _copied(self, rows: int, at: Any, left: Any, tokens: int, *, masked: bool) -> Chunk:
        pages = at * (left > 0)
        heads: Any = self.heads[:rows]
        seen: Any = None
        if masked:
            seen = self.token < (left[:, None] - self.back[:, None])[..., None]
            seen = seen.reshape(rows, len(self.back), tokens)
        if not self.host:
            return Chunk(rows, tokens, pages=pages.long(), heads=heads, seen=seen)
        ids, of = torch.from_numpy(pages.astype(np.int64)), torch.from_numpy(heads)
        return Chunk(rows, tokens, pages=ids, heads=of, seen=None if seen is None else torch.from_numpy(seen))

    def read(self, x: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """Keys or values of a chunk, (rows, tokens, C); zeros where no query sees them."""
        if chunk.pages is None:
            size, stride = (chunk.rows, chunk.tokens, x.shape[3]), (chunk.step * x.stride(0), x.stride(2), x.stride(3))
            return x.as_strided(size, stride, x.storage_offset() + chunk.start * x.stride(0)).to(dtype)
        assert chunk.heads is not None
        if self.kv_heads > 1 and x.stride(0) != self.kv_heads * x.stride(1):
            found = x[chunk.pages, chunk.heads[:, None]]
        else:
            at = chunk.pages if self.kv_heads == 1 else chunk.pages * self.kv_heads + chunk.heads[:, None]
            found = x.flatten(0, 1).index_select(0, at.flatten())
        found = found.view(chunk.rows, -1, x.shape[3])[:, : chunk.tokens].to(dtype)
        # What weighs nothing must still be finite.
        return found if chunk.seen is None else found.masked_fill(~chunk.seen[:, -1, :, None], 0)


def attend_rows(problem: Problem, pages: Pages, chosen: Chosen | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse) in float32 at least, without sinks; the same bits wherever the pages lie.

    The B sequences of q share the S of pages; causal: their queries are the last tokens there, else they see them all.
    """
    q = problem.q
    (batch, heads, n, dim), kv_heads, own = q.shape, pages.k.shape[1], len(pages.table)
    rows = Rows(problem, pages, chosen, causal=causal)
    # Rows of one key head: the sequences of a prefix, the heads of its group, their queries.
    form = own, batch // own, kv_heads, heads // kv_heads
    each = q.to(torch.promote_types(q.dtype, torch.float32))
    if batch > own and kv_heads > 1:
        each = each.view(*form, n, dim).transpose(1, 2)
    each = each.reshape(own * kv_heads, -1, dim)
    each = each if each.stride(2) == 1 else each.contiguous()  # the kernel takes channels to lie side by side
    if rows.order is None:
        o, lse = _attend(problem, rows, each)
    else:
        order, back = (torch.from_numpy(x) for x in (rows.order, rows.order.argsort()))
        o, lse = (x.index_select(0, back) for x in _attend(problem, rows, each.index_select(0, order)))
    if batch > own and kv_heads > 1:
        o, lse = (x.unflatten(0, (own, kv_heads)).unflatten(2, (batch // own, -1)).transpose(1, 2) for x in (o, lse))
    return o.reshape(batch, heads, n, -1), lse.reshape(batch, heads, n).contiguous()


def _attend(problem: Problem, rows: Rows, q: Tensor) -> tuple[Tensor, Tensor]:
    """(o (R, queries, Dv), lse (R, queries)) of q (R, queries, D)."""
    parts = []
    for chunk in rows.chunks():
        k, v = (rows.read(x, chunk, q.dtype) for x in (rows.k, rows.v))
        o, lse = _part(problem, q[: chunk.rows], k, v, chunk.seen)
        if chunk.rows < len(q):
            more = len(q) - chunk.rows
            o, lse = (
                torch.nn.functional.pad(o, (0, 0, 0, 0, 0, more)),
                torch.nn.functional.pad(lse, (0, 0, 0, more), value=-torch.inf),
            )
        parts.append((o, lse))
    if not parts:
        return q.new_zeros(*q.shape[:2], rows.v.shape[3]), q.new_full(q.shape[:2], -torch.inf)
    return parts[0] if len(parts) == 1 else merge(parts)


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


def _recorded() -> bool:
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
