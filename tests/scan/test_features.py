"""Feature maps against the kernels that they stand for, and the running scale of those given by logarithms."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from recurrences import GATES, draw, draw_gate, gate_of, per_head, verify

from saccade.scan import features
from saccade.scan.features import (
    FEATURE_MAPS,
    CosReweight,
    Exp,
    ExpPair,
    LogFeatures,
    PositiveRandomFeatures,
    feature_map_of,
)
from saccade.scan.linear_attention import linear_attention
from saccade.scan.normalizers import Clamp, Sum
from saccade.testing.budget import assert_close

D, DV = 5, 3

# Each map's kernel, as a function of q (..., N, D) and k (..., M, D).
KERNELS = {
    "elu1": lambda q, k: torch.einsum(
        "...nd,...md->...nm", *(torch.expm1(x.clamp_max(0)) + x.clamp_min(0) + 1 for x in (q, k))
    ),
    "relu": lambda q, k: torch.einsum("...nd,...md->...nm", *(x * (x > 0) for x in (q, k))),
    "squared_relu": lambda q, k: torch.einsum("...nd,...md->...nm", *(x**2 * (x > 0) for x in (q, k))),
    "softmax": lambda q, k: torch.einsum(
        "...nd,...md->...nm", *(x.exp() / x.exp().sum(-1, keepdim=True) for x in (q, k))
    ),
    "softmax_pair": lambda q, k: KERNELS["softmax"](q, k) + KERNELS["softmax"](-q, -k),
    "softmax_joint": lambda q, k: (
        torch.einsum("...nd,...md->...nm", q.exp(), k.exp()) / joint(q, k)
        + torch.einsum("...nd,...md->...nm", (-q).exp(), (-k).exp()) / joint(q, k)
    ),
    "unit": lambda q, k: q @ k.mT / (q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]),
    "taylor2": lambda q, k: 1 + q @ k.mT / D**0.5 + (q @ k.mT / D**0.5) ** 2 / 2,
    "exp": lambda q, k: torch.einsum("...nd,...md->...nm", q.exp(), k.exp()),
    "exp_pair": lambda q, k: KERNELS["exp"](q, k) + KERNELS["exp"](-q, -k),
}


def joint(q, k):
    sums = [(x.exp() + (-x).exp()).sum(-1) for x in (q, k)]
    return sums[0][..., :, None] * sums[1][..., None, :]


def inputs(heads=4, groups=2, tokens=19, batch=2, dim=D, dtype=torch.float64):
    shapes = ((heads, dim), (groups, dim), (groups, DV))
    return [draw(batch, h, tokens, d, seed=i).to(dtype) for i, (h, d) in enumerate(shapes)]


def close(a, b, terms=100, scale=0.0):
    """Equal up to the rounding of sums of `terms` products, of magnitude `scale` where they cancel."""
    assert a.dtype == b.dtype
    assert_close(a, b, b, terms=terms, scale=max(float(b.abs().max()), float(scale)))


def test_every_name_has_a_kernel():
    assert set(KERNELS) == set(FEATURE_MAPS)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_map_gives_its_kernel(name, causal):
    def fast(q, k, v):
        return [linear_attention(q, k, v, feature_map=name, causal=causal, chunk=8)]

    def plain(q, k, v):
        weights = KERNELS[name](q, per_head(k, 4))
        return [(weights.tril() if causal else weights) @ per_head(v, 4)]

    verify(fast, plain, inputs(), terms=19 * D * D, dtypes=(torch.float64, torch.float32))


def test_the_two_maps_called_hedgehog_differ():
    x = draw(2, D)
    a, b = features.softmax_pair(x), features.softmax_joint(x)
    close(a.sum(-1), torch.full((2,), 2.0).double())
    close(b.sum(-1), torch.ones(2).double())
    assert ((a - b).abs() > 1 / 1024).any()


def test_elu1_keeps_digits_below_zero_and_its_slope_at_zero():
    x = torch.tensor([-80.0, -1.0, -0.0, 0.0, 2.0], requires_grad=True)
    y = features.elu1(x)
    exact = torch.tensor([math.exp(-80), math.exp(-1), 1, 1, 3], dtype=torch.float64)
    # Each entry on its own, for elu(x) + 1 would round the first one to 0.
    for a, t in zip(y.detach(), exact, strict=True):
        assert_close(a, t, t.float())
    slope = torch.tensor([math.exp(-80), math.exp(-1), 1, 1, 1], dtype=torch.float64)
    for a, t in zip(torch.autograd.grad(y.sum(), x)[0], slope, strict=True):
        assert_close(a, t, t.float())


def test_unit_of_nothing_is_nothing():
    x = torch.zeros(2, D, requires_grad=True)
    y = features.unit(x)
    assert not y.any()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_queries_and_keys_may_have_maps_of_their_own():
    q, k, v = inputs()
    o = linear_attention(q, k, v, feature_map=(torch.sin, torch.cos), chunk=8)
    close(o, linear_attention(q.sin(), k.cos(), v, chunk=8))


@pytest.mark.parametrize("length", [19, 100])
def test_cos_reweight(length):
    def fast(q, k, v):
        return [linear_attention(q, k, v, feature_map=CosReweight(length), normalizer="sum", chunk=8)]

    def plain(q, k, v):
        i = torch.arange(19, dtype=torch.float64)
        near = (math.pi / 2 * (i[:, None] - i) / length).cos().to(q.dtype)
        weights = (KERNELS["relu"](q, per_head(k, 4)) * near).tril()
        return [weights / weights.sum(-1, keepdim=True) @ per_head(v, 4)]

    q, k, v = inputs()
    verify(fast, plain, [q.abs(), k.abs(), v], terms=19 * D, dtypes=(torch.float64, torch.float32))


def test_cos_reweight_decodes_and_packs():
    q, k, v = inputs(batch=1)
    whole = linear_attention(q, k, v, feature_map=CosReweight(19), chunk=8)
    state, rows = None, []
    for t in range(19):
        o, state = linear_attention(
            *(x[:, :, t : t + 1] for x in (q, k, v)),
            feature_map=CosReweight(19, start=t),
            state=state,
            return_state=True,
        )
        rows.append(o)
    close(torch.cat(rows, 2), whole)
    # Positions start again with every packed sequence.
    packed = linear_attention(q, k, v, feature_map=CosReweight(12), cu_seqlens=torch.tensor([0, 12, 19]).int(), chunk=8)
    alone = linear_attention(*(x[:, :, 12:] for x in (q, k, v)), feature_map=CosReweight(12), chunk=8)
    assert torch.equal(packed[:, :, 12:], alone)


def test_cos_reweight_far_positions_keep_their_digits():
    start = 10**6
    x = torch.ones(1, 1, 2, 1)
    phi = CosReweight(start + 2, start=start)(x)[0, 0]
    angle = torch.tensor([start, start + 1], dtype=torch.float64) * math.pi / (2 * (start + 2))
    exact = torch.stack([angle.cos(), angle.sin()], -1)
    assert_close(phi, exact, exact.float())


# Features given by their logarithms.


@pytest.mark.parametrize("orthogonal", [True, False])
def test_random_features_estimate_the_softmax_kernel(orthogonal):
    """The mean over many draws is exp(s q . k), within what the spread of the draws allows."""
    q, k = draw(1, D), draw(1, D, seed=1)
    q, k = q / q.norm(), k / k.norm()
    found = []
    for seed in range(400):
        phi = PositiveRandomFeatures(D, num_features=7, seed=seed, orthogonal=orthogonal).double()
        found.append(float(phi(q) @ phi(k).mT))
    found = torch.tensor(found, dtype=torch.float64)
    error = abs(float(found.mean()) - math.exp(float(q @ k.mT) * D**-0.5))
    assert error < 4 * float(found.std()) / len(found) ** 0.5


def test_random_features_are_orthogonal_within_blocks():
    phi = PositiveRandomFeatures(D, num_features=2 * D + 3, seed=1)
    for block in phi.projection.split(D):
        gram = block @ block.T
        norms = block.norm(dim=-1)
        close(gram, torch.diag(norms.square()), D)
    assert not torch.equal(phi.projection[0], phi.projection[D])
    loose = PositiveRandomFeatures(D, num_features=D, seed=1, orthogonal=False).projection
    assert (loose @ loose.T).triu(1).abs().max() > 1 / 1024


def test_random_features_repeat_with_their_seed_alone():
    torch.manual_seed(0)
    a = PositiveRandomFeatures(D, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    b, c = PositiveRandomFeatures(D, seed=3), PositiveRandomFeatures(D, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.projection, b.projection)
    assert not torch.equal(a.projection, c.projection)
    assert set(a.state_dict()) == {"projection"}


def random_features(scale=1.0):
    return PositiveRandomFeatures(D, num_features=11, seed=2, scale=scale).double()


MAPS = {"exp": Exp, "exp_pair": ExpPair, "random": random_features}


def logs(phi, x):
    """The logarithms of the features, as their papers write them."""
    if isinstance(phi, Exp):
        return x
    if isinstance(phi, ExpPair):
        return torch.cat([x, -x], -1)
    w = phi.projection.to(x.dtype)
    x = phi.scale**0.5 * x
    return x @ w.T - (x * x).sum(-1, keepdim=True) / 2 - math.log(phi.num_features) / 2


def dense(phi, q, k, v, g=None, causal=True, normalizer=None):
    """Weights over keys in the log domain, (B, H, N, M), and the output."""
    heads, tokens = q.shape[1], q.shape[2]
    f = logs(phi, q)[:, :, :, None] + per_head(logs(phi, k), heads)[:, :, None]
    if g is not None:
        steps = gate_of(g, q, f.shape[-1])
        for i in range(tokens):
            for j in range(i):
                f[:, :, i, j] = f[:, :, i, j] + steps[:, :, j + 1 : i + 1].sum(2)
    f = f.logsumexp(-1)
    if causal:
        f = f.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -math.inf)
    if normalizer == "sum":
        return f.softmax(-1) @ per_head(v, heads)
    weights = f.exp()
    if isinstance(normalizer, Clamp):
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(normalizer.least)
    if isinstance(normalizer, Sum):
        weights = weights / (weights.sum(-1, keepdim=True) + normalizer.eps)
    return weights @ per_head(v, heads)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gate", [*GATES, "constant a query head", "scalar a query head"])
@pytest.mark.parametrize("normalizer", ["sum", None, Clamp(least=3.0), Sum(eps=0.5)])
def test_log_features(name, gate, normalizer):
    phi, tokens = MAPS[name](), 11
    heads = 4 if "query" in gate else 2
    g = draw_gate(gate.split()[0], heads, tokens, logs(phi, draw(1, D)).shape[-1])
    g = [] if g is None else [g]

    def fast(q, k, v, *g):
        return [
            linear_attention(q, k, v, log_decay=g[0] if g else None, feature_map=phi, normalizer=normalizer, chunk=4)
        ]

    def plain(q, k, v, *g):
        return [dense(phi, q, k, v, g[0] if g else None, normalizer=normalizer)]

    verify(fast, plain, [*inputs(tokens=tokens), *g], terms=tokens * 11, dtypes=(torch.float64, torch.float32))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [True, False])
def test_huge_features_neither_overflow_nor_vanish(name, causal):
    """Features whose exponentials leave float32, upwards and downwards, token by token."""
    phi = MAPS[name]()
    q, k, v = inputs()
    k[:, :, ::3] *= 40
    k[:, :, 1::3] -= 200
    q = q * 40
    assert not logs(phi, k).float().exp().isfinite().all() or name == "random"
    assert (logs(phi, k).float().exp() == 0).any()

    def fast(q, k, v):
        return [linear_attention(q, k, v, feature_map=phi, normalizer="sum", causal=causal, chunk=8)]

    given = [q, k, v]
    verify(
        fast,
        lambda *x: [dense(phi, *x, causal=causal, normalizer="sum")],
        given,
        terms=19 * 11,
        # What a logarithm of some hundreds has lost of its digits, the output lacks.
        scale=float(v.abs().max() * logs(phi, k).abs().max()),
        dtypes=(torch.float64,),
    )
    assert fast(*(x.float() for x in given))[0].isfinite().all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_a_later_key_changes_no_earlier_row_bitwise(name, gate):
    """A scale taken over all keys would round earlier rows anew, and wipe them out when a late key is huge."""
    phi = MAPS[name]().float() if name == "random" else MAPS[name]()
    q, k, v = inputs(dtype=torch.float32)
    g = draw_gate(gate, 2, 19, D)
    options = {"feature_map": phi, "normalizer": "sum", "log_decay": g, "chunk": 8}
    before = linear_attention(q, k, v, **options)
    for now in (0, 7, 12):
        late = k.clone()
        late[:, :, now + 1 :] = 300 * late[:, :, now + 1 :].sign()
        after = linear_attention(q, late, v, **options)
        assert torch.equal(before[:, :, : now + 1], after[:, :, : now + 1])


class OwnScale(LogFeatures):
    """A twin that scales every key by its own largest feature."""

    def log_query(self, x):
        return x

    def log_key(self, x):
        return x - x.amax(-1, keepdim=True)


def test_a_scale_a_key_is_caught():
    q, k, v = inputs()
    o = linear_attention(q, k, v, feature_map=OwnScale(), normalizer="sum", chunk=8)
    with pytest.raises(AssertionError, match="max error"):
        close(o, dense(Exp(), q, k, v, normalizer="sum"))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("gate", ["none", "constant", "scalar", "vector"])
@pytest.mark.parametrize("normalizer", ["sum", None])
def test_states_with_a_scale_compose(name, gate, normalizer):
    phi, tokens = MAPS[name](), 13
    q, k, v = inputs(tokens=tokens)
    k = 3 * k
    g = draw_gate(gate, 2, tokens, logs(phi, k).shape[-1])

    def part(start, stop, state=None):
        now = slice(start, stop)
        return linear_attention(
            *(x[:, :, now] for x in (q, k, v)),
            log_decay=g if g is None or g.ndim == 1 else g[:, :, now],
            feature_map=phi,
            normalizer=normalizer,
            state=state,
            return_state=True,
            chunk=4,
        )

    def compare(a, b):
        close(a.shift, b.shift, D)
        close(a.memory, b.memory, tokens * 11)

    whole, after = part(0, tokens)
    for cut in (1, 4, 5, 9, 12):
        (first, a), (_, b) = part(0, cut), part(cut, tokens)
        compare(a.compose(b), after)
        rest, c = part(cut, tokens, a)
        close(torch.cat([first, rest], 2), whole, tokens * 11)
        compare(c, after)
    a, b, c = (part(*span)[1] for span in ((0, 3), (3, 8), (8, tokens)))
    compare(a.compose(b).compose(c), a.compose(b.compose(c)))
    # The same from the unit of the monoid.
    again, left = part(0, tokens, after.identity())
    close(again, whole, tokens * 11)
    compare(left, after)


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_without_a_scale_has_scale_one(causal):
    q, k, v = inputs()
    options = {"causal": causal, "normalizer": "sum", "return_state": True}
    _, plain = linear_attention(q, k, v, feature_map=torch.exp, **options)
    a, first = linear_attention(q, k, v, feature_map="exp", state=plain, **options)
    b, second = linear_attention(q, k, v, feature_map=torch.exp, state=plain, **options)
    close(a, b)
    close(first.memory * first.shift.exp(), second.memory)


def test_backends_agree_on_log_features():
    q, k, v = inputs()
    a, b = (linear_attention(q, k, v, feature_map="exp", normalizer="sum", backend=x) for x in ("chunked", "reference"))
    close(a, b)


@pytest.mark.parametrize("name", MAPS)
def test_global_log_features(name):
    phi = MAPS[name]()

    def fast(q, k, v):
        return [linear_attention(q, k, v, feature_map=phi, causal=False)]

    verify(
        fast,
        lambda *x: [dense(phi, *x, causal=False)],
        inputs(),
        terms=19 * 11,
        dtypes=(torch.float64, torch.float32),
    )


ERRORS = [
    (lambda: PositiveRandomFeatures(0), ValueError, "head_dim: got 0"),
    (lambda: PositiveRandomFeatures(4, num_features=0), ValueError, "num_features: got 0"),
    (lambda: PositiveRandomFeatures(4, scale=-1.0), ValueError, "scale: got -1.0"),
    (lambda: PositiveRandomFeatures(4)(torch.zeros(2, 3)), ValueError, "x: got 3 channels; .* head_dim 4"),
    (lambda: CosReweight(4)(torch.zeros(1, 1, 5, 2)), ValueError, "length: got 4 for tokens 0 to 4; pass at least 5"),
    (lambda: CosReweight(4, start=2)(torch.zeros(1, 1, 3, 2)), ValueError, "length: got 4 for tokens 2 to 4"),
    (lambda: CosReweight(4, start=-1), ValueError, "start: got -1"),
    (lambda: feature_map_of("hedgehog"), ValueError, "feature_map: got 'hedgehog'; choose one of elu1"),
    (lambda: feature_map_of((torch.exp,)), TypeError, "feature_map: got"),
    (lambda: feature_map_of(1.0), TypeError, "feature_map: got 1.0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_examples():
    assert not doctest.testmod(features).failed
