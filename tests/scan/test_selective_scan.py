"""The selective scan against the recurrence one token at a time; numerical traps and memory by name."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.scan.selective_scan import Recurrence, selective_scan
from saccade.scan.state import State
from saccade.testing.budget import assert_close

module = importlib.import_module("saccade.scan.selective_scan")  # the name in the package is the function

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")


def recurrence(x, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None, softplus=False):
    """Equation (2) of the paper, token by token; returns outputs and the last state."""
    length, channels = x.shape[1:]
    if delta_bias is not None:
        delta = delta + delta_bias
    if softplus:
        delta = (1 + delta.exp()).log()
    if B.ndim == 4:
        B, C = (t.repeat_interleave(channels // t.shape[2], 2) for t in (B, C))
    else:
        B, C = (t.unsqueeze(2).expand(-1, -1, channels, -1) for t in (B, C))
    h = torch.zeros_like(x[:, 0, :, None] * A * B[:, 0] * C[:, 0]) if h0 is None else h0
    rows = []
    for t in range(length):
        h = torch.exp(delta[:, t, :, None] * A) * h + delta[:, t, :, None] * B[:, t] * x[:, t, :, None]
        y = (C[:, t] * h).sum(-1)
        y = y.real if y.is_complex() else y
        y = y if D is None else y + D * x[:, t]
        rows.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(rows, 1), h


def draw(length, *, batch=2, channels=6, size=3, groups=0, complex_states=False):
    """All arguments, random, by name; h0 is the state before."""

    def normal(*shape, wanted=complex_states):
        return torch.randn(*shape, dtype=torch.complex128 if wanted else torch.float64)

    inner = (groups, size) if groups else (size,)
    rate = -torch.rand(channels, size).double() - 0.1
    return {
        "x": normal(batch, length, channels, wanted=False),
        "delta": torch.rand(batch, length, channels).double(),
        "A": torch.complex(rate, torch.randn(channels, size).double()) if complex_states else rate,
        "B": normal(batch, length, *inner),
        "C": normal(batch, length, *inner),
        "D": normal(channels, wanted=False),
        "z": normal(batch, length, channels, wanted=False),
        "delta_bias": torch.rand(channels).double(),
        "h0": normal(batch, channels, size),
    }


def cast(tensor, dtype):
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def fast(h0=None, softplus=False, chunk=64, **given):
    state = None if h0 is None else State(h0.unsqueeze(-1))
    y, after = selective_scan(**given, state=state, return_state=True, delta_softplus=softplus, chunk=chunk)
    return y, after.memory.squeeze(-1)


def run(function, given, cotangents):
    """Outputs, last state, and the gradient of every argument, as real tensors."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    outputs = function(**leaves)
    total = sum((o * cast(c, o.dtype.to_real())).real.sum() for o, c in zip(outputs, cotangents, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    results = dict(zip(("y", "state", *given), (*(o.detach() for o in outputs), *gradients), strict=True))
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in results.items()}


def verify(given, **options):
    """Values and gradients, float64 against the loop, float32 against what the loop errs in float32."""
    exact_options = {k: v for k, v in options.items() if k != "chunk"}
    cotangents = [torch.randn_like(o) for o in recurrence(**given, **exact_options)]
    exact = run(lambda **g: recurrence(**g, **exact_options), given, cotangents)
    scale = max(float(t.abs().max()) for t in exact.values())
    # The gradient of A sums over samples and pairs of tokens, those of B and C over channels.
    terms = given["x"].numel() * given["A"].shape[1]
    for dtype in (torch.float64, torch.float32):
        narrow = {name: cast(t, dtype) for name, t in given.items()}
        actual = run(lambda **g: fast(**g, **options), narrow, cotangents)
        eager = run(lambda **g: recurrence(**g, **exact_options), narrow, cotangents)
        for name, t in exact.items():
            assert actual[name].dtype == dtype
            assert_close(actual[name], t, eager[name], name=f"{name} in {dtype}", terms=terms, scale=scale)


@pytest.mark.parametrize("length", [1, 2, 7, 13])
@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_recurrence(length, chunk):
    verify(draw(length), chunk=chunk)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups):
    verify(draw(7, groups=groups), chunk=3)


@pytest.mark.parametrize("groups", [0, 2])
def test_complex_states(groups):
    verify(draw(9, groups=groups, complex_states=True), chunk=4)


def test_complex_rates_with_real_readings_and_the_reverse():
    given = draw(7, complex_states=True)
    for name in ("B", "C"):
        given[name] = given[name].real.clone()
    verify(given, chunk=3)
    given = draw(7, complex_states=True)
    given["A"] = given["A"].real.clone()
    verify(given, chunk=3)


def test_softplus():
    given = draw(7)
    given["delta"] = torch.randn_like(given["delta"])
    verify(given, softplus=True, chunk=3)


def test_only_what_is_needed():
    given = {name: t for name, t in draw(7).items() if name in ("x", "delta", "A", "B", "C")}
    verify(given, chunk=3)
    y = selective_scan(**given)
    assert torch.equal(y, selective_scan(**given, return_state=True)[0])


def test_twins_are_caught(monkeypatch):
    """One wrong step in each place where the two sides could agree by accident."""
    given, original = draw(7), module._chunk
    twins = [
        lambda h, r, x, s, w, c: original(h, r, x, torch.expm1(s), w, c),
        lambda h, r, x, s, w, c: original(h, r, x * (s * r[..., 0]).exp(), s, w, c),
        lambda h, r, x, s, w, c: (
            original(h, r, x, s, w, torch.cat((c[:, 1:], c[:, :1]), 1))[0],
            original(h, r, x, s, w, c)[1],
        ),
        lambda h, r, x, s, w, c: original(torch.zeros_like(h), r, x, s, w, c),
        lambda h, r, x, s, w, c: original(h.detach(), r, x, s, w, c),
    ]
    for twin in twins:
        monkeypatch.setattr(module, "_chunk", twin)
        with pytest.raises(AssertionError, match=r"in torch\.float64"):
            verify(given, chunk=3)


def test_any_chunk_gives_the_same():
    given = draw(29)
    whole, state = fast(**given, chunk=29)
    for chunk in (1, 3, 8, 28, 1000):
        other = fast(**given, chunk=chunk)
        assert_close(other[0], whole, whole, terms=3)
        assert_close(other[1], state, state, terms=3)


def parts(given, start, stop):
    return {name: t[:, start:stop] if t.ndim > 2 and name != "h0" else t for name, t in given.items() if name != "h0"}


def test_a_sequence_may_be_cut_anywhere():
    given = draw(9)
    whole, last = selective_scan(**parts(given, 0, 9), return_state=True)
    for cut in range(1, 9):
        first, state = selective_scan(**parts(given, 0, cut), return_state=True)
        second, after = selective_scan(**parts(given, cut, 9), state=state, return_state=True)
        joined = torch.cat((first, second), 1)
        assert_close(joined, whole, whole, terms=9)
        assert_close(after.memory, last.memory, last.memory, terms=9)
        assert_close(after.transition, last.transition, last.transition, terms=9)


def test_decoding_one_token_at_a_time():
    given, state, rows = draw(9), None, []
    whole = selective_scan(**parts(given, 0, 9))
    for t in range(9):
        y, state = selective_scan(**parts(given, t, t + 1), state=state, return_state=True)
        rows.append(y)
    assert_close(torch.cat(rows, 1), whole, whole, terms=9)


@pytest.mark.parametrize("complex_states", [False, True])
def test_stretches_scanned_apart_compose(complex_states):
    given = draw(13, complex_states=complex_states)
    last = selective_scan(**parts(given, 0, 13), return_state=True)[1]
    states = [selective_scan(**parts(given, a, b), return_state=True)[1] for a, b in ((0, 4), (4, 5), (5, 13))]
    for composed in (
        states[0].compose(states[1]).compose(states[2]),
        states[0].compose(states[1].compose(states[2])),
    ):
        for name in ("memory", "transition"):
            a, t = (getattr(s, name) for s in (composed, last))
            a, t = (torch.view_as_real(x) if complex_states else x for x in (a, t))
            assert_close(a, t, t, name=name, terms=13)


def test_a_state_with_a_shift_is_read_at_its_true_size():
    given = draw(5)
    memory = given["h0"].unsqueeze(-1)
    shift = torch.tensor(1.5, dtype=torch.float64)
    plain = selective_scan(**parts(given, 0, 5), state=State(memory))
    shifted = selective_scan(**parts(given, 0, 5), state=State(memory * (-shift).exp(), shift=shift.view(1, 1, 1, 1)))
    assert_close(shifted, plain, plain, terms=5)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 50.0, 1e4, 1e30])
def test_strong_decays_neither_overflow_nor_give_nan(rate):
    """A chunk's summed decay passes exp's range in float32 by far; factored forms would divide by zero here."""
    given = {name: t.float() for name, t in draw(67).items() if name in ("x", "delta", "A", "B", "C")}
    given["A"] = given["A"] * rate
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    y, state = selective_scan(**leaves, return_state=True)
    for t in (y, state.memory, *torch.autograd.grad(y.square().sum(), list(leaves.values()))):
        assert bool(t.isfinite().all())
    exact = recurrence(**{name: t.detach().double() for name, t in given.items()})[0]
    eager = recurrence(**{name: t.detach() for name, t in given.items()})[0]
    assert_close(y.detach(), exact, eager, terms=67)


def test_a_step_of_zero_keeps_the_state_and_a_huge_one_forgets_it():
    given = {name: t for name, t in draw(5).items() if name in ("x", "delta", "A", "B", "C", "h0")}
    _, kept = fast(**{**given, "delta": torch.zeros_like(given["delta"])})
    assert torch.equal(kept, given["h0"])
    huge = {**given, "delta": torch.full_like(given["delta"], 1e6), "x": torch.zeros_like(given["x"])}
    assert not fast(**huge)[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    given = {name: t.to(dtype) for name, t in draw(65).items() if name != "h0"}
    y, state = selective_scan(**given, return_state=True)
    assert y.dtype == dtype
    assert state.memory.dtype == state.transition.dtype == torch.float32
    single, single_state = selective_scan(**{name: t.float() for name, t in given.items()}, return_state=True)
    assert torch.equal(y, single.to(dtype))
    assert torch.equal(state.memory, single_state.memory)


def test_a_changed_future_leaves_the_past_bitwise_alone():
    given = draw(13)
    before = fast(**given, chunk=4)[0]
    for t in range(1, 13):
        changed = {**given, "x": given["x"].clone()}
        changed["x"][:, t:] = math.nan
        after = fast(**changed, chunk=4)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert bool(after[:, t:].isnan().all())


def test_nan_stays_in_its_channel_and_sample():
    given = draw(9)
    before = fast(**given, chunk=4)[0]
    given["x"][1, 3, 2] = math.nan
    after = fast(**given, chunk=4)[0]
    assert bool(after[1, 3:, 2].isnan().all())
    after[1, 3:, 2] = before[1, 3:, 2]
    assert torch.equal(after, before)


def test_strided_input():
    given = draw(9)
    strided = {
        name: t.repeat_interleave(2, -1)[..., ::2] if name != "x" else t.transpose(1, 2).contiguous().transpose(1, 2)
        for name, t in given.items()
    }
    assert not any(t.is_contiguous() for t in strided.values())
    for actual, exact in zip(fast(**strided, chunk=4), fast(**given, chunk=4), strict=True):
        assert_close(actual, exact, exact, terms=9)


def test_gradients_by_finite_differences():
    given = draw(5, batch=1, channels=2, size=2)
    given["delta"] = given["delta"] + 0.1
    leaves = [t.requires_grad_() for t in given.values()]
    assert torch.autograd.gradcheck(lambda *t: fast(**dict(zip(NAMES, t, strict=True)), chunk=2), leaves)
    for reverse in (False, True):
        for dtype in (torch.float64, torch.complex128):
            tensors = [torch.randn(1, 4, 2, dtype=dtype) / 2 for _ in range(2)] + [torch.randn(1, 2, dtype=dtype)]
            tensors = [t.requires_grad_() for t in tensors]
            assert torch.autograd.gradcheck(lambda *t, r=reverse: Recurrence.apply(*t, r), tensors)
            assert torch.autograd.gradgradcheck(lambda *t, r=reverse: Recurrence.apply(*t, r), tensors)


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return result


@pytest.mark.parametrize("length", [64, 256])
def test_memory_is_that_of_one_chunk(length):
    """Forward and backward hold a few expanded chunks, and one state for each chunk, but never all of (N, C, S)."""
    channels, size, chunk = 4, 32, 8
    given = {
        name: t.requires_grad_()
        for name, t in draw(length, batch=1, channels=channels, size=size).items()
        if name in ("x", "delta", "A", "B", "C")
    }
    with Live() as live:
        selective_scan(**given, chunk=chunk).sum().backward()
    item = 8
    expanded = item * channels * size
    tokens = item * length * (channels + size)
    assert live.most <= 10 * chunk * expanded + 3 * (length // chunk) * expanded + 6 * tokens
    assert live.most >= chunk * expanded


def test_bad_input():
    given = {name: t for name, t in draw(5).items() if name != "h0"}

    def expect(error, match, **changed):
        with pytest.raises(error, match=match):
            selective_scan(**{**given, **changed})

    expect(TypeError, "x: got list; pass a floating-point tensor", x=[1.0])
    expect(TypeError, r"delta: got torch\.int64; pass a floating-point tensor", delta=given["delta"].long())
    expect(TypeError, r"B: got torch\.int64; pass a floating-point or complex tensor", B=given["B"].long())
    expect(TypeError, r"z: got torch\.complex128; pass a floating-point tensor", z=given["z"] + 0j)
    expect(ValueError, "C: got device meta beside x on cpu", C=given["C"].to("meta"))
    expect(ValueError, r"x: got shape \(5, 6\); pass \(batch, tokens, channels\)", x=given["x"][0])
    expect(ValueError, r"x: got shape \(2, 0, 6\)", x=given["x"][:, :0])
    expect(ValueError, r"A: got shape \(5, 3\); pass \(6, S\)", A=given["A"][:5])
    expect(ValueError, r"delta: got shape \(2, 4, 6\); pass that of x, \(2, 5, 6\)", delta=given["delta"][:, 1:])
    expect(ValueError, r"z: got shape \(2, 5, 1\); pass that of x", z=given["z"][..., :1])
    expect(ValueError, r"D: got shape \(5,\); pass \(6,\)", D=given["D"][:5])
    expect(ValueError, r"delta_bias: got shape \(1,\); pass \(6,\)", delta_bias=given["delta_bias"][:1])
    expect(ValueError, r"B: got shape \(2, 5, 2\); pass \(2, 5, 3\)", B=given["B"][..., :2])
    expect(ValueError, r"C: got shape \(2, 5, 2, 3\); pass \(2, 5, 3\)", C=draw(5, groups=2)["C"])
    expect(ValueError, r"C: got shape \(2, 5, 3\); pass \(2, 5, 2, 3\)", B=draw(5, groups=2)["B"])
    expect(
        ValueError, "B: got 4 groups for 6 channels; pass a divisor", B=draw(5, groups=4)["B"], C=draw(5, groups=4)["C"]
    )
    expect(ValueError, r"state: got a memory \(2, 6, 2, 1\); pass \(2, 6, 3, 1\)", state=State(torch.zeros(2, 6, 2, 1)))
    expect(ValueError, r"A: got a real part of .*; states must decay, so pass -exp\(A_log\)", A=-given["A"])
    expect(ValueError, "chunk: got 0; pass an integer >= 1", chunk=0)
    expect(TypeError, "chunk: got 2.5", chunk=2.5)


@pytest.mark.parametrize("complex_states", [False, True])
def test_second_gradients_over_several_chunks(complex_states):
    wide = torch.complex128 if complex_states else torch.float64
    rates = -torch.rand(2, 2, dtype=torch.float64) - 0.1
    if complex_states:
        rates = torch.complex(rates, torch.randn(2, 2, dtype=torch.float64))
    x, step = torch.randn(1, 5, 2, dtype=torch.float64), torch.rand(1, 5, 2, dtype=torch.float64) + 0.1
    write, read, memory = (torch.randn(*size, dtype=wide) / 2 for size in ((1, 5, 2), (1, 5, 2), (1, 2, 2, 1)))
    leaves = [t.requires_grad_() for t in (x, step, rates, write, read, memory)]

    def function(*given):
        y, state = selective_scan(*given[:5], state=State(given[5]), return_state=True, chunk=2)
        return y, state.memory

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_autocast_changes_nothing():
    given = [torch.randn(1, 9, 4), torch.rand(1, 9, 4), -torch.rand(4, 3), torch.randn(1, 9, 3), torch.randn(1, 9, 3)]
    plain = selective_scan(*given, chunk=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(*given, chunk=4), plain)


def test_documentation_runs():
    assert doctest.testmod(module) == (0, 3)
