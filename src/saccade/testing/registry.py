"""Named checks: what each proves stands in the first line of its docstring, when it applies beside its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Applies = Callable[[Any], bool]
Body = Callable[..., str | None]  # what was found, in words, where there is something to tell


@dataclass(frozen=True)
class Named:
    """One named check.

    over: "case" (called with a Subject for each case), "class" (with the class), "claim" (with the class and a name).
    """

    name: str
    function: Body
    over: str
    applies: Applies


def named(*, over: str = "case", applies: Applies = lambda subject: True) -> Callable[[Body], Body]:
    """Mark the decorated function as a check under its own name."""

    def mark(function: Body) -> Body:
        function.__named__ = Named(function.__name__, function, over, applies)  # type: ignore[attr-defined]
        return function

    return mark


def collect(*themes: ModuleType) -> dict[str, Named]:
    """The checks that the modules `themes` define, in their order."""
    functions = [value for theme in themes for value in vars(theme).values() if hasattr(value, "__named__")]
    return {function.__named__.name: function.__named__ for function in functions}
