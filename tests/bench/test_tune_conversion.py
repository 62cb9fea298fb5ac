"""Conversion: a fit brings the weights nearer, what is applied is the recurrence of the maps, a file keeps it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import saccade
from saccade.bench.tune import Converted, convert, load, recipe, recipes, tuner
from saccade.bench.tune.linearized import Convertible, divergence, softmax, weights
from saccade.bench.tune.measure import passages
from saccade.cli import app
from saccade.contract import Dims
from saccade.hosts.lm import LM, LMConfig, dense
from saccade.testing.budget import assert_close
from saccade.testing.subject import randomise

SIZES = {"dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "ffn_dim": 16}
QUICK = {"lengths": (48,), "beyond": 64, "count": 2, "steps": 12, "finetune": 0}


def small(**changes):
    """A model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = LM(LMConfig(**SIZES | changes, max_length=128)).requires_grad_(False).eval()
    for layer in model.layers:
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            proj.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module", params=recipes())
def converted(request, model):
    return convert(request.param, **QUICK, model=model)


def drawn(name, dims=None):
    """A layer of a recipe with parameters that are nothing special, and q, k, v, all float64."""
    layer = randomise(recipe(name)(dims or Dims(4, 6, 2))).double().requires_grad_(False)
    q, k, v = (torch.randn(2, heads, 29, 6, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    return layer, q.double(), k.double(), v.double()


@pytest.mark.parametrize("name", recipes())
def test_a_layer_is_its_equations_whole_and_token_by_token(name):
    layer, q, k, v = drawn(name)
    exact = layer.oracle(q, k, v)
    # Decays are computed in the module's dtype, cosines twice: a few roundings a product.
    assert_close(layer(q, k, v), exact, exact, terms=29 * 36)
    rows, state = [], None
    for t in range(29):
        row, state = layer.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state=state)
        rows.append(row)
    assert_close(torch.cat(rows, 2), exact, exact, terms=29 * 36)
    w = weights(layer, q, k)
    assert_close(w.sum(-1), torch.ones_like(w[..., 0]), torch.ones_like(w[..., 0]), terms=29 * 36)
    assert not w.triu(1).any()
    # The twin: parameters a little off are seen.
    next(layer.parameters()).mul_(1 + 1e-6)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(layer(q, k, v), exact, exact, terms=29 * 36)


@pytest.mark.parametrize("name", recipes())
def test_everything_that_is_learned_has_a_gradient(name):
    layer, q, k, v = drawn(name)
    layer.requires_grad_(True).objective(q, k, v).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.parameters())


@pytest.mark.parametrize("name", recipes())
def test_gradients_are_those_of_the_equations(name):
    layer, *inputs = drawn(name)
    layer.requires_grad_(True)
    into = [*(x.requires_grad_() for x in inputs), *layer.parameters()]
    weigh = torch.randn(2, 4, 29, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found, exact = (torch.autograd.grad((call(*inputs) * weigh).sum(), into) for call in (layer, layer.oracle))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, other, terms=29 * 36 * 16)
    off = torch.autograd.grad((layer(*inputs) * weigh.roll(1, 2)).sum(), into)  # the twin
    with pytest.raises(AssertionError, match="max error"):
        assert_close(off[-1], exact[-1], exact[-1], terms=29 * 36 * 16)


def test_softmaxs_weights_and_the_divergence_from_them():
    _, q, k, _ = drawn("linear")
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT / 6**0.5).flatten(1, 2)
    p = scores.masked_fill(torch.ones(29, 29, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert_close(weights(softmax, q, k), p, p, terms=29)
    w = torch.rand(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype).tril()
    w = w / w.sum(-1, keepdim=True)
    found = sum(x * math.log(x / y) for x, y in zip(p.flatten().tolist(), w.flatten().tolist(), strict=True) if x)
    assert float(divergence(w, p)) == pytest.approx(found / p[..., 0].numel())
    assert float(divergence(p, p)) == pytest.approx(0)


def test_a_fit_brings_the_weights_nearer(converted):
    assert list(converted.error) == ["48", "64"]
    for row in converted.error.values():
        assert row["fitted"] < row["unfitted"]
    assert [list(row) for row in converted.perplexity.values()] == [["dense", "unfitted", "fitted"]] * 2


@pytest.mark.parametrize("name", recipes())
def test_without_steps_nothing_comes_nearer(name, model):
    """The broken twin of the fit."""
    found = convert(name, **QUICK | {"steps": 0}, model=model)
    for row in found.error.values():
        assert row["fitted"] == row["unfitted"]
    cls = recipe(name)
    start = cls(Dims(4, 6, 2)).state_dict()
    assert {key: x.tolist() for key, x in found.layers()[1]["tensors"].items()} == {
        key: x.tolist() for key, x in start.items()
    }


def test_what_it_says_of_dense_attention_and_of_the_fit_is_so(converted, model):
    group = passages(48, 2, held_out=True)

    def perplexity(one):
        nats = [
            float(torch.nn.functional.cross_entropy(one(s.tokens)[0, :-1], s.tokens[0, 1:]).detach()) for s in group
        ]
        return math.exp(sum(nats) / len(nats))

    assert converted.perplexity["48"]["dense"] == pytest.approx(perplexity(model))
    assert converted.perplexity["48"]["fitted"] == pytest.approx(perplexity(converted.apply(model)))


def test_the_applied_model_is_the_recurrence_of_the_fitted_maps(converted, model):
    """Every layer's attention, in float64, by the equations and the tensors of the file alone."""
    tokens = passages(40, 1, held_out=True)[0].tokens
    applied, truth = converted.apply(model.double()), converted.apply(model.double())
    model.float()
    oracles = [recipe(converted.recipe)(Dims(4, 6, 2), **params).double() for params in converted.layers()]
    truth.attention = lambda q, k, v, layer: oracles[layer].oracle(q, k, v)
    with torch.no_grad():
        found, exact = applied(tokens), truth(tokens)
        assert_close(found, exact, exact, terms=40 * 36 * 24)
        oracles.reverse()  # the twin: maps of another layer
        with pytest.raises(AssertionError, match="max error"):
            assert_close(found, truth(tokens), truth(tokens), terms=40 * 36 * 24)


def test_what_was_written_gives_the_same_outputs(converted, model, tmp_path):
    path = converted.save(tmp_path / "mine.json")
    back = load(path)
    assert isinstance(back, Converted)
    tokens = passages(40, 1, held_out=True)[0].tokens
    assert torch.equal(back.apply(model)(tokens), converted.apply(model)(tokens))
    assert (back.error, back.perplexity, back.steps) == (converted.error, converted.perplexity, converted.steps)
    tensors = load_file(tmp_path / "mine.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1e-3}, tmp_path / "mine.safetensors")  # the twin
    assert not torch.equal(load(path).apply(model)(tokens), converted.apply(model)(tokens))


def test_finetuning_trains_the_whole_and_leaves_the_given_model_alone(model, tmp_path):
    before = {key: x.clone() for key, x in model.state_dict().items()}
    found = convert("hedgehog", **QUICK | {"finetune": 3, "steps": 2}, model=model)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert model.attention is dense
    for row in found.perplexity.values():
        assert row["finetuned"] < row["fitted"]
    applied = load(found.save(tmp_path / "whole.json")).apply(model)
    assert not torch.equal(applied.state_dict()["embed_tokens.weight"], before["embed_tokens.weight"])
    nats = [
        float(torch.nn.functional.cross_entropy(applied(s.tokens)[0, :-1], s.tokens[0, 1:]))
        for s in passages(64, 2, held_out=True)
    ]
    assert math.exp(sum(nats) / 2) == pytest.approx(found.perplexity["64"]["finetuned"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (0,)}, "lengths: got 0; pass an integer >= 1"),
        ({"beyond": 1000}, "lengths: got 1000 with beyond; the model reads at most 128"),
        ({"steps": -1}, "steps: got -1; pass an integer >= 0"),
        ({"finetune": -1}, "finetune: got -1; pass an integer >= 0"),
        ({"count": 0}, "count: got 0; pass an integer >= 1"),
    ],
)
def test_what_it_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert("linear", **QUICK | options, model=model)


def test_tensors_and_models_of_other_sizes_are_refused(converted):
    (params, _) = converted.layers()
    with pytest.raises(ValueError, match=r"tensors: got \{.*; \w+Fit for Dims\(.*head_dim=8.* has \{"):
        recipe(converted.recipe)(Dims(4, 8, 2), **params)
    with pytest.raises(ValueError, match=r"model: got one of LMConfig\(.*; this conversion is of one of LMConfig\("):
        converted.apply(small(num_layers=3))


def test_the_door_knows_recipes_and_their_options():
    assert recipes() == sorted(recipes()) == ["dijiang", "hedgehog", "linear"]
    with pytest.raises(ValueError, match=r"density: got 0\.5, which tuning hedgehog does not take; leave it out"):
        tuner("hedgehog", density=0.5)
    with pytest.raises(ValueError, match="steps: got 5, which tuning moa_sparse does not take; leave it out"):
        tuner("moa_sparse", steps=5)
    with pytest.raises(ValueError, match="id: got 'spam'; choose one of dijiang, hedgehog, linear, "):
        tuner("spam")
    with pytest.raises(ValueError, match="recipe: got 'spam'; choose one of dijiang, hedgehog, linear"):
        recipe("spam")


def test_decays_start_at_those_of_the_mechanism():
    layer = saccade.mechanism("dijiang")(Dims(5, 8))
    found, exact = recipe("dijiang")(Dims(5, 8)).log_decay().detach(), layer.decays.value.double()
    assert_close(found, exact, layer.decays.value)
    with pytest.raises(AssertionError, match="max error"):  # the twin: heads in another order
        assert_close(found, exact.flip(0), layer.decays.value.flip(0))


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_the_command_writes_what_compare_reads(monkeypatch, tmp_path, model):
    monkeypatch.setattr(LM, "from_pretrained", classmethod(lambda cls: model))
    path = tmp_path / "mine.json"
    options = ("--lengths", 48, "--beyond", 64, "--samples", 1, "--steps", 2, "--finetune", 1, "--device", "cpu")
    result = run("tune", "dijiang", *options, "--out", path)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    data = json.loads(path.read_text())
    assert (data["recipe"], data["steps"]) == ("dijiang", {"fit": 2, "finetune": 1})

    words = ("--config", path, "--shape", "1,4,2,64,6", "--budget", 30, "--out", tmp_path / "report")
    result = run("compare", *words)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert {(r["mechanism"], r["status"]) for r in rows} == {
        ("dense", "OK"),
        ("dijiang:unfitted", "OK"),
        ("dijiang:mine", "OK"),
    }


def test_the_command_refuses_in_one_line(tmp_path):
    for words, message in (
        (("tune", "hedgehog", "--time", 0.5), "saccade: time: got 0.5, which tuning hedgehog does not take"),
        (("tune", "linear", "--device", "tpu"), "saccade: device: got 'tpu'; pass cpu, cuda or cuda:N"),
        (("tune", "linear", "--out", "x.safetensors"), "saccade: out: got 'x.safetensors', where the tensors"),
        (("tune", "linear", "--lengths", "x"), "saccade: lengths: got 'x'; pass integers between commas"),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    (tmp_path / "odd.json").write_text('{"recipe": "linear"}')
    result = run("compare", "--config", tmp_path / "odd.json")
    assert result.exit_code == 2
    assert "its tensors beside it" in " ".join(result.stderr.split())
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    result = run("compare", "--config", tmp_path / "odd.json")
    assert "is not what saccade tune writes" in " ".join(result.stderr.split())


def test_recipes_are_built_on_what_the_catalogue_has():
    """A class that offers its maps is a recipe as it is found; the twin, one that offers none, is not."""
    offers = [spec.id for spec in saccade.mechanisms() if hasattr(saccade.mechanism(spec.id), "to_fit")]
    assert {"dijiang", "hedgehog"} <= set(offers) <= set(recipes())
    for name in offers:
        assert recipe(name).spec is saccade.mechanism(name).spec
        assert recipe(name) is recipe(name)
    assert isinstance(saccade.mechanism("hedgehog"), Convertible)
    assert not isinstance(saccade.mechanism("moba"), Convertible)
