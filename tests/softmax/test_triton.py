"""The kernels, in Triton's interpreter, give the oracle's numbers and gradients for any plan and any option."""

from __future__ import annotations

import math

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.softmax import FromCoordinates, attend, explain, triton
from saccade.softmax.kernels import arguments, ops
from saccade.softmax.problem import Problem
from saccade.testing.budget import assert_close
from saccade.where import Causal, Full, Neighborhood, PerHead, Plan, Window, plan_chosen

SIDES = st.sampled_from([4, 16, 16, 32])


@st.composite
def problems(draw):
    """A float32 problem that the kernels take: tiles of 4 to 32 tokens on a side, two biases, softmax."""
    heads, kv_heads = draw(st.sampled_from(cases.RATIOS))
    batch, d, dv = draw(st.integers(1, 2)), draw(st.integers(1, 33)), draw(st.integers(1, 33))
    pattern, n, m, grid = draw(cases.patterns(heads))
    block = draw(st.tuples(SIDES, SIDES))
    where, entries = pattern.plan(n, m, heads, block), oracle.entries_of(pattern.dense(n, m, heads))
    if draw(st.booleans()) and not isinstance(pattern, PerHead):
        mask = pattern.dense(n, m, 1)[0]
        where, entries = cases.random_entries(mask, pattern, block, draw(st.integers(1, 3)), batch, heads, draw)
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, k, v = (
        torch.randn(shape, generator=seeded, dtype=torch.float64)
        for shape in ((batch, heads, n, d), (batch, kv_heads, m, d), (batch, kv_heads, m, dv))
    )
    how = draw(cases.options(heads, n, m, grid, ()))
    if isinstance(how.get("bias"), FromCoordinates):
        del how["bias"]
    return cases.Case(q, k, v, where, entries, how, grid)


def differentiated(case, run, cotangents):
    """o, lse and the gradient of every leaf by name."""
    case = case.to(case.q.dtype)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
    o, lse = run(case)
    loss = (o * cotangents[0].to(o)).sum() + (lse.masked_fill(lse == -torch.inf, 0) * cotangents[1].to(lse)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else []
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    named = {f"gradient of {name}": g for name, g in zip(leaves, found, strict=False) if g is not None}
    return {"o": o.detach(), "lse": lse.detach()} | {f"gradient of {n}": z for n, z in zeros.items()} | named


def agree(case, run=attend, dtype=torch.float32):
    """Values and gradients of the kernels are within the budget of the oracle run eagerly in their dtype."""
    cotangents = torch.randn(case.q.shape[:3] + case.v.shape[-1:]), torch.randn(case.q.shape[:3])
    narrow = case.to(dtype)
    truth = differentiated(narrow.to(torch.float64), cases.Case.truth, cotangents)
    eager = differentiated(narrow, cases.Case.truth, cotangents)
    found = differentiated(narrow, lambda case: case.run("triton", run), cotangents)
    most = max(float(x.masked_fill(x == -torch.inf, 0).abs().max()) for x in truth.values())
    for name, exact in truth.items():
        size = case.size() * max(most, float(case.v.abs().max()))
        assert found[name].dtype == (torch.float32 if name == "lse" else dtype)
        assert_close(found[name], exact, eager[name].to(found[name]), name=name, terms=case.terms(), scale=size)


@settings(max_examples=25)
@given(problems())
def test_kernels_agree_with_the_oracle(case):
    agree(case)


def shifted(q, k, v, where, **options):
    """A broken twin: it reads every list one tile late."""
    tables = arguments.Tables.of

    def late(plan, in_cells):
        return tables(plan, in_cells)._replace(indices=(plan.indices + 1) % plan.num_col_tiles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments.Tables, "of", late)
        return attend(q, k, v, where, **options)


def test_a_list_read_wrongly_is_caught():
    pattern = Causal() & Window(20)
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    case = cases.Case(q, k, v, pattern.plan(70, heads=2, block=(16, 16)), oracle.entries_of(pattern.dense(70, 70, 2)))
    agree(case)
    with pytest.raises(AssertionError, match="error"):
        agree(case, shifted)


@pytest.mark.parametrize("block", [(16, 64), (32, 16), (64, 128), (128, 64), (1, 16), (2, 8), (32, 1)])
def test_every_tile(block):
    pattern = Causal() & Window(40)
    q, k, v = (torch.randn(1, heads, 150, 20, dtype=torch.float64) for heads in (4, 1, 1))
    where, entries = pattern.plan(150, heads=4, block=block), oracle.entries_of(pattern.dense(150, 150, 4))
    agree(cases.Case(q, k, v, where, entries, {"softcap": 2.0}))


CELLS = [
    (Neighborhood((8, 16), 5), (16, 16)),
    (Neighborhood((4, 4, 8), (3, 3, 5), stride=(1, 2, 2)), (32, 16)),
    (Neighborhood((6, 40), (4, 7), causal=(True, False)), (16, 16)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize(("pattern", "block"), CELLS, ids=str)
def test_cells_of_a_grid(pattern, block, anywhere, dtype):
    """Cells are read where they lie, in float16 through descriptors; those that begin anywhere, too."""
    n = math.prod(pattern.grid)
    q, k, v = (
        torch.randn(2, heads, n, 12 if dtype == torch.float32 else 16, dtype=torch.float64) for heads in (2, 1, 1)
    )
    where = pattern.gathered(n, heads=2, block=block) if anywhere else pattern.plan(n, heads=2, block=block)
    assert (where.token_grid is not None) == anywhere
    agree(cases.Case(q, k, v, where, oracle.entries_of(pattern.dense(n, n, 2))), dtype=dtype)


def test_lists_of_single_queries_are_shared_by_their_heads():
    """A list a query and key head, as a router of queries makes them: its query heads are rows of one product."""
    chosen = torch.randint(-1, 4, (4, 50, 2))
    group_of = torch.arange(4).view(2, 2).repeat_interleave(2, 1)
    where = plan_chosen(Causal(), chosen, group_of, 50, 50, (1, 16), alike=2).verify()
    entries = oracle.entries_chosen(Causal().dense(50)[0], chosen, group_of, (1, 16), None, None)
    q, k, v = (torch.randn(2, heads, 50, 8, dtype=torch.float64) for heads in (4, 2, 2))
    assert triton.settle(Problem.of(q.float(), k.float(), v.float(), where)).sizes[len(ops.NUMBERS) + 2] == 2
    agree(cases.Case(q, k, v, where, entries))


def test_equal_inputs_give_equal_bits():
    q, k, v = (torch.randn(1, heads, 90, 16, requires_grad=True) for heads in (4, 2, 2))
    where = (Causal() & Window(33)).plan(90, heads=4, block=(16, 32))

    def run():
        o = attend(q, k, v, where, backend="triton")
        return [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


def test_operator_is_well_formed():
    """Schema, fake tensors and autograd registration, as PyTorch itself checks them."""
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    problem = Problem.of(q, k, v, Causal(), sink=torch.randn(2, requires_grad=True))
    settled = triton.settle(problem)
    given_arguments = (q, k, v, problem.sink, None, *settled, 0.25, 0.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attend.overload, given_arguments, test_utils=checks)


def test_what_cannot_run_says_so():
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    assert explain(q, k, v, Full())["triton"] == []
    assert explain(q.double(), k.double(), v.double(), Full())["triton"] == ["it computes in at most float32"]
    assert "more than 256 channels" in explain(*(torch.randn(1, 1, 4, 300) for _ in range(3)), Full())["triton"][0]
    assert "normalises by softmax and entmax" in explain(q, k, v, Full(), normalizer="sigmoid")["triton"][0]
    network = FromCoordinates(torch.nn.Linear(1, 2), torch.randn(40, 1))
    assert "RelativeTable and Alibi" in explain(q, k, v, Full(), bias=network)["triton"][0]
    odd = Causal().plan(40, heads=2, block=(24, 16))
    assert "the plan's tiles (24, 16)" in explain(q, k, v, odd)["triton"][0]
    bits = Plan.from_mask(torch.rand(2, 40, 40) < 0.5, (16, 16))
    assert explain(q, k, v, bits)["triton"] == ["it has no bit masks"]
