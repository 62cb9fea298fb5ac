"""DuoFormer: the tokens that several scales have in one cell attend to each other, then one token of every cell."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.hosts.resize import coarser
from saccade.mix import RegionBias, cut_windows, to_map, to_tokens, window_regions


class Scaled(nn.Module):
    """Attention with the scores 2 Q K^T / sqrt(C); `apart` hides the filling of sets, where there is any."""

    def __init__(self, dims: Dims, apart: RegionBias | None = None) -> None:
        super().__init__()
        self.scale, self.apart = 2 * dims.dim**-0.5, apart

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.apart is None:
            return attend(q, k, v, scale=self.scale)
        q, k, v = map(self.apart.fold, (q, k, v))
        return self.apart.unfold(attend(q, k, v, bias=self.apart, scale=self.scale))


class Summary(nn.Module):
    """One token for each coarsest cell, of maps (B, C, *grid) from the finest to the coarsest: (B, C, *coarsest)."""

    def __init__(self, dim: int, scales: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList()
        for steps in reversed(range(scales)):
            layers: list[nn.Module] = [nn.Conv2d(dim, dim, 3, 2, 1) for _ in range(steps - 1)]
            pool = [nn.MaxPool2d(2, ceil_mode=True)] if steps else []
            self.reduce.append(nn.Sequential(*layers, *pool))
        self.fuse = nn.Sequential()
        for index in range(4):
            convolved = nn.Conv2d(dim if index else scales * dim, dim, 3, padding=1)
            self.fuse.extend([convolved, nn.BatchNorm2d(dim), nn.ReLU()])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.fuse(torch.cat([reduce(x) for reduce, x in zip(self.reduce, maps, strict=True)], 1))


class Duoformer(Mixer):
    """Scale attention in every cell of the coarsest map, then patch attention between cells.

        z_p = [s_p; x_{S - 1, p}; ...; x_{0, p}] + E,   z_p <- block(z_p)  times depth          in each cell p by itself
        u = [c; z_1's first; z_2's first; ...] + P,     u <- A(u)  times patch_depth
        A = W softmax(2 Q K^T / sqrt(C)) V + w;   block(z) = z + a A(LN z), then z + b MLP(LN z)
        s = f(f(f(f([r_0; r_1; ...])))),   f = relu(BN(Conv3x3)),   r_l = MaxPool2(Conv3x3 ... Conv3x3)(x_l), stride 2

    x (B, N, C): tokens of a row-major grid (Y, X), the finest map -> u (B, 1 + cells, C), the class token first. x_l, l
    = 0 .. S - 1: maps of S scales, each half as fine as the one before, after a projection of their own (s reads them
    before it); x_{l, p} (4^(S - 1 - l), C): those of cell p, row-major; s (cells, C): the scale tokens; E (F, C), the
    same for all cells, P (1 + cells, C) and c are learned; F = 1 + 1 + 4 + 16 + ... tokens of a set. r_l takes
    S - 2 - l convolutions, r_{S - 1} is the map. Only the first token of a set goes on; patch attention has no norm,
    residual or MLP.
    Paper: arXiv 2506.12982 (2407.13920 before); layers, scales of scores and the order follow a copy of the authors'
    code (multiscale_attn.py, multi_vision_transformer.py, projection_head.py).
    Deviations: a call takes the coarser maps as `coarser`, tokens (B, N_l, C), the finer ones first; without them they
    are means over 2 x 2. The scale token reads the scales that take part, the authors' code always four. There, each
    patch attention after the first starts from what the first gave, so that only the first and the last count; here
    they follow one another. Cells at a border that lack tokens have sets with fewer. Heads may share keys.
    scales: S (default 4). depth: scale blocks (1; the paper has 12). patch_depth: patch attentions (None: as many).
    mlp_ratio: hidden width of the MLPs over C (4). layer_scale: initial value of a, b per channel (1e-5; None: 1).
    Costs depth cells F^2 + patch_depth (1 + cells)^2 pairs a head, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or `coarser` are not the tokens of S - 1 halved maps.

    >>> layer = Duoformer(Dims(2, 4, grid=(8, 12)), scales=3, depth=2).eval()
    >>> layer(torch.randn(1, 96, 8)).shape, layer.grids
    (torch.Size([1, 7, 8]), [(8, 12), (4, 6), (2, 3)])
    """

    spec = Spec(
        id="duoformer",
        name="DuoFormer",
        title="DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer",
        paper="2506.12982",
        year=2024,
        family="spatial_window",
        uses=("attend", "RegionBias", "cut_windows", "window_regions"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        scales: int = 4,
        depth: int = 1,
        patch_depth: int | None = None,
        mlp_ratio: int = 4,
        layer_scale: float | None = 1e-5,
    ) -> None:
        super().__init__(dims)
        self.depth, self.grids = positive("depth", depth), [dims.grid or ()]
        self.patch_depth = depth if patch_depth is None else positive("patch_depth", patch_depth, least=0)
        for _ in range(positive("scales", scales) - 1):
            self.grids.append(coarser(self.grids[-1], 2))
        sides = [2 ** (scales - 1 - at) for at in range(scales)]
        cells = torch.Size(self.grids[-1]).numel()
        real = [window_regions(grid, side).clamp(max=0) for grid, side in zip(self.grids, sides, strict=True)]
        regions = torch.cat([torch.zeros(cells, 1, dtype=torch.int64), *reversed(real)], 1)
        apart = RegionBias(None, regions, heads=dims.num_heads) if bool(regions.any()) else None
        self.project = nn.ModuleList(nn.Linear(dims.dim, dims.dim) for _ in range(scales))
        self.summary = Summary(dims.dim, scales)
        self.place = nn.Parameter(torch.empty(regions.shape[1], dims.dim))
        self.place_cells, self.token = (
            nn.Parameter(torch.empty(1 + cells, dims.dim)),
            nn.Parameter(torch.empty(dims.dim)),
        )
        for parameter, std in ((self.place, 0.036), (self.place_cells, 0.02), (self.token, 0.02)):
            nn.init.trunc_normal_(parameter, std=std)
        within, between = Scaled(dims, apart), Scaled(dims)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            mixer = AttentionMixer(within, dims=dims)
            self.blocks.append(Block(dims, mixer, mlp_ratio=mlp_ratio, layer_scale=layer_scale))
        self.patches = nn.Sequential(*(AttentionMixer(between, dims=dims) for _ in range(self.patch_depth)))

    def maps(self, x: Tensor, given: Sequence[Tensor] | None) -> list[Tensor]:
        """The maps (B, C, *grid) of all scales, the finest first."""
        found = [to_map(x, self.dims.grid or ())]
        if given is None:
            for _ in self.grids[1:]:
                found.append(nn.functional.avg_pool2d(found[-1], 2, ceil_mode=True))
            return found
        want = [(len(x), torch.Size(grid).numel(), x.shape[2]) for grid in self.grids[1:]]
        if [tuple(y.shape) for y in given] != want:
            raise ValueError(f"coarser: got {[tuple(y.shape) for y in given]}; pass tokens of shapes {want}")
        return found + [to_map(y, grid) for y, grid in zip(given, self.grids[1:], strict=True)]

    def sets(self, maps: Sequence[Tensor]) -> Tensor:
        """What each cell holds, (B, cells, F, C)."""
        found = [to_tokens(self.summary(maps))[:, :, None]]
        for at in reversed(range(len(maps))):
            tokens, side = self.project[at](to_tokens(maps[at])), 2 ** (len(maps) - 1 - at)
            found.append(cut_windows(tokens, self.grids[at], side))
        return torch.cat(found, 2)

    def compute(self, x: Tensor, *, coarser: Sequence[Tensor] | None = None) -> Tensor:
        z = self.sets(self.maps(x, coarser)) + self.place
        first = self.blocks(z.flatten(0, 1)).view_as(z)[:, :, 0]
        return self.patches(torch.cat([self.token.expand(len(x), 1, -1), first], 1) + self.place_cells)

    def oracle(self, x: Tensor, *, coarser: Sequence[Tensor] | None = None) -> Tensor:
        w, d, last = Weights(self), self.dims, len(self.grids) - 1

        def halved(t: Tensor, how: str) -> Tensor:
            steps = [range(0, n, 2) for n in t.shape[1:3]]
            cells = [[getattr(t[:, i : i + 2, j : j + 2], how)((1, 2)) for j in steps[1]] for i in steps[0]]
            return torch.stack([torch.stack(row, 1) for row in cells], 1)

        def attention(t: Tensor, name: str) -> Tensor:
            shared = d.num_kv_heads * d.head_dim
            q, k, v = w.linear(t, f"{name}.qkv").split([d.dim, shared, shared], -1)
            return w.linear(weighed(q, k, v, d.head_dim, scale=2 / d.dim**0.5), f"{name}.out")

        images = [x.unflatten(1, self.grids[0])]
        for at in range(last):
            given = halved(images[-1], "mean") if coarser is None else coarser[at].unflatten(1, self.grids[at + 1])
            images.append(given)
        reduced = []
        for at, image in enumerate(images):
            for step in range(last - at - 1):
                image = w.conv(image, f"summary.reduce.{at}.{step}")[:, ::2, ::2]
            reduced.append(halved(image, "amax") if at < last else image)
        s = torch.cat(reduced, -1)
        for name, norm in ((f"summary.fuse.{3 * at}", f"summary.fuse.{3 * at + 1}") for at in range(4)):
            s = w.conv(s, name)
            s = (s - w[f"{norm}.running_mean"]) / (w[f"{norm}.running_var"] + 1e-5) ** 0.5
            s = (s * w[f"{norm}.weight"] + w[f"{norm}.bias"]).clamp(min=0)

        first = []
        for row, column in itertools.product(*map(range, self.grids[-1])):
            tokens, places, start = [s[:, row, column]], [0], 1
            for at in reversed(range(last + 1)):
                side, (height, width) = 2 ** (last - at), self.grids[at]
                for i, j in itertools.product(range(side), range(side)):
                    a, b = row * side + i, column * side + j
                    if a < height and b < width:
                        tokens.append(w.linear(images[at][:, a, b], f"project.{at}"))
                        places.append(start + i * side + j)
                start += side**2
            z = torch.stack(tokens, 1) + w["place"][places]
            for name in (f"blocks.{index}" for index in range(self.depth)):
                mixed = attention(w.norm(z, f"{name}.norm_mixer"), f"{name}.mixer")
                z = z + w.get(f"{name}.scale_mixer", 1) * mixed
                z = z + w.get(f"{name}.scale_mlp", 1) * w.mlp(w.norm(z, f"{name}.norm_mlp"), f"{name}.mlp")
            first.append(z[:, 0])
        u = torch.stack([w["token"].expand(len(x), -1), *first], 1) + w["place_cells"]
        for index in range(self.patch_depth):
            u = attention(u, f"patches.{index}")
        return u

    @classmethod
    def cases(cls) -> list[Case]:
        every = {"scales": 3, "depth": 1, "patch_depth": 2, "mlp_ratio": 2, "layer_scale": 0.5}
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, every),
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 6)), 24, {"scales": 2, "depth": 2, "layer_scale": None}, batch=1),
            Case(Dims(1, 3, grid=(2, 3)), 6, {"scales": 1, "depth": 1, "mlp_ratio": 1, "patch_depth": 1}),
        ]

    @claim("Scale attention weighs cells F^2 pairs a block, F = 6, 22, 86, patch attention (1 + cells)^2.")
    def cost(cls) -> Finding:
        exact, sizes = True, []
        for scales, side in ((2, 2), (3, 2), (4, 1), (4, 2)):
            grid = (side << scales - 1, side << scales - 1)
            module = cls(Dims(2, 4, grid=grid), scales=scales, depth=3, patch_depth=2).eval()
            x = torch.randn(1, grid[0] * grid[1], 8)
            pairs = work(functools.partial(module, x)).fused / (2 * 4 * 4)  # heads, channels; two products
            sizes.append(len(module.place))
            exact = exact and pairs == 3 * side**2 * sizes[-1] ** 2 + 2 * (1 + side**2) ** 2
        return Finding(exact and sizes == [6, 22, 86, 86], f"F = {sizes[0]}, {sizes[1]}, {sizes[2]}; exact: {exact}")

    @claim("Scale attention keeps cells apart.")
    def apart(cls) -> Finding:
        module = cls(Dims(2, 4, grid=(12, 16)), scales=3, depth=2).double().eval()
        seen = reached(module.blocks, torch.randn(12, 22, 8, dtype=torch.float64), 5).sum(-1)
        figure = f"a cell depends on {int(seen[5])} tokens of its own and {int(seen.sum() - seen[5])} of the 11 others"
        return Finding(int(seen[5]) == int(seen.sum()) == 22, figure)

    @claim("The class token depends on every token of every scale.")
    def whole(cls) -> Finding:
        module = cls(Dims(2, 4, grid=(12, 16)), scales=3, depth=1).double().eval()
        maps = [torch.randn(1, n, 8, dtype=torch.float64).requires_grad_() for n in (192, 48, 12)]
        with torch.enable_grad():
            found = torch.autograd.grad(module(maps[0], coarser=maps[1:])[0, 0].square().sum(), maps)
        seen = [int(gradient.ne(0).any(-1).sum()) for gradient in found]
        return Finding(seen == [192, 48, 12], f"{seen[0]} of 192, {seen[1]} of 48 and {seen[2]} of 12")
