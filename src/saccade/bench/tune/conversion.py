"""Conversion: the softmax attention of a trained language model becomes linear, layer by layer, by a recipe.

The model reads text; what each layer's attention is given is what the layer's maps are fitted on, all layers apart.
Then the linear attention takes the place of the other in all layers, and where asked for the whole is finetuned as a
language model. What the model reads for this is text of its training; all measuring is done on held-out text.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.bench import timing
from saccade.bench.contestant import Configured
from saccade.bench.records import write_atomic
from saccade.bench.tune.linearized import Linearized, divergence, softmax, weights
from saccade.bench.tune.measure import Progress, Sample, Steps, dims_of, in_layers, loss, measured, passages
from saccade.bench.tune.recipes import recipe
from saccade.contract import Mechanism
from saccade.errors import positive
from saccade.hosts.lm import LM, LMConfig, dense

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS, BEYOND, SAMPLES = (256,), 1024, 8
STEPS, FINETUNE = 100, 60
BATCH = 4  # passages of a step of finetuning
RATE = 1e-3  # of finetuning
LARGEST = 1.0  # norm of a gradient of finetuning


@dataclass(frozen=True)
class Converted:
    """A language model whose attention is linear, and what that costs.

    recipe: by which. model: sizes of the model that it is for. tensors: "maps.<layer>.<name>", parameters of the
    layers' `Linearized`, and after finetuning "model.<name>", all of the model's. steps: of the fit, and of the
    finetuning. error: by length, KL(softmax's weights | linear ones) in nats, mean over rows, heads and layers, with
    the maps "unfitted" and "fitted". perplexity: by length, exp of the cross-entropy per byte on held-out text, with
    "dense" attention, maps "unfitted" and "fitted", and "finetuned" where that was done.
    """

    recipe: str
    model: LMConfig
    tensors: Mapping[str, Tensor]
    steps: dict[str, int]
    error: dict[str, dict[str, float]]
    perplexity: dict[str, dict[str, float]]

    def save(self, path: Path) -> Path:
        """Write JSON that `load` and `saccade compare --config` read, and the tensors beside it as .safetensors."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        save_file(found, str(path.with_suffix(".safetensors")))
        said = {name: value for name, value in vars(self).items() if name != "tensors"} | {"model": asdict(self.model)}
        return write_atomic(path, json.dumps(said, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Converted:
        """What `save` wrote."""
        from safetensors.torch import load_file

        beside = path.with_suffix(".safetensors")
        for each in (path, beside):
            if not each.is_file():
                raise ValueError(
                    f"config: no file {str(each)!r}; pass one that saccade tune wrote, its tensors beside it"
                )
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return cls(**said | {"model": LMConfig(**said["model"]), "tensors": load_file(str(beside))})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"config: {str(path)!r} is not what saccade tune writes ({error})") from error

    def layers(self) -> list[dict[str, Any]]:
        """Parameters of the recipe's class, by layer."""
        return [{"tensors": self._part(f"maps.{layer}.")} for layer in range(self.model.num_layers)]

    def apply(self, model: LM | None = None) -> LM:
        """A copy of the model with this attention, and the weights that finetuning left; it has no gradients.

        model: the one that was converted (default: the bundled one); the copy has its device and dtype. It reads whole
        sequences; `generate` needs attention that takes keys beyond its queries. Errors: ValueError for other sizes.
        """
        model = copy.deepcopy(LM.from_pretrained() if model is None else model).requires_grad_(False)
        if model.config != self.model:
            raise ValueError(f"model: got one of {model.config}; this conversion is of one of {self.model}")
        if tuned := self._part("model."):
            model.load_state_dict(tuned)
        cls, like = recipe(self.recipe), model.embed_tokens.weight
        maps = [cls(dims_of(model), **params).to(like).requires_grad_(False) for params in self.layers()]
        model.attention = in_layers(maps)
        return model

    def contestants(self, name: str) -> list[type[Mechanism] | Configured]:
        """For a comparison: the attention of a layer with its maps unfitted, and fitted under a name of its own."""
        cls = recipe(self.recipe)
        return [Configured(cls, [{} for _ in self.layers()], "unfitted"), Configured(cls, self.layers(), name)]

    def table(self) -> Table:
        """What was reached, a row a length."""
        from rich import box
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{self.recipe}: KL, and perplexity a byte, held-out")
        for name in ("tokens", "KL unfitted", "fitted", *next(iter(self.perplexity.values()))):
            drawn.add_column(name, justify="right")
        for length, row in self.perplexity.items():
            errors = (f"{x:.3f}" for x in self.error[length].values())
            drawn.add_row(length, *errors, *(f"{x:.3f}" for x in row.values()))
        return drawn

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


def convert(
    name: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    beyond: int = BEYOND,
    count: int = SAMPLES,
    steps: int = STEPS,
    finetune: int = FINETUNE,
    device: str | torch.device = "cpu",
    model: LM | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Fit a recipe to a language model.

    name: of the recipe. lengths: of the passages that are read, in turns (default 256). beyond: a length at which it
    is measured too (1024). count: held-out passages measured a length (8). steps: of the fit, a passage each (100; 0:
    none). finetune: steps of training the whole afterwards, 4 passages each (60; 0: none). device: where it runs.
    model: default the bundled one; it stays as it is. progress: called with (units done, units in all, what is under
    way). Errors: ValueError names the argument.
    """
    cls = recipe(name)
    model = copy.deepcopy(LM.from_pretrained() if model is None else model).to(device).requires_grad_(False)
    lengths = sorted({positive("lengths", n) for n in lengths})
    every = sorted({*lengths, positive("beyond", beyond)})
    if every[-1] > model.config.max_length:
        raise ValueError(f"lengths: got {every[-1]} with beyond; the model reads at most {model.config.max_length}")
    positive("count", count)
    for option, value in (("steps", steps), ("finetune", finetune)):
        positive(option, value, least=0)
    held_out = {n: passages(n, count, held_out=True) for n in every}
    maps = [cls(dims_of(model)).to(device) for _ in range(model.config.num_layers)]
    units = Steps(3 * len(every) + steps + finetune + (len(every) if finetune else 0), progress)
    error: dict[str, dict[str, float]] = {str(n): {} for n in every}
    perplexity: dict[str, dict[str, float]] = {str(n): {} for n in every}

    def measure(what: str, attention: Any, judged: bool) -> None:
        for n, group in held_out.items():
            units.next(f"{what}, measuring at {n} tokens")
            perplexity[str(n)][what] = math.exp(measured(model, attention, group))
            if judged:
                error[str(n)][what] = map_error(model, maps, group)

    with timing.threads(timing.quiet_threads()):
        measure("dense", dense, False)
        measure("unfitted", in_layers(maps), True)
        fit(model, maps, _turns(lengths, steps, 1, seed=1), units)
        measure("fitted", in_layers(maps), True)
        if finetune:
            train(model, maps, _turns(lengths, finetune, BATCH, seed=2), units)
            measure("finetuned", in_layers(maps), False)
    tensors = {f"maps.{at}.{key}": x for at, one in enumerate(maps) for key, x in one.state_dict().items()}
    tensors |= {f"model.{key}": x for key, x in model.state_dict().items()} if finetune else {}
    done = {"fit": steps, "finetune": finetune}
    kept = {key: x.detach().cpu() for key, x in tensors.items()}
    return Converted(name, model.config, kept, done, error, perplexity)


@torch.no_grad()
def map_error(model: LM, maps: Sequence[Linearized], group: Iterable[Sample]) -> float:
    """KL(softmax's weights | linear ones), mean over samples, layers, heads and rows of dense attention's inputs."""
    device, found = model.embed_tokens.weight.device, []
    for one in group:
        for layer, seen in zip(maps, model.capture(one.tokens.to(device)), strict=True):
            found.append(divergence(weights(layer, seen.q, seen.k), weights(softmax, seen.q, seen.k)))
    return float(torch.stack(found).mean())


def fit(model: LM, maps: Sequence[Linearized], batches: Sequence[Tensor], steps: Steps) -> None:
    """Minimise every layer's objective, a step a batch (B, N) of tokens, by Adam with a rate that falls to 0."""
    optimizer = torch.optim.Adam([p for one in maps for p in one.parameters()], lr=maps[0].rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(1, len(batches)))
    for tokens in batches:
        steps.next("fitting the maps")
        for layer, seen in zip(maps, model.capture(tokens.to(model.embed_tokens.weight.device)), strict=True):
            with torch.enable_grad():
                layer.objective(seen.q, seen.k, seen.v).backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


def train(model: LM, maps: Sequence[Linearized], batches: Sequence[Tensor], steps: Steps) -> None:
    """Train the whole as a language model, with the maps in its layers, a step a batch (B, N) of tokens."""
    parameters = [*model.requires_grad_(True).parameters(), *(p for one in maps for p in one.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    before, model.attention = model.attention, in_layers(maps)
    try:
        for tokens in batches:
            steps.next("finetuning the whole")
            with torch.enable_grad():
                loss(model, Sample(tokens, 1)).backward()
            nn.utils.clip_grad_norm_(parameters, LARGEST)
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
    finally:
        model.attention = before
        model.requires_grad_(False)


def _turns(lengths: Sequence[int], count: int, batch: int, seed: int) -> list[Tensor]:
    """`count` batches (batch, N) of text that the model was trained on, of the lengths in turns."""
    turns = [lengths[at % len(lengths)] for at in range(count)]
    pools = {n: iter(passages(n, batch * turns.count(n), held_out=False, seed=seed)) for n in set(turns)}
    return [torch.cat([next(pools[n]).tokens for _ in range(batch)]) for n in turns]
