"""What the scripts share: a stamp of the surroundings, a table on the console, a JSON file beside the script."""

from __future__ import annotations

import json
import os
import time
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
    own = {name: found[name] for name in ("saccade", "torch", "python", "commit", "threads")}
    return {"date": found["time"][:10], "machine": machine, **own}


class Others:
    """How many cores other processes kept busy inside a `with`: `cores`, None where the system does not say."""

    cores: float | None = None

    def __enter__(self) -> Others:
        self.start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        (wall, busy, own), (wall_before, busy_before, own_before) = self._now(), self.start
        if busy is not None and busy_before is not None:
            spent = (busy - busy_before) - (own - own_before)
            self.cores = round(max(0.0, spent / (wall - wall_before)), 2)

    def _now(self) -> tuple[float, float | None, float]:
        try:
            user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
        except OSError:
            return time.perf_counter(), None, time.process_time()
        return time.perf_counter(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time()


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, one column a key."""
    table = Table(title=title)
    for at, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if at else "left", no_wrap=not at)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=max(160, Console().width)).print(table)


def save(name: str, rows: list[dict[str, Any]], *, device: str = "cpu", **about: Any) -> Path:
    """Write results/<name>.json, each row with its own stamp; rows of other patterns and lengths that it holds stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    mine = {(row["pattern"], row["tokens"]) for row in rows}
    kept = [row for row in old if (row["pattern"], row["tokens"]) not in mine]
    stamped = [row | stamp(device) for row in rows]
    path.write_text(json.dumps({**about, "rows": kept + stamped}, indent=2) + "\n")
    print(f"written: {path}")
    return path
