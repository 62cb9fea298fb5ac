"""What `saccade tune` wrote, as something to apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saccade.catalogue import mechanism
from saccade.contract import Mechanism
from saccade.hf.layers import Layer

SIZES = "num_heads", "num_kv_heads", "head_dim"


def is_file(what: Any) -> bool:
    """Whether `what` names a file that `saccade tune` may have written."""
    return isinstance(what, Path) or (isinstance(what, str) and what.endswith(".json"))


def tuned(path: str | Path, layers: list[Layer]) -> list[Mechanism]:
    """The mechanism of each layer, with the parameters that were chosen for it, where that layer's weights are.

    Errors: ValueError for a file that is not there, is none of these, or was tuned for another model.
    """
    path = Path(path)
    said = _read(path)
    if "recipe" in said:
        raise ValueError(
            f"what: {path} holds a conversion to linear attention, whose maps and weights fit the model that was "
            "converted; call saccade.bench.tune.load(path).apply(model)"
        )
    try:
        cls, chosen, dims = mechanism(said["mechanism"]), said["layers"], said["dims"]
        sizes = tuple(dims[name] for name in SIZES)
    except (KeyError, TypeError) as error:
        raise ValueError(f"what: {path} is not what saccade tune writes (no {error}); tune again") from error
    for layer in layers:
        mine = tuple(getattr(layer.dims, name) for name in SIZES)
        if len(chosen) != len(layers) or sizes != mine:
            raise ValueError(
                f"what: {path} was tuned for {len(chosen)} layers of {_told(sizes)}; the model has {len(layers)}, of "
                f"{_told(mine)}"
            )
    return [_placed(layer, cls, params) for layer, params in zip(layers, chosen, strict=True)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"what: no file {str(path)!r}; pass one that saccade tune wrote, or a mechanism's id")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"what: {path} is not what saccade tune writes ({error})") from error
    if not isinstance(said, dict):
        raise ValueError(f"what: {path} is not what saccade tune writes (a {type(said).__name__})")
    return said


def _placed(layer: Layer, cls: type[Mechanism], params: dict[str, Any]) -> Mechanism:
    weights = next(layer.module.parameters())
    return cls(layer.dims, **params).to(device=weights.device, dtype=weights.dtype).train(layer.module.training)


def _told(sizes: tuple[int, ...]) -> str:
    heads, kv_heads, width = sizes
    return f"{heads} heads, {kv_heads} key heads, head_dim {width}"
