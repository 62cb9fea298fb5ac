"""The frontier: the Pareto set, what to use with so much memory, what was dropped, times in turns, and the page."""

import random
import re
from dataclasses import replace

import pytest
import torch
from test_report import Page

from saccade.bench import eval_reader, frontier
from saccade.bench.eval import BUDGETS, Contestant, Evaluation, at_budgets, evaluate
from saccade.bench.eval_reader import Reader, agnostic, aware, beside, decoding, found_once
from saccade.bench.eval_records import Cell, Protocol, Time, read_rows
from saccade.bench.frontier import focus, markdown, page, pareto, sections, sentences, verdict
from saccade.bench.records import Status, environment
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Attention
from saccade.hf import apply
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import Bytes, task_named

SMALL = LMConfig(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=32, max_length=512)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Reader(LM(SMALL).to_llama(), Bytes(), "small")


# The Pareto set.


def by_definition(points):
    def beats(one, two):
        return one[0] <= two[0] and one[1] >= two[1] and one[:2] != two[:2]

    return sorted(point[2] for point in points if not any(beats(other, point) for other in points))


def drawn():
    rng = random.Random(0)
    for _ in range(300):
        yield [(rng.randint(0, 5) / 5, rng.randint(0, 5) / 5, at) for at in range(rng.randint(0, 9))]


def test_the_pareto_set_is_the_definition():
    assert all(sorted(pareto(points)) == by_definition(points) for points in drawn())


def test_a_set_that_keeps_what_is_as_good_and_costs_more_is_noticed():
    def twin(points):
        found, best = [], float("-inf")
        for _, score, what in sorted(points, key=lambda one: (one[0], -one[1])):
            if score >= best:
                found.append(what)
                best = score
        return found

    assert any(sorted(twin(points)) != by_definition(points) for points in drawn())


# What to use.


TIMES = {}  # of the last cells of these names


def cell(what, task, scores, protocol=Protocol.AWARE, held=0.25, time=1.5, **changes):
    about = {
        "model": "m", "what": what, "task": task, "length": 1024, "protocol": protocol, "count": len(scores),
        "questions": 1, "seed": 0, "dtype": "float32", "scores": scores, "asked": len(scores), "seconds": 1.0,
        "cache_bytes": round(held * 1000), "dense_bytes": 1000,
    }  # fmt: skip
    TIMES[what] = Time("m", what, 1024, "float32", False, "cpu", 0.02 * time, 0.02, time)
    return Cell(**(about | changes))


def evaluation(*cells, **changes):
    dense = [
        cell("dense", task, (score,) * 4, Protocol.EITHER, 1.0, 1.01)
        for task, score in {"multi_key": 1.0, "passkey": 1.0, "tracing": 0.25}.items()
    ]
    times = tuple(TIMES[what] for what in dict.fromkeys(one.what for one in (*dense, *cells)))
    return Evaluation((*dense, *cells), environment() | {"load": 0.0}, **({"times": times} | changes))


def policy(name, budget, needles, passkey, **changes):
    what, held = f"{name}(budget={budget})", changes.pop("held", budget + 0.02)
    # What dense attention cannot do is done here, so that it would show in a mean.
    scores = {"multi_key": needles, "passkey": passkey, "tracing": (1.0,) * 4}
    return [cell(what, task, each, held=held, **changes) for task, each in scores.items()]


NONE, HALF, ALL = (0.0,) * 4, (1.0, 0.0) * 2, (1.0,) * 4


@pytest.fixture(scope="module")
def found():
    return evaluation(
        *policy("early", 0.25, NONE, ALL, answer_kept=0.125, question_kept=0.5),
        *policy("late", 0.25, NONE, HALF, answer_kept=0.25),
        *policy("early", 0.5, HALF, ALL, time=0.8),
        *policy("late", 0.5, ALL, ALL, time=1.2),
        *policy("reader", 0.25, ALL, ALL, held=1.1, time=0.5),
        *policy("late", 0.25, ALL, ALL, protocol=Protocol.AGNOSTIC),
        cell("half(budget=0.1)", "passkey", ALL, held=0.1),
        cell("odd", "passkey", (), status=Status.UNSUPPORTED, message="<b>no</b> such length"),
    )


def test_what_to_take_with_so_much_memory(found):
    aware_, agnostic_ = sections(found)
    assert (aware_.protocol, agnostic_.protocol) == (Protocol.AWARE, Protocol.AGNOSTIC)
    assert aware_.tasks == ["multi_key", "passkey"]
    assert [aware_.advice(share) for share in (0.1, 0.25, 0.5, 1.0)] == [
        "With 10 % of the memory take nothing: none fits.",
        "With 25 % of the memory take early 25 % (0.50, 50 points below dense; worst 0.00 on multi_key; holds 27 %).",
        "With 50 % of the memory take late 50 % (1.00, no points below dense; worst 1.00 on multi_key; holds 52 %).",
        "With 100 % of the memory take late 50 % (1.00, no points below dense; worst 1.00 on multi_key; holds 52 %).",
    ]
    assert verdict(found) == (
        "What to use at 1k tokens: Where the question is in the prompt, early 25 % (0.50, 50 points below dense) at "
        "25 %, late 50 % (1.00, no points below dense) at 50 %; within 2 points: late 50 % (52 % held). Where the "
        "question comes after the context was read, late 25 % (1.00, no points below dense) at 25 %; within 2 points: "
        "late 25 % (27 % held)."
    )
    longer = [replace(each, length=2048) for each in (*found.cells[:3], *policy("early", 0.25, HALF, HALF))]
    assert "at 1k tokens" in verdict(replace(found, cells=(*found.cells, *longer)))  # where there are more budgets
    longer += [replace(each, length=2048) for each in policy("early", 0.5, HALF, HALF)]
    assert "at 2k tokens" in verdict(replace(found, cells=(*found.cells, *longer)))


def test_budgets_at_which_one_takes_the_same_are_one_sentence():
    cells = [*policy("low", 0.05, NONE, NONE), *policy("mid", 0.1, HALF, HALF), *policy("top", 0.75, ALL, ALL)]
    cells += [each for budget in (0.25, 0.5, 1.0) for each in policy("low", budget, NONE, NONE)]
    (section,) = sections(evaluation(*cells))
    assert section.budgets == (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    assert sentences(section)[1:] == [
        "With 5 % of the memory take nothing: low 5 % scores 0.00.",
        "With 10 % to 50 % of the memory take mid 10 % (0.50, 50 points below dense; worst 0.50 on multi_key; holds 12 "
        "%).",
        "With 75 % to 100 % of the memory take top 75 % (1.00, no points below dense; worst 1.00 on multi_key; holds "
        "77 %).",
    ]
    assert verdict(evaluation(*cells)) == (
        "What to use at 1k tokens: Where the question is in the prompt, nothing at 5 %, mid 10 % (0.50, 50 points "
        "below dense) at 10 % to 50 %, top 75 % (1.00, no points below dense) at 75 % to 100 %; within 2 points: top "
        "75 % (77 % held)."
    )


def test_what_holds_as_much_as_dense_attention_must_be_faster():
    much = policy("much", 1.0, ALL, ALL, held=1.02)
    (section,) = sections(evaluation(*policy("much", 0.25, NONE, NONE), *much))
    assert section.advice(1.0) == "With 100 % of the memory take dense (1.00)."
    (section,) = sections(evaluation(*policy("much", 1.0, ALL, ALL, held=1.02, time=0.9)))
    assert [p.policy for p in section.within(1.0)] == ["dense", "much"]  # of equal ones the smaller first


def test_of_equal_means_the_one_with_the_better_worst_task_is_taken():
    even = policy("even", 0.25, HALF, HALF)
    (section,) = sections(evaluation(*policy("early", 0.25, NONE, ALL), *even))
    assert "take even 25 % (0.50, 50 points below dense; worst 0.50 on" in section.advice(0.25)
    (twin,) = sections(evaluation(*policy("early", 0.25, NONE, ALL), *even))
    assert max(twin.points[1:], key=lambda p: p.mean).policy == "early"  # by the mean alone it would be the first


def test_needles_that_are_lost_are_told_with_what_was_dropped(found):
    aware_, agnostic_ = sections(found)
    assert aware_.needles() == (
        "1 of 3 policies stay within 2 points of dense on multi_key at 25 %: reader 25 % (holds 110 %)."
    )
    assert aware_.losses() == [
        f"{name} 25 % loses 100 of 100 points on multi_key (holds 27 %): it keeps {kept} tokens."
        for name, kept in (
            ("early", "12.5 % of the answers' and 50 % of the questions'"),
            ("late", "25 % of the answers'"),
        )
    ]
    assert agnostic_.needles() == (
        "1 of 1 policies stay within 2 points of dense on multi_key at 25 %: late 25 % (holds 27 %)."
    )
    assert agnostic_.losses() == []


def test_who_keeps_all_tokens_has_dropped_none():
    (section,) = sections(evaluation(*policy("reads", 0.25, NONE, ALL, held=1.0, answer_kept=1.0, question_kept=1.0)))
    assert section.losses() == [
        "reads 25 % loses 100 of 100 points on multi_key (holds 100 %): it keeps all tokens, and reads too little of "
        "them."
    ]
    assert section.needles() == "None of 1 policies stays within 2 points of dense on multi_key at 25 %."


@pytest.mark.parametrize(("lost", "close"), [(0.02, True), (0.021, False)])
def test_two_points_are_close(lost, close):
    (section,) = sections(evaluation(*policy("near", 0.25, (1 - lost,) * 4, (1 - lost,) * 4)))
    assert (section.enough() is not None) == close
    assert section.needles().startswith("1 of 1" if close else "None of 1")
    assert len(section.losses()) == (not close)


def test_who_was_asked_for_needles_alone_is_counted_among_those_that_find_them():
    alone = cell("alone(budget=0.25)", "multi_key", HALF, answer_kept=1.0, held=0.6)
    (section,) = sections(evaluation(*policy("both", 0.25, ALL, ALL), *policy("other", 0.25, ALL, ALL), alone))
    assert "alone" not in {point.policy for point in section.points}
    assert section.needles().startswith("2 of 3 policies")
    assert section.losses() == [
        "alone 25 % loses 50 of 100 points on multi_key (holds 60 %): it keeps all tokens, in less memory."
    ]


def test_that_nothing_was_timed_is_said(found):
    plain = replace(found, times=())
    assert "Decoded tokens were not timed" in frontier.left(plain)
    assert "Decoded tokens were not timed" not in frontier.left(found)
    assert "decoded<br>token" in frontier.page(found)
    assert "decoded<br>token" not in frontier.page(plain)
    assert [panel.chart.title for panel in sections(plain)[0].panels({})] == [
        "Mean against memory held", "Worst task against memory held",
    ]  # fmt: skip


def test_what_was_scored_on_some_tasks_only_is_not_compared(found):
    assert not [p for section in sections(found) for p in section.points if p.policy == "half"]
    assert "Not shown at 1k, query-aware, since not scored on every task: half(budget=0.1)." in frontier.left(found)
    assert "3 measurements were left, by the budget or an interrupt" in frontier.left(replace(found, left=3))


def test_a_task_that_few_were_asked_is_in_no_mean():
    asked = policy("one", 0.25, ALL, ALL), policy("two", 0.25, NONE, ALL), policy("three", 0.25, NONE, ALL)
    cells = [each for own in asked for each in own]
    started = evaluation(*(each for each in cells if each.task != "multi_key" or each.what.startswith("one")))
    (section,) = sections(started)
    assert [(point.policy, point.mean) for point in section.points] == [
        ("dense", 1.0), ("one", 1.0), ("two", 1.0), ("three", 1.0),
    ]  # fmt: skip
    assert (
        frontier.left(started)
        == "In no mean, since asked of less than half of the contestants so far: multi_key at 1k."
    )
    half = evaluation(*(each for each in cells if each.task != "multi_key" or not each.what.startswith("three")))
    assert [point.policy for point in sections(half)[0].points] == ["dense", "one", "two"]
    assert frontier.left(half) == "Not shown at 1k, query-aware, since not scored on every task: three(budget=0.25)."


def test_times_of_recorded_steps_are_not_mixed_with_others():
    found = evaluation(*policy("one", 0.25, ALL, ALL, time=3.0), *policy("two", 0.25, ALL, ALL))
    both = replace(found, times=(*found.times, replace(TIMES["one(budget=0.25)"], recorded=True, over_dense=0.7)))
    assert {p.policy: p.time for p in sections(found)[0].points} == {"dense": 1.0, "one": 3.0, "two": 1.5}
    assert {p.policy: p.time for p in sections(both)[0].points} == {"dense": 1.0, "one": 0.7, "two": None}


def test_what_dense_attention_cannot_do_is_said(found):
    assert frontier.unable(found).startswith("Dense attention scores below 0.5 on tracing at 1k: ")
    assert all(cell.task != "tracing" for s in sections(found) for p in s.points for cell in p.cells)


def test_axes_and_sets(found):
    panels = sections(found)[0].panels({"early": 0, "late": 1, "reader": 2})
    assert [p.chart.title for p in panels] == [
        "Mean against memory held", "Worst task against memory held",
        "Mean against time of a decoded token", "Worst task against time of a decoded token",
    ]  # fmt: skip
    assert panels[0].front == "early 25 %: 0.50 at 27 %; late 50 %: 1.00 at 52 %"
    assert panels[2].front == "reader 25 %: 1.00 at 0.5×"
    chart = panels[0].chart
    # Equal differences are equal distances, from 0.
    assert chart.x.at(0.5) - chart.x.start == pytest.approx((chart.x.at(1.0) - chart.x.start) / 2, abs=0.1)
    assert chart.one == chart.x.at(1.0)
    assert chart.y.at(0.0) == chart.y.start
    early = next(s for s in chart.series if s.name == "early")
    assert early.marks == ((chart.x.at(0.27), chart.y.at(0.5)), (chart.x.at(0.52), chart.y.at(0.75)))
    assert early.joined


def test_of_many_policies_those_on_the_pareto_set_stand_out():
    many = [each for at in range(9) for each in policy(f"p{at}", 0.25, NONE, ALL, held=0.3 + 0.05 * at)]
    many += [each for at in range(9) for each in policy(f"p{at}", 0.5, NONE, ALL, held=0.8)]
    (section,) = sections(evaluation(*many))
    panel = section.panels({})[0]
    assert panel.faint == {f"p{at}" for at in range(1, 9)}
    assert {one.name for one in panel.chart.series if one.joined} == {"p0"}
    few = sections(evaluation(*(each for each in many if each.what[:2] < "p6")))[0].panels({})[0]
    assert not few.faint
    assert {one.name for one in few.chart.series if one.joined} == {f"p{at}" for at in range(6)}


def test_a_budget_is_taken_out_of_a_name_where_it_is_a_share():
    split = frontier._split
    assert split("snapkv(window=8, budget=0.5)") == ("snapkv(window=8)", 0.5)
    assert split("snapkv(budget=0.5)") == ("snapkv", 0.5)
    for what in ("snapkv(budget=64)", "all but the first", "dense", "moba(top_k=4)"):
        assert split(what) == (what, None)


@pytest.mark.parametrize(("budgets", "taken"), [(BUDGETS, 0.25), ([0.1, 0.2], 0.2), ([0.35, 0.5], 0.35), ([], 0.25)])
def test_the_quarter(budgets, taken):
    assert focus(budgets) == taken


# Contestants at budgets.


def test_all_policies_at_all_budgets():
    found = at_budgets(budgets=[0.5, 0.25])
    names = [one.name for one in found]
    assert names[0] == "adakv(budget=0.25)"
    kinds = {spec.id: mechanism(spec.id) for spec in mechanisms() if spec.family == "kv_cache"}
    held = {id for id, cls in kinds.items() if issubclass(cls, Attention)}
    assert {name.split("(")[0] for name in names} >= held
    assert len(held) > 9
    assert {"quest(budget=0.5)", "snapkv(budget=0.25)", "streaming_llm(budget=0.5)"} <= {*names}
    assert len(names) == len({*names})
    at_both = [name for name in names if "budget" in name]
    assert len(at_both) == 2 * sum("0.25" in name for name in names)
    assert [one.wave for one in found if "budget" in one.name] == [0] * (len(at_both) // 2) + [1] * (len(at_both) // 2)
    waves = at_budgets(["h2o"], BUDGETS)
    assert [one.name for one in waves] == [f"h2o(budget={share})" for share in (0.25, 0.1, 0.35, 0.5, 0.75, 1.0)]
    assert [one.name for one in at_budgets(["loki(budget=64)", "h2o"], [1.0])] == ["loki(budget=64)", "h2o(budget=1.0)"]


@pytest.mark.parametrize("budgets", [[], [0.0], [-0.5, 0.5], [1.5], [float("nan")]])
def test_budgets_refused(budgets):
    with pytest.raises(ValueError, match=r"budgets: got .*; pass shares in"):
        at_budgets(["h2o"], budgets)


def test_a_reader_is_a_contestant(small):
    with Contestant.parse("quest(budget=0.5)").enter(small.model) as handle:
        (found,) = aware(small, handle, task_named("passkey"), task_named("passkey").examples(200, 1))
    assert found.cache_bytes >= found.dense_bytes
    assert found.answers_kept == [1.0]


# What is kept.


def test_what_is_kept_of_an_answer_and_of_a_question(small):
    (example,) = task_named("passkey").examples(300, 1, seed=1)
    (question,) = example.questions
    code = question.answer[1:-1]
    at, size = found_once(list(code.encode()), example.context), len(example.context)
    for sinks, budget in ((at + 2, at + 12), (0, len(question.text) - 4)):
        contestant = Contestant.parse(f"streaming_llm(budget={budget}, sinks={sinks})")
        with contestant.enter(small.model) as handle:
            (later,) = agnostic(small, handle, task_named("passkey"), [example])
        with contestant.enter(small.model) as handle:
            (both,) = aware(small, handle, task_named("passkey"), [example])
        for found, seen in ((later, size), (both, size + len(question.text))):
            held = {*range(sinks), *range(seen - (budget - sinks), seen)}
            assert found.answers_kept == [sum(j in held for j in range(at, at + len(code))) / len(code)]
            asked = range(size, size + len(question.text))
            if found is both:
                assert found.questions_kept == [sum(j in held for j in asked) / len(question.text)]
        assert later.questions_kept == []
        assert 0 < later.cache_bytes < later.dense_bytes == size * 2 * 2 * 16 * 4


# Times.


def test_the_second_model_stays_dense_and_shares_its_weights(small):
    plain = beside(small)
    shared = {x.data_ptr() for x in plain.model.parameters()}
    assert shared == {x.data_ptr() for x in small.model.parameters()}
    before = plain.read(range(60))[0]
    with apply(small.model, "moba"):
        assert torch.equal(plain.read(range(60))[0], before)
        assert plain.model.config._attn_implementation != small.model.config._attn_implementation


def test_tokens_are_timed_in_turns_after_the_first_few(small, monkeypatch):
    called = []

    def clock(calls):
        called.append(len(calls))
        for call in calls:
            call()
        return [2.0, 3.0, 6.0, 4.0]  # dense, own, own, dense

    monkeypatch.setattr(eval_reader, "clock_for", lambda device: clock)
    plain, read = beside(small), {"own": [], "dense": []}

    def note(whose, reader):
        def hook(module, args, kwargs):
            read[whose].append(kwargs["input_ids"].shape[1])

        reader.model.register_forward_pre_hook(hook, with_kwargs=True)

    note("own", small), note("dense", plain)
    with Contestant.parse("h2o(budget=0.5)").enter(small.model):
        found = decoding(small, plain, list(range(80)), 1e9)
    assert found.function[:2] == (3.0, 6.0)
    assert found.baseline[:2] == (2.0, 4.0)
    assert read["own"] == read["dense"] == [80, *[1] * (eval_reader.WARM + 2 * len(called))]


OPTIONS = {"tasks": ["passkey"], "lengths": [200], "count": 1, "questions": 1}


def test_a_contestant_has_the_time_over_that_of_dense_attention(small, monkeypatch):
    def clock(calls):
        for call in calls:
            call()
        return [2.0, 3.0, 6.0, 4.0]

    monkeypatch.setattr(eval_reader, "clock_for", lambda device: clock)
    found = evaluate(["h2o(budget=0.5)"], small, decode=1e-9, **OPTIONS)
    assert [(t.what, t.length, t.seconds, t.dense_seconds, t.pairs) for t in found.times] == [
        (what, 200, 4.5, 3.0, 2) for what in ("dense", "h2o(budget=0.5)")
    ]
    assert all(time.over_dense == pytest.approx(1.5) for time in found.times)


def test_times_are_rows_of_their_own_and_measured_once(small, tmp_path):
    scored = evaluate(["h2o(budget=0.5)"], small, folder=tmp_path, **OPTIONS)
    assert scored.times == ()
    timed = evaluate(["h2o(budget=0.5)"], small, folder=tmp_path, scores=False, decode=1e-9, **OPTIONS)
    assert (timed.cells, len(timed.times)) == (scored.cells, 2)
    assert read_rows(tmp_path / "results.jsonl", Cell)[0] == list(scored.cells)
    assert read_rows(tmp_path / "times.jsonl", Time)[0] == list(timed.times)
    assert all(time.over_dense > 0 and time.seconds > 0 for time in timed.times)
    again = evaluate(["h2o(budget=0.5)"], small, folder=tmp_path, decode=1e-9, **OPTIONS)
    assert (again.cells, again.times) == (scored.cells, timed.times)
    assert len((tmp_path / "times.jsonl").read_text().splitlines()) == 2
    late = evaluate(["knorm"], small, folder=tmp_path, budget=1e-9, decode=1e-9, **OPTIONS)
    assert (len(late.cells), late.left) == (1, 2)


def test_what_cannot_be_timed_is_told(small):
    def broken(model):
        raise RuntimeError("no such luck")

    found = evaluate([Contestant("broken", broken)], small, scores=False, decode=1e-9, **OPTIONS)
    assert found.failed == ("broken: no time behind 200 tokens: WRONG: crashed: RuntimeError: no such luck",)
    assert found.failed[0] in frontier.remarks(found)


def test_a_prompt_at_the_longest_leaves_room_for_what_is_decoded(small):
    found = evaluate(["h2o(budget=0.5)"], small, decode=1e-9, **(OPTIONS | {"lengths": [512]}))
    assert [cell.status for cell in found.cells] == ["OK"] * 3
    assert len(found.times) == 2


# The page.


def test_the_page_is_whole_and_its_own(found):
    text = page(replace(found, left=2))
    read = Page(text)
    assert "script" not in read.tags
    loads = [v for _, name, v in read.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert loads == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert "{{" not in text
    assert "{%" not in text
    assert read.tags.count("desc") == text.count('role="img"') == 8
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert "&lt;b&gt;no&lt;/b&gt; such length" in text
    assert read.text.count(verdict(found)) == 2
    assert read.text.rstrip().endswith(verdict(found))
    for section in sections(found):
        assert all(sentence in read.text for sentence in sentences(section))
        assert all(f"Pareto set: {panel.front}." in read.text for panel in section.panels({}))
    assert "2 measurements were left" in read.text
    assert "tracing at 1k: the model cannot do it" in read.text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        assert "nan" not in drawing
        assert "None" not in drawing
    assert "prefers-color-scheme: dark" in text
    assert {"h0", "h1", "h2"} <= {*re.findall(r'class="series (h\d)"', text)}


def test_nothing_measured_is_a_page_too():
    text = page(Evaluation((), environment()))
    assert "svg" not in Page(text).tags
    assert "Nothing beside dense attention has a score." in text


def test_a_busy_machine_is_said_to_be(found):
    assert frontier.noise(found) == ("Times were taken in turns with dense attention, which against itself shows 1×.")
    loaded = replace(found, environment=found.environment | {"load": 5.0, "cores": 2})
    assert "Other programs were running (load 5.0 on 2 processors" in frontier.noise(loaded)


def test_markdown_says_the_same(found):
    text = markdown(found)
    assert "| late 50 % | 52 % | 1.2× | 1.00 | 1.00 | 1.00 | 1.00 | — | — |" in text
    assert "| what | held | decode | mean | worst | multi_key | passkey | answers | questions |" in text
    assert text.rstrip().endswith(verdict(found))
