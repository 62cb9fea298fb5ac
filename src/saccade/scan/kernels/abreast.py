"""Compiling the kernels of a call side by side, before the first of them is launched.

Triton compiles a kernel when it is launched first, and a call with gradients launches up to a dozen, one after another.
So the first call of a kind runs twice: once only to find out what it would launch, all of which threads then compile at
the same time; and once for its results.

Python runs in one thread at a time, and so does Triton's frontend, which is Python. Threads that were in it together
would all leave it at the end, with everything that needs no lock (passes, assembler) still to do; and the parser of
Python 3.11 can raise "AST constructor recursion depth mismatch" when one thread takes over from another within it. So
kernels go through the frontend one after another, the heaviest first, and what comes behind it overlaps. What a kernel
needs besides is made beside it: its launcher, which is C, and, before the first kernel, Triton's own.

A call waits for the kernels that it launches and for all frontends. What is left of other kernels needs no Python, and
so nothing of what the program does next: those of the gradients, which go through the frontend behind those of the
call, and last of all those that few problems need (`later`). Whoever launches one waits for it, and is told what it
failed of.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
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
AT_ONCE, BEHIND, SELDOM = range(3)  # when kernels are needed, and so the order of their frontends
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_compiling: ContextVar[Abreast | None] = ContextVar("compiling", default=None)
_known: set[Hashable] = set()
_behind: set[Future[Any]] = set()  # kernels that are being compiled and that nobody has waited for


class Launched:
    """A kernel that a host launches, as in Triton; inside `compiling` it is compiled and not launched."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.function = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if _compiling.get() is not None:
            return self.warmup(grid)
        return partial(self.function[grid], **UNCHECKED)

    def warmup(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Compiled as far as it is not; what Triton keeps of it is returned."""
        return partial(self.function.warmup, grid=grid, **UNCHECKED)

    def seldom(self, needed: Callable[[], bool]) -> Seldom:
        """The same kernel where it does nothing unless `needed()`, which may wait for the device."""
        return Seldom(self, needed)


def settle() -> None:
    """Wait until nothing is compiled; what failed is told to who launches it."""
    wait(_behind.copy())


@dataclass(frozen=True)
class Seldom:
    """See `Launched.seldom`. Who would have to wait until it is compiled asks first whether it is needed.

    In a graph that is being recorded, which will be run for other problems too, it always is.
    """

    kernel: Launched
    needed: Callable[[], bool]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        compiles = _compiling.get() is not None
        if not compiles and not _behind:
            return self.kernel[grid]

        def launch(*args: Any, **options: Any) -> None:
            with later(SELDOM):
                pending = is_pending(self.kernel.warmup(grid)(*args, **options))
            if not compiles and (not pending or torch.cuda.is_current_stream_capturing() or self.needed()):
                self.kernel[grid](*args, **options)

        return launch


def is_pending(kernel: Any) -> bool:
    """Whether what Triton keeps of a kernel is a promise that is still to be kept."""
    promise = getattr(kernel, "future", None)
    return promise is not None and not promise.done()


def alike(*counts: str) -> Callable[[Any], Launched]:
    """Arguments of a kernel whose multiples of 16 are compiled no otherwise than other numbers above 1."""
    return partial(Launched, do_not_specialize_on_alignment=list(counts))


class Kernel:
    """One that Triton wants compiled, by `compiled()`.

    source: what of, a `triton.compiler.ASTSource`, which `compiled` encloses, and the options of a backend. A Triton
    that calls them otherwise hides them, and its kernels are compiled whole one after another, as Triton does.
    """

    def __init__(self, compiled: Callable[[], Any], when: int = AT_ONCE) -> None:
        self.compiled = compiled
        self.when = when
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
    """Compiles kernels side by side from `start` on, the first that are needed first, and loads them.

    Of those needed at the same time the heaviest. How long one will take is not known; the more arguments and warps it
    has, the longer, by and large, and of equals those that a call launches last, backwards. device: onto which they are
    loaded, or None, if they are not.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.kernels: list[Kernel] = []
        self.when = AT_ONCE  # what is submitted is needed
        prepare = None if device is None else beside_recordings
        # Every second one waits for another program.
        self.threads = ThreadPoolExecutor(2 * (os.cpu_count() or 1), initializer=prepare)

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        self.kernels.append(Kernel(compiled, self.when))
        return self.kernels[-1].result

    def shutdown(self, wait: bool = True, **options: Any) -> None:
        self.threads.shutdown(wait, **options)

    def start(self) -> None:
        """Of what a kernel waits for, all is in the queue before it; no more will come."""
        turn, launchers = Event(), dict[str, Future[None]]()
        turn.set()
        order = sorted(enumerate(self.kernels), key=lambda each: (-each[1].when, each[1].weight, each[0]), reverse=True)
        try:
            for _, kernel in order:
                _behind.add(kernel.result)
                kernel.result.add_done_callback(_behind.discard)
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
        finally:
            self.threads.shutdown(wait=False)

    def wait(self) -> None:
        """For all frontends, and for the kernels that are needed at once."""
        for kernel in self.kernels:
            kernel.behind.wait()
        for kernel in self.kernels:
            if kernel.when == AT_ONCE:
                kernel.result.result()

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


def beside_recordings() -> None:
    """Let this thread load kernels while others record graphs; else CUDA would refuse both."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))


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
    """No kernel is launched; those that would be are compiled side by side, and by the end those that are not `later`.

    device: onto which they are loaded.
    """
    executor = Abreast(device)
    with uncollected():
        with triton.AsyncCompileMode(executor) as mode:
            if not interpreted():
                for thread in begun():
                    thread.join()
            token = _compiling.set(executor)
            try:
                yield
            finally:
                _compiling.reset(token)
                promise(mode)
                executor.start()
        executor.wait()


def promise(mode: Any) -> None:
    """Have launches wait for the kernels of a mode of Triton's, and not its end.

    A launch does so where Triton's cache has a promise in the place of a kernel, as from 3.9 on it has by itself. One
    that is broken is told to who waits for it, and forgotten: the next launch compiles anew.
    """

    def kept(remember: Callable[[Any], None], result: Future[Any]) -> None:
        if result.exception() is not None:
            remember(None)

    for kernel in mode.future_kernels.values():
        kernel.finalize_compile(kernel)
        kernel.future.add_done_callback(partial(kept, kernel.finalize_compile))
    mode.raw_futures = []


@contextmanager
def later(when: int = BEHIND) -> Iterator[None]:
    """What is launched inside is not needed by what the call does first: but BEHIND it, for gradients, or SELDOM."""
    executor = _compiling.get()
    if executor is None:
        yield
        return
    before = executor.when
    executor.when = max(before, when)
    try:
        yield
    finally:
        executor.when = before


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
