"""The triton backend: this package's own kernels, forward and backward, over the lists and boxes of any plan.

One kernel each for o, for dq and for dk and dv, whatever the pattern; nothing is compiled for one. Query heads that
share a key head and lists are rows of one product where tiles are small; keys and values are never repeated.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.softmax.bias import Alibi, RelativeTable
from saccade.softmax.lists import turned
from saccade.softmax.normalizers import Entmax, Softmax
from saccade.softmax.problem import Bias, Problem
from saccade.where import Pattern, Plan
from saccade.where.gathered import in_tiles
from saccade.where.pattern import sent

name = "triton"
differentiable = True
BLOCK = (128, 128)
GRID_BLOCK = (64, 64)
SIDES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens that a tile may have on a side
MOST_CHANNELS = 256
PACKED = 64  # rows of scores that one program should have where heads share their lists


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    q, v, where = problem.q, problem.v, problem.where
    found = []
    if not installed():
        found.append("triton is missing; pip install triton")
    if q.device.type != "cuda" and not interpreted():
        found.append(f"its kernels are compiled for CUDA, not for {q.device.type}")
    if q.dtype == torch.float64:
        found.append("it computes in at most float32")
    if max(q.shape[3], v.shape[3]) > MOST_CHANNELS:
        found.append(f"more than {MOST_CHANNELS} channels do not fit its tiles, got {q.shape[3]} and {v.shape[3]}")
    if isinstance(problem.normalizer, Entmax):
        found += _reasons_of_entmax(problem, problem.normalizer)
    elif not isinstance(problem.normalizer, Softmax):
        found.append(f"it normalises by softmax and entmax, not {problem.normalizer.name}")
    if problem.bias is not None and not isinstance(problem.bias, RelativeTable | Alibi):
        found.append(f"it knows the biases RelativeTable and Alibi, not {type(problem.bias).__name__}")
    if isinstance(where, Plan):
        if where.bits is not None:
            found.append("it has no bit masks")
        if any(side not in SIDES for side in where.block):
            found.append(f"the plan's tiles {where.block} are none of {', '.join(map(str, SIDES))} tokens on a side")
    return found


def _reasons_of_entmax(problem: Problem, normalizer: Entmax) -> list[str]:
    if not installed():
        return []
    from saccade.softmax.kernels import entmax

    plan = problem.where if isinstance(problem.where, Plan) else None
    found = entmax.reasons(problem.q, problem.v, plan, normalizer.alpha)
    return found + [f"its entmax knows no {n}" for n in ("bias", "softcap") if getattr(problem, n) is not None]


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse); lse is None for entmax, which has none."""
    if isinstance(problem.normalizer, Entmax):
        from saccade.softmax.kernels.entmax import attend_entmax

        plan = problem.plan(BLOCK)
        return attend_entmax(problem.q, problem.k, problem.v, plan, problem.scale, problem.normalizer.alpha), None
    return call(problem, settle(problem))


class Settled(NamedTuple):
    """What a call needs that no value of q, k or v decides: tensors of a bias, of the plan and of its transposed lists,
    and the integers beside them; see `kernels.ops`."""

    bias: list[Tensor]
    plan: list[Tensor | None]
    turned: list[Tensor | None]
    sizes: list[int]


def settle(problem: Problem) -> Settled:
    """Plan a problem. With the tables on a GPU the host waits for nothing."""
    from saccade.softmax.kernels import ops
    from saccade.softmax.kernels.arguments import ByKey, Tables

    plan = planned(problem)
    in_cells = plan.token_grid is not None and problem.bias is None  # a bias would need the keys in two orders
    tables = Tables.of(plan, in_cells)
    by_key = None
    if wants_gradients(problem):
        by_key = ByKey.of(_by_key(plan) if in_cells else turned(plan))
    entries = problem.bias.table[0].numel() if isinstance(problem.bias, RelativeTable) else 0
    pack = _pack(plan, problem.q.shape[1] // problem.k.shape[1])
    grid, lists = plan.token_grid if in_cells else plan.grid, 0 if by_key is None else by_key.num_lists
    return Settled(
        [] if problem.bias is None else _positions(problem.bias, plan),
        ops.tensors_of(tables),
        [] if by_key is None else list(by_key[:-1]),
        ops.sizes_of(tables, plan.block, pack, entries, lists, grid, in_cells),
    )


def planned(problem: Problem) -> Plan:
    """The plan of a problem: lists of cells or keys that begin where windows do, where these are much shorter than
    tiles, which is so for small windows; a table of biases is read once a pair, and by the numbers of single keys, so
    that smaller tiles serve it too. For gradients without one tiles are as good, because those of k and v are found
    from tiles anyway."""
    listed = None
    if isinstance(problem.bias, RelativeTable):
        listed = problem.plan_of_keys(GRID_BLOCK, "keys")
        if listed is None and isinstance(problem.where, Pattern) and problem.fits(GRID_BLOCK, BLOCK):
            listed = problem.plan(GRID_BLOCK)
    elif problem.bias is None and isinstance(problem.normalizer, Softmax) and not wants_gradients(problem):
        listed = problem.plan_of_keys(GRID_BLOCK, "cells")
    return problem.plan_on_grid(BLOCK, GRID_BLOCK) if listed is None else listed


def _by_key(plan: Plan) -> Plan:
    """The pairs of a plan of cells in tiles, by key, kept with the plan."""
    return plan.derive("by key", lambda: in_tiles(plan).transpose())


def call(problem: Problem, settled: Settled) -> tuple[Tensor, Tensor]:
    """(o, lse) of a problem whose plan is settled: one operator, differentiable."""
    from saccade.softmax.kernels import ops

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    scale = problem.scale
    if scale <= 0:  # the kernels take maxima before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    bias, table = settled.bias, None
    if isinstance(problem.bias, RelativeTable):
        table = problem.bias.table.flatten(1).float()
    elif isinstance(problem.bias, Alibi):
        bias = [problem.bias.slopes.float(), *bias]
    cap = problem.softcap or 0.0
    return ops.attend(q, k, v, problem.sink, table, bias, settled.plan, settled.turned, settled.sizes, scale, cap)


def wants_gradients(problem: Problem) -> bool:
    """Gradients are on, and an input, the sink or a parameter of the bias asks for them."""
    table = problem.bias.table if isinstance(problem.bias, RelativeTable) else None
    inputs = (problem.q, problem.k, problem.v, problem.sink, table)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _pack(plan: Plan, ratio: int) -> int:
    """How many query heads of a key head one program takes: of those that share their lists, as fill its rows."""
    pack = 1
    while plan.block[0] * pack < PACKED and ratio % (2 * pack) == 0 and plan.alike % (2 * pack) == 0:
        pack *= 2
    return pack


def _positions(bias: Bias, plan: Plan) -> list[Tensor]:
    """Where queries and keys stand for a bias, in the plan's order; for a table on each axis, with its extents. Kept
    with the plan.
    """
    key = (_positions, (bias.grid, bias.step, bias.extents) if isinstance(bias, RelativeTable) else None)
    return plan.derive(key, lambda: _placed(bias, plan))


def _placed(bias: Bias, plan: Plan) -> list[Tensor]:
    n, m = plan.num_queries, plan.num_keys
    q_at = (torch.arange(n, device=plan.device) if plan.q_order is None else plan.q_order) + (m - n)
    k_at = torch.arange(m, device=plan.device) if plan.k_order is None else plan.k_order
    if not isinstance(bias, RelativeTable):
        return [q_at.int(), k_at.int()]
    axes = (bias.coordinates(at) for at in (q_at, k_at))
    return [
        *(torch.stack(each).int() for each in axes),
        sent(torch.tensor(bias.extents, dtype=torch.int32), plan.device),
    ]
