"""Constants go where their module goes, and keep their digits."""

import pytest
import torch
from torch import nn

from saccade.contract import Dims
from saccade.hosts.constant import Constant
from saccade.mechanisms.linear.dijiang import DiJiang
from saccade.mechanisms.linear.lightning_attention import LightningAttention
from saccade.mechanisms.linear.lightning_attention2 import LightningAttention2
from saccade.mechanisms.linear.minimax_m1 import MiniMaxM1
from saccade.mechanisms.recurrent.dsf import DSF, Taylor
from saccade.mechanisms.spatial_window.hidiffusion import Hidiffusion
from saccade.scan import decays

HOLDERS = [(cls, Dims(4, 8), {}) for cls in (DiJiang, LightningAttention, LightningAttention2, MiniMaxM1)]
HOLDERS += [(DSF, Dims(2, 4), {"form": Taylor(2)}), (Hidiffusion, Dims(2, 4, grid=(5, 7)), {})]


class Buffer(nn.Module):
    """Rounded with its module."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)


class Left(nn.Module):
    """Stays where it was made."""

    def __init__(self, value):
        super().__init__()
        self.value = value


def follow(made):
    """Whether constants of a module are on its device and as they were, after a cast to half precision and a move."""
    held = [part for part in made.modules() if isinstance(getattr(part, "value", None), torch.Tensor)]
    before = [part.value.clone() for part in held]
    made.half()
    kept = [torch.equal(part.value, x) and part.value.dtype == x.dtype for part, x in zip(held, before, strict=True)]
    made.to("meta")
    return bool(held) and all(kept) and all(part.value.is_meta for part in held)


@pytest.mark.parametrize(("cls", "dims", "params"), HOLDERS, ids=lambda x: getattr(x, "__name__", None))
def test_constants_follow_their_module(cls, dims, params):
    made = cls(dims, **params)
    assert follow(made)
    assert not any(name.endswith("value") for name in made.state_dict())


def test_others_do_not():
    value = decays.retention(4)
    assert follow(nn.Sequential(Constant(value)))
    for broken in (Buffer, Left):
        assert not follow(nn.Sequential(broken(value)))
