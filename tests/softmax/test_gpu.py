"""On a GPU every backend gives the oracle's numbers and gradients, and no backend more than twice the eager error."""

from __future__ import annotations

import oracle
import pytest
import torch

from saccade.softmax import RelativeTable, attend, explain
from saccade.testing.budget import assert_close
from saccade.where import Causal, Columns, Full, Neighborhood, PerHead, Sinks, Strided, Window, plan_chosen

# The compiler that FlexAttention needs warns of its own old habits.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

B, H, KV, D = 2, 4, 2, 32
FEW = 4  # terms of the band: two units in the last place beside twice the eager error


def routed(n, m):
    chosen = torch.randint(-1, -(-m // 128), (B * H, -(-n // 128), 2))
    chosen[:, :, 0] = 0
    group_of = torch.arange(B * H).view(B, H)
    plan = plan_chosen(Causal(), chosen, group_of, n, m, (128, 128))
    return plan.to("cuda"), oracle.entries_chosen(Causal().dense(n, m)[0], chosen, group_of, (128, 128))


def static(pattern):
    return lambda n, m: (pattern, oracle.entries_of(pattern.dense(n, m, H)))


PROBLEMS = {
    "full": (static(Full()), 256, 256),
    "full, odd": (static(Full()), 131, 257),
    "causal": (static(Causal()), 256, 256),
    "causal, odd": (static(Causal()), 257, 257),
    "causal, last queries": (static(Causal()), 67, 301),
    "one query": (static(Causal()), 1, 301),
    "window": (static(Causal() & (Window(65) | Sinks(3))), 301, 301),
    "nothing for some": (static(Window(3) & Columns(1, 7, 2)), 300, 300),
    "strided": (static(Causal() & Strided(3)), 300, 300),
    "heads": (static(PerHead([Causal(), Window(40) & Causal(), Full(), Causal()])), 257, 301),
    "grid": (static(Neighborhood((16, 20), 5)), 320, 320),
    "routed": (routed, 300, 300),
}
BACKENDS = ("sdpa", "flex", "tiles", "reference")
RUNS = [
    (backend, name, options)
    for backend in BACKENDS
    for name in PROBLEMS
    for options in ("plain", "all")
    if backend != "sdpa" or (options == "plain" and name.startswith(("full", "causal", "one")) and "last" not in name)
]


def differentiated(run, inputs, cotangents):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    o, lse = run(*inputs)
    loss = (o * cotangents[0].to(o)).sum()
    if lse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * cotangents[1].to(lse)).sum()
    return [o.detach(), lse, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "name", "options"), RUNS)
def test_values_and_gradients(backend, name, options, dtype):
    make, n, m = PROBLEMS[name]
    where, entries = make(n, m)
    inputs = [torch.randn(B, *shape).to(dtype) for shape in ((H, n, D), (KV, m, D), (KV, m, D))]
    cotangents = torch.randn(B, H, n, D).to(dtype), torch.randn(B, H, n)
    sink = [torch.randn(H)] if options == "all" else []
    softcap = 5.0 if options == "all" else None
    has_lse = backend != "sdpa"

    def plain(dtype):
        def run(q, k, v, *sink):
            o, lse = oracle.attention(q, k, v, entries, sink=sink[0] if sink else None, softcap=softcap)
            return o, lse if has_lse else None

        return differentiated(run, [x.to(dtype) for x in (*inputs, *sink)], cotangents)

    def fast(q, k, v, *sink):
        more = {"sink": sink[0] if sink else None, "softcap": softcap, "backend": backend}
        found = attend(q, k, v, where, **more, return_lse=has_lse)
        return found if has_lse else (found, None)

    found = differentiated(fast, [x.cuda() for x in (*inputs, *sink)], [x.cuda() for x in cotangents])
    # A gradient of scores is a difference that may cancel; its rounding is that of what is subtracted.
    difference = (
        float(cotangents[0].norm(dim=-1).max() * inputs[2].norm(dim=-1).max() * inputs[1].abs().max()) * D**-0.5
    )
    scale = difference if dtype == torch.float32 else 0.0  # else it is formed in float32, and rounded once
    truth, eager, single = plain(torch.float64), plain(dtype), plain(torch.float32)
    for at, what in enumerate(("o", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of sink")):
        if at >= len(found) or found[at] is None:
            continue
        mine = found[at].detach().cpu()
        exact, beside = truth[at].detach(), (single if mine.dtype == torch.float32 else eager)[at].detach()
        if dtype != torch.float32 and what == "gradient of sink":  # float32, of a sum of products in the narrow dtype
            beside = eager[at].detach()
        assert_close(mine, exact, beside.to(mine.dtype), name=what, terms=FEW, scale=scale)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_bias_and_float64(backend):
    n = 150
    where = Causal() & Window(33)
    q, k, v = (torch.randn(B, heads, n, D, dtype=torch.float64) for heads in (H, KV, KV))
    bias = RelativeTable(H, (20,)).double()
    torch.nn.init.normal_(bias.table)
    exact, _ = oracle.attention(
        q, k, v, oracle.entries_of(where.dense(n, n, H)), bias=oracle.relative_bias(bias.table, None, n, n)
    )
    with torch.no_grad():
        found = attend(q.cuda(), k.cuda(), v.cuda(), where, bias=bias.cuda(), backend=backend)
    exact = exact.detach()
    scale = float(v.abs().max() * q.norm(dim=-1).max() * k.norm(dim=-1).max()) * D**-0.5
    assert_close(found.cpu(), exact, exact, terms=n, scale=scale)


def test_what_cannot_run_says_so():
    q, k, v = (torch.randn(1, 1, 8, D, dtype=torch.float64, device="cuda") for _ in range(3))
    found = explain(q, k, v, Full())
    assert found["flex"] == ["it computes in at most float32"]
    assert "in float64" in found["sdpa"][0]
    assert found["tiles"] == found["reference"] == []
