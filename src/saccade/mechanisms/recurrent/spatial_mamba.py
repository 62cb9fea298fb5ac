"""Spatial-Mamba: one scan of an image, whose states are then fused with those of their neighbours on the map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim
from saccade.errors import known, positive
from saccade.hosts.block import MLP, Gated, Residual, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage
from saccade.mix import DepthwiseConv, to_map, to_tokens
from saccade.scan import GridScan, selective_scan

Norm = functools.partial(nn.LayerNorm, eps=1e-6)
SIZES = {"tiny": (64, (2, 4, 8, 4)), "small": (64, (2, 4, 21, 5)), "base": (96, (2, 4, 21, 5))}


class Fusion(nn.Module):
    """sum_i a_i DW_i(h), dilated 3 x 3 kernels, beyond the border the nearest state; a map (B, C, Y, X)."""

    def __init__(self, dim: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        if not self.dilations:
            raise ValueError("dilations: got none; pass at least one")
        self.kernels = nn.Parameter(torch.ones(len(self.dilations), dim, 1, 3, 3))
        self.shares = nn.Parameter(torch.ones(len(self.dilations)))

    def forward(self, h: Tensor) -> Tensor:
        fused = torch.zeros_like(h)
        for by, kernel, share in zip(self.dilations, self.kernels, self.shares, strict=True):
            around = nn.functional.pad(h, (by, by, by, by), mode="replicate")
            fused = fused + share * nn.functional.conv2d(around, kernel, dilation=by, groups=h.shape[1])
        return fused


class FusedScan(GridScan):
    """C (fused states) + D u of one scan in raster order, one number a channel; tokens u (B, N, C) of a grid."""

    def __init__(self, dim: int, rank: int, dilations: Sequence[int], grid: Sequence[int]) -> None:
        super().__init__(dim, state=1, rank=rank, paths=1)
        self.grid, self.fusion = tuple(grid), Fusion(dim, dilations)

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        steps, write, read = (u @ self.read[0].mT).split([self.step.shape[2], 1, 1], 2)
        h = selective_scan(
            u,
            steps @ self.step[0].mT,
            -self.log_rate[0].exp(),
            write,
            torch.ones_like(read),  # the states themselves: they are read after the fusion
            delta_bias=self.bias[0],
            delta_softplus=True,
        )
        return read * to_tokens(self.fusion(to_map(h, self.grid))) + self.direct[0] * u


class SpatialMamba(Mixer):
    """The Spatial-Mamba block: the state of a pixel takes up those of its neighbours before it is read.

        x <- x + DW(x),  x <- x + M(LN x),  x <- x + DW(x),  x <- x + MLP(LN x)
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t,   h'_p = sum_i a_i sum_k K_i[k] h_{p + r_i k},   y_t = C_t h'_t + D u_t
        M(x) = W_o (LN(y) * silu(z)),   u = silu(DW(v)),   [v; z] = W x

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); u, z, y, h (B, N, E), E = expand C; d_t (B, N, E): a
    softplus of u, through rank C / 16; A < 0, D (E,); B_t, C_t: one number a token, linear in u; k: the 3 x 3 taps;
    K_i: 3 x 3 for each channel, ones at first, as the a_i are; beyond the border h is that of the nearest pixel; DW:
    3 x 3 depthwise convolution with bias.
    Paper: arXiv 2410.15091. The layers, their order, the border and the sizes follow the authors' code
    (spatialmamba.py, utils.py), where the K_i become one 11 x 11 kernel once training is over.
    Deviations: none.
    expand: E over C (default 2). dilations: r_i ((1, 3, 5)). mlp_ratio: hidden width of the MLP over C (4).
    Costs N E (C / 8 + 5) multiplications in the scan and 9 N E for each dilation, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or there is no dilation.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = SpatialMamba(Dims(1, 8, grid=(5, 9)))
    >>> layer(torch.randn(1, 45, 8)).shape, num_parameters(SpatialMamba.model)
    (torch.Size([1, 45, 8]), 26740798)
    """

    spec = Spec(
        id="spatial_mamba",
        name="Spatial-Mamba",
        title="Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion",
        paper="2410.15091",
        year=2024,
        family="recurrent",
        uses=("DepthwiseConv", "GridScan", "selective_scan", "to_map", "to_tokens"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, expand: int = 2, dilations: Sequence[int] = (1, 3, 5), mlp_ratio: int = 4
    ) -> None:
        super().__init__(dims)
        self.dilations = tuple(positive("dilations", by) for by in dilations)
        inner, grid = positive("expand", expand) * dims.dim, dims.grid or ()
        scanned = [
            DepthwiseConv(inner, (3, 3), grid=grid),
            nn.SiLU(),
            FusedScan(inner, -(-dims.dim // 16), self.dilations, grid),
        ]
        self.block = nn.Sequential(
            Residual(DepthwiseConv(dims.dim, (3, 3), grid=grid)),
            Residual(Gated(dims.dim, inner, nn.Sequential(*scanned)), Norm(dims.dim)),
            Residual(DepthwiseConv(dims.dim, (3, 3), grid=grid)),
            Residual(MLP(dims.dim, mlp_ratio), Norm(dims.dim)),
        )

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, (height, width), ssm = Weights(self), self.dims.grid or (), "block.1.inner"

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        def taps(t: Tensor, kernel: Tensor, by: int = 1, carried: bool = False) -> Tensor:
            t, total = t.unflatten(1, (height, width)), torch.zeros(())
            for i, j in itertools.product(range(3), repeat=2):
                y, x = torch.arange(height) + by * (i - 1), torch.arange(width) + by * (j - 1)
                met = t[:, y.clamp(0, height - 1)][:, :, x.clamp(0, width - 1)]
                inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
                total = total + kernel[:, 0, i, j] * (met if carried else met * inside[..., None])
            return total.flatten(1, 2)

        def conv(t: Tensor, name: str) -> Tensor:
            return taps(t, w[f"{name}.weight"]) + w[f"{name}.bias"]

        def mixed(t: Tensor) -> Tensor:
            u, z = w.linear(t, f"{ssm}.enter").chunk(2, -1)
            u = silu(conv(u, f"{ssm}.inner.0"))
            read, step, bias, log_rate, direct = (
                w[f"{ssm}.inner.2.{name}"][0] for name in ("read", "step", "bias", "log_rate", "direct")
            )
            low, write, look = (u @ read.T).split([step.shape[1], 1, 1], 2)
            delta = (1 + (low @ step.T + bias).exp()).log()
            h, states = torch.zeros_like(u[:, 0]), []
            for n in range(u.shape[1]):
                h = (-delta[:, n] * log_rate[:, 0].exp()).exp() * h + delta[:, n] * u[:, n] * write[:, n]
                states.append(h)
            kernels, shares = w[f"{ssm}.inner.2.fusion.kernels"], w[f"{ssm}.inner.2.fusion.shares"]
            ways = zip(shares, kernels, self.dilations, strict=True)
            fused = sum(a * taps(torch.stack(states, 1), kernel, by, carried=True) for a, kernel, by in ways)
            return w.linear(w.norm(look * fused + direct * u, f"{ssm}.norm") * silu(z), f"{ssm}.leave")

        x = x + conv(x, "block.0.inner")
        x = x + mixed(w.norm(x, "block.1.norm", 1e-6))
        x = x + conv(x, "block.2.inner")
        return x + w.mlp(w.norm(x, "block.3.norm", 1e-6), "block.3.inner")

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "tiny" (26.7 million parameters), "small" (43.1) or "base" (95.7).

        params: of every block, in place of the defaults. host: of the `Pyramid`, in place of the paper's.
        """
        dim, depths = SIZES[known("name", name, SIZES)]
        stages = [Stage(dim << s, depth, 1, stride=2 if s else 4) for s, depth in enumerate(depths)]

        def conv(dim_in: int, dim_out: int, kernel: int, stride: int = 1, **options: Any) -> nn.Module:
            return nn.Conv2d(dim_in, dim_out, kernel, stride, kernel // 2, bias=False, **options)

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                wide = 4 * dim_out
                narrow = [conv(dim_in, wide, 1), nn.ReLU(), conv(wide, wide, 3, stride, groups=wide), nn.ReLU()]
                return nn.Sequential(*narrow, conv(wide, dim_out, 1), nn.BatchNorm2d(dim_out))
            half, wide = dim_out // 2, 4 * dim_out
            first = [conv(dim_in, half, 3, 2), nn.BatchNorm2d(half), nn.ReLU()]
            second = [conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(), conv(half, half, 3), nn.BatchNorm2d(half)]
            third = [conv(half, wide, 3, stride // 2), nn.BatchNorm2d(wide), nn.ReLU()]
            last = [conv(wide, dim_out, 1), nn.BatchNorm2d(dim_out)]
            return nn.Sequential(*first, Residual(nn.Sequential(*second)), *third, *last)

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **(params or {}))

        model = Pyramid(**{"size": (224, 224), "stages": stages, "block": block, "enter": enter, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(1, 6, grid=(5, 7)), 35, {"expand": 1, "mlp_ratio": 2}),
            Case(Dims(2, 9, grid=(3, 5)), 15, {"dilations": (2, 1), "expand": 3, "mlp_ratio": 1}, batch=1),
            Case(Dims(1, 4, grid=(2, 3)), 6),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int], **params: Any) -> tuple[FusedScan, Tensor]:
        """The scan of a block, in float64, and tokens for it."""
        module: Any = cls(Dims(1, 4, grid=grid), expand=1, **params).double().requires_grad_(False)
        for parameter in module.block[1].inner.inner[2].fusion.parameters():
            nn.init.normal_(parameter)
        return module.block[1].inner.inner[2], torch.randn(1, torch.Size(grid).numel(), 4, dtype=torch.float64)

    @claim("The models have 27 million parameters, 43 and 96, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"tiny": 27, "small": 43, "base": 96})

    @claim("With one kernel that picks the centre it is Mamba's scan.")
    def reduction(cls) -> Finding:
        scan, u = cls.sample((7, 9))
        scan.fusion.kernels.zero_()[0, :, :, 1, 1] = 1
        scan.fusion.shares.copy_(torch.tensor([1.0, 0.0, 0.0]))
        low, write, read = (u @ scan.read[0].T).split([1, 1, 1], 2)
        delta = nn.functional.softplus(low @ scan.step[0].T + scan.bias[0])
        mamba = selective_scan(u, delta, -scan.log_rate[0].exp(), write, read, D=scan.direct[0])
        error = float((scan(u) - mamba).abs().max())
        allowed = u.numel() * torch.finfo(u.dtype).eps * float(mamba.abs().max())
        return Finding(error <= allowed, f"largest difference {error:.1e} of {float(mamba.abs().max()):.2f}")

    @claim("The three dilated kernels are one of 11 x 11 taps, borders included.")
    def merged(cls) -> Finding:
        scan, u = cls.sample((7, 9))
        whole, h = torch.zeros(4, 1, 11, 11, dtype=u.dtype), to_map(u, (7, 9))
        for by, kernel, share in zip(scan.fusion.dilations, scan.fusion.kernels, scan.fusion.shares, strict=True):
            at = slice(5 - by, 6 + by, by)
            whole[:, :, at, at] += share * kernel
        once = nn.functional.conv2d(nn.functional.pad(h, (5, 5, 5, 5), mode="replicate"), whole, groups=4)
        error, largest = float((scan.fusion(h) - once).abs().max()), float(once.abs().max())
        return Finding(
            error <= 27 * torch.finfo(u.dtype).eps * float(h.abs().max() * whole.abs().max()),
            f"largest difference {error:.1e} of {largest:.1f}",
        )

    @claim("Fused, a scan in raster order sees 5 rows below the pixel; by itself none.")
    def reach(cls) -> Finding:
        last = []
        for fused in (True, False):
            scan, u = cls.sample((16, 12))
            if not fused:
                scan.fusion.kernels.zero_()[0, :, :, 1, 1] = 1
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(scan(u.requires_grad_())[0, 6 * 12 + 4].sum(), u)
            rows = gradient[0].ne(0).any(1).view(16, 12).any(1).nonzero().flatten()
            last.append((int(rows.min()), int(rows.max())))
        figures = " and ".join(f"{first} to {end}" for first, end in last)
        return Finding(last == [(0, 11), (0, 6)], f"of 16 rows, row 6 sees {figures}, fused and not")
