"""Hedgehog: linear attention with a small trained map a head, taught to give the weights of softmax attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known
from saccade.scan import LogFeatures, State, Sum, features, linear_attention

# Of each feature, as in the authors' code; a query and a key with no feature in common would else have no weight.
LEAST = 1e-12


class HeadMaps(nn.Module):
    """W x for each head with a matrix of its own, the identity at first; x (B, H, N, D)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).mT


class ExpMaps(LogFeatures):
    """[exp(W x), exp(-W x)], W of its own for queries and for keys."""

    def __init__(self, query: nn.Module, key: nn.Module) -> None:
        self.query, self.key = query, key

    def log_query(self, x: Tensor) -> Tensor:
        return features.ExpPair().log_query(self.query(x))

    def log_key(self, x: Tensor) -> Tensor:
        return features.ExpPair().log_query(self.key(x))


ACTIVATIONS: dict[str, features.Map | None] = {
    "softmax": features.softmax_pair,
    "joint": features.softmax_joint,
    "exp": None,
}


class Hedgehog(Attention):
    """Linear attention with learned features, spiky and rising with q . k as softmax's weights are.

        o_i = sum_j phi(q_i) . phi'(k_j) v_j / sum_j phi(q_i) . phi'(k_j),   j <= i when causal
        "softmax": phi(x) = [softmax(W x), softmax(-W x)]        "joint": phi(x) = softmax([W x, -W x])
        "exp": phi(x) = [exp(W x), exp(-W x)]

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal; W (H, D, D) for queries,
    another (Hkv, D, D) for keys, both the identity at first. To convert a model, train the maps alone until `weights`
    has a small cross-entropy to the softmax weights, then finetune. Paper: arXiv 2402.04347; the maps follow
    the authors' later code (HazyResearch/lolcats), "joint" is what flash-linear-attention calls by this name.
    Deviations: no bias in the maps, as in both codes; in "exp" keys are scaled by their running maximum, which cancels,
    where lolcats takes each token's own, which does not; that code repeats shared key heads and maps each copy alone.
    activation: "softmax" (default), "joint" or "exp". tied: one W for queries and keys (False). causal: True.
    Costs D^2 + 2 D (D + Dv) a token and head; a state of 2 D (Dv + 1) numbers a key head to decode.
    Errors: ValueError for M != N when causal, for tied maps of key heads that are shared.

    >>> layer = Hedgehog(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="hedgehog",
        name="Hedgehog",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        paper="2402.04347",
        year=2024,
        family="linear",
        uses=("linear_attention", "ExpPair", "Sum"),
    )
    causal = True
    per_head = True
    log_decay: Tensor | None = None  # of no token; it and the rate are what a conversion asks for
    rate = 1e-2

    def __init__(self, dims: Dims, *, activation: str = "softmax", tied: bool = False, causal: bool = True) -> None:
        super().__init__(dims)
        if tied and dims.group > 1:
            raise ValueError(
                f"tied: got True for {dims.num_heads} query and {dims.num_kv_heads} key heads; "
                "one matrix a head needs as many of both"
            )
        self.causal, self.activation = causal, known("activation", activation, ACTIVATIONS)
        self.query = HeadMaps(dims.num_heads, dims.head_dim)
        self.key = self.query if tied else HeadMaps(dims.num_kv_heads, dims.head_dim)

    def feature_map(self) -> tuple[features.Map, features.Map] | LogFeatures:
        """phi for queries and for keys."""
        act = ACTIVATIONS[self.activation]
        if act is None:
            return ExpMaps(self.query, self.key)
        return lambda q: act(self.query(q)).clamp_min(LEAST), lambda k: act(self.key(k)).clamp_min(LEAST)

    @classmethod
    def to_fit(cls, dims: Dims) -> Hedgehog:
        """What a conversion of softmax attention trains in a layer: W for queries and keys, as the paper does (4.2)."""
        return cls(dims)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights of all pairs (B, H, N, M), which training compares with those of a softmax."""
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        return self.compute(q, k, one_hot.expand(*k.shape[:2], -1, -1))

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        o = linear_attention(
            q, k, v, feature_map=self.feature_map(), normalizer=Sum(), causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal Hedgehog decodes token by token")
        after = linear_attention(
            q, k, v, feature_map=self.feature_map(), normalizer=Sum(), state=state, return_state=True
        )
        return cast(tuple[Tensor, State], after)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = dict(self.named_parameters())
        rows, group = [], q.shape[1] // k.shape[1]

        def phi(x: Tensor, matrix: Tensor) -> Tensor:
            y = torch.stack([(matrix[c] * x).sum(-1) for c in range(len(matrix))], -1)
            e, f = y.exp(), (-y).exp()
            if self.activation == "softmax":
                e, f = e / e.sum(-1, keepdim=True), f / f.sum(-1, keepdim=True)
            if self.activation == "joint":
                e, f = (each / (e + f).sum(-1, keepdim=True) for each in (e, f))
            return torch.cat([e, f], -1)

        for h in range(q.shape[1]):
            g = h // group
            query = phi(q[:, h], w["query.weight"][h])
            key, value = phi(k[:, g], w.get("key.weight", w["query.weight"])[g]), v[:, g]
            for i in range(q.shape[2]):
                seen = slice(i + 1) if self.causal else slice(None)
                weights = (query[:, i, None] * key[:, seen]).sum(-1, keepdim=True)
                rows.append((weights * value[:, seen]).sum(1) / weights.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 5, num_kv_heads=2), 37),
            Case(Dims(2, 6), 23, {"activation": "joint", "tied": True}, batch=1),
            Case(Dims(2, 4), 29, {"activation": "exp"}, batch=1),
        ]

    @claim("After a short distillation the weights are far closer to softmax's than those of fixed features.")
    def mimics_softmax(cls) -> Finding:
        figures, worst = [], 0.0
        (q, k), exact = cls._unseen(1.0)
        fixed = [cls._divergence(cls._fixed(phi, q, k), exact) for phi in (features.elu1, torch.relu)]
        for activation in ACTIVATIONS:
            before = cls._divergence(cls(Dims(2, 8), activation=activation).weights(q, k), exact)
            after = cls._divergence(cls._distilled(activation, 1.0).weights(q, k), exact)
            figures.append(f"{activation} {before:.3f} to {after:.3f}")
            worst = max(worst, after / min(before, *fixed))
        figure = f"KL on unseen rows: {', '.join(figures)}; elu + 1 {fixed[0]:.3f}, relu {fixed[1]:.3f}"
        return Finding(worst < 1 / 2, figure)

    @claim("Its rows are spiky and rise with q . k, more nearly as softmax's than those of elu + 1.")
    def spiky_and_monotone(cls) -> Finding:
        (q, k), exact = cls._unseen(2.0)
        maps = {name: cls._distilled(name, 2.0).weights(q, k) for name in ACTIVATIONS} | {
            "elu + 1": cls._fixed(features.elu1, q, k)
        }
        spread = {name: float(-(w * w.clamp_min(LEAST).log()).sum(-1).mean()) for name, w in maps.items()}
        least = float(-(exact * exact.clamp_min(LEAST).log()).sum(-1).mean())
        # Ranks among the keys of the last row, which sees all.
        order = (q[:, :, -1:] @ k.mT).argsort(-1).argsort(-1).flatten()
        ranks = {name: w[:, :, -1:].argsort(-1).argsort(-1).flatten() for name, w in maps.items()}
        rise = {name: float(torch.corrcoef(torch.stack([order, r]).double())[0, 1]) for name, r in ranks.items()}
        figure = ", ".join(f"{name} {spread[name]:.2f} and {rise[name]:.2f}" for name in maps)
        holds = all(least < spread[a] < spread["elu + 1"] and rise[a] > rise["elu + 1"] for a in ACTIVATIONS)
        return Finding(holds, f"entropy of softmax {least:.2f}; entropy and rank correlation with q . k: {figure}")

    @claim("The memory gives what all weights give, and does not grow: 2 D (D + 1) numbers a head.")
    def linear(cls) -> Finding:
        apart, sizes, n = 0.0, [], 96
        q, k, v = torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for activation in ACTIVATIONS:
            layer = cls._distilled(activation, 1.0).double()
            phi = [torch.cat([y, -y], -1) for y in (layer.query(q), layer.key(k))]
            if activation == "joint":
                phi = [y.softmax(-1) for y in phi]
            elif activation == "softmax":
                phi = [y.unflatten(-1, (2, -1)).softmax(-1).flatten(-2) for y in phi]
            else:
                phi = [y.exp() for y in phi]
            pairs = (phi[0] @ phi[1].mT).tril()
            apart = max(apart, float((layer(q, k, v) - pairs @ v / pairs.sum(-1, keepdim=True)).abs().max()))
            sizes += [layer.step(*(x[:, :, :m] for x in (q, k, v)))[1].memory[0, 0].numel() for m in (1, n)]
        holds = apart < n * torch.finfo(q.dtype).eps * float(v.abs().max()) and set(sizes) == {2 * 8 * 9}
        return Finding(holds, f"largest difference {apart:.1e}; {sizes[0]} numbers after 1 token, {sizes[1]} after {n}")

    @staticmethod
    def _tokens(seed: int, size: float) -> tuple[Tensor, Tensor]:
        """q, k (4, 2, 48, 8), projections of tokens of 3 dimensions; the projections are always the same."""
        maps = size * torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0)) / 3**0.5
        x = torch.randn(4, 1, 48, 3, generator=torch.Generator().manual_seed(seed))
        return x @ maps[0], x @ maps[1]

    @staticmethod
    def _softmax(q: Tensor, k: Tensor) -> Tensor:
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(ahead, -torch.inf).softmax(-1)

    @classmethod
    def _unseen(cls, size: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Queries and keys that no training meets, and their softmax weights."""
        q, k = cls._tokens(0, size)
        return (q, k), cls._softmax(q, k)

    @classmethod
    def _distilled(cls, activation: str, size: float) -> Hedgehog:
        layer = cls(Dims(2, 8), activation=activation)
        with torch.enable_grad():
            adam = torch.optim.Adam(layer.parameters(), lr=0.05)
            for seed in range(1, 81):
                q, k = cls._tokens(seed, size)
                loss = -(cls._softmax(q, k) * layer.weights(q, k).clamp_min(LEAST).log()).sum(-1).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
        return layer.requires_grad_(False)

    @staticmethod
    def _fixed(phi: features.Map, q: Tensor, k: Tensor) -> Tensor:
        pairs = (phi(q) @ phi(k).mT).clamp_min(LEAST).tril()
        return pairs / pairs.sum(-1, keepdim=True)

    @staticmethod
    def _divergence(weights: Tensor, exact: Tensor) -> float:
        """KL(exact | weights), averaged over rows."""
        weights = weights.detach().clamp_min(LEAST)
        return float((exact * (exact.clamp_min(LEAST) / weights).log()).sum(-1).mean())
