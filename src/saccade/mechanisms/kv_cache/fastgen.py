"""FastGen: each head takes the cheapest of five policies that keeps most of its attention, once, after the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Cached, Policy, Session, Stored, View, top
from saccade.cache.rows import sent
from saccade.cache.view import Place, attention_at
from saccade.contract import Case, Dims, Finding, Held, Spec, claim, replay
from saccade.errors import part, positive

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL = range(5)


class Profiled(Policy):
    """See `FastGen`. Columns of a token: attention received, the mean over a group; 1 for special and punctuation.

    Noted of a key head, on the host: `head`, its policy, `kept`, the tokens of a prompt that it holds, and `room`,
    those that it may hold; on the device: `near`, how many of the newest are the last to go, 0 where a new token is
    the first.
    """

    columns = 2

    def __init__(self, rule: FastGen) -> None:
        self.rule = rule

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> None:
        return None

    def named(self, view: View, ids: Sequence[int]) -> Tensor:
        """Which tokens have one of the ids, (G, Hkv, M)."""
        told = view.ids if ids else None
        return torch.zeros_like(view.there) if told is None else torch.isin(told, told.new_tensor(ids))

    def sets(self, view: View, sums: Tensor) -> Tensor:
        """The five sets of every key head, (5, G, Hkv, M). sums (G, Hkv, M): attention that each token received."""
        there, positions, near = view.there, view.positions, sent(self.widths(view), sums)
        rare = view.by_seen(lambda seen: [math.ceil(r * seen) for r in self.rule.frequent])
        special = (there & (positions < self.rule.sinks)) | self.named(view, self.rule.special)
        kind = special | self.named(view, self.rule.punctuation)
        frequent = kind | (there & top(sums.masked_fill(kind | ~there, -torch.inf), rare))
        local = frequent | (there & (positions >= view.ends[:, None, None] - near[..., None]))
        return torch.stack([special, kind, frequent, local, there])

    def widths(self, view: View) -> Tensor:
        """How many of the newest tokens are local, (G, Hkv) on the host."""
        return view.by_seen(lambda seen: [max(1, int(r * seen)) for r in self.rule.local])

    def missing(self, view: View, received: Tensor, sets: Tensor) -> Tensor:
        """Attention that the first four sets miss, the most of a key head's query heads, as a part: (4, G, Hkv).

        received (G, H, M): what each token got of the queries.
        """
        each = view.grouped(received)
        beside = [(each * ~marks[:, :, None]).sum(-1) for marks in sets[:LOCAL]]
        near = sent(self.widths(view), sets)
        return torch.stack([*beside, self.far(view, sets[FREQUENT], near)]).amax(3) / view.q.shape[2]

    def piece(self, view: View) -> Tensor:
        received = view.received()
        view.columns[..., 0] += view.pooled(received)
        sets = self.sets(view, view.columns[..., 0])
        view.columns[..., 1] = sets[PUNCTUATION].to(view.columns)
        if self.rule.heads is None:
            enough = self.missing(view, received, sets) < 1 - self.rule.recovery
            head = torch.cat([enough, torch.ones_like(enough[:1])]).int().argmax(0)
        else:
            head = sent(torch.tensor(self.rule.heads), sets).expand(sets.shape[1:3])
        keep = sets.gather(0, head[None, ..., None].expand(1, *sets.shape[1:]))[0]

        widths = self.widths(view)
        view.note("near", torch.where(head == LOCAL, sent(widths, head), (head > PUNCTUATION).long()))
        # What a head recovers decides how much it holds: the host, which allocates, waits once a prompt and layer.
        policy, count, most = torch.stack([head, keep.sum(-1), sets[FREQUENT].sum(-1)]).cpu()
        room = torch.where(policy == LOCAL, most + widths, count)
        view.note("room", room.masked_fill(policy == FULL, torch.iinfo(torch.int64).max))
        view.note("head", policy)
        view.note("kept", count)
        return keep

    def counts(self, view: View) -> Tensor:
        return view.notes("kept")

    def far(self, view: View, kept: Tensor, near: Tensor) -> Tensor:
        """Attention of all queries, summed, to what is not kept nor of the `near` (G, Hkv) newest: (G, Hkv, group)."""
        total, at = torch.zeros((), device=near.device), view.ends[:, None] - view.q.shape[2] - near
        for block in view.blocks():
            oldest = at[..., None] + torch.arange(block.shape[2], device=at.device)
            out = ~kept[:, :, None] & (view.positions[:, :, None] <= oldest[..., None])
            total = total + (view.grouped(block) * out[:, :, None]).sum((3, 4))
            at = at + block.shape[2]
        return total

    def after(self, step: Stored) -> None:
        head, room = step.notes("head"), step.notes("room")
        last = step.positions == step.ends[:, None, None] - 1
        names = self.rule.special + self.rule.punctuation
        known = bool(names) and step.ids is not None
        if known:
            fresh = last & self.named(step, names)
            room = room + (fresh.any(-1).cpu() & (head != SPECIAL) & (head != FULL))
            step.note("room", room)
        over = step.counts > room
        place = last.int().argmax(-1)
        if bool(((head == FREQUENT) | (head == LOCAL)).any()):
            step.columns[..., 0] += step.pooled(step.received())
            if known:
                step.columns[..., 1] += fresh.to(step.columns)
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
    cheaper set covers a short prompt. A search takes the policies once for all prompts, `heads`, and r_f and r_l of
    each head too, by the mean that they recover of samples. Where a model tells no token ids, nothing is punctuation.
    Each later piece of a prompt is profiled anew. recovery: T (default 0.9). frequent: r_f (0.3), or one for each key
    head. local: r_l (0.3), likewise. heads: the policy of each key head, 0 (special) to 4 (full), in place of profiling
    a prompt (None). sinks: first tokens that are special (1). special, punctuation: token ids (none). decoded: tokens
    that are decoded (16). Costs N^2 / 2 pairs of the prompt, twice more to profile; then what heads hold. Errors:
    ValueError for shares outside [0, 1], and for other numbers of heads.

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
        waits="what a head recovers decides how much it holds",
    )
    policy: Profiled

    def __init__(
        self,
        dims: Dims,
        *,
        recovery: float = 0.9,
        frequent: float | Sequence[float] = 0.3,
        local: float | Sequence[float] = 0.3,
        heads: Sequence[int] | None = None,
        sinks: int = 1,
        special: Sequence[int] = (),
        punctuation: Sequence[int] = (),
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        self.recovery = self._shares("recovery", recovery)[0]
        self.frequent, self.local = self._shares("frequent", frequent), self._shares("local", local)
        if heads is not None and (len(heads) != dims.num_kv_heads or not {*heads} <= {*range(FULL + 1)}):
            raise ValueError(
                f"heads: got {list(heads)}; pass one of 0 (special), 1 (punctuation), 2 (frequent), 3 (local) and 4 "
                f"(full) for each of {dims.num_kv_heads} key heads, or None"
            )
        self.heads = None if heads is None else tuple(heads)
        self.per_head = heads is not None or len({*zip(self.frequent, self.local, strict=True)}) > 1
        self.sinks = positive("sinks", sinks, least=0)
        self.special, self.punctuation = tuple(special), tuple(punctuation)
        self.policy = Profiled(self)

    def _shares(self, name: str, value: float | Sequence[float]) -> tuple[float, ...]:
        """One for each key head."""
        heads = self.dims.num_kv_heads
        found = tuple(value) if isinstance(value, Sequence) else (value,) * heads
        if len(found) != heads:
            raise ValueError(f"{name}: got {value}; pass a number from 0 to 1, or one for each of {heads} key heads")
        return tuple(part(name, each, f"or one for each of {heads} key heads") for each in found)

    @classmethod
    def calibrated(cls, dims: Dims, seen: Sequence[Any], **params: Any) -> FastGen:
        """A layer whose heads are to be given policies: nothing is fitted."""
        return cls(dims, **params)

    def rules(self) -> list[dict[str, Any]]:
        """What a key head may keep: each of the five policies, with r_f and r_l of 0.05, 0.1, 0.2 and 0.4."""
        shares = (0.05, 0.1, 0.2, 0.4)
        both: list[dict[str, Any]] = [{"heads": LOCAL, "frequent": f, "local": r} for f in shares for r in shares]
        frequent = [{"heads": FREQUENT, "frequent": f} for f in shares]
        return [{"heads": SPECIAL}, {"heads": PUNCTUATION}, *frequent, *both, {"heads": FULL}]

    def weighed(self, seen: Any, rules: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """The part of attention that each rule recovers in each key head, and the part of a prompt that it holds, (R,
        Hkv) both: the less of what queries of the prompt find and of what those find that foretell the answers.
        """
        none: Any = None  # of a view that reads nothing from a store
        n, place = int(seen.asked.int().argmax()), Place(shared={"token_ids": seen.tokens})
        view = View(none, place, *(x[:, :, :n] for x in (seen.q, seen.k, seen.v)))
        rows = seen.foretelling
        late = attention_at(seen.q, seen.k, rows)
        age = rows[:, None] - torch.arange(n, device=rows.device)
        own = late.gather(-1, rows[:, None].expand(*late.shape[:-1], 1))[..., 0] * (rows >= n)
        later = late[..., n:].sum(-1) - own  # (1, Hkv, group, R), which the first two policies drop
        received, found = view.received(), []
        for rule in rules:
            shares = {name: rule.get(name, 0.0) for name in ("frequent", "local")}
            made = type(self)(self.dims, **shares, sinks=self.sinks, special=self.special, punctuation=self.punctuation)
            sets, head = made.policy.sets(view, view.pooled(received)), rule["heads"]
            missing = torch.cat([made.policy.missing(view, received, sets), torch.zeros_like(sets[:1, ..., 0]).float()])
            out = ~sets[min(head, FREQUENT)][:, :, None, None]
            if head >= LOCAL:
                out = out & (age >= int(made.policy.widths(view)[0, 0])) & (head == LOCAL)  # a full head misses nothing
            lost = (late[..., :n] * out).sum(-1) + later * (head <= PUNCTUATION)
            lost = torch.maximum(missing[head], lost.mean(-1).amax(-1))
            found.append(torch.stack([1 - lost[0].double(), sets[head][0].double().mean(-1)]).cpu())
        recovered, held = torch.stack(found, 1)
        return recovered, held

    @classmethod
    def assembled(cls, rules: Sequence[Mapping[str, Any]], **params: Any) -> dict[str, Any]:
        """Parameters of the layer, from the rule of each key head."""
        return params | {
            "heads": [rule["heads"] for rule in rules],
            "frequent": [rule.get("frequent", 0.0) for rule in rules],
            "local": [rule.get("local", 0.0) for rule in rules],
        }

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """ids: (B, N), of the tokens; unknown by default."""
        (heads, n, d), kv_heads = q.shape[1:], k.shape[1]
        group, prompt = heads // kv_heads, max(1, n - self.decoded)
        widths, rares = [max(1, int(r * prompt)) for r in self.local], [math.ceil(r * prompt) for r in self.frequent]
        state: dict[tuple[int, int], tuple[int, int, dict[int, float]]] = {}  # policy, room, attention received

        def attention(b: int, h: int, t: int, seen: list[int]) -> dict[int, float]:
            p = ((k[b, h // group, seen] * q[b, h, t]).sum(-1) / d**0.5).softmax(0)
            return dict(zip(seen, p.tolist(), strict=True))

        def level(b: int, j: int) -> int:
            """0 special, 1 punctuation, 2 neither."""
            name = -1 if ids is None else int(ids[b, j])
            return 0 if j < self.sinks or name in self.special else 2 - (name in self.punctuation)

        def first(b: int, g: int) -> list[int]:
            every, width, rare = range(prompt), widths[g], rares[g]
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
            policy = [*enough, True].index(True) if self.heads is None else self.heads[g]
            state[b, g] = policy, len(frequent) + width if policy == 3 else len(held[policy]), sums
            return sorted(held[policy])

        def later(b: int, g: int, t: int, row: list[int]) -> list[int]:
            policy, room, sums = state[b, g]
            width = widths[g]
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
        near = max(1, int(one.local[0] * one.prompt(case.length))) - 1
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
            Case(
                Dims(10, 4, 5),
                29,
                {"heads": [3, 0, 4, 2, 1], "frequent": [0.2, 0, 0, 0.4, 0], "local": [0.3, 0, 0, 0, 0], "decoded": 13},
            ),
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
