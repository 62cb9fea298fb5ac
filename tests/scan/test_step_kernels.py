"""One token by one kernel, against the recurrence token by token in float64.

On a CPU the kernels run in Triton's interpreter, most of them with so few columns a program that a memory has several;
on a GPU with their own, in every dtype.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from recurrences import GATES, delta, draw, draw_gate, linear, per_head
from recurrences import verify as with_gradients
from test_kernels import plain as with_normalizer
from test_selective_scan import recurrence
from torch.nn import functional as F

from saccade.scan.delta_rule import delta_rule
from saccade.scan.features import Exp
from saccade.scan.kernels import step, step_ops
from saccade.scan.linear_attention import linear_attention
from saccade.scan.normalizers import Clamp, MeanShift, Sum
from saccade.scan.selective_scan import selective_scan
from saccade.scan.state import UNTRACKED, Matrix, State
from saccade.testing.budget import assert_close

SCALE = 0.7
WIDTHS = [(16, 16), (64, 64), (20, 17), (128, 128), (256, 256), (16, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HOSTILE = [0.0, -50.0, -1e30, -math.inf]
PER_HEAD = [("key", "key"), ("query", "key"), ("key", "query")]


@pytest.fixture
def narrow(monkeypatch):
    plans = (step_ops.linear_plan, step_ops.delta_plan, step_ops.selective_plan)
    [plan.cache_clear() for plan in plans]
    monkeypatch.setattr(step_ops, "COLUMNS", 16)
    monkeypatch.setattr(step_ops, "FEW", 16)
    monkeypatch.setattr(step_ops, "MANY", 1)
    yield
    [plan.cache_clear() for plan in plans]


def values(function, given, dtype, device="cpu"):
    """What `function` makes of the tensors in `dtype`, with no gradient asked."""
    with torch.no_grad():
        found = function(*(None if x is None else x.to(device, dtype) for x in given))
    return [x.cpu() for x in found]


def verify(fast, plain, given, dtype, *, terms, device="cpu"):
    """Values of `fast` in `dtype` against those of `plain` in float64, with the budget of `plain` in that dtype."""
    rounded = [None if x is None else x.to(dtype) for x in given]
    exact, eager = values(plain, rounded, torch.float64), values(plain, rounded, dtype)
    found = values(fast, rounded, dtype, device)
    for i, (t, e, a) in enumerate(zip(exact, eager, found, strict=True)):
        assert_close(a.to(dtype), t, e, name=f"output {i} in {dtype}", terms=terms, scale=float(t.abs().max()))


def wide(memory):
    return None if memory is None else State(memory.float())


def linear_problem(gate, gate_heads="key", heads=4, groups=2, dim=20, dv=17, batch=2, memory=True):
    q, k, v = (draw(batch, h, 1, d, seed=i) for i, (h, d) in enumerate(((heads, dim), (groups, dim), (groups, dv))))
    kept = groups if gate_heads == "key" or gate == "none" else heads
    return [q, k, v, draw_gate(gate, kept, 1, dim, batch), draw(batch, kept, dim, dv, seed=9) if memory else None]


def linear_step(q, k, v, g, memory, **options):
    """o, the memory and the sum of the gates a query head."""
    given = {"backend": "triton", "scale": SCALE, "state": wide(memory)} | options
    o, after = linear_attention(q, k, v, log_decay=g, return_state=True, **given)
    sums = after.transition
    return [x for x in (o, per_head(after.memory, q.shape[1]), sums) if x is not None]


def linear_plain(q, k, v, g, memory):
    o, last = linear(q * SCALE, k, v, g, memory)
    if g is None:
        return o, last
    return o, last, g.expand(q.shape[0], -1)[..., None, None] if g.ndim == 1 else g.mT if g.ndim == 4 else g[..., None]


def delta_problem(gate, beta_heads="key", gate_heads="key", heads=4, groups=2, dim=20, dv=17, batch=2, memory=True):
    """With unit keys, as a memory that is to stay bounded needs; and a product of earlier transitions."""
    q, k, v = (draw(batch, h, 1, d, seed=i) for i, (h, d) in enumerate(((heads, dim), (groups, dim), (groups, dv))))
    of = {"key": groups, "query": heads}
    beta, g = 2 * draw(batch, of[beta_heads], 1, seed=3).sigmoid(), draw_gate(gate, of[gate_heads], 1, dim, batch)
    kept = max(beta.shape[1], groups if g is None else of[gate_heads])
    before = [draw(batch, kept, dim, width, seed=9 + width) for width in (dv, dim)] if memory else [None, None]
    return [q, F.normalize(k, dim=-1), v, beta, g, *before]


def delta_step(q, k, v, beta, g, memory, product, **options):
    state = None if memory is None else State(memory.float(), Matrix(product.float()))
    given = {"backend": "triton", "scale": SCALE, "state": state} | options
    o, after = delta_rule(q, k, v, beta, log_decay=g, return_state=True, **given)
    return o, *(per_head(x, q.shape[1]) for x in (after.memory, after.transition.value))


def delta_plain(q, k, v, beta, g, memory, product):
    o, last = delta(q * SCALE, k, v, beta, g, memory)
    eye = torch.eye(q.shape[3], dtype=q.dtype).expand(q.shape[0], q.shape[1], -1, -1)
    moved = delta(q, k, torch.zeros_like(k), beta, g, eye if product is None else product)[1]
    return o, last, moved


def selective_problem(channels=12, states=5, groups=3, batch=2, memory=True):
    """x, delta, A, B, C, D, z, bias, the state and the sum of decays before."""
    x, z = (draw(batch, 1, channels, seed=i) for i in (1, 2))
    b, c = (draw(batch, 1, groups, states, seed=i) for i in (3, 4))
    direct, bias = (draw(channels, seed=i) for i in (5, 6))
    before = [draw(batch, channels, states, seed=i) for i in (7, 8)] if memory else [None, None]
    step_size = 3 * draw(batch, 1, channels, seed=9)
    return [x, step_size, -draw(channels, states).exp(), b, c, direct, z, bias, before[0], before[1]]


def selective_step(x, size, a, b, c, direct, z, bias, memory, sums, **options):
    state = None if memory is None else State(memory.float().unsqueeze(-1), sums.float().unsqueeze(-1))
    given = {"backend": "triton", "state": state, "delta_softplus": True} | options
    y, after = selective_scan(x, size, a, b, c, D=direct, z=z, delta_bias=bias, return_state=True, **given)
    return y, after.memory.squeeze(-1), after.transition.squeeze(-1)


def untracked_step(*given):
    """Of several sequences a program."""
    x, size, a, b, c, direct, z, bias, memory, _ = given
    state = None if memory is None else State(memory.float().unsqueeze(-1), UNTRACKED)
    more = {"backend": "triton", "state": state, "delta_softplus": True}
    y, after = selective_scan(x, size, a, b, c, D=direct, z=z, delta_bias=bias, return_state=True, **more)
    return y, after.memory.squeeze(-1)


def untracked_plain(*given):
    return selective_plain(*given)[:2]


def selective_plain(x, size, a, b, c, direct, z, bias, memory, sums):
    size = (size + bias).exp().log1p()
    y, last = recurrence(x, size, a, b, c, h0=memory)
    decay = size[:, 0, :, None] * a
    return (y + direct * x) * z * z.sigmoid(), last, decay if sums is None else sums + decay


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_heads", ["key", "query"])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.usefixtures("narrow")
def test_linear_is_the_recurrence(gate, gate_heads, memory):
    verify(linear_step, linear_plain, linear_problem(gate, gate_heads, memory=memory), torch.float32, terms=20)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.usefixtures("narrow")
def test_strengths_are_factors_of_keys(gate, value):
    def strong(q, k, v, g, memory):
        return linear_step(q, k, v, g, memory, strength=torch.full_like(k[..., 0], value))

    def plain(q, k, v, g, memory):
        return linear_plain(q, k * value, v, g, memory)

    verify(strong, plain, linear_problem(gate), torch.float32, terms=20)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta_heads", "gate_heads"), PER_HEAD)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.usefixtures("narrow")
def test_delta_is_the_recurrence(gate, beta_heads, gate_heads, memory):
    given = delta_problem(gate, beta_heads, gate_heads, memory=memory)
    verify(delta_step, delta_plain, given, torch.float32, terms=400)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("states", [1, 5])
@pytest.mark.usefixtures("narrow")
def test_selective_is_the_recurrence(groups, memory, states):
    given = selective_problem(states=states, groups=groups, memory=memory)
    verify(selective_step, selective_plain, given, torch.float32, terms=5)
    assert step_ops.selective_plan(2, 12, states, groups, True, False).options["RUN"] == 2
    verify(untracked_step, untracked_plain, given, torch.float32, terms=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dv"), WIDTHS)
@pytest.mark.parametrize("gate", ["none", "vector"])
def test_widths_and_dtypes(gate, dim, dv, dtype):
    given = linear_problem(gate, dim=dim, dv=dv, heads=2, groups=1, batch=1)
    verify(linear_step, linear_plain, given, dtype, terms=dim)
    given = delta_problem(gate, dim=dim, dv=dv, heads=2, groups=1, batch=1)
    verify(delta_step, delta_plain, given, dtype, terms=dim * dim)
    verify(selective_step, selective_plain, selective_problem(dim, dv, groups=2, batch=1), dtype, terms=dv)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (8, 1), (19, 1)])
@pytest.mark.parametrize("dim", [20, 300])
def test_many_queries_and_features_in_parts(heads, groups, dim):
    """Three queries a memory, eight, or more than a program takes at a time; more features than that, too."""
    given = linear_problem("vector", heads=heads, groups=groups, dim=dim)
    verify(linear_step, linear_plain, given, torch.float32, terms=dim)
    if dim == 20:
        given = delta_problem("vector", heads=heads, groups=groups, dim=dim)
        verify(delta_step, delta_plain, given, torch.float32, terms=dim * dim)


@pytest.mark.parametrize("gate", ["none", "constant", "scalar"])
@pytest.mark.parametrize("normalizer", [Sum(), Sum(eps=0.1), MeanShift()])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.usefixtures("narrow")
def test_normalizers_read_their_sums(gate, normalizer, memory):
    q, k, v, g, before = linear_problem(gate)
    q, k = q.exp(), k.exp()
    more = isinstance(normalizer, MeanShift)
    before = draw(*before.shape[:2], 20 + more, 18, seed=9).exp() if memory else None

    def fast(*given):
        return linear_step(*given, normalizer=normalizer)[:2]

    verify(fast, with_normalizer(normalizer), [q, k, v, g, before], torch.float32, terms=20)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("gate", GATES[1:])
def test_hostile_gates(gate, value):
    for problem, fast, plain in ((linear_problem, linear_step, linear_plain), (delta_problem, delta_step, delta_plain)):
        for every in (True, False):
            given = problem(gate)
            g = next(
                x for x in given if x is not None and x.shape == draw_gate(gate, 2, 1, 20).shape and (x <= 0).all()
            )
            if every:
                g.fill_(value)
            else:
                g.view(-1)[::3] = value
            verify(fast, plain, given, torch.float32, terms=400)


@pytest.mark.parametrize("gate", GATES)
def test_steps_are_the_whole(gate):
    """Outputs, memory and transition of a prefill and single tokens, and of all tokens at once in float64."""
    tokens, early, dim, dv = 9, 4, 20, 17
    q, k, v = (draw(2, h, tokens, d, seed=i) for i, (h, d) in enumerate(((4, dim), (2, dim), (2, dv))))
    g, beta = draw_gate(gate, 2, tokens, dim), draw(2, 2, tokens, seed=3).sigmoid()
    k = F.normalize(k, dim=-1)

    def run(call, cuts, dtype, backend):
        state, outputs = None, []
        for first, stop in cuts:
            parts = [x[:, :, first:stop].to(dtype) for x in (q, k, v, beta)]
            gates = None if g is None else (g if g.ndim == 1 else g[:, :, first:stop]).to(dtype)
            o, state = call(*parts, gates, state, backend if stop - first == 1 else "reference")
            outputs.append(o)
        return torch.cat(outputs, 2), state

    def attend(q, k, v, beta, g, state, backend):
        return linear_attention(q, k, v, log_decay=g, state=state, return_state=True, backend=backend)

    def erase(q, k, v, beta, g, state, backend):
        return delta_rule(q, k, v, beta, log_decay=g, state=state, return_state=True, backend=backend)

    cuts = [(0, early), *((t, t + 1) for t in range(early, tokens))]
    for call in (attend, erase):
        o, state = run(call, cuts, torch.float32, "triton")
        exact, whole = run(call, [(0, tokens)], torch.float64, "reference")
        rough, eager = run(call, [(0, tokens)], torch.float32, "reference")
        assert_close(o, exact, rough, terms=tokens * dim * dim)
        assert_close(state.memory, whole.memory, eager.memory, terms=tokens * dim * dim)
        assert type(state.transition) is type(whole.transition)
        if whole.transition is not None:
            moved = [
                s.transition.value if isinstance(s.transition, Matrix) else s.transition for s in (state, whole, eager)
            ]
            assert_close(*moved, terms=tokens * dim * dim, scale=1.0)


def test_selective_steps_are_the_whole():
    given = [
        x.repeat(1, 6, *[1] * (x.ndim - 2)) if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(selective_problem())
    ]
    for i in (0, 1, 3, 4, 6):
        given[i] = given[i] + 0.1 * draw(*given[i].shape, seed=20 + i)
    x, size, a, b, c, direct, z, bias, *_ = given

    def run(cuts, dtype, backend):
        state, outputs = None, []
        for first, stop in cuts:
            tokens = [t[:, first:stop].to(dtype) for t in (x, size, b, c, z)]
            fixed = [t.to(dtype) for t in (a, direct, bias)]
            y, state = selective_scan(
                *tokens[:2], fixed[0], *tokens[2:4], D=fixed[1], z=tokens[4], delta_bias=fixed[2], delta_softplus=True,
                state=state, return_state=True, backend=backend if stop - first == 1 else "chunked",
            )  # fmt: skip
            outputs.append(y)
        return torch.cat(outputs, 1), state.memory, state.transition

    found = run([(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)], torch.float32, "triton")
    truth, rough = (run([(0, 6)], dtype, "chunked") for dtype in (torch.float64, torch.float32))
    for a_, t, e in zip(found, truth, rough, strict=True):
        assert_close(a_, t, e, terms=6 * 5)


def judge_small_steps(device, terms):
    given = selective_problem(memory=False)
    given[1] = torch.linspace(-30.0, 30.0, 24, dtype=torch.float64).reshape(2, 1, 12)
    given[7] = torch.zeros_like(given[7])
    given = [None if x is None else x.float().double() for x in given]  # a rounding of the exponent would be seen
    exact = values(selective_plain, given, torch.float64)[2]
    eager = values(selective_plain, given, torch.float32)[2]
    found = values(selective_step, given, torch.float32, device)[2]
    ones, likely = torch.ones_like(exact), torch.linspace(-30.0, 30.0, 24).reshape(2, 12, 1) > 0
    # Of large steps eager code has all digits, and so it does of the exponentials of the others.
    rough = torch.where(likely, eager.double() / exact, ones)
    assert_close((found.double() / exact).float(), ones, rough.float(), terms=terms)


def test_small_steps_keep_their_digits():
    """softplus of large negative numbers, where a logarithm of 1 + x alone has none left."""
    judge_small_steps("cpu", terms=24)


def test_a_plain_logarithm_is_caught(monkeypatch):
    """The twin of the above."""
    genuine = step.selective

    def rounded(x, size, a, b, c, bias, softplus, *rest):
        return genuine(x, (1 + (size + bias).exp()).log(), a, b, c, None, False, *rest)

    monkeypatch.setattr(step, "selective", rounded)
    with pytest.raises(AssertionError, match="max error"):
        judge_small_steps("cpu", terms=24)


def test_log_features_go_on_from_their_scale():
    """The decay by which a log scale rises is no part of the transition."""
    q, k, v, g, _ = (None if x is None else x.float() for x in linear_problem("scalar"))
    states = {}
    for backend in ("triton", "reference"):
        state = None
        for shift in (0.0, 3.0, -2.0):
            o, state = linear_attention(
                q, k + shift, v, log_decay=g, feature_map=Exp(), normalizer="sum", state=state, return_state=True,
                backend=backend,
            )  # fmt: skip
        states[backend] = [o, state.memory, state.transition, state.shift]
    for a, e in zip(states["triton"], states["reference"], strict=True):
        assert_close(a, e.double(), e, terms=60)


def forgetful(function):
    """A twin that starts from nothing; the memory stands where only it has four dims and more than one token."""
    return lambda *given: function(*(torch.zeros_like(x) if _remembers(x) else x for x in given))


def _remembers(x):
    return x is not None and ((x.ndim == 4 and x.shape[2] > 1) or (x.ndim == 3 and x.shape[1] > 2))


def blended(function):
    """A twin in which every memory takes another one's key."""
    return lambda q, k, *rest: function(q, k.flip(1), *rest)


def ungated(function):
    """A twin whose gates do nothing."""
    return lambda *given: function(*(torch.zeros_like(x) if x is not None and (x < 0).all() else x for x in given))


TWINS = [
    (forgetful, linear_step, linear_plain, linear_problem),
    (blended, linear_step, linear_plain, linear_problem),
    (ungated, linear_step, linear_plain, linear_problem),
    (forgetful, delta_step, delta_plain, delta_problem),
    (blended, delta_step, delta_plain, delta_problem),
    (ungated, delta_step, delta_plain, delta_problem),
]


@pytest.mark.parametrize(("twin", "fast", "plain", "problem"), TWINS)
def test_wrong_twins_are_caught(twin, fast, plain, problem):
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(twin(fast), plain, problem("scalar"), torch.float32, terms=400)


@pytest.mark.parametrize("which", [1, 3, 5, 6, 7, 8])
def test_wrong_selective_twins_are_caught(which):
    """Each input in turn passed over, as far as the first output shows it."""

    def twin(*given):
        return selective_step(*(x * 0.9 if i == which else x for i, x in enumerate(given)))

    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(twin, selective_plain, selective_problem(), torch.float32, terms=5)


@pytest.mark.parametrize("name", ["linear", "delta", "selective"])
def test_a_lost_transition_is_caught(name, monkeypatch):
    """What came before forgotten in the transition alone."""
    problem, fast, plain = {
        "linear": (linear_problem("scalar"), linear_step, linear_plain),
        "delta": (delta_problem("scalar"), delta_step, delta_plain),
        "selective": (selective_problem(), selective_step, selective_plain),
    }[name]
    call = getattr(step, name)
    old = {"linear": 5, "delta": 6, "selective": 10}[name]
    track = {"linear": 9, "delta": 8, "selective": 11}[name]

    def lost(*given):
        found = call(*(None if i == old else x for i, x in enumerate(given)))
        assert given[track]
        return *found[:-1], found[-1] * 1.01

    monkeypatch.setattr(step, name, lost)
    with pytest.raises(AssertionError, match=r"output 2 in torch\.float32"):
        verify(fast, plain, problem, torch.float32, terms=400)


def test_a_lost_step_is_caught(monkeypatch):
    """The twin of steps that are the whole: one token is not written."""
    call = step.linear

    def lost(q, k, *rest):
        return call(q, 0 * k if k[0, 0, 0, 0] > 0 else k, *rest)

    monkeypatch.setattr(step, "linear", lost)
    with pytest.raises(AssertionError, match="max error"):
        test_steps_are_the_whole("scalar")


def calls(monkeypatch):
    """Names of the steps that are taken from here on."""
    taken = []
    for name in ("linear", "delta", "selective"):

        def counted(call, name, *given):
            taken.append(name)
            return call(*given)

        monkeypatch.setattr(step, name, partial(counted, getattr(step, name), name))
    return taken


def single(x):
    return None if x is None else x.float()


def test_who_takes_the_step(monkeypatch):
    """One token, kernels asked for, no gradient; nothing else."""
    taken = calls(monkeypatch)
    q, k, v, g, memory = map(single, linear_problem("scalar"))
    state = State(memory)

    def attend(x=q, backend="triton", **options):
        return linear_attention(x, k, v, log_decay=g, backend=backend, **{"state": state} | options)

    attend()
    attend(state=None)
    assert taken == ["linear"] * 2
    attend(backend="auto")
    attend(backend="chunked")
    attend(state=State(memory, torch.zeros(1, 1).requires_grad_()))
    attend(q.requires_grad_())
    two = torch.cat([q, q], 2).detach()
    linear_attention(two, torch.cat([k, k], 2), torch.cat([v, v], 2), backend="triton")
    packed = [x[:1].detach() for x in (q, k, v)]
    linear_attention(*packed, cu_seqlens=torch.tensor([0, 1], dtype=torch.int32), backend="triton")
    assert taken == ["linear"] * 2
    with torch.no_grad():
        attend(q)
    assert taken == ["linear"] * 3
    with pytest.raises(
        ValueError, match="backend: got 'triton', which cannot run this: it computes in at most float32"
    ):
        linear_attention(*(x.detach().double() for x in (q, k, v)), backend="triton")
    q, k, v, beta, g, memory, _ = map(single, delta_problem("vector"))
    delta_rule(q, k, v, beta, log_decay=g, state=State(memory), backend="triton")
    with pytest.raises(ValueError, match="a decay a channel of keys has no place"):
        delta_rule(q, k, v, beta.requires_grad_(), log_decay=g, state=State(memory), backend="triton")
    with pytest.raises(ValueError, match="state: got a memory"):
        delta_rule(q, k, v, beta.detach(), log_decay=g, state=State(memory[..., 1:]), backend="triton")
    assert taken[3:] == ["delta"]
    x, size, a, b, c, *_ = map(single, selective_problem())
    selective_scan(x, size, a, b, c, backend="triton")
    with pytest.raises(ValueError, match="its states are real"):
        selective_scan(x, size, a.to(torch.complex64), b, c, backend="triton")
    selective_scan(x.requires_grad_(), size, a, b, c, backend="triton")
    assert taken[4:] == ["selective"]


@pytest.mark.parametrize("gate", GATES)
def test_one_token_on_a_cpu_is_the_recurrence(gate):
    """The cheapest form is taken where nothing is named, and has gradients."""

    def attend(*given):
        return linear_step(*given, backend="auto")[:2]

    def erase(*given):
        return delta_step(*given, backend="auto")

    for gate_heads in ("key", "query"):
        given = linear_problem(gate, gate_heads)
        with_gradients(attend, lambda *given: linear_plain(*given)[:2], given, terms=20, dtypes=(torch.float32,))
        given = delta_problem(gate, "key", gate_heads)
        with_gradients(erase, delta_plain, given, terms=400, dtypes=(torch.float32,))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("positive", [True, False])
def test_a_first_token_reads_its_own_value(backend, positive):
    """Whatever q . k is, it cancels under a normalizer; read through the memory, it would leave its rounding errors."""
    q, k, v, *_ = linear_problem("none", dim=64, memory=False)
    k = k.exp() if positive else k
    value = per_head(v.float(), 4)

    def judge(backend):
        o = linear_attention(q.float(), k.float(), v.float(), normalizer=Sum(), backend=backend)
        assert_close(o, value.double(), value)

    judge(backend)
    with pytest.raises(AssertionError, match="max error"):
        judge("reference")


def test_a_state_stays_what_it_is(tmp_path):
    """The old one is as it was; the new one composes, forks, and is read back as it was written."""
    q, k, v, beta, g, memory, product = map(single, delta_problem("scalar"))
    for call, given, before in (
        (linear_attention, (q, k, v), State(memory, draw(2, 2, 1, 1).float())),
        (delta_rule, (q, k, v, beta), State(memory, Matrix(product))),
    ):
        copy = before.fork()
        _, after = call(*given, log_decay=g, state=before, return_state=True, backend="triton")
        _, alone = call(*given, log_decay=g, return_state=True, backend="triton")
        composed = before.compose(alone)
        after.save(tmp_path / "state", mechanism="step")
        back = State.load(tmp_path / "state", mechanism="step", like=after)
        for a, b in ((before, copy), (back, after), (after.fork(), after)):
            assert torch.equal(a.memory, b.memory)
            assert all(torch.equal(*pair) for pair in zip(parts(a), parts(b), strict=True))
        for a, e in zip([after.memory, *parts(after)], [composed.memory, *parts(composed)], strict=True):
            assert_close(a, e.double(), e, terms=400)
        assert after.memory.is_contiguous()
        assert after.memory.data_ptr() != before.memory.data_ptr()


def untracked(state):
    return UNTRACKED if state is None else state.untracked()


@pytest.mark.parametrize("memory", [True, False])
def test_untracked_states_stay_so(memory):
    """The same output and memory, half the bytes or less, and no transition, on every path.

    Kernels give the same bits; what a CPU's products round to hangs on where their factors lie.
    """
    q, k, v, beta, g, before, product = map(single, delta_problem("scalar", memory=memory))
    x, size, a, b, c, *_, h, sums = map(single, selective_problem(memory=memory))
    states = [
        (linear_attention, (q, k, v), {"log_decay": g}, before, draw(2, 2, 1, 1).float()),
        (delta_rule, (q, k, v, beta), {"log_decay": g}, before, None if product is None else Matrix(product)),
        (selective_scan, (x, size.abs(), a, b, c), {}, *(None if t is None else t.unsqueeze(-1) for t in (h, sums))),
    ]
    for call, given, options, had, moved in states:
        state = None if had is None else State(had, moved)
        for backend in ("triton", "auto", "chunked"):
            o, kept = call(*given, **options, state=state, return_state=True, backend=backend)
            lean, after = call(*given, **options, state=untracked(state), return_state=True, backend=backend)
            again = call(*given, **options, state=untracked(state), backend=backend)
            for found, exact in ((lean, o), (after.memory, kept.memory), (again, lean)):
                if backend == "triton":
                    assert torch.equal(found, exact)
                assert_close(found, exact.double(), exact, terms=400)
            assert (kept.tracked, after.tracked) == (True, False)
            assert after.nbytes == after.memory.nbytes < kept.nbytes


def test_untracked_stretches_stay_so():
    """Many tokens, packed and not, and without an order."""
    q, k, v = (draw(1, h, 7, 4, seed=i).float() for i, h in enumerate((4, 2, 2)))
    beta, cu = draw(1, 2, 7).sigmoid().float(), torch.tensor([0, 3, 7], dtype=torch.int32)
    x = draw(2, 7, 3).float()
    for call, given, options in (
        (linear_attention, (q, k, v), {"log_decay": -beta}),
        (linear_attention, (q, k, v), {"log_decay": -beta, "cu_seqlens": cu}),
        (linear_attention, (q, k, v), {"causal": False}),
        (delta_rule, (q, k, v, beta), {}),
        (delta_rule, (q, k, v, beta), {"cu_seqlens": cu}),
        (selective_scan, (x, x.abs(), -draw(3, 5).exp().float(), *(draw(2, 7, 5, seed=i).float() for i in (1, 2))), {}),
    ):
        o, kept = call(*given, **options, return_state=True)
        lean, after = call(*given, **options, state=UNTRACKED, return_state=True)
        assert_close(lean, o.double(), o)
        assert_close(after.memory, kept.memory.double(), kept.memory)
        assert not after.tracked
        _, more = call(*given, **options, state=after, return_state=True)
        assert not more.tracked


@pytest.mark.parametrize("dim", [16, 20, 300])
@pytest.mark.parametrize("normalizer", [Sum(), Clamp(0.5), MeanShift()])
def test_sums_of_keys_lie_in_a_line(dim, normalizer):
    """A memory with them has its columns one after another, and is the same however the one before lay."""
    q, k, v, g, _ = map(single, linear_problem("scalar", dim=dim))
    before = State(draw(2, 2, dim + isinstance(normalizer, MeanShift), 18, seed=9).exp().float())
    found = []
    for _ in range(2):
        o, after = linear_attention(
            q.exp(), k.exp(), v, log_decay=g, normalizer=normalizer, state=before, return_state=True, backend="triton"
        )
        assert after.memory.stride(-2) == 1
        assert after.memory.stride(-1) % step_ops.EVEN == 0
        found.append((o, after.memory))
        before = State(before.memory.mT.contiguous().mT)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    if dim == 16:
        assert after.fork().memory.stride() == after.memory.stride() or isinstance(normalizer, MeanShift)


def quotient(normalizer):
    """The recurrence; what is read is divided by mass + eps, or 1 where that is 0, or by |mass|, `least` at least."""

    def call(q, k, v, g, memory):
        o, last = linear(q * SCALE, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), g, memory)
        numerator, mass = o[..., :-1], o[..., -1:]
        if isinstance(normalizer, Sum):
            size = mass + normalizer.eps
            return numerator / torch.where(size == 0, torch.ones_like(size), size), last
        return numerator / mass.abs().clamp(min=normalizer.least), last

    return call


def dividing(normalizer, **shape):
    """A problem whose first head reads nothing; masses of either sign where they are only clamped."""
    q, k, v, g, before = linear_problem("vector", **shape)
    before = draw(*before.shape[:3], before.shape[3] + 1, seed=9)
    if isinstance(normalizer, Sum):
        q, k, before = q.exp(), k.exp(), before.exp()
    q[:, :1] = 0.0
    return [q, k, v, g, before]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", [Sum(), Sum(eps=0.1), Clamp(), Clamp(30.0)])
def test_the_kernel_divides_as_the_policy_says(normalizer, dtype):
    def fast(*given):
        return linear_step(*given, normalizer=normalizer)[:2]

    verify(fast, quotient(normalizer), dividing(normalizer), dtype, terms=400)


@pytest.mark.parametrize("lost", ["kind", "least"])
def test_another_division_is_caught(lost, monkeypatch):
    """The twin: the mass clamped where it is to be added to, or by another number."""
    genuine = step.Ratio.of

    def other(policy):
        ratio = genuine(policy)
        return ratio._replace(**{lost: 2 if lost == "kind" else ratio.least + 1})

    monkeypatch.setattr(step.Ratio, "of", staticmethod(other))
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        test_the_kernel_divides_as_the_policy_says(Sum(eps=0.1), torch.float32)


def parts(state):
    return [state.transition.value if isinstance(state.transition, Matrix) else state.transition]


@pytest.mark.parametrize("gate", ["constant", "vector"])
def test_strided_inputs_and_memories(gate):
    """Heads and channels laid out otherwise, and memories that are part of something larger."""

    def spread(x):
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]

    def beside(x):
        return torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]]

    given = [single(x) for x in delta_problem(gate)]
    whole = delta_step(*given), linear_step(*given[:3], *given[4:6])
    views = [None if x is None else (beside if _remembers(x) else spread)(x) for x in given]
    turned = [x if x is None or x.ndim < 4 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    for other in (views, turned):
        found = delta_step(*other), linear_step(*other[:3], *other[4:6])
        assert all(torch.equal(a, b) for x, y in zip(found, whole, strict=True) for a, b in zip(x, y, strict=True))
    given = [single(x) for x in selective_problem()]
    other = [spread(x) for x in given]
    assert all(torch.equal(a, b) for a, b in zip(selective_step(*given), selective_step(*other), strict=True))


def test_operators_are_well_formed():
    """Schema and fake tensors, as PyTorch itself checks them."""
    checks = ("test_schema", "test_faketensor")
    q, k, v, beta, g, memory, product = map(single, delta_problem("vector"))
    old = draw(2, 2, 20, 1).float()
    for given in (
        (q, k, v, g, memory, old, 0.5, False, False, True, 0, 0.0),
        (q, k, v, None, None, None, 0.5, True, True, False, 0, 0.0),
        (q, k, v, None, None, None, 0.5, True, False, False, 2, 1.0),
    ):
        torch.library.opcheck(step_ops.linear_step.overload, given, test_utils=checks)
    for given in ((q, k, v, beta, g, memory, product, 0.5, True), (q, k, v, beta, None, None, None, 0.5, False)):
        torch.library.opcheck(step_ops.delta_step.overload, given, test_utils=checks)
    x, size, a, b, c, direct, z, bias, before, sums = map(single, selective_problem())
    for given in (
        (x, size, a, b, c, bias, True, direct, z, before, sums, True),
        (x, size, a, b, c, None, False, None, None, None, None, False),
    ):
        torch.library.opcheck(step_ops.selective_step.overload, given, test_utils=checks)


def test_a_graph_holds_it_whole():
    q, k, v, beta, g, memory, product = map(single, delta_problem("scalar"))
    x, size, a, b, c, *_, before, _ = map(single, selective_problem())

    def call(q, k, v, beta, g, memory, product, x, size, before):
        linear = linear_attention(q, k, v, log_decay=g, state=State(memory), return_state=True, backend="triton")
        erased = delta_rule(
            q, k, v, beta, log_decay=g, state=State(memory, Matrix(product)), return_state=True, backend="triton"
        )
        y, after = selective_scan(
            x, size, a, b, c, state=State(before.unsqueeze(-1)), return_state=True, backend="triton"
        )
        return linear[0], linear[1].memory, erased[0], erased[1].transition.value, y, after.memory

    given = (q, k, v, beta, g, memory, product, x, size, before)
    torch.compiler.reset()
    with torch.no_grad():
        found, eager = torch.compile(call, backend="aot_eager", fullgraph=True)(*given), call(*given)
    torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


# On a GPU: the compiled kernels, in every dtype.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dv"), WIDTHS)
@pytest.mark.parametrize("gate", GATES)
def test_compiled(gate, dim, dv, dtype):
    shape = {"dim": dim, "dv": dv, "heads": 6, "batch": 3}
    for gate_heads in ("key", "query"):
        given = linear_problem(gate, gate_heads, **shape)
        verify(linear_step, linear_plain, given, dtype, terms=dim, device="cuda")
    for beta_heads, gate_heads in PER_HEAD:
        given = delta_problem(gate, beta_heads, gate_heads, **shape)
        verify(delta_step, delta_plain, given, dtype, terms=dim * dim, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 19, 32])
@pytest.mark.parametrize("dim", [64, 128, 300])
def test_compiled_many_queries(heads, dim):
    given = linear_problem("scalar", heads=heads, groups=1, dim=dim, dv=64)
    verify(linear_step, linear_plain, given, torch.float32, terms=dim, device="cuda")
    given = delta_problem("scalar", heads=heads, groups=1, dim=dim, dv=64)
    verify(delta_step, delta_plain, given, torch.float32, terms=dim * dim, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 5, 16, 128, 256])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("many", [1, 1024])
def test_compiled_selective(states, memory, dtype, many, monkeypatch):
    monkeypatch.setattr(step_ops, "MANY", many)
    step_ops.selective_plan.cache_clear()
    given = selective_problem(96, states, memory=memory)
    verify(selective_step, selective_plain, given, dtype, terms=states, device="cuda")
    verify(untracked_step, untracked_plain, given, dtype, terms=states, device="cuda")


@pytest.mark.gpu
def test_compiled_small_steps_keep_their_digits():
    judge_small_steps("cuda", terms=24 * 30)  # a GPU rounds exponents of up to 30 once more, times log2(e)


@pytest.mark.gpu
@pytest.mark.parametrize("normalizer", [Sum(), MeanShift()])
@pytest.mark.parametrize("dim", [64, 128, 300])
def test_compiled_normalizers(normalizer, dim):
    q, k, v, g, _ = linear_problem("scalar", dim=dim, dv=dim)
    before = draw(2, 2, dim + isinstance(normalizer, MeanShift), dim + 1, seed=9).exp()

    def fast(*given):
        return linear_step(*given, normalizer=normalizer)[:2]

    given = [q.exp(), k.exp(), v, g, before]
    verify(fast, with_normalizer(normalizer), given, torch.float32, terms=dim, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", [Sum(), Sum(eps=0.1), Clamp(), Clamp(30.0)])
@pytest.mark.parametrize("turned", [True, False])
def test_compiled_divisions(normalizer, dtype, turned):
    given = dividing(normalizer, dim=128, dv=128)

    def fast(q, k, v, g, memory):
        memory = memory.mT.contiguous().mT if turned else memory
        return linear_step(q, k, v, g, memory, normalizer=normalizer)[:2]

    verify(fast, quotient(normalizer), given, dtype, terms=128, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("gate", GATES[1:])
def test_compiled_hostile_gates(gate, value):
    given = linear_problem(gate, dim=128, dv=128)
    given[3].fill_(value)
    verify(linear_step, linear_plain, given, torch.float32, terms=128, device="cuda")
    given = delta_problem(gate, dim=128, dv=128)
    given[4].fill_(value)
    verify(delta_step, delta_plain, given, torch.float32, terms=128 * 128, device="cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_cuda_graph_replays_steps_without_waiting(monkeypatch):
    """By "auto", with the state put back where it is read; the host waits for nothing, and one replay is one token."""
    taken = calls(monkeypatch)
    q, k, v, beta, g, memory, product = (x.float().cuda() for x in delta_problem("scalar", dim=64, dv=64))
    x, size, a, b, c, *_, before, sums = (t.float().cuda() for t in selective_problem())
    size = size.abs()
    states = [
        State(memory, torch.zeros(2, 2, 1, 1, device="cuda")),
        State(memory.clone(), Matrix(product)),
        State(before.unsqueeze(-1), sums.unsqueeze(-1)),
    ]

    def run(states):
        return [
            linear_attention(q, k, v, log_decay=g, state=states[0], return_state=True),
            delta_rule(q, k, v, beta, log_decay=g, state=states[1], return_state=True),
            selective_scan(x, size, a, b, c, state=states[2], return_state=True),
        ]

    eager = states
    with torch.no_grad():
        for _ in range(3):
            eager = [after for _, after in run(eager)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(states)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for state, (_, after) in zip(states, run(states), strict=True):
                state.memory.copy_(after.memory)
                parts(state)[0].copy_(parts(after)[0])
        for _ in range(3):
            graph.replay()
    assert set(taken) == {"linear", "delta", "selective"}
    for state, whole in zip(states, eager, strict=True):
        assert torch.equal(state.memory, whole.memory)
        assert torch.equal(*(parts(s)[0] for s in (state, whole)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "delta", "selective"])
def test_compiled_steps_wait_for_the_kernel_before(kind):
    """Each reads what the step before, or in turns a sum behind it, has written; beside the same with pauses."""

    if kind == "selective":
        x, size, a, b, c, *_, memory, _ = (t.float().cuda() for t in selective_problem(4096, 16, groups=1, batch=16))
        memory = memory.unsqueeze(-1)
        step = partial(selective_scan, x, size.abs(), a, b, c)
    else:
        given = {"linear": linear_problem, "delta": delta_problem}[kind]
        given = given("scalar", heads=4, groups=4, batch=16, dim=128, dv=128)
        q, k, v, *rest = (t.float().cuda() for t in given)
        memory = rest.pop() if kind == "linear" else rest[-2]
        step = partial(linear_attention, q, k, v) if kind == "linear" else partial(delta_rule, q, k, v, rest[0])
        step = partial(step, log_decay=rest[0] if kind == "linear" else rest[1])

    def chain(pause):
        state = State(memory, UNTRACKED)
        for i in range(50):
            o, state = step(state=state, return_state=True, backend="triton")
            pause()
            if i % 2:
                state = State(state.memory + o.mean(), UNTRACKED)
                pause()
        return state.memory

    with torch.no_grad():
        assert torch.equal(chain(lambda: None), chain(torch.cuda.synchronize))
