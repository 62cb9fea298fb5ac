"""Which keys may each query see? Patterns as unions of boxes, grids and token orders, plans, routing.

In a sequence: `Full`, `Causal`, `Window`, `Band`, `Prefix`, `Sinks`, `Blocks`, `BlockBand`, `Dilated`, `Strided`,
`Columns`. On a grid: `Neighborhood` (windows that follow the query and stay inside), `GridBlocks` (blocks, shifted, in
a halo, or at a stride, cut at the border). By data: `Labels`, `Documents`, `Packed`, `Summaries`. Combined: `&`, `|`,
`PerHead`.
"""

from saccade.where.boxes import Boxes
from saccade.where.grid_patterns import GridBlocks, Neighborhood
from saccade.where.labels import Labels
from saccade.where.pattern import And, Box, Frame, Or, Pattern, PerHead, Span
from saccade.where.patterns import (
    Band,
    BlockBand,
    Blocks,
    Causal,
    Columns,
    Dilated,
    Documents,
    Full,
    Packed,
    Prefix,
    Sinks,
    Strided,
    Summaries,
    Window,
)
from saccade.where.plan import Plan
from saccade.where.planner import plan_chosen
from saccade.where.routing import CumulativeMass, Router, Threshold, TopK, pool, pooled_scores

__all__ = [
    "And",
    "Band",
    "BlockBand",
    "Blocks",
    "Box",
    "Boxes",
    "Causal",
    "Columns",
    "CumulativeMass",
    "Dilated",
    "Documents",
    "Frame",
    "Full",
    "GridBlocks",
    "Labels",
    "Neighborhood",
    "Or",
    "Packed",
    "Pattern",
    "PerHead",
    "Plan",
    "Prefix",
    "Router",
    "Sinks",
    "Span",
    "Strided",
    "Summaries",
    "Threshold",
    "TopK",
    "Window",
    "plan_chosen",
    "pool",
    "pooled_scores",
]
