"""DiJiang: linear attention with features in the frequency domain, decaying by head, for pretrained transformers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, sample
from saccade.errors import known, positive
from saccade.hosts.constant import Constant
from saccade.scan import State, linear_attention
from saccade.scan.features import Map

FEATURES = ("softmax", "exp")


def dct(x: Tensor) -> Tensor:
    """The orthonormal cosine transform of the channels (DCT-II), by one Fourier transform.

        X_k = c_k sum_n x_n cos(pi (n + 1/2) k / D),   c_0 = D^(-1/2), c_k = (2 / D)^(1/2)

    x: (..., D), float32 or float64.

    >>> dct(torch.ones(4))
    tensor([2., 0., 0., 0.])
    """
    d = x.shape[-1]
    # Even channels forward and odd ones backward, so that D points do for the 4 D of the definition.
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    angle = torch.arange(d, device=x.device, dtype=x.dtype) * (math.pi / (2 * d))
    y = (2 / d) ** 0.5 * (spectrum.real * angle.cos() + spectrum.imag * angle.sin())
    return torch.cat([y[..., :1] / 2**0.5, y[..., 1:]], -1)


class Frequencies(nn.Module):
    """phi(x) = softmax(T C x), or D * exp(T C x) with D learned; T diagonal, drawn once, C the cosine transform."""

    scales: Tensor

    def __init__(self, head_dim: int, kind: str, seed: int | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.register_buffer("scales", torch.randn(head_dim, generator=generator))
        self.weight = nn.Parameter(torch.ones(head_dim)) if kind == "exp" else None

    def forward(self, x: Tensor) -> Tensor:
        y = dct(x) * self.scales.to(x.dtype)
        return y.softmax(-1) if self.weight is None else self.weight.to(x.dtype) * y.exp()


def log_horizons(num_heads: int) -> Tensor:
    """e (H,) in float64, the logarithms of 1 - gamma: from 1/32 to 1/512 in equal steps."""
    return torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads, dtype=torch.float64)


class Taught(nn.Module):
    """What a conversion of softmax attention trains: T, a diagonal a head of queries and of keys, and the decays.

        o_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij,   w_ij = gamma_h^(i - j) (phi(q_i) . phi'(k_j))
        phi(x) = softmax(T C x),   log gamma_h = log(1 - sigmoid(r_h))

    query (H, 1, D) and key (Hkv, 1, D), T as it is drawn once for all heads; rates r (H,), which start at the layer's
    decays. Deviations: the paper trains the whole model by its own loss, with T as drawn and decays that stay; weights
    are divided by their sum where the layer has a gate and a group norm, which a trained model has not; rotary
    positions stay in q and k. rate: of Adam at first.

    >>> Taught(Dims(2, 4)).log_decay.exp()
    tensor([0.9688, 0.9980], grad_fn=<ExpBackward0>)
    """

    rate = 3e-2

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        drawn = Frequencies(dims.head_dim, "softmax", 0).scales
        heads = dims.num_heads, dims.num_kv_heads
        self.query, self.key = (nn.Parameter(drawn.expand(h, 1, -1).clone()) for h in heads)
        self.rates = nn.Parameter(log_horizons(dims.num_heads).exp().logit().float())

    def feature_map(self) -> tuple[Map, Map]:
        def phi(scales: Tensor) -> Map:
            return lambda x: (dct(x) * scales.to(x.dtype)).softmax(-1)

        return phi(self.query), phi(self.key)

    @property
    def log_decay(self) -> Tensor:
        rates = self.rates
        return -F.softplus(rates if rates.dtype == torch.float64 else rates.float())

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, (n, d) = self.state_dict(keep_vars=True), q.shape[2:]
        basis = [[math.cos(math.pi * (i + 0.5) * f / d) * (2 / d) ** 0.5 for i in range(d)] for f in range(d)]
        basis[0] = [d**-0.5] * d
        cosines = torch.tensor(basis, dtype=q.dtype)
        rows = []
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            y, z = (q[:, h] @ cosines.T * w["query"][h]).exp(), (k[:, g] @ cosines.T * w["key"][g]).exp()
            y, z = y / y.sum(-1, keepdim=True), z / z.sum(-1, keepdim=True)
            gamma = 1 / (1 + w["rates"][h].exp())
            for i in range(n):
                ago = torch.arange(i, -1, -1, dtype=q.dtype)[:, None]
                a = (y[:, i, None] * z[:, : i + 1]).sum(-1, keepdim=True) * gamma**ago
                rows.append((a * v[:, g, : i + 1]).sum(1) / a.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])


class DiJiang(Mixer):
    """Linear attention on features of the cosine transform of queries and keys, decaying as retention does.

        o_i = sum_{j <= i} gamma_h^(i - j) (phi(q_i) . phi(k_j)) v_j,   y = W_o (silu(W_g x) * GN(o))
        "softmax": phi(x) = softmax(T C x)        "exp": phi(x) = w * exp(T C x)
        gamma_h = 1 - exp(e_h),   e_h from log 1/32 to log 1/512 in equal steps over the heads

    x, y (B, N, C); q, o (B, H, N, D), k, v (B, Hkv, N, D). C is the orthonormal cosine transform, T a fixed diagonal of
    normal numbers, the same for all heads, w (D,) learned. There is no denominator and no scale; GN normalises each
    head and has weights. Made for pretrained models, whose projections stay. Paper: arXiv 2403.19928, equations 9 to
    13, which give "exp"; everything else follows the authors' code, which has "softmax".
    Deviations: the code turns w into weights of every position and head, trained from gamma^i for queries and gamma^-j
    for keys, which overflow; here gamma^(i - j) keeps their first values, and any length is taken. Its transform is
    the inverse one. Its GroupNorm has D groups of H channels, which cut across heads, and leave nothing of a single
    head. The rotary positions of the models that it converts are left out. Shared key heads are ours.
    features: "softmax" (default) or "exp". seed: of T (default None: from torch's global generator). chunk: tokens a
    matrix product takes at once (64), of no effect on the result.
    Costs 2 D^2 + D log D + 2 chunk D a token and head, and a state of D^2 numbers a query head to decode.

    >>> DiJiang(Dims(num_heads=2, head_dim=4))(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="dijiang",
        name="DiJiang",
        title="DiJiang: Efficient Large Language Models through Compact Kernelization",
        paper="2403.19928",
        year=2024,
        family="linear",
        uses=("linear_attention",),
    )
    causal = True

    def __init__(self, dims: Dims, *, features: str = "softmax", seed: int | None = None, chunk: int = 64) -> None:
        super().__init__(dims)
        self.chunk = positive("chunk", chunk)
        seed = None if seed is None else positive("seed", seed, least=0)
        self.features = Frequencies(dims.head_dim, known("features", features, FEATURES), seed)
        c = dims.dim
        self.qkv = nn.Linear(c, c + 2 * dims.num_kv_heads * dims.head_dim)
        self.gate = nn.Linear(c, c, bias=False)
        nn.init.xavier_uniform_(self.gate.weight, gain=2**-2.5)
        self.norm = nn.GroupNorm(dims.num_heads, c)
        self.out = nn.Linear(c, c)
        self.decays = Constant(torch.log1p(-log_horizons(dims.num_heads).exp()).float())

    @classmethod
    def to_fit(cls, dims: Dims) -> Taught:
        """What a conversion of softmax attention trains in a layer: the features and decays of this one."""
        return Taught(dims)

    def read(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """o (B, H, N, D) and the memory after the last token."""
        read = linear_attention(
            *self.dims.split(self.qkv(x)),
            log_decay=self.decays.value,
            feature_map=self.features,
            state=state,
            return_state=True,
            cu_seqlens=cu_seqlens,
            chunk=self.chunk,
        )
        return cast(tuple[Tensor, State], read)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        o = o.transpose(1, 2).flatten(2)
        return self.out(F.silu(self.gate(x)) * self.norm(o.flatten(0, 1)).view_as(o))

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.mix(x, self.read(x, cu_seqlens=cu_seqlens)[0])

    def step(self, x: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        o, state = self.read(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d, n = dict(self.named_parameters()), self.dims, self.dims.head_dim
        scales = dict(self.named_buffers())["features.scales"].to(x.dtype)
        even = [h / max(1, d.num_heads - 1) for h in range(d.num_heads)]
        gammas = [1 - math.exp(math.log(1 / 32) * (1 - e) + math.log(1 / 512) * e) for e in even]
        decays = torch.tensor([math.log(gamma) for gamma in gammas])  # natural logs in float32, as all decays are
        y = x @ w["qkv.weight"].T + w["qkv.bias"]
        basis = [[math.cos(math.pi * (i + 0.5) * f / n) * (2 / n) ** 0.5 for i in range(n)] for f in range(n)]
        basis[0] = [n**-0.5] * n
        transform = scales[:, None] * torch.tensor(basis, dtype=x.dtype)

        def phi(z: Tensor) -> Tensor:
            z = (z @ transform.T).exp()
            return z * w["features.weight"] if "features.weight" in w else z / z.sum(-1, keepdim=True)

        gate = x @ w["gate.weight"].T
        rows, heads = [], [y[..., c * n : (c + 1) * n] for c in range(y.shape[2] // n)]
        for i in range(x.shape[1]):
            parts = []
            for h in range(d.num_heads):
                g = d.num_heads + h // d.group
                weights = (phi(heads[h][:, i, None]) * phi(heads[g][:, : i + 1])).sum(-1, keepdim=True)
                ago = torch.arange(i, -1, -1, dtype=torch.float64)[:, None]
                weights = weights * (decays[h].double() * ago).exp().to(x.dtype)
                o = (weights * heads[g + d.num_kv_heads][:, : i + 1]).sum(1)
                o = o - o.mean(-1, keepdim=True)
                parts.append(o / ((o * o).mean(-1, keepdim=True) + 1e-5) ** 0.5)
            o = torch.cat(parts, -1) * w["norm.weight"] + w["norm.bias"]
            o = o * gate[:, i] / (1 + torch.exp(-gate[:, i]))
            rows.append(o @ w["out.weight"].T + w["out.bias"])
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 7), 29, {"chunk": 8, "seed": 3}),
            Case(Dims(4, 6, num_kv_heads=2), 19, {"features": "exp", "chunk": 5}, batch=1),
            Case(Dims(1, 8), 13, batch=1),
        ]

    @claim("The cosine transform by a Fourier transform is the product with the orthonormal matrix.")
    def transform(cls) -> Finding:
        worst, eps = 0.0, torch.finfo(torch.float64).eps
        for d in (2, 7, 64, 97):
            n = torch.arange(d, dtype=torch.float64)
            matrix = (2 / d) ** 0.5 * (math.pi * (n + 0.5) * n[:, None] / d).cos()
            matrix[0] /= 2**0.5
            found = dct(torch.eye(d, dtype=torch.float64)).T
            away = max(float((a - b).abs().max()) for a, b in ((found, matrix), (found @ found.T, torch.eye(d))))
            worst = max(worst, away / (d * eps))
        return Finding(worst < 1, f"largest difference {worst:.2f} D eps at D = 2, 7, 64 and 97")

    @claim(
        "It is retention of phi(q) and phi(k): chunked as one token after another, with D^2 numbers a head for ever."
    )
    def is_retention(cls) -> Finding:
        off, sizes, n = 0.0, [], 70
        x = torch.randn(1, n, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for features in FEATURES:
            layer = cls._sample(Dims(3, 8), features=features, chunk=16)
            q, k, v = layer.qkv(x).unflatten(2, (9, 8)).transpose(1, 2).split(3, 1)
            memory, rows = 0.0, []
            steps = torch.linspace(math.log(1 / 32), math.log(1 / 512), 3, dtype=x.dtype)
            gammas = torch.log1p(-steps.exp()).float().to(x.dtype).exp()
            for i in range(n):
                memory = gammas[:, None, None] * memory + layer.features(k[:, :, i, :, None].mT).mT * v[:, :, i, None]
                rows.append((layer.features(q[:, :, i]).unsqueeze(-2) @ memory).squeeze(-2))
            dense = torch.stack(rows, 2)
            off = max(off, apart(layer.read(x)[0], dense))
            sizes += [layer.read(x[:, :m])[1].memory[0, 0].numel() for m in (1, n)]
        # The decays are kept in float32.
        allowed = n * torch.finfo(torch.float32).eps
        figure = f"largest difference {off:.1e} of the largest output; {sizes[0]} numbers, {sizes[1]} after {n} tokens"
        return Finding(off < allowed and set(sizes) == {64}, figure)

    @claim(
        "Untrained, softmax features follow the rows of softmax attention, and better than the paper's exponentials."
    )
    def follows_softmax(cls) -> Finding:
        found: dict[str, list[float]] = {features: [] for features in FEATURES}
        for seed in range(20):
            q, k = torch.randn(2, 1, 1, 64, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            exact = (q @ k.mT / 16**0.5).softmax(-1).flatten(0, 2)
            for features in FEATURES:
                phi = cls._sample(Dims(1, 16), features=features, seed=100 + seed).features
                pairs = (phi(q) @ phi(k).mT).flatten(0, 2)
                rows = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(pairs, exact, strict=True)]
                found[features].append(sum(rows) / len(rows))
        soft, plain = (torch.tensor(found[features]) for features in FEATURES)
        error = [float(x.std()) / len(x) ** 0.5 for x in (soft, plain, soft - plain)]
        figure = (
            f"correlation {soft.mean():.2f} +- {error[0]:.2f}, of exponentials {plain.mean():.2f} +- {error[1]:.2f}"
        )
        holds = float(plain.mean()) > 4 * error[1] and float((soft - plain).mean()) > 4 * error[2]
        return Finding(holds, figure)

    @classmethod
    def _sample(cls, dims: Dims, **params: Any) -> DiJiang:
        return sample(lambda: cls(dims, **params), 1)[0]
