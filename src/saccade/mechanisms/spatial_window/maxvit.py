"""MaxViT: a convolution, attention in blocks of positions, then attention over a grid of positions far apart."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import known, positive
from saccade.hosts.block import MLP, Block, init_linear, published_size
from saccade.hosts.pyramid import Mean, Pyramid, Stage
from saccade.hosts.windows import WindowAttention
from saccade.mix import to_map, to_tokens

Activation = functools.partial(nn.GELU, approximate="tanh")
BatchNorm = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class Conv(nn.Conv2d):
    """A convolution of n positions to ceil(n / stride), zeros around; an odd one lies below or to the right."""

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for n, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max(0, (-(-n // stride) - 1) * stride + kernel - n)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(nn.functional.pad(x, sides))


class MBConv(nn.Module):
    """The inverted bottleneck with squeeze and excitation: a map (B, dim_in, *grid) -> (B, dim_out, *grid / stride)."""

    def __init__(self, dim_in: int, dim_out: int, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        hidden = dim_out * positive("expand", expand)
        self.stride = stride
        self.shortcut = Conv(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()
        self.enter = nn.Sequential(BatchNorm(dim_in), Conv(dim_in, hidden, 1, bias=False), BatchNorm(hidden))
        self.depthwise = Conv(hidden, hidden, 3, stride, groups=hidden, bias=False)
        self.norm, self.activation = BatchNorm(hidden), Activation()
        narrow = max(1, dim_out // 4)
        self.gate = nn.Sequential(nn.Linear(hidden, narrow), nn.SiLU(), nn.Linear(narrow, hidden), nn.Sigmoid())
        self.leave = Conv(hidden, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.enter(x))
        y = self.activation(self.norm(self.depthwise(y)))
        y = self.leave(y * self.gate(y.mean((2, 3)))[:, :, None, None])
        if self.stride > 1:
            x = nn.functional.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.shortcut(x) + y


class Maxvit(Mixer):
    """The MaxViT block: MBConv, block attention, grid attention.

        x <- MBConv(x),   x <- x + A(LN x),  x <- x + MLP(LN x)     with A in blocks, then with A on grids
        A: softmax(Q K^T / sqrt(D) + B) V in each window and head
        a block: P x P neighbours;   a grid: G x G positions, ceil(Y / G) rows and ceil(X / G) columns apart
        MBConv(x) = x + W3 s(u),  u = f(DW3x3 f(W1 BN x)),  f = GELU(BN),  s(u) = u sigmoid(W5 silu(W4 mean(u)))

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); Q, K, V (w, D): projections for each of H heads; B: a
    learned table per head over the differences of position in the window; u (B, N, expand C); W4 narrows to C / 4.
    Paper: arXiv 2204.01697, section 3.2 and appendix; the layers of MBConv, the biases, tanh's GELU and the norms'
    epsilons follow the authors' code (maxvit.py).
    Deviations: the authors' code refuses maps that windows do not divide; here they are filled below and to the right
    with positions that nobody sees. Of the first block of a stage, whose MBConv halves the map, the convolution is the
    host's way into the stage, and the block has expand=0. Heads may share keys.
    window: P (default 7). grid_size: G (7). mlp_ratio: hidden width of the MLPs over C (4). expand: hidden width of
    MBConv over C (4; 0: no convolution).
    Costs 2 N (P^2 + G^2) C multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = Maxvit(Dims(2, 4, grid=(5, 9)), window=3, grid_size=2).eval()
    >>> layer(torch.randn(1, 45, 8)).shape, num_parameters(Maxvit.model)
    (torch.Size([1, 45, 8]), 30916528)
    """

    spec = Spec(
        id="maxvit",
        name="MaxViT",
        title="MaxViT: Multi-Axis Vision Transformer",
        paper="2204.01697",
        year=2022,
        family="spatial_window",
        uses=("attend", "RelativeTable", "RegionBias", "Windowed", "window_regions"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, window: int = 7, grid_size: int = 7, mlp_ratio: int = 4, expand: int = 4) -> None:
        super().__init__(dims)
        self.sizes = positive("window", window), positive("grid_size", grid_size)
        self.conv = MBConv(dims.dim, dims.dim, expand=expand) if positive("expand", expand, least=0) else None
        self.block, self.grid = (
            Block(dims, WindowAttention(dims, size, dilated=dilated), mlp=MLP(dims.dim, mlp_ratio, Activation()))
            for size, dilated in zip(self.sizes, (False, True), strict=True)
        )

    def compute(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = to_tokens(self.conv(to_map(x, self.dims.grid or ())))
        return self.grid(self.block(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.dims.grid or ()

        def gelu(t: Tensor) -> Tensor:
            return t / 2 * (1 + (0.79788456080286535588 * (t + 0.044715 * t**3)).tanh())

        def scaled(t: Tensor, name: str) -> Tensor:
            t = (t - w[f"{name}.running_mean"]) / (w[f"{name}.running_var"] + 1e-3) ** 0.5
            return t * w[f"{name}.weight"] + w[f"{name}.bias"]

        def convolved(t: Tensor) -> Tensor:
            u = gelu(scaled(w.linear(scaled(t, "conv.enter.0"), "conv.enter.1"), "conv.enter.2"))
            u = w.conv(u.unflatten(1, (height, width)), "conv.depthwise").flatten(1, 2)
            u = gelu(scaled(u, "conv.norm"))
            narrow = w.linear(u.mean(1, keepdim=True), "conv.gate.0")
            gate = w.linear(narrow / (1 + (-narrow).exp()), "conv.gate.2")
            return t + w.linear(u / (1 + (-gate).exp()), "conv.leave")

        def attended(t: Tensor, name: str, size: int, down: int, right: int) -> Tensor:
            """Windows are the positions of one colour; `down`, `right`: steps from one to the next inside a window."""
            out, shared = torch.empty_like(t), d.num_kv_heads * d.head_dim
            windows: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for y, c in itertools.product(range(height), range(width)):
                colour = (y // size, c // size) if name == "block" else (y % down, c % right)
                windows.setdefault(colour, []).append((y, c))
            for places in windows.values():
                at = [y * width + c for y, c in places]
                rows, columns = ([p[axis] // step for p in places] for axis, step in ((0, down), (1, right)))
                apart = [torch.tensor(a)[:, None] - torch.tensor(a) + size - 1 for a in (rows, columns)]
                q, k, v = w.linear(t[:, at], f"{name}.mixer.inner.qkv").split([d.dim, shared, shared], -1)
                table = w[f"{name}.mixer.inner.attention.bias.bias.table"]
                mixed = weighed(q, k, v, d.head_dim, table[:, apart[0], apart[1]])
                out[:, at] = w.linear(mixed, f"{name}.mixer.inner.out")
            return out

        if "conv.leave.weight" in w:
            x = convolved(x)
        side = self.sizes[1]
        for name, size, steps in (
            ("block", self.sizes[0], (1, 1)),
            ("grid", side, (-(-height // side), -(-width // side))),
        ):
            x = x + attended(w.norm(x, f"{name}.norm_mixer"), name, size, *steps)
            x = x + w.linear(gelu(w.linear(w.norm(x, f"{name}.norm_mlp"), f"{name}.mlp.0")), f"{name}.mlp.2")
        return x

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "tiny" (30.9 million parameters), "small" (68.9), "base" (119.5) or "large" (211.8).

        params: of every block, in place of the defaults. host: of the `Pyramid`, in place of the paper's.
        """
        dim = {"tiny": 64, "small": 96, "base": 96, "large": 128}[
            known("name", name, ("tiny", "small", "base", "large"))
        ]
        depths = (2, 2, 5, 2) if name in ("tiny", "small") else (2, 6, 14, 2)
        stages = [Stage(dim << s, depth, (dim << s) // 32, stride=2 if s else 4) for s, depth in enumerate(depths)]
        stem = 128 if name == "large" else 64

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return MBConv(dim_in, dim_out, stride)
            first = Conv(dim_in, stem, 3, 2), BatchNorm(stem), Activation(), Conv(stem, stem, 3)
            return nn.Sequential(*first, MBConv(stem, dim_out, stride // 2))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **{**(params or {}), **({} if index else {"expand": 0})})

        def head(dims: Dims, num_classes: int) -> nn.Module:
            hidden = nn.LayerNorm(dims.dim), nn.Linear(dims.dim, dims.dim), nn.Tanh()
            return nn.Sequential(Mean(), *hidden, nn.Linear(dims.dim, num_classes))

        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": enter, "head": head}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"window": 3, "grid_size": 2, "mlp_ratio": 2, "expand": 2}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 6)), 24, {"window": 2, "grid_size": 2, "expand": 0}, batch=1),
            Case(Dims(1, 5, grid=(3, 5)), 15, {"window": 5, "grid_size": 4, "mlp_ratio": 1, "expand": 3}, batch=3),
        ]

    @claim("The tiny model has 31 million parameters, small 69, base 119, large 212, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"tiny": 31, "small": 69, "base": 119, "large": 212})

    @claim("Grid attention is block attention of permuted tokens.")
    def permuted(cls) -> Finding:
        module = cls(Dims(2, 4, grid=(12, 20)), window=4, grid_size=4, expand=0).double()
        order = torch.arange(240).view(4, 3, 4, 5).permute(1, 0, 3, 2).flatten()  # rows and columns by residue
        module.block.load_state_dict(module.grid.state_dict())
        x = torch.randn(1, 240, 8, dtype=torch.float64)
        with torch.no_grad():
            same = torch.equal(module.grid.mixer(x)[:, order], module.block.mixer(x[:, order]))
        return Finding(same, f"the same bit for bit on 12 x 20 with G = P = 4: {same}")

    @claim("A block and a grid reach P G positions an axis: the whole map exactly when P G is no less than its side.")
    def reach(cls) -> Finding:
        seen = {}
        for window, grid_size in ((3, 4), (4, 3), (3, 3), (2, 4)):
            module = cls(Dims(2, 4, grid=(12, 12)), window=window, grid_size=grid_size, expand=0).double()
            x = torch.randn(1, 144, 8, dtype=torch.float64)
            seen[window, grid_size] = int(reached(module, x, (0, 0, 0)).sum())
        holds = all(count == min(12, p * g) ** 2 for (p, g), count in seen.items())
        return Finding(holds, "; ".join(f"P = {p}, G = {g}: {count} of 144" for (p, g), count in seen.items()))

    @claim("For fixed P and G the work grows as the number of positions.")
    def linear(cls) -> Finding:
        found = []
        for grid in ((14, 14), (14, 28), (28, 28)):
            module, x = cls(Dims(2, 4, grid=grid), expand=0), torch.randn(1, grid[0] * grid[1], 8)
            found.append(work(functools.partial(module, x)).all)
        holds = found[1] == 2 * found[0] and found[2] == 4 * found[0]
        return Finding(holds, f"{found[1] / found[0]:g} and {found[2] / found[0]:g} times the work at 2 and 4 times N")
