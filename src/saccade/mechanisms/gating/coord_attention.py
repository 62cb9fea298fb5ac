"""Coordinate attention: two sigmoid gates, one from row means and one from column means."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, reached, work
from saccade.errors import positive
from saccade.mix import gate_axes, pool_axis


class CoordAttention(Mixer):
    """Coordinate attention: channels gated by what the rows and the columns of the map hold.

        z = [mean over columns of x ; mean over rows of x],   f = hswish(BN(W z + b))
        g = sigmoid(Wy f_rows + by),   h = sigmoid(Wx f_columns + bx),   y[i, j] = x[i, j] * g[i] * h[j]

    x, y (B, N, C): tokens of a row-major grid (Y, X); z (B, Y + X, C); W (m, C); f (B, Y + X, m); Wy, Wx (C, m);
    g (B, Y, C), h (B, X, C); hswish(t) = t relu6(t + 3) / 6; BN normalises each of the m channels over batch and Y + X,
    with running statistics in evaluation mode.
    Paper: arXiv 2103.02907, section 3.2; m = max(least_dim, C // reduction) and the biases as in the authors' code.
    Deviations: none; 1 x 1 convolutions are linear layers, and as in the paper there is no residual. The oracle is that
    of evaluation mode.
    reduction: C / m (default 32). least_dim: smallest m (default 8).
    Costs 2 N C for pooling and gates and 2 C m (Y + X) multiplications for the gates' layers.
    Errors: ValueError when dims.grid has not two axes.

    >>> y = CoordAttention(Dims(num_heads=2, head_dim=8, grid=(5, 7))).eval()(torch.ones(1, 35, 16))
    >>> bool((y > 0).all() and (y < 1).all())
    True
    """

    spec = Spec(
        id="coord_attention",
        name="Coordinate Attention",
        title="Coordinate Attention for Efficient Mobile Network Design",
        paper="2103.02907",
        year=2021,
        family="gating",
        uses=("pool_axis", "gate_axes"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, reduction: int = 32, least_dim: int = 8) -> None:
        super().__init__(dims)
        self.grid = dims.grid or ()
        inner = max(positive("least_dim", least_dim), dims.dim // positive("reduction", reduction))
        self.reduce = nn.Linear(dims.dim, inner)
        self.norm = nn.BatchNorm1d(inner)
        self.rows, self.columns = nn.Linear(inner, dims.dim), nn.Linear(inner, dims.dim)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of the rows (B, Y, C) and of the columns (B, X, C)."""
        profiles = self.reduce(torch.cat([pool_axis(x, self.grid, 0), pool_axis(x, self.grid, 1)], 1))
        shared = nn.functional.hardswish(self.norm(profiles.mT).mT)
        rows, columns = shared.split(self.grid, 1)
        return self.rows(rows).sigmoid(), self.columns(columns).sigmoid()

    def compute(self, x: Tensor) -> Tensor:
        return gate_axes(x, self.grid, self.gates(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, (height, width) = {**dict(self.named_parameters()), **dict(self.named_buffers())}, self.grid
        image = x.reshape(len(x), height, width, -1)

        def gate(profile: Tensor, name: str) -> Tensor:
            f = profile @ w["reduce.weight"].T + w["reduce.bias"]
            deviation = (w["norm.running_var"] + self.norm.eps) ** 0.5
            f = (f - w["norm.running_mean"]) / deviation * w["norm.weight"] + w["norm.bias"]
            f = f * (f + 3).clamp(0, 6) / 6
            return 1 / (1 + torch.exp(-(f @ w[f"{name}.weight"].T + w[f"{name}.bias"])))

        row = [gate(image[:, i].mean(1), "rows") for i in range(height)]
        column = [gate(image[:, :, j].mean(1), "columns") for j in range(width)]
        return torch.stack([image[:, i, j] * row[i] * column[j] for i in range(height) for j in range(width)], 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8, grid=(5, 7)), 35),
            Case(Dims(3, 6, grid=(11, 3)), 33, {"reduction": 2, "least_dim": 5}, batch=3),
        ]

    @claim("The gate of a channel is a rank-one map with values between 0 and 1.")
    def rank_one(cls) -> Finding:
        module = cls(Dims(2, 8, grid=(11, 13))).double().eval()
        x = torch.randn(1, 143, 16, dtype=torch.float64)
        with torch.no_grad():
            gate = (module(x) / x).view(11, 13, 16).movedim(-1, 0)
        rank, low, high = int(torch.linalg.matrix_rank(gate).max()), float(gate.min()), float(gate.max())
        figure = f"largest rank {rank} of 16 maps, values from {low:.3f} to {high:.3f}"
        return Finding(rank == 1 and min(low, 1 - high) > 0, figure)

    @claim("With frozen statistics the gate at (i, j) sees row i and column j only; batch statistics couple all.")
    def criss_cross(cls) -> Finding:
        module = cls(Dims(2, 8, grid=(5, 7))).double()
        inputs, found = torch.randn(2, 35, 16, dtype=torch.float64), []

        def gate(x: Tensor) -> Tensor:  # of one token
            rows, columns = module.gates(x)
            return rows[0, 2] * columns[0, 3]

        for training in (False, True):
            module.train(training)
            found.append(reached(gate, inputs).view(2, 5, 7))
        cross = torch.zeros(2, 5, 7, dtype=torch.bool)
        cross[0, 2] = cross[0, :, 3] = True
        frozen, batch = (int(seen.sum()) for seen in found)
        figure = f"{frozen} of 2 x 35 tokens with frozen statistics, {batch} with the batch's"
        return Finding(torch.equal(found[0], cross) and bool(found[1].all()), figure)

    @claim("The layers of the gates take 2 C m (Y + X) multiplications, not C^2 Y X.")
    def cheap_gates(cls) -> Finding:
        module, (height, width, dim, inner) = cls(Dims(4, 64, grid=(11, 13))).eval(), (11, 13, 256, 8)
        count = work(functools.partial(module, torch.randn(1, height * width, dim))).all // 2
        figure = f"{count} against {dim * dim * height * width} at C = 256 on 11 x 13"
        return Finding(count == 2 * dim * inner * (height + width), figure)
