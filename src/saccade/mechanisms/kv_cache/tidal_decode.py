"""TidalDecode: two layers find the tokens that matter to a step, the layers after each read only those."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache import Cached, Reader, Session, Stored, Tokens
from saccade.contract import Case, Dims, Finding, Spec, claim, replay, tokens_of
from saccade.errors import positive


class Tides(Reader):
    """Layers before `start` read all; so do `start` and `correction`, which pick what the layers after them read."""

    def __init__(self, budget: float | int, start: int, correction: int) -> None:
        super().__init__(budget)
        self.start, self.correction = start, correction

    def select(self, step: Stored) -> Tokens | None:
        if step.index < self.start:
            return None
        picks = step.index in (self.start, self.correction)
        picked = self.best(step, step.scores()) if picks else step.notes("picked")
        step.pass_on("picked", picked, fill=-1)
        return None if picks else Tokens(picked)

    def steady(self, session: Session) -> bool:
        return True


class TidalDecode(Cached):
    """Position-persistent sparse attention: most layers read the tokens that an earlier layer picked in this step.

        layers l <= start, and l = correction:  o = dense attention over the L tokens there are
        other layers:                           o = attention of head h over T_h
        T_h: the k largest q_h . k_j of the last layer that picked, start or correction, for each query head h

    q (B, layers H, N, D), k, v (B, layers Hkv, N, D) -> o (B, layers H, N, D), one layer after another; prompts are
    dense. T_h is picked again at every step; no sinks and no recent tokens are forced into it, not even the newest. All
    tokens are held. Paper: arXiv 2410.05076, section 3; checked against the authors' code (DerrickYLJ/TidalDecode,
    modify_llama.py), which repeats key heads, so that query heads that share one have sets of their own. Deviations:
    the optional cache correction, which reads decoded tokens again densely every few steps, is not here: it is the
    model's to do, whose projections make the keys. budget: k, tokens a sparse layer reads, or a part of those seen,
    rounded up (default 256). start: the first layer that picks, those before it are dense (2). correction: the layer
    that picks again (13, for 32 layers; one that there is not picks nothing). num_layers: layers (1). decoded: tokens
    that are decoded (16). Costs N^2 / 2 pairs a layer of the prompt; a step reads L tokens in start + 2 layers, up to
    H / Hkv times k for each key head in the others. Errors: ValueError for a budget of 0, a start below 0 or a
    correction before it.

    >>> x = torch.randn(1, 5 * 2, 40, 8)
    >>> TidalDecode(Dims(5 * 2, 8), budget=8, start=1, correction=3, num_layers=5)(x, x, x).shape
    torch.Size([1, 10, 40, 8])
    """

    spec = Spec(
        id="tidal_decode",
        name="TidalDecode",
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        paper="2410.05076",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Reader", "Tokens"),
        discrete=True,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 256,
        start: int = 2,
        correction: int = 13,
        num_layers: int = 1,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded, num_layers=num_layers)
        self.start, self.budget = positive("start", start, least=0), budget
        self.correction = positive("correction", correction, least=start)
        self.policy = Tides(budget, start, correction)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, group = q.shape[1] // self.num_layers, q.shape[1] // k.shape[1]

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            count = tokens_of(self.budget, t + 1)
            sets: list[list[int]] = []
            for at in range(q.shape[1]):  # query heads of all layers
                layer = at // heads
                source = self.correction if layer > self.correction else self.start
                if layer <= self.start or layer == self.correction:
                    sets.append(list(range(t + 1)))
                    continue
                picks = source * heads + at % heads
                scores = k[b, picks // group, : t + 1].detach() @ q[b, picks, t].detach()
                sets.append(sorted(scores.argsort(descending=True)[:count].tolist()))
            return sets

        return replay(q, k, v, max(1, q.shape[2] - self.decoded), lambda b, t, held: held, read)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(
                Dims(5 * 4, 8, 5 * 2), 37, {"budget": 0.3, "start": 1, "correction": 3, "num_layers": 5, "decoded": 9}
            ),
            Case(Dims(3 * 3, 4), 23, {"budget": 5, "start": 0, "correction": 2, "num_layers": 3, "decoded": 7}),
            Case(Dims(4 * 2, 4, 4), 31, {"budget": 40, "start": 1, "num_layers": 4, "decoded": 5}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int]:
        return {"budget": 1.0, "start": 0, "num_layers": dims.num_kv_heads}  # a key head a layer, all but one sparse

    @claim("With one query head a key head, a step reads (4 L + 28 k) / 32 L of what 32 dense layers read.")
    def reads_few(cls) -> Finding:
        length, budget, layers = 200, 25, 32
        tidal, x = cls(Dims(layers, 4), budget=budget, num_layers=layers), torch.randn(1, layers, length, 4)
        counts: list[int] = []

        class Counted(Tides):
            def select(self, step: Stored) -> Tokens | None:
                chosen = super().select(step)
                counts.append(length if chosen is None else int((chosen.slots >= 0).sum()))
                return chosen

        session = Session(Counted(budget, tidal.start, tidal.correction), layers)
        tidal.read(session, *[x[:, :, :-1]] * 3)
        tidal.read(session, *[x[:, :, -1:]] * 3)
        found, said = sum(counts), 4 * length + 28 * budget
        return Finding(found == said, f"{found} of {layers * length} tokens, {found / layers / length:.3f} of them")

    @claim("Where all layers rank the tokens alike, the output is that of each layer's own largest k.")
    def persists(cls) -> Finding:
        layers, heads, n, budget = 6, 3, 64, 9
        random = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 2, 1, heads, n, 8, generator=random, dtype=torch.float64)
        v, size = torch.randn(2, layers * heads, n, 8, generator=random, dtype=torch.float64), torch.arange(1, 7)
        q, k = ((x * size[:, None, None, None] ** 0.5).flatten(1, 2) for x in (q, k))  # unlike scores in one order
        tidal = cls(Dims(layers * heads, 8), budget=budget, start=1, correction=3, num_layers=layers, decoded=1)
        found = tidal(q, k, v)[:, :, -1].unflatten(1, (layers, heads))
        scores = torch.einsum("bhd,bhmd->bhm", q[:, :, -1], k) / 8**0.5
        own = scores.masked_fill(scores < scores.topk(budget, -1).values[..., -1:], -torch.inf)
        each, dense = (
            torch.einsum("bhm,bhmd->bhd", s.softmax(-1), v).unflatten(1, (layers, heads)) for s in (own, scores)
        )
        sparse = [layer for layer in range(layers) if layer > 1 and layer != 3]
        error, gap = (float((found - x)[:, sparse].abs().max()) for x in (each, dense))
        return Finding(error < 1e-12 and gap > 0.1, f"{error:.0e} off each layer's own, {gap:.2f} off dense attention")
