"""A story from a grammar: chapters about different people that say the same kinds of things, in prose."""

from __future__ import annotations

import numpy as np

from saccade.tasks.prompts import Draft, Question, Ruler, exact_text, grown, scattered, task

FIRST = ("Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon")
TRADES = ("baker", "clockmaker", "fisher", "gardener", "glazier", "miller", "printer", "saddler", "tailor", "weaver")
KINDS = ("amber", "blue", "brass", "copper", "dusty", "heavy", "ivory", "narrow", "painted", "silver", "tin", "woven")
THINGS = ("bell", "bowl", "compass", "flute", "kettle", "lamp", "lantern", "map", "mirror", "ring", "shawl", "trunk")
CLOSING = (
    "The evening was mild, and nobody was in a hurry.",
    "Later it rained, and the streets were empty.",
    "A letter arrived the next morning, but it was left unread.",
    "The road back led along the river.",
    "Everyone in the inn talked about the harvest.",
)


@task(exact_text)
def story_retrieval(rng: np.random.Generator, questions: int, ruler: Ruler) -> Draft:
    """Who went where, met whom, bought what and paid how much: one fact of one chapter of a story."""
    heroes: set[str] = set()

    def chapter() -> tuple[str, list[tuple[str, str]]]:
        while (hero := f"{_pick(rng, FIRST)} {_surname(rng)}") in heroes:
            pass
        heroes.add(hero)
        facts = [
            (f"{hero} travelled to", f" {_surname(rng)}."),
            (f"There {hero} met", f" {_pick(rng, FIRST)} the {_pick(rng, TRADES)}."),
            (f"{hero} bought", f" a {_pick(rng, KINDS)} {_pick(rng, THINGS)}."),
            (f"For it {hero} paid", f" {int(rng.integers(11, 1000))} crowns."),
        ]
        text = " ".join(begin + end for begin, end in facts)
        return f"\n{text} {_pick(rng, CLOSING)}\n", facts

    asked = [chapter() for _ in range(-(-questions // 2))]
    # Two of a chapter, so that a few questions do not take a short story's whole room.
    chosen = [facts[at] for _, facts in asked for at in rng.permutation(len(facts))[:2].tolist()][:questions]
    context = scattered(rng, grown(lambda: chapter()[0]), [text for text, _ in asked])
    return Draft(tuple(Question(f"\nIn the story: {begin}", end) for begin, end in chosen), context, least=1)


def _pick(rng: np.random.Generator, of: tuple[str, ...]) -> str:
    return of[int(rng.integers(len(of)))]


def _surname(rng: np.random.Generator) -> str:
    """A name of a person or a place: three syllables."""
    syllables = [_pick(rng, tuple("bdfgklmnprstvz")) + _pick(rng, tuple("aeiou")) for _ in range(3)]
    return ("".join(syllables) + _pick(rng, ("", "n", "r", "s"))).capitalize()
