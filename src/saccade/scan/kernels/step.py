"""One token a call, as a decoder makes them: each state is read once and written once, and all else rides along.

With a state of s bytes a step costs 2 s, and 2 s more for a transition as large as the state (a matrix under the delta
rule, a decay an entry in the selective scan) unless the state is untracked. The old state stays as it is. Nothing is
read by the host, and shapes follow from shapes, so that a step can be captured in a CUDA graph. No gradients: a call
that asks for one goes through the chunked kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.scan import kernels
from saccade.scan.normalizers import Clamp, Normalizer, Sum
from saccade.scan.state import Matrix, State


def takes(backend: str, tokens: int, state: State | None, *given: Tensor | None) -> bool:
    """Whether a call is one for these kernels; `given` are its tensors, the one whose device counts first."""
    first = given[0]
    if tokens != 1 or first is None or not (backend == "triton" or (backend == "auto" and first.is_cuda)):
        return False
    if torch.is_grad_enabled():
        if state is not None:
            moved = state.transition.value if isinstance(state.transition, Matrix) else state.transition
            given = (*given, state.memory, moved if isinstance(moved, Tensor) else None, state.shift)
        if any(x is not None and x.requires_grad for x in given):
            return False
    return not kernels.unable(first)


class Ratio(NamedTuple):
    """How the kernel of linear attention divides what is read by its mass: not (0), as `Sum` (1) or as `Clamp` (2)."""

    kind: int = 0
    least: float = 0.0

    @classmethod
    def of(cls, policy: Normalizer | None) -> Ratio:
        """The division that is all a policy does; for one that does anything else, none."""
        if type(policy) is Sum:
            return cls(1, float(policy.eps))
        if type(policy) is Clamp:
            return cls(2, float(policy.least))
        return cls()


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    old: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
    track: bool,
    ratio: Ratio,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What queries read (B, H, 1, Dv), the mass (B, H, 1, 1) or None, the memory, and with `track` the sum of gates.

    As `kernels.scan`; q and k in any dtype, memory None for zeros. What is read comes in the dtype of v, or float32
    (wide), divided already where `ratio` says so, and then without the mass. old: the sum of the gates before, of the
    shape of the new one, (B, heads, 1, 1) or (B, heads, D, 1), None for zeros. A memory with a mass is returned with
    its columns one after another.
    """
    from saccade.scan.kernels import step_ops

    o, memory, total = step_ops.linear_step(
        _rows(q), _rows(k), _rows(v), _gate(g, q), None if memory is None else _lines(memory),
        None if old is None else old.contiguous(), scale, mass, wide, track, *ratio,
    )  # fmt: skip
    if not mass or ratio.kind:
        return o, None, memory, total if track else None
    return o[..., :-1], o[..., -1:], memory, total if track else None


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    old: Tensor | None,
    scale: float,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What queries read, the memory, and with `track` the product of all decays and erasures (B, heads, D, D).

    As `kernels.delta_scan`, with a vector gate too; memory None for zeros, old None for the identity.
    """
    from saccade.scan.kernels import step_ops

    o, memory, product = step_ops.delta_step(
        _rows(q), _rows(k), _rows(v), _single(beta), _gate(g, q), None if memory is None else _rows(memory),
        None if old is None else _rows(old), scale, track,
    )  # fmt: skip
    return o, memory, product if track else None


def selective(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    direct: Tensor | None,
    z: Tensor | None,
    memory: Tensor | None,
    old: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y like x, the memory (B, channels, S), and with `track` the sum of delta A, of the same shape.

    x, delta, z (B, 1, channels), a (channels, S), b, c (B, 1, G, S), bias, direct (channels,), memory and old (B,
    channels, S), None for zeros.
    """
    from saccade.scan.kernels import step_ops

    def whole(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _single(tensor).contiguous()

    tokens = [None if t is None else _rows(t) for t in (x, delta, z)]
    shared = [t if t[0].is_contiguous() else t.contiguous() for t in (_single(b), _single(c))]
    y, memory, total = step_ops.selective_step(
        tokens[0], tokens[1], whole(a), *shared, whole(bias), softplus, whole(direct), tokens[2],
        whole(memory), whole(old), track,
    )  # fmt: skip
    return y, memory, total if track else None


def _single(x: Tensor) -> Tensor:
    """x in at most float32, which is what the kernels compute in."""
    return x.float() if x.dtype == torch.float64 else x


def _rows(x: Tensor) -> Tensor:
    """x with channels one after another."""
    return _single(x if x.stride(-1) == 1 else x.contiguous())


def _lines(memory: Tensor) -> Tensor:
    """A memory with rows one after another, or columns."""
    return memory if memory.stride(-2) == 1 else _rows(memory)


def _gate(g: Tensor | None, q: Tensor) -> Tensor | None:
    if g is None:
        return None
    return _rows(g) if g.ndim == 4 else _single(g).expand(q.shape[0], -1, 1)
