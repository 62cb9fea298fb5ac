"""The contract of a mechanism that decides from the data what a decoder keeps or reads."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from saccade.cache.policy import Policy
from saccade.cache.session import Session
from saccade.contract import CachePolicy, Dims
from saccade.errors import positive


class Cached(CachePolicy):
    """A mechanism that is a `Policy` at work: N - decoded tokens are read in one piece, the rest one at a time.

    A subclass sets `self.policy` in its constructor and writes `oracle` (with `saccade.contract.replay`, which decodes
    by the book); `compute` follows. Rows of the piece are causal attention, so that it is causal.

    decoded: tokens that are decoded (16; all but one where there are fewer). num_layers: layers L that decide together;
    their heads lie one layer after another in the head axis, q (B, L H, N, D), k (B, L Hkv, N, D), and `dims` has those
    of all. A class whose constructor takes `num_layers` is built once for all layers of a model that it serves.
    """

    causal = True
    policy: Policy

    def __init__(self, dims: Dims, *, decoded: int = 16, num_layers: int = 1) -> None:
        super().__init__(dims)
        self.decoded = positive("decoded", decoded, least=0)
        self.num_layers = positive("num_layers", num_layers)
        if dims.num_kv_heads % num_layers:
            raise ValueError(
                f"num_layers: got {num_layers} for {dims.num_kv_heads} key heads; they are those of all layers, so "
                "pass a divisor"
            )
        self.per_head = type(self).per_head or num_layers > 1

    def session(self) -> Session:
        """Nothing read yet."""
        return Session(self.policy, self.num_layers)

    def read(self, session: Session, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The next tokens of all layers: a piece, or one token as a step."""
        layers = zip(*(x.chunk(self.num_layers, 1) for x in (q, k, v)), strict=True)
        return torch.cat([session.attend(index, *layer) for index, layer in enumerate(layers)], 1)

    def held(self, session: Session) -> Tensor:
        """bool (B, Hkv, tokens read): what the key heads of all layers hold."""
        return torch.cat([session.held(index) for index in range(self.num_layers)], 1)

    def limit(self, prompt: int) -> int | None:
        """Tokens that all key heads of all layers hold together after a prompt; None when that is not a number."""
        found = [self.policy.tokens(prompt, index, self.num_layers) for index in range(self.num_layers)]
        heads = self.dims.num_kv_heads // self.num_layers
        return None if None in found else heads * sum(filter(None, found))

    def prompt(self, num_tokens: int) -> int:
        """How many of `num_tokens` are read in one piece."""
        return max(1, num_tokens - self.decoded)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        if k.shape[2] != n:
            raise ValueError(f"k: got {k.shape[2]} keys for {n} queries; {self.spec.id} reads both from the first on")
        session, first = self.session(), self.prompt(n)
        ends = [0, *range(first, n + 1)]
        parts = [
            self.read(session, *(x[:, :, start:stop] for x in (q, k, v))) for start, stop in itertools.pairwise(ends)
        ]
        return torch.cat(parts, 2)
