"""Kernelized Transformer: linear attention by random features whose frequencies come from a learned spectrum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.contract import Attention, Case, Dims, Finding, Spec, apart, claim, sample
from saccade.errors import known, positive
from saccade.scan import State, Sum, linear_attention


class Spectrum(nn.Module):
    """Frequencies w, a set a key head or one for all; `noise` is what they are drawn with."""

    noise: Tensor

    def __init__(self, dims: Dims, noise: Tensor) -> None:
        super().__init__()
        self.groups = dims.num_kv_heads
        self.register_buffer("noise", noise)

    def forward(self) -> Tensor:
        """(heads or 1, M, D)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def project(self, x: Tensor) -> Tensor:
        """w . x for x (B, heads, N, D): (B, heads, N, M)."""
        return (x.unflatten(1, (self.groups, -1)) @ self().to(x.dtype).mT[:, None]).flatten(1, 2)


class Gaussian(Spectrum):
    """eps S + mu and eps S - mu, a pair of Gaussians a head: (heads, 2 draws, D) for eps (draws, D)."""

    def __init__(self, dims: Dims, draws: int) -> None:
        heads, d = dims.num_kv_heads, dims.head_dim
        super().__init__(dims, torch.randn(draws, d))
        self.mean = nn.Parameter(torch.empty(heads, d).uniform_(-(d**-0.5), d**-0.5))
        self.spread = nn.Parameter(torch.stack([nn.init.xavier_uniform_(torch.empty(d, d)) for _ in range(heads)]))

    def forward(self) -> Tensor:
        drawn = self.noise @ self.spread
        return torch.cat([drawn + self.mean[:, None], drawn - self.mean[:, None]], 1)


class Generator(Spectrum):
    """What a network makes of noise, the same in every head: (1, draws, D)."""

    def __init__(self, dims: Dims, draws: int) -> None:
        d = dims.head_dim
        widths = [max(1, d // 2), 2 * d, 4 * d]
        super().__init__(dims, torch.randn(draws, widths[0]))
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            layers += [nn.Linear(into, out), nn.BatchNorm1d(out), nn.LeakyReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], d), nn.Tanh())
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self) -> Tensor:
        return self.network(self.noise)[None]


class FastFood(Spectrum):
    """The D rows of V = S H G P H B / sqrt(D), S, G, B learned diagonals, P the order of the noise."""

    def __init__(self, dims: Dims, draws: int) -> None:
        d = dims.head_dim
        if d & (d - 1):
            raise ValueError(f'dims.head_dim: got {d} with spectrum="fastfood"; Hadamard matrices need a power of 2')
        super().__init__(dims, torch.randn(d))
        self.outer, self.middle, self.inner = (nn.Parameter(torch.randn(d) * d**-0.5) for _ in range(3))

    def project(self, x: Tensor) -> Tensor:
        outer, middle, inner = (p.to(x.dtype) for p in (self.outer, self.middle, self.inner))
        mixed = hadamard(x * inner)[..., self.noise.argsort()]
        return hadamard(mixed * middle) * outer * x.shape[-1] ** -0.5


def hadamard(x: Tensor) -> Tensor:
    """The unnormalised Walsh-Hadamard transform along the last axis."""
    width = 1
    while width < x.shape[-1]:
        one, other = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([one + other, one - other], -2).flatten(-3)
        width *= 2
    return x


SPECTRA: dict[str, Callable[[Dims, int], Spectrum]] = {
    "gaussian": Gaussian,
    "generator": Generator,
    "fastfood": FastFood,
}


class SpectralFeatures(nn.Module):
    """phi of the learned kernel, x (B, heads, N, D) -> (B, heads, N, F); see `KernelizedTransformer`."""

    def __init__(self, dims: Dims, spectrum: str, features: str, draws: int, smoothing: float) -> None:
        super().__init__()
        self.features, self.smoothing = features, smoothing
        self.spectrum: Spectrum = SPECTRA[spectrum](dims, draws)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        u = self.spectrum.project(x)
        if self.features == "fourier":
            phi = torch.cat([u.cos(), u.sin()], -1)
        else:
            phi = (u - x.square().sum(-1, keepdim=True)).exp()
        phi = phi * u.shape[-1] ** -0.5
        if self.smoothing:
            phi = torch.cat([phi, torch.full_like(phi[..., :1], self.smoothing)], -1)
        return phi


class KernelizedTransformer(Attention):
    """Linear attention by a learned kernel: random features whose frequencies follow a spectrum that is trained.

        o_i = sum_j phi(q_i) . phi(k_j) v_j / (sum_j phi(q_i) . phi(k_j) + 1e-6),   j <= i when causal
        phi(x) = M^(-1/2) [cos(w_1 . x'), ..., sin(w_M . x'), M^(1/2) c],   x' = x / D^(1/4)
        phi(x) = M^(-1/2) [exp(w_1 . x' - |x'|^2), ..., exp(w_M . x' - |x'|^2), M^(1/2) c]       (positive features)

    q (B, H, N, D), k (B, Hkv, M', D), v (B, Hkv, M', Dv) -> o (B, H, N, Dv), M' = N when causal. The frequencies w are
    "gaussian": eps S + mu and eps S - mu with S (D, D) and mu (D,) learned in each key head, eps Gaussian, 2 draws in
    all; "generator": G(eps), G a network D / 2 - 2 D - 4 D - D shared by the heads, with batch normalisation, leaky
    relus and a tanh at the end; "fastfood": the D rows of S H G P H B / sqrt(D), H Hadamard, S, G, B diagonal and
    learned, P a random permutation, in D log D steps. eps and P are drawn anew in every call when training, and stay
    otherwise, and between steps. Fourier features may be negative, so that a row could divide by nearly 0; the constant
    c adds c^2 to the kernel against that. Paper: arXiv 2110.08323; spectra, start, eps and c follow the authors' code
    (OnLearningTheKernel: mix-gauss-fourier, generative-fourier, fsgb-fastfood and the positive ones).
    Deviations: phi . phi + c^2 is 1 + c^2 for one x under Fourier features, where the code's Gaussian features make it
    2 + c^2; positive Gaussian features have both signs of mu and a full S, there one sign and a diagonal S; the mixture
    of several attentions (mix-gauss-alacarte) is left out. Heads may share keys, and then share the kernel.
    causal: False. spectrum: "gaussian" (default), "generator" or "fastfood". features: "fourier" or "positive"
    ("fourier"). draws: of eps (None: D // 2, at least 1; not for "fastfood"). smoothing: c (None: 0.36 for Gaussian and
    1 for other Fourier features, 0 for positive ones).
    Costs F (D + Dv) a token and head; F = 2 M for Fourier and M for positive features, M = 2 draws, draws or D. A state
    of F (Dv + 1) numbers a key head to decode, F one more with a c.
    Errors: ValueError for draws with "fastfood", a head_dim that is no power of 2 with it, smoothing < 0, and for
    M' != N when causal, and for a step when not.

    >>> layer = KernelizedTransformer(Dims(num_heads=2, head_dim=4))
    >>> tuple(layer(*torch.randn(3, 1, 2, 9, 4)).shape)
    (1, 2, 9, 4)
    """

    spec = Spec(
        id="kernelized_transformer",
        name="Kernelized Transformer (learned spectral kernel)",
        title="On Learning the Transformer Kernel",
        paper="2110.08323",
        year=2021,
        family="linear",
        uses=("linear_attention", "Sum"),
    )
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        causal: bool = False,
        spectrum: str = "gaussian",
        features: str = "fourier",
        draws: int | None = None,
        smoothing: float | None = None,
    ) -> None:
        super().__init__(dims)
        known("spectrum", spectrum, SPECTRA)
        known("features", features, ("fourier", "positive"))
        if draws is not None and spectrum == "fastfood":
            raise ValueError(f'draws: got {draws} with spectrum="fastfood", which has head_dim frequencies; pass None')
        draws = max(1, dims.head_dim // 2) if draws is None else positive("draws", draws)
        if smoothing is None:
            smoothing = 0.0 if features == "positive" else 0.36 if spectrum == "gaussian" else 1.0
        if not smoothing >= 0:
            raise ValueError(f"smoothing: got {smoothing}; pass a number >= 0")
        self.causal = causal
        self.phi = SpectralFeatures(dims, spectrum, features, draws, smoothing)

    def redraw(self) -> None:
        """Draw eps, or P, anew."""
        # Not in place: earlier calls may still wait for their gradients.
        self.phi.spectrum.noise = torch.randn_like(self.phi.spectrum.noise)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if self.training:
            self.redraw()
        o = linear_attention(
            q, k, v, feature_map=self.phi, normalizer=Sum(1e-6), causal=self.causal, cu_seqlens=cu_seqlens
        )
        return cast(Tensor, o)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("causal: got False; only with causal=True it decodes token by token")
        after = linear_attention(q, k, v, feature_map=self.phi, normalizer=Sum(1e-6), state=state, return_state=True)
        return cast(tuple[Tensor, State], after)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = {name.removeprefix("phi.spectrum."): p for name, p in self.named_parameters()}
        buffers = {name.removeprefix("phi.spectrum."): p for name, p in self.named_buffers()}
        noise, d, group = buffers["noise"], q.shape[3], q.shape[1] // k.shape[1]

        def normed(x: Tensor, name: str) -> Tensor:
            mean, variance = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
            return (x - mean) / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]

        def frequencies(head: int) -> Tensor:
            if "mean" in w:
                drawn = noise @ w["spread"][head]
                return torch.cat([drawn + w["mean"][head], drawn - w["mean"][head]])
            if "outer" in w:
                h = torch.ones(1, 1, dtype=q.dtype)
                while len(h) < d:
                    h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
                p = torch.eye(d, dtype=q.dtype)[noise.argsort()]
                return w["outer"].diag() @ h @ w["middle"].diag() @ p @ h @ w["inner"].diag() / d**0.5
            x = noise
            for layer in (0, 3, 6):
                x = x @ w[f"network.{layer}.weight"].T + w[f"network.{layer}.bias"]
                if layer < 6:
                    x = normed(x, f"network.{layer + 1}")
                    x = torch.where(x > 0, x, x / 100)
            return torch.tanh(x)

        def phi(x: Tensor, omega: Tensor) -> Tensor:
            x = x / d**0.25
            u = x @ omega.T
            if self.phi.features == "fourier":
                found = torch.cat([torch.cos(u), torch.sin(u)], -1)
            else:
                found = torch.exp(u - (x * x).sum(-1, keepdim=True))
            return torch.cat([found / len(omega) ** 0.5, torch.full_like(x[..., :1], self.phi.smoothing)], -1)

        rows = []
        for h in range(q.shape[1]):
            omega = frequencies(h // group)
            query, key, value = phi(q[:, h], omega), phi(k[:, h // group], omega), v[:, h // group]
            for i in range(q.shape[2]):
                seen = slice(i + 1) if self.causal else slice(None)
                weights = (query[:, i, None] * key[:, seen]).sum(-1, keepdim=True)
                rows.append((weights * value[:, seen]).sum(1) / (weights.sum(1) + 1e-6))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(
                Dims(4, 3, num_kv_heads=2),
                13,
                {"causal": True, "features": "positive", "draws": 4, "smoothing": 0.5},
                batch=1,
            ),
            Case(Dims(2, 5), 13, {"smoothing": 1.0}),
            Case(Dims(2, 6), 11, {"spectrum": "generator", "draws": 5, "smoothing": 1.5}),
            Case(Dims(2, 4), 11, {"spectrum": "fastfood"}),
        ]

    @claim("phi(x) . phi(y) is the spectrum's mean of cos(w . (x - y)): exp(-|S (x - y)|^2 / 2) cos(mu . (x - y)).")
    def learned_kernel(cls) -> Finding:
        x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        layer = cls._layer(draws=100_000, smoothing=0.0)
        phi = [layer.phi(z[None, None, None])[0, 0, 0] for z in (x, y)]
        between, spread, mean = (x - y) / 8**0.25, *layer._gaussian()
        exact = float((-(spread @ between).square().sum() / 2).exp() * (mean @ between).cos())
        found, draws = float(phi[0] @ phi[1]), 100_000
        terms = phi[0].unflatten(0, (2, 2, draws)) * phi[1].unflatten(0, (2, 2, draws)) * 2 * draws
        error = float(terms.sum(0).mean(0).std()) / draws**0.5
        figure = f"{found:.4f} +- {error:.4f} of {draws} draws, the kernel is {exact:.4f}"
        # Four standard errors; the kernel without mu, or without S, is further off.
        other = abs(exact - float((mean @ between).cos()))
        return Finding(abs(found - exact) < 4 * error < other, figure)

    @claim("The error of the kernel falls as 1 / sqrt(draws).")
    def error_falls(cls) -> Finding:
        random = torch.Generator().manual_seed(1)
        x, errors, counts = torch.randn(1, 1, 24, 8, generator=random, dtype=torch.float64), [], (16, 1024)
        between = (x[0, 0, :, None] - x[0, 0]) / 8**0.25
        for count in counts:
            layer = cls._layer(draws=count, smoothing=0.0)
            spread, mean = layer._gaussian()
            exact = (-(between @ spread.T).square().sum(-1) / 2).exp() * (between @ mean).cos()
            wrong = []
            for seed in range(16):
                layer.phi.spectrum.noise.normal_(generator=torch.Generator().manual_seed(seed))
                phi = layer.phi(x)[0, 0]
                wrong.append((phi @ phi.T - exact).square().mean())
            errors.append(float(torch.stack(wrong).mean() ** 0.5))
        rate = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
        figure = f"error {errors[0]:.3f} at {counts[0]} draws, {errors[1]:.4f} at {counts[1]}: draws^-{rate:.2f}"
        return Finding(0.45 < rate < 0.55, figure)

    @claim("Gradients reach every parameter of every spectrum through the draw; the memory gives what all pairs give.")
    def trained(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 1, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
        least, off, count = math.inf, 0.0, 0
        for spectrum in ("gaussian", "generator", "fastfood"):
            for features in ("fourier", "positive"):
                layer = cls._layer(spectrum=spectrum, features=features)
                weights = layer.phi(q) @ layer.phi(k).mT
                dense = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
                with torch.enable_grad():
                    o = layer.requires_grad_()(q, k, v)
                    slopes = torch.autograd.grad(o.square().sum(), list(layer.parameters()))
                off = max(off, apart(o, dense))
                least = min(least, *(float(slope.abs().max()) for slope in slopes))
                count += len(slopes)
        holds = least > 0 and off < 64 * torch.finfo(q.dtype).eps
        return Finding(holds, f"least of {count} gradients {least:.1e}; largest difference {off:.1e} of the output")

    def _gaussian(self) -> tuple[Tensor, Tensor]:
        """S (D, D) and mu (D,) of the first head."""
        spectrum = cast(Gaussian, self.phi.spectrum)
        return spectrum.spread[0], spectrum.mean[0]

    @classmethod
    def _layer(cls, **params: Any) -> KernelizedTransformer:
        return sample(lambda: cls(Dims(1, 8), **params), 1)[0]
