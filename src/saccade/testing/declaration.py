"""Is the declaration complete, and does the documentation hold?"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import sys
from pathlib import Path

import torch

import saccade
from saccade.contract import Attention, CachePolicy, Mechanism
from saccade.testing.independence import PRIMITIVES
from saccade.testing.registry import named

LEAST_CASES = 2


def documentation(cls: type[Mechanism]) -> str:
    """The docstrings of the class and of its file."""
    return "\n".join(filter(None, (cls.__dict__.get("__doc__"), sys.modules[cls.__module__].__doc__)))


def primitives() -> set[str]:
    """The public names of the rooms that mechanisms are composed of.

    >>> {"Window", "attend", "pool_tokens"} <= primitives()
    True
    """
    rooms = [room.name for room in pkgutil.iter_modules(saccade.__path__) if room.name in PRIMITIVES]
    return {name for room in rooms for name in importlib.import_module(f"saccade.{room}").__all__}


@named(over="class")
def declaration(cls: type[Mechanism]) -> None:
    """The declaration is complete: spec in the right file, real primitives, defaults, cases, a claim, documentation."""
    spec, text = cls.spec, documentation(cls)
    for field in ("id", "name", "title", "paper", "family", "uses"):
        assert getattr(spec, field), f"spec.{field}: empty"
    known = bool(spec.ranks) and set(spec.ranks) <= {0, 1, 2, 3}
    assert known, f"spec.grid: got {spec.grid}; pass the number of axes, 0 to 3, or a tuple of such"
    assert isinstance(spec.uses, tuple), f"spec.uses: got a {type(spec.uses).__name__}; pass a tuple of names"
    strange = sorted(set(spec.uses) - primitives())
    assert not strange, f"spec.uses: no public primitive is called {', '.join(map(repr, strange))}"
    assert spec.year > 1900, f"spec.year: got {spec.year}"
    if cls.__module__.startswith("saccade.mechanisms."):
        path = Path(inspect.getfile(cls))
        assert path.stem == spec.id, f"spec.id: got {spec.id!r} in the file {path.name}; they must agree"
        assert path.parent.name == spec.family, (
            f"spec.family: got {spec.family!r} in the folder {path.parent.name}; they must agree"
        )
    bare = [name for name, default in cls.params().items() if default is inspect.Parameter.empty]
    assert not bare, f"parameters without a default: {', '.join(bare)}"
    cases = cls.cases()
    assert len(cases) >= LEAST_CASES, f"cases: got {len(cases)}; give at least {LEAST_CASES}"
    unknown = {name for case in cases for name in case.params} - set(cls.params())
    assert not unknown, f"cases: unknown parameters {', '.join(sorted(unknown))}"
    if issubclass(cls, CachePolicy) and cls.can_tell():
        all_kept = [bool(cls(case.dims, **case.params).kept(case.length).all()) for case in cases]
        assert not all(all_kept), "cases: `kept` drops no key in any of them; add one longer than what is kept"
    assert cls.claims(), "claims: none; the paper's headline must be checked by at least one"
    assert spec.paper in text, f"docstring: does not name the paper {spec.paper}"
    assert "(B," in text, "docstring: gives no shapes such as (B, H, N, D)"
    missing = [name for name in cls.params() if name not in text]
    assert not missing, f"docstring: does not explain the parameters {', '.join(missing)}"


@named(over="class")
def odd_and_prime(cls: type[Mechanism]) -> None:
    """The cases meet sizes that no tile divides, and an Attention meets more than one head."""
    cases = cls.cases()
    sizes = [size for case in cases for size in (case.dims.grid or (case.length,))]
    assert any(size % 8 for size in sizes), f"cases: {sizes} are all multiples of 8; add an odd or a prime size"
    short = [str(case) for case in cases if case.length < 2]
    assert not short, f"cases: {short[0]} has a single token, at which nothing can go wrong"
    if issubclass(cls, Attention):
        assert any(case.dims.num_heads > 1 for case in cases), "cases: all have one head; add one with several"


@named(over="class")
def example(cls: type[Mechanism]) -> None:
    """The docstring's example runs and prints what it says."""
    tests = [t for t in doctest.DocTestFinder(recurse=False).find(cls, cls.__name__) if t.examples]
    module = sys.modules[cls.__module__]
    tests += [t for t in doctest.DocTestFinder(recurse=False).find(module, module.__name__) if t.examples]
    assert tests, "docstring: has no example; end it with a short runnable one (>>> ...)"
    for test in tests:
        test.globs.update(vars(module), torch=torch)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        assert not failed, f"docstring example fails:\n{printed.getvalue().strip()}"
