"""The plain answers themselves, against torch's own attention and by hand; the budget; the randomised parameters."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from saccade.contract import Case, Dims
from saccade.testing import assert_close, compare, dense_attention, randomise
from saccade.testing.ambient import isolated, poisoned, restore, settings
from saccade.testing.healthy import Decayed, Sliding
from saccade.testing.rounding import EPS_RATIO, RUNS, cast, nudge
from saccade.testing.subject import Subject, widen
from saccade.testing.work import Largest, stretched


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_is_torchs(causal):
    q, k, v = draw(2, 4, 13, 8), draw(2, 2, 13, 8), draw(2, 2, 13, 5)
    truth = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    single = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=True)
    assert_close(dense_attention(q, k, v, causal=causal), truth, widen(truth, single), terms=13)


def test_dense_attention_counts_queries_from_the_end():
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 7, 4), draw(1, 1, 7, 4)
    whole = torch.cat([draw(1, 1, 4, 4), q], 2)
    assert torch.equal(dense_attention(q, k, v, causal=True), dense_attention(whole, k, v, causal=True)[:, :, 4:])


def test_a_row_that_sees_nothing_gives_zeros():
    x = draw(1, 2, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    out = dense_attention(x, x, x, mask=mask)
    assert not out[:, :, 0].any()
    assert torch.equal(out[:, :, 1], x[:, :, 0])


def test_the_budget_is_set_by_the_eager_error():
    truth = torch.tensor([1.0, 100.0], dtype=torch.float64)
    eager = truth + torch.tensor([0.0, 0.5])
    assert compare(truth + torch.tensor([0.0, 0.9]), truth, eager).ok
    assert not compare(truth + torch.tensor([0.0, 1.1]), truth, eager).ok
    assert not compare(truth + 0.9, truth, eager).ok, "the root mean square has a budget of its own"
    with pytest.raises(AssertionError, match=r"here: max error 1\.100e\+00 \(allowed 1\.000e\+00\) at \(1,\)"):
        assert_close(truth + torch.tensor([0.0, 1.1]), truth, eager, name="here")


def test_the_band_covers_cancelled_sums():
    truth = torch.zeros(3, dtype=torch.float64)
    residue = truth + torch.finfo(torch.float64).eps
    assert not compare(residue, truth, truth).ok
    assert compare(residue, truth, truth, scale=1.0).ok
    assert not compare(residue, truth, truth, scale=0.1).ok


def test_nan_and_infinity_must_stand_where_they_should():
    truth = torch.tensor([1.0, torch.nan, -torch.inf], dtype=torch.float64)
    assert compare(truth.clone(), truth, truth.clone()).ok
    for place, value in ((0, torch.nan), (1, 0.0), (2, torch.inf)):
        wrong = truth.clone()
        wrong[place] = value
        assert not compare(wrong, truth, truth).ok
    with pytest.raises(ValueError, match="shapes differ"):
        compare(truth[:2], truth, truth)


def test_no_parameter_keeps_a_special_value():
    class Special(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm: Any = nn.BatchNorm1d(6)
            self.zero = nn.Parameter(torch.zeros(40, 30))
            self.layer_scale = nn.Parameter(torch.full((6,), 1e-6))
            self.linear = nn.Linear(6, 6)
            self.phase = nn.Parameter(torch.zeros(6, dtype=torch.complex64))
            self.scalar = nn.Parameter(torch.ones(()))

    before, after = Special(), Special()
    after.load_state_dict(before.state_dict())
    randomise(after, 3)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert (old != new).all(), name
        assert new.abs().max() < 3, name
    assert (after.norm.running_mean != 0).all()
    assert (after.norm.running_var > 0).all()
    assert (after.norm.running_var != 1).all()
    again = Special().requires_grad_(False)
    assert randomise(again, 3) is again
    assert torch.equal(again.norm.weight, after.norm.weight)


def test_a_cast_copies_and_keeps_complex_and_integers():
    module = Decayed(Sliding.cases()[0].dims)
    module.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
    module.register_buffer("count", torch.ones(2, dtype=torch.int64))
    double = cast(module, torch.float64)
    assert (double.decay.dtype, double.wave.dtype, double.count.dtype) == (torch.float64, torch.complex128, torch.int64)
    assert module.decay.dtype == torch.float32


def test_a_subject_shows_every_dtype_the_same_numbers():
    subject = Subject(Decayed, Decayed.cases()[0])
    assert torch.equal(subject.inputs()[0].float(), subject.inputs(torch.float32)[0])
    double, single = (module.get_parameter("decay") for module in (subject.module, subject.build(torch.float32)))
    assert torch.equal(double.float(), single)
    for beside in subject.output().beside("output"):
        off = (beside - subject.truth).abs().max()
        assert 0 < off < subject.truth.abs().max() * EPS_RATIO


def test_eager_runs_differ_by_rounding_alone():
    subject = Subject(Decayed, Decayed.cases()[0])
    eager = subject.output(torch.float32)
    runs = [beside - subject.truth for beside in eager.beside("output")]
    plain = subject.build(torch.float32).oracle(*subject.inputs(torch.float32)).detach()
    torch.testing.assert_close(runs[0], plain.double() - subject.truth)
    assert len(runs) == RUNS
    assert not any(torch.equal(runs[0], other) for other in runs[1:])
    # The neighbour's own answer is further away than what rounding loses: it was not compared with the given one's.
    size, eps = float(subject.truth.abs().max()), torch.finfo(torch.float32).eps
    assert all(float(run.abs().max()) < 2 * eps * size for run in runs)
    again = [beside - subject.truth for beside in subject.output(torch.float32).beside("output")]
    assert all(map(torch.equal, runs, again))


def test_runs_are_made_as_long_as_they_are_needed():
    asked = []

    def runs(truth):
        for off in (0.0, 0.5, 0.2):
            asked.append(off)
            yield truth + off

    truth = torch.ones(4, dtype=torch.float64)
    assert compare(truth.clone(), truth, runs(truth)).ok
    assert asked == [0.0]
    asked.clear()
    assert compare(truth + 0.9, truth, runs(truth)).ok
    assert asked == [0.0, 0.5]
    asked.clear()
    verdict = compare(truth + 1.1, truth, runs(truth))
    assert not verdict.ok
    assert verdict.allowed == pytest.approx(1.0)
    assert asked == [0.0, 0.5, 0.2]


def test_a_nudge_is_a_last_bit():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        x = torch.randn(1000, dtype=dtype)
        moved = nudge(x, generator)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        step = (moved.to(wide) / x.to(wide) - 1).abs() / torch.finfo(dtype).eps
        assert moved.dtype == dtype
        assert float(step[step > 0.1].min()) >= 0.49
        assert float(step.max()) < 2.1
        assert 200 < int((step <= 0.1).sum()) < 500
        assert not nudge(torch.zeros(3, dtype=dtype), generator).any()


def test_stretched_cases_keep_their_divisors():
    assert stretched(Subject(Sliding, Sliding.cases()[0]), 1024).case.length == 23 * 45
    grid = stretched(Subject(Sliding, Case(Dims(2, 8, grid=(2, 6, 5)), 60)), 1024).case.dims.grid or ()
    assert all(large % small == 0 for large, small in zip(grid, (2, 6, 5), strict=True))
    assert 1024 <= torch.Size(grid).numel() < 2048


def test_the_largest_tensor_is_what_memory_holds():
    x = torch.randn(7, 1)
    with Largest() as largest:
        x.expand(7, 1000)
    assert largest.entries == 7
    with Largest() as largest:
        (x + torch.zeros(50)).sum()
    assert largest.entries == 350


def test_settings_are_restored_and_poison_is_lifted():
    before = settings()
    with isolated():
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
    assert settings() == before
    torch.set_default_dtype(torch.float64)
    assert restore(before) == ["default dtype from torch.float32 to torch.float64"]
    with poisoned():
        assert torch.empty(4).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert settings() == before
