"""What `auto` takes: the cheapest by a measured table, of those that can, else the first; and what it says of that."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.softmax import backends, explain, measure, measuring, rates, which, why
from saccade.softmax.problem import Problem, reach
from saccade.softmax.rates import Row, Table, Work
from saccade.where import (
    Band,
    Blocks,
    Causal,
    Documents,
    Full,
    Neighborhood,
    PerHead,
    Prefix,
    Sinks,
    Window,
    plan_chosen,
)

B, H, N, D = 2, 4, 256, 16


def problem(where=None, n=N, m=N, **options):
    q, k, v = (torch.randn(B, H, size, D) for size in (n, m, m))
    return Problem.of(q, k, v, where, **options)


def row(backend, rate, *, host=1e-9, gradients=False, dtype="float32", head_dim=D, tables=0.0, **kinds):
    own = dict.fromkeys(("full", "causal", "window", "tiles", "cut", "cut more"), rate) | kinds
    return Row(backend, dtype, head_dim, gradients, host, tables, own)


@pytest.fixture
def with_table(monkeypatch):
    """Pretends that the CPU has a table, and the backends of ORDER without their reasons of device."""

    def put(*rows, order=("sdpa", "tiles", "reference")):
        table = Table(tuple(rows), "in a test")
        monkeypatch.setattr(backends, "table_for", lambda device: table)
        monkeypatch.setattr(backends, "HOST", order)
        return table

    return put


def test_the_fastest_of_those_that_can(with_table):
    with_table(row("sdpa", 1e12), row("tiles", 3e12), row("reference", 2e12))
    assert which(*given_qkv()) == "tiles"
    with_table(row("sdpa", 4e12), row("tiles", 3e12), row("reference", 2e12))
    assert which(*given_qkv()) == "sdpa"


def given_qkv(**options):
    return tuple(torch.randn(B, H, N, D, **options) for _ in range(3))


def test_a_table_never_prefers_what_cannot_run(with_table):
    with_table(row("sdpa", 1e15), row("tiles", 1e9))
    assert which(*given_qkv(), Causal() & Window(3)) == "tiles"
    assert which(*given_qkv(), softcap=2.0) == "tiles"
    assert which(*given_qkv()) == "sdpa"


def test_preferring_what_cannot_run_is_caught(with_table, monkeypatch):
    """The broken twin: a choice that looks at the figures alone."""
    monkeypatch.setattr(backends, "reasons", lambda name, problem: [])
    with pytest.raises(AssertionError):
        test_a_table_never_prefers_what_cannot_run(with_table)


def test_without_a_row_the_order_decides(with_table):
    with_table(row("sdpa", 1e12, gradients=True), row("tiles", 9e12, dtype="bfloat16"))
    assert which(*given_qkv()) == "sdpa"
    assert "none was measured" in why(*given_qkv())
    with_table(row("tiles", 1e6))  # measured, beside an sdpa that is not
    assert which(*given_qkv()) == "tiles"


def test_gradients_have_rows_of_their_own(with_table):
    with_table(
        row("sdpa", 2e12),
        row("tiles", 1e12),
        row("sdpa", 1e12, gradients=True),
        row("tiles", 2e12, gradients=True),
    )
    assert which(*given_qkv()) == "sdpa"
    assert which(*given_qkv(requires_grad=True)) == "tiles"
    with torch.no_grad():
        assert which(*given_qkv(requires_grad=True)) == "sdpa"


def test_the_host_decides_what_is_small(with_table):
    with_table(row("sdpa", 1e12, host=1e-3), row("tiles", 1e10, host=1e-5))
    assert which(*(torch.randn(1, 1, 64, D) for _ in range(3))) == "tiles"
    assert which(*(torch.randn(1, 64, 1024, D) for _ in range(3))) == "sdpa"


def test_the_nearest_head_dim_decides(with_table):
    with_table(
        row("sdpa", 2e12, head_dim=64),
        row("tiles", 1e12, head_dim=64),
        row("sdpa", 1e12, head_dim=8),
        row("tiles", 2e12, head_dim=8),
    )
    for head_dim, expected in ((8, "tiles"), (16, "tiles"), (32, "sdpa"), (256, "sdpa")):
        assert which(*(torch.randn(1, 1, 64, head_dim) for _ in range(3))) == expected


def test_half_precisions_share_a_row():
    table = Table((row("sdpa", 1e12, dtype="bfloat16"),), "in a test")
    for dtype, found in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False), (torch.float64, False)):
        x = torch.randn(1, 1, 8, D, dtype=dtype)
        assert (table.row("sdpa", Problem.of(x, x, x)) is not None) == found


def test_a_fresh_plan_costs_its_tables(with_table):
    table = with_table(row("tiles", 1e15, host=1e-6, tables=1e-3))
    plan = Window(9).plan(N, N, H, (64, 64))
    given = problem(plan)
    assert table.estimate(backends.backend("tiles"), given) == pytest.approx(1e-3 + 1e-6)
    plan.derived["tables"] = "made"
    assert table.estimate(backends.backend("tiles"), given) == pytest.approx(1e-6)


@dataclass
class Fake:
    name: str = "fake"
    BLOCK: tuple[int, int] = (64, 32)
    built_in: tuple[str, ...] = ()


@settings(max_examples=60)
@given(
    st.sampled_from(["full", "causal", "band"]),
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(0, 400),
    st.integers(0, 400),
)
def test_pairs_of_a_band_need_no_plan(kind, n, more, left, right):
    where = {"full": Full(), "causal": Causal(), "band": Band(left, right)}[kind]
    m = n + more
    name = {"band": "window"}.get(kind, kind)
    found = Work.of(problem(where, n, m), Fake(BLOCK=(1, 1), built_in=(name,)))
    assert found.pairs == {name: pytest.approx(int(where.dense(n, m).sum())), "rows": n * rates.ROWS}


@pytest.mark.parametrize("where", [Causal(), Causal() & Window(300), Band(200, 150)], ids=repr)
def test_tiles_of_a_band_are_about_those_of_its_plan(where):
    n = 4096
    found = Work.of(problem(where, n, n), Fake())
    plan = where.plan(n, n, H, Fake.BLOCK)
    full, cut = rates._pairs(plan)
    edge = n * (64 + 32)  # the tiles that the ends of a band meet depend on where they lie
    assert abs(found.pairs["tiles"] - full) <= edge
    assert abs(found.pairs["cut"] - cut) <= edge


def test_cells_of_a_grid_are_a_kind_of_their_own_where_a_backend_has_code_for_them():
    where = Neighborhood((16, 16), 5)
    plain = Work.of(problem(where, 256, 256), Fake())
    assert set(plain.pairs) == {"rows", "tiles", "cut"}
    assert plain.comparisons == 2
    fake = Fake()
    fake.planned = lambda given: given.plan((16, 16))
    found = Work.of(problem(where, 256, 256), fake)
    full, cut = rates._pairs(where.plan(256, 256, H, (16, 16)))
    assert found == Work({"rows": 256.0 * rates.ROWS, "tiles": full, "cells": cut}, 1)


def test_pairs_of_other_patterns_are_those_of_their_plan():
    where = PerHead([Causal() & (Window(40) | Sinks(3)), Blocks(70), Documents([0, 100, N]), Full()])
    found = Work.of(problem(where), Fake())
    plan = where.plan(N, N, H, Fake.BLOCK)
    counts = torch.tensor([0, 0])
    for head in range(H):
        group = int(plan.group_of[0, head])
        of_group = plan.rows() // plan.num_row_tiles == group
        counts += torch.tensor([int((plan.is_full() & of_group).sum()), int((~plan.is_full() & of_group).sum())])
    full, cut = (counts * 64 * 32 / H).tolist()
    rows = N * float(rates.ROWS)
    assert found == Work({"rows": rows, "tiles": full, "cut": cut}, plan.boxes.lo.shape[1] * plan.boxes.coord.shape[0])


def test_pairs_of_a_plan_are_its_tiles_and_single_keys():
    chosen = torch.tensor([[[0, 1], [2, -1]], [[1, -1], [0, 3]]])
    plan = plan_chosen(Full(), chosen, torch.tensor([[0, 1, 0, 1]]), 128, 128, (64, 32))
    assert Work.of(problem(plan, 128, 128), Fake()).pairs == {"rows": 128 * rates.ROWS, "tiles": 3 * 64 * 32}
    plan = plan.with_tokens(torch.tensor([[[3], [4]], [[-1], [5]]]))
    assert Work.of(problem(plan, 128, 128), Fake()).pairs["tiles"] == 3 * 64 * 32 + 3 * 64 / 2


def test_more_comparisons_cost_more():
    one = row("fake", 1e12, cut=1e12, **{"cut more": 5e11})
    work = [Work({"tiles": 0.0, "cut": 1e6}, comparisons) for comparisons in (1, 2, 4)]
    assert [one.seconds(w) for w in work] == pytest.approx([1e-6, 2e-6, 4e-6])
    assert replace(one, rates={"tiles": 1e12}).seconds(work[0]) is None


def test_rows_cost_where_they_were_measured():
    work = Work({"rows": 1e6, "full": 1e6})
    assert row("sdpa", 1e12).seconds(work) == pytest.approx(1e-6)
    assert row("sdpa", 1e12, rows=5e11).seconds(work) == pytest.approx(3e-6)


def test_measuring_inverts_the_estimate():
    """Rates that are worked out from the times of the probes give these times."""
    truth = {"cut": 3e12, "cut more": 2e12, "rows": 1e12, "tiles": 5e12, "full": 6e12}
    probes = {
        "cut": Work({"rows": 0.0, "tiles": 0.0, "cut": 7e6}, 1),
        "cut more": Work({"cut": 7e6}, 2),
        "rows": Work({"rows": 1e6, "cut": 3e6}, 1),
        "tiles": Work({"rows": 1e6, "tiles": 9e6}),
        "full": Work({"rows": 1e6, "full": 9e6}),
    }
    whole, found = replace(row("fake", 1.0), rates=truth), replace(row("fake", 1.0), rates={})
    for kind, work in probes.items():
        rate = measuring._rate(found, kind, work, whole.seconds(work))
        found = replace(found, rates={**found.rates, kind: rate})
    assert found.rates == pytest.approx(truth)


REACHES = [
    (Full(), (math.inf, math.inf)),
    (Causal(), (math.inf, 0)),
    (Window(5), (4, 0)),
    (Band(3, 7), (3, 7)),
    (Causal() & Window(5), (4, 0)),
    (Causal() & Band(3, 7) & Full(), (3, 0)),
    (Band(3, 7) & Band(5, 2), (3, 2)),
    (Band(None, 2), (math.inf, 2)),
    (Band(7, -4), None),
    (Causal() | Window(5), None),
    (Causal() & Sinks(2), None),
    (Prefix(4), None),
    (Blocks(4), None),
    (PerHead([Causal(), Full()]), None),
]


@pytest.mark.parametrize(("where", "expected"), REACHES, ids=repr)
def test_reach(where, expected):
    assert reach(where) == expected
    if expected is not None:
        i, j = torch.arange(9)[:, None] + 3, torch.arange(12)[None]
        band = (j >= i - expected[0]) & (j <= i + expected[1])
        assert where.dense(9, 12)[0].equal(band)


def test_a_plan_has_no_reach():
    assert reach(Causal().plan(9, 9, 1, (4, 4))) is None


def test_why_gives_the_figures(with_table):
    with_table(row("sdpa", 1e12), row("tiles", 2e12), row("reference", 5e11))
    said = why(*given_qkv(), Causal() & Window(17)).splitlines()
    assert said[0].startswith("tiles ")
    assert "ms, the lowest estimate; reference " in said[0]
    assert said[1].startswith("attention to Causal(): tiles ")
    assert said[2].startswith("not sdpa: where is And(")
    assert said[-1] == "rates: in a test"
    said = why(*given_qkv()).splitlines()
    assert [line.split()[0] for line in said] == ["tiles", "rates:"]


def test_why_without_a_table():
    said = why(*given_qkv(), Neighborhood((16, 16), 3)).splitlines()
    assert said[0] == "tiles, the first of the order that can; no rates were measured for a cpu"
    assert said[1].startswith("not sdpa: where is Neighborhood(")
    assert len(said) == 2


def test_a_cpu_never_takes_a_kernel_for_gpus():
    assert which(*given_qkv(), softcap=1.0) == "tiles"
    assert set(explain(*given_qkv())) == set(backends.ORDER)


def test_tables_are_kept_for_a_compute_capability(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "MEASURED", tmp_path / "package")
    rates.table_of.cache_clear()
    assert rates.table_of(9, 0) is None
    brought, own = Table((row("sdpa", 1.0),), "the package's"), Table((row("sdpa", 2.0),), "the user's")
    brought.save(tmp_path / "package" / "sm_90.json")
    assert rates.table_of(9, 0) is None, "read once"
    rates.table_of.cache_clear()
    assert rates.table_of(9, 0) == brought
    own.save(rates.user_path(9, 0))
    assert rates.user_path(9, 0) == tmp_path / "cache" / "saccade" / "sm_90.json"
    rates.table_of.cache_clear()
    assert rates.table_of(9, 0) == own
    assert rates.table_of(8, 0) is None
    rates.table_of.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": "", "rows": [{"backend": "sdpa"}]}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sm_90\.json: is no table of measured rates .* delete it, or run saccade"):
        Table.load(path)


def test_the_tables_that_the_package_brings():
    found = sorted(rates.MEASURED.glob("sm_*.json"))
    assert found
    for path in found:
        table = Table.load(path)
        assert {one.backend for one in table.rows} <= set(backends.ORDER)
        assert all(rate > 0 for one in table.rows for rate in one.rates.values())
        assert len({(one.backend, one.dtype, one.head_dim, one.gradients) for one in table.rows}) == len(table.rows)
        assert "about" in json.loads(path.read_text())


def test_measuring_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="measure: there is no CUDA device here"):
        measure()
    with pytest.raises(ValueError, match="backends: got 'cudnn'; choose one of sdpa, fa4"):
        measure(backends=["cudnn"])
