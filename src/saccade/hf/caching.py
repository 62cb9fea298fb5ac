"""The layers of transformers' cache that a policy takes the place of: they lie in a session's ragged stores."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from saccade.cache import Rotation, Session
from saccade.hf.interface import NAME
from saccade.hf.serving import Caching

CACHES = ("cache", "past_key_values")  # what transformers calls the argument, from new to old


def cache_name(module: Any) -> str:
    """What this version of transformers calls the cache of a module's forward."""
    names = inspect.signature(module.forward).parameters
    return next(name for name in CACHES if name in names)


@dataclass(frozen=True)
class Memory:
    """Bytes that caches hold, as their tensors say, beside `dense`, those of transformers' own cache; ratio: of both.

    in_use: what of `held` is not free pages.
    """

    held: int
    in_use: int
    dense: int

    @property
    def ratio(self) -> float:
        return self.held / max(1, self.dense)


class Ragged(CacheLayerMixin):
    """A layer of a cache whose tokens lie in a session: it hands new keys on, and says how many there were.

    room: tokens that a static layer was made for, of which this takes the place; 0 for a dynamic one. Nothing is
    allocated for them here, and more may come; other layers of the same cache have them, so that masks are told.
    """

    is_sliding = False

    def __init__(self, session: Session, index: int, room: int = 0) -> None:
        super().__init__()
        self.session, self.index, self.room = session, index, room
        self.length = 0  # columns of the batch, padding included: what positions and masks go by
        self.bytes_a_token = 0
        self.announced = False
        self.ids: Tensor | None = None  # of the tokens that come next, where the model embeds ids

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.bytes_a_token = sum(x[:, :, :1].numel() * x.element_size() for x in (key_states, value_states))
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.announced:
            raise RuntimeError(
                "cache: it was filled under saccade.hf.apply and lies in pages, which this model does not read now; "
                "start from an empty cache"
            )
        self.announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        setattr(key_states, NAME, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self.room, self.length + query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        store = self.session.stores[self.index]
        return -1 if store is None else store.batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.length:
            self.session.reorder(beam_idx.tolist(), self.index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length:
            batch = self.session.store(self.index).batch
            self.session.reorder([row for row in range(batch) for _ in range(repeats)], self.index)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.length:
            batch = torch.arange(self.session.store(self.index).batch)
            self.session.reorder(batch[indices.cpu()].tolist(), self.index)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"crop: got {tokens_to_remove}, but tokens that were dropped do not come back, and readers have seen "
                "those that are to go; generate without taking tokens back (no assisted decoding)"
            )

    def reset(self) -> None:
        self.session.forget(self.index)
        self.length, self.is_initialized = 0, False

    def offload(self) -> None:
        raise ValueError("cache: one that is offloaded does not hold pages; pass a DynamicCache without offloading")

    prefetch = offload


def dense_bytes(layer: Any) -> int:
    """Bytes that transformers' own layer would hold."""
    if isinstance(layer, Ragged):
        return max(layer.room, layer.length) * layer.bytes_a_token
    return sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)


class Swap:
    """Before attentions run, their layers of the cache are `Ragged` ones: a hook of the first, for all of them.

    modules: those attentions. rotations: by the id of a policy, those of its sessions.
    """

    def __init__(
        self, modules: Sequence[Any] = (), rotations: Mapping[int, Mapping[int, Rotation]] | None = None
    ) -> None:
        self.modules, self.rotations = modules, rotations or {}
        self.ids: Tensor | None = None
        self.sessions: weakref.WeakKeyDictionary[Cache, dict[int, Session]] = weakref.WeakKeyDictionary()

    def hook(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """transformers hands the cache to each attention by name."""
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        if cache is None:
            return
        sessions = self.sessions.setdefault(cache, {})
        for each in self.modules:
            served = vars(each).get(NAME)
            if not isinstance(served, Caching):
                continue
            layer = cache.layers[each.layer_idx] if each.layer_idx < len(cache.layers) else None
            if not isinstance(layer, Ragged):
                layer, of = self._layer(cache, each.layer_idx), id(served.policy)
                if of not in sessions:
                    turned = self.rotations.get(of)
                    sessions[of] = Session(served.policy, served.num_layers, rotations=turned)
                room = layer.get_max_length() if isinstance(layer, StaticLayer) else 0
                layer = cache.layers[each.layer_idx] = Ragged(sessions[of], served.index, room)
            if layer.session.policy is not served.policy:
                raise ValueError("cache: it was filled under another policy; start from an empty cache")
            layer.announced, layer.ids = True, self.ids

    def note_ids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the embedding: what is read now."""
        self.ids = args[0] if args else kwargs.get("input")

    def _layer(self, cache: Any, index: int) -> Any:
        if not isinstance(cache, Cache):
            raise ValueError(f"cache: got {type(cache).__name__}; pass a DynamicCache or a StaticCache")
        while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if isinstance(layer, Ragged):
            return layer
        if type(layer) not in (DynamicLayer, StaticLayer) or cache.offloading:
            kind = "one that is offloaded" if cache.offloading else f"a {type(layer).__name__}"
            raise ValueError(f"cache: layer {index} is {kind}, which a policy cannot take the place of; pass a "
                             "DynamicCache or a StaticCache")  # fmt: skip
        if length := int(cache.get_seq_length(index)):  # of a static layer that was written to, a tensor
            raise ValueError(
                f"cache: layer {index} holds {length} tokens that were read without the policy, which has seen none of "
                "their queries; start from an empty cache"
            )
        return layer

    def memory(self) -> Memory:
        """Over all caches that are alive."""
        layers = [layer for cache in self.sessions for layer in cache.layers]
        sessions = {id(layer.session): layer.session for layer in layers if isinstance(layer, Ragged)}.values()
        whole = sum(dense_bytes(layer) for layer in layers if not isinstance(layer, Ragged))
        held, in_use = sum(each.nbytes for each in sessions), sum(each.nbytes_in_use for each in sessions)
        return Memory(held + whole, in_use + whole, sum(map(dense_bytes, layers)))
