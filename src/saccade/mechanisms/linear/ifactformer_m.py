"""IFactFormer-m: one kernel integral an axis of the grid, side by side, as a step that is taken again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import positive
from saccade.mix import pool_axis, rotary_rates, turn_halves


class Axis(nn.Module):
    """The kernel of one axis: tokens (B, N, C) -> A (B, H, length, length)."""

    def __init__(self, dims: Dims, axis: int, width: int) -> None:
        super().__init__()
        c = dims.dim
        self.grid, self.axis, self.num_heads, self.width = dims.grid or (), axis, dims.num_heads, width
        self.enter = nn.Linear(c, c, bias=False)
        self.norm, self.hidden, self.leave = nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.query, self.key = (nn.Linear(c, dims.num_heads * width, bias=False) for _ in range(2))
        for weight in (self.query.weight, self.key.weight):
            nn.init.xavier_uniform_(weight, gain=0.02)

    def turn(self, x: Tensor) -> Tensor:
        """x (B, H, length, width), its halves turned by the coordinate."""
        at = torch.linspace(0, 64, x.shape[2], dtype=torch.float64, device=x.device)
        return turn_halves(x, at[:, None] * rotary_rates(self.width // 2, device=x.device))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.hidden(self.norm(pool_axis(self.enter(x), self.grid, self.axis))).chunk(2, -1)
        profile = self.leave(F.gelu(gate) * value)
        q, k = (f(profile).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f in (self.query, self.key))
        return self.turn(q) @ self.turn(k).mT


class IFactFormerM(Mixer):
    """Parallel factorised attention: the kernel of every axis acts on the same values, and the results are joined.

        u <- u + F(u) / iterations,   iterations times with the same weights
        F(u) = W_2 gelu(W_1 IN([A_1 v, ..., A_D v])),  (A_a v)_i = sum_j A_a[i_a, j] v_(i with i_a = j),  v = W_v LN(u)
        A_a = (R q_a) (R k_a)^T,   q_a, k_a = W_q p_a, W_k p_a,   p_a = M(LN(mean over the other axes of W_p W_u LN(u)))

    u (B, N, C): a row-major grid of D axes -> (B, N, C); v (B, H, N, d), d = `width`; A_a (B, H, n_a, n_a) for n_a
    points on axis a, with q_a, k_a (B, H, n_a, E), E = multiplier d, and no softmax; M: W (gelu(W' x) * W'' x), with
    biases; R turns the halves of a head by 64 s 10000^(-2 i / E) at the coordinate s, from 0 to 1; IN: every channel of
    the D H d to mean 0 and variance 1 over the grid. Paper: arXiv 2412.18840; the layer follows the code of the model
    (EntropyXi/IFactFormer-m, where it works on two axes) and, for R and M, that of FactFormer, arXiv 2305.17560.
    Deviations: any number of axes; no mask of points outside the domain; the embedding of absolute positions, which the
    model adds once before the steps, belongs to the host.
    width: d (None: C). multiplier: 3. iterations: 10.
    Costs N H d sum_a n_a multiplications a step for the integrals, where a kernel on the whole grid takes N^2 H d.
    Errors: ValueError when dims has no grid, when multiplier width is odd, when heads are to share keys.

    >>> IFactFormerM(Dims(num_heads=2, head_dim=4, grid=(5, 7)), iterations=2)(torch.randn(1, 35, 8)).shape
    torch.Size([1, 35, 8])
    """

    spec = Spec(
        id="ifactformer_m",
        name="IFactFormer-m (parallel factorised attention)",
        title="Implicit factorized transformer approach to fast prediction of turbulent channel flows",
        paper="2412.18840",
        year=2024,
        family="linear",
        uses=("pool_axis", "turn_halves"),
        grid=(2, 3, 1),
    )

    def __init__(self, dims: Dims, *, width: int | None = None, multiplier: int = 3, iterations: int = 10) -> None:
        super().__init__(dims)
        c = dims.dim
        self.grid, self.width = dims.grid or (), c if width is None else positive("width", width)
        if positive("multiplier", multiplier) * self.width % 2:
            raise ValueError(f"width: got {self.width} with multiplier {multiplier}; their product must be even")
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims: got {dims.num_kv_heads} key heads; a kernel has a key for every query, pass none")
        self.iterations = positive("iterations", iterations)
        joined = dims.num_heads * self.width
        self.norm = nn.LayerNorm(c)
        self.value, self.enter = nn.Linear(c, joined, bias=False), nn.Linear(c, c, bias=False)
        axes = [Axis(dims, a, multiplier * self.width) for a in range(len(self.grid))]
        self.axes: Iterable[Axis] = nn.ModuleList(axes)  # type: ignore[assignment]
        self.merge = nn.Linear(len(self.grid) * joined, c, bias=False)
        self.out = nn.Linear(c, c, bias=False)

    def integrals(self, u: Tensor) -> Tensor:
        """A_a v for every axis, (B, N, D H d)."""
        u = self.norm(u)
        v, u = self.value(u).unflatten(2, (self.dims.num_heads, -1)).unflatten(1, self.grid), self.enter(u)
        found = []
        for a, axis in enumerate(self.axes):
            # (B, H, n_a, the other axes and d)
            along = v.movedim((-2, 1 + a), (1, 2))
            moved = (axis(u) @ along.flatten(3)).view_as(along).movedim((1, 2), (-2, 1 + a))
            found.append(moved.flatten(1, len(self.grid)).flatten(2))
        return torch.cat(found, 2)

    def rate(self, u: Tensor) -> Tensor:
        """F(u) (B, N, C)."""
        joined = self.integrals(u)
        normed = F.layer_norm(joined.mT, joined.shape[1:2]).mT
        return self.out(F.gelu(self.merge(normed)))

    def compute(self, x: Tensor) -> Tensor:
        for _ in range(self.iterations):
            x = x + self.rate(x) / self.iterations
        return x

    def oracle(self, x: Tensor) -> Tensor:
        w, d, grid, width = dict(self.named_parameters()), self.dims, self.grid, self.width
        places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))

        def normed(y: Tensor, name: str) -> Tensor:
            y = y - y.mean(-1, keepdim=True)
            return y / ((y * y).mean(-1, keepdim=True) + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]

        def gelu(y: Tensor) -> Tensor:
            return y * (1 + torch.erf(y / 2**0.5)) / 2

        def turned(y: Tensor) -> Tensor:
            half = y.shape[-1] // 2
            rates = torch.tensor([64 * 10000 ** (-i / half) for i in range(half)], dtype=y.dtype)
            angle = torch.arange(y.shape[1], dtype=y.dtype)[:, None] / max(1, y.shape[1] - 1) * rates
            one, two, cos, sin = y[..., :half], y[..., half:], angle.cos(), angle.sin()
            return torch.cat([cos * one - sin * two, sin * one + cos * two], -1)

        for _ in range(self.iterations):
            u, parts = normed(x, "norm"), []
            values, inner = (u @ w["value.weight"].T).split(width, -1), u @ w["enter.weight"].T
            for a, length in enumerate(grid):
                name, at = f"axes.{a}", places[:, a]
                inside = inner @ w[f"{name}.enter.weight"].T
                profile = torch.stack([inside[:, at == i].mean(1) for i in range(length)], 1)
                hidden = normed(profile, f"{name}.norm") @ w[f"{name}.hidden.weight"].T + w[f"{name}.hidden.bias"]
                hidden = gelu(hidden[..., : d.dim]) * hidden[..., d.dim :]
                profile = hidden @ w[f"{name}.leave.weight"].T + w[f"{name}.leave.bias"]
                others = [b for b in range(len(grid)) if b != a]
                aligned = (places[:, None, others] == places[None, :, others]).all(-1).to(x)
                rows = (profile @ w[f"{name}.{part}.weight"].T for part in ("query", "key"))
                for h, (q, k) in enumerate(zip(*(row.chunk(d.num_heads, -1) for row in rows), strict=True)):
                    kernel = torch.einsum("bic,bjc->bij", turned(q), turned(k))
                    parts.append((kernel[:, at][:, :, at] * aligned) @ values[h])
            y = torch.cat(parts, -1)
            y = y - y.mean(1, keepdim=True)
            y = y / ((y * y).mean(1, keepdim=True) + 1e-5) ** 0.5
            x = x + gelu(y @ w["merge.weight"].T) @ w["out.weight"].T / self.iterations
        return x

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"width": 4, "multiplier": 1, "iterations": 2}),
            Case(Dims(1, 4, grid=(2, 3, 4)), 24, {"width": 2, "iterations": 3}, batch=1),
            Case(Dims(2, 2, grid=(11,)), 11, {"multiplier": 2, "iterations": 1}),
            Case(Dims(1, 2, grid=(3, 1)), 3, batch=1),
        ]

    @claim("Before the norm, output weights split by axis make it sum_a (I x A_a x I) v W_a: a sum, not a product.")
    def kronecker_sum(cls) -> Finding:
        layer, u = cls._sample(grid=(3, 4, 5))
        inner = layer.enter(layer.norm(u))
        kernels = [axis(inner)[0, 0] for axis in layer.axes]
        one, two, three = (torch.eye(n, dtype=u.dtype) for n in (3, 4, 5))
        whole = [
            torch.kron(torch.kron(kernels[0], two), three),
            torch.kron(torch.kron(one, kernels[1]), three),
            torch.kron(torch.kron(one, two), kernels[2]),
        ]
        v, weights = layer.value(layer.norm(u))[0], layer.merge.weight.chunk(3, 1)
        exact = sum(a @ v @ weight.T for a, weight in zip(whole, weights, strict=True))
        apart = float(
            (layer.merge(layer.integrals(u))[0] - exact).abs().max() / layer.merge(layer.integrals(u)).abs().max()
        )
        layer.merge.weight.copy_(weights[0].repeat(1, 3))
        summed = (whole[0] + whole[1] + whole[2]) @ v @ weights[0].T
        equal = float((layer.merge(layer.integrals(u))[0] - summed).abs().max() / summed.abs().max())
        holds = max(apart, equal) < 60 * torch.finfo(u.dtype).eps
        return Finding(holds, f"largest difference {apart:.1e}; {equal:.1e} from the Kronecker sum for equal weights")

    @claim("A common factor of the kernels is taken out again by the norm, but for its epsilon.")
    def scale_free(cls) -> Finding:
        layer, u = cls._sample(grid=(5, 6))
        joined, before = layer.integrals(u), layer.rate(u)
        normed = F.layer_norm(joined.mT, (30,)).mT
        for axis in layer.axes:
            axis.query.weight.mul_(1000)
        after = F.layer_norm(layer.integrals(u).mT, (30,)).mT
        # 1 / sqrt(var + eps) is off by at most eps / (2 var).
        allowed = float(1e-5 / (2 * joined.var(1, correction=0).min()) + 30 * torch.finfo(u.dtype).eps)
        apart = float(((after - normed) / after.abs().amax()).abs().max())
        moved = float((layer.rate(u) - before).abs().max() / before.abs().max())
        figure = f"kernels times 1000 move what is normed by {apart:.1e} (at most {allowed:.1e}), F by {moved:.1e}"
        return Finding(apart <= allowed < 1, figure)

    @claim("The integrals cost N sum_a n_a, not N^2.")
    def cost(cls) -> Finding:
        from torch.utils.flop_counter import FlopCounterMode

        work = []
        for side in (8, 16):
            layer, u = cls._sample(grid=(side, side, side))
            inner = layer.enter(layer.norm(u))
            with FlopCounterMode(display=False) as all_of:
                layer.integrals(u)
            with FlopCounterMode(display=False) as rest:
                layer.value(inner), layer.enter(inner), [axis(inner) for axis in layer.axes]
            work.append(all_of.get_total_flops() - rest.get_total_flops())
        share = work[1] / (2 * 16**6 * 6)
        figure = (
            f"{work[1] / work[0]:g} times the work on a grid of 8 times the points, {share:.1%} of a whole kernel's"
        )
        return Finding(work == [2 * 6 * 3 * side**4 for side in (8, 16)], figure)

    @claim("One set of weights serves every number of steps, and more steps near the solution of du/dt = F(u).")
    def implicit(cls) -> Finding:
        ends, sizes = [], set()
        for iterations in (5, 10, 20, 40, 320):
            layer, u = cls._sample(grid=(5, 6), iterations=iterations)
            ends.append(layer(u))
            sizes.add(sum(p.numel() for p in layer.parameters()))
        errors = [float((end - ends[-1]).abs().max()) for end in ends[:-1]]
        ratios = [sooner / later for sooner, later in itertools.pairwise(errors)]
        figure = f"errors fall by {', '.join(f'{r:.2f}' for r in ratios)} a doubling, with {max(sizes)} parameters"
        return Finding(min(ratios) > 2**0.5 and len(sizes) == 1, figure)

    @classmethod
    @torch.no_grad()
    def _sample(cls, grid: tuple[int, ...], **params: Any) -> tuple[IFactFormerM, Tensor]:
        """A layer whose kernels are far from zero, which they begin near, and u (1, N, 6)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = cls(Dims(1, 6, grid=grid), **params).double().requires_grad_(False)
            for axis in layer.axes:
                axis.query.weight.mul_(50)
                axis.key.weight.mul_(50)
            return layer, torch.randn(1, torch.Size(grid).numel(), 6, dtype=torch.float64)
