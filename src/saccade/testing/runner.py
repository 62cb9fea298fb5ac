"""Choosing and running the checks of a mechanism."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from saccade.contract import Case, Mechanism
from saccade.errors import known
from saccade.testing import (
    caching,
    claims,
    declaration,
    decode,
    device,
    gradients,
    independence,
    portability,
    robustness,
    structure,
    values,
    work,
)
from saccade.testing.ambient import isolated
from saccade.testing.ledger import Ledger
from saccade.testing.registry import Named, collect
from saccade.testing.report import Report, Row
from saccade.testing.subject import Subject

if TYPE_CHECKING:
    import pytest

# The order of the themes is the order of the report.
THEMES = (
    values, gradients, structure, decode, caching, robustness, portability, device, work, declaration, independence
)  # fmt: skip
NAMED = collect(*THEMES, claims)


@dataclass(frozen=True)
class Check:
    """One named check of one mechanism at one case.

    `run()` raises when it fails, else says what it found: a claim its sentence and figure, other checks None. It leaves
    the global generator as it was. case: None for checks of the class. label: the case, or the claim, in words.
    """

    mechanism: str
    name: str
    case: Case | None
    label: str
    run: Callable[[], str | None]

    @property
    def id(self) -> str:
        return f"{self.mechanism}[{self.label}]-{self.name}"


def check_names() -> list[str]:
    """Every check there is, by name.

    >>> "causality" in check_names()
    True
    """
    return list(NAMED)


def checks(cls: type[Mechanism], only: str | Iterable[str] | None = None) -> list[Check]:
    """The checks that `cls` must pass, chosen from its contract and its declared capabilities.

    only: a check's name, or several (default: all). An unknown name raises a ValueError that lists them.
    """
    if not (isinstance(cls, type) and issubclass(cls, Mechanism) and hasattr(cls, "spec")):
        raise TypeError(f"cls: got {cls!r}; pass a mechanism class (a subclass of Attention or Mixer with a spec)")
    names = NAMED if only is None else [only] if isinstance(only, str) else only
    wanted = {known("only", name, NAMED) for name in names}
    subjects = _subjects(cls)
    return [check for name, entry in NAMED.items() if name in wanted for check in _expand(cls, entry, subjects)]


def _subjects(cls: type[Mechanism]) -> list[Subject]:
    try:
        return [Subject(cls, case) for case in cls.cases()]
    except Exception:  # the check `declaration` asks for the cases again and reports what went wrong
        return []


def _expand(cls: type[Mechanism], entry: Named, subjects: list[Subject]) -> Iterator[Check]:
    if entry.over == "case":
        for subject in subjects:
            if _applies(entry, subject):
                yield Check(cls.spec.id, entry.name, subject.case, str(subject.case), partial(_run, entry, subject))
    elif entry.over == "claim":
        for claim in cls.claims():
            yield Check(cls.spec.id, entry.name, None, claim, partial(_run, entry, cls, claim))
    elif _applies(entry, cls):
        yield Check(cls.spec.id, entry.name, None, "", partial(_run, entry, cls))


def _applies(entry: Named, argument: Any) -> bool:
    try:
        return entry.applies(argument)
    except Exception:  # a mechanism that cannot even be built or asked fails the check itself, with its own message
        return True


def _run(entry: Named, *arguments: Any) -> str | None:
    with isolated():
        return entry.function(*arguments)


def check(cls: type[Mechanism], only: str | Iterable[str] | None = None, *, ledger: Ledger | None = None) -> Report:
    """Run every check of `cls`, or `only` some; a failure becomes a row of the report, never an exception.

    ledger: known failures (default: the ledger shipped with the package).

        report = check(MyAttention)
        report.raise_for_failures()
    """
    ledger = Ledger.load() if ledger is None else ledger
    return Report(tuple(perform(one, ledger) for one in checks(cls, only)))


def perform(one: Check, ledger: Ledger) -> Row:
    """Run one check and judge the outcome by the ledger."""
    start = time.perf_counter()
    failure = found = None
    try:
        found = one.run()
    except Exception as error:
        failure = f"{error}" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    status, message = ledger.judge(one.mechanism, one.name, one.label, failure)
    return Row(one.mechanism, one.name, one.label, status, seconds, message or found or "")


def parametrize_with_checks(*classes: type[Mechanism]) -> pytest.MarkDecorator:
    """Decorate a test `def test(check): check.run()` so that pytest shows one test a check of these mechanisms."""
    import pytest

    found = [one for cls in classes for one in checks(cls)]
    return pytest.mark.parametrize("check", found, ids=[one.id for one in found])


def cli_table(ids: Iterable[str] = (), only: str | Iterable[str] | None = None) -> Report:
    """The report of the mechanisms `ids` (none given: all of the catalogue); `.rows()` is its JSON form."""
    from saccade.catalogue import mechanism, mechanisms

    chosen = list(ids) or [spec.id for spec in mechanisms()]
    return Report(tuple(row for id in chosen for row in check(mechanism(id), only).outcomes))
