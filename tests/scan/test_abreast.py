"""Kernels are compiled side by side: their frontends one after another, all else at once."""

import gc
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from triton import runtime

from saccade.scan.kernels import abreast, ready
from saccade.scan.kernels.abreast import Abreast, Kernel, passed

SECONDS = 30  # that nothing here takes, unless a thread waits for what does not come


class Compiler:
    """Stands for Triton: what is compiled of it says when it enters and leaves its frontend, and ends with all."""

    def __init__(self, kernels: int) -> None:
        self.log: list[tuple[str, str]] = []
        self.inside = self.most = 0
        self.lock = threading.Lock()
        self.all = threading.Barrier(kernels)

    def kernel(self, name: str, signature: dict, *, warps: int = 4, cached: bool = False, together: bool = True):
        def make_ir() -> None:
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
                self.log.append(("enters", name))
            threading.Event().wait(0.01)
            with self.lock:
                self.inside -= 1
                self.log.append(("leaves", name))

        src, options = SimpleNamespace(signature=signature, make_ir=make_ir), SimpleNamespace(num_warps=warps)

        def compiled() -> SimpleNamespace:
            assert options.num_warps == warps
            if not cached:
                src.make_ir()
            if together:  # behind the frontends no kernel waits for another
                self.all.wait(SECONDS)
            return SimpleNamespace(name=name, run=None)

        return compiled


@contextmanager
def threads(count: int):
    """So many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: count)
        yield


def arguments(count: int) -> dict[str, str]:
    return {f"x{i}": "*fp32" for i in range(count)} | {"N": "constexpr"}


def compiled_of(given: list, device: torch.device | None = None) -> list[str]:
    with Abreast(device) as executor:
        found = [executor.submit(each) for each in given]
        executor.start()
        return [each.result(SECONDS).name for each in found]


def frontends_in_turn() -> None:
    compiler = Compiler(4)
    given = [
        compiler.kernel("middle", {"pairs": ("*fp32", ("i32", "constexpr")), "x": "*fp32"}, warps=1),
        compiler.kernel("light", arguments(2)),
        compiler.kernel("known", arguments(9), cached=True, together=False),
        compiler.kernel("heavy", arguments(3), warps=8),
        compiler.kernel("late", arguments(2)),
    ]
    with threads(4):
        assert compiled_of(given) == ["middle", "light", "known", "heavy", "late"]
    assert compiler.most == 1
    assert [name for what, name in compiler.log if what == "enters"] == ["heavy", "middle", "late", "light"]


def test_frontends_go_one_after_another_the_heaviest_first_and_of_equals_the_last():
    frontends_in_turn()


@pytest.mark.parametrize("flaw", ["no turns", "as they come"])
def test_that_would_be_noticed(monkeypatch, flaw):
    if flaw == "no turns":

        class Free(Kernel):
            def __init__(self, compiled) -> None:
                super().__init__(compiled)
                self.behind.set()

        monkeypatch.setattr(abreast, "Kernel", Free)
    else:
        monkeypatch.setattr(abreast, "passed", lambda signature: 1)
    with pytest.raises(AssertionError):
        frontends_in_turn()


@pytest.mark.parametrize("early", [False, True])
def test_nothing_begins_before_all_is_known(monkeypatch, early):
    """early: what a pool of threads does, which would be noticed."""
    if early:
        monkeypatch.setattr(Abreast, "submit", lambda self, compiled: self.threads.submit(compiled))
    compiler = Compiler(1)
    with Abreast(None) as executor:
        executor.submit(compiler.kernel("one", arguments(1)))
        threading.Event().wait(0.05)
        assert bool(compiler.log) == early
        executor.start()
    assert len(compiler.log) == 2


def test_fewer_threads_than_kernels_are_enough():
    compiler = Compiler(1)
    given = [compiler.kernel(str(i), arguments(i), together=False) for i in range(9)]
    with threads(1):
        assert compiled_of(given) == [str(i) for i in range(9)]
    assert compiler.most == 1


def test_kernels_of_unknown_sources_are_compiled_one_after_another():
    """Whole: where their frontends end is not known, and Python's parser may not take two at a time."""
    inside, most = 0, 0

    def compiled() -> SimpleNamespace:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.01)
        inside -= 1
        return SimpleNamespace(name="one")

    with threads(4):
        assert compiled_of([compiled] * 3) == ["one"] * 3
    assert most == 1


@pytest.mark.parametrize("within", ["before", "frontend", "behind"])
def test_a_kernel_that_fails_holds_up_no_other(within):
    compiler = Compiler(2)
    others = [compiler.kernel("first", arguments(9)), compiler.kernel("last", arguments(1))]

    def fail() -> None:
        raise RuntimeError(within)

    src = SimpleNamespace(signature=arguments(5), make_ir=fail if within == "frontend" else lambda: None)

    def failing() -> None:
        if within == "before":
            fail()
        src.make_ir()
        fail()

    with threads(4), Abreast(None) as executor:
        wrong, *right = [executor.submit(each) for each in (failing, *others)]
        executor.start()
        assert [each.result(SECONDS).name for each in right] == ["first", "last"]
        with pytest.raises(RuntimeError, match=within):
            wrong.result(SECONDS)


def test_a_machine_without_another_thread_says_so(monkeypatch):
    """Triton, which waits for every kernel, would wait for ever."""

    def refuse(*_) -> None:
        raise RuntimeError("can't start new thread")

    with Abreast(None) as executor:
        found = executor.submit(Compiler(1).kernel("one", arguments(1)))
        monkeypatch.setattr(executor.threads, "submit", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            executor.start()
        with pytest.raises(RuntimeError, match="new thread"):
            found.result(1)


def launchers_beside(monkeypatch, fault: Exception | None = None) -> list[str]:
    """Launchers that are built of four kernels with three signatures, which none is compiled without."""
    built, enough = [], threading.Event()

    def launcher(source, metadata) -> None:
        built.append(str(source.signature))
        if len(built) == 3:
            enough.set()
        if fault is not None:
            raise fault
        assert not hasattr(metadata, "shared")

    monkeypatch.setattr(abreast, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=launcher)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: threading.Lock())
    compiler = Compiler(4)
    each = [arguments(1), arguments(2), arguments(2), arguments(3)]
    given = [compiler.kernel(str(i), signature) for i, signature in enumerate(each)]

    class Late(Kernel):
        def compile(self):
            found = super().compile()
            assert enough.wait(1)
            return found

    monkeypatch.setattr(abreast, "Kernel", Late)
    with threads(8):
        assert compiled_of(given, torch.device("cuda", 0)) == ["0", "1", "2", "3"]
    return built


def test_a_launcher_is_built_beside_its_kernels_and_once(monkeypatch):
    built = launchers_beside(monkeypatch)
    assert sorted(built) == sorted(str(arguments(count)) for count in (1, 2, 3))


def test_launchers_in_the_end_would_be_noticed(monkeypatch):
    """As they were built once: by the kernel that is loaded."""
    monkeypatch.setattr(abreast, "build_launcher", lambda source: None)
    with pytest.raises(AssertionError):
        launchers_beside(monkeypatch)


def test_a_launcher_that_cannot_be_built_says_so_when_its_kernel_is_loaded(monkeypatch):
    assert len(launchers_beside(monkeypatch, RuntimeError("no compiler"))) == 3


class Driver:
    """Is built when it is looked at, while Triton's key is made."""

    def __init__(self, together: threading.Barrier) -> None:
        self.together = together

    @property
    def active(self) -> None:
        self.together.wait(1)


class InTurn(threading.Thread):
    """One that is waited for before the next begins."""

    def start(self) -> None:
        super().start()
        self.join()


@pytest.mark.parametrize("beside", [True, False])
def test_what_triton_makes_first_is_made_side_by_side(monkeypatch, beside):
    together = threading.Barrier(2)
    monkeypatch.setattr(runtime, "driver", Driver(together))
    monkeypatch.setattr(runtime.cache, "triton_key", lambda: together.wait(1))
    if not beside:
        monkeypatch.setattr(ready, "Thread", InTurn)
    for thread in ready.begun.__wrapped__():
        thread.join()
    assert together.broken != beside


def test_a_triton_without_a_key_goes_without(monkeypatch):
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=None))
    monkeypatch.delattr(runtime.cache, "triton_key", raising=False)
    for thread in ready.begun.__wrapped__():
        thread.join()


BEFORE = """
import sys
from saccade.scan.kernels import make_ready, ready
ready.begun = lambda: print("ready", "saccade.scan.kernels.abreast" in sys.modules)
make_ready()
"""


def test_it_begins_before_kernels_are_imported():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.split() == ["ready", "False"], done.stderr[-3000:]


def test_arguments_are_counted_in_tuples_too():
    assert passed(("*fp32", "constexpr", ("i32", ("i64", "constexpr")))) == 3
    assert passed(()) == 0


def collected() -> list[bool]:
    """Whether garbage is collected inside, and behind a failure."""
    found = []

    def fail() -> None:
        with abreast.uncollected():
            found.append(gc.isenabled())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    return [*found, gc.isenabled()]


def test_garbage_waits_while_kernels_are_compiled():
    assert collected() == [False, True]
    gc.disable()
    try:
        assert collected() == [False, False]
    finally:
        gc.enable()


SCRIPT = """
import threading
import torch
from triton.compiler import ASTSource
from saccade.scan.kernels import abreast, ready
from saccade.scan.kernels.launch import Launch
from saccade.testing.offline import compile_only
compile_only(lambda name, kernel: None)
inside, most, made = 0, 0, ASTSource.make_ir
def make_ir(*given, **options):
    global inside, most
    inside += 1
    most = max(most, inside)
    try:
        return made(*given, **options)
    finally:
        inside -= 1
ASTSource.make_ir = make_ir
q, k, v = (torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16) for _ in range(3))
launch = Launch(q, k, v, torch.zeros(1, 1, 64), None, 0.5, False)
weights, old = [], abreast.Abreast.start
def start(self):
    weights.extend(kernel.weight for kernel in self.kernels)
    old(self)
abreast.Abreast.start = start
with abreast.compiling():
    launch.trial(torch.zeros(1, 1, 16, 16), None, torch.bfloat16, False)
print(most, len(weights), min(weights))
"""


def test_triton_shows_what_it_compiles(tmp_path):
    """In a process of its own, for here it interprets: its sources are found, and its frontend is one at a time."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    most, kernels, weight = map(int, done.stdout.split())
    assert most == 1
    assert kernels == 3
    assert weight > 0
