"""A language model that reads and replies: prompts in tokens, greedy decoding, answers judged in one pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.bench.inputs import Unreadable
from saccade.contract import Attention
from saccade.hf.serving import cannot_continue
from saccade.tasks.prompts import Bytes, Example, Question, Task, Tokenizer

BUNDLED = "bundled"
SLACK = 8  # tokens beyond the answer's that a reply may have: as many words, made of tokens otherwise


class Pretrained:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        begins = tokenizer("")["input_ids"][:1]
        self.start = tuple(begins) if begins == [tokenizer.bos_token_id] else ()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True)
class Reader:
    """A causal model of transformers, its tokenizer, and the token that ends a text, or None."""

    model: Any
    tokenizer: Tokenizer
    name: str
    end: int | None = None

    @property
    def most(self) -> int | None:
        """The longest prompt it was made for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def read(
        self, tokens: Sequence[int], cache: Any = None, *, use_cache: bool = True, keep: int = 1
    ) -> tuple[Tensor, Any]:
        """Logits (keep, vocab) of the last tokens, and the cache with all of them."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        options = {"logits_to_keep": keep} if self.model._supports_logits_to_keep() else {}
        out = self.model(ids, cache=cache, use_cache=use_cache, **options)
        return out.logits[0, -keep:], out.cache


@dataclass
class Stream:
    """What a model reads on from: a cache, or, without one, all tokens again each time."""

    reader: Reader
    unread: list[int]
    cache: Any = None
    use_cache: bool = True

    def likeliest(self) -> int:
        """The token that greedy decoding gives next."""
        logits, cache = self.reader.read(self.unread, self.cache, use_cache=self.use_cache)
        if self.use_cache:
            self.cache, self.unread = cache, []
        return int(logits[-1].argmax())

    def reply(self, task: Task, question: Question, begun: Sequence[int] = ()) -> str:
        """The greedy reply, of which the tokens `begun` are known already, as far as its score depends on it."""
        tokenizer, end = self.reader.tokenizer, self.reader.end
        most = len(tokenizer.encode(question.answer)) + SLACK
        new = list(begun)
        self.unread = [*self.unread, *new]
        while not new or (
            new[-1] != end and len(new) < most and not task.ended(tokenizer.decode(new), question.answer)
        ):
            new.append(self.likeliest())
            self.unread.append(new[-1])
        return tokenizer.decode(new[:-1] if new[-1] == end else new)


def load(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Reader:
    """The language model of this package (`bundled`), or a model of transformers with its tokenizer, by id or path.

    dtype: float32 on the CPU and bfloat16 elsewhere by default. Errors: Unreadable for a model that cannot be had.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    if name == BUNDLED:
        from saccade.hosts.lm import LM

        try:
            model = LM.from_pretrained(dtype=dtype).to_llama()
        except (FileNotFoundError, ImportError) as error:
            raise Unreadable(f"model: {error}") from error
        return Reader(model.to(device), Bytes(), name)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise Unreadable("model: transformers is missing; pip install 'saccade[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise Unreadable(
            f"model: transformers cannot load {name!r}: {lines[0]}; pass {BUNDLED}, an id, or a folder with a "
            "model and its tokenizer"
        ) from error
    return Reader(model.eval().to(device), Pretrained(tokenizer), name, tokenizer.eos_token_id)


def dense() -> Any:
    """The model as it is, where a handle would stand."""
    return nullcontext()


def memory(handle: Any) -> Any:
    """What the policies of a handle hold, or None where it has none: transformers' caches are then what they were."""
    if not hasattr(handle, "memory"):
        return None
    try:
        return handle.memory()
    except RuntimeError:
        return None


def decides_early(handle: Any) -> bool:
    """Is what each token attends to settled by the tokens before it? Then a question changes nothing of the context.

    So it is for dense attention, and for a causal mechanism that does not read the whole prompt first. A policy of what
    is kept is always decoded, as it would be used.
    """
    return memory(handle) is None and all(
        m is None or (isinstance(m, Attention) and m.causal and not m.prefill)
        for m in getattr(handle, "mechanisms", ())
    )


def reads_on(handle: Any) -> bool:
    """Can it attend from several new tokens to those in a cache?"""
    kinds: list[Any] = [type(m) for m in getattr(handle, "mechanisms", ()) if m is not None and not m.prefill]
    return not any(cannot_continue(kind) for kind in kinds)


def kept_bytes(handle: Any, cache: Any) -> int | None:
    """What is kept of the sequence: what policies hold, else all keys and values of the cache, None without one."""
    if cache is None:
        return None
    if (held := memory(handle)) is not None:
        return int(held.held)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)


def copied(cache: Any) -> Any:
    """A cache that grows without changing this one; both are read by the same policies."""
    policies = [layer.session.policy for layer in getattr(cache, "layers", ()) if hasattr(layer, "session")]
    return copy.deepcopy(cache, {id(policy): policy for policy in policies})


@dataclass
class Examined:
    """Scores of one example's questions, and the bytes kept meanwhile."""

    scores: list[float]
    cache_bytes: int | None = None


def either(reader: Reader, handle: Any, task: Task, example: Example) -> Examined:
    """Where `decides_early` holds: each answer in one pass, and decoded only as far as that does not settle its score.

    Where every token of the answer is the likeliest after the true ones before it, greedy decoding gives the answer,
    and its score is 1. Otherwise greedy decoding parts from it at the first token that is not, and goes on from there.
    """
    on = reads_on(handle)
    cache = reader.read(example.context)[1] if on else None
    scores = []
    for question in example.questions:
        ask, answer = (reader.tokenizer.encode(text) for text in (question.text, question.answer))
        before = ask if on else [*example.context, *ask]
        logits, _ = reader.read([*before, *answer[:-1]], copied(cache), use_cache=on, keep=len(answer))
        likeliest = logits.argmax(-1).tolist()
        if likeliest == answer:
            scores.append(1.0)
            continue
        parting = next(at for at, (one, two) in enumerate(zip(likeliest, answer, strict=True)) if one != two)
        stream = Stream(reader, before, copied(cache), on)
        scores.append(task.score(stream.reply(task, question, likeliest[: parting + 1]), question.answer))
    return Examined(scores, kept_bytes(handle, cache))


def aware(reader: Reader, handle: Any, task: Task, example: Example) -> Examined:
    """Context and question read in one piece, once a question."""
    found = Examined([])
    for question in example.questions:
        stream = Stream(reader, [*example.context, *reader.tokenizer.encode(question.text)])
        first = stream.likeliest()
        found.cache_bytes = kept_bytes(handle, stream.cache)
        found.scores.append(task.score(stream.reply(task, question, [first]), question.answer))
    return found


def agnostic(reader: Reader, handle: Any, task: Task, example: Example) -> Examined:
    """The context read alone, and what was kept of it asked every question, from a copy each.

    A question is appended in one piece, or a token at a time, as if decoded, where a policy would evict from the piece
    and where a mechanism that decides from a whole prompt would take the piece for one.
    """
    cache = reader.read(example.context)[1]
    found = Examined([], kept_bytes(handle, cache))
    one_by_one = not decides_early(handle)
    for question in example.questions:
        mine, asked = copied(cache), reader.tokenizer.encode(question.text)
        while one_by_one and len(asked) > 1:
            mine = reader.read([asked.pop(0)], mine)[1]
        found.scores.append(task.score(Stream(reader, asked, mine).reply(task, question), question.answer))
    return found
