"""Decay schedules: natural-log decays <= 0 in float32, ready for `log_decay`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import positive


def retention(num_heads: int) -> Tensor:
    """Constant decays of RetNet.

        g_h = log(1 - 2^(-5 - h)),   h = 0 .. H - 1

    Returns (H,). arXiv 2307.08621, eq. 8.

    >>> retention(2).exp().tolist()
    [0.96875, 0.984375]
    """
    h = torch.arange(positive("num_heads", num_heads), dtype=torch.float64)
    return torch.log1p(-(2.0 ** (-5 - h))).float()


def alibi(num_heads: int) -> Tensor:
    """Constant decays on ALiBi's slopes, which Lightning Attention uses.

        g_h = -2^(-8 h / H),   h = 1 .. H

    Returns (H,). arXiv 2108.12409, section 3.

    >>> alibi(2).tolist()
    [-0.0625, -0.00390625]
    """
    h = torch.arange(1, positive("num_heads", num_heads) + 1, dtype=torch.float64)
    return (-(2.0 ** (-8 * h / num_heads))).float()


def transnormer(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Constant decays of TransNormerLLM: linear in the head, weaker in deeper layers.

        g_h = -(8 h / H) (1 - layer / num_layers),   h = 0 .. H - 1

    Returns (H,); head 0 never forgets. layer: counted from 0. arXiv 2307.14995, section 3.1.

    >>> transnormer(2, 0, 1).abs().tolist()
    [0.0, 4.0]
    """
    if positive("layer", layer, least=0) >= positive("num_layers", num_layers):
        raise ValueError(f"layer: got {layer} of num_layers {num_layers}; layers count from 0")
    h = torch.arange(positive("num_heads", num_heads), dtype=torch.float64)
    return (-(8 * h / num_heads) * (1 - layer / num_layers)).float()


def gate_logsigmoid(x: Tensor, tau: float = 16.0) -> Tensor:
    """A data-dependent gate, close to 1 while `tau` is large.

        g = log(sigmoid(x)^(1 / tau)) = logsigmoid(x) / tau

    x: any shape; returns float32 (float64 for float64). arXiv 2312.06635, section 4.4 (tau = 16).

    >>> gate_logsigmoid(torch.zeros(1), tau=1.0).exp().tolist()
    [0.5]
    """
    if not tau > 0:
        raise ValueError(f"tau: got {tau}; pass a temperature > 0")
    return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / tau


def gate_bounded(x: Tensor, least: float | Tensor = 0.0) -> Tensor:
    """A gate that forgets no faster than `least` a token.

        g = log(least + (1 - least) sigmoid(x))

    x: any shape; least: in [0, 1), broadcastable against x, growing with the layer in HGRN2; returns float32 (float64
    for float64). arXiv 2404.07904. Summed in the log domain, so that least = 0 is logsigmoid.

    >>> gate_bounded(torch.tensor([-torch.inf]), 0.25).exp().tolist()
    [0.25]
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(least, Tensor):
        return torch.logaddexp(least.to(x.dtype).log(), torch.log1p(-least.to(x.dtype)) + F.logsigmoid(x))
    if not 0 <= least < 1:
        raise ValueError(f"least: got {least}; pass a decay in [0, 1)")
    open_gate = F.logsigmoid(x) + math.log1p(-least)
    return open_gate if least == 0 else torch.logaddexp(torch.full_like(x, math.log(least)), open_gate)
