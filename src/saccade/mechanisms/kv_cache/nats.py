"""NAtS: every token learns how long its key and value live: for good, to the next such token, or for a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.mix import rotary_rates, turn_halves
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


class NATS(Mixer):
    """Neural attention search: a head chooses for every token and key head how long it is kept.

        z_j = W_t x_j,   type_j = argmax(z_j + noise) of global, local, sliding;   the first token is global
        o_i = softmax over the j <= i with  type_j global,  or local and i <= g(j),  or sliding and i - j <= window
        g(j) = the first global at or after j, the last token where there is none

    x, y (B, N, C); z (B, N, Hkv, 3); q, k, v by projections without bias, q and k turned by rotary angles, y = W_o o.
    Types are one-hot forwards and softmax(z + noise) backwards; Gumbel noise in training alone. The mask's own gradient
    is dM_ij = p_ij dO_i . (v_j - o_i), p the softmax over all j <= i; a type takes the sum of the rows that it decides:
    global i > g(j + 1), local j <= i <= g(j), sliding i - j <= window. `regulariser` charges for lifetimes.
    Paper: arXiv 2502.13045; mask, gradient and regulariser follow the authors' code (automl/NeuralAttentionSearch).
    Deviations: that code also charges a global for the locals that it ends, and adds the regulariser once a query head
    and straight to the gradient, here it is a loss and once a key head; its evaluation has no gradient to types.
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
        paper="2502.13045",
        year=2025,
        family="kv_cache",
        uses=("attend_lifetimes", "Pages", "attend_pages", "turn_halves"),
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

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D) of tokens from position `start` on."""
        d, at = self.dims, torch.arange(start, start + x.shape[1], device=x.device)
        heads = self.qkv(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2)
        q, k, v = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 1)
        angles = at[:, None] * rotary_rates(d.head_dim // 2, self.theta, device=x.device)
        return turn_halves(q, angles), turn_halves(k, angles), v

    def types(self, x: Tensor, start: int = 0) -> Tensor:
        """One-hot (B, Hkv, N, 3) whose gradient is that of a softmax."""
        z = self.kind(x.detach() if self.detach else x).unflatten(2, (-1, 3)).transpose(1, 2)
        if self.training:
            z = z - torch.empty_like(z).exponential_().log()
        soft = z.softmax(-1)
        hot = F.one_hot(z.argmax(-1), 3).to(soft.dtype) + (soft - soft.detach())
        first = F.one_hot(torch.full_like(hot[:, :, :1, 0], GLOBAL, dtype=torch.int64), 3).to(hot)
        return hot if start else torch.cat([first, hot[:, :, 1:]], 2)

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

    def compute(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        types = self.types(x)
        last, ends = self.lifetimes(types)
        o, _ = attend_lifetimes(q, k, v, last)
        if types.requires_grad:
            o = o + self.pull(q.detach(), k.detach(), v.detach(), o.detach(), types, ends)
        return self.out(o.transpose(1, 2).flatten(2))

    def regulariser(self, x: Tensor) -> Tensor:
        """lam sum_j (N - j) / N for globals, (g(j) - j) / N for locals: a loss, the less the shorter tokens live."""
        types, n = self.types(x), x.shape[1]
        at = torch.arange(n, device=x.device)
        whole, following, _ = self.lifetimes(types)[1]
        return self.lam * ((whole + 1 - at) * types[..., GLOBAL] + (following - at) * types[..., LOCAL]).sum() / n

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
        angles = i.double()[:, None] * self.theta ** (-2 * torch.arange(d // 2).double() / d)
        spin = torch.polar(torch.ones_like(angles), angles).to(torch.promote_types(x.dtype, torch.complex64))

        def spun(y: Tensor) -> Tensor:
            pairs = torch.complex(*y.to(spin.real.dtype).chunk(2, -1)) * spin
            return torch.cat([pairs.real, pairs.imag], -1).to(y.dtype)

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
            scores = spun(parts[:, h]) @ spun(parts[:, dims.num_heads + shared]).mT / d**0.5
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer, x = cls(Dims(4, 8, 2), window=8).double().eval(), torch.randn(2, 120, 32, dtype=torch.float64)
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
        whole = layer(x)
        apart = float((rows - whole).abs().max() / whole.abs().max())
        holds = wrong == 0 and most < 60 and apart < 120 * torch.finfo(x.dtype).eps
        return Finding(
            holds, f"largest difference {apart:.1e}, {wrong} of 480 counts differ, {most} of 120 tokens at most"
        )

    @claim("All global is full attention, all sliding a window of W + 1 tokens.")
    def ends_of_the_range(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 2, 200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        apart, layer = [], cls(Dims(2, 8), window=16)
        for kind, where in ((GLOBAL, Causal()), (SLIDING, Window(17))):
            last, _ = layer.lifetimes(F.one_hot(torch.full((1, 2, 200), kind), 3))
            o, _ = attend_lifetimes(q, k, v, last)
            apart.append(float((o - attend(q, k, v, where)).abs().max() / o.abs().max()))
        figure = f"largest differences {apart[0]:.1e} and {apart[1]:.1e}"
        return Finding(max(apart) < 200 * torch.finfo(q.dtype).eps, figure)

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
