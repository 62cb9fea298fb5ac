"""Every policy keeps what its rule says, by loops, and attends to that; what is asked of budgets."""

import itertools
import math

import pytest
import rules
import torch

from saccade import cache
from saccade.cache import (
    AcrossLayers,
    Evict,
    Expected,
    KeyNorm,
    Policy,
    Pyramid,
    Quest,
    Reader,
    Rotation,
    Session,
    Tokens,
    Uniform,
)
from saccade.contract import replay
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention

N, PROMPT = 41, 29


def drawn(batch=2, heads=4, kv_heads=2, n=N, dtype=torch.float64):
    shapes = [(batch, h, n, 8) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def run(policy, q, k, v, pieces=(PROMPT,), num_layers=1, rotations=None):
    """(o, session): pieces, then the rest one token at a time; all layers read the same."""
    session, ends = Session(policy, num_layers, rotations=rotations), [0]
    for piece in (*pieces, *[1] * (q.shape[2] - sum(pieces))):
        ends.append(ends[-1] + piece)
    rows = []
    for start, stop in itertools.pairwise(ends):
        parts = [session.attend(index, *(x[:, :, start:stop] for x in (q, k, v))) for index in range(num_layers)]
        rows.append(parts[0])
    return torch.cat(rows, 2), session


CASES = {
    "streaming_llm": (cache.streaming_llm, rules.Recent, {"sinks": 3}, {"every": 1, "sinks": 3}),
    "h2o": (cache.h2o, rules.Heavy, {"recent": 4}, {"every": 1, "recent": 4}),
    "snapkv": (cache.snapkv, rules.Window, {"window": 6}, {"recent": 6}),
    "tova": (cache.tova, rules.Newest, {}, {"every": 1}),
    "adakv": (cache.adakv, rules.Adaptive, {"window": 6}, {"recent": 6}),
    "knorm": (cache.knorm, rules.Norm, {}, {}),
    "expected_attention": (cache.expected_attention, rules.Gaussian, {"sinks": 2}, {"sinks": 2}),
    "keydiff": (cache.keydiff, rules.Unlike, {}, {}),
    "keydiff_recent": (cache.keydiff, rules.Unlike, {"recent": 5}, {"recent": 5}),
    "knorm_recent": (cache.knorm, rules.Norm, {"recent": 5}, {"recent": 5}),
}


def kept_and_attended(policy, rule, q, k, v, rotations=None):
    """The policy's sets and outputs are the rule's."""
    held = {}

    def keep(b, t, before):
        held[b] = rule.keep(b, t, before)
        return held[b]

    truth = replay(q, k, v, PROMPT, keep)
    found, session = run(policy, q, k, v, rotations=rotations)
    marks = session.held()
    for b in range(len(q)):
        for g in range(k.shape[1]):
            assert marks[b, g].nonzero()[:, 0].tolist() == held[b][g], f"sequence {b}, key head {g}"
    assert_close(found, truth, truth, name="output", terms=N)
    return session


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [0.4, 13])
def test_a_policy_keeps_what_its_rule_says(name, budget):
    make, rule, own, of_rule = CASES[name]
    q, k, v = drawn()
    session = kept_and_attended(make(budget, **own), rule(q, k, v, PROMPT, budget, **of_rule), q, k, v)
    assert not session.held().all()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["h2o", "knorm", "adakv"])
def test_eviction_every_few_steps(name, every):
    make, rule, own, of_rule = CASES[name]
    q, k, v = drawn()
    policy = make(0.4, **own)
    policy.every = every
    kept_and_attended(policy, rule(q, k, v, PROMPT, 0.4, **{**of_rule, "every": every}), q, k, v)


class Turning(rules.Gaussian):
    """Three of four pairs of channels turn, the last stays; scaled, as in YaRN."""

    rates, scale, ahead = (1.0, 0.3, 0.01), 1.2, 7


class AsTheyCame(Turning):
    """A twin: the queries as they came."""

    def before(self, b, h, i):
        return self.q[b, h, i]

    def mean_turn(self, t):
        return torch.eye(self.q.shape[3], dtype=torch.float64)


class NextAlone(Turning):
    """A twin: turned as the next token alone."""

    ahead = 1


class NoSpread(Turning):
    """A twin: every query is the first one."""

    def before(self, b, h, i):
        return super().before(b, h, self.sinks)


class SinksToo(Turning):
    """A twin: the first tokens count."""

    def scores(self, b, t, held):
        self.sinks, sinks = 0, self.sinks
        found = super().scores(b, t, held)
        self.sinks = sinks
        return found


def expects(rule, seed=0):
    """Expected Attention of a host that turns its queries keeps what a rule says."""
    torch.manual_seed(seed)
    q, k, v = drawn()
    rotation = Rotation(torch.tensor(Turning.rates, dtype=torch.float64), Turning.scale)
    q, k = (rotation.turn(x, torch.arange(N)) for x in (q, k))
    policy = Evict(Expected(sinks=2, ahead=Turning.ahead), 9, sinks=2)
    kept_and_attended(policy, rule(q, k, v, PROMPT, 9, sinks=2), q, k, v, rotations={0: rotation})


@pytest.mark.parametrize("seed", range(4))
def test_expected_attention_is_of_queries_at_the_next_positions(seed):
    expects(Turning, seed)


@pytest.mark.parametrize("broken", [AsTheyCame, NextAlone, NoSpread, SinksToo])
def test_other_expectations_are_noticed(broken):
    with pytest.raises(AssertionError, match="key head"):
        expects(broken)


def test_a_prompt_of_sinks_alone_has_scores():
    """Without a query or a token to speak of, scores are numbers, and later tokens are read."""
    q, k, v = drawn(n=6)
    _, session = run(Evict(Expected(sinks=4), 4, sinks=4), q, k, v, pieces=(3,))
    assert session.held().sum(-1).tolist() == [[6, 6]] * 2


def test_a_rotation_is_turned_back():
    rotation, x, at = Rotation(torch.rand(3).double(), 1.3), torch.randn(2, 9, 8).double(), torch.arange(5, 14)
    truth = torch.stack([x[:, i] @ rules.turned(5 + i, rotation.rates.tolist(), 1.3, 8).T for i in range(9)], 1)
    assert_close(rotation.turn(x, at), truth, truth, terms=8)
    back = rotation.back(truth, at)
    assert_close(back, x, x, terms=8, scale=float(truth.abs().max()))
    mean = sum(rules.turned(i, rotation.rates.tolist(), 1.3, 8) for i in range(5, 14)) / 9
    assert_close(rotation.mean(x, at), x @ mean.T, x @ mean.T, terms=8, scale=float(x.abs().max()))


class NoSinks(rules.Recent):
    def always(self, t):
        return []


class PoolsMore(rules.Window):
    pool = 7


class SumsOfHeads(rules.Heavy):
    def mean(self, b, g, t, seen):
        return rules.attention(self.q[b, g * self.group, t], self.k[b, g], seen)


@pytest.mark.parametrize(
    ("name", "broken"), [("streaming_llm", NoSinks), ("snapkv", PoolsMore), ("h2o", SumsOfHeads)], ids=str
)
def test_another_rule_is_noticed(name, broken):
    make, _, own, of_rule = CASES[name]
    q, k, v = drawn()
    with pytest.raises(AssertionError, match="key head"):
        kept_and_attended(make(0.4, **own), broken(q, k, v, PROMPT, 0.4, **of_rule), q, k, v)


ALL = {
    **{name: make for name, (make, *_) in CASES.items()},
    "pyramidkv": cache.pyramidkv,
    "across_layers": lambda budget, **_: Evict(KeyNorm(), AcrossLayers(budget)),
    "quest": lambda budget, **_: Quest(budget, page=4),
    "nothing": lambda budget, **_: Policy(),
}
OWN = {name: own for name, (_, _, own, _) in CASES.items()} | {"pyramidkv": {"window": 6}}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", [1.0, 64])
@pytest.mark.parametrize("pieces", [(PROMPT,), (10, 5, 14), (1, 28)], ids=str)
def test_a_full_budget_is_dense_attention(name, budget, pieces):
    q, k, v = drawn()
    found, _ = run(ALL[name](budget, **OWN.get(name, {})), q, k, v, pieces, num_layers=2)
    truth = dense_attention(q, k, v, causal=True)
    assert_close(found, truth, truth, name="output", terms=N)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_sequences(name):
    q, k, v = drawn(batch=3)
    policy = ALL[name](12, **OWN.get(name, {}))
    together, _ = run(policy, q, k, v, num_layers=2)
    alone = torch.cat([run(policy, *(x[b : b + 1] for x in (q, k, v)), num_layers=2)[0] for b in range(3)])
    assert_close(together, alone, alone, name="output of a batch", terms=N)


@pytest.mark.parametrize("name", ALL)
def test_sequences_that_change_places_take_all_with_them(name):
    q, k, v = drawn(batch=3)
    policy, order = ALL[name](12, **OWN.get(name, {})), [2, 2, 0]
    _, moved = run(policy, *(x[:, :, :33] for x in (q, k, v)))
    moved.reorder(order, 0)
    other = [torch.randn_like(x[:, :, 33:]) for x in (q, k, v)]
    whole = [torch.cat([x[order][:, :, :33], y], 2) for x, y in zip((q, k, v), other, strict=True)]
    found = torch.cat([moved.attend(0, *(x[:, :, t : t + 1] for x in other)) for t in range(N - 33)], 2)
    expected, session = run(policy, *whole)
    assert_close(found, expected[:, :, 33:], expected[:, :, 33:], name="output after a change of places", terms=N)
    assert torch.equal(moved.held(), session.held())


@pytest.mark.parametrize("share", [0.25, 0.5, 9])
def test_budgets_are_met_exactly(share):
    q, k, v = drawn(heads=4, n=40)
    for budget in (Uniform(share), Pyramid(share), cache.AcrossHeads(share), AcrossLayers(share)):
        layers = 3
        _, session = run(Evict(KeyNorm(), budget), q, k, v, (40,), num_layers=layers)
        each = share if isinstance(share, int) else int(share * 40)
        counts = torch.stack([store.counts for store in session.stores])
        assert counts.sum((0, 2)).tolist() == [layers * 2 * each] * 2, budget
        if type(budget) is Uniform:
            assert bool((counts == each).all())


def test_layers_of_a_pyramid_have_less_and_less():
    tokens = [Pyramid(0.25).tokens(2048, index, 8, sure=32) for index in range(8)]
    assert tokens == sorted(tokens, reverse=True)
    assert sum(tokens) == 8 * 512
    assert tokens[-1] == 32 + 24
    assert Pyramid(1.0).tokens(64, 0, 8) == Pyramid(1.0).tokens(64, 7, 8) == 64


def test_quest_reads_the_pages_that_its_rule_says():
    q, k, v = drawn(batch=1)
    policy = Quest(12, page=4)
    found, _ = run(policy, q, k, v)

    def read(b, t, held):
        sets = []
        for h in range(4):
            bounds = {}
            for page in range(t // 4 + 1):
                keys = k[b, h // 2, page * 4 : min(t + 1, page * 4 + 4)]
                low, high = keys.amin(0), keys.amax(0)
                group = [q[b, j, t] for j in range(h // 2 * 2, h // 2 * 2 + 2)]
                bounds[page] = max(float(torch.maximum(x * low, x * high).sum()) for x in group)
            pages = rules.largest(bounds, 3, [t // 4])
            sets.append([j for page in pages for j in range(page * 4, min(t + 1, page * 4 + 4))])
        return sets

    truth = replay(q, k, v, PROMPT, lambda b, t, held: held, read)
    assert_close(found, truth, truth, name="output", terms=N)


class Persistent(Policy):
    """Layer 0 reads all and picks tokens for each query head; the next layer reads the same ones."""

    def select(self, step):
        if step.index == 0:
            best = step.weights(1)[:, :, 0].topk(5, -1).indices
            step.shared["picked"] = step.slots.repeat_interleave(step.group, 1).gather(2, best)
            return None
        return Tokens(step.shared["picked"])


def test_what_one_layer_picks_the_next_one_reads():
    q, k, v = drawn()
    found, expected = Session(Persistent(), 2), []
    for index in (0, 1):
        found.attend(index, *(x[:, :, :PROMPT] for x in (q, k, v)))

    def read(b, t, held):
        each = [rules.attention(q[b, h, t], k[b, h // 2], held[h // 2]) for h in range(4)]
        return [rules.largest(p, 5) for p in each]

    truth = replay(q, k, v, PROMPT, lambda b, t, held: held, read)
    for t in range(PROMPT, N):
        now = [x[:, :, t : t + 1] for x in (q, k, v)]
        found.attend(0, *now)
        expected.append(found.attend(1, *now))
    assert_close(torch.cat(expected, 2), truth[:, :, PROMPT:], truth[:, :, PROMPT:], name="output", terms=N)


class Sharing(Reader):
    """Layer 0 reads all and picks tokens for each query head; the next layers read the same ones."""

    def select(self, step):
        picked = step.notes("picked") if step.index else self.best(step, step.scores())
        step.pass_on("picked", picked, fill=-1)
        return Tokens(picked) if step.index else None


@pytest.mark.parametrize("budget", [0.3, 7])
def test_what_is_passed_on_stays_with_its_sequences(budget):
    """Sequences of unlike lengths, read apart as they are in a padded batch, pass on what each would alone."""
    x, lengths = drawn(batch=3), (PROMPT, PROMPT - 9, PROMPT)
    found = Session(Sharing(budget), 3)
    alone = [Session(Sharing(budget), 3) for _ in lengths]
    for rows in ([0, 2], [1]):
        for index in range(3):
            found.read(index, *(y[rows, :, : lengths[rows[0]]] for y in x), rows=rows, batch=3)
    for b, length in enumerate(lengths):
        for index in range(3):
            alone[b].attend(index, *(y[b : b + 1, :, :length] for y in x))
    for step in range(4):
        expected = []
        for b, length in enumerate(lengths):
            now = [y[b : b + 1, :, length + step : length + step + 1] for y in x]
            expected.append([alone[b].attend(index, *now) for index in range(3)][2])
            reads = budget if budget == 7 else math.ceil(0.3 * (length + step + 1))
            assert (alone[b].store(2).notes["picked"] >= 0).sum(-1).eq(reads).all()
        for index in range(3):
            for rows in ([1], [0, 2]):
                at = [lengths[b] + step for b in rows]
                now = [torch.stack([y[b, :, t : t + 1] for b, t in zip(rows, at, strict=True)]) for y in x]
                part = found.read(index, *now, rows=rows, batch=3)
                if index == 2:
                    assert_close(part, *[torch.cat([expected[b] for b in rows])] * 2, name="output", terms=N)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cache.knorm(0.0), r"budget: got 0.0; pass a float in \(0, 1\]"),
        (lambda: cache.knorm(0), "budget: got 0; pass an integer >= 1"),
        (lambda: cache.knorm(1.5), "budget: got 1.5; pass a float"),
        (lambda: cache.snapkv(16), "budget: got 16 tokens, which does not hold 0 sinks and 32 recent tokens; pass at"),
        (lambda: run(cache.snapkv(0.25), *drawn()), "budget: got 0.25 of 29 tokens, 7 in layer 0, which does not hold"),
        (lambda: cache.snapkv(pool=4), "pool: got 4; pass an odd number"),
        (lambda: cache.adakv(floor=2.0), "floor: got 2.0; pass a number from 0 to 1"),
        (lambda: Quest(0.0), "budget: got 0.0"),
        (lambda: Evict(KeyNorm(), 4, every=0), "every: got 0"),
        (lambda: Session(Policy()).store(0), "index: layer 0 has read nothing yet"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_pass_through_what_is_kept():
    q, k, v = (x.requires_grad_() for x in drawn())
    run(cache.snapkv(12, window=6), q, k, v)[0][:, :, -1].sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
