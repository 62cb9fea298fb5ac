"""The layers of hybrid models whose memory is written by the delta rule: projections, a short convolution, a gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Dims
from saccade.errors import positive
from saccade.hosts.short_conv import short_conv, short_taps
from saccade.scan import UNTRACKED, State, delta_rule

Kept = tuple[Tensor, State]


class DeltaNet(nn.Module):
    """A mixer whose memory S of a head, (D, D), gives each key its new value in the place of the old one.

        q, k, v = silu(conv(W x)),   q and k of length 1;   b_t = sigmoid(W_b x_t)
        S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(D)
        y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

    x, y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D); b (B, Hkv, N). The convolution is causal, one kernel a channel;
    RMSNorm is one of each head, with a weight that all share; nothing has a bias. arXiv 2406.06484, the layer as in the
    authors' code. dims: H, Hkv and D. taps: of the convolution (4). chunk: tokens a matrix product takes at once (64),
    of no effect on the result. Costs D^2 + chunk D a token and head; `step` keeps a memory a head and taps - 1 tokens.

    >>> DeltaNet(Dims(4, 8, 2))(torch.randn(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    def __init__(self, dims: Dims, *, taps: int = 4, chunk: int = 64) -> None:
        super().__init__()
        c, kv = dims.dim, dims.num_kv_heads * dims.head_dim
        self.dims, self.chunk = dims, positive("chunk", chunk)
        self.project, self.out = nn.Linear(c, c + 2 * kv, bias=False), nn.Linear(c, c, bias=False)
        self.taps = short_taps(c + 2 * kv, taps)
        self.write, self.gate = nn.Linear(c, dims.num_kv_heads, bias=False), nn.Linear(c, c, bias=False)
        self.norm = nn.RMSNorm(dims.head_dim, eps=1e-5)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithms of what is left of the memory at each token, (B, Hkv, N); None: all of it."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)[0]

    def step(self, x: Tensor, *, state: Kept | None = None) -> tuple[Tensor, Kept]:
        """Any number of tokens more."""
        y, recent = short_conv(self.project(x), self.taps, None if state is None else state[0])
        q, k, v = self.dims.split(F.silu(y))
        q, k, write = F.normalize(q, dim=-1), F.normalize(k, dim=-1), self.write(x).sigmoid().mT
        options: Any = {"scale": self.dims.head_dim**-0.5, "chunk": self.chunk, "return_state": True}
        memory = UNTRACKED if state is None else state[1]
        o, memory = delta_rule(q, k, v, write, log_decay=self.log_decay(x), state=memory, **options)
        o = self.norm(o).transpose(1, 2).flatten(2) * F.silu(self.gate(x))
        return self.out(o), (recent, memory)


class GatedDeltaNet(DeltaNet):
    """A `DeltaNet` that forgets: a_t S_{t-1} stands for S_{t-1},   log a_t = -exp(A) softplus(W_a x_t + c).

    a (B, Hkv, N); A, c (Hkv,), which begin as those of Mamba-2. arXiv 2412.06464, the layer as in the authors' code.
    Parameters and costs as those of `DeltaNet`.

    >>> layer, x = GatedDeltaNet(Dims(4, 8, 2)), torch.randn(1, 50, 32)
    >>> y, state = layer.step(x[:, :30])
    >>> layer.step(x[:, 30:], state=state)[0].shape
    torch.Size([1, 20, 32])
    """

    def __init__(self, dims: Dims, *, taps: int = 4, chunk: int = 64) -> None:
        super().__init__(dims, taps=taps, chunk=chunk)
        heads = dims.num_kv_heads
        self.shut = nn.Linear(dims.dim, heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def log_decay(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return -(self.log_rate.to(wide).exp() * F.softplus(self.shut(x).to(wide) + self.step_bias.to(wide))).mT
