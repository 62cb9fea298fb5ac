"""Tables of indices that are kept for all calls serve training, too, where the first call was in inference mode."""

import contextlib
import functools

import pytest
import torch

from saccade.catalogue import mechanism
from saccade.mechanisms.spatial_window import hotformerloc, spherical_attention
from saccade.mechanisms.static_sparse import hdt, tkl
from saccade.softmax import problem
from saccade.testing.subject import Subject
from saccade.where import Plan

KEPT = {
    "nat": (problem, "plan_of"),
    "hdt": (hdt, "parts"),
    "hotformerloc": (hotformerloc, "grown"),
    "spherical_attention": (spherical_attention, "areas"),
    "tkl": (tkl, "chunked"),
}


def trains_after_inference(id):
    subject = Subject(mechanism(id), mechanism(id).cases()[0])
    made, inputs = subject.build(torch.float32), subject.inputs(torch.float32)
    with torch.inference_mode():
        made(*inputs)
    inputs = [x.clone().requires_grad_() for x in inputs]
    made(*inputs).square().sum().backward()
    return all(bool(x.grad.abs().sum() > 0) for x in inputs)


@pytest.mark.parametrize("id", KEPT)
def test_tables_serve_training(id, monkeypatch):
    module, name = KEPT[id]
    kept = getattr(module, name)
    kept.cache_clear()
    assert trains_after_inference(id)
    assert kept.cache_info().hits > 0
    kept.cache_clear()
    monkeypatch.setattr(module, name, functools.cache(kept.__wrapped__.__wrapped__))
    with pytest.raises(RuntimeError, match="Inference tensors"):
        trains_after_inference(id)


@pytest.mark.parametrize("careless", [False, True])
def test_what_is_derived_of_a_plan_serves_training(careless, monkeypatch):
    """careless: as it was, which would be noticed."""
    if careless:
        monkeypatch.setattr(torch, "inference_mode", lambda mode=True: contextlib.nullcontext())
    plan = problem.plan_of.__wrapped__.__wrapped__(problem.Causal(), 8, 8, 1, (4, 4), torch.device("cpu"))
    with torch._C._InferenceMode(True):
        kept = Plan.derive(plan, "rows", lambda: plan.indptr.diff())
    assert kept.is_inference() == careless
