"""From a Plan to pieces of work: which queries meet which keys, as small dense products.

A row of long lists is a piece: its query tile against all its key tiles, in one slice where these adjoin. Where query
tiles are so small that a product with one of them would starve the processor, the lists are read the other way round: a
key tile gathers its queries. Lists of single keys are batched, many query tiles a piece. Whatever the way, a piece is
(queries, keys, mask), and its partial result merges with the others by its log-sum-exp."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.softmax.lists import turned
from saccade.where import Plan

LEAST_ROWS = 16  # query tiles smaller than this are gathered by key tile
MOST_SCORES = 2**20  # scores that one piece forms, over all its heads
FEW_TILES = 24  # a row with more tiles computes its full ones apart, which need no mask
KEPT_MASKS = 2**26  # mask entries that a schedule remembers


@dataclass(frozen=True)
class Batch:
    """Heads that follow the same lists: `pairs` over (batch, key head), `members` over the query heads of a pair;
    slices both.
    """

    group: int
    pairs: slice
    members: slice


@dataclass(frozen=True, eq=False)
class Piece:
    """One product. rows: queries, a slice or int64 (R, bq); keys: a slice or int64 (R, L), -1 for padding.

    alone: no other piece has these rows. cut: some pair is masked, or weighted. bits: the mask where boxes do not give
    it, bool (bq, L). log_weights: (R, L), added to the scores, or None."""

    rows: slice | Tensor
    keys: slice | Tensor
    alone: bool
    cut: bool
    bits: Tensor | None = None
    log_weights: Tensor | None = None


class Mask(NamedTuple):
    """What to add to the scores of a piece, (R, bq, L): 0 or a log weight where allowed, -inf elsewhere.

    blind: bool (R, bq), the queries that see none of these keys; None when every one sees some.
    """

    added: Tensor
    blind: Tensor | None


@dataclass(eq=False)
class Schedule:
    """The pieces of a plan for `batch` sequences and `num_kv_heads` key heads.

    whole: keep every row in one piece, for normalisers that must see all scores of a row at once.
    """

    plan: Plan
    batch: int
    num_kv_heads: int
    whole: bool = False
    batches: list[Batch] = field(init=False)
    _pieces: dict[int, list[Piece]] = field(init=False, default_factory=dict)
    _masks: dict[object, Mask | None] = field(init=False, default_factory=dict)
    _shapes: dict[object, tuple[bool, bool]] = field(init=False, default_factory=dict)
    _room: int = field(init=False, default=KEPT_MASKS)

    def __post_init__(self) -> None:
        self.batches = list(_batches(self.plan.group_of.expand(self.batch, -1), self.num_kv_heads))

    @classmethod
    def of(cls, plan: Plan, batch: int, num_kv_heads: int, whole: bool = False) -> Schedule:
        """The schedule of a plan, kept with it."""
        key = (cls, batch, num_kv_heads, whole)
        return plan.derive(key, lambda: cls(plan, batch, num_kv_heads, whole))

    def pieces(self, batch: Batch) -> list[Piece]:
        """The pieces of the lists that a batch of heads follows."""
        if batch.group not in self._pieces:
            heads = self.batch * self.plan.num_heads
            if self.whole or self.plan.block[0] >= LEAST_ROWS:
                self._pieces[batch.group] = list(self._by_row(batch.group, heads))
            else:
                self._pieces[batch.group] = [*self._by_column(batch.group, heads), *self._by_token(batch.group, heads)]
        return self._pieces[batch.group]

    def mask(self, batch: Batch, piece: Piece, dtype: torch.dtype) -> Mask | None:
        """The mask of a piece, or None when it adds nothing."""
        if not piece.cut:
            return None
        if (piece, dtype) in self._masks:
            return self._masks[piece, dtype]
        rows, keys = (positions(tokens, self.plan.device) for tokens in (piece.rows, piece.keys))
        if piece.bits is not None:
            allowed = piece.bits[None]
        else:
            union = self.plan.union_of[batch.group].expand(len(keys))
            allowed = self.plan.boxes.allowed(union, rows, keys.clamp(min=0)) & (keys >= 0)[:, None]
        known = (piece, dtype) in self._shapes  # there was no room for its mask, which is formed again, not asked
        if not known:
            self._shapes[piece, dtype] = bool(allowed.all()), not bool(allowed.any(-1).all())
        whole, blind = self._shapes[piece, dtype]
        if piece.log_weights is None and whole:
            self._masks[piece, dtype] = None
            return None
        added = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        if piece.log_weights is not None:
            added += piece.log_weights[:, None].to(dtype)
        added.masked_fill_(~allowed, -torch.inf)
        mask = Mask(added, ~allowed.any(-1) if blind else None)
        return mask if known else self._keep((piece, dtype), mask)

    def _keep(self, key: object, mask: Mask) -> Mask:
        """Remember a mask while there is room; equal masks (a window has one for all its rows) are kept once."""
        content = (mask.added.shape, mask.added.dtype, hash(mask.added.cpu().numpy().tobytes()))
        same = self._masks.get(content)
        if same is not None and same.added.equal(mask.added):
            mask = same
        elif mask.added.numel() <= self._room:
            self._room -= mask.added.numel()
            self._masks[content] = mask
        else:
            return mask
        self._masks[key] = mask
        return mask

    def _by_row(self, group: int, heads: int) -> Iterator[Piece]:
        plan, (bq, bk) = self.plan, self.plan.block
        num_rows, n, m = plan.num_row_tiles, plan.num_queries, plan.num_keys
        first = group * num_rows
        ptr = plan.indptr[first : first + num_rows + 1].tolist()
        tiles = plan.indices[ptr[0] : ptr[-1]].tolist()
        num_full = plan.num_full[first : first + num_rows].tolist()
        most = max(1, MOST_SCORES // (heads * bq * bk))
        partial = self._partial_before(first)
        for row in range(num_rows):
            rows = slice(row * bq, min((row + 1) * bq, n))
            listed = tiles[ptr[row] - ptr[0] : ptr[row + 1] - ptr[0]]
            full, rest = listed[: num_full[row]], listed[num_full[row] :]
            bits = None if plan.bits is None else dict(zip(rest, plan.bits[partial : partial + len(rest)], strict=True))
            partial += len(rest)
            tokens, weights = self._tokens(first + row)
            if self.whole or len(listed) <= min(FEW_TILES, most):
                parts = [(sorted(listed), tokens)] if listed or len(tokens) else []
            else:
                apart = [part[at : at + most] for part in (full, rest) for at in range(0, len(part), most)]
                parts = [(part, tokens[:0]) for part in apart] + ([([], tokens)] if len(tokens) else [])
            cut = set(rest)
            for part, single in parts:
                own = None if bits is None else self._assemble(part, bits, cut, rows, m)
                keys = _keys(part, single, bk, m, plan.device)
                log_weights = None
                if len(single) and weights is not None:
                    log_weights = torch.nn.functional.pad(weights, (_width(keys) - len(single), 0))[None]
                yield Piece(
                    rows, keys, len(parts) == 1, bool(len(single)) or not cut.isdisjoint(part), own, log_weights
                )

    def _by_column(self, group: int, heads: int) -> Iterator[Piece]:
        plan, (bq, bk) = turned(self.plan), self.plan.block
        within = torch.arange(bq, device=plan.device)
        most = max(1, MOST_SCORES // (heads * bq * bk))
        first = group * plan.num_row_tiles
        ptr = plan.indptr[first : first + plan.num_row_tiles + 1].tolist()
        num_full = plan.num_full[first : first + plan.num_row_tiles].tolist()
        full_lists = int(plan.num_full[:first].sum())
        partial = ptr[0] - full_lists
        for col in range(plan.num_row_tiles):
            keys = slice(col * bk, min((col + 1) * bk, plan.num_keys))
            tiles = plan.indices[ptr[col] : ptr[col + 1]].long()
            for cut, part in ((False, tiles[: num_full[col]]), (True, tiles[num_full[col] :])):
                for some in part.split(most) if len(part) else ():
                    rows = (some[:, None] * bq + within).flatten()
                    inside = rows < plan.num_queries
                    bits = None
                    if cut and plan.bits is not None:
                        bits = plan.bits[partial : partial + len(some)].flatten(0, 1)[inside][
                            :, : keys.stop - keys.start
                        ]
                    partial += len(some) * cut
                    yield Piece(rows[inside][None], keys, False, cut, bits)

    def _by_token(self, group: int, heads: int) -> Iterator[Piece]:
        plan, bq = self.plan, self.plan.block[0]
        if plan.token_indices is None or plan.token_indptr is None:
            return
        first, whole = group * plan.num_row_tiles, plan.num_queries // bq
        counts = plan.token_indptr.diff()[first : first + plan.num_row_tiles]
        start = plan.token_indptr[first : first + plan.num_row_tiles]
        longest = int(counts.max())
        most = max(1, MOST_SCORES // max(1, heads * longest * bq))
        listed = torch.nonzero(counts)[:, 0]
        for some in (*listed[listed < whole].split(most), listed[listed >= whole]):
            if not len(some):
                continue
            width = torch.arange(int(counts[some].max()), device=plan.device)
            valid = width < counts[some, None]
            at = (start[some, None] + width).clamp(max=len(plan.token_indices) - 1)
            keys = plan.token_indices[at].long().masked_fill(~valid, -1)
            weights = None if plan.token_log_weights is None else plan.token_log_weights[at].masked_fill(~valid, 0)
            rows = some[:, None] * bq + torch.arange(bq, device=plan.device)
            rows = rows[:, : plan.num_queries - int(rows[0, 0])]
            yield Piece(rows, keys, False, True, None, weights)

    def _tokens(self, row: int) -> tuple[Tensor, Tensor | None]:
        """Single keys of a list and their log weights."""
        plan = self.plan
        if plan.token_indices is None or plan.token_indptr is None:
            return torch.zeros(0, dtype=torch.int64, device=plan.device), None
        at = slice(int(plan.token_indptr[row]), int(plan.token_indptr[row + 1]))
        return plan.token_indices[at].long(), None if plan.token_log_weights is None else plan.token_log_weights[at]

    def _partial_before(self, row: int) -> int:
        """Partial tiles in the lists before `row`."""
        return int(self.plan.indptr[row]) - int(self.plan.num_full[:row].sum())

    def _assemble(self, tiles: list[int], bits: dict[int, Tensor], cut: set[int], rows: slice, m: int) -> Tensor:
        bq, bk = self.plan.block
        whole = torch.ones(bq, bk, dtype=torch.bool, device=self.plan.device)
        parts = [(bits[tile] if tile in cut else whole)[:, : m - tile * bk] for tile in tiles]
        return torch.cat(parts, 1)[: rows.stop - rows.start] if parts else whole[:, :0]


def positions(tokens: slice | Tensor, device: torch.device) -> Tensor:
    """A slice of tokens as int64 (1, L) on a device; tensors pass."""
    return torch.arange(tokens.start, tokens.stop, device=device)[None] if isinstance(tokens, slice) else tokens


def _width(keys: slice | Tensor) -> int:
    return keys.stop - keys.start if isinstance(keys, slice) else keys.shape[1]


def _keys(tiles: list[int], tokens: Tensor, bk: int, m: int, device: torch.device) -> slice | Tensor:
    """The keys of ascending tiles, then single ones: a slice where the tiles adjoin and nothing follows."""
    if tiles and not len(tokens) and tiles[-1] - tiles[0] == len(tiles) - 1:
        return slice(tiles[0] * bk, min((tiles[-1] + 1) * bk, m))
    inside = torch.tensor(tiles, dtype=torch.int64, device=device)[:, None] * bk + torch.arange(bk, device=device)
    inside = inside.flatten()
    return torch.cat([inside[inside < m], tokens])[None]


def _batches(group_of: Tensor, num_kv_heads: int) -> Iterator[Batch]:
    """Heads by list group, as regular slices, so that they are read and written in place."""
    ratio = group_of.shape[1] // num_kv_heads
    lists: dict[int, dict[int, list[int]]] = {}
    for at, group in enumerate(group_of.flatten().tolist()):
        lists.setdefault(group, {}).setdefault(at // ratio, []).append(at % ratio)
    for group, pairs in lists.items():
        alike = len({tuple(members) for members in pairs.values()}) == 1
        regular, members = _slice(list(pairs)), _slice(next(iter(pairs.values())))
        if alike and regular is not None and members is not None:
            yield Batch(group, regular, members)
            continue
        for pair, each in pairs.items():
            together = _slice(each)
            for part in [together] if together is not None else [slice(e, e + 1) for e in each]:
                yield Batch(group, slice(pair, pair + 1), part)


def _slice(numbers: list[int]) -> slice | None:
    """The slice that lists ascending numbers, if they are evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = all(b - a == step for a, b in itertools.pairwise(numbers))
    return slice(numbers[0], numbers[-1] + 1, step) if even else None
