"""Key tiles that are cells of a grid: then a tile's number tells its coordinates, and none need be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saccade.where.layout import Cells, Order
from saccade.where.pattern import Box


class Grid(NamedTuple):
    """A row-major grid whose axes are those of a plan's boxes; key tiles are its cells, in its order.

    lengths: tokens along each axis. cell: tokens that a tile has along each axis.
    """

    lengths: tuple[int, ...]
    cell: tuple[int, ...]


def grid_of(unions: Sequence[list[Box]], order: Order | None, num_keys: int, block: int) -> Grid | None:
    """What key tiles of `block` tokens in an order are to these unions of boxes; None if no cells of a grid."""
    names = list(dict.fromkeys(key for union in unions for box in union for key in box))
    if order is None and names == [("position", ())]:
        return Grid((num_keys,), (block,))
    lengths = names[0][1] if names and isinstance(names[0], tuple) and names[0][0] == "grid" else ()
    if not lengths or names != [("grid", lengths, (1,) * len(lengths), a, "step", ()) for a in range(len(lengths))]:
        return None
    if order is None:
        return Grid(lengths, (block,)) if len(lengths) == 1 else None
    return Grid(lengths, order.cell(block)) if isinstance(order, Cells) and order.whole(block) else None
