"""GC ViT: blocks that attend in windows alternate with blocks whose queries are one summary of the whole map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, weighed, work
from saccade.errors import known, positive
from saccade.hosts.block import Block, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.hosts.windows import InWindows, WindowAttention
from saccade.mix import DepthwiseConv, Windowed, pool_tokens, to_map, to_tokens


class Local(nn.Module):
    """x + W3 (u * sigmoid(W2 gelu(W1 mean(u)))), u = gelu(DW3x3 x), without biases; tokens (B, N, C) of any grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        narrow = max(1, dim // 4)
        self.conv = DepthwiseConv(dim, (3, 3), bias=False)
        squeeze, excite = nn.Linear(dim, narrow, bias=False), nn.Linear(narrow, dim, bias=False)
        self.gate: nn.Module = nn.Sequential(squeeze, nn.GELU(), excite, nn.Sigmoid())
        self.leave = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        u = nn.functional.gelu(self.conv(x, grid))
        return x + self.leave(u * self.gate(u.mean(1, keepdim=True)))


class Down(nn.Module):
    """The way into a stage: LN(Conv3x3(Local(LN x))) with stride 2, from map to map."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm, self.local = nn.LayerNorm(dim_in), Local(dim_in)
        self.reduce = Reduce(dim_in, dim_out, 2, kernel=3, bias=False, after=nn.LayerNorm(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[2:])
        return self.reduce(to_map(self.local(self.norm(to_tokens(x)), grid), grid))


class GlobalQuery(nn.Module):
    """Projections of windows x (B W, w, C) to keys and values; the queries (B, w, C) are given, the same in all."""

    def __init__(self, dims: Dims, window: int) -> None:
        super().__init__()
        self.dims = dims
        self.kv = nn.Linear(dims.dim, 2 * dims.num_kv_heads * dims.head_dim)
        self.attention = InWindows(dims, window)
        self.out = nn.Linear(dims.dim, dims.dim)

    def forward(self, x: Tensor, *, query: Tensor) -> Tensor:
        query = query.repeat_interleave(len(x) // len(query), 0)  # the windows of an image follow one another
        q, kv = (y.unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2) for y in (query, self.kv(x)))
        return self.out(self.attention(q, *kv.chunk(2, 1)).transpose(1, 2).flatten(2))


class Gcvit(Mixer):
    """A stage of GC ViT: window blocks and global-query blocks in turn.

        g = pool(Local(... pool(Local(x))))                          w x w positions, once, from the stage's input
        x <- x + a A(LN x),  x <- x + b MLP(LN x)                    a block
        A: softmax(Q K^T / sqrt(D) + B) V in each window and head, Q of the window (even blocks) or Q = g (odd blocks)
        Local(x) = x + W3 (u * sigmoid(W2 gelu(W1 mean(u)))),   u = gelu(DW3x3 x)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); windows of w x w positions; K, V (w^2, D): projections
    of the window, for each of H heads; g is not projected; B: a table per block and head over the differences of
    position; W1 narrows to C / 4; pool: 3 x 3 maximum with stride 2, floor(log2(min(Y, X) / w)) times, after one Local
    each; where that is 0, one Local and no pool.
    Paper: arXiv 2206.09959, sections 3.2 and 3.3; what Local consists of, the number of pools and the order of blocks
    follow the authors' code (gc_vit.py).
    Deviations: the authors' code wants maps of w 2^s positions a side; here the last pool averages what is left to
    w x w, which changes nothing there, and a map that windows do not divide is filled below and to the right with
    positions that nobody sees. Heads may share keys.
    window: w (default 7). depth: blocks (3). mlp_ratio: hidden width of the MLPs over C (3). layer_scale: initial value
    of a, b per channel (None: 1; 1e-5 in the larger models).
    Costs 2 N w^2 C multiplications a block in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = Gcvit(Dims(2, 4, grid=(9, 12)), window=3)
    >>> layer(torch.randn(1, 108, 8)).shape, layer.query(torch.randn(1, 108, 8)).shape, num_parameters(Gcvit.model)
    (torch.Size([1, 108, 8]), torch.Size([1, 9, 8]), 28221974)
    """

    spec = Spec(
        id="gcvit",
        name="GC ViT",
        title="Global Context Vision Transformers",
        paper="2206.09959",
        year=2022,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "RegionBias", "RelativeTable", "Windowed", "pool_tokens"),
        grid=2,
    )

    def __init__(
        self, dims: Dims, *, window: int = 7, depth: int = 3, mlp_ratio: int = 3, layer_scale: float | None = None
    ) -> None:
        super().__init__(dims)
        grid, self.window = dims.grid or (), positive("window", window)
        self.pools = max(0, (min(grid) // window).bit_length() - 1)
        self.locals = nn.ModuleList(Local(dims.dim) for _ in range(max(1, self.pools)))
        self.blocks = nn.ModuleList()
        for index in range(positive("depth", depth)):
            given = index % 2 == 1
            mixer = Windowed(GlobalQuery(dims, window), grid, window) if given else WindowAttention(dims, window)
            self.blocks.append(Block(dims, mixer, mlp_ratio=mlp_ratio, layer_scale=layer_scale))

    def query(self, x: Tensor) -> Tensor:
        """The global query (B, w^2, C) of the stage's input x (B, N, C)."""
        grid = self.dims.grid or ()
        for local in self.locals:
            x = local(x, grid)
            if self.pools:
                pooled = nn.functional.max_pool2d(to_map(x, grid), 3, 2, 1)
                x, grid = to_tokens(pooled), tuple(pooled.shape[2:])
        return pool_tokens(x, grid, (self.window, self.window))

    def compute(self, x: Tensor) -> Tensor:
        query = self.query(x) if len(self.blocks) > 1 else None
        for index, block in enumerate(self.blocks):
            x = block(x, query=query) if index % 2 else block(x)
        return x

    def oracle(self, x: Tensor) -> Tensor:
        w, d, side, (height, width) = Weights(self), self.dims, self.window, self.dims.grid or ()

        def gelu(t: Tensor) -> Tensor:
            return t / 2 * (1 + torch.erf(t / 2**0.5))

        image, shared = x.unflatten(1, (height, width)), d.num_kv_heads * d.head_dim
        for level in range(len(self.locals)):
            u = gelu(w.conv(image, f"locals.{level}.conv"))
            gate = w.mlp(u.mean((1, 2), keepdim=True), f"locals.{level}.gate")
            image = image + w.linear(u / (1 + (-gate).exp()), f"locals.{level}.leave")
            if self.pools:
                near = [[slice(max(0, c - 1), c + 2) for c in range(0, n, 2)] for n in image.shape[1:3]]
                cells = [[image[:, r, c].amax((1, 2)) for c in near[1]] for r in near[0]]
                image = torch.stack([torch.stack(row, 1) for row in cells], 1)
        share = [[slice(s * n // side, -(-(s + 1) * n // side)) for s in range(side)] for n in image.shape[1:3]]
        query = torch.stack([image[:, r, c].mean((1, 2)) for r in share[0] for c in share[1]], 1)

        for index, name in enumerate(f"blocks.{i}" for i in range(len(self.blocks))):
            inner, tokens, mixed = f"{name}.mixer.inner", w.norm(x, f"{name}.norm_mixer"), torch.empty_like(x)
            table = w[f"{inner}.attention.bias.bias.table"]
            for top, left in itertools.product(range(0, height, side), range(0, width, side)):
                places = list(itertools.product(range(min(side, height - top)), range(min(side, width - left))))
                at = [(top + r) * width + left + c for r, c in places]
                if index % 2:
                    given = query[:, [r * side + c for r, c in places]]
                    q, k, v = given, *w.linear(tokens[:, at], f"{inner}.kv").chunk(2, -1)
                else:
                    q, k, v = w.linear(tokens[:, at], f"{inner}.qkv").split([d.dim, shared, shared], -1)
                down, right = (torch.tensor(axis) for axis in zip(*places, strict=True))
                apart = down[:, None] - down + side - 1, right[:, None] - right + side - 1
                found = weighed(q, k, v, d.head_dim, table[:, apart[0], apart[1]])
                mixed[:, at] = w.linear(found, f"{inner}.out")
            x = x + w.get(f"{name}.scale_mixer", 1) * mixed
            x = x + w.get(f"{name}.scale_mlp", 1) * w.mlp(w.norm(x, f"{name}.norm_mlp"), f"{name}.mlp")
        return x

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "xxtiny" (12.0 million parameters), "xtiny" (20.0), "tiny" (28.2), "small" (51.1) or
        "base" (90.3).

        params: of every stage, in place of the paper's. host: of the `Pyramid`, in place of the paper's; a stage is one
        mixer, to which the `depth` of its `Stage` goes.
        """
        depths = {"xxtiny": (2, 2, 6, 2), "xtiny": (3, 4, 6, 5)}.get(name, (3, 4, 19, 5))
        dim = {"small": 96, "base": 128}.get(known("name", name, ("xxtiny", "xtiny", "tiny", "small", "base")), 64)
        larger = {"mlp_ratio": 2, "layer_scale": 1e-5} if dim > 64 else {}
        stages = [Stage(dim << s, depth, (dim << s) // 32, stride=2 if s else 4) for s, depth in enumerate(depths)]
        stages = list(host.pop("stages", stages))

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return Down(dim_in, dim_out)
            return nn.Sequential(Reduce(dim_in, dim_out, 2, kernel=3), Down(dim_out, dim_out))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            paper = {"window": 14 if stage == 2 else 7, "depth": stages[stage].depth, **larger}
            return cls(dims, **{**paper, **(params or {})})

        once = [replace(stage, depth=1) for stage in stages]
        model = Pyramid(**{"size": (224, 224), "stages": once, "block": block, "enter": enter, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(8, 9)), 72, {"window": 2, "mlp_ratio": 2, "layer_scale": 0.5}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(5, 7)), 35, {"window": 3, "depth": 2}, batch=1),
            Case(Dims(1, 5, grid=(3, 4)), 12, {"window": 5, "depth": 1, "mlp_ratio": 1}),
        ]

    @claim("The models have 12, 20, 28, 51 and 90 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"xxtiny": 12, "xtiny": 20, "tiny": 28, "small": 51, "base": 90})

    @claim("A block with the global query does the work of a window block less the projection of the queries.")
    def cheaper(cls) -> Finding:
        module, x = cls(Dims(2, 4, grid=(14, 21)), depth=2), torch.randn(1, 294, 8)
        own, query = module.blocks[0], module.query(x)
        given = functools.partial(module.blocks[1], query=query)
        counts = [work(functools.partial(block, x)).all / (2 * 294 * 8**2) for block in (own, given)]
        saved = counts[0] - counts[1]
        return Finding(saved == 1, f"{saved:g} N C^2 multiplications less, of {counts[0]:.1f}")

    @claim("The query sees the whole map, but through the gates alone: without them, a cell sees 29 x 29 of 56 x 56.")
    def sees(cls) -> Finding:
        module, found = cls(Dims(1, 4, grid=(56, 56)), depth=2), []
        for _ in range(2):
            seen = []
            for axis in (1, 2):  # image i has a line of NaN, at i on this axis
                lines = torch.eye(56).bool().unsqueeze(3 - axis)[..., None]
                x = torch.where(lines, torch.nan, torch.randn(56, 56, 56, 4))
                with torch.no_grad():
                    cells = module.query(x.flatten(1, 2)).unflatten(1, (7, 7))
                seen.append(int(cells[:, 3, 3].isnan().any(-1).sum()))
            found.append(tuple(seen))
            for local in module.locals:
                local.gate = _Open()
        figure = f"the middle cell sees {found[0][0]} x {found[0][1]}, without gates {found[1][0]} x {found[1][1]}"
        return Finding(found == [(56, 56), (29, 29)], figure)


class _Open(nn.Module):
    """A gate that lets everything through."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)
