"""A pattern's forecasts on the terminal: every way to list it, the fastest first, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from saccade.bench.cost import listings, shape_of, table
from saccade.cli import app
from saccade.softmax import cost as model
from saccade.where import Causal, Neighborhood, PerHead, Sinks, Window

TILES = [f"{order} tiles of {bq} x {bk}" for order in ("plain", "grid", "ordered") for bq, bk in model.TILES]
KINDS = ["dense", *TILES, *(f"cells of {bk} for tiles of {bq}" for bq, bk in model.CELLS)]


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """A GPU on which every product of 128 x 128 pairs takes a microsecond, masked or not, and nothing else counts."""
    rates = {}
    for kind in KINDS:
        sizes = [int(word) for word in kind.split() if word.isdigit()] or [128, 128]
        step = 1e-6 * sizes[0] * sizes[1] / 128**2
        rates[kind] = {"launch": 0.0, "row": 0.0, "full": step, "partial": step, "axis": 0.0, "latency": 1.0}
    found = {"device": "a toy", "multiprocessors": 1, "rates by head dim": {"64": rates}}
    (tmp_path / "cost_sm_90.json").write_text(json.dumps(found))
    monkeypatch.setattr(model, "MEASURED", tmp_path)


def shown(pattern, shape):
    console = Console(width=120, record=True)
    console.print(table(listings(pattern, shape), shape))
    return console.export_text()


def test_every_listing_of_a_grid_the_fastest_first():
    pattern, shape = Neighborhood((64, 64), 13), (1, 2, 2, 4096, 64)
    found = listings(pattern, shape)
    assert {each.name for each in found} == {
        "tiles of 128 x 128",
        "tiles of 64 x 64",
        "cells of 64 x 64",
    }
    seconds = [each.cost.seconds for each in found]
    assert seconds == sorted(seconds)
    assert found[0].name == "cells of 64 x 64"
    assert found[0].patch == (4, 16)
    by_name = {each.name: each for each in found}
    assert by_name["tiles of 64 x 64"].listed == 22**2  # an axis: 8 query tiles meet 22 key tiles of 8
    assert by_name["tiles of 128 x 128"].patch == (8, 16)
    assert by_name["cells of 64 x 64"].listed == 6.5 * 64  # seven cells, fewer at the borders
    for each in found:
        assert each.cost.speedup < each.cost.bound
        assert each.cost.speedup == pytest.approx(each.cost.efficiency * each.cost.bound)  # products are all there is


@pytest.mark.parametrize(
    "pattern",
    [Neighborhood((20, 20), 13), Neighborhood((20, 20), 5, 1, 2), Neighborhood((400,), 9), Window(9)],
    ids=str,
)
def test_without_cells_there_are_tiles(pattern):
    """Where none fit the grid, where keys are dilated, where cells would be tiles."""
    assert {each.name for each in listings(pattern, (1, 1, 1, 400, 64))} == {"tiles of 64 x 64", "tiles of 128 x 128"}


def test_a_union_has_tiles_only():
    found = listings((Window(300) | Sinks(4)) & Causal(), (1, 1, 1, 512, 64))
    assert [each.name for each in found] == ["tiles of 64 x 64", "tiles of 128 x 128"]
    assert {each.patch for each in found} == {None}
    assert 0 < found[0].full < 1


def test_the_table():
    text = shown(Neighborhood((64, 64), 13), (3, 2, 2, 4096, 64))
    first, second, *_ = (line.strip() for line in text.splitlines())
    assert first == "3 x 2 heads, 4096 tokens, D = 64: forecast, forward, on a toy"
    assert second.startswith("density 4.1 %: by products alone 24.2× faster than dense attention, ")
    row = next(line.split() for line in text.splitlines() if "cells of 64 x 64" in line)
    assert row[5:8] == ["4", "x", "16"]


def test_the_shape_asked_about_when_none_is_given():
    assert shape_of(Window(3), None) == (1, 16, 16, 16384, 128)
    assert shape_of(Window(3), 99) == (1, 16, 16, 99, 128)
    assert shape_of(Neighborhood((8, 9), 3), None) == (1, 16, 16, 72, 128)
    assert shape_of(PerHead([Window(3)] * 5), 64)[1] == 5


@pytest.mark.parametrize(
    ("pattern", "tokens"), [("Neighborhood((16,16),5)", 256), ("Window(9) & Causal()", 9000)], ids=["grid", "long"]
)
def test_the_command(pattern, tokens, tmp_path):
    path = tmp_path / "drawn.png"
    words = ["draw", pattern, "--cost", "--shape", f"1,2,2,{tokens},64", "--out", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"1 x 2 heads, {tokens} tokens" in result.stdout
    assert path.read_bytes().startswith(b"\x89PNG")
    assert Path(result.stdout.split()[-1]).name == path.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw", "copy", "--cost"], "saccade: cost: got 'copy'; a forecast is made of a pattern, such as"),
        (["draw", "Neighborhood((4,4),3)", "--cost", "--length", "9"], "saccade: grid: (4, 4) has 16 tokens"),
    ],
)
def test_what_it_refuses(words, message):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
