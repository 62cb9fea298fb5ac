"""On a GPU plans are those of the CPU, to the bit, and the host never waits for them."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

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
    Router,
    Sinks,
    Strided,
    Summaries,
    TopK,
    Window,
    plan_chosen,
    pooled_scores,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

N = 20011
CUTS = Documents([0, 1, 900, 901, 7000, 15000, N])
GRID = Neighborhood((13, 37, 41), (3, 7, 8))
PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & (Window(1000) | Sinks(5)),
    "band": Band(70, 900),
    "prefix": Prefix(333) | Causal(),
    "blocks": Blocks(300),
    "block band": BlockBand(300, 3, 1),
    "documents": CUTS,
    "packed": Packed(Causal() & (Window(100) | Sinks(1)), CUTS),
    "dilated": Dilated(50, 7),
    "strided": Strided(11),
    "strided, causal": Strided(11) & Causal(),
    "residues in their own order": Strided(50) | Window(50),
    "columns": Columns(64, 5, 2) & Causal(),
    "heads": PerHead([Causal(), Window(64), Window(500) & Strided(2), Causal()]),
    "nothing": Window(3) & Columns(1, 7, 2),
    "1-D": Neighborhood((N,), 255, 16),
    "2-D": Neighborhood((128, 192), 33),
    "2-D, stride, dilation, causal": Neighborhood((128, 192), (9, 16), (4, 3), (2, 3), (True, False)),
    "3-D, ragged": GRID,
    "3-D and more": GRID & Neighborhood(GRID.grid, (13, 3, 5)),
    "3-D or more": GRID | Sinks(40),
    "summaries": Summaries(N, 32, 16) | Prefix(1),
    "gaps": Band(900, -70) | BlockBand(300, 9, -8) | BlockBand(300, None, -40),
    "stripes": Columns(8, 16, 3) & BlockBand(128, None, -1),
    "nothing, and something": PerHead([Sinks(0), Window(64), Sinks(0) | Strided(8), Causal()]),
    "labels": Labels(torch.arange(N) // 700, left=2),
    "labels, sorted": Labels(torch.arange(N) * 7 % 64, left=None),
    "3-D windows": GridBlocks(GRID.grid, (2, 7, 7), offset=(1, 3, 0)),
    "3-D, at a stride": GridBlocks(GRID.grid, (7, 7, 7), dilation=(2, 6, 6)),
    "3-D halos": GridBlocks(GRID.grid, (1, 8, 8), 3, (0, 3, 3), (0, 4, 4)),
}


@contextmanager
def waiting_forbidden():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def same(found, expected):
    found = found.to("cpu")
    assert (found.causal, found.transposed) == (expected.causal, expected.transposed)
    assert found.tensors().keys() == expected.tensors().keys()
    for name, table in expected.tensors().items():
        assert found.tensors()[name].equal(table), name


@pytest.mark.parametrize("block", [(128, 64), (60, 100)], ids=str)
@pytest.mark.parametrize("last", ["all queries", "the last queries"])
@pytest.mark.parametrize("name", PATTERNS)
def test_static_plans(name, last, block):
    pattern = PATTERNS[name]
    m = math.prod(pattern.grid) if isinstance(pattern, Neighborhood) else N
    m = math.prod(GRID.grid) if name.startswith("3-D") else m
    n = m if last == "all queries" else m // 3
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else 1
    expected = pattern.plan(n, m, heads, block=block)
    with waiting_forbidden():
        plan = pattern.plan(n, m, heads, block=block, device="cuda")
        turned = plan.transpose()
        other = replace(plan).transpose()  # from the lists alone
    same(plan, expected)
    same(turned, expected.transpose())
    same(other, expected.transpose())


def test_more_chunks_of_tiles_than_are_looked_at_together():
    n, m = 3000, 1_200_077
    pattern = Causal() & (Window(90_000) | Sinks(200) | Strided(50_000))
    expected = pattern.plan(n, m, block=(100, 64))
    with waiting_forbidden():
        plan = pattern.plan(n, m, block=(100, 64), device="cuda")
        turned = plan.transpose()
    same(plan, expected)
    same(turned, expected.transpose())


def test_waiting_is_noticed():
    plan = Window(9).plan(1000, device="cuda")
    with waiting_forbidden(), pytest.raises(RuntimeError, match="synchroniz"):
        plan.num_tiles  # noqa: B018


@pytest.mark.parametrize("marked", [True, False])
def test_chosen_plans(marked):
    groups, n, m, block = 6, 3000, 5001, (64, 32)
    rows, cols = -(-n // block[0]), -(-m // block[1])
    chosen = torch.randint(-1, cols, (groups, rows, 9))
    if marked:
        chosen = torch.rand(groups, rows, cols) < 0.2
    group_of = torch.arange(groups).view(2, 3)
    expected = plan_chosen(Causal(), chosen, group_of, n, m, block)
    chosen, group_of = chosen.cuda(), group_of.cuda()
    with waiting_forbidden():
        plan = plan_chosen(Causal(), chosen, group_of, n, m, block)
        turned = plan.transpose()
    same(plan, expected)
    same(turned, expected.transpose())


def test_routers():
    router = Router(pooled_scores, TopK(5), block=(64, 64), pattern=Causal(), must=Blocks(64) | Sinks(1))
    q, k = (torch.randn(2, heads, 4000, 16, device="cuda") for heads in (4, 2))
    with waiting_forbidden():
        plan = router.route(q, k)
        turned = plan.transpose()
    assert len(plan.indices) == 8 * 63 * 5
    own = plan.to("cpu").verify()
    same(turned, own.transpose())
    assert own.num_tiles == 8 * sum(min(row + 1, 5) for row in range(63))
