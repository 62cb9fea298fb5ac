"""Set Transformer: attention through learned inducing points, with its relatives SAB (all pairs) and PMA (pooling)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import check_cu_seqlens, positive


class MAB(nn.Module):
    """Multihead attention block: x (B, N, C) asks z (B, M, C) -> (B, N, C).

        q, k, v = Wq x + bq, Wk z + bk, Wv z + bv
        h = LN(q + softmax(q k^T / sqrt(C)) v),   y = LN(h + relu(Wo h + bo))

    with a softmax a head; LN only when `norm`.
    """

    def __init__(self, dim: int, num_heads: int, *, norm: bool = False) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.first, self.last = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        projected = (self.query(x), self.key(z), self.value(z))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in projected)  # (B, H, N or M, D)
        h = self.first((q + attend(q, k, v, scale=self.dim**-0.5)).transpose(1, 2).flatten(2))
        return self.last(h + self.out(h).relu())


class SAB(nn.Module):
    """Set attention block, over all pairs of a set: MAB(x, x). x (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, *, norm: bool = False) -> None:
        super().__init__()
        self.block = MAB(dim, num_heads, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x)


class PMA(nn.Module):
    """Pooling by multihead attention: learned seeds s (1, K, C) ask the set, MAB(s, x). x (B, N, C) -> (B, K, C)."""

    def __init__(self, dim: int, num_heads: int, num_seeds: int, *, norm: bool = False) -> None:
        super().__init__()
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, positive("num_seeds", num_seeds), dim)))
        self.block = MAB(dim, num_heads, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.seeds.expand(len(x), -1, -1), x)


class SetTransformer(Mixer):
    """Induced set attention block (ISAB): m learned points ask the set, and the set asks the answers.

        y = MAB(x, MAB(p, x)),   MAB(x, z) = LN(h + relu(Wo h + bo)),   h = LN(q + softmax(q k^T / sqrt(C)) v)

    x, y (B, N, C); p (m, C); q = Wq x + bq, k = Wk z + bk, v = Wv z + bv, cut into heads for the softmax. The first
    term of h is the projected query, and the scores are divided by the root of the whole width C, as in the authors'
    code (section 3.1 writes x and the width of a head).
    Paper: arXiv 1810.00825, sections 3.1 and 3.2 (`SAB` and `PMA` too); LN is off unless asked for, as in the code.
    Deviations: all widths are C. dims.num_kv_heads is not used.
    num_inducing: m (default 32). norm: use LN (default False). cu_seqlens, int32 with B = 1, packs several sets.
    Costs 2 N m C multiplications a MAB, and 4 (N + m) C^2 for the layers; packed sets are computed one by one.
    Errors: ValueError when num_inducing is below 1.

    >>> layer, x = SetTransformer(Dims(num_heads=2, head_dim=4), num_inducing=3), torch.randn(1, 7, 8)
    >>> torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-5)
    True
    """

    spec = Spec(
        id="set_transformer",
        name="Set Transformer (ISAB, PMA)",
        title="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks",
        paper="1810.00825",
        year=2018,
        family="pooling",
        uses=("attend",),
    )

    def __init__(self, dims: Dims, *, num_inducing: int = 32, norm: bool = False) -> None:
        super().__init__(dims)
        self.gather = PMA(dims.dim, dims.num_heads, positive("num_inducing", num_inducing), norm=norm)
        self.spread = MAB(dims.dim, dims.num_heads, norm=norm)

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is None:
            return self.spread(x, self.gather(x))
        sizes = check_cu_seqlens(cu_seqlens, x.shape[1], len(x)).diff().tolist()
        return torch.cat([self.compute(each) for each in x.split(sizes, 1)], 1)

    def oracle(self, x: Tensor) -> Tensor:
        w, dim, width = dict(self.named_parameters()), self.dims.dim, self.dims.head_dim

        def normed(h: Tensor, name: str) -> Tensor:
            if f"{name}.weight" not in w:
                return h
            centred = h - h.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + 1e-5) ** 0.5
            return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

        def block(x: Tensor, z: Tensor, name: str) -> Tensor:
            def layer(t: Tensor, part: str) -> Tensor:
                return torch.einsum("bnc,dc->bnd", t, w[f"{name}.{part}.weight"]) + w[f"{name}.{part}.bias"]

            q, k, v = layer(x, "query"), layer(z, "key"), layer(z, "value")
            heads = []
            for at in range(0, dim, width):
                cut = slice(at, at + width)
                scores = torch.einsum("bnd,bmd->bnm", q[..., cut], k[..., cut]) / dim**0.5
                weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
                weights = weights / weights.sum(-1, keepdim=True)
                heads.append(q[..., cut] + torch.einsum("bnm,bmd->bnd", weights, v[..., cut]))
            h = normed(torch.cat(heads, -1), f"{name}.first")
            return normed(h + layer(h, "out").clamp(min=0), f"{name}.last")

        answers = block(w["gather.seeds"].expand(len(x), -1, -1), x, "gather.block")
        return block(x, answers, "spread")

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4), 13, {"num_inducing": 5}),
            Case(Dims(3, 5), 7, {"num_inducing": 11, "norm": True}, batch=3),
        ]

    @claim("ISAB and SAB are permutation equivariant, and PMA invariant, to rounding.")
    def symmetry(cls) -> Finding:
        x, order = torch.randn(2, 67, 12, dtype=torch.float64), torch.randperm(67)
        worst, holds = 0.0, True
        for layer in (cls(Dims(3, 4), num_inducing=5), SAB(12, 3), PMA(12, 3, 5)):
            layer.double()
            with torch.no_grad():
                y, moved = layer(x), layer(x[:, order])
            apart = float(((y if isinstance(layer, PMA) else y[:, order]) - moved).abs().max() / y.abs().max())
            # Sums of 67 and of 12 terms, added up in another order.
            worst, holds = max(worst, apart), holds and apart <= (67 + 12) * torch.finfo(x.dtype).eps
        return Finding(holds, f"largest relative difference {worst:.1e} after permuting 67 elements")

    @claim("ISAB costs O(N m), SAB O(N^2).")
    def linear_work(cls) -> Finding:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        ratios = []
        for layer in (cls(Dims(2, 8), num_inducing=8), SAB(16, 2)):
            work = []
            for n in (256, 512):
                # Fused kernels hide their products from the counter.
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    layer.requires_grad_(False)(torch.randn(1, n, 16))
                work.append(counter.get_total_flops())
            ratios.append(work[1] / work[0])
        figure = f"{ratios[0]:.2f} times the work at twice N, SAB {ratios[1]:.2f} times"
        return Finding(ratios[0] <= 2 < ratios[1], figure)

    @claim("With as many inducing points as elements ISAB is still not SAB.")
    def not_all_pairs(cls) -> Finding:
        layer, pairs = cls(Dims(2, 8), num_inducing=31).double(), SAB(16, 2).double()
        pairs.block.load_state_dict(layer.spread.state_dict())
        x = torch.randn(1, 31, 16, dtype=torch.float64)
        with torch.no_grad():
            y, other = layer(x), pairs(x)
        apart = float((y - other).norm() / other.norm())
        figure = f"relative difference {apart:.2f} with the same outer MAB, m = N = 31"
        return Finding(apart > torch.finfo(x.dtype).eps ** 0.5, figure)
