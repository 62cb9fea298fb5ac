"""Groups, Pareto fronts, and lines of the table."""

from dataclasses import replace

import pytest

from saccade.bench.compare import Comparison
from saccade.bench.records import Record, Status
from saccade.bench.summary import dropped, findings, groups, lines, pareto


def ok(name, speedup, error, length=1024, verdict="faster", **changes):
    made = Record(name, name.upper(), "f", "Attention", 2020, Status.OK, workload="text", length=length)
    figures = {"seconds": 1 / speedup, "speedup": speedup, "approximation_error": error, "peak_bytes": 8}
    return replace(made, verdict=verdict, **(figures | changes))


def failed(name, status, length, message="why"):
    made = Record(name, name.upper(), "f", "Attention", 2020, status, workload="text", length=length)
    return replace(made, message=message)


def compared(*records):
    return Comparison(tuple(records), {"cores": 2})


DENSE = ok("dense", 1.0, 0.0, verdict="same")


def names(records):
    return [r.mechanism for r in records]


def test_the_front_is_what_nothing_dominates():
    fast, good, bad, twin = ok("fast", 9, 0.5), ok("good", 3, 0.1), ok("bad", 2.9, 0.2), ok("twin", 3, 0.1)
    assert names(pareto([bad, twin, DENSE, good, fast])) == ["fast", "twin", "dense"]
    assert names(pareto([bad, fast])) == ["fast", "bad"]


def test_what_is_exact_and_faster_beats_dense_attention_itself():
    assert names(pareto([DENSE, ok("exact", 2, 0.0)])) == ["exact"]


def test_only_what_is_faster_beyond_doubt_is_on_a_front():
    (group,) = groups(compared(DENSE, ok("maybe", 1.5, 0.01, verdict="undecided"), ok("sure", 1.4, 0.2)))
    assert names(group.front) == ["sure", "dense"]
    (group,) = groups(compared(DENSE, ok("maybe", 1.5, 0.01, verdict="undecided")))
    assert group.front == []


def test_a_group_is_compared_where_half_of_it_arrived():
    reached = {"a": (1024, 2048, 4096), "b": (1024, 2048), "c": (1024,)}
    (group,) = groups(compared(*(ok(name, 2, 0.1, n) for name, lengths in reached.items() for n in lengths)))
    assert group.length == 2048
    assert names(group.compared) == ["a", "b"]


def test_places_are_kept_apart():
    found = groups(compared(DENSE, ok("a", 2, 0.1), ok("b", 2, 0.1, causal=True), ok("c", 2, None, layer=True)))
    assert [g.title for g in found] == ["text: causal attention", "text: full attention", "text: full layer"]
    assert found[2].front == []


def test_a_line_a_mechanism_with_where_it_stopped():
    found = compared(
        DENSE,
        failed("broken", Status.WRONG, 128),
        ok("a", 2, 0.1),
        ok("a", 3, 0.1, 2048),
        failed("a", Status.TIMEOUT, 4096),
        ok("b", 4, 0.1),
        failed("c", Status.UNSUPPORTED, 1024),
        ok("c", 1.5, 0.1, 2048),
        replace(DENSE, length=2048),
    )
    told = {line.record.mechanism: line for line in lines(found)}
    assert list(told) == ["b", "a", "c", "broken"]
    assert told["a"].record.length == 2048
    assert told["a"].message == "TIMEOUT at 4096: why"
    assert told["c"].stopped is None
    assert told["broken"].message == "why"
    assert names(line.record for line in dropped(found)) == ["a", "broken"]
    assert findings(found)[-2:] == ["TIMEOUT: a beyond 2048.", "WRONG: broken."]
    assert "Pareto front: a (3×, error 0.1), dense." in findings(found)[0]


def test_what_was_not_measured_is_counted_beside_what_was():
    found = compared(
        DENSE,
        ok("slow", 0.5, 0.1, verdict="slower"),
        failed("late", Status.TIMEOUT, 1024),
        ok("early", 2, 0.1, 512),
        failed("early", Status.TIMEOUT, 1024),
        failed("other", Status.WRONG, 128, "elsewhere"),
    )
    found = replace(found, records=(*found.records[:-1], replace(found.records[-1], causal=True)))
    said = "text: full attention, 1024 tokens. Nothing that was measured is faster than dense attention beyond doubt."
    assert findings(found)[0] == f"{said} 2 of 3 were not measured there."


def test_what_is_unproven_and_ends_early_says_both():
    wild = replace(ok("wild", 2, 0.1), status=Status.UNPROVEN, message="off by 53%")
    (line,) = lines(compared(DENSE, wild, failed("wild", Status.OOM, 2048, "full")))
    assert line.message == "off by 53%; OOM at 2048: full"


@pytest.mark.parametrize("records", [(), (DENSE,), (failed("a", Status.OOM, 1),)])
def test_nothing_measured(records):
    assert groups(compared(*records)) == []
