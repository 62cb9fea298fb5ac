"""Both allocators under requests that come, grow and go: what each holds, how much memory, and what is mapped when."""

import random

import pytest
import torch

from saccade import attend
from saccade.cache import CudaDriver, PagePool, SimulatedDriver, Store, VirtualCache
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention

HEADS, D, LONGEST, AT_ONCE = 2, 4, 60, 5
TOKEN = HEADS * D * 8  # bytes of keys, float64


class Paged:
    """Requests in a `PagePool`, a `Store` each."""

    page = 4

    def __init__(self, device="cpu"):
        self.pool, self.running = PagePool(D, page=self.page, dtype=torch.float64, device=device), {}

    def open(self, k, v):
        name = max(self.running, default=0) + 1
        self.running[name] = Store(1, HEADS, self.pool)
        self.pool.stores += 1
        self.running[name].append(k[None], v[None])
        return name

    def extend(self, name, k, v):
        self.running[name].append(k[None], v[None])

    def close(self, name):
        self.running.pop(name).free()

    def attend(self, name, q):
        return self.running[name].attend(q[None])[0]

    def most(self, lengths):
        """Bytes of keys that are enough: less than a page more for each head."""
        return sum(HEADS * -(-n // self.page) * self.page * D * 8 for n in lengths)

    def used(self):
        return self.pool.in_use * self.page * D * 8

    def end(self):
        assert self.pool.taken == self.pool.returned
        assert self.pool.in_use == 0


class Virtual:
    """Requests in a `VirtualCache` of one layer, with pages of 3 tokens."""

    extra = 0

    def __init__(self, driver, **options):
        self.driver = driver
        self.cache = VirtualCache(
            driver, 1, HEADS, D, slots=AT_ONCE, length=LONGEST, dtype=torch.float64, **{"eager": True} | options
        )

    def open(self, k, v):
        slot = self.cache.open(k.shape[1])
        self.cache.write(0, slot, 0, k, v)
        return slot

    def extend(self, slot, k, v):
        before = self.cache.lengths[slot]
        self.cache.extend(slot, before + k.shape[1])
        self.cache.write(0, slot, before, k, v)
        self.cache.ahead() if self.extra else None

    def close(self, slot):
        self.cache.close(slot)

    def attend(self, slot, q):
        return attend(q[None], *self.cache.view(0, slot))[0]

    def most(self, lengths):
        page = self.driver.page
        return sum(-(-n * TOKEN // page) * page for n in [*lengths, *[self.extra] * AT_ONCE])

    def used(self):
        return sum(self.cache.mapped) * self.driver.page

    def end(self):
        assert self.extra or not any(self.cache.mapped)
        self.cache.release()
        if isinstance(self.driver, SimulatedDriver):
            assert self.driver.created == 0


class Deferred(Virtual):
    """With what is mapped ahead, and left mapped."""

    extra = LONGEST + 3

    def __init__(self, driver):
        super().__init__(driver, eager=False)


class Short(Deferred):
    """With fewer physical pages than slots might use."""

    def __init__(self, driver):
        Virtual.__init__(self, driver, eager=False, sets=AT_ONCE * LONGEST // 3 - 20)


def requests(make, seed, device="cpu", steps=150):
    """Random requests, each compared with its own tokens, of which the allocator knows nothing else."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    engine, book = make(device), {}

    def drawn(n):
        return tuple(torch.randn(2, HEADS, n, D, dtype=torch.float64).to(device))

    for _ in range(steps):
        kind = rng.choice(["open", "extend", "extend", "extend", "close"])
        if kind == "open" and len(book) < AT_ONCE:
            new = drawn(rng.randint(1, 25))
            book[engine.open(*new)] = new
        elif kind == "extend" and book:
            name = rng.choice(sorted(book))
            more = min(rng.choice([1, 1, 1, 7]), 40 - book[name][0].shape[1])
            if more > 0:
                new = drawn(more)
                engine.extend(name, *new)
                book[name] = tuple(torch.cat(pair, 1) for pair in zip(book[name], new, strict=True))
        elif kind == "close" and book:
            name = rng.choice(sorted(book))
            engine.close(name)
            del book[name]
        assert engine.used() <= engine.most([k.shape[1] for k, _ in book.values()])
        for name, (k, v) in book.items():
            q = torch.randn(2 * HEADS, 1, D, dtype=torch.float64).to(device)
            truth = dense_attention(*(x[None] for x in (q, k, v)))[0]
            assert_close(engine.attend(name, q), truth, truth, name="attention", terms=40, scale=float(v.abs().max()))
    for name in list(book):
        engine.close(name)
    engine.end()


def simulated(cls, driver=SimulatedDriver):
    return lambda device: cls(driver(3 * TOKEN, device))


ALLOCATORS = {"paged": Paged, **{cls.__name__: simulated(cls) for cls in (Virtual, Deferred, Short)}}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", ALLOCATORS.values(), ids=ALLOCATORS)
def test_requests_come_and_go(make, seed):
    requests(make, seed)


def mapped_by_cuda(cls):
    return lambda device: cls(CudaDriver(device=device))


ON_CUDA = {**ALLOCATORS, **{f"cuda_{cls.__name__}": mapped_by_cuda(cls) for cls in (Virtual, Deferred)}}


@pytest.mark.gpu
@pytest.mark.parametrize("make", ON_CUDA.values(), ids=ON_CUDA)
def test_requests_come_and_go_on_a_gpu(make):
    requests(make, 0, "cuda", steps=60)


@pytest.mark.gpu
def test_pages_of_a_gpu_lie_side_by_side():
    """Slots of more than one page of the device, written and read over their borders."""
    driver = CudaDriver()
    tokens = driver.page // (8 * 128 * 2)
    cache = VirtualCache(driver, 2, 8, 128, slots=3, length=3 * tokens, dtype=torch.bfloat16)
    k, v = torch.randn(2, 8, tokens + 5, 128, device="cuda").bfloat16()
    free, _ = torch.cuda.mem_get_info()
    slots = [cache.open(tokens + 5) for _ in range(2)]
    assert cache.mapped == [2, 2, 0]
    assert cache.nbytes == 2 * 2 * 4 * driver.page
    assert free - torch.cuda.mem_get_info()[0] >= cache.nbytes
    for slot in slots:
        for index in range(2):
            cache.write(index, slot, 0, k + slot, v + index)
    for slot in slots:
        for index in range(2):
            found = cache.view(index, slot)
            assert torch.equal(found[0][0], k + slot)
            assert torch.equal(found[1][0], v + index)
    cache.close(slots[0])
    assert cache.open(5) == slots[0]
    held, _ = torch.cuda.mem_get_info()
    cache.release()
    assert torch.cuda.mem_get_info()[0] > held


class OneTooFew(VirtualCache):
    """Rounds pages down."""

    def pages(self, tokens):
        return tokens * self.token // self.driver.page


class Hoards(VirtualCache):
    """Maps a page more than it needs."""

    def _map(self, slot, pages):
        super()._map(slot, min(pages + 1, self.pages(self.length)))


class Leaks(VirtualCache):
    """Never unmaps."""

    def _unmap(self, slot, pages):
        pass


class Mixes(VirtualCache):
    """Maps under a slot what lies under another."""

    def _at(self, slot, page):
        return super()._at(min(slot, 1), page)


@pytest.mark.parametrize("cls", [OneTooFew, Hoards, Leaks, Mixes])
def test_a_broken_allocator_is_noticed(cls, monkeypatch):
    monkeypatch.setattr("test_virtual.VirtualCache", cls)
    with pytest.raises((AssertionError, RuntimeError)):
        requests(simulated(Virtual), 0)


def made(slots=4, page=10, **options):
    """A cache whose tokens are one number of 8 bytes: `page` tokens a page."""
    driver = SimulatedDriver(8 * page)
    return VirtualCache(driver, 2, 1, 1, slots=slots, length=95, dtype=torch.float64, **options), driver


def test_slots_begin_at_pages_and_pages_come_in_sets():
    cache, driver = made()
    assert cache.slot == 100 * 8
    slot = [cache.open(1), cache.open(11)][1]
    at = [address for _, address in driver.calls[4:]]
    assert at == [first + slot * 800 + page * 80 for page in (0, 1) for first in cache.addresses]
    assert all((address - first) % 800 == 800 * slot % 800 for address, first in zip(at, cache.addresses, strict=False))
    assert cache.nbytes == 3 * 4 * 80


def test_the_best_fit_is_taken_and_maps_nothing():
    cache, driver = made()
    for slot in [cache.open(n) for n in (35, 92, 12, 58)]:
        cache.close(slot)
    assert cache.mapped == [4, 10, 2, 6]
    before = len(driver.calls)
    assert [cache.open(n) for n in (41, 20, 36, 5)] == [3, 2, 0, 1]
    assert len(driver.calls) == before
    cache.close(3)
    cache.close(2)
    assert cache.open(95) == 3  # none is enough: the one that lacks least
    assert len(driver.calls) == before + 4 * 4


def test_pages_above_need_are_unmapped_from_the_highest_slot_down():
    cache, driver = made(sets=12)
    slots = [cache.open(30) for _ in range(4)]
    for slot in slots[1:]:
        cache.close(slot)
    del driver.calls[:]
    cache.extend(0, 51)
    assert cache.mapped == [6, 3, 3, 0]
    assert [kind for kind, _ in driver.calls] == ["unmap"] * 12 + ["map"] * 12
    assert cache.nbytes == 12 * 4 * 80
    cache.extend(0, 95)
    assert cache.mapped == [10, 2, 0, 0]
    cache.open(20)
    with pytest.raises(RuntimeError, match="sets: 1 more are needed, 0 of 12 are free; close a request"):
        cache.open(1)
    assert cache.lengths.count(None) == 2


def test_pages_are_mapped_ahead_as_far_and_as_many_as_is_said():
    cache, driver = made(slots=5, steps=10, burst=2)
    for length in (10, 5, 1, 1, 10):
        cache.open(length)
    cache.ahead()
    assert cache.mapped == [2, 1, 1, 1, 2]  # the next step's, both; none of the others is within reach of more
    cache.extend(1, 8)
    cache.extend(2, 9)
    cache.extend(3, 9)
    cache.ahead()
    assert cache.mapped == [2, 1, 2, 2, 2]  # slot 1 would be a third of later steps
    before = len(driver.calls)
    cache.extend(2, 11)
    assert len(driver.calls) == before


def test_what_is_mapped_ahead_waits_for_nothing_and_takes_from_nobody():
    cache, _ = made(slots=2, sets=3)
    cache.open(10)
    cache.open(20)
    cache.ahead()
    assert cache.mapped == [1, 2]  # there is none, and no error: a request may end before
    cache.close(1)
    cache.ahead()
    assert cache.mapped == [2, 1]


def test_what_was_unmapped_is_gone():
    cache, _ = made(eager=True)
    slot = cache.open(7)
    cache.write(0, slot, 0, *torch.ones(2, 1, 7, 1).double())
    whole = cache.k[0]
    assert whole[slot, :7].sum() == 7
    cache.close(slot)
    assert bool(whole.isnan().all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, d: c.open(96), ValueError, r"length: got 96 tokens; a slot has room for 0 .. 95"),
        (lambda c, d: c.extend(1, 3), ValueError, "slot: 1 has no request; open one"),
        (lambda c, d: [c.open(1) for _ in range(5)], RuntimeError, "slots: all 4 have requests; close one"),
        (lambda c, d: c.write(0, c.open(3), 2, *torch.ones(2, 1, 2, 1)), ValueError, "first: got tokens up to 4 of a"),
        (lambda c, d: d.unmap(0), RuntimeError, "unmap: nothing lies under address 0"),
        (lambda c, d: d.map(8, d.create()), RuntimeError, "address 8 is none of a page"),
        (lambda c, d: [d.map(0, 0) for _ in range(2) if d.create() >= 0], RuntimeError, "is mapped already"),
        (lambda c, d: made(slots=0), ValueError, "slots: got 0"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*made())


def test_the_driver_of_a_gpu_names_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(ImportError, match=r"CudaDriver needs the package cuda-bindings: pip install 'saccade\[vmm\]'"):
        CudaDriver()
