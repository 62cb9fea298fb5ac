"""Compiling the kernels of a call side by side, before the first of them is launched.

Triton compiles a kernel when it is launched first, and a call with gradients launches up to a dozen, one after another.
So the first call of a kind runs twice: once only to find out what it would launch, all of which threads then compile at
the same time; and once for its results.

Python runs in one thread at a time, and so does Triton's frontend, which is Python. Threads that were in it together
would all leave it at the end, with everything that needs no lock (passes, assembler) still to do; and the parser of
Python 3.11 can raise "AST constructor recursion depth mismatch" when one thread takes over from another within it. So
kernels go through the frontend one after another, the heaviest first, and what comes behind it overlaps. What a kernel
needs besides is made beside it: its launcher, which is C, and, before the first kernel, Triton's own.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from saccade.scan.kernels import interpreted
from saccade.scan.kernels.ready import begun

FEW = 4  # warps: with fewer, each thread has more code instead
UNCHECKED = {"sanitize_overflow": False}  # checks of integers: a sixth of the frontend's time, then left out
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)
_known: set[Hashable] = set()


class Launched:
    """A kernel that a host launches, as in Triton; inside `compiling` it is compiled and not launched."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.function = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if _compiling.get():
            return partial(self.function.warmup, grid=grid, **UNCHECKED)
        return partial(self.function[grid], **UNCHECKED)


def alike(*counts: str) -> Callable[[Any], Launched]:
    """Arguments of a kernel whose multiples of 16 are compiled no otherwise than other numbers above 1."""
    return partial(Launched, do_not_specialize_on_alignment=list(counts))


class Kernel:
    """One that Triton wants compiled, by `compiled()`.

    source: what of, a `triton.compiler.ASTSource`, which `compiled` encloses, and the options of a backend. A Triton
    that calls them otherwise hides them, and its kernels are compiled whole one after another, as Triton does.
    """

    def __init__(self, compiled: Callable[[], Any]) -> None:
        self.compiled = compiled
        self.result: Future[Any] = Future()
        self.behind = Event()  # set when its frontend is
        enclosed = inspect.getclosurevars(compiled).nonlocals if inspect.isfunction(compiled) else {}
        self.source: Any = enclosed.get("src")
        self.signature = tuple(getattr(self.source, "signature", {}).values())
        self.weight = passed(self.signature) * max(FEW, getattr(enclosed.get("options"), "num_warps", 1))

    def compile(self) -> Any:
        """What Triton makes of it."""
        make = getattr(self.source, "make_ir", None)

        def made(*args: Any, **options: Any) -> Any:
            try:
                return make(*args, **options)
            finally:
                self.behind.set()

        if make is not None:
            self.source.make_ir = made  # of this source alone
        try:
            return self.compiled()
        finally:
            if make is not None:
                del self.source.make_ir
            self.behind.set()  # also without a frontend: what is in Triton's cache is only read


def passed(signature: Any) -> int:
    """Arguments that a kernel is passed when it is launched, in tuples too."""
    return sum(map(passed, signature)) if isinstance(signature, tuple) else signature != "constexpr"


class Abreast(Executor):
    """Compiles kernels side by side from `start` on, the heaviest first, and loads them.

    How long one will take is not known; the more arguments and warps it has, the longer, by and large, and of equals
    those that a call launches last, backwards. device: onto which they are loaded, or None, if they are not.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.kernels: list[Kernel] = []
        self.threads = ThreadPoolExecutor(2 * (os.cpu_count() or 1))  # every second one waits for another program

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        self.kernels.append(Kernel(compiled))
        return self.kernels[-1].result

    def shutdown(self, wait: bool = True, **options: Any) -> None:
        self.threads.shutdown(wait, **options)

    def start(self) -> None:
        """Of what a kernel waits for, all is in the queue before it."""
        turn, launchers = Event(), dict[str, Future[None]]()
        turn.set()
        try:
            for _, kernel in sorted(enumerate(self.kernels), key=lambda each: (each[1].weight, each[0]), reverse=True):
                arguments = str(kernel.signature)
                if self.device is not None and kernel.source is not None and arguments not in launchers:
                    launchers[arguments] = self.threads.submit(build_launcher, kernel.source)
                self.threads.submit(self.finish, kernel, turn, launchers.get(arguments))
                turn = kernel.behind
        except BaseException as error:  # no more threads: who waits for a kernel would wait for ever
            for kernel in self.kernels:
                if not kernel.result.done():
                    kernel.result.set_exception(error)
            raise

    def finish(self, kernel: Kernel, turn: Event, launcher: Future[None] | None) -> None:
        turn.wait()
        try:
            found = kernel.compile()
            if self.device is not None:
                if launcher is not None:
                    launcher.result()
                with torch.cuda.device(self.device):  # a thread has a device of its own
                    found.run  # noqa: B018 - looking at it loads it
        except BaseException as error:
            kernel.result.set_exception(error)
        else:
            kernel.result.set_result(found)


def build_launcher(source: Any) -> None:
    """Into Triton's cache, where a kernel finds it when it is loaded; one that cannot be built says so then.

    The metadata of a compiled kernel, which are not there yet, are asked for at the end.
    """
    with suppress(Exception):
        driver.active.launcher_cls(source, SimpleNamespace())


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected, which goes through all that PyTorch has loaded, for every few kernels once."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def compiling(device: torch.device | None = None) -> Iterator[None]:
    """No kernel is launched; those that would be are compiled by the end, side by side.

    device: onto which they are loaded.
    """
    with uncollected(), Abreast(device) as executor, triton.AsyncCompileMode(executor):
        if not interpreted():
            for thread in begun():
                thread.join()
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)
            executor.start()


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
