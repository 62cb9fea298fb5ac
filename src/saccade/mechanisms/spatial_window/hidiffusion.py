"""HiDiffusion: four windows that are rolled at random replace the self-attention of a trained diffusion model."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import positive
from saccade.hosts.constant import Constant
from saccade.where import Labels, Pattern, Plan


def bicubic(length: int, to: int) -> Tensor:
    """The matrix (to, length) that resizes an axis with cubic convolution, a = -3/4; borders are repeated.

    >>> bicubic(2, 4)[0].tolist()
    [1.10546875, -0.10546875]
    """
    at = (2 * torch.arange(to) + 1) * length - to  # (i + 1 / 2) length / to - 1 / 2, in units of 1 / (2 to)
    taps = at.div(2 * to, rounding_mode="floor")[:, None] + torch.arange(-1, 3)
    t = (at[:, None] - 2 * to * taps).abs().double() / (2 * to)
    weights = torch.where(t < 1, (1 - t) * (1 + t - 1.25 * t**2), -0.75 * (t - 1) * (t - 2) ** 2)
    return torch.zeros(to, length, dtype=torch.float64).scatter_add_(1, taps.clamp(0, length - 1), weights)


class Hidiffusion(Attention):
    """Modified shifted window attention: the map, rolled by a step drawn anew at each call, is cut into 2 x 2 windows.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over the j in the window of i
        window of (y, x): the pair of floor(((y - m floor(h / 4)) mod Y) / h), floor(((x - m floor(w / 4)) mod X) / w)
        h = Y / 2, w = X / 2,   m drawn from {0, 1, 2, 3}

    q (B, H, N, D), k, v (B, Hkv, N, D) row-major, N = Y X -> o (B, H, N, D). It has no parameters of its own and takes
    the place of the self-attention in the outermost blocks of a U-Net; nothing is masked, so that opposite edges of the
    map meet in a window. One m serves both axes and the whole batch. A map that the windows do not divide is resized to
    the next size that they do, with bicubic interpolation, and the output back.
    Paper: arXiv 2311.17528, MSW-MSA; the steps, the draw and the resizing follow the authors' code. Deviations: m
    follows from seed, layer and step, so that a run can be repeated; q, k and v are resized where the authors resize
    what they are projected from, which is the same, because both maps are affine and the weights of the interpolation
    sum to 1. Their second part, resolution-aware down-sampling, is no attention.
    windows: a side of the map (default 2; 1 is dense attention). layer: which layer this is (0). seed: of all draws
    (0). A call takes step: the step of the denoising process (0). Costs N^2 D / windows^2, a copy of q, k, v and o
    in the order of the windows, and N (X + Y) D more where the map is resized. Errors: ValueError or TypeError when
    dims.grid has not two axes, windows is no positive integer or more than an axis has tokens, layer, seed or step are
    negative, or k are not as many as q.

    >>> swap, x = Hidiffusion(Dims(2, 8, grid=(16, 24)), layer=3), torch.randn(1, 2, 384, 8)
    >>> swap(x, x, x, step=7).shape, [swap.shift(step) for step in range(5)]
    (torch.Size([1, 2, 384, 8]), [(2, 3), (6, 9), (6, 9), (2, 3), (4, 6)])
    """

    spec = Spec(
        id="hidiffusion",
        name="HiDiffusion (MSW-MSA)",
        title="HiDiffusion: Unlocking High-Resolution Creativity and Efficiency in Low-Resolution Trained "
        "Diffusion Models",
        paper="2311.17528",
        year=2023,
        family="spatial_window",
        uses=("attend", "Labels"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, windows: int = 2, layer: int = 0, seed: int = 0) -> None:
        super().__init__(dims)
        self.grid, self.windows = dims.grid or (), positive("windows", windows)
        if windows > min(self.grid):
            raise ValueError(f"windows: got {windows} a side for the grid {self.grid}; pass at most {min(self.grid)}")
        self.layer, self.seed = positive("layer", layer, least=0), positive("seed", seed, least=0)
        self.size = tuple(-(-length // windows) for length in self.grid)
        pairs = list(zip(self.grid, self.whole, strict=True)) if self.whole != self.grid else []
        self.larger = nn.ModuleList(Constant(bicubic(less, more)) for less, more in pairs)
        self.smaller = nn.ModuleList(Constant(bicubic(more, less)) for less, more in pairs)

    def shift(self, step: int) -> tuple[int, ...]:
        """Tokens that the map is rolled back by at a step, per axis."""
        drawn = random.Random(f"{self.seed} {self.layer} {positive('step', step, least=0)}").randrange(4)
        return tuple(drawn * (size // 4) for size in self.size)

    @property
    def whole(self) -> tuple[int, ...]:
        """The grid that the windows cover."""
        return tuple(size * self.windows for size in self.size)

    @functools.cached_property
    def seen(self) -> dict[tuple[int, ...], Pattern]:
        """By the roll: tokens of the whole grid in one window. There are four, so that their plans are kept."""
        found: dict[tuple[int, ...], Pattern] = {}
        for m in range(4):
            rolled = tuple(m * (size // 4) for size in self.size)
            sides = zip(self.whole, self.size, rolled, strict=True)
            rows, columns = ((torch.arange(length) - by) % length // size for length, size, by in sides)
            found[rolled] = Labels((rows[:, None] * self.windows + columns).flatten())
        return found

    def plan(self, q: Tensor, k: Tensor, *, step: int = 0) -> Plan | None:
        if self.whole != self.grid:
            return None  # resized tokens are no longer those of q and k
        return self.seen[self.shift(step)].plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    @staticmethod
    def resized(x: Tensor, sides: nn.ModuleList) -> Tensor:
        """Tokens (B, N, C) of a map, as those of a map of another size; sides: `bicubic` of both axes."""
        rows, columns = (cast(Constant, side).value.to(x.dtype) for side in sides)
        width = columns.shape[1]
        x = (rows @ x.unflatten(1, (-1, width)).flatten(2)).unflatten(2, (width, -1))  # (B, Y, X, C)
        return (columns @ x).flatten(1, 2)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, step: int = 0) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} keys for {q.shape[2]} queries; both are the tokens of one map")
        where = self.seen[self.shift(step)]
        if self.whole == self.grid:
            return attend(q, k, v, where)
        q, k, v = (self.resized(x.flatten(0, 1), self.larger).unflatten(0, x.shape[:2]) for x in (q, k, v))
        o = attend(q, k, v, where)
        return self.resized(o.flatten(0, 1), self.smaller).unflatten(0, o.shape[:2])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, step: int = 0) -> Tensor:
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        whole = [self.windows * -(-length // self.windows) for length in self.grid]
        m = random.Random(f"{self.seed} {self.layer} {step}").randrange(4)

        def cubic(t: Fraction) -> Fraction:
            near, far = 5 * t**3 - 9 * t**2 + 4, 3 * (4 - 8 * t + 5 * t**2 - t**3)
            return (near if t < 1 else far if t < 2 else Fraction(0)) / 4

        def matrix(length: int, to: int) -> Tensor:
            weights = [[Fraction(0)] * length for _ in range(to)]
            for i in range(to):
                at = Fraction((2 * i + 1) * length, 2 * to) - Fraction(1, 2)
                for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                    weights[i][min(max(tap, 0), length - 1)] += cubic(abs(at - tap))
            return torch.tensor([[float(weight) for weight in row] for row in weights], dtype=q.dtype)

        def image(x: Tensor, sizes: tuple[int, ...], to: list[int] | tuple[int, ...]) -> Tensor:
            across = [matrix(*pair) for pair in zip(sizes, to, strict=True)]
            return torch.einsum("bhyxd,Yy,Xx->bhYXd", x.unflatten(2, sizes) if x.ndim == 4 else x, *across)

        q, k, v = (image(x, self.grid, whole) for x in (q, k[:, reads], v[:, reads]))
        out = torch.zeros_like(q[..., :1]).expand_as(v).clone()
        sides = [length // self.windows for length in whole]
        for a, b in itertools.product(range(self.windows), repeat=2):
            rows, columns = (
                torch.tensor([(at * n + i + m * (n // 4)) % length for i in range(n)])
                for at, n, length in zip((a, b), sides, whole, strict=True)
            )
            here = slice(None), slice(None), rows[:, None], columns
            queries, keys, values = (x[here].flatten(2, 3) for x in (q, k, v))
            weights = (torch.einsum("bhnd,bhmd->bhnm", queries, keys) / q.shape[-1] ** 0.5).softmax(-1)
            out[here] = (weights @ values).unflatten(2, (len(rows), len(columns)))
        return image(out, tuple(whole), self.grid).flatten(2, 3)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 4, 2, grid=(10, 16)), 160, {"seed": 1, "layer": 2}),
            Case(Dims(2, 8, grid=(9, 13)), 117, {"layer": 3}, batch=1),
            Case(Dims(2, 4, grid=(12, 7)), 84, {"windows": 3, "seed": 2, "layer": 1}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"windows": 1}

    @claim("The products of a map whose windows are whole tiles fall to a quarter exactly, whatever the roll.")
    def work(cls) -> Finding:
        found, x = [], torch.randn(1, 2, 16 * 32, 8)
        for windows, step in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
            module = cls(Dims(2, 8, grid=(16, 32)), windows=windows)
            found.append(work(functools.partial(module, x, x, x, step=step)).all)
        dense, *parts = found
        return Finding({4 * part for part in parts} == {dense}, f"{dense} operations become {parts[0]} on 16 x 32")

    @claim("The four rolls together let every token meet its neighbours across each border, around the edges too.")
    def borders(cls) -> Finding:
        grid, x = (16, 16), torch.zeros(1, 1, 256, 4)
        module = cls(Dims(1, 4, grid=grid))
        by_roll = {module.shift(step): module.plan(x, x, step=step) for step in range(16)}
        masks = {roll: plan.dense()[0] for roll, plan in by_roll.items() if plan is not None}
        at = torch.arange(256).view(grid)
        pairs = [(at.flatten(), at.roll(-1, axis).flatten()) for axis in (0, 1)]
        i, j = (torch.cat(side) for side in zip(*pairs, strict=True))
        met = [int(mask[i, j].sum()) for mask in masks.values()]
        every = int(torch.stack(list(masks.values())).any(0)[i, j].sum())
        holds = len(masks) == 4 and every == len(i) > max(met)
        return Finding(holds, f"of {len(i)} pairs of neighbours {met[0]} meet with one roll, {every} with all four")

    @claim("The rolls are drawn alike often, and a layer's draws are not those of another.")
    def draws(cls) -> Finding:
        layers = [cls(Dims(1, 4, grid=(16, 16)), layer=layer) for layer in range(2)]
        drawn = [[layer.shift(step) for step in range(800)] for layer in layers]
        counts = [sorted(Counter(each).values()) for each in drawn]
        same = sum(a == b for a, b in zip(*drawn, strict=True))
        spread = 4 * (800 * 3 / 16) ** 0.5  # four standard deviations of a count, and of the matches
        holds = all(len(c) == 4 and c[0] >= 200 - spread and c[3] <= 200 + spread for c in counts)
        figure = f"of 800 steps each roll has {counts[0][0]} to {counts[0][3]}; two layers agree at {same}"
        return Finding(holds and abs(same - 200) <= spread, figure)
