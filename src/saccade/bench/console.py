"""A comparison on the terminal: the table, the findings, and what was dropped."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from saccade.bench import units
from saccade.bench.compare import Comparison
from saccade.bench.records import Record, Status
from saccade.bench.report import busy, stopped
from saccade.bench.summary import dropped, findings, lines

STYLES = {Status.OK: "green", Status.WRONG: "bold red", Status.FELL_BACK: "magenta"}
COLUMNS = (
    "inputs", "tokens", "time", "x faster (95 %)", "error", "first call", "memory", "density", "state", "num. error",
    "backend",
)  # fmt: skip
# Where a terminal is too narrow for all, these go first, one after another.
LEAST_FIRST = (
    "state", "backend", "num. error", "density", "first call", "memory", "inputs", "error", "tokens",
    "status",
)  # fmt: skip


def table(found: Comparison, console: Console) -> Table:
    """One row a mechanism at its longest length, with as many columns as `console` is wide; the time is never cut."""
    rows = [(line.record, _cells(line.record)) for line in lines(found)]
    shown = ["status", *COLUMNS]
    boundless = console.options.update(max_width=1000)
    for name in LEAST_FIRST:
        if console.measure(_drawn(rows, shown), options=boundless).maximum <= console.width:
            break
        shown.remove(name)
    return _drawn(rows, shown)


def _drawn(rows: list[tuple[Record, dict[str, str]]], shown: list[str]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("mechanism", overflow="ellipsis")  # the one column that gives way
    for name in shown:
        least = max(len(name), *(len(cells.get(name, "")) for _, cells in rows)) if rows else None
        justify: JustifyMethod = "left" if name in ("status", "inputs") else "right"
        drawn.add_column(name, justify=justify, no_wrap=True, min_width=least if name == "time" else None)
    for record, cells in rows:
        style = STYLES.get(record.status, "yellow")
        styled = cells | {"status": f"[{style}]{record.status}[/]"}
        drawn.add_row(record.mechanism, *(styled.get(name, "") for name in shown))
    return drawn


def _cells(r: Record) -> dict[str, str]:
    """The cells of a record by column; those without a figure are left out."""
    cells = {"inputs": f"{r.workload} {r.grid}-D" if r.grid else r.workload}
    if r.first_seconds is not None:
        cells["first call"] = units.seconds(r.first_seconds)
    if r.seconds is None:
        return cells
    interval = f" ({_brief(r.speedup_low)}-{_brief(r.speedup_high)})" if r.speedup_low and r.speedup_high else " (?)"
    cells["tokens"], cells["time"], cells["backend"] = str(r.length), units.seconds(r.seconds), r.backend
    cells["x faster (95 %)"], cells["memory"] = f"{r.speedup:.3g}{interval}", units.nbytes(r.peak_bytes or 0)
    if r.density is not None:
        cells["density"] = units.share(r.density)
    if r.state_bytes is not None:
        cells["state"] = f"{units.nbytes(r.state_bytes)} at {r.state_tokens}"
    if r.numerical_error is not None:
        cells["num. error"] = f"{r.numerical_error:.1e}"
    if r.approximation_error is not None:
        cells["error"] = units.error(r.approximation_error)
    return cells


def _brief(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:.0f}"


def tell(found: Comparison, console: Console) -> None:
    """Print all of it."""
    console.print(table(found, console))
    for line in dropped(found):
        own = line.record.status
        style = STYLES.get(line.stopped.status if line.stopped else own, "yellow")
        text = line.message if own == Status.OK else f"{own}: {line.message}"
        console.print(f"[{style}]{line.record.mechanism}[/]: {escape(text)}", highlight=False)
    console.print()
    for sentence in findings(found):
        console.print(escape(sentence), highlight=False)
    for warning in filter(None, (busy(found), stopped(found))):
        console.print(escape(warning), style="yellow", highlight=False)
    spent = f"{found.seconds:.0f} s of a budget of {found.budget:.0f} s"
    if found.first_seconds:
        spent += f", and {found.first_seconds:.0f} s of first calls besides"
    console.print(spent, style="dim", highlight=False)
