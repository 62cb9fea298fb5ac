"""TransNormer: blocks of local attention in early layers, then linear attention that a norm bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import known, positive
from saccade.scan import State, linear_attention
from saccade.scan.features import elu1
from saccade.where import Blocks, Causal

VARIANTS = ("t1", "t2")


@dataclass(frozen=True)
class Relu:
    """ReLA's weights, p_j = relu(s_j) without a denominator (arXiv 2104.07012)."""

    name: ClassVar[str] = "relu"

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.relu()


@dataclass(frozen=True)
class NormerState:
    """What a decoder keeps: the memory of a late layer, or keys and values of the unfinished block (B, 2 Hkv, n, D)."""

    memory: State | None = None
    recent: Tensor | None = None


class TransNormer(Mixer):
    """An attention layer: softmax or ReLU inside blocks in the first half of a model, then linear attention and a norm.

        late:  y = W_o norm(o),   o_i = sum_j (phi(q_i) . phi(k_j)) v_j,   j <= i when causal
        early: y = W_o a,         a_i = sum_j p_ij v_j over j of the block of i,   s_ij = q_i . k_j / sqrt(D)
        "t1": phi = elu, p = relu(s) and norm(a) in the place of a;   "t2": phi = 1 + elu, p = softmax(s)
        norm(x) = x / sqrt(mean x^2 + eps)

    x, y (B, N, C); q, o, a (B, H, N, D), k, v (B, Hkv, N, D); norm runs over the channels of all heads together and has
    no weights. In the place of a denominator it bounds the gradients; the blocks keep early layers local.
    Paper: arXiv 2210.10340; variants, widths and halves follow the authors' code. Deviations: it rotates queries and
    keys by learned angles, which is another paper's and left out; it adds eps to the root, and may have a LayerNorm for
    norm; it fills a last short block with zeros, which take their share of a softmax that is not causal, and here are
    hidden. Key heads may be shared.
    variant: "t1" (default) or "t2". layer: which layer this is, from 0 (default 0). num_layers: L (1); the first L // 2
    layers are early ones. block: tokens of a block (64). causal: True. eps: 1e-8.
    Costs, a token and head, 2 D^2 + 128 D multiply-adds and a state of D^2 numbers in a late layer, 2 block D and fewer
    than `block` keys and values in an early one.
    Errors: ValueError for a layer that the model does not have, eps <= 0, a step when not causal.

    >>> TransNormer(Dims(num_heads=2, head_dim=4), layer=2, num_layers=12)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="transnormer",
        name="TransNormer",
        title="The Devil in Linear Transformer",
        paper="2210.10340",
        year=2022,
        family="linear",
        uses=("linear_attention", "attend", "Blocks", "Causal"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        variant: str = "t1",
        layer: int = 0,
        num_layers: int = 1,
        block: int = 64,
        causal: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(dims)
        if positive("layer", layer, least=0) >= positive("num_layers", num_layers):
            raise ValueError(f"layer: got {layer} of num_layers {num_layers}; pass 0 to {num_layers - 1}")
        if not eps > 0:
            raise ValueError(f"eps: got {eps}; without a bound above 0 the norm has no bounded gradient")
        self.variant, self.early = known("variant", variant, VARIANTS), layer < num_layers // 2
        self.block, self.causal, self.eps = positive("block", block), causal, eps
        c = dims.dim
        self.qkv = nn.Linear(c, c + 2 * dims.num_kv_heads * dims.head_dim)
        self.out = nn.Linear(c, c)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, N, D), and keys and values (B, 2 Hkv, N, D)."""
        h = self.dims.num_heads
        y = self.qkv(x).unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2)
        return y[:, :h], y[:, h:]

    def mix(self, o: Tensor) -> Tensor:
        o = o.transpose(1, 2).flatten(2)
        normed = not self.early or self.variant == "t1"
        return self.out(F.rms_norm(o, o.shape[2:], eps=self.eps) if normed else o)

    def within_blocks(self, q: Tensor, pair: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """a, where queries are the last of the keys and keys begin with a block."""
        k, v = pair.chunk(2, 1)
        where = Blocks(self.block) & Causal() if self.causal else Blocks(self.block)
        normalizer = Relu() if self.variant == "t1" else "softmax"
        return attend(q, k, v, where, normalizer=normalizer, cu_seqlens=cu_seqlens)

    def across(
        self, q: Tensor, pair: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """o, and the memory after the last token."""
        k, v = pair.chunk(2, 1)
        read = linear_attention(
            q,
            k,
            v,
            feature_map=F.elu if self.variant == "t1" else elu1,
            causal=self.causal,
            state=state,
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        return cast(tuple[Tensor, State], read)

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        q, pair = self.heads(x)
        if self.early:
            return self.mix(self.within_blocks(q, pair, cu_seqlens))
        return self.mix(self.across(q, pair, cu_seqlens=cu_seqlens)[0])

    def step(self, x: Tensor, *, state: NormerState | None = None) -> tuple[Tensor, NormerState]:
        if not self.causal:
            raise ValueError("causal: got False; only a causal TransNormer decodes token by token")
        state, (q, pair) = state or NormerState(), self.heads(x)
        if not self.early:
            o, memory = self.across(q, pair, state.memory)
            return self.mix(o), NormerState(memory)
        pair = pair if state.recent is None else torch.cat([state.recent, pair], 2)
        finished = pair.shape[2] // self.block * self.block
        return self.mix(self.within_blocks(q, pair)), NormerState(recent=pair[:, :, finished:].clone())

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        y = (x @ w["qkv.weight"].T + w["qkv.bias"]).view(*x.shape[:2], -1, d.head_dim)
        q = y[:, :, : d.num_heads]
        k, v = y[:, :, d.num_heads :].repeat_interleave(d.group, 2).chunk(2, 2)

        def phi(z: Tensor) -> Tensor:
            return torch.where(z > 0, z, torch.exp(z.clamp(max=0)) - 1) + (self.variant == "t2")

        for i in range(x.shape[1]):
            start = i // self.block * self.block if self.early else 0
            stop = start + self.block if self.early else x.shape[1]
            seen = slice(start, i + 1 if self.causal else stop)
            if self.early:
                weights = (q[:, i, None] * k[:, seen]).sum(-1) / d.head_dim**0.5
                weights = weights.clamp(min=0) if self.variant == "t1" else weights.softmax(1)
            else:
                weights = (phi(q[:, i, None]) * phi(k[:, seen])).sum(-1)
            o = (weights[..., None] * v[:, seen]).sum(1).flatten(1)
            if not self.early or self.variant == "t1":
                o = o / ((o * o).mean(-1, keepdim=True) + self.eps) ** 0.5
            rows.append(o @ w["out.weight"].T + w["out.bias"])
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 7), 37, {"eps": 1e-3}),
            Case(Dims(4, 6, num_kv_heads=2), 23, {"variant": "t2", "layer": 3, "num_layers": 5}, batch=1),
            Case(Dims(4, 5, num_kv_heads=2), 23, {"layer": 1, "num_layers": 5, "block": 8, "eps": 1e-3}, batch=1),
            Case(Dims(3, 4), 19, {"variant": "t2", "num_layers": 2, "block": 5}, batch=1),
        ]

    @claim("A denominator has gradients that grow without bound as scores shrink; the norm's stay below 1 / sqrt(eps).")
    def bounded_gradient(cls) -> Finding:
        random, eps = torch.Generator().manual_seed(0), 1e-4
        s, v = torch.rand(24, generator=random).double(), torch.randn(24, 16, generator=random).double()
        layer = cls(Dims(1, 16), variant="t2", eps=eps).double().requires_grad_(False)
        layer.out.weight.copy_(torch.eye(16))
        layer.out.bias.zero_()

        def normed(s: Tensor) -> Tensor:
            return layer.mix((s @ v)[None, None, None]).flatten()

        def divided(s: Tensor) -> Tensor:
            return s @ v / s.sum()

        found = {}
        with torch.enable_grad():
            for function in (normed, divided):
                slopes = [torch.autograd.functional.jacobian(function, s * 10.0**-p) for p in range(0, 13, 2)]
                found[function] = [float(x.norm(dim=0).max()) for x in slopes]
        bound = float(v.norm(dim=1).max()) / eps**0.5
        grows = found[divided][-1] / found[divided][0]
        figure = (
            f"scores shrunk by 1e12: the largest slope grows {grows:.1e} times with a denominator; with the norm it is "
            f"at most {max(found[normed]):.0f}, the bound is {bound:.0f}"
        )
        rounding = 1 + 16 * torch.finfo(v.dtype).eps
        return Finding(max(found[normed]) <= bound * rounding and grows > 1e12 / 2, figure)

    @claim("In the first half of the layers no gradient crosses a seam of the blocks; in the second all tokens meet.")
    def block_diagonal(cls) -> Finding:
        counts, holds, n = [], True, 40
        x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        same = torch.arange(n)[:, None] // 16 == torch.arange(n) // 16
        for causal in (True, False):
            before = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
            for layer in range(4):
                module = cls(Dims(2, 8), variant="t2", layer=layer, num_layers=4, block=16, causal=causal).double()
                with torch.enable_grad():
                    slopes = torch.autograd.functional.jacobian(lambda x, module=module: module(x).sum((0, 2)), x)
                met = slopes[:, 0].abs().sum(-1) > 0
                holds = holds and met.equal(before & same if layer < 2 else before)
                counts.append(int(met.sum()))
        figure = (
            f"{counts[:4]} of {n * (n + 1) // 2} causal pairs in the 4 layers, {counts[4:]} of {n * n} when not causal"
        )
        return Finding(holds, figure)

    @claim("Both kinds of layer are linear in the tokens, and what a decoder keeps is bounded.")
    def linear_work(cls) -> Finding:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        figures, holds = [], True
        for variant in VARIANTS:
            for layer, name in enumerate(("early", "late")):
                module, work = cls(Dims(2, 8), variant=variant, layer=layer, num_layers=2).requires_grad_(False), []
                for n in (1024, 2048):
                    # Fused kernels hide their products from the counter.
                    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                        module(torch.randn(1, n, 16))
                    work.append(counter.get_total_flops())
                _, state = module.step(torch.randn(1, 2047, 16))
                kept = (state.recent if state.memory is None else state.memory.memory).numel()
                holds = holds and work[1] <= 2 * work[0] and kept <= 2 * 2 * max(64 * 8, 8 * 8)
                figures.append(f"{name} {variant} {work[1] / work[0]:.2f} times at twice N, {kept} numbers kept")
        return Finding(holds, "; ".join(figures))

    @claim("The running memory gives what all pairs give, causal or not, in both variants.")
    def equals_pairs(cls) -> Finding:
        apart, n = 0.0, 90
        x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for variant, phi in zip(VARIANTS, (F.elu, lambda z: F.elu(z) + 1), strict=True):
            for causal in (True, False):
                module = cls(Dims(2, 8), variant=variant, causal=causal).double().requires_grad_(False)
                q, k, v = module.qkv(x).unflatten(2, (6, 8)).transpose(1, 2).split(2, 1)
                pairs = phi(q) @ phi(k).mT
                o = ((pairs.tril() if causal else pairs) @ v).transpose(1, 2).flatten(2)
                dense = module.out(o / (o.square().mean(-1, keepdim=True) + module.eps).sqrt())
                apart = max(apart, float((module(x) - dense).abs().max() / dense.abs().max()))
        return Finding(apart < n * torch.finfo(x.dtype).eps, f"largest difference {apart:.1e} of the largest output")
