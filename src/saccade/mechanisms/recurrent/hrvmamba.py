"""HRVMamba: a state-space block whose local convolutions have several sizes, and whose scan reads deformed patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import positive
from saccade.hosts.block import MLP, Residual
from saccade.mix import DepthwiseConv, depthwise_conv
from saccade.scan import GridScan, raster_orders


class MultiScale(nn.Module):
    """gelu(shuffle([DW_3(x_1); DW_5(x_2); ...])), x_i the i-th part of the channels; tokens (B, N, C)."""

    def __init__(self, dims: Dims, kernels: Sequence[int]) -> None:
        super().__init__()
        if not kernels or dims.dim % len(kernels):
            raise ValueError(f"kernels: got {len(kernels)} for {dims.dim} channels; pass as many as divide them")
        part = dims.dim // len(kernels)
        self.convs = nn.ModuleList(
            DepthwiseConv(part, (positive("kernels", side),) * 2, grid=dims.grid) for side in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.convs), 2)
        found = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
        return nn.functional.gelu(torch.stack(found, 3).flatten(2))


class Deformable(nn.Module):
    """A 3 x 3 convolution whose taps move and are weighed as the token says, group by group; tokens (B, N, C)."""

    places: Tensor
    sides: Tensor
    corners: Tensor

    def __init__(self, dims: Dims, dim: int, groups: int, offset_conv: bool) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"rank: got {groups} groups for {dim} inner channels; pass a divisor")
        grid, self.groups = dims.grid or (), groups
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.near = DepthwiseConv(dim, (3, 3), grid=dims.grid) if offset_conv else nn.Identity()
        self.moves = nn.Linear(dim, 27 * groups)
        nn.init.zeros_(self.moves.weight)
        nn.init.zeros_(self.moves.bias)
        tokens, taps = (torch.cartesian_prod(*map(torch.arange, sizes)) for sizes in (grid, (3, 3)))
        self.register_buffer("places", tokens[:, None] + taps - 1, persistent=False)  # (N, 9, 2)
        self.register_buffer("sides", torch.tensor(grid), persistent=False)
        self.register_buffer("corners", torch.cartesian_prod(*[torch.arange(2)] * 2), persistent=False)  # (4, 2)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)

        def grouped(t: Tensor) -> Tensor:
            return t.to(wide).unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

        values = grouped(self.value(x))  # (B G, N, c)
        offsets, masks = grouped(self.moves(self.near(x))).split([18, 9], 2)
        at = self.places + offsets.unflatten(2, (9, 2))
        lower, y = at.floor(), torch.zeros_like(values)
        for corner in self.corners:
            pixel = lower + corner
            share = (1 - (at - pixel).abs()).prod(3) * ((pixel >= 0) & (pixel < self.sides)).all(3)
            row, column = torch.minimum(pixel.long().clamp(min=0), self.sides - 1).unbind(3)
            number = (row * self.sides[1] + column).flatten(1)[..., None].expand(-1, -1, values.shape[2])
            y = y + ((masks * share)[..., None] * values.gather(1, number).unflatten(1, (-1, 9))).sum(2)
        y = y.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2)
        return self.out(y.to(x.dtype))


class DeformedScan(nn.Module):
    """W_o LN(SS2D(silu(DCN(W x)))), tokens (B, N, C)."""

    def __init__(self, dims: Dims, expand: int, state: int, rank: int, offset_conv: bool) -> None:
        super().__init__()
        inner = positive("expand", expand) * dims.dim
        self.enter = nn.Linear(dims.dim, inner, bias=False)
        self.deformable = Deformable(dims, inner, rank, offset_conv)
        self.scan = GridScan(inner, state=state, rank=rank, orders=raster_orders(dims.grid or ()))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, dims.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = nn.functional.silu(self.deformable(self.enter(x)))
        return self.leave(self.norm(self.scan(u)))


class HRVMamba(Mixer):
    """The DVSS block: convolutions of four sizes, a selective scan of deformed patches, an MLP.

        x <- x + gelu(shuffle([DW_3(y_1); DW_5(y_2); DW_7(y_3); DW_9(y_4)])),   [y_1; ...; y_4] = LN x
        x <- x + W_o LN(sum_k scan_k(silu(DCN(W LN x)))),   x <- x + MLP(LN x)
        DCN(u)_p = V_o [o_1; ...; o_G],   o_g = sum_{k=1..9} m_gk(p) v_g(p + k + d_gk(p)),   v = V u + v_0
        (d, m)(p) = M u'_p + m_0, zero at first;   u' = u, or DW_3(u)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); u, v (B, N, E), E = expand C; v_g: the g-th of G groups
    of channels, read between pixels bilinearly, zero outside the map; k: the taps of a 3 x 3 patch; m_gk: numbers as
    they come, without a softmax; shuffle: the channels of the four parts take turns; scan_k: selective scans by rows,
    by columns, and both backwards.
    Paper: arXiv 2410.03174. The layers and their order follow the authors' code (hrvmamba.py; dcnv4.py and its kernel
    for DCN), where blocks of this kind stand in the parallel branches of HRNet.
    Deviations: none; rows of M that the authors' kernel does not read, since it takes multiples of 8, are left out.
    expand: E over C (default 2). state: numbers a channel keeps in a scan (1). rank: G, and the width through which
    steps are made (C / 16, rounded up). kernels: sides of the first convolutions ((3, 5, 7, 9)). offset_conv: d and m
    are read off DW_3(u), as the authors do where C is a multiple of 80 (False). mlp_ratio: hidden width of the MLP over
    C (2).
    Costs N (C 41 + 36 E) multiplications in convolutions and readings and 4 N E (2 rank + 5 state) in the scans, beside
    the layers.
    Errors: ValueError when dims.grid has not two axes, or rank does not divide E or the number of kernels C.

    >>> HRVMamba(Dims(1, 8, grid=(5, 9)))(torch.randn(1, 45, 8)).shape
    torch.Size([1, 45, 8])
    """

    spec = Spec(
        id="hrvmamba",
        name="HRVMamba",
        title="HRVMamba: High-Resolution Visual State Space Model for Dense Prediction",
        paper="2410.03174",
        year=2024,
        family="recurrent",
        uses=("DepthwiseConv", "GridScan", "raster_orders"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        expand: int = 2,
        state: int = 1,
        rank: int | None = None,
        kernels: Sequence[int] = (3, 5, 7, 9),
        offset_conv: bool = False,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__(dims)
        groups = -(-dims.dim // 16) if rank is None else positive("rank", rank)
        layers = [
            MultiScale(dims, kernels),
            DeformedScan(dims, expand, state, groups, offset_conv),
            MLP(dims.dim, mlp_ratio),
        ]
        self.block = nn.Sequential(*(Residual(layer, nn.LayerNorm(dims.dim)) for layer in layers))
        self.groups, self.offset_conv = groups, offset_conv

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, (height, width) = Weights(self), self.dims.grid or ()
        places = list(itertools.product(range(height), range(width)))

        def conv(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def scales(t: Tensor) -> Tensor:
            count = sum("inner.convs" in name and name.endswith("bias") for name in w)
            found = [conv(part, f"block.0.inner.convs.{i}") for i, part in enumerate(t.chunk(count, 2))]
            turns = [found[c % count][..., c // count] for c in range(t.shape[2])]
            return nn.functional.gelu(torch.stack(turns, 2))

        def deformed(u: Tensor) -> Tensor:
            name = "block.1.inner.deformable"
            moves = w.linear(conv(u, f"{name}.near") if self.offset_conv else u, f"{name}.moves")
            value, parts = w.linear(u, f"{name}.value"), []
            rows, columns = (torch.tensor(axis).to(u) for axis in zip(*places, strict=True))
            for g, v in enumerate(value.chunk(self.groups, 2)):
                total = torch.zeros(())
                for k, (i, j) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
                    at = [moves[..., 27 * g + n, None] for n in (2 * k, 2 * k + 1, 18 + k)]
                    tall = (1 - (rows[:, None] + i + at[0] - rows).abs()).clamp(min=0)  # of every pixel
                    broad = (1 - (columns[:, None] + j + at[1] - columns).abs()).clamp(min=0)
                    total = total + at[2] * ((tall * broad) @ v)
                parts.append(total)
            return w.linear(torch.cat(parts, 2), f"{name}.out")

        def scanned(t: Tensor) -> Tensor:
            u = deformed(w.linear(t, "block.1.inner.enter"))
            u = u / (1 + (-u).exp())
            columns = [a * width + b for b in range(width) for a in range(height)]
            ways = torch.tensor([range(len(places)), columns, range(len(places))[::-1], columns[::-1]])
            read, step, bias, log_rate, direct = (
                w[f"block.1.inner.scan.{name}"] for name in ("read", "step", "bias", "log_rate", "direct")
            )
            met, size = u[:, ways], log_rate.shape[2]
            low, write, look = (met @ read.mT).split([step.shape[2], size, size], 3)
            delta = (1 + (low @ step.mT + bias[:, None]).exp()).log()
            h, total = torch.zeros(()), torch.zeros_like(u)
            for n in range(len(places)):
                kept, given = (-delta[:, :, n, :, None] * log_rate.exp()).exp(), delta[:, :, n] * met[:, :, n]
                h = kept * h + given[..., None] * write[:, :, n, None]
                total = total.index_add(1, ways[:, n], (h * look[:, :, n, None]).sum(-1) + direct * met[:, :, n])
            return w.linear(w.norm(total, "block.1.inner.norm"), "block.1.inner.leave")

        def fed(t: Tensor) -> Tensor:
            return w.linear(nn.functional.gelu(w.linear(t, "block.2.inner.0")), "block.2.inner.2")

        for i, branch in enumerate((scales, scanned, fed)):
            x = x + branch(w.norm(x, f"block.{i}.norm"))
        return x

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(1, 8, grid=(5, 4)), 20, {"expand": 1, "rank": 2, "offset_conv": True, "mlp_ratio": 1}),
            Case(Dims(2, 3, grid=(3, 5)), 15, {"kernels": (5, 3, 1), "state": 2, "expand": 3}, batch=1),
            Case(Dims(1, 8, grid=(1, 11)), 11),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int], **params: Any) -> tuple[Deformable, Tensor]:
        """The deformable convolution of a block, with two groups of channels, in float64, and tokens for it."""
        module: Any = cls(Dims(1, 8, grid=grid), rank=2, **params).double().requires_grad_(False)
        return module.block[1].inner.deformable, torch.randn(1, grid[0] * grid[1], 16, dtype=torch.float64)

    @claim("Taps that stay in place, with weights that are constant, make a depthwise convolution, one kernel a group.")
    def plain(cls) -> Finding:
        dcn, u = cls.sample((6, 9))
        kernel = torch.randn(2, 9, dtype=u.dtype)
        dcn.moves.bias.unflatten(0, (2, 27))[:, 18:] = kernel
        whole = kernel.repeat_interleave(8, 0).view(16, 1, 3, 3)
        y, exact = dcn(u), dcn.out(depthwise_conv(dcn.value(u), (6, 9), whole))
        error, largest = float((y - exact).abs().max()), float(exact.abs().max())
        allowed = u.numel() * torch.finfo(u.dtype).eps * largest
        return Finding(error <= allowed, f"largest difference {error:.1e} of {largest:.2f}")

    @claim("An offset moves a tap to any pixel, half of one between two, and beyond the border reads zeros.")
    def moved(cls) -> Finding:
        dcn, u = cls.sample((6, 9))
        bias, value = dcn.moves.bias.unflatten(0, (2, 27)), dcn.value(u).unflatten(1, (6, 9))
        bias[:, 18 + 4] = 1  # the tap in the centre
        worst, zeros = 0.0, nn.functional.pad(value, (0, 0, 9, 9, 6, 6))
        for down, right in ((0.0, 0.0), (3.0, -4.0), (-2.0, 1.0), (1.0, 0.5)):
            bias[:, 8], bias[:, 9] = down, right
            rows, columns = slice(6 + int(down), 12 + int(down)), 9 + int(right)
            near = zeros[:, rows, columns : columns + 9]
            if right % 1:
                near = (near + zeros[:, rows, columns + 1 : columns + 10]) / 2
            exact = dcn.out(near.flatten(1, 2))
            worst = max(worst, float((dcn(u) - exact).abs().max() / exact.abs().max()))
        return Finding(worst <= u.numel() * torch.finfo(u.dtype).eps, f"largest difference {worst:.1e}, relatively")

    @claim("Weights start at zero, so that the scan adds nothing at first.")
    def start(cls) -> Finding:
        module, x = cls(Dims(1, 8, grid=(6, 9))), torch.randn(2, 54, 8)
        with torch.no_grad():
            same = torch.equal(module.block[1](x), x)
        return Finding(same, f"the same bit for bit on 6 x 9: {same}")

    @claim("The products grow as the number of pixels.")
    def linear(cls) -> Finding:
        costs = []
        for grid in ((8, 12), (16, 12)):
            module, x = cls(Dims(1, 8, grid=grid)), torch.randn(1, grid[0] * grid[1], 8)
            costs.append(work(partial(module, x)).all)
        return Finding(costs[1] == 2 * costs[0], f"{costs[1] / costs[0]:g} times at 2 N")
