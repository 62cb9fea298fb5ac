"""A language model that reads and replies: prompts in tokens, greedy decoding, answers judged in one pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saccade.bench.eval_shared import Call, Shared
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
    """A causal model of transformers, its tokenizer, and the token that ends a text, or None.

    shared: prompts that were read for other policies; None: each is read anew.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    end: int | None = None
    shared: Shared | None = None

    @property
    def most(self) -> int | None:
        """The longest prompt it was made for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def read(self, tokens: Sequence[int], cache: Any = None, *, use_cache: bool = True) -> tuple[Tensor, Any]:
        """Logits (1, vocab) of the last token, and the cache with all of them."""
        rows = Rows(self, use_cache=use_cache, cache=cache)
        return rows.read([list(tokens)])[0], rows.cache


@dataclass
class Stream:
    """What a model reads on from: one sequence, and its cache."""

    reader: Reader
    unread: list[int]
    cache: Any = None

    def likeliest(self) -> int:
        """The token that greedy decoding gives next."""
        logits, self.cache = self.reader.read(self.unread, self.cache)
        return int(logits[-1].argmax())

    def advance(self) -> None:
        """Decode a token."""
        self.unread = [self.likeliest()]


class Rows:
    """Sequences that a model reads side by side and goes on from: a cache, or, without one, all tokens again each time.

    Where the sequences begin with different numbers of tokens, the shorter ones are padded in front, and positions and
    masks leave the padding out. cache: an empty one by default, else one of rows without padding.
    """

    def __init__(self, reader: Reader, *, use_cache: bool = True, cache: Any = None) -> None:
        self.reader, self.use_cache, self.cache = reader, use_cache, cache
        self.text: list[list[int]] = []
        self.padding: list[int] = []
        from saccade.hf.caching import cache_name  # which imports transformers

        self.name = cache_name(reader.model)
        self.places = "position_ids" in inspect.signature(reader.model.forward).parameters

    @torch.no_grad()
    def read(self, new: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        """Logits (B, keep, vocab) of the last of so many more tokens of every row: as many of each, but at first."""
        model, before = self.reader.model, 0
        if self.use_cache:
            before = len(self.text[0]) + self.padding[0] if self.text else 0
        self.text = [[*old, *more] for old, more in zip(self.text or [[]] * len(new), new, strict=True)]
        rows = list(new) if self.use_cache else self.text
        width = max(map(len, rows))
        if not before:
            self.padding = [width - len(row) for row in rows]
        front = [0] * len(rows) if before else self.padding
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(front, rows, strict=True)], device=model.device)
        options: dict[str, Any] = {"logits_to_keep": keep} if model._supports_logits_to_keep() else {}
        if any(self.padding):
            pad = torch.tensor(self.padding, device=model.device)[:, None]
            if self.places:
                place = torch.arange(before, before + width, device=model.device)
                options["position_ids"] = (place - pad).clamp(min=0)
            if not before or not in_pages(self.cache):
                options["attention_mask"] = (torch.arange(before + width, device=model.device) >= pad).long()
        if self.use_cache and self.cache is None and self.reader.shared is not None:
            logits, self.cache = self.reader.shared(model, new, Call(ids, self.name, keep, options))
            return logits
        # By name, as `generate` does: what is recorded goes by that.
        out = model(input_ids=ids, use_cache=self.use_cache, **{self.name: self.cache}, **options)
        self.cache = out.get(self.name)
        return out.logits[:, -keep:]

    def taken(self, which: Sequence[int]) -> Rows:
        """Some of the rows, which go on without changing these."""
        found = copy.copy(self)
        found.text, found.padding = [self.text[at] for at in which], [self.padding[at] for at in which]
        found.cache = copied(self.cache)
        if found.cache is not None and list(which) != list(range(len(self.text))):
            found.cache.batch_select_indices(torch.tensor(list(which), device=self.reader.model.device))
        return found


@dataclass
class Reply:
    """The greedy reply to a question, as far as its score depends on it. new: its tokens so far."""

    reader: Reader
    task: Task
    question: Question
    new: list[int]

    @cached_property
    def most(self) -> int:
        return len(self.reader.tokenizer.encode(self.question.answer)) + SLACK

    @property
    def ended(self) -> bool:
        return bool(self.new) and (
            self.new[-1] == self.reader.end
            or len(self.new) >= self.most
            or self.task.ended(self.reader.tokenizer.decode(self.new), self.question.answer)
        )

    @property
    def score(self) -> float:
        said = self.new[:-1] if self.new[-1] == self.reader.end else self.new
        return self.task.score(self.reader.tokenizer.decode(said), self.question.answer)


def decoded(rows: Rows, replies: Sequence[Reply], unread: Sequence[Sequence[int]], *, at_once: bool = False) -> None:
    """Decode every row until its reply has ended. unread: what a row reads first, the tokens of its reply included.

    A row goes its own way: what it has to read comes a token at a time, and is followed by what it says; one that has
    ended says on what nobody hears. at_once: what all rows have to read comes in one piece.
    """
    left = [list(tokens) for tokens in unread]
    size = min(map(len, left)) if at_once else 1
    while not all(reply.ended for reply in replies):
        if rows.use_cache:
            pieces = [tokens[:size] for tokens in left]
            left = [tokens[size:] for tokens in left]
        else:
            pieces, left = left, [[] for _ in left]
        likeliest = rows.read(pieces)[:, -1].argmax(-1).tolist()
        size = 1
        for reply, tokens, token in zip(replies, left, likeliest, strict=True):
            if tokens:
                continue
            tokens.append(token)
            if not reply.ended:
                reply.new.append(token)


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


def in_pages(cache: Any) -> bool:
    """Do the sessions of policies have all of it? They know which tokens are real."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(hasattr(layer, "session") for layer in layers)


def parts_kept(cache: Any) -> list[list[float]] | None:
    """The part of the layers and key heads that hold a token, for each token of each row; None without a policy."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "session")]
    held = [layer.session.held(layer.index) for layer in layers]
    return torch.cat(held, 1).double().mean(1).tolist() if held else None


def found_once(tokens: Sequence[int], within: Sequence[int]) -> int | None:
    """Where the tokens stand within others; None where they do not, or more than once.

    >>> found_once([2, 3], [1, 2, 3]), found_once([2], [2, 2]), found_once([4], [1, 2])
    (1, None, None)
    """
    size, whole, starts, at = len(tokens), tuple(within), [], -1
    with suppress(ValueError):  # there is no other
        while True:
            at = whole.index(tokens[0], at + 1)
            if whole[at : at + size] == tuple(tokens):
                starts.append(at)
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

    def note_answers(self, reader: Reader, context: Sequence[int], kept: Sequence[float], *asked: Question) -> None:
        """How much is kept of the answers to questions, as they stand in the context."""
        for question in asked:
            # The blank before an answer may be part of its first token.
            for text in (question.answer[:-1].strip(), question.answer[:-1]):
                tokens = reader.tokenizer.encode(text)
                at = found_once(tokens, context) if tokens else None
                if at is not None:
                    self.answers_kept.append(fmean(kept[at : at + len(tokens)]))
                    break


def note_bytes(found: Sequence[Examined], handle: Any, rows: Rows) -> None:
    """What a row holds on average; dense attention, and what keeps all, would not hold the padding."""
    if rows.cache is None:
        return
    size = len(found)
    real = sum(map(len, rows.text)) / (sum(map(len, rows.text)) + sum(rows.padding))
    whole, held = (of(handle, rows.cache) for of in (dense_bytes, kept_bytes))
    for each in found:
        each.dense_bytes = round((whole or 0) * real / size)
        each.cache_bytes = round((held or 0) * (real if memory(handle) is None else 1) / size)


def asked_at(examples: Sequence[Example], turn: int) -> list[tuple[int, Question]]:
    """The examples that have so many questions, by their numbers, with the question whose turn it is."""
    return [(at, one.questions[turn]) for at, one in enumerate(examples) if len(one.questions) > turn]


def turns(examples: Sequence[Example]) -> range:
    return range(max(len(one.questions) for one in examples))


def either(reader: Reader, handle: Any, task: Task, examples: Sequence[Example]) -> list[Examined]:
    """Where `decides_early` holds: each answer in one pass, and decoded only as far as that does not settle its score.

    Where every token of the answer is the likeliest after the true ones before it, greedy decoding gives the answer,
    and its score is 1. Otherwise greedy decoding parts from it at the first token that is not, and goes on from there.
    """
    on, encode = reads_on(handle), reader.tokenizer.encode
    found = [Examined([]) for _ in examples]
    contexts = Rows(reader, use_cache=on)
    if on:
        contexts.read([one.context for one in examples])
        note_bytes(found, handle, contexts)
    for turn in turns(examples):
        asked = asked_at(examples, turn)
        which = [at for at, _ in asked]
        before = [[*([] if on else examples[at].context), *encode(question.text)] for at, question in asked]
        answers = [encode(question.answer) for _, question in asked]
        # What is behind an answer changes nothing before it, so that shorter rows are filled up with anything.
        pieces = [[*ask, *answer[:-1]] for ask, answer in zip(before, answers, strict=True)]
        width = max(map(len, pieces))
        pieces = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
        keep = width + 1 - min(map(len, before))
        rows = contexts.taken(which) if on else Rows(reader, use_cache=False)
        likeliest = rows.read(pieces, keep).argmax(-1).tolist()
        del rows
        parted: list[tuple[int, Reply, list[int]]] = []
        for (at, question), row, ask, answer in zip(asked, likeliest, before, answers, strict=True):
            start = keep - width + len(ask) - 1
            said = row[start : start + len(answer)]
            if said == answer:
                found[at].scores.append(1.0)
                continue
            parting = next(at for at, (one, two) in enumerate(zip(said, answer, strict=True)) if one != two)
            parted.append((at, Reply(reader, task, question, said[: parting + 1]), ask))
        if parted:
            rows = contexts.taken([at for at, *_ in parted]) if on else Rows(reader, use_cache=False)
            decoded(rows, [reply for _, reply, _ in parted], [[*ask, *r.new] for _, r, ask in parted], at_once=True)
        for at, reply, _ in parted:
            found[at].scores.append(reply.score)
    return found


def aware(reader: Reader, handle: Any, task: Task, examples: Sequence[Example]) -> list[Examined]:
    """Context and question read in one piece, once a question."""
    found = [Examined([]) for _ in examples]
    for turn in turns(examples):
        asked = asked_at(examples, turn)
        mine = [found[at] for at, _ in asked]
        prompts = [[*examples[at].context, *reader.tokenizer.encode(question.text)] for at, question in asked]
        rows = Rows(reader)
        first = rows.read(prompts)[:, -1].argmax(-1).tolist()
        note_bytes(mine, handle, rows)
        for row, prompt, one, (at, question) in zip(parts_kept(rows.cache) or (), prompts, mine, asked, strict=False):
            size = len(examples[at].context)
            one.note_answers(reader, examples[at].context, row, question)
            one.questions_kept.append(fmean(row[size : len(prompt)]))
        replies = [Reply(reader, task, question, [new]) for (_, question), new in zip(asked, first, strict=True)]
        decoded(rows, replies, [reply.new for reply in replies])
        for one, reply in zip(mine, replies, strict=True):
            one.scores.append(reply.score)
    return found


def agnostic(reader: Reader, handle: Any, task: Task, examples: Sequence[Example]) -> list[Examined]:
    """The context read alone, and what was kept of it asked every question, from a copy each.

    A question is appended a token at a time, as if decoded, so that no policy evicts from it as from a piece, and no
    mechanism that decides from a whole prompt takes it for one.
    """
    found = [Examined([]) for _ in examples]
    contexts = Rows(reader)
    contexts.read([one.context for one in examples])
    note_bytes(found, handle, contexts)
    for row, one, example in zip(parts_kept(contexts.cache) or (), found, examples, strict=False):
        one.note_answers(reader, example.context, row, *example.questions)
    for turn in turns(examples):
        asked = asked_at(examples, turn)
        replies = [Reply(reader, task, question, []) for _, question in asked]
        asks = [reader.tokenizer.encode(question.text) for _, question in asked]
        decoded(contexts.taken([at for at, _ in asked]), replies, asks)
        for (at, _), reply in zip(asked, replies, strict=True):
            found[at].scores.append(reply.score)
    return found
