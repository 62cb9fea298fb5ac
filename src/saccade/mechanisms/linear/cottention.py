"""Cottention: attention by cosine similarity, without softmax, so that all past keys fit one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known
from saccade.scan import State, linear_attention
from saccade.scan.linear_attention import working_dtype


@dataclass(frozen=True)
class CottentionState:
    """What a decoder keeps: how many tokens it has read, and their memory, D x Dv a key head."""

    count: int
    memory: State | None


class Cottention(Attention):
    """Cosine attention: weights are the cosines of queries and keys, divided by a learned power of the length.

        o_t = sum_{j <= t} cos(q_t, k_j) v_j / j^s,   s = sigmoid(m), one m a key head        (causal)
        o_i = sum_j cos(q_i, k_j) v_j / M^s                                                     (not causal)

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal; j counts from 1. A vector
    of length 0 has cosine 0 with every other. Weights are signed, and rows do not add up to 1. Paper: arXiv 2409.18747;
    compared with the authors' code (GPTCosAttention.py, BertCosAttention.py). Where the divisor stands, when causal,
    follows the code, which divides each value by a power of its own position; norm_at="query" divides each output by
    that of its own, which is another function.
    Deviations: no masks of padding. Keys may be shared by query heads, which then share m.
    causal: True. norm_at: "key" or "query" ("key"; of no effect where not causal). m starts at 0.5, so s at 0.62.
    Costs D Dv a token and head; a state of D Dv numbers a key head to decode.
    Errors: ValueError for M != N when causal, and for a step when not causal.

    >>> layer = Cottention(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="cottention",
        name="Cottention (cosine attention)",
        title="Cottention: Linear Transformers With Cosine Attention",
        paper="2409.18747",
        year=2024,
        family="linear",
        uses=("linear_attention",),
    )
    causal = True
    per_head = True

    def __init__(self, dims: Dims, *, causal: bool = True, norm_at: str = "key") -> None:
        super().__init__(dims)
        self.causal, self.norm_at = causal, known("norm_at", norm_at, ("key", "query"))
        self.m = nn.Parameter(torch.full((dims.num_kv_heads,), 0.5))

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, state: CottentionState | None = None
    ) -> tuple[Tensor, CottentionState]:
        """o and the state after the last token."""
        dtype, count, length = q.dtype, 0 if state is None else state.count, k.shape[2]
        wide = working_dtype(q)
        places = torch.arange(count + 1, count + length + 1, device=q.device, dtype=wide)
        seen = places if self.causal else places[-1:]
        divisor = seen ** self.m.to(wide).sigmoid()[:, None]  # (Hkv, N or 1)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        share = divisor.reciprocal().expand(*k.shape[:3]) if self.norm_at == "key" else None
        before = None if state is None else state.memory
        found = linear_attention(
            q, k, v, strength=share, feature_map="unit", causal=self.causal, state=before, return_state=True
        )
        o, memory = cast(tuple[Tensor, State], found)
        if self.norm_at == "query":
            o = o / divisor.repeat_interleave(self.dims.group, 0)[..., None]
        return o.to(dtype), CottentionState(count + length, memory)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.read(q, k, v)[0]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: CottentionState | None = None
    ) -> tuple[Tensor, CottentionState]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal Cottention decodes token by token")
        return self.read(q, k, v, state)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (m,) = dict(self.named_parameters()).values()
        rows, group = [], q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            power = 1 / (1 + torch.exp(-m[h // group]))
            for i in range(q.shape[2]):
                total = torch.zeros_like(v[:, 0, 0])
                for j in range(i + 1 if self.causal else k.shape[2]):
                    query, key = q[:, h, i], k[:, h // group, j]
                    length = ((query * query).sum(-1, keepdim=True) * (key * key).sum(-1, keepdim=True)) ** 0.5
                    cosine = (query * key).sum(-1, keepdim=True) / length
                    place = k.shape[2] if not self.causal else j + 1 if self.norm_at == "key" else i + 1
                    total = total + cosine * v[:, h // group, j] / place**power
                rows.append(total)
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 17),
            Case(Dims(4, 3, num_kv_heads=2), 13, {"norm_at": "query"}, batch=1),
        ]

    @claim("The memory gives what all cosines give, with and without a mask.")
    def linear_is_quadratic(cls) -> Finding:
        (q, k, v), apart = cls._inputs(), []
        units = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
        cosines = units[0] @ units[1].mT
        for causal in (True, False):
            layer = cls(Dims(2, 8), causal=causal).double()
            place = torch.arange(1, 97, dtype=q.dtype) if causal else 96.0
            weights = cosines.tril() if causal else cosines
            dense = (weights / place ** layer.m.sigmoid()[:, None, None]) @ v
            apart.append(float((layer(q, k, v) - dense).detach().abs().max() / v.abs().max()))
        holds = max(apart) < 96 * torch.finfo(q.dtype).eps
        return Finding(holds, f"largest differences {apart[0]:.1e} (causal) and {apart[1]:.1e} of v at 96 tokens")

    @claim("Weights are signed and lie in [-1, 1]; rows do not add up to 1.")
    def signed(cls) -> Finding:
        q, k, _ = cls._inputs()
        eye = torch.eye(96, dtype=q.dtype).expand(1, 2, -1, -1)
        layer = cls(Dims(2, 8), causal=False).double()
        weights = (layer(q, k, eye) * 96 ** layer.m.sigmoid()[:, None, None]).detach()
        low, high = float(weights.min()), float(weights.max())
        sums = weights.sum(-1)
        bound = 1 + 8 * torch.finfo(q.dtype).eps
        holds = -bound <= low < 0 < high <= bound and float(sums.std()) > 1
        spread = f"{float(sums.mean()):.2f} +- {float(sums.std()):.1f}"
        return Finding(holds, f"weights from {low:.2f} to {high:.2f}, rows sum to {spread}")

    @claim("Dividing at the key and at the query agree for one common length, and differ when causal.")
    def two_norms(cls) -> Finding:
        inputs, apart = cls._inputs(), []
        for causal in (False, True):
            found = [cls(Dims(2, 8), causal=causal, norm_at=at).double()(*inputs).detach() for at in ("key", "query")]
            apart.append(float((found[0] - found[1]).abs().max() / found[0].abs().max()))
        holds = apart[0] < 8 * torch.finfo(torch.float64).eps and apart[1] > 0.1
        return Finding(holds, f"largest difference {apart[0]:.1e} of the output, {apart[1]:.2f} when causal")

    @claim("The state that a decoder keeps does not grow.")
    def constant_state(cls) -> Finding:
        layer, sizes = cls(Dims(2, 8)), []
        for length in (1, 4096):
            memory = layer.read(*torch.ones(3, 1, 2, length, 8))[1].memory
            sizes.append(memory.memory.numel() if memory is not None else 0)
        return Finding(sizes == [2 * 8 * 8] * 2, f"{sizes[0]} numbers after 1 token, {sizes[1]} after 4096")

    @staticmethod
    def _inputs() -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 2, 96, 8, generator=random, dtype=torch.float64).unbind()
