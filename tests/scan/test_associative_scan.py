"""Prefix scans against plain loops, in value and every gradient; the ready monoids against the equations they serve."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

from saccade.scan.associative_scan import affine, associative_scan, check_monoid, matrix_affine, softmax_monoid
from saccade.testing.budget import assert_close

module = importlib.import_module("saccade.scan.associative_scan")  # the name in the package is the function

LENGTHS = [1, 2, 3, 4, 7, 13, 31, 32, 33, 50, 600]


def run(function, tensors, dtype, cotangents):
    """Outputs, then the gradient of every tensor, of `function` in `dtype`."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    total = sum((o * c.to(o.dtype)).sum() for o, c in zip(outputs, cotangents, strict=True))
    return [*(o.detach() for o in outputs), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def verify(fast, plain, tensors, terms):
    """Values and gradients of `fast` against those of `plain`, in float64 and float32."""
    cotangents = [torch.randn_like(o) for o in plain(*tensors)]
    exact = run(plain, tensors, torch.float64, cotangents)
    scale = max(float(x.abs().max()) for x in exact)
    for dtype in (torch.float64, torch.float32):
        actual, eager = run(fast, tensors, dtype, cotangents), run(plain, tensors, dtype, cotangents)
        for i, (a, t, e) in enumerate(zip(actual, exact, eager, strict=True)):
            assert a.dtype == dtype
            assert_close(a, t, e, name=f"tensor {i} in {dtype}", terms=terms, scale=scale)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def recurrence(a, b, h0=None, dim=1):
    """h_t = a_t h_{t-1} + b_t, one token at a time."""
    h, rows = torch.zeros_like(b.select(dim, 0)) if h0 is None else h0, []
    for t in range(b.shape[dim]):
        h = a.select(dim, t) * h + b.select(dim, t)
        rows.append(h)
    return torch.stack(rows, dim)


@pytest.mark.parametrize("length", LENGTHS)
def test_affine_is_the_recurrence(length):
    verify(
        lambda a, b: associative_scan(affine, (a, b), dim=1)[1:],
        lambda a, b: [recurrence(a, b)],
        [randn(2, length, 3), randn(2, length, 3)],
        terms=length,
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_both_outputs_and_an_initial_element(length):
    def fast(a, b, a0, h0):
        return associative_scan(affine, (a, b), dim=1, initial=(a0.unsqueeze(1), h0.unsqueeze(1)))

    def plain(a, b, a0, h0):
        return [a0.unsqueeze(1) * a.cumprod(1), recurrence(a, b, h0)]

    verify(fast, plain, [randn(2, length, 3), randn(2, length, 3), randn(2, 3), randn(2, 3)], terms=length)


def reversing(reverse):
    """A twin of `_neighbours` that takes the token after for the one before."""
    late, early = slice(1, None), slice(None, -1)
    return (late, early) if reverse else (early, late)


def test_a_gradient_of_wrong_neighbours_is_caught(monkeypatch):
    monkeypatch.setattr(module, "_neighbours", reversing)
    with pytest.raises(AssertionError, match="max error"):
        test_affine_is_the_recurrence(13)


def test_only_inputs_and_outputs_are_kept_for_the_gradient():
    """A graph of every level of the scan would keep several times the elements."""
    a, b = (torch.rand(600, 3, requires_grad=True) for _ in range(2))
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        associative_scan(affine, (a, b), dim=0)
    assert sum(kept.values()) <= 3 * a.numel()


@pytest.mark.parametrize("length", [1, 20, 50])
def test_zero_decays_and_gradients_of_the_decay_since(length):
    """Products of decays of which some are zero have a gradient too."""

    def fast(a, b):
        return associative_scan(affine, (a, b), dim=0)

    def plain(a, b):
        decays = [a[: t + 1].prod(0) for t in range(length)]
        return [torch.stack(decays), recurrence(a.expand_as(b), b, dim=0)]

    a = torch.rand(length, 2, 1).double() * (torch.rand(length, 2, 1) > 0.1)
    verify(fast, plain, [a, randn(length, 2, 3)], terms=length)


def test_one_sequence_a_time_under_vmap():
    a, b = torch.rand(3, 37, 2).double(), randn(3, 37, 2)

    def total(a, b):
        decay, h = associative_scan(affine, (a, b), dim=0)
        return h.square().sum() + decay.sum()

    for dims in ((0, 0), (0, None), (None, 0)):
        given = [x if at == 0 else x[0] for x, at in zip((a, b), dims, strict=True)]
        found = torch.func.vmap(torch.func.grad(total, (0, 1)), dims)(*given)
        for i in range(3):
            one = [x[i] if at == 0 else x for x, at in zip(given, dims, strict=True)]
            for x, exact in zip(found, torch.func.grad(total, (0, 1))(*one), strict=True):
                assert_close(x[i], exact, exact, terms=37)


def test_compiles():
    given = [x.requires_grad_() for x in (torch.rand(1, 40, 3), torch.randn(1, 40, 3))]

    def scan(a, b):
        return associative_scan(affine, (a, b), dim=1)[1]

    torch.compiler.reset()
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        *([f(*given), *torch.autograd.grad(f(*given).sum(), given)] for f in (compiled, scan)), strict=True
    ):
        assert_close(x.detach(), y.detach(), y.detach(), terms=40)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_reverse_runs_from_the_last_token(length):
    def fast(a, b, h0):
        initial = (torch.ones_like(h0).unsqueeze(1), h0.unsqueeze(1))
        return associative_scan(affine, (a, b), dim=1, reverse=True, initial=initial)[1:]

    verify(
        fast,
        lambda a, b, h0: [recurrence(a.flip(1), b.flip(1), h0).flip(1)],
        [randn(2, length, 3), randn(2, length, 3), randn(2, 3)],
        terms=length,
    )


def test_order_of_the_arguments_is_kept():
    """Products of rotations about different axes do not commute: `a` earlier must stay earlier."""
    steps = torch.linalg.qr(randn(11, 3, 3)).Q
    scanned = associative_scan(lambda a, b: (b[0] @ a[0],), (steps,), dim=0)[0]
    product = torch.eye(3, dtype=torch.float64)
    for t in range(11):
        product = steps[t] @ product
        assert_close(scanned[t], product, product, terms=3 * (t + 1))
    backwards = associative_scan(lambda a, b: (a[0] @ b[0],), (steps,), dim=0)[0]
    with pytest.raises(AssertionError, match="max error"):
        assert_close(backwards[-1], product, product, terms=33)


def test_complex_states():
    """S5's diagonal recurrence with complex decays."""
    a, b = torch.polar(torch.rand(2, 13, 3).double(), randn(2, 13, 3)), torch.complex(randn(2, 13, 3), randn(2, 13, 3))
    leaves = [x.requires_grad_() for x in (a, b)]
    scanned, looped = associative_scan(affine, tuple(leaves), dim=1)[1], recurrence(*leaves)
    cotangent = torch.complex(randn(2, 13, 3), randn(2, 13, 3))
    results = [[out, *torch.autograd.grad((out * cotangent).real.sum(), leaves)] for out in (scanned, looped)]
    for actual, exact in zip(*results, strict=True):
        exact = torch.view_as_real(exact.detach())
        assert_close(torch.view_as_real(actual.detach()), exact, exact, terms=13, scale=float(exact.abs().max()))


@pytest.mark.parametrize(("dim", "shape"), [(0, (5, 2, 3)), (1, (2, 5, 3)), (2, (2, 3, 5)), (-1, (2, 3, 5))])
def test_any_dimension_and_strided_elements(dim, shape):
    a, b = randn(*shape), randn(*shape)
    assert_close(
        associative_scan(affine, (a, b), dim=dim)[1], recurrence(a, b, dim=dim), recurrence(a, b, dim=dim), terms=5
    )
    wide = [x.repeat_interleave(2, -1)[..., ::2] for x in (a, b)]
    assert not any(x.is_contiguous() for x in wide)
    assert torch.equal(associative_scan(affine, tuple(wide), dim=dim)[1], associative_scan(affine, (a, b), dim=dim)[1])


def test_a_decay_may_be_shared_by_channels():
    a, b = randn(2, 9, 1), randn(2, 9, 3)
    exact = recurrence(a.expand_as(b), b)
    decay, h = associative_scan(affine, (a, b), dim=1)
    assert decay.shape == a.shape
    assert_close(h, exact, exact, terms=9)


def test_matrix_affine_is_titans():
    """Momentum S_t = eta S_{t-1} + u_t over the memory M_t = (1 - alpha) M_{t-1} + S_t, scanned as one 2 x 2 system."""

    def fast(eta, alpha, u):
        zero = torch.zeros_like(eta)
        matrix = torch.stack((torch.stack((eta, zero), -1), torch.stack((eta, 1 - alpha), -1)), -2)
        h = associative_scan(matrix_affine, (matrix, u.unsqueeze(-2).expand(-1, -1, 2, -1)), dim=1)[1]
        return h[:, :, :1].squeeze(2), h[:, :, 1]

    def plain(eta, alpha, u):
        s = m = torch.zeros_like(u[:, 0])
        rows = []
        for t in range(u.shape[1]):
            s = eta[:, t, None] * s + u[:, t]
            m = (1 - alpha[:, t, None]) * m + s
            rows.append((s, m))
        return [torch.stack(x, 1) for x in zip(*rows, strict=True)]

    verify(fast, plain, [torch.rand(2, 11).double(), torch.rand(2, 11).double(), randn(2, 11, 3)], terms=22)


def aaren(scores, values):
    m, u, w = associative_scan(softmax_monoid, (scores, torch.ones_like(scores), values), dim=1)
    return w / u.unsqueeze(-1), m + u.log()


def softmax_prefixes(scores, values):
    rows = [torch.softmax(scores[:, : t + 1], 1).unsqueeze(1) @ values[:, : t + 1] for t in range(scores.shape[1])]
    return [torch.cat(rows, 1), scores.logcumsumexp(1)]


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_softmax_monoid_is_every_prefix_of_softmax(spread):
    verify(aaren, softmax_prefixes, [spread * randn(2, 13), randn(2, 13, 3)], terms=13)


def test_softmax_monoid_with_ties():
    """Equal scores, where max has no gradient of its own."""
    verify(aaren, softmax_prefixes, [torch.zeros(2, 7).double(), randn(2, 7, 3)], terms=7)


def test_masked_tokens_weigh_nothing_and_give_no_nan():
    scores, values = randn(1, 9), randn(1, 9, 2)
    masked = torch.tensor([[True, True, False, True, False, False, True, True, False]])
    leaves = [x.requires_grad_() for x in (scores, values)]
    m, u, w = associative_scan(
        softmax_monoid,
        (
            leaves[0].masked_fill(masked, -math.inf),
            (~masked).double(),
            leaves[1].masked_fill(masked.unsqueeze(-1), 0.0),
        ),
        dim=1,
    )
    assert not u[:, :2].any()
    assert not w[:, :2].any()
    assert bool((m[:, :2] == -math.inf).all())
    average = (w / u.unsqueeze(-1))[:, 2:]
    kept = [t for t in range(9) if not masked[0, t]]
    for t in range(2, 9):
        seen = [s for s in kept if s <= t]
        exact = (torch.softmax(scores[:, seen], 1).unsqueeze(1) @ values[:, seen])[:, 0].detach()
        assert_close(average[:, t - 2].detach(), exact, exact, terms=len(seen))
    for gradient in torch.autograd.grad(average.square().sum(), leaves):
        assert bool(gradient.isfinite().all())
        assert not gradient[masked].any()
        assert bool(gradient[~masked].any())


def test_second_derivatives():
    inputs = [(x / 2).requires_grad_() for x in (randn(1, 5, 2), randn(1, 5, 2))]
    assert torch.autograd.gradcheck(lambda a, b: associative_scan(affine, (a, b), dim=1), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: associative_scan(affine, (a, b), dim=1)[1], inputs)
    scores = [randn(1, 5).requires_grad_(), randn(1, 5, 2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda s, v: aaren(s, v), scores)


def test_a_changed_future_leaves_the_past_bitwise_alone():
    a, b = randn(1, 13, 2), randn(1, 13, 2)
    before = associative_scan(affine, (a, b), dim=1)[1]
    for t in range(1, 13):
        changed = b.clone()
        changed[:, t:] = math.nan
        after = associative_scan(affine, (a, changed), dim=1)[1]
        assert torch.equal(after[:, :t], before[:, :t])
        assert bool(after[:, t:].isnan().all())


def test_elements_are_left_as_they_were():
    a, b = randn(1, 7, 2), randn(1, 7, 2)
    copies = a.clone(), b.clone()
    associative_scan(affine, (a, b), dim=1, reverse=True, initial=(a[:, :1], b[:, :1]))
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


def test_work_is_linear_and_depth_logarithmic():
    for length in (1, 2, 5, 64, 100, 127, 1000):
        calls, work = [], []

        def counted(a, b, calls=calls, work=work):
            calls.append(1)
            work.append(b[0].shape[0])
            return affine(a, b)

        associative_scan(counted, (torch.rand(length), torch.rand(length)), dim=0)
        assert sum(work) < 2 * length
        assert len(calls) <= 2 * math.log2(length) + 1


def test_check_monoid():
    elements = (randn(9, 2), randn(9, 2))
    assert check_monoid(affine, elements, dim=0) <= torch.finfo(torch.float64).eps * 9
    scores = (randn(9), torch.ones(9).double(), randn(9, 2))
    assert check_monoid(softmax_monoid, scores, dim=0) <= torch.finfo(torch.float64).eps * 9
    assert check_monoid(matrix_affine, (randn(9, 2, 2), randn(9, 2, 3)), dim=0) <= torch.finfo(torch.float64).eps * 99
    with pytest.raises(ValueError, match="combine: is not associative; tensor 0"):
        check_monoid(lambda a, b: (a[0] - b[0], b[1]), elements, dim=0)
    with pytest.raises(ValueError, match="combine: is not associative"):
        check_monoid(lambda a, b: (a[0] * b[0] * math.nan, b[1]), elements, dim=0)
    with pytest.raises(ValueError, match="associativity takes at least 3"):
        check_monoid(affine, (randn(2), randn(2)), dim=0)


def test_bad_input():
    x = torch.rand(2, 5)
    with pytest.raises(TypeError, match="elements: got Tensor; pass a tuple of tensors"):
        associative_scan(affine, x, dim=1)
    with pytest.raises(TypeError, match="elements: got tuple; pass a tuple of tensors"):
        associative_scan(affine, (x, 1.0), dim=1)
    with pytest.raises(ValueError, match="elements: got an empty tuple"):
        associative_scan(affine, (), dim=1)
    with pytest.raises(ValueError, match=r"dim: got 2, which elements\[0\] of shape \(2, 5\) has not"):
        associative_scan(affine, (x, x), dim=2)
    with pytest.raises(ValueError, match=r"elements: got sizes \[5, 4\] along dim 1; pass one size of at least 1"):
        associative_scan(affine, (x, x[:, :4]), dim=1)
    with pytest.raises(ValueError, match=r"elements: got sizes \[0, 0\] along dim 1"):
        associative_scan(affine, (x[:, :0], x[:, :0]), dim=1)
    with pytest.raises(ValueError, match=r"initial: got \['\(2, 1\) float32'\]; pass \['\(2, 1\) float32', '\(2, 1\)"):
        associative_scan(affine, (x, x), dim=1, initial=(x[:, :1],))
    with pytest.raises(ValueError, match=r"initial: got .*float64.*; pass"):
        associative_scan(affine, (x, x), dim=1, initial=(x[:, :1], x[:, :1].double()))
    with pytest.raises(ValueError, match=r"combine: gave .* from .*expand broadcast elements beforehand"):
        associative_scan(affine, (torch.rand(2, 5, 3), torch.rand(2, 5, 1)), dim=1)
    with pytest.raises(ValueError, match="combine: gave list from"):
        associative_scan(lambda a, b: list(b), (x, x), dim=1)


def test_documentation_runs():
    assert doctest.testmod(module) == (0, 3)
