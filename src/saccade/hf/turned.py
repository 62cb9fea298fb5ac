"""How a model turns the queries and keys of a layer: read from its rotary embedding, and believed once it was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Rotation
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
