"""NPRF with relative positions: kernelised attention whose biases hang on the distance, summed by FFT."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.scan import PositiveRandomFeatures, linear_attention, long_conv
from saccade.scan.linear_attention import full_precision, working_dtype


class NprfRpe(Attention):
    """Kernelised attention with relative positions: sums over keys weighed by e^b of the distance, in N log N.

        o_i = phi(q'_i)^T sum_j e^{b_{j-i}} phi(k'_j) v_j^T / phi(q'_i)^T sum_j e^{b_{j-i}} phi(k'_j)
        phi(x)_f = m^(-1/2) exp(w_f . x - |x|^2 / 2),   E[phi(q') . phi(k')] = exp(q' . k'), q' = q / |q|,  k' = k / |k|

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> o (B, H, N, Dv). Both sums are convolutions over the tokens,
    one a feature and value channel, with the kernel e^b of the head: they are taken by FFT, and no N x N matrix is
    formed. b is learned, a number for each query head and distance j - i. Rows w_f of W (m, D), one W for all heads,
    are a buffer. Paper: arXiv 2106.12566, section 3.
    Deviations: not causal, since an FFT brings the rounding of later tokens into earlier ones; distances beyond `reach`
    share the bias of the farthest, so that b does not hang on N; the largest bias of a head is subtracted from all,
    which cancels.
    num_features: m (None: D log D). reach: the largest distance with a bias of its own (default 512). orthogonal: rows
    w_f orthogonal in blocks of D (True). seed: of W (None: from torch's global generator). b starts at 0.
    Costs O(m Dv N log N) a head, and memory for N m Dv numbers.
    Errors: ValueError for keys of another number than queries.

    >>> layer = NprfRpe(Dims(num_heads=2, head_dim=4), reach=8)
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="nprf_rpe",
        name="NPRF (kernelised attention with RPE via FFT)",
        title="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
        paper="2106.12566",
        year=2021,
        family="linear",
        uses=("PositiveRandomFeatures", "long_conv"),
    )
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        num_features: int | None = None,
        reach: int = 512,
        orthogonal: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(dims)
        d = dims.head_dim
        count = max(1, int(d * math.log(d))) if num_features is None else positive("num_features", num_features)
        seed = int(torch.randint(2**62, ())) if seed is None else positive("seed", seed, least=0)
        self.features = PositiveRandomFeatures(d, num_features=count, seed=seed, orthogonal=orthogonal, scale=1.0)
        self.reach = positive("reach", reach)
        self.bias = nn.Parameter(torch.zeros(dims.num_heads, 2 * reach + 1))  # of j - i = -reach .. reach

    def kernel(self, length: int) -> Tensor:
        """e^b by i - j = 1 - N .. N - 1, up to a factor a head, (H, 2 N - 1)."""
        ahead = torch.arange(length - 1, -length, -1, device=self.bias.device)
        b = self.bias[:, ahead.clamp(-self.reach, self.reach) + self.reach]
        return (b - b.detach().amax(1, keepdim=True)).exp()

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: got {k.shape[2]} tokens beside q's {q.shape[2]}; positions pair them, pass as many")
        wide, group = working_dtype(q), self.dims.group
        with full_precision(q):
            query, key = (self.features(nn.functional.normalize(x.to(wide), dim=-1)) for x in (q, k))
            value = torch.cat([v, torch.ones_like(v[..., :1])], -1).to(wide)
            pairs = key[..., :, None] * value[..., None, :]  # (B, Hkv, N, m, Dv + 1)
            pairs = pairs.repeat_interleave(group, 1)
            channels = pairs.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)  # (B m (Dv + 1), H, N)
            summed = long_conv(channels, self.kernel(q.shape[2]).to(wide), mode="same")
            memory = summed.unflatten(0, (len(q), -1)).permute(0, 2, 3, 1).unflatten(3, pairs.shape[3:])
            o, mass = (query[..., None, :] @ memory).squeeze(-2).split([v.shape[3], 1], -1)
        return (o / mass).to(q.dtype)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (w,) = (buffer.to(q.dtype) for buffer in dict(self.named_buffers()).values())
        (b,) = dict(self.named_parameters()).values()
        rows, group, far = [], q.shape[1] // k.shape[1], b.shape[1] // 2

        def phi(x: Tensor) -> Tensor:
            x = x / (x * x).sum(-1, keepdim=True) ** 0.5
            return torch.exp(x @ w.T - (x * x).sum(-1, keepdim=True) / 2) / len(w) ** 0.5

        for h in range(q.shape[1]):
            query, key = phi(q[:, h]), phi(k[:, h // group])
            for i in range(q.shape[2]):
                total, mass = torch.zeros(()).to(q), torch.zeros(()).to(q)
                for j in range(k.shape[2]):
                    at = min(max(j - i, -far), far) + far
                    weight = torch.exp(b[h, at]) * (query[:, i] * key[:, j]).sum(-1, keepdim=True)
                    total, mass = total + weight * v[:, h // group, j], mass + weight
                rows.append(total / mass)
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 13, {"num_features": 4, "reach": 20}),
            Case(Dims(4, 3, num_kv_heads=2), 11, {"reach": 4, "orthogonal": False}, batch=1),
            Case(Dims(1, 4), 7, {"seed": 3}, batch=3),
        ]

    @claim("The FFT gives what all weights e^b phi(q) . phi(k) give.")
    def fft_is_toeplitz(cls) -> Finding:
        layer, (q, k, v) = cls._sample(reach=200), cls._inputs(200)
        layer.bias.normal_(generator=torch.Generator().manual_seed(1))
        units = [layer.features(nn.functional.normalize(x, dim=-1)) for x in (q, k)]
        ahead = torch.arange(200) - torch.arange(200)[:, None]
        weights = units[0] @ units[1].mT * layer.bias[:, ahead + layer.reach].exp()
        dense = weights @ v / weights.sum(-1, keepdim=True)
        apart = float((layer(q, k, v) - dense).abs().max() / v.abs().max())
        return Finding(apart < 200 * torch.finfo(q.dtype).eps, f"largest difference {apart:.1e} of v at 200 tokens")

    @claim("Without biases it is linear attention with positive random features of the normalised queries and keys.")
    def no_bias(cls) -> Finding:
        layer, (q, k, v) = cls._sample(reach=3), cls._inputs(96)
        query, key = (nn.functional.normalize(x, dim=-1) for x in (q, k))
        plain = linear_attention(query, key, v, feature_map=layer.features, normalizer="sum", causal=False)
        apart = float((layer(q, k, v) - plain).abs().max() / v.abs().max())  # type: ignore[operator]
        return Finding(apart < 96 * torch.finfo(q.dtype).eps, f"largest difference {apart:.1e} of v at 96 tokens")

    @claim("The estimate of the kernel varies far less for queries and keys of length 1.")
    def normalised(cls) -> Finding:
        (q, k, _), spread = cls._inputs(32), []
        for one, other in ((q, k), [nn.functional.normalize(x, dim=-1) for x in (q, k)]):
            kernel = (one @ other.mT).exp()
            drawn = [PositiveRandomFeatures(8, num_features=16, seed=seed, scale=1.0) for seed in range(64)]
            found = torch.stack([features(one) @ features(other).mT for features in drawn])
            spread.append(float((found / kernel - 1).square().mean().sqrt()))
        figure = f"error {spread[1]:.2f} of the kernel at length 1, {spread[0]:.1f} at length {8**0.5:.1f}, 16 features"
        return Finding(spread[1] < spread[0] / 4, figure)

    @claim("The work is of order N log N.")
    def log_linear(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        def transform(x: torch.Size, *_: object, **__: object) -> float:
            return 2.5 * x.numel() * math.log2(x[-1])

        rules, work = {torch.ops.aten._fft_r2c: transform, torch.ops.aten._fft_c2r: transform}, []
        for length in (512, 1024, 2048):
            with FlopCounterMode(display=False, custom_mapping=rules) as counter:
                cls._sample()(*torch.ones(3, 1, 2, length, 8))
            work.append(counter.get_total_flops())
        holds = all(2 <= more / less < 2.3 for less, more in itertools.pairwise(work))
        return Finding(
            holds, f"{work[1] / work[0]:.2f} and {work[2] / work[1]:.2f} times the work at twice N, from 512"
        )

    @classmethod
    def _sample(cls, *, reach: int = 512) -> NprfRpe:
        return cls(Dims(2, 8), reach=reach, seed=0).double().requires_grad_(False)

    @staticmethod
    def _inputs(length: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 2, length, 8, generator=random, dtype=torch.float64).unbind()
