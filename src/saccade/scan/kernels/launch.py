"""Launching the walk: which sizes it takes for which problem, buffers, grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.scan.kernels.abreast import later
from saccade.scan.kernels.flows import channel_flows, head_flows, token_flows
from saccade.scan.kernels.join import join_stretches
from saccade.scan.kernels.prepare import prepare_sums, prepare_tokens
from saccade.scan.kernels.tiles import SAFE, Bounds, Cuts, Heads, States
from saccade.scan.kernels.together import one_by_one, together
from saccade.scan.kernels.walk import scan_walk

LEAST_CHUNKS = 8  # that a stretch has: all but the last of a sequence are read twice where there is more than one
LONGEST = 128  # chunks of it, if it is walked twice anyway
ANCHORED = 256  # tokens between the states that the gradient of a gate starts from; a chunk where digits are to be kept
NARROW = 32  # channels of a chunk that one warp holds
MIXED_WARPS = 8  # of walks over harmful chunks: half of what 4 keep in local memory, compiled in two thirds of the time
ROWS = 16  # tokens of which one program adds up what heads that share a key give to its gradient
JOINED = 1024  # entries of a state that one program carries from stretch to stretch


class Tile(NamedTuple):
    """Channels of values that a program takes, its warps, and the chunks whose loads are in flight."""

    values: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """Tokens a chunk, and the tiles of a walk over K channels that are summed and V that are kept."""

    chunk: int
    tile: Tile

    @classmethod
    def of(cls, k: int, v: int, dtype: torch.dtype, gate: int) -> Sizes:
        """gate: 0 (none), 1 (a token), 2 (a token and summed channel), 3 (a token and kept channel)."""
        k, v = padded(k), padded(v)
        if dtype != torch.bfloat16:  # factors of 4 bytes: as many as fit
            return cls(32, Tile(min(v, 32), 4, 1))
        if k > 128:
            return cls(64, Tile(min(v, 128), 8, 2))
        # Under a decay a token and more than 64 channels two programs with three stages have no room beside each other.
        return cls(64, Tile(min(v, 64), 4, 2 if gate > 1 or (gate and k > 64) else 3))


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def state_heads(v: Tensor, g: Tensor | None) -> int:
    return v.shape[1] if g is None else g.shape[1]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Prepared(NamedTuple):
    """q, k and g as the walks take them: with the decays inside a chunk in them, under a decay a channel."""

    q: Tensor
    k: Tensor
    reads: Tensor
    keys: Tensor
    gates: Tensor | None
    bounds: Bounds | None

    def raw(self, x: Tensor | None) -> Tensor | None:
        """What x was before, where it is one of the two."""
        return None if self.bounds is None else self.q if x is self.reads else self.k if x is self.keys else None

    def any_steep(self) -> bool:
        """Whether "mixed" walks may have something to do. Waits for the device.

        Half of a chunk decays by no more than its sums of gates span, with the 0 that they start from.
        """
        if self.bounds is not None:
            chunks = self.bounds.decay.shape[0]
            return bool(self.bounds.harmful[:, : chunks * self.bounds.parts].cpu().any())  # behind those it is padded
        if self.gates is None:
            return False
        least, most = self.gates.aminmax()
        return not bool(least - most.clamp(min=0) > -SAFE.value)  # written so that a gate that is no number counts


class Anchors(NamedTuple):
    """States (anchors, H, K, V) and their rows of sums (anchors, H, V), if any; from number `ends` on after the last
    chunk of each sequence. past (anchors, H, V): what flows past each."""

    states: Tensor
    rows: Tensor | None
    past: Tensor
    ends: int


@dataclass(frozen=True)
class Problem:
    """One problem. g: (B, heads, N) or (B, heads, N, D), or None; cu: bounds of packed sequences, int32, or None.

    v may have more heads than k, and then q as many as k or as v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    cu: Tensor | None
    scale: float

    @property
    def gate(self) -> int:
        return 0 if self.g is None else self.g.ndim - 2

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.q.shape[3], self.v.shape[3], self.q.dtype, self.gate)

    @property
    def heads(self) -> int:
        """Of what is read."""
        return max(self.q.shape[1], self.v.shape[1])

    @property
    def memories(self) -> int:
        """How many a sequence has."""
        return state_heads(self.v, self.g)

    @property
    def fan(self) -> int:
        """Heads that read one memory."""
        return self.heads // self.memories

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu is None else self.cu.shape[0] - 1

    @property
    def chunks(self) -> int:
        """Of all sequences; for packed ones as many as there can be, which the host knows without reading them."""
        batch, _, length, _ = self.q.shape
        chunk = self.sizes.chunk
        return batch * -(-length // chunk) if self.cu is None else length // chunk + self.cu.shape[0] - 1

    @property
    def cuts(self) -> Cuts:
        batch, _, length, _ = self.q.shape
        if self.cu is None:
            return Cuts(length, batch)
        last = (-(-self.cu.diff() // self.sizes.chunk)).cumsum(0)
        first = torch.cat([last.new_zeros(1), last[:-1]])
        seq_of = torch.searchsorted(last, torch.arange(self.chunks, device=last.device), right=True)
        return Cuts(length, self.sequences, self.cu, first.int(), seq_of.int())

    @property
    def every(self) -> int:
        """Chunks between the states that the gradient of a gate starts from."""
        return 1 if self.exact else max(1, ANCHORED // self.sizes.chunk)

    @property
    def exact(self) -> bool:
        """Whether pairs are taken by levels throughout, which costs more products and loses no digits."""
        return self.q.dtype == torch.float32

    @property
    def kind(self) -> torch.dtype:
        """Of factors. What decays and sums over a sequence make of tokens may leave the range of float16."""
        return torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32

    @property
    def variant(self) -> tuple[Any, ...]:
        """What calls have in common that launch the same kernels: all that is told the compiler, but for alignments."""
        (_, _, length, d), g = self.q.shape, self.g
        return (
            type(self), self.q.device, self.q.dtype, d, self.v.shape[3], self.fan,
            *(self.heads // x.shape[1] for x in (self.q, self.k, self.v)),
            length % self.sizes.chunk == 0, self.gate, None if g is None else g.dtype, self.cu is None, self.scale == 1,
        )  # fmt: skip

    @property
    def products(self) -> dict[str, Any]:
        """The same for the kernels, and how factors are multiplied."""
        kind = tl.bfloat16 if self.kind == torch.bfloat16 else tl.float32
        return {"KIND": kind, "PRECISION": "ieee" if self.exact else "tf32"}

    def prepared(self, cuts: Cuts) -> Prepared:
        """Queries, keys and gates as the walks take them."""
        q, k, g = self.q, self.k, self.g
        if g is None or self.exact:
            return Prepared(q, k, q, k, g, None)
        chunk, (batch, _, length, d) = self.sizes.chunk, q.shape
        heads, kept = self.heads, g.shape[1]
        parts = triton.cdiv(d, 2 * NARROW)
        grid = (self.chunks, kept)
        if self.gate == 1:
            sums = self.single(batch, kept, length)
            prepare_sums[grid](Heads.of(g, kept), Heads.of(sums, kept), cuts, C=chunk, num_warps=1)
            return Prepared(q, k, q, k, sums, None)
        reads, keys = (q.new_empty(batch, n, length, d, dtype=self.kind) for n in (heads, kept))
        harmful = q.new_empty(kept, -(-self.chunks * parts // 16) * 16, dtype=torch.int32)
        bounds = Bounds(self.single(*grid, 2, d), harmful, harmful.shape[1], kept, d, parts, heads // kept)
        prepare_tokens[(*grid, parts)](
            Heads.of(g, kept), Heads.of(q, heads), Heads.of(k, kept), Heads.of(reads, heads), Heads.of(keys, kept),
            bounds, cuts, self.fan, D=d, C=chunk, BD=2 * NARROW, num_warps=2,
        )  # fmt: skip
        return Prepared(q, k, reads, keys, g, bounds)

    def single(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)


@dataclass(frozen=True)
class Launch(Problem):
    """Linear attention, in which each query head walks by itself. mass: also what it reads of the sum of keys.

    strength (B, Hkv, N): factors of what tokens write, under a decay a token; None for 1.
    """

    mass: bool
    strength: Tensor | None = None

    @property
    def stretches(self) -> int:
        """Into how many a sequence is cut, to have a program for every multiprocessor, or two that take turns."""
        return 1 if self.whole or self.narrow else self._cut

    @property
    def stretches_back(self) -> int:
        """The same for gradients."""
        return 1 if self.narrow else self._cut if self.stretches == 1 else self.stretches

    @property
    def _wanted(self) -> int:
        programs = multiprocessors(self.q.device) * (2 if self.paired else 1)
        return programs // (self.sequences * self.heads * triton.cdiv(self.v.shape[3], self.sizes.tile.values))

    @property
    def paired(self) -> bool:
        """Whether two programs take turns on a multiprocessor: those with a gate whose states leave room for both."""
        return self.g is not None and self.sizes.tile.warps == 4

    @property
    def _cut(self) -> int:
        length = self.chunks // self.sequences
        wanted = self._wanted
        if self.gate == 1 and wanted > 2:  # some may be steep and take half as long again: the last to be done, if long
            wanted *= -(-length // (wanted * LONGEST))
        return max(1, min(wanted, length // LEAST_CHUNKS))

    @property
    def whole(self) -> bool:
        """Whether programs forward take a sequence whole though there are fewer than two for each multiprocessor.

        Cut in two, one half would be read twice, and a program whose loads are ahead needs no other beside it.
        """
        return self.paired and not self.exact and self._wanted == 2

    @property
    def narrow(self) -> bool:
        """Whether programs take half the values, so that a sequence need not be cut in two.

        Those do that stop at anchors, where they wait for loads, and those of short sequences; with a decay a channel,
        whose chunks weigh more, it is no faster.
        """
        return self.paired and self.gate == 1 and not self.exact and self._cut == 2

    def tile(self, k: int, v: int, gate: int, reverse: bool, anchored: bool) -> Tile:
        """Of a walk over K channels that are summed and V that are kept; anchored: that stops at anchors."""
        tile = Sizes.of(k, v, self.q.dtype, gate).tile
        if tile.values > 64 and (anchored or (gate == 1 and reverse and self.scale != 1)):
            return tile._replace(values=64)  # those hold more: what anchors ask for, values with the scale in them
        if self.narrow and (anchored or not self.whole):
            return tile._replace(values=max(16, tile.values // 2))
        if anchored or self.exact or k > 128 or (reverse and gate != 1):
            return tile
        # With three stages or more loads run a chunk ahead: for a program that is alone on its multiprocessor, or of
        # which two still fit. What walks back holds more beside them.
        ahead = {0: 4, 1: 3 if self.whole or k <= 64 else 2, 2: 3}
        return tile._replace(stages=ahead.get(gate, tile.stages))

    @property
    def variant(self) -> tuple[Any, ...]:
        given = None if self.strength is None else self.strength.dtype
        cut = self.stretches == 1, self.stretches_back == 1
        return (*super().variant, self.mass, given, self.whole, self.narrow, *cut)

    def trial(self, memory: Tensor, memory_sums: Tensor | None, dtype: torch.dtype, gradients: bool) -> None:
        """All that a call launches, with results in the place of their gradients."""
        o, found, after, after_sums, starts, start_sums = self.forward(memory, memory_sums, dtype)
        if gradients:
            mass, sums = (found, after_sums) if self.mass else (None, None)
            with later():
                self.backward(o, mass, after, sums, memory, memory_sums, starts, start_sums)

    def forward(
        self, memory: Tensor, memory_sums: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """o in `dtype` and mass; memory and sums after the last token; both before every stretch, empty if one.

        memory (sequences, heads, D, DV) and, with `mass`, memory_sums (sequences, heads, D), float32: before the first.
        """
        q, v = self.q, self.v
        cuts = self.cuts
        made = self.prepared(cuts)
        before, before_sums = self.each_head(memory), self.each_head(memory_sums)
        count = self.stretches
        starts, start_sums = self.starts(made, made.keys, v, before, before_sums, None, cuts, count, False)
        batch, _, length, d = q.shape
        o = q.new_empty(batch, self.heads, length, v.shape[3], dtype=dtype)
        mass = self.single(batch, self.heads, length if self.mass else 0)
        after = self.single(self.sequences, self.heads, d, v.shape[3])
        after_sums = self.single(*after.shape[:3]) if self.mass else self.single(0)
        self.walk(
            (made.reads, made.keys, v), made, self.gate, cuts, count, o=o, mass=mass, first=starts,
            first_row=start_sums, last=after, last_row=after_sums, column=self.mass, strength=self.strength,
        )  # fmt: skip
        if self.fan > 1:
            after, after_sums = (x[:, :: self.fan].contiguous() if x.ndim > 1 else x for x in (after, after_sums))
        if count == 1:
            return o, mass, after, after_sums, self.single(0), self.single(0)
        return o, mass, after, after_sums, starts, start_sums if self.mass else self.single(0)

    def backward(
        self, do: Tensor, dmass: Tensor | None, dafter: Tensor, dafter_sums: Tensor | None, memory: Tensor,
        memory_sums: Tensor | None, starts: Tensor, start_sums: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of q, k, v, g, of memory and sums before the first token, and of the strength."""
        q, k, v, g = self.q, self.k, self.v, self.g
        heads, (batch, _, _, d), dv_width = self.heads, q.shape, v.shape[3]
        do = do.to(q.dtype)  # which every walk would do by itself
        cuts = self.cuts
        made = self.prepared(cuts)
        count = self.stretches_back
        if self.stretches == 1:
            before, before_sums = self.each_head(memory), self.each_head(memory_sums)
            starts, start_sums = self.starts(made, made.keys, v, before, before_sums, None, cuts, count, False)
        ends, end_sums = self.first_head(dafter), self.first_head(dafter_sums)
        ends, end_sums = self.starts(made, made.reads, do, ends, end_sums, dmass, cuts, count, True)
        across = 0 if g is None else 1 if self.gate == 1 else 3

        # Of each head its own; those that heads share are added up afterwards, in float32 and in order. Under a decay a
        # token what that takes is reading them, so they are as narrow as factors are.
        parts = self.kind if self.gate == 1 else torch.float32
        done = [x.shape[1] == heads for x in (q, k, v)]
        done[1] = done[1] and self.strength is None
        dq, dk, dv = (
            x.new_empty(batch, heads, *x.shape[2:], dtype=x.dtype if whole else torch.float32 if x is v else parts)
            for x, whole in zip((q, k, v), done, strict=True)
        )
        dreads, dkeys = (dq, dk) if self.gate < 2 else (x.new_empty(x.shape, dtype=self.kind) for x in (dq, dk))
        anchors = None if g is None else self.anchors(dv_width, d)
        before = self.single(self.sequences, heads, d, dv_width)
        before_sums = self.single(*before.shape[:3]) if self.mass else None

        reads = partial(
            self.walk, (do, v, made.keys), made, across, cuts, count, o=dreads, first=starts.mT, first_row=start_sums,
            a_row=dmass, row=self.mass, anchors=anchors, strength=self.strength,
            last=None if anchors is None else anchors.states[anchors.ends :],
            last_row=None if anchors is None or anchors.rows is None else anchors.rows[anchors.ends :],
        )  # fmt: skip
        keys = partial(
            self.walk, (v, do, made.reads), made, across, cuts, count, True, o=dkeys, first=ends.mT, first_row=end_sums,
            b_row=dmass, row=self.mass, anchors=anchors, last=before.mT, last_row=before_sums,
        )  # fmt: skip
        values = partial(
            self.walk, (made.keys, made.reads, do), made, self.gate, cuts, count, True, o=dv, first=ends,
            strength=self.strength,
        )  # fmt: skip
        dg = dstrength = flows = None
        if anchors is not None and self.gate == 1:
            flows, (dq, dk, dg, dstrength) = self.token_gradients(cuts, anchors, dq, dk)
        self.at_once(one_by_one(reads, keys, flows), values)
        if anchors is not None and self.gate > 1:
            dg = self.channel_gradient(made, cuts, anchors, (dreads, dkeys), (dq, dk))
        dq, dk, dv = (shared(x, y.shape[1]).to(q.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
        dg, dstrength = (
            None if x is None or y is None else shared(x, y.shape[1]).to(y.dtype)
            for x, y in ((dg, g), (dstrength, self.strength))
        )
        states = heads // self.fan
        before, before_sums = shared(before, states), None if before_sums is None else shared(before_sums, states)
        return dq, dk, dv, dg, before, before_sums, dstrength

    def anchors(self, k: int, v: int) -> Anchors:
        """Room for them, for states of (k, v) channels."""
        heads, ends = self.heads, self.chunks // self.every + self.sequences + 1
        count = ends + self.sequences
        rows, past = self.single(count, heads, v) if self.mass else None, self.single(count, heads, v)
        return Anchors(self.single(count, heads, k, v), rows, past, ends)

    def token_gradients(
        self, cuts: Cuts, anchors: Anchors, dq: Tensor, dk: Tensor
    ) -> tuple[Callable[[], None], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """What launches, and then those of q, k, a gate a token and the strength.

        dq, dk: of each head, which are added up over the heads that share them; dk still without the strength.
        """
        batch, heads, length, d = dq.shape
        groups = self.k.shape[1]
        whole = self.q.shape[1] == heads
        dq_all = None if whole else self.q.new_empty(batch, groups, length, d)
        dk_all = None if groups == heads and self.strength is None else self.k.new_empty(batch, groups, length, d)
        flow, dg = (self.single(batch, heads, length) for _ in range(2))
        dstrength = None if self.strength is None else self.single(batch, heads, length)

        def launch() -> None:
            width = padded(d)
            head_flows[(batch * triton.cdiv(length, ROWS), groups)](
                *self.of(self.q, self.k, dq, dk, self.strength, dq_all, dk_all, dstrength, flow), length,
                heads // groups, V=d, BV=width, ROWS=ROWS, num_warps=8,
            )  # fmt: skip
            chunk, every = self.sizes.chunk, self.every
            spans = triton.cdiv(length, chunk * every)
            token_flows[(self.sequences * spans, heads)](
                *self.of(flow), anchors.past, *self.of(dg), cuts, spans, anchors.ends, V=d, C=chunk, BV=width,
                EVERY=every, num_warps=1,
            )  # fmt: skip

        return launch, (dq if dq_all is None else dq_all, dk if dk_all is None else dk_all, dg, dstrength)

    def channel_gradient(
        self,
        made: Prepared,
        cuts: Cuts,
        anchors: Anchors,
        prepared: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
    ) -> Tensor:
        """dg a head for a decay a channel; the gradients of q and k are made from those of prepared tokens."""
        heads, (batch, _, length, d) = self.heads, self.q.shape
        chunk, every = self.sizes.chunk, self.every
        spans = triton.cdiv(length, chunk * every)

        dg = self.single(batch, heads, length, d)
        width = NARROW // 2  # of twice as many arrays
        channel_flows[(self.sequences * spans * triton.cdiv(d, width), heads)](
            *self.of(self.q, self.k, made.reads, made.keys, *prepared, made.gates), made.bounds, anchors.past,
            *self.of(*grads, dg), cuts, spans, anchors.ends, V=d, C=chunk, BV=width, EVERY=every,
            MADE=made.bounds is not None, num_warps=1,
        )  # fmt: skip
        return dg

    def of(self, *tensors: Tensor | None) -> list[Heads | None]:
        """For programs of a head each."""
        return [None if x is None else Heads.of(x, self.heads) for x in tensors]

    def each_head(self, x: Tensor | None) -> Tensor | None:
        """(sequences, heads, ...) -> (sequences, H, ...), contiguous."""
        return x if x is None else (x.repeat_interleave(self.fan, 1) if self.fan > 1 else x).contiguous()

    def first_head(self, x: Tensor | None) -> Tensor | None:
        """The same for what belongs to a state once, not to every query head: zeros for the others."""
        if x is None or self.fan == 1:
            return None if x is None else x.contiguous()
        wide = x.new_zeros(x.shape[0], self.heads, *x.shape[2:])
        wide[:, :: self.fan] = x
        return wide

    def starts(
        self, made: Prepared, b: Tensor, y: Tensor, before: Tensor | None, before_sums: Tensor | None, m: Tensor | None,
        cuts: Cuts, count: int, reverse: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        """State and sums before each of `count` stretches, in the order of the walk: those before the first, if one.

        More are walked over twice: for what each adds and keeps first, which then is joined.
        """
        heads = self.heads
        if count == 1:
            return before, before_sums
        d, dv = b.shape[3], y.shape[3]
        parts = self.single(self.sequences * count, heads, d, dv)
        part_sums = self.single(*parts.shape[:3]) if self.mass else None
        left = self.single(*parts.shape[:3])
        self.walk(
            (None, b, y), made, self.gate, cuts, count, reverse, last=parts, last_row=part_sums, left=left, b_row=m,
            column=self.mass, strength=None if reverse else self.strength,
        )  # fmt: skip
        for each, start, columns in ((parts, before, dv), (part_sums, before_sums, 1))[: 1 + self.mass]:
            join_stretches[(triton.cdiv(d * columns, JOINED), heads, self.sequences)](
                each, left, start, count, D=d, COLUMNS=columns, BLOCK=JOINED
            )
        return parts, part_sums

    def walk(
        self,
        streams: tuple[Tensor | None, Tensor, Tensor],
        made: Prepared,
        gate: int,
        cuts: Cuts,
        stretches: int,
        reverse: bool = False,
        *,
        o: Tensor | None = None,
        mass: Tensor | None = None,
        first: Tensor | None = None,
        first_row: Tensor | None = None,
        last: Tensor | None = None,
        last_row: Tensor | None = None,
        left: Tensor | None = None,
        a_row: Tensor | None = None,
        b_row: Tensor | None = None,
        column: bool = False,
        row: bool = False,
        anchors: Anchors | None = None,
        strength: Tensor | None = None,
    ) -> None:
        """`scan_walk` over all sequences and heads; what it is given and writes, see there."""
        a, b, y = streams
        heads, (k, v) = self.heads, (b.shape[3], y.shape[3])
        chunk, tile = self.sizes.chunk, self.tile(k, v, gate, reverse, anchors is not None)
        states, rows, past, ends = (None, None, None, 0) if anchors is None else anchors
        raw = (made.raw(x) for x in streams)
        given = (
            *self.of(*streams, *raw, made.gates), made.bounds, *self.of(strength, a_row, b_row),
            None if first is None else States.of(first), first_row, None if last is None else States.of(last), last_row,
            left, *self.of(o, mass), states, rows, past, cuts, self.scale, stretches, ends,
        )  # fmt: skip

        def launch(split: str) -> None:
            warps = max(tile.warps, MIXED_WARPS) if split == "mixed" and gate > 1 else tile.warps
            kernel = scan_walk.seldom(made.any_steep) if split == "mixed" else scan_walk
            kernel[(triton.cdiv(v, tile.values) * self.sequences * stretches, heads)](
                *given, K=k, V=v, C=chunk, BK=padded(k), BV=tile.values, GATE=gate, REVERSE=reverse, READ=a is not None,
                MASS=column, ROW=row, UNIT=self.scale == 1, EVERY=self.every, SPLIT=split,
                LEVELS=chunk.bit_length() - 1, num_warps=warps, num_stages=tile.stages, **self.products,
            )  # fmt: skip

        self.at_once(*(partial(launch, split) for split in self.splits(gate, a is not None)))

    def at_once(self, *launches: Callable[[], None]) -> None:
        """`together` under a decay a token, where each alone would leave much of the device idle at its end.

        Under a decay a channel strong stretches are few or none, and what else there is fills it.
        """
        if self.gate == 1:
            together(self.q.device, *launches)
        else:
            for each in launches:
                each()

    def splits(self, gate: int, read: bool) -> list[str]:
        """The kernels of a walk, see `scan_walk`; what is not read has no pairs, which a decay a token spares.

        Stretches under strong decays may be few, and each takes as long as any, so those come first.
        """
        if self.exact:
            return ["none"]
        return ["mixed", "made"] if gate > 1 or (gate == 1 and read) else ["made"]


def shared(x: Tensor, heads: int) -> Tensor:
    """(B, H, ...) added up to (B, heads, ...)."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
