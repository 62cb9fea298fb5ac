"""The frontier of an evaluation: score against the memory held, and against the time of a decoded token, on one page.

A point is a contestant at one length under one protocol. Its memory is a share of the bytes that dense attention holds,
its time a ratio to dense attention's, its score the mean over the tasks that dense attention can do, or the worst.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import jinja2
from rich.console import Console
from rich.markup import escape

from saccade.bench import units
from saccade.bench.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Axis, Chart, Label, Series, Tick, place_labels
from saccade.bench.eval import FLOOR, Evaluation, focus, spelt
from saccade.bench.eval_records import DENSE, Cell, Protocol, Time, wilson, write_csv
from saccade.bench.eval_summary import Line, dropped, lines, printed, scored, table, uninformative
from saccade.bench.records import write_atomic
from saccade.bench.report import BUSY

CLOSE = 0.02  # of a score: a loss that is none
TINY = 0.005  # a score that is none
SLACK = 0.05  # of dense attention's memory: whole pages hold a little more than a budget says
NEEDLES = "multi_key"
MOST_NAMED = 12  # of those that are not shown
MOST_LINES = 8  # policies whose points are joined in one drawing
ABOUT = {
    Protocol.AWARE: "the question is in the prompt",
    Protocol.AGNOSTIC: "the question comes after the context was read",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A contestant at one length under one protocol. policy: its name but for the budget, which is None where it takes
    none. cells: of the tasks that tell something, the worst first. timed: of a decoded token.
    """

    what: str
    policy: str
    budget: float | None
    length: int
    cells: tuple[Cell, ...]
    timed: Time | None = None

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

    @property
    def time(self) -> float | None:
        """Time of a decoded token / dense attention's."""
        if self.what == DENSE:
            return 1.0
        return None if self.timed is None else self.timed.over_dense

    @property
    def seconds(self) -> float | None:
        return None if self.timed is None else self.timed.seconds

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
    """A chart with labels of those on its Pareto set, and that set in words. faint: policies without a point on it,
    where there are so many that their lines would hide one another.
    """

    chart: Chart
    labels: tuple[Label, ...]
    front: str
    faint: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """Points of one length and protocol, dense attention's among them. budgets: those that were asked for. scored:
    these points and those that were not scored on every task.
    """

    length: int
    protocol: Protocol
    points: tuple[Point, ...]
    budgets: tuple[float, ...]
    scored: tuple[Point, ...]

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

    def best(self, share: float) -> Point | None:
        """What to take with so much memory: None where nothing fits, or what fits answers nothing."""
        fit = self.within(share)
        return fit[0] if fit and fit[0].mean >= TINY else None

    def takes(self, share: float) -> str:
        """The same in words, with the reason where there is none."""
        best, fit = self.best(share), self.within(share)
        if best is not None:
            return self.told(best)
        return f"nothing: {fit[0].name} scores {fit[0].mean:.2f}" if fit else "nothing: none fits"

    def choices(self) -> list[tuple[str, float]]:
        """The budgets that were asked for, in words, and the first of them; where one takes the same they are one."""
        runs = [[*run] for _, run in groupby(self.budgets or (focus(self.budgets),), self.takes)]
        return [(" to ".join(map(units.share, dict.fromkeys((run[0], run[-1])))), run[0]) for run in runs]

    def advice(self, share: float, told: str | None = None) -> str:
        """What to take with so much memory. told: which budgets these are, where they are several."""
        return f"With {told or units.share(share)} of the memory take {self.takes(share)}."

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

    @cached_property
    def found(self) -> list[tuple[Point, Cell]]:
        """Who looks for needles among needles at a quarter of the tokens: the best of each policy, the best first.

        What was asked for so much, or holds no more; what keeps all and reads a quarter is among them.
        """
        share = focus(self.budgets)
        known = [(point, cell) for point in self.scored if point.what != DENSE and (cell := point.on(NEEDLES))]
        asked = [
            (point, cell)
            for point, cell in known
            if (point.memory is not None and point.memory <= share + SLACK)
            or (point.budget is not None and point.budget <= share)
        ]
        # Of equal scores the one that holds most.
        asked.sort(key=lambda pair: (pair[1].score, pair[0].memory or 0.0))
        return sorted({point.policy: (point, cell) for point, cell in asked}.values(), key=lambda pair: -pair[1].score)

    def keeps_needles(self, cell: Cell) -> bool:
        dense = self.dense.on(NEEDLES)
        return dense is not None and dense.score - cell.score <= CLOSE + 1e-9

    def needles(self) -> str:
        """How many policies still find needles among needles with a quarter of the tokens, and which."""
        if self.dense.on(NEEDLES) is None or not self.found:
            return ""
        close = [point.name + _held(point) for point, cell in self.found if self.keeps_needles(cell)]
        where = f"within 2 points of dense on {NEEDLES} at {units.share(focus(self.budgets))}"
        if not close:
            return f"None of {len(self.found)} policies stays {where}."
        return f"{len(close)} of {len(self.found)} policies stay {where}: {', '.join(close)}."

    def losses(self) -> list[str]:
        """Who does not, and what it has dropped: a line a policy, that which loses least first."""
        dense = self.dense.on(NEEDLES)
        if dense is None:
            return []
        return [
            f"{point.name} loses {round(100 * (dense.score - cell.score))} of {round(100 * dense.score)} points on "
            f"{NEEDLES}{_held(point)}: {_why(point, cell)}."
            for point, cell in self.found
            if not self.keeps_needles(cell)
        ]

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


def _held(point: Point) -> str:
    return f" (holds {units.share(point.memory)})" if point.memory is not None else ""


def _why(point: Point, cell: Cell) -> str:
    """What was dropped of an answer and of a question is not there to be attended to."""
    parts = [(cell.answer_kept, "the answers'"), (cell.question_kept, "the questions'")]
    told = [f"{units.share(kept)} of {whose}" for kept, whose in parts if kept is not None]
    if not told:
        return "what it attends to is not told"
    if all(kept in (None, 1.0) for kept, _ in parts):
        less = point.memory is not None and point.memory < 1
        return f"it keeps all tokens, {'in less memory' if less else 'and reads too little of them'}"
    return f"it keeps {' and '.join(told)} tokens"


def _points(loss: float) -> str:
    """
    >>> _points(0.25), _points(-0.01), _points(0.001)
    ('25 points below dense', '1 point above dense', 'no points below dense')
    """
    whole = round(100 * loss)
    count = f"{abs(whole) or 'no'} point{'' if abs(whole) == 1 else 's'}"
    return f"{count} {'above' if whole < 0 else 'below'} dense"


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
    times = timed(found)
    own, all_of = (_points_of(known, times) for known in (_whole(found), lines(found)))
    return [
        Section(
            length,
            protocol,
            tuple(points),
            tuple(sorted({p.budget for p in points if isinstance(p.budget, float)})),
            tuple(all_of[length, protocol]),
        )
        for (length, protocol), points in sorted(own.items(), key=lambda item: (item[0][0], [*ABOUT].index(item[0][1])))
        if points[0].what == DENSE and len(points) > 1
    ]


def _points_of(known: Iterable[Line], times: dict[tuple[str, int], Time]) -> dict[tuple[int, Protocol], list[Point]]:
    """By length and protocol; what has one score for both protocols is a point of both."""
    own: dict[tuple[int, Protocol], list[Point]] = {}
    for line in known:
        point = Point(line.what, *_split(line.what), line.length, line.cells, times.get((line.what, line.length)))
        for protocol in ABOUT if line.protocol == Protocol.EITHER else (line.protocol,):
            own.setdefault((line.length, protocol), []).append(point)
    return own


def timed(found: Evaluation) -> dict[tuple[str, int], Time]:
    """Times by contestant and length: where steps were recorded, those; the others are a ratio to something else."""
    recorded = any(one.recorded for one in found.times)
    return {(one.what, one.length): one for one in found.times if one.recorded == recorded}


def counted(found: Evaluation) -> dict[int, set[str]]:
    """The tasks that means are over, by length: what dense attention can do, and half of the contestants were asked."""
    whole: dict[int, set[str]] = {}
    asked: dict[int, dict[str, set[str]]] = {}
    for line in lines(found):
        tasks = {cell.task for cell in line.cells}
        if line.what == DENSE:
            whole[line.length] = tasks
        elif tasks:
            asked.setdefault(line.length, {})[line.what] = tasks
    return {
        length: {task for task in tasks if 2 * sum(task in own for own in others.values()) >= len(others)}
        for length, tasks in whole.items()
        for others in (asked.get(length, {}),)
    }


def _whole(found: Evaluation) -> list[Line]:
    """Those that were scored on every task that counts, with the cells of these."""
    full = counted(found)
    known = [
        (line, tuple(cell for cell in line.cells if cell.task in full.get(line.length, ()))) for line in lines(found)
    ]
    return [
        replace(line, cells=cells)
        for line, cells in known
        if cells and {cell.task for cell in cells} == full.get(line.length)
    ]


def partial(found: Evaluation) -> dict[tuple[int, Protocol], list[str]]:
    """Contestants that are in no mean, by length and protocol, since they were scored on some of the tasks only."""
    whole = {(line.what, line.length, line.protocol) for line in _whole(found)}
    named: dict[tuple[int, Protocol], list[str]] = {}
    for line in lines(found):
        if line.cells and (line.what, line.length, line.protocol) not in whole:
            named.setdefault((line.length, line.protocol), []).append(line.what)
    return named


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
    policies = dict.fromkeys(point.policy for _, _, point in known)
    faint = frozenset(policies) - {point.policy for point in front} if len(policies) > MOST_LINES else frozenset()
    for policy in policies:
        own = sorted((p for _, _, p in known if p.policy == policy), key=lambda p: p.budget or 0.0)
        marks, said = tuple(place[p.what] for p in own), tuple(told[p.what] for p in own)
        series.append(
            Series(policy, styles.get(policy), marks, said, Label(0, 0, ""), len(own) > 1 and policy not in faint)
        )
    # Of equal ones the first is named in the drawing, all of them below it.
    named = list({place[point.what]: point for point in reversed(front)}.values())
    others = [(a - 4, b - 4, a + 4, b + 4) for what, (a, b) in place.items()]
    labels = place_labels([place[p.what] for p in named], [p.name for p in named], (LEFT, TOP, right, bottom), others)
    steps = sorted({place[point.what] for point in front})
    path = "M" + " L".join(f"{a} {b}" for a, b in steps) if len(steps) > 1 else ""
    words = "; ".join(told[point.what] for point in front)
    about = f"{'; '.join(told.values())}. Pareto set: {words}."
    chart = Chart(title, about, x, y, tuple(series), front=path, one=x.at(1.0))
    return Panel(chart, tuple(labels), words, faint)


def resolution(section: Section) -> str:
    """How far apart two means must be to tell something."""
    low, high = wilson(0.5, section.examples)
    tasks = f"{len(section.tasks)} {'task' if len(section.tasks) == 1 else 'tasks'}"
    return (
        f"A mean is over {section.examples} examples of {tasks}; two that are closer than about "
        f"{100 * (high - low) / 2:.0f} points are not told apart."
    )


def verdict(found: Evaluation) -> str:
    """One line: what to use at each budget, and what comes within 2 points of dense attention; at the longest of the
    lengths with the most budgets.
    """
    all_of_them = sections(found)
    if not all_of_them:
        return "Nothing beside dense attention has a score."
    longest = max(all_of_them, key=lambda section: (len(section.budgets), section.length)).length
    told = []
    for section in all_of_them:
        if section.length != longest:
            continue
        takes = ", ".join(
            ("nothing" if best is None else f"{best.name} ({best.mean:.2f}, {_points(section.loss(best))})")
            + f" at {shares}"
            for shares, best in ((told, section.best(share)) for told, share in section.choices())
        )
        enough = section.enough()
        close = "only dense" if enough is None else f"{enough.name} ({units.share(enough.memory or 0.0)} held)"
        told.append(f"where {ABOUT[section.protocol]}, {takes}; within 2 points: {close}")
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
    choices = section.choices() if section.budgets else []
    return [*filter(None, [section.needles()]), *(section.advice(share, told) for told, share in choices)]


def noise(found: Evaluation) -> str:
    """What dense attention shows against itself, and that other programs ran."""
    times = timed(found).values()
    itself = [one.over_dense for one in times if one.what == DENSE]
    told = []
    if itself:
        span = units.times(min(itself))
        if len(itself) > 1:
            span = f"{span} to {units.times(max(itself))}"
        how = "Tokens were replayed from CUDA graphs where a policy's steps can be, and times" if any(
            one.recorded for one in times
        ) else "Times"  # fmt: skip
        told.append(f"{how} were taken in turns with dense attention, which against itself shows {span}.")
    load, cores = found.environment.get("load") or 0.0, found.environment.get("cores") or 1
    if times and load > BUSY * cores:
        told.append(f"Other programs were running (load {load:.1f} on {cores} processors as this began).")
    return " ".join(told)


def left(found: Evaluation) -> str:
    """What was not measured, and what is therefore not shown."""
    told = []
    if found.left:
        told.append(f"{found.left} measurements were left, by the budget or an interrupt; the same command goes on.")
    tasks = [
        f"{task} at {units.tokens(line.length)}"
        for line in lines(found)
        if line.what == DENSE
        for task in sorted({cell.task for cell in line.cells} - counted(found)[line.length])
    ]
    if not found.times and sections(found):
        told.append("Decoded tokens were not timed, so that nothing here tells what is faster.")
    if tasks:
        told.append(f"In no mean, since asked of less than half of the contestants so far: {', '.join(tasks)}.")
    for (length, protocol), names in partial(found).items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        told.append(
            f"Not shown at {units.tokens(length)}, {protocol}, since not scored on every task: "
            f"{', '.join(names[:MOST_NAMED])}{more}."
        )
    return " ".join(told)


def unable(found: Evaluation) -> str:
    """What dense attention cannot do."""
    floor = uninformative(found)
    if not floor:
        return ""
    where: dict[str, list[str]] = {}
    for task, length in sorted(floor):
        where.setdefault(task, []).append(units.tokens(length))
    alike: dict[str, list[str]] = {}
    for task, lengths in where.items():
        alike.setdefault(", ".join(lengths), []).append(task)
    names = "; ".join(f"{', '.join(tasks)} at {lengths}" for lengths, tasks in alike.items())
    told = f"Dense attention scores below {FLOOR:g} on {names}: the model cannot do it, so it is in no mean."
    if not any((cell.task, cell.length) in floor for cell in scored(found) if cell.what != DENSE):
        told += " Nothing else was asked it."
    return told


def remarks(found: Evaluation) -> list[str]:
    """What one must know beside the figures."""
    return [*filter(None, [unable(found), noise(found), left(found)]), *lost(found)]


def lost(found: Evaluation) -> list[str]:
    """Why there is no score, or no time."""
    return [*dropped(found), *found.failed]


def tell(found: Evaluation, console: Console) -> None:
    """Print all of it, and last what to use."""
    for section in sections(found):
        console.print(escape(section.title), style="bold", highlight=False)
        console.print(printed(*by_point(section)))
        for line in (*sentences(section), *section.losses(), resolution(section)):
            console.print(escape(line), highlight=False)
    for line in (*remarks(found), verdict(found)):
        console.print(escape(line), highlight=False)


def markdown(found: Evaluation) -> str:
    """The tables and the sentences."""
    parts = []
    for section in sections(found):
        parts += [f"## {section.title}", table(*by_point(section))]
        parts += [f"Pareto set, {panel.chart.title.lower()}: {panel.front}." for panel in section.panels({})]
        parts += [*sentences(section), *section.losses(), resolution(section)]
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
        dropped=lost(found),
        needles=NEEDLES,
        left=left(found),
        close=CLOSE,
        slack=SLACK,
        dense=DENSE,
        points=_points,
    )


def write(found: Evaluation, folder: Path) -> list[Path]:
    """frontier.html, frontier.md and results.csv, beside the rows that grew as they were measured."""
    return [
        write_atomic(folder / "frontier.html", page(found)),
        write_atomic(folder / "frontier.md", markdown(found)),
        write_csv(folder / "results.csv", found.cells),
        *sorted(folder.glob("*.jsonl")),
    ]
