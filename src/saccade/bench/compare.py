"""Compare mechanisms on the same inputs: gate, time beside dense attention, draw, within a budget of seconds."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.bench import timing
from saccade.bench.accuracy import Gate, gate
from saccade.bench.contestant import Configured, Entry, backend_of, baseline_calls, density, watch_backends
from saccade.bench.dense import relative_error
from saccade.bench.draw import GRID_TOKENS, Drawing, calls_for, influence, inputs_for, reference
from saccade.bench.footprint import baseline_bytes, kept_bytes
from saccade.bench.guard import Failed, guard, is_memory
from saccade.bench.inputs import CapturedText, Photograph, Workload
from saccade.bench.memory import available_bytes, peak_bytes
from saccade.bench.records import Place, Record, Status, environment
from saccade.bench.sample import Sample
from saccade.contract import CachePolicy, Mechanism, Mixer
from saccade.errors import positive

LENGTHS = (512, 2048, 8192)
GATE_TOKENS = (128, 512)
GATE_MOST = 2048  # tokens at which a mechanism that declines all smaller pieces is judged
GATE_SECONDS = 5.0  # that a mechanism may take for its gate at least, since without it nothing of it is measured
STATE_SECONDS = 3.0  # that the steps to a mechanism's state may take at least
LEAST_BUDGET, EACH = 100.0, 2.0  # seconds, of all and of a mechanism
FIRST_SECONDS = 60.0  # that a first call may take on a device, where it compiles
GATE_SHARE, DRAW_SHARE = 0.3, 0.1  # of the budget
ROUNDS = math.ceil(timing.LEAST_PAIRS / 2)
CALLS = 2 + 2 * ROUNDS  # that a whole measurement takes: a first one, one that counts memory, and the timed ones
QUICK = 0.5  # seconds of a call of dense attention that may be spent on its picture
SAMPLES = 4  # inputs kept at once
LEAST_SECONDS = 0.4  # that a call may take whatever its share, as long as the budget lasts
TOGETHER = 8  # functions that share one baseline at most
Progress = Callable[[int, int, str], None]
Call = Callable[[], Tensor]


@dataclass
class Cost:
    """What one call cost at one length."""

    length: int
    seconds: float
    nbytes: int


@dataclass
class Runner:
    """A mechanism on its way through the comparison: its verdict so far, and what its calls cost.

    gate: set once it is passed. out: it stopped for good. done: units of work that are behind it.
    """

    entry: Entry
    workload: Workload
    record: Record
    gate: Gate | None = None
    costs: list[Cost] = field(default_factory=list)
    out: bool = False
    done: int = 0

    @property
    def runs(self) -> bool:
        return self.gate is not None and not self.out


@dataclass(frozen=True)
class Comparison:
    """Records in the order in which they came, drawings by mechanism and of dense attention by place, and what was
    measured where. seconds: what it took of its `budget`. first_seconds: what first calls on a device took besides.
    unmeasured: mechanisms that an interrupt came before, None when there was no interrupt.
    """

    records: tuple[Record, ...]
    environment: dict[str, Any]
    drawings: dict[str, Drawing] = field(default_factory=dict)
    references: dict[Place, Drawing] = field(default_factory=dict)
    workloads: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    budget: float = 0.0
    first_seconds: float = 0.0
    unmeasured: tuple[str, ...] | None = None


def compare(
    classes: Iterable[type[Mechanism] | Configured] | None = None,
    workloads: Sequence[Workload] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every mechanism that applies; one that fails becomes a record, never an exception.

    classes: mechanisms (default: the whole catalogue), with their default parameters, or `Configured` ones, of which
    the layer runs that the workload was read from (default: the middle one). workloads: each mechanism runs on
    the first that offers the grid it needs (default: captured text, and the photograph for grids). lengths: tokens,
    ascending or not. dtype: float32 on the CPU and bfloat16 elsewhere by default. backend: asked of every mechanism;
    one that cannot be asked and runs another is FELL_BACK. budget: seconds for all of it (default: 2 a mechanism, at
    least 100); lengths are gone through in ascending order, every mechanism at one before any at the next, and a
    mechanism whose call outgrows its share stops there as TIMEOUT. On a device first calls, which compile, have a limit
    of their own and are not the budget's. progress: called with (units done, units in all,
    what is under way). An interrupt (KeyboardInterrupt) ends it early; what was measured until then is returned.

        found = compare([MyAttention], [Synthetic((1, 8, 2, 4096, 64))], lengths=[1024, 4096])
        for record in found.records:
            print(record.mechanism, record.length, record.status, record.speedup)
    """
    if classes is None:
        from saccade.catalogue import mechanism, mechanisms

        classes = [mechanism(spec.id) for spec in mechanisms()]
    if not lengths:
        raise ValueError("lengths: got none; pass at least one")
    lengths = sorted({positive("lengths", n) for n in lengths})
    classes = list(classes)
    budget = max(LEAST_BUDGET, EACH * len(classes)) if budget is None else budget
    if not budget > 0:
        raise ValueError(f"budget: got {budget}; pass seconds > 0")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    workloads = [CapturedText(lengths), Photograph()] if workloads is None else workloads
    return _Run(workloads, lengths, device, dtype, backend, budget, progress).all(classes)


class _Run:
    def __init__(
        self,
        workloads: Sequence[Workload],
        lengths: list[int],
        device: str,
        dtype: torch.dtype,
        backend: str | None,
        budget: float,
        progress: Progress | None,
    ) -> None:
        self.start, self.budget, self.first_seconds = time.perf_counter(), budget, 0.0
        self.stamp = environment(device)
        self.workloads, self.lengths, self.device, self.dtype, self.backend = workloads, lengths, device, dtype, backend
        self.clock = timing.clock_for(device)
        self.records: list[Record] = []
        self.drawings: dict[str, Drawing] = {}
        self.references: dict[Place, Drawing] = {}
        self.runners: list[Runner] = []
        self.baselines: dict[Place, list[Cost]] = {}
        self.noise: dict[Place, float] = {}
        self.samples: dict[tuple[str, int, int], Sample] = {}
        self.progress = progress or (lambda *_: None)

    def all(self, classes: list[type[Mechanism] | Configured]) -> Comparison:
        unmeasured = None
        self.runners = [runner for cls in classes if (runner := self._enter(cls))]
        try:
            self._go_through()
        except KeyboardInterrupt:
            met = {record.mechanism for record in self.records}
            unmeasured = tuple(r.record.mechanism for r in self.runners if r.record.mechanism not in met)
        used = {r.workload for r in self.records}
        about = {w.name: w.about for w in self.workloads if w.name in used}
        seconds = self.budget - self._left()
        self._tell("done" if unmeasured is None else "stopped")
        return Comparison(
            tuple(self.records),
            self.stamp,
            self.drawings,
            self.references,
            about,
            seconds,
            self.budget,
            self.first_seconds,
            unmeasured,
        )

    def _go_through(self) -> None:
        for workload in {r.workload.name: r.workload for r in self.runners}.values():
            self._tell(f"reading {workload.name}")
            self.sample(workload, self.lengths[-1], workload.ranks[0])
        with timing.threads(1):  # what is small gains nothing from several
            self._check_all()
        for at, length in enumerate(self.lengths):
            for place in sorted({r.record.place for r in self.runners if r.runs}):
                with timing.threads(timing.quiet_threads()):
                    self._measure(place, length)
            for runner in self.runners:
                runner.done = max(runner.done, at + 2)
        with timing.threads(1):
            self._draw_all()

    def _left(self) -> float:
        return self.budget - (time.perf_counter() - self.start - self.first_seconds)

    @contextmanager
    def _first(self, limit: float, runner: Runner | None = None) -> Iterator[None]:
        """Guard a first call by `limit`; on a device it compiles, has a limit of its own and is not the budget's."""
        compiles = _compiles(self.device)
        began = time.perf_counter()
        try:
            with guard(max(limit, FIRST_SECONDS) if compiles else limit):
                yield
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize(self.device)
        finally:
            seconds = time.perf_counter() - began
            self.first_seconds += seconds if compiles else 0.0
            if runner:
                longest = max(seconds, runner.record.first_seconds or 0.0)
                runner.record = replace(runner.record, first_seconds=longest)

    @property
    def _units(self) -> int:
        """Of one mechanism: its gate, its lengths, its picture."""
        return len(self.lengths) + 2

    def _tell(self, text: str) -> None:
        self.progress(sum(r.done for r in self.runners), self._units * len(self.runners), text)

    def sample(self, workload: Workload, length: int, rank: int) -> Sample:
        """The inputs, on the device; the last few are kept."""
        key = (workload.name, length, rank)
        if key not in self.samples:
            while len(self.samples) >= SAMPLES:
                del self.samples[next(iter(self.samples))]
            self.samples[key] = workload.sample(length, rank).to(self.device, self.dtype)
        return self.samples[key]

    def _reject(self, record: Record, failure: Failed) -> None:
        self.records.append(replace(record, status=failure.status, message=failure.message))

    def _enter(self, one: type[Mechanism] | Configured) -> Runner | None:
        """Choose the inputs; without any that fit, the mechanism is UNSUPPORTED."""
        cls = one.cls if isinstance(one, Configured) else one
        spec = cls.spec
        record = Record(
            spec.id,
            spec.name,
            spec.family,
            cls.contract(),
            spec.year,
            Status.OK,
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
            grid=spec.ranks[0],
            layer=issubclass(cls, Mixer),
            causal=cls.causal,
        )
        found = inputs_for(cls, self.workloads)
        if found is None:
            offered = ", ".join(w.name for w in self.workloads)
            message = f"needs {spec.tokens}; none of the inputs ({offered}) is one"
            self._reject(record, Failed(Status.UNSUPPORTED, message))
            return None
        workload, rank = found
        record = replace(record, workload=workload.name, grid=rank)
        if not isinstance(one, Configured):
            return Runner(Entry(cls, self.backend), workload, record)
        layer = one.at(getattr(workload, "layer", None))
        record = replace(record, mechanism=f"{spec.id}:{one.name}", name=f"{spec.name} ({one.name}, layer {layer})")
        return Runner(Entry(cls, self.backend, one.layers[layer]), workload, record)

    # The gate.

    def _check_all(self) -> None:
        end = self._left() * (1 - GATE_SHARE)
        for at, runner in enumerate(self.runners):
            self._tell(f"checking {runner.record.mechanism}")
            self._check(runner, max(0.0, self._left() - end) / (len(self.runners) - at))
            runner.done = 1 if runner.runs else self._units

    def _check(self, runner: Runner, share: float) -> None:
        """Judge the numbers on a small piece, on a larger one if that fits `share`; a piece that is too small for the
        mechanism does not count against it as long as a larger one is taken, nor does one that is too long for its own
        equations.
        """
        whole = self.sample(runner.workload, self.lengths[0], runner.record.grid)
        pieces = [whole.crop(tokens) for tokens in GATE_TOKENS if tokens < whole.length]
        found: Gate | None = None
        first: Sample | None = None
        spent = 0.0
        pieces.append(whole.crop(GATE_MOST))
        for sample in pieces:
            is_last = sample is pieces[-1]
            if found and (is_last or spent * (sample.length / found.tokens) ** 2 > share):
                break
            began = time.perf_counter()
            try:
                judged = self._judge(runner, sample, max(GATE_SECONDS, 4 * share))
            except Failed as failure:
                if failure.status == Status.UNSUPPORTED and not found and not is_last:
                    continue
                if found and failure.status in (Status.UNSUPPORTED, Status.TIMEOUT):
                    break
                self._reject(replace(runner.record, length=sample.length, shape=sample.shape), failure)
                return
            spent = time.perf_counter() - began
            first = first or sample
            if found and not judged.decides:
                break
            found = judged
            runner.record = replace(
                runner.record, numerical_error=found.error, eager_error=found.eager_error, gate_tokens=found.tokens
            )
            if not found.decides:
                runner.record = replace(runner.record, status=Status.UNPROVEN, message=found.message)
                break
            if not found.ok:
                record = replace(runner.record, length=sample.length, shape=sample.shape)
                self._reject(record, Failed(Status.WRONG, found.message))
                return
        runner.gate = found
        if first and runner.record.status == Status.OK:
            self._weigh_state(runner, first, max(STATE_SECONDS, share))

    def _judge(self, runner: Runner, sample: Sample, limit: float) -> Gate:
        entry = runner.entry
        with self._first(limit, runner):
            module = entry.build(sample, self.device, self.dtype)
            runner.record = replace(runner.record, causal=bool(module.causal))
            entry.call(module, sample)()
        with guard(limit):
            return gate(module, entry.inputs(sample), self.dtype, seconds=limit / 2, **entry.options())

    def _weigh_state(self, runner: Runner, sample: Sample, limit: float) -> None:
        """Record what it keeps of the tokens of `sample`. The whole was judged, the step was not: where that fails, the
        mechanism stays in the comparison, and the record says why its state is not known.
        """
        entry = runner.entry
        try:
            with self._first(limit):
                found = _state(entry.build(sample, self.device, self.dtype), entry, sample)
        except Failed as failure:
            if failure.status != Status.UNSUPPORTED:  # a variant that does not decode declines to
                runner.record = replace(runner.record, message=f"its state is not known: {failure.message}")
            return
        runner.record = replace(runner.record, **found)

    # Times.

    def _share(self, length: int) -> float:
        """Seconds for one mechanism at `length`: what is left but for the pictures, by length over what is to come."""
        weights = sum(sum(self.lengths[max(0, r.done - 1) :]) for r in self.runners if r.runs)
        return max(0.0, self._left() - DRAW_SHARE * self.budget) * length / max(length, weights)

    def _measure(self, place: Place, length: int) -> None:
        """Every mechanism of a place at one length, beside one baseline."""
        runners = [r for r in self.runners if r.runs and r.record.place == place]
        sample = self.sample(runners[0].workload, length, place.grid)
        costs = self.baselines.setdefault(place, [])
        if costs and costs[-1].length == sample.length:  # two lengths, one grid
            return
        base = Record(
            "dense",
            f"Dense {'layer' if place.layer else 'attention'}",
            "baseline",
            "Mixer" if place.layer else "Attention",
            2017,
            Status.OK,
            workload=place.workload,
            length=sample.length,
            shape=sample.shape,
            device=self.device,
            dtype=runners[0].record.dtype,
            grid=place.grid,
            layer=place.layer,
            causal=place.causal,
            threads=torch.get_num_threads(),
        )
        self._tell(f"{place.baseline}, {sample.length} tokens")
        try:
            _foresee(costs, sample.length, max(0.0, self._left()) / (1 + 2 * ROUNDS), self.device)
            limit = max(1.0, self._left() / 2)
            with self._first(limit):
                backend, call = self._fastest(baseline_calls(place.layer, place.causal, sample))
            base = replace(base, backend=backend)
            with guard(limit):
                kept: list[Tensor] = []
                costs.append(self._cost(lambda: kept.append(call()), sample.length))
                costs[-1].seconds = self.clock([call])[0]
                dense = kept.pop().float()
                noise = self._noise(place, call, costs[-1], self._share(length))
        except Failed as failure:
            self._reject(base, failure)
            for runner in runners:
                self._stop(runner, sample, Failed(failure.status, f"its baseline did not run: {failure.message}"))
            return
        base = replace(base, peak_bytes=costs[-1].nbytes, baseline_bytes=costs[-1].nbytes)
        base = base if place.layer else replace(base, density=1.0, approximation_error=0.0)
        if place.causal:
            cache = baseline_bytes(place.layer, sample.crop(sample.length))
            base = replace(base, state_bytes=cache, state_tokens=sample.length, baseline_state_bytes=cache)
        own = len(self.records)
        self.records.append(replace(base, seconds=costs[-1].seconds, baseline_seconds=costs[-1].seconds, speedup=1.0))
        ready: list[tuple[Runner, Record, Call]] = []
        for at, runner in enumerate(runners):
            self._tell(f"{runner.record.mechanism}, {sample.length} tokens")
            share = self._share(length)
            found = self._prepare(runner, sample, dense, costs[-1].nbytes, share)
            if found:
                ready.append((runner, *found))
            together = min(TOGETHER, max(1, round(2 * ROUNDS * costs[-1].seconds / max(share, 1e-3))))
            if ready and (len(ready) == together or at == len(runners) - 1):
                self._time(ready, call, sample, noise, share)
                ready = []
        beside = [r.baseline_seconds for r in self.records[own + 1 :] if r.baseline_seconds]
        if beside:  # the very calls that the others are a ratio to
            seconds, costs[-1].seconds = statistics.median(beside), min(costs[-1].seconds, *beside)
            self.records[own] = replace(self.records[own], seconds=seconds, baseline_seconds=seconds)

    def _fastest(self, calls: Mapping[str, Call]) -> tuple[str, Call]:
        """Of several ways to compute the same, the one that takes least; those that do not run are left out."""
        if len(calls) == 1:
            return next(iter(calls.items()))
        found: dict[str, float] = {}
        for name, call in calls.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why a kernel does not run
                    call()
                    found[name] = min(self.clock([call] * ROUNDS))
            except RuntimeError as error:
                if is_memory(error):
                    raise
        if not found:
            raise Failed(Status.WRONG, f"none of {', '.join(calls)} runs")
        best = min(found, key=found.__getitem__)
        return best, calls[best]

    def _noise(self, place: Place, call: Call, cost: Cost, share: float) -> float:
        """What the baseline shows against itself; where measuring that does not fit `share`, what it showed before, at
        a shorter and therefore noisier length.
        """
        if place not in self.noise or 4 * ROUNDS * cost.seconds <= share:
            alone = timing.rounds([call], call, seconds=share, clock=self.clock)[0]
            self.noise[place] = timing.noise_floor(alone)
            cost.seconds = min(alone.function)
        return self.noise[place]

    def _cost(self, call: Callable[[], object], length: int) -> Cost:
        began = time.perf_counter()
        nbytes = peak_bytes(call, self.device)
        return Cost(length, time.perf_counter() - began, nbytes)

    def _time(
        self, ready: list[tuple[Runner, Record, Call]], baseline: Call, sample: Sample, noise: float, share: float
    ) -> None:
        """Time some mechanisms beside one baseline; when a call fails, each of them alone."""
        longest = self.baselines[ready[0][1].place][-1].seconds
        once = 2 * longest + sum(2 * runner.costs[-1].seconds for runner, _, _ in ready)
        seconds = max(share * len(ready) / 2, min(1.2 * ROUNDS * once, 2 * share * len(ready)))
        try:
            with guard(max(2 * seconds, 4 * once)):
                found = timing.rounds([c for _, _, c in ready], baseline, seconds=seconds, clock=self.clock)
        except Failed as failure:
            if len(ready) == 1:
                self._stop(ready[0][0], sample, failure)
                return
            for one in ready:
                self._time([one], baseline, sample, noise, share)
            return
        for (runner, record, _), taken in zip(ready, found, strict=True):
            self.records.append(_timed(record, taken, noise))
            runner.costs[-1].seconds = min(taken.function)  # what other programs added need not grow with the length
            runner.done += 1

    def _stop(self, runner: Runner, sample: Sample, failure: Failed) -> None:
        """Record why `runner` ends at this length, once and for all."""
        self._reject(replace(runner.record, length=sample.length, shape=sample.shape), failure)
        runner.out, runner.done = True, self._units - 1

    def _prepare(
        self, runner: Runner, sample: Sample, dense: Tensor, base_bytes: int, share: float
    ) -> tuple[Record, Call] | None:
        """All but the time at one length: first call, backend, error, memory, density. None when it ends here."""
        entry = runner.entry
        about: dict[str, Any] = {"length": sample.length, "shape": sample.shape, "threads": torch.get_num_threads()}
        limit = max(2 * share, 1.0)
        try:
            least = min(LEAST_SECONDS, max(0.0, self._left()) / CALLS)
            _foresee(runner.costs, sample.length, max(2 * share / CALLS, least), self.device)
            with self._first(limit, runner):
                module = entry.build(sample, self.device, self.dtype)
                call = entry.call(module, sample)
                output = call()
            with guard(limit):
                if not bool(output.isfinite().all()):
                    raise Failed(Status.WRONG, f"output is not finite at {sample.length} tokens")
                error = None if entry.is_mixer else relative_error(output, dense)
                del output
                with watch_backends() as ran:
                    cost = self._cost(call, sample.length)
                backend = backend_of(module, ran)
                if entry.backend and backend != entry.backend:
                    raise Failed(Status.FELL_BACK, f"{entry.backend} was asked for, {backend} ran")
                kept = density(module, sample)
                if isinstance(module, CachePolicy):  # which is asked, not run
                    about |= _state(module, entry, sample.crop(sample.length))
        except Failed as failure:
            if failure.status != Status.UNSUPPORTED:
                self._stop(runner, sample, failure)
                return None
            self._reject(replace(runner.record, **about), failure)
            return None
        runner.costs.append(cost)
        record = replace(runner.record, **about, backend=backend, peak_bytes=cost.nbytes, baseline_bytes=base_bytes)
        return replace(record, density=kept, approximation_error=error), call

    # Pictures.

    def _draw_all(self) -> None:
        passed = [r for r in self.runners if r.gate]
        for at, runner in enumerate(passed):
            self._tell(f"drawing {runner.record.mechanism}")
            self._draw(runner, max(0.0, self._left()) / (len(passed) - at))
            runner.done = self._units
        for place in dict.fromkeys(r.record.place for r in passed if not r.record.layer):
            self._draw_reference(place, [r for r in passed if r.record.place == place])

    def _draw(self, runner: Runner, share: float) -> None:
        """The longest picture whose calls fit `share`; a mechanism that cannot be drawn goes without.

        A grid is drawn where every key has its own cell.
        """
        rank, seconds = runner.record.grid, {c.length: c.seconds for c in runner.costs}
        samples = [self.sample(runner.workload, n, rank) for n in self.lengths]
        timed = [s for s in reversed(samples) if s.length in seconds and (not rank or s.length <= GRID_TOKENS)]
        slope = runner.costs[0].seconds / runner.costs[0].length if runner.costs else share / samples[0].length
        smaller = (256, 64) if rank else (512, 256, 64)  # a square stays one
        if self._left() <= 0:
            return
        for sample in [*timed, *(samples[0].crop(tokens) for tokens in smaller)]:
            once = seconds.get(sample.length, slope * sample.length)
            if sample.length <= 64 or calls_for(runner.entry.is_mixer, sample) * once <= share:
                try:
                    with guard(max(4 * share, 0.5)):
                        self.drawings[runner.record.mechanism] = influence(runner.entry, sample)
                    return
                except Failed:
                    continue

    def _draw_reference(self, place: Place, runners: list[Runner]) -> None:
        """Dense attention at the longest length at which a mechanism of the place is drawn and its calls are quick."""
        most = max((len(d.matrix) for r in runners if (d := self.drawings.get(r.record.mechanism))), default=0)
        if not most:
            return
        quick = [c.length for c in self.baselines.get(place, []) if c.length <= most and c.seconds < QUICK]
        samples = [self.sample(runners[0].workload, n, place.grid) for n in self.lengths]
        fitting = [s for s in samples if s.length in quick] or [samples[0].crop(min(most, samples[0].length))]
        self.references[place] = reference(fitting[-1], place.causal)


def _state(module: Mechanism, entry: Entry, sample: Sample) -> dict[str, Any]:
    """What a module keeps of the tokens of one sequence, for its record; empty where it does not decode."""
    found = kept_bytes(module, entry.inputs(sample))
    if found is None:
        return {}
    beside = baseline_bytes(entry.is_mixer, sample)
    return {"state_bytes": found, "state_tokens": sample.length, "baseline_state_bytes": beside}


def _compiles(device: str) -> bool:
    """Does a first call there compile kernels?"""
    return not device.startswith("cpu")


def _foresee(costs: list[Cost], length: int, most: float, device: str) -> None:
    """Fail when a call at `length` would take more than `most` seconds, or more memory than there is.

    Costs are taken to grow on as they did between the last two lengths, at least linearly and at most quadratically;
    after a single one memory is feared to be quadratic, and time, of which overheads are a part, to be halfway.
    """
    if not costs:
        return
    last = costs[-1]
    longer = length / last.length

    def growth(one: float, two: float) -> float:
        power = math.log(max(two / max(one, 1e-9), 1e-9)) / math.log(last.length / costs[-2].length)
        return longer ** min(max(power, 1.0), 2.0)

    known = len(costs) > 1
    in_time = growth(costs[-2].seconds, last.seconds) if known else longer**1.5
    in_bytes = growth(costs[-2].nbytes, last.nbytes) if known else longer**2
    if last.seconds * in_time > most:
        text = f"a call took {last.seconds:.2g} s at {last.length} tokens"
        raise Failed(Status.TIMEOUT, f"{text}; one at {length} does not fit its share of the budget ({most:.2g} s)")
    if last.nbytes * in_bytes > available_bytes(device):
        text = f"a call took {last.nbytes / 2**20:.0f} MiB at {last.length} tokens"
        raise Failed(Status.OOM, f"{text}; one at {length} may not fit in the memory that is free")


def _timed(record: Record, samples: timing.Samples, noise: float) -> Record:
    found = timing.ratio(samples)
    return replace(
        record,
        seconds=samples.seconds,
        baseline_seconds=samples.baseline_seconds,
        speedup=found.median,
        speedup_low=found.low,
        speedup_high=found.high,
        pairs=found.pairs,
        verdict=found.verdict(noise),
    )
