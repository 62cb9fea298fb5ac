"""MANO: the same window attention on a map and on coarser and coarser ones, whose results add up as multipoles do."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import positive
from saccade.hosts.block import MLP, AttentionMixer, Residual
from saccade.hosts.resize import Reduce, coarser
from saccade.mix import RegionBias, to_map, to_tokens


def attend_windows(q: Tensor, k: Tensor, v: Tensor, *, apart: RegionBias | None) -> Tensor:
    """Attention in every window, q, k, v (B W, H, w, D); `apart` hides the filling, where there is any."""
    if apart is None:
        return attend(q, k, v)
    return apart.unfold(attend(apart.fold(q), apart.fold(k), apart.fold(v), bias=apart))


class Cover(nn.Module):
    """Windows of size x size that start every `stride` positions and cover a grid, filled below and to the right."""

    counts: Tensor

    def __init__(self, dims: Dims, grid: tuple[int, ...], size: int, stride: int) -> None:
        super().__init__()
        self.grid, self.size, self.stride = grid, size, stride
        self.whole = tuple(-(-max(0, n - size) // stride) * stride + size for n in grid)
        cells = self.cut(torch.ones(1, torch.Size(grid).numel(), 1))
        regions = cells[0, :, :, 0].long() - 1
        self.apart = None if self.whole == grid else RegionBias(None, regions, heads=dims.num_heads)
        self.register_buffer("counts", self._joined(torch.ones_like(cells)), persistent=False)

    def cut(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, W, size^2, C)."""
        ends = [end for n, whole in zip(self.grid[::-1], self.whole[::-1], strict=True) for end in (0, whole - n)]
        taken = nn.functional.unfold(nn.functional.pad(to_map(x, self.grid), ends), self.size, stride=self.stride)
        return taken.unflatten(1, (x.shape[2], -1)).permute(0, 3, 2, 1)

    def _joined(self, y: Tensor) -> Tensor:
        taken = y.permute(0, 3, 2, 1).flatten(1, 2)
        summed = nn.functional.fold(taken, self.whole, self.size, stride=self.stride)
        return to_tokens(summed[:, :, : self.grid[0], : self.grid[1]])

    def join(self, y: Tensor) -> Tensor:
        """The mean over the windows that hold a position: (B, W, size^2, C) -> (B, N, C)."""
        return self._joined(y) / self.counts


class Multipole(nn.Module):
    """Window attention on all levels, merged from the coarsest to the finest; tokens (B, N, C) of a grid."""

    def __init__(self, dims: Dims, levels: int, window: int, stride: int, factor: int) -> None:
        super().__init__()
        self.grids = [dims.grid or ()]
        for _ in range(levels - 1):
            self.grids.append(coarser(self.grids[-1], factor))
        covers = [Cover(dims, grid, window, stride) for grid in self.grids]
        self.covers: Iterable[Cover] = nn.ModuleList(covers)  # type: ignore[assignment]
        self.norm = nn.Sequential(nn.LayerNorm(dims.dim), nn.LayerNorm(dims.dim))
        self.mixer = AttentionMixer(attend_windows, dims=dims, bias=False)
        self.mixer.out = nn.Linear(dims.dim, dims.dim)
        if levels > 1:
            self.down = Reduce(dims.dim, dims.dim, factor, bias=False)
            self.up = nn.ConvTranspose2d(dims.dim, dims.dim, factor, factor, bias=False)

    def within(self, x: Tensor, cover: Cover) -> Tensor:
        """What one level finds."""
        windows = cover.cut(x)
        mixed = self.mixer(self.norm(windows.flatten(0, 1)), apart=cover.apart)
        return cover.join(mixed.view_as(windows))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for grid in self.grids[:-1]:
            maps.append(to_tokens(self.down(to_map(maps[-1], grid))))
        *finer, z = [self.within(y, cover) for y, cover in zip(maps, self.covers, strict=True)]
        for step, y in enumerate(reversed(finer)):
            height, width = self.grids[-2 - step]
            raised = self.up(to_map(z, self.grids[-1 - step]))[:, :, :height, :width]
            z = y + to_tokens(raised) / (step + 1)
        return z


class Mano(Mixer):
    """The MANO block: x <- x + z_0, x <- x + MLP(LN x).

        x_0 = x,   x_{l + 1} = Conv_{r x r, stride r}(x_l),   y_l = A(x_l)            on levels l = 0 .. L - 1
        z_{L - 1} = y_{L - 1},   z_l = y_l + U(z_{l + 1}) / (L - 1 - l)               with U: convolution transposed
        A(x) = W mean over the windows of   softmax(Q K^T / sqrt(D)) V   in each window and head, of LN LN x

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); windows of w x w positions that start every s; Q, K, V
    (w^2, D): projections without bias, for each of H heads. A, the convolution and U have one set of weights for all
    levels, convolutions without bias; where windows overlap, A averages what they say of a position.
    Paper: arXiv 2507.02748; the two norms in a row, the order and factors of the sum and the number of levels follow
    the authors' code (Multipole_Attention2D).
    Deviations: sampling by means, an option of the code, is left out. The code refuses maps whose sides are no powers
    of r times a window; here a coarser map has ceil(n / r) positions, the convolution meets zeros, U is cut, and a map
    that windows do not cover is filled below and to the right with positions that nobody sees. With one head there is a
    projection W, too. Heads may share keys.
    window: w (default 2). stride: s (None: w, windows side by side). factor: r (2). levels: L (None: floor(log_r n) for
    n the shorter side, at least 1). mlp_ratio: hidden width of the MLP over C (4).
    Costs sum_l 2 N / r^(2 l) w^2 C multiplications in the products for s = w, less than 4/3 of those of one level for
    r = 2, beside the layers. Errors: ValueError when dims.grid has not two axes, stride exceeds window or factor is 1.

    >>> layer = Mano(Dims(2, 4, grid=(9, 12)), window=3)
    >>> layer(torch.randn(1, 108, 8)).shape, layer.multipole.grids
    (torch.Size([1, 108, 8]), [(9, 12), (5, 6), (3, 3)])
    """

    spec = Spec(
        id="mano",
        name="MANO (Multipole Attention)",
        title="Linear Attention with Global Context: A Multipole Attention Mechanism for Vision and Physics",
        paper="2507.02748",
        year=2025,
        family="spatial_window",
        uses=("attend", "RegionBias"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 2,
        stride: int | None = None,
        factor: int = 2,
        levels: int | None = None,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__(dims)
        self.window, self.factor = positive("window", window), positive("factor", factor, least=2)
        self.stride = window if stride is None else positive("stride", stride)
        if self.stride > window:
            raise ValueError(f"stride: got {stride} with window {window}, which skips positions; pass at most {window}")
        if levels is None:
            levels, side = 1, min(dims.grid or ()) // factor
            while side >= factor:
                levels, side = levels + 1, side // factor
        self.levels = positive("levels", levels)
        self.multipole = Multipole(dims, levels, window, self.stride, factor)
        self.mlp = Residual(MLP(dims.dim, mlp_ratio), nn.LayerNorm(dims.dim))

    def compute(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.multipole(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, grid, r = Weights(self), self.dims, self.dims.grid or (), self.factor

        def starts(length: int) -> list[int]:
            found = [0]
            while found[-1] + self.window < length:
                found.append(found[-1] + self.stride)
            return found

        def within(image: Tensor) -> Tensor:
            height, width = image.shape[1:3]
            total, met = torch.zeros_like(image), image.new_zeros(height, width, 1)
            tokens = w.norm(w.norm(image, "multipole.norm.0"), "multipole.norm.1")
            every, shared = w.linear(tokens, "multipole.mixer.qkv"), d.num_kv_heads * d.head_dim
            for top, left in itertools.product(starts(height), starts(width)):
                at = slice(None), slice(top, top + self.window), slice(left, left + self.window)
                q, k, v = every[at].flatten(1, 2).split([d.dim, shared, shared], -1)
                out = w.linear(weighed(q, k, v, d.head_dim), "multipole.mixer.out")
                total[at] += out.view_as(total[at])
                met[at[1:]] += 1
            return total / met

        maps = [x.unflatten(1, grid)]
        for _ in range(self.levels - 1):
            high, wide = (-(-n // r) for n in maps[-1].shape[1:3])
            below, right = high * r - maps[-1].shape[1], wide * r - maps[-1].shape[2]
            whole = nn.functional.pad(maps[-1], (0, 0, 0, right, 0, below))
            cells = whole.unflatten(1, (high, r)).unflatten(3, (wide, r))
            maps.append(torch.einsum("byixjc,dcij->byxd", cells, w["multipole.down.conv.weight"]))
        z = within(maps[-1])
        for at in reversed(range(self.levels - 1)):
            raised = torch.einsum("byxd,dcij->byixjc", z, w["multipole.up.weight"]).flatten(3, 4).flatten(1, 2)
            height, width = maps[at].shape[1:3]
            z = within(maps[at]) + raised[:, :height, :width] / (self.levels - 1 - at)
        x = x + z.flatten(1, 2)
        return x + w.mlp(w.norm(x, "mlp.norm"), "mlp.inner")

    @classmethod
    def cases(cls) -> list[Case]:
        overlapping = {"window": 3, "stride": 2, "factor": 2, "levels": 3, "mlp_ratio": 2}
        return [
            Case(Dims(2, 3, grid=(7, 9)), 63, overlapping),
            Case(Dims(4, 2, num_kv_heads=2, grid=(8, 5)), 40, {"mlp_ratio": 1}, batch=1),
            Case(Dims(1, 5, grid=(4, 7)), 28, {"window": 2, "factor": 3, "mlp_ratio": 1}),
        ]

    @claim("All levels together attend to less than 4/3 of the pairs of one, for halved maps.")
    def cost(cls) -> Finding:
        found = []
        for levels in (1, 2, 5):
            module = cls(Dims(2, 4, grid=(32, 64)), window=2, levels=levels)
            products = work(functools.partial(module, torch.randn(1, 2048, 8))).fused
            found.append(products / (2 * 4 * 4 * 2048 * 4))  # heads; channels; two products of two operations; N w^2
        holds = found == [sum(4.0**-at for at in range(levels)) for levels in (1, 2, 5)] and found[-1] < 4 / 3
        figure = f"{found[0]:g}, {found[1]:g} and {found[2]:.3f} N w^2 pairs a head with 1, 2 and 5 levels"
        return Finding(holds, figure)

    @claim("One layer sees the whole map exactly when the coarsest map fits one window.")
    def global_reach(cls) -> Finding:
        found, holds = [], True
        for side, window in ((8, 2), (12, 2), (12, 3), (16, 4)):
            module = cls(Dims(2, 4, grid=(side, side)), window=window).double().multipole
            x = torch.randn(1, side**2, 8, dtype=torch.float64)
            seen = int(reached(module, x, (0, 0, 0)).sum())
            coarsest = module.grids[-1][0]
            holds = holds and (seen == side**2) == (coarsest <= window)
            found.append(f"{seen} of {side**2} with windows of {window} and a coarsest map of {coarsest}")
        return Finding(holds, "; ".join(found))

    @claim("Levels share their weights: more of them bring no parameters.")
    def shared(cls) -> Finding:
        sizes = [
            sum(p.numel() for p in cls(Dims(2, 4, grid=(64, 64)), levels=levels).parameters()) for levels in (2, 3, 6)
        ]
        return Finding(len(set(sizes)) == 1, f"{sizes[0]}, {sizes[1]} and {sizes[2]} parameters with 2, 3 and 6 levels")

    @claim("Of five levels the finest weighs 1, the coarser ones 1/4, 1/12, 1/24 and 1/24.")
    def factors(cls) -> Finding:
        module = cls(Dims(1, 2, grid=(32, 32)), levels=5).double().multipole
        weights = []
        with torch.no_grad():
            module.up.weight.zero_()
            module.up.weight[range(2), range(2)] = 1  # nearest neighbours
            for chosen in module.covers:
                module.within = lambda x, cover, chosen=chosen: torch.full_like(x, float(cover is chosen))
                weights.append(float(module(torch.zeros(1, 1024, 2, dtype=torch.float64))[0, 0, 0]))
        figure = ", ".join(f"{weight:.4f}" for weight in weights)
        return Finding(weights == [1, 1 / 4, 1 / 4 / 3, 1 / 4 / 3 / 2, 1 / 4 / 3 / 2 / 1], figure)
