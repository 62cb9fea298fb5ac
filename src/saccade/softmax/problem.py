"""One call of `attend`, checked and complete: what every backend is given."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.errors import check_cu_seqlens, check_qkv
from saccade.softmax.normalizers import NORMALIZERS, Normalizer, Softmax
from saccade.where import And, Band, Causal, Documents, Full, Packed, Pattern, Plan, Router, Window
from saccade.where.gathered import NotGathered, lattice_of

LONG = 8  # tiles of a list

Bias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """o_i = sum_j p_ij v_j over the keys that `where` admits, p = normalizer(softcap(scale q_i . k_j) + bias_ij).

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv). where: a pattern or a plan. bias: (q positions (n,), k
    positions (m,)) -> (H or 1, n, m). sink: (H,), one more logit a head in the denominator. needs_lse: lse is asked
    for."""

    q: Tensor
    k: Tensor
    v: Tensor
    where: Pattern | Plan
    scale: float
    bias: Bias | None
    sink: Tensor | None
    softcap: float | None
    normalizer: Normalizer
    needs_lse: bool

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        where: Pattern | Plan | Router | None = None,
        *,
        scale: float | None = None,
        bias: Bias | None = None,
        sink: Tensor | None = None,
        softcap: float | None = None,
        normalizer: str | Normalizer = "softmax",
        cu_seqlens: Tensor | None = None,
        return_lse: bool = False,
    ) -> Problem:
        """The arguments of `attend`, checked; routers have decided, packed sequences are part of `where`."""
        check_qkv(q, k, v)
        (_, heads, n, d), m = map(operator.index, q.shape), operator.index(k.shape[2])  # of a traced graph, numbers
        normalizer = _normalizer(normalizer)
        is_softmax = isinstance(normalizer, Softmax)
        if scale is not None and not _is_number(scale):
            raise ValueError(f"scale: got {scale!r}; pass a finite number, or None for D**-0.5")
        if softcap is not None and not (_is_number(softcap) and softcap > 0):
            raise ValueError(f"softcap: got {softcap!r}; pass a finite number > 0, or None for no cap")
        if bias is not None:
            _check_bias(bias, q, k)
            bias = bias.simpler() if hasattr(bias, "simpler") else bias
        if sink is not None:
            _check_sink(sink, q, is_softmax)
        if return_lse and not is_softmax:
            raise ValueError(f"return_lse: {normalizer.name} has no log-sum-exp; use normalizer='softmax'")
        where = _where(where, q, k)
        if cu_seqlens is not None:
            where = _packed(where, check_cu_seqlens(cu_seqlens, m, len(q)), n, m, heads)
        if isinstance(where, Pattern):
            where.check_sizes(n, m, heads)
            where.at_head(0, heads)  # a PerHead of another number of heads says so
        return cls(q, k, v, where, d**-0.5 if scale is None else scale, bias, sink, softcap, normalizer, return_lse)

    @property
    def wants_gradients(self) -> bool:
        """Gradients are on, and q, k or v asks for them."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return self.where == Full()

    @property
    def is_causal(self) -> bool:
        """Every query sees the keys up to its own position, and that is all that `where` says."""
        return self.where == Causal()

    def plan(self, block: tuple[int, int]) -> Plan:
        """The plan of this problem; a pattern is planned once for tiles of `block`, a plan keeps its own."""
        if isinstance(self.where, Plan):
            return self.where
        return plan_of(self.where, self.q.shape[2], self.k.shape[2], self.q.shape[1], block, self.q.device)

    def plan_on_grid(self, block: tuple[int, int], cells: tuple[int, int]) -> Plan:
        """`plan(block)`, but in tiles of `cells` for a pattern of windows on a grid, which smaller tiles fit better,
        and in tiles of half as many keys where stripes or blocks leave much of a whole one empty."""
        plan = self.plan(block)
        if not isinstance(self.where, Pattern):
            return plan
        if plan.grid is not None and len(plan.grid.cell) > 1:
            return self.plan(cells)
        narrow = block[0], block[1] // 2
        # Kernels take two narrow tiles a step, so that short lists gain nothing.
        long = plan.q_order is None and plan.k_order is None and self.foretold(block) >= LONG * block[1]
        return self.plan(narrow) if long and self.fits(narrow, block) else plan

    def fits(self, small: tuple[int, int], large: tuple[int, int]) -> bool:
        """Of tiles of the one size so few can be listed, of those of the other, that a fifth of the pairs goes."""
        return 5 * self.foretold(small) <= 4 * self.foretold(large)

    def foretold(self, block: tuple[int, int]) -> float:
        """Keys, at most, that a query is multiplied with in tiles of `block` of the tokens as they stand, on average
        over heads; of a pattern. Told without a list, so that nothing waits for one."""
        assert isinstance(self.where, Pattern)
        return keys_at_most(self.where, self.q.shape[2], self.k.shape[2], self.q.shape[1], block)

    def plan_of_keys(self, block: tuple[int, int], by: str) -> Plan | None:
        """`Pattern.gathered` of windows on a grid of two or three axes, where its lists hold at most half the keys of
        the tiles of `block`; else None. On a GPU the host waits for it once."""
        if not isinstance(self.where, Pattern) or self.q.shape[2] != self.k.shape[2]:
            return None
        return keys_of(self.where, self.q.shape[2], self.q.shape[1], block, self.q.device, by)


def reach(where: Pattern | Plan) -> tuple[float, float] | None:
    """(left, right), both >= 0, when `where` says i - left <= j <= i + right and nothing else, infinite where it has no
    end; else None.

    >>> from saccade.where import Causal, Sinks, Window
    >>> reach(Causal() & Window(4)), reach(Causal()), reach(Sinks(4))
    ((3, 0), (inf, 0), None)
    """
    if isinstance(where, And):
        sides = [reach(part) for part in where.parts]
        known = [side for side in sides if side is not None]
        return (min(s[0] for s in known), min(s[1] for s in known)) if len(known) == len(sides) else None
    if isinstance(where, Full):
        return math.inf, math.inf
    if isinstance(where, Causal):
        return math.inf, 0
    if isinstance(where, Window):
        return where.size - 1, 0
    if isinstance(where, Band):
        left, right = (math.inf if end is None else end for end in (where.left, where.right))
        return (left, right) if min(left, right) >= 0 else None  # kernels take windows that hold the query
    return None


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # or no training could use it
def plan_of(pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int], device: torch.device) -> Plan:
    """`pattern.plan(...)`, remembered: patterns are equal by value, and layers share theirs."""
    return pattern.plan(n, m, heads, block, device)


@functools.lru_cache(maxsize=256)
def keys_at_most(pattern: Pattern, n: int, m: int, heads: int, block: tuple[int, int]) -> float:
    """See `Problem.foretold`."""
    distinct = dict.fromkeys(pattern.at_head(h, heads) for h in range(heads))
    tiles = sum(one.most_tiles(n, m, block, None) for one in distinct) / len(distinct)
    return tiles * block[1] / -(-n // block[0])


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def keys_of(pattern: Pattern, n: int, heads: int, block: tuple[int, int], device: torch.device, by: str) -> Plan | None:
    """See `Problem.plan_of_keys`; remembered like `plan_of`."""
    lattice = lattice_of([pattern.at_head(h, heads) for h in range(heads)], n)
    if lattice is None or lattice.num_axes == 1:
        return None
    try:
        plan = pattern.gathered(n, n, heads, block, device, by=by)
    except NotGathered:  # dilated, or cells would leave the grid
        return None
    assert plan.token_indices is not None
    tiles = plan_of(pattern, n, n, heads, block, device).num_tiles
    return plan if 2 * len(plan.token_indices) <= tiles * block[1] else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_bias(bias: Any, q: Tensor, k: Tensor) -> None:
    form = "a function (q positions (n,), k positions (m,)) -> (H or 1, n, m)"
    if not callable(bias):
        raise TypeError(
            f"bias: got {type(bias).__name__}; pass {form}, such as RelativeTable, Alibi or FromCoordinates"
        )
    last, heads = torch.full((1,), k.shape[2] - 1, device=q.device), operator.index(q.shape[1])
    found = bias(last, last)
    if found.shape not in ((1, 1, 1), (heads, 1, 1)):
        raise ValueError(
            f"bias: got {tuple(found.shape)} for one query and one key; pass {form} for {q.shape[1]} heads"
        )
    if found.requires_grad and not isinstance(bias, torch.nn.Module):
        raise TypeError(
            "bias: got a plain function whose values ask for gradients; pass a Module, whose parameters are known"
        )


def _normalizer(given: str | Normalizer) -> Normalizer:
    if isinstance(given, str) and given in NORMALIZERS:
        return NORMALIZERS[given]()
    if isinstance(given, str | type) or not callable(given) or not hasattr(given, "name"):
        choices = ", ".join(NORMALIZERS)
        raise ValueError(f"normalizer: got {given!r}; choose one of {choices}, or pass an object such as Entmax(2.0)")
    return given


def _check_sink(sink: Any, q: Tensor, is_softmax: bool) -> None:
    if not isinstance(sink, Tensor) or sink.shape != q.shape[1:2] or not sink.is_floating_point():
        got = f"{sink.dtype} of shape {tuple(sink.shape)}" if isinstance(sink, Tensor) else type(sink).__name__
        raise ValueError(f"sink: got {got}; pass one floating-point logit a query head, shape ({q.shape[1]},)")
    if sink.device != q.device:
        raise ValueError(f"sink: got device {sink.device} beside q on {q.device}; move it there")
    if not is_softmax:
        raise ValueError("sink: a sink is a logit of the softmax; use normalizer='softmax' or leave it out")


def _where(where: Pattern | Plan | Router | None, q: Tensor, k: Tensor) -> Pattern | Plan:
    if where is None:
        return Full()
    if isinstance(where, Router):
        return where.route(q, k)
    if isinstance(where, Pattern):
        return where
    if not isinstance(where, Plan):
        raise TypeError(f"where: got {where!r} ({type(where).__name__}); pass a pattern, a Plan, a Router or None")
    planned, given = (where.num_queries, where.num_keys, where.num_heads), (q.shape[2], k.shape[2], q.shape[1])
    if planned != given:
        raise ValueError(
            f"where: got a plan for (queries, keys, heads) {planned} beside tensors of {given}; plan for these sizes"
        )
    if where.group_of.shape[0] not in (1, len(q)):
        raise ValueError(f"where: got a plan for a batch of {where.group_of.shape[0]} beside q's {len(q)}")
    if where.device != q.device:
        raise ValueError(f"where: got a plan on {where.device} beside q on {q.device}; move it with plan.to(device)")
    if where.transposed:
        raise ValueError("where: got a transposed plan, which lists queries per key; pass the plan itself")
    return where


def _packed(where: Pattern | Plan, cu_seqlens: Tensor, n: int, m: int, num_heads: int) -> Pattern:
    if isinstance(where, Plan):
        raise ValueError(
            "cu_seqlens: got together with a plan; a plan knows its sequences, so plan Packed(pattern, documents)"
        )
    if n != m:
        raise ValueError(
            f"cu_seqlens: got N = {n} queries and M = {m} keys; packed sequences attend to themselves, so N = M"
        )
    first = torch.zeros(1, dtype=torch.int64)
    for pattern in {where.at_head(h, num_heads) for h in range(num_heads)}:
        for length in set(cu_seqlens.diff().tolist()):
            pattern.allows(first, first, length)  # a pattern made for one length (a grid, documents) says so
    return Packed(where, Documents(cu_seqlens))
