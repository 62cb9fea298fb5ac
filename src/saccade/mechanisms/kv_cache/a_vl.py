"""A-VL: of an image a cache keeps what may be of use and reads what is; of text it keeps recent and heavy tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.cache import Cached, Policy, Stored, Tokens, View, top
from saccade.cache.rows import sent
from saccade.contract import Case, Dims, Finding, Held, Spec, claim, replay
from saccade.errors import part, positive

TEXT, SECONDARY, CORE = 0.0, 1.0, 2.0


def share_of(share: float, count: int) -> int:
    """A part of `count` tokens, rounded; at least one, where there is one."""
    return min(count, max(1, int(share * count + 0.5)))


class ByModality(Policy):
    """See `AVL`. Columns of a token: attention received, the mean over a group; what it is, text or of an image.

    `images`, noted on the host: how many tokens of images a sequence has had.
    """

    columns = 2

    def __init__(self, rule: AVL) -> None:
        self.rule = rule

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> int | None:
        image = self.rule.image
        return None if isinstance(image, int) else sum(self.left(len(range(seen)[slice(*image)]), seen)[1:])

    def left(self, images: int, seen: int) -> tuple[int, int, int]:
        """How many tokens are core, of images (core or secondary), and text."""
        secondary = share_of(self.rule.secondary, images)
        return min(secondary, share_of(self.rule.core, images)), secondary, share_of(self.rule.text, seen - images)

    def sizes(self, view: View) -> Tensor:
        """`left` of each sequence, (3, G) on the host."""
        pairs = zip(view.notes("images").tolist(), view.seen.tolist(), strict=True)
        return torch.tensor([self.left(*pair) for pair in pairs]).T

    def of_image(self, view: View) -> Tensor:
        """Which tokens are of an image, (G, Hkv, M)."""
        image, first = self.rule.image, int(view.seen.min()) == view.q.shape[2]
        if not isinstance(image, int):
            if not first:  # what follows a prompt is text
                return view.columns[..., 1] > TEXT
            start, stop, _ = slice(*image).indices(view.q.shape[2])
            return (view.positions >= start) & (view.positions < stop)
        told = view.ids
        return torch.zeros_like(view.there) if told is None else told == image

    def fresh(self, view: View, image: Tensor, first: bool) -> Tensor:
        """How many of the tokens that just came are of an image, (G,) on the host."""
        n, told = view.q.shape[2], self.rule.image
        if not isinstance(told, int):
            return view.by_seen(lambda seen: len(range(n)[slice(*told)]) if first else 0)
        # What has the id, the device alone knows: the host, which allocates, waits once a prompt and layer.
        return (image[:, 0] & (view.positions[:, 0] >= view.ends[:, None] - n)).sum(-1).cpu()

    def rank(self, view: View, image: Tensor, sizes: Tensor) -> None:
        """Say of the tokens of images, the same ones in all key heads, which are core, which secondary, which text."""
        place = (~image).int().argsort(dim=-1, stable=True)
        exists = image[:, 0].gather(1, place[:, 0])
        scores = view.pooled(view.weights(1)[:, :, 0]).gather(2, place).mean(1).masked_fill(~exists, -torch.inf)
        core, secondary = (top(scores, size).to(view.columns) for size in sizes[:2])
        kind = (core + secondary)[:, None].expand(place.shape)
        view.columns[..., 1] = view.columns[..., 1].scatter(2, place, kind)

    def heavy(self, view: View, text: Tensor, size: Tensor) -> Tensor:
        """What text tokens are worth, infinite for recent ones: a part of the `size` (G,) that stay."""
        recent = torch.tensor([int(self.rule.recent * count) for count in size.tolist()])
        late = view.positions >= (view.ends - sent(recent, text))[:, None, None]
        return view.columns[..., 0].masked_fill(late, torch.inf).masked_fill(~text, -torch.inf)

    def piece(self, view: View) -> Tensor:
        image = self.of_image(view)
        first = int(view.seen.min()) == view.q.shape[2]
        new, before = self.fresh(view, image, first), 0 if first else view.notes("images")
        view.note("images", before + new)
        view.columns[..., 0] += view.pooled(view.received())
        sizes, text = self.sizes(view), view.there & ~image
        self.rank(view, image, sizes)
        kept = top(self.heavy(view, text, sizes[2]), sizes[2][:, None].expand(text.shape[:2]))
        return (kept & text) | (view.columns[..., 1] > TEXT)

    def counts(self, view: View) -> Tensor:
        return self.sizes(view)[1:].sum(0)[:, None].expand(view.there.shape[:2])

    def whole(self, step: Stored) -> Tensor:
        """Which sequences read all that they hold, (G,) on the host."""
        return (step.seen - step.mine(step.stored.aimed)) % self.rule.period == 0

    def read(self, step: Stored) -> Tensor | None:
        """Which tokens a step reads, (G, Hkv, M); None for all."""
        (core, secondary, _), whole = self.sizes(step), self.whole(step)
        if bool((whole | (core == secondary)).all()):
            return None
        return step.there & ((step.columns[..., 1] != SECONDARY) | sent(whole, step.q)[:, None, None])

    def select(self, step: Stored) -> Tokens | None:
        read = self.read(step)
        if read is None:
            return None
        core, secondary, _ = self.sizes(step)
        most = int((step.counts - ((secondary - core) * ~self.whole(step))[:, None]).max())
        first = (~read).int().argsort(dim=-1, stable=True)[..., :most]
        return Tokens(step.slots.gather(2, first).masked_fill(~read.gather(2, first), -1))

    def after(self, step: Stored) -> None:
        sizes, read, whole = self.sizes(step), self.read(step), self.whole(step)
        where = None if read is None else read.repeat_interleave(step.group, 1)
        step.columns[..., 0] += step.pooled(step.weights(1, where)[:, :, 0])
        if bool(whole.any()):
            before = step.columns[..., 1].clone()
            self.rank(step, before > TEXT, sizes)
            step.columns[..., 1] = step.columns[..., 1].where(sent(whole, before)[:, None, None], before)
        step.put_columns()
        over = step.counts - sizes[1:].sum(0)[:, None] > 0
        if bool(over.any()):
            text = step.there & (step.columns[..., 1] == TEXT)
            least = self.heavy(step, text, sizes[2]).masked_fill(~text, torch.inf).argmin(-1, keepdim=True)
            step.stored.drop(step.slots.gather(2, least), step.rows, over)


class AVL(Cached):
    """Tokens of an image: some are dropped, some held, some of those read. Text: heavy hitters and recent tokens.

        a_j = mean over all heads of p_nj, n the last token of the prompt, j of the image
        held: the S largest a (secondary);   read by a step: of those the C largest (core), and the text
        every K-th step reads all that is held; then core are the C largest a of that step's token
        text: of T text tokens held the newest half stays, and of the others the largest sum_i p_ij

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). S, C: parts of the image's tokens, one choice for all heads
    of a layer; T: a part of the text read so far, decoded tokens too, each key head its own by the mean over its query
    heads. i: every query that read j. Paper: arXiv 2409.14846; the sizes are those of its authors' example (60 % of an
    image dropped, 30 % read, K = 3, 30 % of the text dropped). How many text tokens count as recent is left open there;
    half of them do here, as in H2O. Deviations: their optional cut of image tokens after layer 2 of a prompt is left
    out: it takes tokens from the layers' inputs, which a cache does not hold. secondary: S (default 0.4). core: C, at
    most S (0.3). text: T (0.7). recent: part of the text held that is the newest (0.5). period: K (3). image: (start,
    stop) of the prompt's tokens, as of a slice, or the id of image tokens where a model tells ids ((0, -32)). decoded:
    tokens that are decoded (16). Costs N^2 / 2 pairs of the prompt, and another pass over all; C to S of the image's
    keys a step. Errors: ValueError for parts outside (0, 1], or a core larger than what is held.

    >>> x = torch.randn(1, 2, 60, 8)
    >>> AVL(Dims(2, 8), image=(2, 30))(x, x, x).shape
    torch.Size([1, 2, 60, 8])
    """

    spec = Spec(
        id="a_vl",
        name="A-VL",
        title="A-VL: Adaptive Attention for Large Vision-Language Models",
        paper="2409.14846",
        year=2024,
        family="kv_cache",
        uses=("Cached", "Policy", "Tokens", "top"),
        discrete=True,
    )

    def __init__(
        self,
        dims: Dims,
        *,
        secondary: float = 0.4,
        core: float = 0.3,
        text: float = 0.7,
        recent: float = 0.5,
        period: int = 3,
        image: Sequence[int] | int = (0, -32),
        decoded: int = 16,
    ) -> None:
        super().__init__(dims, decoded=decoded)
        for name, share, most in (("secondary", secondary, 1), ("core", core, secondary), ("text", text, 1)):
            part(name, share, zero=False, most=most)
        self.secondary, self.core, self.text, self.recent = secondary, core, text, part("recent", recent)
        self.period, self.image = positive("period", period), image
        self.policy = ByModality(self)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n, d), kv_heads = q.shape[1:], k.shape[1]
        group, prompt = heads // kv_heads, max(1, n - self.decoded)
        assert not isinstance(self.image, int)
        image = list(range(prompt))[slice(*self.image)]
        most, few = (min(len(image), max(1, int(x * len(image) + 0.5))) for x in (self.secondary, self.core))
        core: dict[int, list[int]] = {}
        sums = torch.zeros(len(q), kv_heads, n, dtype=q.dtype)

        def whole(t: int) -> bool:
            return (t - prompt + 1) % self.period == 0

        def read(b: int, t: int, held: Held) -> Held:
            rows = held if whole(t) else [[j for j in row if j not in image or j in core[b]] for row in held]
            return [rows[h // group] for h in range(heads)]

        def keep(b: int, t: int, held: Held) -> Held:
            queries = range(prompt) if t < prompt else [t]
            for i in queries:
                seen = [list(range(i + 1))] * heads if t < prompt else read(b, t, held)
                p = torch.zeros(heads, n, dtype=q.dtype)
                for h, row in enumerate(seen):
                    g = h // group
                    p[h, row] = ((k[b, g, row] * q[b, h, i]).sum(-1) / d**0.5).softmax(0).detach()
                    sums[b, g] += p[h] / group
            if t < prompt or whole(t):
                alive = image if t < prompt else [j for j in held[0] if j in image]
                ranked = sorted(alive, key=lambda j: -float(p[:, j].sum()))
                core[b] = ranked[:few]
            pictures = ranked[:most] if t < prompt else [j for j in held[0] if j in image]
            spoken = t + 1 - len(image)
            room = min(spoken, max(1, int(self.text * spoken + 0.5)))
            newest, rows = t + 1 - int(self.recent * room), []
            for g, row in enumerate(held):
                words = [j for j in row if j not in image]
                words = sorted(words, key=lambda j, g=g: (j < newest, -float(sums[b, g, j])))[:room]  # type: ignore[misc]
                rows.append(sorted(words + pictures))
            return rows

        return replay(q, k, v, prompt, keep, read)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 47, {"image": (3, 22), "decoded": 17}),
            Case(Dims(3, 4), 41, {"image": (0, -9), "secondary": 0.6, "core": 0.2, "text": 0.5, "decoded": 13}),
            Case(Dims(2, 4, 1), 29, {"image": (5, 14), "recent": 0.2, "period": 2, "decoded": 11}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"secondary": 1.0, "core": 1.0, "text": 1.0}

    @classmethod
    def _decoded(cls, asked: Sequence[int]) -> list[list[Tensor]]:
        """Positions of an image of 100 tokens that one key head reads, and those that are core, step by step: a prompt
        that asks for tokens 0, 1, 2, ... less and less, then tokens that ask for one of the image each.
        """
        q, k, v = torch.randn(3, 1, 2, 128, 32, generator=torch.Generator().manual_seed(0))
        k = 6 * torch.nn.functional.normalize(k, dim=-1)
        q[:, :, 119] = ((1 - torch.arange(100) / 100)[:, None] * k[:, :, :100]).sum(2) / 4
        for step, at in enumerate(asked):
            q[:, :, 120 + step] = 4 * k[:, :, at]
        one = cls(Dims(2, 32), image=(0, 100))
        found: list[list[Tensor]] = []
        one.policy = _Watched(one, found)
        session = one.session()
        for start, stop in itertools.pairwise([0, *range(120, 121 + len(asked))]):
            one.read(session, q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop])
        return found

    @claim("A step reads C of the image's tokens, every K-th S of them.")
    def reads(cls) -> Finding:
        counts = [len(read) for read, _ in cls._decoded([0] * 6)]
        return Finding(counts == [30, 30, 40] * 2, f"{counts} of 100")

    @claim("A token that is held and not read is promoted by the step that asks for it; one that was dropped is gone.")
    def promotes(cls) -> Finding:
        held = cls._decoded([0] * 3)
        core, every = set(held[0][1].tolist()), set(held[2][0].tolist())
        late, gone = min(every - core), min(set(range(100)) - every)
        rows = cls._decoded([late] * 4)
        before, after = (late in rows[step][0].tolist() for step in (1, 3))
        never = any(gone in read.tolist() for read, _ in cls._decoded([gone] * 7))
        return Finding(
            not before and after and not never, f"token {late} is core once step 3 asked for it, token {gone} never"
        )


class _Watched(ByModality):
    """Notes what each step reads of the image, and what is core before it."""

    def __init__(self, rule: AVL, found: list[list[Tensor]]) -> None:
        super().__init__(rule)
        self.found = found

    def select(self, step: Stored) -> Tokens | None:
        read, kind, at = self.read(step), step.columns[0, 0, :, 1], step.positions[0, 0]
        seen = kind > TEXT if read is None else (kind > TEXT) & read[0, 0]
        self.found.append([at[seen], at[kind == CORE]])
        return super().select(step)
