"""On a GPU every backend gives the oracle's numbers and gradients, and no backend more than twice the eager error."""

from __future__ import annotations

import oracle
import pytest
import torch

from saccade.bench.contestant import watch_backends
from saccade.softmax import RelativeTable, attend, explain, fa4, hopper, measure, measuring, rates, which, why
from saccade.testing.budget import assert_close
from saccade.where import (
    Band,
    Blocks,
    Causal,
    Columns,
    Full,
    Neighborhood,
    PerHead,
    Sinks,
    Strided,
    Window,
    plan_chosen,
)

# The compilers that FlexAttention and FlashAttention-4 need warn of their own old habits.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot be converted to a JitArgument"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

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


def tiled(pattern, block):
    return lambda n, m: (pattern.plan(n, m, H, block, "cuda"), oracle.entries_of(pattern.dense(n, m, H)))


def in_cells(pattern):
    return lambda n, m: (pattern.gathered(n, m, H, (64, 64), "cuda"), oracle.entries_of(pattern.dense(n, m, H)))


def single(n, m):
    """A list a query and key head; single keys beside the tiles."""
    chosen, tokens = torch.randint(-1, -(-m // 64), (B * KV, n, 2)), torch.randint(-1, m, (B * KV, n, 5))
    group_of = torch.arange(B * KV).view(B, KV).repeat_interleave(H // KV, 1)
    plan = plan_chosen(Causal(), chosen, group_of, n, m, (1, 64), tokens=tokens, alike=H // KV)
    mask = Causal().dense(n, m)[0]
    return plan.to("cuda"), oracle.entries_chosen(mask, chosen, group_of, (1, 64), tokens, None)


# What only `triton` takes: tiles of any size, cells that begin anywhere, single queries and keys.
TRITON = {
    "tiles of 16": (tiled(Causal() & (Window(90) | Sinks(3)), (16, 16)), 301, 301),
    "tiles of 32 by 128": (tiled(Causal() & Window(90), (32, 128)), 257, 301),
    "tiles of 4 by 2": (tiled(Causal() & Window(9), (4, 2)), 70, 70),
    "cells in two axes": (in_cells(Neighborhood((24, 40), (7, 9))), 960, 960),
    "cells in three axes": (in_cells(Neighborhood((8, 16, 16), (3, 5, 6), stride=(1, 2, 1))), 2048, 2048),
    "single queries and keys": (single, 150, 150),
}
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
GLUON = ["hopper"] if hopper.version().startswith(hopper.WRITTEN_FOR) else []
OPTIONAL = [*(["fa4"] if fa4.installed() else []), *GLUON]
BACKENDS = ("sdpa", *OPTIONAL, "triton", "flex", "tiles", "reference")
DTYPES = (torch.float32, torch.bfloat16)
RUNS = [
    pytest.param(backend, name, options, dtype, id=f"{backend}-{name}-{options}-{dtype}")
    for backend in BACKENDS
    for name in PROBLEMS
    for options in ("plain", "all")
    for dtype in DTYPES
    if (backend != "sdpa" or (options == "plain" and name.startswith(("full", "causal", "one")) and "last" not in name))
    and (backend not in OPTIONAL or dtype != torch.float32)
]


def differentiated(run, inputs, cotangents):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    o, lse = run(*inputs)
    loss = (o * cotangents[0].to(o)).sum()
    if lse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * cotangents[1].to(lse)).sum()
    return [o.detach(), lse, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("backend", "name", "options", "dtype"), RUNS)
def test_values_and_gradients(backend, name, options, dtype):
    check(backend, name, options, dtype, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", TRITON)
def test_plans_of_the_triton_backend(name, head_dim, dtype):
    check("triton", name, "all", dtype, head_dim)


@pytest.mark.parametrize("name", ["full", "causal", "window"])
@pytest.mark.parametrize("backend", ["sdpa", *OPTIONAL, "triton", "flex"])
def test_a_captured_graph_gives_the_same(backend, name):
    """Forward and backward, captured once and replayed on other inputs: what the backend gives outside of a graph."""
    if backend == "sdpa" and name == "window":
        name = "causal"
    (pattern, _), n = PROBLEMS[name][0](256, 256), 256
    inputs = [torch.randn(B, heads, n, 64, device="cuda", dtype=torch.bfloat16) for heads in (H, KV, KV)]
    grad = torch.randn_like(inputs[0])

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = attend(*leaves, pattern, backend=backend)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x in (*inputs, grad):
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip(found, run(), strict=True):
        assert_close(mine.cpu(), other.cpu().double(), other.cpu(), terms=FEW)


OTHERS = [
    pytest.param(name, head_dim, dtype, id=f"{name}-{head_dim}-{dtype}")
    for name, head_dim, dtype in (
        *((name, size, torch.bfloat16) for name in ("full, odd", "causal", "window", "grid") for size in (64, 128)),
        ("window", 96, torch.bfloat16),
        ("routed", 128, torch.bfloat16),
        ("causal", 64, torch.float16),
        ("window", 128, torch.float16),
    )
]


@pytest.mark.parametrize(("name", "head_dim", "dtype"), OTHERS)
@pytest.mark.parametrize("backend", [*OPTIONAL, "triton"])
def test_other_tiles_for_other_head_dims(backend, name, head_dim, dtype):
    check(backend, name, "all", dtype, head_dim)


def check(backend, name, options, dtype, head_dim):
    make, n, m = (PROBLEMS | TRITON)[name]
    where, entries = make(n, m)
    inputs = [torch.randn(B, *shape, head_dim).to(dtype) for shape in ((H, n), (KV, m), (KV, m))]
    cotangents = torch.randn(B, H, n, head_dim).to(dtype), torch.randn(B, H, n)
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
        float(cotangents[0].norm(dim=-1).max() * inputs[2].norm(dim=-1).max() * inputs[1].abs().max()) * head_dim**-0.5
    )
    scale = difference if dtype == torch.float32 else 0.0  # else it is formed in float32, and rounded once
    truth, eager, single = plain(torch.float64), plain(dtype), plain(torch.float32)
    for at, what in enumerate(("o", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of sink")):
        if at >= len(found) or found[at] is None:
            continue
        mine, rounding = found[at].detach().cpu(), 0.0
        exact, beside = truth[at].detach(), (single if mine.dtype == torch.float32 else eager)[at].detach()
        if dtype != torch.float32 and what == "gradient of sink":  # float32, of a sum of products in the narrow dtype
            beside, rounding = eager[at].detach(), torch.finfo(dtype).eps / torch.finfo(mine.dtype).eps
        assert_close(
            mine, exact, beside.to(mine.dtype), name=what, terms=FEW, scale=scale or rounding * float(exact.abs().max())
        )


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


def many(n, dtype=torch.bfloat16, **options):
    return [torch.randn(B, heads, n, D, dtype=dtype, device="cuda", **options) for heads in (H, KV, KV)]


ONE_BOX = [Causal() & Window(99), Window(17), Band(3, 40), Blocks(48)]  # each one box over one axis


def test_flex_compiles_once_for_all_patterns():
    inputs = many(320, requires_grad=True)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for where in ONE_BOX:
        attend(*inputs, where, backend="flex").sum().backward()
    assert graphs["unique_graphs"] - before == 1
    for softcap in (2.0, 3.0, 5.5):
        attend(*inputs, ONE_BOX[0], softcap=softcap, backend="flex").sum().backward()
    assert graphs["unique_graphs"] - before == 2


@pytest.mark.parametrize("softcap", [(None, None, None, None), (2.0, 3.0, 4.0, 5.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("backend", ["fa4"] if fa4.installed() else [])
def test_fa4_compiles_once_for_all_patterns(backend, softcap):
    from flash_attn.cute import interface

    caches = interface._flash_attn_fwd.compile_cache.cache, interface._flash_attn_bwd.compile_cache.cache
    inputs = many(320, requires_grad=True)
    before = None
    patterns = [where | Sinks(3) for where in ONE_BOX]  # two boxes: lists, not code of its own
    for where, cap in zip(patterns, softcap, strict=True):
        attend(*inputs, where, softcap=cap, backend=backend).sum().backward()
        before = [len(cache) for cache in caches] if before is None else before
    assert [len(cache) for cache in caches] == before


def softmax(q, k, v, where):
    """(o, lse) from all scores at once."""
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    mask = where.dense(q.shape[2], k.shape[2])[0].to(q.device)
    scores = (q @ k.transpose(2, 3) * D**-0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("where", [Full(), Causal()], ids=repr)
@pytest.mark.parametrize("n", [64, 2048])
def test_sdpa_returns_lse_without_gradients(n, where):
    q, k, v = many(n)
    o, lse = attend(q, k, v, where, return_lse=True, backend="sdpa")
    truth, single = (softmax(*(x.to(dtype) for x in (q, k, v)), where) for dtype in (torch.float64, torch.float32))
    assert_close(o, truth[0], softmax(q, k, v, where)[0], name="o", terms=FEW)
    assert_close(lse, truth[1], single[1], name="lse", terms=FEW)
    with pytest.raises(ValueError, match="its lse has no gradients"):
        attend(q.requires_grad_(), k, v, where, return_lse=True, backend="sdpa")


def test_cudnn_runs_where_it_is_put_first():
    from torch.profiler import ProfilerActivity, profile

    hopper = torch.cuda.get_device_capability()[0] == 9  # elsewhere PyTorch's own order holds
    for n, expected in ((2048, hopper), (64, False)):
        inputs = many(n, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
            attend(*inputs, Causal(), backend="sdpa").sum().backward()
        names = {event.key for event in found.key_averages()}
        assert any("cudnn_attention" in name for name in names) == expected
        assert any("cudnn_attention_backward" in name for name in names) == expected


@pytest.mark.parametrize("where", [Full(), Causal(), Causal() & Window(65), Neighborhood((16, 20), 5)], ids=repr)
def test_the_backend_that_ran_is_seen(where):
    q, k, v = many(320)
    with watch_backends() as ran:
        attend(q, k, v, where)
    assert ran == {which(q, k, v, where)}


def test_what_was_measured_is_chosen_by(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "LENGTH", 512)
    monkeypatch.setattr(measuring, "HEADS", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        path = measure(backends=["sdpa"], head_dims=[D], dtypes=[torch.bfloat16])
        assert path == rates.user_path(*torch.cuda.get_device_capability())
        rows = rates.Table.load(path).rows
        assert [(row.backend, row.gradients, set(row.rates)) for row in rows] == [
            ("sdpa", False, {"full", "causal"}),
            ("sdpa", True, {"full", "causal"}),
        ]
        assert all(rate > 0 for row in rows for rate in row.rates.values())
        said = why(*many(320), Full())
        assert said.startswith("sdpa ")
        assert "the lowest estimate" in said
    finally:
        rates.table_of.cache_clear()
