"""MAFormer: tokens attend in windows, then to a summary of the map that a layer over all positions has learned."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, weighed, work
from saccade.errors import positive
from saccade.hosts.block import MLP, Residual
from saccade.hosts.windows import WindowAttention


class Summary(nn.Module):
    """Global learning with down-sampling: W x + w + Pos, tokens (B, N, C) -> (B, M, C), W (M, N) for every channel."""

    def __init__(self, dim: int, num_tokens: int, num_kept: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(num_tokens, num_kept)
        self.position = nn.Parameter(torch.empty(num_kept, dim))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(x.mT).mT + self.position


class Maformer(Mixer):
    """The multi-scale attention fusion block: a fine and a coarse stream, and attention from the one to the other.

        L = x + A(LN x),     G = W LN x + w + Pos
        y = L + softmax((L W_q) (G W_k)^T / sqrt(D)) (G W_v),     z = y + MLP(LN y)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C). A: multi-head attention in windows of w x w positions.
    W (M, N), w (M): a layer over positions, the same for all channels, M = int(P N); Pos (M, C), learned. Each of H
    heads weighs D channels of the fusion; W_q, W_k, W_v have biases, and no projection follows them.
    Paper: arXiv 2209.01620. Its abstract names the streams, the learned down-sampling and the fusion by attention; the
    equations are those by which a later paper (U-MAFT, GeoInformatica, equations 8 to 14) reproduces the block.
    Deviations: our reading, for no code is public: LN x as the input of both streams, the residual around the fusion
    and no norm before it, no bias of position in windows, M rounded down. Pos has one size, where it is interpolated.
    Windows that do not divide the map are filled below and to the right with positions that nobody sees. The classifier
    around the blocks is not here. Heads may share keys.
    window: w (default 7). ratio: P, kept tokens per token (0.5). mlp_ratio: hidden width of the MLP over C (4).
    Costs N M C multiplications in the summary, 2 N M C in the fusion and 2 N w^2 C in windows, beside the layers: with
    M = P N, quadratic in N. W ties the block to its grid.
    Errors: ValueError when dims.grid has not two axes, or ratio keeps no token or more than all.

    >>> block = Maformer(Dims(2, 4, grid=(5, 9)), window=3)
    >>> block(torch.randn(1, 45, 8)).shape, block.summary(torch.randn(1, 45, 8)).shape
    (torch.Size([1, 45, 8]), torch.Size([1, 22, 8]))
    """

    spec = Spec(
        id="maformer",
        name="MAFormer",
        title="MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition",
        paper="2209.01620",
        year=2022,
        family="spatial_window",
        uses=("attend", "RegionBias", "Windowed"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, window: int = 7, ratio: float = 0.5, mlp_ratio: int = 4) -> None:
        super().__init__(dims)
        grid, self.window = dims.grid or (), positive("window", window)
        num_tokens = torch.Size(grid).numel()
        if not 1 <= ratio * num_tokens <= num_tokens:
            raise ValueError(f"ratio: got {ratio} for {num_tokens} tokens; pass a share that keeps 1 to all of them")
        self.norm = nn.LayerNorm(dims.dim)
        self.windows = WindowAttention(dims, window, table=None)
        self.summary = Summary(dims.dim, num_tokens, int(ratio * num_tokens))
        self.query = nn.Linear(dims.dim, dims.dim)
        self.key, self.value = (nn.Linear(dims.dim, dims.num_kv_heads * dims.head_dim) for _ in range(2))
        self.mlp = Residual(MLP(dims.dim, mlp_ratio), nn.LayerNorm(dims.dim))

    def compute(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        fine, coarse = x + self.windows(u), self.summary(u)
        parts = self.query(fine), self.key(coarse), self.value(coarse)
        q, k, v = (part.unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2) for part in parts)
        return self.mlp(fine + attend(q, k, v).transpose(1, 2).flatten(2))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, size, (height, width) = Weights(self), self.dims, self.window, self.dims.grid or ()

        u, shared = w.norm(x, "norm"), d.num_kv_heads * d.head_dim
        fine = x.clone()
        for top, left in itertools.product(range(0, height, size), range(0, width, size)):
            rows, columns = range(top, min(top + size, height)), range(left, min(left + size, width))
            at = [y * width + c for y, c in itertools.product(rows, columns)]
            q, k, v = w.linear(u[:, at], "windows.inner.qkv").split([d.dim, shared, shared], -1)
            fine[:, at] = fine[:, at] + w.linear(weighed(q, k, v, d.head_dim), "windows.inner.out")
        coarse = torch.einsum("mn,bnc->bmc", w["summary.reduce.weight"], u)
        coarse = coarse + w["summary.reduce.bias"][:, None] + w["summary.position"]
        y = fine + weighed(w.linear(fine, "query"), w.linear(coarse, "key"), w.linear(coarse, "value"), d.head_dim)
        return y + w.mlp(w.norm(y, "mlp.norm"), "mlp.inner")

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"window": 3, "ratio": 0.3, "mlp_ratio": 2}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(4, 6)), 24, {"window": 2, "ratio": 1.0}, batch=1),
            Case(Dims(1, 5, grid=(3, 4)), 12, {"window": 5, "ratio": 0.1, "mlp_ratio": 1}),
        ]

    @claim("The fusion costs P N^2: half of full attention for P = 0.5, and quadratic all the same.")
    def fusion_work(cls) -> Finding:
        found = []
        for grid in ((14, 14), (14, 28)):
            module, n = cls(Dims(2, 4, grid=grid)), torch.Size(grid).numel()
            products = work(functools.partial(module, torch.randn(1, n, 8))).all
            layers = 2 * n * 8**2 * (4 + 1 + 8) + 2 * n // 2 * 8**2 * 2  # of windows, query, MLP; key and value
            found.append(products - layers - 4 * n * 49 * 8 - 2 * n * n // 2 * 8)
        full = 4 * 196**2 * 8
        holds = found[0] * 2 == full and found[1] == 4 * found[0]
        return Finding(holds, f"{found[0] / full:g} of full attention; {found[1] / found[0]:g} times at twice N")

    @claim("The layer over positions has P N^2 weights, which fit no other grid.")
    def tied(cls) -> Finding:
        one, other = (cls(Dims(2, 4, grid=grid)) for grid in ((14, 14), (14, 15)))
        weights = one.summary.reduce.weight.numel()
        alike = {name for name, p in other.named_parameters() if p.shape == one.get_parameter(name).shape}
        misfits = sorted({name for name, _ in other.named_parameters()} - alike)
        holds = weights == 196**2 // 2 and all(name.startswith("summary.") for name in misfits) and len(misfits) == 3
        return Finding(holds, f"{weights} weights on 14 x 14; {len(misfits)} tensors that differ on 14 x 15")

    @claim("Without values, the fusion leaves the block of window attention.")
    def no_values(cls) -> Finding:
        module, x = cls(Dims(2, 4, grid=(9, 11)), window=4).double(), torch.randn(1, 99, 8, dtype=torch.float64)
        with torch.no_grad():
            before = float((module(x) - module.mlp(x + module.windows(module.norm(x)))).abs().max())
            for parameter in module.value.parameters():
                parameter.zero_()
            after = float((module(x) - module.mlp(x + module.windows(module.norm(x)))).abs().max())
        return Finding(after == 0 < before, f"largest difference {after:g}, with values {before:.2f}")

    @claim("One block sees the whole map, its windows alone their own.")
    def reach(cls) -> Finding:
        module, seen = cls(Dims(2, 4, grid=(14, 21))).double(), []
        for inner in (module.windows, module):
            x = torch.randn(1, 294, 8, dtype=torch.float64).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(inner(x)[0, 0].sum(), x)
            seen.append(int(gradient.ne(0).any(-1).sum()))
        return Finding(seen == [49, 294], f"of 294 positions windows see {seen[0]}, the block {seen[1]}")
