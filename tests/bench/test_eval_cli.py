"""saccade eval: a model and a tokenizer of transformers from a folder, what it prints and writes, what it refuses."""

import json

import pytest
import torch
from typer.testing import CliRunner

from saccade.bench.eval_reader import load
from saccade.cli import app
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.prompts import haystack, task_named, tasks


def run(*words):
    return CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model and a tokenizer of pieces of words, which begins every text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator([haystack()[:20_000]], trainer)
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_dim": 32}
    LM(LMConfig(**sizes, max_length=1024)).to_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", sorted(tasks()))
def test_lengths_are_counted_in_the_tokens_of_the_model(folder, name):
    reader = load(str(folder))
    assert reader.tokenizer.start == (0,)
    assert reader.end == 1
    task = task_named(name)
    (one,) = task.examples(900, 1, tokenizer=reader.tokenizer)
    (question,) = one.questions
    whole = [*one.context, *reader.tokenizer.encode(question.text), *reader.tokenizer.encode(question.answer)]
    assert len(whole) == 900
    assert len(reader.tokenizer.decode(whole)) > 900
    assert reader.tokenizer.decode(whole).endswith(question.text + question.answer)
    assert one.text in reader.tokenizer.decode(one.context)


def test_a_run(folder, tmp_path):
    words = ("moba(block=16)", "--model", folder, "--tasks", "passkey,common_words", "--lengths", "640",
             "--count", 2, "--questions", 1, "--out", tmp_path / "deep" / "out")  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "0 of 2 tasks and lengths tell something" in result.stdout
    assert "common_words †" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "deep" / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["what"], r["task"], r["length"]) for r in rows] == [
        ("dense", "passkey", 640),
        ("moba(block=16)", "passkey", 640),
        ("dense", "common_words", 640),
        ("moba(block=16)", "common_words", 640),
    ]
    assert (tmp_path / "deep" / "out" / "results.csv").read_text().count("\n") == 5
    assert "| passkey † |" in (tmp_path / "deep" / "out" / "summary.md").read_text()
    assert "4 cells from before" in " ".join(run(*words).stdout.split())


def test_a_frontier(folder, tmp_path):
    words = ("streaming_llm", "moba(block=16)", "--frontier", "--budgets", "0.5,0.25", "--model", folder, "--tasks",
             "passkey", "--lengths", "640", "--count", 1, "--out", tmp_path)  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["what"], r["protocol"]) for r in rows] == [
        ("dense", "either"),
        ("streaming_llm(budget=0.25)", "query-aware"),
        ("streaming_llm(budget=0.25)", "query-agnostic"),
        ("moba(block=16)", "either"),
        ("streaming_llm(budget=0.5)", "query-aware"),
        ("streaming_llm(budget=0.5)", "query-agnostic"),
    ]
    assert all(r["dense_bytes"] > 0 for r in rows)
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [t["what"] for t in times] == ["dense", "streaming_llm(budget=0.25)", "moba(block=16)",
                                          "streaming_llm(budget=0.5)"]  # fmt: skip
    assert (tmp_path / "frontier.html").read_text().startswith("<!doctype html>")
    # An untrained model can do nothing, so that there is nothing to say.
    assert "the model cannot do it" in " ".join(result.stdout.split())
    assert "Nothing beside dense attention has a score." in result.stdout
    written = {"frontier.html", "frontier.md", "results.csv", "results.jsonl", "times.jsonl"}
    assert {p.name for p in tmp_path.iterdir()} == {*written, ".claims"}
    again = run("--frontier", "--only", "report", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert again.stdout.split()[-5:] == result.stdout.split()[-5:]


def test_scores_and_times_apart(folder, tmp_path):
    words = ("knorm", "--frontier", "--budgets", "0.5", "--model", folder, "--tasks", "passkey", "--lengths", "640",
             "--count", 1, "--out", tmp_path)  # fmt: skip
    assert run(*words, "--only", "scores").exit_code == 0
    assert not (tmp_path / "times.jsonl").exists()
    scores = (tmp_path / "results.jsonl").read_text()
    assert run(*words, "--only", "times").exit_code == 0
    assert len((tmp_path / "times.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "results.jsonl").read_text() == scores
    answered = run(*words[:-1], tmp_path / "new", "--only", "scores", "--answered")
    assert "Nothing else was asked it." in " ".join(answered.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "0.5"], "budgets: got '0.5' without a frontier; pass --frontier too"),
        (["--frontier", "--budgets", "0.5,x"], "budgets: got '0.5,x'; pass shares between commas, like 0.1,0.25,0.5"),
        (["--frontier", "--budgets", "0.5,2"], "budgets: got [0.5, 2.0]; pass shares in (0, 1], like 0.1,0.25,0.5"),
        (["--frontier", "--budgets", "nan"], "budgets: got [nan]; pass shares in (0, 1]"),
        (["--only", "charts"], "only: got 'charts'; choose one of scores, times, report"),
        (["--only", "times"], "only: got times without a frontier; pass --frontier too"),
        (["--recorded"], "recorded: got it without a frontier; pass --frontier too"),
        (["--frontier", "--recorded"], "recorded: got it on cpu; a GPU records steps, so pass --device cuda"),
        (["--at-once", "0"], "at_once: got 0; pass an integer >= 1"),
        (["--only", "report"], "out: no rows of an evaluation in "),
        (["--frontier", "snapkw"], "what: got 'snapkw'; choose one of dense, "),
        (["--frontier", "snapkv(size=1)"], "what: snapkv has no parameter 'size'; it has budget, window, pool"),
        (["quest"], "what: got quest; it needs budget, as in quest(budget=0.5)"),
        (["mobi"], "what: got 'mobi'; choose one of dense, "),
        (["moba(bloc=3)"], "what: moba has no parameter 'bloc'; it has block, top_k"),
        (["--tasks", "sorting"], "task: got 'sorting'; choose one of common_words, "),
        (["--lengths", "2m"], "lengths: got '2m'; pass tokens between commas, like 2k,4k,8k"),
        (["--lengths", "-4k"], "lengths: got -4096; pass an integer >= 1"),
        (["--lengths", "16k"], "lengths: got 16384; bundled reads at most 8192 tokens"),
        (["--lengths", "40", "--tasks", "multi_key"], "length: got 40 tokens; multi_key needs at least "),
        (["--count", "0"], "count: got 0; pass an integer >= 1"),
        (["--questions", "0"], "questions: got 0; pass an integer >= 1"),
        (["--seed", "-1"], "seed: got -1; pass an integer >= 0"),
        (["--budget", "0"], "budget: got 0; pass seconds > 0"),
        (["--limit", "0"], "limit: got 0; pass seconds > 0"),
        (["--device", "tpu"], "device: got 'tpu'; pass cpu, cuda or cuda:N"),
        (["--dtype", "int8"], "dtype: got 'int8'; choose one of "),
        (["--out", __file__], "out: got "),
        (["--model", "/nowhere/at/all"], "model: transformers cannot load '/nowhere/at/all'"),
    ],
)
def test_what_it_refuses(words, message, tmp_path):
    result = run(*(words if "--out" in words else [*words, "--out", tmp_path]))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"saccade: {message}")
