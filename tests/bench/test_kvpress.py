"""benchmarks/kvpress_cpu.py without kvpress: its two processes are the worker's saccade side, and a stub."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.bench import eval_reader
from saccade.cache import Uniform
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import Bytes, task_named

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """(kvpress_cpu, kvpress_worker)"""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield tuple(importlib.import_module(name) for name in ("kvpress_cpu", "kvpress_worker"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def side(scripts):
    """The worker's side of saccade with a model of two layers, which is not trained."""
    torch.manual_seed(0)
    found = object.__new__(scripts[1].Saccade)
    found.model = LM(LMConfig(num_layers=2)).to_llama()
    return found


STUB = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    told = {"seconds": asked.get("count", 0) * REPLY}
    print(json.dumps({"error": "no such thing"} if asked["do"] == "fail" else told))
    sys.stdout.flush()
"""


@pytest.fixture
def stubs(scripts):
    """Two processes; a token of the first takes twice as long as one of the second."""
    found = [scripts[0].Process([sys.executable, "-c", STUB.replace("REPLY", each)]) for each in ("2.0", "1.0")]
    yield found
    for each in found:
        each.end()


def test_tokens_are_timed_in_turns(scripts, stubs):
    cpu, _ = scripts
    found = cpu.timed(*stubs, seconds=1.0)
    assert (found["token theirs ms"], found["token ours ms"], found["speed-up"]) == (2000.0, 1000.0, 2.0)
    assert found["low"] == found["high"] == 2.0


def test_what_fails_in_a_process_fails_here(scripts, stubs):
    with pytest.raises(RuntimeError, match="no such thing"):
        stubs[0]("fail")
    gone = scripts[0].Process([sys.executable, "-c", "raise SystemExit(3)"])
    gone.inner.wait()
    with pytest.raises(RuntimeError, match="it ended with 3"):
        gone.receive()
    gone.end()


@pytest.mark.parametrize("aware", [True, False])
def test_the_worker_answers_as_the_evaluation_does(scripts, side, aware):
    cpu, worker = scripts
    task = task_named("multi_key")
    (example,) = task.examples(300, 1, questions=2)
    questions = [Bytes().encode(question.text) for question in example.questions]
    pair = next(pair for pair in cpu.PAIRS if pair.name == "keydiff")
    what, made = pair.ours(60), worker.Worker(side)
    with torch.no_grad():
        found = made.answer(what, list(example.context), questions, aware, 6)
        reader = eval_reader.Reader(side.model, Bytes(), "")
        with side.decoded(what):
            replies = []
            for question in questions[:1] if aware else questions:
                parts = [[*example.context, *question]] if aware else [[*example.context], *([x] for x in question)]
                stream = eval_reader.Stream(reader, [])
                for part in parts:
                    stream.unread = part
                    token = stream.likeliest()
                replies.append([token])
                while len(replies[-1]) < 6:
                    stream.unread = replies[-1][-1:]
                    replies[-1].append(stream.likeliest())
    assert found["replies"] == replies
    kept = worker.unpacked(json.loads(json.dumps(found["kept"])), found["shape"])
    assert kept.sum(-1).tolist() == [[60, 60]] * 2
    assert 0 < found["held"] < found["reading"]
    assert made.step(3)["seconds"] > 0
    assert made.close() == {}


def test_every_policy_can_be_made(scripts):
    cpu, worker = scripts
    for pair in cpu.PAIRS:
        for each in filter(None, (pair.ours, pair.own)):
            what = each(cpu.tokens_of([0] * 4000))
            tokens = [] if what is None else [worker.policy(what).tokens(4000, layer, 8) for layer in range(8)]
            assert what is None or abs(sum(tokens) / 8 - 1000) < 1, pair.name
    assert len({pair.name for pair in cpu.PAIRS}) == len(cpu.PAIRS)


def test_their_pyramid(scripts):
    """From 2 b - b / 20 to b / 20 over all tokens; uniform where that is less than the window."""
    made = scripts[1].definitions()["PyramidOfAll"](0.25)
    assert isinstance(made, Uniform)
    assert [made.tokens(4000, layer, 4, 32) for layer in range(4)] == [1950, 1317, 683, 50]
    assert [made.tokens(2000, layer, 4, 32) for layer in range(4)] == [500] * 4


def test_the_difference_has_a_standard_error(scripts):
    difference, error = scripts[0].paired([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0])
    assert (difference, error) == (0.25, pytest.approx(0.25))


def test_keys_are_known_again(scripts):
    keys = torch.randn(1, 2, 9, 8)
    keys[0, 1, 4] = keys[0, 1, 5] * (1 + 2**-22)
    found = scripts[1].marks(keys)
    assert all(len(np.unique(row)) == 9 for row in found)
    assert np.isin(found[1], scripts[1].marks(keys[:, :, [3, 4]])[1]).nonzero()[0].tolist() == [3, 4]
