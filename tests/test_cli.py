"""The command line: what it prints, what it refuses, and that it starts at once."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import saccade.catalogue
from saccade.cli import app
from saccade.contract import Attention, Case, Dims, Mixer, Spec, claim


def spec(id, family, **changes):
    about = {"name": id.title(), "title": "A toy", "paper": "0000.00000", "year": 2020, "uses": ("attend",)}
    return Spec(id=id, family=family, **(about | changes))


class Copy(Attention):
    """Every query gets its own value."""

    spec = spec("copy", "plain")
    causal = True

    def __init__(self, dims, *, scale: float = 1.0):
        super().__init__(dims)
        self.scale = scale

    def compute(self, q, k, v):
        return self.scale * v.repeat_interleave(self.dims.group, 1)

    def oracle(self, q, k, v):
        return self.scale * v[:, torch.arange(q.shape[1]) // self.dims.group]

    @classmethod
    def cases(cls):
        return [Case(Dims(2, 4), 7)]

    @claim("It copies.")
    def copies(cls):
        raise AssertionError("never asked here")


class Broken(Copy):
    spec = spec("broken", "plain")

    def compute(self, q, k, v):
        return 2 * super().compute(q, k, v)


class Blur(Mixer):
    """The mean of all tokens of a grid."""

    spec = spec("blur", "grids", grid=2)

    def compute(self, x):
        return x.mean(1, keepdim=True).expand_as(x).clone()

    def oracle(self, x):
        return torch.stack([x.sum(1) / x.shape[1]] * x.shape[1], 1)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    classes = {cls.spec.id: cls for cls in (Blur, Broken, Copy)}
    monkeypatch.setattr(saccade.catalogue, "_classes", lambda: classes)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def refused(*words):
    """The one line on stderr with which exit code 2 comes."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_it_starts_at_once_and_without_torch():
    code = "import sys, saccade.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    shown = subprocess.run([sys.executable, "-m", "saccade", "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    for command in ("list", "show", "check", "compare", "draw"):
        assert command in shown.stdout


def test_list():
    result = run("list")
    assert "3 mechanisms" in result.stdout
    assert "0000.00000" in result.stdout
    rows = json.loads(run("list", "--json").stdout)
    assert [(r["id"], r["contract"], r["grid"]) for r in rows] == [
        ("blur", "Mixer", 2),
        ("broken", "Attention", 0),
        ("copy", "Attention", 0),
    ]
    assert [r["id"] for r in json.loads(run("list", "--family", "grids", "--json").stdout)] == ["blur"]


def test_show():
    text = run("show", "copy").stdout
    assert "scale=1.0" in text
    assert "Every query gets its own value." in text
    assert "- It copies." in text
    assert "q, k, v (B, H, N, D), a sequence, causal" in text
    assert "hidden states (B, N, C), a grid of 2 axes, not causal" in run("show", "blur").stdout


@pytest.fixture
def checks(monkeypatch):
    from saccade import testing
    from saccade.testing import Report, Row

    def rows(ids):
        status = {"broken": "FAILED"}
        return Report(tuple(Row(id, "value", "", status.get(id, "OK"), 0.1, "why") for id in ids))

    monkeypatch.setattr(testing, "cli_table", rows)


def test_check(checks):
    good, bad = run("check", "copy", "copy"), run("check", "copy", "broken", "--json")
    assert good.exit_code == 0
    assert "1 checks, 0 failures" in good.stdout
    assert bad.exit_code == 1
    assert [(r["mechanism"], r["status"]) for r in json.loads(bad.stdout)] == [("copy", "OK"), ("broken", "FAILED")]
    assert [r["mechanism"] for r in json.loads(run("check", "--json").stdout)] == ["blur", "broken", "copy"]
    asked = run("check", "copy", "--family", "grids", "--json")
    assert [r["mechanism"] for r in json.loads(asked.stdout)] == ["copy", "blur"]


def test_compare(tmp_path):
    out = tmp_path / "deep" / "report"
    shape = "1,2,1,64,8"
    result = run("compare", "--shape", shape, "--lengths", "16,64", "--budget", "30", "--out", out)
    assert result.exit_code == 0, result.output
    assert "broken: WRONG:" in " ".join(result.stdout.split())
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    timed = {(r["mechanism"], r["length"]) for r in rows if r["status"] == "OK"}
    assert {("copy", 16), ("copy", 64), ("blur", 16), ("blur", 64)} <= timed
    assert {r["workload"] for r in rows} == {"synthetic"}
    assert [r["seconds"] for r in rows if r["mechanism"] == "broken"] == [None]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert str(out / "results.csv") in result.stdout.replace("\n", "")


def test_compare_at_the_length_of_the_shape(tmp_path):
    assert run("compare", "copy", "--shape", "1,2,2,32,8", "--budget", "20", "--out", tmp_path).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["length"] for r in rows} == {32}
    assert {r["dtype"] for r in rows} == {"float32"}


def test_without_weights_compare_says_what_else_there_is(monkeypatch, tmp_path):
    from saccade.hosts import lm

    monkeypatch.setattr(lm, "WEIGHTS", tmp_path / "none.safetensors")
    line = refused("compare", "copy", "--out", tmp_path)
    assert line.startswith(f"saccade: weights: none of saccade's language model at {tmp_path}/none.safetensors; ")
    assert line.endswith("(--shape B,H,Hkv,N,D) or on a model of yours (--capture MODEL)")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("what", "options"), [("Window(4) & Causal()", ()), ("copy", ("--shape", "1,2,2,1,8")), ("blur", ())]
)
def test_draw(what, options, tmp_path):
    path = tmp_path / "drawn.png"
    result = run("draw", what, "--length", 36, "--out", path, *options)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert result.stdout.strip() == str(path)


SHAPE = ("--shape", "1,2,2,32,8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "copi"], "id: got 'copi'; choose one of blur, broken, copy"),
        (["check", "copi"], "id: got 'copi'; choose one of blur, broken, copy"),
        (["compare", "copi"], "id: got 'copi'; choose one of blur, broken, copy"),
        (["list", "--family", "x"], "family: got 'x'; choose one of grids, plain"),
        (["compare", "--family", "x"], "family: got 'x'; choose one of grids, plain"),
        (["compare", "--shape", "1,2"], "shape: got '1,2'; pass B,H,HKV,N,D, like 1,8,2,4096,64"),
        (["compare", "--shape", "1,2,x,4,5"], "shape: got '1,2,x,4,5'; pass integers between commas, like 1024,4096"),
        (["compare", "--shape", "1,3,2,4,5"], "num_kv_heads: got 2 for num_heads 3; "),
        (["compare", "--shape", "1,2,2,0,5"], "shape: got 0; pass an integer >= 1"),
        (["compare", *SHAPE, "--lengths", "-4"], "lengths: got -4; pass an integer >= 1"),
        (["compare", *SHAPE, "--lengths", "4;5"], "lengths: got '4;5'; pass integers between commas, like 1024,4096"),
        (["compare", *SHAPE, "--capture", "m"], "shape: got 1,2,2,32,8 beside capture 'm'; pass one of them"),
        (["compare", *SHAPE, "--device", "tpu"], "device: got 'tpu'; pass cpu, cuda or cuda:N"),
        (["compare", *SHAPE, "--device", "cuda:99"], "device: got 'cuda:99', but there are "),
        (
            ["compare", *SHAPE, "--dtype", "int8"],
            "dtype: got 'int8'; choose one of float16, bfloat16, float32, float64",
        ),
        (["compare", *SHAPE, "--backend", "fast"], "backend: got 'fast'; choose one of "),
        (["compare", *SHAPE, "--budget", "0"], "budget: got 0; pass seconds > 0"),
        (["compare", *SHAPE, "--out", __file__], "out: got "),
        (["compare", "copy", "--capture", "/nowhere/at/all"], "capture: transformers cannot load '/nowhere/at/all'"),
        (["draw", "copi"], "id: got 'copi'; choose one of blur, broken, copy"),
        (["draw", "Windo(3)"], "pattern: got 'Windo'; choose from "),
        (["draw", "Window(3)", "--length", "0"], "length: got 0; pass an integer >= 1"),
        (["draw", "Window(3)", "--out", "x.docx"], "out: got 'x.docx'; pass a file whose name ends in .png"),
        (["draw", "PerHead([Window(0)])"], "size: got 0; pass an integer >= 1"),
    ],
)
def test_what_it_refuses(words, message):
    assert refused(*words).startswith(f"saccade: {message}")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "saccade.bench.report", raising=False)
    monkeypatch.delattr("saccade.bench.report", raising=False)
    assert refused("compare", *SHAPE) == "saccade: jinja2 is missing; pip install 'saccade[bench]'"
