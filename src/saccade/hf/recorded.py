"""Decoding without the host: a model's steps over a policy's cache, recorded once and replayed by the GPU."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from saccade.cache import Recorded, Session
from saccade.cache.recorded import CudaGraph, Replayed
from saccade.hf.caching import CACHES, Ragged

POSITIONS = ("position_ids", "cache_position")  # tensors that say where a new token stands


class Steps:
    """The steps of one cache. call: the model's forward, to which it is `named`; all layers of it lie in sessions."""

    def __init__(
        self, call: Callable[..., Any], named: str, cache: Cache, room: int, graph: Callable[..., Replayed]
    ) -> None:
        self.call, self.named, self.cache = call, named, weakref.ref(cache)
        self.names: tuple[str, ...] = ()
        self.options: dict[str, Any] = {}
        layers: Any = cache.layers
        sessions: dict[int, Session] = {id(layer.session): layer.session for layer in layers}
        self.recorded = Recorded(
            list(sessions.values()), self._run, room=room, replayed=self._replayed, others=layers, graph=graph
        )

    def _run(self, *inputs: Tensor) -> Any:
        cache: Any = {self.named: self.cache()}
        return self.call(**dict(zip(self.names, inputs, strict=True)), **cache, **self.options)

    def _replayed(self) -> None:
        cache: Any = self.cache()
        for layer in cache.layers:
            layer.length += 1

    def __call__(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
        if (tuple(tensors), options) != (self.names, self.options):
            self.names, self.options = tuple(tensors), options
            self.recorded.forget()
        before = self.recorded.replays
        found = self.recorded(*tensors.values())
        if self.recorded.replays == before:
            return found
        # What lies in the recording is written over by the next step.
        return type(found)(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in found.items()})


def recording(forward: Callable[..., Any], room: int, graph: Callable[..., Replayed] = CudaGraph) -> Callable[..., Any]:
    """A model's forward whose steps are recorded, where they can be; everything else is as it was.

    A step is a call without gradients of one token a sequence, all of them real, over a cache of which every layer lies
    in a session. room, graph: as in `Recorded`. Where there is an `attention_mask`, the device is asked once a step
    whether the newest tokens are real.
    """
    steps: weakref.WeakKeyDictionary[Cache, Steps] = weakref.WeakKeyDictionary()

    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        step = _step(kwargs, graph) if not args else None
        if step is None:
            return forward(*args, **kwargs)
        named, cache, tensors, options = step
        if cache not in steps:
            steps[cache] = Steps(forward, named, cache, room, graph)
        return steps[cache](tensors, options)

    return recorded


def _step(kwargs: dict[str, Any], graph: Any) -> tuple[str, Cache, dict[str, Tensor], dict[str, Any]] | None:
    """(name of the cache, cache, tensors, other arguments) of a call that is a step; None for any other call."""
    given = {name: x for name, x in kwargs.items() if x is not None}
    ids, mask = given.get("input_ids"), given.pop("attention_mask", None)
    name = next((name for name in CACHES if name in given), None)
    if name is None or not isinstance(ids, Tensor) or ids.shape[1] != 1 or torch.is_grad_enabled():
        return None
    cache = given.pop(name)
    tensors = {name: given.pop(name) for name in ("input_ids", *POSITIONS) if name in given}
    if (
        not all(isinstance(layer, Ragged) and layer.length for layer in getattr(cache, "layers", [None]))
        or any(isinstance(x, Tensor) for x in given.values())
        or given.get("use_cache") is False
        or (graph is CudaGraph and ids.device.type != "cuda")
        or (mask is not None and not bool(mask[:, -1].all()))
    ):
        return None
    if "position_ids" not in tensors:
        tensors["position_ids"] = torch.full_like(ids, cache.get_seq_length())
    return name, cache, tensors, given
