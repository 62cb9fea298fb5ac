"""What attends in a layer: a mechanism or dense attention, admitted when the model is changed, asked in its forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.cache import Cached, Policy
from saccade.catalogue import mechanism
from saccade.contract import Attention, CachePolicy, Dims, Mechanism
from saccade.hf.layers import Layer
from saccade.hf.tuned import is_file, tuned
from saccade.softmax import attend
from saccade.testing.budget import compare
from saccade.where import Causal, Window


@dataclass(frozen=True)
class Asked:
    """What a model asks of one attention besides q, k and v.

    scale: factor of the scores. softcap: their cap. sink: (H,), a logit a head without a value. window: keys that a
    query sees, itself included. use_cache: more tokens may follow.
    """

    scale: float
    softcap: float | None = None
    sink: Tensor | None = None
    window: int | None = None
    use_cache: bool = False


class Serving(Protocol):
    """q (B, H, N, D), k, v (B, Hkv, M, D) without padding -> o (B, H, N, D); queries are the last N of M."""

    @property
    def mechanism(self) -> Attention | None: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """Causal attention through `attend`, with all that a model asks for."""

    mechanism: None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        where: Any = Causal()
        if q.shape[2] == 1:  # one query sees all keys, so no plan is made for each token that is decoded
            where = None
            if asked.window is not None:
                k, v = k[:, :, -asked.window :], v[:, :, -asked.window :]
        elif asked.window is not None:
            where &= Window(asked.window)
        return attend(q, k, v, where, scale=asked.scale, softcap=asked.softcap, sink=asked.sink)


@dataclass(frozen=True)
class Through:
    """Attention through a mechanism."""

    mechanism: Attention
    layer: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        for name, value in (("sliding window", asked.window), ("softcap", asked.softcap), ("sink", asked.sink)):
            if value is not None:
                raise _has(self.mechanism, self.layer, name)
        kind: Any = type(self.mechanism)
        before = k.shape[2] - q.shape[2]
        if self.mechanism.prefill and before:
            if q.shape[2] > 1:
                raise ValueError(
                    f"{kind.spec.id} decides from the whole prompt, and got {q.shape[2]} tokens after {before} others; "
                    "pass the prompt in one piece, and then one token at a time"
                )
            return Dense()(q, k, v, asked)
        if (before or asked.use_cache) and not self.mechanism.prefill and (reason := cannot_continue(kind)):
            raise ValueError(
                f"use_cache: {kind.spec.id} cannot attend from new tokens to those in a cache ({reason}); pass "
                "use_cache=False, which reads everything again for each token"
            )
        plain = q.shape[3] ** -0.5
        # A mechanism knows the usual scale alone; what the model's differs by goes into q.
        return self.mechanism(q if asked.scale == plain else q * (asked.scale / plain), k, v)


@dataclass(frozen=True)
class Caching:
    """Attention over what a policy keeps and reads: layer `index` of the `num_layers` that share it.

    Without a cache there is one piece and no step after it.
    """

    policy: Policy
    mechanism: Attention | None
    layer: int
    index: int = 0
    num_layers: int = 1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        self._check(asked)
        return self.policy.attend(self.index, q, k, v, asked.scale)

    def read(self, held: Any, tokens: Any, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        """o of new tokens. held: the layer of the cache, with its session. tokens: which of them are real."""
        self._check(asked)
        session, batch, ids = held.session, len(q), held.ids
        session.open(self.index)

        def read(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
            *told, rows = more
            if told:
                session.tell(told[0][:, 0, :, 0], rows, batch)
            return session.read(self.index, q, k, v, scale=asked.scale, rows=rows, batch=batch)

        known = self.index == 0 and ids is not None and ids.shape == (batch, q.shape[2])
        if tokens.groups is None:
            if known:
                session.tell(ids)
            out = session.read(self.index, q, k, v, scale=asked.scale)
        else:
            out = tokens.read(read, q, k, v, *([ids[:, None, :, None]] if known else []))
        session.close(self.index)
        return out

    def _check(self, asked: Asked) -> None:
        if asked.window is asked.softcap is asked.sink is None:
            return
        for name, value in (("sliding window", asked.window), ("softcap", asked.softcap), ("sink", asked.sink)):
            if value is not None:
                raise _has(self.mechanism or self.policy, self.layer, name)


def _has(what: Any, layer: int, name: str) -> ValueError:
    return ValueError(
        f"what: layer {layer} of the model has a {name}, which {_name(what)} does not know; pass a list, one a layer, "
        "with None (dense attention, which honours it) there"
    )


def _name(what: Any) -> str:
    return what.spec.id if hasattr(what, "spec") else getattr(what, "__name__", repr(what))


def _together(what: list[Any], layers: list[Layer]) -> list[Any]:
    """The same, but a mechanism that decides over layers is built, once, for all layers that it is asked for on."""
    what = [mechanism(each) if isinstance(each, str) else each for each in what]
    for cls in {each for each in what if isinstance(each, type) and issubclass(each, Cached)}:
        if "num_layers" in cls.params():
            mine = [layer for each, layer in zip(what, layers, strict=True) if each is cls]
            one = mine[0].dims
            dims = Dims(len(mine) * one.num_heads, one.head_dim, len(mine) * one.num_kv_heads)
            weights = next(mine[0].module.parameters())
            built = cls(dims, num_layers=len(mine)).to(device=weights.device, dtype=weights.dtype)
            what = [built if each is cls else each for each in what]
    return what


def _numbered(served: list[Serving]) -> list[Serving]:
    """Layers that share a policy know their place among each other."""
    policies = [id(each.policy) if isinstance(each, Caching) else None for each in served]
    return [
        replace(each, index=policies[:at].count(policies[at]), num_layers=policies.count(policies[at]))
        if isinstance(each, Caching)
        else each
        for at, each in enumerate(served)
    ]


def serving(what: Any, layers: list[Layer]) -> list[Serving]:
    """What attends in each layer.

    what: as in `apply`. Errors: TypeError or ValueError for what cannot be served, with the reason.
    """
    if is_file(what):
        what = tuned(what, layers)
    if isinstance(what, Mapping):
        raise TypeError(f"what: got a dict of {[*what]}; layers go by their place, so pass a list of {len(layers)}")
    if not isinstance(what, Sequence) or isinstance(what, str):
        what = [what] * len(layers)
    if files := [str(each) for each in what if is_file(each)]:
        raise ValueError(f"what: got the file {files[0]!r} in a list; pass it alone, it says what is in each layer")
    if len(what) != len(layers):
        raise ValueError(f"what: got {len(what)} for {len(layers)} layers of attention; pass one a layer")
    each_layer = zip(_together(list(what), layers), layers, strict=True)
    return _numbered([_one(each, layer) for each, layer in each_layer])


def _one(what: Any, layer: Layer) -> Serving:
    if what is None:
        return Dense()
    if isinstance(what, Policy):
        _plain(what, layer)
        return Caching(what, None, layer.index)
    cls = what if isinstance(what, type) else type(what)
    if inspect.isroutine(what) or issubclass(cls, Policy):
        raise TypeError(f"what: got {_name(what)} itself; pass a policy that it makes, {_name(what)}(...)")
    if not issubclass(cls, Mechanism):
        raise TypeError(
            f"what: got {_name(what)}; pass a mechanism's id, an Attention (class or instance), a policy, None, or a "
            "list of these, one a layer"
        )
    _admit(cls)
    if isinstance(what, type):
        weights = next(layer.module.parameters())
        what = what(layer.dims).to(device=weights.device, dtype=weights.dtype).train(layer.module.training)
    name, dims = what.spec.id, what.dims
    if isinstance(what, Cached) and what.num_layers > 1:
        dims = Dims(dims.num_heads // what.num_layers, dims.head_dim, dims.num_kv_heads // what.num_layers)
    if dims.grid is not None or dims != layer.dims:
        raise ValueError(f"what: {name} was built for {dims}; layer {layer.index} of the model has {layer.dims}")
    if not what.causal:
        raise ValueError(f"what: {name} is not causal, a language model must be; choose a mechanism that is")
    _plain(what, layer)
    policy = getattr(what, "policy", None)
    return Through(what, layer.index) if policy is None else Caching(policy, what, layer.index)


def _plain(what: Any, layer: Layer) -> None:
    for kind, value in (("sliding window", layer.window), ("softcap", layer.softcap)):
        if value is not None:
            raise _has(what, layer.index, kind)


def _admit(cls: type[Mechanism]) -> None:
    """Raise for a class that no layer of a causal language model can hold."""
    name = cls.spec.id
    if not issubclass(cls, Attention):
        raise TypeError(
            f"what: {name} is a {cls.contract()}, which has projections of its own, not those of a pretrained layer; "
            "pass an Attention, or train a saccade.hosts model with it"
        )
    if 0 not in cls.spec.ranks:
        raise ValueError(f"what: {name} works on {cls.spec.tokens}; choose a mechanism for sequences")
    if cls.can_step() and not issubclass(cls, CachePolicy):
        raise ValueError(
            f"what: {name} decodes with a state of its own, which a cache of keys and values does not hold; choose a "
            "mechanism that attends to past keys, or use saccade.hosts"
        )


@functools.cache
def cannot_continue(cls: type[Attention]) -> str | None:
    """Why a mechanism cannot attend from the last N of M positions; None when it can.

    The class is tried on the cases that it brings: its last rows must be what they are within the whole. Tried, since
    no declaration says it. Cost: a few small calls, once a class.
    """
    tried = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for case in cls.cases():
            attention = None if case.dims.grid else cls(case.dims, **case.params).double()
            if attention is None or not attention.causal:
                continue
            q, k, v = cls.inputs(case, torch.Generator().manual_seed(0))
            whole = attention(q, k, v)
            for count in (1, case.length // 2):
                try:
                    rows = attention(q[:, :, -count:], k, v)
                except (ValueError, RuntimeError) as error:
                    return str(error)
                if not compare(rows, whole[:, :, -count:], whole[:, :, -count:], terms=case.length).ok:
                    return f"its last {count} rows of {case.length} are others without the queries before them"
            tried += 1
    return None if tried else "none of its cases is causal"
