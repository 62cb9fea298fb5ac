"""Sweeps: what is done is kept and not done again, time limits hold, attention recalls and a window cannot."""

import contextlib
import dataclasses
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import saccade
from saccade.contract import Dims

ROOT = Path(__file__).parents[2]
NAMES = ("rows", "sweep", "recall", "images")


@contextlib.contextmanager
def scripts(*names, folder="training"):
    """Modules of `training`, or of `docs`, which can be imported inside and are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(ROOT / folder))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / folder)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def training():
    with scripts(*NAMES) as found:
        yield dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name, training):
    assert not doctest.testmod(training[name]).failed


@pytest.fixture(scope="module")
def sweep(training):
    return training["sweep"]


def tasks(sweep, *numbers, alone=()):
    return [sweep.Job({"number": n}, sweep.Contestant("window", {"size": n}), alone=n in alone) for n in numbers]


class Log:
    """Work that notes what it was given; `act` may say what a number's job gives."""

    def __init__(self, act=lambda number, clock: {}):
        self.done, self.act = [], act

    def __call__(self, job, clock, device):
        self.done.append(job.key["number"])
        return {"accuracy": 0.5} | self.act(job.key["number"], clock)


def test_what_is_done_is_kept_and_not_done_again(sweep, tmp_path):
    path, work = tmp_path / "deep" / "rows.jsonl", Log()
    assert len(sweep.Sweep(path, work).run(tasks(sweep, 1, 2))) == 2
    rows = sweep.Sweep(path, work).run(tasks(sweep, 3, 2, 1))
    assert work.done == [1, 2, 3]
    assert [row["key"]["number"] for row in rows] == [1, 2, 3]
    assert sweep.read(path) == rows
    assert {"contestant", "seconds", "machine", "date", "commit", "torch", "id"} <= set(rows[0])


def test_a_line_that_was_cut_off_is_done_again(sweep, tmp_path):
    path, work = tmp_path / "rows.jsonl", Log()
    sweep.Sweep(path, work).run(tasks(sweep, 1, 2))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(sweep.Sweep(path, work).run(tasks(sweep, 1, 2, 3))) == 3
    assert work.done == [1, 2, 2, 3]
    assert sorted(row["key"]["number"] for row in sweep.read(path)) == [1, 2, 3]


def test_a_failure_is_a_row_and_comes_again_when_asked(sweep, tmp_path):
    def act(number, clock):
        if number == 2 and broken:
            raise ValueError("no such number")
        return {}

    path, work, broken = tmp_path / "rows.jsonl", Log(act), True
    rows = sweep.Sweep(path, work).run(tasks(sweep, 1, 2, 3))
    assert [row.get("error") for row in rows] == [None, "ValueError: no such number", None]
    assert rows[1]["at"].startswith("test_training.py:")
    broken = False
    sweep.Sweep(path, work).run(tasks(sweep, 1, 2, 3))
    assert work.done == [1, 2, 3]
    assert len(sweep.Sweep(path, work, retry=True).run(tasks(sweep, 1, 2, 3))) == 3
    assert work.done == [1, 2, 3, 2]


def test_minutes_stop_it(sweep, tmp_path):
    """Nothing is started afterwards, and what runs then is no row."""

    def act(number, clock):
        while number == 2 and not clock.is_over:
            time.sleep(0.01)
        if clock.is_over:
            raise sweep.Stopped
        return {}

    path, work = tmp_path / "rows.jsonl", Log(act)
    rows = sweep.Sweep(path, work, minutes=0.3 / 60).run(tasks(sweep, 1, 2, 3))
    assert work.done == [1, 2]
    assert [row["key"]["number"] for row in rows] == [1]
    assert sweep.Sweep(path, work, minutes=0).run(tasks(sweep, 1, 2, 3)) == rows
    assert work.done == [1, 2]


def test_late_ones_come_last_and_needless_ones_not_at_all(sweep, tmp_path):
    jobs = [
        sweep.Job({"number": n}, sweep.Contestant("window", {"size": size}))
        for n, size in ((1, 8), (2, 16), (3, 8), (4, 16), (5, 8))
    ]
    work = Log(lambda number, clock: {"ended": "late" if number == 1 else "solved"})
    path = tmp_path / "rows.jsonl"
    sweep.Sweep(path, work, needless=lambda job, rows: job.key["number"] == 5).run(jobs)
    assert work.done == [1, 2, 4, 3]


def quick(job, clock, device):
    """Says when it began and ended; the process that is given 13 dies."""
    began = time.time()
    if job.key["number"] == 13:
        os._exit(7)
    for share in (0.3, 0.9):
        clock.share(share)
        time.sleep(0.05)
    return {"began": began, "over": time.time(), "process": os.getpid(), "threads": torch.get_num_threads()}


def test_processes_share_the_work(sweep, tmp_path):
    """A death is a row; one that is alone has nothing beside it; the others have."""
    rows = sweep.Sweep(tmp_path / "rows.jsonl", quick, workers=2).run(tasks(sweep, 1, 13, 2, 3, 4, 5, alone=(3,)))
    by_number = {row["key"]["number"]: row for row in rows}
    assert by_number[13]["error"] == "RuntimeError: the process ended with code 7"
    others = [by_number[number] for number in (1, 2, 3, 4, 5)]
    assert os.getpid() not in {row["process"] for row in others}
    assert {row["threads"] for row in others} == {1}
    alone = by_number[3]
    assert all(row is alone or row["over"] <= alone["began"] or row["began"] >= alone["over"] for row in others)


# Mechanisms.


def test_every_causal_mechanism_of_the_families_takes_part(sweep):
    families = ["linear", "recurrent"]
    found, left_out = sweep.of_families(families, causal=True)
    ids = [one.id for one in found]
    specs = [spec for spec in saccade.mechanisms() if spec.family in families]
    assert sorted({*ids, *left_out}) == [spec.id for spec in specs]
    assert {spec.id for spec in specs if saccade.mechanism(spec.id).causal} <= set(ids)
    both_ways, left_out = sweep.of_families(["linear"], causal=False, grid=(8, 8))
    for one in both_ways:
        assert not one.build(Dims(2, 32, grid=(8, 8))).causal
    assert set(left_out.values()) == {"is causal"}


def test_variants_are_the_words_of_a_mechanisms_own_cases(sweep):
    cls = saccade.mechanism("hybrid_linear_analysis")
    default = cls.params()["mixer"]
    words = {case.params.get("mixer", default) for case in cls.cases()}
    assert {one["mixer"] for one in sweep.choices(cls)} == words - {default}
    plain = sweep.of_families(["recurrent"], causal=True)[0]
    variants = sweep.of_families(["recurrent"], causal=True, variants=True)[0]
    assert not {one.name for one in plain} & {one.name for one in variants}


def test_layers_are_told_which_they_are(sweep):
    one = sweep.Contestant("hybrid_linear_analysis", {"ratio": 1})
    assert [one.build(Dims(2, 8), layer, 4).full for layer in range(4)] == [False, True, False, True]
    assert sweep.Contestant("based").build(Dims(2, 8), 1, 4).layer == "linear"  # a word, not a number
    assert sweep.Contestant("cosformer", {"causal": True}).build(Dims(2, 8), 0, 1, 77).length == 77


def test_bytes_of_the_state(training):
    """Of known ones: keys and values, a window's, a matrix a head, and nothing for what cannot decode."""
    bytes_of, contestant = training["recall"].state_bytes, training["sweep"].Contestant
    assert bytes_of(contestant("dense", {"causal": True}), 64, 256) == 2 * 2 * 4 * 64 * 256
    assert bytes_of(contestant("window", {"size": 16}), 64, 256) == 2 * 2 * 4 * 64 * 16
    assert bytes_of(contestant("window", {"size": 1024}), 64, 256) == 2 * 2 * 4 * 64 * 256
    short, long = (bytes_of(contestant("lightning_attention2"), 64, length) for length in (8, 32))
    assert long == short
    assert long >= 2 * 2 * 4 * 32 * 32
    assert bytes_of(contestant("lightning_attention"), 64, 8) < 2 * 2 * 4 * 32 * 32 * 2  # no transition beside it
    delta = bytes_of(contestant("hybrid_linear_analysis", {"ratio": None}), 64, 8)
    assert delta == 2 * 2 * 4 * 32 * 32 + 2 * 4 * 3 * (3 * 64)  # memory, and three projections for the convolution
    assert bytes_of(contestant("trainable_ff_kernel", {"causal": True}), 64, 8) is None


# Recall.


@pytest.fixture(scope="module")
def small(training):
    shapes = {"train": ((64, 4, 2048),), "test": ((64, 4, 512),)}
    return training["recall"].Protocol(**shapes, epochs=3, widths=(32,), rates=(0.01,), batch=32, vocab_size=128)


@pytest.fixture(scope="module")
def trained(training, small):
    """id -> row of dense attention and of a window of eight keys."""
    recall, contestant = training["recall"], training["sweep"].Contestant
    group = [contestant("dense", {"causal": True}), contestant("window", {"size": 8})]
    clock = training["sweep"].Clock(lambda share: None)
    return {job.contestant.id: recall.do(job, clock, "cpu") for job in recall.jobs(small, group, [])}


def test_attention_recalls_and_a_window_only_what_it_reaches(training, small, trained):
    """No key beyond two windows and two convolutions is seen; such a question can only be guessed."""
    (rows,) = training["recall"].drawn("test", small, "cpu")
    reach = 2 * (8 - 1) + 2 * (3 - 1)
    told = 2 * torch.arange(4) + 1
    within = (rows.asked - told <= reach).double().mean().item()
    most = within + (1 - within) / 4  # the others have one of four values; most of the four are out of reach, too
    assert trained["window"]["accuracy"] < most < trained["dense"]["accuracy"]
    assert trained["dense"]["steps"] <= trained["dense"]["planned"] == 192


@pytest.mark.parametrize("causal", [True, False])
def test_models_do_not_look_ahead(training, small, causal):
    """And attention over everything, the twin, is seen to."""
    model = training["recall"].Reader(training["sweep"].Contestant("dense", {"causal": causal}), 32, small).eval()
    tokens, asked = torch.randint(128, (2, 20)), torch.arange(20).expand(2, -1)
    changed = tokens.clone()
    changed[:, 11:] = 5
    with torch.no_grad():
        before, after = model(tokens, asked), model(changed, asked)
    assert before[:, :11].equal(after[:, :11]) == causal
    assert not before[:, 11:].equal(after[:, 11:])


def test_asked_positions_are_those_of_the_whole(training, small):
    model = training["recall"].Reader(training["sweep"].Contestant("gla"), 32, small).eval()
    tokens, asked = torch.randint(128, (2, 20)), torch.tensor([[3, 19, 7], [0, 1, 2]])
    with torch.no_grad():
        whole, part = model(tokens, torch.arange(20).expand(2, -1)), model(tokens, asked)
    assert part.argmax(-1).equal(whole.argmax(-1).gather(1, asked))


def test_jobs_give_something_of_everything_first(training):
    recall, contestant = training["recall"], training["sweep"].Contestant
    group, variants = (
        [contestant("dense", {"causal": True}), contestant("gla")],
        [contestant("based", {"layer": "conv"})],
    )
    protocol = dataclasses.replace(recall.REDUCED, widths=(64, 128), rates=(0.001, 0.003, 0.01))
    jobs = recall.jobs(protocol, group, variants)
    order = [(job.key["id"], job.key["width"], job.key["rate"]) for job in jobs]
    assert order[:3] == [("dense", 64, 0.003), ("gla", 64, 0.003), ("dense", 64, 0.001)]
    assert order[6:8] == [("dense", 128, 0.003), ("gla", 128, 0.003)]
    assert order[12] == ("based", 64, 0.003)
    assert len({job.ident for job in jobs}) == len(jobs) == 15
    assert all(job.key == json.loads(json.dumps(job.key)) for job in jobs)


def test_one_rate_that_solves_it_is_enough(training):
    recall, contestant = training["recall"], training["sweep"].Contestant
    jobs = recall.jobs(recall.REDUCED, [contestant("dense", {"causal": True}), contestant("gla")], [])
    row = {"key": dict(jobs[0].key), "ended": "solved"}
    needless = [job for job in jobs if recall.solved(job, [row])]
    assert {(job.key["id"], job.key["width"]) for job in needless} == {("dense", 64)}
    assert not any(recall.solved(job, [{**row, "ended": "all epochs"}]) for job in jobs)


def test_a_late_training_ends_and_says_so(training, small):
    recall, sweep = training["recall"], training["sweep"]
    (job,) = recall.jobs(small, [sweep.Contestant("dense", {"causal": True})], [])
    row = recall.do(job, sweep.Clock(lambda share: None, most=0.0), "cpu")
    assert (row["ended"], row["steps"]) == ("late", 1)
    with pytest.raises(sweep.Stopped):
        recall.do(job, sweep.Clock(lambda share: None, over=time.time()), "cpu")


def test_options_change_the_protocol(training):
    recall = training["recall"]
    assert recall.asked(recall.parser().parse_args([])) == recall.REDUCED
    assert recall.asked(recall.parser().parse_args(["--paper"])) == recall.PAPER
    given = "--paper --train 64x4x10 --test 32x2x5 64x4x5 --widths 32 --rates 0.1 --epochs 2 --vocab-size 128"
    found = recall.asked(recall.parser().parse_args(given.split()))
    assert (found.train, found.test) == (((64, 4, 10),), ((32, 2, 5), (64, 4, 5)))
    assert (found.widths, found.rates, found.epochs, found.vocab_size, found.batch) == ((32,), (0.1,), 2, 128, 256)


def test_the_script_runs_stops_and_goes_on(tmp_path, training):
    """The second run does what the first left."""
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "training" / "recall.py"), "--workers", "2", "--out", str(path)]
    given = "--train 16x2x64 --test 16x2x8 --widths 16 --rates 0.01 --epochs 1 --vocab-size 64"
    command += given.split()
    run = lambda *more: subprocess.run(  # noqa: E731
        [*command, *more], check=True, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    run("--only", "dense")
    found = run("--only", "dense", "gla")
    assert [row["contestant"] for row in training["rows"].read(path)] == ["dense", "gla"]
    assert "2/2" in found.stdout


# Images.


def test_images_are_learnt(training):
    images, sweep = training["images"], training["sweep"]
    protocol = dataclasses.replace(images.PROTOCOLS[0], epochs=4, batch=64, width=32, depth=1)
    speed, accuracy = images.jobs([protocol], [sweep.Contestant("l2vit")], [3e-3])
    clock = sweep.Clock(lambda share: None)
    assert speed.alone
    assert images.do(speed, clock, "cpu")["images_per_second"] > 0
    row = images.do(accuracy, clock, "cpu")
    assert row["accuracy"] > 0.5  # five times what a guess gets
    assert row["steps"] == row["planned"] == 4 * 23


def test_blocks_of_a_paper_stand_as_they_are(training):
    images, sweep = training["images"], training["sweep"]
    protocol = images.PROTOCOLS[0]
    drawn = images.drawn("digits", "cpu")
    whole = images.classifier(sweep.Contestant("l2vit"), protocol, drawn)
    inside = images.classifier(sweep.Contestant("mhla"), protocol, drawn)
    attention = images.classifier(sweep.Contestant("dense"), protocol, drawn)
    assert type(whole.blocks[0]).__name__ == "L2ViT"
    assert type(inside.blocks[0].mixer).__name__ == "Mhla"
    assert type(attention.blocks[0].mixer).__name__ == "AttentionMixer"


# The page.


@pytest.fixture(scope="module")
def measured():
    with scripts("measured", folder="docs") as (found,):
        yield found


def rows_of_recall(trained, small):
    """Rows as the script writes them."""
    rows = []
    for id, row in trained.items():
        for width in (32, 64):
            key = {"id": id, "params": {"size": 8} if id == "window" else {}, "width": width, "rate": 0.01}
            about = {
                "id": f"{id}{width}",
                "contestant": id,
                "family": "reference",
                "machine": "a CPU",
                "date": "2026-01-02",
            }
            rows.append({**row, **about, "key": {**key, "protocol": small.key}})
    for rate, accuracy in ((0.01, 0.25), (0.03, 0.75)):
        key = {"id": "gla", "params": {}, "width": 32, "rate": rate, "protocol": small.key}
        found = {"contestant": "gla", "family": "linear", "accuracy": accuracy, "accuracies": {"64x4": accuracy}}
        ended = {
            "ended": "late",
            "steps": 10,
            "planned": 20,
            "state_bytes": 4096,
            "machine": "a CPU",
            "date": "2026-01-03",
        }
        rows.append({"id": f"gla{rate}", "key": key, **found, **ended})
    failed = {"id": "x", "key": {**key, "id": "rat"}, "contestant": "rat", "family": "recurrent", "error": "E: <no>"}
    return [*rows, failed]


def test_the_page_shows_the_best_and_what_failed(measured, trained, small):
    page = measured.recall(rows_of_recall(trained, small))
    assert page.count("<svg") == 1
    assert "<title>gla, width 32: 75.0%, 4 KiB</title>" in page
    assert "25.0%" not in page
    assert "gla · 32</text>" in page
    assert page.count("dense ·") == 2
    assert "late after 50%" in page
    assert "<li><code>rat</code>: E: &lt;no&gt;</li>" in page
    assert 'href="gallery/gla.html"' in page
    assert "A CPU; 2026-01-02 to 2026-01-03." in page
    assert "currentColor" in page


def test_the_page_without_rows_says_how_to_get_them(measured, tmp_path):
    assert measured.found("recall", tmp_path) == []
    assert "python training/recall.py" in measured.recall([])
    assert "python training/images.py" in measured.images([])


def test_points_stand_where_accuracy_and_bytes_say(measured, trained, small):
    """Half the accuracy stands half as high, and what has no known state does not stand there."""

    def heights(rows):
        return [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', measured.chart(rows))]

    rows = [row for row in rows_of_recall(trained, small) if "accuracy" in row]
    whole, half = heights(rows), heights([{**row, "accuracy": row["accuracy"] / 2} for row in rows])
    bottom = measured.HEIGHT - measured.BOTTOM
    assert len(whole) == len(rows)
    for high, low in zip(whole, half, strict=True):
        assert abs((bottom - low) - (bottom - high) / 2) <= 0.1  # coordinates have one digit behind the point
    assert measured.chart([{**row, "state_bytes": None} for row in rows]) == ""


def test_the_table_of_images(measured):
    key = {"id": "l2vit", "rate": 0.001}
    common = {"task": "digits", "machine": "a CPU", "date": "2026-01-02", "parameters": 1234}
    rows = [
        {**common, "id": "1", "key": key, "contestant": "l2vit", "family": "linear", "images_per_second": 3000.0},
        {
            **common,
            "id": "2",
            "key": {"id": "dense"},
            "contestant": "dense",
            "family": "reference",
            "images_per_second": 1500.0,
        },
        {
            **common,
            "id": "3",
            "key": key,
            "contestant": "l2vit",
            "family": "linear",
            "accuracy": 0.75,
            "ended": "late",
            "steps": 1,
            "planned": 4,
        },
    ]
    page = measured.images(rows)
    assert "<td>75.0%</td><td>3,000</td><td>2×</td><td>1,234</td><td>0.001</td><td>late after 25%</td>" in page
    assert page.index("l2vit") < page.index(">dense<")
