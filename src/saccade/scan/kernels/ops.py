"""The kernels as an operator of PyTorch: opaque to compilers, traceable by its shapes, differentiable by formula.

    saccade::linear_scan(q, k, v, g, strength, memory, sums, cu, scale, mass, wide)
        -> (o, mass, memory, sums, starts, start_sums)

strength: only under a decay a token, or None. memory, sums: float32, before the first token and after the last; sums
of keys only with mass. cu: bounds of packed sequences, int32, or None. wide: o in float32. The last two are kept for
the gradients and have none. Empty: unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels.abreast import compile_abreast, trained
from saccade.scan.kernels.launch import Launch, state_heads


@operator("saccade::linear_scan")
def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    strength: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch, dtype = Launch(q, k, v, g, cu, scale, mass, strength), torch.float32 if wide else q.dtype
    gradients = trained(q, k, v, g, strength, memory, sums)
    compile_abreast((launch.variant, gradients), q.device, lambda: launch.trial(memory, sums, dtype, gradients))
    return launch.forward(memory, sums, dtype)


@linear_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    strength: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = Launch(q, k, v, g, cu, scale, mass, strength)
    (batch, _, n, d), heads, dv, kept = q.shape, launch.heads, v.shape[3], state_heads(v, g)

    def single(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    each = (launch.sequences * launch.stretches, heads, d) if launch.stretches > 1 else (0,)
    return (
        q.new_empty(batch, heads, n, dv, dtype=torch.float32 if wide else q.dtype),
        single(batch, heads, n if mass else 0),
        single(launch.sequences, kept, d, dv),
        single(*((launch.sequences, kept, d) if mass else (0,))),
        single(*each, dv) if launch.stretches > 1 else single(0),
        single(*(each if mass else (0,))),
    )


@operator("saccade::linear_scan_backward")
def _backward(
    do: Tensor,
    dmass: Tensor | None,
    dafter: Tensor,
    dafter_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    strength: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    starts: Tensor,
    start_sums: Tensor,
    scale: float,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = Launch(q, k, v, g, cu, scale, mass, strength)
    given = do, dmass, dafter, dafter_sums, memory, sums, starts, start_sums
    compile_abreast((launch.variant, True), q.device, lambda: launch.backward(*given))
    found = launch.backward(*given)
    dq, dk, dv, dg, dbefore, *more = found
    dg, dbefore_sums, dstrength = (q.new_empty(0, dtype=torch.float32) if x is None else x for x in (dg, *more))
    return dq, dk, dv, dg, dbefore, dbefore_sums, dstrength


@_backward.register_fake
def _(
    do: Tensor,
    dmass: Any,
    dafter: Any,
    dafter_sums: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    strength: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    starts: Tensor,
    start_sums: Tensor,
    scale: float,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg, *more = (
        q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (g, sums, strength)
    )
    dsums, dstrength = more
    dq, dk, dv, dmemory = (x.new_empty(x.shape) for x in (q, k, v, memory))
    return dq, dk, dv, dg, dmemory, dsums, dstrength


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, strength, memory, sums, cu, ctx.scale, ctx.mass, _ = inputs
    ctx.save_for_backward(q, k, v, g, strength, memory, sums, cu, *output[-2:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, do: Tensor | None, dmass: Tensor | None, dmemory: Tensor | None, dsums: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    q, k, v, g, strength, memory, sums, cu, starts, start_sums = ctx.saved_tensors
    rows, mass = (q.shape[0], max(q.shape[1], v.shape[1]), q.shape[2]), ctx.mass
    do = q.new_zeros(*rows, v.shape[3]) if do is None else do if do.stride(3) == 1 else do.contiguous()
    dmemory = _filled(dmemory, memory.shape, q)
    dmass, dsums = (_filled(dmass, rows, q), _filled(dsums, sums.shape, q)) if mass else (None, None)
    grads = _backward(
        do, dmass, dmemory, dsums, q, k, v, g, strength, memory, sums, cu, starts, start_sums, ctx.scale, mass
    )
    dq, dk, dv, dg, dbefore, dbefore_sums, dstrength = grads
    dg, dstrength = None if g is None else dg, None if strength is None else dstrength
    return dq, dk, dv, dg, dstrength, dbefore, dbefore_sums if mass else None, *[None] * 4


def _filled(x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape, dtype=torch.float32) if x is None else x.contiguous()


linear_scan.register_autograd(_gradients, setup_context=_save)
_backward.refuse_gradients()
