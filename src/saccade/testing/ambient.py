"""The surroundings of a run: torch's global settings, the global random numbers, unwritten memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def settings() -> dict[str, Any]:
    """The global torch settings that code of this package must leave alone."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def restore(before: dict[str, Any]) -> list[str]:
    """Set everything back to `before`; returns what had changed, in words."""
    after = settings()
    changed = [f"{name} from {value} to {after[name]}" for name, value in before.items() if value != after[name]]
    if changed:
        torch.set_default_dtype(before["default dtype"])
        torch.set_grad_enabled(before["gradients enabled"])
        torch.set_num_threads(before["threads"])
        torch.set_float32_matmul_precision(before["float32 matmul precision"])
        torch.use_deterministic_algorithms(before["deterministic algorithms"])
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
    fill, strict = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        memory.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
