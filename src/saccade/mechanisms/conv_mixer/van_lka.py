"""Large kernel attention (VAN): a wide depthwise convolution, made of two small ones, gates the tokens that it saw."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, reached, work
from saccade.errors import positive
from saccade.mix import DepthwiseConv


class VanLka(Mixer):
    """Large kernel attention: pixels gated by a large convolution, made of three small ones.

        u = GELU(W1 x + b1),   a = W3 DW_d(DW(u)) + b3,   y = W2 (u * a) + b2 + x

    x, u, a, y (B, N, C): tokens of a row-major grid (Y, X); DW: depthwise convolution of 2d - 1 taps an axis; DW_d: of
    ceil(K / d) taps that are d tokens apart, both biased and zero outside the grid; W1, W2, W3 (C, C). No softmax, no
    sigmoid, no norm: a itself is the gate.
    Paper: arXiv 2202.09741, section 3.1; the biases, the order and the inner shortcut follow the authors' code, where x
    is the already normed input.
    Deviations: the batch norm before, the layer scale and the MLP of the block belong to the host; 1 x 1 convolutions
    are linear layers.
    kernel: K, tokens an axis of the kernel that is decomposed (default 21); ceil(K / d) must be odd. dilation: d
    (default 3).
    Costs N C (3 C + (2d - 1)^2 + ceil(K / d)^2) multiplications.
    Errors: ValueError when dims.grid has not two axes, or ceil(kernel / dilation) is even.

    >>> y = VanLka(Dims(num_heads=2, head_dim=4, grid=(5, 7)))(torch.randn(1, 35, 8))
    >>> tuple(y.shape)
    (1, 35, 8)
    """

    spec = Spec(
        id="van_lka",
        name="VAN (Large Kernel Attention)",
        title="Visual Attention Network",
        paper="2202.09741",
        year=2022,
        family="conv_mixer",
        uses=("depthwise_conv",),
        grid=2,
    )

    def __init__(self, dims: Dims, *, kernel: int = 21, dilation: int = 3) -> None:
        super().__init__(dims)
        self.grid = dims.grid or ()
        near, far = 2 * positive("dilation", dilation) - 1, -(-positive("kernel", kernel) // dilation)
        if far % 2 == 0:
            raise ValueError(
                f"kernel: got {kernel} with dilation {dilation}, {far} taps; ceil(kernel / dilation) must be odd"
            )
        self.enter, self.leave = nn.Linear(dims.dim, dims.dim), nn.Linear(dims.dim, dims.dim)
        self.near = DepthwiseConv(dims.dim, (near, near))
        self.far = DepthwiseConv(dims.dim, (far, far), dilation=dilation)
        self.across = nn.Linear(dims.dim, dims.dim)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # one row of a weight has as many entries as an input channel has outgoing edges
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)

    def attention(self, u: Tensor) -> Tensor:
        """The gate (B, N, C) that tokens u (B, N, C) make for themselves."""
        return self.across(self.far(self.near(u, self.grid), self.grid))

    def compute(self, x: Tensor) -> Tensor:
        u = nn.functional.gelu(self.enter(x))
        return self.leave(u * self.attention(u)) + x

    def oracle(self, x: Tensor) -> Tensor:
        (height, width), weights = self.grid, dict(self.named_parameters())

        def convolve(u: Tensor, name: str, dilation: int) -> Tensor:
            weight, taps = weights[f"{name}.weight"], range(weights[f"{name}.weight"].shape[2])
            reach = dilation * (len(taps) - 1) // 2
            padded = u.new_zeros(len(u), height + 2 * reach, width + 2 * reach, u.shape[-1])
            padded[:, reach : reach + height, reach : reach + width] = u.reshape(len(u), height, width, -1)
            total = weights[f"{name}.bias"].expand(len(u), height, width, -1)
            for i in taps:
                for j in taps:
                    top, left = dilation * i, dilation * j
                    total = total + weight[:, 0, i, j] * padded[:, top : top + height, left : left + width]
            return total.reshape(u.shape)

        def across(u: Tensor, name: str) -> Tensor:
            return torch.einsum("bnc,dc->bnd", u, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

        u = across(x, "enter")
        u = u * (1 + torch.erf(u / 2**0.5)) / 2
        # The dilated kernel has ceil(K / d) taps, and the other 2d - 1, from which d follows.
        dilation = (weights["near.weight"].shape[2] + 1) // 2
        return across(u * across(convolve(convolve(u, "near", 1), "far", dilation), "across"), "leave") + x

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, {"kernel": 9, "dilation": 2}),
            Case(Dims(1, 5, grid=(13, 11)), 143, batch=1),
        ]

    @claim("One gate sees exactly 23 x 23 tokens, without holes (K = 21, d = 3).")
    def support(cls) -> Finding:
        module = cls(Dims(1, 3, grid=(29, 31))).double()
        u = torch.randn(1, 29 * 31, 3, dtype=torch.float64)
        seen = reached(module.attention, u, (0, 14 * 31 + 15)).view(29, 31)
        inside = torch.zeros_like(seen)
        inside[14 - 11 : 14 + 12, 15 - 11 : 15 + 12] = True
        rows, columns = (int(seen.any(axis).sum()) for axis in (1, 0))
        return Finding(torch.equal(seen, inside), f"{int(seen.sum())} tokens in {rows} x {columns}")

    @claim("An output channel has 25 + 49 + C weights, a dense 21 x 21 kernel 441 C; the work is linear in the tokens.")
    def weights_and_work(cls) -> Finding:
        found = []
        for height in (9, 18):
            module = cls(Dims(2, 8, grid=(height, 7)))
            found.append(work(functools.partial(module, torch.randn(1, height * 7, 16))).all)
        weights = sum(layer.weight.numel() for layer in (module.near, module.far, module.across)) // 16
        holds = weights == 25 + 49 + 16 and found[1] == 2 * found[0]
        return Finding(
            holds,
            f"{weights} weights against {441 * 16} at C = 16; {found[1] / found[0]:.3f} times the work at twice N",
        )

    @claim("Without biases the gated tokens u * a(u) are quadratic: twice the input gives four times the output.")
    def quadratic(cls) -> Finding:
        module = cls(Dims(1, 5, grid=(7, 11))).double()  # its biases begin at zero
        u = torch.randn(1, 77, 5, dtype=torch.float64)
        with torch.no_grad():
            once, twice = u * module.attention(u), 2 * u * module.attention(2 * u)
        figure = f"largest difference from 4: {float((twice / once - 4).abs().max()):.1e}"
        return Finding(torch.equal(twice, 4 * once), figure)  # powers of two scale without rounding
