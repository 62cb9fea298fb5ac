"""Gates: factors for tokens, one profile an axis of the grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saccade.mix.tokens import check_tokens


def gate_axes(x: Tensor, grid: Sequence[int], gates: Sequence[Tensor]) -> Tensor:
    """Multiply every token by the gate of its coordinate on each axis.

        y[b, (i, j), c] = x[b, (i, j), c] * gates[0][b, i, c] * gates[1][b, j, c]

    x (B, N, C) of a row-major grid of one to three axes; gates: one an axis, (B or 1, grid[axis], C or 1). The product
    of the gates is never formed whole. Costs N C an axis.
    Errors: ValueError when the grid has not N tokens, or a gate does not fit its axis.

    >>> gate_axes(torch.ones(1, 6, 1), (2, 3), [torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 3, 1)]).flatten().tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    """
    grid = check_tokens(x, grid)
    if len(gates) != len(grid):
        raise ValueError(f"gates: got {len(gates)} for the grid {grid}; pass one an axis")
    y = x.unflatten(1, grid)
    for axis, gate in enumerate(gates):
        if gate.ndim != 3 or gate.shape[1] != grid[axis]:
            raise ValueError(
                f"gates: got shape {tuple(gate.shape)} for axis {axis} of the grid {grid}; pass (B, {grid[axis]}, C)"
            )
        others = [1] * (len(grid) - 1)
        others.insert(axis, grid[axis])
        y = y * gate.view(gate.shape[0], *others, gate.shape[2])
    return y.flatten(1, -2)
