"""A plan's lists of tiles as padded tables, for kernels that step through a count and a row of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.where import Plan


def padded(plan: Plan, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (G, rows) and tiles (G, rows, width) of the partial, then of the full tiles; int32, zeros for padding."""
    columns = torch.arange(width, device=plan.device)
    num_partial = plan.indptr.diff() - plan.num_full

    def table(counts: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        tiles = torch.zeros(len(counts), width, dtype=torch.int32, device=plan.device)
        if len(plan.indices):
            at = (start[:, None] + columns).clamp(max=len(plan.indices) - 1)
            tiles = plan.indices[at].masked_fill(columns >= counts[:, None], 0)
        return counts.int().view(plan.num_groups, -1), tiles.view(plan.num_groups, -1, width)

    first = plan.indptr[:-1]
    return *table(num_partial, first + plan.num_full), *table(plan.num_full, first)


def longest(plan: Plan) -> int:
    """Entries of the longest list of partial or of full tiles, at least 1. The host waits for the device."""
    counts = torch.maximum(plan.indptr.diff() - plan.num_full, plan.num_full)
    return max(1, int(counts.max())) if len(counts) else 1


def turned(plan: Plan) -> Plan:
    """The transposed plan, kept with the plan for all that ask."""
    return plan.derive("transposed", plan.transpose)
