"""The named patterns against the sentences that define them, and their errors."""

from __future__ import annotations

import pytest
import torch

from saccade.where import (
    Band,
    BlockBand,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Documents,
    Full,
    Neighborhood,
    Packed,
    PerHead,
    Prefix,
    Sinks,
    Strided,
    Summaries,
    Window,
)


def keys_of(pattern, i, n, m=None):
    """The keys that query row i of n sees."""
    return pattern.dense(n, m)[0, i].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("pattern", "row", "n", "m", "keys"),
    [
        (Full(), 1, 3, None, [0, 1, 2]),
        (Causal(), 1, 3, None, [0, 1]),
        (Causal(), 0, 2, 5, [0, 1, 2, 3]),
        (Window(4), 6, 9, None, [3, 4, 5, 6]),
        (Window(4), 0, 1, 9, [5, 6, 7, 8]),
        (Band(2, 1), 4, 9, None, [2, 3, 4, 5]),
        (Sinks(2) | Window(2), 6, 9, None, [0, 1, 5, 6]),
        (Prefix(3) | Causal(), 0, 5, None, [0, 1, 2]),
        (Blocks(3), 4, 8, None, [3, 4, 5]),
        (Blocks(3), 7, 8, None, [6, 7]),
        (Documents([0, 2, 5]), 3, 5, None, [2, 3, 4]),
        (Dilated(3, 4), 9, 12, None, [1, 5, 9]),
        (Strided(4), 5, 12, None, [1, 5, 9]),
        (Columns(2, 3, 1), 0, 13, None, [2, 3, 8, 9]),
        (BlockBand(3, 2), 7, 12, None, [3, 4, 5, 6, 7, 8]),
        (BlockBand(3, 1, 1), 4, 12, None, [3, 4, 5, 6, 7, 8]),
        (Packed(Sinks(1) | Window(1), Documents([0, 2, 6])), 4, 6, None, [2, 4]),
        (Summaries(11, 4, 2), 7, 11, 4, [0, 1, 2]),
        (Summaries(11, 4, 2), 0, 3, 4, [0, 1, 2]),
        (Summaries(11, 4, 2), 2, 11, 4, []),
        (Full(), 4, 5, 2, [0, 1]),
        (Neighborhood((9,), 3), 4, 9, None, [3, 4, 5]),
        (Neighborhood((9,), 3), 0, 9, None, [0, 1, 2]),
        (Neighborhood((9,), 3), 8, 9, None, [6, 7, 8]),
        (Neighborhood((9,), 4), 4, 9, None, [2, 3, 4, 5]),
        (Neighborhood((9,), 3, dilation=2), 4, 9, None, [2, 4, 6]),
        (Neighborhood((9,), 3, dilation=2), 1, 9, None, [1, 3, 5]),
        (Neighborhood((9,), 3, causal=True), 1, 9, None, [0, 1]),
        (Neighborhood((12,), 5, stride=3), 6, 12, None, [5, 6, 7, 8, 9]),
        (Neighborhood((12,), 5, stride=3), 8, 12, None, [5, 6, 7, 8, 9]),
        (Neighborhood((12,), 4, stride=4), 5, 12, None, [4, 5, 6, 7]),
        (Neighborhood((3, 4), (3, 2)), 5, 12, None, [0, 1, 4, 5, 8, 9]),
    ],
)
def test_keys(pattern, row, n, m, keys):
    assert keys_of(pattern, row, n, m) == keys


def test_stride_at_the_kernel_is_blocked_attention():
    assert Neighborhood((12,), 4, stride=4).dense(12).equal(Blocks(4).dense(12))


def test_stride_one_is_the_sliding_window():
    inside = Neighborhood((20,), 5).dense(20)[0, 2:-2]
    assert inside.equal(Band(2, 2).dense(20)[0, 2:-2])


def test_every_neighbourhood_is_as_large_as_its_kernel():
    dense = Neighborhood((7, 9), (4, 3), stride=(2, 1), dilation=(1, 3)).dense(63)
    assert (dense.sum(-1) == 12).all()


def test_the_algebra_is_that_of_sets():
    a, b, c = Window(5), Sinks(2), Causal()
    assert ((a | b) & c).dense(17).equal((a.dense(17) | b.dense(17)) & c.dense(17))
    assert hash((a | b) & c) == hash((Window(5) | Sinks(2)) & Causal())
    assert (a | a) is a
    assert PerHead([a | b, c]).dense(9, heads=2)[1].equal(c.dense(9)[0])


def test_combinations_spread_over_heads():
    pattern = PerHead([Window(2), Strided(2)]) & Causal()
    assert pattern.dense(8, heads=2)[1].equal((Strided(2) & Causal()).dense(8)[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Window(0), ValueError, r"size: got 0; pass an integer >= 1"),
        (lambda: Window(2.5), TypeError, r"size: got 2.5 \(float\)"),  # type: ignore[arg-type]
        (lambda: Window(True), TypeError, r"size: got True \(bool\)"),
        (lambda: Band(-1, 2), ValueError, r"left: got -1"),
        (lambda: Dilated(3, 0), ValueError, r"dilation: got 0"),
        (lambda: Columns(4, 3, 3), ValueError, r"offset: got 3 for stride 3"),
        (lambda: Documents([0]), ValueError, r"cu_seqlens"),
        (lambda: Documents([0, 3, 3]), ValueError, r"cu_seqlens: .* increase strictly"),
        (lambda: Documents([1, 3]), ValueError, r"cu_seqlens: .* from 0"),
        (lambda: Documents([0, 5]).dense(4), ValueError, r"cu_seqlens: ends at 5, but there are 4 keys"),
        (lambda: Neighborhood((4, 4), 5), ValueError, r"kernel: got 5 with dilation 1 on an axis of 4"),
        (lambda: Neighborhood((8, 8), 3, dilation=3), ValueError, r"kernel: .* pass at most 2"),
        (lambda: Neighborhood((8, 8), 3, stride=4), ValueError, r"stride: got 4 with kernel 3"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), ValueError, r"kernel: got \(3, 3, 3\) for a grid of 2 axes"),
        (lambda: Neighborhood((2, 2, 2, 2), 1), ValueError, r"grid: .* one to three lengths"),
        (lambda: Neighborhood((4, 4), 3, causal=1), ValueError, r"causal: got 1"),  # type: ignore[arg-type]
        (lambda: Neighborhood((4, 4), 3).dense(15), ValueError, r"grid: \(4, 4\) has 16 tokens, but there are 15 keys"),
        (lambda: PerHead([]), TypeError, r"patterns: got \(\)"),
        (lambda: PerHead([Causal()]).dense(4, heads=2), ValueError, r"heads: got 2 for a PerHead of 1 patterns"),
        (lambda: Causal() & 3, TypeError, r"&: got 3 \(int\)"),  # type: ignore[operator]
        (lambda: Causal().dense(0), ValueError, r"n: got 0"),
        (lambda: Causal().dense(4, 3), ValueError, r"m: got 3 keys for n = 4 queries"),
        (lambda: Causal().plan(4, block=3), TypeError, r"block: got 3"),  # type: ignore[arg-type]
        (lambda: Causal().plan(4, block=(0, 4)), ValueError, r"block: got 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_definitions_and_boxes_share_no_answer_when_one_is_off_by_one():
    """The twin of every value test here: a window one key too wide is told apart."""
    assert not Window(5).dense(17).equal(Window(6).dense(17))
    assert not torch.equal(Window(5).plan(17, block=(4, 4)).dense(), Window(6).dense(17))
