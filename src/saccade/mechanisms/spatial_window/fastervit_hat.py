"""FasterViT: windows attend within themselves and to a few carrier tokens, which attend to each other over the map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import known, positive
from saccade.hosts.block import AttentionMixer, Block, TokenNorm, init_linear, published_size
from saccade.hosts.pyramid import Mean, Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.mix import DepthwiseConv, cut_windows, join_windows, to_map, to_tokens


class Coordinates(nn.Module):
    """A small network of two coordinates, W2 relu(W1 p + b1), at every position of a grid: (N, out)."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 512), nn.Linear(512, out, bias=False)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        return self.at([self.along(-(n // 2), n - n // 2) / max(1, n // 2) for n in grid])

    def along(self, first: int, end: int) -> Tensor:
        wide = torch.promote_types(self.enter.weight.dtype, torch.float32)
        return torch.arange(first, end, dtype=wide, device=self.enter.weight.device)

    def at(self, axes: list[Tensor]) -> Tensor:
        return self.leave(self.enter(torch.cartesian_prod(*axes).to(self.enter.weight.dtype)).relu())


class DistanceBias(Coordinates):
    """A score bias for each difference of position on a grid, 0 where one of the two is among the first `extra`."""

    def __init__(self, num_heads: int, grid: tuple[int, ...], extra: int) -> None:
        super().__init__(num_heads)
        self.grid, self.extra = grid, extra

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:  # type: ignore[override]
        steps = [self.along(1 - n, n) * 8 / max(1, n - 1) for n in self.grid]
        table = 16 * self.at([d.sign() * torch.log2(1 + d.abs()) / 3 for d in steps]).sigmoid()
        (height, width), q, k = self.grid, q_pos[:, None] - self.extra, k_pos[None, :] - self.extra
        on_grid, q, k = (q >= 0) & (k >= 0), q.clamp(min=0), k.clamp(min=0)
        rows, columns = q // width - k // width + height - 1, q % width - k % width + width - 1
        return torch.where(on_grid, table.T[:, rows * (2 * width - 1) + columns], 0.0)


class Biased(nn.Module):
    """Attention with `DistanceBias` over a grid and `extra` tokens before it."""

    def __init__(self, dims: Dims, grid: tuple[int, ...], extra: int) -> None:
        super().__init__()
        self.dims, self.bias = dims, DistanceBias(dims.num_heads, grid, extra)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, bias=self.bias)


class HatBlock(nn.Module):
    """tokens (B, W, k^2, C), carriers (B, W L^2, C) or None -> the same, both updated."""

    def __init__(self, dims: Dims, window: int, side: int, grid: tuple[int, ...], add: bool, **shell: Any) -> None:
        super().__init__()
        self.window, self.side, self.grid, self.add = window, side, grid, add
        self.place = Coordinates(dims.dim)
        self.within = Block(dims, AttentionMixer(Biased(dims, (window,) * 2, side**2)), **shell)
        if side:
            self.place_carriers = Coordinates(dims.dim)
            self.across = Block(dims, AttentionMixer(Biased(dims, grid, 0)), **shell)

    def forward(self, tokens: Tensor, carriers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens = tokens + self.place((self.window, self.window))
        if carriers is None:
            return self.within(tokens.flatten(0, 1)).view_as(tokens), None
        carriers = self.across(carriers + self.place_carriers(self.grid))
        both = torch.cat([cut_windows(carriers, self.grid, self.side), tokens], 2)
        own, tokens = self.within(both.flatten(0, 1)).view_as(both).tensor_split([self.side**2], 2)
        if self.add:
            near = torch.arange(self.window, device=own.device) * self.side // self.window
            spread, scale = own[:, :, (near[:, None] * self.side + near).flatten()], self.across.scale_mixer
            tokens = tokens + (spread if scale is None else scale * spread)
        return tokens, join_windows(own, self.grid, self.side)


class ConvBlock(nn.Module):
    """x + BN(Conv(gelu(BN(Conv(x))))) with 3 x 3 convolutions, tokens (B, N, C) of the grid of dims."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.grid, dim = dims.grid or (), dims.dim
        one, two = (nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)) for _ in range(2))
        self.layers = nn.Sequential(one, nn.GELU(), two)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_tokens(self.layers(to_map(x, self.grid)))


class FasterVitHat(Mixer):
    """Hierarchical attention: a stage of blocks that attend across pooled carriers, then within windows.

        c = AvgPool(DW3x3(x))                                      once, L x L carriers a window of k x k tokens
        c <- c + P_c,  c <- c + g1 MHSA(LN c),  c <- c + g2 MLP(LN c)              a block: all carriers of the map,
        y = [its carriers; its tokens + P],  y <- y + g3 MHSA(LN y),  y <- y + g4 MLP(LN y)        then each window
        P(i) = MLP((i - n // 2) / (n // 2)),   B(d) = 16 sigmoid(MLP(sign d log2(1 + 8 |d| / (n - 1)) / log2 8))

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); W windows, W L^2 carriers; i, d: position, difference
    on an axis of n. P (n^2, C) is added to the stream, B (H, n^2, n^2) to the scores, each from a network 2-512-C or
    2-512-H of its own; B = 0 for carriers inside a window. Carriers that the second step updated enter the next block;
    after the last they are dropped or, if `propagate`, added to the tokens of their window, nearest, times its g1. A
    map of one window has none. Cells of the pooling have stride s = n // S and size n - (S - 1) s for S carriers on n
    tokens: they overlap where L does not divide k. A map that windows do not divide is filled below and to the right
    with zeros, which take part, and cut back.
    Paper: arXiv 2306.06189, section 3.3 (hierarchical attention); P, B, the cells and `propagate` follow the authors'
    code (faster_vit.py), the filling their faster_vit_any_res.py, where maps that are not square lack P_c.
    Deviations: a module is the attention of one stage, what is around it belongs to the host; maps that are not
    square have P_c and B by axis, and a lone carrier on an axis has coordinate 0 for 0 / 0. Heads may share keys.
    window: k (default 7). carriers: L (2; 0 leaves windows alone). depth: blocks that share the carriers (1; stages of
    the paper have 6 to 16). mlp_ratio: hidden width of the MLPs over C (4). layer_scale: initial value of g1 to g4
    (None: no factors; 1e-5 in the larger models). propagate: add the carriers at the end (False; True in the larger).
    B starts near 8 between tokens, so that at first a carrier weighs about e^-8 of a token to its window.
    Costs W (k^2 + L^2)^2 + (W L^2)^2 pairs a block and head, of N^2, beside the layers.
    Errors: ValueError when dims.grid has not two axes, carriers exceed window, or propagate has no carriers to add.

    >>> layer = FasterVitHat(Dims(2, 4, grid=(6, 9)), window=3, depth=2)
    >>> layer(torch.randn(1, 54, 8)).shape, layer.summarise(torch.randn(1, 54, 8)).shape
    (torch.Size([1, 54, 8]), torch.Size([1, 24, 8]))
    """

    spec = Spec(
        id="fastervit_hat",
        name="FasterViT (Hierarchical Attention)",
        title="FasterViT: Fast Vision Transformers with Hierarchical Attention",
        paper="2306.06189",
        year=2023,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "cut_windows", "join_windows"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 7,
        carriers: int = 2,
        depth: int = 1,
        mlp_ratio: int = 4,
        layer_scale: float | None = None,
        propagate: bool = False,
    ) -> None:
        super().__init__(dims)
        if positive("carriers", carriers, least=0) > positive("window", window):
            raise ValueError(f"carriers: got {carriers} a side for windows of {window}; pass at most {window}")
        if propagate and not carriers:
            raise ValueError("propagate: got True with carriers=0; pass carriers >= 1, or leave it False")
        self.window, self.propagate, self.grid = window, propagate, dims.grid or ()
        self.whole = tuple(-(-n // window) * window for n in self.grid)
        self.side = carriers if self.whole != (window, window) else 0
        self.cells = tuple(n // window * self.side for n in self.whole)
        if self.side:
            self.local = DepthwiseConv(dims.dim, (3, 3))
        shape, adds = (dims, window, self.side, self.cells), [False] * (positive("depth", depth) - 1) + [propagate]
        self.blocks = nn.ModuleList(HatBlock(*shape, on, mlp_ratio=mlp_ratio, layer_scale=layer_scale) for on in adds)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def summarise(self, x: Tensor) -> Tensor:
        """The first carriers (B, W L^2, C), row-major over the map, of tokens x on a grid that windows divide."""
        stride = [n // cells for n, cells in zip(self.whole, self.cells, strict=True)]
        size = [n - (cells - 1) * s for n, cells, s in zip(self.whole, self.cells, stride, strict=True)]
        return to_tokens(nn.functional.avg_pool2d(to_map(self.local(x, self.whole), self.whole), size, stride))

    def stage(self, x: Tensor, carriers: Tensor | None) -> Tensor:
        """All blocks, on tokens of a grid that windows divide."""
        tokens = cut_windows(x, self.whole, self.window)
        for block in self.blocks:
            tokens, carriers = block(tokens, carriers)
        return join_windows(tokens, self.whole, self.window)

    def compute(self, x: Tensor) -> Tensor:
        (height, width), (high, wide) = self.grid, self.whole
        x = to_tokens(nn.functional.pad(to_map(x, self.grid), (0, wide - width, 0, high - height)))
        y = self.stage(x, self.summarise(x) if self.side else None)
        return to_tokens(to_map(y, self.whole)[:, :, :height, :width])

    @classmethod
    def model(cls, name: str = "0", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier, FasterViT-"0" (31.4 million parameters), "1" (53.4), "2" (75.9), "3" (159.5), "4"
        (365.6), "5" (957.5) or "6" (1360): two stages of convolutions, one with carriers, one of windows alone.

        Published are 424.6 for "4" and 975.5 for "5"; widths and depths are those of the authors' code. params: of the
        two stages with attention, in place of the paper's. host: of the `Pyramid`, in place of the paper's; a stage
        with attention is one mixer, to which the `depth` of its `Stage` goes.
        """
        at = int(known("name", name, map(str, range(7))))
        depths = ((2, 3, 6, 5), (1, 3, 8, 5), (3, 3, 8, 5), *[(3, 3, 12, 5)] * 3, (3, 3, 16, 8))[at]
        dim, heads, stem = (64, 80, 96, 128, 196, 320, 320)[at], 4 if at > 3 else 2, 32 if at == 1 else 64
        larger = {"layer_scale": 1e-5, "propagate": True} if at > 2 else {}
        stages = [Stage(dim << s, depth, heads << s, stride=2 if s else 4) for s, depth in enumerate(depths)]
        stages = list(host.pop("stages", stages))

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            if stage:
                return Reduce(dim_in, dim_out, stride, kernel=3, bias=False, before=nn.LayerNorm(dim_in, eps=1e-6))
            layers: list[nn.Module] = []
            for into, out in ((dim_in, stem), (stem, dim_out)):
                layers += [Reduce(into, out, 2, kernel=3, bias=False), nn.BatchNorm2d(out, eps=1e-4), nn.ReLU()]
            return nn.Sequential(*layers)

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            if stage < 2:
                return ConvBlock(dims)
            alone = {"carriers": 0, "propagate": False} if stage > 2 else {}
            return cls(dims, **{"depth": stages[stage].depth, **larger, **alone, **(params or {})})

        def head(dims: Dims, num_classes: int) -> nn.Module:
            return nn.Sequential(TokenNorm(dims.dim), Mean(), nn.Linear(dims.dim, num_classes))

        once = [replace(stage, depth=1) if at > 1 else stage for at, stage in enumerate(stages)]
        paper = {"size": (224, 224), "stages": once, "block": block, "enter": enter, "head": head}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    def oracle(self, x: Tensor) -> Tensor:
        w, d, k, side, each = Weights(self), self.dims, self.window, self.side, itertools.product
        (high, wide), (rows, columns) = self.whole, self.cells
        carriers, below, right = x.new_zeros(len(x), rows, columns, d.dim), high - self.grid[0], wide - self.grid[1]
        image = nn.functional.pad(x.reshape(len(x), *self.grid, d.dim), (0, 0, 0, right, 0, below))

        def network(points: Tensor, name: str) -> Tensor:
            return w.linear(w.linear(points.to(x), f"{name}.enter").clamp(min=0), f"{name}.leave")

        def positions(height: int, width: int) -> Tensor:
            return torch.tensor(list(each(range(height), range(width))), dtype=torch.float64)

        def place(height: int, width: int, name: str) -> Tensor:
            half = torch.tensor([height // 2, width // 2])
            return network((positions(height, width) - half) / half.clamp(min=1), name)

        def update(y: Tensor, height: int, width: int, name: str) -> Tensor:  # y (B, extra + height * width, C)
            at, extra = positions(height, width), y.shape[1] - height * width
            apart = (at[:, None] - at) / torch.tensor([max(1, height - 1), max(1, width - 1)])
            apart = apart.sign() * torch.log2(1 + 8 * apart.abs()) / 3
            bias = y.new_zeros(y.shape[1], y.shape[1], d.num_heads)
            bias[extra:, extra:] = 16 / (1 + (-network(apart, f"{name}.mixer.attention.bias")).exp())
            counts = d.dim, d.num_kv_heads * d.head_dim, d.num_kv_heads * d.head_dim
            q, k, v = w.linear(w.norm(y, f"{name}.norm_mixer"), f"{name}.mixer.qkv").split(counts, -1)
            mixed = w.linear(weighed(q, k, v, d.head_dim, bias.movedim(-1, 0)), f"{name}.mixer.out")
            y = y + w.get(f"{name}.scale_mixer", 1) * mixed
            return y + w.get(f"{name}.scale_mlp", 1) * w.mlp(w.norm(y, f"{name}.norm_mlp"), f"{name}.mlp")

        if side:
            seen, down, along = w.conv(image, "local"), high // rows, wide // columns
            tall, broad = high - (rows - 1) * down, wide - (columns - 1) * along
            for i, j in each(range(rows), range(columns)):
                carriers[:, i, j] = seen[:, i * down : i * down + tall, j * along : j * along + broad].mean((1, 2))
        for name in (f"blocks.{depth}" for depth in range(len(self.blocks))):
            if side:
                flat = carriers.flatten(1, 2) + place(rows, columns, f"{name}.place_carriers")
                carriers = update(flat, rows, columns, f"{name}.across").reshape(carriers.shape)
            old_image, old_carriers, image, carriers = image, carriers, image.clone(), carriers.clone()
            for a, b in each(range(high // k), range(wide // k)):
                mine, theirs = ((slice(None), slice(a * n, a * n + n), slice(b * n, b * n + n)) for n in (k, side))
                tokens = old_image[mine].flatten(1, 2) + place(k, k, f"{name}.place")
                y = update(torch.cat([old_carriers[theirs].flatten(1, 2), tokens], 1), k, k, f"{name}.within")
                carriers[theirs] = y[:, : side**2].unflatten(1, (side, side))
                image[mine] = y[:, side**2 :].unflatten(1, (k, k))
        if side and self.propagate:
            scale = w.get(f"blocks.{len(self.blocks) - 1}.across.scale_mixer", 1)
            for i, j in each(range(high), range(wide)):
                image[:, i, j] += scale * carriers[:, i * side // k, j * side // k]
        return image[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        every = {"window": 3, "carriers": 2, "depth": 2, "mlp_ratio": 3, "layer_scale": 0.5, "propagate": True}
        return [
            Case(Dims(2, 3, grid=(6, 9)), 54, every),
            Case(Dims(4, 2, num_kv_heads=2, grid=(5, 7)), 35, {"window": 5, "carriers": 3, "propagate": True}, batch=1),
            Case(Dims(1, 5, grid=(3, 5)), 15, {"window": 2, "carriers": 1, "mlp_ratio": 1}, batch=3),
            Case(Dims(2, 2, grid=(5, 4)), 20, {"window": 3, "carriers": 0, "layer_scale": 0.1}),
            Case(Dims(1, 3, grid=(2, 3)), 6, {"window": 3, "carriers": 2}),
        ]

    @claim("FasterViT-0, 1, 2, 3 and 6 have 31.4, 53.4, 75.9, 159.5 and 1360 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"0": 31.4, "1": 53.4, "2": 75.9, "3": 159.5, "6": 1360.0})

    @claim("In one block a token depends on the whole map; without carriers exactly on its window.")
    def global_in_one_block(cls) -> Finding:
        two, one, none = (cls._reach(carriers=side) for side in (2, 1, 0))
        figure = f"of 441 tokens, three see {two} with 2 x 2 carriers a window, {one} with one, {none} without"
        return Finding(two == one == [441] * 3 and none == [49] * 3, figure)

    @claim("What attention within windows writes crosses to other windows in the next block, by the updated carriers.")
    def crosses_in_two_steps(cls) -> Finding:
        once, twice = (cls._reach(pooled=False, depth=depth) for depth in (1, 2))
        figure = f"with pooling cut off, of 441 tokens three see {once} after one block, {twice} after two"
        return Finding(once == [49] * 3 and twice == [441] * 3, figure)

    @claim("Its products weigh W (k^2 + L^2)^2 + (W L^2)^2 pairs, a small part of N^2.")
    def work(cls) -> Finding:
        shares, exact = [0.0, 0.0], True
        for at, side in enumerate((28, 56)):
            module, windows = cls(Dims(2, 4, grid=(side, side))), side**2 // 49
            found = work(functools.partial(module, torch.randn(1, side**2, 8)))
            pairs = (found.fused + found.batched) / (4 * 8)
            exact, shares[at] = exact and pairs == windows * 53**2 + (windows * 4) ** 2, pairs / side**4
        figure = f"{shares[0]:.1%} of N^2 on 28 x 28, {shares[1]:.1%} on 56 x 56; the formula is exact: {exact}"
        return Finding(exact and shares[1] < shares[0] < 1, figure)

    @classmethod
    def _reach(cls, pooled: bool = True, **params: int) -> list[int]:
        """Tokens of 21 x 21 on which the first, the middle and the last one depend."""
        module = cls(Dims(2, 4, grid=(21, 21)), **params).double()  # type: ignore[arg-type]

        def stage(x: Tensor) -> Tensor:
            return module.stage(x, module.summarise(x if pooled else x.detach()) if module.side else None)

        x = torch.randn(1, 441, 8, dtype=torch.float64)
        return [int(reached(stage, x, (0, at, 0)).sum()) for at in (0, 220, 440)]
