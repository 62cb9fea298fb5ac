"""Charts: axes hold their values, labels do not collide."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_summary import DENSE, compared, ok

from saccade.bench import charts, units
from saccade.bench.charts import Axis, against_error, against_length, place_labels, spread, steps_for
from saccade.bench.summary import groups


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15), st.floats(1, 15))
def test_spread_keeps_distance_order_and_bounds(wanted, gap):
    found = spread(wanted, 0.0, 300.0, gap)
    for one, two in itertools.pairwise(sorted(found)):
        assert two - one >= gap - 0.2  # positions are rounded to a tenth
    assert min(found) >= 0
    assert max(found) <= 300.1
    for (w1, f1), (w2, f2) in itertools.combinations(zip(wanted, found, strict=True), 2):
        assert w1 == w2 or (w1 < w2) == (f1 < f2)


def test_spread_moves_nothing_that_has_room():
    assert spread([10.0, 50.0, 30.0], 0.0, 100.0, 13.0) == [10.0, 50.0, 30.0]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_axes_hold_their_values(values):
    axis = Axis.over("t", values, 0.0, 300.0, str, steps_for(values))
    assert all(0 <= axis.at(v) <= 300 for v in values)
    assert all(0 <= tick.at <= 300 for tick in axis.ticks)
    for one, two in itertools.pairwise(axis.ticks):
        assert two.at > one.at


@pytest.mark.parametrize("values", [(1.0, 1e4), (1.0, 30.0), (1.0, 2.5), (0.02, 0.5)])
def test_axes_have_ticks_to_read_by(values):
    assert 3 <= len(Axis.over("t", values, 0.0, 300.0, str, steps_for(values)).ticks) <= 9


def _frame(label):
    width = charts.LETTER * len(label.text)
    left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
    return left, label.y - 6, left + width, label.y + 6


@pytest.mark.parametrize("points", [
    [(200.0 + 3 * i, 150.0) for i in range(6)],
    [(200.0, 100.0 + 2 * i) for i in range(6)],
    [(395.0, 20.0), (394.0, 24.0), (20.0, 290.0)],
])  # fmt: skip
def test_labels_of_crowded_points_do_not_collide(points):
    labels = place_labels(points, [f"mechanism_{i}" for i in range(len(points))], (0.0, 0.0, 400.0, 300.0))
    frames = [_frame(label) for label in labels]
    for one, two in itertools.combinations(frames, 2):
        assert charts._overlap(one, two) == 0
    for left, top, right, bottom in frames:
        assert min(left, top) >= 0
        assert right <= 400
        assert bottom <= 300


def test_a_chart_of_time():
    records = [ok("a", 2, 0.1, n) for n in (1024, 2048)] + [ok("b", 4, 0.1)]
    dense = [ok("dense", 1, 0.0, n) for n in (1024, 2048)]
    (group,) = groups(compared(*dense, *records))
    chart = against_length(group, {"a": 0, "b": 1}, "seconds")
    dense, a, b = chart.series
    assert (dense.hue, a.hue, b.hue) == (None, 0, 1)
    assert a.shape != b.shape
    assert len({x for x, _ in a.marks}) == 2
    assert dense.marks[0][1] < a.marks[0][1] < b.marks[0][1]  # less time is lower, and y grows downward
    assert b.label.x < a.label.x  # named where it ends, not beyond the lengths that it did not reach
    assert "a 500 ms at 2048" in chart.description


def test_a_chart_of_errors_names_its_front():
    (group,) = groups(compared(DENSE, ok("a", 2, 0.1), ok("exact", 1.5, 1e-9), ok("b", 1.2, 0.3)))
    chart = against_error(group, {"a": 0, "exact": 1, "b": 2})
    strong = [s.name for s in chart.series if s.strong]
    assert strong == ["dense", "a", "exact"]
    assert "Pareto front: a, exact, dense." in chart.description
    heights = {s.name: s.marks[0][1] for s in chart.series}
    assert heights["b"] < heights["a"] < heights["exact"] <= heights["dense"]
    assert chart.one == chart.series[0].marks[0][0]
    assert chart.front.count("L") == 2


def test_layers_have_no_chart_of_errors():
    (group,) = groups(compared(ok("a", 2, None, layer=True)))
    assert against_error(group, {"a": 0}) is None


def test_styles_differ_for_more_mechanisms_than_there_are_hues():
    looks = {(i % charts.HUES, i % charts.SHAPES) for i in range(charts.HUES * charts.SHAPES)}
    assert len(looks) == charts.HUES * charts.SHAPES
    assert math.gcd(charts.HUES, charts.SHAPES) == 1
    assert len(charts.OUTLINES) == charts.SHAPES


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (units.seconds(0.0), "0 ns"),
        (units.seconds(0.9999), "1 s"),
        (units.nbytes(2**31), "2 GiB"),
        (units.times(99.96), "100×"),
        (units.share(0.5), "50 %"),
    ],
)
def test_units(text, shown):
    assert text == shown
