"""The kernels of the selective scan as an operator of PyTorch, and what they cannot run.

    saccade::selective(x, delta, A, B, C, before, bias, D, z, softplus) -> (y, after, starts)

x (batch, N, channels), delta, z and y alike, A (channels, S), B, C (batch, N, G, S), before and after (batch, channels,
S), bias and D (channels,), any of these two and z None. starts, kept for the gradients: (batch, stretches, S,
channels), the states before all stretches of the sequence; empty if there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels.abreast import compile_abreast, later, trained
from saccade.scan.kernels.join import join_stretches
from saccade.scan.kernels.launch import JOINED, multiprocessors
from saccade.scan.kernels.selective import selective_pull, selective_walk


class Tile(NamedTuple):
    """Channels of a program: `blocks` times `lanes`."""

    blocks: int
    lanes: int


class Cut(NamedTuple):
    """With `enough` programs a multiprocessor sequences are taken whole; else they are cut until there are `wanted`."""

    enough: int
    wanted: int


UNROLLED = 8  # tokens, of a walk, and from a load to its use; a multiple of MARKED
WALK = Tile(1, 32)  # a lane a channel
MARKED = 4  # tokens between the states that gradients start from
PULL = Tile(4, 8)  # four lanes a channel: fewer exchanges where sums over channels are formed
STATES = 512  # of a program's channels together, at most
LEAST = 128  # tokens that a stretch has
WALKED = Cut(3, 16)  # a stretch is walked twice
PULLED = Cut(7, 16)  # which waits longer for each token


class Way(NamedTuple):
    """How tokens are gone through: the tile of a program, and stretches."""

    tile: Tile
    count: int


class Inputs(NamedTuple):
    """Of the kernels; rates: A with its states first."""

    x: Tensor
    delta: Tensor
    rates: Tensor
    b: Tensor
    c: Tensor
    bias: Tensor | None
    direct: Tensor | None
    z: Tensor | None
    softplus: bool


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

    @property
    def rows(self) -> int:
        """Groups of all sequences."""
        return self.batch * self.groups

    def way(self, device: torch.device) -> Way:
        """Of a walk."""
        return self._way(self.fitted(WALK), WALKED, device)

    def way_back(self, device: torch.device) -> Way:
        """Of the gradients."""
        return self._way(self.fitted(PULL), PULLED, device)

    def _way(self, tile: Tile, cut: Cut, device: torch.device) -> Way:
        programs, count = self.rows * self.blocks(tile), multiprocessors(device)
        if programs >= cut.enough * count:
            return Way(tile, 1)
        return Way(tile, max(1, min(cut.wanted * count // programs, self.length // LEAST)))

    def variant(self, given: Inputs) -> tuple[Any, ...]:
        """What calls have in common that launch the same kernels, but for alignments."""
        kinds = tuple(t.dtype if isinstance(t, Tensor) else t for t in given)
        (tile, count), back = self.way(given.x.device), self.way_back(given.x.device)
        even = self.length % MARKED == 0, self.length % UNROLLED == 0
        return given.x.device, kinds, self.width, self.groups, self.states, even, tile, count == 1, back.count == 1

    def grid(self, way: Way) -> tuple[int, int]:
        return self.rows * self.blocks(way.tile), way.count

    def sizes(self, count: int) -> tuple[int, int]:
        """Tokens in all, and of a stretch."""
        return self.length, triton.cdiv(triton.cdiv(self.length, UNROLLED), count) * UNROLLED

    def constants(self, tile: Tile, tokens: int) -> dict[str, int]:
        """Of a kernel that unrolls so many tokens."""
        return {
            "T": tokens,
            "EVEN": self.length % tokens == 0,
            "WIDTH": self.width,
            "G": self.groups,
            "S": self.states,
            "PAD": self.padded,
            "K": tile.blocks,
            "L": tile.lanes,
            "num_warps": 1,
        }


def walk(
    shape: Shape,
    way: Way,
    given: Inputs,
    *,
    first: Tensor | None,
    last: Tensor | None = None,
    kept: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    steps: Tensor | None = None,
    pulls: Tensor | None = None,
    marks: Tensor | None = None,
) -> None:
    """`selective_walk`."""
    c, direct, z = (None, None, None) if y is None else (given.c, given.direct, given.z)
    selective_walk[shape.grid(way)](
        given.x, given.delta, z, dy, given.rates, given.b, c, given.bias, direct, first, last, kept, y, steps, pulls,
        marks, *shape.sizes(way.count), EVERY=MARKED, SOFTPLUS=given.softplus,
        **shape.constants(way.tile, UNROLLED),
    )  # fmt: skip


@operator("saccade::selective")
def selective(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = x, delta, a, b, c, before, bias, direct, z
    shape, gradients = Shape.of(x, b), trained(*tensors)
    given = Inputs(x, delta, turned(a), b, c, bias, direct, z, softplus)
    compile_abreast((shape.variant(given), gradients), x.device, lambda: trial(gradients, *tensors, softplus))
    way = shape.way(x.device)
    starts = states_before(shape, way, turned(before), given)
    y, ends = torch.empty_like(x), like_states(shape, way.count, x)
    walk(shape, way, given, first=starts, last=ends, y=y)
    return y, turned(ends[:, -1]), starts if way.count > 1 else x.new_empty(0, dtype=torch.float32)


@selective.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.way(x.device).count
    starts = like_states(shape, count, x) if count > 1 else x.new_empty(0, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(before), starts


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
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In the order of the arguments of `selective`; empty for those that are None."""
    shape, given = Shape.of(x, b), Inputs(x, delta, turned(a), b, c, bias, direct, z, softplus)
    arguments = dy, dafter, x, delta, a, b, c, before, bias, direct, z, softplus, starts
    compile_abreast((shape.variant(given), True), x.device, lambda: selective_backward(*arguments))
    way, back = shape.way(x.device), shape.way_back(x.device)
    starts = starts if way.count > 1 else turned(before).unsqueeze(1)

    def single(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    marks = single(shape.batch, triton.cdiv(shape.length, MARKED), shape.states, shape.width)
    steps = single(*x.shape) if softplus or bias is not None else None
    dz, pulls = (None, None) if z is None else (torch.empty_like(z), single(*x.shape))
    gated = None if z is None else dy
    walk(shape, way, given, first=starts, y=dz, dy=gated, steps=steps, pulls=pulls, marks=marks)
    steps, pulls = delta if steps is None else steps, dy if pulls is None else pulls

    pulled = pulled_after(shape, back, turned(dafter), given, steps, pulls)
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    da, firsts = like_states(shape, back.count, x), like_states(shape, back.count, x)
    db, dc = (single(shape.blocks(back.tile), *b.shape) for _ in range(2))
    dbias, ddirect = (None if t is None else single(shape.batch, back.count, shape.width) for t in (bias, direct))
    selective_pull[shape.grid(back)](
        x, delta, steps, given.rates, given.b, given.c, bias, direct, pulls, marks, pulled, firsts, None, dx, ddelta,
        da, db, dc, dbias, ddirect, *shape.sizes(back.count), SOFTPLUS=softplus, **shape.constants(back.tile, MARKED),
    )  # fmt: skip
    db, dc = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    dbias, ddirect = (
        single(0) if t is None or parts is None else parts.sum((0, 1)).to(t.dtype)
        for t, parts in ((bias, dbias), (direct, ddirect))
    )
    dz = single(0) if dz is None else dz
    return dx, ddelta, turned(da.sum((0, 1))), db, dc, turned(firsts[:, -1]), dbias, ddirect, dz


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
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    given = x, delta, a, b, c, before, bias, direct, z
    return tuple(x.new_empty(0, dtype=torch.float32) if t is None else torch.empty_like(t) for t in given)


def trial(gradients: bool, *given: Any) -> None:
    """All that a call launches, with results in the place of their gradients."""
    y, after, starts = selective(*given)
    if gradients:
        with later():
            selective_backward(y, after, *given, starts)


def turned(states: Tensor) -> Tensor:
    """(..., channels, S) as (..., S, channels) and the reverse; a copy also where one of the sizes is 1."""
    return states.mT.clone(memory_format=torch.contiguous_format)


def like_states(shape: Shape, count: int, x: Tensor) -> Tensor:
    return x.new_empty(shape.batch, count, shape.states, shape.width, dtype=torch.float32)


def states_before(shape: Shape, way: Way, before: Tensor, given: Inputs) -> Tensor:
    """(batch, stretches, S, channels): the state before each; before turned likewise."""
    if way.count == 1:
        return before
    parts, kept = (like_states(shape, way.count, before) for _ in range(2))
    walk(shape, way, given, first=None, last=parts, kept=kept)
    return joined(shape, way.count, parts, kept, before)


def pulled_after(shape: Shape, way: Way, after: Tensor, given: Inputs, steps: Tensor, pulls: Tensor) -> Tensor:
    """The same for gradients: without sums over channels, so in the tile of a walk."""
    if way.count == 1:
        return after
    parts, kept = (like_states(shape, way.count, after) for _ in range(2))
    tile = shape.fitted(WALK)
    selective_pull[shape.grid(Way(tile, way.count))](
        None, None, steps, given.rates, None, given.c, None, None, pulls, None, None, parts, kept, *[None] * 7,
        *shape.sizes(way.count), SOFTPLUS=False, **shape.constants(tile, UNROLLED),
    )  # fmt: skip
    return joined(shape, way.count, parts, kept, after)


def joined(shape: Shape, count: int, parts: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """In place, from what each stretch adds and keeps to what is before each."""
    entries = shape.width * shape.states
    join_stretches[(triton.cdiv(entries, JOINED), 1, shape.batch)](
        parts, kept, before, count, D=entries, COLUMNS=1, BLOCK=JOINED
    )
    return parts


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor, dafter: Tensor, _: Tensor) -> tuple[Any, ...]:
    *given, starts = ctx.saved_tensors
    found = selective_backward(dy.contiguous(), dafter.contiguous(), *given, ctx.softplus, starts)
    return *(None if t is None else dt for t, dt in zip(given, found, strict=True)), None


selective.register_autograd(_gradients, setup_context=_save)
selective_backward.refuse_gradients()
