"""Steps that tell a device the same again and again: recorded once, and replayed without the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.cache.policy import Policy
from saccade.cache.session import Session
from saccade.errors import positive


class Replayed(Protocol):
    """What `run` once told a device, in `result`, and `replay`, which tells it again."""

    result: Any

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph of what `run` tells a GPU; its results lie where they lay."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.result = run()
        finally:
            torch.cuda.set_stream(stream)  # where a recording is broken off, torch stays on its own

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class Take:
    """A recording, the inputs that it reads, and what a replay adds to the host's counts: (B, Hkv) a store."""

    inputs: list[Tensor]
    left: int
    stamp: int = -1
    graph: Replayed | None = None
    more: Sequence[Tensor] = ()


class Kept:
    """What the host knows of some objects, to be put back: their attributes and what these hold, tensors in its memory
    among them. What lies on a device is left alone: a recording that fails has told that nothing yet. Policies hold no
    state.
    """

    def __init__(self, *objects: Any) -> None:
        self._known: list[tuple[Any, Any]] = []
        waiting, met = list(objects), set()
        while waiting:
            x = waiting.pop()
            if id(x) in met or isinstance(x, Policy | type):
                continue
            met.add(id(x))
            if isinstance(x, Tensor):
                if x.device.type == "cpu":
                    self._known.append((x, x.clone()))
            elif isinstance(x, dict | list):
                self._known.append((x, x.copy()))
                waiting += x.values() if isinstance(x, dict) else x
            elif type(x).__module__.startswith("saccade.") and hasattr(x, "__dict__"):
                waiting.append(vars(x))

    def put_back(self) -> None:
        for x, before in self._known:
            if isinstance(x, Tensor):
                x.copy_(before)
            elif isinstance(x, list):
                x[:] = before
            else:
                x.clear()
                x.update(before)


class Recorded:
    """`run(*inputs)`, one step of every layer of some sessions, replayed from a graph where that is the same.

    Before a recording, pages for the next `room` tokens are taken from the pools (`Store.reserve`), so that the device
    alone appends; the first step after that runs as it is, the second is recorded, those that follow are replays: the
    host counts, and waits for nothing. Where a policy's steps are not steady (`Session.steady`), where the sessions
    were changed in between, or where inputs are of other shapes, the step runs as it is, and recording begins anew.

    sessions: all that `run` reads into. run: tensors -> anything; it may not ask the device for a number. room: tokens
    a recording is good for (512); so many are allocated ahead. replayed: called after each replay, for counts of others
    than the sessions'. others: objects whose counts these are. graph: what records (`CudaGraph`). Results are those of
    `run`, to the last bit; tensors among them are overwritten by the next step. Costs a recording, once every `room`
    steps, the time of a step that runs as it is. Errors: RuntimeError, naming the policy, for a step that cannot be
    recorded; sessions and others are then as they were, and the step may be taken without recording.

    >>> from saccade.cache import Policy
    >>> from saccade.testing.tape import Tape
    >>> session, x = Session(Policy()), torch.randn(1, 2, 9, 8)
    >>> o = session.attend(0, *[x[:, :, :8]] * 3)
    >>> step = Recorded([session], lambda x: session.attend(0, x, x, x), room=32, graph=Tape)
    >>> [step(x[:, :, 8:]).shape[2] for _ in range(4)], session.stores[0].seen.tolist(), step.replays
    ([1, 1, 1, 1], [12], 3)
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        run: Callable[..., Any],
        *,
        room: int = 512,
        replayed: Callable[[], None] = lambda: None,
        others: Sequence[Any] = (),
        graph: Callable[[Callable[[], Any]], Replayed] = CudaGraph,
    ) -> None:
        self.sessions, self.run, self.room = sessions, run, positive("room", room, least=3)
        self.replayed, self.others, self.graph = replayed, others, graph
        self.replays = 0
        self._take: Take | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        take = self._take
        if take is None or not self._stands(take, inputs):
            return self._as_it_is(inputs)
        for x, new in zip(take.inputs, inputs, strict=True):
            x.copy_(new)
        take.left -= 1
        if take.graph is None:
            before = self._counts()
            take.graph = self._recorded(take)  # tells the host all, and the device nothing yet
            take.more = [after - then for after, then in zip(self._counts(), before, strict=True)]
            take.stamp = self._stamp()
            take.graph.replay()
        else:
            take.graph.replay()
            more = iter(take.more)
            for session in self.sessions:
                session.count(list(itertools.islice(more, session.num_layers)))
            self.replayed()
        self.replays += 1
        return take.graph.result

    def _recorded(self, take: Take) -> Replayed:
        before = Kept(*self.sessions, *self.others)
        try:
            return self.graph(lambda: self.run(*take.inputs))
        except Exception as error:
            before.put_back()
            self._take = None
            why: BaseException = error
            while why.__context__ is not None:  # a graph that is broken off says less than what broke it off
                why = why.__context__
            policies = ", ".join(dict.fromkeys(repr(session.policy) for session in self.sessions))
            raise RuntimeError(
                f"policy: a step of {policies}, which says that its steps are steady, cannot be recorded ({why}); let "
                "its `steady` return False where a step asks the device for a number, or decode without recording"
            ) from error

    def forget(self) -> None:
        """Record anew: `run` is about to do something else."""
        self._take = None

    def _stands(self, take: Take, inputs: Sequence[Tensor]) -> bool:
        return (
            take.left > 0
            and take.stamp == self._stamp()
            and [(x.shape, x.dtype) for x in take.inputs] == [(x.shape, x.dtype) for x in inputs]
        )

    def _as_it_is(self, inputs: Sequence[Tensor]) -> Any:
        """One step that is not recorded; the next one may be."""
        self._take = None
        if not all(session.steady for session in self.sessions):
            return self.run(*inputs)
        for session in self.sessions:
            session.reserve(self.room)
        take = Take([x.clone() for x in inputs], self.room - 1)
        found = self.run(*take.inputs)
        take.stamp = self._stamp()
        self._take = take
        return found

    def _stamp(self) -> int:
        """A number that is another once the host has changed anything but by replays."""
        return sum(session.moves for session in self.sessions)

    def _counts(self) -> list[Tensor]:
        return [session.store(i).counts for session in self.sessions for i in range(session.num_layers)]
