"""Many small trainings on one device: a pool of processes, a file that grows by a line a training, and a time limit.

A sweep is a list of jobs and a function that does one. Jobs are taken in their order; each runs in one of `workers`
processes, which share the device, and what it found is appended to a JSON-lines file at once. A job whose key stands in
the file is not run again, so a sweep that was stopped goes on where it was: what is lost is what was running. A job
that raises, or whose process dies, is a line with its `error`, and does not come again unless it is asked for.

On a GPU the steps of a training are recorded as CUDA graphs and replayed, since small models wait for their launches. A
model whose steps cannot be recorded is trained all the same, step by step, in a new process; its row has `recorded`
false, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rows import Row, read
from torch import Tensor, nn

from saccade import attend, mechanism, mechanisms
from saccade.bench.dense import dense_attention
from saccade.bench.records import environment
from saccade.cache.recorded import CudaGraph, Replayed
from saccade.contract import Attention, Dims, Mechanism, Mixer
from saccade.hosts.block import AttentionMixer
from saccade.where import Causal, Window

# What is trained.


@dataclass(frozen=True)
class Contestant:
    """A mechanism of the catalogue, or a reference, with parameters; made of plain values, so that it travels.

    id: of the catalogue, "dense" or "window". params: of its constructor. Errors: those of the constructor.
    """

    id: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        inner = ", ".join(f"{key}={value}" for key, value in self.params.items() if key != "causal")
        return f"{self.id} ({inner})" if inner else self.id

    @property
    def cls(self) -> type[Mechanism] | None:
        """None for a reference."""
        return None if self.id in REFERENCES else mechanism(self.id)

    def build(self, dims: Dims, layer: int = 0, depth: int = 1, length: int | None = None) -> nn.Module:
        """The attention or the mixer of one layer.

        Mechanisms that differ between layers are told which it is, those that must know the longest row, how long.
        """
        if self.cls is None:
            return REFERENCES[self.id](dims, **self.params)
        params = self.cls.params()
        told = {"layer": layer, "num_layers": depth}
        given = {name: value for name, value in told.items() if type(params.get(name)) is int}
        if length is not None and params.get("length", length) is None:
            given["length"] = length
        return self.cls(dims, **{**given, **self.params})

    def mixer(self, dims: Dims, layer: int = 0, depth: int = 1, length: int | None = None) -> nn.Module:
        """`build`, with projections around what is an attention: x (B, N, C) -> (B, N, C)."""
        made = self.build(dims, layer, depth, length)
        return made if isinstance(made, Mixer) else AttentionMixer(made, dims=dims)


class Dense(nn.Module):
    """Softmax attention over all keys, or all up to the query: q (B, H, N, D), k, v -> (B, H, N, D)."""

    def __init__(self, dims: Dims, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, self.causal)


class Sliding(nn.Module):
    """Softmax attention over the last `size` keys, the query's own among them: q (B, H, N, D), k, v -> (B, H, N, D)."""

    def __init__(self, dims: Dims, *, size: int) -> None:
        super().__init__()
        self.where = Window(size) & Causal()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.where)


REFERENCES: dict[str, type[nn.Module]] = {"dense": Dense, "window": Sliding}


def choices(cls: type[Mechanism]) -> list[dict[str, str]]:
    """Values, other than the default, of a parameter that is a word, as the mechanism's own cases have them.

    >>> choices(mechanism("based"))
    [{'layer': 'window'}, {'layer': 'conv'}]
    """
    found = []
    for case in cls.cases():
        for name, value in case.params.items():
            other = isinstance(value, str) and value != cls.params()[name]
            if other and {name: value} not in found:
                found.append({name: value})
    return found


def of_families(
    families: Sequence[str], causal: bool, grid: tuple[int, ...] | None = None, *, variants: bool = False
) -> tuple[list[Contestant], dict[str, str]]:
    """The mechanisms of some families that can be built causal, or not, for a sequence or a grid; and why others not.

    variants: those with the parameters that `choices` finds, instead of those with the paper's.
    """
    dims, found, left_out = Dims(2, 32, grid=grid), [], {}
    for spec in mechanisms():
        if spec.family not in families:
            continue
        cls = mechanism(spec.id)
        if not issubclass(cls, (Attention, Mixer)):
            left_out[spec.id] = f"its contract is {cls.contract()}"
            continue
        if grid is not None and not {0, len(grid)} & set(spec.ranks):
            left_out[spec.id] = f"works on {spec.tokens}"
            continue
        told = {"causal": causal} if "causal" in cls.params() else {}
        for params in choices(cls) if variants else [{}]:
            one = Contestant(spec.id, {**told, **params})
            try:
                made = one.build(dims)
            except (ValueError, TypeError) as error:
                left_out[one.name] = str(error)
                continue
            if getattr(made, "causal", False) != causal:
                left_out[one.name] = "is causal" if not causal else "is not causal"
            else:
                found.append(one)
    return found, left_out


# How it is trained.


@dataclass
class Clock:
    """When to stop. share: told of how far a job is, 0 .. 1. over: the whole sweep's end, unix time. most: seconds."""

    share: Callable[[float], None]
    over: float = float("inf")
    most: float = float("inf")
    began: float = field(default_factory=time.time)

    @property
    def is_over(self) -> bool:
        return time.time() >= self.over

    @property
    def is_late(self) -> bool:
        return time.time() - self.began >= self.most


class Stopped(Exception):
    """The sweep's time is over, and the job is not done."""


class NotRecorded(Exception):
    """A step cannot be recorded, for the reason that this says; the process may be of no more use to its GPU."""


Graph = Callable[[Callable[[], None]], Replayed]


@dataclass
class Take:
    """Of inputs of one shape: tensors that a recording reads, how many calls ran as they are, and the recording."""

    inputs: list[Tensor]
    early: int = 0
    graph: Replayed | None = None


class Steps:
    """`run(*inputs)`, recorded once for all inputs of the same shapes, and replayed from then on.

    The first `few` calls of a shape run as they are, so that what is compiled, chosen or remembered at first is there;
    then one is recorded. Results are tensors that were there before, which `run` writes into.

    run: tensors -> None. model: the module in it; a buffer that it binds anew is put back where it lay, since a replay
    would look for it there. graph: what records (None: nothing is, all calls run as they are). few: 3.
    Costs a copy of the inputs a call, and the memory of a step for every shape.
    Errors: `NotRecorded` where `run` asks the device for a number, or draws one on the host.

    >>> from saccade.testing.tape import Tape
    >>> total = torch.zeros(())
    >>> step = Steps(lambda x: total.add_(x.sum()), nn.Identity(), Tape)
    >>> for n in range(6): step(torch.tensor([n, n]))
    >>> total.item(), step.replays
    (30.0, 3)
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module, graph: Graph | None, few: int = 3) -> None:
        self.run, self.model, self.graph, self.few = run, model, graph, few
        self.replays = 0
        self._takes: dict[Any, Take] = {}

    def __call__(self, *inputs: Tensor) -> None:
        if self.graph is None:
            self.run(*inputs)
            return
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self._takes:
            self._takes[shapes] = Take([x.clone() for x in inputs])
        take = self._takes[shapes]
        for x, new in zip(take.inputs, inputs, strict=True):
            x.copy_(new)
        if take.early < self.few:
            take.early += 1
            self._in_place(take.inputs)
            return
        if take.graph is None:
            take.graph = self._recorded(self.graph, take.inputs)  # a GPU is told nothing yet
        take.graph.replay()
        self.replays += 1

    def _in_place(self, inputs: Sequence[Tensor]) -> None:
        before = [(module, dict(module._buffers)) for module in self.model.modules()]
        self.run(*inputs)
        for module, buffers in before:
            for name, old in buffers.items():
                new = module._buffers[name]
                if old is not None and new is not None and new is not old:
                    module._buffers[name] = old.copy_(new.detach())

    def _recorded(self, graph: Graph, inputs: Sequence[Tensor]) -> Replayed:
        before = _host_generators()
        try:
            made = graph(lambda: self._in_place(inputs))
            if _host_generators() != before:
                raise RuntimeError("random numbers were drawn on the host, which a replay would not draw again")
        except Exception as error:
            why: BaseException = error
            while why.__context__ is not None:  # a graph that is broken off says less than what broke it off
                why = why.__context__
            raise NotRecorded(f"{type(why).__name__}: {why}"[:500]) from error
        return made


def _host_generators() -> Any:
    return random.getstate(), torch.get_rng_state().tolist()


@contextlib.contextmanager
def aside(device: str) -> Iterator[None]:
    """What is told to a GPU inside goes to a stream of its own: on the default one nothing can be recorded."""
    if device == "cpu":
        yield
        return
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@dataclass(frozen=True)
class Recipe:
    """AdamW, the rate by a cosine an epoch down to zero; stops above `enough` of validation accuracy."""

    epochs: int
    batch: int
    decay: float = 0.1
    enough: float = 0.99


def train(
    model: nn.Module,
    recipe: Recipe,
    rate: float,
    batches: Callable[[int], Iterator[tuple[Tensor, ...]]],
    loss: Callable[..., Tensor],
    steps: int,
    validate: Callable[[], float],
    clock: Clock,
    device: str,
    graph: Graph | None = None,
) -> Row:
    """Train and say how it went; a job that is late or whose loss is no number ends early, and says so.

    batches: epoch -> inputs of one batch after the other. loss: inputs of a batch -> (); with a graph it may not ask
    the device for a number. steps: batches of an epoch. validate: () -> accuracy. graph: what records steps (None:
    nothing; with one AdamW is fused, which rounds otherwise on a CPU).
    Errors: `Stopped` when the sweep is over, `NotRecorded`.
    """
    on_gpu = device == "cuda"
    fused = on_gpu or graph is not None
    # What a recording reads is a tensor, into which the schedule writes.
    settings = {"lr": torch.tensor(rate, device=device) if fused else rate, "fused": fused, "capturable": on_gpu}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.decay, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    last = torch.zeros((), device=device)

    def run(*inputs: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)  # a recording has gradients of its own
        found = loss(*inputs)
        found.backward()
        optimizer.step()
        last.copy_(found.detach())

    step = Steps(run, model, graph)
    done, valid, ended, curve = 0, 0.0, "all epochs", []
    with aside(device):
        for epoch in range(recipe.epochs):
            model.train()
            for inputs in batches(epoch):
                step(*inputs)
                done += 1
                if done % 10 == 0:
                    clock.share(done / (steps * recipe.epochs))
                if clock.is_over:
                    raise Stopped
                if clock.is_late:
                    break
            schedule.step()
            model.eval()
            valid = validate()
            curve.append(round(valid, 4))
            if not bool(last.isfinite()):  # read once an epoch: to look at a number is to wait for the device
                ended = "diverged"
            elif valid > recipe.enough:
                ended = "solved"
            elif clock.is_late:
                ended = "late"
            else:
                continue
            break
    found = {"valid": valid, "curve": curve, "steps": done, "planned": steps * recipe.epochs, "ended": ended}
    return {**found, "recorded": step.replays > 0}


# How jobs are run.


@dataclass(frozen=True)
class Job:
    """key: what tells it from others, plain values. contestant: name; alone: nothing else runs beside it.

    graph: what records its steps, which the sweep that hands it out says; None: nothing.
    """

    key: Mapping[str, Any]
    contestant: Contestant
    alone: bool = False
    graph: Graph | None = None

    @property
    def ident(self) -> str:
        return ident(self.key)


def ident(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


Work = Callable[[Job, Clock, str], Row]


def append(path: Path, row: Row) -> None:
    """Add a row, and see it written before anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what a kill cut off stays a line of its own
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def do(work: Work, job: Job, clock: Clock, device: str) -> Row | None:
    """One job's row; None when it was not done in time. Errors: `NotRecorded`."""
    row = {"id": job.ident, "key": dict(job.key), "contestant": job.contestant.name, "family": family(job.contestant)}
    try:
        torch.manual_seed(0)
        found = work(job, clock, device)
    except Stopped:
        return None
    except NotRecorded:
        raise
    except Exception as error:  # the others go on; the row tells
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        found = {"error": f"{type(error).__name__}: {error}"[:2000], "at": at}
    return {**row, **found, "seconds": round(time.time() - clock.began, 2)}


def family(contestant: Contestant) -> str:
    return "reference" if contestant.cls is None else contestant.cls.spec.family


def _serve(pipe: Connection, work: Work, device: str, over: float, most: float) -> None:
    """A worker: jobs in, shares and rows out, until the pipe closes or a recording fails."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            job = pipe.recv()
            clock = Clock(lambda share: pipe.send(("share", share)), over, most)
            try:
                pipe.send(("row", do(work, job, clock, device)))
            except NotRecorded as error:
                pipe.send(("unrecorded", str(error)))
                os._exit(0)  # not through a shutdown that asks the GPU
            if device == "cuda":
                gc.collect()  # an optimizer and its schedule hold each other, and gradients in a recording's memory
                torch.cuda.empty_cache()


class Worker:
    """A process, its pipe, and the job that it has."""

    def __init__(self, *told: Any) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *told), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.bar: TaskID | None = None

    def end(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()


class Sweep:
    """Run jobs until all are done or `minutes` are over.

    path: the file of rows. work: what does a job; with workers it is a function of a module, so that it travels.
    needless: (job, rows so far) -> must it not be run any more? workers: processes (0: in this one, one after another).
    most: seconds of a job, after which it ends and says so. Jobs of a contestant that was late once come last. A job
    that is `alone` waits until nothing runs.

    graph: what records the steps of jobs in other processes (default: `CudaGraph` on a GPU, else nothing). Where a
    recording fails, or the process dies, the job begins anew in a new process without one, and so do the contestant's
    others; their rows have the reason, `unrecorded`. In this process nothing is recorded, since it has to go on.
    """

    def __init__(
        self,
        path: Path,
        work: Work,
        *,
        needless: Callable[[Job, list[Row]], bool] = lambda job, rows: False,
        minutes: float = float("inf"),
        most: float = float("inf"),
        workers: int = 0,
        device: str = "cpu",
        retry: bool = False,
        console: Console | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.path, self.work, self.needless, self.most = path, work, needless, most
        self.num_workers, self.device = workers, device
        self.graph = CudaGraph if graph is None and device == "cuda" else graph
        self.unrecorded: dict[str, str] = {}
        self.over = time.time() + 60 * minutes
        self.rows = [row for row in read(path) if not (retry and "error" in row)]
        surroundings = environment(device)
        machine = f"one {surroundings['gpu']}" if "gpu" in surroundings else "a CPU"
        self.stamp = {"machine": machine, "date": surroundings["time"][:10]}
        self.stamp |= {name: surroundings[name] for name in ("commit", "torch")}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)

    def run(self, jobs: Sequence[Job]) -> list[Row]:
        """The rows of the file afterwards."""
        done = {row["id"] for row in self.rows}
        waiting = [job for job in jobs if job.ident not in done]
        with self.progress:
            self.whole = self.progress.add_task("jobs", total=len(jobs), completed=len(jobs) - len(waiting))
            (self._here if self.num_workers == 0 else self._there)(waiting)
        return self.rows

    def _take(self, waiting: list[Job], busy: bool) -> Job | None:
        """The next job that may run beside the busy ones; those that are needless leave the list."""
        late = {row["contestant"] for row in self.rows if row.get("ended") == "late"}
        for job in [job for job in waiting if self.needless(job, self.rows)]:
            waiting.remove(job)
            self.progress.advance(self.whole)
        ordered = sorted(waiting, key=lambda job: job.contestant.name in late)  # stable
        if not ordered or time.time() >= self.over or (busy and ordered[0].alone):
            return None
        waiting.remove(ordered[0])
        return ordered[0]

    def _keep(self, row: Row | None) -> None:
        if row is not None:
            why = None if row.get("recorded") else self.unrecorded.get(row["contestant"])
            self.rows.append({**row, **({"unrecorded": why} if why and "recorded" in row else {}), **self.stamp})
            append(self.path, self.rows[-1])
            self.progress.advance(self.whole)

    def _here(self, waiting: list[Job]) -> None:
        while job := self._take(waiting, busy=False):
            self._keep(do(self.work, job, Clock(lambda share: None, self.over, self.most), self.device))

    def _there(self, waiting: list[Job]) -> None:
        told = (self.work, self.device, self.over, self.most)
        workers = [Worker(*told) for _ in range(min(self.num_workers, len(waiting)))]
        try:
            while True:
                self._hand_out(workers, waiting)
                busy = [worker for worker in workers if worker.job]
                if not busy:
                    return
                for pipe in wait([worker.pipe for worker in busy], timeout=1.0):
                    at = next(i for i, worker in enumerate(workers) if worker.pipe is pipe)
                    if not self._hear(workers[at], waiting):
                        workers[at].end()
                        workers[at] = Worker(*told)
        finally:
            for worker in workers:
                worker.pipe.close()
            for worker in workers:
                worker.end()

    def _hand_out(self, workers: list[Worker], waiting: list[Job]) -> None:
        for worker in workers:
            if any(other.job and other.job.alone for other in workers):
                return
            if worker.job is None:
                job = self._take(waiting, busy=any(other.job for other in workers))
                if job is None:
                    return
                worker.job = replace(job, graph=None if job.contestant.name in self.unrecorded else self.graph)
                worker.bar = self.progress.add_task(f"  {job.contestant.name}", total=100)
                worker.pipe.send(worker.job)

    def _hear(self, worker: Worker, waiting: list[Job]) -> bool:
        """Take one message of a worker; False when the worker is of no more use, or has died.

        The job of one that died is a row that says so, if nothing was recorded there; else it waits again.
        """
        assert worker.job is not None
        assert worker.bar is not None
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(5)
            words = f"the process ended with code {worker.process.exitcode}"
            if worker.job.graph is None:
                kind, value = "died", do(_raise(words), worker.job, Clock(lambda share: None), self.device)
            else:
                kind, value = "unrecorded", words
        if kind == "share":
            self.progress.update(worker.bar, completed=round(100 * value))
            return True
        self.progress.remove_task(worker.bar)
        if kind == "unrecorded":
            self.unrecorded[worker.job.contestant.name] = value
            waiting.insert(0, worker.job)
        else:
            self._keep(value)
        worker.job = worker.bar = None
        # After an error a GPU may answer that process nothing but the error.
        return kind == "row" and (self.device == "cpu" or "error" not in (value or {}))


def _raise(words: str) -> Work:
    def work(job: Job, clock: Clock, device: str) -> Row:
        raise RuntimeError(words)

    return work


def start(
    args: argparse.Namespace, work: Work, jobs: Sequence[Job], missing: Mapping[str, str], **more: Any
) -> list[Row]:
    """Run a sweep as its options say; what is missing, and why, is told first. more: of `Sweep`."""
    console: Console = more.setdefault("console", Console())
    for name, why in missing.items():
        if not args.only or name in args.only:
            console.print(f"left out: {name}: {why}", highlight=False)
    limits = {"minutes": args.minutes, "most": args.job_seconds, "workers": args.workers, "retry": args.retry}
    chosen = [job for job in jobs if not args.only or job.contestant.id in args.only]
    return Sweep(args.out, work, device=device(), **limits, **more).run(chosen)


def options(doc: str | None, path: Path) -> argparse.ArgumentParser:
    """The options that every sweep has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=float("inf"), help="start nothing, and end what runs, after so many minutes")
    add("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that share the device")
    add("--job-seconds", type=float, default=120.0, help="a training that takes longer ends, and is marked as late")
    add("--out", type=Path, default=path, help="the file that rows are appended to")
    add("--retry", action="store_true", help="run those again that failed")
    add("--families", nargs="+", metavar="FAMILY")
    add("--only", nargs="+", metavar="ID", help="these contestants alone")
    return parser


def failures(rows: Sequence[Row], console: Console) -> None:
    """Print what failed, and where, if it did not succeed another time."""
    done = {row["id"] for row in rows if "error" not in row}
    for row in rows:
        if "error" in row and row["id"] not in done:
            console.print(f"failed: {row['contestant']}: {row['error']} ({row.get('at')})", highlight=False)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
