"""Hydra: a state-space recurrence, attention in a window and experts chosen by chunk, side by side in one block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, sample, work
from saccade.errors import positive
from saccade.scan import affine, associative_scan
from saccade.where import Causal, Window


@dataclass(frozen=True)
class HydraState:
    """What a decoder keeps: s (B, C); keys and values (B, Hkv, < window, D); the chunk's sum so far, and the mean of
    the chunk before, which chooses the experts, (B, C); tokens read.
    """

    s: Tensor
    keys: Tensor
    values: Tensor
    total: Tensor
    mean: Tensor
    length: int


class SSM(nn.Module):
    """One state a channel: x (B, N, C) and s before -> y and s after."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.skip = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        self.rate, self.norm = nn.Parameter(torch.zeros(dim)), nn.LayerNorm(dim)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        delta, write, given, read = self.project(x).chunk(4, -1)
        decay = (-F.softplus(delta.to(wide)) * F.softplus(self.rate.to(wide))).exp()
        first = (torch.ones_like(decay[:, :1]), s.to(wide)[:, None])
        _, after = associative_scan(affine, (decay, (write * given).to(wide)), dim=1, initial=first)
        before = torch.cat([s.to(wide)[:, None], after[:, :-1]], 1)
        return self.norm(read * before.to(x.dtype) + self.skip(x)), after[:, -1]


class Experts(nn.Module):
    """SwiGLU experts, of which every chunk (B, n, C) takes the `top` that its vector (B, C) asks for."""

    def __init__(self, dim: int, hidden: int, count: int, top: int) -> None:
        super().__init__()
        self.top, self.router = top, nn.Linear(dim, count)
        self.enter = nn.ModuleList(nn.Linear(dim, 2 * hidden, bias=False) for _ in range(count))
        self.leave = nn.ModuleList(nn.Linear(hidden, dim, bias=False) for _ in range(count))

    def forward(self, chunks: Tensor, route: Tensor) -> Tensor:
        logits, chosen = self.router(route).topk(self.top, -1)
        share = logits.softmax(-1)
        y = torch.zeros_like(chunks)
        for index, (enter, leave) in enumerate(zip(self.enter, self.leave, strict=True)):
            # Only the data say how many chunks an expert has: the host waits for each expert.
            row, place = (chosen == index).nonzero(as_tuple=True)
            if len(row):
                gate, value = enter(chunks[row]).chunk(2, -1)
                y = y.index_add(0, row, share[row, place][:, None, None] * leave(F.silu(gate) * value))
        return y


class ProductKeys(nn.Module):
    """A table of slots^2 values: x (B, N, C) -> what the pairs of the `best` half keys on either side hold."""

    def __init__(self, dim: int, slots: int, best: int, width: int) -> None:
        super().__init__()
        self.slots, self.best = slots, best
        self.query = nn.Linear(dim, 2 * width)
        self.keys = nn.Parameter(torch.randn(2, slots, width) * width**-0.5)
        self.values, self.out = nn.Parameter(torch.randn(slots**2, width) * width**-0.5), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.query(x).chunk(2, -1)
        found = [(half @ keys.T).topk(self.best, -1) for half, keys in zip(halves, self.keys, strict=True)]
        (one, i), (two, j) = found
        weights = (one[..., :, None] + two[..., None, :]).flatten(-2).softmax(-1)
        places = (i[..., :, None] * self.slots + j[..., None, :]).flatten(-2)
        return self.out((weights[..., None] * self.values[places]).sum(-2))


class HydraSSMMoE(Mixer):
    """A block of the stack, residual and norm included: recurrence, window and experts read the same input.

        x <- LN(x + g_1 SSM(x) + g_2 attention(x) + g_3 experts(x)),   x <- x + sigmoid(g) W_o sum_p w_p V_p
        SSM: s_{t+1} = exp(-softplus(d_t) softplus(l)) * s_t + b_t * u_t,   y_t = LN(c_t * s_t + W x_t + w)
        experts: sum of the `top` of `experts` e of  softmax(z)_e SwiGLU_e(x_t),   z = W m + w,  one m for a chunk
        w_p = softmax over the best^2 pairs p = (i, j) of  q_1 . K_1i + q_2 . K_2j,   q = W x_t + w in two halves

    x (B, N, C) -> (B, N, C); d, b, u, c (B, N, C) from x; s (B, C), read before its update; attention: causal, softmax,
    in a window; m (B, C): the mean of the chunk before, learned for the first one; K (2, slots, width), V (slots^2,
    width). Attention is in every `attend_every`-th block, experts in every `experts_every`-th; g_1, g_2, g_3 begin at
    1, 0.15 and 0.5, g at 0. Paper: arXiv 2508.15099, a proposal; equations follow the authors' toy prototype.
    Deviations: the prototype's router takes the mean of the chunk itself, which knows later tokens (`ahead`); the
    latent workspace and the loss that balances experts are left out; the last of each so many blocks has the part.
    layer: counted from 0 (3). window: 256. attend_every: 4. experts_every: 2. chunk: tokens that share experts (32).
    experts: 4. top: 2. hidden: channels of an expert over C (2). slots: 64. best: half keys on either side (4). width:
    128. ahead: choose by the chunk's own mean; not causal, cannot decode (False).
    Costs 5 C^2 a token for the recurrence, window 2 C for attention, 3 top hidden C^2 for experts, 2 slots width for
    the memory; a state of 3 C numbers and the keys and values of a window.
    Errors: ValueError for top above experts, best above slots; for decoding with `ahead`.

    >>> HydraSSMMoE(Dims(2, 4), chunk=4, slots=5, width=3)(torch.randn(1, 10, 8)).shape
    torch.Size([1, 10, 8])
    """

    spec = Spec(
        id="hydra_ssm_moe",
        name="Hydra (SSM + sparse attention + MoE + memory)",
        title="Hydra: A 1.6B-Parameter State-Space Language Model with Sparse Attention, Mixture-of-Experts, "
        "and Memory",
        paper="2508.15099",
        year=2025,
        family="recurrent",
        uses=("associative_scan", "affine", "attend", "Causal", "Window"),
        discrete=True,
        waits="tokens are routed to experts, as many as come",
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        layer: int = 3,
        window: int = 256,
        attend_every: int = 4,
        experts_every: int = 2,
        chunk: int = 32,
        experts: int = 4,
        top: int = 2,
        hidden: int = 2,
        slots: int = 64,
        best: int = 4,
        width: int = 128,
        ahead: bool = False,
    ) -> None:
        super().__init__(dims)
        for name, few, many, all_ in (("top", top, experts, "experts"), ("best", best, slots, "slots")):
            if positive(name, few) > positive(all_, many):
                raise ValueError(f"{name}: got {few} of {many} {all_}; pass no more than there are")
        c, kv, number = dims.dim, 2 * dims.num_kv_heads * dims.head_dim, positive("layer", layer, least=0) + 1
        self.window, self.chunk, self.ahead = positive("window", window), positive("chunk", chunk), ahead
        self.causal = not ahead
        positive("hidden", hidden)
        self.attends = number % positive("attend_every", attend_every) == 0
        self.routes = number % positive("experts_every", experts_every) == 0
        self.ssm, self.norm = SSM(c), nn.LayerNorm(c)
        self.gains = nn.Parameter(torch.tensor([1.0, 0.15, 0.5]))
        if self.attends:
            self.project, self.out = nn.Linear(c, c + kv), nn.Linear(c, c)
        if self.routes:
            self.experts = Experts(c, hidden * c, experts, top)
            self.first = nn.Parameter(torch.randn(c) * c**-0.5)
        self.memory = ProductKeys(c, slots, best, positive("width", width))
        self.open = nn.Parameter(torch.zeros(()))

    def begin(self, x: Tensor) -> HydraState:
        d, zero = self.dims, x.new_zeros(len(x), self.dims.dim)
        keys = x.new_zeros(len(x), d.num_kv_heads, 0, d.head_dim)
        mean = self.first.expand_as(zero) if self.routes else zero
        return HydraState(zero, keys, keys, zero, mean, 0)

    def near(self, x: Tensor, state: HydraState) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.dims.split(self.project(x))
        k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        o = attend(q, k, v, Causal() & Window(self.window))
        late = max(0, k.shape[2] - self.window + 1)
        return self.out(o.transpose(1, 2).flatten(2)), k[:, :, late:], v[:, :, late:]

    def routed(self, x: Tensor) -> Tensor:
        """Experts on a whole sequence, chunk by chunk."""
        n = x.shape[1]
        chunks = F.pad(x, (0, 0, 0, -n % self.chunk)).unflatten(1, (-1, self.chunk))
        sizes = torch.full((chunks.shape[1], 1), self.chunk, device=x.device)
        sizes[-1] -= -n % self.chunk
        means = chunks.sum(2) / sizes
        if not self.ahead:
            means = torch.cat([self.first.expand(len(x), 1, -1), means[:, :-1]], 1)
        y = self.experts(chunks.flatten(0, 1), means.flatten(0, 1))
        return y.unflatten(0, (len(x), -1)).flatten(1, 2)[:, :n]

    def join(self, x: Tensor, parts: list[Tensor | None]) -> Tensor:
        for gain, part in zip(self.gains, parts, strict=True):
            x = x if part is None else x + gain * part
        x = self.norm(x)
        return x + self.open.sigmoid() * self.memory(x)

    def compute(self, x: Tensor) -> Tensor:
        state = self.begin(x)
        near = self.near(x, state)[0] if self.attends else None
        return self.join(x, [self.ssm(x, state.s)[0], near, self.routed(x) if self.routes else None])

    def step(self, x: Tensor, *, state: HydraState | None = None) -> tuple[Tensor, HydraState]:
        if self.ahead:
            raise ValueError("ahead: got True; a chunk that is not complete has no mean to choose its experts by")
        state = self.begin(x) if state is None else state
        mixed, s = self.ssm(x, state.s)
        near, keys, values = self.near(x, state) if self.attends else (None, state.keys, state.values)
        given = self.experts(x, state.mean) if self.routes else None
        total, mean, length = state.total + x[:, 0], state.mean, state.length + 1
        if length % self.chunk == 0:
            total, mean = torch.zeros_like(total), total / self.chunk
        return self.join(x, [mixed, near, given]), HydraState(s, keys, values, total, mean, length)

    def oracle(self, x: Tensor) -> Tensor:
        w, dims, (batch, n, c) = Weights(self), self.dims, x.shape
        d, heads, rows = dims.head_dim, dims.num_heads, []
        owner = torch.arange(heads) // (heads // dims.num_kv_heads)
        s, past = torch.zeros(batch, c).to(x), []

        def soft(t: Tensor) -> Tensor:
            return torch.log1p(torch.exp(-t.abs())) + t.clamp(min=0)

        for t in range(n):
            token = x[:, t]
            delta, write, push, read = w.linear(token, "ssm.project").split(c, -1)
            total = token + w["gains"][0] * w.norm(read * s + w.linear(token, "ssm.skip"), "ssm.norm")
            s = torch.exp(-soft(delta) * soft(w["ssm.rate"])) * s + write * push
            if self.attends:
                parts = w.linear(token, "project").view(batch, -1, d)
                k, v = parts[:, heads : heads + dims.num_kv_heads], parts[:, -dims.num_kv_heads :]
                past.append((k[:, owner], v[:, owner]))
                seen = past[-self.window :]
                scores = torch.stack([(parts[:, :heads] * k).sum(-1) for k, _ in seen], -1) / d**0.5
                weights = scores.softmax(-1)
                o = torch.stack([weights[..., i, None] * v for i, (_, v) in enumerate(seen)]).sum(0)
                total = total + w["gains"][1] * w.linear(o.flatten(1), "out")
            if self.routes:
                start = t // self.chunk * self.chunk
                near = (start, start + self.chunk) if self.ahead else (start - self.chunk, start)
                m = x[:, near[0] : near[1]].mean(1) if near[0] >= 0 else w["first"].expand(batch, -1)
                logits, given = w.linear(m, "experts.router"), []
                for b in range(batch):
                    order = torch.argsort(logits[b], descending=True, stable=True)[: self.experts.top]
                    shares = logits[b, order].softmax(-1)
                    given.append(torch.zeros(c).to(x))
                    for share, e in zip(shares, order.tolist(), strict=True):
                        gate, value = w.linear(token[b], f"experts.enter.{e}").chunk(2)
                        hidden = gate / (1 + torch.exp(-gate)) * value
                        given[b] = given[b] + share * w.linear(hidden, f"experts.leave.{e}")
                total = total + w["gains"][2] * torch.stack(given)
            y = w.norm(total, "norm")
            halves = w.linear(y, "memory.query").chunk(2, -1)
            pairs = [half @ keys.T for half, keys in zip(halves, w["memory.keys"], strict=True)]
            read = []
            for b in range(batch):
                i, j = (torch.argsort(p[b], descending=True, stable=True)[: self.memory.best] for p in pairs)
                scores = torch.stack([pairs[0][b, p] + pairs[1][b, q] for p in i for q in j]).softmax(0)
                values = torch.stack([w["memory.values"][p * self.memory.slots + q] for p in i for q in j])
                read.append((scores[:, None] * values).sum(0))
            rows.append(y + w.linear(torch.stack(read), "memory.out") / (1 + torch.exp(-w["open"])))
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"window": 4, "chunk": 3, "hidden": 1, "slots": 5, "best": 2, "width": 3}
        return [
            Case(Dims(2, 4), 11, {**small, "experts": 3, "top": 1}),
            Case(Dims(4, 2, num_kv_heads=2), 8, {**small, "layer": 5, "attend_every": 3, "experts_every": 4}, batch=1),
            Case(Dims(2, 3), 7, {**small, "layer": 1, "experts": 5, "top": 3}),
        ]

    @claim("What a decoder keeps stops growing at the window.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(window=16)
        sizes, state = [], None
        for token in x.split(1, 1):
            _, state = layer.step(token, state=state)
            parts = (state.s, state.keys, state.values, state.total, state.mean)
            sizes.append(sum(t.numel() for t in parts))
        holds = sizes[14] == sizes[-1] == max(sizes) and sizes[0] < sizes[14]
        return Finding(holds, f"{sizes[0]} numbers after 1 token, {sizes[14]} after 15, {sizes[-1]} after {len(sizes)}")

    @claim("Experts chosen by the mean of the chunk itself let the past see the future, by that of the one before not.")
    def no_leak(cls) -> Finding:
        moved = []
        for ahead in (True, False):
            layer, x = cls._sample(ahead=ahead)
            other = x.clone()
            other[:, 20:] = -3 * x[:, 20:]
            moved.append(float((layer.routed(other) - layer.routed(x))[:, :20].abs().max()))
        return Finding(
            moved[0] > 0 and moved[1] == 0, f"tokens before a change moved by {moved[0]:.2g} and {moved[1]:g}"
        )

    @claim("A token meets `top` experts, however many there are.")
    def sparse(cls) -> Finding:
        counts = []
        for experts, top in ((4, 2), (16, 2), (16, 16)):
            layer, x = cls._sample(experts=experts, top=top)
            router = 2 * -(-x.shape[1] // layer.chunk) * x.shape[2] * experts
            counts.append(work(partial(layer.routed, x)).all - router)
        holds = counts[0] == counts[1] and counts[2] == 8 * counts[0]
        return Finding(holds, f"{counts[0]} operations with 2 of 4 and 2 of 16 experts, {counts[2]} with 16 of 16")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[HydraSSMMoE, Tensor]:
        return sample(lambda: cls(Dims(2, 8), slots=8, width=4, **params), 1, 80, 16)
