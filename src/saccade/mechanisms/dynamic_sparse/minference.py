"""MInference: before the prompt is read, its last queries show which vertical and slanted lines matter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.where import Causal, Pattern, Plan, Router, Sinks, TopK, Window, plan_chosen, pooled_scores

BLOCK = 64  # queries that share an index, and keys of a slanted range


@dataclass(frozen=True)
class AShape:
    """Sinks and a window: keys j < sinks or i - j < window."""

    sinks: int = 100
    window: int = 800

    def where(self, q: Tensor, k: Tensor) -> Pattern:
        """The static pattern of the head."""
        return (Sinks(self.sinks) | Window(self.window)) & Causal()


@dataclass(frozen=True)
class BlockTopK:
    """The key blocks with the largest product of mean query and mean key; the diagonal is not forced."""

    blocks: int = 100

    def where(self, q: Tensor, k: Tensor) -> Plan:
        """The plan of the head's blocks."""
        return Router(pooled_scores, TopK(self.blocks), block=(BLOCK, BLOCK), pattern=Causal()).route(q, k)


@dataclass(frozen=True)
class VerticalSlash:
    """Columns and diagonals with the largest weight in the attention of the last 64 queries.

    vertical: columns kept, the first 30 forced. slash: diagonals i - j kept, the first 100 forced.
    """

    vertical: int = 100
    slash: int = 750

    def lines(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (B, H, n_v) and offsets (B, H, n_s); q (B, H, N, D), k (B, H, N, D). Cost: 64 N D."""
        n, last = q.shape[2], min(BLOCK, q.shape[2])
        scores = q[:, :, -last:] @ k.mT * q.shape[3] ** -0.5  # (B, H, last, N)
        at = torch.arange(n, device=q.device)
        offset = at[-last:, None] - at
        p = scores.masked_fill(offset < 0, -torch.inf).softmax(-1)
        diagonal = torch.zeros_like(p[:, :, 0]).index_add_(2, offset.clamp(min=0).flatten(), p.flatten(2))

        def best(weight: Tensor, num: int, forced: int) -> Tensor:
            weight[..., :forced] = torch.inf
            return weight.topk(min(num, n)).indices

        return best(p.sum(2), max(self.vertical, 30), 30), best(diagonal, max(self.slash, 50), 100)

    def where(self, q: Tensor, k: Tensor) -> Plan:
        """The plan: for each block of 64 queries, 64 keys a diagonal, and single columns outside of them."""
        batch, heads, n, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = k.detach().to(wide).repeat_interleave(heads // k.shape[1], 1)
        vertical, slash = (lines.flatten(0, 1) for lines in self.lines(q.detach().to(wide), keys))
        rows = -(-n // BLOCK)
        tiles = torch.zeros(batch * heads, rows, rows, dtype=torch.bool, device=q.device)
        single = torch.zeros(batch * heads, rows, n, dtype=torch.bool, device=q.device)
        ends = torch.arange(1, rows + 1, device=q.device)[:, None] * BLOCK
        for head, (columns, offsets) in enumerate(zip(vertical, slash, strict=True)):
            stop = ends - offsets  # (rows, n_s), one past the range of a diagonal
            edges = torch.zeros(rows, n + 1, dtype=torch.int32, device=q.device)
            one = torch.ones_like(stop, dtype=torch.int32)
            edges.scatter_add_(1, (stop - BLOCK).clamp(0, n), one).scatter_add_(1, stop.clamp(0, n), -one)
            kept = edges.cumsum(1)[:, :n] > 0
            kept.index_fill_(1, columns, True)
            kept &= torch.arange(n, device=q.device) < ends
            tiles[head] = torch.nn.functional.pad(kept, (0, -n % BLOCK), value=True).unflatten(1, (-1, BLOCK)).all(2)
            single[head] = kept & ~tiles[head].repeat_interleave(BLOCK, 1)[:, :n]
        group_of = torch.arange(batch * heads, device=q.device).view(batch, heads)
        return plan_chosen(Causal(), tiles, group_of, n, n, (BLOCK, BLOCK), tokens=single)


HeadPattern = AShape | BlockTopK | VerticalSlash


class Minference(Attention):
    """MInference: a sparse prefill whose index is found on the fly, head by head.

        vertical-slash: A = softmax(q_last K^T / sqrt(D)), columns and diagonals with the largest sums of A
        o = softmax over the keys j <= i in the block-expanded index of i's block of 64 queries

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); q_last: the last 64 queries. A kept diagonal s becomes, for
    each block of queries, the 64 keys that end s before the block's end; columns outside of these ranges are gathered
    singly. Paper: arXiv 2407.02490, section 3.2 and algorithms 2-3; forced lines and block expansion are those of the
    authors' code. Deviations: the offline search over patterns is the caller's. The authors' kernel rounds merged
    ranges up to whole blocks of 64 keys; here a range ends where its diagonals end. heads: `VerticalSlash`, `AShape` or
    `BlockTopK`, one for all query heads or a sequence, one a head (default VerticalSlash(100, 750)). Prefill only: as
    many queries as keys. Costs 64 N D for the index of a head, N^2 / 64 marks, and the listed keys. Errors: ValueError
    for fewer queries than keys, or another number of patterns than heads.

    >>> module = Minference(Dims(2, 8), heads=VerticalSlash(30, 60))
    >>> x = torch.randn(1, 2, 300, 8)
    >>> module(x, x, x).shape
    torch.Size([1, 2, 300, 8])
    """

    spec = Spec(
        id="minference",
        name="MInference 1.0",
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        paper="2407.02490",
        year=2024,
        family="dynamic_sparse",
        uses=("attend", "plan_chosen", "Router"),
        discrete=True,
        waits="columns are marked, and only the device knows how many",
    )
    causal = True
    prefill = True

    def __init__(self, dims: Dims, *, heads: HeadPattern | Sequence[HeadPattern] = VerticalSlash()) -> None:
        super().__init__(dims)
        self.heads = tuple(heads) if isinstance(heads, Sequence) else (heads,) * dims.num_heads
        if len(self.heads) != dims.num_heads:
            raise ValueError(
                f"heads: got {len(self.heads)} patterns for {dims.num_heads} query heads; pass one a head, or one"
            )
        self.per_head = len(set(self.heads)) > 1

    def plan(self, q: Tensor, k: Tensor) -> Plan | None:
        if self.per_head:  # every kind of head has a plan of its own
            return None
        where = self.heads[0].where(q, k)
        return where if isinstance(where, Plan) else where.plan(q.shape[2], heads=q.shape[1], device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"k: got {k.shape[2]} keys for {q.shape[2]} queries; this is a prefill, pass the whole prompt"
            )
        if not self.per_head:
            return attend(q, k, v, self.heads[0].where(q, k))
        out: dict[int, Tensor] = {}
        each = [x.unbind(1) for x in (q, k, v)]
        for kind in set(self.heads):
            mine = [h for h, pattern in enumerate(self.heads) if pattern == kind]
            reads = [h // self.dims.group for h in mine]
            parts = zip(each, (mine, reads, reads), strict=True)
            own_q, own_k, own_v = (torch.stack([heads[h] for h in some], 1) for heads, some in parts)
            found = attend(own_q, own_k, own_v, kind.where(own_q, own_k))
            out.update(zip(mine, found.unbind(1), strict=True))
        return torch.stack([out[h] for h in range(q.shape[1])], 1)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, d), rows = q.shape, range(0, q.shape[2], BLOCK)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for b, h in itertools.product(range(batch), range(heads)):
            kind, shared = self.heads[h], h // (heads // k.shape[1])
            scores = torch.stack([(q[b, h, i] * k[b, shared]).sum(-1) for i in range(n)]) / d**0.5
            last = [scores[i, : i + 1].detach().softmax(0).tolist() for i in range(max(0, n - BLOCK), n)]
            for start in rows:
                end = min(start + BLOCK, n)
                if isinstance(kind, AShape):
                    sinks = set(range(kind.sinks))
                    index = [sinks | set(range(i - kind.window + 1, i + 1)) for i in range(start, end)]
                elif isinstance(kind, BlockTopK):
                    means = {
                        j: float(q[b, h, start:end].detach().mean(0) @ k[b, shared, j : j + BLOCK].detach().mean(0))
                        for j in rows
                        if j <= start
                    }
                    best = sorted(means, key=lambda j: -means[j])[: kind.blocks]
                    index = [{j for first in best for j in range(first, first + BLOCK)}] * (end - start)
                else:
                    columns = [sum(p[j] for p in last if j < len(p)) for j in range(n)]
                    slashes = [sum(p[len(p) - 1 - s] for p in last if s < len(p)) for s in range(n)]
                    columns[:30], slashes[:100] = [torch.inf] * min(30, n), [torch.inf] * min(100, n)
                    chosen = set(sorted(range(n), key=lambda j: -columns[j])[: max(30, kind.vertical)])
                    for s in sorted(range(n), key=lambda s: -slashes[s])[: max(50, kind.slash)]:
                        chosen |= set(range(start - s, start + BLOCK - s))
                    index = [chosen] * (end - start)
                for i in range(start, end):
                    seen = sorted(j for j in index[i - start] if 0 <= j <= i)
                    out[b, h, i] = scores[i, seen].softmax(0) @ v[b, shared, seen] if seen else 0
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        mixed = [VerticalSlash(40, 110), AShape(5, 33), BlockTopK(1), AShape(5, 33)]
        return [
            Case(Dims(2, 8), 163, {"heads": VerticalSlash(40, 120)}, batch=1),
            Case(Dims(4, 8, 2), 149, {"heads": mixed}, batch=2),
            Case(Dims(1, 8), 23),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"heads": VerticalSlash(length, length)}

    @claim("Planted vertical and slash lines are recovered when they are visible in the last 64 queries.")
    def recovers(cls) -> Finding:
        n, random, hits = 1024, torch.Generator().manual_seed(0), []
        for _ in range(32):
            column, slash = (int(torch.randint(200, 800, (), generator=random)) for _ in range(2))
            angles = (
                torch.rand(64, generator=random) * torch.arange(n)[:, None]
            )  # positions as phases: q_i . k_j peaks at i - j = slash
            k = torch.cat([angles.cos(), angles.sin()], 1)
            q = torch.cat([(angles - angles[slash]).cos(), (angles - angles[slash]).sin()], 1)
            k, q = (torch.cat([x, torch.zeros(n, 1)], 1) for x in (k, q))
            k[column, -1], q[:, -1] = 64.0, 1.0
            columns, slashes = VerticalSlash(31, 101).lines(2 * q[None, None], k[None, None])
            hits.append(column in columns[0, 0].tolist() and slash in slashes[0, 0].tolist())
        return Finding(
            all(hits), f"{sum(hits)} of {len(hits)} pairs of lines, with room for one of each beyond the forced ones"
        )

    @claim("The index that is computed is a superset of the chosen lines.")
    def superset(cls) -> Finding:
        q, k = torch.randn(2, 2, 517, 8, generator=torch.Generator().manual_seed(0))
        kind = VerticalSlash(60, 130)
        seen = kind.where(q[None], k[None]).dense().view(2, 517, 517)
        columns, slashes = kind.lines(q[None], k[None])
        i, j = torch.arange(517)[:, None], torch.arange(517)
        lines = torch.stack(
            [torch.isin(j, c) | torch.isin(i - j, s) for c, s in zip(columns[0], slashes[0], strict=True)]
        )
        lines &= j <= i
        figure = (
            f"{int(lines.sum())} pairs on the lines, {int(seen.sum())} computed, {int((lines & ~seen).sum())} missed"
        )
        return Finding(not bool((lines & ~seen).any()), figure)
