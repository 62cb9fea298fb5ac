"""HyperAttention: queries meet the keys of their own hash bucket, and a few sampled keys stand for all the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade import attend, merge
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Causal, Full, Plan, plan_chosen


class HyperAttention(Attention):
    """Attention in near-linear time by sorted hashes and uniform samples.

        hash(x) = rank of the sign bits of x R in the order of the Gray code; q and k are sorted by it, each by itself
        o_i = sum_{j in own block} p_ij v_j + sum_{j in samples outside it} p_ij v_j,
        p_ij ~ exp(s_ij) in the block, (M / m) exp(s_ij) for a sample,   s_ij = q_i . k_j / sqrt(D)

    q (B, H, N, D), k, v (B, Hkv, M, D) -> o (B, H, N, D). The n-th block of the sorted queries meets the n-th of the
    sorted keys; m keys, drawn with replacement, are shared by all queries of a key head. At most `min_seq_len` keys are
    attended exactly. Causal: the two halves by themselves, and the later queries with the earlier keys as above, merged
    by their lse. Paper: arXiv 2310.05869, algorithms 1-3; samples are uniform as in the authors' code (the paper's
    theory draws them by the norms of values). Deviations: R and the draws are buffers, made once from `seed`, so that a
    call is repeatable. The last blocks may be short, where the code appends zero rows. The hash has no gradient; q, k
    and v get theirs through the pairs that are attended. causal: False. block: keys of a block (256). samples: m (256).
    hashes: sign bits (7). min_seq_len: 4096. seed: 0. Costs N (block + m) D, times log2(N / min_seq_len) levels when
    causal. Errors: ValueError for N != M when causal.

    >>> module, x = HyperAttention(Dims(2, 8), block=16, samples=8, min_seq_len=32), torch.randn(1, 2, 100, 8)
    >>> module(x, x, x).shape
    torch.Size([1, 2, 100, 8])
    """

    spec = Spec(
        id="hyper_attention",
        name="HyperAttention",
        title="HyperAttention: Long-context Attention in Near-Linear Time",
        paper="2310.05869",
        year=2023,
        family="dynamic_sparse",
        uses=("attend", "merge", "plan_chosen"),
        discrete=True,
        waits="lists of tiles whose sides no kernel takes are read by the host",
    )
    per_head = True  # every key head has draws of its own
    rotation: Tensor
    draws: Tensor

    def __init__(
        self,
        dims: Dims,
        *,
        causal: bool = False,
        block: int = 256,
        samples: int = 256,
        hashes: int = 7,
        min_seq_len: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(dims)
        self.causal, self.block, self.samples = causal, positive("block", block), positive("samples", samples)
        self.min_seq_len = positive("min_seq_len", min_seq_len)
        random = torch.Generator().manual_seed(positive("seed", seed, least=0))
        self.register_buffer("rotation", torch.randn(dims.head_dim, positive("hashes", hashes), generator=random))
        self.register_buffer("draws", torch.randint(2**53, (dims.num_kv_heads, samples), generator=random))  # modulo M
        self.prefill = causal  # halves and hashes depend on the whole prompt

    def plan(self, q: Tensor, k: Tensor) -> Plan | None:
        """The plan over sorted queries and keys; None when causal, which follows one a level."""
        if k.shape[2] <= self.min_seq_len:
            pattern = Causal() if self.causal else Full()
            return pattern.plan(q.shape[2], k.shape[2], q.shape[1], device=q.device)
        return None if self.causal else self.sorted_plan(q.shape[2], k.shape[2])

    def sorted_plan(self, n: int, m: int) -> Plan:
        """Diagonal tiles, and the samples that lie outside of each."""
        kv_heads, device = self.draws.shape[0], self.draws.device
        num_blocks = -(-m // self.block)
        rows = -(-n // num_blocks)
        tiles = torch.arange(-(-n // rows), device=device)
        drawn = (self.draws % m)[:, None].expand(-1, len(tiles), -1)
        tokens = drawn.masked_fill(drawn // self.block == tiles[:, None], -1)
        weights = torch.full(tokens.shape, math.log(m / self.samples), dtype=torch.float64, device=device)
        group_of = torch.arange(kv_heads, device=device).repeat_interleave(self.dims.group)[None]
        diagonal = tiles[None, :, None].expand(kv_heads, -1, -1)
        block = (rows, self.block)
        return plan_chosen(Full(), diagonal, group_of, n, m, block, tokens=tokens, token_log_weights=weights)

    def order(self, x: Tensor) -> Tensor:
        """Tokens of each head by the rank of their hash: (B, H, N) int64."""
        wide = torch.promote_types(x.dtype, torch.float32)
        signs = x.detach().to(wide) @ self.rotation.to(wide) > 0
        rank = (signs * 2 ** torch.arange(signs.shape[-1], device=x.device)).sum(-1)
        shift = 1
        while shift < signs.shape[-1]:  # from a Gray code to its rank: every bit is the parity of those above
            rank = rank ^ (rank >> shift)
            shift *= 2
        return rank.argsort(dim=-1, stable=True)

    def hashed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(o, lse) without a mask."""
        q_order, k_order = self.order(q), self.order(k)
        q, k, v = (x.take_along_dim(at[..., None], 2) for x, at in ((q, q_order), (k, k_order), (v, k_order)))
        o, lse = attend(q, k, v, self.sorted_plan(q.shape[2], k.shape[2]), return_lse=True)
        back = q_order.argsort(-1)
        return o.take_along_dim(back[..., None], 2), lse.take_along_dim(back, 2)

    def recursive(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(o, lse) under the causal mask."""
        if k.shape[2] <= self.min_seq_len:
            return attend(q, k, v, Causal(), return_lse=True)
        half = k.shape[2] // 2
        early, late = ([x[:, :, part] for x in (q, k, v)] for part in (slice(half), slice(half, None)))
        first, second = self.recursive(*early), self.recursive(*late)
        second = merge([second, self.hashed(late[0], early[1], early[2])])
        return torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.causal and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"k: got {k.shape[2]} keys for {q.shape[2]} queries; causal halving needs as many keys as queries"
            )
        if self.causal:
            return self.recursive(q, k, v)[0]
        return attend(q, k, v) if k.shape[2] <= self.min_seq_len else self.hashed(q, k, v)[0]

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, group = dict(self.named_buffers()), q.shape[1] // k.shape[1]

        def bucket(x: Tensor) -> int:
            bits = [int(s > 0) for s in (x.detach() @ w["rotation"].to(x.dtype)).tolist()]
            gray = sum(bit << place for place, bit in enumerate(bits))
            return next(i for i in range(2 ** len(bits)) if i ^ (i >> 1) == gray)

        def exp_scores(query: Tensor, keys: Tensor) -> Tensor:
            return ((query * keys).sum(-1) / query.shape[-1] ** 0.5).exp()

        def sums(q: Tensor, k: Tensor, v: Tensor, draws: list[int], masked: bool) -> tuple[Tensor, Tensor]:
            """Numerators (N, Dv) and denominators (N,) of one head."""
            m = len(k)
            if m <= self.min_seq_len:
                e = torch.stack([exp_scores(row, k) for row in q])
                e = e.tril() if masked else e
                return e @ v, e.sum(1)
            if masked:
                half = m // 2
                first = sums(q[:half], k[:half], v[:half], draws, True)
                second = sums(q[half:], k[half:], v[half:], draws, True)
                cross = far(q[half:], k[:half], v[:half], draws)
                return torch.cat([first[0], second[0] + cross[0]]), torch.cat([first[1], second[1] + cross[1]])
            return far(q, k, v, draws)

        def far(q: Tensor, k: Tensor, v: Tensor, draws: list[int]) -> tuple[Tensor, Tensor]:
            n, m = len(q), len(k)
            queries = sorted(range(n), key=lambda i: bucket(q[i]))
            keys = sorted(range(m), key=lambda j: bucket(k[j]))
            rows = -(-n // -(-m // self.block))
            top, bottom = [q[0] * 0] * n, [q[0, 0] * 0] * n
            for place, i in enumerate(queries):
                start = place // rows * self.block
                own = keys[start : start + self.block]
                drawn = [keys[s % m] for s in draws if not start <= s % m < start + self.block]
                near, distant = exp_scores(q[i], k[own]), exp_scores(q[i], k[drawn]) * m / len(draws)
                top[i], bottom[i] = near @ v[own] + distant @ v[drawn], near.sum() + distant.sum()
            return torch.stack(top), torch.stack(bottom)

        out = []
        for b in range(len(q)):
            for h in range(q.shape[1]):
                shared = h // group
                top, bottom = sums(q[b, h], k[b, shared], v[b, shared], w["draws"][shared].tolist(), self.causal)
                out.append(top / bottom[:, None])
        return torch.stack(out).view(*q.shape[:3], v.shape[3])

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"block": 8, "samples": 5, "hashes": 3, "min_seq_len": 16}
        return [
            Case(Dims(2, 8), 53, small),
            Case(Dims(4, 4, 2), 41, {**small, "block": 7, "seed": 3}, batch=1),
            Case(Dims(2, 8), 61, {**small, "causal": True, "min_seq_len": 11}, batch=1),
            Case(Dims(1, 8), 13, small),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"block": length, "min_seq_len": 1}

    @claim("Given the sort, row sums and numerators are unbiased, and the error falls with the number of samples.")
    def unbiased(cls) -> Finding:
        random = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 1, 512, 16, generator=random, dtype=torch.float64)
        exact, total = attend(q, k, v, return_lse=True)
        sums, errors = [], {}
        for samples in (16, 64, 256):
            few = []
            for seed in range(48):
                module = cls(Dims(1, 16), block=32, samples=samples, min_seq_len=1, seed=seed).double()
                module.rotation.copy_(cls(Dims(1, 16)).rotation)  # one sort for all
                o, lse = module.hashed(q, k, v)
                few.append(float((o - exact).norm() / exact.norm()))
                if samples == 16:
                    sums.append((lse - total).exp().mean())
            errors[samples] = sum(few) / len(few)
        each = torch.stack(sums)
        off, spread = float(each.mean() - 1), float(each.std() / len(each) ** 0.5)
        falls = errors[16] > errors[64] > errors[256]
        figure = f"mean of row sums / true ones: 1 {off:+.4f} +- {spread:.4f}; error "
        return Finding(
            abs(off) < 4 * spread and falls, figure + ", ".join(f"{e:.3f} (m = {m})" for m, e in errors.items())
        )

    @claim("The work grows linearly with the tokens: block + m pairs a query.")
    def linear(cls) -> Finding:
        module = cls(Dims(1, 8))
        pairs = [module.sorted_plan(n, n).num_attended / n for n in (8192, 32768)]
        return Finding(max(pairs) <= 512, f"{pairs[0]:.0f} and {pairs[1]:.0f} pairs a query at N = 8192 and 32768")
