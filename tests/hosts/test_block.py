"""The shells around an attention and a mixer, against their equations."""

import pytest
import torch
from torch.nn import functional as F

from saccade import mechanism
from saccade.contract import Dims
from saccade.hosts.block import AttentionMixer, Block
from saccade.mechanisms.spatial_window.nat import nat_block
from saccade.testing.budget import compare


def randomised(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def by_equation(block, x, mixer):
    """Both residual branches from the parameters' names."""
    w = dict(block.named_parameters())
    one, two = w.get("scale_mixer", 1.0), w.get("scale_mlp", 1.0)
    x = x + one * mixer(F.layer_norm(x, x.shape[-1:], w["norm_mixer.weight"], w["norm_mixer.bias"]))
    y = F.layer_norm(x, x.shape[-1:], w["norm_mlp.weight"], w["norm_mlp.bias"])
    hidden = y @ w["mlp.0.weight"].T + w["mlp.0.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + two * (hidden @ w["mlp.2.weight"].T + w["mlp.2.bias"])


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_a_block_is_two_scaled_residual_branches(layer_scale):
    block = randomised(Block(Dims(2, 8), torch.nn.Linear(16, 16), mlp_ratio=3, layer_scale=layer_scale).double())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    truth = by_equation(block, x, block.mixer)
    assert compare(block(x), truth, truth, terms=48).ok
    assert not compare(block(x) - 1e-6 * x, truth, truth, terms=48).ok


def test_layer_scale_starts_where_it_is_told():
    block = Block(Dims(2, 8), torch.nn.Identity(), layer_scale=0.25)
    assert block.scale_mixer.eq(0.25).all()
    assert block.scale_mlp.eq(0.25).all()
    assert Block(Dims(2, 8), torch.nn.Identity()).scale_mixer is None


@torch.no_grad()
def test_a_mixer_projects_into_grouped_heads():
    dims = Dims(4, 3, 2)
    mixer = randomised(AttentionMixer(mechanism("moba")(dims, block=4, top_k=3)).double())
    x, w = torch.randn(2, 9, 12, dtype=torch.float64), dict(mixer.named_parameters())
    rows = x @ w["qkv.weight"].T + w["qkv.bias"]
    q, k, v = (part.view(2, 9, -1, 3).transpose(1, 2) for part in rows.split([12, 6, 6], 2))
    heads = mixer.attention.oracle(q, k, v)
    truth = torch.cat(heads.unbind(1), -1) @ w["out.weight"].T + w["out.bias"]
    assert compare(mixer(x), truth, truth, terms=12 * 12).ok


def test_the_nat_block_has_the_papers_shape():
    block = nat_block(Dims(2, 32, grid=(8, 8)), layer_scale=1e-5)
    assert block.mlp[0].out_features == 3 * 64
    x = torch.randn(1, 64, 64, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in block.parameters())


def test_mlp_ratio_is_a_positive_integer():
    with pytest.raises(ValueError, match="mlp_ratio: got 0"):
        Block(Dims(2, 8), torch.nn.Identity(), mlp_ratio=0)
