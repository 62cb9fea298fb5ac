"""Plan: the data that a pattern or a router produces and that every backend eats."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from saccade.where.boxes import Boxes
from saccade.where.grid import Grid
from saccade.where.query_lists import QueryLists

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Plan:
    """Which tiles of the N x M score matrix to compute, and what to mask inside them.

    Query row i attends key j when its group lists (tile of i, j's tile) or (tile of i, j), and the boxes allow (i, j).
    Full tiles need no mask. Listed single keys (`tokens`) come on top of the tiles; a key listed twice counts twice.

    boxes: box tables (unions S). group_of: (1, H) or (B, H) int64, the list group g of each batch entry and query head.
    union_of: (G,) int64, the union of boxes that each group obeys. block: (bq, bk) tokens a tile.
    indptr: (G * rows + 1,) int64, indices: (num_tiles or more,) int32: CSR lists of key tiles per (group, query tile),
    full tiles first, each part ascending; num_full: (G * rows,) int32. On a GPU the host does not wait to learn how
    many there are: `indices` may be longer than indptr[-1], and what follows there means nothing.
    token_indptr, token_indices, token_log_weights: CSR lists of single keys, or None, with room to spare as in
    `indices`; token_num_full: (G * rows,) int32, how many keys at the head of each list all queries of the tile may
    see, or None for none; token_grid: the keys of each list come in cells of this grid, bk each, row-major, each
    anywhere on it, or None. bits: (partial tiles in list order, bq, bk) bool in place of the boxes for what no box
    describes, or None.
    by_key: the same pairs by key tile, beside token lists that hold every pair (`Pattern.gathered`), or None.
    q_order, k_order: (N,), (M,) int64, the plan's token order (position p holds token order[p]), or None.
    causal: no listed pair looks ahead, so density counts against the causal triangle.
    grid: the grid that key tiles are cells of, where the boxes' axes are its axes, or None.
    alike: query heads follow the same lists in runs of so many, as the host knows without reading group_of.
    transposed: the lists run per key tile over query tiles instead (dk and dv want that).

    Plans come from `Pattern.plan`, from routers, or from `Plan.from_mask`.
    """

    boxes: Boxes
    group_of: Tensor
    union_of: Tensor
    block: tuple[int, int]
    indptr: Tensor
    indices: Tensor
    num_full: Tensor
    token_indptr: Tensor | None = None
    token_indices: Tensor | None = None
    token_log_weights: Tensor | None = None
    token_num_full: Tensor | None = None
    token_grid: Grid | None = None
    by_key: QueryLists | None = None
    bits: Tensor | None = None
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    causal: bool = False
    grid: Grid | None = None
    alike: int = 1
    transposed: bool = False

    @classmethod
    def empty(cls, boxes: Boxes, group_of: Tensor, block: tuple[int, int], **rest: Any) -> Plan:
        """A plan that lists no tile."""
        none = torch.zeros(0, dtype=torch.int64, device=group_of.device)
        return cls(boxes, group_of, none, block, none.new_zeros(1), none.int(), none.int(), **rest)

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int] = (64, 64)) -> Plan:
        """The plan of an explicit mask, bool (H, N, M); partial tiles keep their bits.

        For patterns that no box describes, at sizes where the mask itself fits in memory.
        """
        if mask.ndim != 3 or mask.dtype != torch.bool:
            raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}; pass bool (heads, queries, keys)")
        heads, n, m = mask.shape
        bq, bk = block
        padded = torch.nn.functional.pad(mask, (0, -m % bk, 0, -n % bq))
        tiled = padded.unflatten(2, (-1, bk)).unflatten(1, (-1, bq)).transpose(2, 3)
        group, row, col = torch.nonzero(tiled.any((3, 4)), as_tuple=True)
        bits = tiled[group, row, col]
        plan = cls.empty(Boxes.of([[{}]], n, m, mask.device), torch.arange(heads, device=mask.device)[None], block)
        causal = not bool(mask.triu(1 + m - n).any())
        plan = replace(plan, causal=causal)
        full = bits.all((1, 2))
        rows = group * plan.num_row_tiles + row
        plan = plan.listing(rows, col, full, union_of=torch.zeros(heads, dtype=torch.int64, device=mask.device))
        keep = ~full | plan._ragged(col)
        at = torch.argsort(rows[keep] * plan.num_col_tiles + col[keep])
        return replace(plan, bits=bits[keep][at])

    def listing(self, rows: Tensor, cols: Tensor, full: Tensor, *, union_of: Tensor) -> Plan:
        """This plan with the given tile pairs; rows count on through the groups.

        A tile that juts out over the last key is never full.
        """
        full = full & ~self._ragged(cols)
        code = (rows * 2 + ~full) * self.num_col_tiles + cols
        code = code.sort().values
        num_rows = len(union_of) * self.num_row_tiles
        cols, rest = code % self.num_col_tiles, code // self.num_col_tiles
        partial, rows = rest % 2, rest // 2
        indptr = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
        indptr[1:] = torch.bincount(rows, minlength=num_rows).cumsum(0)
        num_full = torch.bincount(rows[partial == 0], minlength=num_rows).int()
        return replace(self, indptr=indptr, indices=cols.int(), num_full=num_full, union_of=union_of)

    def with_tokens(self, tokens: Tensor, log_weights: Tensor | None = None) -> Plan:
        """This plan with single keys on top: tokens (G, rows, K) int, -1 for none, or marks (G, rows, M) bool.

        log_weights: like tokens, added to the scores. Of marks only a GPU knows how many there are, and the host waits
        to learn it; for numbers it sets aside room for all.
        """
        flat = tokens.flatten(0, 1)
        listed = flat if flat.dtype == torch.bool else flat >= 0
        indptr = torch.zeros(len(flat) + 1, dtype=torch.int64, device=tokens.device)
        indptr[1:] = listed.sum(1).cumsum(0)
        counted = flat.dtype == torch.bool or tokens.device.type == "cpu"
        at = listed.flatten().nonzero()[:, 0] if counted else _in_front(listed.flatten())
        indices = at % flat.shape[1] if flat.dtype == torch.bool else flat.flatten()[at]
        weights = None if log_weights is None else log_weights.flatten()[at]
        return replace(
            self,
            token_indptr=indptr,
            token_indices=indices.int(),
            token_log_weights=weights,
            token_num_full=None,
            token_grid=None,
            by_key=None,
        )

    @property
    def num_queries(self) -> int:
        return self.boxes.num_queries

    @property
    def num_keys(self) -> int:
        return self.boxes.num_keys

    @property
    def num_heads(self) -> int:
        return self.group_of.shape[1]

    @property
    def num_groups(self) -> int:
        return len(self.union_of)

    @property
    def num_row_tiles(self) -> int:
        """Query tiles (key tiles when transposed)."""
        return -(-self.num_keys // self.block[1]) if self.transposed else -(-self.num_queries // self.block[0])

    @property
    def num_col_tiles(self) -> int:
        """Key tiles (query tiles when transposed)."""
        return -(-self.num_queries // self.block[0]) if self.transposed else -(-self.num_keys // self.block[1])

    @functools.cached_property
    def num_tiles(self) -> int:
        """Listed tiles, over all groups. Reading it the first time, the host waits for the device."""
        return int(self.indptr[-1])

    @functools.cached_property
    def num_tokens(self) -> int:
        """Listed single keys, over all groups. Reading it the first time, the host waits for the device."""
        return 0 if self.token_indptr is None else int(self.token_indptr[-1])

    @property
    def most_tiles(self) -> int:
        """`num_tiles` where the host knows it; else as many as there is room for, which it need not wait for."""
        known = self.device.type == "cpu" or "num_tiles" in vars(self)
        return self.num_tiles if known else len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def tensors(self) -> dict[str, Tensor]:
        """Every table by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {f"boxes.{f.name}": getattr(self.boxes, f.name) for f in fields(self.boxes)}
        own |= {} if self.by_key is None else {f"by_key.{name}": t for name, t in self.by_key.tensors().items()}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def _ragged(self, cols: Tensor) -> Tensor:
        """Which key tiles reach beyond the last key."""
        return (cols + 1) * self.block[1] > self.num_keys

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device, without room to spare."""
        boxes = Boxes(*(getattr(self.boxes, f.name).to(device) for f in fields(self.boxes)))
        own = {name: t.to(device) for name, t in self.tensors().items() if "." not in name}
        own["indices"] = self.indices[: self.num_tiles].to(device)
        for name in own.keys() & {"token_indices", "token_log_weights"}:
            own[name] = getattr(self, name)[: self.num_tokens].to(device)
        by_key = None if self.by_key is None else self.by_key.to(device)
        return replace(self, boxes=boxes, by_key=by_key, **own)  # type: ignore[arg-type]

    def rows(self) -> Tensor:
        """The list (group and row tile) of each entry of `indices`: int64 (num_tiles,)."""
        lists = torch.arange(len(self.indptr) - 1, device=self.device)
        return torch.repeat_interleave(lists, self.indptr.diff(), output_size=self.num_tiles)

    def _listed(self) -> Tensor:
        """The other side of each listed tile: int64 (num_tiles,)."""
        return self.indices[: self.num_tiles].long()

    def is_full(self) -> Tensor:
        """Which entries of `indices` are full tiles: bool (num_tiles,)."""
        rows = self.rows()
        return torch.arange(len(rows), device=self.device) - self.indptr[rows] < self.num_full[rows]

    def masks(self, chunk: int = 2**24) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The partial tiles, a chunk at a time: (group (P,), query tile (P,), key tile (P,), mask (P, bq, bk))."""
        bq, bk = self.block
        partial = torch.nonzero(~self.is_full())[:, 0]
        rows = self.rows()
        for at, part in enumerate(partial.split(max(1, chunk // (bq * bk)))):
            group, row = rows[part] // self.num_row_tiles, rows[part] % self.num_row_tiles
            col = self.indices[part].long()
            if self.transposed:
                row, col = col, row
            if self.bits is not None:
                start = at * max(1, chunk // (bq * bk))
                mask = self.bits[start : start + len(part)]
            else:
                mask = self.boxes.allowed(self.union_of[group], self._tokens_of(row, bq), self._tokens_of(col, bk))
            yield group, row, col, mask

    def _tokens_of(self, tiles: Tensor, size: int) -> Tensor:
        return tiles[:, None] * size + torch.arange(size, device=tiles.device)

    def _token_lists(self) -> tuple[Tensor, Tensor]:
        """The list of each single key, int64 (num_tokens,), and whether all queries of its tile may see the key, bool
        (num_tokens,)."""
        assert self.token_indptr is not None
        assert self.token_indices is not None
        lists = torch.arange(len(self.token_indptr) - 1, device=self.device)
        lists = torch.repeat_interleave(lists, self.token_indptr.diff(), output_size=self.num_tokens)
        if self.token_num_full is None:
            return lists, torch.zeros_like(lists, dtype=torch.bool)
        return lists, torch.arange(len(lists), device=self.device) - self.token_indptr[lists] < self.token_num_full[
            lists
        ]

    def token_masks(self, chunk: int = 2**24) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Listed single keys, a chunk at a time: (group (P,), query tile (P,), key (P,), mask (P, bq))."""
        if self.token_indices is None:
            return
        all_lists, all_full = self._token_lists()
        size, keys = max(1, chunk // self.block[0]), self.token_indices[: self.num_tokens]
        for lists, full, other in zip(*(x.split(size) for x in (all_lists, all_full, keys)), strict=True):
            if self.transposed:
                group, key, row = lists // self.num_keys, lists % self.num_keys, other.long()
            else:
                group, row, key = lists // self.num_row_tiles, lists % self.num_row_tiles, other.long()
            queries = self._tokens_of(row, self.block[0])
            mask = self.boxes.allowed(self.union_of[group], queries, key[:, None])[:, :, 0]
            yield group, row, key, mask | full[:, None] & (queries < self.num_queries)

    def dense(self) -> Tensor:
        """The mask that the lists spell out, in the tokens' own order.

        bool (H, N, M), or (B, H, N, M) when batches differ; a transposed plan gives the transposed mask. For tests and
        drawings: it forms the N x M array.
        """
        bq, bk = self.block
        nq, nk = -(-self.num_queries // bq), -(-self.num_keys // bk)
        tiled = torch.zeros(self.num_groups, nq, nk, bq, bk, dtype=torch.bool, device=self.device)
        full, rows, cols = self.is_full(), self.rows(), self._listed()
        group, row = rows // self.num_row_tiles, rows % self.num_row_tiles
        if self.transposed:
            row, cols = cols, row
        tiled[group[full], row[full], cols[full]] = True
        for g, r, c, mask in self.masks():
            tiled[g, r, c] = mask
        flat = tiled.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        for g, r, key, mask in self.token_masks():
            tokens = self._tokens_of(r, bq)
            flat[g[:, None], tokens, key[:, None]] |= mask  # a key listed twice writes the same bits twice
        flat = flat[:, : self.num_queries, : self.num_keys]
        for dim, permutation in ((1, self.q_order), (2, self.k_order)):
            if permutation is not None:
                flat = torch.empty_like(flat).index_copy_(dim, permutation, flat)
        out = flat[self.group_of]
        out = out[0] if out.shape[0] == 1 else out
        return out.transpose(-1, -2) if self.transposed else out

    @functools.cached_property
    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lists that come in cells of `token_grid`, cell by cell: indptr, the first key of each cell, num_full."""
        if self.token_grid is None or self.token_indptr is None or self.token_indices is None:
            raise ValueError("token_grid: the single keys of this plan come in no cells")
        size = self.block[1]
        num_full = self.num_full if self.token_num_full is None else self.token_num_full // size
        return self.token_indptr // size, self.token_indices[::size].contiguous(), num_full

    @functools.cached_property
    def derived(self) -> dict[object, Any]:
        """What backends worked out from this plan, kept with it: see `derive`."""
        return {}

    def derive(self, key: object, make: Callable[[], T]) -> T:
        """What `make` works out from this plan, the first time that it is asked for by this key.

        Not in inference mode, whose tensors would be of no use to a training that comes later.

        >>> from saccade.where import Full
        >>> plan = Full().plan(8)
        >>> plan.derive("rows", lambda: plan.num_row_tiles), plan.derive("rows", lambda: 0)
        (1, 1)
        """
        if key not in self.derived:
            with torch.inference_mode(False):
                self.derived[key] = make()
        found: T = self.derived[key]
        return found

    @functools.cached_property
    def num_attended(self) -> float:
        """Attended (query, key) pairs, averaged over heads (and batches where they differ)."""
        count = torch.zeros(self.num_groups, dtype=torch.int64, device=self.device)
        bq, _ = self.block
        rows, full = self.rows(), self.is_full()
        height = torch.full((self.num_row_tiles,), bq, device=self.device)
        col_height = torch.full((self.num_col_tiles,), bq, device=self.device)
        (col_height if self.transposed else height)[-1] -= -self.num_queries % bq
        heights = col_height[self._listed()[full]] if self.transposed else height[(rows % self.num_row_tiles)[full]]
        count.index_add_(0, rows[full] // self.num_row_tiles, heights * self.block[1])
        chunk = 2**24 if self.device.type == "cuda" else 2**18  # what a processor counts stays in its cache
        for group, _, _, mask in self.masks(chunk):
            count.index_add_(0, group, mask.sum((1, 2)))
        for group, _, _, mask in self.token_masks(chunk):
            count.index_add_(0, group, mask.sum(1))
        return float(count[self.group_of].double().mean())

    @functools.cached_property
    def num_computed(self) -> float:
        """Pairs of the listed tiles, taken whole, and of the listed single keys, averaged as `num_attended` is.

        What a backend multiplies when it computes by tile: `num_attended / num_computed` of it is of use.
        """
        count = torch.zeros(self.num_groups, dtype=torch.int64, device=self.device)
        tiles = self.indptr.diff().view(self.num_groups, -1).sum(1)
        count += tiles * (self.block[0] * self.block[1])
        if self.token_indptr is not None:
            count += self.token_indptr.diff().view(self.num_groups, -1).sum(1) * self.block[0]
        return float(count[self.group_of].double().mean())

    @property
    def density(self) -> float:
        """Attended pairs / admissible pairs: all N x M, or the causal part of them when no listed pair looks ahead."""
        n, m = self.num_queries, self.num_keys
        admissible = n * m - n * (n - 1) // 2 if self.causal else n * m
        return self.num_attended / admissible

    def transpose(self) -> Plan:
        """The same pairs, listed per key tile over query tiles; transposing twice gives this plan back, bit for bit."""
        turned = self._turned()
        if self.token_indices is None:
            return turned
        assert self.token_indptr is not None
        lists, full = self._token_lists()
        here, there = self.num_row_tiles, self.num_keys
        if self.transposed:
            here, there = self.num_keys, turned.num_row_tiles
        group, row, col = lists // here, lists % here, self.token_indices[: self.num_tokens].long()
        lists = group * there + col
        at = torch.argsort((lists * 2 + ~full) * here + row, stable=True)
        indptr = torch.zeros(self.num_groups * there + 1, dtype=torch.int64, device=self.device)
        indptr[1:] = torch.bincount(lists, minlength=self.num_groups * there).cumsum(0)
        weights = None if self.token_log_weights is None else self.token_log_weights[at]
        num_full = None
        if self.token_num_full is not None:
            num_full = torch.bincount(lists[full], minlength=self.num_groups * there).int()
        return replace(
            turned,
            token_indptr=indptr,
            token_indices=row[at].int(),
            token_log_weights=weights,
            token_num_full=num_full,
            token_grid=None,
        )

    def _turned(self) -> Plan:
        """The tiles, transposed; the host waits for nothing, unless there are bits."""
        from saccade.where.planner import kernels

        on_device = kernels(self.device.type) if self.bits is None else None
        turned = None if on_device is None else on_device.turned(self)
        if turned is not None:
            return turned
        num_lists = self.num_groups * self.num_col_tiles
        ends = torch.nn.functional.pad(self.indptr, (0, 1), value=len(self.indices))  # the room to spare is a list too
        lists = torch.arange(len(self.indptr), device=self.device)
        lists = torch.repeat_interleave(lists, ends.diff(), output_size=len(self.indices))
        num_full = torch.nn.functional.pad(self.num_full, (0, 1))
        full = torch.arange(len(lists), device=self.device) - ends[lists] < num_full[lists]
        group, row = lists // self.num_row_tiles, lists % self.num_row_tiles
        key = (group * self.num_col_tiles + self.indices) * 2 + ~full
        listed = group < self.num_groups
        key = torch.where(listed, key, 2 * num_lists)
        key, at = (key.int() if num_lists < 2**30 else key).sort(stable=True)
        starts = torch.searchsorted(key, torch.arange(2 * num_lists + 1, dtype=key.dtype, device=self.device))
        bits = self.bits
        if bits is not None:
            partial = listed & ~full
            number = torch.cumsum(partial, 0) - 1
            bits = bits[number[at][partial[at]]]
        return replace(
            self,
            indptr=starts[::2].contiguous(),
            indices=row[at].int(),
            num_full=(starts[1::2] - starts[:-1:2]).int(),
            bits=bits,
            transposed=not self.transposed,
        )

    def verify(self) -> Plan:
        """Return this plan if it is well formed, else raise ValueError naming the table and what is wrong with it."""
        lists = self.num_groups * self.num_row_tiles
        _demand_shape(self.indptr, (lists + 1,), "indptr")
        ends = self.indptr[0] == 0 and self.indptr[-1] <= len(self.indices)
        _demand(ends, "indptr", f"must run from 0 to {len(self.indices)} or less")
        lengths = self.indptr.diff()
        _demand((lengths >= 0).all(), "indptr", "must not decrease")
        _demand_shape(self.num_full, (lists,), "num_full")
        some = (self.num_full >= 0) & (self.num_full <= lengths)
        _demand(some.all(), "num_full", "exceeds the length of its list")
        listed = self._listed()
        _demand_below(listed, self.num_col_tiles, "indices")
        full = self.is_full()
        code = (self.rows() * 2 + ~full) * self.num_col_tiles + listed
        _demand((code.diff() > 0).all(), "indices", "full tiles first, each part ascending, no repeats")
        tile = self.rows() * self.num_col_tiles + listed
        _demand(len(tile.unique()) == len(tile), "indices", "a tile is listed both full and partial")
        _demand_below(self.group_of, self.num_groups, "group_of")
        runs = self.num_heads % self.alike == 0 and self.group_of.unflatten(1, (-1, self.alike)).diff(dim=2).any()
        _demand(self.num_heads % self.alike == 0 and not bool(runs), "alike", "heads of a run follow different lists")
        _demand_below(self.union_of, self.boxes.lo.shape[0], "union_of")
        cols = (self.rows() % self.num_row_tiles if self.transposed else listed)[full]
        _demand(~self._ragged(cols).any(), "num_full", "a tile beyond the last key is called full")
        if self.bits is not None:
            masks = (int((~full).sum()), *self.block)
            _demand(self.bits.shape == masks, "bits", "needs one (bq, bk) mask a partial tile")
        _demand_permutation(self.q_order, self.num_queries, "q_order")
        _demand_permutation(self.k_order, self.num_keys, "k_order")
        self._verify_tokens()
        self._verify_full()
        return self

    def _verify_tokens(self) -> None:
        if self.token_indices is None:
            for table in ("token_log_weights", "token_num_full", "token_grid", "by_key"):
                _demand(getattr(self, table) is None, table, "given without tokens")
            return
        lists = self.num_groups * (self.num_keys if self.transposed else self.num_row_tiles)
        starts = self.token_indptr
        if starts is None:
            raise ValueError(f"token_indptr: needs shape ({lists + 1},)")
        _demand_shape(starts, (lists + 1,), "token_indptr")
        rises = starts[0] == 0 and starts[-1] <= len(self.token_indices) and (starts.diff() >= 0).all()
        _demand(rises, "token_indptr", "must rise from 0 to the number of tokens or less")
        listed = self.token_indices[: self.num_tokens]
        _demand_below(listed, self.num_col_tiles if self.transposed else self.num_keys, "token_indices")
        if self.token_log_weights is not None:
            same = self.token_log_weights.shape == self.token_indices.shape
            _demand(same, "token_log_weights", "needs one weight a token")
        if self.token_num_full is not None:
            _demand_shape(self.token_num_full, (lists,), "token_num_full")
            some = (self.token_num_full >= 0) & (self.token_num_full <= starts.diff())
            _demand(some.all(), "token_num_full", "exceeds the length of its list")
        if self.token_grid is not None:
            _demand(not self.transposed, "token_grid", "given with transposed lists")
            _demand_cells(listed, starts, self.token_num_full, self.block[1], self.token_grid, "token_grid")
        if self.by_key is not None:
            self._verify_by_key(self.by_key)

    def _verify_by_key(self, found: QueryLists) -> None:
        lists = self.num_groups * found.num_tiles
        _demand_permutation(found.order, self.num_keys, "by_key.order")
        _demand_shape(found.indptr, (lists + 1,), "by_key.indptr")
        rises = found.indptr[0] == 0 and found.indptr[-1] == len(found.indices) and (found.indptr.diff() >= 0).all()
        _demand(rises, "by_key.indptr", "must rise from 0 to the number of queries listed")
        _demand_below(found.indices, self.num_queries, "by_key.indices")
        _demand_shape(found.num_full, (lists,), "by_key.num_full")
        some = (found.num_full >= 0) & (found.num_full <= found.indptr.diff())
        _demand(some.all(), "by_key.num_full", "exceeds the length of its list")
        if found.grid is not None:
            tokens = found.indices if self.q_order is None else self.q_order[found.indices.long()]
            _demand_cells(tokens, found.indptr, found.num_full, self.block[0], found.grid, "by_key.grid")

    def _verify_full(self) -> None:
        from saccade.where.planner import tile_bounds

        if self.bits is not None:
            return
        rows, cols, full = self.rows(), self._listed(), self.is_full()
        group, row = rows // self.num_row_tiles, rows % self.num_row_tiles
        if self.transposed:
            row, cols = cols, row
        for union in range(self.boxes.lo.shape[0]):
            at = full & (self.union_of[group] == union)
            _, uncut = tile_bounds(self.boxes, union, self.block).classify(row[at], cols[at])
            _demand(uncut.all(), "num_full", "a tile is called full that its boxes cut")
        if self.token_num_full is None:
            return
        assert self.token_indices is not None
        lists, full = self._token_lists()
        lists, other = lists[full], self.token_indices[: self.num_tokens][full].long()
        here = self.num_keys if self.transposed else self.num_row_tiles
        group, row, key = lists // here, lists % here, other
        if self.transposed:
            row, key = key, row
        for union in range(self.boxes.lo.shape[0]):
            at = self.union_of[group] == union
            _, uncut = tile_bounds(self.boxes, union, (self.block[0], 1)).classify(row[at], key[at])
            _demand(uncut.all(), "token_num_full", "a key is called full that the boxes hide from a query")

    def draw(self, path: str | Path, *, head: int = 0, batch: int = 0) -> Path:
        """Draw the tiles of one head, full dark and partial light, into an image file.

        Needs matplotlib: `pip install saccade[bench]`.
        """
        from saccade.where.draw import draw_plan

        return draw_plan(self, Path(path), head=head, batch=batch)

    def __repr__(self) -> str:
        size = f"{self.num_queries} x {self.num_keys}, heads {self.num_heads}, block {self.block}"
        turned = ", transposed" if self.transposed else ""
        return f"Plan({size}, groups {self.num_groups}, tiles {self.most_tiles}{turned})"


def _in_front(listed: Tensor) -> Tensor:
    """Where entries are True, ascending, then where they are not: (K,) bool -> (K,) int64; the host waits for nothing.

    >>> _in_front(torch.tensor([False, True, False, True])).tolist()
    [1, 3, 0, 2]
    """
    return (~listed).argsort(stable=True)


def _demand(ok: bool | Tensor, table: str, what: str) -> None:
    if not bool(ok):
        raise ValueError(f"{table}: {what}")


def _demand_shape(values: Tensor, shape: tuple[int, ...], table: str) -> None:
    _demand(values.shape == shape, table, f"has shape {tuple(values.shape)}, needs {shape}")


def _demand_below(values: Tensor, end: int, table: str) -> None:
    _demand(((values >= 0) & (values < end)).all(), table, f"must lie in [0, {end})")


def _demand_permutation(order: Tensor | None, size: int, table: str) -> None:
    if order is not None:
        every = torch.arange(size, device=order.device)
        _demand(order.sort().values.equal(every), table, f"is no permutation of {size} tokens")


def _demand_cells(tokens: Tensor, indptr: Tensor, num_full: Tensor | None, size: int, grid: Grid, table: str) -> None:
    whole = math.prod(grid.cell) == size and bool((indptr % size == 0).all())
    _demand(whole and (num_full is None or bool((num_full % size == 0).all())), table, f"needs whole cells of {size}")
    cells, last = tokens.long().view(-1, size), torch.ones(1, dtype=torch.bool, device=tokens.device)
    offsets = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    for axis, (length, side) in enumerate(zip(grid.lengths, grid.cell, strict=True)):
        stride = math.prod(grid.lengths[axis + 1 :])
        offsets = (offsets[:, None] + torch.arange(side, device=tokens.device) * stride).flatten()
        last = last & (cells[:, 0] // stride % length + side <= length)
    _demand(last.all() and (cells == cells[:, :1] + offsets).all(), table, "some list is not made of its cells")
