"""Lists of single keys may end before their tables do: what stands behind them changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade.softmax import attend
from saccade.where import Causal, plan_chosen


@pytest.mark.parametrize("backend", ["triton", "tiles", "reference"])
def test_room_behind_single_keys(backend):
    q, (k, v) = torch.randn(2, 4, 24, 16), torch.randn(2, 2, 2, 40, 16)
    tokens, weights = torch.randint(-1, 40, (8, 2, 5)), torch.randn(8, 2, 5)
    group_of, tiles = torch.arange(8).view(2, 4), torch.randint(-1, 3, (8, 2, 1))
    plan = plan_chosen(Causal(), tiles, group_of, 24, 40, (16, 16), tokens=tokens, token_log_weights=weights)
    behind, noise = torch.randint(-(2**31), 2**31 - 1, (7,), dtype=torch.int32), torch.full((7,), torch.nan)
    roomy = replace(
        plan,
        token_indices=torch.cat([plan.token_indices, behind]),
        token_log_weights=torch.cat([plan.token_log_weights, noise]),
    ).verify()
    leaves, found = [x.requires_grad_() for x in (q, k, v)], []
    for one in (plan, roomy):
        o, lse = attend(*leaves, one, return_lse=True, backend=backend)
        seen = lse.masked_fill(lse == -torch.inf, 0)
        found.append((o, lse, *torch.autograd.grad(o.square().sum() + seen.sum(), leaves)))
    for expected, got in zip(*found, strict=True):
        assert got.equal(expected)
