"""Keys that live for some time against a dense mask, values and gradients, and a twin that the comparison catches."""

import pytest
import torch

from saccade.softmax import attend_lifetimes
from saccade.softmax.lifetimes import Alive, alive
from saccade.testing.budget import assert_close

B, H, HKV, N, D, DV = 2, 4, 2, 83, 5, 3


def problem():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, N, d, generator=random).double() for h, d in ((H, D), (HKV, D), (HKV, DV)))
    at = torch.arange(N)
    last = (at + (torch.rand(B, HKV, N, generator=random) * 12).long()).clamp(max=N - 1)
    return (q, k, v), torch.where(torch.rand(B, HKV, N, generator=random) < 0.1, N - 1, last)


def dense(q, k, v, last):
    """(o, lse) from the definition."""
    i, group = torch.arange(N)[:, None], H // HKV
    seen = (i >= torch.arange(N)) & (i <= last[:, :, None])
    k, v, seen = (x.repeat_interleave(group, 1) for x in (k, v, seen))
    scores = (q @ k.mT / D**0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def judge(function, last):
    """Values and gradients of `function` against `dense`."""
    given, truly = problem()
    found = []
    for call, dtype, lives in ((dense, torch.float64, truly), (dense, torch.float32, truly),
                               (function, torch.float32, last)):  # fmt: skip
        leaves = [x.to(dtype).requires_grad_() for x in given]
        outputs = call(*leaves, lives)
        weights = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(dtype) for o in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for truth, eager, actual in zip(*found, strict=True):
        assert_close(actual.detach(), truth.detach(), eager.detach(), terms=N * D)


def test_is_the_mask():
    judge(attend_lifetimes, problem()[1])


def test_a_key_that_dies_a_query_too_early_is_seen():
    last = problem()[1]
    with pytest.raises(AssertionError):
        judge(attend_lifetimes, torch.maximum(last - 1, torch.arange(N)))


def test_keys_that_live_on_share_tiles():
    """Every pair is where the pattern has it, in fewer tiles than with the keys as they come."""
    last = problem()[1]
    _, pattern = alive(last)
    rows = B * HKV * N
    plan = pattern.plan(rows, block=(4, 4))
    assert plan.dense().equal(pattern.dense(rows))
    start = torch.arange(0, rows, N).view(B, HKV, 1)
    as_they_come = Alive(torch.arange(rows), (last + start).flatten(), N)
    assert plan.num_tiles < as_they_come.plan(rows, block=(4, 4)).num_tiles < B * HKV * (N / 4) ** 2 / 2


def test_one_number_a_key():
    (q, k, v), last = problem()
    with pytest.raises(ValueError, match=r"^last: got shape \(2, 2, 82\); pass one number a key, \(2, 2, 83\)"):
        attend_lifetimes(q, k, v, last[..., 1:])
