"""Mechanisms in pretrained models: dense is the model's own attention, a window is its mask, all is given back."""

import copy

import pytest
import torch
from hf_models import FULL, SHAPES, Near, alone, close, made, near, padded, tokens, wide, window_mask
from transformers import DynamicCache

import saccade
from saccade.hf import apply, interface, serving
from saccade.hf.caching import cache_name
from saccade.where import Causal

SLIDING = ["mistral_slides", "qwen2_slides", "gemma2", "gpt_oss"]


def pieces(model, read, sizes, real=None):
    """Logits of the same tokens, read through a cache in pieces."""
    cache, found, end = DynamicCache(config=model.config), [], 0
    for part in read.split(sizes, 1):
        end += part.shape[1]
        mask = None if real is None else real[:, :end]
        found.append(model(part, **{cache_name(model): cache}, attention_mask=mask).logits)
    return torch.cat(found, 1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_gives_the_models_own_logits(shape, batch):
    model, read = made(shape), tokens(batch, 13)
    oracle, eager = wide(model)(read).logits, model(read).logits
    with apply(model):
        close(model(read).logits, oracle, eager)
        close(model(read, use_cache=False, attention_mask=torch.ones_like(read)).logits, oracle, eager)


def dense_on_padding(model, read, real):
    oracle, eager = (alone(m, read, real) for m in (wide(model), model))
    with apply(model):
        close(model(read, attention_mask=real).logits, oracle, eager, real.bool())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_dense_on_a_padded_batch(shape, side):
    dense_on_padding(made(shape), *padded(side))


def test_a_mask_that_is_ignored_is_caught(monkeypatch):
    monkeypatch.setattr(interface, "group", lambda real, num_queries, before: (before, None, False))
    with pytest.raises(AssertionError, match="logits"):
        dense_on_padding(made("llama"), *padded("left"))


def dense_in_pieces(model, read, sizes, real=None):
    where = ... if real is None else real.bool()
    oracle, eager = (alone(m, read, torch.ones_like(read) if real is None else real) for m in (wide(model), model))
    with apply(model):
        close(pieces(model, read, sizes, real), oracle, eager, where)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(12, 1), (5, 3, 1, 4), (1,) * 13], ids=str)
def test_dense_decodes_in_pieces(shape, sizes):
    dense_in_pieces(made(shape), tokens(2, 13), sizes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(10, 1), (4, 6, 1)], ids=str)
def test_dense_decodes_a_padded_batch_in_pieces(shape, sizes):
    dense_in_pieces(made(shape), *(lambda read, real: (read, sizes, real))(*padded("left")))


@pytest.mark.parametrize("shape", SLIDING)
def test_a_window_that_is_ignored_is_caught(shape, monkeypatch):
    monkeypatch.setattr(serving, "Window", lambda size: Causal())
    with pytest.raises(AssertionError, match="logits"):
        dense_in_pieces(made(shape), tokens(2, 13), (13,))


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [("gemma2", {"softcap": None}), ("gemma2", {"scale": 0.5}), ("gpt_oss", {"sink": None})],
    ids=str,
)
def test_what_a_model_asks_for_and_does_not_get_is_caught(shape, wrong, monkeypatch):
    def forgetful(*given):
        asked = dict(zip(("scale", "softcap", "sink", "window", "use_cache"), given, strict=True))
        return serving.Asked(**{**asked, **wrong})

    monkeypatch.setattr(interface, "Asked", forgetful)
    with pytest.raises(AssertionError, match="logits"):
        dense_in_pieces(made(shape), tokens(2, 13), (13,))


ROUTES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 4},
    "without_cache": {"use_cache": False},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ROUTES)
def test_dense_generates_the_models_own_tokens(shape, route):
    model = made(shape)
    options = {"do_sample": False, "max_new_tokens": 6, **ROUTES[route]}
    for read, real in ((tokens(1, 9), None), padded("left")):
        real = torch.ones_like(read) if real is None else real
        own = model.generate(read, attention_mask=real, **options)
        with apply(model):
            assert torch.equal(model.generate(read, attention_mask=real, **options), own)


def window_in_place(model, put, read, real, size, sizes):
    masks = [window_mask(real, size, dtype) for dtype in (torch.float64, torch.float32)]
    oracle, eager = (m(read, attention_mask=x).logits for m, x in zip((wide(model), model), masks, strict=True))
    with apply(model, put):
        close(pieces(model, read, sizes, real), oracle, eager, real.bool())


@pytest.mark.parametrize("shape", FULL)
@pytest.mark.parametrize("sizes", [(11,), (10, 1), (4, 6, 1)], ids=str)
def test_a_window_is_the_models_attention_with_its_mask(shape, sizes):
    model = made(shape)
    for read, real in (padded("left"), (tokens(1, 11), torch.ones(1, 11))):
        window_in_place(model, near(model, 3), read, real, 3, sizes)


def test_a_window_of_another_size_is_caught():
    model = made("llama")
    with pytest.raises(AssertionError, match="logits"):
        window_in_place(model, near(model, 4), *padded("left"), 3, (10, 1))


def test_a_scale_that_a_mechanism_does_not_know_is_caught(monkeypatch):
    model = made("gemma2_plain")
    monkeypatch.setattr(interface, "Asked", lambda scale, *rest: serving.Asked(6**-0.5, *rest))
    with pytest.raises(AssertionError, match="logits"):
        window_in_place(model, near(model, 3), *padded("left"), 3, (11,))


def test_tokens_after_padding_on_the_right_follow_the_real_ones():
    """A row goes on as if its padding were not there; the oracle reads each row alone."""
    model = made("llama")
    read, real = padded("right", (7, 4))
    more, at = tokens(2, 1), real.sum(1, keepdim=True)
    with apply(model, near(model, 3)):
        cache = DynamicCache()
        model(read, attention_mask=real, **{cache_name(model): cache})
        real = torch.cat([real, torch.ones_like(more)], 1)
        found = model(more, attention_mask=real, position_ids=at, **{cache_name(model): cache}).logits[:, 0]
    for row, length in enumerate((7, 4)):
        alone = torch.cat([read[row : row + 1, :length], more[row : row + 1]], 1)
        ones = torch.ones_like(alone)
        oracle, eager = (
            m(alone, attention_mask=window_mask(ones, 3, m.dtype)).logits[:, -1] for m in (wide(model), model)
        )
        close(found[row : row + 1], oracle, eager)


SERVED = [
    spec.id
    for spec in saccade.mechanisms()
    if issubclass(cls := saccade.mechanism(spec.id), saccade.contract.Attention)
    and cls.causal
    and 0 in spec.ranks
    and (cls.prefill or not serving.cannot_continue(cls))
]


@pytest.mark.parametrize("name", SERVED)
def test_every_mechanism_that_reads_all_is_dense(name):
    """Budget >= length: a mechanism with its full budget generates the model's own tokens, padded too."""
    model = made("llama")
    dims = near(model, 3).dims
    full = saccade.mechanism(name).full_budget(dims, 32)
    put = saccade.mechanism(name)(dims, **(full or {}))
    read, real = padded("left")
    options = {"attention_mask": real, "do_sample": False, "max_new_tokens": 4}
    own = model.generate(read, **options)
    with apply(model, put):
        assert torch.equal(model.generate(read, **options), own)


def test_several_mechanisms_are_served():
    assert len(SERVED) >= 5


def test_a_list_gives_each_layer_its_own():
    """None on the layers that slide, a mechanism on the others; a full window there changes nothing."""
    model, read = made("qwen2_slides"), tokens(2, 13)
    oracle, eager = wide(model)(read).logits, model(read).logits
    with apply(model, [near(model, 64), None, None]) as handle:
        assert [each is None for each in handle.mechanisms] == [False, True, True]
        assert repr(handle) == "Handle(Qwen2ForCausalLM: 1 x near, 2 x dense)"
        close(pieces(model, read, (9, 4)), oracle, eager)
    assert repr(handle).endswith("dense, restored)")


def test_a_class_is_built_for_each_layer_in_its_dtype():
    model = made("llama").double()
    with apply(model, "duo_attention") as handle:
        assert len({id(each) for each in handle.mechanisms}) == 3
        assert all(each.alpha.dtype == torch.float64 for each in handle.mechanisms)
        assert torch.isfinite(model(tokens(1, 9)).logits).all()


def test_restoring_gives_the_same_bits():
    model, read = made("llama"), tokens(2, 13)
    before, names = model(read).logits, set(model.state_dict())
    handle = apply(model, near(model, 2))
    assert not torch.isclose(model(read).logits, before).all()
    assert set(model.state_dict()) == names
    handle.restore()
    handle.restore()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(read).logits, before)
    assert not any("saccade" in vars(module) for module in model.modules())
    assert "init_continuous_batching" not in vars(model)
    with pytest.raises(RuntimeError, match="with: this handle was restored"), handle:
        pass


def test_a_block_that_raises_restores():
    model, read = made("llama"), tokens(1, 5)
    before = model(read).logits
    with pytest.raises(ZeroDivisionError), apply(model, near(model, 2)):
        raise ZeroDivisionError
    assert torch.equal(model(read).logits, before)


def test_applications_nest_and_the_last_goes_first():
    model, read = made("llama"), tokens(1, 13)
    before = model(read).logits
    outer = apply(model, near(model, 2))
    two = model(read).logits
    inner = apply(model, near(model, 5))
    assert not torch.equal(model(read).logits, two)
    with pytest.raises(RuntimeError, match="restore: a later apply on this model is still active"):
        outer.restore()
    inner.restore()
    assert torch.equal(model(read).logits, two)
    outer.restore()
    assert torch.equal(model(read).logits, before)


def test_two_models_know_nothing_of_each_other():
    one, read = made("llama"), tokens(1, 13)
    two = copy.deepcopy(one)
    before = two(read).logits
    with apply(one, near(one, 2)):
        assert torch.equal(two(read).logits, before)
        with apply(two, near(two, 3)):
            a, b = one(read).logits, two(read).logits
        assert not torch.equal(a, b)


def test_gradients_reach_the_weights():
    model, (read, real) = made("llama"), padded("left")
    grads = []
    with torch.enable_grad():
        for m in (wide(model), model):
            alone(m, read, real)[real.bool()].square().sum().backward()
            grads.append(m.model.layers[0].self_attn.k_proj.weight.grad)
        model.zero_grad()
        with apply(model):
            model(read, attention_mask=real).logits[real.bool()].square().sum().backward()
    close(model.model.layers[0].self_attn.k_proj.weight.grad, *grads)


class Early(Near):
    """A twin that takes the queries for the first N of M positions."""

    spec = Near.spec

    def compute(self, q, k, v):
        return super().compute(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]])


def test_queries_in_the_wrong_place_are_noticed():
    assert serving.cannot_continue(Near) is None
    assert serving.cannot_continue(Early) == "its last 1 rows of 13 are others without the queries before them"
