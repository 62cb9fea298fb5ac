"""SUM: a state-space block of vision that a learned prompt, one for each kind of image, shifts and scales."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, work
from saccade.errors import positive
from saccade.mix import DepthwiseConv
from saccade.scan import GridScan, raster_orders


class SumSaliency(Mixer):
    """The conditional VSS block (C-VSS): scans in four ways, moved by five numbers that the kind of image gives.

        x + W_o ((LN(s) (1 + a_2) + b_2) * silu(z)),   s = (1 + a_3) sum_k scan_k(silu(DW(u)))
        [u; z] = W (LN(x) (1 + a_1) + b_1),   (b_1, a_1, b_2, a_2, a_3) = MLP(P_kind)

    x (B, N, C): tokens of a row-major grid (Y, X) -> (B, N, C); kind: int64 (B,), below `kinds`, by keyword (all zeros
    where none is given); P (kinds, prompt): learned; MLP: prompt -> prompt -> prompt / 2 -> 5 with GELU; its five
    numbers are the same for all channels; u, z, s (B, N, expand C); scan_k: selective scans by rows, by columns, and
    both backwards; DW: 3 x 3 depthwise convolution with bias. Without kinds it is the VSS block of VMamba's first form,
    the one in the paper's encoder.
    Paper: arXiv 2406.17815. The layers and the place of each number follow the authors' code (vmamba.py),
    whose kinds are natural scenes by mouse, natural scenes by eye, e-commerce and user interfaces, and whose
    decoder has a table and an MLP of its own in each block.
    Deviations: kinds are numbers, not vectors with one large entry.
    kinds: rows of P (default 4; 0: not conditional). prompt: their width (128). expand: inner channels over C (2).
    state: numbers a channel keeps in a scan (16).
    Costs 4 N expand C (C / 8 + 5 state) multiplications in the scans, beside the layers.
    Errors: ValueError when dims.grid has not two axes, or kind has another shape or dtype, is out of range, or is given
    to a block that knows none.

    >>> layer, x = SumSaliency(Dims(1, 8, grid=(5, 9))), torch.randn(2, 45, 8)
    >>> layer(x, kind=torch.tensor([0, 3])).shape
    torch.Size([2, 45, 8])
    """

    spec = Spec(
        id="sum_saliency",
        name="SUM",
        title="SUM: Saliency Unification through Mamba for Visual Attention Modeling",
        paper="2406.17815",
        year=2024,
        family="recurrent",
        uses=("DepthwiseConv", "GridScan", "raster_orders"),
        grid=2,
    )

    def __init__(self, dims: Dims, *, kinds: int = 4, prompt: int = 128, expand: int = 2, state: int = 16) -> None:
        super().__init__(dims)
        inner, width = positive("expand", expand) * dims.dim, positive("prompt", prompt, least=2)
        if positive("kinds", kinds, least=0):
            self.prompts = nn.Parameter(torch.randn(kinds, width))
            hidden = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width // 2), nn.GELU()]
            self.mlp = nn.Sequential(*hidden, nn.Linear(width // 2, 5))
        self.kinds, self.before = kinds, nn.LayerNorm(dims.dim)
        self.enter = nn.Linear(dims.dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, (3, 3), grid=dims.grid)
        self.scan = GridScan(inner, state=state, rank=-(-dims.dim // 16), orders=raster_orders(dims.grid or ()))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, dims.dim, bias=False)

    def moves(self, x: Tensor, kind: Tensor | None) -> tuple[Tensor, ...]:
        """b_1, a_1, b_2, a_2, a_3, each (B, 1, 1), or all of them one zero."""
        if not self.kinds:
            if kind is not None:
                raise ValueError("kind: got one for a block that has none; build it with kinds")
            return (x.new_zeros(()),) * 5
        kind = torch.zeros(len(x), dtype=torch.int64, device=x.device) if kind is None else kind
        if kind.dtype != torch.int64 or tuple(kind.shape) != (len(x),):
            raise ValueError(f"kind: got {kind.dtype} of shape {tuple(kind.shape)}; pass int64 ({len(x)},)")
        if kind.device.type == "cpu" and not 0 <= int(kind.min()) <= int(kind.max()) < self.kinds:
            raise ValueError(f"kind: got {kind.tolist()}; pass numbers from 0 to {self.kinds - 1}")
        return self.mlp(self.prompts)[kind][:, None, None].unbind(3)

    def compute(self, x: Tensor, *, kind: Tensor | None = None) -> Tensor:
        b1, a1, b2, a2, a3 = self.moves(x, kind)
        u, z = self.enter(self.before(x) * (1 + a1) + b1).chunk(2, -1)
        u = nn.functional.silu(self.conv(u))
        y = self.norm(self.scan(u) * (1 + a3)) * (1 + a2) + b2
        return x + self.leave(y * nn.functional.silu(z))

    def oracle(self, x: Tensor, *, kind: Tensor | None = None) -> Tensor:
        w, (height, width) = Weights(self), self.dims.grid or ()

        def silu(t: Tensor) -> Tensor:
            return t / (1 + (-t).exp())

        five = torch.zeros(len(x), 5, 1, 1)
        if self.kinds:
            p = w["prompts"][[0] * len(x) if kind is None else kind.tolist()]
            p = nn.functional.gelu(w.mlp(p, "mlp"))
            five = w.linear(p, "mlp.4")[..., None, None]
        b1, a1, b2, a2, a3 = five.to(x).unbind(1)
        u, z = w.linear(b1 + (1 + a1) * w.norm(x, "before"), "enter").chunk(2, -1)
        u = silu(w.conv(u.unflatten(1, (height, width)), "conv").flatten(1, 2))

        rows = list(range(height * width))
        columns = [a * width + b for b in range(width) for a in range(height)]
        ways = torch.tensor([rows, columns, rows[::-1], columns[::-1]])
        read, step, bias, log_rate, direct = (
            w[f"scan.{name}"] for name in ("read", "step", "bias", "log_rate", "direct")
        )
        met, size = u[:, ways], log_rate.shape[2]
        low, write, look = (met @ read.mT).split([step.shape[2], size, size], 3)
        delta = (1 + (low @ step.mT + bias[:, None]).exp()).log()
        h, total = torch.zeros(()), torch.zeros_like(u)
        for n in rows:
            kept, given = (-delta[:, :, n, :, None] * log_rate.exp()).exp(), delta[:, :, n] * met[:, :, n]
            h = kept * h + given[..., None] * write[:, :, n, None]
            total = total.index_add(1, ways[:, n], (h * look[:, :, n, None]).sum(-1) + direct * met[:, :, n])
        return x + w.linear(((1 + a2) * w.norm((1 + a3) * total, "norm") + b2) * silu(z), "leave")

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(1, 6, grid=(5, 4)), 20, {"kinds": 3, "prompt": 5, "expand": 1, "state": 3}),
            Case(Dims(2, 9, grid=(3, 5)), 15, {"kinds": 0, "expand": 3, "state": 2}, batch=1),
            Case(Dims(1, 4, grid=(1, 7)), 7),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int], **params: Any) -> tuple[SumSaliency, Tensor]:
        """A block and tokens of three images for it, in float64."""
        module = cls(Dims(1, 8, grid=grid), **params).double().requires_grad_(False)
        return module, torch.randn(3, grid[0] * grid[1], 8, dtype=torch.float64)

    @claim("With the five numbers at zero it is the VSS block without a condition.")
    def plain(cls) -> Finding:
        module, x = cls.sample((6, 7))
        vss, _ = cls.sample((6, 7), kinds=0)
        vss.load_state_dict({name: module.state_dict()[name] for name in vss.state_dict()})
        moved = float((module(x) - vss(x)).abs().max())
        for parameter in module.mlp[4].parameters():
            parameter.zero_()
        same = torch.equal(module(x), vss(x))
        return Finding(same and moved > 0, f"the same bit for bit: {same}; before, {moved:.2f} apart")

    @claim("Every image of a batch is moved by its own kind, as the equations say.")
    def conditioned(cls) -> Finding:
        module, x = cls.sample((4, 5))
        kind = torch.tensor([3, 0, 2])
        y, exact, other = module(x, kind=kind), module.oracle(x, kind=kind), module(x)
        error, moved = float((y - exact).abs().max()), (y - other).abs().amax((1, 2))
        allowed = x.numel() * torch.finfo(x.dtype).eps * float(y.abs().max())
        holds = error <= allowed < float(moved[[0, 2]].min()) and not bool(moved[1])
        apart = ", ".join(f"{float(by):.2f}" for by in moved)
        return Finding(holds, f"largest error {error:.1e}; kinds 3, 0 and 2 are {apart} away from kind 0")

    @claim("a_3 > -1 matters through the eps of the norm alone.")
    def scale(cls) -> Finding:
        module, x = cls.sample((6, 7))
        norm, u = module.norm, nn.functional.silu(module.enter(module.before(x)).chunk(2, -1)[0])
        s = module.scan(u)
        least, apart = s.var(-1, correction=0).min(), 0.0
        for a3 in (-0.9, 4.0, 1e4):
            apart = max(apart, float((norm(s * (1 + a3)) - norm(s)).abs().max() / norm(s).abs().max()))
        # 1 / sqrt(v + e) lies below 1 / sqrt(v) by less than e / (2 v) of it, and v is scaled by (1 + a_3)^2.
        allowed = float(norm.eps / (2 * least * (1 - 0.9) ** 2))
        return Finding(0 < apart <= allowed < 1, f"at most {apart:.1e} of the output, {allowed:.1e} allowed by eps")

    @claim("Four scans carry every pixel to every other, at a cost that grows as their number.")
    def support(cls) -> Finding:
        seen, costs = [], []
        for grid in ((6, 8), (12, 8)):
            module, x = cls.sample(grid, kinds=0)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(module(x.requires_grad_())[0, 20].sum(), x)
            seen.append(int(gradient[0].ne(0).any(1).sum()))
            costs.append(work(partial(module, x)).all)
        holds = seen == [48, 96] and costs[1] == 2 * costs[0]
        return Finding(holds, f"{seen[0]} of 48 and {seen[1]} of 96 seen, {costs[1] / costs[0]:g} times the products")
