"""KVCompose: the best tokens of every head are put together, rank by rank, and layers share a budget of such ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.cache import AcrossLayers, Cached, Evict, Scorer, View, top
from saccade.contract import Case, Dims, Finding, Held, Spec, claim, replay
from saccade.errors import positive


class Asked(Scorer):
    """s_j = max_i p_ij over the last `probe` queries, the mean over a group, plus the mean over all key heads.

    value_norm: multiply by ||v_j|| before heads are averaged.
    """

    def __init__(self, probe: int, value_norm: bool = False) -> None:
        self.probe, self.value_norm = positive("probe", probe), value_norm

    def __call__(self, view: View) -> Tensor:
        most: Tensor | None = None
        for block in view.blocks(self.probe):
            most = block.amax(2) if most is None else torch.maximum(most, block.amax(2))
        assert most is not None  # a piece has queries
        scores = view.pooled(most)
        if self.value_norm:
            scores = scores * view.v.to(scores).norm(dim=-1)
        return scores + scores.mean(1, keepdim=True)


class Composite(AcrossLayers):
    """Shared by layers, all key heads of a layer as long as each other: where composite tokens score highest."""

    def keep_all(self, scores: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
        widest = max(each.shape[2] for each in scores)
        ranked = [F.pad(each.sort(dim=-1, descending=True).values, (0, widest - each.shape[2]), value=-torch.inf)
                  for each in scores]  # fmt: skip
        composite = torch.stack([each.mean(1) for each in ranked], 1)  # (G, layers, ranks)
        composite[:, 0] = composite.amax(1)
        counts = top(composite.flatten(1), tokens * len(scores)).view(composite.shape).sum(-1)
        return [top(each, counts[:, layer, None].expand(each.shape[:2])) for layer, each in enumerate(scores)]


class KVCompose(Cached):
    """Layers of unequal lengths, in each of which every head keeps its own best tokens, as many as the other heads.

        s_hj = max_i p_ij over the queries i of a task prompt, the mean over the query heads of key head h
        s_hj <- s_hj + mean_h s_hj
        composite token r of a layer: the token of rank r of every head;   c_r = mean over heads of the r-th largest s
        c of layer 0 <- the maximum over layers, rank by rank;   the largest c of all layers stay

    q (B, L H, N, D), k, v (B, L Hkv, N, D) -> o (B, L H, N, D), the heads of layer 0 first. p: attention of the task
    prompt to the context and to itself, not renormalised. What stays has its positions; what is decoded is appended.
    Paper: arXiv 2509.05165; the scores and the rule of layer 0 follow the authors' code (KVComposePress in kvpress).
    Deviations: the task prompt. Theirs is read in a second pass behind the whole context, at positions that follow it,
    by default the context once more; its attention is noted, its keys are thrown away, and what comes next takes the
    positions behind the context. That takes a model, which a policy has not, and tokens that were read and count for
    nothing. Here there is one pass: the task prompt is the end of the prompt, `probe` tokens that see what is before
    them, stay, and count in the budget. So a prompt that ends with its question is scored by the question; one that
    ends with nothing in particular is scored by its last tokens, where theirs is by all of it, read again. A share is
    rounded for one layer before it is multiplied by their number; theirs of all layers is rounded down. budget: a part
    of the prompt's tokens, or tokens, the mean over layers (default 0.25). probe: tokens of the task prompt (32).
    structured: False shares the budget over the heads of all layers instead, which makes them ragged (True).
    value_norm: scores times ||v_j|| (False). decoded: tokens that are decoded (16). num_layers: L (1). Costs N^2 / 2
    pairs of the prompt, and probe N more; then budget N a step. Errors: ValueError for a budget that does not hold the
    task prompt.

    >>> x = torch.randn(1, 4, 40, 8)
    >>> KVCompose(Dims(4, 8), probe=4, num_layers=2)(x, x, x).shape
    torch.Size([1, 4, 40, 8])
    """

    spec = Spec(
        id="kvcompose",
        name="KVCompose",
        title="KVCompose: Efficient Structured KV Cache Compression with Composite Tokens",
        paper="2509.05165",
        year=2025,
        family="kv_cache",
        uses=("AcrossLayers", "Cached", "Evict", "top"),
        discrete=True,
        waits="scores share out how much each layer holds",
    )

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 0.25,
        probe: int = 32,
        structured: bool = True,
        value_norm: bool = False,
        decoded: int = 16,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        share = Composite(budget) if structured else AcrossLayers(budget)
        self.policy = Evict(Asked(probe, value_norm), share, recent=probe)
        self.budget, self.probe, self.structured, self.value_norm = budget, probe, structured, value_norm

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, d), kv_heads, layers = q.shape, k.shape[1], self.num_layers
        group, each, prompt = heads // kv_heads, kv_heads // layers, max(1, n - self.decoded)
        start = max(0, prompt - self.probe)
        mean = int(self.budget * prompt + 0.5) if isinstance(self.budget, float) else min(self.budget, prompt)

        def layer_scores(b: int, layer: int) -> list[list[float]]:
            """s of the context, for each key head of a layer."""
            rows = []
            for g in range(layer * each, (layer + 1) * each):
                most = [0.0] * start
                for h in range(g * group, (g + 1) * group):
                    p = [((k[b, g, : i + 1] * q[b, h, i]).sum(-1) / d**0.5).softmax(0).tolist()
                         for i in range(start, prompt)]  # fmt: skip
                    most = [old + max(row[j] for row in p) / group for j, old in enumerate(most)]
                norms = [
                    float(v[b, g, j].detach().square().sum()) ** 0.5 if self.value_norm else 1.0 for j in range(start)
                ]
                rows.append([x * norm for x, norm in zip(most, norms, strict=True)])
            return [[x + sum(row[j] for row in rows) / each for j, x in enumerate(one)] for one in rows]

        def keep(b: int, t: int, held: Held) -> Held:
            if t != prompt - 1:
                return held
            scores = [layer_scores(b, layer) for layer in range(layers)]
            best = [[sorted(range(start), key=lambda j, s=s: -s[j]) for s in one] for one in scores]  # type: ignore[misc]
            room = layers * (mean - (prompt - start))
            if self.structured:
                c = [[sum(s[order[r]] for s, order in zip(one, ranks, strict=True)) / each for r in range(start)]
                     for one, ranks in zip(scores, best, strict=True)]  # fmt: skip
                c[0] = [max(column) for column in zip(*c, strict=True)]
                ranked = sorted(((-x, layer, r) for layer, one in enumerate(c) for r, x in enumerate(one)))[:room]
                counts = [[sum(found[1] == layer for found in ranked)] * each for layer in range(layers)]
            else:
                flat = [(-x, layer, g) for layer, one in enumerate(scores) for g, s in enumerate(one) for x in s]
                chosen = sorted(flat)[: room * each]
                counts = [[sum(found[1:] == (layer, g) for found in chosen) for g in range(each)]
                          for layer in range(layers)]  # fmt: skip
            return [
                sorted(order[:count]) + list(range(start, prompt))
                for ranks, lengths in zip(best, counts, strict=True)
                for order, count in zip(ranks, lengths, strict=True)
            ]

        return replay(q, k, v, prompt, keep)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(12, 8, 6), 61, {"budget": 0.5, "probe": 5, "decoded": 11, "num_layers": 3}),
            Case(Dims(4, 4), 29, {"budget": 9, "probe": 3, "decoded": 6, "num_layers": 2, "structured": False}),
            Case(Dims(3, 4), 23, {"budget": 0.5, "probe": 2, "decoded": 5, "value_norm": True}, batch=1),
        ]

    @classmethod
    def inputs(cls, case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Random ones, of heads that are more and less sharp."""
        q, k, v = super().inputs(case, generator, dtype)
        sharp = [(1, 1, 1, 8, 4, 4)[h // case.dims.group % 6] for h in range(q.shape[1])]
        return q * torch.tensor(sharp, dtype=dtype)[:, None, None], k, v

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"budget": 1.0}

    @classmethod
    def _planted(cls) -> tuple[KVCompose, Tensor, Tensor]:
        """Four layers, whose task prompt asks for 48, 16, 6 and 2 tokens of a context of 208: what is held (rows,
        tokens), and its attention (rows, 48, tokens).
        """
        random = torch.Generator().manual_seed(0)
        n, d, ask = 256, 32, 48
        q, k, v = torch.randn(3, 1, 8, n, d, generator=random)
        for h in range(8):
            wanted = torch.randperm(n - ask, generator=random)[: (48, 16, 6, 2)[h // 2]]
            for i in range(ask):
                q[0, h, n - ask + i] = 3 * k[0, h, wanted[i % len(wanted)]]
        one = cls(Dims(8, d), budget=0.3125, probe=ask, num_layers=4)
        session = one.session()
        one.read(session, q, k, v)
        future = torch.ones(ask, n).triu(n - ask + 1) > 0
        p = (q[0, :, -ask:] @ k[0].mT / d**0.5).masked_fill(future, -torch.inf).softmax(-1)
        return one, one.held(session)[0], p

    @claim("Layers are rectangular and of unequal lengths, layer 0 is the longest, and all hold what the budget says.")
    def rectangular(cls) -> Finding:
        one, held, _ = cls._planted()
        counts = held.sum(1).view(4, 2)
        lengths, total = counts[:, 0].tolist(), int(one.num_layers * 256 * 0.3125)
        holds = bool((counts == counts[:, :1]).all()) and lengths[0] == max(lengths) > min(lengths)
        return Finding(holds and sum(lengths) == total, f"lengths {lengths}, {sum(lengths)} for {total}")

    @claim("What a head keeps of the context are its own best tokens.")
    def prefixes(cls) -> Finding:
        _, held, p = cls._planted()
        s, marks = p[:, :, :208].amax(1).view(4, 2, 208), held[:, :208].view(4, 2, 208)
        s = s + s.mean(1, keepdim=True)
        least, most = s.masked_fill(~marks, torch.inf).amin(2), s.masked_fill(marks, -torch.inf).amax(2)
        unlike = int((marks[:, 0] ^ marks[:, 1]).sum())
        best = int((least >= most).sum())
        return Finding(best == 8 and unlike > 0, f"{best} of 8 heads; partners differ in {unlike} tokens")

    @claim("Of the task prompt's attention it recovers more than layers of one length, at the same total.")
    def recovers(cls) -> Finding:
        _, held, p = cls._planted()
        best = p[:, :, :208].amax(1).topk(32, -1).indices
        alike = torch.zeros(8, 256).scatter(1, best, 1.0).index_fill(1, torch.arange(208, 256), 1.0)
        mass, even = (float((p * marks[:, None]).sum(-1).mean()) for marks in (held, alike))
        return Finding(mass > even, f"{mass:.4f} of the attention, {even:.4f} in even layers")
