"""LServe in pretrained models: a full budget generates the model's own tokens, and sequences do not meet."""

import pytest
import torch
from hf_models import close, made, padded

from saccade.cache import Quantized, Session
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hosts.lm import LM
from saccade.tasks.text import held_out_text

SMALL = {"page": 2, "logical": 1, "budget": 6, "sinks": 2, "local": 2, "prefill_sinks": 2, "prefill_local": 4}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generated(model, read, real, count=12):
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=count, pad_token_id=0)


@pytest.mark.parametrize("wrapped", [lambda policy: policy, lambda policy: Quantized(policy, 8)])
def test_a_full_budget_generates_the_bundled_models_own_tokens(wrapped):
    model = LM.from_pretrained().to_llama()
    rows = [list(held_out_text()[1000 * i : 1000 * i + n]) for i, n in enumerate((180, 75, 98))]
    read = torch.tensor([[0] * (180 - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (180 - len(row)) + [1] * len(row) for row in rows])
    own = generated(model, read, real)
    full = mechanism("lserve")(Dims(8 * 8, 64, 8 * 2), streaming=0.0, num_layers=8)
    with apply(model, wrapped(full.policy)):
        assert torch.equal(generated(model, read, real), own)


def test_a_padded_row_decodes_as_it_does_alone():
    model = made("llama").double()
    layers = model.config.num_hidden_layers
    read, real = padded("left", (12, 9, 11, 10))
    own = generated(model, read, real)
    one = mechanism("lserve")(Dims(layers * 4, 8, layers * 2), num_layers=layers, **SMALL)
    with apply(model, one):
        together = generated(model, read, real)
        for row in range(4):
            mine = read[row : row + 1, real[row].bool()]
            alone = generated(model, mine, torch.ones_like(mine))
            assert torch.equal(together[row, read.shape[1] :], alone[0, mine.shape[1] :])
    assert not torch.equal(together, own)


def test_requests_that_join_decode_as_they_do_alone():
    """Of unlike lengths and at unlike steps: what is due follows from a sequence's own length."""
    random, one = torch.Generator().manual_seed(0), mechanism("lserve")(Dims(4, 8, 2), **SMALL)
    q, k, v = (torch.randn(2, heads, 40, 8, generator=random, dtype=torch.float64) for heads in (4, 2, 2))
    pools = {}
    alone, joined = ([Session(one.policy, pools=pools) for _ in range(2)] for _ in range(2))
    ends = [17, 22]
    for sessions in (alone, joined):
        for b, session in enumerate(sessions):
            session.attend(0, *(x[b : b + 1, :, : ends[b]] for x in (q, k, v)))
    for session in (alone[0], joined[0]):
        session.attend(0, *(x[:1, :, 17:18] for x in (q, k, v)))
    joined[0].join(joined[1])
    at = [18, 22]
    for _ in range(15):
        rows = [[x[b : b + 1, :, at[b] : at[b] + 1] for x in (q, k, v)] for b in range(2)]
        found = joined[0].attend(0, *(torch.cat(pair) for pair in zip(*rows, strict=True)))
        expected = torch.cat([session.attend(0, *row) for session, row in zip(alone, rows, strict=True)])
        close(found, expected, expected)
        at = [each + 1 for each in at]
