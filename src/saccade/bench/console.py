"""A comparison on the terminal: the table, the findings, and what was dropped."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saccade.bench import units
from saccade.bench.compare import Comparison
from saccade.bench.records import Record, Status
from saccade.bench.report import busy
from saccade.bench.summary import dropped, findings, lines

STYLES = {Status.OK: "green", Status.WRONG: "bold red", Status.FELL_BACK: "magenta"}
WIDE = 120  # columns of a terminal that holds the whole table


def table(found: Comparison, *, wide: bool = True) -> Table:
    """One row a mechanism at its longest length; not `wide`: only what matters most."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows = [(line.record, _cells(line.record)) for line in lines(found)]
    drawn.add_column("mechanism", no_wrap=True)
    drawn.add_column("status", no_wrap=True)
    names = ["tokens", "time", "x faster (95 %)", "error"]
    names = ["inputs", *names, "memory", "density", "num. error", "backend"] if wide else names
    for name in names:
        drawn.add_column(name, justify="left" if name == "inputs" else "right", no_wrap=True)
    for record, cells in rows:
        status = f"[{STYLES.get(record.status, 'yellow')}]{record.status}[/]"
        drawn.add_row(record.mechanism, status, *(cells.get(name, "") for name in names))
    return drawn


def _cells(r: Record) -> dict[str, str]:
    """The cells of a record by column; those without a figure are left out."""
    cells = {"inputs": f"{r.workload} {r.grid}-D" if r.grid else r.workload}
    if r.status != Status.OK:
        return cells
    interval = f" ({r.speedup_low:.3g}-{r.speedup_high:.3g})" if r.speedup_low and r.speedup_high else " (?)"
    cells["tokens"], cells["time"], cells["backend"] = str(r.length), units.seconds(r.seconds or 0.0), r.backend
    cells["x faster (95 %)"], cells["memory"] = f"{r.speedup:.3g}{interval}", units.nbytes(r.peak_bytes or 0)
    if r.density is not None:
        cells["density"] = units.share(r.density)
    if r.numerical_error is not None:
        cells["num. error"] = f"{r.numerical_error:.1e}"
    if r.approximation_error is not None:
        cells["error"] = units.error(r.approximation_error)
    return cells


def tell(found: Comparison, console: Console) -> None:
    """Print all of it."""
    console.print(table(found, wide=console.width >= WIDE))
    for line in dropped(found):
        status = line.stopped.status if line.stopped else line.record.status
        style = STYLES.get(status, "yellow")
        text = line.message if line.stopped else f"{status}: {line.message}"
        console.print(f"[{style}]{line.record.mechanism}[/]: {escape(text)}", highlight=False)
    console.print()
    for sentence in findings(found):
        console.print(escape(sentence), highlight=False)
    if warning := busy(found):
        console.print(escape(warning), style="yellow", highlight=False)
    console.print(f"{found.seconds:.0f} s of a budget of {found.budget:.0f} s", style="dim", highlight=False)
