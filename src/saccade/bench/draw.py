"""Pictures of who attends to whom, obtained from the mechanism itself and not from what it says it does.

Attention is linear in v: with v = 1 on the keys of one cell and 0 elsewhere, the output is the mass that every query
puts on that cell, and head_dim cells are asked for at once. So a sequence of any length is drawn in a few calls, and a
small grid key by key. A Mixer is probed: |y(x + r on cell j) - y(x)| per unit of |r|, r a fixed random direction, in
float64, which is the support of its Jacobian.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from saccade.bench.contestant import Entry
from saccade.bench.dense import dense_attention
from saccade.bench.guard import guard
from saccade.bench.inputs import Workload
from saccade.bench.sample import Sample
from saccade.contract import Mechanism
from saccade.testing.ambient import seeded
from saccade.where import Pattern, PerHead

CELLS = 128  # most pixels a side
GRID_TOKENS = 1024  # of a grid that is drawn key by key, at most
MOST_TOKENS = 8192  # of a drawn pattern


@dataclass(frozen=True, eq=False)
class Drawing:
    """matrix (N, cells): influence of the tokens of a cell on token i, >= 0. grid: of the tokens, or None."""

    mechanism: str
    workload: str
    matrix: Tensor
    grid: tuple[int, ...] | None = None

    @property
    def field(self) -> Tensor | None:
        """The row of the central query laid out on a grid of two axes (of its own frame, for three)."""
        if self.grid is None or len(self.grid) < 2 or len(set(self.matrix.shape)) > 1:
            return None
        row = self.matrix[_centre(self.grid)].view(self.grid)
        return row if row.ndim == 2 else row[self.grid[0] // 2]

    def images(self) -> list[tuple[str, str]]:
        """(caption, PNG as a data URI) of the matrix, and of the central query's row on the grid.

        The alpha channel holds the influence, square-rooted, so that a page can paint it in its own ink.
        """
        found = [(f"{len(self.matrix)} tokens", _uri(_alpha(self.matrix)))]
        if self.field is not None:
            found.insert(0, (f"one query on {'×'.join(map(str, self.field.shape))}", _uri(_alpha(self.field))))
        return found

    def save(self, path: Path) -> Path:
        """Write the pictures side by side, dark on white, in the format that the suffix names."""
        from PIL import Image

        size, gap = 512, 24
        pictures = [_alpha(t) for t in (self.field, self.matrix) if t is not None]
        sheet = Image.new("RGB", (len(pictures) * (size + gap) + gap, size + 2 * gap), "white")
        for at, alpha in enumerate(pictures):
            mask = Image.fromarray(alpha.numpy()).resize((size, size), Image.Resampling.NEAREST)
            box = (gap + at * (size + gap), gap)
            sheet.paste(Image.new("RGB", (size, size), "#f4f4f2"), box)
            sheet.paste(Image.new("RGB", (size, size), "#1f4e79"), box, mask)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        return path


def cells_of(is_mixer: bool, sample: Sample) -> int:
    """Cells that the keys of `sample` are drawn in: all keys of a small grid, else a fixed number at most."""
    n = sample.length
    if sample.dims.grid is not None and n <= GRID_TOKENS:
        return n
    return min(n, CELLS // 2 if is_mixer else CELLS)


def calls_for(is_mixer: bool, sample: Sample) -> int:
    """Calls that a drawing of `sample` takes."""
    cells = cells_of(is_mixer, sample)
    return cells + 1 if is_mixer else -(-cells // sample.dims.head_dim)


def influence(entry: Entry, sample: Sample) -> Drawing:
    """Draw a mechanism at the size of `sample` (batch entry 0) and on its device, mean over heads.

    Cost: `calls_for` calls, in float32 for an Attention and in float64 for a Mixer.
    """
    device, dtype = sample.q.device, torch.float64 if entry.is_mixer else torch.float32
    sample = sample.crop(sample.length).to(device, dtype)
    module = entry.build(sample, str(device), dtype)
    matrix = _response(module, sample) if entry.is_mixer else _mass(module, sample)
    return Drawing(entry.cls.spec.id, sample.workload, matrix.cpu(), sample.dims.grid)


def reference(sample: Sample, causal: bool) -> Drawing:
    """Dense softmax attention on `sample` (batch entry 0), drawn as the mechanisms are: what they stand in for."""
    sample = sample.crop(sample.length).to(sample.q.device, torch.float32)
    matrix = _mass(lambda q, k, v: dense_attention(q, k, v, causal), sample)
    return Drawing("dense", sample.workload, matrix.cpu(), sample.dims.grid)


def inputs_for(cls: type[Mechanism], workloads: Sequence[Workload]) -> tuple[Workload, int] | None:
    """The inputs for a mechanism: of the ranks that it takes the first that some workload has, and that workload."""
    return next(((w, rank) for rank in cls.spec.ranks for w in workloads if rank in w.ranks), None)


def draw_mechanism(cls: type[Mechanism], workloads: Sequence[Workload], length: int) -> Drawing:
    """Draw `cls` on about `length` tokens of the first workload that it can take; `Failed` when it cannot run."""
    with guard():
        found = inputs_for(cls, workloads)
        if found is None:
            names = ", ".join(w.name for w in workloads)
            raise ValueError(f"needs {cls.spec.tokens}; none of the inputs ({names}) is one")
    workload, rank = found
    sample = workload.sample(length, rank)
    with guard():
        return influence(Entry(cls), sample)


def draw_pattern(pattern: Pattern, length: int | None = None) -> Drawing:
    """Draw what `pattern` admits, the mean over its heads, for `length` tokens (default: 256, or those of its grid)."""
    grid = getattr(pattern, "grid", None)
    n = length or (math.prod(grid) if grid else 256)
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else 1
    if n > MOST_TOKENS:
        raise ValueError(f"length: got {n}; a drawing holds at most {MOST_TOKENS} tokens")
    return Drawing("pattern", "", pattern.dense(n, heads=heads).float().mean(0), grid)


def _cell(is_mixer: bool, sample: Sample) -> Tensor:
    """The cell of every token (N,)."""
    return torch.arange(sample.length, device=sample.q.device) * cells_of(is_mixer, sample) // sample.length


@torch.no_grad()
def _mass(attention: Callable[[Tensor, Tensor, Tensor], Tensor], sample: Sample) -> Tensor:
    """What every query puts on every cell of keys (N, cells)."""
    width = sample.v.shape[3]
    member = torch.nn.functional.one_hot(_cell(False, sample)).to(sample.v)
    parts = []
    for part in member.split(width, 1):
        v = torch.nn.functional.pad(part, (0, width - part.shape[1])).expand(1, sample.k.shape[1], -1, -1)
        out = attention(sample.q, sample.k, v.contiguous())
        parts.append(out[0, ..., : part.shape[1]].abs().mean(0))
    return torch.cat(parts, 1)


@torch.no_grad()
def _response(mixer: Callable[[Tensor], Tensor], sample: Sample) -> Tensor:
    """How far every output moves with the tokens of every cell (N, cells)."""
    cell, size = _cell(True, sample), 1e-4
    with seeded(0):
        drawn = torch.randn(sample.x.shape[2], dtype=torch.float64)
    direction = torch.nn.functional.normalize(drawn, dim=0).to(sample.x)
    still = mixer(sample.x)
    moved = (sample.x + size * (cell == c)[:, None] * direction for c in range(int(cell[-1]) + 1))
    return torch.stack([(mixer(x) - still)[0].norm(dim=1) / size for x in moved], 1)


def _centre(grid: tuple[int, ...]) -> int:
    at = 0
    for size in grid:
        at = at * size + size // 2
    return at


def _alpha(matrix: Tensor) -> Tensor:
    """uint8 (rows, cols), at most CELLS a side: the largest value of each cell, square-rooted, against that of its row.

    What rounding leaves, below 1e-7 of the largest, is blank.
    """
    matrix = matrix.float().nan_to_num(0.0, posinf=0.0)
    shrink = [math.ceil(size / CELLS) for size in matrix.shape]
    matrix = torch.nn.functional.max_pool2d(matrix[None], shrink, ceil_mode=True)[0]
    most = matrix.amax(-1, keepdim=True)
    if matrix.shape[0] != matrix.shape[1] or most.min() <= 0:
        most = matrix.max().expand(1, 1)
    share = torch.where(matrix > 1e-7 * most, matrix / most.clamp_min(1e-30), 0.0)
    return torch.where(share > 0, 20 + 235 * share.sqrt(), 0.0).round().to(torch.uint8)


def _uri(alpha: Tensor) -> str:
    from PIL import Image

    ink = Image.new("L", (alpha.shape[1], alpha.shape[0]), 0)
    picture = Image.merge("LA", (ink, Image.fromarray(alpha.numpy())))
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
