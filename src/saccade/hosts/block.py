"""The shells that most transformers share: projections around an attention, residual branches around a mixer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Dims, Finding
from saccade.errors import positive
from saccade.mix import DepthwiseConv


class AttentionMixer(nn.Module):
    """Projections around an attention: x (B, N, C) -> W_o attention(W_q x, W_k x, W_v x, **options).

    attention: an `Attention`, or anything that maps q (B, H, N, D), k, v (B, Hkv, N, D) to (B, H, N, D). dims: H, Hkv
    and D (default: those of the attention). bias: biases on the projections (True). What a call is given by keyword
    goes to the attention.

    >>> mean = AttentionMixer(lambda q, k, v: v.mean(2, keepdim=True).expand_as(q), dims=Dims(2, 8))
    >>> mean(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, attention: Callable[..., Tensor], *, dims: Dims | None = None, bias: bool = True) -> None:
        super().__init__()
        found = dims or getattr(attention, "dims", None)
        if not isinstance(found, Dims):
            raise ValueError(
                f"dims: got {found!r}, and {type(attention).__name__} has none; pass the Dims of its heads"
            )
        d = self.dims = found
        self.qkv = nn.Linear(d.dim, (d.num_heads + 2 * d.num_kv_heads) * d.head_dim, bias=bias)
        self.attention = attention
        self.out = nn.Linear(d.dim, d.dim, bias=bias)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        o = self.attention(*self.dims.split(self.qkv(x)), **options)
        return self.out(o.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """W_2 gelu(W_1 x + b_1) + b_2 on the last axis.

    dim: C. ratio: hidden width over C (default 4). activation: a module in the place of gelu (default `nn.GELU()`).

    >>> MLP(6, 2)(torch.ones(1, 5, 6)).shape
    torch.Size([1, 5, 6])
    """

    def __init__(self, dim: int, ratio: int = 4, activation: nn.Module | None = None) -> None:
        hidden = positive("dim", dim) * positive("mlp_ratio", ratio)
        super().__init__(nn.Linear(dim, hidden), activation or nn.GELU(), nn.Linear(hidden, dim))


class ConvMLP(nn.Module):
    """W_2 (h + DW(h)), h = gelu(W_1 x): an MLP whose tokens see their neighbours, by a depthwise 3 x 3 convolution.

    x (B, N, C), tokens of a row-major grid (Y, X) -> (B, N, C). dim: C. hidden: width of h. grid: (Y, X).

    >>> ConvMLP(6, 12, (5, 7))(torch.ones(1, 35, 6)).shape
    torch.Size([1, 35, 6])
    """

    def __init__(self, dim: int, hidden: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(positive("dim", dim), positive("hidden", hidden)), nn.Linear(hidden, dim)
        self.local = DepthwiseConv(hidden, (3, 3), grid=grid)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.enter(x))
        return self.leave(x + self.local(x))


class Gated(nn.Module):
    """W_o (LN(inner(u)) * silu(z)), [u; z] = W x: the shell that state-space blocks put around their scan.

    x (B, N, C); u, z (B, N, E) -> (B, N, C); W, W_o without bias. dim: C. width: E. inner: (B, N, E) -> (B, N, E).

    >>> Gated(6, 12, nn.SiLU())(torch.ones(1, 5, 6)).shape
    torch.Size([1, 5, 6])
    """

    def __init__(self, dim: int, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Linear(positive("dim", dim), 2 * positive("width", width), bias=False)
        self.inner, self.norm = inner, nn.LayerNorm(width)
        self.leave = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.enter(x).chunk(2, -1)
        return self.leave(self.norm(self.inner(u)) * nn.functional.silu(z))


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens (B, N, C), over entries and tokens; parameters and errors as `nn.BatchNorm1d`.

    >>> TokenNorm(6)(torch.ones(2, 5, 6)).shape
    torch.Size([2, 5, 6])
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class Residual(nn.Module):
    """One branch: x + a inner(norm(x), **options); x (B, N, C). Blocks that are not `Block`s are made of these.

    inner: (B, N, C) -> (B, N, C). norm: a module on tokens (default None: none). scale: initial values of the learned
    factors a, (C,) (default None: a = 1).

    >>> Residual(nn.Linear(16, 16), nn.LayerNorm(16))(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, inner: nn.Module, norm: nn.Module | None = None, *, scale: Tensor | None = None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.inner = inner
        self.scale = None if scale is None else nn.Parameter(scale.clone())

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.inner(self.norm(x), **options)
        return x + (y if self.scale is None else self.scale * y)


class Block(nn.Module):
    """Pre-norm residual block: x + a mixer(norm(x), **options), then x + b mlp(norm(x)); x (B, N, C).

    mixer: (B, N, C) -> (B, N, C). mlp_ratio: hidden width of the MLP over C (default 4). layer_scale: initial value of
    the learned factors a, b per channel (default None: none). mlp: a module in the place of the MLP, instead of
    mlp_ratio (None). norm: C -> a norm of tokens (`nn.LayerNorm`).

    >>> Block(Dims(2, 8), nn.Linear(16, 16), norm=nn.RMSNorm)(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dims: Dims,
        mixer: nn.Module,
        *,
        mlp_ratio: int | None = None,
        layer_scale: float | None = None,
        mlp: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm_mixer, self.mixer = norm(dims.dim), mixer
        self.norm_mlp, self.mlp = norm(dims.dim), _mlp(dims, mlp_ratio, mlp)
        scales = [None if layer_scale is None else nn.Parameter(torch.full((dims.dim,), layer_scale)) for _ in range(2)]
        self.scale_mixer, self.scale_mlp = scales

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        mixed = self.mixer(self.norm_mixer(x), **options)
        x = x + (mixed if self.scale_mixer is None else self.scale_mixer * mixed)
        mixed = self.mlp(self.norm_mlp(x))
        return x + (mixed if self.scale_mlp is None else self.scale_mlp * mixed)


class AdaptiveBlock(nn.Module):
    """A block that a vector moves (adaLN-Zero, arXiv 2212.09748, section 3.2); at first it is the identity.

        x + g_1 mixer(LN(x) (1 + s_1) + b_1),  then  x + g_2 mlp(LN(x) (1 + s_2) + b_2)
        (b_1, s_1, g_1, b_2, s_2, g_2) = W silu(c) + w, zero at first

    x (B, N, C), c (B, E), handed in by keyword as `condition`. LN has no parameters. mixer, mlp, mlp_ratio: as those of
    `Block`. condition: E.

    >>> AdaptiveBlock(Dims(2, 8), nn.Linear(16, 16), 6)(torch.ones(1, 5, 16), condition=torch.ones(1, 6)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dims: Dims,
        mixer: nn.Module,
        condition: int,
        *,
        mlp_ratio: int | None = None,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mixer, self.mlp = mixer, _mlp(dims, mlp_ratio, mlp)
        self.norm = nn.LayerNorm(dims.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(positive("condition", condition), 6 * dims.dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, *, condition: Tensor, **options: Any) -> Tensor:
        moves = self.modulation(nn.functional.silu(condition))[:, None].chunk(6, -1)
        b1, s1, g1, b2, s2, g2 = moves
        x = x + g1 * self.mixer(self.norm(x) * (1 + s1) + b1, **options)
        return x + g2 * self.mlp(self.norm(x) * (1 + s2) + b2)


class Conditioned(nn.Module):
    """Any block, its input moved by a vector: block(x (1 + s) + b, **options), (s, b) = W c + w, zero at first.

    x (B, N, C), c (B, E), handed in by keyword as `condition`. block: (B, N, C) -> (B, N, C). dim: C. condition: E.

    >>> Conditioned(nn.Linear(16, 16), 16, 6)(torch.ones(1, 5, 16), condition=torch.ones(1, 6)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, block: nn.Module, dim: int, condition: int) -> None:
        super().__init__()
        self.block = block
        self.modulation = nn.Linear(positive("condition", condition), 2 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, *, condition: Tensor, **options: Any) -> Tensor:
        s, b = self.modulation(condition)[:, None].chunk(2, -1)
        return self.block(x * (1 + s) + b, **options)


def _mlp(dims: Dims, ratio: int | None, mlp: nn.Module | None) -> nn.Module:
    if mlp is not None and ratio is not None:
        raise ValueError(f"mlp_ratio: got {ratio} beside an mlp of its own width; pass one of the two")
    return MLP(dims.dim, 4 if ratio is None else ratio) if mlp is None else mlp


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Give every `nn.Linear` inside the start of most vision transformers: weights of a truncated normal, biases zero.

    >>> layer = nn.Linear(3, 4)
    >>> init_linear(layer)
    >>> bool(layer.bias.any())
    False
    """
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.trunc_normal_(each.weight, std=std)
            if each.bias is not None:
                nn.init.zeros_(each.bias)


def num_parameters(build: Callable[[], nn.Module]) -> int:
    """The parameters of the model that `build` makes, without memory for them.

    >>> num_parameters(lambda: nn.Linear(3, 4))
    16
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def published_size(model: Callable[..., nn.Module], published: Mapping[str, float], **host: Any) -> Finding:
    """The finding of a claim: has model(name, **host) as many parameters as published, in millions, within 2 %?

    >>> published_size(lambda name: nn.Linear(1000, 1000), {"tiny": 1.0})
    Finding(holds=True, figure='tiny 1.00 million')
    """
    sizes = {name: num_parameters(functools.partial(model, name, **host)) / 1e6 for name in published}
    holds = all(abs(sizes[name] / size - 1) < 0.02 for name, size in published.items())
    return Finding(holds, ", ".join(f"{name} {size:.2f} million" for name, size in sizes.items()))
