"""The language model: the same numbers whole, in pieces, as transformers' Llama and out of a file."""

import json
import lzma
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call

from saccade.hosts.lm import LM, WEIGHTS, Cache, LMConfig, dense
from saccade.tasks.text import held_out_text
from saccade.testing.budget import assert_close

SMALL = LMConfig(vocab_size=40, dim=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=36)
SHAPES = [
    SMALL,
    LMConfig(vocab_size=33, dim=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, ffn_dim=8, rope_theta=50.0),
    LMConfig(vocab_size=50, dim=20, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=10, ffn_dim=30, norm_eps=1e-3),
]


def randomised(config, dtype=torch.float32, **changes):
    """A model without a parameter at its initial value."""
    model = LM(config, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
    return model.to(dtype).eval()


def twin(model):
    """The same model in float64."""
    copy = LM(model.config, model.attention).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


def tokens_for(config, *shape):
    return torch.randint(config.vocab_size, shape)


def terms(config):
    """Products behind a logit: every layer's widest sum, and the head's."""
    return config.num_layers * (config.ffn_dim + config.dim) + config.dim


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.num_heads}over{c.num_kv_heads}")
def test_logits_are_llamas(config):
    model = randomised(config)
    tokens = tokens_for(config, 2, 37)
    with torch.no_grad():
        oracle = model.to_llama().double()(tokens).logits
        eager = model.to_llama()(tokens).logits
        assert_close(model(tokens), oracle, eager, name="logits", terms=terms(config))


def test_llama_takes_every_parameter():
    model = randomised(SMALL)
    llama = dict(model.to_llama().model.named_parameters())
    ours = dict(model.named_parameters())
    assert llama.keys() == ours.keys()
    assert all(torch.equal(llama[name], ours[name]) for name in ours)


def test_shipped_logits_are_llamas_on_text():
    model = LM.from_pretrained()
    tokens = torch.tensor(list(held_out_text()[:300]))[None]
    with torch.no_grad():
        oracle = model.to_llama().double()(tokens).logits
        eager = model.to_llama()(tokens).logits
        assert_close(model(tokens), oracle, eager, name="logits", terms=terms(model.config))


@pytest.mark.parametrize("pieces", [(1,) * 9, (8, 1), (5, 1, 3), (1, 7, 1)])
def test_decoding_in_pieces_gives_the_whole(pieces):
    model = randomised(SMALL)
    tokens = tokens_for(SMALL, 2, sum(pieces))
    cache = Cache()
    with torch.no_grad():
        found = torch.cat([model(part, cache) for part in tokens.split(pieces, 1)], 1)
        assert cache.length == sum(pieces)
        assert_close(found, twin(model)(tokens), model(tokens), name="logits", terms=terms(SMALL))


def test_generation_takes_the_likeliest_byte_again_and_again():
    model = randomised(SMALL, torch.float64)
    tokens = tokens_for(SMALL, 2, 6)
    read = tokens
    for _ in range(5):
        with torch.no_grad():
            read = torch.cat([read, model(read)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, 5), read[:, 6:])


def test_later_bytes_change_nothing_before_them():
    model = randomised(SMALL)
    tokens = tokens_for(SMALL, 1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % SMALL.vocab_size
    with torch.no_grad():
        one, two = model(tokens), model(changed)
    assert torch.equal(one[:, :7], two[:, :7])
    assert not torch.isclose(one[:, 7:], two[:, 7:]).all(-1).any()


def test_an_attention_handed_in_is_used_in_every_layer():
    calls = []

    def recorded(q, k, v, layer):
        calls.append((layer, q, k, v))
        return dense(q, k, v, layer)

    model = randomised(SMALL, attention=recorded)
    tokens = tokens_for(SMALL, 2, 9)
    with torch.no_grad():
        whole = model(tokens)
    seen = tuple(calls)
    assert [layer for layer, *_ in seen] == [0, 1, 2]
    for (_, q, k, v), captured in zip(seen, model.capture(tokens), strict=True):
        assert torch.equal(q, captured.q)
        assert torch.equal(k, captured.k)
        assert torch.equal(v, captured.v)
    model.attention = lambda q, k, v, layer: torch.zeros_like(q)
    with torch.no_grad():
        assert not torch.isclose(model(tokens), whole).all(-1).any()


def test_captured_shapes():
    model = randomised(SMALL)
    tokens = tokens_for(SMALL, 2, 9)
    found = model.capture(tokens)
    assert len(found) == SMALL.num_layers
    for layer, one in enumerate(found):
        assert one.q.shape == (2, 6, 9, 8)
        assert one.k.shape == one.v.shape == (2, 2, 9, 8)
        assert one.hidden.shape == (2, 9, 24)
        alone = model.capture(tokens, layer=layer)
        assert all(torch.equal(getattr(alone, name), getattr(one, name)) for name in ("q", "k", "v", "hidden"))
        values = model.layers[layer].self_attn.v_proj(one.hidden).unflatten(-1, (2, 8)).transpose(1, 2)
        assert torch.equal(values, one.v)
        assert not one.q.requires_grad


def test_gradients_of_every_parameter():
    config = LMConfig(vocab_size=5, dim=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=3)
    model = randomised(config, torch.float64)
    tokens = tokens_for(config, 1, 3)
    names, values = zip(*model.named_parameters(), strict=True)

    def logits(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(logits, tuple(v.detach().requires_grad_() for v in values))


def test_a_saved_model_comes_back_in_bfloat16(tmp_path):
    model = randomised(SMALL)
    model.save(tmp_path / "one.safetensors")
    found = LM.from_pretrained(tmp_path / "one.safetensors")
    assert found.config == SMALL
    assert not found.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.bfloat16().float()), name
    assert LM.from_pretrained(tmp_path / "one.safetensors", dtype=torch.float64).norm.weight.dtype == torch.float64


def test_shipped_weights():
    assert WEIGHTS.stat().st_size < 16 * 2**20
    with safe_open(str(WEIGHTS), "pt") as file:
        assert json.loads(file.metadata()["config"]) == asdict(LMConfig())
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    model = LM.from_pretrained()
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())


def test_the_shipped_model_reads_better_than_a_compressor():
    text = held_out_text()
    packed = 8 * len(lzma.compress(text, preset=9)) / len(text)
    model = LM.from_pretrained()
    losses = []
    for start in np.linspace(0, len(text) - 1025, 3).astype(int):
        window = torch.tensor(list(text[start : start + 1025]))
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:]).item() / math.log(2)
            )
    assert np.mean(losses) < packed


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"num_kv_heads: got 3 for 8 heads; pass a divisor", lambda m, p: LMConfig(num_kv_heads=3)),
        (ValueError, r"head_dim: got 7; pass an even", lambda m, p: LMConfig(head_dim=7)),
        (ValueError, r"num_layers: got 0; pass an integer >= 1", lambda m, p: LMConfig(num_layers=0)),
        (TypeError, r"dim: got 2.5 \(float\)", lambda m, p: LMConfig(dim=2.5)),
        (ValueError, r"tokens: got torch.float32 of shape \(1, 3\)", lambda m, p: m(torch.zeros(1, 3))),
        (
            ValueError,
            r"tokens: .* shape \(3,\); pass int64 \(B, N\)",
            lambda m, p: m(torch.zeros(3, dtype=torch.int64)),
        ),
        (ValueError, r"tokens: .* N >= 1", lambda m, p: m.capture(torch.zeros(1, 0, dtype=torch.int64))),
        (ValueError, r"layer: got 3; this model has layers 0 to 2", lambda m, p: m.capture(tokens_for(SMALL, 1, 2), 3)),
        (ValueError, r"layer: got -1; pass an integer >= 0", lambda m, p: m.capture(tokens_for(SMALL, 1, 2), layer=-1)),
        (ValueError, r"num_new: got 0", lambda m, p: m.generate(tokens_for(SMALL, 1, 2), 0)),
        (
            FileNotFoundError,
            r"path: no weights at .*; pass a file written by",
            lambda m, p: LM.from_pretrained(p / "no"),
        ),
        (ValueError, r"path: .* carries no configuration", lambda m, p: LM.from_pretrained(bare(p))),
    ],
)
def test_bad_input(error, message, call, tmp_path):
    with pytest.raises(error, match=message):
        call(randomised(SMALL), tmp_path)


def bare(folder):
    save_file({"norm.weight": torch.ones(2)}, folder / "bare.safetensors")
    return folder / "bare.safetensors"
