"""The fa4 backend: FlashAttention-4 (arXiv 2603.05451), the optional package `flash-attn-4`, on compute capability 9.

Its own causal and window code where a pattern is one, else a plan's lists of 128 x 128 tiles and one mask function for
every pattern, which reads the box tables. Compiled for each number of boxes and axes, dtype and head dim, never for a
pattern."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.softmax.lists import longest, padded, turned
from saccade.softmax.merge import absorb
from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem, reach
from saccade.where import Plan

name = "fa4"
differentiable = True
built_in = ("full", "causal", "window")
BLOCK = (128, 128)


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    q, v, where = problem.q, problem.v, problem.where
    found = []
    if not installed():
        found.append("it needs the package flash-attn-4: pip install 'saccade[fa4]'")
    if q.device.type != "cuda":
        found.append(f"it runs on CUDA, not on {q.device.type}")
    elif (capability := torch.cuda.get_device_capability(q.device))[0] != 9:
        found.append(f"it is fitted to compute capability 9, not {capability[0]}.{capability[1]}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"it computes in float16 and bfloat16, not {q.dtype}")
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 128:
        found.append(f"its head dims are equal multiples of 8 up to 128, got {q.shape[3]} and {v.shape[3]}")
    if not isinstance(problem.normalizer, Softmax):
        found.append(f"it normalises by softmax, not {problem.normalizer.name}")
    if problem.bias is not None:
        found.append("its score function is compiled, and the bias is a Python function of whole positions")
    if isinstance(where, Plan):
        if where.token_indices is not None:
            found.append("it has no lists of single keys")
        if where.bits is not None:
            found.append("it has no bit masks")
        if where.block[0] % 128 or where.block[1] != 128:
            found.append(f"the plan's tiles {where.block} are not a multiple of 128 by 128")
    if reach(where) is None and problem.wants_gradients and torch.are_deterministic_algorithms_enabled():
        found.append("its backward over lists of tiles adds in no fixed order, and deterministic algorithms are on")
    return found


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse)."""
    from flash_attn.cute.interface import flash_attn_func

    q, k, v, plan = problem.q, problem.k, problem.v, None
    options: dict[str, Any]
    sides = reach(problem.where)
    if sides is not None:
        left, right = (None if side == math.inf else int(side) for side in sides)
        options = {"causal": True} if (left, right) == (None, 0) else {"window_size": (left, right)}
    else:
        plan = problem.plan(BLOCK)
        options = _tables(plan).options()
        if plan.q_order is not None:
            q = q[:, :, plan.q_order]
        if plan.k_order is not None:
            k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    if problem.softcap is not None:
        score, score_backward = _capped()
        softcap = torch.full((1,), problem.softcap, dtype=torch.float32, device=q.device)
        tensors = [*(options.get("aux_tensors") or []), softcap]
        options |= {"score_mod": score, "score_mod_bwd": score_backward, "aux_tensors": tensors}
    wants_lse = problem.needs_lse or problem.sink is not None
    found = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=problem.scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=wants_lse,
        **options,
    )
    o, lse = found[0].transpose(1, 2), found[1]
    if plan is not None and plan.q_order is not None:
        back = torch.argsort(plan.q_order)
        o, lse = o[:, :, back], lse[:, :, back] if wants_lse else None
    if problem.sink is not None:
        o, lse = absorb(o, lse, problem.sink)
    return o, lse


@functools.cache
def installed() -> bool:
    """Whether the package is there."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Tables:
    """A plan in this package's form. lists, by_key: counts and padded tiles, partial and full, per query tile and per
    key tile. bounds (S, T, A, 2, N), coord (A, M): box tables, N and M rounded up to whole tiles, since rows beyond the
    end are read too. unions: the union of each head (H,) or (B, H), or None when there is one."""

    block: tuple[int, int]
    lists: tuple[Tensor, ...]
    by_key: tuple[Tensor, ...]
    bounds: Tensor
    coord: Tensor
    unions: Tensor | None

    @classmethod
    def of(cls, plan: Plan) -> Tables:
        lo, hi, coord = plan.boxes.lo, plan.boxes.hi, plan.boxes.coord
        bounds = torch.nn.functional.pad(torch.stack([lo, hi], 3), (0, -plan.num_queries % plan.block[0]))
        coord = torch.nn.functional.pad(coord, (0, -plan.num_keys % plan.block[1]))
        unions = None
        if lo.shape[0] > 1:
            unions = plan.union_of[plan.group_of].int()
            unions = unions[0] if len(unions) == 1 else torch.nn.functional.pad(unions, (0, 1))  # no two strides of 1
        return cls(plan.block, _lists(plan), _lists(turned(plan)), bounds, coord, unions)

    def options(self) -> dict[str, Any]:
        """What the package takes."""
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        found: dict[str, Any] = {
            "block_sparse_tensors": BlockSparseTensorsTorch(*self.lists, block_size=self.block),
            "block_sparse_tensors_bwd": BlockSparseTensorsTorch(*self.by_key, block_size=self.block),
            "pack_gqa": False,
        }
        if self.coord.shape[0]:
            of_head = 0 if self.unions is None else self.unions.ndim
            found["mask_mod"] = _in_boxes(self.bounds.shape[1], self.coord.shape[0], of_head)
            found["aux_tensors"] = [x for x in (self.bounds, self.coord, self.unions) if x is not None]
        return found


def _tables(plan: Plan) -> Tables:
    return plan.derive(Tables, lambda: Tables.of(plan))


def _lists(plan: Plan) -> tuple[Tensor, ...]:
    tables = padded(plan, longest(plan))
    return tuple(x[None] if plan.num_groups == 1 else x[plan.group_of] for x in tables)


@functools.cache
def _in_boxes(num_boxes: int, num_axes: int, of_head: int) -> Callable[..., Any]:
    """The mask function, which is traced: may this row see this key, by the tables? of_head: 0 when all heads follow
    one union, 1 when each has its own, 2 when each of every batch entry has."""
    from cutlass import Int32
    from flash_attn.cute import utils

    def seen(batch: Any, head: Any, row: Any, key: Any, lengths: Any, tables: Any) -> Any:
        bounds, coord = tables[0], tables[1]
        union = tables[2][(batch[0], head[0])[2 - of_head :]] if of_head else 0

        def entry(table: Any, *at: Any) -> Any:
            return utils.scalar_to_ssa(table[at], Int32)

        def inside(box: int, axis: int) -> Any:
            at = entry(coord, axis, key[0])
            lo, hi = (entry(bounds, union, box, axis, side, row[0]) for side in range(2))
            return (lo <= at) & (at < hi)

        def every(box: int) -> Any:
            return functools.reduce(lambda a, b: a & b, (inside(box, axis) for axis in range(num_axes)))

        return functools.reduce(lambda a, b: a | b, (every(box) for box in range(num_boxes)))

    return seen


@functools.cache
def _capped() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """c tanh(s / c) and its gradient, traced; c is the last tensor, so that no value of it is compiled in.

    tanh is formed from an exponential: the instruction for it is right to three digits only.
    """
    from cutlass import cute

    def tanh(x: Any) -> Any:
        return 1.0 - 2.0 / (cute.math.exp2(x * (2 * math.log2(math.e)), fastmath=True) + 1.0)

    def score(s: Any, batch: Any, head: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        cap = aux_tensors[-1][0]
        return tanh(s / cap) * cap

    def backward(
        grad: Any, s: Any, batch: Any, head: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        slope = tanh(s / aux_tensors[-1][0])
        return grad * (1.0 - slope * slope)

    return score, backward
