"""Efficient attention: keys gather values into a few global contexts, and queries mix these."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import known
from saccade.scan import linear_attention
from saccade.scan.features import Map


def over_tokens(k: Tensor) -> Tensor:
    """Every channel of the keys is a softmax over the positions."""
    return k.softmax(-2)


def over_channels(q: Tensor) -> Tensor:
    """Every query is a softmax over its channels."""
    return q.softmax(-1)


def as_it_is(q: Tensor) -> Tensor:
    return q


def by_length(k: Tensor) -> Tensor:
    return k / k.shape[-2]


# Not causal, so that the map of the keys may look at all of them.
NORMALIZATIONS: dict[str, tuple[Map, Map]] = {
    "softmax": (over_channels, over_tokens),
    "scaling": (as_it_is, by_length),
}


class EfficientAttention(Attention):
    """Attention by D global contexts: (rho_k(K)^T V) is formed first, and every query mixes its rows.

        E = rho_q(Q) (rho_k(K)^T V)
        "softmax": rho_q a softmax of each query over its channels, rho_k of each channel over the keys
        "scaling": rho_q(Q) rho_k(K)^T = Q K^T / M, dot-product attention without a softmax

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), not causal; tokens in any order, a grid's
    row by row. A channel of the keys is a map of where to look, a row of the contexts is what is found there. Paper:
    arXiv 1812.01243; compared with the authors' code. Deviations: the convolutions of 1 x 1 around it and
    the residual belong to the host; the paper puts 1 / sqrt(n) on queries and keys each, here 1 / M is on the keys,
    which is the same product where M = N.
    normalization: "softmax" (default) or "scaling".
    Costs D Dv multiply-adds a key, and as many a query, a head; the contexts are D Dv numbers a key head.

    >>> layer = EfficientAttention(Dims(num_heads=2, head_dim=4, grid=(5, 7)))
    >>> tuple(layer(*torch.randn(3, 1, 2, 35, 4)).shape)
    (1, 2, 35, 4)
    """

    spec = Spec(
        id="efficient_attention",
        name="Efficient Attention",
        title="Efficient Attention: Attention with Linear Complexities",
        paper="1812.01243",
        year=2018,
        family="linear",
        uses=("linear_attention",),
    )

    def __init__(self, dims: Dims, *, normalization: str = "softmax") -> None:
        super().__init__(dims)
        self.normalization = known("normalization", normalization, NORMALIZATIONS)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        maps = NORMALIZATIONS[self.normalization]
        return cast(Tensor, linear_attention(q, k, v, feature_map=maps, causal=False, cu_seqlens=cu_seqlens))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reads = [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])]
        k, v = k[:, reads], v[:, reads]
        if self.normalization == "softmax":
            q, k = (x - x.amax(axis, keepdim=True) for x, axis in ((q, 3), (k, 2)))
            q, k = (x.exp() / x.exp().sum(axis, keepdim=True) for x, axis in ((q, 3), (k, 2)))
        else:
            q, k = (x / k.shape[2] ** 0.5 for x in (q, k))
        rows = []
        for i in range(q.shape[2]):
            weights = (q[:, :, i, None] * k).sum(-1)
            rows.append((weights[..., None] * v).sum(2))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 7), 37),
            Case(Dims(4, 5, num_kv_heads=2), 33, {"normalization": "scaling"}),
            Case(Dims(3, 4, num_kv_heads=1), 35, batch=1),
        ]

    @claim("With softmaxes the weights that it implies are positive, sum to 1, and are of rank D.")
    def distribution(cls) -> Finding:
        weights = cls._weights("softmax")
        apart, least = float((weights.sum(-1) - 1).abs().max()), float(weights.min())
        rank = int(torch.linalg.matrix_rank(weights).max())
        # A row sums 53 products of 6 terms.
        holds = apart <= (53 + 6) * torch.finfo(weights.dtype).eps and least > 0 and rank == 6
        return Finding(holds, f"rows sum to 1 within {apart:.1e}, least weight {least:.1e}, rank {rank} of 53 x 53")

    @claim("With scaling it is dot-product attention without a softmax, (Q K^T / n) V.")
    def is_dot_product(cls) -> Finding:
        q, k = cls._inputs()
        dense = q @ k.mT / 53
        apart = float((cls._weights("scaling") - dense).abs().max() / dense.abs().max())
        return Finding(apart <= 6 * torch.finfo(q.dtype).eps, f"largest difference {apart:.1e} of the largest weight")

    @claim("Work and memory are linear in the positions: 2 n D Dv multiply-adds, D Dv numbers of context.")
    def linear_work(cls) -> Finding:
        costs = [work(partial(cls(Dims(2, 8)), *torch.randn(3, 1, 2, n, 8))).all // 2 for n in (1024, 4096)]
        share = costs[1] / (2 * 2 * 4096**2 * 8)
        figure = f"{costs[0]} multiply-adds of 2 heads at 1024, {costs[1]} at 4096, {share:.4f} of those of all pairs"
        return Finding(costs == [2 * 2 * n * 8 * 8 for n in (1024, 4096)], figure)

    @staticmethod
    def _inputs() -> tuple[Tensor, Tensor]:
        q, k = torch.randn(2, 1, 2, 53, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return q, k

    @classmethod
    def _weights(cls, normalization: str) -> Tensor:
        """(1, 2, 53, 53), read off with the identity as values."""
        q, k = cls._inputs()
        return cls(Dims(2, 6), normalization=normalization)(q, k, torch.eye(53, dtype=q.dtype).expand(1, 2, -1, -1))
