"""NAR: the tokens of an image or video by their distance from the first one, all of one distance at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Causal, Labels, Plan


class Nar(Attention):
    """Attention in which a token sees all tokens that are no further from the first one than itself.

        i sees j  iff  t_j + y_j + x_j <= t_i + y_i + x_i;  all see the prefix;  a prefix token i sees those with j <= i

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D), N = prefix + T Y X: conditioning tokens, then the grid,
    row-major; an image is a grid of one frame. Tokens at one (Manhattan) distance see each other. They are generated
    together, after all that are nearer. Sorted by distance, the mask is causal in blocks, and so it is computed.
    Paper: arXiv 2503.10696, next-neighbour prediction; that tokens at one distance see each other, and that the prefix
    is causal, was read off the authors' code.
    Deviations: the decoding heads, one a dimension, whose predictions are averaged, and the position codes belong to
    the model around it; heads may share keys.
    prefix: conditioning tokens in front of the grid (default 0; the paper has 1 for a class). `plan` is that of a grid
    without one, None otherwise.
    Costs about N^2 / 2 pairs, like causal attention, a copy of q, k, v and o in the order of the steps, and
    T + Y + X - 2 passes to generate T Y X tokens.
    Errors: ValueError when dims.grid has not three axes or N is not prefix + T Y X; ValueError or TypeError for a
    prefix that is no integer >= 0.

    >>> nar, x = Nar(Dims(2, 8, grid=(1, 3, 4))), torch.randn(1, 2, 12, 8)
    >>> nar(x, x, x).shape, nar.plan(x, x).dense()[0, 5].view(3, 4).int().tolist()
    (torch.Size([1, 2, 12, 8]), [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    """

    spec = Spec(
        id="nar",
        name="NAR",
        title="Neighboring Autoregressive Modeling for Efficient Visual Generation",
        paper="2503.10696",
        year=2025,
        family="static_sparse",
        uses=("attend", "Labels"),
        grid=3,
    )

    def __init__(self, dims: Dims, *, prefix: int = 0) -> None:
        super().__init__(dims)
        self.prefix = positive("prefix", prefix, least=0)
        axes = torch.meshgrid(*(torch.arange(size) for size in dims.grid or ()), indexing="ij")
        # When a token is generated: the prefix first, one by one, then the grid, one distance after the other.
        self.turns = torch.cat([torch.arange(prefix), torch.stack(axes).sum(0).flatten() + prefix])
        self.pattern = Labels(self.turns, left=None)

    def check_grid(self, name: str, num_tokens: int) -> None:
        if num_tokens != len(self.turns):
            wanted = f"a prefix of {self.prefix} and then the {len(self.turns) - self.prefix} tokens of the grid"
            raise ValueError(f"{name}: got N = {num_tokens}; pass {wanted} {self.dims.grid}, or rebuild")

    def plan(self, q: Tensor, k: Tensor) -> Plan | None:
        if self.prefix:
            return None
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cells = list(itertools.product(*map(range, self.dims.grid or ())))
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for i in range(q.shape[2]):
            seen = list(range(min(i + 1, self.prefix)))
            if i >= self.prefix:
                own = sum(cells[i - self.prefix])
                seen += [self.prefix + j for j, cell in enumerate(cells) if sum(cell) <= own]
            for h in range(q.shape[1]):
                shared = h // (q.shape[1] // k.shape[1])
                scores = (q[:, h, i, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, i] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(1, 5, 7)), 35, {}),
            Case(Dims(4, 4, 2, grid=(1, 3, 7)), 25, {"prefix": 4}),
            Case(Dims(2, 8, grid=(3, 2, 5)), 31, {"prefix": 1}, batch=1),
        ]

    @classmethod
    def generated(cls, grid: tuple[int, int, int], prefix: int = 0) -> tuple[int, float, float]:
        """Generation turn by turn beside the whole: passes, largest difference, and what rounding allows."""
        n = prefix + math.prod(grid)
        module = cls(Dims(2, 8, grid=grid), prefix=prefix)
        q, k, v = torch.randn(3, 1, 2, n, 8, dtype=torch.float64)
        out, held = torch.zeros_like(q), torch.zeros(0, dtype=torch.int64)
        at_once = module.turns.clamp(min=prefix - 1)  # the prefix is read in one pass
        passes = at_once.unique().tolist()
        for turn in passes:
            new = (at_once == turn).nonzero().flatten()
            held = torch.cat([held, new])
            where = Causal() if turn < prefix else None
            out[:, :, new] = attend(q[:, :, new], k[:, :, held], v[:, :, held], where)
        rounding = 2 * n * torch.finfo(out.dtype).eps * float(v.abs().max())
        return len(passes), float((out - module(q, k, v)).abs().max()), rounding

    @claim(
        "A pass for each distance, with all keys so far and no mask, gives the whole: 31 passes for 16 x 16, not 256."
    )
    def passes(cls) -> Finding:
        image, video, text = cls.generated((1, 16, 16)), cls.generated((4, 8, 8)), cls.generated((1, 5, 6), 7)
        errors = [error for _, error, _ in (image, video, text)]
        figure = f"{image[0]} passes for 16 x 16, {video[0]} for 4 x 8 x 8, of 256 tokens each, {text[0]} for 5 x 6"
        holds = [image[0], video[0], text[0]] == [31, 18, 11]
        holds &= all(error <= rounding for _, error, rounding in (image, video, text))
        return Finding(holds, f"{figure} behind a prefix, which takes one; within {max(errors):.1e}")

    @claim("Sorted by distance the mask is exactly causal in blocks, 52.1 % of the pairs of 16 x 16; so it is planned.")
    def blocks(cls) -> Finding:
        module = cls(Dims(1, 8, grid=(1, 16, 16)))
        plan, order = module.pattern.plan(256, block=(16, 16)), module.turns.argsort(stable=True)
        seen = plan.dense()[0]
        sizes = [min(d + 1, 31 - d) for d in range(31)]
        ends = torch.tensor([sum(sizes[: d + 1]) for d in range(31) for _ in range(sizes[d])])
        causal = torch.equal(seen[order][:, order], torch.arange(256) < ends[:, None])
        density, tiles = float(seen.float().mean()), plan.num_tiles / plan.num_row_tiles**2
        figure = f"{density:.1%} of the pairs, in {tiles:.1%} of the tiles of 16 x 16"
        return Finding(causal and round(density, 3) == 0.521 and tiles < 0.6, figure)

    @claim("Next-neighbour prediction: all neighbours come one turn later, in raster order only those to the right do.")
    def neighbours(cls) -> Finding:
        grid = (3, 4, 5)
        cells, turns = list(itertools.product(*map(range, grid))), cls(Dims(1, 4, grid=grid)).turns.tolist()
        pairs = itertools.combinations(enumerate(cells), 2)
        near = [(i, j) for (i, a), (j, b) in pairs if sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1]
        ours, raster = sum(turns[j] - turns[i] == 1 for i, j in near), sum(j - i == 1 for i, j in near)
        figure = f"{ours} of {len(near)} neighbouring pairs of 3 x 4 x 5 are one turn apart, {raster} in raster order"
        return Finding(ours == len(near) > 2 * raster, figure)
