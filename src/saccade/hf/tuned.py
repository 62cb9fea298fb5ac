"""What `saccade tune` wrote, as something to apply."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import mechanism
from saccade.contract import Dims, Mechanism
from saccade.hf.layers import Layer

SIZES = "num_heads", "num_kv_heads", "head_dim"
MARKS = 4  # numbers of a layer's weights that tell its model from another of the same sizes
SLACK = 2.0**-6  # of the largest of them: the same weights in another dtype


def is_file(what: Any) -> bool:
    """Whether `what` names a file that `saccade tune` may have written."""
    return isinstance(what, Path) or (isinstance(what, str) and what.endswith(".json"))


def tuned(path: str | Path, layers: list[Layer]) -> list[Mechanism]:
    """The mechanism of each layer, with the parameters and tensors that were found for it, where that layer's weights
    are.

    Errors: ValueError for a file that is not there, is none of these, was tuned for another model, or whose tensors are
    not those that it was written with; nothing of the model has moved then.
    """
    path = Path(path)
    said = _read(path)
    if "recipe" in said:
        raise ValueError(
            f"what: {path} holds a conversion to linear attention, whose maps and weights fit the model that was "
            "converted; call saccade.bench.tune.load(path).apply(model)"
        )
    try:
        cls, chosen, dims = serves(said["mechanism"]), said["layers"], said["dims"]
        sizes = tuple(dims[name] for name in SIZES)
        unlike = [each for each in chosen if not isinstance(each, dict)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"what: {path} is not what saccade tune writes (no {error}); tune again") from error
    if unlike:
        raise ValueError(f"what: {path} is not what saccade tune writes (a layer of {unlike[0]!r}); tune again")
    for layer in layers:
        mine = tuple(getattr(layer.dims, name) for name in SIZES)
        if len(chosen) != len(layers) or sizes != mine:
            raise ValueError(
                f"what: {path} was tuned for {len(chosen)} layers of {_told(sizes)}; the model has {len(layers)}, of "
                f"{_told(mine)}"
            )
    if not _alike(said.get("marks"), marks(layers)):
        raise ValueError(
            f"what: {path} was tuned for {said.get('model')}, whose weights are not those of this model; what is "
            "learnt in one means nothing in another, so tune again"
        )
    for params in chosen:
        if unknown := [name for name in params if name not in cls.params()]:
            raise ValueError(
                f"what: {path} gives {said['mechanism']} a parameter {unknown[0]!r}, which it does not have; tune again"
            )
    tensors = read_tensors(path, said.get("tensors"), len(layers))
    return [placed(layer, cls, *each) for layer, each in zip(layers, zip(chosen, tensors, strict=True), strict=True)]


def serves(id: str) -> type[Mechanism]:
    """The class that attends in a pretrained layer: the mechanism's own, or what its `in_layer` gives.

    >>> serves("moba").__name__
    'Moba'
    """
    cls: Any = mechanism(id)
    return cls.in_layer() if hasattr(cls, "in_layer") else cls


def built(cls: type[Mechanism], dims: Dims, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mechanism:
    """The mechanism of a layer with these parameters, and these tensors in place of those that it begins with.

    Errors: ValueError for tensors that another mechanism or other dims made.
    """
    made = cls(dims, **params)
    if tensors:
        got, need = ({name: tuple(x.shape) for name, x in each.items()} for each in (tensors, made.state_dict()))
        if got != need:
            raise ValueError(f"tensors: got {got}; {cls.spec.id} for {dims} has {need}; tune again")
        made.load_state_dict(dict(tensors))
    return made


@functools.cache
def with_tensors(cls: type[Mechanism]) -> type[Mechanism]:
    """The class with one more parameter, `tensors`: what `built` takes besides parameters."""

    def init(self: Mechanism, dims: Dims, *, tensors: Mapping[str, Tensor] | None = None, **params: Any) -> None:
        cls.__init__(self, dims, **params)
        self.load_state_dict(dict(tensors or self.state_dict()))

    of_cls = inspect.signature(cls.__init__)
    extra = inspect.Parameter("tensors", inspect.Parameter.KEYWORD_ONLY, default=None)
    init.__signature__ = of_cls.replace(parameters=[*of_cls.parameters.values(), extra])  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"__init__": init, "__doc__": cls.__doc__, "spec": cls.spec})


def beside(path: Path) -> Path:
    """Where the tensors of a file lie."""
    return path.with_suffix(".safetensors")


def write_tensors(path: Path, tensors: Sequence[Mapping[str, Tensor]]) -> str | None:
    """Write the tensors of each layer beside the JSON that will lie at `path`; what it is to say of them, or None."""
    from safetensors.torch import save

    flat = {f"{at}.{name}": x.detach().cpu().contiguous() for at, one in enumerate(tensors) for name, x in one.items()}
    if not flat:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(flat)
    beside(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, digest: str | None, count: int) -> list[dict[str, Tensor]]:
    """The tensors of each of `count` layers. digest: what `write_tensors` said of them.

    Errors: ValueError for tensors that are not there, or not those.
    """
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    if digest is None:
        return found
    from safetensors.torch import load

    if not beside(path).is_file():
        raise ValueError(f"what: no file {str(beside(path))!r}, where the tensors of {path} lie; move both together")
    data = beside(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"what: {beside(path)} does not hold the tensors that {path} was written with; tune again")
    for name, value in load(data).items():
        at, _, own = name.partition(".")
        found[int(at)][own] = value
    return found


def marks(layers: Sequence[Layer]) -> list[list[float]] | None:
    """A few numbers of the weights of each layer, by which its model is known again; None where they are quantised."""
    found = []
    for layer in layers:
        weights = next(layer.module.parameters()).detach()
        if not weights.is_floating_point():
            return None
        flat = weights.flatten()
        at = torch.linspace(0, flat.numel() - 1, MARKS, dtype=torch.float64).long()
        found.append(flat[at.to(flat.device)].float().tolist())
    return found


def _alike(said: list[list[float]] | None, mine: list[list[float]] | None) -> bool:
    """Are both of the same weights, up to the rounding of a dtype? A file that says none fits any."""
    if said is None or mine is None:
        return True
    one, two = torch.tensor(said), torch.tensor(mine)
    return one.shape == two.shape and bool((one - two).abs().max() <= SLACK * one.abs().max())


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


def placed(layer: Layer, cls: type[Mechanism], params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mechanism:
    """`built` for a layer, where its weights are, and in their dtype."""
    weights = next(layer.module.parameters())
    made = built(cls, layer.dims, params, tensors).to(device=weights.device, dtype=weights.dtype)
    return made.train(layer.module.training)


def _told(sizes: tuple[int, ...]) -> str:
    heads, kv_heads, width = sizes
    return f"{heads} heads, {kv_heads} key heads, head_dim {width}"
