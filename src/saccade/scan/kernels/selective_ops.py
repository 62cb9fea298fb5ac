"""The kernels of the selective scan as an operator of PyTorch, and what they cannot run.

    saccade::selective(x, delta, A, B, C, before) -> (y, after, starts)

x (batch, N, channels), delta alike, A (channels, S), B, C (batch, N, G, S), before and after (batch, channels, S); y in
float32. starts, kept for the gradients: the states before all stretches of the sequence; empty if there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels.abreast import compile_abreast, trained
from saccade.scan.kernels.join import join_stretches
from saccade.scan.kernels.launch import JOINED, multiprocessors
from saccade.scan.kernels.selective import selective_pull, selective_walk

TOKENS = 16  # a tile
STATES = 512  # of a tile's channels together
LEAST = 8  # tiles that a stretch has
PROGRAMS = 4  # a multiprocessor
WARPS = 4


class Shape(NamedTuple):
    """Of one problem."""

    batch: int
    length: int
    width: int
    groups: int
    states: int

    @classmethod
    def of(cls, x: Tensor, b: Tensor) -> Shape:
        batch, length, width = x.shape
        return cls(batch, length, width, b.shape[2], b.shape[3])

    @property
    def channels(self) -> int:
        """A group."""
        return self.width // self.groups

    @property
    def block(self) -> int:
        """Channels a program."""
        padded = triton.next_power_of_2(self.states)
        return max(1, min(STATES // padded, triton.next_power_of_2(self.channels)))

    @property
    def blocks(self) -> int:
        """Of channels of a group."""
        return triton.cdiv(self.channels, self.block)

    def stretches(self, device: torch.device) -> int:
        """Into how many the tokens are cut, to have programs for every multiprocessor."""
        wanted = PROGRAMS * multiprocessors(device) // (self.batch * self.groups * self.blocks)
        return max(1, min(wanted, self.length // (LEAST * TOKENS)))

    def variant(self, x: Tensor) -> tuple[Any, ...]:
        """What calls have in common that launch the same kernels, but for alignments."""
        return Shape, x.device, x.dtype, self.block, self.states, self.stretches(x.device) == 1

    def grid(self, stretches: int) -> tuple[int, int, int]:
        return self.batch, self.groups * self.blocks, stretches

    @property
    def constants(self) -> dict[str, int]:
        padded = triton.next_power_of_2(self.states)
        return {"T": TOKENS, "BC": self.block, "S": self.states, "PAD": padded, "num_warps": WARPS}


@operator("saccade::selective")
def selective(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.stretches(x.device)
    gradients = trained(x, delta, a, b, c, before)
    compile_abreast((shape.variant(x), gradients), x.device, lambda: trial(gradients, x, delta, a, b, c, before))
    starts = states_before(shape, count, before, x, delta, a, b)
    y, ends = x.new_empty(x.shape, dtype=torch.float32), like_states(shape, count, x)
    sizes = shape.length, shape.groups, shape.channels
    selective_walk[shape.grid(count)](x, delta, a, b, c, starts, ends, None, y, None, *sizes, **shape.constants)
    return y, ends[:, -1].clone(), starts if count > 1 else x.new_empty(0, dtype=torch.float32)


@selective.register_fake
def _(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.stretches(x.device)
    starts = like_states(shape, count, x) if count > 1 else x.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32), torch.empty_like(before), starts


@operator("saccade::selective_backward")
def selective_backward(
    dy: Tensor,
    dafter: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    given = dy, dafter, x, delta, a, b, c, before, starts
    compile_abreast((shape.variant(x), True), x.device, lambda: selective_backward(*given))
    count, sizes = shape.stretches(x.device), (shape.length, shape.groups, shape.channels)
    grid, constants = shape.grid(count), shape.constants
    tiles = triton.cdiv(shape.length, TOKENS)
    marks = x.new_empty(shape.batch, tiles, shape.width, shape.states, dtype=torch.float32)
    starts = starts if count > 1 else before.unsqueeze(1)
    selective_walk[grid](x, delta, a, b, None, starts, None, None, None, marks, *sizes, **constants)
    pulled = dafter.unsqueeze(1)
    if count > 1:
        parts, kept = like_states(shape, count, x), like_states(shape, count, x)
        none = [None] * 5
        selective_pull[grid](None, delta, a, None, c, dy, None, None, parts, kept, *none, *sizes, **constants)
        pulled = joined(shape, count, parts, kept, dafter)
    dx, ddelta = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    da, firsts = like_states(shape, count, x), like_states(shape, count, x)
    db, dc = (x.new_empty(shape.blocks, *b.shape, dtype=torch.float32) for _ in range(2))
    selective_pull[grid](
        x, delta, a, b, c, dy, marks, pulled, firsts, None, dx, ddelta, da, db, dc, *sizes, **constants
    )
    return dx.to(x.dtype), ddelta, da.sum((0, 1)), db.sum(0), dc.sum(0), firsts[:, -1].clone()


@selective_backward.register_fake
def _(
    dy: Tensor,
    dafter: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(z) for z in (x, delta, a, b, c, before))


def trial(gradients: bool, *given: Tensor) -> None:
    """All that a call launches, with results in the place of their gradients."""
    y, after, starts = selective(*given)
    if gradients:
        selective_backward(y, after, *given, starts)


def like_states(shape: Shape, count: int, x: Tensor) -> Tensor:
    return x.new_empty(shape.batch, count, shape.width, shape.states, dtype=torch.float32)


def states_before(shape: Shape, count: int, before: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(batch, stretches, channels, S): the state before each."""
    if count == 1:
        return before.unsqueeze(1)
    parts, kept = like_states(shape, count, x), like_states(shape, count, x)
    sizes = shape.length, shape.groups, shape.channels
    selective_walk[shape.grid(count)](x, delta, a, b, None, None, parts, kept, None, None, *sizes, **shape.constants)
    return joined(shape, count, parts, kept, before)


def joined(shape: Shape, count: int, parts: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """In place, from what each stretch adds and keeps to what is before each."""
    entries = shape.width * shape.states
    join_stretches[(triton.cdiv(entries, JOINED), 1, shape.batch)](
        parts, kept, before, count, D=entries, COLUMNS=1, BLOCK=JOINED
    )
    return parts


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _gradients(ctx: Any, dy: Tensor, dafter: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return selective_backward(dy.contiguous(), dafter.contiguous(), *ctx.saved_tensors)


selective.register_autograd(_gradients, setup_context=_save)
selective_backward.refuse_gradients()
