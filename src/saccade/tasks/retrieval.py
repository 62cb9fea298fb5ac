"""Retrieval from a long context, with exact scores: one needle, one of several keys, a pass key, in real text.

A needle is a line `The code for WORD is DIGITS.`; the question repeats it up to the digits, which are the answer. The
haystack is text of Python's library, in one piece up to the needles. A sample has exactly the asked-for number of
bytes, answer included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade.errors import known, positive
from saccade.tasks.text import held_out_text, python_text

if TYPE_CHECKING:
    from saccade.hosts.lm import LM


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


@functools.cache
def words() -> tuple[bytes, ...]:
    """Words of 4 to 9 letters that occur in the library's text, in alphabetical order."""
    found = re.findall(rb"\b[a-z]{4,9}\b", python_text())
    return tuple(sorted(set(found)))


def digits(rng: np.random.Generator, count: int) -> bytes:
    """A number of `count` digits, the first of them not zero."""
    return str(rng.integers(10 ** (count - 1), 10**count)).encode()


def needle(word: bytes) -> bytes:
    """The line that holds a code, up to the code."""
    return b"\nThe code for " + word + b" is "


PASS_KEY = b"\nThe pass key is "


def planted(
    rng: np.random.Generator, length: int, text: bytes, needles: list[bytes], question: bytes, answer: bytes
) -> Sample:
    """`needles` at random depths of a haystack, then question and answer."""
    room = length - sum(map(len, needles)) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"length: got {length} bytes; this task needs at least {length - room}")
    if room >= len(text):
        raise ValueError(f"text: got {len(text)} bytes for a haystack of {room}; pass a longer text")
    start = int(rng.integers(0, len(text) - room))
    hay = text[start : start + room]
    depths = np.sort(rng.integers(0, room + 1, len(needles))).tolist()
    parts = [
        part for at, stop, line in zip([0, *depths], depths, needles, strict=False) for part in (hay[at:stop], line)
    ]
    prompt = b"".join(parts) + hay[depths[-1] :] + question
    return Sample(prompt + answer, (len(prompt), length))


def multi_key(rng: np.random.Generator, length: int, text: bytes, keys: int = 4) -> Sample:
    """`keys` words with a code each; one of them is asked for."""
    chosen = [words()[i] for i in rng.choice(len(words()), keys, replace=False)]
    codes = [digits(rng, 7) for _ in chosen]
    asked = int(rng.integers(keys))
    lines = [needle(word) + code + b".\n" for word, code in zip(chosen, codes, strict=True)]
    return planted(rng, length, text, lines, needle(chosen[asked]), codes[asked] + b".")


def single_needle(rng: np.random.Generator, length: int, text: bytes) -> Sample:
    """One word with a code."""
    return multi_key(rng, length, text, keys=1)


def passkey(rng: np.random.Generator, length: int, text: bytes) -> Sample:
    """A pass key of five digits, said once."""
    key = digits(rng, 5)
    return planted(rng, length, text, [PASS_KEY + key + b".\n"], PASS_KEY, key + b".")


Task = Callable[[np.random.Generator, int, bytes], Sample]
TASKS: dict[str, Task] = {"single_needle": single_needle, "multi_key": multi_key, "passkey": passkey}


def samples(task: str, length: int, count: int, *, seed: int = 0, text: bytes | None = None) -> list[Sample]:
    """`count` samples of a task, set in held-out text by default."""
    rng = np.random.default_rng(
        [positive("seed", seed, least=0), positive("length", length), list(TASKS).index(known("task", task, TASKS))]
    )
    hay = held_out_text() if text is None else text
    return [TASKS[task](rng, length, hay) for _ in range(positive("count", count))]


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
