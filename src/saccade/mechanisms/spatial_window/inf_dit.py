"""Inf-DiT: blocks of an image attend to themselves and to the blocks on the left, above, and between the two."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, reached
from saccade.errors import positive
from saccade.mix import rotary_rates, turn_pairs
from saccade.softmax import merge
from saccade.where import GridBlocks, Plan
from saccade.where.grid_patterns import OnGrid
from saccade.where.pattern import touched

SIDES = ((0, 0), (1, 1), (0, 1), (1, 0))  # blocks up and to the left: itself, top-left, left, top
Block = tuple[int, int]


@dataclass(frozen=True)
class BlockBefore(OnGrid):
    """The block so many blocks up and to the left of a query's own, or the first one where there is none.

    >>> BlockBefore((4,), 2, (1,)).dense(4)[0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    """

    grid: tuple[int, ...]
    size: int
    back: tuple[int, ...]

    @property
    def dilation(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) * len(self.grid)

    def interval(self, axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
        start = (c // self.size - self.back[axis]).clamp(min=0) * self.size
        return start, start + self.size

    def reach(self, axis: int, count: int) -> int:
        return touched(self.size, count) * self.size


class InfDit(Attention):
    """Unidirectional block attention: four blocks in one softmax, of which missing ones are replaced by copies.

        o_i = sum_c sum_j softmax_cj(R_i q_i . (R_j k_j + p_c) / sqrt(D)) v_j
        over c in (self, top-left, left, top) and the j in block (max(a - u_c, 0), max(b - l_c, 0)), i in block (a, b)

    q (B, H, N, D), k, v (B, Hkv, N, D) row-major on (Y, X) -> o (B, H, N, D); u, l: 0 0, 1 1, 0 1, 1 0. R: rotary
    embedding, of the first half of the channels by the row and of the second by the column. p (4, Hkv, D): learned, one
    a side and key head. A block in the first row or column has no block above or on the left: the index is clamped, so
    that it sees one twice or, in the corner, itself four times, each copy with its own p and its own share of the
    softmax. Dependencies run down and to the right alone, so that an image is made block by block in raster order with
    the keys and values of one row of blocks in memory.
    Paper: arXiv 2405.04312, UniBA; the clamping, R, the order of the sides and where p is added follow the authors'
    code. Deviations: blocks at the lower and right border may be cut, where the authors take whole ones; q and k arrive
    normalised, if at all; positions start at 0, where training adds a random offset; cross-attention to the image of
    low resolution is the host's. The authors have one key head a query head.
    block: tokens a side (default 32). rope: rotate q and k (True).
    Costs 4 N block^2 D, in four calls, one a side, whose results are merged: keys are read where they lie, but the
    rotation takes passes of its own over q and k, and the merge over four o. Errors: ValueError or TypeError when
    dims.grid has not two axes, block is no positive integer, rope has a head_dim that 4 does not divide, or k are not
    as many as q.

    >>> uni, x = InfDit(Dims(2, 8, grid=(6, 8)), block=3), torch.randn(1, 2, 48, 8)
    >>> uni(x, x, x).shape, uni.plan(x, x).dense()[0].sum(1).view(6, 8)[:, 0].tolist()
    (torch.Size([1, 2, 48, 8]), [9, 9, 9, 18, 18, 18])
    """

    spec = Spec(
        id="inf_dit",
        name="Inf-DiT (unidirectional block attention)",
        title="Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer",
        paper="2405.04312",
        year=2024,
        family="spatial_window",
        uses=("attend", "merge", "GridBlocks", "turn_pairs"),
        grid=2,
    )
    per_head = True  # by p

    def __init__(self, dims: Dims, *, block: int = 32, rope: bool = True) -> None:
        super().__init__(dims)
        self.grid, self.block, self.rope = dims.grid or (), positive("block", block), rope
        if rope and dims.head_dim % 4:
            raise ValueError(f"rope: rotates pairs of two halves, not {dims.head_dim} channels; pass rope=False")
        self.offsets = nn.Parameter(torch.zeros(4, dims.num_kv_heads, dims.head_dim))

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        """The pairs, each listed once."""
        pattern = GridBlocks(self.grid, self.block, left=self.block)
        return pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def tokens(self) -> dict[Block, Tensor]:
        """The numbers of the tokens of each block, in raster order."""
        at = torch.arange(self.grid[0] * self.grid[1]).view(self.grid)
        rows = enumerate(at.split(self.block))
        return {(a, b): part.flatten() for a, row in rows for b, part in enumerate(row.split(self.block, 1))}

    def sides(self, block: Block) -> list[Block]:
        """The four blocks that a block sees."""
        return [(max(block[0] - up, 0), max(block[1] - left, 0)) for up, left in SIDES]

    def rotate(self, x: Tensor, tokens: Tensor) -> Tensor:
        """R x for x (..., n, D), the tokens of these numbers."""
        if not self.rope:
            return x
        places = torch.stack([tokens // self.grid[1], tokens % self.grid[1]], -1)  # (n, 2)
        angles = places[..., None] * rotary_rates(x.shape[-1] // 4, device=x.device)
        return turn_pairs(x, angles.flatten(-2))

    def weigh(self, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """Blocks q (B, H, n, D) with the four blocks of each side, k and v (B, Hkv, m, D); q and k are rotated."""
        placed = [keys + p[:, None] for keys, p in zip(k, self.offsets, strict=True)]
        return attend(q, torch.cat(placed, 2), torch.cat(list(v), 2))

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} keys for {q.shape[2]} queries; both are the tokens of one map")
        every = torch.arange(q.shape[2], device=q.device)
        q, k = self.rotate(q, every), self.rotate(k, every)
        # What a query gets from p is the same for all keys of a side: it moves the side's share of the softmax alone.
        grouped = q.unflatten(1, (k.shape[1], -1))
        more = torch.einsum("bhgnd,chd->cbhgn", grouped, self.offsets).flatten(2, 3) * q.shape[3] ** -0.5
        sides = [BlockBefore(self.grid, self.block, back) for back in SIDES]
        parts = [attend(q, k, v, side, return_lse=True) for side in sides]
        return merge([(o, lse + own.to(lse.dtype)) for (o, lse), own in zip(parts, more, strict=True)])[0]

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (height, width), b, dim = self.grid, self.block, q.shape[3]
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        offsets = dict(self.named_parameters())["offsets"]
        if self.rope:
            turns = torch.zeros(height * width, dim, dim, dtype=torch.float64)
            for y, x, pair in itertools.product(range(height), range(width), range(dim // 2)):
                at, rank = (y, pair) if 4 * pair < dim else (x, pair - dim // 4)
                angle = torch.tensor(at / 10000 ** (4 * rank / dim), dtype=torch.float64)
                two, one = 2 * pair, torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()])
                turns[y * width + x, two : two + 2, two : two + 2] = one.view(2, 2)
            q, k = (torch.einsum("nij,bhnj->bhni", turns.to(x), x) for x in (q, k))
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for y, x in itertools.product(range(height), range(width)):
            scores, seen = [], []
            for side, (up, left) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
                top, first = (max(at // b - back, 0) * b for at, back in ((y, up), (x, left)))
                rows, columns = range(top, min(top + b, height)), range(first, min(first + b, width))
                keys = [r * width + c for r, c in itertools.product(rows, columns)]
                placed = (k[:, :, keys] + offsets[side, :, None])[:, reads]
                scores.append((q[:, :, y * width + x, None] * placed).sum(-1) / dim**0.5)
                seen += keys
            weights = torch.cat(scores, -1).softmax(-1)
            out[:, :, y * width + x] = (weights[..., None] * v[:, reads][:, :, seen]).sum(2)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2, grid=(7, 8)), 56, {"block": 3}),
            Case(Dims(2, 4, grid=(5, 11)), 55, {"block": 4}, batch=1),
            Case(Dims(2, 6, grid=(6, 4)), 24, {"block": 2, "rope": False}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"block": max(dims.grid or (1,)), "rope": False}

    @classmethod
    def layers(cls, depth: int, grid: tuple[int, int]) -> list[tuple[InfDit, Tensor]]:
        """Layers x + W o(q(x), k(x), v(x)) with blocks of 3 and random p: the attention, and W_q, W_k, W_v, W_o."""
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(depth):
            module = cls(Dims(2, 4, grid=grid), block=3).double()
            module.offsets.data.copy_(torch.randn(4, 2, 4, generator=generator))
            weights = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64) / 8**0.5
            found.append((module.requires_grad_(False), weights))
        return found

    @classmethod
    def one_shot(cls, x: Tensor, layers: list[tuple[InfDit, Tensor]]) -> Tensor:
        """x (N, 8) through all layers at once."""
        for module, weights in layers:
            q, k, v = (weights[:3] @ x.T).view(3, 1, 2, 4, -1).mT
            x = x + module(q, k, v)[0].transpose(0, 1).flatten(1) @ weights[3].T
        return x

    @claim("Block by block, with the keys and values of one row of blocks kept, the image is that of one shot.")
    def cached(cls) -> Finding:
        found = []
        for height in (9, 12):
            grid = (height, 7)
            layers = cls.layers(3, grid)
            x = torch.randn(height * 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            truth, tokens = cls.one_shot(x, layers), layers[0][0].tokens()
            caches: list[dict[Block, tuple[Tensor, Tensor]]] = [{} for _ in layers]
            errors, most = [], 0
            for block, own in tokens.items():
                part = x[own]
                for (module, weights), cache in zip(layers, caches, strict=True):
                    q, k, v = (weights[:3] @ part.T).view(3, 1, 2, 4, -1).mT
                    cache[block] = module.rotate(k, own), v
                    keys, values = zip(*(cache[side] for side in module.sides(block)), strict=True)
                    o = module.weigh(module.rotate(q, own), keys, values)
                    part = part + o[0].transpose(0, 1).flatten(1) @ weights[3].T
                    most = max(most, sum(values.shape[2] for _, values in cache.values()))
                    for gone in [key for key in cache if key < (block[0] - 1, block[1])]:  # nothing to come sees these
                        del cache[gone]
                errors.append(float((part - truth[own]).abs().max()))
            found.append((max(errors) / float(truth.abs().max()), most))
        (error, most), (other, same) = found
        holds = max(error, other) <= torch.finfo(torch.float64).eps * 8 * 12 * 7 and most == same
        figure = f"{max(error, other):.0e} apart after 3 layers; {most} tokens kept of 63, {same} of 84"
        return Finding(holds, figure)

    @claim("After l layers a block depends on the blocks up to l above and l on the left, and on no other.")
    def reach(cls) -> Finding:
        grid, found = (15, 15), []
        for depth in (1, 2, 3):
            stack = functools.partial(cls.one_shot, layers=cls.layers(depth, grid))
            seen = reached(stack, torch.randn(225, 8, dtype=torch.float64), 10 * 15 + 10)  # in block (3, 3)
            seen = seen.view(5, 3, 5, 3).any(3).any(1)
            expected = torch.zeros(5, 5, dtype=torch.bool)
            expected[3 - depth : 4, 3 - depth : 4] = True
            found.append((int(seen.sum()), bool((seen == expected).all())))
        counts = ", ".join(str(count) for count, _ in found)
        return Finding(all(right for _, right in found), f"{counts} of 25 blocks after 1, 2, 3 layers")

    @claim("With p = 0 the copies at the border weigh nothing; with a learned p they do, and cannot be dropped.")
    def copies(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 2, 49, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        plain = cls(Dims(2, 4, grid=(7, 7)), block=3, rope=False).double()
        with torch.no_grad():
            same = float((plain(q, k, v) - attend(q, k, v, plain.plan(q, k))).abs().max())
        ((module, _),) = cls.layers(1, (7, 7))
        every, here, left = torch.arange(49), module.tokens()[0, 1], module.tokens()[0, 0]
        rotated, keys = module.rotate(q, every), module.rotate(k, every)
        placed = [keys[:, :, here] + module.offsets[0][:, None], keys[:, :, left] + module.offsets[2][:, None]]
        dropped = attend(rotated[:, :, here], torch.cat(placed, 2), v[:, :, [*here, *left]])
        change = float((module(q, k, v)[:, :, here] - dropped).abs().max())
        holds = same <= torch.finfo(torch.float64).eps * 49 * float(v.abs().max()) and change > float(v.std()) / 10
        return Finding(holds, f"without copies {same:.0e} off where p = 0, {change:.2f} in the first row with random p")
