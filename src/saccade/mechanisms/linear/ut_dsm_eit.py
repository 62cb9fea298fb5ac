"""The integral attention of the U-Integral transformer: a kernel q . k without softmax, a mean over the grid."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.mix import DepthwiseConv, to_map, to_tokens
from saccade.scan import linear_attention


class Separable(nn.Module):
    """A depthwise 3 x 3 convolution and a product at every point, tokens (B, N, dim_in) -> (B, N, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim_in, (3, 3), bias=False)
        self.pointwise = nn.Linear(dim_in, dim_out, bias=False)
        for weight in (self.depthwise.weight, self.pointwise.weight):
            nn.init.xavier_uniform_(weight, gain=1e-2)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.pointwise(self.depthwise(x, grid))


class HeadNorm(nn.Module):
    """LayerNorm over the channels of a head, (B, heads, N, E), with a weight and a bias for each head."""

    def __init__(self, num_heads: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, 1, channels))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.weight + self.bias


class UTDSM(Mixer):
    """Attention as an integral transform: the mean over the grid of k(q(x), k(y)) v(y), with a kernel q . k.

        o_i = LN_o(v_i + sum_j (q_i . k_j / (sqrt(E) n)) v_j) = LN_o(v_i + q_i (sum_j k_j v_j^T) / (sqrt(E) n))
        y = GroupNorm_1(S_o o),   q, k, v = LN_q, LN_k, id of S_qkv(x + W p + w)

    x, y (B, n, C): a row-major grid (Y, X) of n points; p (n, 2) their coordinates, from 0 to 1 on each axis; q, o
    (B, H, n, E), k, v (B, Hkv, n, E), E = expand D; S: a depthwise 3 x 3 convolution and a product at every point,
    without biases; LN: of a head, with weights of its own. Paper: arXiv 2209.14977, where direct sampling for
    electrical impedance tomography is written as such a kernel; the layer is the one at the bottom of the authors'
    U-Net (their key `uit`), whose code forms the n x n kernel. Deviations: the channels of a head lie side by side. The
    attention of the skips, where q and k come from the coarser map and v from the finer one, and the U-Net belong to
    the host. Query heads may share keys and values.
    expand: channels of a head over D (2).
    Costs 2 n E^2 a head beside the convolutions; linear in n. Errors: ValueError when dims.grid has not two axes.

    >>> UTDSM(Dims(num_heads=2, head_dim=4, grid=(5, 7)))(torch.randn(1, 35, 8)).shape
    torch.Size([1, 35, 8])
    """

    spec = Spec(
        id="ut_dsm_eit",
        name="U-Integral Transformer (EIT)",
        title="Transformer Meets Boundary Value Inverse Problems",
        paper="2209.14977",
        year=2022,
        family="linear",
        uses=("linear_attention", "DepthwiseConv"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, expand: int = 2) -> None:
        super().__init__(dims)
        c, kv = dims.dim, dims.num_kv_heads
        self.grid, self.width = dims.grid or (), positive("expand", expand) * dims.head_dim
        self.position = nn.Linear(2, c)
        self.qkv = Separable(c, (dims.num_heads + 2 * kv) * self.width)
        self.norm_q, self.norm_k = HeadNorm(dims.num_heads, self.width), HeadNorm(kv, self.width)
        self.norm_o = HeadNorm(dims.num_heads, self.width)
        self.out = Separable(dims.num_heads * self.width, c)
        self.norm = nn.GroupNorm(1, c, eps=1e-6)

    def points(self, like: Tensor) -> Tensor:
        """Coordinates of the grid's points, (n, 2)."""
        axes = [torch.linspace(0, 1, size, dtype=like.dtype, device=like.device) for size in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)

    def integral(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, n, E): the mean of q . k / sqrt(E) times v over the points of k and v."""
        scale = q.shape[3] ** -0.5 / k.shape[2]
        return cast(Tensor, linear_attention(q, k, v, causal=False, scale=scale))

    def compute(self, x: Tensor) -> Tensor:
        d = self.dims
        x = x + self.position(self.points(x))
        q, k, v = d.split(self.qkv(x, self.grid))
        o = self.integral(self.norm_q(q), self.norm_k(k), v) + v.repeat_interleave(d.group, 1)
        y = self.out(self.norm_o(o).transpose(1, 2).flatten(2), self.grid)
        return to_tokens(self.norm(to_map(y, self.grid)))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = dict(self.named_parameters()), self.dims, self.grid
        down, right = (torch.arange(n, dtype=x.dtype) / max(1, n - 1) for n in (height, width))
        at = torch.stack([down[:, None].expand(height, width), right.expand(height, width)], -1)
        image = x.unflatten(1, (height, width)) + at @ w["position.weight"].T + w["position.bias"]

        def separable(image: Tensor, name: str) -> Tensor:
            kernel = w[f"{name}.depthwise.weight"]
            rows = []
            for i in range(height):
                for j in range(width):
                    total = torch.zeros_like(image[:, 0, 0])
                    for a in range(max(0, i - 1), min(height, i + 2)):
                        for b in range(max(0, j - 1), min(width, j + 2)):
                            total = total + kernel[:, 0, a - i + 1, b - j + 1] * image[:, a, b]
                    rows.append(total)
            return torch.stack(rows, 1) @ w[f"{name}.pointwise.weight"].T

        def normed(y: Tensor, name: str, head: int) -> Tensor:
            y = y - y.mean(-1, keepdim=True)
            y = y / ((y * y).mean(-1, keepdim=True) + 1e-6) ** 0.5
            return y * w[f"{name}.weight"][head, 0] + w[f"{name}.bias"][head, 0]

        heads, mixed = separable(image, "qkv").split(self.width, -1), []
        for h in range(d.num_heads):
            g = h // (d.num_heads // d.num_kv_heads)
            q, k, v = heads[h], heads[d.num_heads + g], heads[d.num_heads + d.num_kv_heads + g]
            kernel = torch.einsum("bic,bjc->bij", normed(q, "norm_q", h), normed(k, "norm_k", g))
            mixed.append(normed(v + kernel @ v / (self.width**0.5 * height * width), "norm_o", h))
        y = separable(torch.cat(mixed, -1).unflatten(1, (height, width)), "out")
        y = y - y.mean((1, 2), keepdim=True)
        y = y / ((y * y).mean((1, 2), keepdim=True) + 1e-6) ** 0.5
        return y * w["norm.weight"] + w["norm.bias"]

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"expand": 1}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(3, 4)), 12, {"expand": 3}, batch=1),
            Case(Dims(1, 5, grid=(1, 3)), 3),
        ]

    @claim("Without softmax (Q K^T) V / n is Q (K^T V) / n: linear in the points, and less work than the kernel.")
    def linear_work(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        work, apart = [], 0.0
        for side in (24, 48):
            layer = cls(Dims(2, 8, grid=(side, side))).double().requires_grad_(False)
            q, k, v = torch.randn(3, 1, 2, side**2, 16, dtype=torch.float64)
            with FlopCounterMode(display=False) as counter:
                found = layer.integral(q, k, v)
            work.append(counter.get_total_flops())
            exact = (q @ k.mT) @ v / (4 * side**2)
            apart = max(apart, float((found - exact).abs().max() / exact.abs().max()))
        share = work[1] / (2 * 4 * (48**2) ** 2 * 16)
        holds = work[1] == 4 * work[0] and share < 0.01 and apart < 48**2 * torch.finfo(torch.float64).eps
        figure = f"{work[1] / work[0]:g} times the work at 4 n, {share:.1%} of the kernel's; they differ by {apart:.1e}"
        return Finding(holds, figure)

    @claim("As the grid is refined the mean converges to the integral: what a point reads does not depend on the mesh.")
    def mesh_independent(cls) -> Finding:
        def smooth(points: Tensor, seed: int) -> Tensor:
            random = torch.Generator().manual_seed(seed)
            waves, phase = (torch.randn(n, 8, generator=random, dtype=torch.float64) for n in (2, 1))
            return (2 * points @ waves + phase).sin()[None, None]

        at = torch.rand(10, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        read, sides = [], (9, 17, 33, 65, 513)
        for side in sides:
            layer = cls(Dims(1, 8, grid=(side, side)))
            points = layer.points(at)
            read.append(layer.integral(smooth(at, 0), smooth(points, 1), smooth(points, 2)))
        size = float(read[-1].abs().max())
        errors = [float((o - read[-1]).abs().max()) / size for o in read[:-1]]
        # The mean weighs the border too much by a part that falls with the side.
        holds = all(later < sooner / 2**0.5 for sooner, later in itertools.pairwise(errors))
        figure = ", ".join(f"{error:.1%} at {side} x {side}" for error, side in zip(errors, sides, strict=False))
        return Finding(holds, f"off by {figure}")

    @claim("The kernel has rank E at most, unlike a softmax, and grows with the scores linearly.")
    def kernel(cls) -> Finding:
        layer, n = cls(Dims(1, 3, grid=(6, 7)), expand=1).double(), 42
        q, k = torch.randn(2, 1, 1, n, 3, dtype=torch.float64)
        weights = layer.integral(q, k, torch.eye(n, dtype=q.dtype)[None, None])[0, 0]
        rank, soft = (int(torch.linalg.matrix_rank(a)) for a in (weights, (q @ k.mT / 3**0.5).softmax(-1)[0, 0]))
        twice = layer.integral(2 * q, k, torch.eye(n, dtype=q.dtype)[None, None])[0, 0]
        holds = rank == 3 < soft and bool((twice == 2 * weights).all())
        return Finding(holds, f"rank {rank} of {n} x {n} weights, {soft} with a softmax; doubled queries double them")
