"""Retrieval from a long context, with exact scores: one needle, one of several keys, a pass key, in real text.

A needle is a line `The code for WORD is DIGITS.`; the question repeats it up to the digits, which are the answer. The
haystack is text of Python's library, in one piece up to the needles, that starts again where it ends. `samples` gives
them as bytes, one question each, of exactly the asked-for number of bytes, answer included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade.errors import known, positive
from saccade.tasks.prompts import Draft, Question, Ruler, Task, exact_text, scattered, task
from saccade.tasks.text import python_text

if TYPE_CHECKING:
    from saccade.hosts.lm import LM


@functools.cache
def words() -> tuple[bytes, ...]:
    """Words of 4 to 9 letters that occur in the library's text, in alphabetical order."""
    found = re.findall(rb"\b[a-z]{4,9}\b", python_text())
    return tuple(sorted(set(found)))


def some_words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different ones of `words`, as text."""
    return [words()[at].decode() for at in rng.choice(len(words()), count, replace=False)]


def digits(rng: np.random.Generator, count: int) -> bytes:
    """A number of `count` digits, the first of them not zero."""
    return str(rng.integers(10 ** (count - 1), 10**count)).encode()


def needle(word: bytes) -> bytes:
    """The line that holds a code, up to the code."""
    return b"\nThe code for " + word + b" is "


PASS_KEY = b"\nThe pass key is "


def said(ask: bytes, code: bytes) -> tuple[str, Question]:
    """The line that says a code, and the question for it."""
    question = Question(ask.decode().rstrip(" "), f" {code.decode()}.")
    return f"{question.text}{question.answer}\n", question


def planted(rng: np.random.Generator, ruler: Ruler, questions: int, told: list[tuple[str, Question]]) -> Draft:
    """Lines at random depths of a haystack, and questions for some of them."""
    asked = rng.permutation(len(told))[:questions].tolist()
    return Draft(tuple(told[at][1] for at in asked), scattered(rng, ruler.hay(rng), [line for line, _ in told]))


def coded(rng: np.random.Generator, keys: int) -> list[tuple[str, Question]]:
    """`keys` words with a code of seven digits each."""
    return [said(needle(word.encode()), digits(rng, 7)) for word in some_words(rng, keys)]


@task(exact_text)
def single_needle(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """A word with a code of seven digits, said once in text."""
    return planted(rng, ruler, questions, coded(rng, 1))


@task(exact_text)
def multi_key(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """Four words with a code each in text, one of them asked for."""
    return planted(rng, ruler, questions, coded(rng, 4))


@task(exact_text)
def passkey(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """A pass key of five digits, said once in text."""
    return planted(rng, ruler, questions, [said(PASS_KEY, digits(rng, 5))])


TASKS: dict[str, Task] = {one.name: one for one in list(vars().values()) if isinstance(one, Task)}


@dataclass(frozen=True)
class Sample:
    """tokens: all bytes. answer: (start, stop), the bytes to be found; they end the sample."""

    tokens: bytes
    answer: tuple[int, int]

    @property
    def prompt(self) -> bytes:
        return self.tokens[: self.answer[0]]

    @property
    def expected(self) -> bytes:
        return self.tokens[slice(*self.answer)]


def samples(task: str, length: int, count: int, *, seed: int = 0, text: bytes | None = None) -> list[Sample]:
    """`count` samples of a task of this module, set in held-out text by default."""
    hay = None if text is None else text.decode("ascii", "ignore")
    found = []
    for one in TASKS[known("task", task, TASKS)].examples(length, count, seed=seed, text=hay):
        asked = one.questions[0]
        tokens = bytes(one.context) + (asked.text + asked.answer).encode()
        found.append(Sample(tokens, (length - len(asked.answer.lstrip()), length)))
    return found


def exact(model: LM | Callable[..., Any], group: list[Sample]) -> list[bool]:
    """Does greedy decoding give each answer?

    Asked in one pass: it does if and only if every byte of the answer is the likeliest after the true ones before it.

    model: tokens (B, N) -> logits (B, N, vocab). group: samples of one length.
    """
    import torch

    lengths = {len(s.tokens) for s in group}
    if len(lengths) != 1:
        raise ValueError(f"group: got samples of {sorted(lengths)} bytes; pass samples of one length")
    tokens = torch.tensor(np.stack([np.frombuffer(s.tokens, np.uint8) for s in group]).astype(np.int64))
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else tokens.device
    with torch.no_grad():
        likeliest = model(tokens[:, :-1].to(device)).argmax(-1).cpu()
    return [
        bool(row[a - 1 : b - 1].equal(t[a:b]))
        for row, t, (a, b) in zip(likeliest, tokens, (s.answer for s in group), strict=True)
    ]


def score(
    model: LM | Callable[..., Any], task: str, length: int, count: int = 100, *, seed: int = 0, batch: int = 8
) -> float:
    """Share of exact answers over `count` samples."""
    drawn = samples(task, length, count, seed=seed)
    groups = [drawn[at : at + batch] for at in range(0, count, positive("batch", batch))]
    return float(np.mean([hit for group in groups for hit in exact(model, group)]))
