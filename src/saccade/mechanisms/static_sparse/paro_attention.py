"""PAROAttention: each head reads its tokens in the axis order that makes its pattern blocks, and skips empty ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Full, Plan, plan_chosen

Order = tuple[int, ...]
ORDERS: tuple[Order, ...] = tuple(itertools.permutations(range(3)))


class ParoAttention(Attention):
    """Block-sparse attention under a static mask a head, on tokens sorted by an order of the grid's axes a head.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over the j with kept_h[b(i), b(j)]
        b(i) = floor(s(i) / block),  s(i): the place of i when the axes (T, Y, X) are read in the order of the head

    q (B, H, N, D), k, v (B, Hkv, N, D), row-major in (T, Y, X) -> o (B, H, N, D). What is near on one axis stands far
    apart in another order of the tokens: in the right one a head's weights fill few blocks, evenly. `calibrate` finds
    orders and masks on samples, by thresholds on the weights after the softmax. A query whose row of blocks is empty
    gives zeros, and so does a skipped head. Paper: arXiv 2506.16054, pattern-aware reordering (orders, and the measure
    that chooses them) and block-wise sparse attention (static masks, by sums over blocks); the six orders, blocks of 64
    on both sides and the zeros of skipped heads follow the authors' code.
    Deviations: the products are not quantised; how even the weights of a block are counts in the choice of the order
    alone. One mask serves all steps of the diffusion; the paper has different ones for early steps, which here are
    modules of their own. Text tokens are not offered. On another grid than that of the mask a block follows the entry
    at its relative place; the paper calibrates anew. Key heads may be shared.
    orders: permutations of (0, 1, 2), the last axis fastest, one a query head (default None: row-major). kept: bool (H,
    rows, cols), a tensor or nested lists (None: all, and the order changes nothing but the tiles). block: tokens of one
    (64).
    Costs the kept blocks, block^2 D each, and a permutation of q, k, v and o. Errors: ValueError or TypeError for
    orders that are no permutations, or a mask whose heads are not those of dims.

    >>> dims, x = Dims(2, 8, grid=(2, 4, 4)), torch.randn(1, 2, 32, 8)
    >>> paro = ParoAttention.calibrate(dims, x, x, density=0.5, block=8)
    >>> paro(x, x, x).shape, paro.plan(x, x).density
    (torch.Size([1, 2, 32, 8]), 0.5)
    """

    spec = Spec(
        id="paro_attention",
        name="PAROAttention",
        title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual "
        "Generation Models",
        paper="2506.16054",
        year=2025,
        family="static_sparse",
        uses=("attend", "plan_chosen"),
        grid=3,
        waits="lists of tiles whose sides no kernel takes are read by the host",
    )
    per_head = True
    kept: Tensor
    place: Tensor

    def __init__(
        self,
        dims: Dims,
        *,
        orders: Sequence[Sequence[int]] | None = None,
        kept: Tensor | Sequence[Sequence[Sequence[bool]]] | None = None,
        block: int = 64,
    ) -> None:
        super().__init__(dims)
        given = [ORDERS[0]] * dims.num_heads if orders is None else [tuple(order) for order in orders]
        if len(given) != dims.num_heads or not set(given) <= set(ORDERS):
            raise ValueError(
                f"orders: got {orders!r}; pass a permutation of (0, 1, 2) for each of {dims.num_heads} heads"
            )
        self.orders, self.block = given, positive("block", block)
        mask = torch.ones(dims.num_heads, 1, 1, dtype=torch.bool) if kept is None else torch.as_tensor(kept)
        if mask.ndim != 3 or mask.dtype != torch.bool or len(mask) != dims.num_heads or not mask.numel():
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"kept: got {got}; pass bool ({dims.num_heads}, rows, cols), one mask a head")
        self.register_buffer("kept", mask)
        self.register_buffer("place", torch.stack([sorted_by(dims.grid or (), order) for order in given]))

    def chosen(self, num_tokens: int) -> Tensor:
        """The mask (H, rows, cols) over the blocks of `num_tokens` tokens."""
        count = -(-num_tokens // self.block)
        rows, cols = (torch.arange(count, device=self.kept.device) * size // count for size in self.kept.shape[1:])
        return self.kept[:, rows[:, None], cols]

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        """The plan of the sorted tokens, each head's in its own order."""
        n, heads = q.shape[2], torch.arange(self.dims.num_heads, device=q.device)
        marks = self.chosen(n).to(q.device)
        return plan_chosen(Full(), marks, heads[None], n, n, (self.block, self.block))

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = torch.arange(self.dims.num_heads, device=q.device)[:, None]
        reads, place = heads // self.dims.group, self.place.to(q.device)
        o = attend(q[:, heads, place], k[:, reads, place], v[:, reads, place], self.plan(q, k))
        return o[:, heads, place.argsort(1)]

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept, n = dict(self.named_buffers())["kept"], q.shape[2]
        tokens = list(itertools.product(*(range(size) for size in self.dims.grid or ())))
        count = sum(1 for _ in range(0, n, self.block))
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for h, order in enumerate(self.orders):
            ranked = sorted((tuple(token[axis] for axis in order), i) for i, token in enumerate(tokens))
            block = {i: at // self.block for at, (_, i) in enumerate(ranked)}
            shared = h // (q.shape[1] // k.shape[1])
            for i in range(n):
                row = kept[h, block[i] * kept.shape[1] // count]
                seen = [j for j in range(n) if row[block[j] * kept.shape[2] // count]]
                if seen:
                    scores = (q[:, h, i, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                    out[:, h, i] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    @torch.no_grad()
    def calibrate(
        cls,
        dims: Dims,
        q: Tensor,
        k: Tensor,
        *,
        density: float = 0.3,
        block: int = 64,
        balance: float = 0.5,
        small: float = 0.1,
        most: float = 0.9,
    ) -> ParoAttention:
        """The module whose orders and masks suit samples q (B, H, N, D), k (B, Hkv, N, D).

            M = balance F / (sum of F) + (1 - balance) U / (sum of U),   sums over the six orders

        Of each head the order with the least M. F: the share of blocks that are not empty, of whose weights less than
        `most` are below small / N. U: the mean over blocks of the largest weight over the mean one. Then, of the blocks
        of all heads in their orders, those with the largest sums, `density` of them; a row keeps its best in any case.
        Costs six times the attention, `block` rows at a time. The values of balance, small and most are ours.
        """
        for name, share in (("density", density), ("balance", balance), ("most", most)):
            if not 0 <= share <= 1 or (name == "density" and share == 0):
                raise ValueError(f"{name}: got {share}; pass a share in {'(' if name == 'density' else '['}0, 1]")
        heads = torch.arange(dims.num_heads, device=q.device)
        k = k[:, heads // dims.group]
        masses, scores = [], []
        for order in ORDERS:
            place = sorted_by(dims.grid or (), order).to(q.device)
            mass, full, uneven = block_statistics(q[:, :, place], k[:, :, place], block, small / q.shape[2], most)
            masses.append(mass)
            scores.append(torch.stack([full, uneven]))
        measured = torch.stack(scores)  # (6, 2, H)
        full, uneven = (measured / measured.sum(0)).unbind(1)
        best = (balance * full + (1 - balance) * uneven).argmin(0)
        mass = torch.stack(masses)[best, heads]
        kept = mass == mass.amax(-1, keepdim=True)
        kept.view(-1)[mass.flatten().topk(round(density * mass.numel())).indices] = True
        return cls(dims, orders=[ORDERS[i] for i in best.tolist()], kept=kept, block=block)

    @classmethod
    def cases(cls) -> list[Case]:
        random = torch.Generator().manual_seed(0)
        masks = [torch.rand(heads, rows, cols, generator=random) < 0.4 for heads, rows, cols in ((4, 3, 3), (2, 2, 3))]
        masks[0][0] = False  # a skipped head
        masks[1][:, :, 1] = True
        mixed = [(2, 0, 1), (0, 1, 2), (1, 2, 0), (2, 1, 0)]
        return [
            Case(Dims(4, 8, 2, grid=(3, 3, 5)), 45, {"orders": mixed, "kept": masks[0].tolist(), "block": 16}),
            Case(Dims(2, 4, grid=(2, 5, 4)), 40, {"orders": mixed[:2], "kept": masks[1].tolist(), "block": 16}),
            Case(Dims(2, 4, grid=(4, 1, 5)), 20, {"orders": mixed[2:], "block": 7}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"orders": [ORDERS[-1 - h % 6] for h in range(dims.num_heads)]}

    @classmethod
    def planted(cls, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """q, k (1, 6, N, 64): head h asks for tokens that agree on the first axis of ORDERS[h], near on the second."""
        coordinates = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2).float()
        heads = []
        for outer, middle, _ in ORDERS:
            rate = torch.randn(2, 16) * torch.tensor([[2.0], [0.3]])
            angles = coordinates[:, [outer]] * rate[0], coordinates[:, [middle]] * rate[1]
            heads.append(torch.cat([f(x) for x in angles for f in (torch.cos, torch.sin)], 1))
        x = 3 * torch.stack(heads)[None]
        return x, x

    @classmethod
    def blocks_for(cls, mass: Tensor, share: float) -> Tensor:
        """The least blocks that hold `share` of the mass (H, rows, cols) of each head: (H,)."""
        sorted_mass = mass.flatten(1).sort(1, descending=True).values
        return (sorted_mass.cumsum(1) < share * sorted_mass.sum(1, keepdim=True)).sum(1) + 1

    @claim("A permutation alone changes nothing: with all blocks kept it is full attention, in any order.")
    def exact(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 6, 60, 8, dtype=torch.float64)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        error = float((cls(Dims(6, 8, grid=(3, 4, 5)), orders=ORDERS, block=16)(q, k, v) - dense).abs().max())
        small = 64 * torch.finfo(torch.float64).eps * float(v.abs().max())
        return Finding(error < small, f"six heads in six orders differ by {error:.1e}")

    @claim("Calibration finds the planted order of every head, which is the one with the fewest blocks for its mass.")
    def finds(cls) -> Finding:
        grid = (8, 8, 8)
        q, k = cls.planted(grid)
        found = cls.calibrate(Dims(6, 64, grid=grid), q, k, block=16)
        need = torch.stack([cls.blocks_for(cls._mass(q, k, grid, order), 0.9) for order in ORDERS])  # (orders, heads)
        hits = sum(one == planted for one, planted in zip(found.orders, ORDERS, strict=True))
        fewest = int((need.argmin(0) == torch.arange(6)).sum())
        return Finding(hits == fewest == 6, f"{hits} of 6 heads, {fewest} of which need the fewest blocks so")

    @classmethod
    def _mass(cls, q: Tensor, k: Tensor, grid: tuple[int, ...], order: Order) -> Tensor:
        place = sorted_by(grid, order)
        return block_statistics(q[:, :, place], k[:, :, place], 16, 0.1 / q.shape[2], 0.9)[0]

    @claim("Sorted tokens need fewer blocks for the same mass than row-major ones, and their blocks are more even.")
    def fewer(cls) -> Finding:
        grid = (8, 8, 8)
        q, k = cls.planted(grid)
        order = cls.calibrate(Dims(6, 64, grid=grid), q, k, block=16).orders
        need, spread = [], []
        for orders in ([ORDERS[0]] * 6, order):
            place = torch.stack([sorted_by(grid, one) for one in orders])
            at = torch.arange(6)[:, None]
            mass, _, uneven = block_statistics(q[:, at, place], k[:, at, place], 16, 0.1 / 512, 0.9)
            need.append(float(cls.blocks_for(mass, 0.9).double().mean()) / 32**2)
            spread.append(float(uneven.mean()))
        figure = f"90 % of the mass lies in {need[1]:.1%} of the blocks, row-major in {need[0]:.1%}"
        figure += f"; the largest weight of a block is {spread[1]:.1f} means, row-major {spread[0]:.1f}"
        return Finding(need[1] < need[0] / 2 and spread[1] < spread[0], figure)

    @claim("At a density of 10 % the calibrated masks come closer to full attention than masks in row-major order.")
    def closer(cls) -> Finding:
        grid, dims = (8, 8, 8), Dims(6, 64, grid=(8, 8, 8))
        q, k = cls.planted(grid)
        v = torch.randn(1, 6, 512, 64)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        ours = cls.calibrate(dims, q, k, density=0.1, block=16)
        mass = cls._mass(q, k, grid, ORDERS[0])
        kept = mass == mass.amax(-1, keepdim=True)
        kept.view(-1)[mass.flatten().topk(round(0.1 * mass.numel())).indices] = True
        modules = ours, cls(dims, kept=kept, block=16)
        errors = [float((m(q, k, v) - dense).norm() / dense.norm()) for m in modules]
        used = ours.plan(q, k).density
        return Finding(errors[0] < errors[1] / 2, f"errors {errors[0]:.1%} and {errors[1]:.1%}, density {used:.1%}")


def sorted_by(grid: Sequence[int], order: Order) -> Tensor:
    """The row-major tokens of a grid as they stand when its axes are read in `order`: int64 (N,)."""
    return torch.arange(torch.Size(grid).numel()).view(*grid).permute(order).flatten()


def block_statistics(q: Tensor, k: Tensor, block: int, small: float, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weights of q, k (B, H, N, D), mean over the batch: sums over blocks (H, rows, cols), the share of blocks
    with less than `most` weights below `small` (H,), and the mean over blocks of the largest over the mean (H,).
    """
    n = k.shape[2]
    mass, full, uneven = [], [], []
    for rows in q.split(block, 2):
        weights = (rows @ k.mT * q.shape[3] ** -0.5).softmax(-1).mean(0)
        cut = torch.nn.functional.pad(weights, (0, -n % block)).unflatten(2, (-1, block))  # (H, b, cols, block)
        size = torch.full((cut.shape[2],), block, device=q.device)
        size[-1] -= -n % block
        size = size * rows.shape[2]
        sums = cut.sum((1, 3))
        mass.append(sums)
        full.append((size - (cut >= small).sum((1, 3))) < most * size)
        uneven.append(cut.amax((1, 3)) * size / sums.clamp(min=torch.finfo(sums.dtype).tiny))
    return torch.stack(mass, 1), torch.stack(full, 1).double().mean((1, 2)), torch.stack(uneven, 1).mean((1, 2))
