"""Mixing tokens without weighing pairs: pooling, convolution, gates and windows on tokens of a grid."""

from saccade.mix.conv import DepthwiseConv, depthwise_conv
from saccade.mix.gate import gate_axes
from saccade.mix.pool import pool_axis, pool_tokens
from saccade.mix.tokens import to_map, to_tokens
from saccade.mix.windows import RegionBias, Windowed, cut_windows, join_windows, window_regions

__all__ = [
    "DepthwiseConv",
    "RegionBias",
    "Windowed",
    "cut_windows",
    "depthwise_conv",
    "gate_axes",
    "join_windows",
    "pool_axis",
    "pool_tokens",
    "to_map",
    "to_tokens",
    "window_regions",
]
