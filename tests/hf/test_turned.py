"""How a model turns its queries, as policies are told: what its layers do, or nothing where that is not known."""

import itertools

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

from saccade.cache import Evict, Expected, Policy, Quantized, Rotation, Session, expected_attention
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.caching import cache_name
from saccade.hf.tuned import serves
from saccade.mix import rotary_rates
from saccade.testing.budget import assert_close, compare

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


# -- policies that undo the rotation before there is a view ---------------------------------------------------------

ASKING = {"seer_attention_r": {"budget": 6, "block": 3, "gate_dim": 6}, "nats": {"window": 5}}


def asking(name, **params):
    torch.manual_seed(1)
    layer = serves(name)(Dims(4, 8, 2), **ASKING[name] | params).double().eval()
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
    return layer


def first_layer(model, what, read):
    """What layer 0 attends to: its o (B, N, H D), of a prompt and then single tokens, and its q, k, v."""
    found, heard = [], Heard()
    o_proj = model.model.layers[0].self_attn.o_proj
    hook = o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        for policy in (heard, what):
            found.clear()
            with apply(model, policy):
                found.clear()  # of the trial
                cache = DynamicCache()
                model(read if policy is heard else read[:, :20], **{cache_name(model): cache})
                for at in range(20, read.shape[1] if policy is what else 0):
                    model(read[:, at : at + 1], **{cache_name(model): cache})
    finally:
        hook.remove()
    view = heard.views[0]
    return torch.cat(found, 1), (view.q, view.k, view.v)


def alone(layer, q, k, v):
    session, ends = Session(layer.policy), [0, 20, *range(21, q.shape[2] + 1)]
    parts = [session.attend(0, *(x[:, :, a:b] for x in (q, k, v))) for a, b in itertools.pairwise(ends)]
    return torch.cat(parts, 2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
@pytest.mark.parametrize("name", ASKING)
def test_a_policy_that_asks_is_told_while_it_serves(name, kind):
    """It decides as one that was made with the model's rates, on the same queries and keys, and not as one without."""
    model, read = llama(kind).double(), tokens(2, 30)
    rotation = Rotation(model.model.rotary_emb.inv_freq.float(), model.model.rotary_emb.attention_scaling)
    layer = asking(name)
    found, given = first_layer(model, layer, read)
    truth = alone(asking(name, rotation=rotation), *given)
    assert_close(found, truth, truth, terms=30 * 8)
    assert not compare(alone(layer, *given), truth, truth, terms=30 * 8).ok, "nothing hangs on the rotation"
    assert layer.policy.rotation is None
    wrong = asking(name, rotation=Rotation(rotary_rates(4, 3.0)))
    assert_close(first_layer(model, wrong, read)[0], truth, truth, terms=30 * 8)  # the model knows better
    assert torch.equal(wrong.policy.rotation.rates, rotary_rates(4, 3.0))


def test_what_is_wrapped_is_told_too():
    layer, model = asking("seer_attention_r"), llama()
    with apply(model, Quantized(layer.policy)):
        assert layer.policy.rotation == told(llama())[0]
    assert layer.policy.rotation is None


@pytest.mark.parametrize("name", ASKING)
def test_a_rotation_is_one(name):
    with pytest.raises(TypeError, match=r"rotation: got 10000.0; pass a saccade.cache.Rotation, or None"):
        asking(name, rotation=10000.0)
    with pytest.raises(ValueError, match=r"rotation: got 5 pairs of channels for a head_dim of 8; pass 4 rates"):
        asking(name, rotation=Rotation(torch.ones(5)))


def test_layers_that_turn_in_unlike_ways_share_no_policy_that_asks():
    some = SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, "no_rope_layers": [1, 0, 1]})).eval()
    read, layer = tokens(1, 9), asking("seer_attention_r").float()
    own = some(read).logits
    with pytest.raises(ValueError, match=r"what: Gated\(6, page=3\) is shared by layers that turn q and k in"):
        apply(some, layer)
    assert torch.equal(some(read).logits, own)
    assert not any("saccade" in vars(module) for module in some.modules())
    with apply(some, "seer_attention_r") as handle:
        assert [each.policy.rotation is None for each in handle.mechanisms] == [False, True, False]


# -- as many pairs as there are to be turned ------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3, 4, 6, 12, 17])
def test_rates_over_other_pairs_span_the_same_range(pairs):
    rotation = Rotation(rotary_rates(6, 50.0), 1.5)
    found = rotation.over(pairs)
    truth = rotary_rates(pairs, 50.0)
    assert_close(found.rates, truth, truth, terms=8)
    assert found.scale == 1.5
    assert rotation.over(pairs) is found
    if pairs not in (1, 3, 6):
        nearest = rotation.rates[(torch.arange(pairs) * 6 // pairs)]
        assert not compare(nearest, truth, truth, terms=8).ok


def test_scaled_rates_lie_between_those_that_there_are():
    rates = llama("llama3").model.rotary_emb.inv_freq.double()
    found = Rotation(rates).over(8).rates
    assert_close(found[::2], rates, rates, terms=8)
    assert_close(found[1:-1:2], (rates[1:] * rates[:-1]).sqrt(), (rates[1:] * rates[:-1]).sqrt(), terms=8)
    assert Rotation(torch.tensor([0.5])).over(3).rates.tolist() == [0.5] * 3
    assert Rotation(torch.tensor([1.0, 0.0])).over(4).rates.isfinite().all()
