"""Steps that are replayed from a recording: the same tokens as steps that are not, whatever happens in between."""

import contextlib

import pytest
import torch
from hf_models import made, padded, tokens
from transformers import DynamicCache

from saccade.cache import Evict, KeyNorm, Policy, Quest, Recorded, Session, snapkv
from saccade.cache.recorded import Kept
from saccade.catalogue import mechanism
from saccade.hf import apply
from saccade.hf.caching import cache_name
from saccade.hf.layers import layers_of
from saccade.hf.recorded import recording
from saccade.softmax.page_rows import recorded
from saccade.testing.budget import assert_close
from saccade.testing.tape import Tape

STEADY = {
    "dense": Policy,
    "snapkv": lambda: snapkv(0.5, window=3),
    "quest": lambda: Quest(0.5, page=4),
    "duo_attention": lambda: mechanism("duo_attention"),
    "tidal_decode": lambda: mechanism("tidal_decode"),
    "loki": lambda: mechanism("loki"),
}
UNSTEADY = {"often": lambda: Evict(KeyNorm(), 0.5, every=2), "lychee_decode": lambda: mechanism("lychee_decode")}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generated(model, read, real, **options):
    return model.generate(read, attention_mask=real, do_sample=False, max_new_tokens=16, **options)


@contextlib.contextmanager
def taped(model, room=6):
    model.forward = recording(model.forward, room, Tape)
    yield
    del model.forward


@pytest.mark.parametrize("name", [*STEADY, *UNSTEADY])
def test_generates_the_same_tokens(name, replays):
    for read, real in ((tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)), padded("left")):
        model = made("llama")
        replays.clear()
        with apply(model, {**STEADY, **UNSTEADY}[name]()):
            truth = generated(model, read, real)
            with taped(model):
                assert torch.equal(generated(model, read, real), truth)
            steady = name in STEADY and name != "duo_attention"  # whose streams are not full yet
            assert len(replays) == (12 if steady else 0), "of 15 steps three are not replayed, one each recording"


def test_beams_are_not_replayed(replays):
    model, read = made("llama"), tokens(1, 9)
    with apply(model, Policy()):
        truth = generated(model, read, torch.ones_like(read), num_beams=3)
        with taped(model):
            assert torch.equal(generated(model, read, torch.ones_like(read), num_beams=3), truth)
    assert not replays


def test_streaming_heads_are_replayed_once_they_are_full(replays):
    model, read = made("llama"), tokens(1, 9)
    duo = [mechanism("duo_attention")(layer.dims, sink=2, recent=5) for layer in layers_of(model)]
    with apply(model, duo):
        truth = generated(model, read, torch.ones_like(read))
        with taped(model):
            assert torch.equal(generated(model, read, torch.ones_like(read)), truth)
    assert len(replays) == 12


def test_counts_of_the_host_follow_replays():
    model, ids = made("llama"), tokens(2, 9)
    with apply(model, Policy()) as handle, taped(model):
        past = DynamicCache()
        model(input_ids=ids, **{cache_name(model): past})
        for at in range(8):
            model(input_ids=ids[:, at : at + 1], **{cache_name(model): past})
        assert past.get_seq_length() == 17
        assert handle.memory().dense == 17 * 2 * sum(layer.bytes_a_token for layer in past.layers) // 2
        store = past.layers[0].session.store(0)
        assert (store.seen.tolist(), store.counts.tolist()) == ([17, 17], [[17, 17], [17, 17]])
        assert store.lengths.tolist() == [17] * 4


def test_what_changes_in_between_is_seen(replays):
    """A token taken back, sequences that change places: the next steps are right, and recorded anew."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 40, 8, dtype=torch.float64)

    def run(step, session):
        out = []
        for at in range(20, 38):
            out.append(step(*x[:, :, :, at : at + 1]))
            out[-1] = out[-1].clone()
            if at == 26:
                session.select([1, 1])
            if at == 31:
                session.store(0).crop(2)
        return torch.cat(out, 2)

    found = []
    for tape in (False, True):
        session = Session(Policy())
        session.attend(0, *x[:, :, :, :20])

        def step(*new, session=session):
            return session.attend(0, *new)

        found.append(run(Recorded([session], step, room=32, graph=Tape) if tape else step, session))
        store = session.store(0)
        session.free()
        assert store.pool.in_use == 0
        assert store.pool.taken == store.pool.returned
    assert_close(found[1], found[0], found[0], name="steps", terms=40)
    assert len(replays) >= 10


@pytest.mark.parametrize("name", [*STEADY, *UNSTEADY])
def test_a_compiled_model_generates_the_same_tokens(name):
    """What a policy does lies between the graphs of a compiler; the rest of the model is compiled around it."""
    model, read = made("llama"), tokens(2, 9)
    with apply(model, {**STEADY, **UNSTEADY}[name]()):
        truth = generated(model, read, torch.ones_like(read))
        model.model.compile(backend="eager")
        assert torch.equal(generated(model, read, torch.ones_like(read)), truth)


class Asks(Policy):
    """Says that its steps are steady, and asks, in the last layer, what a recording cannot be told."""

    def select(self, step):
        if step.index == 2 and asked(step.ends):
            raise RuntimeError("operation not permitted when stream is capturing")

    def steady(self, session):
        return True


def asked(x):
    """Whether a recording is under way: a GPU's, or a tape's."""
    return recorded() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def goes_on_after_a_recording_that_fails(model, ids, wrapped):
    """A step that fails is taken again, as it is; the next one is then to be recorded, and fails too."""
    with apply(model, Asks()) as handle:
        past, other, found = DynamicCache(), DynamicCache(), []
        model(input_ids=ids, **{cache_name(model): past})
        model(input_ids=ids, **{cache_name(model): other})
        steps = [ids[:, at : at + 1] for at in range(8)]
        truth = [model(input_ids=one, **{cache_name(model): other}).logits for one in steps]
        with wrapped(model, handle):
            found.append(model(input_ids=steps[0], **{cache_name(model): past}).logits)
            for one in steps[1:]:
                before = past.get_seq_length(), [layer.length for layer in past.layers], handle.memory().in_use
                with pytest.raises(RuntimeError, match=r"policy: a step of Asks\(\), which says"):
                    model(input_ids=one, **{cache_name(model): past})
                now = past.get_seq_length(), [layer.length for layer in past.layers], handle.memory().in_use
                assert now == before, "what is known has changed"
                found.append(model(input_ids=one, **{cache_name(model): past}).logits)
    assert_close(torch.cat(found, 1), torch.cat(truth, 1), torch.cat(truth, 1), terms=64)


def test_a_recording_that_fails_changes_nothing():
    goes_on_after_a_recording_that_fails(made("llama").double(), tokens(2, 9), lambda model, _: taped(model, 16))


def test_lengths_that_run_ahead_are_noticed(monkeypatch):
    monkeypatch.setattr(Kept, "put_back", lambda self: None)
    with pytest.raises(AssertionError, match="what is known has changed"):
        goes_on_after_a_recording_that_fails(made("llama").double(), tokens(2, 9), lambda model, _: taped(model, 16))


@pytest.mark.gpu
def test_a_recording_that_fails_on_a_gpu_changes_nothing():
    stream = torch.cuda.current_stream()
    model = made("llama").to("cuda", torch.float64)

    def wrapped(model, handle):
        handle.record(16)
        return contextlib.nullcontext()

    goes_on_after_a_recording_that_fails(model, tokens(2, 9).cuda(), wrapped)
    assert torch.cuda.current_stream() == stream


def test_recording_needs_a_policy():
    model = made("llama")
    with apply(model, "moba") as handle, pytest.raises(RuntimeError, match="no layer has a policy"):
        handle.record()
    handle = apply(model, Policy())
    handle.restore()
    with pytest.raises(RuntimeError, match="restored"):
        handle.record()


def test_restores_the_forward():
    model = made("llama")
    forward = model.forward
    with apply(model, Policy()) as handle:
        handle.record()
        assert model.forward != forward
    assert model.forward == forward


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*STEADY, *UNSTEADY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_the_same_tokens(name, dtype, replays):
    for read, real in ((tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)), padded("left")):
        model = made("llama").to("cuda", dtype)
        with apply(model, {**STEADY, **UNSTEADY}[name]()) as handle:
            truth = generated(model, read.cuda(), real.cuda())
            handle.record(8)
            assert torch.equal(generated(model, read.cuda(), real.cuda()), truth)
    assert (len(replays) > 0) == (name in STEADY and name != "duo_attention")
