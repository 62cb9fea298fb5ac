"""What `saccade tune` wrote serves the model that it was tuned for, and no other."""

import json

import pytest
import torch
from hf_models import made, tokens

from saccade.bench.tune import Adjusted, Tuned
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.layers import layers_of
from saccade.hf.tuned import marks, serves, with_tensors

SIZES = "num_heads", "num_kv_heads", "head_dim"
LLAMA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def written(tmp_path, model, **changed):
    """A file with other spans in every layer, and the parameters by layer."""
    dims, count = layers_of(model)[0].dims, len(layers_of(model))
    layers = tuple(
        {"alpha": [3 + i + 2 * h for h in range(dims.num_heads)], "beta": 0.0, "block": 2} for i in range(count)
    )
    sizes = {name: getattr(dims, name) for name in SIZES}
    return Tuned(**{"mechanism": "moa_sparse", "layers": layers, "budget": {}, "density": {}, "loss": {}, "dims": sizes}
                 | changed).save(tmp_path / "tuned.json"), layers  # fmt: skip


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_every_layer_has_its_parameters(tmp_path, kind):
    model = made("llama")
    path, params = written(tmp_path, model)
    cls = mechanism("moa_sparse")
    by_hand = [cls(layer.dims, **one) for layer, one in zip(layers_of(model), params, strict=True)]
    ids = tokens(2, 29)
    with apply(model, by_hand), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with apply(model, kind(path)) as handle, torch.no_grad():
        found = model(ids, use_cache=False).logits
    assert [type(each) for each in handle.mechanisms] == [cls] * len(params)
    assert torch.equal(found, expected)
    with apply(model, by_hand[::-1]), torch.no_grad():
        assert not torch.equal(model(ids, use_cache=False).logits, expected)


def test_another_model_is_refused_before_anything_moves(tmp_path):
    model = made("llama")
    path, params = written(tmp_path, model)
    for changed in ({"dims": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}}, {"layers": params[:2]}):
        path, _ = written(tmp_path, model, **changed)
        with pytest.raises(ValueError, match=r"^what: .*was tuned for . layers of 4 heads, 2 key heads, head_dim"):
            apply(model, path)
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "^what: no file"),
        ("{", "is not what saccade tune writes"),
        ("[]", r"is not what saccade tune writes \(a list\)"),
        ('{"mechanism": "moa_sparse"}', r"is not what saccade tune writes \(no 'layers'\)"),
        (json.dumps({"recipe": "hedgehog"}), "holds a conversion to linear attention"),
        (json.dumps({"mechanism": "mob", "layers": [{}] * 3}), "id: got 'mob'; choose one of"),
        (json.dumps({"mechanism": "moba", "layers": 3, "dims": LLAMA}), "is not what saccade tune writes"),
        (
            json.dumps({"mechanism": "moba", "layers": [{}, 2, {}], "dims": LLAMA}),
            r"tune writes \(a layer of 2\); tune again",
        ),
        (
            json.dumps({"mechanism": "moba", "layers": [{"theta": 1.0}] * 3, "dims": LLAMA}),
            "gives moba a parameter 'theta', which it does not have; tune again",
        ),
    ],
)
def test_what_is_no_such_file(tmp_path, text, message):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        apply(made("llama"), path)


PARAMS = {
    "duo_attention": [{"share": share, "sink": 1, "recent": 5} for share in (0.5, 0.0, 1.0)],
    "seer_attention_r": [{"budget": 8, "block": 4, "gate_dim": 4}] * 3,
    "nats": [{"window": 3}] * 3,
    "loki": [{"rank": rank, "budget": 0.3} for rank in (0.25, 0.5, 1.0)],
    "fastgen": [{"heads": heads, "frequent": [0.2, 0.0], "local": [0.2, 0.0]} for heads in ([3, 4], [0, 2], [4, 4])],
}


def learnt(tmp_path, model, id, **changed):
    """A file with random tensors in every layer, and mechanisms made of the same by hand."""
    layers = [serves(id)(one.dims, **params) for one, params in zip(layers_of(model), PARAMS[id], strict=True)]
    for one in layers:
        for x in one.state_dict().values():
            x.copy_(
                torch.randn_like(x).sort(0).values
            )  # the last gate is the largest, the first where nothing is learnt
    sizes = {name: getattr(layers_of(model)[0].dims, name) for name in SIZES}
    said = {
        "mechanism": id,
        "model": "small",
        "layers": tuple(PARAMS[id]),
        "tensors": tuple(one.state_dict() for one in layers),
        "dims": sizes,
        "marks": marks(layers_of(model)),
        "how": {},
        "found": {},
        "held_out": {},
    }
    return Adjusted(**said | changed).save(tmp_path / "learnt.json"), [one.eval() for one in layers]


@pytest.mark.parametrize("id", sorted(PARAMS))
def test_what_was_learnt_serves(tmp_path, id):
    model, ids = made("llama"), tokens(1, 33)
    path, by_hand = learnt(tmp_path, model, id)

    def read(what):
        with apply(model, what), torch.no_grad():
            first = model(ids[:, :30])
            steps = [model(ids[:, at : at + 1], cache=first.cache).logits for at in range(30, 33)]
        return torch.cat([first.logits, *steps], 1)

    expected = read(by_hand)
    assert torch.equal(read(path), expected)
    if id != "fastgen":  # the others say nothing without their tensors
        plain = [serves(id)(one.dims, **params).eval() for one, params in zip(by_hand, PARAMS[id], strict=True)]
        assert not torch.equal(read(plain), expected)


def test_weights_of_another_model_are_refused_before_anything_moves(tmp_path):
    model, other = made("llama"), made("llama")
    path, _ = learnt(tmp_path, model, "duo_attention")
    before = other.model.layers[0].self_attn.__dict__.copy()
    with pytest.raises(ValueError, match=r"^what: .* was tuned for small, whose weights are not those of this model"):
        apply(other, path)
    assert other.config._attn_implementation == "eager"
    assert other.model.layers[0].self_attn.__dict__.keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_are_known_again(tmp_path, dtype):
    model = made("llama")
    path, _ = learnt(tmp_path, model, "loki")
    with apply(model.to(dtype), path) as handle:
        assert {x.dtype for one in handle.mechanisms for x in one.buffers()} == {dtype}


def test_tensors_lie_beside_the_file_and_are_those_it_was_written_with(tmp_path):
    model = made("llama")
    path, _ = learnt(tmp_path, model, "duo_attention")
    beside = path.with_suffix(".safetensors")
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"does not hold the tensors that .* was written with; tune again"):
        apply(model, path)
    beside.unlink()
    with pytest.raises(ValueError, match=r"^what: no file .*learnt.safetensors', where the tensors of .* lie"):
        apply(model, path)
    assert model.config._attn_implementation == "eager"


def test_tensors_of_another_mechanism_are_refused(tmp_path):
    model = made("llama")
    odd = tuple({"alpha": torch.ones(5)} for _ in range(3))
    path, _ = learnt(tmp_path, model, "duo_attention", tensors=odd)
    with pytest.raises(
        ValueError, match=r"^tensors: got \{'alpha': \(5,\)\}; duo_attention for .* has \{'alpha': \(2,\)\}"
    ):
        apply(model, path)
    assert model.config._attn_implementation == "eager"


def test_a_class_takes_its_tensors_as_a_parameter():
    cls, gates = with_tensors(mechanism("duo_attention")), torch.tensor([0.1, 0.9])
    one = cls(Dims(4, 8, 2), share=0.5, tensors={"alpha": gates})
    assert (one.full_heads(), one.share, cls.spec.id) == ([False, True], 0.5, "duo_attention")
    assert "tensors" in cls.params()
    assert torch.equal(cls(Dims(4, 8, 2)).alpha, torch.ones(2))
