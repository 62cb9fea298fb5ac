"""Broken twins whose tokens one by one, or packed sequences, are not the whole; see `twins`, which lists them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.contract import Dims
from saccade.testing.healthy import Decayed, Sliding
from saccade.testing.twins import Volatile, twin


@twin("step_equals_whole", "output of step")
class ShortMemory(Sliding):
    """Decoding forgets the oldest key of the window."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        out, (k, v) = super().step(q, k, v, state=state)
        return out, (k[:, :, 2 - self.size :], v[:, :, 2 - self.size :])


@twin("step_equals_whole", "output of step")
class NoCarry(Decayed):
    """Decoding starts afresh at every token."""

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        return super().step(x)


@twin("step_equals_whole", "that names causal first")
class Foresight(Sliding):
    """Is not causal, and decodes all the same."""

    def __init__(self, dims: Dims, **params: Any) -> None:
        super().__init__(dims, **params)
        self.causal = False


@twin("value_width", "output of wide values")
class SquareValues(Sliding):
    """Writes the values' channels beyond those of the keys as zeros."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v * (torch.arange(v.shape[3]) < q.shape[3]), **options)


@twin("value_width", "output of step with wide values")
class SquareSteps(Sliding):
    """The same, in decoding alone."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        return super().step(q, k, v * (torch.arange(v.shape[3]) < q.shape[3]), state=state)


@twin("value_width", "name v first")
class VagueRefusal(Sliding):
    """Refuses wide values and does not say what was wrong."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if v.shape[3] != q.shape[3]:
            raise ValueError("shapes differ")
        return super().compute(q, k, v, **options)


@twin("state_round_trip", "does not carry on")
class ForgetsWhenStored(Decayed):
    """Its state loses the sum when it is pickled."""

    def step(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        out, hidden = super().step(x, state=state.hidden if state else None)
        return out, Volatile(hidden)


@twin("varlen_equals_loop", "packed output")
class IgnoresEnds(Sliding):
    """Lets a packed sequence see the one before."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().compute(q, k, v)


@twin("varlen_equals_loop", "packed gradient of x")
class DetachesFirst(Decayed):
    """When packed, cuts the gradient of the first token."""

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is not None:
            x = torch.cat([x[:, :1].detach(), x[:, 1:]], 1)
        return super().compute(x, cu_seqlens=cu_seqlens)
