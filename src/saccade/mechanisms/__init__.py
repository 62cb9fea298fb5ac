"""The catalogue: one file a published system, in a folder a family; called, `saccade.mechanisms()`, it lists them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.contract import Spec


class _Catalogue(ModuleType):
    def __call__(self) -> list[Spec]:
        """Every mechanism's declaration, sorted by id."""
        from saccade.catalogue import mechanisms

        return mechanisms()


sys.modules[__name__].__class__ = _Catalogue
