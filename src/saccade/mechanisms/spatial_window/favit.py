"""FaViT: some channels attend to a reduced map, the others to one window in which all windows of the map are fused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import known, positive
from saccade.hosts.block import Block, init_linear, published_size
from saccade.hosts.pyramid import Mean, Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.mix import DepthwiseConv, cut_windows, to_map, to_tokens

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class ConvMLP(nn.Module):
    """W_2 gelu(DW3x3(W_1 x)), every layer with a bias; tokens (B, N, C) of a grid."""

    def __init__(self, dim: int, ratio: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        hidden = dim * positive("mlp_ratio", ratio)
        self.grid, self.enter, self.leave = grid, nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = DepthwiseConv(hidden, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.gelu(self.conv(self.enter(x), self.grid)))


class FusedWindow(nn.Module):
    """Keys and values (B, H, window^2, D) of one group, from its features (B, C, Y, X)."""

    def __init__(self, dim: int, heads: int, window: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.window, self.dilation = heads, window, dilation
        self.fuse, self.kv = nn.Linear(dim // heads, dim // heads), nn.Linear(dim // heads, 2 * dim // heads)
        self.local = DepthwiseConv(dim, (3, 3))

    def places(self, length: int, device: torch.device) -> Tensor:
        """Positions of an axis, window after window; those beyond the end are reflected."""
        span = self.dilation * (self.window - 1) + 1
        starts = torch.arange(0, length, span, device=device)
        at = starts[:, None] + torch.arange(self.window, device=device) * self.dilation
        at = at.flatten() % max(1, 2 * length - 2)
        return torch.where(at < length, at, 2 * length - 2 - at)

    def gather(self, x: Tensor) -> Tensor:
        """All windows of the map by head, (B, H, window^2, W, D)."""
        rows, columns = (self.places(n, x.device) for n in x.shape[2:])
        x = x[:, :, rows][..., columns]
        windows = cut_windows(to_tokens(x), tuple(x.shape[2:]), self.window)
        return windows.unflatten(3, (self.heads, -1)).permute(0, 3, 2, 1, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.gather(x)
        count, dim = windows.shape[3:]
        k, v = self.kv(self.fuse(windows.flatten(3).unflatten(3, (dim, count)).mean(4))).chunk(2, 3)
        around = self.local(v.transpose(1, 2).flatten(2), (self.window, self.window))
        return k, v + around.unflatten(2, (self.heads, dim)).transpose(1, 2)


class Fasa(nn.Module):
    """Factorization self-attention, tokens (B, N, C) of a grid to the same."""

    def __init__(self, dims: Dims, window: int, reduction: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.grid, self.heads, self.reduction = dims.grid or (), dims.num_heads, reduction
        self.sizes = first, *others = sizes
        self.q = nn.Linear(dims.dim, dims.dim)
        self.reduce, self.norm = Reduce(first, first, reduction), nn.LayerNorm(first)
        self.kv, self.local = nn.Linear(first, 2 * first), DepthwiseConv(first, (3, 3))
        self.depthwise, self.pointwise = DepthwiseConv(sum(others), (3, 3)), nn.Linear(sum(others), sum(others))
        self.windows = nn.ModuleList(
            FusedWindow(size, self.heads, window, reduction if index else 1) for index, size in enumerate(others)
        )
        self.out = nn.Linear(dims.dim, dims.dim)

    def groups(self, x: Tensor) -> list[Tensor]:
        """What each group of channels finds, before the projection."""
        first, *others = self.sizes
        q, q_local = self.q(x).split([first, sum(others)], 2)
        coarse = self.reduce(to_map(x[..., :first], self.grid))
        k, v = self.kv(self.norm(to_tokens(coarse))).chunk(2, 2)
        v = v + self.local(v, tuple(coarse.shape[2:]))
        found = [attend(q[:, None], k[:, None], v[:, None])[:, 0]]
        features = self.pointwise(self.depthwise(x[..., first:], self.grid)).split(others, 2)
        queries = q_local.unflatten(2, (self.heads, -1)).transpose(1, 2).split([n // self.heads for n in others], 3)
        for of_group, feature, window in zip(queries, features, self.windows, strict=True):
            found.append(attend(of_group, *window(to_map(feature, self.grid))).transpose(1, 2).flatten(2))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat(self.groups(x), 2))


class Favit(Mixer):
    """The FaViT block: x <- x + FaSA(LN x), x <- x + MLP(LN x), the MLP with a 3 x 3 depthwise convolution inside.

        FaSA(x) = W [o_0, o_1, o_2],   o_g = softmax(Q_g K_g^T / sqrt(D_g)) (V_g + DW(V_g))
        [K_0, V_0] = W_0 LN(Conv_{r x r, stride r}(x_0))                                              one head
        [K_g, V_g] = W_g' (W_g F(windows of (W_l DW([x_1, x_2]))_g)),   windows of w x w positions, 1 or r apart

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C), cut by channels into x_0, x_1, x_2; Q: a projection of
    x; Q_0, K_0, V_0 (N or N / r^2, C_0); Q_g (N, D_g), K_g, V_g (w^2, D_g): of each of H heads, W_g and W_g' those of
    all heads; DW: 3 x 3 depthwise, on the grid of its argument. F, cross-window fusion, averages: windows lie one after
    the other, and F gives each place of a window one vector for all m of them; channel c is the mean of entries m c to
    m c + m - 1 of the m vectors written one after the other, so it averages over neighbouring channels as well.
    A single window stays what it is. The map is filled by reflection to multiples of a window's extent.
    Paper: arXiv 2312.08614; everything here follows the authors' code (favit.py).
    Deviations: the authors' code refuses maps that r does not divide, and such as are too small for their reflection;
    here the convolution meets zeros below and to the right, and a reflection is reflected again.
    window: w (default 7). reduction: r (8; the paper's stages have 8, 4, 2, 1). mlp_ratio: hidden width of the MLP over
    C (8; 8, 6, 4, 4). shares: channels of the groups, in parts of C (2, 7, 7; for r = 1 it is 1, 7, without x_2).
    Costs 2 N (N / r^2 C_0 + w^2 (C - C_0)) multiplications in the products, beside the layers.
    Errors: ValueError when dims.grid has not two axes, shares do not cut C or a group is not cut by the heads, or
    heads share keys.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = Favit(Dims(2, 16, grid=(9, 12)), window=3, reduction=2)
    >>> layer(torch.randn(1, 108, 32)).shape, num_parameters(Favit.model)
    (torch.Size([1, 108, 32]), 3427704)
    """

    spec = Spec(
        id="favit",
        name="FaViT (Factorization Self-Attention)",
        title="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
        paper="2312.08614",
        year=2023,
        family="spatial_window",
        uses=("attend", "DepthwiseConv", "cut_windows"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 7,
        reduction: int = 8,
        mlp_ratio: int = 8,
        shares: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        self.window, self.reduction = positive("window", window), positive("reduction", reduction)
        usual = (2, 7, 7) if reduction > 1 else (1, 7)
        parts = tuple(positive("shares", share) for share in (usual if shares is None else shares))
        units = dims.dim // sum(parts)
        if not 2 <= len(parts) <= 3 or dims.dim % sum(parts) or any(p * units % dims.num_heads for p in parts[1:]):
            raise ValueError(
                f"shares: got {parts} for {dims.dim} channels in {dims.num_heads} heads; pass two or three that add up "
                "to a divisor of the channels, so that heads divide all but the first group"
            )
        self.sizes = tuple(part * units for part in parts)
        mlp = ConvMLP(dims.dim, mlp_ratio, dims.grid or ())
        self.block = Block(dims, Fasa(dims, window, reduction, self.sizes), mlp=mlp, norm=Norm)

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, (height, width) = Weights(self, "block."), self.dims.grid or ()
        heads, r, side, sizes = self.dims.num_heads, self.reduction, self.window, self.sizes

        def mirror(at: int, length: int) -> int:
            while at >= length or at < 0:
                at = 0 if length == 1 else abs(at) if at < 0 else 2 * (length - 1) - at
            return at

        y = w.norm(x, "norm_mixer", 1e-6)
        queries, image = w.linear(y, "mixer.q"), y.unflatten(1, (height, width))
        rows, columns = -(-height // r), -(-width // r)
        full = nn.functional.pad(image[..., : sizes[0]], (0, 0, 0, columns * r - width, 0, rows * r - height))
        patches = full.unflatten(1, (rows, r)).unflatten(3, (columns, r)).permute(0, 1, 3, 5, 2, 4).flatten(3)
        coarse = w.norm(w.linear(patches, "mixer.reduce.conv"), "mixer.norm")
        k, v = w.linear(coarse, "mixer.kv").split(sizes[0], -1)
        v = v + w.conv(v, "mixer.local")
        found = [weighed(queries[..., : sizes[0]], k.flatten(1, 2), v.flatten(1, 2), sizes[0])]

        features = w.linear(w.conv(image[..., sizes[0] :], "mixer.depthwise"), "mixer.pointwise")
        each, start = sum(sizes[1:]) // heads, 0
        for group, size in enumerate(sizes[1:]):
            step, dim, name = r if group else 1, size // heads, f"mixer.windows.{group}"
            span, offset = step * (side - 1) + 1, start // heads
            corners = list(itertools.product(range(0, height, span), range(0, width, span)))
            k, v = (x.new_zeros(len(x), side, side, heads, dim) for _ in range(2))
            for i, j, h in itertools.product(range(side), range(side), range(heads)):
                seen = [(mirror(a + i * step, height), mirror(b + j * step, width)) for a, b in corners]
                mine = slice(start + h * dim, start + (h + 1) * dim)
                written = torch.cat([features[:, a, b, mine] for a, b in seen], -1)
                fused = torch.stack([part.mean(-1) for part in written.split(len(corners), -1)], -1)
                k[:, i, j, h], v[:, i, j, h] = w.linear(w.linear(fused, f"{name}.fuse"), f"{name}.kv").split(dim, -1)
            v = v + w.conv(v.flatten(3), f"{name}.local").unflatten(3, (heads, dim))
            for h in range(heads):
                at = sizes[0] + h * each + offset
                keys, values = k[..., h, :].flatten(1, 2), v[..., h, :].flatten(1, 2)
                found.append(weighed(queries[..., at : at + dim], keys, values, dim))
            start += size
        x = x + w.linear(torch.cat(found, -1), "mixer.out")
        hidden = w.linear(w.norm(x, "norm_mlp", 1e-6), "mlp.enter").unflatten(1, (height, width))
        hidden = w.conv(hidden, "mlp.conv").flatten(1, 2)
        return x + w.linear(hidden / 2 * (1 + torch.erf(hidden / 2**0.5)), "mlp.leave")

    @classmethod
    def model(cls, name: str = "b0", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "b0" (3.4 million parameters), "b1" (13.0), "b2" (24.9) or "b3" (48.7).

        params: of every block, in place of the paper's. host: of the `Pyramid`, in place of the paper's.
        """
        known("name", name, ("b0", "b1", "b2", "b3"))
        dim, depths = {"b0": 32, "b3": 96}.get(name, 64), {"b2": (2, 3, 18, 3), "b3": (2, 3, 14, 3)}
        stages = [
            Stage(dim << s, depth, 1 << s, stride=2 if s else 4)
            for s, depth in enumerate(depths.get(name, (2, 2, 6, 2)))
        ]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            before = Norm(dim_in) if stage else None  # what the authors' stages end with
            return Reduce(dim_in, dim_out, stride, kernel=3 if stage else 7, before=before, after=nn.LayerNorm(dim_out))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            paper = {"reduction": 8 >> stage, "mlp_ratio": (8, 6, 4, 4)[stage]}
            return cls(dims, **{**paper, **(params or {})})

        def head(dims: Dims, num_classes: int) -> nn.Module:
            return nn.Sequential(Norm(dims.dim), Mean(), nn.Linear(dims.dim, num_classes))

        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": enter, "head": head}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        for each in model.modules():
            if isinstance(each, nn.Conv2d | DepthwiseConv):
                shared = each.groups if isinstance(each, nn.Conv2d) else len(each.weight)
                fan_out = each.weight[0, 0].numel() * len(each.weight) // shared
                nn.init.normal_(each.weight, std=(2 / fan_out) ** 0.5)
                if each.bias is not None:
                    nn.init.zeros_(each.bias)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(5, 9)), 45, {"window": 2, "reduction": 2, "mlp_ratio": 1, "shares": (2, 1, 1)}),
            Case(Dims(2, 16, grid=(4, 3)), 12, {"window": 3, "reduction": 3, "mlp_ratio": 2}, batch=1),
            Case(Dims(1, 12, grid=(2, 7)), 14, {"window": 3, "reduction": 1, "mlp_ratio": 1, "shares": (1, 2)}),
        ]

    @claim("B0, B1 and B3 have 3.4, 13 and 48 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"b0": 3.4, "b1": 13, "b3": 48})

    @claim("Local groups read w^2 keys a query on any map; the global one N / r^2, which grows.")
    def keys(cls) -> Finding:
        exact = []
        for grid in ((14, 14), (21, 33)):
            n, coarse = grid[0] * grid[1], -(-grid[0] // 2) * -(-grid[1] // 2)
            module = cls(Dims(2, 16, grid=grid), reduction=2)
            products = work(functools.partial(module, torch.randn(1, n, 32))).fused / (4 * n)
            exact.append(products == coarse * 4 + 49 * 28)
        return Finding(
            all(exact), f"N / 4 keys of 4 channels and 49 of 28 on 14 x 14 and 21 x 33, exactly: {all(exact)}"
        )

    @claim("The global group and the local one without dilation see the whole map in one layer.")
    def whole_map(cls) -> Finding:
        fasa = cls(Dims(2, 16, grid=(15, 17)), window=3, reduction=4).double().block.mixer
        x = torch.randn(1, 255, 32, dtype=torch.float64)

        def first(x: Tensor, group: int) -> Tensor:
            return fasa.groups(x)[group][0, 0]

        seen = [int(reached(functools.partial(first, group=group), x).sum()) for group in range(3)]
        figure = f"of 255 positions the groups see {seen[0]}, {seen[1]} and, with dilation 4, {seen[2]}"
        return Finding(seen[:2] == [255, 255] and seen[2] < 255, figure)

    @claim("A map of one window stays as it is under fusion.")
    def one_window(cls) -> Finding:
        fasa = cls(Dims(2, 16, grid=(7, 7)), reduction=2).double().block.mixer
        window, x = fasa.windows[0], torch.randn(1, 49, 14, dtype=torch.float64)
        with torch.no_grad():
            k, _ = window(to_map(x, (7, 7)))
            alone = window.kv(window.fuse(x.unflatten(2, (2, 7)).transpose(1, 2)))[..., :7]
        differ = int(k.ne(alone).sum())
        return Finding(differ == 0, f"{differ} of {k.numel()} entries of the keys differ from those without fusion")
