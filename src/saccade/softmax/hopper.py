"""The hopper backend: this package's own kernels for GPUs of compute capability 9, forward and backward.

They walk the same lists and boxes as those of `triton`, with copying and multiplying warps of their own. They are
written in Gluon, whose interface changes between versions of Triton: only the version that they were written for runs
them. Their backward pass adds up dq in whatever order programs end; where PyTorch is asked for deterministic
algorithms, `triton` takes its place.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    from saccade.softmax.kernels import hopper, hopper_backward

    supports = hopper_backward.supports if problem.wants_gradients else hopper.supports
    return supports(*_contiguous(problem), planned(problem))


def planned(problem: Problem) -> Plan:
    """The plan of a problem; without gradients, windows on a grid are cut into smaller tiles, which fit them better."""
    plan = problem.plan(BLOCK)
    if isinstance(problem.where, Plan) or problem.wants_gradients or plan.grid is None or len(plan.grid.cell) < 2:
        return plan
    return problem.plan(GRID_BLOCK)


@functools.cache
def version() -> str:
    """The version of Triton that is installed, or nothing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse)."""
    from saccade.softmax.kernels import hopper

    plan = planned(problem)
    q, k, v = _contiguous(problem)
    q_order, k_order = (None, None) if hopper.grid_of(plan) else (plan.q_order, plan.k_order)
    if q_order is not None:
        q = q[:, :, q_order]
    if k_order is not None:
        k, v = k[:, :, k_order], v[:, :, k_order]
    scale = problem.scale
    if scale <= 0:  # the kernels take maxima before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    o, lse = _Hopper.apply(q, k, v, plan, scale, problem.softcap)
    if q_order is not None:
        back = torch.argsort(q_order)
        o, lse = o[:, :, back], lse[:, :, back]
    return (o, lse) if problem.sink is None else absorb(o, lse, problem.sink)


def _contiguous(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    return q, k, v


class _Hopper(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        from saccade.softmax.kernels import hopper

        o, lse = hopper.forward(q, k, v, plan, scale, softcap)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.scale, ctx.softcap = plan, scale, softcap
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from saccade.softmax.kernels import hopper_backward

        q, k, v, o, lse = ctx.saved_tensors
        grads = hopper_backward.backward(do, dlse.contiguous(), o, lse, q, k, v, ctx.plan, ctx.scale, ctx.softcap)
        return *grads, None, None, None
