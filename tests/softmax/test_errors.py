"""Bad input gives one error that names the argument; a backend that is named runs, or says why it cannot."""

from __future__ import annotations

import importlib

import pytest
import torch

from saccade.softmax import Alibi, Entmax, FromCoordinates, RelativeTable, attend, explain, merge, which
from saccade.softmax.backends import ORDER
from saccade.where import (
    Causal,
    Documents,
    Full,
    Neighborhood,
    Packed,
    PerHead,
    Plan,
    Router,
    Sinks,
    TopK,
    Window,
    plan_chosen,
    pooled_scores,
)

B, H, KV, N, M, D = 2, 4, 2, 6, 9, 8


def inputs(batch=B, heads=H, kv_heads=KV, n=N, m=M, d=D, **options):
    return [torch.randn(batch, heads, n, d, **options)] + [torch.randn(batch, kv_heads, m, d, **options) for _ in "kv"]


def ends(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def per_batch(batch):
    chosen = torch.zeros(batch * H, 1, 1, dtype=torch.int64)
    return plan_chosen(Full(), chosen, torch.arange(batch * H).view(batch, H), N, M, (64, 64))


OPTIONS = {
    "scale infinite": ({"scale": float("inf")}, "scale: got inf; pass a finite number"),
    "scale nan": ({"scale": float("nan")}, "scale: got nan; pass a finite number"),
    "scale text": ({"scale": "1"}, "scale: got '1'"),
    "softcap zero": ({"softcap": 0.0}, r"softcap: got 0.0; pass a finite number > 0"),
    "softcap negative": ({"softcap": -1.0}, r"softcap: got -1.0; pass a finite number > 0"),
    "softcap nan": ({"softcap": float("nan")}, r"softcap: got nan; pass a finite number > 0"),
    "softcap infinite": ({"softcap": float("inf")}, "softcap: got inf"),
    "softcap text": ({"softcap": "1"}, "softcap: got '1'"),
    "bias tensor": ({"bias": torch.zeros(H, N, M)}, "bias: got Tensor; pass a function"),
    "bias of too few heads": ({"bias": Alibi(3)}, "bias: got .*3"),
    "bias of too many heads": ({"bias": Alibi(8)}, "bias: got .*8"),
    "bias of too few dims": ({"bias": lambda i, j: torch.zeros(len(i), len(j))}, "bias: got "),
    "sink of one": ({"sink": torch.zeros(1)}, r"sink: got torch.float32 of shape \(1,\); pass one .* shape \(4,\)"),
    "sink of key heads": ({"sink": torch.zeros(KV)}, r"sink: got torch.float32 of shape \(2,\)"),
    "sink of integers": ({"sink": torch.zeros(H, dtype=torch.int64)}, "sink: got torch.int64"),
    "sink list": ({"sink": [0.0] * H}, "sink: got list"),
    "sink elsewhere": ({"sink": torch.zeros(H, device="meta")}, "sink: got device meta beside q on cpu"),
    "sink of a sigmoid": ({"sink": torch.zeros(H), "normalizer": "sigmoid"}, "sink: a sink is a logit of the softmax"),
    "normalizer unknown": ({"normalizer": "max"}, "normalizer: got 'max'; choose one of softmax, sigmoid, entmax"),
    "normalizer number": ({"normalizer": 1.5}, "normalizer: got 1.5; choose one of"),
    "normalizer class": ({"normalizer": Entmax}, "normalizer: got .*Entmax"),
    "normalizer function": ({"normalizer": torch.relu}, "normalizer: got .*relu"),
    "lse of a sigmoid": ({"normalizer": "sigmoid", "return_lse": True}, "return_lse: sigmoid has no log-sum-exp"),
    "lse of an entmax": ({"normalizer": Entmax(2.0), "return_lse": True}, "return_lse: entmax has no log-sum-exp"),
    "backend unknown": (
        {"backend": "fast"},
        "backend: got 'fast'; choose one of auto, sdpa, fa4, triton, hopper, flex, tiles, reference",
    ),
    "backend none": ({"backend": None}, "backend: got None; choose one of"),
}

WHERE = {
    "text": ("causal", r"where: got 'causal' \(str\); pass a pattern, a Plan, a Router or None"),
    "class": (Causal, r"where: got <class .*Causal'> \(type\); pass a pattern"),
    "mask": (torch.ones(N, M, dtype=torch.bool), r"(?s:where: got .*\(Tensor\)); pass a pattern"),
    "plan of other queries": (
        Causal().plan(N - 1, M, H),
        r"where: got a plan for .* \(5, 9, 4\) beside",
    ),
    "plan of other keys": (Causal().plan(N, M + 1, H), r"where: got a plan for .* \(6, 10, 4\)"),
    "plan of one head": (Causal().plan(N, M), r"where: got a plan for .* \(6, 9, 1\) beside tensors of \(6, 9, 4\)"),
    "plan of another batch": (per_batch(3), "where: got a plan for a batch of 3 beside q's 2"),
    "plan elsewhere": (
        Causal().plan(N, M, H).to("meta"),
        "where: got a plan on meta beside q on cpu; move it",
    ),
    "plan turned": (Causal().plan(N, N, H).transpose(), "where: got a transposed plan, which lists queries per key"),
    "heads": (PerHead([Causal()] * 3), "heads: got 4 for a PerHead of 3 patterns"),
    "grid": (Neighborhood((5,), 3), r"grid: \(5,\) has 5 tokens, but there are"),
    "documents": (Documents([0, 5]), "cu_seqlens: ends at 5, but there are"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    options, message = OPTIONS[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        attend(*inputs(), Window(3), **options)


@pytest.mark.parametrize("name", WHERE)
def test_where(name):
    where, message = WHERE[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        attend(*inputs(m=N if name == "plan turned" else M), where)


def test_fewer_keys_than_queries():
    with pytest.raises(ValueError, match="m: got 5 keys for n = 6 queries"):
        attend(*inputs(m=5), Causal())
    assert attend(*inputs(m=5), Full()).shape == (B, H, N, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.tolist(), k, v), "q: got list; pass a tensor"),
        (lambda q, k, v: (q[0], k, v), r"q: got shape \(4, 6, 8\); pass"),
        (lambda q, k, v: (q, k.int(), v), "k: got dtype torch.int32; pass a floating-point tensor"),
        (lambda q, k, v: (q, k, v.double()), "v: got dtype torch.float64 beside q of torch.float32"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), r"k: got shape \(2, 2, 0, 8\), which is empty"),
        (lambda q, k, v: (q, k[:1], v[:1]), "k: got batch 1 beside q's 2"),
        (lambda q, k, v: (q[..., :5], k, v), "k: got 8 channels beside q's 5"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"v: got \(heads, tokens\) \(2, 8\) beside k's \(2, 9\)"),
        (lambda q, k, v: (q[:, :3], k, v), "k: got 2 heads beside q's 3"),
        (lambda q, k, v: (q, k.to("meta"), v), "k: got device meta beside q on cpu"),
    ],
)
def test_tensors(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        attend(*change(*inputs()), Full())


@pytest.mark.parametrize(
    ("batch", "where", "cu_seqlens", "message"),
    [
        (2, None, ends(0, N), "cu_seqlens: got batch 2; ragged sequences are packed into batch 1"),
        (1, None, [0, N], "cu_seqlens: got list; pass an int32 tensor"),
        (1, None, ends(0, N, dtype=torch.float32), "cu_seqlens: got torch.float32; pass an int32 tensor"),
        (1, None, ends(0, 5), r"cu_seqlens: got \[0, 5\]; it must run from 0 to the number of tokens, 6"),
        (1, None, ends(1, N), r"cu_seqlens: got \[1, 6\]; it must run from 0"),
        (1, None, ends(0, 3, 3, N), r"cu_seqlens: got \[0, 3, 3, 6\]; it must increase strictly"),
        (1, Causal().plan(N, N, H), ends(0, N), "cu_seqlens: got together with a plan"),
        (1, PerHead([Causal()] * 3), ends(0, N), "heads: got 4 for a PerHead of 3 patterns"),
    ],
)
def test_packed(batch, where, cu_seqlens, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        attend(*inputs(batch=batch, m=N), where, cu_seqlens=cu_seqlens)


def test_packed_with_other_keys():
    with pytest.raises(ValueError, match="cu_seqlens: got N = 6 queries and M = 9 keys"):
        attend(*inputs(batch=1), None, cu_seqlens=ends(0, M))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Neighborhood((N,), 3), r"grid: \(6,\) has 6 tokens"),
        (Documents([0, 2, N]), "cu_seqlens: ends at 6"),
        (Packed(Causal(), Documents([0, 2, N])), "cu_seqlens: ends at 6"),
    ],
)
def test_a_pattern_of_the_whole_length_fits_no_packed_sequence(where, message):
    """Packing equals a loop over the sequences, and there the same pattern does not fit the shorter ones."""
    with pytest.raises(ValueError, match=message):
        attend(*inputs(batch=1, n=3, m=3), where)
    with pytest.raises(ValueError, match=message):
        attend(*inputs(batch=1, m=N), where, cu_seqlens=ends(0, 3, N))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelativeTable(0, (3,)), "num_heads: got 0; pass an integer >= 1"),
        (lambda: RelativeTable(2, (0,)), "extents: got 0; pass an integer >= 1"),
        (lambda: RelativeTable(2, (3, 3)), r"extents: got \(3, 3\) for the grid None; pass one number an axis"),
        (lambda: RelativeTable(2, (3,), (4, 4)), r"extents: got \(3,\) for the grid \(4, 4\); pass one number an axis"),
        (lambda: RelativeTable(2, (3, 3), (4, 0)), "grid: got 0; pass an integer >= 1"),
        (lambda: Alibi(1.5), r"num_heads: got 1.5 \(float\); pass an integer >= 1"),
        (lambda: FromCoordinates(torch.nn.Identity(), torch.zeros(3)), "coordinates: got torch.float32 of shape"),
        (
            lambda: FromCoordinates(torch.nn.Identity(), torch.zeros(3, 1, dtype=torch.int64)),
            "coordinates: got torch.int64",
        ),
        (lambda: merge([]), r"partials: got none; pass at least one pair"),
        (lambda: merge([(torch.zeros(2, 3), torch.zeros(3))]), r"partials: got o \(2, 3\) with lse \(3,\)"),
        (
            lambda: merge([(torch.zeros(n, 3), torch.zeros(n)) for n in (2, 4)]),
            r"partials: got o \(4, 3\) with lse \(4,\)",
        ),
    ],
)
def test_biases_and_merge(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


REASONS = [
    ("sdpa", Window(2), {}, r"where is Window\(size=2\); it knows Full\(\), and Causal\(\)"),
    ("sdpa", Causal(), {}, "Causal\\(\\) with as many queries as keys or one query"),
    ("sdpa", Full(), {"bias": Alibi(H)}, "a bias would be an N x M tensor"),
    ("sdpa", Full(), {"sink": torch.zeros(H)}, "it knows no sinks"),
    ("sdpa", Full(), {"softcap": 1.0}, "it knows no softcap"),
    ("sdpa", Full(), {"normalizer": "entmax"}, "it normalises by softmax, not entmax"),
    ("sdpa", Full(), {"return_lse": True}, "it returns no lse"),
    ("fa4", Full(), {}, r"it needs the package flash-attn-4: pip install 'saccade\[fa4\]'"),
    ("fa4", Full(), {}, "it runs on CUDA, not on cpu"),
    ("fa4", Full(), {}, "it computes in float16 and bfloat16, not torch.float32"),
    ("fa4", Full(), {"normalizer": "sigmoid"}, "it normalises by softmax, not sigmoid"),
    ("fa4", Full(), {"bias": Alibi(H)}, "its score function is compiled"),
    (
        "fa4",
        per_batch(B).with_tokens(torch.zeros(B * H, 1, 1, dtype=torch.int64)),
        {},
        "it has no lists of single keys",
    ),
    ("fa4", Plan.from_mask(Causal().dense(N, M, H)), {}, "it has no bit masks"),
    ("fa4", Causal().plan(N, M, H, block=(128, 64)), {}, r"the plan's tiles \(128, 64\) are not a multiple of 128"),
    ("flex", Full(), {}, "it is compiled for CUDA; on cpu"),
    ("flex", Full(), {}, "head dims below 16 have no kernel, got 8 and 8"),
    ("flex", Full(), {"normalizer": "sigmoid"}, "it normalises by softmax, not sigmoid"),
    ("flex", Full(), {"bias": Alibi(H)}, "its score function is compiled"),
    (
        "flex",
        per_batch(B).with_tokens(torch.zeros(B * H, 1, 1, dtype=torch.int64)),
        {},
        "it has no lists of single keys",
    ),
    ("flex", Plan.from_mask(Causal().dense(N, M, H)), {}, "it has no bit masks"),
    ("flex", Causal().plan(N, M, H, block=(64, 128)), {}, r"the plan's tiles \(64, 128\) are no multiples of 128"),
]


@pytest.mark.parametrize(
    ("head_dims", "refused"), [((12, 12), True), ((136, 136), True), ((64, 32), True), ((64, 64), False)]
)
def test_head_dims_that_fa4_has(head_dims, refused):
    d, dv = head_dims
    q, k, v = (torch.randn(B, H, N, size) for size in (d, d, dv))
    said = f"its head dims are equal multiples of 8 up to 128, got {d} and {dv}"
    assert (said in explain(q, k, v)["fa4"]) == refused


def test_fa4_says_when_order_is_asked_for():
    q, k, v = (x.requires_grad_() for x in inputs())
    said = "its backward over lists of tiles adds in no fixed order, and deterministic algorithms are on"
    torch.use_deterministic_algorithms(True)
    try:
        found = {where: said in explain(q, k, v, where)["fa4"] for where in (Causal() | Sinks(2), Causal())}
        with torch.no_grad():
            forward = said in explain(q, k, v, Causal() | Sinks(2))["fa4"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(found.values()) == [True, False]
    assert not forward
    assert said not in explain(q, k, v, Causal() | Sinks(2))["fa4"]


@pytest.fixture
def no_other_runs(monkeypatch):
    """Every backend's run fails the test."""

    def never(problem):
        raise AssertionError("another backend ran instead")

    for name in ORDER:
        monkeypatch.setattr(importlib.import_module(f"saccade.softmax.{name}"), "run", never)


@pytest.mark.usefixtures("no_other_runs")
@pytest.mark.parametrize(("backend", "where", "options", "reason"), REASONS)
def test_a_named_backend_never_falls_back(backend, where, options, reason):
    with pytest.raises(ValueError, match=f"^backend: {backend} cannot run this: .*{reason}.* Pass backend='auto'"):
        attend(*inputs(), where, **options, backend=backend)


def test_falling_back_is_caught(monkeypatch):
    """The broken twin: a choice that takes `auto` where the named backend cannot run."""
    module = importlib.import_module("saccade.softmax.attend")
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda name, problem: choose("auto", problem))
    with pytest.raises(pytest.fail.Exception):
        test_a_named_backend_never_falls_back(*REASONS[0])


@pytest.mark.parametrize(("backend", "where", "options", "reason"), REASONS)
def test_explain_gives_the_reason(backend, where, options, reason):
    found = explain(*inputs(), where, **options)
    assert tuple(found) == ORDER
    assert found["tiles"] == found["reference"] == []
    with pytest.raises(ValueError, match=f"{reason}"):
        raise ValueError("; ".join(found[backend]))


@pytest.mark.parametrize(
    ("where", "options", "n", "expected"),
    [
        (None, {}, N, "sdpa"),
        (Full(), {}, N, "sdpa"),
        (Causal(), {}, M, "sdpa"),
        (Causal(), {}, 1, "sdpa"),
        (Causal(), {}, N, "tiles"),
        (Window(3), {}, M, "tiles"),
        (Full(), {"return_lse": True}, N, "tiles"),
        (Full(), {"softcap": 1.0}, N, "tiles"),
        (Router(pooled_scores, TopK(1), block=(4, 4)), {}, N, "tiles"),
    ],
)
def test_which_names_what_auto_runs(where, options, n, expected, monkeypatch):
    ran = []
    for name in ORDER:
        module = importlib.import_module(f"saccade.softmax.{name}")
        monkeypatch.setattr(module, "run", lambda problem, run=module.run, name=name: ran.append(name) or run(problem))
    given = inputs(n=n)
    assert which(*given, where, **options) == expected
    attend(*given, where, **options)
    assert ran == [expected]


def test_causal_with_nan_is_not_for_sdpa_on_a_cpu():
    q, k, v = inputs(n=M)
    v[0, 0, 3, 0] = torch.nan
    assert which(q, k, v, Causal()) == "tiles"
    assert "NaN or infinity" in explain(q, k, v, Causal())["sdpa"][0]


@pytest.mark.parametrize("backend", ["tiles", "reference", "sdpa"])
def test_one_query_sees_every_key_under_causal(backend):
    q, k, v = inputs(n=1, dtype=torch.float64)
    found, full = attend(q, k, v, Causal(), backend=backend), attend(q, k, v, backend="reference")
    assert (found - full).abs().max() < 8 * torch.finfo(torch.float64).eps * v.abs().max()


def test_a_router_is_the_plan_it_makes():
    router = Router(pooled_scores, TopK(2), block=(2, 3), pattern=Causal(), must=Sinks(1))
    q, k, v = inputs()
    assert attend(q, k, v, router).equal(attend(q, k, v, router.route(q, k)))


def test_a_bias_that_learns_is_a_module():
    """What a plain function closes over would lose its gradient in silence."""
    slope = torch.ones(H, 1, 1, requires_grad=True)
    with pytest.raises(TypeError, match="bias: got a plain function whose values ask for gradients; pass a Module"):
        attend(*inputs(), Window(3), bias=lambda i, j: -slope * (i[:, None] - j).abs())


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_a_sink_may_be_switched_off(backend):
    """A sink of -inf is none, for rows that see nothing as well."""
    mask = torch.rand(H, N, M) < 0.5
    mask[:, 2] = False
    plan, (q, k, v) = Plan.from_mask(mask), inputs(dtype=torch.float64)
    off = torch.full((H,), -torch.inf, dtype=torch.float64)
    o, lse = attend(q, k, v, plan, sink=off, return_lse=True, backend=backend)
    without, without_lse = attend(q, k, v, plan, return_lse=True, backend=backend)
    assert o.equal(without)
    assert lse.equal(without_lse)
    assert not o[:, :, 2].any()
