"""The kernels as an operator of PyTorch: opaque to compilers, traceable by its shapes, differentiable by formula.

    saccade::linear_scan(q, k, v, g, memory, sums, cu, scale, mass, wide) -> (o, mass, memory, sums, states, state_sums)

memory, sums: float32, before the first token and after the last; sums of keys only with mass. cu: bounds of packed
sequences, int32, or None. wide: o in float32. The last two are kept for the gradients and have none. Empty: unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.scan.kernels.launch import Launch, Sizes, kept_dtype, slots, state_heads


@torch.library.custom_op("saccade::linear_scan", mutates_args=())
def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return Launch(q, k, v, g, cu, scale, mass).forward(memory, sums, torch.float32 if wide else q.dtype)


@linear_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor,
    sums: Tensor | None,
    cu: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, n, d), dv, kept = q.shape, v.shape[3], state_heads(q, k, g)
    size = Sizes.of(d, dv, q.dtype, 0 if g is None else g.ndim - 2)
    sequences, chunks = batch if cu is None else cu.shape[0] - 1, slots(q, cu, size.chunk)

    def single(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    return (
        q.new_empty(batch, heads, n, dv, dtype=torch.float32 if wide else q.dtype),
        single(batch, heads, n if mass else 0),
        single(sequences, kept, d, dv),
        single(*((sequences, kept, d) if mass else (0,))),
        q.new_empty(chunks, kept, d, dv, dtype=kept_dtype(q.dtype)),
        single(*((chunks, kept, d) if mass else (0,))),
    )


@torch.library.custom_op("saccade::linear_scan_backward", mutates_args=())
def _backward(
    do: Tensor,
    dmass: Tensor | None,
    dmemory: Tensor,
    dsums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu: Tensor | None,
    states: Tensor,
    state_sums: Tensor,
    scale: float,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = Launch(q, k, v, g, cu, scale, mass)
    dq, dk, dv, dg, dbefore, dbefore_sums = launch.backward(do, dmass, dmemory, dsums, states, state_sums)
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, dbefore, dbefore_sums


@_backward.register_fake
def _(
    do: Tensor,
    dmass: Any,
    dmemory: Any,
    dsums: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu: Tensor | None,
    states: Tensor,
    state_sums: Tensor,
    scale: float,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences, kept, d = q.shape[0] if cu is None else cu.shape[0] - 1, states.shape[1], q.shape[3]
    memory = q.new_empty(sequences, kept, d, v.shape[3], dtype=torch.float32)
    sums = q.new_empty((sequences, kept, d) if mass else (0,), dtype=torch.float32)
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, memory, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, _, _, cu, ctx.scale, ctx.mass, _ = inputs
    ctx.save_for_backward(q, k, v, g, cu, *output[-2:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, do: Tensor | None, dmass: Tensor | None, dmemory: Tensor | None, dsums: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    q, k, v, g, cu, states, state_sums = ctx.saved_tensors
    (*rows, d), dv, mass = q.shape, v.shape[3], ctx.mass
    kept = q.shape[0] if cu is None else cu.shape[0] - 1, states.shape[1], d
    do = q.new_zeros(*rows, dv) if do is None else do if do.stride(3) == 1 else do.contiguous()
    dmemory = _filled(dmemory, (*kept, dv), q)
    dmass, dsums = (_filled(dmass, tuple(rows), q), _filled(dsums, kept, q)) if mass else (None, None)
    grads = _backward(do, dmass, dmemory, dsums, q, k, v, g, cu, states, state_sums, ctx.scale, mass)
    dq, dk, dv_, dg, dbefore, dbefore_sums = grads
    return dq, dk, dv_, None if g is None else dg, dbefore, dbefore_sums if mass else None, *[None] * 4


def _filled(x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape, dtype=torch.float32) if x is None else x.contiguous()


linear_scan.register_autograd(_gradients, setup_context=_save)
