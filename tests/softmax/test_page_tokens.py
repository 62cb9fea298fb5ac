"""Single tokens in pages: kernels and the torch path against loops over rows."""

import pytest
import torch

from saccade.softmax import drop_token, place_tokens, put_token, score_bounds, score_tokens, widen_bounds
from saccade.softmax.kernels.page_tokens import (
    launch_bound,
    launch_drop,
    launch_place,
    launch_put,
    launch_score,
    launch_widen,
)
from saccade.testing.budget import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter multiplies no bfloat16.
KERNEL_DTYPES = [(False, dtype) for dtype in DTYPES] + [(True, torch.float32), (True, torch.float16)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(2, 3, 2, 8, 5, 4), (1, 1, 1, 20, 20, 16), (3, 2, 4, 128, 64, 16), (2, 1, 5, 33, 17, 7)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def drawn(shape, device, dtype):
    """Pages with NaN behind the ends of rows, and what a step brings."""
    batch, kv_heads, group, d, dv, page = shape
    rows, most = batch * kv_heads, 5
    lengths = torch.randint(1, page * (most - 1), (rows,), dtype=torch.int32)
    table = torch.randperm(rows * most + 3)[: rows * most].view(rows, most).int()
    k, v = (torch.randn(rows * most + 3, 1, page, x).to(dtype) for x in (d, dv))
    for row in range(rows):
        for slot in range(int(lengths[row]), page * most):
            k[table[row, slot // page], 0, slot % page] = torch.nan
    q = torch.randn(batch, kv_heads * group, 1, d).to(dtype)
    return [x.to(device) for x in (q, k, v, table, lengths)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "dtype"), KERNEL_DTYPES)
def test_scores(shape, dtype, kernel, device):
    q, k, _, table, lengths = drawn(shape, device, dtype)
    (batch, kv_heads, group, d, _, page), width = shape, 4 * shape[5] + 1
    for leading in (d, d // 2):
        part, keys = q[..., :leading], k[..., :leading]
        if kernel:
            found = launch_score(part, keys, table, lengths, width, 0.3)
        else:
            found = score_tokens(part, keys, (table, lengths), width, 0.3)
        truth = torch.full((batch, kv_heads * group, width), -torch.inf, dtype=torch.float64)
        for h in range(kv_heads * group):
            for b in range(batch):
                row = b * kv_heads + h // group
                for slot in range(int(lengths[row])):
                    key = keys[int(table[row, slot // page]), 0, slot % page].double()
                    truth[b, h, slot] = float(0.3 * (part[b, h, 0].double() @ key))
        there = truth > -torch.inf
        assert torch.equal(there.to(device), found > -torch.inf)
        found, truth = found.cpu()[there], truth[there]
        assert_close(found, truth.float(), truth, name="scores", terms=leading, scale=float(truth.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_bfloat16_by_the_kernel(shape):
    test_scores(shape, torch.bfloat16, True, "cuda")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [False, True])
def test_put(shape, kernel, device):
    _, k, v, table, lengths = drawn(shape, device, torch.float32)
    batch, kv_heads, _, d, dv, page = shape
    positions = torch.full((*k.shape[:1], page), -1, dtype=torch.int32, device=device)
    ends = torch.arange(100, 100 + batch, device=device)
    new_k, new_v = (torch.randn(kv_heads, batch, 1, x, device=device).transpose(0, 1) for x in (d, dv))
    before = [x.clone() for x in (k, v, positions)]
    put = launch_put if kernel else put_token
    put(new_k, new_v, (k, v, positions), (table, lengths, ends))
    for row in range(batch * kv_heads):
        at = int(table[row, lengths[row] // page]), int(lengths[row]) % page
        before[0][at[0], 0, at[1]] = new_k[row // kv_heads, row % kv_heads, 0]
        before[1][at[0], 0, at[1]] = new_v[row // kv_heads, row % kv_heads, 0]
        before[2][at] = 100 + row // kv_heads
    for found, truth in zip((k, v, positions), before, strict=True):
        assert torch.equal(found.nan_to_num(9), truth.nan_to_num(9))


@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("kernel", [False, True])
def test_place(lists, kernel, device):
    table = torch.randperm(20)[:15].view(3, 5).int()
    slots = torch.randint(-2, 5 * 4, (3 * lists, 300))
    truth = [
        [0 if s < 0 else int(table[own // lists, s // 4]) * 4 + s % 4 for s in row]
        for own, row in enumerate(slots.tolist())
    ]
    place = launch_place if kernel else place_tokens
    assert place(table.to(device), slots.to(device), 4).tolist() == truth


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("numbers", [0, 3])
def test_drop(shape, kernel, numbers, device):
    _, k, v, table, lengths = drawn(shape, device, torch.float32)
    page = shape[5]
    columns = torch.randn(len(k), page, numbers, device=device)
    positions = torch.arange(len(k) * page, dtype=torch.int32, device=device).view(-1, page)
    which = torch.arange(0, len(table), 2, device=device)
    slots = (torch.rand(len(which), device=device) * lengths[which]).long()
    after = [x.clone() for x in (k, v, positions, columns, lengths)]
    for row, slot in zip(which.tolist(), slots.tolist(), strict=True):
        last = int(lengths[row]) - 1
        to, source = ((int(table[row, x // page]), x % page) for x in (slot, last))
        for x in after[:2]:
            x[to[0], 0, to[1]] = x[source[0], 0, source[1]]
        for x in after[2:4]:
            x[to] = x[source]
        after[4][row] -= 1
    (launch_drop if kernel else drop_token)((k, v, positions, columns), (table, lengths), which, slots)
    for found, truth in zip((k, v, positions, columns, lengths), after, strict=True):
        assert torch.equal(found.nan_to_num(9), truth.nan_to_num(9))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [False, True])
def test_bounds(shape, kernel, device):
    """Of some pages: kept in step with the newest key, and what they bound; pages without keys bound nothing."""
    q, k, _, table, lengths = drawn(shape, device, torch.float32)
    (batch, kv_heads, group, d, _, page), most = shape, table.shape[1]
    truth = torch.full((batch * kv_heads, most, 2 * d), torch.inf)
    truth[..., d:] = -torch.inf
    for row in range(len(table)):
        for slot in range(int(lengths[row])):
            key, at = k[table[row, slot // page], 0, slot % page].cpu(), truth[row, slot // page]
            truth[row, slot // page] = torch.cat([torch.minimum(at[:d], key), torch.maximum(at[d:], key)])
    before = truth.clone().to(device)
    last = lengths.long() - 1
    before[torch.arange(len(table)), last // page, :d] += 1  # the newest key is to be put there, where it counts
    before[torch.arange(len(table)), last // page, :d] = before[torch.arange(len(table)), last // page, :d].maximum(
        k[table[torch.arange(len(table)), last // page].long(), 0, last % page]
    )
    which = torch.arange(len(table), device=device)
    found = before.clone()
    if kernel:
        launch_widen(k, found, (table, lengths), which)
    else:
        widen_bounds(k, page, found, (table, lengths), which)
    for row in range(len(table)):
        at, key = int(last[row]) // page, k[table[row, last[row] // page], 0, last[row] % page]
        expected = before[row].clone()
        expected[at] = torch.cat([torch.minimum(before[row, at, :d], key), torch.maximum(before[row, at, d:], key)])
        assert torch.equal(found[row], expected)
    truth[:, -1] = torch.nan  # as a note of several sequences is padded
    bounds = truth.view(batch, kv_heads, most, 2 * d).to(device)
    scores = launch_bound(q, bounds) if kernel else score_bounds(q, bounds)
    for row in range(len(table)):
        for at in range(most):
            low, high = truth[row, at].double().split(d)
            if not bool((low <= high).all()):
                assert float(scores.view(-1, most)[row, at]) == -torch.inf
                continue
            each = q[row // kv_heads, row % kv_heads * group :][:group, 0].cpu().double()
            best = torch.maximum(each * low, each * high).sum(-1).max()
            assert_close(
                scores.view(-1, most)[row, at].cpu(), best.float(), best, name="bound", terms=d, scale=float(d)
            )
