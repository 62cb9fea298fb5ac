"""What decays do inside a chunk, put into queries and keys before the walks.

Under a decay a channel, with G the sums of g from the start of a chunk and m its middle token,

    q_i' = q_i exp(G_i - G_m),     k_j' = k_j exp(G_m - G_j),     q_i decayed . k_j = q_i' . k_j'

and dq_i = dq_i' exp(G_i - G_m), dk_j = dk_j' exp(G_m - G_j). One factor of a pair grows. Where neither half of the
chunk decays by more than exp(-SAFE) that is harmless; elsewhere the chunk is marked, and walked over as it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.scan.kernels.abreast import Launched
from saccade.scan.kernels.tiles import SAFE, chunk_of, place, read, read_row, write

LEAST = tl.constexpr(-100.0)  # a gate below it forgets all that float32 can tell


@Launched
def prepare_tokens(g, q, k, reads, keys, bounds, cuts, fan, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """One chunk of a state head and BD channels a program.

    reads (B, H, N, D): of q, keys (B, state heads, N, D): of k; where a chunk is harmful, in any of its channels, they
    are of no use to anybody.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    batch, start, end = chunk_of(cuts, slot, C)
    rows = tl.arange(0, C)
    channel = tile * BD + tl.arange(0, BD)
    inside = start + rows < end
    gates = read(g, batch, head, start, rows, inside, channel, D).to(tl.float32)
    ks = read(k, batch, head, start, rows, inside, channel, D).to(tl.float32)
    qs = read(q, batch, head * fan, start, rows, inside, channel, D).to(tl.float32)
    away, early, late = past_middle(gates, C)
    harmless = tl.min(tl.minimum(early, late), 0) > -SAFE  # written so that a gate that is no number counts
    away = tl.where(harmless, away, 0.0)
    factor = tl.exp(away)
    write(keys, batch, head, start, rows, inside, channel, ks * tl.exp(-away), D)
    write(reads, batch, head * fan, start, rows, inside, channel, qs * factor, D)
    for each in range(head * fan + 1, head * fan + fan):
        qs = read(q, batch, each, start, rows, inside, channel, D).to(tl.float32)
        write(reads, batch, each, start, rows, inside, channel, qs * factor, D)
    if start < end:
        at = head.to(tl.int64) * bounds.stride_h + slot * bounds.parts + tile
        tl.store(bounds.harmful + at, tl.where(harmless, 0, 1))
        at = bounds.decay + (slot.to(tl.int64) * bounds.heads + head) * (2 * D) + channel
        tl.store(at, tl.exp(early), mask=channel < D)
        tl.store(at + D, tl.exp(late), mask=channel < D)


@triton.jit
def past_middle(gates, C: tl.constexpr):
    """Sums of gates (C, channels) from the middle token to each, from the start to it, and from it to the end."""
    first_half = (tl.arange(0, C) < C // 2)[:, None]
    early = tl.sum(tl.where(first_half, gates, 0.0), 0)
    late = tl.sum(tl.where(first_half, 0.0, gates), 0)
    return tl.cumsum(gates, 0) - early[None, :], early, late


@Launched
def prepare_sums(g, sums, cuts, C: tl.constexpr):
    """(B, heads, N) -> sums of g from the start of each chunk, for one chunk of one head a program."""
    batch, start, end = chunk_of(cuts, tl.program_id(0), C)
    rows = tl.arange(0, C)
    inside = start + rows < end
    found = tl.cumsum(tl.maximum(read_row(g, batch, tl.program_id(1), start, rows, inside), LEAST), 0)
    tl.store(place(sums, batch, tl.program_id(1), start) + rows, found, mask=inside)
