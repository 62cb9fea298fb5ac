"""HMAR: image tokens of several scales, where each scale attends to itself alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Documents, Pattern, Plan

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SHARPEST = 100.0  # the largest factor of the scores


@functools.lru_cache(maxsize=64)
def scales_of(scales: tuple[int, ...], num_tokens: int) -> Pattern:
    """Scales of these sides, one after the other, as documents; the last may be cut."""
    ends = itertools.accumulate(itertools.cycle(side**2 for side in scales))
    return Documents([0, *itertools.takewhile(lambda end: end < num_tokens, ends), num_tokens])


def shrinking(x: Tensor) -> Tensor:
    """What brings x (..., D) to length one: (..., 1)."""
    return x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).reciprocal()


class Hmar(Attention):
    """Next-scale prediction made Markov: a token of scale k attends to the n_k x n_k tokens of its scale, and no other.

        o_i = sum_j softmax_j(g_h q_i . k_j / (|q_i| |k_j|)) v_j   over the j of i's scale,   g_h = min(exp(a_h), 100)

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D): the scales one after the other, coarse to fine, each
    row-major; after the last one the next image begins, and N may end anywhere. a (H,): learned, log 4 at first. What a
    scale knows of those before it is in its input, the image so far at its own resolution, so no keys are cached.
    Called with scale=k, it takes the tokens of that scale alone, as in generation. A step of masked generation is one
    more such call: the least certain tokens are replaced by a mask embedding and predicted anew from the others.
    Paper: arXiv 2506.04421, Markov next-scale prediction (the mask) and masked prediction; the scales, which are those
    of 256 x 256 images, and the scores were read off the authors' code.
    Deviations: the accumulated image, the embeddings, the two prediction heads and the choice of the tokens to predict
    anew belong to the model around it; heads may share keys.
    scales: n_k, sides of the token maps, coarse to fine (default 1, 2, 3, 4, 5, 6, 8, 10, 13, 16). cosine: the scores
    above (True); without, they are q . k / (4 sqrt(D)), as in the authors' code.
    Costs sum n_k^4 pairs an image, 0.24 N^2 for these scales, and with cosine scores two passes over q and k. Coarse
    scales are finer than tiles: of 16,384 tokens 1 % of the pairs are seen, tiles of 128 hold 2.7 %. Errors: TypeError
    or ValueError for scales that are none or no positive integers, a scale that there is not, or, with a scale, N that
    is not its n_k^2.

    >>> hmar, x = Hmar(Dims(2, 8), scales=(1, 2, 3)), torch.randn(1, 2, 14, 8)
    >>> hmar(x, x, x).shape, hmar.plan(x, x).dense()[0].sum(1).tolist()
    (torch.Size([1, 2, 14, 8]), [1, 4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9, 9, 9])
    """

    spec = Spec(
        id="hmar",
        name="HMAR",
        title="HMAR: Efficient Hierarchical Masked Auto-Regressive Image Generation",
        paper="2506.04421",
        year=2025,
        family="static_sparse",
        uses=("attend", "Documents"),
    )

    def __init__(self, dims: Dims, *, scales: Sequence[int] = SCALES, cosine: bool = True) -> None:
        super().__init__(dims)
        if not isinstance(scales, tuple | list) or not scales:
            raise TypeError(f"scales: got {scales!r}; pass the sides of the token maps, coarse to fine")
        self.scales = tuple(positive("scales", side) for side in scales)
        self.sharpness = nn.Parameter(torch.full((dims.num_heads,), math.log(4))) if cosine else None
        self.per_head = cosine

    def pattern(self, num_tokens: int) -> Pattern:
        """The scales, of as many images as `num_tokens` are, as blocks on the diagonal."""
        return scales_of(self.scales, num_tokens)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern(k.shape[2]).plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, scale: int | None = None) -> Tensor:
        n = k.shape[2]
        if scale is not None:
            last = len(self.scales) - 1
            if positive("scale", scale, least=0) > last:
                raise ValueError(f"scale: got {scale}; there are scales 0 to {last}")
            if n != self.scales[scale] ** 2:
                raise ValueError(f"q: got N = {n} for scale {scale}, which has {self.scales[scale] ** 2} tokens")
        where = None if scale is not None else self.pattern(n)
        if self.sharpness is None:
            return attend(q, k, v, where, scale=q.shape[3] ** -0.5 / 4)
        factor = self.sharpness.exp().clamp(max=SHARPEST)[:, None, None]
        q, k = q * (factor * shrinking(q)), k * shrinking(k)  # one factor a token, so that q and k are copied once
        return attend(q, k, v, where, scale=1.0)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        k, v, rows, start = k[:, reads], v[:, reads], [], 0
        for side in itertools.cycle(self.scales):
            own = slice(start, start + side * side)
            scores = torch.einsum("bhnd,bhmd->bhnm", q[:, :, own], k[:, :, own])
            if self.sharpness is None:
                scores = scores / (4 * q.shape[3] ** 0.5)
            else:
                lengths = [x[:, :, own].square().sum(-1) ** 0.5 for x in (q, k)]
                scores = scores / (lengths[0][..., None] * lengths[1][:, :, None])
                scores = scores * torch.minimum(self.sharpness.exp(), scores.new_tensor(100.0))[:, None, None]
            rows.append(scores.softmax(-1) @ v[:, :, own])
            start += side * side
            if start >= q.shape[2]:
                return torch.cat(rows, 2)
        raise AssertionError

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8), 30, {"scales": (1, 2, 3, 4)}),
            Case(Dims(4, 4, 2), 53, {"scales": (1, 3, 5), "cosine": False}),
            Case(Dims(3, 8), 61, {"scales": (5, 2, 7)}, batch=1),
        ]

    @claim("The mask keeps 23.9 % of the pairs of an image of 680 tokens; VAR, which sees all coarser scales, 61.9 %.")
    def density(cls) -> Finding:
        n = sum(side**2 for side in SCALES)
        own = cls(Dims(1, 8)).pattern(n).plan(n, block=(64, 64)).dense()[0]
        end = (own.int() * torch.arange(1, n + 1)).amax(1)  # of one's own scale, to which VAR sees everything
        found = [int(mask.sum()) / n**2 for mask in (own, torch.arange(n) < end[:, None])]
        figure = f"{found[0]:.1%} of {n}^2 pairs, VAR {found[1]:.1%}"
        return Finding([round(share, 3) for share in found] == [0.239, 0.619], figure)

    @claim("Nothing of the coarser scales is read: each scale alone gives what it gives in the whole, without a cache.")
    def markov(cls) -> Finding:
        sides = SCALES[:7]
        module = cls(Dims(2, 8), scales=sides).double()
        q, k, v = torch.randn(3, 1, 2, sum(n * n for n in sides), 8, dtype=torch.float64)
        with torch.no_grad():
            whole = module(q, k, v)
            parts = [x.split([n * n for n in sides], 2) for x in (q, k, v)]
            alone = [module(*part, scale=i) for i, part in enumerate(zip(*parts, strict=True))]
        error = float((torch.cat(alone, 2) - whole).abs().max())
        # Two sums of as many weighted values as the finest scale has tokens.
        bound = 2 * sides[-1] ** 2 * torch.finfo(torch.float64).eps * float(v.abs().max())
        held = sum(n * n for n in SCALES)
        figure = (
            f"{len(sides)} scales one by one differ from the whole by {error:.1e}; 0 cached tokens, VAR up to {held}"
        )
        return Finding(error <= bound, figure)

    @claim(
        "Steps can be added to any scale: one more costs its own n_k^4 pairs and changes the output of no other scale."
    )
    def steps(cls) -> Finding:
        schedule = {2: 2, 3: 4}  # steps of these scales in the authors' code, one elsewhere
        module = cls(Dims(1, 4), scales=SCALES[:4]).double()
        x = torch.randn(1, 1, 30, 4, dtype=torch.float64, requires_grad=True)
        out = module(x, x, x)[0, 0].split([1, 4, 9, 16])
        alone = True
        for index, rows in enumerate(out):
            (grad,) = torch.autograd.grad(rows.sum(), x, retain_graph=True)
            touched = [bool(g.any()) for g in grad[0, 0].split([1, 4, 9, 16])]
            alone &= touched == [i == index for i in range(4)]
        once = sum(n**4 for n in SCALES)
        masked = sum(schedule.get(n, 1) * n**4 for n in SCALES)
        figure = f"{once} pairs an image, {masked} with 2 steps at 2 x 2 and 4 at 3 x 3 (+{masked / once - 1:.2%})"
        return Finding(alone and masked < 1.01 * once, figure + "; gradients stay within 4 of 4 scales")
