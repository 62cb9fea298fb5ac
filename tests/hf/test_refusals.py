"""What cannot be served is refused: the error names it, says why, and what would do."""

import re
import subprocess
import sys

import pytest
import torch
from hf_models import SIZES, Near, made, near, padded, tokens
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from saccade.cache import Quest, snapkv, streaming_llm
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.caching import cache_name
from saccade.serve import Engine


class Ahead(Near):
    """Not causal."""

    spec = Near.spec
    causal = False


def small(size):
    return {"d_model": size, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 20}


def told(value):
    """A parameter in a test's name, which all processes must give alike: without addresses."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (Ahead, ValueError, "what: near is not causal"),
        ("nat", ValueError, "what: nat works on a grid of 2 axes"),
        ("nsa", TypeError, "what: nsa is a Mixer, which has projections of its own"),
        ("hedgehog", ValueError, "what: hedgehog decodes with a state of its own"),
        ("nta", ValueError, "id: got 'nta'; choose one of"),
        (3, TypeError, "what: got 3; pass a mechanism's id"),
        (torch.nn.Linear, TypeError, "what: got Linear; pass a mechanism's id"),
        ([None], ValueError, "what: got 1 for 3 layers of attention; pass one a layer"),
        (
            {"model.layers.0": "moba"},
            TypeError,
            r"what: got a dict of \['model.layers.0'\]; layers go by their place, so pa",
        ),
        ([None, "tuned.json", None], ValueError, "what: got the file 'tuned.json' in a list; pass it alone"),
        (Quest, TypeError, r"what: got Quest itself; pass a policy that it makes, Quest\(...\)"),
        (snapkv, TypeError, r"what: got snapkv itself; pass a policy that it makes, snapkv\(...\)"),
        ([None, snapkv, None], TypeError, "what: got snapkv itself"),
        ([None, "nta", None], ValueError, "id: got 'nta'; choose one of"),
        (Near(Dims(4, 9, 2)), ValueError, r"what: near was built for Dims\(.*head_dim=9.*; layer 0 of the model has"),
    ],
    ids=told,
)
def test_what_is_refused_before_anything_is_changed(what, error, message):
    model = made("llama")
    with pytest.raises(error, match=message):
        apply(model, what)
    assert model.config._attn_implementation == "eager"
    assert not any("saccade" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("mistral_slides", "what: layer 0 of the model has a sliding window, which near does not know; pass a list"),
        ("qwen2_slides", "what: layer 1 of the model has a sliding window"),
        ("gemma2", "what: layer 0 of the model has a sliding window"),
    ],
)
def test_a_window_of_the_model_is_refused(shape, message):
    model = made(shape)
    with pytest.raises(ValueError, match=message):
        apply(model, near(model, 3))


def test_a_softcap_of_the_model_is_refused():
    model = made("gemma2")
    with pytest.raises(ValueError, match="what: layer 1 of the model has a softcap"):
        apply(model, [None, near(model, 3), None])


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "model: got Linear; pass a transformers PreTrainedModel"),
        (
            lambda: T5ForConditionalGeneration(T5Config(**small(8), decoder_start_token_id=0)),
            ValueError,
            "model: T5ForConditionalGeneration is an encoder with a decoder",
        ),
        (
            lambda: BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
            ValueError,
            "model: BertModel attends in both directions; pass a causal language model",
        ),
        (lambda: Closed(LlamaConfig(**SIZES)), ValueError, "model: the attention of Closed does not go through"),
        (
            lambda: MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20)),
            ValueError,
            "model: the attention of MambaForCausalLM does not go through transformers' AttentionInterface",
        ),
        (lambda: None, TypeError, "model: got NoneType; pass a transformers PreTrainedModel"),
    ],
    ids=["no_model", "t5", "bert", "closed", "mamba", "none"],
)
@pytest.mark.parametrize("into", [apply, Engine], ids=["apply", "engine"])
def test_models_are_refused(model, error, message, into):
    made = model()
    config = getattr(made, "config", None)
    before = getattr(config, "_attn_implementation", None)
    with pytest.raises(error, match=message):
        into(made)
    assert getattr(config, "_attn_implementation", None) == before


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: snapkv(0), "budget: got 0; pass an integer >= 1"),
        (lambda: snapkv(0.0), r"budget: got 0.0; pass a float in \(0, 1\]"),
        (lambda: Quest(1.5), r"budget: got 1.5; pass a float in \(0, 1\]"),
        (
            lambda: streaming_llm(3),
            "budget: got 3 tokens, which does not hold 4 sinks and 0 recent tokens; pass at least 4",
        ),
        (lambda: mechanism("ltri_llm")(Dims(4, 8, 2), budget=9), "budget: got 9 tokens, which does not hold 128 sinks"),
        (
            lambda: mechanism("squeezed_attention")(Dims(4, 8, 2), budget=True),
            "budget: got True .bool.; pass a number abo",
        ),
        (
            lambda: mechanism("duo_attention")(Dims(4, 8, 2), share=2.0),
            "share: got 2.0; pass a number from 0 to 1, or No",
        ),
    ],
    ids=told,
)
def test_budgets_are_refused(policy, message):
    with pytest.raises((ValueError, TypeError), match=message):
        policy()


def test_a_share_that_does_not_hold_the_sinks_of_a_prompt_stores_nothing():
    model, read, cache = made("llama"), tokens(1, 30), DynamicCache()
    message = r"budget: got 0\.05 of 30 tokens, 2 in layer 0, which does not hold 4 sinks"
    with apply(model, streaming_llm(0.05)), pytest.raises(ValueError, match=message):
        model(read, **{cache_name(model): cache})
    assert cache.layers[0].session.store(0).pool.in_use == 0


class Closed(LlamaModel):
    """A model that does not say that its attention can be replaced."""

    _supports_attention_backend = False


CALLS = {
    "static": (
        lambda m, x: m(x, cache=StaticCache(m.config, max_cache_len=8)),
        "cache: got 9 tokens for a cache that holds 8; pass a StaticCache with more room, or a DynamicCache",
    ),
    "four_axes": (lambda m, x: m(x, attention_mask=torch.ones(2, 1, 9, 9)), "attention_mask: got a tensor of shape"),
    "short_mask": (
        lambda m, x: m(x, attention_mask=torch.ones(2, 9)[:, :5], cache=DynamicCache()),
        r"attention_mask: got shape \(2, 5\) for a batch of 2 that has read 9 tokens",
    ),
    "packed": (
        lambda m, x: m(x, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), use_cache=False),
        "attention_mask: the model asks for more than causal attention",
    ),
    "weights": (lambda m, x: m(x, output_attentions=True), "output_attentions: saccade does not serve it"),
    "continuous": (lambda m, x: m.generate_batch(x.tolist()), "model: continuous batching keeps its cache in pages"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_refused(call):
    model, (asked, message) = made("llama"), CALLS[call]
    with apply(model), pytest.raises(ValueError, match=message):
        asked(model, tokens(2, 9))


def test_dropout_is_refused():
    model = made("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with apply(model), pytest.raises(ValueError, match=r"dropout: got 0.5; set"):
        model(tokens(1, 5))


def test_a_mechanism_that_cannot_decode_needs_no_cache():
    model, read = made("llama"), tokens(1, 16)
    with apply(model, "combiner"):
        assert torch.isfinite(model(read, use_cache=False).logits).all()
        with pytest.raises(ValueError, match="use_cache: combiner cannot attend from new tokens to those in a cache"):
            model(read)
        with pytest.raises(ValueError, match="pass use_cache=False"):
            model.generate(read, max_new_tokens=2)


def test_a_mechanism_of_prompts_takes_them_in_one_piece():
    model, read = made("llama"), tokens(1, 9)
    with apply(model, "minference"):
        assert model.generate(read, max_new_tokens=2).shape == (1, 11)
        with pytest.raises(ValueError, match="minference decides from the whole prompt, and got 4 tokens"):
            model.generate(read, max_new_tokens=2, prefill_chunk_size=4)


def test_padding_inside_of_a_window_is_refused():
    model, (read, real) = made("mistral_slides"), padded("right")
    real = torch.cat([real, torch.ones(4, 2, dtype=real.dtype)], 1)
    with (
        apply(model),
        pytest.raises(ValueError, match="padding lies between tokens, and a sliding window of 5"),
    ):
        model(torch.cat([read, tokens(4, 2)], 1), attention_mask=real)


def test_a_model_that_shares_its_configuration_is_told():
    one = made("llama")
    two = type(one)(one.config)
    with apply(one), pytest.raises(RuntimeError, match="shares the configuration of"):
        two(tokens(1, 5))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_it_imports_no_transformers():
    done = run("import saccade.hf, sys; assert 'transformers' not in sys.modules")
    assert not done.returncode, done.stderr


def test_a_missing_transformers_gives_one_error():
    done = run("import sys; sys.modules['transformers'] = None; from saccade.hf import apply; apply(None)")
    assert re.search(r"ImportError: transformers is missing: pip install saccade\[hf\]$", done.stderr.strip())
