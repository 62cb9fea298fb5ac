"""Decoding on a GPU: one query a sequence over pages, beside scaled_dot_product_attention and the device's copy rate.

Every figure is of replays of a captured graph of CALLS calls, so that no launch waits for the host. No call finds its
keys in the second-level cache: they are many times its size, and the calls of a graph read lists that have no page in
common. Ours and the baseline run in turns; the speed-up is the median of the pairs' ratios with a 95 % interval. The
share of the copy: bytes of the keys and values that a call must read, a second, over the rate at which the device
copies 2 GiB, read and written, in the same run; the merge is part of a call. Pages in codes of 8 and 4 bits, keys by
channel and values by token, are beside the same lists of the same pages in bfloat16; zeros and steps are among the
bytes that they must read. 32 query heads over 8 key heads, D = 128, bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import save, show
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.bench.timing import Call, ratio, rounds
from saccade.softmax import Pages, attend_cascade, attend_pages
from saccade.softmax.page_rows import Found
from saccade.softmax.paged import CodedFrames, Codes

HEADS, KV_HEADS, DIM, CALLS, CODE_GROUP = 32, 8, 128, 10, 32
TOKEN_BYTES = 2 * 2 * KV_HEADS * DIM  # of its keys and values, of all heads
DEVICE = "cuda"


class EventClock:
    """CUDA events around each call; the host waits once, at the end."""

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def captured(calls: Sequence[Callable[[], object]]) -> Call:
    """One replay of them all, in a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def copy_rate() -> float:
    """Bytes a second of a copy from device memory to device memory, read and written."""
    source = torch.randn(2**30, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    seconds = sorted(EventClock()([lambda: target.copy_(source)] * 12)[2:])
    return 2 * source.numel() * 2 / seconds[len(seconds) // 2]


def store(batch: int, tokens: int, page: int, memory: Sequence[Tensor]) -> Pages:
    """Full sequences, their pages scattered over the front of `memory`, one part for keys and one for values."""
    count = batch * tokens // page
    k, v = (x[: count * page * KV_HEADS * DIM].view(count, KV_HEADS, page, DIM) for x in memory)
    table = torch.randperm(count, device=DEVICE).int().view(batch, -1)
    return Pages(k, v, table, torch.full_like(table[:, 0], tokens))


def coded(batch: int, tokens: int, page: int, bits: int) -> tuple[Pages, int]:
    """As `store`, a sequence a key head, every page in codes; and the bytes of a token of all heads."""
    rows, count = batch * KV_HEADS, batch * KV_HEADS * tokens // page

    def codes(groups: tuple[int, int]) -> Codes:
        packed = torch.randint(256, (count + 1, page, DIM * bits // 8), dtype=torch.uint8, device=DEVICE)
        zero = -2 - torch.rand(count + 1, *groups, dtype=torch.bfloat16, device=DEVICE)
        group = 0 if groups[0] == 1 else CODE_GROUP
        return Codes(packed, zero, (4 / 2**bits * torch.rand_like(zero)), bits, group)

    frames = CodedFrames(
        codes((1, DIM)),
        codes((page, DIM // CODE_GROUP)),
        torch.zeros(count, dtype=torch.int64, device=DEVICE),
        torch.randperm(count, device=DEVICE) + 1,
    )
    table = torch.arange(count, dtype=torch.int32, device=DEVICE).view(rows, -1)
    nobody = torch.zeros(1, 1, page, DIM, dtype=torch.bfloat16, device=DEVICE)
    pages = Pages(nobody, nobody, table, torch.full_like(table[:, 0], tokens), Found(), frames)
    return pages, KV_HEADS * sum(x[0].nbytes for part in frames[:2] for x in part[:3]) // page


def chosen(pages: Pages, share: float) -> tuple[list[Tensor], int]:
    """CALLS lists of a share of the pages, for each sequence and key head, no page in two of them; and the tokens."""
    batch, count = pages.table.shape
    most = int(count * share)
    order = torch.rand(batch, KV_HEADS, count, device=DEVICE).argsort(-1).int()
    return [order[..., i * most : (i + 1) * most].contiguous() for i in range(CALLS)], batch * most * pages.page


def cases(memory: Sequence[Tensor]) -> list[dict[str, Any]]:
    """name, sequences, tokens each, calls of ours, tokens that a call reads, calls of the baseline; of codes, bytes."""

    def queries(batch: int) -> Tensor:
        return torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16, device=DEVICE)

    def dense(q: Tensor, tokens: int) -> list[Callable[[], object]]:
        k, v = (x[: len(q) * tokens * KV_HEADS * DIM].view(len(q), KV_HEADS, tokens, DIM) for x in memory)
        return [lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)] * CALLS

    def ours(name: str, q: Tensor, pages: Pages, lists: list[Any], read: int, base: list[Any]) -> dict[str, Any]:
        calls = [lambda each=each: attend_pages(q, pages, each) for each in lists]
        tokens = pages.table.shape[1] * pages.page
        return {"name": name, "batch": len(q), "tokens": tokens, "calls": calls, "read": read, "baseline": base}

    found = []
    for batch, tokens in ((8, 65536), (1, 131072)):
        q = queries(batch)
        base = dense(q, tokens)
        sdpa = {"name": "sdpa, dense", "batch": batch, "tokens": tokens, "calls": base, "baseline": base}
        found.append({**sdpa, "read": batch * tokens})
        pages = store(batch, tokens, 16, memory)
        found.append(ours("every page, pages of 16", q, pages, [None] * CALLS, batch * tokens, base))
        for page in (16, 32, 64):
            pages = store(batch, tokens, page, memory)
            lists, read = chosen(pages, 0.1)
            found.append(ours(f"10 %, pages of {page}", q, pages, lists, read, base))
    batch, tokens = 8, 65536
    q, pages = queries(batch), store(batch, tokens, 16, memory)
    eighths = torch.arange(1, 9, device=DEVICE, dtype=torch.int32)
    ragged = replace(pages, lengths=pages.lengths * eighths // 8)
    read = int(ragged.lengths.sum())
    found.append(ours("ragged, 1/8 .. 8/8, every page", q, ragged, [None] * CALLS, read, dense(q, tokens)))
    counts = ragged.lengths.repeat_interleave(KV_HEADS) // 16 // 10
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    orders = [torch.randperm(int(n) * 10, device=DEVICE, dtype=torch.int32) for n in counts]
    lists = [(indptr, torch.cat([x[i * len(x) // 10 :][: len(x) // 10] for x in orders])) for i in range(CALLS)]
    read = int(counts.sum()) * 16 // KV_HEADS
    found.append(ours("ragged, 10 %, pages of 16", q, ragged, lists, read, dense(q, tokens)))
    for bits in (8, 4):
        for page in (16, 64):
            pages, token_bytes = coded(batch, tokens, page, bits)
            k, v = (x[: len(pages.coded.hot_at) * page * DIM].view(-1, 1, page, DIM) for x in memory)
            plain = Pages(k, v, pages.coded.cold_at.int().view_as(pages.table) - 1, pages.lengths)
            lists, read = chosen(store(batch, tokens, page, memory), 0.1)
            lists = [x.view(batch * KV_HEADS, 1, -1) for x in lists]
            of_rows = q.view(batch * KV_HEADS, HEADS // KV_HEADS, 1, DIM)
            base = [lambda each=each, of=plain, q=of_rows: attend_pages(q, of, each) for each in lists]
            case = ours(f"10 %, pages of {page}, {bits} bits", of_rows, pages, lists, read, base)
            found.append({**case, "batch": batch, "token bytes": token_bytes})
    # A prefix of 32,768 tokens that 32 sequences share, and 1,024 tokens of each one's own.
    batch, tokens, own = 32, 32768, 1024
    q, prefix = queries(batch), store(1, tokens, 64, memory)
    rest = store(batch, own, 64, [x[tokens * KV_HEADS * DIM :] for x in memory])
    both = torch.cat([prefix.table.expand(batch, -1), rest.table + tokens // 64], 1).contiguous()
    alone = replace(store(1, tokens + batch * own, 64, memory), table=both, lengths=rest.lengths + tokens)
    cascade = {
        "name": "cascade",
        "batch": batch,
        "tokens": tokens + own,
        "calls": [lambda: attend_cascade(q, prefix, rest)] * CALLS,
        "read": tokens + batch * own,
        "baseline": [lambda: attend_pages(q, alone)] * CALLS,
    }
    return [*found, cascade]


def measure(case: dict[str, Any], rate: float, seconds: float) -> dict[str, Any]:
    """One row."""
    function, baseline = captured(case["calls"]), captured(case["baseline"])
    (samples,) = rounds([function], baseline, seconds=seconds, clock=EventClock())
    speed, read = ratio(samples), case["read"] * case.get("token bytes", TOKEN_BYTES)
    return {
        "pattern": case["name"],
        "batch": case["batch"],
        "tokens": case["tokens"],
        "ms": round(samples.seconds / CALLS * 1e3, 4),
        "MB read": round(read / 1e6, 1),
        "TB/s": round(read * CALLS / samples.seconds / 1e12, 3),
        "share of copy": round(read * CALLS / samples.seconds / rate, 3),
        "baseline ms": round(samples.baseline_seconds / CALLS * 1e3, 4),
        "speed-up": round(speed.median, 2),
        "low": None if speed.low is None else round(speed.low, 2),
        "high": None if speed.high is None else round(speed.high, 2),
        "pairs": speed.pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    torch.manual_seed(0)
    before = copy_rate()
    size = 8 * 65536 * KV_HEADS * DIM
    memory = [torch.randn(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    rows = [measure(case, before, given.seconds) for case in cases(memory) if given.only in case["name"]]
    if not rows:
        parser.error(f"--only: no case is called {given.only!r}")
    after = copy_rate()
    show(f"decode; copy {before / 1e12:.2f} TB/s before, {after / 1e12:.2f} after", rows)
    about = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "bfloat16"}
    save("decode_gpu", rows, device=DEVICE, copy_bytes_per_second=[before, after], **about)


if __name__ == "__main__":
    main()
