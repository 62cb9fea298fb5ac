"""Every mechanism of the catalogue against every check that its contract and capabilities call for."""

import pytest

from saccade.catalogue import mechanism, mechanisms
from saccade.testing import Ledger, checks, perform

CLASSES = [mechanism(spec.id) for spec in mechanisms()]
CHECKS = [one for cls in CLASSES for one in checks(cls)]
LEDGER = Ledger.load()

# What no mechanism may be without, whatever it can do.
ALWAYS = {"value", "gradients", "dtype_float32", "dtype_bfloat16", "declaration", "oracle_independent", "claim"}


def marked(one):
    return pytest.param(one, id=one.id, marks=[pytest.mark.gpu] if one.name.startswith("gpu_") else [])


@pytest.mark.parametrize("one", [marked(one) for one in CHECKS])
def test_conformance(one):
    if LEDGER.find(one.mechanism, one.name, one.label) is None:
        one.run()
    else:
        row = perform(one, LEDGER)
        assert row.ok, f"{row.status}: {row.message}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.spec.id)
def test_no_mechanism_escapes(cls):
    mine = [one for one in CHECKS if one.mechanism == cls.spec.id]
    assert {one.name for one in mine} >= ALWAYS
    assert {str(case) for case in cls.cases()} == {one.label for one in mine if one.name == "value"}
    assert set(cls.claims()) == {one.label for one in mine if one.name == "claim"}


def test_ids_are_unique():
    ids = [one.id for one in CHECKS]
    assert len(ids) == len(set(ids))


def test_the_ledger_names_only_what_exists():
    assert LEDGER.stale((one.mechanism, one.name, one.label) for one in CHECKS) == []
