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
    GridBlocks,
    Labels,
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
        (Band(5, -3), 6, 9, None, [1, 2, 3]),
        (Band(-1, 2), 6, 9, None, [7, 8]),
        (Band(None, -3), 6, 9, None, [0, 1, 2, 3]),
        (Band(1, None), 6, 9, None, [5, 6, 7, 8]),
        (BlockBand(3, 3, -2), 7, 12, None, [0, 1, 2]),
        (BlockBand(3, None, -1), 7, 12, None, [0, 1, 2, 3, 4, 5]),
        (BlockBand(3, 0, 1), 4, 12, None, [6, 7, 8]),
        (Sinks(0), 4, 9, None, []),
        (Sinks(0) | Window(2), 4, 9, None, [3, 4]),
        (Sinks(0) & Window(2), 4, 9, None, []),
        (Labels([1, 0, 1, 2, 1]), 2, 5, None, [0, 2, 4]),
        (Labels([1, 0, 1, 2, 1], left=None), 2, 5, None, [0, 1, 2, 4]),
        (Labels([1, 0, 1, 2, 1], -1, 1), 2, 5, None, [3]),
        (Labels([1, 0, 1, -1, -1], None, None), 2, 5, None, [0, 1, 2]),
        (Labels([1, 0, 1, -1, -1], None, None), 3, 5, None, []),
        (Labels([0, 1, 1, 2]), 1, 2, 4, [3]),
        (Labels([0, 1, 2], queries=[0, 0, 1, 1, 2], left=None), 1, 3, 3, [0, 1]),
        (Labels([-1, 0, -1, 0], queries=[0] * 4), 2, 4, None, [1, 3]),
        (GridBlocks((9,), 4, offset=3), 1, 9, None, [0, 1, 2]),
        (GridBlocks((9,), 4, offset=3), 8, 9, None, [7, 8]),
        (GridBlocks((9,), 2, left=1, right=1), 5, 9, None, [3, 4, 5, 6]),
        (GridBlocks((9,), 2, left=1, right=1), 0, 9, None, [0, 1, 2]),
        (GridBlocks((9,), 1, left=3, right=-2), 5, 9, None, [2, 3]),
        (GridBlocks((9,), 3, dilation=3), 4, 9, None, [1, 4, 7]),
        (GridBlocks((3, 4), (1, 4)), 5, 12, None, [4, 5, 6, 7]),
        (GridBlocks((4, 4), 2, dilation=2), 5, 16, None, [5, 7, 13, 15]),
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
        (lambda: Band(-3, 2), ValueError, r"right: got 2 for left -3, which no key meets; pass at least 3"),
        (lambda: Band(2.0, 2), TypeError, r"left: got 2.0 \(float\); pass an integer, or None"),  # type: ignore[arg-type]
        (lambda: BlockBand(4, 3, -3), ValueError, r"right: got -3 for left 3, .* pass at least -2"),
        (lambda: Sinks(-1), ValueError, r"n: got -1; pass an integer >= 0"),
        (lambda: Labels([0, -2]), ValueError, r"labels: got -2; pass integers >= -1, where -1 is no label"),
        (lambda: Labels([0.5]), ValueError, r"labels: got torch.float32 of shape \(1,\)"),  # type: ignore[list-item]
        (lambda: Labels([]), ValueError, r"labels: .* pass one integer a token"),
        (lambda: Labels([0, 1], 1, -2), ValueError, r"right: got -2 for left 1"),
        (lambda: Labels([0, 1]).dense(3), ValueError, r"labels: got 2 of them for 3 keys; pass one a key"),
        (lambda: Labels([0, 1], queries=[1]).plan(2), ValueError, r"queries: got 1 labels for more queries"),
        (lambda: GridBlocks((4, 4), 2, offset=2), ValueError, r"offset: got 2 for size 2; pass 0 <= offset < size"),
        (lambda: GridBlocks((4, 4), 2, left=-1, right=-1), ValueError, r"right: got -1 for size 2 and left -1"),
        (lambda: GridBlocks((4, 4), (2, 2, 2)), ValueError, r"size: got \(2, 2, 2\) for a grid of 2 axes"),
        (lambda: GridBlocks((4, 4), 2, left=0.5), TypeError, r"left: got 0.5 \(float\)"),  # type: ignore[arg-type]
        (lambda: GridBlocks((4, 4), 2).dense(15), ValueError, r"grid: \(4, 4\) has 16 tokens, but there are 15 keys"),
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


def rolled(grid, size, shift):
    """Shifted windows by rolling, as Swin makes them: equal windows after the roll, and equal parts before it."""
    part = torch.zeros(grid, dtype=torch.int64)
    for axis, length in enumerate(grid):
        at = torch.arange(length)
        cut = (at >= shift).long()  # what wraps round is a part of its own
        window = ((at - shift) % length) // size
        shape = [-1 if a == axis else 1 for a in range(len(grid))]
        part = (part * (length + 1) + window.view(shape)) * 2 + cut.view(shape)
    return part.flatten()[:, None] == part.flatten()


@pytest.mark.parametrize(("grid", "size"), [((8, 12), 4), ((6, 9), 3), ((4, 4, 8), 4)])
def test_blocks_with_an_offset_are_shifted_windows(grid, size):
    n = torch.Size(grid).numel()
    assert GridBlocks(grid, size, offset=size // 2).dense(n)[0].equal(rolled(grid, size, size // 2))


def test_blocks_on_a_grid_are_what_the_papers_call_otherwise():
    assert GridBlocks((30,), 7).dense(30).equal(Blocks(7).dense(30))
    assert GridBlocks((30,), 1, left=4, right=2).dense(30).equal(Band(4, 2).dense(30))
    assert GridBlocks((30,), 5, left=10).dense(30).equal(BlockBand(5, 3).dense(30))
    assert GridBlocks((30,), 5, dilation=6).dense(30).equal(Strided(6).dense(30))
    every = GridBlocks((6, 6), 3, offset=0).dense(36) | GridBlocks((6, 6), 2, dilation=3).dense(36)
    assert (every.double() @ every.double() > 0).all()  # two layers of both reach everything, and neither alone
    assert GridBlocks((6, 8), 2).dense(48).equal(Neighborhood((6, 8), 2, stride=2).dense(48))


def test_bands_with_a_gap_tile_the_past():
    """The window, and the rings beyond it, hold every earlier key once."""
    rings = [Window(4), Band(7, -4), Band(15, -8), Band(None, -16)]
    counts = sum(ring.dense(40)[0].long() for ring in rings)
    assert counts.equal(Causal().dense(40)[0].long())
    blocks = [BlockBand(4, 1), *(BlockBand(4, g + 1, -g) for g in range(1, 10))]
    assert sum(block.dense(40)[0].long() for block in blocks).equal((BlockBand(4, None).dense(40)[0]).long())


def test_labels_are_documents_and_hierarchies():
    documents = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    assert Labels(documents).dense(8).equal(Documents([0, 2, 5, 6, 8]).dense(8))
    assert Labels(documents, None).dense(8).equal((Labels(documents) | Causal()).dense(8))
    again = Labels(documents.tolist())
    assert again == Labels(documents)
    assert hash(again) == hash(Labels(documents))
    assert again != Labels(documents, right=1)
    assert repr(again) == "Labels(<8>, 0, 0)"
    anchors, words = torch.tensor([0, -1, -1, 1, -1]), torch.tensor([0, 0, 0, 1, 1])
    seen = (Labels(words) | Labels(anchors, None, None)).dense(5)[0]
    assert seen.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_what_only_some_queries_see():
    """Keys that are seen by all, and queries that see all: global tokens."""
    chosen = torch.tensor([0, -1, -1, 0, -1])
    everyone = torch.zeros(5, dtype=torch.int64)
    seen = (Labels(chosen, queries=everyone) | Labels(everyone, queries=chosen)).dense(5)[0]
    is_global = chosen == 0
    assert seen.equal(is_global[:, None] | is_global)
