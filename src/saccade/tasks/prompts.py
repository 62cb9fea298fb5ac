"""What a generated task is: a context, questions about it with their answers, and a scorer; its length in tokens.

A prompt is context and question; the reply to it is scored against the answer, text against text. The context and a
question are made into tokens apart, so that a context can be read once, and what was kept of it asked several times.

    start + context + question + answer = exactly `length` tokens, for the longest question of an example
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from saccade.errors import known, positive
from saccade.tasks.text import held_out_text


class Tokenizer(Protocol):
    """Text to tokens and back. start: tokens that every prompt begins with."""

    @property
    def start(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """A byte a token, as the language model of this package reads.

    >>> Bytes().decode(Bytes().encode("cod"))
    'cod'
    """

    start = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t if t < 256 else ord("?") for t in tokens).decode(errors="replace")


@dataclass(frozen=True)
class Question:
    """text: ends where the answer begins. answer: what is to follow, from its blank to the sign that ends it."""

    text: str
    answer: str


@dataclass(frozen=True)
class Draft:
    """What a task draws: the questions, and the context at every size.

    context: a size, an integer >= 0, -> text that gets longer with it. least: the size below which the task is another.
    """

    questions: tuple[Question, ...]
    context: Callable[[int], str]
    least: int = 0


@dataclass(frozen=True)
class Example:
    """context: tokens, `start` included. text: the same as text. questions: at least one."""

    context: tuple[int, ...]
    text: str
    questions: tuple[Question, ...]


Scorer = Callable[[str, str], float]
Maker = Callable[..., Draft]


@dataclass(frozen=True)
class Task:
    """A generated task, found by discovery under its name. Made by `task`.

    make: (rng, questions, ruler) -> Draft; it may give fewer questions than it was asked for. scorer: (reply, answer)
    -> 0 .. 1. module: where it is defined.
    """

    name: str
    about: str
    make: Maker
    scorer: Scorer
    module: str

    def examples(
        self,
        length: int,
        count: int,
        *,
        questions: int = 1,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        text: str | None = None,
    ) -> list[Example]:
        """`count` examples of exactly `length` tokens; the same seed gives the same ones.

        questions: about each context, at most (default 1). tokenizer: `Bytes` by default. text: the haystack's
        (default: held-out modules of Python's library). Costs a few times the making of tokens from the context.
        Errors: ValueError for a length that is too short for the task.

        >>> one = task_named("passkey").examples(200, 1)[0]
        >>> len(one.context) + len(one.questions[0].text + one.questions[0].answer)
        200
        """
        positive("length", length)
        # A name's own stream, whatever other tasks there are.
        rng = np.random.default_rng([positive("seed", seed, least=0), length, zlib.crc32(self.name.encode())])
        ruler = Ruler(length, tokenizer or Bytes(), haystack() if text is None else text)
        positive("questions", questions)
        return [ruler.fit(self.name, self.make(rng, questions, ruler)) for _ in range(positive("count", count))]

    def score(self, reply: str, answer: str) -> float:
        """How right a reply is, from 0 to 1."""
        return self.scorer(reply, answer)

    def ended(self, reply: str, answer: str) -> bool:
        """Nothing that may follow changes the score.

        So it is behind the sign that ends the answer, behind a line, and where no other text than the answer scores and
        the reply is not a beginning of it.
        """
        said = reply.lstrip(" ")
        if re.search(f"[{re.escape(answer[-1])}\n]", said):
            return True
        return self.scorer is exact_text and not answer.strip(" ").startswith(said.rstrip(" "))


@dataclass(frozen=True)
class Ruler:
    """Lengths in tokens. text: of the haystack, in one piece; it starts again where it ends."""

    length: int
    tokenizer: Tokenizer
    text: str

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def hay(self, rng: np.random.Generator) -> Callable[[int], str]:
        """A size -> as many characters of the haystack's text, from a place drawn once."""
        if not self.text:
            raise ValueError("text: got an empty one; pass a haystack")
        start = int(rng.integers(len(self.text)))

        def cut(size: int) -> str:
            rounds = (start + size) // len(self.text)
            return (self.text * (rounds + 1))[start : start + size] if rounds else self.text[start : start + size]

        return cut

    def fit(self, name: str, draft: Draft) -> Example:
        """The largest context that leaves room for the longest question, and line breaks before it for what is over."""
        if not draft.questions:
            raise ValueError(f"{name}: drew no question")
        asked = max(self.tokens(one.text) + self.tokens(one.answer) for one in draft.questions)
        room = self.length - len(self.tokenizer.start) - asked
        encode = functools.cache(lambda size: tuple(self.tokenizer.encode(draft.context(size))))
        least = len(encode(draft.least))
        if least > room:
            raise ValueError(
                f"length: got {self.length} tokens; {name} needs at least {self.length - room + least} for this example"
            )
        size = largest(lambda size: len(encode(size)), room, draft.least)
        filler = self.tokenizer.encode("\n")[-1:] * (room - len(encode(size)))
        return Example((*self.tokenizer.start, *filler, *encode(size)), draft.context(size), draft.questions)


def largest(cost: Callable[[int], int], room: int, least: int) -> int:
    """The largest size >= `least` whose cost, which grows with it, is at most `room`; that of `least` must be.

    >>> largest(lambda size: 3 * size + 5, 100, 0)
    31
    """
    low, high, step = least, least, 1
    while cost(high := low + step) <= room:
        low, step = high, 2 * step
    # Costs grow about linearly, so that the next guess is a line's; every third halves, whatever the line says.
    turn = 0
    while high - low > 1:
        at, over = cost(low), cost(high)
        line = low + (room - at) * (high - low) // max(over - at, 1)
        guess = (low + high) // 2 if turn % 3 == 2 else line + turn % 3
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if cost(guess) <= room else (low, guess)
        turn += 1
    return low


@functools.cache
def haystack() -> str:
    """The held-out modules without their few signs beyond ASCII, so that a byte is a character."""
    return held_out_text().decode("ascii", "ignore")


def scattered(
    rng: np.random.Generator, hay: Callable[[int], Sequence[str]], lines: Sequence[str]
) -> Callable[[int], str]:
    """A size -> so many characters (or lines) of hay with `lines` in it, in their order, at depths drawn once."""
    depths = np.sort(rng.random(len(lines))).tolist()

    def build(size: int) -> str:
        text, stops = hay(size), [int(depth * (size + 1)) for depth in depths]
        pieces = [text[a:b] for a, b in zip([0, *stops], [*stops, size], strict=True)]
        return "".join(part for piece, line in zip(pieces, [*lines, ""], strict=True) for part in (*piece, line))

    return build


def grown(draw: Callable[[], str]) -> Callable[[int], list[str]]:
    """A size -> so many draws; those of a smaller size are the first of them."""
    drawn: list[str] = []

    def first_of(size: int) -> list[str]:
        while len(drawn) < size:
            drawn.append(draw())
        return drawn[:size]

    return first_of


# Scorers: (reply, answer) -> 0 .. 1.


def first(reply: str, end: str) -> str:
    """A reply up to the sign that ends it, or the end of its first line.

    >>> first(" 1234567. And", ".")
    '1234567'
    """
    return re.split(f"[{re.escape(end)}\n]", reply.strip(" "), maxsplit=1)[0].strip()


def exact_text(reply: str, answer: str) -> float:
    """1 when the reply is the answer, else 0.

    >>> exact_text(" 1234567.\\nThe", " 1234567."), exact_text(" 12345678.", " 1234567.")
    (1.0, 0.0)
    """
    return float(first(reply, answer[-1]) == answer[:-1].strip())


def overlap(reply: str, answer: str) -> float:
    """Words in both / words in either (intersection over union), in any order.

    >>> overlap(" b, a.", " a, b."), overlap(" a, c.", " a, b.")
    (1.0, 0.3333333333333333)
    """
    said, meant = (set(re.findall(r"\w+", first(text, answer[-1]))) for text in (reply, answer))
    return len(said & meant) / len(said | meant) if said | meant else 0.0


def characters(reply: str, answer: str) -> float:
    """Share of the answer's characters that stand in the reply at their place.

    >>> characters(" abxd", " abcd.")
    0.6
    """
    meant = answer.strip()
    return sum(a == b for a, b in zip(reply.lstrip(" "), meant, strict=False)) / len(meant)


def task(scorer: Scorer) -> Callable[[Maker], Task]:
    """Make a task of a function (rng, questions, ruler) -> Draft: its name and the first line of its docstring are the
    task's.
    """

    def mark(make: Maker) -> Task:
        about = (make.__doc__ or "").strip().splitlines()[0]
        return Task(make.__name__, about, make, scorer, make.__module__)

    return mark


@functools.cache
def tasks() -> dict[str, Task]:
    """Every task of this package, by name: found in its modules, listed nowhere."""
    import saccade.tasks as root

    found: dict[str, Task] = {}
    for info in pkgutil.iter_modules(root.__path__, root.__name__ + "."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, Task) and value.module == info.name:
                found[value.name] = value
    return dict(sorted(found.items()))


def task_named(name: str) -> Task:
    """The task of a name; an unknown one names those there are."""
    return tasks()[known("task", name, tasks())]
