"""From scores to weights: the softmax, and what has been put in its place.

A normaliser is an object with a `name`, called with scores (..., L) in which -inf stands for a pair that is not
admitted; it returns weights of the same shape, zero there. A row without a pair gives zeros, and NaN stays in its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Normalizer(Protocol):
    """What `attend` asks of a normaliser."""

    @property
    def name(self) -> str: ...

    def __call__(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Softmax:
    """p_j = exp(s_j) / sum_k exp(s_k)."""

    name: ClassVar[str] = "softmax"

    def __call__(self, scores: Tensor) -> Tensor:
        top = scores.detach().amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


@dataclass(frozen=True)
class Sigmoid:
    """p_j = 1 / (1 + exp(-(s_j + shift))): every key is weighed by itself (arXiv 2409.04431).

    shift: added to each score (default 0; the paper takes -log N).
    """

    shift: float = 0.0
    name: ClassVar[str] = "sigmoid"

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores + self.shift)


@dataclass(frozen=True)
class Entmax:
    """p = argmax_p p . s + H_alpha(p): a softmax that gives exact zeros (arXiv 1905.05702).

        p_j = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)),   tau such that sum_j p_j = 1

    alpha: > 1 (default 1.5; 2 is sparsemax). tau is found by halving its bracket until it has no float between, then p
    is scaled to sum 1; the gradient is the closed form of section 3.2, p^(2 - alpha) times (g - its weighted mean)."""

    alpha: float = 1.5
    name: ClassVar[str] = "entmax"

    def __post_init__(self) -> None:
        if not self.alpha > 1:
            raise ValueError(f"alpha: got {self.alpha}; pass a number > 1 (1 would be the softmax itself)")

    def __call__(self, scores: Tensor) -> Tensor:
        weights: Tensor = _Entmax.apply(scores, self.alpha)
        return weights


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        power = 1 / (alpha - 1)
        s = scores * (alpha - 1)
        top = s.amax(-1, keepdim=True)
        s = s - top.masked_fill(top == -torch.inf, 0)
        low, high = (
            torch.full_like(top, -1.0),
            torch.zeros_like(top),
        )  # the largest s is 0: alone it would take tau = -1
        for _ in range(torch.finfo(s.dtype).bits):  # more halvings than a mantissa has bits
            tau = (low + high) / 2
            enough = (s - tau).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(enough, tau, low), torch.where(enough, high, tau)
        weights = (s - low).clamp(min=0).pow(power)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        ctx.save_for_backward(weights)
        ctx.alpha = alpha
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights > 0, weights.clamp(min=torch.finfo(weights.dtype).tiny).pow(2 - ctx.alpha), 0)
        found = grad * slope
        total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return found - slope * found.sum(-1, keepdim=True) / total, None


NORMALIZERS: dict[str, type[Softmax] | type[Sigmoid] | type[Entmax]] = {n.name: n for n in (Softmax, Sigmoid, Entmax)}
