"""How a model turns its queries, as policies are told: what its layers do, or nothing where that is not known."""

import pytest
import torch
from hf_models import FULL, SIZES, made, padded, tokens
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from saccade.cache import Evict, Expected, Policy, Rotation, Session, expected_attention
from saccade.hf import apply
from saccade.testing.budget import assert_close

SCALED = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Heard(Policy):
    """Keeps all, and what it was shown."""

    def __init__(self):
        self.views = []

    def piece(self, view):
        self.views.append(view)


def llama(kind="default"):
    turned = {"rope_theta": 10000.0, **SCALED[kind]}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "rope_parameters": turned})).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 2 * parameter.shape[-1] ** -0.5)
    return model


def told(model):
    """The rotation of each layer, or None."""
    policy = Heard()
    with apply(model, policy):
        model(tokens(1, 5), cache=DynamicCache())
    return [view.rotation for view in policy.views]


def turned_back(model):
    """What a layer is told turns its queries back to what their projection gave."""
    plain = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: plain.append(out))
        for layer in model.model.layers
    ]
    policy = Heard()
    with apply(model, policy):
        plain.clear()  # of the trial
        model(tokens(2, 40), cache=DynamicCache())
    for hook in hooks:
        hook.remove()
    for view, truth in zip(policy.views, plain, strict=True):
        truth = truth.unflatten(2, (4, 8)).transpose(1, 2)
        back = view.rotation.back(view.q, torch.arange(40))
        assert_close(back, truth.double(), truth, name="queries", terms=8, scale=float(truth.abs().max()))


@pytest.mark.parametrize("kind", SCALED)
def test_queries_are_turned_back(kind):
    turned_back(llama(kind))


def test_other_rates_are_noticed(monkeypatch):
    back = Rotation.back
    monkeypatch.setattr(Rotation, "back", lambda self, x, at: back(self, x, at + (at > 20)))
    with pytest.raises(AssertionError, match="queries"):
        turned_back(llama())


@pytest.mark.parametrize("shape", FULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_host_is_known(shape, dtype):
    model = made(shape).to(dtype)
    found = told(model)
    assert all(isinstance(each, Rotation) and each.rates.dtype == torch.float32 for each in found)
    assert len(found) == 3


def test_channels_that_stay_and_layers_that_do_not_turn():
    part = Phi3ForCausalLM(Phi3Config(**{**SIZES, "sliding_window": None, "partial_rotary_factor": 0.5}))
    assert [len(each.rates) for each in told(part.eval())] == [2, 2, 2]
    some = SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, "no_rope_layers": [1, 0, 1]})).eval()
    assert [each is None for each in told(some)] == [False, True, False]


def test_what_is_not_known_is_not_told():
    """Channels in pairs of neighbours; rates that depend on the length; a trial that gives other queries."""
    assert told(CohereForCausalLM(CohereConfig(**SIZES)).eval()) == [None] * 3
    grows = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert told(LlamaForCausalLM(LlamaConfig(**{**SIZES, "rope_parameters": grows})).eval()) == [None] * 3


def test_a_trial_that_fails_changes_nothing(monkeypatch):
    monkeypatch.setattr(Rotation, "turn", lambda self, x, at: x)
    model, read = made("llama"), tokens(1, 9)
    own = model(read).logits
    assert told(model) == [None] * 3
    assert torch.equal(model(read).logits, own)
    assert not any("saccade" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_expected_attention_keeps_what_it_keeps_of_the_same_queries(kind):
    """Of a padded batch in the model, and of each row in a session that is told the rates by the configuration."""
    model, (read, real) = llama(kind).double(), padded("left", (30, 24))
    policy, heard = expected_attention(12, sinks=2), Heard()
    with apply(model, policy):
        held = DynamicCache()
        model(read, attention_mask=real, cache=held)
    rates = model.model.rotary_emb.inv_freq if kind == "llama3" else 10000.0 ** -(torch.arange(4) / 4)
    rotation = Rotation(rates.float())
    for row in range(2):
        mine = read[row : row + 1, real[row].bool()]
        heard.views.clear()
        with apply(model, heard):
            model(mine, cache=DynamicCache())
        view, other = heard.views[0], Session(policy, rotations={0: rotation})
        other.attend(0, view.q, view.k, view.v)
        marks = held.layers[0].session.held(0)[row, :, : mine.shape[1]]
        assert torch.equal(marks, other.held()[0])
        plain = Session(Evict(Expected(2), 12, sinks=2))
        plain.attend(0, view.q, view.k, view.v)
        assert not torch.equal(marks, plain.held()[0]), "nothing hangs on the rotation"
