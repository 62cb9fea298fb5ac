"""Titans: a memory that learns at test time beside attention to what is near; three ways to join the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, sample
from saccade.errors import positive
from saccade.hosts.short_conv import short_conv, short_taps
from saccade.scan import (
    FastState,
    LinearMemory,
    Memory,
    MLPMemory,
    Momentum,
    associative_scan,
    delta_rule,
    fast_weights,
    matrix_affine,
)
from saccade.where import Causal, Labels, Sinks, Window


def perceptron(head_dim: int) -> Memory:
    """W_2 gelu(W_1 x) with 4 D hidden channels."""
    return MLPMemory(head_dim, residual=False)


@dataclass(frozen=True)
class Learned:
    """What a memory keeps: the last projections, which the convolution needs, (B, conv - 1, channels); the weights."""

    recent: Tensor
    weights: FastState


@dataclass(frozen=True)
class TitansState:
    """What a decoder keeps: the memory; keys and values (B, Hkv, tokens, D) that the next token may see; for MAC also
    the tokens of the segment, the last projections of the layer's input, and the weights when the segment began.
    """

    learned: Learned | None
    keys: Tensor
    values: Tensor
    length: int = 0
    recent: Tensor | None = None
    start: tuple[Tensor, ...] = ()


class NeuralMemory(nn.Module):
    """M, written by every token and read by it: x (B, N, C) -> (B, N, C)."""

    def __init__(self, dims: Dims, memory: Memory, chunk: int, taps: int, max_theta: float) -> None:
        super().__init__()
        d, width = dims, dims.dim + 2 * dims.num_kv_heads * dims.head_dim
        self.dims, self.memory, self.chunk, self.max_theta = dims, memory, chunk, max_theta
        self.project = nn.Linear(d.dim, width, bias=False)
        self.conv = short_taps(width, taps)
        self.gates = nn.Linear(d.dim, 3 * d.num_kv_heads)
        # Begin by keeping most of the memory and of the momentum.
        nn.init.constant_(self.gates.bias[: d.num_kv_heads], -4.0)
        nn.init.constant_(self.gates.bias[d.num_kv_heads : 2 * d.num_kv_heads], 2.0)
        self.weights = nn.ParameterList(memory.init(1, d.num_kv_heads))

    def heads(self, x: Tensor, recent: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D) and the last projections."""
        y, recent = short_conv(self.project(x), self.conv, recent)
        q, k, v = self.dims.split(F.silu(y))
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, recent

    def recall(self, x: Tensor, state: Learned | None = None) -> tuple[Tensor, Learned]:
        """What each token reads after it has written, (B, H, N, D), and the memory after the last."""
        q, k, v, recent = self.heads(x, None if state is None else state.recent)
        alpha, eta, theta = self.gates(x).mT.chunk(3, 1)
        o, weights = fast_weights(
            self.memory,
            list(self.weights) if state is None else None,
            k,
            v,
            q=q,
            eta=2 * self.max_theta * theta.sigmoid(),  # the loss of the paper has no factor 1/2
            chunk=self.chunk,
            optimizer=Momentum(),
            log_decay=F.logsigmoid(-alpha),
            log_momentum=F.logsigmoid(eta),
            state=None if state is None else state.weights,
            return_state=True,
        )
        return o, Learned(recent, weights)

    def forward(self, x: Tensor, state: Learned | None = None) -> tuple[Tensor, Learned]:
        o, state = self.recall(x, state)
        return o.transpose(1, 2).flatten(2), state

    def peek(self, x: Tensor, recent: Tensor | None, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What tokens read from given weights, (B, N, C), and their last projections; nothing is written."""
        q, _, _, recent = self.heads(x, recent)
        grouped = q.unflatten(1, (self.dims.num_kv_heads, -1))
        o = self.memory([each.unsqueeze(2).to(q.dtype) for each in weights], grouped)
        return o.flatten(1, 2).transpose(1, 2).flatten(2), recent


class Variant:
    """How memory and attention are joined: x (B, N, C) and the state before -> y (B, N, C) and the state after."""

    def advance(self, layer: Titans, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        raise NotImplementedError(f"{type(self).__name__}.advance")


@dataclass(frozen=True)
class MAC(Variant):
    """Memory as a context: attention within a segment, which also sees what the memory says of its tokens.

    segment: tokens (1024).
    """

    segment: int = 1024

    def __post_init__(self) -> None:
        positive("segment", self.segment)

    def advance(self, layer: Titans, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        _, *none = layer.qkv(x[:, :0])
        state = state or TitansState(None, none[0], none[1])
        outputs = []
        while x.shape[1]:
            piece = x[:, : self.segment - state.length]
            outputs.append(self._within(layer, piece, state))
            x, state = x[:, piece.shape[1] :], outputs[-1][1]
        return torch.cat([y for y, _ in outputs], 1), state

    def _within(self, layer: Titans, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        start, keys, values, n = state.start, state.keys, state.values, x.shape[1]
        if state.length == 0:
            begun = state.learned
            start = tuple(layer.memory.weights) if begun is None else tuple(p.memory for p in begun.weights.layers)
            _, keys, values = layer.qkv(layer.persistent.expand(len(x), -1, -1))
        h, recent = layer.memory.peek(x, state.recent, start)
        q, k, v = layer.qkv(x)
        _, hk, hv = layer.qkv(h)
        at = torch.arange(1, n + 1)
        seen = Labels(torch.cat([torch.zeros(keys.shape[2], dtype=at.dtype), at, at]), left=None, queries=at)
        keys, values = torch.cat([keys, hk, k], 2), torch.cat([values, hv, v], 2)
        y = layer.join(attend(q, keys, values, seen))
        m, learned = layer.memory(y, state.learned)
        length = (state.length + n) % self.segment
        return layer.gated(y, m), TitansState(learned, keys, values, length, recent, start)


@dataclass(frozen=True)
class MAG(Variant):
    """Memory as a gate: attention in a window, and to the persistent tokens, times what the memory says.

    window: keys of a query, its own among them (2048).
    """

    window: int = 2048

    def __post_init__(self) -> None:
        positive("window", self.window)

    def advance(self, layer: Titans, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        sinks = len(layer.persistent)
        if state is None:
            p = layer.persistent.expand(len(x), -1, -1)
            state = TitansState(layer.memory(p)[1], *layer.qkv(p)[1:])
        m, learned = layer.memory(x, state.learned)
        q, k, v = layer.qkv(x)
        keys, values = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        y = layer.join(attend(q, keys, values, Causal() & (Window(self.window) | Sinks(sinks))))
        late = max(sinks, keys.shape[2] - self.window + 1)
        keys, values = (torch.cat([t[:, :, :sinks], t[:, :, late:]], 2) for t in (keys, values))
        return layer.gated(y, m), TitansState(learned, keys, values)


@dataclass(frozen=True)
class MAL(Variant):
    """Memory as a layer: attention in a window over what the memory says. window: as in `MAG` (2048)."""

    window: int = 2048

    def __post_init__(self) -> None:
        positive("window", self.window)

    def advance(self, layer: Titans, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        if state is None:
            m, learned = layer.memory(layer.persistent.expand(len(x), -1, -1))
            state = TitansState(learned, *layer.qkv(m)[1:])
        m, learned = layer.memory(x, state.learned)
        q, k, v = layer.qkv(m)
        keys, values = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        y = layer.join(attend(q, keys, values, Causal() & Window(self.window)))
        late = max(0, keys.shape[2] - self.window + 1)
        return y, TitansState(learned, keys[:, :, late:], values[:, :, late:])


class Titans(Mixer):
    """A layer of attention to what is near and a memory of all before, whose weights take a gradient step a token.

        k, v, q = silu(conv(W x)), k and q of length 1;   l_t = |M(k_t) - v_t|^2
        S_t = eta_t S_{t-1} - theta_t grad l_t,   M_t = (1 - alpha_t) M_{t-1} + S_t,   m_t = M_t(q_t)
        MAC: o_t = N(y_t) * silu(N'(m_t)),   y_t = A(x_t; P, h_s .. h_t, x_s .. x_t),   h_t = M_s(q(x_t)),   m of y
        MAG: o_t = N(y_t) * silu(N'(m_t)),   y_t = A(x_t; P, the last `window` of x),   m of [P, x]
        MAL: o_t = A(m_t; the last `window` of m),   m of [P, x]

    x, o (B, N, C); q, m (B, H, N, D), k, v (B, Hkv, N, D); alpha, eta in (0, 1) and theta in (0, max_theta) from x, one
    number a key head; P (persistent, C) learned tokens; A: softmax attention with projections of its own; N, N':
    RMSNorm; s: the first token of the segment; conv: causal, depthwise. Gradients of a chunk are taken at its start, so
    that `chunk` belongs to the model; see `fast_weights`. Paper: arXiv 2501.00663, equations 8 to 18 and 21 to 31; no
    code by the authors was found, and the equations were read in a transcription
    (aryateja2106/neural-memory-reproduction), not in the paper itself. Deviations: in MAC a query sees h up to its own
    token, and reads the memory that its own token has left, where the equations take all of a segment's h and the
    memory after the segment, which know later tokens; alpha, eta and theta are numbers a head; silu on the gate, GELU
    inside M and max_theta are choices of ours.
    variant: `MAC`, `MAG` or `MAL` (default MAG()). memory: head_dim -> `Memory` (`perceptron`). chunk: 64. persistent:
    tokens of P (32). conv: taps (4). max_theta: largest step (0.01; at 0.03 text diverges).
    Costs about 20 D^2 multiply-adds a token and key head for the steps, 8 D^2 + 10 chunk D a head for the reads, and
    those of the attention; a state of 24 D^2 numbers a key head for `perceptron`, and the keys and values in sight.
    Errors: TypeError for another variant, ValueError for max_theta <= 0.

    >>> Titans(Dims(num_heads=2, head_dim=4), variant=MAC(segment=4), persistent=2)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="titans",
        name="Titans",
        title="Titans: Learning to Memorize at Test Time",
        paper="2501.00663",
        year=2024,
        family="recurrent",
        uses=("fast_weights", "attend", "Window", "Sinks", "Labels"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        variant: Variant | None = None,
        memory: Callable[[int], Memory] = perceptron,
        chunk: int = 64,
        persistent: int = 32,
        conv: int = 4,
        max_theta: float = 0.01,
    ) -> None:
        super().__init__(dims)
        self.variant = MAG() if variant is None else variant
        if not isinstance(self.variant, Variant):
            raise TypeError(f"variant: got {variant!r}; pass MAC(), MAG() or MAL()")
        if not max_theta > 0:
            raise ValueError(f"max_theta: got {max_theta}; pass a step size > 0")
        c, width = dims.dim, dims.dim + 2 * dims.num_kv_heads * dims.head_dim
        chunk, taps = positive("chunk", chunk), positive("conv", conv)
        self.memory = NeuralMemory(dims, memory(dims.head_dim), chunk, taps, max_theta)
        self.persistent = nn.Parameter(0.02 * torch.randn(positive("persistent", persistent), c))
        self.project, self.out = nn.Linear(c, width, bias=False), nn.Linear(c, c, bias=False)
        self.norm_near, self.norm_memory = nn.RMSNorm(c, eps=1e-6), nn.RMSNorm(c, eps=1e-6)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the attention: q (B, H, N, D), k, v (B, Hkv, N, D)."""
        return self.dims.split(self.project(x))

    def join(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def gated(self, near: Tensor, memory: Tensor) -> Tensor:
        return self.norm_near(near) * F.silu(self.norm_memory(memory))

    def compute(self, x: Tensor) -> Tensor:
        return self.variant.advance(self, x, None)[0]

    def step(self, x: Tensor, *, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        return self.variant.advance(self, x, state)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        group, taps, chunk = d.num_heads // d.num_kv_heads, w["memory.conv"].shape[-1], self.memory.chunk
        names = sorted(name for name in w if name.startswith("memory.weights."))
        now = [w[name].expand(len(x), -1, -1, -1) for name in names]
        start, speed, written = now, [torch.zeros_like(z) for z in now], 0
        p = [token.expand(len(x), -1) for token in w["persistent"]]

        def sigmoid(z: Tensor) -> Tensor:
            return 1 / (1 + torch.exp(-z))

        def rms(z: Tensor, name: str) -> Tensor:
            return z / ((z * z).mean(-1, keepdim=True) + 1e-6) ** 0.5 * w[f"{name}.weight"]

        def network(weights: list[Tensor], z: Tensor) -> Tensor:
            for i, matrix in enumerate(weights):
                z = z * (1 + torch.erf(z / 2**0.5)) / 2 if i else z
                z = (z[..., None, :] @ matrix).squeeze(-2)
            return z

        def loss(weights: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
            return (network(weights, k) - v).square().sum()  # each sequence and head has weights of its own

        def heads(token: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
            past.append(token @ w["memory.project.weight"].T)
            seen = [(taps - 1 - back, past[-1 - back]) for back in range(min(taps, len(past)))]
            mixed = sum((w["memory.conv"][:, 0, j] * y for j, y in seen), torch.zeros(()).to(x))
            mixed = (mixed * sigmoid(mixed)).view(len(x), -1, d.head_dim)
            q, k, v = mixed.split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 1)
            return *(z / ((z * z).sum(-1, keepdim=True) ** 0.5) for z in (q, k)), v

        def read(weights: list[Tensor], q: Tensor) -> Tensor:
            return network([z.repeat_interleave(group, 1) for z in weights], q).flatten(1)

        def learn(token: Tensor, past: list[Tensor]) -> Tensor:
            nonlocal now, start, speed, written
            q, k, v = heads(token, past)
            gates = sigmoid(token @ w["memory.gates.weight"].T + w["memory.gates.bias"])
            alpha, eta, theta = (z[..., None, None] for z in gates.split(d.num_kv_heads, -1))
            start = now if written % chunk == 0 else start
            steps = torch.func.grad(loss)(start, k, v)
            speed = [eta * s - self.memory.max_theta * theta * g for s, g in zip(speed, steps, strict=True)]
            now, written = [(1 - alpha) * z + s for z, s in zip(now, speed, strict=True)], written + 1
            return read(now, q)

        def near(token: Tensor, seen: list[Tensor]) -> Tensor:
            q = (token @ w["project.weight"].T).split(d.head_dim, -1)
            others = (torch.stack(seen, 1) @ w["project.weight"].T).split(d.head_dim, -1)
            found = []
            for h in range(d.num_heads):
                k = others[d.num_heads + h // group]
                weights = ((k * q[h][:, None]).sum(-1) / d.head_dim**0.5).softmax(-1)
                found.append((weights[..., None] * others[d.num_heads + d.num_kv_heads + h // group]).sum(1))
            return torch.cat(found, -1) @ w["out.weight"].T

        def gated(y: Tensor, m: Tensor) -> Tensor:
            m = rms(m, "norm_memory")
            return rms(y, "norm_near") * m * sigmoid(m)

        tokens, anchor = list(x.unbind(1)), now
        past: list[Tensor] = []
        entered: list[Tensor] = []
        seen: list[Tensor] = []
        if isinstance(self.variant, MAC):
            for t, token in enumerate(tokens):
                if t % self.variant.segment == 0:
                    seen, anchor = list(p), now
                seen = [*seen, read(anchor, heads(token, entered)[0]), token]
                y = near(token, seen)
                rows.append(gated(y, learn(y, past)))
            return torch.stack(rows, 1)
        window, said = self.variant.window, [learn(token, past) for token in [*p, *tokens]]  # type: ignore[attr-defined]
        for t, token in enumerate(tokens):
            if isinstance(self.variant, MAG):
                y = near(token, [*p, *tokens[max(0, t + 1 - window) : t + 1]])
                rows.append(gated(y, said[len(p) + t]))
            else:
                last = len(p) + t
                rows.append(near(said[last], said[max(0, last + 1 - window) : last + 1]))
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 7), 13, {"variant": MAC(5), "chunk": 4, "persistent": 3, "max_theta": 0.05}),
            Case(Dims(4, 6, num_kv_heads=2), 13, {"variant": MAG(5), "chunk": 6, "persistent": 2, "conv": 2}, batch=1),
            Case(Dims(1, 4), 7, {"variant": MAL(3), "memory": LinearMemory, "persistent": 1, "conv": 1}, batch=1),
            Case(Dims(1, 5), 11, {"variant": MAG(3), "memory": LinearMemory, "chunk": 1}, batch=1),
        ]

    @claim("A matrix without momentum and decay, chunk 1 and steps of beta / 2, is the delta rule.")
    def is_delta_rule(cls) -> Finding:
        memory, x = cls._sample(memory=LinearMemory, chunk=1, max_theta=0.5)
        memory.weights[0].zero_()
        memory.gates.bias[:4].fill_(-torch.inf)
        q, k, v, _ = memory.heads(x, None)
        exact = cast(Tensor, delta_rule(q, k, v, memory.gates(x).mT[:, 4:].sigmoid()))
        return cls._near(memory.recall(x)[0], exact)

    @claim("With a matrix, momentum and memory are one linear recurrence of 2 x 2 blocks inside a chunk.")
    def is_scan(cls) -> Finding:
        memory, x = cls._sample(memory=LinearMemory, chunk=40)
        memory.weights[0].copy_(torch.randn(1, 2, 8, 8))
        q, k, v, _ = memory.heads(x, None)
        alpha, eta, theta = memory.gates(x).mT.sigmoid().chunk(3, 1)
        wrong = k @ memory.weights[0] - v
        push = -2 * memory.max_theta * theta[..., None, None] * k[..., :, None] * wrong[..., None, :]
        blocks = torch.stack([torch.stack([eta, 0 * eta], -1), torch.stack([eta, 1 - alpha], -1)], -2)
        begin = torch.stack([torch.zeros(1, 2, 1, 64).to(x), memory.weights[0].flatten(2)[:, :, None]], -2)
        eye = torch.eye(2, dtype=x.dtype).expand(1, 2, 1, 2, 2)
        pushes = push.flatten(-2)[..., None, :].expand(-1, -1, -1, 2, -1)
        _, h = associative_scan(matrix_affine, (blocks, pushes), dim=2, initial=(eye, begin))
        exact = (q[..., None, :] @ h[..., 1, :].unflatten(-1, (8, 8))).squeeze(-2)
        return cls._near(memory.recall(x)[0], exact)

    @claim("With a chunk of 1 the memory takes the paper's steps one by one; a longer chunk is another model.")
    def chunk_is_model(cls) -> Finding:
        outputs = []
        for chunk in (1, 8):
            memory, x = cls._sample(chunk=chunk)
            outputs.append(memory.recall(x)[0])
        q, k, v, _ = memory.heads(x, None)
        alpha, eta, theta = memory.gates(x).mT.sigmoid().chunk(3, 1)
        weights, rows = [w.clone() for w in memory.weights], []
        speed = [torch.zeros_like(w) for w in weights]
        for t in range(x.shape[1]):
            with torch.enable_grad():
                leaves = [w.detach().requires_grad_() for w in weights]
                loss = (memory.memory(leaves, k[:, :, t : t + 1]) - v[:, :, t : t + 1]).square().sum()
                steps = torch.autograd.grad(loss, leaves)
            a, e, s = (z[:, :, t, None, None] for z in (alpha, eta, memory.max_theta * theta))
            speed = [e * m - s * g for m, g in zip(speed, steps, strict=True)]
            weights = [(1 - a) * w + m for w, m in zip(weights, speed, strict=True)]
            rows.append(memory.memory(weights, q[:, :, t : t + 1]))
        near, far = cls._near(outputs[0], torch.cat(rows, 2)), cls._near(outputs[1], torch.cat(rows, 2))
        return Finding(near.holds and not far.holds, f"chunk 1: {near.figure}; chunk 8: {far.figure}")

    @claim("What a decoder keeps does not grow beyond the window, or the segment, in any variant.")
    def constant_state(cls) -> Finding:
        figures, holds = [], True
        for variant in (MAC(4), MAG(4), MAL(4)):
            layer = cls(Dims(2, 8), variant=variant, persistent=2, chunk=4).requires_grad_(False)
            states = [layer.variant.advance(layer, torch.randn(1, n, 16), None)[1] for n in (8, 40)]
            sizes = []
            for state in states:
                assert state.learned is not None
                parts = [w for each in state.learned.weights.layers for w in (each.memory, each.velocity)]
                sizes.append(sum(w.numel() for w in parts if w is not None) + state.keys.numel() * 2)
            holds = holds and sizes[0] == sizes[1]
            figures.append(f"{sizes[0]} and {sizes[1]} for {type(variant).__name__}")
        return Finding(holds, f"numbers after 8 tokens and after 40: {', '.join(figures)}")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[NeuralMemory, Tensor]:
        """The memory of a layer, and x (1, 40, 16)."""
        return sample(lambda: cls(Dims(2, 8), **params).memory, 1, 40, 16)

    @staticmethod
    def _near(found: Tensor, exact: Tensor) -> Finding:
        off = apart(found, exact)
        return Finding(off < 40 * torch.finfo(found.dtype).eps, f"largest difference {off:.1e} of the output")
