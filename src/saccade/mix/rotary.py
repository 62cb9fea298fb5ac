"""Rotary positions (arXiv 2104.09864): pairs of channels turned by angles, so that q . k sees differences of places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.errors import positive


def rotary_rates(pairs: int, theta: float = 10000.0, *, device: torch.device | None = None) -> Tensor:
    """How far each pair of channels turns from one place to the next: theta^(-i / P), 0 <= i < P.

    pairs: P, none or more. theta: where the rates end, in places a radian (10000). -> (P,) float64, in which a million
    places keep their digits; angles are places times rates. Section 3.2.2 of the paper, where P = D / 2.
    Errors: ValueError for pairs < 0.

    >>> rotary_rates(2, 100.0).tolist()
    [1.0, 0.1]
    """
    steps = torch.arange(positive("pairs", pairs, least=0), dtype=torch.float64, device=device)
    return theta ** -(steps / max(1, pairs))


def grid_angles(grid: Sequence[int], rates: Sequence[Tensor]) -> Tensor:
    """Angles of the tokens of a row-major grid, each axis with pairs of channels of its own.

        angles[n] = [y_n rates_0, x_n rates_1]        on a grid (Y, X), and so with one axis or three

    rates: for each axis (P_a,), radians from one place to the next -> (N, sum of P_a), N the product of grid.
    Errors: ValueError when there are more or fewer rates than axes.

    >>> grid_angles((2, 2), (torch.tensor([1.0]), torch.tensor([0.5]))).tolist()
    [[0.0, 0.0], [0.0, 0.5], [1.0, 0.0], [1.0, 0.5]]
    """
    if len(rates) != len(grid):
        raise ValueError(f"rates: got {len(rates)} for the grid {tuple(grid)}; pass one tensor for each axis")
    places = torch.meshgrid(
        *(torch.arange(n, device=r.device) for n, r in zip(grid, rates, strict=True)), indexing="ij"
    )
    return torch.cat([at.flatten()[:, None] * r for at, r in zip(places, rates, strict=True)], 1)


def turn_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Channels i and i + P turned by angle i, the convention of Llama; channels from 2 P on stay.

        y_i = x_i cos a_i - x_(i + P) sin a_i,   y_(i + P) = x_(i + P) cos a_i + x_i sin a_i,   0 <= i < P

    x (..., N, D), angles (N, P) or any shape that broadcasts to (..., N, P), radians -> (..., N, D) in x's dtype; the
    products are formed in float32 or wider, sines in the dtype of angles. Costs 4 N P multiplications.
    Errors: ValueError for 2 P > D.

    >>> turn_halves(torch.tensor([[1.0, 2.0, 0.0, 0.0, 5.0]]), torch.tensor([[0.0, torch.pi / 2]])).round(decimals=3)
    tensor([[1., -0., 0., 2., 5.]])
    """
    pairs = _pairs(x, angles)
    wide = torch.promote_types(x.dtype, torch.float32)
    one, two, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([*_turned(one.to(wide), two.to(wide), angles), rest], -1).to(x.dtype)


def turn_at(x: Tensor, at: Tensor | int, theta: float = 10000.0, channels: int | None = None) -> Tensor:
    """`turn_halves` by places in a sequence: the angles are places times `rotary_rates`.

    x (..., N, D). at: places, (N,) or what broadcasts to (..., N), negative to turn back; or the first of N in a row.
    theta: of the rates (10000). channels: 2 P, as many of the first are turned (default: all). -> (..., N, D) in x's
    dtype. Costs and errors as `turn_halves`.

    >>> x = torch.randn(5, 8)
    >>> torch.allclose(turn_at(turn_at(x, 3), -torch.arange(3, 8)), x, atol=1e-5)
    True
    """
    places = torch.arange(at, at + x.shape[-2], device=x.device) if isinstance(at, int) else at
    pairs = (x.shape[-1] if channels is None else channels) // 2
    return turn_halves(x, places[..., None] * rotary_rates(pairs, theta, device=x.device))


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Channels 2 i and 2 i + 1 turned by angle i, the convention of the paper; channels from 2 P on stay.

        y_2i = x_2i cos a_i - x_(2i + 1) sin a_i,   y_(2i + 1) = x_(2i + 1) cos a_i + x_2i sin a_i,   0 <= i < P

    Shapes, precision, cost and errors as `turn_halves`.

    >>> turn_pairs(torch.tensor([[1.0, 0.0, 2.0, 0.0, 5.0]]), torch.tensor([[0.0, torch.pi / 2]])).round(decimals=3)
    tensor([[1., 0., -0., 2., 5.]])
    """
    pairs = _pairs(x, angles)
    wide = torch.promote_types(x.dtype, torch.float32)
    both, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], -1)
    even, odd = both.to(wide).unflatten(-1, (pairs, 2)).unbind(-1)
    return torch.cat([torch.stack(_turned(even, odd, angles), -1).flatten(-2), rest], -1).to(x.dtype)


def _turned(one: Tensor, two: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos().to(one.dtype), angles.sin().to(one.dtype)
    return one * cos - two * sin, two * cos + one * sin


def _pairs(x: Tensor, angles: Tensor) -> int:
    if 2 * angles.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"angles: got {angles.shape[-1]} for {x.shape[-1]} channels; pass {x.shape[-1] // 2} or fewer, one a pair"
        )
    return angles.shape[-1]
