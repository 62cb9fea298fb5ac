"""Launching the kernels of the delta rule: sizes, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from saccade.scan.kernels.delta import delta_gradients, delta_prepare, delta_walk, delta_walk_back
from saccade.scan.kernels.launch import Problem, Sizes, Tile, multiprocessors, padded, shared
from saccade.scan.kernels.tiles import Cuts, Heads

WIDEST = 64  # channels that a program without a walk takes at a time


def delta_heads(k: Tensor, beta: Tensor, g: Tensor | None) -> int:
    """How many memories a sequence has."""
    return max(k.shape[1], beta.shape[1], 0 if g is None else g.shape[1])


@dataclass(frozen=True)
class DeltaLaunch(Problem):
    """The delta rule, without a vector gate; query heads that share a memory walk with it. beta (B, heads, N)."""

    beta: Tensor

    @property
    def memories(self) -> int:
        return delta_heads(self.k, self.beta, self.g)

    @property
    def sizes(self) -> Sizes:
        """Those of linear attention, with what the walk holds besides in mind.

        In bfloat16 never fewer than 64 channels of values a program: with 16 or 32, products that take the state from
        shared memory are compiled wrongly for capability 9.0 (Triton 3.6): they read beyond it. Loads run ahead where a
        multiprocessor has one program; two hide each other's, and leave no room for it.
        """
        d, dv = self.q.shape[3], self.v.shape[3]
        chunk, tile = Sizes.of(d, dv, self.q.dtype, 1)
        if self.kind != torch.bfloat16:
            return Sizes(chunk, Tile(min(tile.values, 32), 8, 1))
        programs = triton.cdiv(dv, 64) * self.sequences * self.memories
        alone = d <= 128 and programs < 2 * multiprocessors(self.q.device)
        return Sizes(chunk, Tile(64, tile.warps, tile.stages if alone else 1))

    def forward(self, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """o in `dtype`, the memory after the last token, and what `solved` found.

        memory: (sequences, heads, D, Dv), float32.
        """
        cuts = self.cuts
        gates = self.prepared(cuts).gates
        t = self.solved(gates, cuts)
        q, v = self.q, self.v
        o = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
        last = torch.empty_like(memory)
        self.walk_forward(gates, t, memory, cuts, o=o, last=last)
        return o, last, t

    def backward(
        self, do: Tensor, dafter: Tensor, memory: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of q, k, v, beta, g, and of the memory before the first token."""
        q, k, v, g, heads = self.q, self.k, self.v, self.g, self.memories
        batch, _, length, d = q.shape
        dv_width = v.shape[3]
        do = do.to(q.dtype)
        cuts, chunks = self.cuts, self.chunks
        gates = self.prepared(cuts).gates
        u, x = (q.new_empty(batch, heads, length, dv_width, dtype=self.kind) for _ in range(2))
        states = q.new_empty(chunks + self.sequences, heads, d, dv_width, dtype=self.kind)
        self.walk_forward(gates, t, memory, cuts, u=u, states=states)

        tiles = triton.cdiv(dv_width, self.sizes.tile.values)
        dstates = q.new_empty(chunks, heads, d, dv_width, dtype=self.kind)
        past = self.single(chunks, heads, tiles) if self.gate else None
        before = torch.empty_like(memory)
        delta_walk_back[(tiles * self.sequences, heads)](
            *self.of(q, k, do, self.beta, gates, t), dafter, states, *self.of(x), dstates, past, before, cuts,
            self.scale, **self.walk_constants,
        )  # fmt: skip

        # Of each memory its own; those that share a key are added up afterwards, in float32 and in order.
        whole = heads == k.shape[1]
        dq = q.new_empty(q.shape)
        dk, dv = (y.new_empty(batch, heads, *y.shape[2:], dtype=y.dtype if whole else torch.float32) for y in (k, v))
        dbeta = self.single(batch, heads, length)
        dg = self.single(batch, heads, length) if self.gate else None
        narrow = min(WIDEST, 32 if self.kind == torch.float32 else 64)
        constants = self.constants | {"BK": min(padded(d), narrow), "BV": min(padded(dv_width), narrow)}
        delta_gradients[(chunks, heads)](
            *self.of(q, k, v, self.beta, gates, do, u, x), states, dstates, past, *self.of(dq, dk, dv, dbeta, dg), cuts,
            self.scale, FAN=self.fan, TILES=tiles, V=dv_width, num_warps=8, num_stages=1, **constants,
        )  # fmt: skip
        dk, dv = (shared(y, k.shape[1]).to(q.dtype) for y in (dk, dv))
        dbeta = shared(dbeta, self.beta.shape[1]).to(self.beta.dtype)
        if g is not None and dg is not None:
            dg = shared(dg, g.shape[1]).to(g.dtype)
        return dq, dk, dv, dbeta, dg, before

    def solved(self, gates: Tensor | None, cuts: Cuts) -> Tensor:
        """The inverse of the system of every chunk, a row a token: (B, heads, N, C); gates as the walks take them.

        It is rounded to the dtype of its products in the end, so that in bfloat16 11 bits are enough on the way.
        """
        t = self.q.new_empty(self.system, dtype=self.kind)
        delta_prepare[(self.chunks, self.memories)](
            *self.of(self.k, self.beta, gates, t), cuts, BK=min(padded(self.q.shape[3]), WIDEST),
            LEVELS=self.sizes.chunk.bit_length() - 1, EXACTLY="ieee" if self.exact else "tf32", num_warps=4,
            num_stages=1, **self.constants,
        )  # fmt: skip
        return t

    @property
    def system(self) -> tuple[int, int, int, int]:
        """The shape of what `solved` finds."""
        return self.q.shape[0], self.memories, self.q.shape[2], self.sizes.chunk

    def walk_forward(
        self,
        gates: Tensor | None,
        t: Tensor,
        memory: Tensor,
        cuts: Cuts,
        *,
        o: Tensor | None = None,
        last: Tensor | None = None,
        u: Tensor | None = None,
        states: Tensor | None = None,
    ) -> None:
        """`delta_walk` over all sequences and memories."""
        tiles = triton.cdiv(self.v.shape[3], self.sizes.tile.values)
        delta_walk[(tiles * self.sequences, self.memories)](
            *self.of(self.q, self.k, self.v, self.beta, gates, t), memory, last, *self.of(o, u), states, cuts,
            self.scale, **self.walk_constants,
        )  # fmt: skip

    def of(self, *tensors: Tensor | None) -> list[Heads | None]:
        """For programs of a memory each; tensors with a head for every query tell them apart themselves."""
        return [None if x is None else Heads.of(x, max(self.memories, x.shape[1])) for x in tensors]

    @property
    def constants(self) -> dict[str, Any]:
        d, chunk = self.q.shape[3], self.sizes.chunk
        return {"K": d, "C": chunk, "GATE": self.gate, "SUMS": not self.exact, **self.products}

    @property
    def walk_constants(self) -> dict[str, Any]:
        tile, dv = self.sizes.tile, self.v.shape[3]
        own = {"V": dv, "BK": padded(self.q.shape[3]), "BV": tile.values, "FAN": self.fan}
        return self.constants | own | {"num_warps": tile.warps, "num_stages": tile.stages}
