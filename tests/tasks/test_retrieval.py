"""Retrieval tasks: samples are what they claim to be, and scores tell a perfect model from a wrong one."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.hosts.lm import LM
from saccade.tasks.retrieval import TASKS, Sample, digits, exact, samples, score, words
from saccade.tasks.text import HELD_OUT, LEFT_OUT, held_out_text, python_text

LINE = rb"\nThe (?:code for [a-z]+|pass key) is [0-9]+\.\n"
EACH = pytest.mark.parametrize("task", TASKS)


class Reader:
    """tokens -> logits of a model that looks each answer up; `change` may spoil what it found."""

    def __init__(self, change=lambda answer: answer):
        self.change = change

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, 320)
        for row, scores in zip(tokens, logits, strict=True):
            text = bytes(row.tolist())
            question = max(text.rfind(b"\nThe code for "), text.rfind(b"\nThe pass key is "))
            stop = text.index(b" is ", question) + 4
            known = text.index(text[question:stop]) + stop - question
            answer = self.change(text[known : text.index(b".", known) + 1])
            for at, byte in enumerate(answer[: len(text) - stop + 1]):
                scores[stop - 1 + at, byte] = 1
        return logits


@EACH
@pytest.mark.parametrize("length", [200, 513, 2048])
def test_a_sample_is_needles_in_one_piece_of_held_out_text(task, length):
    for sample in samples(task, length, 20):
        assert len(sample.tokens) == length == sample.answer[1]
        assert sample.prompt + sample.expected == sample.tokens
        question = re.search(rb"\nThe [a-z ]+ is $", sample.prompt)[0]
        hay = sample.prompt[: -len(question)]
        assert re.fullmatch(rb"[1-9][0-9]{%d}\." % (4 if task == "passkey" else 6), sample.expected)
        assert hay.count(question + sample.expected + b"\n") == 1
        assert hay.count(question) == 1
        assert hay.count(sample.expected) == 1
        assert len(re.findall(LINE, hay)) == (4 if task == "multi_key" else 1)
        assert re.sub(LINE, b"", hay) in held_out_text()


@EACH
def test_needles_lie_at_all_depths(task):
    drawn = samples(task, 4096, 200, seed=3)
    depths = [s.prompt.index(s.expected) / len(s.prompt) for s in drawn]
    assert np.histogram(depths, bins=10, range=(0, 1))[0].min() > 0


def test_every_key_is_asked_for():
    ranks = set()
    for sample in samples("multi_key", 1024, 60):
        codes = re.findall(rb"The code for [a-z]+ is ([0-9]+\.)\n", sample.prompt)
        assert len(set(codes)) == 4
        ranks.add(codes.index(sample.expected))
    assert ranks == {0, 1, 2, 3}


@EACH
def test_a_seed_says_all(task):
    assert samples(task, 600, 5, seed=4) == samples(task, 600, 5, seed=4)
    assert samples(task, 600, 5, seed=4) == samples(task, 600, 8, seed=4)[:5]
    assert not set(samples(task, 600, 5, seed=4)) & set(samples(task, 600, 5, seed=5))


def test_another_text():
    for sample in samples("single_needle", 500, 4, text=b"abc" * 500):
        assert re.sub(LINE, b"", sample.prompt).rsplit(b"\n", 1)[0] in b"abc" * 500


@EACH
def test_scores_of_a_perfect_and_of_wrong_models(task):
    def wrong_in_the(place):
        def change(answer):
            at = range(len(answer))[place]
            return answer[:at] + (b"0" if answer[at : at + 1] != b"0" else b"1") + answer[at + 1 :]

        return change

    assert score(Reader(), task, 700, 10, batch=4) == 1
    assert score(lambda tokens: torch.zeros(*tokens.shape, 320), task, 700, 10) == 0
    assert score(lambda tokens: torch.nn.functional.one_hot(tokens, 320), task, 700, 10) == 0
    for place in (0, 3, -1):
        assert score(Reader(wrong_in_the(place)), task, 700, 10) == 0


def test_one_right_and_one_wrong():
    one, two = samples("passkey", 300, 2)
    key = two.expected
    assert exact(Reader(lambda answer: b"00000." if answer == key else answer), [one, two, one]) == [True, False, True]


def test_the_shipped_model_answers():
    model = LM.from_pretrained()
    drawn = [samples(task, 2048, 1, seed=7)[0] for task in TASKS]
    assert exact(model, drawn) == [True] * len(TASKS)
    one = drawn[1]
    new = model.generate(torch.tensor(list(one.prompt))[None], len(one.expected))
    assert bytes(new[0].tolist()) == one.expected


def test_digits_do_not_begin_with_zero():
    rng = np.random.default_rng(0)
    drawn = [digits(rng, 2) for _ in range(2000)]
    assert {int(d) for d in drawn} == set(range(10, 100))


def test_held_out_modules_are_not_in_the_text():
    # Ten lines from the middle of each held-out module are in the one text and not in the other.
    for name in HELD_OUT:
        assert name not in LEFT_OUT
        module = name.removesuffix(".py")
        source = Path(importlib.import_module(module).__file__).read_bytes()
        lines = b"\n".join(source.splitlines()[200:210])
        assert lines in held_out_text(), name
        assert lines not in python_text(), name
    assert len(python_text()) > 8 * len(held_out_text())


def test_words_are_words_of_the_text():
    assert len(words()) == len(set(words())) > 1000
    assert all(re.fullmatch(rb"[a-z]{4,9}", word) for word in words())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"task: got 'sorting'; choose one of single_needle, multi_key, passkey", lambda: samples("sorting", 100, 1)),
        (r"length: got 60 tokens; multi_key needs at least 1\d\d", lambda: samples("multi_key", 60, 1)),
        (r"length: got 0; pass an integer >= 1", lambda: samples("passkey", 0, 1)),
        (r"count: got 0", lambda: samples("passkey", 100, 0)),
        (r"seed: got -1", lambda: samples("passkey", 100, 1, seed=-1)),
        (r"batch: got 0", lambda: score(Reader(), "passkey", 100, 1, batch=0)),
        (r"text: got an empty one; pass a haystack", lambda: samples("passkey", 100, 1, text=b"")),
        (
            r"group: got samples of \[5, 6\] bytes",
            lambda: exact(Reader(), [Sample(b"12345", (3, 5)), Sample(b"123456", (4, 6))]),
        ),
    ],
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call()
