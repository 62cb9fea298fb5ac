"""Tune: fit a mechanism to the bundled language model, by a search over its heads' rules or by a conversion recipe."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from saccade.bench.tune.conversion import Converted, convert
from saccade.bench.tune.measure import Sample, layered, loss, measured, samples
from saccade.bench.tune.recipes import recipe, recipes
from saccade.bench.tune.rules import Tunable, Tuned, densities, front, profile, solve, tunable, tune

__all__ = [
    "Converted",
    "Sample",
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
    "solve",
    "tunable",
    "tune",
    "tuner",
]


def tuner(id: str, **options: Any) -> Callable[..., Tuned | Converted]:
    """What tunes `id`, a recipe or a mechanism with rules, with these options; it takes `progress`.

    Errors: ValueError for an unknown id, and for an option that this kind of tuning does not take.
    """
    from saccade.catalogue import mechanism, mechanisms

    run: Callable[..., Tuned | Converted]
    first: Any
    if id in recipes():
        run, first = convert, id
    elif id in {spec.id for spec in mechanisms()}:
        run, first = tune, mechanism(id)
    else:
        raise ValueError(f"id: got {id!r}; choose one of {', '.join([*recipes(), *tunable()])}")
    takes = inspect.signature(run).parameters
    for name, value in options.items():
        if name not in takes:
            raise ValueError(f"{name}: got {value!r}, which tuning {id} does not take; leave it out")
    return partial(run, first, **options)


def load(path: Path) -> Tuned | Converted:
    """What `save` of either wrote."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = None  # for `Tuned.load` to say
    return (Converted if isinstance(said, dict) and "recipe" in said else Tuned).load(path)
