"""Generated tasks: exact lengths, answers where they belong and nowhere else, scorers that reject near misses."""

import re
from collections import Counter

import numpy as np
import pytest

from saccade.tasks import prompts
from saccade.tasks.prompts import Bytes, Draft, Question, Ruler, Task, characters, exact_text, largest, overlap, tasks
from saccade.tasks.text import held_out_text

LENGTH = 1100
NAMES = sorted(tasks())
EACH = pytest.mark.parametrize("name", NAMES)


class Pairs:
    """Two letters a token where both are letters, and a token that all begins with: lengths do not add up."""

    start = (7,)

    def encode(self, text):
        return [hash_of(part) for part in re.findall(r"[a-z]{2}|.|\n", text)]

    def decode(self, tokens):
        raise AssertionError("not needed to make prompts")


def hash_of(part):
    return 1000 + sum(ord(c) * 256**i for i, c in enumerate(part))


def drawn(name, length=LENGTH, count=6, questions=4, **options):
    return tasks()[name].examples(length, count, questions=questions, **options)


def total(example, tokenizer):
    asked = [len(tokenizer.encode(q.text)) + len(tokenizer.encode(q.answer)) for q in example.questions]
    return len(example.context) + max(asked)


def faults(name, example):
    """What is wrong with an example, by rules that share nothing with the generators."""
    return [
        fault
        for question in example.questions
        for fault in RULES[name](example.text, question.text, question.answer.strip())
    ]


# One rule a task: (context, question, answer) -> faults.


def told_once(line, lines):
    """The line that answers stands in the context once; other lines of its kind differ in key and in value."""

    def rule(context, question, answer):
        ask = question.strip().splitlines()[-1]
        if context.count(f"{ask} {answer}") != 1:
            yield f"the answer is told {context.count(f'{ask} {answer}')} times"
        if context.count(answer.rstrip(".")) != 1:
            yield "the answer's value stands elsewhere, too"
        found = re.findall(line, context)
        if len(found) < lines:
            yield f"{len(found)} lines"
        for part in zip(*found, strict=True) if found and isinstance(found[0], tuple) else [found]:
            if len(set(part)) != len(part):
                yield "two lines share a part"

    return rule


def chains(context, question, answer):
    value = re.search(r"value (\d+)", question)[1]
    known, order = {}, []
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context):
        known[name] = known.get(source, source)
        order.append(name)
    if {n for n, v in known.items() if v == value} != set(answer.rstrip(".").split(", ")):
        yield "not the variables of this value"
    if len(order) != 10 or len(set(order)) != 10:
        yield "not two chains of five"
    if sorted(Counter(known.values()).values()) != [5, 5]:
        yield "the other chain is no distractor"


def commonest(count, without=()):
    def rule(context, question, answer):
        words = Counter(context.removeprefix("The list: ").split())
        for word in without:
            if max(words, key=words.get) != word:
                yield f"{word} does not lead"
            del words[word]
        best = words.most_common(count + 1)
        if {word for word, _ in best[:count]} != set(answer.rstrip(".").split(", ")):
            yield "not the most frequent words"
        if best[count - 1][1] <= best[count][1]:
            yield "a tie"

    return rule


def fact(context, question, answer):
    ask = question.removeprefix("\nIn the story: ")
    if context.count(f"{ask} {answer}") != 1 or context.count(ask) != 1:
        yield "the fact is not told once"
    heroes = re.findall(r"^(\w+ \w+) travelled to", context, re.M)
    if len(heroes) < 3 or len(set(heroes)) != len(heroes):
        yield "too few chapters, or two of one hero"


def passage(context, question, answer):
    if context.count(f"{question} {answer}") != 1 or len(answer.split()) < 4:
        yield "the passage is not there once"


CODE = r"\nThe code for ([\w-]+) is (\d{7})\.\n"
RULES = {
    "single_needle": told_once(CODE, 1),
    "multi_key": told_once(CODE, 4),
    "needles": told_once(CODE, 10),
    "passkey": told_once(r"\nThe pass key is (\d{5})\.\n", 1),
    "key_value": told_once(r"\n([0-9a-f-]{36}): ([0-9a-f-]{36})", 3),
    "variable_tracking": chains,
    "common_words": commonest(10),
    "frequent_words": commonest(3, without=("......",)),
    "story_retrieval": fact,
    "long_copy": passage,
}


def test_there_is_a_rule_for_every_task():
    assert sorted(RULES) == NAMES
    for name, task in tasks().items():
        assert task.name == name
        assert task.about


@EACH
def test_examples_are_what_they_claim(name):
    for example in drawn(name):
        assert not faults(name, example)


# A twin a rule and fault: the same example, spoilt.


def told_twice(example, question):
    return example + question.text.replace("Again:\n", "").replace("In the story: ", "") + question.answer


def forgotten(example, question):
    return example.replace(question.answer.strip(), "nothing.")


def shuffled_away(example, question):
    first = question.answer.strip(" .\n").split(", ")[0]
    return example.replace(first, first[::-1] + "Q")


TWINS = [
    *((name, spoil) for name in NAMES if name not in ("common_words", "frequent_words", "variable_tracking")
      for spoil in (told_twice, forgotten)),
    *((name, shuffled_away) for name in ("common_words", "frequent_words", "variable_tracking")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil"), TWINS, ids=lambda x: getattr(x, "__name__", x))
def test_a_spoilt_example_is_noticed(name, spoil):
    for example in drawn(name, count=3):
        spoilt = type(example)(example.context, spoil(example.text, example.questions[0]), example.questions)
        assert faults(name, spoilt)


def test_a_distractor_that_does_not_differ_is_noticed():
    example = drawn("multi_key", count=1)[0]
    keys = re.findall(r"code for (\w+) is", example.text)
    same = example.text.replace(f"for {keys[0]} is", f"for {keys[1]} is")
    assert faults("multi_key", type(example)(example.context, same, example.questions))


@EACH
@pytest.mark.parametrize("length", [LENGTH, 1511])
@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()], ids=["bytes", "pairs"])
def test_lengths_are_exact_to_the_token(name, length, tokenizer):
    for example in drawn(name, length, 3, tokenizer=tokenizer):
        assert total(example, tokenizer) == length
        assert example.context[: len(tokenizer.start)] == tuple(tokenizer.start)
        text = tuple(tokenizer.encode(example.text))
        assert example.context[len(example.context) - len(text) :] == text
        filler = example.context[len(tokenizer.start) : len(example.context) - len(text)]
        assert set(filler) <= set(tokenizer.encode("\n"))
        assert len(filler) < 300  # what has no room for one more chapter


def test_a_ruler_that_measures_wrong_is_noticed():
    class Short(Bytes):
        def encode(self, text):
            return super().encode(text)[:-1]

    assert total(drawn("passkey", count=1, tokenizer=Short())[0], Bytes()) != LENGTH


@EACH
def test_a_seed_says_all(name):
    assert drawn(name, seed=4) == drawn(name, seed=4)
    assert drawn(name, seed=4, count=2) == drawn(name, seed=4)[:2]
    assert drawn(name, seed=4)[0] != drawn(name, seed=5)[0]


@pytest.mark.parametrize("name", ["multi_key", "needles", "key_value", "story_retrieval"])
def test_several_questions_have_answers_of_their_own(name):
    for example in drawn(name):
        assert len({q.text for q in example.questions}) == len(example.questions) == 4
    assert len(drawn(name, count=1, questions=1)[0].questions) == 1


@EACH
def test_too_short_a_length_says_what_would_do(name):
    with pytest.raises(ValueError, match=rf"length: got 20 tokens; {name} needs at least \d+ for this example"):
        drawn(name, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts.task_named("sorting"), "task: got 'sorting'; choose one of common_words, "),
        (lambda: drawn("passkey", count=0), "count: got 0"),
        (lambda: drawn("passkey", questions=0), "questions: got 0"),
        (lambda: drawn("passkey", seed=-1), "seed: got -1"),
        (lambda: drawn("passkey", 0), "length: got 0"),
        (lambda: drawn("passkey", text=""), "text: got an empty one"),
        (lambda: Ruler(50, Bytes(), "x").fit("mine", Draft((), str)), "mine: drew no question"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_needles_lie_at_all_depths():
    depths = [
        one.text.index(one.questions[0].answer.strip()) / len(one.text)
        for one in drawn("needles", 2000, 200, questions=1)
    ]
    assert np.histogram(depths, bins=10, range=(0, 1))[0].min() > 5


def test_the_haystack_goes_round():
    text = "abc" * 50
    one = drawn("passkey", text=text, count=1)[0]
    assert re.sub(r"\nThe pass key is \d+\.\n", "", one.text) in text * 20


def test_the_default_haystack_is_held_out_text():
    for one in drawn("passkey"):
        hay = re.sub(r"\nThe pass key is \d+\.\n", "", one.text)
        assert hay in held_out_text().decode("ascii", "ignore") * 2


@pytest.mark.parametrize("room", [5, 6, 7, 8, 100, 101, 9999])
def test_largest_is_the_largest(room):
    for cost in (lambda n: 3 * n + 5, lambda n: n * n // 2 + 5, lambda n: 5 + 40 * (n // 7)):
        brute = max(n for n in range(10_000) if cost(n) <= room)
        assert largest(cost, room, 0) == brute


@pytest.mark.parametrize(
    ("score", "reply", "answer", "expected"),
    [
        (exact_text, " 1234567.", " 1234567.", 1),
        (exact_text, "1234567\nThe", " 1234567.", 1),
        (exact_text, " 1234568.", " 1234567.", 0),
        (exact_text, " 123456.", " 1234567.", 0),
        (exact_text, " 12345678.", " 1234567.", 0),
        (exact_text, " is 1234567.", " 1234567.", 0),
        (exact_text, "", " 1234567.", 0),
        (exact_text, "\n1234567.", " 1234567.", 0),
        (exact_text, " a tin bell.", " a tin bell.", 1),
        (exact_text, " a tin.", " a tin bell.", 0),
        (overlap, " b, c, a.", " a, b, c.", 1),
        (overlap, " a, b.", " a, b, c.", 2 / 3),
        (overlap, " a, b, c, d.", " a, b, c.", 3 / 4),
        (overlap, " a, b, cc.", " a, b, c.", 2 / 4),
        (overlap, " x.\na, b, c", " a, b, c.", 0),
        (overlap, "", " a, b, c.", 0),
        (characters, " abcd.", " abcd.", 1),
        (characters, " abcd", " abcd.", 4 / 5),
        (characters, " bcd.", " abcd.", 0),
        (characters, " abcd. and more", " abcd.", 1),
        (characters, "", " abcd.", 0),
    ],
)
def test_scorers_reject_near_misses(score, reply, answer, expected):
    assert score(reply, answer) == expected


@pytest.mark.parametrize("reply", [" 1234567.", " 1234567\n", " 12345x", "\n", " 999", " 1234", "", " "])
@pytest.mark.parametrize("more", ["", ".", "567.", "5", "\n", "x"])
def test_what_follows_an_ended_reply_changes_nothing(reply, more):
    task = Task("mine", "", None, exact_text, "")
    if task.ended(reply, " 1234567."):
        assert task.score(reply, " 1234567.") == task.score(reply + more, " 1234567.")


def test_a_beginning_of_the_answer_has_not_ended():
    task = Task("mine", "", None, exact_text, "")
    assert not any(task.ended(" 1234567."[:at], " 1234567.") for at in range(9))
    assert task.ended(" 1235", " 1234567.")
    assert not Task("mine", "", None, overlap, "").ended(" x", " a, b.")


def test_a_question_joins_its_answer_by_a_blank():
    for name in NAMES:
        question = drawn(name, count=1)[0].questions[0]
        assert isinstance(question, Question)
        assert question.text == question.text.rstrip()
        assert question.answer.startswith(" ")
        assert question.answer[-1] in ".\n"
