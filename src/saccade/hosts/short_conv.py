"""The convolution over the last few tokens that recurrent layers put before their memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import positive


def short_conv(x: Tensor, taps: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A causal convolution of each channel with its own taps, piece by piece.

        y[b, t, c] = sum_j taps[c, 0, j] x[b, t - K + 1 + j, c],   0 <= j < K

    x (B, N, C); taps (C, 1, K), the last that of the token itself -> y (B, N, C) and the tokens (B, K - 1, C) that the
    next piece takes as `before`. before: those of the piece before (default: none, zeros). Costs N C K.

    >>> x, taps = torch.arange(1.0, 6.0).view(1, 5, 1), torch.tensor([1.0, 10.0]).view(1, 1, 2)
    >>> y, before = short_conv(x[:, :3], taps)
    >>> y.flatten().tolist(), short_conv(x[:, 3:], taps, before)[0].flatten().tolist()
    ([10.0, 21.0, 32.0], [43.0, 54.0])
    """
    width = taps.shape[2] - 1
    x = torch.cat([x.new_zeros(len(x), width, x.shape[2]) if before is None else before, x], 1)
    y = F.conv1d(x.mT, taps, groups=x.shape[2]).mT
    return y, x[:, x.shape[1] - width :].clone()  # a view would hold on to the whole piece


def short_taps(dim: int, taps: int) -> nn.Parameter:
    """Learned taps (C, 1, K) of `short_conv`, at first uniform within K^(-1/2), as those of torch's convolutions.

    >>> short_taps(6, 4).shape
    torch.Size([6, 1, 4])
    """
    bound = positive("taps", taps) ** -0.5
    return nn.Parameter(torch.empty(dim, 1, taps).uniform_(-bound, bound))
