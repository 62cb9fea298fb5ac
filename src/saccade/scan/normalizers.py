"""What becomes of the sum that a query reads out of a linear memory: a policy a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saccade.errors import known


@dataclass(frozen=True)
class Read:
    """What a query finds in memory, sums over the keys j that it may see, decayed as the memory is.

    numerator: sum_j (phi(q) . phi(k_j)) v_j, (B, H, N, Dv). mass: sum_j phi(q) . phi(k_j), (B, H, N, 1).
    total: sum_j v_j, (B, H, N or 1, Dv). count: sum_j 1, (B, H, N or 1, 1). Both are None unless `Normalizer.counts`.
    """

    numerator: Tensor
    mass: Tensor
    total: Tensor | None = None
    count: Tensor | None = None


class Normalizer:
    """A policy: `Read` -> o (B, H, N, Dv).

    counts: it needs `total` and `count` (a second, one-channel scan). scale_free: the result does not change when
    numerator and mass are multiplied by one number, so a log scale kept beside the memory need not be undone.
    """

    counts: ClassVar[bool] = False

    @property
    def scale_free(self) -> bool:
        return False

    def __call__(self, read: Read) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.__call__")


@dataclass(frozen=True)
class Sum(Normalizer):
    """Weights that add up to 1:  o = numerator / (mass + eps).

    arXiv 2006.16236, section 3.2. eps (default 0): cosFormer's 1e-6 and the like. Where mass + eps is 0, as when every
    feature is 0, the numerator is returned as it is: zeros for features >= 0.
    """

    eps: float = 0.0

    @property
    def scale_free(self) -> bool:
        return self.eps == 0

    def __call__(self, read: Read) -> Tensor:
        mass = read.mass + self.eps
        return read.numerator / mass.masked_fill(mass == 0, 1.0)


@dataclass(frozen=True)
class Clamp(Normalizer):
    """Divide only by what is large:  o = numerator / max(|mass|, least).

    arXiv 2405.04517 (mLSTM, least = 1, the default); L2ViT clamps at 100.
    """

    least: float = 1.0

    def __post_init__(self) -> None:
        if not self.least > 0:
            raise ValueError(f"least: got {self.least}; pass a denominator > 0")

    def __call__(self, read: Read) -> Tensor:
        return read.numerator / read.mass.abs().clamp_min(self.least)


@dataclass(frozen=True)
class LengthPower(Normalizer):
    """Divide by a power of the number of keys seen:  o = numerator / count^power.

    arXiv 2409.18747 (Cottention, power = sigmoid of a parameter a head). power: a number (default 1), or a
    tensor (H,). With a decay the count is the decayed one.
    """

    counts: ClassVar[bool] = True
    power: float | Tensor = 1.0

    def __call__(self, read: Read) -> Tensor:
        assert read.count is not None
        power = self.power
        if isinstance(power, Tensor):
            heads = read.numerator.shape[1]
            if power.shape != (heads,):
                raise ValueError(f"power: got shape {tuple(power.shape)} for {heads} query heads; pass ({heads},)")
            power = power.to(read.count.dtype).view(-1, 1, 1)
        return read.numerator / read.count**power


@dataclass(frozen=True)
class MeanShift(Normalizer):
    """Weights shifted to add up to 1, some of them negative:  o = numerator / count + (1 - mass / count) mean(v).

    arXiv 2412.06590 (InLine attention); mean(v) = total / count.
    """

    counts: ClassVar[bool] = True

    def __call__(self, read: Read) -> Tensor:
        assert read.count is not None
        assert read.total is not None
        return (read.numerator + (1 - read.mass / read.count) * read.total) / read.count


@dataclass(frozen=True)
class Magnitude(Normalizer):
    """Weights that add up to 1 and sharpen as the query grows:  o = (1 + 1/z) numerator / count - z mean(v).

    arXiv 2507.00698 (MALA), z = mass / count, mean(v) = total / count; features must be positive, so that z > 0.
    """

    counts: ClassVar[bool] = True

    def __call__(self, read: Read) -> Tensor:
        assert read.count is not None
        assert read.total is not None
        z = read.mass / read.count
        return ((1 + 1 / z) * read.numerator - z * read.total) / read.count


NORMALIZERS: dict[str, Callable[[], Normalizer]] = {
    "sum": Sum,
    "clamp": Clamp,
    "length_power": LengthPower,
    "mean_shift": MeanShift,
    "magnitude": Magnitude,
}


def normalizer_of(normalizer: str | Normalizer | None) -> Normalizer | None:
    """The policy itself, or a fresh one with its defaults by name.

    >>> normalizer_of("sum")
    Sum(eps=0.0)
    """
    if normalizer is None or isinstance(normalizer, Normalizer):
        return normalizer
    if not isinstance(normalizer, str):
        raise TypeError(f"normalizer: got {type(normalizer).__name__}; pass a Normalizer, a name or None")
    return NORMALIZERS[known("normalizer", normalizer, NORMALIZERS)]()
