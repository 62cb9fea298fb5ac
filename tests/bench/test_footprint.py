"""Bytes that a decoder keeps: what a policy says it keeps is what its state holds, and a memory does not grow."""

from dataclasses import replace

import pytest
import torch

from saccade.bench.footprint import baseline_bytes, dense_bytes, kept_bytes
from saccade.bench.sample import Sample
from saccade.cache import Cached
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import CachePolicy, Dims
from saccade.scan import snapshot
from saccade.testing.decode import decode

POLICIES = [spec.id for spec in mechanisms() if issubclass(mechanism(spec.id), CachePolicy)]
CACHED = [id for id in POLICIES if issubclass(mechanism(id), Cached)]


def made(id, tokens=None):
    cls = mechanism(id)
    case = cls.cases()[0]
    inputs = cls.inputs(case, torch.Generator().manual_seed(0), torch.float32)
    return cls(case.dims, **case.params), tuple(x[..., :tokens, :] for x in inputs)


@pytest.mark.parametrize("id", [id for id in POLICIES if id not in CACHED])
def test_a_policys_bytes_are_its_states_or_fewer_than_dense(id):
    module, (q, k, v) = made(id)
    held = kept_bytes(module, (q, k, v))
    assert 0 < held <= dense_bytes(k, v) == 2 * k.numel() * 4
    # A state may hold less for heads that are alike, never more than the rows that are kept.
    assert snapshot.nbytes(decode(module, (q, k, v))[1]) <= held


@pytest.mark.parametrize("id", CACHED)
def test_pages_are_counted_that_the_tokens_held_lie_in(id):
    module, qkv = made(id)
    session = module.session()
    with torch.no_grad():
        module.read(session, *qkv)
    held = kept_bytes(module, qkv)
    pools = [session.store(index).pool for index in range(session.num_layers)]
    rows = sum((pool.k[0].nbytes + pool.v[0].nbytes) * pool.in_use for pool in pools)
    assert 0 < rows <= held == session.nbytes_in_use


def test_a_quarter_of_the_tokens_takes_a_quarter_of_the_bytes():
    q, k, v = torch.randn(3, 1, 2, 2048, 32, generator=torch.Generator().manual_seed(0))
    part = kept_bytes(mechanism("paged_eviction")(Dims(2, 32), budget=512), (q, k, v)) / dense_bytes(k, v)
    assert 0.25 < part < 0.3


def test_a_memory_does_not_grow_and_dense_attention_does():
    sizes = {}
    for tokens in (3, 30):
        module, inputs = made("hedgehog", tokens)
        sizes[tokens] = kept_bytes(module, inputs), dense_bytes(*inputs[1:])
    assert sizes[3][0] == sizes[30][0]
    assert sizes[30][1] == 10 * sizes[3][1]


def test_the_cache_of_a_dense_layer_is_that_of_its_own_keys_and_values():
    heads = {"dims": Dims(4, 8, 2), "q": torch.randn(2, 4, 9, 8), "k": torch.randn(2, 2, 9, 8)}
    sample = Sample("text", **heads, v=torch.randn(2, 2, 9, 8), x=torch.randn(2, 9, 32))
    assert baseline_bytes(False, sample) == baseline_bytes(True, sample) == 2 * 2 * 2 * 9 * 8 * 4
    wide = replace(sample, x=torch.randn(2, 9, 48).half())  # a layer of six heads, each with keys of its own
    assert baseline_bytes(True, wide) == 2 * 2 * 6 * 9 * 8 * 2
    assert baseline_bytes(False, wide) == baseline_bytes(False, sample)


def test_what_does_not_decode_keeps_nothing():
    module, inputs = made("nat")
    assert kept_bytes(module, inputs) is None
