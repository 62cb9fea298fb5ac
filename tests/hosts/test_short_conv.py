"""The short convolution against its sum, tap by tap in float64: values, gradients, and any pieces."""

import itertools

import pytest
import torch

from saccade.hosts.short_conv import short_conv, short_taps
from saccade.testing.budget import assert_close, compare

SIZES = [1, 2, 4]


def by_definition(x, taps):
    rows, width = [], taps.shape[2]
    for t in range(x.shape[1]):
        row = torch.zeros_like(x[:, t])
        for j in range(width):
            if t - width + 1 + j >= 0:
                row = row + taps[:, 0, j] * x[:, t - width + 1 + j]
        rows.append(row)
    return torch.stack(rows, 1)


def made(size, dtype=torch.float64):
    random = torch.Generator().manual_seed(size)
    x = torch.randn(2, 11, 3, generator=random, dtype=torch.float64)
    return x.to(dtype), torch.randn(3, 1, size, generator=random, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_its_sum_and_so_are_its_gradients(size):
    x, taps = (t.requires_grad_() for t in made(size))
    found, truth = short_conv(x, taps)[0], by_definition(x, taps)
    assert_close(found.detach(), truth.detach(), truth.detach(), terms=size)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    slopes = (torch.autograd.grad((y * weight).sum(), (x, taps)) for y in (found, truth))
    for one, other in zip(*slopes, strict=True):
        assert_close(one, other, other, terms=x.shape[0] * x.shape[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stops", [[*range(12)], [0, 1, 2, 7, 11], [0, 10, 11]])
def test_pieces_are_the_whole(size, stops):
    x, taps = made(size)
    rows, before = [], None
    for start, stop in itertools.pairwise(stops):
        row, before = short_conv(x[:, start:stop], taps, before)
        rows.append(row)
        assert before.shape == (2, size - 1, 3)
    truth = by_definition(x, taps)
    assert_close(torch.cat(rows, 1), truth, truth, terms=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    x, taps = made(4, dtype)
    found = short_conv(x, taps)[0]
    assert found.dtype == dtype
    assert_close(found, by_definition(x.double(), taps.double()), by_definition(x, taps), terms=4)


def test_faults_are_noticed():
    x, taps = made(4)
    truth = by_definition(x, taps)
    ahead = short_conv(x.roll(-1, 1), taps)[0]
    for wrong in (short_conv(x, taps.flip(-1))[0], ahead):
        assert not compare(wrong, truth, truth, terms=4).ok


def test_what_is_kept_holds_no_more_than_the_last_tokens():
    x, taps = made(4)
    before = short_conv(x, taps)[1]
    assert before.untyped_storage().nbytes() == before.numel() * before.element_size()


def test_taps_begin_as_those_of_a_convolution():
    taps = short_taps(64, 4)
    assert taps.shape == (64, 1, 4)
    assert taps.requires_grad
    assert 0.45 < float(taps.detach().abs().max()) <= 0.5
    with pytest.raises(ValueError, match="taps: got 0; pass an integer >= 1"):
        short_taps(8, 0)
