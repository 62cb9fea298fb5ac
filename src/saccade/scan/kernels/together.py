"""Kernels of a call that run at the same time."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache

import torch

_depth: ContextVar[int] = ContextVar("depth", default=0)


def together(device: torch.device, *launches: Callable[[], None]) -> None:
    """Launch kernels that need nothing of each other: all but the last on a stream beside the current one.

    Before and behind them the streams wait for each other, so that memory may be used again as if there were one. In a
    graph that is being recorded they are branches. A launch may be of several that run together, too.
    """
    *first, last = launches
    if not first or device.type != "cuda":
        for launch in launches:
            launch()
        return
    here, depth = torch.cuda.current_stream(device), _depth.get()
    beside = stream_beside(here, depth)
    beside.wait_stream(here)
    deeper = _depth.set(depth + 1)
    try:
        with torch.cuda.stream(beside):
            for launch in first:
                launch()
        last()
    finally:
        _depth.reset(deeper)
        here.wait_stream(beside)


@lru_cache
def stream_beside(stream: torch.cuda.Stream, depth: int) -> torch.cuda.Stream:
    """One for each, since a stream that is recorded may not be used by anybody else, nor twice at a time."""
    return torch.cuda.Stream(stream.device)


def one_by_one(*launches: Callable[[], None] | None) -> Callable[[], None]:
    """One after another what there is, as one of those that run together."""

    def launch() -> None:
        for each in launches:
            if each is not None:
                each()

    return launch
