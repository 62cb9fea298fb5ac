"""Error budgets that come from the data, never from a literal.

A result x is judged against a float64 oracle t beside e, what the oracle's own eager code gives in the dtype of x:

    |x - t|  <=  2 * |e - t|  +  band,      band = eps(dtype) * max|t| * sqrt(terms)

once for the largest error and once for the root mean square. The factor 2 lets a blocked order of summation be as
unlucky as the eager one; the band admits the last-bit rounding of a result whose eager twin happened to be exact.
`terms` is the number of products behind one entry.

One eager run may by chance be unusually close. So e may stand for several, which differ by rounding alone
(`saccade.testing.rounding`), and the budget is that of the one that is furthest off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """How far a result stands from its oracle, and how far it might have stood.

    error, allowed: largest absolute error and its budget; rms_error, rms_allowed: likewise for the root mean square.
    """

    error: float
    allowed: float
    rms_error: float
    rms_allowed: float
    where: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """True when both errors are finite and within their budgets."""
        return self.error <= self.allowed and self.rms_error <= self.rms_allowed

    def __str__(self) -> str:
        return (
            f"max error {self.error:.3e} (allowed {self.allowed:.3e}) at {self.where}, "
            f"rms error {self.rms_error:.3e} (allowed {self.rms_allowed:.3e})"
        )


def compare(
    actual: Tensor, oracle: Tensor, eager: Tensor | Iterable[Tensor], *, terms: int = 1, scale: float = 0.0
) -> Verdict:
    """Judge `actual` against the float64 `oracle` with the budget that `eager` sets.

    actual: same shape as oracle. eager: likewise, one result or several, of which the furthest off counts; further ones
    are asked for only as long as those before allow too little. terms: products summed into one entry (>= 1). scale:
    magnitude of what was added up to give the result, where that is larger than the result itself (sums that cancel);
    the band is at least eps * scale * sqrt(terms). NaN and infinities must stand in the same places as in the oracle;
    elsewhere they count as an infinite error.

    >>> t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> compare(t.float(), t, t.float()).ok
    True
    >>> compare(t + 0.3, t, [t, t + 0.1, t + 0.2]).allowed > 0.4
    True
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"shapes differ: actual {tuple(actual.shape)}, oracle {tuple(oracle.shape)}")
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, ())
    special = ~oracle.isfinite()
    same = (actual.double() == oracle) | (actual.isnan() & oracle.isnan())
    error = torch.where(special, torch.where(same, 0.0, torch.inf), (actual.double() - oracle).abs())
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    size = torch.where(special, 0.0, oracle.abs())
    eps = torch.finfo(actual.dtype).eps * max(terms, 1) ** 0.5
    band, rms_band = eps * max(float(size.max()), scale), eps * max(_rms(size), scale)
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    verdict = Verdict(float(error.max()), band, _rms(error), rms_band, at)
    for run in (eager,) if isinstance(eager, Tensor) else eager:
        if run.shape != oracle.shape:
            raise ValueError(f"shapes differ: eager {tuple(run.shape)}, oracle {tuple(oracle.shape)}")
        off = torch.where(special, 0.0, (run.double() - oracle).abs()).nan_to_num(nan=0.0, posinf=0.0)
        verdict = replace(
            verdict,
            allowed=max(verdict.allowed, 2 * float(off.max()) + band),
            rms_allowed=max(verdict.rms_allowed, 2 * _rms(off) + rms_band),
        )
        if verdict.ok:
            break
    return verdict


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN counted as equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_close(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor | Iterable[Tensor],
    *,
    name: str = "result",
    terms: int = 1,
    scale: float = 0.0,
) -> None:
    """Raise AssertionError with both errors and the worst index unless `compare` is satisfied."""
    verdict = compare(actual, oracle, eager, terms=terms, scale=scale)
    if not verdict.ok:
        raise AssertionError(f"{name}: {verdict}")
