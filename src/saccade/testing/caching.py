"""Is what a decoder holds what its policy says, no more, and all that its steps depend on? For a `Cached`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Cached, Policy, Recorded, Store
from saccade.contract import Mechanism
from saccade.testing.ambient import seeded
from saccade.testing.budget import same_bits
from saccade.testing.decode import size_of
from saccade.testing.oracles import dense_attention
from saccade.testing.registry import named
from saccade.testing.rounding import cast
from saccade.testing.subject import Subject
from saccade.testing.tape import Tape


def decides(subject: Subject) -> bool:
    return issubclass(subject.cls, Cached)


def reads_all(policy: Policy) -> bool:
    """Whether a step reads all that is held, as it was given."""
    return type(policy).select is Policy.select and type(policy).project is Policy.project


class Decoding:
    """A session that has read the piece of a subject's tokens, and its steps."""

    def __init__(self, module: Mechanism, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(module, Cached):
            raise TypeError(f"module: got {type(module).__name__}; pass a Cached")
        self.module, self.inputs = module, inputs
        self.at = module.prompt(inputs[0].shape[2])
        self.session = module.session()
        with torch.no_grad():
            module.read(self.session, *(x[:, :, : self.at] for x in inputs))

    def step(self) -> Tensor:
        """o (B, H, 1, Dv) of the next token."""
        now = slice(self.at, self.at + 1)
        self.at += 1
        with torch.no_grad():
            return self.module.read(self.session, *(x[:, :, now] for x in self.inputs))

    def rest(self) -> Tensor:
        """Steps to the end."""
        return torch.cat([self.step() for _ in range(self.at, self.inputs[0].shape[2])], 2)

    @property
    def stores(self) -> list[Store]:
        return [self.session.store(index) for index in range(self.session.num_layers)]


def spoil(store: Store) -> None:
    """NaN into all memory of a store but that of the tokens which it says it holds."""
    slots, there = store.order()
    free = torch.ones(store.pool.num_pages * store.page, dtype=torch.bool)
    free[store._places(slots, None)[there]] = False
    for x in (store.pool.k, store.pool.v):
        x.flatten(0, 2)[free] = torch.nan


@named(applies=decides)
def held_tokens(subject: Subject) -> None:
    """A step attends to what is held and itself; a token that is dropped is gone, and the rest of memory is unread."""
    decoding, spoilt = (Decoding(subject.module, subject.inputs()) for _ in range(2))
    q, k, v = decoding.inputs
    module = decoding.module
    for store in spoilt.stores:
        spoil(store)
    before = module.held(decoding.session)
    while decoding.at < q.shape[2]:
        t = decoding.at
        out = decoding.step()
        assert same_bits(out, spoilt.step()), f"token {t}: the step reads memory of tokens that are not held"
        held = module.held(decoding.session)
        again = held[..., :t] & ~before
        assert not again.any(), f"token {t}: (batch, head, key) {again.nonzero()[:4].tolist()} had been dropped"
        if reads_all(module.policy):
            seen = torch.nn.functional.pad(before, (0, 1), value=True)
            mask = seen.repeat_interleave(subject.case.dims.group, 1)[:, :, None]
            truth = dense_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], mask=mask)
            far = float((out - truth).abs().max())
            band = torch.finfo(truth.dtype).eps * t * float(truth.abs().max())
            assert far <= band, f"token {t}: the step is {far:.1e} off attention to what is held and itself"
        before = held


@named(applies=decides)
def held_bytes(subject: Subject) -> None:
    """After a prompt of any length as many tokens are held as the budget says, in no more memory than they need."""
    module, inputs = subject.module, subject.inputs()
    assert isinstance(module, Cached)
    for length in sorted({subject.case.length, subject.case.length - 1, module.prompt(subject.case.length)}):
        session = module.session()
        with torch.no_grad():
            module.read(session, *(x[:, :, :length] for x in inputs))
        held = module.held(session)
        limit = module.limit(length)
        counts = held.sum((1, 2)).tolist()
        assert limit is None or counts == [limit] * len(counts), (
            f"after {length} tokens: holds {counts}, budget {limit}"
        )
        if not reads_all(module.policy):
            continue
        stores = [session.store(index) for index in range(session.num_layers)]
        most = 0.0
        for store in stores:
            pages = int((-(-store.counts // store.page)).sum())
            of_pages = store.pool.nbytes / max(1, store.pool.num_pages)
            table = store.table.nbytes + store.lengths.nbytes + store.ends.nbytes
            on_host = sum(x.nbytes for x in (store.counts, store.seen, store.targets, store.aimed))
            most += 1.25 * pages * of_pages + table + on_host
        size = size_of((stores, session.shared))
        assert size <= most, f"after {length} tokens: {size} bytes are held, {most:.0f} would do"


def _has_full_budget(subject: Subject) -> bool:
    return decides(subject) and subject.cls.full_budget(subject.case.dims, subject.case.length) is not None


@named(applies=_has_full_budget)
def prompt_in_pieces(subject: Subject) -> None:
    """With the whole budget a prompt in any pieces, and steps after it, are dense attention."""
    params: Any = subject.cls.full_budget(subject.case.dims, subject.case.length)
    with seeded(subject.seed):
        module = cast(subject.cls(subject.case.dims, **params), torch.float64).eval()
    assert isinstance(module, Cached)
    q, k, v = subject.inputs()
    n, rows = q.shape[2], []
    session, ends = module.session(), sorted({0, n // 3, n // 2, *range(max(n // 2, n - 3), n + 1)})
    with torch.no_grad():
        for start, stop in itertools.pairwise(ends):
            rows.append(module.read(session, *(x[:, :, start:stop] for x in (q, k, v))))
    truth = dense_attention(q, k, v, causal=True)
    far = float((torch.cat(rows, 2) - truth).abs().max())
    band = torch.finfo(truth.dtype).eps * n * float(truth.abs().max())
    assert far <= band, f"read in pieces that end at {ends[1:]}, the output is {far:.1e} off dense attention"


@named(applies=decides)
def places_change(subject: Subject) -> None:
    """Sequences that change places or are copied, as beams are, go on as they would have."""
    wide = subject.variant(batch=3)
    order = [2, 2, 0]
    moved = Decoding(wide.module, wide.inputs())
    if moved.at == wide.case.length:
        return
    for index in range(moved.session.num_layers):
        moved.session.reorder(order, index)
    moved.inputs = tuple(x[order] for x in moved.inputs)
    alone = Decoding(wide.module, moved.inputs)
    found, expected = moved.rest(), alone.rest()
    far = float((found - expected).abs().max())
    band = torch.finfo(expected.dtype).eps * wide.case.length * float(expected.abs().max())
    assert far <= band, f"sequences moved to {order} go on {far:.1e} off what they would have given"


@named(applies=decides)
def recorded_steps(subject: Subject) -> None:
    """Steps that are replayed from a recording give what steps give, whatever the policy says of them."""
    eager, module = Decoding(subject.module, subject.inputs()), subject.module
    assert isinstance(module, Cached)
    taped = Decoding(module, subject.inputs())
    q, k, v = taped.inputs
    steps = Recorded([taped.session], lambda *new: module.read(taped.session, *new), room=5, graph=Tape)
    for at in range(taped.at, q.shape[2]):
        with torch.no_grad():
            found = steps(*(x[:, :, at : at + 1] for x in (q, k, v)))
        expected = eager.step()
        far = float((found - expected).abs().max())
        band = torch.finfo(expected.dtype).eps * subject.case.length * float(expected.abs().max())
        how = f"after {steps.replays} replays" if taped.session.steady else "not recorded"
        assert far <= band, f"token {at}: the step is {far:.1e} off, {how}"
        assert torch.equal(module.held(taped.session), module.held(eager.session)), (
            f"token {at}: others are held, {how}"
        )
