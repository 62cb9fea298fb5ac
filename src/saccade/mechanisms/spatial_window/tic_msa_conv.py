"""TiC's MSA-Conv: attention in a window that slides as that of a convolution, zeros around, then a convolution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.mix import to_map, to_tokens
from saccade.where import GridBlocks


class Sliding(nn.Module):
    """softmax over the taps of a window around each query, q, k, v (B, H, N, D); k and v are zero beyond the grid."""

    def __init__(self, grid: Sequence[int], kernel: Sequence[int], dilation: int) -> None:
        super().__init__()
        reach = [size // 2 for size in kernel]
        self.grid, self.around = tuple(grid), [r * dilation for r in reach]
        padded = [n + 2 * r for n, r in zip(grid, self.around, strict=True)]
        self.pattern = GridBlocks(padded, 1, reach, reach, dilation=dilation)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (height, width), (down, across) = self.grid, self.around
        sides = (0, 0, across, across, down, down)
        q, k, v = (nn.functional.pad(x.unflatten(2, self.grid), sides).flatten(2, 3) for x in (q, k, v))
        o = attend(q, k, v, self.pattern).unflatten(2, self.pattern.grid)
        return o[:, :, down : down + height, across : across + width].flatten(2, 3)


class TicMsaConv(Mixer):
    """Multi-head self-attention convolution: a window around every query, the input added, a convolution, relu.

        u_p = sum_o softmax_o(q_p . k_{p + d o} / sqrt(D)) v_{p + d o}   over the K_y x K_x offsets o around 0
        y = relu(Conv(u + x))

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, k, v (N, D): projections with bias, for each of H
    heads; beyond the border k and v are zero and not masked: such a tap has the logit 0 and no value, so it takes mass.
    Conv: K_y x K_x, zeros around, not dilated, no bias.
    Paper: arXiv 2310.04134; the formula follows the authors' code (Transformer_in_Convolution.py), which has one head.
    Deviations: the authors' convolution also strides and changes the width; here a layer keeps its grid, and what leads
    to another is the host's. No dropout on the weights (0.1 there). What the abstract adds around the layer, cyclic
    shifts of the map and pooling between layers, is not in their code and not here. Even kernels, which have no centre,
    are refused. Heads may share keys.
    kernel: K, one number or (K_y, K_x), odd (default 3; the authors' code has none). dilation: d (1).
    Costs 2 N K_y K_x C multiplications in the products, beside the projections and N K_y K_x C^2 of the convolution.
    Errors: ValueError when dims.grid has not two axes, or kernel is even or not two numbers.

    >>> layer = TicMsaConv(Dims(2, 4, grid=(5, 9)), kernel=(3, 5), dilation=2)
    >>> layer(torch.randn(1, 45, 8)).shape
    torch.Size([1, 45, 8])
    """

    spec = Spec(
        id="tic_msa_conv",
        name="TiC (MSA-Conv)",
        title="TiC: Exploring Vision Transformer in Convolution",
        paper="2310.04134",
        year=2023,
        family="spatial_window",
        uses=("attend", "GridBlocks"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, kernel: int | Sequence[int] = 3, dilation: int = 1) -> None:
        super().__init__(dims)
        sizes = [positive("kernel", n) for n in (kernel if isinstance(kernel, Sequence) else (kernel, kernel))]
        if len(sizes) != 2 or not all(size % 2 for size in sizes):
            raise ValueError(f"kernel: got {kernel!r}; pass an odd number, or two, (K_y, K_x)")
        self.kernel, self.dilation, d = (sizes[0], sizes[1]), positive("dilation", dilation), dims
        self.qkv = nn.Linear(d.dim, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim)
        self.attention = Sliding(d.grid or (), sizes, dilation)
        padding = sizes[0] // 2, sizes[1] // 2
        self.conv = nn.Conv2d(d.dim, d.dim, self.kernel, padding=padding, bias=False)

    def compute(self, x: Tensor) -> Tensor:
        d = self.dims
        u = self.attention(*d.split(self.qkv(x)))
        return to_tokens(self.conv(to_map(u.transpose(1, 2).flatten(2) + x, d.grid or ()))).relu()

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width), (down, across) = (
            dict(self.named_parameters()),
            self.dims,
            self.dims.grid or (),
            self.kernel,
        )
        offsets = list(itertools.product(range(-(down // 2), down // 2 + 1), range(-(across // 2), across // 2 + 1)))
        parts = (x @ w["qkv.weight"].T + w["qkv.bias"]).split(d.head_dim, -1)
        parts = [torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in parts]  # the last one is beyond the border

        def at(y: int, c: int) -> int:
            return y * width + c if 0 <= y < height and 0 <= c < width else height * width

        u = torch.empty_like(x)
        for y, c in itertools.product(range(height), range(width)):
            seen, mixed = [at(y + self.dilation * a, c + self.dilation * b) for a, b in offsets], []
            for h in range(d.num_heads):
                g = d.num_heads + h // (d.num_heads // d.num_kv_heads)
                scores = (parts[h][:, at(y, c), None] * parts[g][:, seen]).sum(-1) / d.head_dim**0.5
                mixed.append((scores.softmax(-1)[..., None] * parts[g + d.num_kv_heads][:, seen]).sum(1))
            u[:, at(y, c)] = torch.cat(mixed, -1)
        u = torch.cat([u + x, torch.zeros_like(x[:, :1])], 1)
        out = []
        for y, c in itertools.product(range(height), range(width)):
            taps = zip(offsets, w["conv.weight"].flatten(2).unbind(-1), strict=True)
            out.append(torch.stack([u[:, at(y + a, c + b)] @ tap.T for (a, b), tap in taps]).sum(0).clamp(min=0))
        return torch.stack(out, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"kernel": (3, 5), "dilation": 2}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 3)), 12, {"kernel": 5}, batch=1),
            Case(Dims(1, 5, grid=(6, 2)), 12, {"kernel": (1, 3), "dilation": 3}, batch=1),
        ]

    @claim("Its weights fit any map, and away from the border the output moves with the input.")
    def any_size(cls) -> Finding:
        small, large = (cls(Dims(2, 4, grid=grid), kernel=5).double() for grid in ((11, 13), (17, 23)))
        large.load_state_dict(small.state_dict())
        x = torch.randn(1, 17, 23, 8, dtype=torch.float64)
        with torch.no_grad():
            part = small(x[:, 3:14, 5:18].flatten(1, 2)).unflatten(1, (11, 13))[:, 4:-4, 4:-4]
            whole = large(x.flatten(1, 2)).unflatten(1, (17, 23))[:, 7:10, 9:14]
        error, size = float((part - whole).abs().max()), float(whole.abs().max())
        allowed = 25 * 8 * torch.finfo(torch.float64).eps * size  # sums over the taps and channels, in another order
        return Finding(
            error <= allowed < size, f"largest difference {error:.1e} of {size:.2f} between 11 x 13 and 17 x 23"
        )

    @claim("Taps beyond the border take mass: of uniform weights over ones, what is inside the window is left.")
    def border_mass(cls) -> Finding:
        zero, ones = torch.zeros(1, 1, 64, 4), torch.ones(1, 1, 64, 4)
        o = cls(Dims(1, 4, grid=(8, 8)), kernel=(3, 5)).attention(zero, zero, ones)[0, 0, :, 0].unflatten(0, (8, 8))
        found = [float(o[y, x]) for y, x in ((0, 0), (0, 4), (4, 4))]
        truth = [2 * 3 / 15, 2 * 5 / 15, 1.0]
        rounding = 15 * torch.finfo(torch.float32).eps
        holds = all(abs(a - b) <= rounding for a, b in zip(found, truth, strict=True))
        return Finding(
            holds, f"{found[0]:.3f} in a corner, {found[1]:.3f} at an edge, {found[2]:.3f} inside, 3 x 5 taps"
        )

    @claim("A kernel of 1 leaves v: attention weighs one tap.")
    def single(cls) -> Finding:
        attention = cls(Dims(2, 4, grid=(5, 7)), kernel=1).attention
        q, k, v = (torch.randn(1, 2, 35, 4, dtype=torch.float64) for _ in range(3))
        error = float((attention(q, k, v) - v).abs().max())
        return Finding(
            error <= torch.finfo(torch.float64).eps * float(v.abs().max()), f"largest difference {error:.1e}"
        )

    @claim("A query weighs K_y K_x keys, whatever the map: with the zeros around, pairs grow as positions.")
    def linear(cls) -> Finding:
        found = []
        for grid in ((24, 20), (24, 40)):
            pattern = cls(Dims(1, 4, grid=grid), kernel=(3, 5)).attention.pattern
            n = torch.Size(pattern.grid).numel()
            found.append(int(pattern.plan(n, n, 1, block=(16, 16)).num_attended))
        truth = [(3 * (y + 2) - 2) * (5 * (x + 4) - 6) for y, x in ((24, 20), (24, 40))]  # zeros see zeros, cut
        holds = found == truth and all(15 * n <= pairs for n, pairs in zip((480, 960), found, strict=True))
        return Finding(holds, f"{found[0]} and {found[1]} pairs for 3 x 5 taps on 24 x 20 and 24 x 40")
