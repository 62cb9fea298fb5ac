"""Our backends on a GPU beside their peers: FlexAttention, cuDNN, and FlashAttention-4 where it is installed.

python benchmarks/attend_gpu.py [--only TEXT] [--seconds S]

B = 1, H = 16, bfloat16. Every function is captured into a CUDA graph, where it lets itself be, and replayed; all take
turns in one run, the second-level cache flushed before each. TFLOP/s count attended entries alone: 4 D a pair forward,
3.5 times that with the backward pass. FlexAttention is given its own mask function, compiled, and on grids its inputs
in the same order of tokens, for which nothing is counted; for us the order is counted.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import save, show
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from saccade import attend
from saccade.bench.timing import Samples, clock_for, ratio, rounds
from saccade.softmax import explain
from saccade.softmax.fa4 import installed
from saccade.softmax.lists import padded, turned
from saccade.where import Causal, Full, Neighborhood, Pattern, Plan, Window, plan_chosen

HEADS = 16
OURS = ("sdpa", "fa4", "triton", "hopper")
Call = Callable[[], Any]
Mask = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A pattern or a plan over n tokens, FlexAttention's mask function for it (None: every pair), and its bars.

    grid, cell: of a pattern on a grid, and the cells that tokens are sorted by. peers: what it is compared with.
    """

    name: str
    where: Pattern | Plan
    n: int
    mask: Mask | None
    dim: int = 128
    block: int = 128
    backward: bool = True
    peers: tuple[str, ...] = ("flex",)
    window: int | None = None


def random_tiles(n: int, size: int, density: float) -> tuple[Plan, Mask]:
    """A plan of random square tiles, the same for all heads, the diagonal among them, and its mask function."""
    tiles = n // size
    chosen = torch.rand(1, tiles, tiles, generator=torch.Generator().manual_seed(0)) < density
    chosen[:, torch.arange(tiles), torch.arange(tiles)] = True
    plan = plan_chosen(Full(), chosen, torch.zeros(1, HEADS, dtype=torch.int64), n, n, (size, size)).to("cuda")
    table = chosen[0].cuda()
    return plan, lambda b, h, i, j: table[i // size, j // size]


def neighborhood(grid: tuple[int, ...], kernel: int, cell: tuple[int, ...]) -> Mask:
    """The mask function of a neighbourhood for tokens sorted by cells, coordinates by arithmetic alone."""

    def coordinates(at: torch.Tensor) -> list[torch.Tensor]:
        size = functools.reduce(lambda a, b: a * b, cell)
        tile, within, found = at // size, at % size, []
        for length, side in zip(reversed(grid), reversed(cell), strict=True):
            found.append(tile % (length // side) * side + within % side)
            tile, within = tile // (length // side), within // side
        return found[::-1]

    def mask(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        inside = i >= 0
        for a, c, length in zip(coordinates(i), coordinates(j), grid, strict=True):
            start = (a - kernel // 2).clamp(0, length - kernel)
            inside = inside & (c >= start) & (c < start + kernel)
        return inside

    return mask


def cases() -> list[Case]:
    """What is measured, the work of the table of bars first."""
    n, flat, deep = 16384, (128, 128), (32, 48, 48)
    dense, all_peers = ("flex", "cudnn", "fa4"), ("flex", "fa4")
    found = [
        Case("full", Full(), n, None, peers=dense),
        Case("causal", Causal(), n, lambda b, h, i, j: i >= j, peers=dense),
        *(
            Case(
                f"causal window {w}",
                Causal() & Window(w),
                n,
                lambda b, h, i, j, w=w: (i >= j) & (i - j < w),
                peers=all_peers,
                window=w,
            )
            for w in (1024, 4096)
        ),
        Case("random 128 x 128 tiles, 25 %", *_reordered(n, 128, 0.25)),
        Case("random 128 x 128 tiles, 10 %", *_reordered(n, 128, 0.10), peers=(), backward=False),
        Case("random 128 x 128 tiles, 5 %", *_reordered(n, 128, 0.05), peers=(), backward=False),
        Case("random 64 x 64 tiles, 10 %", *_reordered(n, 64, 0.10), block=64),
        Case("random 32 x 32 tiles, 10 %", *_reordered(n, 32, 0.10), peers=()),
    ]
    for dim in (128, 64):
        mask = neighborhood(flat, 33, (8, 16))
        found.append(Case(f"2-D neighbourhood 33, D {dim}", Neighborhood(flat, 33), n, mask, dim, backward=False))
        total, mask = 32 * 48 * 48, neighborhood(deep, 9, (4, 4, 8))
        found.append(Case(f"3-D neighbourhood 9, D {dim}", Neighborhood(deep, 9), total, mask, dim, backward=False))
    return found


def _reordered(n: int, size: int, density: float) -> tuple[Plan, int, Mask]:
    plan, mask = random_tiles(n, size, density)
    return plan, n, mask


def graphed(call: Call) -> Call:
    """A call that replays what `call` does on the device; the call itself where it cannot be captured."""
    call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()  # a replay that goes wrong does so here, under its own name
    except RuntimeError as error:
        print(f"not captured: {error}"[:200])
        torch.cuda.synchronize()
        return call
    return functools.partial(_replayed, graph, call)


def _replayed(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Replay; `call` holds the tensors that the graph reads, which are freed and unmapped without it."""
    graph.replay()


def with_backward(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Call:
    """Forward and backward of a function of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def block_mask(case: Case) -> BlockMask:
    """What FlexAttention is given: its own mask function, and the tiles, which it would find by forming every pair."""
    plan = case.where
    if isinstance(plan, Pattern):
        plan = plan.plan(case.n, block=(case.block, case.block), device="cuda")
    lists = [x[:1][None] for each in (plan, turned(plan)) for x in padded(each, each.num_col_tiles)]
    return BlockMask((case.n, case.n), *lists, plan.block, case.mask)


def peers(case: Case) -> dict[str, Callable[..., torch.Tensor]]:
    """The functions of others that know this work."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    if "flex" in case.peers:
        torch._dynamo.reset()  # or the limit of recompilations leaves later cases uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)
        options: dict[str, Any] = {} if case.mask is None else {"block_mask": block_mask(case)}
        if case.block < 128:
            sides = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
            options["kernel_options"] = dict.fromkeys(sides, case.block)
        found["flex"] = lambda q, k, v: compiled(q, k, v, **options)
    causal = case.where == Causal()
    if "cudnn" in case.peers:

        def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        found["cudnn"] = cudnn
    if "fa4" in case.peers and installed():
        from flash_attn.cute import flash_attn_func

        window = (None, None) if case.window is None else (case.window - 1, 0)

        def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            o = flash_attn_func(
                *(x.transpose(1, 2) for x in (q, k, v)), causal=causal or window[0] is not None, window_size=window
            )
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        found["fa4"] = fa4
    return found


def measure(case: Case, backward: bool, seconds: float) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of all, and how many times faster our kernels, and the best of our backends, are."""
    inputs = [torch.randn(1, HEADS, case.n, case.dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    plan = case.where if isinstance(case.where, Plan) else case.where.plan(case.n, heads=HEADS, device="cuda")
    work = 4 * plan.num_attended * HEADS * case.dim * (3.5 if backward else 1)
    asking = [x.requires_grad_(backward) for x in inputs]
    refused = explain(*asking, case.where)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        f"our {name}": functools.partial(attend, where=case.where, backend=name) for name in OURS if not refused[name]
    }
    functions |= peers(case)
    calls = {}
    bare = [x.detach() for x in inputs]
    for name, function in functions.items():
        call = with_backward(function, inputs) if backward else torch.no_grad()(functools.partial(function, *bare))
        try:
            calls[name] = graphed(call)
        except Exception as error:  # a peer that cannot do this work is left out, and said so
            if name.startswith("our "):
                raise
            print(f"{name} cannot: {type(error).__name__}: {str(error)[:200]}")
    names = [name for name in calls if name != "our triton"]
    samples = dict(
        zip(
            names,
            rounds([calls[name] for name in names], calls["our triton"], seconds=seconds, clock=clock_for("cuda")),
            strict=True,
        )
    )
    mine = samples[names[0]].baseline_seconds if names else clock_for("cuda")([calls["our triton"]] * 20)[10]
    taken = {"our triton": mine} | {name: found.seconds for name, found in samples.items()}
    best = min((name for name in taken if name.startswith("our ")), key=taken.__getitem__)
    row: dict[str, Any] = {"density": round(plan.density, 4), "best of ours": best.removeprefix("our ")}
    for name, spent in taken.items():
        row |= {f"{name} ms": round(spent * 1e3, 4), f"{name} TFLOP/s": round(work / spent / 1e12)}
    for name in (name for name in names if not name.startswith("our ")):
        ours = ratio(Samples(samples[name].baseline, samples[name].function))  # theirs over ours
        row |= {f"triton over {name}": round(ours.median, 3), f"best over {name}": round(taken[name] / taken[best], 3)}
        row |= {f"triton over {name} low": ours.low and round(ours.low, 3)}
        row |= {f"triton over {name} high": ours.high and round(ours.high, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and direction")
    parser.add_argument("--forward", action="store_true", help="leave the backward pass out")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for case in (case for case in cases() if options.only in case.name):
        for backward in (False, True) if case.backward and not options.forward else (False,):
            name = f"{case.name}, forward{' + backward' if backward else ''}"
            row = measure(case, backward, options.seconds)
            dense = "causal" if case.window is not None else "full"
            whole = [r for r in rows if r["pattern"] == name.replace(case.name, dense) and case.n == r["tokens"]]
            if whole and case.name not in (
                "full",
                "causal",
            ):  # 1 would be the time of the fastest dense kernel times the density
                fastest = min(spent for what, spent in whole[0].items() if what.endswith(" ms"))
                row["over density x dense"] = round(
                    row[f"our {row['best of ours']} ms"] / (row["density"] * fastest), 3
                )
            rows.append({"pattern": name, "tokens": case.n, **row})
            print({k: v for k, v in rows[-1].items() if "low" not in k and "high" not in k}, flush=True)
            save("attend_gpu", rows[-1:], device="cuda", batch=1, heads=HEADS, dtype="bfloat16")
    shown = ("pattern", "density", "best of ours", "our triton TFLOP/s", "flex TFLOP/s", "cudnn TFLOP/s", "fa4 TFLOP/s")
    shown += ("triton over flex", "best over flex", "best over cudnn", "best over fa4", "over density x dense")
    show("TFLOP/s on attended entries, and ratios", [{name: row.get(name) for name in shown} for row in rows])


if __name__ == "__main__":
    main()
