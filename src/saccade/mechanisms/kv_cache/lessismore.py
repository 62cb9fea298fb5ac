"""LessIsMore: all heads vote for one list of tokens, which the layers after it read, with recent tokens and sinks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.cache import Cached, Reader, Session, Stored, Tokens
from saccade.contract import Case, Dims, Finding, Spec, claim, replay, tokens_of
from saccade.errors import part, positive


class Union(Reader):
    """Layers before `start` read all; so do `start` and `correction`, which make the list of the layers after them."""

    def __init__(self, less: LessIsMore) -> None:
        super().__init__(less.budget)
        self.less = less

    def select(self, step: Stored) -> Tokens | None:
        if step.index < self.less.start:
            return None
        picks = step.index in (self.less.start, self.less.correction)
        picked = self.best(step, -self.order(step)) if picks else step.notes("picked")
        step.pass_on("picked", picked, fill=-1)
        return None if picks else Tokens(picked[:, None].expand(-1, step.counts.shape[1], -1))

    def steady(self, session: Session) -> bool:
        return True

    def order(self, step: Stored) -> Tensor:
        """(G, M): -1 for what is always read, then the place of a token in the interleaved lists; inf: in none."""
        scores, ends = step.scores(), step.ends[:, None]
        heads, n = scores.shape[1:]
        reads = self.reads(step)[:, None]
        recent = reads - (reads.double() * self.less.ratio).long()  # K - m, with the sinks
        sinks = torch.where(recent >= self.less.sinks, self.less.sinks, 0)
        at = torch.arange(n, device=scores.device)
        always = ((at < sinks) | (at >= ends - recent + sinks)) & (at < ends)
        most = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * step.horizon)
        ranked = scores.masked_fill(always[:, None], -torch.inf).topk(min(n, most), -1)
        rank = torch.arange(ranked.indices.shape[2], device=scores.device, dtype=torch.float64)
        place = rank * heads + torch.arange(heads, device=scores.device)[:, None]  # rank by rank, head by head
        place = place.masked_fill(ranked.values == -torch.inf, torch.inf)
        order = place.new_full((len(scores), n), torch.inf)
        return order.scatter_reduce(1, ranked.indices.flatten(1), place.flatten(1), "amin").masked_fill(always, -1)


class LessIsMore(Cached):
    """One list of tokens for all heads of all sparse layers: the best of every head, what is recent, and sinks.

        layers l <= start, and l = correction:  o = dense attention over the L tokens there are
        other layers:  o = attention over S of the last layer that made one, start or correction; all L where L <= K
        m = int(ratio K), s = sinks if K - m >= sinks, else 0
        S: tokens 0 .. s-1, the last K - m - s, and the first m unlike ones of  t_11 t_21 .. t_H1 t_12 t_22 ..
        t_hr: the token between them of the r-th largest q_h . k_j

    q (B, layers H, N, D), k, v (B, layers Hkv, N, D) -> o (B, layers H, N, D), one layer after another; prompts are
    dense. S is made again at every step, its recent part too, by layers `start` and `correction` alone. All tokens are
    held. Paper: arXiv 2508.07101, section 4; checked against the authors' code (DerrickYLJ/LessIsMore,
    modify_qwen3_lim.py), which makes the list of a single sequence; their Llama file takes `ratio` for the recent part
    instead. Deviations: none; here each sequence of a batch has its list. budget: K, tokens a sparse layer reads, or a
    part of those seen, rounded up (default 2048). ratio: the part that heads choose (0.75). sinks: first tokens, which
    are read (4). start: the first layer that makes a list, those before it are dense (2). correction: the layer that
    makes it again (12, of Qwen3-8B; one that there is not makes none). num_layers: layers (1). decoded: tokens that are
    decoded (16). Costs N^2 / 2 pairs a layer of the prompt; a step reads L tokens in start + 2 layers, K in the others.
    Errors: ValueError for a budget of 0, a ratio outside (0, 1], a start below 0 or a correction before it.

    >>> x = torch.randn(1, 5 * 2, 40, 8)
    >>> LessIsMore(Dims(5 * 2, 8), budget=8, sinks=1, start=1, correction=3, num_layers=5)(x, x, x).shape
    torch.Size([1, 10, 40, 8])
    """

    spec = Spec(
        id="lessismore",
        name="LessIsMore",
        title="Less Is More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning",
        paper="2508.07101",
        year=2025,
        family="kv_cache",
        uses=("Cached", "Reader", "Tokens"),
        discrete=True,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 2048,
        ratio: float = 0.75,
        sinks: int = 4,
        start: int = 2,
        correction: int = 12,
        num_layers: int = 1,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        self.ratio = part("ratio", ratio, "the part of the budget that heads choose", zero=False)
        self.budget, self.sinks = budget, positive("sinks", sinks, least=0)
        self.start, self.correction = positive("start", start, least=0), positive("correction", correction, least=start)
        self.policy = Union(self)

    def chosen(self, q: Tensor, k: Tensor) -> list[int]:
        """S of one layer, by the book: q (H, D), k (Hkv, L, D)."""
        (heads, _), (kv_heads, length) = q.shape, k.shape[:2]
        count = tokens_of(self.budget, length)
        if length <= count:
            return list(range(length))
        most = int(self.ratio * count)
        sinks = self.sinks if count - most >= self.sinks else 0
        last = length - (count - most - sinks)
        lists = []
        for h in range(heads):
            order = (k[h // (heads // kv_heads), sinks:last] @ q[h]).argsort(descending=True)
            lists.append([sinks + j for j in order.tolist()])
        picked: list[int] = []
        for row in zip(*lists, strict=True):  # of one rank
            picked += [j for j in dict.fromkeys(row) if j not in picked]
        return sorted([*range(sinks), *picked[:most], *range(last, length)])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers = self.num_layers

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            sets: list[list[int]] = []
            queries, keys = q[b, :, t].detach().chunk(layers), k[b, :, : t + 1].detach().chunk(layers)
            for layer in range(layers):
                source = self.correction if layer > self.correction else self.start
                dense = layer <= self.start or layer == self.correction
                one = list(range(t + 1)) if dense else self.chosen(queries[source], keys[source])
                sets += [one] * len(queries[0])
            return sets

        return replay(q, k, v, max(1, q.shape[2] - self.decoded), lambda b, t, held: held, read)

    @classmethod
    def cases(cls) -> list[Case]:
        layered = {"start": 1, "correction": 3, "num_layers": 5}
        return [
            Case(Dims(5 * 4, 8, 5 * 2), 37, {"budget": 0.4, "sinks": 2, "decoded": 9, **layered}),
            Case(Dims(3 * 3, 4), 29, {"budget": 7, "ratio": 0.6, "start": 0, "num_layers": 3, "decoded": 7}),
            Case(Dims(5, 4), 31, {"budget": 28, "ratio": 0.5, "sinks": 3, "decoded": 7, **layered}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int]:
        return {"budget": 1.0, "start": 0, "num_layers": dims.num_kv_heads}  # a key head a layer, all but one sparse

    @classmethod
    def listed(cls, budget: int, heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor]:
        """(S (K,), scores (heads, length)) of the newest token of random ones, and what it was made from."""
        random = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, 2 * h, length, 16, generator=random) for h in (heads, kv_heads))
        less = cls(Dims(2 * heads, 16, 2 * kv_heads), budget=budget, start=0, num_layers=2)
        session = less.session()
        less.read(session, q[:, :, :-1], k[:, :, :-1], k[:, :, :-1])
        less.read(session, q[:, :, -1:], k[:, :, -1:], k[:, :, -1:])
        keys = k[0, :kv_heads].repeat_interleave(heads // kv_heads, 0)
        return session.store(1).notes["picked"][0], torch.einsum("hd,hmd->hm", q[0, :heads, -1], keys)

    @claim(
        "The list has exactly K unlike tokens: a number of indices H times, of rows a key head up to G times, fewer."
    )
    def reads_few(cls) -> Finding:
        budget, heads, kv_heads = 64, 8, 2
        found, scores = cls.listed(budget, heads, kv_heads, 1024)
        own = scores.topk(budget, -1).indices.unflatten(0, (kv_heads, -1)).flatten(1)  # a set a query head
        rows = sum(len(row.unique()) for row in own) / kv_heads / budget
        holds = len(found) == len(found.unique()) == budget and own.numel() == heads * budget and 1 < rows <= 4
        return Finding(
            holds, f"{len(found)} indices, {own.numel()} of sets a head; these read {rows:.2f} times the rows"
        )

    @claim("It holds the best t tokens of every head for each t at which these fit, so that no head recalls less.")
    def holds_unions(cls) -> Finding:
        budget, heads = 128, 8
        found, scores = cls.listed(budget, heads, 2, 1024)
        most, last = 96, 1024 - 28  # m of them, between 4 sinks and 28 recent tokens
        between = scores.clone().index_fill_(1, torch.tensor([*range(4), *range(last, 1024)]), -torch.inf)
        unions = [set(between.topk(t, -1).indices.flatten().tolist()) for t in range(1, most + 1)]
        fit = [union for union in unions if len(union) <= most]
        held = all(union <= set(found.tolist()) for union in fit)
        ours = torch.tensor(sorted(set(found.tolist()) & set(range(4, last))))
        p = between.softmax(-1)
        recall, own = p[:, ours].sum(-1), p.topk(len(fit), -1).values.sum(-1)
        holds = held and bool((recall >= own).all()) and len(fit) > 1
        figure = (
            f"heads recall {float(recall.mean()):.2f} of their weight, {float(own.mean()):.2f} with sets of their own"
        )
        return Finding(holds, f"{figure}, t up to {len(fit)}")
