"""A model's forward pass over requests that come and go: each layer hands its rows to the sessions that they are of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from saccade.cache import PagePool, Policy, Session
from saccade.hf.caching import cache_name
from saccade.hf.handle import Handle
from saccade.hf.interface import NAME, Tokens
from saccade.hf.layers import layers_of
from saccade.hf.serving import Asked, Caching, serving
from saccade.hf.turned import rotations_of


@dataclass(frozen=True)
class Part:
    """Rows of a batch whose tokens, ids (G, N), a session reads next."""

    session: Session
    rows: slice
    ids: Tensor


@dataclass(frozen=True)
class Shared:
    """What attends in a layer, whose rows are of several sessions: one after another, each with its policy."""

    caching: Caching
    mechanism: None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        raise RuntimeError("model: an engine serves it; close the engine before calling it")

    def read(self, parts: Sequence[Part], tokens: Tokens, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        found = [self.caching.read(p, tokens, q[p.rows], k[p.rows], v[p.rows], asked) for p in parts]
        return found[0] if len(found) == 1 else torch.cat(found)


class Passing(CacheLayerMixin):
    """A layer of transformers' cache that holds nothing: new keys and values are marked with whom they are for."""

    is_sliding = False

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = parts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        setattr(key_states, NAME, self.parts)
        return key_states, value_states

    # Positions are handed to the model, and what a token sees is the sessions' matter.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class Reader:
    """A model of transformers that reads into sessions, until `restore`.

    model: what `saccade.hf.apply` can reach. policies: those that will read; no layer may have what they do not know, a
    sliding window or a softcap. num_layers, kv_heads, longest: of the model.
    """

    def __init__(self, model: Any, policies: Collection[Policy]) -> None:
        layers = layers_of(model)
        self.model, self.num_layers, self.kv_heads = model, len(layers), layers[0].dims.num_kv_heads
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._short = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        each_policy = [[cast(Caching, each) for each in serving(policy, layers)] for policy in policies]
        self.handle = Handle(model, layers, [Shared(each) for each in each_policy[0]])
        self._rotations = next(iter(rotations_of(model, layers, each_policy[0]).values()), {})
        for served in each_policy:
            self.handle.tell({id(served[0].policy): self._rotations}, served)

    def session(self, policy: Policy, pools: dict[Any, PagePool]) -> Session:
        """Nothing read yet. pools: where its pages lie."""
        return Session(policy, self.num_layers, pools, rotations=self._rotations)

    @torch.no_grad()
    def __call__(self, parts: Sequence[tuple[Session, Sequence[Sequence[int]], Sequence[int]]]) -> Tensor:
        """Logits (B, V) after the last token of each row. parts: sessions, the ids that their rows read, N each, and
        how many tokens each row has read before."""
        ids = torch.tensor([row for _, rows, _ in parts for row in rows], device=self.model.device)
        begin = torch.tensor([count for _, _, counts in parts for count in counts], device=self.model.device)
        told, first = [], 0
        for session, rows, _ in parts:
            place = slice(first, first + len(rows))
            told.append(Part(session, place, ids[place]))
            first = place.stop
        out = self.model(
            ids,
            position_ids=begin[:, None] + torch.arange(ids.shape[1], device=ids.device),
            use_cache=True,
            **{cache_name(self.model): Cache(layers=[Passing(told) for _ in range(self.num_layers)])},
            **self._short,
        )
        return out.logits[:, -1]

    def restore(self) -> None:
        """Give the model back as it was."""
        self.handle.restore()
