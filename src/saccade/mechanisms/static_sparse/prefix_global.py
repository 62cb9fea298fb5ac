"""Prefix Global: the first tokens, put there because they matter, see and are seen by all; the others see a band."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Band, Box, Frame, Pattern, Plan, Prefix, Span
from saccade.where.layout import Order
from saccade.where.pattern import all_tiles


@dataclass(frozen=True)
class Readers(Pattern):
    """The first n queries see every key: i < n."""

    n: int

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (i < self.n).expand(torch.broadcast_shapes(i.shape, j.shape))

    def boxes(self, frame: Frame) -> list[Box]:
        end = torch.where(frame.queries < self.n, frame.num_keys, 0).to(frame.queries.dtype)
        return [{("position", frame.tag): Span(frame.keys, torch.zeros_like(end), end)}]

    def most_tiles(self, n: int, m: int, block: tuple[int, int], order: Order | None) -> int:
        return all_tiles(n if order is not None else min(n, max(0, self.n - (m - n))), m, block)


class PrefixGlobal(Attention):
    """Bidirectional attention with a global prefix.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over j with  i < k  or  j < k  or  |i - j| <= r

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). The host puts the k tokens that matter most first: the text
    of the section in question, its image. They are tokens of the input, as they are, and attend themselves, unlike the
    transient globals of LongT5, which are sums over blocks and only attended to. Paper: arXiv 2305.03668, Prefix
    Global. Deviations: positions, and any bias of the scores, are the host's. prefix: k (default 512). radius: r,
    tokens on either side (127, that of LongT5). Costs k N + (N - k) (k + 2 r + 1) pairs at most. Errors: ValueError or
    TypeError for a prefix that is no positive integer, a radius that is none >= 0.

    >>> PrefixGlobal(Dims(1, 8), prefix=1, radius=1).pattern.dense(5).int()[0].tolist()
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    """

    spec = Spec(
        id="prefix_global",
        name="Prefix Global",
        title="A Suite of Generative Tasks for Multi-Level Multimodal Webpage Understanding",
        paper="2305.03668",
        year=2023,
        family="static_sparse",
        uses=("attend", "Prefix", "Band"),
    )

    def __init__(self, dims: Dims, *, prefix: int = 512, radius: int = 127) -> None:
        super().__init__(dims)
        self.prefix, self.radius = positive("prefix", prefix), positive("radius", radius, least=0)
        self.pattern = Readers(prefix) | Prefix(prefix) | Band(radius, radius)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]
        reads = [h // (heads // k.shape[1]) for h in range(heads)]
        rows = []
        for i in range(m - n, m):
            seen = [j for j in range(m) if min(i, j) < self.prefix or abs(i - j) <= self.radius]
            keys, values = (x[:, reads][:, :, seen] for x in (k, v))
            scores = (q[:, :, i - m + n, None] * keys).sum(-1) / q.shape[3] ** 0.5
            rows.append((scores.softmax(-1)[..., None] * values).sum(2))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 53, {"prefix": 5, "radius": 3}),
            Case(Dims(2, 4), 31, {"prefix": 1, "radius": 0}),
            Case(Dims(3, 8), 17, {"prefix": 23, "radius": 2}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"prefix": length}

    @claim("It weighs k N + (N - k)(k + 2 r + 1) pairs, less what the ends of the band cut off, instead of N^2.")
    def budget(cls) -> Finding:
        n, module = 8192, cls(Dims(1, 8))
        pairs = int(module.pattern.plan(n, block=(64, 64)).num_attended)
        k, r = module.prefix, module.radius
        most = k * n + (n - k) * (k + 2 * r + 1)
        cut = r * (r + 1)  # half where the band meets the prefix, which is seen already, half at the end
        figure = f"{pairs} pairs, {pairs / n**2:.1%} of N^2 at N = {n}; the formula {most}"
        return Finding(pairs == most - cut, figure)

    @claim("Two layers connect every pair of tokens, by the prefix; a band alone reaches 4 r + 1 tokens.")
    def two_layers(cls) -> Finding:
        n, module = 301, cls(Dims(1, 8), prefix=1, radius=5)
        both, band = (pattern.dense(n)[0].double() for pattern in (module.pattern, Band(5, 5)))
        share, most = int(((both @ both) > 0).sum()) / n**2, int(((band @ band) > 0).sum(-1).max())
        return Finding(
            share == 1 and most == 21, f"with one token in front {share:.0%}, without it {most} of {n} tokens"
        )

    @claim("What stands in front is found by all queries; with as many global tokens drawn at random few are right.")
    def salient(cls) -> Finding:
        random, n, count, draws = torch.Generator().manual_seed(0), 512, 16, 24
        module = cls(Dims(draws, 32), prefix=count, radius=4)
        keys, values = torch.randn(2, draws, n, 32, generator=random)
        asked = torch.arange(draws)[:, None], torch.randint(0, count, (draws, n), generator=random)
        q, wanted = 4 * 32**0.5 * torch.nn.functional.normalize(keys[asked], dim=-1), values[asked]

        def hits(place: Tensor) -> float:
            """Share of the answers that are right when key j stands at place[j]."""
            k, v = (torch.zeros_like(x).scatter(1, place[..., None].expand_as(x), x)[None] for x in (keys, values))
            error = (module(q[None], k, v)[0] - wanted).norm(dim=-1)
            return float((error < wanted.norm(dim=-1) / 2)[:, count:].double().mean())

        found = hits(torch.arange(n).expand(draws, -1))
        chance = hits(torch.stack([torch.randperm(n, generator=random) for _ in range(draws)]))
        figure = f"{found:.0%} of the answers in front, {chance:.0%} where the global tokens are other ones"
        return Finding(found > 0.9 and chance < 0.2, figure)
