"""Plain answers, written from the definition, in the dtype of the inputs; they import nothing that they judge."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over every admissible pair.

        o_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / sum_j exp(s_ij),   s_ij = q_i . k_j / sqrt(D)

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv). Queries are the last N of M positions;
    causal: query i sees keys up to its own position. mask: bool, broadcast to (B, H, N, M), True = may attend. A row
    that sees nothing gives zeros. Costs N * M a head.

    >>> x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    >>> bool((dense_attention(x, x, x, causal=True)[:, :, 0] == x[:, :, 0]).all())
    True
    """
    (heads, n), (kv_heads, m) = q.shape[1:3], k.shape[1:3]
    reads = torch.arange(heads) // (heads // kv_heads)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k[:, reads]) / q.shape[-1] ** 0.5  # (B, H, N, M)
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if causal:
        seen = torch.arange(m, device=q.device)[None, :] <= (torch.arange(n, device=q.device) + m - n)[:, None]
    if mask is not None:
        seen = seen & mask
    seen = seen.expand(scores.shape)
    top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    weights = torch.where(seen, (scores - top.nan_to_num(neginf=0.0)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weights / torch.where(total > 0, total, 1.0), v[:, reads])
