"""The guard, the gate, memory, drawings and patterns as text."""

import contextlib
import math
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import toys
from torch.nn.attention import SDPBackend

from saccade.bench.accuracy import gate
from saccade.bench.contestant import Entry
from saccade.bench.dense import dense_attention, kernels
from saccade.bench.draw import draw_mechanism, draw_pattern, influence, inputs_for, reference
from saccade.bench.expression import parse_pattern
from saccade.bench.guard import Failed, guard
from saccade.bench.inputs import Synthetic
from saccade.bench.memory import available_bytes, peak_bytes
from saccade.bench.records import Status
from saccade.contract import Dims
from saccade.testing.rounding import RUNS
from saccade.where import Causal, Neighborhood, PerHead, Sinks, Window

SAMPLE = Synthetic((1, 4, 2, 64, 16)).sample(150)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), Status.UNSUPPORTED),
        (NotImplementedError(""), Status.UNSUPPORTED),
        (MemoryError("full"), Status.OOM),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Status.OOM),
        (RuntimeError("shapes"), Status.WRONG),
        (AssertionError(), Status.WRONG),
    ],
)
def test_what_goes_wrong_becomes_a_status(error, status):
    with pytest.raises(Failed) as failure, guard():
        raise error
    assert failure.value.status == status
    assert failure.value.message
    assert "\n" not in failure.value.message


def test_a_limit_of_a_guard_further_out_passes_through():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Failed, match=r"stopped after 0\.1 s"), guard(0.1), guard():
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_limit_cannot_be_swallowed():
    def stubborn():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    with pytest.raises(Failed) as failure, guard(0.1):
        stubborn()
    assert failure.value.status == Status.TIMEOUT


def test_off_the_main_thread_there_is_no_limit():
    done = []

    def work():
        with guard(0.01):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_gate_tells_right_from_wrong_in_every_dtype(dtype):
    inputs = (SAMPLE.q, SAMPLE.k, SAMPLE.v)
    right, wrong = (gate(cls(SAMPLE.dims), inputs, dtype) for cls in (toys.Local, toys.Wrong))
    assert right.ok
    assert right.tokens == 150
    assert not wrong.ok
    assert wrong.error > right.error


def test_the_gate_sees_what_a_layer_scale_of_zero_would_hide():
    class Scaled(toys.Smooth):
        """Wrong, times a scale that begins at zero."""

        spec = toys.spec("scaled")

        def __init__(self, dims):
            super().__init__(dims)
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def compute(self, x):
            return x + self.scale * super().compute(2 * x)

        def oracle(self, x):
            return x + self.scale * super().oracle(x)

    assert not gate(Scaled(SAMPLE.mixer_dims), (SAMPLE.x,), torch.float32).ok


def test_the_gate_refuses_another_shape():
    class Short(toys.Local):
        spec = toys.spec("short")

        def compute(self, q, k, v):
            return super().compute(q, k, v)[:, :, 1:]

    found = gate(Short(SAMPLE.dims), (SAMPLE.q, SAMPLE.k, SAMPLE.v), torch.float32)
    assert not found.ok
    assert found.message == "output has shape (1, 4, 149, 16), its equations give (1, 4, 150, 16)"


def test_dense_attention_is_the_same_by_every_kernel():
    q, k, v = (torch.randn(1, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2))
    for causal in (False, True):
        plain = dense_attention(q, k, v, causal)
        torch.testing.assert_close(dense_attention(q, k, v, causal, SDPBackend.MATH), plain)
    assert kernels("cpu") == {"sdpa": None}
    on_cuda = kernels("cuda:0")
    assert next(iter(on_cuda)) == "sdpa"
    assert len(set(on_cuda.values())) == len(on_cuda) == 4


def test_further_eager_runs_begin_only_while_there_is_time(monkeypatch):
    runs = []
    oracle = toys.Wrong.oracle

    def counted(self, q, k, v):
        runs.append(q.dtype)
        return oracle(self, q, k, v)

    monkeypatch.setattr(toys.Wrong, "oracle", counted)
    inputs = (SAMPLE.q, SAMPLE.k, SAMPLE.v)
    assert not gate(toys.Wrong(SAMPLE.dims), inputs, torch.float32, seconds=0.0).ok
    assert runs.count(torch.float32) == 1
    runs.clear()
    assert not gate(toys.Wrong(SAMPLE.dims), inputs, torch.float32).ok
    assert runs.count(torch.float32) == RUNS


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.ones(1000)
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: ((x + 1) * 2, None)[1]) == 8000
    assert peak_bytes(lambda: [x + i for i in range(5)]) == 20000
    assert peak_bytes(lambda: (x + 1).view(10, 100).T) == 4000
    assert peak_bytes(lambda: x.view(10, 100)) == 0
    assert peak_bytes(lambda: x.add_(1)) == 0
    assert available_bytes() > 2**20


def test_the_drawing_of_attention_is_its_weights():
    found = influence(Entry(toys.Local), SAMPLE.crop(100))
    module = toys.Local(SAMPLE.dims)
    at = torch.arange(100)
    mask = (at[:, None] >= at) & (at[:, None] // 64 == at // 64)
    q, k = SAMPLE.q[:, :, :100], SAMPLE.k[:, :, :100].repeat_interleave(2, 1)
    weights = (q @ k.mT / module.dims.head_dim**0.5).masked_fill(~mask, -math.inf).softmax(-1)[0].mean(0)
    torch.testing.assert_close(found.matrix, weights)


def test_a_long_sequence_is_drawn_by_cells_that_keep_its_mass():
    found = influence(Entry(toys.Local), Synthetic((1, 2, 2, 1, 16)).sample(500))
    assert found.matrix.shape == (500, 128)
    torch.testing.assert_close(found.matrix.sum(1), torch.ones(500))


def test_the_drawing_of_a_layer_is_the_support_of_its_jacobian():
    found = influence(Entry(toys.Smooth), SAMPLE.crop(32))
    ago = torch.arange(32)[:, None] - torch.arange(32)
    assert torch.equal(found.matrix > 1e-9, (ago >= 0) & (ago < 3))


def test_dense_attention_is_drawn_beside():
    found = reference(SAMPLE, causal=True)
    assert found.matrix.shape == (150, 128)
    assert torch.equal(found.matrix[0] > 0, torch.arange(128) == 0)


def test_drawings_are_pictures(tmp_path):
    from PIL import Image

    drawing = influence(Entry(toys.Near), Synthetic((1, 2, 2, 1, 8)).sample(64, 2))
    captions = [caption for caption, _ in drawing.images()]
    assert captions == ["one query on 8×8", "64 tokens"]
    assert all(uri.startswith("data:image/png;base64,") for _, uri in drawing.images())
    path = drawing.save(tmp_path / "deep" / "near.png")
    with Image.open(path) as image:
        assert image.size == (2 * (512 + 24) + 24, 512 + 48)


def test_a_mechanism_of_several_ranks_gets_the_first_that_some_inputs_have():
    class Sequences(Synthetic):
        ranks = (0, 1)

    class Grids(Synthetic):
        ranks = (2, 3)

    class Any(toys.Near):
        spec = replace(toys.Near.spec, grid=(2, 1, 0))

    sequences, grids = Sequences((1, 2, 2, 1, 8)), Grids((1, 2, 2, 1, 8))
    assert inputs_for(Any, [sequences, grids]) == (grids, 2)
    assert inputs_for(Any, [sequences]) == (sequences, 1)
    assert inputs_for(toys.Near, [sequences]) is None
    for grid in ((8, 8), (64,), None):
        assert Any(Dims(2, 8, grid=grid)).dims.grid == grid
    with pytest.raises(ValueError, match=r"near works on a grid of 1 or 2 axes, or a sequence, got \(4, 4, 4\)"):
        Any(Dims(2, 8, grid=(4, 4, 4)))


def test_drawing_what_does_not_fit():
    class Sequences(Synthetic):
        ranks = (0,)

    with pytest.raises(Failed, match="needs a grid of 2 axes; none of the inputs"):
        draw_mechanism(toys.Near, [Sequences((1, 2, 2, 1, 8))], 64)
    with pytest.raises(Failed, match="this toy wants something else"):
        draw_mechanism(toys.Declines, [Synthetic((1, 2, 2, 1, 8))], 64)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Window(16) & Causal()", Window(16) & Causal()),
        (" Sinks(4) | Window(size=8) ", Sinks(4) | Window(8)),
        ("Neighborhood((6, 6), 3, causal=False)", Neighborhood((6, 6), 3)),
        ("PerHead([Window(4), Causal()])", PerHead([Window(4), Causal()])),
    ],
)
def test_patterns_as_text(text, pattern):
    heads = 2 if isinstance(pattern, PerHead) else 1
    assert torch.equal(parse_pattern(text).dense(36, heads=heads), pattern.dense(36, heads=heads))
    assert draw_pattern(parse_pattern(text), 36).matrix.shape == (36, 36)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Window(", r"pattern: got 'Window\(', which is no expression"),
        ("Windows(3)", "pattern: got 'Windows'; choose from Band, .*Window"),
        ("And(1)", "pattern: got 'And'; choose from"),
        ("__import__('os').system('id')", "pattern: got .* use patterns, &, |, numbers and lists"),
        ("Window(abs(3))", "pattern: got 'abs'; choose from"),
        ("Window(x)", "pattern: got 'x' in"),
        ("(3)", r"pattern: got '\(3\)', which is no pattern"),
        ("Window(0)", "size: got 0; pass an integer >= 1"),
    ],
)
def test_text_that_is_no_pattern(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_patterns_too_long_to_draw():
    with pytest.raises(ValueError, match="length: got 10000; a drawing holds at most 8192 tokens"):
        draw_pattern(Causal(), 10000)
