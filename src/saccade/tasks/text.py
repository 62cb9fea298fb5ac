"""Real text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

HELD_OUT = (
    "argparse.py",
    "ast.py",
    "dataclasses.py",
    "difflib.py",
    "inspect.py",
    "statistics.py",
    "tarfile.py",
    "typing.py",
)
LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "encodings",
    "turtledemo",
)


@functools.cache
def python_text() -> bytes:
    """The library's sources without the held-out modules, in the order of their names: 10-odd megabytes."""
    return b"\n".join(path.read_bytes() for path in _sources() if path.name not in HELD_OUT)


@functools.cache
def held_out_text() -> bytes:
    """The modules that no model of this package was trained on: half a megabyte."""
    return b"\n".join(path.read_bytes() for path in _sources() if path.name in HELD_OUT)


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in root.rglob("*.py") if not set(p.relative_to(root).parts[:-1]) & set(LEFT_OUT)]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())
