"""Attention over pages: what a decoder reads, against a loop over single tokens in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.softmax import Pages, attend, attend_cascade, attend_pages, page_rows
from saccade.testing.budget import assert_close, same_bits
from saccade.testing.subject import widen
from saccade.where import Causal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter


@dataclass(frozen=True, eq=False)
class Case:
    """q, pages, lists of logical pages [batch][key head], the same as `chosen`, options; prefix: shared pages."""

    q: Tensor
    pages: Pages
    lists: list[list[list[int]]]
    chosen: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    prefix: Pages | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        def cast(x: Any) -> Any:
            if isinstance(x, Pages):
                return Pages(cast(x.k), cast(x.v), x.table.to(device), x.lengths.to(device))
            if isinstance(x, tuple):
                return tuple(y.to(device) for y in x)
            if isinstance(x, Tensor):
                return x.to(device, dtype) if x.is_floating_point() else x.to(device)
            return x

        options = {name: cast(option) for name, option in self.options.items()}
        return Case(cast(self.q), cast(self.pages), self.lists, cast(self.chosen), options, cast(self.prefix))

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        options = {**self.options, "return_lse": True, "backend": backend}
        if self.prefix is None:
            return attend_pages(self.q, self.pages, self.chosen, **options)
        return attend_cascade(self.q, self.prefix, self.pages, self.chosen, **options)

    def truth(self) -> tuple[Tensor, Tensor]:
        """The equation, token by token, in the dtype of q."""
        (batch, heads, n, d), kv_heads = self.q.shape, self.pages.k.shape[1]
        o = self.q.new_zeros(batch, heads, n, self.pages.v.shape[3])
        lse = self.q.new_full((batch, heads, n), -torch.inf)
        for b in range(batch):
            for h in range(heads):
                g, length = h // (heads // kv_heads), int(self.pages.lengths[b])
                shared = [] if self.prefix is None else self.tokens(self.prefix, b * len(self.prefix.table) // batch, g)
                own = self.tokens(self.pages, b, g, self.lists[b][g])
                for i in range(n):
                    seen = [row for _, row in shared] + [row for j, row in own if j <= length - n + i]
                    o[b, h, i], lse[b, h, i] = self.row(self.q[b, h, i], seen, h, d)
        return o, lse

    def tokens(self, pages: Pages, b: int, g: int, pages_of: list[int] | None = None) -> list[Any]:
        """(position, (key, value)) of the tokens that exist in the logical pages of a sequence."""
        found = []
        for p in range(pages.table.shape[1]) if pages_of is None else pages_of:
            for t in range(pages.page):
                if p >= 0 and p * pages.page + t < int(pages.lengths[b]):
                    at = int(pages.table[b, p])
                    found.append((p * pages.page + t, (pages.k[at, g, t], pages.v[at, g, t])))
        return found

    def row(self, q: Tensor, seen: list[tuple[Tensor, Tensor]], h: int, d: int) -> tuple[Tensor, Tensor]:
        scale, cap, sink = (self.options.get(name) for name in ("scale", "softcap", "sink"))
        s = torch.stack([k for k, _ in seen]) @ q if seen else q.new_zeros(0)
        s = s * (d**-0.5 if scale is None else scale)
        s = s if cap is None else cap * torch.tanh(s / cap)
        logits = s if sink is None else torch.cat([s, sink[h : h + 1].to(s.dtype)])
        if not len(logits):
            return q.new_zeros(self.pages.v.shape[3]), q.new_tensor(-torch.inf)
        p = logits.softmax(0)[: len(s)]
        o = p @ torch.stack([v for _, v in seen]) if seen else q.new_zeros(self.pages.v.shape[3])
        return o, logits.logsumexp(0)

    def size(self) -> float:
        scale = self.options.get("scale") or self.q.shape[3] ** -0.5
        keys = [pages.k.nan_to_num(0.0) for pages in (self.pages, self.prefix) if pages is not None]
        return 1 + float(self.q.norm(dim=-1).max() * max(k.norm(dim=-1).max() for k in keys)) * abs(scale)


def judge(case: Case, found: tuple[Tensor, Tensor]) -> None:
    """o and lse of a case, in its dtype, are the equation's."""
    (o, lse), (true_o, true_lse) = found, case.to(torch.float64).truth()
    (eager_o, eager_lse), (_, single_lse) = case.truth(), case.to(torch.float32).truth()
    if o.dtype == torch.float64:  # judged by what float32 gives, narrowed to float64
        eager_o, eager_lse = (
            widen(x, y) for x, y in zip((true_o, true_lse), case.to(torch.float32).truth(), strict=True)
        )
    elif lse.dtype != eager_lse.dtype:
        eager_lse = single_lse
    terms = case.pages.capacity + case.q.shape[3]
    spread = case.size() if o.dtype in (torch.float32, torch.float64) else 0.0
    values = float(case.pages.v.nan_to_num(0.0).abs().max())
    assert_close(o, true_o, eager_o, name="o", terms=terms, scale=spread * values)
    assert_close(lse, true_lse, eager_lse, name="lse", terms=terms, scale=case.size())


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    n: int,
    d: int,
    dv: int,
    page: int,
    most: int,
    kind: str,
    *,
    shared: int = 0,
    dtype: torch.dtype = torch.float64,
    lie: str = "anywhere",
    equal: bool = False,
    **options: Any,
) -> Case:
    """Ragged lengths (the first full, the last 0 where there are several; or all full), NaN in what is unused."""
    lengths = torch.randint(0, most + 1, (batch,), dtype=torch.int32)
    lengths[-1], lengths[0] = 0, most
    lengths = lengths.fill_(most) if equal else lengths
    pages = scattered(lengths, kv_heads, d, dv, page, lie)
    count = pages.table.shape[1]
    lists = [
        [torch.randperm(count)[: int(torch.randint(0, count + 1, ()))].tolist() for _ in range(kv_heads)]
        for _ in range(batch)
    ]
    chosen = None
    if kind == "all":
        lists = [[list(range(count))] * kv_heads] * batch
    elif kind == "slots":
        chosen = torch.full((batch, kv_heads, count + 1), -1, dtype=torch.int32)
        for b, of_batch in enumerate(lists):
            for h, of_head in enumerate(of_batch):
                chosen[b, h, torch.randperm(count + 1)[: len(of_head)]] = torch.tensor(of_head, dtype=torch.int32)
    elif kind == "same":  # one list for all key heads
        lists = [[of_batch[0]] * kv_heads for of_batch in lists]
        chosen = torch.full((batch, 1, count), -1, dtype=torch.int64)
        for b, of_batch in enumerate(lists):
            chosen[b, 0, : len(of_batch[0])] = torch.tensor(of_batch[0], dtype=torch.int64)
    else:
        flat = [of_head for of_batch in lists for of_head in of_batch]
        chosen = (
            torch.tensor([0, *(len(x) for x in flat)]).cumsum(0).int(),
            torch.tensor([p for x in flat for p in x], dtype=torch.int32),
        )
    prefix = None
    if shared:
        prefix = scattered(torch.randint(1, most + 1, (shared,), dtype=torch.int32), kv_heads, d, dv, page)
    q = torch.randn(batch, heads, n, d, dtype=torch.float64)
    return Case(q, pages, lists, chosen, options, prefix).to(dtype)


def scattered(lengths: Tensor, kv_heads: int, d: int, dv: int, page: int, lie: str = "anywhere") -> Pages:
    """lie: anywhere; in order; or a run at the start of each sequence, and the later pages in turns."""
    batch, most = len(lengths), max(1, int(lengths.max()))
    k, v = (torch.randn(batch, kv_heads, most, width, dtype=torch.float64) for width in (d, dv))
    pages = Pages.of(k, v, page, lengths)
    order = torch.randperm(len(pages.k) + 2)  # two pages that nobody owns
    if lie != "anywhere":
        count = pages.table.shape[1]
        run = count if lie == "in order" else count * 2 // 3
        first = torch.arange(batch * run).view(batch, run)
        later = torch.arange(batch * run, batch * count).view(count - run, batch).T
        order = torch.cat([first, later], 1).flatten()
    at = torch.arange(pages.table.shape[1] * page).view(-1, page)
    unused = (at >= lengths[:, None, None]).flatten(0, 1)[:, None, :, None]

    def spread(x: Tensor) -> Tensor:
        store = x.new_full((len(x) + 2, *x.shape[1:]), torch.nan)
        store[order[: len(x)]] = x.masked_fill(unused, torch.nan)
        return store

    return Pages(spread(pages.k), spread(pages.v), order[pages.table.long()].int(), lengths)


LIES = ("anywhere", "in order", "in part")
RATIOS = ((1, 1), (3, 1), (4, 1), (6, 2), (8, 1), (4, 4))  # (query heads, key heads)
KINDS = ("all", "slots", "same", "lists")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    heads, kv_heads = draw(st.sampled_from(RATIOS))
    shared = draw(st.sampled_from([0, 0, 1, 2]))
    options = {
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sink": draw(st.sampled_from([None, torch.randn(heads)])),
    }
    return make(
        draw(st.integers(1, 3)) * max(shared, 1),
        heads,
        kv_heads,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 20)),
        draw(st.sampled_from(KINDS)),
        shared=shared,
        lie=draw(st.sampled_from(LIES)),
        equal=draw(st.booleans()),
        **options,
    )


@given(cases(), st.sampled_from([0, 1024]))
@settings(max_examples=120)
def test_torch(case, short):
    with mock.patch.object(page_rows, "SHORT", short):  # many products, or one
        judge(case, case.run("torch"))
    if case.q.shape[2] == 1:
        judge(case.to(torch.float32), case.to(torch.float32).run("auto"))


IN_PLACE = [  # (heads, batch, page, tokens, n)
    (4, 3, 16, 400, 1),
    (3, 1, 5, 93, 1),
    (2, 4, 1, 61, 1),
    (2, 2, 4, 75, 3),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IN_PLACE, ids=str)
def test_runs_of_pages_are_read_where_they_lie(shape, dtype, monkeypatch):
    heads, batch, page, tokens, n = shape
    monkeypatch.setattr(page_rows, "SHORT", 0)
    case = make(batch, heads, 1, n, 8, 8, page, tokens, "all", lie="in order", equal=True, dtype=dtype)
    copied = []
    whole = page_rows.Rows._copied
    monkeypatch.setattr(page_rows.Rows, "_copied", lambda *a, **b: copied.append(a[4]) or whole(*a, **b))
    found = case.run("torch")
    judge(case, found)
    assert sum(copied) <= (0 if n == 1 else tokens // 2)  # of several queries, what not all of them see is copied
    order = torch.randperm(len(case.pages.k))
    moved = Pages(
        case.pages.k[order], case.pages.v[order], order.argsort()[case.pages.table.long()].int(), case.pages.lengths
    )
    again = replace(case, pages=moved).run("torch")
    assert len(copied) > 1
    assert found[0].equal(again[0])  # to the last bit
    assert found[1].equal(again[1])


def test_a_row_that_begins_elsewhere_is_noticed(monkeypatch):
    """The broken twin of reading in place: the second row from a page too far."""
    case = make(3, 2, 1, 1, 8, 8, 4, 64, "all", lie="in order", equal=True)
    chunks = page_rows.Rows.chunks
    monkeypatch.setattr(page_rows.Rows, "chunks", lambda rows: (replace(c, step=c.step - 1) for c in chunks(rows)))
    with pytest.raises(AssertionError):
        judge(case, case.run("torch"))


def asked_again(heads, equal):
    """Steps that are asked for with the same `found`, while tokens come and tables change in place."""
    case = make(3, heads, 1, 1, 8, 8, 4, 40, "all", lie="in order", equal=equal)
    k, v, table, lengths = case.pages.k, case.pages.v, case.pages.table.clone(), (case.pages.lengths - 6).clamp(min=0)
    pages = Pages(k, v, table, lengths)
    for step in range(6):
        if step == 2:
            lengths.sub_(1).clamp_(min=0)  # of the same pages, mostly
        elif step == 3:
            lengths.add_(5)  # a page more
        elif step == 4:
            table.copy_(table.roll(1, 0))
        elif step == 5:
            table[0, 0] = table[1, 0]
        found = attend_pages(case.q, pages, return_lse=True, backend="torch")
        fresh = attend_pages(case.q, Pages(k, v, table.clone(), lengths.clone()), return_lse=True, backend="torch")
        assert all(same_bits(a, b) for a, b in zip(found, fresh, strict=True)), step
        judge(replace(case, pages=Pages(k, v, table, lengths)), found)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("heads", [2, page_rows.FEW])
def test_what_was_found_of_tables_holds_as_long_as_they_do(heads, equal):
    asked_again(heads, equal)


@pytest.mark.parametrize("forgotten", [0, 3], ids=["tables", "numbers of pages"])
def test_tables_that_are_not_asked_again_are_noticed(forgotten, monkeypatch):
    """The broken twin: what was found once is taken for what is there."""
    layout, first = page_rows.Found.layout, {}

    def once(found, table, ends, page):
        of = [table.tobytes(), table.shape, page, str(ends)]
        del of[forgotten]
        return first.setdefault((id(found), *of), layout(found, table, ends, page))

    monkeypatch.setattr(page_rows.Found, "layout", once)
    with pytest.raises((AssertionError, IndexError)):
        asked_again(2, equal=True)


@pytest.mark.parametrize("lie", LIES)
def test_scores_without_an_end(lie):
    """Keys that are infinitely far give nothing; one that is not a number gives none to those who see it."""
    case = make(2, 2, 1, 1, 4, 4, 4, 24, "all", lie=lie, equal=True)
    case = replace(case, q=case.q.abs())
    case.pages.k.fill_(-torch.inf)
    o, lse = case.run("torch")
    assert o.eq(0).all()
    assert lse.isneginf().all()
    case.pages.k.fill_(0.5)
    case.pages.v.fill_(1.0)
    case.pages.k[int(case.pages.table[1, 2]), 0, 1] = torch.nan
    o, lse = case.run("torch")
    assert o[0].isfinite().all()
    assert o[1].isnan().all()
    assert lse[1].isnan().all()


# (batch, heads, key heads, queries, D, Dv, page, most tokens, kind of lists, options)
KERNEL = [
    (3, 2, 2, 1, 32, 32, 16, 70, "all", {}),
    (3, 3, 1, 1, 32, 64, 16, 70, "slots", {"sink": True}),
    (2, 8, 2, 2, 64, 32, 8, 50, "lists", {"softcap": 1.5, "scale": 0.2}),
    (2, 8, 1, 3, 32, 48, 32, 90, "lists", {"sink": True, "softcap": 1.5}),
    (3, 4, 1, 4, 128, 128, 16, 50, "same", {}),
    (2, 6, 2, 1, 40, 24, 64, 150, "slots", {"sink": True}),
    (2, 4, 4, 2, 32, 32, 5, 23, "lists", {}),
    (2, 2, 1, 1, 32, 32, 1, 19, "all", {"scale": 0.3}),
    (1, 4, 1, 1, 32, 32, 48, 130, "slots", {}),
]
PREFIXED = [
    (4, 4, 2, 1, 32, 32, 16, 40, "all", {"shared": 1}),
    (4, 6, 2, 2, 32, 48, 16, 40, "slots", {"shared": 2, "sink": True}),
    (9, 8, 1, 1, 32, 32, 16, 40, "lists", {"shared": 1, "softcap": 1.5}),
]


def drawn(batch, heads, kv_heads, n, d, dv, page, most, kind, options, dtype):
    options = {**options, **({"sink": torch.randn(heads)} if "sink" in options else {})}
    return make(batch, heads, kv_heads, n, d, dv, page, most, kind, dtype=dtype, **options)


# Triton's interpreter hands loop bounds that it loaded to Python in a way that NumPy is about to forbid, and multiplies
# no bfloat16.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*KERNEL, *PREFIXED], ids=str)
def test_kernels(shape, dtype):
    case = drawn(*shape, dtype)
    found = case.to(dtype, DEVICE).run("triton")
    judge(case, tuple(x.cpu() for x in found))


LARGE = [
    (3, 16, 4, 1, 128, 128, 16, 1500, "slots", {"sink": True}),
    (3, 8, 2, 2, 128, 64, 32, 1500, "lists", {}),
    (2, 8, 2, 4, 64, 64, 64, 1500, "all", {"softcap": 5.0}),
    (2, 8, 2, 8, 128, 128, 16, 700, "same", {}),
    (2, 4, 2, 1, 256, 256, 16, 700, "lists", {}),
    (12, 8, 2, 1, 128, 128, 16, 300, "slots", {"shared": 1, "sink": True}),
    (36, 8, 2, 1, 64, 64, 64, 130, "all", {"shared": 1}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*KERNEL, *PREFIXED, *LARGE], ids=str)
def test_kernels_on_a_gpu(shape):
    case = drawn(*shape, torch.bfloat16)
    found = case.to(torch.bfloat16, "cuda").run("auto")
    judge(case, tuple(x.cpu() for x in found))


@pytest.mark.gpu
def test_one_graph_serves_other_lengths_and_lists():
    pages = Pages.of(*torch.randn(2, 4, 2, 900, 64, device="cuda", dtype=torch.bfloat16), page=16)
    q = torch.randn(4, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    indptr, indices = (torch.zeros(size, dtype=torch.int32, device="cuda") for size in (9, 500))
    attend_pages(q, pages, (indptr, indices))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attend_pages(q, pages, (indptr, indices), return_lse=True)
    for _ in range(3):
        counts = torch.randint(0, 57, (8,))
        flat = torch.cat([torch.randperm(57)[:n] for n in counts.tolist()])
        indptr.copy_(torch.cat([torch.zeros(1), counts.cumsum(0)]))
        indices[: len(flat)] = flat.int().cuda()
        pages.lengths.copy_(torch.randint(0, 901, (4,)))
        pages.table.copy_(torch.randperm(4 * 57).view(4, 57))
        graph.replay()
        again, lse_again = attend_pages(q, pages, (indptr, indices), return_lse=True)
        assert o.equal(again)
        assert lse.equal(lse_again)
        wide = attend_pages(
            q.double(),
            Pages(pages.k.double(), pages.v.double(), pages.table, pages.lengths),
            (indptr, indices[: len(flat)]),
            backend="torch",
        )
        eager = attend_pages(q, pages, (indptr, indices[: len(flat)]), backend="torch")
        assert_close(o, wide, eager, terms=4)


def test_slots_lists_and_every_page_say_the_same():
    case = make(3, 4, 2, 2, 8, 6, 4, 20, "all")
    count = case.pages.table.shape[1]
    slots = torch.stack([torch.randperm(count) for _ in range(6)]).view(3, 2, count)
    lists = torch.arange(0, 6 * count + 1, count), slots.flatten()
    want = case.run("torch")
    for chosen in (slots, slots.int(), torch.cat([slots - slots - 1, slots], 2), lists):
        judge(case, replace(case, chosen=chosen).run("torch"))
        assert replace(case, chosen=chosen).run("torch")[1].isinf().equal(want[1].isinf())


def test_pages_are_attend():
    q, k, v = torch.randn(2, 4, 3, 8).double(), torch.randn(2, 2, 21, 8).double(), torch.randn(2, 2, 21, 6).double()
    pages = Pages.of(k, v, page=5)
    o, lse = attend_pages(q, pages, return_lse=True)
    true_o, true_lse = attend(q, k, v, Causal(), return_lse=True, backend="reference")
    assert_close(o, true_o, true_o, terms=21)
    assert_close(lse, true_lse, true_lse, terms=21)
    cut = torch.tensor([[[0, 2, -1]]]).expand(2, 2, 3)  # the last query is at token 20, behind both pages
    o = attend_pages(q[:, :, -1:], pages, cut)
    kept = [*range(5), *range(10, 15)]
    true_o = attend(q[:, :, -1:], k[:, :, kept], v[:, :, kept], backend="reference")
    assert_close(o, true_o, true_o, terms=21)


def test_queries_whose_channels_lie_apart():
    k, v = torch.randn(2, 1, 2, 40, 8, dtype=torch.float64)
    pages, q = Pages.of(k, v, page=8), torch.full((1, 4, 1, 8, 2), torch.nan, dtype=torch.float64)
    q[..., 0] = torch.randn(1, 4, 1, 8)
    assert torch.equal(attend_pages(q[..., 0], pages), attend_pages(q[..., 0].contiguous(), pages))


def test_append_writes_where_the_table_says():
    k, v = torch.randn(2, 3, 17, 4), torch.randn(2, 3, 17, 6)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    pages = Pages.of(k[:, :, :9], v[:, :, :9], page=4, lengths=lengths, room=8)
    order = torch.randperm(len(pages.k))
    pages = Pages(pages.k[order], pages.v[order], order.argsort()[pages.table.long()].int(), lengths)
    for at in (0, 3, 4, 7):  # across the ends of pages
        step = 1 if at < 3 else 3
        old = pages
        pages = pages.append(k[:, :, at : at + step], v[:, :, at : at + step])
        assert pages.lengths.equal(old.lengths + step)
        for b in range(2):
            for t in range(step):
                place = int(old.lengths[b]) + t
                physical = int(pages.table[b, place // 4])
                assert pages.k[physical, :, place % 4].equal(k[b, :, at + t])
                assert pages.v[physical, :, place % 4].equal(v[b, :, at + t])
    with pytest.raises(ValueError, match="k: got 2 tokens for a sequence of 19, whose table has pages for 20"):
        pages.append(k[:, :, :2], v[:, :, :2])


@pytest.mark.parametrize("shared", [0, 1])
def test_a_wrong_page_is_noticed(shared):
    """The broken twin of the table: two pages exchanged."""
    case = make(1, 2, 1, 1, 8, 8, 4, 16, "all", shared=shared)
    judge(case, case.run("torch"))
    own, other = case.pages.lengths, case.pages.table.clone()
    own[0] = 13  # the exchanged pages are not both full
    other[:, [2, 3]] = case.pages.table[:, [3, 2]]
    with pytest.raises(AssertionError):
        judge(case, replace(case, pages=replace(case.pages, table=other)).run("torch"))


def test_the_torch_path_has_gradients():
    case = make(2, 4, 2, 1, 8, 6, 4, 9, "all")
    q = case.q.requires_grad_()
    assert attend_pages(q, case.pages).grad_fn is not None
    with pytest.raises(ValueError, match=r"^backend: triton cannot run this: .*it has no gradients"):
        attend_pages(q, case.pages, backend="triton")


def pages(**change):
    k, v = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 4)
    return replace(Pages.of(k, v, page=4), **change)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


Q = torch.zeros(2, 6, 1, 8)
ERRORS = {
    "pages": (lambda: attend_pages(Q, Q), "pages: got Tensor float32 .*; pass Pages"),
    "channels": (lambda: attend_pages(Q[..., :5], pages()), "k: got 8 channels beside q's 5"),
    "heads": (lambda: attend_pages(Q[:, :4], pages()), "k: got 3 heads beside q's 4"),
    "dtype": (lambda: attend_pages(Q.double(), pages()), "k: got dtype torch.float32 beside q of torch.float64"),
    "batch": (lambda: attend_pages(Q[:1], pages()), "q: got a batch of 1 beside pages of 2 sequences"),
    "softcap": (lambda: attend_pages(Q, pages(), softcap=0.0), "softcap: got 0.0"),
    "sink": (lambda: attend_pages(Q, pages(), sink=torch.zeros(3)), r"sink: .* shape \(3,\)"),
    "backend": (lambda: attend_pages(Q, pages(), backend="sdpa"), "backend: got 'sdpa'; choose one of auto, triton"),
    "width": (
        lambda: attend_pages(torch.zeros(1, 1, 1, 300), Pages.of(*torch.zeros(2, 1, 1, 4, 300)), backend="triton"),
        "backend: triton cannot run this: its kernels hold 256 channels, got 300 and 300",
    ),
    "float64": (
        lambda: attend_pages(Q.double(), Pages.of(*torch.zeros(2, 2, 3, 4, 8).double()), backend="triton"),
        "backend: triton cannot run this: its kernels read float32, float16 and bfloat16, not torch.float64",
    ),
    "k": (lambda: Pages(Q[0], Q, ints([0]), ints(1)), r"k: got Tensor float32 \(6, 1, 8\); pass \(pages"),
    "v": (lambda: Pages(Q, Q[:1], ints([0]), ints(1)), r"v: got \(pages, heads, tokens\) \(1, 6, 1\) beside"),
    "table": (lambda: pages(table=ints(0, 1)), r"table: got Tensor int32 \(2,\); pass int32 \(sequences, pages"),
    "table dtype": (lambda: pages(table=torch.zeros(2, 3)), "table: got Tensor float32"),
    "lengths": (lambda: pages(lengths=[3, 4]), "lengths: got list; pass int32"),
    "lengths elsewhere": (lambda: pages(lengths=ints(3, 4).to("meta")), "lengths: got device meta beside k on cpu"),
    "lengths of three": (lambda: pages(lengths=ints(3, 4, 5)), "lengths: got 3 sequences beside the table's 2"),
    "too long": (lambda: attend_pages(Q, pages(lengths=ints(3, 13))), r"lengths: got \[3, 13\] .* in 0 .. 12"),
    "negative": (lambda: attend_pages(Q, pages(lengths=ints(-1, 3))), r"lengths: got \[-1, 3\]"),
    "no such page": (
        lambda: attend_pages(Q, pages(table=ints([0, 1, 6], [3, 4, 5]))),
        "table: got pages 0 .. 6 in use",
    ),
    "page": (lambda: Pages.of(*torch.zeros(2, 1, 1, 4, 8), page=0), "page: got 0; pass an integer >= 1"),
    "of": (lambda: Pages.of(torch.zeros(3, 4, 8), Q), r"k: got Tensor float32 \(3, 4, 8\); pass \(batch, key heads"),
    "of v": (lambda: Pages.of(Q, Q[:, :3]), r"v: got \(batch, heads, tokens\) \(2, 3, 1\) beside k's \(2, 6, 1\)"),
    "append": (
        lambda: pages().append(Q, Q),
        r"k: got Tensor float32 \(2, 6, 1, 8\); these pages take .* \(2, 3, n, 8\)",
    ),
    "append v": (
        lambda: pages().append(Q[:, :3], Q[:, :3]),
        r"v: got .*; these pages take torch.float32 \(2, 3, n, 4\)",
    ),
    "chosen": (lambda: attend_pages(Q, pages(), [0]), r"chosen: got list; pass int32 \(2, 3 or 1, pages\)"),
    "chosen dtype": (lambda: attend_pages(Q, pages(), torch.zeros(2, 3, 1)), "chosen: got Tensor float32"),
    "chosen heads": (lambda: attend_pages(Q, pages(), torch.zeros(2, 2, 1).int()), r"chosen: got \(2, 2, 1\); pass"),
    "chosen page": (
        lambda: attend_pages(Q, pages(), ints([[3]], [[0]])),
        "chosen: got pages 0 .. 3; .* 0 .. 2, and -1",
    ),
    "chosen below": (lambda: attend_pages(Q, pages(), ints([[-2]], [[0]])), "chosen: got pages -2 .. 0"),
    "lists": (lambda: attend_pages(Q, pages(), (ints(0, 1), ints(0))), r"chosen: got \(2,\), \(1,\); pass"),
    "lists end": (
        lambda: attend_pages(Q, pages(), (ints(0, 1, 1, 1, 1, 1, 1), ints(0, 1))),
        "chosen: got indptr from 0 to 1; it must rise from 0 to the number of indices, 2",
    ),
    "lists fall": (lambda: attend_pages(Q, pages(), (ints(0, 1, 0, 1, 1, 1, 1), ints(0))), "chosen: got indptr"),
    "prefix batch": (
        lambda: attend_cascade(torch.zeros(2, 6, 1, 8), Pages.of(*torch.zeros(2, 3, 3, 4, 8)), pages()),
        "prefix: got 3 sequences beside q's 2; pass one, or as many as divide them",
    ),
    "prefix channels": (
        lambda: attend_cascade(Q, Pages.of(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8)), pages()),
        "prefix: got v of 8 channels beside 4 in pages",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
