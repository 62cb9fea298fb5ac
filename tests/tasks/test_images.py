"""Images to tell apart: digits, and crops whose training and test share no pixel."""

import pytest
import torch

from saccade.tasks import images
from saccade.tasks.images import Images, digits, photographs, quarters

SIZES = ((427, 640), (389, 401), (384, 384))


def places(size, photo):
    """A photograph (3, Y, X) int64 whose pixels say where they are: photograph, row, column."""
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    return torch.stack([torch.full_like(y, photo), y, x])


@pytest.fixture
def mapped(monkeypatch):
    """`quarters` of photographs of places, not standardised."""
    monkeypatch.setattr(images, "photographs", lambda: [places(size, i) for i, size in enumerate(SIZES)])
    monkeypatch.setattr(images, "_standard", Images)
    return quarters(count=600, held=600, size=20)


def pixels(crops):
    return {tuple(pixel) for pixel in crops.permute(0, 2, 3, 1).reshape(-1, 3).long().unique(dim=0).tolist()}


def shared(found):
    return len(pixels(found.x) & pixels(found.test_x))


def test_training_and_test_share_no_pixel(mapped):
    assert shared(mapped) == 0
    assert shared(Images(mapped.x, mapped.y, mapped.x[:9], mapped.y[:9], 12)) > 0
    moved = mapped.test_x + torch.tensor([0, 0, 5])[:, None, None]  # a crop that leaves its cell
    assert shared(Images(mapped.x, mapped.y, moved, mapped.test_y, 12)) > 0


def test_labels_name_the_photograph_and_the_quarter(mapped):
    for crops, labels in ((mapped.x, mapped.y), (mapped.test_x, mapped.test_y)):
        photo, row, column = crops.long().unbind(1)
        lower = row >= torch.tensor([size[0] / 2 for size in SIZES])[photo]
        right = column >= torch.tensor([size[1] / 2 for size in SIZES])[photo]
        truth = 4 * photo + 2 * lower + right
        assert truth.equal(labels[:, None, None].expand_as(truth))
        counts = labels.bincount()
        assert len(counts) == 12
        assert counts.tolist() == [50] * 12


def test_crops_are_pieces_of_the_photograph(mapped):
    _, row, column = mapped.x.unbind(1)
    assert (row.diff(dim=1) == 1).all()
    assert (column.diff(dim=2) == 1).all()
    assert len({tuple(each) for each in torch.stack([row[:, 0, 0], column[:, 0, 0]], 1).tolist()}) > 300


def test_photographs_are_three_and_in_colour():
    found = photographs()
    assert [photo.dtype for photo in found] == [torch.uint8] * 3
    assert [tuple(photo.shape) for photo in found] == [(3, 427, 640), (3, 427, 640), (3, 384, 384)]


@pytest.mark.parametrize("make", [digits, lambda seed=0: quarters(count=500, held=100, seed=seed)])
def test_images_are_standardised_and_seeded(make):
    one, again, other = make(), make(), make(seed=1)
    for mine, same in zip(
        (one.x, one.y, one.test_x, one.test_y), (again.x, again.y, again.test_x, again.test_y), strict=True
    ):
        assert mine.equal(same)
    assert not one.x.equal(other.x)
    assert one.x.dtype == torch.float32
    assert one.y.dtype == torch.int64
    rounding = len(one.x) ** 0.5 * torch.finfo(torch.float32).eps
    assert one.x.mean((0, 2, 3)).abs().max() < rounding
    assert (one.x.std((0, 2, 3)) - 1).abs().max() < rounding
    assert one.y.max() + 1 == one.classes
    assert one.size == tuple(one.test_x.shape[2:])


def test_digits_are_all_there_once():
    found = digits()
    assert (len(found.x), len(found.test_x), found.size, found.classes) == (1438, 359, (8, 8), 10)
    whole = torch.cat([found.x, found.test_x]).flatten(1)
    assert len(whole.unique(dim=0)) == 1797


def test_bad_input():
    with pytest.raises(ValueError, match="size: got 65; a crop lies in a cell of 64 pixels"):
        quarters(size=65)
    with pytest.raises(ValueError, match="held: got 0"):
        quarters(held=0)
