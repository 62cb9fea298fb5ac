"""MambaMixer: selective scans over tokens, then over channels, each fed with a weighted sum of all earlier outputs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim
from saccade.errors import positive
from saccade.hosts.block import Gated
from saccade.mix import DepthwiseConv
from saccade.scan import GridScan, raster_orders


class Series(nn.Module):
    """scan(silu(conv(u))) from the first token on, conv causal with `taps` taps; (B, N, width)."""

    def __init__(self, width: int, taps: int, state: int, rank: int, tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, positive("taps", taps), groups=width)
        self.scan = GridScan(width, state=state, rank=rank, paths=1, orders=torch.arange(tokens)[None])

    def forward(self, u: Tensor) -> Tensor:
        before = nn.functional.pad(u, (0, 0, self.conv.kernel_size[0] - 1, 0))
        return self.scan(nn.functional.silu(self.conv(before.mT).mT))


class BothWays(nn.Module):
    """first(u) + flip(second(flip(u))), along tokens (B, N, width)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, u: Tensor) -> Tensor:
        return self.first(u) + self.second(u.flip(1)).flip(1)


class MambaMixer(Mixer):
    """A stage of MambaMixer layers: tokens are mixed, then channels, and every mixer reads all that came before.

        t_l = Token_l(sum_{i < l} alpha_li t_i + sum_{i < l} beta_li c_i),   t_0 = c_0 = x,   l = 1 .. L
        c_l = Channel_l((sum_{i <= l} theta_li t_i + sum_{i < l} gamma_li c_i)^T)^T,   y = c_L
        Token(x), Channel(x) = W_o (LN(s(u)) * silu(z)),   [u; z] = W x
        s(u) = sum_k scan_k(silu(DW(u)))                                   tokens of a map
        s(u) = scan(silu(conv(u)))                                         tokens of a series
        s(u) = scan(silu(conv(u))) + flip(scan'(silu(conv'(flip(u)))))     channels

    x (B, N, C): tokens of a map (Y, X), row-major, or of a series (X,) -> (B, N, C). A token mixer scans N tokens of C
    features, a channel mixer C channels whose features are the N tokens; inside, features are `expand` times as many.
    scan: selective scans, on maps by rows, by columns, and both backwards; DW: 3 x 3, conv: causal, both depthwise with
    bias; alpha, beta, theta, gamma: learned numbers, at first 1, but 0 for c_0, which is x again: mixers with skips. A
    channel mixer fixes the number of tokens, and lets each see all others.
    Paper: arXiv 2403.19888, section 3.2, which has every equation but LN, 4.1 for maps and 5.1 for series. No code by
    the authors was found.
    Deviations: LN, which stands where VMamba has it, a special case of the paper's model for maps; the equations have
    none. What a scan writes, reads and its steps come from silu(conv(u)), as in the Mamba block that the paper calls a
    special case, where the equations have x. On maps the paper scans channels once for each order of the tokens, orders
    that weights absorb; here it is both ways, as in the general form. The first numbers are chosen here.
    depth: L (default 2). expand: features inside over those outside (2). state: numbers a feature keeps in a scan (16).
    taps: of conv (4).
    Costs 3 expand N C (C + N) multiplications a layer in the projections, beside the scans. Errors: ValueError when
    dims.grid has neither one nor two axes.

    >>> MambaMixer(Dims(1, 8, grid=(3, 5)))(torch.randn(1, 15, 8)).shape
    torch.Size([1, 15, 8])
    """

    spec = Spec(
        id="mambamixer",
        name="MambaMixer",
        title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        paper="2403.19888",
        year=2024,
        family="recurrent",
        uses=("DepthwiseConv", "GridScan", "raster_orders"),
        grid=(2, 1),
    )

    def __init__(self, dims: Dims, *, depth: int = 2, expand: int = 2, state: int = 16, taps: int = 4) -> None:
        super().__init__(dims)
        grid = dims.grid or ()
        dim, n = dims.dim, torch.Size(grid).numel()
        wide, long = positive("expand", expand) * dim, expand * n

        def series(width: int, features: int, tokens: int) -> Series:
            return Series(width, taps, state, -(-features // 16), tokens)

        def tokens() -> nn.Module:
            if len(grid) == 1:
                return series(wide, dim, n)
            scan = GridScan(wide, state=state, rank=-(-dim // 16), orders=raster_orders(grid))
            return nn.Sequential(DepthwiseConv(wide, (3, 3), grid=grid), nn.SiLU(), scan)

        def channels() -> nn.Module:
            return BothWays(series(long, n, dim), series(long, n, dim))

        layers = range(1, positive("depth", depth) + 1)
        self.tokens = nn.ModuleList(Gated(dim, wide, tokens()) for _ in layers)
        self.channels = nn.ModuleList(Gated(n, long, channels()) for _ in layers)
        self.to_tokens = nn.ParameterList(torch.ones(2 * i) for i in layers)  # alpha, then beta
        self.to_channels = nn.ParameterList(torch.ones(2 * i + 1) for i in layers)  # theta, then gamma
        with torch.no_grad():
            for i, (alpha_beta, theta_gamma) in enumerate(zip(self.to_tokens, self.to_channels, strict=True), 1):
                alpha_beta[i] = theta_gamma[i + 1] = 0

    def compute(self, x: Tensor) -> Tensor:
        t, c = [x], [x]
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            t.append(tokens(_weighed(self.to_tokens[i], t + c)))
            c.append(channels(_weighed(self.to_channels[i], t + c).mT).mT)
        return c[-1]

    def oracle(self, x: Tensor) -> Tensor:
        w, grid = Weights(self), self.dims.grid or ()

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        def scanned(u: Tensor, ways: list[list[int]], name: str) -> Tensor:
            total = torch.zeros_like(u)
            for k, way in enumerate(ways):
                read, step, bias, log_rate, direct = (
                    w[f"{name}.{part}"][k] for part in ("read", "step", "bias", "log_rate", "direct")
                )
                h, size = torch.zeros(()), log_rate.shape[1]
                for n in way:
                    low, write, look = (u[:, n] @ read.T).split([step.shape[1], size, size], 1)
                    delta = (1 + (low @ step.T + bias).exp()).log()
                    h = (-delta[..., None] * log_rate.exp()).exp() * h + (delta * u[:, n])[..., None] * write[:, None]
                    total[:, n] += (h * look[:, None]).sum(-1) + direct * u[:, n]
            return total

        def image(u: Tensor, name: str) -> Tensor:
            height, width = grid
            around = nn.functional.pad(u.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
            kernel, taps = w[f"{name}.0.weight"][:, 0], itertools.product(range(3), repeat=2)
            found = [kernel[:, i, j] * around[:, i : i + height, j : j + width] for i, j in taps]
            rows = list(range(height * width))
            columns = [a * width + b for b in range(width) for a in range(height)]
            u = silu((torch.stack(found).sum(0) + w[f"{name}.0.bias"]).flatten(1, 2))
            return scanned(u, [rows, columns, rows[::-1], columns[::-1]], f"{name}.2")

        def series(u: Tensor, name: str) -> Tensor:
            kernel = w[f"{name}.conv.weight"][:, 0]
            taps, n = kernel.shape[1], u.shape[1]
            before = nn.functional.pad(u, (0, 0, taps - 1, 0))
            found = sum(kernel[:, i] * before[:, i : i + n] for i in range(taps)) + w[f"{name}.conv.bias"]
            return scanned(silu(found), [list(range(n))], f"{name}.scan")

        t, c = [x], [x]
        for i in range(len(self.tokens)):
            a, b = w[f"to_tokens.{i}"], w[f"to_channels.{i}"]
            met = torch.stack([number * y for number, y in zip(a, t + c, strict=True)]).sum(0)
            u, z = w.linear(met, f"tokens.{i}.enter").chunk(2, -1)
            s = (image if len(grid) == 2 else series)(u, f"tokens.{i}.inner")
            t.append(w.linear(w.norm(s, f"tokens.{i}.norm") * silu(z), f"tokens.{i}.leave"))
            met = torch.stack([number * y for number, y in zip(b, t + c, strict=True)]).sum(0)
            u, z = w.linear(met.mT, f"channels.{i}.enter").chunk(2, -1)
            s = series(u, f"channels.{i}.inner.first") + series(u.flip(1), f"channels.{i}.inner.second").flip(1)
            c.append(w.linear(w.norm(s, f"channels.{i}.norm") * silu(z), f"channels.{i}.leave").mT)
        return c[-1]

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(3, 5)), 15, {"depth": 3, "expand": 3, "state": 2, "taps": 3}),
            Case(Dims(2, 3, grid=(13,)), 13, {"depth": 2, "expand": 1, "state": 3}, batch=1),
            Case(Dims(1, 5, grid=(2, 4)), 8, {"depth": 1, "taps": 1}),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, ...], dim: int, **params: Any) -> tuple[Any, Tensor]:
        """Layers and tokens for them, in float64."""
        module: Any = cls(Dims(1, dim, grid=grid), **params).double().requires_grad_(False)
        return module, torch.randn(1, torch.Size(grid).numel(), dim, dtype=torch.float64)

    @claim("Where every mixer reads the newest output alone it is a plain stack: tokens, channels, tokens, channels.")
    def stack(cls) -> Finding:
        module, x = cls.sample((3, 4), 5, depth=3)
        y = x
        for i in range(3):
            module.to_tokens[i].zero_()[-1] = 1
            module.to_channels[i].zero_()[i + 1] = 1
            y = module.channels[i](module.tokens[i](y).mT).mT
        error, largest = float((module(x) - y).abs().max()), float(y.abs().max())
        allowed = x.numel() * torch.finfo(x.dtype).eps * largest
        return Finding(error <= allowed, f"largest difference {error:.1e} of {largest:.1e} after 3 layers")

    @claim("Access to all earlier outputs takes L (2 L + 3) numbers for L layers.")
    def numbers(cls) -> Finding:
        counts = []
        for depth in (1, 2, 5):
            module, _ = cls.sample((2, 2), 4, depth=depth)
            counts.append(sum(p.numel() for name, p in module.named_parameters() if name.startswith("to_")))
        return Finding(counts == [5, 14, 65], f"{counts[0]}, {counts[1]} and {counts[2]} for 1, 2 and 5 layers")

    @claim("Mixing channels costs as much for each of them, and depends on the data.")
    def linear_in_channels(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        work, apart = [], 0.0
        for dim in (6, 12):
            module, x = cls.sample((3, 4), dim, depth=1)
            with FlopCounterMode(display=False) as counter:
                y = module.channels[0](x.mT)
            work.append(counter.get_total_flops())
            apart = float((module.channels[0](2 * x.mT) - 2 * y).abs().max() / y.abs().max())
        holds = work[1] == 2 * work[0] and apart > torch.finfo(x.dtype).eps ** 0.5
        return Finding(holds, f"{work[1] / work[0]:g} times at 2 C; at 2 x, {apart:.2f} of the output from 2 y")

    @claim("Channels are mixed by weights that all tokens make, so that a token sees later ones, even in a series.")
    def sees_ahead(cls) -> Finding:
        module, x = cls.sample((9,), 4, depth=1)
        seen = []
        for part in (module.tokens[0], module):
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(part(x.requires_grad_())[0, 3].sum(), x)
            seen.append(int(gradient[0, 4:].ne(0).any(1).sum()))
        return Finding(seen == [0, 5], f"{seen[0]} of 5 later tokens after the token mixer, {seen[1]} after both")


def _weighed(numbers: Tensor, outputs: list[Tensor]) -> Tensor:
    found = torch.zeros_like(outputs[0])
    for number, output in zip(numbers, outputs, strict=True):
        found = found + number * output
    return found
