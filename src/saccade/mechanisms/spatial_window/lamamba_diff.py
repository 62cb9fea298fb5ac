"""LaMamba-Diff: selective scans along snakes over the whole map, then attention in windows, in one diffusion block."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, work
from saccade.errors import known, positive
from saccade.hosts.block import MLP, Gated
from saccade.hosts.pyramid import Stage
from saccade.hosts.resize import Reduce
from saccade.hosts.unet import UNet
from saccade.hosts.vit import WavePositions
from saccade.hosts.windows import WindowAttention
from saccade.mix import DepthwiseConv
from saccade.scan import GridScan, raster_orders, snake_orders


class LamambaDiff(Mixer):
    """The LaMamba block: three branches in series, each moved and gated by the condition; the identity at first.

        x <- x + g_i f_i(LN_i(x) (1 + s_i) + b_i)   for i = 1, 2, 3;   f = SS2D, window attention, MLP
        (b_1, s_1, g_1, b_2, s_2, g_2, b_3, s_3, g_3) = W silu(P c + p) + w,   W = 0, w = 0 at first
        SS2D(x) = W_5 (LN(sum_k scan_k(silu(DW(u)))) * silu(z)),   [u; z] = W_4 x
        attention: softmax(Q K^T / sqrt(D) + B) V in each window and head, then a projection

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); c (B, E), by keyword as `condition` (zeros where none
    is given); u, z (B, N, expand C); scan_k: selective scans along four ways, on each of which one token and the next
    are neighbours: by rows from the top left, by columns from the bottom left, and both backwards; DW: 3 x 3 depthwise
    convolution without bias; Q, K, V: projections for each of H heads; B: a learned table per head over the differences
    of position. Odd blocks of a stage shift the windows by half their side; tokens that come around the border are
    hidden. A window no smaller than the map is the map, not shifted.
    Paper: arXiv 2408.02615. The order of the branches, the ways, every layer and the sizes follow the authors' code
    (lamamba.py, vmamba.py, continuous_scan.py and the configuration of XL), which is for square maps of an even side;
    the ways of other maps are those that a comment there names for odd ones.
    Deviations: maps that windows do not divide are filled below and to the right with positions that nobody sees; P is
    there in every block, where the authors leave it out of those whose width is that of c, before the decoder; a side
    of the window is cut to the map axis by axis. Heads may share keys, which the paper's do not.
    window: tokens a side (default 8). shift: tokens that windows are shifted by (0). expand: 2. state: numbers a
    channel keeps in a scan (1). mlp_ratio: hidden width of the MLP over C (4). condition: E (None: C).
    Costs 2 N window^2 C multiplications in the products of windows and 4 N expand C (C / 8 + 5 state) in the scans.
    Errors: ValueError when dims.grid has not two axes, or condition has another shape.

    >>> from saccade.hosts.block import num_parameters
    >>> layer, x = LamambaDiff(Dims(2, 4, grid=(5, 9)), window=3, shift=1, condition=6), torch.randn(1, 45, 8)
    >>> bool((layer(x, condition=torch.randn(1, 6)) == x).all()), num_parameters(LamambaDiff.model)
    (True, 600685688)
    """

    spec = Spec(
        id="lamamba_diff",
        name="LaMamba-Diff",
        title="LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        paper="2408.02615",
        year=2024,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "GridScan", "RegionBias", "RelativeTable", "Windowed", "snake_orders"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 8,
        shift: int = 0,
        expand: int = 2,
        state: int = 1,
        mlp_ratio: int = 4,
        condition: int | None = None,
    ) -> None:
        super().__init__(dims)
        grid, side, by = dims.grid or (), positive("window", window), positive("shift", shift, least=0)
        self.sizes, self.shifts = [min(side, n) for n in grid], [by if n > side else 0 for n in grid]
        self.width = dims.dim if condition is None else positive("condition", condition)
        inner, rank = positive("expand", expand) * dims.dim, -(-dims.dim // 16)
        scanned = [
            DepthwiseConv(inner, (3, 3), bias=False, grid=grid),
            nn.SiLU(),
            GridScan(inner, state=state, rank=rank, orders=snake_orders(grid)),
        ]
        self.scan = Gated(dims.dim, inner, nn.Sequential(*scanned))
        self.attention = WindowAttention(dims, self.sizes, shift=self.shifts)
        self.mlp = MLP(dims.dim, mlp_ratio)
        self.norms = nn.ModuleList(nn.LayerNorm(dims.dim) for _ in range(3))
        self.project = nn.Linear(self.width, dims.dim)
        self.modulation = nn.Linear(dims.dim, 9 * dims.dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def compute(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        c = x.new_zeros(len(x), self.width) if condition is None else condition
        if tuple(c.shape) != (len(x), self.width):
            raise ValueError(f"condition: got shape {tuple(c.shape)}; pass ({len(x)}, {self.width})")
        moves = self.modulation(nn.functional.silu(self.project(c)))[:, None].chunk(9, -1)
        for i, branch in enumerate((self.scan, self.attention, self.mlp)):
            b, s, g = moves[3 * i : 3 * i + 3]
            x = x + g * branch(self.norms[i](x) * (1 + s) + b)
        return x

    def oracle(self, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.dims.grid or ()
        places = list(itertools.product(range(height), range(width)))

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        def scanned(t: Tensor) -> Tensor:
            u, z = w.linear(t, "scan.enter").chunk(2, -1)
            u = silu(w.conv(u.unflatten(1, (height, width)), "scan.inner.0").flatten(1, 2))
            rows, columns = [], []
            for y in range(height):
                across = range(width) if y % 2 == 0 else reversed(range(width))
                rows += [y * width + x for x in across]
            for x in range(width):
                up = reversed(range(height)) if x % 2 == 0 else range(height)
                columns += [y * width + x for y in up]
            ways = torch.tensor([rows, rows[::-1], columns, columns[::-1]])
            read, step, bias, log_rate, direct = (
                w[f"scan.inner.2.{name}"] for name in ("read", "step", "bias", "log_rate", "direct")
            )
            met, size = u[:, ways], log_rate.shape[2]
            low, write, look = (met @ read.mT).split([step.shape[2], size, size], 3)
            delta = (1 + (low @ step.mT + bias[:, None]).exp()).log()
            h, total = u.new_zeros(len(u), *log_rate.shape), torch.zeros_like(u)
            for n in range(ways.shape[1]):
                kept, given = (-delta[:, :, n, :, None] * log_rate.exp()).exp(), delta[:, :, n] * met[:, :, n]
                h = kept * h + given[..., None] * write[:, :, n, None]
                seen = (h * look[:, :, n, None]).sum(-1) + direct * met[:, :, n]
                total = total.index_add(1, ways[:, n], seen)
            return w.linear(w.norm(total, "scan.norm") * silu(z), "scan.leave")

        def attended(t: Tensor) -> Tensor:
            counts = [d.num_heads, d.num_kv_heads, d.num_kv_heads]
            q, k, v = w.linear(t, "attention.inner.qkv").unflatten(2, (-1, d.head_dim)).split(counts, 2)
            k, v = (part.repeat_interleave(d.group, 2) for part in (k, v))
            (table,) = (value for name, value in w.items() if name.endswith("table"))
            whole = [-(-n // side) * side for n, side in zip((height, width), self.sizes, strict=True)]

            def home(at: int, axis: int) -> tuple[int, bool]:
                """The window of a coordinate, and did it come around the border?"""
                moved = (at - self.shifts[axis]) % whole[axis]
                return moved // self.sizes[axis], at < self.shifts[axis]

            out = []
            for y, x in places:
                mates = [p for p in places if all(home(p[a], a) == home((y, x)[a], a) for a in (0, 1))]
                keys, at = [p * width + r for p, r in mates], y * width + x
                biases = torch.stack([table[:, y - p + self.sizes[0] - 1, x - r + self.sizes[1] - 1] for p, r in mates])
                scores = (q[:, at, None] * k[:, keys]).sum(-1) / d.head_dim**0.5 + biases
                out.append((scores.softmax(1)[..., None] * v[:, keys]).sum(1).flatten(1))
            return w.linear(torch.stack(out, 1), "attention.inner.out")

        c = torch.zeros(len(x), self.width, dtype=x.dtype) if condition is None else condition
        moves = w.linear(silu(w.linear(c, "project")), "modulation").unflatten(1, (3, 3, 1, d.dim))
        for i, branch in enumerate((scanned, attended, lambda t: w.mlp(t, "mlp"))):
            b, s, g = moves[:, i].unbind(1)
            x = x + g * branch(w.norm(x, f"norms.{i}") * (1 + s) + b)
        return x

    @classmethod
    def model(cls, name: str = "xl", *, params: Mapping[str, Any] | None = None, **host: Any) -> UNet:
        """A denoiser of latents (B, 4, 32, 32), the paper's "xl" (600.7 million parameters; no published count).

        Called with `condition`, (B, C of the last stage): the embeddings of time step and class, added. It gives noise
        and variance, (B, 8, 32, 32). Unlike the paper's, the host's decoder takes skips beside the map instead of
        adding them, and has two blocks a level, not three; the last stage holds all seven blocks of the paper's bottom;
        four pixels are normalised one by one, not together, before they are merged; positions are not trained.
        params: of every block, in place of the defaults. host: of the `UNet`, in place of the paper's.
        """
        known("name", name, ("xl",))
        stages = [Stage(320, 2, 16, stride=1), Stage(640, 2, 16), Stage(1280, 2, 16), Stage(1280, 7, 16, stride=1)]
        paper: dict[str, Any] = {"size": (32, 32), "in_channels": 4, "out_channels": 8, "stages": stages, **host}
        size, width = paper["size"], paper["stages"][-1].dim

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                same = dim_in == dim_out and stride == 1
                return (
                    nn.Identity() if same else Reduce(dim_in, dim_out, stride, before=nn.LayerNorm(dim_in), bias=False)
                )
            grid = tuple(-(-n // stride) for n in size)
            placed = nn.Sequential(nn.LayerNorm(dim_out), nn.Flatten(1, 2), WavePositions(Dims(1, dim_out, grid=grid)))
            return Reduce(dim_in, dim_out, stride, after=placed.append(nn.Unflatten(1, grid)))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            given = dict(params or {})
            half = positive("window", given.get("window", 8)) // 2
            return cls(dims, **{"shift": half * (index % 2), "condition": width, **given})

        return UNet(**{"enter": enter, "block": block, **paper})

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(4, 5)), 20, {"window": 3, "shift": 1, "expand": 1, "state": 2, "condition": 5}),
            Case(Dims(4, 1, num_kv_heads=2, grid=(3, 4)), 12, {"window": 2, "mlp_ratio": 2}, batch=1),
            Case(Dims(1, 5, grid=(2, 5)), 10, {"window": 4, "shift": 2, "mlp_ratio": 1, "expand": 3}),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int], **params: Any) -> tuple[LamambaDiff, Tensor]:
        """A block whose gates are open, and tokens for it, in float64."""
        generator = torch.Generator().manual_seed(0)
        module, n = cls(Dims(2, 2, grid=grid), **params).double(), grid[0] * grid[1]
        for parameter in module.modulation.parameters():
            nn.init.normal_(parameter, generator=generator)
        return module, torch.randn(1, n, 4, generator=generator, dtype=torch.float64)

    @claim("A block is the identity at first, whatever the condition.")
    def identity(cls) -> Finding:
        module, x = cls(Dims(2, 4, grid=(7, 9)), window=4, shift=2), torch.randn(2, 63, 8)
        with torch.no_grad():
            same = torch.equal(module(x, condition=torch.randn(2, 8)), x)
        return Finding(same, f"the same bit for bit on 7 x 9: {same}")

    @claim("A condition moves the output, as the equations say.")
    def conditioned(cls) -> Finding:
        module, x = cls.sample((5, 6), window=4, shift=2, condition=3)
        c = torch.randn(1, 3, dtype=torch.float64)
        with torch.no_grad():
            y, plain, exact = module(x, condition=c), module(x), module.oracle(x, condition=c)
        error, moved = float((y - exact).abs().max()), float((y - plain).abs().max())
        allowed = x.numel() * torch.finfo(torch.float64).eps * float(y.abs().max())
        return Finding(error <= allowed < moved, f"moved by {moved:.2f}, largest error {error:.1e}")

    @claim("One token of each way and the next are neighbours; ways by rows and columns jump over the map.")
    def continuous(cls) -> Finding:
        leaps = {}
        for grid in ((32, 32), (7, 9), (5, 8)):
            for orders in (snake_orders, raster_orders):
                way = orders(grid)
                leap = (way // grid[1]).diff().abs() + (way % grid[1]).diff().abs()
                leaps[orders.__name__.split("_")[0], grid] = int(leap.max())
        holds = all(leap == 1 if kind == "snake" else leap > 1 for (kind, _), leap in leaps.items())
        return Finding(holds, ", ".join(f"{kind} on {y} x {x}: {leap}" for (kind, (y, x)), leap in leaps.items()))

    @claim("One block sees the whole map; without its scans, the window of 8 x 8 alone, shifted in odd blocks.")
    def support(cls) -> Finding:
        seen = []
        for shift, scans in itertools.product((0, 4), (True, False)):
            module, x = cls.sample((16, 16), shift=shift)
            if not scans:
                module.scan.leave.weight.data.zero_()
            found = reached(module, x, (0, 0))
            rows, columns = found.view(16, 16).nonzero().unbind(1)
            seen.append((len(rows), int(rows.max()) + 1, int(columns.max()) + 1))
        figures = ", ".join(str(count) for count, *_ in seen)
        return Finding(
            seen == [(256, 16, 16), (64, 8, 8), (256, 16, 16), (16, 4, 4)],
            f"{figures} of 256 tokens seen from the corner: with scans, without; then the same with windows shifted",
        )

    @claim("The products grow as the number of tokens.")
    def linear(cls) -> Finding:
        found = []
        for grid in ((8, 16), (16, 16), (16, 32)):
            module, x = cls.sample(grid)
            found.append(work(functools.partial(module, x)).all)
        ratio = (found[2] - found[1]) / (found[1] - found[0])  # the condition costs the same at any size
        return Finding(ratio == 2, f"256 tokens more cost {ratio:g} times what 128 more do")
