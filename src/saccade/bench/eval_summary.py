"""What an evaluation found: a table of tasks, a table of contestants, and one line; on the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saccade.bench import units
from saccade.bench.eval import FLOOR, Evaluation
from saccade.bench.eval_records import DENSE, Cell, Protocol, Time, read_rows, write_csv
from saccade.bench.records import Status, write_atomic

NO_INFORMATION = "†"
Rows = list[list[str]]


@dataclass(frozen=True)
class Line:
    """A contestant at one length under one protocol. cells: of the tasks that tell something, the worst first."""

    what: str
    length: int
    protocol: Protocol
    cells: tuple[Cell, ...]
    all_cells: tuple[Cell, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(cell.score for cell in self.cells) if self.cells else None


def gathered(folder: Path, tasks: Iterable[str] | None = None, lengths: Iterable[int] | None = None) -> Evaluation:
    """What lies in a folder and those in it, of one run or of several: `results*.jsonl` and `times*.jsonl`.

    Of cells that differ in their examples alone those with the most count. tasks, lengths: of these alone (default:
    all). Errors: ValueError for rows of several models or dtypes, and where there are none.
    """
    scored = [read_rows(path, Cell) for path in sorted(folder.rglob("results*.jsonl"))]
    timed = [read_rows(path, Time) for path in sorted(folder.rglob("times*.jsonl"))]
    cells = [
        cell
        for rows, _ in scored
        for cell in rows
        if (tasks is None or cell.task in tasks) and (lengths is None or cell.length in lengths)
    ]
    times = {row.key: row for rows, _ in timed for row in rows}
    if not cells:
        raise ValueError(f"out: no rows of an evaluation in {str(folder)!r}; pass the folder of one, or measure")
    kinds = sorted({f"{cell.model} in {cell.dtype}" for cell in cells})
    if len(kinds) > 1:
        raise ValueError(f"out: {str(folder)!r} holds rows of {', '.join(kinds)}; pass those of one")
    most: dict[Any, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.count):
        most[cell.length, cell.what != DENSE, cell.what, cell.task, cell.protocol] = cell
    stamp = max((stamp for _, stamp in (*scored, *timed)), key=lambda stamp: stamp.get("time", ""))
    ordered = tuple(most[key] for key in sorted(most))
    return Evaluation(ordered, stamp, seconds=sum(cell.seconds or 0.0 for cell in ordered), times=tuple(times.values()))


def scored(found: Evaluation) -> list[Cell]:
    return [cell for cell in found.cells if cell.status == Status.OK]


def uninformative(found: Evaluation) -> set[tuple[str, int]]:
    """Tasks and lengths at which dense attention scores below `FLOOR`: the model cannot do them, whatever attends."""
    return {(c.task, c.length) for c in scored(found) if c.what == DENSE and c.score < FLOOR}


def lines(found: Evaluation) -> list[Line]:
    """One line a length, contestant and protocol, in the order of the cells; the two protocols below one another."""
    floor = uninformative(found)
    groups: dict[tuple[int, str, Protocol], list[Cell]] = {}
    for cell in scored(found):
        groups.setdefault((cell.length, cell.what, cell.protocol), []).append(cell)
    order = list(dict.fromkeys(key[:2] for key in groups))
    return [
        Line(
            what,
            length,
            protocol,
            tuple(sorted((c for c in cells if (c.task, c.length) not in floor), key=lambda c: c.score)),
            tuple(cells),
        )
        for (length, what, protocol), cells in sorted(groups.items(), key=lambda item: order.index(item[0][:2]))
    ]


def by_contestant(found: Evaluation) -> tuple[list[str], Rows]:
    """Head and rows: the mean over the tasks that tell something, and the worst of them."""
    head = ["what", "tokens", "protocol", "tasks", "mean", "worst", "cache", "seconds"]
    rows = []
    for line in lines(found):
        sizes = [c.cache_bytes for c in line.all_cells if c.cache_bytes is not None]
        worst = f"{line.cells[0].score:.2f} {line.cells[0].task}" if line.cells else "—"
        rows.append(
            [
                line.what,
                units.tokens(line.length),
                line.protocol.value,
                f"{len(line.cells)} of {len(line.all_cells)}",
                "—" if line.mean is None else f"{line.mean:.2f}",
                worst,
                units.nbytes(statistics.fmean(sizes)) if sizes else "—",
                f"{sum(c.seconds or 0.0 for c in line.all_cells):.0f}",
            ]
        )
    return head, rows


def by_task(found: Evaluation) -> tuple[list[str], Rows]:
    """Head and rows: every score with its interval, a task and length a row; two protocols as aware | agnostic."""
    floor = uninformative(found)
    whats = list(dict.fromkeys(cell.what for cell in scored(found)))
    cells = {(c.task, c.length, c.what, c.protocol): c for c in scored(found)}
    rows = []
    for task, length in sorted({(c.task, c.length) for c in scored(found)}):
        row = [f"{task}{' ' + NO_INFORMATION if (task, length) in floor else ''}", units.tokens(length)]
        for what in whats:
            here = [cells.get((task, length, what, protocol)) for protocol in Protocol]
            row.append(" \\| ".join(_score(cell) for cell in here if cell) or "—")
        rows.append(row)
    return ["task", "tokens", *whats], rows


def _score(cell: Cell) -> str:
    low, high = cell.interval
    return f"{cell.score:.2f} ({low:.2f}-{high:.2f})"


def dropped(found: Evaluation) -> list[str]:
    """Why cells have no score: a line a contestant and reason."""
    told: dict[tuple[str, str], list[str]] = {}
    for cell in found.cells:
        if cell.status != Status.OK:
            where = f"{cell.task} at {units.tokens(cell.length)}"
            told.setdefault((cell.what, f"{cell.status}: {cell.message}"), []).append(where)
    return [
        f"{what}: {why} ({where[0] if len(where) == 1 else f'{len(where)} tasks and lengths'})"
        for (what, why), where in told.items()
    ]


def notes(found: Evaluation) -> list[str]:
    """What one must know to read the tables."""
    cells = scored(found)
    told = []
    if cells:
        examples, asked = sorted({c.count for c in cells}), max(c.asked for c in cells)
        counts = " or ".join(map(str, examples))
        told.append(
            f"Mean over {counts} examples (up to {asked} questions a cell) with its 95 % interval. Two figures are "
            f"{Protocol.AWARE} | {Protocol.AGNOSTIC}; where nothing is decided from later tokens both are one."
        )
    floor = uninformative(found)
    if floor:
        names = sorted({task for task, _ in floor})
        told.append(
            f"{NO_INFORMATION} Dense attention scores below {FLOOR:g}: the model cannot do it, so that the others' "
            f"scores tell nothing, and are in no mean ({', '.join(names)})."
        )
    return told


def verdict(found: Evaluation) -> str:
    """One line: what the model can do, who lost least, and what is left to do."""
    tried = {(c.task, c.length) for c in scored(found) if c.what == DENSE}
    solved = tried - uninformative(found)
    parts = [f"{len(solved)} of {len(tried)} tasks and lengths tell something"]
    others = [line for line in lines(found) if line.what != DENSE and line.mean is not None]
    if others:
        longest = max(line.length for line in others)
        # Of a contestant's protocols the harder one counts.
        least: dict[str, Line] = {}
        for line in others:
            if line.length == longest and (line.what not in least or line.mean < least[line.what].mean):  # type: ignore[operator]
                least[line.what] = line
        best = max(least.values(), key=lambda line: line.mean or 0.0)
        parts.append(
            f"least lost at {units.tokens(longest)}: {best.what}, mean {best.mean:.2f}, "
            f"worst {best.cells[0].score:.2f} ({best.cells[0].task})"
        )
    if found.reused:
        parts.append(f"{found.reused} cells from before")
    if found.left:
        parts.append(f"{found.left} left, the same command goes on with them")
    return "; ".join([*parts, f"{found.seconds:.0f} s"]) + "."


def tell(found: Evaluation, console: Console) -> None:
    """Print all of it."""
    for head, rows in (by_task(found), by_contestant(found)):
        console.print(printed(head, rows))
    for note in (*notes(found), *dropped(found)):
        console.print(escape(note), highlight=False)
    console.print(escape(verdict(found)), highlight=False)


def printed(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(escape(name), overflow="fold", no_wrap=name in ("task", "tokens", "protocol", "mean"))
    for row in rows:
        style = "dim" if NO_INFORMATION in row[0] else ""
        table.add_row(*(escape(cell.replace("\\|", "|")) for cell in row), style=style)
    return table


def markdown(found: Evaluation) -> str:
    """The tables and the notes."""
    parts = [table(*by_task(found)), *notes(found), *dropped(found), table(*by_contestant(found))]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    sides = ["---" if name in ("task", "what", "protocol") else "---:" for name in head]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in ([f"`{n}`" if "(" in n else n for n in head], sides, *rows)
    )


def write(found: Evaluation, folder: Path) -> list[Path]:
    """summary.md and results.csv, beside the results.jsonl that grew as cells were finished."""
    return [
        write_atomic(folder / "summary.md", markdown(found)),
        write_csv(folder / "results.csv", found.cells),
        *sorted(folder.glob("*.jsonl")),
    ]
