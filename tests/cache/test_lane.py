"""Steps of rows that lie in place, by what is looked up once a page, against those that look every time."""

import copy

import pytest
import torch

from saccade.cache import PagePool, Policy, Session, Store
from saccade.softmax.page_rows import Lane

HEADS, PAGE, D, DV = 2, 4, 6, 5


def token(batch=1, n=1, dtype=torch.float32):
    return [torch.randn(batch, HEADS, n, width, dtype=dtype) for width in (D, DV)]


def filled(tokens, columns=0, dtype=torch.float32, batch=1):
    store = Store(batch, HEADS, PagePool(D, DV, page=PAGE, columns=columns, dtype=dtype))
    store.append(*token(batch, tokens, dtype))
    return store


def told(store):
    """All that a store says of its tokens."""
    slots, _ = store.order()
    pool = store.pool
    held = [store.read(x, slots) for x in (pool.k, pool.v, pool.positions, pool.columns)]
    return [*held, store.counts, store.seen, store.lengths, store.ends, store.held()]


def both(tokens, steps, monkeypatch, *, ask=False, **options):
    """What steps by a lane leave and find, and what steps without one do."""
    sides = []
    for by_lane in (True, False):
        torch.manual_seed(0)
        with monkeypatch.context() as patch, torch.no_grad():
            if not by_lane:
                patch.setattr(Lane, "of", lambda *_: None)
            store, found, went = filled(tokens, **options), [], 0
            for _ in range(steps):
                store.append(*token(store.batch, dtype=store.pool.dtype))
                went += store.lane is not None
                found.append(store.attend(torch.randn(store.batch, 6, 1, D, dtype=store.pool.dtype), scale=0.3))
                if ask:
                    assert store.counts.flatten().tolist() == store.lengths.tolist()
            assert went == (steps if by_lane else 0)
        sides.append([*found, *told(store)])
    return sides


CASES = [{}, {"columns": 2}, {"dtype": torch.bfloat16}, {"dtype": torch.float64, "batch": 3}, {"ask": True}]


@pytest.mark.parametrize("tokens", [5, 16, 1022])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_lane_changes_no_bit(tokens, options, monkeypatch):
    mine, others = both(tokens, 3 * PAGE + 1, monkeypatch, **options)
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


WRONG = {
    "put": lambda put: lambda self, k, v: put(self, k, 0 * v),
    "attend": lambda attend: lambda self, q, scale: attend(self, q, scale / 2),
    "ahead": lambda ahead: lambda self, x: ahead(self, x).clone(),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_lane_that_errs_is_caught(what, monkeypatch):
    monkeypatch.setattr(Lane, what, WRONG[what](getattr(Lane, what)))
    with pytest.raises(AssertionError):
        test_a_lane_changes_no_bit(16, {}, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.drop(torch.zeros(1, HEADS, dtype=torch.int64)),
        lambda store: store.drop_page(torch.zeros(1, HEADS, dtype=torch.int64)),
        lambda store: store.keep(torch.arange(int(store.counts.max())).expand(1, HEADS, -1) % 3 > 0),
        lambda store: store.crop(3),
        lambda store: store.reserve(9),
        lambda store: store.append(*token(n=3)),
        lambda store: store.fork(),
        lambda store: store.reorder([0, 0]),
    ],
)
def test_what_changes_pages_ends_a_lane(change):
    """Counts are right at once, and later steps read what is held then."""
    store = filled(9)
    for _ in range(6):
        store.append(*token())
    assert store.lane is not None
    change(store)
    assert store.lane is None
    assert store.counts.flatten().tolist() == store.lengths.tolist()
    before = store.order()[0].shape[2] if store.owned is None else None
    store.append(*token(store.batch))
    if before is not None:
        assert store.order()[0].shape[2] == before + 1


@torch.no_grad()
def test_a_copy_goes_on_by_itself():
    store = filled(9)
    store.append(*token())
    other, before = copy.deepcopy(store), told(store)
    for _ in range(PAGE):
        other.append(*token())
    assert all(torch.equal(a, b) for a, b in zip(before, told(store), strict=True))
    assert other.counts.tolist() == [[10 + PAGE] * HEADS]
    assert torch.equal(other.read(other.pool.k, other.order()[0])[:, :, :10], before[0])


@torch.no_grad()
def test_memory_that_moved_is_let_go():
    store = filled(4 * PAGE)
    for _ in range(PAGE + 1):
        store.append(*token())
        storage = store.lane.stretches[0][1].untyped_storage().data_ptr()
        assert storage == store.pool.k.untyped_storage().data_ptr()
    store.append(*token(n=5))
    assert store._lane is None


def test_gradients_take_no_lane():
    store = filled(9)
    store.append(*token())
    assert store.lane is None
    with torch.no_grad():
        store.append(*token())
        assert store.lane is not None
    assert store.lane is None


@torch.no_grad()
def test_ids_that_wait_are_those_that_came():
    """Also where the caller writes over what it gave."""
    session, ids, x = Session(Policy()), torch.arange(5)[None], torch.randn(1, 2, 5, D)
    session.tell(ids)
    session.attend(0, x, x, x)
    given = torch.zeros(1, 1, dtype=torch.int64)
    for at in range(5, 80):
        given.fill_(at)
        session.tell(given)
        session.attend(0, *[x[:, :, :1]] * 3)
    assert session.shared["token_ids"].tolist() == [list(range(80))]


class Watching(Policy):
    def after(self, step):
        raise RuntimeError("asked")


@torch.no_grad()
def test_a_policy_that_says_something_is_asked():
    assert Policy().idle
    assert not Watching().idle
    session, x = Session(Watching()), torch.randn(1, 2, 5, D)
    session.attend(0, x, x, x)
    with pytest.raises(RuntimeError, match="asked"):
        session.attend(0, *[x[:, :, :1]] * 3)
