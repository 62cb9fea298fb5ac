"""How a host turns queries and keys by their positions, told to policies that need them as they were before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
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
        return at[..., None] * self.rates.to(at.device)

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Products are formed in float32 or wider."""
        pairs, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
        one, two, rest = x.to(wide).split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        cos, sin = cos.to(wide), sin.to(wide)
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1).to(x.dtype)
