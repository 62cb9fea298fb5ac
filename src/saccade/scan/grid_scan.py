"""Selective scans over a grid, along several orders of its tokens at once: the SS2D of vision state-space models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.errors import positive
from saccade.scan.selective_scan import selective_scan


def raster_orders(grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The four orders of VMamba's cross-scan (arXiv 2401.10166): by rows, by columns, and both backwards.

    grid: (Y, X). Returns int64 (4, N), N = Y X: the row-major number of the token that is the n-th on each way.
    Errors: ValueError when grid has not two axes.

    >>> raster_orders((2, 3)).tolist()
    [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    """
    at = _numbers(grid, device)
    ways = torch.stack([at.flatten(), at.T.flatten()])
    return torch.cat([ways, ways.flip(1)])


def snake_orders(grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Four continuous orders, in which one token and the next are neighbours (arXiv 2408.02615).

    By rows from the top left, every other row backwards, and the same way back; by columns from the bottom left, upward
    first, and the same way back. grid: (Y, X). Returns int64 (4, N), N = Y X: the row-major number of the token that is
    the n-th on each way. Errors: ValueError when grid has not two axes.

    >>> snake_orders((2, 3)).tolist()
    [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [3, 0, 1, 4, 5, 2], [2, 5, 4, 1, 0, 3]]
    """
    ways = []
    for lines in (_numbers(grid, device), _numbers(grid, device).flip(0).T):
        back = torch.arange(len(lines), device=device) % 2 == 1
        way = torch.where(back[:, None], lines.flip(1), lines).flatten()
        ways += [way, way.flip(0)]
    return torch.stack(ways)


class GridScan(nn.Module):
    """Selective scans of the same tokens along K orders, each with weights of its own, summed token by token.

        y_t = sum_k s_k(t),   where along order k, with u the token met at step n
        h_n = exp(d_n A_k) h_{n-1} + d_n u (Bk u),   s_k = h_n (Ck u) + Dk u,   d_n = softplus(Sk (Rk u) + bk)

    x (B, N, C) -> (B, N, C); A_k = -exp(log_rate[k]) (C, S); Rk (rank, C), Bk, Ck (S, C): the rows of read[k]; Sk
    (C, rank): step[k]; bk: bias[k] (C,); Dk: direct[k] (C,). See `selective_scan`; layers around it, such as a
    depthwise convolution before and a norm behind, are the caller's.
    Paper: the SS2D of VMamba, arXiv 2401.10166; initial values are those of its code.
    dim: channels C. state: S, numbers a channel keeps (default 1). rank: width through which steps are made (default
    C / 16, rounded up). paths: K (4). orders: of every x, where they are always the same (None: each call says them).
    forward: x, orders int64 (K, N), each a permutation of the tokens, such as `raster_orders` of their grid (default:
    those given above).
    Costs K N C (2 rank + 5 S) multiplications. Errors: ValueError when orders are no permutations, do not fit x, or are
    given neither here nor there.

    >>> GridScan(8)(torch.ones(1, 15, 8), raster_orders((3, 5))).shape
    torch.Size([1, 15, 8])
    """

    orders: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        state: int = 1,
        rank: int | None = None,
        paths: int = 4,
        orders: Tensor | None = None,
    ) -> None:
        super().__init__()
        rank = -(-positive("dim", dim) // 16) if rank is None else positive("rank", rank)
        k, s = positive("paths", paths), positive("state", state)
        self.read = nn.Parameter(torch.empty(k, rank + 2 * s, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.step = nn.Parameter(torch.empty(k, dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        first = torch.empty(k, dim).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))  # the inverse of softplus
        self.log_rate = nn.Parameter(torch.arange(1.0, s + 1).log().repeat(k, dim, 1))
        self.direct = nn.Parameter(torch.ones(k, dim))
        self.register_buffer("orders", orders, persistent=False)

    def forward(self, x: Tensor, orders: Tensor | None = None) -> Tensor:
        orders = self.orders if orders is None else orders
        if orders is None:
            raise ValueError("orders: got None, and the layer was made without any; pass them here or there")
        (k, dim, rank), size = self.step.shape, self.log_rate.shape[2]
        if x.ndim != 3 or x.shape[2] != dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}; pass tokens (B, N, {dim})")
        if tuple(orders.shape) != (k, x.shape[1]) or orders.dtype != torch.int64:
            got = f"{orders.dtype} of shape {tuple(orders.shape)}"
            raise ValueError(f"orders: got {got}; pass int64 ({k}, {x.shape[1]})")
        every = torch.arange(x.shape[1], device=x.device).expand_as(orders)
        on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere the host would have to wait
        if on_host and not torch.equal(orders.sort(1).values, every):
            raise ValueError(f"orders: a row does not name each of the {x.shape[1]} tokens once; pass permutations")
        back = torch.zeros_like(orders).scatter_(1, orders, every)
        met = x[:, orders]  # (B, K, N, C)
        steps, write, read = torch.einsum("bknc,krc->bnkr", met, self.read).split([rank, size, size], 3)
        y = selective_scan(
            met.transpose(1, 2).flatten(2),
            torch.einsum("bnkr,kcr->bnkc", steps, self.step).flatten(2),
            -self.log_rate.flatten(0, 1).exp(),
            write,
            read,
            D=self.direct.flatten(),
            delta_bias=self.bias.flatten(),
            delta_softplus=True,
        )
        along = torch.arange(k, device=x.device)[:, None]
        return y.unflatten(2, (k, dim))[:, back, along].sum(1)

    def extra_repr(self) -> str:
        (k, dim, rank), size = self.step.shape, self.log_rate.shape[2]
        return f"{dim}, state={size}, rank={rank}, paths={k}"


def _numbers(grid: Sequence[int], device: torch.device | str | None) -> Tensor:
    """The row-major numbers of the tokens of a grid (Y, X), in their places."""
    grid = tuple(positive("grid", n) for n in grid)
    if len(grid) != 2:
        raise ValueError(f"grid: got {grid}; pass (Y, X)")
    return torch.arange(grid[0] * grid[1], device=device).view(grid)
