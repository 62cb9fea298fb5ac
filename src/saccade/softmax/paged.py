"""Attention of a few queries a sequence over keys and values that lie in pages: what a decoder does at every step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from saccade.errors import known, positive
from saccade.softmax.merge import absorb, merge
from saccade.softmax.normalizers import Softmax
from saccade.softmax.page_rows import Found, attend_rows
from saccade.softmax.problem import Problem
from saccade.where import Full

Chosen = Tensor | tuple[Tensor, Tensor]
BACKENDS = ("auto", "triton", "torch")
WIDEST = 256  # channels that the kernels hold
FULL, SOFTMAX = Full(), Softmax()


class Codes(NamedTuple):
    """Keys or values of C frames in few bits: x'_td = zero + step code_td.

    codes uint8 (C, tokens, bytes), two codes a byte of 4 `bits`, the first in the low ones. zero in the dtype of x',
    step: (C, tokens, groups) of each `group` channels of a token, the last one perhaps of fewer; or, where group is 0,
    (C, 1, D) of each channel of a frame. All contiguous.
    """

    codes: Tensor
    zero: Tensor
    step: Tensor
    bits: int
    group: int


class CodedFrames(NamedTuple):
    """Where pages lie of which some are codes: tables name pages that have a frame in full precision or one of codes.

    k, v: the codes. hot_at, cold_at (P,): the frame of a page among those in full precision, and among those of codes;
    0 for none, so that nothing lies in frame 0 of either.
    """

    k: Codes
    v: Codes
    hot_at: Tensor
    cold_at: Tensor

    @property
    def tokens(self) -> int:
        """Tokens a frame. Pages are frames, or, where they are shorter, pieces of frames, one after another."""
        return self.k.codes.shape[1]


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values of B sequences, in pages that lie anywhere in one store.

    k (P, Hkv, page, D), v (P, Hkv, page, Dv): what one head keeps of a page is one stretch of memory, 4 KiB of keys at
    16 tokens of 128 channels in bfloat16, so that a head which reads pages of its own reads nothing else. table (B,
    max_pages) int32: the physical page of each logical one; pages may be shared. lengths (B,) int32: tokens of each
    sequence. What lies in pages that no table names, or behind a sequence's end, reaches no result. found: what a host
    that reads these pages itself has found of the tables, for those who ask again; pages that follow these share it.
    coded: where pages lie of which some are codes; then k and v are the frames of the others, and of one key head.

    >>> k, v = torch.randn(2, 2, 3, 50, 8)
    >>> pages = Pages.of(k, v, page=16, room=14)
    >>> tuple(pages.k.shape), tuple(pages.table.shape)
    ((8, 3, 16, 8), (2, 4))
    >>> pages.append(k[:, :, :2], v[:, :, :2]).lengths
    tensor([52, 52], dtype=torch.int32)
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    found: Found = field(default_factory=Found, repr=False)
    coded: CodedFrames | None = None

    def __post_init__(self) -> None:
        for name, x in (("k", self.k), ("v", self.v)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                raise ValueError(f"{name}: got {_kind(x)}; pass (pages, key heads, tokens a page, channels)")
        if self.k.shape[:3] != self.v.shape[:3]:
            raise ValueError(
                f"v: got (pages, heads, tokens) {tuple(self.v.shape[:3])} beside k's {tuple(self.k.shape[:3])}; "
                "they must agree"
            )
        for name, x, ndim, form in (
            ("table", self.table, 2, "int32 (sequences, pages a sequence)"),
            ("lengths", self.lengths, 1, "int32 (sequences,)"),
        ):
            if not isinstance(x, Tensor) or x.ndim != ndim or x.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: got {_kind(x)}; pass {form}")
            if x.device != self.k.device:
                raise ValueError(f"{name}: got device {x.device} beside k on {self.k.device}; move it there")
        if len(self.table) != len(self.lengths):
            raise ValueError(
                f"lengths: got {len(self.lengths)} sequences beside the table's {len(self.table)}; pass one length each"
            )

    @classmethod
    def trusted(
        cls, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, found: Found, coded: CodedFrames | None = None
    ) -> Pages:
        """Pages as they are, for a store, whose tensors are right by their making: nothing is checked."""
        pages = object.__new__(cls)
        vars(pages).update(k=k, v=v, table=table, lengths=lengths, found=found, coded=coded)
        return pages

    @classmethod
    def of(cls, k: Tensor, v: Tensor, page: int = 16, lengths: Tensor | None = None, room: int = 0) -> Pages:
        """k (B, Hkv, M, D), v (B, Hkv, M, Dv) in pages of `page` tokens, with room for `room` tokens more.

        lengths: (B,) int32 <= M, the tokens that count (default: all M). Copies k and v.
        """
        page, room = positive("page", page), positive("room", room, least=0)
        _check_pair(k, v)
        (batch, _, tokens), count = k.shape[:3], -(-(k.shape[2] + room) // page)

        def cut(x: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(x, (0, 0, 0, count * page - tokens))
            return padded.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1).contiguous()

        table = torch.arange(batch * count, dtype=torch.int32, device=k.device).view(batch, count)
        if lengths is None:
            lengths = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
        return cls(cut(k), cut(v), table, lengths)

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self.k.shape[2]

    @property
    def count(self) -> int:
        """Pages that tables may name."""
        return len(self.k) if self.coded is None else len(self.coded.hot_at) * self.coded.tokens // self.page

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has pages for."""
        return self.table.shape[1] * self.page

    def append(self, k: Tensor, v: Tensor) -> Pages:
        """These pages with n more tokens a sequence, k (B, Hkv, n, D), v (B, Hkv, n, Dv), written into the store.

        The tables must have pages for them; on a CPU an error says so, elsewhere the device does.
        """
        if self.coded is not None:
            raise ValueError("k: got tokens for pages of which some are codes; append them to the store of these pages")
        _check_pair(k, v)
        n, form = k.shape[2], (len(self.table), self.k.shape[1])
        for name, x, store in (("k", k, self.k), ("v", v, self.v)):
            if x.shape[:2] != form or x.shape[3] != store.shape[3] or x.dtype != store.dtype:
                raise ValueError(
                    f"{name}: got {_kind(x)}; these pages take {store.dtype} "
                    f"({form[0]}, {form[1]}, n, {store.shape[3]})"
                )
        if self.k.device.type == "cpu" and int(self.lengths.max()) + n > self.capacity:
            raise ValueError(
                f"k: got {n} tokens for a sequence of {int(self.lengths.max())}, whose table has pages for "
                f"{self.capacity}; give the table more pages"
            )
        at = self.lengths[:, None].long() + torch.arange(n, device=self.k.device)
        rows = self.table.gather(1, at // self.page).long()
        self.k[rows, :, at % self.page] = k.transpose(1, 2)
        self.v[rows, :, at % self.page] = v.transpose(1, 2)
        return replace(self, lengths=self.lengths + n)

    def verify(self, chosen: Chosen | None = None) -> Pages:
        """These pages, once the tables, the lengths and `chosen` (as in `attend_pages`) name only what there is.

        The host waits for the device: for doubt, and done at every call on a CPU.
        """
        lengths, count = self.lengths, self.count
        low, high = (int(end) for end in lengths.aminmax()) if len(lengths) else (0, 0)
        if low < 0 or high > self.capacity:
            raise ValueError(
                f"lengths: got {lengths.tolist()} beside a table of {self.table.shape[1]} pages of {self.page} tokens; "
                f"each must be in 0 .. {self.capacity}"
            )
        low, high = (int(end) for end in self.table.aminmax()) if self.table.numel() else (0, -1)
        if low < 0 or high >= count:  # perhaps only behind the ends of sequences
            used = torch.arange(self.table.shape[1], device=lengths.device) * self.page < lengths[:, None]
            named = self.table[used]
            if bool(((named < 0) | (named >= count)).any()):
                raise ValueError(
                    f"table: got pages {int(named.min())} .. {int(named.max())} in use; there are 0 .. {count - 1}"
                )
        if chosen is None:
            return self
        indices = chosen if isinstance(chosen, Tensor) else chosen[1]
        if indices.numel() and not (int(indices.min()) >= -1 and int(indices.max()) < self.table.shape[1]):
            raise ValueError(
                f"chosen: got pages {int(indices.min())} .. {int(indices.max())}; a sequence has pages 0 .. "
                f"{self.table.shape[1] - 1}, and -1 is none"
            )
        if not isinstance(chosen, Tensor):
            indptr = chosen[0]
            if int(indptr[0]) or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
                raise ValueError(
                    f"chosen: got indptr from {int(indptr[0])} to {int(indptr[-1])}; it must rise from 0 to the number "
                    f"of indices, {len(indices)}"
                )
        return self


@overload
def attend_pages(
    q: Tensor,
    pages: Pages,
    chosen: Chosen | None = None,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attend_pages(
    q: Tensor,
    pages: Pages,
    chosen: Chosen | None = None,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attend_pages(
    q: Tensor,
    pages: Pages,
    chosen: Chosen | None = None,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last N tokens of each sequence to the pages that are chosen for each key head.

        o_i = sum_j p_ij v_j,   p_i = softmax(s_i) over the j <= i in chosen pages,   s_ij = c tanh(scale q_i . k_j / c)

    q (B, H, N, D): the queries at the last N of each sequence's tokens, which `pages` holds already; query head h reads
    key head h // (H // Hkv). o (B, H, N, Dv), in q's dtype. A row that sees nothing gives zeros.

    chosen: logical pages, each at most once: int32 (B, Hkv or 1, K), -1 for none, or, for lists of unlike lengths,
    (indptr (B Hkv + 1,), indices) of all sequences and key heads one after another; default: every page. scale, sink
    (H,), softcap, return_lse: as in `attend`. backend: "triton" (two kernels that share the listed pages out evenly
    over the device and merge, see `softmax.kernels.decode`; any lengths and lists in one captured graph; no gradients),
    "torch" (any device), or "auto".

    Cost: the bytes of the chosen pages, once a key head; "torch" copies them first, but for those that on a CPU, with
    one key head, lie one after another. In lists with -1 the empty slots are shared out like pages, though nothing is
    read for them. Errors: ValueError or TypeError that names the argument; indices out of range only on a CPU,
    elsewhere by `Pages.verify`. With the kernels and N > 1, NaN or infinity in the values of the last N - 1 tokens may
    reach every query of its sequence.

    >>> k, v = torch.randn(2, 2, 3, 50, 8)
    >>> pages = Pages.of(k, v, page=16)
    >>> q = torch.randn(2, 6, 1, 8)
    >>> attend_pages(q, pages, torch.tensor([[[0, 3]]]).expand(2, 3, 2)).shape
    torch.Size([2, 6, 1, 8])
    """
    problem = _checked(q, pages, scale, sink, softcap)
    _check_batch(q, pages)
    _check_chosen(chosen, pages)
    return _answer(*_found(problem, pages, chosen, backend), q.dtype, return_lse)


def read_pages(
    q: Tensor, pages: Pages, chosen: Chosen | None, scale: float | None, *, needs_lse: bool
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `attend_pages`, o in float32 or wider where it was computed in that; lse is anything if not needed.

    For a store, whose tables, lengths and lists are right by their making, and that reads at every step: nothing is
    checked.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    problem = Problem(q, pages.k, pages.v, FULL, scale, None, None, None, SOFTMAX, needs_lse)
    if q.is_cpu:
        return attend_rows(problem, pages, chosen, causal=True)
    return _found(problem, pages, chosen, "auto")


def _found(problem: Problem, pages: Pages, chosen: Chosen | None, backend: str) -> tuple[Tensor, Tensor]:
    if _choose(backend, problem, pages) == "triton":
        from saccade.softmax.kernels import decode

        return decode.attend(problem, pages, chosen)
    return _sunk(problem, *attend_rows(problem, pages, chosen, causal=True))


def attend_cascade(
    q: Tensor,
    prefix: Pages,
    pages: Pages,
    chosen: Chosen | None = None,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last N tokens of each sequence to a prefix that many share and to pages of its own.

    prefix: pages of S sequences, S a divisor of B; sequence b continues prefix b // (B // S). pages, chosen and the
    rest as in `attend_pages`, whose result this is for prefix and pages in one. The keys of a prefix meet the queries
    of all its sequences in one product, and the two partial results merge (`merge`).

    Cost: the bytes of the prefix once for every 128 rows (sequences times query heads a key head times N) instead of
    once a sequence, and those of the chosen pages. Errors: as `attend_pages`.

    >>> shared, own = Pages.of(*torch.randn(2, 1, 3, 40, 8)), Pages.of(*torch.randn(2, 4, 3, 10, 8))
    >>> attend_cascade(torch.randn(4, 6, 1, 8), shared, own).shape
    torch.Size([4, 6, 1, 8])
    """
    problem = _checked(q, pages, scale, sink, softcap)
    _checked(q, prefix, scale, sink, softcap)
    _check_batch(q, pages)
    if len(prefix.table) < 1 or len(q) % len(prefix.table):
        raise ValueError(
            f"prefix: got {len(prefix.table)} sequences beside q's {len(q)}; pass one, or as many as divide them"
        )
    if pages.v.shape[3] != prefix.v.shape[3]:
        raise ValueError(f"prefix: got v of {prefix.v.shape[3]} channels beside {pages.v.shape[3]} in pages")
    _check_chosen(None, prefix)
    _check_chosen(chosen, pages)
    if _choose(backend, problem, pages, prefix) == "triton":
        from saccade.softmax.kernels import decode

        found = decode.attend(problem, pages, chosen, prefix)
    else:
        shared = attend_rows(problem, prefix, None, causal=False)
        found = _sunk(problem, *merge([shared, attend_rows(problem, pages, chosen, causal=True)]))
    return _answer(*found, q.dtype, return_lse)


def _answer(o: Tensor, lse: Tensor, dtype: torch.dtype, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    o = o.to(dtype)
    return (o, lse) if return_lse else o


def _checked(q: Tensor, pages: Pages, scale: float | None, sink: Tensor | None, softcap: float | None) -> Problem:
    """The problem that one page would be: every check of `attend` that does not ask how the keys lie."""
    if not isinstance(pages, Pages):
        raise TypeError(f"pages: got {_kind(pages)}; pass Pages, see Pages.of")
    batch = len(q) if isinstance(q, Tensor) and q.ndim else 1
    k, v = (x[:1].expand(batch, -1, -1, -1) for x in (pages.k, pages.v))
    return Problem.of(q, k, v, scale=scale, sink=sink, softcap=softcap, return_lse=True)


def _check_batch(q: Tensor, pages: Pages) -> None:
    if len(q) != len(pages.table):
        raise ValueError(f"q: got a batch of {len(q)} beside pages of {len(pages.table)} sequences; they must agree")


def _check_chosen(chosen: Chosen | None, pages: Pages) -> None:
    batch, kv_heads = len(pages.table), pages.k.shape[1]
    form = f"int32 ({batch}, {kv_heads} or 1, pages), -1 for none, or (indptr ({batch * kv_heads + 1},), indices)"
    if chosen is not None:
        parts = (chosen,) if isinstance(chosen, Tensor) else chosen
        if not isinstance(parts, tuple) or not all(
            isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) for x in parts
        ):
            raise TypeError(f"chosen: got {_kind(chosen)}; pass {form}")
        shapes = [tuple(x.shape) for x in parts]
        fits = (
            len(shapes[0]) == 3 and shapes[0][:2] in ((batch, kv_heads), (batch, 1))
            if isinstance(chosen, Tensor)
            else len(shapes) == 2 and shapes[0] == (batch * kv_heads + 1,) and len(shapes[1]) == 1
        )
        if not fits:
            raise ValueError(f"chosen: got {', '.join(map(str, shapes))}; pass {form}")
        for x in parts:
            if x.device != pages.k.device:
                raise ValueError(f"chosen: got device {x.device} beside pages on {pages.k.device}; move it there")
    if pages.k.device.type == "cpu":
        pages.verify(chosen)


def _reasons(problem: Problem, *stores: Pages) -> list[str]:
    """Why the kernels cannot run a problem; empty when they can."""
    q, k, v = problem.q, problem.k, problem.v
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    found = []
    if q.device.type != "cuda" and not _interpreted():
        found.append(f"its kernels run on CUDA, not on {q.device.type}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"its kernels read float32, float16 and bfloat16, not {q.dtype}")
    if max(k.shape[3], v.shape[3]) > WIDEST:
        found.append(f"its kernels hold {WIDEST} channels, got {k.shape[3]} and {v.shape[3]}")
    if any(x.stride(-1) != 1 for pages in stores for x in (pages.k, pages.v)):
        found.append("the channels of k or v do not lie side by side")
    if not all(pages.coded is None or reads_codes(pages) for pages in stores):
        found.append("its kernels read codes of one key head, whole words of 32 bits a token and 2^n channels a group")
    if problem.wants_gradients:
        found.append("it has no gradients, and q, k or v asks for them")
    return found


def reads_codes(pages: Pages) -> bool:
    """Whether kernels read these pages, some of which are codes, where kernels run and there are no gradients."""
    assert pages.coded is not None
    for x, codes in ((pages.k, pages.coded.k), (pages.v, pages.coded.v)):
        words, group = codes.codes.shape[2] / 4, codes.group
        whole = words == x.shape[3] * codes.bits / 32 and words.is_integer()
        if group:
            whole &= group.bit_count() == 1 and group * codes.bits % 32 == 0
        if not whole or x.shape[1] > 1 or x.shape[3] > WIDEST or x.dtype == torch.float64:
            return False
    return True


def has_kernels(device: torch.device) -> bool:
    """Whether kernels run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _choose(backend: str, problem: Problem, *stores: Pages) -> str:
    known("backend", backend, BACKENDS)
    if any(pages.coded is not None for pages in stores):
        if found := ["torch reads none"] if backend == "torch" else _reasons(problem, *stores):
            raise ValueError(f"pages: some are codes, which kernels alone read, but {'; '.join(found)}")
        return "triton"
    if backend == "torch":
        return backend
    if backend == "auto":
        return "triton" if problem.q.device.type == "cuda" and not _reasons(problem, *stores) else "torch"
    if found := _reasons(problem, *stores):
        raise ValueError(f"backend: triton cannot run this: {'; '.join(found)}. Pass backend='auto'")
    return backend


def _sunk(problem: Problem, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return (o, lse) if problem.sink is None else absorb(o, lse, problem.sink)


def _check_pair(k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name}: got {_kind(x)}; pass (batch, key heads, tokens, channels)")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"v: got (batch, heads, tokens) {tuple(v.shape[:3])} beside k's {tuple(k.shape[:3])}; they must agree"
        )


def _kind(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"Tensor {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
