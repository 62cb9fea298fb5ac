"""Compiling the kernels of a call side by side, before the first of them is launched.

Triton compiles a kernel when it is launched first, and a call with gradients launches up to a dozen, one after another.
So the first call of a kind runs twice: once only to find out what it would launch, all of which threads then compile at
the same time, for Triton holds Python's lock in its frontend alone; and once for its results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)
_known: set[Hashable] = set()


class Launched:
    """A kernel that a host launches, as in Triton; inside `compiling` it is compiled and not launched."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.function = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if _compiling.get():
            return partial(self.function.warmup, grid=grid)
        launch: Callable[..., Any] = self.function[grid]
        return launch


def alike(*counts: str) -> Callable[[Any], Launched]:
    """Arguments of a kernel whose multiples of 16 are compiled no otherwise than other numbers above 1."""
    return partial(Launched, do_not_specialize_on_alignment=list(counts))


class Loading(ThreadPoolExecutor):
    """Threads that load a kernel too when it is compiled, so that its launcher, which is C, is built side by side."""

    def __init__(self, device: torch.device | None) -> None:
        super().__init__(os.cpu_count())
        self.device = device

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(self.load, compiled)

    def load(self, compiled: Callable[[], Any]) -> Any:
        kernel = compiled()
        if self.device is not None:
            with torch.cuda.device(self.device):  # a thread has a device of its own
                kernel.run  # noqa: B018 - looking at it loads it
        return kernel


@contextmanager
def compiling(device: torch.device | None = None) -> Iterator[None]:
    """No kernel is launched; those that would be are compiled by the end, in as many threads as there are cores.

    device: onto which they are loaded.
    """
    with Loading(device) as pool, triton.AsyncCompileMode(pool):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


def trained(*tensors: Tensor | None) -> bool:
    """Whether an operator, given these, may be asked for gradients later."""
    return any(x is not None and x.requires_grad for x in tensors)


def compile_abreast(kind: Hashable, device: torch.device, call: Callable[[], object]) -> None:
    """Compile what a call launches, if it is the first of its kind.

    What it computes besides is thrown away, and made of memory that nothing was written to; the memory that it asks for
    is free again when the call begins.
    """
    if kind in _known or device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():  # what the call does besides would be recorded
        return
    _known.add(kind)
    with compiling(device):
        call()
