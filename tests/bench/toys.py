"""Small mechanisms for the benchmark's tests: some sound, some that misbehave each in one way."""

import torch
from torch import nn

from saccade.contract import Attention, CachePolicy, Dims, Mixer, Spec
from saccade.where import Causal, Neighborhood, Window


def spec(id, **changes):
    about = {
        "id": id,
        "name": id.replace("_", " ").capitalize(),
        "title": "A toy",
        "paper": "0000.00000",
        "year": 2020,
        "family": "toys",
        "uses": ("matmul",),
    }
    return Spec(**(about | changes))


def masked(q, k, v, mask):
    """Softmax attention under a boolean mask (N, N), key heads repeated."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Local(Attention):
    """Causal attention inside blocks of `size`, a block at a time."""

    spec = spec("local")
    causal = True

    def __init__(self, dims: Dims, *, size: int = 64):
        super().__init__(dims)
        self.size = size

    def compute(self, q, k, v):
        size = min(self.size, q.shape[2])
        pieces = [
            nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
            for part in zip(*(t.split(size, 2) for t in (q, k, v)), strict=True)
        ]
        return torch.cat(pieces, 2)

    def oracle(self, q, k, v):
        at = torch.arange(q.shape[2])
        block = at // self.size
        return masked(q, k, v, (block[:, None] == block) & (at[:, None] >= at))

    def plan(self, q, k):
        from saccade.where import Blocks

        return (Blocks(self.size) & Causal()).plan(q.shape[2], block=(64, 64))


class Banded(Attention):
    """A causal window by a dense mask: right, and no faster than dense."""

    spec = spec("banded")
    causal = True

    def __init__(self, dims: Dims, *, size: int = 96):
        super().__init__(dims)
        self.size = size

    def compute(self, q, k, v):
        return masked(q, k, v, Window(self.size).dense(q.shape[2])[0])

    def oracle(self, q, k, v):
        ago = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return masked(q, k, v, (ago >= 0) & (ago < self.size))

    def plan(self, q, k):
        return Window(self.size).plan(q.shape[2])


class Averaged(Attention):
    """Every query gets the mean of all values: linear time, no pairs."""

    spec = spec("averaged")

    def compute(self, q, k, v):
        return v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], 1).expand(*q.shape[:3], -1).clone()

    def oracle(self, q, k, v):
        group = q.shape[1] // k.shape[1]
        return torch.full((q.shape[2], q.shape[2]), 1 / q.shape[2]).to(v) @ v.repeat_interleave(group, 1)


class Near(Attention):
    """Neighbourhood attention on a grid of two axes, dense under a mask."""

    spec = spec("near", grid=2)

    def compute(self, q, k, v):
        return masked(q, k, v, Neighborhood(self.dims.grid, 5).dense(q.shape[2])[0])

    def oracle(self, q, k, v):
        rows, cols = self.dims.grid
        mask = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
        for i in range(rows * cols):
            top, left = min(max(i // cols - 2, 0), rows - 5), min(max(i % cols - 2, 0), cols - 5)
            for y in range(top, top + 5):
                mask[i, y * cols + left : y * cols + left + 5] = True
        return masked(q, k, v, mask)


class Smooth(Mixer):
    """A learned causal average of the last three tokens."""

    spec = spec("smooth")
    causal = True

    def __init__(self, dims: Dims):
        super().__init__(dims)
        self.taps = nn.Parameter(torch.full((3, dims.dim), 1 / 3))

    def compute(self, x):
        padded = nn.functional.pad(x, (0, 0, 2, 0))
        n = x.shape[1]
        return sum(padded[:, i : i + n] * self.taps[i] for i in range(3))

    def oracle(self, x):
        rows = []
        for t in range(x.shape[1]):
            row = torch.zeros_like(x[:, 0])
            for i in range(3):
                if t + i >= 2:
                    row = row + x[:, t + i - 2] * self.taps[i]
            rows.append(row)
        return torch.stack(rows, 1)


class Wrong(Local):
    """Its scale is off by a tenth."""

    spec = spec("wrong")

    def compute(self, q, k, v):
        return super().compute(q * 1.1, k, v)


class Flipped(Wrong):
    """Wrong as well, hiding behind discrete decisions."""

    spec = spec("flipped", discrete=True)


class Declines(Local):
    spec = spec("declines")

    def compute(self, q, k, v):
        raise ValueError("q: got float32; this toy wants something else")


class Picky(Local):
    """Takes lengths above 200 only, so the gate must offer it more than its smallest piece."""

    spec = spec("picky")

    def compute(self, q, k, v):
        if q.shape[2] <= 200:
            raise NotImplementedError("needs more than 200 tokens")
        return super().compute(q, k, v)


class Hungry(Local):
    spec = spec("hungry")

    def compute(self, q, k, v):
        if q.shape[2] > 600:
            return torch.empty(2**62, dtype=torch.int8)
        return super().compute(q, k, v)


class Crashes(Local):
    spec = spec("crashes")

    def compute(self, q, k, v):
        raise KeyError("lost")


class Blind(Local):
    """Its equations cannot be evaluated."""

    spec = spec("blind")

    def oracle(self, q, k, v):
        raise ZeroDivisionError("no equations")


class Overflows(Local):
    """Right where it is checked, infinite where it is timed."""

    spec = spec("overflows")

    def compute(self, q, k, v):
        out = super().compute(q, k, v)
        return out / 0.0 if q.shape[2] > 600 else out


class Endless(Local):
    """A Python loop without an end beyond the lengths at which it is checked."""

    spec = spec("endless")

    def compute(self, q, k, v):
        while q.shape[2] > 600:
            q = q + 0.0
        return super().compute(q, k, v)


class Chooses(Local):
    """Has a backend, and says so; asked for `fast` it runs `slow`."""

    spec = spec("chooses")

    def __init__(self, dims: Dims, *, size: int = 64, backend: str = "auto"):
        super().__init__(dims, size=size)
        self.backend = "slow" if backend == "fast" else backend


class Chaotic(Smooth):
    """Doubles its state at every token: beyond a few dozen of them no two ways of computing it agree."""

    spec = spec("chaotic")

    def compute(self, x):
        return self._iterate(x, lambda state: 4 * state * (1 - state))

    def oracle(self, x):
        return self._iterate(x, lambda state: 4 * (state - state * state))

    def _iterate(self, x, step):
        state, rows = torch.full_like(x[:, 0], 0.3), []
        for _ in range(x.shape[1]):
            state = step(state)
            rows.append(state)
        return torch.stack(rows, 1)


class Running(Attention):
    """The mean of all values so far: its state is their sum and their number, whatever was read."""

    spec = spec("running")
    causal = True

    def compute(self, q, k, v):
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return (v.cumsum(2) / count).repeat_interleave(self.dims.group, 1)

    def step(self, q, k, v, *, state=None):
        total, count = state or (torch.zeros_like(v), 0)
        total, count = total + v, count + 1
        return (total / count).repeat_interleave(self.dims.group, 1), (total, count)

    def oracle(self, q, k, v):
        n = v.shape[2]
        weights = torch.ones(n, n).tril().to(v) / torch.arange(1, n + 1).to(v)[:, None]
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


class Hoards(Running):
    """The same outputs from a state that keeps every value."""

    spec = spec("hoards")

    def step(self, q, k, v, *, state=None):
        state = v if state is None else torch.cat([state, v], 2)
        return state.mean(2, keepdim=True).repeat_interleave(self.dims.group, 1), state


class Stumbles(Running):
    """Right as a whole; a step crashes."""

    spec = spec("stumbles")

    def step(self, q, k, v, *, state=None):
        raise KeyError("lost")


class Dawdles(Running):
    """Right as a whole; a step never ends."""

    spec = spec("dawdles")

    def step(self, q, k, v, *, state=None):
        while True:
            v = v + 0.0


class Refuses(Running):
    """Has a step that these parameters do not have."""

    spec = spec("refuses")

    def step(self, q, k, v, *, state=None):
        raise ValueError("causal: got False; only a causal one decodes token by token")


class Recent(CachePolicy):
    """The last `size` keys, of which a decoder keeps no others; steps are left out, for nothing may run them."""

    spec = spec("recent")
    causal = True

    def __init__(self, dims: Dims, *, size: int = 96):
        super().__init__(dims)
        self.size = size

    def compute(self, q, k, v):
        return masked(q, k, v, Window(self.size).dense(q.shape[2])[0])

    def step(self, q, k, v, *, state=None):
        raise AssertionError("asked to run")

    def kept(self, num_tokens):
        return (torch.arange(num_tokens) >= num_tokens - self.size).expand(self.dims.num_kv_heads, -1)

    def oracle(self, q, k, v):
        ago = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return masked(q, k, v, (ago >= 0) & (ago < self.size))
