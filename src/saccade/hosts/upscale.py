"""The super-resolution model: groups of blocks on one grid, as fine as the small image, then pixels shuffled out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from saccade.contract import Dims
from saccade.errors import positive
from saccade.hosts.pyramid import BlockFactory, check_image, check_size
from saccade.hosts.resize import as_map, as_tokens

DIV2K = (0.4488, 0.4371, 0.4040)  # the mean colour of the pictures that such models are trained on


class Upscaler(nn.Module):
    """A small image to one that is `scale` times larger on both axes.

        x = Conv(image - m),   y = Shuffle(lrelu(Conv(x + Conv(LN(groups(LN(x))))))) + m
        Shuffle: Conv to by^2 times the channels and a pixel shuffle, for by = 2, 2, ... (by = scale where it is no
        power of two), then Conv to the image; every Conv is 3 x 3

    image (B, in_channels, Y, X) -> (B, in_channels, scale Y, scale X). The image is reflected at its right and lower
    border up to whole windows, and what becomes of the filling is cut off. m: the mean colour of DIV2K for three
    channels, else 0. As in SwinIR (arXiv 2108.10257) and the models after it.

    size: of the small image, (Y, X). window: tokens a side, which the grid of the groups is a multiple of. dim, depth,
    heads: C, groups, H. block: (dims, stage, index) -> a group, (B, N, C) -> (B, N, C), as for a `Pyramid`, with stage
    0. scale: 4. in_channels: 3. features: channels between groups and image (64). Keywords of a call go to every group.
    Errors: ValueError when an image has another size, or dim is no multiple of heads.

    >>> model = Upscaler((5, 9), 4, 8, 1, 2, lambda dims, stage, index: nn.Linear(dims.dim, dims.dim), scale=3)
    >>> model(torch.rand(1, 3, 5, 9)).shape, model.dims.grid
    (torch.Size([1, 3, 15, 27]), (8, 12))
    """

    mean: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        window: int,
        dim: int,
        depth: int,
        heads: int,
        block: BlockFactory,
        *,
        scale: int = 4,
        in_channels: int = 3,
        features: int = 64,
    ) -> None:
        super().__init__()
        self.size, self.in_channels = check_size(size), positive("in_channels", in_channels)
        if len(self.size) != 2:
            raise ValueError(f"size: got {self.size}; pass (Y, X)")
        if positive("dim", dim) % positive("heads", heads):
            raise ValueError(f"heads: got {heads} for dim {dim}; pass a divisor of dim")
        positive("window", window), positive("features", features)
        self.scale, whole = positive("scale", scale), [-(-n // window) * window for n in self.size]
        self.dims = Dims(heads, dim // heads, grid=tuple(whole))
        mean = torch.tensor(DIV2K if in_channels == 3 else (0.0,))
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.enter, self.after = conv(in_channels, dim), conv(dim, dim)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.groups = nn.ModuleList(block(self.dims, 0, index) for index in range(positive("depth", depth, least=0)))
        steps = [2] * (scale.bit_length() - 1) if scale & (scale - 1) == 0 else [scale]
        shuffles = [layer for by in steps for layer in (conv(features, features * by**2), nn.PixelShuffle(by))]
        self.leave = nn.Sequential(conv(dim, features), nn.LeakyReLU(), *shuffles, conv(features, in_channels))

    def reflected(self, x: Tensor) -> Tensor:
        """An image (B, C, *size) as one of the grid of the groups."""
        for axis, (n, end) in enumerate(zip(self.size, self.dims.grid or (), strict=True), 2):
            at = torch.arange(end, device=x.device) + n - 1
            x = x.index_select(axis, (at % max(1, 2 * n - 2) - n + 1).abs())
        return x

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        check_image(x, self.in_channels, self.size)
        x = self.enter(self.reflected(x) - self.mean)
        tokens = self.norm_in(as_tokens(x))
        for group in self.groups:
            tokens = group(tokens, **options)
        x = x + self.after(as_map(self.norm_out(tokens), self.dims.grid or ()))
        height, width = (self.scale * n for n in self.size)
        return (self.leave(x) + self.mean)[:, :, :height, :width]
