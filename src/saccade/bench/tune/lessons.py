"""What gates learn from and profiles are searched on: generated prompts, and what a model makes of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.bench.eval_reader import Reader, memory
from saccade.cache import Policy
from saccade.cache.view import usual
from saccade.hf import apply
from saccade.tasks.prompts import task_named

TASK = "multi_key"  # codes of seven digits for four words, in text
QUESTIONS = 4


class Prompt(NamedTuple):
    """tokens (1, N), and which of them are to be foretold, bool (N,)."""

    tokens: Tensor
    asked: Tensor


class Seen(NamedTuple):
    """What an attention is given: tokens (1, N) that are read, q (1, H, N, D), k, v (1, Hkv, N, D).

    asked: bool (N,), which tokens are to be foretold. q and k as attention meets them, the model's scale folded into q.
    """

    tokens: Tensor
    asked: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def foretelling(self) -> Tensor:
        """Positions whose queries foretell what is asked for, int64."""
        return before(self.asked)


def before(asked: Tensor) -> Tensor:
    """Positions from which the tokens are foretold that are asked for: one before each, int64.

    >>> before(torch.tensor([False, False, True, True, False])).tolist()
    [1, 2]
    """
    return asked.roll(-1).nonzero()[:, 0]


def prompts(
    reader: Reader, length: int, count: int, *, held_out: bool, seed: int = 0, questions: int = QUESTIONS
) -> list[Prompt]:
    """`count` texts with codes in them, and questions for these at the end, each with its answer, which is asked for.

    length: tokens up to the first answer, which others follow. held_out: set in text that is not for learning. The
    same seed gives the same ones; those that are held out share no seed with the others.
    """
    from saccade.tasks.text import held_out_text, python_text

    text = (held_out_text() if held_out else python_text()).decode("ascii", "ignore")
    encode, device, found = reader.tokenizer.encode, reader.model.device, []
    for one in task_named(TASK).examples(
        length, count, questions=questions, tokenizer=reader.tokenizer, seed=2 * seed + held_out, text=text
    ):
        tokens, asked = list(one.context), [False] * len(one.context)
        for question in one.questions:
            for part, is_answer in ((question.text, False), (question.answer, True)):
                new = encode(part)
                tokens, asked = tokens + new, asked + [is_answer] * len(new)
        found.append(Prompt(torch.tensor([tokens], device=device), torch.tensor(asked, device=device)))
    return found


class Watch(Policy):
    """Reads densely and remembers what each layer was given; for one pass."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        self.given.append((usual(q, scale), k, v))
        return super().attend(index, q, k, v, scale)


@dataclass(frozen=True)
class Lesson:
    """A prompt, read by a model as it is, the `teacher`, and by the same with gates in its layers, the `student`.

    An objective is made of these: `distance` reads it with both, `captured` with the teacher alone.
    """

    prompt: Prompt
    teacher: Any
    student: Any

    def distance(self) -> Tensor:
        """The squared distance of the last hidden states from which the answers are foretold, a mean over these tokens
        and channels.
        """
        at = before(self.prompt.asked)
        with torch.no_grad():
            taught = _hidden(self.teacher, self.prompt.tokens)[0, at].float()
        with torch.enable_grad():
            return (_hidden(self.student, self.prompt.tokens)[0, at].float() - taught).square().mean()

    @torch.no_grad()
    def captured(self) -> list[Seen]:
        """What the teacher's attention is given, by layer."""
        watch = Watch()
        with apply(self.teacher, watch):
            _hidden(self.teacher, self.prompt.tokens)
        return [Seen(*self.prompt, *each) for each in watch.given]


def _hidden(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return found


@torch.no_grad()
def measured(reader: Reader, what: Any, group: Sequence[Prompt]) -> dict[str, float]:
    """How well a model answers with something in place of its attention.

    Each prompt is read in one piece up to its answers, which are then fed to it a token at a time. what: as
    `saccade.hf.apply` takes it, None for the model as it is. loss: nats a token of the answers. exact: the part of the
    prompts all of whose answers are the likeliest tokens. held: bytes of the cache over those of dense attention.
    """
    losses, exact, held = [], [], []
    with nullcontext() if what is None else apply(reader.model, what) as handle:
        for one in group:
            tokens, asked = one.tokens[0].tolist(), one.asked.tolist()
            first = asked.index(True)
            logits, cache = reader.read(tokens[:first])
            rows = [logits[-1]]
            for token in tokens[first:-1]:
                logits, cache = reader.read([token], cache)
                rows.append(logits[-1])
            at = one.asked[first:]
            scores, truth = torch.stack(rows)[at].float(), one.tokens[0, first:][at]
            losses.append(float(F.cross_entropy(scores, truth)))
            exact.append(float(scores.argmax(-1).equal(truth)))
            kept = memory(handle)
            held.append(1.0 if kept is None else kept.ratio)
            del cache, kept
    return {"loss": statistics.fmean(losses), "exact": statistics.fmean(exact), "held": statistics.fmean(held)}
