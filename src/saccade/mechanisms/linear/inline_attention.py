"""InLine attention: linear attention whose weights are shifted, not divided, to sum to 1, beside a convolution."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, work
from saccade.errors import known
from saccade.hosts.block import Block, init_linear, published_size
from saccade.hosts.pyramid import Mean, Pyramid, Stage
from saccade.hosts.resize import Reduce
from saccade.hosts.vit import LearnedPositions
from saccade.mix import depthwise_conv
from saccade.scan import linear_attention


class DynamicResidual(nn.Module):
    """The 3 x 3 depthwise convolution of v (B, N, C) whose kernels, one a channel, come from the mean of x."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.grid, heads = dims.grid or (), dims.num_heads
        self.squeeze = nn.Conv1d(dims.dim, dims.dim, 1, groups=heads)
        self.kernels = nn.Conv1d(dims.dim, 9 * dims.dim, 1, groups=heads)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        kernels = self.kernels(nn.functional.gelu(self.squeeze(x.mean(1)[..., None])))  # (B, 9 C, 1)
        # One depthwise convolution over batch and channels: every image has kernels of its own.
        side = v.transpose(0, 1).flatten(1)[None]
        y = depthwise_conv(side, self.grid, kernels.reshape(-1, 1, 3, 3))
        return y[0].unflatten(1, (len(x), -1)).transpose(0, 1)


class InlineAttention(Mixer):
    """InLine attention: linear attention that tells every two queries apart, beside a convolution of the values.

        o_i = sum_j w_ij v_j,   w_ij = (s q_i . k_j - s q_i . mean_m k_m + 1) / N
        y = W_o (o + DW(v)) + w_o,   DW: 3 x 3 kernels of channel c of head h = A2_h gelu(A1_h mean_n x + a1) + a2

    x (B, N, C): tokens of a row-major grid (Y, X) -> y (B, N, C); q (B, H, N, D), k, v (B, Hkv, N, D): projections;
    s = D^(-1/2); A1_h (D, D), A2_h (9 D, D) mix the channels of one head of the mean token. Rows sum to 1, weights may
    be negative. The paper's phi is the identity in every model of the authors.
    Paper: arXiv 2412.06590, equation 5; s / N and the making of the kernels follow the authors' code
    (inline_pvt.py, inline_deit.py). The paper leaves s / N to phi(q).
    Deviations: no class token, which would take part in the attention but not in the convolution. Heads may share keys,
    which the paper's do not; the convolution then has the values of key head h // (H // Hkv).
    qkv_bias: biases of the projections to q, k and v (True).
    Costs 2 N D^2 multiplications a head, 9 N C for the convolution, beside the projections.
    Errors: ValueError when dims.grid has not two axes.

    >>> from saccade.hosts.block import num_parameters
    >>> layer = InlineAttention(Dims(2, 4, grid=(5, 7)))
    >>> layer(torch.randn(1, 35, 8)).shape, num_parameters(InlineAttention.model)
    (torch.Size([1, 35, 8]), 12032232)
    """

    spec = Spec(
        id="inline_attention",
        name="InLine attention",
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        paper="2412.06590",
        year=2024,
        family="linear",
        uses=("linear_attention", "MeanShift", "depthwise_conv"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, qkv_bias: bool = True) -> None:
        super().__init__(dims)
        self.qkv = nn.Linear(dims.dim, (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim, bias=qkv_bias)
        self.residual = DynamicResidual(dims)
        self.out = nn.Linear(dims.dim, dims.dim)

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, D)."""
        scale = self.dims.head_dim**-0.5
        return cast(Tensor, linear_attention(q, k, v, normalizer="mean_shift", causal=False, scale=scale))

    def compute(self, x: Tensor) -> Tensor:
        d = self.dims
        q, k, v = d.split(self.qkv(x))
        o, values = (y.transpose(1, 2).flatten(2) for y in (self.read(q, k, v), v.repeat_interleave(d.group, 1)))
        return self.out(o + self.residual(x, values))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = dict(self.named_parameters()), self.dims, self.dims.grid or ()
        heads = x @ w["qkv.weight"].T
        if "qkv.bias" in w:
            heads = heads + w["qkv.bias"]
        heads, mean, found = heads.split(d.head_dim, -1), x.mean(1).split(d.head_dim, -1), []
        inner, outer = w["residual.squeeze.weight"][..., 0], w["residual.kernels.weight"][..., 0]
        for h in range(d.num_heads):
            shared = d.num_heads + h // (d.num_heads // d.num_kv_heads)
            q, k, v = heads[h], heads[shared], heads[shared + d.num_kv_heads]
            products = q @ k.mT / d.head_dim**0.5
            weights = (products - products.mean(-1, keepdim=True) + 1) / k.shape[1]
            mine, nine = (slice(h * n, (h + 1) * n) for n in (d.head_dim, 9 * d.head_dim))
            hidden = mean[h] @ inner[mine].T + w["residual.squeeze.bias"][mine]
            hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
            kernels = (hidden @ outer[nine].T + w["residual.kernels.bias"][nine]).reshape(len(x), d.head_dim, 3, 3)
            image = nn.functional.pad(v.reshape(len(x), height, width, -1), (0, 0, 1, 1, 1, 1))
            local = torch.zeros_like(image[:, :height, :width])
            for i in range(3):
                for j in range(3):
                    tap = kernels[:, None, None, :, i, j]
                    local = local + tap * image[:, i : i + height, j : j + width]
            found.append(weights @ v + local.flatten(1, 2))
        return torch.cat(found, -1) @ w["out.weight"].T + w["out.bias"]

    @classmethod
    def model(cls, name: str = "tiny", *, params: Mapping[str, Any] | None = None, **host: Any) -> Pyramid:
        """The paper's classifier InLine-PVT: "tiny" (12.0 million parameters), "small" (21.6), "medium" (37.6) or
        "large" (50.2).

        params: of every block, in place of the paper's. host: of the `Pyramid`, in place of the paper's.
        """
        known("name", name, ("tiny", "small", "medium", "large"))
        depths = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}[name]
        dims = (64, 128, 320, 512)
        stages = [Stage(dim, depths[s], dim // 32, stride=2 if s else 4) for s, dim in enumerate(dims)]

        def enter(dim_in: int, dim_out: int, stride: int, stage: int) -> nn.Module:
            return Reduce(dim_in, dim_out, stride, after=nn.LayerNorm(dim_out))

        def block(dims: Dims, stage: int, index: int) -> nn.Module:
            norm, ratio = functools.partial(nn.LayerNorm, eps=1e-6), 8 if stage < 2 else 4
            whole = Block(dims, cls(dims, **(params or {})), mlp_ratio=ratio, norm=norm)
            return whole if index else nn.Sequential(LearnedPositions(dims), whole)

        def head(dims: Dims, num_classes: int) -> nn.Module:
            return nn.Sequential(Mean(), nn.Linear(dims.dim, num_classes))

        paper = {"size": (224, 224), "stages": stages, "block": block, "enter": enter, "head": head}
        model = Pyramid(**{**paper, **host})
        init_linear(model)
        return model

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4, grid=(3, 5)), 15),
            Case(Dims(4, 3, num_kv_heads=2, grid=(5, 7)), 35, {"qkv_bias": False}, batch=1),
            Case(Dims(1, 5, grid=(2, 3)), 6, batch=3),
        ]

    @claim("InLine-PVT-T, S, M and L have 12.0, 21.6, 37.6 and 50.2 million parameters, as published.")
    def published_size(cls) -> Finding:
        return published_size(cls.model, {"tiny": 12.0, "small": 21.6, "medium": 37.6, "large": 50.2})

    @claim("The memory gives what all weights give: rows sum to 1, some weights are negative.")
    def linear_is_quadratic(cls) -> Finding:
        q, k, eye = cls._inputs()
        weights = cls._layer().read(q, k, eye)
        products = q @ k.mT * 8**-0.5
        dense = (products - products.mean(-1, keepdim=True) + 1) / 35
        apart, sums = float((weights - dense).abs().max()), float((weights.sum(-1) - 1).abs().max())
        least, eps = float(weights.min()), 35 * torch.finfo(q.dtype).eps
        holds = max(apart, sums) < eps and least < 0
        return Finding(holds, f"largest difference {apart:.1e}, sums within {sums:.1e} of 1, least weight {least:.1e}")

    @claim("Queries q and 2 q get different rows; under division by the sum, with phi = relu, the same.")
    def injective(cls) -> Finding:
        (q, k, eye), found = cls._inputs(), {}
        layer = cls._layer()
        found["shifted"] = [layer.read(times * q, k, eye) for times in (1, 2)]
        found["divided"] = [
            cast(Tensor, linear_attention(times * q, k, eye, feature_map="relu", normalizer="sum", causal=False))
            for times in (1, 2)
        ]
        apart = {name: float((one - two).abs().max() / one.abs().max()) for name, (one, two) in found.items()}
        holds = apart["shifted"] > 0.1 and apart["divided"] < 35 * torch.finfo(q.dtype).eps
        return Finding(
            holds,
            f"rows differ by {apart['shifted']:.2f} of the largest weight, divided ones by {apart['divided']:.1e}",
        )

    @claim("Any two queries get different rows exactly where the centred keys span the channels.")
    def centred_keys(cls) -> Finding:
        q, k, eye = cls._inputs()
        layer, ranks = cls._layer(), []
        for keys in (k, k[..., :1] * k[..., :1, :] + k[..., 1:2, :]):  # the second lie on a line
            # A row is affine in the query: what unit vectors add to the row of 0 is its matrix.
            units = torch.eye(9, 8, dtype=q.dtype).expand(1, 2, -1, -1)
            rows = layer.read(units, keys, eye)
            ranks.append(int(torch.linalg.matrix_rank(rows[..., :8, :] - rows[..., 8:, :]).max()))
        figure = f"the map from 8 channels to rows has rank {ranks[0]}; {ranks[1]} for keys on a line"
        return Finding(ranks == [8, 1], figure)

    @claim("Reading takes work that is linear in the tokens.")
    def linear_work(cls) -> Finding:
        costs = []
        for height in (16, 32):
            layer = cls(Dims(2, 8, grid=(height, 24)))
            costs.append(work(functools.partial(layer.read, *torch.ones(3, 1, 2, height * 24, 8))).all)
        share = costs[1] / (4 * 2 * 768**2 * 8)
        figure = f"{costs[1] / costs[0]:.2f} times the work at twice N, {share:.3f} of dense at 768"
        return Finding(1.9 < costs[1] / costs[0] <= 2 and share < 1, figure)

    @classmethod
    def _layer(cls) -> InlineAttention:
        return cls(Dims(2, 8, grid=(5, 7))).double().requires_grad_(False)

    @staticmethod
    def _inputs() -> tuple[Tensor, Tensor, Tensor]:
        """q and k of 5 x 7 tokens, and values that show the weights."""
        q, k = torch.randn(2, 1, 2, 35, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return q, k, torch.eye(35, dtype=q.dtype).expand(1, 2, -1, -1)
