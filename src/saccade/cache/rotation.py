"""How a host turns queries and keys by their positions, told to policies that need them as they were before."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny  # a channel that does not turn has no logarithm


@dataclass(frozen=True, eq=False, repr=False)
class Rotation:
    """Rotary positions of one layer (arXiv 2104.09864), scaled ones among them.

        turn(x)_t = s R_t x_t,   R_t turns channels i and i + P by t rates_i;   channels from 2 P on stay as they are

    x (..., N, D) at positions (N,), or (..., N) that broadcast. rates (P,): radians a position, in the dtype in which
    the host forms angles, so that what it turned is turned back. scale: s (1), as YaRN has it. Rotations commute, so
    that positions may be counted from anywhere, alike for q and k.

    >>> rotation = Rotation(torch.tensor([1.0, 0.1]), scale=1.5)
    >>> x, at = torch.randn(2, 7, 5), torch.arange(7)
    >>> bool(torch.isclose(rotation.back(rotation.turn(x, at), at), x, atol=1e-5).all())
    True
    """

    rates: Tensor
    scale: float = 1.0
    _over: dict[int, Rotation] = field(default_factory=dict, init=False)
    _there: dict[torch.device, Tensor] = field(default_factory=dict, init=False)  # rates on other devices

    def __repr__(self) -> str:
        return f"Rotation({len(self.rates)} pairs, scale={self.scale})"

    @property
    def numbers(self) -> tuple[list[float], float]:
        """rates and scale."""
        return self.rates.tolist(), self.scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rotation) and (self is other or self.numbers == other.numbers)

    def __hash__(self) -> int:
        return hash((len(self.rates), self.scale))

    def over(self, pairs: int) -> Rotation:
        """As many pairs, P', that span the same range: rate j is the one at place j P / P', geometrically between those
        that there are. What theta^(-i / P) was becomes theta^(-j / P').
        """
        count = len(self.rates)
        if pairs == count or not count:
            return self
        if pairs not in self._over:
            place = torch.arange(pairs, dtype=torch.float64, device=self.rates.device) * count / pairs
            at, logs = place.long().clamp(max=max(0, count - 2)), self.rates.double().clamp(min=TINY).log()
            slope = logs.diff() if count > 1 else torch.zeros_like(logs)
            rates = (logs[at] + slope[at] * (place - at)).exp()
            self._over[pairs] = Rotation(rates.to(self.rates.dtype), self.scale)
        return self._over[pairs]

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """x as the host turns it."""
        angles = self._angles(at)
        return self._turned(x, self.scale * angles.cos(), self.scale * angles.sin())

    def back(self, x: Tensor, at: Tensor) -> Tensor:
        """x as it was before the host turned it."""
        angles = self._angles(at)
        return self._turned(x, angles.cos() / self.scale, -angles.sin() / self.scale)

    def mean(self, x: Tensor, at: Tensor) -> Tensor:
        """(1 / T) sum_t s R_t x for positions t of at (..., T), which all tokens of x (..., N, D) are turned by.

        No rotation itself: pairs of channels shrink, the more the faster they turn.
        """
        angles = self._angles(at)
        cos, sin = (self.scale * part.double().mean(-2, keepdim=True) for part in (angles.cos(), angles.sin()))
        return self._turned(x, cos, sin)

    def _angles(self, at: Tensor) -> Tensor:
        rates = self.rates
        if at.device != rates.device:
            if at.device not in self._there:
                self._there[at.device] = rates.to(at.device)
            rates = self._there[at.device]
        return at[..., None] * rates

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Products are formed in float32 or wider."""
        pairs, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
        one, two, rest = x.to(wide).split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        cos, sin = cos.to(wide), sin.to(wide)
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1).to(x.dtype)


class Turned:
    """A policy whose equations need q and k as they were before the host turned them, before there is a view of them.

    rotation: by which they come turned; None: as they are. A host that knows how it turns says so while it serves
    (`saccade.hf.apply`, `saccade.serve.Engine`), whatever was said before. Errors: ValueError for more pairs than there
    are channels.
    """

    rotation: Rotation | None = None

    def turned_by(self, rotation: Rotation | None, channels: int) -> None:
        """Once, by who makes it."""
        if not isinstance(rotation, Rotation | None):
            raise TypeError(
                f"rotation: got {rotation!r}; pass a saccade.cache.Rotation, or None for q and k as they are"
            )
        if rotation is not None and 2 * len(rotation.rates) > channels:
            raise ValueError(
                f"rotation: got {len(rotation.rates)} pairs of channels for a head_dim of {channels}; pass "
                f"{channels // 2} rates or fewer, or None for q and k as they are"
            )
        self.rotation = rotation

    @property
    def numbers(self) -> tuple[list[float], float]:
        """Rates and scale, for who does it by the book; no rates, and 1, for what is as it was."""
        return ([], 1.0) if self.rotation is None else self.rotation.numbers

    def back(self, x: Tensor, at: Tensor) -> Tensor:
        """x (..., N, D) of positions at, as it was."""
        return x if self.rotation is None else self.rotation.back(x, at)
