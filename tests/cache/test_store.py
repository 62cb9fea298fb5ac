"""The ragged store against lists of positions, in every kind of pool, and the pool against counting."""

import random
import weakref
from unittest import mock

import pools
import pytest
import torch

from saccade.cache import PagePool, Store, Tokens
from saccade.cache import frames as frames_module
from saccade.cache.frames import Frames
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention

D, DV, HEADS, PAGE = 4, 3, 2, 4


class Book:
    """What a store must hold: for each sequence and key head the positions of the tokens it was given."""

    def __init__(self, batch):
        self.k = [torch.zeros(HEADS, 0, D, dtype=torch.float64) for _ in range(batch)]
        self.v = [torch.zeros(HEADS, 0, DV, dtype=torch.float64) for _ in range(batch)]
        self.held = [[[] for _ in range(HEADS)] for _ in range(batch)]

    def append(self, k, v, rows, keep):
        for at, b in enumerate(rows):
            first = self.k[b].shape[1]
            self.k[b], self.v[b] = torch.cat([self.k[b], k[at]], 1), torch.cat([self.v[b], v[at]], 1)
            for h in range(HEADS):
                self.held[b][h] = self.held[b][h] + [first + i for i in keep[at, h].nonzero()[:, 0].tolist()]

    def reorder(self, rows):
        self.k, self.v = [self.k[b] for b in rows], [self.v[b] for b in rows]
        self.held = [[list(row) for row in self.held[b]] for b in rows]


def equal(store, book):
    slots, there = store.order()
    k, v, at = (store.read(x, slots) for x in (store.pool.k, store.pool.v, store.pool.positions))
    for b in range(store.batch):
        assert int(store.seen[b]) == int(store.ends[b]) == book.k[b].shape[1]
        for h in range(HEADS):
            positions = at[b, h][there[b, h]].tolist()
            assert positions == sorted(book.held[b][h])
            assert torch.equal(k[b, h][there[b, h]], book.k[b][h, positions])
            assert torch.equal(v[b, h][there[b, h]], book.v[b][h, positions])
            assert int(store.counts[b, h]) == len(positions) == int(store.lengths.view(-1, HEADS)[b, h])
    if store.pool.stores == 1:
        used = {int(page) for page in store._used()}
        assert store.pool.in_use == len(used)
        assert store.pool.taken - store.pool.returned == len(used)


def changed(store, book, rng, kind):
    """One random operation on both."""
    batch = store.batch
    rows = sorted(rng.sample(range(batch), rng.randint(1, batch)))
    some = None if len(rows) == batch and rng.random() < 0.5 else rows
    n = rng.choice([1, 1, 3, 9])
    k, v = (pools.drawn(len(rows), HEADS, n, width) for width in (D, DV))
    if kind == "elsewhere":
        pools.moved(store, rng)
    elif kind == "append":
        keep = torch.ones(len(rows), HEADS, n, dtype=torch.bool)
        store.append(k, v, some)
        book.append(k, v, rows, keep)
    elif kind == "append_some":
        keep = torch.rand(len(rows), HEADS, n) < 0.5
        store.append(k, v, some, keep=keep, counts=keep.sum(-1) if rng.random() < 0.5 else None)
        book.append(k, v, rows, keep)
    elif kind == "keep":
        longest = int(store.counts[rows].max())
        keep = torch.rand(len(rows), HEADS, longest) < 0.6
        store.keep(keep, some)
        for at, b in enumerate(rows):
            for h in range(HEADS):
                held = sorted(book.held[b][h])
                book.held[b][h] = [p for i, p in enumerate(held) if keep[at, h, i]]
    elif kind == "drop":
        which = (store.counts[rows] > 0) & (torch.rand(len(rows), HEADS) < 0.7)
        slots, _ = store.order(some)
        index = torch.zeros(len(rows), HEADS, 1, dtype=torch.int64)
        for at, b in enumerate(rows):
            for h in range(HEADS):
                if which[at, h]:
                    held = sorted(book.held[b][h])
                    i = rng.randrange(len(held))
                    index[at, h] = slots[at, h, i]
                    book.held[b][h] = held[:i] + held[i + 1 :]
        store.drop(index, some, which)
    elif kind == "reorder":
        chosen = [rng.randrange(batch) for _ in range(batch)]
        store.reorder(chosen)
        book.reorder(chosen)


KINDS = ["append", "append_some", "keep", "drop", "reorder", "elsewhere"]


def random_operations(make, seeds):
    for seed in seeds:
        random_operations_of(make, seed)


def random_operations_of(make, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    store, book = Store(3, HEADS, make(D, DV, page=PAGE, dtype=torch.float64)), Book(3)
    for _ in range(40):
        changed(store, book, rng, rng.choice(KINDS))
        equal(store, book)
    q = torch.randn(3, 4, 1, D).double()
    for b in range(3):
        for h in range(4):
            at = sorted(book.held[b][h // 2])
            if at:
                k, v = book.k[b][None, h // 2, None, at], book.v[b][None, h // 2, None, at]
                truth = dense_attention(q[b, h][None, None], k, v)
                found = store.attend(q)[b, h][None, None]
                assert_close(found, truth, truth, name="attention", terms=len(at), scale=float(v.abs().max()))
    store.free()
    assert store.pool.in_use == 0
    assert store.pool.taken == store.pool.returned
    assert pools.num_held(store.pool) == 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", pools.KINDS.values(), ids=pools.KINDS)
def test_random_operations_are_those_on_lists(make, seed):
    random_operations(make, [seed])


@pytest.mark.parametrize("make", pools.BROKEN.values(), ids=pools.BROKEN)
def test_a_broken_pool_is_noticed(make):
    with pytest.raises((AssertionError, IndexError)):
        random_operations(make, range(12))


def filled(batch=2, tokens=23, **options):
    store = Store(batch, HEADS, PagePool(D, DV, page=PAGE, dtype=torch.float64, **options))
    k, v = torch.randn(batch, HEADS, tokens, D).double(), torch.randn(batch, HEADS, tokens, DV).double()
    store.append(k, v)
    return store, k, v


def test_a_fork_shares_pages_until_one_writes():
    store, k, v = filled()
    before = store.pool.in_use
    other = store.fork()
    assert store.pool.in_use == before
    for at, each in enumerate((store, other)):
        each.append(k[:, :, :1] + at, v[:, :, :1])
        each.drop(torch.full((2, HEADS), 3 + at))
    for at, each in enumerate((store, other)):
        slots, there = each.order()
        assert there.all()
        kept = each.read(each.pool.k, slots)
        whole = torch.cat([k, k[:, :, :1] + at], 2)
        assert torch.equal(kept, whole[:, :, [i for i in range(24) if i != 3 + at]])
    store.free()
    other.free()
    assert store.pool.in_use == 0
    assert store.pool.taken == store.pool.returned


def test_a_page_is_dropped_whole():
    store, k, _ = filled()
    store.drop_page(torch.tensor([[0, 4], [2, 1]]))
    slots, _ = store.order()
    kept = store.read(store.pool.k, slots)
    for (b, h), page in {(0, 0): 0, (0, 1): 4, (1, 0): 2, (1, 1): 1}.items():
        rest = [i for i in range(23) if i // PAGE != page]
        assert torch.equal(kept[b, h], k[b, h, rest])
    assert store.pool.in_use == 4 * 5


def test_a_page_is_dropped_of_some_rows_alone():
    store, k, _ = filled()
    store.drop_page(torch.tensor([[1, 3]]), [1], torch.tensor([[False, True]]))
    assert store.counts.tolist() == [[23, 23], [23, 23 - PAGE]]
    slots, there = store.order()
    kept = store.read(store.pool.k, slots)
    assert torch.equal(kept[0], k[0])
    assert torch.equal(kept[1, 0], k[1, 0])
    assert torch.equal(kept[1, 1][there[1, 1]], k[1, 1, [i for i in range(23) if i // PAGE != 3]])
    assert store.pool.in_use == 4 * 6 - 1


@pytest.mark.parametrize("heads", [HEADS, 2 * HEADS])
def test_single_tokens_are_read_for_each_key_or_query_head(heads):
    store, k, v = filled()
    q = torch.randn(2, 2 * HEADS, 1, D).double()
    slots = torch.stack([torch.randperm(23)[:7] for _ in range(2 * heads)]).view(2, heads, 7)
    slots[0, 0, 2:5] = -1
    found = store.attend(q, Tokens(slots))
    mask = torch.zeros(2, heads, 23, dtype=torch.bool)
    for b in range(2):
        for h in range(heads):
            mask[b, h, [s for s in slots[b, h].tolist() if s >= 0]] = True
    mask = mask.repeat_interleave(2 * HEADS // heads, 1)[:, :, None]
    truth = dense_attention(q, k, v, mask=mask)
    assert_close(found, truth, truth, name="attention to tokens", terms=7)


def pages_of_heads(heads):
    store, k, v = filled()
    q = torch.randn(2, 2 * HEADS, 1, D).double()
    pages = torch.stack([torch.randperm(6)[:3] for _ in range(2 * heads)]).view(2, heads, 3)
    pages[0, 0, 1] = -1
    found = store.attend(q, pages)
    mask = (torch.arange(23) // PAGE == pages[..., None]).any(2)
    mask = mask.repeat_interleave(2 * HEADS // heads, 1)[:, :, None]
    truth = dense_attention(q, k, v, mask=mask)
    assert_close(found, truth, truth, name="attention to pages", terms=23)


@pytest.mark.parametrize("heads", [HEADS, 2 * HEADS])
def test_pages_are_read_for_each_key_or_query_head(heads):
    pages_of_heads(heads)


def test_lists_of_another_key_head_are_noticed(monkeypatch):
    """The broken twin: the lists of a sequence take its key heads in turns."""

    def in_turns(store, lists, rows):
        each = lists // store.kv_heads
        return store._table(rows).repeat(each, 1), store._lengths(rows).repeat(each)

    monkeypatch.setattr(Store, "_lists", in_turns)
    with pytest.raises(AssertionError):
        pages_of_heads(2 * HEADS)


def test_what_is_free_is_never_read():
    store, k, v = filled()
    keep = torch.rand(2, HEADS, 23) < 0.4
    store.keep(keep)
    free = torch.ones(store.pool.num_pages, PAGE, dtype=torch.bool)
    slots, there = store.order()
    free.flatten()[store._places(slots, None)[there]] = False
    for x in (store.pool.k, store.pool.v):
        x.squeeze(1)[free] = torch.nan
    q = torch.randn(2, HEADS, 1, D).double()
    truth = dense_attention(q, k, v, mask=keep[:, :, None])
    assert_close(store.attend(q), truth, truth, name="attention", terms=23)


def test_memory_falls_by_what_is_dropped():
    store, _, _ = filled(tokens=400)
    whole = store.pool.nbytes
    store.keep((torch.arange(400) % 8 == 0).expand(2, HEADS, 400))
    assert store.pool.nbytes * 7 < whole
    assert 5 * store.pool.in_use > 4 * store.pool.num_pages


def test_rows_of_unlike_length_take_the_pages_that_they_need():
    store, _, _ = filled(tokens=64)
    keep = torch.zeros(2, HEADS, 64, dtype=torch.bool)
    keep[:, 0], keep[:, 1, :4] = True, True
    store.keep(keep)
    assert store.pool.in_use == store.pool.num_pages == 2 * (16 + 1)


def test_tokens_are_taken_back_only_where_none_was_dropped():
    store, k, _ = filled()
    store.crop(6)
    assert store.counts.tolist() == [[17, 17]] * 2
    assert store.seen.tolist() == [17, 17]
    assert torch.equal(store.read(store.pool.k, store.order()[0]), k[:, :, :17])
    store.drop(torch.zeros(2, HEADS, dtype=torch.int64))
    with pytest.raises(ValueError, match="crop: got 2 tokens to take back, but earlier ones were dropped"):
        store.crop(2)


def test_notes_of_some_sequences_are_padded_and_move():
    store, _, _ = filled(batch=2)
    store.note("x", torch.ones(1, 2), [0])
    store.note("x", 2 * torch.ones(1, 3), [1], fill=-1)
    assert store.notes["x"].tolist() == [[1, 1, -1], [2, 2, 2]]
    store.reorder([1, 1])
    assert store.notes["x"].tolist() == [[2, 2, 2]] * 2


def test_columns_move_with_their_tokens():
    store, _, _ = filled(columns=1)
    slots, there = store.order()
    at = store.read(store.pool.positions, slots)
    store.put_columns(at[..., None] * 2.0, slots, there)
    store.drop(torch.tensor([[3, 5], [0, 22]]))
    store.keep(torch.rand(2, HEADS, 22) < 0.5)
    slots, there = store.order()
    at, columns = (store.read(x, slots)[there] for x in (store.pool.positions, store.pool.columns))
    assert torch.equal(columns[:, 0], at * 2.0)


def test_a_pool_grows_by_what_is_needed():
    pool = PagePool(D)
    first = pool.take(10)
    assert pool.num_pages == 10
    pool.release(first[:3])
    pool.take(4)
    assert pool.num_pages == 11
    assert pool.in_use == 11
    with pytest.raises(ValueError, match="page: got 0"):
        PagePool(D, page=0)


def test_frames_come_in_order_and_grow_one_tensor_after_another(monkeypatch):
    frames = Frames({"a": torch.zeros(0, 1000), "b": torch.zeros(0, 1000)})
    ids = torch.cat([frames.take(2), frames.take(1), frames.take(64)])
    frames.grow(9)
    ids = torch.cat([ids, frames.take(3), frames.take(6)])
    assert ids.tolist() == list(range(76))
    kept = [weakref.ref(frames[name]) for name in "ab"]
    longer, seen = Frames._longer, []
    monkeypatch.setattr(
        Frames, "_longer", lambda *args: seen.append([each() is not None for each in kept]) or longer(*args)
    )
    frames.grow(1)
    assert seen == [[True, True], [False, True]]  # the old of the first is gone when the second grows


def decoded(tokens, steps):
    """A store that has read a prompt and then some single tokens, what it was given, and its pages."""
    store, k, v = filled(1, tokens)
    for _ in range(steps):
        now = [torch.randn(1, HEADS, 1, width).double() for width in (D, DV)]
        k, v = torch.cat([k, now[0]], 2), torch.cat([v, now[1]], 2)
        store.append(*now)
    return store, k, v


def test_rows_that_grow_lie_in_one_piece():
    """On a CPU what is decoded is read where it lies, and the pool has no page more for that."""
    store, k, v = decoded(4 * 64 * PAGE, 17 * PAGE)
    width = store.table.shape[1]
    assert (store.table.diff(dim=1) == 1).all()
    assert torch.equal(store.read(store.pool.k, store.order()[0]), k)
    assert torch.equal(store.read(store.pool.v, store.order()[0]), v)
    assert torch.equal(store.read(store.pool.positions, store.order()[0])[0, 0], torch.arange(width * PAGE).int())
    assert store.pool.in_use == HEADS * width
    assert store.pool.num_pages <= HEADS * (width + width // 32 + 1)


def test_pages_that_others_have_stay_where_they_are():
    store, k, _ = decoded(8 * PAGE, 0)
    other, before = store.fork(), store.table.clone()
    store.append(*(torch.randn(1, HEADS, 1, width).double() for width in (D, DV)))
    assert torch.equal(store.table[:, :8], before)
    assert torch.equal(other.read(other.pool.k, other.order()[0]), k)


def test_frames_that_are_spread_stay_what_they_are():
    frames = Frames({"a": torch.zeros(0, 3), "b": torch.zeros(0, 5)})
    ids = frames.take(70)
    held = {name: torch.randn(70, x.shape[1]) for name, x in frames.tensors.items()}
    for name, x in held.items():
        frames[name][ids] = x
    moved, short = frames_module._moved, iter([False, True, False])

    def fails(x, *rest):
        if next(short):
            raise MemoryError("no more")
        return moved(x, *rest)

    at, free = torch.arange(70) * 2, torch.arange(70).flip(0) * 2 + 1
    with mock.patch.object(frames_module, "_moved", fails), pytest.raises(MemoryError):  # of the second tensor
        frames.spread(ids, at, free)
    for name, x in held.items():
        assert torch.equal(frames[name][ids], x)
    assert len(frames) == frames.in_use == 70
    frames.spread(ids, at, free)
    for name, x in held.items():
        assert torch.equal(frames[name][at], x)
    assert (len(frames), frames.in_use) == (140, 70)
    assert frames.take(3).tolist() == [1, 3, 5]


def test_frames_for_which_there_is_no_memory(monkeypatch):
    frames = Frames({"a": torch.zeros(0, 3), "b": torch.zeros(0, 5)})
    ids = frames.take(4)
    frames["b"][ids] = torch.arange(20.0).view(4, 5)
    longer, calls = Frames._longer, []

    def short(self, x, count):
        calls.append(count)
        if len(calls) == 2:
            raise MemoryError("no more")
        return longer(self, x, count)

    monkeypatch.setattr(Frames, "_longer", short)
    with pytest.raises(MemoryError):
        frames.take(2)
    assert [len(frames[name]) for name in "ab"] == [4, 4]
    assert (len(frames), frames.in_use) == (4, 4)
    assert frames.take(2).tolist() == [4, 5]
    assert [len(frames[name]) for name in "ab"] == [6, 6]
    assert frames["b"][:4].flatten().tolist() == list(range(20))
