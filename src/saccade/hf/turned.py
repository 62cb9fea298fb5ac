"""How a model turns the queries and keys of a layer: read from its rotary embedding, and believed once it was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Policy, Rotation, Turned
from saccade.cache.wrapped import Wrapped
from saccade.hf.interface import NAME, Tokens
from saccade.hf.layers import Layer
from saccade.hf.serving import Caching, Serving
from saccade.testing.budget import compare

GROWS = ("dynamic", "longrope")  # kinds of rotary embedding whose rates depend on how much was read
PLACES = (0, 1, 3, 11, 40)


class _Queries:
    """What attends in a layer while it is tried: notes its queries, and gives zeros."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Any) -> Tensor:
        self.q = q
        return q.new_zeros(*q.shape[:3], v.shape[3])


@torch.no_grad()
def rotation_of(model: Any, layer: Layer) -> Rotation | None:
    """By which rotation a layer turns q and k, or None: one without, or with another than `Rotation` knows.

    The layer is run on a few random tokens, with and without their positions, since its class alone knows whether and
    which channels it turns. The model's attention must be `saccade.hf.interface.attention`.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    rates = getattr(rotary, "inv_freq", None)
    if rotary is None or rates is None or getattr(rotary, "rope_type", "default") in GROWS:
        return None
    module, device = layer.module, next(layer.module.parameters()).device
    # As the embedding forms its angles, whatever dtype the model is in.
    rotation = Rotation(rates.float(), float(getattr(rotary, "attention_scaling", 1.0)))
    random = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, len(PLACES), model.config.hidden_size, generator=random, device="cpu")
    x, at = x.to(device=device, dtype=model.dtype), torch.tensor(PLACES, device=device)
    served, found = vars(module)[NAME], []
    try:
        cos, sin = rotary(x, at[None])
        for turn in ((cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))):
            tried = vars(module)[NAME] = _Queries()
            module.forward(x, position_embeddings=turn, attention_mask=Tokens(len(PLACES), len(PLACES)))
            found.append(tried.q)
        turned, plain = found
        truth = rotation.turn(plain.double(), at)
        same = compare(turned, truth, rotation.turn(plain, at), terms=plain.shape[3]).ok
    except Exception:  # whatever a model's own code says to a call that it does not know
        return None
    finally:
        vars(module)[NAME] = served
    return rotation if same and not torch.equal(turned, plain) else None


def rotations_of(model: Any, layers: Sequence[Layer], served: Sequence[Serving]) -> dict[int, dict[int, Rotation]]:
    """For the id of each policy: how the layers that share it turn q and k, by their place among each other."""
    found: dict[int, dict[int, Rotation]] = {}
    for layer, each in zip(layers, served, strict=True):
        if isinstance(each, Caching) and (rotation := rotation_of(model, layer)) is not None:
            found.setdefault(id(each.policy), {})[each.index] = rotation
    return found


def told(rotations: Mapping[int, Mapping[int, Rotation]], served: Sequence[Serving]) -> list[tuple[Turned, Rotation]]:
    """Policies that are to be told how q and k come turned, and how that is. rotations: of `rotations_of`.

    Errors: ValueError for one that layers share which turn in unlike ways.
    """
    found: dict[int, tuple[Turned, Rotation]] = {}
    for each in served:
        if not isinstance(each, Caching):
            continue
        policy, mine = innermost(each.policy), list(rotations.get(id(each.policy), {}).values())
        if mine and isinstance(policy, Turned):
            if len(mine) < each.num_layers or any(mine[0] != other for other in mine):
                raise ValueError(
                    f"what: {policy} is shared by layers that turn q and k in unlike ways, and knows one; pass a list "
                    "of mechanisms, one a layer"
                )
            found[id(policy)] = policy, mine[0]
    return list(found.values())


def innermost(policy: Policy) -> Policy:
    """Who decides, of a policy that others may be wrapped around."""
    while isinstance(policy, Wrapped):
        policy = policy.policy
    return policy
