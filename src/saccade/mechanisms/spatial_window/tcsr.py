"""TCSR: neighbourhood attention in the place of large convolutions, and a feed-forward layer that shifts channels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached
from saccade.errors import positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.mix import to_map, to_tokens
from saccade.where import Neighborhood

PLUS = ((0, 1), (0, -1), (1, 0), (-1, 0))
RING = (*PLUS, (1, 1), (1, -1), (-1, 1), (-1, -1))


class Near(nn.Module):
    """Attention to the kernel x kernel positions nearest to each query, q, k, v (B, H, N, D)."""

    def __init__(self, dims: Dims, kernel: int) -> None:
        super().__init__()
        self.dims, self.pattern = dims, Neighborhood(dims.grid or (), kernel)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)


class Shift(nn.Module):
    """Groups of channels, each from one position away: y[p] = x[p - a_g], zeros beyond the border; no parameters."""

    def __init__(self, grid: tuple[int, ...], directions: int) -> None:
        super().__init__()
        self.grid, self.steps = grid, RING[:directions]

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.grid
        groups = nn.functional.pad(to_map(x, self.grid), (1, 1, 1, 1)).chunk(len(self.steps), 1)
        moved = [
            group[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
            for group, (down, right) in zip(groups, self.steps, strict=True)
        ]
        return to_tokens(torch.cat(moved, 1))


class Tcsr(Mixer):
    """A block of neighbourhood attention and of the enhanced feed-forward network (EFFN).

        x <- x + W_o NA(LN x),   x <- x + W_2 gelu(Shift(W_1 LN x))
        NA: o_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(D)) v_j
        Shift(h)[p] = h[p - a_g] for the channels of group g, zero beyond the border

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, k, v (N, D): projections of LN x with bias, for each
    of H heads; N(i): the k x k positions nearest to i, clamped inside the grid; the hidden channels fall into equal
    groups, moved one position right, left, down and up (and along the diagonals with 8 directions).
    Paper: arXiv 2303.14324. Its abstract fixes this much: self-attention in a sliding window takes the place of a
    convolution with a large kernel, and the feed-forward network shifts in space without parameters.
    Deviations: the rest is our reading, for no code is public: the pre-norm residual block around both parts, no bias
    of position, clamped windows, where the shift stands, its zeros, groups and directions, gelu, and every default. The
    model around the blocks is not here. Heads may share keys.
    kernel: k (default 7). directions: of the shift, 4 or 8 (4). mlp_ratio: hidden width of EFFN over C (2).
    Costs 2 N k^2 C multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes, kernel exceeds one, directions is neither 4 nor 8, or does not
    divide the hidden width.

    >>> block = Tcsr(Dims(2, 4, grid=(5, 9)), kernel=3)
    >>> block(torch.randn(1, 45, 8)).shape
    torch.Size([1, 45, 8])
    """

    spec = Spec(
        id="tcsr",
        name="TCSR",
        title="Incorporating Transformer Designs into Convolutions for Lightweight Image Super-Resolution",
        paper="2303.14324",
        year=2023,
        family="spatial_window",
        uses=("attend", "Neighborhood"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, kernel: int = 7, directions: int = 4, mlp_ratio: int = 2) -> None:
        super().__init__(dims)
        grid, hidden = dims.grid or (), dims.dim * positive("mlp_ratio", mlp_ratio)
        if positive("directions", directions) not in (4, 8):
            raise ValueError(f"directions: got {directions}; pass 4 or 8")
        if hidden % directions:
            raise ValueError(f"directions: got {directions} for a hidden width of {hidden}; pass a divisor")
        self.kernel, self.directions = positive("kernel", kernel), directions
        enter, leave = nn.Linear(dims.dim, hidden), nn.Linear(hidden, dims.dim)
        effn = nn.Sequential(enter, Shift(grid, directions), nn.GELU(), leave)
        self.block = Block(dims, AttentionMixer(Near(dims, kernel)), mlp=effn)

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, k, (height, width) = Weights(self, "block."), self.dims, self.kernel, self.dims.grid or ()

        parts, out = w.linear(w.norm(x, "norm_mixer"), "mixer.qkv").split(d.head_dim, -1), torch.empty_like(x)
        for y, c in itertools.product(range(height), range(width)):
            top, left = (min(max(at - k // 2, 0), n - k) for at, n in ((y, height), (c, width)))
            seen = [a * width + b for a in range(top, top + k) for b in range(left, left + k)]
            for h in range(d.num_heads):
                g = d.num_heads + h // (d.num_heads // d.num_kv_heads)
                scores = (parts[h][:, y * width + c, None] * parts[g][:, seen]).sum(-1) / d.head_dim**0.5
                mixed = (scores.softmax(-1)[..., None] * parts[g + d.num_kv_heads][:, seen]).sum(1)
                out[:, y * width + c, h * d.head_dim : (h + 1) * d.head_dim] = mixed
        x = x + w.linear(out, "mixer.out")

        steps = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)][: self.directions]
        hidden = w.linear(w.norm(x, "norm_mlp"), "mlp.0")
        moved, share = torch.zeros_like(hidden), hidden.shape[-1] // len(steps)
        for g, (down, right) in enumerate(steps):
            own = slice(g * share, (g + 1) * share)
            for y, c in itertools.product(range(height), range(width)):
                if 0 <= y - down < height and 0 <= c - right < width:
                    moved[:, y * width + c, own] = hidden[:, (y - down) * width + c - right, own]
        return x + w.linear(moved / 2 * (1 + torch.erf(moved / 2**0.5)), "mlp.3")

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(5, 7)), 35, {"kernel": 3, "directions": 8, "mlp_ratio": 1}),
            Case(Dims(4, 3, num_kv_heads=2, grid=(4, 6)), 24, {"kernel": 4, "mlp_ratio": 3}, batch=1),
            Case(Dims(1, 4, grid=(3, 3)), 9, {"kernel": 3}, batch=1),
        ]

    @claim("The attention has as many parameters at every kernel, where those of a convolution grow as its square.")
    def constant_size(cls) -> Finding:
        own, conv = [], []
        for kernel in (3, 7, 13):
            mixer = cls(Dims(4, 8, grid=(13, 13)), kernel=kernel).block.mixer
            own.append(sum(p.numel() for p in mixer.parameters()))
            conv.append(sum(p.numel() for p in nn.Conv2d(32, 32, kernel).parameters()))
        holds = own[0] == own[1] == own[2] < conv[0]
        return Finding(holds, f"{own[0]} at k = 3, 7 and 13; a convolution {conv[0]}, {conv[1]} and {conv[2]}")

    @claim("The shift gives two layers of single positions the support of a plus, or of a ring, at no parameter.")
    def support(cls) -> Finding:
        shapes = {4: ["010", "101", "010"], 8: ["111", "101", "111"]}
        found, added = {}, 0
        for directions in shapes:
            effn = cls(Dims(2, 4, grid=(7, 7)), directions=directions).double().block.mlp
            x = torch.randn(1, 49, 8, dtype=torch.float64)
            seen = reached(effn, x, (0, 24)).view(7, 7)
            found[directions] = ["".join(str(int(s)) for s in row[2:5]) for row in seen[2:5]]
            added += int(seen.sum()) - sum(row.count("1") for row in shapes[directions])
            added += sum(p.numel() for p in effn[1].parameters())
        return Finding(found == shapes and not added, f"{found[4]} with 4 directions, {found[8]} with 8")

    @claim("Every query has k^2 keys, at the border too: the work is linear in the positions.")
    def linear(cls) -> Finding:
        counts = []
        for grid in ((16, 20), (16, 40)):
            pattern, n = cls(Dims(1, 4, grid=grid), kernel=5).block.mixer.attention.pattern, torch.Size(grid).numel()
            counts.append(int(pattern.plan(n, n, 1, block=(16, 16)).num_attended))
        return Finding(
            counts == [25 * 320, 25 * 640], f"{counts[0]} and {counts[1]} pairs on 16 x 20 and 16 x 40, k = 5"
        )
