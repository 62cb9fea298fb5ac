"""What a linear recurrence keeps of the tokens it has read, and how two stretches of tokens become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from saccade.scan import snapshot

WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Matrix:
    """A transition that multiplies a memory from the left; `value` (..., D, D).

    A bare tensor as a transition is an elementwise log decay; this wrapper tells the two apart.
    """

    value: Tensor


@dataclass(frozen=True)
class Untracked:
    """A transition that nobody keeps, for states that are gone on from and never put after another stretch.

    A decoder's states are of this kind: where the transition is as large as the memory, they are half as large, and a
    step moves half as many bytes. `UNTRACKED` is one: as the transition of a `State`, and as the `state` that a scan
    begins with, which is nothing, its transition not to be kept. What goes on from an untracked state is untracked.
    """


UNTRACKED = Untracked()
Transition = Tensor | Matrix | Untracked | None


@dataclass(frozen=True)
class State:
    """A stretch of tokens as a linear recurrence sees it: what it adds, and what it does to what came before.

        S_after = T(S_before) + memory

    memory: (..., D, Dv), float32 or wider, real or complex; its strides are whatever suits who made it.
    transition: the map T. None is the identity; a tensor is a log decay that broadcasts against the memory, (..., 1, 1)
    or (..., D, 1), applied as exp(transition) * S; a `Matrix` (..., D, D) is applied as value @ S; `UNTRACKED` says
    that it was not kept.
    shift: log scale of the memory, broadcastable against it; the true memory is exp(shift) * memory (default None: 1).

    `compose` is associative with `identity` as its unit, so prefix caches, decoding, ragged batches and scans over
    ranks are all folds of it. Costs D Dv for a decay and D^2 (D + Dv) for a matrix.
    Errors: TypeError for a memory narrower than float32, ValueError for parts that do not broadcast against it.

    >>> half = State(torch.ones(1, 1), torch.full((1, 1), 0.5).log())
    >>> half.compose(half).memory.item(), half.compose(half).transition.exp().item()
    (1.5, 0.25)
    """

    memory: Tensor
    transition: Transition = None
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        if self.memory.dtype not in WIDE:
            raise TypeError(f"memory: got dtype {self.memory.dtype}; sums over a sequence need float32 or wider")
        if self.memory.ndim < 2:
            raise ValueError(f"memory: got shape {tuple(self.memory.shape)}; pass (..., D, Dv)")
        shape = self.memory.shape
        if isinstance(self.transition, Matrix):
            fits = self.transition.value.shape[-2:] == (shape[-2], shape[-2])
            fits = fits and _broadcasts(self.transition.value.shape[:-2], shape[:-2])
        else:
            fits = not isinstance(self.transition, Tensor) or _broadcasts(self.transition.shape, shape)
        if not fits:
            value = self.transition.value if isinstance(self.transition, Matrix) else self.transition
            raise ValueError(
                f"transition: got shape {tuple(value.shape)} for a memory {tuple(shape)}; "  # type: ignore[union-attr]
                "pass a log decay that broadcasts against it, or Matrix of (..., D, D)"
            )
        if self.shift is not None and not _broadcasts(self.shift.shape, shape):
            raise ValueError(f"shift: got shape {tuple(self.shift.shape)}; it must broadcast against {tuple(shape)}")

    def identity(self) -> State:
        """The unit of `compose` for states shaped like this one: nothing added, nothing changed."""
        shift = None if self.shift is None else torch.full_like(self.shift, -torch.inf)
        return State(torch.zeros_like(self.memory), shift=shift)

    @property
    def tracked(self) -> bool:
        """Whether it has its transition, so that it can be put after another stretch."""
        return not isinstance(self.transition, Untracked)

    def untracked(self) -> State:
        """The same memory without its transition: what a decoder goes on from."""
        return State(self.memory, UNTRACKED, self.shift)

    def compose(self, later: State) -> State:
        """The two stretches as one, this one first.

            memory = T_later(memory) + later.memory,   T = T_later . T_self

        With shifts the sum is taken relative to the larger one; untracked where this one is.
        Errors: ValueError when the memories differ in shape, or the later stretch is untracked.
        """
        if not later.tracked:
            raise ValueError(
                "later: got an untracked state, which does not say what its tokens do to what came before; read them "
                "with state=None for a state that can, or with this one as `state`"
            )
        if self.memory.shape != later.memory.shape:
            raise ValueError(
                f"later: got a memory {tuple(later.memory.shape)} after {tuple(self.memory.shape)}; "
                "compose stretches of one model and one batch"
            )
        before, after, shift = self.memory, later.memory, None
        if self.shift is not None or later.shift is not None:
            first, second = (
                torch.zeros_like(before[..., :1, :1]).real if s is None else s for s in (self.shift, later.shift)
            )
            shift = torch.maximum(first, second)
            # Where both are -inf nothing has been read, and any finite reference does.
            finite = shift.masked_fill(shift == -torch.inf, 0.0)
            before, after = before * (first - finite).exp(), after * (second - finite).exp()
        return State(_apply(later.transition, before) + after, chain(self.transition, later.transition), shift)

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The states of several batches as the state of one, along the first dim.

        Errors: ValueError when there is none, or when their transitions or shifts are of different kinds.
        """
        kinds = {(type(s.transition), s.shift is None) for s in states}
        if len(kinds) != 1:
            raise ValueError(
                f"states: got {len(states)} with parts of {len(kinds)} kinds; pass states that one call made"
            )
        shifts = [s.shift for s in states if s.shift is not None]
        memory, shift = torch.cat([s.memory for s in states]), torch.cat(shifts) if shifts else None
        parts = [t.value if isinstance(t, Matrix) else t for t in (s.transition for s in states)]
        tensors = [t for t in parts if isinstance(t, Tensor)]
        if not tensors:
            return State(memory, states[0].transition, shift)
        transition = torch.cat(tensors)
        return State(memory, Matrix(transition) if isinstance(states[0].transition, Matrix) else transition, shift)

    def unbind(self) -> tuple[State, ...]:
        """One state a sequence of the batch, each with a first dim of 1; `cat` puts them together again.

        Every part must have the batch as its first dim, as the states have that the scans return.
        """
        return tuple(self._map(partial(torch.narrow, dim=0, start=i, length=1)) for i in range(self.memory.shape[0]))

    def detach(self) -> State:
        """The same state, cut off from the graph that made it."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> State:
        """The state on another device or in another dtype; arguments as for `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, each counted whole, as `save` writes them."""
        return snapshot.nbytes(self)

    def fork(self) -> State:
        """A plain copy, which shares no memory with this one: what one of them goes on to, the other never sees."""
        return self._map(torch.clone)

    def save(self, path: str | Path, *, mechanism: Any) -> None:
        """Write safetensors that `load` reads; mechanism: whose it is, a module or a name (`snapshot.save`)."""
        snapshot.save(path, self, mechanism=mechanism)

    @classmethod
    def load(
        cls, path: str | Path, *, mechanism: Any, like: State | None = None, device: str | torch.device = "cpu"
    ) -> State:
        """What `save` wrote for this mechanism; `like` and the refusals are those of `snapshot.load`.

        Errors: ValueError also for a file with another kind of state.
        """
        found = snapshot.load(path, mechanism=mechanism, like=like, device=device)
        if not isinstance(found, cls):
            raise ValueError(f"path: {str(path)!r} holds a {type(found).__name__}; read it with snapshot.load")
        return found

    def _map(self, function: Callable[[Tensor], Tensor]) -> State:
        return cast(State, snapshot.over(self, function))


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    tail = onto[len(onto) - len(shape) :]
    return len(shape) <= len(onto) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def begun(state: State | Untracked | None) -> tuple[State | None, bool]:
    """What a scan begins with, None for nothing, and whether it keeps the transition."""
    if isinstance(state, Untracked):
        return None, False
    return state, state is None or state.tracked


def _apply(transition: Transition, memory: Tensor) -> Tensor:
    if transition is None:
        return memory
    assert not isinstance(transition, Untracked)
    if isinstance(transition, Matrix):
        return transition.value @ memory
    return transition.exp() * memory


def chain(first: Transition, then: Transition) -> Transition:
    """The transition of two stretches in a row."""
    if isinstance(first, Untracked) or isinstance(then, Untracked):
        return UNTRACKED
    if first is None or then is None:
        return then if first is None else first
    if isinstance(first, Matrix):
        return Matrix(_apply(then if isinstance(then, Matrix) else _diagonal(then), first.value))
    if isinstance(then, Matrix):
        # A diagonal before a matrix scales its columns.
        return Matrix(then.value * _diagonal(first).exp().transpose(-1, -2))
    return first + then


def _diagonal(decay: Tensor) -> Tensor:
    if decay.shape[-1] != 1:
        raise ValueError(
            f"transition: a log decay {tuple(decay.shape)} that differs between the columns of a memory is no matrix; "
            "compose it with decays only"
        )
    return decay
