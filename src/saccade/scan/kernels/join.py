"""From what every stretch of a sequence adds to a state, and keeps of it, to the state before each."""

from __future__ import annotations

import triton.language as tl

from saccade.scan.kernels.abreast import alike


@alike("count")
def join_stretches(parts, kept, before, count, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """In place: parts (S * count, heads, D, COLUMNS), kept (S * count, heads, D), before (S, heads, D, COLUMNS).

    Of the last stretch nothing is read.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < D * COLUMNS
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    seq = tl.program_id(2)
    state = tl.zeros([BLOCK], tl.float32)
    if before is not None:
        state += tl.load(before + (seq * heads + head).to(tl.int64) * (D * COLUMNS) + entry, mask=inside, other=0.0)
    slot = (seq * count * heads + head).to(tl.int64) * D
    more = entry < tl.where(count > 1, D * COLUMNS, 0)
    added = tl.load(parts + slot * COLUMNS + entry, mask=more, other=0.0)
    left = tl.load(kept + slot + entry // COLUMNS, mask=more, other=0.0)
    for stretch in range(count):
        on = slot + heads.to(tl.int64) * D
        more = entry < tl.where(stretch + 2 < count, D * COLUMNS, 0)
        next_added = tl.load(parts + on * COLUMNS + entry, mask=more, other=0.0)  # not behind the store
        next_left = tl.load(kept + on + entry // COLUMNS, mask=more, other=0.0)
        tl.store(parts + slot * COLUMNS + entry, state, mask=inside)
        state = state * left + added
        slot, added, left = on, next_added, next_left
