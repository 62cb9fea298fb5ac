"""MiniMax-M1: of eight layers, seven read the past from a decaying memory and one attends to all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, rotated
from saccade.errors import known, positive
from saccade.hosts.constant import Constant
from saccade.hosts.stack import Stack, SwiGLU, interleave
from saccade.mix import turn_at
from saccade.scan import UNTRACKED, State, linear_attention
from saccade.where import Causal


@dataclass(frozen=True)
class Cache:
    """Keys, turned by their positions, and values of the tokens so far, (B, Hkv, tokens, D)."""

    keys: Tensor
    values: Tensor


class Lightning(nn.Module):
    """The layer with a memory: x (B, N, C) and the `State` before -> y and the `State` after."""

    def __init__(self, dims: Dims, slopes: list[float], chunk: int) -> None:
        super().__init__()
        c = dims.dim
        self.num_heads, self.chunk = dims.num_heads, chunk
        self.decays = Constant(-torch.tensor(slopes, dtype=torch.float64))
        self.qkv, self.gate = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.norm, self.out = nn.RMSNorm(c, eps=1e-6), nn.Linear(c, c, bias=False)

    def read(self, x: Tensor, state: State | None = None, backend: str = "auto") -> tuple[Tensor, State]:
        """o (B, H, N, D) and the memory after the last token."""
        q, k, v = F.silu(self.qkv(x)).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, 1)
        decay = self.decays.value.to(torch.promote_types(x.dtype, torch.float32))
        options: Any = {"log_decay": decay, "state": state or UNTRACKED, "return_state": True}
        return cast(tuple[Tensor, State], linear_attention(q, k, v, chunk=self.chunk, backend=backend, **options))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        o, state = self.read(x, state)
        return self.out(self.norm(o.transpose(1, 2).flatten(2)) * self.gate(x).sigmoid()), state


class Softmax(nn.Module):
    """The layer with a cache: x (B, N, C) and the `Cache` before -> y and the `Cache` after."""

    def __init__(self, dims: Dims, rotary: int, theta: float) -> None:
        super().__init__()
        d = self.dims = dims
        self.rotary, self.theta = rotary, theta
        self.qkv = nn.Linear(d.dim, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, bias=False)
        self.out = nn.Linear(d.dim, d.dim, bias=False)

    def forward(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = self.dims.split(self.qkv(x))
        start = 0 if state is None else state.keys.shape[2]
        q, k = (turn_at(t, start, self.theta, self.rotary) for t in (q, k))
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        return self.out(attend(q, k, v, Causal()).transpose(1, 2).flatten(2)), Cache(k, v)


class DeepNorm(nn.Module):
    """The model's residual block: y = norm(x), x <- alpha y + mixer(y), then the same with an MLP; x (B, N, C)."""

    def __init__(self, dims: Dims, mixer: nn.Module, alpha: float) -> None:
        super().__init__()
        self.mixer, self.mlp, self.alpha = mixer, SwiGLU(dims.dim, 3 * dims.dim), alpha
        self.norm_mixer, self.norm_mlp = nn.RMSNorm(dims.dim, eps=1e-5), nn.RMSNorm(dims.dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_mixer(x)
        y = self.norm_mlp(self.alpha * y + self.mixer(y))
        return self.alpha * y + self.mlp(y)

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        y = self.norm_mixer(x)
        mixed, state = self.mixer.step(y, state=state)  # type: ignore[operator]
        y = self.norm_mlp(self.alpha * y + mixed)
        return self.alpha * y + self.mlp(y), state


class MiniMaxM1(Mixer):
    """The attention of layer `layer` of a hybrid stack: lightning, or softmax where `every` divides layer + 1.

        lightning: q, k, v = silu(W x),   S_t = a_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t
                   y_t = W_o (RMSNorm(o_t) * sigmoid(W_g x_t)),
                   log a_h = -2^(-8 h / H) (1 - layer / (num_layers - 1) + 1e-5),   h = 1 .. H
        softmax:   y_t = W_o sum_{j <= t} softmax_j(R_t q_t . R_j k_j / sqrt(D)) v_j

    x, y (B, N, C). Lightning: q, k, v (B, H, N, D), S (B, H, D, D), RMSNorm over all heads with a weight, no positions
    but the decay. Softmax: q (B, H, N, D), k, v (B, Hkv, N, D); R_t turns the first `rotary` channels of a head, in two
    halves, by t theta^(-2 i / rotary). Paper: arXiv 2506.13585; the layers follow the model's published code, where a
    block is y = norm(x), x <- alpha y + attention(y) with alpha = (2 num_layers)^(1/4), then the same with a mixture of
    experts: `model`. Deviations: where H is no power of two the code interleaves two series of slopes,
    here the one formula serves every H.
    layer: counted from 0 (0). num_layers: 80. every: 8. rotary: an even number of channels (None: half of D, or one
    less). theta: 1e7. chunk: tokens a matrix product takes at once (256), of no effect on the result.
    Costs D^2 + chunk D a token and head for lightning, N D for softmax; a state of D^2 numbers a head, or of 2 D a
    token and key head.
    Errors: ValueError for a layer that there is not, for a rotary that is odd or above D, for theta <= 0.

    >>> kinds = [type(MiniMaxM1(Dims(2, 4), layer=i).inner).__name__ for i in range(9)]
    >>> kinds.count("Lightning"), kinds[7]
    (8, 'Softmax')
    """

    spec = Spec(
        id="minimax_m1",
        name="MiniMax-M1 (hybrid lightning attention)",
        title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        paper="2506.13585",
        year=2025,
        family="linear",
        uses=("linear_attention", "attend", "turn_at"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        layer: int = 0,
        num_layers: int = 80,
        every: int = 8,
        rotary: int | None = None,
        theta: float = 1e7,
        chunk: int = 256,
    ) -> None:
        super().__init__(dims)
        if positive("layer", layer, least=0) >= positive("num_layers", num_layers):
            raise ValueError(f"layer: got {layer} of num_layers {num_layers}; layers count from 0")
        turned = dims.head_dim // 4 * 2 if rotary is None else positive("rotary", rotary, least=0)
        if turned % 2 or turned > dims.head_dim:
            raise ValueError(f"rotary: got {rotary} for head_dim {dims.head_dim}; pass an even number up to it")
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        self.layer, self.num_layers, self.rotary, self.theta = layer, num_layers, turned, theta
        self.inner: Lightning | Softmax
        positive("chunk", chunk)
        if (layer + 1) % positive("every", every):
            depth, heads = 1 - layer / max(1, num_layers - 1) + 1e-5, dims.num_heads
            self.inner = Lightning(dims, [2 ** (-8 * h / heads) * depth for h in range(1, heads + 1)], chunk)
        else:
            self.inner = Softmax(dims, turned, theta)

    def compute(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]

    def step(self, x: Tensor, *, state: State | Cache | None = None) -> tuple[Tensor, State | Cache]:
        return cast(tuple[Tensor, State | Cache], self.inner(x, state))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        projected = x @ w["inner.qkv.weight"].T
        if "inner.gate.weight" in w:
            q, k, v = (projected / (1 + torch.exp(-projected))).view(*x.shape[:2], 3, d.num_heads, -1).unbind(2)
            slopes = 0.5 ** (8 * torch.arange(1, d.num_heads + 1, dtype=x.dtype) / d.num_heads)
            left = torch.exp(-slopes * (1 - self.layer / max(1, self.num_layers - 1) + 1e-5))
            memory = torch.zeros(()).to(x)
            for t in range(x.shape[1]):
                memory = left[:, None, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
                o = (q[:, t, :, :, None] * memory).sum(-2).flatten(1)
                o = o / ((o * o).mean(-1, keepdim=True) + 1e-6) ** 0.5 * w["inner.norm.weight"]
                gate = 1 / (1 + torch.exp(-x[:, t] @ w["inner.gate.weight"].T))
                rows.append((o * gate) @ w["inner.out.weight"].T)
            return torch.stack(rows, 1)
        heads, at = projected.split(d.head_dim, -1), torch.arange(x.shape[1])
        rates = [self.theta ** (-2 * i / self.rotary) for i in range(self.rotary // 2)]
        for h in range(d.num_heads):
            g = d.num_heads + h // (d.num_heads // d.num_kv_heads)
            q, k, v = rotated(heads[h], at, rates), rotated(heads[g], at, rates), heads[g + d.num_kv_heads]
            scores = torch.einsum("bid,bjd->bij", q, k) / d.head_dim**0.5
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            rows.append(scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v)
        return torch.cat(rows, -1) @ w["inner.out.weight"].T

    @classmethod
    def cases(cls) -> list[Case]:
        softmax = {"layer": 2, "num_layers": 5, "every": 3, "rotary": 4, "theta": 50.0, "chunk": 3}
        return [
            Case(Dims(3, 5), 37, {"layer": 3, "num_layers": 5, "every": 3, "chunk": 8}),
            Case(Dims(4, 6, num_kv_heads=2), 23, softmax),
            Case(Dims(2, 4), 19, {"layer": 7}, batch=1),
            Case(Dims(2, 3), 13, {"num_layers": 1}, batch=1),
        ]

    @classmethod
    def model(cls, name: str = "small", *, params: dict[str, Any] | None = None, **host: Any) -> nn.Module:
        """A language model over bytes: "small" (7.2 million parameters), the eight layers of one turn.

        It is a size of ours, so that there is no published count: C 256, 8 heads, 1 key head, in place of C 6144, 64
        heads of 128 and 8 key heads. One SwiGLU as wide as two experts, 3 C, stands for the mixture of experts.
        params: parameters of every layer. host: keywords of `Stack`.
        """
        known("name", name, ("small",))
        given = {"num_layers": 8, **(params or {})}
        alpha = (2 * given["num_layers"]) ** 0.25
        paper = {
            "dims": Dims(8, 32, num_kv_heads=1),
            "layers": interleave(given["num_layers"], (1, lambda dims, layer: cls(dims, **{"layer": layer, **given}))),
            "block": lambda dims, mixer: DeepNorm(dims, mixer, alpha),
        }
        return Stack(**{**paper, **host})

    @claim("The cache that grows with the context is 1/8 of that of softmax layers alone.")
    def eighth(cls) -> Finding:
        dims, x = Dims(4, 8, num_kv_heads=2), torch.randn(1, 64, 32)

        def held(layer: int, every: int, tokens: int) -> int:
            module = cls(dims, layer=layer, num_layers=8, every=every).requires_grad_(False)
            _, state = module.inner(x[:, :tokens])
            parts = (state.keys, state.values) if isinstance(state, Cache) else (state.memory,)
            return sum(part.numel() for part in parts)

        hybrid, alone = ([sum(held(i, every, n) for i in range(8)) for n in (1, 64)] for every in (8, 1))
        grows = [(sizes[1] - sizes[0]) / 63 for sizes in (hybrid, alone)]
        constant = hybrid[0] - grows[0]
        holds = 8 * grows[0] == grows[1] and constant == 7 * 4 * 8 * 8
        return Finding(holds, f"{grows[0]:g} numbers a token beside {grows[1]:g}, and {constant:g} once, of 8 layers")

    @claim("Block by block, the prompt gives what the recurrence gives token by token, for any length.")
    def blocks(cls) -> Finding:
        worst, x = 0.0, torch.randn(1, 517, 32, dtype=torch.float64)
        for layer in (0, 6, 78):
            inner = cls(Dims(4, 8), layer=layer).double().requires_grad_(False).inner
            assert isinstance(inner, Lightning)
            for n in (1, 255, 256, 257, 517):
                exact = inner.read(x[:, :n], backend="reference")[0]
                worst = max(worst, apart(inner.read(x[:, :n])[0], exact))
        return Finding(worst < 517 * torch.finfo(x.dtype).eps, f"largest difference {worst:.1e} of the largest output")

    @claim("Layers forget the less the deeper they lie, the last hardly at all.")
    def memory_length(cls) -> Finding:
        lives = []
        for layer in (0, 40, 79):
            inner = cls(Dims(64, 1), layer=layer, every=100).inner
            assert isinstance(inner, Lightning)
            lives.append(-1 / inner.decays.value)
        median = [float(life.median()) for life in lives]
        holds = bool((lives[0] < lives[1]).all() and (lives[1] < lives[2]).all()) and float(lives[2].min()) > 1e4
        return Finding(
            holds, f"median of {median[0]:.0f}, {median[1]:.0f} and {median[2]:.1e} tokens at layer 0, 40, 79"
        )
