"""Trainable feed-forward kernel: linear attention whose feature map is a small network of its own in each head."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, work
from saccade.errors import known, positive
from saccade.scan import State, linear_attention


class HeadwiseKernel(nn.Module):
    """phi (B, heads, N, D) -> (B, heads, N, D) with weights a key head; heads are Hkv or a multiple of it.

    Layers x <- a(x W) or, with a gate, x <- a(x W) * sigmoid(x G), G = A B of rank r for "low_rank".
    """

    def __init__(self, dims: Dims, kernel: str, depth: int, rank: int) -> None:
        super().__init__()
        heads, d = dims.num_kv_heads, dims.head_dim
        self.kernel = kernel
        wide = torch.stack([nn.init.orthogonal_(torch.empty(d, d)) for _ in range(depth * heads)])
        self.weight = nn.Parameter(wide.unflatten(0, (depth, heads)))
        shapes = {"ff": [], "glu": [(d, d)], "low_rank": [(d, rank), (rank, d)]}[kernel]
        self.gates = nn.ParameterList(torch.randn(depth, heads, *shape) * (2 / shape[0]) ** 0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.weight.shape[1], -1))
        for layer, weight in enumerate(self.weight):
            y = x @ weight[:, None].to(x.dtype)
            # Between gated layers there is no other nonlinearity.
            y = F.softplus(y) if self.kernel == "ff" or layer + 1 == len(self.weight) else y
            if self.gates:
                for gate in self.gates:
                    x = x @ gate[layer][:, None].to(x.dtype)
                y = y * x.sigmoid()
            x = y
        return x.flatten(1, 2)

    def penalty(self) -> Tensor:
        """The mean of (W W^T - I)^2 over the entries and heads, summed over the layers."""
        apart = self.weight @ self.weight.mT - torch.eye(self.weight.shape[-1]).to(self.weight)
        return apart.square().mean((1, 2, 3)).sum()


class TrainableFFKernel(Attention):
    """Linear attention whose feature map is trained: a feed-forward kernel in each head, positive at its end.

        o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),   j <= i when causal
        phi(x) = x_L,   x_0 = x,   x_l = a_l(x_{l-1} W_l) * sigmoid(x_{l-1} G_l),   a_L = softplus

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), M = N when causal. W_l, G_l (D, D) are those
    of a key head, for keys and the queries that read them; W_l is orthogonal at first, and `penalty` keeps it near
    that: mean (W W^T - I)^2, to be added to the loss. Paper: arXiv 2211.04076. Which layers there are, their start and
    the penalty follow the first author's notebooks (lra_efficient_transformers), which divide both features by sqrt(D)
    after the map; that cancels.
    Deviations: no dropout before the layers. Heads may share keys, and then share the kernel.
    causal: False. kernel: "ff" (no gate; every a_l is softplus), "glu" (the gate as above; a_l is the identity but for
    the last) or "low_rank" (likewise, G_l = A_l B_l) (default "glu"). depth: L (1). gate_rank: columns of A_l (None:
    D // 4, at least 1; "low_rank" only).
    Costs 2 N D (D L + Dv) a head, and as much again for the gates. A state of D (Dv + 1) numbers a key head to decode.
    Errors: ValueError for an unknown kernel, for a gate_rank without "low_rank", for M != N when causal, and for a
    step when not.

    >>> layer = TrainableFFKernel(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="trainable_ff_kernel",
        name="Trainable feedforward kernel",
        title="Linear Self-Attention Approximation via Trainable Feedforward Kernel",
        paper="2211.04076",
        year=2022,
        family="linear",
        uses=("linear_attention",),
    )
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        causal: bool = False,
        kernel: str = "glu",
        depth: int = 1,
        gate_rank: int | None = None,
    ) -> None:
        super().__init__(dims)
        known("kernel", kernel, ("ff", "glu", "low_rank"))
        if gate_rank is not None and kernel != "low_rank":
            raise ValueError(f'gate_rank: got {gate_rank} with kernel="{kernel}"; only "low_rank" has gates of a rank')
        rank = max(1, dims.head_dim // 4) if gate_rank is None else positive("gate_rank", gate_rank)
        self.causal = causal
        self.features = HeadwiseKernel(dims, kernel, positive("depth", depth), rank)

    def penalty(self) -> Tensor:
        """How far the weights are from orthogonal; a term for the loss."""
        return self.features.penalty()

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        o = linear_attention(
            q, k, v, feature_map=self.features, normalizer="sum", causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("causal: got False; only with causal=True it decodes token by token")
        after = linear_attention(q, k, v, feature_map=self.features, normalizer="sum", state=state, return_state=True)
        return cast(tuple[Tensor, State], after)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, group = dict(self.named_parameters()), q.shape[1] // k.shape[1]
        weight, depth = w["features.weight"], len(w["features.weight"])
        gates = [w[name] for name in sorted(w) if "gates" in name]

        def phi(x: Tensor, head: int) -> Tensor:
            for layer in range(depth):
                y = x @ weight[layer, head]
                if not gates or layer == depth - 1:
                    y = torch.log(1 + torch.exp(y))
                if gates:
                    logits = x
                    for gate in gates:
                        logits = logits @ gate[layer, head]
                    y = y / (1 + torch.exp(-logits))
                x = y
            return x

        rows = []
        for h in range(q.shape[1]):
            head = h // group
            query, key, value = phi(q[:, h], head), phi(k[:, head], head), v[:, head]
            for i in range(q.shape[2]):
                seen = slice(i + 1) if self.causal else slice(None)
                weights = (query[:, i, None] * key[:, seen]).sum(-1, keepdim=True)
                rows.append((weights * value[:, seen]).sum(1) / weights.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 4, num_kv_heads=2), 13, {"causal": True, "kernel": "ff", "depth": 2}, batch=1),
            Case(Dims(2, 5), 19),
            Case(Dims(2, 6), 11, {"kernel": "low_rank", "depth": 3, "gate_rank": 2}),
        ]

    @claim("Any such kernel gives weights that are not negative and rows that sum to 1, in work linear in the tokens.")
    def weighs(cls) -> Finding:
        least, apart, costs = 1.0, 0.0, []
        for kernel in ("ff", "glu", "low_rank"):
            q, k, _ = cls._inputs()
            weights = cls._layer(kernel=kernel, depth=2)(q, k, torch.eye(96, dtype=q.dtype).expand(1, 2, -1, -1))
            least, apart = min(least, float(weights.min())), max(apart, float((weights.sum(-1) - 1).abs().max()))
        costs = [work(partial(cls(Dims(1, 8)), *torch.ones(3, 1, 1, length, 8))).all for length in (512, 1024)]
        holds = least >= 0 and apart < 96 * torch.finfo(torch.float64).eps and costs[1] == 2 * costs[0]
        figure = f"least weight {least:.1e}, sums within {apart:.1e} of 1"
        return Finding(holds, f"{figure}; {costs[1] / costs[0]:.2f} times the work at twice N")

    @claim("A gate with G = 0 changes nothing: its factor 1/2 cancels.")
    def shut_gate(cls) -> Finding:
        inputs, apart = cls._inputs(), 0.0
        plain = cls._layer(kernel="ff")(*inputs)
        for kernel in ("glu", "low_rank"):
            layer = cls._layer(kernel=kernel)
            layer.features.gates[0].zero_()
            apart = max(apart, float((layer(*inputs) - plain).abs().max()))
        return Finding(apart < 8 * torch.finfo(plain.dtype).eps, f"largest difference {apart:.1e}")

    @claim("The penalty is 0 at the start, and descending it brings weights back to orthogonal ones.")
    def orthogonal(cls) -> Finding:
        layer, noise = cls._layer(kernel="glu", depth=2), torch.Generator().manual_seed(1)
        weight, found = layer.features.weight.requires_grad_(), [float(layer.penalty().detach())]
        with torch.no_grad():
            weight += 0.2 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
        for _ in range(100):
            with torch.enable_grad():
                apart = layer.penalty()
                (slope,) = torch.autograd.grad(apart, weight)
            found.append(float(apart.detach()))
            with torch.no_grad():
                weight -= 4 * slope
        start, far, end = found[0], found[1], found[-1]
        # The weights were drawn in float32.
        holds = start < (8 * torch.finfo(torch.float32).eps) ** 2 and end < far / 100
        return Finding(holds, f"{start:.1e} at the start, {far:.2f} after noise, {end:.1e} after 100 steps")

    @classmethod
    @torch.no_grad()
    def _layer(cls, *, kernel: str, depth: int = 1) -> TrainableFFKernel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(Dims(2, 8), kernel=kernel, depth=depth).double().requires_grad_(False)

    @staticmethod
    def _inputs() -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 2, 96, 8, generator=random, dtype=torch.float64).unbind()
