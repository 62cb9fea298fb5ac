"""A language model's block without attention: convolutions in chunks, a recurrence and a memory of chunk summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, sample
from saccade.errors import positive
from saccade.scan import long_conv


@dataclass(frozen=True)
class ChunkState:
    """What a decoder keeps: tokens of the open chunk (B, < chunk, C), g (B, C), the memory's rows (B, rows, C), and how
    many chunks have been stored in it.
    """

    open: Tensor
    g: Tensor
    rows: Tensor
    stored: int = 0


class StateSpace(nn.Module):
    """A causal convolution with the response of a diagonal state space, one a channel: x (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        half = state // 2
        self.log_decay = nn.Parameter(torch.full((dim, half), 0.5).log())
        self.turn = nn.Parameter(math.pi * torch.arange(half, dtype=torch.get_default_dtype()).repeat(dim, 1))
        self.log_step = nn.Parameter(torch.empty(dim, 1).uniform_(math.log(0.001), math.log(0.1)))
        self.read = nn.Parameter(torch.randn(dim, half, 2) * half**-0.5)
        self.skip = nn.Parameter(torch.ones(dim))

    def system(self) -> tuple[Tensor, Tensor]:
        """Log of the decay a token, and what a unit input adds to the output, (C, state / 2) complex."""
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        rate = torch.complex(-self.log_decay.to(wide).exp(), self.turn.to(wide))
        moved = rate * self.log_step.to(wide).exp()
        return moved, torch.view_as_complex(self.read.to(wide)) * torch.expm1(moved) / rate

    def forward(self, x: Tensor) -> Tensor:
        moved, gain = self.system()
        ago = torch.arange(x.shape[1], device=x.device)
        kernel = 2 * (gain[..., None] * (moved[..., None] * ago).exp()).sum(1).real
        return long_conv(x.mT, kernel.to(x.dtype), skip=self.skip).mT


class NonAttentionLLM(Mixer):
    """Tokens are mixed inside a chunk by convolutions; chunks know of earlier ones by a state and a memory.

        in a chunk:   u = x + W gelu(S4(x)) + w,   h = u + sum_d gelu(conv_d(u))
        y_t = h_t + W_g g_{c-1}                                                       c: the chunk of t
        at its end:   r = mean(h),   m = mean of the `top` memory rows nearest to r,   r <- tanh(W_r [r; m] + w_r)
                      g_c = GRU(r, g_{c-1}),   then r takes the place of the oldest row

    x, u, h, y (B, N, C); g, r, m (B, C); memory (B, rows, C), zeros at first; S4: convolution with
    K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(l dt A_n), and D; conv_d: dense, causal, dilation d; both begin
    anew with every chunk. Nearest in Euclidean distance; what is stored passes no gradient.
    Paper: arXiv 2506.01963, of which the abstract was read; the block follows the author's demonstration.
    Deviations: there, S4 is a short convolution and all convolutions are centred, so that tokens see later ones, and g
    and m never reach the output, so that chunks share nothing: here S4 is one, with the start of S4D-Lin, all are
    causal, and W_g g is added. The memory belongs to the sequence, where the demonstration has one for all. No dropout.
    chunk: 64, part of the model. state: 2 n of S4 (64). kernel: taps of conv_d (3). dilations: (1, 2, 4). rows: of the
    memory (512). top: rows averaged (1).
    Costs C log(chunk) for S4 and C^2 kernel a dilation and token, rows C for the search of a chunk; decoding computes
    the open chunk anew for every token. A state of (chunk + rows + 1) C numbers at most.
    Errors: ValueError for an odd state, top above rows, no dilation.

    >>> NonAttentionLLM(Dims(2, 4), chunk=4, rows=3)(torch.randn(1, 10, 8)).shape
    torch.Size([1, 10, 8])
    """

    spec = Spec(
        id="non_attention_llm",
        name="Non-attention LLM (Breaking Quadratic Barriers)",
        title="Breaking Quadratic Barriers: A Non-Attention LLM for Ultra-Long Context Horizons",
        paper="2506.01963",
        year=2025,
        family="recurrent",
        uses=("long_conv",),
        discrete=True,
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        chunk: int = 64,
        state: int = 64,
        kernel: int = 3,
        dilations: Sequence[int] = (1, 2, 4),
        rows: int = 512,
        top: int = 1,
    ) -> None:
        super().__init__(dims)
        c = dims.dim
        if positive("state", state) % 2:
            raise ValueError(f"state: got {state}; pass an even number")
        if positive("top", top) > positive("rows", rows):
            raise ValueError(f"top: got {top} of {rows} rows; pass no more than there are")
        if not dilations:
            raise ValueError("dilations: got none; pass at least one")
        self.chunk, self.rows, self.top = positive("chunk", chunk), rows, top
        self.dilations, self.taps = [positive("dilations", d) for d in dilations], positive("kernel", kernel)
        self.s4, self.point = StateSpace(c, state), nn.Linear(c, c)
        self.convs = nn.ModuleList(nn.Conv1d(c, c, kernel, dilation=d) for d in self.dilations)
        self.fuse, self.cell = nn.Linear(2 * c, c), nn.GRUCell(c, c)
        self.start, self.send = nn.Parameter(torch.zeros(c)), nn.Linear(c, c, bias=False)

    def begin(self, x: Tensor) -> ChunkState:
        batch, c = len(x), self.dims.dim
        return ChunkState(x[:, :0], self.start.expand(batch, -1), x.new_zeros(batch, self.rows, c))

    def local(self, x: Tensor) -> Tensor:
        """h of chunks (B, n, C) that know nothing of one another."""
        u = x + self.point(F.gelu(self.s4(x)))
        h = u.mT
        for conv, dilation in zip(self.convs, self.dilations, strict=True):
            h = h + F.gelu(conv(F.pad(u.mT, (dilation * (self.taps - 1), 0))))
        return h.mT

    def close(self, h: Tensor, state: ChunkState) -> ChunkState:
        """The state after a whole chunk (B, chunk, C)."""
        r = h.mean(1)
        near = (r.detach()[:, None] - state.rows).square().sum(-1).topk(self.top, 1, largest=False).indices
        m = state.rows.gather(1, near[..., None].expand(-1, -1, r.shape[1])).mean(1)
        r = self.fuse(torch.cat([r, m], -1)).tanh()
        at = torch.full((1,), state.stored % self.rows, device=r.device)
        rows = state.rows.index_copy(1, at, r.detach()[:, None])
        return ChunkState(h[:, :0], self.cell(r, state.g), rows, state.stored + 1)

    def compute(self, x: Tensor) -> Tensor:
        whole = x.shape[1] // self.chunk * self.chunk
        state, sent, parts = self.begin(x), [], []
        if whole:
            h = self.local(x[:, :whole].reshape(-1, self.chunk, x.shape[2])).unflatten(0, (len(x), -1))
            for each in h.unbind(1):
                sent.append(state.g)
                state = self.close(each, state)
            parts.append((h + self.send(torch.stack(sent, 1))[:, :, None]).flatten(1, 2))
        if whole < x.shape[1]:
            parts.append(self.local(x[:, whole:]) + self.send(state.g)[:, None])
        return torch.cat(parts, 1)

    def step(self, x: Tensor, *, state: ChunkState | None = None) -> tuple[Tensor, ChunkState]:
        state = self.begin(x) if state is None else state
        tokens = torch.cat([state.open, x], 1)
        h = self.local(tokens)
        y = h[:, -1:] + self.send(state.g)[:, None]
        if tokens.shape[1] == self.chunk:
            return y, self.close(h, state)
        return y, ChunkState(tokens, state.g, state.rows, state.stored)

    def oracle(self, x: Tensor) -> Tensor:
        w, (batch, n, c) = dict(self.named_parameters()), x.shape
        wide = torch.promote_types(x.dtype, torch.float32)

        def gelu(t: Tensor) -> Tensor:
            return t * (1 + torch.erf(t / 2**0.5)) / 2

        def sigmoid(t: Tensor) -> Tensor:
            return 1 / (1 + torch.exp(-t))

        rate = torch.complex(-torch.exp(w["s4.log_decay"].to(wide)), w["s4.turn"].to(wide))
        step = torch.exp(w["s4.log_step"].to(wide))
        decay = torch.exp(step * rate)
        gain = torch.complex(*w["s4.read"].to(wide).unbind(-1)) * (decay - 1) / rate
        g, memory, out = w["start"].expand(batch, -1), [torch.zeros(batch, c).to(x)] * self.rows, []
        for first in range(0, n, self.chunk):
            tokens = x[:, first : first + self.chunk]
            hidden, mixed = torch.zeros(()).to(gain), []
            for token in tokens.unbind(1):
                hidden = decay * hidden + token[..., None]
                y = 2 * (gain * hidden).sum(-1).real.to(x) + w["s4.skip"] * token
                mixed.append(token + gelu(y) @ w["point.weight"].T + w["point.bias"])
            h = []
            for t, u in enumerate(mixed):
                total = u
                for i, d in enumerate(self.dilations):
                    kernel = w[f"convs.{i}.weight"]
                    taps = kernel.shape[2]
                    found = w[f"convs.{i}.bias"].expand(batch, -1)
                    for tap in range(taps):
                        at = t - d * (taps - 1 - tap)
                        if at >= 0:
                            found = found + mixed[at] @ kernel[:, :, tap].T
                    total = total + gelu(found)
                h.append(total)
            out += [each + g @ w["send.weight"].T for each in h]
            if len(h) < self.chunk:
                break
            r = sum(h[1:], h[0]) / self.chunk
            held = torch.stack(memory, 1)
            order = torch.argsort(torch.linalg.vector_norm(held - r.detach()[:, None], dim=-1), dim=1, stable=True)
            m = torch.stack([held[b, order[b, : self.top]].mean(0) for b in range(batch)])
            r = torch.tanh(torch.cat([r, m], -1) @ w["fuse.weight"].T + w["fuse.bias"])
            memory[first // self.chunk % self.rows] = r.detach()
            given = (r @ w["cell.weight_ih"].T + w["cell.bias_ih"]).split(c, -1)
            kept = (g @ w["cell.weight_hh"].T + w["cell.bias_hh"]).split(c, -1)
            reset, keep = sigmoid(given[0] + kept[0]), sigmoid(given[1] + kept[1])
            g = (1 - keep) * torch.tanh(given[2] + reset * kept[2]) + keep * g
        return torch.stack(out, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        small = {"chunk": 5, "state": 4, "rows": 3, "top": 2}
        return [
            Case(Dims(2, 3), 27, {**small, "kernel": 2, "dilations": (1, 3)}),
            Case(Dims(1, 4), 13, {**small, "top": 1, "rows": 2, "chunk": 3}, batch=1),
            Case(Dims(1, 3), 7, batch=1),
        ]

    @claim("The convolution by FFT is the state space's recurrence, token by token.")
    def fft_is_recurrence(cls) -> Finding:
        layer, x = cls._sample(chunk=300)
        moved, gain = layer.s4.system()
        hidden, rows = torch.zeros_like(gain), []
        for token in x[0]:
            hidden = moved.exp() * hidden + token[:, None]
            rows.append(2 * (gain * hidden).sum(-1).real + layer.s4.skip * token)
        exact = torch.stack(rows)
        off = apart(layer.s4(x)[0], exact)
        return Finding(off < x.shape[1] * torch.finfo(x.dtype).eps, f"largest difference {off:.1e} of the output")

    @claim("A chunk knows of earlier ones by g alone: without W_g chunks are independent, bit for bit.")
    def only_by_g(cls) -> Finding:
        layer, x = cls._sample(chunk=20)
        other = torch.cat([-x[:, :20], x[:, 20:]], 1)
        moved = (layer(other) - layer(x)).abs()[:, 20:].unflatten(1, (-1, 20)).amax((0, 2, 3))
        layer.send.weight.zero_()
        same = torch.equal(layer(other)[:, 20:], layer(x)[:, 20:])
        figure = f"another first chunk moves the second by {float(moved[0]):.1e} and the last by {float(moved[-1]):.1e}"
        return Finding(same and bool(moved.min() > 0), f"{figure}; without W_g {'none' if same else 'some'}")

    @claim("The memory carries what g alone has lost: another old chunk is retrieved, and g changes.")
    def retrieves(cls) -> Finding:
        layer, x = cls._sample(chunk=20)
        h = layer.local(x.view(15, 20, -1))
        state = layer.begin(x)
        for each in h[:14]:
            state = layer.close(each[None], state)
        # Two memories that differ in one row far back, the one the last summary is nearest to, and have the same g.
        near = int((h[14].mean(0) - state.rows[0]).square().sum(-1).argmin())
        rows = state.rows.clone()
        rows[0, near] += 0.01 * torch.ones_like(rows[0, near])
        after = [layer.close(h[14:15], ChunkState(state.open, state.g, m, 14)).g for m in (state.rows, rows)]
        moved = float((after[0] - after[1]).abs().max())
        return Finding(moved > torch.finfo(x.dtype).eps ** 0.5, f"row {near} of 8 moved by 0.01 moves g by {moved:.1e}")

    @claim("What a decoder keeps does not grow beyond a chunk and the memory.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample(chunk=20)
        sizes, state = [], None
        for token in x.split(1, 1):
            _, state = layer.step(token, state=state)
            sizes.append(sum(t.numel() for t in (state.open, state.g, state.rows)))
        holds = max(sizes) == max(sizes[:20]) and max(sizes) <= (20 + 8 + 1) * 8
        return Finding(holds, f"at most {max(sizes[:20])} numbers in 20 tokens, {max(sizes)} in 300")

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[NonAttentionLLM, Tensor]:
        return sample(lambda: cls(Dims(2, 4), state=8, rows=8, **params), 1, 300, 8)
