"""The register of named checks: a function of one subject, what it proves in its first docstring line, and when it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Applies = Callable[[Any], bool]


@dataclass(frozen=True)
class Named:
    """One named check. over: "case" (called with a Subject for each), "class" (with the class), "claim" (with the class and a claim's name)."""

    name: str
    function: Callable[..., None]
    over: str
    applies: Applies

    @property
    def proves(self) -> str:
        """The first line of its docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


NAMED: dict[str, Named] = {}


def named(*, over: str = "case", applies: Applies = lambda subject: True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as a check under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        NAMED[function.__name__] = Named(function.__name__, function, over, applies)
        return function

    return register
