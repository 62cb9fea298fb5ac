"""Softmax attention: `attend`, its backends, biases, normalisers, and the merge of partial results."""

from saccade.softmax.attend import attend, explain, which, why
from saccade.softmax.bias import Alibi, FromCoordinates, RelativeTable
from saccade.softmax.heads import attend_heads
from saccade.softmax.lifetimes import attend_lifetimes
from saccade.softmax.measuring import measure
from saccade.softmax.merge import merge
from saccade.softmax.normalizers import Entmax, Sigmoid, Softmax
from saccade.softmax.page_tokens import score_bounds, score_tokens, widen_bounds
from saccade.softmax.paged import Pages, attend_cascade, attend_pages

__all__ = [
    "Alibi",
    "Entmax",
    "FromCoordinates",
    "Pages",
    "RelativeTable",
    "Sigmoid",
    "Softmax",
    "attend",
    "attend_cascade",
    "attend_heads",
    "attend_lifetimes",
    "attend_pages",
    "explain",
    "measure",
    "merge",
    "score_bounds",
    "score_tokens",
    "which",
    "why",
    "widen_bounds",
]
