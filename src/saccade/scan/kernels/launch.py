"""Launching the kernels: which sizes they take for which problem, buffers, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.scan.kernels.gradients import scan_gradients
from saccade.scan.kernels.outputs import scan_outputs
from saccade.scan.kernels.states import join_segments, scan_states
from saccade.scan.kernels.tiles import Cuts, Heads

PROGRAMS = 4  # walks over states that a multiprocessor should have
LEAST_CHUNKS = 4  # chunks that a stretch has at least: it is read twice where there is more than one
JOINED = 1024  # entries of a state that one program carries from stretch to stretch


class Tile(NamedTuple):
    """Channels of keys and of values that a program takes at a time, its warps, and the steps with loads in flight."""

    keys: int
    values: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"BD": self.keys, "BV": self.values, "num_warps": self.warps, "num_stages": self.stages}


class Sizes(NamedTuple):
    """Tokens a chunk, and the tiles of the three kernels."""

    chunk: int
    states: Tile
    outputs: Tile
    gradients: Tile

    @classmethod
    def of(cls, d: int, dv: int, dtype: torch.dtype, gate: int) -> Sizes:
        """For D and Dv channels and a gate of 0 (none), 1 (a token) or 2 dims (a token and channel)."""
        d, dv = padded(d), padded(dv)
        if dtype == torch.float32:  # no matrix unit forms its products, so tiles are as small as registers are few
            small = Tile(min(d, 32), min(dv, 32), 4, 1)
            return cls(32, small, small, small)
        wide = 8 if dv > 128 else 4
        states = Tile(min(d, 64), min(dv, 128), *((8, 2) if gate == 2 else (4, 3)))
        narrow = min(d, 32)
        if dtype == torch.float16:  # as wide as float32 in products of sums, for the range of sums over a sequence
            return cls(64, states, Tile(narrow, min(dv, 128), 8, 2), Tile(narrow, min(dv, 32), 8, 2))
        if gate == 2:  # with more channels a level's factors and products leave the registers
            return cls(64, states, Tile(narrow, min(dv, 256), wide, 2), Tile(narrow, min(dv, 64), 4, 2))
        return cls(64, states, Tile(min(d, 64), min(dv, 256), wide, 2), Tile(min(d, 64), min(dv, 64), 8, 2))


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What factors of products are, and states between chunks. Sums over a sequence may leave the range of float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def state_heads(q: Tensor, k: Tensor, g: Tensor | None) -> int:
    return k.shape[1] if g is None else g.shape[1]


def slots(q: Tensor, cu: Tensor | None, chunk: int) -> int:
    """Chunks of all sequences; for packed ones as many as there can be, which the host knows without reading them."""
    batch, _, length, _ = q.shape
    return batch * -(-length // chunk) if cu is None else length // chunk + cu.shape[0] - 1


def cuts_of(q: Tensor, cu: Tensor | None, chunk: int) -> Cuts:
    batch, _, length, _ = q.shape
    if cu is None:
        return Cuts(length, batch)
    last = (-(-cu.diff() // chunk)).cumsum(0)
    first = torch.cat([last.new_zeros(1), last[:-1]])
    seq_of = torch.searchsorted(last, torch.arange(slots(q, cu, chunk), device=q.device), right=True)
    return Cuts(length, cu.shape[0] - 1, cu, first.int(), seq_of.int())


@dataclass(frozen=True)
class Launch:
    """One problem. g: (B, heads, N) or (B, heads, N, D), or None; cu: bounds of packed sequences, int32, or None.

    mass: also what the queries read of the sum of keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    cu: Tensor | None
    scale: float
    mass: bool

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.q.shape[3], self.v.shape[3], self.q.dtype, self.gate)

    @property
    def gate(self) -> int:
        return 0 if self.g is None else self.g.ndim - 2

    @property
    def heads(self) -> tuple[int, int, int]:
        """(state heads, query heads a state head, state heads a key head)."""
        states = state_heads(self.q, self.k, self.g)
        return states, self.q.shape[1] // states, states // self.k.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        kinds = {torch.float32: (tl.float32, "ieee"), torch.float16: (tl.float32, "tf32")}
        kind, precision = kinds.get(self.q.dtype, (tl.bfloat16, "tf32"))
        shape = {"D": self.q.shape[3], "DV": self.v.shape[3], "C": self.sizes.chunk}
        return {**shape, "GATE": self.gate, "MASS": self.mass, "KIND": kind, "PRECISION": precision}

    def forward(
        self, memory: Tensor, memory_sums: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """o in `dtype` and mass; memory and sums after the last token; both before every chunk.

        memory (sequences, heads, D, DV) and, with `mass`, memory_sums (sequences, heads, D), float32: before the first.
        """
        batch, heads, length, _ = self.q.shape
        _, fan, share = self.heads
        cuts = cuts_of(self.q, self.cu, self.sizes.chunk)
        after, after_sums, states, sums = self.walk(self.k, self.v, None, memory, memory_sums, cuts, False)
        o = self.q.new_empty(batch, heads, length, self.v.shape[3], dtype=dtype)
        mass = self.q.new_empty(batch, heads, length if self.mass else 0, dtype=torch.float32)
        tile = self.sizes.outputs
        grid = (len(states) * triton.cdiv(self.v.shape[3], tile.values), heads)
        scan_outputs[grid](
            Heads.of(self.q), Heads.of(self.k), Heads.of(self.v), self.gates, states, sums, Heads.of(o), Heads.of(mass),
            cuts, self.scale, fan, share, REVERSE=False, LEVELS=self.levels, **self.constants, **tile.options,
        )  # fmt: skip
        return o, mass, after, after_sums, states, sums

    def backward(
        self, do: Tensor, dmass: Tensor | None, dafter: Tensor | None, dafter_sums: Tensor | None, states: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k, v, g, and of memory and sums before the first token."""
        batch, heads, length, d = self.q.shape
        _, fan, share = self.heads
        cuts = cuts_of(self.q, self.cu, self.sizes.chunk)
        do = do.to(self.q.dtype)  # which every kernel would do by itself
        dmemory, dmemory_sums, dstates, dsums = self.walk(self.q, do, dmass, dafter, dafter_sums, cuts, True)
        dq = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        # Of each query head its own; those that share a key are added up afterwards, in float32 and in order.
        whole = heads == self.k.shape[1]
        dk, dv = (
            x.new_empty(batch, heads, *x.shape[2:], dtype=x.dtype if whole else torch.float32) for x in (self.k, self.v)
        )
        tile = self.sizes.gradients
        tiles = triton.cdiv(d, tile.keys)
        dg = None
        if self.g is not None:
            dg = self.q.new_empty(batch, heads, length, d if self.gate == 2 else tiles, dtype=torch.float32)
        scan_gradients[(len(states) * tiles, heads)](
            Heads.of(self.q), Heads.of(self.k), Heads.of(self.v), self.gates, Heads.of(do),
            None if dmass is None else Heads.of(dmass), states, sums, dstates, dsums, Heads.of(dq), Heads.of(dk),
            None if dg is None else Heads.of(dg), cuts, self.scale, fan, share, LEVELS=self.levels, **self.constants,
            **tile.options,
        )  # fmt: skip
        tile = self.sizes.outputs
        constants = self.constants | {"MASS": False}
        scan_outputs[(len(states) * triton.cdiv(self.v.shape[3], tile.values), heads)](
            Heads.of(self.q), Heads.of(self.k), Heads.of(do), self.gates, dstates, None, Heads.of(dv), None,
            cuts, self.scale, fan, share, REVERSE=True, LEVELS=self.levels, **constants, **tile.options,
        )  # fmt: skip
        dk, dv = (_shared(x, self.k.shape[1]).to(self.q.dtype) for x in (dk, dv))
        if dg is not None and self.g is not None:
            dg = _shared(dg if self.gate == 2 else dg.sum(-1), self.g.shape[1]).to(self.g.dtype)
        return dq, dk, dv, dg, dmemory, dmemory_sums

    @property
    def levels(self) -> int:
        """How often a chunk can be halved."""
        return self.sizes.chunk.bit_length() - 1

    @property
    def gates(self) -> Heads | None:
        return None if self.g is None else Heads.of(self.g)

    def walk(
        self, x: Tensor, y: Tensor, m: Tensor | None, before: Tensor | None, before_sums: Tensor | None, cuts: Cuts,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """States and sums after all chunks, and before each in the order of the walk: see `scan_states`.

        A few long sequences are cut into stretches, which are walked over twice: what a stretch adds, then, once the
        stretches are joined, the state before each of its chunks.
        """
        heads, fan, share = self.heads
        (d, dv), tile = (self.q.shape[3], self.v.shape[3]), self.sizes.states
        tiles = triton.cdiv(d, tile.keys) * triton.cdiv(dv, tile.values)
        chunks = len(self.q) * triton.cdiv(self.q.shape[2], cuts.count * self.sizes.chunk)
        segments = segments_of(cuts.count * heads * tiles, chunks, self.q.device)
        shape = (slots(self.q, self.cu, self.sizes.chunk), heads, d)
        states = x.new_empty(*shape, dv, dtype=kept_dtype(x.dtype))
        sums = x.new_empty(shape if self.mass else (0,), dtype=torch.float32)
        constants = {name: value for name, value in self.constants.items() if name != "KIND"}
        constants |= {"FAN": fan if reverse else 1, "REVERSE": reverse}

        def run(store: bool, first: Tensor | None, first_sums: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            entries = cuts.count if store else cuts.count * segments
            after = x.new_empty(entries, heads, d, dv, dtype=torch.float32)
            after_sums = x.new_empty((entries, heads, d) if self.mass else (0,), dtype=torch.float32)
            left = None if store else x.new_empty(entries, heads, d, dtype=torch.float32)
            scan_states[(cuts.count * segments * tiles, heads)](
                Heads.of(x), Heads.of(y), None if m is None else Heads.of(m), self.gates, first, first_sums, after,
                after_sums, left, states, sums, cuts, self.scale, 1 if reverse else share, segments,
                STORE=store, **constants, **tile.options,
            )  # fmt: skip
            return after, after_sums, left

        if segments > 1:
            parts, part_sums, left = run(False, None, None)
            for each, start, columns in ((parts, before, dv), (part_sums, before_sums, 1))[: 1 + self.mass]:
                join_segments[(triton.cdiv(d * columns, JOINED), heads, cuts.count)](
                    each, left, start, segments, D=d, COLUMNS=columns, BLOCK=JOINED
                )
            before, before_sums = parts, part_sums
        after, after_sums, _ = run(True, before, before_sums)
        return after, after_sums, states, sums


def segments_of(walks: int, chunks: int, device: torch.device) -> int:
    """Into how many stretches a sequence of so many chunks is cut, where there are so many walks without."""
    wanted = PROGRAMS * multiprocessors(device) // walks
    return max(1, min(wanted, chunks // LEAST_CHUNKS))


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shared(x: Tensor, heads: int) -> Tensor:
    """(B, H, ...) added up to (B, heads, ...)."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
