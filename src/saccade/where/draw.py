"""Plan as a picture: which tiles are listed, which of them are full."""

from __future__ import annotations

from pathlib import Path

import torch

from saccade.where.plan import Plan

MOST_CELLS = 1024  # tiles a side beyond which neighbouring tiles share a cell


def tile_map(plan: Plan, *, head: int = 0, batch: int = 0) -> torch.Tensor:
    """(rows, cols) float: 1 where a tile is full, 1/2 where it is partial, 0 where it is not listed.

    Single keys count as partial. At most MOST_CELLS cells a side: of the tiles that share a cell the fullest counts.
    """
    if plan.transposed:
        return tile_map(plan.transpose(), head=head, batch=batch).T
    if not 0 <= head < plan.num_heads:
        raise ValueError(f"head: got {head}; the plan has heads 0 to {plan.num_heads - 1}")
    group = int(plan.group_of[min(batch, len(plan.group_of) - 1), head])
    shrink = -(-max(plan.num_row_tiles, plan.num_col_tiles) // MOST_CELLS)
    cells = torch.zeros(-(-plan.num_row_tiles // shrink), -(-plan.num_col_tiles // shrink))
    rows = plan.rows()
    own = (rows // plan.num_row_tiles == group).nonzero()[:, 0]
    value = torch.where(plan.is_full()[own], 1.0, 0.5)
    at = (rows[own] % plan.num_row_tiles // shrink) * cells.shape[1] + plan.indices[own].long() // shrink
    cells.view(-1).scatter_reduce_(0, at.cpu(), value.cpu(), "amax")
    if plan.token_indptr is not None and plan.token_indices is not None:
        lists = torch.repeat_interleave(torch.arange(len(plan.token_indptr) - 1), plan.token_indptr.diff().cpu())
        own = (lists // plan.num_row_tiles == group).nonzero()[:, 0]
        columns = plan.token_indices[: plan.num_tokens].cpu().long()[own] // plan.block[1] // shrink
        at = (lists[own] % plan.num_row_tiles // shrink) * cells.shape[1] + columns
        cells.view(-1).scatter_reduce_(0, at, torch.full((len(at),), 0.5), "amax")
    return cells


def draw_plan(plan: Plan, path: Path, *, head: int = 0, batch: int = 0) -> Path:
    """Write the tile map of one head as an image whose format the path's suffix names (png, svg, pdf, ...)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cells = tile_map(plan, head=head, batch=batch)
    extent = (0, plan.num_keys, plan.num_queries, 0)
    colours = ListedColormap(["#f4f4f2", "#8fb3d9", "#1f4e79"])
    axes.imshow(cells.numpy(), cmap=colours, vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_xlabel("key" if plan.k_order is None else "key (plan order)")
    axes.set_ylabel("query" if plan.q_order is None else "query (plan order)")
    axes.set_title(f"{plan.block[0]} x {plan.block[1]} tiles, density {plan.density:.1%}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
