"""Tokens a second of an engine at several numbers of streams: `python -m saccade.serve.load`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from saccade.cache import Policy
from saccade.serve.engine import Engine, Request


@dataclass(frozen=True)
class Load:
    """What `streams` requests at once took: seconds on the clock, and of the processor, which other work disturbs less.

    first, each: medians, seconds to a stream's first token and between two.
    """

    streams: int
    tokens: int
    seconds: float
    processor: float
    first: float
    each: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Clock:
    """When the tokens of one request came."""

    def __init__(self) -> None:
        self.begun, self.at = time.perf_counter(), []  # type: ignore[var-annotated]

    def __call__(self, _: Request) -> None:
        self.at.append(time.perf_counter())


def measure(
    model: Any, text: bytes, streams: int, policy: Policy, prompt: int, tokens: int, progress: Any = None
) -> Load:
    """Streams that all come at once, each with its own stretch of the text, on an engine that has run one before."""
    engine = Engine(model, {"served": policy}, most=streams, prefixes=0)
    try:
        if (streams + 1) * prompt > len(text):
            raise ValueError(f"streams: got {streams} of {prompt} tokens; the text has {len(text)}")
        parts = [text[at * prompt : (at + 1) * prompt] for at in range(streams + 1)]
        engine.submit(parts.pop(), max_tokens=2)
        engine.run()
        clocks = [Clock() for _ in parts]
        begun, used = time.perf_counter(), time.process_time()
        asked = [engine.submit(p, max_tokens=tokens, told=clock) for p, clock in zip(parts, clocks, strict=True)]
        engine.run(progress)
        seconds, processor = time.perf_counter() - begun, time.process_time() - used
        lost = [request for request in asked if len(request.tokens) != tokens]
        if lost:
            raise RuntimeError(f"{len(lost)} of {streams} streams lost tokens: {lost[0].error}")
        first = statistics.median(clock.at[0] - clock.begun for clock in clocks)
        each = statistics.median((clock.at[-1] - clock.at[0]) / max(1, tokens - 1) for clock in clocks)
        return Load(streams, streams * tokens, seconds, processor, first, each)
    finally:
        engine.close()


def main(streams: str = "1,8,32", policy: str = "dense", prompt: int = 128, tokens: int = 64) -> None:
    """Measure the bundled model on this machine's CPU, and print a table. policy: as in `saccade serve`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from saccade.hosts.lm import LM
    from saccade.serve.policies import named
    from saccade.tasks.text import held_out_text

    model, (name, served) = LM.from_pretrained().to_llama(), named(policy)
    heads = ("streams", "tokens/s", "tokens/processor s", "to the first, s", "between two, ms")
    table = Table(*heads, title=f"{name}: {prompt} + {tokens} tokens")
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for count in map(int, streams.split(",")):
            task = bar.add_task(f"{count} streams")

            def progress(done: int, total: int, what: str, task: Any = task) -> None:
                bar.update(task, completed=done, total=total, description=what)

            found = measure(model, bytes(held_out_text()), count, served, prompt, tokens, progress)
            figures = (found.rate, found.tokens / found.processor, found.first, 1000 * found.each)
            table.add_row(str(count), *(f"{x:.{n}f}" for x, n in zip(figures, (0, 0, 2, 1), strict=True)))
    Console().print(table)


if __name__ == "__main__":
    import typer

    typer.run(main)
