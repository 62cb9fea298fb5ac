"""Continuous batching: requests wait, read their prompts in chunks, decode as one batch, and give their pages back."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from saccade.cache import PagePool, Policy, Session
from saccade.errors import known, positive
from saccade.serve.reading import Reader

DENSE = "dense"


@dataclass(eq=False)
class Request:
    """A prompt and what is generated behind it.

    tokens: so far, a stop token included. finish: None while there is more to come, then "stop", "length", "cancelled"
    or "error", with `error` in words. reused: tokens of the prompt that another request had read.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    random: torch.Generator
    stop: frozenset[int]
    policy: str
    told: Callable[[Request], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    reused: int = 0
    read: int = 0  # tokens of prompt and tokens that are in the cache
    cancelled: bool = False

    def cancel(self) -> None:
        """Let the engine's next step begin with giving its pages back; from any thread."""
        self.cancelled = True

    def next(self, count: int = 1) -> Sequence[int]:
        """Tokens to be read next: `count` of the prompt at most, or one of those behind it."""
        behind = self.read - len(self.prompt)
        return self.prompt[self.read : self.read + count] if behind < 0 else self.tokens[behind : behind + 1]


@dataclass(eq=False)
class Batch:
    """Requests of one policy that decode together: row i of the session is requests[i]."""

    session: Session
    requests: list[Request]


class Engine:
    """Generates for many requests at once, each token what the model alone would have generated.

    A step reads one chunk of one prompt, and then decodes a token of every request that has been read: one forward
    pass, and in each layer one call of `attend_pages` a policy. Requests are served in the order in which they come.
    Keys and values lie in pages of one pool. Where a step would need more than there are, read prefixes that no one
    uses go first; then the youngest request gives all its pages back, waits, and reads its prompt and its own tokens
    again in the same pieces, so that it goes on as if nothing had been. A prompt that begins with the same chunks as an
    earlier one shares their pages, under any policy; a page is copied when one of its owners writes.

    model: a causal language model of transformers (see `saccade.hf.apply`), changed until `close`. policies: by name,
    what requests choose from (default: {"dense": Policy()}); the first is the default. pages: of the pool, each 16
    tokens of one key head of one layer (65536). chunk: tokens of a prompt that are read at once (256), whole pages.
    most: requests that hold pages at a time (64). prefixes: chunks remembered for later prompts (32). Cost: that of
    the model, and some ms of host a step. Errors: ValueError or TypeError that names the argument.

    `step`, `stream`, `run`, `cancel` and `close` belong to one thread; `submit` and `Request.cancel` to any.

    >>> from saccade.hosts.lm import LM, LMConfig
    >>> engine = Engine(LM(LMConfig(num_layers=2)).to_llama(), pages=256)
    >>> a, b = engine.submit(b"A whale", max_tokens=5), engine.submit(b"is no fish", max_tokens=3)
    >>> engine.run()
    >>> len(a.tokens), b.finish, engine.in_use
    (5, 'length', 0)
    >>> engine.close()
    """

    def __init__(
        self,
        model: Any,
        policies: Mapping[str, Policy] | None = None,
        *,
        pages: int = 65536,
        chunk: int = 256,
        most: int = 64,
        prefixes: int = 32,
    ) -> None:
        if policies is not None and not (isinstance(policies, Mapping) and policies):
            raise TypeError(f"policies: got {policies!r}; pass a dict of policies by name, or None for dense attention")
        self.policies = dict(policies or {DENSE: Policy()})
        for name, policy in self.policies.items():
            if not isinstance(policy, Policy):
                raise TypeError(f"policies: got {type(policy).__name__} for {name!r}; pass a Policy of saccade.cache")
        sizes = {name: policy.page for name, policy in self.policies.items()}
        self.page = next(iter(sizes.values()))
        if set(sizes.values()) != {self.page}:
            raise ValueError(f"policies: got pages of {sizes} tokens; a pool has pages of one size, pass the same page")
        self.pages, self.chunk = positive("pages", pages), positive("chunk", chunk)
        if chunk % self.page:
            raise ValueError(f"chunk: got {chunk}; pass whole pages, a multiple of {self.page}")
        self.most, self.prefixes = positive("most", most), positive("prefixes", prefixes, least=0)
        self.reader = Reader(model, self.policies.values())
        self.pools: dict[Any, PagePool] = {}
        self.waiting: list[Request] = []  # by number
        self.filling: Batch | None = None  # of one request, whose prompt is being read
        self.running: list[Batch] = []
        self.counts: Counter[str] = Counter()
        self.peak = 0
        self._numbers = itertools.count()
        self._new: deque[Request] = deque()
        self._read: OrderedDict[tuple[str, bytes], Session] = OrderedDict()  # prefixes, the least used first

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Iterable[int],
        *,
        max_tokens: int = 16,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Iterable[int] = (),
        policy: str | None = None,
        told: Callable[[Request], None] | None = None,
    ) -> Request:
        """A request that waits for its turn.

        prompt: tokens. max_tokens: to generate at most. temperature: 0 is greedy. seed: of the tokens that are drawn.
        stop: tokens behind which it ends. policy: by name. told: called, in the thread of `step`, with the request
        after each token and when it ends. Errors: ValueError for what can never fit the pool or the model.
        """
        prompt, stop = tuple(prompt), frozenset(stop)
        vocabulary = self.reader.model.config.get_text_config().vocab_size
        for name, ids in (("prompt", prompt), ("stop", stop)):
            wrong = next((t for t in ids if not (isinstance(t, int) and 0 <= t < vocabulary)), None)
            if wrong is not None:
                raise ValueError(f"{name}: got {wrong!r}; a token of this model is an integer in 0 .. {vocabulary - 1}")
        if not prompt:
            raise ValueError("prompt: got no tokens; pass at least one")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < 1e6:
            raise ValueError(f"temperature: got {temperature!r}; pass a number >= 0, where 0 is greedy")
        name = known("policy", next(iter(self.policies)) if policy is None else policy, self.policies)
        self._check_fit(len(prompt), positive("max_tokens", max_tokens), self.policies[name])
        random = torch.Generator().manual_seed(positive("seed", seed, least=0))
        request = Request(next(self._numbers), prompt, max_tokens, float(temperature), random, stop, name, told)
        self._new.append(request)
        return request

    def _check_fit(self, prompt: int, max_tokens: int, policy: Policy) -> None:
        longest = self.reader.longest
        if longest is not None and prompt + max_tokens > longest:
            raise ValueError(
                f"max_tokens: got {max_tokens} behind a prompt of {prompt} tokens; this model reads {longest} in all"
            )
        for name, tokens in (("prompt", 0), ("max_tokens", max_tokens)):
            count = self._least(prompt, tokens, policy)
            if count > self.pages:
                raise ValueError(
                    f"{name}: got {tokens or prompt} tokens, which need {count} pages; the pool has {self.pages}: ask "
                    "for fewer, or give the engine more pages"
                )

    def _least(self, prompt: int, tokens: int, policy: Policy) -> int:
        """Pages that a prompt and the tokens behind it hold at least, at their most."""
        layers, heads = self.reader.num_layers, self.reader.kv_heads

        def pages(seen: int, more: int) -> int:
            """Once `more` tokens come to what the policy left of those seen."""
            each = [(policy.tokens(seen, index, layers) or 0) + more for index in range(layers)]
            return sum(heads * -(-t // self.page) if t == seen + more else -(-heads * t // self.page) for t in each)

        pieces = [(start, min(self.chunk, prompt - start)) for start in range(0, prompt, self.chunk)]
        return max(pages(seen, more) for seen, more in [*pieces, (prompt, 0), (prompt + max(0, tokens - 1), 0)])

    def cancel(self, request: Request) -> None:
        """End a request and give its pages back now."""
        request.cancel()
        self._part_with_cancelled()

    def stream(self, request: Request) -> Iterator[int]:
        """Its tokens as they come; a stream that is closed early cancels it."""
        try:
            for at in itertools.count():
                while at == len(request.tokens):
                    if request.finish:
                        return
                    self.step()
                yield request.tokens[at]
        finally:
            if not request.finish:
                self.cancel(request)

    def run(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Step until every request has ended. progress: called with (ended, all, what is under way)."""
        before, more = self.counts["ended"], True
        while more:
            more = self.step()
            if progress:
                ended, left = self.counts["ended"] - before, len(self._new) + len(self.waiting) + len(self._holders())
                progress(ended, ended + left, f"{self.counts['generated']} tokens, {self.in_use} of {self.pages} pages")

    def close(self, why: str = "the engine was closed") -> None:
        """End all requests, give back all pages and the model."""
        self.fail(why)
        self.reader.restore()

    def fail(self, why: str) -> None:
        """End all requests with an error, and give back all pages."""
        self._arrive()
        ended, self.waiting = [*self.waiting, *self._holders()], []
        self._drop(set(ended))
        while self._read:
            self._forget()
        for request in ended:
            self._end(request, "error", why)

    # -- figures ---------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """Pages that are held, those of remembered prefixes included."""
        return sum(pool.in_use for pool in list(self.pools.values()))

    def metrics(self) -> dict[str, int]:
        """Counts since the start, and what there is now."""
        names = (
            "ended",
            "stop",
            "length",
            "cancelled",
            "error",
            "prompt",
            "reused",
            "generated",
            "passes",
            "preempted",
        )
        return {
            **{name: self.counts[name] for name in names},
            "waiting": len(self.waiting) + len(self._new),
            "reading": int(self.filling is not None),
            "running": sum(len(batch.requests) for batch in self.running),
            "pages": self.pages,
            "pages_in_use": self.in_use,
            "pages_peak": self.peak,
            "pages_taken": sum(pool.taken for pool in list(self.pools.values())),
            "pages_returned": sum(pool.returned for pool in list(self.pools.values())),
            "prefixes": len(self._read),
        }

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """A chunk of a prompt, and a token of every request that runs; False when nothing is left to do."""
        self._part_with_cancelled()
        self._start()
        self._fill()
        self._decode()
        return bool(self.waiting or self.filling or self.running or self._new)

    def _arrive(self) -> None:
        while self._new:
            bisect.insort(self.waiting, self._new.popleft(), key=attrgetter("number"))

    def _part_with_cancelled(self) -> None:
        self._arrive()
        gone = {each for each in (*self.waiting, *self._holders()) if each.cancelled}
        if not gone:
            return
        self.waiting = [each for each in self.waiting if each not in gone]
        self._drop(gone)
        for request in gone:
            self._end(request, "cancelled")

    def _holders(self) -> list[Request]:
        batches = [*self.running, *([self.filling] if self.filling else ())]
        return [request for batch in batches for request in batch.requests]

    def _start(self) -> None:
        """The oldest request that waits begins to read, when all of its tokens fit beside one more of the others."""
        if self.filling or not self.waiting or len(self._holders()) >= self.most:
            return
        request, rows = self.waiting[0], self.reader.num_layers * self.reader.kv_heads
        whole = self._least(len(request.prompt), len(request.tokens) + 2, self.policies[request.policy])
        others = rows * len(self._holders())
        while others and self.in_use + whole + others > self.pages:
            if not self._read:
                return
            self._forget()
        self.waiting.pop(0)
        session, request.read = self._remembered(request)
        if not request.tokens:
            request.reused = request.read
            self.counts["reused"] += request.read
        self.filling = Batch(session, [request])

    def _fill(self) -> None:
        """The next chunk of the prompt that is being read."""
        batch = self.filling
        if batch is None:
            return
        (request,), session = batch.requests, batch.session
        piece = request.next(self.chunk)
        if not self._room(lambda: self._growth(session, len(piece)), request):
            return
        logits = self._forward([batch], len(piece))
        if request.read < len(request.prompt):
            self._remember(request, session)
            return
        self.counts["prompt"] += len(request.prompt)
        self.filling = None
        self.running.append(batch)
        self._draw([request], logits)
        if not request.finish:
            self._merge(batch)

    def _merge(self, batch: Batch) -> None:
        """Let a request that has read its prompt decode with the others of its policy, where the policy can do that."""
        for other in self.running:
            if other is not batch and not batch.session.policy.periodic and not other.session.unlike(batch.session):
                other.session.join(batch.session)
                other.requests += batch.requests
                self.running.remove(batch)
                return

    def _decode(self) -> None:
        """One token of each request that runs."""
        if not self.running:
            return
        eldest = min(self._holders(), key=attrgetter("number"))
        if self._room(lambda: sum(self._growth(batch.session, 1) for batch in self.running), eldest) and self.running:
            logits = self._forward(self.running, 1)
            self._draw([request for batch in self.running for request in batch.requests], logits)

    def _forward(self, batches: Sequence[Batch], count: int) -> Tensor:
        """Logits of what comes after the next tokens of these requests, `count` of a prompt at most."""
        ids = [[request.next(count) for request in batch.requests] for batch in batches]
        begin = [[request.read for request in batch.requests] for batch in batches]
        sessions = [batch.session for batch in batches]
        logits = self.reader(list(zip(sessions, ids, begin, strict=True)))
        for batch, rows in zip(batches, ids, strict=True):
            for request, row in zip(batch.requests, rows, strict=True):
                request.read += len(row)
        self.peak = max(self.peak, self.in_use)
        self.counts["passes"] += 1
        return logits

    def _draw(self, requests: Sequence[Request], logits: Tensor) -> None:
        """The next token of each request that has read all it has, from logits (B, V)."""
        best = logits.argmax(-1).tolist()
        ended = set()
        for at, request in enumerate(requests):
            if request.read < len(request.prompt) + len(request.tokens):
                continue  # it reads again what it lost its pages of
            request.tokens.append(drawn(logits[at], request) if request.temperature else best[at])
            self.counts["generated"] += 1
            if request.tokens[-1] in request.stop or len(request.tokens) == request.max_tokens:
                ended.add(request)
            elif request.told:
                request.told(request)
        self._drop(ended)
        for request in requests:
            if request in ended:
                self._end(request, "stop" if request.tokens[-1] in request.stop else "length")

    def _end(self, request: Request, finish: str, error: str | None = None) -> None:
        request.error, request.finish = error, finish
        self.counts.update(("ended", finish))
        if request.told:
            request.told(request)

    # -- pages -----------------------------------------------------------------------------------------------------

    def _growth(self, session: Session, count: int) -> int:
        """Pages that `count` tokens more of each sequence take at most."""
        rows, fresh, layers = self.reader.kv_heads, -(-count // self.page), session.num_layers
        found = 0
        for index, store in enumerate(session.stores):
            if store is None:
                found += rows * fresh
            else:
                seen = int(store.seen.max()) + count
                found += store.growth(count, drops=session.policy.tokens(seen, index, layers) != seen)
        return found

    def _room(self, need: Callable[[], int], request: Request) -> bool:
        """Make room for pages, by parting with prefixes and with requests younger than this one; False without room.

        A request that has no room though it is alone ends with an error.
        """
        while (count := self.in_use + need()) > self.pages:
            if self._read:
                self._forget()
                continue
            holders = self._holders()
            youngest = max(holders, key=attrgetter("number"))
            if youngest is not request:
                self._preempt(youngest)
            elif len(holders) > 1:
                return False
            else:
                self._drop({request})
                why = f"{request.read} tokens were read, and those that follow need {count} pages in all"
                self._end(request, "error", f"pages: {why}; the pool has {self.pages}")
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._drop({request})
        request.read = 0
        bisect.insort(self.waiting, request, key=attrgetter("number"))
        self.counts["preempted"] += 1

    def _drop(self, gone: set[Request]) -> None:
        """Give back the pages of requests."""
        for batch in [*self.running, *([self.filling] if self.filling else ())]:
            rows = [row for row, request in enumerate(batch.requests) if request not in gone]
            if len(rows) == len(batch.requests):
                continue
            batch.requests = [batch.requests[row] for row in rows]
            if rows:
                batch.session.select(rows)
                continue
            batch.session.free()
            if batch is self.filling:
                self.filling = None
            else:
                self.running.remove(batch)

    # -- prefixes --------------------------------------------------------------------------------------------------

    def _key(self, request: Request, count: int) -> tuple[str, bytes]:
        return request.policy, hashlib.sha256(array("q", request.prompt[:count]).tobytes()).digest()

    def _remembered(self, request: Request) -> tuple[Session, int]:
        """A session that has read the longest known beginning of a prompt, and how much that is."""
        last = (len(request.prompt) - 1) // self.chunk * self.chunk
        for count in range(last, 0, -self.chunk):
            found = self._read.get(self._key(request, count))
            if found is not None:
                self._read.move_to_end(self._key(request, count))
                return found.fork(), count
        return self.reader.session(self.policies[request.policy], self.pools), 0

    def _remember(self, request: Request, session: Session) -> None:
        key = self._key(request, request.read)
        if self.prefixes and key not in self._read:
            self._read[key] = session.fork()
            if len(self._read) > self.prefixes:
                self._forget()

    def _forget(self) -> None:
        self._read.popitem(last=False)[1].free()


def drawn(logits: Tensor, request: Request) -> int:
    """A token with probability softmax(logits / temperature), by the request's own random numbers."""
    sums = (logits.double().cpu() / request.temperature).softmax(-1).cumsum(-1)
    at = torch.rand((), generator=request.random, dtype=torch.float64) * sums[-1]
    return int(torch.searchsorted(sums, at, right=True).clamp(max=len(sums) - 1))
