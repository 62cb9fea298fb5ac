"""MoBA: every query picks the few key blocks whose mean key answers it best, and its own."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Blocks, Causal, Plan, Router, TopK, pool


def block_gate(q: Tensor, k: Tensor, block: tuple[int, int]) -> Tensor:
    """s_i = q . mean(keys of block i), unscaled, in at least float32: (B, H, N, blocks)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    means = pool(k.to(wide), block[1])  # (B, Hkv, blocks, D)
    return torch.einsum("bhgnd,bhcd->bhgnc", q.to(wide).unflatten(1, (k.shape[1], -1)), means).flatten(1, 2)


class Moba(Attention):
    """Mixture of block attention.

        s_i = q . mean_{j in block i} k_j   for blocks i wholly before the query's own, +inf for its own, -inf after
        o = softmax over the keys j <= t of the `top_k` blocks with the largest s

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). The choice is made per query and query head, the gate has no
    scale, no parameter and no gradient of its own; top_k counts the own block, and a query with fewer blocks takes all.
    Paper: arXiv 2502.13189, equations 5-8; ties are cut to exactly top_k as in the authors' code.
    Deviations: none; the chosen pairs are visited block by block, each gathering its queries.
    block: tokens a block (default 512). top_k: blocks a query reads, its own among them (3).
    Costs N (N / block) D for the gate and (top_k - 1/2) block keys a query.
    Errors: ValueError or TypeError for sizes that are no positive integers.

    >>> moba = Moba(Dims(2, 8), block=4, top_k=2)
    >>> x = torch.randn(1, 2, 32, 8)
    >>> moba.plan(x, x).dense().sum(-1).max()
    tensor(8)
    """

    spec = Spec(
        id="moba",
        name="MoBA",
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        paper="2502.13189",
        year=2025,
        family="dynamic_sparse",
        uses=("attend", "Router", "TopK"),
        discrete=True,
        waits="lists of tiles whose sides no kernel takes are read by the host",
    )
    causal = True

    def __init__(self, dims: Dims, *, block: int = 512, top_k: int = 3) -> None:
        super().__init__(dims)
        self.block, self.top_k = positive("block", block), positive("top_k", top_k)
        self.router = Router(
            block_gate, TopK(self.top_k), block=(1, block), pattern=Causal(), must=Blocks(block) & Causal()
        )

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.router.route(q, k)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.plan(q, k))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, _), m = q.shape, k.shape[2]
        reads = torch.arange(heads) // (heads // k.shape[1])
        k, v = k[:, reads], v[:, reads]
        wide = torch.promote_types(q.dtype, torch.float32)
        means = torch.stack([part.to(wide).mean(2) for part in k.split(self.block, 2)], 2)
        seen = torch.zeros(batch, heads, n, m, dtype=torch.bool)
        for row in range(n):
            own = (row + m - n) // self.block
            gate = (q[:, :, row, None].to(wide) * means[:, :, :own]).sum(-1)
            for block in [*gate.topk(min(self.top_k - 1, own)).indices.unbind(-1), torch.full((batch, heads), own)]:
                seen[:, :, row] |= torch.arange(m) // self.block == block[..., None]
            seen[:, :, row, row + m - n + 1 :] = False
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[3] ** 0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 53, {"block": 8, "top_k": 3}),
            Case(Dims(2, 8), 31, {"block": 5, "top_k": 2}, batch=3),
            Case(Dims(1, 16), 29, {"block": 4, "top_k": 1}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"block": 8, "top_k": -(-length // 8)}

    @claim("A late query reads at most top_k blocks: about 2 (top_k - 1/2) block / N of the causal triangle.")
    def budget(cls) -> Finding:
        n, block = 8192, 512
        q, k = (torch.randn(1, 2, n, 16) for _ in range(2))
        density = cls(Dims(2, 16), block=block, top_k=3).plan(q, k).density
        earlier = sum(block * block * min(own, 2) for own in range(n // block))
        exact = (earlier + n * (block + 1) / 2) / (n * (n + 1) / 2)
        about = 2 * (3 - 1 / 2) * block / n
        figure = f"{density:.1%} of the triangle at N = 8192, block 512, top_k 3 (the formula: {about:.1%})"
        return Finding(round(density * n * (n + 1) / 2) == round(exact * n * (n + 1) / 2), figure)

    @claim("The gate finds the block that holds the answer: with one strong key planted, its block is read.")
    def finds(cls) -> Finding:
        random = torch.Generator().manual_seed(0)
        k = torch.randn(64, 1, 1024, 16, generator=random)
        q = torch.randn(64, 1, 1024, 16, generator=random)
        planted = torch.randint(0, 896, (64,), generator=random)
        k[torch.arange(64), 0, planted] = 20 * torch.nn.functional.normalize(q[:, 0, -1], dim=-1)
        plan = cls(Dims(1, 16), block=64, top_k=3).plan(q[:, :, -1:], k)
        found = plan.dense()[torch.arange(64), 0, 0, planted].double().mean()
        chance = 2 / 15
        return Finding(bool(found > 4 * chance), f"in {found:.0%} of 64 draws, by chance {chance:.0%}")
