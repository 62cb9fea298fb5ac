"""Whole models against timm's, with the same weights, in float64: what two teams read in one paper.

Weights go over in the order of registration, which is that of the computation in both; a pair that does not belong
together would show in the output.
"""

import pytest
import timm
import torch
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

from saccade import mechanism
from saccade.hosts.block import num_parameters
from saccade.hosts.pyramid import Stage
from saccade.testing.budget import assert_close
from saccade.testing.subject import randomise, widen


def statistics(model):
    return [buffer for name, buffer in model.named_buffers() if "running" in name]


@torch.no_grad()
def same(ours, theirs, size, table=lambda weight: weight):
    """Raise unless both give the same logits; table: their table of biases as ours, which stand after the queries'."""
    ours, theirs = ours.double().eval(), randomise(theirs.double().eval())
    weights = list(theirs.named_parameters())
    for at, (name, _) in enumerate(weights):
        if name.endswith("table") and not weights[at - 1][0].endswith("qkv.bias"):
            weights[at : at + 3] = [*weights[at + 1 : at + 3], weights[at]]
    for (name, mine), (_, weight) in zip(ours.named_parameters(), weights, strict=True):
        mine.copy_((table(weight) if name.endswith("table") else weight).reshape(mine.shape))
    for mine, statistic in zip(statistics(ours), statistics(theirs), strict=True):
        mine.copy_(statistic)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    truth = theirs(x)
    eager = widen(truth, theirs.float()(x.float()))
    assert_close(ours(x), truth, eager, name="logits", terms=ours.levels[-1].dims.dim)


def test_davit():
    theirs = DaVit(embed_dims=(8, 16), depths=(1, 2), num_heads=(2, 4), window_size=3, num_classes=5)
    stages = [Stage(8, 1, 2, stride=4), Stage(16, 2, 4)]
    ours = mechanism("davit").model(stages=stages, size=(29, 38), num_classes=5, params={"window": 3})
    same(ours, theirs, (29, 38))


def test_maxvit():
    conv = MaxxVitConvCfg(norm_eps=1e-3, act_layer="gelu_tanh", padding="same")
    window = MaxxVitTransformerCfg(
        dim_head=4, window_size=(2, 2), norm_eps=1e-5, act_layer="gelu_tanh", head_first=False, rel_pos_type="bias_tf"
    )
    cfg = MaxxVitCfg((8, 16), (1, 2), ("M",) * 2, 64, True, conv, window, head_hidden_size=16)
    theirs = MaxxVit(cfg, img_size=(32, 48), num_classes=5)
    stages = [Stage(8, 1, 2, stride=4), Stage(16, 2, 4)]
    params = {"window": 2, "grid_size": 2}
    ours = mechanism("maxvit").model(stages=stages, size=(32, 48), num_classes=5, params=params)
    same(ours, theirs, (32, 48), lambda table: table.flip(1, 2))  # theirs is by key minus query


def test_gcvit():
    theirs = GlobalContextVit(
        img_size=64, window_size=(4, 8), embed_dim=32, depths=(2, 3), num_heads=(2, 4), num_classes=5
    )

    def block(dims, stage, index):
        return mechanism("gcvit")(dims, window=(4, 8)[stage], depth=(2, 3)[stage])

    stages = [Stage(32, 1, 2, stride=4), Stage(64, 1, 4)]
    ours = mechanism("gcvit").model(stages=stages, size=(64, 64), num_classes=5, block=block)
    same(ours, theirs, (64, 64), lambda table: table.T)


@pytest.mark.parametrize(
    ("id", "name", "theirs"),
    [
        ("davit", "tiny", "davit_tiny"),
        ("davit", "small", "davit_small"),
        ("gcvit", "tiny", "gcvit_tiny"),
        ("gcvit", "small", "gcvit_small"),
        ("maxvit", "tiny", "maxvit_tiny_tf_224"),
        ("maxvit", "base", "maxvit_base_tf_224"),
    ],
)
def test_as_many_parameters(id, name, theirs):
    assert num_parameters(lambda: mechanism(id).model(name)) == num_parameters(lambda: timm.create_model(theirs))
