"""The entmax kernels give the oracle's numbers and gradients, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import Case

from saccade.softmax import Entmax
from saccade.softmax.kernels.entmax import Launch, attend_entmax
from saccade.softmax.kernels.entmax import launch as kernels
from saccade.testing.budget import assert_close, same_bits
from saccade.where import (
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

# The interpreter turns tensors of one number into Python's numbers, as NumPy no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(pattern, n, m, *, heads=(2, 1), batch=1, d=16, dv=None, alpha=1.5, block=(32, 32), scale=None, amp=1.0):
    """A float32 Case whose plan is on its device, beside its truth there."""
    h, kv = heads
    if isinstance(pattern, tuple):
        plan, entries = pattern
    else:
        plan, entries = pattern.plan(n, m, h, block), oracle.entries_of(pattern.dense(n, m, h))
    q, k, v = torch.randn(batch, h, n, d) * amp, torch.randn(batch, kv, m, d), torch.randn(batch, kv, m, dv or d)
    return Case(q, k, v, plan, entries, {"scale": scale, "normalizer": Entmax(alpha)})


def routed(n, m, block=(32, 32)):
    """A plan whose lists differ from head to head and batch to batch."""
    chosen = torch.randint(-1, -(-m // block[1]), (4, -(-n // block[0]), 2))
    group_of = torch.arange(4).view(2, 2)
    return (
        plan_chosen(Causal(), chosen, group_of, n, m, block),
        oracle.entries_chosen(Causal().dense(n, m)[0], chosen, group_of, block),
    )


def differentiated(run, case, cotangent):
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    o = run(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, cotangent.to(o))


def kernel(case):
    plan, scale = case.where.to(DEVICE), case.options["scale"]
    scale = case.q.shape[3] ** -0.5 if scale is None else scale

    def run(q, k, v):
        return attend_entmax(
            q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), plan, scale, case.options["normalizer"].alpha
        ).cpu()

    return run


def truth(case):
    def run(q, k, v):
        weigh = oracle.entmax(case.options["normalizer"].alpha)
        return oracle.attention(q, k, v, case.entries, scale=case.options["scale"], weigh=weigh)[0]

    return run


def agree(case):
    """o and every gradient, in float32."""
    cotangent = torch.randn(*case.q.shape[:3], case.v.shape[3])
    found = differentiated(kernel(case), case, cotangent)
    exact = differentiated(truth(case), case.to(torch.float64), cotangent)
    single = differentiated(truth(case), case, cotangent)
    sizes = [float(case.v.abs().max())] + [max(float(g.abs().max()) for g in exact[1:])] * 3
    for name, mine, true, eager, size in zip("oqkv", found, exact, single, sizes, strict=True):
        about = {"terms": case.terms(), "scale": case.size() * size}
        assert_close(mine, true, eager, name=name if name == "o" else f"gradient of {name}", **about)


PROBLEMS = {
    "full": lambda: problem(Full(), 40, 50),
    "causal": lambda: problem(Causal(), 64, 64, heads=(4, 2), batch=2),
    "last queries, odd": lambda: problem(Causal(), 33, 90, heads=(3, 1), d=12, dv=20),
    "parts and steps": lambda: problem(Causal(), 300, 300, block=(128, 128), heads=(1, 1)),
    "one query": lambda: problem(Causal(), 1, 77, block=(16, 64)),
    "sparse": lambda: problem(Causal(), 130, 130, amp=8.0, heads=(1, 1)),
    "even": lambda: problem(Causal(), 100, 100, amp=0.01, heads=(1, 1)),
    "window": lambda: problem(Causal() & (Window(20) | Sinks(3)), 90, 90, block=(16, 32)),
    "nothing for some": lambda: problem(Window(3) & Columns(1, 7, 2), 60, 60),
    "in another order": lambda: problem(Causal() & Strided(3), 70, 70, block=(16, 16)),
    "grid": lambda: problem(Neighborhood((9, 10), 3), 90, 90, heads=(1, 1)),
    "heads": lambda: problem(PerHead([Causal(), Window(9) & Causal()]), 50, 61),
    "routed": lambda: problem(routed(70, 80), 70, 80, heads=(2, 2), batch=2),
    "backwards": lambda: problem(Causal(), 40, 40, scale=-0.3),
    "no scale": lambda: problem(Causal(), 40, 40, scale=0.0),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_patterns(name):
    agree(PROBLEMS[name]())


@pytest.mark.parametrize("amp", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_alphas(alpha, amp):
    agree(problem(Causal(), 80, 90, alpha=alpha, amp=amp))


def one_class(n=256, important=32):
    """Scores that favour every 32nd key: the support falls into few slots, and most of it is not kept there."""
    case = problem(Full(), 32, n, block=(32, 64), heads=(1, 1))
    case.k[..., 0] = (torch.arange(n) % important == 0) * 6.0
    case.q[..., 0] = 4.0
    return case


def careless(monkeypatch, **how):
    monkeypatch.setattr(kernels, "SINGLE", kernels.SINGLE._replace(**how))


def test_slots_that_overflow_are_noticed(monkeypatch):
    careless(monkeypatch, close=math.inf)  # nothing is done again
    agree(one_class())
    careless(monkeypatch, close=math.inf, spare=1.0)
    with pytest.raises(AssertionError, match="max error"):
        agree(one_class())


def test_rows_that_prove_too_far_off_are_done_again(monkeypatch):
    careless(monkeypatch, spare=1.0)  # every bound is taken for a good one
    agree(one_class())
    agree(problem(Causal(), 130, 130, heads=(2, 1), amp=0.1))


@pytest.mark.parametrize("amp", [1.0, 10.0])
def test_only_tiles_in_use_are_kept_for_the_gradients(amp):
    case = problem(Causal(), 256, 256, block=(64, 64), heads=(1, 1), amp=amp)
    scale = case.q.shape[3] ** -0.5
    q, k, v = (x.to(DEVICE) for x in (case.q, case.k, case.v))
    launch = Launch.of(q, k, v, case.where.to(DEVICE), scale, 1.5)
    size = launch.sizes
    marks = launch.forward(True)[3].cpu().view(-1, 64 // size.keys, 64 // size.part)
    exact = case.to(torch.float64)
    s = (exact.q @ exact.k.mT * scale).masked_fill(~Causal().dense(256, 256), -torch.inf)
    rows, cols = case.where.rows(), case.where.indices.long()
    p = oracle.entmax(1.5)(s)[0, 0].view(4, 64, 4, 64).transpose(1, 2)[rows, cols]
    largest = p.view(-1, 64 // size.part, size.part, 64 // size.keys, size.keys).amax((2, 4)).transpose(1, 2)
    tiny = torch.finfo(torch.float32).eps
    assert marks[largest > tiny].all()
    assert not marks[largest == 0].any()
    assert amp == 1.0 or not marks.all()


def test_layouts_of_the_inputs_do_not_matter():
    case = problem(Causal(), 40, 40, heads=(2, 2), d=8)
    plain = kernel(case)(case.q, case.k, case.v)
    turned = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in (case.q, case.k, case.v)]
    assert same_bits(kernel(case)(*turned), plain)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
def test_nan_stays_in_its_row():
    case = problem(Causal(), 60, 60, heads=(1, 1))
    plain = kernel(case)(case.q, case.k, case.v)
    case.q[0, 0, 37, 2] = math.nan
    found = kernel(case)(case.q, case.k, case.v)
    assert found[0, 0, 37].isnan().all()
    others = torch.arange(60) != 37
    assert same_bits(found[:, :, others], plain[:, :, others])


def eager(case, alpha):
    """What plain code gives in the narrow dtype: products in it, weights in float32, rounded."""

    def run(q, k, v):
        def weigh(s):
            return oracle.entmax(alpha)(s.float()).to(s.dtype)

        return oracle.attention(q, k, v, case.entries, weigh=weigh)[0]

    return run


LARGE = {
    "causal": lambda: problem(Causal(), 1500, 1500, heads=(2, 1), d=64, block=(128, 128)),
    "sparse": lambda: problem(Causal(), 1500, 1500, heads=(2, 2), d=128, block=(128, 128), amp=4.0),
    "even": lambda: problem(Causal(), 1500, 1500, heads=(1, 1), d=64, block=(128, 128), amp=0.1),
    "wide": lambda: problem(Full(), 300, 900, heads=(2, 1), d=256, block=(128, 128)),
    "window": lambda: problem(Causal() & (Window(300) | Sinks(4)), 1000, 1200, d=64, dv=32, block=(64, 64)),
    "grid": lambda: problem(Neighborhood((32, 32), 7), 1024, 1024, d=64, block=(64, 64)),
    "alpha 1.25": lambda: problem(Causal(), 1000, 1000, d=64, alpha=1.25, block=(128, 128)),
    "alpha 2": lambda: problem(Causal(), 1000, 1000, d=64, alpha=2.0, block=(128, 128)),
}


def agree_narrow(case):
    """o and every gradient, in the narrow dtype of the case, and twice the same bits."""
    cotangent = torch.randn(*case.q.shape[:3], case.v.shape[3]).to(case.q)
    found = differentiated(kernel(case), case, cotangent)
    again = differentiated(kernel(case), case, cotangent)
    exact = differentiated(truth(case), case.to(torch.float64), cotangent)
    plain = differentiated(eager(case, case.options["normalizer"].alpha), case, cotangent)
    for what, mine, same, true, beside in zip("oqkv", found, again, exact, plain, strict=True):
        assert same_bits(mine, same)
        assert_close(mine, true, beside, name=what if what == "o" else f"gradient of {what}", terms=4)


def test_a_tau_that_takes_a_last_step_leaves_no_trace_in_the_gradients():
    torch.manual_seed(2)  # numbers of which a row's first bound misses much of its support
    case = problem(Full(), 64, 512, heads=(1, 1), d=64, block=(64, 64)).to(torch.float16)
    case.k[..., 0] = 8.0  # moves all scores of a row alike: no gradient of q
    agree_narrow(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_narrow_dtypes(name, dtype):
    agree_narrow(LARGE[name]().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_float32(name):
    agree(LARGE[name]())
