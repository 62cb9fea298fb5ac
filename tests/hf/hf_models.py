"""Small random models of transformers, a window that may be put into them, and what both are compared with."""

import copy

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from saccade import attend
from saccade.contract import Attention, Case, Dims, Spec
from saccade.testing.budget import assert_close
from saccade.where import Causal, Window

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 13, "final_logit_softcapping": 7.0}
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2_slides": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 6}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral_slides": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": None}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**GEMMA, "sliding_window": 5, "attn_logit_softcapping": 3.0}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_experts_per_tok": 2,
            "num_local_experts": 2,
            "experts_implementation": "eager",
        },
    ),
    "gemma2_plain": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**GEMMA, "layer_types": ["full_attention"] * 3, "attn_logit_softcapping": None},
    ),
}
FULL = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2_plain"]  # what a mechanism can serve
TERMS = 3 * (40 + 32) + 32


def made(shape):
    """A model with no parameter at its initial value."""
    model, config, own = SHAPES[shape]
    model = model(config(**{**SIZES, **own})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
    return model


def wide(model):
    """The same model in float64."""
    return copy.deepcopy(model).double()


def tokens(*shape):
    return torch.randint(1, 61, shape)


def padded(side, lengths=(11, 7, 1, 9)):
    """Tokens (B, N) and their attention_mask, zeros on one side."""
    real = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        real[row, (slice(-length, None) if side == "left" else slice(length))] = 1
    return tokens(*real.shape) * real, real


# Options of `generate`.
ROUTES = {"greedy": {}, "beam": {"num_beams": 3}, "chunked": {"prefill_chunk_size": 4}}


def generated(model, read, real, **options):
    """Six tokens more."""
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=6, **options)


def close(found, oracle, eager, where=...):
    assert_close(found[where], oracle[where], eager[where], name="logits", terms=TERMS)


class Near(Attention):
    """The last `size` keys, o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over i - size < j <= i."""

    spec = Spec("near", "Near", "An example", "unpublished", 2026, "mine", uses=("attend",))
    causal = True

    def __init__(self, dims, *, size=4):
        super().__init__(dims)
        self.size = size

    def compute(self, q, k, v):
        return attend(q, k, v, Causal() & Window(self.size))

    @classmethod
    def cases(cls):
        return [Case(Dims(4, 8, 2), 13, {"size": 3}), Case(Dims(2, 4), 9, {"size": 20}, batch=1)]


def near(model, size):
    """A Near for the heads of this model."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Near(Dims(config.num_attention_heads, width, config.num_key_value_heads), size=size)


def alone(model, read, real):
    """Logits of a padded batch whose rows are read one by one, without padding, at their positions."""
    rows = []
    for row, where in zip(read, real.bool(), strict=True):
        found = model(row[where][None], position_ids=where.nonzero().T).logits[0]
        rows.append(found.new_zeros(len(row), found.shape[1]).index_put((where,), found))
    return torch.stack(rows)


def window_mask(real, size, dtype):
    """The additive mask (B, 1, N, N) of a causal window over real tokens, for eager attention."""
    # Eager attention forms weights in float32, where a larger number would be infinite, and rows of padding NaN.
    n = real.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = (j <= i) & (i - j < size) & real.bool()[:, None, None]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(dtype)
