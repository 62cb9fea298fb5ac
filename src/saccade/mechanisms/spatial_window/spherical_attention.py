"""Attention on the sphere: a softmax that integrates over the surface, all of it or the disc around each query."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known
from saccade.where import Box, Frame, Pattern, Plan, Span
from saccade.where.pattern import sent

SLACK = 1 + 1e-3  # of a radius, so that rounding does not decide about keys at the edge
NARROW = 8  # channels of values that carry one number: what copies of tiles take at least
EMPTY = 2**30  # no coordinate is as large


def latitudes(num: int, nodes: str) -> tuple[np.ndarray, np.ndarray]:
    """Colatitudes of `num` rows, from north to south, and their quadrature weights, which sum to 2.

    >>> [x.round(3).tolist() for x in latitudes(3, "equiangular")]
    [[0.0, 1.571, 3.142], [0.333, 1.333, 0.333]]
    """
    if nodes == "legendre-gauss":
        x, weights = np.polynomial.legendre.leggauss(num)
        return np.arccos(x[::-1]), weights[::-1]
    colatitudes, even = np.linspace(0, np.pi, num), np.arange(2, num, 2)
    series = np.cos(np.outer(colatitudes, even)) * np.where(even == num - 1, 1, 2) / (even**2 - 1)
    weights = (1 - series.sum(1)) * 2 / (num - 1)
    weights[[0, -1]] /= 2
    return colatitudes, weights


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def areas(grid: tuple[int, ...], nodes: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Quadrature weights of the points of a grid (Y, X), the largest 1: (Y X, 1)."""
    _, weights = latitudes(grid[0], nodes)
    return torch.from_numpy(weights / weights.max()).to(device, dtype).repeat_interleave(grid[1])[:, None]


@dataclass(frozen=True)
class Disc(Pattern):
    """Points within a great-circle distance of `radius` < pi, on a row-major grid of latitudes and longitudes.

    >>> Disc((3, 4), "equiangular", 1.6).dense(12)[0].int().sum(1).tolist()
    [8, 8, 8, 8, 11, 11, 11, 11, 8, 8, 8, 8]
    """

    grid: tuple[int, ...]
    nodes: str
    radius: float

    @functools.cached_property
    def steps(self) -> Tensor:
        """How far to either side a point of one row sees in another, int64 (Y, Y): longitudes, -1 for no point."""
        here, _ = latitudes(self.grid[0], self.nodes)
        there, width = here[:, None], self.grid[1]
        left = np.sin(self.radius / 2) ** 2 - np.sin((there - here) / 2) ** 2  # of the haversine, for the longitudes
        with np.errstate(divide="ignore"):
            left = left / (np.sin(here) * np.sin(there))
        turned = np.sin(np.arange(width // 2 + 1) * np.pi / width) ** 2
        return torch.from_numpy(np.searchsorted(turned, left, side="right") - 1)

    def counts(self) -> Tensor:
        """Keys of a query in each row: (Y,)."""
        return (2 * self.steps + 1).clamp(0, self.grid[1]).sum(1)

    def allows(self, i: Tensor, j: Tensor, num_keys: int) -> Tensor:
        width = self.grid[1]
        turn = (i - j) % width
        return torch.minimum(turn, width - turn) <= self.steps[i // width, j // width]

    def boxes(self, frame: Frame) -> list[Box]:
        (height, width), rows = self.grid, torch.arange(self.grid[0])
        most = int((rows - rows[:, None]).abs().where(self.steps >= 0, 0).max())
        (row, column), (key_row, key_column) = ((at // width, at % width) for at in (frame.queries, frame.keys))
        steps = sent(self.steps, row.device)
        found: list[Box] = []
        names: list[Hashable] = [("grid", self.grid, (1, 1), axis, "step", frame.tag) for axis in (0, 1)]
        for other in (row + down for down in range(-most, most + 1)):
            reach = steps[row.long(), other.long().clamp(0, height - 1)].int()
            some, whole = (other >= 0) & (other < height) & (reach >= 0), 2 * reach + 1 >= width
            lo, hi = (column - reach).masked_fill(whole, 0), (column + reach + 1).masked_fill(whole, width)
            west, east = lo < 0, hi > width
            beyond = torch.where(west, lo + width, 0), torch.where(west, width, hi - width)  # around the globe
            for first, end, any_key in ((lo, hi, some), (*beyond, some & (west | east))):
                spans = ((key_row, other, other + 1), (key_column, first, end))
                # An empty interval ends before it begins, so that it widens no other of its tile.
                box = [Span(key, a.where(any_key, EMPTY), b.where(any_key, -1)) for key, a, b in spans]
                found.append(dict(zip(names, box, strict=True)))
        return found


class SphericalAttention(Attention):
    """Attention whose sum over keys is an integral over the sphere, on a grid of latitudes and longitudes.

        o_i = sum_j w_j exp(q_i . k_j / sqrt(D)) v_j / sum_j w_j exp(q_i . k_j / sqrt(D))
        over the points j at a great-circle distance of at most `cutoff` from i

    q (B, H, N, D), k, v (B, Hkv, N, D) row-major on (Y, X), from north to south -> o (B, H, N, D); w_j: quadrature
    weight of the latitude of j. Longitudes wrap, latitudes do not: across a pole are the keys of the same rows on the
    other side, and a disc that holds a pole has whole circles. Paper: arXiv 2505.11157, attention and neighbourhood
    attention on the sphere. The authors' code (torch-harmonics) gives the rules of quadrature, the default cutoff and
    the radius, which it widens by a thousandth. Deviations: projections and the optional norm of q and k are the
    host's, queries and keys share one grid, and of the rules of quadrature there are two.
    nodes: "equiangular", poles included, with the weights of Clenshaw and Curtis (default), or "legendre-gauss".
    cutoff: radians, or None for the widest step between two latitudes, pi / (Y - 1) on equiangular nodes (None); from
    pi on, the whole sphere. The weights are values of a second call, whose 8 channels are cheaper than
    the 256 that kernels round D + 1 = 129 up to. Costs N k D for k keys a query, most at the poles; tiles that discs
    meet in part are computed whole. Discs of the default cutoff are finer than tiles: on 128 x 128 points 0.07 % of the
    pairs are seen, the tiles of 64 hold 2.8 %, and each is compared with six boxes, more than a kernel of `hopper`
    holds. Each row that a disc reaches is two boxes of the
    pattern, one around the globe. Errors: ValueError or TypeError when dims.grid has not two axes, or one latitude with
    the default cutoff or equiangular nodes, nodes are unknown, cutoff is not above 0, or k are not as many as q.

    >>> disc, x = SphericalAttention(Dims(2, 8, grid=(7, 12))), torch.randn(1, 2, 84, 8)
    >>> disc(x, x, x).shape, disc.pattern().counts().tolist()
    (torch.Size([1, 2, 84, 8]), [24, 18, 5, 5, 5, 18, 24])
    """

    spec = Spec(
        id="spherical_attention",
        name="Attention on the Sphere",
        title="Attention on the Sphere",
        paper="2505.11157",
        year=2025,
        family="spatial_window",
        uses=("attend", "Pattern"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, nodes: str = "equiangular", cutoff: float | None = None) -> None:
        super().__init__(dims)
        self.grid, self.nodes = dims.grid or (), known("nodes", nodes, ("equiangular", "legendre-gauss"))
        if self.grid[0] == 1 and (cutoff is None or nodes == "equiangular"):
            raise ValueError(f"dims.grid: got {self.grid}; one latitude needs nodes='legendre-gauss' and a cutoff")
        if cutoff is None:
            cutoff = float(np.diff(latitudes(self.grid[0], nodes)[0]).max())
        if isinstance(cutoff, bool) or not isinstance(cutoff, int | float):
            raise TypeError(f"cutoff: got {cutoff!r}; pass radians, or None for one step of latitude")
        if not cutoff > 0:
            raise ValueError(f"cutoff: got {cutoff}; pass radians above 0, pi for the whole sphere")
        self.cutoff = cutoff

    def pattern(self) -> Disc | None:
        """What each query sees; None for everything."""
        radius = self.cutoff * SLACK
        return None if radius >= math.pi else Disc(self.grid, self.nodes, radius)

    def plan(self, q: Tensor, k: Tensor) -> Plan | None:
        pattern = self.pattern()
        if pattern is None:
            return None
        return pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} keys for {q.shape[2]} queries; both are the points of one grid")
        weights, where = areas(self.grid, self.nodes, v.dtype, v.device), self.pattern()
        o = attend(q, k, v * weights, where)
        total = attend(q, k, weights.expand(*v.shape[:3], NARROW), where)[..., :1]
        return o / total

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (height, width), wide = self.grid, torch.float64
        if self.nodes == "equiangular":  # exact for the cosines of all frequencies that the nodes tell apart
            order, ends, step = torch.arange(height), torch.ones(height, dtype=wide), torch.pi / (height - 1)
            ends[[0, -1]] = 0.5
            moments = torch.where(order % 2 == 0, 2 / (1 - order.to(wide) ** 2), 0.0)
            # With both ends counted half, cosines are orthogonal over the nodes: nothing is solved, which at the poles,
            # whose weights are small, would cost digits.
            turns = torch.outer(order, order) % (2 * height - 2)
            w = 2 / (height - 1) * ends * (torch.cos(turns.to(wide) * step) @ (ends * moments))
            colatitudes = order.to(wide) * step
        else:  # the nodes are the eigenvalues of the recurrence of Legendre polynomials
            order = torch.arange(1, height, dtype=wide)
            beta = order / (4 * order**2 - 1).sqrt()
            x, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
            colatitudes, w = torch.acos(x).flip(0), 2 * vectors[0].square().flip(0)
        theta = colatitudes.repeat_interleave(width)
        phi = (torch.arange(width, dtype=wide) * (2 * torch.pi / width)).repeat(height)
        points = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
        across = torch.linalg.cross(points[:, None], points[None]).norm(dim=-1)
        far = torch.atan2(across, points @ points.T) > self.cutoff * 1.001
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k[:, reads]) / q.shape[3] ** 0.5
        scores = scores + w.log().repeat_interleave(width).to(q.dtype)
        return scores.masked_fill(far, -torch.inf).softmax(-1) @ v[:, reads]

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(7, 11)), 77, {"cutoff": 0.7}),
            Case(Dims(4, 4, 2, grid=(6, 9)), 54, {"nodes": "legendre-gauss", "cutoff": 1.2}),
            Case(Dims(2, 4, grid=(5, 8)), 40, {"cutoff": math.pi}, batch=1),
            Case(Dims(2, 8, grid=(9, 7)), 63),
        ]

    @classmethod
    def fields(cls, grid: tuple[int, int], turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The points (N, 3) of an equiangular grid and smooth fields q, k, v (3, 1, 2, N, 4), turned by a matrix."""
        theta = torch.from_numpy(latitudes(grid[0], "equiangular")[0])[:, None]
        phi = torch.arange(grid[1], dtype=torch.float64) * (2 * math.pi / grid[1])
        points = torch.broadcast_tensors(theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos())
        at = torch.stack(points, -1).flatten(0, 1)
        x, y, z = (at if turn is None else at @ turn.T).unbind(-1)
        seen = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * x - y * y], -1)
        drawn = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return at, seen @ drawn

    @classmethod
    def on(cls, height: int, cutoff: float | None) -> SphericalAttention:
        """For fields on `height` latitudes and twice as many longitudes as there are steps between them."""
        return cls(Dims(2, 4, grid=(height, 2 * (height - 1))), cutoff=cutoff)

    @claim("On smooth fields the sum converges to the integral over the sphere; a plain softmax does not.")
    def integral(cls) -> Finding:
        _, (asked, _, _) = cls.fields((5, 8))
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for height in (5, 9, 17, 33):
            _, (_, k, v) = cls.fields((height, 2 * (height - 1)))
            q = torch.cat([asked, k[:, :, asked.shape[2] :]], 2)  # the first 40 queries are the same on every grid
            modules: list[Callable[..., Tensor]] = [cls.on(height, math.pi), attend]
            for outputs, module in zip(found, modules, strict=True):
                outputs.append(module(q, k, v)[:, :, : asked.shape[2]])
        truth = found[0].pop()
        weighted, plain = ([float((o - truth).abs().max()) for o in outputs[:3]] for outputs in found)
        holds = weighted[2] < weighted[1] < weighted[0] < min(plain) and plain[2] > plain[0] / 2
        errors = ", ".join(f"{error:.1e}" for error in weighted)
        return Finding(holds, f"{errors} off on 5, 9, 17 latitudes; without weights {plain[0]:.2f} to {plain[2]:.2f}")

    @claim("Turned fields give the turned output: exactly by steps of longitude, approximately by any rotation.")
    def rotation(cls) -> Finding:
        _, fields = cls.fields((9, 16))
        moved, errors = fields.unflatten(3, (9, 16)).roll(5, 4).flatten(3, 4), []
        for cutoff in (None, 0.9, math.pi):
            o, other = (cls.on(9, cutoff)(*x).unflatten(2, (9, 16)) for x in (fields, moved))
            errors.append(float((other - o.roll(5, 3)).abs().max() / o.abs().max()))
        tilt = torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)  # poles to the equator
        found: tuple[list[float], ...] = [], [], []
        for height in (9, 13, 17):
            points, fields = cls.fields((height, 2 * (height - 1)))
            _, turned = cls.fields((height, 2 * (height - 1)), tilt)
            near = torch.cdist(points @ tilt.T, points) < torch.finfo(torch.float64).eps ** 0.5
            i, j = near.nonzero(as_tuple=True)  # points of the grid that are turned to points of the grid
            modules: list[Callable[..., Tensor]] = [cls.on(height, math.pi), cls.on(height, 1.2), attend]
            for off, module in zip(found, modules, strict=True):
                off.append(float((module(*turned)[:, :, i] - module(*fields)[:, :, j]).abs().max()))
        holds = all(a > b > c for a, b, c in found[:2]) and found[2][2] > max(found[0] + found[1])
        holds &= max(errors) <= torch.finfo(torch.float64).eps * 9 * 16
        sphere, disc, plain = (", ".join(f"{error:.1e}" for error in off) for off in found)
        figure = f"{max(errors):.0e} off; pole to equator on 9, 13, 17 latitudes {sphere} off, discs of 1.2 {disc}"
        return Finding(holds, f"{figure}, without weights {plain}")

    @claim("A query weighs the keys of its disc alone, whose mean number hardly grows with N; poles have most.")
    def keys(cls) -> Finding:
        discs = [Disc((n, 2 * (n - 1)), "equiangular", SLACK * math.pi / (n - 1)) for n in (17, 33, 65)]
        means = [float(disc.counts().double().mean()) for disc in discs]
        planned = int(discs[0].plan(544).num_attended) / 544
        pole, equator = (int(discs[2].counts()[row]) for row in (0, 32))
        holds = planned == means[0] and means[2] < 1.5 * means[0] and pole > equator
        figure = f"{', '.join(f'{mean:.1f}' for mean in means)} keys a query on 544, 2112, 8320 points"
        return Finding(holds, f"{figure}; of the last, {pole} at the poles and {equator} at the equator")
