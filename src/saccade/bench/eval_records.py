"""What an evaluation leaves behind: a cell a contestant, task, length and protocol, a time a contestant and length, and
the files that it goes on from, which several processes may share.

score: the mean over examples of the mean over an example's questions
low, high: Wilson's interval for a mean in [0, 1] of as many examples, 95 %
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from saccade.bench.records import Status, write_atomic

try:
    import fcntl
except ImportError:  # a system without locks of files: one process a folder
    fcntl = None  # type: ignore[assignment]

DENSE = "dense"
Z = statistics.NormalDist().inv_cdf(0.975)
MOST_LINE = 1 << 16  # bytes of a line, at least


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
    the question's in the prompt, that was kept then, the mean over layers and key heads. None where nothing tells it,
    and in files that are older than the figure.
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


@dataclass(frozen=True)
class Time:
    """What a decoded token takes a contestant at one length, beside dense attention.

    recorded: its steps were replayed from a CUDA graph where they can be, and dense attention's too. seconds,
    dense_seconds: medians of a token, decoded in turns behind the same prompt. over_dense: the median ratio of both
    over the turns, with its 95 % interval low .. high, None where there were too few. pairs: turns.
    """

    model: str
    what: str
    length: int
    dtype: str
    recorded: bool
    device: str
    seconds: float
    dense_seconds: float
    over_dense: float
    low: float | None = None
    high: float | None = None
    pairs: int = 0

    @property
    def key(self) -> tuple[str, str, int, str, bool]:
        return self.model, self.what, self.length, self.dtype, self.recorded

    def row(self) -> dict[str, Any]:
        return asdict(self)


Row = TypeVar("Row", Cell, Time)


def read_rows(path: Path, kind: type[Row]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a file that `append` wrote, where of one key the last counts, and the environment of the last of
    them; none where there is no file.

    Errors: ValueError for a file that holds something else.
    """
    names = [field.name for field in fields(kind)]
    found: dict[Any, Row] = {}
    stamp: dict[str, Any] = {}
    for at, line in enumerate(_whole_lines(path), 1):
        try:
            values = json.loads(line)
            row = kind(**{name: values[name] for name in names if name in values})
            found[row.key] = row
            stamp = values.get("environment", stamp)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"out: line {at} of {path} is no {kind.__name__.lower()} of an evaluation ({error}); pass another "
                "folder, or remove it"
            ) from error
    return list(found.values()), stamp


def append(path: Path, row: Cell | Time, stamp: dict[str, Any]) -> Path:
    """Add a row as a JSON object in a line of its own, with the environment that it was measured in.

    Several processes may do so at a time; a last line that was cut short is taken away first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row.row() | {"environment": stamp}) + "\n"
    with path.open("ab+") as file, locked(file):
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MOST_LINE))
        tail = file.read()
        if cut := len(tail) - (tail.rfind(b"\n") + 1):
            file.truncate(size - cut)
        file.write(line.encode())
    return path


class Claims:
    """Who measures what, where several processes write into one folder: of a file each has locked what it is at.

    A lock is gone when its process is, however that ended. path: of the file; None, or a system without such locks:
    everything is free.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @contextmanager
    def take(self, key: Any, *, wait: bool = True) -> Iterator[bool]:
        """Is it free? Then it is not, for others, inside. wait: until it is. One at a time."""
        if self.path is None or fcntl is None:
            yield True
            return
        # Keys that share a byte wait for one another, and no more than that.
        place = zlib.crc32(repr(key).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except OSError:
                free = False
            else:
                free = True
            yield free


@contextmanager
def locked(file: Any) -> Iterator[None]:
    """Nobody else who locks it has the file meanwhile."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX)
    yield
    file.flush()  # the lock goes when the file is closed


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
