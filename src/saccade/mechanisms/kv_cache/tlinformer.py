"""TLinFormer: the history passes through a few of its own last tokens, and generated tokens read what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import known, positive
from saccade.hosts.block import init_linear, num_parameters
from saccade.hosts.stack import Stack, SwiGLU
from saccade.mix import rotary_rates, turn_halves
from saccade.where import Causal

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TLinState:
    """What a decoder keeps: the inputs so far (B, T, C), which the next window's history is made of; for each layer
    keys and values of the history (B, Hkv, T or history_window, D), or None, and of the window (B, Hkv, < window, D).
    """

    tokens: Tensor
    memory: list[KeysValues | None]
    near: list[KeysValues] | None


class Layer(nn.Module):
    """Projections, norms and feed-forward that both streams of a layer share."""

    def __init__(self, dims: Dims, hidden: int, theta: float) -> None:
        super().__init__()
        self.dims, self.theta = dims, theta
        self.norm_attend, self.norm_feed = nn.LayerNorm(dims.dim), nn.LayerNorm(dims.dim)
        self.qkv = nn.Linear(dims.dim, dims.dim + 2 * dims.num_kv_heads * dims.head_dim)
        self.out, self.feed = nn.Linear(dims.dim, dims.dim), SwiGLU(dims.dim, hidden)

    def heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D) of tokens from position `start` on."""
        d, at = self.dims, torch.arange(start, start + x.shape[1], device=x.device)
        q, k, v = d.split(self.qkv(self.norm_attend(x)))
        angles = at[:, None] * rotary_rates(d.head_dim // 2, self.theta, device=x.device)
        return turn_halves(q, angles), turn_halves(k, angles), v

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """x (B, N, C) with what was attended, o (B, H, N, D), and the feed-forward added."""
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm_feed(x))


class TLinFormer(Mixer):
    """All layers of the model, norms and residuals included, on tokens that come in windows of `window`.

        history c (B, L, C), all windows before the present one; z (B, W, C), W = min(history_window, L);
        generated tokens x (B, n, C); A(a; b) = softmax(q(a) k(b)^T / sqrt(D)) v(b), + for residual and feed-forward
        compress layer:  z = c[-W:] + A(c[-W:]; c),  x + A_causal(x; x) + A(x; c)
        hidden layers:   z + A(z; z),                x + A_causal(x; x) + A(x; z)
        restore layer:   c + A(c; z),                x + A_causal(x; x) + A(x; z),   q(c) that of the compress layer

    x (B, N, C) -> y (B, N, C); a block is a compress layer, depth - 2 hidden ones and a restore layer; its restored
    history is that of the next block. q and k of LN(.) are turned by absolute positions; all weights of a layer serve
    both streams. The history is not causal in itself, and encoded anew for every window; the first window has none.
    Paper: arXiv 2508.20407 (`cross` False: TConstFormer, 2509.00202); layers, windows and sizes as in the authors'
    code. Deviations: no dropout; the last restore layer leaves the history alone, which nothing reads.
    history_window: W (256); None for 12 ln L, 8.33 ln L without `cross`, rounded up to a multiple of 8. window: tokens
    generated before the history grows (256). blocks: 2. depth: layers a block (4). hidden: channels of the feed-forward
    (8 C / 3, rounded up to a multiple of 256). theta: 10000.0. cross: A(x; c) in compress layers (True).
    Costs L D a generated token and compress layer, (W + window) D elsewhere, and L W D a block for a new window.
    Errors: ValueError for depth < 2, an odd head_dim or theta <= 0.

    >>> TLinFormer(Dims(2, 4), history_window=3, window=5, hidden=16)(torch.randn(1, 17, 8)).shape
    torch.Size([1, 17, 8])
    """

    spec = Spec(
        id="tlinformer",
        name="TLinFormer",
        title="Rethinking Transformer Connectivity: TLinFormer, A Path to Exact, Full Context-Aware Linear Attention",
        paper="2508.20407",
        year=2025,
        family="kv_cache",
        uses=("attend", "Causal", "turn_halves"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        history_window: int | None = 256,
        window: int = 256,
        blocks: int = 2,
        depth: int = 4,
        hidden: int | None = None,
        theta: float = 10000.0,
        cross: bool = True,
    ) -> None:
        super().__init__(dims)
        if dims.head_dim % 2:
            raise ValueError(
                f"dims: got head_dim {dims.head_dim}; pass an even one, of which positions turn the halves"
            )
        if not theta > 0:
            raise ValueError(f"theta: got {theta}; pass a number > 0")
        self.history_window = None if history_window is None else positive("history_window", history_window)
        self.window, self.cross, self.depth = positive("window", window), cross, positive("depth", depth, least=2)
        width = -(-int(8 * dims.dim / 3) // 256) * 256 if hidden is None else positive("hidden", hidden)
        self.theta = theta
        self.layers = nn.ModuleList(Layer(dims, width, theta) for _ in range(positive("blocks", blocks) * depth))

    def observed(self, length: int) -> int:
        """How many of the last tokens of a history stand for it."""
        if self.history_window is not None:
            return min(length, self.history_window)
        return min(length, max(8, int((12 if self.cross else 8.33) * math.log(length) + 7) // 8 * 8))

    def encode(self, c: Tensor) -> list[KeysValues | None]:
        """What generated tokens read of a history (B, L, C): keys and values for each layer."""
        length, layers = c.shape[1], cast(list[Layer], list(self.layers))
        if not length:
            return [None] * len(layers)
        memory, width = [], self.observed(length)
        for first in range(0, len(layers), self.depth):
            compress, *inner, restore = layers[first : first + self.depth]
            asks, k, v = compress.heads(c, 0)
            memory.append((k, v) if self.cross else None)
            z = compress.finish(c[:, -width:], attend(asks[:, :, -width:], k, v))
            for layer in inner:
                q, k, v = layer.heads(z, length - width)
                memory.append((k, v))
                z = layer.finish(z, attend(q, k, v))
            _, k, v = restore.heads(z, length - width)
            memory.append((k, v))
            if len(memory) < len(layers):
                c = restore.finish(c, attend(asks, k, v))
        return memory

    def generate(
        self, x: Tensor, start: int, memory: list[KeysValues | None], near: list[KeysValues] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """y of tokens of one window from position `start` on, and the keys and values of that window so far."""
        after = []
        for index, layer in enumerate(cast(list[Layer], list(self.layers))):
            q, k, v = layer.heads(x, start)
            if near is not None:
                k, v = torch.cat([near[index][0], k], 2), torch.cat([near[index][1], v], 2)
            after.append((k, v))
            o, far = attend(q, k, v, Causal()), memory[index]
            x = layer.finish(x, o if far is None else o + attend(q, *far))
        return x, after

    def compute(self, x: Tensor) -> Tensor:
        starts = range(0, x.shape[1], self.window)
        return torch.cat([self.generate(x[:, t : t + self.window], t, self.encode(x[:, :t]))[0] for t in starts], 1)

    def step(self, x: Tensor, *, state: TLinState | None = None) -> tuple[Tensor, TLinState]:
        before = x[:, :0] if state is None else state.tokens
        t = before.shape[1]
        if state is None or t % self.window == 0:
            state = TLinState(before, self.encode(before), None)
        y, near = self.generate(x, t, state.memory, state.near)
        return y, TLinState(torch.cat([before, x], 1), state.memory, near)

    def oracle(self, x: Tensor) -> Tensor:
        w, dims, d = dict(self.named_parameters()), self.dims, self.dims.head_dim
        own, count, out = torch.arange(dims.num_heads) // (dims.num_heads // dims.num_kv_heads), len(self.layers), []
        angles = torch.arange(x.shape[1]).double()[:, None] * self.theta ** (-2 * torch.arange(d // 2).double() / d)
        spin = torch.polar(torch.ones_like(angles), angles).to(torch.promote_types(x.dtype, torch.complex64))[:, None]

        def linear(t: Tensor, name: str) -> Tensor:
            return t @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

        def norm(t: Tensor, name: str) -> Tensor:
            apart = t - t.mean(-1, keepdim=True)
            return (
                apart / (apart.square().mean(-1, keepdim=True) + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]
            )

        def project(t: Tensor, start: int, index: int) -> list[Tensor]:
            heads = linear(norm(t, f"layers.{index}.norm_attend"), f"layers.{index}.qkv").view(*t.shape[:2], -1, d)
            q, k, v = heads.split([dims.num_heads, dims.num_kv_heads, dims.num_kv_heads], 2)
            found = [
                torch.complex(*y.to(spin.real.dtype).chunk(2, -1)) * spin[start : start + t.shape[1]] for y in (q, k)
            ]
            q, k = (torch.cat([y.real, y.imag], -1).to(t.dtype) for y in found)
            return [q, k[:, :, own], v[:, :, own]]

        def weighed(q: Tensor, k: Tensor, v: Tensor, ahead: float = 0.0) -> Tensor:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
            scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1) * ahead != 0, -torch.inf)
            return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)

        def after(t: Tensor, o: Tensor, index: int) -> Tensor:
            t = t + linear(o, f"layers.{index}.out")
            gate, value = linear(norm(t, f"layers.{index}.norm_feed"), f"layers.{index}.feed.enter").chunk(2, -1)
            return t + linear(gate / (1 + torch.exp(-gate)) * value, f"layers.{index}.feed.leave")

        for start in range(0, x.shape[1], self.window):
            c, y = x[:, :start], x[:, start : start + self.window]
            last = self.history_window or max(
                8, int((12 if self.cross else 8.33) * math.log(max(1, start)) + 7) // 8 * 8
            )
            first = max(0, start - last)
            z = ask = c[:, first:]
            for index in range(count):
                place, (q, k, v) = index % self.depth, project(y, start, index)
                o = weighed(q, k, v, ahead=1.0)
                if start:
                    theirs, k, v = project(z if place else c, first if place else 0, index)
                    ask = ask if place else theirs
                    o = o + weighed(q, k, v) if place or self.cross else o
                    if place == self.depth - 1:
                        c = after(c, weighed(ask, k, v), index)
                    elif place:
                        z = after(z, weighed(theirs, k, v), index)
                    else:
                        z = after(c[:, first:], weighed(ask[:, first:], k, v), index)
                y = after(y, o, index)
            out.append(y)
        return torch.cat(out, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4), 23, {"history_window": 5, "window": 7, "depth": 3, "hidden": 5}),
            Case(Dims(4, 2, 2), 19, {"history_window": 3, "window": 4, "cross": False, "hidden": 3, "theta": 30.0}),
            Case(Dims(2, 4), 41, {"history_window": None, "window": 38, "blocks": 3, "depth": 2, "hidden": 4}, batch=1),
        ]

    @classmethod
    def model(cls, name: str = "41m", *, params: Mapping[str, Any] | None = None, **host: Any) -> Stack:
        """The paper's language models: "41m", TLinFormer, and "41m-const", TConstFormer (41 million parameters each).

        Tokens are those of GPT-2, scores use the embedding's weights.
        """
        known("name", name, ("41m", "41m-const"))

        def body(dims: Dims, layer: int) -> TLinFormer:
            return cls(dims, **{"cross": name == "41m", **(params or {})})

        dims = host.pop("dims", Dims(12, 36))
        paper = {"vocab_size": 50257, "norm": nn.LayerNorm, "block": lambda dims, mixer: mixer}
        model = Stack(dims, [body], **{**paper, **host})
        init_linear(model)
        return model

    @claim("The published models have 41 million parameters.")
    def published_size(cls) -> Finding:
        found = [num_parameters(partial(cls.model, name)) / 1e6 for name in ("41m", "41m-const")]
        figure = f"{found[0]:.2f} and {found[1]:.2f} million"
        return Finding(all(abs(size - 41) < 0.02 * 41 for size in found), figure)

    @claim("A token reads all of the history in one layer a block, which alone keep it, without `cross` in none.")
    def reads(cls) -> Finding:
        sizes = []
        for cross in (True, False):
            layer, x = cls._sample(cross)
            state: TLinState | None = None
            for token in x.split(1, 1):
                _, state = layer.step(token, state=state)
                sizes.append([0 if far is None else far[0].shape[2] for far in state.memory])
        holds = sizes[-1] == 2 * [0, 8, 8, 8] and sizes[79] == 2 * [64, 8, 8, 8]
        return Finding(holds, f"of 64 tokens, layer by layer, {sizes[79]}, or {sizes[-1]}")

    @claim("Every output has a gradient to every token of the history, and to none ahead of it.")
    def aware(cls) -> Finding:
        least, ahead = [], 0.0
        for cross in (True, False):
            layer, x = cls._sample(cross)
            x.requires_grad_()
            for t in (40, 60, 78):
                (grad,) = torch.autograd.grad(layer(x)[0, t].square().sum(), x)
                reach = grad[0].abs().sum(-1)
                least.append(float(reach[: t + 1].min() / reach.max()))
                ahead = max(ahead, float(reach[t + 1 :].sum()))
        figure = f"the least gradient is {min(least):.1e} of the largest; ahead {ahead:g}"
        return Finding(min(least) > 0 and ahead == 0, figure)

    @classmethod
    def _sample(cls, cross: bool) -> tuple[TLinFormer, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = cls(Dims(2, 8), history_window=8, window=16, hidden=16, cross=cross).double()
            return layer, torch.randn(1, 80, 16, dtype=torch.float64)
