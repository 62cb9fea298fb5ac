"""States of any mechanism as things to be kept: their bytes, copies of them, and files.

A state is what `step` returns beside its output: tensors, plain values and None in dataclasses, named tuples, tuples,
lists and dicts, however deep.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1  # of the files
KEY = "saccade_state"  # of their metadata
Tree = dict[str, Any]


def nbytes(state: Any) -> int:
    """Bytes of the tensors in a state, each counted whole, as `save` writes them.

    >>> nbytes((torch.zeros(2, 3), {"count": 5}, None))
    24
    """
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    over(state, count)
    return total


def fork(state: Any) -> Any:
    """A copy of a state that shares no memory with it, still part of the graph that made it. Costs `nbytes`."""
    return over(state, torch.clone)


def over(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same state with every tensor replaced. Errors: TypeError for a part that is nothing a state is made of."""
    if isinstance(state, Tensor):
        return function(state)
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, dict):
        return {key: over(value, function) for key, value in state.items()}
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(over(value, function) for value in state)
    return type(state)(**{name: over(value, function) for name, value in _named(state)})


def save(path: str | Path, state: Any, *, mechanism: Any) -> None:
    """Write a state as safetensors, with what `load` needs to refuse it where it does not belong.

    mechanism: whose it is: the module that made it, of which the id and the dims are noted, or a name.
    Errors: TypeError for a part that is nothing a state is made of.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    said = {"version": VERSION, "owner": _owner(mechanism), "state": _write(state, "state", tensors)}
    save_file(tensors, str(path), metadata={KEY: json.dumps(said)})


def load(path: str | Path, *, mechanism: Any, like: Any = None, device: str | torch.device = "cpu") -> Any:
    """The state of a file that `save` wrote.

    mechanism: who is to go on from it: the module, or the name that was given to `save`. like: a state of that module,
    after a token of the same batch, say; then every tensor must have the shape and the dtype that it has there (default
    None: they are taken as they are; a cache that grows can only be read so). device: where its tensors go.
    Classes of a state are looked up in saccade and the module's own file, nowhere else.
    Errors: ValueError for a file that is none, another version, another mechanism or other dims, and for a state that
    is not like `like`, naming the tensor.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"path: no file {str(path)!r}; pass one that snapshot.save wrote")
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            said = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {str(path)!r} is no state that saccade wrote ({error})") from error
    if said["version"] != VERSION:
        raise ValueError(f"path: {str(path)!r} has version {said['version']}; this saccade reads {VERSION}")
    owner = _owner(mechanism)
    for part in ("id", "dims"):
        kept, wanted = said["owner"][part], owner[part]
        if kept != wanted and None not in (kept, wanted):
            raise ValueError(f"mechanism: got {part} {wanted}, but {str(path)!r} is a state of {kept}; load it there")
    if like is not None:
        _compare(said["state"], _write(like, "state", {}), str(path))
    return _read(said["state"], tensors, getattr(type(mechanism), "__module__", ""))


def _owner(mechanism: Any) -> dict[str, str | None]:
    """Who made a state: the id, and the dims where a module was given."""
    if isinstance(mechanism, str):
        return {"id": mechanism, "dims": None}
    spec, dims = getattr(mechanism, "spec", None), getattr(mechanism, "dims", None)
    if spec is None or dims is None:
        raise TypeError(f"mechanism: got {type(mechanism).__name__}; pass the module that makes the state, or a name")
    return {"id": spec.id, "dims": str(dims)}


def _named(state: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a dataclass or a named tuple."""
    if hasattr(state, "_fields"):
        yield from zip(state._fields, state, strict=True)
    elif is_dataclass(state) and not isinstance(state, type):
        yield from ((field.name, getattr(state, field.name)) for field in fields(state))
    else:
        kinds = "tensors, plain values, dataclasses, tuples, lists and dicts"
        raise TypeError(f"state: got a {type(state).__name__} in it; states are made of {kinds}")


def _write(state: Any, name: str, tensors: dict[str, Tensor]) -> Tree:
    """What a state is made of, as JSON takes it; its tensors go into `tensors`, under their places in it."""
    if isinstance(state, Tensor):
        # Numbers of two parts have no place in some versions of the format.
        plain = torch.view_as_real(state) if state.is_complex() else state
        tensors[name] = plain.detach().cpu().contiguous().clone()
        return {"tensor": name, "shape": list(state.shape), "dtype": str(state.dtype)}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {"value": state}
    if isinstance(state, dict):
        return {"dict": [[key, _write(value, f"{name}.{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        kind = "list" if isinstance(state, list) else "tuple"
        return {kind: [_write(value, f"{name}.{at}", tensors) for at, value in enumerate(state)]}
    parts = {key: _write(value, f"{name}.{key}", tensors) for key, value in _named(state)}
    return {"class": f"{type(state).__module__}:{type(state).__qualname__}", "parts": parts}


def _read(tree: Tree, tensors: dict[str, Tensor], home: str) -> Any:
    if "tensor" in tree:
        found = tensors[tree["tensor"]]
        return torch.view_as_complex(found) if "complex" in tree["dtype"] else found
    if "value" in tree:
        return tree["value"]
    if "dict" in tree:
        return {key: _read(value, tensors, home) for key, value in tree["dict"]}
    for kind, make in (("list", list), ("tuple", tuple)):
        if kind in tree:
            return make(_read(value, tensors, home) for value in tree[kind])
    return _class(tree["class"], home)(**{key: _read(value, tensors, home) for key, value in tree["parts"].items()})


def _class(name: str, home: str) -> Any:
    """A class of a state: of saccade, or of the file that its mechanism stands in."""
    module, _, path = name.partition(":")
    found: Any = None
    if module.split(".")[0] == "saccade" or module == home:
        found = sys.modules[module] if module == home else importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part, None)
    if not isinstance(found, type) or not (is_dataclass(found) or hasattr(found, "_fields")):
        raise ValueError(f"path: a part of the state is a {name}, which is no class of a state here")
    return found


def _compare(kept: Tree, wanted: Tree, path: str) -> None:
    """Refuse a state that is not made as another, whatever the numbers in it are."""
    two = [dict(_leaves(tree, "state")) for tree in (kept, wanted)]
    for name in [*two[0], *two[1]]:
        got, need = (each.get(name, "nothing") for each in two)
        if got != need:
            raise ValueError(
                f"like: {name} in {path!r} is {got}, where this mechanism keeps {need}; load it where it fits"
            )


def _leaves(tree: Tree, name: str) -> Iterator[tuple[str, str]]:
    """Every place in a state and what stands there, in words."""
    if "tensor" in tree:
        yield name, f"{tree['dtype']} of shape {tuple(tree['shape'])}"
    elif "value" in tree:
        yield name, type(tree["value"]).__name__
    else:
        (kind, inner), *rest = tree.items()
        yield name, inner if kind == "class" else kind
        parts = rest[0][1].items() if rest else inner if kind == "dict" else enumerate(inner)
        for key, part in parts:
            yield from _leaves(part, f"{name}.{key}")
