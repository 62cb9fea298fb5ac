"""Linear attention against the recurrence token by token, values and every gradient; its laws; numerical traps."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch
from recurrences import (
    GATES,
    HEADS,
    differentiate,
    draw,
    draw_gate,
    draw_strength,
    linear,
    per_head,
    strong,
    valued,
    verify,
)
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.scan import chunks, decays, features, normalizers
from saccade.scan.decays import gate_logsigmoid
from saccade.scan.linear_attention import linear_attention
from saccade.scan.normalizers import Clamp, LengthPower, Magnitude, MeanShift, Sum
from saccade.scan.state import State
from saccade.testing.budget import assert_close

D, DV = 5, 3
CONVEX = [Sum(), MeanShift(), Magnitude()]
POLICIES = [*CONVEX, Sum(eps=0.5), Clamp(), Clamp(least=4.0), LengthPower(0.3), "sum", "length_power"]


def inputs(heads=2, groups=2, tokens=37, batch=2, dim=D, dtype=torch.float64, seed=0):
    shapes = ((heads, dim), (groups, dim), (groups, DV))
    return [draw(batch, h, tokens, d, seed=seed + i).to(dtype) for i, (h, d) in enumerate(shapes)]


def close(a, b, terms=100, scale=0.0):
    """Equal up to the rounding of sums of `terms` products, of magnitude `scale` where they cancel."""
    assert a.dtype == b.dtype
    assert_close(a, b, b, terms=terms, scale=max(float(b.abs().max()), float(scale)))


def fast(**options):
    """q, k, v, g, memory and, if any, strength -> (o, last memory a query head)."""

    def call(q, k, v, g, memory, strength=None):
        state = None if memory is None else State(memory.to(torch.promote_types(memory.dtype, torch.float32)))
        given = {"log_decay": g, "strength": strength, "state": state}
        o, after = linear_attention(q, k, v, **given, return_state=True, **options)
        return o, per_head(after.memory, o.shape[1])

    return call


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_heads", ["key", "query"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_is_the_recurrence(heads, groups, gate, gate_heads, backend):
    tokens, kept = 19, groups if gate_heads == "key" or gate == "none" else heads
    g, memory = draw_gate(gate, kept, tokens, D), draw(2, kept, D, DV, seed=9)
    verify(fast(chunk=8, backend=backend), linear, [*inputs(heads, groups, tokens), g, memory], terms=tokens * D)


def exclusive(q, k, v, g, memory):
    """A twin that reads before it writes."""
    o, last = fast(chunk=8)(q, k, v, g, memory)
    return o - (q * per_head(k, q.shape[1])).sum(-1, keepdim=True) * per_head(v, q.shape[1]), last


def interleaved(q, k, v, g, memory):
    """A twin that gives query head h the key head h % Hkv."""
    order = [0, 2, 1, 3]
    o, last = fast(chunk=8)(q[:, order], k, v, g, memory)
    return o[:, order], last[:, order]


def late_decay(q, k, v, g, memory):
    """A twin that decays the new key too."""
    o, last = fast(chunk=8)(q, k * g.exp()[..., None], v, g, memory)
    return o, last


@pytest.mark.parametrize("twin", [exclusive, interleaved, late_decay])
def test_wrong_twins_are_caught(twin):
    given = [*inputs(4, 2, 19), draw_gate("scalar", 2, 19, D), draw(2, 2, D, DV, seed=9)]
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float64"):
        verify(twin, linear, given, terms=19 * D)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 67])
def test_chunk_size_changes_nothing(gate, tokens):
    given = [*inputs(4, 2, tokens), draw_gate(gate, 2, tokens, D), draw(2, 2, D, DV, seed=9)]
    truth = linear(*given)
    # 67 chunks of 1 token are more than are computed side by side.
    assert tokens < 67 or chunks.ABREAST < 67
    for chunk in (1, 2, 3, 7, 16, 64, 100):
        for found, exact in zip(fast(chunk=chunk)(*given), truth, strict=True):
            close(found, exact, terms=tokens * D)


def compare_states(a, b, terms):
    close(a.memory, b.memory, terms)
    assert (a.transition is None) == (b.transition is None)
    if a.transition is not None:
        close(a.transition, b.transition, terms)


COUNTED = [(gate, n) for gate in GATES for n in (None, "sum", "mean_shift") if (gate, n) != ("vector", "mean_shift")]


@pytest.mark.parametrize(("gate", "normalizer"), COUNTED)
def test_split_scan_compose_is_the_whole(gate, normalizer):
    tokens = 13
    q, k, v = inputs(4, 2, tokens)
    g = draw_gate(gate, 2, tokens, D)

    def part(start, stop, state=None):
        some = g if g is None or g.ndim == 1 else g[:, :, start:stop]
        return linear_attention(
            *(x[:, :, start:stop] for x in (q.exp(), k.exp(), v)),
            log_decay=some,
            normalizer=normalizer,
            state=state,
            return_state=True,
            chunk=4,
        )

    whole, after = part(0, tokens)
    for cut in range(1, tokens):
        (first, a), (_, b) = part(0, cut), part(cut, tokens)
        compare_states(a.compose(b), after, tokens * D)
        # A state that is handed on gives the rest of the outputs, and the same state again.
        rest, c = part(cut, tokens, a)
        close(torch.cat([first, rest], 2), whole, tokens * D)
        compare_states(c, after, tokens * D)
    a, b, c = (part(*span)[1] for span in ((0, 3), (3, 8), (8, tokens)))
    compare_states(a.compose(b).compose(c), a.compose(b.compose(c)), tokens * D)


@pytest.mark.parametrize(("gate", "normalizer"), COUNTED)
def test_decoding_is_the_whole(gate, normalizer):
    tokens = 13
    q, k, v = inputs(4, 2, tokens)
    q, k, g = q.exp(), k.exp(), draw_gate(gate, 4, tokens, D)
    whole = linear_attention(q, k, v, log_decay=g, normalizer=normalizer, chunk=4)
    state, rows = None, []
    for t in range(tokens):
        one = slice(t, t + 1)
        now = g if g is None or g.ndim == 1 else g[:, :, one]
        o, state = linear_attention(
            q[:, :, one],
            k[:, :, one],
            v[:, :, one],
            log_decay=now,
            normalizer=normalizer,
            state=state,
            return_state=True,
        )
        rows.append(o)
    close(torch.cat(rows, 2), whole, tokens * D)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [{}, {"feature_map": "exp", "normalizer": "sum"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_is_the_loop_bitwise(gate, options, dtype):
    ends = [0, 11, 12, 30]
    q, k, v = inputs(4, 2, ends[-1], batch=1, dtype=dtype)
    g = draw_gate(gate, 2, ends[-1], D, batch=1)
    memory = draw(3, 2, D, DV + bool(options), seed=9, dtype=dtype)
    for state in (None, State(memory)):
        packed, after = linear_attention(
            q,
            k,
            v,
            log_decay=g,
            cu_seqlens=torch.tensor(ends).int(),
            state=state,
            return_state=True,
            chunk=4,
            **options,
        )
        assert after.memory.shape == (3, 2, D, DV + bool(options))
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            some = g if g is None or g.ndim == 1 else g[:, :, start:stop]
            own = None if state is None else State(memory[i : i + 1])
            o, left = linear_attention(
                *(x[:, :, start:stop] for x in (q, k, v)),
                log_decay=some,
                state=own,
                return_state=True,
                chunk=4,
                **options,
            )
            assert torch.equal(packed[:, :, start:stop], o)
            found = after.unbind()[i]
            assert torch.equal(found.memory, left.memory)
            assert (gate == "none") == (found.transition is None)
            assert gate == "none" or torch.equal(found.transition, left.transition)
            assert (found.shift is None) == (left.shift is None)
            assert found.shift is None or torch.equal(found.shift, left.shift)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_packed_gradients(gate):
    ends = [0, 5, 6, 13]
    tensors = [*inputs(4, 2, 13, batch=1), draw_gate(gate, 2, 13, D, batch=1)]

    def packed(q, k, v, g):
        return [linear_attention(q, k, v, log_decay=g, cu_seqlens=torch.tensor(ends).int(), chunk=4)]

    def loop(q, k, v, g):
        spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
        return [torch.cat([linear(*(x[:, :, s] for x in (q, k, v, g)))[0] for s in spans], 2)]

    verify(packed, loop, tensors, terms=13 * D, dtypes=(torch.float64, torch.float32))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalizer", [None, "sum"])
def test_gradcheck(gate, normalizer):
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 5, batch=1, dim=2))
    g, memory = draw_gate(gate, 1, 5, 2, batch=1), draw(1, 1, 2, DV + (normalizer == "sum"), seed=9).exp()
    leaves = [x.requires_grad_() for x in (g, memory) if x is not None]

    def function(q, k, v, *rest):
        *given, memory = rest
        o, state = linear_attention(
            q.exp(),
            k.exp(),
            v,
            log_decay=given[0] if given else None,
            normalizer=normalizer,
            state=State(memory),
            return_state=True,
            chunk=2,
        )
        return (o, state.memory) if state.transition is None else (o, state.memory, state.transition)

    assert torch.autograd.gradcheck(function, (q, k, v, *leaves), fast_mode=True)


# How much a token writes.


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_heads", ["key", "query"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_strengths_are_the_recurrence(heads, groups, gate, gate_heads, backend):
    tokens, kept = 19, groups if gate_heads == "key" or gate == "none" else heads
    g, memory = draw_gate(gate, kept, tokens, D), draw(2, kept, D, DV, seed=9)
    given = [*inputs(heads, groups, tokens), g, memory, draw_strength(groups, tokens)]
    verify(fast(chunk=8, backend=backend), strong(linear), given, terms=tokens * D)


def late_strength(q, k, v, g, memory, strength):
    """A twin whose strengths are those of the token before."""
    return fast(chunk=8)(q, k, v, g, memory, strength.roll(1, -1))


def unsigned(q, k, v, g, memory, strength):
    """A twin that takes strengths for positive."""
    return fast(chunk=8)(q, k, v, g, memory, strength.abs())


def other_head(q, k, v, g, memory, strength):
    """A twin that gives a token the strength of another head."""
    return fast(chunk=8)(q, k, v, g, memory, strength.flip(1))


@pytest.mark.parametrize("twin", [late_strength, unsigned, other_head])
def test_wrong_strengths_are_caught(twin):
    given = [*inputs(4, 2, 19), draw_gate("scalar", 2, 19, D), draw(2, 2, D, DV, seed=9), draw_strength(2, 19)]
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float64"):
        verify(twin, strong(linear), given, terms=19 * D)


TIMES = [2, 1, 0, 3, 1]


@pytest.mark.parametrize("normalizer", [None, *POLICIES])
@pytest.mark.parametrize("mode", ["global", "causal", "packed"])
def test_a_strength_is_how_often_a_token_is_there(normalizer, mode):
    """Once more is as one more, in all that a normalizer divides by."""
    q, k, v = (x.exp() for x in inputs(4, 2, len(TIMES), batch=1))
    options = {"normalizer": normalizer, "return_state": True, "causal": mode != "global"}
    times = torch.tensor(TIMES)
    cu = [None, None] if mode != "packed" else [torch.tensor([0, 2, n]).int() for n in (5, 7)]
    if mode == "packed":
        cu[1][1] = 3
    many = [x.repeat_interleave(times, 2) for x in ((q, k, v) if mode != "global" else (k, v))]
    whole, after = linear_attention(*(many if mode != "global" else [q, *many]), cu_seqlens=cu[1], **options)
    o, left = linear_attention(q, k, v, strength=times.double().expand(1, 2, -1), cu_seqlens=cu[0], **options)
    present = times > 0
    last = torch.arange(5) if mode == "global" else times.cumsum(0) - 1
    close(o[:, :, present], whole[:, :, last[present]])
    close(left.memory, after.memory)


def weighing_values_alone(q, k, v, strength, **options):
    """A twin whose sums of keys know no strength."""
    return linear_attention(q, k, v * strength.unsqueeze(-1), **options)


def test_a_sum_of_keys_without_strengths_is_caught():
    q, k, v = (x.exp() for x in inputs())
    strength = draw_strength(2, 37).abs() + 1
    whole = linear_attention(q, k * strength.unsqueeze(-1), v, normalizer="sum")
    close(linear_attention(q, k, v, strength=strength, normalizer="sum"), whole)
    with pytest.raises(AssertionError, match="max error"):
        close(weighing_values_alone(q, k, v, strength, normalizer="sum"), whole)


@pytest.mark.parametrize(("gate", "normalizer"), COUNTED)
def test_strengths_go_with_their_tokens(gate, normalizer):
    """Token by token, in two parts and in packed sequences as at once."""
    tokens = 13
    q, k, v = (x.exp() for x in inputs(4, 2, tokens, batch=1))
    g, strength = draw_gate(gate, 4, tokens, D, batch=1), draw_strength(2, tokens, batch=1).abs() + 0.5

    def part(start, stop, state=None, **options):
        some = g if g is None or g.ndim == 1 else g[:, :, start:stop]
        given = {"log_decay": some, "strength": strength[:, :, start:stop], "normalizer": normalizer, "chunk": 4}
        tensors = (x[:, :, start:stop] for x in (q, k, v))
        return linear_attention(*tensors, **given, state=state, return_state=True, **options)

    whole, after = part(0, tokens)
    (first, a), (second, b) = part(0, 6), part(6, tokens)
    compare_states(a.compose(b), after, tokens * D)
    packed, _ = part(0, tokens, cu_seqlens=torch.tensor([0, 6, tokens]).int())
    assert torch.equal(packed, torch.cat([first, second], 2))
    state, rows = None, []
    for t in range(tokens):
        o, state = part(t, t + 1, state)
        rows.append(o)
    shifted = normalizer == "mean_shift"
    scale = cancelled(MeanShift(), q, k * strength.unsqueeze(-1), v) if shifted else 0.0
    close(torch.cat(rows, 2), whole, tokens * D, scale)
    compare_states(state, after, tokens * D)


def test_strengths_of_logarithmic_features():
    q, k, v = inputs(4, 2, 19)
    strength = draw_strength(2, 19).abs()  # sums that cancel would lose digits either way
    for causal in (True, False):
        plain = linear_attention(q.exp(), k.exp(), v, strength=strength, normalizer=Clamp(), causal=causal)
        o = linear_attention(q, k, v, strength=strength, feature_map="exp", normalizer=Clamp(), causal=causal, chunk=8)
        close(o, plain, 19 * D)


# More heads of values than of keys.


def many_valued(q_heads=2, tokens=19, batch=2):
    q, k, v = (draw(batch, h, tokens, d, seed=i) for i, (h, d) in enumerate(((q_heads, D), (2, D), (4, DV))))
    return q, k, v


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("q_heads", [2, 4])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_values_of_more_heads_than_keys(gate, q_heads, backend):
    given = [*many_valued(q_heads), draw_gate(gate, 4, 19, D), draw(2, 4, D, DV, seed=9), draw_strength(4, 19)]
    verify(fast(chunk=8, backend=backend), valued(strong(linear)), given, terms=19 * D)


def alternating(q, k, v, g, memory, strength):
    """A twin that gives head h of the values head h % Hkv of queries and keys."""
    order = [0, 2, 1, 3]
    o, last = fast(chunk=8)(q, k, v[:, order], g[:, order], memory[:, order], strength[:, order])
    return o[:, order], last[:, order]


def test_values_of_other_heads_are_caught():
    given = [*many_valued(), draw_gate("scalar", 4, 19, D), draw(2, 4, D, DV, seed=9), draw_strength(4, 19)]
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float64"):
        verify(alternating, valued(strong(linear)), given, terms=19 * D)


@pytest.mark.parametrize("q_heads", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"normalizer": "mean_shift"},
        {"normalizer": "sum", "feature_map": "exp"},
        {"causal": False, "normalizer": "mean_shift"},
        {"cu_seqlens": torch.tensor([0, 5, 19]).int(), "normalizer": "sum", "feature_map": "elu1"},
    ],
)
def test_more_heads_of_values_are_heads_of_keys_repeated(q_heads, options):
    q, k, v = many_valued(q_heads, batch=1)
    few = linear_attention(q, k, v, return_state=True, chunk=8, **options)
    many = linear_attention(per_head(q, 4), per_head(k, 4), v, return_state=True, chunk=8, **options)
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1].memory, many[1].memory)
    last = [
        linear_attention(*(x[:, :, :1] for x in y), normalizer="sum") for y in ((q, k, v), map(per_four, (q, k, v)))
    ]
    assert torch.equal(*last)


def per_four(x):
    return per_head(x, 4)


# What a query reads from all keys at once.


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_global_is_the_sum_over_all_keys(heads, groups):
    def plain(q, k, v, memory):
        k, v, memory = (per_head(x, heads) for x in (k, v, memory))
        return torch.einsum("bhnd,bhmd,bhme->bhne", q, k, v) + q @ memory, memory + k.mT @ v

    def everywhere(q, k, v, memory):
        state = State(memory.to(torch.promote_types(memory.dtype, torch.float32)))
        o, after = linear_attention(q, k, v, causal=False, state=state, return_state=True)
        return o, per_head(after.memory, heads)

    q, k, v = inputs(heads, groups, 19)
    # Keys need not be the queries' tokens.
    verify(everywhere, plain, [q[:, :, :11], k, v, draw(2, groups, D, DV, seed=9)], terms=19 * D)


MAPPED = [(n, "elu1") for n in (None, *POLICIES)] + [(n, "exp") for n in (None, Sum(), Sum(eps=0.5), Clamp())]


@pytest.mark.parametrize(("normalizer", "feature_map"), MAPPED)
def test_last_causal_row_is_global(normalizer, feature_map):
    q, k, v = inputs(4, 2, 19)
    options = {"feature_map": feature_map, "normalizer": normalizer, "scale": 0.7, "return_state": True}
    (causal, a), (everywhere, b) = (linear_attention(q, k, v, causal=c, **options) for c in (True, False))
    phi = {"elu1": features.elu1, "exp": torch.exp}[feature_map]
    scale = cancelled(normalizers.normalizer_of(normalizer), phi(q), phi(k), v)
    close(causal[:, :, -1], everywhere[:, :, -1], 19 * D, scale)
    close(a.memory, b.memory, 19 * D)
    with pytest.raises(AssertionError, match="max error"):
        close(causal[:, :, -2], everywhere[:, :, -2], 19 * D, scale)


def test_global_packed_is_the_loop():
    q, k, v = inputs(4, 2, 30, batch=1)
    ends = [0, 11, 12, 30]
    o = linear_attention(q, k, v, causal=False, normalizer="mean_shift", cu_seqlens=torch.tensor(ends).int())
    for start, stop in itertools.pairwise(ends):
        part = linear_attention(*(x[:, :, start:stop] for x in (q, k, v)), causal=False, normalizer="mean_shift")
        assert torch.equal(o[:, :, start:stop], part)


def weights_of(q, k, g, causal, scale):
    """scale q_i . k_j decayed, and the decay alone, (B, H, N, N); the decay a plain product of the gates between."""
    heads, tokens = q.shape[1], q.shape[2]
    left = q.new_ones(q.shape[0], heads, tokens, tokens)
    if g is not None:
        gates = per_head(g, heads).exp()
        for i in range(tokens):
            for j in range(i):
                left[:, :, i, j] = gates[:, :, j + 1 : i + 1].prod(-1)
    if causal:
        left = left.tril()
    return left * scale * (q @ per_head(k, heads).mT), left


def normalised(policy, q, k, v, g=None, causal=True, scale=1.0):
    """Every policy as weights over keys, written from its paper."""
    weights, left = weights_of(q, k, g, causal, scale)
    mass, count = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    match policy:
        case Sum(eps=eps):
            weights = weights / (mass + eps)
        case Clamp(least=least):
            weights = weights / torch.maximum(mass.abs(), torch.full_like(mass, least))
        case LengthPower(power=power):
            weights = weights / count**power
        case MeanShift():
            weights = weights / count + (1 - mass / count) * left / count
        case Magnitude():
            z = mass / count
            weights = (1 + 1 / z) * weights / count - z * left / count
    return weights, weights @ per_head(v, q.shape[1])


def cancelled(policy, q, k, v):
    """The magnitude of what a policy's weights add up, whatever their signs."""
    weights = normalised(policy, q, k, v)[0].abs()
    return (weights @ per_head(v, q.shape[1]).abs()).max()


@pytest.mark.parametrize("policy", [p for p in POLICIES if not isinstance(p, str)])
@pytest.mark.parametrize("mode", ["global", "causal", "gated", "gated a query head"])
def test_normalizers(policy, mode):
    tokens = 11
    causal, gated = mode != "global", "gated" in mode
    g = [draw_gate("scalar", 4 if "query" in mode else 2, tokens, D)] if gated else []
    q, k, v = inputs(4, 2, tokens)

    def quick(q, k, v, *g):
        return [
            linear_attention(
                q.exp(), k.exp(), v, log_decay=g[0] if g else None, normalizer=policy, causal=causal, scale=0.7, chunk=4
            )
        ]

    def plain(q, k, v, *g):
        return [normalised(policy, q.exp(), k.exp(), v, g[0] if g else None, causal, 0.7)[1]]

    verify(quick, plain, [q, k, v, *g], terms=tokens * D, dtypes=(torch.float64, torch.float32))


@pytest.mark.parametrize("policy", CONVEX)
@pytest.mark.parametrize("causal", [True, False])
def test_weights_that_should_add_up_to_one_do(policy, causal):
    q, k, v = inputs(4, 2, 11)
    o = linear_attention(q, k, torch.ones_like(v), feature_map="elu1", normalizer=policy, causal=causal, chunk=4)
    close(o, torch.ones_like(o), 11 * D, cancelled(policy, features.elu1(q), features.elu1(k), torch.ones_like(v)))


@pytest.mark.parametrize("policy", [MeanShift(), Magnitude()])
def test_shifted_weights_may_be_negative(policy):
    q, k, v = inputs(2, 2, 11)
    assert (normalised(policy, 3 * q.exp(), k.exp(), v)[0] < 0).any()


def test_length_power_a_head():
    power = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    q, k, v = inputs(4, 2, 11)
    o = linear_attention(q, k, v, normalizer=LengthPower(power), chunk=4)
    plain = linear(q, k, v)[0] / torch.arange(1, 12)[:, None] ** power.view(-1, 1, 1)
    close(o.detach(), plain.detach(), 11 * D)
    for a, b in zip(*(torch.autograd.grad(x.sum(), power) for x in (o, plain)), strict=True):
        close(a, b, 11 * D * 100)
    with pytest.raises(ValueError, match=r"power: got shape \(3,\) for 4 query heads; pass \(4,\)"):
        linear_attention(q, k, v, normalizer=LengthPower(power[:3]))


def test_no_mass_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in inputs())
    o = linear_attention(-q.square(), k, v, feature_map="relu", normalizer="sum")
    assert not o.any()
    o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


# Numerical traps.


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("tau", [16.0, 1.0, 0.1])
def test_steep_gates_do_not_overflow(gate, tau):
    """exp of minus a chunk's summed gate overflows float32 for tau = 0.1; no factor here is ever above 1."""
    tokens = 131
    shape = (2, 2, tokens, D) if gate == "vector" else (2, 2, tokens)
    g = gate_logsigmoid(draw(*shape, seed=3), tau)
    assert tau > 0.1 or float((-g.float())[:, :, :64].sum(2).max().exp()) == math.inf
    given = [*inputs(tokens=tokens), g]
    verify(
        lambda q, k, v, g: fast(chunk=64)(q, k, v, g, None),
        linear,
        given,
        terms=tokens * D,
        dtypes=(torch.float64, torch.float32),
    )


HOSTILE = [0.0, -0.0, -5.0, -50.0, -1e4, -1e30, -math.inf]


@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_gates(gate, value):
    """Gates of one value everywhere, and now and then between ordinary ones; gradients stay finite."""
    tokens = 19
    often, seldom = (draw_gate(gate, 2, tokens, D) for _ in range(2))
    often.fill_(value)
    seldom[..., ::3] = value
    if gate != "constant":
        seldom[:, :, ::7] = value
    for g in (often, seldom):
        given = [*inputs(4, 2, tokens), g, draw(2, 2, D, DV, seed=9)]
        verify(fast(chunk=8), linear, given, terms=tokens * D, dtypes=(torch.float64, torch.float32))
        _, gradients = differentiate(fast(chunk=8), given, torch.float32)
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_minus_infinity_is_a_new_sequence(gate):
    tokens, cut = 29, 13
    q, k, v = inputs(4, 2, tokens)
    g = draw_gate(gate, 2, tokens, D)
    g[:, :, cut] = -math.inf
    o, after = linear_attention(q, k, v, log_decay=g, return_state=True, chunk=8)
    rest, left = linear_attention(
        *(x[:, :, cut:] for x in (q, k, v)), log_decay=g[:, :, cut:], return_state=True, chunk=8
    )
    close(o[:, :, cut:], rest, tokens * D)
    close(after.memory, left.memory, tokens * D)
    assert (after.transition == -math.inf).all()


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_large_gate_costs_later_tokens_no_digits(gate):
    """Differences of running sums would lose what stands behind the point: here, every digit."""
    tokens = 16
    q, k, v = inputs(tokens=tokens, dtype=torch.float32)
    g = draw_gate(gate, 2, tokens, D).float()
    g[:, :, 0] = -1e9
    spared = g.clone()
    spared[:, :, 0] = 0
    a, b = (linear_attention(q, k, v, log_decay=x, chunk=tokens) for x in (g, spared))
    # Nothing came before the first token, so its gate has nothing to act on.
    assert torch.equal(a, b)


def summed(g):
    """A twin of `chunks.Lifted`: the exponential of the sum, which a large gate leaves few digits of."""
    return chunks.LIFT * torch.nn.functional.pad(g[..., 1:, :], (0, 0, 1, 0)).cumsum(-2).exp()


@pytest.mark.parametrize("apply", [chunks.Lifted.apply, summed])
def test_steep_gates_cost_later_tokens_no_digits(apply, monkeypatch):
    """After decays by a factor of exp(-70), tokens that hardly decay are weighed as exactly as without them."""
    tokens, gates = 64, torch.full((1, 2, 64, 1), -0.01)
    gates[:, :, 1:11] = -6.97
    exact = (gates.double().cumsum(2) - gates.double().cumsum(2).mT).tril().exp().tril()
    monkeypatch.setattr(chunks.Lifted, "apply", apply)
    q = k = torch.ones(1, 2, tokens, 1)
    weights = linear_attention(q, k, torch.eye(tokens).expand(1, 2, -1, -1), log_decay=gates)
    late = (..., slice(16, None), slice(16, None))
    eager = exact.float()[late]
    if apply is summed:
        with pytest.raises(AssertionError, match="max error"):
            assert_close(weights[late], exact[late], eager, terms=8)
    else:
        assert_close(weights[late], exact[late], eager, terms=8)


# Sums of a chunk's gates from hardly any to more than exp holds, in one product, in one of few tokens, and in none.
STEEPNESS = [0.01, 0.5, 1.0, 4.0, 40.0]


def ways(monkeypatch, g, chunk):
    """How many of the chunks' rows one product gives, and how many all are, while `linear_attention` runs."""
    seen = [0, 0]
    plain = chunks.VectorDecay.scores

    def scores(self, q, k):
        if q.ndim == 6:
            rows = torch.ones_like(self.g[..., :1]) if self.near is None else self.near
            seen[0] += int(rows.sum())
            seen[1] += rows.numel()
        return plain(self, q, k)

    monkeypatch.setattr(chunks.VectorDecay, "scores", scores)
    linear_attention(*inputs(tokens=g.shape[2]), log_decay=g, chunk=chunk)
    monkeypatch.undo()
    return seen


def test_gates_go_every_way(monkeypatch):
    shares = [near / rows for near, rows in (ways(monkeypatch, steep(s), 64) for s in STEEPNESS)]
    assert shares[0] == 1
    assert 0 < shares[-1] < shares[2] < 1


def steep(steepness, tokens=131):
    return -steepness * draw(2, 2, tokens, D, seed=3).exp()


@pytest.mark.parametrize("steepness", STEEPNESS)
def test_vector_gates_of_any_steepness(steepness):
    tokens = 131
    given = [*inputs(4, 2, tokens), steep(steepness), draw(2, 2, D, DV, seed=9)]
    verify(fast(chunk=64), linear, given, terms=tokens * D, dtypes=(torch.float64, torch.float32))


def test_a_product_beyond_what_exp_holds_is_caught(monkeypatch):
    """The twin takes every row by one product."""
    every = property(lambda decay: None, lambda decay, near: None)
    monkeypatch.setattr(chunks.VectorDecay, "near", every, raising=False)
    given = [*inputs(4, 2, 131), steep(4.0), draw(2, 2, D, DV, seed=9)]
    with pytest.raises(AssertionError, match="output 0"):
        verify(fast(chunk=64), linear, given, terms=131 * D, dtypes=(torch.float32,))


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("later", [0.01, 4.0, 1e4, math.inf])
def test_later_gates_leave_the_past_alone_bitwise(gate, later):
    tokens = 131
    given = inputs(4, 2, tokens, dtype=torch.float32)
    g = 0.3 * draw_gate(gate, 2, tokens, D).float()
    before = linear_attention(*given, log_decay=g)
    for now in (0, 20, 63, 64, 100, 129):
        changed = g.clone()
        changed[:, :, now + 1 :] = -later
        after = linear_attention(*given, log_decay=changed)
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_one_sequence_a_time_under_vmap(gate):
    q, k, v = inputs(4, 2, 37)
    g = draw_gate(gate, 2, 37, D)
    g[1] *= 40
    whole = linear_attention(q, k, v, log_decay=g, chunk=16)
    mapped = torch.func.vmap(
        lambda q, k, v, g: linear_attention(*(x[None] for x in (q, k, v)), log_decay=g[None], chunk=16)[0]
    )
    close(mapped(q, k, v, g), whole, 37 * D)


@pytest.mark.parametrize("steepness", STEEPNESS)
def test_second_derivatives_of_vector_gates(steepness):
    q, k, v = inputs(2, 1, 19, batch=1, dim=2)
    g = -steepness * draw(1, 1, 19, 2, seed=3).exp()
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    call = torch.autograd.gradgradcheck
    assert call(lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, chunk=18), leaves, fast_mode=True)


@pytest.mark.parametrize("gate", GATES)
def test_states_are_float32_or_wider(gate):
    given = inputs(4, 2, 9, dtype=torch.bfloat16)
    g = draw_gate(gate, 2, 9, D)
    o, after = linear_attention(*given, log_decay=g, return_state=True, chunk=4)
    assert o.dtype == torch.bfloat16
    assert after.memory.dtype == torch.float32
    assert g is None or after.transition.dtype == torch.float32
    o, after = linear_attention(
        *(x.double() for x in given), log_decay=g if g is None else g.float(), return_state=True
    )
    assert o.dtype == after.memory.dtype == torch.float64


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(gate, dtype):
    given = inputs(4, 2, 19, dtype=dtype)
    g = draw_gate(gate, 2, 19, D)
    g = None if g is None else g.float()
    narrow, wide = (linear_attention(*(x.to(t) for x in given), log_decay=g, chunk=8) for t in (dtype, torch.float32))
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_autocast_is_ignored(gate):
    given, g = inputs(4, 2, 19, dtype=torch.float32), draw_gate(gate, 2, 19, D)
    plain = linear_attention(*given, log_decay=g, chunk=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_attention(*given, log_decay=g, chunk=8)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("options", [{}, {"normalizer": "sum"}, {"feature_map": "exp", "normalizer": "sum"}])
def test_the_future_leaves_the_past_alone_bitwise(gate, options):
    tokens = 29
    q, k, v = inputs(4, 2, tokens, dtype=torch.float32)
    g = draw_gate(gate, 2, tokens, D)
    before = linear_attention(q, k, v, log_decay=g, chunk=8, **options)
    for now in (0, 3, 8, 14, 27):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, now + 1 :] *= 30
        after = linear_attention(*changed, log_decay=g, chunk=8, **options)
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])
        assert not torch.equal(before, after)


@pytest.mark.parametrize(("gate", "which"), [*((g, x) for g in GATES for x in "qkv"), ("scalar", "g"), ("vector", "g")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_spoils_no_earlier_one(gate, which, bad):
    tokens, at = 19, 5
    given = dict(zip("qkv", inputs(4, 2, tokens), strict=True), g=draw_gate(gate, 2, tokens, D))
    clean = linear(given["q"], given["k"], given["v"], given["g"])[0]
    given[which] = given[which].clone()
    given[which][0, 0, at] = bad
    o = linear_attention(given["q"], given["k"], given["v"], log_decay=given["g"], chunk=8)
    truth = linear(given["q"], given["k"], given["v"], given["g"])[0]
    assert truth.isfinite()[:, :, :at].all()
    assert not truth[0, 0, at:].isfinite().all()
    close(o[:, :, :at], clean[:, :, :at], tokens * D)
    close(o[1], clean[1], tokens * D)
    assert torch.equal(o.isfinite(), truth.isfinite())


class Largest(TorchDispatchMode):
    """The number of elements in the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("gate", "causal"), [*((gate, True) for gate in GATES), ("none", False)])
def test_memory_is_linear_in_the_tokens(gate, causal):
    largest = []
    for tokens in (512, 1024):
        q, k, v = inputs(1, 1, tokens, batch=1, dtype=torch.float32)
        q.requires_grad_()
        g = draw_gate(gate, 1, tokens, D, batch=1)
        with Largest() as seen:
            linear_attention(q, k, v, log_decay=g, causal=causal, chunk=16).sum().backward()
        largest.append(seen.elements)
        assert seen.elements <= tokens * 32
    assert largest[1] <= 2 * largest[0]


def test_strided_inputs():
    q, k, v = inputs(4, 2, 19)
    g = draw_gate("vector", 2, 19, D)
    plain = linear_attention(q, k, v, log_decay=g, chunk=8)

    def strided(x):
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]

    def turned(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for view in (strided, turned):
        close(linear_attention(*map(view, (q, k, v)), log_decay=view(g), chunk=8), plain, 19 * D)


def test_compiles():
    given, g = inputs(4, 2, 19), draw_gate("scalar", 2, 19, D)
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, backend="eager")(*given, log_decay=g, normalizer="sum", chunk=8)
    torch.compiler.reset()
    close(compiled, linear_attention(*given, log_decay=g, normalizer="sum", chunk=8))


def call(q=None, k=None, v=None, **options):
    a, b, c = inputs(4, 2, 7)
    return linear_attention(a if q is None else q, b if k is None else k, c if v is None else v, **options)


ERRORS = [
    ({"k": torch.zeros(2, 2, 7, D)}, TypeError, "k: got dtype torch.float32"),
    ({"chunk": 0}, ValueError, "chunk: got 0"),
    ({"backend": "tryton"}, ValueError, "backend: got 'tryton'; choose one of auto, reference, chunked, triton"),
    ({"normalizer": "softmax"}, ValueError, "normalizer: got 'softmax'; choose one of sum"),
    ({"normalizer": 3}, TypeError, "normalizer: got int"),
    ({"feature_map": "gelu"}, ValueError, "feature_map: got 'gelu'; choose one of elu1"),
    ({"feature_map": 3}, TypeError, "feature_map: got 3"),
    ({"feature_map": (torch.relu, "elu1")}, TypeError, "feature_map: got"),
    ({"feature_map": (torch.relu, lambda x: x[..., :2])}, ValueError, "feature_map: got 5 features for queries and 2"),
    ({"q": draw(2, 4, 3, D)}, ValueError, "k: got 7 tokens beside q's 3; causal"),
    (
        {"q": draw(2, 4, 3, D), "causal": False, "cu_seqlens": torch.tensor([0, 3])},
        ValueError,
        "cu_seqlens: got q with 3",
    ),
    ({"log_decay": torch.zeros(2), "causal": False}, ValueError, "log_decay: got one with causal=False"),
    ({"log_decay": 0.5}, TypeError, "log_decay: got float"),
    ({"log_decay": torch.zeros(2).long()}, TypeError, "log_decay: got torch.int64"),
    ({"v": draw(2, 3, 7, DV)}, ValueError, "v: got 3 heads beside q's 4 and k's 2; more than k's must be a multiple"),
    ({"v": draw(2, 8, 7, DV)}, ValueError, "v: got 8 heads beside q's 4 and k's 2; .* q needs as many as k or as v"),
    ({"v": draw(2, 4, 6, DV)}, ValueError, r"v: got \(heads, tokens\)"),
    ({"strength": 0.5}, TypeError, "strength: got float; pass a floating-point tensor"),
    ({"strength": torch.ones(2, 2, 7).long()}, TypeError, "strength: got torch.int64"),
    ({"strength": torch.ones(2, 4, 7)}, ValueError, r"strength: got shape \(2, 4, 7\); pass .*\(2, 2, 7\)"),
    ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay: got shape \(3,\); pass \(heads,\), \(2, heads, 7\)"),
    ({"log_decay": torch.zeros(2, 2, 7, 1)}, ValueError, r"log_decay: got shape \(2, 2, 7, 1\).* with 2 or 4 heads"),
    (
        {"log_decay": torch.zeros(2, 2, 7, D), "normalizer": "mean_shift"},
        ValueError,
        "normalizer: MeanShift counts tokens",
    ),
    ({"feature_map": "exp", "normalizer": "length_power"}, ValueError, "normalizer: LengthPower weighs keys"),
    (
        {"state": State(torch.zeros(2, 4, D, DV))},
        ValueError,
        r"state: got a memory \(2, 4, 5, 3\).* one of \(2, 2, 5, 3\)",
    ),
    (
        {"state": State(torch.zeros(2, 2, D, DV), shift=torch.zeros(2, 2, 1, 1))},
        ValueError,
        "state: got one with a log",
    ),
    ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens: got batch 2"),
]


@pytest.mark.parametrize(("options", "kind", "message"), ERRORS)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        call(**options)


def test_packed_states_are_counted():
    q, k, v = inputs(4, 2, 7, batch=1)
    with pytest.raises(ValueError, match="state: got 1 memories for 2 sequences"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 7]), state=State(torch.zeros(1, 2, D, DV)))


def test_clamp_needs_a_positive_bound():
    with pytest.raises(ValueError, match="least: got 0; pass a denominator > 0"):
        Clamp(least=0)


# Decay schedules.


def test_retention():
    exact = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(16)], dtype=torch.float64).log()
    found = decays.retention(16)
    assert_close(found, exact, exact.float())


def test_alibi_and_transnormer_differ():
    exact = torch.tensor([-(2.0 ** (-8 * h / 6)) for h in range(1, 7)], dtype=torch.float64)
    assert_close(decays.alibi(6), exact, exact.float())
    deep = torch.tensor([-(8 * h / 6) * (1 - 2 / 3) for h in range(6)], dtype=torch.float64)
    assert_close(decays.transnormer(6, 2, 3), deep, deep.float())
    assert decays.transnormer(6, 2, 3)[0] == 0
    for schedule in (decays.retention(6), decays.alibi(6), decays.transnormer(6, 0, 3)):
        assert schedule.dtype == torch.float32
        assert (schedule <= 0).all()


@pytest.mark.parametrize("least", [0.0, 0.3, torch.tensor([0.0, 0.3])])
def test_bounded_gate(least):
    x = torch.tensor([[-3.0, 2.0], [0.5, -0.5]], dtype=torch.float64)
    exact = (least + (1 - least) * x.sigmoid()).log()
    for dtype in (torch.float64, torch.float32):
        found = decays.gate_bounded(x.to(dtype), least)
        assert found.dtype == dtype
        assert_close(found, exact, exact.to(dtype), terms=9)
    assert torch.equal(decays.gate_bounded(x, 0.0), torch.nn.functional.logsigmoid(x))


@pytest.mark.parametrize("least", [0.0, 0.3])
def test_gates_far_out_are_finite_and_so_are_their_gradients(least):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    for g in (decays.gate_logsigmoid(x), decays.gate_bounded(x, least)):
        assert g.isfinite().all()
        assert (g <= 0).all()
        assert torch.autograd.grad(g.sum(), x)[0].isfinite().all()
    assert decays.gate_logsigmoid(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decays.gate_logsigmoid(torch.zeros(1), 0), "tau: got 0"),
        (lambda: decays.gate_bounded(torch.zeros(1), 1.0), "least: got 1.0"),
        (lambda: decays.transnormer(2, 3, 3), "layer: got 3 of num_layers 3"),
        (lambda: decays.retention(0), "num_heads: got 0"),
    ],
)
def test_bad_schedules(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("file", ["linear_attention", "decays", "normalizers", "chunks"])
def test_examples(file):
    # The package's attribute of that name is the function.
    assert not doctest.testmod(importlib.import_module(f"saccade.scan.{file}")).failed
