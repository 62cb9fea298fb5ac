"""Layers of the delta rule against their equations, token by token in float64: values, gradients, and any pieces."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from saccade.contract import Dims
from saccade.hosts.delta import DeltaNet, GatedDeltaNet
from saccade.testing.budget import assert_close, compare
from saccade.testing.gradients import check_gradients, differentiate
from saccade.testing.rounding import Eager
from saccade.testing.subject import randomise

CASES = [(Dims(2, 4), {"chunk": 5}), (Dims(4, 3, 2), {"taps": 3, "chunk": 4}), (Dims(3, 2, 1), {"taps": 1})]


def by_definition(layer, x, forgets):
    """One token after another, each head by itself."""
    w, d = dict(layer.named_parameters()), layer.dims
    kernel, rows, memories, taps = w["taps"][:, 0], [], {}, w["taps"].shape[2]
    projected = x @ w["project.weight"].T
    for t in range(x.shape[1]):
        token = x[:, t]
        mixed = sum(projected[:, t - back] * kernel[:, taps - 1 - back] for back in range(min(taps, t + 1)))
        heads = (mixed / (1 + torch.exp(-mixed))).split(d.head_dim, -1)
        gate, outs = token @ w["gate.weight"].T, []
        for h in range(d.num_heads):
            g = h // d.group
            q, k, v = heads[h], heads[d.num_heads + g], heads[d.num_heads + d.num_kv_heads + g]
            q, k = (y / y.square().sum(-1, keepdim=True) ** 0.5 for y in (q, k))
            b = 1 / (1 + torch.exp(-token @ w["write.weight"][g]))
            old = memories.get(h, torch.zeros(len(x), d.head_dim, d.head_dim, dtype=x.dtype))
            if forgets:
                step = torch.log1p(torch.exp(token @ w["shut.weight"][g] + w["step_bias"][g]))
                old = old * torch.exp(-torch.exp(w["log_rate"][g]) * step)[:, None, None]
            erased = old - b[:, None, None] * k[:, :, None] * (k[:, :, None] * old).sum(1, keepdim=True)
            memories[h] = erased + b[:, None, None] * k[:, :, None] * v[:, None]
            o = (q[:, :, None] * memories[h]).sum(1) / d.head_dim**0.5
            outs.append(o / (o.square().mean(-1, keepdim=True) + 1e-5) ** 0.5 * w["norm.weight"])
        rows.append((torch.cat(outs, -1) * gate / (1 + torch.exp(-gate))) @ w["out.weight"].T)
    return torch.stack(rows, 1)


def made(cls, dims, options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(cls(dims, **options)).double(), torch.randn(2, 13, dims.dim).double()


@pytest.mark.parametrize(("dims", "options"), CASES)
@pytest.mark.parametrize("cls", [DeltaNet, GatedDeltaNet])
def test_a_layer_is_its_equations(cls, dims, options):
    layer, x = made(cls, dims, options)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def equations(module):
        return partial(by_definition, module, forgets=cls is GatedDeltaNet)

    eager = Eager(lambda module, inputs: {"output": equations(module)(*inputs)}, layer, [x], torch.float64)
    with torch.no_grad():
        assert_close(layer(x), eager.truth["output"], eager.beside("output"), terms=x.shape[1])

    def gradients(module, inputs):
        return differentiate(equations(module), inputs, ["x"], module, weight)

    found = differentiate(layer, [x], ["x"], layer, weight)
    check_gradients(found, Eager(gradients, layer, [x], torch.float64), terms=x.shape[1])
    assert all(g.any() for g in found.values())


@torch.no_grad()
@pytest.mark.parametrize("fault", ["decay", "keys", "taps"])
def test_faults_are_noticed(monkeypatch, fault):
    dims, options = CASES[1]
    layer, x = made(GatedDeltaNet, dims, options)
    truth = by_definition(layer, x, forgets=True)
    if fault == "decay":
        monkeypatch.setattr(layer, "log_decay", lambda x: GatedDeltaNet.log_decay(layer, x) / 2)
    elif fault == "keys":
        monkeypatch.setattr(F, "normalize", lambda x, dim: x)
    else:
        layer.taps.copy_(layer.taps.flip(-1))
    assert not compare(layer(x), truth, truth, terms=x.shape[1] * dims.dim**2).ok


@torch.no_grad()
@pytest.mark.parametrize("cls", [DeltaNet, GatedDeltaNet])
def test_pieces_are_the_whole(cls):
    layer, x = made(cls, *CASES[1])
    for stops in ([*range(14)], [0, 1, 2, 7, 13], [0, 12, 13]):
        rows, state = [], None
        for start, stop in itertools.pairwise(stops):
            row, state = layer.step(x[:, start:stop], state=state)
            rows.append(row)
        truth = by_definition(layer, x, forgets=cls is GatedDeltaNet)
        assert_close(torch.cat(rows, 1), truth, truth, terms=x.shape[1] * layer.dims.dim**2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    layer, x = made(GatedDeltaNet, *CASES[1])
    layer, x = layer.to(dtype), x.to(dtype)
    eager = by_definition(layer, x, forgets=True)
    truth = by_definition(layer.double(), x.double(), forgets=True)
    found = layer.to(dtype)(x)
    assert found.dtype == dtype
    assert_close(found, truth, eager, terms=layer.dims.dim**2)


def test_a_bad_size_is_refused():
    with pytest.raises(ValueError, match="taps: got 0; pass an integer >= 1"):
        DeltaNet(Dims(2, 4), taps=0)
    with pytest.raises(ValueError, match="chunk: got 0; pass an integer >= 1"):
        GatedDeltaNet(Dims(2, 4), chunk=0)
