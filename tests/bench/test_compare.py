"""The comparison: the gate comes first, every failure is a record with its status, the budget holds."""

import re
import time
from dataclasses import replace

import pytest
import torch
import toys

from saccade.bench import compare as module
from saccade.bench import report
from saccade.bench.compare import Cost, compare
from saccade.bench.guard import Failed
from saccade.bench.inputs import Synthetic
from saccade.bench.records import Record, Status
from saccade.bench.summary import findings, groups, lines
from saccade.contract import Mechanism

SHAPE = (1, 4, 2, 1024, 16)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """One thread, and a clock to which every call takes a millisecond: no verdict hangs on the machine's other work."""

    def clock(calls):
        for call in calls:
            call()
        return [1e-3] * len(calls)

    monkeypatch.setattr(module.timing, "clock_for", lambda device: clock)
    monkeypatch.setattr(module.timing, "quiet_threads", lambda: 1)


def run(*classes, lengths=(256, 1024), budget=1000.0, **options):
    return compare(classes, [Synthetic(SHAPE)], lengths=lengths, budget=budget, **options)


def records(found, cls):
    return {r.length: r for r in found.records if r.mechanism == cls.spec.id}


def test_a_sound_mechanism_is_timed_at_every_length():
    found = run(toys.Local)
    own = records(found, toys.Local)
    assert [r.status for r in own.values()] == [Status.OK] * 2
    for n, r in own.items():
        assert (r.seconds, r.baseline_seconds, r.speedup, r.verdict) == (1e-3, 1e-3, 1.0, "same")
        assert r.pairs == 6
        assert r.numerical_error < 1e-5
        assert r.approximation_error > 1e-2
        assert r.density == pytest.approx((65 * 64 / 2 * (n // 64)) / (n * (n + 1) / 2))
        assert r.backend == "torch"
    dense = [r for r in found.records if r.mechanism == "dense"]
    assert [(r.length, r.approximation_error, r.density) for r in dense] == [(256, 0.0, 1.0), (1024, 0.0, 1.0)]
    assert "local" in found.drawings
    assert list(found.references) == [dense[0].place]


@pytest.mark.parametrize("cls", [toys.Wrong, toys.Flipped, toys.Crashes, toys.Blind])
def test_what_fails_its_check_is_never_called_again(cls, monkeypatch):
    lengths = []
    compute = cls.compute

    def watched(self, q, k, v):
        lengths.append(q.shape[2])
        return compute(self, q, k, v)

    monkeypatch.setattr(cls, "compute", watched)
    found = run(cls)
    (record,) = found.records
    assert record.status == Status.WRONG
    assert record.message
    assert record.seconds is None
    assert max(lengths) == 128  # the first piece of the gate
    assert not found.drawings


def test_wrong_far_from_the_gate_is_found_before_the_clock_starts():
    own = records(run(toys.Overflows), toys.Overflows)
    assert own[256].status == Status.OK
    assert own[1024].status == Status.WRONG
    assert "not finite at 1024" in own[1024].message


def test_unsupported():
    (record,) = run(toys.Declines).records
    assert (record.status, record.message) == (Status.UNSUPPORTED, "q: got float32; this toy wants something else")


def test_without_a_passed_gate_nothing_is_timed():
    class Late(toys.Wrong):
        """Declines all pieces that the gate offers, and is wrong beyond."""

        spec = toys.spec("late")

        def compute(self, q, k, v):
            if q.shape[2] <= 300:
                raise NotImplementedError("needs more than 300 tokens")
            return super().compute(q, k, v)

    (record,) = run(Late).records
    assert record.status == Status.UNSUPPORTED


def test_a_piece_too_small_for_the_mechanism_does_not_count_against_it():
    own = records(run(toys.Picky), toys.Picky)
    assert own[256].status == Status.OK
    assert own[256].gate_tokens == 256


def test_a_piece_too_long_for_the_equations_themselves_does_not_count_either(monkeypatch):
    monkeypatch.setattr(module, "GATE_TOKENS", (12, 100))
    own = records(run(toys.Chaotic, lengths=[256]), toys.Chaotic)
    assert own[256].status == Status.OK
    assert own[256].gate_tokens == 12
    monkeypatch.setattr(module, "GATE_TOKENS", (100,))


def test_what_its_own_equations_cannot_judge_is_measured_and_said_to_be_unproven(monkeypatch):
    monkeypatch.setattr(module, "GATE_TOKENS", (100,))
    found = run(toys.Chaotic, toys.Smooth, lengths=[256])
    record = records(found, toys.Chaotic)[256]
    assert (record.status, record.seconds, record.speedup) == (Status.UNPROVEN, 1e-3, 1.0)
    assert re.fullmatch(
        r"its equations, run in torch\.float32, are themselves off by \d+%: measured, not judged", record.message
    )
    (group,) = groups(found)
    assert group.mechanisms == ["smooth"]  # what is unproven leads nothing
    assert [line.record.mechanism for line in lines(found)] == ["smooth", "chaotic"]
    assert findings(found)[-1] == "UNPROVEN: chaotic."


def test_no_inputs_that_fit():
    (record,) = compare([toys.Near], [_Sequences(SHAPE)], lengths=[256], budget=9.0).records
    assert record.status == Status.UNSUPPORTED
    assert record.message == "needs a grid of 2 axes; none of the inputs (synthetic) is one"


class _Sequences(Synthetic):
    ranks = (0,)


def test_a_contract_without_a_dense_counterpart():
    class Other(Mechanism):
        spec = toys.spec("other")

    (record,) = run(Other).records
    assert record.status == Status.UNSUPPORTED
    assert "no dense counterpart" in record.message


def test_out_of_memory():
    own = records(run(toys.Hungry), toys.Hungry)
    assert [own[256].status, own[1024].status] == [Status.OK, Status.OOM]


def test_endless(monkeypatch):
    monkeypatch.setattr(module._Run, "_share", lambda self, length: 0.1)
    own = records(run(toys.Endless), toys.Endless)
    assert [own[256].status, own[1024].status] == [Status.OK, Status.TIMEOUT]
    assert own[1024].message == "stopped after 1.0 s"


class Compiling(toys.Local):
    """Compiles for a while when it is first called."""

    spec = toys.spec("compiling")
    ready = False

    def compute(self, q, k, v):
        if not Compiling.ready:
            time.sleep(0.7)
            Compiling.ready = True
        return super().compute(q, k, v)


def test_a_first_call_that_compiles_has_a_limit_of_its_own_and_no_share_of_the_budget(monkeypatch):
    monkeypatch.setattr(module, "GATE_SECONDS", 0.5)
    monkeypatch.setattr(module, "_compiles", lambda device: True)
    monkeypatch.setattr(module._Run, "_share", lambda self, length: 0.1)
    monkeypatch.setattr(Compiling, "ready", False)
    found = run(Compiling, budget=100.0)
    own = records(found, Compiling)
    assert [r.status for r in own.values()] == [Status.OK] * 2
    assert all(0.7 <= r.first_seconds < 10 for r in own.values())
    assert found.first_seconds >= 0.7
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(Compiling, "ready", False)
    monkeypatch.setattr(module, "GATE_SECONDS", 0.1)
    (record,) = run(Compiling, budget=0.1).records
    assert (record.status, record.seconds) == (Status.TIMEOUT, None)


def test_where_nothing_compiles_first_calls_are_the_budgets(monkeypatch):
    monkeypatch.setattr(Compiling, "ready", False)
    found = run(Compiling, lengths=[256])
    assert found.first_seconds == 0.0
    assert found.seconds >= 0.7
    assert records(found, Compiling)[256].first_seconds >= 0.7


def test_the_fastest_way_to_compute_the_baseline_is_chosen():
    def refuses():
        raise RuntimeError("No available kernel")

    def hungry():
        raise RuntimeError("CUDA out of memory")

    seconds = {"slow": 3.0, "quick": 1.0, "slower": 4.0}
    runner = module._Run([], [64], "cpu", torch.float32, None, 1.0, None)
    calls = {name: (lambda name=name: name) for name in seconds}
    runner.clock = lambda timed: [seconds[call()] for call in timed]
    assert runner._fastest({"refuses": refuses, **calls})[0] == "quick"
    assert runner._fastest({"refuses": refuses}) == (
        "refuses",
        refuses,
    )  # the only one: its error is told where it runs
    with pytest.raises(Failed, match="none of one, two runs"):
        runner._fastest({"one": refuses, "two": refuses})
    with pytest.raises(RuntimeError, match="out of memory"):
        runner._fastest({"one": hungry, "two": refuses})


def test_fell_back():
    own = records(run(toys.Chooses, backend="fast", lengths=[256]), toys.Chooses)
    assert (own[256].status, own[256].message) == (Status.FELL_BACK, "fast was asked for, slow ran")
    own = records(run(toys.Chooses, backend="quick", lengths=[256]), toys.Chooses)
    assert (own[256].status, own[256].backend) == (Status.OK, "quick")


def test_what_really_runs_is_seen():
    class Tiled(toys.Local):
        spec = toys.spec("tiled")

        def compute(self, q, k, v):
            from saccade import attend
            from saccade.where import Blocks, Causal

            return attend(q, k, v, Blocks(self.size) & Causal(), backend="tiles")

    own = records(run(Tiled, lengths=[256]), Tiled)
    assert own[256].backend == "tiles"
    assert run(Tiled, lengths=[256], backend="sdpa").records[-1].status == Status.FELL_BACK


def states(found, cls):
    return {n: (r.state_bytes, r.state_tokens, r.baseline_state_bytes) for n, r in records(found, cls).items()}


def test_what_is_kept_stands_beside_dense_attentions_cache():
    """Of a memory after the gate's first piece, of a policy at every length, in float32: 2 key heads of 16 channels."""
    found = run(toys.Running, toys.Hoards, toys.Recent, toys.Averaged)
    cache = {n: 2 * 2 * n * 16 * 4 for n in (128, 256, 1024)}
    memory = 2 * 16 * 4
    assert states(found, toys.Running) == dict.fromkeys((256, 1024), (memory, 128, cache[128]))
    assert states(found, toys.Recent) == {n: (cache[1024] * 96 // 1024, n, cache[n]) for n in (256, 1024)}
    assert set(states(found, toys.Averaged).values()) == {(None, None, None)}
    # The twin: the same numbers, from a state that grows.
    assert states(found, toys.Hoards)[256] == (128 * memory, 128, cache[128])
    dense = {r.length: r for r in found.records if (r.mechanism, r.causal) == ("dense", True)}
    assert {n: (r.state_bytes, r.state_tokens) for n, r in dense.items()} == {n: (cache[n], n) for n in (256, 1024)}
    assert {r.state_bytes for r in found.records if (r.mechanism, r.causal) == ("dense", False)} == {None}


def test_a_step_that_fails_leaves_the_state_unknown_and_says_why(monkeypatch):
    monkeypatch.setattr(module, "STATE_SECONDS", 0.1)
    found = run(toys.Stumbles, toys.Dawdles, toys.Refuses, lengths=[256], budget=1.0)
    said = {}
    for cls in (toys.Stumbles, toys.Dawdles, toys.Refuses):
        (record,) = records(found, cls).values()
        assert (record.status, record.state_bytes) == (Status.OK, None)
        said[cls.spec.id] = record.message
    assert said["stumbles"] == "its state is not known: crashed: KeyError: 'lost'"
    assert re.fullmatch(r"its state is not known: stopped after 0\.\d s", said["dawdles"])
    assert said["refuses"] == ""


def test_a_call_that_fails_on_the_clock_fails_alone():
    class Tired(toys.Local):
        """Fails at its fifth call at the length at which it is timed."""

        spec = toys.spec("tired")
        calls = 0

        def compute(self, q, k, v):
            if q.shape[2] == 1024:
                Tired.calls += 1
                if Tired.calls > 4:
                    raise RuntimeError("worn out")
            return super().compute(q, k, v)

    found = run(toys.Local, Tired, toys.Averaged)
    assert records(found, Tired)[1024].status == Status.WRONG
    assert "worn out" in records(found, Tired)[1024].message
    assert records(found, toys.Local)[1024].status == Status.OK
    assert records(found, toys.Averaged)[1024].status == Status.OK


def test_mixers_and_grids_have_their_own_baselines():
    found = run(toys.Smooth, toys.Near, lengths=[256])
    smooth, near = records(found, toys.Smooth)[256], records(found, toys.Near)[256]
    assert (smooth.place.baseline, near.place.baseline) == ("dense layer, causal", "dense attention, full")
    assert smooth.approximation_error is None
    assert near.shape == "B1 H4:2 N16x16 D16"
    assert {r.place for r in found.records if r.mechanism == "dense"} == {smooth.place, near.place}
    assert near.grid == 2
    assert found.drawings["near"].field.shape == (16, 16)


def test_two_lengths_that_make_one_grid_are_measured_once():
    found = run(toys.Near, lengths=[256, 257])
    assert [r.length for r in found.records if r.mechanism == "near"] == [256]


def test_what_does_not_fit_the_budget_is_said_to_have_been_dropped():
    own = records(run(toys.Local, budget=1e-3), toys.Local)
    assert [own[256].status, own[1024].status] == [Status.OK, Status.TIMEOUT]
    assert "its baseline did not run: a call took" in own[1024].message
    assert "does not fit its share of the budget" in own[1024].message


@pytest.mark.parametrize(
    ("costs", "most", "status"),
    [
        ([], 0.0, None),
        ([Cost(100, 1.0, 1)], 2.9, None),  # halfway between linear and quadratic as long as nothing is known
        ([Cost(100, 1.0, 1)], 2.8, Status.TIMEOUT),
        ([Cost(50, 0.5, 1), Cost(100, 1.0, 1)], 2.1, None),  # linear so far
        ([Cost(50, 0.5, 1), Cost(100, 1.0, 1)], 1.9, Status.TIMEOUT),
        ([Cost(50, 0.9, 1), Cost(100, 1.0, 1)], 1.9, Status.TIMEOUT),  # never taken to grow less than linearly
        ([Cost(100, 1.0, 2**62)], 10.0, Status.OOM),
    ],
)
def test_foreseen(costs, most, status):
    if status is None:
        module._foresee(costs, 200, most, "cpu")
        return
    with pytest.raises(Failed) as failure:
        module._foresee(costs, 200, most, "cpu")
    assert failure.value.status == status


def test_an_interrupt_keeps_what_was_measured():
    def progress(done, total, text):
        if "1024" in text:
            raise KeyboardInterrupt

    found = run(toys.Local, progress=progress)
    assert [r.status for r in records(found, toys.Local).values()] == [Status.OK]
    assert found.unmeasured == ()
    assert report.stopped(found) == "It was stopped before it was done. Without any figure: none."
    assert not report.stopped(run(toys.Local))


def test_an_interrupt_names_what_has_no_figure():
    def progress(done, total, text):
        if text.startswith("checking"):
            raise KeyboardInterrupt

    found = run(toys.Local, toys.Wrong, progress=progress)
    assert (found.records, found.unmeasured) == ((), ("local", "wrong"))


def test_progress_ends_full():
    seen = []
    run(toys.Local, toys.Wrong, lengths=[256], progress=lambda *told: seen.append(told))
    assert seen[-1] == (6, 6, "done")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "lengths: got none; pass at least one"),
        ({"lengths": [0]}, "lengths: got 0; pass an integer >= 1"),
        ({"budget": 0}, "budget: got 0; pass seconds > 0"),
        ({"budget": float("nan")}, "budget: got nan; pass seconds > 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        compare([toys.Local], [Synthetic(SHAPE)], **options)


def test_the_number_of_threads_is_as_before():
    before = torch.get_num_threads()
    run(toys.Local, lengths=[64])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("status", [s for s in Status if s not in (Status.OK, Status.UNPROVEN)])
def test_records_refuse_times_that_are_not_ok(status):
    timed = Record("a", "A", "f", "Attention", 2020, Status.OK, seconds=1.0, speedup=2.0)
    with pytest.raises(
        ValueError, match=f"seconds: got a time for a, which is {status}; only OK and UNPROVEN ones are"
    ):
        replace(timed, status=status)
    with pytest.raises(ValueError, match="only OK and UNPROVEN ones are timed"):
        Record("a", "A", "f", "Attention", 2020, status, speedup=2.0)
