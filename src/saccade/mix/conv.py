"""Depthwise convolution of tokens over their grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.errors import positive
from saccade.mix.tokens import check_tokens, to_map, to_tokens

CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def depthwise_conv(
    x: Tensor, grid: Sequence[int], weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1
) -> Tensor:
    """Each channel convolved with its own kernel, zeros outside the grid, as many tokens out as in.

        y[b, p, c] = bias[c] + sum_t weight[c, 0, t] x[b, p + dilation * (t - (K - 1) / 2), c],   0 <= t < K

    x (B, N, C) of a row-major grid of one to three axes; weight (C, 1, *kernel), the layout of torch's grouped
    convolutions; bias (C,).
    Kernels are centred, so dilation * (K - 1) must be even. Costs N C times the taps.
    Errors: ValueError when the grid has not N tokens, weight does not fit grid and channels, or a kernel has no centre.

    >>> depthwise_conv(torch.arange(4.0).view(1, 4, 1), (4,), torch.ones(1, 1, 3)).flatten().tolist()
    [1.0, 3.0, 6.0, 5.0]
    """
    grid = check_tokens(x, grid)
    if weight.ndim != len(grid) + 2 or weight.shape[:2] != (x.shape[-1], 1):
        want = f"({x.shape[-1]}, 1, {', '.join('K' for _ in grid)})"
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} for {x.shape[-1]} channels on the grid {grid}; pass {want}"
        )
    reach = [positive("dilation", dilation) * (taps - 1) for taps in weight.shape[2:]]
    if any(tokens % 2 for tokens in reach):
        raise ValueError(
            f"weight: got kernel {tuple(weight.shape[2:])} with dilation {dilation}, without a centre; pass odd sizes"
        )
    padding = [tokens // 2 for tokens in reach]
    convolve = CONVOLVE[len(grid)]
    y = convolve(to_map(x, grid), weight, bias, padding=padding, dilation=dilation, groups=x.shape[-1])
    return to_tokens(y)


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with learned weights, for any grid of the kernel's rank.

    dim: channels C. kernel: taps an axis, one number for each axis of the grid. dilation: tokens from one tap to the
    next (default 1). bias: add a learned (C,) (default True). grid: of every x, where it is always the same (default
    None: each call says it). Initial values are those of torch's convolutions.
    forward: x (B, N, C), grid (default: the one given above) -> (B, N, C). Errors: ValueError when neither names a
    grid, and as `depthwise_conv`.

    >>> DepthwiseConv(4, (3, 3))(torch.randn(1, 35, 4), (5, 7)).shape
    torch.Size([1, 35, 4])
    >>> DepthwiseConv(4, (3, 3), grid=(5, 7))(torch.randn(1, 35, 4)).shape
    torch.Size([1, 35, 4])
    """

    def __init__(
        self,
        dim: int,
        kernel: Sequence[int],
        *,
        dilation: int = 1,
        bias: bool = True,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kernel = tuple(positive("kernel", taps) for taps in kernel)
        self.dilation = positive("dilation", dilation)
        self.grid = None if grid is None else tuple(grid)
        bound = torch.Size(self.kernel).numel() ** -0.5
        self.weight = nn.Parameter(torch.empty(positive("dim", dim), 1, *self.kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        grid = self.grid if grid is None else grid
        if grid is None:
            raise ValueError("grid: got None, and the layer was made without one; pass the grid of x here or there")
        return depthwise_conv(x, grid, self.weight, self.bias, dilation=self.dilation)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, kernel={self.kernel}, dilation={self.dilation}, bias={self.bias is not None}"
