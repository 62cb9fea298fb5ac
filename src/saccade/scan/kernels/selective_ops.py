"""The kernels of the selective scan as an operator of PyTorch, and what they cannot run.

    saccade::selective(x, delta, A, B, C, before, bias, D, z, softplus) -> (y, after, starts)

x (batch, N, channels), delta, z and y alike, A (channels, S), B, C (batch, N, G, S), before and after (batch, channels,
S), bias and D (channels,); bias, D, z and before may be None. starts, kept for the gradients: (batch, stretches, S,
channels), the states before all stretches of a sequence; empty if there is one.

Where batch and channels do not fill the chip a sequence is cut. All stretches but the last are walked at once, each as
if nothing were before it. Of the first that is the result; what the others add gives the states before all but the
first, which are walked again from there, at once with the last. Behind a gate, of many stretches, the first pass finds
states alone, and all are walked again.
"""

from __future__ import annotations

from functools import partial
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
    """With `enough` programs a multiprocessor sequences are taken whole; else cut, until `wanted` run at a time."""

    enough: int
    wanted: int


ROUND = 4  # tokens that are unrolled; before each round are the states that gradients start from
WALK = Tile(1, 32)  # a lane a channel
PULL = Tile(4, 8)  # four lanes a channel: fewer exchanges where sums over channels are formed
REGISTERS = 255  # or the assembler makes do with 128, and loads wait for those that become free
STATES = 512  # of a program's channels together, at most
LEAST = 128  # tokens that a stretch has
WALKED = Cut(3, 4)  # a program for each of its schedulers
CROWDED = 4  # with so many stretches at a time, two for each: twice as many take 1.8 times as long a token
PULLED = Cut(7, 16)  # which waits longer for each token


class Way(NamedTuple):
    """How tokens are gone through: the tile of a program, and stretches.

    once: the first of several is walked once, and the others twice by the same kernel, the first time from nothing; or
    else all but the last are walked for their states first. Means nothing for the gradients.
    """

    tile: Tile
    count: int
    once: bool = True


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

    def way(self, device: torch.device, gated: bool) -> Way:
        """Of a walk. A gate is a third of its work: a kernel without it finds the states of many stretches."""
        tile = self.fitted(WALK)
        again = self._stretches(tile, WALKED, device)
        if again >= CROWDED:
            again = self._stretches(tile, WALKED._replace(wanted=2 * WALKED.wanted), device)
            if gated:
                return Way(tile, again, once=False)
        return Way(tile, 1 if again == 1 else 1 + again)

    def way_back(self, device: torch.device) -> Way:
        """Of the gradients."""
        tile = self.fitted(PULL)
        return Way(tile, self._stretches(tile, PULLED, device))

    def _stretches(self, tile: Tile, cut: Cut, device: torch.device) -> int:
        """At once."""
        programs, count = self.rows * self.blocks(tile), multiprocessors(device)
        if programs >= cut.enough * count:
            return 1
        return max(1, min(cut.wanted * count // programs, self.length // LEAST))

    def variant(self, given: Inputs) -> tuple[Any, ...]:
        """What calls have in common that launch the same kernels, but for alignments."""
        kinds = tuple(t.dtype if isinstance(t, Tensor) else t for t in given)
        way, back = self.way(given.x.device, given.z is not None), self.way_back(given.x.device)
        cut = way.count == 1, way.once, back.count == 1
        return given.x.device, kinds, self.width, self.groups, self.states, self.length % ROUND == 0, way.tile, cut

    def grid(self, tile: Tile, stretches: int) -> tuple[int, int]:
        return self.rows * self.blocks(tile), stretches

    def sizes(self, count: int) -> tuple[int, int]:
        """Tokens in all, and of a stretch."""
        return self.length, triton.cdiv(triton.cdiv(self.length, ROUND), count) * ROUND

    def constants(self, tile: Tile) -> dict[str, int]:
        """Of a kernel."""
        return {
            "T": ROUND,
            "EVEN": self.length % ROUND == 0,
            "WIDTH": self.width,
            "G": self.groups,
            "S": self.states,
            "PAD": self.padded,
            "L": tile.lanes,
            "num_warps": 1,
            "maxnreg": REGISTERS,
        }


def walk(
    shape: Shape,
    way: Way,
    given: Inputs,
    stretches: range,
    *,
    begun: int,
    first: Tensor | None,
    last: Tensor | None = None,
    kept: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    steps: Tensor | None = None,
    pulls: Tensor | None = None,
    marks: Tensor | None = None,
) -> None:
    """`selective_walk` over some stretches."""
    c, direct, z = (None, None, None) if y is None else (given.c, given.direct, given.z)
    selective_walk[shape.grid(way.tile, len(stretches))](
        given.x, given.delta, z, dy, given.rates, given.b, c, given.bias, direct, first, last, kept, y, steps, pulls,
        marks, *shape.sizes(way.count), stretches.start, way.count, begun, BACK=False, SOFTPLUS=given.softplus,
        **shape.constants(way.tile),
    )  # fmt: skip


@operator("saccade::selective")
def selective(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = x, delta, a, b, c, before, bias, direct, z
    shape, gradients = Shape.of(x, b), trained(*tensors)
    given = Inputs(x, delta, turned(a), b, c, bias, direct, z, softplus)
    compile_abreast(
        (shape.variant(given), before is None, gradients), x.device, lambda: trial(gradients, *tensors, softplus)
    )
    way, y = shape.way(x.device, z is not None), torch.empty_like(x)
    over = partial(walk, shape, way, given, y=y)
    before, ends = None if before is None else turned(before), like_states(shape, way.count, x)
    if way.count == 1:
        over(range(1), begun=1, first=before, last=ends)
        return y, turned(ends[:, -1]), x.new_empty(0, dtype=torch.float32)
    starts, kept = torch.empty_like(ends), torch.empty_like(ends)
    find = over if way.once else partial(walk, shape, way, given)
    find(range(way.count - 1), begun=1, first=before, last=starts, kept=kept)
    join(shape, way.count, starts, kept, before)
    if way.once:
        over(range(1, way.count), begun=way.count, first=starts, last=ends, kept=kept)
    else:
        # Nobody needs `kept` again, but without it the assembler has loads waited for, 6 % of the time.
        over(range(way.count), begun=way.count, first=starts, last=ends, kept=kept)
    return y, turned(ends[:, -1]), starts


@selective.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape.of(x, b)
    count = shape.way(x.device, z is not None).count
    starts = like_states(shape, count, x) if count > 1 else x.new_empty(0, dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(shape.batch, *a.shape, dtype=torch.float32), starts


@operator("saccade::selective_backward")
def selective_backward(
    dy: Tensor,
    dafter: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In the order of the arguments of `selective`; empty for those that are None."""
    shape, given = Shape.of(x, b), Inputs(x, delta, turned(a), b, c, bias, direct, z, softplus)
    arguments = dy, dafter, x, delta, a, b, c, before, bias, direct, z, softplus, starts
    compile_abreast((shape.variant(given), before is None, True), x.device, lambda: selective_backward(*arguments))
    way, back = shape.way(x.device, z is not None), shape.way_back(x.device)

    def single(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    marks = single(shape.batch, triton.cdiv(shape.length, ROUND), shape.states, shape.width)
    steps = single(*x.shape) if softplus or bias is not None else None
    dz, pulls = (None, None) if z is None else (torch.empty_like(z), single(*x.shape))
    gated = None if z is None else dy
    known = starts if way.count > 1 else None if before is None else turned(before)
    walk(
        shape, way, given, range(way.count), begun=way.count, first=known, y=dz, dy=gated, steps=steps, pulls=pulls,
        marks=marks,
    )  # fmt: skip
    steps, pulls = delta if steps is None else steps, dy if pulls is None else pulls

    pulled = pulled_after(shape, back, turned(dafter), given, steps, pulls)
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    da, firsts = like_states(shape, back.count, x), like_states(shape, back.count, x)
    db, dc = (single(shape.blocks(back.tile), *b.shape) for _ in range(2))
    dbias, ddirect = (None if t is None else single(shape.batch, back.count, shape.width) for t in (bias, direct))
    selective_pull[shape.grid(back.tile, back.count)](
        x, delta, steps, given.rates, given.b, given.c, bias, direct, pulls, marks, pulled, firsts, dx, ddelta, da,
        db, dc, dbias, ddirect, *shape.sizes(back.count), SOFTPLUS=softplus, K=back.tile.blocks,
        **shape.constants(back.tile),
    )  # fmt: skip
    db, dc = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    dbias, ddirect = (
        single(0) if t is None or parts is None else parts.sum((0, 1)).to(t.dtype)
        for t, parts in ((bias, dbias), (direct, ddirect))
    )
    dz = single(0) if dz is None else dz
    dbefore = single(0) if before is None else turned(firsts[:, -1])
    return dx, ddelta, turned(da.sum((0, 1))), db, dc, dbefore, dbias, ddirect, dz


@selective_backward.register_fake
def _(
    dy: Tensor,
    dafter: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    before: Tensor | None,
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


def pulled_after(shape: Shape, way: Way, after: Tensor, given: Inputs, steps: Tensor, pulls: Tensor) -> Tensor:
    """(batch, stretches, S, channels): the gradient of the state after each, last first; after turned likewise.

    Without sums over channels, so in the tile of a walk.
    """
    if way.count == 1:
        return after
    parts, kept = (like_states(shape, way.count, after) for _ in range(2))
    tile = shape.fitted(WALK)
    selective_walk[shape.grid(tile, way.count - 1)](
        pulls, steps, None, None, given.rates, given.c, None, None, None, None, parts, kept, None, None, None, None,
        *shape.sizes(way.count), 0, way.count, 0, BACK=True, SOFTPLUS=False, **shape.constants(tile),
    )  # fmt: skip
    join(shape, way.count, parts, kept, after)
    return parts


def join(shape: Shape, count: int, parts: Tensor, kept: Tensor, before: Tensor | None) -> None:
    """In place, from what each stretch adds and keeps to what is before each; of the last nothing is asked."""
    entries = shape.width * shape.states
    join_stretches[(triton.cdiv(entries, JOINED), 1, shape.batch)](
        parts, kept, before, count, D=entries, COLUMNS=1, BLOCK=JOINED
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor, dafter: Tensor, _: Tensor) -> tuple[Any, ...]:
    *given, starts = ctx.saved_tensors
    found = selective_backward(dy.contiguous(), dafter.contiguous(), *given, ctx.softplus, starts)
    return *(None if t is None else dt for t, dt in zip(given, found, strict=True)), None


selective.register_autograd(_gradients, setup_context=_save)
selective_backward.refuse_gradients()
