"""NSA: every query reads compressed blocks of the past, the few blocks that these point to, and a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.where import Causal, Plan, Summaries, Window, plan_chosen

QUERIES = 1024  # scored at a time


class Compress(nn.Module):
    """One token for each stretch of `size` tokens, one stretch every `stride`: W2 gelu(W1 vec(x + e) + b1) + b2.

    x (B, Hkv, T, D) -> (B, Hkv, max(0, (T - size) // stride + 1), D). e (size, D): the place inside the stretch.
    """

    def __init__(self, size: int, stride: int, head_dim: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.place = nn.Parameter(0.02 * torch.randn(size, head_dim))
        self.mix = nn.Sequential(nn.Linear(size * head_dim, 2 * head_dim), nn.GELU(), nn.Linear(2 * head_dim, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < self.size:
            return x[:, :, :0]
        stretches = x.unfold(2, self.size, self.stride).transpose(-1, -2)  # (B, Hkv, stretches, size, D)
        return self.mix((stretches + self.place).flatten(-2))


@dataclass(frozen=True)
class NSAState:
    """What a decoder keeps: keys and values (6, B, Hkv, T, D), compressed ones (2, B, Hkv, stretches, D)."""

    tokens: Tensor
    stretches: Tensor


class NSA(Mixer):
    """Native sparse attention: three branches with their own keys and values, gated per head.

        o_t = sum_c g_t^c softmax(q_t K_c^T / sqrt(D)) V_c,   g_t = sigmoid(W_g x_t + b_g)
        compressed: stretches [i d, i d + l) that have ended by t, a key and a value each from an MLP; 0 where none has
        selected: tokens j <= t of `num_selected` blocks of l' tokens: the first, t's own and the one before it, then
            those with the largest sum_i p_t^cmp[i] |stretch i and block| / d, over the query heads of a key head
        window: tokens t - w < j <= t

    x, y (B, N, C); q = W_q x in H heads, keys and values of each branch in Hkv heads, y = W_o o. Paper: arXiv
    2502.11089, equations 5-12, with its double sum of equation 9 read as an overlap; compared with the open
    implementation at fla-org/native-sparse-attention, which pools by means and shares keys and values between branches.
    Deviations: the width of the MLP (2 D) is not given; rotary positions are the host's. The choice has no gradient,
    the MLP learns through the compressed branch. compress_size, compress_stride: l (32) and d (16), which divides l and
    l'. select_size: l' (64). num_selected: blocks read, the forced ones included (16). window: w (512), the query
    itself included. Costs N (N / d + n l' + w) pairs a head, and one token of each branch to decode. Errors: ValueError
    when d does not divide l and l'.

    >>> NSA(Dims(4, 8, 2), window=16)(torch.randn(1, 100, 32)).shape
    torch.Size([1, 100, 32])
    """

    spec = Spec(
        id="nsa",
        name="NSA (Native Sparse Attention)",
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        paper="2502.11089",
        year=2025,
        family="dynamic_sparse",
        uses=("attend", "Summaries", "plan_chosen"),
        discrete=True,
        waits="lists of tiles whose sides no kernel takes are read by the host",
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        compress_size: int = 32,
        compress_stride: int = 16,
        select_size: int = 64,
        num_selected: int = 16,
        window: int = 512,
    ) -> None:
        super().__init__(dims)
        self.size, self.stride = positive("compress_size", compress_size), positive("compress_stride", compress_stride)
        self.select_size, self.num_selected = (
            positive("select_size", select_size),
            positive("num_selected", num_selected),
        )
        self.window = positive("window", window)
        if compress_size % compress_stride or select_size % compress_stride:
            raise ValueError(
                f"compress_stride: got {compress_stride}; it must divide compress_size {compress_size} "
                f"and select_size {select_size}"
            )
        c, kv = dims.dim, dims.num_kv_heads * dims.head_dim
        self.query, self.gate, self.out = (
            nn.Linear(c, c, bias=False),
            nn.Linear(c, 3 * dims.num_heads),
            nn.Linear(c, c, bias=False),
        )
        self.key_value = nn.Linear(c, 6 * kv, bias=False)
        self.compress_k, self.compress_v = (Compress(compress_size, compress_stride, dims.head_dim) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, N, D), and keys and values of the three branches, (6, B, Hkv, N, D)."""
        d = self.dims
        q = self.query(x).unflatten(-1, (d.num_heads, d.head_dim)).transpose(1, 2)
        return q, self.key_value(x).unflatten(-1, (6, d.num_kv_heads, d.head_dim)).permute(2, 0, 3, 1, 4)

    def compressed(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values of all stretches: (2, B, Hkv, stretches, D)."""
        return torch.stack([self.compress_k(k), self.compress_v(v)])

    def select(self, q: Tensor, keys: Tensor, lse: Tensor, num_tokens: int) -> Tensor:
        """The blocks that each query reads: (B, Hkv, N, num_selected) int, -1 for none; q's are the last N of
        `num_tokens`.
        """
        n, blocks = q.shape[2], -(-num_tokens // self.select_size)
        inner, outer = self.size // self.stride, self.select_size // self.stride
        overlap = F.conv1d(
            q.new_ones(1, 1, outer), q.new_ones(1, 1, inner), padding=inner - 1
        )  # 1, 2, 2, 2, 1 by default
        own = torch.arange(num_tokens - n, num_tokens, device=q.device)[:, None] // self.select_size
        block, chosen = torch.arange(blocks, device=q.device), []
        forced = (block == 0) | (block == own) | (block == own - 1)
        for at in range(0, n, QUERIES):
            part = slice(at, at + QUERIES)
            s = (
                torch.einsum("bhgnd,bhmd->bhgnm", q[:, :, part].unflatten(1, (keys.shape[1], -1)), keys)
                * q.shape[3] ** -0.5
            )
            start = torch.arange(keys.shape[2], device=q.device) * self.stride
            ended = start + self.size <= torch.arange(num_tokens - n, num_tokens, device=q.device)[part, None] + 1
            p = (s - lse[:, :, part].to(s.dtype).unflatten(1, (keys.shape[1], -1))[..., None]).masked_fill(
                ~ended, -torch.inf
            )
            p = F.pad(p.exp().sum(2), (inner - 1, blocks * outer - keys.shape[2]))
            score = F.conv1d(p.flatten(0, 2)[:, None], overlap, stride=outer)[:, 0].view(*p.shape[:3], blocks)
            score = score.masked_fill(forced[part], torch.inf).masked_fill(block > own[part], -torch.inf)
            best = score.topk(min(self.num_selected, blocks))
            chosen.append(best.indices.masked_fill(best.values == -torch.inf, -1))
        return torch.cat(chosen, 2)

    def selection(self, q: Tensor, keys: Tensor, lse: Tensor, num_tokens: int) -> Plan:
        """The plan of the selected branch: a list for each query, shared by the query heads of a key head."""
        (batch, heads, n, _), kv_heads = q.shape, keys.shape[1]
        with torch.no_grad():
            wide = torch.promote_types(q.dtype, torch.float32)
            chosen = self.select(q.to(wide), keys.to(wide), lse, num_tokens).flatten(0, 1)
        alike = heads // kv_heads
        lists = torch.arange(batch * kv_heads, device=q.device).view(batch, -1).repeat_interleave(alike, 1)
        return plan_chosen(Causal(), chosen, lists, n, num_tokens, (1, self.select_size), alike=alike)

    def mix(self, x: Tensor, q: Tensor, tokens: Tensor, stretches: Tensor) -> Tensor:
        """y for the queries of x, the last N of the tokens."""
        keys, values = stretches
        if keys.shape[2]:
            seen = Summaries(tokens.shape[3], self.size, self.stride)
            coarse, lse = attend(q, keys, values, seen, return_lse=True)
        else:
            coarse, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
        fine = attend(q, tokens[2], tokens[3], self.selection(q, keys, lse, tokens.shape[3]))
        near = attend(q, tokens[4], tokens[5], Window(self.window) & Causal())
        gates = self.gate(x).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]  # (3, B, H, N, 1)
        mixed = gates[0] * coarse + gates[1] * fine + gates[2] * near
        return self.out(mixed.transpose(1, 2).flatten(2))

    def compute(self, x: Tensor) -> Tensor:
        q, tokens = self.heads(x)
        return self.mix(x, q, tokens, self.compressed(tokens[0], tokens[1]))

    def step(self, x: Tensor, *, state: NSAState | None = None) -> tuple[Tensor, NSAState]:
        q, tokens = self.heads(x)
        stretches = tokens[:2, :, :, :0]
        if state is not None:
            tokens, stretches = torch.cat([state.tokens, tokens], 3), state.stretches
        ended = tokens.shape[3] - self.size
        if ended >= 0 and ended % self.stride == 0:
            last = tokens[:2, :, :, -self.size :]
            stretches = torch.cat([stretches, self.compressed(last[0], last[1])], 3)
        return self.mix(x, q, tokens, stretches), NSAState(tokens, stretches)

    def oracle(self, x: Tensor) -> Tensor:
        w, d = dict(self.named_parameters()), self.dims
        (batch, n, _), group, out = x.shape, d.num_heads // d.num_kv_heads, torch.zeros_like(x)

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            p = ((query * keys).sum(-1) / d.head_dim**0.5).softmax(-1)
            return p @ values, p.detach()

        def squeeze(stretch: Tensor, name: str) -> Tensor:
            hidden = w[f"{name}.mix.0.weight"] @ (stretch + w[f"{name}.place"]).flatten() + w[f"{name}.mix.0.bias"]
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            return w[f"{name}.mix.2.weight"] @ hidden + w[f"{name}.mix.2.bias"]

        for b in range(batch):
            q = (x[b] @ w["query.weight"].T).view(n, d.num_heads, d.head_dim)
            kv = (x[b] @ w["key_value.weight"].T).view(n, 6, d.num_kv_heads, d.head_dim)
            gates = 1 / (1 + torch.exp(-(x[b] @ w["gate.weight"].T + w["gate.bias"]))).view(n, 3, d.num_heads)
            starts = range(0, n - self.size + 1, self.stride)
            rows = []
            for t in range(n):
                heads: list[Tensor] = []
                for shared in range(d.num_kv_heads):
                    mine = range(shared * group, (shared + 1) * group)
                    past = [s for s in starts if s + self.size - 1 <= t]
                    coarse, mass = {h: 0 * q[t, h] for h in mine}, [0.0] * len(past)
                    if past:
                        keys = torch.stack([squeeze(kv[s : s + self.size, 0, shared], "compress_k") for s in past])
                        values = torch.stack([squeeze(kv[s : s + self.size, 1, shared], "compress_v") for s in past])
                        for h in mine:
                            coarse[h], p = attention(q[t, h], keys, values)
                            mass = [a + b for a, b in zip(mass, p.tolist(), strict=True)]
                    own = t // self.select_size
                    score = {}
                    for j in range(own + 1):
                        block = range(j * self.select_size, (j + 1) * self.select_size)
                        inside = [sum(i in block for i in range(s, s + self.size)) / self.stride for s in past]
                        score[j] = (
                            torch.inf
                            if j in (0, own, own - 1)
                            else sum(a * b for a, b in zip(mass, inside, strict=True))
                        )
                    best = sorted(score, key=lambda j: -score[j])[: self.num_selected]
                    picked = [
                        i for j in best for i in range(j * self.select_size, (j + 1) * self.select_size) if i <= t
                    ]
                    near = range(max(0, t - self.window + 1), t + 1)
                    for h in mine:
                        fine, _ = attention(q[t, h], kv[picked, 2, shared], kv[picked, 3, shared])
                        close, _ = attention(q[t, h], kv[near, 4, shared], kv[near, 5, shared])
                        heads.append(gates[t, 0, h] * coarse[h] + gates[t, 1, h] * fine + gates[t, 2, h] * close)
                rows.append(w["out.weight"] @ torch.cat(heads))
            out[b] = torch.stack(rows)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"compress_size": 4, "compress_stride": 2, "select_size": 6, "num_selected": 4, "window": 5}
        return [
            Case(Dims(2, 4), 47, small, batch=1),
            Case(Dims(4, 2, 2), 29, {**small, "compress_size": 2, "select_size": 4}),
            Case(Dims(1, 8), 13, batch=1),
        ]

    @claim(
        "To decode at t reads floor((t - l) / d) + 1 stretches, n blocks of l' and a window of w tokens: 5.6k at 64k."
    )
    def reads(cls) -> Finding:
        module = cls(Dims(2, 8, 1))
        t = 2048
        x = torch.randn(1, t, 16)
        with torch.no_grad():
            q, tokens = module.heads(x)
            stretches = module.compressed(tokens[0], tokens[1])
            keys, values = stretches
            _, lse = attend(q[:, :, -1:], keys, values, Summaries(t, 32, 16), return_lse=True)
            plan = module.selection(q[:, :, -1:], keys, lse, t)
        counted = stretches.shape[3] + int(plan.num_attended) + 512
        promised = (t - 32) // 16 + 1 + 16 * 64 + 512
        at_64k = (65536 - 32) // 16 + 1 + 16 * 64 + 512
        return Finding(counted == promised and round(at_64k, -2) == 5600, f"{counted} of {t} tokens, {at_64k} of 65536")

    @claim(
        "With all blocks selected and gates (0, 1, 0) it is full attention on the selected branch's keys and values."
    )
    def full(cls) -> Finding:
        module = cls(Dims(4, 8, 2), select_size=16, num_selected=8).double()
        x = torch.randn(1, 128, 32, dtype=torch.float64)
        with torch.no_grad():
            module.gate.weight.zero_()
            module.gate.bias.copy_(torch.tensor([-torch.inf, torch.inf, -torch.inf]).repeat_interleave(4))
            q, tokens = module.heads(x)
            k, v = (t.repeat_interleave(2, 1) for t in tokens[2:4])
            p = (q @ k.mT / 8**0.5).masked_fill(torch.ones(128, 128).triu(1) > 0, -torch.inf).softmax(-1)
            dense = module.out((p @ v).transpose(1, 2).flatten(2))
            apart = float((module(x) - dense).abs().max() / dense.abs().max())
        return Finding(
            apart < 128 * torch.finfo(torch.float64).eps, f"largest difference {apart:.1e} of the largest output"
        )

    @claim("Gradients reach every parameter, the compression's through the compressed branch.")
    def trains(cls) -> Finding:
        module = cls(Dims(2, 8), compress_size=8, compress_stride=4, select_size=16, window=16)
        module(torch.randn(1, 96, 16)).square().sum().backward()
        reached = [name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
        total = len(list(module.parameters()))
        return Finding(len(reached) == total, f"{len(reached)} of {total} parameters")
