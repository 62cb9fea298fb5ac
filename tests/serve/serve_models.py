"""A small random model, policies of every kind, and what each request gives when it is alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import cache
from saccade.cache import AcrossLayers, Evict, KeyNorm, Policy, Quest, Received
from saccade.hf import apply

PAGE, CHUNK, VOCABULARY = 4, 8, 61


def paged(policy):
    policy.page = PAGE
    return policy


POLICIES = {
    "dense": paged(Policy()),
    "streaming": paged(cache.streaming_llm(0.5, sinks=1)),
    "observed": paged(cache.snapkv(0.5, window=3)),
    "heads": paged(cache.adakv(0.5, window=3)),
    "often": paged(Evict(Received(), 0.6, recent=2, every=3)),
    "layers": paged(Evict(KeyNorm(), AcrossLayers(0.5))),
    "quest": Quest(8, page=PAGE),
}


def made(turned="default"):
    """A model with no parameter at its initial value, whose tokens do not repeat."""
    scaled = {} if turned == "default" else {"factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation="sdpa", pad_token_id=0, bos_token_id=1,
        eos_token_id=None, rope_parameters={"rope_theta": 1000.0, "rope_type": turned, **scaled},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
        model.model.embed_tokens.weight *= 6
    return model


def prompts(count, least=7, most=40):
    """Token lists of all lengths, those that end a chunk, or begin one, among them."""
    lengths = torch.randint(least, most + 1, (count,)).tolist()
    lengths[:3] = [2 * CHUNK, 2 * CHUNK + 1, CHUNK][:count]
    return [torch.randint(1, VOCABULARY, (length,)).tolist() for length in lengths]


@torch.no_grad()
def alone(model, prompt, tokens, policy="dense", chunk=CHUNK, policies=POLICIES):
    """What `generate` gives for one prompt, read in the same chunks; dense attention is the model's own."""
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": chunk}
    read = torch.tensor([prompt])
    if policy == "dense":
        return model.generate(read, **options)[0, len(prompt) :].tolist()
    with apply(model, policies[policy]):
        return model.generate(read, **options)[0, len(prompt) :].tolist()
