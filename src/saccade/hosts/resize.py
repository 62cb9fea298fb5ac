"""From one grid to a coarser one and back: strided convolutions that take any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from saccade.errors import positive

CONVOLVE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def coarser(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """The grid after a step of `stride`: ceil(n / stride) on each axis.

    >>> coarser((224, 45), 4)
    (56, 12)
    """
    return tuple(-(-n // stride) for n in grid)


def as_tokens(x: Tensor) -> Tensor:
    """A map (B, C, *grid) as row-major tokens (B, N, C)."""
    return x.movedim(1, -1).flatten(1, -2)


def as_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Row-major tokens (B, N, C) as a map (B, C, *grid)."""
    return x.unflatten(1, tuple(grid)).movedim(-1, 1)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x.movedim(1, -1)).movedim(-1, 1)


class Reduce(nn.Module):
    """A map on a coarser grid: after(conv(before(x))), n positions of an axis to ceil(n / stride).

        y[p] = b + sum_t W[t] x[stride p + t - l],   0 <= t < kernel,   l = (kernel - 1) // 2, or 0 if kernel = stride

    x (B, dim_in, *grid) -> (B, dim_out, *coarser grid), zeros beyond the border. kernel: default stride, which cuts
    patches. rank: axes of the grid (default 2). bias: b (True). before, after: norms, modules on the last axis of
    (B, *grid, C) (None: none). Errors: ValueError when kernel is smaller than stride, so that positions would be lost.

    >>> Reduce(3, 8, 4, kernel=7, after=nn.LayerNorm(8))(torch.ones(1, 3, 45, 32)).shape
    torch.Size([1, 8, 12, 8])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        stride: int,
        *,
        kernel: int | None = None,
        rank: int = 2,
        bias: bool = True,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kernel = positive("stride", stride) if kernel is None else positive("kernel", kernel)
        if self.kernel < stride:
            raise ValueError(f"kernel: got {kernel} for stride {stride}, which skips positions; pass at least {stride}")
        self.stride, self.before = stride, before
        self.conv = CONVOLVE[rank](dim_in, dim_out, self.kernel, stride, bias=bias)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = _normed(x, self.before)
        left = 0 if self.kernel == self.stride else (self.kernel - 1) // 2
        ends = [(n, end) for n, end in zip(x.shape[2:], coarser(x.shape[2:], self.stride), strict=True)]
        sides = [(left, max(0, (end - 1) * self.stride + self.kernel - left - n)) for n, end in ends]
        x = nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
        return _normed(self.conv(x), self.after)


class Expand(nn.Module):
    """A map on a finer grid, the counterpart of `Reduce`: every position writes stride positions an axis.

        y[stride p + t] = b + W[t] norm(x)[p],   0 <= t < stride

    x (B, dim_in, *grid) -> (B, dim_out, *size), cut to `size`, which `Reduce` took to this grid. rank: axes (default
    2). norm: a module on the last axis of (B, *grid, C) (None: none).

    >>> Expand(8, 3, 4)(torch.ones(1, 8, 12, 8), (45, 32)).shape
    torch.Size([1, 3, 45, 32])
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int, *, rank: int = 2, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.conv = TRANSPOSED[rank](dim_in, dim_out, positive("stride", stride), stride)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.conv(_normed(x, self.norm))
        for axis, length in enumerate(size, 2):
            x = x.narrow(axis, 0, length)
        return x
