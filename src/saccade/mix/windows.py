"""Tokens of a grid cut into windows, contiguous or spread over the whole grid, and joined again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import per_axis, positive
from saccade.mix.tokens import check_tokens

Sizes = int | Sequence[int]
Bias = Callable[[Tensor, Tensor], Tensor]


class Cut(NamedTuple):
    """How a grid is cut: `whole`, filled up until windows divide it; their size and number an axis, and the shift."""

    whole: tuple[int, ...]
    size: tuple[int, ...]
    windows: tuple[int, ...]
    shift: tuple[int, ...]

    @classmethod
    def of(cls, grid: Sequence[int], size: Sizes, shift: Sizes) -> Cut:
        sizes = per_axis("size", size, len(grid))
        windows = tuple(-(-n // w) for n, w in zip(grid, sizes, strict=True))
        whole = tuple(n * w for n, w in zip(windows, sizes, strict=True))
        rolled = tuple(s % n for s, n in zip(per_axis("shift", shift, len(grid), least=0), whole, strict=True))
        return cls(whole, sizes, windows, rolled)

    def is_plain(self, grid: Sequence[int]) -> bool:
        """Nothing is filled up, and nothing comes around the border."""
        return self.whole == tuple(grid) and not any(self.shift)


def cut_windows(x: Tensor, grid: Sequence[int], size: Sizes, *, shift: Sizes = 0, dilated: bool = False) -> Tensor:
    """Tokens window by window.

        y[b, W, w, c] = x[b, p, c]   with, on each axis of L tokens, n = ceil(L / size) windows:
        p = W size + w (contiguous) or w n + W (dilated: tokens n apart), then (p + shift) mod n size

    x (B, N, C) of a row-major grid of one to three axes -> (B, W, w, C): W windows, row-major over the grid of windows,
    of w tokens, row-major inside. Where p lies beyond the grid, which size does not divide, y is zero: the filling is
    below and to the right, before the shift (`window_regions` tells where).
    size: tokens of a window, one number or one an axis. shift: tokens that the grid is rolled back by, around its
    border (default 0); Swin's (arXiv 2103.14030, section 3.2) is size // 2. dilated: tokens spread over the whole grid,
    as in the grid attention of MaxViT (arXiv 2204.01697, section 3.2) (False).
    Costs one copy. Errors: ValueError when the grid has not N tokens, or size or shift have another rank.

    >>> x = torch.arange(6.0).view(1, 6, 1)
    >>> cut_windows(x, (6,), 3).flatten(1).tolist(), cut_windows(x, (6,), 3, dilated=True)[0, :, :, 0].tolist()
    ([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]])
    """
    grid = check_tokens(x, grid)
    cut, axes = Cut.of(grid, size, shift), range(1, len(grid) + 1)
    x = x.unflatten(1, grid)
    if cut.whole != grid:
        ends = [(0, w - n) for w, n in zip(cut.whole, grid, strict=True)]
        x = nn.functional.pad(x, (0, 0, *(end for pair in reversed(ends) for end in pair)))
    if any(cut.shift):
        x = x.roll([-s for s in cut.shift], list(axes))
    for axis in reversed(axes):
        pair = cut.windows[axis - 1], cut.size[axis - 1]
        x = x.unflatten(axis, pair[::-1] if dilated else pair)
    which, inside = (list(range(1 + first, 2 * len(grid) + 1, 2)) for first in ((1, 0) if dilated else (0, 1)))
    return x.permute(0, *which, *inside, -1).flatten(1 + len(grid), -2).flatten(1, len(grid))


def join_windows(x: Tensor, grid: Sequence[int], size: Sizes, *, shift: Sizes = 0, dilated: bool = False) -> Tensor:
    """Windows as tokens of their grid: the inverse of `cut_windows` with the same arguments; the filling goes.

    x (B, W, w, C) -> (B, N, C), N the product of grid. Costs one copy.
    Errors: ValueError when x has not the windows of this grid.

    >>> x = torch.randn(2, 35, 4)
    >>> windows = cut_windows(x, (5, 7), 4, shift=2)
    >>> windows.shape, bool((join_windows(windows, (5, 7), 4, shift=2) == x).all())
    (torch.Size([2, 4, 16, 4]), True)
    """
    grid = tuple(positive("grid", n) for n in grid)
    cut, rank = Cut.of(grid, size, shift), len(grid)
    want = torch.Size(cut.windows).numel(), torch.Size(cut.size).numel()
    if x.ndim != 4 or tuple(x.shape[1:3]) != want:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}; windows of {cut.size} on the grid {grid} are (B, {want[0]}, {want[1]}, C)"
        )
    x = x.unflatten(2, cut.size).unflatten(1, cut.windows)
    pairs = [(1 + rank + axis, 1 + axis) if dilated else (1 + axis, 1 + rank + axis) for axis in range(rank)]
    x = x.permute(0, *(axis for pair in pairs for axis in pair), -1)
    for axis in range(1, rank + 1):
        x = x.flatten(axis, axis + 1)
    if any(cut.shift):
        x = x.roll(list(cut.shift), list(range(1, rank + 1)))
    for axis, length in enumerate(grid, 1):
        x = x.narrow(axis, 0, length)
    return x.flatten(1, rank)


def window_regions(
    grid: Sequence[int],
    size: Sizes,
    *,
    shift: Sizes = 0,
    dilated: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens of a window belong together: int64 (W, w), -1 where there is none.

        r[W, w] = sum over the axes a of 2^a [the token came around the border of axis a]

    Tokens of one window with the same label were neighbours before the shift; Swin lets only these attend to one
    another. Arguments and order of windows are those of `cut_windows`.
    Costs N. Errors: ValueError when size or shift have another rank than grid.

    >>> window_regions((5,), 3, shift=1).tolist()
    [[0, 0, 0], [0, -1, 1]]
    """
    grid = tuple(positive("grid", n) for n in grid)
    cut = Cut.of(grid, size, shift)
    labels = torch.zeros(cut.whole, dtype=torch.int64, device=device)
    for axis, (length, end, by) in enumerate(zip(grid, cut.whole, cut.shift, strict=True)):
        at = torch.arange(end, device=device)
        shape = [end if other == axis else 1 for other in range(len(grid))]
        labels = labels + ((at < by).long() * 2**axis - (at >= length).long() * 2 ** len(grid)).view(shape)
    tokens = labels.clamp(min=-1).view(1, -1, 1)
    return cut_windows(tokens, cut.whole, cut.size, shift=cut.shift, dilated=dilated)[0, :, :, 0]


class Windowed(nn.Module):
    """A module on every window by itself: cut, inner, join; x (B, N, C) -> (B, N, C).

    inner: (B W, w, C) -> (B W, w, C), the windows of an image one after the other; it meets the filling as zeros. grid,
    size, shift, dilated: as those of `cut_windows`. Keywords of a call go to inner.

    >>> Windowed(nn.Linear(4, 4), (5, 7), 3)(torch.ones(2, 35, 4)).shape
    torch.Size([2, 35, 4])
    """

    def __init__(
        self, inner: nn.Module, grid: Sequence[int], size: Sizes, *, shift: Sizes = 0, dilated: bool = False
    ) -> None:
        super().__init__()
        Cut.of(grid, size, shift)
        self.inner, self.grid, self.size, self.shift, self.dilated = inner, tuple(grid), size, shift, dilated

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        windows = cut_windows(x, self.grid, self.size, shift=self.shift, dilated=self.dilated)
        y = self.inner(windows.flatten(0, 1), **options).unflatten(0, windows.shape[:2])
        return join_windows(y, self.grid, self.size, shift=self.shift, dilated=self.dilated)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, size={self.size}, shift={self.shift}, dilated={self.dilated}"


class RegionBias(nn.Module):
    """Biases of scores that keep the regions of a window apart, for attention whose heads are windows times heads.

        b[(W, h), i, j] = bias[h, i, j] where r[W, i] = r[W, j] >= 0, or r[W, i] < 0 (a filling, which nobody reads)
                          -inf elsewhere

    bias: a module, (q positions (n,), k positions (m,)) -> (H or 1, n, m); None: zeros. regions: r (W, w), see
    `window_regions`; `of` takes the arguments of `cut_windows` instead, and one row of zeros for all where each window
    is whole. heads: H, where bias is None or has one row for all heads (default: as many as bias has rows, 1 without).
    forward: as bias -> (W H, n, m). `fold` and `unfold` bring q, k, v there and the result back: (B W, H, w, D) <->
    (B, W H, w, D).
    Costs W H w^2 entries.

    >>> bias = RegionBias(None, torch.tensor([[0, 0, -1]]), heads=2)
    >>> bias(torch.arange(2), torch.arange(3)).tolist()
    [[[0.0, 0.0, -inf], [0.0, 0.0, -inf]], [[0.0, 0.0, -inf], [0.0, 0.0, -inf]]]
    """

    regions: Tensor

    def __init__(self, bias: Bias | None, regions: Tensor, *, heads: int | None = None) -> None:
        super().__init__()
        if regions.ndim != 2 or regions.is_floating_point():
            raise ValueError(f"regions: got {regions.dtype} of shape {tuple(regions.shape)}; pass integers (W, w)")
        self.bias, self.heads = bias, -1 if heads is None else positive("heads", heads)
        self.register_buffer("regions", regions, persistent=False)
        self.parts = True

    def simpler(self) -> Bias:
        """The bias that is added, where `of` keeps nothing apart: it may be one that kernels know (`RelativeTable`)."""
        return self if self.parts or self.bias is None else self.bias

    @classmethod
    def of(
        cls,
        bias: Bias | None,
        grid: Sequence[int],
        size: Sizes,
        *,
        shift: Sizes = 0,
        dilated: bool = False,
        heads: int | None = None,
    ) -> RegionBias:
        cut = Cut.of(grid, size, shift)
        if cut.is_plain(grid):
            found = cls(bias, torch.zeros(1, torch.Size(cut.size).numel(), dtype=torch.int64), heads=heads)
            found.parts = False  # known without a look at the regions, whose values may not exist yet
            return found
        return cls(bias, window_regions(grid, size, shift=shift, dilated=dilated), heads=heads)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        one, other = self.regions[:, q_pos, None], self.regions[:, None, k_pos]
        hidden = (one >= 0) & (one != other)
        scores = torch.zeros((), device=hidden.device) if self.bias is None else self.bias(q_pos, k_pos)
        masked = scores.masked_fill(hidden[:, None], -torch.inf)  # (W, H or 1, n, m)
        return masked.expand(-1, self.heads, -1, -1).flatten(0, 1)

    def fold(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, len(self.regions))).flatten(1, 2)

    def unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (len(self.regions), -1)).flatten(0, 1)
