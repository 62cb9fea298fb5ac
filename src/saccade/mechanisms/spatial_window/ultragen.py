"""UltraGen: video attention in windows of two scales and over a compressed video, mixed by what the time step says."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, work
from saccade.errors import positive
from saccade.mix import (
    DepthwiseConv,
    cut_windows,
    grid_angles,
    join_windows,
    rotary_rates,
    to_map,
    to_tokens,
    turn_pairs,
)

Grid = tuple[int, ...]


class Gate(nn.Module):
    """Factors per channel from the time step, (B,) -> (B, 1, C): a sigmoid of three layers on 256 waves of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = [nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        rates = 10000 ** (-torch.arange(128, dtype=wide, device=time.device) / 128)
        angles = time[:, None].to(wide) * rates
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
        return self.layers(waves).sigmoid()[:, None]


class Adapter(nn.Module):
    """What a branch adds to the projections of x (.., C): B A x for q, k and v, with A (rank, C), B (C, rank)."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(dim, rank), nn.Linear(rank, dim)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


class Compressed(nn.Module):
    """The ends of a branch on a coarser video: a strided depthwise convolution of each frame, at first its means, and
    bilinear interpolation with a 3 x 3 x 3 depthwise convolution on the way back; tokens (B, N, C)."""

    def __init__(self, dim: int, stride: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim, stride, stride, groups=dim)
        nn.init.constant_(self.reduce.weight, stride**-2)
        nn.init.zeros_(self.reduce.bias)  # type: ignore[arg-type]
        self.adapter, self.smooth = Adapter(dim, rank), DepthwiseConv(dim, (3, 3, 3))

    def shrink(self, x: Tensor, grid: Grid) -> Tensor:
        frames = to_map(x.unflatten(1, (grid[0], -1)).flatten(0, 1), grid[1:])
        return to_tokens(self.reduce(frames)).unflatten(0, (len(x), -1)).flatten(1, 2)

    def grow(self, x: Tensor, coarse: Grid, grid: Grid) -> Tensor:
        return self.smooth(resize(x, coarse, grid), grid)


def resize(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (B, N, C) of frames (T, Y, X) on frames of another size, bilinear, smoothed where that is smaller."""
    if grid == size:
        return x
    frames = to_map(x.unflatten(1, (grid[0], -1)).flatten(0, 1), grid[1:])
    wide = frames.to(torch.promote_types(x.dtype, torch.float32))
    found = nn.functional.interpolate(wide, size[1:], mode="bilinear", antialias=True).to(x.dtype)
    return to_tokens(found).unflatten(0, (len(x), -1)).flatten(1, 2)


def nearest(grid: Grid, parts: int) -> Grid:
    """The sizes of frames nearest to those of `grid` that `parts` divides, the smaller where two are as near."""
    return grid[0], *(max(1, (2 * n + parts - 1) // (2 * parts)) * parts for n in grid[1:])


class Ultragen(Mixer):
    """The attention of an UltraGen layer: cross-windows and coarse windows, mixed; then the compressed video, mixed in.

        y = W (a(t) z_g + (1 - a(t)) z_l) + w,   z_l = a'(t) z_w + (1 - a'(t)) z_h
        z_w: attention inside each of n x n windows of all frames,   n = K in even layers, K + 1 in odd ones
        z_h: the same of a video `coarse` times smaller in m x m windows,   m = K / 2, or K / 2 + 1
        z_g: attention over the whole of a video `stride` times smaller
        attention: softmax(R_i N(q_i) . R_j N(k_j) / sqrt(D)) v_j in each head

    x (B, N, C): tokens of a row-major grid (T, Y, X) -> (B, N, C); t (B,), by keyword as `time` (zeros where none is
    given); a, a' (B, 1, C): sigmoids of an MLP each of 256 waves of t; q, k, v: one projection for all three branches,
    to which z_h and z_g add low-rank ones of their own; N: RMS norms over all heads; R: rotary embedding by frame, row
    and column, counted from the corner of the window. z_h and z_g go there by a depthwise convolution of each frame,
    the mean at first, and come back by bilinear interpolation and a 3 x 3 x 3 depthwise convolution.
    Paper: arXiv 2510.18775, sections 4.1 to 4.3; the layers of the gates, R, the norms, the biases and what is done
    with frames that windows do not divide follow the authors' code (wan_video_dit.py): they are interpolated to the
    nearest size that they divide, and back. Rows and columns that a stride leaves over are not read by its branch.
    Deviations: k of z_g has the projection of k, as in the paper, where the code takes that of q; the code gives a to
    z_l, which is the same with another sign before the sigmoid; the paper adds low-rank weights to the feed-forward
    layers as well, which are not part of the attention. The authors leave the first and last three of 30 layers dense.
    windows: K (default 4). layer: number of the layer, of which only the parity matters (0). stride: 4. coarse: 2.
    rank: of A and B (64).
    Costs 2 N^2 C (1 / n^2 + 1 / (m^2 coarse^4) + 1 / stride^4) multiplications in the products for n x n windows and
    m x m coarse ones, beside the layers. Errors: ValueError when dims.grid has not three axes, heads share keys,
    head_dim is odd, a frame is smaller than stride or coarse, or time has another shape.

    >>> layer = Ultragen(Dims(2, 6, grid=(2, 9, 8)), rank=2)
    >>> layer(torch.randn(1, 144, 12), time=torch.tensor([500.0])).shape
    torch.Size([1, 144, 12])
    """

    spec = Spec(
        id="ultragen",
        name="UltraGen (hierarchical video attention)",
        title="UltraGen: High-Resolution Video Generation with Hierarchical Attention",
        paper="2510.18775",
        year=2025,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "cut_windows", "join_windows", "to_map", "to_tokens", "turn_pairs"),
        grid=3,
    )

    def __init__(
        self, dims: Dims, *, windows: int = 4, layer: int = 0, stride: int = 4, coarse: int = 2, rank: int = 64
    ) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        if dims.head_dim % 2:
            raise ValueError(f"dims.head_dim: got {dims.head_dim}; the rotation takes even numbers")
        self.grid, odd = dims.grid or (), positive("layer", layer, least=0) % 2
        small = min(self.grid[1:])
        for name, step in (("stride", stride), ("coarse", coarse)):
            if positive(name, step) > small:
                raise ValueError(f"{name}: got {step} for frames of {self.grid[1:]}; pass at most {small}")
        self.stride, self.coarse = stride, coarse
        self.counts = positive("windows", windows) + odd, max(1, windows // 2) + odd
        self.qkv, self.out = nn.Linear(dims.dim, 3 * dims.dim), nn.Linear(dims.dim, dims.dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dims.dim, eps=1e-6) for _ in range(2))
        self.whole = Compressed(dims.dim, stride, positive("rank", rank))
        self.hierarchy = Compressed(dims.dim, coarse, rank)
        self.far, self.near = Gate(dims.dim), Gate(dims.dim)

    def rotate(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H, N, D), pairs of channels turned: a third each by row and column, rounded down, the rest by frame."""
        third = x.shape[3] // 6
        pairs = x.shape[3] // 2 - 2 * third, third, third
        return turn_pairs(x, grid_angles(grid, [rotary_rates(count, device=x.device) for count in pairs]))

    def weigh(self, x: Tensor, grid: Grid, adapter: Adapter | None = None) -> Tensor:
        """Attention among all tokens x (B, N, C) of `grid`."""
        every = self.qkv(x) if adapter is None else self.qkv(x) + adapter(x)
        q, k, v = every.chunk(3, 2)
        q, k, v = (
            t.unflatten(2, (self.dims.num_heads, -1)).transpose(1, 2) for t in (self.norm_q(q), self.norm_k(k), v)
        )
        return attend(self.rotate(q, grid), self.rotate(k, grid), v).transpose(1, 2).flatten(2)

    def windowed(self, x: Tensor, grid: Grid, count: int, adapter: Adapter | None = None) -> Tensor:
        """Attention in count x count windows of all frames; tokens of the frames that these divide."""
        size = grid[0], *(n // count for n in grid[1:])
        parts = cut_windows(x, grid, size)
        y = self.weigh(parts.flatten(0, 1), size, adapter).unflatten(0, parts.shape[:2])
        return join_windows(y, grid, size)

    def compute(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        t = x.new_zeros(len(x)) if time is None else time
        if tuple(t.shape) != (len(x),):
            raise ValueError(f"time: got shape {tuple(t.shape)}; pass ({len(x)},)")
        grid, (fine, rough) = self.grid, self.counts
        cut = nearest(grid, fine)
        z = resize(self.windowed(resize(x, grid, cut), cut, fine), cut, grid)
        less = grid[0], *(n // self.coarse for n in grid[1:])
        cut, branch = nearest(less, rough), self.hierarchy
        y = self.windowed(resize(branch.shrink(x, grid), less, cut), cut, rough, branch.adapter)
        z = torch.lerp(branch.grow(y, cut, grid), z, self.near(t, x.dtype))
        less, branch = (grid[0], *(n // self.stride for n in grid[1:])), self.whole
        y = branch.grow(self.weigh(branch.shrink(x, grid), less, branch.adapter), less, grid)
        return self.out(torch.lerp(z, y, self.far(t, x.dtype)))

    def oracle(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.grid[1:]

        def gate(name: str) -> Tensor:
            at = torch.zeros(len(x)) if time is None else time
            angles = at[:, None].double() * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
            t = w.linear(torch.cat([angles.cos(), angles.sin()], 1).to(x), f"{name}.layers.0")
            for number in (2, 4):
                t = w.linear(t / (1 + (-t).exp()), f"{name}.layers.{number}")
            return (1 / (1 + (-t).exp()))[:, None, None, None]

        def tent(old: int, new: int) -> Tensor:
            """What each of `old` points gives to each of `new`: tents as wide as the larger of the two spacings."""
            step = old / new
            rows = [
                [max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * step) / max(step, 1)) for j in range(old)] for i in range(new)
            ]
            return torch.tensor([[share / sum(row) for share in row] for row in rows], dtype=torch.float64).to(x)

        def sized(t: Tensor, high: int, wide: int) -> Tensor:
            return torch.einsum("ay,bx,ntyxc->ntabc", tent(t.shape[2], high), tent(t.shape[3], wide), t)

        def shrunk(t: Tensor, name: str, step: int) -> Tensor:
            high, wide, kernel = height // step, width // step, w[f"{name}.reduce.weight"][:, 0]
            t = t[:, :, : high * step, : wide * step].unflatten(3, (wide, step)).unflatten(2, (high, step))
            return torch.einsum("ntyixjc,cij->ntyxc", t, kernel) + w[f"{name}.reduce.bias"]

        def grown(t: Tensor, name: str) -> Tensor:
            return w.conv(sized(t, height, width), f"{name}.smooth")

        def attended(t: Tensor, name: str = "") -> Tensor:
            """Full attention of t (B, T, Y, X, C)."""
            places = list(itertools.product(*map(range, t.shape[1:4])))
            tokens, sixth = t.flatten(1, 3), d.head_dim // 6
            turns: list[list[float]] = []
            for place in places:
                turns.append([])
                for at, pairs in zip(place, (d.head_dim // 2 - 2 * sixth, sixth, sixth), strict=True):
                    turns[-1] += [at * 10000 ** (-pair / pairs) for pair in range(pairs)]
            angles, heads = torch.tensor(turns, dtype=torch.float64)[:, None], []
            for part, y in enumerate(w.linear(tokens, "qkv").split(d.dim, -1)):
                if name:
                    own = f"{name}.adapter.parts.{part}"
                    y = y + w.linear(w.linear(tokens, f"{own}.0"), f"{own}.1")
                if part < 2:
                    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"norm_{'qk'[part]}.weight"]
                y = y.unflatten(2, (d.num_heads, d.head_dim))
                if part < 2:
                    cos, sin, a, b = angles.cos().to(x), angles.sin().to(x), y[..., ::2], y[..., 1::2]
                    y = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)
                heads.append(y)
            scores = torch.einsum("bihd,bjhd->bhij", heads[0], heads[1]) / d.head_dim**0.5
            return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), heads[2]).flatten(2).unflatten(1, t.shape[1:4])

        def windowed(t: Tensor, count: int, name: str = "") -> Tensor:
            high, wide = (max(1, math.ceil(n / count - 0.5)) for n in t.shape[2:4])
            t = sized(t, high * count, wide * count)
            rows = [torch.cat([attended(part, name) for part in row.split(wide, 3)], 3) for row in t.split(high, 2)]
            return torch.cat(rows, 2)

        video = x.unflatten(1, self.grid)
        fine = sized(windowed(video, self.counts[0]), height, width)
        rough = grown(windowed(shrunk(video, "hierarchy", self.coarse), self.counts[1], "hierarchy"), "hierarchy")
        whole = grown(attended(shrunk(video, "whole", self.stride), "whole"), "whole")
        near, far = gate("near"), gate("far")
        return w.linear((far * whole + (1 - far) * (near * fine + (1 - near) * rough)).flatten(1, 3), "out")

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 6, grid=(2, 5, 7)), 70, {"windows": 3, "layer": 1, "stride": 3, "rank": 2}, batch=1),
            Case(Dims(2, 2, grid=(3, 4, 5)), 60, {"windows": 2, "stride": 2, "coarse": 1, "rank": 1}),
            Case(Dims(1, 8, grid=(1, 7, 6)), 42, {"windows": 4, "stride": 4, "coarse": 3, "rank": 3}),
        ]

    @classmethod
    def sample(cls, grid: Grid, *, near: float = 0.0, far: float = 0.0, **params: Any) -> tuple[Ultragen, Tensor]:
        """A layer in float64, its gates pulled open or shut by biases, and tokens for it."""
        generator = torch.Generator().manual_seed(0)
        module = cls(Dims(2, 6, grid=grid), rank=2, **params).double().requires_grad_(False)
        for gate, pull in ((module.near, near), (module.far, far)):
            dict(gate.named_parameters())["layers.4.bias"].add_(pull)
        return module, torch.randn(1, math.prod(grid), 12, generator=generator, dtype=torch.float64)

    @claim("With one window, and gates that leave the fine windows alone, an even layer is the attention it came from.")
    def base(cls) -> Finding:
        module, x = cls.sample((2, 5, 7), near=1e3, far=-1e3, windows=1)
        q, k, v = module.qkv(x).chunk(3, 2)
        q, k, v = (t.unflatten(2, (2, 6)).transpose(1, 2) for t in (module.norm_q(q), module.norm_k(k), v))
        q, k = (module.rotate(t, (2, 5, 7)) for t in (q, k))
        exact = module.out(((q @ k.mT / 6**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        error, size = float((module(x) - exact).abs().max()), float(exact.abs().max())
        allowed = x.numel() * torch.finfo(torch.float64).eps * size
        return Finding(error <= allowed, f"largest difference {error:.1e} of {size:.2f}")

    @claim("The time step moves the output, as the equations say.")
    def timed(cls) -> Finding:
        module, x = cls.sample((2, 5, 6))
        time = torch.tensor([700.0], dtype=torch.float64)
        y, plain, exact = module(x, time=time), module(x), module.oracle(x, time=time)
        error, moved = float((y - exact).abs().max()), float((y - plain).abs().max())
        allowed = float(time) * x.numel() * torch.finfo(torch.float64).eps * float(y.abs().max())
        return Finding(error <= allowed < moved, f"moved by {moved:.1e}, largest error {error:.1e}")

    @claim("At first the compressed video is the mean of each 4 x 4 tokens.")
    def means(cls) -> Finding:
        module, x = cls.sample((3, 8, 12))
        found = module.whole.shrink(x, (3, 8, 12))
        exact = x.view(1, 3, 2, 4, 3, 4, 12).mean((3, 5)).flatten(1, 3)
        error = float((found - exact).abs().max())
        allowed = 16 * torch.finfo(torch.float64).eps * float(x.abs().max())  # sums of 16 terms
        return Finding(error <= allowed, f"largest difference {error:.1e}, {found.shape[1]} of 288 tokens left")

    @claim("Windows of an even and an odd layer share no border, so that two layers join every pair of neighbours.")
    def joined(cls) -> Finding:
        seen = []
        for layer in (0, 1):
            module, x = cls.sample((1, 20, 20), near=1e3, far=-1e3, layer=layer)
            at = torch.arange(20), torch.arange(20) * 21  # the diagonal, one token a video
            found = reached(module, x.repeat(20, 1, 1), at)
            seen.append(found[:, ::21].tolist())
        apart = [[at for at in range(19) if not one[at][at + 1]] for one in seen]
        holds = apart == [[4, 9, 14], [3, 7, 11, 15]]
        return Finding(holds, f"borders of 20 rows after {apart[0]} in even layers, after {apart[1]} in odd ones")

    @claim("K x K windows divide the products by K^2.")
    def cheaper(cls) -> Finding:
        module, x = cls.sample((2, 12, 24))
        module, x = module.float(), x.float()
        windows = functools.partial(module.windowed, x, (2, 12, 24))
        found = {n: work(functools.partial(windows, n)).fused for n in (1, 2, 3, 4)}
        holds = all(count**2 * each == found[1] for count, each in found.items())
        return Finding(holds, ", ".join(f"K = {count}: 1 / {found[1] / each:g}" for count, each in found.items()))
