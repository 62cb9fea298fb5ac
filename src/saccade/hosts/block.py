"""The two shells that most transformers share: projections around an attention, and a residual block around a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Dims
from saccade.errors import positive


class AttentionMixer(nn.Module):
    """Projections around an attention: x (B, N, C) -> W_o attention(W_q x, W_k x, W_v x).

    attention: any `Attention`; its `dims` fix H, Hkv and D. bias: biases on the projections (default True).
    """

    def __init__(self, attention: Attention, *, bias: bool = True) -> None:
        super().__init__()
        d = self.dims = attention.dims
        self.attention = attention
        self.qkv = nn.Linear(d.dim, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, bias=bias)
        self.out = nn.Linear(d.dim, d.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dims
        heads = self.qkv(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2)  # (B, H + 2 Hkv, N, D)
        q, k, v = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 1)
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm residual block: x + a mixer(LN(x)), then x + b MLP(LN(x)); x (B, N, C).

    mixer: (B, N, C) -> (B, N, C). mlp_ratio: hidden width of the MLP over C (default 4). layer_scale: initial value of
    the learned factors a, b per channel (default None: none).

    >>> Block(Dims(2, 8), nn.Linear(16, 16))(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, dims: Dims, mixer: nn.Module, *, mlp_ratio: int = 4, layer_scale: float | None = None) -> None:
        super().__init__()
        hidden = dims.dim * positive("mlp_ratio", mlp_ratio)
        self.mixer = mixer
        self.norm_mixer, self.norm_mlp = nn.LayerNorm(dims.dim), nn.LayerNorm(dims.dim)
        self.mlp = nn.Sequential(nn.Linear(dims.dim, hidden), nn.GELU(), nn.Linear(hidden, dims.dim))
        scales = [None if layer_scale is None else nn.Parameter(torch.full((dims.dim,), layer_scale)) for _ in range(2)]
        self.scale_mixer, self.scale_mlp = scales

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm_mixer(x))
        x = x + (mixed if self.scale_mixer is None else self.scale_mixer * mixed)
        mixed = self.mlp(self.norm_mlp(x))
        return x + (mixed if self.scale_mlp is None else self.scale_mlp * mixed)
