"""Softmax, sigmoid and entmax as functions of scores: values, conditions that define them, gradients."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.softmax import Entmax, Sigmoid, Softmax
from saccade.testing.budget import assert_close
from saccade.testing.subject import widen

EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**16)
widths = st.integers(1, 40)
sizes = st.sampled_from([0.1, 1.0, 5.0, 50.0])


def scores(seed, *shape, size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@given(seed=seeds, width=widths, size=sizes)
def test_entmax_is_the_sorted_closed_form(alpha, seed, width, size):
    s = scores(seed, width, size=size)
    exact = oracle.entmax_by_sorting(s, alpha)
    single = oracle.entmax_by_sorting(s.float(), alpha)
    magnitude = 1 + float(s.abs().max())
    assert_close(Entmax(alpha)(s), exact, widen(exact, single), terms=width, scale=magnitude)
    assert_close(oracle.entmax(alpha)(s), exact, widen(exact, single), terms=width, scale=magnitude)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0, 7.0])
@given(seed=seeds, width=widths, size=sizes)
def test_entmax_meets_its_conditions(alpha, seed, width, size):
    check_conditions(scores(seed, width, size=size), Entmax(alpha), alpha)


def check_conditions(s, normalizer, alpha):
    """p = max(0, (alpha - 1) s - tau)^(1 / (alpha - 1)) adds up to 1, so it lies between those of the floats by tau."""
    p, width = normalizer(s), len(s)
    assert (p >= 0).all()
    assert abs(float(p.sum()) - 1) <= 2 * width * EPS
    z = (alpha - 1) * s
    ulp = EPS * (1 + float(z.abs().max()))

    def at(tau):
        return (z - tau).clamp(min=0).pow(1 / (alpha - 1))

    below, above = z.max() - 1, z.max()
    while above - below > ulp:
        tau = (below + above) / 2
        below, above = (tau, above) if at(tau).sum() >= 1 else (below, tau)
    most, least = at(below - ulp), at(above + ulp)
    slack = float((most - least).sum()) + 8 * width * EPS
    assert (p <= most + slack).all()
    assert (p >= least - slack).all()


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_another_alpha_is_caught(alpha):
    with pytest.raises(AssertionError):
        check_conditions(scores(7, 20), Entmax(alpha * (1 + 1e-9)), alpha)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("entmax", [Entmax, oracle.entmax], ids=["ours", "oracle"])
def test_entmax_gradient(entmax, alpha):
    s = scores(1, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(entmax(alpha), s)


def test_entmax_gradient_with_pairs_left_out():
    s = scores(2, 4, 7)
    kept = scores(3, 4, 7) > 0
    kept[1] = False
    leaf = s.requires_grad_()
    masked = leaf.masked_fill(~kept, -torch.inf)
    weight = scores(4, 4, 7)
    (found,) = torch.autograd.grad((Entmax()(masked) * weight).sum(), leaf)
    assert found.isfinite().all()
    assert not found[~kept].any()
    for row in (0, 2, 3):
        alone = leaf.detach()[row, kept[row]].requires_grad_()
        (exact,) = torch.autograd.grad((oracle.entmax_by_sorting(alone, 1.5) * weight[row, kept[row]]).sum(), alone)
        assert_close(found[row, kept[row]], exact, exact, terms=7, scale=float(weight.abs().max()))


@pytest.mark.parametrize(
    "normalizer", [Softmax(), Sigmoid(), Sigmoid(-2.0), Entmax(), Entmax(2.0), Entmax(3.0)], ids=repr
)
def test_rows_of_nothing_and_rows_of_nan(normalizer):
    s = scores(5, 4, 6)
    clean = normalizer(s)
    s[1] = -torch.inf
    s[2, 3] = torch.nan
    s[3, 2:] = -torch.inf
    found = normalizer(s)
    assert found[0].equal(clean[0])
    assert not found[1].any()
    assert found[2].isnan().any()
    assert not found[3, 2:].any()
    assert found[3, :2].equal(normalizer(s[3, :2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalizer", [Softmax(), Sigmoid(), Entmax(), Entmax(2.0)], ids=repr)
def test_large_scores(normalizer, dtype):
    """Scores far apart leave one key; a common shift changes nothing, except for the sigmoid."""
    s = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    assert normalizer(s).isfinite().all()
    if normalizer.name != "sigmoid":
        assert normalizer(s).equal(torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
        assert normalizer(s + 2.0**14).equal(normalizer(s))


@given(seed=seeds, width=widths)
def test_more_alpha_means_fewer_keys(seed, width):
    s = scores(seed, width, size=3.0)
    kept = [int((Entmax(alpha)(s) > 0).sum()) for alpha in (1.2, 1.5, 2.0, 3.0)]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0, float("nan")])
def test_alpha_must_exceed_one(alpha):
    with pytest.raises(ValueError, match=r"alpha: got .*; pass a number > 1"):
        Entmax(alpha)
