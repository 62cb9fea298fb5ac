"""Gates that learn and profiles that are searched: objectives by the book, twins that are noticed, files that serve."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from saccade import attend
from saccade.bench.compare import compare
from saccade.bench.eval import Contestant, evaluate
from saccade.bench.eval_reader import Reader, beside, load
from saccade.bench.inputs import Synthetic
from saccade.bench.records import Status
from saccade.bench.tune import Adjusted, search, searchable, teach, teachable, tuner
from saccade.bench.tune import load as load_tuned
from saccade.bench.tune.lessons import Lesson, Prompt, Seen, measured, prompts
from saccade.bench.tune.searched import Weighed, cheapest, within
from saccade.bench.tune.taught import fitted
from saccade.cache import Rotation
from saccade.catalogue import mechanism
from saccade.cli import app
from saccade.contract import Dims
from saccade.hf import apply
from saccade.hf.layers import layers_of
from saccade.hf.tuned import serves
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import Bytes
from saccade.testing.budget import assert_close
from saccade.where import Causal

LENGTH = 272  # the shortest prompt that holds four codes and a question
SMALL = {"lengths": (LENGTH,), "beyond": None, "count": 1}
PARAMS = {
    "duo_attention": {"share": 0.5, "sink": 2, "recent": 16},
    "nats": {"window": 4, "lam": 1e-3},
    "seer_attention_r": {"budget": 32, "block": 8, "gate_dim": 4},
}
TAUGHT, SEARCHED = sorted(PARAMS), ["fastgen", "loki"]


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 32}
    return Reader(LM(LMConfig(**sizes, max_length=512)).to_llama(), Bytes(), "tiny")


@pytest.fixture(scope="module")
def bundled():
    return load("bundled")


def learners(reader, id, **changed):
    layers = layers_of(reader.model)
    return [serves(id).learner(one.dims, **PARAMS[id] | changed) for one in layers]


def lesson(reader):
    """A short one, of any bytes."""
    tokens = torch.randint(256, (1, 72), generator=torch.Generator().manual_seed(0))
    return Lesson(Prompt(tokens, torch.arange(72) >= 60), beside(reader).model, reader.model)


def said(reader, id, layers, given=None):
    """The objective of one lesson with these in the student's layers."""
    given = given or lesson(reader)
    with apply(reader.model, layers), torch.no_grad():
        return float(serves(id).objective(layers, given))


# What is asked.


def test_every_kind_is_offered_by_someone():
    assert set(TAUGHT) <= set(teachable())
    assert set(SEARCHED) <= set(searchable())


def test_prompts_ask_for_answers_that_the_text_holds(reader):
    for one in prompts(reader, LENGTH, 2, held_out=True):
        text, asked = bytes(one.tokens[0].tolist()), one.asked.tolist()
        edges = [at for at, (a, b) in enumerate(zip([False, *asked], [*asked, False], strict=True)) if a != b]
        answers = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        assert len(answers) == 4
        assert all(text[: edges[0]].count(answer) == 1 for answer in answers)
        assert edges[1] <= LENGTH
    mine, theirs = (prompts(reader, LENGTH, 1, held_out=held_out)[0].tokens for held_out in (True, False))
    assert mine.shape != theirs.shape or not torch.equal(mine, theirs)
    again = prompts(reader, LENGTH, 1, held_out=True)[0].tokens
    assert torch.equal(mine, again)


def test_what_is_captured_is_what_attention_is_given(reader):
    given = lesson(reader)
    seen = given.captured()
    assert [tuple(one.q.shape[1:]) for one in seen] == [(4, given.prompt.tokens.shape[1], 8)] * 3
    with torch.no_grad():
        out = attend(seen[0].q, seen[0].k, seen[0].v, Causal())
        attention = reader.model.model.layers[0].self_attn
        norm = reader.model.model.layers[0].input_layernorm
        positions = torch.arange(given.prompt.tokens.shape[1])[None]
        x = norm(reader.model.model.embed_tokens(given.prompt.tokens))
        eager, _ = attention(x, position_embeddings=reader.model.model.rotary_emb(x, positions), attention_mask=None)
        found = attention.o_proj(out.transpose(1, 2).flatten(2))
    assert_close(found, eager, eager, terms=512)


# Objectives.


def test_a_student_that_is_its_teacher_is_at_no_distance(reader):
    given = lesson(reader)
    layers = learners(reader, "duo_attention")
    assert said(reader, "duo_attention", layers, given) == pytest.approx(0.05, abs=1e-6)
    twin = learners(reader, "duo_attention")
    for one in twin:
        one.mixed = lambda full, stream, one=one: type(one).mixed(one, stream, full)  # gates the wrong way round
    assert said(reader, "duo_attention", twin, given) > 0.0501


def test_closed_gates_are_at_the_distance_of_streaming_heads(reader):
    given, layers = lesson(reader), learners(reader, "duo_attention")
    for one in layers:
        torch.nn.init.zeros_(one.alpha)
    cls = mechanism("duo_attention")
    alone = [cls(one.dims, share=0.0, sink=2, recent=16) for one in layers_of(reader.model)]
    rows = given.prompt.asked.nonzero()[:, 0] - 1
    with torch.no_grad():
        ids = {"input_ids": given.prompt.tokens, "use_cache": False}
        full = reader.model.model(**ids).last_hidden_state[0, rows]
        with apply(reader.model, alone):
            stream = reader.model.model(**ids).last_hidden_state[0, rows]
    expected = float((full - stream).double().square().mean())
    assert expected > 0
    assert said(reader, "duo_attention", layers, given) == pytest.approx(expected, rel=1e-4)


def test_the_largest_gates_of_all_layers_are_full():
    cls = mechanism("duo_attention")
    layers = [cls(Dims(4, 8), share=None) for _ in range(3)]
    gates = torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.2, 0.0, 0.1, 0.3], [1.0, 0.95, 0.6, 0.5]])
    for one, row in zip(layers, gates, strict=True):
        one.alpha.data = row
    chosen = cls.chosen(layers, share=0.5, sink=3)
    assert chosen == [{"share": share, "sink": 3} for share in (0.75, 0.0, 0.75)]
    full = [cls(Dims(4, 8), **params) for params in chosen]
    for one, row in zip(full, gates, strict=True):
        one.alpha.data = row
    marks = torch.tensor([one.full_heads() for one in full])
    assert int(marks.sum()) == 6
    assert float(gates[marks].min()) > float(gates[~marks].max())


def test_types_that_are_all_global_owe_the_whole_sequence(reader):
    given, layers = lesson(reader), [one.eval() for one in learners(reader, "nats")]
    n, heads = given.prompt.tokens.shape[1], 2 * len(layers)
    for one in layers:  # what is owed is noted in training alone, where there is noise too
        one.training = True
        one.typed = lambda z, at: torch.nn.functional.one_hot(torch.zeros_like(z[..., 0]).long(), 3).to(z)
    owed = 1e-3 * heads * sum(n - j for j in range(n)) / n
    assert said(reader, "nats", layers, given) == pytest.approx(owed, rel=1e-5)


def test_what_types_owe_is_by_their_lives():
    made = serves("nats")(Dims(2, 4, 1), lam=1.0, window=2)
    kinds = torch.tensor([[[0, 1, 2, 0, 1, 1]]])
    types = torch.nn.functional.one_hot(kinds, 3).float()
    # globals 0 and 3 live for N - j queries, local 1 until 3, locals 4 and 5 until the last token
    owed = ((6 - 0) + (3 - 1) + (6 - 3) + (5 - 4) + (5 - 5)) / 6
    assert float(made.charge(types, made.lifetimes(types)[1])) == pytest.approx(owed)


def kl(layer, q, k):
    """10 KL(target || gates) by plain loops, a mean over queries of the second half and blocks."""
    (heads, n, d), kv_heads, size = q.shape[1:], k.shape[1], layer.block
    logits, blocks, total = layer.logits(q, k, n // 2), n // layer.block, 0.0
    for g in range(kv_heads):
        for at, i in enumerate(range(n // 2, n)):
            most = [0.0] * blocks
            for h in range(g * heads // kv_heads, (g + 1) * heads // kv_heads):
                p = (k[0, g, : i + 1] @ q[0, h, i] / math.sqrt(d)).softmax(0).tolist()
                for b in range(i // size):
                    most[b] = max(most[b], *p[b * size : (b + 1) * size])
            row = logits[0, g, at].log_softmax(0).tolist()
            total += sum(m / sum(most) * (math.log(m / sum(most)) - c) for m, c in zip(most, row, strict=True) if m > 0)
    return 10 * total / (kv_heads * (n - n // 2) * blocks)


def test_gates_of_blocks_pay_their_divergence_from_attention():
    cls, random = mechanism("seer_attention_r"), torch.Generator().manual_seed(0)
    layers = [cls(Dims(4, 8, 2), budget=8, block=4, gate_dim=6).double() for _ in range(2)]
    seen = [
        SimpleNamespace(q=torch.randn(1, 4, 24, 8, generator=random, dtype=torch.float64),
                        k=torch.randn(1, 2, 24, 8, generator=random, dtype=torch.float64))
        for _ in layers
    ]  # fmt: skip
    found = cls.objective(layers, SimpleNamespace(captured=lambda: seen))
    with torch.no_grad():
        expected = sum(kl(layer, one.q, one.k) for layer, one in zip(layers, seen, strict=True))
        swapped = sum(kl(layer, one.q, one.k) for layer, one in zip(layers[::-1], seen, strict=True))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    assert float(found.detach()) != pytest.approx(swapped, rel=1e-6)


# Learning.


def learns(reader, id, steps=6, **twin):
    """The objective of a lesson before and after steps on it alone."""
    made = serves(id)
    made = SimpleNamespace(**{"learning": made.learning, "objective": made.objective} | twin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers, given = learners(reader, id), lesson(reader)
        for one in layers:
            if id == "nats":  # away from types that are all alike
                torch.nn.init.normal_(one.kind, std=0.1)
        reader.model.requires_grad_(False)
        units = SimpleNamespace(next=lambda text: None)
        with apply(reader.model, layers):
            torch.manual_seed(2)
            before = float(serves(id).objective(layers, given).detach())
            assert fitted(made, layers, [given] * steps, units) == steps
            torch.manual_seed(2)
            after = float(serves(id).objective(layers, given).detach())
    return before, after


@pytest.mark.parametrize("id", TAUGHT)
def test_an_objective_falls(reader, id):
    before, after = learns(reader, id)
    assert after < before


@pytest.mark.parametrize("id", TAUGHT)
def test_gates_that_do_not_learn_are_noticed(reader, id):
    def blind(layers, given):
        found = serves(id).objective(layers, given).detach()
        return found + 0 * sum(x.sum() for one in layers for x in one.parameters())

    still = {"lr": 0.0, "weight_decay": 0.0}
    for twin in ({"objective": blind, "learning": serves(id).learning | {"weight_decay": 0.0}}, {"learning": still}):
        before, after = learns(reader, id, **twin)
        assert after == before


@pytest.mark.parametrize("id", TAUGHT)
def test_the_same_seed_gives_the_same_gates(reader, id):
    one, two, other = (teach(id, params=PARAMS[id], model=reader, steps=2, seed=seed, **SMALL) for seed in (0, 0, 1))
    flat = [torch.cat([x.flatten() for layer in each.tensors for x in layer.values()]) for each in (one, two, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert one.held_out == two.held_out


def test_a_models_weights_and_state_stay_as_they_were(reader):
    before = {name: x.clone() for name, x in reader.model.state_dict().items()}
    reader.model.requires_grad_(True)
    teach("duo_attention", params=PARAMS["duo_attention"], model=reader, steps=2, **SMALL)
    search("loki", model=reader, **SMALL)
    assert all(torch.equal(x, before[name]) for name, x in reader.model.state_dict().items())
    assert all(x.requires_grad and x.grad is None for x in reader.model.parameters())
    assert reader.model.config._attn_implementation != "saccade"


# Searching.


def test_the_cheapest_rule_that_is_enough():
    recovered = torch.tensor([[0.5, 0.2], [0.96, 0.4], [0.97, 0.3], [0.99, 0.1]])
    cost = torch.tensor([[0.1, 0.1], [0.3, 0.3], [0.3, 0.4], [0.2, 1.0]])
    assert cheapest(recovered, cost, 0.95).tolist() == [3, 1]
    assert cheapest(recovered[:3], cost[:3], 0.95).tolist() == [2, 1]
    assert cheapest(recovered, cost, 0.0).tolist() == [0, 0]


def sample(heads, kv_heads, n=40, d=8):
    """Attention of a prompt of 30 tokens and answers of 10, some of which are asked for."""
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, n, d, generator=random, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    asked = torch.zeros(n, dtype=torch.bool)
    asked[30:34], asked[37:] = True, True
    return Seen(torch.arange(n)[None], asked, 2 * q, k, v)


def rows_of(seen, h, g, i):
    """Attention of a query, by the book."""
    return (seen.k[0, g, : i + 1] @ seen.q[0, h, i] / seen.q.shape[3] ** 0.5).softmax(0).tolist()


def met(i, j, head, kept, width, prompt):
    """Does query i of a head meet token j? Of what was decoded, heads of special tokens and punctuation drop all."""
    if j >= prompt:
        return head >= 2 or j == i
    return head == 4 or j in kept or (head == 3 and i - j < width)


def test_what_a_head_recovers_is_what_it_would_find():
    made, seen = mechanism("fastgen")(Dims(4, 8, 2), sinks=2, punctuation=[5, 11]), sample(4, 2)
    n, foretold = 30, [at - 1 for at, one in enumerate(seen.asked.tolist()) if one]
    rules = [r for r in made.rules() if r.get("frequent", 0.1) == 0.1 and r.get("local", 0.2) == 0.2]
    recovered, held = made.weighed(seen, rules)
    assert [rule["heads"] for rule in rules] == [0, 1, 2, 3, 4]
    kinds, width = [{0, 1}, {0, 1, 5, 11}], int(0.2 * n)
    for g in range(2):
        p = {(h, i): rows_of(seen, h, g, i) for h in (2 * g, 2 * g + 1) for i in range(40)}
        sums = {j: sum(row[j] for (_, i), row in p.items() if j <= i < n) for j in range(n)}
        frequent = kinds[1] | set(sorted(set(range(n)) - kinds[1], key=lambda j: -sums[j])[: math.ceil(0.1 * n)])
        for head, kept in enumerate([*kinds, frequent, frequent, set()]):
            found = [
                np.mean([sum(x for j, x in enumerate(p[h, i]) if met(i, j, head, kept, width, n)) for i in rows])
                for h in (2 * g, 2 * g + 1)
                for rows in (range(n), foretold)
            ]
            assert float(recovered[head, g]) == pytest.approx(min(found), abs=1e-6)
        size = [2, 4, len(frequent), len(frequent | set(range(n - width, n))), n]
        assert held[:, g].tolist() == pytest.approx([x / n for x in size])


def test_what_a_rank_and_a_budget_read_is_by_the_leading_channels():
    cls, seen = mechanism("loki"), sample(4, 2)
    made = cls.calibrated(Dims(4, 8, 2), [seen])
    rules = [{"rank": 0.25, "budget": 0.25}, {"rank": 1.0, "budget": 0.5}, {"rank": 0.5, "budget": 1.0}]
    recovered, cost = made.weighed(seen, rules)
    assert cost.flatten().tolist() == [0.375, 1.0, 1.25]
    for at, rule in enumerate(rules):
        d, parts = int(8 * rule["rank"]), []
        for rows in (range(20, 40), [i - 1 for i in range(40) if seen.asked[i]]):
            found = []
            for h in range(4):
                q, k = seen.q[0, h] @ made.basis[h // 2], seen.k[0, h // 2] @ made.basis[h // 2]
                for i in rows:
                    scores = (k[: i + 1, :d] @ q[i, :d]).tolist()
                    best = sorted(range(i + 1), key=lambda j: -scores[j])[: max(1, int(rule["budget"] * (i + 1)))]
                    found.append(sum(rows_of(seen, h, h // 2, i)[j] for j in best))
            parts.append(np.mean(found))
        assert float(recovered[at]) == pytest.approx(min(parts), abs=1e-6)
    assert float(recovered[2]) == pytest.approx(1)


def test_what_fits_a_cost_recovers_most():
    rng = np.random.default_rng(0)
    layers = [Weighed(None, [{}] * 4, tuple(torch.tensor(rng.random((4, 2))) for _ in range(2))) for _ in range(2)]
    both = [torch.cat([one.figures[place] for one in layers], 1) for place in (0, 1)]  # (rules, units)
    for most in (0.2, 0.35, 0.5, 2.0):
        rules = torch.cat(within(layers, most))
        recovered, cost = (float(x.gather(0, rules[None]).mean()) for x in both)
        every = [
            [float(x[list(choice), range(4)].mean()) for x in both] for choice in itertools.product(range(4), repeat=4)
        ]
        cheapest_of_all = min(c for _, c in every)
        assert cost <= max(most, cheapest_of_all) + 1e-12
        # None that costs as little recovers more: the front's corners are what a price finds.
        assert all(r <= recovered + 1e-12 for r, c in every if c <= cost + 1e-12)
    assert torch.cat(within(layers, 2.0)).tolist() == both[0].argmax(0).tolist()


@pytest.mark.parametrize("id", SEARCHED)
def test_a_profile_recovers_what_was_asked_for_and_no_dearer_one_was_needed(reader, id):
    little, much = (search(id, model=reader, recovery=recovery, **SMALL) for recovery in (0.3, 0.9))
    assert little.found["recovered"]["tuned"] >= 0.3
    assert much.found["recovered"]["tuned"] >= 0.9
    assert little.found["cost"]["tuned"] < much.found["cost"]["tuned"]
    assert search(id, model=reader, recovery=0.9, **SMALL).layers == much.layers


# On the model that can do the task.


@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("duo_attention", {"params": {"share": 0.25, "sink": 4, "recent": 32}, "steps": 6}),
        ("loki", {"params": {"rank": 0.0625, "budget": 0.0625}, "cost": 0.09375}),  # what it costs untuned
        ("fastgen", {"cost": 0.6}),
    ],
)
def test_what_is_tuned_is_no_worse_on_held_out_prompts(bundled, id, options):
    found = (search if id in SEARCHED else teach)(id, model=bundled, **options, **SMALL | {"count": 2})
    row = found.held_out[str(LENGTH)]
    assert row["dense"]["loss"] < 0.05
    assert row["tuned"]["loss"] <= row["untuned"]["loss"]
    assert row["tuned"]["held"] <= row["untuned"]["held"] + 0.05


@pytest.mark.parametrize("id", TAUGHT)
def test_objectives_fall_on_held_out_prompts(bundled, id):
    found = teach(id, params=PARAMS[id] | {"recent": 32} if "recent" in PARAMS[id] else PARAMS[id], model=bundled,
                  steps=4, progress=stopped_before_measuring, **SMALL)  # fmt: skip
    assert found.found["objective"]["tuned"] < found.found["objective"]["untuned"]


def stopped_before_measuring(done, total, text):
    if text.startswith("measuring"):
        raise KeyboardInterrupt


# Files.


def made_by_hand(reader, id):
    """What a file of this mechanism holds, with random tensors."""
    cls = serves(id)
    params = dict(PARAMS.get(id, {}))
    if id == "fastgen":
        params = {"heads": [3, 4], "frequent": [0.1, 0.0], "local": [0.2, 0.0]}
    layers = [cls(one.dims, **params) for one in layers_of(reader.model)]
    for one in layers:
        for x in one.state_dict().values():
            x.copy_(torch.randn_like(x))
    return params, layers


@pytest.mark.parametrize("id", [*TAUGHT, *SEARCHED])
def test_a_file_gives_back_what_was_found(tmp_path, reader, id):
    tune = search if id in SEARCHED else teach
    options = {} if id in SEARCHED else {"steps": 1, "params": PARAMS[id]}
    found = tune(id, model=reader, **options, **SMALL)
    path = found.save(tmp_path / "mine.json")
    again = load_tuned(path)
    assert isinstance(again, Adjusted)
    assert replace(again, tensors=()) == replace(found, tensors=())
    for one, two in zip(again.tensors, found.tensors, strict=True):
        assert {name: x.tolist() for name, x in one.items()} == {name: x.tolist() for name, x in two.items()}
    group = prompts(reader, LENGTH, 1, held_out=True, questions=1)
    assert measured(reader, str(path), group) == found.held_out[str(LENGTH)]["tuned"]


@pytest.mark.parametrize("id", [*TAUGHT, *SEARCHED])
def test_a_comparison_and_an_evaluation_take_the_file(tmp_path, reader, id):
    params, layers = made_by_hand(reader, id)
    dims = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    tensors = tuple(one.state_dict() for one in layers)
    record = Adjusted(id, "tiny", (params,) * 3, tensors, dims, None, {}, {}, {})
    path = record.save(tmp_path / "mine.json")
    found = compare(load_tuned(path).contestants("mine"), [Synthetic((1, 4, 2, 96, 8))], lengths=[96], budget=30)
    by_name = {one.mechanism: one for one in found.records}
    assert by_name[f"{id}:mine"].status == Status.OK, by_name[f"{id}:mine"].message
    scored = evaluate(
        [Contestant.of("mine", path)], reader, tasks=["multi_key"], lengths=[LENGTH], count=1, questions=1
    )
    assert {cell.what: cell.status for cell in scored.cells} == {"dense": Status.OK, "mine": Status.OK}


@pytest.mark.parametrize("id", ["duo_attention", "loki"])
def test_an_interrupt_leaves_a_file_that_serves(tmp_path, reader, id):
    stop = {"duo_attention": "learning", "loki": "weighing rules in layer 1"}[id]
    met = []

    def progress(done, total, text):
        met.append(text)
        if text == stop and met.count(stop) == (1 if id == "loki" else 3):
            raise KeyboardInterrupt

    if id == "loki":
        found = search(id, model=reader, progress=progress, **SMALL)
        assert found.how["searched"] == 1
    else:
        found = teach(id, params=PARAMS[id], model=reader, steps=5, progress=progress, **SMALL)
        assert (found.how["steps"], found.how["of"]) == (2, 5)
    assert found.held_out == {}
    path = found.save(tmp_path / "mine.json")
    with apply(reader.model, path) as handle, torch.no_grad():
        assert reader.model(torch.arange(20)[None]).logits.isfinite().all()
    assert len(handle.mechanisms) == 3
    assert found.table().row_count == 0


def test_an_interrupt_while_measuring_keeps_what_was_learnt(reader):
    options = SMALL | {"steps": 1, "progress": stopped_before_measuring}
    found = teach("duo_attention", params=PARAMS["duo_attention"], model=reader, **options)
    assert found.how["steps"] == 1
    assert found.held_out == {}
    assert not any(torch.equal(one["alpha"], torch.ones(2)) for one in found.tensors)


# What it refuses, and the command.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: teach("nats", model=r, **SMALL | {"lengths": (0,)}), "lengths: got 0; pass an integer >= 1"),
        (lambda r: teach("nats", model=r, lengths=(600,), beyond=None), "lengths: got 600; tiny reads at most"),
        (lambda r: teach("nats", model=r, lengths=(300,), beyond=200), "beyond: got 200, which is not beyond"),
        (
            lambda r: teach("nats", params={"rotation": Rotation(torch.ones(2))}, model=r, **SMALL),
            r"params: got .*Rotation\(2 pairs, scale=1.0\)}, which the file cannot hold",
        ),
        (lambda r: teach("nats", params={"spam": 1}, model=r, **SMALL), "id: nats has no parameter 'spam'; it has "),
        (lambda r: search("loki", recovery=0.0, model=r, **SMALL), "recovery: got 0.0; pass a part of dense"),
        (lambda r: search("loki", recovery=0.5, cost=0.5, model=r, **SMALL), "cost: got 0.5 beside recovery 0.5; pass"),
        (lambda r: search("loki", seed=-1, model=r, **SMALL), "seed: got -1"),
        (lambda r: tuner("loki", steps=3), "steps: got 3, which tuning loki does not take"),
        (lambda r: tuner("hedgehog(a=1)"), "params: got {'a': 1}, which tuning hedgehog does not take"),
        (lambda r: tuner("spam"), "id: got 'spam'; choose one of .*duo_attention.*fastgen"),
    ],
)  # fmt: skip
def test_what_it_refuses(reader, call, message):
    with pytest.raises(ValueError, match=message):
        call(reader)


def test_a_model_whose_layers_slide_is_refused_before_anything_is_learnt(reader):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=320, num_key_value_heads=2, sliding_window=8, **sizes)).eval()
    with pytest.raises(ValueError, match="has a sliding window, which duo_attention does not know"):
        teach("duo_attention", model=Reader(model, Bytes(), "slides"), steps=1, **SMALL)
    assert all(x.requires_grad for x in model.parameters())


def test_the_command_writes_what_the_others_read(monkeypatch, tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 32}
    monkeypatch.setattr(LM, "from_pretrained", classmethod(lambda cls, **_: LM(LMConfig(**sizes, max_length=512))))
    path, options = tmp_path / "mine.json", ("--lengths", LENGTH, "--beyond", 300, "--samples", 1, "--seed", 3)
    words = ("tune", "duo_attention(share=0.5, sink=2, recent=16)", "--steps", 1, *options, "--out", path)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "duo_attention in bundled" in " ".join(result.stdout.split())
    said = json.loads(path.read_text())
    assert (said["mechanism"], said["how"]["seed"], list(said["held_out"])) == ("duo_attention", 3, ["272", "300"])
    words = ("compare", "--config", path, "--shape", "1,4,2,96,8", "--budget", 20, "--out", tmp_path / "report")
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "report" / "results.jsonl").read_text().splitlines()]
    assert {row["mechanism"] for row in rows} == {"dense", "duo_attention", "duo_attention:mine"}


@pytest.mark.parametrize("what", ["nats(window=4)", "fastgen"])
def test_a_model_in_a_folder_is_tuned_with_its_own_tokens(tmp_path, what):
    """Another architecture, whose tokenizer puts a sign in front of a text, gives other tokens than bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({sign: at + 1 for at, sign in enumerate(signs)} | {"<s>": 0}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="<s>").save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=257, head_dim=8, num_hidden_layers=2, max_position_embeddings=512, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), **SMALL} | ({"steps": 1} if what.startswith("nats") else {})
    found = tuner(what, **options)()
    assert (found.model, len(found.layers)) == (str(tmp_path), 2)
    path, model = found.save(tmp_path / "mine.json"), Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    with apply(model, path) as handle, torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()
    assert [one.spec.id for one in handle.mechanisms] == [found.mechanism] * 2
