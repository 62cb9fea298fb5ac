"""What a comparison writes down: one record a mechanism and length, the environment it ran in, and the files."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple


class Status(StrEnum):
    """How a mechanism came through.

    OK: its numbers hold and it was timed. UNPROVEN: it was timed, not judged, since its own equations lose all digits
    in this dtype. WRONG: its numbers do not hold, or it crashed. UNSUPPORTED: it declined this shape, dtype or device.
    OOM: memory ran out, or would have. FELL_BACK: another backend ran than the one asked for. TIMEOUT: a call takes
    longer than its share of the budget.
    """

    OK = "OK"
    UNPROVEN = "UNPROVEN"
    WRONG = "WRONG"
    UNSUPPORTED = "UNSUPPORTED"
    OOM = "OOM"
    FELL_BACK = "FELL_BACK"
    TIMEOUT = "TIMEOUT"


class Place(NamedTuple):
    """Where mechanisms can be compared with one another: the same inputs, the same kind, the same baseline.

    grid: axes of the token grid, 0 for a sequence. layer: a layer with its own projections, not a function of q, k, v.
    """

    workload: str
    grid: int
    layer: bool
    causal: bool

    @property
    def baseline(self) -> str:
        """What times are a ratio to."""
        return f"dense {'layer' if self.layer else 'attention'}, {'causal' if self.causal else 'full'}"


@dataclass(frozen=True)
class Record:
    """One mechanism at one length of one workload. Only one that is OK or UNPROVEN may carry a time; others raise.

    threads: of the CPU while it ran, where that was measured. workload, grid, layer, causal: its `place`, which names
    the baseline. seconds, baseline_seconds: medians of a call. first_seconds: the longest of its first calls so far, at
    the gate and at each length; what is compiled, planned and imported then is ready later. speedup: median of the
    paired ratios baseline / mechanism (> 1: faster than dense); speedup_low, speedup_high: its 95 % interval, None
    below six pairs. verdict: faster, slower, same or undecided. peak_bytes: most bytes alive at once above the inputs
    and parameters. density: attended / admissible pairs as achieved, None when the mechanism weighs no single pairs.
    state_bytes: what it keeps of `state_tokens` tokens of one sequence to decode the next, None where it does not
    decode; a policy says it of all tokens, others were stepped through a few of the gate's. baseline_state_bytes: the
    baseline's keys and values of as many tokens. numerical_error: relative L2 distance of the fast path from the
    mechanism's own float64 equations, on `gate_tokens` tokens of the same input; eager_error: the same for those
    equations run in the fast path's dtype.
    approximation_error: relative L2 distance from dense softmax attention on the same q, k, v; None for a layer.
    """

    mechanism: str
    name: str
    family: str
    contract: str
    year: int
    status: Status
    message: str = ""
    backend: str = ""
    threads: int | None = None
    workload: str = ""
    length: int = 0
    shape: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    grid: int = 0
    layer: bool = False
    causal: bool = False
    seconds: float | None = None
    baseline_seconds: float | None = None
    first_seconds: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    pairs: int = 0
    verdict: str = ""
    peak_bytes: int | None = None
    baseline_bytes: int | None = None
    density: float | None = None
    state_bytes: int | None = None
    state_tokens: int | None = None
    baseline_state_bytes: int | None = None
    numerical_error: float | None = None
    eager_error: float | None = None
    gate_tokens: int | None = None
    approximation_error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))
        if not self.may_be_timed and (self.seconds is not None or self.speedup is not None):
            message = (
                f"seconds: got a time for {self.mechanism}, which is {self.status}; only OK and UNPROVEN ones are timed"
            )
            raise ValueError(message)

    @property
    def may_be_timed(self) -> bool:
        """Nothing speaks against its numbers."""
        return self.status in (Status.OK, Status.UNPROVEN)

    @property
    def place(self) -> Place:
        return Place(self.workload, self.grid, self.layer, self.causal)

    def row(self) -> dict[str, Any]:
        """Plain values, for JSON and CSV: `baseline` spelt out, None for what is not finite."""
        values = asdict(self) | {"status": self.status.value, "baseline": self.place.baseline}
        return {key: None if isinstance(v, float) and not isfinite(v) else v for key, v in values.items()}


COLUMNS = (*(f.name for f in fields(Record)), "baseline")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, processors, threads, commit and time: what a measurement depends on."""
    import torch

    import saccade

    stamp: dict[str, Any] = {
        "saccade": saccade.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        stamp |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return stamp


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, and "-dirty" where its package has changed since; None for
    an installed package.
    """
    here = Path(__file__).parent
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", "--", "../catalogue.py"]
        if subprocess.run(tracked, capture_output=True, timeout=5).returncode:
            return None
        git = ["git", "-C", str(here)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        changed = subprocess.run([*git, "status", "--porcelain", "--", ".."], capture_output=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit = found.stdout.strip()
    return (commit + "-dirty" if changed else commit) or None


def write_atomic(path: Path, text: str) -> Path:
    """Write all of `text` or nothing: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_jsonl(path: Path, records: Iterable[Record], stamp: dict[str, Any]) -> Path:
    """One JSON object a line, each with its environment."""
    return write_atomic(path, "".join(json.dumps(r.row() | {"environment": stamp}) + "\n" for r in records))


def write_csv(path: Path, records: Iterable[Record]) -> Path:
    """The same rows as a table; None is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(r.row() for r in records)
    return write_atomic(path, text.getvalue())
