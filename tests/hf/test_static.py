"""Caches that have room for all tokens from the start: what is attended to is what was read, as in one that grows."""

import pytest
import torch
from hf_models import FULL, ROUTES, SHAPES, generated, made, near, padded, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from saccade import cache
from saccade.hf import apply, interface
from saccade.hf.caching import Ragged, Swap

POLICIES = {
    "snapkv": lambda model: cache.snapkv(6, window=3),
    "h2o": lambda model: cache.h2o(6, recent=2),
    "adakv": lambda model: cache.adakv(6, window=3),
    "first_layer": lambda model: [cache.knorm(4), None, None],
    "second_layer": lambda model: [None, cache.knorm(4), None],
}
ALL = {"dense": lambda model: None, "near": lambda model: near(model, 3), "moba": lambda model: "moba", **POLICIES}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generates_the_same(shape, name, routes=ROUTES):
    model = made(shape)
    for read, real in ((tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)), padded("left")):
        for options in routes.values():
            with apply(model, ALL[name](model)):
                truth = generated(model, read, real, **options)
                found = generated(model, read, real, cache_implementation="static", **options)
            assert torch.equal(found, truth)


@pytest.mark.parametrize("shape", FULL)
@pytest.mark.parametrize("name", ALL)
def test_generates_the_tokens_of_a_cache_that_grows(shape, name):
    generates_the_same(shape, name, ROUTES if shape == "llama" else {"greedy": {}, "beam": {"num_beams": 3}})


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in FULL])
def test_dense_layers_that_slide(shape):
    generates_the_same(shape, "dense")


@pytest.mark.parametrize("name", ["dense", "near"])
def test_keys_behind_what_was_read_are_caught(name, monkeypatch):
    """A twin attends to all that the cache hands over."""
    announced = interface.Tokens.__init__

    def all_of_it(self, num_queries, num_keys, window=None, groups=None, room=None):
        announced(self, num_queries, num_keys if room is None else room, window, None, room)

    monkeypatch.setattr(interface.Tokens, "__init__", all_of_it)
    with pytest.raises(AssertionError):
        generates_the_same("llama", name, {"greedy": {}})


def pieces(model, held, read, real):
    """Logits of tokens that are read in three pieces."""
    found, end = [], 0
    for part in read.split((7, 3, 1), 1):
        end += part.shape[1]
        found.append(model(part, attention_mask=real(end), cache=held).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["dense", "near", "snapkv", "first_layer", "second_layer"])
def test_masks_may_be_as_long_as_what_was_read_or_as_the_cache(name):
    model, (read, real) = made("llama"), padded("left")
    longer = torch.cat([real, torch.ones_like(real)], 1)
    with apply(model, ALL[name](model)):
        truth = pieces(model, DynamicCache(), read, lambda end: real[:, :end])
        for mask in (lambda end: real[:, :end], lambda end: longer):
            found = pieces(model, StaticCache(model.config, max_cache_len=22), read, mask)
            assert torch.equal(found[real.bool()], truth[real.bool()])


class Asked(TorchDispatchMode):
    """How often a number of a tensor was asked for."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_length_is_asked_for_once_a_forward_pass():
    model, held = made("llama"), StaticCache(made("llama").config, max_cache_len=12)
    with apply(model):
        model(tokens(1, 9), cache=held)
        with Asked() as asked:
            model(tokens(1, 1), cache=held)
    assert asked.times == 1


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_takes_the_place_of_the_room(name):
    """Of a layer that was never written to, or allocated ahead: nothing of it is held, and more than it may be read."""
    model, read = made("llama"), tokens(2, 9)
    held = StaticCache(model.config, max_cache_len=11)
    held.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    one = 2 * 2 * 8 * 2 * 4  # bytes of a token
    with apply(model, ALL[name](model)) as handle:
        model(read, cache=held)
        layers = [layer for layer in held.layers if isinstance(layer, Ragged)]
        assert len(layers) == (1 if name.endswith("layer") else 3)
        assert not any(hasattr(layer, "max_cache_len") or layer.keys is not None for layer in layers)
        assert handle.memory().dense == 3 * 11 * one
        if len(layers) == 3:
            for _ in range(4):
                model(read[:, :1], cache=held)
            assert held.get_seq_length() == 13
            assert handle.memory().dense == 3 * 13 * one


def compiling(monkeypatch):
    """A compile_config with which transformers compiles here too, and the calls that it compiled."""
    compiled, found, own = CompileConfig(backend="eager", mode=None), [], torch.compile
    compiled._compile_all_devices = True
    monkeypatch.setattr(torch, "compile", lambda call, **options: found.append(call) or own(call, **options))
    torch._dynamo.reset()
    return compiled, found


@pytest.mark.parametrize("name", ["dense", "near", "snapkv"])
def test_a_forward_that_generate_compiles(name, monkeypatch):
    """transformers compiles the steps of a static cache; not those of a policy, under which it is static no more."""
    model, (read, real) = made("llama"), padded("left")
    compiled, calls = compiling(monkeypatch)
    options = {"cache_implementation": "static", "compile_config": compiled}
    with apply(model, ALL[name](model)):
        truth = generated(model, read, real)
        assert torch.equal(generated(model, read, real, **options), truth)
        assert len(calls) == (name != "snapkv")
    own = generated(model, read, real)
    assert torch.equal(generated(model, read, real, **options), own)
    assert len(calls) == 1, "compiled for a model that is as it was"


def test_a_caller_may_compile_what_a_policy_reads(monkeypatch):
    model, read = made("llama"), tokens(2, 9)
    with apply(model, cache.snapkv(6, window=3)):
        truth, found = DynamicCache(), StaticCache(model.config, max_cache_len=16)
        model(read, cache=truth)
        model(read, cache=found)
        call = torch.compile(model, backend="eager")
        for _ in range(4):
            assert torch.equal(call(read[:, :1], cache=found).logits, model(read[:, :1], cache=truth).logits)


def read_without(model, read):
    held = StaticCache(model.config, max_cache_len=16)
    model(read, cache=held)
    with apply(model, cache.knorm(3)):
        model(read[:, :1], cache=held)


def short(model, read):
    with apply(model):
        model(read, cache=StaticCache(model.config, max_cache_len=6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (read_without, "cache: layer 0 holds 9 tokens that were read without the policy, which has seen none of their"),
        (short, "cache: got 9 tokens for a cache that holds 6; pass a StaticCache with more room"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(made("llama"), tokens(1, 9))


def test_one_that_is_offloaded_is_refused():
    held = StaticCache(made("llama").config, max_cache_len=6)
    held.offloading = True
    with pytest.raises(ValueError, match="cache: layer 0 is one that is offloaded, which a policy cannot take"):
        Swap()._layer(held, 0)
