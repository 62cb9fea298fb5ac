"""SegMAN: attention in neighbourhoods, whose result a scan (or full attention) then carries over the whole map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, work
from saccade.errors import known, positive
from saccade.hosts.block import ConvMLP, Residual, TokenNorm, init_linear, num_parameters
from saccade.hosts.pyramid import Pyramid, Stage, widen_then_pool
from saccade.mix import DepthwiseConv, grid_angles, turn_pairs
from saccade.scan import GridScan, raster_orders
from saccade.softmax import RelativeTable
from saccade.where import Neighborhood

Norm = functools.partial(nn.LayerNorm, eps=1e-6)
SIZES = {  # channels, blocks, heads and widths of F over C for each of four stages, and the initial layer scale
    "tiny": ((32, 64, 144, 192), (2, 2, 4, 2), (1, 2, 4, 8), (4.0, 4.0, 3.0, 3.0), None),
    "small": ((64, 144, 288, 512), (2, 2, 10, 4), (2, 4, 8, 16), (4.0, 4.0, 3.4, 3.4), None),
    "base": ((96, 160, 364, 560), (4, 4, 18, 4), (4, 8, 13, 20), (4.0, 4.0, 3.0, 3.0), 1e-6),
    "large": ((96, 192, 432, 640), (4, 4, 28, 4), (4, 8, 12, 20), (4.0, 4.0, 3.0, 3.0), 1e-6),
}


def convolution(dims: Dims, kernel: int) -> DepthwiseConv:
    """A depthwise convolution of `kernel` x `kernel` taps, tokens (B, N, C) of the grid of dims."""
    return DepthwiseConv(dims.dim, (kernel, kernel), grid=dims.grid)


class PairTable(nn.Module):
    """A learned bias for every head and pair of positions."""

    def __init__(self, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, num_tokens, num_tokens))

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return self.table[:, q_pos[:, None], k_pos]


class Scan(nn.Module):
    """u + LN(SS2D(silu(BN(DW(u))))), tokens (B, N, C)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.before = nn.Sequential(convolution(dims, 3), TokenNorm(dims.dim), nn.SiLU())
        self.scan, self.norm = GridScan(dims.dim, orders=raster_orders(dims.grid or ())), Norm(dims.dim)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.norm(self.scan(self.before(u)))


class Lass(nn.Module):
    """The mixer of the block on tokens (B, N, C)."""

    def __init__(self, dims: Dims, kernel: int, beyond: str) -> None:
        super().__init__()
        grid, n = dims.grid or (), torch.Size(dims.grid or ()).numel()
        self.dims, self.kernel = dims, positive("kernel", kernel)
        self.pattern = Neighborhood(grid, [min(kernel, size) for size in grid])
        self.bias = RelativeTable(dims.num_heads, (kernel, kernel), grid=grid)
        self.qkv, self.out = nn.Linear(dims.dim, 3 * dims.dim), nn.Linear(dims.dim, dims.dim)
        self.position = convolution(dims, 5)
        scans = known("beyond", beyond, ("scan", "attention")) == "scan"
        self.scan = Scan(dims) if scans else None
        self.pairs = None if scans else PairTable(dims.num_heads, n)

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, H, N, D), pairs of channels turned, the first half by the row and the second by the column."""
        rates = torch.logspace(0, -4, x.shape[3] // 4, dtype=torch.float64, device=x.device)
        return turn_pairs(x, grid_angles(self.dims.grid or (), (rates, rates)))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.unflatten(2, (3, self.dims.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q), self.rotate(k)
        u = attend(q, k, v, self.pattern, bias=self.bias)
        if self.scan is None:
            y = attend(q, k, u, bias=self.pairs).transpose(1, 2).flatten(2)
        else:
            y = self.scan(u.transpose(1, 2).flatten(2))
        return self.out(y + self.position(qkv[..., -self.dims.dim :]))


class Scaled(nn.Module):
    """Learned factors and offsets per channel behind a layer: a inner(x) + b, with b = 0 at first."""

    def __init__(self, inner: nn.Module, dim: int, initial: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.full((dim,), initial))
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x) + self.offset


class Segman(Mixer):
    """The SegMAN block: local attention and a state-space scan in series (LASS), with convolutions around.

        x <- x + DW(x),  x <- x + M(LN x),  x <- x + DW(x),  x <- x + F(LN x)
        u_i = sum_{j in N(i)} softmax_j(R_i q_i . R_j k_j / sqrt(D) + B(i - j)) v_j
        M(x) = W (u + LN(SS2D(silu(BN(DW(u))))) + DW5(v)) + w                            beyond = "scan"
        M(x)_i = W (sum_j softmax_j(R_i q_i . R_j k_j / sqrt(D) + P(i, j)) u_j + DW5(v)_i) + w     "attention"
        F(x) = W_2 (h + DW(h)) + w_2,   h = gelu(W_1 x + w_1)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, k, v: projections for each of H heads; N(i): the
    kernel x kernel tokens nearest to i, clamped inside the map; B: a learned table per head over the (2 kernel - 1)^2
    differences; P (H, N, N): learned; R: rotary embedding, the first half of the channels by the row, the second by the
    column; DW, DW5: 3 x 3 and 5 x 5 depthwise convolutions; SS2D: selective scans by rows, by columns and backwards,
    one number a channel, summed. In the last stage, where maps are small, full attention with the same q and k takes
    the place of the scan.
    Paper: arXiv 2412.11890. The layers, their order, R (whose slowest rate is 1 / 10000 itself) and the sizes follow
    the authors' code (segman_encoder.py).
    Deviations: a side of the neighbourhood is cut to the map, where the library of the authors refuses maps smaller
    than it.
    kernel: tokens a side of a neighbourhood (default 7). beyond: "scan" (default) or "attention". mlp_ratio: hidden
    width of F over C, rounded down (4.0). layer_scale: initial value of learned factors on M and F, which have an
    offset too (None: no factors).
    Costs 2 N kernel^2 C multiplications in the products and N C (C / 2 + 20) in the scans, or 2 N^2 C without, beside
    the layers. Errors: ValueError when dims.grid has not two axes, heads share keys, head_dim is no multiple of 4,
    beyond is another word, or mlp_ratio gives no width.

    >>> layer = Segman(Dims(2, 4, grid=(5, 9)), kernel=3).eval()
    >>> layer(torch.randn(1, 45, 8)).shape, num_parameters(Segman.model)
    (torch.Size([1, 45, 8]), 3506014)
    """

    spec = Spec(
        id="segman",
        name="SegMAN",
        title="SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention for Semantic "
        "Segmentation",
        paper="2412.11890",
        year=2024,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "GridScan", "Neighborhood", "RelativeTable", "raster_orders", "turn_pairs"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        kernel: int = 7,
        beyond: str = "scan",
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        if dims.head_dim % 4:
            raise ValueError(f"dims.head_dim: got {dims.head_dim}; the rotation takes multiples of 4")
        hidden = int(dims.dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio: got {mlp_ratio}, which leaves no channel of {dims.dim}; pass 1.0 or more")
        inner: list[nn.Module] = [Lass(dims, kernel, beyond), ConvMLP(dims.dim, hidden, dims.grid or ())]
        if layer_scale is not None:
            inner = [Scaled(layer, dims.dim, layer_scale) for layer in inner]
        mixer, mlp = inner
        self.block = nn.Sequential(
            Residual(convolution(dims, 3)),
            Residual(mixer, Norm(dims.dim)),
            Residual(convolution(dims, 3)),
            Residual(mlp, Norm(dims.dim)),
        )
        self.kernel, self.beyond, self.scaled = kernel, beyond, layer_scale is not None

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.dims.grid or ()
        last = ".inner" if self.scaled else ""
        lass, feed = f"block.1.inner{last}", f"block.3.inner{last}"
        places = list(itertools.product(range(height), range(width)))

        def conv(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def rotated(t: Tensor) -> Tensor:
            quarter = d.head_dim // 4
            rates = [10000 ** (-rank / max(1, quarter - 1)) for rank in range(quarter)]
            turns = [[at * rate for at in place for rate in rates] for place in places]
            angles = torch.tensor(turns, dtype=torch.float64)[:, None]
            cos, sin, a, b = angles.cos().to(t), angles.sin().to(t), t[..., ::2], t[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)

        def nearest(at: int, length: int) -> range:
            side = min(self.kernel, length)
            first = min(max(at - side // 2, 0), length - side)
            return range(first, first + side)

        def scanned(u: Tensor) -> Tensor:
            mean, spread, weight, bias = (
                w[f"{lass}.scan.before.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
            )
            t = (conv(u, f"{lass}.scan.before.0") - mean) / (spread + 1e-5).sqrt() * weight + bias
            t = t / (1 + (-t).exp())
            columns = [a * width + b for b in range(width) for a in range(height)]
            ways = torch.tensor([range(len(places)), columns, range(len(places))[::-1], columns[::-1]])
            read, step, bias, log_rate, direct = (
                w[f"{lass}.scan.scan.{name}"] for name in ("read", "step", "bias", "log_rate", "direct")
            )
            met = t[:, ways]
            low, write, look = (met @ read.mT).split([step.shape[2], 1, 1], 3)
            delta = (1 + (low @ step.mT + bias[:, None]).exp()).log()
            h, total = torch.zeros_like(met[:, :, 0]), torch.zeros_like(u)
            for n in range(len(places)):
                h = (-delta[:, :, n] * log_rate[..., 0].exp()).exp() * h
                h = h + delta[:, :, n] * met[:, :, n] * write[:, :, n]
                total = total.index_add(1, ways[:, n], h * look[:, :, n] + direct * met[:, :, n])
            return u + w.norm(total, f"{lass}.scan.norm", 1e-6)

        def mixed(t: Tensor) -> Tensor:
            every = w.linear(t, f"{lass}.qkv")
            q, k, v = (part.unflatten(2, (d.num_heads, -1)) for part in every.split(d.dim, 2))
            q, k = rotated(q) / d.head_dim**0.5, rotated(k)
            table, reach, local = w[f"{lass}.bias.table"], self.kernel - 1, []
            for n, (y, x) in enumerate(places):
                mates = list(itertools.product(nearest(y, height), nearest(x, width)))
                keys = [a * width + b for a, b in mates]
                biases = torch.stack([table[:, y - a + reach, x - b + reach] for a, b in mates])
                weights = ((q[:, n, None] * k[:, keys]).sum(-1) + biases).softmax(1)
                local.append((weights[..., None] * v[:, keys]).sum(1))
            u = torch.stack(local, 1)
            if self.beyond == "scan":
                out = scanned(u.flatten(2))
            else:
                weights = (torch.einsum("bihd,bjhd->bhij", q, k) + w[f"{lass}.pairs.table"]).softmax(-1)
                out = torch.einsum("bhij,bjhd->bihd", weights, u).flatten(2)
            return w.linear(out + conv(every[..., -d.dim :], f"{lass}.position"), f"{lass}.out")

        def fed(t: Tensor) -> Tensor:
            h = nn.functional.gelu(w.linear(t, f"{feed}.enter"))
            return w.linear(h + conv(h, f"{feed}.local"), f"{feed}.leave")

        for number, branch in ((0, mixed), (2, fed)):
            x = x + conv(x, f"block.{number}.inner")
            y = branch(w.norm(x, f"block.{number + 1}.norm", 1e-6))
            name = f"block.{number + 1}.inner"
            x = x + (w[f"{name}.factor"] * y + w[f"{name}.offset"] if self.scaled else y)
        return x

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The encoder and a classifier: "tiny" (3.5 million parameters), "small" (25.5), "base" (45.0), "large" (81.0).

        The last stage has full attention, and with it biases for the pairs of 7 x 7 positions. What the decoder for
        segmentation reads are the `features` of the last three stages.
        params: of every block, in place of the defaults. host: of the `Pyramid`, in place of the paper's.
        """
        dims, depths, heads, ratios, layer_scale = SIZES[known("name", name, SIZES)]
        kernels = (11, 9, 9 if name == "tiny" else 7, 7)
        stages = [Stage(*each) for each in zip(dims, depths, heads, (4, 2, 2, 2), strict=True)]

        def conv(dim_in: int, dim_out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(dim_in, dim_out, 3, stride, 1, bias=False), nn.BatchNorm2d(dim_out)]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return nn.Sequential(*conv(dim_in, dim_out, stride))
            half, twice = dim_out // 2, stride // 2
            stem = [*conv(dim_in, half, 2), nn.GELU(), *conv(half, half, 1), nn.GELU()]
            return nn.Sequential(*stem, *conv(half, dim_out, twice), nn.GELU(), *conv(dim_out, dim_out, 1))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            s = min(stage, 3)
            paper: dict[str, Any] = {"kernel": kernels[s], "mlp_ratio": ratios[s], "layer_scale": layer_scale}
            return cls(dims, **{**paper, "beyond": "attention" if s == 3 else "scan", **(params or {})})

        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": enter, "head": widen_then_pool(1024)}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(3, 5)), 15, {"kernel": 3, "mlp_ratio": 1.3, "layer_scale": 0.5}),
            Case(Dims(3, 4, grid=(4, 3)), 12, {"kernel": 2, "beyond": "attention", "mlp_ratio": 1.0}, batch=1),
            Case(Dims(1, 8, grid=(2, 4)), 8, {"kernel": 3, "mlp_ratio": 0.5}),
        ]

    @claim("With the authors' decoder the encoders have 6.4, 29.4, 51.8 and 92.6 million parameters, as published.")
    def published_size(cls) -> Finding:
        published = {"tiny": 6.4, "small": 29.4, "base": 51.8, "large": 92.6}
        decoders = {"tiny": 4.116, "small": 5.469, "base": 8.384, "large": 13.034}  # counted in segman_decoder.py
        sizes = {}
        for name in published:
            encoder = num_parameters(functools.partial(cls.model, name, head=None)) / 1e6
            sizes[name] = encoder + decoders[name]
        holds = all(abs(sizes[name] / size - 1) < 0.02 for name, size in published.items())
        return Finding(holds, ", ".join(f"{name} {size:.2f} million" for name, size in sizes.items()))

    @claim(
        "One mixer sees the whole map, by scan or attention; without, the k x k window alone, clamped at the border."
    )
    def support(cls) -> Finding:
        def seen(mixer: nn.Module, at: int) -> tuple[int, ...]:
            places = reached(mixer, torch.randn(1, 144, 8, dtype=torch.float64), (0, at)).view(12, 12)
            return int(places.sum()), int(places.any(1).sum()), int(places.any(0).sum())

        found = []
        for at in (6 * 12 + 6, 0):
            scan, full = (
                cls(Dims(2, 4, grid=(12, 12)), beyond=beyond).double().eval().block[1].inner
                for beyond in ("scan", "attention")
            )
            found += [seen(scan, at), seen(full, at)]
            scan.scan.norm.weight.data.zero_()
            found.append(seen(scan, at))
        figures = ", ".join(str(count) for count, *_ in found)
        return Finding(
            found == [(144, 12, 12), (144, 12, 12), (49, 7, 7)] * 2,
            f"{figures} of 144 tokens: by scan, attention, neither; from the middle, then from the corner",
        )

    @claim("With the scan the products grow as the number of tokens, with full attention faster.")
    def linear(cls) -> Finding:
        growth = {}
        for beyond in ("scan", "attention"):
            once, twice = (cls(Dims(1, 4, grid=(32, side)), beyond=beyond).eval() for side in (32, 64))
            less = work(functools.partial(once, torch.randn(1, 32 * 32, 4))).all
            growth[beyond] = work(functools.partial(twice, torch.randn(1, 32 * 64, 4))).all / less
        holds = growth["scan"] < 2**1.5 < growth["attention"]  # between linear and quadratic
        return Finding(holds, ", ".join(f"{beyond}: {by:.2f} times at 2 N" for beyond, by in growth.items()))
