"""What the scripts share: a stamp of the surroundings, a table on the console, a JSON file beside the script."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saccade.bench.records import environment

RESULTS = Path(__file__).parent / "results"


def stamp(device: str = "cpu") -> dict[str, Any]:
    """Date, versions, commit and kind of machine."""
    found = environment(device)
    machine = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {os.cpu_count()} cores"
    own = {name: found[name] for name in ("saccade", "torch", "python", "commit", "threads", "load")}
    return {"date": found["time"][:10], "machine": machine, **own}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, one column a key."""
    table = Table(title=title)
    for at, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if at else "left", no_wrap=not at)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=max(160, Console().width)).print(table)


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Write results/<name>.json: the stamp, what was run, and the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**stamp(), **about, "rows": rows}, indent=2) + "\n")
    print(f"written: {path}")
    return path
