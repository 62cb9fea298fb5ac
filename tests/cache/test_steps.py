"""What a step does to pages: kernels and the torch path against loops over rows, and faults that the loops notice."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saccade.cache import PagePool, Policy, Quest, Session, snapkv, steps
from saccade.cache.kernels import steps as kernels
from saccade.cache.steps import Ring
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.testing.budget import assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Sequences, key heads, D, Dv, page, columns.
SHAPES = [(2, 3, 8, 5, 4, 0), (1, 1, 20, 20, 16, 2), (3, 2, 128, 64, 16, 1), (2, 5, 33, 17, 7, 3)]
PUTS = {"torch": steps.put_token, "kernel": kernels.launch_put}
DROPS = {"torch": steps.drop_token, "kernel": lambda into, rows, at, s: kernels.launch_drop(into, rows, at, s)}
FINDS = {"torch": steps.find_tokens, "kernel": kernels.launch_find}
BESTS = {"torch": steps.best_found, "kernel": kernels.launch_best}
RAISES = {"torch": steps.raise_newest, "kernel": kernels.launch_raise}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def drawn(shape, device, dtype=torch.float32):
    """Pages (k, v, positions, columns) and rows (table, lengths, ends), all on the device."""
    batch, kv_heads, d, dv, page, numbers = shape
    rows, most = batch * kv_heads, 5
    count = rows * most + 3
    lengths = torch.randint(4, page * (most - 1), (rows,), dtype=torch.int32)
    table = torch.randperm(count)[: rows * most].view(rows, most).int()
    k, v = (torch.randn(count, 1, page, x).to(dtype) for x in (d, dv))
    positions = torch.randint(0, 99, (count, page), dtype=torch.int32)
    into = k, v, positions, torch.randn(count, page, numbers)
    ends = torch.randint(100, 200, (batch,))
    return [x.to(device) for x in into], [x.to(device) for x in (table, lengths, ends)]


def same(found, truth):
    return all(torch.equal(x, y) for x, y in zip(found, truth, strict=True))


def puts(put, shape, device, dtype=torch.float32, steps=3):
    """Whether the next tokens of all rows lie where they belong, and are counted."""
    into, rows = drawn(shape, device)
    batch, kv_heads, d, dv, page, _ = shape
    after, counted = [x.clone() for x in into], [x.clone() for x in rows]
    for _ in range(steps):
        # Heads behind tokens, as a projection leaves them.
        new_k, new_v = (torch.randn(kv_heads, batch, 1, x).to(device, dtype).transpose(0, 1) for x in (d, dv))
        put(new_k, new_v, tuple(into), tuple(rows))
        table, lengths, ends = counted
        for row in range(batch * kv_heads):
            at, sequence = int(lengths[row]), row // kv_heads
            place = int(table[row, at // page]), at % page
            after[0][place[0], 0, place[1]] = new_k[sequence, row % kv_heads, 0].to(after[0].dtype)
            after[1][place[0], 0, place[1]] = new_v[sequence, row % kv_heads, 0].to(after[1].dtype)
            after[2][place] = int(ends[sequence])
            after[3][place] = 0.0
            lengths[row] = at + 1
        ends += 1
    return same([*into, *rows], [*after, *counted])


def drops(drop, shape, device, ring):
    """Whether the last token of some rows takes the place of another; ring: of the one whose turn it is."""
    into, rows = drawn(shape, device)
    batch, kv_heads, page = shape[0], shape[1], shape[4]
    which = torch.arange(0, batch * kv_heads, 2)
    after = [x.clone() for x in into]
    table, lengths, ends = (x.cpu() for x in rows)
    lengths = lengths.clone()
    if ring:
        first, size = 1, int(lengths.min()) - 1
        begun = ends - torch.randint(0, 3 * size + 1, ends.shape)
        chosen = [first + (int(ends[row // kv_heads]) - int(begun[row // kv_heads])) % size for row in which.tolist()]
        slots = Ring(first, size, begun.to(device))
    else:
        chosen = [int(torch.randint(0, int(lengths[row]), ())) for row in which.tolist()]
        slots = torch.tensor(chosen, device=device)
    for row, slot in zip(which.tolist(), chosen, strict=True):
        last = int(lengths[row]) - 1
        to, source = ((int(table[row, x // page]), x % page) for x in (slot, last))
        for x in after[:2]:
            x[to[0], 0, to[1]] = x[source[0], 0, source[1]]
        for x in after[2:]:
            x[to] = x[source]
        lengths[row] = last
    drop(tuple(into), tuple(rows), which.to(device), slots)
    return same([*into, rows[1]], [*after, lengths.to(device)])


def finds(find, lists, absent, device, dtype=torch.int64, shared=False):
    """Whether the tokens that are there, and no others, are found where they lie. shared: one list for all heads."""
    batch, kv_heads, page = 3, 2, 4
    table = torch.randperm(40)[: batch * kv_heads * 5].view(-1, 5).int()
    slots = torch.randint(-2 if absent else 0, 5 * page, (batch, 1 if shared else lists * kv_heads, 300), dtype=dtype)
    slots = slots.clamp(min=-1).expand(-1, lists * kv_heads, -1)
    places, lengths, listed = find(table.to(device), slots.to(device), page)
    listed = torch.arange(300).expand(len(places), 1, 300) if listed is None else listed.cpu()
    right = lengths.tolist() == [300] * len(places) and bool((places >= 0).all()) and bool((places < 160).all())
    for own, row in enumerate(slots.flatten(0, 1).tolist()):
        read = [int(places[own, at]) for at in listed[own, 0].tolist() if at >= 0]
        right &= read == [int(table[own // lists, s // page]) * page + s % page for s in row if s >= 0]
    return right


def picks(best, budget, unit, device):
    """Whether as many are taken as the budget says, of those that there are."""
    ends = torch.tensor([3, 100, 1000, 999])  # 0.07 of 100 are a bit more than 7
    rows, count = 3, 300
    values = torch.rand(4, rows, count).sort(-1, descending=True).values
    values[torch.arange(count) >= torch.randint(1, count, (4, rows, 1))] = -torch.inf
    indices = torch.randperm(1000)[:count].expand(4, rows, -1)
    found = best(values.to(device), indices.to(device), ends.to(device), budget, unit).cpu()
    right = True
    for b, seen in enumerate(ends.tolist()):
        most = count if isinstance(budget, int) else max(1, math.ceil(seen * budget / unit))
        for h in range(rows):
            taken = [
                int(i) if at < most and v > -math.inf else -1
                for at, (i, v) in enumerate(zip(indices[b, h].tolist(), values[b, h].tolist(), strict=True))
            ]
            right &= found[b, h].tolist() == taken
    return right


def raises(call, page, device):
    """Whether of each row the page of its last token alone is infinite."""
    scores, lengths = torch.randn(3, 70, 9), torch.randint(1, 9 * page, (3, 70), dtype=torch.int32)
    truth, found = scores.clone(), scores.to(device)
    for row in range(210):
        truth[row // 70, row % 70, (int(lengths[row // 70, row % 70]) - 1) // page] = math.inf
    call(found, lengths.to(device), page)
    return torch.equal(found.cpu(), truth)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_put(shape, put, dtype, device):
    assert puts(put, shape, device, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize("ring", [False, True])
def test_drop(shape, drop, ring, device):
    assert drops(drop, shape, device, ring)


@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS)
def test_find(lists, absent, shared, dtype, find, device):
    assert finds(find, lists, absent, device, dtype, shared)


@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS)
def test_finds_none(find, device):
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    places, lengths, listed = find(table, torch.zeros(1, 2, 0, dtype=torch.int64, device=device), 4)
    assert (places.shape, lengths.tolist(), listed.shape) == ((2, 0), [0, 0], (2, 1, 0))


@pytest.mark.parametrize(("budget", "unit"), [(300, 1), (0.1, 1), (0.07, 1), (0.3, 16), (1 / 3, 7), (1.0, 4)])
@pytest.mark.parametrize("best", BESTS.values(), ids=BESTS)
def test_best(budget, unit, best, device):
    assert picks(best, budget, unit, device)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("call", RAISES.values(), ids=RAISES)
def test_newest(page, call, device):
    assert raises(call, page, device)


POLICIES = {
    "dense": (Policy, 2),
    "snapkv": (lambda: snapkv(0.5, window=3), 2),
    "quest": (lambda: Quest(0.3, page=4), 2),
    "duo_attention": (lambda: mechanism("duo_attention")(Dims(4, 8, 2), sink=2, recent=9).policy, 1),
    "tidal_decode": (lambda: tides("tidal_decode", budget=0.3), 4),
    "lessismore": (lambda: tides("lessismore", budget=9, sinks=2), 4),
}


def tides(name, **params):
    return mechanism(name)(Dims(4 * 4, 8, 4 * 2), start=0, correction=2, num_layers=4, **params).policy


def decoded(name, ahead):
    """o of 20 tokens behind a prompt of two sequences, what is held, and ids as they were told; ahead: reserved."""
    torch.manual_seed(0)
    policy, layers = POLICIES[name]
    q, k, v = (torch.randn(layers, 2, heads, 60, 8) for heads in (4, 2, 2))
    ids, session, out = torch.randint(0, 99, (2, 60)), Session(policy(), layers), []
    for first, last in [(0, 40), *((at, at + 1) for at in range(40, 60))]:
        if ahead and first == 45:
            session.reserve(12)
        session.tell(ids[:, first:last], None, 2)
        new = [x[:, :, :, first:last] for x in (q, k, v)]
        out += [session.attend(index, *(x[index] for x in new)) for index in range(layers)]
    assert torch.equal(session.shared["token_ids"][:, :60], ids)
    stores = [session.store(index) for index in range(layers)]
    assert all(x.lengths.tolist() == x.counts.flatten().tolist() for x in stores)
    assert all(x.ends.tolist() == x.seen.tolist() for x in stores)
    return torch.cat(out[layers:], 2), [session.held(index) for index in range(layers)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_sessions_that_kernels_serve(name, ahead, monkeypatch):
    """Whoever writes, drops and finds."""
    truth, held = decoded(name, False)
    monkeypatch.setattr(steps, "has_kernels", lambda device: True)
    monkeypatch.setattr(PagePool, "on_host", False)
    found, theirs = decoded(name, ahead)
    assert_close(found, truth, truth, name="steps", terms=60)  # equals may be read in another order
    assert same(theirs, held)


# -- faults ------------------------------------------------------------------------------------------------------------


def counts_a_sequence_once_a_head(k, v, into, rows):
    steps.put_token(k, v, into, rows)
    rows[2].add_(k.shape[1] - 1)


def counts_no_token(k, v, into, rows):
    table, lengths, ends = rows
    steps.put_token(k, v, into, (table, lengths.clone(), ends))


def leaves_columns(k, v, into, rows):
    steps.put_token(k, v, (*into[:3], into[3].clone()), rows)


@pytest.mark.parametrize("put", [counts_a_sequence_once_a_head, counts_no_token, leaves_columns])
def test_puts_that_are_wrong_are_noticed(put):
    assert not puts(put, SHAPES[3], "cpu")


def goes_round_too_late(into, rows, which, slots):
    steps.drop_token(into, rows, which, Ring(slots.first, slots.size + 1, slots.begun))


def takes_the_first_sequence_for_all(into, rows, which, slots):
    steps.drop_token(into, rows, which, Ring(slots.first, slots.size, slots.begun[:1].expand(len(slots.begun))))


@pytest.mark.parametrize("drop", [goes_round_too_late, takes_the_first_sequence_for_all])
def test_rings_that_are_wrong_are_noticed(drop):
    assert not all(drops(drop, SHAPES[3], "cpu", True) for _ in range(8))


def finds_the_absent(table, slots, page):
    return *steps.find_tokens(table, slots, page)[:2], None


def finds_by_the_first_row(table, slots, page):
    return steps.find_tokens(table[:1].expand(len(table), -1), slots, page)


@pytest.mark.parametrize("find", [finds_the_absent, finds_by_the_first_row])
def test_tokens_found_elsewhere_are_noticed(find):
    assert not finds(find, 3, True, "cpu")


def counts_in_single_precision(values, indices, ends, budget, unit):
    most = (ends.float() * budget / unit).ceil().long().clamp(min=1)[:, None, None]
    taken = (torch.arange(values.shape[-1]) < most) & (values > -torch.inf)
    return indices.masked_fill(~taken, -1)


def test_parts_that_are_rounded_are_noticed():
    assert not picks(counts_in_single_precision, 0.07, 1, "cpu")


def test_the_compiler_takes_every_kernel():
    """For compute capability 9.0: in a process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_steps.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    assert {line.split()[0] for line in found.stdout.splitlines()} == {"put", "drop", "find", "best", "newest"}
