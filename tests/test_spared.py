"""What is left out of torch and Triton is of no account: no assertion, no graph and no launch depends on it."""

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch._dynamo.testing import CompileCounter
from triton.runtime import interpreter

import spared


def doubled(x_ptr):
    place = x_ptr + tl.arange(0, 2)
    x = tl.load(place)
    tl.store(place, x + x)


def summed(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 2))
    tl.store(x_ptr, twice(tl.sum(twice(x), 0)))


def twice(x):
    return x + x


twice = interpreter.InterpretedFunction(twice)


def run(kernel, *numbers):
    x = torch.tensor(numbers, dtype=torch.int32)
    interpreter.InterpretedFunction(kernel)[(1,)](x)
    return x.tolist()


@pytest.mark.parametrize("latency", [0.0, 1e9])
def test_how_long_guards_take_decides_nothing(latency, monkeypatch):
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: latency)
    torch.compiler.reset()
    compiled, graphs = torch.compile(lambda x: 2 * x, backend=(counter := CompileCounter())), []
    for size in (3, 3, 4, 5):
        assert compiled(torch.ones(size)).tolist() == [2.0] * size
        graphs.append(counter.frame_count)
    torch.compiler.reset()
    assert graphs == [1, 1, 2, 2]  # guards hold, fail, and hold for a size of any kind


@pytest.mark.parametrize("looked_for", [False, True])
def test_overflows_that_are_looked_for_are_told_to_no_one(looked_for, monkeypatch):
    builder = interpreter.interpreter_builder
    changed = {**vars(builder.options), "sanitize_overflow": looked_for}
    monkeypatch.setattr(builder, "options", type(builder.options)(**changed))
    assert run(doubled, 2**31 - 1, 3) == [-2, 6]


def test_who_debugs_is_told_of_overflows(monkeypatch):
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", type(builder.options)(debug=True))
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang)
    spared.interpreter(interpreter)
    with pytest.raises(interpreter.InterpreterError, match="overflow"):
        run(doubled, 2**31 - 1, 3)


def test_the_language_is_prepared_once_a_launch_and_module():
    prepared = []

    def prepare(fn):
        prepared.append(fn)
        return SimpleNamespace(restore=lambda: prepared.append("restored"))

    once = spared.once_a_launch(prepare)
    other = SimpleNamespace(__globals__={})
    for _ in range(2):
        launch = once(doubled)
        for inner in (twice.fn, other, twice.fn, other):
            once(inner)
        launch.restore()
    assert prepared == [doubled, other, "restored"] * 2


@pytest.mark.parametrize("spare", [False, True])
def test_a_launch_leaves_the_language_as_it_was(spare, monkeypatch):
    own = getattr(interpreter._patch_lang, "__wrapped__", interpreter._patch_lang)
    monkeypatch.setattr(interpreter, "_patch_lang", spared.once_a_launch(own) if spare else own)
    before = dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))
    for _ in range(2):
        assert run(summed, 3, 4) == [28, 4]
        assert (dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))) == before
