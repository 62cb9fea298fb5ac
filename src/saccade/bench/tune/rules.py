"""Tune: choose the parameters of every head of every layer on the bundled language model, under a budget.

A mechanism that can be tuned says which rules a head may have and what each is predicted to cost the loss; here the
model is profiled, the rules are chosen by an integer programme, and what was chosen is measured.

    minimise   sum over heads of lost(head, rule)   at each profiled length N
    such that  the mean over heads of cost(rule, N) <= budget at every length, those beyond the profiled ones included,
               and a layer has at most LAYER_RULES different rules

The loss at one length is minimised under bounds on that at the others (epsilon-constraint); of the choices that no
other dominates, the one with the least measured loss at the unseen length wins (arXiv 2406.14909, section 4.2).
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saccade.bench import timing
from saccade.bench.contestant import Configured
from saccade.bench.dense import dense_attention
from saccade.bench.records import write_atomic
from saccade.bench.tune.measure import Progress, Sample, Steps, dims_of, layered, loss, measured, samples
from saccade.contract import Attention, Dims, Mechanism
from saccade.errors import positive
from saccade.hosts.lm import LM, dense

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS, BEYOND, SAMPLES = (512, 1024), 2048, 4
LAYER_RULES = 2
POINTS = 4  # bounds that each length's loss is put under
GAP, SECONDS = 1e-3, 10.0  # of one run of the solver: how far from the optimum it may stop, and when it must
REPEATS = 3  # of a timed call
Rule = Mapping[str, Any]


@runtime_checkable
class Tunable(Protocol):
    """What a mechanism class offers to be tuned; all of them classmethods."""

    def candidates(self, lengths: Sequence[int]) -> list[Rule]:
        """Rules that a head may have at these lengths."""
        ...

    def assemble(self, rules: Sequence[Rule]) -> dict[str, Any]:
        """Parameters of a layer whose heads have these rules."""
        ...

    def influence(self, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        """What leaving parts of a dense layer out does to the loss, (H, ...); gradient: of the layer's output."""
        ...

    def lost(self, influence: Tensor, rule: Rule) -> Tensor:
        """The predicted loss of a rule in each head: (H,)."""
        ...


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and what it does.

    layers: parameters by layer. budget: {"density": share} or {"time": share of dense attention's}. density: attended /
    admissible pairs, mean over layers, by length. loss: by length, cross-entropies per byte on held-out text of "dense"
    attention, the mechanism's "default" and the "tuned" one, and where it was profiled the "predicted" one. dims:
    num_heads, num_kv_heads and head_dim of the model that it is for.
    """

    mechanism: str
    layers: tuple[dict[str, Any], ...]
    budget: dict[str, float]
    density: dict[str, float]
    loss: dict[str, dict[str, float]]
    dims: dict[str, int]

    def save(self, path: Path) -> Path:
        """Write JSON that `load`, `saccade compare --config` and `saccade.hf.apply` read."""
        return write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """What `save` wrote."""
        if not path.is_file():
            raise ValueError(f"config: no file {str(path)!r}; pass one that saccade tune wrote")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**data | {"layers": tuple(data["layers"])})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"config: {str(path)!r} is not what saccade tune writes ({error})") from error

    def contestants(self, name: str) -> list[type[Mechanism] | Configured]:
        """For a comparison: the mechanism's defaults, and what was chosen under a name of its own."""
        from saccade.catalogue import mechanism

        cls = mechanism(self.mechanism)
        return [cls, Configured(cls, self.layers, name)]

    def table(self) -> Table:
        """What was reached, a row a length."""
        from rich import box
        from rich.table import Table

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{self.mechanism}, nats a byte on held-out text")
        names = ("dense", "default", "tuned", "predicted")
        for name in ("tokens", "density", *names):
            drawn.add_column(name, justify="right")
        for length, row in self.loss.items():
            losses = (f"{row[name]:.3f}" if name in row else "" for name in names)
            drawn.add_row(length, f"{self.density[length]:.1%}", *losses)
        return drawn


def tunable() -> list[str]:
    """Ids of the mechanisms that can be tuned."""
    from saccade.catalogue import mechanism, mechanisms

    return [spec.id for spec in mechanisms() if isinstance(mechanism(spec.id), Tunable)]


def profile(model: LM, cls: Any, group: Sequence[Sample]) -> list[Tensor]:
    """The influence of every layer's attention, mean over samples of one length."""
    total: list[Tensor] = []
    before = model.attention
    for one in group:
        seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def spy(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            o = dense(q, k, v, layer)
            seen.append((q.detach(), k.detach(), v.detach(), o if o.requires_grad else o.requires_grad_()))  # noqa: B023
            return o

        model.attention = spy
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model, one), [o for *_, o in seen])
        finally:
            model.attention = before
        with torch.no_grad():
            found = [cls.influence(*qkv, g) / len(group) for (*qkv, _), g in zip(seen, gradients, strict=True)]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


def mean_density(contestant: Configured, dims: Dims, length: int) -> float:
    """Attended / admissible pairs, mean over layers."""
    q, k = (torch.zeros(1, heads, length, dims.head_dim) for heads in (dims.num_heads, dims.num_kv_heads))
    modules: list[Any] = [contestant.build(dims, layer) for layer in range(len(contestant.layers))]
    return statistics.fmean(float(module.plan(q, k).density) for module in modules)


def densities(cls: Any, rules: Sequence[Rule], lengths: Sequence[int]) -> np.ndarray:
    """The density of every rule at every length: (lengths, rules)."""
    table = np.empty((len(lengths), len(rules)))
    for at, n in enumerate(lengths):
        q = torch.zeros(1, 1, n, 8)
        for r, rule in enumerate(rules):
            table[at, r] = float(cls(Dims(1, 8), **cls.assemble([rule])).plan(q, q).density)
    return table


def times(cls: Any, rules: Sequence[Rule], lengths: Sequence[int], dims: Dims, density: np.ndarray) -> np.ndarray:
    """Seconds of every rule over those of dense attention, all heads alike, on this machine: (lengths, rules).

    Rules of one density at a length are one pattern, which is timed once.
    """
    clock, table = timing.clock_for("cpu"), np.empty_like(density)
    for at, n in enumerate(lengths):
        shapes = (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)
        q, k, v = (torch.randn(1, heads, n, dims.head_dim) for heads in shapes)
        calls: dict[float, Callable[[], object]] = {0.0: lambda: dense_attention(q, k, v, True)}  # noqa: B023
        for r, rule in enumerate(rules):
            module = cls(dims, **cls.assemble([rule] * dims.num_heads))
            calls.setdefault(density[at, r], lambda module=module: module(q, k, v))  # type: ignore[misc]  # noqa: B023
        with torch.no_grad():
            clock(list(calls.values()))
            taken = np.median([clock(list(calls.values())) for _ in range(REPEATS)], 0)
        seconds = dict(zip(calls, taken, strict=True))
        table[at] = [seconds[one] / seconds[0.0] for one in density[at]]
    return table


def solve(
    lost: np.ndarray,
    cost: np.ndarray,
    budget: float,
    layer: Sequence[int],
    bounds: Mapping[int, float],
    primary: int = 0,
) -> np.ndarray | None:
    """The rule of every head, (heads,), that loses least at length `primary`; None when nothing fits.

    lost (profiled lengths, heads, rules). cost (lengths, rules). layer: of each head. bounds: on the loss at others of
    the profiled lengths.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, coo_array, eye_array, kron

    _, heads, rules = lost.shape
    layers = max(layer) + 1
    member = coo_array((np.ones(heads), (np.arange(heads), list(layer))), (heads, layers))
    used = layers * rules  # marks of the rules that a layer uses come after the choices x of the heads
    one = kron(eye_array(heads), np.ones((1, rules)))
    limits = kron(eye_array(layers), np.ones((1, rules)))
    linked = block_array([[eye_array(heads * rules), -kron(member, eye_array(rules))]])

    def over_x(row: np.ndarray) -> np.ndarray:
        return np.concatenate([row, np.zeros((len(row), used))], 1)

    constraints = [
        LinearConstraint(block_array([[one, coo_array((heads, used))]]), 1, 1),
        LinearConstraint(block_array([[coo_array((layers, heads * rules)), limits]]), 0, LAYER_RULES),
        LinearConstraint(linked, -np.inf, 0),
        LinearConstraint(over_x(np.tile(cost, (1, heads)) / heads), -np.inf, budget),
    ]
    for at, most in bounds.items():
        constraints.append(LinearConstraint(over_x(lost[at].reshape(1, -1)), -np.inf, most))
    objective = np.concatenate([lost[primary].reshape(-1), np.zeros(used)])
    found = milp(
        objective / max(objective.max(), 1e-30),
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    return None if found.x is None else found.x[: heads * rules].reshape(heads, rules).argmax(1)


def front(
    lost: np.ndarray, cost: np.ndarray, budget: float, layer: Sequence[int], tell: Callable[[], None]
) -> list[np.ndarray]:
    """Choices that no other dominates at the profiled lengths, by bounds of the loss at all but one of them."""
    count, heads, _ = lost.shape

    def value(chosen: np.ndarray) -> np.ndarray:
        return lost[:, np.arange(heads), chosen].sum(1)

    found = []
    for primary in range(count):
        chosen = solve(lost, cost, budget, layer, {}, primary)
        tell()
        if chosen is None:
            raise ValueError(f"budget: got {budget:g}, for which the solver found nothing in {SECONDS:g} s; pass more")
        found.append(chosen)
    ends = np.stack([value(one) for one in found])  # (primary, length)
    for primary in range(count):
        others = [at for at in range(count) if at != primary]
        steps = [np.linspace(ends[at, at], ends[primary, at], POINTS)[1:-1] for at in others]
        for bounds in itertools.product(*steps) if others else ():
            chosen = solve(lost, cost, budget, layer, dict(zip(others, bounds, strict=True)), primary)
            tell()
            if chosen is not None:
                found.append(chosen)
    unique = list({tuple(one): one for one in found}.values())
    values = np.stack([value(one) for one in unique])
    beaten = [((values <= v).all(1) & (values < v).any(1)).any() for v in values]
    return [one for one, is_beaten in zip(unique, beaten, strict=True) if not is_beaten]


def tune(
    cls: type[Attention],
    *,
    density: float | None = None,
    time: float | None = None,
    lengths: Sequence[int] = LENGTHS,
    beyond: int = BEYOND,
    count: int = SAMPLES,
    model: LM | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Choose the parameters of every layer of a language model.

    cls: a mechanism that is `Tunable`. density: the most attended / admissible pairs on average over heads, at every
    length (default 0.5). time: instead, the most time as a share of dense attention's, as measured on this machine.
    lengths: profiled. beyond: an unseen length, held to the budget too, at which one of the undominated choices is
    picked. count: samples a length. model: default the bundled one. progress: called with (units done, units in all,
    what is under way).
    """
    if not isinstance(cls, Tunable):
        raise ValueError(f"cls: {cls.spec.id} offers no rules to choose from; choose one of {', '.join(tunable())}")
    kind, most = _budget(density, time)
    model = (LM.from_pretrained() if model is None else model).requires_grad_(False)
    lengths = sorted({positive("lengths", n) for n in lengths})
    every = [*lengths, _unseen(beyond, lengths, model.config.max_length)]
    positive("count", count)
    solved = len(lengths) + (len(lengths) * (POINTS - 2) ** (len(lengths) - 1) if len(lengths) > 1 else 0)
    steps = Steps(2 * len(lengths) + 1 + solved + 1 + len(every), progress)
    with timing.threads(timing.quiet_threads()):
        chosen, predicted = _choose(cls, model, kind, most, every, count, steps)
        dims, default = dims_of(model), Configured(cls, ({},) * len(chosen.layers), "default")
        losses: dict[str, dict[str, float]] = {}
        for n in every:
            steps.next(f"measuring at {n} tokens")
            group = samples(n, count, held_out=True)
            row = {"dense": measured(model, dense, group)}
            row |= {one.name: measured(model, layered(one, dims), group) for one in (default, chosen)}
            losses[str(n)] = row | ({"predicted": row["dense"] + predicted[n]} if n in predicted else {})
        achieved = {str(n): mean_density(chosen, dims, n) for n in every}
    sizes = {name: getattr(dims, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
    return Tuned(cls.spec.id, tuple(dict(one) for one in chosen.layers), {kind: most}, achieved, losses, sizes)


def _budget(density: float | None, time: float | None) -> tuple[str, float]:
    """What is bounded, and by what."""
    if density is not None and time is not None:
        raise ValueError(f"time: got {time:g} beside density {density:g}; pass one of them")
    kind, most = ("time", time) if time is not None else ("density", 0.5 if density is None else density)
    if not most > 0:
        raise ValueError(f"{kind}: got {most:g}; pass a share above 0")
    return kind, most


def _unseen(beyond: int, lengths: Sequence[int], longest: int) -> int:
    if positive("beyond", beyond) <= lengths[-1]:
        raise ValueError(f"beyond: got {beyond}, which is not beyond {lengths[-1]}; pass a longer one")
    if beyond > longest:
        raise ValueError(f"beyond: got {beyond}; the model reads at most {longest} tokens")
    return beyond


def _choose(
    cls: Any, model: LM, kind: str, most: float, every: Sequence[int], count: int, steps: Steps
) -> tuple[Configured, dict[int, float]]:
    """The best choice for the lengths but the last, which is unseen, and the loss that it is predicted to add."""
    c, dims, (*lengths, beyond) = model.config, dims_of(model), every
    rules = cls.candidates(every)
    lost = np.stack([_lost(cls, rules, model, n, count, steps) for n in lengths])
    steps.next("what the rules cost")
    cost = densities(cls, rules, every)
    if kind == "time":
        cost = times(cls, rules, every, dims, cost)
    for n, least in zip(every, cost.min(1).tolist(), strict=True):
        if least > most:
            found = f"at {n} tokens no rule takes less than {least:.3g}"
            raise ValueError(f"{kind}: got {most:g}, but {found}; pass more, or longer lengths")
    layer = [at for at in range(c.num_layers) for _ in range(c.num_heads)]
    plans = front(lost, cost, most, layer, lambda: steps.next("solving"))

    def contestant(chosen: np.ndarray) -> Configured:
        rows = chosen.reshape(c.num_layers, c.num_heads).tolist()
        return Configured(cls, tuple(cls.assemble([rules[r] for r in row]) for row in rows), "tuned")

    steps.next(f"choosing at {beyond} tokens")
    best = plans[0]
    if len(plans) > 1:
        unseen = samples(beyond, count, held_out=False, seed=1)
        best = min(plans, key=lambda one: measured(model, layered(contestant(one), dims), unseen))
    added = lost[:, np.arange(len(best)), best].sum(1).tolist()
    return contestant(best), dict(zip(lengths, added, strict=True))


def _lost(cls: Any, rules: Sequence[Rule], model: LM, length: int, count: int, steps: Steps) -> np.ndarray:
    """The predicted loss of every head and rule at one length: (heads of all layers, rules)."""
    steps.next(f"profiling at {length} tokens")
    influence = profile(model, cls, samples(length, count, held_out=False))
    steps.next(f"weighing {len(rules)} rules at {length} tokens")
    return np.concatenate([torch.stack([cls.lost(one, r) for r in rules], 1).double().numpy() for one in influence])
