"""Each policy's rule once more, by loops over positions: which tokens every key head holds after token t was read."""

import math

import torch


def attention(q, k, seen):
    """Probabilities of one query over the positions `seen`."""
    return dict(zip(seen, ((k[seen] * q).sum(-1) / q.shape[-1] ** 0.5).softmax(0).tolist(), strict=True))


def largest(scores, count, always=()):
    """The `count` positions of the largest scores, of equal ones the first, with those of `always` first of all."""
    ranked = sorted(scores, key=lambda j: (j not in always, -scores[j], j))
    return sorted(ranked[:count])


class Rule:
    """budget: share or number. every: as in Evict. heads of one layer; q (B, H, N, D), k, v (B, Hkv, N, D) float64."""

    def __init__(self, q, k, v, prompt, budget, sinks=0, recent=0, every=None):
        self.q, self.k, self.v, self.prompt, self.budget = q, k, v, prompt, budget
        self.sinks, self.recent, self.every = sinks, recent, every
        self.group = q.shape[1] // k.shape[1]
        self.left = {}

    def tokens(self, seen):
        return min(seen, math.floor(self.budget * seen + 0.5) if isinstance(self.budget, float) else self.budget)

    def heads(self, g):
        return range(g * self.group, (g + 1) * self.group)

    def always(self, t):
        return [j for j in range(t + 1) if j < self.sinks or j > t - self.recent]

    def first(self, b, scores, t):
        """What the prompt leaves: by default the same number in each head."""
        return [largest(each, self.tokens(t + 1), self.always(t)) for each in scores]

    def keep(self, b, t, held):
        scores = self.scores(b, t, held)
        if t == self.prompt - 1:
            kept = self.first(b, scores, t)
            self.left[b] = [len(row) for row in kept]
            return kept
        if self.every is None:
            return held
        grown = self.tokens(t + 1) - self.tokens(self.prompt)
        aims = [count + grown for count in self.left[b]]
        if max(len(row) - aim for row, aim in zip(held, aims, strict=True)) < self.every:
            return held
        return [
            largest({j: each[j] for j in row}, aim, self.always(t))
            for row, each, aim in zip(held, scores, aims, strict=True)
        ]

    def mean(self, b, g, t, seen):
        """Attention of query t to `seen`, the mean over the query heads of a key head."""
        each = [attention(self.q[b, h, t], self.k[b, g], seen) for h in self.heads(g)]
        return {j: sum(p[j] for p in each) / self.group for j in seen}


class Recent(Rule):
    def scores(self, b, t, held):
        return [{j: j for j in row} for row in held]


class Heavy(Rule):
    def scores(self, b, t, held):
        if t == self.prompt - 1:
            self.sums = {**getattr(self, "sums", {}), **{(b, g): {} for g in range(len(held))}}
        for g, row in enumerate(held):
            for i in range(t + 1) if t == self.prompt - 1 else [t]:
                for j, p in self.mean(b, g, i, [j for j in row if j <= i]).items():
                    self.sums[b, g][j] = self.sums[b, g].get(j, 0.0) + p
        return [{j: self.sums[b, g][j] for j in row} for g, row in enumerate(held)]


class Window(Rule):
    """SnapKV, of `window` queries and `pool` neighbours."""

    window, pool = 6, 5

    def scores(self, b, t, held):
        found = []
        for g, row in enumerate(held):
            raw = dict.fromkeys(row, 0.0)
            window = self.window if t == self.prompt - 1 else 1
            for i in range(max(0, t + 1 - window), t + 1):
                for j, p in self.mean(b, g, i, [j for j in row if j <= i]).items():
                    raw[j] += p
            near = [row[max(0, at - self.pool // 2) : at + self.pool // 2 + 1] for at in range(len(row))]
            near = [[n for n in ns if n <= t - window] for ns in near]
            found.append({j: sum(raw[n] for n in ns) / max(1, len(ns)) for j, ns in zip(row, near, strict=True)})
        return found


class Adaptive(Window):
    """AdaKV on SnapKV's scores."""

    floor = 0.2

    def first(self, b, scores, t):
        tokens = self.tokens(t + 1)
        sure = [largest(each, int(self.floor * tokens), self.always(t)) for each in scores]
        sure = [set(row) | set(self.always(t)) for row in sure]
        pairs = {(g, j): s for g, each in enumerate(scores) for j, s in each.items()}
        kept = largest(pairs, tokens * len(scores), {(g, j) for g, row in enumerate(sure) for j in row})
        return [[j for h, j in kept if h == g] for g in range(len(scores))]


class Newest(Rule):
    """TOVA."""

    def scores(self, b, t, held):
        each = [self.mean(b, g, t, row) for g, row in enumerate(held)]
        mean = {j: sum(p[j] for p in each) / len(each) for j in held[0]}
        return [mean] * len(held)


class Norm(Rule):
    def scores(self, b, t, held):
        return [{j: -float(self.k[b, g, j].square().sum()) for j in row} for g, row in enumerate(held)]


class Unlike(Rule):
    def scores(self, b, t, held):
        found = []
        for g, row in enumerate(held):
            unit = {j: self.k[b, g, j] / self.k[b, g, j].square().sum().sqrt() for j in row}
            mean = torch.stack(list(unit.values())).mean(0)
            found.append({j: -float((unit[j] * mean).sum() / mean.square().sum().sqrt()) for j in row})
        return found


def turned(i, rates, scale, d):
    """The matrix by which a token at place i is turned, (D, D): q before, turned @ q behind."""
    found = torch.eye(d, dtype=torch.float64)
    for c, rate in enumerate(rates):
        cos, sin = scale * math.cos(i * rate), scale * math.sin(i * rate)
        one, two = c, c + len(rates)
        found[one, one], found[one, two], found[two, one], found[two, two] = cos, -sin, sin, cos
    return found


class Gaussian(Rule):
    """Expected Attention, of a host that turns by `rates`, times `scale`; none by default."""

    rates, scale, ahead = (), 1.0, 512

    def mean_turn(self, t):
        """Over the next places, the mean of their matrices."""
        places = range(t + 1, t + 1 + self.ahead if self.rates else t + 2)
        return sum(turned(i, self.rates, self.scale, self.q.shape[3]) for i in places) / len(places)

    def before(self, b, h, i):
        return torch.linalg.inv(turned(i, self.rates, self.scale, self.q.shape[3])) @ self.q[b, h, i]

    def scores(self, b, t, held):
        found, d, mean = [], self.q.shape[3], self.mean_turn(t)
        for g, row in enumerate(held):
            total, far = dict.fromkeys(row, 0.0), [j for j in row if j >= self.sinks]
            for h in self.heads(g):
                q = [self.before(b, h, i) for i in range(self.sinks, t + 1)]
                mu = sum(q) / len(q)
                spread = mean @ (sum(torch.outer(x - mu, x - mu) for x in q) / len(q)) @ mean.T
                z = torch.stack([mean @ mu @ x / d**0.5 + x @ spread @ x / (2 * d) for x in self.k[b, g, far]])
                for j, p in zip(far, z.softmax(0).tolist(), strict=True):
                    total[j] += p / self.group
            found.append({j: total[j] * float(self.v[b, g, j].square().sum().sqrt()) for j in row})
        return found
