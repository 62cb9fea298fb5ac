"""SinkLoRA: groups of tokens, shifted by half a group on a few heads, and sinks that every token sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Blocks, Box, Causal, Frame, Pattern, PerHead, Plan, Sinks, Span


@dataclass(frozen=True)
class ShiftedGroups(Pattern):
    """Groups of `size` tokens of a ring that is turned by half a group; a token sees those of its group before it.

        floor(rho_i / size) = floor(rho_j / size) and rho_j <= rho_i,   rho_t = (t - floor(size / 2)) mod N

    >>> ShiftedGroups(4).dense(6)[0].int().tolist()[:3]
    [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    """

    size: int

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        one, other = ((t - self.size // 2) % num_keys for t in (i, j))
        return (one // self.size == other // self.size) & (other <= one)

    def boxes(self, frame: Frame) -> list[Box]:
        n = frame.num_keys
        turn = self.size // 2 % n
        place = (frame.queries - turn) % n
        first, end = place // self.size * self.size + turn, place + turn + 1  # of the group, unrolled beyond the last
        spans = (first, end.clamp(max=n)), ((first - n).clamp(min=0), end - n)
        return [{("position", frame.tag): Span(frame.keys, *ends)} for ends in spans]


class SinkLoRA(Attention):
    """Sink fixed attention (SF-Attn): LongLoRA's shifted sparse attention, part of the shift undone, with sinks.

        rho_i = i on heads that stay,   (i - floor(G/2)) mod N on shifted heads
        i sees j  iff  floor(rho_i / G) = floor(rho_j / G) and rho_j <= rho_i,   or  j < g and j <= i

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); G is a quarter of N, rounded up. LongLoRA shifts the second
    half of the heads, query heads that share a key head each for itself; a share p of them is returned to its place.
    The group that wraps joins the last floor(G/2) tokens with the first, which see them though they come later: such a
    layer is for training, and attention in use is full, or keeps heavy hitters. Rotary positions stay the true ones.
    Paper: arXiv 2406.05678, SF-Attn; groups, shift and mask follow the authors' code, which has neither sinks nor
    returned heads (sinks = 0, returned = 0). Deviations: which shifted heads return is our choice, the first of them;
    so is the short last group where G does not divide N, which that code refuses. group: G (default None: ceil(N / 4)).
    sinks: g, visible tokens in front (4). returned: p, from 0 to 1, rounded to whole heads (0.5). Costs at most
    N ((G + 1) / 2 + g) pairs a head. Errors: ValueError or TypeError for a group that is no positive integer, sinks
    that are none >= 0, and a share that is no number from 0 to 1.

    >>> seen = SinkLoRA(Dims(2, 8), group=4, sinks=1, returned=0.0).pattern(8).dense(8, heads=2).int()
    >>> seen[0, 6].tolist(), seen[1, 6].tolist(), seen[1, 0].tolist()
    ([1, 0, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1])
    """

    spec = Spec(
        id="sinklora",
        name="SinkLoRA (SF-Attn)",
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
        paper="2406.05678",
        year=2024,
        family="static_sparse",
        uses=("attend", "PerHead", "Blocks", "Pattern", "Sinks"),
    )
    per_head = True

    def __init__(self, dims: Dims, *, group: int | None = None, sinks: int = 4, returned: float = 0.5) -> None:
        super().__init__(dims)
        self.group = None if group is None else positive("group", group)
        self.sinks = positive("sinks", sinks, least=0)
        if isinstance(returned, bool) or not isinstance(returned, int | float):
            raise TypeError(f"returned: got {returned!r} ({type(returned).__name__}); pass a number from 0 to 1")
        if not 0 <= returned <= 1:
            raise ValueError(f"returned: got {returned}; pass a share of the shifted heads, from 0 to 1")
        self.returned = returned
        self.num_shifted = math.floor((dims.num_heads - dims.num_heads // 2) * (1 - returned) + 0.5)
        self.causal = self.num_shifted == 0

    def pattern(self, num_tokens: int) -> Pattern:
        """What each query head sees of so many tokens."""
        size = self.group or -(-num_tokens // 4)
        front = Sinks(self.sinks) & Causal()
        stays = Blocks(size) & Causal() | front
        shifted = ShiftedGroups(size) | front
        heads = self.dims.num_heads
        return PerHead([stays] * (heads - self.num_shifted) + [shifted] * self.num_shifted)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern(k.shape[2]).plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern(k.shape[2]))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]
        size = self.group or (m + 3) // 4
        still = heads - int((heads - heads // 2) * (1 - self.returned) + 0.5)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for h in range(heads):
            shared, by = h // (heads // k.shape[1]), 0 if h < still else size // 2
            order = [(t + by) % m for t in range(m)]  # the tokens as they stand once they are rolled
            for at, i in enumerate(order):
                if i < m - n:
                    continue
                seen = set(order[at - at % size : at + 1]) | {j for j in range(self.sinks) if j <= i}
                keys, values = (x[:, shared, sorted(seen)] for x in (k, v))
                scores = (q[:, h, i - m + n, None] * keys).sum(-1) / q.shape[3] ** 0.5
                out[:, h, i - m + n] = (scores.softmax(-1)[..., None] * values).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"group": 8, "sinks": 3}),
            Case(Dims(3, 4), 29, {"sinks": 0, "returned": 0.0}),
            Case(Dims(6, 4, 3), 23, {"group": 5, "sinks": 1, "returned": 0.3}, batch=1),
            Case(Dims(2, 8), 26, {"sinks": 2, "returned": 1.0}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"group": length, "returned": 1.0}

    @classmethod
    def weights(cls, num_tokens: int, **params: float) -> Tensor:
        """(H, N, N): the weights of 8 heads at random queries and keys, read off with one value a key."""
        q, k = torch.randn(2, 1, 8, num_tokens, 4, dtype=torch.float64)
        each = torch.eye(num_tokens, dtype=torch.float64).expand(1, 8, -1, -1)
        return cls(Dims(8, 4), **params)(q, k, each)[0]  # type: ignore[arg-type]

    @claim(
        "Pairs that look ahead are (G/2)^2 a shifted head: their number falls with the share that is returned, to 0."
    )
    def wrapped(cls) -> Finding:
        shares = (0.0, 0.25, 0.5, 1.0)
        counts = [int((cls.weights(64, returned=share).triu(1) > 0).sum()) for share in shares]
        figure = f"{counts} pairs in 8 heads of G = 16, p = {', '.join(map(str, shares))}"
        return Finding(counts == [int(4 * (1 - share)) * 8**2 for share in shares], figure)

    @claim("Shifted heads carry information across groups; with all returned, nothing crosses but through the sinks.")
    def seam(cls) -> Finding:
        own = torch.arange(64)[:, None] // 16 == torch.arange(64) // 16

        def crossed(**params: float) -> int:
            """Pairs of tokens of different groups that four layers connect."""
            layer = (cls.weights(64, **params) > 0).any(0).double()
            return int(((torch.linalg.matrix_power(layer, 4) > 0) & ~own).sum())

        shifted, fixed, sinks = (crossed(sinks=g, returned=p) for g, p in ((0, 0.5), (0, 1.0), (4, 1.0)))
        first = 4 * 48  # the sinks, seen from the three other groups
        figure = f"{shifted} pairs at p = 0.5, {fixed} at p = 1, {sinks} of them with 4 sinks"
        return Finding(shifted > 0 and fixed == 0 and sinks == first, figure)

    @claim("Without sinks, and with nothing returned, it is shifted sparse attention as published: roll, fold, undo.")
    def s2_attention(cls) -> Finding:
        size, (q, k, v) = 16, torch.randn(3, 2, 6, 64, 8, dtype=torch.float64)
        turned = [torch.cat([x[:, :3], x[:, 3:].roll(-size // 2, 2)], 1).unflatten(2, (4, size)) for x in (q, k, v)]
        ahead = torch.ones(size, size, dtype=torch.bool).triu(1)
        scores = (turned[0] @ turned[1].mT / 8**0.5).masked_fill(ahead, -torch.inf)
        folded = (scores.softmax(-1) @ turned[2]).flatten(2, 3)
        published = torch.cat([folded[:, :3], folded[:, 3:].roll(size // 2, 2)], 1)
        error = float((cls(Dims(6, 8), sinks=0, returned=0.0)(q, k, v) - published).abs().max())
        return Finding(error < 64 * torch.finfo(torch.float64).eps * float(v.abs().max()), f"differs by {error:.1e}")

    @claim("A head weighs N (G + 1) / 2 pairs in groups and at most N g of sinks.")
    def budget(cls) -> Finding:
        n, heads = 4096, 8
        pairs = cls(Dims(heads, 8)).pattern(n).plan(n, heads=heads, block=(64, 64)).num_attended
        groups = n * (n // 4 + 1) / 2
        figure = f"{pairs:.0f} pairs, {pairs / n**2:.1%} of N^2 a head at N = {n}; groups alone {groups:.0f}"
        return Finding(groups < pairs <= groups + 4 * n, figure)
