"""`waits` notes where the host waited, and leaves everything as it was; the GPU itself is played by the test."""

import warnings

import pytest
import torch

from saccade.testing import device, healthy


@pytest.fixture
def modes(monkeypatch):
    """The modes that were set, from 0 on."""
    found = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: found[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    return found


def wait(*_):
    warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)


def test_every_wait_is_noted_with_its_line(modes, monkeypatch):
    monkeypatch.setattr(healthy, "check_cu_seqlens", wait)
    layer, x = healthy.Decayed(healthy.Dims(2, 4)), torch.randn(1, 5, 8)
    with device.waits() as found:
        assert modes == [0, "warn"]
        wait()
        for _ in range(2):
            with pytest.raises(TypeError):  # a test's check returns no ends
                layer(x, cu_seqlens=torch.tensor([0, 5]))
    assert len(found) == 3
    assert found[0].startswith("test_waits.py:")
    assert all(line.startswith("healthy.py:") and "check_cu_seqlens" in line for line in found[1:])
    assert modes == [0, "warn", 0]


def test_other_warnings_are_no_waits(modes):
    with device.waits() as found:
        warnings.warn("synchronization debug mode is a prototype", UserWarning, stacklevel=1)
    assert found == []
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", UserWarning, stacklevel=1)


def test_the_mode_is_put_back_after_an_error(modes):
    with pytest.raises(ValueError, match="broken"), device.waits():
        raise ValueError("broken")
    assert modes == [0, "warn", 0]
