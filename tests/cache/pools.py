"""Kinds of pools that hold the same pages, with faults that the tests of the store must notice."""

import torch

from saccade.cache import CodedPool, Grid, HostedPool, PagePool, Policy, Quantized
from saccade.cache.hosted import Lane

LEVELS = 15


def drawn(batch, heads, n, width):
    """float64 (batch, heads, n, width) of which each token lies on a grid of 4 bits: eighths, the ends among them."""
    x = torch.randint(0, LEVELS + 1, (batch, heads, n, width))
    x[..., 0], x[..., 1] = 0, LEVELS
    return (x.gather(-1, torch.rand(x.shape).argsort(-1)).double() - LEVELS // 2) / 8


class LateLane(Lane):
    """Does its copies as late as it may: at `join`, but what lies on the host is seen there at `finish` alone."""

    def __init__(self):
        self.waiting, self.unseen = [], {}

    def run(self, copies):
        self.waiting.append(copies)

    def join(self):
        if self.waiting:
            before = {name: x.clone() for name, x in self.pool.cold.tensors.items()}
            self._do()
            self.unseen = {name: x.clone() for name, x in self.pool.cold.tensors.items()}
            self._put(before)

    def finish(self):
        self._do()
        self.unseen = {}

    def _do(self):
        self._put(self.unseen)
        while self.waiting:
            self.waiting.pop(0)()

    def _put(self, tensors):
        for name, x in tensors.items():
            self.pool.cold[name].copy_(x)


class NeverJoined(LateLane):
    """What is computed does not wait for the copies; the host does."""

    def join(self):
        pass


class NeverFinished(LateLane):
    """The host does not wait for the copies; what is computed does."""

    def finish(self):
        pass


def coded(dim, value_dim, **options):
    grid = Grid(4, "token", 32)
    return CodedPool(dim, value_dim, grids=(grid, grid), **options)


def hosted(lane, most=7):
    def make(dim, value_dim, **options):
        pool = HostedPool(dim, value_dim, most=most, lane=lane(), **options)
        pool.lane.pool = pool
        return pool

    return make


KINDS = {
    "plain": PagePool,
    "coded": coded,
    "hosted": hosted(Lane),
    "hosted_late": hosted(LateLane),
    "hosted_roomy": hosted(LateLane, most=40),
}


class Unopened(CodedPool):
    """Writes to codes without opening them."""

    def opened(self, ids):
        return self.own(ids)


class Forgetful(CodedPool):
    """Keeps the codes of pages that are free."""

    def _forget(self, ids):
        hot = self.hot_at[ids]
        self.hot.release(hot[hot > 0])
        self.hot_at[ids] = 0


class Lossy(HostedPool):
    """Gives a hot frame away before its page is copied to the host."""

    def _make_room(self, count, stay):
        before = self.lane
        self.lane = Lane() if count > 1 else type("Deaf", (Lane,), {"run": lambda self, copies: None})()
        super()._make_room(count, stay)
        self.lane = before


def of(cls):
    def make(dim, value_dim, **options):
        grid = Grid(4, "token", 32)
        own = {"grids": (grid, grid)} if issubclass(cls, CodedPool) else {"most": 7, "lane": Lane()}
        return cls(dim, value_dim, **own, **options)

    return make


BROKEN = {
    **{cls.__name__: of(cls) for cls in (Unopened, Forgetful, Lossy)},
    **{lane.__name__: hosted(lane) for lane in (NeverJoined, NeverFinished)},
}


def moved(store, rng):
    """Pages go where they may: old ones are coded, some are brought to the device."""
    pool = store.pool
    if isinstance(pool, CodedPool):
        Quantized(Policy(), residual=rng.choice([0, 3, 9]))._seal(store)
    elif isinstance(pool, HostedPool) and store.table.shape[1]:
        pages = torch.randint(-1, store.table.shape[1], (store.batch, store.kv_heads, 1))
        store.prefetch(pages)


def num_held(pool):
    """Frames in use under the pages of a pool, but for those that are nobody's."""
    if isinstance(pool, CodedPool):
        return pool.num_coded + pool.hot.in_use - 1
    return pool.num_hot + pool.cold.in_use - 1 if isinstance(pool, HostedPool) else pool.in_use
