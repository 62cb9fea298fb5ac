"""Lists of single queries per key tile: a gathered plan read from the side of the keys, as dk and dv want it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from saccade.where.grid import Grid


@dataclass(frozen=True, eq=False)
class QueryLists:
    """Which queries see some key of each key tile.

    order: (M,) int64, tile t holds the keys order[t * size : (t + 1) * size]. size: keys a tile. indptr: (G * tiles +
    1,) int64, indices: int32, CSR lists of queries per (group, key tile), numbered in the plan's own order of queries;
    num_full: (G * tiles,) int32, how many queries at the head of each list see every key of the tile. Of the others the
    plan's boxes tell which keys they see. grid: the queries come in cells of this grid, of plan.block[0] each,
    row-major, each anywhere on it; or None.
    """

    order: Tensor
    size: int
    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    grid: Grid | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every table by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> QueryLists:
        """The same lists on another device."""
        moved: dict[str, Any] = {name: table.to(device) for name, table in self.tensors().items()}
        return replace(self, **moved)

    @property
    def num_tiles(self) -> int:
        """Key tiles."""
        return -(-len(self.order) // self.size)
