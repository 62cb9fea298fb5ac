"""NaLaFormer: linear attention whose feature map sharpens with the length of the query and drops no sign."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import known
from saccade.hosts.block import ConvMLP, Residual, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage, conv_enter, widen_then_pool
from saccade.mix import DepthwiseConv, grid_angles, turn_pairs
from saccade.scan import linear_attention
from saccade.scan.linear_attention import full_precision, working_dtype


def query_features(q: Tensor) -> Tensor:
    """[relu(d), relu(-d)]^p for the direction d = q / |q|, p = 3 (1/2 + tanh |q|): (B, H, N, 2 D)."""
    size = q.norm(dim=-1, keepdim=True)
    d = nn.functional.normalize(q, dim=-1)
    return torch.cat([d.relu(), (-d).relu()], -1) ** (3 * (0.5 + size.tanh()))


def key_features(k: Tensor) -> Tensor:
    """[relu(k), relu(-k)]^3: (B, H, N, 2 D)."""
    return torch.cat([k.relu(), (-k).relu()], -1) ** 3


class GatedAttention(nn.Module):
    """x (B, N, C) -> W_p (LN(attention(q, k, v) + DW5x5(v)) * silu(g)), with q, k, v, g from one projection."""

    def __init__(self, dims: Dims, attention: str, rope: bool) -> None:
        super().__init__()
        d = self.dims = dims
        self.linear, self.rope = attention == "linear", rope
        self.qkvg = nn.Linear(d.dim, 2 * (d.num_heads + d.num_kv_heads) * d.head_dim)
        self.local = DepthwiseConv(d.dim, (5, 5), grid=d.grid)
        self.norm, self.out = nn.LayerNorm(d.dim), nn.Linear(d.dim, d.dim)

    def turn(self, x: Tensor) -> Tensor:
        """R x for x (B, H, N, D), or for both halves of x (B, H, N, 2 D)."""
        if not self.rope:
            return x
        rates = torch.logspace(0, -4, self.dims.head_dim // 4, dtype=torch.float64, device=x.device)
        angles = grid_angles(self.dims.grid or (), (rates, rates))
        return turn_pairs(x, angles.repeat(1, x.shape[-1] // self.dims.head_dim))

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, D) of one or the other attention."""
        if not self.linear:
            return attend(self.turn(q), self.turn(k), v)
        dtype = q.dtype
        with full_precision(q):
            q, k, v = (x.to(working_dtype(x)) for x in (q, k, v))
            q, k = query_features(q), key_features(k)
            mass = (q * k.mean(2, keepdim=True).repeat_interleave(self.dims.group, 1)).sum(-1, keepdim=True)
            # The turn is in the numerator alone.
            o = linear_attention(self.turn(q), self.turn(k), v, causal=False, scale=1 / k.shape[2])
            return (cast(Tensor, o) / (mass + 1e-6)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dims
        heads = self.qkvg(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2)
        q, k, v, gate = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads, d.num_heads], 1)
        o, values, gate = (
            y.transpose(1, 2).flatten(2) for y in (self.read(q, k, v), v.repeat_interleave(d.group, 1), gate)
        )
        return self.out(self.norm(o + self.local(values)) * nn.functional.silu(gate))


class Nalaformer(Mixer):
    """The NaLaFormer block: x <- x + DW(x), x <- x + a Attn(LN x), x <- x + DW'(x), x <- x + b MLP(LN x).

        Attn(x) = W_p (LN(o + DW5x5(v)) * silu(g)) + w_p
        o_i = (1 / N) sum_j (R_i f(q_i)) . (R_j h(k_j)) v_j / (f(q_i) . (1 / N) sum_j h(k_j) + 1e-6)
        f(q) = [relu(d), relu(-d)]^p,   d = q / |q|,   p = 3 (1/2 + tanh |q|),   h(k) = [relu(k), relu(-k)]^3
        MLP(x) = W_2 (h + DW3x3(h)) + w_2,   h = gelu(W_1 x + w_1)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, v, g (B, H, N, D), k likewise, from one projection;
    DW, DW': depthwise 3 x 3 convolutions; R_i turns pairs of neighbouring channels of each half, the first half of the
    pairs by y_i, the other by x_i, times 10000^(-l) with l from 0 to 1 over the D / 4 pairs of an axis; a, b: factors
    per channel. Dimensions of one sign in q and k meet each other, opposite signs give 0, and no dimension is lost.
    Without R weights are not negative and rows sum to 1. attention="softmax" is the same block with
    softmax(R q . R k / sqrt(D)) v for o. Paper: arXiv 2506.21137; everything here follows the authors' code
    (NaLaformer/NALA.py).
    Deviations: a query of length 0 has features 0, where the code divides by 0. Heads may share keys.
    attention: "linear" (default) or "softmax", which the last two stages have. rope: R (True; or R = 1). mlp_ratio:
    hidden width of the MLP over C (4.0; 3.5 in some models). layer_scale: initial value of a, b (1.0; 1e-6 in larger).
    Costs 4 N D^2 multiplications a head for linear attention, 2 N^2 D for softmax, beside the layers.
    Errors: ValueError when dims.grid has not two axes, head_dim is no multiple of 4 with rope, or mlp_ratio <= 0.

    >>> layer = Nalaformer(Dims(2, 4, grid=(5, 7)))
    >>> layer(torch.randn(1, 35, 8)).shape
    torch.Size([1, 35, 8])
    """

    spec = Spec(
        id="nalaformer",
        name="NaLaFormer",
        title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
        paper="2506.21137",
        year=2025,
        family="linear",
        uses=("linear_attention", "attend", "DepthwiseConv", "turn_pairs"),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        attention: str = "linear",
        rope: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__(dims)
        self.linear, self.rope = known("attention", attention, ("linear", "softmax")) == "linear", rope
        if rope and dims.head_dim % 4:
            raise ValueError(f"dims.head_dim: got {dims.head_dim} with rope=True; pass a multiple of 4, or rope=False")
        if not mlp_ratio * dims.dim >= 1:
            raise ValueError(f"mlp_ratio: got {mlp_ratio} for dim {dims.dim}; pass a number > 0")
        self.places = nn.ModuleList(DepthwiseConv(dims.dim, (3, 3), grid=dims.grid) for _ in range(2))
        inner = [GatedAttention(dims, attention, rope), ConvMLP(dims.dim, int(mlp_ratio * dims.dim), dims.grid or ())]
        scale = torch.full((dims.dim,), layer_scale)
        self.branches = nn.ModuleList(Residual(each, nn.LayerNorm(dims.dim, eps=1e-6), scale=scale) for each in inner)

    def compute(self, x: Tensor) -> Tensor:
        for place, branch in zip(self.places, self.branches, strict=True):
            x = branch(x + place(x))
        return x

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.dims.grid or ()

        def around(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def turned(t: Tensor) -> Tensor:  # (B, N, D)
            if not self.rope:
                return t
            pairs, found = d.head_dim // 4, []
            for token in range(height * width):
                row = []
                for pair in range(2 * pairs):
                    at = (token // width, token % width)[pair // pairs]
                    angle = torch.tensor(at * 10000 ** -(pair % pairs / max(1, pairs - 1)), dtype=torch.float64)
                    cos, sin = angle.cos().to(t), angle.sin().to(t)
                    one, other = t[:, token, 2 * pair], t[:, token, 2 * pair + 1]
                    row += [one * cos - other * sin, one * sin + other * cos]
                found.append(torch.stack(row, -1))
            return torch.stack(found, 1)

        x = x + around(x, "places.0")
        heads = w.linear(w.norm(x, "branches.0.norm", 1e-6), "branches.0.inner.qkvg").split(d.head_dim, -1)
        mixed, values = [], []
        for h in range(d.num_heads):
            shared = d.num_heads + h // (d.num_heads // d.num_kv_heads)
            q, k, v = heads[h], heads[shared], heads[shared + d.num_kv_heads]
            if self.linear:
                size = (q * q).sum(-1, keepdim=True) ** 0.5
                power = 3 * (0.5 + torch.tanh(size))
                up, down = ((s * q / size).clamp(min=0) ** power for s in (1, -1))
                above, below = ((s * k).clamp(min=0) ** 3 for s in (1, -1))
                weights = (turned(up) @ turned(above).mT + turned(down) @ turned(below).mT) / k.shape[1]
                mass = (up @ above.mT + down @ below.mT).mean(-1, keepdim=True) + 1e-6
            else:
                weights = torch.exp(turned(q) @ turned(k).mT / d.head_dim**0.5)
                mass = weights.sum(-1, keepdim=True)
            mixed.append(weights @ v / mass)
            values.append(v)
        o = torch.cat(mixed, -1) + around(torch.cat(values, -1), "branches.0.inner.local")
        gate = torch.cat(heads[-d.num_heads :], -1)
        o = w.norm(o, "branches.0.inner.norm") * gate / (1 + torch.exp(-gate))
        x = x + w["branches.0.scale"] * w.linear(o, "branches.0.inner.out")
        x = x + around(x, "places.1")
        hidden = w.linear(w.norm(x, "branches.1.norm", 1e-6), "branches.1.inner.enter")
        hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
        hidden = hidden + around(hidden, "branches.1.inner.local")
        return x + w["branches.1.scale"] * w.linear(hidden, "branches.1.inner.leave")

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier: "xt" (6.1 million parameters), "tiny" (15.9), "small" (25.7), "base" (52.0) or
        "large" (95.4), as the authors' code configures them; their tables say 8 and 15 for the first two.

        params: of every block, in place of the paper's. host: of the `Pyramid`, in place of the paper's.
        """
        names = ("xt", "tiny", "small", "base", "large")
        at = names.index(known("name", name, names))
        dims = ((32, 64, 128, 384), (64, 128, 256, 512), (64, 128, 320, 512), (96, 192, 384, 512), (96, 192, 448, 640))
        heads = ((1, 2, 4, 12), (1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 7, 10))[at]
        depths = ((2, 2, 2, 2), (2, 2, 6, 2), (3, 5, 9, 3), (4, 6, 12, 6), (4, 7, 19, 8))[at]
        scales = {"base": (1.0, 1.0, 1e-6, 1e-6), "large": (1e-6,) * 4}.get(name, (1.0,) * 4)
        stages = [Stage(dims[at][s], depths[s], heads[s], stride=2 if s else 4) for s in range(4)]

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            paper = {
                "attention": "linear" if stage < 2 else "softmax",
                "mlp_ratio": 4.0 if name in ("tiny", "base") else 3.5,
                "layer_scale": scales[min(stage, 3)],
            }
            return cls(dims, **{**paper, **(params or {})})

        head = widen_then_pool(1024)
        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": conv_enter, "head": head}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(3, 5)), 15, {"mlp_ratio": 1.5, "layer_scale": 0.5}),
            Case(Dims(4, 3, num_kv_heads=2, grid=(3, 4)), 12, {"rope": False, "mlp_ratio": 2.0}, batch=1),
            Case(Dims(1, 8, grid=(3, 3)), 9, {"attention": "softmax"}),
        ]

    @claim("NaLaFormer-S, B and L have 26, 52 and 95 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"small": 26, "base": 52, "large": 95})

    @claim("Without rotations weights are not negative and rows sum to 1; with them some weights are negative.")
    def weighs(cls) -> Finding:
        q, k, v = cls._inputs()
        plain, turned = (cls._mixer(rope).read(q, k, v) for rope in (False, True))
        mass = query_features(q) @ key_features(k).mean(2, keepdim=True).mT
        apart = float((plain.sum(-1) - 1).abs().max())
        allowed = 1e-6 / float(mass.min()) + 35 * torch.finfo(q.dtype).eps  # they sum to mass / (mass + 1e-6)
        figure = f"sums within {apart:.1e} of 1 ({allowed:.1e} from the 1e-6), least weights {float(plain.min()):.1e}"
        holds = apart < allowed and float(plain.min()) >= 0 > float(turned.min())
        return Finding(holds, f"{figure} and {float(turned.min()):.1e}")

    @claim("A longer query attends more sharply, where linear attention with relu does not see its length.")
    def sharpens(cls) -> Finding:
        (q, k, v), aware, plain = cls._inputs(), [], []
        for times in (0.1, 1.0, 10.0):
            longer = times * nn.functional.normalize(q, dim=-1)
            aware.append(cls._entropy(cls._mixer(False).read(longer, k, v)))
            rows = linear_attention(longer, k, v, feature_map="relu", normalizer="sum", causal=False)
            plain.append(cls._entropy(cast(Tensor, rows)))
        holds = aware[0] > aware[1] > aware[2] and max(plain) - min(plain) < 35 * torch.finfo(q.dtype).eps
        figure = f"entropy {', '.join(f'{e:.2f}' for e in aware)} at length 0.1, 1, 10; {plain[0]:.2f} always with relu"
        return Finding(holds, figure)

    @claim("Reading takes work that is linear in the tokens.")
    def linear_work(cls) -> Finding:
        costs = []
        for height in (16, 32):
            mixer = GatedAttention(Dims(2, 8, grid=(height, 24)), "linear", True)
            costs.append(work(functools.partial(mixer.read, *torch.ones(3, 1, 2, height * 24, 8))).all)
        share = costs[1] / (4 * 2 * 768**2 * 8)
        figure = f"{costs[1] / costs[0]:.2f} times the work at twice N, {share:.3f} of dense at 768"
        return Finding(costs[1] == 2 * costs[0] and share < 1, figure)

    @staticmethod
    def _mixer(rope: bool) -> GatedAttention:
        return GatedAttention(Dims(2, 8, grid=(5, 7)), "linear", rope).double().requires_grad_(False)

    @staticmethod
    def _inputs() -> tuple[Tensor, Tensor, Tensor]:
        """q and k of 5 x 7 tokens, and values that show the weights."""
        q, k = torch.randn(2, 1, 2, 35, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return q, k, torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1)

    @staticmethod
    def _entropy(rows: Tensor) -> float:
        return float(-torch.special.xlogy(rows, rows).sum(-1).mean())
