"""apply: put mechanisms in place of a pretrained model's attention, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from saccade.cache import Policy, Rotation
from saccade.contract import Attention
from saccade.hf.interface import NAME, attention, mask
from saccade.hf.layers import Layer, layers_of
from saccade.hf.serving import Caching, Serving, serving
from saccade.hf.turned import rotations_of, told

if TYPE_CHECKING:
    from saccade.hf.caching import Memory, Swap

What = str | Path | Attention | type[Attention] | Policy | None


def apply(model: Any, what: What | Sequence[What] = None) -> Handle:
    """Let a causal language model of transformers attend through saccade, until the handle is restored.

        o = what(q, k, v),   q: the last N of M positions, k and v: the cache's keys and values

    q (B, H, N, D), k, v (B, Hkv, M, D), after the rotary embedding, in the model's layout, its scaling folded into q.
    Padding is taken out before a mechanism sees it: each row is attended to as the sequence of its real tokens, so that
    a padded batch gives what its rows give alone. One new token is one query against all keys of the cache; a mechanism
    that decides from the whole prompt (`Attention.prefill`) attends to the prompt, and tokens after it attend densely.

    model: a `PreTrainedModel` whose attention goes through `AttentionInterface`, decoder only; it is changed in place,
    its weights are not. what: a mechanism's id or class, built with its defaults for every layer, on the layer's device
    and in its dtype; an instance, which serves every layer; None, dense attention through `saccade.attend`, which
    honours sliding windows, softcaps and attention sinks of the model; a policy of `saccade.cache`, or a mechanism that
    has one, which takes the place of the layers' cache: prompts are read as the policy says (densely), and tokens after
    them are decoded from what it keeps; a JSON file that `saccade tune` wrote for a model of these sizes; or a sequence
    of these but files, one a layer (default: None). Layers that are given the same policy share it, as do all that are
    given a class that decides over layers (`num_layers`). Policies that ask how the model turns q and k
    (`saccade.cache.Turned`) are told, until the handle is restored.

    Applications nest, and the last is restored first. `with apply(model, ...):` restores at the end of the block.
    Costs what the mechanism costs; of a batch with padding, one call for each length in it, and one wait for the GPU a
    forward pass that has an `attention_mask` or a static cache. Of a static cache what was read is attended to, and not
    its room behind that; a policy takes the place of its layers as of others, before they hold tokens: the room that
    they reserve is neither used nor held, and `generate` does not compile the steps, as it does of static caches else.

    Errors: ImportError without transformers. ValueError or TypeError, before anything is changed, for a model that
    cannot be reached, and for a mechanism that is not causal, works on a grid, has projections or a decoding state of
    its own, was built or tuned for other sizes, is put where the model has a sliding window or a softcap, or asks for
    one rotation where layers that share it have several. ValueError in the forward pass for a cache with a mechanism
    that takes as many queries as keys, for one that holds tokens which were read without the policy, or is full; for
    masks of four axes, packed sequences, dropout, and attention weights; in continuous batching.

    >>> from saccade.hosts.lm import LM, LMConfig
    >>> model, tokens = LM(LMConfig(num_layers=2)).to_llama(), torch.arange(40)[None]
    >>> dense = model(tokens).logits
    >>> with apply(model, "moba") as handle:
    ...     print(handle, model(tokens).logits.shape)
    Handle(LlamaForCausalLM: 2 x moba) torch.Size([1, 40, 320])
    >>> torch.equal(model(tokens).logits, dense)
    True
    """
    layers = layers_of(model)
    return Handle(model, layers, serving(what, layers))


def _register() -> None:
    """Make both functions known to transformers; without its mask function an attention would lose causality."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _no_continuous_batching(*_: Any, **__: Any) -> None:
    # On its own, transformers would switch to flash attention there where that is installed, and say so in a log only.
    raise ValueError(
        "model: continuous batching keeps its cache in pages that a mechanism does not read; use generate, or restore "
        "the model first"
    )


def _not_compiled(*_: Any, **__: Any) -> bool:
    # transformers asks before the prompt is read, and would compile every step again as lengths grow.
    return False


class Handle:
    """What `apply` changed in a model, and the way back.

    Attributes: model; mechanisms, one a layer, None where there is none (dense attention, a bare policy). As a context
    manager it restores at the end of the block.
    """

    def __init__(self, model: Any, layers: list[Layer], served: list[Serving]) -> None:
        self.model = model
        self.mechanisms: list[Attention | None] = [each.mechanism for each in served]
        self._served = served
        self._implementation = model.config._attn_implementation
        _register()
        model.set_attn_implementation(NAME)
        self._changed = [_Change(layer.module, NAME, each) for layer, each in zip(layers, served, strict=True)]
        self._changed.append(_Change(model, "init_continuous_batching", _no_continuous_batching))
        self._hooks: list[Any] = []
        self._swap: Swap | None = None
        if any(isinstance(each, Caching) for each in served):
            from saccade.hf.caching import Swap  # which imports transformers

            rotations = rotations_of(model, layers, served)
            self.tell(rotations, served)
            self._swap = Swap([layer.module for layer in layers], rotations)
            self._changed.append(_Change(model, "_valid_auto_compile_criteria", _not_compiled))
            hook = torch.compiler.disable(self._swap.hook)  # a compiler leaves it as it is, and goes on behind it
            self._hooks = [layers[0].module.register_forward_pre_hook(hook, with_kwargs=True)]
            embedding = model.get_input_embeddings()
            note = torch.compiler.disable(self._swap.note_ids)
            self._hooks.append(embedding.register_forward_pre_hook(note, with_kwargs=True))

    def tell(self, rotations: Mapping[int, Mapping[int, Rotation]], served: Sequence[Serving]) -> None:
        """Until this is restored, let policies that ask for it know how the model turns q and k, by their ids.

        Errors: ValueError for what cannot be told, after which the model is as it was.
        """
        try:
            self._changed += [_Change(policy, "rotation", rotation) for policy, rotation in told(rotations, served)]
        except ValueError:
            self.restore()
            raise

    def memory(self) -> Memory:
        """Bytes that the caches of this model hold now, and those that transformers' own would hold beside them.

        Errors: RuntimeError where no layer has a policy, for transformers' caches are then what they always are.
        """
        if self._swap is None:
            raise RuntimeError("memory: no layer has a policy; the caches are transformers' own")
        return self._swap.memory()

    def record(self, room: int = 512) -> Handle:
        """From now on, record a step of decoding on a GPU as a CUDA graph, and replay it; gives this handle back.

        Steps of one token a sequence over a policy's cache then wait for no Python: what `generate` asks for between
        them is all that the host does. Outputs are the same. Whatever a graph cannot hold runs as before: prompts,
        policies whose steps are not `steady`, caches that were changed in between (beams).

        room: tokens that a recording is good for, and that pages are allocated for ahead. Costs, once every `room`
        tokens, a step as it is without this. Errors: RuntimeError where no layer has a policy (dense decoding is one:
        `apply(model, Policy())`), or the handle was restored.
        """
        if self._swap is None or not self.active:
            reason = "no layer has a policy; pass Policy() for all tokens" if self.active else "this was restored"
            raise RuntimeError(f"record: {reason}")
        from saccade.hf.recorded import recording  # which imports transformers

        self._changed.append(_Change(self.model, "forward", recording(self.model.forward, room)))
        return self

    @property
    def active(self) -> bool:
        """False once restored."""
        return bool(self._changed)

    def restore(self) -> None:
        """Give the model back as it was found; a second call does nothing.

        Errors: RuntimeError when a later application to the same model is still active.
        """
        if not all(change.stands for change in self._changed):
            raise RuntimeError("restore: a later apply on this model is still active; restore that one first")
        if self._changed:
            for change in reversed(self._changed):
                change.undo()
            for hook in self._hooks:
                hook.remove()
            self._changed, self._hooks = [], []
            self.model.set_attn_implementation(self._implementation)

    def __enter__(self) -> Handle:
        if not self.active:
            raise RuntimeError("with: this handle was restored; call apply again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        names = [_name(each) for each in self._served]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return f"Handle({type(self.model).__name__}: {kinds}{'' if self.active else ', restored'})"


def _name(served: Serving) -> str:
    if served.mechanism is not None:
        return served.mechanism.spec.id
    return repr(served.policy) if isinstance(served, Caching) else "dense"


class _Change:
    """A module's own attribute, set, and what it was: state of one model lies on that model."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value
        self.before = {name: vars(module)[name]} if name in vars(module) else {}
        vars(module)[name] = value

    @property
    def stands(self) -> bool:
        return vars(self.module).get(self.name) is self.value

    def undo(self) -> None:
        del vars(self.module)[self.name]
        vars(self.module).update(self.before)
