"""EGformer: rows or columns of a panorama attend with a bias from the sphere and a score that replaces the softmax."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, reached, work
from saccade.errors import known


@dataclass(frozen=True)
class DistanceScore:
    """1 - cos(pi / 2 a), a the scores of a row divided by their Euclidean norm."""

    name: ClassVar[str] = "distance score"

    def __call__(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(scores == -torch.inf, 0)
        norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return 2 * torch.sin(scores / norm * (math.pi / 4)).square()  # keeps the digits of a small a


@dataclass(frozen=True)
class Magnitude:
    """|a|: not weights, but what their mean is taken of."""

    name: ClassVar[str] = "magnitude"

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores == -torch.inf, 0).abs()


@dataclass(frozen=True)
class Chord:
    """strength r_s 2 sin(|j - i| t / 2), signed as j - i if `signed`: the chord between two tokens of stripe s.

    turn: t, the angle between neighbours. stripes: S; r_s is 1, or sin(pi s / S) where they are `latitudes`. heads: of
    each stripe.
    """

    turn: float
    stripes: int
    latitudes: bool
    heads: int
    strength: float
    signed: bool

    def __call__(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        apart = (k_pos[None, :] - q_pos[:, None]).double()
        chord = 2 * self.strength * torch.sin(apart * (self.turn / 2))
        stripe = torch.arange(self.stripes, dtype=torch.float64, device=q_pos.device).repeat_interleave(self.heads)
        radii = (stripe * (math.pi / self.stripes)).sin() if self.latitudes else torch.ones_like(stripe)
        return radii[:, None, None] * (chord if self.signed else chord.abs())


class Egformer(Mixer):
    """Equirectangular geometry-biased attention along the rows or the columns of a panorama, before the residual.

        A = q_i . k_j + strength E_ij,   S_ij = 1 - cos(pi A_ij / (2 sqrt(sum_j A_ij^2)))
        M_s = max(floor, mean |A| / max over the stripes of mean |A|),   over heads, queries and keys of stripe s
        y_i = W (M_s sum_j S_ij v_j + (1 - M_s) x_i) + b,   q, k, v from LN(x),   i and j in one stripe s
        columns: E = sgn(j - i) sqrt(2 - 2 cos(pi (j - i) / Y))
        rows: E = sgn(j - i) sin(pi s / Y) sqrt(2 - 2 cos(2 pi (j - i) / X)), without the sign if `cyclic`

    x (B, N, C): tokens of a row-major grid (Y, X), from one pole to the other and once around -> y (B, N, C). E is the
    chord between two tokens on the unit sphere, 0 along the row at the pole; nothing of it is learned. The scores are
    not divided by sqrt(D). S lies in [0, 1], loses the sign of A, and does not sum to 1 over j; where a stripe matters
    little, M lets its input pass instead.
    Paper: arXiv 2304.07803, ERPE, DAS and EaAR; the factors, the signs and what EaAR averages follow the authors' code.
    Deviations: tokens are pi / Y and 2 pi / X apart, where the authors' code spreads n of them over n - 1 steps; the
    largest mean is that of one image, where it takes that of the batch; a column gets back its own input, where it
    takes that of other tokens. Residual and MLP are those of the host, the net's PanoFormer layers are not in here.
    Heads may share keys. axis: "rows" or "columns" (default "rows"). cyclic: the bias of rows has no sign, so that it
    knows no first column (False). strength: of the bias (0.1). floor: least M (0.5).
    Costs N X D or N Y D for the scores, twice, and as much for the values. Errors: ValueError or TypeError when
    dims.grid has not two axes, axis is unknown, strength is no number, floor is not in [0, 1], or columns are cyclic.

    >>> layer = Egformer(Dims(2, 4, grid=(6, 12)), axis="columns")
    >>> layer(torch.randn(1, 72, 8)).shape, layer.importance(torch.randn(1, 72, 8)).shape
    (torch.Size([1, 72, 8]), torch.Size([1, 12]))
    """

    spec = Spec(
        id="egformer",
        name="EGformer",
        title="EGformer: Equirectangular Geometry-biased Transformer for 360 Depth Estimation",
        paper="2304.07803",
        year=2023,
        family="spatial_window",
        uses=("attend",),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, axis: str = "rows", cyclic: bool = False, strength: float = 0.1, floor: float = 0.5
    ) -> None:
        super().__init__(dims)
        self.axis, self.strength, self.floor = known("axis", axis, ("rows", "columns")), strength, floor
        for name, value in (("strength", strength), ("floor", floor)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); pass a number")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: got {floor}; pass a share in [0, 1]")
        if cyclic and axis == "columns":
            raise ValueError("cyclic: got True for axis='columns'; only rows close to a circle")
        (height, width), self.cyclic = dims.grid or (), cyclic
        latitudes = axis == "rows"
        stripes, turn = (height, 2 * math.pi / width) if latitudes else (width, math.pi / height)
        self.bias = Chord(turn, stripes, latitudes, dims.num_heads, strength, not cyclic)
        self.norm = nn.LayerNorm(dims.dim)
        self.qkv = nn.Linear(dims.dim, (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim)
        self.out = nn.Linear(dims.dim, dims.dim)

    def stripes(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, S, L, C): S stripes of L tokens."""
        x = x.unflatten(1, self.dims.grid or ())
        return x if self.axis == "rows" else x.transpose(1, 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, S H, L, D), k and v (B, S Hkv, L, D): the stripes are further heads."""
        d = self.dims
        heads = self.stripes(self.qkv(self.norm(x))).unflatten(3, (-1, d.head_dim)).transpose(2, 3)
        q, k, v = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 2)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)

    def share(self, q: Tensor, k: Tensor) -> Tensor:
        """M (B, S)."""
        sums = attend(q, k, torch.ones_like(k[..., :1]), scale=1.0, bias=self.bias, normalizer=Magnitude())
        mean = sums.unflatten(1, (-1, self.dims.num_heads)).mean((2, 3, 4))  # of as many keys everywhere
        return (mean / mean.amax(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=self.floor)

    def importance(self, x: Tensor) -> Tensor:
        """M (B, S) of tokens x (B, N, C): how much of a stripe is attention, the rest being its input."""
        q, k, _ = self.heads(x)
        return self.share(q, k)

    def compute(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        o = attend(q, k, v, scale=1.0, bias=self.bias, normalizer=DistanceScore())
        o = o.unflatten(1, (-1, self.dims.num_heads)).transpose(2, 3).flatten(3)  # (B, S, L, C)
        y = torch.lerp(self.stripes(x), o, self.share(q, k)[:, :, None, None])
        return self.out((y if self.axis == "rows" else y.transpose(1, 2)).flatten(1, 2))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = dict(self.named_parameters()), self.dims, self.dims.grid or ()
        tokens = torch.arange(height * width).view(height, width)
        groups, length, around = (tokens, width, 2) if self.axis == "rows" else (tokens.T, height, 1)
        normed = nn.functional.layer_norm(x, (d.dim,), w["norm.weight"], w["norm.bias"])
        parts = nn.functional.linear(normed, w["qkv.weight"], w["qkv.bias"]).split(d.head_dim, -1)
        apart = torch.arange(length, dtype=torch.float64) - torch.arange(length, dtype=torch.float64)[:, None]
        chord = (2 - 2 * torch.cos(around * torch.pi * apart / length)).sqrt()
        if not self.cyclic:
            chord = chord * apart.sign()
        mixed, means = torch.zeros_like(x), []
        for s, group in enumerate(groups):
            radius = math.sin(math.pi * s / height) if self.axis == "rows" else 1.0
            sizes = []
            for h in range(d.num_heads):
                shared = d.num_heads + h // (d.num_heads // d.num_kv_heads)
                a = torch.einsum("bnd,bmd->bnm", parts[h][:, group], parts[shared][:, group])
                a = a + (self.strength * radius * chord).to(x.dtype)
                score = 1 - torch.cos(torch.pi / 2 * a / a.square().sum(-1, keepdim=True).sqrt())
                mixed[:, group, h * d.head_dim : (h + 1) * d.head_dim] = (
                    score @ parts[shared + d.num_kv_heads][:, group]
                )
                sizes.append(a.abs().mean((1, 2)))
            means.append(torch.stack(sizes).mean(0))
        mean = torch.stack(means, 1)
        m = (mean / mean.amax(1, keepdim=True)).clamp(min=self.floor)
        m = torch.stack([m] * length, 2)  # of a token, by stripe and place
        m = (m if self.axis == "rows" else m.mT).flatten(1)[..., None]
        return nn.functional.linear(m * mixed + (1 - m) * x, w["out.weight"], w["out.bias"])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(5, 7)), 35, {"axis": "rows", "strength": 0.7, "floor": 0.2}),
            Case(Dims(4, 3, num_kv_heads=2, grid=(6, 5)), 30, {"axis": "columns", "strength": 0.3, "floor": 0.8}),
            Case(Dims(1, 5, grid=(4, 9)), 36, {"cyclic": True, "strength": 0.5, "floor": 0.0}, batch=1),
        ]

    @classmethod
    def panorama(cls, grid: tuple[int, int], **params: Any) -> tuple[Egformer, Tensor]:
        """A layer in float64, and tokens (1, N, 8)."""
        x = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return cls(Dims(2, 4, grid=grid), **params).double().requires_grad_(False), x

    @claim("The scores of a query sum to between 1 and pi^2 / 8, whatever they are.")
    def bounded(cls) -> Finding:
        least, most = [], []
        for axis, size in (("rows", 1.0), ("columns", 30.0), ("rows", 0.0)):
            layer, x = cls.panorama((9, 16), axis=axis, strength=size)
            q, k, v = layer.heads(x)
            keys = k if size else torch.eye(16, 4, dtype=k.dtype).expand_as(k)  # for q = e_1 one score, all others 0
            queries = q if size else keys[:, :, :1].expand_as(q)
            sums = attend(queries, keys, torch.ones_like(v), scale=1.0, bias=layer.bias, normalizer=DistanceScore())
            least.append(float(sums.min()))
            most.append(float(sums.max()))
        slack = torch.finfo(torch.float64).eps * 16
        holds = min(least) >= 1 - slack and max(most) <= math.pi**2 / 8 + slack and min(least) < 1 + slack
        return Finding(holds, f"sums from {min(least):.6f} to {max(most):.4f}, bounds 1 and {math.pi**2 / 8:.4f}")

    @claim("A panorama rolled around gives the rolled output, along rows only where their bias has no sign.")
    def rolls(cls) -> Finding:
        errors = []
        for params in ({"cyclic": True}, {"axis": "columns"}, {"cyclic": False}):
            layer, x = cls.panorama((9, 16), **params, strength=1.0)
            rolled = x.unflatten(1, (9, 16)).roll(5, 2).flatten(1, 2)
            other = layer(rolled).unflatten(1, (9, 16)).roll(-5, 2).flatten(1, 2)
            errors.append(float((other - layer(x)).abs().max() / layer(x).abs().max()))
        holds = max(errors[:2]) <= torch.finfo(torch.float64).eps * 16 * 8 and errors[2] > 1 / 100
        cyclic, columns, signed = errors
        return Finding(holds, f"{cyclic:.0e} off without sign, {columns:.0e} along columns, {signed:.2f} with sign")

    @claim("At the pole there is no bias along the row: its tokens are one point.")
    def pole(cls) -> Finding:
        (layer, _), at = cls.panorama((9, 16), strength=1.0), torch.arange(16)
        sizes = layer.bias(at, at).unflatten(0, (9, 2)).abs().amax((1, 2, 3)).tolist()
        holds = sizes[0] == 0 and all(a < b for a, b in itertools.pairwise(sizes[:5]))
        return Finding(holds, f"largest bias {sizes[0]:.2f}, {sizes[1]:.2f}, {sizes[4]:.2f} in rows 0, 1, 4 of 9")

    @claim("Rows and then columns join every pair of tokens, at N (X + Y) pairs.")
    def work(cls) -> Finding:
        (rows, x), (columns, _) = (cls.panorama((8, 16), axis=axis, floor=1.0) for axis in ("rows", "columns"))
        seen = int(reached(lambda x: columns(rows(x)), x, (0, 50)).sum())
        products = work(lambda: (rows(x), columns(x))).batched
        pairs = products / (2 * 2 * (3 * 4 + 1))  # a multiplication and an addition; heads; scores twice, values, ones
        holds = seen == 128 and pairs == 128 * (8 + 16)
        return Finding(holds, f"{seen} of 128 tokens reached, {pairs:.0f} pairs weighed of {128**2}")
