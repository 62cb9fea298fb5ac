"""Pages in few bits: codes on a grid, the grid's zero and step beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.frames import Frames
from saccade.cache.layered import LayeredPool
from saccade.cache.policy import Policy
from saccade.cache.pool import PagePool, Reading, Storage
from saccade.cache.rows import ragged, sent
from saccade.cache.session import Session
from saccade.cache.store import Store
from saccade.cache.view import Stored
from saccade.cache.wrapped import Wrapped
from saccade.errors import known, positive
from saccade.softmax import Pages
from saccade.softmax.page_rows import Found
from saccade.softmax.paged import CodedFrames, Codes, has_kernels, reads_codes

SCRATCH = 1 << 24  # numbers of k and v that are decoded at once
WIDEST_CODED = 128  # channels of codes that a kernel reads
AXES = ("channel", "token")


@dataclass(frozen=True)
class Grid:
    """Equal steps between the least and the largest number of a group.

        code = round((x - zero) / step), x' = zero + step code, zero = min x, step >= (max x - zero) / (2^bits - 1)

    |x - x'| <= step / 2, but for the rounding of x' itself; numbers that lie on the grid come back as they were. zero
    is one of the numbers, in their dtype; step is the least number of its own dtype that reaches the largest: bfloat16
    for 16-bit numbers, which does not underflow where they are small, else their dtype.

    x (n, page, D): pages of tokens. along: "channel", a group is a channel of a page; "token", it is `group` channels
    of a token, the last group of a token as many as are left. bits: 8, or 4, two codes a byte. codes uint8 (n, page, D)
    or (n, page, ceil(D / 2)); zero, step (n, 1, D) or (n, page, ceil(D / group)).

    >>> grid = Grid(4, "channel", 32)
    >>> x = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 6)
    >>> codes, zero, step = grid.encode(x)
    >>> codes.shape, bool((grid.decode(codes, zero, step, 6) == x).all())
    (torch.Size([1, 16, 3]), True)
    """

    bits: int
    along: str
    group: int

    def widths(self, dim: int) -> tuple[int, int]:
        """Bytes of codes a token, and groups, of D = dim channels."""
        return -(-dim * self.bits // 8), dim if self.along == "channel" else -(-dim // self.group)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, zero, step) of x (n, page, D)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        levels = 2**self.bits - 1
        low, high = -self._most(-wide), self._most(wide)
        small = torch.bfloat16 if x.element_size() == 2 else x.dtype
        step = ((high - low) / levels).to(small)
        short = step.to(wide.dtype) * levels < high - low
        step = torch.where(short, step * (1 + torch.finfo(small).eps), step)
        codes = (wide - self._spread(low, x.shape[2])) / self._spread(step.to(wide.dtype), x.shape[2])
        codes = codes.nan_to_num(0).round().clamp(0, levels).to(torch.uint8)  # a group of equal numbers has step 0
        if self.bits == 4:
            even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
            codes = even[..., ::2] | even[..., 1::2] << 4
        return codes, low.to(x.dtype), step

    def decode(self, codes: Tensor, zero: Tensor, step: Tensor, dim: int) -> Tensor:
        """x' (..., D) of codes (..., bytes) beside zero and step (..., groups), in zero's dtype."""
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :dim]
        wide = torch.promote_types(zero.dtype, torch.float32)
        x = self._spread(zero.to(wide), dim) + self._spread(step.to(wide), dim) * codes
        return x.to(zero.dtype)

    def _most(self, x: Tensor) -> Tensor:
        """The largest number of each group."""
        if self.along == "channel":
            return x.amax(1, keepdim=True)
        padded = torch.nn.functional.pad(x, (0, -x.shape[2] % self.group), value=-torch.inf)
        return padded.unflatten(2, (-1, self.group)).amax(-1)

    def _spread(self, x: Tensor, dim: int) -> Tensor:
        """Numbers of groups, for each channel."""
        return x if self.along == "channel" else x.repeat_interleave(self.group, -1)[..., :dim]


class CodedPool(LayeredPool):
    """A pool of which some pages are codes (`seal`); what is written to must be in full precision (`opened`).

    grids: of k and of v. The others are as in `PagePool`. Reading takes both kinds of memory and waits for no device;
    opening and sealing pages ask it which are codes.
    """

    def __init__(self, dim: int, value_dim: int | None = None, *, grids: tuple[Grid, Grid], **options: Any) -> None:
        self.grids = dict(zip(("k", "v"), grids, strict=True))
        super().__init__(dim, value_dim, **options)
        self.opens = 0  # how often codes may have been opened

    def _laid(self, pages: dict[str, Tensor]) -> dict[str, Tensor]:
        laid, codes = super()._laid(pages), {}
        for name, x in pages.items():
            grid = self.grids[name]
            width, groups = grid.widths(x.shape[3])
            beside = 1 if grid.along == "channel" else x.shape[2]
            small = torch.bfloat16 if x.element_size() == 2 else x.dtype
            codes[f"{name}_codes"] = x.new_zeros(0, x.shape[2], width, dtype=torch.uint8)
            codes[f"{name}_zero"] = x.new_zeros(0, beside, groups)
            codes[f"{name}_step"] = x.new_zeros(0, beside, groups, dtype=small)
        self.cold = Frames(codes)
        self.cold.take(1)
        return laid | {"cold_at": torch.zeros_like(laid["hot_at"])}

    @property
    def cold_at(self) -> Tensor:
        """(P,) int64: where the codes of a page lie, 0 for none."""
        return self.frames["cold_at"]

    @property
    def num_coded(self) -> int:
        """Pages that are codes."""
        return self.cold.in_use - 1

    @property
    def guarded(self) -> bool:
        return self.shared or self.num_coded > 0

    def take(self, count: int) -> Tensor:
        ids = super().take(count)
        self.hot_at[ids] = self.hot.take(count)
        self.cold_at.index_fill_(0, ids, 0)
        return ids

    def opened(self, ids: Tensor) -> Tensor:
        ids = self.own(ids)
        coded = ids[self.cold_at[ids] > 0].unique()
        if len(coded):
            self.opens += 1
            k, v = (self.pages(name, coded) for name in ("k", "v"))
            self.cold.release(self.cold_at[coded])
            self.cold_at.index_fill_(0, coded, 0)
            self.hot_at[coded] = self.hot.take(len(coded))
            self.hot["k"][self.hot_at[coded]], self.hot["v"][self.hot_at[coded]] = k, v
        return ids

    def _copy(self, new: Tensor, old: Tensor) -> None:
        super()._copy(new, old)  # in full precision
        self.opens += 1

    def seal(self, ids: Tensor) -> None:
        """Make pages of one owner codes; those that are already stay as they are."""
        ids = ids[self.cold_at[ids] == 0]
        if not len(ids):
            return
        hot, cold = self.hot_at[ids], self.cold.take(len(ids))
        for name, grid in self.grids.items():
            for kind, x in zip(("codes", "zero", "step"), grid.encode(self.hot[name][hot, 0]), strict=True):
                self.cold[f"{name}_{kind}"][cold] = x
        self.hot.release(hot)
        self.hot_at.index_fill_(0, ids, 0)
        self.cold_at[ids] = cold
        for frames, at in ((self.hot, self.hot_at), (self.cold, self.cold_at)):
            self._tighten(frames, at)

    def pages(self, name: str, ids: Tensor) -> Tensor:
        """k or v of whole pages: (n, 1, page, D)."""
        return self.read(name, ids[:, None], torch.arange(self.page, device=ids.device))[:, None]

    def read(self, name: str, page: Tensor, offset: Tensor) -> Tensor:
        found = self.hot[name][self.hot_at[page], 0, offset]
        if not self.num_coded:
            return found
        grid, at = self.grids[name], self.cold_at[page]
        beside = torch.zeros_like(offset) if grid.along == "channel" else offset
        zero, step = (self.cold[f"{name}_{kind}"][at, beside] for kind in ("zero", "step"))
        coded = grid.decode(self.cold[f"{name}_codes"][at, offset], zero, step, self.dims[name])
        return torch.where((at > 0)[..., None], coded, found)

    def write(self, name: str, page: Tensor, offset: Tensor, values: Any) -> None:
        self.hot[name][self.hot_at[page], 0, offset] = values

    def reading(self, table: Tensor, lengths: Tensor, chosen: Tensor | None, found: Found) -> Reading:
        if not self.num_coded:
            yield Pages(self.hot["k"], self.hot["v"], self.hot_at[table.long()].int(), lengths, found), chosen
        elif (pages := self._in_codes(self.page, table, lengths, found)) is not None:
            yield pages, chosen
        else:
            yield from self._decoded(table, lengths, chosen)

    def reading_tokens(self, places: Tensor, lengths: Tensor) -> Pages:
        pages = self._in_codes(1, places, lengths, Found()) if self.num_coded else None
        return super().reading_tokens(places, lengths) if pages is None else pages

    def _in_codes(self, page: int, table: Tensor, lengths: Tensor, found: Found) -> Pages | None:
        """Pages of `page` tokens as they lie, for kernels that read codes; None where there are none."""
        if not has_kernels(table.device) or torch.is_grad_enabled():
            return None
        k, v = (self.hot[name].view(-1, 1, page, self.dims[name]) for name in ("k", "v"))
        coded = CodedFrames(self._codes("k"), self._codes("v"), self.hot_at, self.cold_at)
        pages = Pages.trusted(k, v, table, lengths, found, coded)
        # Of wider heads and of float32 a chip keeps most in local memory: there decoding first is no slower.
        spills = table.is_cuda and (self.hot["k"].element_size() > 2 or max(self.dims.values()) > WIDEST_CODED)
        return pages if reads_codes(pages) and not spills else None

    def _codes(self, name: str) -> Codes:
        grid = self.grids[name]
        codes, zero, step = (self.cold[f"{name}_{kind}"] for kind in ("codes", "zero", "step"))
        return Codes(codes, zero, step, grid.bits, 0 if grid.along == "channel" else grid.group)

    def _decoded(self, table: Tensor, lengths: Tensor, chosen: Tensor | None) -> Iterator[tuple[Pages, Tensor]]:
        """Full-precision copies of the chosen pages, at most `SCRATCH` numbers at a time."""
        (rows, width), numbers = table.shape, self.page * sum(self.dims.values())
        logical = torch.arange(width, device=table.device).expand(rows, 1, -1) if chosen is None else chosen.long()
        for part in logical.split(max(1, SCRATCH // (rows * numbers)), 2):
            ids = table.long().gather(1, part[:, 0].clamp(min=0))
            k, v = (self.pages(name, ids.flatten()) for name in ("k", "v"))
            place = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
            copies = place.new_zeros(rows, width + 1)  # the last column is of no page
            copies = copies.scatter(1, torch.where(part[:, 0] < 0, width, part[:, 0]), place)
            yield Pages(k, v, copies[:, :width], lengths), part.int()

    def _forget(self, ids: Tensor) -> None:
        hot, cold = self.hot_at[ids], self.cold_at[ids]
        if self.num_coded:
            self.cold.release(cold[cold > 0])
            hot = hot[hot > 0]
        self.hot.release(hot)
        for at in (self.hot_at, self.cold_at):
            at.index_fill_(0, ids, 0)

    def _tighten(self, frames: Frames, at: Tensor) -> None:
        """Give the memory of free frames back, where they are a fifth or more."""
        if 5 * frames.in_use > 4 * len(frames):
            return
        pages = (at > 0).nonzero()[:, 0]
        frames.shrink(torch.cat([at.new_zeros(1), at[pages]]))
        at[pages] = torch.arange(1, len(pages) + 1, device=at.device)

    def shrink(self, ids: Tensor) -> None:
        super().shrink(ids)
        for frames, at in ((self.hot, self.hot_at), (self.cold, self.cold_at)):
            self._tighten(frames, at)


@dataclass(frozen=True)
class Coded(Storage):
    """Pages that may be codes. keys, values: their grids."""

    keys: Grid
    values: Grid

    def pool(self, dim: int, value_dim: int, **options: Any) -> PagePool:
        return CodedPool(dim, value_dim, grids=(self.keys, self.values), **options)


class Quantized(Wrapped):
    """A policy whose older pages are kept in 8 or 4 bits: KIVI's layout (arXiv 2402.02750, section 3) on any policy.

        a full page, behind which `residual` tokens came, is coded (`Grid`): keys by channel, values by token

    A step reads what the codes stand for. policy: what is kept and read. bits: 8 or 4 (4). residual: tokens at the end
    of every row that stay in full precision, at least (128). keys: "channel", a group is one channel of a page, or
    "token", as values. group: channels of one token that share zero and step (32).

    Taken from the paper: zero and step a group, its minimum and its range; keys by channel, values by token; recent
    tokens as they came. Deviations: the paper's groups of 32 tokens are pages here, of `policy.page` tokens; its keys
    wait until 128 have come and are coded together, its values one by one; here both a page at a time. Its 2 bits are
    not offered. A prompt is coded after its attention, so that it needs full precision once, a layer or, where
    sessions decide over layers, all. A page that is written to again, because a token in it was dropped, is opened into
    full precision and coded anew, at up to half a step more: a policy that drops tokens while decoding does better with
    keys by token. A page that another session holds too is copied first.

    Memory of a coded page, in bits a number of 16: bits + 32 / page for keys, bits + 32 / group for values, and 4 bytes
    a token. Costs: on a GPU, without gradients, a step reads those bytes of what is chosen, in 16 bits and up to 128
    channels, where a token has whole words of 32 bits and `group` is a power of two, of a word at least; elsewhere the
    chosen pages are decoded into at most 2^24 numbers of scratch at a time. Pages are looked through, which waits for
    the device, once every `policy.page` steps, and at steps that drop a token. Errors: ValueError for other bits, and
    for a policy that has a storage of its own.

    >>> from saccade.cache import Quest
    >>> session, x = Session(Quantized(Quest(64), bits=4, residual=16)), torch.randn(1, 2, 600, 64)
    >>> plain = Session(Quest(64))
    >>> for each in (session, plain):
    ...     o = [each.attend(0, *[x[:, :, a:b]] * 3) for a, b in ((0, 599), (599, 600))]
    >>> session.store(0).pool.nbytes * 3 < plain.store(0).pool.nbytes
    True
    """

    def __init__(
        self, policy: Policy, bits: int = 4, *, residual: int = 128, keys: str = "channel", group: int = 32
    ) -> None:
        super().__init__(policy)
        if bits not in (4, 8):
            raise ValueError(f"bits: got {bits}; pass 8 or 4")
        known("keys", keys, AXES)
        self.bits, self.residual = bits, positive("residual", residual, least=0)
        group = positive("group", group)
        self.storage = Coded(Grid(bits, keys, group), Grid(bits, "token", group))

    def settle(self, session: Session) -> None:
        self.policy.settle(session)
        for index in range(session.num_layers):
            self._seal(session.store(index))

    def after(self, step: Stored) -> None:
        self.policy.after(step)
        self._seal(step.stored)

    def _seal(self, store: Store) -> None:
        """Code what is old enough."""
        pool = store.pool
        assert isinstance(pool, CodedPool)
        old = (store.counts - self.residual).clamp(min=0) // store.page
        # On the host, with the sequences: what was coded when this was last asked.
        now = torch.cat([old, torch.full((store.batch, 1), pool.opens)], 1)
        if "coded" in store.notes and torch.equal(store.notes["coded"], now):
            return
        store.note("coded", now)
        row, col = (sent(x, store.lengths) for x in ragged(old.flatten()))
        fresh = pool.cold_at[store.table[row, col].long()] == 0
        row, col = row[fresh], col[fresh]
        if pool.shared:
            store._own_places(row, col)
        pool.seal(store.table[row, col].long())

    def __repr__(self) -> str:
        return f"Quantized({self.policy}, bits={self.bits}, residual={self.residual})"
