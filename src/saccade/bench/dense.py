"""What every mechanism is compared with: dense softmax attention by the fastest of PyTorch's own fused kernels."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.contract import Dims


def kernels(device: str) -> dict[str, SDPBackend | None]:
    """Kernels that may be insisted on there, by name; None is PyTorch's own choice, which need not be the fastest."""
    if not device.startswith("cuda"):
        return {"sdpa": None}
    return {
        "sdpa": None,
        "sdpa: cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa: flash": SDPBackend.FLASH_ATTENTION,
        "sdpa: efficient": SDPBackend.EFFICIENT_ATTENTION,
    }


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, kernel: SDPBackend | None = None) -> Tensor:
    """softmax(q k^T D^(-1/2)) v; q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> (B, H, N, Dv).

    kernel: the one to insist on (default: PyTorch's choice); a RuntimeError where it does not run.
    """
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        grouped = q.shape[1] != k.shape[1]
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


class DenseMixer(nn.Module):
    """x (B, N, C) -> y (B, N, C): projections to q, k and v, dense attention, projection back."""

    def __init__(self, dims: Dims, causal: bool, kernel: SDPBackend | None = None) -> None:
        super().__init__()
        self.dims, self.causal, self.kernel = dims, causal, kernel
        self.widths = [heads * dims.head_dim for heads in (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)]
        self.qkv = nn.Linear(dims.dim, sum(self.widths))
        self.out = nn.Linear(dims.dim, dims.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2) for t in self.qkv(x).split(self.widths, 2))
        return self.out(dense_attention(q, k, v, self.causal, self.kernel).transpose(1, 2).flatten(2))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the L2 norm over all entries, in float64."""
    truth = truth.double()
    return float(torch.linalg.vector_norm(actual.double() - truth) / torch.linalg.vector_norm(truth))
