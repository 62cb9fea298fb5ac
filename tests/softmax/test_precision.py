"""In a narrow dtype no backend errs more than twice as much as the same equation run eagerly in it."""

from __future__ import annotations

import oracle
import pytest
import torch

from saccade.softmax import attend
from saccade.testing.budget import assert_close
from saccade.where import Causal, Full, Neighborhood, Sinks, Window

B, H, KV, N, D = 1, 4, 2, 143, 16
WHERE = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & (Window(31) | Sinks(3)),
    "grid": Neighborhood((11, 13), 5),
}
FEW = 4  # terms of the band: two units in the last place beside twice the eager error
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(inputs, dtype):
    return [x.clone().to(dtype).requires_grad_() for x in inputs]


def gradients(inputs, o, cotangent):
    return [x.detach() for x in torch.autograd.grad(o, inputs, cotangent.to(o.dtype))]


def check(dtype, where, options, run):
    """o, lse and all gradients of `run` in a dtype."""
    sink = torch.randn(H) if options == "sink" else None
    softcap = 3.0 if options == "softcap" else None
    entries = oracle.entries_of(where.dense(N, N, H))
    inputs = [torch.randn(B, heads, N, D).to(dtype) for heads in (H, KV, KV)]
    cotangent = torch.randn(B, H, N, D).to(dtype)

    def truth(dtype):
        own = leaves(inputs, dtype)
        o, lse = oracle.attention(*own, entries, sink=sink, softcap=softcap)
        return o.detach(), lse.detach(), gradients(own, o, cotangent)

    (exact, exact_lse, exact_gradients), (eager, _, eager_gradients) = truth(torch.float64), truth(dtype)
    own = leaves(inputs, dtype)
    o = run(*own, where, sink=sink, softcap=softcap)
    assert o.dtype == dtype
    assert_close(o.detach(), exact, eager, name="o", terms=FEW)
    for at, mine in enumerate(gradients(own, o, cotangent)):
        assert mine.dtype == dtype
        assert_close(mine, exact_gradients[at], eager_gradients[at], name=f"gradient of {'qkv'[at]}", terms=FEW)
    return inputs, exact_lse, truth(torch.float32)[1], {"sink": sink, "softcap": softcap}


@pytest.mark.parametrize("options", ["plain", "sink", "softcap"])
@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_error(backend, dtype, name, options):
    def run(*inputs, **options):
        return attend(*inputs, **options, backend=backend)

    inputs, exact, single, options = check(dtype, WHERE[name], options, run)
    _, lse = attend(*inputs, WHERE[name], **options, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32  # whatever the inputs: it is what partial results are merged by
    assert_close(lse, exact, single, name="lse", terms=FEW)


@pytest.mark.parametrize("name", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_sdpa(dtype, name):
    check(dtype, WHERE[name], "plain", lambda *inputs, **_: attend(*inputs, backend="sdpa"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fewer_bits_are_caught(dtype):
    def coarse(q, k, v, where, **options):
        v = v + ((v * 4).round() / 4 - v).detach()
        return attend(q, k, v, where, **options)

    with pytest.raises(AssertionError, match="o: max error"):
        check(dtype, WHERE["window"], "plain", coarse)
