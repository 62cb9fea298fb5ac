"""`saccade serve`, and the table of `python -m saccade.serve.load`."""

import pytest
import uvicorn
from serve_models import made
from starlette.testclient import TestClient
from typer.testing import CliRunner

from saccade.cache import Evict, Policy, Quest
from saccade.cli import app
from saccade.serve import Engine, load
from saccade.serve.policies import MAKERS, named
from saccade.tasks.text import held_out_text

TEXT = bytes(held_out_text())


def test_the_bundled_model_is_served(monkeypatch):
    started = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.append((app, options)))
    options = ["--policy", "dense", "--policy", "snapkv=0.5", "--pages", "4096", "--port", "0"]
    found = CliRunner().invoke(app, ["serve", *options])
    assert found.exit_code == 0, found.output
    assert "bundled with dense, snapkv, 4096 pages" in found.output
    ((server, options),) = started
    assert (options["host"], options["port"]) == ("127.0.0.1", 0)
    prompt = TEXT[:300].decode()
    with TestClient(server) as client:
        for model in ("bundled", "bundled:snapkv"):
            asked = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
            assert len(choice["text"].encode()) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "snap=1"], "policy: got 'snap'; choose one of dense, adakv"),
        (["--policy", "snapkv"], "policy: got 'snapkv'; pass a budget, like snapkv=0.25 or snapkv=512"),
        (["--policy", "dense=1"], "policy: got 'dense=1'; dense attention has no budget"),
        (["--chunk", "100"], "chunk: got 100; pass whole pages, a multiple of 16"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--model", "/nowhere"], "model: transformers cannot load '/nowhere'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options, message):
    found = CliRunner().invoke(app, ["serve", *options])
    assert found.exit_code == 2
    assert found.output.startswith(f"saccade: {message}")
    assert found.output.count("\n") == 1


def test_policies_have_names():
    assert isinstance(named("dense")[1], Policy)
    assert isinstance(named("quest=0.5")[1], Quest)
    for name in set(MAKERS) - {"quest"}:
        found, policy = named(f"{name}=0.5")
        assert found == name
        assert isinstance(policy, Evict)


def test_a_load_counts_what_it_made():
    told = []
    found = load.measure(made(), b" " * 100, 3, Policy(), 16, 8, lambda *each: told.append(each))
    assert (found.streams, found.tokens) == (3, 24)
    assert found.rate == 24 / found.seconds > 0
    assert 0 < found.first < found.seconds
    assert found.processor > 0
    assert told[-1][:2] == (3, 3)
    with pytest.raises(ValueError, match="streams: got 7 of 16 tokens; the text has 100"):
        load.measure(made(), b" " * 100, 7, Policy(), 16, 8)


def test_a_load_that_loses_tokens_is_noticed(monkeypatch):
    monkeypatch.setattr(Engine, "_merge", lambda self, batch: batch.requests[0].cancel())
    with pytest.raises(RuntimeError, match="2 of 2 streams lost tokens"):
        load.measure(made(), b" " * 100, 2, Policy(), 16, 8)
