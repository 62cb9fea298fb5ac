"""Does it keep the symmetries? Time's arrow, the batch, the heads."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.contract import Attention
from saccade.testing.registry import named
from saccade.testing.subject import Subject


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN counted as equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@named(applies=lambda subject: subject.module.causal)
def causality(subject: Subject) -> None:
    """A changed future leaves the past bitwise alone."""
    module, inputs = subject.build(torch.float32), subject.inputs(torch.float32)
    other = subject.variant(seed=subject.seed + 100).inputs(torch.float32)
    length = subject.case.length
    with torch.no_grad():
        before = module(*inputs)
        for now in sorted({0, length // 3, length // 2, length - 2} & set(range(length))):
            changed = [x.clone() for x in inputs]
            for x, y in zip(changed, other, strict=True):
                x[..., now + 1 :, :] = 3 * y[..., now + 1 :, :]
            after = module(*changed)
            past = slice(0, now + 1)
            if not same_bits(before[..., past, :], after[..., past, :]):
                rows = (before != after)[..., past, :].any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist()
                raise AssertionError(
                    f"tokens after {now} were changed, and so were the outputs of tokens {rows}; none may look ahead"
                )


@named()
def batch_equivariance(subject: Subject) -> None:
    """Batch elements do not see one another: a permuted batch gives permuted outputs, batches of one the same."""
    wide = subject.variant(batch=3)
    module, inputs = wide.module, wide.inputs()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        wide.agrees(module(*(x[order] for x in inputs))[order.argsort()], "output of a permuted batch")
        wide.agrees(torch.cat([module(*(x[b : b + 1] for x in inputs)) for b in range(3)]), "outputs of batches of one")


def _has_like_heads(subject: Subject) -> bool:
    return issubclass(subject.cls, Attention) and not subject.cls.per_head and subject.case.dims.num_heads > 1


@named(applies=_has_like_heads)
def head_equivariance(subject: Subject) -> None:
    """Heads are alike: permuted key heads with their query heads permute the outputs (exempt: `per_head = True`)."""
    dims = subject.case.dims
    keys = torch.arange(dims.num_kv_heads).roll(1)
    within = torch.arange(dims.group).roll(1)
    heads = (keys[:, None] * dims.group + within).flatten()
    q, k, v = subject.inputs()
    with torch.no_grad():
        subject.agrees(
            subject.module(q[:, heads], k[:, keys], v[:, keys])[:, heads.argsort()], "output of permuted heads"
        )
