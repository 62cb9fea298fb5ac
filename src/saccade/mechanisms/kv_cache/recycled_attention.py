"""Recycled Attention: most steps attend to the few tokens that the last full step attended to most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.cache import Cached, Policy, Stored, Tokens, Uniform, View
from saccade.cache.rows import sent
from saccade.cache.view import widened
from saccade.contract import Case, Dims, Finding, Spec, claim, replay
from saccade.errors import positive


class Recycles(Policy):
    """Keeps all; a step reads a short list of tokens and itself, and every so often everything.

    The list is the note "recycled" (B, Hkv, K), slots, -1 for none; "query" (B, H, D) is that of the last full step.
    """

    periodic = True

    def __init__(self, budget: float | int, every: int, similarity: float | None) -> None:
        self.budget, self.every, self.similarity = Uniform(budget), every, similarity

    def piece(self, view: View) -> None:
        """The last token of a prompt is a full step."""
        slots = torch.arange(view.there.shape[2], device=view.q.device)  # nothing is dropped: places are positions
        self._recycle(view, torch.where(view.there, slots, -1), view.weights(1)[:, :, 0])
        view.note("query", view.q[:, :, -1])

    @torch.no_grad()
    def select(self, step: Stored) -> Tokens | None:
        due = (step.steps + 1) % self.every == 0
        whole = due and self.similarity is None
        newest = (step.ends - 1)[:, None, None].expand(-1, step.counts.shape[1], 1)
        slots = torch.cat([step.notes("recycled"), newest], -1)
        if due:
            every = step.only()
            apart = self._apart(step)
            if whole or bool(apart.any()):  # by similarity the host waits, once every so many steps
                slots = every if whole else self._mixed(apart, every, slots)
                step.note("query", torch.where(apart[:, None, None], step.q[:, :, 0], step.notes("query")))
        self._recycle(step, slots, self._weights(step, slots))
        return None if whole else Tokens(slots)

    def _apart(self, step: Stored) -> Tensor:
        """Which sequences (G,) ask otherwise than at their last full step; all of them by the plain schedule."""
        if self.similarity is None:
            return torch.ones_like(step.ends, dtype=torch.bool)
        dtype = torch.promote_types(step.q.dtype, torch.float32)
        now, last = (x.flatten(1).to(dtype) for x in (step.q, step.notes("query")))
        return F.cosine_similarity(now, last, dim=-1) < self.similarity

    def _mixed(self, apart: Tensor, every: Tensor, slots: Tensor) -> Tensor:
        """All tokens of some sequences, the list of the others."""
        return torch.where(apart[:, None, None], every, widened(slots, every.shape[2]))

    def _weights(self, step: Stored, slots: Tensor) -> Tensor:
        """Attention of a step's query to some slots (G, Hkv, K): (G, H, K)."""
        keys = step.stored.read(step.stored.pool.k, slots.clamp(min=0), step.rows)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        q = step.grouped(step.q[:, :, 0]).to(dtype)
        scores = torch.einsum("bhgd,bhmd->bhgm", q, keys.to(dtype)) * step.scale
        return scores.masked_fill((slots < 0)[:, :, None], -torch.inf).softmax(-1).flatten(1, 2)

    def _recycle(self, view: View, slots: Tensor, weights: Tensor) -> None:
        """The slots (G, Hkv, M) of the largest weights (G, H, M), the mean over a group, are the list from now on."""
        worth = view.pooled(weights).masked_fill(slots < 0, -1)
        counts = [self.budget.tokens(seen) for seen in view.seen.tolist()]
        best = worth.topk(min(slots.shape[2], max(counts)), -1).indices
        kept = slots.gather(2, best)
        if min(counts) < kept.shape[2]:
            limit = sent(torch.tensor(counts), kept)[:, None, None]
            kept = kept.masked_fill(torch.arange(kept.shape[2], device=kept.device) >= limit, -1)
        view.note("recycled", kept, fill=-1)


class RecycledAttention(Cached):
    """Full attention every few steps; between them attention to the K tokens that it weighed most.

        full step, every S-th:  o = attention to all L tokens;  R = the K tokens of the largest weights
        other steps:            o = attention to R and the new token;  R = the K of these of the largest weights

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). R is one list a key head, by the mean over its query heads;
    the last token of the prompt makes the first. A token that left R is still held, and may return at a full step. With
    a similarity s each S-th step is full only for the sequences whose query, all heads as one vector, has a cosine
    below s to that of their last full step.
    Paper: arXiv 2411.05787, the fixed and the dynamic schedule, read in summaries: neither the paper's
    text nor the authors' code could be had. Deviations: the mean over a group, the new token among those that may leave
    R, full steps counted from the prompt's end, and one vector for the cosine are choices made here. R holds places in
    the cache, not copies: memory is that of L tokens and K integers, theirs of L + K tokens. Not here: their training.
    budget: K, tokens (default 4096), or a part of the tokens so far, which grows with them. every: S (50; with a
    similarity theirs is 5). similarity: s (None: by the schedule alone; theirs 0.8). decoded: tokens that are decoded
    (16). Costs N^2 / 2 pairs of the prompt; a step reads on average (L + (S - 1) K) / S tokens, whose keys are read
    once more for the weights; with a similarity the host waits at each S-th. Errors: ValueError for a budget of 0, and
    for a similarity outside [-1, 1].

    >>> x = torch.randn(1, 2, 40, 8)
    >>> RecycledAttention(Dims(2, 8), budget=6, every=4)(x, x, x).shape
    torch.Size([1, 2, 40, 8])
    """

    spec = Spec(
        id="recycled_attention",
        name="Recycled Attention",
        title="Recycled Attention: Efficient inference for long-context language models",
        paper="2411.05787",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Policy", "Tokens", "Uniform"),
        discrete=True,
        waits="with `similarity`, queries decide which step reads all",
    )

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 4096,
        every: int = 50,
        similarity: float | None = None,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        if similarity is not None and not -1 <= similarity <= 1:
            raise ValueError(f"similarity: got {similarity}; pass a cosine, from -1 to 1, or None")
        self.budget, self.every, self.similarity = budget, positive("every", every), similarity
        self.policy = Recycles(budget, every, similarity)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, d), kv_heads = q.shape, k.shape[1]
        prompt, group = max(1, n - self.decoded), heads // kv_heads
        lists: dict[int, list[list[int]]] = {}
        asked: dict[int, Tensor] = {}

        def renew(b: int, t: int, candidates: list[list[int]]) -> None:
            count = max(1, int(self.budget * (t + 1) + 0.5)) if isinstance(self.budget, float) else self.budget
            lists[b] = []
            for g, seen in enumerate(candidates):
                mean = torch.zeros(len(seen), dtype=q.dtype)
                for h in range(g * group, (g + 1) * group):
                    mean += ((k[b, g, seen] * q[b, h, t]).detach().sum(-1) / d**0.5).softmax(0) / group
                best = sorted(range(len(seen)), key=lambda at: -float(mean[at]))[:count]
                lists[b].append(sorted(seen[at] for at in best))

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            now = q[b, :, t].detach().flatten()
            full = (t - prompt + 1) % self.every == 0
            if full and self.similarity is not None:
                cosine = (now * asked[b]).sum() / (now.square().sum() * asked[b].square().sum()) ** 0.5
                full = float(cosine) < self.similarity
            sets = held if full else [[*row, t] for row in lists[b]]
            if full:
                asked[b] = now
            renew(b, t, sets)
            return [sets[h // group] for h in range(heads)]

        def keep(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            if t == prompt - 1:
                renew(b, t, held)
                asked[b] = q[b, :, t].detach().flatten()
            return held

        return replay(q, k, v, prompt, keep, read)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"budget": 6, "every": 4, "decoded": 13}),
            Case(Dims(2, 6), 29, {"budget": 0.3, "every": 3, "decoded": 11, "similarity": 0.1}, batch=3),
            Case(Dims(3, 4, 1), 17, {"budget": 9, "every": 5, "decoded": 12}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"budget": 1.0}

    def traced(self, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Outputs of the steps (B, H, steps, D), and the first key head's list before each, bool (steps, N)."""
        session, n = self.session(), x[0].shape[2]
        first = self.prompt(n)
        self.read(session, *(part[:, :, :first] for part in x))
        outs, lists = [], torch.zeros(n - first, n, dtype=torch.bool)
        for t in range(first, n):
            listed = session.store(0).notes["recycled"][0, 0]
            lists[t - first, listed[listed >= 0]] = True
            outs.append(self.read(session, *(part[:, :, t : t + 1] for part in x)))
        return torch.cat(outs, 2), lists

    @classmethod
    def drifting(cls) -> tuple[Tensor, Tensor, Tensor]:
        """Queries that ask for one of four topics for 16 steps each; keys (1, 1, 512, 16), those of the prompt
        of topics in turn.
        """
        random = torch.Generator().manual_seed(0)
        topics = 2 * torch.randn(2, 4, 16, generator=random)
        k, v, q = torch.randn(3, 512, 16, generator=random)
        for x, topic in zip((k, v), topics, strict=True):
            x[:448] += topic[torch.arange(448) % 4]
        q[-64:] = 0.3 * q[-64:] + topics[0, torch.arange(64) // 16]
        return q[None, None], k[None, None], v[None, None]

    @claim("Full steps alone, and a budget of all tokens, are full attention.")
    def exact(cls) -> Finding:
        q, k, v = (x[:, :, -96:].double() for x in cls.drifting())
        scores = (q @ k.mT / 4).masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), -torch.inf)
        dense, apart = scores.softmax(-1) @ v, 0.0
        for budget, every in ((8, 1), (96, 50)):
            found = cls(Dims(1, 16), budget=budget, every=every, decoded=64)(q, k, v)
            apart = max(apart, float((found - dense).abs().max() / dense.abs().max()))
        return Finding(apart < 96 * torch.finfo(dense.dtype).eps, f"{apart:.1e} apart")

    @claim(
        "Of S steps one reads all L tokens, the others K and their own; no other token reaches them, and all are held."
    )
    def reads_few(cls) -> Finding:
        q, k, v = cls.drifting()
        recycled = cls(Dims(1, 16), budget=32, every=8, decoded=64)
        _, lists = recycled.traced((q, k, v))
        other = ~lists.any(0) & (torch.arange(512) < 448)  # in no list: NaN there shows where all is read
        marred, _ = recycled.traced((q, k, v.masked_fill(other[:, None], torch.nan)))
        full = marred.isnan().any(-1)[0, 0]
        reads = torch.where(full, torch.arange(449, 513), lists.sum(1) + 1).double().mean()
        mean = (484 + 7 * 33) / 8  # the full ones are the last of each eight, at 484 tokens on average
        holds = full.nonzero()[:, 0].tolist() == list(range(7, 64, 8)) and float(reads) == mean
        return Finding(holds, f"{int(full.sum())} of 64 steps are full; {reads:.1f} tokens a step, of 480.5 on average")

    @claim("A token that left the list returns at a full step, and so the topic of a later query is found again.")
    def returns(cls) -> Finding:
        x, far = cls.drifting(), {}
        dense, _ = cls(Dims(1, 16), budget=512, decoded=64).traced(x)
        for every in (4, 65):
            out, lists = cls(Dims(1, 16), budget=64, every=every, decoded=64).traced(x)
            left = (lists.cumsum(0) > 0) & ~lists
            back = int((left[:-1] & lists[1:]).sum())
            far[every] = (back, float((out - dense).square().mean() / dense.square().mean()))
        holds = far[4][0] > 0 and far[65][0] == 0 and far[4][1] < far[65][1] / 2
        figure = "squared error {1:.2f} with full steps, of which {0} tokens return".format(*far[4])
        return Finding(holds, f"{figure}; {far[65][1]:.2f} and {far[65][0]} without")
