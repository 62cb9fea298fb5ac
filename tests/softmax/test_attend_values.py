"""Every backend gives the oracle's numbers, whatever is composed."""

from __future__ import annotations

import pytest
from cases import NORMALIZERS, agree, agree_in_gradients, cases
from hypothesis import given, settings


@pytest.mark.parametrize("backend", ["tiles", "reference", "auto"])
@given(case=cases())
def test_values(backend, case):
    agree(case, backend)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@settings(max_examples=60)
@given(case=cases(tuple(n for n in NORMALIZERS if "entmax" not in str(n).lower())))
def test_gradients(backend, case):
    agree_in_gradients(case, backend)
