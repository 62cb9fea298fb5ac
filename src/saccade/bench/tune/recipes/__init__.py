"""Recipes that turn a trained softmax model into a linear one: files here, and mechanisms that offer their maps."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from saccade.bench.tune.linearized import Convertible, Linearized, of_mechanism
from saccade.errors import known


def recipes() -> list[str]:
    """Names of the recipes, sorted: of the files, and ids of the mechanisms that are `Convertible`.

    >>> "linear" in recipes()
    True
    """
    from saccade.catalogue import mechanism, mechanisms

    return sorted([*_files(), *(spec.id for spec in mechanisms() if isinstance(mechanism(spec.id), Convertible))])


def recipe(name: str) -> type[Linearized]:
    """The class of the recipe `name`; an unknown name is told those there are."""
    from saccade.catalogue import mechanism

    if known("recipe", name, recipes()) not in _files():
        offer: Any = mechanism(name)
        return of_mechanism(offer)
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Linearized) and value.__module__ == module.__name__
    )
    return found


def _files() -> list[str]:
    return [found.name for found in pkgutil.iter_modules(__path__)]
