"""Charts as numbers: axes, curves, labels that do not collide, in the units of an SVG view box for a template."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from saccade.bench import units
from saccade.bench.records import Record
from saccade.bench.summary import Group, describe

WIDTH, HEIGHT = 400.0, 300.0
LEFT, TOP, BOTTOM = 54.0, 14.0, 46.0
GAP = 13.0  # least distance of two lines of labels
LETTER = 6.1  # width of a letter of a label
HUES, SHAPES = 8, 7

Format = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values `low` to `high` on `start` to `end` of the view box, with its ticks."""

    title: str
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @classmethod
    def over(
        cls, title: str, values: Iterable[float], start: float, end: float, text: Format, steps: Sequence[float]
    ) -> Axis:
        """An axis that holds `values` with a margin; ticks at those of the ascending `steps` that fit."""
        known = [v for v in values if v > 0] or [1.0]
        margin = max((max(known) / min(known)) ** 0.06, 1.15)
        axis = cls(title, min(known) / margin, max(known) * margin, start, end)
        marks = [s for s in steps if axis.low <= s <= axis.high]
        every = max(1, math.ceil(len(marks) * 34 / abs(end - start)))
        ticks = tuple(Tick(axis.at(s), text(s)) for s in marks[::every])
        return cls(title, axis.low, axis.high, start, end, ticks)


@dataclass(frozen=True)
class Label:
    """Text beside a mark, and the end of the thin line that leads to it; `anchor` as in SVG."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    leader: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One mechanism: its marks, joined by a line when `joined`; whiskers are pairs of x at the mark's height."""

    name: str
    style: int | None  # None: dense attention
    marks: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
    label: Label
    joined: bool = True
    whisker: tuple[float, float] | None = None
    strong: bool = False

    @property
    def path(self) -> str:
        return "M" + " L".join(f"{x} {y}" for x, y in self.marks)

    @property
    def hue(self) -> int | None:
        return None if self.style is None else self.style % HUES

    @property
    def shape(self) -> str:
        """The outline of its mark around (0, 0)."""
        return OUTLINES[0 if self.style is None else self.style % SHAPES]


@dataclass(frozen=True)
class Chart:
    """One panel: everything that the template needs to draw it, and to tell it in words."""

    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    height: float = HEIGHT
    front: str = ""  # path of the Pareto front
    one: float | None = None  # where the speed-up is 1
    notes: tuple[str, ...] = field(default_factory=tuple)


def _polygon(*points: tuple[float, float]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points) + "Z"


OUTLINES = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0Z",
    _polygon((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)),
    _polygon((0, -4.6), (4.4, 3.3), (-4.4, 3.3)),
    _polygon((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
    _polygon((0, 4.6), (4.4, -3.3), (-4.4, -3.3)),
    _polygon((-4.5, -1.5), (-1.5, -1.5), (-1.5, -4.5), (1.5, -4.5), (1.5, -1.5), (4.5, -1.5), (4.5, 1.5), (1.5, 1.5),
             (1.5, 4.5), (-1.5, 4.5), (-1.5, 1.5), (-4.5, 1.5)),
    _polygon((0, -5), (1.5, -1.6), (5, -1.5), (2.3, 0.9), (3.1, 4.4), (0, 2.4), (-3.1, 4.4), (-2.3, 0.9), (-5, -1.5),
             (-1.5, -1.6)),
)  # fmt: skip

DECADES = [10.0**p for p in range(-9, 16)]
STEPS = (
    DECADES,
    [d * m for d in DECADES for m in (1, 2, 5)],
    [d * m for d in DECADES for m in (1, 1.2, 1.5, 2, 3, 4, 6, 8)],
)
POWERS = ([4.0 ** (2 * p) for p in range(15)], [4.0**p for p in range(30)], [2.0**p for p in range(60)])


def steps_for(values: Iterable[float], choices: Sequence[Sequence[float]] = STEPS) -> Sequence[float]:
    """Of `choices`, coarse ones first, the first that has three steps or more among the values; else the last."""
    known = [v for v in values if v > 0] or [1.0]
    return next((c for c in choices if sum(min(known) <= s <= max(known) for s in c) >= 3), choices[-1])


def spread(wanted: Sequence[float], low: float, high: float, gap: float = GAP) -> list[float]:
    """Positions near the `wanted` ones, in their order from top to bottom, at least `gap` apart, inside low .. high.

    >>> spread([5.0, 6.0, 40.0], 0.0, 100.0, 10.0)
    [0.5, 10.5, 40.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # start, count, sum of (wanted - offset in the block)
    for i in order:
        blocks.append([min(max(wanted[i], low), high), 1, wanted[i]])
        while True:
            _, count, total = blocks[-1]
            blocks[-1][0] = min(max(total / count, low), max(low, high - gap * (count - 1)))
            if len(blocks) < 2 or blocks[-2][0] + gap * blocks[-2][1] <= blocks[-1][0]:
                break
            _, count, total = blocks.pop()
            blocks[-1][2] += total - count * gap * blocks[-1][1]
            blocks[-1][1] += count
    flat = [start + gap * k for start, count, _ in blocks for k in range(int(count))]
    found = [0.0] * len(wanted)
    for position, i in zip(flat, order, strict=True):
        found[i] = round(position, 1)
    return found


def against_length(group: Group, styles: dict[str, int], what: str) -> Chart:
    """Time ("seconds") or memory ("peak_bytes") of every mechanism of a group, and of dense attention, by length."""
    title, text = {"seconds": ("Time", units.seconds), "peak_bytes": ("Memory", units.nbytes)}[what]
    axis = {"seconds": "time of a call", "peak_bytes": "peak memory"}[what]
    rows: dict[str, list[tuple[int, float]]] = {}
    for record in (*group.dense, *group.records):
        value = getattr(record, what)
        if value:
            rows.setdefault(record.mechanism, []).append((record.length, value))
    lengths = sorted({n for points in rows.values() for n, _ in points})
    values = [v for points in rows.values() for _, v in points]
    height = max(HEIGHT, TOP + BOTTOM + GAP * len(rows))
    right = WIDTH - 24 - LETTER * max(len(name) for name in rows)
    x = Axis.over("tokens", lengths, LEFT, right, units.tokens, lengths)
    steps = steps_for(values) if what == "seconds" else steps_for(values, POWERS)
    y = Axis.over(axis, values, height - BOTTOM, TOP, text, steps)
    marks = {name: tuple((x.at(n), y.at(v)) for n, v in points) for name, points in rows.items()}
    labels = _label_curves(marks, x, (LEFT, TOP, right + 8, height - BOTTOM))
    series = []
    for name, points in rows.items():
        notes = tuple(f"{name}, {n} tokens: {text(v)}" for n, v in points)
        series.append(Series(name, styles.get(name), marks[name], notes, labels[name]))
    told = "; ".join(f"{name} {text(points[-1][1])} at {points[-1][0]}" for name, points in rows.items())
    about = f"At each one's longest length: {told}."
    return Chart(f"{title} against length", about, x, y, tuple(series), height)


def _label_curves(
    marks: dict[str, tuple[tuple[float, float], ...]], x: Axis, box: tuple[float, float, float, float]
) -> dict[str, Label]:
    """Those that reach the longest length are named in a column beside the chart, the others where they end."""
    reach = max(points[-1][0] for points in marks.values())
    whole = [name for name, points in marks.items() if points[-1][0] == reach]
    found = {}
    for name, at in zip(whole, spread([marks[name][-1][1] for name in whole], box[1] + 2, box[3]), strict=True):
        last_x, last_y = marks[name][-1]
        found[name] = Label(x.end + 16, at, name, leader=(last_x + 5, last_y, x.end + 13, at))
    short = [name for name in marks if name not in found]
    curves = [box for points in marks.values() for box in _along(points)]
    placed = place_labels([marks[name][-1] for name in short], short, box, curves)
    return found | dict(zip(short, placed, strict=True))


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Small boxes that cover a curve."""
    boxes = []
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        count = max(2, math.ceil(math.hypot(x2 - x1, y2 - y1) / 6))
        at = [(x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count) for i in range(count + 1)]
        boxes += [(x - 2, y - 2, x + 2, y + 2) for x, y in at]
    return boxes


def against_error(group: Group, styles: dict[str, int]) -> Chart | None:
    """Approximation error against speed-up at the length where a group is compared, with the Pareto front.

    None for layers, which have no error to show. An error below the axis stands on the tick of zero.
    """
    shown = [r for r in group.compared if r.approximation_error is not None and r.speedup]
    if not shown:
        return None
    dense = next(r for r in group.dense if r.length == group.length)
    errors = [r.approximation_error for r in shown if r.approximation_error]
    floor = max(min([*errors, 0.1]), max([*errors, 1e-3]) / 1e4)
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM
    ratios = [1.0, *(v for r in shown for v in (r.speedup, r.speedup_low, r.speedup_high) if v)]
    x = Axis.over("times faster than dense", ratios, LEFT, right, units.times, steps_for(ratios))
    high = max([*errors, 10 * floor])
    lowest = floor / (high / floor) ** 0.25
    values = [lowest, high]
    y = Axis.over(
        "error against dense", values, bottom - 12, TOP, units.error, [s for s in steps_for(values) if s >= floor]
    )
    zero = Tick(bottom - 4, "0")
    y = Axis(y.title, y.low, y.high, y.start, y.end, (zero, *y.ticks))

    def point(record: Record) -> tuple[float, float]:
        ratio = 1.0 if record.mechanism == "dense" else record.speedup or 1.0
        error = record.approximation_error or 0.0
        return x.at(ratio), y.at(error) if error >= y.low else zero.at

    rows = [dense, *shown]
    points = [point(r) for r in rows]
    bounds = [(r.speedup_low, r.speedup_high) if r is not dense else (None, None) for r in rows]
    whiskers = [(x.at(low), x.at(high)) if low and high else None for low, high in bounds]
    bars = [(w[0], y - 2, w[1], y + 2) for w, (_, y) in zip(whiskers, points, strict=True) if w]
    labels = place_labels(points, [r.mechanism for r in rows], (LEFT, TOP, right, bottom), bars)
    front = group.front
    series = []
    for record, mark, label, whisker in zip(rows, points, labels, whiskers, strict=True):
        name, style = record.mechanism, styles.get(record.mechanism)
        strong = record in front
        series.append(Series(name, style, (mark,), (describe(record),), label, False, whisker, strong))
    steps = sorted(point(r) for r in front)
    path = "M" + " L".join(f"{a} {b}" for a, b in steps) if len(steps) > 1 else ""
    told = "; ".join(note for s in series for note in s.notes)
    named = ", ".join(r.mechanism for r in front)
    about = f"At {group.length} tokens: {told}. " + (f"Pareto front: {named}." if front else "No Pareto front.")
    return Chart("Error against speed-up", about, x, y, tuple(series), front=path, one=x.at(1.0))


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    box: tuple[float, float, float, float],
    obstacles: Sequence[tuple[float, float, float, float]] = (),
) -> list[Label]:
    """A label for every point, inside `box` (left, top, right, bottom), clear of points, obstacles and one another.

    Of a fixed set of places around a point, near ones first, the one that covers least is taken; those that are far
    away get a leader.
    """
    taken = [*obstacles, *((x - 5, y - 5, x + 5, y + 5) for x, y in points)]
    labels: dict[int, Label] = {}
    for at in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0])):
        (x, y), width = points[at], LETTER * len(texts[at])
        best: tuple[float, Label, tuple[float, float, float, float]] | None = None
        for away in (9.0, 18.0, 30.0, 44.0, 60.0):
            for turn in (0, 4, 2, 6, 1, 7, 3, 5):
                dx, dy = away * math.cos(turn * math.pi / 4), away * math.sin(turn * math.pi / 4)
                anchor = "middle" if turn in (2, 6) else "start" if abs(turn - 4) > 2 else "end"
                left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                middle = y + dy + (2 if turn in (2,) else -2 if turn in (6,) else 0)
                frame = (left, middle - 6, left + width, middle + 6)
                outside = sum(
                    max(0.0, d) for d in (box[0] - frame[0], box[1] - frame[1], frame[2] - box[2], frame[3] - box[3])
                )
                covered = sum(_overlap(frame, other) for other in taken)
                cost = covered + 60 * outside + away / 4
                if best is None or cost < best[0]:
                    ends = (
                        x + dx * 5 / away,
                        y + dy * 5 / away,
                        x + dx * (1 - 3 / away),
                        middle - (0 if abs(dy) < 1 else math.copysign(4, dy)),
                    )
                    leader = tuple(round(v, 1) for v in ends) if away > 12 else None
                    best = cost, Label(round(x + dx, 1), round(middle, 1), texts[at], anchor, leader), frame  # type: ignore[arg-type]
        assert best is not None
        labels[at] = best[1]
        taken.append(best[2])
    return [labels[i] for i in range(len(points))]


def _overlap(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> float:
    wide, high = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(0.0, wide) * max(0.0, high)
