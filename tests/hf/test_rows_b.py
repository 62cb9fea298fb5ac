"""Rows that read few tokens of a cache, or keep narrow ones, in pretrained models, beside the dense model and alone."""

import copy

import pytest
import torch
from hf_models import made, padded

from saccade.cache import Rotation
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hosts.lm import LM, LMConfig
from saccade.mix import rotary_rates
from saccade.tasks.text import held_out_text

FULL = {
    "eigen_attention": [{"rank": 1.0, "value_rank": 1.0}],
    "loki": [{"budget": 1.0}, {"budget": 512}],
    "recycled_attention": [{"budget": 1.0}, {"budget": 512}, {"budget": 4, "every": 1}],
    "seer_attention_r": [{"budget": 1.0, "block": 16}, {"budget": 512, "block": 16}],
    "squeezed_attention": [{"budget": 1.0, "window": 20}, {"budget": 0.1, "window": 512}],
}
FEW = [
    ("eigen_attention", {"rank": 3, "value_rank": 2}),
    ("loki", {"budget": 4, "rank": 3}),
    ("loki", {"budget": 0.4}),
    ("recycled_attention", {"budget": 4, "every": 3}),
    ("recycled_attention", {"budget": 0.4, "every": 2, "similarity": 0.5}),
    ("seer_attention_r", {"budget": 2, "block": 2, "gate_dim": 4}),
    ("seer_attention_r", {"threshold": 0.15, "block": 3, "gate_dim": 4}),
    ("squeezed_attention", {"budget": 0.4, "clusters": 0.5, "window": 2, "coarse": 0.3}),
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bundled():
    return LM.from_pretrained().to_llama()


def generated(model, read, real):
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=6, pad_token_id=0)


@pytest.mark.parametrize(("name", "params"), [(name, params) for name, each in FULL.items() for params in each])
def test_a_full_budget_generates_the_bundled_models_own_tokens(bundled, name, params):
    config, rows = LMConfig(), [list(held_out_text()[1000 * i :][:n]) for i, n in enumerate((120, 75, 98))]
    read = torch.tensor([[0] * (120 - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (120 - len(row)) + [1] * len(row) for row in rows])
    own = generated(bundled, read, real)
    dims = Dims(config.num_heads, config.head_dim, config.num_kv_heads)
    with apply(bundled, mechanism(name)(dims, **params)):
        assert torch.equal(generated(bundled, read, real), own)


@pytest.mark.parametrize(("name", "params"), FEW)
def test_a_padded_row_decodes_as_it_does_alone(name, params):
    """With a budget that leaves tokens out: what is padding, and what others do, changes nothing."""
    model = made("llama").double()
    read, real = padded("left", (12, 9, 10))
    few = mechanism(name)(Dims(4, 8, 2), **params).double()
    own = generated(model, read, real)
    with apply(model, few):
        together = generated(model, read, real)
        for row in range(3):
            mine = read[row : row + 1, real[row].bool()]
            alone = generated(model, mine, torch.ones_like(mine))
            assert torch.equal(together[row, read.shape[1] :], alone[0, mine.shape[1] :])
    assert not torch.equal(together, own)


@pytest.mark.parametrize(("name", "params"), FEW)
def test_what_one_sequence_reads_moves_with_it(name, params):
    """Beams of several sequences are those that each has alone."""
    model = made("llama").double()
    read, few = torch.randint(1, 61, (2, 11)), mechanism(name)(Dims(4, 8, 2), **params).double()
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with apply(model, few):
        together = model.generate(read, **options)
        alone = [model.generate(read[row : row + 1], **options) for row in range(2)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", FULL)
def test_a_prompt_of_one_token_decodes(name):
    model, read = made("llama"), torch.ones(1, 1, dtype=torch.int64)
    own = generated(model, read, read)
    with apply(model, mechanism(name)(Dims(4, 8, 2), **FULL[name][0])):
        assert torch.equal(generated(model, read, read), own)


def test_the_threshold_of_clusters_is_the_quantile_of_each_sequence():
    policy = mechanism("squeezed_attention")(Dims(1, 4)).policy
    x = torch.rand(3, 40).double()
    x[1, 30:] = torch.nan
    truth = torch.stack([row[~row.isnan()].quantile(0.7).log() for row in x])
    found = policy._quantile(x, 0.7)
    assert (found - truth).abs().max() <= 8 * torch.finfo(x.dtype).eps * truth.abs().max()


def test_what_was_fitted_is_in_the_state():
    keys, queries = torch.randn(2, 2, 60, 8).cumsum(-1), torch.randn(2, 4, 60, 8)
    loki, seer = mechanism("loki")(Dims(4, 8, 2)), mechanism("seer_attention_r")(Dims(4, 8, 2), block=8, gate_dim=4)
    start = [copy.deepcopy(each.state_dict()) for each in (loki, seer)]
    loki.fit(keys)
    with torch.enable_grad():
        seer.fit([(queries, keys)])
    for each, old in zip((loki, seer), start, strict=True):
        new = each.state_dict()
        assert new.keys() == old.keys()
        assert all(not torch.equal(new[name], old[name]) for name in new)
    again = mechanism("loki")(Dims(4, 8, 2))
    again.load_state_dict(loki.state_dict())
    assert torch.equal(again(queries, keys, keys), loki(queries, keys, keys))
    assert again.components(0.9) == loki.components(0.9) < 8


@pytest.mark.parametrize("theta", [None, 50.0])
def test_the_loss_of_distillation_is_the_equations(theta):
    """Block by block, in plain loops, of queries of the second half."""
    turn = None if theta is None else Rotation(rotary_rates(3, theta))
    seer = mechanism("seer_attention_r")(Dims(4, 6, 2), block=4, gate_dim=4, rotation=turn).double()
    q, k = torch.randn(2, 4, 20, 6).double(), torch.randn(2, 2, 20, 6).double()
    w, terms = dict(seer.named_parameters()), []

    def spun(x, t):
        if theta is None:
            return x
        half = len(x) // 2
        spin = torch.polar(torch.ones(half).double(), t * theta ** (-torch.arange(half).double() / half))
        both = torch.complex(x[:half], x[half:]) * spin
        return torch.cat([both.real, both.imag])

    def normed(x, weight):
        return x * (x.square().mean() + 1e-6).rsqrt() * weight

    for b, g, i in [(b, g, i) for b in range(2) for g in range(2) for i in range(10, 20)]:
        heads = range(2 * g, 2 * g + 2)
        ask = sum(spun(q[b, h, i], -i) @ w["query"][g, h - 2 * g] for h in heads)
        ask, scores, peaks = spun(normed(ask, w["query_norm"]), i), [], []
        attention = [(k[b, g, : i + 1] @ q[b, h, i] / 6**0.5).softmax(0) for h in heads]
        for first in range(0, i // 4 * 4, 4):
            rows = torch.stack([spun(k[b, g, j], -j) for j in range(first, first + 4)])
            pools = torch.cat([rows.amax(0), rows.amin(0), rows.mean(0)]) @ w["key"][g]
            scores.append(ask @ spun(normed(pools, w["key_norm"]), first) / 2)
            peaks.append(max(row[j] for row in attention for j in range(first, first + 4)))
        target = torch.stack(peaks) / sum(peaks)
        terms.append((target * (target.log() - torch.stack(scores).log_softmax(0))).sum() / 5)
    truth = 10 * torch.stack(terms).mean()
    found = seer.loss(q, k)
    assert abs(found - truth) <= 80 * torch.finfo(truth.dtype).eps * abs(truth)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("loki", {"budget": 0}, "budget: got 0; pass an integer >= 1"),
        ("loki", {"rank": 9}, "rank: got 9 for head_dim 8; pass at most 8"),
        ("recycled_attention", {"similarity": 1.5}, "similarity: got 1.5; pass a cosine"),
        ("seer_attention_r", {"threshold": 2.0}, "threshold: got 2.0; pass a number from 0 to 1, a probability"),
        (
            "seer_attention_r",
            {"rotation": Rotation(rotary_rates(5))},
            "rotation: got 5 pairs of channels for a head_dim of 8; pass 4",
        ),
        ("squeezed_attention", {"clusters": 0.0}, "clusters: got 0.0; pass a number above 0 and up to 1"),
        ("squeezed_attention", {"coarse": 0.2}, "coarse: got 0.2 beside clusters 0.05; pass fewer"),
    ],
)
def test_what_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        mechanism(name)(Dims(4, 8, 2), **params)


def test_keys_of_other_heads_are_refused():
    with pytest.raises(ValueError, match=r"keys: got \(2, 3, 60, 8\); pass \(batch, 2, tokens, 8\)"):
        mechanism("loki")(Dims(4, 8, 2)).fit(torch.randn(2, 3, 60, 8))
