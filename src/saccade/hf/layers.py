"""The attention layers of a transformers model, or why they cannot be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saccade.contract import Dims


@dataclass(frozen=True)
class Layer:
    """One attention layer: its module, its index among them, its shape, and what its softmax has besides.

    window: keys that it sees, the query included, or None. softcap: cap of its scores, or None.
    """

    module: Any
    index: int
    dims: Dims
    window: int | None
    softcap: float | None


def layers_of(model: Any) -> list[Layer]:
    """Every attention layer of a causal model that goes through transformers' `AttentionInterface`, in order.

    Errors: ImportError without transformers; TypeError for another kind of object; ValueError for a model whose
    attention cannot be replaced, with the reason.
    """
    try:
        from transformers import PreTrainedModel
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # there, and broken: its own message says what is wrong
            raise
        raise ImportError("transformers is missing: pip install saccade[hf]") from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}; pass a transformers PreTrainedModel (of a wrapped one, the "
            "model inside)"
        )
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder with a decoder; pass a decoder-only causal language model")
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise ValueError(
            f"model: the attention of {name} does not go through transformers' AttentionInterface, so that nothing can "
            "take its place; pass a model whose class says _supports_attention_backend"
        )
    modules: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "is_causal")
    ]
    configs = {id(m.config): m.config for m in modules}
    if not modules or set(configs) != {id(config)}:
        raise ValueError(
            f"model: {name} holds attention of {len(configs)} configurations besides its own; pass the language model "
            "inside it"
            if modules
            else f"model: {name} has no layer of attention that can be found"
        )
    if len({m.layer_idx for m in modules}) < len(modules):
        raise ValueError(f"model: {name} has several attentions a layer; pass a decoder-only causal language model")
    if not getattr(config, "is_causal", True) or not all(m.is_causal for m in modules):
        raise ValueError(f"model: {name} attends in both directions; pass a causal language model")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(f"model: {name} attends inside of chunks, which is not served; pass a model without")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kinds = getattr(config, "layer_types", None)

    def layer(index: int, module: Any) -> Layer:
        width = getattr(module, "head_dim", None) or config.hidden_size // heads
        slides = kinds is None or kinds[module.layer_idx] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if slides else None
        softcap = getattr(config, "attn_logit_softcapping", None)
        return Layer(module, index, Dims(heads, width, kv_heads), window, softcap)

    return [layer(index, module) for index, module in enumerate(modules)]
