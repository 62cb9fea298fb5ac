"""The reference backend: the definition, over all N x M pairs, on any device and in float64 if asked; for small sizes
and for doubt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem
from saccade.where import Plan

name = "reference"
differentiable = True
BLOCK = (64, 64)


def reasons(problem: Problem) -> list[str]:
    """It runs everything."""
    return []


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse) from the full matrix of scores; lse is None for normalisers that have none."""
    q, k, v = problem.q, problem.k, problem.v
    (_, heads, n, _), (kv_heads, m) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    reads = torch.arange(heads, device=q.device) // (heads // kv_heads)
    k, v = k.to(dtype)[:, reads], v.to(dtype)[:, reads]
    scores = q.to(dtype) @ k.transpose(2, 3) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        rows = torch.arange(m - n, m, device=q.device)
        scores = scores + problem.bias(rows, torch.arange(m, device=q.device)).to(dtype)
    plan = problem.where if isinstance(problem.where, Plan) else None
    seen = _seen(problem)
    listed = None if plan is None or plan.token_indices is None else _listed(plan)
    if listed is None:
        scores = torch.where(seen, scores, -torch.inf)
    else:  # a listed key has a column of its own, beside that of its tile
        keys, log_weights = (x[plan.group_of].expand(len(q), -1, -1, -1) for x in listed)  # type: ignore[union-attr]
        extra = scores.gather(-1, keys)
        some = log_weights > -torch.inf
        extra = torch.where(some, extra + log_weights.to(dtype).masked_fill(~some, 0), -torch.inf)
        scores = torch.cat([torch.where(seen, scores, -torch.inf), extra], -1)
        seen = seen.expand(*q.shape[:3], m).int().scatter_add(-1, keys, some.int()) > 0
    lse = None
    if isinstance(problem.normalizer, Softmax):
        logits = scores
        if problem.sink is not None:
            logits = torch.cat([scores, problem.sink.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
        top = logits.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
        total = (logits - top).exp().sum(-1, keepdim=True)
        weights = (scores - top).exp() / total.masked_fill(total == 0, 1)
        lse = (top + total.log()).squeeze(-1)
    else:
        weights = problem.normalizer(scores)
    if listed is not None:
        weights = weights[..., :m].scatter_add(-1, keys, weights[..., m:])
    if bool(v.isfinite().all()):
        o = weights @ v
    else:  # a value that is not finite reaches only the rows that see it
        o = torch.stack([_row(weights[:, :, i], v, seen.expand_as(weights)[:, :, i]) for i in range(n)], 2)
    return o.to(problem.q.dtype), lse


def _row(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen[..., None], weights[..., None] * v, 0).sum(2)


def _seen(problem: Problem) -> Tensor:
    """Which pairs the pattern, or the tiles of the plan, admit: bool, broadcasts to (B, H, N, M)."""
    q, k, where = problem.q, problem.k, problem.where
    if not isinstance(where, Plan):
        return where.dense(q.shape[2], k.shape[2], q.shape[1]).to(q.device)
    return replace(where, token_indptr=None, token_indices=None, token_log_weights=None).dense()


def _listed(plan: Plan) -> tuple[Tensor, Tensor]:
    """Single keys of each query, and their log weights, -inf for none: (G, N, K), in the tokens' own order."""
    assert plan.token_indptr is not None
    assert plan.token_indices is not None
    shape = plan.num_groups, plan.num_queries, max(1, int(plan.token_indptr.diff().max()))
    keys = torch.zeros(shape, dtype=torch.int64, device=plan.device)
    log_weights = torch.full(shape, -torch.inf, dtype=torch.float64, device=plan.device)
    for group in range(plan.num_groups):
        for row in range(plan.num_row_tiles):
            at = slice(*plan.token_indptr[group * plan.num_row_tiles + row :][:2].tolist())
            own = plan.token_indices[at].long()
            stop = min((row + 1) * plan.block[0], plan.num_queries)
            rows = torch.arange(row * plan.block[0], stop, device=plan.device)
            allowed = plan.boxes.allowed(plan.union_of[group : group + 1], rows[None], own[None])[0]
            weights = (
                log_weights.new_zeros(len(own))
                if plan.token_log_weights is None
                else plan.token_log_weights[at].double()
            )
            queries = rows if plan.q_order is None else plan.q_order[rows]
            keys[group, queries, : len(own)] = own if plan.k_order is None else plan.k_order[own]
            log_weights[group, queries, : len(own)] = torch.where(allowed, weights, -torch.inf)
    return keys, log_weights
