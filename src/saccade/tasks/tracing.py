"""Chains of variables: what is found leads to what is to be found next."""

from __future__ import annotations

import numpy as np

from saccade.tasks.prompts import Draft, Question, Ruler, overlap, scattered, task
from saccade.tasks.retrieval import digits

CHAINS, HOPS = 2, 4


@task(overlap)
def variable_tracking(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """All variables with a value: one is set to it, each of four others to the one before, among a second such chain.

    Statements lie in text, those of a chain in their order.
    """
    names = _names(rng, CHAINS * (HOPS + 1))
    values: list[str] = []
    while len(values) < CHAINS:
        value = digits(rng, 5).decode()
        values += [value] if value not in values else []
    chains = [names[at::CHAINS] for at in range(CHAINS)]
    lines = [
        [
            f"\nVAR {one} = {before}.\n"
            for before, one in zip([value, *(f"VAR {n}" for n in chain)], chain, strict=False)
        ]
        for value, chain in zip(values, chains, strict=True)
    ]
    turns = rng.permutation([at for at in range(CHAINS) for _ in range(HOPS + 1)]).tolist()
    statements = [lines[at][turns[:step].count(at)] for step, at in enumerate(turns)]
    asked = [
        Question(f"\nThe variables that have the value {values[at]} are VAR", f" {', '.join(chains[at])}.")
        for at in rng.permutation(CHAINS)[:questions].tolist()
    ]
    return Draft(tuple(asked), scattered(rng, ruler.hay(rng), statements))


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(65 + at) for at in rng.integers(0, 26, 5))] = None
    return list(found)
