"""Tune: fit a mechanism to a language model, in one of four ways that mechanisms offer.

Rules a head, chosen under a budget (`Tunable`), or a conversion of softmax attention (`Convertible`), for the bundled
model; gates that learn in place (`Taught`), or a profile that is searched (`Searched`), for any model of transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from saccade.bench.tune.adjusted import Adjusted
from saccade.bench.tune.conversion import Converted, convert
from saccade.bench.tune.measure import Sample, layered, loss, measured, samples
from saccade.bench.tune.recipes import recipe, recipes
from saccade.bench.tune.rules import Tunable, Tuned, densities, front, profile, solve, tunable, tune
from saccade.bench.tune.searched import Searched, search, searchable
from saccade.bench.tune.taught import Taught, teach, teachable

Found = Tuned | Converted | Adjusted

__all__ = [
    "Adjusted",
    "Converted",
    "Sample",
    "Searched",
    "Taught",
    "Tunable",
    "Tuned",
    "convert",
    "densities",
    "front",
    "layered",
    "load",
    "loss",
    "measured",
    "profile",
    "recipe",
    "recipes",
    "samples",
    "search",
    "searchable",
    "solve",
    "teach",
    "teachable",
    "tunable",
    "tune",
    "tuner",
]


def tuner(what: str, **options: Any) -> Callable[..., Found]:
    """What tunes `what` with these options; it takes `progress`.

    what: a recipe, or a mechanism's id, with parameters where its gates learn or its profile is searched:
    "duo_attention(share=0.25)". Errors: ValueError for an unknown id, and for an option that this kind of tuning does
    not take.
    """
    from saccade.bench.eval import spelt
    from saccade.catalogue import mechanism, mechanisms
    from saccade.hf.tuned import serves

    id, params = spelt(what)
    run: Callable[..., Found]
    first: Any = id
    if id in recipes():
        run = convert
    elif id not in {spec.id for spec in mechanisms()}:
        every = [*recipes(), *tunable(), *teachable(), *searchable()]
        raise ValueError(f"id: got {id!r}; choose one of {', '.join(every)}")
    elif isinstance(serves(id), Taught):
        run = teach
    elif isinstance(serves(id), Searched):
        run = search
    else:
        run, first = tune, mechanism(id)
    if params:
        options["params"] = params
    takes = inspect.signature(run).parameters
    for name, value in options.items():
        if name not in takes:
            raise ValueError(f"{name}: got {value!r}, which tuning {id} does not take; leave it out")
    return partial(run, first, **options)


def load(path: Path) -> Found:
    """What `save` of any of them wrote."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = None  # for `Tuned.load` to say
    kinds: dict[str, type[Converted | Adjusted]] = {"recipe": Converted, "held_out": Adjusted}
    kind = next((kind for key, kind in kinds.items() if isinstance(said, dict) and key in said), Tuned)
    return kind.load(path)
