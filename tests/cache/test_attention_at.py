"""Attention of some queries, and queries for a mechanism that knows the usual scale alone, by the book."""

import pytest
import torch

from saccade.cache.view import attention_at, usual
from saccade.testing.budget import assert_close, compare


def drawn(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    return (torch.randn(2, heads, 11, 6, generator=random, dtype=torch.float64).to(dtype) for heads in (4, 2))


def by_the_book(q, k, at, dtype=torch.float64):
    """A row a query: no weight for what comes later."""
    out = torch.zeros(2, 2, 2, len(at), 11, dtype=dtype)
    for b, h, (i, place) in ((b, h, pair) for b in range(2) for h in range(4) for pair in enumerate(at.tolist())):
        scores = (k[b, h // 2, : place + 1] * q[b, h, place]).sum(-1) / 6**0.5
        out[b, h // 2, h % 2, i, : place + 1] = scores.to(dtype).softmax(-1)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_causal_attention(dtype):
    (q, k), at = drawn(dtype), torch.tensor([10, 0, 4])
    wide = torch.promote_types(dtype, torch.float32)
    found, truth = attention_at(q, k, at), by_the_book(q.double(), k.double(), at)
    assert found.dtype == wide
    assert_close(found, truth, by_the_book(q, k, at, wide), terms=6)
    assert not found[..., 1, 1:].any()


def test_keys_of_another_head_and_later_ones_are_noticed():
    (q, k), at = drawn(), torch.tensor([10, 0, 4])
    truth = by_the_book(q, k, at)
    assert not compare(attention_at(q, k.flip(1), at), truth, truth, terms=6).ok
    assert not compare(attention_at(q, k, at.flip(0)), truth, truth, terms=6).ok


def test_a_scale_goes_into_the_queries():
    (q, k), at = drawn(), torch.tensor([7])
    assert usual(q, None) is q
    assert usual(q, 6**-0.5) is q
    found, truth = attention_at(usual(q, 0.3), k, at), by_the_book(q * 0.3 * 6**0.5, k, at)
    assert_close(found, truth, truth, terms=6)
    assert not compare(attention_at(q, k, at), truth, truth, terms=6).ok
