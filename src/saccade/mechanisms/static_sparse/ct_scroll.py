"""CT-Scroll: attention to all slices of a volume, then to those before, then to those after, as a reader scrolls."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim, reached
from saccade.errors import positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.where import Band, Full, Pattern, Window


class GeGlu(nn.Module):
    """x (B, N, C) -> a GELU(b), where (a, b) = W x, W (2 C, C) without bias; no projection follows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, -1)
        return a * nn.functional.gelu(b)


class CtScroll(Mixer):
    """A scrolling unit: three pre-norm blocks in series, global, one-sided backwards, one-sided forwards.

        x <- x + MHSA(LN x; S),  x <- x + GeGLU(LN x)        for S = all j, then i - w < j <= i, then i <= j < i + w
        GeGLU(x) = a * GELU(b),  (a, b) = W x

    x (B, N, C): one token for three neighbouring axial slices, in their order -> (B, N, C). Windows are cut at the ends
    of the sequence. There is no position embedding: all that is known of the order comes from the two windows. In the
    paper N = 80, C = 512, 8 heads; a ResNet makes the tokens, their mean is classified. Paper: arXiv 2503.20652
    (global-local attention); the order of the blocks, which side comes first, the cut windows and GeGLU without an
    output projection follow the authors' code (attention.py, mlp.py).
    Deviations: no dropout in the attention (0.1 in training there); heads may share keys.
    window: w, the token itself included (default 16). depth: units in series, each with weights of its own (1).
    Costs N^2 + 2 N w pairs a unit and head, and 6 N C^2 beside the projections of the attention. Errors: ValueError or
    TypeError for sizes that are no positive integers.

    >>> scroll = CtScroll(Dims(4, 8), window=3)
    >>> scroll(torch.randn(2, 11, 32)).shape
    torch.Size([2, 11, 32])
    """

    spec = Spec(
        id="ct_scroll",
        name="CT-Scroll",
        title="Imitating Radiological Scrolling: A Global-Local Attention Model for 3D Chest CT Volumes Multi-Label "
        "Anomaly Classification",
        paper="2503.20652",
        year=2025,
        family="static_sparse",
        uses=("attend", "Window", "Band"),
    )

    def __init__(self, dims: Dims, *, window: int = 16, depth: int = 1) -> None:
        super().__init__(dims)
        self.window = positive("window", window)
        self.blocks = nn.ModuleList()
        for _ in range(positive("depth", depth)):
            for pattern in (Full(), *self.local()):
                mixer = AttentionMixer(partial(attend, where=pattern), dims=dims)
                self.blocks.append(Block(dims, mixer, mlp=GeGlu(dims.dim)))

    def local(self) -> tuple[Pattern, Pattern]:
        """What the second and the third block see."""
        return Window(self.window), Band(0, self.window - 1)

    def compute(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def oracle(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        d, n = self.dims, x.shape[1]
        apart = torch.arange(n)[:, None] - torch.arange(n)
        masks = (apart < n, (apart >= 0) & (apart < self.window), (apart <= 0) & (apart > -self.window))

        def norm(y: Tensor, name: str) -> Tensor:
            spread = (y - y.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-5
            return (y - y.mean(-1, keepdim=True)) / spread.sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        for at in range(len({name.split(".")[1] for name in weights})):
            own = f"blocks.{at}"
            y = norm(x, f"{own}.norm_mixer") @ weights[f"{own}.mixer.qkv.weight"].T + weights[f"{own}.mixer.qkv.bias"]
            heads = y.view(*y.shape[:2], -1, d.head_dim)
            mixed = []
            for h in range(d.num_heads):
                key = d.num_heads + h // (d.num_heads // d.num_kv_heads)
                scores = heads[:, :, h] @ heads[:, :, key].mT / d.head_dim**0.5
                p = scores.masked_fill(~masks[at % 3], -torch.inf).softmax(-1)
                mixed.append(p @ heads[:, :, key + d.num_kv_heads])
            x = x + torch.cat(mixed, -1) @ weights[f"{own}.mixer.out.weight"].T + weights[f"{own}.mixer.out.bias"]
            a, b = (norm(x, f"{own}.norm_mlp") @ weights[f"{own}.mlp.proj.weight"].T).split(d.dim, -1)
            x = x + a * b * (1 + torch.erf(b / 2**0.5)) / 2
        return x

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4), 23, {"window": 5}),
            Case(Dims(4, 4, 2), 13, {"window": 1, "depth": 2}, batch=1),
            Case(Dims(3, 2), 7, {"window": 11}),
        ]

    @claim("The local masks are each other's transposes, with N w - w (w - 1) / 2 pairs: 18.1 % at N = 80, w = 16.")
    def masks(cls) -> Finding:
        before, after = (p.dense(80)[0] for p in cls(Dims(8, 4)).local())
        pairs = int(before.sum())
        holds = torch.equal(before.T, after) and pairs == 80 * 16 - 16 * 15 // 2
        return Finding(holds, f"{pairs} of 6400 pairs ({pairs / 6400:.1%})")

    @classmethod
    def _read(cls, blocks: slice, window: int, token: int) -> list[int]:
        """Tokens of 61 that output `token` depends on through some of the three blocks."""
        module = cls(Dims(2, 4), window=window).double()
        part, x = nn.Sequential(*list(module.blocks)[blocks]), torch.randn(1, 61, 8, dtype=torch.float64)
        return reached(part, x, (0, token, 0))[0].nonzero()[:, 0].tolist()

    @claim("The two local blocks together reach exactly w - 1 tokens either way; with the global one, all.")
    def reach(cls) -> Finding:
        back, ahead, both, whole = (
            cls._read(part, 6, 30) for part in (slice(1, 2), slice(2, 3), slice(1, 3), slice(3))
        )
        holds = back == list(range(25, 31)) and ahead == list(range(30, 36)) and whole == list(range(61))
        holds &= both == list(range(25, 36))
        figure = f"at w = 6 token 30 reads {back[0]}-{back[-1]}, {ahead[0]}-{ahead[-1]}, both {both[0]}-{both[-1]}"
        return Finding(holds, f"{figure}, with the global block {whole[0]}-{whole[-1]} of 0-60")

    @claim("The global block does not know the order of its tokens; the local ones do.")
    def order(cls) -> Finding:
        module, x = cls(Dims(2, 4), window=4).double(), torch.randn(1, 29, 8, dtype=torch.float64)
        shuffled = torch.randperm(29)
        with torch.no_grad():
            apart = [block(x)[:, shuffled] - block(x[:, shuffled]) for block in module.blocks]
        moved = [float(one.abs().max()) for one in apart]
        small = 64 * torch.finfo(torch.float64).eps * float(x.abs().max())
        figure = (
            f"shuffled tokens change the outputs by {moved[0]:.1e} globally, {moved[1]:.1e} and {moved[2]:.1e} locally"
        )
        return Finding(moved[0] < small < min(moved[1:]), figure)
