"""Gradients against finite differences along random directions, through o and lse."""

from __future__ import annotations

import pytest
import torch
from cases import network

from saccade.softmax import Alibi, Entmax, FromCoordinates, RelativeTable, Sigmoid, attend
from saccade.where import Causal, PerHead, Plan, Sinks, Window, plan_chosen

B, H, KV, N, M, D, DV = 1, 4, 2, 5, 7, 3, 2


def routed():
    """Two groups of tiles and single keys: repeated, weighted, and a query tile that gets none."""
    chosen = torch.tensor([[[0, -1], [1, 2], [-1, -1]], [[2, 0], [-1, -1], [0, 1]]])
    tokens = torch.tensor([[[0, 0, 3], [-1, 4, -1], [-1, -1, -1]], [[1, -1, -1], [2, 2, 2], [6, 5, 0]]])
    weights = torch.linspace(-1, 1, tokens.numel()).view(tokens.shape)
    group_of = torch.tensor([[0, 1, 1, 0]])
    return plan_chosen(Causal(), chosen, group_of, N, M, (2, 3), tokens=tokens, token_log_weights=weights)


WHERE = {
    "window": ((Window(2) & Causal()) | Sinks(1)).plan(N, M, H, block=(2, 3)),
    "heads": PerHead([Causal(), Window(1), Window(3), Causal()]).plan(N, M, H, block=(16, 2)),
    "routed": routed(),
    # The first query sees nothing.
    "bits": Plan.from_mask(Causal().dense(N, M, H) & (torch.arange(N) > 0)[:, None], block=(2, 2)),
}


def extras(kind):
    """Options of attend by name; modules and tensors among them are leaves too."""
    table = RelativeTable(H, (3,)).double()
    torch.nn.init.normal_(table.table)
    sink = torch.randn(H, dtype=torch.float64, requires_grad=True)
    coordinates = torch.randn(M, 2, dtype=torch.float64)
    return {
        "plain": {},
        "all": {"bias": table, "sink": sink, "softcap": 1.5, "scale": -0.7},
        "alibi": {"bias": Alibi(H).double(), "sink": sink},
        "network": {"bias": FromCoordinates(network(2, 1, seed=3), coordinates)},
        "sigmoid": {"normalizer": Sigmoid(-1.0), "bias": table},
        "entmax": {"normalizer": "entmax", "softcap": 2.0},
        "sparsemax": {"normalizer": Entmax(2.0), "bias": table},
    }[kind]


def differentiable(where, options, backend):
    """o, and lse where there is one, of q, k, v and whatever else is a leaf."""
    has_lse = "normalizer" not in options

    def run(q, k, v, *rest):
        found = attend(q, k, v, where, **options, return_lse=has_lse, backend=backend)
        if not has_lse:
            return found
        return found[0], found[1].masked_fill(found[1] == -torch.inf, 0)

    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((B, H, N, D), (B, KV, M, D), (B, KV, M, DV))
    ]
    if "sink" in options:
        leaves.append(options["sink"])
    if isinstance(options.get("bias"), torch.nn.Module):
        leaves.extend(options["bias"].parameters())
    return run, leaves


@pytest.mark.parametrize("kind", ["plain", "all", "alibi", "network", "sigmoid", "entmax", "sparsemax"])
@pytest.mark.parametrize("name", WHERE)
def test_tiles(name, kind):
    run, leaves = differentiable(WHERE[name], extras(kind), "tiles")
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


SOME = {"window": ("all", "entmax"), "heads": ("sigmoid",), "routed": ("all",), "bits": ("all", "sparsemax")}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in SOME.items() for kind in kinds])
def test_reference(name, kind):
    run, leaves = differentiable(WHERE[name], extras(kind), "reference")
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
def test_sdpa(causal):
    q, k, v = (torch.randn(B, heads, N, D, dtype=torch.float64, requires_grad=True) for heads in (H, KV, KV))

    def only_o(q, k, v):
        return attend(q, k, v, Causal() if causal else None, backend="sdpa")

    assert torch.autograd.gradcheck(only_o, [q, k, v], fast_mode=True)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sink", "bias"])
@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_one_leaf_alone(wanted, backend):
    """What asks for no gradient changes nothing for what does."""
    options = extras("all")
    run, leaves = differentiable(WHERE["window"], options, backend)
    names = ["q", "k", "v", "sink", "bias"]
    every = dict(zip(names, torch.autograd.grad(run(*leaves)[0].sum(), leaves), strict=True))
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name == wanted)
    o, _ = run(*leaves)
    (alone,) = torch.autograd.grad(o.sum(), leaves[names.index(wanted)])
    assert alone.equal(every[wanted])
    assert alone.any()
