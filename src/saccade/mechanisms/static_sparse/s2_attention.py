"""S2-Attention: every head reads its own vertical stripes and a local band; together they read everything."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import BlockBand, Causal, Columns, Pattern, PerHead, Plan


class S2Attention(Attention):
    """Causal block masks with one shard of the context per head.

        query block a sees key block b on head h  iff
        j <= i  and  (a - b < local_blocks  or  (b + h step + 1) mod stride == 0),   step = max(1, stride // heads)

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); blocks are `block` tokens. Stripes stand at absolute columns,
    so a block outside the band and off the stripe is never read again and need not be cached. Query heads that share a
    key head share its stripe (h counts key heads), or nothing would be saved. Paper: arXiv 2407.17678, section 3; the
    offsets are those of the authors' kernel as shipped for Phi-3-small. block: tokens a block (default 64).
    local_blocks: blocks of the band, counting the query's own (16). stride: blocks from one stripe to the next (8).
    same_offset: every head reads the first one's stripes (False). Costs N / stride + local_blocks block keys a query,
    and as much cache; stripes of 64 are met by tiles of 64 keys, of which only those at the ends of the band need a
    mask. Errors: ValueError or TypeError for sizes that are no positive integers.

    >>> S2Attention(Dims(4, 16), block=8, local_blocks=2, stride=4).offsets()
    [3, 2, 1, 0]
    """

    spec = Spec(
        id="s2_attention",
        name="S2-Attention",
        title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
        paper="2407.17678",
        year=2024,
        family="static_sparse",
        uses=("attend", "PerHead", "Columns", "BlockBand"),
    )
    causal = True
    per_head = True

    def __init__(
        self, dims: Dims, *, block: int = 64, local_blocks: int = 16, stride: int = 8, same_offset: bool = False
    ) -> None:
        super().__init__(dims)
        self.block = positive("block", block)
        self.local_blocks = positive("local_blocks", local_blocks)
        self.stride = positive("stride", stride)
        self.same_offset = same_offset
        band = BlockBand(block, local_blocks)
        shards = [(band | Columns(block, stride, offset)) & Causal() for offset in self.offsets()]
        self.pattern: Pattern = PerHead([shard for shard in shards for _ in range(dims.group)])

    def offsets(self) -> list[int]:
        """The stripe of each key head: it reads the blocks b with b mod stride == offset."""
        heads = self.dims.num_kv_heads
        step = 0 if self.same_offset else max(1, self.stride // heads)
        return [-(h * step + 1) % self.stride for h in range(heads)]

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]
        step = max(1, self.stride // k.shape[1])
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for h in range(heads):
            shared = h // (heads // k.shape[1])
            for i in range(m - n, m):
                offset = 0 if self.same_offset else shared * step
                seen = [
                    j
                    for j in range(i + 1)
                    if i // self.block - j // self.block < self.local_blocks
                    or (j // self.block + offset + 1) % self.stride == 0
                ]
                row = i - (m - n)
                scores = (q[:, h, row, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, row] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8), 53, {"block": 4, "local_blocks": 2, "stride": 4}),
            Case(Dims(4, 8, 2), 37, {"block": 3, "local_blocks": 1, "stride": 5}),
            Case(Dims(2, 8), 23, {"block": 2, "local_blocks": 3, "stride": 3, "same_offset": True}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"stride": 1}

    @claim("Together the heads read every causal pair iff there are at least as many heads as stripes.")
    def union(cls) -> Finding:
        def covered(heads: int) -> float:
            pattern = cls(Dims(heads, 8), block=4, local_blocks=1, stride=8).pattern
            seen = pattern.dense(256, heads=heads).any(0)
            return int(seen.sum()) / (256 * 257 / 2)

        enough, too_few = covered(8), covered(4)
        return Finding(
            enough == 1.0 and too_few < 1.0, f"8 heads cover {enough:.0%}, 4 heads {too_few:.1%} of stride 8"
        )

    @claim("A head's density tends to 1 / stride, and so does the share of keys that it must cache.")
    def density(cls) -> Finding:
        block, stride, n = 64, 8, 32768
        module = cls(Dims(8, 8), block=block, local_blocks=4, stride=stride)
        plans = [pattern.plan(n, block=(block, block)) for pattern in module.pattern.patterns]  # type: ignore[attr-defined]
        last = [int(plan.indptr[-1] - plan.indptr[-2]) for plan in plans]  # blocks that the last queries still read
        density, kept = (sum(x) / len(plans) for x in ([p.density for p in plans], [x * block / n for x in last]))
        bound = 1 / stride + 5 * block / n
        figure = f"density {density:.4f}, cached share {kept:.4f} at N = {n} (1 / stride = {1 / stride})"
        return Finding(1 / stride <= density < bound + 5 * block / n and kept < bound, figure)
