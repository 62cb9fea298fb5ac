"""Mixing tokens without weighing pairs: pooling, convolution and gates on tokens of a grid."""

from saccade.mix.conv import DepthwiseConv, depthwise_conv
from saccade.mix.gate import gate_axes
from saccade.mix.pool import pool_axis, pool_tokens
from saccade.mix.tokens import to_map, to_tokens

__all__ = ["DepthwiseConv", "depthwise_conv", "gate_axes", "pool_axis", "pool_tokens", "to_map", "to_tokens"]
