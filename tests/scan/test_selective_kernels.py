"""The kernels of the selective scan against the recurrence token by token, values and every gradient.

On a CPU they run in Triton's interpreter, with tiles so small that a short sequence has many, and of several blocks of
channels; on a GPU with their own.
"""

from __future__ import annotations

import pytest
import torch
from recurrences import verify
from test_selective_scan import recurrence

from saccade.scan import kernels
from saccade.scan.kernels import selective_ops as ops
from saccade.scan.selective_scan import selective_scan
from saccade.scan.state import State

TOKENS = 4  # that a walk unrolls; half as many between marks
WIDE = (torch.float32,)
BOTH = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(ops, "MARKED", TOKENS // 2)
        monkeypatch.setattr(ops, "UNROLLED", TOKENS)
        monkeypatch.setattr(ops, "STATES", 16)
        monkeypatch.setattr(ops, "PULL", ops.Tile(4, 2))


@pytest.fixture
def stretches(monkeypatch):
    monkeypatch.setattr(ops, "LEAST", 1)
    monkeypatch.setattr(ops, "multiprocessors", lambda device: 1000)


def problem(length, *, batch=2, channels=6, size=3, groups=2, scale=1.0, seed=0):
    """x, delta, A, B, C and the state before."""
    torch.manual_seed(seed)
    x, delta = torch.randn(batch, length, channels), scale * torch.rand(batch, length, channels)
    rates = -torch.rand(channels, size) - 0.1
    b, c = torch.randn(2, batch, length, groups, size)
    return [z.double() for z in (x, delta, rates, b, c, torch.randn(batch, channels, size))]


def fast(x, delta, a, b, c, before):
    """Tokens in the dtype that they come in."""
    state = State(before.float().unsqueeze(-1))
    y, after = selective_scan(x, delta, a.float(), b, c, state=state, return_state=True, backend="triton")
    return y, after.memory.squeeze(-1)


def plain(x, delta, a, b, c, before):
    return recurrence(x, delta, a, b, c, h0=before)


@pytest.mark.parametrize("length", [1, TOKENS, 2 * TOKENS + 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_is_the_recurrence(length, groups):
    verify(fast, plain, problem(length, groups=groups), terms=length * 3, dtypes=WIDE)


@pytest.mark.parametrize("size", [1, 5])
def test_states_and_channels_of_any_number(size):
    verify(fast, plain, problem(9, channels=5, size=size, groups=1, batch=1), terms=9 * size, dtypes=WIDE)


@pytest.mark.parametrize("length", [3 * TOKENS, 5 * TOKENS + 3])
@pytest.mark.usefixtures("stretches")
def test_stretches_of_a_sequence_are_joined(length):
    given = problem(length, batch=1)
    assert ops.Shape.of(given[0], given[3]).stretches(given[0].device) > 2
    verify(fast, plain, given, terms=length * 3, dtypes=BOTH)


@pytest.mark.usefixtures("stretches")
def test_strong_decays_stay_finite():
    """Of a state nothing is left, or all: exp(-1e4) and exp(0)."""
    for scale in (1e4, 0.0):
        given = problem(11, batch=1, scale=scale)
        verify(fast, plain, given, terms=11 * 3, dtypes=WIDE)


def shifted(x, delta, a, b, c, before):
    """A twin that writes a token late."""
    return fast(torch.cat([x[:, :1], x[:, :-1]], 1), delta, a, b, c, before)


def blended(x, delta, a, b, c, before):
    """A twin that gives channels the other group's readings."""
    return fast(x, delta, a, b, c.flip(2), before)


@pytest.mark.parametrize("twin", [shifted, blended])
def test_wrong_twins_are_caught(twin):
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(twin, plain, problem(9), terms=27, dtypes=WIDE)


@pytest.mark.parametrize("which", range(6))
def test_a_wrong_gradient_is_caught(which, monkeypatch):
    backward = ops.selective_backward

    def off(*given):
        found = list(backward(*given))
        found[which] = found[which] * 1.01
        return tuple(found)

    monkeypatch.setattr(ops, "selective_backward", off)
    with pytest.raises(AssertionError, match=f"gradient {which}"):
        verify(fast, plain, problem(9), terms=27, dtypes=WIDE)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("wide", [False, True])
def test_operator_is_well_formed(wide):
    """Also where each tensor has a dtype of its own."""
    x, delta, a, b, c, before = (z.float() for z in problem(TOKENS + 1, batch=1, channels=4))
    given = [z.requires_grad_() for z in (x.bfloat16(), delta, a, b.half(), c.bfloat16(), before)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.selective.overload, (*given, wide), test_utils=checks)
    y, after, starts = ops.selective(*given, wide)
    assert y.dtype == (torch.float32 if wide else torch.bfloat16)
    found = ops.selective_backward(torch.ones_like(y), after, *given, starts)
    assert [z.dtype for z in found] == [z.dtype for z in given]
    torch.library.opcheck(
        ops.selective_backward.overload,
        (torch.ones_like(y), after, *given, starts),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_rest_of_the_layer_is_the_same():
    """The direct term, the gate, bias and softplus stand outside of the kernel."""
    x, delta, a, b, c, _ = (z.float() for z in problem(9))
    more = {"D": torch.randn(6), "z": torch.randn_like(x), "delta_bias": torch.randn(6), "delta_softplus": True}

    def call(backend):
        return lambda *given: [selective_scan(*given, **more, backend=backend)]

    def wide(*given):
        said = {k: v.to(given[0].dtype) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
        return [selective_scan(*given, **said, backend="chunked")]

    verify(call("triton"), wide, [z.double() for z in (x, delta, a, b, c)], terms=27, dtypes=WIDE)


def test_what_cannot_run_says_so():
    x, delta, a, b, c, _ = problem(5)
    with pytest.raises(
        ValueError, match="backend: got 'triton', which cannot run this: it computes in at most float32"
    ):
        selective_scan(x, delta, a, b, c, backend="triton")
    x, delta, a, b, c = (z.float() for z in (x, delta, a, b, c))
    with pytest.raises(ValueError, match="its states are real"):
        selective_scan(x, delta, a + 0j, b, c, backend="triton")
    with pytest.raises(ValueError, match="backend"):
        selective_scan(x, delta, a, b, c, backend="cuda")
    assert kernels.selective_reasons(x, False) == []


def on_gpu(call):
    def run(*given):
        return [z.cpu() for z in call(*(z.cuda() for z in given))]

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "size", "groups"), [(96, 16, 1), (64, 64, 2), (40, 5, 1)])
@pytest.mark.parametrize("length", [301, 4100])
def test_compiled(dtype, channels, size, groups, length):
    given = problem(length, channels=channels, size=size, groups=groups)
    verify(on_gpu(fast), on_gpu(plain), given, terms=length * size, dtypes=(dtype,))
