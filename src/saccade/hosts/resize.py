"""From one grid to a coarser one and back: strided convolutions that take any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from saccade.errors import per_axis

Stride = int | Sequence[int]
CONVOLVE: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def coarser(grid: Sequence[int], stride: Stride) -> tuple[int, ...]:
    """The grid after a step of `stride`, one number or one an axis: ceil(n / stride) on each.

    >>> coarser((224, 45), 4), coarser((64, 45), (2, 4))
    ((56, 12), (32, 12))
    """
    return tuple(-(-n // by) for n, by in zip(grid, per_axis("stride", stride, len(grid)), strict=True))


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

    x (B, dim_in, *grid) -> (B, dim_out, *coarser grid), zeros beyond the border. stride, kernel: one number or one an
    axis; kernel: default stride, which cuts patches. rank: axes of the grid (default 2). bias: b (True). before, after:
    norms, modules on the last axis of (B, *grid, C) (None: none). Errors: ValueError when kernel is smaller than
    stride, so that positions would be lost.

    >>> Reduce(3, 8, 4, kernel=7, after=nn.LayerNorm(8))(torch.ones(1, 3, 45, 32)).shape
    torch.Size([1, 8, 12, 8])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        stride: Stride,
        *,
        kernel: Stride | None = None,
        rank: int = 2,
        bias: bool = True,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stride = per_axis("stride", stride, rank)
        self.kernel = self.stride if kernel is None else per_axis("kernel", kernel, rank)
        if any(size < by for size, by in zip(self.kernel, self.stride, strict=True)):
            raise ValueError(f"kernel: got {kernel} for stride {stride}, which skips positions; pass at least {stride}")
        self.before = before
        self.conv = CONVOLVE[rank](dim_in, dim_out, self.kernel, self.stride, bias=bias)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = _normed(x, self.before)
        sides: list[int] = []  # of the last axis first
        for n, size, by in reversed(list(zip(x.shape[2:], self.kernel, self.stride, strict=True))):
            left = 0 if size == by else (size - 1) // 2
            sides += [left, max(0, (-(-n // by) - 1) * by + size - left - n)]
        x = nn.functional.pad(x, sides)
        return _normed(self.conv(x), self.after)


class Expand(nn.Module):
    """A map on a finer grid, the counterpart of `Reduce`: every position writes stride positions an axis.

        y[stride p + t] = b + W[t] norm(x)[p],   0 <= t < stride

    x (B, dim_in, *grid) -> (B, dim_out, *size), cut to `size`, which `Reduce` took to this grid. stride: one number
    or one an axis. rank: axes (default 2). norm: a module on the last axis of (B, *grid, C) (None: none).

    >>> Expand(8, 3, 4)(torch.ones(1, 8, 12, 8), (45, 32)).shape
    torch.Size([1, 3, 45, 32])
    """

    def __init__(
        self, dim_in: int, dim_out: int, stride: Stride, *, rank: int = 2, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm, steps = norm, per_axis("stride", stride, rank)
        self.conv = TRANSPOSED[rank](dim_in, dim_out, steps, steps)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = self.conv(_normed(x, self.norm))
        for axis, length in enumerate(size, 2):
            x = x.narrow(axis, 0, length)
        return x
