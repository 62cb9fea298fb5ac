"""What tuning measures with: samples of text, the loss of a language model on them, its attention replaced."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.bench.contestant import Configured
from saccade.contract import Dims, Mechanism
from saccade.hosts.lm import LM, AttentionCall

Progress = Callable[[int, int, str], None]


class Sample(NamedTuple):
    """tokens (1, N), of which those from `first` on are to be predicted."""

    tokens: Tensor
    first: int


def passages(length: int, count: int, *, held_out: bool, seed: int = 0) -> list[Sample]:
    """Plain text, every byte to be predicted. held_out: text that the model was not trained on."""
    text = text_of(held_out)
    starts = np.random.default_rng([seed, length]).integers(0, len(text) - length, count).tolist()
    return [Sample(_tokens(text[at : at + length]), 1) for at in starts]


def samples(length: int, count: int, *, held_out: bool, seed: int = 0) -> list[Sample]:
    """`passages`, and codes to be found in such text, the answer alone to be predicted, in turns.

    Answers from far back are what shows which heads look there.
    """
    from saccade.tasks.retrieval import samples as planted

    found = planted("multi_key", length, count, seed=seed, text=text_of(held_out))
    answers = [Sample(_tokens(one.tokens), one.answer[0]) for one in found]
    pairs = zip(passages(length, count, held_out=held_out, seed=seed), answers, strict=True)
    return [one for pair in pairs for one in pair][:count]


def text_of(held_out: bool) -> bytes:
    """The text that samples are cut from."""
    from saccade.tasks.text import held_out_text, python_text

    return held_out_text() if held_out else python_text()


def _tokens(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))[None]


def loss(model: LM, sample: Sample) -> Tensor:
    """Mean cross-entropy, in nats, of the bytes to be predicted."""
    tokens = sample.tokens.to(model.embed_tokens.weight.device)
    logits = model(tokens)[:, sample.first - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, sample.first :].flatten())


def measured(model: LM, attention: AttentionCall, group: Sequence[Sample]) -> float:
    """The mean loss of `group` with another attention in the model."""
    before, model.attention = model.attention, attention
    try:
        with torch.no_grad():
            return statistics.fmean(float(loss(model, one)) for one in group)
    finally:
        model.attention = before


def layered(contestant: Configured, dims: Dims) -> AttentionCall:
    """The mechanisms of a whole model as its attention."""
    return in_layers([contestant.build(dims, layer) for layer in range(len(contestant.layers))])


def in_layers(modules: Sequence[Mechanism]) -> AttentionCall:
    """One mechanism a layer as the attention of a model."""
    return lambda q, k, v, layer: modules[layer](q, k, v)


def dims_of(model: LM) -> Dims:
    """The dims of a model's attention."""
    return Dims(model.config.num_heads, model.config.head_dim, model.config.num_kv_heads)


class Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, -1, progress or (lambda *_: None)

    def next(self, text: str) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total, text)
