"""saccade: one engine, one vocabulary and one proof for efficient attention.

>>> import torch, saccade
>>> from saccade.where import Causal, Window
>>> q, k, v = torch.randn(3, 1, 2, 64, 16)
>>> saccade.attend(q, k, v, Causal() & Window(8)).shape
torch.Size([1, 2, 64, 16])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade import mechanisms, mix, scan, softmax, testing, where
    from saccade.catalogue import mechanism
    from saccade.softmax import attend, explain, merge

__version__ = "0.1.0"
__all__ = [
    "attend",
    "explain",
    "mechanism",
    "mechanisms",
    "merge",
    "mix",
    "scan",
    "softmax",
    "testing",
    "where",
]

_HOME = {"attend": "softmax", "explain": "softmax", "merge": "softmax", "mechanism": "catalogue"}


def __getattr__(name: str) -> Any:  # so that `import saccade` costs nothing
    if name not in __all__:
        raise AttributeError(f"saccade has no {name!r}; it has {', '.join(__all__)}")
    if name in _HOME:
        return getattr(importlib.import_module(f"saccade.{_HOME[name]}"), name)
    return importlib.import_module(f"saccade.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
