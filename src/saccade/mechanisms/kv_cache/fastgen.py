"""FastGen: each head takes the cheapest of five policies that keeps most of its attention, once, after the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Cached, Policy, Session, Stored, View, top
from saccade.contract import Case, Dims, Finding, Held, Spec, claim, replay
from saccade.errors import positive

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL = range(5)


class Profiled(Policy):
    """See `FastGen`. Columns of a token: attention received, the mean over a group; 1 for special and punctuation.

    Noted of a key head: `head`, its policy, and `room`, the tokens that it may hold, on the host; `near`, how many of
    the newest are the last to go, 0 where a new token is the first.
    """

    columns = 2

    def __init__(self, rule: FastGen) -> None:
        self.rule = rule

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> None:
        return None

    def named(self, view: View, positions: Tensor, ids: Sequence[int]) -> Tensor:
        """Which tokens at positions (G, Hkv, M) have one of the ids."""
        told = view.shared.get("token_ids")
        if told is None or not ids:
            return torch.zeros_like(positions, dtype=torch.bool)
        told = told if view.rows is None else told[list(view.rows)]
        at = positions.clamp(max=told.shape[1] - 1)
        return torch.isin(told[:, None].expand(*at.shape[:2], -1).gather(2, at), told.new_tensor(ids))

    def piece(self, view: View) -> Tensor:
        there, positions, device = view.there, view.positions, view.q.device
        widths = [max(1, int(self.rule.local * seen)) for seen in view.seen.tolist()]
        near = torch.tensor(widths, device=device)
        rare = torch.tensor([[math.ceil(self.rule.frequent * seen)] for seen in view.seen.tolist()], device=device)
        received = view.received()
        view.columns[..., 0] += view.pooled(received)

        special = there & ((positions < self.rule.sinks) | self.named(view, positions, self.rule.special))
        kind = special | (there & self.named(view, positions, self.rule.punctuation))
        view.columns[..., 1] = kind.to(view.columns)
        free = view.columns[..., 0].masked_fill(kind | ~there, -torch.inf)
        frequent = kind | (there & top(free, rare.expand(free.shape[:2])))
        local = frequent | (there & (positions >= (view.ends - near)[:, None, None]))

        beside = [received.unflatten(1, (-1, view.group)) * ~marks[:, :, None] for marks in (special, kind, frequent)]
        missing = torch.stack([*[each.sum(-1) for each in beside], self.far(view, frequent, near)])
        enough = missing.amax(3) < (1 - self.rule.recovery) * view.q.shape[2]
        head = torch.cat([enough, torch.ones_like(enough[:1])]).int().argmax(0)
        kept = torch.stack([special, kind, frequent, local, there])
        keep = kept.gather(0, head[None, ..., None].expand(1, *there.shape))[0]

        view.note("near", torch.where(head == LOCAL, near[:, None], (head > PUNCTUATION).long()))
        policy, count, most = torch.stack([head, keep.sum(-1), frequent.sum(-1)]).cpu()
        room = torch.where(policy == LOCAL, most + torch.tensor(widths)[:, None], count)
        view.note("room", room.masked_fill(policy == FULL, torch.iinfo(torch.int64).max))
        view.note("head", policy)
        return keep

    def far(self, view: View, kept: Tensor, near: Tensor) -> Tensor:
        """Attention of all queries, summed, to what is neither kept nor of the `near` (G,) newest: (G, Hkv, group)."""
        total, at = torch.zeros((), device=near.device), view.ends - view.q.shape[2] - near
        for block in view.blocks():
            oldest = at[:, None] + torch.arange(block.shape[2], device=at.device)
            out = ~kept[:, :, None] & (view.positions[:, :, None] <= oldest[:, None, :, None])
            total = total + (block.unflatten(1, (-1, view.group)) * out[:, :, None]).sum((3, 4))
            at = at + block.shape[2]
        return total

    def after(self, step: Stored) -> None:
        head, room = step.notes("head"), step.notes("room")
        newest = step.ends[:, None, None] - 1
        known = "token_ids" in step.shared and bool(self.rule.special + self.rule.punctuation)
        if known:
            fresh = self.named(step, newest.expand(*head.shape, 1), self.rule.special + self.rule.punctuation)
            room = room + (fresh[..., 0].cpu() & (head != SPECIAL) & (head != FULL))
            step.note("room", room)
        over = step.counts > room
        last = step.positions == newest
        place = last.int().argmax(-1)
        if bool(((head == FREQUENT) | (head == LOCAL)).any()):
            step.columns[..., 0] += step.pooled(step.received())
            if known:
                step.columns[..., 1] += (last & fresh).to(step.columns)
            step.put_columns()
            near = step.notes("near")
            mean = step.columns[..., 0] / (step.ends[:, None, None] - step.positions)
            # Attention is 1 at most: what is protected goes when nothing else is there.
            late = step.positions >= step.ends[:, None, None] - near[..., None]
            mean = mean + ((step.columns[..., 1] > 0) | late)
            least = mean.masked_fill(last | ~step.there, torch.inf).argmin(-1)
            place = torch.where(near > 0, least, place)
        if bool(over.any()):
            step.stored.drop(step.slots.gather(2, place[..., None]), step.rows, over)


class FastGen(Cached):
    """Each head holds the first of five nested sets that keeps `recovery` of its attention, and goes on like that.

        special < special + punctuation < those + frequent < those + local < all
        recovered = mean over the prompt's queries i of sum_(j in set) p_ij   (p as it was, not renormalised)
        frequent: the ceil(r_f N) keys of the largest sum_i p_ij that are not special or punctuation
        local: for query i the last r_l N keys, i - j < max(1, floor(r_l N))

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). A step attends to what is held and to itself. Then a special
    head drops the new token; one with punctuation keeps it if it is that; those with frequent tokens drop, once they
    hold as many as their sets are large, the token of the least mean attention since it came, neither special nor
    punctuation nor, for local heads, in the window; full heads add. Paper: arXiv 2310.01801; what it leaves open (the
    mean over queries, frequent tokens besides those already kept, what a head evicts) follows its reproduction in
    cold-compress, to which the authors' repository points, but for heads that no set is enough for: they are full.
    Deviations: a head is a key head; each of its query heads must recover that much, and what it receives is their
    mean. The mean attention counts all queries, not the last 400. With recovery = 1 all heads are full, also where a
    cheaper set covers a short prompt. Where a model tells no token ids, nothing is punctuation. Each later piece of a
    prompt is profiled anew. recovery: T (default 0.9). frequent: r_f (0.3). local: r_l (0.3). sinks: first tokens that
    are special (1). special, punctuation: token ids (none). decoded: tokens that are decoded (16). Costs N^2 / 2 pairs
    of the prompt, twice more to profile; then what heads hold. Errors: ValueError for shares outside [0, 1].

    >>> x = torch.randn(1, 2, 40, 8)
    >>> FastGen(Dims(2, 8))(x, x, x).shape
    torch.Size([1, 2, 40, 8])
    """

    spec = Spec(
        id="fastgen",
        name="FastGen",
        title="Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
        paper="2310.01801",
        year=2023,
        family="kv_cache",
        uses=("Cached", "Policy", "top"),
        discrete=True,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        recovery: float = 0.9,
        frequent: float = 0.3,
        local: float = 0.3,
        sinks: int = 1,
        special: Sequence[int] = (),
        punctuation: Sequence[int] = (),
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        for name, value in (("recovery", recovery), ("frequent", frequent), ("local", local)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}; pass a number from 0 to 1")
        self.recovery, self.frequent, self.local = recovery, frequent, local
        self.sinks = positive("sinks", sinks, least=0)
        self.special, self.punctuation = tuple(special), tuple(punctuation)
        self.policy = Profiled(self)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """ids: (B, N), of the tokens; unknown by default."""
        (heads, n, d), kv_heads = q.shape[1:], k.shape[1]
        group, prompt = heads // kv_heads, max(1, n - self.decoded)
        width, rare = max(1, int(self.local * prompt)), math.ceil(self.frequent * prompt)
        state: dict[tuple[int, int], tuple[int, int, dict[int, float]]] = {}  # policy, room, attention received

        def attention(b: int, h: int, t: int, seen: list[int]) -> dict[int, float]:
            p = ((k[b, h // group, seen] * q[b, h, t]).sum(-1) / d**0.5).softmax(0)
            return dict(zip(seen, p.tolist(), strict=True))

        def level(b: int, j: int) -> int:
            """0 special, 1 punctuation, 2 neither."""
            name = -1 if ids is None else int(ids[b, j])
            return 0 if j < self.sinks or name in self.special else 2 - (name in self.punctuation)

        def first(b: int, g: int) -> list[int]:
            every = range(prompt)
            p = [[attention(b, h, i, list(range(i + 1))) for i in every] for h in range(g * group, (g + 1) * group)]
            sums = {j: sum(row[j] for one in p for row in one[j:]) / group for j in every}
            kind = {j for j in every if level(b, j) < 2}
            frequent = kind | set(sorted(set(every) - kind, key=lambda j: -sums[j])[:rare])
            fixed = [{j for j in kind if not level(b, j)}, kind, frequent, frequent]
            held = [*fixed[:3], frequent | set(every[-width:]), set(every)]
            enough = [
                all(
                    sum(x for i, row in enumerate(one) for j, x in row.items()
                        if j not in kept and (place < 3 or i - j >= width)) < (1 - self.recovery) * prompt
                    for one in p
                )
                for place, kept in enumerate(fixed)
            ]  # fmt: skip
            policy = [*enough, True].index(True)
            state[b, g] = policy, len(frequent) + width if policy == 3 else len(held[policy]), sums
            return sorted(held[policy])

        def later(b: int, g: int, t: int, row: list[int]) -> list[int]:
            policy, room, sums = state[b, g]
            for h in range(g * group, (g + 1) * group):
                for j, x in attention(b, h, t, row).items():
                    sums[j] = sums.get(j, 0.0) + x / group
            room += 1 <= policy < 4 and level(b, t) < 2
            state[b, g] = policy, room, sums
            if policy == 4 or len(row) <= room:
                return row
            free = [j for j in row[:-1] if level(b, j) == 2 and (policy == 2 or j <= t - width)]
            gone = t if policy < 2 else min(free, key=lambda j: sums[j] / (t - j + 1))
            return [j for j in row if j != gone]

        def keep(b: int, t: int, held: Held) -> Held:
            return [first(b, g) if t == prompt - 1 else later(b, g, t, row) for g, row in enumerate(held)]

        return replay(q, k, v, prompt, keep)

    @classmethod
    def inputs(cls, case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Random ones, but that queries favour the first token in one key head, the end of the window in the next."""
        q, k, v = super().inputs(case, generator, dtype)
        one = cls(case.dims, **case.params)
        near = max(1, int(one.local * one.prompt(case.length))) - 1
        for h in range(case.dims.num_heads):
            g = h // case.dims.group
            k_near = torch.cat([k[:, g, :near], k[:, g, : case.length - near]], 1)
            q[:, h] += (4 * k[:, g, :1], (2 + h % 2) * k_near, 3 * (h % 2) * k[:, g])[g % 3]
        return q, k, v

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(6, 8, 3), 43, {"recovery": 0.92, "decoded": 15}),
            Case(Dims(6, 4), 37, {"recovery": 0.75, "frequent": 0.3, "local": 0.25, "sinks": 2, "decoded": 19}),
            Case(Dims(4, 8, 4), 31, {"recovery": 0.7, "sinks": 0, "decoded": 7}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"recovery": 1.0}

    @classmethod
    def _planted(cls, recovery: float, **params: Any) -> tuple[FastGen, Session, Tensor]:
        """96 tokens whose heads attend to the first, to every ninth (punctuation), to near ones, and to all alike; and
        their attention (4, 96, 96).
        """
        n, at = 96, torch.arange(96)
        k = torch.randn(1, 4, n, 32, generator=torch.Generator().manual_seed(0)) / 8
        q = torch.zeros_like(k)
        k[0, 0, 0, 0], q[0, 0, :, 0] = 8, 8
        k[0, 1, ::9, 0], q[0, 1, :, 0] = 8, 8
        angles = at[:, None] * 2.0 ** -torch.arange(16)
        k[0, 2] = torch.cat([angles.cos(), angles.sin()], 1) * 4
        q[0, 2] = k[0, 2]
        one = cls(Dims(4, 32), recovery=recovery, punctuation=[1], **params)
        session = one.session()
        session.tell((at % 9 == 0).long()[None])
        one.read(session, q, k, k)
        scores = (q[0] @ k[0].mT / 32**0.5).masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf)
        return one, session, scores.softmax(-1)

    @claim("The lower T, the fewer tokens are held, down from all at T = 1.")
    def falls(cls) -> Finding:
        levels = (1.0, 0.99, 0.95, 0.8, 0.5, 0.0)
        held = [int(session.store(0).counts.sum()) for _, session, _ in map(cls._planted, levels)]
        return Finding(held[0] == 384 and held == sorted(held, reverse=True) and held[-1] == 4, f"T {levels}: {held}")

    @claim("Each kind of head gets its policy and recovers T, all together more than one policy with as many tokens.")
    def mixes(cls) -> Finding:
        _, session, p = cls._planted(0.9, local=0.25, frequent=0.1)
        heads, counts = session.store(0).notes["head"][0].tolist(), session.store(0).counts[0]
        near, each = torch.arange(96), int(counts.sum()) // 4
        met = session.held(0)[0, :, None].repeat(1, 96, 1)
        met[2] |= near[:, None] - near < 24
        mass = (p * met).sum(-1).mean(1)
        mixed, least = float(mass.mean()), float(mass.min())
        window = float((p * (near[:, None] - near < each)).sum(-1).mean())
        frequent = float(p.sum(1).topk(each, -1).values.sum() / 384)
        best = max(window, frequent)
        figure = f"{heads}: {mixed:.4f}, each {least:.4f} or more; {each} tokens each, near or frequent: {best:.4f}"
        return Finding(heads == [0, 1, 3, 4] and mixed > best and least >= 0.9, figure)
