"""Combiner: direct attention to a few tokens, and to the others through summaries, in one softmax of full support."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known, positive
from saccade.softmax import merge
from saccade.where import Band, Blocks, Causal, Full, Pattern, Strided, Summaries

KINDS = ("fixed", "logsparse", "mixture", "axial")
Pair = tuple[Tensor, Tensor]


class Combiner(Attention):
    """Attention as a conditional expectation whose distribution is factorised over spans of tokens.

        o_i = sum_j p(j | i) v_j,   p(j | i) = p(j) if j is direct, plus sum over spans S with j in S of p(S) p(j | S)
        p = softmax over { q_i . k_j : direct tokens } and { q_i . k_S : spans },   k_S = max of k_j over S
        p(j | S) = softmax_j(q_S . k_j),   q_S = max of q_j over S   (per channel; all products over sqrt(D))

        fixed      direct: own segment up to i             spans: every earlier segment
        logsparse  direct: i                               spans: one of 2^l tokens for each bit l of i, together [0, i)
        mixture    direct: own segment up to i, own column spans: what is above another column of the segment, and what
                                                                  is left and right of the column in earlier segments
        axial      direct: own segment up to i             spans: every earlier segment, but q_S is its query in
                                                                  i's column, and k_S = sum_j p(j | S) k_j

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). Segments are `segment` consecutive tokens; a column holds the
    tokens at one place of all segments. Every token up to i is covered: once, in mixture twice where it is not direct.
    Paper: arXiv 2107.05768; the variants follow the authors' code (there: fixed, logn, mixture, axial), bidirectional
    fixed too, whose queries see the span of their own segment as well. Deviations: `axial` weighs keys like values,
    one of that code's summaries without parameters, where its default is a learned one; other poolings than the
    maximum are left out, as are the running sums that stand for running maxima on one of its platforms. The last
    segment may be short; logsparse has a span for every bit, while that code lacks the highest at position 2^l = N - 1.
    kind: "fixed", "logsparse", "mixture" or "axial" (default "fixed"). segment: c, about sqrt(N) is best (128; not used
    by logsparse). causal: False is for fixed alone (True). Costs N (c + N / c) D, logsparse N log(N) D, which it also
    takes as memory. Errors: ValueError or TypeError for an unknown kind, a segment that is no positive integer, another
    kind than fixed that is not causal, and queries that are not as many as keys.

    >>> combiner, (q, k) = Combiner(Dims(1, 8), kind="logsparse"), torch.randn(2, 1, 1, 7, 8)
    >>> combiner(q, k, torch.eye(7)[None, None])[0, 0].gt(0).sum(-1)
    tensor([1, 2, 3, 4, 5, 6, 7])
    """

    spec = Spec(
        id="combiner",
        name="Combiner",
        title="Combiner: Full Attention Transformer with Sparse Computation Cost",
        paper="2107.05768",
        year=2021,
        family="static_sparse",
        uses=("attend", "merge", "Blocks", "Strided", "Band", "Summaries"),
    )

    def __init__(self, dims: Dims, *, kind: str = "fixed", segment: int = 128, causal: bool = True) -> None:
        super().__init__(dims)
        self.kind, self.segment = known("kind", kind, KINDS), positive("segment", segment)
        if not causal and kind != "fixed":
            raise ValueError(f"causal: got {causal} with kind {kind!r}; pass True, or kind='fixed'")
        self.causal = causal
        self.own: Pattern = Blocks(segment) & Causal() if causal else Blocks(segment)
        self.above = Strided(segment) & Band(None, -1)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q: got {q.shape[2]} tokens beside {k.shape[2]} keys; spans pool both, so pass as many")
        return merge(getattr(self, self.kind)(q, k, v))[0][:, :, : q.shape[2]]

    def every_head(self, x: Tensor) -> Tensor:
        """Keys of Hkv heads, one a query head."""
        return x.repeat_interleave(self.dims.group, 1)

    def spans(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Pair:
        """k_S and the expectation of v under p(j | S) for whole spans of `size` tokens: (B, H, N // size, .) each."""
        count = q.shape[2] // size
        q, k, v = (x[:, :, : count * size].unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        values = attend(q.amax(2, keepdim=True), k, v)
        pooled = self.every_head(k.amax(2, keepdim=True)), values
        keys, values = (x[:, :, 0].unflatten(0, (-1, count)).transpose(1, 2) for x in pooled)
        return keys, values

    def fixed(self, q: Tensor, k: Tensor, v: Tensor) -> list[Pair]:
        n, size = q.shape[2], self.segment
        whole, parts = n // size * size, [attend(q, k, v, self.own, return_lse=True)]
        spans = [self.spans(q, k, v, size)] if whole else []
        if whole < n and not self.causal:
            spans.append(self.spans(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:], n - whole))
        if spans:
            keys, values = (torch.cat(each, 2) for each in zip(*spans, strict=True))
            earlier = Summaries(n, size + 1, size) if self.causal else Full()
            parts.append(attend(q, keys, values, earlier, return_lse=True))
        return parts

    def logsparse(self, q: Tensor, k: Tensor, v: Tensor) -> list[Pair]:
        wide, i = torch.promote_types(q.dtype, torch.float32), torch.arange(q.shape[2], device=q.device)
        scaled = q.to(wide) * q.shape[3] ** -0.5
        parts = [(self.every_head(v), (scaled * self.every_head(k)).sum(-1))]
        for level in range((q.shape[2] - 1).bit_length()):
            keys, values = self.spans(q, k, v, 1 << level)
            number, lacks = (i >> level) - 1, (i >> level) % 2 == 0
            at = number.clamp(min=0)
            score = (scaled * keys[:, :, at]).sum(-1).masked_fill(lacks, -torch.inf)
            parts.append((values[:, :, at].masked_fill(lacks[:, None], 0), score))
        return parts

    def padded(self, *tensors: Tensor) -> list[Tensor]:
        """The inputs with zeros behind, so that the last segment is whole; nobody but these looks at them."""
        return [torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.segment)) for x in tensors]

    def axial(self, q: Tensor, k: Tensor, v: Tensor) -> list[Pair]:
        q, k, v = self.padded(q, k, v)
        both = attend(q, k, torch.cat([k, v], 3), Blocks(self.segment))
        keys, values = both.split([k.shape[3], v.shape[3]], 3)
        return [
            attend(q, k, v, self.own, return_lse=True),
            attend(q, keys, values, self.above, return_lse=True),
        ]

    def before(self, q: Tensor, k: Tensor, v: Tensor, axis: int, backwards: bool = False) -> Pair:
        """k_S and the expectation of v, of the span before or behind each token in its column (axis 2) or segment (3).

        The first token of a line has none: what stands there is of no use.
        """

        def lines(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, self.segment))

        def turn(x: Tensor) -> Tensor:
            return x.flip(axis) if backwards else x

        q, k, v = (turn(lines(x)) for x in (q, k, v))
        top_q, top_k = (x.cummax(axis).values.flatten(2, 3) for x in (q, k))
        line = (Strided if axis == 2 else Blocks)(self.segment) & Causal()
        values = attend(top_q, k.flatten(2, 3), v.flatten(2, 3), line)
        keys, values = (turn(lines(x).roll(1, axis)).flatten(2, 3) for x in (self.every_head(top_k), values))
        return keys, values

    def mixture(self, q: Tensor, k: Tensor, v: Tensor) -> list[Pair]:
        q, k, v = self.padded(q, k, v)
        i, c = torch.arange(q.shape[2], device=q.device), self.segment
        others = Blocks(c) & (Band(None, -1) | Band(-1, None))
        parts = [attend(q, k, v, where, return_lse=True) for where in (self.own, self.above)]
        for pair, where, lacks in (
            (self.before(q, k, v, 2), others, i < c),
            (self.before(q, k, v, 3), self.above, i % c == 0),
            (self.before(q, k, v, 3, backwards=True), self.above, i % c == c - 1),
        ):
            o, lse = attend(q, *pair, where, return_lse=True)
            parts.append((o.masked_fill(lacks[:, None], 0), lse.masked_fill(lacks, -torch.inf)))
        return parts

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, c = q.shape[2], self.segment
        k, v = (x[:, [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])]] for x in (k, v))
        q = q / q.shape[3] ** 0.5

        def expected(query: Tensor, tokens: tuple[int, ...]) -> Tensor:
            """p(j | S): (B, H, tokens)."""
            return (query[:, :, None] * k[:, :, tokens]).sum(-1).softmax(-1)

        @functools.cache
        def span(tokens: tuple[int, ...], asks: int = -1) -> Pair:
            """k_S and the expectation of v."""
            some_k, some_v = k[:, :, tokens], v[:, :, tokens]
            p = expected(q[:, :, tokens].amax(2) if asks < 0 else q[:, :, asks], tokens)[..., None]
            return some_k.amax(2) if asks < 0 else (p * some_k).sum(2), (p * some_v).sum(2)

        def choices(i: int) -> list[Pair]:
            """Key and value of all that i weighs."""
            s, u = i // c, i % c
            last = i + 1 if self.causal else min(n, (s + 1) * c)
            direct = [i] if self.kind == "logsparse" else list(range(s * c, last))
            spans: list[tuple[int, ...]] = []
            if self.kind == "fixed":
                spans = [tuple(range(a, min(n, a + c))) for a in range(0, s * c if self.causal else n, c)]
            if self.kind == "logsparse":
                starts = [(((i >> l) - 1) << l, 1 << l) for l in range(i.bit_length()) if i >> l & 1]
                spans = [tuple(range(a, a + size)) for a, size in starts]
            if self.kind == "mixture":
                direct += range(u, s * c, c)
                spans = [tuple(range(w, s * c, c)) for w in range(c) if w != u]
                for a in range(0, s * c, c):
                    spans += [tuple(range(a, a + u)), tuple(range(a + u + 1, a + c))]
            found = [(k[:, :, j], v[:, :, j]) for j in direct] + [span(tokens) for tokens in spans if tokens]
            if self.kind == "axial":
                found += [span(tuple(range(a, a + c)), a + u) for a in range(0, s * c, c)]
            return found

        rows = []
        for i in range(n):
            keys, values = (torch.stack(each, 2) for each in zip(*choices(i), strict=True))
            rows.append(((q[:, :, i, None] * keys).sum(-1).softmax(-1)[..., None] * values).sum(2))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 29, {"segment": 5}),
            Case(Dims(2, 4), 23, {"segment": 6, "causal": False}),
            Case(Dims(4, 4, 2), 27, {"kind": "logsparse"}, batch=1),
            Case(Dims(2, 8, 1), 23, {"kind": "axial", "segment": 4}),
            Case(Dims(4, 4, 2), 22, {"kind": "mixture", "segment": 4}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"segment": length}

    @classmethod
    def implied(cls, q: Tensor, k: Tensor, **params: str | int) -> Tensor:
        """p(j | i) of one head, (N, N): what comes out where every token has a value of its own."""
        each = torch.eye(len(q), dtype=q.dtype)
        return cls(Dims(1, q.shape[1]), **params)(q[None, None], k[None, None], each[None, None])[0, 0]  # type: ignore[arg-type]

    @claim("Every admissible token has a weight above 0, no other has one, and a row sums to 1.")
    def support(cls) -> Finding:
        q, k = torch.randn(2, 61, 8, dtype=torch.float64)
        least, off, beyond = [], [], []
        for kind, causal in [*((kind, True) for kind in KINDS), ("fixed", False)]:
            p = cls.implied(q, k, kind=kind, segment=7, causal=causal)
            allowed = torch.ones_like(p, dtype=torch.bool)
            allowed = allowed.tril() if causal else allowed
            least.append(float(p[allowed].min()))
            off.append(float((p.sum(1) - 1).abs().max()))
            beyond.append(float(p[~allowed].abs().sum()))
        holds = min(least) > 0 and max(beyond) == 0 and max(off) < 61 * torch.finfo(q.dtype).eps
        return Finding(holds, f"smallest weight {min(least):.1e}, rows sum to 1 within {max(off):.1e}, in 5 settings")

    @claim("The weights are p(j) for direct tokens and p(S) p(j | S) for the others, multiplied out.")
    def factorised(cls) -> Finding:
        n, c = 60, 6
        q, k = torch.randn(2, n, 8, dtype=torch.float64)
        q_span, k_span = (x.view(-1, c, 8).amax(1) for x in (q, k))
        given = torch.einsum("sd,scd->sc", q_span, k.view(-1, c, 8)).div(8**0.5).softmax(1)
        segment = torch.arange(n) // c
        direct = (segment[:, None] == segment).tril()
        scores = torch.cat([(q @ k.T).masked_fill(~direct, -torch.inf), q @ k_span.T], 1)
        scores[:, n:].masked_fill_(torch.arange(n // c) >= segment[:, None], -torch.inf)
        one, spans = (scores / 8**0.5).softmax(1).split([n, n // c], 1)
        product = one + (spans[:, :, None] * given).flatten(1)
        error = float((cls.implied(q, k, segment=c) - product).abs().max())
        return Finding(error < n * torch.finfo(q.dtype).eps, f"fixed: differs by {error:.1e}")

    @claim("Spans and direct tokens split the past: each token is covered once in fixed and in logsparse.")
    def once(cls) -> Finding:
        zero, wrong = torch.zeros(63, 8, dtype=torch.float64), 0
        for kind in ("fixed", "logsparse"):
            p = cls.implied(zero, zero, kind=kind, segment=7)
            for i in range(63):
                # Where all scores are equal, so are the weights of spans, and those of tokens inside of them.
                size = (p[i, i] / p[i, : i + 1]).round().int().tolist()
                parts = [7] * (i // 7) if kind == "fixed" else [1 << l for l in reversed(range(6)) if i >> l & 1]
                wanted = [part for part in parts for _ in range(part)]
                wrong += size != wanted + [1] * (i + 1 - len(wanted))
        return Finding(wrong == 0, f"{wrong} of 126 rows split otherwise")

    @claim("A late query weighs about 2 sqrt(N) keys and spans, 4 sqrt(N) in mixture, log2(N) + 1 in logsparse.")
    def budget(cls) -> Finding:
        zero = torch.zeros(1024, 8)
        weighed = {kind: round(float(1 / cls.implied(zero, zero, kind=kind, segment=32)[-1, -1])) for kind in KINDS}
        figure = ", ".join(f"{kind} {count}" for kind, count in weighed.items())
        return Finding(list(weighed.values()) == [63, 11, 125, 63], f"of 1024 tokens: {figure}")
