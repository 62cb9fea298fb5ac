"""How many tokens each layer and key head may keep, and which, given their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.cache.rows import sent
from saccade.errors import positive


def budgeted(name: str, share: float | int) -> float | int:
    """Return a budget: a float in (0, 1], the kept part of the tokens seen, or an int, tokens.

    >>> budgeted("budget", 0.25), budgeted("budget", 128)
    (0.25, 128)
    """
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name}: got {share!r} ({type(share).__name__}); pass a float in (0, 1], or an int of tokens")
    if isinstance(share, int):
        return positive(name, share)
    if not 0 < share <= 1:
        raise ValueError(f"{name}: got {share}; pass a float in (0, 1], a part of the tokens, or an int of tokens")
    return share


def top(scores: Tensor, counts: Tensor | int) -> Tensor:
    """bool like scores (..., M): the `counts` (...,) largest of each row, of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    if isinstance(counts, Tensor):
        counts = sent(counts, scores)[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, place < counts)


class Uniform:
    """The same number for every key head of every layer. share: see `budgeted`.

    >>> keep = Uniform(0.5).keep(torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]), 2)
    >>> keep.tolist()
    [[[True, False, True, False]]]
    """

    over_layers = False  # whether the scores of all layers must be known before any token is dropped

    def __init__(self, share: float | int) -> None:
        self.share = budgeted("budget", share)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1, sure: int = 0) -> int:
        """Tokens a key head of a layer, on average over the heads, after `seen` tokens; `sure` of them always stay."""
        return min(seen, max(1, int(self.share * seen + 0.5)) if isinstance(self.share, float) else self.share)

    def counts(self, held: Tensor, tokens: int) -> Tensor | None:
        """What `keep` leaves each row of `held` (G, Hkv), on the host, where that follows from these numbers."""
        return held.clamp(max=tokens)

    def keep(self, scores: Tensor, tokens: int) -> Tensor:
        """bool (G, Hkv, M): the tokens that stay, `tokens` a key head on average; scores (G, Hkv, M)."""
        return top(scores, tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.share})"


class Pyramid(Uniform):
    """More in the first layers, less in the last, on a line: PyramidKV (arXiv 2406.02069, section 4.2).

        b_l = s + top - (top - bottom) l / (L - 1),   bottom = (b - s) / steepness,   top = 2 (b - s) - bottom

    b: the budget of `share`; s: the tokens that always stay; the mean over layers is b, to one token in all. Where
    `top` exceeds what there is, it is that, and bottom = 2 (b - s) - top, as in the authors' code. steepness: their
    beta (20).

    >>> [Pyramid(100).tokens(1000, layer, 4) for layer in range(4)]
    [195, 132, 68, 5]
    """

    def __init__(self, share: float | int, steepness: int = 20) -> None:
        super().__init__(share)
        self.steepness = positive("steepness", steepness)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1, sure: int = 0) -> int:
        mean = super().tokens(seen)
        if num_layers == 1 or mean <= sure:
            return mean
        least = max((mean - sure) / self.steepness, 0.0 if sure else 1.0)
        most = min(seen - sure, 2 * (mean - sure) - least)
        slope = 2 * (most - (mean - sure)) / (num_layers - 1)
        # Rounded as sums, so that all layers together have num_layers times the mean.
        ends = [int(sum(most - slope * layer for layer in range(stop)) + 0.5) for stop in (index, index + 1)]
        return sure + ends[1] - ends[0]


class AcrossHeads(Uniform):
    """Shared by the key heads of a layer, where the scores are largest: AdaKV (arXiv 2407.11550, algorithm 1).

        keep the Hkv b largest scores of all heads of a layer, and in each head at least its floor b largest

    floor: the part that each head is sure of (0.2, their safeguard). Deviation: their code scales what the heads won,
    floor b + (1 - floor) won, and rounds; here the largest remaining scores fill the budget, which is met exactly.
    Lengths depend on the data, so that the host waits once a layer and prompt.
    """

    def __init__(self, share: float | int, floor: float = 0.2) -> None:
        super().__init__(share)
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: got {floor}; pass a number from 0 to 1, the part that each head is sure of")
        self.floor = floor

    def counts(self, held: Tensor, tokens: int) -> Tensor | None:
        return held.clone() if int(held.max()) <= tokens else None

    def keep(self, scores: Tensor, tokens: int) -> Tensor:
        sure = scores.masked_fill(top(scores, int(self.floor * tokens)) & (scores > -torch.inf), torch.inf)
        return top(sure.flatten(1), tokens * scores.shape[1]).view(scores.shape)


class AcrossLayers(Uniform):
    """Shared by all key heads of all layers, where the scores are largest; the whole prompt is held until then."""

    over_layers = True

    def counts(self, held: Tensor, tokens: int) -> Tensor | None:
        return None

    def keep_all(self, scores: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
        """`keep` for the scores (G, Hkv, M) of all layers, tokens (G,) a key head of each sequence."""
        sizes = [x.flatten(1).shape[1] for x in scores]
        heads = sum(x.shape[1] for x in scores)
        kept = top(torch.cat([x.flatten(1) for x in scores], 1), tokens * heads)
        return [part.view(x.shape) for part, x in zip(kept.split(sizes, 1), scores, strict=True)]
