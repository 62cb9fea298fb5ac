"""Attention in the windows of a grid, as Swin has it and the models after it: beside or across borders, near or far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from saccade.contract import Dims
from saccade.hosts.block import AttentionMixer
from saccade.mix import RegionBias, Windowed
from saccade.mix.windows import Cut, Sizes
from saccade.softmax import RelativeTable, attend

TableFactory = Callable[[int, Sequence[int]], nn.Module]


def relative_table(num_heads: int, window: Sequence[int]) -> RelativeTable:
    """A learned bias per head and difference of position in a window, normal with deviation 0.02 at first."""
    found = RelativeTable(num_heads, window, grid=window)
    nn.init.trunc_normal_(found.table, std=0.02)
    return found


class InWindows(nn.Module):
    """Attention of heads that are cut into windows: q (B W, H, w, D), k, v (B W, Hkv, w, D) -> (B W, H, w, D).

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D) + b_ij) v_j   over the j that were neighbours of i in its window

    Queries need not come from the windows. dims: H, Hkv, D and the grid; window, shift, dilated, table: as those of
    `WindowAttention`, whose inside this is. Where every window is whole and there is no table, no bias is formed.
    Errors: ValueError when dims has no grid, or window or shift have another rank.

    >>> InWindows(Dims(2, 4, grid=(5, 7)), 3)(*torch.randn(3, 6, 2, 9, 4)).shape
    torch.Size([6, 2, 9, 4])
    """

    def __init__(
        self,
        dims: Dims,
        window: Sizes,
        *,
        shift: Sizes = 0,
        dilated: bool = False,
        table: TableFactory | None = relative_table,
    ) -> None:
        super().__init__()
        self.dims, grid = dims, dims.grid
        if grid is None:
            raise ValueError("dims.grid: got None; windows are cut out of a grid, pass Dims(..., grid=(Y, X))")
        cut, heads = Cut.of(grid, window, shift), dims.num_heads
        own = None if table is None else table(heads, cut.size)
        self.bias: RegionBias | None = None
        if own is not None or not cut.is_plain(grid):
            self.bias = RegionBias.of(own, grid, window, shift=shift, dilated=dilated, heads=heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.bias is None:
            return attend(q, k, v)
        fold = self.bias.fold
        return self.bias.unfold(attend(fold(q), fold(k), fold(v), bias=self.bias))


class WindowAttention(Windowed):
    """Multi-head attention in windows: x (B, N, C) of a row-major grid -> (B, N, C).

        y = W_o [o_1; ...; o_H] + w_o,   o_h = softmax(Q_h K_h^T / sqrt(D) + B_h) V_h   in each window
        [Q; K; V] = W x + w,   B_h[i, j] = table_h[i - j],   -inf where i and j are no neighbours

    Windows are those of `cut_windows`, filled below and to the right where they do not divide the grid. Nobody sees a
    filling, nor, in shifted windows, what came around the border (arXiv 2103.14030, section 3.2).
    dims: H, Hkv, D and the grid, of one to three axes. window: tokens of a window, one number or one an axis. shift:
    tokens that the grid is rolled back by (default 0; Swin's is window // 2 in odd blocks). dilated: windows spread
    over the whole grid (False). table: (H, window sizes) -> a module (q positions, k positions) -> (H or 1, n, m),
    positions row-major in a window (default `relative_table`; None: B_h = 0). bias: w and w_o (True).
    Costs 2 N w C multiplications in the products of windows of w tokens, beside the projections, and, where windows
    are shifted or filled, biases of N w entries a head; without these and without a table it is plain attention.
    Errors: ValueError when dims has no grid, or window or shift have another rank.

    >>> layer = WindowAttention(Dims(2, 4, grid=(5, 7)), 4, shift=2)
    >>> layer(torch.ones(1, 35, 8)).shape, layer.inner.attention.bias.bias.table.shape
    (torch.Size([1, 35, 8]), torch.Size([2, 7, 7]))
    """

    def __init__(
        self,
        dims: Dims,
        window: Sizes,
        *,
        shift: Sizes = 0,
        dilated: bool = False,
        table: TableFactory | None = relative_table,
        bias: bool = True,
    ) -> None:
        attention = InWindows(dims, window, shift=shift, dilated=dilated, table=table)
        mixer = AttentionMixer(attention, bias=bias)
        super().__init__(mixer, dims.grid or (), window, shift=shift, dilated=dilated)
