"""cosFormer: linear attention whose weights fall off with distance as a cosine."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import positive
from saccade.scan import Clamp, CosReweight, State, linear_attention


class CosFormer(Attention):
    """Linear attention on rectified queries and keys, which a cosine of their distance weighs.

        o_i = sum_j a_ij v_j / max(sum_j a_ij, 1e-6),   j <= i when causal
        a_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 length))
        cos(s_i - s_j) = cos s_i cos s_j + sin s_i sin s_j,   s_i = pi i / (2 length)

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal; the last line makes a_ij
    a product of 2 D features. Queries and keys both count their positions from 0. Paper: arXiv 2202.08791, equations
    10 to 12; the bound 1e-6, which a query without a positive channel needs, and the default of `length` follow the
    authors' code. Deviations: none.
    causal: True. length: the longest sequence there will be, the paper's M (default None: the longer one of queries and
    keys, of each packed sequence apart); nothing may be longer, for the cosine would turn negative.
    Costs 2 D (D + Dv) a token and head; a state of 2 D (Dv + 1) numbers a key head to decode, with the position.
    Errors: ValueError for a sequence beyond `length`, for M != N when causal, for a step without a `length`.

    >>> layer = CosFormer(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="cosformer",
        name="cosFormer",
        title="cosFormer: Rethinking Softmax in Attention",
        paper="2202.08791",
        year=2022,
        family="linear",
        uses=("linear_attention", "CosReweight", "Clamp"),
    )
    causal = True

    def __init__(self, dims: Dims, *, causal: bool = True, length: int | None = None) -> None:
        super().__init__(dims)
        self.causal = causal
        self.length = None if length is None else positive("length", length)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        # Packed sequences reach the features one by one, and each is as long as it is.
        longest = max(q.shape[2], k.shape[2]) if cu_seqlens is None else 1

        def features(x: Tensor) -> Tensor:
            return CosReweight(self.length or max(longest, x.shape[2]))(x)

        o = linear_attention(
            q, k, v, feature_map=features, normalizer=Clamp(1e-6), causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: tuple[State, int] | None = None
    ) -> tuple[Tensor, tuple[State, int]]:
        """The next tokens; the state: the memory, and how many tokens it holds."""
        if not self.causal:
            raise ValueError("causal: got False; only a causal cosFormer decodes token by token")
        if self.length is None:
            raise ValueError("length: got None; weights depend on it, so a decoder needs the longest length beforehand")
        memory, count = state or (None, 0)
        o, after = linear_attention(
            q,
            k,
            v,
            feature_map=CosReweight(self.length, start=count),
            normalizer=Clamp(1e-6),
            state=memory,
            return_state=True,
        )
        return o, (cast(State, after), count + q.shape[2])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, group = [], q.shape[1] // k.shape[1]
        length = self.length or max(q.shape[2], k.shape[2])
        for i in range(q.shape[2]):
            last = i + 1 if self.causal else k.shape[2]
            away = torch.tensor([math.cos(math.pi * (i - j) / (2 * length)) for j in range(last)], dtype=q.dtype)
            heads = []
            for h in range(q.shape[1]):
                key, value = k[:, h // group, :last].clamp(min=0), v[:, h // group, :last]
                weights = (q[:, h, i, None].clamp(min=0) * key).sum(-1) * away
                heads.append((weights[..., None] * value).sum(1) / weights.sum(-1, keepdim=True).clamp(min=1e-6))
            rows.append(torch.stack(heads, 1))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 9), 37, {"length": 41}),
            Case(Dims(4, 6, num_kv_heads=2), 23, {"length": 97}, batch=1),
            Case(Dims(1, 8), 71, {"length": 71}, batch=1),
        ]

    @claim("Two sums of D features give what all reweighted pairs give, in work linear in N.")
    def linear(cls) -> Finding:
        random, apart, costs, n = torch.Generator().manual_seed(0), [], [], 96
        q, k, v = torch.randn(3, 1, 2, n, 8, generator=random, dtype=torch.float64)
        ago = torch.arange(n, dtype=q.dtype)[:, None] - torch.arange(n)
        for causal in (False, True):
            weights = q.relu() @ k.relu().mT * (math.pi * ago / (2 * n)).cos()
            weights = weights.tril() if causal else weights
            dense = weights @ v / weights.sum(-1, keepdim=True).clamp_min(1e-6)
            apart.append(float((cls(Dims(2, 8), causal=causal)(q, k, v) - dense).abs().max() / v.abs().max()))
        costs = [work(partial(cls(Dims(1, 8)), *torch.randn(3, 1, 1, length, 8))).all for length in (512, 1024)]
        holds = max(apart) < n * torch.finfo(q.dtype).eps and costs[1] == 2 * costs[0]
        figure = f"largest difference {max(apart):.1e} of v, {costs[1] / costs[0]:.2f} times the work at twice N"
        return Finding(holds, figure)

    @claim("No weight is negative, and of equal keys the nearest weighs most: weights fall with distance as a cosine.")
    def local(cls) -> Finding:
        n = 61
        random, values = torch.Generator().manual_seed(0), torch.eye(n, dtype=torch.float64).expand(1, 1, -1, -1)
        layer = cls(Dims(1, 8), causal=False)
        q, k = torch.randn(2, 1, 1, n, 8, generator=random, dtype=torch.float64)
        # Rows of unlike keys sum to 1, so rounding leaves a zero within eps of it.
        least = float(layer(q, k, values).min())
        (row,) = layer(torch.ones_like(q), torch.ones_like(k), values)[0, 0, -1:].flip(-1)
        row = row / row[0]
        cosine = (math.pi * torch.arange(n, dtype=q.dtype) / (2 * n)).cos()
        apart, falls = float((row - cosine).abs().max()), bool((row.diff() < 0).all())
        eps = n * torch.finfo(q.dtype).eps
        figure = f"least weight {least:.1e}; at 2/3 of the length {float(row[2 * n // 3]):.2f} of that at distance 0"
        return Finding(least > -eps and falls and apart < eps, figure)

    @claim("The state that a decoder keeps does not grow: 2 D (D + 1) numbers a head.")
    def constant_state(cls) -> Finding:
        layer, sizes = cls(Dims(1, 8), length=4096), []
        for n in (1, 4096):
            _, (memory, count) = layer.step(*torch.randn(3, 1, 1, n, 8))
            sizes.append(memory.memory.numel())
        return Finding(sizes == [2 * 8 * 9] * 2, f"{sizes[0]} numbers after 1 token, {sizes[1]} after {count}")
