"""VFIMamba's mixed-SSM block: scans of two frames whose pixels are interleaved, so that what belongs together meets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import positive
from saccade.hosts.block import Gated
from saccade.mix import DepthwiseConv
from saccade.scan import GridScan


def interleaved(grid: Sequence[int]) -> Tensor:
    """Four orders of the tokens of (T, Y, X): by rows, by columns, both backwards, the frames of a pixel in a row."""
    at = torch.arange(torch.Size(grid).numel()).view(*grid)
    ways = torch.stack([at.permute(1, 2, 0).flatten(), at.permute(2, 1, 0).flatten()])
    return torch.cat([ways, ways.flip(1)])


class FrameByFrame(nn.Module):
    """A depthwise 3 x 3 convolution of every frame; tokens (B, N, dim) of the grid (T, Y, X)."""

    def __init__(self, dim: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.frames, self.conv = grid[0], DepthwiseConv(dim, (3, 3), grid=grid[1:])

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.unflatten(1, (self.frames, -1)).flatten(0, 1))
        return frames.unflatten(0, (-1, self.frames)).flatten(1, 2)


class ChannelAttention(nn.Module):
    """y sigmoid(W_2 relu(W_1 mean(y) + w_1) + w_2), y = conv(gelu(conv(x))), frame by frame; tokens (B, N, C)."""

    def __init__(self, dims: Dims, compress: int, squeeze: int) -> None:
        super().__init__()
        dim, self.grid = dims.dim, dims.grid or ()
        narrow, few = (max(1, dim // positive(name, by)) for name, by in (("compress", compress), ("squeeze", squeeze)))
        self.convs = nn.Sequential(nn.Conv2d(dim, narrow, 3, 1, 1), nn.GELU(), nn.Conv2d(narrow, dim, 3, 1, 1))
        self.gate = nn.Sequential(nn.Linear(dim, few), nn.ReLU(), nn.Linear(few, dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(1, self.grid).flatten(0, 1).movedim(-1, 1)
        y = self.convs(frames).movedim(1, -1).flatten(1, 2)  # (B T, Y X, C)
        y = y * self.gate(y.mean(1, keepdim=True))
        return y.unflatten(0, (-1, self.grid[0])).flatten(1, 2)


class VFIMamba(Mixer):
    """The mixed-SSM block: four scans through both frames at once, then channel attention in each frame.

        x <- s_1 * x + M(LN x),   x <- s_2 * x + A(LN x)
        M(x) = W_o (LN(sum_k scan_k(silu(DW(u)))) * silu(z)),   [u; z] = W x
        scan_k meets (1, p), (2, p), (1, p'), (2, p'), ...: p, p', ... by rows, by columns, and both backwards
        A(x) = y * sigmoid(W_2 relu(W_1 mean(y) + w_1) + w_2),   y = conv(gelu(conv(x)))

    x (B, N, C): tokens of two frames, a row-major grid (2, Y, X) -> (B, N, C); u, z (B, N, expand C); scan_k: selective
    scans, each with weights of its own, whose outputs go back to their pixel and frame; DW: 3 x 3 depthwise convolution
    with bias; conv: 3 x 3, to C / compress channels and back; mean: over a frame; s_1, s_2 (C,), ones at first.
    Paper: arXiv 2407.02315; every layer follows the authors' code (feature_extractor.py).
    Deviations: the released code brings the two scans by columns back as if frames were not interleaved, which leaves
    most pixels in wrong places; here each comes back to its own. C / compress and C / squeeze are at least 1. There may
    be more than two frames.
    expand: inner channels over C (default 2). state: numbers a channel keeps (16). compress: C over the channels of y's
    middle (3). squeeze: C over the rows of W_1 (30).
    Costs 4 N expand C (C / 8 + 5 state) multiplications in the scans and 18 N C^2 / compress in the convolutions.
    Errors: ValueError when dims.grid has not three axes.

    >>> VFIMamba(Dims(1, 8, grid=(2, 3, 5)))(torch.randn(1, 30, 8)).shape
    torch.Size([1, 30, 8])
    """

    spec = Spec(
        id="vfimamba",
        name="VFIMamba",
        title="VFIMamba: Video Frame Interpolation with State Space Models",
        paper="2407.02315",
        year=2024,
        family="recurrent",
        uses=("DepthwiseConv", "GridScan"),
        grid=3,
    )

    def __init__(self, dims: Dims, *, expand: int = 2, state: int = 16, compress: int = 3, squeeze: int = 30) -> None:
        super().__init__(dims)
        self.norms = nn.ModuleList(nn.LayerNorm(dims.dim) for _ in range(2))
        inner, rank, grid = positive("expand", expand) * dims.dim, -(-dims.dim // 16), dims.grid or ()
        scan = GridScan(inner, state=state, rank=rank, orders=interleaved(grid))
        self.mixed = Gated(dims.dim, inner, nn.Sequential(FrameByFrame(inner, grid), nn.SiLU(), scan))
        self.channels = ChannelAttention(dims, compress, squeeze)
        self.kept = nn.Parameter(torch.ones(2, dims.dim))

    def compute(self, x: Tensor) -> Tensor:
        x = self.kept[0] * x + self.mixed(self.norms[0](x))
        return self.kept[1] * x + self.channels(self.norms[1](x))

    def oracle(self, x: Tensor) -> Tensor:
        w, (frames, height, width) = Weights(self), self.dims.grid or ()

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        def conv(t: Tensor, name: str) -> Tensor:
            """Frame by frame."""
            maps = t.reshape(-1, height, width, t.shape[2])
            return w.conv(maps, name).reshape(len(t), frames * height * width, -1)

        u, z = w.linear(w.norm(x, "norms.0"), "mixed.enter").chunk(2, -1)
        u = silu(conv(u, "mixed.inner.0.conv"))
        rows, columns = [], []
        for i, j in itertools.product(range(height), range(width)):
            rows += [(f * height + i) * width + j for f in range(frames)]
        for j, i in itertools.product(range(width), range(height)):
            columns += [(f * height + i) * width + j for f in range(frames)]
        ways = torch.tensor([rows, columns, rows[::-1], columns[::-1]])
        read, step, bias, log_rate, direct = (
            w[f"mixed.inner.2.{name}"] for name in ("read", "step", "bias", "log_rate", "direct")
        )
        met, size = u[:, ways], log_rate.shape[2]
        low, write, look = (met @ read.mT).split([step.shape[2], size, size], 3)
        delta = (1 + (low @ step.mT + bias[:, None]).exp()).log()
        h, total = torch.zeros(()), torch.zeros_like(u)
        for n in range(ways.shape[1]):
            kept, given = (-delta[:, :, n, :, None] * log_rate.exp()).exp(), delta[:, :, n] * met[:, :, n]
            h = kept * h + given[..., None] * write[:, :, n, None]
            total = total.index_add(1, ways[:, n], (h * look[:, :, n, None]).sum(-1) + direct * met[:, :, n])
        x = w["kept"][0] * x + w.linear(w.norm(total, "mixed.norm") * silu(z), "mixed.leave")

        y = conv(nn.functional.gelu(conv(w.norm(x, "norms.1"), "channels.convs.0")), "channels.convs.2")
        gates = w.linear(y.unflatten(1, (frames, -1)).mean(2), "channels.gate.0").clamp(min=0)
        gates = 1 / (1 + (-w.linear(gates, "channels.gate.2")).exp())
        return w["kept"][1] * x + y * gates.repeat_interleave(height * width, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(1, 6, grid=(2, 3, 4)), 24, {"expand": 1, "state": 3, "compress": 2, "squeeze": 2}),
            Case(Dims(2, 9, grid=(2, 3, 1)), 6, {"expand": 3, "state": 2}, batch=1),
            Case(Dims(1, 4, grid=(3, 1, 3)), 9, {"squeeze": 3}),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int, int], **params: Any) -> tuple[VFIMamba, Tensor]:
        """A block and tokens for it, in float64."""
        module = cls(Dims(1, 6, grid=grid), **params).double().requires_grad_(False)
        return module, torch.randn(1, torch.Size(grid).numel(), 6, dtype=torch.float64)

    @claim("A pixel of one frame and the same of the other are one step apart on every way.")
    def adjacent(cls) -> Finding:
        grid = (2, 5, 7)
        frame = torch.arange(35)
        met = interleaved(grid).argsort(1)  # the step at which a token is met
        apart = (met[:, frame] - met[:, frame + 35]).abs()
        return Finding(bool((apart == 1).all()), f"at most {int(apart.max())} step; one frame after the other: 35")

    @claim("Rows and columns are alike: transposed frames give transposed outputs once the weights change places too.")
    def transposed(cls) -> Finding:
        module, x = cls.sample((2, 4, 7))
        other, _ = cls.sample((2, 7, 4))
        weights = module.state_dict()
        for name, value in weights.items():
            if "mixed.inner.2." in name:
                weights[name] = value[[1, 0, 3, 2]]
            elif "conv" in name and value.ndim == 4:
                weights[name] = value.mT
        other.load_state_dict(weights)

        def turned(t: Tensor, height: int, width: int) -> Tensor:
            return t.unflatten(1, (2, height, width)).transpose(2, 3).flatten(1, 3)

        y, back = module(x), turned(other(turned(x, 4, 7)), 7, 4)
        error, largest = float((y - back).abs().max()), float(y.abs().max())
        allowed = x.numel() * torch.finfo(x.dtype).eps * largest
        return Finding(error <= allowed, f"largest difference {error:.1e} of {largest:.1f}")

    @claim("The scans carry every pixel of both frames to every other.")
    def support(cls) -> Finding:
        module, x = cls.sample((2, 5, 7))
        seen = []
        for at in (0, 17, 69):
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(module.mixed(x.requires_grad_())[0, at].sum(), x)
            seen.append(int(gradient[0].ne(0).any(1).sum()))
        return Finding(seen == [70] * 3, f"{seen[0]}, {seen[1]} and {seen[2]} of 70 tokens seen from three")

    @claim("The products of a block grow as the number of pixels.")
    def linear(cls) -> Finding:
        costs = []
        for grid in ((2, 6, 8), (2, 12, 8), (2, 12, 16)):
            module, x = cls.sample(grid)
            costs.append(work(partial(module, x)).all)
        ratio = (costs[2] - costs[1]) / (costs[1] - costs[0])  # the gates of a frame cost the same at any size
        return Finding(ratio == 2, f"192 tokens more cost {ratio:g} times what 96 more do")
