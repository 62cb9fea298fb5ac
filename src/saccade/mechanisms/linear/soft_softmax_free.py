"""SOFT: Gaussian attention without softmax, of low rank through landmarks and a pseudo-inverse by Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import known, positive
from saccade.hosts.block import MLP
from saccade.hosts.resize import Reduce
from saccade.mix import depthwise_conv, to_map, to_tokens
from saccade.scan.linear_attention import full_precision, working_dtype


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2) of all pairs."""
    return (x @ y.mT - x.square().sum(-1, keepdim=True) / 2 - y.square().sum(-1)[..., None, :] / 2).exp()


class NewtonInverse:
    """(A + 0.01 I)^-1 of symmetric A >= 0 in some steps of X <- 2 X - X A X; gradients are those of an inverse."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, a: Tensor) -> Tensor:
        with torch.no_grad():
            start = 1.8 / a.sum(-1).amax(-1)[..., None, None].square()
            ridged = a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            x = start * ridged
            for _ in range(self.steps):
                x = 2 * x - x @ ridged @ x
        return x - x @ (a - a.detach()) @ x


class SoftSoftmaxFree(Mixer):
    """The SOFT block: x <- LN(x + SOFT(x)), x <- LN(x + MLP(x)), where attention is a Gaussian kernel of low rank.

        SOFT(x) = W_o (P A^+ P^T V + DW(V)) + w_o,   P = g(Q, L),   A = g(L, L),   g(a, b) = exp(-|a - b|^2 / 2)
        Q = (W_q x + w_q) / D^(1/4),   V = W_v x + w_v,   L = gelu(LN(Conv_{r x r, stride r}(Q)))

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); queries are the keys: Q, V (B, H, N, D); L (B, H, m,
    D): m = ceil(Y / r) ceil(X / r) landmarks, from a convolution D -> D that the heads share, so that they need not lie
    near the tokens; P (N, m), A (m, m); DW: a kernel a head on the map of V. A^+ approaches (A + 0.01 I)^-1:

        X_0 = 1.8 / (max_i sum_j A_ij)^2 (A + 0.01 I),   X <- 2 X - X (A + 0.01 I) X,   `steps` times

    Small eigenvalues are not reached in so few steps, which regularises further. Gradients are those of an inverse,
    dA = -X^T G X^T, not of the steps. With norm="symmetric" (SOFT++) A^+ is replaced by E A^+ E, E = diag(A 1)^(-1/2).
    No row sums to 1. Paper: arXiv 2207.03341 (and 2110.11945, without the norm); the layers, the start and
    0.01 follow the authors' code (softmax_free_transformer.py, inverse.py). It has r = 8, 4, 2 and DW of 9, 5, 3 in
    three stages, and softmax with a class token in a fourth, which no host here has: there is no `model`.
    Deviations: under SOFT++ the code has no 0.01, one start for the whole batch and gradients of the steps; here both
    share one inverse. A map that r does not divide is filled with zeros, where the code drops the rest. Heads may share
    values.
    stride: r (default 8). kernel: side of DW (9; 0: none). steps: 20. norm: "none" (default) or "symmetric". mlp_ratio:
    hidden width of the MLP, with tanh's gelu, over C (8).
    Costs 2 N m D multiplications a head and direction, and 2 m^3 a step; m grows with N unless r does.
    Errors: ValueError when dims.grid has not two axes, or kernel is even and not 0.

    >>> layer = SoftSoftmaxFree(Dims(2, 4, grid=(6, 9)), stride=3, kernel=3)
    >>> layer(torch.randn(1, 54, 8)).shape, layer.landmarks(torch.randn(1, 2, 54, 4)).shape
    (torch.Size([1, 54, 8]), torch.Size([1, 2, 6, 4]))
    """

    spec = Spec(
        id="soft_softmax_free",
        name="SOFT / SOFT++ (softmax-free)",
        title="Softmax-free Linear Transformers",
        paper="2207.03341",
        year=2022,
        family="linear",
        uses=("depthwise_conv",),
        grid=2,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        stride: int = 8,
        kernel: int = 9,
        steps: int = 20,
        norm: str = "none",
        mlp_ratio: int = 8,
    ) -> None:
        super().__init__(dims)
        d, self.grid = dims, dims.grid or ()
        self.symmetric = known("norm", norm, ("none", "symmetric")) == "symmetric"
        if positive("kernel", kernel, least=0) % 2 == 0 and kernel:
            raise ValueError(f"kernel: got {kernel}, which has no centre; pass an odd size, or 0 for none")
        self.inverse = NewtonInverse(positive("steps", steps))
        self.query, self.value = nn.Linear(d.dim, d.dim), nn.Linear(d.dim, d.num_kv_heads * d.head_dim)
        self.out = nn.Linear(d.dim, d.dim)
        self.mark = Reduce(d.head_dim, d.head_dim, positive("stride", stride), bias=False)
        self.mark_norm = nn.LayerNorm(d.head_dim)
        bound = 1 / max(1, kernel)
        local = torch.empty(d.num_heads, 1, kernel, kernel).uniform_(-bound, bound)
        self.local = nn.Parameter(local) if kernel else None
        self.norms = nn.ModuleList(nn.LayerNorm(d.dim) for _ in range(2))
        self.mlp = MLP(d.dim, positive("mlp_ratio", mlp_ratio), nn.GELU(approximate="tanh"))

    def landmarks(self, q: Tensor) -> Tensor:
        """L (B, H, m, D) of Q (B, H, N, D)."""
        marks = to_tokens(self.mark(to_map(q.flatten(0, 1), self.grid)))
        return nn.functional.gelu(self.mark_norm(marks)).unflatten(0, q.shape[:2])

    def read(self, q: Tensor, marks: Tensor, v: Tensor, inverse: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """P A^+ P^T V (B, H, N, D), in the dtype of q."""
        dtype = q.dtype
        with full_precision(q):
            q, marks, v = (x.to(working_dtype(x)) for x in (q, marks, v))
            pairs, among = gaussian(q, marks), gaussian(marks, marks)
            gathered = pairs.mT @ v
            scale = among.sum(-1, keepdim=True).rsqrt() if self.symmetric else 1.0
            return (pairs @ (scale * ((inverse or self.inverse)(among) @ (scale * gathered)))).to(dtype)

    def attend(self, x: Tensor) -> Tensor:
        d = self.dims
        q = self.query(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2) * d.head_dim**-0.25
        v = self.value(x).unflatten(2, (-1, d.head_dim)).transpose(1, 2).repeat_interleave(d.group, 1)
        o, values = (y.transpose(1, 2).flatten(2) for y in (self.read(q, self.landmarks(q), v), v))
        if self.local is not None:
            o = o + depthwise_conv(values, self.grid, self.local.repeat_interleave(d.head_dim, 0))
        return self.out(o)

    def compute(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attend(x))
        return self.norms[1](x + self.mlp(x))

    def oracle(self, x: Tensor) -> Tensor:
        w, d, (height, width) = Weights(self), self.dims, self.grid

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            apart = a[:, :, None] - b[:, None]
            return torch.exp(-(apart * apart).sum(-1) / 2)

        queries, values, mark = w.linear(x, "query"), w.linear(x, "value"), w["mark.conv.weight"]
        stride, found = mark.shape[-1], []
        rows, columns = -(-height // stride), -(-width // stride)
        for h in range(d.num_heads):
            mine, shared = (slice(at * d.head_dim, (at + 1) * d.head_dim) for at in (h, h // d.group))
            q, v = queries[..., mine] / d.head_dim**0.25, values[..., shared]
            filled = (0, 0, 0, columns * stride - width, 0, rows * stride - height)
            image, cells = nn.functional.pad(q.reshape(len(x), height, width, -1), filled), []
            for top in range(0, rows * stride, stride):
                for left in range(0, columns * stride, stride):
                    cell = image[:, top : top + stride, left : left + stride]
                    cells.append(torch.einsum("byxc,ocyx->bo", cell, mark))
            marks = w.norm(torch.stack(cells, 1), "mark_norm")
            marks = marks / 2 * (1 + torch.erf(marks / 2**0.5))
            p, a = kernel(q, marks), kernel(marks, marks)
            still = a.detach()
            ridged = still + torch.eye(a.shape[1]).to(a) / 100
            inverse = 1.8 / still.sum(-1).amax(-1)[:, None, None] ** 2 * ridged
            for _ in range(self.inverse.steps):
                inverse = 2 * inverse - inverse @ ridged @ inverse
            inverse = inverse - inverse @ (a - still) @ inverse
            if self.symmetric:
                share = a.sum(-1) ** -0.5
                inverse = share[:, :, None] * inverse * share[:, None]
            o = p @ inverse @ (p.mT @ v)
            if "local" in w:
                taps, reach = w["local"][h, 0], w["local"].shape[-1] // 2
                around = nn.functional.pad(v.reshape(len(x), height, width, -1), (0, 0, reach, reach, reach, reach))
                local = torch.zeros_like(around[:, :height, :width])
                for i in range(len(taps)):
                    for j in range(len(taps)):
                        local = local + taps[i, j] * around[:, i : i + height, j : j + width]
                o = o + local.flatten(1, 2)
            found.append(o)
        x = w.norm(x + w.linear(torch.cat(found, -1), "out"), "norms.0")
        hidden = w.linear(x, "mlp.0")
        hidden = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        return w.norm(x + w.linear(hidden, "mlp.2"), "norms.1")

    @classmethod
    def cases(cls) -> list[Case]:
        every = {"stride": 2, "kernel": 3, "steps": 7, "norm": "symmetric", "mlp_ratio": 2}
        return [
            Case(Dims(2, 4, grid=(5, 7)), 35, every),
            Case(Dims(4, 3, num_kv_heads=2, grid=(4, 6)), 24, {"stride": 4, "kernel": 0, "mlp_ratio": 1}, batch=1),
            Case(Dims(1, 5, grid=(5, 3)), 15, {"stride": 3}),
        ]

    @claim("With all tokens as landmarks and the exact inverse it is Gaussian attention itself.")
    def exact_at_all_tokens(cls) -> Finding:
        layer, (q, v) = cls._layer(), cls._inputs()
        among = gaussian(q, q)
        exact = among @ v
        error = float((layer.read(q, q, v, torch.linalg.inv) - exact).abs().max() / exact.abs().max())
        condition = float(torch.linalg.cond(among).max())
        figure = f"largest difference {error:.1e} of the output, condition {condition:.1f}"
        return Finding(error < 36 * condition * torch.finfo(q.dtype).eps, figure)

    @claim(
        "Newton's steps approach (A + 0.01 I)^-1, from its large eigenvalues on: few of them leave a regularised one."
    )
    def newton(cls) -> Finding:
        marks = 0.3 * cls._inputs()[0]  # near to one another
        a = gaussian(marks, marks)
        exact = torch.linalg.inv(a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype))
        norms = [float(torch.linalg.matrix_norm(NewtonInverse(n)(a), 2).max()) for n in (5, 10, 20, 40)]
        end, full = NewtonInverse(40)(a), float(torch.linalg.matrix_norm(exact, 2).max())
        apart = float((end - exact).abs().max() / exact.abs().max())
        condition = float(torch.linalg.cond(exact).max())
        rising = norms[0] < norms[1] < norms[2] <= norms[3] * (1 + condition * torch.finfo(a.dtype).eps)
        holds = rising and apart < 36 * condition * torch.finfo(a.dtype).eps
        figure = (
            f"largest eigenvalue {', '.join(f'{n:.1f}' for n in norms)} after 5, 10, 20, 40 steps, {full:.1f} exact"
        )
        return Finding(holds, f"{figure}; {apart:.1e} off after 40")

    @claim("Its gradients are those of the inverse, though no graph holds the steps.")
    def gradients_of_an_inverse(cls) -> Finding:
        a = gaussian(*2 * [cls._inputs()[0]])
        weight = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
        with torch.enable_grad():
            a.requires_grad_()
            (found,) = torch.autograd.grad((NewtonInverse(40)(a) * weight).sum(), a)
            exact = torch.linalg.inv(a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype))
            (slope,) = torch.autograd.grad((exact * weight).sum(), a)
        apart = float((found - slope).abs().max() / slope.abs().max())
        allowed = 36 * float(torch.linalg.cond(exact.detach()).max()) ** 2 * torch.finfo(a.dtype).eps
        return Finding(apart < allowed, f"largest difference {apart:.1e} of the largest gradient")

    @claim("The symmetric norm lowers the norm of the attention matrix, without a bound of 1.")
    def spectral_norm(cls) -> Finding:
        norms = []
        for norm in ("none", "symmetric"):
            layer = cls(Dims(1, 4, grid=(12, 12)), stride=4, norm=norm).double().requires_grad_(False)
            q = torch.randn(1, 1, 144, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 100
            weights = layer.read(q, q[:, :, :9], torch.eye(144, dtype=q.dtype)[None, None])
            norms.append(float(torch.linalg.matrix_norm(weights, 2)))
        plain, symmetric = norms
        figure = f"norm {plain:.1f}, symmetric {symmetric:.1f} for 144 nearly equal tokens and 9 landmarks"
        return Finding(1 < symmetric < plain, figure)

    @claim("With the landmarks fixed the work is linear in the tokens.")
    def linear_work(cls) -> Finding:
        layer, marks = cls(Dims(1, 8, grid=(8, 8))).requires_grad_(False), torch.ones(1, 1, 49, 8)
        tokens = (torch.ones(1, 1, length, 8) for length in (0, 512, 1024))
        costs = [work(partial(layer.read, each, marks, each)).all for each in tokens]
        ratio = (costs[2] - costs[0]) / (costs[1] - costs[0])
        share = (costs[2] - costs[0]) / (4 * 1024**2 * 8)
        figure = f"{ratio:.2f} times the work at twice N beside the inverse, {share:.2f} of dense at 1024"
        return Finding(ratio == 2 and share < 1, figure)

    @classmethod
    def _layer(cls) -> SoftSoftmaxFree:
        return cls(Dims(1, 8, grid=(6, 6))).double().requires_grad_(False)

    @staticmethod
    def _inputs() -> tuple[Tensor, Tensor]:
        q, v = torch.randn(2, 1, 1, 36, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return q, v
