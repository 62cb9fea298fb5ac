"""Neighbourhood attention: every pixel attends to the k x k pixels nearest to it, and the NAT block around it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.softmax import RelativeTable
from saccade.where import Neighborhood, Pattern, Plan


class Nat(Attention):
    """Neighbourhood attention on a grid (Y, X).

        o_i = sum_{j in N(i)} softmax_j(q_i . k_j / sqrt(D) + B(j - i)) v_j
        N(i) = the kernel x kernel grid positions nearest to i, clamped inside the grid

    q, k, v (B, H, N, D) row-major, N = Y X -> o (B, H, N, D). B: a learned table per head over the (2 kernel - 1)^2
    differences of position. Near a border the window is clamped, so that every query has exactly kernel^2 keys. Paper:
    arXiv 2204.07143, equations 2-4. kernel: pixels a side of the neighbourhood, counting the query (default 7).
    dilation: gap between its pixels (1; arXiv 2209.15001). bias: learn B (True; it starts at zero). Costs N kernel^2 D
    and memory of one tile. Windows are finer than tiles: on 128 x 128 pixels 0.3 % of the pairs are seen, and tiles of
    64 that windows of 7 x 7 meet hold 3.2 %. The biases are read once a pair, so that with them keys are listed one by
    one, 1.1 % of the pairs. Errors: ValueError when the grid has not two axes, or
    kernel * dilation exceeds one.

    >>> nat = Nat(Dims(2, 8, grid=(9, 11)), kernel=3)
    >>> x = torch.randn(1, 2, 99, 8)
    >>> nat(x, x, x).shape, int(nat.plan(x, x).num_attended)
    (torch.Size([1, 2, 99, 8]), 891)
    """

    spec = Spec(
        id="nat",
        name="Neighborhood Attention",
        title="Neighborhood Attention Transformer",
        paper="2204.07143",
        year=2022,
        family="spatial_window",
        uses=("attend", "Neighborhood", "RelativeTable"),
        grid=2,
    )
    per_head = True  # by its biases

    def __init__(self, dims: Dims, *, kernel: int = 7, dilation: int = 1, bias: bool = True) -> None:
        super().__init__(dims)
        self.kernel, self.dilation = positive("kernel", kernel), positive("dilation", dilation)
        self.grid = dims.grid or ()
        self.pattern: Pattern = Neighborhood(self.grid, kernel, dilation=dilation)
        reach = (kernel - 1) * dilation + 1
        self.bias = RelativeTable(dims.num_heads, (reach, reach), grid=self.grid) if bias else None

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern, bias=self.bias)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = self.grid
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        k, v = k[:, reads], v[:, reads]

        def nearest(at: int, length: int) -> list[int]:
            same = range(at % self.dilation, length, self.dilation)  # the pixels that a dilated window can reach
            first = min(max(at // self.dilation - self.kernel // 2, 0), len(same) - self.kernel)
            return list(same[first : first + self.kernel])

        table = dict(self.named_parameters()).get("bias.table")
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for y, x in itertools.product(range(height), range(width)):
            around = list(itertools.product(nearest(y, height), nearest(x, width)))
            keys = [a * width + b for a, b in around]
            scores = (q[:, :, y * width + x, None] * k[:, :, keys]).sum(-1) / q.shape[3] ** 0.5
            if table is not None:
                centre = table.shape[1] // 2
                rows, columns = (
                    [centre + d for d in axis] for axis in zip(*((y - a, x - b) for a, b in around), strict=True)
                )
                scores = scores + table[:, rows, columns]
            out[:, :, y * width + x] = (scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(7, 9)), 63, {"kernel": 3}),
            Case(Dims(4, 4, 2, grid=(5, 11)), 55, {"kernel": 5}),
            Case(Dims(2, 8, grid=(8, 7)), 56, {"kernel": 3, "dilation": 2, "bias": False}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object] | None:
        square = dims.grid is not None and dims.grid[0] == dims.grid[1]
        return {"kernel": dims.grid[0], "bias": False} if square and dims.grid else None

    @claim("Every query has exactly kernel^2 keys, at the border too; a kernel that covers the map is full attention.")
    def exact_size(cls) -> Finding:
        counts = cls(Dims(1, 8, grid=(13, 17)), kernel=7).pattern.dense(221)[0].sum(-1)
        whole = bool(cls(Dims(1, 8, grid=(7, 7)), kernel=7).pattern.dense(49).all())
        return Finding(
            bool((counts == 49).all()) and whole, f"{int(counts.min())} to {int(counts.max())} keys on 13 x 17"
        )

    @claim("In the interior the output moves with the input.")
    def equivariant(cls) -> Finding:
        module = cls(Dims(2, 8, grid=(16, 16)), kernel=5).double()
        with torch.no_grad():
            module.bias.table.normal_()
            q, k, v = (torch.randn(1, 2, 16, 16, 8, dtype=torch.float64) for _ in range(3))
            still, moved = (
                module(*(x.roll(by, (2, 3)).flatten(2, 3) for x in (q, k, v))).unflatten(2, (16, 16))
                for by in ((0, 0), (2, 3))
            )
        inside = slice(2, 16 - 2 - 3)  # where neither window touches a border
        still, moved = still[:, :, inside, inside], moved.roll((-2, -3), (2, 3))[:, :, inside, inside]
        error, size = float((still - moved).abs().max()), float(still.abs().max())
        return Finding(
            error < 64 * torch.finfo(torch.float64).eps * size, f"largest difference {error:.1e} of {size:.1f}"
        )

    @claim("L layers reach 1 + L (kernel - 1) pixels a side.")
    def reach(cls) -> Finding:
        seen = cls(Dims(1, 8, grid=(21, 21)), kernel=5).pattern.dense(441)[0].double()
        centre = 10 * 21 + 10
        sides = [
            int((torch.linalg.matrix_power(seen, depth)[centre].view(21, 21) > 0).any(0).sum()) for depth in (1, 2, 3)
        ]
        return Finding(
            sides == [5, 9, 13], f"{sides[0]}, {sides[1]}, {sides[2]} pixels after 1, 2, 3 layers of kernel 5"
        )


def nat_block(dims: Dims, *, kernel: int = 7, dilation: int = 1, layer_scale: float | None = None) -> Block:
    """The block of the NAT paper: x + NA(LN(x)), then x + MLP(LN(x)) with hidden width 3 C; tokens (B, N, C).

    dims: heads are 32 channels wide in the paper. layer_scale: initial value of a learned factor per channel on both
    branches (None: no factor; the larger models use 1e-5).

    >>> nat_block(Dims(2, 32, grid=(8, 8)))(torch.randn(1, 64, 64)).shape
    torch.Size([1, 64, 64])
    """
    return Block(
        dims, AttentionMixer(Nat(dims, kernel=kernel, dilation=dilation)), mlp_ratio=3, layer_scale=layer_scale
    )
