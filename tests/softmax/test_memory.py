"""The tiles backend never forms an N x M tensor, forward or backward, whatever is asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.bench.memory import peak_bytes
from saccade.softmax import Alibi, RelativeTable, attend
from saccade.where import Causal, Full, Neighborhood, PerHead, Sinks, Strided, Window


class NoLarge(TorchDispatchMode):
    """Refuses operators that answer with `limit` elements or more."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                # What an expanded tensor repeats takes no memory.
                size = min(x.numel(), x.untyped_storage().nbytes() // x.element_size())
                self.largest = max(self.largest, size)
                assert size < self.limit, f"{func} formed {tuple(x.shape)}, {size} elements"
        return result


def check(n, where, options, backend):
    """Forward and backward of two heads sharing one key head; no tensor holds a quarter of N x N elements."""
    q, k, v = (torch.randn(1, heads, n, 8, requires_grad=True) for heads in (2, 1, 1))
    with NoLarge(n * n // 4):
        o = attend(q, k, v, where, **options, backend=backend)
        o.sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.any()


WHERE = {
    "window": (Window(129) & Causal(), {}),
    "window and sinks": (Causal() & (Window(64) | Sinks(4)), {"sink": torch.zeros(2), "softcap": 20.0}),
    "strided": (Strided(64) & Causal(), {}),
    "grid": (Neighborhood((64, 128), 7), {"bias": RelativeTable(2, (7, 7), (64, 128))}),
    "heads": (PerHead([Window(16), Causal() & Window(200)]), {"bias": Alibi(2)}),
    "sigmoid": (Window(64), {"normalizer": "sigmoid"}),
}


@pytest.mark.parametrize("name", WHERE)
def test_sparse(name):
    where, options = WHERE[name]
    check(8192, where, options, "tiles")


def test_causal():
    """Even where every second pair is attended, and biased."""
    check(4096, Causal(), {"bias": Alibi(2)}, "tiles")


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_dense(backend):
    check(4096, Full(), {}, backend)


def test_reference_is_caught():
    """The broken twin: the reference forms all pairs."""
    with pytest.raises(AssertionError, match="elements"):
        check(1024, Window(16), {}, "reference")


def test_peak_grows_with_tokens_and_not_with_pairs():
    peaks = []
    for n in (4096, 16384):
        q, k, v = (torch.randn(1, 1, n, 8) for _ in range(3))
        where = Window(65)
        attend(q, k, v, where)  # the plan is made once
        peaks.append(peak_bytes(lambda q=q, k=k, v=v, where=where: attend(q, k, v, where, backend="tiles")))
    assert peaks[1] < 5 * peaks[0]
