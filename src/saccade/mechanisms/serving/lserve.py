"""LServe: some key heads stream, the others read the pages whose bounds are highest for each query head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.cache import Cached, Policy, Quantized, Session, Stored, Tokens, View
from saccade.cache.rows import sent
from saccade.cache.view import Place, widened
from saccade.contract import Case, Dims, Finding, Spec, claim
from saccade.errors import part, positive
from saccade.where import BlockBand, Causal, Pattern, PerHead, Sinks


class Serves(Policy):
    """Streaming heads drop the page that leaves their window; the others keep all, and a step reads listed pages.

    Notes: "streams" (B, Hkv), which heads stream, on the host; "heads" (B, Hkv), the same heads in the order dense,
    streaming; "low" and "high" (B, dense heads, logical pages, D), the bounds; "pages" (B, dense query heads, K), the
    list of the last selection, -1 for none.
    """

    def __init__(self, engine: LServe) -> None:
        self.engine, self.page = engine, engine.page

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        streams = self.engine.streams(index).repeat_interleave(q.shape[1] // k.shape[1]).tolist()
        each = PerHead([self.engine.stream if head else Causal() for head in streams])
        return attend(q, k, v, each if any(streams) else Causal(), scale=scale)

    def piece(self, view: View) -> Tensor | None:
        streams = self.engine.streams(view.index)
        order = sent(streams.int().argsort(stable=True), view.q)
        view.note("streams", streams.expand(len(view.q), -1))
        view.note("heads", order.expand(len(view.q), -1))
        dense = order[: int((~streams).sum())]
        if len(dense):
            none = order.new_full((len(view.q), len(dense) * view.group, self.engine.pages), -1)
            view.note("pages", none, fill=-1)
            keys = view.k.index_select(1, dense)
            self._widen(view, keys.gather(2, view.at[:, None, :, None].expand(-1, len(dense), -1, keys.shape[3])))
        if len(dense) == len(streams):
            return None
        first = (view.ends[:, None, None] // self.page - self.engine.local // self.page) * self.page
        near = (view.positions < self.engine.sinks) | (view.positions >= first)
        return near | ~sent(streams, near)[:, None]

    def counts(self, view: View) -> Tensor:
        streaming = view.by_seen(self.engine.window)[:, None]
        return torch.where(view.notes("streams"), streaming, view.seen[:, None])

    @torch.no_grad()
    def _widen(self, view: View, keys: Tensor) -> None:
        """Let the bounds hold keys (G, dense heads, N, D) of the tokens that ask."""
        engine, (batch, heads, _, d) = self.engine, keys.shape
        known = "low" in view.stored.notes if isinstance(view, Stored) else False
        width = -(-view.num_seen // engine.page) * (engine.page // engine.logical)
        at = (view.at // engine.logical)[:, None, :, None].expand(-1, heads, -1, d)
        for name, fill, reduce in (("low", torch.inf, "amin"), ("high", -torch.inf, "amax")):
            bounds = view.notes(name) if known else keys.new_empty(batch, heads, 0, d)
            if bounds.shape[2] < width:
                bounds = nn.functional.pad(bounds, (0, 0, 0, width - bounds.shape[2]), value=fill)
            view.note(name, bounds.scatter_reduce_(2, at, keys, reduce), fill)

    @torch.no_grad()
    def bounds(self, step: Stored) -> Tensor:
        """At least q . k of the keys of each page, but for the step's own: (G, dense query heads, pages).

        -inf where there is none.
        """
        low, high = step.notes("low"), step.notes("high")
        heads, dtype = step.notes("heads")[0, : low.shape[1]], torch.promote_types(low.dtype, torch.float32)
        q = step.grouped(step.q[:, :, 0]).index_select(1, heads).to(dtype)
        # Of each channel the larger of two products: that with high where q > 0, with low where q < 0.
        scores = q.clamp(min=0) @ high.to(dtype).mT + q.clamp(max=0) @ low.to(dtype).mT
        begins = torch.arange(low.shape[2], device=low.device) * self.engine.logical
        scores = scores.flatten(1, 2).masked_fill(begins >= step.ends[:, None, None] - 1, -torch.inf)
        return scores.unflatten(2, (-1, self.engine.page // self.engine.logical)).amax(3)

    def _listed(self, step: Stored) -> Tensor:
        """The pages of the highest bounds, and the last: (G, dense query heads, K)."""
        scores, last = self.bounds(step), ((step.ends - 2) // self.page)[:, None, None]
        scores = scores.masked_fill(torch.arange(scores.shape[2], device=last.device) == last, -torch.inf)
        best = scores.topk(min(self.engine.pages - 1, scores.shape[2]), -1)
        pages = best.indices.masked_fill(best.values == -torch.inf, -1)
        return widened(torch.cat([pages, last.expand(-1, pages.shape[1], -1)], 2), self.engine.pages)

    def select(self, step: Stored) -> Tokens | None:
        past, device = step.seen - 1, step.q.device
        streams = step.notes("streams")[0]
        dense = int((~streams).sum())
        if not dense:
            return None
        due = (past % self.engine.every == 0) | (past == step.mine(step.stored.aimed))
        if bool(due.any()):
            pages = self._listed(step)
            if not bool(due.all()):
                pages = torch.where(sent(due, pages)[:, None, None], pages, step.notes("pages"))
            step.note("pages", pages, fill=-1)
        if int(past.max()) <= self.engine.budget:
            return None
        now, every = (step.ends - 1)[:, None, None], torch.arange(self.engine.pages, device=device)
        pages = torch.where(now <= self.engine.budget, every, step.notes("pages"))
        slots = (pages[..., None] * self.page + torch.arange(self.page, device=device)).flatten(2)
        slots = slots.masked_fill((slots < 0) | (slots >= now), -1)
        parts = [torch.cat([slots, now.expand(-1, slots.shape[1], -1)], 2)]
        if dense < len(streams):
            heads = step.notes("heads")[0, dense:]
            lengths = step.lengths[..., None].index_select(1, heads)
            held = torch.arange(int(step.counts[:, streams].max()), device=device)
            held = held.masked_fill(held >= lengths, -1).repeat_interleave(step.group, 1)
            width = max(held.shape[2], parts[0].shape[2])
            parts = [widened(x, width) for x in (*parts, held)]
        place = step.notes("heads")[0].argsort()
        return Tokens(step.grouped(torch.cat(parts, 1)).index_select(1, place).flatten(1, 2))

    def after(self, step: Stored) -> None:
        store, streams = step.stored, step.notes("streams")
        if dense := int((~streams[0]).sum()):
            keys = store.read(store.pool.k, (step.lengths[..., None] - 1).long(), step.rows)
            self._widen(step, keys.index_select(1, step.notes("heads")[0, :dense]))
        over = streams & (step.counts > step.by_seen(self.engine.window)[:, None])
        if bool(over.any()):
            page = torch.full(over.shape, self.engine.sinks // self.page, device=step.q.device)
            store.drop_page(page, step.rows, over)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> None:
        """Heads hold unlike numbers."""


def decoding(
    policy: Policy, dims: Dims, length: int, last: int, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Stored]]:
    """Random tokens, k for v, all but `last` in one piece: the output of each step, and a view with its query."""
    random, session = torch.Generator().manual_seed(0), Session(policy)
    q, k = (
        torch.randn(1, heads, length, dims.head_dim, generator=random, dtype=torch.float64).to(dtype)
        for heads in (dims.num_heads, dims.num_kv_heads)
    )
    for start, stop in itertools.pairwise([0, *range(length - last, length + 1)]):
        o = session.attend(0, *(x[:, :, start:stop] for x in (q, k, k)))
        if start:
            yield o, Stored(session.store(0), Place(), q[:, :, start:stop])


class LServe(Cached):
    """Half of the key heads stream; the others read the pages that may score highest, listed a query head.

        streaming: o_i = attention to j with floor(j / P) < sinks / P or floor(i / P) - floor(j / P) <= local / P
        dense:     prompts causal; a step reads itself and its list of K = max(3, budget / P) pages: the last, and
                   of the others the K - 1 of the largest   max over logical pages of sum_c max(q_c low_c, q_c high_c)
        low, high: minimum and maximum of the keys of a logical page, by channel

    q (B, layers H, N, D), k, v (B, layers Hkv, N, D) -> o (B, layers H, N, D), one layer after another. P: tokens a
    page. Up to budget cached tokens a step reads all. A list is made at the first step after a piece, and when the
    number of cached tokens is a multiple of `every`, from those; until the next it stays, and what is cached in pages
    that opened meanwhile waits, but for the token of the step itself. alpha (layers Hkv,): DuoAttention's gates, to be
    loaded; those below one quantile over all layers stream. Paper: arXiv 2502.14866, and the authors' code
    (mit-han-lab/omniserve, decoding_attention.py), whose selector counts the cached tokens without the step's own.

    Deviations: up to the budget the authors' code reuses its list too, so that a full budget is not quite dense; here
    it is. Equal gates stream from the last on. Both windows count whole blocks of a page before the query's own, where
    the authors' prompt has blocks of its kernel; a later piece of a prompt meets what is held. Their lists are those of
    the longest sequence of a batch, here each has its own. Keys and values are as they came: `Quantized(lserve.policy,
    8)` is their 8-bit cache, with a scale a group for theirs a tensor, and bounds are of unquantised keys either way.
    Weights and activations in few bits are the model's.

    streaming: part of the key heads that stream, a quantile (default 0.5). budget: tokens (4096). page: P (64).
    logical: tokens a logical page (16). every: 4. sinks, local: of a step (128, 256). prefill_sinks, prefill_local: of
    a prompt (128, 8192). decoded: tokens that are decoded (16). num_layers: layers that share the quantile (1). Costs
    N^2 / 2 pairs a dense head of the prompt, N (prefill_sinks + prefill_local) a streaming one; a step reads budget + 1
    tokens a dense query head and sinks + local + P a streaming head, and every few steps the bounds, 2 / logical of
    the dense heads' keys. Errors: ValueError for a share outside [0, 1], and for sizes that are no multiples.

    >>> x = torch.randn(1, 4, 60, 8)
    >>> LServe(Dims(4, 8), budget=12, page=4, logical=2, sinks=4, local=8)(x, x, x).shape
    torch.Size([1, 4, 60, 8])
    """

    spec = Spec(
        id="lserve",
        name="LServe",
        title="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
        paper="2502.14866",
        year=2025,
        family="serving",
        uses=("Cached", "Policy", "Tokens", "attend", "PerHead", "Sinks", "BlockBand"),
        discrete=True,
        waits="trained gates decide which heads stream",
    )
    per_head = True
    policy: Serves

    def __init__(
        self,
        dims: Dims,
        *,
        streaming: float = 0.5,
        budget: int = 4096,
        page: int = 64,
        logical: int = 16,
        every: int = 4,
        sinks: int = 128,
        local: int = 256,
        prefill_sinks: int = 128,
        prefill_local: int = 8192,
        decoded: int = 16,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        self.streaming = part("streaming", streaming, "the part of the key heads that stream")
        self.every, self.page = positive("every", every), positive("page", page)
        self.logical, self.budget = positive("logical", logical), positive("budget", budget)
        self.sinks, self.local = positive("sinks", sinks, least=0), positive("local", local)
        self.prefill_sinks = positive("prefill_sinks", prefill_sinks, least=0)
        self.prefill_local = positive("prefill_local", prefill_local, least=0)
        if page % logical:
            raise ValueError(f"logical: got {logical} tokens of a page of {page}; pass a divisor")
        for name in ("budget", "sinks", "local", "prefill_sinks", "prefill_local"):
            if getattr(self, name) % page:
                raise ValueError(f"{name}: got {getattr(self, name)}; pass a multiple of the page, {page} tokens")
        self.pages = max(3, budget // page)  # K
        self.alpha = nn.Parameter(torch.ones(dims.num_kv_heads))
        self.policy = Serves(self)

    @property
    def stream(self) -> Pattern:
        """What a streaming head of a prompt sees."""
        near = BlockBand(self.page, self.prefill_local // self.page + 1)
        return Causal() & (Sinks(self.prefill_sinks) | near if self.prefill_sinks else near)

    def window(self, seen: int) -> int:
        """Tokens of `seen` that a streaming head holds for the next one."""
        first = (seen // self.page - self.local // self.page) * self.page
        return seen - max(0, first - self.sinks)

    def streams(self, index: int | None = None) -> Tensor:
        """Which key heads of a layer stream, of all layers by default: bool, on the host, which waits for the gates."""
        gates = self.alpha.detach().float().cpu()
        heads = len(gates)
        count = heads if self.streaming == 1 else math.ceil(self.streaming * (heads - 1))
        found = torch.zeros(heads, dtype=torch.bool)
        found[gates.argsort(descending=True, stable=True)[heads - count :]] = True
        return found if index is None else found.chunk(self.num_layers)[index]

    def limit(self, prompt: int) -> int:
        streaming = int(self.streams().sum())
        return (self.dims.num_kv_heads - streaming) * prompt + streaming * self.window(prompt)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, d), kv_heads, page = q.shape, k.shape[1], self.page
        prompt, group = max(1, n - self.decoded), heads // kv_heads
        gates, full = dict(self.named_parameters())["alpha"].tolist(), max(3, self.budget // page)
        ranked = sorted(range(kv_heads), key=lambda g: -gates[g])
        few = kv_heads if self.streaming == 1 else math.ceil(self.streaming * (kv_heads - 1))
        streams = set(ranked[kv_heads - few :])

        def listed(query: Tensor, keys: Tensor) -> list[int]:
            scores = []
            for first in range(0, len(keys), page):
                parts = keys[first : first + page].split(self.logical)
                bounds = [[max(c * x.min(), c * x.max()) for c, x in zip(query, p.T, strict=True)] for p in parts]
                scores.append(max(map(sum, bounds)))
            old = sorted(range(len(scores) - 1), key=lambda at: -scores[at])
            return [*old[: full - 1], len(scores) - 1]

        rows = []
        for b in range(batch):
            for h in range(heads):
                g, pages = h // group, list[int]()
                for t in range(n):
                    step = t >= prompt
                    if g in streams:
                        sinks, local = (self.sinks, self.local) if step else (self.prefill_sinks, self.prefill_local)
                        seen = [j for j in range(t + 1) if j < sinks or t // page - j // page <= local // page]
                    else:
                        if t == prompt or (step and t % self.every == 0):
                            pages = listed(q[b, h, t].detach(), k[b, g, :t].detach())
                        whole = not step or t <= self.budget
                        seen = [j for j in range(t + 1) if whole or j == t or j // page in pages]
                    scores = (k[b, g, seen] * q[b, h, t]).sum(-1) / d**0.5
                    rows.append((scores.softmax(-1)[:, None] * v[b, g, seen]).sum(0))
        return torch.stack(rows).view(batch, heads, n, -1)

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"page": 4, "logical": 2, "prefill_sinks": 4, "prefill_local": 8, "sinks": 4, "local": 4}
        return [
            Case(Dims(4, 8, 2), 47, {**small, "budget": 16, "decoded": 13}),
            Case(Dims(6, 4, 3), 41, {**small, "budget": 12, "sinks": 0, "every": 3, "num_layers": 3, "decoded": 17}),
            Case(Dims(7, 4), 43, {**small, "budget": 20, "every": 3, "decoded": 25}, batch=1),
            Case(Dims(3, 4, 1), 31, {**small, "budget": 4, "streaming": 0.0, "logical": 4, "decoded": 9}, batch=1),
            Case(Dims(2, 4), 37, {**small, "budget": 8, "streaming": 1.0, "prefill_sinks": 0, "decoded": 11}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int]:
        return {"streaming": 0.0, "budget": 64 * -(-length // 64)}

    @claim("The score of a page is at least every q . k of its keys, and never above the bound of the page as a whole.")
    def bounds_products(cls) -> Finding:
        dims, above, below = Dims(4, 16, 2), list[Tensor](), list[Tensor]()
        fine, coarse = (cls(dims, streaming=0.0, budget=128, logical=each).policy for each in (16, 64))
        for (_, a), (_, b) in zip(*(decoding(each, dims, 600, 40) for each in (fine, coarse)), strict=True):
            products = (a.k[:, :, :-1].repeat_interleave(2, 1) @ a.q.mT)[..., 0].split(64, 2)
            found = fine.bounds(a)[..., : len(products)]
            above.append((found - torch.stack([x.amax(2) for x in products], 2)).flatten())
            below.append((coarse.bounds(b)[..., : len(products)] - found).flatten())
        near = dims.head_dim * torch.finfo(a.k.dtype).eps * float(a.k.norm(dim=-1).max()) ** 2
        figure = f"on average {float(torch.cat(above).mean()):.1f} above the largest product, "
        figure += f"{float(torch.cat(below).mean()):.1f} below the page's bound"
        return Finding(min(float(x.min()) for x in (*above, *below)) >= -near, figure)

    @claim("Beyond the budget a step reads as many tokens at any length, at most budget + 1 a dense query head.")
    def constant(cls) -> Finding:
        engine, most = cls(Dims(4, 8, 2), budget=256), dict[int, list[int]]()
        for length in (700, 1400, 2800):
            chosen = [engine.policy.select(step) for _, step in decoding(engine.policy, engine.dims, length, 70)]
            most[length] = torch.cat([(x.slots >= 0).sum(-1) for x in chosen if x]).amax(0).tolist()
        same = len({tuple(x) for x in most.values()}) == 1
        dense = most[2800][0]
        return Finding(same and dense == 257, f"{dense} tokens a dense head, of {', '.join(map(str, most))}")

    @claim("Without streaming heads, and with a budget of all tokens, it is attention to all pages, to the last bit.")
    def paged(cls) -> Finding:
        class All(Policy):
            page = 64

        engine = cls(Dims(4, 16, 2), streaming=0.0, budget=384)
        runs = zip(*(decoding(each, engine.dims, 330, 30) for each in (engine.policy, All())), strict=True)
        same = sum(torch.equal(ours, theirs) for (ours, _), (theirs, _) in runs)
        return Finding(same == 30, f"{same} of 30 steps bit for bit")

    @claim("In 8 bits pages take less than 0.65 of the memory of 16, and the same ones are listed.")
    def in_few_bits(cls) -> Finding:
        engine, far, same = cls(Dims(4, 64, 2), budget=256), 0.0, 0
        policies = (engine.policy, Quantized(engine.policy, 8, residual=64))
        runs = (decoding(each, engine.dims, 2500, 40, torch.bfloat16) for each in policies)
        for (o, plain), (coded_o, coded) in zip(*runs, strict=True):
            far = max(far, float((o - coded_o).abs().max() / o.abs().max()))
            same += torch.equal(plain.notes("pages"), coded.notes("pages"))
        share = coded.stored.pool.nbytes_in_use / plain.stored.pool.nbytes_in_use
        figure = f"{share:.2f} of the memory, outputs at most {far:.1%} off, {same} of 40 lists the same"
        return Finding(same == 40 and share < 0.65, figure)
