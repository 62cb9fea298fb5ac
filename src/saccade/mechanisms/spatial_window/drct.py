"""DRCT: window attention layers with dense connections, each reading what all layers before it have added."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, weighed
from saccade.errors import known, positive
from saccade.hosts.block import Block, init_linear, published_size
from saccade.hosts.upscale import Upscaler
from saccade.hosts.windows import WindowAttention


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
    >>> model = Drct.model(size=(5, 9), dim=8, depth=1, heads=2, params={"window": 4, "growth": 2}, scale=3)
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
            mixer = WindowAttention(inside, window, shift=shift)
            self.layers.append(Block(inside, mixer, mlp_ratio=mlp_ratio if index < 3 else 1))
            self.narrow.append(nn.Linear(width, growth if index < 4 else dims.dim))

    def compute(self, x: Tensor) -> Tensor:
        seen, z = [x], x
        for layer, narrow in zip(self.layers, self.narrow, strict=True):
            z = narrow(layer(torch.cat(seen, -1)))
            seen.append(nn.functional.leaky_relu(z, 0.2))
        return x + self.alpha * z

    def oracle(self, x: Tensor) -> Tensor:
        w, size, (height, width) = Weights(self), self.window, self.dims.grid or ()

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
                rows, columns = torch.tensor(places).T
                apart = rows[:, None] - rows + size - 1, columns[:, None] - columns + size - 1
                q, k, v = w.linear(t[:, at], f"{name}.qkv").chunk(3, -1)
                out[:, at] = w.linear(weighed(q, k, v, dim, table[:, apart[0], apart[1]]), f"{name}.out")
            return out

        seen, z = x, x
        for index in range(5):
            name, u = f"layers.{index}", seen
            u = u + in_windows(w.norm(u, f"{name}.norm_mixer"), f"{name}.mixer.inner", index % 2 * (size // 2))
            z = w.linear(u + w.mlp(w.norm(u, f"{name}.norm_mlp"), f"{name}.mlp"), f"narrow.{index}")
            seen = torch.cat([seen, torch.where(z > 0, z, z / 5)], -1)
        return x + self.alpha * z

    @classmethod
    def model(cls, name: str = "base", *, params: Mapping[str, Any] | None = None, **host: Any) -> Upscaler:
        """The paper's model for 4 times the resolution: "base" (14.1 million parameters) or "large" (27.6 million).

        params: of every group, in place of the defaults. host: of the model: size of the small image (default (64,
        64)), dim, depth, heads, block, scale (4) and all else of an `Upscaler`.
        """
        groups = {"base": 6, "large": 12}[known("name", name, ("base", "large"))]
        params = dict(params or {})

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **params)

        paper = {"dim": 180, "depth": groups, "heads": 6, "block": block}
        model = Upscaler(**{**paper, "size": (64, 64), "window": params.get("window", 16), **host})
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
        return published_size(cls.model, {"base": 14.13, "large": 27.58})

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
            stack = 5 * sum(p.numel() for p in Block(wide, WindowAttention(wide, 16), mlp_ratio=2).parameters())
        inner = [block.mixer.inner.dims for block in module.layers]
        own = sum(p.numel() for p in module.parameters())
        holds = [d.dim for d in inner] == [180, 212, 244, 276, 308] and [d.num_heads for d in inner] == [6, 4, 2, 6, 4]
        figure = ", ".join(f"{d.dim} in {d.num_heads} heads" for d in inner)
        return Finding(
            holds and own < stack, f"{figure}; {own / 1e6:.2f} million parameters, the stack {stack / 1e6:.2f}"
        )
