"""Measure this machine's GPU: the rates that `auto` chooses by."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from saccade.errors import known
from saccade.softmax.backends import ORDER, backend, reasons
from saccade.softmax.problem import Problem
from saccade.softmax.rates import BACKWARD, Priced, Row, Table, Work, table_of, user_path
from saccade.where import Blocks, Box, Causal, Frame, Full, Neighborhood, Pattern, Plan, Span, Window, plan_chosen

LENGTH, HEADS = 8192, 128  # of a probe in half precision: so much work that the device is later than the host
SLOW = 2, 8  # float32 takes so many times fewer tokens and heads
SHARE = 4  # one tile in so many is listed by the probe of full tiles
PAUSE = 0.03  # seconds of timed work behind a figure, at least
CALLS = 3  # in a row, so that none waits for the host


def measure(
    *,
    backends: Sequence[str] = ("sdpa", "fa4", "triton", "hopper", "flex"),
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    path: Path | None = None,
) -> Path:
    """Time every backend on this GPU and keep the rates, by which `attend` with backend="auto" chooses from then on.

    backends: which (default: all that run on CUDA). head_dims: D (default 64 and 128). dtypes: bfloat16, which stands
    for float16 too, and float32. path: the file (default: saccade/sm_XY.json in the user's cache directory, which comes
    before the table that the package brings). Rows that the file holds for other backends, dims and dtypes stay.

    Takes some minutes, most of them for compilations; run it on a GPU that does nothing else. Errors: RuntimeError
    without CUDA, ValueError for an unknown backend.
    """
    for name in backends:
        known("backends", name, ORDER)
    if not torch.cuda.is_available():
        raise RuntimeError("measure: there is no CUDA device here, and nothing is measured for other ones")
    capability = torch.cuda.get_device_capability()
    path = user_path(*capability) if path is None else path
    about = f"{datetime.date.today()}, torch {torch.__version__}, compute capability {capability[0]}.{capability[1]}"
    kept = {_key(row): row for row in (Table.load(path).rows if path.is_file() else ())}
    for name, dtype, head_dim, gradients in itertools.product(backends, dtypes, head_dims, (False, True)):
        row = _row(backend(name), dtype, head_dim, gradients)  # type: ignore[arg-type]
        if row.rates:
            kept[_key(row)] = row
            Table(tuple(kept.values()), about).save(path)
    table_of.cache_clear()
    return path


def _key(row: Row) -> tuple[str, str, int, bool]:
    return row.backend, row.dtype, row.head_dim, row.gradients


@dataclass(frozen=True)
class Timed:
    """Seconds that a call keeps the device busy, and seconds until it returns to the host."""

    device: float
    host: float


@dataclass(frozen=True)
class Speckled(Pattern):
    """Keys whose last bits are 0, whatever the query: it cuts every tile, by `axes` coordinates that no order sorts."""

    axes: int

    def allows(self, i: torch.Tensor, j: torch.Tensor, num_keys: int) -> torch.Tensor:
        return (j % 2**self.axes == 0).expand(torch.broadcast_shapes(i.shape, j.shape))

    def boxes(self, frame: Frame) -> list[Box]:
        lo = torch.zeros_like(frame.queries)
        bits = [(frame.keys >> axis) % 2 for axis in range(self.axes)]
        return [{("bit", axis, frame.tag): Span(bit, lo, lo + 1) for axis, bit in enumerate(bits)}]


def _probes(chosen: Priced, length: int, heads: int) -> dict[str, Pattern | Plan]:
    """What is timed, by the kind of work that it adds to those before it."""
    found: dict[str, Pattern | Plan] = {}
    if hasattr(chosen, "BLOCK"):
        rows, cols = (-(-length // size) for size in chosen.BLOCK)
        listed = torch.rand(1, rows, cols, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) < 1 / SHARE
        group_of = torch.zeros(1, heads, dtype=torch.int64, device="cuda")
        found["cut"], found["cut more"] = Speckled(1), Speckled(2)
        found["rows"] = Blocks(96)  # next to nothing in a row
        if hasattr(chosen, "planned"):
            found["cells"] = Neighborhood((length // 64, 64), (33, 17))  # cuts every tile
        found["tiles"] = plan_chosen(Full(), listed, group_of, length, length, chosen.BLOCK)
    dense: dict[str, Pattern | Plan] = {"full": Full(), "causal": Causal(), "window": Causal() & Window(length // 8)}
    return found | {kind: where for kind, where in dense.items() if kind in getattr(chosen, "built_in", ())}


def _row(chosen: Priced, dtype: torch.dtype, head_dim: int, gradients: bool) -> Row:
    """The row of a backend; without rates where it can run none of the probes."""
    torch.compiler.reset()  # else what was compiled for other shapes makes FlexAttention's kernels more general
    fewer = SLOW if dtype == torch.float32 else (1, 1)
    length, heads = LENGTH // fewer[0], HEADS // fewer[1]
    q, k, v = (
        torch.randn(1, heads, length, head_dim, device="cuda", dtype=dtype, requires_grad=gradients) for _ in range(3)
    )
    row = Row(chosen.name, str(dtype).removeprefix("torch."), head_dim, gradients, 0.0, 0.0, {})
    flops = 2 * (2 * head_dim) * (1 + BACKWARD * gradients) * heads
    hosts = []
    for kind, where in _probes(chosen, length, heads).items():
        problem = Problem.of(q, k, v, where)
        if reasons(chosen.name, problem):
            continue
        timed = _time(_call(problem, chosen.name))
        hosts.append(timed.host)
        if isinstance(where, Plan):
            fresh = _time_once(_call(replace(problem, where=replace(where)), chosen.name))
            row = replace(row, tables=max(0.0, fresh - timed.host))
        rate = _rate(row, kind, Work.of(problem, chosen), timed.device / flops)
        row = replace(row, rates={**row.rates, kind: rate})
    return replace(row, host=min(hosts, default=0.0))


def _rate(row: Row, kind: str, work: Work, seconds: float) -> float:
    """The rate of a kind of work, from the time of a probe (for one FLOP a pair) that holds kinds already known."""
    free = replace(row, rates={**row.rates, kind: float("inf")})
    rest = max(seconds - (free.seconds(work) or 0.0), seconds / 100)  # what is known may not explain all of it
    if kind != "cut more":
        return work.pairs[kind] / rest
    return 1 / (1 / row.rates["cut"] + rest / (work.pairs["cut"] * (work.comparisons - 1)))


def _call(problem: Problem, name: str) -> Callable[[], object]:
    """A call of the backend alone, with its backward where gradients are asked for."""
    run = backend(name).run
    if not problem.wants_gradients:
        return lambda: run(problem)
    inputs = problem.q, problem.k, problem.v
    cotangent = torch.randn_like(problem.q)
    return lambda: torch.autograd.grad(run(problem)[0], inputs, cotangent)


def _time_once(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time(call: Callable[[], object]) -> Timed:
    """The median span of a call on the device, and the shortest on the host, after warming up."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    host = min(_time_once(calls) for _ in range(CALLS)) / CALLS
    spans: list[float] = []
    while len(spans) < CALLS or sum(spans) < PAUSE:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the device busy while the host runs ahead
        start.record()
        calls()
        stop.record()
        stop.synchronize()
        spans.append(start.elapsed_time(stop) / 1e3 / CALLS)
    return Timed(median(spans), host)
