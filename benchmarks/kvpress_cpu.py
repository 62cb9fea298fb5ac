"""Cache policies of saccade beside those of kvpress (`pip install kvpress`) on the CPU: one model, the same tokens.

kvpress needs an older transformers, so that it lives in a virtual environment of its own (`--env`, made when it is
missing) and runs in a process of its own; both processes run `kvpress_worker.py`. Each row is a policy that both have,
with the same parameters, at 25 % of the tokens: the scores of the same examples and whether the replies are the same
tokens, which tokens both keep, the bytes that are held and the most bytes alive at once, and the time of a decoded
token, in turns. `by our definition`: where the two define a policy otherwise, saccade's own beside the row in which it
is given kvpress' definition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import save, show
from kvpress_worker import What, unpacked
from rich.progress import Progress

from saccade.bench.timing import ratio, rounds
from saccade.tasks.prompts import Bytes, Example, Task, task_named

WORKER = Path(__file__).parent / "kvpress_worker.py"
ENV = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "saccade" / "kvpress"
KEPT, WINDOW, POOL = 0.25, 32, 5
AHEAD = 2  # tokens of a reply behind the answer's
CHUNK, WARM = 4, 4  # tokens that are timed at once, and that are decoded before
EXAMPLES = {2048: 4, 8192: 2}  # of each task; a prompt takes a CPU core ten seconds at 8192
TASKS = ("multi_key", "passkey")
QUESTIONS = 2
MIB = 2**20


def snap(window: int = WINDOW, pool: int = POOL) -> dict[str, Any]:
    return press("SnapKVPress", window_size=window, kernel_size=pool)


def press(name: str, **rest: Any) -> dict[str, Any]:
    return {"class": name, "compression_ratio": 1 - KEPT, **rest}


def shared(inner: dict[str, Any]) -> dict[str, Any]:
    return {"class": "AdaKVPress", "press": inner, "alpha_safeguard": 0.2}


def evict(scorer: str, sinks: int = 0, recent: int = 0, heads: bool = False, **rest: Any) -> Callable[[int], What]:
    """Of a number of tokens: `Evict`, uniform, or with a budget that the heads of a layer share."""

    def at(tokens: int) -> What:
        budget = {"class": "AcrossHeads", "share": tokens} if heads else tokens
        return {"scorer": {"class": scorer, **rest}, "budget": budget, "sinks": sinks, "recent": recent}

    return at


def pyramid(name: str) -> Callable[[int], What]:
    def at(tokens: int) -> What:
        return {"scorer": OBSERVED, "budget": {"class": name, "share": KEPT}, "recent": WINDOW}

    return at


@dataclass(frozen=True)
class Pair:
    """A policy on both sides. theirs: None is dense. ours: tokens a key head -> `Evict`, as the worker takes it. own:
    saccade's own definition, where `ours` is kvpress'.
    """

    name: str
    theirs: What
    ours: Callable[[int], What]
    own: Callable[[int], What] | None = None


OBSERVED = {"class": "Observed", "window": WINDOW, "pool": POOL}
WIDE = {"window": 1, "pool": 15}
PAIRS = [
    Pair("dense", None, lambda tokens: None),
    Pair("snapkv", snap(), evict("Observed", recent=WINDOW, window=WINDOW, pool=POOL)),
    Pair("snapkv(window=1, pool=15)", snap(**WIDE), evict("Observed", recent=1, **WIDE)),
    Pair("knorm", press("KnormPress"), evict("KeyNorm")),
    Pair("keydiff", press("KeyDiffPress"), evict("KeyDifference")),
    Pair("streaming_llm", press("StreamingLLMPress", n_sink=4), evict("Recency", sinks=4)),
    Pair("tova", press("TOVAPress"), evict("LastQuery", recent=1)),
    Pair(
        "pyramidkv",
        press("PyramidKVPress", window_size=WINDOW, kernel_size=POOL, beta=20),
        pyramid("PyramidOfAll"),
        pyramid("Pyramid"),
    ),
    Pair(
        "expected_attention",
        press("ExpectedAttentionPress", n_sink=4, n_future_positions=512),
        evict("Expected", sinks=4),
    ),
    Pair("adakv", shared(snap()), evict("Observed", recent=WINDOW, heads=True, window=WINDOW, pool=POOL)),
    Pair("adakv, keydiff", shared(press("KeyDiffPress")), evict("KeyDifference", heads=True)),
    Pair(
        "adakv, expected_attention",
        shared(press("ExpectedAttentionPress", n_sink=4, n_future_positions=512)),
        evict("Expected", sinks=4, heads=True),
    ),
]


class Process:
    """A worker: `send` a message, `receive` what it gave; errors of the worker are raised here."""

    def __init__(self, command: Sequence[str | Path], threads: int = 1) -> None:
        quiet = {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(threads),
        }
        self.command = [str(part) for part in command]
        self.inner = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
        )

    def send(self, do: str, **what: Any) -> None:
        assert self.inner.stdin is not None
        self.inner.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.inner.stdin.flush()

    def receive(self) -> Any:
        assert self.inner.stdout is not None
        line = self.inner.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{' '.join(self.command)}: it ended with {self.inner.wait()}; see what it printed above"
            )
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{' '.join(self.command)}: {found['error']}")
        return found

    def __call__(self, do: str, **what: Any) -> Any:
        self.send(do, **what)
        return self.receive()

    def end(self) -> None:
        assert self.inner.stdin is not None
        assert self.inner.stdout is not None
        self.inner.stdin.close()
        self.inner.wait()
        self.inner.stdout.close()


def environment(folder: Path) -> Path:
    """The interpreter of a virtual environment with kvpress, which is made where it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making an environment with kvpress in {folder}")
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import kvpress"], capture_output=True).returncode:
        # The same PyTorch on both sides; transformers is what kvpress takes.
        same = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "kvpress", same], check=True)
    return python


def drawn(length: int, count: int) -> list[tuple[Task, Example]]:
    """Examples of every task."""
    return [
        (task, example)
        for task in map(task_named, TASKS)
        for example in task.examples(length, count, questions=QUESTIONS, tokenizer=Bytes())
    ]


def tokens_of(prompt: Sequence[int]) -> int:
    """As many as kvpress keeps."""
    return int(KEPT * len(prompt))


def scores(task: Task, example: Example, replies: list[list[int]]) -> list[float]:
    """One for each question that was asked."""
    asked = zip(replies, example.questions, strict=False)
    return [task.score(Bytes().decode(reply), question.answer) for reply, question in asked]


def answered(pair: Pair, theirs: Process, ours: Process, examples: list[tuple[Task, Example]], seconds: float) -> Any:
    """Replies of both sides to the same tokens: their scores, how many are the same, and what both keep; and, once, the
    memory of a prompt with its question, and the time of tokens behind it.
    """
    found: dict[str, list[Any]] = {name: [] for name in ("theirs", "ours", "own", "same", "kept")}
    costs: dict[str, Any] = {}
    for task, example in examples:
        questions = [Bytes().encode(question.text) for question in example.questions]
        new = AHEAD + max(len(question.answer) for question in example.questions)
        for aware in (True, False):
            context = list(example.context)
            tokens = tokens_of([*context, *questions[0]] if aware else context)
            what = {"context": context, "questions": questions, "aware": aware, "new": new}
            theirs.send("answer", what=pair.theirs, **what)
            replies = ours("answer", what=pair.ours(tokens), **what)
            others = theirs.receive()
            costs = costs or memory(others, replies) | timed(theirs, ours, seconds)
            if pair.own is not None:
                own = ours("answer", what=pair.own(tokens), **what)
                found["own"] += scores(task, example, own["replies"])
            for name, each in (("theirs", others), ("ours", replies)):
                found[name] += scores(task, example, each["replies"])
            found["same"] += [a == b for a, b in zip(others["replies"], replies["replies"], strict=True)]
            kept = [unpacked(each["kept"], each["shape"]) for each in (others, replies)]
            found["kept"].append([int(x) for x in ((kept[0] & ~kept[1]).sum(), kept[0].sum(), kept[1].sum())])
    return found | {"costs": costs}


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean difference over the same questions, and its standard error.

    >>> paired([1.0, 0.0, 1.0], [1.0, 0.0, 0.0])
    (0.3333333333333333, 0.3333333333333333)
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def memory(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """MiB: of what is held after the prompt, and of all tensors at their peak while it is read, and behind it."""
    told = {"held": "held", "reading": "peak reading", "decoding": "peak decoding"}
    sides = {"theirs": theirs, "ours": ours}
    return {f"{told[key]} {name} MiB": round(side[key] / MIB, 2) for key in told for name, side in sides.items()}


def timed(theirs: Process, ours: Process, seconds: float) -> dict[str, Any]:
    """Tokens that are decoded in turns, behind the prompts that were read last."""

    def steps(side: Process) -> Callable[[], float]:
        return lambda: side("step", count=CHUNK)["seconds"] / CHUNK

    def clock(calls: Sequence[Callable[[], Any]]) -> list[float]:
        return [call() for call in calls]  # the other process waits meanwhile

    for side in (theirs, ours):
        side("step", count=WARM)
    (samples,) = rounds([steps(ours)], steps(theirs), seconds=seconds, clock=clock)
    faster = ratio(samples)
    low, high = (None if end is None else round(end, 2) for end in (faster.low, faster.high))
    return {
        "token theirs ms": round(samples.baseline_seconds * 1e3, 2),
        "token ours ms": round(samples.seconds * 1e3, 2),
        "speed-up": round(faster.median, 2),
        "low": low,
        "high": high,
        "pairs": faster.pairs,
    }


def measure(
    pair: Pair, theirs: Process, ours: Process, examples: list[tuple[Task, Example]], seconds: float
) -> dict[str, Any]:
    """A row."""
    found = answered(pair, theirs, ours, examples, seconds)
    difference, error = paired(found["ours"], found["theirs"])
    only, others, mine = (sum(each) for each in zip(*found["kept"], strict=True))
    return {
        "questions": len(found["ours"]),
        "score theirs": round(statistics.fmean(found["theirs"]), 3),
        "score ours": round(statistics.fmean(found["ours"]), 3),
        "difference": round(difference, 3),
        "standard error": round(error, 3),
        "by our definition": round(statistics.fmean(found["own"]), 3) if found["own"] else None,
        "replies the same": sum(found["same"]),
        "kept theirs": others,
        "kept ours": mine,
        "kept by theirs alone": only,
        **found["costs"],
    }


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the console shows it: theirs / ours."""

    def both(what: str, unit: str = "") -> str:
        return f"{row[f'{what} theirs{unit}']} / {row[f'{what} ours{unit}']}"

    interval = "" if row["low"] is None else f" [{row['low']}, {row['high']}]"
    return {
        "policy": row["pattern"],
        "tokens": row["tokens"],
        "score": both("score"),
        "difference": f"{row['difference']} ± {row['standard error']}",
        "our definition": row["by our definition"],
        "same": f"{row['replies the same']} of {row['questions']}",
        "kept otherwise": f"{row['kept by theirs alone']} of {row['kept theirs']}",
        "held MiB": both("held", " MiB"),
        "peak reading": both("peak reading", " MiB"),
        "peak decoding": both("peak decoding", " MiB"),
        "token ms": both("token", " ms"),
        "speed-up": f"{row['speed-up']}x{interval}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=ENV, help=f"virtual environment of kvpress (default: {ENV})")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(EXAMPLES))
    parser.add_argument("--examples", type=int, help="of each task (default: 4 at 2048 tokens, 2 at 8192)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the decoded tokens of each row")
    parser.add_argument("--only", default="", help="policies whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    taken = [pair for pair in PAIRS if given.only in pair.name]
    if not taken:
        parser.error(f"--only: no policy is called {given.only!r}; there are {', '.join(pair.name for pair in PAIRS)}")
    python, folder = environment(given.env), given.env / "model"
    ours = Process([sys.executable, WORKER, "saccade", folder, str(given.threads)], given.threads)
    versions = {"ours": ours("versions")}
    theirs = Process([python, WORKER, "kvpress", folder, str(given.threads)], given.threads)
    versions["theirs"] = theirs("versions")
    rows = []
    with Progress() as progress:
        bar = progress.add_task("", total=len(taken) * len(given.lengths))
        for length in given.lengths:
            examples = drawn(length, given.examples or EXAMPLES.get(length, 1))
            for pair in taken:
                progress.update(bar, description=f"{pair.name}, {length} tokens")
                rows.append(
                    {"pattern": pair.name, "tokens": length, **measure(pair, theirs, ours, examples, given.seconds)}
                )
                progress.advance(bar)
    for side in (ours, theirs):
        side.end()
    show("kvpress / saccade, 25 % of the tokens", [brief(row) for row in rows])
    about = {"kept": KEPT, "tasks": TASKS, "dtype": "float32", "batch": 1, "versions": versions}
    save("kvpress_cpu", rows, **about, threads_each=given.threads)


if __name__ == "__main__":
    main()
