"""Convolution with kernels as long as the sequence or the map, by FFT."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.errors import known

MODES = ("causal", "circular", "same")


def long_conv(x: Tensor, kernel: Tensor, *, mode: str = "causal", skip: Tensor | None = None) -> Tensor:
    """Each channel convolved with its own long kernel, as many positions out as in.

        causal:    y[t] = sum_j kernel[j] x[t - j]                    x = 0 before the first position
        circular:  y[t] = sum_j kernel[j] x[(t - j) mod N]
        same:      y[t] = sum_j kernel[j] x[t - j + (K - 1) // 2]     x = 0 outside

    and + skip * x[t]. A map is convolved along both axes by the same rule. These are convolutions: torch's `conv1d` and
    `conv2d` run their kernels the other way round. S4 (arXiv 2111.00396, section 2.4), Hyena (arXiv 2302.10866),
    HyenaPixel (arXiv 2402.19305).

    x: (B, C, N), or (B, C, Y, X) for maps, channels first. kernel: (C, K) or (C, Ky, Kx). mode: "causal" (sequences
    only), "circular" or "same" (default "causal"). skip: (C,), the direct term that S4 and Hyena call D (default None).
    Returns the shape and dtype of x. K may exceed N, except for "circular"; what never meets x is left out.
    Costs O(B C L log L), L >= N + K - 1 (the sum is padded so that it cannot wrap round; L = N for "circular").

    Half precision is transformed in float32. An FFT spreads what it sums: every output carries a rounding error of eps
    times the norms of the kernel and of its whole row of x, so that "causal" holds to rounding, not bitwise, and one
    NaN makes its row, this channel of this sample, NaN. Other rows stay bitwise the same.
    Errors: TypeError for other than floating-point tensors; ValueError for an unknown mode, several devices, shapes
    that do not fit, a causal map, or a circular kernel longer than x.

    >>> long_conv(torch.ones(1, 1, 4), torch.tensor([[1.0, 2.0]])).round().tolist()
    [[[1.0, 3.0, 3.0, 3.0]]]
    """
    _check(x, kernel, mode, skip)
    axes = tuple(range(2, x.ndim))
    sizes, taps = x.shape[2:], kernel.shape[1:]
    starts = [0] * len(axes)
    if mode == "same":
        starts = [(k - 1) // 2 for k in taps]
    for axis, (n, k, start) in enumerate(zip(sizes, taps, starts, strict=True), 1):
        first, last = (max(0, start - n + 1), min(k, start + n)) if mode != "circular" else (0, k)
        kernel = kernel.narrow(axis, first, last - first)
        starts[axis - 1] = start - first
    lengths = list(sizes)
    if mode != "circular":
        lengths = [_fast_length(n + k - 1) for n, k in zip(sizes, kernel.shape[1:], strict=True)]
    wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    spectrum = torch.fft.rfftn(x.to(wide), lengths, axes) * torch.fft.rfftn(
        kernel.to(wide), lengths, tuple(a - 1 for a in axes)
    )
    y = torch.fft.irfftn(spectrum, lengths, axes)
    for axis, n, start in zip(axes, sizes, starts, strict=True):
        y = y.narrow(axis, start, n)
    if skip is not None:
        y = y + skip.to(wide).view(-1, *(1 for _ in axes)) * x
    return y.to(x.dtype)


def _fast_length(least: int) -> int:
    """The smallest even product of 2s, 3s and 5s that is >= `least`: FFTs of such a length are fast."""
    best = 1 << least.bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(2, 1 << (-(-least // three) - 1).bit_length())
            best = min(best, two * three)
            three *= 3
        five *= 5
    return best


def _check(x: Tensor, kernel: Tensor, mode: str, skip: Tensor | None) -> None:
    known("mode", mode, MODES)
    given = {"x": x, "kernel": kernel} | ({} if skip is None else {"skip": skip})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}; pass a floating-point tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device} beside x on {x.device}; move them to one device")
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}; pass (B, C, N) or (B, C, Y, X), no size zero")
    if kernel.ndim != x.ndim - 1 or kernel.shape[0] != x.shape[1] or 0 in kernel.shape:
        want = f"({x.shape[1]}, K)" if x.ndim == 3 else f"({x.shape[1]}, Ky, Kx)"
        raise ValueError(f"kernel: got shape {tuple(kernel.shape)} for x {tuple(x.shape)}; pass {want}")
    if mode == "causal" and x.ndim == 4:
        raise ValueError("mode: got 'causal' for a map, whose positions have no order; choose 'same' or 'circular'")
    if mode == "circular" and any(k > n for k, n in zip(kernel.shape[1:], x.shape[2:], strict=True)):
        raise ValueError(
            f"kernel: got taps {tuple(kernel.shape[1:])} for positions {tuple(x.shape[2:])}; "
            "a circular kernel may not be longer than x"
        )
    if skip is not None and skip.shape != x.shape[1:2]:
        raise ValueError(f"skip: got shape {tuple(skip.shape)}; pass ({x.shape[1]},), one factor a channel")
