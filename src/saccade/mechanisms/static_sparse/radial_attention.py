"""Radial Attention: a video token looks around its place in other frames, less far the further away the frame is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.softmax import merge
from saccade.where import BlockBand, Box, Frame, Or, Pattern, Plan, Sinks, Span

APART = 8  # frames from which on a band is laid out in cells of frames and places,
SMALL = 1024  # if a frame has fewer places; else rows of it are as good


@dataclass(frozen=True)
class Ring(Pattern):
    """Near places of the frames at a distance of band to 2 band - 1; frames before `first` are left out.

    |k - l| < max(1, floor(size / band)),  D mod ceil(band / size) = 0,  for place k of its frame and l of the other.
    frames, size: of the video, and places of a frame. band: b. first: of the frames that are seen.

    >>> Ring(4, 3, 2).dense(12)[0].view(12, 4, 3).sum(2)[0].tolist()
    [0, 0, 1, 1]
    """

    frames: int
    size: int
    band: int
    first: int = 0

    @property
    def aside(self) -> int:
        """Places on either side."""
        return max(1, self.size // self.band) - 1

    @property
    def every(self) -> int:
        """Frames from one that is seen to the next."""
        return -(-self.band // self.size)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        apart, between = (i // self.size - j // self.size).abs(), (i % self.size - j % self.size).abs()
        some = (apart >= self.band) & (apart < 2 * self.band) & (apart % self.every == 0)
        return some & (between <= self.aside) & (j // self.size >= self.first)

    def boxes(self, frame: Frame) -> list[Box]:
        # Two boxes of two axes: the bounds that a kernel of `hopper` holds. Where frames are left out no place is seen
        # but one's own, so that place and class of frames are one number.
        (at, place), (to, other) = ((x // self.size, x % self.size) for x in (frame.queries, frame.keys))
        if self.every > 1:
            place, other = place * self.every + at % self.every, other * self.every + to % self.every
        sides = (at - 2 * self.band + 1).clamp(min=self.first), at - self.band + 1
        ahead = (at + self.band).clamp(min=self.first), at + 2 * self.band
        near = Span(other, place - self.aside, place + self.aside + 1)
        # An axis of a grid has plans lay the tokens out in its cells.
        cells = self.every == 1 and self.band >= APART and self.size < SMALL
        grid = ("grid", (self.frames, self.size), (1, 1))
        names = [
            (*grid, axis, "step", frame.tag) if cells else ("ring", self.size, self.every, axis, frame.tag)
            for axis in (0, 1)
        ]
        return [{names[0]: Span(to, *ends), names[1]: near} for ends in (sides, ahead)]


def rings(frames: int, size: int, first: int) -> list[Ring]:
    """Of the bands b = 2, 4, 8, ..., those that a video has."""
    return [Ring(frames, size, 1 << r, first) for r in range(1, (frames - 1).bit_length())]


class RadialAttention(Attention):
    """Attention for video whose window of places halves each time that the distance in frames doubles.

        place k of frame i sees place l of frame j  iff  |k - l| + 1 <= s / b,  or  k = l and D mod ceil(b / s) = 0,
        D = |i - j|,  b = 2^floor(log2 max(D, 1)),  s = Y X places a frame;  and all of frame 0, and all text

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D), N = T Y X + text: frames row-major, then the text tokens,
    which see everything. A frame and the two beside it are read whole; where b > s, frames are left out instead of
    places. Paper: arXiv 2506.19852, equation 4 (the mask), and the first frame as attention sink; that text is dense
    follows the authors' code.
    Deviations: none from equation 4. The authors' code has another rule, in blocks of 128 tokens, which is not offered:
    the window |k - l| <= 2^bits(s) / 2^bits(D) (times a factor) is never narrower than a block; where it would be,
    frames are left out instead; a block is kept when more than 60 % of its columns that are not empty are more than a
    third full; for Wan, the frames beside a query's own have a window of s / 2. Which layers and denoising steps stay
    dense is a matter of the host.
    text: text tokens behind the video (default 0; `plan` knows of none, and gives None with text). sink: frames at the
    start that all tokens see (1; 0 for none).
    Costs about 2.5 s N log2 T pairs; dense attention has s N T. Every band is attended on its own, in two boxes, and
    the results are merged: in one call with all boxes, kernels would compare every key of a tile with every band. Tiles
    are runs of one frame, and for distances from 8 frames on, where frames have fewer than 1024 places, compact cells.
    A merge reads each part once and its sum twice, which is what a call takes beyond its tiles: N H D numbers for each
    of log2 T bands, little beside the s N H D products of a band where frames have a thousand places.
    Errors: ValueError when dims.grid has not three axes or N is not T Y X + text; ValueError or TypeError for text or
    sink that is no integer >= 0.

    >>> radial = RadialAttention(Dims(2, 8, grid=(9, 2, 4)), text=3)
    >>> x = torch.randn(1, 2, 75, 8)
    >>> radial(x, x, x).shape, radial.pattern.dense(72)[0, 71].view(9, 8).sum(1).tolist()
    (torch.Size([1, 2, 75, 8]), [8, 2, 2, 2, 2, 4, 4, 8, 8])
    """

    spec = Spec(
        id="radial_attention",
        name="Radial Attention",
        title="Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
        paper="2506.19852",
        year=2025,
        family="static_sparse",
        uses=("attend", "merge", "BlockBand", "Sinks", "Pattern"),
        grid=3,
    )

    def __init__(self, dims: Dims, *, text: int = 0, sink: int = 1) -> None:
        super().__init__(dims)
        self.text, self.sink = positive("text", text, least=0), positive("sink", sink, least=0)
        frames, *sides = dims.grid or (1,)
        self.num_video, size = math.prod((frames, *sides)), math.prod(sides)
        first = min(sink, frames)
        near: Pattern = BlockBand(size, 2, 1) | Sinks(first * size)
        # Disjoint: a frame beside the query's own is at no distance of two, and rings leave the first frames out.
        self.parts = [near, *rings(frames, size, first)]

    @property
    def pattern(self) -> Pattern:
        """What the tokens of the video see of it."""
        return Or.of(*self.parts)

    def check_grid(self, name: str, num_tokens: int) -> None:
        if num_tokens != self.num_video + self.text:
            wanted = f"{self.num_video} tokens of the grid {self.dims.grid} and then text: {self.text}"
            raise ValueError(f"{name}: got N = {num_tokens}; pass the {wanted}, or rebuild")

    def plan(self, q: Tensor, k: Tensor) -> Plan | None:
        if self.text:
            return None
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (video, asks), (places, words), (values, said) = (x.tensor_split([self.num_video], 2) for x in (q, k, v))
        parts = [attend(video, places, values, where, return_lse=True) for where in self.parts]
        if not self.text:
            return merge(parts)[0]
        o, _ = merge([*parts, attend(video, words, said, return_lse=True)])
        return torch.cat([o, attend(asks, k, v)], 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (frames, height, width), (heads, n) = self.dims.grid, q.shape[1:3]  # type: ignore[misc]
        s, seen = height * width, torch.ones(n, n, dtype=torch.bool)
        aside = (torch.arange(s)[:, None] - torch.arange(s)).abs()
        for i in range(frames):
            for j in range(self.sink, frames):
                apart = abs(i - j)
                band = 2 ** math.floor(math.log2(max(apart, 1)))
                alike = (aside == 0) & (apart % math.ceil(band / s) == 0)
                inside = (aside + 1 <= s / band) | alike if band <= s else alike
                seen[i * s : (i + 1) * s, j * s : (j + 1) * s] = inside
        reads = torch.arange(heads) // (heads // k.shape[1])
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k[:, reads]) / q.shape[3] ** 0.5
        return torch.einsum("bhnm,bhmd->bhnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[:, reads])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(9, 1, 2)), 18, {"sink": 0}),
            Case(Dims(4, 4, 2, grid=(17, 1, 3)), 56, {"text": 5, "sink": 2}, batch=1),
            Case(Dims(2, 8, grid=(5, 3, 3)), 48, {"text": 3}),
            Case(Dims(3, 4, grid=(11, 2, 5)), 110, {"sink": 3}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"sink": length, "text": length - math.prod(dims.grid or ())}

    @claim("Entries of the mask, band by band, are what equation 4 counts; a long video keeps a sixth of all pairs.")
    def counts(cls) -> Finding:
        small, exact = ((24, 3, 5), (70, 1, 8), (9, 4, 4)), True
        for grid in small:
            dims, n = Dims(1, 8, grid=grid), math.prod(grid)
            plan = cls(dims).pattern.plan(n, block=(64, 64))
            exact &= int(plan.num_attended) == _entries(grid[0], grid[1] * grid[2])
        kept = [_entries(frames, 48 * 80) / (frames * 48 * 80) ** 2 for frames in (30, 128)]
        figure = (
            f"{len(small)} masks counted, all as said; 48 x 80 places: {kept[0]:.1%} of 30 frames, {kept[1]:.1%} of"
        )
        return Finding(exact and kept[1] < 1 / 6 < 1 / 3 < kept[0], f"{figure} 128")

    @claim(
        "At a fixed frame size entries grow as n log n: a share of s n log2 f that stays, and is below the bound of 4."
    )
    def growth(cls) -> Finding:
        frames = (32, 64, 256, 1024)
        plan = cls(Dims(1, 8, grid=(frames[0], 4, 4))).pattern.plan(16 * frames[0], block=(64, 64))
        counted = int(plan.num_attended) == _entries(frames[0], 16)
        share = [_entries(f, 16) / (16 * 16 * f * math.log2(f)) for f in frames]
        dense = [f / math.log2(f) for f in frames]
        steady = max(share) < 1.05 * min(share) and dense[-1] > 10 * dense[0]
        figure = f"{[round(e, 2) for e in share]} s n log2 f at s = 16, f = {list(frames)}; dense"
        return Finding(counted and steady and max(share) < 4, f"{figure} {[round(d, 1) for d in dense]}")

    @claim("A query's window halves each time the distance in frames doubles; then every second frame is left out.")
    def halving(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 1, 37 * 16, 4)
        v.requires_grad_()
        place = 36 * 16 + 8
        (grad,) = torch.autograd.grad(cls(Dims(1, 4, grid=(37, 4, 4)))(q, k, v)[0, 0, place].sum(), v)
        read = (grad[0, 0].abs().sum(-1) > 0).view(37, 16).sum(1).flip(0).tolist()  # by distance in frames
        expected = [16, 16] + [15] * 2 + [7] * 4 + [3] * 8 + [1] * 16 + [1, 0, 1, 0, 16]
        figure = f"{[read[d] for d in (1, 2, 4, 8, 16)]} places of 16 read at distance 1, 2, 4, 8, 16;"
        return Finding(read == expected, f"{figure} {read[32:36]} at 32 to 35; all {read[36]} of the first frame")


def _entries(frames: int, size: int) -> int:
    """Pairs that equation 4 and the first frame admit."""

    def between(apart: int) -> int:
        band = 1 << (max(apart, 1).bit_length() - 1)
        width = size // band
        if width:
            return size * (2 * width - 1) - width * (width - 1)
        return size if apart % -(-band // size) == 0 else 0

    bands = sum((frames - d) * (2 if d else 1) * between(d) for d in range(frames))
    return bands + sum(size**2 - between(d) for d in range(1, frames))
