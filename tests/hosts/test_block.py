"""The shells around an attention and a mixer, against their equations."""

import pytest
import torch
from torch.nn import functional as F

from saccade import mechanism
from saccade.contract import Dims
from saccade.hosts.block import (
    MLP,
    AdaptiveBlock,
    AttentionMixer,
    Block,
    Conditioned,
    ConvMLP,
    Gated,
    Residual,
    TokenNorm,
    init_linear,
    num_parameters,
    published_size,
)
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


def test_options_reach_the_attention():
    def scaled(q, k, v, *, by):
        return by * v

    mixer = AttentionMixer(scaled, dims=Dims(2, 8), bias=False)
    block, x = Block(Dims(2, 8), mixer, mlp=Zero()), torch.randn(1, 5, 16)
    torch.testing.assert_close(block(x, by=2.0) - x, 2 * (block(x, by=1.0) - x))
    torch.testing.assert_close(Residual(mixer)(x, by=0.0), x)


class Zero(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_parts_may_be_handed_in():
    block = Block(Dims(2, 8), torch.nn.Identity(), mlp=Zero(), norm=torch.nn.RMSNorm)
    assert isinstance(block.norm_mixer, torch.nn.RMSNorm)
    assert sum(p.numel() for p in block.parameters()) == 2 * 16
    assert isinstance(MLP(4, 2, torch.nn.ReLU())[1], torch.nn.ReLU)


@torch.no_grad()
def test_a_residual_is_scaled():
    x, scale = torch.randn(1, 5, 16), torch.rand(16)
    branch = Residual(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), scale=scale)
    assert torch.equal(branch(x), x + scale * branch.inner(branch.norm(x)))
    scale.zero_()
    assert branch.scale.any()


@torch.no_grad()
def test_an_mlp_sees_the_neighbours_of_its_hidden_tokens():
    mlp, x = randomised(ConvMLP(4, 6, (3, 5)).double()), torch.randn(2, 15, 4, dtype=torch.float64)
    w = dict(mlp.named_parameters())
    hidden = x @ w["enter.weight"].T + w["enter.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    image = F.pad(hidden.view(2, 3, 5, 6), (0, 0, 1, 1, 1, 1))
    around = sum(w["local.weight"][:, 0, i, j] * image[:, i : i + 3, j : j + 5] for i in range(3) for j in range(3))
    near = around.flatten(1, 2) + w["local.bias"]
    truth = (hidden + near) @ w["leave.weight"].T + w["leave.bias"]
    assert compare(mlp(x), truth, truth, terms=6 * 10).ok
    twin = near @ w["leave.weight"].T + w["leave.bias"]
    assert not compare(twin, truth, truth, terms=6 * 10).ok


@torch.no_grad()
def test_a_gated_branch_is_its_formula():
    branch = randomised(Gated(4, 6, torch.nn.Linear(6, 6)).double())
    x, w = torch.randn(2, 7, 4, dtype=torch.float64), dict(branch.named_parameters())
    u, z = (x @ w["enter.weight"].T).split(6, -1)
    y = u @ w["inner.weight"].T + w["inner.bias"]
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5) ** 0.5
    y = y * w["norm.weight"] + w["norm.bias"]
    truth = (y * z / (1 + torch.exp(-z))) @ w["leave.weight"].T
    assert compare(branch(x), truth, truth, terms=6 * 10).ok
    assert not compare((y * z) @ w["leave.weight"].T, truth, truth, terms=6 * 10).ok


@torch.no_grad()
def test_tokens_are_normalised_together():
    norm, x = randomised(TokenNorm(4).double()), torch.randn(3, 7, 4, dtype=torch.float64)
    rows = x.flatten(0, 1)
    rows = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5) ** 0.5
    truth = (rows * norm.weight + norm.bias).view_as(x)
    assert compare(norm(x), truth, truth, terms=21).ok
    alone = torch.cat([norm(entry[None]) for entry in x])
    assert not compare(alone, truth, truth, terms=21).ok


@torch.no_grad()
def test_an_adaptive_block_is_its_formula():
    block = randomised(AdaptiveBlock(Dims(2, 8), torch.nn.Linear(16, 16), 6, mlp_ratio=2).double())
    x, c = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    w = dict(block.named_parameters())
    moves = c * c.sigmoid() @ w["modulation.weight"].T + w["modulation.bias"]
    b1, s1, g1, b2, s2, g2 = (part[:, None] for part in moves.split(16, -1))
    y = x
    for (b, s, g), inner in (((b1, s1, g1), block.mixer), ((b2, s2, g2), block.mlp)):
        normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6) ** 0.5
        y = y + g * inner(normed * (1 + s) + b)
    assert compare(block(x, condition=c), y, y, terms=16 * 16).ok


@torch.no_grad()
def test_a_condition_moves_any_block():
    block = Conditioned(torch.nn.Identity(), 4, 3)
    x, c = torch.randn(2, 5, 4), torch.randn(2, 3)
    assert torch.equal(block(x, condition=c), x)
    randomised(block)
    s, b = (c @ block.modulation.weight.T + block.modulation.bias)[:, None].split(4, -1)
    torch.testing.assert_close(block(x, condition=c), x * (1 + s) + b)


def test_linear_layers_start_small_and_parameters_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(50, 60), torch.nn.Conv1d(1, 1, 1), torch.nn.Linear(2, 2, bias=False))
    init_linear(model)
    assert not model[0].bias.any()
    assert 0.01 < float(model[0].weight.detach().std()) < 0.03
    assert num_parameters(lambda: torch.nn.Linear(10**6, 10**6)) == 10**12 + 10**6


@pytest.mark.parametrize(
    ("published", "holds"), [({"a": 1.0}, True), ({"a": 1.03}, False), ({"a": 1.0, "b": 1.0}, False)]
)
def test_sizes_are_those_published_within_two_percent(published, holds):
    def model(name, *, width=1000):
        return torch.nn.Linear(width, 1000 if name == "a" else 2000, bias=False)

    found = published_size(model, published)
    assert found.holds == holds
    assert found.figure.startswith("a 1.00 million")
    assert published_size(model, {"a": 0.5}, width=500).holds


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Block(Dims(2, 8), torch.nn.Identity(), mlp_ratio=0), "mlp_ratio: got 0"),
        (lambda: Block(Dims(2, 8), torch.nn.Identity(), mlp_ratio=2, mlp=Zero()), "mlp_ratio: got 2 beside an mlp"),
        (lambda: AttentionMixer(lambda q, k, v: v), "dims: got None, and function has none"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("dims", "width"), [(Dims(2, 3), 3), (Dims(6, 4, num_kv_heads=2), 4), (Dims(4, 2, 1), 5)])
def test_heads_of_one_projection_lie_queries_first(dims, width):
    kv = dims.num_kv_heads
    y = torch.randn(2, 7, (dims.num_heads + 2 * kv) * width, generator=torch.Generator().manual_seed(0))
    starts = {0: dims.num_heads, dims.num_heads: kv, dims.num_heads + kv: kv}
    for found, (start, count) in zip(dims.split(y), starts.items(), strict=True):
        assert found.shape == (2, count, 7, width)
        for h in range(count):
            assert found[:, h].equal(y[..., (start + h) * width : (start + h + 1) * width])
