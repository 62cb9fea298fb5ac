"""Prompts that several policies read: what is the same for all of them is computed once.

Where the first piece is dense attention, as `Policy.attend` is, neither the hidden states of a prompt nor its q, k and
v hang on the policy, at any budget: a policy decides afterwards what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saccade.cache import Policy
from saccade.hf import apply
from saccade.hf.interface import NAME, Tokens
from saccade.hf.layers import layers_of
from saccade.hf.serving import Asked, Caching

MOST = {"cpu": 2**32, "cuda": 2**33}  # bytes of q, k and v that are held, by device


@dataclass(frozen=True)
class Met:
    """What the attention of a layer was given: q (B, H, N, D), k, v (B, Hkv, N, D), and what it was asked of them."""

    tokens: Tokens
    q: Tensor
    k: Tensor
    v: Tensor
    asked: Asked


@dataclass(frozen=True)
class Noting(Caching):
    """Attention that notes what it is given, layer by layer."""

    met: list[Met] = field(default_factory=list)

    def read(self, held: Any, tokens: Any, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        self.met.append(Met(tokens, q, k.detach(), v, asked))  # without the layer of the cache that k leads to
        return super().read(held, tokens, q, k, v, asked)


@dataclass(frozen=True)
class Call:
    """How a model is asked to begin a cache. ids (B, N). name: of its argument for the cache. keep: logits wanted, from
    the end. options: what else it is told.
    """

    ids: Tensor
    name: str
    keep: int
    options: Mapping[str, Any]

    def __call__(self, model: Any) -> tuple[Tensor, Any]:
        """Logits (B, keep, vocab), and the cache."""
        out = model(input_ids=self.ids, use_cache=True, **{self.name: None}, **self.options)
        return out.logits[:, -self.keep :], out.get(self.name)


@dataclass(frozen=True)
class Once:
    """A prompt as dense attention read it: the layers' q, k and v, and the logits (B, keep, vocab) of its end."""

    met: Sequence[Met]
    logits: Tensor


class Shared:
    """Prompts that were read, for the policies to come.

        shared(model, prompts, call) -> logits (B, keep, vocab), cache

    gives what the call gives, to the last bit; of prompts that it has, and for a policy whose first piece is dense,
    without running anything but what the policy itself does. All else is the model's to do, and prompts for which
    there is no room.

    most: bytes that are held (default: 4 GiB, 8 GiB on a GPU). Costs, of each token and layer, D numbers for each head
    of q, k and v.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.about: Any = None
        self.forget()

    def turn_to(self, about: Any) -> None:
        """Prompts of something are to come: those of anything else will not come again."""
        if about != self.about:
            self.about = about
            self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self.known: dict[Any, Once] = {}
        self.held = 0

    def stop(self) -> None:
        """Hold nothing from now on."""
        self.most = 0
        self.forget()

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], call: Call) -> tuple[Tensor, Any]:
        """prompts: the tokens, without padding."""
        if not begins_densely(model):
            return call(model)
        key = model, call.keep, tuple(map(tuple, prompts))
        if key not in self.known:
            size = call.ids.numel() * bytes_a_token(model)
            if self.held + size > (MOST[call.ids.device.type] if self.most is None else self.most):
                return call(model)
            self.known[key] = read_once(model, call)
            self.held += size
        once = self.known[key]
        return once.logits, handed(model, call, once.met)


def begins_densely(model: Any) -> bool:
    """Does a policy whose first piece is dense attention have every layer's cache?"""
    served = [vars(layer.module).get(NAME) for layer in layers_of(model)]
    return all(
        isinstance(each, Caching) and getattr(each.policy.attend, "__func__", None) is Policy.attend for each in served
    )


def bytes_a_token(model: Any) -> int:
    """Of q, k and v in all layers."""
    dims = [layer.dims for layer in layers_of(model)]
    return sum((d.num_heads + 2 * d.num_kv_heads) * d.head_dim for d in dims) * model.dtype.itemsize


@contextmanager
def instead(of: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object itself, for a while."""
    before = {name: vars(of)[name]} if name in vars(of) else {}
    vars(of)[name] = value
    try:
        yield
    finally:
        del vars(of)[name]
        vars(of).update(before)


def read_once(model: Any, call: Call) -> Once:
    """Read a prompt as a policy does that keeps all of it, whatever policy there is."""
    met: list[Met] = []
    with apply(model, Policy()), ExitStack() as noting:
        for layer in layers_of(model):
            served = vars(layer.module)[NAME]
            noting.enter_context(instead(layer.module, NAME, Noting(**vars(served), met=met)))
        logits, _ = call(model)
    return Once(met, logits.clone())  # of all positions, where a model has no way to leave the others out


def handed(model: Any, call: Call, met: Sequence[Met]) -> Any:
    """A cache of which the layers' policy has read a prompt: of the model runs its embedding alone, whose hook tells
    the policy the tokens, and in the place of each layer's attention what hands q, k and v on.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model.get_input_embeddings()(call.ids)
    for layer, each in zip(layers_of(model), met, strict=True):
        module, served = layer.module, vars(layer.module)[NAME]

        def forward(*_: Any, module: Any = module, served: Caching = served, met: Met = each, **__: Any) -> None:
            key, value = cache.update(met.k.detach(), met.v, module.layer_idx)
            served.read(vars(key)[NAME], met.tokens, met.q, key, value, met.asked)

        with instead(served.policy, "attend", attended), instead(module, "forward", forward):
            module(**{call.name: cache})
    return cache


def attended(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """In place of dense attention whose output is known: rows of no channels."""
    return q[..., :0]
