"""Sessions that begin alike share the pages of what they begin with; what one does later, the other never sees."""

import itertools

import pools
import pytest
import torch
from test_policies import drawn, run

from saccade import cache
from saccade.cache import Evict, KeyNorm, Offloaded, PagePool, Policy, Quantized, Quest, Session, Stored
from saccade.cache.coded import CodedPool
from saccade.testing.budget import assert_close

PREFIX = 30


def small(policy):
    policy.page = 4
    return policy


POLICIES = {
    "nothing": lambda: small(Policy()),
    "drops": lambda: small(Evict(KeyNorm(), 16, every=1)),
    "keeps_fewer": lambda: small(Evict(KeyNorm(), 13, every=3)),
    "counts": lambda: small(cache.h2o(16, recent=4)),
    "notes": lambda: Quest(12, page=4),
    "codes": lambda: Quantized(small(Policy()), residual=5),
    "drops_and_codes": lambda: Quantized(small(Evict(KeyNorm(), 16, every=1)), residual=2, keys="token"),
    "hosts": lambda: Offloaded(Quest(12, page=4), 24),
}


def go_on(session, x, steps=range(PREFIX, 41)):
    """Outputs of a session that reads a piece of its own, and then steps."""
    piece = [session.attend(0, *(part[:, :, 41:46] for part in x))]
    return torch.cat([*piece, *(session.attend(0, *(part[:, :, t : t + 1] for part in x)) for t in steps)], 2)


def shown(session):
    """What a session holds, in order, and what its policy keeps beside it."""
    store = session.store(0)
    slots, there = store.order()
    parts = [store.read(x, slots)[there] for x in (store.pool.k, store.pool.v, store.pool.positions)]
    return [*parts, store.read(store.pool.columns, slots)[there], *store.notes.values(), *session.shared.values()]


def undisturbed(make):
    """Two forks of one prefix give what each gives alone, and one shows the same before and after the other goes on."""
    policy, both = make(), [drawn(n=46), drawn(n=46)]
    for mine, common in zip(both[1], both[0], strict=True):
        mine[:, :, :PREFIX] = common[:, :, :PREFIX]
    _, first = run(policy, *(x[:, :, :PREFIX] for x in both[0]), (PREFIX,))
    before = first.store(0).pool.in_use
    other = first.fork()
    assert first.store(0).pool.in_use == before
    for mine, others, x in ((first, other, both[0]), (other, first, both[1])):
        held = [part.clone() for part in shown(others)]
        found = go_on(mine, x)
        assert all(torch.equal(a, b) for a, b in zip(held, shown(others), strict=True))
        _, alone = run(policy, *(part[:, :, :PREFIX] for part in x), (PREFIX,))
        assert torch.equal(found, go_on(alone, x))
        assert torch.equal(mine.held(), alone.held())


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_one_session_never_changes_another(make):
    undisturbed(make)


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_session_that_writes_into_shared_pages_is_noticed(make, monkeypatch):
    monkeypatch.setattr(PagePool, "own", lambda self, ids: ids)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        undisturbed(make)


def test_codes_of_pages_that_another_holds_are_noticed(monkeypatch):
    """Coding alone, with nothing written: the pages of a fork that codes its prefix stay as they were for the other."""

    def coded_alone():
        policy = small(Policy())
        _, plain = run(policy, *(x[:, :, :PREFIX] for x in drawn()), (PREFIX,))
        store = plain.store(0)
        pool = pools.coded(8, 8, page=4, dtype=torch.float64)
        first = cache.Store(store.batch, store.kv_heads, pool)
        first.append(*drawn()[1:])
        held, other = first.read(pool.k, first.order()[0]).clone(), first.fork()
        Quantized(policy, residual=3)._seal(other)
        assert pool.num_coded == 4 * ((41 - 3) // 4)
        assert torch.equal(first.read(pool.k, first.order()[0]), held)
        assert not torch.equal(other.read(pool.k, other.order()[0]), held)

    coded_alone()
    monkeypatch.setattr(PagePool, "own", lambda self, ids: ids)
    with pytest.raises(AssertionError):
        coded_alone()


def shared_notes(self):
    """`Store.fork` that hands its notes on instead of copies."""
    other = FORK(self)
    other.notes = dict(self.notes)
    return other


FORK = cache.Store.fork


class Counting(Policy):
    """Counts its steps in place."""

    page = 4

    def piece(self, view):
        if not isinstance(view, Stored):
            view.note("steps", torch.zeros(len(view.q), 1))

    def after(self, step):
        step.stored.notes["steps"] += 1


def test_notes_are_not_shared(monkeypatch):
    undisturbed(Counting)
    monkeypatch.setattr(cache.Store, "fork", shared_notes)
    with pytest.raises(AssertionError):
        undisturbed(Counting)


def freed(make, order):
    """Three sessions of one prefix, two of which went on, give their pages back in an order."""
    q, k, v = drawn(n=46)
    _, first = run(make(), *(x[:, :, :PREFIX] for x in (q, k, v)), (PREFIX,))
    pool, sessions = first.store(0).pool, [first, first.fork()]
    go_on(sessions[1], (q, k, v))
    sessions.append(sessions[1].fork())
    go_on(sessions[2], (k.repeat_interleave(2, 1), v, k))
    kept = shown(sessions[order[-1]])
    for index in order[:-1]:
        sessions[index].free()
        assert all(torch.equal(a, b) for a, b in zip(kept, shown(sessions[order[-1]]), strict=True))
    sessions[order[-1]].free()
    assert pool.taken == pool.returned
    assert pool.in_use == pools.num_held(pool) == 0
    assert not bool(pool.owners.any())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_freeing_in_any_order_gives_all_back(make, order):
    freed(make, order)


def test_a_pool_that_does_not_count_owners_is_noticed(monkeypatch):
    monkeypatch.setattr(PagePool, "hold", lambda self, ids: None)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        freed(POLICIES["nothing"], (0, 1, 2))


def test_tokens_are_taken_back_without_moving_the_others():
    """A fork cut back to a common beginning shares the pages of that."""
    q, k, v = drawn(n=46)
    _, first = run(small(Policy()), q, k, v, (46,))
    other, pool = first.fork(), first.store(0).pool
    before = pool.in_use
    other.store(0).crop(46 - PREFIX)
    assert pool.in_use == before + 4  # the last page of each row, which the next token is written to
    found = go_on(other, (q, k, v))
    _, alone = run(small(Policy()), *(x[:, :, :PREFIX] for x in (q, k, v)), (PREFIX,))
    truth = go_on(alone, (q, k, v))
    assert_close(found, truth, truth, name="output", terms=46)
    shared = 2 * 2 * (PREFIX // 4)
    assert int((pool.owners == 2).sum()) == shared
    assert torch.equal(shown(first)[0].flatten(), k.flatten())


def test_sessions_of_one_pool_share_prefixes_across_layers():
    pools_of = {}
    policy = small(Policy())
    q, k, v = drawn(n=46)
    first = Session(policy, 2, pools_of)
    for index in (0, 1):
        first.attend(index, *(x[:, :, :PREFIX] for x in (q, k + index, v)))
    (pool,) = pools_of.values()
    forks = [first.fork() for _ in range(5)]
    assert pool.in_use == 2 * 2 * 2 * 8
    for fork in forks:
        for index in (0, 1):
            fork.attend(index, *(x[:, :, PREFIX : PREFIX + 1] for x in (q, k + index, v)))
    assert pool.in_use == 2 * 2 * 2 * (8 + 5)  # one page a row and fork, where it writes
    for session in (*forks, first):
        session.free()
    assert pool.in_use == 0
    assert pool.taken == pool.returned


def test_a_policy_with_a_storage_of_its_own_has_a_pool_of_its_own():
    pools_of, x = {}, torch.randn(1, 2, 40, 8)
    for policy in (Policy(), Quantized(Policy(), residual=0), Quantized(Policy(), 8, residual=0)):
        Session(policy, 1, pools_of).attend(0, x, x, x)
    assert [type(pool) for pool in pools_of.values()] == [PagePool, CodedPool, CodedPool]
