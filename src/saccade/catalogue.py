"""Discovery: every mechanism is found by walking `saccade.mechanisms`; no list of them is typed anywhere."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from saccade.contract import Mechanism, Spec
from saccade.errors import known


@functools.cache
def _classes() -> dict[str, type[Mechanism]]:
    import saccade.mechanisms as root

    found: dict[str, type[Mechanism]] = {}
    for module_info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if module_info.ispkg:
            continue
        module = importlib.import_module(module_info.name)
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Mechanism)
                and value.__module__ == module.__name__
                and "spec" in vars(value)
            ):
                found[value.spec.id] = value
    return dict(sorted(found.items()))


def mechanisms() -> list[Spec]:
    """Every mechanism's declaration, sorted by id."""
    return [cls.spec for cls in _classes().values()]


def mechanism(id: str) -> type[Mechanism]:
    """The class of the mechanism `id`; an unknown id names those there are.

    >>> mechanism("moba").spec.year
    2025
    """
    return _classes()[known("id", id, _classes())]
