"""The engine: every token what the model gives alone, no page lost, none too many; and engines with one fault each."""

import random
import re

import pytest
import torch
from serve_models import CHUNK, PAGE, POLICIES, alone, made, paged, prompts
from transformers import DynamicCache

from saccade.cache import PagePool, Policy, Quantized, Session, Store, expected_attention, snapkv, streaming_llm
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.caching import cache_name
from saccade.hf.tuned import serves
from saccade.serve import Engine
from saccade.serve.engine import drawn
from saccade.testing.healthy import Thrifty

ROWS = 2 * 2  # layers and key heads, each with pages of its own


@pytest.fixture
def model():
    return made()


def engine_of(kind, model, **options):
    return kind(model, options.pop("policies", POLICIES), **({"chunk": CHUNK, "pages": 4000, "prefixes": 0} | options))


def settled(engine):
    """Nothing is held any more, not even by a count of owners."""
    engine.close()
    assert engine.in_use == 0, f"{engine.in_use} pages are still held"
    assert engine.metrics()["pages_taken"] == engine.metrics()["pages_returned"], "pages taken are not those returned"
    for pool in engine.pools.values():
        assert not pool.owners.any(), "pages that are free have owners"
        assert pool.stores == 1, "stores are still counted"
        assert sorted(pool.frames.free.tolist()) == list(range(pool.num_pages)), "a page is free twice, or never"


def arriving(engine, asked, seed=0):
    """Requests that come while others are under way: (prompt, tokens, policy) each."""
    rng, requests = random.Random(seed), []
    for prompt, tokens, policy in asked:
        requests.append(engine.submit(prompt, max_tokens=tokens, policy=policy))
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            engine.step()
    engine.run()
    return requests


# -- every stream is what `generate` gives alone -------------------------------------------------------------------


def gives_what_generate_gives(kind, model, policies=POLICIES, **options):
    names = list(policies)
    asked = [(p, 3 + at % 9, names[at % len(names)]) for at, p in enumerate(prompts(21))]
    truth = [alone(model, *each, policies=policies) for each in asked]
    engine = engine_of(kind, model, policies=policies, **options)
    requests = arriving(engine, asked)
    for request, expected in zip(requests, truth, strict=True):
        assert request.finish == "length", request.error
        assert request.tokens == expected, f"{request.policy}: other tokens than alone"
    found = engine.metrics()
    settled(engine)
    return found


@pytest.mark.parametrize("most", [1, 4, 21])
def test_every_stream_is_what_generate_gives_alone(model, most):
    gives_what_generate_gives(Engine, model, most=most)


class OnePosition(Engine):
    """All rows of a batch at the position of the first."""

    def _forward(self, batches, count):
        inner = self.reader
        self.reader = lambda parts: inner([(s, ids, [begin[0]] * len(begin)) for s, ids, begin in parts])
        try:
            return super()._forward(batches, count)
        finally:
            self.reader = inner


class LastPolicy(Engine):
    """Requests of all policies decode under one of them."""

    def _merge(self, batch):
        batch.session.policy = self.policies["streaming"]


@pytest.mark.parametrize("kind", [OnePosition, LastPolicy])
def test_other_tokens_are_noticed(model, kind):
    with pytest.raises(AssertionError, match="other tokens than alone"):
        gives_what_generate_gives(kind, model, {name: POLICIES[name] for name in ("dense", "streaming")})


def test_rows_are_cut_at_their_own_time_only(model, monkeypatch):
    def together(x, *args, **kwargs):
        found = amax(x, *args, **kwargs)
        return found.max().expand_as(found) if kwargs.get("keepdim") and args == (1,) else found

    amax = torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", together)
    with pytest.raises(AssertionError, match="often: other tokens than alone"):
        gives_what_generate_gives(Engine, model, {"often": POLICIES["often"]})


# -- policies that need to know how the model turns queries and keys -------------------------------------------------


def turning():
    """Scores made of queries ahead; gates over what was before it was turned; types of a prompt's own tokens."""
    dims, own = Dims(4, 8, 2), {}
    for name, params in (("seer_attention_r", {"budget": 4, "block": PAGE, "gate_dim": 6}), ("nats", {"window": 5})):
        torch.manual_seed(1)
        mechanism = serves(name)(dims, **params)
        for parameter in mechanism.parameters():
            parameter.data.normal_(std=0.5)
        own[name] = mechanism.eval().policy
        own[name].page = PAGE
    return {
        "expected": paged(expected_attention(9, sinks=1)),
        "wrapped": paged(Quantized(own["seer_attention_r"])),
    } | own


def holds_what_it_holds_alone(model, policies):
    """What each request holds of its prompt is what it holds under `saccade.hf.apply`, of the same chunks."""
    read, held = prompts(1)[0] * 2, {}
    engine = engine_of(Engine, model, policies=policies)
    for name in policies:
        request = engine.submit(read, max_tokens=3, policy=name)
        while request.read < len(read) - CHUNK:
            engine.step()
        held[name] = [engine.filling.session.held(index) for index in range(2)]
        engine.run()
    settled(engine)
    for name, policy in policies.items():
        with apply(model, policy), torch.no_grad():
            cache = DynamicCache()
            for at in range(0, len(read) - CHUNK, CHUNK):
                model(torch.tensor([read[at : at + CHUNK]]), **{cache_name(model): cache})
            for index, mine in enumerate(held[name]):
                its = cache.layers[0].session.held(index)
                assert torch.equal(mine, its), f"{name}: holds other tokens than alone"
    assert not held["expected"][0].all()
    assert not held["nats"][0].all()


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_policies_that_ask_how_a_model_turns_decide_as_alone(kind):
    policies, model = turning(), made(kind)
    gives_what_generate_gives(Engine, model, policies)
    holds_what_it_holds_alone(model, policies)
    assert all(getattr(policy, "rotation", None) is None for policy in policies.values()), "something is left of it"


class Untold(Engine):
    """Its sessions know of no rotation."""

    def _remembered(self, request):
        session, count = super()._remembered(request)
        session.rotations = {}
        return session, count


class Deaf(Engine):
    """Its policies are told of none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for policy in self.policies.values():
            vars(policy).pop("rotation", None)
            vars(getattr(policy, "policy", policy)).pop("rotation", None)

    def close(self, *args):
        self.reader.handle._changed = [x for x in self.reader.handle._changed if x.name != "rotation"]
        super().close(*args)


@pytest.mark.parametrize(
    ("kind", "name"), [(Untold, "expected"), (Deaf, "seer_attention_r"), (Deaf, "nats"), (Deaf, "wrapped")]
)
def test_a_rotation_that_is_not_told_is_noticed(kind, name):
    with pytest.raises(AssertionError, match=f"{name}: other tokens than alone"):
        gives_what_generate_gives(kind, made(), {name: turning()[name]})


# -- one call a layer ----------------------------------------------------------------------------------------------


def calls_once_a_layer(kind, model, monkeypatch):
    from saccade.cache import store

    calls, inner = [], store.read_pages
    monkeypatch.setattr(
        store, "read_pages", lambda q, *args, **kwargs: calls.append(len(q)) or inner(q, *args, **kwargs)
    )
    engine = engine_of(kind, model)
    for at, prompt in enumerate(prompts(12)):
        engine.submit(prompt, max_tokens=200, policy=["dense", "observed", "quest"][at % 3])
    while engine.waiting or engine.filling or engine._new:
        engine.step()
    calls.clear()
    engine.step()
    engine.close()
    assert calls == [4 * 2] * 3 * 2, f"calls of {calls} rows; one a layer and policy has 4 requests of 2 key heads"


class Apart(Engine):
    def _merge(self, batch):
        pass


def test_a_step_is_one_call_a_layer_and_policy(model, monkeypatch):
    calls_once_a_layer(Engine, model, monkeypatch)
    with pytest.raises(AssertionError, match="one a layer and policy"):
        calls_once_a_layer(Apart, model, monkeypatch)


def test_a_periodic_policy_is_decoded_apart(model):
    class Counts(Policy):
        page, periodic = PAGE, True

        def after(self, step):
            assert step.steps == int(step.seen[0]) - len(read) - 1

    read = prompts(1)[0][:CHUNK]
    engine = engine_of(Engine, model, policies={"counts": Counts()})
    first = engine.submit(read, max_tokens=9)
    engine.step()
    second = engine.submit(read[::-1], max_tokens=5)
    engine.run()
    assert [len(r.tokens) for r in (first, second)] == [9, 5]
    Counts.periodic = False
    engine.submit(read, max_tokens=9)
    engine.step()
    engine.submit(read[::-1], max_tokens=5)
    with pytest.raises(ValueError, match="steps: the sequences of this batch are not equally many steps behind"):
        engine.run()
    settled(engine)


class Notes(Policy):
    """Keeps of each sequence what nothing says how to pad, and checks that it is there."""

    page = PAGE

    def settle(self, session):
        for store in session.stores:
            store.notes["mine"] = store.seen[:, None].expand(1, int(store.seen[0])).clone()

    def after(self, step):
        assert (step.notes("mine") == step.notes("mine").shape[1]).all()


class Pictures(Policy):
    page = PAGE

    def settle(self, session):
        session.shared["mine"] = session.store(0).seen.clone()

    def after(self, step):
        assert len(step.shared["mine"]) == 1


@pytest.mark.parametrize("kind", [Notes, Pictures])
def test_what_cannot_be_put_side_by_side_is_decoded_apart(model, kind):
    read = prompts(6)
    truth = [alone(model, p, 8) for p in read]
    engine = engine_of(Engine, model, policies={"own": kind()})
    requests = arriving(engine, [(p, 8, "own") for p in read])
    assert [r.tokens for r in requests] == truth
    settled(engine)


def test_a_policy_of_ones_own_is_served(model):
    thrifty = paged(Thrifty(Dims(4, 8, 2)).policy)
    read = prompts(3)[1]
    engine = engine_of(Engine, model, policies={"thrifty": thrifty})
    requests = arriving(engine, [(read, 6, "thrifty"), (read[3:], 4, "thrifty")])
    assert [len(r.tokens) for r in requests] == [6, 4]
    settled(engine)


# -- a pool that runs dry ------------------------------------------------------------------------------------------


def tight(model, kind=Engine, **options):
    return engine_of(kind, model, **({"pages": 22 * ROWS, "policies": POLICIES} | options))


def survives_a_dry_pool(kind, model, prefixes=0, names=("dense", "often", "quest")):
    asked = [(p, 30, names[at % len(names)]) for at, p in enumerate(prompts(7, 20))]
    truth = [alone(model, *each) for each in asked]
    engine = tight(model, kind, prefixes=prefixes, pages=19 * ROWS)
    heard = []
    requests = [
        engine.submit(p, max_tokens=n, policy=name, told=lambda r, own=own: own.append(r.tokens[-1]))
        for (p, n, name), own in zip(asked, [heard.append([]) or heard[-1] for _ in asked], strict=True)
    ]
    engine.run()
    found = engine.metrics()
    assert found["pages_peak"] <= engine.pages, f"held {found['pages_peak']} of {engine.pages} pages"
    assert found["preempted"] >= 3, "the pool never ran dry"
    for request, expected, own in zip(requests, truth, heard, strict=True):
        assert request.finish == "length", request.error
        assert request.tokens == expected == own, f"{request.policy}: lost or other tokens"
    settled(engine)


@pytest.mark.parametrize("prefixes", [0, 8])
def test_a_dry_pool_loses_no_token(model, prefixes):
    survives_a_dry_pool(Engine, model, prefixes)


class Boundless(Engine):
    def _room(self, need, request):
        return True


class Forgetful(Engine):
    """Who gives pages back does not read its own tokens again."""

    def _preempt(self, request):
        super()._preempt(request)
        request.tokens.clear()


class Skips(Engine):
    """Goes on behind what is not in the cache any more."""

    def _preempt(self, request):
        read = request.read
        super()._preempt(request)
        request.prompt, request.tokens[:] = request.prompt + tuple(request.tokens[:-1]), request.tokens[-1:]
        assert read


@pytest.mark.parametrize(
    ("kind", "message"), [(Boundless, "held .* pages"), (Forgetful, "lost or other"), (Skips, "lost or other")]
)
def test_a_pool_that_overflows_or_loses_is_noticed(model, kind, message):
    with pytest.raises(AssertionError, match=message):
        survives_a_dry_pool(kind, model)


def test_what_can_never_fit_is_refused_at_once(model):
    engine = tight(model)
    with pytest.raises(ValueError, match=rf"prompt: got 100 tokens, which need {25 * ROWS} pages; the pool has 88"):
        engine.submit([1] * 100, max_tokens=1)
    with pytest.raises(ValueError, match=rf"max_tokens: got 80 tokens, which need {25 * ROWS} pages; the pool has 88"):
        engine.submit([1] * 20, max_tokens=80)
    fits = engine.submit([1] * 20, max_tokens=69), engine.submit([1] * 100, max_tokens=2, policy="streaming")
    engine.run()
    assert [request.finish for request in fits] == ["length", "length"]
    settled(engine)


def test_a_budget_that_does_not_hold_its_sinks_is_refused_at_once(model):
    """However much is to come: no request that is under way is ended by another one's prompt."""
    engine = engine_of(Engine, model, policies={"sinks": paged(streaming_llm(0.25)), "dense": POLICIES["dense"]})
    fine = engine.submit([3] * 20, max_tokens=9, policy="dense")
    engine.step()
    for read in (5, 13):  # in one chunk, and behind one that is long enough
        with pytest.raises(
            ValueError, match=rf"budget: got 0.25 of {min(read, 8)} tokens, . in layer 0, which does not"
        ):
            engine.submit([3] * read, max_tokens=100, policy="sinks")
    engine.run()
    assert fine.finish == "length"
    settled(engine)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([Policy()], r"policies: got \[Policy\(\)\]; pass a dict of policies by name, or None"),
        ({}, "policies: got {}; pass a dict"),
        ({"a": "snapkv"}, "policies: got str for 'a'; pass a Policy of saccade.cache"),
        ({"a": Policy}, "policies: got type for 'a'; pass a Policy"),
    ],
    ids=str,
)
def test_policies_that_are_none_are_refused_before_the_model_changes(model, policies, message):
    with pytest.raises(TypeError, match=message):
        Engine(model, policies)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_is_served_batches_nothing_else(model):
    engine = engine_of(Engine, model)
    with pytest.raises(
        ValueError, match="model: continuous batching keeps its cache in pages that a mechanism does not"
    ):
        model.generate_batch([[1, 2, 3]])
    settled(engine)


def test_what_turns_out_not_to_fit_ends_with_an_error(model):
    grows = paged(snapkv(8, window=3))
    engine = tight(model, pages=6 * ROWS, policies={"dense": POLICIES["dense"], "grows": grows})
    long = engine.submit([3] * 24, max_tokens=60, policy="grows")  # keeps what it decodes
    after = engine.submit([5] * 9, max_tokens=3)
    engine.run()
    assert long.finish == "error"
    assert re.match(
        r"pages: \d+ tokens were read, and those that follow need 28 pages in all; the pool has 24", long.error
    )
    assert after.finish == "length"
    settled(engine)


# -- who leaves gives its pages back -------------------------------------------------------------------------------


def frees_what_leaves(kind, model, **options):
    rng = random.Random(1)
    engine = tight(model, kind, most=6, prefixes=4, **options)
    read = prompts(28)
    names = list(POLICIES)
    live = []
    for at, prompt in enumerate(read):
        live.append(engine.submit(prompt, max_tokens=25, policy=names[at % len(names)]))
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.6:
            gone = rng.choice(live)
            before = engine.in_use
            held = gone in engine._holders()
            engine.cancel(gone)
            assert gone.finish
            assert not held or engine.in_use < before or engine._read, "a cancelled request holds its pages"
    stream = engine.stream(engine.submit(read[0], max_tokens=25))
    assert len([next(stream, None), next(stream, None)]) == 2
    stream.close()
    engine.run()
    assert {request.finish for request in live} == {"length", "cancelled"}, "no pages were left for some"
    held = sum(len(ids) for ids in _pages_of_prefixes(engine))
    assert engine.in_use == held, f"{engine.in_use} pages are held, {held} of them by prefixes"
    assert not engine._holders()
    settled(engine)


def _pages_of_prefixes(engine):
    """Distinct pages a pool that remembered prefixes name."""
    found = {id(pool): set() for pool in engine.pools.values()}
    for session in engine._read.values():
        for store in session.stores:
            found[id(store.pool)].update(store._used().tolist())
    return found.values()


def test_who_leaves_gives_all_pages_back(model):
    frees_what_leaves(Engine, model)


class Keeps(Engine):
    """A prompt that is given up while it is read keeps its pages."""

    def _drop(self, gone):
        if self.filling and set(self.filling.requests) & gone:
            self.filling = None
        super()._drop(gone)


class KeepsPrefixes(Engine):
    def _forget(self):
        self._read.popitem(last=False)


class GivesTwice(Engine):
    def _drop(self, gone):
        for batch in self.running:
            if set(batch.requests) <= gone:
                batch.session.store(0).pool.release(batch.session.store(0)._used()[:1])
        super()._drop(gone)


@pytest.mark.parametrize("kind", [Keeps, KeepsPrefixes, GivesTwice])
def test_a_leak_is_noticed(model, kind):
    with pytest.raises((AssertionError, RuntimeError), match=r"pages|free twice|expanded size"):
        frees_what_leaves(kind, model)


def test_an_engine_that_is_closed_leaves_the_model_as_it_was(model):
    read = prompts(2)[1]
    before = alone(model, read, 4)
    engine = engine_of(Engine, model)
    requests = [engine.submit(read, max_tokens=9), engine.submit(read, max_tokens=9)]
    engine.step()
    with pytest.raises(RuntimeError, match="model: an engine serves it"):
        model(torch.tensor([read]))
    settled(engine)
    assert [(r.finish, r.error) for r in requests] == [("error", "the engine was closed")] * 2
    assert alone(model, read, 4) == before


# -- prefixes ------------------------------------------------------------------------------------------------------


def shares_prefixes(kind, model):
    begin, other = prompts(1, 40, 40)[0] * 2, prompts(1, 40, 40)[0]
    asked = [((begin[:32] + p)[:40], 8, name) for p in prompts(3, 8) for name in POLICIES] + [(other, 8, "dense")]
    truth = [alone(model, *each) for each in asked]
    engine = engine_of(kind, model, prefixes=200)
    requests = arriving(engine, asked)
    for request, expected in zip(requests, truth, strict=True):
        assert request.tokens == expected, f"{request.policy}: other tokens behind a shared prefix"
    reused = [request.reused for request in requests]
    assert sum(reused[:7]) == 0 == reused[-1]
    assert min(reused[7:-1]) >= 32
    settled(engine)


def test_equal_prefixes_share_their_pages(model):
    shares_prefixes(Engine, model)
    engine = engine_of(Engine, model, prefixes=200)
    read, behind = prompts(1, 40, 40)[0] * 3, prompts(8, 4, 4)
    requests = [engine.submit(read[: 8 * CHUNK] + p[:4], max_tokens=3) for p in behind]
    engine.run()
    assert engine.peak <= ROWS * (8 * CHUNK // PAGE + 3 * len(requests))  # one prefix, and what each has for itself
    settled(engine)


class OneKey(Engine):
    """What was read under one policy is taken for another's."""

    def _key(self, request, count):
        return "", super()._key(request, count)[1]


def test_a_prefix_of_another_policy_is_noticed(model):
    with pytest.raises(AssertionError, match="other tokens behind a shared prefix"):
        shares_prefixes(OneKey, model)


def test_a_page_that_is_written_though_shared_is_noticed(model, monkeypatch):
    monkeypatch.setattr(PagePool, "own", lambda self, ids: ids)
    with pytest.raises(AssertionError, match="other tokens behind a shared prefix"):
        shares_prefixes(Engine, model)


# -- 200 streams ---------------------------------------------------------------------------------------------------


def loses_no_token(kind, model, count=200):
    read = prompts(count, 3, 30)
    truth = [alone(model, p, 5) for p in read]
    engine = engine_of(kind, model, pages=60 * ROWS, most=64, prefixes=8)
    heard = {}
    requests = [
        engine.submit(p, max_tokens=5, told=lambda r: heard.setdefault(r, []).append(len(r.tokens))) for p in read
    ]
    progress = []
    engine.run(lambda *told: progress.append(told))
    assert [r.tokens for r in requests] == truth, "lost or other tokens"
    assert all(heard.get(r) == list(range(1, 6)) for r in requests), "a token was not told, or told twice"
    assert progress[-1][:2] == (count, count)
    assert engine.metrics()["generated"] == 5 * count
    settled(engine)


def test_two_hundred_streams_lose_no_token(model):
    loses_no_token(Engine, model)


class Swapped(Engine):
    """A batch that grows forgets which row is whose."""

    def _merge(self, batch):
        super()._merge(batch)
        for each in self.running:
            each.requests.reverse()


class Hushed(Engine):
    """The last token of a batch is not told."""

    def _draw(self, requests, logits):
        told, requests[-1].told = requests[-1].told, None
        super()._draw(requests, logits)
        requests[-1].told = told


@pytest.mark.parametrize(("kind", "message"), [(Swapped, "lost or other"), (Hushed, "not told")])
def test_a_lost_token_is_noticed(model, kind, message):
    with pytest.raises(AssertionError, match=message):
        loses_no_token(kind, model, 40)


# -- sampling and ends ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(model):
    read = prompts(6)
    engine = engine_of(Engine, model)
    (single,) = [engine.submit(read[3], max_tokens=30, temperature=1.3, seed=5)]
    engine.run()
    many = [engine.submit(p, max_tokens=30, temperature=1.3, seed=5) for p in read]
    other = engine.submit(read[3], max_tokens=30, temperature=1.3, seed=6)
    engine.run()
    assert many[3].tokens == single.tokens != other.tokens
    settled(engine)


def test_tokens_are_drawn_as_often_as_they_are_likely(model):
    engine = engine_of(Engine, model)
    request = engine.submit([1], temperature=2.0, seed=0)
    logits = torch.tensor([0.0, 3.0, -torch.inf, 1.0])
    found = torch.bincount(torch.tensor([drawn(logits, request) for _ in range(4000)]), minlength=4) / 4000
    expected = (logits / 2).softmax(0)
    assert found[2] == 0
    assert float((found - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5  # four standard errors, at the most
    engine.close()


def test_a_stop_token_ends_a_stream(model):
    read = prompts(2)[1]
    whole = alone(model, read, 20)
    end = whole[7]
    engine = engine_of(Engine, model)
    request = engine.submit(read, max_tokens=20, stop=[end])
    assert list(engine.stream(request)) == request.tokens == whole[: whole.index(end) + 1]
    assert request.finish == "stop"
    settled(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt: got no tokens"),
        ({"prompt": [3, 61]}, r"prompt: got 61; a token of this model is an integer in 0 \.\. 60"),
        ({"prompt": [3, 1.5]}, "prompt: got 1.5"),
        ({"stop": [-1]}, "stop: got -1"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 250}, "max_tokens: got 250 behind a prompt of 9 tokens; this model reads 256 in all"),
        ({"temperature": -1}, "temperature: got -1; pass a number >= 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"seed": -1}, "seed: got -1"),
        ({"policy": "none"}, "policy: got 'none'; choose one of dense, "),
        ({"prompt": [3] * 3, "policy": "observed"}, "budget: got 0.5 of 3 tokens, 2 in layer 0, which does not hold"),
    ],
)
def test_a_request_is_refused_by_name(model, options, message):
    engine = engine_of(Engine, model)
    with pytest.raises(ValueError, match=message):
        engine.submit(options.pop("prompt", [1] * 9), **options)
    assert not engine.step()
    engine.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk": 10}, ValueError, "chunk: got 10; pass whole pages, a multiple of 4"),
        ({"pages": 0}, ValueError, "pages: got 0"),
        ({"policies": {"a": "snapkv"}}, TypeError, "policies: got str for 'a'; pass a Policy"),
        ({"policies": {"a": Policy(), "b": POLICIES["quest"]}}, ValueError, "a pool has pages of one size"),
    ],
)
def test_an_engine_is_refused_by_name(model, options, error, message):
    with pytest.raises(error, match=message):
        engine_of(Engine, model, **options)


def test_sessions_that_share_no_pool_do_not_join():
    k = torch.randn(1, 2, 5, 4)
    a, b = Session(POLICIES["dense"]), Session(POLICIES["dense"])
    for session in (a, b):
        session.attend(0, k, k, k)
    with pytest.raises(ValueError, match="other: got a session of another policy or with other pools"):
        a.join(b)
    with pytest.raises(ValueError, match="other: its pages lie in another pool"):
        a.store(0).join(b.store(0))
    with pytest.raises(ValueError, match="other: its pages lie in another pool"):
        Store(1, 2, a.store(0).pool).join(Store(1, 1, a.store(0).pool))
    assert made()
