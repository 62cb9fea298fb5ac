"""A language model that reads and replies: prompts in tokens, greedy decoding, answers judged in one pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.bench.inputs import Unreadable
from saccade.bench.timing import MOST_PAIRS, Samples, clock_for, rounds
from saccade.contract import Attention
from saccade.hf.serving import cannot_continue
from saccade.tasks.prompts import Bytes, Example, Question, Task, Tokenizer

BUNDLED = "bundled"
WARM = 4  # tokens that are decoded before the clock runs
DECODED = WARM + 1 + MOST_PAIRS  # at most, when they are timed
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
        from saccade.hf.caching import cache_name  # which imports transformers

        name = cache_name(self.model)
        out = self.model(ids, use_cache=use_cache, **{name: cache}, **options)
        return out.logits[0, -keep:], out.get(name)


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

    def advance(self) -> None:
        """Decode a token."""
        self.unread = [self.likeliest()]

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


def dense_bytes(handle: Any, cache: Any) -> int | None:
    """What dense attention would keep of the same sequence."""
    held = memory(handle)
    return kept_bytes(handle, cache) if held is None else int(held.dense)


def part_kept(cache: Any, start: int, stop: int) -> float | None:
    """The part of the tokens start .. stop that policies hold, the mean over their layers and key heads.

    None without a policy.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "session")]
    held = [layer.session.held(layer.index)[0, :, start:stop] for layer in layers]
    return float(torch.cat(held).double().mean()) if held else None


def found_once(tokens: Sequence[int], within: Sequence[int]) -> int | None:
    """Where the tokens stand within others; None where they do not, or more than once.

    >>> found_once([2, 3], [1, 2, 3]), found_once([2], [2, 2]), found_once([4], [1, 2])
    (1, None, None)
    """
    size = len(tokens)
    starts = [at for at in range(len(within) - size + 1) if tuple(within[at : at + size]) == tuple(tokens)]
    return starts[0] if len(starts) == 1 else None


def beside(reader: Reader) -> Reader:
    """The same model once more, with the same weights in memory: dense while something is applied to the first."""
    shared = {id(x): x for x in (*reader.model.parameters(), *reader.model.buffers())}
    return replace(reader, model=copy.deepcopy(reader.model, shared))


def decoding(reader: Reader, plain: Reader, tokens: Sequence[int], seconds: float) -> Samples:
    """Times of decoded tokens, greedy ones after a prompt, in turns with those of `plain`, for so many seconds.

    What follows the answer is decoded as it comes: a token costs the same, whatever it says. The first `WARM` are not
    timed.
    """
    own, other = Stream(reader, list(tokens)), Stream(plain, list(tokens))
    for stream in [own, other] * (1 + WARM):
        stream.advance()
    (found,) = rounds([own.advance], other.advance, seconds=seconds, clock=clock_for(str(reader.model.device)))
    return found


def copied(cache: Any) -> Any:
    """A cache that grows without changing this one; both are read by the same policies."""
    policies = [layer.session.policy for layer in getattr(cache, "layers", ()) if hasattr(layer, "session")]
    return copy.deepcopy(cache, {id(policy): policy for policy in policies})


@dataclass
class Examined:
    """Scores of one example's questions, and what was kept meanwhile: bytes, those of dense attention, and the parts of
    the answers and of the questions.
    """

    scores: list[float]
    cache_bytes: int | None = None
    dense_bytes: int | None = None
    answers_kept: list[float] = field(default_factory=list)
    questions_kept: list[float] = field(default_factory=list)

    def note(self, reader: Reader, handle: Any, cache: Any, example: Example, *questions: Question) -> None:
        """What is kept when the context of these questions has been read."""
        self.cache_bytes, self.dense_bytes = kept_bytes(handle, cache), dense_bytes(handle, cache)
        for question in questions:
            # The blank before an answer may be part of its first token.
            for text in (question.answer[:-1].strip(), question.answer[:-1]):
                tokens = reader.tokenizer.encode(text)
                at = found_once(tokens, example.context)
                if at is not None and (part := part_kept(cache, at, at + len(tokens))) is not None:
                    self.answers_kept.append(part)
                    break


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
    return Examined(scores, kept_bytes(handle, cache), dense_bytes(handle, cache))


def aware(reader: Reader, handle: Any, task: Task, example: Example) -> Examined:
    """Context and question read in one piece, once a question."""
    found = Examined([])
    for question in example.questions:
        ask = reader.tokenizer.encode(question.text)
        stream, asked = Stream(reader, [*example.context, *ask]), len(ask)
        first = stream.likeliest()
        found.note(reader, handle, stream.cache, example, question)
        if (part := part_kept(stream.cache, len(example.context), len(example.context) + asked)) is not None:
            found.questions_kept.append(part)
        found.scores.append(task.score(stream.reply(task, question, [first]), question.answer))
    return found


def agnostic(reader: Reader, handle: Any, task: Task, example: Example) -> Examined:
    """The context read alone, and what was kept of it asked every question, from a copy each.

    A question is appended in one piece, or a token at a time, as if decoded, where a policy would evict from the piece
    and where a mechanism that decides from a whole prompt would take the piece for one.
    """
    cache = reader.read(example.context)[1]
    found = Examined([])
    found.note(reader, handle, cache, example, *example.questions)
    one_by_one = not decides_early(handle)
    for question in example.questions:
        mine, asked = copied(cache), reader.tokenizer.encode(question.text)
        while one_by_one and len(asked) > 1:
            mine = reader.read([asked.pop(0)], mine)[1]
        found.scores.append(task.score(Stream(reader, asked, mine).reply(task, question), question.answer))
    return found
