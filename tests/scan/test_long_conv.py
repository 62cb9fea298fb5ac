"""Long convolutions against loops over taps, in value and every gradient; wrap-round, causality and NaN by name."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch

from saccade.scan.long_conv import long_conv
from saccade.testing.budget import assert_close

module = importlib.import_module("saccade.scan.long_conv")  # the name in the package is the function

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def plain(mode):
    """The sums of the definition, one tap at a time, on zero-padded or rolled copies of x."""

    def convolve(x, kernel, skip=None):
        sizes, taps = x.shape[2:], kernel.shape[1:]
        y = torch.zeros_like(x) if skip is None else skip.view(-1, *(1 for _ in sizes)) * x
        for tap in itertools.product(*map(range, taps)):
            weight = kernel[(slice(None), *tap)].view(-1, *(1 for _ in sizes))
            shifted = x
            for axis, (j, k, n) in enumerate(zip(tap, taps, sizes, strict=True), 2):
                if mode == "circular":
                    shifted = shifted.roll(j, axis)
                    continue
                source = torch.arange(n) - j + ((k - 1) // 2 if mode == "same" else 0)
                inside = ((source >= 0) & (source < n)).view(-1, *(1 for _ in range(x.ndim - axis - 1)))
                shifted = torch.where(inside, shifted.index_select(axis, source.clamp(0, n - 1)), 0.0)
            y = y + weight * shifted
        return y

    return convolve


def run(function, tensors, dtype, cotangent):
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]


def verify(fast, slow, tensors):
    """Value and gradients; the rounding of an FFT is that of the norms of what it sums."""
    cotangent = torch.randn_like(slow(*tensors)).bfloat16()
    for dtype in DTYPES:
        given = [x.to(dtype) for x in tensors]
        exact = run(slow, given, torch.float64, cotangent)
        eager = run(slow, given, dtype, cotangent)
        norms = [float(x.double().norm()) for x in (*given[:2], cotangent)]
        scale = max(a * b for a, b in itertools.combinations(norms, 2))
        for i, (a, t, e) in enumerate(zip(run(fast, given, dtype, cotangent), exact, eager, strict=True)):
            assert a.dtype == dtype
            assert_close(a, t, e, name=f"tensor {i} in {dtype}", scale=scale)


def draw(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


SEQUENCES = [
    ("causal", 13, 13),
    ("causal", 13, 4),
    ("causal", 13, 1),
    ("causal", 5, 23),
    ("causal", 1, 1),
    ("causal", 1, 3),
    ("causal", 16, 16),
    ("circular", 13, 13),
    ("circular", 12, 5),
    ("circular", 1, 1),
    ("same", 13, 5),
    ("same", 13, 4),
    ("same", 7, 13),
    ("same", 7, 12),
    ("same", 5, 31),
    ("same", 1, 3),
]
MAPS = [
    ("circular", (5, 7), (5, 7)),
    ("circular", (4, 6), (3, 2)),
    ("same", (5, 7), (9, 13)),
    ("same", (7, 4), (3, 5)),
    ("same", (3, 5), (2, 4)),
    ("same", (3, 2), (11, 9)),
    ("same", (1, 1), (3, 3)),
]


@pytest.mark.parametrize(("mode", "length", "taps"), SEQUENCES)
def test_sequence(mode, length, taps):
    def fast(x, kernel, skip):
        return long_conv(x, kernel, mode=mode, skip=skip)

    verify(fast, plain(mode), draw((2, 3, length), (3, taps), (3,)))


@pytest.mark.parametrize(("mode", "grid", "taps"), MAPS)
def test_map(mode, grid, taps):
    def fast(x, kernel, skip):
        return long_conv(x, kernel, mode=mode, skip=skip)

    verify(fast, plain(mode), draw((2, 3, *grid), (3, *taps), (3,)))


@pytest.mark.parametrize("mode", ["causal", "circular", "same"])
def test_without_skip(mode):
    verify(lambda x, kernel: long_conv(x, kernel, mode=mode), plain(mode), draw((2, 3, 11), (3, 7)))


def test_twins_are_caught():
    """A transform too short to hold the sum, a kernel run backwards, an off-by-one, a gradient cut off."""
    x, kernel = draw((2, 3, 13), (3, 13))

    def wraps(x, kernel):
        return torch.fft.irfft(torch.fft.rfft(x, 14) * torch.fft.rfft(kernel, 14), 14)[..., :13]

    twins = [
        wraps,
        lambda x, kernel: long_conv(x, kernel.flip(-1)),
        lambda x, kernel: long_conv(x, kernel, mode="same"),
        lambda x, kernel: long_conv(x.roll(1, -1), kernel),
        lambda x, kernel: long_conv(x, kernel.detach()) + 0 * kernel.sum(),
    ]
    for twin in twins:
        with pytest.raises(AssertionError, match=r"tensor \d in torch\.float64"):
            verify(twin, plain("causal"), [x, kernel])


def test_the_last_token_does_not_wrap_round_into_the_first():
    for n, k in itertools.product((2, 15, 16, 17, 31), (2, 15, 16, 17, 31)):
        x = torch.zeros(1, 1, n).double()
        x[..., -1] = 1.0
        y = long_conv(x, torch.ones(1, k).double())
        eps = torch.finfo(torch.float64).eps * k**0.5
        assert float(y[..., :-1].abs().max()) <= eps
        assert abs(float(y[..., -1]) - 1) <= eps


def test_a_changed_future_moves_the_past_by_rounding_only():
    x, kernel = draw((2, 3, 37), (3, 37))
    before = long_conv(x, kernel)
    for t in (1, 18, 36):
        changed = x.clone()
        changed[..., t:] = torch.randn_like(x[..., t:])
        size = float(max(x.norm(), changed.norm()) * kernel.norm())
        moved = (long_conv(changed, kernel)[..., :t] - before[..., :t]).abs().max()
        assert float(moved) <= torch.finfo(torch.float64).eps * size
        assert bool((long_conv(changed, kernel)[..., t] != before[..., t]).all())


def test_nan_stays_in_its_row():
    x, kernel = draw((2, 3, 11), (3, 5))
    before = long_conv(x, kernel)
    x[1, 2, 7] = math.nan
    after = long_conv(x, kernel)
    assert bool(after[1, 2].isnan().all())
    after[1, 2] = before[1, 2]
    assert torch.equal(after, before)


def test_strided_input():
    x, kernel = draw((2, 11, 3), (5, 3))
    x, kernel = x.transpose(1, 2), kernel.T
    assert not x.is_contiguous()
    assert torch.equal(long_conv(x, kernel), long_conv(x.contiguous(), kernel.contiguous()))


def test_a_full_precision_kernel_on_half_precision_tokens():
    """Parameters kept in float32 are not rounded to the dtype of the tokens."""
    x, kernel = torch.randn(1, 2, 9).bfloat16(), torch.randn(2, 9)
    y = long_conv(x, kernel)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, long_conv(x.float(), kernel).bfloat16())


def test_gradients_by_finite_differences():
    for mode, x, kernel in (("causal", (2, 1, 5), (1, 4)), ("same", (1, 2, 3, 4), (2, 3, 5))):
        inputs = [t.requires_grad_() for t in draw(x, kernel, (x[1],))]
        assert torch.autograd.gradcheck(lambda x, k, s, m=mode: long_conv(x, k, mode=m, skip=s), inputs)
        assert torch.autograd.gradgradcheck(lambda x, k, m=mode: long_conv(x, k, mode=m), inputs[:2])


def test_bad_input():
    x, kernel, image = torch.rand(2, 3, 8), torch.rand(3, 8), torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match="mode: got 'full'; choose one of causal, circular, same"):
        long_conv(x, kernel, mode="full")
    with pytest.raises(TypeError, match="x: got list; pass a floating-point tensor"):
        long_conv([1.0], kernel)
    with pytest.raises(TypeError, match=r"kernel: got torch\.int64; pass a floating-point tensor"):
        long_conv(x, kernel.long())
    with pytest.raises(ValueError, match="kernel: got device meta beside x on cpu"):
        long_conv(x, kernel.to("meta"))
    with pytest.raises(ValueError, match=r"x: got shape \(3, 8\); pass \(B, C, N\)"):
        long_conv(x[0], kernel)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 0\)"):
        long_conv(x[..., :0], kernel)
    with pytest.raises(ValueError, match=r"kernel: got shape \(2, 8\) for x \(2, 3, 8\); pass \(3, K\)"):
        long_conv(x, kernel[:2])
    with pytest.raises(ValueError, match=r"kernel: got shape \(3, 8\) for x \(2, 3, 4, 5\); pass \(3, Ky, Kx\)"):
        long_conv(image, kernel, mode="same")
    with pytest.raises(ValueError, match="mode: got 'causal' for a map, whose positions have no order"):
        long_conv(image, torch.rand(3, 2, 2))
    with pytest.raises(ValueError, match=r"kernel: got taps \(8,\) for positions \(5,\); a circular kernel"):
        long_conv(x[..., :5], kernel, mode="circular")
    with pytest.raises(ValueError, match=r"skip: got shape \(1,\); pass \(3,\)"):
        long_conv(x, kernel, skip=torch.rand(1))


def test_documentation_runs():
    assert doctest.testmod(module) == (0, 1)
