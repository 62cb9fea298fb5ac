"""Does it keep the symmetries? Time's arrow, the batch, the heads."""

from __future__ import annotations

import torch

from saccade.contract import Attention
from saccade.testing.budget import same_bits
from saccade.testing.registry import named
from saccade.testing.subject import Subject


def _decides_in_time(subject: Subject) -> bool:
    module = subject.module
    return module.causal and not (isinstance(module, Attention) and module.prefill)


@named(applies=_decides_in_time)
def causality(subject: Subject) -> None:
    """A changed future leaves the past bitwise alone (exempt: `prefill = True`).

    Where queries are gathered by what they chose (`discrete`), others stand beside them in a product, and the last
    bit may turn; there the past must still be the oracle's, in float64.
    """
    dtype = torch.float64 if subject.cls.spec.discrete else torch.float32
    module, inputs = subject.build(dtype), subject.inputs(dtype)
    other = subject.variant(seed=subject.seed + 100).inputs(dtype)
    length = subject.case.length
    with torch.no_grad():
        before = module(*inputs)
        for now in sorted({0, length // 3, length // 2, length - 2} & set(range(length))):
            changed = [x.clone() for x in inputs]
            for x, y in zip(changed, other, strict=True):
                x[..., now + 1 :, :] = 3 * y[..., now + 1 :, :]
            after = module(*changed)
            past = slice(0, now + 1)
            if subject.cls.spec.discrete:
                whole = torch.cat([after[..., past, :], before[..., now + 1 :, :]], -2)
                subject.agrees(whole, f"output with the tokens after {now} changed, which may not be looked at")
            elif not same_bits(before[..., past, :], after[..., past, :]):
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
    return issubclass(subject.cls, Attention) and not subject.module.per_head and subject.case.dims.num_heads > 1


@named(applies=_has_like_heads)
def head_equivariance(subject: Subject) -> None:
    """Heads are alike: permuted key heads with their query heads permute the outputs (exempt: `per_head = True`)."""
    dims = subject.case.dims
    keys = torch.arange(dims.num_kv_heads).roll(1)
    within = torch.arange(dims.group).roll(1)
    heads = (keys[:, None] * dims.group + within).flatten()
    q, k, v = subject.inputs()
    with torch.no_grad():
        moved = subject.module(q[:, heads], k[:, keys], v[:, keys])
    subject.agrees(moved[:, heads.argsort()], "output of permuted heads")
