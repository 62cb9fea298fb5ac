"""The monoid of stretches: associative, with a unit, and the same as applying maps one after the other."""

from __future__ import annotations

import dataclasses
import doctest
import pickle

import pytest
import torch
from recurrences import draw

from saccade.scan import state
from saccade.scan.state import UNTRACKED, Matrix, State, Untracked, chain
from saccade.testing.budget import assert_close

KINDS = ["none", "scalar", "vector", "matrix"]


def make(kind, seed, shift=False, batch=2, dtype=torch.float64):
    """A random state whose transition is of `kind`, memory (batch, 3, 5, 4)."""
    transition = {
        "none": None,
        "scalar": -draw(batch, 3, 1, 1, seed=seed + 1, dtype=dtype).exp(),
        "vector": -draw(batch, 3, 5, 1, seed=seed + 1, dtype=dtype).exp(),
        "matrix": Matrix(draw(batch, 3, 5, 5, seed=seed + 1, dtype=dtype)),
    }[kind]
    scale = 3 * draw(batch, 3, 1, 1, seed=seed + 2, dtype=dtype) if shift else None
    return State(draw(batch, 3, 5, 4, seed=seed, dtype=dtype), transition, scale)


def matrix_of(one):
    """The transition as a plain matrix."""
    eye = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    if one.transition is None:
        return eye
    return one.transition.value if isinstance(one.transition, Matrix) else eye * one.transition.exp()


def added(one):
    return one.memory if one.shift is None else one.memory * one.shift.exp()


def same(a, b, terms=5):
    """Equal as maps: same transition, same true memory, up to rounding."""
    for x, y in ((added(a), added(b)), (matrix_of(a), matrix_of(b))):
        assert_close(x, y, y, terms=terms, scale=float(y.abs().max()))


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("shifts", [(False, False), (True, False), (False, True), (True, True)])
def test_compose_is_one_map_after_the_other(first, second, shifts):
    a, b = make(first, 10, shifts[0]), make(second, 20, shifts[1])
    whole = a.compose(b)
    memory = matrix_of(b) @ added(a) + added(b)
    assert_close(added(whole), memory, memory, terms=25, scale=float(memory.abs().max()))
    product = matrix_of(b) @ matrix_of(a)
    assert_close(matrix_of(whole), product, product, terms=25)


@pytest.mark.parametrize(
    "kinds", [("none", "scalar", "vector"), ("matrix", "scalar", "matrix"), ("vector", "matrix", "none")]
)
@pytest.mark.parametrize("shift", [False, True])
def test_compose_is_associative(kinds, shift):
    a, b, c = (make(kind, 10 * i, shift) for i, kind in enumerate(kinds))
    same(a.compose(b).compose(c), a.compose(b.compose(c)), terms=125)


def test_compose_is_not_commutative():
    a, b = make("matrix", 10), make("scalar", 20)
    with pytest.raises(AssertionError, match="max error"):
        same(a.compose(b), b.compose(a))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
def test_identity(kind, shift):
    one = make(kind, 30, shift)
    if shift:
        # A unit with the scale 1 would erase memories that lie far below it.
        one = dataclasses.replace(one, shift=one.shift - 2000)
    for whole in (one.identity().compose(one), one.compose(one.identity())):
        assert torch.equal(whole.memory, one.memory)
        assert (whole.shift is None) == (not shift)
        assert not shift or torch.equal(whole.shift, one.shift)
        assert torch.equal(matrix_of(whole), matrix_of(one))
    nothing = one.identity().compose(one.identity())
    assert not nothing.memory.any()
    assert nothing.memory.isfinite().all()


def test_a_reset_forgets_and_has_finite_gradients():
    memory, decay = draw(1, 1, 5, 4).requires_grad_(), torch.full((1, 1, 1, 1), -torch.inf).double().requires_grad_()
    later = State(draw(1, 1, 5, 4, seed=1), decay)
    whole = State(memory, decay).compose(later)
    assert torch.equal(whole.memory, later.memory)
    assert whole.transition.item() == -torch.inf
    whole.memory.sum().backward()
    assert not memory.grad.any()
    assert not decay.grad.any()


def test_shifts_far_apart_do_not_overflow():
    a, b = make("scalar", 40), make("scalar", 50)
    a, b = (dataclasses.replace(s, shift=torch.full((2, 3, 1, 1), x).double()) for s, x in ((a, 5000.0), (b, -5000.0)))
    assert torch.equal(a.compose(b).shift, a.shift)
    assert_close(a.compose(b).memory, b.transition.exp() * a.memory, b.transition.exp() * a.memory)
    assert torch.equal(b.compose(a).memory, a.memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
def test_unbind_and_cat_are_inverse(kind, shift):
    one = make(kind, 60, shift)
    parts = one.unbind()
    assert [p.memory.shape[0] for p in parts] == [1, 1]
    back = State.cat(parts)
    assert torch.equal(back.memory, one.memory)
    assert torch.equal(matrix_of(back), matrix_of(one))
    assert not shift or torch.equal(back.shift, one.shift)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
def test_untracked_states_are_gone_on_from_only(kind, shift, tmp_path):
    """What comes before another stretch may be untracked, and stays so; what comes after may not."""
    one, then = make(kind, 60, shift), make("scalar", 20, shift)
    lean = one.untracked()
    assert (one.tracked, lean.tracked) == (True, False)
    whole, after = one.compose(then), lean.compose(then)
    assert torch.equal(added(after), added(whole))
    assert not after.tracked
    assert not lean.compose(lean.identity()).tracked
    with pytest.raises(ValueError, match="later: got an untracked state"):
        then.compose(lean)
    parts = lean.unbind()
    assert not any(part.tracked for part in parts)
    lean.save(tmp_path / "state", mechanism="lean")
    back = State.load(tmp_path / "state", mechanism="lean", like=lean)
    for other in (
        State.cat(parts),
        back,
        lean.fork(),
        lean.detach(),
        lean.to(torch.float64),
        pickle.loads(pickle.dumps(lean)),
    ):
        assert isinstance(other.transition, Untracked)
        assert torch.equal(added(other), added(one))
    with pytest.raises(ValueError, match="like: state"):
        State.load(tmp_path / "state", mechanism="lean", like=one)
    if kind != "none":
        assert lean.nbytes == one.nbytes - (one.transition.value if kind == "matrix" else one.transition).nbytes


def test_an_untracked_transition_taken_for_none_is_caught(monkeypatch):
    """The twin: a state that says nothing composed as if it changed nothing."""
    monkeypatch.setattr(State, "tracked", True)
    monkeypatch.setattr(state, "_apply", lambda transition, memory: memory)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_compose_refuses_what_is_untracked()


def test_compose_refuses_what_is_untracked():
    one = make("matrix", 10)
    with pytest.raises(ValueError, match="later: got an untracked state"):
        one.compose(one.untracked())
    assert chain(one.transition, UNTRACKED) == UNTRACKED == chain(UNTRACKED, None)


def test_complex_memories_compose():
    a, b = (
        State(
            torch.complex(draw(2, 3, seed=i), draw(2, 3, seed=i + 1)),
            torch.complex(-draw(2, 3, seed=i + 2).exp(), draw(2, 3)),
        )
        for i in (0, 10)
    )
    whole = a.compose(b)
    assert torch.equal(whole.memory, b.transition.exp() * a.memory + b.memory)
    assert torch.equal(whole.transition, a.transition + b.transition)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_and_to(kind):
    one = make(kind, 70, shift=True)
    one = State(one.memory.requires_grad_(), one.transition, one.shift)
    cut = one.compose(one).detach()
    assert not cut.memory.requires_grad
    narrow = cut.to(torch.float32)
    assert {narrow.memory.dtype, narrow.shift.dtype} == {torch.float32}
    if kind != "none":
        value = narrow.transition.value if kind == "matrix" else narrow.transition
        assert value.dtype == torch.float32
    with pytest.raises(TypeError, match=r"memory: got dtype torch\.bfloat16"):
        cut.to(torch.bfloat16)


def test_pickles():
    one = make("matrix", 80, shift=True)
    same(pickle.loads(pickle.dumps(one)), one)


ERRORS = [
    (lambda: State(torch.zeros(2, 3, dtype=torch.bfloat16)), TypeError, "memory: got dtype torch.bfloat16"),
    (lambda: State(torch.zeros(2)), ValueError, r"memory: got shape \(2,\)"),
    (lambda: State(torch.zeros(5, 4), torch.zeros(3, 1)), ValueError, r"transition: got shape \(3, 1\)"),
    (lambda: State(torch.zeros(5, 4), Matrix(torch.zeros(4, 4))), ValueError, r"transition: got shape \(4, 4\)"),
    (lambda: State(torch.zeros(5, 4), torch.zeros(1, 5, 1)), ValueError, r"transition: got shape \(1, 5, 1\)"),
    (lambda: State(torch.zeros(5, 4), shift=torch.zeros(3, 1)), ValueError, r"shift: got shape \(3, 1\)"),
    (lambda: State(torch.zeros(5, 4)).compose(State(torch.zeros(5, 3))), ValueError, r"later: got a memory \(5, 3\)"),
    (lambda: State.cat([]), ValueError, "states: got 0"),
    (lambda: State.cat([make("none", 0), make("scalar", 0)]), ValueError, "states: got 2 with parts of 2 kinds"),
    (
        lambda: State.cat([make("none", 0), make("none", 0).untracked()]),
        ValueError,
        "states: got 2 with parts of 2 kinds",
    ),
    (
        lambda: State(torch.zeros(4, 4), torch.zeros(4, 4)).compose(State(torch.zeros(4, 4), Matrix(torch.eye(4)))),
        ValueError,
        "transition: a log decay .* that differs between the columns",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_examples():
    assert doctest.testmod(state).attempted
    assert not doctest.testmod(state).failed
