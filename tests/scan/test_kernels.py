"""The kernels of linear attention against the recurrence token by token, values and every gradient.

On a CPU they run in Triton's interpreter, with tiles so small that a short sequence has many; on a GPU with their own.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from recurrences import (
    GATES,
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

from saccade.scan import kernels
from saccade.scan.kernels import abreast, launch, ops, tiles
from saccade.scan.kernels.launch import Sizes, Tile
from saccade.scan.kernels.together import one_by_one
from saccade.scan.linear_attention import linear_attention
from saccade.scan.normalizers import MeanShift, Sum
from saccade.scan.state import State
from saccade.testing.budget import assert_close

D, DV, TOKENS = 20, 17, 37  # two blocks of channels each, three chunks
SCALE = 0.7
WIDE = (torch.float32,)
CHOSEN = Sizes.of


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, *problem: cls(16, Tile(16, 4, 1))))


@pytest.fixture
def stretches(monkeypatch):
    monkeypatch.setattr(launch, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1000)


def inputs(heads=2, groups=1, tokens=TOKENS, dim=D, dv=DV, batch=1):
    shapes = ((heads, dim), (groups, dim), (groups, dv))
    return [draw(batch, h, tokens, d, seed=i) for i, (h, d) in enumerate(shapes)]


def fast(**options):
    """q, k, v, g, memory and, if any, strength -> (o, last memory a query head)."""

    def call(q, k, v, g, memory, strength=None):
        given = {"log_decay": g, "strength": strength, "state": None if memory is None else State(memory.float())}
        o, after = linear_attention(q, k, v, **given, return_state=True, backend="triton", scale=SCALE, **options)
        return o, per_head(after.memory, o.shape[1])

    return call


def positive(call):
    """With queries and keys whose products a normalizer may add up."""
    return lambda q, k, v, g, memory: call(q.exp(), k.exp(), v, g, memory)


def plain(normalizer=None):
    """The same, token by token; memories have a last column and row where the normalizer has."""

    def call(q, k, v, g, memory):
        if normalizer is None:
            return linear(q * SCALE, k, v, g, memory)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        dim, ones = k.shape[-1], torch.ones_like(k[..., :1])
        o, last = linear(q * SCALE, k, v, g, None if memory is None else memory[:, :, :dim])
        numerator, mass = o.split([v.shape[-1] - 1, 1], -1)
        if isinstance(normalizer, Sum):
            return numerator / (mass + normalizer.eps), last
        every = per_head(ones, k.shape[1] if g is None or g.ndim == 1 else g.shape[1])
        sums, rest = linear(every, ones, v, g, None if memory is None else memory[:, :, dim:])
        sums = per_head(sums, q.shape[1])
        total, count = sums.split([v.shape[-1] - 1, 1], -1)
        return (numerator + (1 - mass / count) * total) / count, torch.cat([last, per_head(rest, q.shape[1])], 2)

    return call


def products(gate, tokens, dim):
    """Behind one entry of any result; the gradient of a constant gate is a sum over tokens of sums over tokens."""
    return tokens * dim * (tokens if gate == "constant" else 1)


def problem(gate, gate_heads="key", heads=2, groups=1, tokens=TOKENS, dim=D, dv=DV, batch=1, memory=True):
    kept = groups if gate_heads == "key" or gate == "none" else heads
    given = [*inputs(heads, groups, tokens, dim, dv, batch), draw_gate(gate, kept, tokens, dim, batch)]
    return [*given, draw(batch, kept, dim, dv, seed=9) if memory else None]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_heads", ["key", "query"])
def test_is_the_recurrence(gate, gate_heads):
    batch = 2 if gate_heads == "key" else 1
    verify(fast(), plain(), problem(gate, gate_heads, batch=batch), terms=products(gate, TOKENS, D), dtypes=WIDE)


@pytest.mark.parametrize("gate", GATES)
def test_one_product_for_all_pairs_of_a_chunk(gate, monkeypatch):
    """What narrow dtypes do with harmless gates, and with others beside them."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    monkeypatch.setattr(launch, "ANCHORED", 32)
    given = problem(gate, dim=5, dv=3, tokens=70)
    verify(fast(), plain(), given, terms=products(gate, 70, 5) * 64, dtypes=WIDE)
    if gate in ("scalar", "vector"):
        given[3][:, :, 20:30] *= 50
        verify(fast(), plain(), given, terms=products(gate, 70, 5) * 64, dtypes=WIDE)


def test_sums_under_all_that_half_a_chunk_bears(monkeypatch):
    """Of pairs that are none, read early and written late in a chunk, the factors grow to more than there is."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    q, k, v, g, _ = problem("scalar", dim=5, dv=3, tokens=70)
    half = launch.Sizes.of(5, 3, torch.float32, 1).chunk // 2
    given = [q, k, v, torch.full_like(g, -0.9 * tiles.SAFE.value / half), draw(1, g.shape[1], 5, 4, seed=9).exp()]
    terms = products("scalar", 70, 5) * 64
    verify(positive(fast(normalizer="sum")), positive(plain(Sum())), given, terms=terms, dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_products_of_a_wide_state_are_apart(gate, monkeypatch):
    monkeypatch.setattr(launch.Launch, "exact", False)
    given = problem(gate, dim=130, dv=3)
    if gate != "none":
        given[3][:, :, 20:30] *= 50
    verify(fast(), plain(), given, terms=products(gate, TOKENS, 130) * 64, dtypes=WIDE)


def strengths(given, positive=False):
    """A problem with one more argument: how much each token writes."""
    found = draw_strength(given[1].shape[1], given[1].shape[2], given[1].shape[0])
    return [*given, found.abs() + 0.5 if positive else found]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_heads", ["key", "query"])
def test_strengths(gate, gate_heads):
    given = strengths(problem(gate, gate_heads, batch=2))
    verify(fast(), strong(plain()), given, terms=products(gate, TOKENS, D), dtypes=WIDE)


@pytest.mark.parametrize("gate", ["constant", "scalar"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("steep", [False, True])
def test_strengths_of_pairs_in_one_product(gate, count, steep, monkeypatch):
    """Also of chunks whose pairs have an exponential each, and of gradients in stretches."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    monkeypatch.setattr(launch.Launch, "stretches_back", count)
    monkeypatch.setattr(launch.Launch, "stretches", count)
    monkeypatch.setattr(launch, "ANCHORED", 32)
    given = strengths(problem(gate, dim=5, dv=3, tokens=70))
    if steep:
        given[3] = given[3] * 50
    verify(fast(), strong(plain()), given, terms=products(gate, 70, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("normalizer", [Sum(eps=0.5), MeanShift()])
@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_strengths_weigh_sums_of_keys(gate, normalizer, exact, monkeypatch):
    """In all that a normalizer divides by: a token's number too."""
    monkeypatch.setattr(launch.Launch, "exact", exact)
    monkeypatch.setattr(launch, "ANCHORED", 16)
    q, k, v, g, _ = problem(gate, dim=5, dv=3)
    given = strengths([q.exp(), k.exp(), v, g, None], positive=True)

    def call(backend):
        def run(q, k, v, g, memory, strength):
            options = {"log_decay": g, "strength": strength, "normalizer": normalizer, "backend": backend}
            o, after = linear_attention(q, k, v, **options, return_state=True)
            return o, after.memory

        return run

    verify(call("triton"), call("reference"), given, terms=TOKENS * 5 * 64, dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_packed_strengths(gate):
    q, k, v, g, _ = problem(gate, tokens=40, dim=5, dv=3)
    given = strengths([q, k, v, g, draw(4, 1, 5, 3, seed=9)])

    def packed(q, k, v, g, memory, strength):
        cu = torch.tensor([0, 3, 20, 21, 40], dtype=torch.int32)
        options = {"log_decay": g, "strength": strength, "cu_seqlens": cu, "state": State(memory)}
        o, after = linear_attention(q, k, v, **options, return_state=True)
        return o, after.memory

    def ours(*given):
        return packed_with("triton", packed, *given)

    def theirs(*given):
        return packed_with("reference", packed, *given)

    verify(ours, theirs, given, terms=products(gate, 40, 5), dtypes=WIDE)


@pytest.mark.parametrize("gate", ["constant", "scalar"])
def test_strengths_in_half_precision(gate):
    given = strengths(problem(gate, tokens=33, dim=5, dv=3, memory=False))
    verify(fast(), strong(plain()), given, terms=products(gate, 33, 5), dtypes=(torch.float16,))


def test_small_strengths_of_large_values_in_half_precision(monkeypatch):
    """The gradient of a key without its strength may be more than float16 holds."""
    *given, strength = strengths(problem("scalar", tokens=33, dim=5, dv=3, memory=False))
    given[2] = given[2] * 1e4

    def gradient_is_finite():
        return differentiate(fast(), [*given, strength * 1e-3], torch.float16)[1][1].isfinite().all()

    assert gradient_is_finite()
    token_gradients = launch.Launch.token_gradients

    def halved(self, cuts, anchors, dq, dk):
        flows, found = token_gradients(self, cuts, anchors, dq, dk)
        return one_by_one(lambda: dk.copy_(dk.half()), flows), found

    monkeypatch.setattr(launch.Launch, "token_gradients", halved)
    assert not gradient_is_finite()


@pytest.mark.parametrize(("lost", "found"), [(0, "output 0"), (1, "gradient 0"), (2, "gradient 2")])
def test_a_walk_without_strengths_is_caught(lost, found, monkeypatch):
    """For each of o, dq and dv, in that order."""
    walk, strong_ones = launch.Launch.walk, itertools.count()

    def forgetful(self, *given, strength=None, **options):
        forgets = strength is not None and next(strong_ones) == lost
        walk(self, *given, strength=None if forgets else strength, **options)

    monkeypatch.setattr(launch.Launch, "walk", forgetful)
    check_is_off(strengths(problem("scalar", dim=5, dv=3)), strong(plain()), found)


def check_is_off(given, truth, found):
    """One of the results, by its name, of all that `verify` compares."""
    kind, at = found.split()
    exact, ours = differentiate(truth, given, torch.float64), differentiate(fast(), given, torch.float32)
    t, a = (results[kind == "gradient"][int(at)] for results in (exact, ours))
    with pytest.raises(AssertionError, match=found):
        assert_close(a, t, t.float(), terms=TOKENS * 5, name=found)


def many_valued(gate, q_heads=2, tokens=TOKENS, dim=D, dv=DV, batch=1):
    """Heads of values that share queries and keys, or keys alone, with strengths."""
    shapes = ((q_heads, dim), (2, dim), (6, dv))
    tensors = [draw(batch, h, tokens, d, seed=i) for i, (h, d) in enumerate(shapes)]
    memory = draw(batch, 6, dim, dv, seed=9)
    return [*tensors, draw_gate(gate, 6, tokens, dim, batch), memory, draw_strength(6, tokens, batch)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("q_heads", "exact"), [(2, True), (6, False)])
def test_values_of_more_heads_than_keys(gate, q_heads, exact, monkeypatch):
    monkeypatch.setattr(launch.Launch, "exact", exact)
    monkeypatch.setattr(launch, "ANCHORED", 16)
    given = many_valued(gate, q_heads, dim=5, dv=3, batch=2)
    verify(fast(), valued(strong(plain())), given, terms=products(gate, TOKENS, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize("q_heads", [2, 6])
@pytest.mark.parametrize("count", [1, 3])
def test_values_of_more_heads_in_stretches(q_heads, count, monkeypatch):
    """With a normalizer, packed."""
    monkeypatch.setattr(launch.Launch, "stretches", count)
    monkeypatch.setattr(launch.Launch, "stretches_back", count)
    q, k, v, g, _, strength = many_valued("scalar", q_heads, tokens=40, dim=5, dv=3)
    memory = draw(3, 6, 5, 4, seed=9).exp()

    def packed(q, k, v, g, memory, strength):
        cu = torch.tensor([0, 3, 21, 40], dtype=torch.int32)
        options = {"log_decay": g, "strength": strength, "cu_seqlens": cu, "state": State(memory)}
        o, after = linear_attention(q.exp(), k.exp(), v, **options, normalizer="sum", return_state=True)
        return o, after.memory

    def ours(*given):
        return packed_with("triton", packed, *given)

    def theirs(*given):
        return packed_with("reference", packed, *given)

    verify(ours, theirs, [q, k, v, g, memory, strength.abs() + 0.5], terms=40 * 5, dtypes=WIDE)


@pytest.mark.parametrize(("left_out", "found"), [(2, "gradient 0"), (3, "gradient 1"), (3, "gradient 5")])
def test_a_head_without_its_share_is_caught(left_out, found, monkeypatch):
    """Of the gradients of q and k, which heads share, and of the strength: what one head gives is left out."""
    flows = launch.head_flows

    class Forgetful:
        def __getitem__(self, grid):
            def run(*given, **options):
                given[left_out].x[:, 1] = 0
                flows[grid](*given, **options)

            return run

    monkeypatch.setattr(launch, "head_flows", Forgetful())
    check_is_off(many_valued("scalar", dim=5, dv=3), valued(strong(plain())), found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as the twin overflows
def test_a_chunk_too_steep_for_one_product_is_told(monkeypatch):
    """A twin that takes every chunk of a decay a token at once."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    given = problem("scalar", dim=5, dv=3)
    given[3][:, :, 5:30] = -50
    verify(fast(), plain(), given, terms=products("scalar", TOKENS, 5) * 64, dtypes=WIDE)
    monkeypatch.setattr(tiles, "SAFE", triton.language.constexpr(1e30))
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(fast(), plain(), given, terms=products("scalar", TOKENS, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
@pytest.mark.parametrize("count", [2, 3])
def test_whole_sequences_whose_gradients_are_cut(gate, count, monkeypatch):
    """Forward a program takes a sequence whole; gradients begin with the states that a cut one would have left."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    monkeypatch.setattr(launch, "ANCHORED", 16)
    monkeypatch.setattr(launch.Launch, "stretches", 1)
    monkeypatch.setattr(launch.Launch, "stretches_back", count)
    verify(fast(), plain(), problem(gate, dim=5, dv=3), terms=products(gate, TOKENS, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize(
    ("batch", "tokens", "none", "scalar", "vector"),
    [
        (8, 8192, (1, 1), (1, 1), (1, 2)),  # programs for nearly all multiprocessors
        (1, 8192, (8, 8), (16, 16), (16, 16)),
        (1, 256, (2, 2), (1, 1), (2, 2)),  # too short to be cut as often
        (32, 8192, (1, 1), (1, 1), (1, 1)),
    ],
)
def test_how_often_sequences_are_cut(batch, tokens, none, scalar, vector, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    q = torch.empty(batch, 16, tokens, 16, device="meta", dtype=torch.bfloat16)
    for g, cut in ((None, none), (q[..., 0].float(), scalar), (q.float(), vector)):
        found = launch.Launch(q, q, q, g, None, 1.0, False)
        assert (found.stretches, found.stretches_back) == cut


@pytest.mark.parametrize(("batch", "tokens", "cut"), [(4, 4096, 1), (1, 16384, 4)])
def test_programs_of_wide_states_share_no_multiprocessor(batch, tokens, cut, monkeypatch):
    monkeypatch.setattr(Sizes, "of", CHOSEN)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    q = torch.empty(batch, 16, tokens, 256, device="meta", dtype=torch.bfloat16)
    for g in (None, q[..., 0].float(), q.float()):
        found = launch.Launch(q, q, q, g, None, 1.0, False)
        assert (found.stretches, found.stretches_back) == (cut, cut)
        for reverse, anchored in itertools.product((False, True), repeat=2):
            gate = 3 if anchored and found.gate == 2 else found.gate
            assert found.tile(256, 256, gate, reverse, anchored) == Tile(64 if anchored else 128, 8, 2)


EMPTY = torch.Tensor.new_empty


def strong_beside_weak(gate, cut, monkeypatch):
    """Some stretches have a harmful chunk, some none, some no chunk at all; with a normalizer, and packed."""
    monkeypatch.setattr(launch.Launch, "exact", False)
    monkeypatch.setattr(launch.Launch, "stretches", cut)
    monkeypatch.setattr(launch, "ANCHORED", 16)
    ends = [0, 53, 60, 100]
    q, k, v, g, _ = problem(gate, tokens=100, dim=5, dv=3)
    g[:, :, 20:24] *= 100
    memory = draw(3, 1, 5, 4, seed=9).exp()

    def packed(q, k, v, g, memory):
        cu = torch.tensor(ends, dtype=torch.int32, device=q.device)
        o, after = linear_attention(
            q.exp(), k.exp(), v, log_decay=g, cu_seqlens=cu, state=State(memory), return_state=True, normalizer="sum"
        )
        return o, after.memory

    def ours(*given):
        return packed_with("triton", packed, *given)

    def theirs(*given):
        return packed_with("reference", packed, *given)

    verify(ours, theirs, [q, k, v, g, memory], terms=products(gate, 100, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("cut", [1, 3])
def test_harmful_chunks_beside_harmless_ones(gate, cut, monkeypatch):
    strong_beside_weak(gate, cut, monkeypatch)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_stretches_that_no_kernel_walks_over_are_told(gate, monkeypatch):
    """A twin that launches the kernel of harmless ones alone; memory that is not written to is no number here."""
    monkeypatch.setattr(launch.Launch, "splits", lambda self, gate, read: ["made"])
    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        strong_beside_weak(gate, 3, monkeypatch)


def unwritten(x, *shape, **options):
    """In place of `Tensor.new_empty`."""
    found = EMPTY(x, *shape, **options)
    return found.fill_(torch.nan) if found.is_floating_point() else found


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_half_precision_and_lengths(gate, tokens):
    given = problem(gate, tokens=tokens, dim=5, dv=3, memory=False)
    verify(fast(), plain(), given, terms=products(gate, tokens, 5), dtypes=(torch.float16,))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("stretches")
def test_stretches_of_a_sequence_are_joined(gate):
    q, k, v, g, memory = problem(gate, heads=1, tokens=5 * 16 + 3, dim=5)
    memory = torch.cat([memory, draw(1, 1, 5, 1, seed=8).exp()], -1)

    given = [q, k, v, g, memory]
    assert launch.Launch(*(x.float() for x in (q, k, v)), None, None, 1.0, False).stretches == 6
    verify(positive(fast(normalizer="sum")), positive(plain(Sum())), given, terms=products(gate, 83, 5), dtypes=WIDE)


@pytest.mark.parametrize(
    ("gate", "normalizer"), [*((gate, Sum(eps=0.5)) for gate in GATES), ("none", MeanShift()), ("scalar", MeanShift())]
)
def test_normalizers(gate, normalizer):
    q, k, v, g, memory = problem(gate, "query", tokens=19)
    kept, counts = memory.shape[1], isinstance(normalizer, MeanShift)
    memory = draw(1, kept, D + counts, DV + 1, seed=9).exp()

    given = [q, k, v, g, memory]
    verify(
        positive(fast(normalizer=normalizer)),
        positive(plain(normalizer)),
        given,
        terms=products(gate, 19, D),
        dtypes=WIDE,
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("options", "cut"), [({}, 2), ({"normalizer": "sum", "feature_map": "elu1"}, 1)])
def test_packed_is_the_loop(gate, options, cut, monkeypatch):
    """cut: stretches a sequence, some of which have no chunk."""
    monkeypatch.setattr(launch.Launch, "stretches", cut)
    ends = [0, 3, 20, 21, 40]
    q, k, v, g, _ = problem(gate, tokens=40, dim=5, dv=3)
    memory = draw(4, 1, 5, 3 + bool(options), seed=9).exp()

    def packed(q, k, v, g, memory):
        cu = torch.tensor(ends, dtype=torch.int32, device=q.device)
        o, after = linear_attention(
            q, k, v, log_decay=g, cu_seqlens=cu, state=State(memory), return_state=True, **options
        )
        return (o, after.memory) if g is None else (o, after.memory, after.transition)

    def ours(*given):
        return packed_with("triton", packed, *given)

    def theirs(*given):
        return packed_with("reference", packed, *given)

    verify(ours, theirs, [q, k, v, g, memory], terms=products(gate, 40, 5), dtypes=WIDE)


def packed_with(backend, call, *given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "__kwdefaults__", linear_attention.__kwdefaults__ | {"backend": backend})
        return call(*given)


@pytest.mark.parametrize("gate", ["none", "vector"])
def test_logarithmic_features(gate):
    """Their running scale is a decay of its own."""
    q, k, v, g, _ = problem(gate, tokens=19)

    def call(backend):
        return lambda q, k, v, g: [
            linear_attention(4 * q, 4 * k, v, log_decay=g, feature_map="exp", normalizer="sum", backend=backend)
        ]

    verify(call("triton"), call("reference"), [q, k, v, g], terms=products(gate, 19, D), dtypes=WIDE)


HOSTILE = [0.0, -50.0, -1e30, -math.inf]


@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_gates(gate, value):
    """Gates of one value everywhere, and now and then between ordinary ones; gradients stay finite."""
    given = problem(gate, dim=5, dv=3)
    often, seldom = given[3].clone(), given[3].clone()
    often.fill_(value)
    if gate == "constant":
        seldom[:] = value / 2
    else:
        seldom[:, :, ::7] = value
        seldom[..., ::3] = value
    for g in (often, seldom):
        given[3] = g
        verify(fast(), plain(), given, terms=products(gate, TOKENS, 5), dtypes=WIDE)
        _, gradients = differentiate(fast(), given, torch.float32)
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_large_gate_costs_later_tokens_no_digits(gate):
    q, k, v, g, _ = (None if x is None else x.float() for x in problem(gate, dim=5, memory=False))
    g[:, :, 16] = -1e3
    o, rest = (
        linear_attention(
            *(x[:, :, first:] for x in (q, k, v)), log_decay=g[:, :, first:], backend="triton", state=None
        )[:, :, 16 - first :]
        for first in (0, 16)
    )
    assert torch.equal(o, rest)


def forgetful(q, k, v, g, memory):
    """A twin that starts from nothing."""
    walk = launch.Launch.walk

    def late(*given, first, **options):
        return walk(*given, first=None, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "walk", late)
        return fast()(q, k, v, g, memory)


def interleaved(q, k, v, g, memory):
    """A twin that gives query head h the key head h % Hkv."""
    order = [0, 2, 1, 3]
    o, last = fast()(q[:, order], k, v, g, memory)
    return o[:, order], last[:, order]


def late_gate(q, k, v, g, memory):
    """A twin whose gates act one token too late."""
    return fast()(q, k, v, torch.cat([g[:, :, :1], g[:, :, :-1]], 2), memory)


@pytest.mark.parametrize("twin", [forgetful, interleaved, late_gate])
def test_wrong_twins_are_caught(twin):
    given = problem("scalar", heads=4, groups=2, dim=5, dv=3)
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(twin, plain(), given, terms=TOKENS * 5, dtypes=WIDE)


@pytest.mark.parametrize("which", range(4))
def test_a_wrong_gradient_is_caught(which, monkeypatch):
    backward = launch.Launch.backward

    def off(*given):
        found = list(backward(*given))
        found[which] = found[which] + 0.1 * found[which].abs().max() * torch.arange(TOKENS).view(1, 1, -1, 1) / TOKENS
        return tuple(found)

    monkeypatch.setattr(launch.Launch, "backward", off)
    with pytest.raises(AssertionError, match=f"gradient {which}"):
        verify(fast(), plain(), problem("vector", dim=5, dv=3), terms=TOKENS * 5, dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_strided_inputs(gate):
    *tokens, g, _ = (None if x is None else x.float() for x in problem(gate, dim=5, dv=3, memory=False, batch=2))
    given = [*tokens, g] if g is not None else tokens

    def strided(x):
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]

    def turned(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def run(given):
        leaves = [x.detach().requires_grad_() for x in given]
        o = linear_attention(*leaves[:3], log_decay=leaves[3] if len(leaves) > 3 else None, backend="triton")
        return [o, *torch.autograd.grad(o, leaves, turned(draw(*o.shape, dtype=torch.float32)))]

    whole = run(given)
    for view in (strided, turned):
        assert all(a.equal(b) for a, b in zip(run([view(x) for x in given]), whole, strict=True))


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_only_the_state_or_only_the_output_has_a_gradient(gate):
    given = [x.float().requires_grad_() for x in problem(gate, dim=5, dv=3)]
    q, k, v, g, memory = given
    for which in (0, 1):

        def found(backend, which=which):
            results = linear_attention(q, k, v, log_decay=g, state=State(memory), return_state=True, backend=backend)
            result = (results[0], results[1].memory)[which]
            return torch.autograd.grad(result.sum(), given, allow_unused=True, materialize_grads=True)

        ours, theirs = found("triton"), found("reference")
        largest = max(float(x.abs().max()) for x in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b.double(), b, terms=TOKENS * 5, scale=largest)


def test_operator_is_well_formed():
    """Schema, fake tensors and autograd registration, as PyTorch itself checks them."""
    q, k, v, g, memory = (x.float().requires_grad_() for x in problem("vector", dim=5, dv=3))
    sums, cu = draw(2, 1, 5, dtype=torch.float32), torch.tensor([0, 9, TOKENS], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    gates, strength = (x.float().requires_grad_() for x in (g.detach()[..., 0], draw_strength(1, TOKENS, 1)))
    *tensors, before, factors = (x.float().requires_grad_() for x in many_valued("scalar", dim=5, dv=3))
    shared = (*tensors, factors, before)
    for given in (
        (q, k, v, None, None, memory, None, None, SCALE, False, False),
        (q, k, v, g, None, memory.repeat(2, 1, 1, 1), sums, cu, SCALE, True, True),
        (q, k, v, gates, strength, memory, None, None, SCALE, False, False),
        (*shared, None, None, SCALE, False, False),
    ):
        torch.library.opcheck(ops.linear_scan.overload, given, test_utils=checks)


@pytest.mark.parametrize("options", [{}, {"normalizer": "sum", "feature_map": "elu1"}])
def test_a_graph_holds_it_whole(options):
    given = [x.float().requires_grad_() for x in problem("scalar", dim=5, dv=3)[:4]]

    def call(q, k, v, g):
        return linear_attention(q, k, v, log_decay=g, backend="triton", **options)

    torch.compiler.reset()
    o, eager = torch.compile(call, backend="aot_eager", fullgraph=True)(*given), call(*given)
    torch.compiler.reset()
    assert o.equal(eager)
    for a, b in zip(*(torch.autograd.grad(x.sum(), given) for x in (o, eager)), strict=True):
        assert_close(a, b.double(), b, terms=TOKENS)


@pytest.mark.parametrize("gate", GATES)
def test_equal_inputs_give_equal_bits(gate):
    given = [None if x is None else x.float().requires_grad_() for x in problem(gate, dim=5, dv=3)]

    def run():
        o, last = fast()(*given)
        return [o, last, *torch.autograd.grad(o.sum() + last.sum(), [x for x in given if x is not None])]

    assert all(a.equal(b) for a, b in itertools.starmap(lambda a, b: (a, b), zip(run(), run(), strict=True)))


def test_what_cannot_run_says_so():
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    assert kernels.reasons(v, 16, True) == []
    assert kernels.reasons(v.double(), 16, True) == ["it computes in at most float32"]
    assert "no products in bfloat16" in kernels.reasons(v.bfloat16(), 16, True)[0]
    assert "got 300 and 16" in kernels.reasons(v, 300, True)[0]
    assert "without a causal order" in kernels.reasons(v, 16, False)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        assert kernels.reasons(v, 16, True) == ["its kernels are compiled for CUDA, not for cpu"]
    with pytest.raises(ValueError, match="backend: got 'triton', which cannot run this: without a causal order"):
        linear_attention(q, k, v, causal=False, backend="triton")
    with pytest.raises(ValueError, match="more than 256 channels"):
        linear_attention(q, k, v, feature_map=lambda x: x.repeat(1, 1, 1, 20), backend="triton")
    assert torch.equal(linear_attention(q, k, v), linear_attention(q, k, v, backend="chunked"))


def test_sizes_fit_every_width():
    for dtype, gate, width in itertools.product((torch.float32, torch.float16, torch.bfloat16), range(4), (5, 64, 256)):
        sizes = Sizes.of(width, width, dtype, gate)
        assert sizes.chunk & (sizes.chunk - 1) == 0
        assert sizes.tile.values >= 16


def test_a_call_is_tried_once_a_kind(monkeypatch):
    """Before the first of its kind, where kernels are compiled and nothing is recorded."""
    tried, recording = [], True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    monkeypatch.setattr(abreast, "_known", set())

    def call(kind, device="cuda"):
        abreast.compile_abreast(kind, torch.device(device), lambda: tried.append(abreast._compiling.get() is not None))
        return len(tried)

    assert call("one") == call("one", "cpu") == 0
    recording = False
    assert [call(kind) for kind in ("one", "one", "other")] == [1, 1, 2]
    assert tried == [True, True]
    assert abreast._compiling.get() is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_compiler_takes_every_variant(dtype):
    """What the interpreter cannot see; in a process of its own, for here it interprets."""
    script = Path(__file__).with_name("compile_kernels.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, dtype], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled late: []") == 2
    # Walks for o, dq, dk and dv and those before for two of them, without and with a normalizer, under no decay, one a
    # token without and with strengths, and one a channel; but for float32 those four in both ways of splitting a decay,
    # and the two likewise for one a channel.
    assert done.stdout.count("scan_walk") == 2 * (4 * 6 if dtype == "float32" else 6 + 10 + 10 + 12)


# On a GPU: the compiled kernels, in every dtype. Compilers of some versions are known to miscompile backward kernels
# with gates, without a word; these comparisons are what would tell.

WIDTHS = [(64, 64), (128, 128), (256, 256), (96, 160), (20, 17)]


def on_gpu(call):
    def run(*given):
        return [x.cpu() for x in call(*(None if x is None else x.cuda() for x in given))]

    return run


def rated(gate, dim, dv):
    """Problems of which some chunks decay by more than one product bears, and of which none does."""
    for rate in (1.0, 0.02)[: 1 + (gate in ("scalar", "vector"))]:
        given = problem(gate, "query", heads=4, groups=2, tokens=301, dim=dim, dv=dv, batch=2)
        given[0], given[1] = given[0] / dim**0.5, given[1] / dim**0.5
        if gate != "none":
            given[3] = given[3] * rate
        yield given


def test_gates_of_either_rate_are_met():
    for slow, given in enumerate(rated("scalar", 16, 16)):
        decays = given[3].float().unfold(2, 64, 64).sum(3)
        assert bool((decays < -tiles.SAFE.value).any()) == (not slow)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dim", "dv"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled(gate, dim, dv, dtype):
    for given in rated(gate, dim, dv):
        verify(on_gpu(fast()), on_gpu(plain()), given, terms=products(gate, 301, dim), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dim", "dv"), [*WIDTHS, (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_strengths(gate, dim, dv, dtype):
    for given in map(strengths, rated(gate, dim, dv)):
        terms = products(gate, 301, dim)
        verify(on_gpu(fast()), on_gpu(strong(plain())), given, terms=terms, dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("q_heads", [2, 6])
@pytest.mark.parametrize(("dim", "dv"), [(128, 64), (64, 64), (20, 17), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_values_of_more_heads_than_keys(gate, q_heads, dim, dv, dtype):
    given = many_valued(gate, q_heads, tokens=301, dim=dim, dv=dv, batch=2)
    given[0], given[1] = given[0] / dim**0.5, given[1] / dim**0.5
    ours, theirs = on_gpu(fast()), on_gpu(valued(strong(plain())))
    verify(ours, theirs, given, terms=products(gate, 301, dim), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_with_a_normalizer_and_stretches(gate, dtype):
    q, k, v, g, _ = problem(gate, heads=2, groups=1, tokens=4100, dim=64, dv=64)
    memory = draw(1, 1, 64, 65, seed=9).exp()

    ours, theirs = (on_gpu(positive(call)) for call in (fast(normalizer="sum"), plain(Sum())))
    verify(ours, theirs, [q, k, v, g, memory], terms=products(gate, 4100, 64), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("value", HOSTILE)
def test_compiled_hostile_gates(gate, value):
    given = problem(gate, heads=2, groups=2, tokens=150, dim=128, dv=128)
    given[3].fill_(value)
    for dtype in (torch.bfloat16, torch.float32):
        verify(on_gpu(fast()), on_gpu(plain()), given, terms=products(gate, 150, 128), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_equal_bits_each_time(gate):
    given = [None if x is None else x.to("cuda", torch.bfloat16) for x in problem(gate, tokens=5000, dim=128, dv=128)]
    q, k, v, g, _ = given
    leaves = [x.requires_grad_() for x in given[:4] if x is not None]

    def run(backend):
        o = linear_attention(q, k, v, log_decay=g, backend=backend)
        return [o, *torch.autograd.grad(o.float().square().sum(), leaves)]

    assert all(a.equal(b) for a, b in zip(run("triton"), run("triton"), strict=True))
