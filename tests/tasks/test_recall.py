"""Recall of many queries: rows are what the definition says, gaps follow their law, scores tell readers apart."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from saccade.tasks.recall import Difficulty, accuracies, accuracy, recall

RARE = 1e-6  # of a true law: below it, a test calls the law broken
SHAPES = [(8, 2), (12, 2), (12, 3), (64, 4), (64, 16), (30, 7), (128, 32)]


def faults(rows, vocab_size, noise=True):
    """What of the definition the rows break, in words: read from left to right as a person would."""
    pairs, half, found = rows.difficulty.pairs, vocab_size // 2, set()
    for tokens, asked, answers in zip(rows.tokens.tolist(), rows.asked.tolist(), rows.answers.tolist(), strict=True):
        told = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        if len(told) < pairs or len(set(told.values())) < pairs:
            found.add("a key or a value is told twice")
        if not all(1 <= key < half for key in told) or not all(half <= value < vocab_size for value in told.values()):
            found.add("a key or a value of the other half")
        if not all(2 * pairs <= at < rows.difficulty.length for at in asked):
            found.add("a question outside its part of the row")
            continue
        if any(at % 2 for at in asked):
            found.add("a question at an odd place")
        if {tokens[at] for at in asked} != set(told) or len(set(asked)) < pairs:
            found.add("a key is not asked for once")
        if [told.get(tokens[at]) for at in asked] != answers:
            found.add("a wrong answer")
        rest = [token for at, token in enumerate(tokens) if at >= 2 * pairs and at not in asked]
        if not noise and any(rest):
            found.add("noise")
        if not all(0 <= token < vocab_size for token in rest):
            found.add("a token beyond the vocabulary")
        if len(tokens) != rows.difficulty.length:
            found.add("another length")
    return found


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_what_the_definition_says(shape, noise):
    rows = recall(Difficulty(*shape), 50, vocab_size=256, noise=noise, seed=3)
    assert rows.tokens.shape == (50, shape[0])
    assert rows.asked.shape == rows.answers.shape == (50, shape[1])
    assert not faults(rows, 256, noise)


def spoilt(rows, **parts):
    return replace(rows, **parts)


def twice(asked):
    return torch.cat([asked[:, :1], asked[:, :1], asked[:, 2:]], 1)


TWINS = {
    "the answer stands one token on": (lambda r: spoilt(r, asked=r.asked + 1), "a question at an odd place"),
    "answers in the order of the questions": (
        lambda r: spoilt(r, answers=r.answers.gather(1, r.asked.argsort(1))),
        "a wrong answer",
    ),
    "gaps with replacement": (lambda r: spoilt(r, asked=twice(r.asked)), "a key is not asked for once"),
    "gaps from the start of the row": (
        lambda r: spoilt(r, asked=r.asked - 2 * r.difficulty.pairs),
        "a question outside its part of the row",
    ),
    "keys before values": (lambda r: spoilt(r, tokens=r.tokens.flip(1)), "a key or a value of the other half"),
    "a key for all": (
        lambda r: spoilt(r, tokens=torch.where(r.tokens < 32, 5, r.tokens)),
        "a key or a value is told twice",
    ),
    "noise where none was asked for": (lambda r: spoilt(r, tokens=r.tokens.where(r.tokens > 0, 3)), "noise"),
}


@pytest.mark.parametrize("name", TWINS)
def test_broken_rows_are_seen(name):
    spoil, fault = TWINS[name]
    rows = recall(Difficulty(24, 4), 50, vocab_size=64, noise=False)
    assert fault in faults(spoil(rows), 64, noise=False)


def likelihood(found, shares):
    """The p-value of counts (a dict) under probabilities."""
    total = sum(found.values())
    assert not set(found) - set(shares)
    return chisquare([found.get(case, 0) for case in shares], [total * p for p in shares.values()]).pvalue


def counted(table):
    found = {}
    for case in map(tuple, table.tolist()):
        found[case] = found.get(case, 0) + 1
    return found


def of_gaps(places, power):
    """Probability of each first and second gap, drawn one after the other."""
    weights = [power * i ** (power - 1) for i in range(1, places + 1)]
    whole = sum(weights)
    return {
        (a, b): weights[a] / whole * weights[b] / (whole - weights[a])
        for a, b in itertools.permutations(range(places), 2)
    }


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 2.0])
def test_gaps_follow_their_law(power):
    rows = recall(Difficulty(20, 2), 20_000, vocab_size=64, power=power)
    gaps = (rows.asked - 4) // 2
    law = of_gaps(8, power)
    assert likelihood(counted(gaps), law) > RARE
    wrong = {
        "in ascending order": gaps.sort(1).values,
        "from the far end": 7 - gaps,
        "of another power": (recall(Difficulty(20, 2), 20_000, vocab_size=64, power=power + 0.3).asked - 4) // 2,
    }
    same_both_ways = {"from the far end"} if power == 1 else set()
    caught = {name for name, each in wrong.items() if likelihood(counted(each), law) < RARE}
    assert caught == set(wrong) - same_both_ways


def test_keys_and_values_are_drawn_evenly_and_in_any_order():
    rows = recall(Difficulty(8, 2), 20_000, vocab_size=10)
    for table, tokens in ((rows.tokens[:, [0, 2]], range(1, 5)), (rows.tokens[:, [1, 3]], range(5, 10))):
        shares = {case: 1 / (len(tokens) * (len(tokens) - 1)) for case in itertools.permutations(tokens, 2)}
        assert likelihood(counted(table), shares) > RARE
        assert likelihood(counted(table.sort(1).values), shares) < RARE


def test_noise_is_drawn_from_the_whole_vocabulary():
    rows = recall(Difficulty(12, 2), 20_000, vocab_size=16)
    rest = torch.ones_like(rows.tokens, dtype=torch.bool).scatter(1, rows.asked, False)
    rest[:, :4] = False
    shares = {(token,): 1 / 16 for token in range(16)}
    assert likelihood(counted(rows.tokens[rest][:, None]), shares) > RARE


def test_a_seed_says_all():
    make = lambda **more: recall(Difficulty(32, 5), 20, vocab_size=64, **more)  # noqa: E731
    one, again, other, bare = make(seed=4), make(seed=4), make(seed=5), make(seed=4, noise=False)
    for name in ("tokens", "asked", "answers"):
        assert getattr(one, name).equal(getattr(again, name))
        assert not getattr(one, name).equal(getattr(other, name))
    assert one.asked.equal(bare.asked)
    assert one.answers.equal(bare.answers)
    assert not (bare.tokens != one.tokens)[bare.tokens != 0].any()


def test_labels_stand_where_questions_stand():
    rows = recall(Difficulty(20, 3), 7, vocab_size=64)
    labels = rows.labels()
    assert labels.gather(1, rows.asked).equal(rows.answers)
    assert (labels != -100).sum(1).tolist() == [3] * 7


def reader(change=lambda values, keys: values):
    """A model that looks the answers up; `change` may spoil the values that it has read."""

    def read(tokens, asked):
        pairs = asked.shape[1]
        keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
        found = (tokens.gather(1, asked)[:, :, None] == keys[:, None]).int().argmax(2)
        return torch.nn.functional.one_hot(change(values, keys).gather(1, found), 128)

    return read


def test_scores_of_perfect_and_of_wrong_readers():
    rows = recall(Difficulty(64, 8), 37, vocab_size=128)
    assert accuracy(reader(), rows, batch=5) == 1
    assert accuracy(reader(lambda values, keys: values.roll(1, 1)), rows) == 0
    assert accuracy(reader(lambda values, keys: keys), rows) == 0
    first = reader(lambda values, keys: values.where(torch.arange(8) < 2, 0))
    assert accuracy(first, rows, batch=8) == 2 / 8
    half = reader(lambda values, keys: values * (torch.arange(len(values)) % 2)[:, None])
    assert accuracy(half, rows[:36], batch=36) == 1 / 2


def test_scores_by_difficulty():
    tests = [recall(Difficulty(*shape), 4, vocab_size=128) for shape in ((16, 2), (32, 8))]
    found = accuracies(reader(lambda values, keys: values.where(torch.arange(values.shape[1]) < 2, 0)), tests)
    assert found == {"16x2": 1.0, "32x8": 0.25}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"length: got 15; pass an even number", lambda: Difficulty(15, 2)),
        (r"pairs: got 5 for 16 tokens; pass at most 4", lambda: Difficulty(16, 5)),
        (r"pairs: got 0", lambda: Difficulty(16, 0)),
        (r"difficulty: got '64'; pass tokens and pairs", lambda: Difficulty.parse("64")),
        (r"difficulty: got '64x-4'", lambda: Difficulty.parse("64x-4")),
        (r"count: got 0", lambda: recall(Difficulty(16, 2), 0)),
        (r"seed: got -1", lambda: recall(Difficulty(16, 2), 1, seed=-1)),
        (r"power: got 0; pass a number > 0", lambda: recall(Difficulty(16, 2), 1, power=0)),
        (
            r"vocab_size: got 16 for rows of 16 tokens; pass an even",
            lambda: recall(Difficulty(16, 2), 1, vocab_size=16),
        ),
        (r"vocab_size: got 21 for rows of 16 tokens", lambda: recall(Difficulty(16, 2), 1, vocab_size=21)),
        (r"batch: got 0", lambda: accuracy(reader(), recall(Difficulty(16, 2), 1), batch=0)),
    ],
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call()
