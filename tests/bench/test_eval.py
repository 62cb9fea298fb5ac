"""Evaluation: replies in one pass are greedy decoding's, two protocols, intervals, files that are gone on from."""

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import saccade.bench.eval
from saccade.bench import eval_reader
from saccade.bench.eval import Contestant, Evaluation, at_budgets, evaluate
from saccade.bench.eval_reader import (
    Reader,
    Rows,
    agnostic,
    aware,
    decides_early,
    dense,
    either,
    kept_bytes,
    load,
    reads_on,
)
from saccade.bench.eval_records import Cell, Claims, Protocol, append, read_rows, wilson
from saccade.bench.eval_summary import (
    by_contestant,
    by_task,
    dropped,
    gathered,
    lines,
    markdown,
    notes,
    uninformative,
    verdict,
)
from saccade.bench.inputs import Unreadable
from saccade.bench.records import Status
from saccade.hf import apply
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import Bytes, task_named
from saccade.testing.budget import compare

SMALL = LMConfig(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32, max_length=512)


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Reader(LM(SMALL).to_llama(), Bytes(), "small")


# One pass is greedy decoding.

ASKED = [("multi_key", 400, 3), ("key_value", 400, 2), ("long_copy", 300, 1), ("variable_tracking", 500, 1)]


@pytest.mark.parametrize(("name", "length", "questions"), ASKED)
def test_answers_in_one_pass_are_those_of_greedy_decoding(bundled, name, length, questions):
    task = task_named(name)
    examples = task.examples(length, 2, questions=questions, seed=3)
    with dense() as handle:
        found = [scores(examine(bundled, handle, task, examples)) for examine in (either, aware, agnostic)]
    assert found[0] == found[1] == found[2]


def scores(found):
    return [one.scores for one in found]


def test_one_pass_that_looks_at_the_first_tokens_alone_is_noticed(bundled, monkeypatch):
    task = task_named("key_value")
    examples = task.examples(400, 3, questions=2, seed=3)
    true = scores(aware(bundled, None, task, examples))
    assert scores(either(bundled, None, task, examples)) == true

    # The twin takes an answer whose first tokens are right for right.
    class FirstOnly(Rows):
        def read(self, new, keep=1):
            logits = super().read(new, keep)
            if keep > 1:
                told = torch.tensor([[*row[-keep + 5 :], 10] for row in new])
                logits[:, 4:] = torch.nn.functional.one_hot(told, 320)
            return logits

    monkeypatch.setattr(eval_reader, "Rows", FirstOnly)
    assert scores(either(bundled, None, task, examples)) != true


@pytest.mark.parametrize("name", ["multi_key", "variable_tracking"])
def test_without_a_cache_the_scores_are_the_same(bundled, name, monkeypatch):
    task = task_named(name)
    examples = task.examples(450, 2, questions=2, seed=5)
    cached = either(bundled, None, task, examples)
    monkeypatch.setattr(eval_reader, "reads_on", lambda handle: False)
    again = either(bundled, None, task, examples)
    assert scores(again) == scores(cached)
    assert again[0].cache_bytes is None
    mean = sum(len(example.context) for example in examples) / 2
    assert cached[0].cache_bytes == cached[0].dense_bytes == mean * 8 * 2 * 2 * 64 * 4


def test_a_mechanism_that_decides_early_scores_the_same_under_both_protocols(bundled):
    task = task_named("multi_key")
    examples = task.examples(260, 1, questions=2)
    with Contestant.parse("moba(block=32, top_k=4)").enter(bundled.model) as handle:
        assert decides_early(handle)
        found = [scores(examine(bundled, handle, task, examples)) for examine in (either, aware, agnostic)]
    assert found[0] == found[1] == found[2]


# Side by side is one by one.

SIDE_BY_SIDE = ["dense", "combiner", "minference", "adakv(budget=0.5)", "h2o(budget=0.5)", "quest(budget=0.25)",
                "kvcompose(budget=0.5)", "recycled_attention(budget=0.5)"]  # fmt: skip


def replies(monkeypatch, reader, what, examples):
    """What every question is replied with, and what is known of it, under both protocols or in one pass."""
    task, said = task_named("multi_key"), []

    class Told(eval_reader.Reply):
        @property
        def score(self):
            said.append((self.question.text, tuple(self.new)))
            return super().score

    monkeypatch.setattr(eval_reader, "Reply", Told)
    with Contestant.parse(what).enter(reader.model) as handle:
        ways = (either,) if decides_early(handle) else (aware, agnostic)
        found = [[one for chunk in examples for one in way(reader, handle, task, chunk)] for way in ways]
    return sorted(said), [[(one.scores, one.answers_kept, one.questions_kept) for one in each] for each in found]


@pytest.mark.parametrize("what", SIDE_BY_SIDE)
def test_examples_side_by_side_are_replied_to_as_one_by_one(small, monkeypatch, what):
    examples = task_named("multi_key").examples(300, 4, questions=2, seed=1)
    assert len({len(example.context) for example in examples}) > 1  # so that there is padding
    one_by_one = replies(monkeypatch, small, what, [[example] for example in examples])
    assert len(one_by_one[0]) >= 8
    assert replies(monkeypatch, small, what, [examples]) == one_by_one


def test_what_is_kept_of_another_row_is_noticed(small, monkeypatch):
    examples = task_named("multi_key").examples(300, 4, questions=2, seed=1)
    one_by_one = replies(monkeypatch, small, "adakv(budget=0.5)", [[example] for example in examples])
    kept = eval_reader.parts_kept
    monkeypatch.setattr(eval_reader, "parts_kept", lambda cache: kept(cache)[::-1])  # the twin
    assert replies(monkeypatch, small, "adakv(budget=0.5)", [examples]) != one_by_one


@pytest.mark.parametrize("what", ["dense", "moba(block=16)", "h2o(budget=0.5, recent=4)"])
@pytest.mark.parametrize("broken", [False, True])
def test_padding_is_not_seen(small, what, broken):
    # The twin loses the mask.
    reader = replace(small, model=small.model.double())
    texts = [list(range(40)), list(range(60, 87)), list(range(30))]
    with Contestant.parse(what).enter(reader.model):

        def read(texts):
            rows = Rows(reader)
            return torch.cat([rows.read(texts), rows.read([[7]] * len(texts))], 1)

        whole = torch.cat([read([text]) for text in texts])
        if broken:
            reader.model.register_forward_pre_hook(
                lambda module, args, kwargs: (
                    args,
                    {name: x for name, x in kwargs.items() if name != "attention_mask"},
                ),
                with_kwargs=True,
            )
        beside = read(texts)
    assert compare(beside, whole, whole, terms=40).ok != broken


def test_where_memory_runs_out_fewer_are_read_at_once(small, monkeypatch):
    sizes = []

    def narrow(reader, handle, task, examples):
        sizes.append(len(examples))
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return either(reader, handle, task, examples)

    monkeypatch.setitem(saccade.bench.eval.EXAMINE, Protocol.EITHER, narrow)
    options = OPTIONS | {"count": 5, "tasks": ["passkey"]}
    (cell,) = evaluate([], small, **options).cells
    assert sizes == [5, 2, 2, 1]
    assert len(cell.scores) == 5
    monkeypatch.undo()
    assert evaluate([], small, **options).cells[0].scores == cell.scores


# What decides, and what is kept.


@pytest.mark.parametrize(
    ("what", "early", "on"),
    [(None, True, True), ("moba", True, True), ("minference", False, True), ("combiner", True, False)],
)
def test_who_decides_early_and_who_reads_on(small, what, early, on):
    with apply(small.model, what) as handle:
        assert (decides_early(handle), reads_on(handle)) == (early, on)
    with dense() as handle:
        assert (decides_early(handle), reads_on(handle)) == (True, True)


def test_a_mechanism_of_the_whole_prompt_is_asked_a_token_at_a_time(small):
    task = task_named("passkey")
    (example,) = task.examples(200, 1)
    with apply(small.model, "minference") as handle:
        (found,) = agnostic(small, handle, task, [example])
    assert found.cache_bytes == len(example.context) * 2 * 2 * 16 * 4


@pytest.mark.parametrize("examine", [aware, agnostic])
def test_a_policy_that_keeps_everything_is_dense(bundled, examine):
    task = task_named("multi_key")
    (example,) = task.examples(400, 1, questions=3)
    with Contestant.parse("snapkv(budget=1.0)").enter(bundled.model) as handle:
        assert not decides_early(handle)
        assert examine(bundled, handle, task, [example])[0].scores == [1.0, 1.0, 1.0]


def test_a_policy_that_keeps_little_holds_little(small):
    task = task_named("multi_key")
    (example,) = task.examples(400, 1, questions=3)
    with Contestant.parse("knorm(budget=0.25)").enter(small.model) as handle:
        (found,) = agnostic(small, handle, task, [example])
    assert 0.2 < found.cache_bytes / (len(example.context) * 2 * 2 * 16 * 4) < 0.35


def test_a_question_leaves_the_context_for_the_next_as_it_was(bundled, monkeypatch):
    task = task_named("multi_key")
    (example,) = task.examples(400, 1, questions=4)
    sizes = []

    def spy(cache):
        sizes.append(kept_bytes(None, cache))
        return copied(cache)

    copied = eval_reader.copied
    monkeypatch.setattr(eval_reader, "copied", spy)
    agnostic(bundled, None, task, [example])
    assert len(sizes) == 4
    assert len(set(sizes)) == 1
    sizes.clear()
    monkeypatch.setattr(eval_reader, "copied", lambda cache: sizes.append(kept_bytes(None, cache)) or cache)  # the twin
    agnostic(bundled, None, task, [example])
    assert len(set(sizes)) == 4


def test_the_copy_of_a_compressed_cache_is_read_by_the_same_policy(small):
    with Contestant.parse("snapkv(budget=0.5)").enter(small.model):
        _, cache = small.read(list(range(100)))
        copy = eval_reader.copied(cache)
        one, two = (small.read([65], each)[0] for each in (copy, cache))
    assert torch.equal(one, two)


# Contestants.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moba(", r"what: got 'moba\('; pass dense, an id, or one with parameters: moba\("),
        ("moba(4)", r"what: got 'moba\(4\)'; name the parameters"),
        ("moba(size=4)", "what: moba has no parameter 'size'; it has block, top_k"),
        ("mobi", "what: got 'mobi'; choose one of dense, "),
        ("a.b", "what: got 'a.b'; pass dense"),
        ("snapkv(budget=2.0)", "budget: got 2.0; pass a float in"),
        ("gone.json", r"what: no file 'gone\.json'; pass one that saccade tune wrote, or moba\("),
    ],
)
def test_contestants_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Contestant.parse(text)


def test_parameters_reach_every_layer(small):
    with Contestant.parse("moba(block=16, top_k=2)").enter(small.model) as handle:
        assert [(m.block, m.top_k) for m in handle.mechanisms] == [(16, 2)] * 2
    with Contestant.of("mine", ["moba", None]).enter(small.model) as handle:
        assert handle.mechanisms[1] is None


def test_a_file_that_was_tuned_is_a_contestant_at_every_budget_once(small, tmp_path):
    path = tmp_path / "tuned.json"
    dims = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    layers = [{"block": 16, "top_k": 1}, {"block": 32, "top_k": 3}]
    path.write_text(json.dumps({"mechanism": "moba", "dims": dims, "layers": layers}))
    one, *others = at_budgets([str(path), "knorm"], [0.25, 0.5])
    assert [one.name, *(each.name for each in others)] == [str(path), "knorm(budget=0.25)", "knorm(budget=0.5)"]
    with one.enter(small.model) as handle:
        assert [(m.block, m.top_k) for m in handle.mechanisms] == [(16, 1), (32, 3)]
    cells = evaluate([str(path)], small, tasks=["passkey"], lengths=[128], count=1, questions=1).cells
    assert [(cell.what, cell.status) for cell in cells] == [("dense", Status.OK), (str(path), Status.OK)]


# Records.


def cell(**changes):
    about = {
        "model": "m", "what": "dense", "task": "t", "length": 64, "protocol": Protocol.EITHER, "count": 2,
        "questions": 1, "seed": 0, "dtype": "float32", "scores": (1.0, 0.0), "asked": 2, "seconds": 1.5,
    }  # fmt: skip
    return Cell(**(about | changes))


@pytest.mark.parametrize(("right", "count"), [(0, 5), (3, 7), (7, 7), (50, 100)])
def test_the_interval_is_where_the_test_of_the_share_does_not_reject(right, count):
    low, high = wilson(right / count, count)
    share = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    accepted = share[(right / count - share).abs() <= 1.959963984540054 * (share * (1 - share) / count).sqrt()]
    assert low == pytest.approx(float(accepted[0]), abs=1e-5)
    assert high == pytest.approx(float(accepted[-1]), abs=1e-5)


def test_cells_come_back_from_a_file(tmp_path):
    path = tmp_path / "results.jsonl"
    cells = [cell(), cell(what="moba", protocol=Protocol.AWARE, cache_bytes=7)]
    assert read_rows(path, Cell) == ([], {})
    for one in cells:
        append(path, one, {"cores": 2})
    assert read_rows(path, Cell) == (cells, {"cores": 2})
    row = json.loads(path.read_text().splitlines()[0])
    assert (row["score"], row["environment"]) == (0.5, {"cores": 2})
    assert row["low"] < 0.5 < row["high"]
    path.write_text(path.read_text() + '{"model": "cut sh')
    assert read_rows(path, Cell)[0] == cells
    append(path, cell(task="u"), {})
    assert read_rows(path, Cell)[0] == [*cells, cell(task="u")]


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"model": 1}', "[1]"])
def test_a_file_of_something_else_is_refused(line, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"out: line 1 of .* is no cell of an evaluation"):
        read_rows(path, Cell)[0]


def test_only_what_is_ok_has_scores():
    for changes in ({"status": Status.WRONG}, {"scores": ()}):
        with pytest.raises(ValueError, match="scores: got"):
            cell(**changes)


# The whole of it.

OPTIONS = {"tasks": ["passkey", "multi_key"], "lengths": [200], "count": 2, "questions": 2}


def test_an_evaluation_goes_on_where_it_was(small, tmp_path):
    path = tmp_path / "results.jsonl"
    seen = []
    first = evaluate(["minference"], small, folder=tmp_path, progress=lambda *told: seen.append(told), **OPTIONS)
    assert [(c.what, c.task, c.protocol, c.status) for c in first.cells] == [
        ("dense", "passkey", "either", "OK"),
        ("dense", "multi_key", "either", "OK"),
        ("minference", "passkey", "query-aware", "OK"),
        ("minference", "passkey", "query-agnostic", "OK"),
        ("minference", "multi_key", "query-aware", "OK"),
        ("minference", "multi_key", "query-agnostic", "OK"),
    ]
    assert {c.asked for c in first.cells} == {2, 4}
    assert seen[-1] == (4, 4, "done")
    written = read_rows(path, Cell)[0]
    assert [(c.task, c.what) for c in written[:3]] == [("passkey", "dense"), *[("passkey", "minference")] * 2]
    assert {*written} == {*first.cells}
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # stopped before the last

    calls = []
    small.model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate(["minference"], small, folder=tmp_path, **OPTIONS)
    assert again.reused == 5
    assert [replace(c, seconds=0) for c in again.cells] == [replace(c, seconds=0) for c in first.cells]
    calls.clear()
    assert evaluate(["minference"], small, folder=tmp_path, **OPTIONS).reused == 6
    assert not calls
    assert evaluate([], small, folder=tmp_path, **(OPTIONS | {"seed": 1})).reused == 0


def test_what_fails_is_told_and_not_written(small, tmp_path):
    def broken(model):
        raise RuntimeError("no such luck")

    found = evaluate(
        [Contestant("broken", broken)],
        small,
        folder=tmp_path,
        **OPTIONS,
    )
    assert [(c.what, c.status) for c in found.cells][2:] == [("broken", "WRONG")] * 2
    assert {c.what for c in read_rows(tmp_path / "results.jsonl", Cell)[0]} == {"dense"}
    assert dropped(found) == ["broken: WRONG: crashed: RuntimeError: no such luck (2 tasks and lengths)"]


def test_an_interrupt_leaves_what_was_found(small, tmp_path):
    def stopped(model):
        raise KeyboardInterrupt

    found = evaluate(["knorm", Contestant("stopped", stopped)], small, folder=tmp_path, **OPTIONS)
    assert [(cell.what, cell.task) for cell in found.cells] == [("dense", "passkey"), *[("knorm", "passkey")] * 2]
    assert found.left == 4
    assert len(read_rows(tmp_path / "results.jsonl", Cell)[0]) == 3


def test_waves_tasks_and_lengths_come_in_the_order_they_were_given_in(small):
    said = []
    options = {"tasks": ["multi_key", "passkey"], "lengths": [240, 200], "count": 1, "questions": 1}
    contestants = at_budgets(["knorm", "moba"], [0.25, 0.5])
    found = evaluate(contestants, small, progress=lambda at, total, text: said.append(text), **options)
    first = [f"{what}, {task}, {length} tokens" for task in options["tasks"] for length in options["lengths"]
             for what in ("dense", "knorm(budget=0.25)", "moba")]  # fmt: skip
    assert said[:12] == first
    assert said[12:-1] == [text.replace("0.25", "0.5") for text in first if "knorm" in text]
    assert [cell.length for cell in found.cells] == sorted(cell.length for cell in found.cells)


def test_what_dense_attention_cannot_do_is_asked_of_nothing_else(small, bundled):
    options = OPTIONS | {"lengths": [300]}
    found = evaluate(["knorm"], small, answered=True, **options)
    assert [(cell.what, cell.task) for cell in found.cells] == [("dense", "passkey"), ("dense", "multi_key")]
    assert found.left == 0
    assert len(evaluate(["knorm"], bundled, answered=True, **options).cells) == 6


def test_processes_share_the_work_of_a_folder(small, tmp_path):
    # Another process is at one pair when this one comes by, and has finished it when this one comes back.
    whole = evaluate(["knorm"], small, **OPTIONS).cells
    theirs = [cell for cell in whole if (cell.what, cell.task) == ("knorm", "passkey")]
    path, program = tmp_path / "results.jsonl", (
        "import sys, time, pickle\nfrom pathlib import Path\n"
        "from saccade.bench.eval_records import Claims, append\n"
        "folder, key, cells = Path(sys.argv[1]), *pickle.loads(bytes.fromhex(sys.argv[2]))\n"
        "with Claims(folder / '.claims').take(key) as free:\n"
        "    print(free, flush=True)\n    sys.stdin.readline()\n"
        "    [append(folder / 'results.jsonl', cell, {}) for cell in cells]\n"
    )  # fmt: skip
    key = theirs[0].key._replace(protocol=Protocol.EITHER)
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), pickle.dumps((key, theirs)).hex()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout.readline() == "True\n"
        with Claims(tmp_path / ".claims").take(key, wait=False) as free:
            assert not free
        said = []

        def told(at, total, text):
            said.append(text)
            if text == "knorm, passkey, 200 tokens" and said.count(text) == 2:
                other.stdin.write("\n")
                other.stdin.flush()

        found = evaluate(["knorm"], small, folder=tmp_path, progress=told, **OPTIONS)
    assert said == ["dense, passkey, 200 tokens", "knorm, passkey, 200 tokens", "dense, multi_key, 200 tokens",
                    "knorm, multi_key, 200 tokens", "knorm, passkey, 200 tokens", "done"]  # fmt: skip
    assert [replace(cell, seconds=0) for cell in found.cells] == [replace(cell, seconds=0) for cell in whole]
    assert found.reused == 2
    assert len(path.read_text().splitlines()) == len(whole)


def test_rows_of_several_runs_are_one_report(tmp_path):
    append(tmp_path / "a" / "results.jsonl", cell(what="cut", task="t"), {"time": "2"})
    append(tmp_path / "a" / "results.jsonl", cell(count=3, scores=(1.0, 1.0, 0.0)), {"time": "1"})
    append(tmp_path / "b" / "results_2.jsonl", cell(), {"time": "3"})
    found = gathered(tmp_path)
    assert [(one.what, one.count) for one in found.cells] == [("dense", 3), ("cut", 2)]
    assert found.environment == {"time": "3"}
    assert gathered(tmp_path, ["t"], [64]).cells == found.cells
    for missing in ({"tasks": ["u"]}, {"lengths": [65]}):
        with pytest.raises(ValueError, match="out: no rows of an evaluation in "):
            gathered(tmp_path, **missing)
    append(tmp_path / "results.jsonl", cell(dtype="bfloat16"), {})
    with pytest.raises(ValueError, match=r"holds rows of m in bfloat16, m in float32; pass those of one"):
        gathered(tmp_path)


def test_a_budget_ends_it(small):
    found = evaluate(["moba"], small, budget=1e-9, **OPTIONS)
    assert (found.cells, found.left) == ((), 4)
    assert "4 left, the same command goes on" in verdict(found)


def test_what_takes_too_long_is_told_once_and_not_tried_again(small):
    tried = []

    def slow(model):
        tried.append(1)
        time.sleep(60)

    contestants = [Contestant("slow(a=1)", slow), Contestant("slow(a=2)", slow), "knorm"]
    found = evaluate(contestants, small, limit=1.0, **(OPTIONS | {"tasks": ["passkey"]}))
    assert [(cell.what, cell.status) for cell in found.cells] == [
        ("dense", "OK"), ("slow(a=1)", "TIMEOUT"), ("knorm", "OK"), ("knorm", "OK"),
    ]  # fmt: skip
    assert (len(tried), found.left) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["sorting"]}, "task: got 'sorting'; choose one of "),
        ({"lengths": [50, 200]}, r"length: got 50 tokens; (passkey|multi_key) needs at least \d+"),
        ({"lengths": [1024]}, "lengths: got 1024; small reads at most 512 tokens"),
        ({"lengths": []}, "lengths: got none"),
        ({"count": 0}, "count: got 0"),
        ({"questions": 0}, "questions: got 0"),
    ],
)
def test_bad_input(small, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(["moba"], small, **(OPTIONS | changes))


# The summary.


def evaluation():
    rows = []
    for task, scores in {"easy": (1.0, 1.0), "hard": (0.5, 1.0), "floor": (0.0, 0.25)}.items():
        rows.append(cell(task=task, scores=scores, cache_bytes=2048))
        for protocol, lost in ((Protocol.AWARE, 0.25), (Protocol.AGNOSTIC, 0.5)):
            less = tuple(max(0.0, score - lost) for score in scores)
            rows.append(cell(what="cut", task=task, protocol=protocol, scores=less, cache_bytes=512))
    return Evaluation(tuple(rows))


def test_tasks_that_dense_attention_cannot_do_are_marked_and_in_no_mean():
    found = evaluation()
    assert uninformative(found) == {("floor", 64)}
    head, rows = by_task(found)
    assert head == ["task", "tokens", "dense", "cut"]
    assert [row[0] for row in rows] == ["easy", "floor †", "hard"]
    assert rows[1][3].startswith("0.00 (")
    assert any("† Dense attention scores below 0.5" in note and "(floor)" in note for note in notes(found))
    assert [(line.what, line.protocol, len(line.cells), line.mean) for line in lines(found)] == [
        ("dense", "either", 2, 0.875),
        ("cut", "query-aware", 2, 0.625),
        ("cut", "query-agnostic", 2, 0.375),
    ]
    _, rows = by_contestant(found)
    assert rows[2] == ["cut", "64", "query-agnostic", "2 of 3", "0.38", "0.25 hard", "512 B", "4"]


def test_one_line_says_what_was_found():
    assert verdict(evaluation()).startswith(
        "2 of 3 tasks and lengths tell something; least lost at 64: cut, mean 0.38, worst 0.25 (hard); "
    )


def test_markdown_has_every_score():
    text = markdown(evaluation())
    assert "| easy | 64 | 1.00 (0.34-1.00) | 0.75 (" in text
    assert "| floor † |" in text
    assert text.count("| --- |") >= 1


def test_a_model_that_is_not_there():
    with pytest.raises(Unreadable, match=r"model: transformers cannot load '/nowhere/at/all': .*; pass bundled, an id"):
        load("/nowhere/at/all")


def test_what_a_policy_draws_is_the_same_every_time(small, monkeypatch):
    """Rows of two processes belong together, and who asks finds its own random numbers as they were."""
    monkeypatch.setattr(saccade.bench.eval, "apply", lambda model, what: torch.rand(3))
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append(Contestant.of("random", None).enter(small.model))
        assert torch.get_rng_state().equal(before)
    assert drawn[0].equal(drawn[1])


def test_every_policy_is_timed(small):
    """What cannot take several tokens behind a cache decodes single ones all the same."""
    loki = at_budgets(["loki"], [0.5])
    found = evaluate(loki, small, tasks=["passkey"], lengths=[160], count=1, scores=False, decode=0.01)
    assert {row.what for row in found.times} == {"dense", "loki(budget=0.5)"}
