"""Forecasts for one pattern in every way that it can be listed, as a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich import box
from rich.table import Table

from saccade.bench import units
from saccade.softmax.cost import CELLS, TILES, Chip, Cost, cost
from saccade.where import Pattern, PerHead, Plan
from saccade.where.gathered import NotGathered, lattice_of, patch
from saccade.where.layout import tile_shape


@dataclass(frozen=True, eq=False)
class Listing:
    """One way to list a pattern. patch: lengths of a query tile along the axes of the grid, None in a sequence."""

    plan: Plan
    patch: tuple[int, ...] | None
    cost: Cost

    @property
    def name(self) -> str:
        """Tiles, or cells that begin where windows do, and their sizes in tokens."""
        bq, bk = self.plan.block
        return f"{'tiles' if self.plan.token_grid is None else 'cells'} of {bq} x {bk}"

    @property
    def listed(self) -> float:
        """Keys that the mean query tile lists."""
        keys = self.plan.num_tiles * self.plan.block[1]
        keys += 0 if self.plan.token_indices is None else len(self.plan.token_indices)
        return keys / (self.plan.num_groups * self.plan.num_row_tiles)

    @property
    def full(self) -> float:
        """Share of them that needs no mask."""
        plan = self.plan
        free = int(plan.num_full.sum()) * plan.block[1]
        free += 0 if plan.token_num_full is None else int(plan.token_num_full.sum())
        rows = plan.num_groups * plan.num_row_tiles
        return free / (self.listed * rows) if self.listed else 1.0


def listings(pattern: Pattern, shape: Sequence[int], capability: str = "sm_90") -> list[Listing]:
    """Every way to list `pattern` whose rates are known, the fastest first.

    shape: (B, H, Hkv, N, D). capability: see `saccade.softmax.cost.cost`.
    """
    batch, heads, _, tokens, head_dim = shape

    def plans() -> Iterator[Plan]:
        for block in TILES:
            yield pattern.plan(tokens, heads=heads, block=block)
        for block in CELLS:
            with suppress(NotGathered):
                plan = pattern.gathered(tokens, heads=heads, block=block)
                if plan.token_grid is not None and len(plan.token_grid.lengths) > 1:  # in a sequence, cells are tiles
                    yield plan

    def found() -> Iterator[Listing]:
        for plan in plans():
            about = cost(plan, batch=batch, head_dim=head_dim, capability=capability)
            yield Listing(plan, _patch(pattern, plan), about)

    return sorted(found(), key=lambda each: each.cost.seconds)


def _patch(pattern: Pattern, plan: Plan) -> tuple[int, ...] | None:
    """The lengths of a query tile on its grid."""
    lattice = lattice_of([pattern.at_head(h, plan.num_heads) for h in range(plan.num_heads)], plan.num_keys)
    if lattice is None or lattice.num_axes == 1:
        return None
    size = plan.block[0]
    if plan.token_indices is None:
        return tile_shape(size, lattice.steps)
    return patch(pattern, plan)


def shape_of(pattern: Pattern, length: int | None) -> tuple[int, int, int, int, int]:
    """(B, H, Hkv, N, D) for a pattern that is asked about without one: a batch of 1, 16 heads of 128 channels."""
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else 16
    grid = getattr(pattern, "grid", None)
    return 1, heads, heads, length or (math.prod(grid) if grid else 16384), 128


def table(found: Sequence[Listing], shape: Sequence[int], capability: str = "sm_90") -> Table:
    """One row a each."""
    batch, heads, _, tokens, head_dim = shape
    first, device = found[0].cost, Chip.of(capability).device
    title = (
        f"{batch} x {heads} heads, {tokens} tokens, D = {head_dim}: forecast, forward, on {device}\n"
        f"density {units.share(1 / first.bound)}: by products alone {units.times(first.bound)} faster than dense "
        f"attention, {units.seconds(first.dense_seconds)}"
    )
    drawn = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("lists", no_wrap=True)
    for name in ("patch", "keys", "unmasked", "useful", "time", "faster"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for at, each in enumerate(found):
        drawn.add_row(
            each.name,
            " x ".join(map(str, each.patch)) if each.patch else "",
            f"{each.listed:.0f}",
            units.share(each.full),
            units.share(each.cost.efficiency),
            units.seconds(each.cost.seconds),
            units.times(each.cost.speedup),
            style="" if at else "bold",
        )
    return drawn
