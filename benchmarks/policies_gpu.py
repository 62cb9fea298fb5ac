"""Decoding with policies on a GPU, in a whole model: a step of a Llama-3-8B of random weights, beside dense decoding.

    python benchmarks/policies_gpu.py --batch 1 --tokens 131072

Prompts are read by the attention of every layer, from hidden states that are drawn: queries, keys and values go the way
that they go in a model, and memory is what policies leave, without the cost of the other products. Then tokens are
decoded by the whole model. `dense` is ours too: all tokens in the same pages (`Policy()`), read by the same kernels.
`transformers` is its own `DynamicCache` with scaled_dot_product_attention. Ours are replays of a recorded step
(`Handle.record`); norms, rotary embedding and MLP may be compiled (--compile).

A line: milliseconds of a step, the median of STEPS, the host's time included; times as fast as `dense` and as
`transformers`; bytes of the cache over those of transformers' own; what its bytes and the weights take at the copy rate
of the same device, over the time of a step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save, show
from decode_gpu import copy_rate
from rich.progress import track
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from saccade.cache import Policy, Quest, snapkv
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.caching import cache_name
from saccade.hf.interface import Tokens

STEPS, DEVICE, LAYERS, HEADS, KV_HEADS, DIM = 24, "cuda", 32, 32, 8, 128
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 1 << 18,
}


def duo(share: float) -> Any:
    """One policy a layer, of random gates: which heads are full costs nothing."""
    made = [mechanism("duo_attention")(Dims(HEADS, DIM, KV_HEADS), share=share) for _ in range(LAYERS)]
    for each in made:
        torch.nn.init.uniform_(each.alpha)
    return [each.to(DEVICE, torch.bfloat16) for each in made]


def over_layers(name: str, **params: Any) -> Any:
    dims = Dims(LAYERS * HEADS, DIM, LAYERS * KV_HEADS)
    return mechanism(name)(dims, num_layers=LAYERS, **params).to(DEVICE, torch.bfloat16)


POLICIES: dict[str, Callable[[], Any]] = {
    "dense": Policy,
    "DuoAttention, 50 % of heads": lambda: duo(0.5),
    "DuoAttention, 25 % of heads": lambda: duo(0.25),
    "TidalDecode, 1024 tokens": lambda: over_layers("tidal_decode", budget=1024),
    "TidalDecode, 4096 tokens": lambda: over_layers("tidal_decode", budget=4096),
    "LessIsMore, 4096 tokens": lambda: over_layers("lessismore", budget=4096),
    "Quest, 4096 tokens": lambda: Quest(4096),
    "SnapKV, 25 %": lambda: snapkv(0.25),
}


def model_of(compiled: bool) -> LlamaForCausalLM:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    torch.set_default_dtype(torch.float32)
    if compiled:
        for layer in model.model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile()
        modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb)
    return model


def read_prompt(model: LlamaForCausalLM, cache: DynamicCache, batch: int, tokens: int) -> None:
    """Every layer's attention reads `tokens` drawn hidden states."""
    at = torch.arange(tokens, device=DEVICE)[None]
    for layer in model.model.layers:
        x = torch.randn(batch, tokens, HEADS * DIM, device=DEVICE, dtype=torch.bfloat16)
        turned = model.model.rotary_emb(x, at)
        given = {cache_name(layer.self_attn): cache, "attention_mask": Tokens(tokens, tokens), "position_ids": at}
        layer.self_attn(hidden_states=x, position_embeddings=turned, **given)


def fill(model: LlamaForCausalLM, cache: DynamicCache, batch: int, tokens: int) -> None:
    """transformers' own cache, as large."""
    for layer in range(LAYERS):
        k, v = (torch.randn(batch, KV_HEADS, tokens, DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        cache.update(k, v, layer)


def steps(model: LlamaForCausalLM, cache: DynamicCache, batch: int, tokens: int) -> list[float]:
    """Seconds of each of STEPS steps, one after another."""
    ids = torch.randint(0, LLAMA["vocab_size"], (batch, 1), device=DEVICE)
    name, spent = cache_name(model), []
    for at in range(tokens, tokens + STEPS + 4):
        where = torch.full((batch, 1), at, device=DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(input_ids=ids, position_ids=where, **{name: cache})
        ids = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return spent[4:]  # the first compile, the second records


def measured(model: LlamaForCausalLM, name: str, batch: int, tokens: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = DynamicCache()
    of_dense = batch * tokens * 2 * KV_HEADS * DIM * 2 * LAYERS
    if name == "transformers":
        fill(model, cache, batch, tokens)
        spent = steps(model, cache, batch, tokens)
        held = of_dense
    else:
        with apply(model, POLICIES[name]()) as handle:
            read_prompt(model, cache, batch, tokens)
            handle.record(64)
            spent = steps(model, cache, batch, tokens)
            held = handle.memory().held
    return {
        "policy": name,
        "batch": batch,
        "context": tokens,
        "ms": round(1e3 * statistics.median(spent), 3),
        "cache GB": round(held / 1e9, 2),
        "memory": round(held / of_dense, 3),
        "allocated GB": round((torch.cuda.memory_allocated() - before) / 1e9, 2),
        "peak GB": round((torch.cuda.max_memory_allocated() - before) / 1e9, 2),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--only", default="", help="policies whose names hold one of these, after commas")
    parser.add_argument("--compile", action="store_true", help="compile what is no attention")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = model_of(given.compile)
    weights = sum(x.nbytes for x in model.parameters()) - model.model.embed_tokens.weight.nbytes
    rate = copy_rate()
    torch.cuda.empty_cache()
    wanted = [x for x in given.only.split(",") if x]
    names = ["dense", "transformers", *list(POLICIES)[1:]]
    names = [name for name in names if name == "dense" or not wanted or any(x in name for x in wanted)]
    rows: list[dict[str, Any]] = []
    for name in track(names, "policies"):
        try:
            row = measured(model, name, given.batch, given.tokens)
        except torch.OutOfMemoryError:
            row = {"policy": name, "batch": given.batch, "context": given.tokens, "ms": None}
        rows.append(row)
        of = {each["policy"]: each["ms"] for each in rows}
        for base in ("dense", "transformers"):
            known = row["ms"] is not None and of.get(base) is not None
            row[f"over {base}"] = round(of[base] / row["ms"], 2) if known else None
        if row["ms"] is not None and name == "dense":
            row["over floor"] = round(row["ms"] * rate / (weights + row["cache GB"] * 1e9) / 1e3, 2)
        row |= {"compiled": given.compile, "pattern": f"{name}, batch {given.batch}", "tokens": given.tokens}
        save("policies_gpu", [row], device=DEVICE, copy_rate=rate, weights=weights)
    shown = ("policy", "ms", "over dense", "over transformers", "cache GB", "memory", "peak GB", "over floor")
    title = f"One step, Llama-3-8B, batch {given.batch}, {given.tokens} tokens"
    show(title, [{name: row.get(name) for name in shown} for row in rows])


if __name__ == "__main__":
    main()
