"""Paired, interleaved timing: is one function faster than another, and by how much?

Functions take turns in palindromic rounds, baseline first and last,

    b  f1 f2 .. fk  fk .. f2 f1  b        (k = 1: A B B A)

so that a slow drift of the machine falls on both sides of every ratio alike. Each half gives one pair a function: its
time beside the baseline's of the same half. The reported speed-up is the median of the pairs' ratios baseline /
function, with a percentile-bootstrap interval over pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

# The median of n pairs lies outside their range with probability 2**(1 - n): five cannot vouch for 95 %.
LEAST_PAIRS = 6
MOST_PAIRS = 60
RESAMPLES = 2000

Call = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """Seconds of paired calls: entry i of both was measured in the same half round."""

    function: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return float(np.median(self.function))

    @property
    def baseline_seconds(self) -> float:
        return float(np.median(self.baseline))


@dataclass(frozen=True)
class Ratio:
    """Median speed-up over `pairs` pairs with a 95 % interval; no interval below LEAST_PAIRS."""

    median: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def spread(self) -> float:
        """Half the interval's width relative to the median; infinite without an interval."""
        if self.low is None or self.high is None:
            return float("inf")
        return (self.high - self.low) / 2 / self.median

    def verdict(self, noise: float) -> str:
        """faster or slower when the interval clears 1 by more than `noise`, same when it lies within, else undecided.

        noise: what baseline against baseline showed, as a fraction.
        """
        if self.low is None or self.high is None:
            return "undecided"
        if self.low > 1 + noise:
            return "faster"
        if self.high < 1 - noise:
            return "slower"
        return "same" if self.low >= 1 - noise and self.high <= 1 + noise else "undecided"


def ratio(samples: Samples, *, seed: int = 0) -> Ratio:
    """The median of baseline / function over pairs and its bootstrap interval.

    >>> ratio(Samples((1.0,) * 8, (3.0,) * 8)).median
    3.0
    """
    ratios = np.asarray(samples.baseline) / np.asarray(samples.function)
    median, count = float(np.median(ratios)), len(ratios)
    if count < LEAST_PAIRS:
        return Ratio(median, None, None, count)
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return Ratio(median, float(low), float(high), count)


def noise_floor(samples: Samples) -> float:
    """How far from 1 the interval of baseline against baseline reaches, as a fraction; 5 % when pairs are too few."""
    alone = ratio(samples)
    return 0.05 if alone.low is None or alone.high is None else max(abs(alone.high - 1), abs(1 - alone.low))


class Clock(Protocol):
    """Runs calls one after another and gives the seconds of each."""

    def __call__(self, calls: Sequence[Call]) -> list[float]: ...


class CpuClock:
    """Wall-clock time of each call."""

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


class CudaClock:
    """CUDA events around each call, the second-level cache flushed before it; the host waits once, at the end."""

    def __init__(self, device: str) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        events = []
        with torch.cuda.device(self.flush.device):
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                start.record()
                call()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes on `count` processors inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quiet_threads() -> int:
    """How many threads, at most those that PyTorch would use, run here without waiting for other programs.

    Where others hold a processor, every parallel operator waits for their turn to end, which takes longer than most
    operators; then fewer threads are faster, and steadier. Half as many are tried as long as they are.
    """
    count, numbers = torch.get_num_threads(), torch.zeros(2**18)

    def mean(count: int) -> float:
        # Longer than the few milliseconds for which a scheduler lets one program have a processor.
        with threads(count):
            taken: list[float] = []
            start = time.perf_counter()
            while not taken or time.perf_counter() - start < 0.05:
                taken += CpuClock()([lambda: numbers.add_(1)] * 10)
            return sum(taken) / len(taken)

    while count > 1 and mean(count) > 1.5 * mean(count // 2):
        count //= 2
    return count


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


def rounds(
    functions: Sequence[Call],
    baseline: Call,
    *,
    seconds: float,
    clock: Clock,
    precision: float = 0.02,
    now: Callable[[], float] = time.perf_counter,
) -> list[Samples]:
    """Measure `functions` beside `baseline`; every one must have been called before, so that it is warm.

    seconds: stop before a round that would end later than this; the first is always run. precision: stop once every
    interval's half width is within this fraction of its median. Gives one `Samples` a function.
    """
    taken: list[list[float]] = [[] for _ in functions]
    beside: list[float] = []
    order = [baseline, *functions, *reversed(functions), baseline]
    count, start, longest = len(functions), now(), 0.0
    while len(beside) < MOST_PAIRS:
        began = now()
        times = clock(order)
        longest = max(longest, now() - began)
        beside += [times[0], times[-1]]
        for at, own in enumerate(taken):
            own += [times[1 + at], times[2 * count - at]]
        found = [Samples(tuple(own), tuple(beside)) for own in taken]
        if now() - start + longest > seconds:
            break
        if len(beside) >= LEAST_PAIRS and all(ratio(one).spread < precision for one in found):
            break
    return found
