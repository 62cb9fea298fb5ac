"""The kernels of the selective scan against the recurrence token by token, values and every gradient.

On a CPU they run in Triton's interpreter, with tiles so small that a short sequence has many, and of several blocks of
channels; on a GPU with their own.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from recurrences import verify
from test_selective_scan import recurrence

from saccade.scan import kernels
from saccade.scan.kernels import selective_ops as ops
from saccade.scan.selective_scan import selective_scan
from saccade.scan.state import State
from saccade.testing.budget import assert_close

TOKENS = ops.ROUND
WIDE = (torch.float32,)
BOTH = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(ops, "STATES", 16)
        monkeypatch.setattr(ops, "PULL", ops.Tile(4, 2))


@pytest.fixture
def stretches(monkeypatch):
    monkeypatch.setattr(ops, "LEAST", TOKENS)
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


ALL = ("bias", "softplus", "D", "z")
COMBINATIONS = [("bias",), ("softplus", "D"), ("z",), ("bias", "D", "z"), ("softplus", "z"), ALL]  # of what a block has


def block(tensors, more):
    """The tensors of `problem`, and of a block what is in `more`: bias, D and z, or None for each."""
    x, delta, *rest = tensors
    torch.manual_seed(1)
    if "softplus" in more:  # of either sign, and some that are far from the bend
        delta = torch.randn_like(delta) * torch.linspace(0.5, 6, delta.shape[2], dtype=delta.dtype)
    bias, direct, z = torch.rand(x.shape[2]).double(), torch.randn(x.shape[2]).double(), torch.randn_like(x) * 2
    given = ("bias", bias), ("D", direct), ("z", z)
    return [x, delta, *rest, *(tensor if name in more else None for name, tensor in given)]


def fast_block(more):
    """Everything as the kernels get it, tokens in the dtype that they come in."""

    def call(x, delta, a, b, c, before, bias, direct, z):
        state = State(before.float().unsqueeze(-1))
        options = {"delta_bias": bias, "D": direct, "z": z, "delta_softplus": "softplus" in more}
        options |= {"state": state, "return_state": True, "backend": "triton"}
        y, after = selective_scan(x, delta, a.float(), b, c, **options)
        return y, after.memory.squeeze(-1)

    return call


def plain_block(more):
    def call(x, delta, a, b, c, before, bias, direct, z):
        return recurrence(x, delta, a, b, c, D=direct, z=z, delta_bias=bias, h0=before, softplus="softplus" in more)

    return call


def verify_block(more, tensors, dtypes=WIDE):
    terms = tensors[0].shape[1] * tensors[2].shape[1]
    verify(fast_block(more), plain_block(more), block(tensors, more), terms=terms, dtypes=dtypes)


@pytest.mark.parametrize("length", [1, TOKENS, 2 * TOKENS + 1, 4 * TOKENS])
@pytest.mark.parametrize("groups", [1, 3])
def test_is_the_recurrence(length, groups):
    verify(fast, plain, problem(length, groups=groups), terms=length * 3, dtypes=WIDE)


def from_nothing(x, delta, a, b, c):
    y, after = selective_scan(x, delta, a.float(), b, c, return_state=True, backend="triton")
    return y, after.memory.squeeze(-1)


def verify_from_nothing(before=0.0):
    *given, h0 = problem(4 * TOKENS, batch=1)
    verify(from_nothing, partial(plain, before=torch.full_like(h0, before)), given, terms=4 * TOKENS * 3, dtypes=WIDE)


def test_without_a_state_before():
    verify_from_nothing()
    with pytest.raises(AssertionError, match="output 0"):
        verify_from_nothing(before=0.1)


@pytest.mark.usefixtures("stretches")
def test_stretches_without_a_state_before():
    verify_from_nothing()
    with pytest.raises(AssertionError, match="output 0"):
        verify_from_nothing(before=0.1)


@pytest.mark.parametrize("size", [1, 5])
def test_states_and_channels_of_any_number(size):
    verify(fast, plain, problem(9, channels=5, size=size, groups=1, batch=1), terms=9 * size, dtypes=WIDE)


@pytest.mark.parametrize("length", [3 * TOKENS, 5 * TOKENS + 3])
@pytest.mark.usefixtures("stretches")
def test_stretches_of_a_sequence_are_joined(length):
    given = problem(length, batch=1)
    shape = ops.Shape.of(given[0], given[3])
    assert min(shape.way(given[0].device, False).count, shape.way_back(given[0].device).count) > 2
    verify(fast, plain, given, terms=length * 3, dtypes=BOTH)


named = "-".join


@pytest.mark.parametrize("more", COMBINATIONS, ids=named)
@pytest.mark.parametrize("length", [2 * TOKENS + 1, 3 * TOKENS])
def test_what_a_block_has_besides(more, length):
    """Also beyond the last token, where a bias alone would move states on."""
    verify_block(more, problem(length, batch=1, groups=3))


def test_a_block_in_half_precision():
    verify_block(ALL, problem(2 * TOKENS + 1), (torch.bfloat16,))


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("more", [COMBINATIONS[0], ALL], ids=named)
@pytest.mark.parametrize("length", [2 * TOKENS + 3, 5 * TOKENS])
def test_a_block_in_stretches(more, length):
    """The state that a stretch leaves, and the gradient that it hands on, are those of tokens with all that."""
    given = problem(length, batch=1, channels=5, size=5, groups=1)
    way = ops.Shape.of(given[0], given[3]).way(given[0].device, "z" in more)
    assert way.count > 1
    assert way.once is (length < 5 * TOKENS or "z" not in more)
    verify_block(more, given)


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


LOG2E = math.log2(math.e)
BENDS = torch.linspace(-40, 40, 97)


def scanned_softplus(v):
    """The softplus and its slope as one token that nothing came before shows them."""
    delta, one = v.view(1, 1, -1).requires_grad_(), torch.ones(1, 1, 1, device=v.device)
    y = selective_scan(
        torch.ones_like(delta), delta, torch.zeros_like(v).unsqueeze(1), one, one, delta_softplus=True, backend="triton"
    )
    (slope,) = torch.autograd.grad(y.sum(), delta)
    return y.detach().flatten(), slope.flatten()


def eager_softplus(v):
    """By powers of 2, as a GPU takes them, which rounds exponents once more."""
    value = v.clamp(min=0) + torch.log1p(torch.exp2(-v.abs() * LOG2E))
    return value, torch.exp2((v - value) * LOG2E)


def careless_softplus(v):
    """A twin whose logarithm has no digits where e^v is small, and with it the slope, 1 - e^-softplus."""
    value = v.clamp(min=0) + (1 + torch.exp(-v.abs())).log()
    return value, 1 - torch.exp(-value)


def judge_softplus(function, v):
    """Relative to each value, however small."""
    for found, exact, rough in zip(function(v), eager_softplus(v.double()), eager_softplus(v), strict=True):
        assert_close((found / exact).float(), torch.ones_like(exact), rough / exact, name="softplus")


def test_softplus_keeps_its_digits():
    judge_softplus(scanned_softplus, BENDS)
    with pytest.raises(AssertionError, match="softplus"):
        judge_softplus(careless_softplus, BENDS)


@pytest.mark.gpu
def test_softplus_keeps_its_digits_compiled():
    judge_softplus(lambda v: [x.cpu() for x in scanned_softplus(v.cuda())], BENDS)


def altered(monkeypatch, change):
    """The gradients, changed in place, of a call of which `change` is given the arguments too."""
    backward = ops.selective_backward

    def off(*given):
        found = list(backward(*given))
        change(found, *given)
        return tuple(found)

    monkeypatch.setattr(ops, "selective_backward", off)


@pytest.mark.parametrize("which", range(9))
def test_a_wrong_gradient_is_caught(which, monkeypatch):
    def change(found, *_):
        found[which] = found[which] * 1.01

    altered(monkeypatch, change)
    with pytest.raises(AssertionError, match=f"gradient {which}"):
        verify_block(ALL, problem(9))


def no_sigmoid(found, dy, dafter, x, delta, a, b, c, before, bias, *_):
    found[1] = found[1] / torch.sigmoid(delta + bias)


def no_direct_term(found, dy, dafter, x, delta, a, b, c, before, bias, direct, z, *_):
    found[0] = found[0] - direct * dy * torch.nn.functional.silu(z)


def padded_bias(found, *_):
    """What a token beyond the end would add."""
    found[6] = found[6] + found[1][:, -1].sum(0)


def gated_twice(found, dy, dafter, x, delta, a, b, c, before, bias, direct, z, *_):
    found[8] = found[8] * torch.nn.functional.silu(z)


def direct_of_the_gated(found, dy, dafter, x, *_):
    found[7] = (dy * x).sum((0, 1))


@pytest.mark.parametrize(
    ("change", "which"),
    [(no_direct_term, 0), (no_sigmoid, 1), (padded_bias, 6), (direct_of_the_gated, 7), (gated_twice, 8)],
)
def test_gradients_of_a_block_with_a_part_left_out_are_caught(change, which, monkeypatch):
    altered(monkeypatch, change)
    with pytest.raises(AssertionError, match=f"gradient {which}"):
        verify_block(ALL, problem(9))


@pytest.mark.parametrize("part", ALL)
def test_a_block_with_a_part_left_out_is_caught(part):
    def twin(*given):
        kept = [x if part != name else 0 * x for name, x in zip(("bias", "D", "z"), given[6:], strict=True)]
        return fast_block(tuple(name for name in ALL if name != part))(*given[:6], *kept)

    with pytest.raises(AssertionError, match="output 0"):
        verify(twin, plain_block(ALL), block(problem(9), ALL), terms=27, dtypes=WIDE)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("more", COMBINATIONS[-2:], ids=named)
def test_operator_is_well_formed(more):
    """Also where each tensor has a dtype of its own."""
    x, delta, a, b, c, before, *rest = block(problem(TOKENS + 1, batch=1, channels=4), more)
    kinds = torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float32
    kinds = *kinds, torch.bfloat16, torch.float32, torch.float16
    given = [
        None if z is None else z.to(kind).requires_grad_()
        for z, kind in zip((x, delta, a, b, c, before, *rest), kinds, strict=True)
    ]
    softplus = "softplus" in more
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.selective.overload, (*given, softplus), test_utils=checks)
    y, after, starts = ops.selective(*given, softplus)
    assert y.dtype == torch.bfloat16
    arguments = torch.ones_like(y), after, *given, softplus, starts
    found = ops.selective_backward(*arguments)
    for z, dz in zip(given, found, strict=True):
        assert (dz.numel() == 0) if z is None else (dz.dtype == z.dtype and dz.shape == z.shape)
    torch.library.opcheck(ops.selective_backward.overload, arguments, test_utils=("test_schema", "test_faketensor"))


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
        return [z.cpu() for z in call(*(z if z is None else z.cuda() for z in given))]

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("more", COMBINATIONS, ids=named)
@pytest.mark.parametrize(("channels", "size", "groups"), [(96, 16, 1), (40, 5, 1)])
@pytest.mark.parametrize("length", [301, 4100])
def test_a_block_compiled(more, channels, size, groups, length):
    given = block(problem(length, channels=channels, size=size, groups=groups), more)
    for dtype in (torch.float32, torch.bfloat16):
        verify(on_gpu(fast_block(more)), on_gpu(plain_block(more)), given, terms=length * size, dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "size", "groups"), [(96, 16, 1), (64, 64, 2), (40, 5, 1)])
@pytest.mark.parametrize("length", [301, 4100])
def test_compiled(dtype, channels, size, groups, length):
    given = problem(length, channels=channels, size=size, groups=groups)
    verify(on_gpu(fast), on_gpu(plain), given, terms=length * size, dtypes=(dtype,))
