"""Running a stranger's code: whatever goes wrong inside becomes a `Status` and one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from saccade.bench.records import Status


class Failed(Exception):
    """A mechanism did not come through: `status`, and why in one line."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class _Late(BaseException):  # no `except Exception` inside the mechanism may swallow it
    pass


@contextmanager
def guard(seconds: float | None = None) -> Iterator[None]:
    """Turn any exception inside into `Failed`.

    ValueError, TypeError and NotImplementedError are how a mechanism declines: UNSUPPORTED. Memory errors: OOM. All
    others are a crash: WRONG. seconds: a limit, kept by a timer signal on the main thread; a single operator that runs
    longer is not interrupted.
    """
    try:
        with _alarm(seconds):
            yield
    except Failed:
        raise
    except _Late:
        if seconds is None:  # the limit of a guard further out
            raise
        raise Failed(Status.TIMEOUT, f"stopped after {seconds:.1f} s") from None
    except (NotImplementedError, ValueError, TypeError) as error:
        raise Failed(Status.UNSUPPORTED, _line(error)) from error
    except Exception as error:
        if is_memory(error):
            raise Failed(Status.OOM, _line(error)) from error
        raise Failed(Status.WRONG, f"crashed: {type(error).__name__}: {_line(error)}") from error


def is_memory(error: Exception) -> bool:
    """Is it memory that ran out? The allocator of the CPU raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    on_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not on_main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    # Rung again, since an exception raised inside a destructor is swallowed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
