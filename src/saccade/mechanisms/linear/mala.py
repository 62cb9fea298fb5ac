"""MALA: linear attention whose rows sum to 1 by a shift instead of a division, so that long queries attend sharply."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import known
from saccade.hosts.block import Block, ConvMLP, init_linear, published_size
from saccade.hosts.pyramid import Pyramid, Stage, conv_enter, widen_then_pool
from saccade.mix import DepthwiseConv, grid_angles, turn_pairs
from saccade.scan import linear_attention
from saccade.scan.features import elu1
from saccade.scan.linear_attention import full_precision, working_dtype


class GatedAttention(nn.Module):
    """x (B, N, C) -> W_p ((attention(q, k, v) + DW5x5(v)) * g), with q, k, v, g from one projection."""

    def __init__(self, dims: Dims, attention: str, rope: bool) -> None:
        super().__init__()
        d = self.dims = dims
        self.linear, self.rope = attention == "linear", rope
        self.qkvg = nn.Linear(d.dim, 2 * (d.num_heads + d.num_kv_heads) * d.head_dim)
        self.local = DepthwiseConv(d.dim, (5, 5), grid=d.grid)
        self.out = nn.Linear(d.dim, d.dim)

    def turn(self, x: Tensor) -> Tensor:
        """R x for x (B, H, N, D)."""
        if not self.rope:
            return x
        rates = torch.logspace(0, -4, x.shape[-1] // 4, dtype=torch.float64, device=x.device)
        return turn_pairs(x, grid_angles(self.dims.grid or (), (rates, rates)))

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, D) of one or the other attention."""
        if not self.linear:
            return attend(self.turn(q), self.turn(k), v)
        dtype, scale = q.dtype, self.dims.head_dim**-0.5
        with full_precision(q):
            q, k, v = (x.to(working_dtype(x)) for x in (q, k, v))
            q, k = elu1(q), elu1(k)
            mean, center = (x.mean(2, keepdim=True).repeat_interleave(self.dims.group, 1) for x in (k, v))
            z = scale * (q * mean).sum(-1, keepdim=True)
            # The turn is in the product alone, z is formed without it.
            o = linear_attention(self.turn(q), self.turn(k), v, causal=False, scale=scale / k.shape[2])
            return ((1 + 1 / (z + 1e-6)) * cast(Tensor, o) - z * center).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dims
        heads = self.qkvg(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2)
        q, k, v, gate = heads.split([d.num_heads, d.num_kv_heads, d.num_kv_heads, d.num_heads], 1)
        o, values, gate = (
            y.transpose(1, 2).flatten(2) for y in (self.read(q, k, v), v.repeat_interleave(d.group, 1), gate)
        )
        return self.out((o + self.local(values)) * gate)


class Mala(Mixer):
    """The MAViT block: x <- x + DW3x3(x), x <- x + a Attn(LN x), x <- x + b MLP(LN x), with attention in linear time.

        Attn(x) = W_p ((o + DW5x5(v)) * g) + w_p,   z_i = s phi(q_i) . mean_j phi(k_j),   phi(x) = elu(x) + 1
        o_i = (1 + 1 / (z_i + 1e-6)) (s / N) sum_j (R_i phi(q_i)) . (R_j phi(k_j)) v_j - z_i mean_j v_j
        MLP(x) = W_2 (h + DW3x3(h)) + w_2,   h = gelu(W_1 x + w_1)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); q, v, g (B, H, N, D), k likewise, from one projection;
    s = D^(-1/2); R_i turns pairs of neighbouring channels, the first half of them by y_i, the other by x_i, times
    10000^(-l) with l from 0 to 1 over the D / 4 pairs of an axis; a, b: factors per channel. Without R rows sum to 1,
    and weights may be negative. attention="softmax" is the same block with softmax(R q . R k / sqrt(D)) v for o.
    Paper: arXiv 2507.00698; s / N, R, the gate and the layers follow the authors' code
    (classfication_release/model.py). The paper writes the sums without s / N, which is another function.
    Deviations: none. Heads may share keys, which the paper's do not.
    attention: "linear" (default) or "softmax", which the paper has in its last two stages. rope: R (True; or R = 1).
    mlp_ratio: hidden width of the MLP over C (3.5). layer_scale: initial value of a, b (1.0; 1e-6 in larger models).
    Costs 2 N D^2 multiplications a head for linear attention, 2 N^2 D for softmax, beside the layers.
    Errors: ValueError when dims.grid has not two axes, head_dim is no multiple of 4 with rope, or mlp_ratio <= 0.

    >>> layer = Mala(Dims(2, 4, grid=(5, 7)))
    >>> layer(torch.randn(1, 35, 8)).shape
    torch.Size([1, 35, 8])
    """

    spec = Spec(
        id="mala",
        name="MALA (Magnitude-Aware Linear Attention)",
        title="Rectifying Magnitude Neglect in Linear Attention",
        paper="2507.00698",
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
        mlp_ratio: float = 3.5,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__(dims)
        self.linear, self.rope = known("attention", attention, ("linear", "softmax")) == "linear", rope
        if rope and dims.head_dim % 4:
            raise ValueError(f"dims.head_dim: got {dims.head_dim} with rope=True; pass a multiple of 4, or rope=False")
        if not mlp_ratio * dims.dim >= 1:
            raise ValueError(f"mlp_ratio: got {mlp_ratio} for dim {dims.dim}; pass a number > 0")
        self.place = DepthwiseConv(dims.dim, (3, 3), grid=dims.grid)
        self.block = Block(
            dims,
            GatedAttention(dims, attention, rope),
            mlp=ConvMLP(dims.dim, int(mlp_ratio * dims.dim), dims.grid or ()),
            layer_scale=layer_scale,
            norm=functools.partial(nn.LayerNorm, eps=1e-6),
        )

    def compute(self, x: Tensor) -> Tensor:
        return self.block(x + self.place(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.dims.grid or ()
        tokens = height * width

        def around(t: Tensor, name: str) -> Tensor:
            return w.conv(t.unflatten(1, (height, width)), name).flatten(1, 2)

        def turned(t: Tensor) -> Tensor:  # (B, N, D)
            if not self.rope:
                return t
            pairs, found = d.head_dim // 4, []
            for token in range(tokens):
                row = []
                for pair in range(2 * pairs):
                    at = (token // width, token % width)[pair // pairs]
                    angle = torch.tensor(at * 10000 ** -(pair % pairs / max(1, pairs - 1)), dtype=torch.float64)
                    cos, sin = angle.cos().to(t), angle.sin().to(t)
                    one, other = t[:, token, 2 * pair], t[:, token, 2 * pair + 1]
                    row += [one * cos - other * sin, one * sin + other * cos]
                found.append(torch.stack(row, -1))
            return torch.stack(found, 1)

        def phi(t: Tensor) -> Tensor:
            return torch.where(t > 0, t + 1, torch.exp(t.clamp(max=0)))

        x = x + around(x, "place")
        heads = w.linear(w.norm(x, "block.norm_mixer", 1e-6), "block.mixer.qkvg").split(d.head_dim, -1)
        mixed, values, scale = [], [], d.head_dim**-0.5
        for h in range(d.num_heads):
            shared = d.num_heads + h // (d.num_heads // d.num_kv_heads)
            q, k, v = heads[h], heads[shared], heads[shared + d.num_kv_heads]
            if self.linear:
                q, k = phi(q), phi(k)
                z = scale * (q @ k.mean(1)[:, :, None])
                products = turned(q) @ turned(k).mT
                mixed.append((1 + 1 / (z + 1e-6)) * (scale / tokens) * products @ v - z * v.mean(1, keepdim=True))
            else:
                weights = torch.exp(scale * (turned(q) @ turned(k).mT))
                mixed.append(weights @ v / weights.sum(-1, keepdim=True))
            values.append(v)
        o = torch.cat(mixed, -1) + around(torch.cat(values, -1), "block.mixer.local")
        gate = torch.cat(heads[-d.num_heads :], -1)
        x = x + w["block.scale_mixer"] * w.linear(o * gate, "block.mixer.out")
        hidden = w.linear(w.norm(x, "block.norm_mlp", 1e-6), "block.mlp.enter")
        hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
        return x + w["block.scale_mlp"] * w.linear(hidden + around(hidden, "block.mlp.local"), "block.mlp.leave")

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier MAViT: "tiny" (16.4 million parameters), "small" (27.1), "base" (49.8) or "large"
        (97.8).

        params: of every block, in place of the paper's. host: of the `Pyramid`, in place of the paper's.
        """
        names = ("tiny", "small", "base", "large")
        at = names.index(known("name", name, names))
        dims = ((64, 128, 256, 512), (64, 128, 320, 512), (96, 192, 384, 512), (96, 192, 448, 640))[at]
        heads = ((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 7, 10))[at]
        depths = ((2, 2, 6, 2), (3, 5, 9, 3), (4, 6, 12, 6), (4, 7, 19, 8))[at]
        scales = ((1.0,) * 4, (1.0,) * 4, (1.0, 1.0, 1e-6, 1e-6), (1e-6,) * 4)[at]
        stages = [Stage(dims[s], depths[s], heads[s], stride=2 if s else 4) for s in range(4)]

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            paper = {"attention": "linear" if stage < 2 else "softmax", "layer_scale": scales[min(stage, 3)]}
            return cls(dims, **{**paper, **(params or {})})

        head = widen_then_pool(2560 if name == "large" else 2048)
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

    @claim("MAViT-S has 27 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"small": 27})

    @claim("Without rotations every row sums to 1, by the shift alone; some weights are negative.")
    def rows_sum_to_one(cls) -> Finding:
        weights = cls._weights(*cls._inputs())
        apart, least = float((weights.sum(-1) - 1).abs().max()), float(weights.min())
        z, _ = cls._products(*cls._inputs())
        allowed = 1e-6 / float(z.min()) + 35 * torch.finfo(z.dtype).eps  # they sum to z / (z + 1e-6)
        figure = f"sums within {apart:.1e} of 1 ({allowed:.1e} from the 1e-6 beside z), least weight {least:.1e}"
        return Finding(apart < allowed and least < 0, figure)

    @claim("It is linear attention under the normaliser `Magnitude`, with s in its features.")
    def is_magnitude(cls) -> Finding:
        q, k = cls._inputs()
        v = torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1)
        maps = (elu1, lambda x: elu1(x) * 8**-0.5)
        plain = cast(Tensor, linear_attention(q, k, v, feature_map=maps, normalizer="magnitude", causal=False))
        z, products = cls._products(q, k)
        allowed = float((products * 1e-6 / z**2).max() + 35 * torch.finfo(z.dtype).eps * plain.abs().max())
        apart = float((cls._weights(q, k) - plain).abs().max())
        return Finding(apart < allowed, f"largest difference {apart:.1e}, where 1e-6 beside z allows {allowed:.1e}")

    @claim("A row spreads out in proportion to phi(q), under division by the sum it stays as it is.")
    def knows_magnitude(cls) -> Finding:
        (q, k), spread, divided = cls._inputs(), [], []
        for times in (1.0, 8.0, 64.0):
            longer = times * (q.abs() + 1) - 1  # phi is x + 1 there
            spread.append(float(cls._weights(longer, k).std(-1).mean()))
            v = torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1)
            plain = linear_attention(longer, k, v, feature_map="elu1", normalizer="sum", causal=False)
            divided.append(float(cast(Tensor, plain).std(-1).mean()))
        grows, stays = spread[2] / spread[1], max(divided) / min(divided) - 1
        figure = (
            f"{spread[1] / spread[0]:.2f} and {grows:.2f} times the spread at 8 times phi(q), {1 + stays:.2f} divided"
        )
        return Finding(7 < grows < 8 and stays < 35 * torch.finfo(q.dtype).eps, figure)

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
    def _inputs() -> tuple[Tensor, Tensor]:
        q, k = torch.randn(2, 1, 2, 35, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return q, k

    @staticmethod
    def _products(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """z (1, 2, 35, 1) and (s / N) phi(q) . phi(k) (1, 2, 35, 35)."""
        products = elu1(q) @ elu1(k).mT * 8**-0.5 / 35
        return products.sum(-1, keepdim=True), products

    @staticmethod
    def _weights(q: Tensor, k: Tensor) -> Tensor:
        """All weights of the linear attention without rotations, (1, 2, 35, 35)."""
        mixer = GatedAttention(Dims(2, 8, grid=(5, 7)), "linear", False).double()
        return mixer.read(q, k, torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1))
