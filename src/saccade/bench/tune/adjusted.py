"""What was found for a pretrained model's layers: parameters, tensors, and what they do on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.bench.contestant import Configured
from saccade.bench.eval_reader import Reader, load
from saccade.bench.records import write_atomic
from saccade.bench.tune.lessons import measured, prompts
from saccade.bench.tune.measure import Steps
from saccade.contract import Dims, Mechanism
from saccade.errors import positive
from saccade.hf.layers import Layer, layers_of
from saccade.hf.tuned import SIZES, marks, placed, read_tensors, serves, with_tensors, write_tensors
from saccade.testing.ambient import seeded

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS, BEYOND, SAMPLES = (1024,), 2048, 8


@dataclass(frozen=True)
class Adjusted:
    """A mechanism as it is to be in each layer of a model, and what that does.

    mechanism: its id. model: the name of the model. layers: parameters by layer. tensors: what was learnt or fitted, by
    layer and name. dims: num_heads, num_kv_heads, head_dim. marks: numbers of the model's weights, by which it is known
    again. how: what was asked for, and "steps" or "samples" as far as they were gone through. found: figures of the
    objective, or of what a profile recovers and costs. held_out: by tokens of a prompt, for "dense" attention, the
    "untuned" mechanism and the "tuned" one, what `lessons.measured` says; empty where the measuring was stopped.
    """

    mechanism: str
    model: str
    layers: tuple[dict[str, Any], ...]
    tensors: tuple[Mapping[str, Tensor], ...]
    dims: dict[str, int]
    marks: list[list[float]] | None
    how: dict[str, Any]
    found: dict[str, dict[str, float]]
    held_out: dict[str, dict[str, dict[str, float]]]

    def save(self, path: Path) -> Path:
        """Write JSON that `load`, `saccade.hf.apply`, `saccade eval` and `saccade compare --config` read, and tensors
        beside it as .safetensors.
        """
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        said["tensors"] = write_tensors(path, self.tensors)
        return write_atomic(path, json.dumps(said, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Adjusted:
        """What `save` wrote."""
        said = json.loads(path.read_text(encoding="utf-8"))
        try:
            tensors = read_tensors(path, said["tensors"], len(said["layers"]))
            return cls(**said | {"tensors": tuple(tensors), "layers": tuple(said["layers"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"config: {str(path)!r} is not what saccade tune writes ({error})") from error

    def contestants(self, name: str) -> list[type[Mechanism] | Configured]:
        """For a comparison: the mechanism's defaults, and what was found under a name of its own."""
        from saccade.catalogue import mechanism

        served: Any = serves(self.mechanism)
        each = zip(self.layers, self.tensors, strict=True)
        own = [params | ({"tensors": tensors} if tensors else {}) for params, tensors in each]
        return [mechanism(self.mechanism), Configured(with_tensors(served), own, name)]

    def table(self) -> Table:
        """What was reached, a row a length and contestant."""
        from rich import box
        from rich.table import Table

        told = "; ".join(
            f"{what} {', '.join(f'{value:.4g} {when}' for when, value in row.items())}"
            for what, row in self.found.items()
        )
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{self.mechanism} in {self.model}: {told}")
        drawn.add_column("tokens", justify="right")
        drawn.add_column("attention")
        for name in ("nats a token", "exact", "held"):
            drawn.add_column(name, justify="right")
        for length, row in self.held_out.items():
            for name, got in row.items():
                drawn.add_row(length, name, f"{got['loss']:.4f}", f"{got['exact']:.0%}", f"{got['held']:.1%}")
        return drawn


@dataclass(frozen=True)
class Setting:
    """A model, the mechanism that is to be in its layers, and the parameters that were asked for.

    lengths: of the prompts that it is tuned on. beyond: a longer one, at which it is measured too, None for none.
    """

    id: str
    reader: Reader
    layers: list[Layer]
    params: dict[str, Any]
    lengths: list[int]
    beyond: int | None
    count: int
    seed: int

    @classmethod
    def of(
        cls,
        id: str,
        params: Mapping[str, Any] | None,
        model: str | Reader,
        device: str,
        lengths: Sequence[int],
        beyond: int | None,
        count: int,
        seed: int,
    ) -> Setting:
        """Checked; a model of this name is loaded. Errors: ValueError names the argument."""
        lengths = sorted({positive("lengths", n) for n in lengths})
        if beyond is not None and positive("beyond", beyond) <= lengths[-1]:
            raise ValueError(f"beyond: got {beyond}, which is not beyond {lengths[-1]}; pass a longer one, or None")
        positive("count", count), positive("seed", seed, least=0)
        reader = model if isinstance(model, Reader) else load(model, device)
        most, longest = reader.most, beyond or lengths[-1]
        if most is not None and longest > most:
            raise ValueError(f"lengths: got {longest}; {reader.name} reads at most {most} tokens")
        made, own = serves(id), dict(params or {})
        if unknown := [name for name in own if name not in made.params()]:
            raise ValueError(f"id: {id} has no parameter {unknown[0]!r}; it has {', '.join(made.params())}")
        try:
            json.dumps(own)
        except TypeError as error:
            raise ValueError(f"params: got {own}, which the file cannot hold ({error}); leave it out") from error
        return cls(id, reader, layers_of(reader.model), own, lengths, beyond, count, seed)

    @property
    def made(self) -> Any:
        """The class that serves in the layers."""
        return serves(self.id)

    @property
    def dims(self) -> Dims:
        return self.layers[0].dims

    def prompts(self, count: int, **options: Any) -> list[Any]:
        """`count` prompts to learn from, of the lengths in turns."""
        turns = [self.lengths[at % len(self.lengths)] for at in range(count)]
        pools = {
            n: iter(prompts(self.reader, n, turns.count(n), held_out=False, seed=self.seed, **options)) for n in turns
        }
        return [next(pools[n]) for n in turns]

    def measure(
        self, layers: Sequence[Mapping[str, Any]], tensors: Sequence[Mapping[str, Tensor]], steps: Steps
    ) -> dict[str, dict[str, dict[str, float]]]:
        """`Adjusted.held_out`; what was measured until an interrupt."""
        with seeded(self.seed):
            plain = [placed(one, self.made, self.params, {}) for one in self.layers]
        each_layer = zip(self.layers, layers, tensors, strict=True)
        found = [placed(one, self.made, params, own) for one, params, own in each_layer]
        every = {"dense": None, "untuned": plain, "tuned": found}
        rows: dict[str, dict[str, dict[str, float]]] = {}
        with until_stopped():
            for n in self.measured_at:
                group, row = prompts(self.reader, n, self.count, held_out=True, seed=self.seed, questions=1), {}
                for name, what in every.items():
                    steps.next(f"measuring {name} at {n} tokens")
                    row[name] = measured(self.reader, what, group)
                rows[str(n)] = row
        return rows

    @property
    def measured_at(self) -> list[int]:
        return [*self.lengths, *([] if self.beyond is None else [self.beyond])]

    def record(
        self,
        layers: Sequence[dict[str, Any]],
        tensors: Sequence[Mapping[str, Tensor]],
        how: Mapping[str, Any],
        found: dict[str, dict[str, float]],
        held_out: dict[str, dict[str, dict[str, float]]],
    ) -> Adjusted:
        """All of it."""
        told = dict(how) | {"lengths": self.lengths, "seed": self.seed}
        sizes = {name: getattr(self.dims, name) for name in SIZES}
        return Adjusted(
            self.id,
            self.reader.name,
            tuple(layers),
            tuple({name: x.detach().cpu().clone() for name, x in one.items()} for one in tensors),
            sizes,
            marks(self.layers),
            told,
            found,
            held_out,
        )


def until_stopped() -> AbstractContextManager[Any]:
    """An interrupt ends the block, not the program: what was done until then is kept."""
    return suppress(KeyboardInterrupt)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The weights of a model do not learn inside."""
    before = [x.requires_grad for x in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for x, learns in zip(model.parameters(), before, strict=True):
            x.requires_grad_(learns)
