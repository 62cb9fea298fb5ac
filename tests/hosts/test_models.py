"""The models that mechanisms declare: each keeps the convention, builds its paper's tiny, and runs at odd sizes."""

import inspect

import pytest
import torch

import saccade
from saccade import mechanism
from saccade.hosts.pyramid import Pyramid
from saccade.hosts.vit import ViT

WITH_A_MODEL = [spec.id for spec in saccade.mechanisms() if hasattr(mechanism(spec.id), "model")]


def test_some_mechanisms_have_a_model():
    assert {"davit", "gcvit", "maxvit"} <= set(WITH_A_MODEL)


@pytest.mark.parametrize("id", WITH_A_MODEL)
def test_a_model_keeps_the_convention(id):
    cls = mechanism(id)
    name, params, host = list(inspect.signature(cls.model).parameters.values())[:3]
    assert (name.name, params.name, params.default) == ("name", "params", None)
    assert params.kind == inspect.Parameter.KEYWORD_ONLY
    assert host.kind == inspect.Parameter.VAR_KEYWORD
    text = cls.model.__doc__ or ""
    assert "million" in text
    assert "published_size" in cls.claims() or "no published count" in text
    with torch.device("meta"):
        assert isinstance(cls.model(), torch.nn.Module)
        with pytest.raises(ValueError, match="name: got 'Tiniest'; choose one of"):
            cls.model("Tiniest")
        with pytest.raises(TypeError, match="no_such_parameter"):
            cls.model(params={"no_such_parameter": 1})


@torch.no_grad()
@pytest.mark.parametrize("id", WITH_A_MODEL)
def test_the_default_model_runs_at_an_odd_size(id):
    with torch.device("meta"):
        host = mechanism(id).model()
    if isinstance(host, Pyramid | ViT):
        size = (3, 45, 37)[-len(host.size) :]
        found = mechanism(id).model(size=size, num_classes=3).eval()(torch.randn(1, host.in_channels, *size))
        assert found.shape == (1, 3)
        assert found.isfinite().all()
        assert found.std() > 0
