"""Performer: softmax attention estimated by positive orthogonal random features, in linear time."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import known, positive
from saccade.scan import PositiveRandomFeatures, State, linear_attention


class ReluFeatures(nn.Module):
    """phi(x) = relu(W x / D^(1/4)) + 1e-3, the paper's generalised attention; W as for the softmax kernel."""

    def __init__(self, head_dim: int, *, num_features: int, seed: int, orthogonal: bool) -> None:
        super().__init__()
        self.drawn = PositiveRandomFeatures(head_dim, num_features=num_features, seed=seed, orthogonal=orthogonal)

    def forward(self, x: Tensor) -> Tensor:
        return (x * x.shape[-1] ** -0.25 @ self.drawn.projection.to(x.dtype).T).relu() + 1e-3


KERNELS = {"softmax": PositiveRandomFeatures, "relu": ReluFeatures}


class Performer(Attention):
    """FAVOR+: softmax attention in linear time, estimated by positive random features.

        o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),   j <= i when causal
        phi(x)_f = m^(-1/2) exp(w_f . x' - |x'|^2 / 2),   x' = x / D^(1/4),   E[phi(q) . phi(k)] = exp(q . k / sqrt(D))

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal. The rows w_f of W (m, D),
    one W for all heads, are Gaussian in length and orthogonal in blocks of D; W is a buffer, not trained, and `redraw`
    replaces it (the paper: every 1000 steps of training). Paper: arXiv 2009.14794, lemma 1, section 2.4 and algorithm
    1; compared with lucidrains/performer-pytorch, a port of the authors' code. Deviations: that code adds 1e-4 to every
    feature and subtracts a maximum over all keys, which the causal form may not see; here keys are scaled by a running
    maximum that cancels, and nothing is added, so that the estimate has no bias. Orthogonal blocks are Haar, for which
    the code leaves out the signs of R by default.
    causal: True. num_features: m (default D log D). kernel: "softmax", or "relu" for phi(x) = relu(W x') + 1e-3.
    orthogonal: True; False draws the rows one by one. seed: of W (default None: from torch's global generator).
    Costs m (D + Dv) a token and head; a state of m (Dv + 1) numbers a key head to decode.
    Errors: ValueError for M != N when causal.

    >>> layer = Performer(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="performer",
        name="Performer (FAVOR+)",
        title="Rethinking Attention with Performers",
        paper="2009.14794",
        year=2020,
        family="linear",
        uses=("linear_attention", "PositiveRandomFeatures"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        causal: bool = True,
        num_features: int | None = None,
        kernel: str = "softmax",
        orthogonal: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(dims)
        d = dims.head_dim
        self.num_features = (
            max(1, int(d * math.log(d))) if num_features is None else positive("num_features", num_features)
        )
        self.causal, self.kernel, self.orthogonal = causal, known("kernel", kernel, KERNELS), orthogonal
        self.features = self._draw(seed)

    def _draw(self, seed: int | None) -> nn.Module:
        seed = int(torch.randint(2**62, ())) if seed is None else positive("seed", seed, least=0)
        return KERNELS[self.kernel](
            self.dims.head_dim, num_features=self.num_features, seed=seed, orthogonal=self.orthogonal
        )

    def redraw(self, seed: int | None = None) -> None:
        """Replace W in place by a new draw."""
        self.features.load_state_dict(self._draw(seed).state_dict())

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        o = linear_attention(
            q, k, v, feature_map=self.features, normalizer="sum", causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal Performer decodes token by token")
        after = linear_attention(q, k, v, feature_map=self.features, normalizer="sum", state=state, return_state=True)
        return cast(tuple[Tensor, State], after)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (w,) = (buffer.to(q.dtype) for buffer in dict(self.named_buffers()).values())
        rows, group = [], q.shape[1] // k.shape[1]

        def phi(x: Tensor) -> Tensor:
            x = x / q.shape[-1] ** 0.25
            if self.kernel == "relu":
                return (x @ w.T).clamp(min=0) + 1e-3
            return torch.exp(x @ w.T - (x * x).sum(-1, keepdim=True) / 2) / len(w) ** 0.5

        for h in range(q.shape[1]):
            key, value = phi(k[:, h // group]), v[:, h // group]
            for i in range(q.shape[2]):
                seen = slice(i + 1) if self.causal else slice(None)
                weights = (phi(q[:, h, i : i + 1]) * key[:, seen]).sum(-1, keepdim=True)
                rows.append((weights * value[:, seen]).sum(1) / weights.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 37, {"num_features": 13}),
            Case(Dims(4, 4, num_kv_heads=2), 23, {"num_features": 7, "orthogonal": False}, batch=1),
            Case(Dims(2, 3), 19, {"kernel": "relu", "num_features": 11}, batch=1),
            Case(Dims(1, 8), 71, batch=1),
        ]

    @claim("E[phi(q) . phi(k)] = exp(q . k / sqrt(D)): the estimate of the softmax kernel has no bias.")
    def unbiased(cls) -> Finding:
        q, k = cls._pair(0.6)
        products = cls._products(q, k, blocks=20000)
        exact, mean = float((q @ k / q.shape[0] ** 0.5).exp()), float(products.mean())
        error = float(products.std()) / len(products) ** 0.5
        # Four standard errors; a hundredth of the kernel tells the bias of unsigned QR factors, 6 to 20 %, apart.
        holds = abs(mean - exact) < 4 * error and error < exact / 100
        return Finding(holds, f"mean {mean:.4f} +- {error:.4f} of 20000 draws, the kernel is {exact:.4f}")

    @claim("Orthogonal features err less than independent ones.")
    def orthogonal_is_better(cls) -> Finding:
        q, k = cls._pair(0.6)
        apart, alone = (float(cls._products(q, k, blocks=20000, orthogonal=o).var()) for o in (True, False))
        return Finding(apart < alone, f"{apart / alone:.2f} times the variance of independent rows at m = D = 8")

    @claim("Positive features err less than trigonometric ones where the kernel is small.")
    def positive_is_better(cls) -> Finding:
        ratios = []
        q, _ = cls._pair(1.0)
        for k in (-q / 2, q / 2):
            scale = q.shape[0] ** -0.25
            w = torch.randn(80000, q.shape[0], generator=torch.Generator().manual_seed(1), dtype=q.dtype)
            half = scale**2 * (q @ q + k @ k) / 2
            trigonometric = half.exp() * (w @ (q - k) * scale).cos()
            plain = (w @ (q + k) * scale - half).exp()
            ratios.append(float(plain.var() / trigonometric.var()))
        small, large = ratios
        figure = f"{small:.1e} times the variance for k = -q / 2, {large:.1e} for k = q / 2"
        return Finding(small < 1 < large, figure)

    @claim("The error against softmax attention falls as 1 / sqrt(m).")
    def error_falls(cls) -> Finding:
        random, errors = torch.Generator().manual_seed(0), []
        q, k, v = torch.randn(3, 1, 1, 64, 8, generator=random)
        q, k = q / 2, k / 2  # beyond, the variance of exp(w . x) has hardly begun to fall at these counts
        exact = (q @ k.mT / 8**0.5).softmax(-1) @ v
        counts = (64, 1024)
        for count in counts:
            layers = [cls(Dims(1, 8), causal=False, num_features=count, seed=seed) for seed in range(24)]
            errors.append(
                float(torch.stack([(layer(q, k, v) - exact).square().mean() for layer in layers]).mean() ** 0.5)
            )
        rate = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
        figure = f"error {errors[0]:.3f} at m = 64, {errors[1]:.3f} at 1024: m^-{rate:.2f}"
        return Finding(0.4 < rate < 0.6, figure)

    @claim("The memory gives what all weights phi(Q) phi(K)^T give, with and without a mask, in work linear in N.")
    def linear(cls) -> Finding:
        random, apart, costs = torch.Generator().manual_seed(0), [], []
        q, k, v = torch.randn(3, 1, 2, 96, 8, generator=random, dtype=torch.float64)
        for causal in (False, True):
            layer = cls(Dims(2, 8), causal=causal, seed=0).double()
            weights = layer.features(q) @ layer.features(k).mT
            weights = weights.tril() if causal else weights
            dense = weights @ v / weights.sum(-1, keepdim=True)
            apart.append(float((layer(q, k, v) - dense).abs().max() / v.abs().max()))
        costs = [work(partial(cls(Dims(1, 8)), *torch.randn(3, 1, 1, length, 8))).all for length in (512, 1024)]
        holds = max(apart) < 96 * torch.finfo(q.dtype).eps and costs[1] == 2 * costs[0]
        return Finding(
            holds, f"largest difference {max(apart):.1e} of v, {costs[1] / costs[0]:.2f} times the work at twice N"
        )

    @staticmethod
    def _pair(size: float) -> tuple[Tensor, Tensor]:
        """Two unrelated vectors (8,) of about this standard deviation a channel."""
        q, k = size * torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return q, k

    @staticmethod
    def _products(q: Tensor, k: Tensor, *, blocks: int, orthogonal: bool = True) -> Tensor:
        """phi(q) . phi(k) of independent draws of D features each, (blocks,)."""
        d = len(q)
        features = PositiveRandomFeatures(d, num_features=d * blocks, orthogonal=orthogonal)
        phi = [features(x[None])[0] * blocks**0.5 for x in (q, k)]
        return (phi[0] * phi[1]).unflatten(0, (blocks, d)).sum(-1)
