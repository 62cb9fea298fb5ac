"""A graph that holds `attend` is whole: torch.compile and torch.export find one operator, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from saccade import attend
from saccade.softmax import Alibi, RelativeTable
from saccade.softmax.traced import key_of, object_of
from saccade.where import Causal, Documents, Full, Neighborhood, PerHead, Sinks, Strided, Window

N, SIZE = 48, 9
PATTERN = Causal() & Window(20)
PLAN = PATTERN.plan(N, heads=2, block=(16, 16))
TABLE = RelativeTable(2, (5,))
torch.nn.init.normal_(TABLE.table)

# A pattern from outside, one that is made inside the graph, a plan, and what goes with them.
CALLS = {
    "pattern": lambda q, k, v, b: attend(q, k, v, PATTERN, backend=b),
    "inside": lambda q, k, v, b: attend(q, k, v, Causal() & (Window(SIZE) | Sinks(2)), backend=b),
    "grid": lambda q, k, v, b: attend(q, k, v, Neighborhood((6, 8), 3), backend=b),
    "heads": lambda q, k, v, b: attend(q, k, v, PerHead([Causal(), Full()]), backend=b, softcap=3.0),
    "plan": lambda q, k, v, b: attend(q, k, v, PLAN, backend=b, scale=-0.3),
    "table": lambda q, k, v, b: attend(q, k, v, Causal(), backend=b, bias=TABLE),
    "slopes": lambda q, k, v, b: attend(q, k, v, Causal(), backend=b, bias=Alibi(2)),
    "lse": lambda q, k, v, b: sum(x.sum(-1) if x.ndim > 3 else x for x in lse(q, k, v, b)),
}


def lse(q, k, v, backend):
    return attend(q, k, v, Causal(), backend=backend, sink=q[0, :, 0, 0], return_lse=True)


def differentiated(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.sin().sum(), inputs)]


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph(name, dynamic):
    """Bitwise what runs outside of a graph, gradients too."""
    inputs = torch.randn(3, 1, 2, N, 16)

    def call(q, k, v):
        return CALLS[name](q * 2, k, v, "triton") * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for found, exact in zip(differentiated(compiled, inputs), differentiated(call, inputs), strict=True):
        assert found.equal(exact)


@pytest.mark.filterwarnings("ignore")
def test_dense_attention_stays_in_the_graph():
    inputs = torch.randn(3, 1, 2, N, 16)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v), fullgraph=True, backend="aot_eager")
    assert compiled(*inputs).equal(attend(*inputs))


@pytest.mark.filterwarnings("ignore")
def test_other_backends_end_the_graph():
    """They run between two graphs, and where only one is allowed the compiler says so."""
    inputs = torch.randn(3, 1, 2, N, 16)

    def call(q, k, v):
        return attend(q, k, v, PATTERN, backend="tiles") + 1

    assert torch.compile(call, backend="aot_eager")(*inputs).equal(call(*inputs))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)


@pytest.mark.filterwarnings("ignore")
def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, Causal() & Window(SIZE), backend="triton")

    inputs = tuple(torch.randn(3, 1, 2, N, 16))
    exported = torch.export.export(Layer(), inputs)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert torch.ops.saccade.attend.default in called
    others = tuple(torch.randn(3, 1, 2, N, 16))
    assert exported.module()(*others).equal(Layer()(*others))


@pytest.mark.parametrize("pattern", [PATTERN, Documents([0, 4, N]), Neighborhood((6, 8), 3), Strided(3) | Sinks(1)])
def test_patterns_are_taken_apart_and_put_together(pattern):
    assert object_of(key_of(pattern)) == pattern
    assert key_of(pattern) != key_of(Full())
