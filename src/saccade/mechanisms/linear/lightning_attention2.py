"""Lightning Attention-2: causal linear attention with a decay, swept block by block, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.hosts.constant import Constant
from saccade.scan import UNTRACKED, State, decays, linear_attention


class LightningAttention2(Attention):
    """Unnormalised causal linear attention with a constant decay a head, in one sweep over blocks of B tokens.

        o_i = sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j
        of block t: O_t = (Q_t K_t^T * M) V_t + Lambda Q_t S_{t-1}
                    S_t = lambda^B S_{t-1} + sum_s lambda^(B - s) k_s v_s^T

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> o (B, H, N, Dv); S (B, H, D, Dv); M_st = lambda^(s - t) for s
    >= t, Lambda = diag(lambda^1 .. lambda^B). The operator alone: features, gate and norm belong to the layer around
    it. Its gradients are sweeps of the same kind, one forward for q and one in reverse for k and v. Paper: arXiv
    2401.04658, algorithm 1; B and the default decays follow the authors' code. Deviations: the sweep runs as
    matrix products over many blocks at once, then over the memories alone, and is no kernel of its own; gradients are
    autograd's, which keeps the N / B memories that a sweep would form again. Slopes for a number of heads that is no
    power of 2 are one sequence, where the code mixes two. Key heads may be shared.
    log_decay: log lambda of each query head, <= 0 (default None: ALiBi's slopes, -2^(-8 h / H) for h = 1 .. H). block:
    B (64), of no effect on the result.
    Costs 2 D Dv + B (D + Dv) multiply-adds a token and head; a state of D Dv numbers a query head to decode.
    Errors: TypeError for decays that are no list, ValueError for one above 0 or for more or fewer than heads.

    >>> layer = LightningAttention2(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="lightning_attention2",
        name="Lightning Attention-2",
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        paper="2401.04658",
        year=2024,
        family="linear",
        uses=("linear_attention", "decays"),
    )
    causal = True
    per_head = True

    def __init__(self, dims: Dims, *, log_decay: Sequence[float] | None = None, block: int = 64) -> None:
        super().__init__(dims)
        self.block = positive("block", block)
        if log_decay is not None:
            wanted = f"pass a list of {dims.num_heads} natural logs <= 0, one a head"
            if not isinstance(log_decay, (list, tuple)):
                raise TypeError(f"log_decay: got a {type(log_decay).__name__}; {wanted}")
            if len(log_decay) != dims.num_heads or not all(g <= 0 for g in log_decay):
                raise ValueError(f"log_decay: got {log_decay}; {wanted}")
        self.decays = Constant(decays.alibi(dims.num_heads) if log_decay is None else torch.tensor(log_decay).float())

    def sweep(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """o and the memory after the last token."""
        swept = linear_attention(
            q,
            k,
            v,
            log_decay=self.decays.value,
            state=state or UNTRACKED,
            return_state=True,
            cu_seqlens=cu_seqlens,
            chunk=self.block,
        )
        return cast(tuple[Tensor, State], swept)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.sweep(q, k, v, cu_seqlens=cu_seqlens)[0]

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        return self.sweep(q, k, v, state)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, rows = q.shape[1], []
        reads = [h // (heads // k.shape[1]) for h in range(heads)]
        k, v, lam = k[:, reads], v[:, reads], self.decays.value.to(q.dtype).exp()[:, None, None]
        memory = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype)
        for t in range(q.shape[2]):
            memory = lam * memory + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append((q[:, :, t, :, None] * memory).sum(2))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(3, 5), 37, {"block": 8}),
            Case(Dims(4, 6, num_kv_heads=2), 23, {"block": 5, "log_decay": (0.0, -0.1, -3.0, -math.inf)}, batch=1),
            Case(Dims(1, 8), 71, batch=1),
        ]

    @claim("Blocks of any size, a short last one included, give what the recurrence gives.")
    def any_block(cls) -> Finding:
        worst = 0.0
        q, k, v = torch.randn(3, 1, 4, 200, 8, generator=torch.Generator().manual_seed(1))
        truth, plain = (cls(Dims(4, 8)).oracle(*(x.to(t) for x in (q, k, v))) for t in (torch.float64, torch.float32))
        allowed = 2 * float((plain - truth).abs().max()) + torch.finfo(q.dtype).eps * float(truth.abs().max())
        for block in (1, 7, 16, 64, 128, 256):
            worst = max(worst, float((cls(Dims(4, 8), block=block)(q, k, v) - truth).abs().max()) / allowed)
        return Finding(worst <= 1, f"at most {worst:.2f} of the error allowed, blocks of 1 to 256 of 200 tokens")

    @claim("The gradients are the same operator: one sweep forward for q, and one in reverse for k and for v.")
    def backward_sweeps(cls) -> Finding:
        layer, n = cls(Dims(4, 8)), 150
        q, k, v, do = torch.randn(4, 1, 4, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            found = torch.autograd.grad(layer(*leaves), leaves, do)

        def reverse(*x: Tensor) -> Tensor:
            return layer(*(each.flip(2) for each in x)).flip(2)

        swept = (layer(do, v, k), reverse(v, do, q), reverse(k, q, do))
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(swept, found, strict=True))
        return Finding(apart < n * torch.finfo(q.dtype).eps, f"largest difference {apart:.1e} of the largest gradient")

    @claim("A token costs the same at any length, and the state does not grow.")
    def unlimited_length(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        each, sizes, layer = [], [], cls(Dims(4, 8))
        for n in (512, 1024, 4096):
            with FlopCounterMode(display=False) as counter:
                _, state = layer.step(*torch.randn(3, 1, 4, n, 8))
            each.append(counter.get_total_flops() / n)
            sizes.append(state.memory.numel())
        holds = len(set(each)) == 1 and set(sizes) == {4 * 8 * 8}
        return Finding(holds, f"{each[0]:.0f} operations a token at 512, {each[2]:.0f} at 4096; a state of {sizes[2]}")

    @claim("With lambda = 1 it is plain linear attention, with lambda = 1 - 2^(-5 - h) retention without its rotation.")
    def reductions(cls) -> Finding:
        apart, n = [], 90
        q, k, v = torch.randn(3, 1, 4, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ago = (torch.arange(n)[:, None] - torch.arange(n)).to(q.dtype)
        for gammas in ((1.0,) * 4, tuple(1 - 2.0 ** (-5 - h) for h in range(4))):
            logs = torch.tensor([math.log(gamma) for gamma in gammas])
            dense = (q @ k.mT * (logs.to(q.dtype)[:, None, None] * ago).exp().tril()) @ v
            found = cls(Dims(4, 8), log_decay=logs.tolist())(q, k, v)
            apart.append(float((found - dense).abs().max() / dense.abs().max()))
        figure = f"largest difference {max(apart):.1e} of the largest output"
        return Finding(max(apart) < n * torch.finfo(q.dtype).eps, figure)
