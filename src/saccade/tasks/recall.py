"""Associative recall of many queries (MQAR): pairs of key and value first, then the keys again, whose values are asked.

A row of N tokens is P pairs k_1 v_1 ... k_P v_P, and after them every key once, an even number of tokens on:

    tokens[2 j] = k_j,   tokens[2 j + 1] = v_j,   tokens[2 P + 2 g_j] = k_j,   answer of that position = v_j

The gaps g_1, g_2, ... are drawn one after another from 0 .. N / 2 - P - 1 without replacement, with weights
(g + 1)^(power - 1), so that most questions come soon. Keys are distinct tokens of 1 .. V / 2 - 1, values distinct ones
of V / 2 .. V - 1. All other places hold noise from the whole vocabulary, keys and values included, or token 0. Nothing
is asked there, and the answer of a question does not follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import positive

Answerer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, order=True)
class Difficulty:
    """Tokens of a row N, an even number, and the pairs P in it, at most N / 4.

    >>> str(Difficulty(64, 4)), Difficulty.parse("64x4") == Difficulty(64, 4)
    ('64x4', True)
    """

    length: int
    pairs: int

    def __post_init__(self) -> None:
        if positive("length", self.length) % 2:
            raise ValueError(f"length: got {self.length}; pass an even number, since keys stand at even places")
        if 4 * positive("pairs", self.pairs) > self.length:
            raise ValueError(f"pairs: got {self.pairs} for {self.length} tokens; pass at most {self.length // 4}")

    def __str__(self) -> str:
        return f"{self.length}x{self.pairs}"

    @classmethod
    def parse(cls, text: str) -> Difficulty:
        """The difficulty that prints as `text`. Errors: ValueError for another text."""
        parts = text.split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise ValueError(f"difficulty: got {text!r}; pass tokens and pairs, such as 64x4")
        return cls(int(parts[0]), int(parts[1]))


@dataclass(frozen=True)
class Recall:
    """Rows of one difficulty. tokens (B, N), asked (B, P): positions, in the order of the pairs; answers (B, P)."""

    difficulty: Difficulty
    tokens: Tensor
    asked: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Recall:
        return Recall(self.difficulty, self.tokens[rows], self.asked[rows], self.answers[rows])

    def to(self, device: str | torch.device) -> Recall:
        return Recall(self.difficulty, *(part.to(device) for part in (self.tokens, self.asked, self.answers)))

    def labels(self) -> Tensor:
        """The answers in their places, (B, N), and -100, which `cross_entropy` leaves out, everywhere else."""
        return torch.full_like(self.tokens, -100).scatter(1, self.asked, self.answers)


def recall(
    difficulty: Difficulty,
    count: int,
    *,
    vocab_size: int = 8192,
    power: float = 0.01,
    noise: bool = True,
    seed: int = 0,
) -> Recall:
    """`count` rows of a difficulty, on the CPU; the same seed gives the same rows.

    Paper: arXiv 2312.04927 (Zoology), section 4; the defaults are those of its authors' code and of the figure of arXiv
    2402.18668. vocab_size: V, an even number above N (default 8192). power: of the law of the gaps (0.01; 1: any gap is
    as likely). noise: fill the rest with random tokens (default), else with token 0. seed: 0.
    Costs P passes over (B, P) for keys and values, and B N / 2 random numbers for gaps.
    Errors: ValueError for a vocabulary that is odd or no larger than N, power <= 0, a count or a seed that is negative.

    >>> row = recall(Difficulty(12, 2), 1, vocab_size=16, noise=False, seed=1)
    >>> [row.tokens[0, 2 * pair] == row.tokens[0, at] for pair, at in enumerate(row.asked[0])]
    [tensor(True), tensor(True)]
    """
    n, p = difficulty.length, difficulty.pairs
    positive("count", count)
    if positive("vocab_size", vocab_size) % 2 or vocab_size <= n:
        raise ValueError(f"vocab_size: got {vocab_size} for rows of {n} tokens; pass an even number above that")
    if not power > 0:
        raise ValueError(f"power: got {power}; pass a number > 0")
    generator = torch.Generator().manual_seed(positive("seed", seed, least=0))
    half = vocab_size // 2
    keys, values = _distinct(1, half, count, p, generator), _distinct(half, vocab_size, count, p, generator)
    places = torch.arange(1, n // 2 - p + 1, dtype=torch.float64)
    # The order in which exponential clocks of these rates ring is that of draws without replacement.
    waits = torch.empty(count, len(places), dtype=torch.float64).exponential_(generator=generator)
    gaps = (waits * places ** (1 - power)).argsort(1)[:, :p]
    asked = 2 * p + 2 * gaps
    # Drawn in any case, so that the pairs and gaps of a seed do not depend on it.
    rest = torch.randint(vocab_size, (count, n - 2 * p), generator=generator)
    pairs = torch.stack([keys, values], 2).flatten(1)
    tokens = torch.cat([pairs, rest if noise else torch.zeros_like(rest)], 1).scatter(1, asked, keys)
    return Recall(difficulty, tokens, asked, values)


def _distinct(low: int, high: int, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count): ordered draws from low .. high - 1 without replacement (R. Floyd's, all rows at once)."""
    chosen = torch.empty(rows, count, dtype=torch.int64)
    for at in range(count):
        last = high - low - count + at
        drawn = torch.randint(last + 1, (rows,), generator=generator)
        taken = (chosen[:, :at] == drawn[:, None]).any(1)
        chosen[:, at] = torch.where(taken, last, drawn)
    # Floyd's set is uniform, its order is not.
    order = torch.rand(rows, count, generator=generator, dtype=torch.float64).argsort(1)
    return chosen.gather(1, order) + low


@torch.no_grad()
def accuracy(model: Answerer, rows: Recall, *, batch: int = 256) -> float:
    """Share of the questions whose answer gets the highest logit.

    Every row asks as many, so this is the mean over rows of the mean over a row's questions, too.
    model: (tokens (B, N), asked (B, P)) -> logits (B, P, V) of the asked positions. batch: rows a call (256).

    >>> rows = recall(Difficulty(16, 3), 5, vocab_size=32)
    >>> def reader(tokens, asked):
    ...     keys, values = tokens[:, None, 0:6:2], tokens[:, 1:6:2]
    ...     found = (tokens.gather(1, asked)[:, :, None] == keys).int().argmax(2)
    ...     return torch.nn.functional.one_hot(values.gather(1, found), 32)
    >>> accuracy(reader, rows)
    1.0
    """
    starts = range(0, len(rows), positive("batch", batch))
    parts = [rows[start : start + batch] for start in starts]
    right = torch.stack([(model(part.tokens, part.asked).argmax(-1) == part.answers).sum() for part in parts])
    return right.sum().item() / rows.answers.numel()


def accuracies(model: Answerer, tests: Iterable[Recall], *, batch: int = 256) -> dict[str, float]:
    """`accuracy` of each difficulty, by the name of the difficulty."""
    return {str(rows.difficulty): accuracy(model, rows, batch=batch) for rows in tests}
