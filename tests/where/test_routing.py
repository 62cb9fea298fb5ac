"""Routers choose what they say, of what the pattern admits."""

from __future__ import annotations

import pytest
import torch

from saccade.where import Blocks, Causal, CumulativeMass, Router, Sinks, Threshold, TopK, pool, pooled_scores


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets(chosen):
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def test_top_k_takes_the_best_and_the_mandatory_first():
    values = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, -torch.inf, -torch.inf, 1.0]])
    must = torch.tensor([[False, False, False, True], [False, True, False, False]])
    assert sets(TopK(2)(values, must)) == [[0, 3], [0, 3]]  # what is not admitted is not mandatory either
    assert sets(TopK(9)(values, torch.zeros_like(must))) == [[0, 1, 2, 3], [0, 3]]


def test_cumulative_mass_is_the_smallest_set_that_reaches_it():
    values, nothing = scores(7, 13), torch.zeros(13, dtype=torch.bool)
    for mass in (0.1, 0.5, 0.9, 1.0):
        chosen = sets(CumulativeMass(mass)(values, nothing))
        for row, kept in zip(values.softmax(-1), chosen, strict=True):
            enough = next(k for k in range(1, 14) if row.topk(k).values.sum() >= mass or k == 13)
            assert kept == sorted(row.topk(enough).indices.tolist())


def test_threshold_keeps_the_weights_that_reach_it():
    values = scores(5, 11)
    chosen = sets(Threshold(0.1)(values, torch.zeros(11, dtype=torch.bool)))
    assert chosen == [torch.nonzero(row >= 0.1)[:, 0].tolist() for row in values.softmax(-1)]


def test_a_row_without_candidates_chooses_nothing():
    nothing = torch.full((1, 4), -torch.inf)
    for selector in (TopK(2), CumulativeMass(0.5), Threshold(0.1)):
        assert sets(selector(nothing, torch.ones(4, dtype=torch.bool))) == [[]]


def test_pooling_a_ragged_end():
    x = scores(1, 1, 7, 3)
    assert torch.allclose(pool(x, 4)[0, 0, 1], x[0, 0, 4:].mean(0))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_a_router_chooses_within_its_pattern(heads, kv_heads):
    q, k = scores(2, heads, 50, 8, seed=1), scores(2, kv_heads, 61, 8, seed=2)
    own = Blocks(8) & Causal()
    router = Router(pooled_scores, TopK(3), block=(8, 8), pattern=Causal(), must=own | Sinks(1))
    dense = router.route(q, k).verify().dense()
    assert dense.shape == (2, heads, 50, 61)
    assert not (dense & ~Causal().dense(50, 61)).any()
    assert dense[:, :, :, 0].all()
    best = pooled_scores(q, k, (8, 8))
    for b in range(2):
        for h in range(heads):
            for tile in range(7):
                touched = {c for c in range(8) if dense[b, h, tile * 8 : tile * 8 + 8, c * 8 : c * 8 + 8].any()}
                assert len(touched) <= 3
                rows = range(tile * 8, min(tile * 8 + 8, 50))
                admitted = [c for c in range(8) if Causal().dense(50, 61)[0, list(rows), c * 8 : c * 8 + 8].any()]
                must = {0} | {c for i in rows for c in [(i + 11) // 8]}
                rest = sorted(set(admitted) - must, key=lambda c: -best[b, h, tile, c])
                assert touched >= set(rest[: 3 - len(must & set(admitted))])


def test_candidates_may_be_fewer_than_what_the_pattern_admits():
    q = k = scores(1, 1, 32, 4)
    router = Router(pooled_scores, TopK(4), block=(8, 8), pattern=Causal(), must=Blocks(8), candidates=Sinks(1))
    tiles = router.route(q, k).dense()[0].unflatten(1, (4, 8)).unflatten(0, (4, 8)).any((1, 3))
    assert tiles.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def route_by(block):
    return Router(pooled_scores, TopK(1), block=block).route(scores(1, 1, 4, 2), scores(1, 1, 4, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k: got 0"),
        (lambda: CumulativeMass(1.5), "mass: got 1.5"),
        (lambda: route_by(block=(0, 1)), "block: got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
