"""A mechanism entered for a comparison: built for a sample, called, and watched."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from saccade.bench.dense import DenseMixer, dense_attention, kernels
from saccade.bench.sample import Sample
from saccade.contract import Attention, Dims, Mechanism, Mixer
from saccade.testing.ambient import seeded
from saccade.testing.rounding import cast


@dataclass(frozen=True, eq=False)
class Configured:
    """A mechanism with parameters of its own in every layer of a model, and a name to tell it from its defaults."""

    cls: type[Mechanism]
    layers: Sequence[Mapping[str, Any]]
    name: str

    def at(self, layer: int | None) -> int:
        """The layer that is meant, the middle one by default."""
        if not self.layers:
            raise ValueError(f"layers: {self.name} has none; pass the parameters of at least one")
        if layer is not None and not 0 <= layer < len(self.layers):
            raise ValueError(f"layer: got {layer}; {self.name} has layers 0 to {len(self.layers) - 1}")
        return len(self.layers) // 2 if layer is None else layer

    def build(self, dims: Dims, layer: int) -> Mechanism:
        """The mechanism of one layer."""
        return self.cls(dims, **self.layers[self.at(layer)])


@dataclass(frozen=True, eq=False)
class Entry:
    """A class, the backend asked of it (None: its own choice), and parameters (default: the paper's)."""

    cls: type[Mechanism]
    backend: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_mixer(self) -> bool:
        return issubclass(self.cls, Mixer)

    def build(self, sample: Sample, device: str, dtype: torch.dtype) -> Mechanism:
        """The module for the sample's shape; the same seed gives the same weights."""
        if not issubclass(self.cls, (Attention, Mixer)):
            raise NotImplementedError(
                f"the contract {self.cls.contract()} has no dense counterpart to be compared with"
            )
        options = {"backend": self.backend} if self.backend and "backend" in self.cls.params() else {}
        with seeded(0):
            module = self.cls(sample.mixer_dims if self.is_mixer else sample.dims, **options, **self.params)
        return cast(module, dtype).to(device).eval()

    def inputs(self, sample: Sample) -> tuple[Tensor, ...]:
        return (sample.x,) if self.is_mixer else (sample.q, sample.k, sample.v)

    def options(self) -> dict[str, Any]:
        """What a call passes on: the backend, where `compute` takes one."""
        takes = inspect.signature(self.cls.compute).parameters
        return {"backend": self.backend} if self.backend and "backend" in takes else {}

    def call(self, module: Mechanism, sample: Sample) -> Callable[[], Tensor]:
        """The call that is timed: nothing but the module, without gradients."""
        inputs, options = self.inputs(sample), self.options()

        @torch.no_grad()
        def run() -> Tensor:
            return module(*inputs, **options)

        return run


def baseline_calls(is_mixer: bool, causal: bool, sample: Sample) -> dict[str, Callable[[], Tensor]]:
    """Dense attention on the same inputs, by kernel; for a layer, a dense layer of the same dims."""

    def with_kernel(kernel: SDPBackend | None) -> Callable[[], Tensor]:
        if not is_mixer:
            q, k, v = sample.q, sample.k, sample.v
            return torch.no_grad()(lambda: dense_attention(q, k, v, causal, kernel))
        with seeded(0):
            layer = DenseMixer(sample.mixer_dims, causal, kernel).to(sample.x).eval()
        return torch.no_grad()(lambda: layer(sample.x))

    return {name: with_kernel(kernel) for name, kernel in kernels(str(sample.x.device)).items()}


def density(module: Mechanism, sample: Sample) -> float | None:
    """Attended / admissible pairs of the plan followed for these inputs; None where it follows none."""
    if not isinstance(module, Attention):
        return None
    with torch.no_grad():
        plan = module.plan(sample.q, sample.k)
    found = None if plan is None else float(plan.density)
    return found if found is None or math.isfinite(found) else None


@contextmanager
def watch_backends() -> Iterator[set[str]]:
    """Which of saccade's backends really run inside: their module names, as the interpreter enters their `run`."""
    ran: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "run":
            module = frame.f_globals.get("__name__", "")
            if module.startswith("saccade.softmax."):
                ran.add(str(frame.f_globals.get("name") or module.rpartition(".")[2]))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield ran
    finally:
        sys.setprofile(before)


def backend_of(module: Mechanism, ran: set[str]) -> str:
    """Those that were seen to run, else what the mechanism says of itself, else plain PyTorch."""
    said = getattr(module, "backend", None)
    if ran:
        return "+".join(sorted(ran))
    return said if isinstance(said, str) and said != "auto" else "torch"
