"""DuoAttention: some key heads keep everything, the others only sinks and recent tokens; a gate a head tells them
apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.cache import Policy, Session, Stored, View
from saccade.cache.rows import sent
from saccade.cache.steps import Ring
from saccade.cache.view import usual
from saccade.contract import CachePolicy, Case, Dims, Finding, Spec, claim
from saccade.errors import part, positive
from saccade.where import Causal, Pattern, PerHead, Plan, Sinks, Window


@dataclass(frozen=True)
class DuoState:
    """Keys (B, heads, tokens, D) and values (B, heads, tokens, Dv): of the heads that keep all, and of those that keep
    sinks and recent ones.
    """

    whole: tuple[Tensor, Tensor]
    recent: tuple[Tensor, Tensor]


def joined(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two runs of keys and values as one."""
    keys, values = (torch.cat(pair, 2) for pair in zip(before, after, strict=True))
    return keys, values


class Streams(Policy):
    """Of a deployed DuoAttention: full heads keep all; the others drop, before each step, what leaves the window."""

    def __init__(self, duo: DuoAttention) -> None:
        self.duo = duo

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return self.duo.compute(usual(q, scale), k, v)

    def piece(self, view: View) -> Tensor:
        duo, ends = self.duo, view.ends
        full = torch.tensor(duo.full_heads())
        view.note("full", full.expand(len(view.q), -1))  # on the host, for steps that ask no device
        # Behind the sinks lie the recent tokens in order. From then on each leaves its place to the newest, so that
        # the places are taken in turns: the first is that of the token which leaves when one more has come.
        view.note("turn", ends.clamp(min=duo.sink + duo.recent) + 1)
        near = (view.positions < duo.sink) | (view.positions >= ends[:, None, None] - duo.recent)
        return near | sent(full, near)[:, None]

    def counts(self, view: View) -> Tensor:
        few = view.seen.clamp(max=self.duo.sink + self.duo.recent)
        return torch.where(view.notes("full"), view.seen[:, None], few[:, None])

    def select(self, step: Stored) -> None:
        duo = self.duo
        over = (step.counts > duo.sink + duo.recent) & ~step.notes("full").bool()
        if bool(over.any()):
            step.stored.drop(Ring(duo.sink, duo.recent, step.notes("turn")), step.rows, over)

    def steady(self, session: Session) -> bool:
        """Once streaming heads hold all that they ever will, in pages of their own: what leaves is written over."""
        store = session.store(0)
        return int(store.seen.min()) >= self.duo.sink + self.duo.recent and not store.pool.guarded


class DuoAttention(CachePolicy):
    """Retrieval heads with a full cache, streaming heads with a short one.

        full = causal attention,   stream = the same over keys j < sink or i - j < recent
        trained (share None): o = a full + (1 - a) stream,   a = clamp(alpha, 0, 1), one for each key head
        deployed: o = full on the key heads with the largest alpha, stream on the others

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). The query heads of a key head share its gate. Paper: arXiv
    2410.10819, sections 2.2 and 2.3; the form of the gate and its start at 1 follow the authors' code. Their loss is
    the squared distance of the last hidden states from the full model's plus 0.05 mean |alpha| over all layers.
    Deviations: `share` is that of one layer; `chosen` sets each layer's by the authors' one quantile over all layers.
    They clamp the gates after each step, here `mixed` does. Their decoder reads the current token on top of sink +
    recent cached ones; here the window counts it, as in training, so that prefill in any pieces and decode agree.
    share: part of the key heads that is full, rounded (default 0.5); None trains the gates. sink: 64. recent: 256, the
    query included. Costs N^2 / 2 pairs on a full head, N (sink + recent) on another; share L + (1 - share) (sink +
    recent) cached tokens. Errors: ValueError for a share outside [0, 1].

    >>> duo, x = DuoAttention(Dims(4, 8), sink=2, recent=6), torch.randn(1, 4, 32, 8)
    >>> duo(x, x, x).shape, duo.kept(32).sum(1).tolist()
    (torch.Size([1, 4, 32, 8]), [32, 32, 8, 8])
    """

    spec = Spec(
        id="duo_attention",
        name="DuoAttention",
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        paper="2410.10819",
        year=2024,
        family="kv_cache",
        uses=("attend", "PerHead", "Sinks", "Window"),
        waits="trained gates decide which heads are full",
    )
    causal = True
    per_head = True
    learning: ClassVar[Mapping[str, float]] = {"lr": 0.02, "weight_decay": 0.0}

    def __init__(self, dims: Dims, *, share: float | None = 0.5, sink: int = 64, recent: int = 256) -> None:
        super().__init__(dims)
        if share is not None:
            part("share", share, "or None to train the gates")
        self.share, self.sink, self.recent = share, positive("sink", sink, least=0), positive("recent", recent)
        self.alpha = nn.Parameter(torch.ones(dims.num_kv_heads))

    @property
    def policy(self) -> Policy | None:
        """What a pretrained model's cache is served by; None while the gates are trained."""
        return None if self.share is None else Streams(self)

    @classmethod
    def learner(cls, dims: Dims, *, share: float = 0.5, **params: Any) -> DuoAttention:
        """A layer whose gates are to be trained: all of them 1, so that every head is full."""
        return cls(dims, share=None, **params)

    @classmethod
    def objective(cls, layers: Sequence[DuoAttention], lesson: Any) -> Tensor:
        """The squared distance of the last hidden states on what is asked, and 0.05 mean |alpha| over all layers."""
        distance: Tensor = lesson.distance()
        return distance + 0.05 * torch.stack([layer.alpha.abs() for layer in layers]).mean()

    @classmethod
    def chosen(cls, layers: Sequence[DuoAttention], *, share: float = 0.5, **params: Any) -> list[dict[str, Any]]:
        """Parameters of every layer once deployed: full are the key heads of the largest gates of all layers."""
        gates = torch.stack([layer.alpha.detach().float() for layer in layers])
        best = gates.flatten().argsort(descending=True, stable=True)[: math.floor(share * gates.numel() + 0.5)]
        full = (best // gates.shape[1]).bincount(minlength=len(layers)) / gates.shape[1]
        return [params | {"share": each} for each in full.tolist()]

    @property
    def stream(self) -> Pattern:
        """What a streaming head sees."""
        return (Sinks(self.sink) | Window(self.recent)) & Causal() if self.sink else Window(self.recent) & Causal()

    def full_heads(self) -> list[bool]:
        """Which key heads are full: those with the largest gates, the first of equals.

        The host waits for the gates, by which it cuts heads and allocates pages.
        """
        heads = self.dims.num_kv_heads
        count = heads if self.share is None else math.floor(self.share * heads + 0.5)
        best = set(self.alpha.detach().float().argsort(descending=True, stable=True)[:count].tolist())
        return [h in best for h in range(heads)]

    def pattern(self) -> Pattern:
        """What each query head sees once deployed."""
        return PerHead(
            [Causal() if full else self.stream for full in self.full_heads() for _ in range(self.dims.group)]
        )

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern().plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def mixed(self, full: Tensor, stream: Tensor) -> Tensor:
        """a full + (1 - a) stream, both (B, H, N, D)."""
        a = self.alpha.clamp(0, 1).repeat_interleave(self.dims.group).to(full.dtype)[:, None, None]
        return a * full + (1 - a) * stream

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.share is not None:
            return attend(q, k, v, self.pattern())
        return self.mixed(attend(q, k, v, Causal()), attend(q, k, v, self.stream))

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: DuoState | None = None) -> tuple[Tensor, DuoState]:
        full = self.full_heads()
        train = self.share is None
        at = [
            [h for h, is_full in enumerate(full) if is_full],
            [h for h, is_full in enumerate(full) if train or not is_full],
        ]
        whole, recent = ((k[:, heads], v[:, heads]) for heads in at)
        if state is not None:
            whole, recent = joined(state.whole, whole), joined(state.recent, recent)
        if recent[0].shape[2] > self.sink + self.recent:
            early, late = ([x[:, :, part] for x in recent] for part in (slice(self.sink), slice(-self.recent, None)))
            recent = joined(early, late)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        found = []
        for heads, (keys, values) in zip(at, (whole, recent), strict=True):
            if heads:
                mine = [h * self.dims.group + g for h in heads for g in range(self.dims.group)]
                found.append(attend(q[:, mine], keys, values))
                out[:, mine] = found[-1]
        return self.mixed(*found) if train else out, DuoState(whole, recent)

    def kept(self, num_tokens: int) -> Tensor:
        full = torch.tensor(self.full_heads())[:, None]
        token = torch.arange(num_tokens)
        return full | (token < self.sink) | (token >= num_tokens - self.recent)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, d), (kv_heads, m) = q.shape, k.shape[1:3]
        alpha, rows = dict(self.named_parameters())["alpha"], []
        ranked = sorted(range(kv_heads), key=lambda h: -float(alpha[h].detach()))
        best = ranked if self.share is None else ranked[: int(self.share * kv_heads + 0.5)]
        for h in range(heads):
            shared = h // (heads // kv_heads)
            for i in range(m - n, m):
                scores = (q[:, h, i - m + n, None] * k[:, shared, : i + 1]).sum(-1) / d**0.5
                near = [j for j in range(i + 1) if j < self.sink or i - j < self.recent]
                everything = (scores.softmax(-1)[..., None] * v[:, shared, : i + 1]).sum(1)
                streaming = (scores[:, near].softmax(-1)[..., None] * v[:, shared, near]).sum(1)
                a = alpha[shared].clamp(0, 1) if self.share is None else float(shared in best)
                rows.append(a * everything + (1 - a) * streaming)
        return torch.stack(rows, 1).unflatten(1, (heads, n))

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8), 37, {"sink": 3, "recent": 8}),
            Case(Dims(4, 4, 2), 29, {"sink": 1, "recent": 5, "share": None}),
            Case(Dims(6, 4, 3), 31, {"sink": 0, "recent": 7, "share": 0.3}, batch=1),
            Case(Dims(2, 8), 23, {"share": 1.0}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"share": 1.0}

    @claim("Cached tokens per head are share L + (1 - share) min(L, sink + recent).")
    def cache(cls) -> Finding:
        length = 8192
        duo = cls(Dims(16, 8, 8), share=0.25)
        held = float(duo.kept(length).sum(1).double().mean())
        return Finding(held == 0.25 * length + 0.75 * 320, f"{held:.0f} of {length} tokens per head at share 0.25")

    @claim("On planted retrieval heads the optimiser separates them from streaming ones.")
    def separates(cls) -> Finding:
        random = torch.Generator().manual_seed(0)
        n, heads, planted = 192, 8, {1, 4, 6}
        q, k, v = torch.randn(3, 4, heads, n, 16, generator=random)
        for h in planted:  # late queries ask for what was said early, outside of the window
            q[:, h, 128:] = 4 * k[:, h, 32:96]
        duo = cls(Dims(heads, 16), share=None, sink=4, recent=16)
        optimiser = torch.optim.AdamW(duo.parameters(), lr=0.02, weight_decay=0.0)
        with torch.no_grad():
            full, stream = attend(q, k, v, Causal()), attend(q, k, v, duo.stream)
            # Heads that stream in truth put next to nothing outside of the window.
            target = torch.stack([full[:, h] if h in planted else stream[:, h] for h in range(heads)], 1)
        for _ in range(100):
            optimiser.zero_grad()
            loss = (duo.mixed(target, stream) - target)[:, :, 128:].square().mean() + 0.05 * duo.alpha.abs().mean()
            loss.backward()
            optimiser.step()
        duo.share = len(planted) / heads
        found = {h for h, is_full in enumerate(duo.full_heads()) if is_full}
        low = max(float(duo.alpha[h].detach()) for h in range(heads) if h not in planted)
        high = min(float(duo.alpha[h].detach()) for h in planted)
        return Finding(
            found == planted and high > 0.5 > low, f"gates of planted heads >= {high:.2f}, of the others <= {low:.2f}"
        )
