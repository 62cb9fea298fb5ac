"""What is not finite reaches the rows that see it; memory that nobody wrote and strange strides do no harm."""

from __future__ import annotations

import pytest
import torch
from cases import Case, agree, agree_in_gradients
from fixed import KV, OPTIONS, WHERE, B, D, H, N, problem

from saccade.softmax import attend, tiles
from saccade.testing.ambient import poisoned
from saccade.testing.budget import assert_close
from saccade.where import Causal, Window

BACKENDS = ("tiles", "reference", "auto")


def spoil(case, name, value):
    """One entry of q, k or v of a case, at (1, 1, 11, 2)."""
    case = case.to(torch.float64)
    getattr(case, name)[1, 1, 11, 2] = value
    return case


def rows_that_see(case):
    """bool (B, H, N): which rows see the spoiled key."""
    seen = case.entries.seen(N).expand(B, H, N, N)[..., 11].clone()
    seen[0] = False
    seen[1, : H // KV] = False  # they read the other key head
    return seen


def check_spread_of_values(case, value, run, found_as=None):
    """An entry of v reaches, as itself or as `found_as`, one channel of the rows that give its key a weight, and no
    other entry of o.

    A row that sees the key and gives it a weight of exactly zero may answer zero times the value, or nothing.
    """
    one = case.to(torch.float64)
    one.v.zero_()
    one.v[1, 1, 11, 2] = 1
    with torch.no_grad():
        (clean, clean_lse), (weight, _), (o, lse) = case.truth(), one.truth(), run(spoil(case, "v", value))
    rows = rows_that_see(case)
    hit = o[..., 2][rows & (weight[..., 2] > 0)]
    assert len(hit), "no row sees the spoiled key"
    wanted = value if found_as is None else found_as
    assert (hit.isnan() if wanted != wanted else hit == wanted).all(), "o: swallowed"
    kept = torch.ones_like(clean, dtype=torch.bool)
    kept[..., 2] = ~rows
    scale = case.size() * float(case.v.abs().max())
    assert_close(o[kept], clean[kept], clean[kept], name="o", terms=case.terms(), scale=scale)
    if clean_lse is not None:
        assert_close(lse, clean_lse, clean_lse, name="lse", terms=case.terms(), scale=case.size())


def check_spread_of_scores(case, name, value, run):
    """An entry of q or k changes what the equation says: the oracle reads every row by itself."""
    spoiled = spoil(case, name, value)
    with torch.no_grad():
        (true_o, true_lse), (o, lse) = spoiled.truth(), run(spoiled)
    about = {"terms": case.terms(), "scale": case.size() * float(case.v.abs().max())}
    for what, found, truth in (("o", o, true_o), ("lse", lse, true_lse)):
        if truth is not None:
            lost = ~truth.isfinite()
            assert found.isfinite().equal(~lost), f"{what}: not finite where the equation is, or the other way"
            assert_close(found.masked_fill(lost, 0), truth.masked_fill(lost, 0), truth.masked_fill(lost, 0), **about)


def through(backend):
    return lambda case: case.run(backend)


EVERY = [("tiles", where, options) for where in WHERE for options in OPTIONS]
EVERY += [("reference", where, options) for where in ("causal", "heads", "bits") for options in OPTIONS]
EVERY += [("reference", "routed by row", "plain"), ("auto", "full", "plain"), ("auto", "causal", "plain")]


@pytest.mark.parametrize(("backend", "where", "options"), EVERY)
def test_what_is_not_finite_reaches_who_sees_it(backend, where, options):
    case = problem(where, options)
    for value in (torch.nan, torch.inf, -torch.inf):
        check_spread_of_values(case, value, through(backend))
        for name in ("q", "k"):
            check_spread_of_scores(case, name, value, through(backend))


@pytest.mark.parametrize(("backend", "where"), [e[:2] for e in EVERY if e[2] == "plain"])
def test_infinities_of_both_signs_meet_as_nan(backend, where):
    case = problem(where, "plain")
    case.v[1, 1, 11, 2], case.v[1, 1, 7, 2] = torch.inf, -torch.inf
    with torch.no_grad():
        o, _ = case.run(backend)
    seen = case.entries.seen(N).expand(B, H, N, N)[1, H // KV :]
    up, down = seen[..., 11], seen[..., 7]
    found = o[1, H // KV :, :, 2]
    assert found.isnan().equal(up & down)
    assert (found == torch.inf).equal(up & ~down)
    assert (found == -torch.inf).equal(down & ~up)


@pytest.fixture
def unasked(monkeypatch):
    """The tiles backend takes its tensors for those of a GPU, which the host does not wait for."""
    monkeypatch.setattr(tiles, "_on_host", lambda x: False)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("options", ["plain", "all", "sigmoid", "entmax"])
@pytest.mark.parametrize("where", WHERE)
def test_nothing_is_asked_of_a_gpu(where, options):
    """There what is not finite reaches the same rows, as NaN; finite numbers give what they give anywhere."""
    case, run = problem(where, options), through("tiles")
    agree(case, "tiles")
    if options != "entmax":
        agree_in_gradients(case, "tiles")
    for value in (torch.nan, torch.inf, -torch.inf):
        check_spread_of_values(case, value, run, torch.nan)
        for name in ("q", "k"):
            check_spread_of_scores(case, name, value, run)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_gradients_on_a_gpu_are_finite_where_they_are_on_a_cpu(normalizer, request):
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    k[0, 0, 3], v[0, 0, 3, 1] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        o = attend(*leaves, Causal() & Window(2), normalizer=normalizer, backend="tiles")
        found = torch.autograd.grad(o[0, 0, [0, 1, 2, 5, 6, 7]].square().sum(), leaves)
        return [x[0, 0, [0, 1, 2, 4, 5, 6, 7]] for x in found]

    asked = gradients()
    assert asked[2].isfinite().any()
    request.getfixturevalue("unasked")
    for name, found, there in zip("qkv", gradients(), asked, strict=True):
        lost = ~there.isfinite()
        assert found.isfinite().equal(~lost)
        found, there = (x.masked_fill(lost, 0) for x in (found, there))
        assert_close(found, there, there, name=name, terms=8)


@pytest.mark.usefixtures("unasked")
def test_marks_that_are_lost_are_noticed(monkeypatch):
    monkeypatch.setattr(tiles, "_unmarked", lambda o, v: o[..., : v.shape[3]])
    with pytest.raises(AssertionError, match="swallowed"):
        check_spread_of_values(problem("window by row", "plain"), torch.inf, through("tiles"), torch.nan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_stays_in_its_row(backend):
    """q and k are finite; their product is not, at one pair that the pattern leaves out."""
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    q[0, 0, 2] = k[0, 0, 5] = 1e30
    o = attend(q, k, v, Window(2), backend=backend)
    sees = Window(2).dense(8)[0][:, 5]
    assert o[0, 0, ~sees].isfinite().all()


def swallows(case):
    """The broken twin: NaN and infinity are taken for zero."""
    case = case.to(torch.float64)
    for x in (case.q, case.k, case.v):
        x.nan_to_num_(0, 0, 0)
    return case.run("reference")


def spreads(case):
    """The broken twin: what is masked is multiplied by zero."""
    o, lse = case.run("reference")
    repeat = torch.arange(H) // (H // KV)
    return o + 0 * (case.v + case.k.sum(-1, keepdim=True))[:, repeat].sum(2, keepdim=True), lse


@pytest.mark.parametrize("broken", [swallows, spreads])
def test_broken_twins_are_caught(broken):
    case = problem("window by row", "plain")
    with pytest.raises(AssertionError):
        check_spread_of_values(case, torch.nan, broken)
    with pytest.raises(AssertionError):
        check_spread_of_scores(case, "k", torch.nan, broken)


@pytest.mark.parametrize("options", ["plain", "all", "sigmoid", "sparsemax"])
@pytest.mark.parametrize("where", WHERE)
def test_memory_that_nobody_wrote(where, options):
    case = problem(where, options)
    with poisoned():
        agree(case, "tiles")
        if "max" not in options:
            agree_in_gradients(case, "tiles")


def test_memory_that_nobody_wrote_is_caught():
    def reads_unwritten(*inputs, **options):
        o, lse = attend(*inputs, **options)
        return o + 0 * torch.empty_like(o), lse

    with poisoned(), pytest.raises(AssertionError, match="max error inf"):
        agree(problem("causal", "plain"), "tiles", reads_unwritten)


LAYOUTS = {
    "heads after tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
    "part of a wider one": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def check_layout(case, layout, backend, run=attend):
    moved = Case(*(layout(x) for x in (case.q, case.k, case.v)), case.where, case.entries, case.options)
    agree(moved, backend, run)
    agree_in_gradients(moved, backend, run)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, layout):
    for where in ("full", "window by row", "routed by column"):
        check_layout(problem(where, "plain"), LAYOUTS[layout], backend)
        check_layout(problem(where, "plain", dv=D), LAYOUTS[layout], backend)


def test_expanded_inputs():
    """Batch and heads with stride 0."""
    case = problem("window by row", "plain")
    q, k, v = (x[:1, :1].expand(2, -1, -1, -1) for x in (case.q, case.k, case.v))
    one = Case(q.expand(-1, H, -1, -1), k, v, case.where, case.entries, {})
    agree(one, "tiles")
    agree_in_gradients(one, "tiles")


def test_strides_are_caught():
    def assumes_contiguous(q, k, v, *rest, **options):
        k = torch.as_strided(k, k.shape, torch.empty(k.shape, device="meta").stride())
        return attend(q, k, v, *rest, **options)

    with pytest.raises(AssertionError, match="max error"):
        check_layout(problem("full", "plain"), LAYOUTS["channels first"], "tiles", assumes_contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", WHERE)
def test_inputs_are_left_alone(where, backend):
    case = problem(where, "all")
    before = [leaf.clone() for leaf in case.leaves().values()]
    o, _ = case.run(backend)
    o.sum().backward()
    assert all(leaf.equal(old) for leaf, old in zip(case.leaves().values(), before, strict=True))
