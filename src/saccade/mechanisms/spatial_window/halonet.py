"""HaloNet's blocked local attention: the pixels of a block share one window, the block and a halo around it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known, positive
from saccade.where import GridBlocks, Pattern, Plan


class Halonet(Attention):
    """Blocked local attention on a grid (Y, X).

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D) + q_i . (r[y_j - y_i] + c[x_j - x_i])) v_j
        over the w x w positions j of i's block of b x b pixels and a halo of h around it, w = b + 2h

    q (B, H, N, D), k, v (B, Hkv, N, D) row-major, N = Y X -> o (B, H, N, D); r, c (2 (b + h) - 1, D): learned vectors,
    one an offset, shared by the heads. Beyond the border k and v are zero and not masked: such a position has the logit
    q_i . (r + c) and no value, so it takes mass. A grid that b does not divide is filled up with such positions below
    and on the right. Called with stride=s, a divisor of b, the layer keeps the queries of every s-th row and column
    alone: attention as down-sampling, o (B, H, ceil(Y / s) ceil(X / s), D), offsets in pixels of the full map.
    Paper: arXiv 2103.12731, blocked local attention and attention down-sampling; the authors' code is not public. What
    the paper leaves open follows timm (timm.layers.halo_attn.HaloAttn): the relative term is not scaled, zeros are
    padded after the projections and take mass. Another public version masks them: border="mask".
    Deviations: projections are those of the host, and queries are strided after theirs, which is the same; timm's
    tables have 2h rows more in front that no pair reads, and it measures the offsets of strided queries in the smaller
    block, where ours make the output the sub-sampled one; timm refuses grids that b does not divide.
    block: b, pixels a side of a block (default 8). halo: h, pixels around it (3). border: "zero", or "mask": no
    attention beyond the border. relative: learn r and c (True); without, only q . k is weighed.
    Costs 2 N w^2 (D + w) multiplications and memory of N keys of D + 2w channels: the relative term travels in the 2w,
    of the query its logits, of the key its row and column modulo w, as one-hot vectors, which tell places in every
    window apart. Tiles of windows of 14 x 14 among 8 x 8 pixels hold 256 keys a block in cells that begin where windows
    do, 1.3 times the 196 that it sees, and kernels round D + 2w up to a power of two. With a stride windows are copied,
    N w^2 / b^2 keys and values.
    Errors: ValueError or TypeError when dims.grid has not two axes, for a block or stride that is no positive integer,
    a negative halo, an unknown border, or a stride that does not divide block.

    >>> halo, x = Halonet(Dims(2, 8, grid=(7, 9)), block=4, halo=1), torch.randn(1, 2, 63, 8)
    >>> halo(x, x, x).shape, halo(x, x, x, stride=2).shape
    (torch.Size([1, 2, 63, 8]), torch.Size([1, 2, 20, 8]))
    """

    spec = Spec(
        id="halonet",
        name="HaloNet",
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        paper="2103.12731",
        year=2021,
        family="spatial_window",
        uses=("attend", "GridBlocks"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, block: int = 8, halo: int = 3, border: str = "zero", relative: bool = True
    ) -> None:
        super().__init__(dims)
        self.block, self.halo = positive("block", block), positive("halo", halo, least=0)
        self.border = known("border", border, ("zero", "mask"))
        self.grid, self.side = dims.grid or (), block + 2 * halo
        self.blocks = tuple(-(-length // block) for length in self.grid)
        sizes = 2 * (block + halo) - 1, dims.head_dim
        self.rows, self.columns = (
            nn.Parameter(torch.randn(sizes) * dims.head_dim**-0.5) if relative else None for _ in range(2)
        )

    def pattern(self) -> Pattern:
        """The pixels of the grid that each query sees."""
        return GridBlocks(self.grid, self.block, self.halo, self.halo)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern().plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def padded(self, x: Tensor, halo: int) -> Tensor:
        """Tokens (B, H, N, D) as a map of whole blocks and a halo around them, zero outside the grid."""
        (down, right), b = (n * self.block - size for n, size in zip(self.blocks, self.grid, strict=True)), halo
        return nn.functional.pad(x.unflatten(2, self.grid), (0, 0, b, b + right, b, b + down))

    def windows(self, x: Tensor) -> Tensor:
        """The window of every block, a view: tokens (B, H, N, D) -> (B, Y / b, X / b, H, w, w, D)."""
        around = self.padded(x, self.halo)
        for axis in (2, 3):
            around = around.unfold(axis, self.side, self.block)
        return around.permute(0, 2, 3, 1, 5, 6, 4)

    def relative(self, q: Tensor, table: nn.Parameter | None, axis: int, stride: int) -> Tensor:
        """Logits of a query with the w offsets of an axis: q (B, Y / b, X / b, H, t, t, D) -> (..., w)."""
        inside = torch.arange(0, self.block, stride, device=q.device)
        places = torch.arange(self.side, device=q.device)
        if table is None:
            logits = q.new_zeros(*q.shape[:-1], self.side)
        else:
            offsets = table[places - inside[:, None] + self.block - 1]  # (t, w, D)
            logits = torch.einsum(("abchyxd,ywd" if axis == 0 else "abchyxd,xwd") + "->abchyxw", q, offsets)
        if self.border == "zero":
            return logits
        at = places - self.halo + torch.arange(self.blocks[axis], device=q.device)[:, None] * self.block
        beyond = (at < 0) | (at >= self.grid[axis])  # (blocks of the axis, w)
        beyond = beyond.view([-1 if i == 1 + axis else 1 for i in range(6)] + [self.side])
        return logits.masked_fill(beyond, torch.finfo(q.dtype).min / 4)  # two of them, and q . k, stay finite

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, stride: int = 1) -> Tensor:
        if self.block % positive("stride", stride):
            raise ValueError(f"stride: got {stride} for block {self.block}; pass a divisor of block")
        return self.whole(q, k, v) if stride == 1 else self.sampled(q, k, v, stride)

    def bearings(self, q: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """By residue modulo w, of which a window holds each once: a query's logits with the row or column of its window
        that has it (B, H, N, w), which of these lie beyond the border (N, w), and the residue of a key (N, w), one-hot.
        """
        w, table = self.side, (self.rows, self.columns)[axis]
        at = torch.arange(q.shape[2], device=q.device)
        at, residues = (at // self.grid[1], at % self.grid[1])[axis][:, None], torch.arange(w, device=q.device)
        inside = at % self.block
        first = at - inside - self.halo
        place = (residues - first) % w
        if table is None:
            logits = q.new_zeros(*q.shape[:3], w)
        else:
            offset = place - inside + self.block - 1
            logits = (q @ table.T).gather(-1, offset.expand(*q.shape[:2], -1, -1))
        beyond = (first + place < 0) | (first + place >= self.grid[axis])
        return logits, beyond, at % w == residues

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query, its keys read where they lie; what lies beyond the border has no value and joins the sum."""
        (down, above, rows), (across, beside, columns) = (self.bearings(q, axis) for axis in (0, 1))
        queries, keys, width = q * q.shape[3] ** -0.5, k, q.shape[3]
        if self.rows is not None:
            places = torch.cat([rows, columns], -1).to(k.dtype).expand(*k.shape[:3], -1)
            queries, keys = torch.cat([queries, down, across], -1), torch.cat([k, places], -1)
            short = -(width + 2 * self.side) % 8  # rows of whole 16 bytes, which copies of tiles want
            queries, keys = (nn.functional.pad(x, (0, short)) for x in (queries, keys))
        if self.border == "mask":
            return attend(queries, keys, v, self.pattern(), scale=1.0)
        o, lse = attend(queries, keys, v, self.pattern(), scale=1.0, return_lse=True)
        least = torch.finfo(lse.dtype).min / 8  # of which two, added, are finite

        def total(logits: Tensor, hidden: Tensor) -> Tensor:
            return logits.to(lse.dtype).masked_fill(hidden, least).logsumexp(-1)

        every = torch.zeros_like(beside)
        outside = torch.logaddexp(
            total(down, ~above) + total(across, every), total(down, above) + total(across, ~beside)
        )
        return o * (lse - torch.logaddexp(lse, outside)).exp()[..., None].to(o.dtype)

    def sampled(self, q: Tensor, k: Tensor, v: Tensor, stride: int) -> Tensor:
        """The queries of every stride-th row and column, with a window of keys a block."""
        (down, across), b = self.blocks, self.block
        q = self.padded(q, 0).unflatten(3, (across, b)).unflatten(2, (down, b))[:, :, :, ::stride, :, ::stride]
        q = q.permute(0, 2, 4, 1, 3, 5, 6)  # (B, Y / b, X / b, H, t, t, D), t = b / stride
        logits = [self.relative(q, table, axis, stride) for axis, table in enumerate((self.rows, self.columns))]
        place = torch.eye(self.side, dtype=k.dtype, device=k.device)
        places = torch.cat(torch.broadcast_tensors(place[:, None], place[None]), -1)  # (w, w, 2 w)
        q, k = torch.cat([q * q.shape[-1] ** -0.5, *logits], -1), self.windows(k)
        k = torch.cat([k, places.expand(*k.shape[:-1], -1)], -1)
        missing, dim = max(0, q.shape[-1] - v.shape[-1]), v.shape[-1]
        v = nn.functional.pad(self.windows(v), (0, missing))  # fused kernels want values as wide as the keys
        q, k, v = (x.flatten(4, 5).flatten(0, 2) for x in (q, k, v))
        o = attend(q, k, v, scale=1.0)[..., :dim]
        t = b // stride
        o = o.unflatten(2, (t, t)).unflatten(0, (-1, down, across)).permute(0, 3, 1, 4, 2, 5, 6)
        height, width = (-(-length // stride) for length in self.grid)
        return o.flatten(4, 5).flatten(2, 3)[:, :, :height, :width].flatten(2, 3)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, stride: int = 1) -> Tensor:
        (height, width), b, h, tables = self.grid, self.block, self.halo, dict(self.named_parameters())
        nothing, reads = height * width, torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2)[:, reads] for x in (k, v))  # the last one is outside
        out = []
        for y, x in itertools.product(range(0, height, stride), range(0, width, stride)):
            top, left = y - y % b - h, x - x % b - h
            seen = list(itertools.product(range(top, top + b + 2 * h), range(left, left + b + 2 * h)))
            keys = [r * width + c if 0 <= r < height and 0 <= c < width else nothing for r, c in seen]
            if self.border == "mask":
                seen = [place for place, key in zip(seen, keys, strict=True) if key != nothing]
                keys = [key for key in keys if key != nothing]
            query = q[:, :, y * width + x, None]
            scores = (query * k[:, :, keys]).sum(-1) / q.shape[3] ** 0.5
            if tables:
                down = tables["rows"][[r - y + b + h - 1 for r, _ in seen]]
                across = tables["columns"][[c - x + b + h - 1 for _, c in seen]]
                scores = scores + (query * (down + across)).sum(-1)
            out.append((scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2))
        return torch.stack(out, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(7, 11)), 77, {"block": 4, "halo": 2}),
            Case(Dims(4, 4, 2, grid=(5, 9)), 45, {"block": 3, "halo": 1, "border": "mask"}),
            Case(Dims(2, 8, grid=(6, 5)), 30, {"block": 2, "halo": 0, "relative": False}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"block": max(dims.grid or (1,)), "halo": 0, "border": "mask", "relative": False}

    @claim("Blocks of one pixel are the sliding window of (2h + 1)^2, under either border rule.")
    def sliding(cls) -> Finding:
        (height, width), h, side = (9, 13), 2, 5
        q, k, v = (torch.randn(1, 2, height * width, 8, dtype=torch.float64) for _ in range(3))
        around = nn.functional.pad(torch.ones(1, 1, height, width, dtype=torch.float64), (h, h, h, h))
        beyond = around.unfold(2, side, 1).unfold(3, side, 1).reshape(height * width, side * side) == 0

        def every(x: Tensor) -> Tensor:  # (H, N, window, D), pixel by pixel
            patches = nn.functional.unfold(x[0].mT.reshape(1, -1, height, width), side, padding=h)
            return patches.view(2, 8, side * side, -1).permute(0, 3, 2, 1)

        errors = []
        for border in ("zero", "mask"):
            module = cls(Dims(2, 8, grid=(height, width)), block=1, halo=h, border=border).double()
            with torch.no_grad():
                offsets = (module.rows[:, None] + module.columns[None]).flatten(0, 1)
                scores = torch.einsum("hnd,hnwd->hnw", q[0], every(k) * 8**-0.5 + offsets)
                scores = scores.masked_fill(beyond, -torch.inf) if border == "mask" else scores
                window = torch.einsum("hnw,hnwd->hnd", scores.softmax(-1), every(v))
                errors.append(float((module(q, k, v)[0] - window).abs().max()))
        figure = f"largest difference {errors[0]:.1e} (zero), {errors[1]:.1e} (mask) at h = 2 on 9 x 13"
        return Finding(max(errors) < 1e-13, figure)

    @claim(
        "A pixel's share of the gathered keys is (b + 2h)^2 / b^2, not (2h + 1)^2; the work is linear in the pixels."
    )
    def gathered(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        shares, work = [], []
        for block, height in ((8, 32), (1, 32), (8, 64)):
            module, x = cls(Dims(1, 16, grid=(height, 40)), block=block), torch.randn(1, 1, height * 40, 16)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x, x, x)
            work.append(counter.get_total_flops())
            shares.append(module.windows(x).numel() / x.numel())
        holds = shares == [14**2 / 8**2, 49, 14**2 / 8**2] and 2 * work[0] <= work[2] < 2.3 * work[0]  # less at borders
        figure = f"{shares[0]:.2f} keys a pixel at b = 8, h = 3, {shares[1]:.0f} pixel by pixel"
        return Finding(holds, f"{figure}; {work[2] / work[0]:.3f} times the work at twice N")

    @claim("Strided queries give the sub-sampled output; each doubling of the stride quarters the attention's work.")
    def strided(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        module, found, work = cls(Dims(2, 8, grid=(19, 29))).double(), [], []
        q, k, v = (torch.randn(1, 2, 19 * 29, 8, dtype=torch.float64) for _ in range(3))
        for stride in (1, 2, 4):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                found.append(module(q, k, v, stride=stride))
            work.append(counter.get_total_flops())
        whole, error = found[0].unflatten(2, (19, 29)), 0.0
        for stride, o in zip((2, 4), found[1:], strict=True):
            error = max(error, float((o - whole[:, :, ::stride, ::stride].flatten(2, 3)).abs().max()))
        figure = f"largest difference {error:.1e} on 19 x 29, at stride 4 {work[2] / work[1]:.2f} of the work at 2"
        return Finding(error < 1e-13 and 4 * work[2] == work[1], figure)

    @claim("Zeros beyond the border take mass: uniform weights over ones give ((b + h) / (b + 2h))^2 in a corner.")
    def border_mass(cls) -> Finding:
        q, ones, corner = torch.zeros(1, 1, 24 * 24, 4), torch.ones(1, 1, 24 * 24, 4), []
        for border in ("zero", "mask"):
            with torch.no_grad():
                o = cls(Dims(1, 4, grid=(24, 24)), border=border)(q, ones, ones).unflatten(2, (24, 24))
            corner.append(float(o[0, 0, 0, 0, 0]))
        holds = abs(corner[0] - (11 / 14) ** 2) < 1e-5 and abs(corner[1] - 1) < 1e-5
        return Finding(holds, f"{corner[0]:.3f} in a corner block at b = 8, h = 3, and {corner[1]:.3f} with the mask")
