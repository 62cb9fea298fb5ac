"""Launching the kernels of the delta rule: sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.scan.kernels.abreast import later
from saccade.scan.kernels.delta import delta_gradients, delta_join, delta_prepare, delta_walk, delta_walk_back
from saccade.scan.kernels.launch import Problem, Sizes, Tile, multiprocessors, padded, shared
from saccade.scan.kernels.tiles import Cuts, Heads

ROOM = 200 * 1024  # bytes of shared memory for what is loaded ahead; what is moved between warps needs some besides
RUN_AHEAD = 3  # chunks whose loads are under way, or at hand
WIDEST = 64  # channels that a program without a walk takes at a time
FEWEST = 3  # stretches: as each is walked twice, two would save nothing
SHORTEST = 16  # chunks that a stretch has: with fewer, joining takes as long as is saved
MOST = 32  # stretches: they are joined one after the other, each in about the time of a chunk


def delta_heads(k: Tensor, beta: Tensor, g: Tensor | None) -> int:
    """How many memories a sequence has."""
    return max(k.shape[1], beta.shape[1], 0 if g is None else g.shape[1])


class Solved(NamedTuple):
    """What chunks of C tokens have that depends on no state.

    t (B, heads, N, C): the inverse of the system, times beta. scores (B, H, N, C): the products of q and k, decayed and
    scaled. edges (2, B, heads, N), float32, of which there are none without a gate: what is left of the start at each
    token, and of each token at the end.
    """

    t: Tensor
    scores: Tensor
    edges: Tensor


class Joined(NamedTuple):
    """Stretches of sequences, walked side by side; without entries where a sequence is walked in one.

    starts (sequences stretches, heads, D, Dv): the state before each. parts (sequences stretches, heads, D, Dv + D):
    what each adds to it, and its map of it. float32.
    """

    starts: Tensor
    parts: Tensor


@dataclass(frozen=True)
class DeltaLaunch(Problem):
    """The delta rule, without a vector gate; query heads that share a memory walk with it. beta (B, heads, N)."""

    beta: Tensor

    @property
    def memories(self) -> int:
        return delta_heads(self.k, self.beta, self.g)

    @cached_property
    def sizes(self) -> Sizes:
        """Those of linear attention, with what the walk holds besides in mind.

        In bfloat16 never fewer than 64 channels of values a program, the rows that a product has at least where its
        first factor comes from registers. Over more than 128 channels of keys eight warps hold the state: twice as many
        values give each four of them rows of their own, where several query heads leave the registers for it. Loads run
        as far ahead as shared memory has room.
        """
        d, dv = self.q.shape[3], self.v.shape[3]
        chunk, tile = Sizes.of(d, dv, self.q.dtype, 1)
        if self.kind != torch.bfloat16:
            return Sizes(chunk, Tile(min(tile.values, 32), 8, 1))
        wide = padded(d)
        values = 128 if self.fan == 1 and wide > 128 and dv > 64 else 64
        # k, t; q, scores and do of each query head
        held = 2 * chunk * (wide + chunk + self.fan * (wide + chunk + values))
        return Sizes(chunk, Tile(values, tile.warps, max(1, min(RUN_AHEAD, ROOM // held))))

    @cached_property
    def stretches(self) -> int:
        """Into how many a sequence is cut, to have a program for every multiprocessor, where that pays."""
        wanted = multiprocessors(self.q.device) // (self.sequences * self.memories * self.tiles(self.v.shape[3]))
        cut = min(wanted, self.chunks // (self.sequences * SHORTEST), MOST)
        return 1 if cut < FEWEST else cut

    @property
    def variant(self) -> tuple[Any, ...]:
        return (*super().variant, self.stretches == 1)

    def trial(self, memory: Tensor, gradients: bool) -> None:
        """All that a call launches, with results in the place of their gradients."""
        o, after, found, joined = self.forward(memory, self.q.dtype)
        if gradients:
            with later():
                self.backward(o, after, memory, found, joined)

    def forward(self, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Solved, Joined]:
        """o in `dtype`, the memory after the last token, and what `solved` and `joined` found.

        memory: (sequences, heads, D, Dv), float32.
        """
        cuts = self.cuts
        found = self.solved(self.prepared(cuts).gates, cuts)
        joined = self.joined(found, memory, cuts)
        q, v = self.q, self.v
        o = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
        last = torch.empty_like(memory)
        self.walk_forward(found, self.starts(joined, memory), cuts, o=o, last=last)
        return o, last, found, joined

    def backward(
        self, do: Tensor, dafter: Tensor, memory: Tensor, found: Solved, joined: Joined
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of q, k, v, beta, g, and of the memory before the first token."""
        q, k, v, g, heads = self.q, self.k, self.v, self.g, self.memories
        batch, _, length, d = q.shape
        dv_width = v.shape[3]
        do = do.to(q.dtype)
        cuts, chunks = self.cuts, self.chunks
        u, y = (q.new_empty(batch, heads, length, dv_width, dtype=self.kind) for _ in range(2))
        states, dstates = (q.new_empty(chunks, heads, dv_width, d, dtype=self.kind) for _ in range(2))
        self.walk_forward(found, self.starts(joined, memory), cuts, u=u, states=states)
        before = torch.empty_like(memory)
        if self.stretches > 1:
            added, ends = (torch.empty_like(joined.starts) for _ in range(2))
            self.walk_back(found, do, None, cuts, added)
            self.join(joined.parts, added, dafter, ends, back=True)
            dafter = ends
        self.walk_back(found, do, dafter, cuts, before, y=y, dstates=dstates)

        # Of each memory its own; those that share a key are added up afterwards, in float32 and in order.
        dq = q.new_empty(q.shape)
        dk = k.new_empty(batch, heads, length, d, dtype=k.dtype if heads == k.shape[1] else torch.float32)
        dbeta = self.single(batch, heads, length)
        dg = self.single(batch, heads, length) if self.gate else None
        gates = self.prepared(cuts).gates
        delta_gradients[(chunks, heads)](
            *self.of(q, k, v, self.beta, gates, do, u, y), self.edges(found), states, dstates,
            *self.of(dq, dk, dbeta, dg), cuts, self.scale, V=dv_width, SUMS=not self.exact, WHOLE=self.whole,
            **self.blocks, **self.constants,
        )  # fmt: skip
        dk, dv = (shared(z, k.shape[1]).to(q.dtype) for z in (dk, y))
        dbeta = shared(dbeta, self.beta.shape[1]).to(self.beta.dtype)
        if g is not None and dg is not None:
            dg = shared(dg, g.shape[1]).to(g.dtype)
        return dq, dk, dv, dbeta, dg, before

    def solved(self, gates: Tensor | None, cuts: Cuts) -> Solved:
        """What all chunks have that depends on no state; gates as `prepared` leaves them.

        The inverse is rounded to the dtype of its products in the end, so that in bfloat16 11 bits are enough on the
        way.
        """
        found = self.room
        delta_prepare[(self.chunks, self.memories)](
            *self.of(self.q, self.k, self.beta, gates, found.t, found.scores), self.edges(found), cuts, self.scale,
            BK=min(padded(self.q.shape[3]), WIDEST), SUMS=not self.exact, LEVELS=self.sizes.chunk.bit_length() - 1,
            EXACTLY=self.inverses, num_warps=4, num_stages=self.ahead, **self.packed, **self.constants,
        )  # fmt: skip
        return found

    @property
    def room(self) -> Solved:
        """For that."""
        batch, heads, length, _ = self.q.shape
        t, scores = (
            self.q.new_empty(batch, n, length, self.sizes.chunk, dtype=self.kind) for n in (self.memories, heads)
        )
        return Solved(t, scores, self.single(2 if self.gate else 0, batch, self.memories, length))

    def edges(self, found: Solved) -> tuple[Heads | None, ...] | None:
        """The same for the kernels."""
        return tuple(self.of(*found.edges)) if self.gate else None

    def joined(self, found: Solved, memory: Tensor, cuts: Cuts) -> Joined:
        """What stretches have before they are walked from their states."""
        joined = self.unjoined
        if self.stretches > 1:
            self.walk_forward(found, None, cuts, last=joined.parts)
            self.join(joined.parts, joined.parts, memory, joined.starts)
        return joined

    @property
    def unjoined(self) -> Joined:
        """Room for that."""
        d, dv = self.q.shape[3], self.v.shape[3]
        count = self.sequences * self.stretches if self.stretches > 1 else 0
        return Joined(*(self.single(count, self.memories, d, width) for width in (dv, dv + d)))

    def starts(self, joined: Joined, memory: Tensor) -> Tensor:
        """States before all stretches."""
        return memory if self.stretches == 1 else joined.starts

    def join(self, parts: Tensor, added: Tensor, first: Tensor, starts: Tensor, back: bool = False) -> None:
        """`delta_join` over all sequences and memories. A state is not rounded as factors are."""
        d, dv, tile = self.q.shape[3], self.v.shape[3], self.sizes.tile
        values = min(tile.values, WIDEST)
        delta_join[(triton.cdiv(dv, values), self.memories, self.sequences)](
            parts, added, first, starts, self.stretches, K=d, V=dv, W=added.shape[3], BK=padded(d), BV=values,
            BLOCK=min(padded(d), values), BACK=back, PRECISION="ieee" if self.exact else "tf32x3",
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip

    def walk_forward(
        self,
        found: Solved,
        first: Tensor | None,
        cuts: Cuts,
        *,
        o: Tensor | None = None,
        last: Tensor | None = None,
        u: Tensor | None = None,
        states: Tensor | None = None,
    ) -> None:
        """`delta_walk` over all stretches and memories."""
        width = self.v.shape[3] + (self.q.shape[3] if first is None else 0)
        delta_walk[(self.tiles(width) * self.sequences * self.stretches, self.memories)](
            *self.of(self.q, self.k, self.v, found.t, found.scores), self.edges(found), first, last, *self.of(o, u),
            states, cuts, self.scale, self.stretches, W=width, **self.walk_constants,
        )  # fmt: skip

    def walk_back(
        self,
        found: Solved,
        do: Tensor,
        dlast: Tensor | None,
        cuts: Cuts,
        dfirst: Tensor,
        *,
        y: Tensor | None = None,
        dstates: Tensor | None = None,
    ) -> None:
        """`delta_walk_back` over all stretches and memories."""
        delta_walk_back[(self.tiles(self.v.shape[3]) * self.sequences * self.stretches, self.memories)](
            *self.of(self.q, self.k, do, found.t, found.scores), self.edges(found), dlast, *self.of(y), dstates, dfirst,
            cuts, self.scale, self.stretches, **self.walk_constants,
        )  # fmt: skip

    def of(self, *tensors: Tensor | None) -> list[Heads | None]:
        """For programs of a memory each; tensors with a head for every query tell them apart themselves."""
        return [None if x is None else Heads.of(x, max(self.memories, x.shape[1])) for x in tensors]

    def tiles(self, columns: int) -> int:
        """Programs that share a state in a walk."""
        return triton.cdiv(columns, self.sizes.tile.values)

    @property
    def inverses(self) -> str:
        """How factors of inverses are multiplied, see `delta_prepare`."""
        return "ieee" if self.exact else "half" if self.kind == torch.bfloat16 else "tf32"

    @property
    def packed(self) -> dict[str, int]:
        """For `delta_prepare`: registers that leave room for three programs a multiprocessor, and spill little."""
        return {"maxnreg": 168} if self.kind == torch.bfloat16 else {}

    @property
    def blocks(self) -> dict[str, int]:
        """Channels that `delta_gradients` takes at a time, its warps, and chunks of loads that run ahead.

        In bfloat16 two programs fit a multiprocessor. One of up to 128 channels takes them all at once: then nothing is
        read twice, and a program waits for loads three times in all. Several query heads of a memory take fewer, whose
        sums would not fit its registers.
        """
        d, dv = padded(self.q.shape[3]), padded(self.v.shape[3])
        if self.kind != torch.bfloat16:
            most = min(WIDEST, 32)
            return {"BK": min(d, most), "BV": min(dv, most), "num_warps": 8, "num_stages": 1}
        most = 128 if self.fan == 1 else WIDEST
        keys, values = (d, dv) if max(d, dv) <= most else (min(d, WIDEST), min(dv, WIDEST))
        return {"BK": keys, "BV": values, "num_warps": 4, "num_stages": 1}

    @property
    def ahead(self) -> int:
        """Stages of `delta_prepare`."""
        return RUN_AHEAD if self.kind == torch.bfloat16 else 1

    @property
    def whole(self) -> bool:
        """Whether no sequence ends within a chunk."""
        return self.cu is None and self.q.shape[2] % self.sizes.chunk == 0

    @property
    def constants(self) -> dict[str, Any]:
        return {"K": self.q.shape[3], "C": self.sizes.chunk, "GATE": self.gate, "FAN": self.fan, **self.products}

    @property
    def walk_constants(self) -> dict[str, Any]:
        tile = self.sizes.tile
        own = {"V": self.v.shape[3], "BK": padded(self.q.shape[3]), "BV": tile.values}
        own |= {"UNIT": self.scale == 1, "WHOLE": self.whole}
        return self.constants | own | {"num_warps": tile.warps, "num_stages": tile.stages}
