"""The kernels of the selective scan as an operator of PyTorch, and what they cannot run.

    saccade::selective(x, delta, A, B, C, before, wide) -> (y, after, starts)

x (batch, N, channels), delta alike, A (channels, S), B, C (batch, N, G, S), before and after (batch, channels, S); y in
the dtype of x, or float32 if `wide`. starts, kept for the gradients: (batch, stretches, S, channels), the states before
all stretches of the sequence; empty if there is one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels.abreast import compile_abreast, trained
from saccade.scan.kernels.join import join_stretches
from saccade.scan.kernels.launch import JOINED, multiprocessors
from saccade.scan.kernels.selective import selective_pull, selective_walk


class Tile(NamedTuple):
    """Channels of a program: `blocks` times `lanes`."""

    blocks: int
    lanes: int


UNROLLED = 4  # tokens, of a walk
AHEAD = 4  # tokens that are loaded before they are needed
WALK = Tile(1, 32)  # a lane a channel
MARKED = 4  # tokens between the states that gradients start from
PULL = Tile(4, 8)  # four lanes a channel: fewer exchanges where sums over channels are formed
STATES = 512  # of a program's channels together, at most
LEAST = 128  # tokens that a stretch has
PROGRAMS = 8  # a multiprocessor


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
    def padded(self) -> int:
        """States, for a tile."""
        return triton.next_power_of_2(self.states)

    def fitted(self, tile: Tile) -> Tile:
        """As much of it as there are channels in a group, and as states fit."""
        channels, padded = triton.next_power_of_2(self.channels), self.padded
        lanes = max(1, min(tile.lanes, channels, STATES // padded))
        return Tile(max(1, min(tile.blocks, channels // lanes, STATES // (padded * lanes))), lanes)

    def blocks(self, tile: Tile) -> int:
        """Programs a group."""
        return triton.cdiv(self.channels, tile.blocks * tile.lanes)

    def stretches(self, device: torch.device) -> int:
        """Into how many the tokens are cut, to have programs for every multiprocessor."""
        wanted = PROGRAMS * multiprocessors(device) // (self.batch * self.groups * self.blocks(self.fitted(WALK)))
        return max(1, min(wanted, self.length // LEAST))

    def variant(self, x: Tensor, delta: Tensor, b: Tensor, c: Tensor, y: torch.dtype) -> tuple[Any, ...]:
        """What calls have in common that launch the same kernels, but for alignments."""
        dtypes = *(z.dtype for z in (x, delta, b, c)), y
        return Shape, x.device, dtypes, self.width, self.groups, self.states, self.stretches(x.device) == 1

    def grid(self, tile: Tile, stretches: int) -> tuple[int, int]:
        return self.batch * self.groups * self.blocks(tile), stretches

    def sizes(self, stretches: int) -> tuple[int, int]:
        """Tokens in all, and of a stretch."""
        step = math.lcm(MARKED, UNROLLED)
        return self.length, triton.cdiv(triton.cdiv(self.length, step), stretches) * step

    def constants(self, tile: Tile) -> dict[str, int]:
        return {
            "WIDTH": self.width,
            "G": self.groups,
            "S": self.states,
            "PAD": self.padded,
            "K": tile.blocks,
            "L": tile.lanes,
            "num_warps": 1,
        }


def walk(shape: Shape, count: int, tokens: int, *given: Tensor | None) -> None:
    """`selective_walk`, `tokens` of which are unrolled."""
    tile = shape.fitted(WALK)
    constants = {"T": tokens, "AHEAD": AHEAD} | shape.constants(tile)
    selective_walk[shape.grid(tile, count)](*given, *shape.sizes(count), **constants)


def pull(shape: Shape, count: int, *given: Tensor | None) -> None:
    """`selective_pull`; where only states are wanted, no sums over channels, in the tiles of the walk."""
    tile = shape.fitted(WALK if given[0] is None else PULL)
    selective_pull[shape.grid(tile, count)](*given, *shape.sizes(count), T=MARKED, **shape.constants(tile))


@operator("saccade::selective")
def selective(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, before: Tensor, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.stretches(x.device)
    gradients = trained(x, delta, a, b, c, before)
    dtype = torch.float32 if wide else x.dtype
    kind = shape.variant(x, delta, b, c, dtype), gradients
    compile_abreast(kind, x.device, lambda: trial(gradients, x, delta, a, b, c, before, wide))
    rates, before = turned(a), turned(before)
    starts = states_before(shape, count, before, x, delta, rates, b)
    y, ends = x.new_empty(x.shape, dtype=dtype), like_states(shape, count, x)
    walk(shape, count, UNROLLED, x, delta, rates, b, c, starts, ends, None, y, None)
    return y, turned(ends[:, -1]), starts if count > 1 else x.new_empty(0, dtype=torch.float32)


@selective.register_fake
def _(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, before: Tensor, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.stretches(x.device)
    starts = like_states(shape, count, x) if count > 1 else x.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype), torch.empty_like(before), starts


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
    compile_abreast((shape.variant(x, delta, b, c, dy.dtype), True), x.device, lambda: selective_backward(*given))
    count = shape.stretches(x.device)
    rates, pulled = turned(a), turned(dafter)
    tiles = triton.cdiv(shape.length, MARKED)
    marks = x.new_empty(shape.batch, tiles, shape.states, shape.width, dtype=torch.float32)
    starts = starts if count > 1 else turned(before).unsqueeze(1)
    walk(shape, count, MARKED, x, delta, rates, b, None, starts, None, None, None, marks)
    if count > 1:
        parts, kept = like_states(shape, count, x), like_states(shape, count, x)
        pull(shape, count, None, delta, rates, None, c, dy, None, None, parts, kept, *[None] * 5)
        pulled = joined(shape, count, parts, kept, pulled)
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    da, firsts = like_states(shape, count, x), like_states(shape, count, x)
    db, dc = (x.new_empty(shape.blocks(shape.fitted(PULL)), *b.shape, dtype=torch.float32) for _ in range(2))
    pull(shape, count, x, delta, rates, b, c, dy, marks, pulled, firsts, None, dx, ddelta, da, db, dc)
    db, dc = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    return dx, ddelta, turned(da.sum((0, 1))), db, dc, turned(firsts[:, -1])


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


def trial(gradients: bool, *given: Any) -> None:
    """All that a call launches, with results in the place of their gradients."""
    y, after, starts = selective(*given)
    if gradients:
        selective_backward(y, after, *given[:-1], starts)


def turned(states: Tensor) -> Tensor:
    """(..., channels, S) as (..., S, channels) and the reverse; a copy also where one of the sizes is 1."""
    return states.mT.clone(memory_format=torch.contiguous_format)


def like_states(shape: Shape, count: int, x: Tensor) -> Tensor:
    return x.new_empty(shape.batch, count, shape.states, shape.width, dtype=torch.float32)


def states_before(
    shape: Shape, count: int, before: Tensor, x: Tensor, delta: Tensor, rates: Tensor, b: Tensor
) -> Tensor:
    """(batch, stretches, S, channels): the state before each; before and rates turned likewise."""
    if count == 1:
        return before
    parts, kept = like_states(shape, count, x), like_states(shape, count, x)
    walk(shape, count, UNROLLED, x, delta, rates, b, None, None, parts, kept, None, None)
    return joined(shape, count, parts, kept, before)


def joined(shape: Shape, count: int, parts: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """In place, from what each stretch adds and keeps to what is before each."""
    entries = shape.width * shape.states
    join_stretches[(triton.cdiv(entries, JOINED), 1, shape.batch)](
        parts, kept, before, count, D=entries, COLUMNS=1, BLOCK=JOINED
    )
    return parts


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])


def _gradients(ctx: Any, dy: Tensor, dafter: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *selective_backward(dy.contiguous(), dafter.contiguous(), *ctx.saved_tensors), None


selective.register_autograd(_gradients, setup_context=_save)
selective_backward.refuse_gradients()
