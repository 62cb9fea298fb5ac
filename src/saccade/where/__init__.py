"""Which keys may each query see? Patterns as unions of boxes, grids and token orders, plans, routing."""

from saccade.where.boxes import Boxes
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
    Neighborhood,
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
