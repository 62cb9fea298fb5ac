"""The delta rule against the recurrence token by token, in value and every gradient; its laws; its numerical traps."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch
from recurrences import GATES, HEADS, delta, differentiate, draw, draw_gate, per_head, verify
from torch.nn import functional as F

from saccade.scan import chunks
from saccade.scan.decays import gate_logsigmoid
from saccade.scan.delta_rule import delta_rule
from saccade.scan.linear_attention import linear_attention
from saccade.scan.state import Matrix, State
from saccade.testing.budget import assert_close

D, DV = 5, 3


def inputs(heads=2, groups=2, tokens=37, batch=2, beta_heads=None, dtype=torch.float64, dim=D):
    """q, unit k, v and beta in (0, 2)."""
    shapes = ((heads, dim), (groups, dim), (groups, DV))
    q, k, v = (draw(batch, h, tokens, d, seed=i) for i, (h, d) in enumerate(shapes))
    beta = 2 * draw(batch, beta_heads or groups, tokens, seed=3).sigmoid()
    return [x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, beta)]


def close(a, b, terms=100):
    """Equal up to the rounding of sums of `terms` products."""
    assert a.dtype == b.dtype
    assert_close(a, b, b, terms=terms, scale=float(b.abs().max()))


def fast(**options):
    """q, k, v, beta, g, memory -> (o, last memory a query head)."""

    def call(q, k, v, beta, g, memory):
        state = None if memory is None else State(memory.to(torch.promote_types(memory.dtype, torch.float32)))
        o, after = delta_rule(q, k, v, beta, log_decay=g, state=state, return_state=True, **options)
        return o, per_head(after.memory, q.shape[1])

    return call


PER_HEAD = [("key", "key"), ("query", "key"), ("key", "query"), ("query", "query")]


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta_heads", "gate_heads"), PER_HEAD)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_is_the_recurrence(heads, groups, gate, beta_heads, gate_heads, backend):
    tokens = 19
    of = {"key": groups, "query": heads}
    g = draw_gate(gate, of[gate_heads], tokens, D)
    kept = max(of[beta_heads], groups if g is None else of[gate_heads])
    given = [*inputs(heads, groups, tokens, beta_heads=of[beta_heads]), g, draw(2, kept, D, DV, seed=9)]
    verify(fast(chunk=8, backend=backend), delta, given, terms=tokens * D * D)


def erase_then_decay(q, k, v, beta, g, memory):
    """A twin in the other order: S <- Diag(exp(g)) (I - beta k k^T) S + beta k v^T."""
    s, rows, eye = memory, [], torch.eye(D, dtype=q.dtype)
    for t in range(q.shape[2]):
        b, key = beta[:, :, t, None, None], k[:, :, t, :, None]
        s = g[:, :, t, :, None].exp() * ((eye - b * key @ key.mT) @ s) + b * key * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(rows, 2), s


def exclusive(q, k, v, beta, g, memory):
    """A twin whose queries read before their own token is written."""
    o, last = fast(chunk=8)(F.pad(q[:, :, 1:], (0, 0, 0, 1)), k, v, beta, g, memory)
    return F.pad(o[:, :, :-1], (0, 0, 1, 0)), last


def unsolved(q, k, v, beta, g, memory):
    """A twin that erases only what came before the chunk: one chunk a token is right, eight are not."""
    return linear_attention(q, k, v * beta[..., None], log_decay=g, chunk=8), memory


@pytest.mark.parametrize("twin", [erase_then_decay, exclusive, unsolved])
def test_wrong_twins_are_caught(twin):
    given = [*inputs(2, 2, 19), draw_gate("vector", 2, 19, D), draw(2, 2, D, DV, seed=9)]
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float64"):
        verify(twin, delta, given, terms=19 * D * D, dtypes=(torch.float64,))


def test_order_of_decay_and_erasure_is_free_for_a_scalar_gate():
    g = draw_gate("scalar", 2, 19, D)
    given = [*inputs(2, 2, 19), g, draw(2, 2, D, DV, seed=9)]
    o, _ = fast(chunk=8)(*given)
    other, _ = erase_then_decay(*given[:4], g[..., None].expand(*g.shape, D), given[5])
    close(o, other, 19 * D * D)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 67])
def test_chunk_size_changes_nothing(gate, tokens):
    given = [*inputs(4, 2, tokens), draw_gate(gate, 2, tokens, D), draw(2, 2, D, DV, seed=9)]
    truth = delta(*given)
    assert tokens < 67 or chunks.ABREAST < 67
    for chunk in (1, 2, 3, 7, 16, 64, 100):
        for found, exact in zip(fast(chunk=chunk)(*given), truth, strict=True):
            close(found, exact, terms=tokens * D * D)


def compare_states(a, b, terms):
    close(a.memory, b.memory, terms)
    close(a.transition.value, b.transition.value, terms)


@pytest.mark.parametrize("gate", GATES)
def test_split_scan_compose_is_the_whole(gate):
    tokens, terms = 13, 13 * D * D
    q, k, v, beta = inputs(4, 2, tokens)
    g = draw_gate(gate, 2, tokens, D)

    def part(start, stop, state=None):
        now = slice(start, stop)
        some = g if g is None or g.ndim == 1 else g[:, :, now]
        return delta_rule(
            *(x[:, :, now] for x in (q, k, v, beta)), log_decay=some, state=state, return_state=True, chunk=4
        )

    whole, after = part(0, tokens)
    for cut in range(1, tokens):
        (first, a), (_, b) = part(0, cut), part(cut, tokens)
        compare_states(a.compose(b), after, terms)
        rest, c = part(cut, tokens, a)
        close(torch.cat([first, rest], 2), whole, terms)
        compare_states(c, after, terms)
    a, b, c = (part(*span)[1] for span in ((0, 3), (3, 8), (8, tokens)))
    compare_states(a.compose(b).compose(c), a.compose(b.compose(c)), terms)


@pytest.mark.parametrize("gate", GATES)
def test_transition_is_the_product_of_decays_and_erasures(gate):
    """Its gradients too: a memory without values passes through the stretch as its transition says."""
    tokens = 11
    q, k, v, beta = inputs(2, 2, tokens)
    g = draw_gate(gate, 2, tokens, D)
    # A decay known by its logarithm has as many wrong last digits as that is large; keep it below 1 in all.
    g = None if g is None else g / (2 * tokens)

    def product(k, beta, *g):
        _, state = delta_rule(q.to(k), k, v.to(k), beta, log_decay=g[0] if g else None, return_state=True, chunk=4)
        return [state.transition.value]

    def plain(k, beta, *g):
        eye = torch.eye(D, dtype=k.dtype).expand(2, 2, D, D)
        return [delta(q.to(k), k, torch.zeros(2, 2, tokens, D).to(k), beta, g[0] if g else None, eye)[1]]

    given = [k, beta] if g is None else [k, beta, g]
    verify(product, plain, given, terms=tokens * D * D, dtypes=(torch.float64, torch.float32))


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_continues_a_state_with_a_decay(kind):
    """A state that something else made may carry a log decay as its transition."""
    q, k, v, beta = inputs(2, 2, 11)
    before = State(draw(2, 2, D, DV), -draw(2, 2, D if kind == "vector" else 1, 1, seed=1).exp())
    _, after = delta_rule(q, k, v, beta, state=before, return_state=True, chunk=4)
    _, own = delta_rule(q, k, v, beta, return_state=True, chunk=4)
    compare_states(after, before.compose(own), 11 * D * D)


@pytest.mark.parametrize("gate", GATES)
def test_decoding_is_the_whole(gate):
    tokens = 13
    q, k, v, beta = inputs(4, 2, tokens)
    g = draw_gate(gate, 4, tokens, D)
    whole, after = delta_rule(q, k, v, beta, log_decay=g, return_state=True, chunk=4)
    state, rows = None, []
    for t in range(tokens):
        one = slice(t, t + 1)
        now = g if g is None or g.ndim == 1 else g[:, :, one]
        o, state = delta_rule(*(x[:, :, one] for x in (q, k, v, beta)), log_decay=now, state=state, return_state=True)
        rows.append(o)
    close(torch.cat(rows, 2), whole, tokens * D * D)
    compare_states(state, after, tokens * D * D)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_is_the_loop_bitwise(gate, dtype):
    ends = [0, 11, 12, 30]
    tokens = inputs(4, 2, ends[-1], batch=1, dtype=dtype)
    g = draw_gate(gate, 2, ends[-1], D, batch=1)
    memory = draw(3, 2, D, DV, seed=9, dtype=dtype)
    for state in (None, State(memory)):
        packed, after = delta_rule(
            *tokens, log_decay=g, cu_seqlens=torch.tensor(ends).int(), state=state, return_state=True, chunk=4
        )
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            some = g if g is None or g.ndim == 1 else g[:, :, start:stop]
            own = None if state is None else State(memory[i : i + 1])
            o, left = delta_rule(
                *(x[:, :, start:stop] for x in tokens), log_decay=some, state=own, return_state=True, chunk=4
            )
            assert torch.equal(packed[:, :, start:stop], o)
            found = after.unbind()[i]
            assert torch.equal(found.memory, left.memory)
            assert torch.equal(found.transition.value, left.transition.value)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate):
    q, k, v, beta = inputs(2, 1, 5, batch=1, dim=2)
    g, memory = draw_gate(gate, 1, 5, 2, batch=1), draw(1, 1, 2, DV, seed=9)
    leaves = [x.requires_grad_() for x in (q, k, v, beta, memory, g) if x is not None]

    def function(q, k, v, beta, memory, *g):
        o, state = delta_rule(
            q, k, v, beta, log_decay=g[0] if g else None, state=State(memory), return_state=True, chunk=2
        )
        return o, state.memory, state.transition.value

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_without_a_state_nothing_else_changes():
    given, g = inputs(4, 2, 19), draw_gate("scalar", 2, 19, D)
    o, _ = delta_rule(*given, log_decay=g, return_state=True, chunk=8)
    close(delta_rule(*given, log_decay=g, chunk=8), o, 19 * D * D)


def test_scale():
    given = inputs(4, 2, 19)
    close(delta_rule(*given, scale=0.3, chunk=8), 0.3 * delta_rule(*given, chunk=8), 19 * D * D)


# Laws that tie it to other things.


@pytest.mark.parametrize("gate", GATES)
def test_orthogonal_keys_are_linear_attention(gate):
    """Where no key meets another, nothing is there to erase."""
    q, _, v, beta = inputs(2, 2, D)
    k = torch.eye(D, dtype=torch.float64).expand(2, 2, D, D)
    g = draw_gate(gate, 2, D, D)
    plain = linear_attention(q, k, v * beta[..., None], log_decay=g, chunk=4)
    close(delta_rule(q, k, v, beta, log_decay=g, chunk=4), plain, D * D * D)


def test_a_key_returns_the_last_value_written_to_it():
    _, k, v, _ = inputs(2, 2, 37)
    close(delta_rule(k, k, v, torch.ones(2, 2, 37).double(), chunk=8), v, 37 * D * D)


# Numerical traps.


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("tau", [16.0, 1.0, 0.1])
def test_steep_gates_do_not_overflow(gate, tau):
    """exp of minus a chunk's summed gate overflows float32 for tau = 0.1; no factor here is ever above 1."""
    tokens = 131
    shape = (2, 2, tokens, D) if gate == "vector" else (2, 2, tokens)
    g = gate_logsigmoid(draw(*shape, seed=3), tau)
    assert tau > 0.1 or float((-g.float())[:, :, :64].sum(2).max().exp()) == math.inf
    verify(
        lambda *x: fast(chunk=64)(*x, None),
        delta,
        [*inputs(tokens=tokens), g],
        terms=tokens * D * D,
        dtypes=(torch.float64, torch.float32),
    )


@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("value", [0.0, -0.0, -5.0, -50.0, -1e4, -1e30, -math.inf])
def test_hostile_gates(gate, value):
    """Gates of one value everywhere, and now and then between ordinary ones; gradients stay finite."""
    tokens = 19
    often, seldom = (draw_gate(gate, 2, tokens, D) for _ in range(2))
    often.fill_(value)
    seldom[..., ::3] = value
    for g in (often, seldom):
        given = [*inputs(4, 2, tokens), g, draw(2, 2, D, DV, seed=9)]
        verify(fast(chunk=8), delta, given, terms=tokens * D * D, dtypes=(torch.float64, torch.float32))
        _, gradients = differentiate(fast(chunk=8), given, torch.float32)
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_minus_infinity_is_a_new_sequence(gate):
    tokens, cut = 29, 13
    given = inputs(4, 2, tokens)
    g = draw_gate(gate, 2, tokens, D)
    g[:, :, cut] = -math.inf
    o, after = delta_rule(*given, log_decay=g, return_state=True, chunk=8)
    rest, left = delta_rule(*(x[:, :, cut:] for x in given), log_decay=g[:, :, cut:], return_state=True, chunk=8)
    close(o[:, :, cut:], rest, tokens * D * D)
    close(after.memory, left.memory, tokens * D * D)
    assert not after.transition.value.any()


def test_repeated_keys():
    """All keys alike, the worst conditioned triangular system that unit keys can give; with beta = 2 a reflection."""
    tokens = 67
    q, k, v, beta = inputs(2, 2, tokens)
    k = k[:, :, :1].expand_as(k)
    for share in (beta, torch.full_like(beta, 2.0), torch.ones_like(beta), torch.zeros_like(beta)):
        # What is read is the sum of all that was ever written to the one key.
        memories = torch.stack([delta(*(x[:, :, :t] for x in (q, k, v, share)))[1] for t in range(1, tokens + 1)])
        written = (k[:, :, :1] @ memories.diff(dim=0)).abs().sum(0).max()
        verify(
            lambda *x: fast(chunk=64)(*x, None, None),
            delta,
            [q, k, v, share],
            terms=tokens * D * D,
            scale=float(written),
            dtypes=(torch.float64, torch.float32),
        )


def test_long_sequences_stay_bounded():
    """Unit keys and beta <= 2 never amplify: after many tokens the error is still that of the recurrence."""
    q, k, v, beta = inputs(1, 1, 1009, batch=1)
    v[:, :, 64:] = 0
    verify(
        lambda *x: fast(chunk=64)(*x, None, None), delta, [q, k, v, beta], terms=1009 * D * D, dtypes=(torch.float32,)
    )


@pytest.mark.parametrize("gate", GATES)
def test_states_are_float32_or_wider(gate):
    given, g = inputs(4, 2, 9, dtype=torch.bfloat16), draw_gate(gate, 2, 9, D)
    o, after = delta_rule(*given, log_decay=g, return_state=True, chunk=4)
    assert o.dtype == torch.bfloat16
    assert after.memory.dtype == after.transition.value.dtype == torch.float32
    o, after = delta_rule(*(x.double() for x in given), return_state=True)
    assert o.dtype == after.memory.dtype == after.transition.value.dtype == torch.float64


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(gate, dtype):
    given, g = inputs(4, 2, 19, dtype=dtype), draw_gate(gate, 2, 19, D)
    g = None if g is None else g.float()
    narrow, wide = (delta_rule(*(x.to(t) for x in given), log_decay=g, chunk=8) for t in (dtype, torch.float32))
    assert torch.equal(narrow, wide.to(dtype))


def test_autocast_is_ignored():
    given, g = inputs(4, 2, 19, dtype=torch.float32), draw_gate("vector", 2, 19, D)
    plain = delta_rule(*given, log_decay=g, chunk=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = delta_rule(*given, log_decay=g, chunk=8)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("gate", GATES)
def test_the_future_leaves_the_past_alone_bitwise(gate):
    tokens = 29
    given, g = inputs(4, 2, tokens, dtype=torch.float32), draw_gate(gate, 2, tokens, D)
    before = delta_rule(*given, log_decay=g, chunk=8)
    for now in (0, 3, 8, 14, 27):
        changed = [x.clone() for x in given]
        for x in changed:
            x[:, :, now + 1 :] *= -0.7
        after = delta_rule(*changed, log_decay=g, chunk=8)
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])
        assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("gate", "which"),
    [*((g, x) for g in GATES for x in ("q", "k", "v", "beta")), ("scalar", "g"), ("vector", "g")],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_spoils_no_earlier_one(gate, which, bad):
    tokens, at = 19, 5
    given = dict(zip(("q", "k", "v", "beta"), inputs(4, 2, tokens), strict=True), g=draw_gate(gate, 2, tokens, D))
    clean = delta(*given.values())[0]
    given[which] = given[which].clone()
    given[which][0, 0, at] = bad
    q, k, v, beta, g = given.values()
    o = delta_rule(q, k, v, beta, log_decay=g, chunk=8)
    truth = delta(*given.values())[0]
    assert not truth[0, 0, at:].isfinite().all()
    close(o[:, :, :at], clean[:, :, :at], tokens * D * D)
    close(o[1], clean[1], tokens * D * D)
    assert torch.equal(o.isfinite(), truth.isfinite())


def test_strided_inputs():
    given, g = inputs(4, 2, 19), draw_gate("vector", 2, 19, D)
    plain = delta_rule(*given, log_decay=g, chunk=8)

    def strided(x):
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]

    def turned(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for view in (strided, turned):
        close(delta_rule(*map(view, given), log_decay=view(g), chunk=8), plain, 19 * D * D)


def test_compiles():
    given, g = inputs(4, 2, 19), draw_gate("scalar", 2, 19, D)
    torch.compiler.reset()
    compiled = torch.compile(delta_rule, backend="eager")(*given, log_decay=g, chunk=8)
    torch.compiler.reset()
    close(compiled, delta_rule(*given, log_decay=g, chunk=8))


def call(**options):
    given = dict(zip(("q", "k", "v", "beta"), inputs(4, 2, 7), strict=True))
    return delta_rule(**{**given, **options})


ERRORS = [
    ({"v": torch.zeros(2, 2, 7, DV)}, TypeError, "v: got dtype torch.float32"),
    ({"q": draw(2, 4, 3, D)}, ValueError, "k: got 7 tokens beside q's 3"),
    ({"beta": 0.5}, TypeError, "beta: got float"),
    ({"beta": torch.ones(2, 2, 7).long()}, TypeError, "beta: got torch.int64"),
    ({"beta": torch.ones(2, 3, 7)}, ValueError, r"beta: got shape \(2, 3, 7\); pass \(2, heads, 7\) with 2 or 4 heads"),
    ({"beta": torch.ones(2, 2, 7, 1)}, ValueError, r"beta: got shape \(2, 2, 7, 1\)"),
    ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay: got shape \(3,\)"),
    ({"log_decay": torch.zeros(2, 2, 7, DV)}, ValueError, r"log_decay: got shape \(2, 2, 7, 3\)"),
    ({"chunk": 0}, ValueError, "chunk: got 0"),
    ({"backend": "quick"}, ValueError, "backend: got 'quick'; choose one of auto, reference, chunked, triton"),
    ({"state": State(torch.zeros(2, 4, D, DV))}, ValueError, r"state: got a memory \(2, 4, 5, 3\)"),
    ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens: got batch 2"),
]


@pytest.mark.parametrize(("options", "kind", "message"), ERRORS)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        call(**options)


def test_returns_a_matrix_as_transition():
    _, state = delta_rule(*inputs(4, 2, 7), return_state=True)
    assert isinstance(state.transition, Matrix)
    assert state.memory.shape == (2, 2, D, DV)
    assert state.transition.value.shape == (2, 2, D, D)


def test_examples():
    # The package's attribute of that name is the function.
    result = doctest.testmod(importlib.import_module("saccade.scan.delta_rule"))
    assert result.attempted
    assert not result.failed
