"""What the scans write, forward and backward, grows with the tokens and no faster: twice the tokens, twice as much."""

from __future__ import annotations

import pytest
import torch
from recurrences import draw
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.scan import associative_scan, chunks, delta_rule, fast_weights, linear_attention, long_conv, selective_scan
from saccade.scan.associative_scan import affine
from saccade.scan.fast_weights import LinearMemory

D, CHUNK = 4, 8


class Written(TorchDispatchMode):
    """How many numbers the operators put out; views, which put out none, are not counted."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.numbers += sum(x.numel() for x in made if isinstance(x, torch.Tensor))
        return out


def tokens_of(n, *more):
    return [draw(1, 1, n, D, seed=seed) for seed in range(3)] + [draw(1, 1, n, *m, seed=5) for m in more]


def linear(*shape):
    def build(n):
        return lambda q, k, v, *g: linear_attention(
            q, k, v, log_decay=-g[0].exp() if g else None, chunk=CHUNK
        ), tokens_of(n, *shape)

    return build


def packed(n):
    cu = torch.arange(0, n + 1, CHUNK, dtype=torch.int32)
    return lambda q, k, v: linear_attention(q, k, v, cu_seqlens=cu), tokens_of(n)


def delta(n):
    return lambda q, k, v, beta: delta_rule(q, k, v, beta.sigmoid(), chunk=CHUNK), tokens_of(n, ())


def selective(n):
    x = [draw(1, n, D, seed=seed) for seed in range(4)]
    A = -torch.ones(D, D, dtype=torch.float64)
    return lambda x, d, b, c: selective_scan(x, d.exp(), A, b, c, chunk=CHUNK), x


def learned(n):
    memory = LinearMemory(D)
    return lambda q, k, v: fast_weights(memory, memory.init(1, 1), k, v, q=q, eta=0.01, chunk=CHUNK), tokens_of(n)


def affine_scan(n):
    return lambda a, b: associative_scan(affine, (a.sigmoid(), b), dim=2)[1], tokens_of(n)[:2]


def convolution(n):
    return long_conv, [draw(1, D, n), draw(D, n)]


def sliced(n):
    """A twin that takes one slice a chunk, each of whose gradients is as long as the sequence."""
    return lambda x: torch.cat([x[:, :, a : a + CHUNK].exp() for a in range(0, n, CHUNK)], 2), tokens_of(n)[:1]


def growth(build, n=512):
    written = []
    for length in (n, 2 * n):
        function, tensors = build(length)
        leaves = [x.requires_grad_() for x in tensors]
        with Written() as seen:
            torch.autograd.grad(function(*leaves).sum(), leaves)
        written.append(seen.numbers)
    return written[1] / written[0]


@pytest.mark.parametrize(
    "build",
    [linear(), linear(()), linear((D,)), packed, delta, selective, learned, affine_scan, convolution],
    ids=["plain", "scalar", "vector", "packed", "delta", "selective", "fast_weights", "associative", "long_conv"],
)
def test_training_writes_in_proportion_to_the_tokens(build, monkeypatch):
    # Many stretches of chunks, not one.
    monkeypatch.setattr(chunks, "ABREAST", 4)
    assert growth(build) < 2.05


def test_a_slice_a_chunk_is_caught():
    assert growth(sliced) > 3
