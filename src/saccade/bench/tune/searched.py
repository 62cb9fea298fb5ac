"""Profiles that are searched: the cheapest rule by which each head, or each layer, recovers enough of its attention.

    rule(unit) = argmin cost(unit, rule)   such that   recovered(unit, rule) >= T
    or, within a cost C:   maximise the mean of recovered over units   such that   the mean of cost <= C

Both are means over prompts that a model reads densely; a unit that no rule is enough for takes the one that recovers
most. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saccade.bench import timing
from saccade.bench.eval_reader import BUNDLED, Reader
from saccade.bench.tune.adjusted import BEYOND, LENGTHS, SAMPLES, Adjusted, Setting, until_stopped
from saccade.bench.tune.lessons import Lesson, Seen
from saccade.bench.tune.measure import Progress, Steps
from saccade.contract import Dims, Spec
from saccade.testing.ambient import seeded

RECOVERY = 0.95
READ = 4  # prompts that profiles are searched on
Rule = Mapping[str, Any]


@runtime_checkable
class Searched(Protocol):
    """What a mechanism class offers so that its profile is searched, and the module of a layer that `calibrated` makes.

    A unit is what has a rule of its own: a key head, or the whole layer.
    """

    spec: Spec

    def calibrated(self, dims: Dims, seen: Sequence[Seen], **params: Any) -> nn.Module:
        """A layer with all that is fitted to samples of what its attention is given; a classmethod."""
        ...

    def rules(self) -> list[dict[str, Any]]:
        """What a unit may do."""
        ...

    def weighed(self, seen: Seen, rules: Sequence[Rule]) -> tuple[Tensor, Tensor]:
        """What each rule recovers of a sample's attention, and what it costs as a part of dense attention's: (R, U)."""
        ...

    def assembled(self, rules: Sequence[Rule], **params: Any) -> dict[str, Any]:
        """Parameters of a layer whose units have these rules; a classmethod."""
        ...


def search(
    id: str,
    *,
    params: Mapping[str, Any] | None = None,
    model: str | Reader = BUNDLED,
    recovery: float | None = None,
    cost: float | None = None,
    lengths: Sequence[int] = LENGTHS,
    beyond: int | None = BEYOND,
    count: int = SAMPLES,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Adjusted:
    """Search a mechanism's profile for all layers of a model.

    id: of a mechanism that is `Searched`. recovery: T, the part of attention that a unit is to recover, a mean over
    prompts (default 0.95). cost: instead, the most that all units together may cost, as a part of dense attention's.
    params, model, lengths, beyond, count, seed, device, progress: as in `teach`; four prompts are searched on. An
    interrupt leaves the layers that were not reached as they are untuned. Errors: ValueError names the argument; what
    `saccade.hf.apply` refuses.
    """
    if recovery is not None and cost is not None:
        raise ValueError(f"cost: got {cost:g} beside recovery {recovery:g}; pass one of them")
    least = RECOVERY if recovery is None and cost is None else recovery
    for name, value in (("recovery", least), ("cost", cost)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}: got {value}; pass a part of dense attention's in (0, 1]")
    at = Setting.of(id, params, model, device, lengths, beyond, count, seed)
    made = at.made
    units = Steps(READ + len(at.layers) + 3 * len(at.measured_at), progress)
    weighed: list[Weighed] = []
    with timing.threads(timing.quiet_threads()), seeded(seed), torch.no_grad():
        with until_stopped():
            seen = []
            for one in at.prompts(READ):
                units.next("reading")
                seen.append(Lesson(one, at.reader.model, at.reader.model).captured())
            for index, layer in enumerate(at.layers):
                units.next(f"weighing rules in layer {index}")
                module = made.calibrated(layer.dims, [one[index] for one in seen], **at.params)
                weighed.append(Weighed.of(module, [one[index] for one in seen]))
        best = [cheapest(*one.figures, least) for one in weighed] if least else within(weighed, cost or 1.0)
        chosen = [
            made.assembled([one.rules[r] for r in rules.tolist()], **at.params)
            for one, rules in zip(weighed, best, strict=True)
        ]
        tensors = [dict(one.module.state_dict()) for one in weighed]
        left = at.layers[len(weighed) :]
        chosen += [dict(at.params) for _ in left]
        tensors += [dict(made(one.dims, **at.params).state_dict()) for one in left]
        rows = {} if left else at.measure(chosen, tensors, units)
    figures = {
        name: {"tuned": mean([one.figures[place].gather(0, r[None]) for one, r in zip(weighed, best, strict=True)])}
        for place, name in enumerate(("recovered", "cost"))
    }
    asked = {"recovery": least} if least else {"cost": cost}
    return at.record(chosen, tensors, asked | {"searched": len(weighed)}, figures, rows)


class Weighed(NamedTuple):
    """A layer, what its units may do, and what each rule recovers and costs, (R, U) both, means over samples."""

    module: Any
    rules: list[dict[str, Any]]
    figures: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, module: Any, seen: Sequence[Seen]) -> Weighed:
        """On samples of what the layer's attention is given."""
        rules = module.rules()
        each = [module.weighed(one, rules) for one in seen]
        recovered, cost = (torch.stack([one[place].double() for one in each]).mean(0) for place in (0, 1))
        return cls(module, rules, (recovered, cost))


def mean(parts: list[Tensor]) -> float:
    """Over all units of all layers; 0 of none."""
    return float(torch.cat(parts, 1).mean()) if parts else 0.0


def within(weighed: Sequence[Weighed], most: float) -> list[Tensor]:
    """The rules of each layer's units that recover most together, where they may cost `most` on average.

    By a price of cost, the same for all: each unit takes the rule of the largest recovered - price cost, and the least
    price is sought at which all of them fit. Where even the cheapest do not, they are taken.
    """

    def at(price: float) -> list[Tensor]:
        return [(one.figures[0] - price * one.figures[1]).argmax(0) for one in weighed]

    def fits(rules: list[Tensor]) -> bool:
        return mean([one.figures[1].gather(0, r[None]) for one, r in zip(weighed, rules, strict=True)]) <= most

    if fits(free := at(0.0)):
        return free
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def cheapest(recovered: Tensor, cost: Tensor, least: float) -> Tensor:
    """The rule of each unit, (U,), of recovered and cost (R, U): of equal costs the one that recovers more.

    >>> cheapest(torch.tensor([[0.8], [0.96], [1.0]]), torch.tensor([[0.1], [0.5], [1.0]]), 0.95).tolist()
    [1]
    """
    enough = recovered >= least
    lowest = cost.masked_fill(~enough, torch.inf).amin(0)
    candidates = torch.where(enough.any(0), enough & (cost == lowest), torch.ones_like(enough))
    return recovered.masked_fill(~candidates, -torch.inf).argmax(0)


def searchable() -> list[str]:
    """Ids of the mechanisms whose profiles can be searched."""
    from saccade.catalogue import mechanisms
    from saccade.hf.tuned import serves

    return [spec.id for spec in mechanisms() if isinstance(serves(spec.id), Searched)]
