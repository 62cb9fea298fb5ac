"""Kernels are compiled side by side: their frontends one after another, the rest at once; what is needed leads."""

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
from triton.runtime.errors import InterpreterError

from saccade.scan.kernels import abreast, ready
from saccade.scan.kernels.abreast import AT_ONCE, BEHIND, SELDOM, Abreast, Kernel, Launched, passed
from saccade.scan.kernels.launch import Launch, Prepared

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
            def __init__(self, *given) -> None:
                super().__init__(*given)
                self.behind.set()

        monkeypatch.setattr(abreast, "Kernel", Free)
    else:
        monkeypatch.setattr(abreast, "passed", lambda signature: 1)
    with pytest.raises(AssertionError):
        frontends_in_turn()


def frontends_by_need(needs: list[int]) -> list[str]:
    """Names in the order in which kernels of these needs go through the frontend, the heaviest named last."""
    compiler = Compiler(len(needs))
    with threads(len(needs)), Abreast(None) as executor:
        for i, when in enumerate(needs):
            executor.when = when
            executor.submit(compiler.kernel(str(i), arguments(i + 1)))
        executor.start()
    return [name for what, name in compiler.log if what == "enters"]


def test_frontends_of_what_is_needed_first_go_first():
    assert frontends_by_need([BEHIND, AT_ONCE, AT_ONCE, BEHIND, SELDOM]) == ["2", "1", "3", "0", "4"]
    assert frontends_by_need([AT_ONCE] * 5) == ["4", "3", "2", "1", "0"]  # as it would be without


class Held:
    """A kernel that has left its frontend and is finished when it is let go, or fails then."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.let_go, self.fault = threading.Event(), fault
        self.source = SimpleNamespace(signature={}, make_ir=lambda: None)

    def compiled(self):
        src = self.source

        def compiled() -> SimpleNamespace:
            src.make_ir()
            assert self.let_go.wait(SECONDS)
            if self.fault is not None:
                raise self.fault
            return SimpleNamespace(name="held", run=None)

        return compiled


@pytest.mark.parametrize("when", [AT_ONCE, BEHIND, SELDOM])
def test_a_call_waits_for_what_it_needs_alone(when):
    """At once: what would be noticed."""
    held = Held(RuntimeError("behind") if when else None)
    with threads(2), Abreast(None) as executor:
        needed = executor.submit(Compiler(1).kernel("needed", arguments(1)))
        executor.when = when
        found = executor.submit(held.compiled())
        executor.start()
        waits = threading.Thread(target=executor.wait)
        waits.start()
        waits.join(0.2 if when == AT_ONCE else SECONDS)
        assert waits.is_alive() == (when == AT_ONCE)
        assert needed.done() or waits.is_alive()
        assert found in abreast._behind
        held.let_go.set()
        waits.join(SECONDS)
    assert found.done()
    assert found not in abreast._behind


def test_a_call_waits_for_all_frontends():
    """What is left of others then needs no Python, which the program may be in."""
    compiler, open_ = Compiler(1), threading.Event()
    slow = compiler.kernel("slow", arguments(1))
    with threads(2), Abreast(None) as executor:
        executor.when = BEHIND
        executor.submit(slow)
        executor.submit(lambda: open_.wait(SECONDS))  # of unknown source: all of it may be frontend
        executor.start()
        waits = threading.Thread(target=executor.wait)
        waits.start()
        waits.join(0.1)
        assert waits.is_alive()
        open_.set()
        waits.join(SECONDS)
        assert not waits.is_alive()


def test_a_call_is_told_what_its_own_kernels_fail_of():
    held = Held(RuntimeError("at once"))
    held.let_go.set()
    with Abreast(None) as executor:
        executor.submit(held.compiled())
        executor.start()
        with pytest.raises(RuntimeError, match="at once"):
            executor.wait()


def test_what_is_later_is_so_within_a_block_and_where_kernels_are_compiled():
    with abreast.later():  # where none are, nothing is
        pass
    executor = Abreast(None)
    token = abreast._compiling.set(executor)
    seen = [executor.when]
    try:
        with abreast.later(SELDOM), abreast.later():
            seen.append(executor.when)
        with abreast.later():
            seen.append(executor.when)
    finally:
        abreast._compiling.reset(token)
    assert [*seen, executor.when] == [AT_ONCE, SELDOM, BEHIND, AT_ONCE]


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


PROCESS = """
import sys, threading
import torch, triton
from triton.compiler import CompiledKernel
from saccade.scan.kernels import abreast
from saccade.scan.kernels.launch import Launch, Prepared
from saccade.testing.offline import NoGpu

made, launched, held, failing = [], [], threading.Event(), []
compile = triton.compiler.compile

def counted(src, *args, **options):
    made.append(src.hash())
    if failing:
        raise RuntimeError("no assembler")
    return compile(src, *args, **options)

def hold(self):
    found = whole(self)
    if self.when > abreast.AT_ONCE:
        held.wait(30)
        if failing:
            raise RuntimeError("broken behind")
    return found

def launch(self, *args):
    names = self.src.fn.arg_names
    launched.append(self.src.constants[names.index("SPLIT"),] if "SPLIT" in names else self.name)

triton.runtime.driver.set_active(NoGpu())
triton.compiler.compile, CompiledKernel.run = counted, launch
CompiledKernel.launch_metadata = lambda self, *args: None
whole, abreast.Kernel.compile = abreast.Kernel.compile, hold

def problem(gate):
    q, k, v = (torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16) for _ in range(3))
    g = torch.zeros(1, 1, 64, 16) if gate else None
    return Launch(q, k, v, g, None, 0.5, False), torch.zeros(1, 1, 16, 16)

def pending():
    return len(abreast._behind)
"""

GRADIENTS = """
problem_, memory = problem(False)
with abreast.compiling():
    problem_.trial(memory, None, torch.bfloat16, True)
print("behind", pending())
o, mass, after, sums, starts, start_sums = problem_.forward(memory, None, torch.bfloat16)
print("forward", len(launched), pending())
backward = lambda: problem_.backward(o, None, after, None, memory, None, starts, start_sums)
waits = threading.Thread(target=backward)
waits.start()
waits.join(0.3)
print("waits", waits.is_alive(), len(launched))
held.set()
waits.join(30)
print("backward", waits.is_alive(), len(launched), pending())
print("twice", len(made) - len(set(made)))
"""


def in_process(tmp_path, body: str, *given: str, before: str | None = "") -> dict[str, list[str]]:
    """What it prints by first words; kernels are compiled there, and launches are lists; before None: are launches."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", body if before is None else PROCESS + before + body, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=10 * SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def test_gradients_are_compiled_behind_the_forward_pass(tmp_path):
    """Three walks; what launches one waits for that, and compiles none again."""
    found = in_process(tmp_path, GRADIENTS)
    assert found["behind"] == ["3"]
    assert found["forward"] == ["1", "3"]
    assert found["waits"] == ["True", "1"]
    assert found["backward"] == ["False", "4", "0"]
    assert found["twice"] == ["0"]


@pytest.mark.parametrize("flaw", ["later = contextlib.nullcontext", "promise = lambda mode: None"])
def test_a_forward_pass_that_waits_for_gradients_would_be_noticed(tmp_path, flaw):
    """As all of a call once was waited for, by itself or by Triton."""
    before = f"import contextlib\nfrom saccade.scan.kernels import launch as other\nabreast.{flaw}\n"
    before += "other.later = abreast.later\nheld.set()\n"
    found = in_process(tmp_path, GRADIENTS, before=before)
    assert found["behind"] == ["0"]


FAILS = """
problem_, memory = problem(False)
with abreast.compiling():
    problem_.trial(memory, None, torch.bfloat16, True)
o, mass, after, sums, starts, start_sums = problem_.forward(memory, None, torch.bfloat16)

def backward():
    try:
        problem_.backward(o, None, after, None, memory, None, starts, start_sums)
    except RuntimeError as error:
        return str(error)

told = []
waits = threading.Thread(target=lambda: told.append(backward()))
waits.start()
waits.join(0.3)
print("forward", len(launched), *told)
failing.append(1)
held.set()
waits.join(30)
print("told", *told)
print("again", backward())
failing.clear()
print("then", backward(), len(launched))
"""


def test_a_kernel_that_fails_behind_says_so_to_who_waits_for_it_and_is_tried_again(tmp_path):
    found = in_process(tmp_path, FAILS)
    assert found["forward"] == ["1"]
    assert found["told"] == ["broken", "behind"]
    assert found["again"] == ["no", "assembler"]  # not what it once failed of
    assert found["then"] == ["None", "4"]


ENDS = """
problem_, memory = problem(False)
with abreast.compiling():
    problem_.trial(memory, None, torch.bfloat16, True)
threading.Timer(0.5, held.set).start()
print("ends", pending())
"""


def test_a_program_ends_while_kernels_are_compiled(tmp_path):
    assert in_process(tmp_path, ENDS)["ends"] == ["3"]


STEEP = """
given, asked = dict(needed=False, recording=False), []
torch.cuda.is_current_stream_capturing = lambda: given["recording"]
Prepared.any_steep = lambda self: asked.append(1) or given["needed"]
problem_, memory = problem(True)
forward = lambda: problem_.forward(memory, None, torch.bfloat16)
with abreast.compiling():
    problem_.trial(memory, None, torch.bfloat16, False)
forward()
print("spared", *launched, len(asked), pending())
launched.clear()
given[sys.argv[1]] = True
waits = threading.Thread(target=forward)
waits.start()
waits.join(0.3)
print("waits", *launched, waits.is_alive(), len(asked))
held.set()
waits.join(30)
print("launched", *launched, len(asked), pending())
launched.clear()
given["needed"] = False
forward()
print("after", *launched, len(asked))
print("twice", len(made) - len(set(made)))
"""


@pytest.mark.parametrize("why", ["needed", "recording"])
def test_who_does_not_need_a_kernel_does_not_wait_for_it(tmp_path, why):
    """While it is compiled calls ask, unless a graph is recorded; then it is launched and nobody asks."""
    found = in_process(tmp_path, STEEP, why)
    assert found["spared"] == ["prepare_tokens", "made", "1", "1"]
    assert found["waits"] == ["prepare_tokens", "True", "2" if why == "needed" else "1"]
    assert found["launched"] == ["prepare_tokens", "mixed", "made", "2" if why == "needed" else "1", "0"]
    assert found["after"] == ["prepare_tokens", "mixed", "made", "2" if why == "needed" else "1"]
    assert found["twice"] == ["0"]


def walked(gate: int, strong: list[tuple[int, int]], *, spare: bool) -> tuple[list[torch.Tensor], list[str]]:
    """Outputs and gradients under a gate, see `Sizes.of`, and walks launched; strong: (head, token) where it is so.

    spare: as while kernels of steep chunks are compiled.
    """
    make = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 150, 16, generator=make).half() for _ in range(4))
    g = -torch.rand(1, 2, 150, 16, generator=make) / 8
    for head, token in strong:
        g[0, head, token, 3] = -80
    g = g[..., 3] if gate == 1 else g
    problem, memory = Launch(q, k, v, g, None, 0.5, False), torch.randn(1, 2, 16, 16, generator=make)
    splits, get = [], Launched.__getitem__

    def noted(kernel, grid):
        return lambda *given, **options: (splits.append(options.get("SPLIT")), get(kernel, grid)(*given, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launched, "__getitem__", noted)
        if spare:
            patch.setattr(abreast, "_behind", {object()})
            patch.setattr(abreast, "is_pending", lambda kernel: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            patch.setattr(Launched, "warmup", lambda self, grid: lambda *given, **options: None)
        o, _, after, _, starts, sums = problem.forward(memory, None, torch.float16)
        found = problem.backward(do, None, torch.ones_like(after), None, memory, None, starts, sums)
    return [o, after, *(x for x in found if x is not None)], splits


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("strong", [[], [(0, 0)], [(1, 149)], [(1, 64)]])
def test_walks_that_are_spared_have_nothing_to_do(gate, strong):
    """The same bits, with one chunk that is steep, wherever it is, and without."""
    whole, every = walked(gate, strong, spare=False)
    found, some = walked(gate, strong, spare=True)
    assert all(map(torch.equal, whole, found))
    assert every.count("mixed") == every.count("made") > 3
    assert some.count("mixed") == (every.count("mixed") if strong else 0)
    assert some.count("made") == every.count("made")


@pytest.mark.parametrize("gate", [1, 2])
def test_a_walk_that_is_spared_wrongly_would_be_noticed(monkeypatch, gate):
    """Its outputs are not written, and what is there may be too great for the interpreter."""
    monkeypatch.setattr(Prepared, "any_steep", lambda self: False)
    with pytest.raises((AssertionError, InterpreterError)):
        test_walks_that_are_spared_have_nothing_to_do(gate, [(1, 64)])


@pytest.mark.parametrize(
    ("sums", "steep"),
    [
        ([0.0, -30, -59], False),
        ([0.0, -30, -60], True),
        ([0.0, 50, -20], True),  # the second half alone, behind gates that are not decays
        ([50.0, 60, 5], False),
        ([0.0, float("nan"), 0], True),
    ],
)
def test_sums_of_gates_tell_what_is_never_steep(sums, steep):
    x = torch.zeros(1, 1, 3, 1)
    assert Prepared(x, x, x, x, torch.tensor([[sums]]), None).any_steep() == steep


GRAPH = """
import torch
from saccade.scan import linear_attention
from saccade.scan.kernels import abreast
q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
g = -torch.rand(1, 4, 512, 64, device="cuda") / 16
q.requires_grad_()
first = linear_attention(q, k, v, log_decay=g)
before, graph = len(abreast._behind), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    recorded = linear_attention(q, k, v, log_decay=g)
graph.replay()
print("pending", before > 0)
print("same", torch.equal(recorded, first))
g[..., 100:140, 3] = -20
graph.replay()
steep = linear_attention(q, k, v, log_decay=g)
print("steep", torch.equal(recorded, steep), not torch.equal(steep, first))
print("gradient", *torch.autograd.grad(steep.sum(), q)[0].isfinite().all().reshape(1).tolist())
"""


@pytest.mark.gpu
def test_a_graph_is_recorded_while_kernels_are_compiled(tmp_path):
    """With the walk of steep chunks, which the call before it did not launch; other kernels are loaded meanwhile."""
    found = in_process(tmp_path, GRAPH, before=None)
    assert found == {"pending": ["True"], "same": ["True"], "steep": ["True", "True"], "gradient": ["True"]}
