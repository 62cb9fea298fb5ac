"""Feature maps: what stands in for exp(q . k) so that a sum over keys becomes one memory.

A feature map is a callable x (B, H, N, D) -> (B, H, N, F) for queries and keys alike, a pair of them (queries, keys),
or a `LogFeatures`. Each acts on tokens one by one; only `CosReweight` knows where a token stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import known, positive

Map = Callable[[Tensor], Tensor]


class LogFeatures:
    """Features exp(f(x)) given by their logarithms, so that whoever sums them chooses the scale.

    `linear_attention` scales keys by the running maximum of f over the keys read so far, one number for all of them
    that is kept in `State.shift`: it cancels in a ratio, overflows nowhere, and no key is scaled alone. What a query
    reads may still vanish, when its own largest features are exp(-100) of the largest in every key.
    """

    def log_query(self, x: Tensor) -> Tensor:
        """f for queries, (B, H, N, F)."""
        raise NotImplementedError(f"{type(self).__name__}.log_query")

    def log_key(self, x: Tensor) -> Tensor:
        """f for keys, (B, Hkv, N, F)."""
        return self.log_query(x)


class Exp(LogFeatures):
    """phi(x) = exp(x), elementwise."""

    def log_query(self, x: Tensor) -> Tensor:
        return x


class ExpPair(LogFeatures):
    """phi(x) = [exp(x), exp(-x)], the Hedgehog map without its weights. arXiv 2402.04347."""

    def log_query(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], -1)


class PositiveRandomFeatures(nn.Module, LogFeatures):
    """FAVOR+: positive random features whose mean is the softmax kernel.

        phi(x)_f = exp(w_f . x s^(1/2) - s |x|^2 / 2) / sqrt(F),   E[phi(q) . phi(k)] = exp(s q . k)

    head_dim: D. num_features: F (default D). seed: of the draw (default 0). orthogonal: rows w_f orthogonal within
    blocks of D, with the lengths of Gaussian vectors (default True). scale: s (default D^-1/2). arXiv 2009.14794,
    lemma 1 and section 2.4. Deviation: the authors' code adds a small constant to every feature against division by 0;
    the running scale of `LogFeatures` makes it needless. Buffer: projection (F, D). Costs F D a token.
    Called on x it gives phi(x) itself, unscaled. Errors: ValueError for x of another head_dim.
    """

    projection: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        num_features: int | None = None,
        seed: int = 0,
        orthogonal: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = positive("head_dim", head_dim)
        self.num_features = head_dim if num_features is None else positive("num_features", num_features)
        self.scale = head_dim**-0.5 if scale is None else scale
        if not self.scale > 0:
            raise ValueError(f"scale: got {scale}; pass a number > 0")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.num_features, head_dim, generator=generator, dtype=torch.float64)
        if orthogonal:
            # A Gaussian matrix has rotation-invariant QR factors once the signs of R's diagonal are undone.
            shape = (-(-self.num_features // head_dim), head_dim, head_dim)
            bases, triangles = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
            bases = bases * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
            rows = bases.transpose(-1, -2).flatten(0, 1)[: self.num_features] * rows.norm(dim=-1, keepdim=True)
        self.register_buffer("projection", rows.float())

    def log_query(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x: got {x.shape[-1]} channels; these features were drawn for head_dim {self.head_dim}")
        x = x * self.scale**0.5
        return (
            x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2 - math.log(self.num_features) / 2
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.log_query(x).exp()

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, num_features={self.num_features}"


class CosReweight:
    """cosFormer's features, which favour keys nearby.

        phi(x_i) = [relu(x_i) cos(t_i), relu(x_i) sin(t_i)],   t_i = pi i / (2 length)
        phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 length))

    length: M, the longest sequence; beyond it the cosine would turn negative. start: position of the first token it is
    given (default 0); a decoder passes how many came before. F = 2 D. arXiv 2202.08791, eq. 10 to 12.
    Errors: ValueError for tokens at or after `length`.
    """

    def __init__(self, length: int, *, start: int = 0) -> None:
        self.length, self.start = positive("length", length), positive("start", start, least=0)

    def __call__(self, x: Tensor) -> Tensor:
        stop = self.start + x.shape[-2]
        if stop > self.length:
            raise ValueError(f"length: got {self.length} for tokens {self.start} to {stop - 1}; pass at least {stop}")
        # Angles of long sequences need more digits than features do.
        turns = torch.arange(self.start, stop, device=x.device, dtype=torch.float64) / self.length
        angle = (math.pi / 2) * turns[:, None]
        x = x.relu()
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


def elu1(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 > 0: x + 1 above 0, exp(x) below, where adding 1 to elu would cancel. arXiv 2006.16236."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def squared_relu(x: Tensor) -> Tensor:
    """phi(x) = relu(x)^2."""
    return x.relu().square()


def softmax(x: Tensor) -> Tensor:
    """phi(x) = softmax over the channels."""
    return x.softmax(-1)


def softmax_pair(x: Tensor) -> Tensor:
    """phi(x) = [softmax(x), softmax(-x)], each half on its own: one of the two maps that are called Hedgehog."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def softmax_joint(x: Tensor) -> Tensor:
    """phi(x) = softmax([x, -x]), both halves together: the other map that is called Hedgehog."""
    return torch.cat([x, -x], -1).softmax(-1)


def unit(x: Tensor) -> Tensor:
    """phi(x) = x / |x|, zeros for x = 0: cosine similarity."""
    return F.normalize(x, dim=-1)


def taylor2(x: Tensor) -> Tensor:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(D): the exponential's Taylor polynomial of order 2.

    phi(x) = [1, x / D^(1/4), vec(x x^T) / sqrt(2 D)], F = 1 + D + D^2. arXiv 2402.18668 (Based).
    """
    dim = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * dim)
    return torch.cat([torch.ones_like(x[..., :1]), x / dim**0.25, outer], -1)


FEATURE_MAPS: dict[str, Map | LogFeatures] = {
    "elu1": elu1,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "softmax": softmax,
    "softmax_pair": softmax_pair,
    "softmax_joint": softmax_joint,
    "unit": unit,
    "taylor2": taylor2,
    "exp": Exp(),
    "exp_pair": ExpPair(),
}


def feature_map_of(feature_map: str | Map | tuple[Map, Map] | LogFeatures | None) -> tuple[Map, Map] | LogFeatures:
    """The pair (for queries, for keys) that is meant, or the `LogFeatures`; None is the identity."""
    if isinstance(feature_map, str):
        feature_map = FEATURE_MAPS[known("feature_map", feature_map, FEATURE_MAPS)]
    if feature_map is None:
        return _same, _same
    if isinstance(feature_map, LogFeatures):
        return feature_map
    pair = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if len(pair) != 2 or not all(callable(f) for f in pair):
        raise TypeError(
            f"feature_map: got {feature_map!r}; pass a name, a callable, or a pair of callables (queries, keys)"
        )
    return pair


def _same(x: Tensor) -> Tensor:
    return x
