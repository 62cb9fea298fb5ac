"""Eigen Attention: keys and values are kept in few directions, those in which calibration text varies most."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.cache import Cached, Policy, budgeted
from saccade.contract import Case, Dims, Finding, Spec, claim
from saccade.where import Causal


class LowRank(Policy):
    """Keeps all tokens, narrower."""

    def __init__(self, eigen: EigenAttention) -> None:
        self.eigen = eigen

    def project(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (x.to(k.dtype) for x in self.eigen.axes)
        if v.shape[3] != values.shape[1]:
            raise ValueError(f"v: got {v.shape[3]} channels; its directions are of {values.shape[1]}")
        return (q.unflatten(1, (len(keys), -1)) @ keys[:, None]).flatten(1, 2), k @ keys, v @ values

    def restore(self, index: int, o: Tensor) -> Tensor:
        values = self.eigen.axes[1].to(o.dtype)
        return (o.unflatten(1, (len(values), -1)) @ values[:, None].mT).flatten(1, 2)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return self.restore(index, attend(*self.project(index, q, k, v), Causal(), scale=scale))


class EigenAttention(Cached):
    """Attention in low-rank spaces of queries, keys and values; the cache holds rows of r_k and r_v numbers.

        s_ij = (q_i U) . (k_j U) / sqrt(D),   o_i = (sum_j softmax_j(s_ij) v_j W) W^T,   j <= i

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). U (Hkv, D, r_k), W (Hkv, D, r_v): orthonormal columns, the
    first left singular vectors of calibration text's keys and queries together, of its values; not centred. `fit` finds
    them; until then directions are random. `ranks(threshold)` says how many hold that part of the sum of singular
    values (not of their squares), the most over key heads. Paper: arXiv 2408.05646; details follow the authors' code
    (UtkarshSaxena1/EigenAttn). Deviations: they fold U and W into the projections, which gives the same numbers; with
    rotary positions they take one basis a layer, keep keys as they are before the rotation, and lift and rotate all of
    them at each step, where here keys are taken as attention meets them, one basis a key head, whose queries share it,
    so that scores are as narrow as the cache (and keys as rotated as they come need more directions). Their search for
    the thresholds of all layers under an error of 0.025 is left to the caller. rank, value_rank: r_k and r_v, parts of
    D or channels (0.5, 0.5). decoded: tokens that are decoded (16). Costs N^2 (r_k + r_v) / 2 a prompt, M (r_k + r_v) a
    step; caches (r_k + r_v) / 2 D of what dense attention does. Errors: ValueError for a rank of 0 or above D, and for
    calibration tensors of other heads.

    >>> eigen, (q, k) = EigenAttention(Dims(2, 8), rank=3), torch.randn(2, 1, 2, 40, 8)
    >>> eigen.fit(q, k, k)
    >>> eigen(q, k, k).shape, eigen.ranks(1.0)
    (torch.Size([1, 2, 40, 8]), (8, 8))
    """

    spec = Spec(
        id="eigen_attention",
        name="Eigen Attention",
        title="Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
        paper="2408.05646",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Policy", "attend"),
    )
    per_head = True
    bases: Tensor
    spectra: Tensor

    def __init__(
        self, dims: Dims, *, rank: float | int = 0.5, value_rank: float | int = 0.5, decoded: int = 16
    ) -> None:
        super().__init__(dims, decoded=decoded)
        d = dims.head_dim
        self.widths = tuple(
            r if isinstance(budgeted(name, r), int) else max(1, round(r * d))
            for name, r in (("rank", rank), ("value_rank", value_rank))
        )
        for name, width in zip(("rank", "value_rank"), self.widths, strict=True):
            if width > d:
                raise ValueError(f"{name}: got {width} for head_dim {d}; pass at most {d}, or a float in (0, 1]")
        # All directions, in double, so that what is turned there and back loses nothing; a cast of the module casts it.
        start = torch.linalg.qr(torch.randn(2, dims.num_kv_heads, d, d, dtype=torch.float64)).Q
        self.register_buffer("bases", start)
        self.register_buffer("spectra", torch.ones(2, dims.num_kv_heads, d, dtype=torch.float64))
        self.policy = LowRank(self)

    @property
    def axes(self) -> tuple[Tensor, Tensor]:
        """U and W."""
        return self.bases[0, ..., : self.widths[0]], self.bases[1, ..., : self.widths[1]]

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take the directions of some text's q (B, H, M, D), k, v (B, Hkv, M, D), as attention meets them."""
        d = self.dims
        for name, x, heads in (("q", q, d.num_heads), ("k", k, d.num_kv_heads), ("v", v, d.num_kv_heads)):
            if x.ndim != 4 or (x.shape[1], x.shape[3]) != (heads, d.head_dim):
                raise ValueError(f"{name}: got {tuple(x.shape)}; pass (batch, {heads}, tokens, {d.head_dim})")

        def rows(x: Tensor) -> Tensor:
            return x.double().unflatten(1, (d.num_kv_heads, -1)).transpose(0, 1).flatten(1, 3)

        for at, seen in enumerate((torch.cat([rows(k), rows(q)], 1), rows(v))):
            found = torch.linalg.eigh(seen.mT @ seen)
            self.bases[at].copy_(found.eigenvectors.flip(-1))
            self.spectra[at].copy_(found.eigenvalues.flip(-1).clamp(min=0).sqrt())

    def ranks(self, threshold: float) -> tuple[int, int]:
        """How many directions of keys and of values hold this part of the sum of singular values, in every key head."""
        held = self.spectra.double().cumsum(-1) / self.spectra.double().sum(-1, keepdim=True)
        keys, values = (1 + (held < threshold).sum(-1).amax(-1)).clamp(max=self.dims.head_dim).tolist()
        return keys, values

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bases, group = dict(self.named_buffers())["bases"].to(q.dtype), q.shape[1] // k.shape[1]
        out = []
        for h in range(q.shape[1]):
            onto = [b[h // group][:, :r] @ b[h // group][:, :r].T for b, r in zip(bases, self.widths, strict=True)]
            scores = (q[:, h] @ onto[0]) @ k[:, h // group].mT / q.shape[3] ** 0.5
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ (v[:, h // group] @ onto[1]))
        return torch.stack(out, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"rank": 3, "value_rank": 0.7, "decoded": 11}),
            Case(Dims(2, 6), 23, {"rank": 0.3, "value_rank": 6, "decoded": 5}),
            Case(Dims(3, 4, 1), 7, {"rank": 1, "value_rank": 1, "decoded": 3}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"rank": 1.0, "value_rank": 1.0}

    @classmethod
    def planted(cls, noise: float) -> tuple[EigenAttention, tuple[Tensor, Tensor, Tensor]]:
        """One with r_k = 6, r_v = 4 of 32, and q, k, v that vary in so many directions of their own, and a little."""
        random = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        keys, values = (torch.linalg.qr(normal(1, 2, 32, 32)).Q[..., :r].mT for r in (6, 4))
        q, k, v = (
            normal(1, heads, 256, len(axes[0, 0])) @ axes.repeat_interleave(heads // 2, 1)
            for heads, axes in ((4, keys), (2, keys), (2, values))
        )
        q, k, v = (x + noise * normal(*x.shape) for x in (q, k, v))
        return cls(Dims(4, 32, 2), rank=6, value_rank=4), (q, k, v)

    @claim("The cache shrinks to (r_k + r_v) / 2 D, and with r = D nothing is lost.")
    def shrinks(cls) -> Finding:
        sizes, far = [], 0.0
        _, qkv = cls.planted(1.0)
        dense = attend(*qkv, Causal())
        for rank, value_rank in ((32, 32), (6, 4)):
            eigen = cls(Dims(4, 32, 2), rank=rank, value_rank=value_rank)
            session = eigen.session()
            o = eigen.read(session, *qkv)
            far = max(far, float((o - dense).abs().max())) if rank == 32 else far
            pool = session.store(0).pool
            sizes.append(pool.k.nbytes + pool.v.nbytes)
        part = sizes[1] / sizes[0]
        return Finding(
            far < 1e-13 and part == 10 / 64, f"{part:.3f} of the bytes at 6 + 4 of 2 x 32; {far:.0e} off at 32"
        )

    @claim("What varies in r directions is attended to exactly in them, once they are fitted.")
    def finds_them(cls) -> Finding:
        eigen, qkv = cls.planted(0.0)
        dense, off = attend(*qkv, Causal()), []
        for fits in (False, True):
            if fits:
                eigen.fit(*qkv)
            off.append(float((eigen(*qkv) - dense).norm() / dense.norm()))
        ranks = eigen.ranks(1 - 1e-6)
        holds = off[1] < 1e-12 < 0.1 < off[0] and ranks == (6, 4)
        return Finding(holds, f"ranks {ranks}; {off[1]:.0e} off dense attention, {off[0]:.2f} in random directions")

    @claim("On the text it was fitted to, scores are off by at most half of what singular values beyond r are squared.")
    def bounded(cls) -> Finding:
        eigen, (q, k, v) = cls.planted(0.2)
        eigen.fit(q, k, v)
        projected = eigen.policy.project(0, q, k, v)
        exact, narrow = (x[0] @ x[1].repeat_interleave(2, 1).mT for x in ((q, k), projected))
        off = (exact - narrow).unflatten(1, (2, 2)).square().sum((0, 2, 3, 4)).sqrt()
        # Of each query head |q (1 - UU') k'| <= |q (1 - UU')| |(1 - UU') k|; of the two, q's are the larger part.
        bound = eigen.spectra[0, :, 6:].square().sum(-1) / 2
        worst = float((off / bound).max())
        return Finding(worst <= 1, f"error of a head's scores at most {worst:.2f} of that bound")
