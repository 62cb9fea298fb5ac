"""PagedEviction: a prompt is cut to a budget before it is paged; then a page that fills up frees a whole one."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from saccade.cache import Cached, Policy, Stored, View, budgeted, top
from saccade.cache.rows import of_rows, sent
from saccade.contract import Case, Dims, Finding, Held, Spec, claim, replay
from saccade.errors import positive


class WholePages(Policy):
    """Drops tokens of a prompt, and later whole pages, of small ||v|| / ||k||; see `PagedEviction`."""

    def __init__(self, budget: float | int, page: int = 16) -> None:
        self.budget, self.page = budgeted("budget", budget), positive("page", page)
        if isinstance(budget, int) and budget % page:
            raise ValueError(
                f"budget: got {budget} tokens, which do not fill pages of {page}; pass a multiple of `page`, or a float"
            )

    def capacity(self, seen: int) -> int:
        """C once `seen` tokens were read."""
        if isinstance(self.budget, int):
            return self.budget
        return self.page * math.ceil(self.budget * seen / self.page)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> int:
        return min(seen, self.capacity(seen))

    def scores(self, view: View) -> Tensor:
        """s (G, M) of tokens that all key heads hold; what is no number stays, so that it shows."""
        dtype = torch.promote_types(view.k.dtype, torch.float32)
        k, v = (x.detach().to(dtype).norm(dim=-1) for x in (view.k, view.v))
        return (v / k.clamp(min=torch.finfo(dtype).tiny)).mean(1).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def piece(self, view: View) -> Tensor:
        scores = self.scores(view).masked_fill(~view.there[:, 0], -torch.inf)
        return top(scores, self.counts(view)[:, 0])[:, None].expand(view.there.shape)

    def counts(self, view: View) -> Tensor:
        return torch.minimum(view.counts, view.by_seen(lambda seen: [self.tokens(seen)]))

    def after(self, step: Stored) -> None:
        held = step.counts[:, 0].tolist()
        full = [
            row
            for row, (count, seen) in enumerate(zip(held, step.seen.tolist(), strict=True))
            if count % self.page == 0 and count > self.capacity(seen)
        ]
        if not full:
            return
        scores = self.scores(step)
        means = torch.nn.functional.pad(scores, (0, -scores.shape[1] % self.page)).unflatten(1, (-1, self.page)).mean(2)
        newest = sent(torch.tensor([[held[row] // self.page - 1] for row in full]), means)
        protected = torch.arange(means.shape[1], device=means.device) >= newest
        page = of_rows(means, full).masked_fill(protected, torch.inf).argmin(1, keepdim=True)
        rows = full if step.rows is None else [step.rows[row] for row in full]
        step.stored.drop_page(page.expand(-1, step.stored.kv_heads), rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.budget}, page={self.page})"


class PagedEviction(Cached):
    """Keeps C tokens of a prompt, and from then on drops one page of B tokens for each that fills up.

        s_j = ||v_j|| / ||k_j||, the mean over the key heads of a layer
        prompt of L > C tokens: the C largest s stay, in order, and are cut into pages
        step that fills a page, more than C tokens held: the page of the smallest mean s goes, never the newest

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). Paper: arXiv 2509.04377, which has no public code. It leaves
    open, and is chosen here: the mean over key heads (a page holds a token of all heads), and that the newest page
    stays. Deviations: a page of the store holds one key head; all heads drop the same ones. A share grows with the
    tokens read. budget: C, a multiple of `page`, or a part of the tokens read, up to whole pages (default 0.25). page:
    B (16). decoded: tokens that are decoded (16). Costs N^2 / 2 pairs of the prompt, C to C + B keys a step, and their
    norms every B steps. Errors: ValueError for a budget that does not fill pages.

    >>> x = torch.randn(1, 2, 40, 8)
    >>> PagedEviction(Dims(2, 8), budget=16, page=8)(x, x, x).shape
    torch.Size([1, 2, 40, 8])
    """

    spec = Spec(
        id="paged_eviction",
        name="PagedEviction",
        title="PagedEviction: Structured Block-wise KV Cache Pruning for Efficient Large Language Model Inference",
        paper="2509.04377",
        year=2025,
        family="kv_cache",
        uses=("Cached", "Policy", "top"),
        discrete=True,
    )

    def __init__(self, dims: Dims, *, budget: float | int = 0.25, page: int = 16, decoded: int = 16) -> None:
        super().__init__(dims, decoded=decoded)
        self.policy = WholePages(budget, page)
        self.budget, self.page = budget, page

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt, size = max(1, q.shape[2] - self.decoded), self.page
        ratio = (v.detach().square().sum(-1) / k.detach().square().sum(-1)).sqrt()
        ratio = torch.where(ratio.isnan(), torch.inf, ratio)

        def keep(b: int, t: int, held: Held) -> Held:
            score = [sum(float(head[j]) for head in ratio[b]) for j in range(t + 1)]
            room = self.budget if isinstance(self.budget, int) else size * math.ceil(self.budget * (t + 1) / size)
            row = held[0]
            if t == prompt - 1:
                row = sorted(sorted(row, key=lambda j: -score[j])[:room])
            elif len(row) > room and len(row) % size == 0:
                pages = [row[start : start + size] for start in range(0, len(row), size)]
                pages.remove(min(pages[:-1], key=lambda page: sum(score[j] for j in page)))
                row = [j for page in pages for j in page]
            return [row] * len(held)

        return replay(q, k, v, prompt, keep)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 53, {"budget": 12, "page": 3, "decoded": 17}),
            Case(Dims(2, 4), 41, {"budget": 0.3, "page": 4, "decoded": 23}),
            Case(Dims(3, 4, 1), 31, {"budget": 20, "page": 5, "decoded": 27}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"budget": 1.0}

    @classmethod
    def _counts(cls, budget: int, page: int, prompt: int, steps: int) -> tuple[list[int], list[int], list[int]]:
        """Of a run: tokens a key head after each step, pages in use for each, pages freed so far."""
        random = torch.Generator().manual_seed(0)
        one = cls(Dims(4, 8, 2), budget=budget, page=page)
        session, held, used, freed = one.session(), [], [], []
        for n in (prompt, *[1] * steps):
            q, k, v = (torch.randn(1, heads, n, 8, generator=random) for heads in (4, 2, 2))
            one.read(session, q, k, v)
            store = session.store(0)
            held.append(int(store.counts.max()))
            used.append(store.pool.in_use)
            freed.append(store.pool.returned)
        return held, used, freed

    @claim("The cache holds at most C + B tokens a key head, and C right after an eviction.")
    def bounded(cls) -> Finding:
        held, _, freed = cls._counts(64, 16, 200, 100)
        after = [held[i] for i in range(1, len(held)) if freed[i] > freed[i - 1]]
        most = max(held)
        return Finding(most < 64 + 16 and set(after) == {64}, f"at most {most} tokens, {after[0]} after an eviction")

    @claim("Every page but the newest is full.")
    def no_holes(cls) -> Finding:
        held, used, _ = cls._counts(64, 16, 200, 100)
        holes = [pages - 2 * -(-count // 16) for count, pages in zip(held, used, strict=True)]
        return Finding(
            not any(holes), f"{max(holes)} pages more than the tokens of two heads fill, in {len(held)} steps"
        )

    @claim("One step in B evicts.")
    def seldom(cls) -> Finding:
        _, _, freed = cls._counts(64, 16, 200, 160)
        at = [i for i in range(1, len(freed)) if freed[i] > freed[i - 1]]
        gaps = {later - sooner for sooner, later in itertools.pairwise(at)}
        return Finding(len(at) == 10 and gaps == {16}, f"{len(at)} of 160 steps, each {min(gaps)} after another")
