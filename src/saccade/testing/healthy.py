"""Three small mechanisms in perfect health: the checks must pass them, and the broken twins are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.cache import Cached, Evict, KeyNorm
from saccade.contract import CachePolicy, Case, Dims, Finding, Mixer, Spec, claim, replay
from saccade.errors import check_cu_seqlens, positive
from saccade.where import Causal, Documents, Pattern, Plan, Window


class Sliding(CachePolicy):
    """Causal sliding-window attention by plain gathers.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j,   i - size < j <= i

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> o (B, H, N, Dv).
    Paper: arXiv 2004.05150, section 3.1. Deviations: causal, one window for all heads.
    size: keys a query sees, itself included (default 5). Costs N * size a head.

    >>> o = Sliding(Dims(num_heads=2, head_dim=4))(*torch.randn(3, 1, 2, 9, 4))
    >>> tuple(o.shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="sliding",
        name="Sliding window",
        title="Longformer: The Long-Document Transformer",
        paper="2004.05150",
        year=2020,
        family="testing",
        uses=("Window",),
    )
    causal = True

    def __init__(self, dims: Dims, *, size: int = 5) -> None:
        super().__init__(dims)
        self.size = positive("size", size)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        (batch, _, n, width), kv_heads = q.shape, k.shape[1]
        query = torch.arange(n, device=q.device)
        keys = query[:, None] + torch.arange(1 - self.size, 1, device=q.device)  # (N, size)
        first = torch.zeros_like(query)
        if cu_seqlens is not None:
            ends = check_cu_seqlens(cu_seqlens, n, batch).long()
            first = ends[torch.searchsorted(ends, query, right=True) - 1]
        seen = keys >= first[:, None]
        keys = keys.clamp(min=0)
        grouped = q.reshape(batch, kv_heads, -1, n, width)
        scores = torch.einsum("bgrnd,bgnsd->bgrns", grouped, k[:, :, keys]) * width**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("bgrns,bgnsd->bgrnd", weights, v[:, :, keys]).flatten(1, 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for i in range(q.shape[2]):
            low = max(0, i + 1 - self.size)
            heads = []
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = (k[:, g, low : i + 1] * q[:, h, i, None]).sum(-1) / q.shape[3] ** 0.5
                weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
                heads.append((weights[..., None] * v[:, g, low : i + 1]).sum(1) / weights.sum(1, keepdim=True))
            rows.append(torch.stack(heads, 1))
        return torch.stack(rows, 2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        k, v = k[:, :, -self.size :], v[:, :, -self.size :]
        grouped = q.unflatten(1, (k.shape[1], -1))
        weights = (torch.einsum("bgrnd,bgsd->bgrns", grouped, k) * q.shape[3] ** -0.5).softmax(-1)
        return torch.einsum("bgrns,bgsd->bgrnd", weights, v).flatten(1, 2), (k, v)

    def kept(self, num_tokens: int) -> Tensor:
        return (torch.arange(num_tokens) >= num_tokens - self.size).expand(self.dims.num_kv_heads, -1)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return Window(self.size).plan(q.shape[2], k.shape[2], block=(16, 16))

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 8), 23),
            Case(Dims(4, 4, num_kv_heads=2), 31, {"size": 7}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> Mapping[str, Any] | None:
        return {"size": length}

    @claim("The work grows linearly with the length of the sequence.")
    def linear_work(cls) -> Finding:
        pairs = [int(Window(5).dense(n).sum()) for n in (64, 128)]
        return Finding(pairs[1] < 3 * pairs[0], f"{pairs[1] / pairs[0]:.2f} times the pairs at twice the length")


class Decayed(Mixer):
    """A gated running sum with a learned decay a channel.

        h_t = a * h_{t-1} + W x_t,   a = sigmoid(decay),   y_t = U h_t + b

    x (B, N, C) -> y (B, N, C); decay (C,), W, U (C, C), b (C,).
    Paper: arXiv 2303.06349, section 3. Deviations: real, no normalisation.
    start: initial value of `decay` (default 1.0). Costs N * C * C, and N * N * C for the sum, which is dense here.

    >>> tuple(Decayed(Dims(num_heads=2, head_dim=4))(torch.randn(1, 5, 8)).shape)
    (1, 5, 8)
    """

    spec = Spec(
        id="decayed",
        name="Decayed sum",
        title="Resurrecting Recurrent Neural Networks for Long Sequences",
        paper="2303.06349",
        year=2023,
        family="testing",
        uses=("Causal", "Documents"),
    )
    causal = True

    def __init__(self, dims: Dims, *, start: float = 1.0) -> None:
        super().__init__(dims)
        self.decay = nn.Parameter(torch.full((dims.dim,), float(start)))
        self.read = nn.Linear(dims.dim, dims.dim, bias=False)
        self.write = nn.Linear(dims.dim, dims.dim)

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        pattern: Pattern = Causal()
        if cu_seqlens is not None:
            pattern &= Documents(check_cu_seqlens(cu_seqlens, n, len(x)))
        at = torch.arange(n, device=x.device)
        ago, reach = at[:, None] - at, pattern.allows(at[:, None], at, n)
        log_decay = nn.functional.logsigmoid(self.decay)
        powers = torch.where(reach[..., None], (ago.clamp(min=0)[..., None] * log_decay).exp(), 0.0)
        return self.write(torch.einsum("tsc,bsc->btc", powers.to(x.dtype), self.read(x)))

    def oracle(self, x: Tensor) -> Tensor:
        state, rows = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(self.decay) * state + x[:, t] @ self.read.weight.T
            rows.append(state @ self.write.weight.T + self.write.bias)
        return torch.stack(rows, 1)

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        kept = 0.0 if state is None else torch.sigmoid(self.decay) * state
        state = kept + self.read(x)
        return self.write(state), state

    @classmethod
    def cases(cls) -> list[Case]:
        return [Case(Dims(2, 4), 13), Case(Dims(1, 5), 19, {"start": 2.0}, batch=3)]

    @claim("The memory fades.")
    def fades(cls) -> Finding:
        weights = torch.sigmoid(torch.tensor(1.0)) ** torch.arange(50)
        return Finding(bool(weights[-1] < weights[0]), f"{float(weights[-1]):.1e} of a token is left after 49 steps")


class Thrifty(Cached):
    """Holds the keys of the smallest norms, and recent ones.

        a step attends to held keys and itself, o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j; then the key of the
        largest norm goes, as long as more than budget are held

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). Paper: arXiv 2406.11430, section 4. Deviations: it evicts
    while decoding, too. budget: a part of the tokens, or tokens (0.5). recent: tokens that stay (2). decoded: tokens
    that are decoded (16). Costs N^2 / 2 pairs of the prompt, then budget N a token.

    >>> x = torch.randn(1, 2, 20, 4)
    >>> Thrifty(Dims(2, 4), budget=6)(x, x, x).shape
    torch.Size([1, 2, 20, 4])
    """

    spec = Spec(
        id="thrifty",
        name="Small norms",
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        paper="2406.11430",
        year=2024,
        family="testing",
        uses=("Cached", "Evict", "KeyNorm"),
        discrete=True,
    )

    def __init__(self, dims: Dims, *, budget: float | int = 0.5, recent: int = 2, decoded: int = 16) -> None:
        super().__init__(dims, decoded=decoded)
        self.budget = budget
        self.policy = Evict(KeyNorm(), budget, recent=recent, every=1)
        self.recent = recent

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        norms, n = k.detach().square().sum(-1), q.shape[2]

        def keep(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            count = int(self.budget * (t + 1) + 0.5) if isinstance(self.budget, float) else self.budget
            return [
                sorted(sorted(row, key=lambda j: (j <= t - self.recent, float(norms[b, g, j])))[:count])
                for g, row in enumerate(held)
            ]

        return replay(q, k, v, max(1, n - self.decoded), keep)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"budget": 0.3, "decoded": 11}),
            Case(Dims(2, 4), 23, {"budget": 7, "recent": 3, "decoded": 5}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> Mapping[str, Any] | None:
        return {"budget": 1.0}

    @claim("As many keys are held as the budget says.")
    def meets_budget(cls) -> Finding:
        thrifty, x = cls(Dims(2, 4), budget=0.25), torch.randn(1, 2, 64, 4)
        session = thrifty.session()
        thrifty.read(session, x, x, x)
        held = int(thrifty.held(session).sum())
        return Finding(held == 2 * 16, f"{held} of 128 keys")
