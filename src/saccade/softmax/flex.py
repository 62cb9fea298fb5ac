"""The flex backend: PyTorch's FlexAttention, fed with a plan's tables through one mask function for every pattern.

Its form of a plan has room for every tile: 16 bytes for each pair of a query tile and a key tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

from saccade.softmax.merge import absorb
from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem
from saccade.where import Plan

name = "flex"
differentiable = True
BLOCK = (128, 128)


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
    """(o, lse)."""
    plan = problem.plan(BLOCK)
    q, k, v = problem.q, problem.k, problem.v
    if plan.q_order is not None:
        q = q[:, :, plan.q_order]
    if plan.k_order is not None:
        k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    o, aux = _compiled()(
        q,
        k,
        v,
        score_mod=None if problem.softcap is None else _capped(problem.softcap),
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


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(s / softcap)

    return score


def block_mask(plan: Plan) -> BlockMask:
    """The plan's tables in FlexAttention's form, lists padded to the longest; kept with the plan."""
    if "flex" not in plan.derived:
        plan.derived["flex"] = _block_mask(plan)
    return plan.derived["flex"]  # type: ignore[return-value]


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
        *_lists(plan.transpose()),
        plan.block,
        allowed if boxes.coord.shape[0] else noop_mask,
    )


def _lists(plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (B or 1, H, rows) and tiles (B or 1, H, rows, cols) of the partial, then of the full tiles; int32.

    The kernels step through both tables with the strides of the first, and take their width for the number of tiles.
    """
    shape = plan.num_groups, plan.num_row_tiles
    num_partial = plan.indptr.diff() - plan.num_full
    width = torch.arange(plan.num_col_tiles, device=plan.device)

    def table(counts: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        tiles = torch.zeros(len(counts), len(width), dtype=torch.int32, device=plan.device)
        if len(plan.indices):
            at = (start[:, None] + width).clamp(max=len(plan.indices) - 1)
            tiles = plan.indices[at].masked_fill(width >= counts[:, None], 0)
        return counts.int().view(shape)[plan.group_of], tiles.view(*shape, -1)[plan.group_of]

    first = plan.indptr[:-1]
    return *table(num_partial, first + plan.num_full), *table(plan.num_full, first)
