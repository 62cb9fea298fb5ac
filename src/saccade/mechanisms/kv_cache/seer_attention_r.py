"""SeerAttention-R: small gates, distilled from attention, tell which blocks of keys a decoding step reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.cache import Cached, Reader, Rotation, Session, Stored, Turned
from saccade.cache.rows import sent
from saccade.cache.view import attention_at
from saccade.contract import Case, Dims, Finding, Spec, claim, replay, rotated
from saccade.errors import part, positive
from saccade.mix import rotary_rates

EPS = 1e-6


class Gated(Turned, Reader):
    """Reads the pages, which are the blocks, of the largest gates, and the newest.

    The note "gates" (B, Hkv, blocks, E) holds the gate keys of finished blocks, zeros where there is none.
    """

    def __init__(
        self, seer: SeerAttentionR, budget: float | int, threshold: float | None, rotation: Rotation | None
    ) -> None:
        super().__init__(budget, seer.block)
        self.turned_by(rotation, seer.dims.head_dim)
        self.seer, self.threshold = seer, threshold

    @torch.no_grad()
    def settle(self, session: Session) -> None:
        for store in map(session.store, range(session.num_layers)):
            slots, _ = store.order()
            blocks = slots.shape[2] // self.page
            keys = store.read(store.pool.k, slots[..., : blocks * self.page]).unflatten(2, (blocks, self.page))
            block = torch.arange(blocks, device=keys.device)
            unfinished = block >= (store.ends // self.page)[:, None, None]
            gates = self.seer.gate_keys(keys, block * self.page)
            store.notes["gates"] = gates.masked_fill(unfinished[..., None], 0)

    @torch.no_grad()
    def select(self, step: Stored) -> Tensor:
        self._finish(step)
        gates, blocks = step.notes("gates"), -(-step.num_seen // self.page)
        at = step.ends - 1
        scores = self.seer.gate_queries(step.q, at[:, None, None]) @ gates.mT / gates.shape[3] ** 0.5
        scores = F.pad(scores[:, :, 0, :blocks], (0, max(0, blocks - gates.shape[2])))  # an unfinished block's is 0
        block, newest = torch.arange(blocks, device=at.device), (at // self.page)[:, None, None]
        scores = scores.masked_fill(block > newest, -torch.inf)
        if self.threshold is not None:
            return torch.where((scores.softmax(-1) > self.threshold) | (block == newest), block, -1)
        chosen = self.best(step, scores.masked_fill(block == newest, -torch.inf), self.page)
        return torch.cat([chosen, newest.expand(-1, chosen.shape[1], 1)], -1)

    def _finish(self, step: Stored) -> None:
        """Gate keys of the blocks that the newest tokens complete; the host knows which."""
        rows = range(len(step.seen)) if step.rows is None else step.rows
        done = [(row, seen) for row, seen in zip(rows, step.seen.tolist(), strict=True) if seen % self.page == 0]
        if not done:
            return
        store, device = step.stored, step.q.device
        which, ends = (sent(torch.tensor(x), step.q) for x in zip(*done, strict=True))
        slots = (ends - self.page)[:, None] + torch.arange(self.page, device=device)
        keys = store.read(store.pool.k, slots[:, None].expand(-1, store.kv_heads, -1), [row for row, _ in done])
        gates, more = store.notes["gates"], max(seen for _, seen in done) // self.page
        gates = F.pad(gates, (0, 0, 0, max(0, more - gates.shape[2])))  # a copy: sequences may share what was
        new = self.seer.gate_keys(keys[:, :, None], (ends - self.page)[:, None, None])[:, :, 0]
        store.notes["gates"] = gates.transpose(1, 2).index_put((which, ends // self.page - 1), new).transpose(1, 2)


class SeerAttentionR(Cached):
    """Gates that were trained to foresee attention pick the blocks of keys that a step reads.

        g_i = R_i norm(sum_h W_h q_ih),   c_b = R_(b s) norm(W_k [max; min; mean](k_j, j in block b)),   b finished
        a step reads the budget / s earlier blocks of the largest g_i . c_b / sqrt(E), and the newest block

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); W_h (D, E), h the query heads of a key head, which share what
    they read; W_k (3 D, E); norm: of the root mean square, with a weight. q and k come as attention meets them, turned
    by `rotation`; the gates see them turned back, and turn what they make by R, at the first token of a block. With a
    threshold a step reads the blocks whose softmax over all blocks is above it, c_b = 0 for an unfinished one.
    `fit` trains by `loss(q, k)`: 10 KL(target || softmax_b(g_i . c_b / sqrt(E))), a mean over all elements, queries of
    the second half, blocks before the query's; the target is the largest weight of attention in a block and group,
    divided by their sum. The paper trains the gates alone: AdamW at 1e-3, 800 steps of 16 texts of 32k tokens.
    Paper: arXiv 2506.08889; pooling, norms, turns and loss follow the authors' code. Deviations: the
    newest block takes no place of the others, where in their code it does, with a score of 0 until it is finished;
    blocks that are finished while decoding are turned by their first position, as in training, where their cache takes
    the last. budget: tokens, in whole blocks, or a part of those so far, rounded up (default 4096). threshold: a
    probability, in place of the budget (None). block: s, tokens (64). gate_dim: E (128). rotation: by which q and k
    come turned, None for as they are; a model says its own where that is known (`saccade.cache.Turned`). R is the same
    over E channels (`Rotation.over`). decoded: tokens that are decoded (16). Costs N^2 / 2 pairs of the prompt; a step
    reads E numbers a block, and budget + s tokens at most. The loss makes the attention of 128 queries at a time.
    Errors: ValueError for a budget of 0, a threshold outside [0, 1], a rotation of more than D channels.

    >>> seer, (q, k) = SeerAttentionR(Dims(2, 8), budget=16, block=8, gate_dim=4), torch.randn(2, 1, 2, 60, 8)
    >>> seer(q, k, k).shape, seer.loss(q, k).shape
    (torch.Size([1, 2, 60, 8]), torch.Size([]))
    """

    spec = Spec(
        id="seer_attention_r",
        name="SeerAttention-R",
        title="SeerAttention-R: Sparse Attention Adaptation for Long Reasoning",
        paper="2506.08889",
        year=2025,
        family="kv_cache",
        uses=("Cached", "Reader", "Rotation"),
        discrete=True,
    )
    per_head = True
    learning: ClassVar[Mapping[str, float]] = {"lr": 1e-3}
    policy: Gated

    def __init__(
        self,
        dims: Dims,
        *,
        budget: float | int = 4096,
        threshold: float | None = None,
        block: int = 64,
        gate_dim: int = 128,
        rotation: Rotation | None = None,
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        self.block, d, e = positive("block", block), dims.head_dim, positive("gate_dim", gate_dim)
        if threshold is not None:
            part("threshold", threshold, "a probability, or None")
        heads = dims.num_kv_heads
        self.query = nn.Parameter(torch.randn(heads, dims.group, d, e) * (dims.group * d) ** -0.5)
        self.key = nn.Parameter(torch.randn(heads, 3 * d, e) * (3 * d) ** -0.5)
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(e)) for _ in range(2))
        self.budget, self.threshold = budget, threshold
        self.policy = Gated(self, budget, threshold, rotation)

    def turned(self, x: Tensor, at: Tensor) -> Tensor:
        """What gates are made of, x (..., N, E), turned by the angles of positions at (..., N)."""
        rotation = self.policy.rotation
        return x if rotation is None else rotation.over(x.shape[-1] // 2).turn(x, at)

    def gate_queries(self, q: Tensor, at: Tensor) -> Tensor:
        """g (B, Hkv, N, E) of q (B, H, N, D) at positions at (N,), or what broadcasts to (B, H, N)."""
        q = self.policy.back(q.to(self.query.dtype), at).unflatten(1, (self.dims.num_kv_heads, -1))
        g = F.rms_norm(torch.einsum("bhgnd,hgde->bhne", q, self.query), self.query_norm.shape, self.query_norm, EPS)
        return self.turned(g, at)

    def gate_keys(self, keys: Tensor, at: Tensor) -> Tensor:
        """c (B, Hkv, blocks, E) of whole blocks (B, Hkv, blocks, s, D) whose first positions are at (blocks,)."""
        places = at[..., None] + torch.arange(keys.shape[3], device=keys.device)
        keys = self.policy.back(keys.to(self.key.dtype), places)
        c = torch.cat([keys.amax(3), keys.amin(3), keys.mean(3)], -1) @ self.key
        return self.turned(F.rms_norm(c, self.key_norm.shape, self.key_norm, EPS), at)

    def logits(self, q: Tensor, k: Tensor, start: int = 0) -> Tensor:
        """g_i . c_b / sqrt(E) (B, Hkv, N - start, blocks), i from `start` on; the least number for b not before i."""
        n, blocks = q.shape[2], q.shape[2] // self.block
        at, first = torch.arange(start, n, device=q.device), torch.arange(blocks, device=q.device) * self.block
        c = self.gate_keys(k[:, :, : blocks * self.block].unflatten(2, (blocks, self.block)), first)
        scores = self.gate_queries(q[:, :, start:], at) @ c.mT / c.shape[3] ** 0.5
        return scores.masked_fill(first >= (at // self.block * self.block)[:, None], torch.finfo(scores.dtype).min)

    @torch.no_grad()
    def target(self, q: Tensor, k: Tensor, start: int = 0) -> Tensor:
        """What the gates of the queries from `start` on are to be: (B, Hkv, N - start, blocks), sums of 1, or 0."""
        parts = [pooled for pooled, _ in self._attention(q, k, start)]
        return torch.cat(parts, 2)

    def _attention(self, q: Tensor, k: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of 128 queries after another: the target, and the attention in each block (B, Hkv, n, blocks)."""
        n, blocks = q.shape[2], q.shape[2] // self.block
        first = torch.arange(blocks, device=q.device) * self.block
        for at in torch.arange(start, n, device=q.device).split(128):
            weights = attention_at(q, k, at)[..., : blocks * self.block].unflatten(-1, (blocks, self.block))
            before = first < (at // self.block * self.block)[:, None]
            most = weights.amax(-1).amax(2) * before
            total = most.sum(-1, keepdim=True).clamp(min=torch.finfo(most.dtype).tiny)
            yield most / total, weights.sum(-1).mean(2) * before

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        """The distillation loss of one layer for q (B, H, N, D), k (B, Hkv, N, D), as attention meets them."""
        start = q.shape[2] // 2
        target = self.target(q, k, start).to(self.query.dtype)
        return 10 * F.kl_div(self.logits(q, k, start).log_softmax(-1), target, reduction="none").mean()

    @classmethod
    def learner(cls, dims: Dims, **params: Any) -> SeerAttentionR:
        """A layer whose gates are to be trained."""
        return cls(dims, **params)

    @classmethod
    def objective(cls, layers: Sequence[SeerAttentionR], lesson: Any) -> Tensor:
        """`loss`, the sum over layers, on what dense attention is given."""
        return torch.stack(
            [layer.loss(seen.q, seen.k) for layer, seen in zip(layers, lesson.captured(), strict=True)]
        ).sum()

    @classmethod
    def chosen(cls, layers: Sequence[SeerAttentionR], **params: Any) -> list[dict[str, Any]]:
        """Parameters of every layer once trained: those that it was made with."""
        return [params] * len(layers)

    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]], rate: float = 1e-3) -> list[float]:
        """Train the gates by `loss`, a step of AdamW for each (q, k), and return the losses."""
        optimiser, losses = torch.optim.AdamW(self.parameters(), rate), []
        for q, k in pairs:
            optimiser.zero_grad()
            loss = self.loss(q, k)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, _), kv_heads, w = q.shape, k.shape[1], {x: y.detach() for x, y in self.named_parameters()}
        prompt, group, size = max(1, n - self.decoded), heads // kv_heads, self.block

        rates, scale = self.policy.numbers
        logs = [math.log(rate) for rate in rates]
        count = len(w["query_norm"]) // 2 if logs else 0
        wide = []  # of the gates: on the line through the two nearest logarithms
        for place in (len(rates) * j / count for j in range(count)):
            low = max(0, min(int(place), len(rates) - 2))
            slope = logs[low + 1] - logs[low] if len(rates) > 1 else 0.0
            wide.append(math.exp(logs[low] + slope * (place - low)))

        def spun(x: Tensor, t: int, sign: int) -> Tensor:
            return rotated(x, torch.tensor(sign * t), rates if sign < 0 else wide, scale**sign)

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean() + 1e-6) ** 0.5 * weight

        def summary(b: int, g: int, at: int) -> Tensor:
            rows = torch.stack([spun(k[b, g, j].detach(), j, -1) for j in range(at, at + size)])
            pools = torch.cat([rows.max(0).values, rows.min(0).values, rows.sum(0) / size])
            return spun(normed(pools @ w["key"][g], w["key_norm"]), at, 1)

        def read(b: int, t: int, held: list[list[int]]) -> list[list[int]]:
            newest, sets = t // size, []
            for g in range(kv_heads):
                asks = [spun(q[b, g * group + h, t].detach(), t, -1) @ w["query"][g, h] for h in range(group)]
                gate = spun(normed(torch.stack(asks).sum(0), w["query_norm"]), t, 1)
                keys = [
                    summary(b, g, c * size) if (c + 1) * size <= t + 1 else torch.zeros_like(gate)
                    for c in range(newest + 1)
                ]
                scores = torch.stack([(gate * key).sum() for key in keys]) / len(gate) ** 0.5
                if self.threshold is not None:
                    chosen = {c for c, p in enumerate(scores.softmax(0).tolist()) if p > self.threshold}
                else:
                    share = self.budget * (t + 1) if isinstance(self.budget, float) else self.budget
                    count = math.ceil(share / size) if isinstance(self.budget, float) else share // size
                    chosen = set(sorted(range(newest), key=lambda c: -float(scores[c]))[: max(1, int(count))])
                sets += [[j for j in range(t + 1) if j // size in chosen | {newest}]] * group
            return sets

        return replay(q, k, v, prompt, lambda b, t, held: held, read)

    @classmethod
    def cases(cls) -> list[Case]:
        all_of, some = Rotation(rotary_rates(4, 50.0), scale=1.2), Rotation(rotary_rates(2, 9.0), scale=1.6)
        few = {"block": 3, "gate_dim": 4, "decoded": 9}
        return [
            Case(Dims(4, 8, 2), 37, {"budget": 0.3, "block": 4, "gate_dim": 6, "rotation": all_of, "decoded": 13}),
            Case(Dims(2, 6), 29, {"budget": 11, "block": 5, "gate_dim": 7, "rotation": some, "decoded": 12}, batch=3),
            Case(Dims(3, 5, 1), 23, {"threshold": 0.2, "rotation": some, **few}),
            Case(Dims(3, 5, 1), 23, {"threshold": 0.15, **few}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float | int | None]:
        return {"budget": length, "block": 4}

    @classmethod
    def planted(cls, seed: int) -> tuple[Tensor, Tensor]:
        """q (2, 4, 512, 32), k (2, 2, 512, 32): some keys are what queries ask for, in 8 channels; 24 are noise, in
        every other block of 16 tokens 20 times as loud, and of little weight to any query.
        """
        random = torch.Generator().manual_seed(seed)
        topics = 2 * torch.randn(8, 8, generator=torch.Generator().manual_seed(99))
        q, k = (torch.randn(2, heads, 512, 32, generator=random) for heads in (4, 2))
        asked, said = (torch.randint(8, (2, 2, 512), generator=random) for _ in range(2))
        told = torch.rand(2, 2, 512, generator=random) < 1 / 32
        q[..., :8] = 0.3 * q[..., :8] + topics[asked].repeat_interleave(2, 1)
        k[..., :8] = 0.3 * k[..., :8] + topics[said] * told[..., None]
        q[..., 8:] *= 0.15
        k[..., 8:] *= torch.where(torch.arange(512) // 16 % 2 == 0, 10, 0.5)[:, None]
        return q, k

    def found(self, q: Tensor, k: Tensor, scores: Tensor, count: int = 4) -> float:
        """Of the attention to earlier blocks, the part in the `count` of the largest scores; late queries."""
        start = q.shape[2] // 2
        mass = torch.cat([each for _, each in self._attention(q, k, start)], 2)
        return float(mass.gather(-1, scores.topk(count, -1).indices).sum() / mass.sum())

    @claim("After distillation the gates find more of the attention than bounds by minima and maxima do, for the same.")
    def distils(cls) -> Finding:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seer = cls(Dims(4, 32, 2), block=16, gate_dim=16)
        losses, (q, k) = seer.fit(map(cls.planted, range(200)), 1e-2), cls.planted(1000)
        with torch.no_grad():
            gates = seer.logits(q, k, 256)
            blocks, late = k.unflatten(2, (-1, 16))[:, :, None], q[:, :, 256:].unflatten(1, (2, 2))
            low, high = blocks.amin(4), blocks.amax(4)
            bounds = (late.clamp(min=0) @ high.mT + late.clamp(max=0) @ low.mT).amax(2)
            bounds = bounds.masked_fill(gates == torch.finfo(gates.dtype).min, -torch.inf)
            best = torch.cat([mass for _, mass in seer._attention(q, k, 256)], 2)
            parts = [seer.found(q, k, scores) for scores in (gates, bounds, best)]
        figure = "{:.0%} of the attention in 4 of 16 to 31 blocks, bounds {:.0%}, the best {:.0%}".format(*parts)
        return Finding(parts[0] > parts[1] + 0.08, f"{figure}; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    @claim("The target sums to 1 over earlier blocks, and says nothing where there is none.")
    def sums_to_one(cls) -> Finding:
        q, k = (x.double() for x in cls.planted(0))
        target = cls(Dims(4, 32, 2), block=16, gate_dim=16).target(q, k)
        late = torch.arange(32) * 16 >= torch.arange(512)[:, None] // 16 * 16
        apart = float((target[:, :, 16:].sum(-1) - 1).abs().max())
        none, eps = not target[:, :, :16].any() and not target[..., late].any(), torch.finfo(target.dtype).eps
        return Finding(none and apart < 32 * eps, f"sums are {apart:.0e} off, the rest is zero: {none}")

    @claim("The query heads of a key head read the same tokens, budget + s at most; no others reach the output.")
    def reads_few(cls) -> Finding:
        q, k = cls.planted(0)
        seer = cls(Dims(4, 32, 2), budget=64, block=16, gate_dim=16, decoded=40)
        with torch.no_grad():  # values that tell which token they are of: outputs are weights, 0 for what was not read
            read = seer(q, k, torch.eye(512).expand(2, 2, -1, -1))[:, :, -40:] > 0
        most, alike = int(read.sum(-1).max()), torch.equal(read[:, ::2], read[:, 1::2])
        figure = f"{most} of 512 tokens at most, at a budget of 64 in blocks of 16; alike in a group: {alike}"
        return Finding(alike and 64 < most <= 80, figure)
