"""Tuning: the solver's choice is the best there is, a profile is the loss's own slope, a configuration is read back."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from typer.testing import CliRunner

import saccade
import saccade.catalogue
from saccade.bench.compare import compare
from saccade.bench.contestant import Configured
from saccade.bench.inputs import Synthetic
from saccade.bench.records import Status
from saccade.bench.tune import Tunable, Tuned, front, loss, measured, profile, samples, solve, tune
from saccade.bench.tune import rules as module
from saccade.cli import app
from saccade.contract import Dims
from saccade.hosts.lm import LM, LMConfig, dense


class Spans(toys.Local):
    """Causal blocks; every head may have small ones or large ones, but all heads of a layer share the largest."""

    spec = toys.spec("spans")

    @classmethod
    def candidates(cls, lengths):
        return [{"size": 32}, {"size": 64}, {"size": max(lengths)}]

    @classmethod
    def assemble(cls, rules):
        return {"size": max(rule["size"] for rule in rules)}

    @classmethod
    def influence(cls, q, k, v, gradient):
        return (q.square() + gradient.square()).sum((0, 2, 3))

    @classmethod
    def lost(cls, influence, rule):
        return influence / rule["size"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 16}
    return LM(LMConfig(**sizes, max_length=512)).requires_grad_(False).eval()


@pytest.mark.parametrize("bounds", [{}, {1: 2.0}])
def test_the_solver_finds_the_best_choice(bounds):
    rng = np.random.default_rng(0)
    lost, cost, layer = rng.random((2, 4, 3)), np.array([[0.2, 0.5, 0.9], [0.3, 0.4, 0.8]]), [0, 0, 1, 1]
    found = solve(lost, cost, 0.5, layer, bounds)

    def value(choice, at):
        return lost[at, range(4), choice].sum()

    fitting = [
        choice
        for choice in itertools.product(range(3), repeat=4)
        if all(cost[at, choice].mean() <= 0.5 for at in range(2))
        and all(value(choice, at) <= most for at, most in bounds.items())
    ]
    assert 0 < len(fitting) < 81
    assert value(found, 0) == pytest.approx(min(value(choice, 0) for choice in fitting), rel=2 * module.GAP)


def test_a_layer_has_two_rules_at_most():
    lost = 1 - np.eye(4)[None]  # every head of the one layer wants a rule of its own
    found = solve(lost, np.ones((1, 4)), 1.0, [0] * 4, {})
    assert len(set(found.tolist())) == module.LAYER_RULES


def test_nothing_fits():
    assert solve(np.ones((1, 2, 2)), np.ones((1, 2)), 0.5, [0, 0], {}) is None
    with pytest.raises(ValueError, match=r"budget: got 0.5, for which the solver found nothing"):
        front(np.ones((1, 2, 2)), np.ones((1, 2)), 0.5, [0, 0], lambda: None)


def test_no_choice_of_the_front_beats_another():
    lost = np.random.default_rng(1).random((2, 6, 4))
    found = front(lost, np.ones((1, 4)), 1.0, list(range(6)), lambda: None)
    values = [lost[:, range(6), one].sum(1) for one in found]
    assert len(found) > 1
    assert not any((one <= two).all() for one, two in itertools.permutations(values, 2))


def moved(layer, by):
    """Dense attention whose output in one layer is moved."""
    return lambda q, k, v, at: dense(q, k, v, at) + (by if at == layer else 0)


def test_a_profile_hands_over_each_layers_own_gradient(model):
    group = samples(192, 1, held_out=False)
    seen = []

    class Seen(Spans):
        @classmethod
        def influence(cls, q, k, v, gradient):
            seen.append((q, k, v, gradient))
            return gradient.sum((0, 2, 3))

    profile(model, Seen, group)
    assert model.attention is dense
    assert [q.shape for q, *_ in seen] == [(1, 2, 192, 8)] * 3
    for layer, (_, k, v, gradient) in enumerate(seen):
        step = torch.randn_like(gradient)

        ends = [measured(model, moved(layer, size * step), group) for size in (1e-2, -1e-2)]
        slope = (ends[0] - ends[1]) / 2e-2
        assert slope == pytest.approx(float((gradient * step).sum()), rel=0.05, abs=1e-4)
        assert torch.equal(k, k.detach())
        assert v.shape == (1, 1, 192, 8)


def test_samples_are_text_and_answers_in_turns():
    text, answer = samples(256, 2, held_out=True)
    assert text.first == 1
    assert bytes(answer.tokens[0, answer.first :].tolist())[-1:] == b"."
    assert answer.tokens.shape == text.tokens.shape == (1, 256)
    assert not torch.equal(samples(256, 1, held_out=True, seed=1)[0].tokens, text.tokens)


@pytest.mark.parametrize("budget", [{"density": 0.8}, {"time": 1e9}])
def test_tuning_keeps_the_budget_and_measures_what_it_chose(model, budget):
    told = []
    found = tune(
        Spans, **budget, lengths=(192, 256), beyond=320, count=2, model=model, progress=lambda *step: told.append(step)
    )
    assert found.budget == budget
    assert list(found.loss) == ["192", "256", "320"]
    assert all(share <= budget.get("density", 1) for share in found.density.values())
    assert [sorted(row) for row in found.loss.values()] == [["default", "dense", "predicted", "tuned"]] * 2 + [
        ["default", "dense", "tuned"]
    ]
    contestant = Configured(Spans, found.layers, "x")
    group = samples(192, 2, held_out=True)
    assert found.loss["192"]["tuned"] == pytest.approx(
        measured(model, module.layered(contestant, Dims(2, 8, 1)), group)
    )
    assert found.loss["192"]["dense"] == pytest.approx(float(np.mean([float(loss(model, one)) for one in group])))
    dones = [done for done, _, _ in told]
    assert dones == sorted(dones)
    assert told[-1][0] < told[-1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, r"density: got 0.1, but at 192 tokens no rule takes less than 0.171"),
        ({"density": 0.0}, "density: got 0; pass a share above 0"),
        ({"density": 0.5, "time": 0.5}, "time: got 0.5 beside density 0.5; pass one of them"),
        ({"beyond": 64}, "beyond: got 64, which is not beyond 192; pass a longer one"),
        ({"beyond": 1024}, "beyond: got 1024; the model reads at most 512 tokens"),
        ({"lengths": (0,)}, "lengths: got 0; pass an integer >= 1"),
    ],
)
def test_what_it_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        tune(Spans, **({"lengths": (192,), "beyond": 256, "count": 1, "model": model} | options))


def test_what_offers_no_rules_is_refused(model):
    assert isinstance(Spans, Tunable)
    with pytest.raises(ValueError, match=r"cls: local offers no rules to choose from; choose one of \w+"):
        tune(toys.Local, model=model)


def test_a_configured_contestant_runs_beside_its_defaults():
    tuned = Configured(toys.Local, [{"size": 16}, {"size": 32}, {"size": 128}], "mine")
    found = compare([toys.Local, tuned], [Synthetic((1, 2, 2, 256, 8))], lengths=[256], budget=60)
    by_name = {r.mechanism: r for r in found.records}
    assert set(by_name) == {"dense", "local", "local:mine"}
    assert {r.status for r in found.records} == {Status.OK}
    assert by_name["local:mine"].name == "Local (mine, layer 1)"
    assert by_name["local:mine"].density == pytest.approx(by_name["local"].density * 33 / 65)
    with pytest.raises(ValueError, match="layer: got 3; mine has layers 0 to 2"):
        tuned.at(3)
    with pytest.raises(ValueError, match="layers: mine has none"):
        replace(tuned, layers=[]).at(None)


def test_the_command_writes_what_compare_reads(monkeypatch, tmp_path, model):
    monkeypatch.setattr(saccade.catalogue, "_classes", lambda: {"spans": Spans, "banded": toys.Banded})
    monkeypatch.setattr(LM, "from_pretrained", classmethod(lambda cls: model))
    path = tmp_path / "mine.json"
    words = ("tune", "spans", "--density", 0.8, "--lengths", "192", "--beyond", 256, "--samples", 1, "--out", path)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "nats a byte" in result.stdout
    data = json.loads(path.read_text())
    assert (data["mechanism"], data["budget"], len(data["layers"])) == ("spans", {"density": 0.8}, 3)
    assert Tuned.load(path).save(tmp_path / "again.json").read_text() == path.read_text()

    words = ("compare", "--config", path, "--shape", "1,2,1,128,8", "--budget", 30, "--out", tmp_path / "report")
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert {r["mechanism"] for r in rows} == {"dense", "spans", "spans:mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "saccade: config: no file "),
        ("{", "is not what saccade tune writes (Expecting property name"),
        ('{"layers": [], "mechanism": "spans"}', "is not what saccade tune writes ("),
        (
            '{"mechanism": "spam", "layers": [{}], "budget": {}, "density": {}, "loss": {}, "dims": {}}',
            "saccade: id: got 'spam'; choose one of ",
        ),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "odd.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["compare", "--config", str(path)], catch_exceptions=False)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_mechanisms_of_the_catalogue_can_be_tuned():
    """Each of them chooses among rules that can be assembled, and loses nothing by the one that hides nothing."""
    assert module.tunable()
    for id in module.tunable():
        cls = saccade.mechanism(id)
        rules = cls.candidates((256, 512))
        q, k, v, gradient = (torch.randn(1, heads, 256, 8) for heads in (4, 2, 2, 4))
        influence = cls.influence(q, k, v, gradient)
        lost = torch.stack([cls.lost(influence, rule) for rule in rules], 1)
        assert lost.shape == (4, len(rules))
        density = module.densities(cls, rules, (256,))[0]
        assert float(lost[:, density.argmax()].sum()) == 0
        assert bool((lost[:, density.argmin()] > 0).all())
        assert cls(Dims(4, 8, 2), **cls.assemble([rules[0], rules[-1]] * 2))(q, k, v).shape == q.shape
