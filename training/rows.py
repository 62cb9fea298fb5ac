"""What a sweep found, read back: a JSON object a line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file; a line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def best(rows: Iterable[Row], *names: str) -> list[Row]:
    """Of the rows that have an accuracy and agree in `names`, of the row or of its key, the most accurate.

    In the order in which they first came up.

    >>> best([{"a": 1, "accuracy": 0.2, "key": {}}, {"a": 1, "accuracy": 0.3, "key": {}}], "a")
    [{'a': 1, 'accuracy': 0.3, 'key': {}}]
    """
    found: dict[Hashable, Row] = {}
    for row in rows:
        if "accuracy" in row:
            at = tuple(json.dumps(row.get(name, row["key"].get(name)), sort_keys=True) for name in names)
            found[at] = max(found.get(at, row), row, key=lambda each: each["accuracy"])
    return list(found.values())
