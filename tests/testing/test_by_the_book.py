"""What oracles and claims share: rotary positions by matrices, differences, and samples that come again."""

import math

import pytest
import torch
from torch import nn

from saccade import mix
from saccade.contract import apart, rotated, sample
from saccade.testing import assert_close, compare
from saccade.testing.gradients import differentiate

THETA = 30.0


def by_matrices(x, at):
    """Every token by a matrix of its own, made of plane rotations."""
    d, rows = x.shape[-1], []
    for n, place in enumerate(at.expand(x.shape[:-1]).flatten().tolist()):
        matrix = torch.zeros(d, d, dtype=torch.float64)
        for i in range(d // 2):
            angle, j = place * THETA ** (-2 * i / d), i + d // 2
            matrix[i, i] = matrix[j, j] = math.cos(angle)
            matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
        rows.append(matrix.to(x) @ x.reshape(-1, d)[n])
    return torch.stack(rows).view(x.shape)


PLACES = [torch.arange(5), torch.tensor(-3), torch.tensor([4, 1, 0, 7, -2]), torch.arange(10).view(2, 1, 5)]


@pytest.mark.parametrize("at", PLACES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotary_positions_are_plane_rotations(at, dtype):
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth, eager = by_matrices(x.double(), at), by_matrices(x, at)
    found = rotated(x, at, THETA)
    assert found.dtype == dtype
    assert_close(found, truth, eager, terms=2)
    assert_close(mix.turn_at(x, at, THETA), truth, eager, terms=2)


@pytest.mark.parametrize("turn", [rotated, mix.turn_at])
def test_their_gradients_are_those_of_the_rotations(turn):
    x, weight = torch.randn(2, 2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found, truth) = (
        differentiate(lambda x, each=each: each(x, PLACES[0]), [x], ["x"], nn.Identity(), weight)["x"]
        for each in (lambda x, at: turn(x, at, THETA), by_matrices)
    )
    assert_close(found, truth, truth, terms=2)


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, at: rotated(x, -at, THETA),
        lambda x, at: rotated(x, at, THETA**2),
        lambda x, at: rotated(x.unflatten(-1, (-1, 2)).mT.flatten(-2), at, THETA),  # pairs of neighbours
    ],
)
def test_other_rotations_are_noticed(broken):
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    truth = by_matrices(x, PLACES[0])
    assert not compare(broken(x, PLACES[0]), truth, truth, terms=2).ok


def test_places_in_a_row_are_counted_from_the_first():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert torch.equal(mix.turn_at(x, 7, THETA), mix.turn_at(x, torch.arange(7, 12), THETA))
    part = mix.turn_at(x, 7, THETA, channels=4)
    assert torch.equal(part, torch.cat([mix.turn_at(x[..., :4], 7, THETA), x[..., 4:]], -1))


def test_how_far_a_result_is_off_is_a_part_of_the_largest_number():
    exact = torch.tensor([[1.0, -8.0], [2.0, 4.0]])
    assert apart(exact, exact) == 0
    assert apart(exact + torch.tensor([[0.0, 0.0], [-2.0, 1.0]]), exact) == 0.25
    assert apart(2 * exact, exact) != apart(exact, 2 * exact)
    assert math.isnan(apart(exact * torch.nan, exact))  # which is below no threshold


def test_samples_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    (one, x), (two, y) = (sample(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout()), 2, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, y)
    assert torch.equal(one(x), two(y))
    assert x.dtype == one[0].weight.dtype == torch.float64
    assert not any(p.requires_grad for p in one.parameters())
    assert one(x).std() > 0
