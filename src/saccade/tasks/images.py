"""Small images to tell apart: written digits, and crops of photographs, which photograph and which quarter of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import positive

OWN = Path(__file__).parents[1] / "bench" / "photo.jpg"
CELL = 64  # pixels a side of the cells that training and test share out


@dataclass(frozen=True)
class Images:
    """A task. x, test_x (B, channels, Y, X) float32, of mean 0 and variance 1 a channel over the training images;
    y, test_y (B,) int64, below `classes`.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])

    def to(self, device: str | torch.device) -> Images:
        names = ("x", "y", "test_x", "test_y")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def digits(*, seed: int = 0) -> Images:
    """The 1797 written digits of 8 x 8 pixels that come with scikit-learn, a fifth of them held out. seed: 0.

    >>> digits().x.shape
    torch.Size([1438, 1, 8, 8])
    """
    found = _sklearn().load_digits()
    x, y = torch.from_numpy(found.images).float()[:, None], torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(positive("seed", seed, least=0)))
    held = len(x) // 5
    test, train = order[:held], order[held:]
    return _standard(x[train], y[train], x[test], y[test], 10)


def quarters(*, count: int = 8192, held: int = 2048, size: int = 32, seed: int = 0) -> Images:
    """Crops of three photographs, two of scikit-learn and one of this package: 12 classes, a quarter of one each.

    Every quarter is cut into cells of 64 x 64 pixels, from its corner on. Cells whose row and column add up to 3 more
    than a multiple of 4 are held out, and every crop lies in one cell: no pixel is in training and in test.
    count: training images (default 8192). held: test images (2048). size: pixels a side (32). seed: 0.
    Errors: ValueError when size is larger than a cell.

    >>> quarters(count=5, held=3).test_x.shape
    torch.Size([3, 3, 32, 32])
    """
    if positive("size", size) > CELL:
        raise ValueError(f"size: got {size}; a crop lies in a cell of {CELL} pixels, so pass at most that")
    generator = torch.Generator().manual_seed(positive("seed", seed, least=0))
    train, test = [], []
    for photo in photographs():
        for quarter in _quarters(photo):
            cells = _cells(quarter)
            train.append(torch.stack([cell for place, cell in cells if sum(place) % 4 != 3]))
            test.append(torch.stack([cell for place, cell in cells if sum(place) % 4 == 3]))
    parts = [
        _crops(cells, positive(name, number), size, generator)
        for name, number, cells in (("count", count, train), ("held", held, test))
    ]
    (x, y), (test_x, test_y) = parts
    return _standard(x, y, test_x, test_y, len(train))


def photographs() -> list[Tensor]:
    """Three photographs, uint8 (3, Y, X)."""
    import numpy as np
    from PIL import Image

    with Image.open(OWN) as image:
        own = np.array(image.convert("RGB"))
    return [
        torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in (*_sklearn().load_sample_images().images, own)
    ]


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("scikit-learn, which brings the images, is missing: pip install 'saccade[dev]'") from error
    return datasets


def _quarters(photo: Tensor) -> list[Tensor]:
    """Upper left, upper right, lower left, lower right; an odd middle line is left out."""
    y, x = photo.shape[1] // 2, photo.shape[2] // 2
    return [photo[:, rows, columns] for rows in (slice(y), slice(-y, None)) for columns in (slice(x), slice(-x, None))]


def _cells(quarter: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """((row, column), pixels (3, CELL, CELL)) of the whole cells."""
    rows, columns = quarter.shape[1] // CELL, quarter.shape[2] // CELL
    return [
        ((i, j), quarter[:, i * CELL : (i + 1) * CELL, j * CELL : (j + 1) * CELL])
        for i in range(rows)
        for j in range(columns)
    ]


def _crops(cells: list[Tensor], count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` crops at random places of random cells, as many of every class as any other but one."""
    labels, crops = torch.arange(count) % len(cells), []
    for label in labels.tolist():
        here = cells[label]
        cell = here[int(torch.randint(len(here), (), generator=generator))]
        y, x = torch.randint(CELL - size + 1, (2,), generator=generator).tolist()
        crops.append(cell[:, y : y + size, x : x + size])
    return torch.stack(crops).float(), labels


def _standard(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> Images:
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Images((x - mean) / std, y, (test_x - mean) / std, test_y, classes)
