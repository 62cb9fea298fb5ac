"""Kernels of a call that run at the same time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch


def together(device: torch.device, *launches: Callable[[], None]) -> None:
    """Launch kernels that need nothing of each other: all but the last on a stream beside the current one.

    Before and behind them the streams wait for each other, so that memory may be used again as if there were one. In a
    graph that is being recorded they are branches.
    """
    *first, last = launches
    if not first or device.type != "cuda":
        for launch in launches:
            launch()
        return
    here = torch.cuda.current_stream(device)
    beside = stream_beside(here)
    beside.wait_stream(here)
    try:
        with torch.cuda.stream(beside):
            for launch in first:
                launch()
        last()
    finally:
        here.wait_stream(beside)


@lru_cache
def stream_beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each, since a stream that is recorded may not be used by anybody else."""
    return torch.cuda.Stream(stream.device)
