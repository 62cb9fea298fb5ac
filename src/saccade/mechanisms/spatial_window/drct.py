"""DRCT: window attention layers with dense connections, each reading what all layers before it have added."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import known, positive
from saccade.hosts.block import AttentionMixer, Block, init_linear, num_parameters
from saccade.hosts.pyramid import BlockFactory, check_image, check_size
from saccade.mix import RegionBias, Windowed, to_map, to_tokens
from saccade.softmax import RelativeTable


class InWindows(nn.Module):
    """Attention in windows, q, k, v (B W, H, w, D); nobody sees a filling, nor what came around the border."""

    def __init__(self, dims: Dims, size: int, shift: int) -> None:
        super().__init__()
        self.dims, table = dims, RelativeTable(dims.num_heads, (size, size), grid=(size, size))
        nn.init.trunc_normal_(table.table, std=0.02)
        self.bias = RegionBias.of(table, dims.grid or (), size, shift=shift)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fold = self.bias.fold
        return self.bias.unfold(attend(fold(q), fold(k), fold(v), bias=self.bias))


class Upscaler(nn.Module):
    """A small image to a large one: y = Shuffle(x + Conv(LN(groups(LN x)))), x = Conv(image - mean), then + mean.

    image (B, channels, *size) -> (B, channels, scale Y, scale X), reflected up to whole windows and cut off again.
    """

    mean: Tensor

    def __init__(
        self,
        size: Sequence[int],
        dims: tuple[int, int, int],
        window: int,
        block: BlockFactory,
        *,
        scale: int = 4,
        in_channels: int = 3,
        features: int = 64,
    ) -> None:
        super().__init__()
        dim, heads, depth = dims
        self.size, self.scale, self.channels = check_size(size), positive("scale", scale), in_channels
        self.grid = tuple(-(-n // window) * window for n in self.size)
        on_grid = Dims(heads, dim // heads, grid=self.grid)
        mean = torch.tensor((0.4488, 0.4371, 0.4040) if in_channels == 3 else (0.0,))  # of the training set
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.enter, self.after = conv(in_channels, dim), conv(dim, dim)
        groups = (block(on_grid, 0, index) for index in range(depth))
        self.groups = nn.Sequential(nn.LayerNorm(dim), *groups, nn.LayerNorm(dim))
        steps = [2] * (scale.bit_length() - 1) if scale & (scale - 1) == 0 else [scale]
        shuffles = [layer for by in steps for layer in (conv(features, features * by**2), nn.PixelShuffle(by))]
        self.leave = nn.Sequential(conv(dim, features), nn.LeakyReLU(), *shuffles, conv(features, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.channels, self.size)
        for axis, (n, end) in enumerate(zip(self.size, self.grid, strict=True), 2):
            at = torch.arange(end, device=x.device) + n - 1
            x = x.index_select(axis, (at % max(1, 2 * n - 2) - n + 1).abs())
        x = self.enter(x - self.mean)
        x = x + self.after(to_map(self.groups(to_tokens(x)), self.grid))
        height, width = (self.scale * n for n in self.size)
        return (self.leave(x) + self.mean)[:, :, :height, :width]


class Drct(Mixer):
    """The residual dense group: five Swin layers, each on the input and all that the layers before it gave.

        z_j = lrelu(W_j swin_j([x; z_1; ...; z_{j - 1}]) + b_j),   j = 1 .. 4
        y = x + a (W_5 swin_5([x; z_1; ...; z_4]) + b_5)
        swin_j:  u <- u + A(LN u),  u <- u + MLP(LN u)     A in windows of M x M, for j = 2 and 4 shifted by M // 2

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); z_1 .. z_4 (B, N, G), so that layer j has
    C_j = C + (j - 1) G channels, in H - C_j mod H heads. A: multi-head attention with a table of biases over the
    differences of position; shifted windows do not look around the border. lrelu: slope 0.2 below zero.
    Paper: arXiv 2404.00722; the formula, heads, shifts and widths follow the authors' code (DRCT_arch.py).
    Deviations: the authors' code wants grids of whole windows; here they are filled below and to the right with
    positions that nobody sees. Its mask of shifted windows adds -100 where ours hides.
    window: M (default 16). growth: G (32). alpha: a (0.2). mlp_ratio: hidden width of the MLPs of layers 1 to 3 over
    C_j; those of layers 4 and 5 are C_j wide (2).
    Costs 2 N M^2 (C_1 + ... + C_5) multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes, heads share keys, or the heads of a layer do not divide C_j.

    >>> group = Drct(Dims(2, 4, grid=(5, 9)), window=4, growth=2)
    >>> model = Drct.model(size=(5, 9), dims=(8, 2, 1), params={"window": 4, "growth": 2}, scale=3)
    >>> group(torch.randn(1, 45, 8)).shape, model(torch.randn(1, 3, 5, 9)).shape
    (torch.Size([1, 45, 8]), torch.Size([1, 3, 15, 27]))
    """

    spec = Spec(
        id="drct",
        name="DRCT",
        title="DRCT: Saving Image Super-resolution away from Information Bottleneck",
        paper="2404.00722",
        year=2024,
        family="spatial_window",
        uses=("attend", "RegionBias", "RelativeTable", "Windowed"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, window: int = 16, growth: int = 32, alpha: float = 0.2, mlp_ratio: int = 2
    ) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        grid, self.window, self.growth = dims.grid or (), positive("window", window), positive("growth", growth)
        self.alpha, self.layers, self.narrow = alpha, nn.ModuleList(), nn.ModuleList()
        for index in range(5):
            width = dims.dim + index * growth
            heads = dims.num_heads - width % dims.num_heads
            if width % heads:
                raise ValueError(f"growth: got {growth}; layer {index + 1} has {width} channels for {heads} heads")
            inside, shift = Dims(heads, width // heads, grid=grid), index % 2 * (window // 2)
            mixer = Windowed(AttentionMixer(InWindows(inside, window, shift)), grid, window, shift=shift)
            self.layers.append(Block(inside, mixer, mlp_ratio=mlp_ratio if index < 3 else 1))
            self.narrow.append(nn.Linear(width, growth if index < 4 else dims.dim))

    def compute(self, x: Tensor) -> Tensor:
        seen, z = [x], x
        for layer, narrow in zip(self.layers, self.narrow, strict=True):
            z = narrow(layer(torch.cat(seen, -1)))
            seen.append(nn.functional.leaky_relu(z, 0.2))
        return x + self.alpha * z

    def oracle(self, x: Tensor) -> Tensor:
        w, size, (height, width) = dict(self.named_parameters()), self.window, self.dims.grid or ()

        def layer(t: Tensor, name: str) -> Tensor:
            return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def normed(t: Tensor, name: str) -> Tensor:
            t = t - t.mean(-1, keepdim=True)
            t = t / (t.square().mean(-1, keepdim=True) + 1e-5) ** 0.5
            return t * w[f"{name}.weight"] + w[f"{name}.bias"]

        def in_windows(t: Tensor, name: str, shift: int) -> Tensor:
            windows, table = dict[tuple[int, ...], list[tuple[int, int]]](), w[f"{name}.attention.bias.bias.table"]
            for y in range(height):
                for c in range(width):  # the filling lies before the border that a shift rolls around
                    ends = (y, -(-height // size) * size), (c, -(-width // size) * size)
                    key = tuple(k for at, end in ends for k in ((at - shift) % end // size, int(at < shift)))
                    windows.setdefault(key, []).append((y, c))
            out, dim = torch.empty_like(t), t.shape[-1] // len(table)
            for places in windows.values():
                at = [y * width + c for y, c in places]
                q, k, v = (s.split(dim, -1) for s in layer(t[:, at], f"{name}.qkv").chunk(3, -1))
                rows, columns = torch.tensor(places).T
                apart = rows[:, None] - rows + size - 1, columns[:, None] - columns + size - 1
                scores = [a @ b.mT / dim**0.5 + own[apart] for a, b, own in zip(q, k, table, strict=True)]
                mixed = [s.softmax(-1) @ each for s, each in zip(scores, v, strict=True)]
                out[:, at] = layer(torch.cat(mixed, -1), f"{name}.out")
            return out

        seen, z = x, x
        for index in range(5):
            name, u = f"layers.{index}", seen
            u = u + in_windows(normed(u, f"{name}.norm_mixer"), f"{name}.mixer.inner", index % 2 * (size // 2))
            hidden = layer(normed(u, f"{name}.norm_mlp"), f"{name}.mlp.0")
            hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
            z = layer(u + layer(hidden, f"{name}.mlp.2"), f"narrow.{index}")
            seen = torch.cat([seen, torch.where(z > 0, z, z / 5)], -1)
        return x + self.alpha * z

    @classmethod
    def model(cls, name: str = "base", *, params: Mapping[str, Any] | None = None, **host: Any) -> Upscaler:
        """The paper's model for 4 times the resolution: "base" (14.1 million parameters) or "large" (27.6 million).

        params: of every group, in place of the defaults. host: of the model: size of the small image (default (64,
        64)), scale (4), in_channels (3), dims (C, heads and groups), block, features between head and image (64).
        """
        groups = {"base": 6, "large": 12}[known("name", name, ("base", "large"))]
        params = dict(params or {})

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **params)

        paper = {"size": (64, 64), "dims": (180, 6, groups), "window": params.get("window", 16), "block": block}
        model = Upscaler(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"window": 3, "growth": 3, "alpha": 0.7, "mlp_ratio": 1}),
            Case(Dims(3, 2, grid=(4, 5)), 20, {"window": 2, "growth": 4, "alpha": 1.5, "mlp_ratio": 3}, batch=1),
        ]

    @claim("The base model has 14.13 million parameters, the large one 27.58, as published.")
    def published_size(cls) -> Finding:
        published = {"base": 14.13, "large": 27.58}
        sizes = {name: num_parameters(functools.partial(cls.model, name)) / 1e6 for name in published}
        holds = all(abs(sizes[name] / size - 1) < 0.02 for name, size in published.items())
        return Finding(holds, ", ".join(f"{name} {size:.2f} million" for name, size in sizes.items()))

    @claim("Layer 5 reads the input itself: with the growth at zero, the group is x + a W swin_5([x; 0]).")
    def reads_input(cls) -> Finding:
        module, x = cls(Dims(2, 4, grid=(9, 11)), window=4, growth=2).double(), torch.randn(1, 99, 8).double()
        with torch.no_grad():
            for parameter in module.narrow[:-1].parameters():
                parameter.zero_()
            alone = module.narrow[-1](module.layers[-1](torch.cat([x, torch.zeros_like(x)], -1)))
            error, moved = float((module(x) - x - 0.2 * alone).abs().max()), float(0.2 * alone.abs().max())
        rounding = 2 * torch.finfo(torch.float64).eps * float(x.abs().max() + moved)
        return Finding(error <= rounding < moved, f"largest difference {error:.1e}, where x moves by {moved:.2f}")

    @claim(
        "No layer is a bottleneck: with any one of them silent, the group's change keeps the rank that a chain loses."
    )
    def no_bottleneck(cls) -> Finding:
        module, x = cls(Dims(2, 4, grid=(8, 8)), window=4, growth=2).double(), torch.randn(1, 64, 8).double()
        ranks: dict[bool, list[int]] = {True: [], False: []}
        for dense, silent in itertools.product(ranks, range(4)):
            seen, z = [x], x
            with torch.no_grad():
                for index, (layer, narrow) in enumerate(zip(module.layers, module.narrow, strict=True)):
                    z = narrow(layer(torch.cat(seen, -1))) * (index != silent)
                    seen = [*(s if dense else torch.zeros_like(s) for s in seen), nn.functional.leaky_relu(z, 0.2)]
            ranks[dense].append(int(torch.linalg.matrix_rank(z[0])))
        figure = f"rank {ranks[True]} with layer 1, 2, 3 or 4 silent; of a chain {ranks[False]}"
        return Finding(min(ranks[True]) == 8 and max(ranks[False]) == 1, figure)

    @claim("Layers see 180 to 308 channels and add 32 each; a group of 180 channels is narrower than a stack as wide.")
    def widths(cls) -> Finding:
        dims = Dims(6, 30, grid=(16, 16))
        with torch.device("meta"):
            module = cls(dims)
            wide = Dims(4, 77, grid=(16, 16))
            mixer = Windowed(AttentionMixer(InWindows(wide, 16, 0)), (16, 16), 16)
            stack = 5 * sum(p.numel() for p in Block(wide, mixer, mlp_ratio=2).parameters())
        inner = [block.mixer.inner.dims for block in module.layers]
        own = sum(p.numel() for p in module.parameters())
        holds = [d.dim for d in inner] == [180, 212, 244, 276, 308] and [d.num_heads for d in inner] == [6, 4, 2, 6, 4]
        figure = ", ".join(f"{d.dim} in {d.num_heads} heads" for d in inner)
        return Finding(
            holds and own < stack, f"{figure}; {own / 1e6:.2f} million parameters, the stack {stack / 1e6:.2f}"
        )
