"""The delta rule's kernels as an operator of PyTorch, as `ops` for linear attention.

    saccade::delta_scan(q, k, v, beta, g, memory, cu, scale) -> (o, memory, found)

memory: float32, before the first token and after the last. cu: bounds of packed sequences, int32, or None. found, kept
for the gradients: what was `Solved` of every chunk, and what of stretches was `Joined`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels.abreast import compile_abreast, trained
from saccade.scan.kernels.delta_launch import DeltaLaunch, Joined, Solved


@operator("saccade::delta_scan")
def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor,
    cu: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    launch = DeltaLaunch(q, k, v, g, cu, scale, beta)
    gradients = trained(q, k, v, beta, g, memory)
    compile_abreast((launch.variant, gradients), q.device, lambda: launch.trial(memory, gradients))
    o, after, found, joined = launch.forward(memory, q.dtype)
    return o, after, [*found, *joined]


@delta_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor,
    cu: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    launch = DeltaLaunch(q, k, v, g, cu, scale, beta)
    found = [*launch.room, *launch.unjoined]
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape), found


@operator("saccade::delta_scan_backward")
def _backward(
    do: Tensor,
    dafter: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor,
    cu: Tensor | None,
    found: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = DeltaLaunch(q, k, v, g, cu, scale, beta)
    given = do, dafter, memory, Solved(*found[:3]), Joined(*found[3:])
    compile_abreast((launch.variant, True), q.device, lambda: launch.backward(*given))
    dq, dk, dv, dbeta, dg, dmemory = launch.backward(*given)
    return dq, dk, dv, dbeta, q.new_empty(0, dtype=torch.float32) if dg is None else dg, dmemory


@_backward.register_fake
def _(
    do: Tensor,
    dafter: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor,
    cu: Tensor | None,
    found: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = q.new_empty(0, dtype=torch.float32) if g is None else g.new_empty(g.shape)
    dq, dk, dv, dbeta, dmemory = (x.new_empty(x.shape) for x in (q, k, v, beta, memory))
    return dq, dk, dv, dbeta, dg, dmemory


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dafter: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, beta, g, memory, cu, *found = ctx.saved_tensors
    do = q.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do if do.stride(3) == 1 else do.contiguous()
    dafter = torch.zeros_like(memory) if dafter is None else dafter.contiguous()
    dq, dk, dv, dbeta, dg, dmemory = _backward(do, dafter, q, k, v, beta, g, memory, cu, found, ctx.scale)
    return dq, dk, dv, dbeta, None if g is None else dg, dmemory, None, None


delta_scan.register_autograd(_gradients, setup_context=_save)
_backward.refuse_gradients()
