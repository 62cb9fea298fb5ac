"""What `saccade tune` wrote serves the model that it was tuned for, and no other."""

import json

import pytest
import torch
from hf_models import made, tokens

from saccade.bench.tune import Tuned
from saccade.catalogue import mechanism
from saccade.hf import apply
from saccade.hf.layers import layers_of

SIZES = "num_heads", "num_kv_heads", "head_dim"


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
    ],
)
def test_what_is_no_such_file(tmp_path, text, message):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        apply(made("llama"), path)
