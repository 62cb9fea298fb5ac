"""Mixing tokens without weighing pairs: pooling, convolution, gates, rotations and windows on
tokens of a grid."""

from saccade.mix.conv import DepthwiseConv, depthwise_conv
from saccade.mix.gate import gate_axes
from saccade.mix.pool import pool_axis, pool_tokens
from saccade.mix.rotary import grid_angles, rotary_rates, turn_at, turn_halves, turn_pairs
from saccade.mix.tokens import to_map, to_tokens
from saccade.mix.windows import RegionBias, Windowed, cut_windows, join_windows, window_regions

__all__ = [
    "DepthwiseConv",
    "RegionBias",
    "Windowed",
    "cut_windows",
    "depthwise_conv",
    "gate_axes",
    "grid_angles",
    "join_windows",
    "pool_axis",
    "pool_tokens",
    "rotary_rates",
    "to_map",
    "to_tokens",
    "turn_at",
    "turn_halves",
    "turn_pairs",
    "window_regions",
]
