"""Every check can fail: it flags its broken twins, for the right reason, and passes the healthy ones."""

import pytest

from saccade.testing import Ledger, caching_twins, check, check_names, decode_twins, parametrize_with_checks
from saccade.testing.healthy import Decayed, Sliding, Thrifty
from saccade.testing.twins import TWINS

APART = (caching_twins, decode_twins)  # which enter theirs when they are imported


def test_every_check_has_a_broken_twin():
    assert {part.__name__ for part in APART} < {twin.broken.__module__ for twin in TWINS}
    assert {twin.check for twin in TWINS} == set(check_names())


def on(check, value):
    """What needs a GPU is marked so."""
    return pytest.param(value, marks=[pytest.mark.gpu] if check.startswith("gpu_") else [])


@pytest.mark.parametrize(
    "twin", [on(twin.check, twin) for twin in TWINS], ids=lambda twin: f"{twin.broken.__name__}-{twin.check}"
)
def test_a_broken_twin_is_flagged_for_the_right_reason(twin):
    report = check(twin.broken, only=twin.check, ledger=Ledger())
    assert report.failures, f"{twin.check} did not notice that {twin.broken.__name__}: {twin.broken.__doc__}"
    assert {row.check for row in report.outcomes} == {twin.check}
    assert any(twin.because in row.message for row in report.failures), str(report)


@parametrize_with_checks(Sliding, Decayed, Thrifty)
def test_the_healthy_ones_pass(check):
    check.run()


def test_the_healthy_ones_meet_every_check():
    met = {row.check for cls in (Sliding, Decayed, Thrifty) for row in check(cls).outcomes}
    assert met >= {name for name in check_names() if not name.startswith("gpu_")}
