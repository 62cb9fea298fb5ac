"""Linear time: recurrences over tokens, one equation a primitive, computed in chunks or as a scan."""

from saccade.scan import decays, features, normalizers, snapshot
from saccade.scan.associative_scan import affine, associative_scan, check_monoid, matrix_affine, softmax_monoid
from saccade.scan.delta_rule import delta_rule
from saccade.scan.fast_weights import (
    L2,
    Decay,
    Dot,
    FastState,
    GradientDescent,
    Huber,
    KLSoftmax,
    LinearMemory,
    Loss,
    Lp,
    LqNorm,
    Memory,
    MLPMemory,
    Momentum,
    NewtonSchulz,
    NormHuber,
    RowNorm,
    SwiGLUMemory,
    SwitchedHuber,
    fast_weights,
)
from saccade.scan.features import CosReweight, Exp, ExpPair, LogFeatures, PositiveRandomFeatures
from saccade.scan.grid_scan import GridScan, raster_orders, snake_orders
from saccade.scan.linear_attention import linear_attention
from saccade.scan.long_conv import long_conv
from saccade.scan.normalizers import Clamp, LengthPower, Magnitude, MeanShift, Normalizer, Read, Sum
from saccade.scan.selective_scan import selective_scan
from saccade.scan.state import UNTRACKED, Matrix, State, Untracked

__all__ = [
    "L2",
    "UNTRACKED",
    "Clamp",
    "CosReweight",
    "Decay",
    "Dot",
    "Exp",
    "ExpPair",
    "FastState",
    "GradientDescent",
    "GridScan",
    "Huber",
    "KLSoftmax",
    "LengthPower",
    "LinearMemory",
    "LogFeatures",
    "Loss",
    "Lp",
    "LqNorm",
    "MLPMemory",
    "Magnitude",
    "Matrix",
    "MeanShift",
    "Memory",
    "Momentum",
    "NewtonSchulz",
    "NormHuber",
    "Normalizer",
    "PositiveRandomFeatures",
    "Read",
    "RowNorm",
    "State",
    "Sum",
    "SwiGLUMemory",
    "SwitchedHuber",
    "Untracked",
    "affine",
    "associative_scan",
    "check_monoid",
    "decays",
    "delta_rule",
    "fast_weights",
    "features",
    "linear_attention",
    "long_conv",
    "matrix_affine",
    "normalizers",
    "raster_orders",
    "selective_scan",
    "snake_orders",
    "snapshot",
    "softmax_monoid",
]
