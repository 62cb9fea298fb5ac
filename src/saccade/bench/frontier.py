"""The frontier of an evaluation: score against the memory held, and against the time of a decoded token, on one page.

A point is a contestant at one length under one protocol. Its memory is a share of the bytes that dense attention holds,
its time a ratio to dense attention's, its score the mean over the tasks that dense attention can do, or the worst.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import jinja2
from rich.console import Console
from rich.markup import escape

from saccade.bench import units
from saccade.bench.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Axis, Chart, Label, Series, Tick, place_labels
from saccade.bench.eval import FLOOR, Evaluation, spelt
from saccade.bench.eval_records import DENSE, Cell, Protocol, wilson, write_csv
from saccade.bench.eval_summary import Line, dropped, lines, printed, scored, table, uninformative
from saccade.bench.records import write_atomic
from saccade.bench.report import BUSY

CLOSE = 0.02  # of a score: a loss that is none
SLACK = 0.05  # of dense attention's memory: whole pages hold a little more than a budget says
NEEDLES, QUARTER = "multi_key", 0.25
ABOUT = {
    Protocol.AWARE: "the question is in the prompt",
    Protocol.AGNOSTIC: "the question comes after the context was read",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A contestant at one length under one protocol. policy: its name but for the budget, which is None where it takes
    none. cells: of the tasks that tell something, the worst first.
    """

    what: str
    policy: str
    budget: float | None
    length: int
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.policy if self.budget is None else f"{self.policy} {units.share(self.budget)}"

    @cached_property
    def mean(self) -> float:
        return statistics.fmean(cell.score for cell in self.cells)

    @property
    def worst(self) -> Cell:
        return self.cells[0]

    @cached_property
    def memory(self) -> float | None:
        """Bytes held / those of dense attention."""
        held = [c.cache_bytes / c.dense_bytes for c in self.cells if c.cache_bytes is not None and c.dense_bytes]
        return statistics.fmean(held) if held else None

    @cached_property
    def time(self) -> float | None:
        """Time of a decoded token / dense attention's, the median over tasks."""
        if self.what == DENSE:
            return 1.0
        found = [c.decode_over_dense for c in self.cells if c.decode_over_dense]
        return statistics.median(found) if found else None

    @cached_property
    def seconds(self) -> float | None:
        found = [c.decode_seconds for c in self.cells if c.decode_seconds]
        return statistics.median(found) if found else None

    @cached_property
    def answer_kept(self) -> float | None:
        found = [c.answer_kept for c in self.cells if c.answer_kept is not None]
        return statistics.fmean(found) if found else None

    @cached_property
    def question_kept(self) -> float | None:
        found = [c.question_kept for c in self.cells if c.question_kept is not None]
        return statistics.fmean(found) if found else None

    def on(self, task: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.task == task), None)


@dataclass(frozen=True)
class Panel:
    """A chart with labels of those on its Pareto set, and that set in words."""

    chart: Chart
    labels: tuple[Label, ...]
    front: str


@dataclass(frozen=True)
class Section:
    """Points of one length and protocol, dense attention's among them. budgets: those that were asked for."""

    length: int
    protocol: Protocol
    points: tuple[Point, ...]
    budgets: tuple[float, ...]

    @property
    def title(self) -> str:
        return f"{self.protocol.capitalize()}, {units.tokens(self.length)} tokens: {ABOUT[self.protocol]}"

    @property
    def dense(self) -> Point:
        return next(point for point in self.points if point.what == DENSE)

    @property
    def ordered(self) -> list[Point]:
        """Dense attention first, then by policy and budget."""
        return sorted(self.points, key=lambda p: (p.what != DENSE, p.policy, p.budget or 0.0))

    @property
    def tasks(self) -> list[str]:
        return sorted(cell.task for cell in self.dense.cells)

    @property
    def examples(self) -> int:
        return sum(len(cell.scores) for cell in self.dense.cells)

    def within(self, share: float) -> list[Point]:
        """Those that hold at most this share of dense attention's memory; the best first.

        By the mean, then the worst task, then the smaller memory and time. What holds as much as dense attention and is
        not faster is none of them: by chance it may score a little more.
        """
        known = [
            point
            for point in self.points
            if point.memory is not None
            and point.memory <= share + SLACK
            and (point.what == DENSE or point.memory < 1 or (point.time is not None and point.time < 1))
        ]
        return sorted(known, key=lambda p: (-p.mean, -p.worst.score, p.memory, p.time or 0.0))

    def loss(self, point: Point) -> float:
        return self.dense.mean - point.mean

    def advice(self, share: float) -> str:
        """What to take with so much memory."""
        best = self.within(share)
        return f"With {units.share(share)} of the memory take {self.told(best[0]) if best else 'nothing: none fits'}."

    def told(self, point: Point) -> str:
        if point.what == DENSE:
            return f"dense ({point.mean:.2f})"
        worst = f"worst {point.worst.score:.2f} on {point.worst.task}"
        held = f"holds {units.share(point.memory or 0.0)}"
        return f"{point.name} ({point.mean:.2f}, {_points(self.loss(point))}; {worst}; {held})"

    def enough(self) -> Point | None:
        """The least memory that stays within 2 points of dense attention on average; None where only dense does."""
        close = [p for p in self.points if p.memory is not None and self.loss(p) <= CLOSE + 1e-9]
        best = min(close, key=lambda p: (p.memory, -p.mean), default=None)
        return None if best is None or best.what == DENSE else best

    def needles(self) -> str:
        """Who still finds needles among needles with a quarter of the memory, and what the others have dropped."""
        dense, share = self.dense.on(NEEDLES), focus(self.budgets)
        found = [(point, cell) for point in self.within(share) if (cell := point.on(NEEDLES)) and point.what != DENSE]
        # Of each policy the most that it reaches, and of equal scores the one that holds most.
        found.sort(key=lambda pair: (pair[1].score, pair[0].memory or 0.0))
        known = list({point.policy: (point, cell) for point, cell in found}.values())
        known.sort(key=lambda pair: -pair[1].score)
        if dense is None or not known:
            return ""
        where = f"on {NEEDLES} with {units.share(share)} of the memory"
        close = [point.name for point, cell in known if dense.score - cell.score <= CLOSE + 1e-9]
        if close:
            return f"Within 2 points of dense {where}: {', '.join(close)}."
        told = [f"{point.name} loses {round(100 * (dense.score - cell.score))}{_kept(cell)}" for point, cell in known]
        return (
            f"Nothing stays within 2 points of dense {where}. In points: {'; '.join(told)}. An answer is found by "
            "the question's tokens and read from its own: what was dropped of either is not there to be attended to."
        )

    def panels(self, styles: dict[str, int]) -> list[Panel]:
        """The mean and the worst task, against memory and against time, where these are known."""
        axes = (
            ("memory held", attrgetter("memory"), units.share),
            ("time of a decoded token", attrgetter("time"), units.times),
        )
        scores = (("Mean", attrgetter("mean")), ("Worst task", attrgetter("worst.score")))
        return [
            _panel(f"{name} against {title}", f"{title} / dense attention's", self.points, styles, cost, score, text)
            for title, cost, text in axes
            for name, score in scores
            if any(point.what != DENSE and cost(point) is not None for point in self.points)
        ]


def _kept(cell: Cell) -> str:
    parts = [(cell.answer_kept, "the answers'"), (cell.question_kept, "the questions'")]
    told = [f"{units.share(kept)} of {whose}" for kept, whose in parts if kept is not None]
    return f" (keeps {' and '.join(told)} tokens)" if told else ""


def _points(loss: float) -> str:
    """
    >>> _points(0.25), _points(-0.01), _points(0.001)
    ('25 points below dense', '1 point above dense', 'no points below dense')
    """
    whole = round(100 * loss)
    count = f"{abs(whole) or 'no'} point{'' if abs(whole) == 1 else 's'}"
    return f"{count} {'above' if whole < 0 else 'below'} dense"


def focus(budgets: Sequence[float]) -> float:
    """The largest budget that is not above a quarter, else the smallest.

    >>> focus([0.1, 0.2, 0.5]), focus([0.5, 1.0]), focus([])
    (0.2, 0.5, 0.25)
    """
    return max((b for b in budgets if b <= QUARTER), default=min(budgets, default=QUARTER))


def pareto(points: Iterable[tuple[float, float, T]]) -> list[T]:
    """Those of (cost, score, what) than which none costs as little and scores as much, and one of both strictly better.

    >>> pareto([(0.5, 0.9, "a"), (0.2, 0.4, "b"), (0.6, 0.9, "c"), (0.2, 0.4, "d")])
    ['b', 'd', 'a']
    """
    found: list[T] = []
    best: tuple[float, float] | None = None
    for cost, score, what in sorted(points, key=lambda one: (one[0], -one[1])):
        if best is None or score > best[1] or (cost, score) == best:
            found.append(what)
            best = cost, score
    return found


def sections(found: Evaluation) -> list[Section]:
    """One a length and protocol at which something but dense attention was scored, and a task tells something."""
    own: dict[tuple[int, Protocol], list[Point]] = {}
    for line in _whole(found):
        point = Point(line.what, *_split(line.what), line.length, line.cells)
        protocols = ABOUT if line.protocol == Protocol.EITHER else (line.protocol,)
        for protocol in protocols:
            own.setdefault((line.length, protocol), []).append(point)
    return [
        Section(
            length, protocol, tuple(points), tuple(sorted({p.budget for p in points if isinstance(p.budget, float)}))
        )
        for (length, protocol), points in sorted(own.items(), key=lambda item: (item[0][0], [*ABOUT].index(item[0][1])))
        if points[0].what == DENSE and len(points) > 1
    ]


def _whole(found: Evaluation) -> list[Line]:
    """Those that were scored on every task that dense attention can do."""
    full = {line.length: {c.task for c in line.cells} for line in lines(found) if line.what == DENSE}
    return [line for line in lines(found) if line.cells and {c.task for c in line.cells} == full.get(line.length)]


def partial(found: Evaluation) -> list[str]:
    """Contestants that are in no mean, since they were scored on some of the tasks only."""
    whole = {(line.what, line.length, line.protocol) for line in _whole(found)}
    return list(
        dict.fromkeys(
            line.what for line in lines(found) if line.cells and (line.what, line.length, line.protocol) not in whole
        )
    )


def _split(what: str) -> tuple[str, float | None]:
    """A contestant's name without its budget, and the budget where that is a share."""
    try:
        id, params = spelt(what)
    except ValueError:
        return what, None
    if not isinstance(params.get("budget"), float):
        return what, None
    rest = ", ".join(f"{name}={value!r}" for name, value in params.items() if name != "budget")
    return (f"{id}({rest})" if rest else id), params["budget"]


class _Linear(Axis):
    """An axis on which equal distances are equal differences."""

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @classmethod
    def up_to(cls, title: str, high: float, start: float, end: float, text: Callable[[float], str]) -> Axis:
        """From 0 to `high`, with at most six ticks."""
        bare = cls(title, 0.0, high, start, end)
        step = next(s for s in (0.2, 0.25, 0.5, *(2.0**p for p in range(40))) if high / s <= 6)
        ticks = [Tick(bare.at(step * at), text(step * at)) for at in range(int(high / step + 1e-9) + 1)]
        return cls(title, 0.0, high, start, end, tuple(ticks))


def _panel(
    title: str,
    axis: str,
    points: Sequence[Point],
    styles: dict[str, int],
    cost: Callable[[Point], float | None],
    score: Callable[[Point], float],
    text: Callable[[float], str],
) -> Panel:
    known = [(found, score(point), point) for point in points if (found := cost(point)) is not None]
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM
    most = max(1.0, *(value for value, _, _ in known))
    x = _Linear.up_to(axis, 1.06 * most, LEFT, right, text)
    y = _Linear.up_to("score", 1.05, bottom, TOP, lambda value: f"{value:.1f}")
    front = pareto(known)
    place = {point.what: (x.at(value), y.at(reached)) for value, reached, point in known}
    told = {point.what: f"{point.name}: {reached:.2f} at {text(value)}" for value, reached, point in known}
    series = []
    for policy in dict.fromkeys(point.policy for _, _, point in known):
        own = sorted((p for _, _, p in known if p.policy == policy), key=lambda p: p.budget or 0.0)
        marks, said = tuple(place[p.what] for p in own), tuple(told[p.what] for p in own)
        series.append(Series(policy, styles.get(policy), marks, said, Label(0, 0, ""), len(own) > 1))
    # Of equal ones the first is named in the drawing, all of them below it.
    named = list({place[point.what]: point for point in reversed(front)}.values())
    others = [(a - 4, b - 4, a + 4, b + 4) for what, (a, b) in place.items()]
    labels = place_labels([place[p.what] for p in named], [p.name for p in named], (LEFT, TOP, right, bottom), others)
    steps = sorted({place[point.what] for point in front})
    path = "M" + " L".join(f"{a} {b}" for a, b in steps) if len(steps) > 1 else ""
    words = "; ".join(told[point.what] for point in front)
    about = f"{'; '.join(told.values())}. Pareto set: {words}."
    chart = Chart(title, about, x, y, tuple(series), front=path, one=x.at(1.0))
    return Panel(chart, tuple(labels), words)


def resolution(section: Section) -> str:
    """How far apart two means must be to tell something."""
    low, high = wilson(0.5, section.examples)
    tasks = f"{len(section.tasks)} {'task' if len(section.tasks) == 1 else 'tasks'}"
    return (
        f"A mean is over {section.examples} examples of {tasks}; two that are closer than about "
        f"{100 * (high - low) / 2:.0f} points are not told apart."
    )


def verdict(found: Evaluation) -> str:
    """One line: what to use at a quarter of the memory, and what comes within 2 points of dense attention."""
    all_of_them = sections(found)
    if not all_of_them:
        return "Nothing beside dense attention has a score."
    longest = max(section.length for section in all_of_them)
    told = []
    for section in all_of_them:
        if section.length != longest:
            continue
        share, best = focus(section.budgets), section.within(focus(section.budgets))
        takes = (
            f"{best[0].name} ({best[0].mean:.2f}, {_points(section.loss(best[0]))})" if best else "nothing, none fits"
        )
        enough = section.enough()
        close = "only dense" if enough is None else f"{enough.name} ({units.share(enough.memory or 0.0)} held)"
        told.append(f"where {ABOUT[section.protocol]}, {takes} at {units.share(share)}; within 2 points: {close}")
    return f"What to use at {units.tokens(longest)} tokens: {'. '.join(_capital(text) for text in told)}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def by_point(section: Section) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each point holds, costs and reaches, those that hold least first."""
    head = ["what", "held", "decode", "mean", "worst", *section.tasks, "answers", "questions"]
    rows = []
    for point in section.ordered:
        scores = [point.on(task) for task in section.tasks]
        rows.append(
            [
                point.name,
                "—" if point.memory is None else units.share(point.memory),
                "—" if point.time is None else units.times(point.time),
                f"{point.mean:.2f}",
                f"{point.worst.score:.2f}",
                *("—" if cell is None else f"{cell.score:.2f}" for cell in scores),
                "—" if point.answer_kept is None else units.share(point.answer_kept),
                "—" if point.question_kept is None else units.share(point.question_kept),
            ]
        )
    return head, rows


def sentences(section: Section) -> list[str]:
    """What a user asks: with so much memory, what; and what becomes of needles."""
    found = [section.advice(share) for share in section.budgets]
    return [*found, *filter(None, [section.needles()])]


def noise(found: Evaluation) -> str:
    """What dense attention shows against itself, and that other programs ran."""
    itself = [c.decode_over_dense for c in scored(found) if c.what == DENSE and c.decode_over_dense]
    told = []
    if itself:
        told.append(
            f"Times were taken in turns with dense attention, which against itself shows {units.times(min(itself))} to "
            f"{units.times(max(itself))}."
        )
    load, cores = found.environment.get("load") or 0.0, found.environment.get("cores") or 1
    if load > BUSY * cores:
        told.append(f"Other programs were running (load {load:.1f} on {cores} processors as this began).")
    return " ".join(told)


def left(found: Evaluation) -> str:
    """What was not measured, and what is therefore not shown."""
    told = []
    if found.left:
        told.append(f"{found.left} pairs of contestant and task were left by the budget; the same command goes on.")
    if names := partial(found):
        told.append(f"Not shown, since not scored on every task: {', '.join(names)}.")
    return " ".join(told)


def unable(found: Evaluation) -> str:
    """What dense attention cannot do."""
    floor = sorted({f"{task} at {units.tokens(length)}" for task, length in uninformative(found)})
    if not floor:
        return ""
    return f"Dense attention scores below {FLOOR:g} on {', '.join(floor)}: the model cannot do it, so it is in no mean."


def remarks(found: Evaluation) -> list[str]:
    """What one must know beside the figures."""
    return [*filter(None, [unable(found), noise(found), left(found)]), *dropped(found)]


def tell(found: Evaluation, console: Console) -> None:
    """Print all of it, and last what to use."""
    for section in sections(found):
        console.print(escape(section.title), style="bold", highlight=False)
        console.print(printed(*by_point(section)))
        for line in (*sentences(section), resolution(section)):
            console.print(escape(line), highlight=False)
    for line in (*remarks(found), verdict(found)):
        console.print(escape(line), highlight=False)


def markdown(found: Evaluation) -> str:
    """The tables and the sentences."""
    parts = []
    for section in sections(found):
        parts += [f"## {section.title}", table(*by_point(section))]
        parts += [f"Pareto set, {panel.chart.title.lower()}: {panel.front}." for panel in section.panels({})]
        parts += [*sentences(section), resolution(section)]
    parts += [*remarks(found), verdict(found)]
    return "\n\n".join(parts) + "\n"


def page(found: Evaluation) -> str:
    """The same as HTML: charts as inline SVG, nothing that needs a network or a script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = sections(found)
    policies = dict.fromkeys(point.policy for section in shown for point in section.points if point.what != DENSE)
    styles = {policy: at for at, policy in enumerate(policies)}
    return environment.get_template("frontier.html.j2").render(
        found=found,
        units=units,
        sections=[(section, section.panels(styles)) for section in shown],
        legend=[Series(name, at, (), (), Label(0, 0, "")) for name, at in styles.items()],
        sentences=sentences,
        resolution=resolution,
        verdict=verdict(found),
        notes=[*filter(None, [unable(found), noise(found)])],
        dropped=dropped(found),
        left=left(found),
        close=CLOSE,
        slack=SLACK,
        dense=DENSE,
        points=_points,
    )


def write(found: Evaluation, folder: Path) -> list[Path]:
    """frontier.html, frontier.md and results.csv, beside the results.jsonl that grew as cells were finished."""
    return [
        write_atomic(folder / "frontier.html", page(found)),
        write_atomic(folder / "frontier.md", markdown(found)),
        write_csv(folder / "results.csv", found.cells),
        folder / "results.jsonl",
    ]
