"""Prompts that are read once for many policies: what each policy makes of them is what it makes of its own reading."""

import functools
from dataclasses import replace

import pytest
import torch

import saccade.bench.eval
import saccade.hf.recorded
from saccade.bench import eval_shared
from saccade.bench.eval import Contestant, at_budgets, evaluate
from saccade.bench.eval_reader import WARM, Reader, Rows, aware, in_pages
from saccade.bench.eval_records import Protocol
from saccade.bench.eval_shared import Shared, begins_densely
from saccade.hf.serving import Caching
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import Bytes, task_named
from saccade.testing.tape import Tape

SMALL = LMConfig(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32, max_length=512)
POLICIES = [one.name for one in at_budgets(budgets=[0.5])]
OWN = "eigen_attention"  # attends to its prompt in its own way
OPTIONS = {"tasks": ["passkey", "multi_key"], "lengths": [200], "count": 3, "questions": 2}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Reader(LM(SMALL).to_llama(), Bytes(), "small")


def contexts(count=4):
    found = [example.context for example in task_named("multi_key").examples(300, count, seed=1)]
    assert len(set(map(len, found))) > 1  # so that there is padding
    return found


def read(reader, texts, steps=3):
    """What is there after a prompt and some steps: logits, and what every layer holds, and where."""
    rows = Rows(reader)
    found = [rows.read(texts), *(rows.read([[65 + at]] * len(texts)) for at in range(steps))]
    if in_pages(rows.cache):
        for layer in rows.cache.layers:
            view = layer.session.view(layer.index)
            found += [view.there, *(x.masked_fill(~view.there[..., None], 0) for x in (view.k, view.v)), view.positions]
            found += layer.session.store(layer.index).notes.values()
        found += [x for _, x in sorted(layer.session.shared.items())]
    return found


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("what", POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_policy_makes_of_a_shared_prompt_what_it_makes_of_its_own(small, what, padded):
    shared = replace(small, shared=Shared())
    texts = contexts() if padded else [contexts()[0]] * 2
    with Contestant.parse("knorm(budget=0.25)").enter(small.model):
        read(shared, texts)
    (once,) = shared.shared.known.values()
    versions = [x._version for met in once.met for x in (met.q, met.k, met.v)]
    before = [x.clone() for met in once.met for x in (met.q, met.k, met.v)]
    with Contestant.parse(what).enter(small.model):
        own = read(small, texts)
        assert same(read(shared, texts), own)
        assert same(read(shared, texts), own)
    assert [x._version for met in once.met for x in (met.q, met.k, met.v)] == versions
    assert same([x for met in once.met for x in (met.q, met.k, met.v)], before)
    assert [*shared.shared.known.values()] == [once]


def of_caches(model):
    """The twin of `begins_densely` that asks for a policy alone."""
    served = [vars(layer.module).get(eval_shared.NAME) for layer in eval_shared.layers_of(model)]
    return all(isinstance(each, Caching) for each in served)


def test_who_attends_in_its_own_way_reads_for_itself_and_is_noticed_where_it_does_not(small, monkeypatch):
    shared, texts = replace(small, shared=Shared()), contexts()
    with Contestant.parse(OWN).enter(small.model):
        own = read(small, texts)
        assert same(read(shared, texts), own)
        assert not begins_densely(small.model)
        assert not shared.shared.known
        monkeypatch.setattr(eval_shared, "begins_densely", of_caches)
        assert not same(read(shared, texts), own)


@pytest.mark.parametrize("what", ["dense", "moba(block=16)", "minference"])
def test_without_a_policy_nothing_is_shared(small, what):
    shared = replace(small, shared=Shared())
    with Contestant.parse(what).enter(small.model):
        assert not of_caches(small.model)
        assert same(read(shared, contexts()), read(small, contexts()))
    assert not shared.shared.known


def test_an_attend_that_an_instance_has_is_its_own(small):
    with Contestant.parse("knorm(budget=0.5)").enter(small.model):
        assert begins_densely(small.model)
        policy = vars(eval_shared.layers_of(small.model)[1].module)[eval_shared.NAME].policy
        with eval_shared.instead(policy, "attend", policy.attend.__func__):
            assert not begins_densely(small.model)
        assert "attend" not in vars(policy)
        assert begins_densely(small.model)


def test_tokens_that_a_policy_was_not_told_are_noticed(small, monkeypatch):
    shared, texts = replace(small, shared=Shared()), contexts()
    with Contestant.parse("fastgen").enter(small.model):
        own = read(small, texts)
        assert same(read(shared, texts), own)
        monkeypatch.setattr(small.model, "get_input_embeddings", lambda: lambda ids: None)  # the twin: no hook is run
        assert not same(read(shared, texts), own)


def test_other_padding_is_another_prompt(small):
    shared = replace(small, shared=Shared())
    with Contestant.parse("knorm(budget=0.5)").enter(small.model):
        for texts in ([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]], [[7, 8, 9], [5, 6, 7, 8, 9]]):  # padding is zeros
            assert same(read(shared, texts), read(small, texts))
    assert len(shared.shared.known) == 2


def test_prompts_are_held_as_far_as_there_is_room(small):
    whole = [[7] * 20] * 2, [[8] * 30], [[9] * 10]
    a_token = 2 * (2 + 2) * 16 * 4  # layers, heads of q, k and v, channels, bytes
    shared = replace(small, shared=Shared(50 * a_token))
    with Contestant.parse("knorm(budget=0.5)").enter(small.model):
        assert eval_shared.bytes_a_token(small.model) == a_token
        for _ in range(2):
            for texts in whole:
                assert same(read(shared, texts), read(small, texts))
        assert [len(key[-1][0]) for key in shared.shared.known] == [20, 10]
        assert shared.shared.held == 50 * a_token
        held = sum(x.nbytes for once in shared.shared.known.values() for met in once.met for x in (met.q, met.k, met.v))
        assert held == shared.shared.held
        shared.shared.turn_to("something")
        assert (shared.shared.known, shared.shared.held) == ({}, 0)
        read(shared, whole[1])
        shared.shared.turn_to("something")
        assert shared.shared.held == 30 * a_token
        shared.shared.stop()
        read(shared, whole[1])
        assert shared.shared.held == 0


def cells(found):
    return [replace(cell, seconds=0) for cell in found.cells]


def test_an_evaluation_reads_a_prompt_once_for_all_policies_and_budgets(small, monkeypatch):
    contestants = [replace(one, wave=0) for one in at_budgets(["knorm", "snapkv(window=8)", "quest"], [0.25, 0.5, 1.0])]
    read_at = []
    small.model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x: read_at.append(x[0].shape[1]))
    found = evaluate(contestants, small, **OPTIONS)
    shared = sum(n > 1 for n in read_at)
    read_at.clear()
    with monkeypatch.context() as twin:
        twin.setitem(eval_shared.MOST, "cpu", 0)
        assert cells(evaluate(contestants, small, **OPTIONS)) == cells(found)
    # Of each task and question, once with it and, for all questions, once without, for nine contestants or for all.
    assert sum(n > 1 for n in read_at) - shared == (9 - 1) * sum(
        1 + max(len(example.questions) for example in task_named(name).examples(200, 3, questions=2))
        for name in OPTIONS["tasks"]
    )


def test_a_prompt_that_is_wrongly_shared_changes_a_score(small, monkeypatch):
    contestants = ["knorm(budget=0.5)", OWN]
    options = OPTIONS | {"tasks": ["long_copy"], "lengths": [300]}
    reply = saccade.bench.eval_reader.Reply

    def told():
        torch.manual_seed(0)  # its directions are random
        said = []

        class Told(reply):
            @property
            def score(self):
                said.append(tuple(self.new))
                return super().score

        monkeypatch.setattr(saccade.bench.eval_reader, "Reply", Told)
        return evaluate(contestants, small, **options), said

    _, right = told()
    monkeypatch.setitem(eval_shared.MOST, "cpu", 0)
    assert told()[1] == right
    monkeypatch.undo()
    monkeypatch.setattr(eval_shared, "begins_densely", of_caches)  # the twin
    assert told()[1] != right


def test_where_memory_runs_out_nothing_is_held(small, monkeypatch):
    held = []

    def narrow(reader, handle, task, examples):
        found = aware(reader, handle, task, examples)
        held.append(reader.shared.held)
        if len(examples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    whole = evaluate(["knorm(budget=0.5)"], small, **OPTIONS).cells
    monkeypatch.setitem(saccade.bench.eval.EXAMINE, Protocol.AWARE, narrow)
    found = evaluate(["knorm(budget=0.5)"], small, **OPTIONS).cells
    assert held[0] > 0
    assert {*held[1:]} == {0}
    assert [cell.scores for cell in found] == [cell.scores for cell in whole]


# Recorded steps.


@pytest.fixture(autouse=True)
def _by_tape(monkeypatch):
    """What a device without graphs can record."""
    recording = functools.partial(saccade.hf.recorded.recording, graph=Tape)
    monkeypatch.setattr(saccade.hf.recorded, "recording", recording)


@pytest.mark.parametrize(("what", "steady"), [("snapkv(budget=0.5, window=8)", True), ("tova(budget=0.5)", False)])
def test_replies_of_recorded_steps_are_the_same(small, replays, what, steady):
    plain = evaluate([what], small, **OPTIONS)
    assert not replays
    assert cells(evaluate([what], small, recorded=True, **OPTIONS)) == cells(plain)
    assert bool(replays) == steady


@pytest.mark.parametrize("what", ["dense", "knorm(budget=0.5)"])
def test_what_is_timed_as_recorded_is_replayed(small, replays, what):
    options = {"lengths": [200], "scores": False, "decode": 0.01, "tasks": ["passkey"]}
    contestants = [] if what == "dense" else [what]
    evaluate(contestants, small, **options)
    assert not replays
    times = evaluate(contestants, small, recorded=True, **options).times
    assert [(time.what, time.recorded) for time in times] == [(one, True) for one in ["dense", *contestants]]
    # On both sides all but the first token, which comes from the prompt, and the one after it.
    assert len(replays) == 2 * sum(WARM - 1 + time.pairs for time in times)
