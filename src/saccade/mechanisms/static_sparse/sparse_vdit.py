"""Sparse-vDiT: heads of a video transformer read a diagonal, many diagonals or stripes, or are skipped; a search says
which.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import known, positive
from saccade.softmax import attend_heads
from saccade.where import Band, Full, Pattern, PerHead, Plan, Prefix, Sinks
from saccade.where.pattern import Box, Frame, Span

MODES = ("full", "skip", "diagonal", "multi_diagonal", "vertical_stripe")


@dataclass(frozen=True)
class SamePlace(Pattern):
    """Tokens of all frames at nearly the same place: |i mod size - j mod size| <= reach, `size` tokens a frame."""

    size: int
    reach: int

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        return (i % self.size - j % self.size).abs() <= self.reach

    def boxes(self, frame: Frame) -> list[Box]:
        place = frame.queries % self.size
        span = Span(frame.keys % self.size, place - self.reach, place + self.reach + 1)
        return [{("residue", self.size, frame.tag): span}]  # so that plans lay the tokens out place by place


class SparseVdit(Attention):
    """One of five modes a head, chosen offline: full, skipped, a diagonal, many diagonals, or vertical stripes.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over
        full: all j   diagonal: |i - j| <= r   multi_diagonal: |p(i) - p(j)| <= floor(r / T)
        vertical_stripe: j in the first `stripe` frames, or |i - j| <= r          skip: o_i = 0
        r = floor(window N / 2),   p(i) = i mod Y X, the place in the frame

    q (B, H, N, D), k, v (B, Hkv, N, D), row-major in (T, Y, X) -> o (B, H, N, D). Near places of other frames stand at
    multiples of Y X from the diagonal; laid out place by place they are one diagonal. Heads of a mode run in one call.
    `search` gives the modes of every layer: of each head the sparse mode i with the least

        L_i = mean (O_i - O_full)^2 + penalty (1 - S_i)     unless all L_i > threshold: then full

    S_i: the share of key blocks that the mode skips. Paper: arXiv 2506.03065, section 4.1.2 (the modes), equations 2
    and 3 (the search), 5.3 (penalty and threshold).
    Deviations: the paper fixes the widths of its kernels without giving them, and does not say which columns the
    stripes are: widths are ours, and so are the first frames as stripes and the diagonal beside them. Text tokens are
    not offered. Key heads may be shared.
    modes: a mode, or one a query head (default "multi_diagonal"). window: share of the keys in a diagonal, or in all
    diagonals (0.25). stripe: frames that everything reads in a vertical_stripe (1).
    Costs N (2 r + 1) D a head, N^2 D a full one, nothing a skipped one, and where heads are multi_diagonal a copy of
    their q, k, v and o in another order. Errors: ValueError or TypeError for unknown
    modes or their number, a window outside (0, 1], a stripe of more frames than there are.

    >>> video, x = SparseVdit(Dims(2, 8, grid=(3, 4, 4)), modes=("diagonal", "skip")), torch.randn(1, 2, 48, 8)
    >>> video(x, x, x).shape, video.plan(x, x).dense()[:, 20].sum(-1).tolist()
    (torch.Size([1, 2, 48, 8]), [13, 0])
    """

    spec = Spec(
        id="sparse_vdit",
        name="Sparse-vDiT",
        title="Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers",
        paper="2506.03065",
        year=2025,
        family="static_sparse",
        uses=("attend_heads", "PerHead", "Band", "Prefix"),
        grid=3,
    )
    per_head = True

    def __init__(
        self, dims: Dims, *, modes: str | Sequence[str] = "multi_diagonal", window: float = 0.25, stripe: int = 1
    ) -> None:
        super().__init__(dims)
        given = [modes] * dims.num_heads if isinstance(modes, str) else list(modes)
        if len(given) != dims.num_heads:
            raise ValueError(f"modes: got {len(given)} for {dims.num_heads} heads; pass one, or one a head")
        self.modes = [known("modes", mode, MODES) for mode in given]
        if not 0 < window <= 1:
            raise ValueError(f"window: got {window}; pass a share in (0, 1]")
        assert dims.grid is not None
        self.window, self.stripe = window, positive("stripe", stripe)
        if stripe > dims.grid[0]:
            raise ValueError(f"stripe: got {stripe} frames of {dims.grid[0]}; pass {dims.grid[0]} at most")

    def patterns(self) -> dict[str, Pattern]:
        """What each mode sees of the grid."""
        frames, size = self.dims.grid[0], torch.Size(self.dims.grid[1:]).numel()  # type: ignore[index]
        reach = int(self.window * frames * size / 2)
        near = Band(reach, reach)
        stripes = Prefix(self.stripe * size) | near
        places = SamePlace(size, reach // frames)
        return dict(zip(MODES, (Full(), Sinks(0), near, places, stripes), strict=True))

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        seen = self.patterns()
        pattern = PerHead([seen[mode] for mode in self.modes])
        return pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = self.patterns()
        of_mode = {mode: [h for h, one in enumerate(self.modes) if one == mode] for mode in MODES if mode != "skip"}
        return attend_heads(q, k, v, [(heads, seen[mode], None) for mode, heads in of_mode.items() if heads])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, height, width = self.dims.grid  # type: ignore[misc]
        n, out = q.shape[2], torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        at = list(itertools.product(range(frames), range(height), range(width)))
        for h, mode in enumerate(self.modes):
            shared = h // (q.shape[1] // k.shape[1])
            for i in range(n if mode != "skip" else 0):
                near = [j for j in range(n) if 2 * abs(i - j) <= self.window * n]
                if mode == "multi_diagonal":
                    apart = [abs((at[i][1] - y) * width + at[i][2] - x) for _, y, x in at]
                    near = [j for j in range(n) if 2 * apart[j] * frames <= self.window * n]
                elif mode == "vertical_stripe":
                    near = [j for j in range(n) if j in near or at[j][0] < self.stripe]
                seen = near if mode != "full" else list(range(n))
                scores = (q[:, h, i, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, i] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    @torch.no_grad()
    def search(
        cls,
        dims: Dims,
        layers: Iterable[tuple[Tensor, Tensor, Tensor]],
        *,
        penalty: float = 0.5,
        threshold: float = 1.0,
        **params: Any,
    ) -> list[dict[str, Any]]:
        """Parameters of every layer, from samples of its q, k and v (batches of prompts and steps).

        penalty: lambda of the loss. threshold: epsilon. params: window and stripe. Costs five times the attention.

            params = SparseVdit.search(dims, [(q, k, v) for q, k, v in captured])
            layers = [SparseVdit(dims, **one) for one in params]
        """
        modules = {mode: cls(dims, modes=mode, **params) for mode in MODES}
        found = []
        for q, k, v in layers:
            whole = modules["full"](q, k, v)
            losses = []
            for mode in MODES[1:]:
                plan = modules[mode].plan(q, k)
                cost = plan.num_tiles / (plan.num_row_tiles * plan.num_col_tiles)
                apart = (modules[mode](q, k, v) - whole).square().mean((0, 2, 3))
                losses.append(apart + penalty * cost)
            least, at = torch.stack(losses).min(0)
            modes = [
                "full" if x > threshold else MODES[1 + i] for x, i in zip(least.tolist(), at.tolist(), strict=True)
            ]
            found.append({"modes": modes} | params)
        return found

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2, grid=(3, 3, 5)), 45, {"modes": ("multi_diagonal", "full", "skip", "diagonal")}),
            Case(Dims(2, 4, grid=(4, 2, 3)), 24, {"modes": ("vertical_stripe", "multi_diagonal"), "stripe": 2}),
            Case(Dims(3, 4, grid=(2, 5, 3)), 30, {"modes": "vertical_stripe", "window": 0.1}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, str]:
        return {"modes": "full"}

    @classmethod
    def planted(cls, modes: Sequence[str], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (1, H, N, 64) whose heads put their weight where the mode of each says; "skip" has no values."""
        n, size = torch.Size(grid).numel(), grid[1] * grid[2]
        token = torch.arange(n)

        def phases(x: Tensor, scale: float) -> Tensor:
            angles = x[:, None] * torch.rand(32) / scale
            return torch.cat([angles.cos(), angles.sin()], 1)

        v = 3 * torch.randn(1, len(modes), n, 64)
        q, k = torch.zeros(2, 1, len(modes), n, 64)
        for h, mode in enumerate(modes):
            if mode == "diagonal":
                q[0, h] = k[0, h] = 6 * phases(token, 2.0)
            elif mode == "multi_diagonal":
                q[0, h] = k[0, h] = 6 * phases(token % size, 1.0)
            elif mode == "vertical_stripe":
                q[0, h, :, 0], k[0, h, :, 0] = 8, 8.0 * (token < size)
                v[0, h, :size] += 3
            elif mode == "full":  # few tokens anywhere have the weight
                q[0, h], k[0, h] = 4 * torch.randn(2, n, 64)
            v[0, h] *= mode != "skip"
        return q, k, v

    @claim("On synthetic heads the search gives back the planted mode of every layer and head.")
    def finds(cls) -> Finding:
        grid, orders = (6, 8, 8), (MODES, tuple(reversed(MODES)), ("diagonal", "diagonal", "skip", "full", "full"))
        layers = [cls.planted(modes, grid) for modes in orders]
        found = cls.search(Dims(5, 64, grid=grid), layers)
        hits = sum(
            a == b for one, modes in zip(found, orders, strict=True) for a, b in zip(one["modes"], modes, strict=True)
        )
        loose = cls.search(Dims(5, 64, grid=grid), layers, threshold=1e9)
        full = sum(mode == "full" for one in loose for mode in one["modes"])
        return Finding(hits == 15 and full == 0, f"{hits} of 15 heads; none stays full at a threshold of 1e9")

    @claim("Many diagonals are attention to the same window of places in every frame, and compact place by place.")
    def places(cls) -> Finding:
        grid, n = (8, 16, 16), 2048
        pattern = cls(Dims(1, 8, grid=grid), window=0.25).patterns()["multi_diagonal"]
        seen = pattern.dense(n)[0].view(8, 256, 8, 256)
        place = (torch.arange(256)[:, None] - torch.arange(256)).abs() <= 32
        same = bool((seen == place[None, :, None]).all())
        tiles = pattern.plan(n, block=(64, 64)).num_tiles / 32**2
        apart = seen.view(32, 64, 32, 64).any(3).any(1).double().mean()
        figure = (
            f"{float(seen.double().mean()):.1%} of the pairs in {tiles:.1%} of the tiles, in raster order {apart:.1%}"
        )
        return Finding(same and tiles < 0.4 < float(apart), figure)

    @claim("The cost that the search weighs is the work that is done.")
    def work(cls) -> Finding:
        dims, found, holds = Dims(1, 16, grid=(8, 16, 16)), [], True
        q, k, v = torch.randn(3, 1, 1, 2048, 16)
        for mode in MODES:
            module = cls(dims, modes=mode)
            done = work(functools.partial(module, q, k, v)).all / (4 * 16 * 2048**2)
            predicted = module.plan(q, k).num_tiles / 32**2
            found.append(f"{mode} {done:.1%} ({predicted:.1%})")
            holds &= abs(done - predicted) < 0.02
        return Finding(holds, f"of the products of full attention, done and predicted: {', '.join(found)}")
