"""Laws that hold for every backend: each a function of an engine, and beside each an engine that breaks it.

A law compares two ways to say the same thing, in float64, o, lse and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saccade.softmax import RelativeTable, attend, merge
from saccade.testing.budget import assert_close
from saccade.where import Band, Causal, Documents, Full, Neighborhood, PerHead, Plan, Sinks, Strided, Window

Pair = tuple[Tensor, Tensor]
Inputs = Sequence[Tensor]


@dataclass(frozen=True)
class Engine:
    """What a law calls."""

    attend: Callable[..., Any] = attend
    merge: Callable[[Sequence[Pair]], Pair] = merge
    backend: str = "tiles"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Any = None, **options: Any) -> Pair:
        return self.attend(q, k, v, where, **options, return_lse=True, backend=self.backend)


Law = Callable[[Engine], None]
LAWS: dict[str, tuple[Law, Engine]] = {}


def law(**broken: Any) -> Callable[[Law], Law]:
    """Enter a law, with what to put into an engine to break it."""

    def enter(function: Law) -> Law:
        LAWS[function.__name__] = function, Engine(**broken)
        return function

    return enter


def draw(n: int, m: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, d: int = 5, dv: int = 5) -> list[Tensor]:
    shapes = (batch, heads, n, d), (batch, kv_heads, m, d), (batch, kv_heads, m, dv)
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def same(inputs: Inputs, one: Callable[..., Pair], two: Callable[..., Pair]) -> None:
    """Both functions of q, k, v give one o, one lse, and one gradient of a random sum of both."""
    cotangents: list[Tensor] = []

    def judged(function: Callable[..., Pair]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, lse = function(*leaves)
        if not cotangents:
            cotangents.extend([torch.randn_like(o), torch.randn_like(lse)])
        loss = (o * cotangents[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0) * cotangents[1]).sum()
        return [o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    names = ("o", "lse", *(f"gradient {at}" for at in range(len(inputs))))
    q, k = inputs[:2]
    size = 1 + float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    for name, left, right in zip(names, judged(one), judged(two), strict=True):
        largest = float(right.masked_fill(~right.isfinite(), 0).abs().max())
        assert_close(left, right, right, name=name, terms=k.shape[2], scale=size * max(1.0, largest))


def mean_merge(parts: Sequence[Pair]) -> Pair:
    """Forgets to weigh the parts by their sums."""
    o, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return o.mean(0), lse.logsumexp(0)


def largest_merge(parts: Sequence[Pair]) -> Pair:
    """Weighs the parts, but hands on the largest lse alone."""
    o, lse = merge(parts)
    return o, torch.stack([lse for _, lse in parts]).amax(0).where(lse > -torch.inf, lse)


def with_inputs(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """attend, after a change of q, k, v."""
    return lambda q, k, v, *rest, **options: attend(*change(q, k, v), *rest, **options)


def with_where(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """attend, after a change of where."""
    return lambda q, k, v, where=None, **options: attend(q, k, v, change(where), **options)


SPLITS = [(6, 7), (1, 12), (13,), (3, 3, 3, 3, 1), (1,) * 13]


def blind_mask() -> Tensor:
    """(H, N, M) in which some rows see no key, others none of a part."""
    mask = torch.rand(4, 9, 13) < 0.4
    mask[:, 4] = False
    mask[1, :, :7] = False
    mask[:, 0, 7:] = False
    return mask


@law(merge=mean_merge)
def splits_merge_to_the_whole(engine: Engine) -> None:
    mask = blind_mask()
    for split in SPLITS:
        q, k, v = draw(9, 13)

        def parts(q: Tensor, k: Tensor, v: Tensor, split: tuple[int, ...] = split) -> Pair:
            each = zip(k.split(split, 2), v.split(split, 2), mask.split(split, 2), strict=True)
            return engine.merge([engine(q, a, b, Plan.from_mask(c, (4, 4))) for a, b, c in each])

        same((q, k, v), parts, lambda q, k, v: attend(q, k, v, Plan.from_mask(mask), return_lse=True))


@law(merge=largest_merge)
def merge_is_associative(engine: Engine) -> None:
    mask = blind_mask()

    def partials(q: Tensor, k: Tensor, v: Tensor) -> list[Pair]:
        each = zip(k.split((4, 4, 5), 2), v.split((4, 4, 5), 2), mask.split((4, 4, 5), 2), strict=True)
        return [engine(q, a, b, Plan.from_mask(c)) for a, b, c in each]

    def left(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        a, b, c = partials(q, k, v)
        return engine.merge([engine.merge([a, b]), c])

    def right(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        a, b, c = partials(q, k, v)
        return engine.merge([a, engine.merge([b, c])])

    same(draw(9, 13), left, right)
    same(draw(9, 13), left, lambda q, k, v: engine.merge(partials(q, k, v)[::-1]))


def narrower(where: Any) -> Any:
    if isinstance(where, Band):
        return Band(where.left - 1, where.right)
    return Window(where.size - 1) if isinstance(where, Window) else where


@law(attend=with_where(narrower))
def a_window_of_everything_is_everything(engine: Engine) -> None:
    same(draw(11, 11), partial(engine, where=Band(10, 10)), partial(engine, where=Full()))
    same(draw(11, 11), partial(engine, where=Window(11)), partial(engine, where=Causal()))
    same(draw(5, 11), partial(engine, where=Window(11)), partial(engine, where=Causal()))


def loses_a_tile(where: Any) -> Any:
    if not isinstance(where, Plan) or where.num_tiles < 2:
        return where
    rows, full, keep = where.rows(), where.is_full(), slice(1, None)
    return where.listing(rows[keep], where.indices.long()[keep], full[keep], union_of=where.union_of)


@law(attend=with_where(loses_a_tile))
def the_block_does_not_matter(engine: Engine) -> None:
    patterns = [
        (Causal() & (Window(7) | Sinks(2)), 23, 29),
        (Strided(3) & Causal(), 29, 29),
        (PerHead([Full(), Causal(), Window(3), Causal()]), 17, 31),
        (Neighborhood((5, 7), 3, dilation=(1, 2)), 35, 35),
    ]
    for pattern, n, m in patterns:
        for block in [(1, 1), (3, 5), (5, 2), (16, 16), (17, 4), (64, 64)]:
            plan = pattern.plan(n, m, 4, block)
            same(draw(n, m), partial(engine, where=plan), partial(attend, where=pattern, return_lse=True))


def forgets_sequences(*inputs: Any, cu_seqlens: Tensor | None = None, **options: Any) -> Any:
    return attend(*inputs, **options)


@law(attend=forgets_sequences)
def packed_sequences_are_a_loop(engine: Engine) -> None:
    ends = [0, 1, 8, 19, 23]
    heads = PerHead([Full(), Sinks(2) | Window(2), Strided(2), Causal() & Band(3, 0)])
    for where in (None, Causal(), Causal() & (Window(4) | Sinks(1)), heads):

        def loop(q: Tensor, k: Tensor, v: Tensor, where: Any = where) -> Pair:
            each = [engine(*(x[:, :, a:b] for x in (q, k, v)), where) for a, b in pairwise(ends)]
            o, lse = zip(*each, strict=True)
            return torch.cat(o, 2), torch.cat(lse, 2)

        packed = partial(engine, where=where, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
        same(draw(23, 23, batch=1), packed, loop)
    documents = partial(engine, where=Documents(ends) & Causal())
    packed = partial(engine, where=Causal(), cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    same(draw(23, 23, batch=1), documents, packed)


def numbers_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k * torch.linspace(1, 1.001, k.shape[2], dtype=k.dtype)[:, None], v


@law(attend=with_inputs(numbers_keys))
def keys_have_no_order(engine: Engine) -> None:
    order, mask = torch.randperm(13), blind_mask()

    def shuffled(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        return engine(q, k[:, :, order], v[:, :, order], Plan.from_mask(mask[:, :, order], (4, 4)))

    same(draw(9, 13), shuffled, lambda q, k, v: engine(q, k, v, Plan.from_mask(mask, (4, 4))))

    def full(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        return engine(q, k[:, :, order], v[:, :, order])

    same(draw(9, 13), full, engine)


def reads_the_next_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[1] == k.shape[1]:
        return q, k, v
    turned = torch.arange(q.shape[1]) % k.shape[1]
    return q, k[:, turned], v[:, turned]


@law(attend=with_inputs(reads_the_next_head))
def shared_heads_are_repeated_heads(engine: Engine) -> None:
    wheres = [Causal(), None, PerHead([Window(3), Causal(), Window(3), Causal(), Sinks(2), Full()])]
    for where in wheres:

        def repeated(q: Tensor, k: Tensor, v: Tensor, where: Any = where) -> Pair:
            return engine(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), where)

        same(draw(7, 11, heads=6, dv=3), partial(engine, where=where), repeated)


def mixes_batches(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k + 1e-6 * (k[:1] - k), v


@law(attend=with_inputs(mixes_batches))
def batches_do_not_meet(engine: Engine) -> None:
    for where in (None, Causal(), (Window(3) | Sinks(1)).plan(7, 11, 4, (2, 3))):

        def apart(q: Tensor, k: Tensor, v: Tensor, where: Any = where) -> Pair:
            o, lse = zip(*(engine(q[b : b + 1], k[b : b + 1], v[b : b + 1], where) for b in range(3)), strict=True)
            return torch.cat(o), torch.cat(lse)

        same(draw(7, 11, batch=3), partial(engine, where=where), apart)


def counts_from_the_first(q: Tensor, k: Tensor, v: Tensor, where: Any = None, **options: Any) -> Any:
    n = q.shape[2]
    if n == k.shape[2]:
        return attend(q, k, v, where, **options)
    return attend(q, k[:, :, :n], v[:, :, :n], where, **options)


@law(attend=counts_from_the_first)
def queries_are_the_last(engine: Engine) -> None:
    torch.manual_seed(3)
    bias = RelativeTable(4, (4,)).double()
    torch.nn.init.normal_(bias.table)
    for where in (Causal(), Window(4), PerHead([Causal(), Window(2), Strided(2), Sinks(3)]), Neighborhood((3, 4), 3)):
        for count in (1, 5):

            def last(q: Tensor, k: Tensor, v: Tensor, where: Any = where, count: int = count) -> Pair:
                return engine(q[:, :, -count:], k, v, where, bias=bias)

            def whole(q: Tensor, k: Tensor, v: Tensor, where: Any = where, count: int = count) -> Pair:
                o, lse = engine(q, k, v, where, bias=bias)
                return o[:, :, -count:], lse[:, :, -count:]

            same(draw(12, 12), last, whole)


def adds_once(plan: Any) -> Any:
    return (
        replace(plan, token_indptr=None, token_indices=None, token_log_weights=None) if isinstance(plan, Plan) else plan
    )


@law(attend=with_where(adds_once))
def a_key_listed_twice_counts_twice(engine: Engine) -> None:
    """The same keys again, as single keys, raise the lse by log 2 and leave o; with a log weight of log 3, by log 4."""
    for block in [(3, 4), (16, 4)]:
        plan = (Causal() & Window(5)).plan(9, 13, 1, block)
        plan = replace(plan, group_of=torch.zeros(1, 4, dtype=torch.int64))
        every = torch.arange(13).expand(1, plan.num_row_tiles, 13)

        def raised(q: Tensor, k: Tensor, v: Tensor, by: float, plan: Plan = plan) -> Pair:
            o, lse = engine(q, k, v, plan)
            return o, lse + torch.tensor(by, dtype=lse.dtype).log()

        same(draw(9, 13), partial(engine, where=plan.with_tokens(every)), partial(raised, by=2))
        weighted = plan.with_tokens(every, torch.full(every.shape, 3.0, dtype=torch.float64).log())
        same(draw(9, 13), partial(engine, where=weighted), partial(raised, by=4))
