"""HDT: words see their sentence, sentences their section, sections their document, by tokens that stand for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.softmax import merge
from saccade.where import Labels, Pattern, Plan

SENTENCE, SECTION = 32, 16  # of a document whose structure nobody told: tokens a sentence, sentences a section


def checked(levels: Tensor | Sequence[int], ndim: int) -> Tensor:
    """Levels as a tensor on the host."""
    levels = torch.as_tensor(levels).cpu()
    if levels.is_floating_point() or not levels.numel() or levels.ndim not in (1, ndim):
        got = f"{levels.dtype} of shape {tuple(levels.shape)}"
        raise TypeError(f"levels: got {got}; pass integers, one a token")
    if int(levels.min()) < -1 or int(levels.max()) > 3:
        got = f"{int(levels.min())} to {int(levels.max())}"
        raise ValueError(f"levels: got {got}; pass 0 to 3 (word, sentence, section, document), -1 for padding")
    return levels.long()


def groups(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The sentence, section and document of each token, and which of these it takes part in.

    (N,) -> (3, N); (B, N), samples that are to stand one after the other -> (3, B N).
    """
    before = nn.functional.pad(levels, (1, 0), value=-1)[..., :-1]
    begins = torch.stack([levels > 0, levels > 1, (levels == 3) & (before != 3)])
    if levels.ndim == 2:
        begins[..., 0] = True
    takes_part = torch.stack([(levels == level) | (levels == level + 1) for level in range(3)])
    return begins.flatten(1).cumsum(1), takes_part.flatten(1)


def hierarchy(levels: Tensor) -> list[Labels]:
    """What tokens see on each level."""
    return [Labels(number.where(some, -1)) for number, some in zip(*groups(levels), strict=True)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def parts(shape: tuple[int, ...], levels: bytes, device: torch.device) -> tuple[Pattern, Pattern | None, Tensor]:
    """What tokens see by their sentences, what anchors see of anchors besides, None where there are none, and the
    anchors' numbers, on `device`. levels: the bytes of int8 levels of this shape, (N,) or (B, N)."""
    kinds = torch.frombuffer(bytearray(levels), dtype=torch.int8).long().view(shape)
    numbers, takes_part = groups(kinds)
    # What anchors see of anchors is left to their own part, or their pairs with themselves would count twice.
    kind = kinds.flatten().where(takes_part[0], -1)
    words = Labels(numbers[0]) & Labels(kind, left=None, queries=(1 - kind).where(takes_part[0], -1))
    at = (kinds.flatten() > 0).nonzero().flatten()
    if not len(at):
        return words, None, at.to(device)
    _, sections, documents = (Labels(label) for label in numbers.where(takes_part, -1)[:, at])
    return words, sections | documents, at.to(device)


class Hdt(Attention):
    """Attention over the hierarchy of a document, in which anchor tokens stand for what is below them.

        i sees j  iff  on some level t both take part and are of one group,  t = 0 sentences, 1 sections, 2 documents
        words take part in level 0, [CLS] in 0 and 1, <sec> in 1 and 2, <doc> in 2

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). Each token is of a kind: 0 a word, 1 the anchor of a sentence
    [CLS], 2 of a section <sec>, 3 of a document <doc>, -1 padding, which sees nothing and gives 0. An anchor stands
    before what it stands for: <doc> <sec> [CLS] w w [CLS] w w w <sec> [CLS] w. Tokens of kind 3 in a row, such as the
    words of a query before <doc>, are one document's. Paper: arXiv 2407.08330, hierarchical attention; which token
    takes part in what was read off the authors' code, and so was that anchors are gathered.
    Deviations: the codes of position (word, sentence and section, added to the input) belong to the model around it;
    heads may share keys; several documents may stand in one sequence.
    levels: the kinds of the tokens, a sequence of integers, repeated when N is a multiple of its length (default None:
    a <doc>, then sections of 16 sentences of 32 tokens, anchors included). Called with levels=, a tensor (N,), or (B,
    N) where samples differ, it takes these. Costs sum over sentences of their tokens^2, of sections (sentences + 1)^2,
    of documents (sections + 1)^2 pairs: words are attended sentence by sentence, anchors gathered and attended on their
    own, and the two merged. What follows from the levels is worked out on the host and kept; levels that arrive on a
    GPU are waited for. Sentences are finer than tiles: of 16,384 tokens 0.2 % of the pairs are seen, and the tiles of
    128 that sentences of 32 tokens meet are 2.3 %. Errors: ValueError or TypeError for levels that are none, other
    integers, or too many or few.

    >>> hdt, x = Hdt(Dims(2, 8), levels=[3, 2, 1, 0, 0, 1, 0, 2, 1, 0]), torch.randn(1, 2, 10, 8)
    >>> hdt(x, x, x).shape, hdt.plan(x, x).dense()[0, [1, 2]].int().tolist()
    (torch.Size([1, 2, 10, 8]), [[1, 1, 1, 0, 0, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
    """

    spec = Spec(
        id="hdt",
        name="HDT",
        title="HDT: Hierarchical Document Transformer",
        paper="2407.08330",
        year=2024,
        family="static_sparse",
        uses=("attend", "merge", "Labels"),
    )

    def __init__(self, dims: Dims, *, levels: Sequence[int] | Tensor | None = None) -> None:
        super().__init__(dims)
        self.levels = None if levels is None else checked(levels, 1)

    def structure(self, num_tokens: int) -> Tensor:
        """The levels of `num_tokens` tokens, (N,), for a call that brings none."""
        if self.levels is None:
            place = (torch.arange(num_tokens) - 1) % (1 + SENTENCE * SECTION)
            levels = ((place - 1) % SENTENCE == 0).long().masked_fill(place == 0, 2)
            levels[0] = 3
            return levels
        times, rest = divmod(num_tokens, len(self.levels))
        if rest:
            raise ValueError(f"levels: got {len(self.levels)} for {num_tokens} tokens; pass one a token")
        return self.levels.repeat(times)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        sentences, sections, documents = hierarchy(self.structure(k.shape[2]))
        pattern = sentences | sections | documents
        return pattern.plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *, levels: Tensor | None = None) -> Tensor:
        batch, n = len(q), k.shape[2]
        if levels is None:
            return self.attended(q, k, v, self.structure(n))
        levels = checked(levels, 2)
        if levels.shape not in ((n,), (batch, n)):
            raise ValueError(f"levels: got shape {tuple(levels.shape)}; pass ({n},) or ({batch}, {n})")
        if levels.ndim == 1:
            return self.attended(q, k, v, levels)
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # one sample after the other
        return self.attended(q, k, v, levels)[0].unflatten(1, (batch, n)).transpose(0, 1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
        """Samples of one structure (N,), or samples in a row, each of its own, (B, N)."""
        words, anchors, at = parts(tuple(levels.shape), levels.to(torch.int8).numpy().tobytes(), q.device)
        o, lse = attend(q, k, v, words, return_lse=True)
        if anchors is None:
            return o
        some = [x.index_select(2, at) for x in (q, k, v)]
        own = attend(some[0], some[1], some[2], anchors, return_lse=True)
        return o.index_copy(2, at, merge([(o.index_select(2, at), lse.index_select(2, at)), own])[0])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *, levels: Tensor | None = None) -> Tensor:
        batch, n = len(q), q.shape[2]
        if levels is not None:
            given = levels.expand(batch, n).tolist()
        elif self.levels is not None:
            given = [self.levels.tolist() * (n // len(self.levels))] * batch
        else:
            part = [2, *([1] + [0] * 31) * 16]
            given = [([3] + part * (n // len(part) + 1))[:n]] * batch
        seen = torch.zeros(batch, 1, n, n, dtype=torch.bool)
        for sample, kinds in enumerate(given):
            part_of: list[set[tuple[int, int]]] = []
            sentence, section, document = 0, 0, 0
            for i, kind in enumerate(kinds):
                document += kind == 3 and (i == 0 or kinds[i - 1] != 3)
                section += kind >= 2
                sentence += kind >= 1
                own = [(0, sentence), (1, section), (2, document)]
                part_of.append(set() if kind < 0 else set(own[max(0, kind - 1) : kind + 1]))
            for i in range(n):
                for j in range(n):
                    seen[sample, 0, i, j] = bool(part_of[i] & part_of[j])
        reads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k[:, reads]) / q.shape[3] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
        return torch.einsum("bhnm,bhmd->bhnd", weights, v[:, reads])

    @classmethod
    def cases(cls) -> list[Case]:
        one = [3, 2, 1, 0, 0, 0, 1, 0, 1, 0, 0, 2, 1, 0, 0, 0, 0, 1, 0, 2, 1, 0, 0]
        two = [3, 3, 3, 1, 0, 2, 1, 0, 1, 0, -1, 3, 2, 1, 0, 2, 2, 1, 1, 0, 0, 0, -1]
        return [
            Case(Dims(2, 8), 46, {"levels": one}),
            Case(Dims(4, 4, 2), 23, {"levels": two}),
            Case(Dims(2, 8), 71, {}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, list[int]]:
        return {"levels": [0] * length}

    @classmethod
    def document(cls, sections: Sequence[Sequence[int]]) -> list[int]:
        """The levels of a document: of each section, the words of its sentences."""
        return [3] + [level for words in sections for level in [2] + [x for n in words for x in [1] + [0] * n]]

    @claim("Any two tokens of a document are at most 2 L - 1 hops apart for L = 3 levels, and some are.")
    def hops(cls) -> Finding:
        levels = cls.document([[3, 5, 2], [4], [1, 7, 2, 6]])
        n = len(levels)
        mask = cls(Dims(1, 8), levels=levels).plan(torch.empty(1, 1, n, 8), torch.empty(1, 1, n, 8)).dense()[0]
        after, reached = torch.eye(n, dtype=torch.float64), [1 / n]
        while len(reached) < 6:
            after = (after @ mask.double() > 0).double()
            reached.append(int(after.sum()) / n**2)
        figure = f"{[f'{share:.0%}' for share in reached[1:]]} of all pairs joined after 1 to 5 layers, {n} tokens"
        return Finding(reached[5] == 1 > reached[4] and bool((mask == mask.T).all()), figure)

    @claim(
        "Pairs are those of sentences, anchors of sections and of the document, less those of anchors with themselves."
    )
    def pairs(cls) -> Finding:
        found, shares = [], []
        for sections in ([[3, 5, 2], [4], [1, 7, 2, 6]], [[9, 4] * 3] * 5, [[31] * 16] * 3):
            levels = cls.document(sections)
            n, sentences = len(levels), [words + 1 for section in sections for words in section]
            expected = sum(size**2 for size in sentences) + sum((len(section) + 1) ** 2 for section in sections)
            expected += (len(sections) + 1) ** 2 - len(sentences) - len(sections)
            x = torch.empty(1, 1, n, 8)
            pairs = int(cls(Dims(1, 8), levels=levels).plan(x, x).num_attended)
            found.append(pairs == expected)
            shares.append(f"{pairs / n:.0f} of {n}")
        return Finding(all(found), f"keys a token on average: {', '.join(shares)}; as the sum of squares says, 3 of 3")

    @claim("Samples of one batch may have structures of their own; each is dense attention under its own mask.")
    def samples(cls) -> Finding:
        n, module = 61, cls(Dims(4, 8, 2))
        structures = [cls.document(s) for s in ([[3, 5, 2], [4], [1, 7]], [[9] * 5], [[1] * 4] * 3)]
        levels = torch.tensor([(one + [-1] * n)[:n] for one in structures])
        q, k, v = (torch.randn(3, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2))
        error = float((module(q, k, v, levels=levels) - module.oracle(q, k, v, levels=levels)).abs().max())
        # Two weighted sums of n values each.
        rounding = 2 * n * torch.finfo(q.dtype).eps * float(v.abs().max())
        alike = float((module(q, k, v, levels=levels[1]) - module.oracle(q, k, v, levels=levels[1])).abs().max())
        figure = f"3 documents of {[len(one) for one in structures]} tokens: within {max(error, alike):.1e}"
        return Finding(max(error, alike) <= rounding, figure)

    @claim("Gathered, anchors add few tiles to those of the sentences; one plan for all three levels lists every tile.")
    def gathered(cls) -> Finding:
        found = []
        for n in (2048, 8192):
            levels = cls(Dims(1, 8)).structure(n)
            numbers, takes_part = groups(levels)
            one, two = (Labels(label) for label in numbers.where(takes_part, -1)[1:, levels > 0])
            parts = [(Labels(numbers[0]), n), (one | two, int((levels > 0).sum()))]
            tiles = [part.plan(m, block=(64, 64)).num_tiles for part, m in parts]
            sentences, sections, documents = hierarchy(levels)
            whole = (sentences | sections | documents).plan(n, block=(64, 64)).num_tiles
            found.append((tiles[0], tiles[1], whole))
        figure = f"tiles of 64 x 64 for sentences, anchors, and in one plan: {found[0]} at 2048 tokens, {found[1]}"
        holds = all(2 * (own + anchors) < whole for own, anchors, whole in found)
        return Finding(holds, f"{figure} at 8192")
