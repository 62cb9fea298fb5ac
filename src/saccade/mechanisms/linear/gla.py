"""Gated linear attention: a memory of keys and values with one data-dependent decay a key channel."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.scan import UNTRACKED, State, linear_attention
from saccade.scan.decays import gate_logsigmoid


class GLA(Mixer):
    """Gated linear attention: a linear recurrence whose memory forgets by channel, as the token says.

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   a_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)
        y_t = W_o (LN(o_t) * silu(W_r x_t + b_r))

    x, y (B, N, C); q (B, H, N, Dk), k, a (B, Hkv, N, Dk), v (B, Hkv, N, Dv); LN is per head and has no weights. Paper:
    arXiv 2312.06635, equations 3 and 4 and section 4.4; compared with the authors' first code (berlino's
    gated_linear_attention) and with their later layer in flash-linear-attention. Deviations: the latter has an RMSNorm
    with a weight for LN and no b_r, the equations are followed here; no scale of keys, which LN would undo. Keys,
    values and gates may be shared by query heads, as in the later layer.
    expand_k, expand_v: Dk = expand_k D (0.5) and Dv = expand_v D (1.0). gate_rank: rows of W_1 (16). tau: 16.0; the
    larger, the longer the memory. chunk: tokens a matrix product takes at once (64), of no effect on the result.
    Costs Dk Dv a token and head, and chunk (Dk + Dv) for the products; a state of Dk Dv numbers a key head to decode.
    Errors: ValueError when Dk or Dv is no whole number >= 1, or tau is not positive.

    >>> GLA(Dims(num_heads=2, head_dim=4))(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="gla",
        name="Gated Linear Attention (GLA)",
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        paper="2312.06635",
        year=2023,
        family="linear",
        uses=("linear_attention",),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
        chunk: int = 64,
    ) -> None:
        super().__init__(dims)
        if not tau > 0:
            raise ValueError(f"tau: got {tau}; pass a temperature > 0")
        dk, dv = (_width(dims, name, by) for name, by in (("expand_k", expand_k), ("expand_v", expand_v)))
        c, kv = dims.dim, dims.num_kv_heads
        self.tau, self.chunk = tau, positive("chunk", chunk)
        self.query, self.key, self.value = (
            nn.Linear(c, width, bias=False) for width in (dims.num_heads * dk, kv * dk, kv * dv)
        )
        self.squeeze = nn.Linear(c, positive("gate_rank", gate_rank), bias=False)
        self.forget = nn.Linear(gate_rank, kv * dk)
        self.gate = nn.Linear(c, dims.num_heads * dv)
        self.out = nn.Linear(dims.num_heads * dv, c, bias=False)

    def read(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, State]:
        """o (B, H, N, Dv) and the memory after the last token."""
        q, k, v, forget = (
            y.unflatten(-1, (heads, -1)).transpose(1, 2)
            for y, heads in (
                (self.query(x), self.dims.num_heads),
                (self.key(x), self.dims.num_kv_heads),
                (self.value(x), self.dims.num_kv_heads),
                (self.forget(self.squeeze(x)), self.dims.num_kv_heads),
            )
        )
        decay = gate_logsigmoid(forget, self.tau)
        read = linear_attention(
            q,
            k,
            v,
            log_decay=decay,
            state=state or UNTRACKED,
            return_state=True,
            cu_seqlens=cu_seqlens,
            chunk=self.chunk,
            backend=backend,
        )
        return cast(tuple[Tensor, State], read)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        normed = F.layer_norm(o, o.shape[-1:]).transpose(1, 2).flatten(2)
        return self.out(normed * F.silu(self.gate(x)))

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.mix(x, self.read(x, cu_seqlens=cu_seqlens)[0])

    def step(self, x: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d = dict(self.named_parameters()), self.dims

        def heads(y: Tensor, count: int) -> Tensor:
            y = y.view(len(y), count, -1)
            return y.repeat_interleave(d.num_heads // count, 1)  # (B, H, channels)

        rows, memory = [], torch.zeros(())
        for token in x.unbind(1):
            q = heads(token @ w["query.weight"].T, d.num_heads)
            k, v = (heads(token @ w[f"{name}.weight"].T, d.num_kv_heads) for name in ("key", "value"))
            logits = token @ w["squeeze.weight"].T @ w["forget.weight"].T + w["forget.bias"]
            a = heads((1 / (1 + torch.exp(-logits))) ** (1 / self.tau), d.num_kv_heads)
            memory = a[..., None] * memory.to(a) + k[..., None] * v[..., None, :]
            o = (q[..., None] * memory).sum(-2)
            o = o - o.mean(-1, keepdim=True)
            o = o / ((o * o).mean(-1, keepdim=True) + 1e-5) ** 0.5
            gate = token @ w["gate.weight"].T + w["gate.bias"]
            rows.append((o.flatten(1) * gate / (1 + torch.exp(-gate))) @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 6), 37, {"chunk": 8, "gate_rank": 3}),
            Case(Dims(4, 4, num_kv_heads=2), 23, {"chunk": 5, "expand_k": 1.5, "expand_v": 2.0, "tau": 1.0}, batch=1),
            Case(Dims(1, 8), 13, batch=1),
        ]

    @claim("Chunks of any size give what the recurrence gives, stably even where gates are nearly shut.")
    def chunks(cls) -> Finding:
        worst, tau = 0.0, 0.0
        x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(1))
        for tau in (16.0, 1.0, 0.01):
            exact = cls._sample(tau=tau).double()
            truth, _ = exact.read(x.double(), backend="reference")
            plain = cls._sample(tau=tau).read(x, backend="reference")[0]
            allowed = 2 * float((plain - truth).abs().max()) + torch.finfo(x.dtype).eps * float(truth.abs().max())
            for chunk in (1, 7, 16, 64, 128, 256):
                o, _ = cls._sample(tau=tau, chunk=chunk).read(x)
                # NaN compares as false.
                error = float((o - truth).abs().max())
                worst = max(worst, error / allowed) if error >= 0 else torch.inf
        layer = cls._sample()
        shut = float(gate_logsigmoid(layer.forget(layer.squeeze(x)), tau).min())
        figure = f"at most {worst:.2f} of the error allowed, with log decays down to {shut:.0f} a token"
        return Finding(worst <= 1, figure)

    @claim("With a = 1 it is linear attention without a denominator, with a constant a = gamma it is retention.")
    def reductions(cls) -> Finding:
        apart, n = [], 50
        x = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ago = torch.arange(n)[:, None] - torch.arange(n)
        for gamma in (1.0, 31 / 32):
            layer = cls._sample(chunk=16).double()
            a = torch.tensor(gamma, dtype=x.dtype) ** layer.tau
            layer.forget.weight.zero_()
            layer.forget.bias.fill_(torch.logit(a))
            q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
            dense = (q @ k.mT * (gamma ** ago.to(x.dtype)).tril()) @ v
            apart.append(float((layer.read(x)[0] - dense).abs().max() / dense.abs().max()))
        holds = max(apart) < n * torch.finfo(x.dtype).eps
        return Finding(holds, f"largest difference {max(apart):.1e} of the largest output at gamma = 1 and 31/32")

    @claim("The state that a decoder keeps does not grow.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(), torch.randn(1, 4096, 32)
        sizes = [layer.read(x[:, :n])[1].memory.numel() for n in (1, 4096)]
        return Finding(sizes[0] == sizes[1] == 4 * 4 * 8, f"{sizes[0]} numbers after 1 token, {sizes[1]} after 4096")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: float) -> GLA:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(Dims(4, 8), **params).requires_grad_(False)  # type: ignore[arg-type]


def _width(dims: Dims, name: str, by: float) -> int:
    width = by * dims.head_dim
    if not width >= 1 or width != int(width):
        raise ValueError(f"{name}: got {by} for head_dim {dims.head_dim}; their product must be a whole number >= 1")
    return int(width)
