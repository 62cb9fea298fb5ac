"""Pages of which some are codes: what kernels find there is what the codes stand for."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_paged import DEVICE, Case, judge, make

from saccade.cache import Grid
from saccade.softmax import Pages, attend_pages
from saccade.softmax.page_rows import Found
from saccade.softmax.paged import CodedFrames, Codes

SHAPES = [  # (batch, query heads, n, D, Dv, page, most tokens, kind of lists, options)
    (3, 4, 1, 32, 64, 16, 70, "slots", {}),
    (3, 8, 1, 64, 32, 32, 100, "all", {"softcap": 1.5}),
    (2, 4, 3, 40, 24, 64, 150, "lists", {"sink": True}),
    (2, 3, 1, 48, 32, 5, 33, "slots", {}),
    (2, 12, 2, 32, 32, 16, 50, "lists", {"scale": 0.3}),
]
KEYS = [("channel", 32), ("token", 32), ("token", 8)]


def stand_for(codes, zero, step, grid, dim):
    """zero + step code in float64, number by number, of (C, page, bytes)."""
    found = torch.zeros(*codes.shape[:2], dim, dtype=torch.float64)
    for d in range(dim):
        code = codes[..., d] if grid.bits == 8 else codes[..., d // 2] // 16 ** (d % 2) % 16
        at = (slice(None), d) if grid.along == "channel" else (Ellipsis, d // grid.group)
        zeros, steps = (x[:, 0, d, None] if grid.along == "channel" else x[at] for x in (zero, step))
        found[..., d] = zeros.double() + steps.double() * code.double()
    return found


def in_codes(pages, grids):
    """(pages of which more than half of the full ones are codes; what those stand for as pages in full precision)."""
    full = ~pages.k.isnan().flatten(1).any(1)
    cold = full & (torch.rand(len(full)) < 0.6)
    cold[full.nonzero()[:1, 0]] = True
    hot_at, cold_at = (torch.zeros(len(full), dtype=torch.int64) for _ in range(2))
    hot_at[~cold], cold_at[cold] = torch.randperm(int((~cold).sum())) + 1, torch.randperm(int(cold.sum())) + 1
    frames, codes, plain = [], [], []
    for x, grid in zip((pages.k, pages.v), grids, strict=True):
        parts = grid.encode(x[cold, 0])
        restored = x.clone()
        restored[cold, 0] = stand_for(*parts, grid, x.shape[3]).to(x.dtype)
        plain.append(restored)
        hot = x.new_full((1 + int((~cold).sum()), *x.shape[1:]), torch.nan)
        hot[hot_at[~cold]] = x[~cold]
        frames.append(hot)
        laid = []
        for part in parts:  # nobody's frame says nothing that may be read
            nobody = torch.full_like(part[:1], 255 if part.dtype == torch.uint8 else torch.nan)
            laid.append(torch.cat([nobody, part])[torch.cat([torch.zeros(1).long(), cold_at[cold].argsort() + 1])])
        codes.append(Codes(*laid, grid.bits, 0 if grid.along == "channel" else grid.group))
    given = Pages(*frames, pages.table, pages.lengths, Found(), CodedFrames(*codes, hot_at, cold_at))
    return given, Pages(*plain, pages.table, pages.lengths)


def moved(pages, device):
    def send(codes):
        return Codes(*(x.to(device) for x in codes[:3]), *codes[3:])

    k, v, hot_at, cold_at = pages.coded
    coded = CodedFrames(send(k), send(v), hot_at.to(device), cold_at.to(device))
    return Pages(*(x.to(device) for x in (pages.k, pages.v, pages.table, pages.lengths)), Found(), coded)


def drawn(shape, bits, keys, dtype):
    batch, heads, n, d, dv, page, most, kind, options = shape
    options = {**options, **({"sink": torch.randn(heads)} if "sink" in options else {})}
    case = make(batch, heads, 1, n, d, dv, page, most, kind, dtype=dtype, **options)
    given, plain = in_codes(case.pages, (Grid(bits, *keys), Grid(bits, "token", 16)))
    return replace(case, pages=plain), given


def check(case, given, dtype):
    here = case.to(dtype, DEVICE)
    options = {**here.options, "return_lse": True, "backend": "triton"}
    found = attend_pages(here.q, moved(given, DEVICE), here.chosen, **options)
    judge(case, tuple(x.cpu() for x in found))


interpreted = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@interpreted
@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_read_what_codes_stand_for(shape, bits, keys):
    for dtype in (torch.float32, torch.float16):
        check(*drawn(shape, bits, keys, dtype), dtype)


def tokens_of(case, given):
    """The same store, read token by token: some of the tokens of each sequence, as pages of one."""
    batch, page, count = len(case.q), given.page, 19
    places, lists = torch.zeros(batch, count, dtype=torch.int32), []
    for b in range(batch):
        slots = torch.randperm(max(1, int(given.lengths[b])))[:count]
        own = given.table[b, slots // page].long() * page + slots % page
        places[b, : len(slots)] = own.int()
        lists.append([list(range(len(slots) if given.lengths[b] else 0))])
    lengths = torch.tensor([len(own[0]) for own in lists], dtype=torch.int32)

    def single(x):
        return x.reshape(-1, 1, 1, x.shape[3])

    plain = Pages(single(case.pages.k), single(case.pages.v), places, lengths)
    coded = Pages(single(given.k), single(given.v), places, lengths, Found(), given.coded)
    return Case(case.q, plain, lists), coded


@interpreted
@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_single_tokens(bits, keys):
    case, given = drawn((3, 4, 1, 32, 64, 16, 70, "all", {}), bits, keys, torch.float32)
    check(*tokens_of(case, given), torch.float32)


def of_the_wrong_page(codes):
    zero, step = (torch.cat([x[:1], x[1:].roll(1, 0)]) for x in (codes.zero, codes.step))
    return codes._replace(zero=zero, step=step)


def of_the_wrong_token(codes):
    return codes._replace(codes=codes.codes.roll(1, 1))


def nibbles_swapped(codes):
    return codes._replace(codes=codes.codes << 4 | codes.codes >> 4)


def steps_of_eight_bits(codes):
    return codes._replace(step=codes.step * 15 / 255)


@interpreted
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("fault", [of_the_wrong_page, of_the_wrong_token, nibbles_swapped, steps_of_eight_bits])
def test_a_wrong_reading_is_noticed(fault, which):
    shape = (2, 4, 1, 32, 32, 16, 96, "all", {})
    case, given = drawn(shape, 4, ("channel", 32), torch.float32)
    check(case, given, torch.float32)
    wrong = given.coded._replace(**{which: fault(getattr(given.coded, which))})
    with pytest.raises(AssertionError):
        check(case, replace(given, coded=wrong), torch.float32)


@interpreted
def test_a_page_that_is_taken_for_one_in_full_precision_is_noticed():
    case, given = drawn((2, 4, 1, 32, 32, 16, 96, "all", {}), 4, ("channel", 32), torch.float32)
    wrong = given.coded._replace(cold_at=torch.where(given.coded.cold_at == 1, 0, given.coded.cold_at))
    with pytest.raises(AssertionError):
        check(case, replace(given, coded=wrong), torch.float32)


def test_what_is_refused():
    _, given = drawn((2, 4, 1, 32, 32, 16, 50, "all", {}), 4, ("channel", 32), torch.float32)
    q = torch.zeros(2, 4, 1, 32)
    with pytest.raises(ValueError, match="pages: some are codes, which kernels alone read, but torch reads none"):
        attend_pages(q, given, backend="torch")
    with pytest.raises(ValueError, match="k: got tokens for pages of which some are codes; append them to the store"):
        given.append(q[:, :1], q[:, :1])
    odd = given.coded._replace(v=given.coded.v._replace(group=5))
    with pytest.raises(ValueError, match="its kernels read codes of one key head, whole words"):
        attend_pages(q, replace(given, coded=odd), backend="triton")


def test_kernels_compile():
    """For compute capability 9.0: in a process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_decode.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 13, found.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("page", "heads"), [(16, 4), (32, 16), (64, 32)])
def test_kernels_on_a_gpu(page, heads, bits, keys):
    for kind in ("all", "slots", "lists"):
        case, given = drawn((3, heads, 1, 128, 128, page, 900, kind, {}), bits, keys, torch.bfloat16)
        check(case, given, torch.bfloat16)
    check(*tokens_of(case, given), torch.bfloat16)


@pytest.mark.gpu
def test_one_graph_serves_other_lists():
    case, given = drawn((3, 4, 1, 128, 128, 16, 900, "all", {}), 4, ("channel", 32), torch.bfloat16)
    pages, q = moved(given, "cuda"), case.q.cuda()
    chosen = torch.zeros(3, 1, 20, dtype=torch.int32, device="cuda")
    attend_pages(q, pages, chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend_pages(q, pages, chosen)
    for _ in range(3):
        chosen.copy_(torch.stack([torch.randperm(pages.table.shape[1])[:20] for _ in range(3)])[:, None])
        graph.replay()
        assert o.equal(attend_pages(q, pages, chosen))
