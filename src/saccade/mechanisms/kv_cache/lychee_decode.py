"""LycheeDecode: a few key heads find the tokens that matter, and hand them to the same head of the layers above."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.cache import Cached, Reader, Stored, Tokens, View
from saccade.cache.rows import sent
from saccade.cache.view import widened
from saccade.contract import Case, Dims, Finding, Spec, claim, replay, tokens_of
from saccade.errors import part, positive
from saccade.where import Causal, Plan

Read = Callable[[int, int, list[list[int]]], list[list[int]]]

LOW, HIGH = -0.1, 1.1  # what the Kumaraswamy variable is stretched to, before it is cut to [0, 1]


class Slots(Reader):
    """One list of tokens for each key head, written by retrieval heads and handed on from layer to layer."""

    def __init__(self, lychee: LycheeDecode) -> None:
        super().__init__(lychee.budget)
        self.lychee = lychee
        self.periodic = lychee.every is not None

    def piece(self, view: View) -> None:
        heads = view.there.shape[1]
        mine = self.lychee.retrieval()[view.index * heads : (view.index + 1) * heads]
        view.note("retrieval", torch.tensor(mine).expand(len(view.q), -1))  # on the host, for steps that ask no device

    def select(self, step: Stored) -> Tokens | None:
        every = self.lychee.every
        if every is not None and (step.steps + 1) % every == 0:
            return None
        mine = step.notes("retrieval")[0]
        if not bool(mine.any()):
            step.pass_on("picked", step.notes("picked"), fill=-1)
            return Tokens(step.notes("picked"))
        picked = self.best(step, step.pooled(step.scores()))
        retrieves = sent(mine, picked)[:, None]
        if not bool(mine.all()):
            picked = torch.where(retrieves, picked, step.notes("picked")[..., : picked.shape[2]])
        step.pass_on("picked", picked, fill=-1)
        if bool(mine.all()):
            return None
        return Tokens(torch.where(retrieves, step.only(), widened(picked, step.there.shape[2])))


class LycheeDecode(Cached):
    """Retrieval heads attend to all and pick tokens, sparse heads attend to those that their head below handed on.

        retrieval head g of layer l:  o = dense attention,   T_lg = the k largest  mean_h q_h . k_j  of its query heads
        sparse head:                  o = attention over T_lg = T_(l-1)g;   all heads of layer 0 retrieve
        gate:  s = (1 - (1 - u)^(1/b))^(1/a),   z = min(max(-0.1 + 1.2 s, 0), 1),   u uniform in (0, 1)
        P(z != 0) = (1 - (1/12)^a)^b,   E z = int_0^1 (1 - ((t + 0.1) / 1.2)^a)^b dt
        trained:  o = z dense + (1 - z) attention over the `keep` largest q_h . k_j of query head h of the layer below

    q (B, layers H, N, D), k, v (B, layers Hkv, N, D) -> o (B, layers H, N, D), one layer after another; prompts are
    dense, T is found again at every step, all tokens are held. a, b (layers Hkv,): one HardKuma gate a key head, all
    that is trained, to `distance to the dense model + regulariser(lam)`; in the authors' code the squared distance of
    the last hidden states, z drawn by `sample` once a batch, lam from 0.5 on multiplied by exp(0.01 c) a step, c =
    max(mean P(z != 0) - target, 0), AdamW at 0.1. `mixed` is the trained form for any z. Deployed, a head retrieves if
    E z > 0.5 (share None), or if it is among the part `share` of all heads with the largest E z.

    Paper: arXiv 2602.04541, section 3; checked against the authors' code (HITsz-TMG/TMGNLP, LycheeDecode/src).
    Deviations: that code takes E s for E z, and puts 128 sinks and 256 recent tokens among the k, of which the
    equations say nothing; it averages c over steps; its training picks among all columns and hides later ones
    afterwards, here among the keys that a query sees. Thresholds and cumulative weights in place of k are not here.
    budget: k, or a part of the tokens seen, rounded up (default 4096). share: part of the key heads that retrieves,
    those of layer 0 among them (0.125, the paper's 32 of 256). every: each so many-th step is dense in all layers, or
    None (None; 32 to correct the cache). keep: part of the keys that a sparse head sees in training (0.3). soft:
    compute the trained form with z = E z for the decoded tokens (False). num_layers: layers (1). decoded: tokens that
    are decoded (16). Costs N^2 / 2 pairs a layer of the prompt; a step reads L tokens a retrieval head and k a sparse
    one, and in layers with a retrieval head all keys once more, for the scores. Errors: ValueError for a budget of 0, a
    share outside [0, 1], a keep outside (0, 1].

    >>> x = torch.randn(1, 4 * 2, 40, 8)
    >>> LycheeDecode(Dims(4 * 2, 8), budget=8, share=0.5, num_layers=4)(x, x, x).shape
    torch.Size([1, 8, 40, 8])
    """

    spec = Spec(
        id="lychee_decode",
        name="LycheeDecode",
        title="LycheeDecode: Accelerating Long-Context LLM Inference via Hybrid-Head Sparse Decoding",
        paper="2602.04541",
        year=2026,
        family="kv_cache",
        uses=("Cached", "Reader", "Tokens", "attend", "Causal", "Plan"),
        discrete=True,
        waits="trained gates decide which heads retrieve",
    )
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 4096,
        share: float | None = 0.125,
        every: int | None = None,
        keep: float = 0.3,
        soft: bool = False,
        num_layers: int = 1,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        if share is not None:
            part("share", share, "or None: heads with E z > 0.5")
        self.keep = part("keep", keep, "the part of the keys seen in training", zero=False)
        self.budget, self.share, self.soft = budget, share, soft
        self.every = every if every is None else positive("every", every)
        self.a, self.b = (nn.Parameter(torch.ones(dims.num_kv_heads)) for _ in range(2))
        self.policy = Slots(self)

    def shapes(self) -> tuple[Tensor, Tensor]:
        """a, b, kept where nothing is infinite, in a dtype that tells the points of an integral apart."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.a.to(dtype).clamp(1e-6, 100), self.b.to(dtype).clamp(1e-6, 100)

    def sample(self, u: Tensor | None = None) -> Tensor:
        """z (layers Hkv,), one draw a key head; u: uniform numbers in (0, 1), like a."""
        a, b = self.shapes()
        u = torch.rand_like(a) if u is None else u
        s = (1 - (1 - u.clamp(0.001, 0.999)) ** (1 / b)) ** (1 / a)
        return (LOW + (HIGH - LOW) * s).clamp(0, 1)

    def nonzero(self) -> Tensor:
        """P(z != 0) (layers Hkv,)."""
        a, b = self.shapes()
        return (1 - (-LOW / (HIGH - LOW)) ** a) ** b

    def expected(self) -> Tensor:
        """E z (layers Hkv,), by the midpoint rule over P(z > t)."""
        a, b = self.shapes()
        t = (torch.arange(1024, device=a.device, dtype=a.dtype) + 0.5) / 1024
        return ((1 - ((t - LOW) / (HIGH - LOW)) ** a[:, None]) ** b[:, None]).mean(1)

    def regulariser(self, lam: float, target: float = 0.5) -> Tensor:
        """lam max(mean P(z != 0) - target, 0)."""
        return lam * (self.nonzero().mean() - target).clamp(min=0)

    def retrieval(self) -> list[bool]:
        """Which key heads of all layers retrieve, the first of equals first; the host waits for the gates."""
        first, gates = self.dims.num_kv_heads // self.num_layers, self.expected().detach().double().tolist()
        if self.share is None:
            return [at < first or gate > 0.5 for at, gate in enumerate(gates)]
        ranked = sorted(range(len(gates)), key=lambda at: (at >= first, -gates[at]))
        best = set(ranked[: max(first, math.floor(self.share * len(gates) + 0.5))])
        return [at in best for at in range(len(gates))]

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """The trained form for the last queries, q (B, layers H, n, D), k, v (B, layers Hkv, M, D); z (layers Hkv,)."""
        (_, heads, n, _), m, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
        first, ends = heads // self.num_layers, torch.arange(m - n + 1, m + 1, device=q.device)
        scores = q.detach() @ k.detach().repeat_interleave(group, 1).transpose(2, 3)
        scores = scores.masked_fill(torch.arange(m, device=q.device) >= ends[:, None], -torch.inf)
        count = (ends.double() * self.keep).ceil().long()
        picked = scores.argsort(dim=-1, descending=True).argsort(dim=-1) < count[:, None]
        below = torch.cat([scores[:, :first] > -torch.inf, picked[:, :-first]], 1)  # layer 0 is dense
        rows, keys, values = (x.flatten(0, 1)[None] for x in (q, k, v))  # as heads of one sequence
        sparse = attend(rows, keys, values, Plan.from_mask(below.flatten(0, 1)))
        z = z.repeat_interleave(group).to(q.dtype)[:, None, None]
        return z * attend(q, k, v, Causal()) + (1 - z) * sparse[0].unflatten(0, (-1, heads))

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.soft:
            return super().compute(q, k, v)
        at = self.prompt(q.shape[2])
        head = attend(q[:, :, :at], k[:, :, :at], v[:, :, :at], Causal())
        return torch.cat([head, self.mixed(q[:, :, at:], k, v, self.expected())], 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, _), kv_heads = q.shape, k.shape[1]
        group, first, prompt = heads // kv_heads, kv_heads // self.num_layers, max(1, n - self.decoded)
        a, b = (x.clamp(1e-6, 100) for x in (self.a, self.b))
        t = torch.linspace(0, 1, 2049, dtype=a.dtype)[1::2]
        gates = ((1 - ((t + 0.1) / 1.2) ** a[:, None]) ** b[:, None]).sum(1) / 1024
        values, queries, keys = gates.tolist(), q.detach(), k.detach()
        best = sorted(range(first, kv_heads), key=lambda g: -values[g])
        if self.share is not None:
            best = best[: max(0, int(kv_heads * self.share + 0.5) - first)]
        full = {*range(first), *(g for g in best if self.share is not None or values[g] > 0.5)}

        def largest(row: Tensor, query: Tensor, part: float | int) -> list[int]:
            return sorted((row @ query).argsort(descending=True)[: tokens_of(part, len(row))].tolist())

        def deployed(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            if self.every is not None and (t - prompt + 1) % self.every == 0:
                return [held[0]] * heads
            slots, sets = [held[0]] * first, []
            for g in range(kv_heads):
                if g in full:
                    mean = queries[b, g * group : (g + 1) * group, t].mean(0)
                    slots[g % first] = largest(keys[b, g, : t + 1], mean, self.budget)
                sets += [held[0] if g in full else slots[g % first]] * group
            return sets

        def trained(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            rest = range(heads - heads // self.num_layers)
            picked = [largest(keys[b, h // group, : t + 1], queries[b, h, t], float(self.keep)) for h in rest]
            return [held[0]] * (heads // self.num_layers) + picked

        def run(read: Read | None) -> Tensor:
            return replay(q, k, v, prompt, lambda b, t, held: held, read)

        z = gates.repeat_interleave(group)[:, None, None]
        return z * run(None) + (1 - z) * run(trained) if self.soft else run(deployed)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4 * 4, 8, 4 * 2), 37, {"budget": 0.3, "share": 0.5, "num_layers": 4, "decoded": 9}),
            Case(Dims(3 * 3, 4), 29, {"budget": 9, "share": None, "every": 3, "num_layers": 3, "decoded": 11}),
            Case(Dims(3 * 4, 4, 3 * 2), 23, {"soft": True, "keep": 0.4, "num_layers": 3, "decoded": 7}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int]:
        return {"budget": 1.0, "share": 0.0, "num_layers": dims.num_kv_heads}  # a key head a layer, all but one sparse

    @claim("A step reads L tokens for each retrieval head and k for each other, layer 0 all retrieving.")
    def reads_few(cls) -> Finding:
        layers, heads, length, budget = 8, 4, 200, 25
        lychee, x = cls(Dims(32, 4), budget=budget, num_layers=layers, share=None), torch.randn(1, 32, length, 4)
        counts: list[int] = []

        class Counted(Slots):
            def select(self, step: Stored) -> Tokens | None:
                chosen = super().select(step)
                counts.append(heads * length if chosen is None else int((chosen.slots >= 0).sum()))
                return chosen

        with torch.no_grad():
            lychee.a[[9, 14, 20, 21, 22, 23]] = 4.0
        lychee.policy, lychee.decoded, full = Counted(lychee), 1, sum(lychee.retrieval())
        lychee(x, x, x)
        said = full * length + (32 - full) * budget
        return Finding(sum(counts) == said, f"{sum(counts)} of {32 * length} tokens, {full} of 32 heads retrieve")

    @claim("Draws of a gate have the stated mean and the stated share that is not 0.")
    def draws_agree(cls) -> Finding:
        lychee, u = cls(Dims(6, 4)).double(), (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        with torch.no_grad():
            for shape in (lychee.a, lychee.b):
                shape.copy_(torch.rand(6, generator=torch.Generator().manual_seed(len(shape))) * 3 + 0.2)
            lychee.b.copy_(lychee.b.flip(0))
            z = lychee.sample(u[:, None])
            far = [
                float((x - y).abs().max())
                for x, y in ((z.mean(0), lychee.expected()), ((z > 0).double().mean(0), lychee.nonzero()))
            ]
        return Finding(max(far) < 0.002, f"{far[0]:.4f} off the mean, {far[1]:.4f} off the share")

    @classmethod
    def planted(cls, fresh: set[int], layers: int = 4, heads: int = 4, n: int = 96) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v whose heads look where the head below does, but for `fresh` ones and those of layer 0."""
        random = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 2, layers * heads, n, 16, generator=random)
        for at in range(heads, layers * heads):
            if at not in fresh:
                q[:, at], k[:, at] = q[:, at - heads], k[:, at - heads]
        return 3 * q, k, v

    @claim("Trained gates open for the heads that look where the head below does not, and for these alone.")
    def separates(cls) -> Finding:
        fresh, random = {6, 9, 15}, torch.Generator().manual_seed(1)
        lychee, (q, k, v) = cls(Dims(16, 16), share=None, num_layers=4), cls.planted(fresh)
        optimiser, lam, target = torch.optim.AdamW(lychee.parameters(), lr=0.1, weight_decay=0.0), 0.5, 3 / 16
        dense = lychee.mixed(q[:, :, -16:], k, v, torch.ones(16))
        for _ in range(150):
            optimiser.zero_grad()
            z = lychee.sample(torch.rand(16, generator=random))
            distance = (lychee.mixed(q[:, :, -16:], k, v, z) - dense).square().mean(-1).sum(1).mean()
            (distance + lychee.regulariser(lam, target)).backward()
            optimiser.step()
            lam *= math.exp(0.01 * max(0.0, float(lychee.nonzero().detach().mean()) - target))
        gates = lychee.expected().tolist()
        low, high = max(gates[at] for at in range(4, 16) if at not in fresh), min(gates[at] for at in fresh)
        found = {at for at, one in enumerate(lychee.retrieval()) if one and at > 3}
        return Finding(found == fresh and high > 0.5 > low, f"E z >= {high:.2f} there, <= {low:.2f} elsewhere")

    @claim("At equal k, a list a head finds what lists that the heads of a layer share lose.")
    def beats_shared_lists(cls) -> Finding:
        q, k, v = cls.planted(set())
        lychee = cls(Dims(16, 16), budget=12, share=0.25, num_layers=4, decoded=1)
        last = q[:, :, -1:]
        shared = (last[:, :4] @ k[:, :4].transpose(2, 3) / 4).softmax(-1).amax(1)[:, 0].topk(12, -1).indices
        keys, values = (x.take_along_dim(shared[:, None, :, None], 2) for x in (k, v))
        one = attend(last, keys, values)
        truth, found = attend(last, k, v)[:, 4:], lychee(q, k, v)[:, 4:, -1:]
        ours, theirs = (float((x - truth).norm() / truth.norm()) for x in (found, one[:, 4:]))
        return Finding(2 * ours < theirs, f"{ours:.1%} off dense attention, {theirs:.1%} with one list a layer")
