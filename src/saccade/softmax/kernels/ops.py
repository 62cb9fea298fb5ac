"""The kernels as an operator of PyTorch: opaque to compilers, traceable by its shapes, differentiable by formula.

    saccade::attend(q, k, v, sink, table, bias, plan, turned, sizes, scale, cap) -> (o, lse)

table: the values of a relative table; bias: the other tensors of a `Table` or of `Slopes`; plan: the tensors of
`Tables`; turned: those of the transposed `ByKey`, needed for gradients alone; sizes: the integers of them all. Tensors
and numbers, nothing else, so that a graph that holds a call can be captured, compiled and exported.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from saccade.operators import operator
from saccade.softmax.kernels.arguments import ByKey, Scores, Slopes, Table, Tables
from saccade.softmax.kernels.launch import Launch, summary_rows
from saccade.where.grid import Grid

LOG2E = 1.4426950408889634
PLAN = [name for name, kind in get_type_hints(Tables).items() if kind is not int]
NUMBERS = [name for name in Tables._fields if name not in PLAN]


def tensors_of(tables: Tables) -> list[Tensor | None]:
    """The tensors of a plan, in the order of the operator."""
    return [getattr(tables, name) for name in PLAN]


def sizes_of(
    tables: Tables, block: tuple[int, int], pack: int, table: int, num_lists: int, grid: Grid | None, anywhere: bool
) -> list[int]:
    """All integers of a call: of the tables, tile sizes, packed heads, entries of a relative table, transposed lists a
    group, whether cells begin anywhere on a grid, the grid.
    """
    axes = [] if grid is None else [*grid.lengths, *grid.cell]
    return [*(getattr(tables, name) for name in NUMBERS), *block, pack, table, num_lists, int(anywhere), *axes]


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    table: Tensor | None,
    bias: list[Tensor],
    plan: list[Tensor | None],
    sizes: list[int],
    scale: float,
    cap: float,
) -> Launch:
    numbers = dict(zip(NUMBERS, sizes, strict=False))
    bq, bk, pack, size, _, anywhere, *axes = sizes[len(NUMBERS) :]
    half = len(axes) // 2
    grid = Grid(tuple(axes[:half]), tuple(axes[half:])) if axes else None
    tables = Tables(**dict(zip(PLAN, plan, strict=True)), **numbers)  # type: ignore[arg-type]
    relative = None if table is None else Table(table, size, *bias)
    slopes = Slopes(*bias) if table is None and bias else None
    scores = Scores(scale * LOG2E, cap * LOG2E if cap else None, sink, relative, slopes)
    return Launch(q, k, v, scores, tables, (bq, bk), pack, grid, bool(anywhere))


@operator("saccade::attend")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    table: Tensor | None,
    bias: list[Tensor],
    plan: list[Tensor | None],
    turned: list[Tensor | None],
    sizes: list[int],
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, v, sink, table, bias, plan, sizes, scale, cap).forward()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = q.shape
    dv = v.shape[3]
    o = torch.empty_like(q) if dv == d else q.new_empty(batch, heads, n, dv)
    return o, q.new_empty(batch, heads, n, dtype=torch.float32)


@operator("saccade::attend_backward")
def _attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    table: Tensor | None,
    bias: list[Tensor],
    plan: list[Tensor | None],
    turned: list[Tensor | None],
    sizes: list[int],
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = _launch(q, k, v, sink, table, bias, plan, sizes, scale, cap)
    by_key = ByKey(*turned, num_lists=sizes[len(NUMBERS) + 4])  # type: ignore[misc, arg-type, call-arg]
    dq, dk, dv, dtable, summary = launch.backward(do, dlse, o, lse, by_key)
    return dq, dk, dv, q.new_zeros(0, dtype=torch.float32) if dtable is None else dtable, summary


@_attend_backward.register_fake
def _(
    do: Any,
    dlse: Any,
    o: Any,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Any,
    table: Tensor | None,
    bias: Any,
    plan: Any,
    turned: Any,
    sizes: list[int],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtable = q.new_empty(0 if table is None else table.shape, dtype=torch.float32)
    summary = lse.new_empty(*lse.shape[:2], summary_rows(lse.shape[2], sizes[len(NUMBERS)]), 2)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dtable, summary


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, table, bias, plan, turned, ctx.sizes, ctx.scale, ctx.cap = inputs
    kept = [*output, q, k, v, sink, table, *bias, *plan, *turned]
    ctx.lengths = len(bias), len(plan)
    ctx.save_for_backward(*kept)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    o, lse, q, k, v, sink, table, *rest = ctx.saved_tensors
    of_bias, of_plan = ctx.lengths
    bias, plan, turned = rest[:of_bias], rest[of_bias : of_bias + of_plan], rest[of_bias + of_plan :]
    nothing = (_none(bias), _none(plan), _none(turned), None, None, None)
    if do is None and dlse is None:
        return None, None, None, None, None, *nothing
    do = torch.zeros_like(o) if do is None else do if do.stride(3) == 1 else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dtable, summary = _attend_backward(
        do, dlse, o, lse, q, k, v, sink, table, bias, plan, turned, ctx.sizes, ctx.scale, ctx.cap
    )
    dsink = None
    if sink is not None:  # the sink's share of a row has no value, so its dp is zero
        share = (sink.float()[:, None] * LOG2E - summary[..., 0]).exp2()
        dsink = -(share * summary[..., 1]).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, dsink, None if table is None else dtable, *nothing


def _none(given: list[Any]) -> list[None] | None:
    """The gradient of a list that asks for none, in the form that PyTorch expects for its kind of list."""
    return [None] * len(given) if all(isinstance(x, Tensor) for x in given) else None


attend.register_autograd(_gradients, setup_context=_save)
_attend_backward.refuse_gradients()
