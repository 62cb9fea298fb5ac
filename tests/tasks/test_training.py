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
from torch import nn
from torch.nn import functional as F

import saccade
from saccade.cache.recorded import CudaGraph
from saccade.contract import Dims
from saccade.testing import assert_close
from saccade.testing.budget import same_bits
from saccade.testing.tape import Tape

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


# Recorded steps.


class Taped(Tape):
    """What `backward` told is on the tape; it is not to be recorded by autograd once more."""

    def replay(self):
        with torch.no_grad():
            super().replay()


class Again:
    """A recording that is none: what it is to do, it runs."""

    def __init__(self, run):
        self.result, self.replay = None, run


class Broken:
    """Cannot record."""

    def __init__(self, run):
        try:
            raise ValueError("the device was asked for a number")
        except ValueError:
            raise RuntimeError("broken off")  # noqa: B904  as a graph does it


class Mean(nn.Module):
    """x W - m, m a running mean, which every call binds anew."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        y = self.project(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * y.detach().mean(0)
        return y - self.mean


def small_training(sweep, graph, *, device="cpu", dtype=torch.float32, factor=lambda: 1):
    """All that `train` leaves in a `Mean`, in one vector, and its row: six epochs of batches of 8, 8 and 5 rows."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(21, width, generator=generator).to(device, dtype) for width in (3, 2))
    model = Mean()
    with torch.no_grad():
        for part in model.parameters():
            part.copy_(torch.randn(part.shape, generator=generator))
    model.to(device, dtype)

    def batches(epoch):
        order = torch.randperm(21, generator=torch.Generator().manual_seed(epoch)).to(device)
        return ((x[chosen], y[chosen]) for chosen in order.split(8))

    def loss(x, y):
        return factor() * (model(x) - y).square().mean()

    clock, recipe = sweep.Clock(lambda share: None), sweep.Recipe(6, 8)
    row = sweep.train(model, recipe, 0.03, batches, loss, 3, lambda: 0.0, clock, device, graph)
    return torch.cat([part.flatten() for part in model.state_dict().values()]), row


def test_replayed_steps_do_what_they_did(sweep):
    """Weights, the rate of every epoch and buffers that are bound anew, to the last bit."""
    found, row = small_training(sweep, Taped)
    truth, _ = small_training(sweep, Again)
    assert same_bits(found, truth)
    assert row["recorded"]
    assert row["steps"] == row["planned"] == 18


def test_a_rate_that_is_bound_anew_is_not_found(sweep, monkeypatch):
    class Halves:
        def __init__(self, optimizer, epochs):
            self.groups = optimizer.param_groups

        def step(self):
            for group in self.groups:
                group["lr"] = 0.5 * group["lr"]

    monkeypatch.setattr(torch.optim.lr_scheduler, "CosineAnnealingLR", Halves)
    assert not same_bits(small_training(sweep, Taped)[0], small_training(sweep, Again)[0])


def test_a_buffer_that_is_bound_anew_is_not_found(sweep, monkeypatch):
    monkeypatch.setattr(sweep.Steps, "_in_place", lambda self, inputs: self.run(*inputs))
    assert not same_bits(small_training(sweep, Taped)[0], small_training(sweep, Again)[0])


def test_what_python_decided_stays_decided(sweep):
    """The steps of the test above are replayed indeed: one that counts would do something else."""
    founds = []
    for graph in (Taped, Again):
        numbers = iter(range(100))
        founds.append(small_training(sweep, graph, factor=lambda numbers=numbers: next(numbers))[0])
    assert not same_bits(*founds)


def test_nothing_is_recorded_without_a_graph(sweep):
    found, row = small_training(sweep, None)
    assert not row["recorded"]
    assert_close(found, small_training(sweep, None, dtype=torch.float64)[0], found, terms=8)


def test_numbers_drawn_on_the_host_are_not_recorded(sweep):
    """On a CPU those of dropout are."""
    out = torch.zeros(100)
    step = sweep.Steps(lambda x: out.copy_(F.dropout(x)), nn.Identity(), Taped)
    for _ in range(3):
        step(torch.ones(100))
    with pytest.raises(sweep.NotRecorded, match="random numbers were drawn on the host"):
        step(torch.ones(100))


def test_a_failure_to_record_says_what_broke_it_off(sweep):
    step = sweep.Steps(lambda: None, nn.Identity(), Broken, few=0)
    with pytest.raises(sweep.NotRecorded, match=r"^ValueError: the device was asked for a number$"):
        step()


def recording(job, clock, device):
    """A work of steps; the process dies that is to record the number 13."""
    from sweep import Steps  # in a worker, the module that it has

    if job.key["number"] == 13 and job.graph is not None:
        os._exit(7)
    total = torch.zeros((), device=device)

    def run():
        total.add_(1)
        if job.key["number"] == 5:
            total.item()

    step = Steps(run, nn.Identity(), job.graph)
    for _ in range(6):
        step()
    return {"total": total.item(), "recorded": step.replays > 0, "process": os.getpid()}


def recorded_jobs(sweep, path, *numbers, **more):
    """number -> row; the contestant of 5 and 6 is the same."""
    jobs = tasks(sweep, *numbers)
    jobs = [dataclasses.replace(job, contestant=jobs[0].contestant) if job.key["number"] == 6 else job for job in jobs]
    rows = sweep.Sweep(path, recording, **more).run(jobs)
    return {row["key"]["number"]: row for row in rows}


def test_what_cannot_be_recorded_is_done_without_in_a_new_process(sweep, tmp_path):
    rows = recorded_jobs(sweep, tmp_path / "broken.jsonl", 5, 6, workers=1, graph=Broken)
    assert {row["unrecorded"] for row in rows.values()} == {"ValueError: the device was asked for a number"}
    assert [(row["recorded"], row["total"]) for row in rows.values()] == [(False, 6.0), (False, 6.0)]
    assert len({row["process"] for row in rows.values()}) == 1  # the other did not try
    assert recorded_jobs(sweep, tmp_path / "broken.jsonl", 5, 6) == rows


def test_a_process_that_dies_of_recording_is_followed_by_one_that_does_not_record(sweep, tmp_path):
    rows = recorded_jobs(sweep, tmp_path / "rows.jsonl", 1, 13, 2, workers=1, graph=Taped)
    assert [(row["recorded"], row["total"]) for row in rows.values()] == [(True, 6.0), (False, 6.0), (True, 6.0)]
    assert rows[13]["unrecorded"] == "the process ended with code 7"
    assert "unrecorded" not in rows[2]


def test_nothing_is_recorded_in_the_process_of_the_sweep(sweep, tmp_path):
    rows = recorded_jobs(sweep, tmp_path / "rows.jsonl", 1, graph=Broken)
    assert (rows[1]["recorded"], "unrecorded" in rows[1]) == (False, False)


def test_both_trainings_are_recorded(training, small):
    """As without dropout, where the host would draw; with the row that they have without a tape."""
    recall, images, contestant = training["recall"], training["images"], training["sweep"].Contestant
    clock = training["sweep"].Clock(lambda share: None)
    bare = dataclasses.replace(small, train=((64, 4, 320), (32, 2, 200)), epochs=2, dropout=0.0)
    pixels = dataclasses.replace(images.PROTOCOLS[0], epochs=5, batch=512, width=16, depth=1)
    for script, (*_, job) in (
        (recall, recall.jobs(bare, [contestant("gla")], [])),
        (images, images.jobs([pixels], [contestant("l2vit")], [3e-3])),
    ):
        found, truth = (script.do(dataclasses.replace(job, graph=graph), clock, "cpu") for graph in (Taped, Again))
        assert found == truth
        assert found["recorded"]


@pytest.mark.gpu
def test_a_gpu_replays_the_steps_of_a_training(sweep):
    found, row = small_training(sweep, CudaGraph, device="cuda")
    eager, plain = small_training(sweep, None, device="cuda")
    truth, _ = small_training(sweep, None, dtype=torch.float64)
    assert (row["recorded"], plain["recorded"]) == (True, False)
    assert_close(found.cpu(), truth, eager.cpu(), terms=8)


@pytest.mark.gpu
def test_dropout_of_a_replay_is_drawn_anew(sweep):
    out, x, masks = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda"), set()
    with sweep.aside("cuda"):
        step = sweep.Steps(lambda x: out.copy_(F.dropout(x)), nn.Identity(), CudaGraph)
        for _ in range(8):
            step(x)
            masks.add(tuple(out.tolist()))
    assert step.replays == 5
    assert len(masks) == 8


@pytest.mark.gpu
def test_what_a_gpu_cannot_record_is_done_without(sweep, tmp_path):
    """That is the number 5, whose steps ask the device for a number; the other contestants are recorded."""
    rows = recorded_jobs(sweep, tmp_path / "rows.jsonl", 5, 6, 1, workers=1, device="cuda")
    assert [(row["recorded"], row["total"]) for row in rows.values()] == [(False, 6.0), (False, 6.0), (True, 6.0)]
    assert "capturing" in rows[5]["unrecorded"]
    assert "unrecorded" not in rows[1]


@pytest.mark.gpu
def test_a_gpu_records_both_trainings(training, small):
    recall, images, contestant = training["recall"], training["images"], training["sweep"].Contestant
    clock = training["sweep"].Clock(lambda share: None)
    pixels = dataclasses.replace(images.PROTOCOLS[0], epochs=8, batch=64, width=32, depth=1)
    for script, (*_, job), enough in (
        (recall, recall.jobs(small, [contestant("dense", {"causal": True})], []), 0.5),
        (images, images.jobs([pixels], [contestant("l2vit")], [3e-3]), 0.5),
    ):
        row = script.do(dataclasses.replace(job, graph=CudaGraph), clock, "cuda")
        assert row["recorded"]
        assert row["accuracy"] > enough


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
    with_mass = bytes_of(contestant("trainable_ff_kernel", {"causal": True}), 64, 8)
    assert with_mass == 2 * 2 * 4 * 32 * (32 + 1)
    assert bytes_of(contestant("trainable_ff_kernel", {"causal": False}), 64, 8) is None
    assert bytes_of(contestant("agent_attention"), 64, 8) is None


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
    assert ">gla</text>" in page
    assert page.count("<title>dense, width") == 2
    assert page.count(">dense</text>") == 1  # at the widest
    assert "late after 50%" in page
    assert "<li><code>rat</code>: E: &lt;no&gt;</li>" in page
    assert 'href="gallery/gla.html"' in page
    assert "A CPU; 2026-01-02 to 2026-01-03." in page
    assert "currentColor" in page


def test_other_parameters_have_a_dot_and_no_name(measured, trained, small):
    rows = [row for row in rows_of_recall(trained, small) if row["contestant"] == "gla" and "accuracy" in row]
    drawn = measured.chart([*rows, *({**row, "contestant": "gla (kind=other)"} for row in rows)])
    assert drawn.count("<circle") == 2 * len(rows)
    assert drawn.count("<title>gla (kind=other), width") == len(rows)
    assert "(kind=other)</text>" not in drawn


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
