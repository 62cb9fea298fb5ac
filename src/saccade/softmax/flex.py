"""The flex backend: PyTorch's FlexAttention, fed with a plan's tables through one mask function for every pattern.

Its form of a plan has room for every tile: 16 bytes for each pair of a query tile and a key tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

from saccade.softmax.lists import padded, turned
from saccade.softmax.merge import absorb
from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem
from saccade.where import Plan

name = "flex"
differentiable = True
BLOCK = (128, 128)
VARIANTS = 2**16  # compilations that a process may hold; they come of shapes and dtypes, never of a pattern


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    q, v, where = problem.q, problem.v, problem.where
    found = []
    if q.device.type != "cuda":
        found.append(f"it is compiled for CUDA; on {q.device.type} PyTorch has no gradients for it")
    if q.dtype == torch.float64:
        found.append("it computes in at most float32")
    if min(q.shape[3], v.shape[3]) < 16:
        found.append(f"head dims below 16 have no kernel, got {q.shape[3]} and {v.shape[3]}")
    if not isinstance(problem.normalizer, Softmax):
        found.append(f"it normalises by softmax, not {problem.normalizer.name}")
    if problem.bias is not None:
        found.append("its score function is compiled, and the bias is a Python function of whole positions")
    if isinstance(where, Plan):
        if where.token_indices is not None:
            found.append("it has no lists of single keys")
        if where.bits is not None:
            found.append("it has no bit masks")
        if any(size % 128 for size in where.block):
            found.append(f"the plan's tiles {where.block} are no multiples of 128")
    return found


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse). Compiled once for each number of boxes and axes, dtype, head dim and the like, and never for a pattern:
    its tables, and the value of the softcap, are tensors that the compiled code reads."""
    plan = problem.plan(BLOCK)
    q, k, v = problem.q, problem.k, problem.v
    if plan.q_order is not None:
        q = q[:, :, plan.q_order]
    if plan.k_order is not None:
        k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    softcap = None
    if problem.softcap is not None:
        softcap = torch.full((), problem.softcap, dtype=torch.float32, device=q.device)
    with _room_for_variants():
        o, aux = _compiled()(
            q,
            k,
            v,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=block_mask(plan),
            scale=problem.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    lse = aux.lse
    if plan.q_order is not None:
        back = torch.argsort(plan.q_order)
        o, lse = o[:, :, back], lse[:, :, back]
    if problem.sink is not None:
        o, lse = absorb(o, lse, problem.sink)
    return o, lse


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(
        flex_attention, fullgraph=True
    )  # a graph that does not compile is an error, never N x M scores


def _room_for_variants() -> AbstractContextManager[Any]:
    """The compiler stops at eight variants of a function, which a few shapes use up; not in here."""
    return torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS)


def _capped(softcap: Tensor) -> Callable[..., Tensor]:
    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(s / softcap)

    return score


def block_mask(plan: Plan) -> BlockMask:
    """The plan's tables in FlexAttention's form, lists padded to the longest; kept with the plan."""
    return plan.derive("flex", lambda: _block_mask(plan))


def _block_mask(plan: Plan) -> BlockMask:
    boxes, group_of, union_of = plan.boxes, plan.group_of, plan.union_of
    shared = len(group_of) == 1

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        union = union_of[group_of[b * 0 if shared else b, h]]
        some = b < 0
        for box in range(boxes.lo.shape[1]):
            every = b >= 0
            for axis in range(boxes.coord.shape[0]):
                at = boxes.coord[axis, j]
                every = every & (boxes.lo[union, box, axis, i] <= at) & (at < boxes.hi[union, box, axis, i])
            some = some | every
        return some

    return BlockMask(
        (plan.num_queries, plan.num_keys),
        *_lists(plan),
        *_lists(turned(plan)),
        plan.block,
        allowed if boxes.coord.shape[0] else noop_mask,
    )


def _lists(plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (B or 1, H, rows) and tiles (B or 1, H, rows, cols) of the partial, then of the full tiles.

    The kernels step through both tables with the strides of the first, and take their width for the number of tiles.
    """
    part, partial, count, full = padded(plan, plan.num_col_tiles)
    return part[plan.group_of], partial[plan.group_of], count[plan.group_of], full[plan.group_of]
