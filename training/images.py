"""Measure image classification: every mechanism of linear attention that looks both ways, in a small ViT, on one GPU.

    python training/images.py --minutes 8       # writes training/images/images.jsonl; run it again to go on

Tasks (`saccade.tasks.images`): written digits of 8 x 8 pixels, a token a pixel, and crops of 32 x 32 pixels of three
photographs, 12 quarters to tell apart, a token each 2 x 2 pixels. The model is `hosts.vit.ViT` with four blocks of 64
channels in four heads and learned positions. A mixer without an MLP of its own stands in the usual block (LayerNorm,
residual, MLP of four times the width); one that has `mlp_ratio` is its paper's whole block, and stands as it is:
parameters differ, and are counted. Beside them stands softmax attention.

First, with nothing beside it, each model is timed: images a second, forward, float32 (TF32 on a GPU), the median of
seven runs. Then it is trained: AdamW with decay 0.05, the rate by a cosine an epoch to zero, 120 epochs of digits in
batches of 128 (1440 steps) and 40 of crops in batches of 256 (1280 steps), at rates of 10^-3 and 3 10^-3. Few steps
favour mixers that know their neighbours from the start: of softmax attention, 40 epochs of digits are not the end. A
row's accuracy is that of the test images after the last epoch; the better of two rates was chosen by that accuracy, as
small a flattery for one as for the other.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rows import Row, best
from sweep import Clock, Contestant, Job, Recipe, Steps, failures, of_families, options, start, train
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Dims
from saccade.hosts.block import Block
from saccade.hosts.vit import ViT
from saccade.tasks.images import Images, digits, quarters

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Protocol:
    """task: a name of TASKS. patch: pixels a side of a token."""

    task: str
    patch: int
    epochs: int
    batch: int
    width: int = 64
    depth: int = 4
    heads: int = 4
    decay: float = 0.05
    seed: int = 0


TASKS: dict[str, Callable[[], Images]] = {"digits": digits, "quarters": quarters}
PROTOCOLS = (Protocol("digits", 1, epochs=120, batch=128), Protocol("quarters", 2, epochs=40, batch=256))
RATES = (1e-3, 3e-3)


@functools.lru_cache(maxsize=2)
def drawn(task: str, device: str) -> Images:
    return TASKS[task]().to(device)


def classifier(contestant: Contestant, protocol: Protocol, images: Images) -> ViT:
    """The ViT of a contestant."""

    def block(dims: Dims, stage: int, index: int) -> nn.Module:
        mixer = contestant.mixer(dims, index, protocol.depth)
        whole = contestant.cls is not None and "mlp_ratio" in contestant.cls.params()
        return mixer if whole else Block(dims, mixer)

    sizes = protocol.width, protocol.depth, protocol.heads
    channels = images.x.shape[1]
    return ViT(images.size, protocol.patch, *sizes, block, in_channels=channels, num_classes=images.classes)


def do(job: Job, clock: Clock, device: str) -> Row:
    """Time or train one model."""
    protocol = Protocol(**job.key["protocol"])
    images = drawn(protocol.task, device)
    torch.manual_seed(protocol.seed)
    model = classifier(job.contestant, protocol, images).to(device)
    about = {"task": protocol.task, "parameters": sum(p.numel() for p in model.parameters())}
    if job.key["measure"] == "speed":
        return about | {"images_per_second": images_per_second(model.eval(), images.x[: protocol.batch])}

    def loss(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(images.x[chosen]), images.y[chosen])

    def batches(epoch: int) -> Iterator[tuple[Tensor]]:
        generator = torch.Generator().manual_seed(protocol.seed + epoch)
        order = torch.randperm(len(images.x), generator=generator).to(device)
        return ((chosen,) for chosen in order.split(protocol.batch))

    right = torch.zeros((), device=device)

    @torch.no_grad()
    def test() -> None:
        starts = range(0, len(images.test_x), protocol.batch)
        logits = torch.cat([model(images.test_x[start : start + protocol.batch]) for start in starts])
        right.copy_((logits.argmax(1) == images.test_y).float().mean())

    tested = Steps(test, model, job.graph)

    def validate() -> float:
        tested()
        return right.item()

    # No accuracy is enough: all train for as long.
    recipe = Recipe(protocol.epochs, protocol.batch, protocol.decay, enough=float("inf"))
    steps = -(-len(images.x) // protocol.batch)
    trained = train(model, recipe, job.key["rate"], batches, loss, steps, validate, clock, device, job.graph)
    return about | trained | {"accuracy": trained["valid"]}


@torch.no_grad()
def images_per_second(model: nn.Module, x: Tensor, seconds: float = 0.1) -> float:
    """The median of seven runs of about `seconds` each, or of one call where that takes longer, after two that do not
    count."""

    def took(calls: int) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    took(1)
    calls = max(1, round(seconds / took(1)))
    return round(len(x) * calls / statistics.median(took(calls) for _ in range(7)), 1)


def jobs(protocols: list[Protocol], group: list[Contestant], rates: list[float]) -> list[Job]:
    """All times first, then trainings, task by task and rate by rate."""
    found = [_job(one, protocol, measure="speed") for protocol in protocols for one in group]
    rounds = [(protocol, rate) for rate in rates for protocol in protocols]
    return found + [_job(one, protocol, measure="accuracy", rate=rate) for protocol, rate in rounds for one in group]


def _job(one: Contestant, protocol: Protocol, **key: str | float) -> Job:
    key = {"id": one.id, "params": dict(one.params), "protocol": asdict(protocol), **key}
    return Job(key, one, alone=key["measure"] == "speed")


def main() -> None:
    parser = options(__doc__, HERE / "images" / "images.jsonl")
    parser.add_argument("--epochs", type=int, help="in place of the protocol's")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    args = parser.parse_args()
    protocols = [replace(p, epochs=args.epochs or p.epochs) for p in PROTOCOLS if p.task in args.tasks]
    found, left_out = of_families(args.families or ["linear"], causal=False, grid=(8, 8))
    console = Console()
    todo = jobs(protocols, [Contestant("dense"), *found], args.rates)
    show(start(args, do, todo, left_out, console=console), console)


def show(rows: list[Row], console: Console) -> None:
    """Accuracy and speed by task, and what failed."""
    for task in TASKS:
        mine = [row for row in rows if row.get("task") == task]
        accuracy = {row["contestant"]: f"{row['accuracy']:.3f}" for row in best(mine, "contestant")}
        speed = {row["contestant"]: f"{row['images_per_second']:.0f}" for row in mine if "images_per_second" in row}
        table = Table("contestant", "accuracy", "images a second", "parameters", title=task)
        for name, parameters in {row["contestant"]: row["parameters"] for row in mine}.items():
            table.add_row(name, accuracy.get(name, ""), speed.get(name, ""), str(parameters))
        console.print(table)
    failures(rows, console)


if __name__ == "__main__":
    main()
