"""What a comparison leaves behind: results.jsonl, results.csv, and one self-contained page, report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from saccade.bench import units
from saccade.bench.charts import Chart, against_error, against_length
from saccade.bench.compare import Comparison
from saccade.bench.draw import Drawing
from saccade.bench.records import Status, write_atomic, write_csv, write_jsonl
from saccade.bench.summary import Group, dropped, findings, groups, lines

MEANINGS = {
    Status.OK: "its numbers hold, and it was timed.",
    Status.UNPROVEN: "measured, not judged: its own equations lose all digits in this dtype.",
    Status.WRONG: "its numbers do not hold, or it crashed.",
    Status.UNSUPPORTED: "it declined this shape, dtype or device.",
    Status.OOM: "memory ran out, or would have.",
    Status.FELL_BACK: "another backend ran than the one asked for.",
    Status.TIMEOUT: "a call takes longer than its share of the budget.",
}
BUSY = 0.5  # load per core from which other work is felt in the times


@dataclass(frozen=True)
class Picture:
    """A drawn pattern with its captions."""

    name: str
    caption: str
    images: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One group on the page."""

    group: Group
    charts: list[Chart]
    pictures: list[Picture]
    undrawn: list[str]

    @property
    def baseline(self) -> str:
        """What the times are a ratio to, and how long it took."""
        first, last = self.group.dense[0], self.group.dense[-1]
        spans = f"{units.seconds(first.seconds or 0)} at {first.length} tokens"
        if last is not first:
            spans += f" to {units.seconds(last.seconds or 0)} at {last.length}"
        return f"Baseline: {self.group.place.baseline}, {spans} ({last.shape} at the longest)."


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write the three files into `folder`; each appears whole or not at all."""
    return [
        write_atomic(folder / "report.html", page(found)),
        write_csv(folder / "results.csv", found.records),
        write_jsonl(folder / "results.jsonl", found.records, found.environment),
    ]


def page(found: Comparison) -> str:
    """The report as HTML: charts as inline SVG, patterns as data URIs, nothing that needs a network or a script."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table = lines(found)
    return environment.get_template("report.html.j2").render(
        found=found,
        units=units,
        findings=findings(found),
        sections=[_section(found, group) for group in groups(found)],
        table=table,
        dropped=dropped(found),
        statuses={status: sum(line.record.status == status for line in table) for status in Status},
        busy=busy(found),
        stopped=stopped(found),
        meanings=MEANINGS,
    )


def stopped(found: Comparison) -> str:
    """What an interrupt came before; empty when there was none."""
    if found.unmeasured is None:
        return ""
    return f"It was stopped before it was done. Without any figure: {', '.join(found.unmeasured) or 'none'}."


def busy(found: Comparison) -> str:
    """A warning when other programs held the processors before or during the comparison; empty otherwise."""
    stamp = found.environment
    threads = sorted({r.threads for r in found.records if r.threads})
    load = stamp.get("load") or 0.0
    if load <= BUSY * stamp["cores"] and (not threads or threads[0] >= stamp["threads"]):
        return ""
    used = " or ".join(map(str, threads)) or str(stamp["threads"])
    return (
        f"Other programs were running (load {load:.1f} as this began; {used} of {stamp['threads']} threads could be "
        "used): intervals are wider, and calls of many small operators look slower beside one large operator than "
        "they are."
    )


def _section(found: Comparison, group: Group) -> Section:
    styles = {name: at for at, name in enumerate(group.mechanisms)}
    charts = [
        against_length(group, styles, "seconds"),
        against_error(group, styles),
        against_length(group, styles, "peak_bytes"),
    ]
    pictures = []
    if group.place in found.references:
        pictures.append(_picture("dense", "the baseline", found.references[group.place]))
    last = {r.mechanism: r for r in group.records}
    for name in group.mechanisms:
        if name in found.drawings:
            kept, length = last[name].density, last[name].length
            caption = "weighs no single pairs" if kept is None else f"density {units.share(kept)} at {length}"
            pictures.append(_picture(name, caption, found.drawings[name]))
    undrawn = [name for name in group.mechanisms if name not in found.drawings]
    return Section(group, [c for c in charts if c], pictures, undrawn)


def _picture(name: str, caption: str, drawing: Drawing) -> Picture:
    return Picture(name, caption, drawing.images())
