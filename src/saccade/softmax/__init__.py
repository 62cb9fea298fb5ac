"""Softmax attention: `attend`, its backends, biases, normalisers, and the merge of partial results."""

from saccade.softmax.attend import attend, explain, which
from saccade.softmax.bias import Alibi, FromCoordinates, RelativeTable
from saccade.softmax.merge import merge
from saccade.softmax.normalizers import Entmax, Sigmoid, Softmax

__all__ = [
    "Alibi",
    "Entmax",
    "FromCoordinates",
    "RelativeTable",
    "Sigmoid",
    "Softmax",
    "attend",
    "explain",
    "merge",
    "which",
]
