"""One set of inputs that every mechanism of a comparison receives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.contract import Dims


@dataclass(frozen=True, eq=False)
class Sample:
    """q (B, H, N, D), k and v (B, Hkv, N, D) for an Attention, hidden states x (B, N, C) for a Mixer, their dims."""

    workload: str
    dims: Dims
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def shape(self) -> str:
        d = self.dims
        tokens = "x".join(map(str, d.grid)) if d.grid else str(self.length)
        return f"B{self.q.shape[0]} H{d.num_heads}:{d.num_kv_heads} N{tokens} D{d.head_dim}"

    @property
    def mixer_dims(self) -> Dims:
        """The dims of a layer on x: heads of the same size, as many as the width holds."""
        heads, rest = divmod(self.x.shape[2], self.dims.head_dim)
        if rest:
            width, channels = self.x.shape[2], self.dims.head_dim
            raise ValueError(f"x: got width {width}, which heads of {channels} channels do not fill; pass --shape")
        return self.dims if self.x.shape[2] == self.dims.dim else Dims(heads, self.dims.head_dim, grid=self.dims.grid)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Sample:
        """The same numbers elsewhere, contiguous."""
        moved = {n: getattr(self, n).to(device, dtype).contiguous() for n in "qkvx"}
        return replace(self, **moved)

    def crop(self, tokens: int) -> Sample:
        """At most `tokens` tokens of batch entry 0: the first of a sequence, the middle of a grid, halved by axes."""
        q, k, v, x = self.q[:1], self.k[:1], self.v[:1], self.x[:1]
        if self.dims.grid is None or len(self.dims.grid) == 1:
            n = min(tokens, self.length)
            dims = self.dims if self.dims.grid is None else replace(self.dims, grid=(n,))
            return replace(self, dims=dims, q=q[:, :, :n], k=k[:, :, :n], v=v[:, :, :n], x=x[:, :n])
        grid, small = self.dims.grid, list(self.dims.grid)
        while math.prod(small) > tokens:
            axis = max(range(len(small)), key=lambda a: small[a])
            small[axis] = -(-small[axis] // 2)
        window = tuple(slice((g - s) // 2, (g - s) // 2 + s) for g, s in zip(grid, small, strict=True))

        def cut(tensor: Tensor, dim: int) -> Tensor:
            at = (slice(None),) * dim
            return tensor.unflatten(dim, grid)[at + window].flatten(dim, dim + len(grid) - 1)

        return replace(
            self, dims=replace(self.dims, grid=tuple(small)), q=cut(q, 2), k=cut(k, 2), v=cut(v, 2), x=cut(x, 1)
        )
