"""A causal language model of recurrent layers, or of several kinds in turn: one mixer a layer, one state a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Dims, Mechanism
from saccade.errors import positive
from saccade.hosts.block import Block

LayerFactory = Callable[[Dims, int], nn.Module]
ResidualFactory = Callable[[Dims, nn.Module], nn.Module]


def interleave(depth: int, *kinds: tuple[int, LayerFactory]) -> list[LayerFactory]:
    """The factories of `depth` layers: as many of each kind as it says, in turn, and from the start again.

    depth: layers; the last turn may break off. kinds: (count, factory), count >= 1.

    >>> scan, attend = (lambda dims, layer, name=name: name for name in ("scan", "attend"))
    >>> [make(Dims(2, 4), i) for i, make in enumerate(interleave(6, (3, scan), (1, attend)))]
    ['scan', 'scan', 'scan', 'attend', 'scan', 'scan']
    """
    turn = [factory for count, factory in kinds for _ in range(positive("kinds", count))]
    if not turn:
        raise ValueError("kinds: got none; pass at least one (count, factory)")
    return [turn[index % len(turn)] for index in range(positive("depth", depth))]


class PreNorm(Block):
    """`Block` with RMSNorm, which also decodes: x + mixer(norm x), then x + mlp(norm x); x (B, N, C).

    mixer: (B, N, C) -> (B, N, C); `step` needs one of its own. mlp: C -> a module in the place of the MLP of `Block`,
    instead of mlp_ratio (None). mlp_ratio, norm: as those of `Block`, but norm is `nn.RMSNorm`.

    >>> PreNorm(Dims(2, 8), nn.Linear(16, 16), mlp=lambda dim: SwiGLU(dim, 44))(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dims: Dims,
        mixer: nn.Module,
        *,
        mlp_ratio: int | None = None,
        mlp: Callable[[int], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
    ) -> None:
        super().__init__(dims, mixer, mlp_ratio=mlp_ratio, mlp=None if mlp is None else mlp(dims.dim), norm=norm)

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        """The next token, (B, 1, C), and the state of the mixer."""
        mixed, state = self.mixer.step(self.norm_mixer(x), state=state)  # type: ignore[operator]
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), state


class SwiGLU(nn.Module):
    """W_2 (silu(W_0 x) * W_1 x) on the last axis, without biases. dim: C. hidden: channels between.

    >>> SwiGLU(6, 16)(torch.ones(1, 5, 6)).shape
    torch.Size([1, 5, 6])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(positive("dim", dim), 2 * positive("hidden", hidden), bias=False)
        self.leave = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.enter(x).chunk(2, -1)
        return self.leave(F.silu(gate) * value)


class Stack(nn.Module):
    """tokens (B, N) int64 -> logits (B, N, vocab): next-token scores.

        x = E[tokens],   x <- block_i(x)  for i = 0, 1, ...,   logits = norm(x) E^T

    The model has no positions of its own: what its mixers know of order is all there is. Every layer may be another
    mechanism; `interleave` writes such lists.

    dims: H, Hkv and D of every layer, without a grid. layers: one factory a layer, (dims, layer) -> a mixer, (B, N, C)
    -> (B, N, C), which is causal; layer counts from 0. vocab_size: 256, tokens as bytes. block: (dims, mixer) -> a
    residual block (`PreNorm`), with a `step` where the model is to decode. norm: C -> the last norm (`nn.RMSNorm`).
    Keywords of a call go to every block. Attribute blocks: the blocks.
    Errors: ValueError for a mixer that is not causal, naming its layer, for a grid, or tokens that are not (B, N)
    integers; TypeError when a mixer cannot decode.

    >>> class Sum(nn.Module):
    ...     def forward(self, x):
    ...         return x.cumsum(1)
    ...     def step(self, x, state=None):
    ...         x = x if state is None else x + state
    ...         return x, x
    >>> model = Stack(Dims(2, 8), interleave(4, (1, lambda dims, layer: Sum())))
    >>> tokens = torch.arange(6)[None]
    >>> logits, state = model.step(tokens[:, :1])
    >>> model(tokens).shape, logits.shape, len(state)
    (torch.Size([1, 6, 256]), torch.Size([1, 1, 256]), 4)
    """

    def __init__(
        self,
        dims: Dims,
        layers: Sequence[LayerFactory],
        *,
        vocab_size: int = 256,
        block: ResidualFactory = PreNorm,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
    ) -> None:
        super().__init__()
        if dims.grid is not None:
            raise ValueError(f"dims.grid: got {dims.grid}; tokens of a language are a sequence, so pass none")
        if not layers:
            raise ValueError("layers: got none; pass at least one factory")
        self.dims = dims
        self.embed = nn.Embedding(positive("vocab_size", vocab_size), dims.dim)
        mixers = [make(dims, index) for index, make in enumerate(layers)]
        for index, mixer in enumerate(mixers):
            inner = getattr(mixer, "attention", mixer)
            if not getattr(inner, "causal", True):
                what = f"{type(inner).__name__}, which is not causal"
                raise ValueError(f"layers[{index}]: made {what}; a language model may not look ahead")
        self.blocks = nn.ModuleList(block(dims, mixer) for mixer in mixers)
        self.norm = norm(dims.dim)
        nn.init.normal_(self.embed.weight, std=dims.dim**-0.5)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        x = self._enter(tokens)
        for block in self.blocks:
            x = block(x, **options)
        return F.linear(self.norm(x), self.embed.weight)

    def step(self, tokens: Tensor, *, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """The next token, (B, 1) -> its logits (B, 1, vocab), and one state a layer; state is None at first."""
        x = self._enter(tokens)
        if x.shape[1] != 1:
            raise ValueError(f"tokens: got {x.shape[1]} at once; `step` takes them one by one")
        states, after = [None] * len(self.blocks) if state is None else state, []
        for index, (block, before) in enumerate(zip(self.blocks, states, strict=True)):
            short = next((each for each in (block, getattr(block, "mixer", block)) if not _decodes(each)), None)
            if short is not None:
                raise TypeError(f"layers[{index}]: {type(short).__name__} has no step, so that it cannot decode")
            x, now = block.step(x, state=before)  # type: ignore[operator]
            after.append(now)
        return F.linear(self.norm(x), self.embed.weight), after

    @torch.no_grad()
    def generate(self, tokens: Tensor, num_new: int) -> Tensor:
        """Greedy continuation: (B, N) -> (B, num_new). The prompt is read token by token too."""
        positive("num_new", num_new)
        self._enter(tokens)
        logits, state = torch.empty(()), None
        for token in tokens.split(1, 1):
            logits, state = self.step(token, state=state)
        new = [logits.argmax(-1)]
        while len(new) < num_new:
            logits, state = self.step(new[-1], state=state)
            new.append(logits.argmax(-1))
        return torch.cat(new, 1)

    def _enter(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}; pass int64 (B, N) with N >= 1"
            )
        return self.embed(tokens)


def _decodes(module: nn.Module) -> bool:
    return module.can_step() and module.causal if isinstance(module, Mechanism) else hasattr(module, "step")
