"""A long answer: a passage to be said again, word for word."""

from __future__ import annotations

import numpy as np

from saccade.tasks.prompts import Draft, Question, Ruler, characters, largest, scattered, task
from saccade.tasks.retrieval import some_words

SHARE = 8  # the passage takes so much of the length, and its copy as much again


@task(characters)
def long_copy(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """A passage of random words, an eighth of the length, to be copied out of text."""
    drawn = some_words(rng, min(4 + ruler.length // SHARE, 5000))
    count = largest(lambda size: ruler.tokens(" ".join(drawn[:size])), ruler.length // SHARE, 0)
    ask = "\nThe passage is"
    answer = f" {' '.join(drawn[: max(count, 4)])}."
    return Draft((Question(ask, answer),), scattered(rng, ruler.hay(rng), [f"{ask}{answer}\n"]))
