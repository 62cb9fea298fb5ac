"""Attention over a union of disjoint key sets, from the parts: the monoid (o, lse)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge partial results of softmax attention over disjoint sets of keys.

        lse = log sum_p exp(lse_p),   o = sum_p exp(lse_p - lse) o_p

    partials: pairs of o (..., N, Dv) and lse (..., N), natural logarithm; a row that saw nothing has o = 0 and lse =
    -inf. Returns the same pair for all keys together. Associative and commutative, up to rounding; differentiable.
    Split-KV decode, shared prefixes, ring schedules and sparse branches are this one function.

    >>> q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)
    >>> from saccade import attend
    >>> halves = [attend(q, x, x, return_lse=True) for x in k.split(3, 2)]
    >>> torch.allclose(merge(halves)[0], attend(q, k, k), atol=1e-6)
    True
    """
    if not partials:
        raise ValueError("partials: got none; pass at least one pair (o, lse)")
    for o, lse in partials:
        if o.shape[:-1] != lse.shape or o.shape != partials[0][0].shape:
            raise ValueError(
                f"partials: got o {tuple(o.shape)} with lse {tuple(lse.shape)}; "
                "pass o (..., N, Dv) and lse (..., N), all alike"
            )
    each = torch.stack([lse for _, lse in partials])
    top = each.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (each - top).exp()
    total = weights.sum(0)
    blind = total == 0
    shares = (weights / total.masked_fill(blind, 1)).unsqueeze(-1)
    o = shares[0] * partials[0][0]  # in the wider type of the two; each part is read once and widened on the way
    for share, (part, _) in zip(shares[1:], partials[1:], strict=True):
        o = torch.addcmul(o, share, part)
    lse = (top + total.masked_fill(blind, 1).log()).masked_fill(blind, -torch.inf)
    return o.to(partials[0][0].dtype), lse


def absorb(o: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) after one more logit a head, `sink` (H,), has taken its share of the softmax; it has no value."""
    total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    shares = (lse - total.masked_fill(total == -torch.inf, 0)).exp()
    return o * shares[..., None].to(o.dtype), total
