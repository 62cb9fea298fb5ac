"""HAT: window attention beside a convolution with a channel gate, then cross-attention from windows to larger ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed
from saccade.errors import known, positive
from saccade.hosts.block import AttentionMixer, Block, init_linear, published_size
from saccade.hosts.upscale import Upscaler
from saccade.hosts.windows import WindowAttention
from saccade.mix import cut_windows, join_windows, to_map, to_tokens


class ChannelGate(nn.Module):
    """u * sigmoid(W2 relu(W1 mean(u))) on a map (B, C, Y, X); W1 narrows to C // squeeze."""

    def __init__(self, dim: int, squeeze: int) -> None:
        super().__init__()
        narrow = max(1, dim // squeeze)
        self.gate = nn.Sequential(nn.Conv2d(dim, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, dim, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


class Hybrid(nn.Module):
    """Attention in (shifted) windows + scale * the convolutions with the gate; tokens (B, N, C)."""

    def __init__(self, dims: Dims, window: int, shift: int, compress: int, squeeze: int, scale: float) -> None:
        super().__init__()
        self.grid, self.scale, narrow = dims.grid or (), scale, max(1, dims.dim // compress)
        self.windows = WindowAttention(dims, window, shift=shift)
        enter, leave = nn.Conv2d(dims.dim, narrow, 3, padding=1), nn.Conv2d(narrow, dims.dim, 3, padding=1)
        self.conv = nn.Sequential(enter, nn.GELU(), leave, ChannelGate(dims.dim, squeeze))

    def forward(self, x: Tensor) -> Tensor:
        return self.windows(x) + self.scale * to_tokens(self.conv(to_map(x, self.grid)))


class OverlapTable(nn.Module):
    """A learned bias per head and difference between a key of the larger window and a query of the window."""

    def __init__(self, num_heads: int, window: int, side: int) -> None:
        super().__init__()
        self.window, self.side = window, side
        self.table = nn.Parameter(torch.empty(num_heads, *[window + side - 1] * 2))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        q_pos = q_pos - (self.side**2 - self.window**2)  # queries count as the last of the keys
        rows = k_pos // self.side - (q_pos // self.window)[:, None]
        columns = k_pos % self.side - (q_pos % self.window)[:, None]
        return self.table[:, rows + self.window - 1, columns + self.window - 1]


class Overlapping(nn.Module):
    """From each window to itself and a halo around it: q, k, v (B, H, N, D); k and v are zero beyond the grid."""

    def __init__(self, dims: Dims, window: int, halo: int) -> None:
        super().__init__()
        self.dims, self.window, self.halo, self.side = dims, window, halo, window + 2 * halo
        self.bias = OverlapTable(dims.num_heads, window, self.side)

    def around(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> the larger windows (B, W, side^2, C)."""
        x = x.unflatten(1, self.dims.grid or ())
        ends = [(self.halo, -n % self.window + self.halo) for n in x.shape[2:0:-1]]
        x = nn.functional.pad(x, (0, 0, *(end for pair in ends for end in pair)))
        for axis in (1, 2):
            x = x.unfold(axis, self.side, self.window)
        return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        grid, dim = self.dims.grid or (), self.dims.head_dim
        windows = [cut_windows(q, grid, self.window), self.around(k), self.around(v)]
        q, k, v = (x.flatten(0, 1).unflatten(2, (-1, dim)).transpose(1, 2) for x in windows)
        o = attend(q, k, v, bias=self.bias).transpose(1, 2).flatten(2).unflatten(0, windows[0].shape[:2])
        return join_windows(o, grid, self.window).unflatten(2, (-1, dim)).transpose(1, 2)


class Hat(Mixer):
    """The residual hybrid attention group: hybrid attention blocks, then one overlapping cross-attention block.

        HAB:   u = LN x,  x <- x + A(u) + a c(u),  x <- x + MLP(LN x)      A in windows, in odd blocks shifted by M // 2
        OCAB:  x <- x + O(LN x),  x <- x + MLP(LN x);      group: x + Conv3x3(OCAB(HAB(... HAB(x))))
        c(u) = w sigmoid(W2 relu(W1 mean(w))),   w = Conv3x3(gelu(Conv3x3(u)))
        O: softmax(Q K^T / sqrt(D) + B) V,  Q (M^2, D) of a window, K, V (Mo^2, D) of it and what lies around it

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C). A: multi-head attention with a table of biases over the
    differences of position; shifted windows do not look around the border. Mo = M + int(overlap M); B: a table per head
    over the (M + Mo - 1)^2 differences. Keys and values beyond the grid are zero and not masked: they take mass.
    Paper: arXiv 2205.04437; the zeros, the order of the parts and all sizes follow the authors' code (hat_arch.py).
    Deviations: the authors' code wants grids of whole windows; here they are filled below and to the right, with
    positions that nobody sees in A and with zeros in O. Its mask of shifted windows adds -100 where ours hides, and its
    tables have the same entries in another order. Heads may share keys.
    window: M (default 16). depth: HABs (6). overlap: of the larger windows, as a share of M (0.5). compress: C over the
    width between the convolutions (3). squeeze: C over the width of the gate (30). conv_scale: a (0.01). mlp_ratio:
    hidden width of the MLPs over C (2).
    Costs 2 N (depth M^2 + Mo^2) C multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or int(overlap M) is negative or odd.

    >>> group = Hat(Dims(2, 4, grid=(5, 9)), window=4, depth=2)
    >>> model = Hat.model(size=(5, 9), dim=8, depth=1, heads=2, params={"window": 4, "depth": 2})
    >>> group(torch.randn(1, 45, 8)).shape, model(torch.randn(1, 3, 5, 9)).shape
    (torch.Size([1, 45, 8]), torch.Size([1, 3, 20, 36]))
    """

    spec = Spec(
        id="hat",
        name="HAT",
        title="Activating More Pixels in Image Super-Resolution Transformer",
        paper="2205.04437",
        year=2022,
        family="spatial_window",
        uses=("attend", "RegionBias", "RelativeTable", "Windowed", "cut_windows", "join_windows"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 16,
        depth: int = 6,
        overlap: float = 0.5,
        compress: int = 3,
        squeeze: int = 30,
        conv_scale: float = 0.01,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__(dims)
        self.window, self.conv_scale, extra = positive("window", window), conv_scale, int(window * overlap)
        self.halo = extra // 2
        positive("compress", compress), positive("squeeze", squeeze)
        if extra < 0 or extra % 2:
            raise ValueError(
                f"overlap: got {overlap}, {extra} positions for window {window}; pass one that makes an even number"
            )
        self.blocks = nn.ModuleList()
        for index in range(positive("depth", depth, least=0)):
            mixer = Hybrid(dims, window, index % 2 * (window // 2), compress, squeeze, conv_scale)
            self.blocks.append(Block(dims, mixer, mlp_ratio=mlp_ratio))
        self.overlap = Block(dims, AttentionMixer(Overlapping(dims, window, self.halo)), mlp_ratio=mlp_ratio)
        self.conv = nn.Conv2d(dims.dim, dims.dim, 3, padding=1)

    def compute(self, x: Tensor) -> Tensor:
        y = x
        for block in (*self.blocks, self.overlap):
            y = block(y)
        return x + to_tokens(self.conv(to_map(y, self.dims.grid or ())))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, size, halo = Weights(self), self.dims, self.window, self.halo
        height, width = self.dims.grid or ()
        places = list(itertools.product(range(height), range(width)))

        def convolved(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def gated(t: Tensor, name: str) -> Tensor:
            t = convolved(t, f"{name}.0")
            t = convolved(t / 2 * (1 + torch.erf(t / 2**0.5)), f"{name}.2")
            narrow = w.linear(t.mean(1, keepdim=True), f"{name}.3.gate.0").clamp(min=0)
            return t / (1 + (-w.linear(narrow, f"{name}.3.gate.2")).exp())

        def parts(t: Tensor, name: str) -> tuple[Tensor, ...]:
            shared = d.num_kv_heads * d.head_dim
            return w.linear(t, f"{name}.qkv").split([d.dim, shared, shared], -1)

        def in_windows(t: Tensor, name: str, shift: int) -> Tensor:
            q, k, v = parts(t, name)
            out, groups = torch.empty_like(t), dict[tuple[int, ...], list[int]]()
            for i, place in enumerate(places):
                key: list[int] = []
                for c, n in zip(place, (height, width), strict=True):
                    key += [(c - shift) % (-(-n // size) * size) // size, c < shift]
                groups.setdefault(tuple(key), []).append(i)
            for at in groups.values():
                rows, columns = torch.tensor([places[i] for i in at]).T
                apart = rows[:, None] - rows + size - 1, columns[:, None] - columns + size - 1
                bias = w[f"{name}.attention.bias.bias.table"][:, apart[0], apart[1]]
                out[:, at] = weighed(q[:, at], k[:, at], v[:, at], d.head_dim, bias)
            return w.linear(out, f"{name}.out")

        def overlapping(t: Tensor, name: str) -> Tensor:
            q, k, v = parts(t, name)
            k, v = (torch.cat([s, torch.zeros_like(s[:, :1])], 1) for s in (k, v))  # the last one is beyond
            out = torch.empty_like(t)
            for top, left in itertools.product(range(0, height, size), range(0, width, size)):
                at = [i for i, (y, c) in enumerate(places) if y // size * size == top and c // size * size == left]
                spans = range(top - halo, top + size + halo), range(left - halo, left + size + halo)
                seen = list(itertools.product(*spans))
                keys = [y * width + c if 0 <= y < height and 0 <= c < width else -1 for y, c in seen]
                apart = torch.tensor(seen) - torch.tensor([places[i] for i in at])[:, None] + halo + size - 1
                bias = w[f"{name}.attention.bias.table"][:, apart[..., 0], apart[..., 1]]
                out[:, at] = weighed(q[:, at], k[:, keys], v[:, keys], d.head_dim, bias)
            return w.linear(out, f"{name}.out")

        y = x
        for index, name in enumerate([*(f"blocks.{i}" for i in range(len(self.blocks))), "overlap"]):
            u = w.norm(y, f"{name}.norm_mixer")
            if name == "overlap":
                y = y + overlapping(u, f"{name}.mixer")
            else:
                shifted = in_windows(u, f"{name}.mixer.windows.inner", index % 2 * (size // 2))
                y = y + shifted + self.conv_scale * gated(u, f"{name}.mixer.conv")
            y = y + w.mlp(w.norm(y, f"{name}.norm_mlp"), f"{name}.mlp")
        return x + convolved(y, "conv")

    @classmethod
    def model(cls, name: str = "small", *, params: Mapping[str, Any] | None = None, **host: Any) -> Upscaler:
        """The paper's model for 4 times the resolution: "small" (HAT-S, 9.6 million parameters), "base" (HAT, 20.8) or
        "large" (HAT-L, 40.8).

        params: of every group, in place of the paper's. host: of the model: size of the small image (default (64, 64)),
        dim, depth, heads, block, scale (4) and all else of an `Upscaler`.
        """
        small = known("name", name, ("small", "base", "large")) == "small"
        narrow = {"compress": 24, "squeeze": 24} if small else {}
        params = {**narrow, **(params or {})}

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return cls(dims, **params)

        paper = {"dim": 144 if small else 180, "depth": 12 if name == "large" else 6, "heads": 6, "block": block}
        model = Upscaler(**{**paper, "size": (64, 64), "window": params.get("window", 16), **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        odd = {"window": 3, "depth": 2, "overlap": 0.7, "compress": 2, "squeeze": 4, "conv_scale": 0.5, "mlp_ratio": 1}
        shared = {"window": 2, "depth": 1, "overlap": 2.0, "compress": 1, "squeeze": 2}
        return [
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 5)), 20, {**shared, "conv_scale": 0.3, "mlp_ratio": 3}, batch=1),
            Case(Dims(2, 3, grid=(5, 7)), 35, odd),
            Case(Dims(1, 5, grid=(6, 4)), 24, {**odd, "window": 4, "overlap": 0.5, "depth": 2}, batch=1),
        ]

    @claim("The small model has 9.6 million parameters, the base one 20.8, the large one 40.8, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"small": 9.6, "base": 20.8, "large": 40.8})

    @claim("More pixels are activated: the gate reaches all of them, the larger windows more than windows alone.")
    def activates(cls) -> Finding:
        def seen(**params: float) -> int:
            module = cls(Dims(2, 4, grid=(24, 32)), window=4, depth=1, squeeze=1, **params).double()
            return int(reached(module, torch.randn(1, 768, 8, dtype=torch.float64), (0, 429)).sum())

        counts = seen(overlap=0, conv_scale=0), seen(conv_scale=0), seen()
        figure = f"of 768 pixels one sees {counts[0]} by windows, {counts[1]} with overlap, {counts[2]} with the gate"
        return Finding(counts[0] < counts[1] < counts[2] == 768, figure)

    @claim("Without overlap, the cross-attention is window attention, its table read the other way round.")
    def no_overlap(cls) -> Finding:
        module = cls(Dims(2, 4, grid=(8, 12)), window=4, depth=1, overlap=0).double()
        cross, windows = module.overlap.mixer, module.blocks[0].mixer.windows
        x = torch.randn(1, 96, 8, dtype=torch.float64)
        with torch.no_grad():
            weights = cross.state_dict()
            table = weights.pop("attention.bias.table").flip(1, 2)  # key less query, there query less key
            windows.inner.load_state_dict({**weights, "attention.bias.bias.table": table})
            y = windows(x)
            error = float((cross(x) - y).abs().max())
        allowed = 16 * torch.finfo(torch.float64).eps * float(y.abs().max())  # sums over the 16 keys of a window
        return Finding(error <= allowed, f"largest difference {error:.1e} of {float(y.abs().max()):.2f}")

    @claim("Each query weighs (1.5 M)^2 keys; those beyond the border are zeros that take their share of the mass.")
    def border_mass(cls) -> Finding:
        module = cls(Dims(1, 4, grid=(48, 48)), depth=0).overlap.mixer.attention
        zero, ones = torch.zeros(1, 1, 2304, 4), torch.ones(1, 1, 2304, 4)
        with torch.no_grad():
            module.bias.table.zero_()
            o = module(zero, zero, ones)[0, 0, :, 0].unflatten(0, (48, 48))
        rounding = 24**2 * torch.finfo(torch.float32).eps  # of a sum of that many weights
        holds = abs(float(o[24, 24]) - 1) <= rounding and abs(float(o[0, 0]) - (20 / 24) ** 2) <= rounding
        side = module.side
        return Finding(holds and side == 24, f"{side}^2 keys for M = 16; {float(o[0, 0]):.3f} of the mass in a corner")
