"""Evaluate mechanisms inside a language model on generated tasks: what dense attention does, and what is left of it."""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

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
    reads_on,
)
from saccade.bench.eval_records import DENSE, Cell, Protocol, append_cell, read_cells
from saccade.bench.guard import Failed, guard
from saccade.bench.records import Status, environment
from saccade.bench.timing import ratio
from saccade.cache import Policy
from saccade.cache import Reader as Reads
from saccade.catalogue import mechanism, mechanisms
from saccade.contract import Attention, Dims, Mechanism
from saccade.errors import known, positive
from saccade.hf import apply
from saccade.hf.tuned import is_file
from saccade.tasks.prompts import Example, Task, task_named, tasks

LENGTHS = (1024, 2048)
COUNT, QUESTIONS = 20, 4
BUDGETS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0)
DECODE = 0.5  # seconds for which a frontier times decoded tokens, a contestant, task and length
FLOOR = 0.5  # a task on which dense attention scores less tells nothing about what is put in its place
Progress = Callable[[int, int, str], None]
Examine = Callable[[Reader, Any, Task, Example], Examined]
EXAMINE: dict[Protocol, Examine] = {Protocol.AWARE: aware, Protocol.AGNOSTIC: agnostic, Protocol.EITHER: either}


@dataclass(frozen=True, eq=False)
class Contestant:
    """Something that can be put in place of a model's attention. name: in the table and in the files.

    enter: model -> a context in which it is in place; what the context gives is the handle.
    """

    name: str
    enter: Callable[[Any], AbstractContextManager[Any]]

    @classmethod
    def of(cls, name: str, what: Any) -> Contestant:
        """What `saccade.hf.apply` takes, under a name."""
        return cls(name, lambda model: apply(model, what))

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

    By budgets, all contestants at the first one first, so that what is stopped early has all of them. texts: as
    `Contestant.parse` takes them (default: every policy of `saccade.cache`). budgets: shares in (0, 1], in any order.
    Errors: ValueError for others, and for text that is no contestant.

    >>> [one.name for one in at_budgets(["snapkv(window=8)", "moba"], [0.25, 0.5])]
    ['snapkv(window=8, budget=0.25)', 'moba', 'snapkv(window=8, budget=0.5)']
    """
    shares = sorted(set(budgets))
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"budgets: got {shares or 'none'}; pass shares in (0, 1], like 0.1,0.25,0.5")
    named = sorted(_policies()) if texts is None else list(texts)
    found = [_with(text, share) for share in shares for text in named]
    return list({one.name: one for one in found}.values())


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
    """Cells in the order of the plan, as far as they were reached. left: cells that the budget had no room for. reused:
    cells that an earlier run had finished. seconds: what this run took.
    """

    cells: tuple[Cell, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    left: int = 0
    reused: int = 0
    seconds: float = 0.0


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
    path: Path | None = None,
    progress: Progress | None = None,
    decode: float | None = None,
) -> Evaluation:
    """Score contestants inside a model; dense attention always takes part, and one that fails becomes a cell.

    What may decide from later tokens is measured twice, with the question in what it reads (query-aware) and without
    (query-agnostic: the context is read and compressed first, and asked several questions); what may not, once.

    contestants: as `Contestant.parse` takes them, or `Contestant.of(name, what)`. reader: the model. tasks: names
    (default: all there are). lengths:
    tokens of a prompt with its answer (default 1024, 2048). count: examples a cell (20). questions: about each context,
    at most (4). seed: of the examples (0), which are the same for all contestants. budget: seconds, after which no cell
    is begun and the one under way is given up (default: none). path: a file to which every cell is written when it is
    finished, and whose finished cells are not measured again. progress: called with (cells done, cells in all, what is
    under way). decode: seconds for which decoded tokens are timed in turns with dense attention's, once a contestant,
    task and length (default: not at all); finished cells without a time get it.
    Errors: ValueError for unknown names, and for lengths that are too short for a task or too long for the model.
    """
    began = time.perf_counter()
    entered = [one if isinstance(one, Contestant) else Contestant.parse(one) for one in contestants]
    entered = list({one.name: one for one in (Contestant.parse(DENSE), *entered)}.values())
    run = _Run(reader, entered, chosen(tasks), _lengths(lengths, reader), count, questions, seed, path, decode)
    run.check()
    run.all(budget, began, progress or (lambda *_: None))
    return run.found(time.perf_counter() - began)


class _Run:
    def __init__(
        self,
        reader: Reader,
        contestants: list[Contestant],
        taken: list[Task],
        lengths: list[int],
        count: int,
        questions: int,
        seed: int,
        path: Path | None,
        decode: float | None,
    ) -> None:
        self.decode, self.plain = decode, None if decode is None else beside(reader)
        self.reader, self.contestants, self.tasks, self.lengths, self.path = reader, contestants, taken, lengths, path
        self.count, self.questions, self.seed = positive("count", count), positive("questions", questions), seed
        self.device = str(reader.model.device)
        self.dtype = str(reader.model.dtype).removeprefix("torch.")
        self.stamp = environment(self.device)
        self.done = {cell.key: cell for cell in (read_cells(path) if path else [])}
        self.cells: list[Cell] = []
        self.reused = self.left = 0
        self.drawn: dict[tuple[str, int], list[Example]] = {}

    def examples(self, task: Task, length: int) -> list[Example]:
        if (task.name, length) not in self.drawn:
            self.drawn = {key: drawn for key, drawn in self.drawn.items() if key[1] == length}  # one length at a time
            self.drawn[task.name, length] = task.examples(
                length, self.count, questions=self.questions, tokenizer=self.reader.tokenizer, seed=self.seed
            )
        return self.drawn[task.name, length]

    def check(self) -> None:
        """Draw the shortest examples: what has no room there fails now, not after an hour."""
        for task in self.tasks:
            self.examples(task, self.lengths[0])

    def all(self, budget: float | None, began: float, progress: Progress) -> None:
        total = len(self.lengths) * len(self.contestants) * len(self.tasks)
        at = 0
        for length in self.lengths:
            for one in self.contestants:
                for task in self.tasks:
                    progress(at, total, f"{one.name}, {task.name}, {length} tokens")
                    self._pair(one, task, length, None if budget is None else budget - (time.perf_counter() - began))
                    at += 1
        progress(total, total, "done")

    def _pair(self, one: Contestant, task: Task, length: int, left: float | None) -> None:
        """A contestant at one task and length, under the protocols that tell something of it."""
        cell = Cell(
            self.reader.name,
            one.name,
            task.name,
            length,
            Protocol.EITHER,
            self.count,
            self.questions,
            self.seed,
            self.dtype,
            Status.UNSUPPORTED,
            device=self.device,
        )
        keys = [cell.key._replace(protocol=protocol) for protocol in Protocol]
        found = [self.done[key] for key in keys if key in self.done]
        whole = {old.protocol for old in found} in ({Protocol.EITHER}, {Protocol.AWARE, Protocol.AGNOSTIC})
        if whole and (self.decode is None or all(old.decode_over_dense for old in found)):
            self.reused += len(found)
            self.cells += found
            return
        if left is not None and left <= 0:
            self.left += 1
            return
        try:
            with guard(left), one.enter(self.reader.model) as handle:
                protocols = (Protocol.EITHER,) if decides_early(handle) else (Protocol.AWARE, Protocol.AGNOSTIC)
                times = self._times(task, length, handle)
                for protocol in protocols:
                    self._cell(replace(cell, protocol=protocol), task, handle, times)
        except Failed as failure:
            self._add(replace(cell, status=failure.status, message=failure.message))

    def _times(self, task: Task, length: int, handle: Any) -> dict[str, float]:
        """What decoding costs after the prompt of an example, where tokens can be decoded from a cache."""
        if self.decode is None or self.plain is None or not reads_on(handle):
            return {}
        example = self.examples(task, length)[0]
        prompt = [*example.context, *self.reader.tokenizer.encode(example.questions[0].text)]
        if self.reader.most is not None:
            prompt = prompt[-max(1, self.reader.most - DECODED) :]
        taken = decoding(self.reader, self.plain, prompt, self.decode)
        return {
            "decode_seconds": taken.seconds,
            "dense_decode_seconds": taken.baseline_seconds,
            "decode_over_dense": 1 / ratio(taken).median,
        }

    def _cell(self, cell: Cell, task: Task, handle: Any, times: dict[str, Any]) -> None:
        """One protocol; a failure of the first says nothing about the second."""
        if old := self.done.get(cell.key):
            self.reused += 1
            if times and not old.decode_over_dense:
                self._add(replace(old, **times))
            else:
                self.cells.append(old)
            return
        start = time.perf_counter()
        try:
            with guard():
                found = [EXAMINE[cell.protocol](self.reader, handle, task, e) for e in self.examples(task, cell.length)]
        except Failed as failure:
            self._add(replace(cell, status=failure.status, message=failure.message))
            return
        sizes = [one.cache_bytes for one in found if one.cache_bytes is not None]
        whole = [one.dense_bytes for one in found if one.dense_bytes is not None]
        answers = [each for one in found for each in one.answers_kept]
        asked = [each for one in found for each in one.questions_kept]
        self._add(
            replace(
                cell,
                status=Status.OK,
                scores=tuple(sum(one.scores) / len(one.scores) for one in found),
                asked=sum(len(one.scores) for one in found),
                seconds=time.perf_counter() - start,
                cache_bytes=round(fmean(sizes)) if sizes else None,
                dense_bytes=round(fmean(whole)) if whole else None,
                answer_kept=fmean(answers) if answers else None,
                question_kept=fmean(asked) if asked else None,
                **times,
            )
        )

    def _add(self, cell: Cell) -> None:
        """A failure is not written down: another run tries again."""
        self.cells.append(cell)
        if self.path and cell.status == Status.OK:
            append_cell(self.path, cell, self.stamp)

    def found(self, seconds: float) -> Evaluation:
        return Evaluation(tuple(self.cells), self.stamp, self.left, self.reused, seconds)


def chosen(names: Iterable[str] | None) -> list[Task]:
    """The tasks of these names, each once; all there are where none is given."""
    return [task_named(name) for name in dict.fromkeys(tasks() if names is None else names)]


def _lengths(lengths: Sequence[int], reader: Reader) -> list[int]:
    if not lengths:
        raise ValueError("lengths: got none; pass at least one")
    found = sorted({positive("lengths", length) for length in lengths})
    if reader.most is not None and found[-1] > reader.most:
        raise ValueError(f"lengths: got {found[-1]}; {reader.name} reads at most {reader.most} tokens")
    return found
