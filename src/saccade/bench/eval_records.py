"""What an evaluation leaves behind: a cell a contestant, task, length and protocol, and the file that it goes on from.

score: the mean over examples of the mean over an example's questions
low, high: Wilson's interval for a mean in [0, 1] of as many examples, 95 %
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from saccade.bench.records import Status, write_atomic

DENSE = "dense"
Z = statistics.NormalDist().inv_cdf(0.975)


class Protocol(StrEnum):
    """What was there when the context was read, and so when it was decided what to keep of it.

    AWARE: the question. AGNOSTIC: nothing but the context; then the question was appended, and what had been kept was
    asked all of them. EITHER: nothing is decided from later tokens, so that both are the same, and measured once.
    """

    AWARE = "query-aware"
    AGNOSTIC = "query-agnostic"
    EITHER = "either"


class Key(NamedTuple):
    """What tells a cell from others: a cell of the same key is not measured again."""

    model: str
    what: str
    task: str
    length: int
    protocol: Protocol
    examples: int
    questions: int
    seed: int
    dtype: str


@dataclass(frozen=True)
class Cell:
    """A contestant at one task, length and protocol. Only one that is OK has scores.

    scores: of each example. asked: questions in all. seconds: what the cell took. cache_bytes: what was kept of one
    sequence when its context had been read (query-agnostic, either) or its prompt (query-aware); dense_bytes: what
    dense attention keeps of as much; answer_kept, question_kept: the part of the answer's tokens in the context, and of
    the question's in the prompt, that was kept then, the mean over layers and key heads.
    decode_seconds: median of a token that is decoded after the prompt; dense_decode_seconds: dense attention's, in
    turns with it; decode_over_dense: the median ratio of both over the turns. None where nothing tells it, and in files
    that are older than the figure.
    """

    model: str
    what: str
    task: str
    length: int
    protocol: Protocol
    count: int
    questions: int
    seed: int
    dtype: str
    status: Status = Status.OK
    message: str = ""
    device: str = "cpu"
    scores: tuple[float, ...] = ()
    asked: int = 0
    seconds: float | None = None
    cache_bytes: int | None = None
    dense_bytes: int | None = None
    answer_kept: float | None = None
    question_kept: float | None = None
    decode_seconds: float | None = None
    dense_decode_seconds: float | None = None
    decode_over_dense: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("status", Status), ("protocol", Protocol), ("scores", tuple)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if bool(self.scores) != (self.status == Status.OK):
            raise ValueError(
                f"scores: got {len(self.scores)} for a cell that is {self.status}; OK ones alone have them"
            )

    @property
    def key(self) -> Key:
        return Key(
            self.model,
            self.what,
            self.task,
            self.length,
            self.protocol,
            self.count,
            self.questions,
            self.seed,
            self.dtype,
        )

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.score, len(self.scores))

    def row(self) -> dict[str, Any]:
        """Plain values for JSON, with the score and its interval spelt out."""
        ok = self.status == Status.OK
        low, high = self.interval if ok else (None, None)
        return asdict(self) | {"score": self.score if ok else None, "low": low, "high": high}


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a mean of `count` independent values in [0, 1].

    Exact for shares (E. B. Wilson, 1927); values between 0 and 1 vary less than shares of the same mean, so that it is
    not too narrow for them.

    >>> [round(x, 2) for x in wilson(1.0, 20)]
    [0.84, 1.0]
    """
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file that `append_cell` wrote, where of one key the last counts; none where there is no file.

    Errors: ValueError for a file that holds something else.
    """
    names = [field.name for field in fields(Cell)]
    found: dict[Key, Cell] = {}
    for at, line in enumerate(_whole_lines(path), 1):
        try:
            row = json.loads(line)
            cell = Cell(**{name: row[name] for name in names if name in row})
            found[cell.key] = cell
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: line {at} of {path} is no cell of an evaluation ({error}); pass another folder, or remove it"
            ) from error
    return list(found.values())


def append_cell(path: Path, cell: Cell, stamp: dict[str, Any]) -> Path:
    """Add a cell as a JSON object in a line of its own, with the environment that it was measured in."""
    lines = [*_whole_lines(path), json.dumps(cell.row() | {"environment": stamp}) + "\n"]
    return write_atomic(path, "".join(lines))


def write_csv(path: Path, cells: Iterable[Cell]) -> Path:
    """The same as a table, without the scores of single examples; None is an empty cell."""
    text = io.StringIO()
    rows = [cell.row() for cell in cells]
    columns = [*(f.name for f in fields(Cell) if f.name != "scores"), "score", "low", "high"]
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    return write_atomic(path, text.getvalue())


def _whole_lines(path: Path) -> list[str]:
    """Without a last one that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]
