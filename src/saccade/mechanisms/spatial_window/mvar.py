"""MVAR: next-scale prediction where a scale attends to itself alone, and the fine ones to neighbourhoods."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, reached
from saccade.errors import positive
from saccade.where import Documents, Neighborhood, Pattern

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Mvar(Attention):
    """Scale-wise attention of a pyramid of maps, local on its fine scales.

        o_i = sum_{j in S(i)} softmax_j(a_h q_i . k_j / (|q_i| |k_j|)) v_j,   a_h = min(exp(t_h), 100)
        S(i) = the tokens of i's scale; on scales from number `local` on, the kernel x kernel ones nearest to i

    q (B, H, N, D), k, v (B, Hkv, N, D): the maps of the scales one after the other, each row-major -> o (B, H, N, D);
    t_h: learned, one a query head. Nothing passes between scales here: the input of a scale is made from what all
    coarser ones have reconstructed, resized to it (the first Markov assumption), and that is all it knows of them. The
    neighbourhood (the second) is clamped inside the map. A call takes all scales or a run of them, which starts at
    number `first`, as training does (8 scales packed, or one of the last two) and sampling (one by one).
    Paper: arXiv 2505.12742, scale and spatial Markovian attention; a_h, the windows' rule, where they begin and the
    factor without norms follow the authors' code. Deviations: projections, conditioning and the pyramid are the host's;
    a scale with fewer than kernel tokens on an axis is dense there, where the authors' library refuses it.
    scales: tokens a side of each map, or (Y, X) (1, 2, 3, 4, 5, 6, 8, 10, 13, 16). kernel: tokens a side of the
    neighbourhood (7). local: number of the first local scale, from 0 (8). l2_norm: the unit vectors above (True); else
    q_i . k_j / (4 sqrt(D)).
    Costs n kernel^2 D for a local scale of n tokens and n^2 D for another; tiles that windows meet in part are computed
    whole. Errors: ValueError or TypeError for scales,
    kernel or local that are no positive integers (local: from 0), a first that there is not, or a number of tokens that
    no run of scales has.

    >>> mvar, x = Mvar(Dims(2, 8)), torch.randn(1, 2, 680, 8)
    >>> mvar(x, x, x).shape, mvar(x[:, :, 424:], x[:, :, 424:], x[:, :, 424:], first=9).shape
    (torch.Size([1, 2, 680, 8]), torch.Size([1, 2, 256, 8]))
    """

    spec = Spec(
        id="mvar",
        name="MVAR (scale and spatial Markov)",
        title="MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning",
        paper="2505.12742",
        year=2025,
        family="spatial_window",
        uses=("attend", "Documents", "Neighborhood"),
    )
    per_head = True  # by t

    def __init__(
        self,
        dims: Dims,
        *,
        scales: Sequence[int | tuple[int, int]] = SCALES,
        kernel: int = 7,
        local: int = 8,
        l2_norm: bool = True,
    ) -> None:
        super().__init__(dims)
        if not isinstance(scales, (list, tuple)) or not scales:
            raise ValueError(f"scales: got {scales!r}; pass at least one size of a map, such as {SCALES}")
        sides = [side if isinstance(side, (list, tuple)) else (side, side) for side in scales]
        if any(len(side) != 2 for side in sides):
            raise ValueError(f"scales: got {scales!r}; a map has two sides, (Y, X), or one number for both")
        self.maps = [tuple(positive("scales", side) for side in pair) for pair in sides]
        self.kernel, self.local = positive("kernel", kernel), positive("local", local, least=0)
        self.log_scale = nn.Parameter(torch.full((dims.num_heads,), 4.0).log()) if l2_norm else None

    def run(self, num_tokens: int, first: int) -> range:
        """The numbers of the scales that `num_tokens` tokens are, from number `first` on."""
        if positive("first", first, least=0) >= len(self.maps):
            raise ValueError(f"first: got {first} of {len(self.maps)} scales; pass 0 to {len(self.maps) - 1}")
        ends = [*itertools.accumulate(height * width for height, width in self.maps[first:])]
        if num_tokens not in ends:
            raise ValueError(f"q: got N = {num_tokens} tokens; the scales from number {first} on end after {ends}")
        return range(first, first + ends.index(num_tokens) + 1)

    def patterns(self, scales: range) -> list[tuple[int, Pattern]]:
        """What attends together, in order: its tokens, and which of them each sees."""
        dense = [math.prod(self.maps[s]) for s in scales if s < self.local]
        found: list[tuple[int, Pattern]] = [(sum(dense), Documents([0, *itertools.accumulate(dense)]))] if dense else []
        fine = [self.maps[s] for s in scales if s >= self.local]
        return found + [(math.prod(grid), Neighborhood(grid, [min(self.kernel, n) for n in grid])) for grid in fine]

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, first: int = 0) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} keys for {q.shape[2]} queries; both are the tokens of the same maps")
        sizes, patterns = zip(*self.patterns(self.run(q.shape[2], first)), strict=True)
        scale = 0.25 * q.shape[3] ** -0.5
        if self.log_scale is not None:
            q, k, scale = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1), 1.0
            q = q * self.log_scale.clamp(max=math.log(100)).exp()[:, None, None]
        parts = zip(*(x.split(sizes, 2) for x in (q, k, v)), patterns, strict=True)
        return torch.cat([attend(*part, scale=scale) for part in parts], 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, first: int = 0) -> Tensor:
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        k, v = k[:, reads], v[:, reads]
        learned, factor = dict(self.named_parameters()), q.new_ones(q.shape[1]) / (4 * q.shape[3] ** 0.5)
        if learned:
            factor = learned["log_scale"].exp().clamp(max=100)
            q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
        out, start = [], 0
        for number, (height, width) in enumerate(self.maps):
            if number < first or start == q.shape[2]:
                continue
            tall, wide = (self.kernel, self.kernel) if number >= self.local else (height, width)
            for y, x in itertools.product(range(height), range(width)):
                top = max(0, min(y - tall // 2, height - tall))
                left = max(0, min(x - wide // 2, width - wide))
                rows, columns = range(top, min(top + tall, height)), range(left, min(left + wide, width))
                keys = [start + a * width + b for a, b in itertools.product(rows, columns)]
                scores = (q[:, :, start + y * width + x, None] * k[:, :, keys]).sum(-1) * factor[:, None]
                out.append((scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2))
            start += height * width
        return torch.stack(out, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 4, 2), 84, {"scales": (1, 3, 5, 7), "kernel": 3, "local": 2}),
            Case(Dims(2, 8), 53, {"scales": (2, (3, 5), (4, 7), (2, 3)), "kernel": 4, "local": 1, "l2_norm": False}),
            Case(Dims(2, 4), 35, {"scales": (1, 3, 5), "kernel": 3, "local": 0}, batch=1),
        ]

    @classmethod
    def sample(cls, **params: Any) -> tuple[Mvar, list[Tensor]]:
        """A module with the paper's scales, and q, k, v (1, 2, 680, 8) in float64."""
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, 2, 680, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
        return cls(Dims(2, 8), **params).double().requires_grad_(False), inputs

    @claim("Any grouping of the scales gives what they give one at a time.")
    def grouping(cls) -> Finding:
        module, inputs = cls.sample()
        ends = [0, *itertools.accumulate(side**2 for side in SCALES)]
        whole, errors = module(*inputs), []
        for cuts in (range(11), (0, 8, 9, 10), (0, 3, 4, 9, 10)):  # one by one, as in training, and anyhow
            parts = [
                module(*(x[:, :, ends[a] : ends[b]] for x in inputs), first=a) for a, b in itertools.pairwise(cuts)
            ]
            errors.append(float((torch.cat(parts, 2) - whole).abs().max()))
        bound = torch.finfo(torch.float64).eps * 680 * float(inputs[2].abs().max())
        return Finding(max(errors) <= bound, f"at most {max(errors):.1e} apart in three groupings of 680 tokens")

    @claim("A token depends on its own scale alone, and on the two finest scales on 49 tokens of it.")
    def reach(cls) -> Finding:
        module, (q, k, v) = cls.sample()
        found, outside = [], 0
        ends = [0, *itertools.accumulate(side**2 for side in SCALES)]
        for start, end in itertools.pairwise(ends):
            seen = reached(lambda k: module(q, k, v), k, (0, slice(None), (start + end) // 2))[0].any(0)
            found.append(int(seen[start:end].sum()))
            outside += int(seen.sum()) - found[-1]
        holds = outside == 0 and found[:8] == [side**2 for side in SCALES[:8]] and found[8:] == [49, 49]
        return Finding(holds, f"keys of one query a scale: {', '.join(map(str, found))}; {outside} of other scales")

    @claim("Both assumptions together leave a small part of the pairs of next-scale attention.")
    def pairs(cls) -> Finding:
        sizes = [side**2 for side in SCALES]
        causal = sum(size * end for size, end in zip(sizes, itertools.accumulate(sizes), strict=True))
        counts = []
        for local in (10, 8):
            module, _ = cls.sample(local=local)
            plans = [pattern.plan(n, block=(16, 16)) for n, pattern in module.patterns(range(10))]
            counts.append(sum(int(plan.num_attended) for plan in plans))
        holds = counts[0] == sum(size**2 for size in sizes) and counts[1] == sum(n**2 for n in sizes[:8]) + 49 * 425
        holds &= counts[1] < counts[0] / 2 < causal / 4
        figure = (
            f"{causal} pairs, {counts[0] / causal:.0%} with the scales apart, {counts[1] / causal:.0%} with windows"
        )
        return Finding(holds, figure)
