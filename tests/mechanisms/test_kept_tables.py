"""Tables of indices that are kept for all calls serve training, too, where the first call was in inference mode."""

import functools

import pytest
import torch

from saccade.contract import Dims
from saccade.mechanisms.spatial_window import hotformerloc
from saccade.mechanisms.static_sparse import tkl

KEPT = [
    (tkl, "chunked", lambda: tkl.Tkl(Dims(2, 4), chunk=4, overlap=1, hidden=8), 11),
    (hotformerloc, "grown", lambda: hotformerloc.Hotformerloc(Dims(2, 4, grid=(3, 4, 3)), window=4), 36),
]


def trains_after_inference(make, num_tokens):
    made, x = make(), torch.randn(1, num_tokens, 8, requires_grad=True)
    with torch.inference_mode():
        made(x)
    made(x).square().sum().backward()
    return bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize(("module", "name", "make", "num_tokens"), KEPT, ids=["chunks", "octree"])
def test_tables_serve_training(module, name, make, num_tokens, monkeypatch):
    kept = getattr(module, name)
    kept.cache_clear()
    assert trains_after_inference(make, num_tokens)
    assert kept.cache_info().hits > 0
    kept.cache_clear()
    monkeypatch.setattr(module, name, functools.cache(kept.__wrapped__.__wrapped__))
    with pytest.raises(RuntimeError, match="Inference tensors"):
        trains_after_inference(make, num_tokens)
