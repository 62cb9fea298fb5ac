"""What a comparison found, place by place: who was measured, who is on the Pareto front, who stopped and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saccade.bench import units
from saccade.bench.compare import Comparison
from saccade.bench.records import Place, Record, Status


@dataclass(frozen=True)
class Group:
    """The OK records of one place; dense attention's own are in `dense`."""

    place: Place
    records: tuple[Record, ...]
    dense: tuple[Record, ...]

    @property
    def title(self) -> str:
        axes = f", {self.place.grid}-D grid" if self.place.grid else ""
        kind = "layer" if self.place.layer else "attention"
        return f"{self.place.workload}{axes}: {'causal' if self.place.causal else 'full'} {kind}"

    @property
    def mechanisms(self) -> list[str]:
        """Ids, in the order of their first records."""
        return list(dict.fromkeys(r.mechanism for r in self.records))

    @property
    def length(self) -> int:
        """The longest length at which at least half of the mechanisms were timed: there they are compared."""
        counts: dict[int, int] = {}
        for record in self.records:
            counts[record.length] = counts.get(record.length, 0) + 1
        return max((n for n, c in counts.items() if 2 * c >= len(self.mechanisms)), default=0)

    @property
    def compared(self) -> list[Record]:
        """The records at `length`, fastest first."""
        return sorted((r for r in self.records if r.length == self.length), key=lambda r: -(r.speedup or 0.0))

    @property
    def front(self) -> list[Record]:
        """The Pareto front at `length`: no other is both faster and closer to dense attention. Fastest first.

        Dense attention itself takes part; of the mechanisms, those that are faster than it beyond doubt. Layers have no
        error to trade, so they have no front.
        """
        known = [r for r in self.compared if r.verdict == "faster" and r.approximation_error is not None]
        if not known:
            return []
        return pareto([*known, *(r for r in self.dense if r.length == self.length)])


def pareto(records: Iterable[Record]) -> list[Record]:
    """Those than which no other is at least as fast and at least as close, and one of both strictly; fastest first.

    Dense attention's speed-up is 1 by definition.
    """
    known = [(1.0 if r.mechanism == "dense" else r.speedup, r.approximation_error, r) for r in records]
    found: list[Record] = []
    best = float("inf")
    for _, error, record in sorted(known, key=lambda one: (-(one[0] or 0.0), one[1])):
        if error is not None and error < best:
            found.append(record)
            best = error
    return found


def groups(found: Comparison) -> list[Group]:
    """One group a place where something was timed: attention before layers, in the order of the records."""
    timed = [r for r in found.records if r.status == Status.OK and r.mechanism != "dense"]
    dense = [r for r in found.records if r.status == Status.OK and r.mechanism == "dense"]
    places = sorted({r.place for r in timed}, key=lambda p: (p.layer, p.grid, not p.causal, p.workload))
    return [Group(p, tuple(r for r in timed if r.place == p), tuple(r for r in dense if r.place == p)) for p in places]


@dataclass(frozen=True)
class Line:
    """One mechanism in the table: its longest timed record, else the one that says why not; and where it stopped."""

    record: Record
    stopped: Record | None = None

    @property
    def message(self) -> str:
        """Why there is no time, or none beyond this length, or a time that proves nothing."""
        parts = [self.record.message] if self.record.message else []
        if self.stopped is not None:
            parts.append(f"{self.stopped.status} at {self.stopped.length}: {self.stopped.message}")
        return "; ".join(parts)


def lines(found: Comparison) -> list[Line]:
    """One line a mechanism: those that are OK by place, fastest first, the unproven, then the others."""
    by_id: dict[str, list[Record]] = {}
    for record in found.records:
        if record.mechanism != "dense":
            by_id.setdefault(record.mechanism, []).append(record)
    table = []
    for own in by_id.values():
        timed = [r for r in own if r.may_be_timed]
        failed = [r for r in own if not r.may_be_timed]
        chosen = max(timed, key=lambda r: r.length) if timed else own[0]
        later = [r for r in failed if timed and r.length > chosen.length]
        table.append(Line(chosen, later[0] if later else None))
    order = [group.place for group in groups(found)]

    def rank(line: Line) -> tuple[bool, bool, int, float, str]:
        r = line.record
        ok = r.status == Status.OK
        return not ok, not r.may_be_timed, order.index(r.place) if ok else 0, -(r.speedup or 0.0), r.mechanism

    return sorted(table, key=rank)


def dropped(found: Comparison) -> list[Line]:
    """The lines that end early, or were never timed."""
    return [line for line in lines(found) if line.record.status != Status.OK or line.stopped]


def findings(found: Comparison) -> list[str]:
    """A few sentences: the Pareto front of every place, the fastest layer, what was not measured, what was dropped."""
    told = []
    for group in groups(found):
        where = f"{group.title}, {group.length} tokens"
        front, compared = group.front, group.compared
        if front:
            told.append(f"{where}. Pareto front: {', '.join(describe(r) for r in front)}.")
        elif not group.place.layer:
            told.append(f"{where}. Nothing that was measured is faster than dense attention beyond doubt.")
        else:
            told.append(f"{where}. Fastest: {describe(compared[0])}.")
        entered = {r.mechanism for r in found.records if r.place == group.place and r.mechanism != "dense"}
        if missing := len(entered) - len(compared):
            told[-1] += f" {missing} of {len(entered)} were not measured there."
    by_status: dict[Status, list[str]] = {}
    for line in dropped(found):
        status = line.stopped.status if line.stopped else line.record.status
        beyond = f" beyond {line.record.length}" if line.stopped else ""
        by_status.setdefault(status, []).append(line.record.mechanism + beyond)
    return told + [f"{status}: {', '.join(names)}." for status, names in sorted(by_status.items())]


def describe(record: Record) -> str:
    """A mechanism with its speed-up and its error.

    >>> describe(Record("dense", "Dense attention", "baseline", "Attention", 2017, Status.OK))
    'dense'
    """
    if record.mechanism == "dense":
        return record.mechanism
    error = record.approximation_error
    parts = [units.times(record.speedup or 0.0), *([] if error is None else [f"error {units.error(error)}"])]
    return f"{record.mechanism} ({', '.join(parts)})"
