"""Gathered plans give the oracle's numbers and gradients on every backend that takes lists of single keys."""

from __future__ import annotations

import math

import oracle
import pytest
import strategies
import torch
from cases import Case, agree, agree_in_gradients
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from saccade.where import Causal, Neighborhood
from saccade.where.gathered import NotGathered


@st.composite
def gathered(draw):
    """A float64 problem whose plan lists single keys."""
    grid, kernel, stride, dilation, causal = zip(
        *draw(st.lists(strategies.axis(), min_size=1, max_size=3)), strict=True
    )
    pattern, m = Neighborhood(grid, kernel, stride, dilation, causal), math.prod(grid)
    pattern = pattern & Causal() if draw(st.booleans()) else pattern
    n = draw(st.sampled_from([m, max(1, m // 2)]))
    try:
        plan = pattern.gathered(n, m, 2, draw(strategies.blocks), by=draw(st.sampled_from(["keys", "cells"])))
    except NotGathered:
        reject()
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(heads, tokens):
        return torch.randn(2, heads, tokens, 3, generator=seeded, dtype=torch.float64)

    return Case(normal(2, n), normal(1, m), normal(1, m), plan, oracle.entries_of(pattern.dense(n, m, 2)))


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@settings(max_examples=40)
@given(case=gathered())
def test_values_and_gradients(backend, case):
    agree(case, backend)
    agree_in_gradients(case, backend)
