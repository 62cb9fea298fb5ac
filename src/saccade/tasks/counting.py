"""What occurs most often: nothing to be looked up, every token counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from saccade.tasks.prompts import Draft, Question, Ruler, overlap, task
from saccade.tasks.retrieval import some_words

COMMON = 10
OFTEN, SELDOM = (30, 3), (6, 1)  # times that common and other words occur: the second where the first has no room
LEAST = 10  # other words


@task(overlap)
def common_words(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """The ten words that occur often among many that occur seldom: 30 and 3 times, 6 and 1 where a list is short."""
    drawn = some_words(rng, max(COMMON + LEAST, min(COMMON + ruler.length, 5000)))
    common, others = drawn[:COMMON], drawn[COMMON:]
    often, seldom = OFTEN if 2 * OFTEN[0] * ruler.tokens(f" {' '.join(common)}") <= ruler.length else SELDOM

    def listed(size: int) -> list[str]:
        return common * often + others[:size] * seldom

    question = Question(f"\nThe {COMMON} words that occur most often in the list are", f" {', '.join(common)}.")
    return Draft((question,), _shuffled(rng, "The list:", listed), least=LEAST)


@task(overlap)
def frequent_words(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """The three most frequent of random words whose frequencies fall as 1 / rank^2, after the dots, which lead.

    The word of rank k occurs floor(n / k^2) times, and n is as large as there is room for.
    """
    made = _coded(rng, max(8, int(ruler.length**0.5) + 1))

    def listed(size: int) -> list[str]:
        return [word for k, word in enumerate(["......", *made], 1) for _ in range(size // k**2)]

    question = Question("\nAfter the dots, the 3 most frequent words in the list are", f" {', '.join(made[:3])}.")
    return Draft((question,), _shuffled(rng, "The list:", listed), least=32)  # from there on, ranks 4 and 5 differ


def _shuffled(rng: np.random.Generator, head: str, listed: Callable[[int], list[str]]) -> Callable[[int], str]:
    """A size -> head and the listed words in an order of their own."""
    seed = int(rng.integers(2**31))

    def build(size: int) -> str:
        found = listed(size)
        order = np.random.default_rng([seed, size]).permutation(len(found))
        return " ".join([head, *(found[at] for at in order)])

    return build


def _coded(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of six letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(97 + at) for at in rng.integers(0, 26, 6))] = None
    return list(found)
