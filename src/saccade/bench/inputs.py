"""Workloads: where the q, k, v and hidden states of a comparison come from.

Random numbers have near-uniform attention, which makes every sparse method look bad and every average look good; so the
default workloads are a language model reading text, and the patches of a photograph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from saccade.bench.sample import Sample
from saccade.contract import Dims
from saccade.errors import positive


class Unreadable(ValueError):
    """Inputs that cannot be had: a file or a package is missing, or the source does not reach that far."""


class Workload(Protocol):
    """Gives a `Sample` of about `length` tokens: a sequence (rank 0) or a grid of `rank` axes, for each of `ranks`."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def ranks(self) -> tuple[int, ...]: ...

    def sample(self, length: int, rank: int = 0) -> Sample: ...


def grid_of(length: int, rank: int) -> tuple[int, ...]:
    """A grid of about `length` tokens: square in Y and X, sides a multiple of 16 where that fits, 4 frames in T.

    >>> grid_of(1024, 2), grid_of(8192, 2), grid_of(4096, 3)
    ((32, 32), (96, 96), (4, 32, 32))
    """
    if rank <= 1:
        return (length,) * rank
    frames = (4,) * (rank - 2)
    side = math.sqrt(length / math.prod(frames))
    return (*frames, *(max(2, round(side / 16) * 16 if side > 24 else round(side)),) * 2)


class Captured:
    """A sequence cut from one forward pass of a causal model; a shorter sample is a prefix of the longest one.

    Subclasses give `_read(length)`: q, k, v after the rotary embedding and hidden states x of one layer.
    """

    ranks = (0, 1)
    name: str
    about: str

    def __init__(self, lengths: Sequence[int]) -> None:
        if not lengths:
            raise ValueError("lengths: got none; pass at least one")
        self.most = max(positive("lengths", n) for n in lengths)

    def _read(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__}._read")

    @cached_property
    def _whole(self) -> Sample:
        with torch.no_grad():
            q, k, v, x = (t.float() for t in self._read(self.most))
        x = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()  # a layer sits behind a norm
        return Sample(self.name, Dims(q.shape[1], q.shape[3], k.shape[1]), q, k, v, x)

    def sample(self, length: int, rank: int = 0) -> Sample:
        if positive("length", length) > self.most:
            raise ValueError(f"length: got {length}; {self.name} was captured for at most {self.most}")
        whole = self._whole
        part = {n: getattr(whole, n)[..., :length, :] for n in "qkvx"}
        return replace(whole, dims=replace(whole.dims, grid=(length,) if rank else None), **part)


class CapturedText(Captured):
    """saccade's own small language model reading held-out text: q, k, v of one layer (default: the middle one).

    lengths: those that will be asked for. layer: index from 0. weights: a file that `LM.save` wrote (default: the
    trained model's, which come with the package).
    """

    name = "text"
    about = (
        "q, k, v and hidden states of one layer of saccade's small language model, reading Python source that it was "
        "not trained on"
    )

    def __init__(self, lengths: Sequence[int], layer: int | None = None, weights: str | Path | None = None) -> None:
        super().__init__(lengths)
        self.layer, self.weights = layer, weights

    def _read(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from saccade.hosts.lm import LM, WEIGHTS
        from saccade.tasks.text import held_out_text

        path = Path(self.weights or WEIGHTS)
        if not path.is_file():
            raise Unreadable(
                f"weights: none of saccade's language model at {path}; compare on synthetic inputs (--shape "
                "B,H,Hkv,N,D) or on a model of yours (--capture MODEL)"
            )
        model = LM.from_pretrained(path)
        if length > model.config.max_length:
            raise Unreadable(
                f"lengths: got {length}; saccade's language model reads at most {model.config.max_length} tokens, for "
                "longer inputs pass --shape or --capture"
            )
        layer = _layer(self.layer, len(model.layers))
        captured = model.capture(torch.tensor(list(held_out_text()[:length]))[None], layer)
        return captured.q, captured.k, captured.v, captured.hidden


class CapturedModel(Captured):
    """Any causal model of `transformers`: q, k, v caught on their way into its attention function.

    model: an id or path for AutoModelForCausalLM, or a model object. lengths: those that will be asked for. layer:
    index from 0 (default: the middle one). The text goes through the model's tokenizer; without one its bytes stand
    for tokens.
    """

    def __init__(self, model: Any, lengths: Sequence[int], layer: int | None = None) -> None:
        super().__init__(lengths)
        self.model, self.layer = model, layer
        self.name = Path(model).name if isinstance(model, str) else type(model).__name__
        self.about = f"q, k, v and hidden states of one layer of {self.name}, reading Python source"

    def _read(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        try:
            import transformers
        except ImportError as error:
            raise Unreadable("capture: transformers is missing; pip install 'saccade[hf]'") from error
        model, tokenizer = self.model, None
        if isinstance(model, str):
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise Unreadable(f"capture: transformers cannot load {self.model!r}: {first}") from error
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
            except (OSError, ValueError, KeyError):
                tokenizer = None  # a model saved without one
        return capture_attention(model.eval(), self._tokens(tokenizer, model.config.vocab_size, length), self.layer)

    def _tokens(self, tokenizer: Any, vocabulary: int, length: int) -> Tensor:
        from saccade.tasks.text import held_out_text

        text = held_out_text()[: 8 * length]
        ids = list(text) if tokenizer is None else tokenizer(text.decode(errors="replace"))["input_ids"]
        tokens = torch.tensor(ids) % vocabulary
        return tokens.repeat(-(-length // len(tokens)))[None, :length]


def _layer(layer: int | None, count: int) -> int:
    """The layer asked for, the middle one by default."""
    if layer is None:
        return count // 2
    if not 0 <= layer < count:
        raise ValueError(f"layer: got {layer}; the model has layers 0 to {count - 1}")
    return layer


def capture_attention(model: Any, tokens: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the hidden states before layer `layer` while a transformers `model` reads tokens (1, N).

    The model's own attention function goes on running; ours only looks on.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    layer = _layer(layer, config.num_hidden_layers)
    caught: dict[int, tuple[Tensor, ...]] = {}

    def look_on(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        caught.setdefault(getattr(module, "layer_idx", len(caught)), (query, key, value))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    name, own = "saccade_capture", config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, look_on)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.set_attn_implementation(name)
        with torch.no_grad():
            hidden = model(tokens.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
    finally:
        model.set_attn_implementation(own)
    if layer not in caught:
        raise Unreadable(
            f"capture: layer {layer} of {type(model).__name__} has no attention that goes through transformers' "
            "AttentionInterface"
        )
    q, k, v = caught[layer]
    return q, k, v, hidden[layer]


class Synthetic:
    """Standard-normal inputs of a given shape (batch, query heads, key heads, tokens, channels); any rank of grid.

    Attention over such inputs is nearly uniform: times mean what they say, approximation errors describe no real model.
    """

    name = "synthetic"
    about = "standard-normal q, k, v and hidden states"
    ranks = (0, 1, 2, 3)

    def __init__(self, shape: tuple[int, int, int, int, int], seed: int = 0) -> None:
        if len(shape) != 5:
            raise ValueError(f"shape: got {shape}; pass B,H,Hkv,N,D")
        for size in shape:
            positive("shape", size)
        self.shape, self.seed = tuple(shape), seed
        Dims(shape[1], shape[4], shape[2])  # refuses a head ratio that does not divide

    def sample(self, length: int, rank: int = 0) -> Sample:
        batch, heads, kv_heads, _, channels = self.shape
        grid = grid_of(length, rank)
        n = math.prod(grid) if grid else length
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = (torch.randn(batch, h, n, channels, generator=generator) for h in (heads, kv_heads, kv_heads))
        x = torch.randn(batch, n, heads * channels, generator=generator)
        return Sample(self.name, Dims(heads, channels, kv_heads, grid or None), q, k, v, x)


class Photograph:
    """Patches of a photograph as tokens, one a grid position, described at a different scale in every head.

    A head of scale s sees, at each position of the photo resized to the grid, a p x p x 3 patch (p the least odd size
    with 3 p^2 >= D) of the photo averaged over s x s, its pixels s apart. With c the patch in the D leading principal
    axes of all patches and w their variances,

        q = k = sqrt(12) D^(1/4) * f / |f|,   f = c / sqrt(w + w_max / 100),      v = c / sqrt(w_max),

    so that softmax(q k^T D^(-1/2)) = softmax(12 cos(f_i, f_j)) weighs patches by their likeness as non-local means
    does: a few dozen keys share most of the mass of a query. x is v of all heads side by side, of unit mean square.
    Frames of a (T, Y, X) grid are windows of 3/4 of the photo that pan along its diagonal.

    num_heads (default 4), head_dim (default 32). The picture: see NOTICE beside it.
    """

    name = "photo"
    about = "patches of a photograph at several scales, weighed by likeness as in non-local means"
    ranks = (2, 3)
    ridge, sharpness = 1e-2, 12.0
    scales: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)

    def __init__(self, num_heads: int = 4, head_dim: int = 32) -> None:
        self.dims = Dims(num_heads, head_dim)

    @cached_property
    def pixels(self) -> Tensor:
        """(3, 384, 384) in [0, 1]."""
        try:
            import numpy as np
            from PIL import Image
        except ImportError as error:
            raise Unreadable("photo: pillow is missing; pip install 'saccade[bench]'") from error
        with Image.open(Path(__file__).with_name("photo.jpg")) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255

    def frames(self, count: int) -> Tensor:
        """(count, 3, S, S): the photo itself, or `count` windows of it."""
        photo = self.pixels
        if count == 1:
            return photo[None]
        size = photo.shape[1] * 3 // 4
        starts = [round(t * (photo.shape[1] - size) / (count - 1)) for t in range(count)]
        return torch.stack([photo[:, s : s + size, s : s + size] for s in starts])

    def patches(self, grid: tuple[int, ...], scale: int) -> Tensor:
        """(N, 3 p^2): the patch around every grid position, less the mean patch."""
        functional = torch.nn.functional
        frames = self.frames(math.prod(grid[:-2]))
        image = functional.interpolate(frames, grid[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        before, after = (scale - 1) // 2, scale // 2
        image = functional.pad(image, (before, after) * 2, mode="replicate")
        image = functional.avg_pool2d(image, scale, 1)
        size = math.isqrt(-(-self.dims.head_dim // 3) - 1) + 1
        size += 1 - size % 2
        reach = size // 2 * scale
        image = functional.pad(image, (reach,) * 4, mode="replicate")
        patches = functional.unfold(image, size, dilation=scale).transpose(1, 2).flatten(0, 1)
        return patches - patches.mean(0)

    def sample(self, length: int, rank: int = 2) -> Sample:
        grid = grid_of(length, rank)
        d = self.dims.head_dim
        keys, values = [], []
        for head in range(self.dims.num_heads):
            patches = self.patches(grid, self.scales[head % len(self.scales)])
            variances, axes = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
            variances, axes = variances.flip(0)[:d].float(), axes.flip(1)[:, :d].float()
            likeness = patches @ axes
            values.append(likeness / variances[0].sqrt())
            features = torch.nn.functional.normalize(likeness / (variances + self.ridge * variances[0]).sqrt(), dim=-1)
            keys.append(features * math.sqrt(self.sharpness) * d**0.25)
        k, v = torch.stack(keys)[None], torch.stack(values)[None]
        x = v.transpose(1, 2).flatten(2)
        x = x / x.square().mean().sqrt()
        return Sample(self.name, Dims(self.dims.num_heads, d, grid=grid), k, k.clone(), v, x)
