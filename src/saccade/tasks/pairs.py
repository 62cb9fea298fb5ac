"""Retrieval among nothing but its likes: needles in a haystack of needles, and values of random keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from saccade.tasks.prompts import Draft, Question, Ruler, exact_text, grown, scattered, task
from saccade.tasks.retrieval import digits, needle, said, some_words, words


@task(exact_text)
def needles(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """A word with a code of seven digits in a haystack of such lines: the hardest of the needles."""
    order = some_words(rng, len(words()))
    number = 0

    def draw() -> tuple[str, Question]:
        nonlocal number
        turn, at = divmod(number, len(order))  # more lines than words: word-1, word-2, ...
        number += 1
        return said(needle((order[at] + (f"-{turn}" if turn else "")).encode()), digits(rng, 7))

    return _among(rng, draw, questions)


@task(exact_text)
def key_value(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """The value of one of many keys, keys and values random identifiers of 32 hexadecimal digits."""

    def draw() -> tuple[str, Question]:
        key, value = _identifier(rng), _identifier(rng)
        return f"\n{key}: {value}", Question(f"\nAgain:\n{key}:", f" {value}\n")

    return _among(rng, draw, questions)


def _among(rng: np.random.Generator, draw: Callable[[], tuple[str, Question]], questions: int) -> Draft:
    """Some lines that are asked for, at random depths among as many others as there is room for."""
    told = [draw() for _ in range(questions)]
    context = scattered(rng, grown(lambda: draw()[0]), [line for line, _ in told])
    return Draft(tuple(question for _, question in told), context, least=1)


def _identifier(rng: np.random.Generator) -> str:
    text = rng.bytes(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
