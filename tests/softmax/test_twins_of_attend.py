"""Broken twins: one defect each, which the comparison with the oracle must catch; whole, the same problem passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import torch
from cases import Case, agree, agree_in_gradients
from fixed import KV, OPTIONS, B, H, N, problem
from torch import Tensor, nn

from saccade.softmax import attend, pieces
from saccade.where import Causal, Window, patterns

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Twin:
    """One defect. where, options: the problem that shows it; run: a broken `attend`; patch: or a broken part of it."""

    where: str
    options: str = "plain"
    run: Callable[..., Any] = attend
    patch: Callable[[Patch], None] = lambda monkeypatch: None
    caught_as: str = "o: max error"


def wider_window(monkeypatch: Patch) -> None:
    def boxes(self: Window, frame: Any) -> Any:
        return patterns._position(frame, frame.queries - self.size, frame.queries + 1)

    monkeypatch.setattr(Window, "boxes", boxes)


def changed_pieces(**changes: Any) -> Callable[[Patch], None]:
    whole = pieces.Schedule.pieces

    def broken(self: pieces.Schedule, batch: Any) -> list[pieces.Piece]:
        return [replace(piece, **changes) for piece in whole(self, batch)]

    return lambda monkeypatch: monkeypatch.setattr(pieces.Schedule, "pieces", broken)


def fewer_pieces(monkeypatch: Patch) -> None:
    whole = pieces.Schedule.pieces
    monkeypatch.setattr(pieces.Schedule, "pieces", lambda self, batch: whole(self, batch)[:-1])


def without(name: str) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        return attend(*inputs, **{**options, name: None})

    return run


def lse_without_sink(*inputs: Any, **options: Any) -> Any:
    o, _ = attend(*inputs, **options)
    return o, attend(*inputs, **{**options, "sink": None})[1]


def sink_of_another_head(*inputs: Any, sink: Tensor, **options: Any) -> Any:
    return attend(*inputs, sink=sink.roll(1), **options)


def base_two(*inputs: Any, **options: Any) -> Any:
    o, lse = attend(*inputs, **options)
    return o, lse / torch.tensor(2.0, dtype=lse.dtype).log()


def scaled_by_values(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    return attend(q, k, v, *rest, **{**options, "scale": v.shape[3] ** -0.5})


def next_key_head(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    turned = torch.arange(H) % KV
    return attend(q, k[:, turned], v[:, turned], *rest, **options)


class Moved(nn.Module):
    """A bias that counts queries from one on."""

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        return self.bias(i + 1, j)


class Doubled(Moved):
    """A bias of the right value and twice the gradient."""

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        found = self.bias(i, j)
        return 2 * found - found.detach()


def with_bias(kind: type[Moved]) -> Callable[..., Any]:
    def run(*inputs: Any, bias: nn.Module, **options: Any) -> Any:
        return attend(*inputs, bias=kind(bias), **options)

    return run


VALUES = {
    "a window one key wider": Twin("window by row", patch=wider_window),
    "log weights forgotten by row": Twin("routed by row", patch=changed_pieces(log_weights=None)),
    "log weights forgotten by column": Twin("routed by column", patch=changed_pieces(log_weights=None)),
    "log weights forgotten by a sigmoid": Twin("routed by row", "sigmoid", patch=changed_pieces(log_weights=None)),
    "masks forgotten": Twin("window by row", patch=changed_pieces(cut=False)),
    "a piece overwrites the others": Twin("window by column", patch=changed_pieces(alone=True)),
    "a piece forgotten": Twin("routed by column", patch=fewer_pieces),
    "lse without the sink": Twin("causal", "all", lse_without_sink, caught_as="lse: max error"),
    "the sink of another head": Twin("heads", "all", sink_of_another_head),
    "sink forgotten": Twin("causal", "all", without("sink")),
    "softcap forgotten": Twin("causal", "all", without("softcap")),
    "bias forgotten": Twin("grid", "sigmoid", without("bias")),
    "a moved bias": Twin("bits", "all", with_bias(Moved)),
    "lse to base two": Twin("causal", run=base_two, caught_as="lse: max error"),
    "scaled by the width of the values": Twin("full", run=scaled_by_values),
    "the wrong key head": Twin("heads", run=next_key_head),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name, monkeypatch):
    twin = VALUES[name]
    agree(problem(twin.where, twin.options), "tiles")
    twin.patch(monkeypatch)
    with pytest.raises(AssertionError, match=f"^{twin.caught_as}"):
        agree(problem(twin.where, twin.options), "tiles", twin.run)


def no_gradient_of_lse(*inputs: Any, **options: Any) -> Any:
    o, lse = attend(*inputs, **options)
    return o, lse.detach()


def no_gradient_of_sink(*inputs: Any, sink: Tensor, **options: Any) -> Any:
    return attend(*inputs, sink=sink.detach(), **options)


def no_gradient_of_first_key(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    k = torch.cat([k[:, :, :1].detach(), k[:, :, 1:]], 2)
    return attend(q, k, v, *rest, **options)


def doubled_gradient_of_values(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    return attend(q, k, 2 * v - v.detach(), *rest, **options)


GRADIENTS = {
    "lse cut off": Twin("causal", run=no_gradient_of_lse, caught_as="gradient of q"),
    "sink cut off": Twin("causal", "all", no_gradient_of_sink, caught_as="gradient of sink"),
    "the first key cut off": Twin("routed by row", run=no_gradient_of_first_key, caught_as="gradient of k"),
    "values doubled": Twin("heads", run=doubled_gradient_of_values, caught_as="gradient of v"),
    "bias doubled": Twin("grid", "all", with_bias(Doubled), caught_as="gradient of bias"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    twin = GRADIENTS[name]
    case = problem(twin.where, twin.options)
    agree_in_gradients(case, "tiles")
    with pytest.raises(AssertionError, match=f"^{twin.caught_as}"):
        agree_in_gradients(case, "tiles", twin.run)


def test_every_option_of_the_problems_is_used():
    used = {twin.options for twin in (*VALUES.values(), *GRADIENTS.values())}
    assert used >= {"plain", "all", "sigmoid"}
    assert used <= set(OPTIONS)


def test_queries_counted_from_the_first_are_caught():
    q, k, v = (torch.randn(B, heads, n, 5, dtype=torch.float64) for heads, n in ((H, 7), (KV, N), (KV, N)))
    case = Case(q, k, v, Causal(), oracle.entries_of(Causal().dense(7, N, H)))
    agree(case, "tiles")

    def from_the_first(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        return attend(q, k[:, :, :7], v[:, :, :7], *rest, **options)

    with pytest.raises(AssertionError, match="o: max error"):
        agree(case, "tiles", from_the_first)
