"""One of the two processes of `kvpress_cpu.py`: a model reads prompts and decodes from what a policy keeps of them.

    python kvpress_worker.py kvpress|saccade MODEL THREADS

A JSON object a line comes in and one goes out. Both processes run this file, each in an environment of its own, so that
the loops are the same; what differs is a `Side`: how a policy is put into the model, and what it keeps.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

What = dict[str, Any] | None  # as `kvpress_cpu.POLICIES` says it; None is dense attention
MEMORY = Path(__file__).parents[1] / "src" / "saccade" / "bench" / "memory.py"  # needs nothing but torch


class Side:
    """A causal model of transformers in a folder, dense."""

    argument = "past_key_values"  # what the model calls its cache

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prompted(self, what: What) -> AbstractContextManager[Any]:
        """While a prompt is read."""
        return nullcontext()

    def decoded(self, what: What) -> AbstractContextManager[Any]:
        """While a prompt is read, and all that follows it."""
        return nullcontext()

    def cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def copied(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    def held(self, cache: Any) -> int:
        """Bytes of the cache."""
        tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def kept(self, cache: Any, seen: int) -> np.ndarray:
        """bool (layers, key heads, tokens seen) of the tokens that are attended to."""
        heads = self.model.config.num_key_value_heads
        return np.ones((len(cache.layers), heads, seen), bool)

    def read(self, tokens: list[int], at: int, cache: Any) -> int:
        """The likeliest token after `tokens`, the first of which is number `at`."""
        positions = torch.arange(at, at + len(tokens))[None]
        out = self.model(torch.tensor([tokens]), position_ids=positions, logits_to_keep=1, **{self.argument: cache})
        return int(out.logits[0, -1].argmax())


class Kvpress(Side):
    """Presses of kvpress: as in its pipeline, on while the context is read and off behind it."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        import kvpress

        self.presses = kvpress
        self.marks: list[np.ndarray] = []

    @contextmanager
    def prompted(self, what: What) -> Iterator[None]:
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None
        # To know every key again among those that are kept; before the hooks of a press, which come later.
        self.marks = []
        modules = [layer.self_attn for layer in self.model.model.layers]
        hooks = [module.register_forward_hook(self._mark, with_kwargs=True) for module in modules]
        with nullcontext() if what is None else self._press(what)(self.model):
            yield
        for hook in hooks:
            hook.remove()  # a step must not pay for them

    def _press(self, what: dict[str, Any]) -> Any:
        inner = {name: self._press(value) if isinstance(value, dict) else value for name, value in what.items()}
        return getattr(self.presses, inner.pop("class"))(**inner)

    def held(self, cache: Any) -> int:
        """Keys and values, and the indices of those that are masked."""
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return super().held(cache) + sum(x.nbytes for each in masked if each is not None for x in each)

    def _mark(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.marks.append(marks(kwargs["past_key_values"].layers[module.layer_idx].keys))

    def kept(self, cache: Any, seen: int) -> np.ndarray:
        found = super().kept(cache, seen)
        for index, (layer, all_marks) in enumerate(zip(cache.layers, self.marks, strict=True)):
            own = marks(layer.keys)
            for head in range(len(own)):
                found[index, head] = np.isin(all_marks[head], own[head])
            masked = getattr(self.model.model.layers[index].self_attn, "masked_key_indices", None)
            if masked is not None:
                found[index, masked[1].numpy(), masked[2].numpy()] = False
        return found


def marks(keys: Tensor) -> np.ndarray:
    """A number for each key (1, Hkv, M, D) that tells its bits: (Hkv, M)."""
    odd = np.random.default_rng(0).integers(1, 2**62, keys.shape[-1], dtype=np.int64) * 2 + 1
    return (keys[0].contiguous().view(torch.int32).numpy().astype(np.int64) * odd).sum(-1)


class Saccade(Side):
    """Policies of saccade.cache; writes the model of the package into the folder first."""

    argument = "cache"

    def __init__(self, folder: str) -> None:
        from saccade.hosts.lm import LM

        LM.from_pretrained().to_llama().save_pretrained(folder)
        super().__init__(folder)

    def decoded(self, what: What) -> AbstractContextManager[Any]:
        from saccade.hf import apply

        return nullcontext() if what is None else apply(self.model, policy(what))

    def copied(self, cache: Any) -> Any:
        from saccade.bench.eval_reader import copied

        return copied(cache)

    def held(self, cache: Any) -> int:
        sessions = {id(layer.session): layer.session for layer in cache.layers if hasattr(layer, "session")}
        return sum(each.nbytes for each in sessions.values()) if sessions else super().held(cache)

    def kept(self, cache: Any, seen: int) -> np.ndarray:
        layers = [layer for layer in cache.layers if hasattr(layer, "session")]
        if not layers:
            return super().kept(cache, seen)
        return np.stack([layer.session.held(layer.index)[0].numpy() for layer in layers])


def policy(what: dict[str, Any]) -> Any:
    """`Evict` of a scorer, a budget, and the rest, each by name: of this file, or of saccade.cache."""
    from saccade import cache

    def made(of: dict[str, Any], *args: Any) -> Any:
        named = dict(of)
        name = named.pop("class")
        return (definitions() | vars(cache))[name](*args, **named)

    rest = dict(what)
    budget = rest.pop("budget")
    return cache.Evict(made(rest.pop("scorer")), made(budget) if isinstance(budget, dict) else budget, **rest)


def definitions() -> dict[str, Any]:
    """What kvpress defines otherwise than saccade, by kvpress' definition."""
    from saccade.cache import Uniform

    class PyramidOfAll(Uniform):
        """The line of PyramidKV from 2 b - b / steepness down to b / steepness over all tokens that are kept, those of
        the window among them; uniform where the last layer would have less than the window.
        """

        def tokens(self, seen: int, index: int = 0, num_layers: int = 1, sure: int = 0) -> int:
            mean = self.share * seen if isinstance(self.share, float) else self.share
            least = mean / 20
            most = 2 * mean - least
            if most >= seen - sure:
                most = seen - sure
                least = 2 * mean - most
            if least < sure:
                return round(mean)
            return round(most - index * (most - least) / (num_layers - 1))

    return {PyramidOfAll.__name__: PyramidOfAll}


class Worker:
    """What a process is told to do; the names are those of the messages."""

    def __init__(self, side: Side) -> None:
        spec = importlib.util.spec_from_file_location("memory", MEMORY)
        self.memory = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(self.memory)  # type: ignore[union-attr]
        self.side, self.entered = side, ExitStack()
        self.token = self.at = 0
        self.stream: Any = None

    def answer(self, what: What, context: list[int], questions: list[list[int]], aware: bool, new: int) -> Any:
        """Replies of `new` tokens, what is kept and held after the prompt, and the most bytes of tensors, weights not,
        that were alive at once meanwhile; `step` decodes on behind the last reply.

        aware: the first question is read with the context; else what was kept of the context is asked all of them, a
        token at a time, as if each were decoded.
        """
        self.close()
        side, replies = self.side, []
        if aware:
            context, questions = [*context, *questions[0]], [[]]
        self.entered.enter_context(side.decoded(what))
        with self.memory.LiveBytes() as counter:
            counter.ignore(list(side.model.state_dict().values()))
            cache = side.cache()
            with side.prompted(what):
                first = side.read(context, 0, cache)
            reading, counter.peak = counter.peak, counter.live
            held, kept = side.held(cache), side.kept(cache, len(context))
            for question in questions:
                self.stream = side.copied(cache) if len(questions) > 1 else cache
                self.token, self.at = first, len(context)
                for asked in question:
                    self.token = asked
                    self.step(1)
                reply = [self.token]
                while len(reply) < new:
                    self.step(1)
                    reply.append(self.token)
                replies.append(reply)
        peaks = {"reading": reading, "decoding": counter.peak}
        return {"replies": replies, "held": held, **peaks, "kept": packed(kept), "shape": kept.shape}

    def step(self, count: int) -> Any:
        """Decode `count` tokens."""
        start = time.perf_counter()
        for _ in range(count):
            self.token = self.side.read([self.token], self.at, self.stream)
            self.at += 1
        return {"seconds": time.perf_counter() - start}

    def close(self) -> Any:
        """Forget what was read, and take the policy out."""
        self.stream = None
        self.entered.close()
        return {}

    def versions(self) -> Any:
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in ("kvpress", "saccade", "torch", "transformers"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found


def packed(kept: np.ndarray) -> str:
    return base64.b64encode(np.packbits(kept).tobytes()).decode()


def unpacked(text: str, shape: list[int]) -> np.ndarray:
    """What `packed` packed."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    return bits[: int(np.prod(shape))].reshape(shape).astype(bool)


def main() -> None:
    side, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # one for another torch; transformers would fail
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    with torch.no_grad():
        worker = Worker({"kvpress": Kvpress, "saccade": Saccade}[side](folder))
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                found = getattr(worker, asked.pop("do"))(**asked)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
