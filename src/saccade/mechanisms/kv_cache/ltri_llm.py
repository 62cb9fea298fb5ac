"""Ltri-LLM: spans of text are found as triangles of local attention, and whole spans are recalled for a query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cache import Cached, Reader, Stored, Tokens, View, budgeted
from saccade.cache.view import widened
from saccade.contract import Case, Dims, Finding, Spec, claim, replay, tokens_of
from saccade.errors import positive


def local_maps(q: Tensor, k: Tensor, known: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (G, windows, w, w): what tokens of a window give each other, summed over heads, of attention to it and the one
    before; there (windows, w): not filled up. q (G, H, n, D); k (G, Hkv, w + n, D), known (G, w + n): from w before.
    """
    (batch, heads, n, _), w, count = q.shape, window, -(-q.shape[2] // window)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (pad(x.to(dtype), (0, 0, 0, -n % w)).unflatten(2, (-1, w)) for x in (q, k))
    k = torch.cat([k[:, :, :-1], k[:, :, 1:]], 3)
    known = pad(known, (0, -n % w)).unflatten(1, (-1, w))[:, :-1, None].expand(-1, -1, w, -1)
    own = torch.ones(w, w, dtype=torch.bool, device=q.device).tril()
    seen = torch.cat([known, own.expand(batch, count, -1, -1)], 3)
    total = q.new_zeros(batch, count, w, w)
    for head in range(heads):  # a map of all heads would not fit
        scores = q[:, head] @ k[:, head * k.shape[1] // heads].transpose(2, 3) * scale
        total += scores.masked_fill(~seen, -torch.inf).softmax(-1)[..., w:]
    there = (torch.arange(count * w, device=q.device) < n).view(-1, w)
    return total.masked_fill(~there[:, :, None], 0), there


def triangles(maps: Tensor, there: Tensor, theta: float | None, longest: int) -> Tensor:
    """S (..., w, longest): of the span that begins at x and has 1, 2, .. tokens; -inf where it leaves the window."""
    w = maps.shape[-1]
    inside = there[..., :, None] & torch.ones(w, w, dtype=torch.bool, device=maps.device).tril()
    mean = maps.sum((-2, -1)) / inside.sum((-2, -1)) if theta is None else maps.new_full((), theta)
    over = (maps - mean[..., None, None]).masked_fill(~inside, 0)
    sums = over.flip(-1).cumsum(-1).flip(-1).cumsum(-2)  # (y, x): rows up to y, columns from x on
    x = torch.arange(w, device=maps.device)
    y = x[:, None] + torch.arange(longest, device=maps.device)
    last = there.sum(-1)[..., None, None]
    return sums[..., y.clamp(max=w - 1), x[:, None]].masked_fill(y >= last, -torch.inf)


def spans(scores: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """(begins (B, w) bool, score (B, w)) of the best spans that share no token, and of the gaps between them (0).

    scores (B, w, longest): `triangles`. there (B, w).
    """
    (batch, w, longest), device = scores.shape, scores.device
    x, size = torch.arange(w, device=device), torch.arange(1, longest + 1, device=device)
    owner = torch.full((batch, w), -1, device=device)
    found = torch.zeros(batch, w, dtype=scores.dtype, device=device)
    scores = scores.masked_fill(scores <= 0, -torch.inf)
    while True:
        best, at = scores.flatten(1).max(-1, keepdim=True)
        more = best > -torch.inf
        if not bool(more.any()):  # how many there are, the maps say: the host waits for each, a few a window
            break
        start, stop = at // longest, at // longest + at % longest + 1
        mine = (x >= start) & (x < stop) & more
        owner = torch.where(mine, start, owner)
        found = torch.where((x == start) & more, best, found)
        shares = (x[:, None] < stop[..., None]) & (x[:, None] + size > start[..., None]) & more[..., None]
        scores = scores.masked_fill(shares, -torch.inf)
    free = owner < 0
    before = torch.where(free, -1, x).cummax(1).values  # the last token of a span before a gap
    begins = torch.where(free, (x - before - 1) % longest == 0, owner == x)
    begins[:, 0] = True
    return begins & there, found


class Recall(Reader):
    """Keeps all; a step reads sinks, recent tokens and the spans of most votes."""

    periodic = True

    def __init__(self, ltri: LtriLLM) -> None:
        super().__init__(ltri.budget)
        self.ltri = ltri

    def queries(self, view: View) -> Tensor:
        """Of the newest tokens that are in no span yet (G, H, n, D)."""
        late = view.steps % self.ltri.window if isinstance(view, Stored) else 0
        return torch.cat([view.notes("queries")[:, :, :late], view.q], 2) if late else view.q

    def piece(self, view: View) -> None:
        self.enter(view, self.queries(view))

    def after(self, step: Stored) -> None:
        q = self.queries(step).detach()
        if q.shape[2] == self.ltri.window:
            self.enter(step, q)
        step.note("queries", q)

    @torch.no_grad()
    def enter(self, view: View, q: Tensor) -> None:
        """Find the spans of the newest tokens, and enter them into the index."""
        ltri, n = self.ltri, q.shape[2]
        at = view.ends[:, None] - n + torch.arange(-ltri.window, n, device=q.device)  # of a window before them, too
        keys = view.k.take_along_dim(at.clamp(min=0)[:, None, :, None], 2)
        maps, there = local_maps(q, keys, at >= 0, ltri.window, view.scale)
        at, keys = at[:, ltri.window :], keys[:, :, ltri.window :]
        rows = there.expand(len(maps), -1, -1).flatten(0, 1)
        found = spans(triangles(maps.flatten(0, 1), rows, ltri.theta, ltri.longest), rows)
        begins, score = (x.view(len(keys), -1)[:, :n] for x in found)
        label = begins.cumsum(1) - 1
        index = self.vectors(keys, label, maps.sum(2).flatten(1)[:, :n], score, begins.sum(1))
        exists = torch.arange(index.shape[2], device=q.device) < begins.sum(1, keepdim=True)
        votes = torch.zeros_like(exists, dtype=index.dtype)
        if isinstance(view, Stored):
            old = [view.notes(name) for name in ("index", "exists", "votes")]
            label = self.labels(view).scatter(1, at, label + old[0].shape[2])
            index = torch.cat([old[0], index], 2)
            exists, votes = (torch.cat(pair, 1) for pair in zip(old[1:], (exists, votes), strict=True))
        view.note("label", label, fill=-1)
        view.note("index", index)
        view.note("exists", exists)
        view.note("votes", votes)

    def vectors(self, k: Tensor, label: Tensor, drawn: Tensor, score: Tensor, count: Tensor) -> Tensor:
        """(G, Hkv, S, 1 + dynamic, D): the mean key of each span, then keys that drew most attention."""
        (batch, heads, _, d), dynamic, device = k.shape, self.ltri.dynamic, k.device
        s = int(count.max())  # once a window; the index has no more room than it needs
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        of_heads = label[:, None, :, None].expand(-1, heads, -1, d)
        size = torch.zeros(batch, s, dtype=torch.int64, device=device).scatter_add(1, label, torch.ones_like(label))
        mean = k.new_zeros(batch, heads, s, d).scatter_add(2, of_heads, k) / size.clamp(min=1)[:, None, :, None]
        exists = torch.arange(s, device=device) < count[:, None]
        score = drawn.new_zeros(batch, s).scatter_add(1, label, score)  # 0 but where a span begins
        sides = pad(score, (1, 1)), pad(exists.to(score), (1, 1))
        total, number = (x[:, :-2] + x[:, 2:] for x in sides)
        sure = (score / (score + total / number.clamp(min=1))).nan_to_num(0)  # of a gap between gaps: not at all
        many = (dynamic * (1 - sure) + 0.5).long()
        order = (-drawn).argsort(dim=1, stable=True)
        # Span by span, in each those first that drew most.
        order = order.gather(1, label.gather(1, order).argsort(dim=1, stable=True))
        mine = label.gather(1, order)
        rank = torch.arange(order.shape[1], device=device) - (size.cumsum(1) - size).gather(1, mine)
        keep = rank < many.gather(1, mine).clamp(max=dynamic)
        place = torch.where(keep, mine * dynamic + rank, s * dynamic)
        picked = torch.full((batch, s * dynamic + 1), -1, device=device).scatter(1, place, order)[:, :-1]
        chosen = k.take_along_dim(picked.clamp(min=0)[:, None, :, None], 2).unflatten(2, (s, dynamic))
        static = mean[:, :, :, None]
        chosen = torch.where((picked < 0).view(batch, 1, s, dynamic, 1), static, chosen)
        return torch.cat([static, chosen], 3)

    def labels(self, step: Stored) -> Tensor:
        """(G, M): which index vectors are of the span of each token, -1 for none yet."""
        return widened(step.notes("label"), step.num_seen)

    @torch.no_grad()
    def select(self, step: Stored) -> Tokens:
        ltri, ends, index = self.ltri, step.ends[:, None], step.notes("index")
        q = step.grouped(step.q[:, :, 0].to(index.dtype))
        scores = torch.einsum("bhgd,bhsvd->bhgsv", q, index).amax(-1).flatten(1, 2) * step.scale
        p = scores.masked_fill(~step.notes("exists")[:, None], -torch.inf).softmax(-1)
        votes = ltri.persist * step.notes("votes") + (p if ltri.lead is None else p * ltri.lead.to(p)[:, None]).sum(1)
        step.note("votes", votes)
        place = votes.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        label, n, at = self.labels(step), step.num_seen, torch.arange(step.num_seen, device=ends.device)
        order = -(place.gather(1, label.clamp(min=0)) * n + at).double()  # span by span, in order of positions
        order = torch.where(at < ltri.sinks, n - at, order)
        order = torch.where(at >= ends - ltri.recent, n + at + 1, order).masked_fill(at >= ends, -torch.inf)
        return Tokens(self.best(step, order)[:, None].expand(-1, step.stored.kv_heads, -1))


class LtriLLM(Cached):
    """Spans of text, found where local attention is dense, are recalled whole by the votes of all heads.

        S_xy = sum_(x <= j <= i <= y) (A_ij - theta),   A: attention within a window, summed over heads
        spans: the largest S_xy > 0, again and again, of those that share no token with one taken; gaps are spans, too
        index of a span: its mean key, and the round(dynamic (1 - S / (S + mean S beside it))) keys that drew most of A
        u_s = sum_h lead_h softmax_s(max_(index of s) q_h . k / sqrt(D)) + persist u_s of the step before
        o = attention over K tokens: sinks, recent ones, and those of the spans of the largest u

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); one list for all heads of a layer. All tokens are held; what
    a step reads is resident, the rest may lie elsewhere. Paper: arXiv 2412.04757, section 3, without public code; what
    is known of it here are triangles and the suppression of spans that overlap better ones, an index that lies apart,
    with more vectors for spans that stand out less from those beside them, votes of heads in which retrieval heads
    lead, and recalled spans that stay. The formulas are ours. Deviations: prompts are read densely, where the paper
    streams them through index and window; spans overlap not at all, where the paper admits some intersection over
    union; no span crosses a window; the last span that is recalled is cut where K is full. What is decoded enters the
    index a window at a time, and is recent until then.

    budget: K, or a part of the tokens seen, rounded up (default 4096). window: w of A, whose queries see as many tokens
    before it (256). theta: what an entry of A must exceed (None: the mean of its window). longest: tokens a span (64).
    dynamic: most further index vectors (3). persist: part of the votes that stays a step (0.5). lead: weight of each
    query head, largest for retrieval heads (None: all 1). sinks: 128. recent: last tokens that are read (1024).
    decoded: tokens that are decoded (16). Costs N^2 / 2 pairs of the prompt, and N w of its maps, made a head at a
    time; a step compares its query with up to 1 + dynamic vectors a span, sorts L numbers and reads K tokens; w queries
    are held. Errors: ValueError for a budget of 0, or a number that does not hold sinks and recent tokens, a recent
    below window, a persist outside [0, 1), or as many weights as there are no heads.

    >>> x = torch.randn(1, 2, 60, 8)
    >>> LtriLLM(Dims(2, 8), budget=24, window=8, longest=4, sinks=2, recent=8)(x, x, x).shape
    torch.Size([1, 2, 60, 8])
    """

    spec = Spec(
        id="ltri_llm",
        name="Ltri-LLM",
        title="Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention "
        "Pattern",
        paper="2412.04757",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Reader", "Tokens"),
        discrete=True,
        waits="a map says how many spans there are",
    )

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 4096,
        window: int = 256,
        theta: float | None = None,
        longest: int = 64,
        dynamic: int = 3,
        persist: float = 0.5,
        lead: Sequence[float] | None = None,
        sinks: int = 128,
        recent: int = 1024,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        self.sinks, self.recent = positive("sinks", sinks, least=0), positive("recent", recent)
        if isinstance(budgeted("budget", budget), int) and budget < sinks + recent:
            raise ValueError(
                f"budget: got {budget} tokens, which does not hold {sinks} sinks and {recent} recent tokens; pass at "
                f"least {sinks + recent}, or fewer of those"
            )
        if recent < window:
            raise ValueError(f"recent: got {recent}; pass at least the window, {window}, whose spans are not known yet")
        if not 0 <= persist < 1:
            raise ValueError(f"persist: got {persist}; pass a number in [0, 1), the part of the votes that stays")
        if lead is not None and len(lead) != dims.num_heads:
            raise ValueError(f"lead: got {len(lead)} weights for {dims.num_heads} query heads; pass one a head")
        self.budget, self.theta, self.persist = budget, theta, persist
        self.window, self.longest = positive("window", window), min(window, positive("longest", longest))
        self.dynamic, self.per_head = positive("dynamic", dynamic), lead is not None
        self.lead: Tensor | None
        self.register_buffer("lead", None if lead is None else torch.tensor(lead))
        self.policy = Recall(self)

    def by_the_book(self, a: list[list[float]]) -> list[tuple[int, int, float]]:
        """(first, last + 1, S) of the spans of one window, from its map."""
        n = len(a)
        entries = [a[i][j] for i in range(n) for j in range(i + 1)]
        theta = sum(entries) / len(entries) if self.theta is None else self.theta
        found, free = [], set(range(n))
        every = [(x, y) for x in range(n) for y in range(x, min(n, x + self.longest))]
        triangle = [sum(a[i][j] - theta for i in range(x, y + 1) for j in range(x, i + 1)) for x, y in every]
        for score, (x, y) in sorted(zip(triangle, every, strict=True), reverse=True):
            if score > 0 and free.issuperset(range(x, y + 1)):
                free -= set(range(x, y + 1))
                found.append((x, y + 1, score))
        for x in range(n):
            if x in free and x - 1 not in free:
                end = next(y for y in range(x, n + 1) if y not in free)
                found += [(at, min(end, at + self.longest), 0.0) for at in range(x, end, self.longest)]
        return sorted(found)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, d), group = q.shape, q.shape[1] // k.shape[1]
        prompt, lead = max(1, n - self.decoded), [1.0] * heads if self.lead is None else self.lead.tolist()
        queries, keys = q.detach(), k.detach()
        places: list[list[list[int]]] = [[] for _ in range(batch)]  # the tokens of every span
        vectors: list[list[list[Tensor]]] = [[] for _ in range(batch)]  # of every span and key head
        before: list[list[float]] = [[] for _ in range(batch)]

        def enter(b: int, first: int, stop: int) -> None:
            known: list[tuple[float, list[int]]] = []
            for low in range(first, stop, self.window):
                size = min(self.window, stop - low)
                a = [[0.0] * size for _ in range(size)]
                for h in range(heads):
                    for i in range(size):
                        near = keys[b, h // group, max(0, low - self.window) : low + i + 1]
                        row = (near @ queries[b, h, low + i] / d**0.5).softmax(-1)[-i - 1 :]
                        a[i][: i + 1] = [x + y for x, y in zip(a[i], row.tolist(), strict=False)]
                for x, y, score in self.by_the_book(a):
                    weight = [sum(column) for column in zip(*a, strict=True)]
                    drawn = sorted(range(x, y), key=[-z for z in weight].__getitem__)
                    known.append((score, [low + j for j in drawn]))
                    places[b].append(list(range(low + x, low + y)))
            for s, (score, drawn) in enumerate(known):
                sides = [known[at][0] for at in (s - 1, s + 1) if 0 <= at < len(known)]
                beside = sum(sides) / len(sides) if sides else 0.0
                sure = score / (score + beside) if score + beside else 0.0
                many = drawn[: int(self.dynamic * (1 - sure) + 0.5)]
                vectors[b].append([torch.cat([x[drawn].mean(0, True), x[many]]) for x in keys[b]])

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            if t == prompt:
                enter(b, 0, prompt)
            elif (t - prompt) % self.window == 0:
                enter(b, t - self.window, t)
            votes = [self.persist * u for u in before[b]] + [0.0] * (len(places[b]) - len(before[b]))
            for h in range(heads):
                best = [(one[h // group] @ queries[b, h, t]).max() / d**0.5 for one in vectors[b]]
                votes = [u + lead[h] * p for u, p in zip(votes, torch.stack(best).softmax(-1).tolist(), strict=True)]
            before[b] = votes
            count = tokens_of(self.budget, t + 1)
            order = [*range(t, max(-1, t - self.recent), -1), *range(min(self.sinks, t + 1))]
            for s in sorted(range(len(votes)), key=lambda s: -votes[s]):
                order += places[b][s]
            return [sorted(list(dict.fromkeys(order))[:count])] * heads

        return replay(q, k, v, prompt, lambda b, t, held: held, read)

    @classmethod
    def cases(cls) -> list[Case]:
        one = {"budget": 0.5, "window": 6, "longest": 5, "sinks": 2, "recent": 7, "decoded": 11, "lead": (1, 3, 2, 1)}
        two = {"budget": 14, "window": 9, "longest": 4, "sinks": 1, "recent": 9, "decoded": 19, "theta": 0.3}
        return [
            Case(Dims(4, 8, 2), 45, one),
            Case(Dims(3, 4), 37, {**two, "dynamic": 2, "persist": 0.8}, batch=1),
            Case(Dims(2, 4), 29, {**two, "budget": 0.25, "window": 4, "sinks": 3, "recent": 6}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int]:
        return {"budget": 1.0, "window": 8, "longest": 4, "recent": 8}

    @claim("On block-triangular attention, theta between the means inside and outside finds the planted borders.")
    def finds_borders(cls) -> Finding:
        sizes = [9, 4, 14, 7, 11, 5, 14]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        noise = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(0))
        maps = ((owner[:, None] == owner) + noise).tril()  # means 1.5 and 0.5
        there = torch.ones(8, 64, dtype=torch.bool)
        begins, _ = spans(triangles(maps, there, 1.0, 16), there)
        truth = torch.diff(owner, prepend=torch.tensor([-1])) > 0
        hit, all_of = int((begins & truth).sum()), 8 * len(sizes)
        return Finding(bool((begins == truth).all()), f"{hit} of {all_of} borders, {int(begins.sum()) - hit} others")

    @classmethod
    def needle(cls, persist: float, steps: int = 40) -> tuple[list[int], list[int]]:
        """Tokens that each step reads, and those among them of 6 of 2048 tokens which the first query asks for."""
        random = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 2, 2048 + steps, 16, generator=random)
        where, asked = slice(700, 706), 5 * torch.nn.functional.normalize(torch.randn(16, generator=random), dim=0)
        q[:, :, where], k[:, :, where], q[:, :, 2048] = asked, asked, asked
        counts, hits = [], []

        class Counted(Recall):
            def select(self, step: Stored) -> Tokens:
                chosen = super().select(step).slots[0, 0]
                counts.append(int((chosen >= 0).sum()))
                hits.append(int(((chosen >= 700) & (chosen < 706)).sum()))
                return Tokens(chosen.expand(1, 2, -1))

        ltri = cls(Dims(2, 16), budget=96, window=32, longest=8, sinks=4, recent=32, persist=persist)
        ltri.policy, ltri.decoded = Counted(ltri), steps
        ltri(q, k, k)
        return counts, hits

    @claim("What is resident stays within the budget, whatever the length, and the span of a needle is recalled.")
    def recalls(cls) -> Finding:
        counts, hits = cls.needle(0.5)
        return Finding(
            {*counts} == {96} and hits[0] == 6, f"{max(counts)} of 2088 tokens, {hits[0]} of 6 of the needle"
        )

    @claim("Evidence that was recalled stays for the queries after, which do not ask for it.")
    def persists(cls) -> Finding:
        hits = [sum(found[1:]) / len(found[1:]) / 6 for _, found in (cls.needle(0.9, 8), cls.needle(0.0, 8))]
        return Finding(
            hits[0] > 0.9 > hits[1] + 0.4, f"{hits[0]:.0%} of the needle over 7 steps, {hits[1]:.0%} without"
        )
