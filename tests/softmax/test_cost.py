"""Forecasts follow from the lists by arithmetic that can be done by hand; the rates that are brought fit the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saccade.softmax import cost as model
from saccade.softmax.cost import Chip, Rates, cost, deal, forecast
from saccade.where import Causal, Full, Neighborhood, PerHead, Plan, Sinks, Window, plan_chosen

ROOT = Path(__file__).parents[2]
RATES = {"launch": 7.0, "row": 1.0, "full": 10.0, "partial": 20.0, "axis": 3.0, "latency": 1.0}
KINDS = (
    "dense",
    "plain tiles of 128 x 128",
    "ordered tiles of 64 x 64",
    "plain tiles of 64 x 64",
    "keys for tiles of 64",
)
KINDS += ("cells of 64 for tiles of 64",)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """A GPU of two multiprocessors whose rates are small integers, twice as high for 128 channels as for 64."""
    twice = {name: rate if name in ("launch", "latency") else 2 * rate for name, rate in RATES.items()}
    by_dim = {"64": dict.fromkeys(KINDS, RATES), "128": dict.fromkeys(KINDS, twice)}
    table = {"device": "a toy", "multiprocessors": 2, "rates by head dim": by_dim}
    (tmp_path / "cost_sm_00.json").write_text(json.dumps(table))
    monkeypatch.setattr(model, "MEASURED", tmp_path)


def test_by_hand():
    """Four query tiles of a causal window: what each lists, over two multiprocessors, last first."""
    plan = (Causal() & Window(128)).plan(512, block=(128, 128))
    assert plan.num_full.tolist() == [0, 0, 0, 0]
    assert plan.indptr.diff().tolist() == [1, 2, 2, 2]
    found = cost(plan, head_dim=64, capability="sm_00")
    one, two = 1 + 23, 1 + 2 * 23
    assert found.seconds == 7 + max(two + two, two + one)
    assert found.computed == 7 * 128 * 128
    assert found.attended == 512 * 128 - 128 * 127 / 2
    assert found.admissible == 512 * 513 // 2
    dense = [1 + 20, 1 + 10 + 20, 1 + 20 + 20, 1 + 30 + 20]  # the last tile of each row is cut by the diagonal
    assert found.dense_seconds == 7 + max(dense[3] + dense[0], dense[2] + dense[1])
    assert found.speedup == found.dense_seconds / found.seconds
    assert found.bound == found.admissible / found.attended
    assert found.efficiency == found.attended / found.computed


def test_a_list_of_single_keys_by_hand():
    plan = Neighborhood((16, 16), 9).gathered(256, by="keys")
    assert plan.token_indptr.diff().tolist() == [144, 144, 144, 144]
    assert plan.token_num_full.tolist() == [36, 36, 36, 36]
    found = cost(plan, head_dim=64, capability="sm_00")
    assert found.seconds == 7 + 2 * (1 + 3 * (20 + 2 * 3))  # three chunks, two axes
    assert found.computed == 4 * 3 * 64 * 64
    assert found.dense_seconds == 7 + 1 + 2 * 10


def test_a_list_of_cells_by_hand():
    plan = Neighborhood((32, 32), 9).gathered(1024)
    cells = plan.token_indptr.diff() // 64
    assert int(cells.max()) == 4
    found = cost(plan, head_dim=64, capability="sm_00")
    programs = [1.0 + int(count) * (20 + 2 * 3) for count in cells.flip(0)]
    assert not plan.token_num_full.any()
    assert found.seconds == 7 + deal(torch.tensor(programs, dtype=torch.float64), 2)[0]
    assert found.computed == int(cells.sum()) * 64 * 64


def test_tiles_and_keys_add_up():
    chosen, tokens = torch.zeros(1, 4, 1, dtype=torch.int64), torch.arange(100).expand(1, 4, -1)
    group_of = torch.zeros(1, 1, dtype=torch.int64)
    plan = plan_chosen(Full(), chosen, group_of, 256, 256, (64, 64), tokens=tokens)
    found = cost(plan, head_dim=64, capability="sm_00")
    assert found.seconds == 7 + 2 * (1 + 10 + 2 * 20)
    assert found.computed == 4 * (64 * 64 + 2 * 64 * 64)


def test_heads_follow_their_own_lists_and_batches_repeat_them():
    plan = PerHead([Window(64) & Causal(), Full(), Full()]).plan(128, heads=3, block=(64, 64))
    few, many = [1 + 23, 1 + 2 * 23], [1 + 2 * 10] * 2
    programs = torch.tensor([*few[::-1], *many, *many], dtype=torch.float64)
    assert cost(plan, head_dim=64, capability="sm_00").seconds == 7 + deal(programs, 2)[0]
    assert cost(plan, batch=4, head_dim=64, capability="sm_00").seconds == 7 + deal(programs.repeat(4), 2)[0]


def test_programs_go_to_whoever_has_least_to_do():
    assert deal(torch.tensor([5.0, 1.0, 1.0, 1.0, 4.0]), 2) == (7.0, 2.5)
    assert forecast(torch.tensor([5.0, 1.0]), 2, Rates(1.0, 0.0, 0.0, 0.0, 0.0, 3.0)) == 1 + 5 + 2 * 3


def test_many_programs_are_not_dealt_out_one_by_one(monkeypatch):
    work = torch.rand(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = deal(work, 7)
    monkeypatch.setattr(model, "SIMULATED", 99)
    rough = deal(work, 7)
    assert rough[1] == exact[1]
    assert abs(rough[0] - exact[0]) < 1  # no more than a program


def test_rates_lie_on_a_line_through_the_measured_dims():
    chip = Chip.of("sm_00")
    assert [chip.at(d, "dense").full for d in (64, 96, 128, 192)] == [10, 15, 20, 30]
    assert chip.at(0, "dense").full == 0
    assert chip.at(192, "dense").launch == 7


def test_nothing_listed_costs_rows():
    plan = Plan.from_mask(torch.zeros(1, 256, 256, dtype=torch.bool), (64, 64))
    found = cost(plan, head_dim=64, capability="sm_00")
    assert found.seconds == 7 + 2
    assert (found.efficiency, found.bound) == (1.0, float("inf"))


def test_what_was_not_measured_is_said():
    plan = Window(9).plan(64, block=(16, 16))
    with pytest.raises(
        ValueError, match=r"plan: no rates for plain tiles of 16 x 16 on a toy; plan for one of cells of"
    ):
        cost(plan, capability="sm_00")
    with pytest.raises(ValueError, match=r"capability: got 'sm_99'; choose one of sm_00"):
        cost(plan, capability="sm_99")
    with pytest.raises(ValueError, match=r"batch: got 0"):
        cost(plan, batch=0, capability="sm_00")


def test_two_boxes_are_twice_the_comparisons():
    one = (Causal() & Window(128)).plan(512, block=(128, 128))
    two = (Causal() & (Window(128) | Sinks(1))).plan(512, block=(128, 128))
    assert (model.comparisons(one), model.comparisons(two)) == (1, 2)
