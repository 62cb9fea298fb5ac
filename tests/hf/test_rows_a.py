"""PagedEviction, KVCompose, FastGen and A-VL in pretrained models, and what they read off token ids."""

import itertools

import pytest
import torch
from hf_models import close, made, padded

import saccade
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hosts.lm import LM
from saccade.tasks.text import held_out_text

FULL = {
    "paged_eviction": {"budget": 1.0},
    "kvcompose": {"budget": 1.0},
    "fastgen": {"recovery": 1.0},
    "a_vl": {"secondary": 1.0, "core": 1.0, "text": 1.0},
}
SPARSE = {
    "paged_eviction": {"budget": 10, "page": 2},
    "kvcompose": {"budget": 5, "probe": 2},
    "fastgen": {"recovery": 0.6, "punctuation": range(0, 50, 3)},
    "a_vl": {"image": (1, -3), "secondary": 0.6, "core": 0.3, "text": 0.5},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def built(name, model, **params):
    c, cls = model.config, saccade.mechanism(name)
    layers = c.num_hidden_layers if "num_layers" in cls.params() else 1
    dims = Dims(layers * c.num_attention_heads, c.head_dim, layers * c.num_key_value_heads)
    return cls(dims, **params, **({"num_layers": layers} if layers > 1 else {}))


def generated(model, read, real):
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=24, pad_token_id=0)


@pytest.mark.parametrize("name", FULL)
def test_a_full_budget_generates_the_bundled_models_own_tokens(name):
    model = LM.from_pretrained().to_llama()
    rows = [list(held_out_text()[at : at + n]) for at, n in ((0, 90), (1000, 61))]
    read = torch.tensor([[0] * (90 - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (90 - len(row)) + [1] * len(row) for row in rows])
    own = generated(model, read, real)
    with apply(model, built(name, model, **FULL[name])):
        assert torch.equal(generated(model, read, real), own)


@pytest.mark.parametrize("name", SPARSE)
def test_a_padded_row_decodes_as_it_does_alone(name):
    model = made("llama").double()
    read, real = padded("left", (12, 9, 11))
    own = generated(model, read, real)
    with apply(model, built(name, model, **SPARSE[name])):
        together = generated(model, read, real)
        for row in range(3):
            mine = read[row : row + 1, real[row].bool()]
            alone = generated(model, mine, torch.ones_like(mine))
            assert torch.equal(together[row, read.shape[1] :], alone[0, mine.shape[1] :])
    assert not torch.equal(together, own)


def told(one, ids, q, k, v):
    """Of `one`, whose session hears the ids: prompt and steps."""
    session, parts = one.session(), []
    for start, stop in itertools.pairwise([0, *range(one.prompt(q.shape[2]), q.shape[2] + 1)]):
        session.tell(ids[:, start:stop])
        parts.append(one.read(session, *(x[:, :, start:stop] for x in (q, k, v))))
    return torch.cat(parts, 2), session


def test_heads_of_fastgen_keep_punctuation_that_is_decoded():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 47, 8, generator=random, dtype=torch.float64) for heads in (6, 3, 3))
    ids = torch.randint(0, 6, (2, 47), generator=random)
    k[:, 0] += 3 * (ids == 1).double()[..., None] / 8**0.5
    q[:, :2] += 24 / 8**0.5
    q[:, 2:4] += 4 * k[:, 1:2, :1]
    one = saccade.mechanism("fastgen")(Dims(6, 8, 3), recovery=0.8, special=[0], punctuation=[1], decoded=20)
    found, session = told(one, ids, q, k, v)
    heads = session.store(0).notes["head"]
    assert heads[:, :2].tolist() == [[1, 0], [1, 0]]
    assert {2, 3} & set(heads.flatten().tolist())
    expected = one.oracle(q, k, v, ids=ids)
    close(found, expected, expected)
    marks = (ids == 1) | (ids == 0)
    marks[:, 0] = True
    assert torch.equal(session.held(0)[:, 0], marks)
    assert not session.held(0)[:, 1, 27:].any()


def test_an_image_is_a_part_of_the_prompt_or_has_an_id():
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 53, 8, generator=random, dtype=torch.float64)
    ids = torch.full((2, 53), 4)
    ids[:, 5:25] = 9
    named, placed = (saccade.mechanism("a_vl")(Dims(2, 8), image=image) for image in (9, (5, 25)))
    assert torch.equal(told(named, ids, q, k, v)[0], placed(q, k, v))
