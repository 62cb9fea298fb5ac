"""Spatial-TTT: attention in a window, plus a network whose weights learn the video while it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, rotated, sample
from saccade.errors import positive
from saccade.mix import turn_at
from saccade.where import Causal, Window

TINY = 1e-5  # added to lengths that divide
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class Learned:
    """What a stream leaves: three matrices (B, F, out, in) of each, and the tokens of the open chunk.

    main: A. weights: W, which queries read. velocity: M. gradient: G of the open chunk so far. keep: sum of its mu.
    """

    main: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    keep: Tensor
    count: int = 0


def orthogonal(g: Tensor) -> Tensor:
    """Singular values pulled towards 1, by five steps with coefficients of their own."""
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for a, b, c in MUON:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


class FastWeights(nn.Module):
    """f(x) = W_1 (silu(W_0 x) * W_2 x), whose weights take a step at the end of every chunk; F heads of W channels."""

    def __init__(self, heads: int, width: int, hidden: int, rank: int, chunk: int) -> None:
        super().__init__()
        self.chunk, gain = chunk, 0.5
        shapes = [(hidden, width), (hidden, width)]
        self.left = nn.ParameterList(torch.randn(heads, a, rank) * gain * rank**-0.5 for a, _ in shapes)
        self.right = nn.ParameterList(torch.randn(heads, rank, b) * gain * b**-0.5 for _, b in shapes)
        self.last = nn.Parameter(torch.randn(heads, width, hidden) * hidden**-0.5)

    def begin(self, batch: int, dtype: torch.dtype) -> Learned:
        lefts, rights = ([p.to(dtype) for p in pair] for pair in (self.left, self.right))
        first, third = (
            a @ b + 0.5 * torch.eye(a.shape[1], b.shape[2], dtype=dtype, device=a.device)
            for a, b in zip(lefts, rights, strict=True)
        )
        start = tuple(w.expand(batch, -1, -1, -1) for w in (first, self.last.to(dtype), third))
        zero = tuple(torch.zeros_like(w) for w in start)
        return Learned(start, start, zero, zero, start[0].new_zeros(batch, len(first)))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        keep: Tensor,
        state: Learned | None = None,
        *,
        goes_on: bool = True,
    ) -> tuple[Tensor, Learned]:
        """q, k, v (B, F, N, W), rate (B, F, N, 3), keep (B, F, N) -> o (B, F, N, W) and what has been learned.

        A sequence may be cut anywhere. A chunk's step is taken when the token after it comes. goes_on: False when none
        will come, so that the last chunk is only read.
        """
        start = self.begin(len(q), q.dtype)
        state, rows, at = state or start, [], 0
        norms = [torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in start.weights]
        while at < q.shape[2]:
            if state.count == self.chunk:
                state = self.close(state, norms)
            stop = min(q.shape[2], at + self.chunk - state.count)
            w0, w1, w2 = (w.mT for w in state.weights)
            part = q[:, :, at:stop]
            rows.append((F.silu(part @ w0) * (part @ w2)) @ w1)
            if goes_on or stop < q.shape[2]:
                state = self.observe(state, *(t[:, :, at:stop] for t in (k, v, rate, keep)))
            at = stop
        return torch.cat(rows, 2), state

    def observe(self, state: Learned, k: Tensor, v: Tensor, rate: Tensor, keep: Tensor) -> Learned:
        w0, w1, w2 = state.weights
        r0, r1, r2 = rate.split(1, -1)
        a, b, back = k @ w0.mT, k @ w2.mT, v @ w1
        gate, open_ = F.silu(a), a.sigmoid()
        slope = open_ * (1 + a * (1 - open_))
        found = ((back * b * slope * r0).mT @ k, (v * r1).mT @ (gate * b), (back * gate * r2).mT @ k)
        gradient = tuple(g + f for g, f in zip(state.gradient, found, strict=True))
        count = state.count + k.shape[2]
        return Learned(state.main, state.weights, state.velocity, gradient, state.keep + keep.sum(-1), count)

    def close(self, state: Learned, norms: list[Tensor]) -> Learned:
        mean = (state.keep / state.count)[..., None, None]
        velocity = tuple(g + mean * m for g, m in zip(state.gradient, state.velocity, strict=True))
        main = tuple(a + orthogonal(m) for a, m in zip(state.main, velocity, strict=True))
        weights = tuple(
            a / (torch.linalg.vector_norm(a, dim=-1, keepdim=True) + TINY) * norm
            for a, norm in zip(main, norms, strict=True)
        )
        zero = tuple(torch.zeros_like(a) for a in main)
        return Learned(main, weights, velocity, zero, torch.zeros_like(state.keep))


class SpatialTTT(Mixer):
    """A causal window of attention and, on the same projections, a network that learns chunk by chunk.

        y_t = W_o [attention(q_t; k, v of the last `window` tokens) + s_t * RMSNorm(f_W(q'_t))]
        f_W(x) = W_1 (silu(W_0 x) * W_2 x),   q', k' = rotated(unit(silu(conv(a * q + b)))),   v' = silu(conv(v))
        after every chunk, with W as it was before it:
        G = grad_W sum_j r_j <f_W(k'_j), v'_j>,   M <- G + mu M,   A <- A + NS(M),   W = A |W_0| / |A| by rows

    x, y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D), RMSNorm with a weight on each head of q and k, rotary positions
    in the attention. q', k', v' (B, F, N, C / F): all channels of all heads in F heads anew, keys and values repeated
    for their query heads; a, b (C,) for q and for k; conv: 3 x 3 x 3 depthwise on a grid (T, Y, X), edges repeated,
    the identity at first, none for a sequence; rotary on the first D channels. r_j = softplus(W x_j + b), one for each
    of the three matrices, 0.001 at b = 0 = W; mu: mean over the chunk of sigmoid(W x_j + b); s_t = silu(W x_t + b),
    zero at first. NS: five Newton-Schulz steps. A chunk reads W, then changes it; what the last one learns is read by
    nobody. On a grid the convolution sees the next frame; for a sequence the layer is causal.
    Paper: arXiv 2603.12255; the layer follows the authors' code (causal_swa_lact.py, ttt_operation.py) with what its
    training sets: steps kept in A apart from W, W_0 and W_2 at first 1/2 I plus a product of rank `rank`. It stands in
    three of four layers, full attention in the fourth.
    Deviations: the tokens are a video alone or none, where the model's text stands around the video and skips conv;
    rotary angles are those of the place in the sequence, where the model has a time, a row and a column; NS is not
    rounded to bfloat16.
    window: tokens that a query sees, its own among them (2648). chunk: tokens between two steps (2648), part of the
    model. fast_heads: F (4). hidden: channels of f over C / F (1.0). rank: 32. theta: 5e5, the default of Qwen3-VL's
    configuration.
    Costs N window D pairs a head, and 18 hidden (C / F)^2 a token and fast head; no more state than twelve matrices a
    fast head and the keys and values of a window, however long the video.
    Errors: ValueError for F that does not divide C or makes heads narrower than D, an odd D, hidden that leaves no
    channel, theta <= 0.

    >>> layer = SpatialTTT(Dims(4, 4, grid=(3, 2, 2)), window=5, chunk=4, fast_heads=2, rank=2)
    >>> layer(torch.randn(1, 12, 16)).shape
    torch.Size([1, 12, 16])
    """

    spec = Spec(
        id="spatial_ttt",
        name="Spatial-TTT",
        title="Spatial-TTT: Streaming Visual-based Spatial Intelligence with Test-Time Training",
        paper="2603.12255",
        year=2026,
        family="recurrent",
        uses=("attend", "Causal", "Window", "turn_at"),
        grid=(3, 0),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 2648,
        chunk: int = 2648,
        fast_heads: int = 4,
        hidden: float = 1.0,
        rank: int = 32,
        theta: float = 5e5,
    ) -> None:
        super().__init__(dims)
        c, d = dims.dim, dims.head_dim
        if c % positive("fast_heads", fast_heads) or c // fast_heads < d:
            raise ValueError(f"fast_heads: got {fast_heads} for {c} channels; pass a divisor that leaves >= {d} a head")
        if d % 2:
            raise ValueError(f"dims: got head_dim {d}; pass an even one, of which positions turn the halves")
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        width = c // fast_heads
        if not int(hidden * width) >= 1:
            raise ValueError(f"hidden: got {hidden} for {width} channels a head; leave at least one")
        self.causal = dims.grid is None
        self.window, self.fast_heads, self.theta = positive("window", window), fast_heads, theta
        kv = dims.num_kv_heads * d
        self.query, self.key, self.value = (nn.Linear(c, size, bias=False) for size in (c, kv, kv))
        self.norm_query, self.norm_key = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.scale, self.offset = nn.Parameter(torch.ones(2, c)), nn.Parameter(torch.zeros(2, c))
        self.convs = nn.ParameterList()
        if dims.grid is not None:
            identity = torch.zeros(c, 1, 3, 3, 3)
            identity[:, :, 1, 1, 1] = 1
            self.convs.extend(nn.Parameter(identity.clone()) for _ in range(3))
        self.fast = FastWeights(
            fast_heads, width, int(hidden * width), positive("rank", rank), positive("chunk", chunk)
        )
        self.rate, self.keep = nn.Linear(c, 3 * fast_heads), nn.Linear(c, fast_heads)
        self.gate = nn.Linear(c, fast_heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.out = nn.Linear(c, c, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D), without positions."""
        q, k, v = (f(x).unflatten(2, (-1, self.dims.head_dim)) for f in (self.query, self.key, self.value))
        q, k, v = (t.transpose(1, 2) for t in (self.norm_query(q), self.norm_key(k), v))
        return q, k, v

    def fast_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """q', k', v', r and sigmoid(W x + b), in float32 or wider."""
        d, wide = self.dims, torch.promote_types(x.dtype, torch.float32)
        parts = [t.repeat_interleave(d.num_heads // t.shape[1], 1).transpose(1, 2).flatten(2) for t in (q, k, v)]
        parts[:2] = (t * s + o for t, s, o in zip(parts[:2], self.scale, self.offset, strict=True))
        if d.grid is not None:
            parts = [self.convolved(t, w) for t, w in zip(parts, self.convs, strict=True)]
        q, k, v = (F.silu(t.to(wide)).unflatten(2, (self.fast_heads, -1)).transpose(1, 2) for t in parts)
        q, k = (t / (torch.linalg.vector_norm(t, dim=-1, keepdim=True) + TINY) for t in (q, k))
        q, k = (turn_at(t, 0, self.theta, d.head_dim) for t in (q, k))
        rate = F.softplus(self.rate(x).to(wide) + math.log(math.expm1(1e-3)))
        rate = rate.unflatten(2, (self.fast_heads, 3)).transpose(1, 2)
        return q, k, v, rate, self.keep(x).to(wide).sigmoid().mT

    def convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        maps = x.unflatten(1, self.dims.grid or ()).movedim(-1, 1)
        around = F.pad(maps, (1,) * 6, mode="replicate")
        return F.conv3d(around, weight, groups=len(weight)).movedim(1, -1).flatten(1, 3)

    def near(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (turn_at(t, 0, self.theta) for t in (q, k))
        return attend(q, k, v, Causal() & Window(self.window)).transpose(1, 2).flatten(2)

    def compute(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        learned, _ = self.fast(*self.fast_inputs(x, q, k, v), goes_on=False)
        read = self.norm(learned.to(x.dtype)).transpose(1, 2) * F.silu(self.gate(x))[..., None]
        return self.out(self.near(q, k, v) + read.flatten(2))

    def oracle(self, x: Tensor) -> Tensor:
        w, dims, (batch, n, c) = dict(self.named_parameters()), self.dims, x.shape
        d, heads, fast = dims.head_dim, dims.num_heads, self.fast_heads
        width, chunk = c // fast, self.fast.chunk

        def sigmoid(t: Tensor) -> Tensor:
            return 1 / (1 + torch.exp(-t))

        def rms(t: Tensor, name: str, eps: float) -> Tensor:
            return t / (t.square().mean(-1, keepdim=True) + eps) ** 0.5 * w[f"{name}.weight"]

        def spun(t: Tensor, at: int) -> Tensor:
            """Channels i and i + D / 2 of t (..., >= D), turned by the angle of pair i at one place."""
            return torch.cat([rotated(t[..., :d], torch.tensor(at), self.theta), t[..., d:]], -1)

        def network(weights: list[Tensor], t: Tensor) -> Tensor:
            a, b = (torch.einsum("bfhw,bfw->bfh", weights[i], t) for i in (0, 2))
            return torch.einsum("bfwh,bfh->bfw", weights[1], a * sigmoid(a) * b)

        def product(weights: list[Tensor], key: Tensor, value: Tensor) -> Tensor:
            return (network(weights, key) * value).sum()  # each sequence and head has weights of its own

        def conv(t: Tensor, kernel: Tensor) -> Tensor:
            depth, height, wide = dims.grid or ()
            cells = t.reshape(batch, depth, height, wide, c)
            total = torch.zeros_like(cells)
            for i in range(3):
                for j in range(3):
                    for l in range(3):
                        rows = torch.arange(depth).add(i - 1).clamp(0, depth - 1)
                        moved = cells[:, rows][:, :, torch.arange(height).add(j - 1).clamp(0, height - 1)]
                        moved = moved[:, :, :, torch.arange(wide).add(l - 1).clamp(0, wide - 1)]
                        total = total + moved * kernel[:, 0, i, j, l]
            return total.reshape(batch, n, c)

        group = heads // dims.num_kv_heads
        q = rms((x @ w["query.weight"].T).view(batch, n, heads, d), "norm_query", 1e-6)
        k = rms((x @ w["key.weight"].T).view(batch, n, -1, d), "norm_key", 1e-6)
        v = (x @ w["value.weight"].T).view(batch, n, -1, d)
        owner = torch.arange(heads) // group
        k, v = k[:, :, owner], v[:, :, owner]
        fq = q.reshape(batch, n, c) * w["scale"][0] + w["offset"][0]
        fk = k.reshape(batch, n, c) * w["scale"][1] + w["offset"][1]
        fv = v.reshape(batch, n, c)
        if dims.grid is not None:
            fq, fk, fv = (conv(t, w[f"convs.{i}"]) for i, t in enumerate((fq, fk, fv)))
        fq, fk, fv = ((t * sigmoid(t)).view(batch, n, fast, width) for t in (fq, fk, fv))
        fq, fk = (t / (t.square().sum(-1, keepdim=True) ** 0.5 + 1e-5) for t in (fq, fk))
        rates = torch.log1p(torch.exp(x @ w["rate.weight"].T + w["rate.bias"] + math.log(math.expm1(1e-3))))
        rates = rates.view(batch, n, fast, 3)
        keeps = sigmoid(x @ w["keep.weight"].T + w["keep.bias"])
        logit = x @ w["gate.weight"].T + w["gate.bias"]
        gates = logit * sigmoid(logit)

        one = torch.zeros_like(w["fast.last"].transpose(1, 2))
        one[:, range(min(one.shape[1:])), range(min(one.shape[1:]))] = 0.5
        first = [torch.einsum("fhr,frw->fhw", w[f"fast.left.{i}"], w[f"fast.right.{i}"]) + one for i in (0, 1)]
        begun = [t.expand(batch, -1, -1, -1) for t in (first[0], w["fast.last"], first[1])]
        now, main, speed = begun, begun, [torch.zeros_like(t) for t in begun]
        rows = []
        for t in range(n):
            if t and t % chunk == 0:
                grads, mu = [torch.zeros_like(m) for m in main], torch.zeros(batch, fast).to(x)
                for j in range(t - chunk, t):
                    slopes = torch.func.grad(product)(now, spun(fk[:, j], j), fv[:, j])
                    sizes = rates[:, j, :, :, None, None].unbind(2)
                    grads = [g + r * s for g, r, s in zip(grads, sizes, slopes, strict=True)]
                    mu = mu + keeps[:, j] / chunk
                speed = [g + mu[..., None, None] * m for g, m in zip(grads, speed, strict=True)]
                moved = []
                for before, m in zip(main, speed, strict=True):
                    z = m / (m.square().sum((-2, -1), keepdim=True) ** 0.5 + 1e-7)
                    for alpha, beta, gamma in MUON:
                        cube = z @ z.transpose(-2, -1) @ z
                        z = alpha * z + beta * cube + gamma * cube @ z.transpose(-2, -1) @ z
                    moved.append(before + z)
                main = moved
                now = [
                    m / (m.square().sum(-1, keepdim=True) ** 0.5 + 1e-5) * (b.square().sum(-1, keepdim=True) ** 0.5)
                    for m, b in zip(main, begun, strict=True)
                ]
            read = rms(network(now, spun(fq[:, t], t)), "norm", 1e-5)
            low = max(0, t - self.window + 1)
            keys = torch.stack([spun(k[:, j], j) for j in range(low, t + 1)], 1)
            scores = torch.einsum("bhd,bjhd->bjh", spun(q[:, t], t), keys) / d**0.5
            near = (scores.softmax(1)[..., None] * v[:, low : t + 1]).sum(1)
            rows.append((near.reshape(batch, c) + (read * gates[:, t, :, None]).reshape(batch, c)) @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"window": 7, "chunk": 8, "fast_heads": 2, "rank": 2, "theta": 30.0}
        return [
            Case(Dims(4, 2, num_kv_heads=2, grid=(3, 2, 3)), 18, {**small, "hidden": 1.5}),
            Case(Dims(3, 2), 19, {**small, "fast_heads": 3, "hidden": 0.5}),
            Case(Dims(2, 4, grid=(1, 5, 1)), 5, {"fast_heads": 2, "rank": 1}, batch=1),
        ]

    @claim("At the start the layer is attention in a window, bit for bit.")
    def starts_as_attention(cls) -> Finding:
        layer, x = cls._sample(Dims(4, 4, grid=(4, 3, 3)), 36)
        plain = layer.out(layer.near(*layer.project(x)))
        same = torch.equal(layer(x), plain)
        layer.gate.bias.fill_(1.0)
        off = apart(layer(x), plain)
        figure = f"{'equal' if same else 'different'}; with s = silu(1) {off:.2f} of the largest output away"
        return Finding(same and off > torch.finfo(x.dtype).eps ** 0.5, figure)

    @claim("What the stream leaves does not grow with it, and reading it frame by frame gives the same.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(Dims(4, 4), 600)
        given = layer.fast_inputs(x, *layer.project(x))
        whole, _ = layer.fast(*given)
        rows, state, sizes = [], None, []
        for start in range(0, 600, 60):
            row, state = layer.fast(*(t[:, :, start : start + 60] for t in given), state)
            rows.append(row)
            sizes.append(sum(t.numel() for part in (state.main, state.weights, state.velocity) for t in part))
        off = apart(torch.cat(rows, 2), whole)
        # Newton-Schulz multiplies what is small, and its errors, by the product of its first coefficients a chunk.
        allowed = 600 * torch.finfo(x.dtype).eps * math.prod(a for a, _, _ in MUON)
        figure = f"{sizes[0]} numbers after 60 tokens, {sizes[-1]} after 600; outputs {off:.1e} of the largest away"
        return Finding(sizes[0] == sizes[-1] and off < allowed, figure)

    @claim("Weights keep the lengths of their rows however long the video, while the sum of the steps grows.")
    def bounded(cls) -> Finding:
        layer, x = cls._sample(Dims(4, 4), 600)
        given, length = layer.fast_inputs(x, *layer.project(x)), torch.linalg.vector_norm
        start, off, grown = layer.fast.begin(1, x.dtype), [], []
        for tokens in (300, 600):
            _, state = layer.fast(*(t[:, :, :tokens] for t in given))
            ratio = [length(w, dim=-1) / length(s, dim=-1) for w, s in zip(state.weights, start.weights, strict=True)]
            off.append(
                max(float((r - 1).abs().max()) for r in ratio) * min(float(length(a, dim=-1).min()) for a in state.main)
            )
            grown.append(max(float(length(a) / length(s)) for a, s in zip(state.main, start.main, strict=True)))
        # Lengths are divided by |A| + TINY, so that they are off by TINY / |A|.
        holds = max(off) <= TINY * (1 + torch.finfo(torch.float32).eps) and 1 < grown[0] < grown[1]
        return Finding(holds, f"rows off by {max(off):.1e} / |A|; A grown to {grown[0]:.1f} and {grown[1]:.1f} times")

    @claim("Beyond the window only the learned weights carry the past: a token far back moves outputs after its chunk.")
    def memory(cls) -> Finding:
        layer, x = cls._sample(Dims(4, 4), 120)
        layer.gate.bias.fill_(1.0)
        other = x.clone()
        other[:, 3] = -other[:, 3]
        moved = (layer(other) - layer(x)).abs().amax((0, 2))
        within, silent, after = moved[3:11], moved[11:20], moved[20:]
        holds = bool(within.min() > 0 and silent.max() == 0 and after.min() > 0)
        figure = f"token 3 moves tokens 3 to 10 by the window, tokens 11 to 19 by {float(silent.max()):g}, "
        return Finding(holds, figure + f"all later ones by {float(after.min()):.1e} or more, chunks of 20")

    @classmethod
    @torch.no_grad()
    def _sample(cls, dims: Dims, length: int) -> tuple[SpatialTTT, Tensor]:
        settings: dict[str, Any] = {"window": 8, "chunk": 20, "fast_heads": 2, "rank": 4}
        return sample(lambda: cls(dims, **settings), 1, length, dims.dim)
