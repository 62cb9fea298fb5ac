"""LongT5, transient global attention: a band, and sums over blocks that are made for one layer and then forgotten."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, reached
from saccade.errors import positive
from saccade.softmax import merge
from saccade.where import Band, Full, Pattern, Summaries

EPS = 1e-6


class Buckets(nn.Module):
    """The score bias of T5: an entry for each head and bucket of distances, which widen as distances grow.

    With b buckets for a direction and e = floor(b / 2), distance n has bucket n if n < e, else
    min(b - 1, e + floor((b - e) log(n / e) / log(d / e))), d the largest distance that is told apart.
    """

    edges: Tensor

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.each = causal, num_buckets if causal else num_buckets // 2
        exact = self.each // 2
        rest = self.each - exact
        if max_distance <= exact:
            raise ValueError(
                f"max_distance: got {max_distance} with num_buckets {num_buckets}; "
                f"distances up to {exact} have a bucket of their own, so pass more than {exact}"
            )
        # The least n at which the logarithm reaches i, in integers: n^rest e^i >= d^i e^rest.
        edges, n = list(range(1, exact + 1)), exact
        for i in range(1, rest):
            while n**rest * exact**i < max_distance**i * exact**rest:
                n += 1
            edges.append(n)
        self.register_buffer("edges", torch.tensor(edges), persistent=False)
        self.table = nn.Parameter(torch.randn(num_heads, num_buckets) * num_heads**-0.5)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        ahead = k_pos[None, :] - q_pos[:, None]
        near = torch.bucketize(-ahead.clamp(max=0) if self.causal else ahead.abs(), self.edges, right=True)
        return self.table[:, near if self.causal else near + self.each * (ahead > 0)]


class SideBias(nn.Module):
    """The bias of tokens that ask globals: `buckets` between the token's own block and the global's."""

    def __init__(self, buckets: Buckets, num_tokens: int, block: int) -> None:
        super().__init__()
        self.buckets, self.num_tokens, self.block = buckets, num_tokens, block

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        count = self.num_tokens // self.block
        own = (q_pos + (self.num_tokens - count)) // self.block  # queries count as the last of `count` positions
        return self.buckets(own if self.buckets.causal else own.clamp(max=count - 1), k_pos)


class LongT5TGlobal(Mixer):
    """Local attention whose keys also are transient globals, one a block of tokens.

        g_b = RMSNorm(sum of x_t over block b)     the N mod B tokens at the end belong to the last block
        o_t = softmax over { q_t . k_j + bias[j - t] : |j - t| <= r } and { q_t . k(g_b) + side[b - block of t] }
        y_t = W_o o_t;   q = W_q x, k = W_k x, v = W_v x;   k(g) = W_k g, v(g) = W_v g

    x, y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D); globals: floor(N / B), none when N < B. Scores have no
    1/sqrt(D): it is part of W_q's initial value. Both biases are T5's: an entry for each head and bucket. Paper: arXiv
    2112.07916, TGlobal; sums instead of means, tail, side bias and the causal form follow the authors' code. x comes
    out of the norm before the layer, which is the host's. Deviations: the model shares its two tables between all
    layers; here each layer has its own, so assign `bias` and `side` of one to the others. Shared key heads are ours.
    radius: r, tokens on either side (default 127). block: B, tokens a global (16). num_buckets: entries of a table
    (32), half of them for keys ahead. max_distance: d (128). causal: tokens see j <= t and globals of earlier blocks,
    those of the tail see all and join none, and all buckets look back (False). Costs N (2 r + 1 + N / B) pairs a head.
    Errors: ValueError or TypeError for sizes that are no positive integers, a radius below 0, fewer than 4 buckets or
    an odd number of them, and a max_distance within the buckets of one distance each.

    >>> LongT5TGlobal(Dims(2, 8), radius=3, block=4)(torch.randn(1, 19, 16)).shape
    torch.Size([1, 19, 16])
    """

    spec = Spec(
        id="longt5_tglobal",
        name="LongT5 (TGlobal)",
        title="LongT5: Efficient Text-To-Text Transformer for Long Sequences",
        paper="2112.07916",
        year=2021,
        family="static_sparse",
        uses=("attend", "merge", "Band", "Summaries"),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        radius: int = 127,
        block: int = 16,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
    ) -> None:
        super().__init__(dims)
        self.radius, self.block, self.causal = positive("radius", radius, least=0), positive("block", block), causal
        if positive("num_buckets", num_buckets, least=4) % 2:
            raise ValueError(f"num_buckets: got {num_buckets}; half are for keys ahead, so pass an even number")
        self.max_distance = positive("max_distance", max_distance)
        self.bias, self.side = (Buckets(dims.num_heads, num_buckets, max_distance, causal) for _ in range(2))
        narrow = dims.num_kv_heads * dims.head_dim
        self.query, self.key = nn.Linear(dims.dim, dims.dim, bias=False), nn.Linear(dims.dim, narrow, bias=False)
        self.value, self.out = nn.Linear(dims.dim, narrow, bias=False), nn.Linear(dims.dim, dims.dim, bias=False)
        self.norm = nn.RMSNorm(dims.dim, eps=EPS)
        with torch.no_grad():
            self.query.weight.mul_(dims.head_dim**-0.5)

    def globals(self, x: Tensor) -> Tensor:
        """The transient globals: (B, floor(N / B), C)."""
        whole = x.shape[1] // self.block * self.block
        sums = x[:, :whole].unflatten(1, (-1, self.block)).sum(2)
        if whole < x.shape[1] and not self.causal:
            sums = torch.cat([sums[:, :-1], sums[:, -1:] + x[:, whole:].sum(1, keepdim=True)], 1)
        return self.norm(sums)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens or globals: (B, Hkv, M, D) each."""
        k, v = (layer(x).unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2) for layer in (self.key, self.value))
        return k, v

    def patterns(self, num_tokens: int) -> tuple[Pattern, Pattern]:
        """What tokens see of tokens, and of globals."""
        ahead = 0 if self.causal else self.radius
        return Band(self.radius, ahead), Summaries(num_tokens, self.block + 1, self.block) if self.causal else Full()

    def compute(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        near, far = self.patterns(n)
        q = self.query(x).unflatten(2, (-1, self.dims.head_dim)).transpose(1, 2)
        parts = [attend(q, *self.heads(x), near, scale=1.0, bias=self.bias, return_lse=True)]
        if n >= self.block:
            bias, keys = SideBias(self.side, n, self.block), self.heads(self.globals(x))
            parts.append(attend(q, *keys, far, scale=1.0, bias=bias, return_lse=True))
        return self.out(merge(parts)[0].transpose(1, 2).flatten(2))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, n, size = dict(self.named_parameters()), self.dims, x.shape[1], self.block
        count, buckets = n // size, w["bias.table"].shape[1]
        each = buckets if self.causal else buckets // 2
        exact = each // 2

        def bucket(ahead: int) -> int:
            far = at = max(0, -ahead) if self.causal else abs(ahead)
            if far >= exact:
                slack = torch.finfo(torch.float32).eps  # as published, against a logarithm that falls short
                steps = math.log(far / exact + slack) / math.log(self.max_distance / exact) * (each - exact)
                at = min(each - 1, exact + int(steps))
            return at + (0 if self.causal or ahead <= 0 else each)

        def project(name: str, rows: Tensor) -> Tensor:
            each_head = (rows @ w[f"{name}.weight"].T).unflatten(-1, (-1, d.head_dim)).transpose(-2, -3)
            return each_head.repeat_interleave(d.num_heads * d.head_dim // w[f"{name}.weight"].shape[0], -3)

        sums = []
        for b in range(count):
            end = n if b == count - 1 and not self.causal else (b + 1) * size
            sums.append(x[:, b * size : end].sum(1))
        pooled = torch.stack(sums, 1) if sums else x[:, :0]
        pooled = pooled / (pooled.square().mean(-1, keepdim=True) + EPS).sqrt() * w["norm.weight"]
        q, rows = project("query", x), []
        k, v, kg, vg = (project(name, t) for t in (x, pooled) for name in ("key", "value"))
        for t in range(n):
            seen = [j for j in range(n) if t - self.radius <= j <= (t if self.causal else t + self.radius)]
            own = t // size if self.causal else min(t // size, count - 1)
            blocks = [b for b in range(count) if not self.causal or (b + 1) * size <= t]
            local = (q[:, :, t, None] * k[:, :, seen]).sum(-1) + w["bias.table"][:, [bucket(j - t) for j in seen]]
            side = (q[:, :, t, None] * kg[:, :, blocks]).sum(-1) + w["side.table"][:, [bucket(b - own) for b in blocks]]
            weights = torch.cat([local, side], -1).softmax(-1)
            rows.append((weights[..., None] * torch.cat([v[:, :, seen], vg[:, :, blocks]], 2)).sum(2))
        return torch.stack(rows, 1).flatten(2) @ w["out.weight"].T

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"radius": 5, "block": 4, "num_buckets": 12, "max_distance": 11}
        return [
            Case(Dims(4, 3, 2), 31, small),
            Case(Dims(2, 4), 23, {**small, "radius": 9, "block": 3, "causal": True}),
            Case(Dims(1, 6), 7, {"radius": 2, "block": 8, "num_buckets": 4, "max_distance": 3}),
            Case(Dims(2, 3), 17, batch=1),
        ]

    @claim("A token weighs at most 2 r + 1 tokens and N / B globals: N (2 r + 1 + N / B) pairs instead of N^2.")
    def budget(cls) -> Finding:
        n, module = 8192, cls(Dims(1, 4))
        near, far = module.patterns(n)
        count = module.globals(torch.zeros(1, n, 4)).shape[1]
        pairs = int(near.plan(n, block=(64, 64)).num_attended) + int(far.plan(n, count, block=(64, 64)).num_attended)
        most = n * (2 * 127 + 1 + n // 16)
        figure = f"{pairs} pairs, {pairs / n**2:.1%} of N^2 at N = {n}; the formula, without the ends, {most}"
        return Finding(pairs == most - 127 * 128, figure)

    @claim("Beyond the projections it has one norm weight a channel, and a second table, which all layers may share.")
    def parameters_added(cls) -> Finding:
        layers = [cls(Dims(4, 8)) for _ in range(3)]
        for layer in layers[1:]:
            layer.bias, layer.side = layers[0].bias, layers[0].side
        weights = {id(p): p.numel() for layer in layers for p in layer.parameters()}
        more = sum(weights.values()) - 3 * 4 * 32**2 - 32 * 4
        return Finding(more == 32 * 4 + 3 * 32, f"{more} in 3 layers of 4 heads and 32 channels")

    @claim("With a global a token and no neighbours it is full attention over normed tokens and the token itself.")
    def limit(cls) -> Finding:
        n, module = 43, cls(Dims(2, 8), radius=0, block=1).double()
        x = torch.randn(1, n, 16, dtype=torch.float64)
        with torch.no_grad():
            q = module.query(x).unflatten(2, (2, 8)).transpose(1, 2)
            k, v = module.heads(torch.cat([x, module.norm(x)], 1))
            place = torch.arange(n)
            seen = torch.cat([torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool)], 1)
            bias = torch.cat([module.bias(place, place), module.side(place, place)], 2)
            weights = (q @ k.mT + bias).masked_fill(~seen, -torch.inf).softmax(-1)
            full = module.out((weights @ v).transpose(1, 2).flatten(2))
            error = float((module(x) - full).abs().max() / full.abs().max())
        return Finding(error < n * torch.finfo(torch.float64).eps, f"differs by {error:.1e} of the largest output")

    @claim("In one layer a token depends on all tokens, without globals on its neighbours.")
    def reach(cls) -> Finding:
        seen = []
        for block in (8, 128):  # none of 101 tokens has a global at 128
            module = cls(Dims(2, 8), radius=6, block=block)
            seen.append(int(reached(module, torch.randn(1, 101, 16), (0, 50)).sum()))
        return Finding(seen == [101, 13], f"{seen[0]} of 101 tokens, {seen[1]} without globals")
