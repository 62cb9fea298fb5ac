"""One thread: sizes here are small. The strategies of tests/where can be imported."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "where"))


@pytest.fixture(autouse=True)
def one_thread(hostile):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
