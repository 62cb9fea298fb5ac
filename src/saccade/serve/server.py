"""An engine behind HTTP, in the manner of OpenAI's completions: whole answers, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from saccade.errors import known
from saccade.serve.engine import Engine, Request

# What a client may send besides, as long as it asks for nothing.
NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "top_p": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": None,
    "presence_penalty": 0, "frequency_penalty": 0, "user": None, "stream_options": None,
}  # fmt: skip
TAKEN = ("model", "prompt", "max_tokens", "temperature", "seed", "stop", "stream")


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Worker(threading.Thread):
    """Steps an engine as long as there is something to do, and closes it in the end."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="saccade-engine", daemon=True)
        self.engine, self.stopping, self.wake = engine, False, threading.Event()

    def run(self) -> None:
        while not self.stopping:
            self.wake.clear()
            try:
                busy = self.engine.step()
            except Exception as error:  # told to every client, and on stderr
                traceback.print_exc()
                self.engine.fail(f"the engine failed: {type(error).__name__}: {error}")
                busy = False
            if not busy:
                self.wake.wait()
        self.engine.close("the server stopped")

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()
        self.join()


@dataclass
class Answer:
    """The text of a request, as far as it is settled: an unfinished character waits for its other bytes."""

    tokenizer: Tokenizer
    request: Request
    sent: int = 0

    def more(self) -> str:
        """What has come since the last call."""
        finish, tokens = self.request.finish, list(self.request.tokens)
        if tokens and tokens[-1] in self.request.stop:  # the engine says only later that it has ended
            tokens.pop()
        text = self.tokenizer.decode(tokens)
        text = text if finish else text.rstrip("\N{REPLACEMENT CHARACTER}")
        start, self.sent = self.sent, max(self.sent, len(text))
        return text[start:]

    def usage(self) -> dict[str, Any]:
        read, made = len(self.request.prompt), len(self.request.tokens)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": self.request.reused},
        }


def refusal(message: str, status: int = 400) -> JSONResponse:
    """An error as clients of OpenAI's interface know it; the argument stands before the colon."""
    name, colon, _ = message.partition(": ")
    about = {"message": message, "type": "invalid_request_error" if status < 500 else "server_error"}
    return JSONResponse({"error": about | {"param": name if colon else None}}, status)


class Service:
    """The endpoints.

    tokenizer: `encode` and `decode`. name: of the model, under the engine's first policy; `name:policy` is it under
    another. end: a token that ends a text, or None.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, end: int | None = None) -> None:
        self.engine, self.tokenizer, self.end = engine, tokenizer, end
        first, *others = engine.policies
        self.models = {name: first} | {f"{name}:{policy}": policy for policy in others}
        self.worker = Worker(engine)
        self.started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    async def health(self, _: Http) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self, _: Http) -> Response:
        return JSONResponse(self.engine.metrics() | {"seconds": int(time.time()) - self.started})

    async def list_models(self, _: Http) -> Response:
        about = {"object": "model", "created": self.started, "owned_by": "saccade"}
        listed = [{"id": name} | about | {"policy": repr(self.engine.policies[p])} for name, p in self.models.items()]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(self, http: Http) -> Response:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[bool]()
        try:
            body = self._checked(await self._json(http))
            request = self._submit(body, lambda r: loop.call_soon_threadsafe(told.put_nowait, r.finish is not None))
        except (ValueError, TypeError) as error:
            return refusal(str(error))
        about = {
            "id": f"cmpl-{request.number}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body["model"],
        }
        self.worker.wake.set()
        if body.get("stream"):
            return Events(self._events(request, told, about), lambda: self._part(request))
        watching = asyncio.create_task(self._cancel_when_left(http, request))
        try:
            while not await told.get():
                pass
        finally:
            watching.cancel()
            self._part(request)
        if request.finish == "error":
            return refusal(str(request.error), 500)
        answer = Answer(self.tokenizer, request)
        choice = {"index": 0, "text": answer.more(), "logprobs": None, "finish_reason": request.finish}
        return JSONResponse(about | {"choices": [choice], "usage": answer.usage()})

    async def _events(self, request: Request, told: asyncio.Queue[bool], about: dict[str, Any]) -> AsyncIterator[str]:
        answer, ended = Answer(self.tokenizer, request), False
        while not ended:
            ended = await told.get()
            text, finish = answer.more(), request.finish if ended else None
            if finish == "error":
                yield event({"error": {"message": request.error, "type": "server_error"}})
            elif text or ended:
                choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
                yield event(about | {"choices": [choice]} | ({"usage": answer.usage()} if ended else {}))
        yield "data: [DONE]\n\n"

    async def _cancel_when_left(self, http: Http, request: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._part(request)

    def _part(self, request: Request) -> None:
        """Nobody waits for a request any more."""
        if not request.finish:
            request.cancel()
            self.worker.wake.set()

    async def _json(self, http: Http) -> Any:
        try:
            return await http.json()
        except ValueError as error:
            raise ValueError(f"body: got no JSON, {error}; send a JSON object") from error

    def _checked(self, body: Any) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise TypeError(f"body: got {type(body).__name__}; send a JSON object")
        for name, value in body.items():
            known("field", name, [*TAKEN, *NEUTRAL])
            if name in NEUTRAL and value not in (None, NEUTRAL[name]) and name not in ("user", "stream_options"):
                raise ValueError(f"{name}: got {value!r}; it is not served, leave it out")
        body = {name: value for name, value in body.items() if value is not None}
        if not isinstance(body.setdefault("stream", False), bool):
            raise TypeError(f"stream: got {body['stream']!r}; send true or false")
        known("model", body.setdefault("model", next(iter(self.models))), self.models)
        return body

    def _submit(self, body: dict[str, Any], told: Any) -> Request:
        prompt, stop = body.get("prompt"), body.get("stop", [])
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        if not isinstance(prompt, list):
            raise TypeError(f"prompt: got {prompt!r}; send a text, or a list of tokens")
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
            raise TypeError(f"stop: got {stop!r}; send a text, or a list of texts")
        ends = [self.tokenizer.encode(each) for each in stops]
        for text, tokens in zip(stops, ends, strict=True):
            if len(tokens) != 1:
                raise ValueError(f"stop: got {text!r}, which is {len(tokens)} tokens; send texts of one token")
        return self.engine.submit(
            prompt,
            max_tokens=body.get("max_tokens", 16),
            temperature=body.get("temperature", 1.0),
            seed=body.get("seed", time.monotonic_ns() % 2**32),
            stop=[tokens[0] for tokens in ends] + ([] if self.end is None else [self.end]),
            policy=self.models[body["model"]],
            told=told,
        )


class Events(StreamingResponse):
    """Server-sent events. left: called in the end, whatever that is: a client may go before the first is asked for."""

    def __init__(self, events: AsyncIterator[str], left: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.left = left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.left()


def event(about: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(about)}\n\n"


def application(service: Service) -> Starlette:
    """A service as an ASGI application, whose end closes the engine."""
    return Starlette(
        routes=[
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.list_models),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        lifespan=service.lifespan,
    )
