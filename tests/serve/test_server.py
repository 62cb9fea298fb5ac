"""The server: what clients get, whole and as events, over real connections, and what is left when they are gone."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import uvicorn
from serve_models import CHUNK, POLICIES, alone, made, prompts
from starlette.testclient import TestClient

from saccade.serve import Engine
from saccade.serve.server import Answer, Service, Worker, application
from saccade.tasks.prompts import Bytes


class Letters:
    """Text of the 60 characters behind the blank."""

    def encode(self, text):
        return [ord(c) - 31 for c in text]

    def decode(self, tokens):
        return "".join(chr(31 + t) for t in tokens)


TEXT = Letters()


@pytest.fixture
def model():
    return made()


def engine_of(model, **options):
    return Engine(model, POLICIES, **({"chunk": CHUNK, "pages": 4000, "prefixes": 0} | options))


@contextlib.contextmanager
def client_of(model, end=None, **options):
    with TestClient(application(Service(engine_of(model, **options), TEXT, "tiny", end))) as client:
        yield client


@contextlib.contextmanager
def listening(model, kind=Service, **options):
    """(address, engine) of a server on a real socket; on the way out its engine must hold nothing."""
    engine = engine_of(model, **options)
    config = uvicorn.Config(application(kind(engine, TEXT, "tiny")), port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname(), engine
    finally:
        server.should_exit = True
        thread.join()
    assert engine.in_use == 0
    assert engine.metrics()["pages_taken"] == engine.metrics()["pages_returned"]


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def asked(prompt, **options):
    return {"model": "tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0} | options


# -- what a client gets --------------------------------------------------------------------------------------------


def test_an_answer_is_what_generate_gives(model):
    read = prompts(2)[1]
    truth = TEXT.decode(alone(model, read, 9))
    with client_of(model) as client:
        found = client.post("/v1/completions", json=asked(TEXT.decode(read))).json()
        assert (found["object"], found["model"]) == ("text_completion", "tiny")
        (choice,) = found["choices"]
        assert (choice["text"], choice["finish_reason"]) == (truth, "length")
        counts = {"prompt_tokens": len(read), "completion_tokens": 9, "total_tokens": len(read) + 9}
        assert found["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
        streamed = client.post("/v1/completions", json=asked(read, stream=True))
        assert streamed.headers["content-type"].startswith("text/event-stream")
        parts = events(streamed.text)
        assert "".join(part["choices"][0]["text"] for part in parts) == truth
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert len(parts) > 2
        assert parts[-1]["usage"] == found["usage"]


def test_a_stop_is_not_sent_before_it_is_known_to_be_the_end():
    request = SimpleNamespace(tokens=TEXT.encode("ab."), finish=None, stop=frozenset(TEXT.encode(".")))
    answer = Answer(TEXT, request)
    assert answer.more() == "ab"
    request.finish = "stop"
    assert answer.more() == ""


def test_a_policy_is_chosen_by_the_name_of_the_model(model):
    read = prompts(1, 30, 30)[0] * 2
    truth = {name: TEXT.decode(alone(model, read[:30], 9, name)) for name in POLICIES}
    assert len(set(truth.values())) > 3
    with client_of(model) as client:
        names = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", *(f"tiny:{name}" for name in list(POLICIES)[1:])]
        for name, expected in zip(names, truth.values(), strict=True):
            found = client.post("/v1/completions", json=asked(read[:30], model=name)).json()
            assert found["choices"][0]["text"] == expected


def test_a_stop_ends_the_text_and_is_not_part_of_it(model):
    read = prompts(2)[1]
    whole = TEXT.decode(alone(model, read, 20))
    stop = whole[7]
    expected = whole[: whole.index(stop)]
    with client_of(model) as client, client_of(made(), end=3) as other:
        for stream in (False, True):
            body = client.post("/v1/completions", json=asked(read, max_tokens=20, stop=[stop], stream=stream)).text
            parts = events(body) if stream else [json.loads(body)]
            assert "".join(part["choices"][0]["text"] for part in parts) == expected
            assert parts[-1]["choices"][0]["finish_reason"] == "stop"
        assert other.get("/health").json() == {"status": "ok"}


def test_figures_and_health(model):
    with client_of(model) as client:
        client.post("/v1/completions", json=asked([3] * 9))
        found = client.get("/metrics").json()
        assert (found["generated"], found["prompt"], found["length"], found["pages_in_use"]) == (9, 9, 1, 0)
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt: got None; send a text, or a list of tokens"),
        ({"prompt": "\u1234"}, "prompt: got 4629; a token of this model"),
        ({"model": "large"}, "model: got 'large'; choose one of tiny, tiny:streaming"),
        ({"stream": 1}, "stream: got 1; send true or false"),
        ({"stop": "ab"}, "stop: got 'ab', which is 2 tokens"),
        ({"stop": 3}, "stop: got 3; send a text, or a list of texts"),
        ({"n": 2}, "n: got 2; it is not served"),
        ({"beams": 2}, "field: got 'beams'; choose one of model, prompt"),
        ({"max_tokens": "9"}, "max_tokens: got '9' (str)"),
        ({"max_tokens": 255}, "max_tokens: got 255 behind a prompt of 9 tokens"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
    ],
)
def test_a_bad_request_is_refused_by_name(model, change, message):
    with client_of(model) as client:
        found = client.post("/v1/completions", json=asked([3] * 9, n=1, user="me") | change)
        assert found.status_code == 400
        error = found.json()["error"]
        assert error["message"].startswith(message)
        assert error["param"] == message.partition(":")[0]
        assert client.post("/v1/completions", json=[]).json()["error"]["param"] == "body"
        assert client.post("/v1/completions", content=b"{").json()["error"]["param"] == "body"


def test_an_engine_that_fails_says_so_and_goes_on(model, capsys):
    fails = [True]

    class Breaks(Engine):
        def _forward(self, batches, count):
            if fails and len(batches[0].requests[0].tokens) == 3:
                fails.clear()
                raise RuntimeError("out of luck")
            return super()._forward(batches, count)

    engine = Breaks(model, POLICIES, chunk=CHUNK)
    with TestClient(application(Service(engine, TEXT, "tiny"))) as client:
        found = client.post("/v1/completions", json=asked([3] * 9))
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "the engine failed: RuntimeError: out of luck"
        assert client.post("/v1/completions", json=asked([3] * 9)).json()["usage"]["completion_tokens"] == 9
        fails.append(True)
        parts = events(client.post("/v1/completions", json=asked([3] * 9, stream=True)).text)
        assert parts[-1]["error"]["message"].startswith("the engine failed")
        assert engine.in_use == 0
    assert "out of luck" in capsys.readouterr().err


def test_half_a_character_waits_for_its_other_bytes(model):
    engine = engine_of(model)
    request = engine.submit([1])
    answer, found = Answer(Bytes(), request), []
    for byte in "né€!".encode() + b"\xe2\x82":
        request.tokens.append(byte)
        found.append(answer.more())
    assert found == ["n", "", "é", "", "", "€", "!", "", ""]
    request.finish = "length"
    assert answer.more() == "\N{REPLACEMENT CHARACTER}"
    engine.close()


# -- many clients, and clients that leave --------------------------------------------------------------------------


async def streamed(client, read, tokens):
    text = ""
    async with client.stream("POST", "/v1/completions", json=asked(read, max_tokens=tokens, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


def serves_many(model, kind=Service, count=200):
    read = prompts(count, 3, 30)
    truth = [TEXT.decode(alone(model, p, 4)) for p in read]

    async def all_of_them(address):
        limits = httpx2.Limits(max_connections=count)
        async with httpx2.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(streamed(client, p, 4) for p in read))

    with listening(model, kind, pages=400, prefixes=8) as ((host, port), _):
        found = asyncio.run(all_of_them(f"http://{host}:{port}"))
    assert found == truth, "a stream lost tokens, or got others"


def test_two_hundred_clients_lose_no_token(model):
    serves_many(model)


class Sloppy(Service):
    """Some of what comes before the end is not sent."""

    async def _events(self, request, told, about):
        async for text in super()._events(request, told, about):
            if '"finish_reason": null' not in text or request.number % 5:
                yield text


def test_a_lost_event_is_noticed(model):
    with pytest.raises(AssertionError, match="a stream lost tokens"):
        serves_many(model, Sloppy, 12)


def killed(model, stream, kind=Service, seconds=20.0):
    """A client whose connection breaks; its pages are free though it asked for much more, another's answer is whole."""
    read = prompts(2)[1]
    truth = alone(model, read, 200)
    with listening(model, kind) as (address, engine):
        body = json.dumps(asked(read, max_tokens=230, stream=stream)).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        stays = []

        def other():
            host, port = address
            url = f"http://{host}:{port}/v1/completions"
            stays.append(httpx2.post(url, json=asked(read, max_tokens=200), timeout=60).json())

        thread = threading.Thread(target=other)
        with socket.create_connection(address) as client:
            client.sendall(head % len(body) + body)
            until(lambda: engine.running)
            thread.start()
            until(lambda: engine.counts["generated"] > 8)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # break it
        try:
            until(lambda: engine.counts["cancelled"] == 1, seconds)
        finally:
            thread.join()
        until(lambda: not engine._holders())
        assert engine.in_use == 0
        assert engine.counts["generated"] < 230 + 200
    assert stays[0]["choices"][0]["text"] == TEXT.decode(truth)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_frees_its_pages(model, stream):
    killed(model, stream)


class Patient(Service):
    """Generates for clients that are gone."""

    def _part(self, request):
        pass


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_does_not_notice_is_noticed(model, stream):
    with pytest.raises(AssertionError, match="it did not come to that"):
        killed(model, stream, Patient, seconds=3)


@pytest.mark.parametrize("kind", [Service, Patient])
def test_a_client_that_is_gone_before_the_first_event(model, kind):
    engine = engine_of(model)
    service = kind(engine, TEXT, "tiny")

    async def goes():
        sent = iter([{"type": "http.request", "body": json.dumps(asked([3] * 9, stream=True)).encode()}])
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}

        async def receive():
            return next(sent, {"type": "http.disconnect"})

        async def send(message):
            raise AssertionError("there is nobody to send to")

        with contextlib.suppress(AssertionError):
            await application(service)(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)

        engine.step()
        assert engine.counts["cancelled"] == (kind is Service)
        engine.close()

    asyncio.run(goes())


def test_a_worker_that_stops_ends_all_requests(model):
    engine = engine_of(model)
    worker = Worker(engine)
    request = engine.submit([1] * 9, max_tokens=200)
    worker.start()
    until(lambda: request.tokens)
    worker.stop()
    assert (request.finish, request.error, engine.in_use) == ("error", "the server stopped", 0)
