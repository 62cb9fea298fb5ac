"""Squeezed Attention: keys of a fixed prefix are clustered, and a step reads the clusters that its query may want."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.cache import Cached, Policy, Session, Stored, Tokens, View
from saccade.cache.view import Place, widened
from saccade.contract import Case, Dims, Finding, Spec, claim, replay
from saccade.errors import part, positive

GOLDEN = (5**0.5 - 1) / 2
ROUNDS = 300


def cluster(x: Tensor, count: int) -> Tensor:
    """Labels int64 (R, N) of x (R, N, D): k-means with `count` centres, begun by k-means++, 300 rounds at most.

    Draw i of k-means++ is the fractional part of i times the golden ratio, from 1 on: on every device and in every
    batch the same. Costs O(N count D) a round; the host waits for each.
    """
    rows, nearest = torch.arange(len(x), device=x.device), torch.ones_like(x[..., 0])
    centres = x.new_empty(len(x), count, x.shape[2])
    for i in range(count):
        shares = nearest.cumsum(-1)
        at = (shares <= (i + 1) * GOLDEN % 1 * shares[:, -1:]).sum(-1).clamp(max=x.shape[1] - 1)
        centres[:, i] = x[rows, at]
        apart = (x - centres[:, i, None]).square().sum(-1)
        nearest = torch.minimum(nearest, apart) if i else apart
    labels = None
    for _ in range(ROUNDS):
        half = centres.square().sum(-1)[:, None] / 2
        new = torch.cat([(half - part @ centres.mT).argmin(-1) for part in x.split(1024, 1)], 1)
        if labels is not None and torch.equal(new, labels):
            break
        labels, sizes = new, counted(new, count, x)
        centres = torch.where(sizes[..., None] > 0, averaged(x, new, sizes), centres)
    return new


def averaged(x: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Means (R, K, D) of x (R, N, D) by labels (R, N), of which there are sizes (R, K); 0 where there is none."""
    sums = x.new_zeros(*sizes.shape, x.shape[2]).scatter_add(1, labels[..., None].expand(x.shape), x)
    return sums / sizes.clamp(min=1)[..., None]


def counted(labels: Tensor, count: int, like: Tensor) -> Tensor:
    """How many there are of each label, (R, count) in the dtype of another tensor."""
    return like.new_zeros(len(labels), count).scatter_add(1, labels, torch.ones_like(labels, dtype=like.dtype))


def estimate(scores: Tensor, sizes: Tensor) -> Tensor:
    """log S_i of clusters of `sizes` (..., K), from the scores (..., K) of their centroids."""
    scores = scores - scores.amax(-1, keepdim=True)  # small where it counts, so that little is rounded off
    return scores - (scores + sizes.log()).logsumexp(-1, keepdim=True)


class Squeezes(Policy):
    """Keeps all; a step reads the clusters that reach a threshold, and all that is in none.

    Notes of a level, "fine" and "coarse": its centroids (B, Hkv, K, D), sizes (B, Hkv, K) in keys, and labels of keys,
    (B, Hkv, M), -1 for none; of the coarse one also "coarse_of" (B, Hkv, K), the label of each fine centroid.
    """

    def __init__(self, squeezed: SqueezedAttention) -> None:
        self.shares = {"fine": squeezed.clusters, "coarse": squeezed.coarse}
        self.budgets = {"fine": squeezed.budget, "coarse": squeezed.coarse_budget}
        self.window = squeezed.window
        self.levels = [level for level, share in self.shares.items() if share is not None]

    @torch.no_grad()
    def piece(self, view: View) -> None:
        """Cluster the first piece, which is the prefix, but for its last tokens."""
        if view.num_seen > view.q.shape[2]:
            return
        rest, shape = max(0, view.num_seen - self.window), view.k.shape[:2]
        keys = view.k[:, :, :rest].flatten(0, 1).to(torch.promote_types(view.k.dtype, torch.float32))
        points, labels, of = keys, None, None
        for level in self.levels:
            count = max(1, int((self.shares[level] or 0) * rest))
            own = cluster(F.normalize(points, dim=-1), count) if rest else points.new_zeros(points.shape[:2]).long()
            points, of = averaged(points, own, counted(own, count, points)), own
            labels = own if labels is None else own.gather(1, labels)
            sizes = counted(labels, count, points)
            for name, value in (("centroids", points), ("sizes", sizes), ("labels", labels)):
                view.note(f"{level}_{name}", value.unflatten(0, shape), fill=-1 if name == "labels" else 0)
            q = view.grouped(view.q[:, :, -self.window :]).to(points.dtype)
            scores = torch.einsum("bhgnd,bhkd->bhgnk", q, points.unflatten(0, shape)) * view.scale
            worth = estimate(scores, sizes.unflatten(0, shape)[:, :, None, None]).exp().mean((2, 3))
            view.note(f"{level}_worth", worth)
        if len(self.levels) > 1 and of is not None:
            view.note("coarse_of", of.unflatten(0, shape))

    def settle(self, session: Session) -> None:
        """One threshold for all layers and heads of a sequence: the quantile of what its keys are worth."""
        for level in self.levels:
            worth = []
            for store in map(session.store, range(session.num_layers)):
                if f"{level}_worth" in store.notes:
                    each, labels = store.notes.pop(f"{level}_worth"), store.notes[f"{level}_labels"]
                    one = F.pad(each, (0, 1), value=torch.nan)  # of label -1
                    worth.append(one.gather(2, labels % one.shape[2]).flatten(1))
            if worth:
                found = self._quantile(torch.cat(worth, 1), 1 - self.budgets[level])
                old = session.shared.get(level, found)
                session.shared[level] = torch.where(found.isnan(), old, found)

    def _quantile(self, x: Tensor, at: float) -> Tensor:
        """log of the quantile (B,) of x (B, N) without NaN, between two numbers on a line; -inf for the lowest."""
        if at <= 0:
            return x.new_full((len(x),), -torch.inf)
        place = at * ((~x.isnan()).sum(-1, keepdim=True) - 1).clamp(min=0).double()
        ranked = F.pad(x.sort(-1).values, (0, 1), value=torch.nan)  # NaN come last
        low, high = (ranked.gather(1, end.long()) for end in (place.floor(), place.ceil()))
        return torch.lerp(low, high, (place - place.floor()).to(x)).log()[:, 0]

    @torch.no_grad()
    def select(self, step: Stored) -> Tokens:
        alive = None
        for level in reversed(self.levels):
            kept = self._kept(step, level, alive)
            if level == "coarse":
                alive = kept.gather(2, step.notes("coarse_of"))
        kept = F.pad(kept, (0, 1), value=True)  # of label -1: the window, and all after it
        tokens = step.slots.shape[2]
        labels = step.notes("fine_labels")[..., :tokens]
        labels = widened(labels, tokens) % kept.shape[2]
        return Tokens(step.only(kept.gather(2, labels)))

    def _kept(self, step: Stored, level: str, alive: Tensor | None) -> Tensor:
        """Which clusters are worth the threshold, of those that are alive: bool (G, Hkv, K)."""
        centroids, sizes = step.notes(f"{level}_centroids"), step.notes(f"{level}_sizes")
        q = step.grouped(step.q[:, :, 0]).to(centroids.dtype)
        if alive is not None:
            sizes = sizes * alive
        worth = estimate(q @ centroids.mT * step.scale, sizes[:, :, None]).logsumexp(2) - math.log(step.group)
        limit = step.mine(step.shared[level])
        # What equals the threshold but for rounding reaches it: all that there is, where all keys are in one cluster.
        kept = worth >= (limit - torch.finfo(worth.dtype).eps ** 0.75)[:, None, None]
        return kept if alive is None else kept & alive


class SqueezedAttention(Cached):
    """Clusters of the prompt's keys; a step reads those whose keys its query would weigh as much as a threshold.

        S_i = exp(q . C_i / sqrt(D)) / sum_j N_j exp(q . C_j / sqrt(D)),   C_i: mean of the N_i keys of cluster i
        o = attention to the keys of all i with S_i >= T, to the last tokens of the prompt, and to what was decoded

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). Clusters are those of k-means (k-means++, 300 rounds) on keys
    of norm 1, a key head; the last `window` tokens of the prompt are in none. T, one for all heads and layers, is the
    1 - budget quantile over all keys of the mean S of their clusters for the queries of the window. With `coarse` the
    centroids are clustered again, a centroid then the mean of theirs, N_i still in keys, and tested first, against a
    threshold of their own; the sum over j of the second test goes over centroids that passed the first alone.
    Paper: arXiv 2411.09688; means, counts and quantiles follow the authors' code.
    Deviations: S is the mean over the query heads of a key head, where their models have one; the paper has S_i > T,
    here what equals T in three quarters of the digits is read, or else rounding decides; the seeds of k-means++ are no
    random numbers, see `cluster`; the prefix is the first piece of a prompt, and tokens after it that come in a piece,
    like theirs of a user, read all, where theirs read what S finds for them on average. budget: the part of the
    clustered keys above T (default 0.3). clusters: their number, a part of the keys (0.05). window: 100. coarse: the
    number of coarse ones, a part of the keys (None; theirs 0.01). coarse_budget: as budget, for T of these (0.5).
    decoded: tokens that are decoded (16). num_layers: that share T (1). Costs N^2 / 2 pairs of the prompt and 300
    rounds of N^2 D clusters products at most; a step reads the centroids, and near budget N tokens, as many as its
    query asks for. Errors: ValueError for a share outside (0, 1], and for more coarse clusters than fine ones.

    >>> x = torch.randn(1, 2, 60, 8)
    >>> SqueezedAttention(Dims(2, 8), clusters=0.2, window=10)(x, x, x).shape
    torch.Size([1, 2, 60, 8])
    """

    spec = Spec(
        id="squeezed_attention",
        name="Squeezed Attention",
        title="Squeezed Attention: Accelerating Long Context Length LLM Inference",
        paper="2411.09688",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Policy", "Tokens"),
        discrete=True,
        waits="keys are clustered until nothing moves",
    )
    per_head = True
    policy: Squeezes

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float = 0.3,
        clusters: float = 0.05,
        window: int = 100,
        coarse: float | None = None,
        coarse_budget: float = 0.5,
        decoded: int = 16,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        shares = {"budget": budget, "clusters": clusters, "coarse": coarse, "coarse_budget": coarse_budget}
        for name, share in shares.items():
            if share is not None:
                part(name, share, zero=False)
        if coarse is not None and coarse > clusters:
            raise ValueError(f"coarse: got {coarse} beside clusters {clusters}; pass fewer, they are made of those")
        self.budget, self.clusters, self.window = budget, clusters, positive("window", window)
        self.coarse, self.coarse_budget = coarse, coarse_budget
        self.policy = Squeezes(self)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, d), kv_heads = q.shape, k.shape[1]
        prompt, group = max(1, n - self.decoded), heads // kv_heads
        rest, asks, keys = max(0, prompt - self.window), q.detach().unflatten(1, (kv_heads, -1)), k.detach()

        def split(points: Tensor, count: int) -> Tensor:
            x = points / points.square().sum(-1, keepdim=True) ** 0.5
            nearest, centres, labels = torch.ones_like(x[:, 0]), [], None
            for i in range(count):
                draw, runs = (i + 1) * (5**0.5 - 1) / 2 % 1 * float(nearest.sum()), accumulate(nearest.tolist())
                centres.append(x[next((at for at, run in enumerate(runs) if run > draw), len(x) - 1)])
                apart = (x - centres[-1]).square().sum(-1)
                nearest = torch.minimum(nearest, apart) if i else apart
            for _ in range(300):
                new = torch.stack([(x - c).square().sum(-1) for c in centres]).argmin(0)
                if labels is not None and new.equal(labels):
                    break
                labels = new
                centres = [x[new == c].mean(0) if (new == c).any() else old for c, old in enumerate(centres)]
            return new

        def levels(b: int, g: int) -> list[Tensor]:
            """Fine and coarse: the centroid of each key, (rest, D)."""
            points, of, found = keys[b, g, :rest], torch.arange(rest), []
            for share in (self.clusters, self.coarse) if self.coarse else (self.clusters,):
                used, own = split(points, max(1, int(share * rest))).unique(return_inverse=True)
                points, of = torch.stack([points[own == c].mean(0) for c in range(len(used))]), own[of]
                found.append(points[of])
            return found

        def worth(centroids: Tensor, asks: Tensor, alive: Tensor) -> Tensor:
            """S of each key (n, rest), asked by (group, n, D): keys of a cluster weigh what its centroid would."""
            scores = (asks @ centroids.T / d**0.5).masked_fill(~alive, -torch.inf)
            return scores.softmax(-1).mean(0)

        nearly = 1 - torch.finfo(k.dtype).eps ** 0.75  # what equals a threshold but for rounding reaches it
        every, late = torch.ones(rest, dtype=torch.bool), slice(max(0, prompt - self.window), prompt)
        known = [[levels(b, g) if rest else [] for g in range(kv_heads)] for b in range(batch)]
        limits: list[list[float]] = []
        for b, of_heads in enumerate(known):
            limits.append([])
            for budget, *each in zip((self.budget, self.coarse_budget), *of_heads, strict=False):
                values = torch.cat([worth(c, asks[b, g, :, late], every).mean(0) for g, c in enumerate(each)])
                limits[b].append(float(values.double().quantile(1 - budget)) if budget < 1 else -1.0)

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            sets = []
            for g, of_head in enumerate(known[b]):
                alive = every
                for centroids, limit in reversed([*zip(of_head, limits[b], strict=True)]):
                    alive = alive & (worth(centroids, asks[b, g, :, t : t + 1], alive)[0] >= limit * nearly)
                sets += [[j for j in range(t + 1) if j >= rest or alive[j]]] * group
            return sets

        return replay(q, k, v, prompt, lambda b, t, held: held, read)

    @classmethod
    def cases(cls) -> list[Case]:
        two = {"clusters": 0.4, "coarse": 0.12, "coarse_budget": 0.6, "budget": 0.4, "window": 5, "num_layers": 2}
        return [
            Case(Dims(4, 8, 2), 37, {"clusters": 0.25, "window": 7, "decoded": 6}),
            Case(Dims(4, 6, 4), 43, {**two, "decoded": 9}),
            Case(Dims(3, 4, 1), 23, {"budget": 0.6, "clusters": 0.5, "window": 40, "decoded": 5}, batch=1),
            Case(Dims(4, 8, 2), 128, batch=1),  # one cluster, all of whose keys are worth the threshold
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"budget": 1.0, "window": 3, "clusters": 0.2}

    @classmethod
    def planted(cls, noise: float) -> tuple[Tensor, Tensor]:
        """q, k (1, 1, 740, 16): keys of 32 kinds, four of each of 8 topics, and queries that ask for a kind."""
        random = torch.Generator().manual_seed(0)
        topics, kinds = torch.randn(8, 16, generator=random), torch.randn(8, 4, 16, generator=random)
        kinds = (1.5 * topics[:, None] + kinds).flatten(0, 1)
        k, q = (kinds[torch.randint(32, (740,), generator=random)] for _ in range(2))
        k = k + noise * torch.randn(740, 16, generator=random)
        return q[None, None].double(), k[None, None].double()

    def prefix(self, k: Tensor, q: Tensor) -> tuple[Session, list[Stored]]:
        """After a prompt of 640 tokens of `planted`, and the views that steps for 100 queries have."""
        session = self.session()
        self.read(session, q[:, :, :640], k[:, :, :640], k[:, :, :640])
        place = Place(shared=session.shared)
        return session, [Stored(session.store(0), place, each) for each in q[:, :, 640:].split(1, 2)]

    @claim("sum_i N_i S_i = 1, and S_i is the mean weight of a key in cluster i where its keys are alike.")
    def estimates(cls) -> Finding:
        q, k = cls.planted(0.0)
        session, _ = cls(Dims(1, 16), clusters=0.06, window=100).prefix(k, q)
        notes, late = session.store(0).notes, q[0, 0, 640:]
        sizes, labels = notes["fine_sizes"][0, 0], notes["fine_labels"][0, 0]
        found = estimate(late @ notes["fine_centroids"][0, 0].mT / 4, sizes).exp()
        total = float(((found * sizes).sum(-1) - 1).abs().max())
        weights = (late @ k[0, 0, :540].mT / 4).softmax(-1)
        apart = float((found[:, labels] - weights).abs().max() / weights.max())
        near = 740 * torch.finfo(k.dtype).eps
        return Finding(
            max(total, apart) < near, f"the sum is {total:.0e} off, a key's weight {apart:.0e} of the largest"
        )

    @claim("Where keys are of kinds, a step reads less of the prefix than the budget says, and most of its attention.")
    def finds(cls) -> Finding:
        q, k = cls.planted(0.5)
        squeezed, shares = cls(Dims(1, 16), budget=0.2), []
        _, steps = squeezed.prefix(k, q)
        weights = (q[0, 0, 640:] @ k[0, 0, :540].mT / 4).softmax(-1)
        for step, row in zip(steps, weights, strict=True):
            slots = squeezed.policy.select(step).slots[0, 0]
            old = slots[(slots >= 0) & (slots < 540)]
            shares.append((len(old) / 540, float(row[old].sum())))
        read, mass = (sum(x) / 100 for x in zip(*shares, strict=True))
        return Finding(read < 0.2 and mass > 0.9, f"{read:.0%} of the prefix, {mass:.0%} of its attention")

    @claim(
        "With two levels a step scores the coarse centroids and the fine ones of those that pass, not all fine ones."
    )
    def looks_twice(cls) -> Finding:
        q, k = cls.planted(0.5)
        one = cls(Dims(1, 16), budget=0.2, clusters=0.12)
        two = cls(Dims(1, 16), budget=0.2, clusters=0.12, coarse=0.02, coarse_budget=0.4)
        scored, same = [], []
        for a, b in zip(one.prefix(k, q)[1], two.prefix(k, q)[1], strict=True):
            alive = two.policy._kept(b, "coarse", None).gather(2, b.notes("coarse_of"))
            scored.append(b.notes("coarse_sizes").shape[2] + int(alive.sum()))
            sets = [set(x.policy.select(y).slots[0, 0].tolist()) for x, y in ((one, a), (two, b))]
            same.append(len(sets[0] & sets[1]) / len(sets[0]))
        every, mean = a.notes("fine_sizes").shape[2], sum(scored) / 100
        figure = f"{mean:.0f} of {every} centroids scored, {sum(same):.0f} % of the tokens of one level read"
        return Finding(mean < 0.75 * every and sum(same) > 75, figure)
