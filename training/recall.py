"""Measure associative recall against the size of the state: every causal linear or recurrent mechanism, on one GPU.

    python training/recall.py --minutes 8        # writes training/recall/recall.jsonl; run it again to go on
    python training/recall.py --paper            # the published protocol, for as long as it takes

A model is an embedding, two layers x + mixer(conv(norm x)), then x + norm x in the place of an MLP, a last norm and the
embedding again as the head; conv is a causal depthwise convolution over three tokens, mixer the mechanism with two
heads. Beside them run dense attention and sliding windows of 8, 16, ... keys. A row of the file is one training: its
accuracy on every test difficulty (tokens x pairs), their mean, and the bytes that both mixers keep, in float32, after
as many tokens as the longest test has (the convolution's two tokens, the same for all, are left out). The best of the
learning rates counts. Rates come in turns, the middle one first for all contestants, so that a run that is cut short
has something of everything; once one rate solves the task, the other ones are left out.

                     reduced (default)                       --paper
    training rows    64x4 16384, 64x8, 64x16, 128x32 8192    64x4 100000, 128x8, 256x16, 256x32, 256x64 20000
    test rows        64x4, 64x8, 64x16, 128x32, 256x64       64x4, 64x8, 64x16, 128x32, 256x64, 512x128, 1024x256
                     256 each                                1000 each
    vocabulary       8192                                    8192
    epochs, batch    8, 256: 1280 steps                      32, 256: 22624 steps
    widths           64, then 128                            64, 128, 256
    rates            10^-3, 10^-2.5, 10^-2                   10^-3, 10^-2.5, 10^-2, 10^-1.5

Both: AdamW with decay 0.1, the rate by a cosine an epoch to zero, dropout 0.1 behind the embedding, one seed, an end at
0.99 of validation accuracy. The published protocol is `original_mqar_configs` of arXiv 2402.18668's authors, except
that the convolution here is plain, without their gate and implicit filter, in front of every mixer alike (they leave it
out before Mamba and have a second one inside the delta rules); that a norm is RMSNorm; and that a mechanism has the
parameters of its paper. Accuracies of the reduced protocol are lower than published ones, and compare with each other
alone. After the widths come the other words that a mechanism's parameters may be (the mixers of a hybrid study, feature
maps), at the first width.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rows import Row, best
from sweep import Clock, Contestant, Job, Recipe, failures, of_families, options, start, train
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.bench import units
from saccade.contract import Case, Dims, Mechanism
from saccade.hosts.stack import PreNorm, Stack
from saccade.scan import State
from saccade.tasks.recall import Difficulty, Recall, accuracies, recall
from saccade.testing.decode import decode

HERE = Path(__file__).parent
DEPTH, HEADS = 2, 2
VALIDATION, TEST = 1, 2  # seeds of the rows are in threes: training, validation, test


@dataclass(frozen=True)
class Protocol:
    """train, test: (tokens, pairs, rows) of every difficulty. The rest: as the table above."""

    train: tuple[tuple[int, int, int], ...]
    test: tuple[tuple[int, int, int], ...]
    epochs: int
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    batch: int = 256
    vocab_size: int = 8192
    dropout: float = 0.1
    seed: int = 123

    @property
    def longest(self) -> int:
        return max(length for length, _, _ in self.test)

    @property
    def key(self) -> dict[str, Any]:
        """What a row depends on: everything but the sweep over widths and rates; as JSON reads it, without tuples."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("widths", "rates")}
        return json.loads(json.dumps(kept))


REDUCED = Protocol(
    train=((64, 4, 16384), (64, 8, 8192), (64, 16, 8192), (128, 32, 8192)),
    test=tuple((n, p, 256) for n, p in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64))),
    epochs=8,
    widths=(64, 128),
    rates=(1e-3, 10**-2.5, 1e-2),
)
PAPER = Protocol(
    train=((64, 4, 100_000), *((n, p, 20_000) for n, p in ((128, 8), (256, 16), (256, 32), (256, 64)))),
    test=tuple((n, p, 1000) for n, p in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))),
    epochs=32,
    widths=(64, 128, 256),
    rates=(1e-3, 10**-2.5, 1e-2, 10**-1.5),
)


class Premixed(nn.Module):
    """mixer(conv x): a causal depthwise convolution over `taps` tokens in front of a mixer; x (B, N, C)."""

    def __init__(self, dims: Dims, mixer: nn.Module, taps: int = 3) -> None:
        super().__init__()
        bound = taps**-0.5
        self.taps, self.mixer = nn.Parameter(torch.empty(dims.dim, 1, taps).uniform_(-bound, bound)), mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(F.conv1d(F.pad(x.mT, (self.taps.shape[2] - 1, 0)), self.taps, groups=x.shape[2]).mT)


class Reader(Stack):
    """(tokens (B, N), asked (B, P)) -> logits (B, P, V): a `Stack` that scores the asked positions alone."""

    def __init__(self, contestant: Contestant, width: int, protocol: Protocol) -> None:
        def layer(dims: Dims, index: int) -> nn.Module:
            return Premixed(dims, contestant.mixer(dims, index, DEPTH, protocol.longest))

        def block(dims: Dims, mixer: nn.Module) -> nn.Module:
            return PreNorm(dims, mixer, mlp=lambda dim: nn.Identity())

        super().__init__(Dims(HEADS, width // HEADS), [layer] * DEPTH, vocab_size=protocol.vocab_size, block=block)
        self.dropout = nn.Dropout(protocol.dropout)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        x = x.gather(1, asked[:, :, None].expand(-1, -1, x.shape[2]))
        return F.linear(self.norm(x), self.embed.weight)


@functools.lru_cache(maxsize=4)
def drawn(which: str, protocol: Protocol, device: str) -> list[Recall]:
    """The rows for training, validation or test, one entry a difficulty."""
    shapes = protocol.test if which == "test" else protocol.train
    found = []
    for at, (length, pairs, count) in enumerate(shapes):
        count = min(count, 256) if which == "validation" else count
        seed = 1000 * protocol.seed + 3 * at + {"train": 0, "validation": VALIDATION, "test": TEST}[which]
        found.append(recall(Difficulty(length, pairs), count, vocab_size=protocol.vocab_size, seed=seed).to(device))
    return found


class Held(pickle.Pickler):
    """Finds what a decoder must hold, wherever a pickle finds it.

    That is every tensor, but of a `State` the memory and its shift alone, since only `compose` reads the transition.
    """

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, value: Any) -> str | None:
        if isinstance(value, State):
            parts = [value.memory, *([] if value.shift is None else [value.shift])]
        elif isinstance(value, Tensor):
            parts = [value]
        else:
            return None
        self.tensors |= {id(part): part for part in parts}
        return "held"


def state_bytes(contestant: Contestant, width: int, length: int) -> int | None:
    """Bytes that the mixers of all layers keep of `length` tokens, in float32; None for what cannot decode."""
    dims = Dims(HEADS, width // HEADS)
    if contestant.cls is None:  # keys and values
        return DEPTH * 2 * 4 * width * min(length, contestant.params.get("size", length))
    if not contestant.cls.can_step():
        return None
    total = 0
    for layer in range(DEPTH):
        module = contestant.build(dims, layer, DEPTH, length)
        assert isinstance(module, Mechanism)
        if not module.causal:
            return None
        inputs = type(module).inputs(Case(dims, length, batch=1), torch.Generator().manual_seed(0), torch.float32)
        held = Held()
        held.dump(decode(module.eval(), inputs)[1])
        total += sum(tensor.nbytes for tensor in held.tensors.values())
    return total


def do(job: Job, clock: Clock, device: str) -> Row:
    """Train one model and test it."""
    key = job.key
    parts = {name: tuple(map(tuple, key["protocol"][name])) for name in ("train", "test")}
    protocol = Protocol(**{**key["protocol"], **parts}, widths=(), rates=())
    torch.manual_seed(protocol.seed)
    model = Reader(job.contestant, key["width"], protocol).to(device)
    rows, held = drawn("train", protocol, device), drawn("validation", protocol, device)
    steps = sum(-(-len(part) // protocol.batch) for part in rows)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(protocol.seed + epoch)
        cut = []
        for part in rows:
            order = torch.randperm(len(part), generator=generator).to(device)
            cut += [(part, chosen) for chosen in order.split(protocol.batch)]
        for at in torch.randperm(len(cut), generator=generator).tolist():
            part, chosen = cut[at]
            batch = part[chosen]
            yield batch.tokens, batch.asked, batch.answers

    def loss(tokens: Tensor, asked: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens, asked).flatten(0, 1), answers.flatten())

    def validate() -> float:
        found = accuracies(model, held, batch=protocol.batch)
        return sum(found.values()) / len(found)

    recipe = Recipe(protocol.epochs, protocol.batch)
    trained = train(model, recipe, key["rate"], batches, loss, steps, validate, clock, device, job.graph)
    tested = accuracies(model, drawn("test", protocol, device), batch=protocol.batch)
    return {
        "accuracy": sum(tested.values()) / len(tested),
        "accuracies": tested,
        "state_bytes": state_bytes(job.contestant, key["width"], protocol.longest),
        "parameters": sum(p.numel() for p in model.parameters()),
        **trained,
    }


def contestants(families: list[str], protocol: Protocol) -> tuple[list[Contestant], list[Contestant], dict[str, str]]:
    """References and mechanisms; those with other words for parameters; and why others are left out."""
    sizes = [2**power for power in range(3, 11) if 2**power < protocol.longest]
    references = [Contestant("dense", {"causal": True}), *(Contestant("window", {"size": size}) for size in sizes)]
    mechanisms, left_out = of_families(families, causal=True)
    variants, also = of_families(families, causal=True, variants=True)
    return references + mechanisms, variants, left_out | also


def jobs(protocol: Protocol, first: list[Contestant], variants: list[Contestant]) -> list[Job]:
    """Width by width, the middle rate first, contestants in turn; then the variants."""
    middle = (len(protocol.rates) - 1) / 2
    rates = sorted(protocol.rates, key=lambda rate: abs(protocol.rates.index(rate) - middle))
    rounds = [(width, first) for width in protocol.widths] + [(protocol.widths[0], variants)]
    return [
        Job(
            {"id": one.id, "params": dict(one.params), "width": width, "rate": rate, "protocol": protocol.key},
            one,
        )
        for width, group in rounds
        for rate in rates
        for one in group
    ]


def solved(job: Job, rows: list[Row]) -> bool:
    """Has another rate of the same training solved the task?"""
    mine = {**job.key, "rate": None}
    return any(row.get("ended") == "solved" and {**row["key"], "rate": None} == mine for row in rows)


def parser() -> argparse.ArgumentParser:
    found = options(__doc__, HERE / "recall" / "recall.jsonl")
    add = found.add_argument
    add("--paper", action="store_true", help="the published protocol instead of the reduced one")
    add("--train", nargs="+", metavar="TOKENSxPAIRSxROWS", help="training rows in place of the protocol's")
    add("--test", nargs="+", metavar="TOKENSxPAIRSxROWS", help="test rows in place of the protocol's")
    add("--widths", nargs="+", type=int)
    add("--rates", nargs="+", type=float)
    for name in ("epochs", "batch", "vocab-size", "seed"):
        add(f"--{name}", type=int)
    return found


def main() -> None:
    args = parser().parse_args()
    protocol = asked(args)
    first, variants, left_out = contestants(args.families or ["linear", "recurrent"], protocol)
    console = Console()
    rows = start(args, do, jobs(protocol, first, variants), left_out, console=console, needless=solved)
    show([row for row in rows if row["key"]["protocol"] == protocol.key], console)


def asked(args: argparse.Namespace) -> Protocol:
    """The protocol that the options describe."""
    protocol = PAPER if args.paper else REDUCED
    given = {name: getattr(args, name) for name in ("epochs", "batch", "vocab_size", "seed") if getattr(args, name)}
    given |= {name: tuple(getattr(args, name)) for name in ("widths", "rates") if getattr(args, name)}
    for name in ("train", "test"):
        if getattr(args, name):
            given[name] = tuple(_rows(text) for text in getattr(args, name))
    return replace(protocol, **given)


def _rows(text: str) -> tuple[int, int, int]:
    shape, _, count = text.rpartition("x")
    difficulty = Difficulty.parse(shape)
    return difficulty.length, difficulty.pairs, int(count)


def show(rows: list[Row], console: Console) -> None:
    """The best of each contestant and width, and what failed."""
    table = Table("contestant", "width", "accuracy", "state", "rate", "ended", "seconds", title="best of the rates")
    for row in sorted(best(rows, "contestant", "width"), key=lambda each: -each["accuracy"]):
        state, key = "" if row["state_bytes"] is None else units.nbytes(row["state_bytes"]), row["key"]
        cells = f"{row['accuracy']:.3f}", state, f"{key['rate']:.2g}", row["ended"], f"{row['seconds']:.0f}"
        table.add_row(row["contestant"], str(key["width"]), *cells)
    console.print(table)
    failures(rows, console)


if __name__ == "__main__":
    main()
