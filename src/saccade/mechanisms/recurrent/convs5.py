"""ConvS5: a linear recurrence over the frames of a video whose state is a map, read and written by convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import known, positive
from saccade.scan import affine, associative_scan

READOUTS = ("resnet", "standard")


def normal_hippo(size: int) -> tuple[Tensor, Tensor]:
    """The half of the eigenvalues of HiPPO-N that has no conjugate in it, (size / 2,), and their vectors in columns."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root, shift = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    normal = torch.diag(n) - torch.outer(root, root).tril() + torch.outer(shift, shift)
    turns, vectors = torch.linalg.eigh(normal.to(torch.complex128) * -1j)
    return torch.complex(normal.diagonal().mean().expand(size), turns)[: size // 2], vectors[:, : size // 2]


def he_normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device="cpu") * math.sqrt(2 / math.prod(shape[1:]))


def halves(t: Tensor) -> nn.Parameter:
    """Complex numbers as a trained pair, real and imaginary, in the default precision."""
    return nn.Parameter(torch.view_as_real(t).to(torch.get_default_dtype()))


class ConvSSM(nn.Module):
    """The recurrence: frames (B, T, C, Y, X) and the state before them -> frames alike and the state after them."""

    def __init__(self, dim: int, size: int, kernel: int) -> None:
        super().__init__()
        if size % 2 or kernel % 2 == 0:
            name, got, what = ("state", size, "even") if size % 2 else ("kernel", kernel, "odd")
            raise ValueError(f"{name}: got {got}; pass an {what} number")
        rates, vectors = normal_hippo(size)
        write = torch.einsum("sp,suij->puij", vectors.conj(), he_normal(size, dim, kernel, kernel).to(vectors))
        read = torch.einsum("sp,usij->upij", vectors, he_normal(dim, size, kernel, kernel).to(vectors))
        self.rates, self.write, self.read = halves(rates), halves(write), halves(read)
        self.log_step = nn.Parameter(torch.empty(size // 2).uniform_(math.log(0.001), math.log(0.1)))

    def forward(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(u.dtype, torch.float32)
        real, turn = self.rates.to(wide).unbind(1)
        rate = torch.complex(real.clamp(max=-1e-4), turn)
        decay = (rate * self.log_step.to(wide).exp()).exp()  # (P,)
        write = torch.view_as_complex(self.write.to(wide)) * ((decay - 1) / rate)[:, None, None, None]
        given = self.convolved(u, torch.cat([write.real, write.imag]).to(u.dtype)).to(wide)
        given = torch.complex(*given.chunk(2, 2))  # (B, T, P, Y, X)
        decays = decay[:, None, None].expand(u.shape[1], -1, 1, 1)
        first = None if state is None else (torch.ones_like(decays[:1]), state.unsqueeze(1))
        _, states = associative_scan(affine, (decays, given), dim=-4, initial=first)
        read = torch.cat([2 * self.read[..., 0], -2 * self.read[..., 1]], 1)
        y = self.convolved(torch.cat([states.real, states.imag], 2).to(u.dtype), read)
        return y, states[:, -1]

    @staticmethod
    def convolved(maps: Tensor, kernels: Tensor) -> Tensor:
        """Every frame by itself, as many pixels out as in."""
        return nn.functional.conv2d(maps.flatten(0, 1), kernels, padding="same").unflatten(0, maps.shape[:2])


class ConvS5(Mixer):
    """A ConvS5 layer: an S5 recurrence in time, whose input and output matrices are convolutions over the frame.

        X_t = exp(L dt) X_{t-1} + (exp(L dt) - 1) / L  B * U_t,   Y_t = 2 Re(C * X_t)
        x <- LN(x + gelu(Y + conv(gelu(GN(conv(gelu(GN(Y))))))))       readout = "resnet"
        x <- LN(x + gelu(GN(Y + conv(U))))                             "standard", where conv is D of the equations

    x (B, N, C): tokens of a row-major grid (T, Y, X), with U_t the frames -> (B, N, C); X_t complex, P = state / 2
    channels on the map of a frame, each with a decay of its own, which is a state kernel of 1 x 1; L (P,), real parts
    at most -1e-4; dt (P,) > 0; B, C: dense complex kernels, C -> P and P -> C channels; *, conv: 2-d convolutions of
    each frame, zeros beyond its border. GN, in `groups` groups of channels, is taken over a frame. No frame sees a
    later one. Initial values: L of HiPPO-N, B and C turned by its eigenvectors, dt from 0.001 to 0.1.
    Paper: arXiv 2310.19694. The recurrence, the layers around it, their order, gelu by tanh and initial values follow
    the authors' code (diagonal_ssm.py, diagonal_scans.py, layers.py, conv_ops.py).
    Deviations: He-normal numbers are not cut at two deviations.
    state: 2 P (default 256). kernel: taps a side of every convolution (3). groups: 32. readout: "resnet" (default) or
    "standard".
    Costs N kernel^2 C (2 state + 2 C) multiplications in the convolutions, or (2 state + C), and a scan in 2 log2 T + 1
    steps; P Y X complex numbers are what `frames(x, state)` needs to go on after any past.
    Errors: ValueError when dims.grid has not three axes, state is odd, kernel is even, or groups does not divide C.

    >>> layer, x = ConvS5(Dims(1, 8, grid=(5, 3, 4)), state=4, groups=2), torch.randn(1, 60, 8)
    >>> y, state = layer.frames(x[:, :24])
    >>> y.shape, state.shape, layer.frames(x[:, 24:], state)[0].shape
    (torch.Size([1, 24, 8]), torch.Size([1, 2, 3, 4]), torch.Size([1, 36, 8]))
    """

    spec = Spec(
        id="convs5",
        name="ConvS5",
        title="Convolutional State Space Models for Long-Range Spatiotemporal Modeling",
        paper="2310.19694",
        year=2023,
        family="recurrent",
        uses=("affine", "associative_scan"),
        grid=3,
    )

    def __init__(
        self, dims: Dims, *, state: int = 256, kernel: int = 3, groups: int = 32, readout: str = "resnet"
    ) -> None:
        super().__init__(dims)
        dim, self.groups, self.readout = dims.dim, positive("groups", groups), known("readout", readout, READOUTS)
        if dim % groups:
            raise ValueError(f"groups: got {groups} for {dim} channels; pass a divisor")
        self.ssm = ConvSSM(dim, positive("state", state), positive("kernel", kernel))
        count = 2 if readout == "resnet" else 1
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, kernel, padding="same") for _ in range(count))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, dim, eps=1e-6) for _ in range(count))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def frames(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Any number of frames (B, T Y X, C) after those that left `state` -> the same, and the state after them."""
        grid = self.dims.grid or ()
        u = x.unflatten(1, (-1, *grid[1:])).movedim(-1, 2)  # (B, T, C, Y, X)
        y, state = self.ssm(u, state)
        y, u = y.flatten(0, 1), u.flatten(0, 1)
        if self.readout == "resnet":
            h = y
            for norm, conv in zip(self.norms, self.convs, strict=True):
                h = conv(_gelu(norm(h)))
            y = _gelu(y + h)
        else:
            y = _gelu(self.norms[0](y + self.convs[0](u)))
        y = y.unflatten(0, (len(x), -1)).movedim(2, -1).flatten(1, 3)
        return self.norm(x + y), state

    def compute(self, x: Tensor) -> Tensor:
        return self.frames(x)[0]

    def oracle(self, x: Tensor) -> Tensor:
        w, (depth, height, width) = dict(self.named_parameters()), self.dims.grid or ()
        u = x.unflatten(1, (depth, height, width))

        def conv(t: Tensor, kernel: Tensor) -> Tensor:
            """t (B, Y, X, in), kernel (out, in, k, k); real or complex."""
            edge = kernel.shape[2] // 2
            around = nn.functional.pad(t, (0, 0, edge, edge, edge, edge))
            total = torch.zeros(())
            for i in range(kernel.shape[2]):
                for j in range(kernel.shape[3]):
                    total = total + around[:, i : i + height, j : j + width] @ kernel[..., i, j].T
            return total

        def group_norm(t: Tensor, name: str) -> Tensor:
            parts = t.unflatten(3, (self.groups, -1))
            apart = parts - parts.mean((1, 2, 4), keepdim=True)
            spread = apart.square().mean((1, 2, 4), keepdim=True)
            return (apart / (spread + 1e-6).sqrt()).flatten(3) * w[f"{name}.weight"] + w[f"{name}.bias"]

        def gelu(t: Tensor) -> Tensor:
            return t / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (t + 0.044715 * t**3)))

        wide = torch.promote_types(x.dtype, torch.float32)  # there are no complex numbers in bfloat16
        rate, write, read = (torch.complex(*w[f"ssm.{n}"].to(wide).unbind(-1)) for n in ("rates", "write", "read"))
        rate = torch.complex(rate.real.clamp(max=-1e-4), rate.imag)
        decay = (rate * w["ssm.log_step"].exp()).exp()
        memory, out = torch.zeros(()), []
        for frame in u.unbind(1):
            memory = decay * memory + (decay - 1) / rate * conv(frame.to(write), write)
            y = 2 * conv(memory, read).real.to(x)
            if self.readout == "resnet":
                h = y
                for i in range(2):
                    h = conv(gelu(group_norm(h, f"norms.{i}")), w[f"convs.{i}.weight"]) + w[f"convs.{i}.bias"]
                y = gelu(y + h)
            else:
                y = gelu(group_norm(y + conv(frame, w["convs.0.weight"]) + w["convs.0.bias"], "norms.0"))
            out.append(y)
        y = x + torch.stack(out, 1).flatten(1, 3)
        apart = y - y.mean(-1, keepdim=True)
        return apart / (apart.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"] + w["norm.bias"]

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(1, 6, grid=(5, 3, 4)), 60, {"state": 4, "groups": 2}),
            Case(
                Dims(2, 3, grid=(7, 2, 1)), 14, {"state": 6, "kernel": 5, "groups": 3, "readout": "standard"}, batch=1
            ),
            Case(Dims(1, 4, grid=(3, 1, 3)), 9, {"state": 2, "kernel": 1, "groups": 1}),
        ]

    @classmethod
    def sample(cls, grid: tuple[int, int, int], **params: Any) -> tuple[ConvS5, Tensor]:
        """A layer and frames for it, in float64."""
        module = cls(Dims(1, 4, grid=grid), groups=2, **{"state": 8, **params}).double().requires_grad_(False)
        return module, torch.randn(1, torch.Size(grid).numel(), 4, dtype=torch.float64)

    @claim("The parallel scan is the recurrence frame by frame, from any state, and no frame sees a later one.")
    def sequential(cls) -> Finding:
        module, x = cls.sample((13, 3, 4))
        start = torch.randn(1, 4, 3, 4, dtype=torch.complex128)
        whole, last = module.frames(x, start)
        state, rows = start, []
        for frame in x.split(12, 1):
            y, state = module.frames(frame, state)
            rows.append(y)
        error = float((torch.cat(rows, 1) - whole).abs().max())
        kept = torch.equal(module.frames(torch.cat([x[:, :60], -x[:, 60:]], 1), start)[0][:, :60], whole[:, :60])
        allowed = x.numel() * torch.finfo(x.dtype).eps * float(whole.abs().max())
        holds = error <= allowed and float((state - last).abs().max()) <= allowed * float(last.abs().max()) and kept
        return Finding(holds, f"largest difference {error:.1e}; 5 frames are the same bits whatever follows: {kept}")

    @claim("With kernels of 1 x 1 the recurrence is one S5, run at every pixel by itself.")
    def pixels(cls) -> Finding:
        module, x = cls.sample((11, 3, 4), kernel=1)
        u = x.unflatten(1, (11, 3, 4)).movedim(-1, 2)
        y, _ = module.ssm(u, None)
        rate = torch.complex(*module.ssm.rates.unbind(1))
        write, read = (torch.view_as_complex(t)[..., 0, 0] for t in (module.ssm.write, module.ssm.read))
        ago = torch.arange(11)[:, None] - torch.arange(11)
        decay = (rate * module.ssm.log_step.exp()).exp()
        powers = decay ** ago.clamp(min=0)[..., None] * (ago >= 0)[..., None]  # (T, T, P)
        impulse = torch.einsum("op,tsp,p,pi->tsoi", read, powers, (decay - 1) / rate, write)
        exact = 2 * torch.einsum("tsoi,bsiyx->btoyx", impulse.real, u)
        error, largest = float((y - exact).abs().max()), float(exact.abs().max())
        allowed = x.numel() * torch.finfo(x.dtype).eps * largest
        return Finding(error <= allowed, f"largest difference {error:.1e} of {largest:.2f} at 12 pixels")

    @claim("What a video leaves to go on from does not grow with its length.")
    def constant_state(cls) -> Finding:
        module, x = cls.sample((60, 3, 4))
        sizes = [module.frames(x[:, : 12 * frames])[1].numel() for frames in (1, 60)]
        return Finding(sizes == [48, 48], f"{sizes[0]} numbers after 1 frame, {sizes[1]} after 60")

    @claim("A frame spreads by one kernel on the way into the state and one out of it, however far back it lies.")
    def reach(cls) -> Finding:
        module, x = cls.sample((9, 9, 9))
        u, seen = x.unflatten(1, (9, 9, 9)).movedim(-1, 2), []
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(module.ssm(u.requires_grad_(), None)[0][0, 8, :, 4, 4].sum(), u)
        seen = [int(frame.ne(0).any(0).sum()) for frame in gradient[0]]
        return Finding(seen == [25] * 9, f"{min(seen)} to {max(seen)} of 81 pixels seen in each of 9 frames")


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")
