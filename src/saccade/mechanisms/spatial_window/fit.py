"""FIT: layers within groups of tokens, layers on a few latents of each group over all groups, and ways to and fro."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, Weights, claim, reached, weighed, work
from saccade.errors import per_axis, positive
from saccade.hosts.block import AttentionMixer, Block
from saccade.mix import cut_windows, join_windows
from saccade.where import BlockBand, Causal, Pattern

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class Real(nn.Module):
    """Biases that hide the filling of groups, for attention whose heads are groups times heads: (T H, n, m)."""

    filled: Tensor

    def __init__(self, real: Tensor, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.register_buffer("filled", ~real, persistent=False)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        hidden = self.filled[:, None, None, k_pos].expand(-1, self.num_heads, len(q_pos), -1).flatten(0, 1)
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


class Within(nn.Module):
    """Attention in each group, q (B T, H, n, D), k, v (B T, H, m, D); real (T, m): which keys are no filling."""

    def __init__(self, real: Tensor, num_heads: int, where: Pattern | None = None) -> None:
        super().__init__()
        self.num_groups, self.where = len(real), where
        self.bias = None if bool(real.all()) else Real(real, num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.bias is None:
            return attend(q, k, v, self.where)
        q, k, v = (x.unflatten(0, (-1, self.num_groups)).flatten(1, 2) for x in (q, k, v))
        y = attend(q, k, v, self.where, bias=self.bias)
        return y.unflatten(1, (self.num_groups, -1)).flatten(0, 1)


class Over(nn.Module):
    """Attention over the keys of a pattern."""

    def __init__(self, where: Pattern | None) -> None:
        super().__init__()
        self.where = where

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.where)


class Cross(nn.Module):
    """x + W attention(W_q LN x, W_k LN y, W_v LN y), as wide as the narrower of the two; x (B, n, C), y (B, m, C')."""

    def __init__(self, dims: Dims, source: Dims, attention: nn.Module) -> None:
        super().__init__()
        heads = min(dims.num_heads, source.num_heads)
        self.head_dim, self.attention = min(dims.dim, source.dim) // heads, attention
        self.norm, self.norm_source = Norm(dims.dim), Norm(source.dim)
        self.q, self.kv = nn.Linear(dims.dim, heads * self.head_dim), nn.Linear(source.dim, 2 * heads * self.head_dim)
        self.out = nn.Linear(heads * self.head_dim, dims.dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, kv = self.q(self.norm(x)), self.kv(self.norm_source(y))
        q, k, v = (t.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in (q, *kv.chunk(2, 2)))
        return x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Fit(Mixer):
    """Far-reaching interleaved transformer layers: local, read, global, write, local, and so on.

        x_t <- x_t + P,   then for each "(a)b" of layers
        x_t <- a times block(x_t)                                                  in each group by itself
        l_t <- l_t + softmax(Q(l_t) K(x_t)^T / sqrt(D)) V(x_t)                     read (b > 0)
        l   <- b times block(l)                                                    the latents of all groups
        x_t <- x_t + softmax(Q(x_t) K(l_t)^T / sqrt(D)) V(l_t)                     write, but after the last "(a)b"

    x (B, N, C): tokens of a row-major grid -> (B, N, C); x_t (n, C): group t of T, a window of the grid; P (n, C):
    learned, the same for all groups; l_t (m, C'): latents, which start as learned vectors of their own for each group;
    block: x + MHSA(LN x), then x + MLP(LN x). Q, K and V of read and write are projections of LN of their arguments,
    with the lesser of both widths and of both numbers of heads, and a projection follows; all have biases.
    causal: tokens see earlier ones of their group, latents those of earlier groups and of their own, and the write of
    group t reads the latents of group t - 1 (zeros for t = 0); those of its own know its end.
    Paper: arXiv 2305.12689; norms, widths and the shift follow the authors' code (transformers.py: FIT, FITAR).
    Deviations: the embedding before and the norms behind are the host's. The code refuses N that groups do not divide;
    here the last groups are filled with tokens that nobody sees.
    group: tokens of a group on each axis, one number or one an axis (default 16). latents: m (16). layers: as above
    ("(1)1(1)"; "(2)4" ends with the latents, which `encode` gives). latent_dim: C' (None: C). latent_heads: heads of
    the latents (None: as the tokens). mlp_ratio: hidden width of the MLPs over the width (4). causal: on one axis
    (False).
    Costs T n^2 pairs a local layer, (T m)^2 a global one, N m a read or write, each times the width; of the order of
    N^(4/3) for n of the order of N^(1/3).
    Errors: ValueError when layers cannot be read, heads do not divide latent_dim or share keys, dims.grid is None, or
    has more axes than one for causal.

    >>> layer = Fit(Dims(2, 4, grid=(9, 12)), group=4, latents=3, layers="(1)1(1)")
    >>> layer(torch.randn(1, 108, 8)).shape, layer.encode(torch.randn(1, 108, 8))[1].shape
    (torch.Size([1, 108, 8]), torch.Size([1, 9, 3, 8]))
    """

    spec = Spec(
        id="fit",
        name="FIT (Far-reaching Interleaved Transformers)",
        title="FIT: Far-reaching Interleaved Transformers",
        paper="2305.12689",
        year=2023,
        family="spatial_window",
        uses=("attend", "BlockBand", "Causal", "cut_windows", "join_windows"),
        grid=(2, 1, 3),
    )

    def __init__(
        self,
        dims: Dims,
        *,
        group: int | Sequence[int] = 16,
        latents: int = 16,
        layers: str = "(1)1(1)",
        latent_dim: int | None = None,
        latent_heads: int | None = None,
        mlp_ratio: int = 4,
        causal: bool = False,
    ) -> None:
        super().__init__(dims)
        if dims.num_kv_heads != dims.num_heads:
            raise ValueError(f"dims.num_kv_heads: got {dims.num_kv_heads} for {dims.num_heads} heads; pass as many")
        if causal and len(dims.grid or ()) != 1:
            raise ValueError(f"causal: got True for the grid {dims.grid}; pass a grid of one axis, (N,)")
        if not isinstance(layers, str) or not re.fullmatch(r"(\(\d+\)[1-9]\d*)*\(\d+\)\d*", layers):
            raise ValueError(f'layers: got {layers!r}; pass local layers in brackets and global ones, as "(2)4(2)"')
        self.stages = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", layers)]
        width = positive("latent_dim", dims.dim if latent_dim is None else latent_dim)
        heads = positive("latent_heads", dims.num_heads if latent_heads is None else latent_heads)
        if width % heads:
            raise ValueError(f"latent_heads: got {heads} for {width} channels; pass a divisor")
        own, self.causal, self.latent_heads = Dims(heads, width // heads), causal, heads
        self.group = per_axis("group", group, len(dims.grid or ()))
        ones = cut_windows(torch.ones(1, torch.Size(dims.grid or ()).numel(), 1), dims.grid or (), self.group)
        real, count = ones[0, :, :, 0] > 0, positive("latents", latents)
        self.place = nn.Parameter(torch.empty(real.shape[1], dims.dim))
        self.table = nn.Parameter(torch.empty(len(real), count, width))
        for parameter in (self.place, self.table):
            nn.init.trunc_normal_(parameter, std=0.02)
        block = functools.partial(Block, mlp_ratio=mlp_ratio, norm=Norm)
        local = Within(real, dims.num_heads, Causal() if causal else None)
        over = Over(BlockBand(count, None) if causal else None)
        self.local, self.across = nn.ModuleList(), nn.ModuleList()
        for a, b in self.stages:
            self.local.append(nn.Sequential(*(block(dims, AttentionMixer(local, dims=dims)) for _ in range(a))))
            self.across.append(nn.Sequential(*(block(own, AttentionMixer(over, dims=own)) for _ in range(b))))
        num_reads = sum(b > 0 for _, b in self.stages)
        seen = Within(real, min(heads, dims.num_heads))
        self.reads = nn.ModuleList(Cross(own, dims, seen) for _ in range(num_reads))
        self.writes = nn.ModuleList(Cross(dims, own, Over(None)) for _ in range(len(self.stages) - 1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, N, C) and the latents (B, T, m, C') at the end."""
        tokens = cut_windows(x, self.dims.grid or (), self.group) + self.place
        shape, latents = tokens.shape[:2], self.table.expand(len(x), -1, -1, -1)
        tokens = tokens.flatten(0, 1)
        for at, (_, globally) in enumerate(self.stages):
            tokens = self.local[at](tokens)
            if globally:
                latents = self.reads[at](latents.flatten(0, 1), tokens).unflatten(0, shape).flatten(1, 2)
                latents = self.across[at](latents).unflatten(1, self.table.shape[:2])
            if at < len(self.writes):
                tokens = self.writes[at](tokens, self.known(latents).flatten(0, 1))
        return join_windows(tokens.unflatten(0, shape), self.dims.grid or (), self.group), latents

    def known(self, latents: Tensor) -> Tensor:
        """The latents that each group may read, (B, T, m, C')."""
        if not self.causal:
            return latents
        return torch.cat([torch.zeros_like(latents[:, :1]), latents[:, :-1]], 1)

    def compute(self, x: Tensor) -> Tensor:
        return self.encode(x)[0]

    def oracle(self, x: Tensor) -> Tensor:
        w, heads, own, size = Weights(self), self.dims.num_heads, self.latent_heads, self.group
        grid = self.dims.grid or ()

        def block(t: Tensor, name: str, num: int, hidden: Tensor | None) -> Tensor:
            q, k, v = w.linear(w.norm(t, f"{name}.norm_mixer", 1e-6), f"{name}.mixer.qkv").chunk(3, -1)
            t = t + w.linear(weighed(q, k, v, t.shape[-1] // num, hidden), f"{name}.mixer.out")
            return t + w.mlp(w.norm(t, f"{name}.norm_mlp", 1e-6), f"{name}.mlp")

        def cross(t: Tensor, source: Tensor, name: str) -> Tensor:
            k, v = w.linear(w.norm(source, f"{name}.norm_source", 1e-6), f"{name}.kv").chunk(2, -1)
            q = w.linear(w.norm(t, f"{name}.norm", 1e-6), f"{name}.q")
            return t + w.linear(weighed(q, k, v, q.shape[-1] // min(heads, own)), f"{name}.out")

        members = dict[tuple[int, ...], tuple[list[int], list[int]]]()
        for token, place in enumerate(itertools.product(*map(range, grid))):
            inside = 0
            for c, side in zip(place, size, strict=True):
                inside = inside * side + c % side
            corner = tuple(c // side for c, side in zip(place, size, strict=True))
            for found, number in zip(members.setdefault(corner, ([], [])), (token, inside), strict=True):
                found.append(number)
        groups = [members[corner] for corner in sorted(members)]
        tokens = [x[:, held] + w["place"][inner] for held, inner in groups]
        latents = [vectors.expand(len(x), -1, -1) for vectors in w["table"]]
        owner = torch.arange(len(groups)).repeat_interleave(w["table"].shape[1])
        later = x.new_zeros(1, len(owner), len(owner)).masked_fill(owner > owner[:, None], -torch.inf)
        for at, (locally, globally) in enumerate(self.stages):
            for index, t in itertools.product(range(locally), range(len(groups))):
                ahead = x.new_full((1, *2 * tokens[t].shape[1:2]), -torch.inf).triu(1)
                tokens[t] = block(tokens[t], f"local.{at}.{index}", heads, ahead if self.causal else None)
            if globally:
                latents = [cross(mine, seen, f"reads.{at}") for mine, seen in zip(latents, tokens, strict=True)]
            whole = torch.cat(latents, 1)
            for index in range(globally):
                whole = block(whole, f"across.{at}.{index}", own, later if self.causal else None)
            latents = list(whole.chunk(len(groups), 1))
            if at + 1 < len(self.stages):
                read = [torch.zeros_like(latents[0]), *latents[:-1]] if self.causal else latents
                tokens = [cross(mine, seen, f"writes.{at}") for mine, seen in zip(tokens, read, strict=True)]
        out = torch.empty_like(x)
        for (held, _), done in zip(groups, tokens, strict=True):
            out[:, held] = done
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        wide = {"group": (2, 3), "latents": 2, "layers": "(1)1(1)", "latent_dim": 9, "latent_heads": 3, "mlp_ratio": 2}
        return [
            Case(Dims(2, 3, grid=(5, 7)), 35, wide),
            Case(Dims(2, 2, grid=(17,)), 17, {"group": 5, "latents": 2, "layers": "(1)2(0)1(1)", "causal": True}),
            Case(Dims(1, 4, grid=(2, 3, 3)), 18, {"group": 2, "latents": 1, "layers": "(0)1(1)"}, batch=1),
        ]

    @claim("At n = N^(1/3) and one latent a group, a cycle of the four weighs 2 N^(4/3) + 2 N pairs a head, of N^2.")
    def cost(cls) -> Finding:
        pairs = {}
        for side in (4, 8):
            module = cls(Dims(2, 4, grid=(side**3,)), group=side, latents=1, layers="(1)1(0)").requires_grad_(False)
            products = work(functools.partial(module, torch.randn(1, side**3, 8))).fused
            pairs[side] = products / (2 * 4 * 4)  # heads; channels; two products of two operations
        holds = all(count == 2 * side**4 + 2 * side**3 for side, count in pairs.items())
        return Finding(holds, f"{pairs[4]:g} of {4**6} pairs at N = 64, {pairs[8]:g} of {8**6} at N = 512")

    @claim("One read, global layer and write connect all tokens; without them a group sees itself.")
    def connects(cls) -> Finding:
        seen = [int(cls._seen(layers).sum()) for layers in ("(1)1(0)", "(2)")]
        return Finding(
            seen == [96, 8], f"of 96 tokens in groups of 8 one sees {seen[0]}, by local layers alone {seen[1]}"
        )

    @claim("In the causal form no token depends on a later one; without the shift of latents it does.")
    def shift(cls) -> Finding:
        found = [cls._seen("(1)1(1)", causal=True, shifted=shifted) for shifted in (True, False)]
        later = [int(seen[43:].sum()) for seen in found]
        earlier = [int(seen[:43].sum()) for seen in found]
        figure = (
            f"token 42 of 96 depends on {earlier[0]} up to itself and {later[0]} later ones, unshifted on {later[1]}"
        )
        return Finding(later[0] == 0 and earlier[0] == 43 and later[1] > 0, figure)

    @classmethod
    def _seen(cls, layers: str, *, causal: bool = False, shifted: bool = True) -> Tensor:
        """On which of 96 tokens in groups of 8 the token 42 depends."""
        module = cls(Dims(2, 4, grid=(96,)), group=8, latents=2, layers=layers, causal=causal).double()
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        if not shifted:
            module.known = lambda latents: latents  # type: ignore[method-assign]
        return reached(module, torch.randn(1, 96, 8, dtype=torch.float64), (0, 42))[0]
