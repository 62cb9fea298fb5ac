"""FAST (Fastmax): softmax's exponential cut to a polynomial of standardised queries and keys, summed by its moments."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import positive
from saccade.scan import State, linear_attention


class Monomials:
    """phi(x) = [1, s^(1/2) x', s x' (x) x' / sqrt(2!), ...], x' standardised, up to degree p; F = 1 + D + ... + D^p."""

    def __init__(self, order: int, scale: float) -> None:
        self.order, self.scale = order, scale

    def __call__(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]) * self.scale**0.5
        power = torch.ones_like(x[..., :1])
        found = [power]
        for degree in range(1, self.order + 1):
            power = (power[..., :, None] * x[..., None, :]).flatten(-2)
            found.append(power / math.factorial(degree) ** 0.5)
        return torch.cat(found, -1)


class FastFactorizable(Attention):
    """Attention whose weights are a polynomial of q . k, factorised through moments of the keys.

        o_i = sum_j f(s q'_i . k'_j) v_j / sum_j f(s q'_i . k'_j),   j <= i when causal,   f(x) = sum_{l <= p} x^l / l!
        x' = (x - mean x) / sqrt(var x),   over the channels of one head

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal. Of the keys their moments
    are kept: sums of v, of k' v, of (k' (x) k') v, ..., and these without v. For even p every weight is positive; for
    odd p weights may be negative and rows divide by nearly 0, unless s D <= 1, for |q' . k'| <= D.
    Paper: arXiv 2402.07901, section 2. The authors' codes (fastmax, reproducing_fastmax_results) have p = 1 and 2, and
    divide q and k by the largest norm of the sequence instead, which a causal form may not see.
    Deviations: any p; 1e-5 is added to the variance, as in layer normalisation; no dropout.
    causal: True. order: p (default 2). scale: s (1.0).
    Costs (1 + D + ... + D^p) (D + Dv) a token and head; a state of (1 + D + ... + D^p) (Dv + 1) numbers a key head.
    Errors: ValueError for a scale that is not positive, for M != N when causal, and for a step when not causal.

    >>> layer = FastFactorizable(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="fast_factorizable",
        name="FAST (Fastmax)",
        title="FAST: Factorizable Attention for Speeding up Transformers",
        paper="2402.07901",
        year=2024,
        family="linear",
        uses=("linear_attention",),
    )
    causal = True

    def __init__(self, dims: Dims, *, causal: bool = True, order: int = 2, scale: float = 1.0) -> None:
        super().__init__(dims)
        if not scale > 0:
            raise ValueError(f"scale: got {scale}; pass a number > 0")
        self.causal, self.order, self.scale = causal, positive("order", order), scale
        self.features = Monomials(order, scale)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        o = linear_attention(
            q, k, v, feature_map=self.features, normalizer="sum", causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal FAST decodes token by token")
        after = linear_attention(q, k, v, feature_map=self.features, normalizer="sum", state=state, return_state=True)
        return cast(tuple[Tensor, State], after)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def standard(x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x / ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5

        rows, group = [], q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            key, value = standard(k[:, h // group]), v[:, h // group]
            for i in range(q.shape[2]):
                seen = slice(i + 1) if self.causal else slice(None)
                x = self.scale * (standard(q[:, h, i, None]) * key[:, seen]).sum(-1, keepdim=True)
                weights, term = torch.ones_like(x), torch.ones_like(x)
                for degree in range(1, self.order + 1):
                    term = term * x / degree
                    weights = weights + term
                rows.append((weights * value[:, seen]).sum(1) / weights.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 19),
            Case(Dims(4, 3, num_kv_heads=2), 13, {"order": 1, "scale": 0.3}, batch=1),
            Case(Dims(1, 3), 11, {"order": 3, "scale": 0.2}),
        ]

    @claim("The moments give what all weights f(q . k) give, with and without a mask.")
    def factorises(cls) -> Finding:
        (q, k, v), apart = cls._inputs(), []
        for causal in (True, False):
            weights = cls._weights(q, k, 2)
            weights = weights.tril() if causal else weights
            dense = weights @ v / weights.sum(-1, keepdim=True)
            apart.append(float((cls(Dims(2, 8), causal=causal)(q, k, v) - dense).abs().max() / v.abs().max()))
        holds = max(apart) < 96 * torch.finfo(q.dtype).eps
        return Finding(holds, f"largest differences {apart[0]:.1e} (causal) and {apart[1]:.1e} of v at 96 tokens")

    @claim("With p = 2 every weight is positive, at least 1/2 before division; with p = 1 some are negative.")
    def positive_weights(cls) -> Finding:
        q, k, _ = cls._inputs()
        least = [float((f(q) @ f(k).mT).min()) for f in (Monomials(1, 1.0), Monomials(2, 1.0))]
        figure = f"least weight {least[1]:.3f} with p = 2, {least[0]:.1f} with p = 1, before division"
        return Finding(least[1] >= 0.5 - 8**2 * torch.finfo(q.dtype).eps and least[0] < 0, figure)

    @claim("Every further degree brings it nearer to softmax of the standardised queries and keys.")
    def nears_softmax(cls) -> Finding:
        (q, k, v), errors = cls._inputs(), []
        units = [F.layer_norm(x, (8,)) for x in (q, k)]
        exact = (units[0] @ units[1].mT / 8**0.5).softmax(-1) @ v
        for order in (1, 2, 3, 4):
            layer = cls(Dims(2, 8), causal=False, order=order, scale=8**-0.5)
            errors.append(float((layer(q, k, v) - exact).square().mean().sqrt()))
        holds = errors[3] < errors[2] < errors[1] < errors[0]
        return Finding(holds, f"error {', '.join(f'{e:.1e}' for e in errors)} for p = 1 to 4 at s = 1 / sqrt(D)")

    @claim("The work is linear in the tokens, and of order D^(p + 1); the state has (1 + D + D^2) (Dv + 1) numbers.")
    def linear_work(cls) -> Finding:
        costs, sizes = [], []
        for length, width in ((512, 8), (1024, 8), (512, 16)):
            layer, inputs = cls(Dims(1, width), causal=False), torch.ones(3, 1, 1, length, width)
            costs.append(work(partial(layer, *inputs)).all)
            sizes.append(cls(Dims(1, width)).step(*inputs[..., :1, :])[1].memory.numel())
        longer, wider = costs[1] / costs[0], costs[2] / costs[0]
        holds = longer == 2 and 4 < wider < 8 and sizes == [73 * 9, 73 * 9, 273 * 17]
        figure = f"{longer:.2f} times the work at twice N, {wider:.2f} at twice D; {sizes[0]} numbers at D = 8"
        return Finding(holds, figure)

    @staticmethod
    def _inputs() -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 2, 96, 8, generator=random, dtype=torch.float64).unbind()

    @staticmethod
    def _weights(q: Tensor, k: Tensor, order: int) -> Tensor:
        x = F.layer_norm(q, q.shape[-1:]) @ F.layer_norm(k, k.shape[-1:]).mT
        terms = [x**degree / math.factorial(degree) for degree in range(order + 1)]
        return torch.stack(terms).sum(0)
