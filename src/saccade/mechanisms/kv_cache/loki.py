"""Loki: keys are ranked by their first principal components, and the best are read whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Cached, Reader, Session, Stored, Tokens, budgeted
from saccade.cache.view import Place, attention_at
from saccade.contract import Case, Dims, Finding, Spec, claim, replay


class Ranked(Reader):
    """Reads, for each query head, the tokens of the largest products over the leading channels of a rotated space."""

    def __init__(self, loki: Loki, budget: float | int) -> None:
        super().__init__(budget)
        self.loki = loki

    def project(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        basis = self.loki.basis.to(k.dtype)
        return (q.unflatten(1, (len(basis), -1)) @ basis[:, None]).flatten(1, 2), k @ basis, v

    @torch.no_grad()
    def select(self, step: Stored) -> Tokens:
        count = self._count(step.horizon)
        best = step.scores(self.loki.leading).topk(count, -1).indices
        if not isinstance(self.budget, float):
            counts = step.ends.clamp(max=count)
        else:  # in double, which rounds as the host does
            counts = (step.ends.double() * self.budget).long().clamp(min=1)
        return Tokens(best.masked_fill(torch.arange(count, device=best.device) >= counts[:, None, None], -1))

    def steady(self, session: Session) -> bool:
        return True

    def _count(self, seen: int) -> int:
        return max(1, int(self.budget * seen)) if isinstance(self.budget, float) else min(seen, self.budget)


class Loki(Cached):
    """Keys in the basis of their principal components; a step ranks by the first d of these, and reads few keys whole.

        k' = k P,  q' = q P;   a_j = q'[:d] . k'[:d]_j;   o = sum_j softmax_j(q' . k'_j / sqrt(D)) v_j
        over the int(budget L) tokens j of the largest a_j, for each query head, L tokens so far

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). P (Hkv, D, D) orthogonal, the buffer `basis`: the principal
    axes of keys, those of the largest variances first, which `fit(keys)` finds; a random rotation until then. It is
    applied to q and k as attention meets them, after rotary positions; the mean is not taken off, which would add a
    number to each query's scores. No token is sure to be read, not even the newest. k' takes the place of k.
    Paper: arXiv 2406.02542; where the basis is applied, the rounding and the scale follow the authors'
    code. Deviations: the prompt is read densely, as in their kernels, not in their evaluation of perplexity. Their code
    takes, for a share of the variance, one component fewer than reach it; here `components(share)` do, for all key
    heads, and `leading` is set to it by hand; a search takes the cheapest rank and budget that read so much of a
    layer's attention, where the paper has one of both for all layers. budget: k_f, a part of the tokens, or tokens
    (default 0.25). rank: d_f, a part of the channels, or channels (0.25). decoded: tokens that are decoded (16). Costs
    N^2 / 2 pairs of the prompt; a step reads d channels of all keys, and K = budget L keys and values: of the cache the
    part d / 2 D + K / L.
    Errors: ValueError for a budget or rank of 0, a rank above D, and for keys of other heads.

    >>> loki, (q, k) = Loki(Dims(2, 8), budget=6, rank=3, decoded=4), torch.randn(2, 1, 2, 40, 8)
    >>> loki.fit(k)
    >>> loki(q, k, k).shape, loki.components(0.5) <= 8
    (torch.Size([1, 2, 40, 8]), True)
    """

    spec = Spec(
        id="loki",
        name="Loki",
        title="Loki: Low-Rank Keys for Efficient Sparse Attention",
        paper="2406.02542",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Reader", "Tokens"),
        discrete=True,
    )
    per_head = True
    policy: Ranked
    basis: Tensor
    variances: Tensor

    def __init__(self, dims: Dims, *, budget: float | int = 0.25, rank: float | int = 0.25, decoded: int = 16) -> None:
        super().__init__(dims, decoded=decoded)
        d = dims.head_dim
        self.leading = int(budgeted("rank", rank)) if isinstance(rank, int) else max(1, int(budgeted("rank", rank) * d))
        if self.leading > d:
            raise ValueError(f"rank: got {rank} for head_dim {d}; pass at most {d}, or a float in (0, 1]")
        # In double, so that what is rotated there loses nothing; a cast of the module casts it.
        basis = torch.linalg.qr(torch.randn(dims.num_kv_heads, d, d, dtype=torch.float64)).Q
        self.register_buffer("basis", basis)
        self.register_buffer("variances", torch.ones(dims.num_kv_heads, d, dtype=torch.float64))
        self.policy = Ranked(self, budget)
        self.budget = budget

    @torch.no_grad()
    def fit(self, keys: Tensor) -> None:
        """Take the principal axes of keys (B, Hkv, M, D) of some text, as attention meets them, for the basis."""
        d = self.dims
        if keys.ndim != 4 or (keys.shape[1], keys.shape[3]) != (d.num_kv_heads, d.head_dim):
            raise ValueError(f"keys: got {tuple(keys.shape)}; pass (batch, {d.num_kv_heads}, tokens, {d.head_dim})")
        rows = keys.transpose(0, 1).flatten(1, 2).double()
        rows = rows - rows.mean(1, keepdim=True)
        found = torch.linalg.eigh(rows.mT @ rows / max(1, rows.shape[1] - 1))
        self.basis.copy_(found.eigenvectors.flip(-1))
        self.variances.copy_(found.eigenvalues.flip(-1).clamp(min=0))

    @classmethod
    def calibrated(cls, dims: Dims, seen: Sequence[Any], **params: Any) -> Loki:
        """A layer with the basis of the keys of all samples."""
        made = cls(dims, **params)
        made.fit(torch.cat([one.k[:1] for one in seen], 2).cpu())
        return made

    def rules(self) -> list[dict[str, float]]:
        """What a layer may read by: d_f and k_f from 1/16 to 1 each, as far as the channels go."""
        parts = [0.5**i for i in range(5)]
        return [{"rank": d, "budget": k} for d in parts if d * self.dims.head_dim >= 1 for k in parts]

    @torch.no_grad()
    def weighed(self, seen: Any, rules: Sequence[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """The part of attention that each rule reads, (R, 1), a mean over query heads, and the part of the cache that
        it touches, d_f / 2 + k_f: the less of what queries of a sample's second half read and of what those read that
        foretell the answers.
        """
        n, basis = seen.q.shape[2], self.basis.to(seen.k)
        q = (seen.q.unflatten(1, (len(basis), -1)) @ basis[:, None]).flatten(1, 2)
        k, half = seen.k @ basis, torch.arange(n // 2, n, device=seen.q.device)
        parts = [
            torch.cat([self._read(q, k, at, rules) for at in rows.split(128)], 2).mean((1, 2))
            for rows in (half, seen.foretelling)
        ]
        cost = torch.tensor([[rule["rank"] / 2 + rule["budget"]] for rule in rules])
        return torch.minimum(*parts)[:, None].cpu(), cost

    def _read(self, q: Tensor, k: Tensor, at: Tensor, rules: Sequence[Mapping[str, float]]) -> Tensor:
        """The part of the attention of queries `at` that each rule reads, (R, H, rows), of rotated q and k."""
        later = torch.arange(k.shape[2], device=k.device) > at[:, None]
        own, weights, found = q[:, :, at].unflatten(1, (-1, self.dims.group)), attention_at(q, k, at), {}
        for rank in {rule["rank"] for rule in rules}:
            d = max(1, int(rank * self.dims.head_dim))
            scores = torch.einsum("bhgnd,bhmd->bhgnm", own[..., :d], k[..., :d]).masked_fill(later, -torch.inf)
            found[rank] = weights.gather(-1, scores.argsort(-1, descending=True)).cumsum(-1).mean(0).flatten(0, 1)
        counts = [((at + 1).double() * rule["budget"]).long().clamp(min=1) - 1 for rule in rules]
        each = zip(rules, counts, strict=True)
        return torch.stack(
            [
                found[rule["rank"]].gather(2, count[None, :, None].expand(q.shape[1], -1, 1))[..., 0]
                for rule, count in each
            ]
        )

    @classmethod
    def assembled(cls, rules: Sequence[Mapping[str, float]], **params: Any) -> dict[str, Any]:
        """Parameters of the layer, from its one rule."""
        return params | dict(rules[0])

    def components(self, share: float) -> int:
        """How many leading components hold this share of the variance, in the key head that needs most."""
        held = self.variances.double().cumsum(-1) / self.variances.double().sum(-1, keepdim=True)
        return min(self.dims.head_dim, 1 + int((held < share).sum(-1).max()))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt, group = max(1, q.shape[2] - self.decoded), q.shape[1] // k.shape[1]
        basis = dict(self.named_buffers())["basis"].to(k.dtype)
        q_turned, k_turned = (
            torch.stack([x[:, h] @ basis[h * len(basis) // x.shape[1]] for h in range(x.shape[1])], 1) for x in (q, k)
        )
        q_first, k_first = (x[..., : self.leading].detach() for x in (q_turned, k_turned))

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            count = max(1, int(self.budget * (t + 1))) if isinstance(self.budget, float) else self.budget
            rows = []
            for h in range(q.shape[1]):
                seen = held[h // group]
                scores = (k_first[b, h // group, seen] * q_first[b, h, t]).sum(-1).tolist()
                best = sorted(range(len(seen)), key=lambda at: -scores[at])[:count]
                rows.append(sorted(seen[at] for at in best))
            return rows

        def keep(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            return held

        piece, steps = replay(q, k, v, prompt, keep, read), replay(q_turned, k_turned, v, prompt, keep, read)
        return torch.cat([piece[:, :, :prompt], steps[:, :, prompt:]], 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"budget": 0.3, "rank": 0.4, "decoded": 11}),
            Case(Dims(2, 6), 23, {"budget": 5, "rank": 4, "decoded": 7}),
            Case(Dims(3, 4, 1), 7, {"budget": 0.2, "rank": 0.25, "decoded": 5}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"budget": 1.0}

    @classmethod
    def planted(cls, noise: float) -> tuple[Loki, Tensor, Tensor]:
        """A Loki, queries and keys (1, 2, 512, 32) that vary in 8 directions of their own a head, and a little."""
        random = torch.Generator().manual_seed(1)
        axes = torch.linalg.qr(torch.randn(1, 2, 32, 32, generator=random, dtype=torch.float64)).Q[..., :8]
        k = torch.randn(1, 2, 512, 8, generator=random, dtype=torch.float64) @ axes.mT
        q, more = torch.randn(2, 1, 2, 512, 32, generator=random, dtype=torch.float64)
        return cls(Dims(2, 32), budget=0.25, rank=8), q, k + noise * more

    def chosen(self, session: Session, q: Tensor) -> Tensor:
        """Slots (B, H, K) that the newest token, of query q (B, H, 1, D), reads."""
        turned, _, _ = self.policy.project(0, q, q[:, : self.dims.num_kv_heads], q)
        return self.policy.select(Stored(session.store(0), Place(), turned)).slots

    def agreement(self, q: Tensor, k: Tensor) -> float:
        """The part of the exact top tokens of the last query that are chosen."""
        session = self.session()
        self.read(session, q, k, k)
        chosen = self.chosen(session, q[:, :, -1:])
        exact = (q[:, :, -1:] @ k.mT)[:, :, 0].topk(chosen.shape[2], -1).indices
        return float((chosen[..., None] == exact[..., None, :]).any(-1).double().mean())

    @claim("Scores in the rotated space are the original ones, for any orthogonal basis.")
    def rotates(cls) -> Finding:
        loki, q, k = cls.planted(1.0)
        turned = loki.policy.project(0, q, k, k)[:2]
        far = float((turned[0] @ turned[1].mT - q @ k.mT).abs().max() / (q @ k.mT).abs().max())
        return Finding(far < 32 * torch.finfo(q.dtype).eps, f"scores are {far:.1e} apart in a random basis")

    @claim("A step reads d_f / 2 + k_f of the cache, 0.375 at a quarter of each; nothing else reaches its output.")
    def reads_few(cls) -> Finding:
        loki, outs = cls(Dims(1, 32)), []
        q, k, v = torch.randn(3, 1, 1, 512, 32, generator=torch.Generator().manual_seed(0))
        whole = loki.session()
        loki.read(whole, q, k, v)
        chosen = loki.chosen(whole, q[:, :, 511:])[0, 0]
        unread = torch.ones(511, dtype=torch.bool).index_fill(0, chosen[chosen < 511], False).nonzero()[:, 0]
        for spoils in (False, True):
            session = loki.session()
            loki.read(session, *(x[:, :, :511] for x in (q, k, v)))
            store = session.store(0)
            if spoils:
                page = store.table[0, unread // store.page]
                store.pool.k[page, 0, unread % store.page, loki.leading :] = torch.nan
                store.pool.v[page, 0, unread % store.page] = torch.nan
            outs.append(loki.read(session, *(x[:, :, 511:] for x in (q, k, v))))
        part = (512 * loki.leading + 2 * 32 * len(chosen)) / (2 * 32 * 512)
        same = torch.equal(*outs)
        return Finding(same and part == 0.375, f"{part} of the numbers, the others NaN without effect: {same}")

    @claim("Keys of planted rank d or less are ranked as by their exact scores, once the basis is fitted to them.")
    def finds_the_best(cls) -> Finding:
        loki, q, k = cls.planted(0.0)
        before = loki.agreement(q, k)
        loki.fit(k)
        after, rank = loki.agreement(q, k), loki.components(1 - 1e-9)
        holds = after == 1 and rank == 8 and before < 0.9
        return Finding(holds, f"{after:.0%} of the exact top quarter at d = {rank}, {before:.0%} before the fit")

    @claim("Where keys are near a low rank, few channels find most of the best tokens; all channels find every one.")
    def degrades_gently(cls) -> Finding:
        loki, q, k = cls.planted(0.1)
        loki.fit(k)
        few = loki.agreement(q, k)
        loki.leading = 32
        every = loki.agreement(q, k)
        return Finding(few > 0.75 and every == 1, f"8 of 32 channels find {few:.0%}, all find {every:.0%}")
