"""Generalized neighbourhood attention: windows that step by a stride, from sliding to blocked, on one to three axes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.where import Causal, Neighborhood, Plan, Window

Shape = tuple[int, ...]
LONGEST = 2**31 - 1  # of a sequence whose length is not known yet


class Gna(Attention):
    """Neighbourhood attention whose window moves once every `stride` queries.

        o_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(D)) v_j
        N(i) = the product over the axes of [a, a + w),  a = clamp(g - floor(w / 2), 0, L - w)
        g = min(s floor(i / s) + floor(s / 2), L - 1), the leader of i's group
        causal axis: [max(0, g - w + 1), i],  g = min(s floor(i / s) + s - 1, L - 1)

    q (B, H, N, D), k, v (B, Hkv, N, D) row-major -> o (B, H, N, D). On each axis: i a coordinate, L the length, w the
    kernel, s the stride; with dilation d all of it holds inside each class of coordinates modulo d. An axis that is not
    causal shows every query w keys, also at borders; an even w has one more on the left. dims.grid is (X,), (Y, X) or
    (T, Y, X); without one, a sequence is the axis. Paper: arXiv 2504.16922, the definition of GNA; where windows begin
    and end, at borders and in cut groups too, was read off the authors' kernels (NATTEN).
    Deviations: none in what is attended; tiles are those of the backend that runs, not the paper's.
    kernel, stride, dilation, causal: one value, or one an axis (7, 1, 1, False; the authors' code has none for the
    kernel, 7 is that of NAT). Costs N prod(w) D; tiles that windows meet in part are computed whole. On a causal axis
    whose stride does not divide it, the window of the last group depends on the length. Errors: ValueError or TypeError
    that names the parameter when kernel * dilation exceeds the axis, stride exceeds kernel, or values are neither one
    nor one an axis.

    >>> gna = Gna(Dims(2, 8, grid=(8, 12)), kernel=(4, 6), stride=(4, 2), causal=(False, True))
    >>> x = torch.randn(1, 2, 96, 8)
    >>> gna(x, x, x).shape, int(gna.plan(x, x).num_attended)
    (torch.Size([1, 2, 96, 8]), 1728)
    """

    spec = Spec(
        id="gna",
        name="Generalized Neighborhood Attention",
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        paper="2504.16922",
        year=2025,
        family="spatial_window",
        uses=("attend", "Neighborhood"),
        grid=(2, 3, 1, 0),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        kernel: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        super().__init__(dims)
        self.rule = Neighborhood(dims.grid or (LONGEST,), kernel, stride, dilation, causal)
        self.causal = all(self.rule.causal)  # row-major, a key behind on every axis is not later

    def pattern(self, num_tokens: int) -> Neighborhood:
        """What `num_tokens` tokens see."""
        rule = self.rule
        return Neighborhood(self.dims.grid or (num_tokens,), rule.kernel, rule.stride, rule.dilation, rule.causal)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern(k.shape[2]).plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern(k.shape[2]))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        k, v = k[:, reads], v[:, reads]
        seen = torch.ones(1, 1, dtype=torch.int64)
        parameters = (self.rule.kernel, self.rule.stride, self.rule.dilation, self.rule.causal)
        for size, w, s, d, causal in zip(self.dims.grid or (k.shape[2],), *parameters, strict=True):
            axis = torch.zeros(size, size, dtype=torch.int64)
            for i in range(size):
                alike = range(i % d, size, d)  # the class of i
                at, last = i // d, len(alike) - 1
                first = at - at % s  # of the group
                if causal:
                    start, end = max(min(first + s - 1, last) - w + 1, 0), at + 1
                else:
                    start = min(max(min(first + s // 2, last) - w // 2, 0), last + 1 - w)
                    end = start + w
                axis[i, list(alike[start:end])] = 1
            seen = torch.kron(seen, axis)
        hidden = seen[-q.shape[2] :] == 0
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[3] ** 0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    @classmethod
    def cases(cls) -> list[Case]:
        mixed = {"kernel": (2, 4, 3), "stride": (2, 3, 1), "dilation": (1, 1, 2), "causal": (True, False, False)}
        return [
            Case(Dims(2, 8), 53, {"kernel": 6, "stride": 4, "dilation": 3}),
            Case(Dims(4, 4, 2, grid=(41,)), 41, {"kernel": 5, "stride": 3, "causal": True}),
            Case(Dims(2, 8, grid=(7, 11)), 77, {"kernel": (3, 4), "stride": (2, 4), "dilation": (2, 1)}),
            Case(Dims(2, 8, grid=(9, 5)), 45, {"kernel": (4, 2), "stride": (3, 2), "dilation": 2, "causal": True}),
            Case(Dims(4, 4, 2, grid=(3, 5, 7)), 105, mixed),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"kernel": dims.grid or length}

    @classmethod
    def on(cls, grid: Shape, kernel: int | Shape, stride: int | Shape = 1, causal: bool = False) -> Neighborhood:
        """The pattern on a whole grid."""
        return cls(Dims(1, 8, grid=grid), kernel=kernel, stride=stride, causal=causal).pattern(math.prod(grid))

    @claim("Stride 1 is neighbourhood attention: the kernel nearest positions an axis; causal, a sliding window.")
    def sliding(cls) -> Finding:
        same, grids = [], ((61,), (13, 17), (5, 9, 11))
        for grid in grids:
            near = torch.ones(1, 1, dtype=torch.int64)
            for size in grid:
                far = (torch.arange(size)[:, None] - torch.arange(size)).abs()
                near = torch.kron(near, (far.argsort(1).argsort(1) < 5).long())
            same.append(torch.equal(_seen(cls.on(grid, 5)), near > 0))
        same.append(torch.equal(_seen(cls.on((61,), 6, causal=True)), (Window(6) & Causal()).dense(61)[0]))
        return Finding(all(same), f"{sum(same)} of 4 masks the same bit for bit: {_name(*grids)}, and 61 causal")

    @claim("Stride = kernel is blocked attention where kernel divides the axis; else only the last window overlaps.")
    def blocked(cls) -> Finding:
        even = (((64,), (16,)), ((12, 15), (4, 5)), ((4, 6, 10), (2, 3, 5)))
        same = [torch.equal(_seen(cls.on(grid, w, w)), _blocks(grid, w)) for grid, w in even]
        one = _blocks((64,), (16,)).tril()
        same.append(torch.equal(_seen(cls.on((64,), 16, 16, True)), one))
        cut = _seen(cls.on((64,), 24, 24))
        kept = torch.equal(cut[:48], _blocks((64,), (24,))[:48])
        back = bool(cut[48:, 40:].all()) and bool((cut[48:].sum(1) == 24).all())
        figure = (
            f"{sum(same)} of 4 masks the same bit for bit ({_name(*(g for g, _ in even))}, 64 causal); "
            "kernel 24 on 64 tokens: queries 48-63 see keys 40-63"
        )
        return Finding(all(same) and kept and back, figure)

    @claim("Tiles bound the speed-up below the FLOP ratio, and reach it when tile, stride and kernel fit.")
    def speed_up(cls) -> Finding:
        fitting, holds, most = 0, True, 0.0
        length, tile = 64, 8

        def share(w: int, s: int) -> float:
            return _efficiency(cls.on((length,), w, s).plan(length, block=(tile, tile)))

        pairs = [(w, s) for w, s in itertools.product(range(4, length + 1, 4), repeat=2) if s <= w]
        for w, s in pairs:
            reached = share(w, s)
            last = min((length - 1) // s * s + s // 2, length - 1) - w // 2
            aligned = length % s == 0 or min(last, length - w) % tile == 0
            fits = s % tile == w % tile == (w // 2 - s // 2) % tile == 0 and aligned
            holds &= reached <= 1 and (reached == 1 or not fits)
            fitting, most = fitting + fits, max(most, reached)
        named = [share(w, s) for w, s in ((24, 8), (32, 16), (24, 16), (16, 8))]
        holds &= named[0] == named[1] == most == 1 > max(named[2:])
        figure = (
            f"of {len(pairs)} kernels and strides on 64 tokens none is above the bound and all {fitting} that fit "
            f"tiles of 8 reach it; 24/8, 32/16: 1; 24/16, 16/8, where tiles divide both: {named[2]:.2f}, {named[3]:.2f}"
        )
        return Finding(holds, figure)

    @claim(
        "Attended / computed pairs rise to 1 at strides that fit the tile; cells that begin where windows do need less."
    )
    def efficiency(cls) -> Finding:
        def both(grid: Shape, w: int, s: int) -> tuple[float, float]:
            pattern, n = cls.on(grid, w, s), math.prod(grid)
            return _efficiency(pattern.plan(n, block=(64, 64))), _efficiency(pattern.gathered(n))

        found, holds = [], True
        for grid, w, strides in (((512,), 192, (1, 16, 64)), ((64, 64), 24, (1, 4, 8)), ((16,) * 3, 12, (1, 2, 4))):
            tiles, cells = zip(*(both(grid, w, s) for s in strides), strict=True)
            holds &= sorted(tiles) == list(tiles) and sorted(cells) == list(cells) and tiles[-1] == cells[-1] == 1
            holds &= tiles[0] < 1 and all(a <= b for a, b in zip(tiles, cells, strict=True))
            steps = ", ".join(f"{s}: {a:.2f}/{b:.2f}" for s, a, b in zip(strides, tiles, cells, strict=True))
            found.append(f"{_name(grid)} kernel {w} stride {steps}")
        beyond = both((64, 64), 16, 8)
        holds &= beyond[0] < beyond[1] == 1
        figure = f"tiles/cells of 64 on {'; '.join(found)}; 64x64 kernel 16 stride 8: {beyond[0]:.2f}/{beyond[1]:.2f}"
        return Finding(holds, figure)

    @claim("The cost is linear in N: a query attends kernel^axes keys and computes a bounded number, whatever N.")
    def linear(cls) -> Finding:
        found, holds = [], True
        for grids, w in (((4096, 16384),), 96), (((64, 128),) * 2, 12), (((16, 32),) * 3, 6):
            small, large = (tuple(sizes[end] for sizes in grids) for end in (0, 1))
            keys = []
            for grid in (small, large):
                n = math.prod(grid)
                plan = cls.on(grid, w, 2).plan(n, block=(64, 64))
                holds &= grid == large or plan.num_attended == n * w ** len(grid)
                keys.append(plan.num_computed / n)
            side = round(64 ** (1 / len(small)))
            run = w + side - 2  # keys an axis that the windows of a tile span, with stride 2
            bound = (((run - 2) // side + 2) * side) ** len(small)
            holds &= max(keys) <= bound
            found.append(f"{keys[0]:.0f}, {keys[1]:.0f} on {_name(small, large)} (at most {bound})")
        return Finding(holds, f"keys computed a tile of 64 queries: {'; '.join(found)}")


def _seen(pattern: Neighborhood) -> Tensor:
    """The mask (N, N) on the whole grid."""
    return pattern.dense(math.prod(pattern.grid))[0]


def _blocks(grid: Shape, sizes: Shape) -> Tensor:
    """The mask (N, N) of blocks that do not overlap."""
    axes = [torch.arange(n) // w for n, w in zip(grid, sizes, strict=True)]
    return functools.reduce(torch.kron, [(a[:, None] == a).long() for a in axes]) > 0


def _efficiency(plan: Plan) -> float:
    """Attended pairs / computed pairs."""
    return plan.num_attended / plan.num_computed


def _name(*grids: Shape) -> str:
    return ", ".join("x".join(map(str, grid)) for grid in grids)
