"""Fast weights against the papers' recurrences token by token, their inner gradients taken by autograd."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.scan.fast_weights import (
    L2,
    Decay,
    Dot,
    FastState,
    GradientDescent,
    Huber,
    KLSoftmax,
    LinearMemory,
    Lp,
    LqNorm,
    Memory,
    MLPMemory,
    Momentum,
    NewtonSchulz,
    NormHuber,
    RowNorm,
    SwiGLUMemory,
    SwitchedHuber,
    fast_weights,
)
from saccade.scan.snapshot import fork
from saccade.testing.budget import assert_close

module = importlib.import_module("saccade.scan.fast_weights")  # the name in the package is the function

D, HIDDEN = 6, 7


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


# The networks, once as a `Memory` and once as a formula in the weights.
NETWORKS = {
    "linear": (LinearMemory(D), lambda w, x: x @ w[0]),
    "wide linear": (LinearMemory(D, 3), lambda w, x: x @ w[0]),
    "mlp": (MLPMemory(D, HIDDEN), lambda w, x: x + norm(gelu(x @ w[0]) @ w[1])),
    "plain mlp": (
        MLPMemory(D, HIDDEN, depth=3, residual=False),
        lambda w, x: gelu(gelu(x @ w[0]) @ w[1]) @ w[2],
    ),
    "normed linear": (MLPMemory(D, depth=1), lambda w, x: x + norm(x @ w[0])),
    "swiglu": (SwiGLUMemory(D, HIDDEN, 3), lambda w, x: (silu(x @ w[0]) * (x @ w[1])) @ w[2]),
}


def lp(p):
    return lambda e, y, v: ((e**2 + 1e-6).sqrt() ** p).sum(-1) / p


def huber(delta):
    return lambda e, y, v: torch.where(e.abs() <= delta, e**2 / 2, delta * e.abs() - delta**2 / 2).sum(-1)


def norm_huber(delta):
    return lambda e, y, v: torch.where(
        e.norm(dim=-1) <= delta, (e**2).sum(-1) / 2, delta * e.norm(dim=-1) - delta**2 / 2
    )


def yaad(delta):
    return lambda e, y, v: torch.where(e.norm(dim=-1) <= delta, (e**2).sum(-1) / 2, delta * e.abs().sum(-1))


LOSSES = {
    "dot": (Dot(), lambda e, y, v: -(y * v).sum(-1)),
    "l2": (L2(), lambda e, y, v: (e**2).sum(-1) / 2),
    "l1.5": (Lp(1.5), lp(1.5)),
    "l3": (Lp(3), lp(3)),
    "huber": (Huber(0.7), huber(0.7)),
    "norm huber": (NormHuber(1.5), norm_huber(1.5)),
    "yaad": (SwitchedHuber(1.5), yaad(1.5)),
}


def lq(a, q):
    return (a.abs() ** q).sum((-2, -1), keepdim=True) ** (1 / q)


def row_norm(a, start):
    return a * (start.square().sum(-2, keepdim=True) / a.square().sum(-2, keepdim=True)).sqrt()


# weights(A), the linear weights inside a chunk (A, A at its start, product of decays), and what A goes on as.
RETENTIONS = {
    "decay": (Decay(), lambda a: a, lambda a, a0, decay: a, lambda a, start: a),
    "l2.5": (LqNorm(2.5), lambda a: a / lq(a, 2.5) ** 0.5, lambda a, a0, decay: a / lq(a0, 2.5) ** 0.5, None),
    "l4": (LqNorm(4), lambda a: a / lq(a, 4) ** 2, lambda a, a0, decay: a / lq(a0, 4) ** 2, None),
    "kl": (
        KLSoftmax(scale=2.0),
        lambda a: 2.0 * a.exp() / a.exp().sum(-2, keepdim=True),
        lambda a, a0, decay: a + decay * (2.0 * a0.exp() / a0.exp().sum(-2, keepdim=True) - a0),
        None,
    ),
    "kl over outputs": (
        KLSoftmax(dim=-1),
        lambda a: a.exp() / a.exp().sum(-1, keepdim=True),
        lambda a, a0, decay: a + decay * (a0.exp() / a0.exp().sum(-1, keepdim=True) - a0),
        None,
    ),
    "kl over all": (
        KLSoftmax(dim=None),
        lambda a: a.exp() / a.exp().sum((-2, -1), keepdim=True),
        lambda a, a0, decay: a + decay * (a0.exp() / a0.exp().sum((-2, -1), keepdim=True) - a0),
        None,
    ),
    "row norm": (RowNorm(), lambda a: a, lambda a, a0, decay: a, row_norm),
}


def quintic(g):
    """Muon's polynomial, multiplied from the right."""
    x = g / g.square().sum((-2, -1), keepdim=True).sqrt()
    for _ in range(5):
        gram = x.mT @ x
        x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
    return x


def on_singular_values(g):
    """The same polynomial of each singular value, which is what it comes to."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / g.square().sum((-2, -1)).sqrt().unsqueeze(-1)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s.unsqueeze(-2)) @ vt


def loop(net, loss, retention, chunk, given, *, inclusive=True, step=None, delta_loss=None):
    """The recurrences of the papers, a token at a time, with autograd.grad on the loss at the start of the chunk."""
    weights, inside, settle = retention
    params = [given[name] for name in sorted(given) if name.startswith("param")]
    k, v, q, eta = (given[name] for name in ("k", "v", "q", "eta"))
    batch, heads, length, _ = k.shape
    zero = k.new_zeros(batch, heads, length)
    decay = given.get("log_decay", zero).exp()
    momentum = given["log_momentum"].exp() if "log_momentum" in given else None
    q = q.unflatten(1, (heads, -1))
    accumulators = [p.expand(batch, heads, *p.shape[-2:]) for p in params]
    velocities = [torch.zeros_like(a) for a in accumulators]
    now, rows = [weights(a) for a in accumulators], []

    def net_at(w, x):
        return net([m.unsqueeze(2) for m in w], x.unsqueeze(-2)).squeeze(-2)

    for t in range(length):
        if t % chunk == 0:
            start = [w if w.requires_grad else w.detach().requires_grad_() for w in now]
            first, product = accumulators, torch.ones_like(decay[..., 0])
        y = net([w.unsqueeze(2) for w in start], k[:, :, None, t].unsqueeze(-2)).squeeze(-2).squeeze(2)
        error = y - v[:, :, t]
        criterion = loss if delta_loss is None else delta_loss(given["delta"][..., t])
        gradients = torch.autograd.grad(criterion(error, y, v[:, :, t]).sum(), start, create_graph=True)
        alpha, product = decay[..., t, None, None], product * decay[..., t]
        pushes = [-eta[..., t, None, None] * g for g in gradients]
        ends = (t + 1) % chunk == 0
        if step is not None:
            keep = alpha if momentum is None else momentum[..., t, None, None]
            velocities = [keep * s + u for s, u in zip(velocities, pushes, strict=True)]
            accumulators = [alpha * a for a in accumulators]
            if ends:
                accumulators = [a + step(s) for a, s in zip(accumulators, velocities, strict=True)]
                velocities = [torch.zeros_like(s) if momentum is None else s for s in velocities]
        elif momentum is not None:
            velocities = [momentum[..., t, None, None] * s + u for s, u in zip(velocities, pushes, strict=True)]
            accumulators = [alpha * a + s for a, s in zip(accumulators, velocities, strict=True)]
        else:
            accumulators = [alpha * a + u for a, u in zip(accumulators, pushes, strict=True)]
        if ends:
            if settle is not None:
                accumulators = [settle(a, w) for a, w in zip(accumulators, start, strict=True)]
            now = [weights(a) for a in accumulators]
        else:
            pairs = zip(accumulators, first, strict=True)
            now = [inside(a, a0, product[..., None, None]) for a, a0 in pairs]
        rows.append(net_at(now if inclusive else start, q[:, :, :, t]))
    return torch.stack(rows, -2).flatten(1, 2)


def draw(memory, length, *, batch=2, heads=2, group=1, momentum=False, decay=True, delta=False, size=2.0):
    """All tensors of a problem by name; keys of length 1, as the papers normalise them."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    # At such a size a layer norm of six channels does not amplify rounding a thousandfold.
    given = {f"param{i}": size * normal(batch, heads, a, b) * a**-0.5 for i, (a, b) in enumerate(memory.shapes)}
    given |= {
        "k": torch.nn.functional.normalize(normal(batch, heads, length, memory.dim), dim=-1),
        "v": normal(batch, heads, length, memory.dim_v),
        "q": torch.nn.functional.normalize(normal(batch, heads * group, length, memory.dim), dim=-1),
        "eta": 0.02 + 0.08 * torch.rand(batch, heads, length).double(),
    }
    if decay:
        given["log_decay"] = -0.3 * torch.rand(batch, heads, length).double()
    if momentum:
        given["log_momentum"] = -torch.rand(batch, heads, length).double() - 0.2
    if delta:
        given["delta"] = 0.3 + torch.rand(batch, heads, length).double()
    return given


def call(memory, given, chunk, *, loss=None, **options):
    """`fast_weights` on tensors by name; `loss` may be a class that takes their delta."""
    given = dict(given)
    loss = given.pop("loss", loss)
    params = [given.pop(name) for name in sorted(given) if name.startswith("param")]
    if "delta" in given:
        loss = loss(given.pop("delta"))
    k, v = given.pop("k"), given.pop("v")
    return fast_weights(memory, params or None, k, v, chunk=chunk, loss=loss, **given, **options)


def run(function, given, cotangent):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    out = function(leaves)
    gradients = torch.autograd.grad(
        (out * cotangent.to(out.dtype)).sum(), list(leaves.values()), materialize_grads=True
    )
    return dict(zip(("o", *given), (out.detach(), *gradients), strict=True))


def verify(memory, fast, plain, given):
    """Output and every gradient in float64 and float32, beside what the loop errs there."""
    cotangent = torch.randn_like(plain(given))
    exact = run(plain, given, cotangent)
    scale = max(float(x.abs().max()) for x in exact.values())
    for dtype in (torch.float64, torch.float32):
        eager = beside(lambda g: run(plain, g, cotangent), given, exact, dtype)
        actual = run(fast, {name: x.to(dtype) for name, x in given.items()}, cotangent)
        for name, t in exact.items():
            assert actual[name].dtype == dtype
            assert_close(
                actual[name], t, eager[name], name=f"{name} in {dtype}", terms=terms(memory, given), scale=scale
            )


def terms(memory, given):
    """Behind the last output stand the products of every token with every weight."""
    return given["k"].shape[-2] * sum(a * b for a, b in memory.shapes)


def beside(function, given, exact, dtype):
    """`exact` plus the worst error of `function` in `dtype` on inputs that differ from `given` by one rounding.

    Gradients through steps of gradients amplify rounding unevenly from entry to entry: one run may be lucky where it
    matters.
    """
    errors = {name: torch.zeros_like(x) for name, x in exact.items()}
    for _ in range(3):
        nudged = {
            name: (x * (1 + torch.finfo(dtype).eps * torch.empty_like(x).uniform_(-1, 1))).to(dtype)
            for name, x in given.items()
        }
        for name, x in function(nudged).items():
            errors[name] = torch.maximum(errors[name], (x - exact[name]).abs())
    return {name: exact[name] + errors[name] for name in exact}


def check(
    network="linear", loss="l2", retention="decay", *, chunk=3, length=7, momentum=False, inclusive=True, **sizes
):
    memory, net = NETWORKS[network]
    measure, formula = LOSSES[loss]
    keep, *maps = RETENTIONS[retention]
    options = {"optimizer": Momentum() if momentum else None, "retention": keep, "inclusive": inclusive}
    verify(
        memory,
        lambda g: call(memory, g, chunk, loss=measure, **options),
        lambda g: loop(net, formula, maps, chunk, g, inclusive=inclusive),
        draw(memory, length, momentum=momentum, **sizes),
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("momentum", [False, True])
def test_memories(network, momentum):
    check(network, momentum=momentum)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_losses(loss, network):
    check(network, loss)


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("network", ["linear", "plain mlp"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_retentions(retention, network, chunk):
    check(network, retention=retention, chunk=chunk)


@pytest.mark.parametrize("retention", ["l4", "kl", "row norm"])
def test_retentions_with_momentum(retention):
    check("plain mlp", retention=retention, momentum=True)


@pytest.mark.parametrize("length", [1, 2, 5, 11])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_lengths_and_chunks(length, chunk):
    check(length=length, chunk=chunk, momentum=True)


@pytest.mark.parametrize(("loss", "retention"), [("l3", "l4"), ("yaad", "decay"), ("l2", "kl")])
def test_moneta_yaad_and_memora_token_by_token(loss, retention):
    """Miras eq. 24, 26 and 27, exactly: with chunks of one token nothing is approximated."""
    check("mlp", loss, retention, chunk=1, length=5, size=6.0 if retention == "kl" else 2.0)


def test_titans_token_by_token():
    check("mlp", momentum=True, chunk=1, length=5)


def test_shared_memories():
    """Three query heads read the memory of each key head."""
    check("mlp", momentum=True, heads=2, group=3)


@pytest.mark.parametrize("retention", ["decay", "l4", "kl", "row norm"])
def test_reading_the_start_of_the_chunk(retention):
    check("swiglu", retention=retention, inclusive=False, chunk=3, length=8)


@pytest.mark.parametrize("kind", [(Huber, huber), (NormHuber, norm_huber), (SwitchedHuber, yaad)])
def test_a_threshold_for_each_token(kind):
    measure, formula = kind
    memory, net = NETWORKS["mlp"]

    def threshold(delta):
        return formula(delta.unsqueeze(-1) if measure is Huber else delta)

    verify(
        memory,
        lambda g: call(memory, g, 3, loss=measure),
        lambda g: loop(net, None, RETENTIONS["decay"][1:], 3, g, delta_loss=threshold),
        draw(memory, 7, delta=True),
    )


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("retention", ["decay", "row norm"])
def test_muon(momentum, retention):
    """Per chunk one orthogonalised step, as LaCT and Spatial-TTT take it."""
    memory, net = NETWORKS["swiglu"]
    keep, *maps = RETENTIONS[retention]
    kind = Momentum if momentum else GradientDescent
    options = {"inclusive": False, "retention": keep, "optimizer": kind(step=NewtonSchulz())}
    verify(
        memory,
        lambda g: call(memory, g, 3, **options),
        lambda g: loop(net, LOSSES["l2"][1], maps, 3, g, inclusive=False, step=quintic),
        draw(memory, 8, momentum=momentum),
    )


def test_twins_are_caught(monkeypatch):
    """Wrong in one place each: the frozen point, the own token, the chunk's end, loss, decay, step size, gradients."""
    memory, net = NETWORKS["plain mlp"]
    keep, *maps = RETENTIONS["kl"]
    given = draw(memory, 7)

    def plain(g):
        return loop(net, LOSSES["l2"][1], maps, 3, g)

    def fast(g, chunk=3, **options):
        return call(memory, g, chunk, **{"retention": keep} | options)

    verify(memory, fast, plain, given)
    twins = [
        lambda g: fast(g, chunk=2),
        lambda g: fast(g, inclusive=False),
        lambda g: fast(g, retention=Decay()),
        lambda g: fast(g, loss=Lp(2.1)),
        lambda g: fast({**g, "log_decay": g["log_decay"].roll(1, -1)}),
        lambda g: fast({**g, "eta": g["eta"] * g["log_decay"].exp()}),
        lambda g: fast({**g, "k": g["k"].detach()}),
    ]
    for twin in twins:
        with pytest.raises(AssertionError, match=r"in torch\.float64"):
            verify(memory, twin, plain, given)
    steps = module._steps

    def first_order(*inputs):
        return tuple(tuple(x.detach() for x in part) for part in steps(*inputs))

    monkeypatch.setattr(module, "_steps", first_order)
    with pytest.raises(AssertionError, match=r"in torch\.float64"):
        verify(memory, fast, plain, given)


class OwnMLP(MLPMemory):
    """An `MLPMemory` in its own words, whose gradients autograd finds."""

    def forward(self, linear, x):
        return super().forward(linear, x)


class OwnL2(L2):
    """An `L2` in its own words."""

    def __call__(self, y, v):
        return super().__call__(y, v)


@pytest.mark.parametrize(("memory", "loss"), [(OwnMLP, L2), (MLPMemory, OwnL2), (OwnMLP, OwnL2)])
def test_a_forward_of_its_own_takes_no_gradient_from_its_parent(memory, loss):
    assert (OwnMLP.pull, OwnL2.slope) == (Memory.pull, module.Loss.slope)
    given = draw(MLPMemory(D, HIDDEN), 7)
    verify(
        MLPMemory(D, HIDDEN),
        lambda g: call(memory(D, HIDDEN), g, 3, loss=loss()),
        lambda g: loop(NETWORKS["mlp"][1], LOSSES["l2"][1], RETENTIONS["decay"][1:], 3, g),
        given,
    )


@pytest.mark.parametrize(
    ("owner", "name", "twin"),
    [
        (MLPMemory, "pull", lambda self, weights, products, slope: (slope @ weights[1].mT, slope)),
        (L2, "slope", lambda self, y, v: y - 2 * v),
    ],
)
def test_wrong_gradients_are_caught(owner, name, twin, monkeypatch):
    monkeypatch.setattr(owner, name, twin)
    with pytest.raises(AssertionError, match="max error"):
        check("mlp")


@pytest.mark.parametrize("retention", RETENTIONS)
def test_a_copy_of_a_state_goes_on_bitwise(retention):
    memory, options = MLPMemory(D, HIDDEN), {"retention": RETENTIONS[retention][0], "optimizer": Momentum()}
    given = draw(memory, 8, momentum=True)
    _, state = call(memory, given, 5, return_state=True, **options)
    rest = {name: x for name, x in given.items() if not name.startswith("param")}
    o, copied = (call(memory, rest, 5, state=s, **options) for s in (state, fork(state)))
    assert torch.equal(o, copied)


def test_autocast_is_ignored():
    memory = MLPMemory(D, HIDDEN)
    given = {name: x.float() for name, x in draw(memory, 7, momentum=True).items()}
    plain = call(memory, given, 3, optimizer=Momentum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = call(memory, given, 3, optimizer=Momentum())
    assert torch.equal(plain, cast)


def delta_rule(k, v, q, eta, log_decay, state):
    """S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t, without a word of losses."""
    rows = []
    for t in range(k.shape[-2]):
        error = v[..., t, :] - torch.einsum("bhd,bhde->bhe", k[..., t, :], state)
        state = log_decay[..., t, None, None].exp() * state
        state = state + torch.einsum("bh,bhd,bhe->bhde", eta[..., t], k[..., t, :], error)
        rows.append(torch.einsum("bhd,bhde->bhe", q[..., t, :], state))
    return torch.stack(rows, -2)


def test_linear_memory_with_l2_and_chunks_of_one_is_the_delta_rule():
    memory = LinearMemory(D, 3)
    given = draw(memory, 9)
    verify(memory, lambda g: call(memory, g, 1), lambda g: delta_rule(*order(g)), given)


def linear_attention(k, v, q, eta, log_decay, state):
    """o_t = prod alpha q_t^T S_0 + sum_s (alpha_{s+1} .. alpha_t) eta_s (q_t . k_s) v_s, as one masked matrix."""
    total = log_decay.cumsum(-1)
    past = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~past, -math.inf).exp() * eta.unsqueeze(-2)
    return ((q @ k.mT) * weights) @ v + total.exp().unsqueeze(-1) * (q @ state)


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])
def test_linear_memory_with_dot_loss_is_linear_attention(chunk):
    memory = LinearMemory(D, 3)
    verify(memory, lambda g: call(memory, g, chunk, loss=Dot()), lambda g: linear_attention(*order(g)), draw(memory, 9))


def order(given):
    return [given[name] for name in ("k", "v", "q", "eta", "log_decay", "param0")]


def test_laws_between_the_parts():
    """No momentum is gradient descent, q = 2 keeps weights as they are, p = 2 is L2, a wide Huber is L2."""
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 7)
    plain = call(memory, given, 3)
    near = beside(lambda g: {"o": call(memory, g, 3)}, given, {"o": plain}, torch.float64)["o"]
    still = {**given, "log_momentum": torch.full_like(given["eta"], -math.inf)}
    others = {
        "momentum 0": call(memory, still, 3, optimizer=Momentum()),
        "q 2": call(memory, given, 3, retention=LqNorm(2)),
        "p 2": call(memory, given, 3, loss=Lp(2)),
        "huber": call(memory, given, 3, loss=Huber(1e6)),
        "norm huber": call(memory, given, 3, loss=NormHuber(1e6)),
        "yaad": call(memory, given, 3, loss=SwitchedHuber(1e6)),
    }
    for name, other in others.items():
        assert_close(other, plain, near, name=name, terms=terms(memory, given))


CUTTINGS = [
    {"retention": Decay()},
    {"retention": Decay(), "optimizer": Momentum()},
    {"retention": LqNorm(4), "optimizer": Momentum()},
    {"retention": KLSoftmax()},
    {"retention": RowNorm(), "inclusive": False, "optimizer": GradientDescent(step=NewtonSchulz())},
    {"retention": RowNorm(), "inclusive": False, "optimizer": Momentum(step=NewtonSchulz())},
]


def piece(given, start, stop, params):
    names = [name for name in given if params or not name.startswith("param")]
    return {
        name: given[name]
        if name.startswith("param")
        else given[name][..., start:stop, :]
        if given[name].ndim == 4
        else given[name][..., start:stop]
        for name in names
    }


@pytest.mark.parametrize("options", CUTTINGS)
def test_a_sequence_may_be_cut_anywhere(options):
    """At the boundary of a chunk and inside one, in two and token by token."""
    memory = MLPMemory(D, HIDDEN, residual=False)
    given = draw(memory, 8, momentum=isinstance(options.get("optimizer"), Momentum))

    def read(given, cuts):
        rows, state = [], None
        for a, b in itertools.pairwise(cuts):
            o, state = call(memory, piece(given, a, b, state is None), 3, state=state, return_state=True, **options)
            rows.append(o)
        assert state.position == 2
        layers = {
            f"{name} {i}": x
            for i, layer in enumerate(state.layers)
            for name, x in layer._asdict().items()
            if x is not None
        }
        return {"o": torch.cat(rows, -2), **layers}

    whole = read(given, (0, 8))
    near = beside(lambda g: read(g, (0, 8)), given, whole, torch.float64)
    for cuts in [(0, c, 8) for c in range(1, 8)] + [tuple(range(9))]:
        parts = read(given, cuts)
        assert parts.keys() == whole.keys()
        for name, x in parts.items():
            assert_close(
                x, whole[name], near[name], name=f"{name} cut at {cuts}", terms=terms(memory, given), scale=1.0
            )


def test_gradients_flow_through_a_state():
    memory = MLPMemory(D, HIDDEN)
    options = {"optimizer": Momentum(), "retention": LqNorm(4)}
    given = draw(memory, 8, momentum=True)

    def cut(g):
        o, state = call(memory, piece(g, 0, 4, True), 3, return_state=True, **options)
        return torch.cat((o, call(memory, piece(g, 4, 8, False), 3, state=state, **options)), -2)

    verify(memory, cut, lambda g: call(memory, g, 3, **options), given)
    state = call(memory, {name: x.requires_grad_() for name, x in given.items()}, 3, return_state=True, **options)[1]
    assert all(layer.velocity.requires_grad for layer in state.layers)
    detached = state.detach()
    assert not any(x.requires_grad for layer in detached.layers for x in layer if x is not None)
    assert state.to(torch.float32).layers[0].start.dtype == torch.float32
    assert isinstance(detached, FastState)


def test_resets_forget_exactly_and_give_no_nan():
    """A log decay of -inf inside and between chunks, with finite ones around: prefix sums would give inf - inf."""
    memory = LinearMemory(D, 3)
    given = draw(memory, 9, momentum=True)
    for t in (2, 4, 5, 8):
        given["log_decay"][..., t] = -math.inf
        given["log_momentum"][..., t] = -math.inf
    verify(
        memory,
        lambda g: call(memory, g, 3, optimizer=Momentum()),
        lambda g: loop(NETWORKS["linear"][1], LOSSES["l2"][1], RETENTIONS["decay"][1:], 3, g),
        given,
    )
    alone = draw(memory, 9)
    alone["log_decay"][..., 8] = -math.inf
    before = call(memory, alone, 1, loss=Dot())[..., 8, :]
    alone["v"][..., :8, :] += 1.0
    assert torch.equal(call(memory, alone, 1, loss=Dot())[..., 8, :], before)


@pytest.mark.parametrize("strength", [0.0, -5.0, -50.0, -1e4])
def test_strong_decays_stay_finite(strength):
    memory = MLPMemory(D, HIDDEN)
    given = {name: x.float() for name, x in draw(memory, 33, momentum=True).items()}
    given["log_decay"] = given["log_decay"] + strength
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    o = call(memory, leaves, 16, optimizer=Momentum())
    for x in (o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e18])
def test_lq_norm_neither_underflows_nor_overflows(size):
    """The fourth power of 1e-20 is zero in float32, and of 1e18 infinite."""
    a = torch.randn(1, 1, 3, 4)
    weights, gain = LqNorm(3).open(size * a)
    exact = (a / lq(a.double(), 3)).float()
    assert_close(weights, exact.double(), exact, terms=12)
    assert_close(gain, (1 / (size * lq(a.double(), 3))), (1 / (size * lq(a, 3))), terms=12)


def test_softmax_retention_keeps_its_sum_and_sign():
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 6)
    given["eta"] = 100 * given["eta"]
    state = call(memory, given, 3, retention=KLSoftmax(scale=2.0), return_state=True)[1]
    for layer in state.layers:
        assert bool((layer.start >= 0).all())
        total = layer.start.sum(-2)
        assert_close(total, torch.full_like(total, 2.0), torch.full_like(total, 2.0), terms=HIDDEN)


def test_row_norm_keeps_every_length():
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 6)
    state = call(memory, given, 3, retention=RowNorm(), return_state=True)[1]
    for i, layer in enumerate(state.layers):
        before, after = given[f"param{i}"].norm(dim=-2), layer.start.norm(dim=-2)
        assert_close(after, before, before, terms=6 * HIDDEN)
        assert not torch.equal(layer.start, given[f"param{i}"])


def test_newton_schulz_pulls_singular_values_to_one():
    for shape in ((5, 8), (8, 5), (6, 6)):
        x = torch.linalg.svdvals(NewtonSchulz()(torch.randn(3, *shape).double()))
        y = torch.linalg.svdvals(on_singular_values(torch.randn(3, *shape).double()))
        assert bool((x < 1.3).all())
        assert bool((y < 1.3).all())
    g = torch.randn(2, 8, 5, dtype=torch.float64)
    exact = {"o": on_singular_values(g)}
    near = beside(lambda x: {"o": on_singular_values(x["g"])}, {"g": g}, exact, torch.float64)
    assert_close(NewtonSchulz()(g), exact["o"], near["o"], terms=8 * 5 * 5)
    zero = torch.zeros(2, 3, requires_grad=True)
    out = NewtonSchulz()(zero)
    assert not out.any()


def test_half_precision_is_computed_in_float32():
    memory = MLPMemory(D, HIDDEN)
    given = {name: x.bfloat16() for name, x in draw(memory, 7, momentum=True).items()}
    o, state = call(memory, given, 3, optimizer=Momentum(), return_state=True)
    single = call(memory, {name: x.float() for name, x in given.items()}, 3, optimizer=Momentum())
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, single.bfloat16())
    assert all(x.dtype == torch.float32 for layer in state.layers for x in layer if x is not None)


def test_numbers_and_shared_shapes_are_broadcast():
    memory = LinearMemory(D, 3)
    given = draw(memory, 7)
    given["param0"] = given["param0"][0, 0]
    given["eta"], given["log_decay"] = 0.3, torch.tensor([-0.1, -0.2]).double()
    wide = draw(memory, 7)
    wide |= {name: given[name] for name in ("k", "v", "q")}
    wide["param0"] = given["param0"].expand(2, 2, -1, -1)
    wide["eta"] = torch.full((2, 2, 7), 0.3, dtype=torch.float64)
    wide["log_decay"] = given["log_decay"].view(1, 2, 1).expand(2, 2, 7)
    exact = call(memory, wide, 3)
    assert_close(call(memory, given, 3), exact, exact, terms=terms(memory, wide))


def test_a_changed_future_leaves_the_past_bitwise_alone_and_nan_goes_forward():
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 8)
    before = call(memory, given, 3)
    for t in range(1, 8):
        changed = {name: x.clone() for name, x in given.items()}
        changed["v"][:, :, t:] += 1.0
        assert torch.equal(call(memory, changed, 3)[:, :, :t], before[:, :, :t])
    given["v"][1, 0, 2] = math.nan
    after = call(memory, given, 3)
    assert bool(after[1, 0, 2:].isnan().all())
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


def test_strided_input():
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 7)
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in given.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    exact = call(memory, given, 3)
    near = beside(lambda g: {"o": call(memory, g, 3)}, given, {"o": exact}, torch.float64)["o"]
    assert_close(call(memory, strided, 3), exact, near, terms=terms(memory, given))


def test_without_gradients():
    memory = MLPMemory(D, HIDDEN)
    given = draw(memory, 7)
    exact = call(memory, given, 3)
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    with torch.no_grad():
        o = call(memory, leaves, 3)
    with torch.inference_mode():
        p = call(memory, given, 3)
    assert not o.requires_grad
    assert torch.equal(o, exact)
    assert torch.equal(p, exact)


def test_gradients_by_finite_differences():
    memory = MLPMemory(3, 2)
    given = draw(memory, 3, batch=1, heads=1, momentum=True)
    options = {"optimizer": Momentum(), "retention": LqNorm(4), "loss": Lp(3)}
    names = list(given)
    leaves = [x.requires_grad_() for x in given.values()]
    assert torch.autograd.gradcheck(lambda *x: call(memory, dict(zip(names, x, strict=True)), 2, **options), leaves)


def test_no_gradient_of_a_single_token_is_ever_formed():
    """The largest tensor is one matrix of all heads, not one a token."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            results = result if isinstance(result, tuple | list) else (result,)
            sizes.extend(x.numel() for x in results if isinstance(x, torch.Tensor))
            return result

    memory = MLPMemory(16, 64)
    given = {name: x.requires_grad_() for name, x in draw(memory, 32, batch=1, heads=1).items()}
    with Watch():
        call(memory, given, 16).sum().backward()
    assert max(sizes) == 16 * 64


def test_init():
    memory = MLPMemory(32, 48)
    params = memory.init(2, 3, generator=torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in params] == [(2, 3, 32, 48), (2, 3, 48, 32)]
    again = memory.init(2, 3, generator=torch.Generator().manual_seed(0))
    for p, a in zip(params, again, strict=True):
        assert torch.equal(p, a)
        assert abs(float(p.var()) * p.shape[-2] - 1) < 6 * (2 / p.numel()) ** 0.5
    assert not LinearMemory(3).init(1, 1)[0].any()
    with pytest.raises(NotImplementedError, match=r"Memory\.forward"):
        Memory([(2, 2)])([torch.eye(2)], torch.ones(1, 2))


class Twice(Memory):
    def forward(self, linear, x):
        return linear(0, linear(0, x))


class Never(Memory):
    def forward(self, linear, x):
        return linear(1, x)


class Summed(L2):
    def __call__(self, y, v):
        return super().__call__(y, v).sum()


def test_bad_input():
    memory = LinearMemory(D, 3)
    given = draw(memory, 5, group=2)

    def expect(error, match, chunk=3, memory=memory, drop=(), **changed):
        options = {**given, **changed}
        with pytest.raises(error, match=match):
            call(memory, {name: x for name, x in options.items() if name not in drop}, chunk)

    expect(ValueError, r"k: got shape \(2, 5, 6\); pass \(batch, heads, tokens, channels\)", k=given["k"][0])
    expect(ValueError, "q: got 4 tokens beside k's 5; every token writes and reads", q=given["q"][:, :, 1:])
    expect(ValueError, "memory: maps 6 channels to 6; k has 6 and v has 3", memory=LinearMemory(D))
    expect(ValueError, "chunk: got 0", chunk=0)
    expect(ValueError, r"params: got 1 for 3 matrices", memory=SwiGLUMemory(D, HIDDEN, 3))
    expect(
        ValueError, r"params\[0\]: got shape \(6, 6\); pass one that broadcasts to \(2, 2, 6, 3\)", param0=torch.eye(6)
    )
    expect(ValueError, r"params\[0\]: got shape \(3, 1, 6, 3\)", param0=torch.zeros(3, 1, 6, 3))
    expect(ValueError, "params: pass either the parameters to start from, or the state", drop=("param0",))
    expect(ValueError, r"eta: got shape \(2, 2, 4\); pass \(2,\) or \(2, 2, 5\)", eta=given["eta"][..., 1:])
    expect(ValueError, r"log_decay: got shape \(5,\)", log_decay=given["log_decay"][0, 0])
    expect(ValueError, "log_momentum: got a tensor for GradientDescent", log_momentum=given["eta"])
    expect(ValueError, "log_momentum: got nothing for Momentum", optimizer=Momentum())
    expect(ValueError, "inclusive: got True for .*NewtonSchulz", optimizer=GradientDescent(step=NewtonSchulz()))
    expect(ValueError, r"loss: gave shape \(\); it must give one number a token, \(2, 2, 3\)", loss=Summed())
    square = draw(LinearMemory(D), 5)
    with pytest.raises(ValueError, match=r"memory: Twice\.forward uses matrix 0 twice"):
        call(Twice([(D, D)]), square, 3)
    with pytest.raises(ValueError, match=r"memory: Never\.forward uses 1 of 2 matrices"):
        call(Never([(D, D), (D, D)]), {**square, "param1": square["param0"]}, 3)
    state = call(memory, given, 3, return_state=True)[1]
    rest = {name: x for name, x in given.items() if name != "param0"}
    with pytest.raises(ValueError, match="params: pass either"):
        call(memory, given, 3, state=state)
    with pytest.raises(ValueError, match="state: got position 2 in a chunk of 2; go on with the chunk it began with"):
        call(memory, rest, 2, state=state)
    with pytest.raises(ValueError, match="state: comes from another optimizer than Momentum"):
        call(memory, {**rest, "log_momentum": given["log_decay"]}, 3, state=state, optimizer=Momentum())
    with pytest.raises(ValueError, match=r"state: got weights \[\(2, 2, 6, 3\)\]; pass those of this memory and batch"):
        call(memory, {name: x[:1] for name, x in rest.items()}, 3, state=state)
    for make, match in (
        (lambda: Lp(0.5), "p: got 0.5; pass a number >= 1"),
        (lambda: Lp(True), "p: got True"),
        (lambda: Lp(2, eps=0), "eps: got 0; pass a finite number > 0"),
        (lambda: LqNorm(1.5), "q: got 1.5; pass a number >= 2"),
        (lambda: Huber(-1.0), r"delta: got -1\.0; pass a finite number > 0"),
        (lambda: Huber(float("inf")), "delta: got inf; pass a finite number > 0"),
        (lambda: KLSoftmax(dim=0), r"dim: got 0; pass -2 \(over inputs\)"),
        (lambda: KLSoftmax(scale="a"), "scale: got 'a'"),
        (lambda: LinearMemory(0), "dim: got 0"),
        (lambda: MLPMemory(4, depth=0), "depth: got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_documentation_runs():
    assert doctest.testmod(module) == (0, 4)
