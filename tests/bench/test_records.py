"""Files: every row parses, nothing half-written is left behind."""

import csv
import io
import json

import pytest

from saccade.bench import records
from saccade.bench.records import COLUMNS, Record, Status, environment, write_atomic, write_csv, write_jsonl


def record(**changes):
    about = {"mechanism": "a", "name": 'A, "quoted"', "family": "f", "contract": "Attention", "year": 2020}
    return Record(**(about | {"status": Status.OK, "seconds": 0.5, "speedup": 2.0} | changes))


def test_jsonl_is_strict_json(tmp_path):
    own = [record(), record(status=Status.WRONG, seconds=None, speedup=None, numerical_error=float("inf"))]
    path = write_jsonl(tmp_path / "deep" / "results.jsonl", own, {"cores": 2})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [r["status"] for r in rows] == ["OK", "WRONG"]
    assert rows[0]["baseline"] == "dense attention, full"
    assert rows[1]["numerical_error"] is None
    assert rows[0]["environment"] == {"cores": 2}


def test_csv_has_a_column_a_field(tmp_path):
    rows = list(csv.DictReader(io.StringIO(write_csv(tmp_path / "results.csv", [record()]).read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["name"] == 'A, "quoted"'
    assert rows[0]["density"] == ""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "report.html", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_the_environment_says_what_a_measurement_depends_on():
    stamp = environment()
    assert {"saccade", "torch", "python", "platform", "cpu", "cores", "threads", "load", "time"} <= set(stamp)
    json.dumps(stamp)
    assert environment() is not stamp
