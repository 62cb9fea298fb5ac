"""The hopper backend: this package's own kernels for GPUs of compute capability 9, forward and backward.

They walk the same lists and boxes as those of `triton`, with copying and multiplying warps of their own. They are
written in Gluon, whose interface changes between versions of Triton: only the version that they were written for runs
them. Their backward pass adds up dq in whatever order programs end; where PyTorch is asked for deterministic
algorithms, `triton` takes its place.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.softmax.merge import absorb
from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem
from saccade.where import Plan

name = "hopper"
differentiable = True
BLOCK = (128, 128)
GRID_BLOCK = (64, 64)
WRITTEN_FOR = "3.6"  # versions of Triton


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    q, found = problem.q, []
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return ["its kernels are compiled for GPUs of compute capability 9"]
    if not version().startswith(WRITTEN_FOR + "."):
        found.append(f"it is written for triton {WRITTEN_FOR}, here is {version() or 'none'}")
    if not isinstance(problem.normalizer, Softmax):
        found.append(f"it normalises by softmax, not {problem.normalizer.name}")
    if problem.bias is not None:
        found.append("it knows no bias")
    if problem.wants_gradients and torch.are_deterministic_algorithms_enabled():
        found.append(
            "its gradients differ in their last bits from run to run, and deterministic algorithms are asked for"
        )
    if found:
        return found
    from saccade.softmax.kernels import hopper_backward, hopper_walk

    supports = hopper_backward.supports if problem.wants_gradients else hopper_walk.supports
    return supports(*_contiguous(problem), planned(problem))


def planned(problem: Problem) -> Plan:
    """The plan of a problem; the backward kernel takes tiles of 128 keys alone."""
    return problem.plan(BLOCK) if problem.wants_gradients else problem.plan_on_grid(BLOCK, GRID_BLOCK)


@functools.cache
def version() -> str:
    """The version of Triton that is installed, or nothing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse)."""
    return call(problem, settle(problem))


class Settled(NamedTuple):
    """What a call needs that no value of q, k or v decides; see `kernels.hopper_ops`.

    orders: of queries, of keys and of queries back, None where they stay.
    """

    walk: list[Tensor]
    by_key: list[Tensor]
    orders: list[Tensor | None]
    sizes: list[int]


def settle(problem: Problem) -> Settled:
    """Plan a problem. With the tables on a GPU the host waits for nothing."""
    from saccade.softmax.kernels import hopper_ops
    from saccade.softmax.kernels.hopper_backward import KeyWalk
    from saccade.softmax.kernels.hopper_walk import Walk

    plan, (q, k, v) = planned(problem), (problem.q, problem.k, problem.v)
    walk = Walk.of(plan, q, k, v)
    by_key = list(KeyWalk.of(plan, q, k, v)) if problem.wants_gradients else []
    orders: list[Tensor | None] = [None] * 3
    if walk.grid is None:
        back = None if plan.q_order is None else torch.argsort(plan.q_order)
        orders = [plan.q_order, plan.k_order, back]
    return Settled(hopper_ops.tensors_of(walk), by_key, orders, hopper_ops.sizes_of(walk))


def call(problem: Problem, settled: Settled) -> tuple[Tensor, Tensor]:
    """(o, lse) of a problem whose plan is settled: one operator, differentiable."""
    from saccade.softmax.kernels import hopper_ops

    q, k, v = _contiguous(problem)
    q_order, k_order, back = settled.orders
    if q_order is not None:
        q = q[:, :, q_order]
    if k_order is not None:
        k, v = k[:, :, k_order], v[:, :, k_order]
    scale = problem.scale
    if scale <= 0:  # the kernels take maxima before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    cap = problem.softcap or 0.0
    o, lse = hopper_ops.attend(q, k, v, settled.walk, settled.by_key, settled.sizes, scale, cap)
    if back is not None:
        o, lse = o[:, :, back], lse[:, :, back]
    return (o, lse) if problem.sink is None else absorb(o, lse, problem.sink)


def _contiguous(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    return q, k, v
