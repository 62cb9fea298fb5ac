"""Evaluate mechanisms inside a language model on generated tasks: what dense attention does, and what is left of it."""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

import torch

from saccade import cache
from saccade.bench.eval_reader import (
    DECODED,
    Examined,
    Reader,
    agnostic,
    aware,
    beside,
    decides_early,
    decoding,
    dense,
    either,
    memory,
    reads_on,
)
from saccade.bench.eval_records import DENSE, Cell, Claims, Protocol, Time, append, read_rows
from saccade.bench.eval_shared import Shared
from saccade.bench.guard import Failed, guard, is_memory
from saccade.bench.records import Status, environment
from saccade.bench.timing import Samples, ratio
from saccade.cache import Policy
from saccade.cache import Reader as Reads
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Attention, CachePolicy, Dims, Mechanism
from saccade.errors import known, positive
from saccade.hf import apply
from saccade.hf.tuned import is_file
from saccade.tasks.prompts import Example, Task, task_named, tasks

LENGTHS = (1024, 2048)
COUNT, QUESTIONS = 20, 4
BUDGETS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0)
QUARTER = 0.25  # the budget that a frontier begins with
DECODE = 0.5  # seconds for which a frontier times decoded tokens, a contestant and length
ROOM = 64  # tokens that a recording of steps is good for, where replies are decoded: a question and its reply
AT_ONCE = {"cpu": 2**14, "cuda": 2**17}  # tokens of prompts that are read side by side, about
FLOOR = 0.5  # a task on which dense attention scores less tells nothing about what is put in its place
Progress = Callable[[int, int, str], None]
Examine = Callable[[Reader, Any, Task, Sequence[Example]], list[Examined]]
EXAMINE: dict[Protocol, Examine] = {Protocol.AWARE: aware, Protocol.AGNOSTIC: agnostic, Protocol.EITHER: either}


@dataclass(frozen=True, eq=False)
class Contestant:
    """Something that can be put in place of a model's attention. name: in the table and in the files.

    enter: model -> a context in which it is in place; what the context gives is the handle. wave: what is of a later
    one is measured when all tasks and lengths of those before are done (0).
    """

    name: str
    enter: Callable[[Any], AbstractContextManager[Any]]
    wave: int = 0

    @classmethod
    def of(cls, name: str, what: Any) -> Contestant:
        """What `saccade.hf.apply` takes, under a name; what it draws to begin with is the same every time."""

        def enter(model: Any) -> Any:
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                return apply(model, what)

        return cls(name, enter)

    @classmethod
    def parse(cls, text: str) -> Contestant:
        """A contestant as one writes it: `dense`, an id, or an id with parameters, `moba(block=64, top_k=4)`; or a JSON
        file that `saccade tune` wrote, under the name of the file.

        Errors: ValueError for text that is no such thing, an unknown id or parameter, or a file that is not there.

        >>> Contestant.parse("moba( top_k = 4 )").name
        'moba(top_k=4)'
        """
        if is_file(text):
            if not Path(text).is_file():
                raise ValueError(f"what: no file {text!r}; pass one that saccade tune wrote, or {EXAMPLE}")
            return cls.of(text, text)
        id, params = spelt(text)
        return cls.made(id, params)

    @classmethod
    def made(cls, id: str, params: dict[str, Any]) -> Contestant:
        """A contestant of an id and its parameters."""
        names = parameters(id)
        if unknown := [name for name in params if name not in names]:
            raise ValueError(f"what: {id} has no parameter {unknown[0]!r}; it has {', '.join(names) or 'none'}")
        if id == DENSE:
            return cls(DENSE, lambda _: dense())
        make = _makers()[id]
        if missing := [name for name, needed in names.items() if needed and name not in params]:
            raise ValueError(f"what: got {id}; it needs {missing[0]}, as in {id}({missing[0]}=0.5)")
        told = ", ".join(f"{name}={value!r}" for name, value in params.items())
        what = _bound(make, params) if isinstance(make, type) and issubclass(make, Mechanism) else make(**params)
        return cls.of(f"{id}({told})" if params else id, what)


def spelt(text: str) -> tuple[str, dict[str, Any]]:
    """The id and the parameters of a contestant as one writes it.

    >>> spelt("snapkv( budget=0.5 )")
    ('snapkv', {'budget': 0.5})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        id = called.func.id  # type: ignore[attr-defined]
        params = {word.arg or "**": ast.literal_eval(word.value) for word in called.keywords}
    except (SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(f"what: got {text!r}; pass dense, an id, or one with parameters: {EXAMPLE}") from error
    if called.args:
        raise ValueError(f"what: got {text!r}; name the parameters: {EXAMPLE}")
    return id, params


def parameters(id: str) -> dict[str, bool]:
    """The parameters of what has this name, and whether each must be given."""
    known("what", id, [DENSE, *_makers()])
    if id == DENSE:
        return {}
    make = _makers()[id]
    if hasattr(make, "params"):
        return dict.fromkeys(make.params(), False)
    return {name: each.default is each.empty for name, each in inspect.signature(make).parameters.items()}


def at_budgets(texts: Iterable[str] | None = None, budgets: Iterable[float] = BUDGETS) -> list[Contestant]:
    """Contestants at every budget, those that have a parameter `budget` which is not given; the others, and files that
    `saccade tune` wrote, as they are.

    Each budget is a wave, the largest that is no more than a quarter first, so that what is stopped early has all
    contestants there. texts: as `Contestant.parse` takes them (default: every policy of `saccade.cache`, and what the
    catalogue has of the family kv_cache and a model's layers can hold). budgets: shares in (0, 1], in any order.
    Errors: ValueError for others, and for text that is no contestant.

    >>> [one.name for one in at_budgets(["snapkv(window=8)", "moba"], [0.1, 0.25, 0.5])]
    ['snapkv(window=8, budget=0.25)', 'moba', 'snapkv(window=8, budget=0.1)', 'snapkv(window=8, budget=0.5)']
    """
    shares = sorted(set(budgets))
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"budgets: got {shares or 'none'}; pass shares in (0, 1], like 0.1,0.25,0.5")
    first = focus(shares)
    named = [*sorted(_policies()), *_of_caches()] if texts is None else list(texts)
    waves = enumerate([first, *(share for share in shares if share != first)])
    found: dict[str, Contestant] = {}
    for one in [replace(_with(text, share), wave=wave) for wave, share in waves for text in named]:
        found.setdefault(one.name, one)
    return list(found.values())


def focus(budgets: Sequence[float]) -> float:
    """The largest budget that is not above a quarter, else the smallest.

    >>> focus([0.1, 0.2, 0.5]), focus([0.5, 1.0]), focus([])
    (0.2, 0.5, 0.25)
    """
    return max((b for b in budgets if b <= QUARTER), default=min(budgets, default=QUARTER))


def _of_caches() -> list[str]:
    """The mechanisms that decide what a cache keeps or what is read of it, in the place of a model's attention."""
    kinds = {spec.id: mechanism(spec.id) for spec in mechanisms() if spec.family == "kv_cache"}
    return [id for id, cls in kinds.items() if issubclass(cls, Attention) and issubclass(cls, CachePolicy)]


def _with(text: str, share: float) -> Contestant:
    if is_file(text):
        return Contestant.parse(text)
    id, params = spelt(text)
    return Contestant.made(id, params | {"budget": share} if "budget" in {*parameters(id)} - {*params} else params)


def _policies() -> dict[str, Any]:
    """What makes a policy in `saccade.cache` and takes a budget: functions, and readers by their names in small."""
    public = {name: getattr(cache, name) for name in cache.__all__}
    made = {name: get_type_hints(one).get("return") for name, one in public.items() if inspect.isfunction(one)}
    policies = {
        name: public[name] for name, kind in made.items() if isinstance(kind, type) and issubclass(kind, Policy)
    }
    readers = [one for one in public.values() if inspect.isclass(one) and issubclass(one, Reads) and one is not Reads]
    return policies | {one.__name__.lower(): one for one in readers}


def _makers() -> dict[str, Any]:
    """What has a name: the attentions of the catalogue, and the policies."""
    classes = {spec.id: mechanism(spec.id) for spec in mechanisms()}
    return _policies() | {id: cls for id, cls in classes.items() if issubclass(cls, Attention)}


def _bound(cls: type[Mechanism], params: dict[str, Any]) -> type[Mechanism]:
    """The class with other defaults, so that it is built for each layer as any class is."""
    if not params:
        return cls
    signature = inspect.signature(cls.__init__)

    def init(self: Mechanism, dims: Dims, **rest: Any) -> None:
        cls.__init__(self, dims, **{**params, **rest})

    init.__signature__ = signature  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__init__": init, "__doc__": cls.__doc__})


EXAMPLE = "moba(block=64, top_k=4)"


@dataclass(frozen=True)
class Evaluation:
    """Cells by length, contestant and task, as far as they were reached. left: pairs of contestant and task, and times,
    that there was no room for. reused: cells that were there already. seconds: what this run took. times: of decoded
    tokens. failed: why there is no time of a contestant.
    """

    cells: tuple[Cell, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    left: int = 0
    reused: int = 0
    seconds: float = 0.0
    times: tuple[Time, ...] = ()
    failed: tuple[str, ...] = ()


def evaluate(
    contestants: Iterable[Contestant | str],
    reader: Reader,
    *,
    tasks: Iterable[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    count: int = COUNT,
    questions: int = QUESTIONS,
    seed: int = 0,
    budget: float | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    scores: bool = True,
    decode: float | None = None,
    recorded: bool = False,
    answered: bool = False,
    at_once: int | None = None,
    limit: float | None = None,
) -> Evaluation:
    """Score contestants inside a model; dense attention always takes part, and one that fails becomes a cell.

    What may decide from later tokens is measured twice, with the question in what it reads (query-aware) and without
    (query-agnostic: the context is read and compressed first, and asked several questions); what may not, once.

    contestants: as `Contestant.parse` takes them, or `Contestant.of(name, what)`. reader: the model. tasks: names
    (default: all there are), the most important first. lengths: tokens of a prompt with its answer (default 1024,
    2048), the most important first. count: examples a cell (20). questions: about each context, at most (4). seed: of
    the examples (0), which are the same for all contestants. budget: seconds, after which nothing is begun and what is
    under way is given up (default: none); an interrupt does the same. folder: where every row is written when it is
    finished (`results.jsonl`, `times.jsonl`), and whose rows are not measured again; processes that are given the same
    one share the work. progress: called with (done, in all, what is under way). scores: measure them (True). decode:
    seconds for which decoded tokens are timed in turns with dense attention's, once a contestant and length, behind the
    scores and by one process at a time (default: not at all). recorded: steps, those of replies and those that are
    timed, are replayed from CUDA graphs, where a policy's can be. answered: what dense attention cannot do is asked of
    nothing else. at_once: tokens of prompts that are read side by side, about (default: 16384, 131072 on a GPU); where
    memory runs out, half as many. limit: seconds for a contestant, task and length (default: none); what takes longer
    is not tried at such lengths again. A prompt is read once for all policies that attend to it densely, as far as
    there is room (`saccade.bench.eval_shared`); they score the same.
    Errors: ValueError for unknown names, and for lengths that are too short for a task or too long for the model.
    """
    began = time.perf_counter()
    entered = [one if isinstance(one, Contestant) else Contestant.parse(one) for one in contestants]
    entered = list({one.name: one for one in (Contestant.parse(DENSE), *entered)}.values())
    asked = _Asked(chosen(tasks), _lengths(lengths, reader), positive("count", count), positive("questions", questions))
    most = AT_ONCE[reader.model.device.type] if at_once is None else positive("at_once", at_once)
    run = _Run(reader, entered, asked, seed, folder, most, limit, recorded)
    run.check()
    if not scores:
        run.take_over()
    phases = [run.scoring(answered) if scores else [], [] if decode is None else run.timing(decode)]
    run.all(phases, budget, began, progress or (lambda *_: None))
    return run.found(time.perf_counter() - began)


@dataclass(frozen=True)
class _Asked:
    tasks: list[Task]
    lengths: list[int]
    count: int
    questions: int


@dataclass(frozen=True)
class _Step:
    """Something to measure. run: (seconds left or None, wait for others or come back) -> was it done, here or there?"""

    about: str
    run: Callable[[float | None, bool], bool]


class _Run:
    def __init__(
        self,
        reader: Reader,
        contestants: list[Contestant],
        asked: _Asked,
        seed: int,
        folder: Path | None,
        at_once: int,
        limit: float | None,
        recorded: bool,
    ) -> None:
        self.limit, self.recorded = limit, recorded
        self.slow: dict[str, int] = {}  # the length at which what has this name, with any parameters, took too long
        self.shared = Shared()
        self.reader = replace(reader, shared=self.shared)
        self.contestants, self.asked, self.seed, self.at_once = contestants, asked, seed, at_once
        self.results, self.times = (folder and folder / f"{name}.jsonl" for name in ("results", "times"))
        self.claims = Claims(folder and folder / ".claims")
        self.device = str(reader.model.device)
        self.dtype = str(reader.model.dtype).removeprefix("torch.")
        self.stamp = environment(self.device)
        self.read_size = -1
        self.done: dict[Any, Cell] = {}
        self.known: dict[Any, Time] = {row.key: row for row in (read_rows(self.times, Time)[0] if self.times else [])}
        self.cells: dict[tuple[str, str, int], list[Cell]] = {}
        self.failed: list[str] = []
        self.reused = self.left = 0
        self.drawn: dict[tuple[str, int], list[Example]] = {}

    def refresh(self) -> None:
        """What other processes have finished meanwhile."""
        if self.results is None or not self.results.is_file():
            return
        size = self.results.stat().st_size
        if size != self.read_size:
            self.read_size = size
            self.done = {cell.key: cell for cell in read_rows(self.results, Cell)[0]}

    def examples(self, task: Task, length: int) -> list[Example]:
        if (task.name, length) not in self.drawn:
            self.drawn[task.name, length] = task.examples(
                length,
                self.asked.count,
                questions=self.asked.questions,
                tokenizer=self.reader.tokenizer,
                seed=self.seed,
            )
        return self.drawn[task.name, length]

    def check(self) -> None:
        """Draw the shortest examples: what has no room there fails now, not after an hour."""
        for task in self.asked.tasks:
            self.examples(task, min(self.asked.lengths))

    def scoring(self, answered: bool) -> list[_Step]:
        """Wave by wave, task by task, length by length: dense attention first."""
        return [
            _Step(f"{one.name}, {task.name}, {length} tokens", partial(self._pair, one, task, length, answered))
            for wave in sorted({one.wave for one in self.contestants})
            for task in self.asked.tasks
            for length in self.asked.lengths
            for one in self.contestants
            if one.wave == wave
        ]

    def timing(self, seconds: float) -> list[_Step]:
        plain = beside(self.reader)
        return [
            _Step(f"{one.name}, tokens behind {length}", partial(self._time, one, length, plain, seconds))
            for wave in sorted({one.wave for one in self.contestants})
            for length in self.asked.lengths
            for one in self.contestants
            if one.wave == wave
        ]

    def all(self, phases: list[list[_Step]], budget: float | None, began: float, progress: Progress) -> None:
        """Every step once; those that another process is at are come back to when there is nothing else of a phase."""
        at, total = 0, sum(map(len, phases))
        try:
            for steps in phases:
                waiting = steps
                for wait in (False, True):
                    taken, waiting = waiting, []
                    for step in taken:
                        progress(at, total, step.about)
                        if step.run(None if budget is None else budget - (time.perf_counter() - began), wait):
                            at += 1
                        else:
                            waiting.append(step)
            progress(total, total, "done")
        except KeyboardInterrupt:
            self.left += total - at

    def _cell_of(self, one: Contestant, task: Task, length: int) -> Cell:
        return Cell(
            self.reader.name,
            one.name,
            task.name,
            length,
            Protocol.EITHER,
            self.asked.count,
            self.asked.questions,
            self.seed,
            self.dtype,
            Status.UNSUPPORTED,
            device=self.device,
        )

    def _whole(self, cell: Cell) -> bool:
        """Take over what was finished before, or elsewhere: is it all of a pair?"""
        self.refresh()
        keys = [cell.key._replace(protocol=protocol) for protocol in Protocol]
        found = [self.done[key] for key in keys if key in self.done]
        if {old.protocol for old in found} not in ({Protocol.EITHER}, {Protocol.AWARE, Protocol.AGNOSTIC}):
            return False
        self.reused += len(found)
        self.cells[cell.what, cell.task, cell.length] = found
        return True

    def take_over(self) -> None:
        """Scores that were measured before, and nothing else."""
        for one in self.contestants:
            for task in self.asked.tasks:
                for length in self.asked.lengths:
                    self._whole(self._cell_of(one, task, length))

    def _pair(self, one: Contestant, task: Task, length: int, answered: bool, left: float | None, wait: bool) -> bool:
        """A contestant at one task and length, under the protocols that tell something of it."""
        cell = self._cell_of(one, task, length)
        if one.name != DENSE and answered and not self._informative(task, length):
            return True
        if self._whole(cell):
            return True
        kind = one.name.split("(")[0]
        if (left is not None and left <= 0) or length >= self.slow.get(kind, length + 1):
            self.left += 1
            return True
        self.shared.turn_to((task.name, length))
        short = self.limit is not None and (left is None or self.limit < left)
        # Whether dense attention can do it decides what comes next.
        with self.claims.take(cell.key, wait=wait or (answered and one.name == DENSE)) as free:
            if not free:
                return False
            if self._whole(cell):
                return True
            here = self.cells[one.name, task.name, length] = []
            try:
                with guard(self.limit if short else left), one.enter(self.reader.model) as handle:
                    if self.recorded and memory(handle) is not None:
                        handle.record(ROOM)
                    protocols = (Protocol.EITHER,) if decides_early(handle) else (Protocol.AWARE, Protocol.AGNOSTIC)
                    # One by one, so that the first is there when the second fails.
                    here.extend(self._cell(replace(cell, protocol=protocol), task, handle) for protocol in protocols)
            except Failed as failure:
                # Not written down: another run tries again. What is late has lasted beyond the budget of this one,
                # or beyond its own limit.
                if failure.status == Status.TIMEOUT and short:
                    self.slow[kind] = min(length, self.slow.get(kind, length))
                if failure.status == Status.TIMEOUT and not short:
                    self.left += 1
                else:
                    here.append(replace(cell, status=failure.status, message=failure.message))
        return True

    def _informative(self, task: Task, length: int) -> bool:
        """Dense attention can do it, as far as is known."""
        found = self.cells.get((DENSE, task.name, length), [])
        return not any(cell.status == Status.OK and cell.score < FLOOR for cell in found)

    def _cell(self, cell: Cell, task: Task, handle: Any) -> Cell:
        """One protocol; a failure of the first says nothing about the second."""
        if old := self.done.get(cell.key):
            self.reused += 1
            return old
        start = time.perf_counter()
        found = self._examined(cell, task, handle)
        sizes = [one.cache_bytes for one in found if one.cache_bytes is not None]
        whole = [one.dense_bytes for one in found if one.dense_bytes is not None]
        answers = [part for one in found for part in one.answers_kept]
        asked = [part for one in found for part in one.questions_kept]
        cell = replace(
            cell,
            status=Status.OK,
            scores=tuple(sum(one.scores) / len(one.scores) for one in found),
            asked=sum(len(one.scores) for one in found),
            seconds=time.perf_counter() - start,
            cache_bytes=round(fmean(sizes)) if sizes else None,
            dense_bytes=round(fmean(whole)) if whole else None,
            answer_kept=fmean(answers) if answers else None,
            question_kept=fmean(asked) if asked else None,
        )
        if self.results:
            append(self.results, cell, self.stamp)
        return cell

    def _examined(self, cell: Cell, task: Task, handle: Any) -> list[Examined]:
        """All examples, so many at a time as there is memory for."""
        examples = self.examples(task, cell.length)
        found: list[Examined] = []
        while len(found) < len(examples):
            chunk = examples[len(found) :][: max(1, self.at_once // cell.length)]
            try:
                found += EXAMINE[cell.protocol](self.reader, handle, task, chunk)
            except Exception as error:
                if len(chunk) == 1 or not is_memory(error):
                    raise
                self.shared.stop()
                self.at_once = len(chunk) // 2 * cell.length
        return found

    def _time(
        self,
        one: Contestant,
        length: int,
        plain: Reader,
        seconds: float,
        left: float | None,
        wait: bool,
    ) -> bool:
        """What decoding costs after the prompt of an example, where tokens can be decoded from a cache."""
        key = (self.reader.name, one.name, length, self.dtype, self.recorded)
        if key in self.known:
            return True
        if left is not None and left <= 0:
            self.left += 1
            return True
        self.shared.turn_to(length)
        with self.claims.take("time") as _:  # one at a time, whoever else is there
            if self.times:
                self.known = {row.key: row for row in read_rows(self.times, Time)[0]}
            if key not in self.known:
                try:
                    with guard(left), one.enter(self.reader.model) as handle:
                        # A policy's pages take single tokens whatever else it cannot do.
                        if memory(handle) is None and not reads_on(handle):
                            return True
                        taken = self._decoding(handle, length, plain, seconds)
                except Failed as failure:
                    if failure.status == Status.TIMEOUT:
                        self.left += 1
                    else:
                        self.failed.append(f"{one.name}: no time behind {length} tokens: {failure}")
                    return True
                own = ratio(taken)
                low, high = (1 / own.high, 1 / own.low) if own.low and own.high else (None, None)
                self.known[key] = Time(
                    *key, self.device, taken.seconds, taken.baseline_seconds, 1 / own.median, low, high, own.pairs
                )
                if self.times:
                    append(self.times, self.known[key], self.stamp)
        return True

    def _decoding(self, handle: Any, length: int, plain: Reader, seconds: float) -> Samples:
        example = self.examples(self.asked.tasks[0], length)[0]
        prompt = [*example.context, *self.reader.tokenizer.encode(example.questions[0].text)]
        if self.reader.most is not None:
            prompt = prompt[-max(1, self.reader.most - DECODED) :]
        if not self.recorded:
            return decoding(self.reader, plain, prompt, seconds)
        # Dense attention's steps are recorded as those of a policy that keeps all.
        own = apply(self.reader.model, Policy()) if handle is None else nullcontext(handle)
        with own as handle, apply(plain.model, Policy()) as other:
            for each in (handle, other):
                if memory(each) is not None:
                    each.record()
            return decoding(self.reader, plain, prompt, seconds)

    def found(self, seconds: float) -> Evaluation:
        order = [
            (one.name, task.name, length)
            for length in sorted(self.asked.lengths)
            for one in self.contestants
            for task in self.asked.tasks
        ]
        cells = tuple(cell for key in order for cell in self.cells.get(key, ()))
        places = {(name, length) for name, _, length in order}
        times = tuple(one for one in self.known.values() if (one.what, one.length) in places)
        return Evaluation(cells, self.stamp, self.left, self.reused, seconds, times, tuple(self.failed))


def chosen(names: Iterable[str] | None) -> list[Task]:
    """The tasks of these names, each once; all there are where none is given."""
    return [task_named(name) for name in dict.fromkeys(tasks() if names is None else names)]


def _lengths(lengths: Sequence[int], reader: Reader) -> list[int]:
    if not lengths:
        raise ValueError("lengths: got none; pass at least one")
    found = list(dict.fromkeys(positive("lengths", length) for length in lengths))
    if reader.most is not None and max(found) > reader.most:
        raise ValueError(f"lengths: got {max(found)}; {reader.name} reads at most {reader.most} tokens")
    return found
