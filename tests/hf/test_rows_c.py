"""Policies that pick what a step reads, over layers and by spans: a full budget generates the model's own tokens."""

import pytest
import torch
from hf_models import made, padded

from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hosts.lm import LM
from saccade.tasks.text import held_out_text

FULL = {
    "tidal_decode": {"correction": 5, "num_layers": 8},
    "lessismore": {"correction": 5, "num_layers": 8},
    "lychee_decode": {"share": 0.25, "num_layers": 8},
    "ltri_llm": {"window": 32, "longest": 8, "recent": 32, "sinks": 4},
}
SMALL = {
    "tidal_decode": {"start": 1, "correction": 1, "num_layers": 3},
    "lessismore": {"start": 1, "correction": 1, "num_layers": 3, "sinks": 1},
    "lychee_decode": {"share": 0.5, "num_layers": 3},
    "ltri_llm": {"window": 2, "longest": 2, "recent": 2, "sinks": 1},
}


def of(id, params, heads, width, kv_heads):
    layers = params.get("num_layers", 1)
    return mechanism(id)(Dims(layers * heads, width, layers * kv_heads), **params)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generated(model, read, real):
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=8, pad_token_id=0)


@pytest.fixture(scope="module")
def bundled():
    return LM.from_pretrained().to_llama()


@pytest.mark.parametrize("id", FULL)
def test_a_full_budget_generates_the_bundled_models_own_tokens(bundled, id):
    rows = [list(held_out_text()[1000 * i : 1000 * i + n]) for i, n in enumerate((120, 75, 98))]
    read = torch.tensor([[0] * (120 - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (120 - len(row)) + [1] * len(row) for row in rows])
    own = generated(bundled, read, real)
    with apply(bundled, of(id, {**FULL[id], "budget": 1.0}, 8, 64, 2)):
        assert torch.equal(generated(bundled, read, real), own)


@pytest.mark.parametrize("budget", [5, 0.4])
@pytest.mark.parametrize("id", SMALL)
def test_a_padded_row_decodes_as_it_does_alone(id, budget):
    """With a budget that leaves tokens unread: lists and spans are those of a sequence, not of its batch."""
    model = made("llama").double()
    read, real = padded("left", (12, 9, 12, 10))
    with apply(model, of(id, {**SMALL[id], "budget": budget}, 4, 8, 2).double()):
        together = generated(model, read, real)
        for row in range(4):
            mine = read[row : row + 1, real[row].bool()]
            assert torch.equal(together[row, 12:], generated(model, mine, torch.ones_like(mine))[0, mine.shape[1] :])


def test_another_ones_list_is_caught(monkeypatch):
    """A twin hands each sequence the list of its neighbour."""
    from saccade.cache import View

    pass_on = View.pass_on
    monkeypatch.setattr(View, "pass_on", lambda self, name, x, fill=0: pass_on(self, name, x.roll(1, 0), fill))
    with pytest.raises(AssertionError):
        test_a_padded_row_decodes_as_it_does_alone("tidal_decode", 5)
