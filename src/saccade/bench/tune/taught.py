"""Gates that learn inside a pretrained model whose weights stay: what a mechanism offers for it, and the training.

    minimise   objective(the gates of all layers, a prompt)   by AdamW, a prompt a step

The rate rises to the mechanism's over the first fifth of the steps and falls over the last, to a tenth at the least
(the schedule of arXiv 2410.10819).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saccade.bench import timing
from saccade.bench.eval_reader import BUNDLED, Reader, beside
from saccade.bench.tune.adjusted import BEYOND, LENGTHS, SAMPLES, Adjusted, Setting, frozen, until_stopped
from saccade.bench.tune.lessons import Lesson, prompts
from saccade.bench.tune.measure import Progress, Steps
from saccade.contract import Dims, Spec
from saccade.errors import positive
from saccade.hf import apply
from saccade.testing.ambient import seeded

STEPS = 100


@runtime_checkable
class Taught(Protocol):
    """What a mechanism class offers so that its gates are learnt; classmethods, and what AdamW is given.

    A mechanism with projections of its own offers them on the class that its `in_layer` gives.
    """

    spec: Spec
    learning: Mapping[str, Any]

    def learner(self, dims: Dims, **params: Any) -> nn.Module:
        """A layer before it has learnt; its parameters are what learns."""
        ...

    def objective(self, layers: Sequence[Any], lesson: Lesson) -> Tensor:
        """What learning minimises, a number. layers: all learners, which are in place in the lesson's student."""
        ...

    def chosen(self, layers: Sequence[Any], **params: Any) -> list[dict[str, Any]]:
        """Parameters of every layer that serves what its learner has learnt; its tensors are the learner's."""
        ...


def teach(
    id: str,
    *,
    params: Mapping[str, Any] | None = None,
    model: str | Reader = BUNDLED,
    steps: int = STEPS,
    lengths: Sequence[int] = LENGTHS,
    beyond: int | None = BEYOND,
    count: int = SAMPLES,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Adjusted:
    """Learn a mechanism's gates in all layers of a model.

    id: of a mechanism that is `Taught`. params: of it (default: its own). model: bundled, a
    transformers model by id or path, or a `Reader`; it stays as it is. steps: a prompt each (100). lengths: of these,
    in turns (1024). beyond: a length at which it is measured too (2048; None: not). count: held-out prompts measured a
    length (8). seed: of the prompts, and of what is random in gates and their training (0). device: of a model that is
    named. progress: called with (units done, units in all, what is under way). An interrupt ends the training, and
    what was learnt until then is what is found. Errors: ValueError names the argument; what `saccade.hf.apply` refuses.
    """
    at = Setting.of(id, params, model, device, lengths, beyond, count, seed)
    made, steps = at.made, positive("steps", steps, least=0)
    held_out = prompts(at.reader, at.lengths[0], min(4, count), held_out=True, seed=seed)
    units = Steps(steps + 2 * len(held_out) + 3 * len(at.measured_at), progress)
    teacher = beside(at.reader).model
    with timing.threads(timing.quiet_threads()), seeded(seed), frozen(at.reader.model), frozen(teacher):
        layers = [made.learner(one.dims, **at.params).to(at.reader.model.device) for one in at.layers]
        with apply(at.reader.model, layers):
            lessons = [Lesson(one, teacher, at.reader.model) for one in held_out]
            before = judged(made, layers, lessons, units, "before")
            done = fitted(made, layers, [Lesson(one, teacher, at.reader.model) for one in at.prompts(steps)], units)
            after = judged(made, layers, lessons, units, "after") if done == steps else None
        chosen, tensors = made.chosen(layers, **at.params), [one.state_dict() for one in layers]
        rows = at.measure(chosen, tensors, units) if done == steps else {}
    figures = {"untuned": before} | ({} if after is None else {"tuned": after})
    return at.record(chosen, tensors, {"steps": done, "of": steps}, {"objective": figures}, rows)


def fitted(made: Any, layers: Sequence[nn.Module], lessons: Sequence[Lesson], units: Steps) -> int:
    """Minimise the objective, a step a lesson; how many there were until an interrupt."""
    optimiser = torch.optim.AdamW([x for one in layers for x in one.parameters()], **made.learning)
    fifth, done = max(1.0, len(lessons) / 5), 0
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda at: min(1.0, max((at + 1) / fifth, 0.1), max((len(lessons) - at) / fifth, 0.1))
    )
    with until_stopped():
        for lesson in lessons:
            units.next("learning")
            optimiser.zero_grad()
            with torch.enable_grad():
                made.objective(layers, lesson).backward()
            optimiser.step()
            ramp.step()
            done += 1
    return done


def judged(made: Any, layers: Sequence[nn.Module], lessons: Sequence[Lesson], units: Steps, when: str) -> float:
    """The objective, a mean over lessons; whatever is random in it is the same each time."""
    found = []
    for lesson in lessons:
        units.next(f"the objective {when}")
        with seeded(0), torch.no_grad():
            found.append(float(made.objective(layers, lesson)))
    return statistics.fmean(found)


def teachable() -> list[str]:
    """Ids of the mechanisms whose gates can be learnt."""
    from saccade.catalogue import mechanisms
    from saccade.hf.tuned import serves

    return [spec.id for spec in mechanisms() if isinstance(serves(spec.id), Taught)]
