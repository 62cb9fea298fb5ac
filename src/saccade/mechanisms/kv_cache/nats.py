"""NAtS: every token learns how long its key and value live: for good, to the next such token, or for a window."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.cache import Policy, Rotation, Stored, Turned, View
from saccade.cache.view import usual
from saccade.contract import Attention, Case, Dims, Finding, Mixer, Spec, apart, claim, rotated, sample
from saccade.errors import positive
from saccade.mix import rotary_rates, turn_at
from saccade.softmax import Pages, attend_lifetimes, attend_pages
from saccade.softmax.lifetimes import alive
from saccade.where import Causal, Window

GLOBAL, LOCAL, SLIDING = range(3)


@dataclass(frozen=True)
class NATSState:
    """What a decoder keeps: `cells`, which are keys, values (B, Hkv, T, D), types and positions (B, Hkv, T, 1), the
    first `count` (B, Hkv) of each head alive, T the largest count; tokens read.
    """

    cells: tuple[Tensor, ...]
    count: Tensor
    length: int


class Lifetimes:
    """What types mean, to a layer of its own and to one in a pretrained model."""

    window: int
    lam: float
    training: bool

    def typed(self, z: Tensor, at: Tensor) -> Tensor:
        """One-hot (B, Hkv, N, 3) of scores z, whose gradient is that of a softmax; position 0 is global. at (..., N)"""
        if self.training:
            z = z - torch.empty_like(z).exponential_().log()
        soft = z.softmax(-1)
        hot = F.one_hot(z.argmax(-1), 3).to(soft.dtype) + (soft - soft.detach())
        whole = F.one_hot(torch.full_like(hot[..., 0], GLOBAL, dtype=torch.int64), 3).to(hot)
        return torch.where((at == 0)[..., None, :, None], whole, hot)

    def lifetimes(self, types: Tensor) -> tuple[Tensor, Tensor]:
        """The last query that sees each key (B, Hkv, N), and the last that would, by type (3, B, Hkv, N)."""
        kinds, n = types.argmax(-1), types.shape[2]
        at = torch.arange(n, device=types.device)
        following = torch.where(kinds == GLOBAL, at, n - 1).flip(-1).cummin(-1).values.flip(-1)
        sliding = (at + self.window).clamp(max=n - 1).expand_as(following)
        ends = torch.stack([torch.full_like(following, n - 1), following, sliding])
        return ends.gather(0, kinds[None])[0], ends

    def pull(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, types: Tensor, ends: Tensor) -> Tensor:
        """A tensor like o that is zero, and whose gradient by the types is the mask's."""
        whole, following, sliding = ends
        later = torch.cat([following[:, :, 1:], whole[:, :, -1:]], 2)  # g(j + 1)
        total, lse_all = torch.zeros_like(o), None
        for last, kind, sign in ((whole, GLOBAL, 1), (later, GLOBAL, -1), (following, LOCAL, 1), (sliding, SLIDING, 1)):
            share = sign * types[..., kind, None]
            y, lse = attend_lifetimes(q, k, torch.cat([v * share, share], -1), last)
            lse_all = lse if lse_all is None else lse_all
            total = total + (lse - lse_all).exp().to(o.dtype)[..., None] * (y[..., :-1] - o * y[..., -1:])
        return total - total.detach()

    def charge(self, types: Tensor, ends: Tensor) -> Tensor:
        """lam sum_j (N - j) / N for globals, (g(j) - j) / N for locals."""
        n = types.shape[2]
        at = torch.arange(n, device=types.device)
        whole, following, _ = ends
        return self.lam * ((whole + 1 - at) * types[..., GLOBAL] + (following - at) * types[..., LOCAL]).sum() / n

    def attended(self, q: Tensor, k: Tensor, v: Tensor, types: Tensor, ends: tuple[Tensor, Tensor]) -> Tensor:
        """o (B, H, N, Dv), whose gradient by the types is the mask's. ends: of `lifetimes`."""
        o, _ = attend_lifetimes(q, k, v, ends[0])
        if types.requires_grad:
            o = o + self.pull(q.detach(), k.detach(), v.detach(), o.detach(), types.to(v.dtype), ends[1])
        return o


class Typed(Turned, Policy):
    """Keeps globals, locals since the last of them, and sliding tokens of ages up to W. Column: a token's type."""

    columns = 1

    def __init__(self, layer: InLayer, rotation: Rotation | None) -> None:
        self.layer = layer
        self.turned_by(rotation, layer.dims.head_dim)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> None:
        return None

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        types = self.layer.types(q, k, v, torch.arange(k.shape[2], device=k.device))
        return self.layer.meet(usual(q, scale), k, v, types)

    @torch.no_grad()
    def piece(self, view: View) -> Tensor:
        """Which tokens live on, when the types of those that just came are noted."""
        new = view.at - view.ends[:, None]  # -N, ..., -1
        place = view.there.sum(-1)[..., None] + new[:, None]  # behind those that are held
        k, v = (x.gather(2, place[..., None].expand(-1, -1, -1, x.shape[3])) for x in (view.k, view.v))
        kinds = self.layer.types(view.q, k, v, view.at).argmax(-1)
        view.columns[..., 0].scatter_(2, place, kinds.to(view.columns))
        kinds, at = view.columns[..., 0].round(), view.positions
        newest = at.masked_fill((kinds != GLOBAL) | ~view.there, -1).amax(-1, keepdim=True)
        lives = (kinds == LOCAL) & (at > newest)
        lives |= (kinds == SLIDING) & (view.ends[:, None, None] - 1 - at < self.layer.window)
        return view.there & (lives | (kinds == GLOBAL))

    def after(self, step: Stored) -> None:
        lives = self.piece(step)
        step.put_columns()
        if not lives.equal(step.there):
            step.stored.keep(lives, step.rows)


class InLayer(Lifetimes, Attention):
    """`NATS` in a layer whose projections are a pretrained model's: types are read from its q, k and v.

        z_j = W [R_j^-1 q_j; R_j^-1 k_j; v_j],   all heads of the token, R_j the rotary turn

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); W (3 Hkv, (H + 2 Hkv) D), zeros at first: all is global. The
    projections are linear in what the layer reads, so that this is the W_t x of the paper wherever they lose nothing
    of x, and norms of q and k aside. In training `charged` is what the last call owes for lifetimes. rotation: R, None
    for 1; a model says its own where that is known (`saccade.cache.Turned`), and else q and k count as they come.
    """

    causal = True
    per_head = True
    learning: ClassVar[Mapping[str, Any]] = {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}

    def __init__(self, dims: Dims, *, window: int = 16, lam: float = 5e-7, rotation: Rotation | None = None) -> None:
        super().__init__(dims)
        self.window, self.lam = positive("window", window), lam
        channels = (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim
        self.kind = nn.Parameter(torch.zeros(3 * dims.num_kv_heads, channels))
        self.charged: Tensor | None = None
        self.policy = Typed(self, rotation)

    def types(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """One-hot (B, Hkv, N, 3) of tokens at positions at (N,) or (B, N)."""
        q, k, v = (x.detach().to(self.kind.dtype) for x in (q, k, v))
        q, k = (self.policy.back(x, at[..., None, :]) for x in (q, k))
        z = F.linear(torch.cat([q, k, v], 1).transpose(1, 2).flatten(2), self.kind)
        return self.typed(z.unflatten(2, (-1, 3)).transpose(1, 2), at)

    def meet(self, q: Tensor, k: Tensor, v: Tensor, types: Tensor) -> Tensor:
        """o, with what the types owe noted in training."""
        ends = self.lifetimes(types)
        if self.training:
            self.charged = self.charge(types, ends[1])
        return self.attended(q, k, v, types, ends)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.policy.attend(0, q, k, v, None)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, heads, n, d), kv_heads, w = q.shape, k.shape[1], dict(self.named_parameters())["kind"].to(q.dtype)
        rows, (rates, scale) = q.new_zeros(q.shape), self.policy.numbers
        for b in range(batch):
            kinds: list[list[str]] = []
            for j in range(n):
                parts = rotated(torch.cat([q[b, :, j], k[b, :, j]]), torch.tensor(-j), rates, 1 / scale)
                z = (w @ torch.cat([*parts, *v[b, :, j]])).view(kv_heads, 3).argmax(-1).tolist()
                kinds.append([("global", "local", "sliding")[x if j else 0] for x in z])
            for h in range(heads):
                g = h // (heads // kv_heads)
                for i in range(n):
                    last = max(j for j in range(i) if kinds[j][g] == "global") if i else 0
                    seen = [
                        j
                        for j in range(i + 1)
                        if kinds[j][g] == "global"
                        or (kinds[j][g] == "local" and (j > last))
                        or (kinds[j][g] == "sliding" and i - j <= self.window)
                    ]
                    p = ((k[b, g, seen] @ q[b, h, i]) / d**0.5).softmax(0)
                    rows[b, h, i] = p @ v[b, g, seen]
        return rows

    @classmethod
    def cases(cls) -> list[Case]:
        part = Rotation(rotary_rates(3, 100.0), scale=1.3)
        return [Case(Dims(4, 8, 2), 29, {"window": 3, "rotation": part}), Case(Dims(2, 6), 23, batch=1)]

    @classmethod
    def learner(cls, dims: Dims, **params: Any) -> InLayer:
        """A layer whose types are to be learnt."""
        return cls(dims, **params)

    @classmethod
    def objective(cls, layers: Sequence[InLayer], lesson: Any) -> Tensor:
        """The squared distance of the last hidden states on what is asked, and what all layers owe for lifetimes."""
        distance: Tensor = lesson.distance()
        return distance + torch.stack([layer.charged for layer in layers if layer.charged is not None]).sum()

    @classmethod
    def chosen(cls, layers: Sequence[InLayer], **params: Any) -> list[dict[str, Any]]:
        """Parameters of every layer once trained: those that it was made with."""
        return [params] * len(layers)


class NATS(Lifetimes, Mixer):
    """Neural attention search: a head chooses for every token and key head how long it is kept.

        z_j = W_t x_j,   type_j = argmax(z_j + noise) of global, local, sliding;   the first token is global
        o_i = softmax over the j <= i with  type_j global,  or local and i <= g(j),  or sliding and i - j <= window
        g(j) = the first global at or after j, the last token where there is none

    x, y (B, N, C); z (B, N, Hkv, 3); q, k, v by projections without bias, q and k turned by rotary angles, y = W_o o.
    Types are one-hot forwards and softmax(z + noise) backwards; Gumbel noise in training alone. The mask's own gradient
    is dM_ij = p_ij dO_i . (v_j - o_i), p the softmax over all j <= i; a type takes the sum of the rows that it decides:
    global i > g(j + 1), local j <= i <= g(j), sliding i - j <= window. `regulariser` charges for lifetimes.
    Paper: arXiv 2502.13251; mask, gradient and regulariser follow the authors' code (automl/NeuralAttentionSearch).
    Deviations: that code also charges a global for the locals that it ends, and adds the regulariser once a query head
    and straight to the gradient, here it is a loss and once a key head; its evaluation has no gradient to types.
    `InLayer` learns in a pretrained model as that code does: the model is frozen, the types detached from it, the loss
    the squared distance of the last hidden states from the full model's on answers to pass keys, and the regulariser.
    window: W, the age at which a sliding token goes, so that W + 1 tokens are seen (16). lam: the regulariser's factor
    (5e-7). theta: 10000.0. detach: types learn nothing to x, as in fine-tuning (False).
    Costs the admitted pairs, sorted into tiles by lifetime; in training four passes more for the types, one over all
    pairs. To decode, one attention to the tokens alive, and nothing else is kept; the host reads how many.
    Errors: ValueError for an odd head_dim or theta <= 0.

    >>> NATS(Dims(4, 8, 2), window=4)(torch.randn(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """

    spec = Spec(
        id="nats",
        name="NAtS (Neural Attention Search)",
        title="Neural Attention Search",
        paper="2502.13251",
        year=2025,
        family="kv_cache",
        uses=("attend_lifetimes", "Pages", "attend_pages", "turn_at"),
        discrete=True,
    )
    causal = True

    def __init__(
        self, dims: Dims, *, window: int = 16, lam: float = 5e-7, theta: float = 10000.0, detach: bool = False
    ) -> None:
        super().__init__(dims)
        if dims.head_dim % 2:
            raise ValueError(f"dims: got head_dim {dims.head_dim}; pass an even one, whose halves are turned")
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        self.window, self.lam, self.theta, self.detach = positive("window", window), lam, theta, detach
        kv = dims.num_kv_heads * dims.head_dim
        self.qkv = nn.Linear(dims.dim, dims.dim + 2 * kv, bias=False)
        self.out = nn.Linear(dims.dim, dims.dim, bias=False)
        self.kind = nn.Linear(dims.dim, 3 * dims.num_kv_heads, bias=False)

    @classmethod
    @functools.cache
    def in_layer(cls) -> type[Attention]:
        """What serves in a layer of a pretrained model."""
        return type("NATSInLayer", (InLayer,), {"spec": cls.spec, "__doc__": InLayer.__doc__})

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D) of tokens from position `start` on."""
        q, k, v = self.dims.split(self.qkv(x))
        return turn_at(q, start, self.theta), turn_at(k, start, self.theta), v

    def types(self, x: Tensor, start: int = 0) -> Tensor:
        """One-hot (B, Hkv, N, 3) whose gradient is that of a softmax."""
        z = self.kind(x.detach() if self.detach else x).unflatten(2, (-1, 3)).transpose(1, 2)
        return self.typed(z, torch.arange(start, start + x.shape[1], device=x.device))

    def compute(self, x: Tensor) -> Tensor:
        types = self.types(x)
        o = self.attended(*self.heads(x), types, self.lifetimes(types))
        return self.out(o.transpose(1, 2).flatten(2))

    def regulariser(self, x: Tensor) -> Tensor:
        """lam sum_j (N - j) / N for globals, (g(j) - j) / N for locals: a loss, the less the shorter tokens live."""
        types = self.types(x)
        return self.charge(types, self.lifetimes(types)[1])

    def step(self, x: Tensor, *, state: NATSState | None = None) -> tuple[Tensor, NATSState]:
        t = 0 if state is None else state.length
        q, k, v = self.heads(x, t)
        kind = self.types(x, t).argmax(-1, keepdim=True)  # (B, Hkv, 1, 1)
        cells: tuple[Tensor, ...] = k, v, kind, torch.full_like(kind, t)
        count = torch.zeros_like(kind[..., 0, 0])
        if state is not None:  # the new token goes behind the living ones of its head
            count, place = state.count, state.count[..., None, None]
            both = zip(state.cells, cells, strict=True)
            cells = tuple(F.pad(old, (0, 0, 0, 1)).scatter(2, place.expand_as(new), new) for old, new in both)
        k, v, kinds, at = cells
        # Key heads hold unlike numbers of tokens: each is a sequence of its own, in a page of its own.
        table = torch.arange(count.numel(), dtype=torch.int32, device=x.device)[:, None]
        pages = Pages(k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None], table, (count.flatten() + 1).int())
        o = attend_pages(q.reshape(len(table), -1, 1, q.shape[3]), pages).view(len(x), 1, -1)
        alive = torch.arange(k.shape[2], device=x.device) <= count[..., None]
        dies = (kinds == LOCAL) & (kind == GLOBAL) | (kinds == SLIDING) & (t - at >= self.window)
        alive &= ~dies[..., 0]
        count = alive.sum(-1)
        order = (~alive).int().argsort(dim=-1, stable=True)[..., : int(count.max()), None]
        return self.out(o), NATSState(tuple(cell.take_along_dim(order, 2) for cell in cells), count, t + 1)

    def oracle(self, x: Tensor) -> Tensor:
        w, dims, (batch, n, _) = dict(self.named_parameters()), self.dims, x.shape
        d, kv, i = dims.head_dim, dims.num_kv_heads, torch.arange(n)
        parts = (x @ w["qkv.weight"].T).view(batch, n, -1, d).transpose(1, 2)
        z = ((x.detach() if self.detach else x) @ w["kind.weight"].T).view(batch, n, kv, 3)
        outs = []
        for h in range(dims.num_heads):
            shared, masks = h // (dims.num_heads // kv), []
            for b in range(batch):
                soft, columns = z[b, :, shared].softmax(-1), []
                names = ["global", *(("global", "local", "sliding")[a] for a in soft[1:].argmax(-1).tolist())]
                stops = [j for j, name in enumerate(names) if name == "global"]
                for j, name in enumerate(names):
                    now = next((stop for stop in stops if stop >= j), n - 1)
                    later = next((stop for stop in stops if stop > j), n - 1)
                    rows = [i > later, (i >= j) & (i <= now), (i >= j) & (i <= j + self.window)]
                    seen = {"global": i >= j, "local": rows[1], "sliding": rows[2]}[name]
                    slope = torch.stack(rows, 1).to(x.dtype) @ soft[j] * (j > 0)
                    columns.append(seen + slope - slope.detach())
                masks.append(torch.stack(columns, 1))
            mask, v = torch.stack(masks), parts[:, dims.num_heads + kv + shared]
            q, k = (rotated(parts[:, at], i, self.theta) for at in (h, dims.num_heads + shared))
            scores = q @ k.mT / d**0.5
            o = scores.masked_fill(mask.detach() < 0.5, -torch.inf).softmax(-1) @ v
            whole = scores.masked_fill(i[:, None] < i, -torch.inf).softmax(-1)
            change = ((whole.detach() * mask)[..., None] * (v[:, None] - o[:, :, None]).detach()).sum(2)
            outs.append(o + change - change.detach())
        return torch.cat(outs, -1) @ w["out.weight"].T

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 4, 2), 37, {"window": 3}),
            Case(Dims(2, 6), 29, {"window": 5, "theta": 100.0, "lam": 0.1}, batch=1),
            Case(Dims(2, 4, 1), 23, {"window": 1, "detach": True}),
        ]

    @claim(
        "Evicting after each step, but for globals, locals since the last and W ages of sliding, is the masked form."
    )
    @torch.no_grad()
    def evicts(cls) -> Finding:
        layer, x = sample(lambda: cls(Dims(4, 8, 2), window=8), 2, 120, 32)
        layer.kind.weight[::3] *= 0.1  # fewer globals
        kinds, at = layer.types(x).argmax(-1), torch.arange(120)
        state, rows, wrong, most = None, x[:, :0], 0, 0
        for i in range(120):
            row, state = layer.step(x[:, i : i + 1], state=state)
            past, rows = kinds[:, :, : i + 1], torch.cat([rows, row], 1)
            newest = torch.where(past == GLOBAL, at[: i + 1], -1).amax(-1, keepdim=True)
            fresh = torch.where(past == LOCAL, at[: i + 1] > newest, at[: i + 1] > i - layer.window)
            wrong += int((state.count != ((past == GLOBAL) | fresh).sum(-1)).sum())
            most = max(most, state.cells[0].shape[2])
        off = apart(rows, layer(x))
        holds = wrong == 0 and most < 60 and off < 120 * torch.finfo(x.dtype).eps
        return Finding(
            holds, f"largest difference {off:.1e}, {wrong} of 480 counts differ, {most} of 120 tokens at most"
        )

    @claim("All global is full attention, all sliding a window of W + 1 tokens.")
    def ends_of_the_range(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 2, 200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        off, layer = [], cls(Dims(2, 8), window=16)
        for kind, where in ((GLOBAL, Causal()), (SLIDING, Window(17))):
            last, _ = layer.lifetimes(F.one_hot(torch.full((1, 2, 200), kind), 3))
            o, _ = attend_lifetimes(q, k, v, last)
            off.append(apart(attend(q, k, v, where), o))
        figure = f"largest differences {off[0]:.1e} and {off[1]:.1e}"
        return Finding(max(off) < 200 * torch.finfo(q.dtype).eps, figure)

    @claim("The regulariser alone makes tokens live shorter, by fewer globals first.")
    def shortens(cls) -> Finding:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer, x = cls(Dims(2, 8), lam=1.0), torch.randn(4, 256, 16)
            optimiser, lives = torch.optim.Adam([layer.kind.weight], 0.01), []
            for _ in range(60):
                optimiser.zero_grad()
                layer.regulariser(x).backward()
                optimiser.step()
                last, _ = layer.lifetimes(layer.types(x))
                lives.append(float((last - torch.arange(256)).float().mean()))
        return Finding(
            lives[-1] < 0.75 * lives[0], f"a mean life of {lives[0]:.0f} queries at first, {lives[-1]:.0f} at last"
        )

    @claim("Little is computed beside what the mask admits, though lasting tokens lie scattered among the others.")
    def saves(cls) -> Finding:
        layer, random = cls(Dims(1, 8)), torch.rand(1, 1, 4096, generator=torch.Generator().manual_seed(0))
        kinds = (random > 0.02).long() + (random > 0.4)  # 2 % global, 38 % local, 60 % sliding
        last, _ = layer.lifetimes(F.one_hot(kinds, 3))
        few, whole = alive(last[..., :200].clamp(max=199))[1], alive(last)[1]
        exact = few.plan(200, block=(16, 16)).dense().equal(few.dense(200))
        plan = whole.plan(4096, block=(64, 64))
        shares = [2 * pairs / 4096**2 for pairs in (plan.num_computed, plan.num_attended)]
        return Finding(
            exact and shares[0] < 0.2, f"{shares[0]:.1%} of the causal pairs for the {shares[1]:.1%} admitted"
        )
