"""The kernels of the delta rule against the recurrence token by token, values and every gradient.

On a CPU they run in Triton's interpreter, with tiles so small that a short sequence has many; on a GPU with their own.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from recurrences import delta, differentiate, draw, draw_gate, per_head, verify
from torch.nn import functional as F

from saccade.scan import kernels
from saccade.scan.delta_rule import delta_rule
from saccade.scan.kernels import delta_launch, delta_ops
from saccade.scan.kernels.delta_launch import DeltaLaunch
from saccade.scan.kernels.launch import Sizes, Tile
from saccade.scan.state import Matrix, State
from saccade.testing.budget import assert_close

D, DV, TOKENS = 20, 17, 37  # two blocks of channels each, three chunks
SCALE = 0.7
WIDE = (torch.float32,)
GATES = ["none", "constant", "scalar"]
PER_HEAD = [("key", "key"), ("query", "key"), ("key", "query")]


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, *problem: cls(16, Tile(16, 4, 1))))
        monkeypatch.setattr(delta_launch, "WIDEST", 16)


def problem(
    gate, beta_heads="key", gate_heads="key", heads=2, groups=1, tokens=TOKENS, dim=D, dv=DV, batch=1, memory=True
):
    """q, unit k, v, beta in (0, 2), g and a memory."""
    shapes = ((heads, dim), (groups, dim), (groups, dv))
    q, k, v = (draw(batch, h, tokens, d, seed=i) for i, (h, d) in enumerate(shapes))
    of = {"key": groups, "query": heads}
    beta = 2 * draw(batch, of[beta_heads], tokens, seed=3).sigmoid()
    g = draw_gate(gate, of[gate_heads], tokens, dim, batch)
    kept = max(of[beta_heads], groups if g is None else of[gate_heads])
    return [q, F.normalize(k, dim=-1), v, beta, g, draw(batch, kept, dim, dv, seed=9) if memory else None]


def fast(**options):
    """q, k, v, beta, g, memory -> (o, last memory a query head)."""

    def call(q, k, v, beta, g, memory):
        state = None if memory is None else State(memory.float())
        given = {"backend": "triton", "scale": SCALE} | options
        o, after = delta_rule(q, k, v, beta, log_decay=g, state=state, return_state=True, **given)
        return o, per_head(after.memory, q.shape[1])

    return call


def plain(q, k, v, beta, g, memory):
    return delta(q * SCALE, k, v, beta, g, memory)


def products(gate, tokens, dim):
    """Behind one entry of any result; the gradient of a constant gate is a sum over tokens of sums over tokens."""
    return tokens * dim * dim * (tokens if gate == "constant" else 1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta_heads", "gate_heads"), PER_HEAD)
def test_is_the_recurrence(gate, beta_heads, gate_heads):
    given = problem(gate, beta_heads, gate_heads, batch=2 if beta_heads == "key" else 1)
    verify(fast(), plain, given, terms=products(gate, TOKENS, D), dtypes=WIDE)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [48, 70])
def test_with_what_narrow_dtypes_do(gate, tokens, monkeypatch):
    """Decays from sums of gates, and query heads that share a memory with others that do not; whole chunks and not."""
    monkeypatch.setattr(DeltaLaunch, "exact", False)
    given = problem(gate, heads=4, groups=2, tokens=tokens, dim=5, dv=3)
    verify(fast(), plain, given, terms=products(gate, tokens, 5) * 64, dtypes=WIDE)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_half_precision_and_lengths(gate, tokens):
    given = problem(gate, tokens=tokens, dim=5, dv=3, memory=False)
    verify(fast(), plain, given, terms=products(gate, tokens, 5), dtypes=(torch.float16,))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta_heads", "cut"), [("key", 1), ("query", 1), ("key", 2)])
def test_packed_is_the_loop(gate, beta_heads, cut, monkeypatch):
    """cut: stretches a sequence, some of which have no chunk."""
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    ends = [0, 3, 20, 21, 40]
    q, k, v, beta, g, _ = problem(gate, beta_heads, tokens=40, dim=5, dv=3)
    memory = draw(4, beta.shape[1], 5, 3, seed=9)

    def packed(q, k, v, beta, g, memory):
        cu = torch.tensor(ends, dtype=torch.int32, device=q.device)
        o, after = delta_rule(
            q, k, v, beta, log_decay=g, cu_seqlens=cu, state=State(memory), return_state=True, backend="triton"
        )
        return o, after.memory, after.transition.value

    def loop(q, k, v, beta, g, memory):
        found = []
        for i, (first, stop) in enumerate(itertools.pairwise(ends)):
            parts = [x if x is None or x.ndim == 1 else x[:, :, first:stop] for x in (q, k, v, beta, g)]
            products = torch.eye(5, dtype=q.dtype).expand(1, memory.shape[1], 5, 5)
            nothing = torch.zeros_like(parts[1])
            o, last = delta(*parts, memory[i : i + 1])
            products = delta(*parts[:2], nothing, *parts[3:], products)[1]
            kept = slice(None, None, 2 // memory.shape[1])  # one of the query heads that share a memory
            found.append((o, last[:, kept], products[:, kept]))
        return tuple(torch.cat(x, dim) for x, dim in zip(zip(*found, strict=True), (2, 0, 0), strict=True))

    verify(packed, loop, [q, k, v, beta, g, memory], terms=products(gate, 40, 5), dtypes=WIDE)


def slow(given):
    """The same with gates that leave something of a state a stretch later."""
    given[4] = given[4] if given[4] is None else given[4] / 64
    return given


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("count", "beta_heads", "gate_heads"), [(2, "key", "key"), (5, "query", "key")])
def test_stretches_of_a_sequence_are_joined(gate, count, beta_heads, gate_heads, monkeypatch):
    """Query heads that share a memory and others that do not; of five stretches of six chunks two have none."""
    monkeypatch.setattr(DeltaLaunch, "stretches", count)
    given = slow(problem(gate, beta_heads, gate_heads, heads=2, groups=1, tokens=5 * 16 + 3))
    verify(fast(), plain, given, terms=products(gate, 83, D), dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stretches_with_what_narrow_dtypes_do(gate, dtype, monkeypatch):
    monkeypatch.setattr(DeltaLaunch, "stretches", 3)
    monkeypatch.setattr(DeltaLaunch, "exact", False)
    given = slow(problem(gate, heads=4, groups=2, tokens=6 * 16, dim=5, dv=3, batch=2))
    verify(fast(), plain, given, terms=products(gate, 96, 5) * 64, dtypes=(dtype,))


def lengths(least, most, beta_most, tokens=96):
    """A problem whose keys have lengths between two, and beta |k|^2 up to `beta_most`."""
    q, k, v, _, g, memory = problem("none", tokens=tokens, dim=5, dv=3)
    size = least + (most - least) * draw(1, 1, tokens, seed=4).sigmoid()
    return [q, k * size[..., None], v, beta_most * draw(1, 1, tokens, seed=3).sigmoid() / size.square(), g, memory]


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize(("least", "most"), [(0.1, 0.2), (0.1, 10.0), (10.0, 30.0)])
def test_keys_of_any_length(least, most, cut, monkeypatch):
    """Where the recurrence does not grow, maps of stretches do not."""
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    verify(fast(), plain, lengths(least, most, 2.0), terms=96 * 25, dtypes=WIDE)


def test_maps_that_grow_cost_as_many_digits_as_states(monkeypatch):
    """Beyond, both do: here to more than a million times what is written."""
    monkeypatch.setattr(DeltaLaunch, "stretches", 3)
    given = lengths(1.0, 1.5, 6.0)
    assert float(plain(*given)[1].abs().max()) > 1e6 * float(given[2].abs().max())
    verify(fast(), plain, given, terms=96 * 25, dtypes=WIDE)


def unmapped(parts, back):
    """A twin whose stretches forget what was before them."""
    parts[..., -D:] = 0


def transposed(parts, back):
    """A twin that maps states as gradients."""
    parts[..., -D:] = parts[..., -D:].mT.clone()


def untransposed(parts, back):
    """A twin that maps gradients as states."""
    if back:
        transposed(parts, back)


@pytest.mark.parametrize(("twin", "where"), [(unmapped, "output"), (transposed, "output"), (untransposed, "gradient")])
def test_wrong_maps_of_stretches_are_caught(twin, where, monkeypatch):
    join = DeltaLaunch.join

    def wrong(launch, parts, added, first, starts, back=False):
        spoiled = parts.clone()
        twin(spoiled, back)
        join(launch, spoiled, spoiled if added is parts else added, first, starts, back)

    monkeypatch.setattr(DeltaLaunch, "stretches", 3)
    monkeypatch.setattr(DeltaLaunch, "join", wrong)
    with pytest.raises(AssertionError, match=rf"{where} \d in torch\.float32"):
        verify(fast(), plain, slow(problem("scalar", tokens=64)), terms=products("scalar", 64, D), dtypes=WIDE)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim", "count"),
    [
        (1, 16, 32768, 128, 4),
        (1, 16, 3072, 128, 3),  # too short to be cut as often
        (1, 16, 2048, 128, 1),  # too short
        (2, 16, 16384, 128, 1),  # in two would be walked as long as in one
        (1, 16, 32768, 64, 8),
        (1, 1, 131072, 64, 32),  # joining would take longer than walking
    ],
)
def test_how_often_sequences_are_cut(batch, heads, tokens, dim, count, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(delta_launch, "multiprocessors", lambda device: 132)
    q = torch.empty(batch, heads, tokens, dim, device="meta", dtype=torch.bfloat16)
    assert DeltaLaunch(q, q, q, None, None, 1.0, q[..., 0]).stretches == count


HOSTILE = [0.0, -50.0, -1e30, -math.inf]


@pytest.mark.parametrize(("exact", "cut"), [(True, 1), (False, 1), (True, 3), (False, 3)])
@pytest.mark.parametrize("gate", ["constant", "scalar"])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_gates(gate, value, exact, cut, monkeypatch):
    """Gates of one value everywhere, and now and then between ordinary ones; gradients stay finite."""
    monkeypatch.setattr(DeltaLaunch, "exact", exact)
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    given = problem(gate, dim=5, dv=3)
    often, seldom = given[4].clone(), given[4].clone()
    often.fill_(value)
    if gate == "constant":
        seldom[:] = value / 2
    else:
        seldom[:, :, ::7] = value
    for g in (often, seldom):
        given[4] = g
        verify(fast(), plain, given, terms=products(gate, TOKENS, 5), dtypes=WIDE)
        _, gradients = differentiate(fast(), given, torch.float32)
        assert all(x.isfinite().all() for x in gradients)


def test_a_large_gate_costs_later_tokens_no_digits():
    q, k, v, beta, g, _ = (None if x is None else x.float() for x in problem("scalar", dim=5, memory=False))
    g[:, :, 16] = -1e3
    o, rest = (
        delta_rule(*(x[:, :, first:] for x in (q, k, v, beta)), log_decay=g[:, :, first:], backend="triton")[
            :, :, 16 - first :
        ]
        for first in (0, 16)
    )
    assert torch.equal(o, rest)


def alike(share, chunk, monkeypatch):
    """A problem whose keys are nearly one, and chunks of so many tokens."""
    monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, *problem: cls(chunk, Tile(16, 4, 1))))
    q, k, v, beta, g, memory = problem("none", tokens=64, dim=5, dv=3)
    k = F.normalize(k[:, :, :1] + 1e-3 * k, dim=-1)
    return [q, k, v, torch.full_like(beta, share), g, memory]


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("chunk", [32, 64])
def test_keys_that_are_alike_cost_no_digits(share, chunk, monkeypatch):
    verify(fast(), plain, alike(share, chunk, monkeypatch), terms=64 * 25, dtypes=WIDE)


def test_powers_of_the_system_would_have_no_digits_left(monkeypatch):
    """The twin of the above: the same inverse as a product of powers."""

    def powers(launch, gates, cuts):
        whole = solved(launch, gates, cuts)
        t = whole.t
        eye = torch.eye(t.shape[-1])
        power = eye - torch.linalg.inv((t.unflatten(2, (-1, t.shape[-1]))).double()).float()
        found = eye + power
        for _ in range(5):
            power = power @ power
            found = found @ (eye + power)
        return whole._replace(t=found.flatten(2, 3).contiguous())

    solved = DeltaLaunch.solved
    monkeypatch.setattr(DeltaLaunch, "solved", powers)
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(fast(), plain, alike(1.0, 64, monkeypatch), terms=64 * 25, dtypes=WIDE)


def systems(launch):
    """I + A of every chunk and beta, from the equations, in float64."""
    chunk, tokens = launch.sizes.chunk, launch.k.shape[2]
    whole = tokens // chunk * chunk
    k, beta, g = (x[:, :, :whole].double().unflatten(2, (-1, chunk)) for x in (launch.k, launch.beta, launch.g))
    decay = torch.stack([g[..., j + 1 : i + 1].sum(-1) for i in range(chunk) for j in range(chunk)], -1)
    found = beta[..., None] * (k @ k.mT) * decay.unflatten(-1, (chunk, chunk)).exp()
    return torch.eye(chunk, dtype=torch.float64) + found.tril(-1), beta


def prepared(q, k, v, beta, g, monkeypatch, how):
    """A problem, and the inverses that its kernels find in products of such a precision."""
    monkeypatch.setattr(DeltaLaunch, "exact", False)
    monkeypatch.setattr(DeltaLaunch, "inverses", how)
    launch = DeltaLaunch(*(x.float() for x in (q, k, v, g)), None, SCALE, beta.float())
    t = launch.solved(launch.prepared(launch.cuts).gates, launch.cuts).t
    return launch, t[:, :, : TOKENS // 16 * 16].unflatten(2, (-1, 16))


def test_inverses_in_half_precision(monkeypatch):
    *given, _ = problem("scalar")
    launch, found = prepared(*given, monkeypatch, "half")
    system, beta = systems(launch)
    exact = torch.linalg.inv(system) * beta[..., None, :]
    eager = (torch.linalg.inv(system.half().float()) * beta[..., None, :].float()).half()
    assert_close(found.half(), exact, eager, terms=16)
    twin = found.clone()  # without the last level
    twin[..., 8:, :8] = 0
    with pytest.raises(AssertionError, match="max error"):
        assert_close(twin.half(), exact, eager, terms=16)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_inverses_beyond_half_precision(monkeypatch):
    q, k, v, beta, g, _ = problem("scalar")
    given = (q, 30 * k, v, beta, g)
    found, exact = (prepared(*given, monkeypatch, how)[1] for how in ("half", "tf32"))
    assert float(exact.abs().max()) > torch.finfo(torch.float16).max
    assert torch.equal(found, exact)


@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_states_join_and_carry_the_transition(gate):
    """Two halves are the whole, and the second from nothing composes with the first."""
    q, k, v, beta, g, memory = (None if x is None else x.float() for x in problem(gate, dim=5, dv=3))

    def run(part, state, backend="triton"):
        tokens = [x[:, :, part] for x in (q, k, v, beta)]
        gates = None if g is None else g[:, :, part]
        return delta_rule(*tokens, log_decay=gates, state=state, return_state=True, backend=backend)

    early, late, all_ = slice(0, 20), slice(20, None), slice(None)
    o, whole = run(all_, State(memory), "reference")
    first, before = run(early, State(memory))
    second, after = run(late, before)
    composed = before.compose(run(late, None)[1])
    assert_close(torch.cat([first, second], 2), o.double(), o, terms=TOKENS * 25)
    for found in (after, composed):
        assert isinstance(found.transition, Matrix)
        assert_close(found.memory, whole.memory.double(), whole.memory, terms=TOKENS * 25)
        exact = whole.transition.value
        assert_close(found.transition.value, exact.double(), exact, terms=TOKENS * 25, scale=1.0)


def forgetful(q, k, v, beta, g, memory):
    """A twin that starts from nothing."""
    return fast()(q, k, v, beta, g, 0 * memory)


def interleaved(q, k, v, beta, g, memory):
    """A twin that gives query head h the key head h % Hkv."""
    order = [0, 2, 1, 3]
    o, last = fast()(q[:, order], k, v, beta, g, memory)
    return o[:, order], last[:, order]


def late_gate(q, k, v, beta, g, memory):
    """A twin whose gates act one token too late."""
    return fast()(q, k, v, beta, torch.cat([g[:, :, :1], g[:, :, :-1]], 2), memory)


def unsolved(q, k, v, beta, g, memory):
    """A twin that erases only what came before the chunk."""
    solved = DeltaLaunch.solved

    def identity(launch, gates, cuts):
        whole = solved(launch, gates, cuts)
        t = whole.t
        rows = torch.arange(t.shape[2], device=t.device)
        return whole._replace(t=F.one_hot(rows % t.shape[3], t.shape[3]).to(t).expand_as(t).contiguous())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaLaunch, "solved", identity)
        return fast()(q, k, v, beta, g, memory)


@pytest.mark.parametrize("twin", [forgetful, interleaved, late_gate, unsolved])
def test_wrong_twins_are_caught(twin):
    given = problem("scalar", heads=4, groups=2, dim=5, dv=3)
    with pytest.raises(AssertionError, match=r"output 0 in torch\.float32"):
        verify(twin, plain, given, terms=products("scalar", TOKENS, 5), dtypes=WIDE)


@pytest.mark.parametrize("which", range(6))
def test_a_wrong_gradient_is_caught(which, monkeypatch):
    backward = DeltaLaunch.backward

    def off(*given):
        found = list(backward(*given))
        x = found[which]
        steps = torch.arange(x.shape[2]).view(1, 1, -1, *[1] * (x.ndim - 3)) / x.shape[2]
        found[which] = x + 0.1 * x.abs().max() * steps
        return tuple(found)

    monkeypatch.setattr(DeltaLaunch, "backward", off)
    with pytest.raises(AssertionError, match=f"gradient {which}"):
        verify(fast(), plain, problem("scalar", dim=5, dv=3), terms=products("scalar", TOKENS, 5), dtypes=WIDE)


@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_strided_inputs(gate):
    *tokens, g, _ = (None if x is None else x.float() for x in problem(gate, dim=5, dv=3, memory=False, batch=2))
    given = [*tokens, g] if g is not None else tokens

    def strided(x):
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]

    def turned(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def run(given):
        leaves = [x.detach().requires_grad_() for x in given]
        o = delta_rule(*leaves[:4], log_decay=leaves[4] if len(leaves) > 4 else None, backend="triton")
        return [o, *torch.autograd.grad(o, leaves, turned(draw(*o.shape, dtype=torch.float32)))]

    whole = run(given)
    for view in (strided, turned):
        assert all(a.equal(b) for a, b in zip(run([view(x) for x in given]), whole, strict=True))


def test_only_the_state_or_only_the_output_has_a_gradient():
    given = [x.float().requires_grad_() for x in problem("scalar", dim=5, dv=3)]
    *tokens, g, memory = given
    for which in (0, 1):

        def found(backend, which=which):
            results = delta_rule(*tokens, log_decay=g, state=State(memory), return_state=True, backend=backend)
            result = (results[0], results[1].memory)[which]
            return torch.autograd.grad(result.sum(), given, allow_unused=True, materialize_grads=True)

        ours, theirs = found("triton"), found("reference")
        largest = max(float(x.abs().max()) for x in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b.double(), b, terms=products("scalar", TOKENS, 5), scale=largest)


@pytest.mark.parametrize("cut", [1, 2])
def test_operator_is_well_formed(cut, monkeypatch):
    """Schema, fake tensors and autograd registration, as PyTorch itself checks them."""
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    q, k, v, beta, g, memory = (x.float().requires_grad_() for x in problem("scalar", dim=5, dv=3))
    cu = torch.tensor([0, 9, TOKENS], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for given in ((q, k, v, beta, None, memory, None, SCALE), (q, k, v, beta, g, memory.repeat(2, 1, 1, 1), cu, SCALE)):
        torch.library.opcheck(delta_ops.delta_scan.overload, given, test_utils=checks)


@pytest.mark.parametrize("beta_heads", ["key", "query"])
def test_a_graph_holds_it_whole(beta_heads):
    given = [x.float().requires_grad_() for x in problem("scalar", beta_heads, dim=5, dv=3)[:5]]

    def call(q, k, v, beta, g):
        return delta_rule(q, k, v, beta, log_decay=g, backend="triton")

    torch.compiler.reset()
    o, eager = torch.compile(call, backend="aot_eager", fullgraph=True)(*given), call(*given)
    torch.compiler.reset()
    assert o.equal(eager)
    for a, b in zip(*(torch.autograd.grad(x.sum(), given) for x in (o, eager)), strict=True):
        assert_close(a, b.double(), b, terms=TOKENS)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [1, 3])
def test_equal_inputs_give_equal_bits(gate, cut, monkeypatch):
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    given = [None if x is None else x.float().requires_grad_() for x in problem(gate, dim=5, dv=3)]

    def run():
        o, last = fast()(*given)
        return [o, last, *torch.autograd.grad(o.sum() + last.sum(), [x for x in given if x is not None])]

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


def test_what_cannot_run_says_so():
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    beta, gate = torch.rand(1, 2, 8), -torch.rand(1, 2, 8, 16)
    assert kernels.delta_reasons(v, 16, None) == kernels.delta_reasons(v, 16, gate[..., 0]) == []
    assert kernels.delta_reasons(v.double(), 16, None) == ["it computes in at most float32"]
    with pytest.raises(ValueError, match="backend: got 'triton', which cannot run this: a decay a channel of keys has"):
        delta_rule(q, k, v, beta, log_decay=gate, backend="triton")
    with pytest.raises(ValueError, match="more than 256 channels do not fit its tiles, got 320 and 16"):
        delta_rule(q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), v, beta, backend="triton")
    with pytest.raises(ValueError, match="cu_seqlens"):
        delta_rule(q, k, v, beta, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), backend="triton")
    assert torch.equal(delta_rule(q, k, v, beta), delta_rule(q, k, v, beta, backend="chunked"))


# On a GPU: the compiled kernels, in every dtype.

SIZES = [(64, 64, 192), (128, 128, 150), (128, 128, 192), (256, 256, 150), (96, 160, 192), (20, 17, 150)]
ON_GPU = [(*size, *PER_HEAD[i % 3]) for i, size in enumerate(SIZES)]


def on_gpu(call):
    def run(*given):
        return [x.cpu() for x in call(*(None if x is None else x.cuda() for x in given))]

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dim", "dv", "tokens", "beta_heads", "gate_heads"), ON_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled(gate, beta_heads, gate_heads, dim, dv, tokens, dtype):
    given = problem(gate, beta_heads, gate_heads, heads=4, groups=2, tokens=tokens, dim=dim, dv=dv)
    verify(on_gpu(fast()), plain, given, terms=products(gate, tokens, dim), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "scalar"])
@pytest.mark.parametrize(("dim", "dv", "tokens", "beta_heads", "gate_heads"), [ON_GPU[i] for i in (0, 1, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_stretches(gate, beta_heads, gate_heads, dim, dv, tokens, dtype, monkeypatch):
    monkeypatch.setattr(DeltaLaunch, "stretches", 3)
    given = slow(problem(gate, beta_heads, gate_heads, heads=4, groups=2, tokens=2 * tokens, dim=dim, dv=dv))
    verify(on_gpu(fast()), plain, given, terms=products(gate, 2 * tokens, dim), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [1, 4])
def test_compiled_query_heads_of_one_memory(gate, dim, heads):
    """None shared, and so many that no loads run ahead of wide ones."""
    given = problem(gate, heads=heads, groups=1, tokens=192, dim=dim, dv=dim)
    verify(on_gpu(fast()), plain, given, terms=products(gate, 192, dim), dtypes=(torch.bfloat16,))


@pytest.mark.gpu
def test_compiled_inverses_beyond_half_precision(monkeypatch):
    q, k, v, beta, g, _ = problem("scalar", tokens=192, dim=64, dv=64)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, 10 * k, v))
    launch, found = DeltaLaunch(q, k, v, g.float().cuda(), None, SCALE, beta.float().cuda()), []
    for how in ("half", "tf32"):
        monkeypatch.setattr(DeltaLaunch, "inverses", how)
        found.append(launch.solved(launch.prepared(launch.cuts).gates, launch.cuts).t)
    assert float(found[0].abs().max()) > torch.finfo(torch.float16).max
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_packed(gate, cut, dtype, monkeypatch):
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    q, k, v, beta, g, memory = problem(gate, heads=4, groups=2, tokens=301, dim=64, dv=64)
    given = [q, k, v, beta, g, memory.expand(4, -1, -1, -1)]

    def call(backend):
        def run(q, k, v, beta, g, memory):
            cu = torch.tensor([0, 3, 130, 132, 301], dtype=torch.int32, device=q.device)
            o, after = delta_rule(
                q,
                k,
                v,
                beta,
                log_decay=g,
                cu_seqlens=cu,
                state=State(memory.float()),
                return_state=True,
                backend=backend,
            )
            return o, after.memory, after.transition.value

        return run

    verify(on_gpu(call("triton")), call("reference"), given, terms=products(gate, 301, 64), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["constant", "scalar"])
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("value", HOSTILE)
def test_compiled_hostile_gates(gate, value, cut, monkeypatch):
    monkeypatch.setattr(DeltaLaunch, "stretches", cut)
    given = problem(gate, heads=2, groups=2, tokens=150, dim=128, dv=128)
    given[4].fill_(value)
    for dtype in (torch.bfloat16, torch.float32):
        verify(on_gpu(fast()), plain, given, terms=products(gate, 150, 128), dtypes=(dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_equal_bits_each_time(gate):
    given = [None if x is None else x.to("cuda", torch.bfloat16) for x in problem(gate, tokens=5000, dim=128, dv=128)]
    leaves = [x.requires_grad_() for x in given[:5] if x is not None]

    def run():
        o = delta_rule(*given[:4], log_decay=given[4], backend="triton")
        return [o, *torch.autograd.grad(o.float().square().sum(), leaves)]

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))
