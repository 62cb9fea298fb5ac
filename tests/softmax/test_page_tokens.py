"""Single tokens in pages: kernels and the torch path against loops over rows."""

import pytest
import torch

from saccade.softmax import score_bounds, score_tokens, widen_bounds
from saccade.softmax.kernels.page_tokens import launch_bound, launch_score, launch_widen
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
