"""FlashInfer: keys and values as block-sparse rows, chunks of them shared out evenly, partial results merged."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade import attend
from saccade.cache.rows import sent
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, replay
from saccade.errors import positive
from saccade.softmax import Pages, attend_cascade, attend_pages, merge
from saccade.where import Causal

State = tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Keys and values as block-sparse rows, a row a request, a column block a page.

    k (P, Hkv, page, D), v (P, Hkv, page, Dv): the store. indptr: R + 1 numbers on the host, row r has the pages
    indices[indptr[r] : indptr[r + 1]], int32 on the device. last_page_len: R numbers, the tokens on each last page.
    """

    k: Tensor
    v: Tensor
    indptr: Sequence[int]
    indices: Tensor
    last_page_len: Sequence[int]

    @classmethod
    def of(cls, pages: Pages, lengths: Sequence[int]) -> Rows:
        """The rows of `pages`, whose first `lengths` tokens count; the host knows them, so that it does not wait."""
        counts, page = [-(-n // pages.page) for n in lengths], pages.page
        indptr = [sum(counts[:r]) for r in range(len(counts) + 1)]
        indices = torch.cat([row[:count] for row, count in zip(pages.table, counts, strict=True)])
        return cls(
            pages.k, pages.v, indptr, indices, [n - (c - 1) * page for n, c in zip(lengths, counts, strict=True)]
        )


class Chunk(NamedTuple):
    """Pages indices[start:stop] with `tokens` tokens, the `slot`-th part of a request's row, done by `worker`."""

    slot: int
    request: int
    start: int
    stop: int
    tokens: int
    worker: int


class FlashInfer(Attention):
    """Causal attention of B requests at once: a host plans chunks of their rows, a run attends, a last pass merges.

        (o, s) + (o', s') = ((e^s o + e^s' o') / (e^s + e^s'), log(e^s + e^s')),   identity (0, -inf)
        o_i = sum over the chunks c of the row of i's request of (o_ic, s_ic)

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, Dv): dense attention. s is the log of the summed exponentials of
    the scores over a chunk. Paper: arXiv 2501.01005 and the authors' code (state.cuh, scheduler.cuh), whose cost of a
    chunk is 2 rows + tokens. `schedule` divides the rows into chunks of at most a worker's share of all pages and hands
    them out, longest first, to whoever has the least to do; `run` is one call of `attend_pages` over all chunks, and
    where requests share a prefix `attend_cascade` over the first of each. Deviations: s is a natural logarithm, theirs
    is log2 e times it; partial results have the dtype of q, theirs are float32; a share of pages is not rounded to
    tiles; a chunk goes to one worker with all its heads; the first tokens of a request are read by `attend` in one
    piece; `attend_pages` shares what it gets out over the device once more, so that workers are those of the plan; no
    templates for variants, which are other rows of this catalogue.

    page: tokens a page (16; 1 will do). workers: thread blocks of the fixed grid (132). prefix: the first tokens of a
    request, which lie in a format of their own, one large block (0: all in one format). decoded: tokens that are
    decoded (16), all others are the first piece. Costs N^2 / 2 pairs, at most workers + B chunks a step and as many
    partial results. Errors: those of `attend_pages`, and ValueError for keys of another length.

    >>> engine, x = FlashInfer(Dims(2, 8), page=4, workers=3), torch.randn(2, 2, 40, 8)
    >>> engine(x, x, x).shape
    torch.Size([2, 2, 40, 8])
    >>> [(chunk.request, chunk.tokens, chunk.worker) for chunk in engine.schedule(Rows.of(Pages.of(x, x, 4), [40, 9]))]
    [(0, 20, 0), (1, 9, 2), (0, 20, 1)]
    """

    spec = Spec(
        id="flashinfer",
        name="FlashInfer",
        title="FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving",
        paper="2501.01005",
        year=2025,
        family="serving",
        uses=("attend", "attend_pages", "attend_cascade", "merge", "Pages", "Causal"),
    )
    causal = True

    def __init__(self, dims: Dims, *, page: int = 16, workers: int = 132, prefix: int = 0, decoded: int = 16) -> None:
        super().__init__(dims)
        self.page, self.workers = positive("page", page), positive("workers", workers)
        self.prefix, self.decoded = positive("prefix", prefix, least=0), positive("decoded", decoded, least=0)

    def cost(self, tokens: int) -> int:
        """What a chunk of `tokens` keys is taken to cost: loading and leaving the query rows, and each key."""
        return 2 * self.dims.group + tokens

    def schedule(self, rows: Rows) -> list[Chunk]:
        """The rows in chunks, the first ones of all requests first; every page is in one chunk."""
        page, counts = rows.k.shape[2], [b - a for a, b in zip(rows.indptr, rows.indptr[1:], strict=False)]
        most, parts = max(1, -(-sum(counts) // self.workers)), []
        for request, count in enumerate(counts):
            for slot, start in enumerate(range(0, max(1, count), most)):
                stop = min(start + most, count)
                tokens = (stop - start) * page
                if stop == count:
                    tokens -= page - rows.last_page_len[request]
                at = rows.indptr[request]
                parts.append(Chunk(slot, request, at + start, at + stop, tokens if count else 0, 0))
        loads, chunks = [(0, worker) for worker in range(self.workers)], []
        for part in sorted(parts, key=lambda part: -part.tokens):
            load, worker = heapq.heappop(loads)
            heapq.heappush(loads, (load + self.cost(part.tokens), worker))
            chunks.append(part._replace(worker=worker))
        return sorted(chunks)

    def run(self, q: Tensor, rows: Rows, chunks: Sequence[Chunk], prefix: Pages | None = None) -> State:
        """The states of one token a request, q (B, H, 1, D) -> o (B, H, 1, Dv), s (B, H, 1).

        chunks: of `schedule`. prefix: pages of S sequences that B / S requests each continue.
        """
        batch = len(q)
        wide = max(1, *(chunk.stop - chunk.start for chunk in chunks))
        slot, request, start, _, tokens = sent(torch.tensor([chunk[:5] for chunk in chunks]), q).unbind(1)
        at = start[:, None] + torch.arange(wide, device=q.device)
        table = torch.nn.functional.pad(rows.indices, (0, wide))[at]  # what lies behind a chunk is never read

        def part(which: slice) -> Pages:
            return Pages(rows.k, rows.v, table[which], tokens[which].int())

        found = []
        if prefix is not None:
            found.append(attend_cascade(q, prefix, part(slice(batch)), return_lse=True))
        later = slice(0 if prefix is None else batch, None)
        if len(chunks[later]):
            found.append(attend_pages(q[request[later]], part(later), return_lse=True))
        o, s = (torch.cat(each) for each in zip(*found, strict=True))
        slots = 1 + chunks[-1].slot
        each_o, each_s = o.new_zeros(slots, batch, *o.shape[1:]), s.new_full((slots, batch, *s.shape[1:]), -torch.inf)
        each_o[slot, request], each_s[slot, request] = o, s
        return merge(list(zip(each_o, each_s, strict=True)))

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, _, n, _), whole = q.shape, k.shape[2]
        if whole != n:
            raise ValueError(f"k: got {whole} keys for {n} queries; flashinfer reads both from the first on")
        first = max(1, n - self.decoded)
        shared = min(self.prefix, first)
        outputs = [attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], Causal())]
        prefix = Pages.of(k[:, :, :shared], v[:, :, :shared], shared) if shared else None
        pages = Pages.of(k[:, :, shared:first], v[:, :, shared:first], self.page, room=n - first)
        for t in range(first, n):
            new = slice(t, t + 1)
            pages = pages.append(k[:, :, new], v[:, :, new])
            rows = Rows.of(pages, [t + 1 - shared] * batch)
            outputs.append(self.run(q[:, :, new], rows, self.schedule(rows), prefix)[0])
        return torch.cat(outputs, 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return replay(q, k, v, q.shape[2], lambda b, t, held: held)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"page": 3, "workers": 7, "decoded": 11}),
            Case(Dims(3, 5), 23, {"page": 1, "workers": 5, "prefix": 13, "decoded": 6}),
            Case(Dims(4, 4, 1), 19, {"page": 4, "workers": 2, "prefix": 40, "decoded": 18}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"page": 8}

    @claim("Merged over any partition, in any order, states equal one attention; (0, -inf) changes none.")
    def merges(cls) -> Finding:
        (q, k, v), draw, apart = torch.randn(3, 2, 3, 61, 16, dtype=torch.float64), random.Random(0), 0.0
        o, s = attend(q, k, v, return_lse=True)
        nothing, log2e = (torch.zeros_like(o), torch.full_like(s, -torch.inf)), 1 / math.log(2)
        for cuts in range(20):
            keys = torch.randperm(61).tensor_split(sorted(draw.sample(range(1, 61), cuts)))
            states = [nothing, *(attend(q, k[:, :, one], v[:, :, one], return_lse=True) for one in keys)]
            while len(states) > 1:  # any two of them, in either order
                a, b = (states.pop(draw.randrange(len(states))) for _ in range(2))
                states.append(merge([a, b]))
                # The authors' equations, in base 2.
                top = log2e * torch.maximum(a[1], b[1]).nan_to_num(neginf=0.0)
                wa, wb = ((log2e * x[1] - top).exp2()[..., None] for x in (a, b))
                apart = max(apart, _apart(states[-1][0], (wa * a[0] + wb * b[0]) / (wa + wb)))
            apart = max(apart, _apart(states[0][0], o), _apart(states[0][1], s))
        alone, none = merge([(o, s), nothing]), merge([nothing, nothing])
        kept = all(torch.equal(x, y) for x, y in zip((*alone, *none), (o, s, *nothing), strict=True))
        return Finding(
            kept and apart < 61 * torch.finfo(o.dtype).eps * float(v.abs().max()),
            f"{apart:.1e} apart over 20 partitions of 61 keys into 1 to 20 parts, in base e and in base 2",
        )

    @claim("Paged, ragged and cascade layouts agree to rounding, at any page size and with any number of workers.")
    def layouts_agree(cls) -> Finding:
        own, shared, found = [5, 0, 42, 17], 29, list[Tensor]()
        first, rest = torch.randn(2, 1, 2, shared, 16).double(), torch.randn(2, 4, 2, max(own), 16).double()
        whole = torch.cat([first.expand(-1, 4, -1, -1, -1), rest], 3)
        ends = torch.tensor([0, *(shared + n for n in own)]).cumsum(0)
        q = torch.randn(1, 4, int(ends[-1]), 16).double()
        k, v = (torch.cat([x[r, :, : shared + n] for r, n in enumerate(own)], 1)[None] for x in whole)
        ragged = attend(q, k, v, Causal(), cu_seqlens=ends.int())
        q, truth = (x[0][:, ends[1:] - 1].transpose(0, 1)[:, :, None] for x in (q, ragged))
        prefix = Pages.of(first[0], first[1], shared)
        for page in (1, 3, 16, 71):
            paged = Rows.of(Pages.of(whole[0], whole[1], page), [shared + n for n in own])
            tail = Pages.of(rest[0], rest[1], page, torch.tensor(own, dtype=torch.int32))
            found += attend_cascade(q, prefix, tail, return_lse=True)[:1]
            for workers in (1, 5, 64):
                engine = cls(Dims(4, 16, 2), page=page, workers=workers)
                for rows, before in ((paged, None), (Rows.of(tail, own), prefix)):
                    found.append(engine.run(q, rows, engine.schedule(rows), before)[0])
        apart = max(_apart(x, truth) for x in found)
        return Finding(
            apart < 71 * torch.finfo(q.dtype).eps * float(v.abs().max()),
            f"{len(found)} layouts and plans are {apart:.1e} apart from ragged attention, pages of 1 to 71 tokens",
        )

    @claim("Chunks leave no worker more than one chunk above the mean load; whole requests give one several times it.")
    def balances(cls) -> Finding:
        engine, draw, one = cls(Dims(4, 8, 1), workers=16), random.Random(0), torch.zeros(1, 1, 16, 1)
        lengths = [int(16 * draw.paretovariate(0.8)) for _ in range(64)]
        table, counts = torch.zeros(64, -(-max(lengths) // 16), dtype=torch.int32), torch.tensor(lengths)
        chunks = engine.schedule(Rows.of(Pages(one, one, table, counts), lengths))
        pages, tokens = [page for c in chunks for page in range(c.start, c.stop)], sum(c.tokens for c in chunks)
        once = sorted(pages) == list(range(sum(-(-n // 16) for n in lengths))) and tokens == sum(lengths)
        costs = [[engine.cost(c.tokens) for c in chunks if c.worker == worker] for worker in range(16)]
        busiest, mean = max(map(sum, costs)), sum(map(sum, costs)) / 16
        whole = engine.cost(max(lengths)) * 16 / sum(map(engine.cost, lengths))
        return Finding(
            once and busiest < mean + max(map(max, costs)) and busiest / mean < whole and len(chunks) <= 16 + 64,
            f"the busiest of 16 workers has {busiest / mean:.2f} times the mean in {len(chunks)} chunks, and at least "
            f"{whole:.1f} times with 64 requests of up to {max(lengths)} tokens left whole",
        )


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())
