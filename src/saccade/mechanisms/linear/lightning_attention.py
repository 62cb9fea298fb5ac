"""Lightning attention as TransNormerLLM has it: a layer on linear attention with one constant decay a head."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import known, positive
from saccade.hosts.constant import Constant
from saccade.scan import UNTRACKED, State, decays, linear_attention

EPS = 1e-6


def alibi(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """-2^(-8 h / H) (1 - l / (L - 1) + 1e-5), h = 1 .. H: the last layer hardly forgets; a single one is a first."""
    return decays.alibi(num_heads) * (1 - layer / max(1, num_layers - 1) + 1e-5)


DECAYS = {"alibi": alibi, "linear": decays.transnormer}


class LightningAttention(Mixer):
    """Linear attention with a constant decay a head, cut into blocks: pairs within a block, a memory before it.

        o_i = sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j,   q, k, v = silu(W x)
        of block t: O_t = (Q_t K_t^T * M) V_t + Lambda Q_t S_{t-1}
                    S_t = lambda^B S_{t-1} + (lambda^B Lambda^-1 K_t)^T V_t
        y = W_o (sigmoid(U_2 U_1 x) * RMS(o)),   RMS over all heads together, without weights
        "alibi":  log lambda = -2^(-8 h / H) (1 - l / (L - 1) + 1e-5), h = 1 .. H
        "linear": log lambda = -(8 h / H) (1 - l / L), h = 0 .. H - 1

    x, y (B, N, C); q, o (B, H, N, D), k, v (B, Hkv, N, D), S (B, H, D, D); M_ij = lambda^(i - j) for i >= j, Lambda =
    diag(lambda^1 .. lambda^B); l: the layer, U_1 (D, C). There is no denominator and no scale, which RMS would undo.
    Paper: arXiv 2405.17381, which has "linear"; the layer and "alibi" follow the authors' module. The operator is that
    of Lightning Attention-2 (arXiv 2401.04658); this paper adds the layer and the decay by depth. Deviations: the
    module has a LayerNorm with weights for the paper's RMS; its slopes for a number of heads that is no power of 2 are
    ALiBi's mixture of two sequences, here they are one; the paper's rotation of queries and keys (LRPE) is left out, as
    in the module. Key heads may be shared.
    layer: l, from 0 (default 0). num_layers: L (1). decay: "alibi" (default) or "linear". block: B (64), of no effect
    on the result.
    Costs 2 D^2 + 2 B D a token and head; a state of D^2 numbers a query head to decode.
    Errors: ValueError for a layer that the model does not have.

    >>> LightningAttention(Dims(num_heads=2, head_dim=4), layer=3, num_layers=12)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="lightning_attention",
        name="Lightning Attention (TransNormerLLM)",
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        paper="2405.17381",
        year=2024,
        family="linear",
        uses=("linear_attention", "decays"),
    )
    causal = True

    def __init__(
        self, dims: Dims, *, layer: int = 0, num_layers: int = 1, decay: str = "alibi", block: int = 64
    ) -> None:
        super().__init__(dims)
        if positive("layer", layer, least=0) >= positive("num_layers", num_layers):
            raise ValueError(f"layer: got {layer} of num_layers {num_layers}; pass 0 to {num_layers - 1}")
        self.decays = Constant(DECAYS[known("decay", decay, DECAYS)](dims.num_heads, layer, num_layers))
        self.layer, self.num_layers, self.decay = layer, num_layers, decay
        self.block, c = positive("block", block), dims.dim
        self.qkv = nn.Linear(c, c + 2 * dims.num_kv_heads * dims.head_dim, bias=False)
        self.gate = nn.Sequential(nn.Linear(c, dims.head_dim, bias=False), nn.Linear(dims.head_dim, c, bias=False))
        self.out = nn.Linear(c, c, bias=False)

    def read(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """o (B, H, N, D) and the memory after the last token."""
        read = linear_attention(
            *self.dims.split(F.silu(self.qkv(x))),
            log_decay=self.decays.value,
            state=state or UNTRACKED,
            return_state=True,
            cu_seqlens=cu_seqlens,
            chunk=self.block,
        )
        return cast(tuple[Tensor, State], read)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        o = o.transpose(1, 2).flatten(2)
        return self.out(F.rms_norm(o, o.shape[2:], eps=EPS) * self.gate(x).sigmoid())

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.mix(x, self.read(x, cu_seqlens=cu_seqlens)[0])

    def step(self, x: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d = dict(self.named_parameters()), self.dims
        size, share = d.num_heads, self.layer / self.num_layers
        if self.decay == "alibi":
            share = self.layer / (self.num_layers - 1) if self.num_layers > 1 else 0.0
            logs = torch.tensor([-(2 ** (-8 * (h + 1) / size)) for h in range(size)]) * (1 - share + 1e-5)
        else:
            logs = torch.tensor([-(8 * h / size) * (1 - share) for h in range(size)])  # float32, as all decays are
        lam = logs.to(x.dtype).exp()[:, None, None]
        rows, memory = [], torch.zeros(()).to(x)
        for token in x.unbind(1):
            y = token @ w["qkv.weight"].T
            y = (y / (1 + torch.exp(-y))).view(len(y), -1, d.head_dim)
            q, kv = y[:, :size], y[:, size:].repeat_interleave(d.group, 1)
            memory = lam * memory + kv[:, :size, :, None] * kv[:, size:, None, :]
            o = (q[..., None] * memory).sum(-2).flatten(1)
            o = o / ((o * o).mean(-1, keepdim=True) + 1e-6) ** 0.5
            gate = token @ w["gate.0.weight"].T @ w["gate.1.weight"].T
            rows.append((o / (1 + torch.exp(-gate))) @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(3, 5), 37, {"block": 8, "layer": 2, "num_layers": 5}),
            Case(Dims(4, 4, num_kv_heads=2), 23, {"block": 5, "decay": "linear", "layer": 1, "num_layers": 3}, batch=1),
            Case(Dims(1, 8), 13, batch=1),
        ]

    @claim("Blocks of any size, a short last one included, give what the recurrence gives.")
    def any_block(cls) -> Finding:
        worst = 0.0
        x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(1))
        for decay in DECAYS:
            truth = cls._recurrence(cls._sample(decay=decay).double(), x.double())
            plain = cls._recurrence(cls._sample(decay=decay), x)
            allowed = 2 * float((plain - truth).abs().max()) + torch.finfo(x.dtype).eps * float(truth.abs().max())
            for block in (1, 7, 16, 64, 128, 256):
                o, _ = cls._sample(decay=decay, block=block).read(x)
                worst = max(worst, float((o - truth).abs().max()) / allowed)
        return Finding(worst <= 1, f"at most {worst:.2f} of the error allowed, blocks of 1 to 256 of 200 tokens")

    @claim("The cost of a token is the same at any length, and so is the state, D x D a head.")
    def constant_speed(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        each, sizes, layer = [], [], cls._sample()
        for n in (512, 1024, 4096):
            with FlopCounterMode(display=False) as counter:
                _, state = layer.step(torch.randn(1, n, 32))
            each.append(counter.get_total_flops() / n)
            sizes.append(state.memory[0, 0].numel())
        holds = len(set(each)) == 1 and set(sizes) == {8 * 8}
        return Finding(
            holds, f"{each[0]:.0f} operations a token at 512, {each[2]:.0f} at 4096; {sizes[2]} numbers a head"
        )

    @claim("Deeper layers forget less, by both schedules; by the module's the last one hardly forgets.")
    def deeper_remembers(cls) -> Finding:
        kept = {
            decay: torch.stack(
                [cls(Dims(8, 4), layer=i, num_layers=12, decay=decay).decays.value.exp() for i in range(12)]
            )
            for decay in DECAYS
        }
        # Head 0 of "linear" never forgets, at any depth.
        rising = all(bool((x[:, 1:].diff(dim=0) > 0).all()) for x in kept.values())
        half = [-math.log(2) / float(kept[decay][i].min().log()) for decay in DECAYS for i in (0, -1)]
        figure = (
            f"the quickest head forgets half in {half[0]:.1f} tokens in layer 1, {half[1]:.0f} in layer 12; "
            f"{half[2]:.2f} and {half[3]:.1f} by the paper's"
        )
        return Finding(rising and half[1] > 1000 * half[3], figure)

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: int | str) -> LightningAttention:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(Dims(4, 8), **params).requires_grad_(False)  # type: ignore[arg-type]

    @staticmethod
    def _recurrence(layer: LightningAttention, x: Tensor) -> Tensor:
        q, k, v = F.silu(layer.qkv(x)).unflatten(2, (12, 8)).transpose(1, 2).split(4, 1)
        rows, memory = [], torch.zeros(())
        for t in range(x.shape[1]):
            memory = layer.decays.value.to(x.dtype).exp()[:, None, None] * memory.to(x)
            memory = memory + k[:, :, t, :, None] * v[:, :, t, None]
            rows.append((q[:, :, t, None] @ memory).squeeze(2))
        return torch.stack(rows, 2)
