"""Sessions whose sequences come and go: each goes on as if it were alone, in pools that several sessions share."""

import pytest
import torch

from saccade import cache
from saccade.cache import AcrossLayers, Evict, KeyNorm, Policy, Quest, Received, Session, Store
from saccade.testing.budget import assert_close

D, HEADS, KV, LAYERS, STEPS = 4, 4, 2, 2, 23
LENGTHS = (19, 11, 26)


def paged(policy):
    policy.page = 4
    return policy


POLICIES = {
    "dense": paged(Policy()),
    "streaming": paged(cache.streaming_llm(0.5, sinks=1)),
    "often": paged(Evict(Received(), 0.6, recent=2, every=3)),
    "heads": paged(cache.adakv(0.5, window=3)),
    "layers": paged(Evict(KeyNorm(), AcrossLayers(0.5), every=2)),
    "quest": Quest(8, page=4),
}


def drawn():
    """For each sequence q, k, v of all layers: its prompt and its steps."""
    return [
        [[torch.randn(1, h, n + STEPS, D).double() for h in (HEADS, KV, KV)] for _ in range(LAYERS)] for n in LENGTHS
    ]


def read(session, rows, start, stop):
    """o (G, H, N, D) of both layers, of tokens start[i] .. stop[i] of each sequence."""
    out = []
    for index in range(LAYERS):
        parts = [[x[:, :, a:b] for x in row[index]] for row, a, b in zip(rows, start, stop, strict=True)]
        out.append(session.attend(index, *(torch.cat(x) for x in zip(*parts, strict=True))))
    return torch.stack(out)


def alone(policy, row, length):
    """o of every step of one sequence."""
    session = Session(policy, LAYERS)
    read(session, [row], [0], [length])
    return [read(session, [row], [length + at], [length + at + 1]) for at in range(STEPS)]


def joined(policy, rows):
    """The same for three sequences, of which the second joins after 4 steps, the third after 7, the first leaves."""
    pools = {}
    sessions = [Session(policy, LAYERS, pools) for _ in rows]
    for session, row, length in zip(sessions, rows, LENGTHS, strict=True):
        read(session, [row], [0], [length])
    one, here, out = sessions[0], [0], [[], [], []]
    for at in range(2 * STEPS):
        for when, who in ((4, 1), (7, 2)):
            if at == when:
                one.join(sessions[who])
                here.append(who)
        stay = [who for who in here if len(out[who]) < STEPS]
        if not stay:
            break
        if stay != here:
            one.select([here.index(who) for who in stay])
            here = stay
        start = [LENGTHS[who] + len(out[who]) for who in here]
        found = read(one, [rows[who] for who in here], start, [a + 1 for a in start])
        for place, who in enumerate(here):
            out[who].append(found[:, place : place + 1])
    one.free()
    return out, pools


@pytest.mark.parametrize("name", POLICIES)
def test_sequences_that_join_and_leave_are_what_they_are_alone(name):
    policy, rows = POLICIES[name], drawn()
    found, pools = joined(policy, rows)
    for row, length, steps in zip(rows, LENGTHS, found, strict=True):
        for here, truth in zip(steps, alone(policy, row, length), strict=True):
            assert_close(here, truth, truth, name="o", terms=length + STEPS)
    (pool,) = pools.values()
    assert (pool.in_use, pool.taken, pool.stores) == (0, pool.returned, 1)


def test_notes_that_are_padded_with_nothing_said_are_noticed(monkeypatch):
    note = Store.note
    monkeypatch.setattr(Store, "note", lambda self, name, value, rows=None, fill=0: note(self, name, value, rows, 0))
    policy, rows = Quest(8, page=4), drawn()
    # Where all bounds are below zero, zero is a page that is chosen.
    rows = [[[-q.abs(), k.abs(), v] for q, k, v in row] for row in rows]
    found, _ = joined(policy, rows)
    truth = alone(policy, rows[1], LENGTHS[1])
    assert not all(torch.allclose(a, b) for a, b in zip(found[1], truth, strict=True))


def test_notes_that_do_not_fit_are_refused():
    policy, pools = POLICIES["dense"], {}
    a, b = Session(policy, 1, pools), Session(policy, 1, pools)
    x = torch.randn(1, KV, 9, D)
    for at, session in enumerate((a, b)):
        session.attend(0, x, x, x)
        session.store(0).notes["mine"] = torch.zeros(1, 3 + at)
    with pytest.raises(ValueError, match=r"notes: 'mine' is of \(3,\) and \(4,\), and nothing says what pads it"):
        a.join(b)
    del b.store(0).notes["mine"]
    with pytest.raises(ValueError, match="notes: 'mine' is not kept alike for all sequences"):
        a.join(b)
    del a.store(0).notes["mine"]
    a.shared["else"] = x
    with pytest.raises(ValueError, match="shared: nothing says how else of two sessions become one"):
        a.join(b)


@pytest.mark.parametrize("name", POLICIES)
def test_forks_in_a_pool_go_on_apart(name):
    policy, (row, other, _) = POLICIES[name], drawn()
    pools = {}
    session = Session(policy, LAYERS, pools)
    read(session, [row], [0], [19])
    (pool,) = pools.values()
    before = pool.in_use
    fork = session.fork()
    assert pool.in_use == before
    mine = [read(session, [row], [19 + at], [20 + at]) for at in range(STEPS)]
    shifted = [[x[:, :, 5:] for x in layer] for layer in other]
    theirs = [read(fork, [shifted], [at], [at + 1]) for at in range(STEPS)]
    one = Session(policy, LAYERS)
    read(one, [row], [0], [19])
    truth = [read(one, [shifted], [at], [at + 1]) for at in range(STEPS)]
    for found, expected in ((mine, alone(policy, row, 19)), (theirs, truth)):
        for here, there in zip(found, expected, strict=True):
            assert_close(here, there, there, name="o", terms=19 + STEPS)
    fork.free()
    session.free()
    assert (pool.in_use, pool.taken, pool.stores) == (0, pool.returned, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_step_takes_is_no_more_than_was_said(name):
    policy, (row, *_) = POLICIES[name], drawn()
    pools, exact = {}, 0
    session = Session(policy, LAYERS, pools)
    read(session, [row], [0], [18])
    (pool,) = pools.values()
    fork = session.fork()
    for at in range(18, 18 + STEPS):
        said = sum(session.store(i).growth(1, drops=name != "dense") for i in range(LAYERS))
        before = pool.taken
        read(session, [row], [at], [at + 1])
        assert pool.taken - before <= said
        exact += pool.taken - before == said
    assert exact == STEPS or name != "dense"
    fork.free()


def test_steps_of_sequences_that_differ_are_not_told():
    policy, pools = POLICIES["dense"], {}
    rows = drawn()[:2]
    one, two = Session(policy, LAYERS, pools), Session(policy, LAYERS, pools)
    read(one, rows[:1], [0], [19])
    read(two, rows[1:], [0], [11])
    assert one.view(0).steps == 0
    read(one, rows[:1], [19], [20])
    one.join(two)
    with pytest.raises(ValueError, match="steps: the sequences of this batch are not equally many steps behind"):
        assert one.view(0).steps
