"""Random problems of attention, each with the list of entries that the oracle reads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import pytest
import strategies
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from saccade.softmax import Alibi, Entmax, FromCoordinates, RelativeTable, Sigmoid, attend, pieces
from saccade.testing.budget import assert_close
from saccade.testing.subject import widen
from saccade.where import Pattern, PerHead, Plan, plan_chosen

Run = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Case:
    """q, k, v and the options of `attend`, beside the entries that the oracle reads; `cuts` are limits of a piece."""

    q: Tensor
    k: Tensor
    v: Tensor
    where: Pattern | Plan | None
    entries: oracle.Entries
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    cuts: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return f"Case({shapes}, where={self.where}, options={self.options}, grid={self.grid}, cuts={self.cuts})"

    @property
    def has_lse(self) -> bool:
        return self.options.get("normalizer", "softmax") == "softmax"

    def to(self, dtype: torch.dtype) -> Case:
        def cast(x: Any) -> Any:
            return copy.deepcopy(x).to(dtype) if isinstance(x, (Tensor, nn.Module)) else x

        options = {name: cast(option) for name, option in self.options.items()}
        return replace(self, q=cast(self.q), k=cast(self.k), v=cast(self.v), options=options)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that receives a gradient."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.options.get("sink") is not None:
            found["sink"] = self.options["sink"]
        if isinstance(self.options.get("bias"), nn.Module):
            found |= {f"bias {name}": p for name, p in self.options["bias"].named_parameters()}
        return found

    def run(self, backend: str, run: Run = attend) -> tuple[Tensor, Tensor | None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.cuts.items():
                patch.setattr(pieces, name, value)
            found = run(self.q, self.k, self.v, self.where, **self.options, return_lse=self.has_lse, backend=backend)
        return found if self.has_lse else (found, None)

    def truth(self) -> tuple[Tensor, Tensor | None]:
        options = dict(self.options)
        n, m = self.q.shape[2], self.k.shape[2]
        bias, normalizer = options.pop("bias", None), options.pop("normalizer", "softmax")
        if isinstance(bias, RelativeTable):
            bias = oracle.relative_bias(bias.table, self.grid, n, m)
        elif isinstance(bias, Alibi):
            bias = oracle.alibi_bias(self.q.shape[1], n, m)
        elif isinstance(bias, FromCoordinates):
            bias = oracle.coordinate_bias(bias.function, bias.coordinates, n)
        weigh = {
            "softmax": None,
            "sigmoid": oracle.sigmoid(0.0),
            "entmax": oracle.entmax(1.5),
            Sigmoid(-1.25): oracle.sigmoid(-1.25),
            Entmax(2.0): oracle.entmax(2.0),
            Entmax(1.25): oracle.entmax(1.25),
        }[normalizer]
        return oracle.attention(self.q, self.k, self.v, self.entries, bias=bias, weigh=weigh, **options)

    def size(self) -> float:
        """Magnitude of a score, whose rounding is an error of its exponential."""
        scale = self.options.get("scale") or self.q.shape[3] ** -0.5
        return 1 + float(self.q.norm(dim=-1).max() * self.k.norm(dim=-1).max()) * abs(scale)

    def terms(self) -> int:
        """Products behind an entry; entmax raises a difference, with its rounding, to the power 1 / (alpha - 1)."""
        normalizer = self.options.get("normalizer")
        alpha = normalizer.alpha if isinstance(normalizer, Entmax) else 1.5 if normalizer == "entmax" else 2.0
        return math.ceil((self.entries.keys.shape[-1] + self.q.shape[3]) / (alpha - 1) ** 2)


def agree(case: Case, backend: str, run: Run = attend) -> None:
    """o and lse of a float64 case are the oracle's."""
    with torch.no_grad():
        (o, lse), (true_o, true_lse) = case.run(backend, run), case.truth()
        single_o, single_lse = case.to(torch.float32).truth()
    size = case.size()
    assert o.dtype == case.q.dtype
    about = {"terms": case.terms(), "scale": size * float(case.v.abs().max())}
    assert_close(o, true_o, widen(true_o, single_o), name="o", **about)
    if true_lse is not None:
        assert lse.dtype == torch.float64
        assert_close(lse, true_lse, widen(true_lse, single_lse), name="lse", terms=case.terms(), scale=size)


def agree_in_gradients(case: Case, backend: str, run: Run = attend) -> None:
    """Gradients of every leaf, through o and lse, are those of autograd through the oracle."""
    cotangents = torch.randn(case.q.shape[:3] + case.v.shape[-1:]), torch.randn(case.q.shape[:3])

    def gradients(case: Case, answer: Callable[[Case], tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        case = case.to(case.q.dtype)
        leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves().items()}
        o, lse = answer(case)
        loss = (o * cotangents[0]).sum()
        if lse is not None:  # a row that sees nothing has an lse of -inf, and no gradient
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * cotangents[1]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else None
        found = found or [None] * len(leaves)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    truth = gradients(case, Case.truth)
    single = gradients(case.to(torch.float32), Case.truth)
    fast = gradients(case, lambda case: case.run(backend, run))
    size = case.size() * max(float(g.abs().max()) for g in truth.values())
    for name, exact in truth.items():
        eager = widen(exact, single[name])
        assert_close(fast[name], exact, eager, name=f"gradient of {name}", terms=case.terms(), scale=size)


RATIOS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 2), (6, 3))  # (query heads, key heads)
NORMALIZERS = ("sigmoid", Sigmoid(-1.25), "entmax", Entmax(2.0), Entmax(1.25))


def network(axes: int, heads: int, seed: int) -> nn.Module:
    """A small network from coordinates to heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(axes, 5), nn.Tanh(), nn.Linear(5, heads)).double()


def random_entries(
    mask: Tensor, pattern: Pattern, block: tuple[int, int], groups: int, batch: int, heads: int, draw: st.DrawFn
) -> tuple[Plan, oracle.Entries]:
    """A routed plan of random tiles and single keys, and what it says."""
    n, m = mask.shape
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows, cols = -(-n // block[0]), -(-m // block[1])

    def numbers(end: int, count: int) -> Tensor:
        return torch.randint(-1, end, (groups, rows, count), generator=seeded)

    chosen = numbers(cols, draw(st.integers(1, min(cols, 4))))
    tokens = numbers(m, draw(st.integers(1, 4))) if draw(st.booleans()) else None
    weights = None
    if tokens is not None and draw(st.booleans()):
        weights = torch.randn(tokens.shape, generator=seeded)
    group_of = torch.randint(0, groups, (draw(st.sampled_from([1, batch])), heads), generator=seeded)
    plan = plan_chosen(pattern, chosen, group_of, n, m, block, tokens=tokens, token_log_weights=weights).verify()
    return plan, oracle.entries_chosen(mask, chosen, group_of, block, tokens, weights)


@st.composite
def patterns(draw: st.DrawFn, heads: int) -> tuple[Pattern, int, int, tuple[int, ...] | None]:
    """(pattern, n, m, grid)."""
    kind = draw(st.sampled_from(["sequence", "sequence", "heads", "grid", "apart"]))
    if kind == "grid":
        pattern, total = draw(strategies.neighborhoods())
        n = draw(st.sampled_from([total, max(1, total // 2)]))
        named = [p for p in getattr(pattern, "parts", [pattern]) if hasattr(p, "grid")]
        return pattern, n, total, named[0].grid
    m = draw(st.integers(1, 41))
    if kind == "apart":
        n = draw(st.integers(1, 41))
        other = strategies.Summaries(draw(st.integers(n, 60)), draw(strategies.small), draw(strategies.small))
        return draw(st.sampled_from([other, strategies.Full(), strategies.Columns(2, 3, 1)])), n, m, None
    n = draw(st.integers(1, m))
    if kind == "heads":
        some = [draw(strategies.sequences(m)) for _ in range(min(heads, 3))]
        return PerHead([draw(st.sampled_from(some)) for _ in range(heads)]), n, m, None
    return draw(strategies.sequences(m)), n, m, None


@st.composite
def options(
    draw: st.DrawFn, heads: int, n: int, m: int, grid: tuple[int, ...] | None, normalizers: tuple[Any, ...]
) -> dict[str, Any]:
    """Options of `attend`."""
    found: dict[str, Any] = {}
    seed = draw(st.integers(0, 2**16))
    seeded = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        found["scale"] = draw(st.sampled_from([0.3, 1.0, -0.5]))
    if draw(st.booleans()):
        found["softcap"] = draw(st.sampled_from([0.7, 5.0]))
    found["normalizer"] = draw(st.sampled_from(["softmax", "softmax", "softmax", *normalizers]))
    if found["normalizer"] == "softmax" and draw(st.booleans()):
        found["sink"] = torch.randn(heads, generator=seeded, dtype=torch.float64)
    kinds = ["none", "none", "table"]
    kinds += ["alibi"] if heads in (1, 2, 4) else []  # other slopes are no float32 numbers
    kinds += ["network"] if n <= m else []
    kind = draw(st.sampled_from(kinds))
    if kind == "table":
        sizes = grid if grid is not None else (m,)
        found["bias"] = RelativeTable(heads, [draw(st.integers(1, size + 1)) for size in sizes], grid).double()
        with torch.no_grad():
            found["bias"].table.normal_(generator=seeded)
    elif kind == "alibi":
        found["bias"] = Alibi(heads).double()
    elif kind == "network":
        axes = draw(st.integers(1, 3))
        coordinates = torch.randn(m, axes, generator=seeded, dtype=torch.float64)
        found["bias"] = FromCoordinates(network(axes, draw(st.sampled_from([1, heads])), seed), coordinates)
    return found


@st.composite
def cases(draw: st.DrawFn, normalizers: tuple[Any, ...] = NORMALIZERS) -> Case:
    """A float64 problem of any kind."""
    heads, kv_heads = draw(st.sampled_from(RATIOS))
    batch, d, dv = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dv = draw(st.sampled_from([d, dv]))  # equal ones take another way
    pattern, n, m, grid = draw(patterns(heads))
    where: Pattern | Plan = pattern
    block = draw(st.one_of(strategies.blocks, st.tuples(st.sampled_from([16, 19, 32]), st.integers(1, 9))))
    entries = oracle.entries_of(pattern.dense(n, m, heads))
    how = draw(st.sampled_from(["pattern", "plan", "plan", "chosen", "bits"]))
    if how == "plan":
        where = pattern.plan(n, m, heads, block)
    elif how == "bits":
        where = Plan.from_mask(pattern.dense(n, m, heads), block)
    elif how == "chosen" and not isinstance(pattern, PerHead):
        mask = pattern.dense(n, m, 1)[0]
        where, entries = random_entries(mask, pattern, block, draw(st.integers(1, 4)), batch, heads, draw)
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded, dtype=torch.float64)

    q, k, v = normal(batch, heads, n, d), normal(batch, kv_heads, m, d), normal(batch, kv_heads, m, dv)
    cuts = draw(st.sampled_from([{}, {"MOST_SCORES": 300, "FEW_TILES": 2}, {"KEPT_MASKS": 0}]))
    how = draw(options(heads, n, m, grid, normalizers))
    return Case(q * draw(st.sampled_from([1.0, 4.0])), k, v, where, entries, how, grid, cuts)
