"""The surroundings of a run: torch's global settings, the global random numbers, unwritten memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
}


def settings() -> dict[str, Any]:
    """The global torch settings that code of this package must leave alone."""
    return {name: get() for name, (get, _) in SETTINGS.items()}


def restore(before: dict[str, Any]) -> list[str]:
    """Set everything back to `before`; returns what had changed, in words."""
    changed = []
    for name, (get, put) in SETTINGS.items():
        if get() != before[name]:
            changed.append(f"{name} from {before[name]} to {get()}")
            put(before[name])
    return changed


@contextmanager
def isolated() -> Iterator[None]:
    """Settings and global random numbers are afterwards what they were before."""
    before = settings()
    try:
        with seeded(0):
            yield
    finally:
        restore(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator at `seed` inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch allocates and does not write holds NaN, or the largest integer.

    >>> with poisoned():
    ...     bool(torch.empty(3).isnan().all())
    True
    """
    memory: Any = torch.utils.deterministic
    fill, mode = memory.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    try:
        memory.fill_uninitialized_memory = True
        torch.set_deterministic_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
