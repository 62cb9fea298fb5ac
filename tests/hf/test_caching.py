"""Policies in pretrained models: a full budget is the dense model, a quarter holds a quarter, padding never enters."""

import pytest
import torch
from hf_models import FULL, ROUTES, close, generated, made, padded, tokens, wide
from transformers import DynamicCache

import saccade
from saccade import cache
from saccade.cache import AcrossLayers, Cached, Evict, KeyNorm, Policy, Quest, Session, Store
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.caching import Ragged
from saccade.hosts.lm import LM
from saccade.tasks.text import held_out_text
from saccade.testing.healthy import Thrifty

POLICIES = {
    "streaming_llm": cache.streaming_llm,
    "h2o": lambda budget: cache.h2o(budget, recent=2),
    "snapkv": lambda budget: cache.snapkv(budget, window=3),
    "tova": cache.tova,
    "pyramidkv": lambda budget: cache.pyramidkv(budget, window=3),
    "adakv": lambda budget: cache.adakv(budget, window=3),
    "knorm": cache.knorm,
    "expected_attention": lambda budget: cache.expected_attention(budget, sinks=1),
    "keydiff": cache.keydiff,
    "across_layers": lambda budget: Evict(KeyNorm(), AcrossLayers(budget)),
    "quest": lambda budget: Quest(budget, page=4),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", FULL)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [1.0, 64])
def test_a_full_budget_generates_the_models_own_tokens(shape, name, budget):
    model = made(shape)
    routes = ROUTES if shape == "llama" else {"greedy": {}}
    for read, real in ((tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)), padded("left")):
        for options in routes.values():
            own = generated(model, read, real, **options)
            with apply(model, POLICIES[name](budget)):
                assert torch.equal(generated(model, read, real, **options), own)


@pytest.fixture(scope="module")
def bundled():
    return LM.from_pretrained().to_llama()


def text(start, length):
    return list(held_out_text()[start : start + length])


@pytest.mark.parametrize("name", POLICIES)
def test_a_full_budget_generates_the_bundled_models_own_tokens(bundled, name):
    rows = [text(1000 * i, n) for i, n in enumerate((120, 75, 98, 33))]
    read = torch.tensor([[0] * (120 - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (120 - len(row)) + [1] * len(row) for row in rows])
    own = generated(bundled, read, real, pad_token_id=0)
    with apply(bundled, POLICIES[name](512)):
        assert torch.equal(generated(bundled, read, real, pad_token_id=0), own)


SPARSE = [name for name in POLICIES if name != "quest"]


@pytest.mark.parametrize("name", SPARSE)
def test_a_quarter_of_the_tokens_takes_little_more_than_a_quarter_of_the_bytes(bundled, name):
    read = torch.tensor([text(0, 2048)])
    with apply(bundled, POLICIES[name](0.25)) as handle:
        out = bundled.generate(read, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        memory = handle.memory()
        layers = out.cache.layers
        assert all(type(layer) is Ragged for layer in layers)
        assert memory.dense == 8 * 2 * (2048 + 2) * 2 * 64 * 4
        assert memory.in_use <= memory.held <= 0.3 * memory.dense
        stores = [layer.session.store(layer.index) for layer in layers]
        of_ids = next(iter(layers)).session.shared["token_ids"].nbytes
        assert memory.held == sum(store.nbytes for store in stores) + of_ids
        del out, layers, stores
        assert handle.memory().held == 0


@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_row_decodes_as_it_does_alone(name):
    """With a budget that drops tokens: what is padding, and what others do, changes nothing."""
    model = made("llama").double()
    read, real = padded("left", (12, 9, 10))
    with apply(model, POLICIES[name](6)):
        together = generated(model, read, real)
        for row in range(3):
            mine = read[row : row + 1, real[row].bool()]
            alone = generated(model, mine, torch.ones_like(mine))
            assert torch.equal(together[row, read.shape[1] :], alone[0, mine.shape[1] :])


def test_padding_that_is_stored_is_caught(monkeypatch):
    """A twin takes every column for a token."""
    from saccade.hf.interface import Tokens

    monkeypatch.setattr(Tokens, "read", lambda self, call, *new: call(*new, None))
    with pytest.raises(AssertionError):
        test_a_padded_row_decodes_as_it_does_alone("knorm")


def test_a_key_that_is_lost_is_caught(monkeypatch):
    """A twin drops a token although the budget holds all."""

    def close_and_drop(self, index):
        self.store(index).drop(torch.zeros(self.store(index).counts.shape, dtype=torch.int64))

    monkeypatch.setattr(Session, "close", close_and_drop)
    with pytest.raises(AssertionError):
        test_a_full_budget_generates_the_models_own_tokens("llama", "knorm", 64)


def under_masks(model, read, marks):
    """Logits of the last token, which sees in each layer what `marks` (B, Hkv, N) leaves it."""

    def hook(module, args, kwargs):
        n = read.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril().repeat(*marks[0].shape[:2], 1, 1)
        mask[:, :, -1, :-1] = marks[module.layer_idx][:, :, :-1]
        kwargs["attention_mask"] = torch.where(mask, 0.0, -torch.inf).repeat_interleave(2, 1).to(model.dtype)
        return args, kwargs

    hooks = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    found = model(read, use_cache=False).logits[:, -1]
    for each in hooks:
        each.remove()
    return found


@pytest.mark.parametrize("shape", FULL)
def test_logits_are_those_of_a_mask(shape):
    """Decoding after an eviction is attention without the dropped keys, at the positions that the others had."""
    model, read = made(shape), tokens(2, 12)
    with apply(model, cache.adakv(5, window=2)):
        held = DynamicCache()
        model(read[:, :11], cache=held)
        found = model(read[:, 11:], cache=held).logits[:, 0]
        marks = [layer.session.held(layer.index) for layer in held.layers]
    assert not any(bool(each.all()) for each in marks)
    close(found, under_masks(wide(model), read, marks), under_masks(model, read, marks))


def test_a_list_gives_each_layer_its_own_policy():
    model, read = made("llama"), tokens(1, 12)
    one = cache.knorm(4)
    with apply(model, [one, None, one]) as handle:
        assert "1 x dense" in repr(handle)
        held = DynamicCache()
        model(read, cache=held)
        assert [type(layer).__name__ for layer in held.layers] == ["Ragged", "DynamicLayer", "Ragged"]
        assert held.layers[0].session is held.layers[2].session
        assert [held.layers[i].index for i in (0, 2)] == [0, 1]
        assert held.get_seq_length() == 12
        assert held.layers[0].session.store(1).counts.tolist() == [[4, 4]]


class Over(Thrifty):
    """A mechanism that decides over layers."""

    spec = Thrifty.spec

    def __init__(self, dims, *, budget=4, num_layers=1):
        super().__init__(dims)
        Cached.__init__(self, dims, num_layers=num_layers)
        self.policy = Evict(KeyNorm(), AcrossLayers(budget))


def test_a_mechanism_is_served_by_its_policy():
    model, read = made("llama"), tokens(1, 12)
    with apply(model, Thrifty(Dims(4, 8, 2), budget=4)) as handle:
        assert repr(handle) == "Handle(LlamaForCausalLM: 3 x thrifty)"
        held = DynamicCache()
        model(read, cache=held)
        model(read[:, :1], cache=held)
        assert all(layer.session.store(layer.index).counts.eq(4).all() for layer in held.layers)
    with apply(model, Over) as handle:
        assert len({id(each) for each in handle.mechanisms}) == 1
        assert handle.mechanisms[0].num_layers == 3
        held = DynamicCache()
        model(read, cache=held)
        assert sum(int(layer.session.store(layer.index).counts.sum()) for layer in held.layers) == 3 * 2 * 4


def test_streaming_heads_hold_sinks_and_recent_tokens():
    """DuoAttention in a model: whole and token by token it gives what its pattern gives, and holds what it keeps."""
    model, read = made("llama").double(), tokens(2, 17)
    duo = saccade.mechanism("duo_attention")(Dims(4, 8, 2), share=0.5, sink=2, recent=4).double()
    with apply(model, duo):
        whole = model(read, use_cache=False).logits
        held = DynamicCache()
        parts = [model(part, cache=held).logits for part in read.split([9, *[1] * 8], 1)]
        for layer in held.layers:
            marks = layer.session.held(layer.index)
            assert torch.equal(marks, duo.kept(17).expand(2, -1, -1))
            assert layer.session.store(layer.index).counts.tolist() == [[17, 6]] * 2
    close(torch.cat(parts, 1), whole, whole)


def test_two_caches_of_a_model_know_nothing_of_each_other():
    model, read = made("llama"), tokens(2, 12)
    with apply(model, cache.tova(4)):
        one, two = DynamicCache(), DynamicCache()
        model(read[:1, :11], cache=one)
        before = model(read[:1, 11:], cache=one).logits
        one = DynamicCache()
        model(read[:1, :11], cache=one)
        model(read[1:, :11], cache=two)
        assert torch.equal(model(read[:1, 11:], cache=one).logits, before)


def test_restoring_gives_the_model_back():
    model, read = made("llama"), tokens(1, 9)
    own, held = generated(model, read, torch.ones_like(read)), DynamicCache()
    with apply(model, cache.knorm(3)):
        assert not torch.equal(generated(model, read, torch.ones_like(read)), own)
        model(read, cache=held)
    assert torch.equal(generated(model, read, torch.ones_like(read)), own)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match=r"cache: it was filled under saccade\.hf\.apply"):
        model(read[:, :1], cache=held)


def test_a_policy_can_see_the_ids_of_real_tokens():
    model, (read, real) = made("llama"), padded("left", (5, 3))
    with apply(model, cache.knorm(2)):
        held = DynamicCache()
        model(read, attention_mask=real, cache=held)
        model(read[:, :1], attention_mask=torch.cat([real, real[:, -1:]], 1), cache=held)
        ids = held.layers[1].session.shared["token_ids"]
    assert ids[0].tolist() == [*read[0].tolist(), int(read[0, 0])]
    assert ids[1].tolist() == [*read[1, 2:].tolist(), int(read[1, 0]), -1, -1]


def test_without_a_cache_attention_is_dense():
    model, read = made("llama"), tokens(1, 9)
    oracle, eager = wide(model)(read).logits, model(read).logits
    with apply(model, cache.knorm(3)):
        close(model(read, use_cache=False).logits, oracle, eager)


def filled(model, policy, read):
    held = DynamicCache()
    with apply(model, policy):
        model(read, cache=held)
    return held


def refused_foreign(model, read):
    held = DynamicCache()
    model(read, cache=held)
    with apply(model, cache.knorm(3)):
        model(read[:, :1], cache=held)


def refused_other(model, read):
    held = filled(model, cache.knorm(3), read)
    with apply(model, cache.knorm(3)):
        model(read[:, :1], cache=held)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (refused_foreign, "cache: layer 0 holds 9 tokens that were read without the policy"),
        (refused_other, "cache: it was filled under another policy"),
        (lambda model, read: filled(model, Policy(), read).crop(-2), "crop: got -2, but tokens that were dropped"),
        (lambda model, read: filled(model, cache.snapkv(0.25), read), "budget: got 0.25 of 9 tokens, 2 in layer 0"),
        (lambda model, read: apply(made("gemma2"), cache.knorm(3)), "what: layer 0 of the model has a sliding window"),
        (lambda model, read: apply(made("gpt_oss"), cache.knorm(3)), "what: layer 0 of the model has a sliding window"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(made("llama"), tokens(1, 9))


def test_memory_without_a_policy_is_refused():
    with apply(made("llama")) as handle, pytest.raises(RuntimeError, match="memory: no layer has a policy"):
        handle.memory()


def test_a_cache_can_be_emptied_and_used_again():
    model, read = made("llama"), tokens(1, 9)
    with apply(model, cache.knorm(3)):
        held = DynamicCache()
        first = model(read, cache=held).logits
        held.reset()
        assert held.get_seq_length() == 0
        assert isinstance(held.layers[0], Ragged)
        assert torch.equal(model(read, cache=held).logits, first)
        held.batch_repeat_interleave(2)
        assert isinstance(held.layers[0].session.store(0), Store)
        assert held.batch_size == 2
        held.batch_select_indices(torch.tensor([0]))
        assert held.batch_size == 1
