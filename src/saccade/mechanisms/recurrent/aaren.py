"""Aaren: attention by one learned query over every prefix, as a scan that a new token extends at constant cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.scan import associative_scan, softmax_monoid
from saccade.where import Causal


@dataclass(frozen=True)
class AarenState:
    """What a decoder keeps: the largest score m (B, H, 1), u (B, H, 1) and w (B, H, 1, D) relative to it."""

    top: Tensor
    mass: Tensor
    total: Tensor


class Aaren(Mixer):
    """Attention as a recurrent network: softmax attention of one learned query a head over the tokens so far.

        y_t = W_o o_t + b,  o_t = sum_{j <= t} e^{s_j} v_j / sum_{j <= t} e^{s_j} = w_t / u_t,  s_j = q . k_j / sqrt(D)
        (m, u, w) of a token: (s_j, 1, v_j);   of two stretches, with m = max(m_1, m_2):
        (m, u_1 e^{m_1 - m} + u_2 e^{m_2 - m}, w_1 e^{m_1 - m} + w_2 e^{m_2 - m})

    x, y (B, N, C); q (H, D) is learned and the same for all tokens; k, v (B, Hkv, N, D) are projections of x, with
    biases. Paper: arXiv 2405.13956, sections 3.2 and 3.3. Deviations: q is learned as it is, not as a learned token and
    its projection, which give the same queries; no code by the authors was found. Query heads may share keys.
    No parameter but `dims`. Costs about 4 N D multiplications a head in at most 2 log2 N + 1 rounds, beside the
    projections; a state of D + 2 numbers a head to decode. Errors: those of every mixer, for x of another shape.

    >>> Aaren(Dims(num_heads=2, head_dim=4))(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="aaren",
        name="Aaren (attention as an RNN)",
        title="Attention as an RNN",
        paper="2405.13956",
        year=2024,
        family="recurrent",
        uses=("associative_scan", "softmax_monoid"),
    )
    causal = True

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.query = nn.Parameter(torch.randn(dims.num_heads, dims.head_dim))
        self.kv = nn.Linear(dims.dim, 2 * dims.num_kv_heads * dims.head_dim)
        self.out = nn.Linear(dims.dim, dims.dim)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, N) and values (B, H, N, D), in float32 at least."""
        d, wide = self.dims, torch.promote_types(x.dtype, torch.float32)
        k, v = self.kv(x).to(wide).unflatten(2, (2 * d.num_kv_heads, -1)).transpose(1, 2).chunk(2, 1)
        q = self.query.to(wide).unflatten(0, (d.num_kv_heads, -1))
        scores = torch.einsum("grd,bgnd->bgrn", q, k).flatten(1, 2) * d.head_dim**-0.5
        return scores, v.repeat_interleave(d.group, 1)

    def read(self, x: Tensor, state: AarenState | None = None) -> tuple[Tensor, AarenState]:
        """o (B, H, N, D) and what is known after the last token."""
        s, v = self.tokens(x)
        before = None if state is None else (state.top, state.mass, state.total)
        m, u, w = associative_scan(softmax_monoid, (s, torch.ones_like(s), v), dim=2, initial=before)
        return w / u[..., None], AarenState(m[:, :, -1:], u[:, :, -1:], w[:, :, -1:])

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        return self.out(o.to(x.dtype).transpose(1, 2).flatten(2))

    def compute(self, x: Tensor) -> Tensor:
        return self.mix(x, self.read(x)[0])

    def step(self, x: Tensor, *, state: AarenState | None = None) -> tuple[Tensor, AarenState]:
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        projected = (x @ w["kv.weight"].T + w["kv.bias"]).split(d.head_dim, -1)
        for t in range(x.shape[1]):
            heads = []
            for h in range(d.num_heads):
                g = h // (d.num_heads // d.num_kv_heads)
                k, v = (projected[i][:, : t + 1] for i in (g, g + d.num_kv_heads))
                scores = (k * w["query"][h]).sum(-1, keepdim=True) / d.head_dim**0.5
                weights = (scores - scores.detach().amax(1, keepdim=True)).exp()
                heads.append((weights * v).sum(1) / weights.sum(1))
            rows.append(torch.cat(heads, -1) @ w["out.weight"].T + w["out.bias"])
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [Case(Dims(2, 5), 37), Case(Dims(4, 3, num_kv_heads=2), 23, batch=1), Case(Dims(1, 4), 2)]

    @claim("The scan gives softmax attention of the query over every prefix, however large the scores.")
    def prefixes(cls) -> Finding:
        layer, x = cls._sample(), torch.randn(1, 301, 16, dtype=torch.float64)
        figures, holds = [], True
        for size in (1.0, 300.0):
            layer.query.copy_(size * torch.randn(2, 8))
            k, v = layer.kv(x).unflatten(2, (4, 8)).transpose(1, 2).chunk(2, 1)
            exact = attend(layer.query[None, :, None].expand(-1, -1, 301, -1), k, v, Causal())
            apart, top = float((layer.read(x)[0] - exact).abs().max()), float(layer.tokens(x)[0].abs().max())
            # A score's rounding is a relative error of its weight.
            holds = holds and apart < (301 + 8 * top) * torch.finfo(x.dtype).eps * float(v.abs().max())
            figures.append(f"{apart:.1e} with scores up to {top:.0f}")
        return Finding(holds, f"largest difference {' and '.join(figures)}, of {x.shape[1]} prefixes")

    @claim("A new token takes constant memory: the state does not grow.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(), torch.randn(1, 500, 16, dtype=torch.float64)
        states = [layer.read(x[:, :n])[1] for n in (1, 500)]
        sizes = [s.top.numel() + s.mass.numel() + s.total.numel() for s in states]
        return Finding(sizes[0] == sizes[1] == 2 * (8 + 2), f"{sizes[0]} numbers after 1 token, {sizes[1]} after 500")

    @claim("All prefixes take fewer than 2 N merges, in logarithmically many rounds.")
    def logarithmic_depth(cls) -> Finding:
        rounds: list[int] = []

        def counted(earlier: tuple[Tensor, ...], later: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rounds.append(later[0].shape[2])
            return softmax_monoid(earlier, later)

        s, v = cls._sample().tokens(torch.randn(1, 1000, 16, dtype=torch.float64))
        associative_scan(counted, (s, torch.ones_like(s), v), dim=2)
        holds = len(rounds) <= 2 * math.log2(1000) + 1 and sum(rounds) < 2000
        return Finding(holds, f"{sum(rounds)} merges of 1000 tokens in {len(rounds)} rounds")

    @classmethod
    @torch.no_grad()
    def _sample(cls) -> Aaren:
        return cls(Dims(2, 8)).double().requires_grad_(False)
