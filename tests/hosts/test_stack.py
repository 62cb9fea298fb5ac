"""The stack: any mixers in any order, causal, token by token as a whole; parameters counted by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from saccade import mechanism
from saccade.contract import Dims
from saccade.hosts.block import AttentionMixer, num_parameters
from saccade.hosts.stack import PreNorm, Stack, SwiGLU, interleave

DIMS = Dims(2, 4)


class Sum(nn.Module):
    """The mean of what came, which no parameter touches."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def step(self, x, state=None):
        total, count = (x, 1) if state is None else (state[0] + x, state[1] + 1)
        return total / count, (total, count)


def gla(dims, layer):
    return mechanism("gla")(dims, gate_rank=2, chunk=5)


def softmax(dims, layer):
    return mechanism("minimax_m1")(dims, layer=layer, num_layers=9, every=layer + 1)


def rat(dims, layer):
    return mechanism("rat")(dims, chunk=3)


def layer_sum(dims, layer):
    return Sum()


def test_interleave_repeats_its_turn_and_may_break_off():
    assert interleave(6, (2, gla), (1, softmax)) == [gla, gla, softmax, gla, gla, softmax]
    assert interleave(2, (1, rat), (3, gla)) == [rat, gla]
    with pytest.raises(ValueError, match="kinds: got none; pass at least one"):
        interleave(3)
    with pytest.raises(ValueError, match="kinds: got 0; pass an integer >= 1"):
        interleave(3, (0, gla))
    with pytest.raises(ValueError, match="depth: got 0; pass an integer >= 1"):
        interleave(0, (1, gla))


@pytest.mark.parametrize("block", [PreNorm, partial(PreNorm, mlp=partial(SwiGLU, hidden=11), norm=nn.LayerNorm)])
def test_it_is_causal_and_decodes_what_it_gives_as_a_whole(block):
    model = Stack(DIMS, interleave(4, (1, gla), (1, rat), (1, softmax)), vocab_size=17, block=block).double()
    tokens = torch.randint(17, (2, 11))
    logits = model(tokens)
    assert logits.shape == (2, 11, 17)
    assert len(model.blocks) == 4
    rows, state = [], None
    for token in tokens.split(1, 1):
        row, state = model.step(token, state=state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), logits)
    assert len(state) == 4
    other = torch.cat([tokens[:, :6], (tokens[:, 6:] + 1) % 17], 1)
    changed = model(other)
    assert torch.equal(changed[:, :6], logits[:, :6])
    assert not torch.isclose(changed[:, 6:], logits[:, 6:]).all(-1).any()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_generate_takes_the_likeliest_token_again_and_again():
    model, tokens = Stack(DIMS, [gla, softmax], vocab_size=13).double(), torch.randint(13, (2, 5))
    new = model.generate(tokens, 4)
    assert new.shape == (2, 4)
    for i in range(4):
        whole = model(torch.cat([tokens, new[:, :i]], 1))
        assert torch.equal(whole[:, -1].argmax(-1), new[:, i])


def test_parameters_counted_by_hand():
    mlp = 8 * 32 + 32 + 32 * 8 + 8
    rest = 256 * 8 + 8  # the embedding, which is the head too, and the last norm
    assert num_parameters(lambda: Stack(DIMS, [layer_sum] * 3)) == 3 * (8 + 8 + mlp) + rest
    block = partial(PreNorm, mlp=partial(SwiGLU, hidden=5))
    assert num_parameters(lambda: Stack(DIMS, [layer_sum], vocab_size=10, block=block)) == 16 + 3 * 40 + 10 * 8 + 8


def test_factories_are_told_the_heads_and_the_layer():
    told = []

    def note(dims, layer):
        told.append((dims, layer))
        return Sum()

    Stack(DIMS, [note, layer_sum, note])
    assert told == [(DIMS, 0), (DIMS, 2)]


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(ValueError, match="layers: got none; pass at least one factory"):
        Stack(DIMS, [])
    with pytest.raises(ValueError, match=r"dims.grid: got \(4,\); tokens of a language are a sequence"):
        Stack(Dims(2, 4, grid=(4,)), [gla])
    ahead = mechanism("efficient_attention")
    with pytest.raises(ValueError, match=r"layers\[1\]: made EfficientAttention, which is not causal"):
        Stack(DIMS, [gla, lambda dims, layer: AttentionMixer(ahead(dims))])
    model = Stack(DIMS, [gla, lambda dims, layer: nn.Linear(8, 8)])
    with pytest.raises(TypeError, match=r"layers\[1\]: Linear has no step, so that it cannot decode"):
        model.step(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens: got 2 at once; `step` takes them one by one"):
        model.step(torch.zeros(1, 2, dtype=torch.int64))
    for tokens in (torch.zeros(1, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"tokens: got .* pass int64 \(B, N\) with N >= 1"):
            model(tokens)
