"""The comparison: the gate comes first, every failure is a record with its status, the budget holds."""

from dataclasses import replace

import pytest
import torch
import toys

from saccade.bench import compare as module
from saccade.bench.compare import Cost, compare
from saccade.bench.guard import Failed
from saccade.bench.inputs import Synthetic
from saccade.bench.records import Record, Status
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
    (record,) = run(toys.Chaotic, lengths=[256]).records
    assert record.status == Status.WRONG
    assert "its equations, run in torch.float32, are themselves off by" in record.message


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


@pytest.mark.parametrize("status", [s for s in Status if s != Status.OK])
def test_records_refuse_times_that_are_not_ok(status):
    timed = Record("a", "A", "f", "Attention", 2020, Status.OK, seconds=1.0, speedup=2.0)
    with pytest.raises(ValueError, match=f"seconds: got a time for a, which is {status}; only OK records are timed"):
        replace(timed, status=status)
    with pytest.raises(ValueError, match="only OK records are timed"):
        Record("a", "A", "f", "Attention", 2020, status, speedup=2.0)
