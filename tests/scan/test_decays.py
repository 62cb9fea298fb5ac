"""Constant decays go where their module goes, and keep their digits."""

import pytest
import torch
from torch import nn

from saccade.contract import Dims
from saccade.mechanisms.linear.dijiang import DiJiang
from saccade.mechanisms.linear.lightning_attention import LightningAttention
from saccade.mechanisms.linear.lightning_attention2 import LightningAttention2
from saccade.mechanisms.linear.minimax_m1 import MiniMaxM1
from saccade.scan import decays


class Buffer(nn.Module):
    """Rounded with its module."""

    def __init__(self, log_decay):
        super().__init__()
        self.register_buffer("log_decay", log_decay)


class Left(nn.Module):
    """Stays where it was made."""

    def __init__(self, log_decay):
        super().__init__()
        self.log_decay = log_decay


def follows(made):
    """Whether decays of a module are on its device and as they were, after a cast to half precision and a move."""
    (held,) = (part for part in made.modules() if isinstance(getattr(part, "log_decay", None), torch.Tensor))
    before = held.log_decay.clone()
    kept = torch.equal(made.half() and held.log_decay, before) and held.log_decay.dtype == before.dtype
    made.to("meta")
    return kept and held.log_decay.is_meta


@pytest.mark.parametrize("cls", [DiJiang, LightningAttention, LightningAttention2, MiniMaxM1])
def test_decays_follow_their_module(cls):
    assert follows(cls(Dims(4, 8)))


def test_others_do_not():
    log_decay = decays.retention(4)
    assert follows(nn.Sequential(decays.Constant(log_decay)))
    for broken in (Buffer, Left):
        assert not follows(nn.Sequential(broken(log_decay)))
