"""Paired timing, with clocks that are told what to say."""

import numpy as np
import pytest
import torch

from saccade.bench import timing
from saccade.bench.timing import LEAST_PAIRS, MOST_PAIRS, Ratio, Samples, noise_floor, ratio, rounds


class Told:
    """Every function has its own seconds; the machine slows down by `drift` a call."""

    def __init__(self, seconds, drift=0.0):
        self.seconds, self.drift, self.calls = seconds, drift, []

    def __call__(self, calls):
        found = []
        for call in calls:
            self.calls.append(call)
            found.append(self.seconds[call] * (1 + self.drift * len(self.calls)))
        return found


def one():
    """A function to be timed."""


def two():
    """Another."""


def base():
    """The baseline."""


def test_rounds_are_palindromes_and_ratios_paired():
    clock = Told({base: 3.0, one: 1.0, two: 6.0})
    found = rounds([one, two], base, seconds=1e9, clock=clock)
    assert clock.calls[:6] == [base, one, two, two, one, base]
    assert len(clock.calls) == LEAST_PAIRS * 3  # constant times: no more than the least
    assert [ratio(s).median for s in found] == [3.0, 0.5]
    assert [s.seconds for s in found] == [1.0, 6.0]
    assert found[0].baseline_seconds == 3.0


def test_drift_falls_on_both_sides():
    clock = Told({base: 2.0, one: 1.0}, drift=0.01)
    (found,) = rounds([one], base, seconds=1e9, clock=clock, precision=0.0)
    assert len(found.function) == MOST_PAIRS
    assert ratio(found).median == pytest.approx(2.0, rel=0.01)


def test_the_budget_stops_it_before_the_round_that_would_not_fit():
    hours = iter(range(1000))
    clock = Told({base: 1.0, one: 1.0})
    (found,) = rounds([one], base, seconds=4.0, clock=clock, precision=0.0, now=lambda: float(next(hours)))
    assert 2 <= len(found.function) < LEAST_PAIRS
    assert ratio(found).low is None
    assert ratio(found).verdict(0.0) == "undecided"


def test_the_interval_covers_the_truth_at_its_rate():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        noisy = 2.0 * np.exp(0.2 * random.standard_normal(20))
        found = ratio(Samples((1.0,) * 20, tuple(noisy)), seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.2, 1.4, "faster"),
        (0.5, 0.8, "slower"),
        (0.95, 1.05, "same"),
        (1.05, 1.2, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_verdicts_allow_for_the_noise(low, high, verdict):
    assert Ratio(1.0, low, high, 10).verdict(0.1) == verdict


def test_noise_is_what_the_baseline_shows_against_itself():
    assert noise_floor(Samples((1.0,) * 8, (1.0,) * 8)) == 0.0
    assert noise_floor(Samples((1.0,) * 8, (1.2,) * 8)) == pytest.approx(0.2)
    assert noise_floor(Samples((1.0,) * 2, (1.0,) * 2)) == 0.05  # too few to tell


def test_fewer_threads_where_several_wait_for_one_another(monkeypatch):
    before = torch.get_num_threads()
    slow = {4: 9.0, 2: 2.0, 1: 1.9}
    monkeypatch.setattr(timing.CpuClock, "__call__", lambda self, calls: [slow[torch.get_num_threads()]] * len(calls))
    with timing.threads(4):
        assert timing.quiet_threads() == 2
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == before
