"""What the sweeps of `training/` found, as HTML: accuracy against the size of the state, and tables."""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from saccade.bench import units
from saccade.bench.charts import POWERS, Axis, Label, place_labels

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "training"))

from rows import Row, best, read  # noqa: E402  it lies beside the scripts that write what it reads

WIDTH, HEIGHT = 760.0, 620.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 14.0, 44.0
HUES = {"linear": "#2f81c7", "recurrent": "#d07a1e", "reference": "#808080"}  # seen on white and on black alike


def found(sweep: str, folder: Path = ROOT / "training") -> list[Row]:
    """The rows of all files of a sweep."""
    return [row for path in files(sweep, folder) for row in read(path)]


def files(sweep: str, folder: Path = ROOT / "training") -> list[Path]:
    return sorted((folder / sweep).glob("*.jsonl"))


def recall(rows: Sequence[Row]) -> str:
    """A chart, a table and what failed, a protocol each; a sentence where there are no rows."""
    protocols: dict[str, list[Row]] = {}
    for row in rows:
        protocols.setdefault(json.dumps(row["key"]["protocol"], sort_keys=True), []).append(row)
    parts = []
    for mine in protocols.values():
        shown = best(mine, "contestant", "width")
        parts += [_p(_protocol(mine)), chart(shown), recall_table(shown), failures(mine)]
    return "".join(parts) or _missing("training/recall.py")


def images(rows: Sequence[Row]) -> str:
    """A table a task, and what failed; a sentence where there are no rows."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows if "task" in row):
        mine = [row for row in rows if row.get("task") == task]
        parts += [_p(f"<b>{html.escape(task.capitalize())}.</b> {_where(mine)}"), images_table(mine)]
    return "".join([*parts, failures(rows)]) if parts else _missing("training/images.py")


def _missing(script: str) -> str:
    return _p(f"Not measured yet: <code>python {script}</code> does it.")


def _p(inner: str) -> str:
    return f"<p>{inner}</p>"


def _where(rows: Sequence[Row]) -> str:
    machines, dates = ({row[name] for row in rows if name in row} for name in ("machine", "date"))
    where = ", ".join(sorted(machines))
    return html.escape(f"{where[:1].upper()}{where[1:]}; {' to '.join(sorted({min(dates), max(dates)}))}.")


def _protocol(rows: Sequence[Row]) -> str:
    p = rows[0]["key"]["protocol"]
    trained = ", ".join(f"{length}x{pairs} ({count:,})" for length, pairs, count in p["train"])
    tested = ", ".join(f"{length}x{pairs}" for length, pairs, _ in p["test"])
    rates = ", ".join(f"{rate:.2g}" for rate in sorted({row["key"]["rate"] for row in rows}))
    text = (
        f"Tokens x pairs (rows) of training: {trained}; of test: {tested}. At most {p['epochs']} epochs, "
        f"batches of {p['batch']}, a vocabulary of {p['vocab_size']}, the best of the rates {rates}. "
    )
    return html.escape(text) + _where(rows)


# The chart.


def chart(rows: Iterable[Row]) -> str:
    """An SVG in the page's own ink: bytes of the state, logarithmic, against the mean accuracy of the tests.

    A dot a mechanism and width, larger for wider models, and named once, at the widest; dense attention and windows are
    dashed lines. Those of other parameters have no name here, and the table has.
    """
    plotted = [row for row in rows if row["state_bytes"]]
    if not plotted:
        return ""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    sizes = [row["state_bytes"] for row in plotted]
    steps = next((steps for steps in POWERS if sum(min(sizes) <= s <= max(sizes) for s in steps) >= 3), POWERS[-1])
    x = Axis.over("bytes of the state", sizes, LEFT, right, units.nbytes, steps)

    def point(row: Row) -> tuple[float, float]:
        return x.at(row["state_bytes"]), round(bottom + row["accuracy"] * (TOP - bottom), 1)

    dots = [row for row in plotted if row["family"] != "reference"]
    ends, lines = [], []
    for width in sorted({row["key"]["width"] for row in plotted}):
        mine = [row for row in plotted if row["key"]["width"] == width and row["family"] == "reference"]
        windows = sorted((row for row in mine if row["key"]["id"] == "window"), key=lambda row: row["state_bytes"])
        dense = [row for row in mine if row["key"]["id"] == "dense"]
        if windows:
            lines.append([point(row) for row in windows])
            ends += [(row, f"window {row['key']['params']['size']}") for row in windows]
        for row in dense:
            at = point(row)
            lines.append([(LEFT, at[1]), (right, at[1])])
            ends.append((row, "dense"))
    named = [(row, row["contestant"]) for row in dots] + ends
    widest = {name: max(row["key"]["width"] for row, other in named if other == name) for _, name in named}
    shown = [(row, name) for row, name in named if row["key"]["width"] == widest[name] and "(" not in name]
    bare = [each for each in named if each not in shown]
    named = bare + shown  # those without a name lie below the others
    points = [point(row) for row, _ in named]
    near = [(x - 4, y - 4, x + 4, y + 4) for x, y in points[: len(bare)]]
    labels: list[Label | None] = [None] * len(bare)
    labels += place_labels(points[len(bare) :], [name for _, name in shown], (LEFT, TOP, right, bottom), near)
    parts = [_axes(x, bottom)]
    parts += [
        f'<polyline fill="none" points="{_joined(line)}" stroke="{HUES["reference"]}" stroke-dasharray="5 4"/>'
        for line in lines
    ]
    parts += [_trail(dots, name, point) for name in dict.fromkeys(row["contestant"] for row in dots)]
    for (row, _), (at_x, at_y), label in zip(named, points, labels, strict=True):
        if label and label.leader:
            x1, y1, x2, y2 = label.leader
            parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" opacity="0.4"/>')
        radius, hue = round(math.sqrt(row["key"]["width"]) / 2.6, 1), HUES.get(row["family"], "currentColor")
        told = f"<title>{html.escape(_told(row))}</title>"
        parts.append(f'<circle cx="{at_x}" cy="{at_y}" r="{radius}" fill="{hue}">{told}</circle>')
        if label:
            parts.append(
                f'<text x="{label.x}" y="{label.y + 3.5}" text-anchor="{label.anchor}">{html.escape(label.text)}</text>'
            )
    style = "width:100%;height:auto;font-size:11px;font-family:sans-serif"
    legend = " ".join(f'<span style="color:{HUES[name]}">●</span> {name}' for name in ("linear", "recurrent"))
    told = f"Mean accuracy of the tests. {legend}; dashed: dense attention, and windows of so many keys. Larger: wider."
    return (
        f'<figure class="measured"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" style="{style}" '
        f'aria-label="accuracy against bytes of the state" fill="currentColor">{"".join(parts)}</svg>'
        f"<figcaption>{told}</figcaption></figure>"
    )


def _axes(x: Axis, bottom: float) -> str:
    parts = []
    for tick in x.ticks:
        parts.append(
            f'<line x1="{tick.at}" x2="{tick.at}" y1="{bottom}" y2="{TOP}" stroke="currentColor" opacity="0.1"/>'
        )
        parts.append(f'<text x="{tick.at}" y="{bottom + 16}" text-anchor="middle">{tick.text}</text>')
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = round(bottom + share * (TOP - bottom), 1)
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y}" y2="{y}" stroke="currentColor" opacity="0.1"/>')
        parts.append(f'<text x="{x.start - 6}" y="{y + 3.5}" text-anchor="end">{share:.0%}</text>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{x.title}</text>')
    return f"<g>{''.join(parts)}</g>"


def _trail(dots: Iterable[Row], name: str, point: Callable[[Row], tuple[float, float]]) -> str:
    """A thin line from width to width of one mechanism."""
    mine = sorted((row for row in dots if row["contestant"] == name), key=lambda row: row["key"]["width"])
    line = _joined(point(row) for row in mine)
    return (
        f'<polyline fill="none" points="{line}" stroke="{HUES.get(mine[0]["family"], "currentColor")}" opacity="0.35"/>'
    )


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _told(row: Row) -> str:
    return (
        f"{row['contestant']}, width {row['key']['width']}: {row['accuracy']:.1%}, {units.nbytes(row['state_bytes'])}"
    )


# Tables.


def recall_table(rows: Sequence[Row]) -> str:
    tests = list(dict.fromkeys(name for row in rows for name in row["accuracies"]))
    head = ["mechanism", "width", "state", "mean", *tests, "rate", "training"]
    body = []
    for row in sorted(rows, key=lambda row: (row["key"]["width"], -row["accuracy"])):
        state = "—" if row["state_bytes"] is None else units.nbytes(row["state_bytes"])
        shares = [f"{row['accuracies'][name]:.1%}" if name in row["accuracies"] else "" for name in tests]
        cells = [str(row["key"]["width"]), state, f"{row['accuracy']:.1%}", *shares, f"{row['key']['rate']:.2g}"]
        body.append([_name(row), *map(html.escape, cells), _ended(row)])
    return _table(head, body)


def images_table(rows: Sequence[Row]) -> str:
    speed = {row["contestant"]: row["images_per_second"] for row in rows if "images_per_second" in row}
    dense = speed.get("dense")
    accurate = {row["contestant"]: row for row in best(rows, "contestant")}
    body = []
    for name, row in {row["contestant"]: row for row in rows}.items():
        mine = accurate.get(name)
        fast = f"{speed[name]:,.0f}" if name in speed else ""
        ratio = units.times(speed[name] / dense) if dense and name in speed else ""
        share = [f"{mine['accuracy']:.1%}", f"{mine['key']['rate']:.2g}", _ended(mine)] if mine else ["", "", ""]
        body.append([_name(row), share[0], fast, ratio, f"{row['parameters']:,}", *share[1:]])
    head = ["mechanism", "accuracy", "images a second", "of softmax", "parameters", "rate", "training"]
    return _table(head, sorted(body, key=lambda cells: -float(cells[1].rstrip("%") or 0)))


def failures(rows: Sequence[Row]) -> str:
    """Who failed, and of what, if it did not succeed another time."""
    done = {row["id"] for row in rows if "error" not in row}
    told = {row["contestant"]: row["error"] for row in rows if "error" in row and row["id"] not in done}
    lines = [f"<li><code>{html.escape(name)}</code>: {html.escape(why)}</li>" for name, why in told.items()]
    return f"<p>Not trained:</p><ul>{''.join(lines)}</ul>" if lines else ""


def _ended(row: Row) -> str:
    """How a training ended, where not after all of its steps."""
    share = f" after {row['steps'] / row['planned']:.0%}"
    return "" if row["ended"] == "all epochs" else html.escape(row["ended"] + share)


def _name(row: Row) -> str:
    text = html.escape(row["contestant"])
    return (
        text if row["family"] == "reference" else f'<a href="gallery/{html.escape(row["key"]["id"])}.html">{text}</a>'
    )


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in body)
    return (
        f'<div class="table-wrapper"><table class="docutils"><thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
