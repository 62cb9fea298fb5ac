"""LinGen's MATE block: Mamba-2 along orders of a video that change from layer to layer, and attention in windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import per_axis, positive
from saccade.hosts.windows import WindowAttention
from saccade.mix import pool_tokens
from saccade.scan import linear_attention

SCHEDULES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))  # the axes of (T, Y, X), the last one met fastest


def rotary_major(grid: Sequence[int], layer: int) -> Tensor:
    """The order of the tokens of (T, Y, X) in a layer: their row-major numbers, axes permuted."""
    return torch.arange(torch.Size(grid).numel()).view(*grid).permute(*SCHEDULES[layer % 4]).flatten()


class Way(nn.Module):
    """Mamba-2 in one direction, before its gate: projections (B, N, E + 2 S) and steps (B, N, H) -> (B, N, E)."""

    def __init__(self, heads: int, inner: int, state: int, taps: int) -> None:
        super().__init__()
        wide = inner + 2 * state
        self.sizes, self.heads = [inner, state, state], heads
        self.conv = nn.Conv1d(wide, wide, taps, groups=wide)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        first = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))  # the inverse of softplus
        self.direct = nn.Parameter(torch.ones(heads))

    def forward(self, mixed: Tensor, steps: Tensor) -> Tensor:
        before = nn.functional.pad(mixed, (0, 0, self.conv.kernel_size[0] - 1, 0))
        u, write, read = nn.functional.silu(self.conv(before.mT).mT).split(self.sizes, 2)
        u = u.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, P)
        delta = nn.functional.softplus(steps + self.bias).mT  # (B, H, N)
        q, k = read[:, None], write[:, None]
        y = linear_attention(q, k, u, strength=delta, log_decay=-self.log_rate.exp()[:, None] * delta)
        assert isinstance(y, Tensor)
        return (y + self.direct[:, None, None] * u).transpose(1, 2).flatten(2)


class Scans(nn.Module):
    """The MA branch: two ways through the tokens of a grid, each after a look at their means; tokens (B, N, C)."""

    ways: Tensor

    def __init__(self, dims: Dims, layer: int, expand: int, state: int, taps: int, review: int) -> None:
        super().__init__()
        inner, heads = positive("expand", expand) * dims.dim, dims.num_heads
        self.grid = grid = dims.grid or ()
        self.small = tuple(-(-n // review) for n in grid) if review else ()
        self.sizes = [inner, inner + 2 * positive("state", state), heads]
        self.enter = nn.Linear(dims.dim, sum(self.sizes), bias=False)
        self.scans = nn.ModuleList(Way(heads, inner, state, positive("taps", taps)) for _ in range(2))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.leave = nn.Linear(inner, dims.dim, bias=False)
        order = rotary_major(grid, layer)
        means = rotary_major(self.small, layer) if review else order[:0]
        ways = [torch.cat([r, len(means) + n]) for r, n in ((means, order), (means.flip(0), order.flip(0)))]
        self.register_buffer("ways", torch.stack(ways), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.small:
            x = torch.cat([pool_tokens(x, self.grid, self.small), x], 1)
        z, mixed, steps = self.enter(x).split(self.sizes, 2)
        y = torch.zeros_like(z)
        for way, scan in zip(self.ways, self.scans, strict=True):
            y = y + scan(mixed[:, way], steps[:, way])[:, way.argsort()]
        return self.leave(self.norm(y * nn.functional.silu(z))[:, -n:])


class LinGenMATE(Mixer):
    """The MATE block, in the place of full attention over a video: scans for what is far, windows for what is near.

        y = MA(x) + TE(x)
        MA(x) = W_o RMS((s + s') * silu(z)),   [z; m; d] = W x,   [u; b; c] = silu(conv(m))
        S_t = exp(-delta_t a) S_{t-1} + delta_t b_t u_t^T,   s_t = S_t^T c_t + e u_t,   delta = softplus(d + f)
        TE(x) = W_p [o_1; ...; o_H] + w_p,   o_h = softmax(Q K^T / sqrt(D) + table) V   in each window of (T, Y, X)

    x (B, N, C): tokens of a row-major grid (T, Y, X) -> (B, N, C); u, s, z (B, N, E), E = expand C, in H heads; b, c
    (B, N, state), the same for all heads; delta (B, N, H); a > 0, e, f (H,). s runs through the tokens in one of four
    orders, by turns from layer to layer: (T, Y, X), (T, X, Y), (Y, X, T) and (X, Y, T), the last axis fastest; s'
    through the same backwards, with conv, a, e and f of its own. In front of both stand review tokens, means over boxes
    of the grid, whose outputs are dropped. conv: causal, depthwise. Windows are shifted by half their sides in odd
    layers; tokens that come around the border are hidden.
    Paper: arXiv 2412.09856, of which the abstract and the captions of figures were read; no code by the authors was
    found.
    Deviations: what these leave open is chosen here: that the branches are added; the orders, by their names (spatial
    and temporal, row and column major); that review tokens are means, and of what; the sides of windows; the table,
    which is Swin's; that both ways share projections, gate and norm. A side of a window is cut to the grid.
    layer: number of the layer, from 0 (default 0). window: sides of the windows ((8, 4, 4)). review: side of a box
    whose mean is a review token (4; 0: none). expand: E over C (2). state: rows of S (128). taps: of conv (4).
    Costs 2 N w C multiplications in the products of windows of w tokens, and about 2 N E (state + 64) in the scans,
    beside the layers. Heads may share keys in TE. Errors: ValueError when dims.grid has not three axes.

    >>> LinGenMATE(Dims(2, 4, grid=(3, 4, 5)), window=2)(torch.randn(1, 60, 8)).shape
    torch.Size([1, 60, 8])
    """

    spec = Spec(
        id="lingen_mate",
        name="LinGen (MATE)",
        title="LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational "
        "Complexity",
        paper="2412.09856",
        year=2024,
        family="recurrent",
        uses=("attend", "linear_attention", "pool_tokens", "RegionBias", "RelativeTable", "Windowed"),
        grid=3,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        layer: int = 0,
        window: int | Sequence[int] = (8, 4, 4),
        review: int = 4,
        expand: int = 2,
        state: int = 128,
        taps: int = 4,
    ) -> None:
        super().__init__(dims)
        grid, odd = dims.grid or (), positive("layer", layer, least=0) % 2
        self.turn, self.review = layer % 4, positive("review", review, least=0)
        self.sides = [min(side, n) for side, n in zip(per_axis("window", window, 3), grid, strict=True)]
        self.shifts = [odd * (side // 2) if side < n else 0 for side, n in zip(self.sides, grid, strict=True)]
        self.scans = Scans(dims, layer, expand, state, taps, review)
        self.windows = WindowAttention(dims, self.sides, shift=self.shifts)

    def compute(self, x: Tensor) -> Tensor:
        return self.scans(x) + self.windows(x)

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (depth, height, width) = Weights(self), self.dims, self.dims.grid or ()
        grid, places = (depth, height, width), list(itertools.product(range(depth), range(height), range(width)))
        major = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)][self.turn]

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        def scanned() -> Tensor:
            boxes, means = [], []
            if self.review:
                small = [-(-n // self.review) for n in grid]
                boxes = list(itertools.product(*map(range, small)))
            for box in boxes:
                edges = [(b * n // s, -(-(b + 1) * n // s)) for b, n, s in zip(box, grid, small, strict=True)]
                inside = [
                    i for i, p in enumerate(places) if all(a <= c < b for c, (a, b) in zip(p, edges, strict=True))
                ]
                means.append(x[:, inside].mean(1))
            every = torch.cat([*(m[:, None] for m in means), x], 1)
            inner = w["scans.leave.weight"].shape[1]
            z, mixed, steps = w.linear(every, "scans.enter").tensor_split(
                [inner, w["scans.enter.weight"].shape[0] - d.num_heads], 2
            )
            first = sorted(range(len(boxes)), key=lambda i: [boxes[i][a] for a in major])
            then = sorted(range(len(places)), key=lambda i: [places[i][a] for a in major])
            total = torch.zeros_like(z)
            for k, sign in enumerate((1, -1)):
                way, name = first[::sign] + [len(boxes) + i for i in then[::sign]], f"scans.scans.{k}"
                kernel = w[f"{name}.conv.weight"][:, 0]
                recent: list[Tensor] = []
                memory, rate = torch.zeros(()), w[f"{name}.log_rate"].exp()
                for n in way:
                    recent = [mixed[:, n], *recent][: kernel.shape[1]]
                    met = w[f"{name}.conv.bias"] + sum(kernel[:, -1 - i] * m for i, m in enumerate(recent))
                    u, write, read = silu(met).tensor_split([inner, (inner + met.shape[1]) // 2], 1)
                    u = u.unflatten(1, (d.num_heads, -1))
                    delta = (1 + (steps[:, n] + w[f"{name}.bias"]).exp()).log()
                    given = (delta[..., None] * u)[:, :, None] * write[:, None, :, None]
                    memory = (-delta * rate).exp()[..., None, None] * memory + given
                    seen = (memory * read[:, None, :, None]).sum(2) + w[f"{name}.direct"][:, None] * u
                    total[:, n] += seen.flatten(1)
            y = total * silu(z)
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["scans.norm.weight"]
            return w.linear(y[:, len(boxes) :], "scans.leave")

        def attended() -> Tensor:
            counts = [d.num_heads, d.num_kv_heads, d.num_kv_heads]
            q, k, v = w.linear(x, "windows.inner.qkv").unflatten(2, (-1, d.head_dim)).split(counts, 2)
            k, v = (part.repeat_interleave(d.group, 2) for part in (k, v))
            (table,) = (value for name, value in w.items() if name.endswith("table"))
            whole = [-(-n // side) * side for n, side in zip(grid, self.sides, strict=True)]

            def home(p: tuple[int, ...]) -> list[tuple[int, bool]]:
                """The window of a place on each axis, and did it come around the border?"""
                every = zip(p, self.shifts, whole, self.sides, strict=True)
                return [((c - by) % n // side, c < by) for c, by, n, side in every]

            out = []
            for i, p in enumerate(places):
                keys = [j for j, other in enumerate(places) if home(other) == home(p)]
                apart = [[a - b + s - 1 for a, b, s in zip(p, places[j], self.sides, strict=True)] for j in keys]
                biases = torch.stack([table[:, a, b, c] for a, b, c in apart])
                scores = (q[:, i, None] * k[:, keys]).sum(-1) / d.head_dim**0.5 + biases
                out.append((scores.softmax(1)[..., None] * v[:, keys]).sum(1).flatten(1))
            return w.linear(torch.stack(out, 1), "windows.inner.out")

        return scanned() + attended()

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(3, 4, 2)), 24, {"layer": 1, "window": 2, "review": 2, "state": 5, "taps": 3}),
            Case(Dims(4, 2, num_kv_heads=2, grid=(5, 1, 3)), 15, {"layer": 2, "review": 0, "expand": 1, "state": 3}, 1),
            Case(Dims(1, 4, grid=(2, 3, 3)), 18, {"layer": 7, "window": (1, 2, 2), "review": 3, "state": 4}),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int, int], **params: Any) -> tuple[Any, Tensor]:
        """A block and tokens for it, in float64."""
        module = cls(Dims(2, 4, grid=grid), state=4, **params).double().requires_grad_(False)
        return module, torch.randn(1, torch.Size(grid).numel(), 8, dtype=torch.float64)

    @claim("In four layers each axis is the fastest of a scan, so that neighbours along it are one step apart.")
    def every_axis(cls) -> Finding:
        grid, least = (3, 4, 5), []
        for axis in range(3):
            numbers = torch.arange(60).view(grid)
            one, other = (numbers.narrow(axis, start, grid[axis] - 1).flatten() for start in (0, 1))
            met = [rotary_major(grid, layer).argsort() for layer in range(4)]
            least.append([int((at[one] - at[other]).abs().max()) for at in met])
        holds = all(min(steps) == 1 for steps in least)
        return Finding(holds, "steps along T, Y and X in layers 0 to 3: " + ", ".join(map(str, least)))

    @claim("Review tokens show a scan all of the video before its first token, and have no parameters.")
    def overview(cls) -> Finding:
        seen, sizes = [], []
        for review in (0, 2):
            module, x = cls.sample((4, 3, 5), review=review)
            sizes.append(sum(p.numel() for p in module.parameters()))
            for parameter in module.scans.scans[1].conv.parameters():
                parameter.zero_()  # one way alone
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(module.scans(x.requires_grad_())[0, 0].sum(), x)
            seen.append(int(gradient[0].ne(0).any(1).sum()))
        holds = seen == [1, 60] and sizes[0] == sizes[1]
        return Finding(
            holds, f"{seen[0]} of 60 tokens seen from the first without, {seen[1]} with, {sizes[1]} parameters"
        )

    @claim("One block sees the whole video, its windows a fixed part that moves in odd layers.")
    def support(cls) -> Finding:
        seen = []
        for layer in (0, 1):
            module, x = cls.sample((4, 6, 6), window=(4, 3, 3), layer=layer)
            for part in (module, module.windows):
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(part(x.requires_grad_())[0, 0].sum(), x)
                seen.append(int(gradient[0].ne(0).any(1).sum()))
        figures = ", ".join(map(str, seen))
        return Finding(seen == [144, 36, 144, 4], f"{figures} of 144 tokens: all and windows, then in an odd layer")

    @claim("The products grow as the number of tokens.")
    def linear(cls) -> Finding:
        costs = []
        for grid in ((8, 8, 16), (16, 8, 16)):
            module, x = cls.sample(grid)
            costs.append(work(partial(module, x)).all)
        ratio = costs[1] / costs[0]
        return Finding(ratio < 2**1.5, f"{ratio:.2f} times at 2 N")  # between linear and quadratic
