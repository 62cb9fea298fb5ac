"""The kernels for Hopper as an operator of PyTorch, as `ops` is of the others.

    saccade::attend_hopper(q, k, v, walk, by_key, sizes, scale, cap) -> (o, lse)

walk: the tensors of `Walk`; by_key: those of `KeyWalk`, needed for gradients alone; sizes: the integers of `Walk`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.operators import operator
from saccade.softmax.kernels import hopper, hopper_backward
from saccade.softmax.kernels.hopper_backward import KeyWalk
from saccade.softmax.kernels.hopper_walk import Walk
from saccade.where.grid import Grid


def tensors_of(walk: Walk) -> list[Tensor]:
    """The tensors of a walk, in the order of the operator."""
    return list(walk[:5])


def sizes_of(walk: Walk) -> list[int]:
    """Its integers: the key past all tiles, sizes of a tile, axes, the grid if there is one."""
    axes = () if walk.grid is None else (*walk.grid.lengths, *walk.grid.cell)
    return [walk.far, *walk.block, walk.axes, *axes]


def _walk(tensors: list[Tensor], sizes: list[int]) -> Walk:
    far, bq, bk, axes, *lengths = sizes
    grid = Grid(tuple(lengths[:3]), tuple(lengths[3:])) if lengths else None
    work, indices, lo, hi, coord = tensors
    return Walk(work, indices, lo, hi, coord, far, (bq, bk), axes, grid)


@operator("saccade::attend_hopper")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: list[Tensor],
    by_key: list[Tensor],
    sizes: list[int],
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    return hopper.forward(q, k, v, _walk(walk, sizes), scale, cap or None)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = q.shape
    dv = v.shape[3]
    o = torch.empty_like(q) if dv == d else q.new_empty(batch, heads, n, dv)
    return o, q.new_empty(batch, heads, n, dtype=torch.float32)


@operator("saccade::attend_hopper_backward")
def _attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: list[Tensor],
    by_key: list[Tensor],
    sizes: list[int],
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = KeyWalk(*by_key)
    return hopper_backward.backward(do, dlse, o, lse, q, k, v, _walk(walk, sizes), keys, scale, cap or None)


@_attend_backward.register_fake
def _(do: Any, dlse: Any, o: Any, lse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, walk, by_key, ctx.sizes, ctx.scale, ctx.cap = inputs
    ctx.num_walk = len(walk)
    ctx.save_for_backward(*output, q, k, v, *walk, *by_key)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    o, lse, q, k, v, *rest = ctx.saved_tensors
    walk, by_key = rest[: ctx.num_walk], rest[ctx.num_walk :]
    nothing = ([None] * len(walk), [None] * len(by_key), None, None, None)
    if do is None and dlse is None:
        return None, None, None, *nothing
    do = torch.zeros_like(o) if do is None else do
    dlse = None if dlse is None else dlse.contiguous()
    return *_attend_backward(do, dlse, o, lse, q, k, v, walk, by_key, ctx.sizes, ctx.scale, ctx.cap), *nothing


attend.register_autograd(_gradients, setup_context=_save)
_attend_backward.refuse_gradients()
