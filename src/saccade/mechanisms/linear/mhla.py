"""MHLA: linear attention whose memory is kept tile by tile, each tile of queries reading a mixture of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, work
from saccade.errors import known, per_axis, positive
from saccade.hosts.block import Block, init_linear
from saccade.hosts.pyramid import pool_then_norm
from saccade.hosts.vit import ViT
from saccade.mix import DepthwiseConv, cut_windows, join_windows


def first_mixture(tiles: Sequence[int], start: str, sigma: float, near: float) -> Tensor:
    """C (M, M) by the distance of tiles on their grid, columns of sum 1."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in tiles)).view(-1, len(tiles))
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    share = apart / apart.max().clamp(min=1)
    weights = {
        "linear": 1 - share,
        "cos": (share * math.pi / 4).cos(),
        "exp": (-apart / sigma).exp(),
        "local": (apart <= near).double(),
    }[start]
    return (weights / weights.sum(0)).float()


class Mhla(Mixer):
    """Token-level multi-head linear attention: memories of tiles, mixed by a learned matrix before they are read.

        S_b = sum_{j in b} phi(k_j) v_j^T,   z_b = sum_{j in b} phi(k_j),   phi(x) = relu(x) + e
        o_i = phi(q_i)^T sum_b C_ab S_b / (phi(q_i) . sum_b C_ab z_b + e)   for i in tile a
        y = W_o (o + DW(v)) + w_o

    x (B, N, C): tokens of a row-major grid of two or three axes -> y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D): a
    projection, q and k normalised over all heads (RMS); C (M, M): learned, the same in every head, at first falling
    with the distance of the tiles and not bounded later; DW: a depthwise convolution on the grid. The attention matrix
    of a head has rank up to sum_b min(N_b, D) where that of linear attention has D.
    Paper: arXiv 2601.07832; layers, phi, C at its start and DW follow the authors' code (mhla_image_classification).
    Deviations: the divisor is the sum of the weights of the row, as in the paper, while the code mixes phi(q_b) . z_b
    over the same place of every tile b, which is no sum of a row; a norm before the projection, which the code has
    beside that of the block, is the host's. Tiles at the border may be smaller; the code refuses such grids. The causal
    form for language is left out. Heads may share keys.
    tile: tokens a side of a tile, one number or one an axis (4). start: "linear" (default; 1 - d / max d), "cos"
    (cos(pi d / (4 max d))), "exp" (exp(-d / sigma)) or "local" (1 for d <= near), columns divided by their sums. sigma:
    3.0. near: 1.5. qk_norm: True. kernel: side of DW (5; 0: none). eps: e (1e-6).
    Costs N D^2 multiplications for memories and as many for reads, M^2 D^2 for the mixing, a head.
    Errors: ValueError when dims.grid has not two or three axes, kernel is even and not 0, or sigma, near or eps are not
    positive.

    >>> layer = Mhla(Dims(2, 4, grid=(5, 7)), tile=3)
    >>> layer(torch.randn(1, 35, 8)).shape, layer.mixing.shape
    (torch.Size([1, 35, 8]), torch.Size([6, 6]))
    """

    spec = Spec(
        id="mhla",
        name="MHLA (token-level multi-head linear attention)",
        title="MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head",
        paper="2601.07832",
        year=2026,
        family="linear",
        uses=("cut_windows", "join_windows", "DepthwiseConv"),
        grid=(2, 3),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        tile: int | Sequence[int] = 4,
        start: str = "linear",
        sigma: float = 3.0,
        near: float = 1.5,
        qk_norm: bool = True,
        kernel: int = 5,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dims)
        known("start", start, ("linear", "cos", "exp", "local"))
        self.grid, rank = dims.grid or (), len(dims.grid or ())
        self.tile, self.eps = per_axis("tile", tile, rank), eps
        for name, value in (("sigma", sigma), ("near", near), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}; pass a number > 0")
        if positive("kernel", kernel, least=0) % 2 == 0 and kernel:
            raise ValueError(f"kernel: got {kernel}, which has no centre; pass an odd size, or 0 for none")
        tiles = [-(-n // side) for n, side in zip(self.grid, self.tile, strict=True)]
        self.mixing = nn.Parameter(first_mixture(tiles, start, sigma, near))
        self.widths = [heads * dims.head_dim for heads in (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)]
        self.qkv = nn.Linear(dims.dim, sum(self.widths), bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-6) if qk_norm else nn.Identity() for width in self.widths[:2])
        self.local = DepthwiseConv(dims.dim, (kernel,) * rank) if kernel else None
        self.out = nn.Linear(dims.dim, dims.dim)

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, N, H D) of q (B, N, H D), k, v (B, N, Hkv D)."""
        q, k = q.relu() + self.eps, k.relu() + self.eps
        # Features before the cut: a filling then has none.
        q, k, v = (
            cut_windows(x, self.grid, self.tile).unflatten(3, (heads, -1)).transpose(2, 3)
            for x, heads in zip((q, k, v), [self.dims.num_heads] + 2 * [self.dims.num_kv_heads], strict=True)
        )  # (B, M, heads, w, D)
        memory = k.mT @ torch.cat([v, torch.ones_like(v[..., :1])], -1)  # (B, M, Hkv, D, D + 1)
        mixed = (self.mixing.to(memory.dtype) @ memory.flatten(2)).view_as(memory)
        read = q @ mixed.repeat_interleave(self.dims.group, 2)
        o = read[..., :-1] / (read[..., -1:] + self.eps)
        return join_windows(o.transpose(2, 3).flatten(3), self.grid, self.tile)

    def compute(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.widths, -1)
        o = self.read(self.norms[0](q), self.norms[1](k), v)
        if self.local is not None:
            values = v.unflatten(2, (self.dims.num_kv_heads, -1)).repeat_interleave(self.dims.group, 2)
            o = o + self.local(values.flatten(2), self.grid)
        return self.out(o)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, grid = dict(self.named_parameters()), self.dims, self.grid
        places = list(itertools.product(*map(range, grid)))
        tiles = [-(-n // side) for n, side in zip(grid, self.tile, strict=True)]
        of: list[int] = []
        for place in places:
            index = 0
            for at, side, count in zip(place, self.tile, tiles, strict=True):
                index = index * count + at // side
            of.append(index)
        weights = w["mixing"][of][:, of]  # (N, N): what the tile of i takes of that of j
        q, k, v = (x @ w["qkv.weight"].T).split(self.widths, -1)
        if "norms.0.weight" in w:
            q, k = (
                t / ((t * t).mean(-1, keepdim=True) + 1e-6) ** 0.5 * w[f"norms.{i}.weight"]
                for i, t in enumerate((q, k))
            )
        found, values = [], []
        for h in range(d.num_heads):
            mine, shared = (slice(at * d.head_dim, (at + 1) * d.head_dim) for at in (h, h // d.group))
            query, key = (t.clamp(min=0) + self.eps for t in (q[..., mine], k[..., shared]))
            scores = weights * (query @ key.mT)
            found.append(scores @ v[..., shared] / (scores.sum(-1, keepdim=True) + self.eps))
            values.append(v[..., shared])
        o = torch.cat(found, -1)
        if "local.weight" in w:
            taps, rows, reach = (
                w["local.weight"][:, 0].flatten(1),
                torch.cat(values, -1),
                w["local.weight"].shape[2] // 2,
            )
            steps, local = list(itertools.product(range(-reach, reach + 1), repeat=len(grid))), []
            for place in places:
                total = w["local.bias"].expand(len(x), -1)
                for tap, step in enumerate(steps):
                    there = tuple(a + b for a, b in zip(place, step, strict=True))
                    if there in places:
                        total = total + taps[:, tap] * rows[:, places.index(there)]
                local.append(total)
            o = o + torch.stack(local, 1)
        return o @ w["out.weight"].T + w["out.bias"]

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> ViT:
        """The authors' DeiT with MHLA: "tiny" (5.8 million parameters), "small" (22.2) or "base" (86.8).

        Of these there is no published count. Images have 256 pixels a side, to which the code fills those of 224.
        params: of every block, in place of the paper's. host: of the `ViT`.
        """
        known("name", name, ("tiny", "small", "base"))
        heads = {"tiny": 3, "small": 6, "base": 12}[name]

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            return Block(dims, cls(dims, **(params or {})))

        paper = {"size": (256, 256), "patch": 16, "dim": 64 * heads, "depth": 12, "heads": heads, "block": block}
        model = ViT(**{**paper, "head": pool_then_norm, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        every = {"tile": (2, 3), "start": "exp", "sigma": 2.0, "qk_norm": False, "kernel": 3, "eps": 0.01}
        return [
            Case(Dims(2, 4, grid=(5, 7)), 35, every),
            Case(Dims(4, 3, num_kv_heads=2, grid=(3, 2, 3)), 18, {"tile": 2, "start": "cos", "kernel": 0}, batch=1),
            Case(Dims(1, 5, grid=(5, 3)), 15, {"tile": 2, "start": "local", "near": 1.0}),
            Case(Dims(1, 6, grid=(5, 5)), 25),
        ]

    @claim("Where all entries of C are the same it is linear attention over all tokens.")
    def global_attention(cls) -> Finding:
        layer, (q, k, v) = cls._layer(), cls._inputs()
        layer.mixing.fill_(1.0)
        query, key = (x.relu() + layer.eps for x in (q, k))
        products = query @ key.mT
        dense = products @ v / (products.sum(-1, keepdim=True) + layer.eps)
        apart = float((layer.read(q, k, v) - dense).abs().max() / v.abs().max())
        return Finding(apart < 64 * torch.finfo(q.dtype).eps, f"largest difference {apart:.1e} of v")

    @claim("Weights of all tiles reach rank sum_b min(N_b, D), where linear attention has rank D.")
    def rank(cls) -> Finding:
        q, k, _ = cls._inputs()
        ranks = []
        for mixing in (None, 1.0):
            layer = cls._layer()
            if mixing is not None:
                layer.mixing.fill_(mixing)
            # Values of 8 channels show the weights of 8 keys at a time.
            columns = [layer.read(q, k, part[None]) for part in torch.eye(64, dtype=q.dtype).split(8, 1)]
            ranks.append(int(torch.linalg.matrix_rank(torch.cat(columns, -1))))
        figure = f"rank {ranks[0]} of 64 x 64 weights with 4 tiles of 16 and D = 8; {ranks[1]} with equal entries"
        return Finding(ranks == [32, 8], figure)

    @claim("Rows sum to 1 under the paper's divisor; under the released one, mixed by place, they do not.")
    def rows_sum_to_one(cls) -> Finding:
        layer, (q, k, v) = cls._layer(), cls._inputs()
        ours = layer.read(q, k, torch.ones_like(v))
        query, key = (cut_windows(x.relu() + layer.eps, layer.grid, layer.tile)[0] for x in (q, k))
        z = key.sum(1)
        mass = (query @ (layer.mixing @ z)[:, :, None])[..., 0]  # (M, w)
        released = mass / (layer.mixing @ (query @ z[:, :, None])[..., 0])
        apart, wrong = float((ours - 1).abs().max()), float((released - 1).abs().max())
        allowed = layer.eps / float(mass.min()) + 64 * torch.finfo(q.dtype).eps
        holds = apart < allowed < wrong
        return Finding(
            holds, f"sums within {apart:.1e} of 1 ({allowed:.1e} from eps); released: off by up to {wrong:.2f}"
        )

    @claim("At tiles of one size the work is linear in the tokens beside the mixing, M^2 D^2.")
    def linear_work(cls) -> Finding:
        costs = []
        for side in (16, 32):
            layer = cls(Dims(1, 8, grid=(side, side)), tile=8)
            tiles = (side // 8) ** 2
            costs.append(work(partial(layer.read, *torch.ones(3, 1, side**2, 8))).all - 2 * tiles**2 * 8 * 9)
        share = (costs[1] + 2 * 16**2 * 72) / (4 * 1024**2 * 8)
        figure = (
            f"{costs[1] / costs[0]:.2f} times the work at 4 times N, beside the mixing; {share:.3f} of dense at 1024"
        )
        return Finding(costs[1] == 4 * costs[0] and share < 1, figure)

    @classmethod
    def _layer(cls) -> Mhla:
        return cls(Dims(1, 8, grid=(8, 8)), start="exp").double().requires_grad_(False)

    @staticmethod
    def _inputs() -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 64, 8, generator=random, dtype=torch.float64).unbind()
